package apigee

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"keygate/catalog"
	"keygate/jsonobject"
)

// noun is what Apigee's JSON of a noun consists of: one table by which bodies
// are read and answers are written, in both editions. It is sorted by name.
type noun []member

// member of a noun.
type member struct {
	name  string
	shape shape
	use   use
	// check of a text, or of each of several texts; nil means at most one line
	// of 255 bytes.
	check func(s string) error
	// all checks several texts together; nil means nothing.
	all func(s []string) error
	// fallback is shown where nothing is stored.
	fallback string
}

// shape of a member's value. Beside it stands what the value becomes in Go.
type shape uint8

const (
	text         shape = iota // a string: string
	textOrNumber              // a string, a number is taken for one: string
	texts                     // a list of strings: []string
	names                     // a list of products, each its name or {"apiproduct": its name}: []string
	integer                   // 64 bits, a number or a string: int64
	attributes                // a list of {"name", "value"}: []catalog.Attribute
	object                    // an object that is kept as it is: json.RawMessage
)

// use that is made of a member. None: a body may set it, an answer shows it.
type use uint8

const (
	required  use = 1 << iota // in a body
	ignored                   // in a body: it is not the client's to say
	unshown                   // no answer has it from the store
	edgeOnly                  // only Edge shows it
	whenEmpty                 // Edge shows it when it is empty, too
)

const (
	memberAccessType     = "accessType"
	memberAppFamily      = "appFamily"
	memberCompanies      = "companies"
	memberDeveloperEmail = "developerEmail"
	memberExpiresIn      = "expiresInSeconds"
	memberKeyExpiresIn   = "keyExpiresIn"
	memberQuotaTimeUnit  = "quotaTimeUnit"
	memberQuotaCounter   = "quotaCounterScope"
	memberLLMQuotaUnit   = "llmQuotaTimeUnit"
	memberOperations     = "operationConfigs"
)

var appNoun = sorted(
	member{name: memberAccessType, use: edgeOnly | whenEmpty},
	member{name: catalog.MemberProducts, shape: names, use: unshown, check: catalog.CheckName},
	member{name: memberAppFamily, fallback: "default"},
	member{name: catalog.MemberAppID, use: ignored},
	member{name: catalog.MemberAttributes, shape: attributes, use: whenEmpty},
	member{name: catalog.MemberCallbackURL, use: whenEmpty, check: catalog.CheckCallbackURL},
	member{name: catalog.MemberCreatedAt, shape: integer, use: ignored},
	member{name: catalog.MemberCreatedBy, use: ignored | edgeOnly | whenEmpty},
	member{name: catalog.MemberCredentials, shape: object, use: ignored | unshown},
	member{name: memberDeveloperEmail, use: ignored | unshown},
	member{name: catalog.MemberDeveloperID, use: ignored},
	member{name: memberKeyExpiresIn, shape: integer, use: unshown},
	member{name: catalog.MemberLastModifiedAt, shape: integer, use: ignored},
	member{name: catalog.MemberLastModifiedBy, use: ignored | edgeOnly | whenEmpty},
	member{name: catalog.MemberName},
	member{name: catalog.MemberScopes, shape: texts, use: whenEmpty, check: catalog.CheckScope, all: catalog.CheckScopes},
	member{name: catalog.MemberStatus, use: ignored},
	member{name: "appGroup", use: ignored},
	member{name: "companyName", use: ignored},
)

var credentialNoun = sorted(
	member{name: catalog.MemberProducts, shape: names, use: unshown, check: catalog.CheckName},
	member{name: catalog.MemberAppID, use: ignored | unshown},
	member{name: catalog.MemberAttributes, shape: attributes, use: whenEmpty},
	member{name: catalog.MemberKey, use: unshown, check: catalog.CheckOwnKey},
	member{name: catalog.MemberSecret, use: unshown, check: catalog.CheckOwnSecret},
	member{name: catalog.MemberDeveloperID, use: ignored | unshown},
	member{name: catalog.MemberExpiresAt, shape: integer, use: ignored},
	member{name: memberExpiresIn, shape: integer, use: unshown},
	member{name: catalog.MemberIssuedAt, shape: integer, use: ignored},
	member{name: catalog.MemberScopes, shape: texts, use: whenEmpty, check: catalog.CheckScope, all: catalog.CheckScopes},
	member{name: catalog.MemberStatus, use: ignored},
)

var refNoun = sorted(
	member{name: catalog.MemberProduct, use: required, check: catalog.CheckName},
	member{name: catalog.MemberStatus, use: ignored},
)

var developerNoun = sorted(
	member{name: memberAccessType},
	member{name: memberAppFamily},
	member{name: memberApps, shape: texts, use: ignored | unshown},
	member{name: catalog.MemberAttributes, shape: attributes, use: whenEmpty},
	member{name: memberCompanies, shape: texts, use: ignored | whenEmpty},
	member{name: catalog.MemberCreatedAt, shape: integer, use: ignored},
	member{name: catalog.MemberCreatedBy, use: ignored | edgeOnly | whenEmpty},
	member{name: catalog.MemberDeveloperID, use: ignored},
	member{name: catalog.MemberEmail, use: required | whenEmpty, check: checkEmail},
	member{name: catalog.MemberFirstName, use: required | whenEmpty},
	member{name: catalog.MemberLastModifiedAt, shape: integer, use: ignored},
	member{name: catalog.MemberLastModifiedBy, use: ignored | edgeOnly | whenEmpty},
	member{name: catalog.MemberLastName, use: required | whenEmpty},
	member{name: catalog.MemberOrganization, use: ignored | unshown},
	member{name: catalog.MemberStatus, use: ignored},
	member{name: catalog.MemberUserName, use: required | whenEmpty},
)

var productNoun = sorted(
	member{name: catalog.MemberResources, shape: texts, use: whenEmpty, check: catalog.CheckResource},
	member{name: catalog.MemberApprovalType, check: catalog.CheckApproval},
	member{name: catalog.MemberAttributes, shape: attributes, use: whenEmpty},
	member{name: catalog.MemberCreatedAt, shape: integer, use: ignored},
	member{name: catalog.MemberCreatedBy, use: ignored | edgeOnly | whenEmpty},
	member{name: catalog.MemberDescription, use: whenEmpty, check: checkDescription},
	member{name: catalog.MemberDisplayName, use: required | whenEmpty},
	member{name: catalog.MemberEnvironments, shape: texts, use: whenEmpty, check: catalog.CheckName},
	member{name: "graphqlOperationGroup", shape: object},
	member{name: "grpcOperationGroup", shape: object},
	member{name: catalog.MemberLastModifiedAt, shape: integer, use: ignored},
	member{name: catalog.MemberLastModifiedBy, use: ignored | edgeOnly | whenEmpty},
	member{name: "llmOperationGroup", shape: object},
	member{name: "llmQuota", shape: textOrNumber},
	member{name: "llmQuotaInterval", shape: textOrNumber},
	member{name: memberLLMQuotaUnit, check: checkTimeUnit},
	member{name: catalog.MemberName},
	member{name: catalog.MemberOperationGroup, shape: object},
	member{name: "payloadOperationGroup", shape: object},
	member{name: catalog.MemberProxies, shape: texts, use: whenEmpty, check: catalog.CheckName},
	member{name: "quota", shape: textOrNumber},
	member{name: memberQuotaCounter, check: oneOf("PROXY", "OPERATION", "PRODUCT", "QUOTA_COUNTER_SCOPE_UNSPECIFIED")},
	member{name: "quotaInterval", shape: textOrNumber},
	member{name: memberQuotaTimeUnit, check: checkTimeUnit},
	member{name: catalog.MemberScopes, shape: texts, use: whenEmpty, check: catalog.CheckScope, all: catalog.CheckScopes},
	member{name: "space"},
)

var attributeNoun = sorted(
	member{name: catalog.MemberName, use: whenEmpty, check: catalog.CheckAttributeName},
	member{name: catalog.MemberValue, use: whenEmpty, check: catalog.CheckAttributeValue},
)

// attributesNoun is the list of attributes as a resource of its own.
var attributesNoun = sorted(member{name: memberAttribute, shape: attributes, use: whenEmpty})

const memberAttribute = "attribute"

func sorted(members ...member) noun {
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.name, b.name) })
	return members
}

func (n noun) find(name string) *member {
	i, ok := slices.BinarySearchFunc(n, name, func(m member, name string) int { return strings.Compare(m.name, name) })
	if !ok {
		return nil
	}
	return &n[i]
}

func (m *member) is(u use) bool { return m.use&u != 0 }

// reserved are the members by which the store, or keygate's own answers, say
// what nobody can set.
var reserved = []string{
	"org", "organization", "revision",
	catalog.MemberVersion, catalog.MemberHint, catalog.MemberSealedKey, catalog.MemberSealedSecret,
}

// hidden tells whether a stored member that no table knows is shown to nobody.
func hidden(name string) bool {
	return slices.Contains(reserved, name) || catalog.CheckSecretMember(name) != nil
}

// decode returns the value of the member as its shape says, nil for null. It
// does not check the value further, and takes attributes that can be read.
func (m *member) decode(raw json.RawMessage) (any, *catalog.FieldError) {
	if string(raw) == "null" {
		return nil, nil
	}
	wrong := func(want string) *catalog.FieldError {
		return &catalog.FieldError{Message: fmt.Sprintf("is %s, want %s", jsonWord(raw), want)}
	}
	switch m.shape {
	case text:
		s, ok := unquote(raw)
		if !ok {
			return nil, wrong("a string")
		}
		return s, nil
	case textOrNumber:
		if s, ok := unquote(raw); ok {
			return s, nil
		}
		var n json.Number
		if json.Unmarshal(raw, &n) != nil {
			return nil, wrong("a string")
		}
		return n.String(), nil
	case integer:
		s, ok := unquote(raw)
		if !ok {
			s = string(raw)
		}
		var n int64
		if json.Unmarshal([]byte(s), &n) != nil || strings.TrimSpace(s) == "null" {
			return nil, &catalog.FieldError{Message: "is no integer of 64 bits, want one as a number or a string"}
		}
		return n, nil
	case texts, names:
		var elements []json.RawMessage
		if json.Unmarshal(raw, &elements) != nil {
			return nil, wrong("a list")
		}
		list := make([]string, 0, len(elements))
		for i, e := range elements {
			s, err := m.element(e)
			if err != nil {
				return nil, within(i, err)
			}
			list = append(list, s)
		}
		return list, nil
	case attributes:
		if raw[0] != '[' {
			return nil, wrong("a list")
		}
		return catalog.Attributes(jsonobject.Object{{Name: catalog.MemberAttributes, Value: raw}}), nil
	}
	if raw[0] != '{' {
		return nil, wrong("an object")
	}
	var b bytes.Buffer
	if err := json.Compact(&b, raw); err != nil {
		return nil, &catalog.FieldError{Message: err.Error()}
	}
	return json.RawMessage(b.Bytes()), nil
}

// element reads one of texts or names.
func (m *member) element(raw json.RawMessage) (string, *catalog.FieldError) {
	if s, ok := unquote(raw); ok {
		return s, nil
	}
	if m.shape == names && raw[0] == '{' {
		v, err := refNoun.parse(raw)
		if err != nil {
			return "", err
		}
		return v[catalog.MemberProduct].(string), nil
	}
	want := "a string"
	if m.shape == names {
		want = fmt.Sprintf("a product's name or {%q: its name}", catalog.MemberProduct)
	}
	return "", &catalog.FieldError{Message: fmt.Sprintf("is %s, want %s", jsonWord(raw), want)}
}

// within returns err with a segment before its pointer.
func within(segment any, err *catalog.FieldError) *catalog.FieldError {
	s := strings.NewReplacer("~", "~0", "/", "~1").Replace(fmt.Sprint(segment))
	return &catalog.FieldError{Pointer: "/" + s + err.Pointer, Message: err.Message}
}

// jsonWord names what kind of value raw is. It never shows the value.
func jsonWord(raw json.RawMessage) string {
	switch raw[0] {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a string"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	}
	return "a number"
}

// empty tells whether v says nothing: Apigee X leaves it out.
func empty(v any) bool {
	switch v := v.(type) {
	case string:
		return v == ""
	case []string:
		return len(v) == 0
	case []catalog.Attribute:
		return len(v) == 0
	case json.RawMessage:
		return slices.Contains([]string{"", `""`, "[]", "null"}, string(v))
	}
	return v == nil
}

func checkEmail(s string) error {
	_, err := catalog.ParseEmail(s)
	return err
}

func checkLine(s string) error { return catalog.CheckText(s, catalog.MaxNameLength) }

// maxDescription of a product, in bytes.
const maxDescription = 4096

func checkDescription(s string) error { return catalog.CheckLines(s, maxDescription) }

var checkTimeUnit = oneOf("minute", "hour", "day", "month")

func oneOf(words ...string) func(s string) error {
	return func(s string) error {
		if s == "" || slices.Contains(words, s) {
			return nil
		}
		return errors.New("is none of " + strings.Join(words, ", "))
	}
}
