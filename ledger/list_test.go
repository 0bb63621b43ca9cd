package ledger_test

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// pages reads all pages of a list of apps.
func (b *book) pages(q ledger.AppsQuery) (ids []authz.AppID) {
	b.t.Helper()
	for range 1000 {
		page, err := b.Apps(b.ctx(), org, q)
		if err != nil {
			b.t.Fatalf("apps: %v", err)
		}
		if q.PageSize > 0 && len(page.Apps) > q.PageSize {
			b.t.Fatalf("a page of %d apps, want at most %d", len(page.Apps), q.PageSize)
		}
		for _, a := range page.Apps {
			ids = append(ids, a.ID)
		}
		if q.PageToken, q.StartKey = page.NextPageToken, ""; q.PageToken == "" {
			return ids
		}
	}
	b.t.Fatal("the list does not end")
	return nil
}

func TestListApps(t *testing.T) {
	b := newBook(t)
	b.mustProducts("Weather", "Sun")
	names := map[authz.AppID]string{}
	keys := map[string]ledger.Credential{}
	for _, email := range []string{"ann@example.com", "bob@example.com"} {
		b.mustDeveloper(email)
		for i := range 7 {
			product := authz.ProductName("Weather")
			if i%2 == 1 {
				product = "Sun"
			}
			a := b.mustApp(email, fmt.Sprintf("A%d", i), product)
			name := fmt.Sprintf("%s%d", email[:1], i)
			names[a.ID], keys[name] = name, a.Credentials[0]
			if i == 3 {
				b.mustSet(ledger.Revoke, ledger.Target{Record: keyspace.AppRecord(org, a.ID)}, ledger.Target{Record: keyspace.KeyRecord(org, a.Credentials[0].Key)})
			}
		}
	}
	if _, _, err := b.UpdateApp(b.ctx(), by, org, "bob@example.com", "A5", ledger.AppSpec{Products: []authz.ProductName{"Weather", "Sun"}}); err != nil {
		t.Fatal(err)
	}
	ids := b.pages(ledger.AppsQuery{})
	if len(ids) != 14 || !slices.IsSorted(ids) {
		t.Fatalf("%d apps, want 14 in the order of their ids", len(ids))
	}
	for _, tt := range []struct {
		name string
		q    ledger.AppsQuery
		want string
	}{
		{"all", ledger.AppsQuery{}, "a0 a1 a2 a3 a4 a5 a6 b0 b1 b2 b3 b4 b5 b6"},
		{"of a developer", ledger.AppsQuery{DeveloperEmail: "Bob@example.com"}, "b0 b1 b2 b3 b4 b5 b6"},
		{"of nobody", ledger.AppsQuery{DeveloperEmail: "eve@example.com"}, ""},
		{"with a product", ledger.AppsQuery{Product: "Sun"}, "a1 a3 a5 b1 b3 b5"},
		{"with another product", ledger.AppsQuery{Product: "Weather"}, "a0 a2 a4 a6 b0 b2 b4 b5 b6"},
		{"with a product, of a developer", ledger.AppsQuery{Product: "Sun", DeveloperEmail: "ann@example.com"}, "a1 a3 a5"},
		{"approved", ledger.AppsQuery{Status: authz.StatusApproved, DeveloperEmail: "ann@example.com"}, "a0 a1 a2 a4 a5 a6"},
		{"revoked", ledger.AppsQuery{Status: authz.StatusRevoked}, "a3 b3"},
		{"with a revoked key", ledger.AppsQuery{KeyStatus: authz.StatusRevoked}, "a3 b3"},
		{"by name", ledger.AppsQuery{Name: "A4"}, "a4 b4"},
		{"by a key", ledger.AppsQuery{Keys: []authz.KeyID{keys["b2"].Key}}, "b2"},
		{"by a key, of another developer", ledger.AppsQuery{Keys: []authz.KeyID{keys["b2"].Key}, DeveloperEmail: "ann@example.com"}, ""},
		{"by unknown keys", ledger.AppsQuery{Keys: []authz.KeyID{{1}, {2}}}, ""},
		{"by ids", ledger.AppsQuery{IDs: []authz.AppID{ids[0], "x", ids[5], ids[0]}}, names[ids[0]] + " " + names[ids[5]]},
	} {
		for _, size := range []int{0, 1, 3} {
			tt.q.PageSize = size
			found := b.pages(tt.q)
			if !slices.IsSorted(found) {
				t.Errorf("%s, by %d: not in the order of ids", tt.name, size)
			}
			var got []string
			for _, id := range found {
				got = append(got, names[id])
			}
			slices.Sort(got)
			want := strings.Fields(tt.want)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("%s, by %d: got %v, want %v", tt.name, size, got, want)
			}
		}
	}
	// The start key is the first one.
	page := must(b.Apps(b.ctx(), org, ledger.AppsQuery{StartKey: string(ids[9]), PageSize: 2, Expand: true}))
	if len(page.Apps) != 2 || page.Apps[0].ID != ids[9] || len(page.Apps[0].Credentials) == 0 || page.Apps[0].Email == "" {
		t.Errorf("from a start key: %+v", page.Apps)
	}
	_, err := b.Apps(b.ctx(), org, ledger.AppsQuery{StartKey: "x"})
	wantError(t, "unknown start key", err, ledger.NotFound, "keymanagement.service.app_doesnot_exist")
	for _, size := range []int{-1, 1001} {
		_, err := b.Apps(b.ctx(), org, ledger.AppsQuery{PageSize: size})
		wantError(t, "page size", err, ledger.Invalid, "keygate.invalid")
	}

	token := must(b.Apps(b.ctx(), org, ledger.AppsQuery{PageSize: 1})).NextPageToken
	keyToken := must(b.Credentials(b.ctx(), org, ledger.KeysQuery{PageSize: 1})).NextPageToken
	plain, _ := base64.RawURLEncoding.DecodeString(token)
	for name, q := range map[string]ledger.AppsQuery{
		"no base64":        {PageToken: "!"},
		"no JSON":          {PageToken: "AAAA"},
		"of keys":          {PageToken: keyToken},
		"of another query": {PageToken: token, Status: authz.StatusApproved},
		"with a blank":     {PageToken: base64.RawURLEncoding.EncodeToString(append(plain, ' '))},
		"with a start key": {PageToken: token, StartKey: string(ids[0])},
	} {
		_, err := b.Apps(b.ctx(), org, q)
		if e := fmt.Sprint(err); err == nil || !strings.HasPrefix(e, "?pageToken") && !strings.HasPrefix(e, "?startKey") {
			t.Errorf("a token %s: got %v, want it refused", name, err)
		}
	}
	_, err = b.Apps(b.ctx(), "other", ledger.AppsQuery{PageToken: token})
	wantError(t, "a token of another organization", err, ledger.Invalid, "keygate.page_token")
}

func TestListDevelopersAndTheirApps(t *testing.T) {
	b := newBook(t)
	var ids []string
	for _, email := range []string{"ann@example.com", "bob@example.com", "cid@example.com", "dan@example.com"} {
		ids = append(ids, string(b.mustDeveloper(email).ID))
	}
	slices.Sort(ids)
	for _, name := range []string{"C", "A", "B 1", "B"} {
		b.mustApp("bob@example.com", name)
	}
	cid := b.mustApp("cid@example.com", "A")
	list := func(q ledger.DeveloperQuery) (got []string) {
		t.Helper()
		for _, d := range must(b.Developers(b.ctx(), org, q)) {
			got = append(got, string(d.ID))
		}
		return got
	}
	if got := list(ledger.DeveloperQuery{}); !slices.Equal(got, ids) {
		t.Errorf("got %v, want %v", got, ids)
	}
	if got := list(ledger.DeveloperQuery{StartKey: ids[1], Count: 2}); !slices.Equal(got, ids[1:3]) {
		t.Errorf("from the second: got %v, want %v", got, ids[1:3])
	}
	second := must(b.Developer(b.ctx(), org, ids[1]))
	if got := list(ledger.DeveloperQuery{StartKey: strings.ToUpper(second.Email)}); !slices.Equal(got, ids[1:]) {
		t.Errorf("from an address: got %v, want %v", got, ids[1:])
	}
	if got := list(ledger.DeveloperQuery{IDs: []string{"bob@example.com", ids[0], "eve@example.com"}}); len(got) != 2 && len(got) != 1 {
		t.Errorf("by ids: got %v", got)
	}
	_, err := b.Developers(b.ctx(), org, ledger.DeveloperQuery{StartKey: "eve@example.com"})
	wantError(t, "unknown start key", err, ledger.NotFound, "keymanagement.service.developer_doesnot_exist")
	for app, want := range map[string]int{"A": 2, "B 1": 1, string(cid.ID): 1, "x": 0} {
		if got := list(ledger.DeveloperQuery{App: app}); len(got) != want {
			t.Errorf("with app %s: got %v, want %d", app, got, want)
		}
	}
	for _, d := range must(b.Developers(b.ctx(), org, ledger.DeveloperQuery{Expand: true, IDs: []string{"bob@example.com"}})) {
		if got := strings.Join(d.Apps, ", "); got != "A, B, B 1, C" {
			t.Errorf("names of apps: %s", got)
		}
	}

	apps := func(q ledger.AppQuery) string {
		t.Helper()
		var names []string
		for _, a := range must(b.DeveloperApps(b.ctx(), org, "bob@example.com", q)) {
			names = append(names, a.Name)
			if q.Expand != (len(a.Credentials) == 1) {
				t.Errorf("%s: %d credentials", a.Name, len(a.Credentials))
			}
		}
		return strings.Join(names, ", ")
	}
	if got := apps(ledger.AppQuery{}); got != "A, B, B 1, C" {
		t.Errorf("apps: %s", got)
	}
	if got := apps(ledger.AppQuery{StartKey: "B 1", Count: 1, Expand: true}); got != "B 1" {
		t.Errorf("one from B 1: %s", got)
	}
	// An entry of the index that stands for nothing takes nobody's place.
	b.set(b.space.IndexDeveloperApp(org, must(b.Developer(b.ctx(), org, "bob@example.com")).ID, "AA"), "nothing")
	if got := apps(ledger.AppQuery{Count: 2}); got != "A, B" {
		t.Errorf("two, with a wrong index: %s", got)
	}
	_, err = b.DeveloperApps(b.ctx(), org, "bob@example.com", ledger.AppQuery{StartKey: "X"})
	wantError(t, "unknown start key", err, ledger.NotFound, "keymanagement.service.app_doesnot_exist")
}

func TestListProducts(t *testing.T) {
	b := newBook(t)
	b.mustProducts("C", "A", "B", "D")
	if _, _, err := b.SetAttributes(b.ctx(), by, org, ledger.Holder{Product: "B"}, []catalog.Attribute{{Name: "access", Value: "public"}}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		q    ledger.ProductQuery
		want string
	}{
		{ledger.ProductQuery{}, "A B C D"},
		{ledger.ProductQuery{StartKey: "B", Count: 2}, "B C"},
		{ledger.ProductQuery{AttributeName: "access"}, "B"},
		{ledger.ProductQuery{AttributeName: "access", AttributeValue: "public"}, "B"},
		{ledger.ProductQuery{AttributeName: "access", AttributeValue: "private"}, ""},
	} {
		var got []string
		for _, p := range must(b.Products(b.ctx(), org, tt.q)) {
			got = append(got, string(p.Name))
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%+v: got %v, want %s", tt.q, got, tt.want)
		}
	}
	_, err := b.Products(b.ctx(), org, ledger.ProductQuery{StartKey: "X"})
	wantError(t, "unknown start key", err, ledger.NotFound, "keymanagement.service.apiproduct_doesnot_exist")
}

// A list is read a part at a time, and a record may lie across two of them.
func TestLongLists(t *testing.T) {
	b := newBook(t)
	d := b.mustDeveloper("ann@example.com")
	const apps = 1100
	var pairs []string
	// These shift the others, so that a part ends within a record.
	first := keyspace.AppRecord(org, "app-")
	pairs = append(pairs, b.space.Details(first), fmt.Sprintf(`{"v":1,"name":"N","developerId":%q}`, d.ID), b.space.Folder(first)+"other", "", b.space.Folder(first)+"others", "")
	pairs = append(pairs, b.space.KeyProduct(keyspace.KeyRecord(org, authz.KeyID{}), "P"), "approved")
	for i := range apps {
		r := keyspace.AppRecord(org, authz.AppID(fmt.Sprintf("app-%05d", i)))
		pairs = append(pairs, b.space.Details(r), fmt.Sprintf(`{"v":1,"name":"N%d","developerId":%q}`, i, d.ID))
		if i%3 == 0 {
			pairs = append(pairs, b.space.Status(r), "approved", b.space.Folder(r)+"other", "")
		}
		key := keyspace.KeyRecord(org, authz.KeyID{byte(i >> 8), byte(i)})
		pairs = append(pairs, b.space.Details(key), fmt.Sprintf(`{"v":1,"appId":"app-%05d","developerId":%q,"expiresAt":-1}`, i, d.ID), b.space.Status(key), "approved")
	}
	b.putAll(pairs...)
	if got := b.pages(ledger.AppsQuery{}); len(got) != apps+1 || len(slices.Compact(got)) != apps+1 {
		t.Errorf("%d apps, want %d, each once", len(got), apps+1)
	}
	if got := b.pages(ledger.AppsQuery{Status: authz.StatusApproved, PageSize: 100}); len(got) != (apps+2)/3 {
		t.Errorf("%d approved apps, want %d", len(got), (apps+2)/3)
	}
	seen := map[authz.KeyID]bool{}
	for q := (ledger.KeysQuery{Status: authz.StatusApproved}); ; {
		page := must(b.Credentials(b.ctx(), org, q))
		for _, k := range page.Keys {
			seen[k.Credential.Key] = true
		}
		if q.PageToken = page.NextPageToken; q.PageToken == "" {
			break
		}
	}
	if len(seen) != apps {
		t.Errorf("%d keys, want %d", len(seen), apps)
	}
}

// A page is found by looking at so many values at most. What is found behind
// them is on a later page.
func TestRareAppsInALongList(t *testing.T) {
	b := newBook(t)
	d := b.mustDeveloper("ann@example.com")
	b.mustProducts("Weather")
	const apps = 10_100
	var pairs []string
	for i := range apps {
		r := keyspace.AppRecord(org, authz.AppID(fmt.Sprintf("app-%05d", i)))
		pairs = append(pairs, b.space.Details(r), fmt.Sprintf(`{"v":1,"name":"N%d","developerId":%q}`, i, d.ID))
	}
	for i := range 2001 { // of keys that are gone: too many to look at each
		pairs = append(pairs, b.space.IndexProductKeys(org, "Weather")+authz.KeyID{byte(i >> 8), byte(i)}.String(), "")
	}
	b.putAll(pairs...)
	q := ledger.AppsQuery{Name: fmt.Sprintf("N%d", apps-1)}
	if page := must(b.Apps(b.ctx(), org, q)); len(page.Apps) != 0 || page.NextPageToken == "" {
		t.Errorf("%d apps, token %q; want none, and to go on", len(page.Apps), page.NextPageToken)
	}
	if got := b.pages(q); len(got) != 1 {
		t.Errorf("%d apps, want 1", len(got))
	}
	a := b.mustApp("ann@example.com", "A", "Weather")
	if got := b.pages(ledger.AppsQuery{Product: "Weather", DeveloperEmail: "ann@example.com"}); len(got) != 1 || got[0] != a.ID {
		t.Errorf("with the product: %v, want %s", got, a.ID)
	}
	if got := must(b.Apps(b.ctx(), org, ledger.AppsQuery{Product: "Weather", StartKey: string(a.ID), PageSize: 1})); len(got.Apps) != 1 || got.Apps[0].ID != a.ID {
		t.Errorf("with the product, from there: %v, want %s", got.Apps, a.ID)
	}
	_, _, err := b.DeleteProduct(b.ctx(), by, org, "Weather")
	wantError(t, "a product with many keys", err, ledger.Conflict, "keygate.product_in_use")
}

// putAll puts pairs of path and value, many at a time.
func (b *book) putAll(pairs ...string) {
	b.t.Helper()
	for part := range slices.Chunk(pairs, 200) {
		var ops []clientv3.Op
		for p := range slices.Chunk(part, 2) {
			ops = append(ops, clientv3.OpPut(p[0], p[1]))
		}
		if _, err := b.kv.Txn(b.ctx()).Then(ops...).Commit(); err != nil {
			b.t.Fatalf("put: %v", err)
		}
	}
}
