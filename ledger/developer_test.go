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

func TestDevelopers(t *testing.T) {
	b := newBook(t)
	d, done, err := b.CreateDeveloper(b.ctx(), by, org, developer("Ann@Example.com"))
	if err != nil {
		t.Fatal(err)
	}
	if d.Email != "ann@example.com" || d.Status != authz.StatusActive || d.ID == "" || d.Revision != done.Revision || d.LastModified != b.clock.Load() {
		t.Errorf("created: %+v", d)
	}
	path := b.space.Details(keyspace.DeveloperRecord(org, d.ID))
	value, _ := b.value(path)
	want := fmt.Sprintf(`{"v":1,"attributes":[],"createdAt":1800000000000,"createdBy":"ann","developerId":%q,"email":"ann@example.com",`+
		`"firstName":"Ann","lastModifiedAt":1800000000000,"lastModifiedBy":"ann","lastName":"Lee","userName":"ann"}`, d.ID)
	if value != want {
		t.Errorf("stored\n%s\nwant\n%s", value, want)
	}
	for _, ref := range []string{"ann@example.com", "ANN@example.com", string(d.ID)} {
		got := must(b.Developer(b.ctx(), org, ref))
		if diff := cmp.Diff(d, got, cmp.AllowUnexported(ledger.Developer{}), ignoreInternal); diff != "" {
			t.Errorf("%s (-created +read):\n%s", ref, diff)
		}
	}
	_, _, err = b.CreateDeveloper(b.ctx(), by, org, developer("ANN@example.com"))
	wantError(t, "the same address again", err, ledger.Exists, "developer.service.DeveloperAlreadyExists")
	_, _, err = b.CreateDeveloper(b.ctx(), by, org, developer("nobody"))
	wantError(t, "no address", err, ledger.Invalid, "keygate.invalid")

	// Members that nobody here knows survive, and so does what a client must not set.
	b.set(path, strings.Replace(value, `"v":1,`, `"v":1,"unknown":{"a":[1]},`, 1))
	b.mustDeveloper("bob@example.com")
	b.clock.Add(1000)
	change := developer("Ann.Lee@example.com")
	change.Details = change.Details.With("userName", "al").With("createdBy", "eve").With("developerId", "x").With("status", "inactive").With("v", 2)
	d2, done, err := b.UpdateDeveloper(b.ctx(), by, org, "ann@example.com", change)
	if err != nil {
		t.Fatal(err)
	}
	value, rev := b.value(path)
	want = fmt.Sprintf(`{"v":1,"unknown":{"a":[1]},"attributes":[],"createdAt":1800000000000,"createdBy":"ann","developerId":%q,"email":"ann.lee@example.com",`+
		`"firstName":"Ann","lastModifiedAt":1800000001000,"lastModifiedBy":"ann","lastName":"Lee","userName":"al"}`, d.ID)
	if value != want {
		t.Errorf("after the update\n%s\nwant\n%s", value, want)
	}
	if d2.Email != "ann.lee@example.com" || d2.Revision != rev || done.Revision != rev || d2.Status != authz.StatusActive {
		t.Errorf("updated: %+v, at revision %d", d2, rev)
	}
	_, err = b.Developer(b.ctx(), org, "ann@example.com")
	wantError(t, "by the old address", err, ledger.NotFound, "developer.service.DeveloperIdDoesNotExist")
	if got := must(b.Developer(b.ctx(), org, "ann.lee@example.com")); got.ID != d.ID {
		t.Errorf("by the new address: %s, want %s", got.ID, d.ID)
	}
	_, _, err = b.UpdateDeveloper(b.ctx(), by, org, "ann.lee@example.com", developer("bob@example.com"))
	wantError(t, "another's address", err, ledger.Exists, "developer.service.DeveloperAlreadyExists")
	b.mustDeveloper("ann@example.com") // it is free again

	stale := by
	stale.IfMatch = rev - 1
	_, _, err = b.UpdateDeveloper(b.ctx(), stale, org, "ann.lee@example.com", developer(""))
	wantError(t, "a stale revision", err, ledger.Precondition, "keygate.if_match")
	stale.IfMatch = rev
	if _, _, err := b.UpdateDeveloper(b.ctx(), stale, org, string(d.ID), developer("")); err != nil {
		t.Errorf("the current revision: %v", err)
	}
	if got := must(b.Developer(b.ctx(), org, string(d.ID))); got.Email != "ann.lee@example.com" {
		t.Errorf("an update without an address left %q", got.Email)
	}
}

// ignoreInternal is for comparing what was answered with what is read.
var ignoreInternal = cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".detailsRevision" }, cmp.Ignore())

func TestDeveloperWithoutAddress(t *testing.T) {
	b := newBook(t)
	b.mustLoad(ledger.ImportOptions{}, weather())
	d := must(b.Developer(b.ctx(), org, "Z2S37rxX2Suzkwtg"))
	if d.Email != "" || len(d.Apps) != 1 || d.Apps[0] != "AnotherTestApp" {
		t.Errorf("got %+v, want no address and one app", d)
	}
	if all := must(b.Developers(b.ctx(), org, ledger.DeveloperQuery{})); len(all) != 1 {
		t.Errorf("%d developers listed, want it", len(all))
	}
	b.mustProducts("P")
	b.mustApp("Z2S37rxX2Suzkwtg", "B", "P")
	if _, _, err := b.UpdateDeveloper(b.ctx(), by, org, "Z2S37rxX2Suzkwtg", developer("w@example.com")); err != nil {
		t.Fatal(err)
	}
	if d := must(b.Developer(b.ctx(), org, "w@example.com")); d.ID != "Z2S37rxX2Suzkwtg" || len(d.Apps) != 2 {
		t.Errorf("after it got an address: %+v", d)
	}
}

func TestDeleteDeveloper(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustDeveloper("bob@example.com")
	b.mustProducts("Weather", "manual")
	bobs := b.mustApp("bob@example.com", "A", "Weather")
	var keys []authz.KeyID
	for i := range 3 {
		a := b.mustApp("ann@example.com", fmt.Sprintf("A%d", i), "Weather", "manual")
		keys = append(keys, a.Credentials[0].Key)
	}
	before, _ := b.dump()
	dry := by
	dry.DryRun = true
	_, done, err := b.DeleteDeveloper(b.ctx(), dry, org, "ann@example.com")
	if err != nil || len(done.Stops) != 3 || len(done.Changes) == 0 {
		t.Errorf("dry run: %d stops, %d changes, %v; want 3 keys to stop", len(done.Stops), len(done.Changes), err)
	}
	if after, _ := b.dump(); cmp.Diff(before, after) != "" {
		t.Error("the dry run wrote")
	}
	stale := by
	stale.IfMatch = 1
	_, _, err = b.DeleteDeveloper(b.ctx(), stale, org, "ann@example.com")
	wantError(t, "a stale revision", err, ledger.Precondition, "keygate.if_match")
	d, _, err := b.DeleteDeveloper(b.ctx(), by, org, "ann@example.com")
	if err != nil || d.Email != "ann@example.com" || len(d.Apps) != 3 {
		t.Fatalf("deleted %+v, %v", d, err)
	}
	for _, k := range keys {
		if r := b.reason(k, "Weather"); r != authz.KeyUnknown {
			t.Errorf("key %s: a check answers %v, want %v", k, r, authz.KeyUnknown)
		}
	}
	if r := b.reason(bobs.Credentials[0].Key, "Weather"); r != authz.Allowed {
		t.Errorf("the other developer's key: %v", r)
	}
	after, _ := b.dump()
	for path := range after {
		if strings.Contains(path, string(d.ID)) || strings.Contains(path, "ann@") {
			t.Errorf("left: %s", path)
		}
		for _, k := range keys {
			if strings.Contains(path, k.String()) {
				t.Errorf("left: %s", path)
			}
		}
	}
	_, _, err = b.DeleteDeveloper(b.ctx(), by, org, "ann@example.com")
	wantError(t, "again", err, ledger.NotFound, "developer.service.DeveloperIdDoesNotExist")
}

func TestDeleteDeveloperWithManyApps(t *testing.T) {
	for _, cut := range []bool{false, true} {
		b := newBook(t)
		b.mustProducts("Weather")
		d := b.mustDeveloper("ann@example.com")
		const apps = 80
		var keys []authz.KeyID
		for i := range apps {
			a := b.mustApp("ann@example.com", fmt.Sprintf("A%02d", i), "Weather")
			keys = append(keys, a.Credentials[0].Key)
		}
		if got := must(b.Developer(b.ctx(), org, "ann@example.com")); len(got.Apps) != apps {
			t.Fatalf("%d names, want %d", len(got.Apps), apps)
		}
		l, ctx := b.Ledger, b.ctx()
		if cut {
			l, ctx = b.cutOff()
		}
		if _, _, err := l.DeleteDeveloper(ctx, by, org, "ann@example.com"); err != nil {
			t.Fatal(err)
		}
		if cut {
			left := 0
			decide := b.decider(b.snapshot())
			for _, key := range keys {
				if r := decide(key, "Weather"); r == authz.Allowed {
					t.Errorf("key %s: a check answers %v", key, r)
				} else if r != authz.KeyUnknown {
					left++
				}
			}
			if left == 0 {
				t.Error("all apps went at once: want more of them for this test")
			}
			b.finish()
		}
		left, _ := b.records()
		for path := range left {
			if path != b.space.Details(keyspace.ProductRecord(org, "Weather")) {
				t.Errorf("left of developer %s: %s", d.ID, path)
			}
		}
	}
}

// finish what was left, as a server does a while later.
func (b *book) finish() {
	b.t.Helper()
	b.clock.Add(60_000)
	for {
		n, err := b.Finish(b.ctx())
		if err != nil {
			b.t.Fatalf("finish: %v", err)
		}
		if n == 0 {
			return
		}
	}
}

func TestAttributes(t *testing.T) {
	b := newBook(t)
	b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	b.mustApp("ann@example.com", "A", "Weather")
	for _, of := range []ledger.Holder{{Developer: "ann@example.com"}, {Developer: "ann@example.com", App: "A"}, {Product: "Weather"}} {
		read := func() (all []catalog.Attribute, rev int64) {
			switch {
			case of.Product != "":
				p := must(b.Product(b.ctx(), org, "Weather"))
				return catalog.Attributes(p.Details), p.Revision
			case of.App != "":
				a := must(b.DeveloperApp(b.ctx(), org, of.Developer, of.App))
				return catalog.Attributes(a.Details), a.Revision
			}
			d := must(b.Developer(b.ctx(), org, of.Developer))
			return catalog.Attributes(d.Details), d.Revision
		}
		want := func(what string, want ...catalog.Attribute) {
			t.Helper()
			got, _ := read()
			if diff := cmp.Diff(append([]catalog.Attribute{}, want...), got); diff != "" {
				t.Errorf("%+v: %s (-want +got):\n%s", of, what, diff)
			}
		}
		x, y := catalog.Attribute{Name: "x", Value: "1"}, catalog.Attribute{Name: "y"}
		if _, _, err := b.SetAttributes(b.ctx(), by, org, of, []catalog.Attribute{x, y}); err != nil {
			t.Fatal(err)
		}
		want("set", x, y)
		x.Value = "2"
		if _, _, err := b.SetAttribute(b.ctx(), by, org, of, x); err != nil {
			t.Fatal(err)
		}
		want("one changed", x, y)
		if a, _, err := b.DeleteAttribute(b.ctx(), by, org, of, "x"); err != nil || a != x {
			t.Errorf("deleted %v, %v", a, err)
		}
		want("one deleted", y)
		_, rev := read()
		stale := by
		stale.IfMatch = rev - 1
		_, _, err := b.SetAttribute(b.ctx(), stale, org, of, x)
		wantError(t, "a stale revision", err, ledger.Precondition, "keygate.if_match")
		for i := range catalog.MaxAttributes - 1 {
			if _, _, err := b.SetAttribute(b.ctx(), by, org, of, catalog.Attribute{Name: fmt.Sprint(i)}); err != nil {
				t.Fatal(err)
			}
		}
		_, _, err = b.SetAttribute(b.ctx(), by, org, of, x)
		wantError(t, "one too many", err, ledger.Limit, "keygate.limit")
		_, _, err = b.SetAttributes(b.ctx(), by, org, of, []catalog.Attribute{x, x})
		wantError(t, "one twice", err, ledger.Invalid, "keygate.invalid")
		if _, _, err := b.SetAttributes(b.ctx(), by, org, of, nil); err != nil {
			t.Fatal(err)
		}
		want("none")
	}
}

func TestProducts(t *testing.T) {
	b := newBook(t)
	p, _, err := b.CreateProduct(b.ctx(), by, org, catalog.Product{Name: "Weather Product", Details: object(t, `{"displayName":"W","quota":"5","name":"x","x-own":1}`)})
	if err != nil {
		t.Fatal(err)
	}
	path := b.space.Details(keyspace.ProductRecord(org, "Weather Product"))
	if value, rev := b.value(path); rev != p.Revision ||
		value != `{"v":1,"attributes":[],"createdAt":1800000000000,"createdBy":"ann","displayName":"W","lastModifiedAt":1800000000000,"lastModifiedBy":"ann","name":"Weather Product","quota":"5","x-own":1}` {
		t.Errorf("stored at %d: %s", rev, value)
	}
	_, _, err = b.CreateProduct(b.ctx(), by, org, product("Weather Product", "auto"))
	wantError(t, "again", err, ledger.Exists, "keymanagement.service.apiproduct_already_exists")
	_, _, err = b.CreateProduct(b.ctx(), by, org, product("a/b", "auto"))
	wantError(t, "a name with a slash", err, ledger.Invalid, "keygate.invalid")

	b.clock.Add(1)
	if _, _, err := b.UpdateProduct(b.ctx(), by, org, catalog.Product{Name: "Weather Product", Details: object(t, `{"displayName":"V","approvalType":"manual"}`)}); err != nil {
		t.Fatal(err)
	}
	if value, _ := b.value(path); value != `{"v":1,"attributes":[],"createdAt":1800000000000,"createdBy":"ann","displayName":"V","lastModifiedAt":1800000000001,"lastModifiedBy":"ann","name":"Weather Product","x-own":1,"approvalType":"manual"}` {
		t.Errorf("after the update: %s", value)
	}
	b.mustDeveloper("ann@example.com")
	a := b.mustApp("ann@example.com", "A", "Weather Product")
	if s := a.Credentials[0].Products[0].Status; s != authz.StatusPending {
		t.Errorf("a manual product is %v on a new key, want pending", s)
	}
	if _, _, err := b.UpdateProduct(b.ctx(), by, org, catalog.Product{Name: "Weather Product", Details: object(t, `{"displayName":"V"}`)}); err != nil {
		t.Fatal(err)
	}
	if r := b.reason(a.Credentials[0].Key, "Weather Product"); r != authz.ProductPending {
		t.Errorf("after the product became automatic a check answers %v, want %v", r, authz.ProductPending)
	}

	holders := must(b.ProductHolders(b.ctx(), org, "Weather Product"))
	if diff := cmp.Diff([]ledger.ProductHolder{{App: a.ID, Key: a.Credentials[0].Key, Status: authz.StatusPending}}, holders); diff != "" {
		t.Errorf("holders (-want +got):\n%s", diff)
	}
	_, _, err = b.DeleteProduct(b.ctx(), by, org, "Weather Product")
	wantError(t, "one that a key has", err, ledger.Conflict, "keygate.product_in_use")
	if !strings.Contains(fmt.Sprint(err), "1 key has it") {
		t.Errorf("the error says %q, want how many keys", err)
	}
	// Entries of the index that stand for nothing do not keep it.
	b.set(b.space.IndexProductKeys(org, "Weather Product")+strings.Repeat("0", 64), "")
	if _, _, err := b.DeleteApp(b.ctx(), by, org, "ann@example.com", "A"); err != nil {
		t.Fatal(err)
	}
	if got, _, err := b.DeleteProduct(b.ctx(), by, org, "Weather Product"); err != nil || got.Name != "Weather Product" {
		t.Errorf("deleted %q, %v", got.Name, err)
	}
	if left := b.under(b.space.Index(org) + "products/"); len(left) > 0 {
		t.Errorf("left in the index: %v", left)
	}
}
