package apigee

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"keygate/catalog"
	"keygate/jsonobject"
)

// MaxRecord is the size of one app's JSON, in bytes, beyond which it is not
// read. What etcd can store is smaller.
const MaxRecord = 16 << 20

// window is a view of the input that moves forward. What lies between its mark
// and its position is kept, so that a record can be taken whole, or read again
// from its second line after it turned out to be broken.
type window struct {
	r    io.Reader
	name string
	buf  []byte
	pos  int // of the next byte
	line int // of pos, from 1
	col  int // of pos, from 1
	err  error

	mark              int // start of the record, -1 for none
	markLine, markCol int
	stack             []byte // reused by skipValue

	nextPage bool // skipValue has gone past a nextPageToken that is not empty
}

func (w *window) place() catalog.Place {
	return catalog.Place{Name: w.name, Line: w.line, Column: w.col}
}

func (w *window) markPlace() catalog.Place {
	return catalog.Place{Name: w.name, Line: w.markLine, Column: w.markCol}
}

func (w *window) setMark()   { w.mark, w.markLine, w.markCol = w.pos, w.line, w.col }
func (w *window) clearMark() { w.mark = -1 }

// rewind goes back to the mark and forgets it.
func (w *window) rewind() {
	w.pos, w.line, w.col = w.mark, w.markLine, w.markCol
	w.clearMark()
}

// peek returns the next byte; false at the end of the input, or when it cannot
// be read (err then is not io.EOF).
func (w *window) peek() (byte, bool) {
	if w.pos == len(w.buf) && !w.fill() {
		return 0, false
	}
	return w.buf[w.pos], true
}

// advance goes past the byte that peek returned.
func (w *window) advance() {
	if w.buf[w.pos] == '\n' {
		w.line, w.col = w.line+1, 1
	} else {
		w.col++
	}
	w.pos++
}

func (w *window) fill() bool {
	if w.err != nil {
		return false
	}
	keep := w.pos
	if w.mark >= 0 {
		keep = w.mark
	}
	if len(w.buf) == cap(w.buf) {
		// Mostly kept: grow, so that a long record is not moved again and again.
		size := max(cap(w.buf), 64<<10)
		if len(w.buf)-keep > size/2 {
			size *= 2
		}
		w.buf = append(make([]byte, 0, size), w.buf[keep:]...)
		w.pos -= keep
		if w.mark >= 0 {
			w.mark = 0
		}
	}
	for range 100 {
		n, err := w.r.Read(w.buf[len(w.buf):cap(w.buf)])
		w.buf, w.err = w.buf[:len(w.buf)+n], err
		if n > 0 {
			return true
		}
		if err != nil {
			return false
		}
	}
	w.err = io.ErrNoProgress
	return false
}

func (w *window) skipSpace() {
	for {
		c, ok := w.peek()
		if !ok || c != ' ' && c != '\t' && c != '\r' && c != '\n' {
			return
		}
		w.advance()
	}
}

// nextLine goes to the next line that begins with a brace, from a later line
// than the present one. Within a record that is laid out over several lines no
// line does, so one broken record leads to one refusal. It tells how many lines
// with anything on them it went past, the present one not counted.
func (w *window) nextLine() (passed int) {
	first, blank := w.line, true
	for {
		c, ok := w.peek()
		if !ok {
			return passed
		}
		if w.col == 1 && w.line > first {
			if c == '{' {
				return passed
			}
			blank = true
		}
		if blank && w.line > first && c != ' ' && c != '\t' && c != '\r' && c != '\n' {
			passed++
			blank = false
		}
		w.advance()
	}
}

// What a value may go on with.
type expect uint8

const (
	wantValue expect = iota
	wantValueOrEnd
	wantName
	wantNameOrEnd
	wantColon
	wantCommaOrEnd
)

var expectWords = [...]string{
	wantValue: "a value", wantValueOrEnd: "a value or ']'", wantName: "a member name in quotes",
	wantNameOrEnd: "a member name in quotes or '}'", wantColon: "':'", wantCommaOrEnd: "',' or the closing bracket",
}

// skipValue goes past the rest of one value: open are its brackets already
// passed, want is what comes next. It looks at the structure only: enough to
// find the end, and to see early that there will be none. The rest is for
// jsonobject.Check.
//
// top: if the value is an object with a member that lists records (see lists),
// it stops behind the list's bracket and returns the member's name. That is the
// answer of a list call, and the records are in there. It notes a nextPageToken
// of the object.
func (w *window) skipValue(want expect, open []byte, top bool) (list string, err error) {
	stack := append(w.stack[:0], open...)
	defer func() { w.stack = stack[:0] }()
	var name []byte // of the member just read, at depth 1
	for {
		w.skipSpace()
		if w.mark >= 0 && w.pos-w.mark > MaxRecord {
			return "", fmt.Errorf("the record is longer than %d MiB", MaxRecord>>20)
		}
		c, ok := w.peek()
		if !ok {
			return "", errors.New("the JSON ends too early")
		}
		value := want == wantValue || want == wantValueOrEnd
		switch {
		case c == '"' && (value || want == wantName || want == wantNameOrEnd):
			text, err := w.skipString(top && len(stack) == 1)
			if err != nil {
				return "", err
			}
			if want = wantCommaOrEnd; !value {
				want, name = wantColon, text
			} else if string(name) == `"`+memberNextPage+`"` && len(text) > len(`""`) && len(stack) == 1 {
				w.nextPage = true
			}
		case value && (c == '{' || c == '['):
			if c == '[' && top && len(stack) == 1 && w.listsRecords(name) {
				w.advance()
				return string(name[1 : len(name)-1]), nil
			}
			if len(stack) == jsonobject.MaxDepth {
				return "", fmt.Errorf("nested deeper than %d", jsonobject.MaxDepth)
			}
			w.advance()
			stack = append(stack, c)
			if want = wantNameOrEnd; c == '[' {
				want = wantValueOrEnd
			}
			continue
		case value && scalar(c):
			for c, ok := w.peek(); ok && scalar(c); c, ok = w.peek() {
				w.advance()
			}
			want = wantCommaOrEnd
		case want == wantColon && c == ':':
			w.advance()
			want = wantValue
			continue
		case want == wantCommaOrEnd && c == ',':
			w.advance()
			if want = wantName; stack[len(stack)-1] == '[' {
				want = wantValue
			}
			continue
		case (c == '}' && (want == wantCommaOrEnd || want == wantNameOrEnd) && stack[len(stack)-1] == '{') ||
			(c == ']' && (want == wantCommaOrEnd || want == wantValueOrEnd) && stack[len(stack)-1] == '['):
			w.advance()
			stack = stack[:len(stack)-1]
			want = wantCommaOrEnd
		default:
			return "", fmt.Errorf("want %s here", expectWords[want])
		}
		if len(stack) == 0 {
			return "", nil
		}
	}
}

// memberNextPage of an answer to a list call says that there are more pages.
const memberNextPage = "nextPageToken"

// listsRecords tells whether the list at which the window stands, the value of
// a member whose quoted name this is, has records for its elements. Two names
// have another meaning in a record: the apps of a developer are names, the
// apiProducts of an app names or references.
func (w *window) listsRecords(quoted []byte) bool {
	name := string(quoted)
	switch {
	case len(name) < 2 || lists[name[1:len(name)-1]] == kindNone:
		return false
	case name != `"`+memberApps+`"` && name != `"`+catalog.MemberProducts+`"`:
		return true
	}
	off := 0 // from pos, which may move in its buffer
	next := func() byte {
		for off++; w.pos+off >= len(w.buf); {
			if !w.fill() {
				return 0
			}
		}
		return w.buf[w.pos+off]
	}
	skip := func() (c byte) {
		for c = next(); c == ' ' || c == '\t' || c == '\r' || c == '\n'; c = next() {
		}
		return c
	}
	if skip() != '{' || skip() != '"' {
		return false
	}
	var member []byte
	for c := next(); c != '"' && len(member) <= len(catalog.MemberProduct); c = next() {
		member = append(member, c)
	}
	return string(member) != catalog.MemberProduct && string(member) != catalog.MemberStatus
}

// scalar tells whether c can stand in a number, true, false or null.
func scalar(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '+' || c == '-' || c == '.'
}

// skipString goes past a string. If keep, it returns the string with its
// quotes, unless it is too long to be interesting.
func (w *window) skipString(keep bool) (text []byte, err error) {
	for quotes, escaped := 0, false; quotes < 2; {
		c, ok := w.peek()
		switch {
		case !ok:
			return nil, errors.New("the JSON ends too early")
		case c < ' ':
			return nil, errors.New("a string is not closed on its line")
		case w.mark >= 0 && w.pos-w.mark > MaxRecord:
			return nil, fmt.Errorf("the record is longer than %d MiB", MaxRecord>>20)
		case escaped:
			escaped = false
		case c == '\\':
			escaped = true
		case c == '"':
			quotes++
		}
		if keep && len(text) < 16 {
			text = append(text, c)
		}
		w.advance()
	}
	return text, nil
}

// later returns the place of an offset in data, which begins at start.
func later(start catalog.Place, data []byte, offset int) catalog.Place {
	before := data[:offset]
	if n := bytes.Count(before, []byte("\n")); n > 0 {
		start.Line += n
		start.Column = offset - bytes.LastIndexByte(before, '\n')
	} else {
		start.Column += offset
	}
	return start
}
