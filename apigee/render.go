package apigee

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
)

// Edition of Apigee, whose rendering an answer has. Members are in alphabetical
// order in both, and members that are stored and not known are kept.
//
// A status that is absent in the store, or not one of the noun's words, opens
// nothing: it is shown as revoked, a developer's as inactive. A stored member
// that is not of the right type is shown as if it was absent.
//
// Text is escaped so that an answer can stand in an HTML page. The methods are
// safe for concurrent use; the caller owns what they return.
type Edition uint8

const (
	// X is Apigee X and hybrid: 64-bit integers are strings, and what is empty
	// is left out.
	X Edition = iota
	// Edge is classic Apigee: integers are numbers, what is empty is there, and
	// a list that is not expanded is bare.
	Edge
)

// Developer is a developer with what is known from elsewhere.
type Developer struct {
	catalog.Developer
	// LastModifiedAt in milliseconds since the Unix epoch; 0 for the one among
	// the details.
	LastModifiedAt int64
	Organization   authz.Organization
	// Apps are the names of the developer's apps.
	Apps []string
}

// App is a developer app with what is known from elsewhere.
type App struct {
	catalog.App // its own Credentials are not shown
	// LastModifiedAt in milliseconds since the Unix epoch; 0 for the one among
	// the details.
	LastModifiedAt int64
	// Email of the developer; only an OrganizationApp shows it.
	Email string
	// Credentials in their order.
	Credentials []Credential
}

// Credential is a credential, with the consumer key and the secret if they are
// to be shown. A key that is not is shown as "sha256:" and its id.
type Credential struct {
	catalog.Credential
	ConsumerKey, ConsumerSecret string
}

// Product is an API product with what is known from elsewhere.
type Product struct {
	catalog.Product
	// LastModifiedAt in milliseconds since the Unix epoch; 0 for the one among
	// the details.
	LastModifiedAt int64
}

// Organization is what there is to say about an organization.
type Organization struct {
	Name         authz.Organization
	Environments []string
	// CreatedAt and LastModifiedAt in milliseconds since the Unix epoch; 0 if
	// they are not known.
	CreatedAt, LastModifiedAt int64
}

// Page is what a paged list says besides its elements.
type Page struct {
	// NextToken of the next page; empty on the last.
	NextToken string
	// Total of all elements; 0 if it is not known.
	Total int
}

// Developer renders a developer.
func (e Edition) Developer(d Developer) []byte {
	status := authz.StatusInactive
	if d.Status == authz.StatusActive {
		status = d.Status
	}
	v := values{
		memberApps:                 d.Apps,
		catalog.MemberDeveloperID:  string(d.ID),
		catalog.MemberEmail:        d.Email,
		catalog.MemberOrganization: string(d.Organization),
		catalog.MemberStatus:       status.String(),
	}
	return e.render(developerNoun, d.Details, v.modified(d.LastModifiedAt))
}

// App renders an app as its developer's. It never has products of its own:
// clients put back what they have read, and each product there would make a
// key.
func (e Edition) App(a App) []byte { return e.render(appNoun, a.Details, e.app(a)) }

// OrganizationApp renders an app as one of all of the organization's.
func (e Edition) OrganizationApp(a App) []byte {
	v := e.app(a)
	switch e {
	case X:
		v[memberAppFamily] = nil
		v[memberDeveloperEmail] = a.Email
	case Edge:
		v[catalog.MemberProducts] = json.RawMessage("[]")
	}
	return e.render(appNoun, a.Details, v)
}

func (e Edition) app(a App) values {
	v := values{
		catalog.MemberAppID:       string(a.ID),
		catalog.MemberDeveloperID: string(a.Developer),
		catalog.MemberName:        a.Name,
		catalog.MemberStatus:      flag(a.Status),
		catalog.MemberCredentials: rendered(a.Credentials, e.Credential),
	}
	return v.modified(a.LastModifiedAt)
}

// Credential renders a credential.
func (e Edition) Credential(c Credential) []byte {
	return e.render(credentialNoun, c.Details, e.credential(c))
}

// NewCredential renders a credential as the answer to the call that made it
// with a key of the client's own choice: Edge leaves the expiry out.
func (e Edition) NewCredential(c Credential) []byte {
	v := e.credential(c)
	if e == Edge {
		v[catalog.MemberExpiresAt] = nil
	}
	return e.render(credentialNoun, c.Details, v)
}

func (e Edition) credential(c Credential) values {
	key := c.ConsumerKey
	if key == "" {
		key = "sha256:" + c.Key.String()
	}
	return values{
		catalog.MemberKey:       key,
		catalog.MemberSecret:    c.ConsumerSecret,
		catalog.MemberStatus:    flag(c.Status),
		catalog.MemberExpiresAt: c.ExpiresAt,
		catalog.MemberProducts: rendered(c.Products, func(p catalog.ProductRef) []byte {
			return e.render(refNoun, p.Details, values{
				catalog.MemberProduct: string(p.Name),
				catalog.MemberStatus:  flag(p.Status),
			})
		}),
	}
}

// Product renders an API product.
func (e Edition) Product(p Product) []byte {
	approval := catalog.ApprovalAuto
	if p.Manual() {
		approval = catalog.ApprovalManual
	}
	v := values{catalog.MemberName: string(p.Name), catalog.MemberApprovalType: approval}
	return e.render(productNoun, p.Details, v.modified(p.LastModifiedAt))
}

// Organization renders an organization. Its properties say that lists come in
// pages, which clients ask before they list.
func (e Edition) Organization(o Organization) []byte {
	v := values{
		catalog.MemberName:         string(o.Name),
		catalog.MemberDisplayName:  string(o.Name),
		catalog.MemberEnvironments: append([]string{}, o.Environments...),
		"properties": json.RawMessage(`{"property":[` +
			`{"name":"features.hybrid.enabled","value":"true"},` +
			`{"name":"features.isCpsEnabled","value":"true"}]}`),
		"type": [...]string{X: "TYPE_PAID", Edge: "paid"}[e],
	}
	if o.CreatedAt != 0 {
		v[catalog.MemberCreatedAt] = o.CreatedAt
	}
	return e.render(nil, nil, v.modified(o.LastModifiedAt))
}

// Attribute renders an attribute as a resource of its own.
func (e Edition) Attribute(a catalog.Attribute) []byte {
	return e.render(attributeNoun, nil, values{catalog.MemberName: a.Name, catalog.MemberValue: a.Value})
}

// Attributes renders the attributes of a noun as a resource of their own.
func (e Edition) Attributes(list []catalog.Attribute) []byte {
	return e.list(memberAttribute, rendered(list, e.Attribute), Page{})
}

// Developers renders a list of developers: whole when it is expanded, else
// their e-mail addresses.
func (e Edition) Developers(list []Developer, expand bool) []byte {
	return listOf(e, "developer", list, expand, e.Developer, func(d Developer) values {
		return values{catalog.MemberEmail: d.Email}
	}, catalog.MemberEmail, Page{})
}

// DeveloperApps renders a list of apps of one developer: whole when it is
// expanded, else their names; X adds their ids.
func (e Edition) DeveloperApps(list []App, expand bool) []byte {
	return listOf(e, "app", list, expand, e.App, func(a App) values {
		return values{catalog.MemberAppID: string(a.ID), catalog.MemberName: a.Name}
	}, catalog.MemberName, Page{})
}

// OrganizationApps renders a list of apps of the organization: whole when it is
// expanded, else their ids. A bare list, which is Edge's, has no room for the
// page.
func (e Edition) OrganizationApps(list []App, expand bool, page Page) []byte {
	return listOf(e, "app", list, expand, e.OrganizationApp, func(a App) values {
		return values{catalog.MemberAppID: string(a.ID)}
	}, catalog.MemberAppID, page)
}

// Products renders a list of API products: whole when it is expanded, else
// their names.
func (e Edition) Products(list []Product, expand bool) []byte {
	return listOf(e, "apiProduct", list, expand, e.Product, func(p Product) values {
		return values{catalog.MemberName: string(p.Name)}
	}, catalog.MemberName, Page{})
}

// listOf renders a list of nouns: whole, or in short, of which Edge takes the
// member bare.
func listOf[T any](e Edition, wrapper string, list []T, expand bool, whole func(T) []byte, short func(T) values, bare string, page Page) []byte {
	switch {
	case expand:
		return e.list(wrapper, rendered(list, whole), page)
	case e == Edge:
		return rendered(list, func(t T) []byte { return encode(short(t)[bare], e) })
	}
	return e.list(wrapper, rendered(list, func(t T) []byte { return e.render(nil, nil, short(t)) }), page)
}

// list renders an object with a list, which is there even when it is empty.
func (e Edition) list(wrapper string, elements json.RawMessage, page Page) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "{%q:%s", wrapper, elements)
	if page.NextToken != "" {
		fmt.Fprintf(&b, ",%q:%s", memberNextPage, encode(page.NextToken, e))
	}
	if page.Total != 0 {
		fmt.Fprintf(&b, `,"totalSize":%d`, page.Total)
	}
	b.WriteByte('}')
	return b.Bytes()
}

// rendered returns the JSON list of what render makes of each element.
func rendered[T any](list []T, render func(T) []byte) json.RawMessage {
	b := []byte{'['}
	for i, element := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, render(element)...)
	}
	return append(b, ']')
}

// flag is the word of the status of an app, a credential or a product on one.
func flag(s authz.Status) string {
	if s == authz.StatusApproved || s == authz.StatusPending {
		return s.String()
	}
	return authz.StatusRevoked.String()
}

// modified adds the time of the last change, if it is known.
func (v values) modified(ms int64) values {
	if ms != 0 {
		v[catalog.MemberLastModifiedAt] = ms
	}
	return v
}

// render writes the object of a noun: what is stored, and over it what is
// derived. A derived nil leaves a member out.
func (e Edition) render(n noun, stored jsonobject.Object, derived values) []byte {
	v := values{}
	for _, s := range stored {
		switch m := n.find(s.Name); {
		case m == nil && !hidden(s.Name):
			v[s.Name] = s.Value
		case m != nil && !m.is(unshown):
			if value, err := m.decode(s.Value); err == nil && value != nil {
				v[s.Name] = value
			}
		}
	}
	maps.Copy(v, derived)
	for _, m := range n {
		value := v[m.name]
		switch {
		case e == X && m.is(edgeOnly):
			delete(v, m.name)
		case !empty(value):
		case m.fallback != "" && !has(derived, m.name):
			v[m.name] = m.fallback
		case e == Edge && m.is(whenEmpty) && !has(derived, m.name):
			v[m.name] = m.shape.zero()
		}
	}
	b := bytes.NewBufferString("{")
	for _, name := range slices.Sorted(maps.Keys(v)) {
		value := v[name]
		if value == nil || e == X && empty(value) {
			continue
		}
		if b.Len() > 1 {
			b.WriteByte(',')
		}
		b.Write(encode(name, e))
		b.WriteByte(':')
		b.Write(encode(value, e))
	}
	b.WriteByte('}')
	return b.Bytes()
}

func has(v values, name string) bool {
	_, ok := v[name]
	return ok
}

// zero is the value with which Edge shows that there is none.
func (s shape) zero() any {
	switch s {
	case texts, names:
		return []string{}
	case attributes:
		return []catalog.Attribute{}
	}
	return ""
}

// encode writes a value of a shape as JSON that can stand in HTML.
func encode(value any, e Edition) []byte {
	switch v := value.(type) {
	case int64:
		if e == X {
			return strconv.AppendQuote(nil, strconv.FormatInt(v, 10))
		}
		return strconv.AppendInt(nil, v, 10)
	case []catalog.Attribute:
		return rendered(v, e.Attribute)
	case []string:
		return rendered(v, func(s string) []byte { return encode(s, e) })
	case json.RawMessage:
		var compact, escaped bytes.Buffer
		if err := json.Compact(&compact, v); err != nil { // a jsonobject holds JSON
			panic("apigee: " + err.Error())
		}
		json.HTMLEscape(&escaped, compact.Bytes())
		return escaped.Bytes()
	}
	return marshal(value)
}

// marshal writes a value that has a JSON form.
func marshal(value any) []byte {
	b, err := json.Marshal(value)
	if err != nil {
		panic("apigee: " + err.Error())
	}
	return b
}
