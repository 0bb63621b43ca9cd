package keyspace_test

import (
	"strings"
	"testing"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

const hexID = "e5dd58ddbabe4096300f9e19c688651ebadf0fc66605b69493d772c65fa8c1da"

func space(t testing.TB, prefix string) keyspace.Space {
	t.Helper()
	s, err := keyspace.New(prefix)
	if err != nil {
		t.Fatalf("prefix %q: %v", prefix, err)
	}
	return s
}

func id(t testing.TB, hex string) authz.KeyID {
	t.Helper()
	id, err := authz.ParseKeyID(hex)
	if err != nil {
		t.Fatalf("key id %q: %v", hex, err)
	}
	return id
}

func TestNew(t *testing.T) {
	for _, prefix := range []string{"/keygate", "/k", "/a/b/c", "/keygate-test_1.x"} {
		s, err := keyspace.New(prefix)
		if err != nil || s.Prefix() != prefix || s.Watched() != prefix+"/" {
			t.Errorf("%q: got %q watching %q, %v", prefix, s.Prefix(), s.Watched(), err)
		}
	}
	for _, prefix := range []string{"", "/", "keygate", "/keygate/", "//keygate", "/a//b", "/a b", "/a\n", "/é", "/a\x00", "/a\x7f", "//"} {
		if s, err := keyspace.New(prefix); err == nil {
			t.Errorf("%q: got %q, want an error", prefix, s.Prefix())
		}
	}
}

// TestPaths writes the schema out: whoever changes a line here changes what
// etcdctl users type.
func TestPaths(t *testing.T) {
	s := space(t, "/keygate")
	k := keyspace.KeyRecord("acme", id(t, hexID))
	tests := []struct{ name, got, want string }{
		{"key status", s.Status(k), "/keygate/acme/keys/" + hexID + "/status"},
		{"product on key", s.KeyProduct(k, "Weather-Product"), "/keygate/acme/keys/" + hexID + "/products/Weather-Product"},
		{"credential", s.Details(k), "/keygate/acme/keys/" + hexID + "/credential"},
		{"key folder", s.Folder(k), "/keygate/acme/keys/" + hexID + "/"},
		{"app status", s.Status(keyspace.AppRecord("acme", "6ed3a4d1-4733")), "/keygate/acme/apps/6ed3a4d1-4733/status"},
		{"app", s.Details(keyspace.AppRecord("acme", "6ed3a4d1-4733")), "/keygate/acme/apps/6ed3a4d1-4733/app"},
		{"developer status", s.Status(keyspace.DeveloperRecord("acme", "Z2S37rxX")), "/keygate/acme/developers/Z2S37rxX/status"},
		{"developer", s.Details(keyspace.DeveloperRecord("acme", "Z2S37rxX")), "/keygate/acme/developers/Z2S37rxX/developer"},
		{"product", s.Details(keyspace.ProductRecord("acme", "Weather")), "/keygate/acme/products/Weather/product"},
		{"barrier", s.Barrier("acme"), "/keygate/acme/.barrier"},
		{"index", s.Index("acme"), "/keygate.index/acme/"},
		{"escaped organization", s.Barrier("a/b c"), "/keygate/a%2Fb%20c/.barrier"},
		{"escaped product", s.KeyProduct(k, "a/b%2F ü"), "/keygate/acme/keys/" + hexID + "/products/a%2Fb%252F%20%C3%BC"},
		{"escaped developer", s.Status(keyspace.DeveloperRecord("acme", "../x")), "/keygate/acme/developers/..%2Fx/status"},
	}
	for _, tt := range tests {
		if tt.got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, tt.got, tt.want)
		}
	}
	if !strings.HasPrefix(s.Probe(), s.Watched()) {
		t.Errorf("probe: got %s, want it below %s", s.Probe(), s.Watched())
	}
	if p, err := s.Parse(s.Probe()); err == nil {
		t.Errorf("probe: parsed as %+v, want nothing's name", p)
	}
	if strings.HasPrefix(s.Index("acme"), s.Watched()) {
		t.Errorf("index %s lies below the watched prefix", s.Index("acme"))
	}
}

func TestParse(t *testing.T) {
	key := keyspace.KeyRecord("acme", id(t, hexID))
	folder := "/keygate/acme/keys/" + hexID + "/"
	tests := []struct {
		in   string
		want keyspace.Path
	}{
		{folder + "status", keyspace.Path{Record: key, Field: keyspace.FieldStatus}},
		{folder + "credential", keyspace.Path{Record: key, Field: keyspace.FieldDetails}},
		{folder + "products/Weather", keyspace.Path{Record: key, Field: keyspace.FieldProduct, Product: "Weather"}},
		{folder + "products/a%2Fb", keyspace.Path{Record: key, Field: keyspace.FieldProduct, Product: "a/b"}},
		{folder + "products/.", keyspace.Path{Record: key, Field: keyspace.FieldProduct, Product: "."}},
		{"/keygate/acme/apps/a-1/status", keyspace.Path{Record: keyspace.AppRecord("acme", "a-1"), Field: keyspace.FieldStatus}},
		{"/keygate/acme/apps/a-1/app", keyspace.Path{Record: keyspace.AppRecord("acme", "a-1"), Field: keyspace.FieldDetails}},
		{"/keygate/acme/developers/d/status", keyspace.Path{Record: keyspace.DeveloperRecord("acme", "d"), Field: keyspace.FieldStatus}},
		{"/keygate/acme/developers/d/developer", keyspace.Path{Record: keyspace.DeveloperRecord("acme", "d"), Field: keyspace.FieldDetails}},
		{"/keygate/acme/products/p/product", keyspace.Path{Record: keyspace.ProductRecord("acme", "p"), Field: keyspace.FieldDetails}},
		{"/keygate/acme/.barrier", keyspace.Path{Record: keyspace.Record{Organization: "acme"}}},
		{"/keygate/a%20b/apps/x/app", keyspace.Path{Record: keyspace.AppRecord("a b", "x"), Field: keyspace.FieldDetails}},

		// A key that the schema does not know still belongs to its record, so
		// that its event raises the record's fence.
		{folder + "Status", keyspace.Path{Record: key}},
		{folder + "app", keyspace.Path{Record: key}},
		{folder + "note", keyspace.Path{Record: key}},
		{folder + "status/x", keyspace.Path{Record: key}},
		{folder + "products/a/b", keyspace.Path{Record: key}},
		{folder + "products", keyspace.Path{Record: key}},
		{folder, keyspace.Path{Record: key}},
		{"/keygate/acme/apps/a-1/products/p", keyspace.Path{Record: keyspace.AppRecord("acme", "a-1")}},
		{"/keygate/acme/products/p/status", keyspace.Path{Record: keyspace.ProductRecord("acme", "p")}},
	}
	s := space(t, "/keygate")
	for _, tt := range tests {
		if got, err := s.Parse(tt.in); err != nil || got != tt.want {
			t.Errorf("%s: got %+v, %v, want %+v", tt.in, got, err, tt.want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	tests := []struct{ name, in string }{
		{"nothing", ""},
		{"the prefix", "/keygate"},
		{"the prefix with its slash", "/keygate/"},
		{"another space", "/keygate2/acme/apps/a/status"},
		{"the index", "/keygate.index/acme/apps/a/status"},
		{"the replicas", "/keygate.replicas/x"},
		{"a space below this one's prefix", "/x/keygate/acme/apps/a/status"},
		{"no leading slash", "keygate/acme/apps/a/status"},
		{"organization alone", "/keygate/acme"},
		{"folder alone", "/keygate/acme/apps"},
		{"no field", "/keygate/acme/apps/a"},
		{"empty organization", "/keygate//apps/a/status"},
		{"organization begins with a dot", "/keygate/.acme/apps/a/status"},
		{"organization is a dot", "/keygate/./apps/a/status"},
		{"organization is two dots", "/keygate/../apps/a/status"},
		{"organization is an escaped dot", "/keygate/%2Eacme/apps/a/status"},
		{"barrier of an organization with a dot", "/keygate/.acme/.barrier"},
		{"barrier in other case", "/keygate/acme/.Barrier"},
		{"unknown folder", "/keygate/acme/things/a/status"},
		{"folder in other case", "/keygate/acme/Apps/a/status"},
		{"singular folder", "/keygate/acme/app/a/status"},
		{"empty name", "/keygate/acme/apps//status"},
		{"double slash", "/keygate/acme//apps/a/status"},
		{"lower-case escape", "/keygate/acme/apps/a%2fb/status"},
		{"needless escape", "/keygate/acme/apps/%61/status"},
		{"unescaped blank", "/keygate/acme/apps/a b/status"},
		{"unescaped UTF-8", "/keygate/acme/apps/ü/status"},
		{"half an escape", "/keygate/acme/apps/a%2/status"},
		{"no escape", "/keygate/acme/apps/a%zz/status"},
		{"a bare percent", "/keygate/acme/apps/100%/status"},
		{"plus for a blank is a plus", "/keygate/a%2Bb/apps/a/status"},
		{"product in lower-case escape", "/keygate/acme/keys/" + hexID + "/products/a%2fb"},
		{"product without name", "/keygate/acme/keys/" + hexID + "/products/"},
		{"upper-case key id", "/keygate/acme/keys/" + strings.ToUpper(hexID) + "/status"},
		{"short key id", "/keygate/acme/keys/" + hexID[:63] + "/status"},
		{"long key id", "/keygate/acme/keys/" + hexID + "0/status"},
		{"escaped key id", "/keygate/acme/keys/%65" + hexID[1:] + "/status"},
		{"a key, not its id", "/keygate/acme/keys/giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb/status"},
		{"NUL", "/keygate/acme/apps/a\x00/status"},
		{"newline", "/keygate/acme/apps/a\n/status"},
		{"invalid UTF-8", "/keygate/acme/apps/\xff/status"},
	}
	s := space(t, "/keygate")
	for _, tt := range tests {
		if p, err := s.Parse(tt.in); err == nil {
			t.Errorf("%s: %q parsed as %+v, want an error", tt.name, tt.in, p)
		}
	}
}

// TestParseErrors holds that an error can be logged: it is short, and shows no
// consumer key that somebody wrote where its id belongs.
func TestParseErrors(t *testing.T) {
	const key = "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb"
	s := space(t, "/keygate")
	for _, in := range []string{
		"/keygate/acme/keys/" + key + "/status", "/keygate/acme/keys/" + key, "/keygate/acme/keys/" + key + "/products/a%2fb",
		"/keygate/acme/keys/" + key + strings.Repeat("x", 1<<20), "/keygate/.acme/keys/" + key + "/status",
		"/keygate/" + strings.Repeat("%2f", 1<<20) + "/apps/a/status", "/keygate/acme/" + strings.Repeat("x", 1<<20) + "/a/status",
		"/keygate/acme/apps/" + strings.Repeat("ü", 1<<20) + "/status", strings.Repeat("x", 1<<20),
	} {
		_, err := s.Parse(in)
		if err == nil {
			t.Errorf("%.60q…: got nil, want an error", in)
			continue
		}
		if msg := err.Error(); len(msg) > 3000 || strings.Contains(msg, key) || strings.Contains(msg, key[:8]) {
			t.Errorf("%.60q…: an error of %d bytes, or one with the key in it: %.200s", in, len(msg), msg)
		}
	}
	_, err := s.Parse("/keygate/acme/apps/a%2fb/status")
	if want := `"/keygate/acme/apps/a%2fb/status": segment "a%2fb" is not canonical, want "a%2Fb"`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestCheckOrganization(t *testing.T) {
	for _, org := range []authz.Organization{"a", "acme", "a.b", "a/b", "ü"} {
		if err := keyspace.CheckOrganization(org); err != nil {
			t.Errorf("%q: got %v, want nil", org, err)
		}
	}
	for _, org := range []authz.Organization{"", ".", "..", ".acme"} {
		if err := keyspace.CheckOrganization(org); err == nil {
			t.Errorf("%q: got nil, want an error", org)
		}
	}
}

func TestKindString(t *testing.T) {
	want := []string{"none", "keys", "apps", "developers", "products", "none"}
	for k, w := range want {
		if got := keyspace.Kind(k).String(); got != w {
			t.Errorf("kind %d: got %q, want %q", k, got, w)
		}
	}
}

// build writes p's path anew; ok is false for a key the schema does not know.
func build(s keyspace.Space, p keyspace.Path) (path string, ok bool) {
	switch {
	case p.Record.Kind == keyspace.KindNone:
		return s.Barrier(p.Record.Organization), true
	case p.Field == keyspace.FieldStatus:
		return s.Status(p.Record), true
	case p.Field == keyspace.FieldProduct:
		return s.KeyProduct(p.Record, p.Product), true
	case p.Field == keyspace.FieldDetails:
		return s.Details(p.Record), true
	}
	return "", false
}

// FuzzParse holds that one thing has one path: what Parse accepts is rebuilt
// byte for byte, or belongs to the folder that it lies in.
func FuzzParse(f *testing.F) {
	for _, in := range []string{
		"/keygate/acme/keys/" + hexID + "/status", "/keygate/acme/keys/" + hexID + "/products/a%2Fb",
		"/keygate/acme/apps/a%2fb/status", "/keygate/acme/developers/d/developer", "/keygate/acme/.barrier",
		"/keygate/a%20b/products/p/product", "/keygate//apps/a/status", "/keygate/../apps/a/status", "/keygate/acme/apps/a/x/y",
		"/keygate/acme/keys/" + strings.ToUpper(hexID) + "/status", "/keygate/acme/apps/%FF/status",
	} {
		f.Add(in)
	}
	s := space(f, "/keygate")
	f.Fuzz(func(t *testing.T, in string) {
		p, err := s.Parse(in)
		if err != nil {
			if p != (keyspace.Path{}) {
				t.Fatalf("%q: got %+v beside an error", in, p)
			}
			return
		}
		if err := keyspace.CheckOrganization(p.Record.Organization); err != nil {
			t.Fatalf("%q: parsed, but %v", in, err)
		}
		if out, ok := build(s, p); ok {
			if out != in {
				t.Fatalf("%q: rebuilt as %q", in, out)
			}
		} else if !strings.HasPrefix(in, s.Folder(p.Record)) {
			t.Fatalf("%q: not below its record's folder %q", in, s.Folder(p.Record))
		}
	})
}

// FuzzBuild holds that any name, however odd, comes back from its path as it
// was, and stays inside its own folder.
func FuzzBuild(f *testing.F) {
	for _, name := range []string{"Weather-Product", "a/b", "..", "%2F", "a b", "ü", "\x00\xff", "*", "+", "&;?#"} {
		f.Add("acme", name, name)
	}
	s := space(f, "/keygate")
	f.Fuzz(func(t *testing.T, org, name, product string) {
		if keyspace.CheckOrganization(authz.Organization(org)) != nil || name == "" || product == "" {
			return
		}
		o := authz.Organization(org)
		key := keyspace.KeyRecord(o, id(t, hexID))
		app := keyspace.AppRecord(o, authz.AppID(name))
		developer := keyspace.DeveloperRecord(o, authz.DeveloperID(name))
		for path, want := range map[string]keyspace.Path{
			s.Status(key):  {Record: key, Field: keyspace.FieldStatus},
			s.Details(key): {Record: key, Field: keyspace.FieldDetails},
			s.KeyProduct(key, authz.ProductName(product)): {Record: key, Field: keyspace.FieldProduct, Product: authz.ProductName(product)},
			s.Status(app):        {Record: app, Field: keyspace.FieldStatus},
			s.Details(app):       {Record: app, Field: keyspace.FieldDetails},
			s.Status(developer):  {Record: developer, Field: keyspace.FieldStatus},
			s.Details(developer): {Record: developer, Field: keyspace.FieldDetails},
			s.Barrier(o):         {Record: keyspace.Record{Organization: o}},
		} {
			if got, err := s.Parse(path); err != nil || got != want {
				t.Fatalf("%q: got %+v, %v, want %+v", path, got, err, want)
			}
		}
	})
}
