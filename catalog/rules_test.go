package catalog_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
)

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// A rule and what it says to a text; nothing for one that it takes.
func TestRules(t *testing.T) {
	email := func(s string) error {
		_, err := catalog.ParseEmail(s)
		return err
	}
	long := strings.Repeat("x", 256)
	const (
		alphabet = "want only letters and digits of ASCII, space and ._#-$%"
		address  = "is no e-mail address: want something like ann@example.com"
	)
	for _, tt := range []struct {
		name  string
		check func(string) error
		in    string
		want  string
	}{
		{"e-mail", email, "ann@example.com", ""},
		{"e-mail", email, "Ann+1@Example.com", ""},
		{"e-mail", email, "ann/o@localhost", ""},
		{"e-mail", email, "", "is empty"},
		{"e-mail", email, "ann", address},
		{"e-mail", email, "@example.com", address},
		{"e-mail", email, "ann@", address},
		{"e-mail", email, "a@b@c", address},
		{"e-mail", email, "ann b@example.com", address},
		{"e-mail", email, "ann@exam\u00a0ple.com", address},
		{"e-mail", email, "ann@example.com\n", "holds a control character"},
		{"e-mail", email, "a@" + long, "has 258 bytes, want at most 255"},

		{"app name", catalog.CheckAppName, "AnotherTestApp", ""},
		{"app name", catalog.CheckAppName, "7 a.b_c#d-e$f%g", ""},
		{"app name", catalog.CheckAppName, "", "is empty"},
		{"app name", catalog.CheckAppName, "-a", "does not begin with a letter or digit of ASCII"},
		{"app name", catalog.CheckAppName, ".", "does not begin with a letter or digit of ASCII"},
		{"app name", catalog.CheckAppName, "a ", "begins or ends with a space"},
		{"app name", catalog.CheckAppName, "a/b", "holds '/', " + alphabet},
		{"app name", catalog.CheckAppName, "<script>", "holds '<', " + alphabet},
		{"app name", catalog.CheckAppName, "é", "holds 'é', " + alphabet},
		{"app name", catalog.CheckAppName, "a\u0161", "holds 'š', " + alphabet}, // its low byte is that of 'a'
		{"app name", catalog.CheckAppName, "a\r\nb", "holds a control character"},
		{"app name", catalog.CheckAppName, "a\x00", "holds a control character"},
		{"app name", catalog.CheckAppName, "a\xff", "is not valid Unicode"},
		{"app name", catalog.CheckAppName, long, "has 256 bytes, want at most 255"},

		{"product name", catalog.CheckProductName, "Weather-Product", ""},
		{"product name", catalog.CheckProductName, "-$ %#_", ""},
		{"product name", catalog.CheckProductName, "...", ""},
		{"product name", catalog.CheckProductName, "..", `is "." or "..", want a name with a letter or digit`},
		{"product name", catalog.CheckProductName, " a", "begins or ends with a space"},
		{"product name", catalog.CheckProductName, "a=b", "holds '=', " + alphabet},
		{"product name", catalog.CheckProductName, "", "is empty"},

		{"resource", catalog.CheckResource, "/", ""},
		{"resource", catalog.CheckResource, "/*", ""},
		{"resource", catalog.CheckResource, "/**", ""},
		{"resource", catalog.CheckResource, "/*/2/**", ""},
		{"resource", catalog.CheckResource, "/foo/", ""},
		{"resource", catalog.CheckResource, "/v1.json", ""},
		{"resource", catalog.CheckResource, "", `is empty, want a path such as "/", "/**" or "/forecast/*"`},
		{"resource", catalog.CheckResource, "foo", `does not begin with "/", want "/foo"`},
		{"resource", catalog.CheckResource, "/abc*/a", `has a wildcard that is not a whole segment, want "/*/a"`},
		{"resource", catalog.CheckResource, "/abc/*a", `has a wildcard that is not a whole segment, want "/abc/*"`},
		{"resource", catalog.CheckResource, "/foo/bar/yy*/xxx/**", `has a wildcard that is not a whole segment, want "/foo/bar/*/xxx/**"`},
		{"resource", catalog.CheckResource, "/***", `has a wildcard that is not a whole segment, want "/*"`},
		{"resource", catalog.CheckResource, "/**/bad", `has "**" before its last segment, want "/**" or "/*/bad"`},
		{"resource", catalog.CheckResource, "/foo/*/**/", `has "**" before its last segment, want "/foo/*/**" or "/foo/*/*/"`},
		{"resource", catalog.CheckResource, "/a?b=*", `holds '?', want the path alone: "/a"`},
		{"resource", catalog.CheckResource, "/a\nb", "holds a control character"},
		{"resource", catalog.CheckResource, "/" + strings.Repeat("x", 2048), "has 2049 bytes, want at most 2048"},

		{"approval type", catalog.CheckApproval, "", ""},
		{"approval type", catalog.CheckApproval, "auto", ""},
		{"approval type", catalog.CheckApproval, "manual", ""},
		{"approval type", catalog.CheckApproval, "Manual", "is none of auto, manual"},

		{"callback", catalog.CheckCallbackURL, "javascript:alert(1)", ""}, // shown as text only
		{"callback", catalog.CheckCallbackURL, "https://x/\u2028", ""},
		{"callback", catalog.CheckCallbackURL, "https://x/\r\nLocation: y", "holds a control character"},
		{"callback", catalog.CheckCallbackURL, strings.Repeat("x", 2049), "has 2049 bytes, want at most 2048"},

		{"attribute value", catalog.CheckAttributeValue, "", ""},
		{"attribute value", catalog.CheckAttributeValue, "two\r\n\tlines", ""},
		{"attribute value", catalog.CheckAttributeValue, "\x00", "holds a control character"},
		{"attribute value", catalog.CheckAttributeValue, strings.Repeat("x", 2048), ""},
		{"attribute value", catalog.CheckAttributeValue, strings.Repeat("x", 2049), "has 2049 bytes, want at most 2048"},
		{"attribute name", catalog.CheckAttributeName, strings.Repeat("x", 1024), ""},
		{"attribute name", catalog.CheckAttributeName, strings.Repeat("x", 1025), "has 1025 bytes, want at most 1024"},
		{"attribute name", catalog.CheckAttributeName, "", "is empty, want 1 to 1024 bytes"},
		{"attribute name", catalog.CheckAttributeName, "a\nb", "holds a control character"},

		{"own key", catalog.CheckOwnKey, "abcdefghijklmn-_", ""},
		{"own key", catalog.CheckOwnKey, strings.Repeat("x", 2048), ""},
		{"own key", catalog.CheckOwnKey, "create", `is "create", which the API uses itself`},
		{"own key", catalog.CheckOwnKey, "", "is empty, want 16 to 2048 characters"},
		{"own key", catalog.CheckOwnKey, "abcdefghijklmno", "is weak: it has 15 characters, want at least 16"},
		{"own key", catalog.CheckOwnKey, "abcdefghijklmnop.", "holds a character outside A-Z a-z 0-9 _ -"},
		{"own key", catalog.CheckOwnKey, strings.Repeat("x", 2049), "has 2049 bytes, want at most 2048"},
		{"own secret", catalog.CheckOwnSecret, "x", ""},
		{"own secret", catalog.CheckOwnSecret, "", "is empty, want 1 to 2048 characters"},
		{"own secret", catalog.CheckOwnSecret, "a b", "holds a character outside A-Z a-z 0-9 _ -"},
	} {
		if got := message(tt.check(tt.in)); got != tt.want {
			t.Errorf("%s %.40q: got %q, want %q", tt.name, tt.in, got, tt.want)
		}
	}
}

func TestParseEmailLowersCase(t *testing.T) {
	if got, err := catalog.ParseEmail("Ann.B@Example.COM"); got != "ann.b@example.com" || err != nil {
		t.Errorf("got %q, %v, want ann.b@example.com", got, err)
	}
}

// A generated key with a wrong letter was not copied whole, however it comes in.
func TestMiscopiedKey(t *testing.T) {
	key := authz.GenerateKey()
	if err := catalog.CheckOwnKey(key); err != nil {
		t.Errorf("a generated key: got %v, want nil", err)
	}
	last := byte('0')
	if key[len(key)-1] == last {
		last = '1'
	}
	broken := key[:len(key)-1] + string(last)
	const want = "the consumer key looks like one that keygate made, but its checksum is wrong: was it copied whole?"
	_, _, err := catalog.ParseKey(broken, true)
	for _, got := range []string{message(catalog.CheckOwnKey(broken)), message(err)} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestExpiresIn(t *testing.T) {
	for _, n := range []int64{-1, 0, 1, 253402300799} {
		if err := catalog.CheckExpiresInSeconds(n); err != nil {
			t.Errorf("%d: got %v, want nil", n, err)
		}
	}
	for check, tests := range map[*func(int64) error]map[int64]string{
		ptr(catalog.CheckExpiresInSeconds): {
			-2:           "is -2, want seconds until the key expires, or -1 for never",
			253402300800: "is 253402300800, want seconds until the key expires, or -1 for never",
		},
		ptr(catalog.CheckKeyExpiresIn): {
			-2:              "is -2, want milliseconds until the key expires, or -1 for never",
			253402300800000: "is 253402300800000, want milliseconds until the key expires, or -1 for never",
		},
	} {
		for n, want := range tests {
			if got := message((*check)(n)); got != want {
				t.Errorf("%d: got %q, want %q", n, got, want)
			}
		}
	}
}

func ptr[T any](v T) *T { return &v }

func TestCheckAttributes(t *testing.T) {
	many := make([]catalog.Attribute, catalog.MaxAttributes+1)
	for i := range many {
		many[i].Name = fmt.Sprint(i)
	}
	for _, tt := range []struct {
		name string
		in   []catalog.Attribute
		want catalog.FieldError
	}{
		{"none", nil, catalog.FieldError{}},
		{"as many as may be", many[1:], catalog.FieldError{}},
		{"one too many", many, catalog.FieldError{Message: "has 19 attributes, want at most 18"}},
		{"no name", []catalog.Attribute{{"a", ""}, {"", "x"}}, catalog.FieldError{Pointer: "/1/name", Message: "is empty, want 1 to 1024 bytes"}},
		{"twice", []catalog.Attribute{{"a", ""}, {"b", ""}, {"a", "x"}}, catalog.FieldError{Pointer: "/2/name", Message: "is the name of another attribute too, want each once"}},
		{"value", []catalog.Attribute{{"a", "\x1b"}}, catalog.FieldError{Pointer: "/0/value", Message: "holds a control character"}},
	} {
		err := catalog.CheckAttributes(tt.in)
		var got catalog.FieldError
		if bad := (*catalog.FieldError)(nil); errors.As(err, &bad) {
			got = *bad
		} else if err != nil {
			t.Errorf("%s: got a %T, want a *FieldError", tt.name, err)
		}
		if got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
	if got, want := (&catalog.FieldError{Pointer: "/a", Message: "is b"}).Error(), "/a: is b"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := (&catalog.FieldError{Message: "is b"}).Error(), "is b"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func parse(t *testing.T, s string) jsonobject.Object {
	t.Helper()
	o, err := jsonobject.Parse([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestAttributes(t *testing.T) {
	for in, want := range map[string]string{
		`{}`:                  `[]`,
		`{"attributes":null}`: `[]`,
		`{"attributes":"x"}`:  `[]`,
		`{"attributes":[{"name":"b","value":"1"},{"name":"a"},{"name":3},7,{"value":"x"}]}`: `[{b 1} {a }]`,
	} {
		if got := fmt.Sprint(catalog.Attributes(parse(t, in))); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
	for _, tt := range []struct {
		in   string
		with []catalog.Attribute
		want string
	}{
		{`{"z":1}`, nil, `{"z":1,"attributes":[]}`},
		{`{"attributes":[1],"z":1}`, []catalog.Attribute{{"a", ""}}, `{"attributes":[{"name":"a","value":""}],"z":1}`},
	} {
		got, err := catalog.WithAttributes(parse(t, tt.in), tt.with).MarshalJSON()
		if string(got) != tt.want || err != nil {
			t.Errorf("%s with %v: got %s, %v, want %s", tt.in, tt.with, got, err, tt.want)
		}
	}
}

// Whatever is not plainly auto waits for approval.
func TestManual(t *testing.T) {
	for in, want := range map[string]bool{
		`{}`: false, `{"approvalType":null}`: false, `{"approvalType":""}`: false, `{"approvalType":"auto"}`: false,
		`{"approvalType":"manual"}`: true, `{"approvalType":"Manual"}`: true, `{"approvalType":"AUTO"}`: true, `{"approvalType":1}`: true,
	} {
		if got := (catalog.Product{Details: parse(t, in)}).Manual(); got != want {
			t.Errorf("%s: got %v, want %v", in, got, want)
		}
	}
}

func TestValidateDeveloperAndProduct(t *testing.T) {
	valid := catalog.Developer{ID: "d", Email: "ann@example.com", Status: authz.StatusActive}
	for _, tt := range []struct {
		name   string
		damage func(*catalog.Developer)
		want   string
	}{
		{"valid", func(*catalog.Developer) {}, ""},
		{"without an address", func(d *catalog.Developer) { d.Email = "" }, ""},
		{"no id", func(d *catalog.Developer) { d.ID = "" }, `"developerId" is empty`},
		{"address", func(d *catalog.Developer) { d.Email = "ann" }, `"email" is no e-mail address: want something like ann@example.com`},
		{"upper case", func(d *catalog.Developer) { d.Email = "Ann@x" }, `"email" has upper-case letters, want "ann@x"`},
		{"an app's status", func(d *catalog.Developer) { d.Status = authz.StatusApproved }, `status "approved" is none of active, inactive`},
		{"status in details", func(d *catalog.Developer) { d.Details = parse(t, `{"status":"active"}`) }, `member "status" belongs to a key of its own`},
		{"version", func(d *catalog.Developer) { d.Details = parse(t, `{"v":1}`) }, `member "v": the stored record uses this name itself`},
	} {
		d := valid
		tt.damage(&d)
		if got := message(d.Validate()); got != tt.want {
			t.Errorf("developer, %s: got %q, want %q", tt.name, got, tt.want)
		}
	}
	for _, tt := range []struct {
		p    catalog.Product
		want string
	}{
		{catalog.Product{Name: "p/é"}, ""},
		{catalog.Product{}, `"name" is empty`},
		{catalog.Product{Name: "p", Details: parse(t, `{"v":1}`)}, `member "v": the stored record uses this name itself`},
	} {
		if got := message(tt.p.Validate()); got != tt.want {
			t.Errorf("product %q: got %q, want %q", tt.p.Name, got, tt.want)
		}
	}
	for word, want := range map[string]authz.Status{
		"active": authz.StatusActive, "Inactive": authz.StatusInactive,
		"approved": authz.StatusNone, "login_lock": authz.StatusNone, "": authz.StatusNone,
	} {
		got, err := catalog.ParseDeveloperStatus(word)
		if got != want || (err == nil) != (want != authz.StatusNone) {
			t.Errorf("ParseDeveloperStatus(%q) = %v, %v, want %v", word, got, err, want)
		}
	}
	for _, name := range []string{catalog.MemberSealedKey, catalog.MemberSealedSecret} {
		if catalog.CheckCredentialMember(name) == nil {
			t.Errorf("a credential may have a member %q, want it reserved", name)
		}
	}
}
