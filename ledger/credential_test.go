package ledger_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keygate/authz"
	"keygate/catalog"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

func TestKeys(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather", "Sun", "manual")
	b.mustApp("ann@example.com", "A")
	b.mustApp("ann@example.com", "B")
	const own = "OWN-key_0123456789"
	c, done, err := b.CreateKey(b.ctx(), by, org, "ann@example.com", "A", ledger.KeySpec{Key: own, Secret: "s-1", ExpiresIn: 60, Products: []authz.ProductName{"Weather"}})
	if err != nil {
		t.Fatal(err)
	}
	if c.ConsumerKey != own || c.ConsumerSecret != "s-1" || c.Hint != "6789" || len(c.Products) != 0 || c.Status != authz.StatusApproved ||
		c.ExpiresAt != b.clock.Load()+60_000 || c.Revision != done.Revision {
		t.Errorf("created: %+v, want it approved and without products", c)
	}
	_, _, err = b.CreateKey(b.ctx(), by, org, "ann@example.com", "B", ledger.KeySpec{Key: own})
	wantError(t, "the same consumer key", err, ledger.Exists, "keymanagement.service.ConsumerKeyAlreadyExists")
	if strings.Contains(fmt.Sprint(err), own) {
		t.Error("the error holds the key")
	}
	for _, bad := range []ledger.KeySpec{{Key: "create"}, {Key: "short"}, {Key: own + "!"}, {Key: "kg_00000000000000000000000000000000_000000"}, {Secret: "a b"}, {ExpiresIn: -2}} {
		_, _, err := b.CreateKey(b.ctx(), by, org, "ann@example.com", "B", bad)
		wantError(t, fmt.Sprintf("%+v", bad), err, ledger.Invalid, "keygate.invalid")
	}
	for _, ref := range []string{own, c.Key.String(), "sha256:" + c.Key.String()} {
		if got := must(b.Key(b.ctx(), org, "ann@example.com", "A", ref)); got.Key != c.Key || got.ConsumerKey != "" {
			t.Errorf("%s: got %+v", ref, got)
		}
		_, err := b.Key(b.ctx(), org, "ann@example.com", "B", ref)
		wantError(t, "under another app", err, ledger.NotFound, "keymanagement.service.InvalidClientIdForGivenApp")
	}
	// A key may look like the id of another one.
	decoy, _, err := b.CreateKey(b.ctx(), by, org, "ann@example.com", "A", ledger.KeySpec{Key: c.Key.String()})
	if err != nil {
		t.Fatal(err)
	}
	if got := must(b.Key(b.ctx(), org, "ann@example.com", "A", c.Key.String())); got.Key != decoy.Key {
		t.Errorf("got key %s, want the one whose consumer key was given", got.Key)
	}

	// Products are added, and those that are there stay as they are.
	update := func(spec ledger.KeySpec) ledger.Credential {
		t.Helper()
		c, _, err := b.UpdateKey(b.ctx(), by, org, "ann@example.com", "A", own, spec)
		if err != nil {
			t.Fatal(err)
		}
		if got := must(b.Key(b.ctx(), org, "ann@example.com", "A", own)); cmp.Diff(statuses(c), statuses(got)) != "" || got.Revision != c.Revision {
			t.Errorf("answered %v at %d, stored %v at %d", statuses(c), c.Revision, statuses(got), got.Revision)
		}
		return c
	}
	record := keyspace.KeyRecord(org, c.Key)
	c = update(ledger.KeySpec{Products: []authz.ProductName{"Weather", "manual"}, Attributes: []catalog.Attribute{{Name: "x", Value: "1"}}, HasAttributes: true, Scopes: []string{"READ"}, HasScopes: true})
	if diff := cmp.Diff([]string{"Weather approved", "manual pending"}, statuses(c)); diff != "" {
		t.Errorf("products (-want +got):\n%s", diff)
	}
	b.mustSet(ledger.Revoke, ledger.Target{Record: record, Product: "Weather"})
	b.mustSet(ledger.Approve, ledger.Target{Record: record, Product: "manual"})
	c = update(ledger.KeySpec{Products: []authz.ProductName{"manual", "Weather", "Sun"}})
	if diff := cmp.Diff([]string{"Weather revoked", "manual approved", "Sun approved"}, statuses(c)); diff != "" {
		t.Errorf("products (-want +got):\n%s", diff)
	}
	if got := catalog.Attributes(c.Details); len(got) != 1 {
		t.Errorf("attributes %v, want them unchanged when none are given", got)
	}
	if raw, _ := c.Details.Get("scopes"); string(raw) != `["READ"]` {
		t.Errorf("scopes %s", raw)
	}
	_, _, err = b.UpdateKey(b.ctx(), by, org, "ann@example.com", "A", own, ledger.KeySpec{HasScopes: true, Scopes: []string{"READ", "ADMIN"}})
	wantError(t, "a scope of no product", err, ledger.Invalid, "keymanagement.service.InvalidScopes")
	if !strings.Contains(fmt.Sprint(err), "Scopes must be contained in [READ, WRITE]") {
		t.Errorf("the error says %v", err)
	}
	_, _, err = b.UpdateKey(b.ctx(), by, org, "ann@example.com", "A", own, ledger.KeySpec{Products: []authz.ProductName{"Rain"}})
	wantError(t, "an unknown product", err, ledger.NotFound, "keymanagement.service.apiproduct_doesnot_exist")

	// One whose flag was deleted is not opened again by naming it.
	b.set(b.space.KeyProduct(record, "Sun"), "-")
	update(ledger.KeySpec{Products: []authz.ProductName{"Sun"}})
	if r := b.reason(c.Key, "Sun"); r != authz.ProductNotOnKey {
		t.Errorf("a check answers %v, want %v", r, authz.ProductNotOnKey)
	}

	stale := by
	stale.IfMatch = c.Revision - 1
	_, _, err = b.UpdateKey(b.ctx(), stale, org, "ann@example.com", "A", own, ledger.KeySpec{})
	wantError(t, "a stale revision", err, ledger.Precondition, "keygate.if_match")
	_, _, err = b.DeleteKey(b.ctx(), stale, org, "ann@example.com", "A", own)
	wantError(t, "a stale revision", err, ledger.Precondition, "keygate.if_match")

	got, _, err := b.RemoveKeyProduct(b.ctx(), by, org, "ann@example.com", "A", own, "Weather")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"manual approved", "Sun revoked"}, statuses(got)); diff != "" {
		t.Errorf("after one was removed (-want +got):\n%s", diff)
	}
	_, _, err = b.RemoveKeyProduct(b.ctx(), by, org, "ann@example.com", "A", own, "Weather")
	wantError(t, "again", err, ledger.NotFound, "keygate.product_not_on_key")
	if left := b.under(b.space.IndexProductKeys(org, "Weather")); len(left) > 0 {
		t.Errorf("left in the index: %v", left)
	}

	gone, _, err := b.DeleteKey(b.ctx(), by, org, "ann@example.com", "A", own)
	if err != nil || gone.Key != c.Key || len(gone.Products) != 2 {
		t.Errorf("deleted %+v, %v", gone, err)
	}
	all, _ := b.dump()
	for path := range all {
		if strings.Contains(path, c.Key.String()) {
			t.Errorf("left: %s", path)
		}
	}
	a := must(b.DeveloperApp(b.ctx(), org, "ann@example.com", "A"))
	if len(a.Credentials) != 2 {
		t.Errorf("%d keys left, want 2", len(a.Credentials))
	}
	if raw := all[b.space.Details(keyspace.AppRecord(org, a.ID))]; strings.Contains(raw, c.Key.String()) {
		t.Errorf("the app still lists it: %s", raw)
	}
}

func TestProductsOfAKey(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	names := manyProducts(51)
	b.mustProducts(names...)
	a := b.mustApp("ann@example.com", "A")
	ref := a.Credentials[0].ConsumerKey
	for range 2 { // the second time nothing is new
		c, _, err := b.UpdateKey(b.ctx(), by, org, "ann@example.com", "A", ref, ledger.KeySpec{Products: names[:50], HasScopes: true, Scopes: []string{"READ"}})
		if err != nil || len(c.Products) != 50 {
			t.Fatalf("%d products, %v; want 50", len(c.Products), err)
		}
	}
	_, _, err := b.UpdateKey(b.ctx(), by, org, "ann@example.com", "A", ref, ledger.KeySpec{Products: names[50:]})
	wantError(t, "one more", err, ledger.Limit, "keygate.limit")
	if _, _, err := b.CreateApp(b.ctx(), by, org, "ann@example.com", ledger.AppSpec{Name: "B", Products: names[:50], Details: object(t, `{"scopes":["READ"]}`)}); err != nil {
		t.Errorf("an app with 50 products: %v", err)
	}
	if _, _, err := b.DeleteKey(b.ctx(), by, org, "ann@example.com", "A", ref); err != nil {
		t.Errorf("delete a key with 50 products: %v", err)
	}
	if _, _, err := b.DeleteApp(b.ctx(), by, org, "ann@example.com", "B"); err != nil {
		t.Errorf("delete an app whose key has 50 products: %v", err)
	}
	b.finish()
	if left := b.under(b.space.Watched() + org + "/keys/"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestKeysOfAnApp(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	a := b.mustApp("ann@example.com", "A")
	path := b.space.Details(keyspace.AppRecord(org, a.ID))
	value, _ := b.value(path)
	var ids []authz.KeyID
	for i := range ledger.MaxAppKeys - 1 {
		ids = append(ids, authz.KeyID{1, byte(i >> 8), byte(i)})
	}
	b.set(path, string(must(object(t, value).With("credentials", ids).MarshalJSON())))
	if _, _, err := b.CreateKey(b.ctx(), by, org, "ann@example.com", "A", ledger.KeySpec{}); err != nil {
		t.Errorf("the last key: %v", err)
	}
	_, _, err := b.CreateKey(b.ctx(), by, org, "ann@example.com", "A", ledger.KeySpec{})
	wantError(t, "one more", err, ledger.Limit, "keygate.limit")
	_, _, err = b.AddAppKey(b.ctx(), by, org, "ann@example.com", "A", ledger.AppSpec{})
	wantError(t, "one more with the app", err, ledger.Limit, "keygate.limit")
}

func TestReveal(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	made := b.mustApp("ann@example.com", "A")
	second, _, err := b.CreateKey(b.ctx(), by, org, "ann@example.com", "A", ledger.KeySpec{})
	if err != nil {
		t.Fatal(err)
	}
	a := must(b.DeveloperApp(b.ctx(), org, "ann@example.com", "A"))
	noted := len(b.audits())
	n, err := b.Reveal(b.ctx(), by, org, &a.Credentials[0], &a.Credentials[1])
	if n != 2 || err != nil {
		t.Fatalf("revealed %d, %v", n, err)
	}
	for i, want := range []ledger.Credential{second, made.Credentials[0]} {
		if got := a.Credentials[i]; got.ConsumerKey != want.ConsumerKey || got.ConsumerSecret != want.ConsumerSecret || got.ConsumerKey == "" {
			t.Errorf("key %d: not what was made", i)
		}
	}
	trail := b.audits()
	note := ""
	for _, r := range trail {
		if r.Action == "reveal" {
			note += r.Note
		}
	}
	if want := "2 keys: " + second.Key.String() + " " + made.Credentials[0].Key.String(); len(trail) != noted+1 || note != want {
		t.Errorf("%d records more, which say %q; want one that says %q", len(trail)-noted, note, want)
	}
	for _, r := range trail {
		if strings.Contains(r.Value(), second.ConsumerKey) || strings.Contains(r.Value(), second.ConsumerSecret) {
			t.Errorf("an audit record holds the key: %s", r.Action)
		}
	}
	// What is sealed opens in its own place only.
	c := must(b.Key(b.ctx(), org, "ann@example.com", "A", second.ConsumerKey))
	c.SealedKey = a.Credentials[1].SealedKey
	if n, err := b.Reveal(b.ctx(), by, org, &c); n != 0 || err != nil || c.ConsumerKey != "" || c.ConsumerSecret != "" {
		t.Errorf("another's sealed key: revealed %d, %v", n, err)
	}
	// The record of a change does not show what is sealed.
	if value, _ := b.value(b.space.Details(keyspace.KeyRecord(org, second.Key))); !strings.Contains(value, c.SealedSecret) {
		t.Error("the sealed secret is not stored: this test tests nothing")
	}
	for _, r := range trail {
		if strings.Contains(r.Value(), c.SealedSecret) {
			t.Errorf("an audit record shows what is sealed: %s", r.Value())
		}
	}
}

func TestTargetsAndExplain(t *testing.T) {
	b := newBook(t)
	d := b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	a := b.mustApp("ann@example.com", "A", "Weather")
	key := a.Credentials[0]
	explain := func(id authz.KeyID, product authz.ProductName) authz.Decision {
		t.Helper()
		got, rungs, err := b.Explain(b.ctx(), org, id, []authz.ProductName{product})
		if err != nil || len(rungs) == 0 {
			t.Fatalf("explain: %d rungs, %v", len(rungs), err)
		}
		if _, rev := b.dump(); got.Revision != rev {
			t.Errorf("revision %d, want %d", got.Revision, rev)
		}
		if want := b.reason(id, product); got.Reason != want {
			t.Errorf("explain says %v, a check %v", got.Reason, want)
		}
		return got
	}
	if got := explain(key.Key, "Weather"); got.Reason != authz.Allowed || got.App != a.ID || got.Developer != d.ID {
		t.Errorf("got %+v, want it allowed", got)
	}
	explain(key.Key, "Sun")
	explain(authz.KeyID{1}, "Weather")
	for _, tt := range []struct {
		name   string
		target func() (ledger.Target, error)
		want   authz.Reason
	}{
		{"developer", func() (ledger.Target, error) { return b.DeveloperTarget(b.ctx(), org, "ann@example.com") }, authz.DeveloperInactive},
		{"app", func() (ledger.Target, error) { return b.AppTarget(b.ctx(), org, "ann@example.com", "A") }, authz.AppRevoked},
		{"key", func() (ledger.Target, error) {
			return b.KeyTarget(b.ctx(), org, "ann@example.com", "A", key.ConsumerKey)
		}, authz.KeyRevoked},
		{"product", func() (ledger.Target, error) {
			return b.KeyProductTarget(b.ctx(), org, string(d.ID), "A", "sha256:"+key.Key.String(), "Weather")
		}, authz.ProductRevoked},
	} {
		target, err := tt.target()
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		b.mustSet(ledger.Revoke, target)
		if got := explain(key.Key, "Weather"); got.Reason != tt.want {
			t.Errorf("%s revoked: got %v, want %v", tt.name, got.Reason, tt.want)
		}
		b.mustSet(ledger.Approve, target)
		if got := explain(key.Key, "Weather"); got.Reason != authz.Allowed {
			t.Errorf("%s approved again: got %v", tt.name, got.Reason)
		}
	}
}

// The answer to a creation is kept under its Idempotency-Key, key and all; the
// second time nothing is created.
func TestCreateOnce(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	once := by
	once.Once = &ledger.Once{Key: "k-1", Request: [32]byte{1}, Body: func(result any) ([]byte, error) {
		return []byte(result.(ledger.App).Credentials[0].ConsumerKey), nil
	}}
	a, _, err := b.CreateApp(b.ctx(), once, org, "ann@example.com", ledger.AppSpec{Name: "A"})
	if err != nil {
		t.Fatal(err)
	}
	_, done, err := b.CreateApp(b.ctx(), once, org, "ann@example.com", ledger.AppSpec{Name: "A"})
	if err != nil || string(done.Replayed) != a.Credentials[0].ConsumerKey {
		t.Errorf("the second time: %d bytes, %v; want the key of the first", len(done.Replayed), err)
	}
	del := by
	del.Once = &ledger.Once{Key: "k-2", Body: func(any) ([]byte, error) { return []byte("gone"), nil }}
	for range 2 {
		if _, done, err = b.DeleteDeveloper(b.ctx(), del, org, "ann@example.com"); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if string(done.Replayed) != "gone" {
		t.Errorf("the second deletion answers %q, want that of the first", done.Replayed)
	}
}

func TestDryRunOfEntities(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	a := b.mustApp("ann@example.com", "A", "Weather")
	dry := by
	dry.DryRun = true
	before, rev := b.dump()
	for _, tt := range []struct {
		name  string
		call  func() (ledger.Done, error)
		stops int
	}{
		{"create an app", func() (ledger.Done, error) {
			_, d, err := b.CreateApp(b.ctx(), dry, org, "ann@example.com", ledger.AppSpec{Name: "B", Products: []authz.ProductName{"Weather"}})
			return d, err
		}, 0},
		{"delete the app", func() (ledger.Done, error) {
			_, d, err := b.DeleteApp(b.ctx(), dry, org, "ann@example.com", "A")
			return d, err
		}, 1},
		{"delete the key", func() (ledger.Done, error) {
			_, d, err := b.DeleteKey(b.ctx(), dry, org, "ann@example.com", "A", a.Credentials[0].ConsumerKey)
			return d, err
		}, 1},
		{"remove the product", func() (ledger.Done, error) {
			_, d, err := b.RemoveKeyProduct(b.ctx(), dry, org, "ann@example.com", "A", a.Credentials[0].ConsumerKey, "Weather")
			return d, err
		}, 1},
	} {
		done, err := tt.call()
		if err != nil || len(done.Stops) != tt.stops || len(done.Changes) == 0 {
			t.Errorf("%s: %d stops, %d changes, %v; want %d stops", tt.name, len(done.Stops), len(done.Changes), err, tt.stops)
		}
	}
	after, now := b.dump()
	if diff := cmp.Diff(before, after); diff != "" || now != rev {
		t.Errorf("a dry run wrote: %s", diff)
	}
}
