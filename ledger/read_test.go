package ledger_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/catalog"
	"keygate/examples/quickstart"
	"keygate/jsonobject"
	"keygate/ledger"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

// book is a ledger on a real etcd, with a clock of its own.
type book struct {
	*store
	*ledger.Ledger
	clock atomic.Int64 // ms
}

var by = ledger.By{Actor: audit.Actor{Kind: audit.ActorCLI, Name: "ann"}}

func newBook(t *testing.T) *book {
	t.Helper()
	return bookOn(t, newStore(t), nil)
}

func bookOn(t *testing.T, s *store, kv ledger.Store) *book {
	t.Helper()
	ring, err := seal.Parse([]byte(seal.Generate("k1")))
	if err != nil {
		t.Fatal(err)
	}
	if kv == nil {
		kv = s.kv
	}
	b := &book{store: s}
	b.clock.Store(1_800_000_000_000)
	b.Ledger = ledger.New(ledger.Config{Store: kv, Space: s.space, Seal: ring, Now: b.now})
	return b
}

func (b *book) now() time.Time { return time.UnixMilli(b.clock.Load()) }

// object parses JSON.
func object(t *testing.T, text string) jsonobject.Object {
	t.Helper()
	o, err := jsonobject.Parse([]byte(text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return o
}

func developer(email string) catalog.Developer {
	return catalog.Developer{Email: email, Details: jsonobject.Object{}.With("firstName", "Ann").With("lastName", "Lee").With("userName", "ann")}
}

func product(name authz.ProductName, approval string, scopes ...string) catalog.Product {
	return catalog.Product{Name: name, Details: jsonobject.Object{}.With("displayName", name).With("approvalType", approval).With("scopes", scopes)}
}

func (b *book) mustDeveloper(email string) ledger.Developer {
	b.t.Helper()
	d, _, err := b.CreateDeveloper(b.ctx(), by, org, developer(email))
	if err != nil {
		b.t.Fatalf("create developer %s: %v", email, err)
	}
	return d
}

func (b *book) mustProducts(names ...authz.ProductName) {
	b.t.Helper()
	for _, name := range names {
		approval := catalog.ApprovalAuto
		if strings.HasPrefix(string(name), "manual") {
			approval = catalog.ApprovalManual
		}
		if _, _, err := b.CreateProduct(b.ctx(), by, org, product(name, approval, "READ", "WRITE")); err != nil {
			b.t.Fatalf("create product %s: %v", name, err)
		}
	}
}

func (b *book) mustApp(developer, name string, products ...authz.ProductName) ledger.App {
	b.t.Helper()
	a, _, err := b.CreateApp(b.ctx(), by, org, developer, ledger.AppSpec{Name: name, Products: products})
	if err != nil {
		b.t.Fatalf("create app %s: %v", name, err)
	}
	return a
}

// wantError tells whether err is an Error with that code.
func wantError(t *testing.T, what string, err error, kind ledger.ErrorKind, code string) {
	t.Helper()
	var e *ledger.Error
	if !errors.As(err, &e) || e.Kind != kind || e.Code != code {
		t.Errorf("%s: got %v, want an error of kind %v with code %s", what, err, kind, code)
	}
}

// must is for what cannot fail unless the store does.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestEntitiesThatAreNotThere(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	app := b.mustApp("ann@example.com", "A", "Weather")
	for _, tt := range []struct {
		name string
		call func() error
		code string
	}{
		{"developer", func() error { _, err := b.Developer(b.ctx(), org, "bob@example.com"); return err }, "developer.service.DeveloperIdDoesNotExist"},
		{"no developer", func() error { _, err := b.Developer(b.ctx(), org, ""); return err }, "developer.service.DeveloperIdDoesNotExist"},
		{"developer of another organization", func() error { _, err := b.Developer(b.ctx(), "other", "ann@example.com"); return err }, "developer.service.DeveloperIdDoesNotExist"},
		{"app", func() error { _, err := b.DeveloperApp(b.ctx(), org, "ann@example.com", "B"); return err }, "developer.service.AppDoesNotExist"},
		{"app's id", func() error { _, err := b.App(b.ctx(), org, "B"); return err }, "developer.service.AppDoesNotExist"},
		{"app of another organization", func() error { _, err := b.App(b.ctx(), "other", app.ID); return err }, "developer.service.AppDoesNotExist"},
		{"key", func() error {
			_, err := b.Key(b.ctx(), org, "ann@example.com", "A", authz.GenerateKey())
			return err
		}, "keymanagement.service.InvalidClientIdForGivenApp"},
		{"key's id", func() error {
			_, _, err := b.FindKey(b.ctx(), "other", app.Credentials[0].Key)
			return err
		}, "keymanagement.service.InvalidClientIdForGivenApp"},
		{"product", func() error { _, err := b.Product(b.ctx(), org, "weather"); return err }, "keymanagement.service.apiproduct_doesnot_exist"},
		{"developer's target", func() error { _, err := b.DeveloperTarget(b.ctx(), org, "b"); return err }, "developer.service.DeveloperIdDoesNotExist"},
		{"app's target", func() error { _, err := b.AppTarget(b.ctx(), org, "ann@example.com", "B"); return err }, "developer.service.AppDoesNotExist"},
		{"key's target", func() error {
			_, err := b.KeyProductTarget(b.ctx(), org, "ann@example.com", "A", "sha256:00", "Weather")
			return err
		}, "keymanagement.service.InvalidClientIdForGivenApp"},
		{"product of a new app", func() error {
			_, _, err := b.CreateApp(b.ctx(), by, org, "ann@example.com", ledger.AppSpec{Name: "B", Products: []authz.ProductName{"Weather", "Sun"}})
			return err
		}, "keymanagement.service.apiproduct_doesnot_exist"},
		{"attribute", func() error {
			_, _, err := b.DeleteAttribute(b.ctx(), by, org, ledger.Holder{Product: "Weather"}, "x")
			return err
		}, "organizations.keymanagement.AttributeDoesntExist"},
	} {
		wantError(t, tt.name, tt.call(), ledger.NotFound, tt.code)
	}
	for _, bad := range []authz.Organization{"", ".x", "*"} {
		_, err := b.Developer(b.ctx(), bad, "ann@example.com")
		wantError(t, "organization "+string(bad), err, ledger.Invalid, "keygate.organization")
	}
}

// compacting compacts etcd up to now before the second of several reads.
type compacting struct {
	*clientv3.Client
	t     *testing.T
	reads int
}

func (c *compacting) Txn(ctx context.Context) clientv3.Txn {
	c.reads++
	if c.reads == 2 {
		resp, err := c.Put(ctx, "/elsewhere", "")
		if err == nil {
			_, err = c.Compact(ctx, resp.Header.Revision)
		}
		if err != nil {
			c.t.Errorf("compact: %v", err)
		}
	}
	return c.Client.Txn(ctx)
}

func TestReadsBeginAgainWhenCompacted(t *testing.T) {
	s := newStore(t)
	b := bookOn(t, s, nil)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	made := b.mustApp("ann@example.com", "A", "Weather")
	kv := &compacting{Client: s.kv, t: t}
	a := must(bookOn(t, s, kv).DeveloperApp(s.ctx(), org, "ann@example.com", "A"))
	if a.ID != made.ID || len(a.Credentials) != 1 {
		t.Errorf("got app %s with %d keys, want %s with 1", a.ID, len(a.Credentials), made.ID)
	}
	if kv.reads < 4 {
		t.Errorf("%d reads, want them to have begun again", kv.reads)
	}
}

// A value that somebody damaged is shown as far as it can be read, closed, and
// never rewritten; others are not touched by it.
func TestDamagedRecords(t *testing.T) {
	b := newBook(t)
	d := b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	a, other := b.mustApp("ann@example.com", "A", "Weather"), b.mustApp("ann@example.com", "B", "Weather")
	key := a.Credentials[0]
	appPath := b.space.Details(keyspace.AppRecord(org, a.ID))
	keyRecord := keyspace.KeyRecord(org, key.Key)

	b.set(b.space.Status(keyRecord), "Approved\n", b.space.KeyProduct(keyRecord, "Weather"), "-", b.space.KeyProduct(keyRecord, "Sun"), "approved")
	got := must(b.Key(b.ctx(), org, "ann@example.com", "A", key.ConsumerKey))
	if got.Status != authz.StatusRevoked || len(got.Products) != 2 ||
		got.Products[0].Name != "Weather" || got.Products[0].Status != authz.StatusRevoked ||
		got.Products[1].Name != "Sun" || got.Products[1].Status != authz.StatusApproved {
		t.Errorf("got status %v and products %+v, want revoked, Weather revoked and Sun approved", got.Status, got.Products)
	}

	b.set(b.space.Details(keyRecord), `{"v":2}`)
	got = must(b.Key(b.ctx(), org, "ann@example.com", "A", key.ConsumerKey))
	if got.Status != authz.StatusRevoked || len(got.Details) != 0 {
		t.Errorf("got %v with %v, want it revoked and empty", got.Status, got.Details)
	}
	_, _, err := b.UpdateKey(b.ctx(), by, org, "ann@example.com", "A", key.ConsumerKey, ledger.KeySpec{HasScopes: true})
	wantError(t, "change of a key that cannot be read", err, ledger.Conflict, "keygate.record_unreadable")

	b.set(b.space.Status(keyspace.DeveloperRecord(org, d.ID)), "-", appPath, `{"v":1,`)
	if d := must(b.Developer(b.ctx(), org, "ann@example.com")); d.Status != authz.StatusInactive {
		t.Errorf("developer without status: got %v, want inactive", d.Status)
	}
	if a := must(b.App(b.ctx(), org, a.ID)); a.Name != "" || a.Status != authz.StatusApproved {
		t.Errorf("damaged app: got %q %v, want no name", a.Name, a.Status)
	}
	_, _, err = b.UpdateApp(b.ctx(), by, org, "ann@example.com", "A", ledger.AppSpec{})
	wantError(t, "change of an app that cannot be read", err, ledger.Conflict, "keygate.record_unreadable")
	if _, _, err := b.UpdateApp(b.ctx(), by, org, "ann@example.com", "B", ledger.AppSpec{}); err != nil {
		t.Errorf("change of the other app: %v", err)
	}
	page := must(b.Apps(b.ctx(), org, ledger.AppsQuery{Expand: true}))
	if len(page.Apps) != 2 {
		t.Errorf("%d apps, want both", len(page.Apps))
	}
	if _, _, err := b.DeleteApp(b.ctx(), by, org, "ann@example.com", "A"); err != nil {
		t.Errorf("delete a damaged app: %v", err)
	}
	if _, err := b.App(b.ctx(), org, other.ID); err != nil {
		t.Errorf("the other app: %v", err)
	}
}

// When a status is changed later than the record, that is when it was changed
// last, as soon as the chain tells.
func TestLastModified(t *testing.T) {
	b := newBook(t)
	d := b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	ctx, stop := context.WithCancel(b.ctx())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = audit.NewFollower(audit.FollowerConfig{Client: b.kv, Space: b.space, Now: b.now}).Run(ctx) // ends with ctx
	}()
	defer func() { stop(); <-done }()
	b.await("the chain begins", func() bool { return len(b.under(b.space.Chain())) > 1 })
	a := b.mustApp("ann@example.com", "A", "Weather")
	if got := must(b.App(b.ctx(), org, a.ID)); got.LastModified != a.LastModified || got.Revision != a.Revision {
		t.Errorf("created: got %d at revision %d, want %d at %d", got.LastModified, got.Revision, a.LastModified, a.Revision)
	}
	b.clock.Add(5000)
	change := b.mustSet(ledger.Revoke, ledger.Target{Record: keyspace.KeyRecord(org, a.Credentials[0].Key), Product: "Weather"},
		ledger.Target{Record: keyspace.DeveloperRecord(org, d.ID)})
	b.await("the chain has the change", func() bool {
		_, ok, err := audit.TimeOf(b.ctx(), b.kv, b.space, change.Revision)
		return err == nil && ok
	})
	later := b.clock.Load()
	got := must(b.App(b.ctx(), org, a.ID))
	if got.Revision != change.Revision || got.Credentials[0].Revision != change.Revision || got.LastModified != later {
		t.Errorf("app: modified at %d, revisions %d and %d, want %d and that of the flag, %d", got.LastModified, got.Revision, got.Credentials[0].Revision, later, change.Revision)
	}
	if d := must(b.Developer(b.ctx(), org, "ann@example.com")); d.Revision != change.Revision || d.LastModified != later {
		t.Errorf("developer: modified at %d, revision %d; want %d, %d", d.LastModified, d.Revision, later, change.Revision)
	}
	page := must(b.Apps(b.ctx(), org, ledger.AppsQuery{Expand: true}))
	if len(page.Apps) != 1 || page.Apps[0].LastModified != later {
		t.Errorf("listed: %+v, want it modified at %d", page.Apps, later)
	}
}

// await asks until it is so, or the test's time is over.
func (b *book) await(what string, so func() bool) {
	b.t.Helper()
	end := b.ctx().Done()
	for tick := time.NewTicker(5 * time.Millisecond); !so(); {
		select {
		case <-tick.C:
		case <-end:
			b.t.Fatalf("%s: not in time", what)
		}
	}
}

// What an import brought, and what is made here, is the same kind of thing.
func TestSameStoredForm(t *testing.T) {
	b := newBook(t)
	b.mustLoad(ledger.ImportOptions{}, weather())
	imported := must(b.App(b.ctx(), org, "6ed3a4d1-4733-439a-80a4-0d71149ec9ad"))
	b.mustProducts("Weather-Product")
	made, _, err := b.CreateApp(b.ctx(), by, org, "Z2S37rxX2Suzkwtg", ledger.AppSpec{Name: "Made", Products: []authz.ProductName{"Weather-Product"}})
	if err != nil {
		t.Fatal(err)
	}
	all, _ := b.dump()
	names := func(path string) string {
		var names []string
		for _, m := range object(t, all[path]) {
			if !strings.HasPrefix(m.Name, "sealed") {
				names = append(names, m.Name)
			}
		}
		return strings.Join(names, " ")
	}
	for _, tt := range []struct{ what, imported, made string }{
		{"app", b.space.Details(keyspace.AppRecord(org, imported.ID)), b.space.Details(keyspace.AppRecord(org, made.ID))},
		{"credential", b.space.Details(keyspace.KeyRecord(org, imported.Credentials[0].Key)), b.space.Details(keyspace.KeyRecord(org, made.Credentials[0].Key))},
	} {
		if got, want := names(tt.made), names(tt.imported); got != want {
			t.Errorf("%s: members %s\nof the imported one %s", tt.what, got, want)
		}
	}
	// The same paths, names apart.
	paths := func(a ledger.App) string {
		var own []string
		for path := range all {
			named := strings.NewReplacer(string(a.ID), "APP", a.Credentials[0].Key.String(), "KEY", a.Name, "NAME").Replace(path)
			if named != path {
				own = append(own, named)
			}
		}
		slices.Sort(own)
		return strings.Join(own, "\n")
	}
	if got, want := paths(made), paths(imported); got != want {
		t.Errorf("paths of what was made:\n%s\nof what was imported:\n%s", got, want)
	}

	// What was imported is changed as what was made here.
	if imported.Email != "" || imported.Developer != "Z2S37rxX2Suzkwtg" || imported.Credentials[0].Products[0].Status != authz.StatusRevoked {
		t.Errorf("imported: %+v", imported)
	}
	if _, err := b.Key(b.ctx(), org, "Z2S37rxX2Suzkwtg", "AnotherTestApp", quickstart.WeatherKey); err != nil {
		t.Errorf("imported key: %v", err)
	}
	if _, _, err := b.UpdateKey(b.ctx(), by, org, "Z2S37rxX2Suzkwtg", "AnotherTestApp", quickstart.WeatherKey,
		ledger.KeySpec{Products: []authz.ProductName{"Weather-Product"}}); err != nil {
		t.Errorf("naming a product that is on the key: %v", err)
	}
	if r := b.reason(quickstart.KeyID(quickstart.WeatherKey), "Weather-Product"); r != authz.ProductRevoked {
		t.Errorf("after it a check answers %v, want %v: existing flags stay", r, authz.ProductRevoked)
	}
	// A second import finds it as it was.
	for _, o := range b.mustLoad(ledger.ImportOptions{}, weather()) {
		for _, it := range o.Items {
			if it.Action == ledger.Refused || it.Action == ledger.Created {
				t.Errorf("second import: %v %s %s", it.Action, it.Path, it.Reason)
			}
		}
	}
}
