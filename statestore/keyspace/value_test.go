package keyspace_test

import (
	"context"
	"strings"
	"testing"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

const (
	goodCredential = `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":["READ","WRITE"],"hint":"giIC","unknown":{"a":[1]}}`
	goodApp        = `{"v":1,"name":"Test","developerId":"dev-1","callbackUrl":""}`
	goodDeveloper  = `{"v":1,"developerId":"dev-1","email":"a@example.com"}`
)

// stored is the three folders of one check, as they lie in etcd.
type stored struct {
	keyStatus, product, credential string
	appStatus, app                 string
	developerStatus, developer     string
}

func good() stored {
	return stored{"approved", "approved", goodCredential, "approved", goodApp, "active", goodDeveloper}
}

// absent stands for a key that is not there.
const absent = "\x00absent"

func entries(pairs ...string) (es []keyspace.Entry) {
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != absent {
			es = append(es, keyspace.Entry{Key: pairs[i], Value: []byte(pairs[i+1])})
		}
	}
	return es
}

type valid struct{}

func (valid) Valid() bool { return true }

// Records makes stored an authz.Source, through the code under test.
func (st stored) Records(context.Context, authz.Organization, authz.KeyID) (authz.Records, error) {
	s, err := keyspace.New("/keygate")
	if err != nil {
		return authz.Records{}, err
	}
	id, err := authz.ParseKeyID(hexID)
	if err != nil {
		return authz.Records{}, err
	}
	k, a, d := keyspace.KeyRecord("acme", id), keyspace.AppRecord("acme", "app-1"), keyspace.DeveloperRecord("acme", "dev-1")
	return authz.Records{
		Credential: s.Credential(entries(s.Details(k), st.credential, s.KeyProduct(k, "Weather"), st.product, s.Status(k), st.keyStatus)),
		App:        s.App(entries(s.Details(a), st.app, s.Status(a), st.appStatus)),
		Developer:  s.Developer(entries(s.Details(d), st.developer, s.Status(d), st.developerStatus)),
		Revision:   1, Proof: valid{},
	}, nil
}

func (st stored) decide(t testing.TB) authz.Decision {
	t.Helper()
	a := &authz.Authorizer{Source: st}
	return a.Decide(t.Context(), authz.Request{Organization: "acme", KeyID: id(t, hexID), Products: []authz.ProductName{"Weather"}})
}

func TestGoodRecord(t *testing.T) {
	d := good().decide(t)
	if d.Reason != authz.Allowed {
		t.Fatalf("got %v (%s), want allowed", d.Reason, d.Problem)
	}
	if d.App != "app-1" || d.Developer != "dev-1" || d.Scopes != "READ WRITE" {
		t.Errorf("identity: got app %q developer %q scopes %q", d.App, d.Developer, d.Scopes)
	}
}

// hostile values, for any key of the schema. None of them may open.
func hostile() map[string]string {
	return map[string]string{
		"empty": "", "random bytes": "\x93\xfa\x00\x1b\xff\xfe\x07", "NUL": "\x00", "a number": "1", "null": "null", "true": "true",
		"quoted word": `"approved"`, "quoted developer word": `"active"`, "a list": `["approved"]`, "an object": `{"status":"approved"}`,
		"misspelt": "aproved", "capital": "Approved", "capitals": "APPROVED", "capital, blank": "Approved ", "blank after": "approved ",
		"blank before": " approved", "newline after": "approved\n", "CR LF after": "approved\r\n", "NUL after": "approved\x00",
		"zero-width space": "approved\u200b", "Cyrillic a": "аpproved", "byte order mark": "\ufeffapproved",
		"twice": "approvedapproved", "two words": "approved,revoked", "present tense": "approve", "truncated": "approve",
		"developer's misspelt": "Active", "developer's newline": "active\n", "developer's blank": "active ",
		"large": strings.Repeat("approved", 180_000), // 1.4 MB
		"deep":  strings.Repeat("[", 100_000),
	}
}

func TestHostileStatus(t *testing.T) {
	words := hostile()
	words["absent"] = absent
	fields := []struct {
		name string
		of   func(*stored) *string
	}{
		{"key status", func(s *stored) *string { return &s.keyStatus }},
		{"product on key", func(s *stored) *string { return &s.product }},
		{"app status", func(s *stored) *string { return &s.appStatus }},
		{"developer status", func(s *stored) *string { return &s.developerStatus }},
	}
	for _, f := range fields {
		for name, value := range words {
			st := good()
			*f.of(&st) = value
			want := authz.RecordUnreadable
			if f.name == "product on key" && value == absent {
				want = authz.ProductNotOnKey
			}
			d := st.decide(t)
			if d.Reason != want {
				t.Errorf("%s is %s: got %v, want %v", f.name, name, d.Reason, want)
			}
			if want == authz.RecordUnreadable && d.Problem == "" {
				t.Errorf("%s is %s: no problem for the operator", f.name, name)
			}
			if len(d.Problem) > 300 {
				t.Errorf("%s is %s: the problem has %d bytes, want a bounded one", f.name, name, len(d.Problem))
			}
		}
		// The other kind's word, exact, is no word here.
		st := good()
		for _, other := range []string{"active", "inactive", "approved", "revoked", "pending"} {
			isDeveloper := f.name == "developer status"
			if isDeveloper == (other == "active" || other == "inactive") {
				continue
			}
			*f.of(&st) = other
			if d := st.decide(t); d.Reason != authz.RecordUnreadable {
				t.Errorf("%s is %s: got %v, want %v", f.name, other, d.Reason, authz.RecordUnreadable)
			}
		}
	}
}

func TestStatusWords(t *testing.T) {
	tests := []struct {
		field string
		set   func(*stored, string)
		want  map[string]authz.Reason
	}{
		{"key", func(s *stored, w string) { s.keyStatus = w }, map[string]authz.Reason{"approved": authz.Allowed, "revoked": authz.KeyRevoked, "pending": authz.KeyPending}},
		{"product", func(s *stored, w string) { s.product = w }, map[string]authz.Reason{"approved": authz.Allowed, "revoked": authz.ProductRevoked, "pending": authz.ProductPending}},
		{"app", func(s *stored, w string) { s.appStatus = w }, map[string]authz.Reason{"approved": authz.Allowed, "revoked": authz.AppRevoked, "pending": authz.AppPending}},
		{"developer", func(s *stored, w string) { s.developerStatus = w }, map[string]authz.Reason{"active": authz.Allowed, "inactive": authz.DeveloperInactive}},
	}
	for _, tt := range tests {
		for word, want := range tt.want {
			st := good()
			tt.set(&st, word)
			if d := st.decide(t); d.Reason != want {
				t.Errorf("%s %s: got %v (%s), want %v", tt.field, word, d.Reason, d.Problem, want)
			}
		}
	}
}

func TestHostileDetails(t *testing.T) {
	common := hostile()
	for name, v := range map[string]string{
		"absent":          absent,
		"empty object":    `{}`,
		"no version":      `{"appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"version 2":       `{"v":2,"appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"version 0":       `{"v":0,"appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"version 1.0":     `{"v":1.0,"appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"version as text": `{"v":"1","appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"version null":    `{"v":null,"appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"version twice":   `{"v":1,"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"capital version": `{"V":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"trailing data":   goodCredential + "x",
		"two objects":     goodCredential + goodCredential,
		"truncated":       goodCredential[:len(goodCredential)-1],
		"half":            goodCredential[:40],
		"invalid UTF-8":   `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"x":"` + "\xff" + `"}`,
		"twice inside":    `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"x":{"a":1,"a":2}}`,
		"too deep":        `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"x":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`,
		"in a list":       "[" + goodCredential + "]",
		"large, twice":    `{"` + strings.Repeat("é", 200_000) + `":1,"` + strings.Repeat("é", 200_000) + `":1}`,
	} {
		common[name] = v
	}
	of := map[string]func(*stored) *string{
		"credential": func(s *stored) *string { return &s.credential },
		"app":        func(s *stored) *string { return &s.app },
		"developer":  func(s *stored) *string { return &s.developer },
	}
	refused := func(field, name, value string) {
		t.Helper()
		st := good()
		*of[field](&st) = value
		d := st.decide(t)
		if d.Reason != authz.RecordUnreadable {
			t.Errorf("%s is %s: got %v, want %v", field, name, d.Reason, authz.RecordUnreadable)
		}
		if !strings.HasPrefix(d.Problem, field) {
			t.Errorf("%s is %s: problem %q does not say which record it is about", field, name, d.Problem)
		}
		if len(d.Problem) > 300 {
			t.Errorf("%s is %s: the problem has %d bytes, want a bounded one", field, name, len(d.Problem))
		}
	}
	for field := range of {
		for name, value := range common {
			refused(field, name, value)
		}
	}
	for name, value := range map[string]string{
		"without app":             `{"v":1,"developerId":"dev-1","expiresAt":-1}`,
		"app in other case":       `{"v":1,"appid":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"app empty":               `{"v":1,"appId":"","developerId":"dev-1","expiresAt":-1}`,
		"app null":                `{"v":1,"appId":null,"developerId":"dev-1","expiresAt":-1}`,
		"app a number":            `{"v":1,"appId":1,"developerId":"dev-1","expiresAt":-1}`,
		"app a list":              `{"v":1,"appId":["app-1"],"developerId":"dev-1","expiresAt":-1}`,
		"app twice":               `{"v":1,"appId":"app-1","appId":"app-1","developerId":"dev-1","expiresAt":-1}`,
		"without developer":       `{"v":1,"appId":"app-1","expiresAt":-1}`,
		"developer null":          `{"v":1,"appId":"app-1","developerId":null,"expiresAt":-1}`,
		"without expiry":          `{"v":1,"appId":"app-1","developerId":"dev-1"}`,
		"expiry null":             `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":null}`,
		"expiry text":             `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":"-1"}`,
		"expiry a fraction":       `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1.5}`,
		"expiry beyond 64 bits":   `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":99999999999999999999}`,
		"expiry true":             `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":true}`,
		"expiry twice":            `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":1,"expiresAt":-1}`,
		"expiry under two names":  `{"v":1,"appId":"app-1","developerId":"dev-1","expiresat":-1}`,
		"scopes null":             `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":null}`,
		"scopes text":             `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":"READ"}`,
		"scopes numbers":          `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":[1]}`,
		"an empty scope":          `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":["READ",""]}`,
		"a scope that is two":     `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":["READ ADMIN"]}`,
		"a scope with a new line": `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":["READ\nADMIN"]}`,
		"a large scope":           `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":["a ` + strings.Repeat("b", 100_000) + `"]}`,
		"a scope with a NUL":      `{"v":1,"appId":"app-1","developerId":"dev-1","expiresAt":-1,"scopes":["READ\u0000"]}`,
	} {
		refused("credential", name, value)
	}
	for name, value := range map[string]string{
		"without developer":  `{"v":1,"name":"Test"}`,
		"developer null":     `{"v":1,"developerId":null}`,
		"developer empty":    `{"v":1,"developerId":""}`,
		"developer a number": `{"v":1,"developerId":7}`,
	} {
		refused("app", name, value)
	}
	st := good()
	st.app = `{"v":1,"developerId":"dev-2"}`
	if d := st.decide(t); d.Reason != authz.RecordUnreadable {
		t.Errorf("app and credential name different developers: got %v, want %v", d.Reason, authz.RecordUnreadable)
	}
}

func TestNoEntriesIsNoRecord(t *testing.T) {
	s := space(t, "/keygate")
	if c := s.Credential(nil); c.Exists {
		t.Errorf("credential: got %+v, want none", c)
	}
	if a := s.App(nil); a.Exists {
		t.Errorf("app: got %+v, want none", a)
	}
	if d := s.Developer(nil); d.Exists {
		t.Errorf("developer: got %+v, want none", d)
	}
	none := stored{absent, absent, absent, absent, absent, absent, absent}
	if d := none.decide(t); d.Reason != authz.KeyUnknown {
		t.Errorf("nothing stored: got %v, want %v", d.Reason, authz.KeyUnknown)
	}
}

func TestEntriesThatNameNothing(t *testing.T) {
	s := space(t, "/keygate")
	k := keyspace.KeyRecord("acme", id(t, hexID))
	folder := s.Folder(k)
	// Paths that are not canonical neither open nor close, whatever stands there.
	c := s.Credential(entries(
		folder+"Status", "approved", folder+"status/", "approved", folder+"products/a%2fb", "approved", folder+"products/", "approved",
		folder+"products/x/y", "approved", folder+"note", "x", s.Details(k), goodCredential,
	))
	if !c.Exists || c.Status.Status != authz.StatusNone || len(c.Products) != 0 || c.Problem != "" {
		t.Errorf("got %+v, want a credential without status and products", c)
	}
	st := good()
	c = s.Credential(entries(folder+"STATUS", "revoked", s.Status(k), st.keyStatus, folder+"products/Weathe%72", "revoked", s.KeyProduct(k, "Weather"), "approved"))
	if c.Status.Status != authz.StatusApproved || c.Products["Weather"].Status != authz.StatusApproved || len(c.Products) != 1 {
		t.Errorf("got %+v, want what the canonical paths say", c)
	}
}

// FuzzRecord holds that no stored values open but exact ones.
func FuzzRecord(f *testing.F) {
	g := good()
	add := func(s stored) {
		f.Add([]byte(s.keyStatus), []byte(s.product), []byte(s.credential), []byte(s.appStatus), []byte(s.app), []byte(s.developerStatus), []byte(s.developer))
	}
	add(g)
	for _, v := range hostile() {
		if len(v) > 1000 {
			continue
		}
		s := g
		s.keyStatus = v
		add(s)
		s = g
		s.credential = v
		add(s)
	}
	f.Fuzz(func(t *testing.T, keyStatus, product, credential, appStatus, app, developerStatus, developer []byte) {
		st := stored{
			string(keyStatus), string(product), string(credential), string(appStatus), string(app), string(developerStatus), string(developer),
		}
		d := st.decide(t)
		exact := st.keyStatus == "approved" && st.product == "approved" && st.appStatus == "approved" && st.developerStatus == "active"
		if d.Allowed() && !exact {
			t.Fatalf("allowed by %+v", st)
		}
		if d.Allowed() && (d.App == "" || d.Developer == "") {
			t.Fatalf("allowed without an identity: %+v", st)
		}
		if exact && st.credential == goodCredential && st.app == goodApp && st.developer == goodDeveloper && !d.Allowed() {
			t.Fatalf("good records refused as %v: %s", d.Reason, d.Problem)
		}
		// One level's word decides alone, whatever stands at the others.
		if st.keyStatus == "revoked" && d.Reason != authz.KeyRevoked {
			t.Fatalf("a revoked key: got %v, want %v", d.Reason, authz.KeyRevoked)
		}
		if d.Reason == authz.Internal {
			t.Fatalf("stored values became an internal error: %s", d.Problem)
		}
	})
}
