// Package apigee reads the JSON of Apigee's developers, developer apps and API
// products, in both of its renderings: Apigee X leaves out what is empty and
// writes 64-bit numbers as strings, Edge writes everything and numbers as
// numbers. What stands for itself is kept as it is, unknown members too.
//
// It is strict about JSON (see jsonobject) and about what a check depends on,
// and says where. Consumer keys and secrets leave the package only as
// catalog.Secret.
package apigee

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
)

// int64Members are those that Apigee X writes as strings and Edge as numbers.
// They are kept as numbers.
var int64Members = map[string]bool{
	"createdAt": true, "lastModifiedAt": true, "issuedAt": true, "expiresAt": true,
	"keyExpiresIn": true, "expiresInSeconds": true,
}

// kind of a record.
type kind uint8

const (
	kindNone kind = iota
	kindApp
	kindDeveloper
	kindProduct
	numKinds
)

// kinds gives each kind its word in the plural, and the members that nothing
// else in an export of an organization has: one of them tells the kind. They
// are looked for in the order of the kinds, for an app has a developerId too.
var kinds = [numKinds]struct {
	plural string
	marks  []string
}{
	kindApp:       {"apps", []string{catalog.MemberAppID}},
	kindDeveloper: {"developers", []string{catalog.MemberDeveloperID, catalog.MemberEmail}},
	kindProduct: {"API products", []string{catalog.MemberApprovalType, catalog.MemberResources,
		"operationGroup", "graphqlOperationGroup", "grpcOperationGroup", "llmOperationGroup", "payloadOperationGroup"}},
}

// lists are the members that hold a list of records in an answer to a list
// call, and in one document with everything.
var lists = map[string]kind{
	"app": kindApp, "apps": kindApp,
	"developer": kindDeveloper, "developers": kindDeveloper,
	"apiProduct": kindProduct, "apiProducts": kindProduct,
}

// memberApps of a developer: the names of its apps. They are known from the apps.
const memberApps = "apps"

// decoder reads one record, of which jsonobject.Check has said that it is
// valid.
type decoder struct {
	start     catalog.Place
	data      []byte
	allowWeak bool
	refused   []catalog.Refusal // credentials of the app
}

// field is a member of an object, with the offsets of its name and its value in
// the record.
type field struct {
	name     string
	at       int
	value    []byte
	valueAt  int
	consumed bool
}

func (d *decoder) refuse(at int, format string, args ...any) *catalog.Refusal {
	return &catalog.Refusal{Place: later(d.start, d.data, at), Reason: fmt.Sprintf(format, args...)}
}

// record reads the record whose object begins at offset 0 into s. kind is what
// it must be, or kindNone if that is for its members to tell.
func (d *decoder) record(k kind, s *catalog.Submission) *catalog.Refusal {
	fields := d.object(0)
	for i := kindApp; k == kindNone && i < numKinds; i++ {
		for _, mark := range kinds[i].marks {
			if find(fields, mark) != nil {
				k = i
				break
			}
		}
	}
	var refusal *catalog.Refusal
	switch k {
	case kindApp:
		var a catalog.App
		if a, refusal = d.app(fields); refusal == nil {
			s.App, s.Refused = &a, d.refused
		}
	case kindDeveloper:
		var dev catalog.Developer
		if dev, refusal = d.developer(fields); refusal == nil {
			s.Developer = &dev
		}
	case kindProduct:
		var p catalog.Product
		if p, refusal = d.apiProduct(fields); refusal == nil {
			s.Product = &p
		}
	default:
		refusal = d.refuse(0, "this is neither an app (%q) nor a developer (%q) nor an API product (%q)",
			catalog.MemberAppID, catalog.MemberDeveloperID, catalog.MemberApprovalType)
	}
	return refusal
}

// empty tells whether the object says nothing: the answer to a list call that
// found nothing.
func (d *decoder) empty() bool {
	for _, f := range d.object(0) {
		list := lists[f.name] != kindNone && f.value[0] == '[' && len(d.elements(f.valueAt)) == 0
		if !list && f.name != "totalSize" && f.name != memberNextPage {
			return false
		}
	}
	return true
}

// developer reads a developer.
func (d *decoder) developer(fields []field) (dev catalog.Developer, refusal *catalog.Refusal) {
	if len(fields) == 1 && fields[0].name == catalog.MemberEmail {
		return dev, d.refuse(0, "the developer has nothing but an e-mail address: export with expand=true")
	}
	id, refusal := d.text(fields, 0, "a developer", catalog.MemberDeveloperID)
	if refusal != nil {
		return dev, refusal
	}
	dev.ID = authz.DeveloperID(id)
	email, refusal := d.text(fields, 0, "the developer", catalog.MemberEmail)
	if refusal != nil {
		return dev, refusal
	}
	var err error
	if dev.Email, err = catalog.ParseEmail(email); err != nil {
		return dev, d.refuse(find(fields, catalog.MemberEmail).valueAt, "%q %v", catalog.MemberEmail, err)
	}
	if dev.Status, refusal = d.status(fields, 0, "the developer", catalog.ParseDeveloperStatus); refusal != nil {
		return dev, refusal
	}
	if dev.Details, refusal = d.details(fields, nil, catalog.CheckDeveloperMember, memberApps); refusal == nil {
		dev.Details = dev.Details.With(catalog.MemberEmail, dev.Email)
	}
	return dev, refusal
}

// apiProduct reads an API product.
func (d *decoder) apiProduct(fields []field) (p catalog.Product, refusal *catalog.Refusal) {
	if len(fields) == 1 && fields[0].name == catalog.MemberName {
		return p, d.refuse(0, "the API product has nothing but its name: export with expand=true")
	}
	name, refusal := d.text(fields, 0, "an API product", catalog.MemberName)
	if refusal != nil {
		return p, refusal
	}
	p.Name = authz.ProductName(name)
	if f := find(fields, catalog.MemberApprovalType); f != nil {
		word, ok := unquote(f.value)
		if !ok {
			return p, d.refuse(f.valueAt, "%q is not a string", f.name)
		}
		if err := catalog.CheckApproval(word); err != nil {
			return p, d.refuse(f.valueAt, "%q %v", f.name, err)
		}
	}
	p.Details, refusal = d.details(fields, nil, catalog.CheckProductMember, "")
	return p, refusal
}

// app reads an app.
func (d *decoder) app(fields []field) (a catalog.App, refusal *catalog.Refusal) {
	const at = 0
	id, refusal := d.text(fields, at, "an app", catalog.MemberAppID)
	if refusal != nil {
		return a, refusal
	}
	a.ID = authz.AppID(id)
	if find(fields, catalog.MemberDeveloperID) == nil {
		for _, other := range []string{"appGroup", "companyName"} {
			if f := find(fields, other); f != nil && string(f.value) != `""` && string(f.value) != "null" {
				return a, d.refuse(f.at, "the app belongs to no developer but to an app group or company (%q), which keygate does not know", other)
			}
		}
		if len(fields) == 1 {
			return a, d.refuse(at, "the app has nothing but its appId: export with expand=true")
		}
	}
	developer, refusal := d.text(fields, at, "the app", catalog.MemberDeveloperID)
	if refusal != nil {
		return a, refusal
	}
	a.Developer = authz.DeveloperID(developer)
	if a.Name, refusal = d.text(fields, at, "the app", catalog.MemberName); refusal != nil {
		return a, refusal
	}
	if a.Status, refusal = d.status(fields, at, "the app", catalog.ParseStatus); refusal != nil {
		return a, refusal
	}
	var secrets []string
	if f := find(fields, catalog.MemberCredentials); f != nil {
		elements, refusal := d.list(f)
		if refusal != nil {
			return a, refusal
		}
		seen := map[authz.KeyID]bool{}
		for i, e := range elements {
			c, own, refusal := d.credential(e)
			secrets = append(secrets, own...)
			if refusal == nil && seen[c.Key] {
				refusal = d.refuse(e, "the consumer key stands on two credentials of the app")
			}
			if refusal != nil {
				refusal.Reason = fmt.Sprintf("credential %d: %s", i+1, refusal.Reason)
				d.refused = append(d.refused, *refusal)
				continue
			}
			seen[c.Key] = true
			a.Credentials = append(a.Credentials, c)
		}
	}
	a.Details, refusal = d.details(fields, secrets, catalog.CheckAppMember, catalog.MemberCredentials)
	return a, refusal
}

// credential reads the credential at an offset. secrets are its key and its
// secret, as far as they are there.
func (d *decoder) credential(at int) (c catalog.Credential, secrets []string, refusal *catalog.Refusal) {
	if d.data[at] != '{' {
		return c, nil, d.refuse(at, "want an object")
	}
	fields := d.object(at)
	key := find(fields, catalog.MemberKey)
	if key == nil || string(key.value) == "null" {
		return c, nil, d.refuse(at, "there is no %q", catalog.MemberKey)
	}
	text, ok := unquote(key.value)
	if !ok {
		return c, nil, d.refuse(key.valueAt, "%q is not a string", catalog.MemberKey)
	}
	key.consumed = true
	secrets = append(secrets, text)
	c.PlainKey = catalog.NewSecret(text)
	if f := find(fields, catalog.MemberSecret); f != nil {
		f.consumed = true
		if s, ok := unquote(f.value); ok {
			secrets = append(secrets, s)
			c.PlainSecret = catalog.NewSecret(s)
		}
	}
	var err error
	if c.Key, c.Hint, err = catalog.ParseKey(text, d.allowWeak); err != nil {
		return c, secrets, d.refuse(key.valueAt, "%v", err)
	}
	if c.Status, refusal = d.status(fields, at, "the credential", catalog.ParseStatus); refusal != nil {
		return c, secrets, refusal
	}
	if f := find(fields, catalog.MemberProducts); f != nil {
		elements, refusal := d.list(f)
		if refusal != nil {
			return c, secrets, refusal
		}
		seen := map[authz.ProductName]bool{}
		for _, e := range elements {
			p, refusal := d.product(e, secrets)
			if refusal != nil {
				return c, secrets, refusal
			}
			if seen[p.Name] {
				return c, secrets, d.refuse(e, "product %q stands twice on the credential", p.Name)
			}
			seen[p.Name] = true
			c.Products = append(c.Products, p)
		}
	}
	if f := find(fields, catalog.MemberScopes); f != nil {
		elements, refusal := d.list(f)
		if refusal != nil {
			return c, secrets, refusal
		}
		for _, e := range elements {
			scope, ok := unquote(d.data[e:d.end(e)])
			if !ok {
				return c, secrets, d.refuse(e, "a scope is not a string")
			}
			if err := catalog.CheckScope(scope); err != nil {
				return c, secrets, d.refuse(e, "%v", err)
			}
		}
		if len(elements) == 0 {
			f.value = []byte("[]") // null says the same, but a check does not read it
		}
	}
	if c.Details, refusal = d.details(fields, secrets, catalog.CheckCredentialMember, catalog.MemberProducts); refusal != nil {
		return c, secrets, refusal
	}
	f := find(fields, catalog.MemberExpiresAt)
	if f == nil { // as in the answer to the call that makes a key
		c.ExpiresAt = authz.NeverExpires
		c.Details = c.Details.With(catalog.MemberExpiresAt, c.ExpiresAt)
		return c, secrets, nil
	}
	raw, _ := c.Details.Get(catalog.MemberExpiresAt)
	if c.ExpiresAt, err = strconv.ParseInt(string(raw), 10, 64); err != nil {
		return c, secrets, d.refuse(f.valueAt, "%q is null: want milliseconds since 1970, or -1 for never", catalog.MemberExpiresAt)
	}
	if err := catalog.CheckExpiry(c.ExpiresAt); err != nil {
		return c, secrets, d.refuse(f.valueAt, "%q: %v", catalog.MemberExpiresAt, err)
	}
	return c, secrets, nil
}

// product reads the reference to a product at an offset.
func (d *decoder) product(at int, secrets []string) (p catalog.ProductRef, refusal *catalog.Refusal) {
	switch d.data[at] {
	case '{':
	case '"':
		return p, d.refuse(at, "a product is given by its name alone, without a status")
	default:
		return p, d.refuse(at, "a product is not an object")
	}
	fields := d.object(at)
	name, refusal := d.text(fields, at, "a product of the credential", catalog.MemberProduct)
	if refusal != nil {
		return p, refusal
	}
	p.Name = authz.ProductName(name)
	if p.Status, refusal = d.status(fields, at, fmt.Sprintf("product %q", p.Name), catalog.ParseStatus); refusal != nil {
		return p, refusal
	}
	p.Details, refusal = d.details(fields, secrets, catalog.CheckSecretMember, "")
	return p, refusal
}

// text reads a member that must be an id or a name.
func (d *decoder) text(fields []field, at int, of, name string) (string, *catalog.Refusal) {
	f := find(fields, name)
	if f == nil || string(f.value) == "null" {
		return "", d.refuse(at, "%s must have %q", of, name)
	}
	s, ok := unquote(f.value)
	if !ok {
		return "", d.refuse(f.valueAt, "%q is not a string", name)
	}
	if err := catalog.CheckName(s); err != nil {
		return "", d.refuse(f.valueAt, "%q %v", name, err)
	}
	return s, nil
}

// status reads the status of an object. None at all is a mistake, not an
// approval.
func (d *decoder) status(fields []field, at int, of string, parse func(word string) (authz.Status, error)) (authz.Status, *catalog.Refusal) {
	f := find(fields, catalog.MemberStatus)
	if f == nil || string(f.value) == "null" {
		return authz.StatusNone, d.refuse(at, "%s has no %q", of, catalog.MemberStatus)
	}
	f.consumed = true
	word, ok := unquote(f.value)
	if !ok {
		return authz.StatusNone, d.refuse(f.valueAt, "%s: %q is not a string", of, catalog.MemberStatus)
	}
	s, err := parse(word)
	if err != nil {
		return authz.StatusNone, d.refuse(f.valueAt, "%s: %v", of, err)
	}
	return s, nil
}

// details returns the members that were not consumed. Of the member list only
// the place is kept. Nothing in the others may be one of the secrets.
func (d *decoder) details(fields []field, secrets []string, check func(name string) error, list string) (jsonobject.Object, *catalog.Refusal) {
	o := make(jsonobject.Object, 0, len(fields)+1)
	for _, f := range fields {
		switch {
		case f.consumed:
			continue
		case list != "" && f.name == list:
			o = append(o, jsonobject.Member{Name: f.name, Value: json.RawMessage("[]")})
			continue
		}
		if err := check(f.name); err != nil {
			return nil, d.refuse(f.at, "%v", err)
		}
		if holds(f.name, secrets) {
			return nil, d.refuse(f.at, "a member's name holds a consumer key or secret, which is not kept")
		}
		if at, reason := d.leak(f.valueAt, secrets); reason != "" {
			return nil, d.refuse(at, "member %q %s, which is not kept", f.name, reason)
		}
		value := f.value
		if int64Members[f.name] && string(value) != "null" {
			text := string(value)
			if s, ok := unquote(value); ok {
				text = s
			}
			n, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				return nil, d.refuse(f.valueAt, "%q is not a 64-bit integer", f.name)
			}
			value = strconv.AppendInt(nil, n, 10)
		}
		o = append(o, jsonobject.Member{Name: f.name, Value: value})
	}
	return o, nil
}

// leak looks through the value at an offset for a consumer key or a secret that
// would be stored with it: a member that is named like one, or a string that
// holds one. Secrets too short to be told from a common word are passed over.
func (d *decoder) leak(at int, secrets []string) (where int, reason string) {
	switch d.data[at] {
	case '{':
		for _, f := range d.object(at) {
			if catalog.CheckSecretMember(f.name) != nil || holds(f.name, secrets) {
				return f.at, "holds a consumer key or secret"
			}
			if where, reason := d.leak(f.valueAt, secrets); reason != "" {
				return where, reason
			}
		}
	case '[':
		for _, e := range d.elements(at) {
			if where, reason := d.leak(e, secrets); reason != "" {
				return where, reason
			}
		}
	case '"':
		if s, _ := unquote(d.data[at:d.end(at)]); holds(s, secrets) {
			return at, "holds a consumer key or secret"
		}
	}
	return 0, ""
}

func holds(s string, secrets []string) bool {
	for _, secret := range secrets {
		if len(secret) >= catalog.MinKeyLength && strings.Contains(s, secret) {
			return true
		}
	}
	return false
}

// list returns the offsets of a member's elements; null has none.
func (d *decoder) list(f *field) ([]int, *catalog.Refusal) {
	switch {
	case string(f.value) == "null":
		return nil, nil
	case f.value[0] != '[':
		return nil, d.refuse(f.valueAt, "%q is not a list", f.name)
	}
	return d.elements(f.valueAt), nil
}

func find(fields []field, name string) *field {
	for i := range fields {
		if fields[i].name == name {
			return &fields[i]
		}
	}
	return nil
}

// unquote returns the text of a JSON string.
func unquote(value []byte) (s string, ok bool) {
	if len(value) == 0 || value[0] != '"' {
		return "", false
	}
	if plain := value[1 : len(value)-1]; bytes.IndexByte(plain, '\\') < 0 {
		return string(plain), true
	}
	err := json.Unmarshal(value, &s)
	return s, err == nil
}

// The following walk over valid JSON.

// object returns the members of the object at an offset.
func (d *decoder) object(at int) (fields []field) {
	for at = d.space(at + 1); d.data[at] != '}'; at = d.space(at) {
		if d.data[at] == ',' {
			at = d.space(at + 1)
		}
		f := field{at: at}
		end := d.end(at)
		f.name, _ = unquote(d.data[at:end])
		f.valueAt = d.space(d.space(end) + 1) // behind the colon
		at = d.end(f.valueAt)
		f.value = d.data[f.valueAt:at]
		fields = append(fields, f)
	}
	return fields
}

// elements returns the offsets of the elements of the list at an offset.
func (d *decoder) elements(at int) (offsets []int) {
	for at = d.space(at + 1); d.data[at] != ']'; at = d.space(at) {
		if d.data[at] == ',' {
			at = d.space(at + 1)
		}
		offsets = append(offsets, at)
		at = d.end(at)
	}
	return offsets
}

// space returns the offset of the first byte from at on that is not blank.
func (d *decoder) space(at int) int {
	for d.data[at] == ' ' || d.data[at] == '\t' || d.data[at] == '\r' || d.data[at] == '\n' {
		at++
	}
	return at
}

// end returns the offset behind the value at an offset.
func (d *decoder) end(at int) int {
	depth := 0
	for {
		switch c := d.data[at]; c {
		case '"':
			for at++; d.data[at] != '"'; at++ {
				if d.data[at] == '\\' {
					at++
				}
			}
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		case ',', ':', ' ', '\t', '\r', '\n':
		default:
			for at+1 < len(d.data) && scalar(d.data[at+1]) {
				at++
			}
		}
		at++
		if depth == 0 {
			return at
		}
	}
}
