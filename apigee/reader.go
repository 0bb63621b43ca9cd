package apigee

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"keygate/catalog"
	"keygate/jsonobject"
)

// ReaderConfig of a Reader.
type ReaderConfig struct {
	// Name of the input, for places.
	Name string
	// AllowWeakKeys takes consumer keys under catalog.MinKeyLength too.
	AllowWeakKeys bool
	// Pages are told of the answers to list calls; nil for nobody.
	Pages *Pages
}

// Reader reads developers, developer apps and API products from an input: the
// answer to a call that gets one of them, several such answers one after another
// or one a line, a list of them, the answer to a list call, as {"app":[…]},
// {"developer":[…]} or {"apiProduct":[…]}, or one document with several such
// lists. It holds one record at a time. It is not safe for concurrent use.
type Reader struct {
	w         window
	allowWeak bool
	pages     *Pages
	mode      mode
	anything  bool // was there a record, or a list
	first     bool // of a list: no element yet
	comma     bool // stands between two elements of a list

	// Of the object whose member the list is, in modeMember and modeTail.
	start   catalog.Place
	members []string // that were lists; the last is the present one
}

type mode uint8

const (
	modeTop    mode = iota
	modeList        // in a list
	modeMember      // in a list that is a member of an object
	modeTail        // behind that list, in its object
	modeDone
)

// Pages tells whether all pages of the answers to list calls were read, in
// several inputs together: of each kind of record one page must be the last. The
// zero Pages is ready to use. It is not safe for concurrent use.
type Pages struct {
	last [numKinds]bool
	open [numKinds]*catalog.Place // of a page that is not the last
}

func (p *Pages) note(k kind, at catalog.Place, more bool) {
	switch {
	case p == nil:
	case more:
		p.open[k] = &at
	default:
		p.last[k] = true
	}
}

// Missing tells which lists lack their last page.
func (p *Pages) Missing() (missing []catalog.Refusal) {
	for k, at := range p.open {
		if at != nil && !p.last[k] {
			missing = append(missing, catalog.Refusal{Place: *at, Reason: fmt.Sprintf(
				"the list of %s is not complete: this page has a %q, and no page without one was given; add the pages that follow it",
				kinds[k].plural, memberNextPage)})
		}
	}
	return missing
}

// NewReader returns a Reader over r.
func NewReader(cfg ReaderConfig, r io.Reader) *Reader {
	return &Reader{
		w:         window{r: r, name: cfg.Name, line: 1, col: 1, mark: -1},
		allowWeak: cfg.AllowWeakKeys,
		pages:     cfg.Pages,
	}
}

// Next returns the next record, or the refusal of one: a broken record refuses
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
			list, err := w.skipValue(wantCommaOrEnd, []byte("{"), true)
			if err == nil && slices.Contains(r.members, list) {
				err = fmt.Errorf("member %q stands twice", list)
			}
			switch {
			case err != nil:
				w.setMark()
				return r.broken(w.place(), err), true
			case list != "":
				r.members = append(r.members, list)
				r.enter(modeMember)
			default:
				for _, list := range r.members {
					r.pages.note(lists[list], r.start, w.nextPage)
				}
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
			if s, ok := r.record(); ok {
				return s, true
			}
		case c == ']' && (r.first || !r.comma):
			w.advance()
			if r.mode == modeMember {
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
			return r.element(), true
		}
	}
}

func (r *Reader) enter(m mode) {
	r.mode, r.first, r.comma, r.anything = m, true, false, true
}

// record reads the object at which the window stands, and is the first of its
// input or stands behind another. Not ok: it is the object of a list, which
// follows, or it says nothing.
func (r *Reader) record() (s catalog.Submission, ok bool) {
	w := &r.w
	w.setMark()
	w.nextPage = false
	start := w.place()
	r.anything = true
	list, err := w.skipValue(wantValue, nil, true)
	switch {
	case err != nil:
		return r.broken(w.place(), err), true
	case list != "":
		w.clearMark()
		r.start, r.members = start, append(r.members[:0], list)
		r.enter(modeMember)
		return s, false
	}
	s = r.decode(start, r.take(), kindNone)
	return s, s.App != nil || s.Developer != nil || s.Product != nil || len(s.Refused) > 0
}

// element reads the element of a list at which the window stands.
func (r *Reader) element() catalog.Submission {
	w := &r.w
	w.setMark()
	start := w.place()
	r.first, r.comma, r.anything = false, false, true
	if _, err := w.skipValue(wantValue, nil, false); err != nil {
		return r.broken(w.place(), err)
	}
	k := kindNone
	if r.mode == modeMember {
		k = lists[r.members[len(r.members)-1]]
	}
	return r.decode(start, r.take(), k)
}

// take returns what lies between the mark and the position.
func (r *Reader) take() []byte {
	w := &r.w
	data := bytes.Clone(w.buf[w.mark:w.pos])
	w.clearMark()
	return data
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

// decode reads one record, found whole, of a kind that is known or not. Of an
// object that is no element of a list, nothing may come out.
func (r *Reader) decode(start catalog.Place, data []byte, k kind) catalog.Submission {
	if data[0] != '{' {
		reason := "want a JSON object"
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
	if r.mode == modeTop && d.empty() {
		return s
	}
	if refusal := d.record(k, &s); refusal != nil {
		s.Refused = []catalog.Refusal{*refusal}
	}
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
