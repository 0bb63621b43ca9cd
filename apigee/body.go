package apigee

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
)

// The functions that parse the body of a request have some rules in common.
//
//   - The body is one JSON object, whatever the content type; jsonobject says
//     how strictly. null is the same as absent.
//   - Members that are Apigee's or keygate's to say, as a status, an id or a
//     time, are ignored: clients put back what they have read. So are members
//     that nobody knows, for clients send some of their own; but one that looks
//     like a misspelt name is an error, and so is one that keygate uses itself.
//   - A 64-bit integer is a number or a string.
//
// What is returned as details are the members that a client may set, sorted by
// name, without those that are empty: empty and absent mean the same. Every
// error is a [*catalog.FieldError] and holds neither a consumer key nor a
// secret. The results do not share memory with the body.

// AppBody is a developer app as a client submits it.
type AppBody struct {
	// Name of the app: the one in the URL if there is one.
	Name string
	// Products for a new key, names distinct.
	Products []authz.ProductName
	// KeyExpiresIn is the time in milliseconds after which a new key expires;
	// authz.NeverExpires for never.
	KeyExpiresIn int64
	// Details of the app, the name among them.
	Details jsonobject.Object
	// Action is "approve" or "revoke" where the status is one of these words
	// instead of a state: Edge's way to change the status. Else empty.
	Action string
}

// KeyBody is a credential as a client submits it.
type KeyBody struct {
	// Key and Secret of the client's own choice; empty to have one made.
	Key, Secret string
	// ExpiresIn is the time in seconds after which a new key expires;
	// authz.NeverExpires for never.
	ExpiresIn int64
	// Products to add, names distinct.
	Products []authz.ProductName
	// Attributes and Scopes, and whether the body has them.
	Attributes    []catalog.Attribute
	HasAttributes bool
	Scopes        []string
	HasScopes     bool
}

// ParseDeveloper reads the body that creates or replaces a developer. The
// result has neither an id nor a status.
func ParseDeveloper(body []byte) (catalog.Developer, error) {
	v, err := developerNoun.parseBody(body)
	if err != nil {
		return catalog.Developer{}, err
	}
	email, _ := catalog.ParseEmail(v[catalog.MemberEmail].(string)) // its check has said that it is one
	v[catalog.MemberEmail] = email
	return catalog.Developer{Email: email, Details: developerNoun.details(v)}, nil
}

// ParseProduct reads the body that creates an API product or replaces the one
// with this name: then the body may leave the name out, but not change it. name
// is empty for a product that is new.
func ParseProduct(body []byte, name authz.ProductName) (catalog.Product, error) {
	v, err := productNoun.parseBody(body)
	if err != nil {
		return catalog.Product{}, err
	}
	given, err := v.name(string(name), catalog.CheckProductName)
	if err != nil {
		return catalog.Product{}, err
	}
	v[catalog.MemberName] = given
	if empty(v[catalog.MemberApprovalType]) {
		v[catalog.MemberApprovalType] = catalog.ApprovalAuto
	}
	if err := checkOperations(v); err != nil {
		return catalog.Product{}, err
	}
	return catalog.Product{Name: authz.ProductName(given), Details: productNoun.details(v)}, nil
}

// ParseApp reads the body that creates a developer app, or changes the one with
// this name or adds a key to it: then the body may leave the name out, but not
// change it. name is empty for an app that is new.
func ParseApp(body []byte, name string) (AppBody, error) {
	v, err := appNoun.parseBody(body)
	if err != nil {
		return AppBody{}, err
	}
	var a AppBody
	if a.Name, err = v.name(name, catalog.CheckAppName); err != nil {
		return AppBody{}, err
	}
	if a.KeyExpiresIn, err = v.expiresIn(memberKeyExpiresIn, catalog.CheckKeyExpiresIn); err != nil {
		return AppBody{}, err
	}
	a.Products = v.products()
	if word, _ := v[catalog.MemberStatus].(string); word == "approve" || word == "revoke" {
		a.Action = word
	}
	v[catalog.MemberName] = a.Name
	a.Details = appNoun.details(v)
	return a, nil
}

// ParseNewKey reads the body that makes a credential with a key and a secret of
// the client's own choice. One that it leaves out is empty.
func ParseNewKey(body []byte) (KeyBody, error) {
	k, v, err := parseKey(body)
	if err != nil {
		return KeyBody{}, err
	}
	var secrets []string
	for _, own := range []struct {
		name string
		to   *string
	}{{catalog.MemberKey, &k.Key}, {catalog.MemberSecret, &k.Secret}} {
		s, given := v[own.name].(string)
		if !given {
			continue
		}
		if err := credentialNoun.find(own.name).check(s); err != nil {
			return KeyBody{}, within(own.name, &catalog.FieldError{Message: err.Error()})
		}
		*own.to = s
		secrets = append(secrets, s)
	}
	// What is stored in the clear must not say what is sealed.
	for i, a := range k.Attributes {
		if holds(a.Name, secrets) || holds(a.Value, secrets) {
			return KeyBody{}, within(catalog.MemberAttributes, within(i, errLeak))
		}
	}
	for i, s := range k.Scopes {
		if holds(s, secrets) {
			return KeyBody{}, within(catalog.MemberScopes, within(i, errLeak))
		}
	}
	return k, nil
}

var errLeak = &catalog.FieldError{Message: "holds the consumer key or secret, which is not stored in the clear"}

// ParseKey reads the body that changes a credential. Its key and its secret
// cannot be changed: they are ignored.
func ParseKey(body []byte) (KeyBody, error) {
	k, _, err := parseKey(body)
	return k, err
}

func parseKey(body []byte) (k KeyBody, v values, err error) {
	if v, err = credentialNoun.parseBody(body); err != nil {
		return k, nil, err
	}
	if k.ExpiresIn, err = v.expiresIn(memberExpiresIn, catalog.CheckExpiresInSeconds); err != nil {
		return k, nil, err
	}
	k.Products = v.products()
	k.Attributes, k.HasAttributes = v[catalog.MemberAttributes].([]catalog.Attribute)
	k.Scopes, k.HasScopes = v[catalog.MemberScopes].([]string)
	return k, v, nil
}

// ParseAttributes reads the body that replaces all attributes of a noun.
func ParseAttributes(body []byte) ([]catalog.Attribute, error) {
	v, err := attributesNoun.parseBody(body)
	if err != nil {
		return nil, err
	}
	list, _ := v[memberAttribute].([]catalog.Attribute)
	return list, nil
}

// ParseAttribute reads the body that sets the attribute of this name: with its
// name and value, or, as Edge takes it, with its value alone.
func ParseAttribute(body []byte, name string) (catalog.Attribute, error) {
	v, err := attributeNoun.parseBody(body)
	if err != nil {
		return catalog.Attribute{}, err
	}
	if len(v) == 0 { // a name alone has an empty value, as Apigee X shows it
		return catalog.Attribute{}, &catalog.FieldError{Message: fmt.Sprintf("has neither %q nor %q, want an attribute's value", catalog.MemberName, catalog.MemberValue)}
	}
	if name, err = v.name(name, catalog.CheckAttributeName); err != nil {
		return catalog.Attribute{}, err
	}
	value, _ := v[catalog.MemberValue].(string)
	return catalog.Attribute{Name: name, Value: value}, nil
}

// values of a noun's members, those that are not null, by their names.
type values map[string]any

// parseBody reads the body of a request.
func (n noun) parseBody(body []byte) (values, error) {
	if bytes.HasPrefix(body, []byte("\ufeff")) {
		return nil, &catalog.FieldError{Message: "1:1: a byte order mark, want UTF-8 without one"}
	}
	if err := jsonobject.Check(body); err != nil {
		message := err.Error()
		// A name may be anything, a key too.
		if bad := (*jsonobject.Error)(nil); errors.As(err, &bad) && errors.Is(err, jsonobject.ErrDuplicate) {
			message = fmt.Sprintf("%d:%d: a member stands twice in one object", bad.Line, bad.Column)
		}
		return nil, &catalog.FieldError{Message: "the body is not the JSON that is wanted: " + message}
	}
	v, err := n.parse(bytes.TrimSpace(body))
	if err != nil { // not simply returned: it would be an error that is not nil
		return nil, err
	}
	return v, nil
}

// parse reads an object that is known to be JSON. An ignored member is among
// the values only where it is a text.
func (n noun) parse(raw json.RawMessage) (values, *catalog.FieldError) {
	if raw[0] != '{' {
		return nil, &catalog.FieldError{Message: "is " + jsonWord(raw) + ", want an object"}
	}
	o, err := jsonobject.Parse(raw)
	if err != nil {
		return nil, &catalog.FieldError{Message: err.Error()}
	}
	v := values{}
	for _, given := range o {
		m := n.find(given.Name)
		switch {
		case m == nil:
			if err := n.unknown(given.Name); err != nil {
				return nil, within(given.Name, err)
			}
		case m.is(ignored):
			if word, ok := unquote(given.Value); ok {
				v[m.name] = word
			}
		default:
			value, err := m.read(given.Value)
			if err != nil {
				return nil, within(m.name, err)
			}
			if value != nil {
				v[m.name] = value
			}
		}
	}
	for _, m := range n {
		if m.is(required) && empty(v[m.name]) {
			return nil, within(m.name, &catalog.FieldError{Message: "is required, want a string that is not empty"})
		}
	}
	return v, nil
}

// unknown tells what is wrong with a member that is not the noun's.
func (n noun) unknown(name string) *catalog.FieldError {
	if slices.Contains(reserved, name) {
		return &catalog.FieldError{Message: "is read-only: keygate uses this name itself"}
	}
	for _, m := range n {
		limit := 2
		if len(m.name) < 6 {
			limit = 1
		}
		if near(strings.ToLower(name), strings.ToLower(m.name), limit) {
			return &catalog.FieldError{Message: fmt.Sprintf("is not known, did you mean %q?", m.name)}
		}
	}
	return nil
}

// near tells whether at most limit letters are to insert, delete, replace or
// swap with their neighbour to make b of a.
func near(a, b string, limit int) bool {
	if len(a) > len(b)+limit || len(b) > len(a)+limit {
		return false
	}
	before, row := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next := make([]int, len(b)+1)
		next[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next[j] = min(row[j]+1, next[j-1]+1, row[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)] <= limit
}

// maxElements of a list in a body.
const maxElements = 1000

// read returns a member's value, checked; nil for null.
func (m *member) read(raw json.RawMessage) (any, *catalog.FieldError) {
	if m.shape == attributes && raw[0] == '[' {
		return readAttributes(raw)
	}
	v, err := m.decode(raw)
	if err != nil {
		return nil, err
	}
	check := m.check
	if check == nil {
		check = checkLine
	}
	switch v := v.(type) {
	case string:
		// A key or secret is checked where it counts.
		if v != "" && catalog.CheckSecretMember(m.name) == nil {
			if err := check(v); err != nil {
				return nil, &catalog.FieldError{Message: err.Error()}
			}
		}
	case []string:
		if len(v) > maxElements {
			return nil, &catalog.FieldError{Message: fmt.Sprintf("has %d elements, want at most %d", len(v), maxElements)}
		}
		for i, s := range v {
			if err := check(s); err != nil {
				return nil, within(i, &catalog.FieldError{Message: err.Error()})
			}
		}
		if m.all != nil {
			if bad := (*catalog.FieldError)(nil); errors.As(m.all(v), &bad) {
				return nil, bad
			}
		}
	}
	return v, nil
}

// readAttributes reads a list of attributes, strictly.
func readAttributes(raw json.RawMessage) (any, *catalog.FieldError) {
	var elements []json.RawMessage
	if err := json.Unmarshal(raw, &elements); err != nil {
		return nil, &catalog.FieldError{Message: err.Error()}
	}
	list := make([]catalog.Attribute, 0, len(elements))
	for i, e := range elements {
		v, err := attributeNoun.parse(e)
		if err != nil {
			return nil, within(i, err)
		}
		name, _ := v[catalog.MemberName].(string)
		value, _ := v[catalog.MemberValue].(string)
		list = append(list, catalog.Attribute{Name: name, Value: value})
	}
	if bad := (*catalog.FieldError)(nil); errors.As(catalog.CheckAttributes(list), &bad) {
		return nil, bad
	}
	return list, nil
}

// details returns the members that are stored.
func (n noun) details(v values) jsonobject.Object {
	o := jsonobject.Object{}
	for _, m := range n {
		if value, ok := v[m.name]; ok && !m.is(ignored|unshown) && !empty(value) {
			o = o.With(m.name, value)
		}
	}
	return o
}

// name returns the noun's name: the one in the URL, which the body may repeat;
// or if there is none the body's, which must be good for a new one.
func (v values) name(url string, check func(name string) error) (string, error) {
	given, _ := v[catalog.MemberName].(string)
	switch {
	case given == "" && url == "":
		return "", within(catalog.MemberName, &catalog.FieldError{Message: "is required, want a string that is not empty"})
	case given == "" || given == url:
		return url, nil
	case url != "":
		return "", within(catalog.MemberName, &catalog.FieldError{Message: fmt.Sprintf("is %q, and the URL says %q: a name cannot be changed, leave it out", given, url)})
	}
	if err := check(given); err != nil {
		return "", within(catalog.MemberName, &catalog.FieldError{Message: err.Error()})
	}
	return given, nil
}

func (v values) expiresIn(name string, check func(n int64) error) (int64, error) {
	n, _ := v[name].(int64)
	if err := check(n); err != nil {
		return 0, within(name, &catalog.FieldError{Message: err.Error()})
	}
	if n == 0 {
		n = authz.NeverExpires
	}
	return n, nil
}

// products returns each of the named products once.
func (v values) products() (products []authz.ProductName) {
	list, _ := v[catalog.MemberProducts].([]string)
	seen := make(map[string]bool, len(list))
	for _, s := range list {
		if !seen[s] {
			seen[s] = true
			products = append(products, authz.ProductName(s))
		}
	}
	return products
}

// checkOperations tells what is wrong with the operations of a product: their
// resources follow the rule of apiResources and do not stand beside them, and
// their attributes count as the product's.
func checkOperations(v values) error {
	raw, ok := v[catalog.MemberOperationGroup].(json.RawMessage)
	if !ok {
		return nil
	}
	wrong := func(err *catalog.FieldError, segments ...any) error {
		for _, s := range slices.Backward(segments) {
			err = within(s, err)
		}
		return within(catalog.MemberOperationGroup, err)
	}
	if !empty(v[catalog.MemberResources]) {
		return wrong(&catalog.FieldError{Message: fmt.Sprintf("stands beside %q, want one of them", catalog.MemberResources)})
	}
	var group struct {
		Configs []struct {
			Attributes []json.RawMessage `json:"attributes"`
			Operations []struct {
				Resource *string `json:"resource"`
			} `json:"operations"`
		} `json:"operationConfigs"`
	}
	if err := json.Unmarshal(raw, &group); err != nil {
		return wrong(&catalog.FieldError{Message: `is not of the form {"operationConfigs":[{"apiSource":"…","operations":[{"resource":"/…","methods":[…]}]}]}`})
	}
	own, _ := v[catalog.MemberAttributes].([]catalog.Attribute)
	count := len(own)
	for i, c := range group.Configs {
		count += len(c.Attributes)
		for j, op := range c.Operations {
			err := errors.New("is required, want a path")
			if op.Resource != nil {
				err = catalog.CheckResource(*op.Resource)
			}
			if err != nil {
				return wrong(&catalog.FieldError{Message: err.Error()}, memberOperations, i, "operations", j, "resource")
			}
		}
	}
	if count > catalog.MaxAttributes {
		return wrong(&catalog.FieldError{Message: fmt.Sprintf("and the product have %d attributes together, want at most %d", count, catalog.MaxAttributes)})
	}
	return nil
}
