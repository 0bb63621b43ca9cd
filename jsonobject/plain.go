package jsonobject

import (
	"bytes"
	"strings"
)

// Limits of what plain reads.
const (
	plainDepth   = 8
	plainMembers = 64 // of one object: names are compared each with each
)

// plain reads what nearly every stored object is: strings of ASCII without an
// escape, no name twice, little nesting. It says only yes or no; whoever gets a
// no asks Parse for the object or for what is wrong with it. What it takes, Parse
// takes too, and with the same result.
func plain(data []byte) (Object, bool) {
	p := plainReader{text: string(data)}
	object := make(Object, 0, 16)
	values := bytes.Clone(data)
	p.blanks()
	ok := p.object(0, func(name string, from, to int) {
		object = append(object, Member{Name: name, Value: values[from:to:to]})
	})
	if p.blanks(); !ok || p.at != len(p.text) {
		return nil, false
	}
	return object, true
}

type plainReader struct {
	text string
	at   int
}

func (p *plainReader) blanks() {
	for p.at < len(p.text) && strings.IndexByte(" \t\r\n", p.text[p.at]) >= 0 {
		p.at++
	}
}

// take moves past b, if it is next.
func (p *plainReader) take(b byte) bool {
	if p.at < len(p.text) && p.text[p.at] == b {
		p.at++
		return true
	}
	return false
}

// object reads an object and tells each of its members, with where the value is.
func (p *plainReader) object(depth int, tell func(name string, from, to int)) bool {
	if depth == plainDepth || !p.take('{') {
		return false
	}
	if p.blanks(); p.take('}') {
		return true
	}
	var names [plainMembers]string
	for n := range names {
		from := p.at
		if !p.string() {
			return false
		}
		names[n] = p.text[from+1 : p.at-1]
		for _, other := range names[:n] {
			if other == names[n] {
				return false
			}
		}
		p.blanks()
		if !p.take(':') {
			return false
		}
		p.blanks()
		from = p.at
		if !p.value(depth + 1) {
			return false
		}
		if tell != nil {
			tell(names[n], from, p.at)
		}
		p.blanks()
		if p.take('}') {
			return true
		}
		if !p.take(',') {
			return false
		}
		p.blanks()
	}
	return false
}

func (p *plainReader) array(depth int) bool {
	if depth == plainDepth || !p.take('[') {
		return false
	}
	if p.blanks(); p.take(']') {
		return true
	}
	for {
		p.blanks()
		if !p.value(depth + 1) {
			return false
		}
		p.blanks()
		if p.take(']') {
			return true
		}
		if !p.take(',') {
			return false
		}
	}
}

func (p *plainReader) value(depth int) bool {
	if p.at == len(p.text) {
		return false
	}
	switch c := p.text[p.at]; {
	case c == '"':
		return p.string()
	case c == '{':
		return p.object(depth, nil)
	case c == '[':
		return p.array(depth)
	case c == '-' || c >= '0' && c <= '9':
		return p.number()
	}
	for _, word := range [...]string{"true", "false", "null"} {
		if strings.HasPrefix(p.text[p.at:], word) {
			p.at += len(word)
			return true
		}
	}
	return false
}

func (p *plainReader) string() bool {
	if !p.take('"') {
		return false
	}
	for ; p.at < len(p.text); p.at++ {
		switch c := p.text[p.at]; {
		case c == '"':
			p.at++
			return true
		case c < ' ' || c > '~' || c == '\\':
			return false
		}
	}
	return false
}

// number reads an integer. One with a fraction or an exponent is not plain: what
// follows it is then no comma and no end.
func (p *plainReader) number() bool {
	p.take('-')
	if p.take('0') {
		return true
	}
	from := p.at
	for p.at < len(p.text) && p.text[p.at] >= '0' && p.text[p.at] <= '9' {
		p.at++
	}
	return p.at > from
}
