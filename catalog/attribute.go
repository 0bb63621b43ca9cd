package catalog

import (
	"encoding/json"
	"fmt"

	"keygate/jsonobject"
)

// MemberAttributes of every noun. An attribute has the members MemberName and
// MemberValue.
const (
	MemberAttributes = "attributes"
	MemberValue      = "value"
)

// Bounds of the custom attributes of one noun: Apigee's.
const (
	MaxAttributes     = 18
	MaxAttributeName  = 1024 // bytes
	MaxAttributeValue = 2048 // bytes
)

// Attribute is a custom attribute: of a developer, an app, a credential or a
// product.
type Attribute struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Attributes returns the attributes among the members of a noun's JSON, in
// their order. What cannot be read as one is left out.
func Attributes(details jsonobject.Object) []Attribute {
	raw, ok := details.Get(MemberAttributes)
	if !ok {
		return nil
	}
	var elements []json.RawMessage
	if json.Unmarshal(raw, &elements) != nil {
		return nil
	}
	attributes := make([]Attribute, 0, len(elements))
	for _, e := range elements {
		var a Attribute
		if json.Unmarshal(e, &a) == nil && a.Name != "" {
			attributes = append(attributes, a)
		}
	}
	return attributes
}

// WithAttributes returns a copy of details with these attributes in place of
// those it has.
func WithAttributes(details jsonobject.Object, attributes []Attribute) jsonobject.Object {
	if attributes == nil {
		attributes = []Attribute{}
	}
	return details.With(MemberAttributes, attributes)
}

// CheckAttributes tells the first thing that is wrong with the attributes of a
// noun, as a [*FieldError] whose pointer begins at their list.
func CheckAttributes(attributes []Attribute) error {
	if len(attributes) > MaxAttributes {
		return &FieldError{Message: fmt.Sprintf("has %d attributes, want at most %d", len(attributes), MaxAttributes)}
	}
	seen := make(map[string]bool, len(attributes))
	for i, a := range attributes {
		at := fmt.Sprintf("/%d/", i)
		if err := CheckAttributeName(a.Name); err != nil {
			return &FieldError{at + MemberName, err.Error()}
		}
		if seen[a.Name] {
			return &FieldError{at + MemberName, "is the name of another attribute too, want each once"}
		}
		seen[a.Name] = true
		if err := CheckAttributeValue(a.Value); err != nil {
			return &FieldError{at + MemberValue, err.Error()}
		}
	}
	return nil
}

// CheckAttributeName tells whether s can be the name of an attribute.
func CheckAttributeName(s string) error {
	if s == "" {
		return fmt.Errorf("is empty, want 1 to %d bytes", MaxAttributeName)
	}
	return CheckText(s, MaxAttributeName)
}

// CheckAttributeValue tells whether s can be the value of an attribute. It may
// be empty and may have several lines.
func CheckAttributeValue(s string) error { return CheckLines(s, MaxAttributeValue) }
