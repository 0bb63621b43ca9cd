package client

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"keygate/authz"
)

// Attribute is a custom attribute.
type Attribute struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// ProductRef is a product on a credential, and its status there.
type ProductRef struct {
	Product string `json:"apiproduct"`
	Status  string `json:"status"`
}

// Developer as the API renders it.
type Developer struct {
	ID             string      `json:"developerId,omitempty"`
	Email          string      `json:"email"`
	FirstName      string      `json:"firstName"`
	LastName       string      `json:"lastName"`
	UserName       string      `json:"userName"`
	Status         string      `json:"status,omitempty"`
	Attributes     []Attribute `json:"attributes,omitempty"`
	Apps           []string    `json:"apps,omitempty"`
	CreatedAt      Millis      `json:"createdAt,omitempty"`
	LastModifiedAt Millis      `json:"lastModifiedAt,omitempty"`
	// Raw is the whole object as it was answered.
	Raw json.RawMessage `json:"-"`
}

// App is a developer app.
type App struct {
	ID             string       `json:"appId"`
	Name           string       `json:"name"`
	DeveloperID    string       `json:"developerId"`
	DeveloperEmail string       `json:"developerEmail"` // of lists of all apps
	Status         string       `json:"status"`
	CallbackURL    string       `json:"callbackUrl"`
	Attributes     []Attribute  `json:"attributes"`
	Scopes         []string     `json:"scopes"`
	Credentials    []Credential `json:"credentials"`
	CreatedAt      Millis       `json:"createdAt"`
	LastModifiedAt Millis       `json:"lastModifiedAt"`
	// ETag of what one app was read as, for Change.IfMatch.
	ETag string `json:"-"`
	// Raw is the whole object as it was answered.
	Raw json.RawMessage `json:"-"`
}

// Credential is the record behind a consumer key.
type Credential struct {
	// ConsumerKey is the key itself only where the server reveals it, else
	// "sha256:" and its id.
	ConsumerKey    string       `json:"consumerKey"`
	ConsumerSecret string       `json:"consumerSecret"`
	Status         string       `json:"status"`
	IssuedAt       Millis       `json:"issuedAt"`
	ExpiresAt      Millis       `json:"expiresAt"`
	Products       []ProductRef `json:"apiProducts"`
	Attributes     []Attribute  `json:"attributes"`
	Scopes         []string     `json:"scopes"`
	// Raw is the whole object as it was answered.
	Raw json.RawMessage `json:"-"`
}

// Product is an API product.
type Product struct {
	Name           string      `json:"name"`
	DisplayName    string      `json:"displayName"`
	Description    string      `json:"description,omitempty"`
	ApprovalType   string      `json:"approvalType,omitempty"`
	Resources      []string    `json:"apiResources,omitempty"`
	Proxies        []string    `json:"proxies,omitempty"`
	Environments   []string    `json:"environments,omitempty"`
	Scopes         []string    `json:"scopes,omitempty"`
	Attributes     []Attribute `json:"attributes,omitempty"`
	CreatedAt      Millis      `json:"createdAt,omitempty"`
	LastModifiedAt Millis      `json:"lastModifiedAt,omitempty"`
	// Raw is the whole object as it was answered.
	Raw json.RawMessage `json:"-"`
}

// AppSpec is what an app is created from.
type AppSpec struct {
	Name        string      `json:"name,omitempty"`
	Products    []string    `json:"apiProducts,omitempty"`
	CallbackURL string      `json:"callbackUrl,omitempty"`
	Scopes      []string    `json:"scopes,omitempty"`
	Attributes  []Attribute `json:"attributes,omitempty"`
	// KeyExpiresIn of the key that the app is given; 0 is never.
	KeyExpiresIn time.Duration `json:"-"`
}

// MarshalJSON implements json.Marshaler.
func (a AppSpec) MarshalJSON() ([]byte, error) {
	type plain AppSpec
	ms := ""
	if a.KeyExpiresIn > 0 {
		ms = strconv.FormatInt(a.KeyExpiresIn.Milliseconds(), 10)
	}
	return json.Marshal(struct {
		plain
		KeyExpiresIn string `json:"keyExpiresIn,omitempty"`
	}{plain(a), ms})
}

// KeySpec is what a key of one's own is created from. Neither Key nor Secret
// may be empty.
type KeySpec struct {
	Key, Secret Secret
	// ExpiresIn is rounded to seconds; 0 is never.
	ExpiresIn time.Duration
}

// MarshalJSON implements json.Marshaler. It reveals the key and the secret.
func (k KeySpec) MarshalJSON() ([]byte, error) {
	seconds := ""
	if k.ExpiresIn > 0 {
		seconds = strconv.FormatInt(int64(k.ExpiresIn.Round(time.Second)/time.Second), 10)
	}
	return json.Marshal(struct {
		Key       string `json:"consumerKey"`
		Secret    string `json:"consumerSecret"`
		ExpiresIn string `json:"expiresInSeconds,omitempty"`
	}{k.Key.Reveal(), k.Secret.Reveal(), seconds})
}

// UnmarshalJSON implements json.Unmarshaler.
func (d *Developer) UnmarshalJSON(b []byte) error {
	type plain Developer
	d.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(d))
}

// UnmarshalJSON implements json.Unmarshaler.
func (a *App) UnmarshalJSON(b []byte) error {
	type plain App
	a.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(a))
}

// UnmarshalJSON implements json.Unmarshaler.
func (c *Credential) UnmarshalJSON(b []byte) error {
	type plain Credential
	c.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(c))
}

// UnmarshalJSON implements json.Unmarshaler.
func (p *Product) UnmarshalJSON(b []byte) error {
	type plain Product
	p.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(p))
}

// pageSize of lists.
const pageSize = 500

// byStartKey reads pages that begin with the element that the last one ended
// with. name is the startKey of an element.
func byStartKey[T any](ctx context.Context, c *Client, at string, member string, name func(T) string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		last := ""
		for {
			q := url.Values{"expand": {"true"}, "count": {strconv.Itoa(pageSize)}}
			if last != "" {
				q.Set("startKey", last)
			}
			var page map[string]json.RawMessage
			if _, err := c.do(ctx, request{method: http.MethodGet, path: at, query: q}, &page); err != nil {
				yield(zero, err)
				return
			}
			var all []T
			if raw, ok := page[member]; ok {
				if err := json.Unmarshal(raw, &all); err != nil {
					yield(zero, fmt.Errorf("read the list of %s: %w", member, err))
					return
				}
			}
			for i, v := range all {
				if i == 0 && last != "" && name(v) == last {
					continue
				}
				if !yield(v, nil) {
					return
				}
			}
			if len(all) < pageSize || name(all[len(all)-1]) == last {
				return
			}
			last = name(all[len(all)-1])
		}
	}
}

// byPageToken reads pages with a token for the next.
func byPageToken[T any](ctx context.Context, c *Client, at, member string, q url.Values) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		query := url.Values{"pageSize": {strconv.Itoa(pageSize)}}
		for name, values := range q {
			query[name] = values
		}
		for {
			var page map[string]json.RawMessage
			if _, err := c.do(ctx, request{method: http.MethodGet, path: at, query: query}, &page); err != nil {
				yield(zero, err)
				return
			}
			var all []T
			next := ""
			for name, into := range map[string]any{member: &all, "nextPageToken": &next} {
				if raw, ok := page[name]; ok {
					if err := json.Unmarshal(raw, into); err != nil {
						yield(zero, fmt.Errorf("read the list of %s: %w", member, err))
						return
					}
				}
			}
			for _, v := range all {
				if !yield(v, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			query.Set("pageToken", next)
		}
	}
}

// get reads one object.
func get[T any](ctx context.Context, c *Client, at string) (v T, err error) {
	_, err = c.do(ctx, request{method: http.MethodGet, path: at}, &v)
	return v, err
}

// change makes a change that answers an object. On a dry run the object is zero.
func change[T any](ctx context.Context, c *Client, method, at string, body any, ch Change) (v T, done Done, err error) {
	var out any = &v
	if ch.DryRun {
		out = &done
	}
	header, err := c.do(ctx, request{method: method, path: at, body: body, change: &ch}, out)
	if err == nil && done.Revision == 0 {
		done.Revision = revision(header)
	}
	return v, done, err
}

// Developers lists all, by e-mail address.
func (c *Client) Developers(ctx context.Context) iter.Seq2[Developer, error] {
	return byStartKey(ctx, c, "/developers", "developer", func(d Developer) string {
		if d.Email == "" {
			return d.ID
		}
		return d.Email
	})
}

// Developer by e-mail address or id.
func (c *Client) Developer(ctx context.Context, developer string) (Developer, error) {
	return get[Developer](ctx, c, path("developers", developer))
}

// CreateDeveloper creates one. body is a Developer, or anything that marshals
// like one.
func (c *Client) CreateDeveloper(ctx context.Context, body any, ch Change) (Developer, Done, error) {
	return change[Developer](ctx, c, http.MethodPost, "/developers", body, ch)
}

// DeleteDeveloper deletes one, with apps and keys.
func (c *Client) DeleteDeveloper(ctx context.Context, developer string, ch Change) (Developer, Done, error) {
	return change[Developer](ctx, c, http.MethodDelete, path("developers", developer), nil, ch)
}

// Apps lists the apps of all developers, with their credentials.
func (c *Client) Apps(ctx context.Context) iter.Seq2[App, error] {
	return byPageToken[App](ctx, c, "/apps", "app", url.Values{"expand": {"true"}, "includeCred": {"true"}})
}

// DeveloperApps lists the apps of one developer, with their credentials.
func (c *Client) DeveloperApps(ctx context.Context, developer string) iter.Seq2[App, error] {
	return byStartKey(ctx, c, path("developers", developer, "apps"), "app", func(a App) string { return a.Name })
}

// App by its id.
func (c *Client) App(ctx context.Context, id string) (App, error) {
	return get[App](ctx, c, path("apps", id))
}

// DeveloperApp by its name.
func (c *Client) DeveloperApp(ctx context.Context, developer, name string) (a App, err error) {
	header, err := c.do(ctx, request{method: http.MethodGet, path: path("developers", developer, "apps", name)}, &a)
	if err == nil {
		a.ETag = header.Get("ETag")
	}
	return a, err
}

// CreateApp creates one, with one key, which is in the answer. body is an
// AppSpec, or anything that marshals like one.
func (c *Client) CreateApp(ctx context.Context, developer string, body any, ch Change) (App, Done, error) {
	return change[App](ctx, c, http.MethodPost, path("developers", developer, "apps"), body, ch)
}

// AddKey gives an app one more key that the server makes; the app in the answer
// has it first. body is an AppSpec without a name, or anything that marshals like
// one: attributes and callback that it leaves out are removed from the app.
func (c *Client) AddKey(ctx context.Context, developer, app string, body any, ch Change) (App, Done, error) {
	return change[App](ctx, c, http.MethodPost, path("developers", developer, "apps", app), body, ch)
}

// DeleteApp deletes one, with its keys.
func (c *Client) DeleteApp(ctx context.Context, developer, name string, ch Change) (App, Done, error) {
	return change[App](ctx, c, http.MethodDelete, path("developers", developer, "apps", name), nil, ch)
}

// keyName is how a key is called in a URL.
func keyName(id authz.KeyID) string { return "sha256:" + id.String() }

// Key of an app.
func (c *Client) Key(ctx context.Context, developer, app string, id authz.KeyID) (Credential, error) {
	return get[Credential](ctx, c, path("developers", developer, "apps", app, "keys", keyName(id)))
}

// CreateKey gives an app a key of one's own. It has no products yet.
func (c *Client) CreateKey(ctx context.Context, developer, app string, k KeySpec, ch Change) (Credential, Done, error) {
	return change[Credential](ctx, c, http.MethodPost, path("developers", developer, "apps", app, "keys"), k, ch)
}

// AddProducts adds products to a key, and replaces its attributes by attributes.
func (c *Client) AddProducts(ctx context.Context, developer, app string, id authz.KeyID, products []string, attributes []Attribute, ch Change) (Credential, Done, error) {
	body := struct {
		Products   []string    `json:"apiProducts,omitempty"`
		Attributes []Attribute `json:"attributes,omitempty"`
	}{products, attributes}
	return change[Credential](ctx, c, http.MethodPost, path("developers", developer, "apps", app, "keys", keyName(id)), body, ch)
}

// DeleteKey deletes a key of an app.
func (c *Client) DeleteKey(ctx context.Context, developer, app string, id authz.KeyID, ch Change) (Credential, Done, error) {
	return change[Credential](ctx, c, http.MethodDelete, path("developers", developer, "apps", app, "keys", keyName(id)), nil, ch)
}

// Products lists all, by name.
func (c *Client) Products(ctx context.Context) iter.Seq2[Product, error] {
	return byStartKey(ctx, c, "/apiproducts", "apiProduct", func(p Product) string { return p.Name })
}

// Product by its name.
func (c *Client) Product(ctx context.Context, name string) (Product, error) {
	return get[Product](ctx, c, path("apiproducts", name))
}

// CreateProduct creates one. body is a Product, or anything that marshals like
// one.
func (c *Client) CreateProduct(ctx context.Context, body any, ch Change) (Product, Done, error) {
	return change[Product](ctx, c, http.MethodPost, "/apiproducts", body, ch)
}

// DeleteProduct deletes one.
func (c *Client) DeleteProduct(ctx context.Context, name string, ch Change) (Product, Done, error) {
	return change[Product](ctx, c, http.MethodDelete, path("apiproducts", name), nil, ch)
}
