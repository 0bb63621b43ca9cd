// Package jsonobject reads JSON objects strictly and writes them back whole:
// the order of members and the members nobody knows survive a rewrite.
package jsonobject

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// MaxDepth of nesting that Parse accepts. Apigee's records nest three deep.
const MaxDepth = 32

// Object is a JSON object: its members in their order, names distinct.
type Object []Member

// Member of an Object. Value is valid JSON.
type Member struct {
	Name  string
	Value json.RawMessage
}

// Parse reads one JSON object and nothing after it. It refuses what
// encoding/json would let pass in silence: a name that stands twice in any
// object, invalid UTF-8, nesting deeper than MaxDepth, trailing data. The error
// is an [Error], except of an empty input. The result does not share
// memory with data.
func Parse(data []byte) (Object, error) {
	if o, ok := plain(data); ok {
		return o, nil
	}
	return parse(data)
}

// parse is Parse for any data.
func parse(data []byte) (Object, error) {
	if err := Check(data); err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil {
		return nil, err
	} else if t != json.Delim('{') {
		return nil, fmt.Errorf("1:1: want a JSON object")
	}
	o := Object{}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil, err
		}
		m := Member{Name: name.(string)}
		if err := dec.Decode(&m.Value); err != nil {
			return nil, err
		}
		o = append(o, m)
	}
	return o, nil
}

// Check tells whether data is exactly one JSON value of any kind that Parse
// would accept inside an object.
func Check(data []byte) error {
	if !utf8.Valid(data) {
		n := 0
		for n < len(data) {
			r, size := utf8.DecodeRune(data[n:])
			if r == utf8.RuneError && size == 1 {
				break
			}
			n += size
		}
		return at(data, int64(n), errors.New("invalid UTF-8"))
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return errors.New("empty, want JSON")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if err := checkValue(dec, 0); err != nil {
		// A decoder of tokens knows only about where a syntax error is; Unmarshal
		// knows exactly.
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) && errors.As(json.Unmarshal(data, new(json.RawMessage)), &syntax) {
			return at(data, syntax.Offset-1, err)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return at(data, int64(len(data)), errors.New("the JSON ends too early"))
		}
		return at(data, dec.InputOffset(), err)
	}
	end := dec.InputOffset()
	if rest := bytes.TrimLeft(data[end:], " \t\r\n"); len(rest) > 0 {
		return at(data, int64(len(data)-len(rest)), errors.New("data after the JSON value"))
	}
	return nil
}

func checkValue(dec *json.Decoder, depth int) error {
	t, err := dec.Token()
	if err != nil {
		return err
	}
	d, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	if depth == MaxDepth {
		return fmt.Errorf("nested deeper than %d", MaxDepth)
	}
	seen := map[string]bool{}
	for dec.More() {
		if d == '{' {
			t, err := dec.Token()
			if err != nil {
				return err
			}
			name := t.(string)
			if seen[name] {
				return fmt.Errorf("%q %w", name, ErrDuplicate)
			}
			seen[name] = true
		}
		if err := checkValue(dec, depth+1); err != nil {
			return err
		}
	}
	_, err = dec.Token()
	return err
}

// Error is what is wrong with JSON, and where.
type Error struct {
	Line, Column int // from 1; the column in bytes
	Err          error
}

// Error begins with the place, "2:14: ".
func (e *Error) Error() string { return fmt.Sprintf("%d:%d: %v", e.Line, e.Column, e.Err) }

// Unwrap returns what is wrong, without the place.
func (e *Error) Unwrap() error { return e.Err }

// ErrDuplicate is wrapped by the Error of a name that stands twice in one
// object.
var ErrDuplicate = errors.New("stands twice in one object")

// at gives err its place, that of an offset in data.
func at(data []byte, offset int64, err error) error {
	offset = max(0, min(offset, int64(len(data))))
	before := data[:offset]
	return &Error{bytes.Count(before, []byte("\n")) + 1, int(offset) - bytes.LastIndexByte(before, '\n'), err}
}

// Get returns the value of a member, by its exact name.
func (o Object) Get(name string) (json.RawMessage, bool) {
	for _, m := range o {
		if m.Name == name {
			return m.Value, true
		}
	}
	return nil, false
}

// With returns a copy in which name has value: at its place if it has one,
// else at the end. It panics if value has no JSON form.
func (o Object) With(name string, value any) Object {
	raw, err := json.Marshal(value)
	if err != nil {
		panic(fmt.Sprintf("jsonobject: %q: %v", name, err))
	}
	c := append(Object(nil), o...)
	for i := range c {
		if c[i].Name == name {
			c[i].Value = raw
			return c
		}
	}
	return append(c, Member{name, raw})
}

// Without returns a copy that lacks the named members.
func (o Object) Without(names ...string) Object {
	c := Object{}
next:
	for _, m := range o {
		for _, n := range names {
			if m.Name == n {
				continue next
			}
		}
		c = append(c, m)
	}
	return c
}

// MarshalJSON writes the members in their order.
func (o Object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		name, err := json.Marshal(m.Name)
		if err != nil {
			return nil, err
		}
		b.Write(name)
		b.WriteByte(':')
		if err := json.Compact(&b, m.Value); err != nil {
			return nil, fmt.Errorf("%q: %w", m.Name, err)
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// UnmarshalJSON reads an object as Parse does.
func (o *Object) UnmarshalJSON(data []byte) error {
	p, err := Parse(data)
	if err == nil {
		*o = p
	}
	return err
}
