package envoy

import (
	"bytes"
	"encoding/hex"
	"sync"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"keygate/authz"
)

// encoded are the parts of responses that are the same every time, as bytes:
// those of the same messages that answers shares between responses.
type encoded struct {
	denials [authz.NumReasons][]byte // without metadata
	ok      []byte                   // the status of an allow
	remove  []byte                   // what every allow removes, inside OkHttpResponse
	// internal is the whole answer to a check that failed here.
	internal *reply
}

// Numbers of the fields that are written.
const (
	responseOK       = 3 // CheckResponse
	responseMetadata = 4

	okHeaders = 2 // OkHttpResponse
	okRemove  = 5

	optionHeader = 1 // HeaderValueOption
	optionAction = 3
)

// newEncoded encodes what a has. It panics if that could not be sent, which
// only a name that is not ASCII could bring about.
func newEncoded(a *answers) encoded {
	e := encoded{
		ok:     mustMarshal(&authv3.CheckResponse{Status: a.ok}),
		remove: mustMarshal(&authv3.OkHttpResponse{HeadersToRemove: a.remove, QueryParametersToRemove: a.query}),
	}
	for r := range authz.NumReasons {
		constant := a.denials[r]
		e.denials[r] = mustMarshal(&authv3.CheckResponse{Status: constant.status, HttpResponse: constant.response})
	}
	internal := mustMarshal(a.deny(authz.Decision{Reason: authz.Internal}))
	e.internal = &reply{out: mem.BufferSlice{mem.SliceBuffer(internal)}}
	return e
}

func mustMarshal(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

// minReply is the capacity that a reply begins with. grpc-go gives no buffer
// back whose capacity is 1 KiB or less; maxReply is what is worth keeping.
const (
	minReply = 4 << 10
	maxReply = 64 << 10
)

// reply is an answer in bytes. It goes back to its pool when grpc-go lets go of
// the bytes, so nothing may look at it after it was handed over.
type reply struct {
	pool  *sync.Pool
	data  []byte
	keyID [2 * len(authz.KeyID{})]byte // text
	one   [1]mem.Buffer
	out   mem.BufferSlice // what is sent
}

// reply returns an empty one.
func (s *Service) reply() *reply {
	r, ok := s.replies.Get().(*reply)
	if !ok {
		r = &reply{pool: &s.replies, data: make([]byte, 0, minReply)}
	}
	r.data = r.data[:0]
	return r
}

// seal makes what is sent of what has been written.
func (r *reply) seal() {
	r.one[0] = mem.NewBuffer(&r.data, r)
	r.out = r.one[:]
}

// Get implements mem.BufferPool; nobody asks one reply for another's memory.
func (*reply) Get(n int) *[]byte { return new(make([]byte, n)) }

// Put implements mem.BufferPool: the last reference to the bytes has gone.
func (r *reply) Put(*[]byte) {
	r.out, r.one[0] = nil, nil
	if cap(r.data) <= maxReply {
		r.pool.Put(r)
	}
}

// encode is respond in bytes: the one way from a decision to what is sent. A d
// that has no allow and no refusal becomes an internal error.
func (a *answers) encode(r *reply, d *authz.Decision) {
	id := ""
	if d.KeyID != (authz.KeyID{}) {
		hex.Encode(r.keyID[:], d.KeyID[:])
		id = text(r.keyID[:])
	}
	if d.Allowed() && identified(*d) {
		r.data = append(r.data, a.encoded.ok...)
		r.data = a.appendOK(r.data, d, id)
		r.data = appendMetadata(r.data, d, id)
		return
	}
	if d.Reason >= authz.NumReasons || d.Reason == authz.Allowed {
		d.Reason = authz.Internal
	}
	r.data = append(r.data, a.encoded.denials[d.Reason]...)
	r.data = appendMetadata(r.data, d, id)
}

// clear tells whether r says yes to a decision that does, and no to any other.
// Envoy goes by the status alone, which comes first.
func (a *answers) clear(r *reply, d *authz.Decision) bool {
	if d.Allowed() && identified(*d) {
		return len(r.data) > len(a.encoded.ok) && bytes.HasPrefix(r.data, a.encoded.ok)
	}
	return d.Reason < authz.NumReasons && d.Reason != authz.Allowed && bytes.HasPrefix(r.data, a.encoded.denials[d.Reason])
}

// appendOK appends the OkHttpResponse. Values cost memory only where there is
// something to escape.
func (a *answers) appendOK(b []byte, d *authz.Decision, id string) []byte {
	var values [len(identityHeaders)]string
	size := len(a.encoded.remove)
	for i, h := range identityHeaders {
		values[i] = headerSafe(h.part.of(d, id))
		if values[i] == "" {
			size += sizeString(okRemove, h.name)
			continue
		}
		size += protowire.SizeTag(okHeaders) + protowire.SizeBytes(sizeOption(h.name, values[i]))
	}
	b = appendLength(b, responseOK, size)
	for i, h := range identityHeaders {
		value := values[i]
		if value == "" {
			continue // removed below
		}
		b = appendLength(b, okHeaders, sizeOption(h.name, value))
		b = appendLength(b, optionHeader, sizeString(headerKey, h.name)+sizeString(headerValue, value))
		b = appendString(b, headerKey, h.name)
		b = appendString(b, headerValue, value)
		b = protowire.AppendTag(b, optionAction, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(overwrite))
	}
	b = append(b, a.encoded.remove...)
	for i, h := range identityHeaders {
		if values[i] == "" {
			b = appendString(b, okRemove, h.name)
		}
	}
	return b
}

// sizeOption is the length of a HeaderValueOption.
func sizeOption(name, value string) int {
	return protowire.SizeTag(optionHeader) + protowire.SizeBytes(sizeString(headerKey, name)+sizeString(headerValue, value)) +
		protowire.SizeTag(optionAction) + protowire.SizeVarint(uint64(overwrite))
}

// appendMetadata appends the Struct of metadataFields.
func appendMetadata(b []byte, d *authz.Decision, id string) []byte {
	var values [len(metadataFields)]string
	size := 0
	for i, f := range metadataFields {
		if values[i] = sendable(f.part.of(d, id)); values[i] != "" {
			size += protowire.SizeTag(structFields) + protowire.SizeBytes(sizeField(f.name, values[i]))
		}
	}
	b = appendLength(b, responseMetadata, size)
	for i, f := range metadataFields {
		value := values[i]
		if value == "" {
			continue
		}
		b = appendLength(b, structFields, sizeField(f.name, value))
		b = appendString(b, entryKey, f.name)
		b = appendLength(b, entryValue, sizeString(valueString, value))
		b = appendString(b, valueString, value)
	}
	return b
}

// sizeField is the length of an entry of Struct.fields.
func sizeField(name, value string) int {
	return sizeString(entryKey, name) + protowire.SizeTag(entryValue) + protowire.SizeBytes(sizeString(valueString, value))
}

func sizeString(number protowire.Number, s string) int {
	return protowire.SizeTag(number) + protowire.SizeBytes(len(s))
}

func appendString(b []byte, number protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), s)
}

func appendLength(b []byte, number protowire.Number, n int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.BytesType), uint64(n))
}
