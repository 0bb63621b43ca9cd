package envoy

import (
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// A CheckRequest on the wire is read in one walk, without memory of its own.
// What the walk takes is exact: where proto.Unmarshal merges or lets the last
// of several win (a message twice, a map's key twice, two kinds of a value),
// the walk calls the request malformed, and a malformed request is refused. No
// writer that we know of sends such a thing. Everything that is not taken is
// still checked as proto.Unmarshal checks it, except that messages may be
// nested maxNesting deep only. A google.protobuf.Any's bytes are not looked
// into; neither does proto.Unmarshal.

// maxNesting of messages in a CheckRequest, a map's entry being one.
// proto.Unmarshal takes 10,000.
const maxNesting = 100

// What is wrong with a request that is malformed.
const (
	malformed    = "the CheckRequest is malformed: "
	wireBroken   = malformed + "a broken field"
	wireUTF8     = malformed + "a string that is not UTF-8"
	wireNesting  = malformed + "messages nested too deep"
	wireRepeated = malformed + "a field twice that may be there once"
	wireKey      = malformed + "a map that holds a key twice"
	wireKinds    = malformed + "a value of two kinds"
)

// wireReader reads the fields of one message, in order.
type wireReader struct {
	message *message
	rest    []byte
	depth   int    // how many messages this one is in, and itself
	problem string // what is malformed; "" for nothing so far
	seen    uint32 // numbers that once has seen

	number protowire.Number
	form   form
	within *message // of a formMessage
	bytes  []byte   // what the field holds, of those that hold bytes
}

// next goes on to the next field that the message knows. It is false at the end
// and at the first thing that is malformed. Messages and packed numbers have not
// been checked within: they are taken, or given to check.
func (r *wireReader) next() bool {
	for len(r.rest) > 0 && r.problem == "" {
		number, t, value, n := consumeField(r.rest)
		if n < 0 {
			return r.fail(wireBroken)
		}
		r.rest = r.rest[n:]
		if int(number) >= len(r.message.fields) {
			continue
		}
		f := &r.message.fields[number]
		form := f.forms[t]
		switch form {
		case formUnknown:
			continue
		case formText:
			if !utf8.Valid(value) {
				return r.fail(wireUTF8)
			}
		case formNumbers:
			if !numbers(f.scalar, value) {
				return r.fail(wireBroken)
			}
		}
		r.number, r.form, r.within, r.bytes = number, form, f.message, value
		return true
	}
	return false
}

func (r *wireReader) fail(problem string) bool {
	if r.problem == "" {
		r.problem = problem
	}
	return false
}

// once is false, and the message malformed, if the field was there before.
func (r *wireReader) once() bool {
	bit := uint32(1) << r.number
	if r.seen&bit != 0 {
		return r.fail(wireRepeated)
	}
	r.seen |= bit
	return true
}

// enter makes r, which is zero, a reader of the message that outer's field holds.
func (r *wireReader) enter(outer *wireReader) {
	r.message, r.rest, r.depth = outer.within, outer.bytes, outer.depth+1
	if r.depth > maxNesting {
		r.problem = wireNesting
	}
}

// leave takes over what was found malformed within.
func (r *wireReader) leave(inner *wireReader) {
	if inner.problem != "" {
		r.fail(inner.problem)
	}
}

// check goes through a field that is not taken.
func (r *wireReader) check() {
	if r.form != formMessage {
		return
	}
	var inner wireReader
	inner.enter(r)
	for inner.next() {
		inner.check()
	}
	r.leave(&inner)
}

// numbers tells whether b is a row of numbers of one wire type.
func numbers(t protowire.Type, b []byte) bool {
	for len(b) > 0 {
		n := protowire.ConsumeFieldValue(1, t, b)
		if n < 0 {
			return false
		}
		b = b[n:]
	}
	return true
}

// consumeField returns the field that b begins with, its value if that is bytes,
// and the length of it all, which is negative if it is broken. It has a short
// way for bytes whose tag and length take a byte each, as do nearly all in a
// CheckRequest.
func consumeField(b []byte) (protowire.Number, protowire.Type, []byte, int) {
	if len(b) >= 2 && b[0]&0x87 == byte(protowire.BytesType) && b[0] >= 1<<3 && b[1] < 0x80 {
		if n := 2 + int(b[1]); n <= len(b) {
			return protowire.Number(b[0] >> 3), protowire.BytesType, b[2:n], n
		}
	}
	return consumeAnyField(b)
}

func consumeAnyField(b []byte) (protowire.Number, protowire.Type, []byte, int) {
	number, t, n := protowire.ConsumeTag(b)
	if n < 0 || number > protowire.MaxValidNumber {
		return 0, 0, nil, -1
	}
	var value []byte
	var m int
	if t == protowire.BytesType {
		value, m = protowire.ConsumeBytes(b[n:])
	} else {
		m = protowire.ConsumeFieldValue(number, t, b[n:])
	}
	if m < 0 {
		return 0, 0, nil, -1
	}
	return number, t, value, n + m
}
