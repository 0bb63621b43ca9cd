package apigee

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"keygate/catalog"
	"keygate/jsonobject"
)

// ReaderConfig of a Reader.
type ReaderConfig struct {
	// Name of the input, for places.
	Name string
	// AllowWeakKeys takes consumer keys under catalog.MinKeyLength too.
	AllowWeakKeys bool
}

// Reader reads developer apps from an input: one "get developer app" answer,
// several one after another or one a line, a list of them, or the answer of a
// list call, {"app":[…]}. It holds one app at a time. It is not safe for
// concurrent use.
type Reader struct {
	w         window
	allowWeak bool
	mode      mode
	anything  bool // was there a record, or a list
	first     bool // of a list: no element yet
	comma     bool // stands between two elements of a list
}

type mode uint8

const (
	modeTop  mode = iota
	modeList      // in a list
	modeApps      // in the list of a list call's answer
	modeTail      // behind that list, in its object
	modeDone
)

// NewReader returns a Reader over r.
func NewReader(cfg ReaderConfig, r io.Reader) *Reader {
	return &Reader{
		w:         window{r: r, name: cfg.Name, line: 1, col: 1, mark: -1},
		allowWeak: cfg.AllowWeakKeys,
	}
}

// Next returns the next app, or the refusal of one: a broken record refuses
// itself, and reading goes on behind it where its end, or a later line that
// begins with a brace, can be found. The error is io.EOF at the end, else the
// input could not be read.
func (r *Reader) Next() (catalog.Submission, error) {
	s, ok := r.next()
	if err := r.w.err; err != nil && err != io.EOF {
		return catalog.Submission{}, fmt.Errorf("read %s: %w", r.w.name, err)
	}
	if !ok {
		return catalog.Submission{}, io.EOF
	}
	return s, nil
}

func (r *Reader) next() (s catalog.Submission, ok bool) {
	w := &r.w
	for {
		w.skipSpace()
		c, more := w.peek()
		switch {
		case r.mode == modeDone:
			return s, false
		case !more:
			inside := r.mode != modeTop
			r.mode = modeDone
			switch {
			case inside:
				return refuse(w.place(), "the list is not closed: the input ends too early"), true
			case !r.anything:
				return refuse(catalog.Place{Name: w.name}, "there is nothing in it"), true
			}
			return s, false
		case r.mode == modeTail:
			w.clearMark()
			r.mode = modeTop
			again, err := w.skipValue(wantCommaOrEnd, []byte("{"), true)
			if err == nil && again {
				err = errors.New(`member "app" stands twice`)
			}
			if err != nil {
				w.setMark()
				return r.broken(w.place(), err), true
			}
		case r.mode == modeTop && c == '[':
			r.enter(modeList)
			w.advance()
		case r.mode == modeTop && c != '{':
			w.setMark()
			what := "want a JSON object or list"
			if c == 0xEF || c == 0xFE || c == 0xFF {
				what += "; this looks like a byte order mark: save it as UTF-8 without one"
			}
			return r.broken(w.place(), errors.New(what)), true
		case r.mode == modeTop:
			return r.record(true)
		case c == ']' && (r.first || !r.comma):
			w.advance()
			if r.mode == modeApps {
				r.mode = modeTail
			} else {
				r.mode = modeTop
			}
		case !r.first && !r.comma && c == ',':
			w.advance()
			r.comma = true
		case !r.first && !r.comma:
			w.setMark()
			return r.broken(w.place(), errors.New("want ',' or ']' here")), true
		default:
			return r.record(false)
		}
	}
}

func (r *Reader) enter(m mode) {
	r.mode, r.first, r.comma, r.anything = m, true, false, true
}

// record reads the value at which the window stands.
func (r *Reader) record(top bool) (catalog.Submission, bool) {
	w := &r.w
	w.setMark()
	start := w.place()
	r.first, r.comma, r.anything = false, false, true
	inList, err := w.skipValue(wantValue, nil, top)
	switch {
	case err != nil:
		return r.broken(w.place(), err), true
	case inList:
		w.clearMark()
		r.enter(modeApps)
		return r.next()
	}
	data := bytes.Clone(w.buf[w.mark:w.pos])
	w.clearMark()
	return r.decode(start, data), true
}

// broken refuses the record that began at the mark and looks for one behind it.
func (r *Reader) broken(at catalog.Place, err error) catalog.Submission {
	w := &r.w
	start := w.markPlace()
	w.rewind()
	passed := w.nextLine()
	reason := err.Error()
	if _, more := w.peek(); !more {
		if passed > 0 {
			reason += fmt.Sprintf("; nothing behind line %d was read", start.Line)
		}
		r.mode = modeDone // its missing end needs no refusal of its own
	}
	r.first, r.anything = true, true
	s := refuse(start, "")
	s.Refused[0] = catalog.Refusal{Place: at, Reason: reason}
	return s
}

func refuse(at catalog.Place, reason string) catalog.Submission {
	return catalog.Submission{Place: at, Refused: []catalog.Refusal{{Place: at, Reason: reason}}}
}

// decode reads one record, found whole.
func (r *Reader) decode(start catalog.Place, data []byte) catalog.Submission {
	if data[0] != '{' {
		reason := "want an app's JSON object"
		if data[0] == '"' {
			reason += "; a list of names is what a list call without expand=true answers"
		}
		return refuse(start, reason)
	}
	s := catalog.Submission{Place: start}
	if r, ok := check(start, data); !ok {
		s.Refused = []catalog.Refusal{r}
		return s
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, data); err == nil { // it is valid: there is no error
		s.Digest = sha256.Sum256(compact.Bytes())
	}
	d := decoder{start: start, data: data, allowWeak: r.allowWeak}
	app, err := d.app(0)
	if err != nil {
		s.Refused = []catalog.Refusal{*err}
		return s
	}
	s.App, s.Refused = &app, d.refused
	return s
}

// check tells what is wrong with a record as JSON.
func check(start catalog.Place, data []byte) (r catalog.Refusal, ok bool) {
	err := jsonobject.Check(data)
	if err == nil {
		return r, true
	}
	r = catalog.Refusal{Place: start, Reason: err.Error()}
	if bad := (*jsonobject.Error)(nil); errors.As(err, &bad) {
		r.Reason = bad.Err.Error()
		r.Place.Line += bad.Line - 1
		if bad.Line == 1 {
			r.Place.Column += bad.Column - 1
		} else {
			r.Place.Column = bad.Column
		}
	}
	if errors.Is(err, jsonobject.ErrDuplicate) {
		r.Reason = "a member stands twice in one object" // its name may be anything, a key too
	}
	return r, false
}
