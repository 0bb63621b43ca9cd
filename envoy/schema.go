package envoy

import (
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// schema is what a CheckRequest may hold, and all that is below it, in the form
// that walks over the wire go by. It is made of the same descriptors that the
// generated code is made of, and immutable.
type schema struct {
	request *message
}

// message is a type of message. A map's entry is one too.
type message struct {
	fields []field // by number
}

// field is how a field's value is checked.
type field struct {
	forms   [8]form        // by the wire type that the value comes in
	message *message       // of a formMessage
	scalar  protowire.Type // of what a formNumbers holds
}

// form of a value on the wire. A value in a form that the field does not know is
// unknown, as its number would be.
type form uint8

const (
	formUnknown form = iota
	formNumber
	formBytes
	formText // UTF-8
	formMessage
	formNumbers // many in one piece
)

func newSchema() *schema {
	known := map[protoreflect.FullName]*message{}
	return &schema{request: newMessage((*authv3.CheckRequest)(nil).ProtoReflect().Descriptor(), known)}
}

// newMessage also makes what is below; known ends recursion, of which
// google.protobuf.Value is one.
func newMessage(d protoreflect.MessageDescriptor, known map[protoreflect.FullName]*message) *message {
	if m, ok := known[d.FullName()]; ok {
		return m
	}
	m := &message{}
	known[d.FullName()] = m
	fields := d.Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		for len(m.fields) <= int(fd.Number()) {
			m.fields = append(m.fields, field{})
		}
		m.fields[fd.Number()] = newField(fd, known)
	}
	return m
}

func newField(fd protoreflect.FieldDescriptor, known map[protoreflect.FullName]*message) (f field) {
	switch fd.Kind() {
	case protoreflect.StringKind:
		f.forms[protowire.BytesType] = formText
		return f
	case protoreflect.BytesKind:
		f.forms[protowire.BytesType] = formBytes
		return f
	case protoreflect.MessageKind:
		f.forms[protowire.BytesType] = formMessage
		f.message = newMessage(fd.Message(), known)
		return f
	case protoreflect.GroupKind: // proto3 has none
		return f
	case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind:
		f.scalar = protowire.Fixed32Type
	case protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
		f.scalar = protowire.Fixed64Type
	default:
		f.scalar = protowire.VarintType
	}
	f.forms[f.scalar] = formNumber
	if fd.IsList() {
		f.forms[protowire.BytesType] = formNumbers
	}
	return f
}
