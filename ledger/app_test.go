package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

func statuses(c ledger.Credential) (all []string) {
	for _, p := range c.Products {
		all = append(all, string(p.Name)+" "+p.Status.String())
	}
	return all
}

func TestApps(t *testing.T) {
	b := newBook(t)
	d := b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather", "manual")
	a, done, err := b.CreateApp(b.ctx(), by, org, "ann@example.com", ledger.AppSpec{
		Name: "My App", Products: []authz.ProductName{"Weather", "manual", "Weather"}, KeyExpiresIn: 5000,
		Details: object(t, `{"attributes":[{"name":"DisplayName","value":"M"}],"callbackUrl":"https://x","scopes":["READ"],"status":"revoked","appId":"mine","credentials":[{"consumerKey":"k"}],"x-own":true}`),
	})
	if err != nil {
		t.Fatal(err)
	}
	c := a.Credentials[0]
	if a.Status != authz.StatusApproved || a.Email != "ann@example.com" || a.Developer != d.ID || a.ID == "mine" || a.Revision != done.Revision || c.Revision != done.Revision {
		t.Errorf("created: %+v", a)
	}
	if diff := cmp.Diff([]string{"Weather approved", "manual pending"}, statuses(c)); diff != "" {
		t.Errorf("products (-want +got):\n%s", diff)
	}
	if c.ExpiresAt != b.clock.Load()+5000 || c.Status != authz.StatusApproved {
		t.Errorf("key: expires at %d, %v", c.ExpiresAt, c.Status)
	}
	if _, ok := authz.KeyFormat.Checksum(c.ConsumerKey); !ok || c.ConsumerSecret == "" || !strings.HasSuffix(c.ConsumerKey, c.Hint) {
		t.Error("want a key of keygate's own, a secret and a hint")
	}
	value, _ := b.value(b.space.Details(keyspace.AppRecord(org, a.ID)))
	if want := fmt.Sprintf(`{"v":1,"accessType":"","appFamily":"default","appId":%q,"attributes":[{"name":"DisplayName","value":"M"}],"callbackUrl":"https://x",`+
		`"createdAt":1800000000000,"createdBy":"ann","credentials":[%q],"developerId":%q,"lastModifiedAt":1800000000000,"lastModifiedBy":"ann","name":"My App","scopes":["READ"],"x-own":true}`,
		a.ID, c.Key, d.ID); value != want {
		t.Errorf("stored\n%s\nwant\n%s", value, want)
	}
	all, _ := b.dump()
	for path, value := range all {
		if strings.Contains(path+value, c.ConsumerKey) || strings.Contains(path+value, c.ConsumerSecret) {
			t.Errorf("%s holds the key or the secret", path)
		}
	}
	if r := b.reason(c.Key, "Weather"); r != authz.Allowed {
		t.Errorf("a check answers %v", r)
	}
	if r := b.reason(c.Key, "manual"); r != authz.ProductPending {
		t.Errorf("a check of the manual product answers %v", r)
	}

	got := must(b.DeveloperApp(b.ctx(), org, string(d.ID), "My App"))
	a.Credentials[0].ConsumerKey, a.Credentials[0].ConsumerSecret = "", ""
	if diff := cmp.Diff(a, got, cmp.AllowUnexported(ledger.App{}), cmp.Comparer(func(a, b catalog.Secret) bool { return a.Reveal() == b.Reveal() }), ignoreInternal); diff != "" {
		t.Errorf("read (-created +got):\n%s", diff)
	}
	_, _, err = b.CreateApp(b.ctx(), by, org, string(d.ID), ledger.AppSpec{Name: "My App"})
	wantError(t, "the same name", err, ledger.Exists, "keymanagement.service.app_already_exists")
	b.mustDeveloper("bob@example.com")
	if without := b.mustApp("bob@example.com", "My App"); len(without.Credentials) != 1 || len(without.Credentials[0].Products) != 0 {
		t.Errorf("an app without products: %+v", without.Credentials)
	}

	for _, tt := range []struct {
		name string
		spec ledger.AppSpec
		kind ledger.ErrorKind
		code string
	}{
		{"no name", ledger.AppSpec{}, ledger.Invalid, "keygate.invalid"},
		{"a bad name", ledger.AppSpec{Name: "a/b"}, ledger.Invalid, "keygate.invalid"},
		{"a bad expiry", ledger.AppSpec{Name: "B", KeyExpiresIn: -2}, ledger.Invalid, "keygate.invalid"},
		{"an expiry after the year 9999", ledger.AppSpec{Name: "B", KeyExpiresIn: 253402300799999}, ledger.Invalid, "keygate.invalid"},
		{"scopes of no product", ledger.AppSpec{Name: "B", Details: object(t, `{"scopes":["READ"]}`)}, ledger.Invalid, "keymanagement.service.InvalidScopes"},
		{"too many products", ledger.AppSpec{Name: "B", Products: manyProducts(51)}, ledger.Limit, "keygate.limit"},
		{"too many attributes", ledger.AppSpec{Name: "B", Details: catalog.WithAttributes(nil, make([]catalog.Attribute, 19))}, ledger.Invalid, "keygate.invalid"},
	} {
		_, _, err := b.CreateApp(b.ctx(), by, org, "ann@example.com", tt.spec)
		wantError(t, tt.name, err, tt.kind, tt.code)
	}
}

func manyProducts(n int) (names []authz.ProductName) {
	for i := range n {
		names = append(names, authz.ProductName(fmt.Sprintf("P%03d", i)))
	}
	return names
}

func TestUpdateApp(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather", "Sun")
	first := b.mustApp("ann@example.com", "A", "Weather")
	details := object(t, `{"attributes":[{"name":"x","value":"1"}],"callbackUrl":"https://x","name":"B","scopes":["READ"]}`)
	b.clock.Add(1)
	a, _, err := b.UpdateApp(b.ctx(), by, org, "ann@example.com", "A", ledger.AppSpec{Details: details})
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Credentials) != 1 || a.Name != "A" || a.LastModified != b.clock.Load() || len(catalog.Attributes(a.Details)) != 1 {
		t.Errorf("without products: %+v, want the one key, the old name", a)
	}
	if raw, _ := a.Details.Get("scopes"); string(raw) != "[]" {
		t.Errorf("scopes %s, want them unchanged", raw)
	}
	a, _, err = b.UpdateApp(b.ctx(), by, org, "ann@example.com", "A", ledger.AppSpec{Products: []authz.ProductName{"Sun"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Credentials) != 2 || a.Credentials[1].Key != first.Credentials[0].Key || a.Credentials[0].ConsumerKey == "" || a.Credentials[1].ConsumerKey != "" {
		t.Errorf("with products: %d keys, want the new one first, and only it shown", len(a.Credentials))
	}
	if raw, _ := a.Details.Get("callbackUrl"); string(raw) != `""` || len(catalog.Attributes(a.Details)) != 0 {
		t.Errorf("details %v, want attributes and callback removed", a.Details)
	}
	if r := b.reason(a.Credentials[0].Key, "Sun"); r != authz.Allowed {
		t.Errorf("the further key: %v", r)
	}
	a, _, err = b.AddAppKey(b.ctx(), by, org, "ann@example.com", "A", ledger.AppSpec{Details: details.Without("scopes")})
	if err != nil || len(a.Credentials) != 3 || len(a.Credentials[0].Products) != 0 {
		t.Fatalf("another key: %d keys, %v", len(a.Credentials), err)
	}
	a, _, err = b.AddAppKey(b.ctx(), by, org, "ann@example.com", "A", ledger.AppSpec{})
	if err != nil || len(catalog.Attributes(a.Details)) != 1 {
		t.Errorf("another key alone left %v, %v: want the attributes as they were", a.Details, err)
	}
	if must(b.App(b.ctx(), org, a.ID)).Revision != a.Revision {
		t.Error("the answer has another revision than the app")
	}
}

func TestDeleteApp(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	a := b.mustApp("ann@example.com", "A", "Weather")
	other := b.mustApp("ann@example.com", "B", "Weather")
	got, _, err := b.DeleteApp(b.ctx(), by, org, "ann@example.com", "A")
	if err != nil || got.ID != a.ID || len(got.Credentials) != 1 {
		t.Fatalf("deleted %+v, %v", got, err)
	}
	all, _ := b.dump()
	for path := range all {
		if !strings.Contains(path, ".audit/") && (strings.Contains(path, string(a.ID)) || strings.Contains(path, a.Credentials[0].Key.String())) {
			t.Errorf("left: %s", path)
		}
	}
	if r := b.reason(other.Credentials[0].Key, "Weather"); r != authz.Allowed {
		t.Errorf("the other app's key: %v", r)
	}
	if again := b.mustApp("ann@example.com", "A"); again.ID == a.ID {
		t.Error("a new app of the same name has the old id")
	}
}

// An app with more keys than a transaction holds is gone at once, and its keys
// are absent for everybody; what is left of them is removed later, and does not
// get into the way of new ones.
func TestDeleteAppWithManyKeys(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	a := b.mustApp("ann@example.com", "A", "Weather")
	const own = "my-own-consumer-key-of-2026"
	for i := range 79 {
		spec := ledger.KeySpec{}
		if i == 0 {
			spec.Key = own
		}
		if _, _, err := b.CreateKey(b.ctx(), by, org, "ann@example.com", "A", spec); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := b.UpdateKey(b.ctx(), by, org, "ann@example.com", "A", own, ledger.KeySpec{Products: []authz.ProductName{"Weather"}}); err != nil {
		t.Fatal(err)
	}
	app := must(b.App(b.ctx(), org, a.ID))
	if len(app.Credentials) != 80 {
		t.Fatalf("%d keys, want 80", len(app.Credentials))
	}
	one, ctx := b.cutOff()
	if _, _, err := one.DeleteApp(ctx, by, org, "ann@example.com", "A"); err != nil {
		t.Fatal(err)
	}
	stored, _ := b.records()
	var left []authz.KeyID
	decide := b.decider(b.snapshot())
	for _, c := range app.Credentials {
		if _, there := stored[b.space.Details(keyspace.KeyRecord(org, c.Key))]; there {
			left = append(left, c.Key)
		}
		if r := decide(c.Key, "Weather"); r == authz.Allowed {
			t.Errorf("key %s: a check answers %v", c.Key, r)
		}
	}
	if len(left) == 0 {
		t.Fatal("all keys went with the app: want more of them for this test")
	}
	_, _, err := b.FindKey(b.ctx(), org, left[0])
	wantError(t, "a key of it", err, ledger.NotFound, "keymanagement.service.InvalidClientIdForGivenApp")
	if page := must(b.Credentials(b.ctx(), org, ledger.KeysQuery{})); len(page.Keys) != 0 {
		t.Errorf("%d keys listed, want none", len(page.Keys))
	}
	if page := must(b.Apps(b.ctx(), org, ledger.AppsQuery{Keys: left})); len(page.Apps) != 0 {
		t.Errorf("%d apps listed, want none", len(page.Apps))
	}
	if holders := must(b.ProductHolders(b.ctx(), org, "Weather")); len(holders) != 0 {
		t.Errorf("%d holders, want none", len(holders))
	}

	// A new app takes the name, and the same consumer key.
	again := b.mustApp("ann@example.com", "A", "Weather")
	c, _, err := b.CreateKey(b.ctx(), by, org, "ann@example.com", "A", ledger.KeySpec{Key: own})
	if err != nil || len(c.Products) != 0 {
		t.Fatalf("the same consumer key again: %v %v", c.Products, err)
	}
	b.finish()
	if r := b.reason(c.Key, "Weather"); r != authz.ProductNotOnKey {
		t.Errorf("the new key: a check answers %v, want %v", r, authz.ProductNotOnKey)
	}
	if r := b.reason(again.Credentials[0].Key, "Weather"); r != authz.Allowed {
		t.Errorf("the new app: a check answers %v", r)
	}
	stored, _ = b.dump()
	for path := range stored {
		if strings.Contains(path, string(a.ID)) {
			t.Errorf("left: %s", path)
		}
	}
	if n := len(b.under(b.space.Watched() + org + "/keys/")); n != 2*2+1 {
		t.Errorf("%d values of keys, want those of the two new ones", n)
	}
}

// cutOff returns a ledger whose process ends, as it were, after its first
// transaction that writes, with its ctx.
func (b *book) cutOff() (*ledger.Ledger, context.Context) {
	ctx, cancel := context.WithCancel(b.ctx())
	f := &lossy{Client: b.kv}
	f.commit = func(_ int, do func() (*clientv3.TxnResponse, error)) (*clientv3.TxnResponse, error) {
		defer cancel()
		return do()
	}
	return ledger.New(ledger.Config{Store: f, Space: b.space, Now: b.now}), ctx
}

func TestConcurrentCreation(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	const n = 8
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() {
			_, _, errs[i] = b.CreateApp(t.Context(), by, org, "ann@example.com", ledger.AppSpec{Name: "A"})
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
			continue
		}
		wantError(t, "a loser", err, ledger.Exists, "keymanagement.service.app_already_exists")
	}
	if won != 1 {
		t.Errorf("%d have created it, want 1", won)
	}
	if page := must(b.Apps(b.ctx(), org, ledger.AppsQuery{})); len(page.Apps) != 1 {
		t.Errorf("%d apps, want 1", len(page.Apps))
	}
}

func TestConcurrentEdit(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	a := b.mustApp("ann@example.com", "A")
	match := by
	match.IfMatch = a.Revision
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		wg.Go(func() {
			_, _, errs[i] = b.UpdateApp(t.Context(), match, org, "ann@example.com", "A", ledger.AppSpec{
				Details: catalog.WithAttributes(nil, []catalog.Attribute{{Name: fmt.Sprint(i)}}),
			})
		})
	}
	wg.Wait()
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(fmt.Sprint(a == nil), fmt.Sprint(b == nil)) })
	wantError(t, "the loser", errs[0], ledger.Precondition, "keygate.if_match")
	if errs[1] != nil {
		t.Errorf("the winner: %v", errs[1])
	}

	// A change of a flag moves the app's revision too.
	a = must(b.App(b.ctx(), org, a.ID))
	b.mustSet(ledger.Revoke, ledger.Target{Record: keyspace.KeyRecord(org, a.Credentials[0].Key)})
	match.IfMatch = a.Revision
	_, _, err := b.UpdateApp(b.ctx(), match, org, "ann@example.com", "A", ledger.AppSpec{})
	wantError(t, "after a flag changed", err, ledger.Precondition, "keygate.if_match")
}

// Without If-Match nobody's key is lost.
func TestConcurrentKeys(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	a := b.mustApp("ann@example.com", "A")
	const n = 4
	var wg sync.WaitGroup
	made := make([]int, n)
	for i := range n {
		wg.Go(func() {
			for range 5 {
				_, _, err := b.CreateKey(t.Context(), by, org, "ann@example.com", "A", ledger.KeySpec{})
				if err == nil {
					made[i]++
				} else if !errors.Is(err, ledger.ErrConflict) {
					t.Errorf("create: %v", err)
				}
			}
		})
	}
	wg.Wait()
	want := 1
	for _, m := range made {
		want += m
	}
	if got := must(b.App(b.ctx(), org, a.ID)); len(got.Credentials) != want {
		t.Errorf("%d keys, want %d", len(got.Credentials), want)
	}
}

func TestCredentialsWithoutSealingKey(t *testing.T) {
	s := newStore(t)
	b := &book{store: s, Ledger: ledger.New(ledger.Config{Store: s.kv, Space: s.space})}
	b.mustDeveloper("ann@example.com")
	a := b.mustApp("ann@example.com", "A")
	value, _ := b.value(b.space.Details(keyspace.KeyRecord(org, a.Credentials[0].Key)))
	if strings.Contains(value, "sealed") || a.Credentials[0].ConsumerKey == "" {
		t.Errorf("stored %s, want nothing of the key, which is shown once", value)
	}
	c := must(b.Key(b.ctx(), org, "ann@example.com", "A", a.Credentials[0].ConsumerKey))
	if n, err := b.Reveal(b.ctx(), by, org, &c); n != 0 || err != nil || c.ConsumerKey != "" {
		t.Errorf("revealed %d, %v", n, err)
	}
}

func TestExpiredAndExpiring(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("manual")
	names := map[authz.KeyID]string{}
	for name, ms := range map[string]int64{"never": -1, "soon": 1000, "later": 100_000, "past": 1} {
		a, _, err := b.CreateApp(b.ctx(), by, org, "ann@example.com", ledger.AppSpec{Name: name, KeyExpiresIn: ms})
		if err != nil {
			t.Fatal(err)
		}
		names[a.Credentials[0].Key] = name
	}
	waiting := b.mustApp("ann@example.com", "waiting", "manual")
	names[waiting.Credentials[0].Key] = "waiting"
	b.clock.Add(10)
	now := time.UnixMilli(b.clock.Load())
	for _, tt := range []struct {
		name string
		q    ledger.KeysQuery
		want string
	}{
		{"all", ledger.KeysQuery{}, "later never past soon waiting"},
		{"expired", ledger.KeysQuery{Expired: true}, "past"},
		{"expiring", ledger.KeysQuery{ExpiringBefore: now.Add(50 * time.Second)}, "soon"},
		{"expiring, longer", ledger.KeysQuery{ExpiringBefore: now.Add(time.Hour)}, "later soon"},
		{"pending", ledger.KeysQuery{Status: authz.StatusPending}, "waiting"},
		{"revoked", ledger.KeysQuery{Status: authz.StatusRevoked}, ""},
		{"approved", ledger.KeysQuery{Status: authz.StatusApproved, Expired: true}, "past"},
	} {
		for _, size := range []int{0, 1, 2} {
			tt.q.PageSize, tt.q.PageToken = size, ""
			var got []string
			for {
				page := must(b.Credentials(b.ctx(), org, tt.q))
				for _, k := range page.Keys {
					got = append(got, names[k.Credential.Key])
					if k.App.Name != names[k.Credential.Key] || k.App.Email != "ann@example.com" {
						t.Errorf("key of %s: app %q of %q", names[k.Credential.Key], k.App.Name, k.App.Email)
					}
				}
				if size > 0 && len(page.Keys) > size {
					t.Errorf("%s: a page of %d, want at most %d", tt.name, len(page.Keys), size)
				}
				if tt.q.PageToken = page.NextPageToken; page.NextPageToken == "" {
					break
				}
			}
			slices.Sort(got)
			if strings.Join(got, " ") != tt.want {
				t.Errorf("%s, by %d: got %v, want %s", tt.name, size, got, tt.want)
			}
		}
	}
}
