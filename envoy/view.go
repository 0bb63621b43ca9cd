package envoy

import (
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Numbers of the fields that are taken.
const (
	requestAttributes = 1 // CheckRequest

	attributesRequest       = 4 // AttributeContext
	attributesExtensions    = 10
	attributesRouteMetadata = 13

	requestHTTP = 2 // AttributeContext.Request

	httpRequestHeaders   = 3 // AttributeContext.HttpRequest
	httpRequestPath      = 4
	httpRequestHeaderMap = 13

	headerMapHeaders = 1 // HeaderMap

	headerKey   = 1 // HeaderValue
	headerValue = 2
	headerRaw   = 3

	entryKey   = 1 // any map's entry
	entryValue = 2

	metadataFilter = 1 // Metadata

	structFields = 1 // Struct

	valueString    = 3 // Value
	valueListValue = 6

	listValues = 1 // ListValue
)

// view fills attributes from a CheckRequest on the wire. Their strings are views
// of its bytes.
type view struct {
	*attributes
	header    string // the key header
	namespace bool   // keygate's has been seen
}

// readWire fills a from the bytes of a CheckRequest and returns what is
// malformed, or "". The strings in a share the memory of b.
func (a *attributes) readWire(b []byte, request *message, header string) (problem string) {
	v := view{attributes: a, header: header}
	r := wireReader{message: request, rest: b, depth: 1}
	for r.next() {
		if r.number == requestAttributes && r.once() {
			v.context(&r)
		} else {
			r.check()
		}
	}
	return r.problem
}

// context and the other readers are given the field that holds their message.
func (v *view) context(outer *wireReader) {
	var r wireReader
	r.enter(outer)
	for r.next() {
		switch r.number {
		case attributesRequest:
			if r.once() {
				v.request(&r)
			}
		case attributesExtensions:
			v.extension(&r)
		case attributesRouteMetadata:
			if r.once() {
				v.metadata(&r)
			}
		default:
			r.check()
		}
	}
	outer.leave(&r)
}

func (v *view) request(outer *wireReader) {
	var r wireReader
	r.enter(outer)
	for r.next() {
		if r.number == requestHTTP && r.once() {
			v.http(&r)
		} else {
			r.check()
		}
	}
	outer.leave(&r)
}

func (v *view) http(outer *wireReader) {
	var r wireReader
	r.enter(outer)
	for r.next() {
		switch r.number {
		case httpRequestHeaders:
			key, value, ok := shortPair(r.bytes, entryValue)
			if !ok || !utf8.Valid(value) {
				e := readEntry(&r)
				key, value = e.key, e.value
			}
			if strings.EqualFold(text(key), v.header) {
				// A key of the map twice is two values, and so refused.
				v.addKey(text(value), "")
			}
		case httpRequestPath:
			if r.once() {
				v.path = text(r.bytes)
			}
		case httpRequestHeaderMap:
			if r.once() {
				v.headerMap(&r)
			}
		default:
			r.check()
		}
	}
	outer.leave(&r)
}

func (v *view) headerMap(outer *wireReader) {
	var r wireReader
	r.enter(outer)
	for r.next() {
		if r.number == headerMapHeaders {
			v.headerValue(&r)
		} else {
			r.check()
		}
	}
	outer.leave(&r)
}

func (v *view) headerValue(outer *wireReader) {
	if key, raw, ok := shortPair(outer.bytes, headerRaw); ok {
		if strings.EqualFold(text(key), v.header) {
			v.addKey("", text(raw))
		}
		return
	}
	var key, value, raw []byte
	var r wireReader
	r.enter(outer)
	for r.next() {
		r.once()
		switch r.number {
		case headerKey:
			key = r.bytes
		case headerValue:
			value = r.bytes
		case headerRaw:
			raw = r.bytes
		}
	}
	outer.leave(&r)
	if strings.EqualFold(text(key), v.header) {
		v.addKey(text(value), text(raw))
	}
}

// shortPair reads a message in the one form in which Envoy writes nearly all
// headers, in either of their fields: a key, which is a string, and then the bytes
// of another field, each of less than 128 bytes. It is false for any other and
// for what is malformed, which is read in full then. A check has dozens of
// headers, and this is half of what they cost.
func shortPair(b []byte, number protowire.Number) (key, value []byte, ok bool) {
	const keyTag = headerKey<<3 | byte(protowire.BytesType) // entryKey is the same
	if len(b) < 2 || b[0] != keyTag || b[1] >= 0x80 {
		return nil, nil, false
	}
	n := 2 + int(b[1])
	if len(b) < n+2 || b[n] != byte(number)<<3|byte(protowire.BytesType) || b[n+1] >= 0x80 || len(b) != n+2+int(b[n+1]) {
		return nil, nil, false
	}
	key, value = b[2:n], b[n+2:]
	return key, value, utf8.Valid(key)
}

func (v *view) extension(outer *wireReader) {
	e := readEntry(outer)
	var into *value
	switch string(e.key) {
	case extensionProduct:
		into = &v.extensionProduct
	case extensionOrg:
		into = &v.extensionOrganization
	default:
		return
	}
	if into.kind != valueAbsent {
		outer.fail(wireKey)
	}
	*into = value{valueText, text(e.value)}
}

func (v *view) metadata(outer *wireReader) {
	var r wireReader
	r.enter(outer)
	for r.next() {
		if r.number != metadataFilter {
			r.check()
			continue
		}
		e := readEntry(&r)
		entry := e.of(&r)
		if string(e.key) != metadataNamespace {
			entry.check()
			r.leave(&entry)
			continue
		}
		if v.namespace {
			r.fail(wireKey)
		}
		v.namespace = true
		v.fields(&entry)
		r.leave(&entry)
	}
	outer.leave(&r)
}

// fields reads keygate's namespace.
func (v *view) fields(outer *wireReader) {
	var r wireReader
	r.enter(outer)
	for r.next() {
		if r.number != structFields {
			r.check()
			continue
		}
		e := readEntry(&r)
		entry := e.of(&r)
		switch string(e.key) {
		case metadataProduct:
			if v.product.kind != valueAbsent {
				r.fail(wireKey)
			}
			v.product = v.readValue(&entry, true)
		case metadataOrganization:
			if v.organization.kind != valueAbsent {
				r.fail(wireKey)
			}
			v.organization = v.readValue(&entry, false)
		default:
			entry.check()
		}
		r.leave(&entry)
	}
	outer.leave(&r)
}

// readValue reads a Value; items of a list are added to attributes.list if asked.
func (v *view) readValue(outer *wireReader, items bool) value {
	found := value{kind: valueOther}
	kinds := 0
	var r wireReader
	r.enter(outer)
	for r.next() {
		if kinds++; kinds > 1 {
			r.fail(wireKinds)
			break
		}
		switch r.number {
		case valueString:
			found = value{valueText, text(r.bytes)}
		case valueListValue:
			found.kind = valueList
			if items {
				v.items(&r)
				continue
			}
		}
		r.check()
	}
	outer.leave(&r)
	return found
}

func (v *view) items(outer *wireReader) {
	var r wireReader
	r.enter(outer)
	for r.next() {
		if r.number == listValues {
			v.addItem(v.readValue(&r, false))
		} else {
			r.check()
		}
	}
	outer.leave(&r)
}

// entry is what an entry of a map holds.
type entry struct {
	key, value []byte
	within     *message // of a value that is a message
	depth      int
}

// readEntry reads a map's entry. A value that is a message has not been checked.
func readEntry(outer *wireReader) entry {
	var r wireReader
	r.enter(outer)
	e := entry{depth: r.depth}
	e.within = r.message.fields[entryValue].message
	for r.next() {
		r.once()
		switch r.number {
		case entryKey:
			e.key = r.bytes
		case entryValue:
			e.value = r.bytes
		}
	}
	outer.leave(&r)
	return e
}

// of returns a reader that stands at the entry's value, which is a message; that
// of an entry without a value is an empty one.
func (e *entry) of(outer *wireReader) wireReader {
	return wireReader{depth: e.depth, number: protowire.Number(entryValue), form: formMessage, within: e.within, bytes: e.value, problem: outer.problem}
}
