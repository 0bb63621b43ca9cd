// Package google_test drives a keygate that runs as a process of its own with
// Google's generated client of the Apigee API, as it is published: only its
// endpoint is changed.
package google_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	apigee "google.golang.org/api/apigee/v1"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/option"
)

// Names for what the client calls things.
type (
	attribute  = apigee.GoogleCloudApigeeV1Attribute
	attributes = apigee.GoogleCloudApigeeV1Attributes
	credential = apigee.GoogleCloudApigeeV1Credential
	developer  = apigee.GoogleCloudApigeeV1Developer
	app        = apigee.GoogleCloudApigeeV1DeveloperApp
	key        = apigee.GoogleCloudApigeeV1DeveloperAppKey
	product    = apigee.GoogleCloudApigeeV1ApiProduct
	ref        = apigee.GoogleCloudApigeeV1ApiProductRef
)

const (
	ann     = org + "/developers/ann@example.com"
	bob     = org + "/developers/bob+1@example.com"
	weather = ann + "/apps/AnotherTestApp"
)

// Every method of Google's client that there is for developers, their apps,
// keys and products, in the order in which a user meets them.
func TestClient(t *testing.T) {
	t.Parallel()
	k := start(t)
	svc, err := apigee.NewService(t.Context(), option.WithEndpoint(k.url), option.WithHTTPClient(k.client()))
	if err != nil {
		t.Fatal(err)
	}
	c := &client{svc.Organizations}
	// Each builds on those before it.
	for _, part := range []struct {
		name string
		run  func(*client, *testing.T)
	}{
		{"organization", (*client).organization},
		{"products", (*client).products},
		{"developers", (*client).developers},
		{"apps", (*client).apps},
		{"keys", (*client).keys},
		{"statuses", (*client).statuses},
		{"all apps", (*client).allApps},
		{"errors", (*client).errors},
		{"deletions", (*client).deletions},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(c, t) }) {
			t.FailNow()
		}
	}
	allDriven(t, k.requests.list())
}

type client struct{ *apigee.OrganizationsService }

// must is what a call answers, with the status that Apigee documents.
func must[T any](t *testing.T, status int) func(*T, error) *T {
	t.Helper()
	return func(v *T, err error) *T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		response := reflect.ValueOf(v).Elem().FieldByName("ServerResponse").Interface().(googleapi.ServerResponse)
		if response.HTTPStatusCode != status {
			t.Errorf("got status %d, want %d", response.HTTPStatusCode, status)
		}
		return v
	}
}

// same compares what a call answered, apart from what only transports it.
func same[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if g, w := show(reflect.ValueOf(got)), show(reflect.ValueOf(want)); g != w {
		t.Errorf("%s:\ngot  %s\nwant %s", what, g, w)
	}
}

// show prints a value with what its pointers point to.
func show(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() {
			return "none"
		}
		return show(v.Elem())
	case reflect.Slice:
		var all []string
		for i := range v.Len() {
			all = append(all, show(v.Index(i)))
		}
		return "[" + strings.Join(all, " ") + "]"
	case reflect.Struct:
		var all []string
		for i := range v.NumField() {
			f := v.Type().Field(i)
			if f.Name != "ServerResponse" && f.Name != "ForceSendFields" && f.Name != "NullFields" && !v.Field(i).IsZero() {
				all = append(all, f.Name+":"+show(v.Field(i)))
			}
		}
		return "{" + strings.Join(all, " ") + "}"
	case reflect.String:
		return fmt.Sprintf("%q", v)
	}
	return fmt.Sprint(v)
}

// recent fails the test unless ms is a time of the last minutes.
func recent(t *testing.T, what string, ms int64) {
	t.Helper()
	if ago := time.Since(time.UnixMilli(ms)); ago < -time.Minute || ago > 10*time.Minute {
		t.Errorf("%s: got %d, want now", what, ms)
	}
}

var (
	uuid      = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	generated = regexp.MustCompile(`^kg_[0-9A-Za-z]{32}_[0-9A-Za-z]{6}$`)
)

func (c *client) organization(t *testing.T) {
	got := must[apigee.GoogleCloudApigeeV1Organization](t, 200)(c.Get(org).Do())
	if got.Name != "acme" || got.DisplayName != "acme" || got.Properties == nil {
		t.Fatalf("got %s, want acme with its properties", show(reflect.ValueOf(got)))
	}
	properties := map[string]string{}
	for _, p := range got.Properties.Property {
		properties[p.Name] = p.Value
	}
	// Without one of these the Drupal portal reads lists without pages.
	if properties["features.isCpsEnabled"] != "true" || properties["features.hybrid.enabled"] != "true" {
		t.Errorf("got the properties %v, want features.isCpsEnabled and features.hybrid.enabled true", properties)
	}
}

func (c *client) products(t *testing.T) {
	created := func(p *product) *product {
		t.Helper()
		got := must[product](t, 201)(c.Apiproducts.Create(org, p).Do())
		recent(t, "createdAt of a product", got.CreatedAt)
		recent(t, "lastModifiedAt of a product", got.LastModifiedAt)
		want := *p
		want.CreatedAt, want.LastModifiedAt = got.CreatedAt, got.LastModifiedAt
		same(t, "a product", got, &want)
		same(t, "a product, read", must[product](t, 200)(c.Apiproducts.Get(org+"/apiproducts/"+p.Name).Do()), got)
		return got
	}
	w := created(&product{
		Name: "Weather-Product", DisplayName: "Weather", Description: "rain <and> shine", ApprovalType: "auto",
		ApiResources: []string{"/", "/weather/**"}, Proxies: []string{"weather"}, Environments: []string{"test", "prod"},
		Scopes: []string{"READ", "WRITE"}, Attributes: []*attribute{{Name: "access", Value: "public"}, {Name: "colour", Value: "blau"}},
		Quota: "10", QuotaInterval: "1", QuotaTimeUnit: "minute", QuotaCounterScope: "PROXY",
	})
	created(&product{Name: "Orders Product", DisplayName: "Orders", ApprovalType: "manual"})
	odd := created(&product{
		Name: "100% of #7 $._-", DisplayName: "odd", ApprovalType: "auto",
		OperationGroup: &apigee.GoogleCloudApigeeV1OperationGroup{
			OperationConfigType: "proxy",
			OperationConfigs: []*apigee.GoogleCloudApigeeV1OperationConfig{{
				ApiSource:  "weather",
				Operations: []*apigee.GoogleCloudApigeeV1Operation{{Resource: "/weather", Methods: []string{"GET"}}},
				Quota:      &apigee.GoogleCloudApigeeV1Quota{Limit: "5", Interval: "2", TimeUnit: "hour"},
			}},
		},
	})

	update := *odd
	update.DisplayName, update.Description, update.OperationGroup = "odder", "updated", nil
	got := must[product](t, 200)(c.Apiproducts.Update(org+"/apiproducts/"+odd.Name, &update).Do())
	if got.LastModifiedAt < odd.LastModifiedAt {
		t.Errorf("lastModifiedAt after an update: got %d, want at least %d", got.LastModifiedAt, odd.LastModifiedAt)
	}
	update.LastModifiedAt = got.LastModifiedAt
	same(t, "an updated product", got, &update)

	list := c.Apiproducts.List(org)
	names := func(list *apigee.OrganizationsApiproductsListCall) (all []string) {
		t.Helper()
		for _, p := range must[apigee.GoogleCloudApigeeV1ListApiProductsResponse](t, 200)(list.Do()).ApiProduct {
			all = append(all, p.Name)
		}
		return all
	}
	short := must[apigee.GoogleCloudApigeeV1ListApiProductsResponse](t, 200)(list.Do()).ApiProduct
	same(t, "products", short, []*product{{Name: "100% of #7 $._-"}, {Name: "Orders Product"}, {Name: "Weather-Product"}})
	long := must[apigee.GoogleCloudApigeeV1ListApiProductsResponse](t, 200)(c.Apiproducts.List(org).Expand(true).Do()).ApiProduct
	if len(long) != 3 {
		t.Fatalf("got %d products, want 3", len(long))
	}
	same(t, "the last of the expanded products", long[2], w)
	same(t, "a page of products", names(c.Apiproducts.List(org).Count(2)), []string{"100% of #7 $._-", "Orders Product"})
	same(t, "the page that begins with its start key", names(c.Apiproducts.List(org).Count(2).StartKey("Orders Product")), []string{"Orders Product", "Weather-Product"})
	same(t, "products by an attribute", names(c.Apiproducts.List(org).Attributename("colour").Attributevalue("blau")), []string{"Weather-Product"})

	of := org + "/apiproducts/Weather-Product"
	c.attributes(t, attributeCalls{
		replace: func(a *attributes) (*attributes, error) { return c.Apiproducts.Attributes(of, a).Do() },
		list:    func() (*attributes, error) { return c.Apiproducts.Attributes_.List(of).Do() },
		get:     func(name string) (*attribute, error) { return c.Apiproducts.Attributes_.Get(of + name).Do() },
		set: func(name string, a *attribute) (*attribute, error) {
			return c.Apiproducts.Attributes_.UpdateApiProductAttribute(of+name, a).Do()
		},
		delete: func(name string) (*attribute, error) { return c.Apiproducts.Attributes_.Delete(of + name).Do() },
	})
	same(t, "the product's attributes", must[product](t, 200)(c.Apiproducts.Get(of).Do()).Attributes, lastAttributes)

	deleted := must[product](t, 200)(c.Apiproducts.Delete(org + "/apiproducts/" + odd.Name).Do())
	same(t, "a deleted product", deleted.Description, "updated")
	same(t, "products left", names(c.Apiproducts.List(org)), []string{"Orders Product", "Weather-Product"})
}

// attributeCalls are the five methods that developers, apps and products have
// alike. name begins with /attributes/.
type attributeCalls struct {
	replace func(*attributes) (*attributes, error)
	list    func() (*attributes, error)
	get     func(name string) (*attribute, error)
	set     func(name string, a *attribute) (*attribute, error)
	delete  func(name string) (*attribute, error)
}

// lastAttributes are what attributes leaves behind.
var lastAttributes = []*attribute{{Name: "tier", Value: "gold"}, {Name: "new one", Value: "1"}}

func (c *client) attributes(t *testing.T, calls attributeCalls) {
	t.Helper()
	three := []*attribute{{Name: "tier", Value: "silver"}, {Name: "empty"}, {Name: "Größe", Value: "\"<&>\n"}}
	replaced := must[attributes](t, 200)(calls.replace(&attributes{Attribute: three}))
	same(t, "replaced attributes", replaced.Attribute, three)
	same(t, "listed attributes", must[attributes](t, 200)(calls.list()).Attribute, three)
	same(t, "an attribute", must[attribute](t, 200)(calls.get("/attributes/Größe")), three[2])
	gold := &attribute{Name: "tier", Value: "gold"}
	same(t, "a set attribute", must[attribute](t, 200)(calls.set("/attributes/tier", gold)), gold)
	one := &attribute{Name: "new one", Value: "1"}
	same(t, "a new attribute", must[attribute](t, 200)(calls.set("/attributes/new one", one)), one)
	same(t, "a deleted attribute", must[attribute](t, 200)(calls.delete("/attributes/Größe")), three[2])
	must[attribute](t, 200)(calls.delete("/attributes/empty"))
	same(t, "attributes left", must[attributes](t, 200)(calls.list()).Attribute, lastAttributes)
	refused(t, 404, "organizations.keymanagement.AttributeDoesntExist", "", second(calls.get("/attributes/empty")))
}

func second[T any](_ T, err error) error { return err }

func (c *client) developers(t *testing.T) {
	a := must[developer](t, 201)(c.Developers.Create(org, &developer{
		Email: "ann@example.com", FirstName: "Ann", LastName: "Lee", UserName: "ann",
		Attributes: []*attribute{{Name: "team", Value: "red"}},
		// These are not the client's to say.
		Status: "inactive", DeveloperId: "mine", CreatedAt: 1,
	}).Do())
	recent(t, "createdAt of a developer", a.CreatedAt)
	recent(t, "lastModifiedAt of a developer", a.LastModifiedAt)
	if a.DeveloperId == "" || a.DeveloperId == "mine" {
		t.Errorf("developerId: got %q, want one that keygate made", a.DeveloperId)
	}
	same(t, "a developer", a, &developer{
		Email: "ann@example.com", FirstName: "Ann", LastName: "Lee", UserName: "ann", Status: "active", OrganizationName: "acme",
		Attributes: []*attribute{{Name: "team", Value: "red"}}, DeveloperId: a.DeveloperId, CreatedAt: a.CreatedAt, LastModifiedAt: a.LastModifiedAt,
	})
	same(t, "a developer by e-mail", must[developer](t, 200)(c.Developers.Get(ann).Do()), a)
	same(t, "a developer by id", must[developer](t, 200)(c.Developers.Get(org+"/developers/"+a.DeveloperId).Do()), a)
	b := must[developer](t, 201)(c.Developers.Create(org, &developer{Email: "bob+1@example.com", FirstName: "Bob", LastName: "Ng", UserName: "bob"}).Do())
	must[developer](t, 201)(c.Developers.Create(org, &developer{Email: "cyd@example.com", FirstName: "Cyd", LastName: "Oe", UserName: "cyd"}).Do())

	// All details are replaced: what is left out goes.
	got := must[developer](t, 200)(c.Developers.Update(bob, &developer{Email: "bob+1@example.com", FirstName: "Robert", LastName: "Ng", UserName: "bob"}).Do())
	b.FirstName, b.LastModifiedAt = "Robert", got.LastModifiedAt
	same(t, "an updated developer", got, b)

	list := func(call *apigee.OrganizationsDevelopersListCall) []*developer {
		t.Helper()
		return must[apigee.GoogleCloudApigeeV1ListOfDevelopersResponse](t, 200)(call.Do()).Developer
	}
	// In an order of keygate's, which stays the same.
	short := list(c.Developers.List(org))
	emails := []string{}
	for _, d := range short {
		same(t, "a developer in short", d, &developer{Email: d.Email})
		emails = append(emails, d.Email)
	}
	same(t, "developers", slices.Sorted(slices.Values(emails)), []string{"ann@example.com", "bob+1@example.com", "cyd@example.com"})
	same(t, "a page of developers", list(c.Developers.List(org).Count(2)), short[:2])
	same(t, "the page that begins with its start key", list(c.Developers.List(org).Count(2).StartKey(emails[1])), short[1:])
	long := list(c.Developers.List(org).Expand(true).IncludeCompany(true))
	for i, d := range long {
		if d.Email == b.Email {
			same(t, "an expanded developer", d, b)
		}
		same(t, "the order of the expanded developers", d.Email, emails[i])
	}
	same(t, "developers by id", list(c.Developers.List(org).Ids(b.DeveloperId).Expand(true)), []*developer{b})

	c.attributes(t, attributeCalls{
		replace: func(a *attributes) (*attributes, error) { return c.Developers.Attributes(ann, a).Do() },
		list:    func() (*attributes, error) { return c.Developers.Attributes_.List(ann).Do() },
		get:     func(name string) (*attribute, error) { return c.Developers.Attributes_.Get(ann + name).Do() },
		set: func(name string, a *attribute) (*attribute, error) {
			return c.Developers.Attributes_.UpdateDeveloperAttribute(ann+name, a).Do()
		},
		delete: func(name string) (*attribute, error) { return c.Developers.Attributes_.Delete(ann + name).Do() },
	})
	same(t, "the developer's attributes", must[developer](t, 200)(c.Developers.Get(ann).Do()).Attributes, lastAttributes)
}

func (c *client) apps(t *testing.T) {
	own := []*attribute{{Name: "DisplayName", Value: "AnotherTestApp"}, {Name: "Notes", Value: "rain"}}
	first := must[app](t, 201)(c.Developers.Apps.Create(ann, &app{
		Name: "AnotherTestApp", ApiProducts: []string{"Weather-Product", "Orders Product"}, KeyExpiresIn: 86_400_000,
		Attributes: own, CallbackUrl: "https://example.com/back", Scopes: []string{"READ"}, Status: "revoked",
	}).Do())
	id := must[developer](t, 200)(c.Developers.Get(ann).Do()).DeveloperId
	if !uuid.MatchString(first.AppId) || len(first.Credentials) != 1 {
		t.Fatalf("got %s, want an app id and one credential", show(reflect.ValueOf(first)))
	}
	cred := first.Credentials[0]
	recent(t, "createdAt of an app", first.CreatedAt)
	recent(t, "lastModifiedAt of an app", first.LastModifiedAt)
	recent(t, "issuedAt of its key", cred.IssuedAt)
	if !generated.MatchString(cred.ConsumerKey) || len(cred.ConsumerSecret) < 16 {
		t.Errorf("got a consumer key of %d and a secret of %d characters, want generated ones", len(cred.ConsumerKey), len(cred.ConsumerSecret))
	}
	same(t, "an app", first, &app{
		AppId: first.AppId, DeveloperId: id, Name: "AnotherTestApp", Status: "approved", AppFamily: "default",
		Attributes: own, CallbackUrl: "https://example.com/back", Scopes: []string{"READ"}, CreatedAt: first.CreatedAt, LastModifiedAt: first.LastModifiedAt,
		Credentials: []*credential{{
			// A product that asks for approval waits for it, the key does not.
			ApiProducts: []*ref{{Apiproduct: "Weather-Product", Status: "approved"}, {Apiproduct: "Orders Product", Status: "pending"}},
			ConsumerKey: cred.ConsumerKey, ConsumerSecret: cred.ConsumerSecret, Status: "approved", Scopes: cred.Scopes,
			IssuedAt: cred.IssuedAt, ExpiresAt: cred.IssuedAt + 86_400_000,
		}},
	})
	same(t, "an app, read", must[app](t, 200)(c.Developers.Apps.Get(weather).Do()), first)
	same(t, "an app, by its developer's id", must[app](t, 200)(c.Developers.Apps.Get(org+"/developers/"+id+"/apps/AnotherTestApp").Do()), first)

	// Attributes and callback are replaced; without products no key is made, and
	// the name may be left out. What a change answers shows no key but a new one.
	hidden := *cred
	hidden.ConsumerKey, hidden.ConsumerSecret = fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(cred.ConsumerKey))), ""
	got := must[app](t, 200)(c.Developers.Apps.Update(weather, &app{Attributes: own[:1]}).Do())
	want := *first
	want.Attributes, want.CallbackUrl, want.LastModifiedAt = own[:1], "", got.LastModifiedAt
	want.Credentials = []*credential{&hidden}
	same(t, "an updated app", got, &want)
	// With products there is one more key; the Drupal portal takes the first.
	got = must[app](t, 200)(c.Developers.Apps.Update(weather, &app{Name: "AnotherTestApp", ApiProducts: []string{"Weather-Product"}, Attributes: own}).Do())
	if len(got.Credentials) != 2 {
		t.Fatalf("got %d credentials, want the new one and the old one", len(got.Credentials))
	}
	newest := got.Credentials[0]
	same(t, "the new credential", newest, &credential{
		ApiProducts: []*ref{{Apiproduct: "Weather-Product", Status: "approved"}}, ConsumerKey: newest.ConsumerKey, ConsumerSecret: newest.ConsumerSecret,
		Status: "approved", Scopes: newest.Scopes, IssuedAt: newest.IssuedAt, ExpiresAt: -1,
	})
	same(t, "the old credential", got.Credentials[1], &hidden)
	both := must[app](t, 200)(c.Developers.Apps.Get(weather).Do()).Credentials
	same(t, "both credentials, read", both, []*credential{newest, cred})
	// And by POST without an action.
	got = must[app](t, 200)(c.Developers.Apps.GenerateKeyPairOrUpdateDeveloperAppStatus(weather,
		&app{ApiProducts: []string{"Orders Product"}, KeyExpiresIn: -1, Attributes: own}).Do())
	if len(got.Credentials) != 3 || len(got.Credentials[0].ApiProducts) != 1 || show(reflect.ValueOf(got.Credentials[0].ApiProducts[0])) != show(reflect.ValueOf(ref{Apiproduct: "Orders Product", Status: "pending"})) {
		t.Fatalf("got %s, want a third key with the product that was asked for", show(reflect.ValueOf(got.Credentials)))
	}

	for _, name := range []string{"b-app", "c app"} {
		a := must[app](t, 201)(c.Developers.Apps.Create(ann, &app{Name: name}).Do())
		// An app without products has a key all the same.
		if len(a.Credentials) != 1 || len(a.Credentials[0].ApiProducts) != 0 {
			t.Errorf("%s: got %s, want one credential without products", name, show(reflect.ValueOf(a.Credentials)))
		}
	}
	list := func(call *apigee.OrganizationsDevelopersAppsListCall) []*app {
		t.Helper()
		return must[apigee.GoogleCloudApigeeV1ListDeveloperAppsResponse](t, 200)(call.Do()).App
	}
	names := func(list []*app) (all []string) {
		for _, a := range list {
			all = append(all, a.Name)
		}
		return all
	}
	short := list(c.Developers.Apps.List(ann))
	same(t, "apps", names(short), []string{"AnotherTestApp", "b-app", "c app"})
	same(t, "the first of them", short[0], &app{AppId: first.AppId, Name: "AnotherTestApp"})
	same(t, "a page of apps", names(list(c.Developers.Apps.List(ann).Count(2).StartKey("b-app"))), []string{"b-app", "c app"})
	long := list(c.Developers.Apps.List(ann).Expand(true))
	same(t, "expanded apps", names(long), []string{"AnotherTestApp", "b-app", "c app"})
	same(t, "the first of the expanded apps", long[0], must[app](t, 200)(c.Developers.Apps.Get(weather).Do()))
	same(t, "shallowly expanded apps", names(list(c.Developers.Apps.List(ann).ShallowExpand(true))), []string{"AnotherTestApp", "b-app", "c app"})
	same(t, "the developer's apps", must[developer](t, 200)(c.Developers.Get(ann).Do()).Apps, []string{"AnotherTestApp", "b-app", "c app"})
	whose := must[apigee.GoogleCloudApigeeV1ListOfDevelopersResponse](t, 200)(c.Developers.List(org).App("AnotherTestApp").Do()).Developer
	same(t, "developers by app", whose, []*developer{{Email: "ann@example.com"}})

	c.attributes(t, attributeCalls{
		replace: func(a *attributes) (*attributes, error) { return c.Developers.Apps.Attributes(weather, a).Do() },
		list:    func() (*attributes, error) { return c.Developers.Apps.Attributes_.List(weather).Do() },
		get:     func(name string) (*attribute, error) { return c.Developers.Apps.Attributes_.Get(weather + name).Do() },
		set: func(name string, a *attribute) (*attribute, error) {
			return c.Developers.Apps.Attributes_.UpdateDeveloperAppAttribute(weather+name, a).Do()
		},
		delete: func(name string) (*attribute, error) {
			return c.Developers.Apps.Attributes_.Delete(weather + name).Do()
		},
	})
	same(t, "the app's attributes", must[app](t, 200)(c.Developers.Apps.Get(weather).Do()).Attributes, lastAttributes)
}

// Keys of the client's own choice, and what is on them.
const (
	ownKey    = "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb"
	ownSecret = "SXg8JizqeTA8j3gX"
	otherKey  = "another_own-key-0123456789"
	ownPath   = weather + "/keys/" + ownKey
)

func (c *client) keys(t *testing.T) {
	keys := c.Developers.Apps.Keys
	got := must[key](t, 201)(keys.Create(weather, &key{ConsumerKey: ownKey, ConsumerSecret: ownSecret, ExpiresInSeconds: 3600, Status: "revoked"}).Do())
	recent(t, "issuedAt of a key", got.IssuedAt)
	want := &key{ConsumerKey: ownKey, ConsumerSecret: ownSecret, Status: "approved", IssuedAt: got.IssuedAt, ExpiresAt: got.IssuedAt + 3_600_000}
	same(t, "a key of one's own", got, want)
	same(t, "a key, read", must[key](t, 200)(keys.Get(ownPath).Do()), want)
	other := must[key](t, 201)(keys.Create_.Create(weather, &key{ConsumerKey: otherKey, ConsumerSecret: "s3cret"}).Do())
	same(t, "a key by keys/create", other, &key{ConsumerKey: otherKey, ConsumerSecret: "s3cret", Status: "approved", IssuedAt: other.IssuedAt, ExpiresAt: -1})

	onKey := func(name, status string) any { return map[string]any{"apiproduct": name, "status": status} }
	// Products are added, attributes replaced. A change does not answer the secret.
	want.ConsumerSecret = ""
	got = must[key](t, 200)(keys.UpdateDeveloperAppKey(ownPath, &key{ApiProducts: []any{"Weather-Product"}, Attributes: []*attribute{{Name: "a", Value: "1"}}}).Do())
	want.ApiProducts, want.Attributes = []any{onKey("Weather-Product", "approved")}, []*attribute{{Name: "a", Value: "1"}}
	want.Scopes = got.Scopes
	sameKey(t, "a key with a product", got, want)
	got = must[key](t, 200)(keys.UpdateDeveloperAppKey(ownPath, &key{ApiProducts: []any{map[string]any{"apiproduct": "Orders Product"}}, Attributes: []*attribute{{Name: "b", Value: "2"}}}).Do())
	want.ApiProducts = append(want.ApiProducts, onKey("Orders Product", "pending"))
	want.Attributes = []*attribute{{Name: "b", Value: "2"}}
	sameKey(t, "a key with two products", got, want)
	// Scopes are replaced, and have to be among those of the key's products.
	got = must[key](t, 200)(keys.ReplaceDeveloperAppKey(ownPath, &key{Scopes: []string{"READ"}}).Do())
	want.Scopes = []string{"READ"}
	sameKey(t, "a key with scopes", got, want)
	refused(t, 400, "keymanagement.service.InvalidScopes", "", second(keys.ReplaceDeveloperAppKey(ownPath, &key{Scopes: []string{"FLY"}}).Do()))

	got = must[key](t, 200)(keys.Apiproducts.Delete(ownPath + "/apiproducts/Orders Product").Do())
	want.ApiProducts = want.ApiProducts[:1]
	sameKey(t, "a key with one product less", got, want)
	same(t, "a deleted key", must[key](t, 200)(keys.Delete(weather+"/keys/"+otherKey).Do()).Status, "approved")
	refused(t, 404, "keymanagement.service.InvalidClientIdForGivenApp", "Invalid consumer key for Given App", second(keys.Get(weather+"/keys/"+otherKey).Do()))
}

// sameKey compares keys; what is on them comes as maps, which have no order.
func sameKey(t *testing.T, what string, got, want *key) {
	t.Helper()
	if !reflect.DeepEqual(got.ApiProducts, want.ApiProducts) {
		t.Errorf("%s: got the products %v, want %v", what, got.ApiProducts, want.ApiProducts)
	}
	g, w := *got, *want
	g.ApiProducts, w.ApiProducts = nil, nil
	same(t, what, &g, &w)
}

// The four calls of the page, and that each sets one flag and no other.
func (c *client) statuses(t *testing.T) {
	type flags struct{ product, key, app, developer string }
	read := func() (f flags) {
		t.Helper()
		k := must[key](t, 200)(c.Developers.Apps.Keys.Get(ownPath).Do())
		f.product, f.key = k.ApiProducts[0].(map[string]any)["status"].(string), k.Status
		f.app = must[app](t, 200)(c.Developers.Apps.Get(weather).Do()).Status
		f.developer = must[developer](t, 200)(c.Developers.Get(ann).Do()).Status
		return f
	}
	open := flags{"approved", "approved", "approved", "active"}
	same(t, "the flags at first", read(), open)
	const octets = "application/octet-stream"
	for _, one := range []struct {
		name string
		set  func(action string, header string) (int, error)
		no   string // the action that closes
		yes  string
		want flags
	}{
		{"product on key", func(action, contentType string) (int, error) {
			call := c.Developers.Apps.Keys.Apiproducts.UpdateDeveloperAppKeyApiProduct(ownPath + "/apiproducts/Weather-Product").Action(action)
			setContentType(call.Header(), contentType)
			got, err := call.Do()
			return status(got, err)
		}, "revoke", "approve", flags{"revoked", "approved", "approved", "active"}},
		{"key", func(action, contentType string) (int, error) {
			call := c.Developers.Apps.Keys.UpdateDeveloperAppKey(ownPath, &key{}).Action(action)
			setContentType(call.Header(), contentType)
			got, err := call.Do()
			return status(got, err)
		}, "revoke", "approve", flags{"approved", "revoked", "approved", "active"}},
		{"app", func(action, contentType string) (int, error) {
			call := c.Developers.Apps.GenerateKeyPairOrUpdateDeveloperAppStatus(weather, &app{}).Action(action)
			setContentType(call.Header(), contentType)
			got, err := call.Do()
			return status(got, err)
		}, "revoke", "approve", flags{"approved", "approved", "revoked", "active"}},
		{"developer", func(action, contentType string) (int, error) {
			call := c.Developers.SetDeveloperStatus(ann).Action(action)
			setContentType(call.Header(), contentType)
			got, err := call.Do()
			return status(got, err)
		}, "inactive", "active", flags{"approved", "approved", "approved", "inactive"}},
	} {
		// Twice each: what is so already is no error, and the content type that the
		// page asks for is as good as the client's own.
		for _, contentType := range []string{"", octets} {
			for _, to := range []struct {
				action string
				want   flags
			}{{one.no, one.want}, {one.no, one.want}, {one.yes, open}, {one.yes, open}} {
				got, err := one.set(to.action, contentType)
				if err != nil || got != http.StatusNoContent {
					t.Errorf("%s, %s: got %d, %v, want 204", one.name, to.action, got, err)
				}
				same(t, one.name+", "+to.action, read(), to.want)
			}
		}
		_, err := one.set("retract", "")
		refused(t, 400, "keygate.query", "", err)
		same(t, one.name+" after an action that there is not", read(), open)
	}

	// pending is approved like any other.
	orders := must[app](t, 200)(c.Developers.Apps.Get(weather).Do()).Credentials
	pending := slices.IndexFunc(orders, func(c *credential) bool {
		return len(c.ApiProducts) == 1 && c.ApiProducts[0].Apiproduct == "Orders Product"
	})
	if pending < 0 || orders[pending].ApiProducts[0].Status != "pending" {
		t.Fatalf("got %s, want a key whose product is pending", show(reflect.ValueOf(orders)))
	}
	path := weather + "/keys/" + orders[pending].ConsumerKey
	if got, err := status(c.Developers.Apps.Keys.Apiproducts.UpdateDeveloperAppKeyApiProduct(path + "/apiproducts/Orders Product").Action("approve").Do()); err != nil || got != 204 {
		t.Errorf("approve what is pending: got %d, %v, want 204", got, err)
	}
	k := must[key](t, 200)(c.Developers.Apps.Keys.Get(path).Do())
	if got := k.ApiProducts[0].(map[string]any)["status"]; got != "approved" {
		t.Errorf("a product that was pending: got %v, want approved", got)
	}
}

func setContentType(h http.Header, contentType string) {
	if contentType != "" {
		h.Set("Content-Type", contentType)
	}
}

// status of an answer without a body.
func status(v any, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	return reflect.ValueOf(v).Elem().FieldByName("ServerResponse").Interface().(googleapi.ServerResponse).HTTPStatusCode, nil
}

func (c *client) allApps(t *testing.T) {
	for i := range 5 {
		must[app](t, 201)(c.Developers.Apps.Create(bob, &app{Name: fmt.Sprintf("bobs-%d", i), ApiProducts: []string{"Weather-Product"}}).Do())
	}
	if got, err := status(c.Developers.Apps.GenerateKeyPairOrUpdateDeveloperAppStatus(bob+"/apps/bobs-3", &app{}).Action("revoke").Do()); err != nil || got != 204 {
		t.Fatalf("revoke an app: got %d, %v, want 204", got, err)
	}
	list := func(call *apigee.OrganizationsAppsListCall) (names []string) {
		t.Helper()
		for _, a := range must[apigee.GoogleCloudApigeeV1ListAppsResponse](t, 200)(call.Do()).App {
			names = append(names, a.Name)
		}
		slices.Sort(names)
		return names
	}
	all := []string{"AnotherTestApp", "b-app", "bobs-0", "bobs-1", "bobs-2", "bobs-3", "bobs-4", "c app"}
	bobs := all[2:7]
	same(t, "all apps", list(c.Apps.List(org).Expand(true)), all)
	short := must[apigee.GoogleCloudApigeeV1ListAppsResponse](t, 200)(c.Apps.List(org).Do()).App
	if len(short) != len(all) {
		t.Fatalf("got %d apps, want %d", len(short), len(all))
	}
	same(t, "an app in short", short[0], &apigee.GoogleCloudApigeeV1App{AppId: short[0].AppId})
	ids := map[string]string{}
	for _, a := range must[apigee.GoogleCloudApigeeV1ListAppsResponse](t, 200)(c.Apps.List(org).Expand(true).IncludeCred(false).Do()).App {
		ids[a.Name] = a.AppId
		if a.Credentials != nil {
			t.Errorf("%s: got credentials, want none without includeCred", a.Name)
		}
	}

	revoked := slices.Delete(slices.Clone(all), 5, 6)
	for name, one := range map[string]struct {
		call *apigee.OrganizationsAppsListCall
		want []string
	}{
		"filter by developer":   {c.Apps.List(org).Filter("developerEmail=bob+1@example.com"), bobs},
		"filter by status":      {c.Apps.List(org).Filter("status=revoked"), []string{"bobs-3"}},
		"filter by app id":      {c.Apps.List(org).Filter("appId=" + ids["b-app"]), []string{"b-app"}},
		"filter by name":        {c.Apps.List(org).Filter("appName=c app"), []string{"c app"}},
		"filter by product":     {c.Apps.List(org).Filter("apiProduct=Orders Product"), []string{"AnotherTestApp"}},
		"filter by key":         {c.Apps.List(org).Filter("consumerKey=" + ownKey), []string{"AnotherTestApp"}},
		"filter by type":        {c.Apps.List(org).Filter("appType=Developer"), all},
		"parameter status":      {c.Apps.List(org).Status("approved"), revoked},
		"parameter apiProduct":  {c.Apps.List(org).ApiProduct("Orders Product"), []string{"AnotherTestApp"}},
		"parameter ids":         {c.Apps.List(org).Ids(ids["b-app"] + "," + ids["bobs-1"]), []string{"b-app", "bobs-1"}},
		"parameters that agree": {c.Apps.List(org).Status("revoked").ApiProduct("Weather-Product"), []string{"bobs-3"}},
	} {
		same(t, name, list(one.call.Expand(true)), one.want)
	}

	// Pages by the client itself, and by keys as apigeecli does.
	var paged []string
	pages := 0
	if err := c.Apps.List(org).PageSize(3).Expand(true).Pages(t.Context(), func(page *apigee.GoogleCloudApigeeV1ListAppsResponse) error {
		pages++
		for _, a := range page.App {
			paged = append(paged, a.Name)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if slices.Sort(paged); pages != 3 {
		t.Errorf("got %d pages of at most 3, want 3", pages)
	}
	same(t, "apps by pages", paged, all)
	seen := map[string]bool{}
	for from := ""; ; {
		page := must[apigee.GoogleCloudApigeeV1ListAppsResponse](t, 200)(c.Apps.List(org).Rows(4).StartKey(from).Do()).App
		if from != "" && (len(page) == 0 || page[0].AppId != from) {
			t.Fatalf("got %s, want the page that begins with its start key", show(reflect.ValueOf(page)))
		}
		for _, a := range page {
			seen[a.AppId] = true
		}
		if len(page) < 4 {
			break
		}
		from = page[len(page)-1].AppId
	}
	if len(seen) != len(all) {
		t.Errorf("got %d apps by start keys, want %d", len(seen), len(all))
	}

	got := must[apigee.GoogleCloudApigeeV1App](t, 200)(c.Apps.Get(org + "/apps/" + ids["bobs-3"]).Do())
	its := must[app](t, 200)(c.Developers.Apps.Get(bob + "/apps/bobs-3").Do())
	same(t, "an app by its id", got, &apigee.GoogleCloudApigeeV1App{
		AppId: its.AppId, Name: "bobs-3", Status: "revoked", DeveloperId: its.DeveloperId, DeveloperEmail: got.DeveloperEmail,
		Credentials: its.Credentials, CreatedAt: its.CreatedAt, LastModifiedAt: its.LastModifiedAt, Attributes: its.Attributes,
	})
	if got.DeveloperEmail != "bob+1@example.com" {
		t.Errorf("developerEmail: got %q, want bob+1@example.com", got.DeveloperEmail)
	}
}

// refused fails the test unless err is a refusal as Apigee words it. An empty
// message is any.
func refused(t *testing.T, status int, code, message string, err error) {
	t.Helper()
	var e *googleapi.Error
	if !errors.As(err, &e) {
		t.Errorf("got %v, want %d %s", err, status, code)
		return
	}
	var got struct{ violation, subject, description, requestID string }
	for i, detail := range e.Details {
		d, _ := detail.(map[string]any)
		switch violations, _ := d["violations"].([]any); d["@type"] {
		case "type.googleapis.com/google.rpc.PreconditionFailure":
			if i != 0 || len(violations) != 1 {
				t.Errorf("got the failure as detail %d with %d violations, want it first with one: the Drupal portal looks there", i, len(violations))
				return
			}
			v, _ := violations[0].(map[string]any)
			got.violation, _ = v["type"].(string)
			got.subject, _ = v["subject"].(string)
			got.description, _ = v["description"].(string)
		case "type.googleapis.com/google.rpc.RequestInfo":
			got.requestID, _ = d["requestId"].(string)
		}
	}
	if e.Code != status || got.violation != code || message != "" && e.Message != message || e.Message == "" {
		t.Errorf("got %d %s %q, want %d %s %q", e.Code, got.violation, e.Message, status, code, message)
	}
	if got.description != e.Message || got.requestID == "" || got.subject != got.requestID || e.Header.Get("X-Request-Id") != got.requestID {
		t.Errorf("got the details %v and the request %q, want the message, and the request's id everywhere", e.Details, e.Header.Get("X-Request-Id"))
	}
}

func (c *client) errors(t *testing.T) {
	nobody := org + "/developers/nobody@example.com"
	keys := c.Developers.Apps.Keys
	for _, one := range []struct {
		what    string
		status  int
		code    string
		message string
		err     error
	}{
		{"no such developer", 404, "developer.service.DeveloperIdDoesNotExist", "DeveloperId nobody@example.com does not exist in organization acme", second(c.Developers.Get(nobody).Do())},
		{"delete no such developer", 404, "developer.service.DeveloperIdDoesNotExist", "", second(c.Developers.Delete(nobody).Do())},
		{"app of no such developer", 404, "developer.service.DeveloperIdDoesNotExist", "", second(c.Developers.Apps.Create(nobody, &app{Name: "a"}).Do())},
		{"status of no such developer", 404, "developer.service.DeveloperIdDoesNotExist", "", second(c.Developers.SetDeveloperStatus(nobody).Action("active").Do())},
		{"developer twice", 409, "developer.service.DeveloperAlreadyExists", "", second(c.Developers.Create(org, &developer{Email: "ann@example.com", FirstName: "A", LastName: "B", UserName: "c"}).Do())},
		{"developer without a name", 400, "keygate.body", "", second(c.Developers.Create(org, &developer{Email: "dee@example.com"}).Do())},
		{"no such app", 404, "developer.service.AppDoesNotExist", "App named x does not exist under ann@example.com", second(c.Developers.Apps.Get(ann + "/apps/x").Do())},
		{"app twice", 409, "keymanagement.service.app_already_exists", "App with name AnotherTestApp already exists", second(c.Developers.Apps.Create(ann, &app{Name: "AnotherTestApp"}).Do())},
		{"app with no such product", 404, "keymanagement.service.apiproduct_doesnot_exist", "", second(c.Developers.Apps.Create(ann, &app{Name: "d", ApiProducts: []string{"None"}}).Do())},
		{"app without a name", 400, "keygate.body", "", second(c.Developers.Apps.Create(ann, &app{}).Do())},
		{"no such key", 404, "keymanagement.service.InvalidClientIdForGivenApp", "Invalid consumer key for Given App", second(keys.Get(weather + "/keys/none").Do())},
		{"key of another app", 404, "keymanagement.service.InvalidClientIdForGivenApp", "", second(keys.Get(ann + "/apps/b-app/keys/" + ownKey).Do())},
		{"key twice", 409, "keymanagement.service.ConsumerKeyAlreadyExists", "ConsumerKey already exists", second(keys.Create(weather, &key{ConsumerKey: ownKey, ConsumerSecret: "s"}).Do())},
		{"key with no such product", 404, "keymanagement.service.apiproduct_doesnot_exist", "", second(keys.UpdateDeveloperAppKey(ownPath, &key{ApiProducts: []any{"None"}}).Do())},
		{"no such product", 404, "keymanagement.service.apiproduct_doesnot_exist", "", second(c.Apiproducts.Get(org + "/apiproducts/None").Do())},
		{"no such app id", 404, "developer.service.AppDoesNotExist", "", second(c.Apps.Get(org + "/apps/6ed3a4d1-4733-439a-80a4-0d71149ec9ad").Do())},
		{"page that begins nowhere", 404, "keymanagement.service.apiproduct_doesnot_exist", "", second(c.Apiproducts.List(org).StartKey("None").Do())},
		{"page of no size", 400, "keygate.query", "", second(c.Apps.List(org).PageSize(-1).Do())},
		{"no organization's name", 404, "keygate.organization_doesnot_exist", "", second(c.Get("organizations/.x").Do())},
	} {
		t.Run(one.what, func(t *testing.T) { refused(t, one.status, one.code, one.message, one.err) })
	}
	err := second(keys.Apiproducts.Delete(ownPath + "/apiproducts/Orders Product").Do())
	if e := new(googleapi.Error); !errors.As(err, &e) || e.Code != 404 || !strings.Contains(e.Message, "APIProduct is not associated with consumer key") {
		t.Errorf("remove a product that is not on the key: got %v, want 404 and Apigee's words", err)
	}
}

func (c *client) deletions(t *testing.T) {
	gone := must[app](t, 200)(c.Developers.Apps.Delete(ann + "/apps/b-app").Do())
	if gone.Name != "b-app" || len(gone.Credentials) != 1 {
		t.Errorf("got %s, want the app that is deleted, with its key", show(reflect.ValueOf(gone)))
	}
	refused(t, 404, "developer.service.AppDoesNotExist", "App named b-app does not exist under ann@example.com", second(c.Developers.Apps.Get(ann+"/apps/b-app").Do()))
	// With five apps and their keys.
	was := must[developer](t, 200)(c.Developers.Delete(bob).Do())
	same(t, "a deleted developer", was.Email, "bob+1@example.com")
	left := must[apigee.GoogleCloudApigeeV1ListAppsResponse](t, 200)(c.Apps.List(org).Expand(true).Do()).App
	if len(left) != 2 {
		t.Errorf("got %d apps after the deletions, want 2", len(left))
	}
	refused(t, 404, "developer.service.DeveloperIdDoesNotExist", "", second(c.Developers.Get(bob).Do()))
	// The name is free again.
	must[developer](t, 201)(c.Developers.Create(org, &developer{Email: "bob+1@example.com", FirstName: "Bob", LastName: "Ng", UserName: "bob"}).Do())
}

// Edge's rendering is not Google's: its numbers are numbers. What the client can
// read of it is what has none, and what has no body.
func TestClientOnEdge(t *testing.T) {
	t.Parallel()
	k := start(t)
	x, err := apigee.NewService(t.Context(), option.WithEndpoint(k.url+"/"), option.WithHTTPClient(k.client()))
	if err != nil {
		t.Fatal(err)
	}
	edge, err := apigee.NewService(t.Context(), option.WithEndpoint(k.url+"/edge/"), option.WithHTTPClient(k.client()))
	if err != nil {
		t.Fatal(err)
	}
	must[product](t, 201)(x.Organizations.Apiproducts.Create(org, &product{Name: "P", DisplayName: "P", ApprovalType: "auto"}).Do())
	must[developer](t, 201)(x.Organizations.Developers.Create(org, &developer{Email: "ann@example.com", FirstName: "A", LastName: "L", UserName: "ann"}).Do())
	a := must[app](t, 201)(x.Organizations.Developers.Apps.Create(ann, &app{Name: "AnotherTestApp", ApiProducts: []string{"P"}}).Do())
	onKey := weather + "/keys/" + a.Credentials[0].ConsumerKey
	o := edge.Organizations
	for name, set := range map[string]func() (int, error){
		"product on key": func() (int, error) {
			return status(o.Developers.Apps.Keys.Apiproducts.UpdateDeveloperAppKeyApiProduct(onKey + "/apiproducts/P").Action("revoke").Do())
		},
		"key": func() (int, error) {
			return status(o.Developers.Apps.Keys.UpdateDeveloperAppKey(onKey, &key{}).Action("revoke").Do())
		},
		"app": func() (int, error) {
			return status(o.Developers.Apps.GenerateKeyPairOrUpdateDeveloperAppStatus(weather, &app{}).Action("revoke").Do())
		},
		"developer": func() (int, error) {
			return status(o.Developers.SetDeveloperStatus(ann).Action("inactive").Do())
		},
	} {
		if got, err := set(); err != nil || got != http.StatusNoContent {
			t.Errorf("%s: got %d, %v, want 204", name, got, err)
		}
	}
	got := must[app](t, 200)(x.Organizations.Developers.Apps.Get(weather).Do())
	status := []string{got.Credentials[0].ApiProducts[0].Status, got.Credentials[0].Status, got.Status, must[developer](t, 200)(x.Organizations.Developers.Get(ann).Do()).Status}
	same(t, "the flags", status, []string{"revoked", "revoked", "revoked", "inactive"})

	set := must[attributes](t, 200)(o.Developers.Attributes(ann, &attributes{Attribute: []*attribute{{Name: "a", Value: "1"}}}).Do())
	same(t, "attributes", set.Attribute, []*attribute{{Name: "a", Value: "1"}})
	one := must[attribute](t, 200)(o.Developers.Attributes_.Get(ann + "/attributes/a").Do())
	same(t, "an attribute", one, &attribute{Name: "a", Value: "1"})

	var e *googleapi.Error
	if _, err := o.Developers.Apps.Get(ann + "/apps/x").Do(); !errors.As(err, &e) {
		t.Fatalf("no such app: got %v, want an error of the API", err)
	}
	const want = `{"code":"developer.service.AppDoesNotExist","message":"App named x does not exist under ann@example.com","contexts":[]}`
	if e.Code != 404 || e.Message != "" || strings.TrimSpace(e.Body) != want {
		t.Errorf("no such app: got %d %q %s, want 404 and Edge's body %s", e.Code, e.Message, e.Body, want)
	}
	if _, err := o.Developers.Apps.Get(weather).Do(); err == nil || !strings.Contains(err.Error(), "int64") {
		t.Errorf("an app of Edge's: got %v, want the client to stumble over a number", err)
	}
}

// Nothing is answered to a client without a token, or with a wrong one.
func TestClientWithoutToken(t *testing.T) {
	t.Parallel()
	k := start(t)
	for name, c := range map[string]*http.Client{"none": http.DefaultClient, "wrong": {Transport: bearer{"kgm_wrong", http.DefaultTransport}}} {
		svc, err := apigee.NewService(t.Context(), option.WithEndpoint(k.url), option.WithHTTPClient(c))
		if err != nil {
			t.Fatal(err)
		}
		t.Run(name, func(t *testing.T) {
			refused(t, 401, "keygate.unauthenticated", "", second(svc.Organizations.Get(org).Do()))
			refused(t, 401, "keygate.unauthenticated", "", second(svc.Organizations.Developers.Get(ann).Do()))
		})
	}
}
