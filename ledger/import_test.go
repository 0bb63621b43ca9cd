package ledger_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keygate/apigee"
	"keygate/audit"
	"keygate/authz"
	"keygate/catalog"
	"keygate/examples/quickstart"
	"keygate/ledger"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

// importAs imports texts, each as an input of its own, with an Importer of this
// configuration.
func (s *store) importAs(cfg ledger.ImporterConfig, texts ...string) []ledger.Outcome {
	s.t.Helper()
	if cfg.KV == nil {
		cfg.KV = s.kv
	}
	cfg.Space, cfg.Organization = s.space, org
	im := ledger.NewImporter(cfg)
	var all []ledger.Outcome
	for i, text := range texts {
		in := apigee.NewReader(apigee.ReaderConfig{Name: fmt.Sprintf("f%d", i+1)}, strings.NewReader(text))
		if err := im.Import(s.ctx(), in, func(o ledger.Outcome) { all = append(all, o) }); err != nil {
			s.t.Fatalf("import: %v", err)
		}
	}
	return all
}

// members that are strings, of a stored JSON value.
func members(t *testing.T, value string) map[string]string {
	t.Helper()
	var all map[string]any
	if err := json.Unmarshal([]byte(value), &all); err != nil {
		t.Fatalf("%s: %v", value, err)
	}
	text := map[string]string{}
	for name, v := range all {
		if s, ok := v.(string); ok {
			text[name] = s
		}
	}
	return text
}

const (
	weatherDeveloper = `{"apps":["AnotherTestApp"],"attributes":[],"companies":[],"createdAt":"1415728893000","developerId":"Z2S37rxX2Suzkwtg","email":"Ann@example.com","firstName":"Ann","lastName":"L","status":"active","userName":"ann"}`
	weatherProduct   = `{"apiResources":["/**"],"approvalType":"manual","createdAt":"1415728000000","displayName":"Weather","name":"Weather-Product"}`
)

// An organization comes in whole, in whatever order, in one input or several.
func TestWholeOrganization(t *testing.T) {
	s := newStore(t)
	developers, products, apps := `{"developer":[`+weatherDeveloper+`]}`, `[`+weatherProduct+`]`, `{"app":[`+weather()+`]}`
	s.mustLoad(ledger.ImportOptions{}, developers, products, apps)
	want, rev := s.records()
	for path, value := range map[string]string{
		devFolder + "developer":                                        `{"v":1,"apps":[],"attributes":[],"companies":[],"createdAt":1415728893000,"developerId":"Z2S37rxX2Suzkwtg","email":"ann@example.com","firstName":"Ann","lastName":"L","userName":"ann"}`,
		devFolder + "status":                                           "active",
		"/keygate/acme/products/Weather-Product/product":               `{"v":1,"apiResources":["/**"],"approvalType":"manual","createdAt":1415728000000,"displayName":"Weather","name":"Weather-Product"}`,
		indexStart + "emails/ann@example.com":                          "Z2S37rxX2Suzkwtg",
		keyFolder + "products/Weather-Product":                         "revoked",
		indexStart + "developers/Z2S37rxX2Suzkwtg/apps/AnotherTestApp": "6ed3a4d1-4733-439a-80a4-0d71149ec9ad",
	} {
		if want[path] != value {
			t.Errorf("%s (-want +got):\n%s", path, cmp.Diff(value, want[path]))
		}
	}
	if len(want) != 12 {
		t.Errorf("%d values stored, want 12: %q", len(want), slices.Sorted(maps.Keys(want)))
	}

	// Again: nothing is written.
	got := lines(s.mustLoad(ledger.ImportOptions{Overwrite: true}, apps, developers, products))
	if diff := cmp.Diff([]string{
		"f1:1:9 unchanged | APP/app",
		"f1:1:9 unchanged | DEVELOPER/developer",
		"f1:1:9 unchanged | KEY/credential",
		"f2:1:15 unchanged | DEVELOPER/developer",
		"f3:1:2 unchanged | /keygate/acme/products/Weather-Product/product",
	}, got); diff != "" {
		t.Errorf("second outcome (-want +got):\n%s", diff)
	}
	if _, again := s.dump(); again != rev {
		t.Errorf("revision %d after importing the same again, want %d", again, rev)
	}

	for _, files := range [][]string{
		{apps, products, developers},
		{products, apps, developers},
		{weather() + "\n" + weatherProduct + "\n" + weatherDeveloper},
		{`{"apiProducts":` + products + `,"apps":[` + weather() + `],"developers":[` + weatherDeveloper + `]}`},
	} {
		s.clear()
		var r ledger.Report
		for _, o := range s.mustLoad(ledger.ImportOptions{}, files...) {
			r.Add(o)
		}
		if got, _ := s.records(); !cmp.Equal(got, want) {
			t.Errorf("in another order (-want +got):\n%s", cmp.Diff(want, got))
		}
		if r.Kept != 0 || r.Refused != 0 || r.Products[ledger.Created] != 1 || r.Apps[ledger.Created] != 1 || r.Developers[ledger.Created] != 1 {
			t.Errorf("in another order: %v", r)
		}
	}
}

// A developer's status comes with its record, and then stays. Only that which an
// app's import has guessed gives way.
func TestDeveloperStatus(t *testing.T) {
	s := newStore(t)
	active, inactive := weatherDeveloper, strings.Replace(weatherDeveloper, `"active"`, `"inactive"`, 1)
	status, details := devFolder+"status", devFolder+"developer"
	for _, tt := range []struct {
		name   string
		first  string
		set    []string
		second string
		want   string // the status then
		lines  []string
		over   string // the status with Overwrite
	}{
		{"inactive after its app", weather(), nil, inactive, "inactive",
			[]string{"changed | DEVELOPER/developer"}, "inactive"},
		{"active after its app", weather(), nil, active, "active",
			[]string{"changed | DEVELOPER/developer"}, "active"},
		{"made inactive after its app", weather(), []string{status, "inactive"}, active, "inactive",
			[]string{"changed | DEVELOPER/developer", "kept | DEVELOPER/status | inactive | active | the status in the store stays"}, "active"},
		{"made active after its app", weather(), []string{status, "active"}, inactive, "active",
			[]string{"changed | DEVELOPER/developer", "kept | DEVELOPER/status | active | inactive | the status in the store stays"}, "inactive"},
		{"status deleted after its app", weather(), []string{status, "-"}, active, "",
			[]string{"changed | DEVELOPER/developer", "kept | DEVELOPER/status | absent | active | the status in the store stays"}, "active"},
		{"inactive, then its app", inactive, nil, weather(), "inactive", nil, "inactive"},
		{"inactive, then active", inactive, nil, active, "inactive",
			[]string{"kept | DEVELOPER/status | inactive | active | the status in the store stays", "unchanged | DEVELOPER/developer"}, "active"},
		{"active, then inactive", active, nil, inactive, "active",
			[]string{"kept | DEVELOPER/status | active | inactive | the status in the store stays", "unchanged | DEVELOPER/developer"}, "inactive"},
		{"deleted", active, []string{details, "-", status, "-"}, active, "",
			[]string{"kept | DEVELOPER/developer | absent | the developer was in the store and its record has been deleted"}, "active"},
		{"deleted, with an app", weather(), []string{details, "-", status, "-"}, active, "",
			[]string{"kept | DEVELOPER/developer | absent | the developer was in the store and its record has been deleted"}, "active"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.t = t
			s.clear()
			s.mustLoad(ledger.ImportOptions{}, tt.first)
			s.set(tt.set...)
			var got []string
			for _, line := range differing(lines(s.mustLoad(ledger.ImportOptions{}, tt.second)), nil) {
				if strings.Contains(line, "DEVELOPER") && tt.second != weather() {
					got = append(got, line)
				}
			}
			if diff := cmp.Diff(tt.lines, got); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
			if all, _ := s.dump(); all[status] != tt.want {
				t.Errorf("the status is %q, want %q", all[status], tt.want)
			}
			s.mustLoad(ledger.ImportOptions{Overwrite: true}, tt.second)
			if all, _ := s.dump(); all[status] != tt.over {
				t.Errorf("with Overwrite the status is %q, want %q", all[status], tt.over)
			}
		})
	}
}

// What is stored of a developer and a product stays, unless it is handed in; the
// index follows the e-mail address.
func TestMergeDeveloperAndProduct(t *testing.T) {
	s := newStore(t)
	s.mustLoad(ledger.ImportOptions{}, weatherDeveloper, weatherProduct)
	all := s.mustLoad(ledger.ImportOptions{},
		`{"developerId":"Z2S37rxX2Suzkwtg","email":"bob@example.com","status":"active","new":{"a":1}}`,
		`{"approvalType":"auto","name":"Weather-Product","quota":"5"}`)
	if diff := cmp.Diff([]string{"f1:1:1 changed | DEVELOPER/developer", "f2:1:1 changed | /keygate/acme/products/Weather-Product/product"}, lines(all)); diff != "" {
		t.Errorf("outcome (-want +got):\n%s", diff)
	}
	want := map[string]string{
		devFolder + "developer":                          `{"v":1,"developerId":"Z2S37rxX2Suzkwtg","email":"bob@example.com","new":{"a":1},"apps":[],"attributes":[],"companies":[],"createdAt":1415728893000,"firstName":"Ann","lastName":"L","userName":"ann"}`,
		devFolder + "status":                             "active",
		"/keygate/acme/products/Weather-Product/product": `{"v":1,"approvalType":"auto","name":"Weather-Product","quota":"5","apiResources":["/**"],"createdAt":1415728000000,"displayName":"Weather"}`,
		indexStart + "emails/bob@example.com":            "Z2S37rxX2Suzkwtg",
	}
	if got, _ := s.records(); !cmp.Equal(got, want) {
		t.Errorf("stored (-want +got):\n%s", cmp.Diff(want, got))
	}
}

func TestRefusedDevelopersAndProducts(t *testing.T) {
	s := newStore(t)
	other := `{"developerId":"other","email":"ann@example.com","status":"active"}`
	for _, tt := range []struct {
		name  string
		set   []string
		files []string
		want  []string
	}{
		{"address taken in the store", nil, []string{other},
			[]string{`f1:1:1 refused | /keygate/acme/developers/other/developer | another developer has this e-mail address, "Z2S37rxX2Suzkwtg": /keygate.index/acme/emails/ann@example.com`}},
		{"address taken in the import", nil, []string{strings.ReplaceAll(other, "ann", "cid") + "\n" + strings.NewReplacer("ann", "CID", "other", "third").Replace(other)},
			[]string{`f1:2:1 refused | /keygate/acme/developers/third/developer | another developer has this e-mail address, "other": /keygate.index/acme/emails/cid@example.com`}},
		{"twice, and differs", nil, []string{weatherProduct, strings.Replace(weatherProduct, "manual", "auto", 1)},
			[]string{`f2:1:1 refused | /keygate/acme/products/Weather-Product/product | it stands at f1:1:1 already, and differs`}},
		{"twice, the same", nil, []string{weatherDeveloper, weatherDeveloper}, nil},
		{"stored developer unreadable", []string{devFolder + "developer", `{"v":2}`}, []string{weatherDeveloper},
			[]string{`f1:1:1 refused | DEVELOPER/developer | the stored record cannot be read: developer: "v" is "2", want 1`}},
		{"stored product unreadable", []string{"/keygate/acme/products/Weather-Product/product", ``}, []string{weatherProduct},
			[]string{`f1:1:1 refused | /keygate/acme/products/Weather-Product/product | the stored record cannot be read: want a JSON object whose "v" is 1`}},
		{"stored product of another version", []string{"/keygate/acme/products/Weather-Product/product", `{"v":2}`}, []string{weatherProduct},
			[]string{`f1:1:1 refused | /keygate/acme/products/Weather-Product/product | the stored record cannot be read: want a JSON object whose "v" is 1`}},
		{"too large", nil, []string{weatherProduct[:1] + `"x":"` + strings.Repeat("x", 3<<19) + `",` + weatherProduct[1:] + "\n" + strings.ReplaceAll(other, "ann", "dan")},
			[]string{`f1:1:1 refused | /keygate/acme/products/Weather-Product/product | the record is too large for etcd: /keygate/acme/products/Weather-Product/product and what belongs to it take`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.t = t
			s.clear()
			s.mustLoad(ledger.ImportOptions{}, weatherDeveloper, weatherProduct)
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
			for path, value := range s.pairs(tt.set) {
				if now, _ := s.dump(); now[path] != value {
					t.Errorf("%s is %q now, want it left alone", path, now[path])
				}
			}
		})
	}
}

// With a sealing key the consumer key and the secret are kept, sealed; what is
// sealed and says the same is left as it is.
func TestSealed(t *testing.T) {
	s := newStore(t)
	ring := func(id string) (*seal.Keyring, string) {
		line := seal.Generate(id)
		keys, err := seal.Parse([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		return keys, line
	}
	keys, line := ring("one")
	id := quickstart.KeyID(quickstart.WeatherKey).String()
	opened := func(keys *seal.Keyring) (key, secret string) {
		t.Helper()
		all, _ := s.dump()
		c := members(t, all[keyFolder+"credential"])
		for _, m := range []struct {
			name, context string
			into          *string
		}{
			{catalog.MemberSealedKey, "consumerKey " + id, &key},
			{catalog.MemberSealedSecret, "consumerSecret " + id, &secret},
		} {
			plain, err := keys.Open(c[m.name], m.context)
			if err != nil {
				t.Errorf("open %s: %v", m.name, err)
			}
			*m.into = plain
		}
		return key, secret
	}
	check := func(keys *seal.Keyring, wantSecret string) {
		t.Helper()
		if k, sec := opened(keys); k != quickstart.WeatherKey || sec != wantSecret {
			t.Errorf("opened %q and %q, want %q and %q", k, sec, quickstart.WeatherKey, wantSecret)
		}
	}
	s.importAs(ledger.ImporterConfig{Seal: keys}, weather())
	check(keys, secret)
	all, rev := s.dump()
	if start := `{"v":1,"appId":"6ed3a4d1-4733-439a-80a4-0d71149ec9ad","developerId":"Z2S37rxX2Suzkwtg","hint":"KLhb","sealedKey":"v1:one:`; !strings.HasPrefix(all[keyFolder+"credential"], start) {
		t.Errorf("the credential is %s, want it to begin with %s", all[keyFolder+"credential"], start)
	}
	for path, value := range all {
		if strings.Contains(path+value, quickstart.WeatherKey) || strings.Contains(path+value, secret) {
			t.Errorf("%s holds the key or the secret: %s", path, value)
		}
	}
	if r := s.reason(quickstart.KeyID(quickstart.WeatherKey), "Weather-Product"); r != authz.ProductRevoked {
		t.Errorf("a check answers %v, want %v", r, authz.ProductRevoked)
	}

	// Again, with a newer key before it, and without any: nothing is written.
	_, newer := ring("two")
	both, err := seal.Parse([]byte(newer + "\n" + line))
	if err != nil {
		t.Fatal(err)
	}
	for _, keys := range []*seal.Keyring{keys, both, nil} {
		got := lines(s.importAs(ledger.ImporterConfig{Seal: keys}, weather()))
		if _, now := s.dump(); now != rev {
			t.Errorf("revision %d after importing the same again, want %d: %q", now, rev, got)
		}
	}

	// What cannot be opened, or says something else, is sealed anew.
	other, _ := ring("three")
	s.importAs(ledger.ImporterConfig{Seal: other}, weather())
	check(other, secret)
	s.importAs(ledger.ImporterConfig{Seal: other}, strings.Replace(weather(), secret, "another-secret-1", 1))
	check(other, "another-secret-1")

	// A credential that was imported without a sealing key gets it later.
	s.clear()
	s.importAs(ledger.ImporterConfig{}, weather())
	s.importAs(ledger.ImporterConfig{Seal: keys}, weather())
	check(keys, secret)
	s.importAs(ledger.ImporterConfig{Seal: keys}, strings.Replace(weather(), `"consumerSecret": "`+secret+`",`, "", 1))
	check(keys, secret)
}

// Each record that is imported has an audit record in its transaction.
func TestImportAudit(t *testing.T) {
	s := newStore(t)
	keys, err := seal.Parse([]byte(seal.Generate("one")))
	if err != nil {
		t.Fatal(err)
	}
	cfg := ledger.ImporterConfig{Seal: keys, Actor: audit.Actor{Kind: audit.ActorCLI, Name: "ann@host"}, Reason: "migration", Ticket: "T-1"}
	s.importAs(cfg, weatherDeveloper+"\n"+weatherProduct+"\n"+weather())
	records := map[string]audit.Record{}
	revisions := map[int64]bool{}
	for _, r := range s.audits() {
		records[short(r.Object)] = r
		revisions[r.Revision] = true
		if r.Actor != cfg.Actor || r.Reason != cfg.Reason || r.Ticket != cfg.Ticket || r.Action != "import" || r.Organization != org {
			t.Errorf("got %+v, want it to be an import as %+v", r, cfg)
		}
		if n := len(r.Value()); n > 2<<10 {
			t.Errorf("the record of %s has %d bytes, want at most 2 KiB", r.Object, n)
		}
	}
	const product = "/keygate/acme/products/Weather-Product/product"
	want := map[string][]string{
		"APP/app":             {"APP/app", "APP/status approved", "KEY/credential", "KEY/products/Weather-Product revoked", "KEY/status approved"},
		"DEVELOPER/developer": {"DEVELOPER/developer", "DEVELOPER/status active"},
		product:               {product},
	}
	got := map[string][]string{}
	for object, r := range records {
		for _, c := range r.Changes {
			line := short(c.Path)
			if c.Before != nil || c.After == nil {
				t.Errorf("%s: got %v before and %v after, want it created", c.Path, c.Before, c.After)
			} else if !strings.HasPrefix(*c.After, "{") {
				line += " " + *c.After
			}
			got[object] = append(got[object], line)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
	if len(revisions) != 1 {
		t.Errorf("%d transactions, want all three records in one", len(revisions))
	}
	if r := records["APP/app"]; strings.Contains(r.Value(), "v1:one:") {
		t.Errorf("the record shows what is sealed: %s", r.Value())
	}

	// What changes is there with what it was before; nothing is recorded of
	// nothing.
	n := len(s.audits())
	s.importAs(cfg, weatherDeveloper+weatherProduct+weather())
	if now := s.audits(); len(now) != n {
		t.Errorf("%d audit records after an import that wrote nothing, want %d", len(now), n)
	}
	cfg.Options.Overwrite = true
	s.importAs(cfg, strings.ReplaceAll(weather(), `"revoked"`, `"approved"`))
	before, after := "revoked", "approved"
	change := audit.Change{Path: keyFolder + "products/Weather-Product", Before: &before, After: &after}
	if diff := cmp.Diff([]audit.Change{change}, s.audits()[0].Changes); diff != "" {
		t.Errorf("changes of the second import (-want +got):\n%s", diff)
	}
}

// Several records share a transaction. Where one does not hold them, or somebody
// is quicker, they come in all the same, each with what is right by then.
func TestTogether(t *testing.T) {
	s := newStore(t)
	app := func(i int, products int) string {
		var refs []string
		for p := range products {
			refs = append(refs, fmt.Sprintf(`{"apiproduct":"p%d","status":"approved"}`, p))
		}
		return fmt.Sprintf(`{"appId":"a%d","developerId":"d","name":"n%d","status":"approved","credentials":[{"consumerKey":"key-0123456789-%d","status":"approved","apiProducts":[%s]}]}`+"\n", i, i, i, strings.Join(refs, ","))
	}
	one := ledger.ImporterConfig{Concurrency: 1}
	kv := &faultyKV{KV: s.kv}
	one.KV = kv
	small := ""
	for i := range 8 {
		small += app(i, 1)
	}
	s.importAs(one, small)
	if kv.writes != 1 {
		t.Errorf("8 small apps took %d transactions, want 1", kv.writes)
	}
	want, _ := s.records()

	// By itself each gives the same.
	s.clear()
	for i := range 8 {
		s.importAs(ledger.ImporterConfig{}, app(i, 1))
	}
	if got, _ := s.records(); !cmp.Equal(got, want) {
		t.Errorf("one by one (-together +alone):\n%s", cmp.Diff(want, got))
	}

	// Some of them are too large to share.
	s.clear()
	mixed := app(0, 1) + app(1, 30) + app(2, 100) + app(3, 1) + app(4, 40) + app(5, 1) + app(6, 20) + app(7, 1)
	var r ledger.Report
	for _, o := range s.importAs(one, mixed) {
		r.Add(o)
	}
	if r.Apps[ledger.Created] != 8 || r.Credentials[ledger.Created] != 8 || r.Refused != 0 || r.Developers[ledger.Created] != 1 {
		t.Errorf("large and small: %v", r)
	}
	if reason := s.reason(quickstart.KeyID("key-0123456789-2"), "p99"); reason != authz.Allowed {
		t.Errorf("a check of the largest answers %v, want %v", reason, authz.Allowed)
	}

	transactions := map[string]int{}
	for _, r := range s.audits() {
		transactions[r.Object]++
	}
	for i, one := range []bool{true, true, false, true, true, true, true, true} {
		if n := transactions[fmt.Sprintf("/keygate/acme/apps/a%d/app", i)]; (n == 1) != one {
			t.Errorf("app a%d took %d transactions, want it in one: %v", i, n, one)
		}
	}

	// One transaction holds an app with one key and 59 products, to the brim.
	s.clear()
	for products := 58; products < 63; products++ {
		kv = &faultyKV{KV: s.kv}
		one.KV = kv
		got := lines(s.importAs(one, strings.Replace(app(products, products), `"d"`, fmt.Sprintf(`"d%d"`, products), 1)))
		if slices.ContainsFunc(got, func(line string) bool { return !strings.Contains(line, " created ") }) || (kv.writes == 1) != (products < 60) {
			t.Errorf("%d products took %d transactions: %q", products, kv.writes, got)
		}
	}

	// Somebody revokes one of the keys between the read and the write.
	s.clear()
	revoked := s.space.Status(keyspace.KeyRecord(org, quickstart.KeyID("key-0123456789-3")))
	kv = &faultyKV{KV: s.kv}
	kv.before = func(n int) {
		if n == 1 {
			s.set(revoked, "revoked")
		}
	}
	one.KV = kv
	got := lines(s.importAs(one, small))
	if line := "f1:4:1 kept | " + revoked + " | revoked | approved | the status in the store stays"; !slices.Contains(got, line) {
		t.Errorf("the revocation is not reported: %q", got)
	}
	all, _ := s.dump()
	if all[revoked] != "revoked" || all[s.space.IndexDeveloperApp(org, "d", "n3")] != "a3" || kv.writes != 2 {
		t.Errorf("after %d transactions the key is %q, want it revoked, and all imported, after 2", kv.writes, all[revoked])
	}

	// Two of one transaction pass a name on: the index has it where it went.
	s.importAs(one, strings.NewReplacer(`"name":"n0"`, `"name":"x"`, `"name":"n1"`, `"name":"n0"`).Replace(app(0, 1)+app(1, 1)))
	all, _ = s.dump()
	for name, id := range map[string]string{"x": "a0", "n0": "a1", "n1": ""} {
		if got := all[s.space.IndexDeveloperApp(org, "d", name)]; got != id {
			t.Errorf("the index has %q for %q, want %q", got, name, id)
		}
	}
}
