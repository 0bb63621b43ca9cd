package ledger_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/apigee"
	"keygate/authz"
	"keygate/catalog"
	"keygate/examples/quickstart"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

const (
	org    = "acme"
	secret = "SXg8JizqeTA8j3gX"

	appFolder  = "/keygate/acme/apps/6ed3a4d1-4733-439a-80a4-0d71149ec9ad/"
	devFolder  = "/keygate/acme/developers/Z2S37rxX2Suzkwtg/"
	indexStart = "/keygate.index/acme/"
)

var keyFolder = "/keygate/acme/keys/" + quickstart.KeyID(quickstart.WeatherKey).String() + "/"

// store is a real etcd and one space in it.
type store struct {
	t     *testing.T
	kv    *clientv3.Client
	space keyspace.Space
}

func newStore(t *testing.T) *store {
	t.Helper()
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return &store{t: t, kv: etcdtest.Start(t).Client(t), space: space}
}

func (s *store) ctx() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	s.t.Cleanup(cancel)
	return ctx
}

// dump is everything in the store, and its revision.
func (s *store) dump() (map[string]string, int64) {
	s.t.Helper()
	resp, err := s.kv.Get(s.ctx(), "/", clientv3.WithPrefix())
	if err != nil {
		s.t.Fatalf("dump: %v", err)
	}
	all := map[string]string{}
	for _, e := range resp.Kvs {
		all[string(e.Key)] = string(e.Value)
	}
	return all, resp.Header.Revision
}

// set puts pairs of path and value; the value "-" deletes.
func (s *store) set(pairs ...string) {
	s.t.Helper()
	for p := range slices.Chunk(pairs, 2) {
		var err error
		if p[1] == "-" {
			_, err = s.kv.Delete(s.ctx(), p[0])
		} else {
			_, err = s.kv.Put(s.ctx(), p[0], p[1])
		}
		if err != nil {
			s.t.Fatalf("set %s: %v", p[0], err)
		}
	}
}

func (s *store) clear() {
	s.t.Helper()
	if _, err := s.kv.Delete(s.ctx(), "/", clientv3.WithPrefix()); err != nil {
		s.t.Fatalf("clear: %v", err)
	}
}

// load imports texts, each as an input of its own, with a fresh Importer.
func (s *store) load(kv clientv3.KV, opts ledger.ImportOptions, texts ...string) ([]ledger.Outcome, error) {
	im := ledger.NewImporter(ledger.ImporterConfig{KV: kv, Space: s.space, Organization: org, Options: opts})
	var all []ledger.Outcome
	for i, text := range texts {
		in := apigee.NewReader(apigee.ReaderConfig{Name: fmt.Sprintf("f%d", i+1)}, strings.NewReader(text))
		if err := im.Import(s.ctx(), in, func(o ledger.Outcome) { all = append(all, o) }); err != nil {
			return all, err
		}
	}
	return all, nil
}

func (s *store) mustLoad(opts ledger.ImportOptions, texts ...string) []ledger.Outcome {
	s.t.Helper()
	all, err := s.load(s.kv, opts, texts...)
	if err != nil {
		s.t.Fatalf("import: %v", err)
	}
	return all
}

// lines shows outcomes briefly, in an order of their own.
func lines(all []ledger.Outcome) (l []string) {
	for _, o := range all {
		for _, it := range o.Items {
			place := o.Place
			if it.Place != nil {
				place = *it.Place
			}
			line := fmt.Sprintf("%s %s", place, it.Action)
			for _, part := range []string{short(it.Path), it.Stored, it.Submitted, it.Reason} {
				if part != "" {
					line += " | " + part
				}
			}
			l = append(l, line)
		}
	}
	slices.Sort(l)
	return l
}

// short replaces what is long in the page's app.
func short(path string) string {
	return strings.NewReplacer(keyFolder, "KEY/", appFolder, "APP/", devFolder, "DEVELOPER/").Replace(path)
}

// reason that a check would answer with.
func (s *store) reason(id authz.KeyID, product authz.ProductName) authz.Reason {
	s.t.Helper()
	a := authz.Authorizer{Source: source{s}}
	return a.Decide(s.ctx(), authz.Request{Organization: org, KeyID: id, Products: []authz.ProductName{product}}).Reason
}

// source reads the records as they are at one revision.
type source struct{ s *store }

type current struct{}

func (current) Valid() bool { return true }

func (c source) Records(ctx context.Context, org authz.Organization, id authz.KeyID) (authz.Records, error) {
	all, rev := c.s.dump()
	under := func(r keyspace.Record) (entries []keyspace.Entry) {
		for _, path := range slices.Sorted(maps.Keys(all)) {
			if strings.HasPrefix(path, c.s.space.Folder(r)) {
				entries = append(entries, keyspace.Entry{Key: path, Value: []byte(all[path])})
			}
		}
		return entries
	}
	r := authz.Records{Revision: rev, Proof: current{}}
	if r.Credential = c.s.space.Credential(under(keyspace.KeyRecord(org, id))); r.Credential.Exists {
		r.App = c.s.space.App(under(keyspace.AppRecord(org, r.Credential.App)))
	}
	if r.App.Exists {
		r.Developer = c.s.space.Developer(under(keyspace.DeveloperRecord(org, r.App.Developer)))
	}
	return r, nil
}

func weather() string { return string(quickstart.Read(quickstart.WeatherFile)) }
func orders() string  { return string(quickstart.Read(quickstart.OrdersFile)) }

func TestPagesApp(t *testing.T) {
	s := newStore(t)
	got := lines(s.mustLoad(ledger.ImportOptions{}, weather()))
	if diff := cmp.Diff([]string{
		"f1:1:1 created | APP/app",
		"f1:1:1 created | DEVELOPER/developer",
		"f1:1:1 created | KEY/credential",
	}, got); diff != "" {
		t.Errorf("outcome (-want +got):\n%s", diff)
	}
	stored, rev := s.records()
	id := quickstart.KeyID(quickstart.WeatherKey).String()
	want := map[string]string{
		appFolder + "app": `{"v":1,"accessType":"","appFamily":"default","appId":"6ed3a4d1-4733-439a-80a4-0d71149ec9ad",` +
			`"attributes":[{"name":"DisplayName","value":"AnotherTestApp"},{"name":"Notes","value":""}],"callbackUrl":"",` +
			`"createdAt":1415728893126,"createdBy":"wwitman@apigee.com","credentials":["` + id + `"],"developerId":"Z2S37rxX2Suzkwtg",` +
			`"lastModifiedAt":1420682967414,"lastModifiedBy":"wwitman@apigee.com","name":"AnotherTestApp","scopes":[]}`,
		appFolder + "status":                   "approved",
		devFolder + "developer":                `{"v":1,"developerId":"Z2S37rxX2Suzkwtg"}`,
		devFolder + "status":                   "active",
		keyFolder + "credential":               `{"v":1,"appId":"6ed3a4d1-4733-439a-80a4-0d71149ec9ad","developerId":"Z2S37rxX2Suzkwtg","hint":"KLhb","apiProducts":[{"apiproduct":"Weather-Product"}],"attributes":[],"expiresAt":-1,"issuedAt":1415728893154,"scopes":[]}`,
		keyFolder + "status":                   "approved",
		keyFolder + "products/Weather-Product": "revoked",
		indexStart + "apps/6ed3a4d1-4733-439a-80a4-0d71149ec9ad/keys/" + id: "",
		indexStart + "developers/Z2S37rxX2Suzkwtg/apps/AnotherTestApp":      "6ed3a4d1-4733-439a-80a4-0d71149ec9ad",
		indexStart + "products/Weather-Product/keys/" + id:                  "",
	}
	if diff := cmp.Diff(want, stored); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
	if r := s.reason(quickstart.KeyID(quickstart.WeatherKey), "Weather-Product"); r != authz.ProductRevoked {
		t.Errorf("a check answers %v, want %v", r, authz.ProductRevoked)
	}

	// Again: nothing is written.
	got = lines(s.mustLoad(ledger.ImportOptions{}, weather()))
	if diff := cmp.Diff([]string{
		"f1:1:1 unchanged | APP/app",
		"f1:1:1 unchanged | DEVELOPER/developer",
		"f1:1:1 unchanged | KEY/credential",
	}, got); diff != "" {
		t.Errorf("second outcome (-want +got):\n%s", diff)
	}
	s.mustLoad(ledger.ImportOptions{Overwrite: true}, weather())
	if _, again := s.dump(); again != rev {
		t.Errorf("revision %d after importing the same again, want %d: something was written", again, rev)
	}

	// The other rendering says the same with other words: nothing is written.
	s.mustLoad(ledger.ImportOptions{}, strings.NewReplacer(
		"1415728893126", `"1415728893126"`, "1420682967414", `"1420682967414"`, "1415728893154", `"1415728893154"`, "-1", `"-1"`,
		`"revoked"`, `"Revoked"`).Replace(weather()))
	if _, again := s.dump(); again != rev {
		t.Errorf("revision %d after importing the rendering of X, want %d: something was written", again, rev)
	}
}

// A status in the store is never opened, and not closed either, unless that is
// asked for. One that has been deleted is revoked.
func TestStatusesStay(t *testing.T) {
	s := newStore(t)
	approved := strings.ReplaceAll(weather(), `"revoked"`, `"approved"`)
	unchanged := []string{"f1:1:1 unchanged | APP/app", "f1:1:1 unchanged | DEVELOPER/developer", "f1:1:1 unchanged | KEY/credential"}
	for _, tt := range []struct {
		name, file string
		change     []string // pairs of path and value, "-" deletes
		want       []string // lines that differ from unchanged
		overwrite  []string // the same with Overwrite
		keptStays  bool     // with Overwrite too
	}{
		{"product revoked", approved, []string{keyFolder + "products/Weather-Product", "revoked"},
			[]string{"kept | KEY/products/Weather-Product | revoked | approved | the status in the store stays"},
			[]string{"changed | KEY/credential", "changed | KEY/products/Weather-Product | revoked | approved"}, false},
		{"key revoked", approved, []string{keyFolder + "status", "revoked"},
			[]string{"kept | KEY/status | revoked | approved | the status in the store stays"},
			[]string{"changed | KEY/credential", "changed | KEY/status | revoked | approved"}, false},
		{"app revoked", approved, []string{appFolder + "status", "revoked"},
			[]string{"kept | APP/status | revoked | approved | the status in the store stays"},
			[]string{"changed | APP/app", "changed | APP/status | revoked | approved"}, false},
		{"developer inactive", approved, []string{devFolder + "status", "inactive"}, nil, nil, true},
		{"file revokes the product", weather(), nil,
			[]string{"kept | KEY/products/Weather-Product | approved | revoked | the status in the store stays"},
			[]string{"changed | KEY/credential", "changed | KEY/products/Weather-Product | approved | revoked"}, false},
		{"file revokes the key", strings.Replace(approved, `"status": "approved"`+"\n    }", `"status": "revoked"`+"\n    }", 1), nil,
			[]string{"kept | KEY/status | approved | revoked | the status in the store stays"},
			[]string{"changed | KEY/credential", "changed | KEY/status | approved | revoked"}, false},
		{"product's status deleted", approved, []string{keyFolder + "products/Weather-Product", "-"},
			[]string{"kept | KEY/products/Weather-Product | absent | approved | the status in the store stays"},
			[]string{"changed | KEY/credential", "changed | KEY/products/Weather-Product | absent | approved"}, false},
		{"key's status deleted", approved, []string{keyFolder + "status", "-"},
			[]string{"kept | KEY/status | absent | approved | the status in the store stays"},
			[]string{"changed | KEY/credential", "changed | KEY/status | absent | approved"}, false},
		{"app's status deleted", approved, []string{appFolder + "status", "-"},
			[]string{"kept | APP/status | absent | approved | the status in the store stays"},
			[]string{"changed | APP/app", "changed | APP/status | absent | approved"}, false},
		{"developer's status deleted", approved, []string{devFolder + "status", "-"}, nil, nil, true},
		{"status misspelt", approved, []string{keyFolder + "status", "Approved\n"},
			[]string{`kept | KEY/status | "Approved\n" | approved | the status in the store stays`},
			[]string{"changed | KEY/credential", `changed | KEY/status | "Approved\n" | approved`}, false},
		{"whole key deleted", approved, []string{keyFolder + "products/Weather-Product", "-", keyFolder + "status", "-", keyFolder + "credential", "-"},
			[]string{"kept | KEY/credential | absent | the credential was in the store and its record has been deleted"},
			[]string{"changed | KEY/products/Weather-Product | absent | approved", "changed | KEY/status | absent | approved", "created | KEY/credential"}, false},
		{"whole app deleted", approved, []string{appFolder + "app", "-", appFolder + "status", "-"},
			[]string{"kept | APP/app | absent | the app was in the store and its record has been deleted"},
			[]string{"changed | APP/status | absent | approved", "created | APP/app"}, false},
		{"whole developer deleted", approved, []string{devFolder + "developer", "-", devFolder + "status", "-"},
			[]string{"kept | DEVELOPER/developer | absent | the developer was in the store and its record has been deleted"},
			[]string{"created | DEVELOPER/developer"}, false},
		{"expired", approved, []string{keyFolder + "credential", `{"v":1,"appId":"6ed3a4d1-4733-439a-80a4-0d71149ec9ad","developerId":"Z2S37rxX2Suzkwtg","hint":"KLhb","apiProducts":[{"apiproduct":"Weather-Product"}],"attributes":[],"expiresAt":1415728893155,"issuedAt":1415728893154,"scopes":[]}`},
			[]string{"kept | KEY/credential | expiresAt 1415728893155 | expiresAt -1 | the expiry in the store stays"},
			[]string{"changed | KEY/credential"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.t = t
			s.clear()
			s.mustLoad(ledger.ImportOptions{}, approved)
			s.set(tt.change...)
			before, rev := s.dump()
			reason := s.reason(quickstart.KeyID(quickstart.WeatherKey), "Weather-Product")

			got := differing(lines(s.mustLoad(ledger.ImportOptions{}, tt.file)), unchanged)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
			after, again := s.dump()
			if again != rev {
				t.Errorf("the import wrote: %s", cmp.Diff(before, after))
			}
			if r := s.reason(quickstart.KeyID(quickstart.WeatherKey), "Weather-Product"); r != reason {
				t.Errorf("a check answers %v, before %v", r, reason)
			}

			got = differing(lines(s.mustLoad(ledger.ImportOptions{Overwrite: true}, tt.file)), unchanged)
			if diff := cmp.Diff(tt.overwrite, got); diff != "" {
				t.Errorf("outcome with Overwrite (-want +got):\n%s", diff)
			}
			if tt.keptStays {
				return
			}
			want := authz.Allowed
			if strings.HasPrefix(tt.name, "file revokes the key") {
				want = authz.KeyRevoked
			} else if strings.HasPrefix(tt.name, "file revokes") {
				want = authz.ProductRevoked
			}
			if r := s.reason(quickstart.KeyID(quickstart.WeatherKey), "Weather-Product"); r != want {
				t.Errorf("after Overwrite a check answers %v, want %v", r, want)
			}
		})
	}
}

// differing are the lines, without their place, that are not among others.
func differing(all, others []string) (l []string) {
	for _, line := range all {
		if !slices.Contains(others, line) {
			_, line, _ = strings.Cut(line, " ")
			l = append(l, line)
		}
	}
	slices.Sort(l)
	return l
}

// What is in the store and not in the file stays; what is new is added.
func TestMerge(t *testing.T) {
	s := newStore(t)
	s.mustLoad(ledger.ImportOptions{}, orders())
	first, second := quickstart.KeyID(quickstart.OrdersKey), quickstart.KeyID(quickstart.OrdersPendingKey)
	file := `{"appId":"b1c0f2ce-0c1b-4f0e-8a54-3d0f6f3f9a77","developerId":"Qm7XcL0fPz4KtRwa","name":"Orders 2","status":"approved","new":{"a":"<b>"},
		"credentials":[
			{"consumerKey":"A0123456789abcdefghij","status":"approved","apiProducts":[{"apiproduct":"P/x y","status":"approved"}]},
			{"consumerKey":"` + quickstart.OrdersPendingKey + `","status":"approved","apiProducts":[{"apiproduct":"More","status":"pending","x":1},{"apiproduct":"Orders-Product","status":"pending"}],"note":"n"}]}`
	all := s.mustLoad(ledger.ImportOptions{}, file)
	added := quickstart.KeyID("A0123456789abcdefghij")
	app := "/keygate/acme/apps/b1c0f2ce-0c1b-4f0e-8a54-3d0f6f3f9a77/app"
	key := func(id authz.KeyID) string { return "/keygate/acme/keys/" + id.String() + "/" }
	want := []string{
		"f1:1:1 changed | " + app,
		"f1:1:1 changed | " + key(second) + "credential",
		"f1:1:1 created | " + key(added) + "credential",
		"f1:1:1 kept | " + key(first) + "credential | the credential is not in what is imported",
		"f1:1:1 kept | " + key(second) + "products/Weather-Product | approved | the product is not in what is imported",
		"f1:1:1 unchanged | /keygate/acme/developers/Qm7XcL0fPz4KtRwa/developer",
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, lines(all)); diff != "" {
		t.Errorf("outcome (-want +got):\n%s", diff)
	}
	stored, rev := s.dump()
	for path, want := range map[string]string{
		app: `{"v":1,"appId":"b1c0f2ce-0c1b-4f0e-8a54-3d0f6f3f9a77","developerId":"Qm7XcL0fPz4KtRwa","name":"Orders 2","new":{"a":"<b>"},` +
			`"credentials":["` + added.String() + `","` + second.String() + `","` + first.String() + `"],` +
			`"accessType":"","appFamily":"default","attributes":[{"name":"DisplayName","value":"Orders for partners"},{"name":"Notes","value":"two keys, so that one can be rotated out"}],` +
			`"callbackUrl":"https://orders.example.com/callback","createdAt":1719835200000,"createdBy":"ann@example.com","lastModifiedAt":1727784000313,"lastModifiedBy":"ann@example.com","scopes":[]}`,
		key(second) + "credential": `{"v":1,"appId":"b1c0f2ce-0c1b-4f0e-8a54-3d0f6f3f9a77","developerId":"Qm7XcL0fPz4KtRwa","hint":"Jf7U",` +
			`"apiProducts":[{"apiproduct":"More","x":1},{"apiproduct":"Orders-Product"},{"apiproduct":"Weather-Product"}],"note":"n","expiresAt":-1,"attributes":[],"issuedAt":1727784000313,"scopes":[]}`,
		key(added) + "products/P%2Fx%20y":                               "approved",
		indexStart + "products/P%2Fx%20y/keys/" + added.String():        "",
		indexStart + "developers/Qm7XcL0fPz4KtRwa/apps/Orders%202":      "b1c0f2ce-0c1b-4f0e-8a54-3d0f6f3f9a77",
		indexStart + "products/Weather-Product/keys/" + second.String(): "",
	} {
		if got, ok := stored[path]; !ok || got != want {
			t.Errorf("%s (-want +got):\n%s", path, cmp.Diff(want, got))
		}
	}
	if old := indexStart + "developers/Qm7XcL0fPz4KtRwa/apps/OrdersApp"; slices.Contains(slices.Collect(maps.Keys(stored)), old) {
		t.Errorf("%s is still there after the app's name has changed", old)
	}
	if r := s.reason(added, "P/x y"); r != authz.Allowed {
		t.Errorf("a check of the new key answers %v, want %v", r, authz.Allowed)
	}
	if r := s.reason(first, "Orders-Product"); r != authz.Allowed {
		t.Errorf("a check of the key that the file lacks answers %v, want %v", r, authz.Allowed)
	}
	s.mustLoad(ledger.ImportOptions{}, file)
	if after, again := s.dump(); again != rev {
		t.Errorf("the second import wrote: %s", cmp.Diff(stored, after))
	}
}

func TestRefusals(t *testing.T) {
	s := newStore(t)
	const key2 = "B0123456789abcdefghij"
	app := func(id, developer, name, credentials string) string {
		return fmt.Sprintf(`{"appId":%q,"developerId":%q,"name":%q,"status":"approved","credentials":[%s]}`, id, developer, name, credentials)
	}
	credential := func(key string) string {
		return fmt.Sprintf(`{"consumerKey":%q,"status":"approved","apiProducts":[{"apiproduct":"p","status":"approved"}]}`, key)
	}
	for _, tt := range []struct {
		name  string
		set   []string
		files []string
		want  []string // the refusals
		reads authz.Reason
	}{
		{"other developer", nil, []string{app("6ed3a4d1-4733-439a-80a4-0d71149ec9ad", "other", "n", credential(key2))},
			[]string{`f1:1:1 refused | APP/app | the app belongs to developer "Z2S37rxX2Suzkwtg" in the store, to "other" here`}, authz.KeyUnknown},
		{"name taken", nil, []string{app("a2", "Z2S37rxX2Suzkwtg", "AnotherTestApp", credential(key2))},
			[]string{`f1:1:1 refused | /keygate/acme/apps/a2/app | developer "Z2S37rxX2Suzkwtg" has another app of this name, "6ed3a4d1-4733-439a-80a4-0d71149ec9ad": /keygate.index/acme/developers/Z2S37rxX2Suzkwtg/apps/AnotherTestApp`}, authz.KeyUnknown},
		{"key of another app", nil, []string{app("a2", "d2", "n2", credential(quickstart.WeatherKey)+","+credential(key2))},
			[]string{`f1:1:1 refused | KEY/credential | the key belongs to app "6ed3a4d1-4733-439a-80a4-0d71149ec9ad" in the store`}, authz.Allowed},
		{"stored app unreadable", []string{appFolder + "app", `{"v":2}`}, []string{weather()},
			[]string{`f1:1:1 refused | APP/app | the stored record cannot be read: app: "v" is "2", want 1`}, authz.KeyUnknown},
		{"stored credential unreadable", []string{keyFolder + "credential", `{`}, []string{weather()},
			[]string{`f1:1:1 refused | KEY/credential | the stored record cannot be read: credential: 1:2: the JSON ends too early`}, authz.KeyUnknown},
		{"stored credential of another developer", []string{keyFolder + "credential", `{"v":1,"appId":"6ed3a4d1-4733-439a-80a4-0d71149ec9ad","developerId":"x","expiresAt":-1}`}, []string{weather()},
			[]string{`f1:1:1 refused | KEY/credential | the key belongs to developer "x" in the store, its app to "Z2S37rxX2Suzkwtg"`}, authz.KeyUnknown},
		{"key in two apps of one import", nil, []string{app("a2", "d2", "n2", credential(key2)) + "\n" + app("a3", "d3", "n3", credential(key2))},
			[]string{`f1:2:1 refused | credential ` + quickstart.KeyID(key2).String() + `: app "a2" at f1:1:1 has the same consumer key`}, authz.Allowed},
		{"app twice in one import", nil, []string{app("a2", "d2", "n2", credential(key2)), app("a2", "d2", "n2", "")},
			[]string{`f2:1:1 refused | /keygate/acme/apps/a2/app | it stands at f1:1:1 already, and differs`}, authz.Allowed},
		{"the same app twice in one import", nil, []string{app("a2", "d2", "n2", credential(key2)), " " + strings.ReplaceAll(app("a2", "d2", "n2", credential(key2)), ":", " :")},
			nil, authz.Allowed},
		{"a bad line in the middle", nil, []string{app("a2", "d2", "n2", "") + "\n{\"appId\n" + app("a3", "d3", "n3", credential(key2))},
			[]string{`f1:2:8 refused | a string is not closed on its line`}, authz.Allowed},
		{"a weak key beside a good one", nil, []string{app("a2", "d2", "n2", credential("short")+","+credential(key2))},
			[]string{`f1:1:96 refused | credential 1: the consumer key is weak: it has 5 characters, want at least 16`}, authz.Allowed},
		{"too large", nil, []string{app("a2", "d2", strings.Repeat("n", 200), credential(key2))[:1] + `"x":"` + strings.Repeat("x", 3<<19) + `",` + app("a2", "d2", "n", credential(key2))[1:]},
			[]string{`f1:1:1 refused | /keygate/acme/apps/a2/app | the record is too large for etcd: /keygate/acme/apps/a2/app and what belongs to it take`}, authz.KeyUnknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.t = t
			s.clear()
			s.mustLoad(ledger.ImportOptions{}, weather())
			s.set(tt.set...)
			var got []string
			for _, line := range lines(s.mustLoad(ledger.ImportOptions{Overwrite: true}, tt.files...)) {
				if strings.Contains(line, " refused ") {
					got = append(got, line)
				}
			}
			if len(got) != len(tt.want) {
				t.Fatalf("refused %q, want %q", got, tt.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], tt.want[i]) {
					t.Errorf("got  %s\nwant %s", got[i], tt.want[i])
				}
			}
			if r := s.reason(quickstart.KeyID(key2), "p"); r != tt.reads {
				t.Errorf("a check of the other key answers %v, want %v", r, tt.reads)
			}
			for path, value := range s.pairs(tt.set) {
				if now, _ := s.dump(); now[path] != value {
					t.Errorf("%s is %q now, want it left alone", path, now[path])
				}
			}
		})
	}
	s.t = t
	hidden := ledger.NewImporter(ledger.ImporterConfig{KV: s.kv, Space: s.space, Organization: ".hidden"})
	if err := hidden.Import(s.ctx(), submissions(), func(ledger.Outcome) {}); err == nil {
		t.Error("an organization that begins with a dot was taken")
	}
	im := ledger.NewImporter(ledger.ImporterConfig{KV: s.kv, Space: s.space, Organization: org})
	var got []string
	err := im.Import(s.ctx(), submissions(
		catalog.Submission{App: &catalog.App{ID: "x"}},
		catalog.Submission{Developer: &catalog.Developer{ID: "x"}},
		catalog.Submission{Product: &catalog.Product{}},
		catalog.Submission{Product: &catalog.Product{Name: "good"}},
	), func(o ledger.Outcome) { got = append(got, lines([]ledger.Outcome{o})...) })
	want := []string{
		` created | /keygate/acme/products/good/product`,
		` refused | /keygate/acme/apps/x/app | "developerId" is empty`,
		` refused | /keygate/acme/developers/x/developer | status "" is none of active, inactive`,
		` refused | /keygate/acme/products//product | "name" is empty`,
	}
	if slices.Sort(got); err != nil || !cmp.Equal(got, want) {
		t.Errorf("records that are not valid: got %q, %v, want %q", got, err, want)
	}
}

// submissions are handed in as they are.
func submissions(all ...catalog.Submission) ledger.Submissions { return &list{all} }

type list struct{ left []catalog.Submission }

func (l *list) Next() (s catalog.Submission, err error) {
	if len(l.left) == 0 {
		return s, io.EOF
	}
	s, l.left = l.left[0], l.left[1:]
	return s, nil
}

func (s *store) pairs(list []string) map[string]string {
	m := map[string]string{}
	for p := range slices.Chunk(list, 2) {
		m[p[0]] = p[1]
	}
	return m
}

// faultyKV is a KV whose transactions can be counted, hindered and lost.
type faultyKV struct {
	clientv3.KV
	writes int         // that were committed
	limit  int         // after so many the store is away; 0 for never
	before func(n int) // is called before the n-th write
}

type faultyTxn struct {
	clientv3.Txn
	kv    *faultyKV
	write bool
}

var errAway = errors.New("the store is away")

func (f *faultyKV) Txn(ctx context.Context) clientv3.Txn {
	return &faultyTxn{Txn: f.KV.Txn(ctx), kv: f}
}

func (x *faultyTxn) If(c ...clientv3.Cmp) clientv3.Txn {
	x.write = true
	x.Txn = x.Txn.If(c...)
	return x
}
func (x *faultyTxn) Then(o ...clientv3.Op) clientv3.Txn { x.Txn = x.Txn.Then(o...); return x }
func (x *faultyTxn) Commit() (*clientv3.TxnResponse, error) {
	if !x.write {
		return x.Txn.Commit()
	}
	if x.kv.before != nil {
		x.kv.before(x.kv.writes + 1)
	}
	if x.kv.limit > 0 && x.kv.writes >= x.kv.limit {
		return nil, errAway
	}
	x.kv.writes++
	return x.Txn.Commit()
}

// large is an app with two keys of 300 products each. Of the first key's the
// even ones are in state even, all else is approved.
func large(even string) string {
	var app struct {
		ID          string           `json:"appId"`
		Developer   string           `json:"developerId"`
		Name        string           `json:"name"`
		Status      string           `json:"status"`
		Credentials []map[string]any `json:"credentials"`
	}
	app.ID, app.Developer, app.Name, app.Status = "large", "d", "large", "approved"
	for k := range 2 {
		var products []map[string]any
		for i := range 300 {
			status := "approved"
			if k == 0 && i%2 == 0 {
				status = even
			}
			products = append(products, map[string]any{"apiproduct": fmt.Sprintf("p%d", i), "status": status})
		}
		app.Credentials = append(app.Credentials, map[string]any{
			"consumerKey": fmt.Sprintf("large-key-0123456789-%d", k), "status": "approved", "apiProducts": products,
		})
	}
	data, err := json.Marshal(app)
	if err != nil {
		panic(err)
	}
	return string(data)
}

// An import that needs several transactions and ends after any of them opens
// nothing before its end, and the next import completes it.
func TestEndBetweenTransactions(t *testing.T) {
	s := newStore(t)
	whole := &faultyKV{KV: s.kv}
	if _, err := s.load(whole, ledger.ImportOptions{}, large("revoked")); err != nil {
		t.Fatal(err)
	}
	if whole.writes < 8 {
		t.Fatalf("%d transactions for 600 products, want more than 8: they hold 128 operations", whole.writes)
	}
	want, _ := s.records()
	key0 := quickstart.KeyID("large-key-0123456789-0")
	for n := 1; n < whole.writes; n++ {
		s.clear()
		_, err := s.load(&faultyKV{KV: s.kv, limit: n}, ledger.ImportOptions{}, large("revoked"))
		if !errors.Is(err, errAway) {
			t.Fatalf("after %d transactions: got %v, want %v", n, err, errAway)
		}
		for k := range 2 {
			id := quickstart.KeyID(fmt.Sprintf("large-key-0123456789-%d", k))
			for _, p := range []authz.ProductName{"p1", "p2", "p299"} {
				if r := s.reason(id, p); r == authz.Allowed {
					t.Errorf("after %d of %d transactions: key %d may use %s already", n, whole.writes, k, p)
				}
			}
		}
		s.mustLoad(ledger.ImportOptions{}, large("revoked"))
		if got, _ := s.records(); !cmp.Equal(got, want) {
			t.Errorf("after %d transactions and another import (-want +got):\n%s", n, cmp.Diff(want, got))
		}
	}

	// Over what is there: all that closes comes before anything that opens.
	s.mustLoad(ledger.ImportOptions{}, strings.Replace(large("revoked"), `"p1","status":"approved"`, `"p1","status":"pending"`, 1))
	s.set(s.space.KeyProduct(keyspace.KeyRecord(org, key0), "p1"), "revoked")
	s.set(s.space.Status(keyspace.KeyRecord(org, key0)), "revoked")
	for i := 0; i < 300; i += 2 {
		s.set(s.space.KeyProduct(keyspace.KeyRecord(org, key0), authz.ProductName(fmt.Sprintf("p%d", i))), "approved")
	}
	kv := &faultyKV{KV: s.kv}
	kv.before = func(n int) {
		all, _ := s.records()
		open := all[s.space.Status(keyspace.KeyRecord(org, key0))] == "approved" || all[s.space.KeyProduct(keyspace.KeyRecord(org, key0), "p1")] == "approved"
		for i := 0; open && i < 300; i += 2 {
			if p := fmt.Sprintf("p%d", i); all[s.space.KeyProduct(keyspace.KeyRecord(org, key0), authz.ProductName(p))] != "revoked" {
				t.Errorf("before transaction %d: something is open and %s is not closed yet", n, p)
				return
			}
		}
	}
	if _, err := s.load(kv, ledger.ImportOptions{Overwrite: true}, large("revoked")); err != nil {
		t.Fatal(err)
	}
	if kv.writes < 2 {
		t.Errorf("%d transactions, want several", kv.writes)
	}
	if got, _ := s.records(); !cmp.Equal(got, want) {
		t.Errorf("after overwriting (-want +got):\n%s", cmp.Diff(want, got))
	}
}

// A change between the import's read and its write is not overwritten.
func TestConcurrentChange(t *testing.T) {
	s := newStore(t)
	approved := strings.ReplaceAll(weather(), `"revoked"`, `"approved"`)
	kv := &faultyKV{KV: s.kv}
	kv.before = func(n int) {
		if n == 1 {
			s.set(keyFolder+"products/Weather-Product", "revoked", keyFolder+"status", "revoked")
		}
	}
	all, err := s.load(kv, ledger.ImportOptions{}, approved)
	if err != nil {
		t.Fatal(err)
	}
	if kv.writes != 2 {
		t.Errorf("%d attempts, want 2", kv.writes)
	}
	for _, path := range []string{keyFolder + "products/Weather-Product", keyFolder + "status"} {
		if got, _ := s.dump(); got[path] != "revoked" {
			t.Errorf("%s is %q, want the change that came between to stay", path, got[path])
		}
	}
	if got := lines(all); !slices.Contains(got, "f1:1:1 kept | KEY/status | revoked | approved | the status in the store stays") {
		t.Errorf("the kept status is not reported: %q", got)
	}

	// Others who never leave it alone: given up, and said.
	s.clear()
	kv = &faultyKV{KV: s.kv}
	kv.before = func(n int) { s.set(keyFolder+"status", fmt.Sprint(n)) }
	if all, err = s.load(kv, ledger.ImportOptions{Overwrite: true}, approved); err != nil {
		t.Fatal(err)
	}
	if got, want := lines(all), []string{"f1:1:1 refused | APP/app | others kept changing it: given up after 8 attempts"}; !cmp.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Many apps of one developer at once, over several files, and a report.
func TestManyApps(t *testing.T) {
	s := newStore(t)
	var file strings.Builder
	const apps = 400
	for i := range apps {
		fmt.Fprintf(&file, `{"appId":"a%d","developerId":"d%d","name":"n%d","status":"approved","credentials":[{"consumerKey":"key-0123456789-%d","status":"approved","apiProducts":[{"apiproduct":"p","status":"approved"}]}]}`+"\n", i, i%3, i, i)
	}
	count := func() (r ledger.Report) {
		for _, o := range s.mustLoad(ledger.ImportOptions{}, file.String(), `{"app":[`+weather()+`]}`, "oops") {
			r.Add(o)
		}
		return r
	}
	first := count()
	if got, want := first.String(), "apps: 401 created, 0 changed, 0 unchanged; credentials: 401 created, 0 changed, 0 unchanged; developers: 4 created, 0 changed, 397 unchanged; products: 0 created, 0 changed, 0 unchanged; 0 kept, 1 refused"; got != want || !first.Written {
		t.Errorf("got  %s, written %v\nwant %s", got, first.Written, want)
	}
	if second := count(); second.Written || second.Apps[ledger.Unchanged] != apps+1 || second.Refused != 1 {
		t.Errorf("second import: %s, written %v, want all unchanged", second, second.Written)
	}
	if r := s.reason(quickstart.KeyID("key-0123456789-399"), "p"); r != authz.Allowed {
		t.Errorf("a check answers %v, want %v", r, authz.Allowed)
	}
}

func TestStoreAway(t *testing.T) {
	s := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	im := ledger.NewImporter(ledger.ImporterConfig{KV: s.kv, Space: s.space, Organization: org})
	err := im.Import(ctx, apigee.NewReader(apigee.ReaderConfig{Name: "f"}, strings.NewReader(weather())), func(o ledger.Outcome) { t.Errorf("reported %v", o) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// Neither a key nor a secret comes to stand in the store, in an outcome or in a
// report, whether it is taken or refused.
func TestNoKeyNoSecret(t *testing.T) {
	s := newStore(t)
	canaries := []string{quickstart.WeatherKey, quickstart.OrdersKey, quickstart.OrdersPendingKey, secret, "t6NwQe0KsXb2ZrUy", "m1FvRz8HcLq5TjAo"}
	files := []string{
		weather(), orders(), weather(),
		strings.Replace(weather(), `"callbackUrl": ""`, `"callbackUrl": "https://x/?k=`+quickstart.WeatherKey+`"`, 1),
		strings.Replace(strings.Replace(weather(), "6ed3a4d1", "7ed3a4d1", 1), `"AnotherTestApp",`, `"b",`, 1), // its key is another app's
		strings.Replace(weather(), `"status": "approved"`, `"status": "`+secret+`"`, 1),
		strings.Replace(weather(), quickstart.WeatherKey, quickstart.WeatherKey+"!", 1),
		strings.Replace(weather(), `"consumerSecret"`, `"`+quickstart.WeatherKey+`":1,"`+quickstart.WeatherKey+`"`, 1),
		quickstart.WeatherKey, `"` + secret + `"`, `["` + secret + `"]`, `{"` + secret,
	}
	var said bytes.Buffer
	for i := range files {
		var r ledger.Report
		all := s.mustLoad(ledger.ImportOptions{}, files[i])
		for _, o := range all {
			r.Add(o)
		}
		text, err := json.Marshal(all)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&said, "%s\n%+v\n%s\n%v\n", text, all, strings.Join(lines(all), "\n"), r)
	}
	stored, _ := s.dump()
	fmt.Fprint(&said, stored)
	for _, c := range canaries {
		if at := strings.Index(said.String(), c); at >= 0 {
			t.Errorf("%q came out: …%s", c, said.String()[max(0, at-120):at+len(c)])
		}
	}
	if len(stored) < 20 {
		t.Errorf("%d values stored, want both apps", len(stored))
	}
}

// BenchmarkImport measures apps with one key and one product each, their keys
// sealed: the first import of them, and the second, which writes nothing.
func BenchmarkImport(b *testing.B) {
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		b.Fatal(err)
	}
	keys, err := seal.Parse([]byte(seal.Generate("one")))
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"first", "second"} {
		b.Run(name, func(b *testing.B) {
			kv := etcdtest.Start(b).Client(b)
			var file bytes.Buffer
			for i := range b.N {
				fmt.Fprintf(&file, `{"appId":"a%d","developerId":"d%d","name":"n","status":"approved","credentials":[{"consumerKey":"key-0123456789-%d","consumerSecret":"secret-%d","status":"approved","apiProducts":[{"apiproduct":"p","status":"approved"}]}]}`+"\n", i, i, i, i)
			}
			load := func() (r ledger.Report) {
				im := ledger.NewImporter(ledger.ImporterConfig{KV: kv, Space: space, Organization: org, Seal: keys})
				if err := im.Import(b.Context(), apigee.NewReader(apigee.ReaderConfig{Name: "f"}, bytes.NewReader(file.Bytes())), r.Add); err != nil {
					b.Fatal(err)
				}
				return r
			}
			if name == "second" {
				load()
			}
			b.ResetTimer()
			r := load()
			if r.Written == (name == "second") || r.Refused > 0 {
				b.Fatalf("%v, written %v", r, r.Written)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "apps/s")
		})
	}
}
