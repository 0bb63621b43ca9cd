package apigee_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"keygate/apigee"
	"keygate/authz"
	"keygate/catalog"
)

const (
	key    = "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb"
	secret = "SXg8JizqeTA8j3gX"

	// miscopied is in keygate's own format, but for its checksum.
	miscopied = "kg_0123456789abcdefghijABCDEFGHIJ01_000000"
)

// readAll reads every submission of an input named "f".
func readAll(t testing.TB, r io.Reader, allowWeak bool) (all []catalog.Submission) {
	t.Helper()
	in := apigee.NewReader(apigee.ReaderConfig{Name: "f", AllowWeakKeys: allowWeak}, r)
	for {
		s, err := in.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatalf("Next: %v", err)
		}
		all = append(all, s)
	}
}

// words are the names of what was read, and the refusals.
func words(all []catalog.Submission) (w []string) {
	for _, s := range all {
		switch {
		case s.App != nil:
			w = append(w, s.App.Name+" at "+s.Place.String())
		case s.Developer != nil:
			w = append(w, s.Developer.Email+" at "+s.Place.String())
		case s.Product != nil:
			w = append(w, string(s.Product.Name)+" at "+s.Place.String())
		}
		for _, r := range s.Refused {
			w = append(w, r.Error())
		}
	}
	return w
}

func app(name string) string {
	return fmt.Sprintf(`{"appId":"id-%s","developerId":"d","name":"%s","status":"approved"}`, name, name)
}

func developer(name string) string {
	return fmt.Sprintf(`{"apps":["x"],"developerId":"id-%s","email":"%s@x","status":"active"}`, name, name)
}

func product(name string) string {
	return fmt.Sprintf(`{"approvalType":"auto","name":"%s"}`, name)
}

func weatherApp(t testing.TB) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "examples", "quickstart", "weather-app.json"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestWeatherApp(t *testing.T) {
	all := readAll(t, strings.NewReader(weatherApp(t)), false)
	if len(all) != 1 || all[0].App == nil || len(all[0].Refused) > 0 {
		t.Fatalf("got %v, want one app", words(all))
	}
	a := all[0].App
	if a.ID != "6ed3a4d1-4733-439a-80a4-0d71149ec9ad" || a.Developer != "Z2S37rxX2Suzkwtg" || a.Name != "AnotherTestApp" || a.Status != authz.StatusApproved {
		t.Errorf("got app %q of %q, %q, %v", a.ID, a.Developer, a.Name, a.Status)
	}
	c := a.Credentials[0]
	k, _ := authz.ParseConsumerKey(key)
	if c.Key != k.ID() || c.Hint != "KLhb" || c.Status != authz.StatusApproved || c.ExpiresAt != authz.NeverExpires {
		t.Errorf("got credential %v, hint %q, %v, expires %d", c.Key, c.Hint, c.Status, c.ExpiresAt)
	}
	if p := c.Products; len(p) != 1 || p[0].Name != "Weather-Product" || p[0].Status != authz.StatusRevoked {
		t.Errorf("got products %v, want Weather-Product, revoked", p)
	}
	details, _ := a.Details.MarshalJSON()
	if got, want := string(details), `{"accessType":"","appFamily":"default","appId":"6ed3a4d1-4733-439a-80a4-0d71149ec9ad","attributes":[{"name":"DisplayName","value":"AnotherTestApp"},{"name":"Notes","value":""}],"callbackUrl":"","createdAt":1415728893126,"createdBy":"wwitman@apigee.com","credentials":[],"developerId":"Z2S37rxX2Suzkwtg","lastModifiedAt":1420682967414,"lastModifiedBy":"wwitman@apigee.com","name":"AnotherTestApp","scopes":[]}`; got != want {
		t.Errorf("details of the app: %s", cmp.Diff(want, got))
	}
	details, _ = c.Details.MarshalJSON()
	if got, want := string(details), `{"apiProducts":[],"attributes":[],"expiresAt":-1,"issuedAt":1415728893154,"scopes":[]}`; got != want {
		t.Errorf("details of the credential: %s", cmp.Diff(want, got))
	}
}

// Apigee X writes 64-bit numbers as strings and leaves out what is empty.
func TestXRendering(t *testing.T) {
	all := readAll(t, strings.NewReader(`{"appId":"a","createdAt":"1415728893126","credentials":[{"apiProducts":[{"apiproduct":"p","status":"pending","since":{"x":[1,"2"]}}],
		"consumerKey":"`+key+`","consumerSecret":"`+secret+`","expiresAt":"1735689600000","issuedAt":"1415728893154","status":"Approved"}],
		"developerId":"d","keyExpiresIn":"-1","lastModifiedAt":"1420682967414","name":"n","status":"REVOKED","somethingNew":{"b":1,"a":[]}}`), false)
	if len(all) != 1 || all[0].App == nil || len(all[0].Refused) > 0 {
		t.Fatalf("got %v, want one app", words(all))
	}
	a := all[0].App
	c := a.Credentials[0]
	if a.Status != authz.StatusRevoked || c.Status != authz.StatusApproved || c.ExpiresAt != 1735689600000 || c.Products[0].Status != authz.StatusPending {
		t.Errorf("got app %v, credential %v, expires %d, product %v", a.Status, c.Status, c.ExpiresAt, c.Products[0].Status)
	}
	for _, tt := range []struct {
		o    interface{ MarshalJSON() ([]byte, error) }
		want string
	}{
		{a.Details, `{"appId":"a","createdAt":1415728893126,"credentials":[],"developerId":"d","keyExpiresIn":-1,"lastModifiedAt":1420682967414,"name":"n","somethingNew":{"b":1,"a":[]}}`},
		{c.Details, `{"apiProducts":[],"expiresAt":1735689600000,"issuedAt":1415728893154}`},
		{c.Products[0].Details, `{"apiproduct":"p","since":{"x":[1,"2"]}}`},
	} {
		if got, _ := tt.o.MarshalJSON(); string(got) != tt.want {
			t.Errorf("details: %s", cmp.Diff(tt.want, string(got)))
		}
	}
}

func TestForms(t *testing.T) {
	cut := `{"appId":"x","developerId":"d","name":"x"`
	for _, tt := range []struct {
		name, in string
		want     []string
	}{
		{"one", app("a"), []string{"a at f:1:1"}},
		{"list", "[" + app("a") + ",\n  " + app("b") + "]\n", []string{"a at f:1:2", "b at f:2:3"}},
		{"empty list", " [ ] ", nil},
		{"lines", app("a") + "\n\n" + app("b") + "\r\n", []string{"a at f:1:1", "b at f:3:1"}},
		{"lists one a line", "[" + app("a") + "]\n[" + app("b") + "]", []string{"a at f:1:2", "b at f:2:2"}},
		{"list call", `{"app":[` + app("a") + "," + app("b") + `],"nextPageToken":"x","totalSize":2}` + "\n" + app("c"), []string{"a at f:1:9", "b at f:1:75", "c at f:2:1"}},
		{"list call, list last", `{"totalSize":2, "x":{"app":[]}, "app" : [ ` + app("a") + ` ] }`, []string{"a at f:1:43"}},
		{"list call, empty", `{"app":[]}`, nil},
		{"list call, twice", `{"app":[` + app("a") + `],"app":[` + app("b") + `]}` + "\n" + app("c"), []string{"a at f:1:9", `f:1:83: member "app" stands twice`, "c at f:2:1"}},

		{"developer", developer("ann"), []string{"ann@x at f:1:1"}},
		{"product", product("p"), []string{"p at f:1:1"}},
		{"each kind, one a line", product("p") + "\n" + developer("ann") + "\n" + app("a"), []string{"p at f:1:1", "ann@x at f:2:1", "a at f:3:1"}},
		{"each kind in a list", "[" + app("a") + ",\n" + developer("ann") + ",\n" + product("p") + "]", []string{"a at f:1:2", "ann@x at f:2:1", "p at f:3:1"}},
		{"developers", `{"developer":[` + developer("ann") + "," + developer("bob") + "]}", []string{"ann@x at f:1:15", "bob@x at f:1:87"}},
		{"products", `{"apiProduct":[` + product("p") + "]}", []string{"p at f:1:16"}},
		{"product without an approval type in its list", `{"apiProduct":[{"name":"p","quota":"1"}]}`, []string{"p at f:1:16"}},
		{"one document", `{"apiProducts": [ ` + product("p") + " ],\n\"apps\": [\n" + app("a") + "],\n\"developers\":[" + developer("ann") + "]}\n" + app("b"),
			[]string{"p at f:1:19", "a at f:3:1", "ann@x at f:4:15", "b at f:5:1"}},
		{"one document, some of it empty", `{"apiProducts":[],"apps":[` + app("a") + `],"developers":[]}`, []string{"a at f:1:27"}},
		{"nothing found", `{}` + "\n" + `{"apps":[],"apiProducts":[],"developers":[],"totalSize":0}`, nil},
		{"a list twice in one document", `{"apps":[` + app("a") + `],"developers":[` + developer("b") + `],"apps":[` + app("c") + "]}", []string{"a at f:1:10", "b@x at f:1:91", `f:1:168: member "apps" stands twice`}},
		{"an app's products are no records", `{"apiProducts":[],` + app("a")[1:] + "\n" + `{"apiProducts":["p"],` + app("b")[1:] + "\n" + `{"apiProducts":[ { "apiproduct":"p"}],` + app("c")[1:] + "\n" + `{"apiProducts":[{"status":"approved"}],` + app("d")[1:],
			[]string{"a at f:1:1", "b at f:2:1", "c at f:3:1", "d at f:4:1"}},
		{"list of names", `{"apps":["a","b"]}` + "\n" + app("b"), []string{`f:1:1: this is neither an app ("appId") nor a developer ("developerId") nor an API product ("approvalType")`, "b at f:2:1"}},
		{"an app among developers", `{"developer":[` + app("a") + "," + developer("b") + "]}", []string{`f:1:15: the developer must have "email"`, "b@x at f:1:81"}},
		{"something else", `{"name":"prod","hostnames":["x"]}`, []string{`f:1:1: this is neither an app ("appId") nor a developer ("developerId") nor an API product ("approvalType")`}},

		{"nothing", " \n", []string{"f: there is nothing in it"}},
		{"byte order mark", "\ufeff" + app("a"), []string{"f:1:1: want a JSON object or list; this looks like a byte order mark: save it as UTF-8 without one"}},
		{"page", "<html>\n<body>\n  oops\n", []string{"f:1:1: want a JSON object or list; nothing behind line 1 was read"}},
		{"key alone", key + "\n" + app("a"), []string{"f:1:1: want a JSON object or list", "a at f:2:1"}},
		{"bad line in the middle", app("a") + "\n" + cut + "\n" + app("b"), []string{"a at f:1:1", "f:3:1: want ',' or the closing bracket here", "b at f:3:1"}},
		{"bad last line", app("a") + "\n" + cut, []string{"a at f:1:1", "f:2:42: the JSON ends too early"}},
		{"bad and laid out", "{\n  \"appId\": \"a\"\n  \"name\": {}\n}\n" + app("b"), []string{"f:3:3: want ',' or the closing bracket here", "b at f:5:1"}},
		{"string over two lines", "{\"appId\": \"a\nb\"}\n" + app("b"), []string{"f:1:13: a string is not closed on its line", "b at f:3:1"}},
		{"wrong bracket", "[" + `{"a":[1}` + ",\n" + app("b") + "]", []string{"f:1:9: want ',' or the closing bracket here", "b at f:2:1"}},
		{"bad element", "[" + app("a") + `, {"appId":tru}, ` + app("b") + "]", []string{"a at f:1:2", "f:1:81: invalid character '}' in literal true (expecting 'e')", "b at f:1:84"}},
		{"no comma", "[" + app("a") + " " + app("b") + "]", []string{"a at f:1:2", "f:1:68: want ',' or ']' here"}},
		{"comma at the end", "[" + app("a") + ",]", []string{"a at f:1:2", "f:1:68: want a value here"}},
		{"list cut off", "[" + app("a") + ",", []string{"a at f:1:2", "f:1:68: the list is not closed: the input ends too early"}},
		{"list call cut off", `{"app":[` + app("a") + `]`, []string{"a at f:1:9", "f:1:75: the list is not closed: the input ends too early"}},
		{"behind a record", app("a") + ",\n" + app("b"), []string{"a at f:1:1", "f:1:66: want a JSON object or list", "b at f:2:1"}},
		{"names", `["a",` + app("b") + `,3]`, []string{
			"f:1:2: want a JSON object; a list of names is what a list call without expand=true answers", "b at f:1:6", "f:1:72: want a JSON object"}},
		{"nested too deep", `{"a":` + strings.Repeat("[", 10000) + "\n" + app("b"), []string{"f:1:37: nested deeper than 32", "b at f:2:1"}},
		{"twice", `{"appId":"a","appId":"b"}`, []string{"f:1:21: a member stands twice in one object"}},
		{"not UTF-8", app("a") + "\n{\"appId\":\"\xff\"}", []string{"a at f:1:1", "f:2:11: invalid UTF-8"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := words(readAll(t, strings.NewReader(tt.in), false))
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("read (-want +got):\n%s", diff)
			}
			slow := words(readAll(t, iotest.OneByteReader(strings.NewReader(tt.in)), false))
			if diff := cmp.Diff(got, slow); diff != "" {
				t.Errorf("byte by byte (-at once +slowly):\n%s", diff)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	const head = `{"appId":"a","developerId":"d","name":"n","status":"approved"`
	credential := func(members string) string { return head + `,"credentials":[{` + members + `}]}` }
	const good = `"consumerKey":"` + key + `","consumerSecret":"` + secret + `","status":"approved"`
	for _, tt := range []struct {
		name, in string // § marks the place of the refusal and is not part of it
		want     string
		whole    bool // the app is refused, not only a credential
	}{
		{"no appId", `{"app":[§{"name":"n"}]}`, `an app must have "appId"`, true},
		{"empty", `{"app":[§{}]}`, `an app must have "appId"`, true},
		{"nothing but an id", `§{"appId":"a"}`, `the app has nothing but its appId: export with expand=true`, true},
		{"app group", `{"appId":"a",§"appGroup":"g","name":"n"}`, `the app belongs to no developer but to an app group or company ("appGroup"), which keygate does not know`, true},
		{"no developer", `§{"appId":"a","name":"n"}`, `the app must have "developerId"`, true},
		{"null developer", `§{"appId":"a","developerId":null}`, `the app must have "developerId"`, true},
		{"number for an id", `{"appId":§7}`, `"appId" is not a string`, true},
		{"empty id", `{"appId":§""}`, `"appId" is empty`, true},
		{"NUL in an id", `{"appId":§"a\u0000"}`, `"appId" holds a control character`, true},
		{"half a surrogate", `{"appId":§"a\ud800"}`, `"appId" is not valid Unicode`, true},
		{"no name", `§{"appId":"a","developerId":"d"}`, `the app must have "name"`, true},
		{"no status", `§{"appId":"a","developerId":"d","name":"n"}`, `the app has no "status"`, true},
		{"other case", `§{"appId":"a","developerId":"d","name":"n","Status":"approved"}`, `the app has no "status"`, true},
		{"misspelt status", `{"appId":"a","developerId":"d","name":"n","status":§"aproved"}`, `the app: status "aproved" is none of approved, revoked, pending`, true},
		{"status a number", `{"appId":"a","developerId":"d","name":"n","status":§1}`, `the app: "status" is not a string`, true},
		{"version", head + `,§"v":1}`, `member "v": the stored record uses this name itself`, true},
		{"time", head + `,"createdAt":§"yesterday"}`, `"createdAt" is not a 64-bit integer`, true},
		{"fraction", head + `,"createdAt":§1.5e3}`, `"createdAt" is not a 64-bit integer`, true},
		{"credentials no list", head + `,"credentials":§{}}`, `"credentials" is not a list`, true},
		{"key in the app", head + `,§"ConsumerKey":"x"}`, `member "ConsumerKey" would store a consumer key or secret`, true},
		{"key in an attribute", head + `,"attributes":[{"name":"k","value":§"key=` + key + `"}],"credentials":[{` + good + `}]}`, `member "attributes" holds a consumer key or secret, which is not kept`, true},
		{"key as a name", head + `,§"` + key + `":1,"credentials":[{` + good + `}]}`, `a member's name holds a consumer key or secret, which is not kept`, true},

		{"developer without an id", `§{"email":"a@x","status":"active"}`, `a developer must have "developerId"`, true},
		{"developer without an address", `§{"developerId":"d","status":"active"}`, `the developer must have "email"`, true},
		{"developer with no address", `{"developerId":"d","email":§"ann","status":"active"}`, `"email" is no e-mail address: want something like ann@example.com`, true},
		{"developer, nothing but an address", `§{"email":"a@x"}`, `the developer has nothing but an e-mail address: export with expand=true`, true},
		{"developer without a status", `§{"developerId":"d","email":"a@x"}`, `the developer has no "status"`, true},
		{"developer approved", `{"developerId":"d","email":"a@x","status":§"approved"}`, `the developer: status "approved" is none of active, inactive`, true},
		{"developer's status long", `{"developerId":"d","email":"a@x","status":§"0123456789012"}`, `the developer: status of 13 bytes is none of active, inactive`, true},
		{"developer's version", `{"developerId":"d","email":"a@x","status":"active",§"v":1}`, `member "v": the stored record uses this name itself`, true},
		{"developer's key", `{"developerId":"d","email":"a@x","status":"active","attributes":[{§"consumerKey":"x"}]}`, `member "attributes" holds a consumer key or secret, which is not kept`, true},
		{"developer's times", `{"developerId":"d","email":"a@x","status":"active","createdAt":§"x"}`, `"createdAt" is not a 64-bit integer`, true},
		{"product, nothing but a name", `{"apiProduct":[§{"name":"p"}]}`, `the API product has nothing but its name: export with expand=true`, true},
		{"product without a name", `§{"approvalType":"auto"}`, `an API product must have "name"`, true},
		{"product's approval type", `{"approvalType":§"Manual","name":"p"}`, `"approvalType" is none of auto, manual`, true},
		{"product's approval a number", `{"approvalType":§1,"name":"p"}`, `"approvalType" is not a string`, true},
		{"product's version", `{"approvalType":"auto","name":"p",§"v":1}`, `member "v": the stored record uses this name itself`, true},
		{"sealed key", credential(good + `,§"sealedKey":"x"`), `credential 1: member "sealedKey": the stored record uses this name itself`, false},
		{"wrong checksum", credential(`"consumerKey":§"` + miscopied + `","status":"approved"`), `credential 1: the consumer key looks like one that keygate made, but its checksum is wrong: was it copied whole?`, false},

		{"credential a string", head + `,"credentials":[§"x"]}`, `credential 1: want an object`, false},
		{"no key", head + `,"credentials":[§{"status":"approved"}]}`, `credential 1: there is no "consumerKey"`, false},
		{"key a number", credential(`"consumerKey":§1`), `credential 1: "consumerKey" is not a string`, false},
		{"weak key", credential(`"consumerKey":§"short","status":"approved"`), `credential 1: the consumer key is weak: it has 5 characters, want at least 16`, false},
		{"character", credential(`"consumerKey":§"` + key + ` ","status":"approved"`), `credential 1: the consumer key holds a character outside A-Z a-z 0-9 . _ ~ + / = -`, false},
		{"key without status", head + `,"credentials":[§{"consumerKey":"` + key + `"}]}`, `credential 1: the credential has no "status"`, false},
		{"expiry", credential(good + `,"expiresAt":§-2`), `credential 1: "expiresAt": -2 is no time: want milliseconds since 1970, or -1 for never`, false},
		{"null expiry", credential(good + `,"expiresAt":§null`), `credential 1: "expiresAt" is null: want milliseconds since 1970, or -1 for never`, false},
		{"expiry a word", credential(good + `,"expiresAt":§"never"`), `credential 1: "expiresAt" is not a 64-bit integer`, false},
		{"hint", credential(good + `,§"hint":"x"`), `credential 1: member "hint": the stored record uses this name itself`, false},
		{"appId on it", credential(good + `,§"appId":"a"`), `credential 1: member "appId": the stored record uses this name itself`, false},
		{"secret in an attribute", credential(good + `,"attributes":[{"name":"s","value":§"` + secret + `"}]`), `credential 1: member "attributes" holds a consumer key or secret, which is not kept`, false},
		{"secret escaped", credential(good + `,"note":§"\u0053Xg8JizqeTA8j3gX"`), `credential 1: member "note" holds a consumer key or secret, which is not kept`, false},
		{"secret nested", credential(good + `,"x":{§"CONSUMERSECRET":"y"}`), `credential 1: member "x" holds a consumer key or secret, which is not kept`, false},
		{"scopes no list", credential(good + `,"scopes":§"a b"`), `credential 1: "scopes" is not a list`, false},
		{"scope with a blank", credential(good + `,"scopes":[§"a b"]`), `credential 1: a scope is empty or holds a blank`, false},
		{"scope a number", credential(good + `,"scopes":[§1]`), `credential 1: a scope is not a string`, false},
		{"products no list", credential(good + `,"apiProducts":§"p"`), `credential 1: "apiProducts" is not a list`, false},
		{"product by name", credential(good + `,"apiProducts":[§"p"]`), `credential 1: a product is given by its name alone, without a status`, false},
		{"product null", credential(good + `,"apiProducts":[§null]`), `credential 1: a product is not an object`, false},
		{"product without name", credential(good + `,"apiProducts":[§{"status":"approved"}]`), `credential 1: a product of the credential must have "apiproduct"`, false},
		{"product without status", credential(good + `,"apiProducts":[§{"apiproduct":"p"}]`), `credential 1: product "p" has no "status"`, false},
		{"product's status", credential(good + `,"apiProducts":[{"apiproduct":"p","status":§"on"}]`), `credential 1: product "p": status "on" is none of approved, revoked, pending`, false},
		{"product twice", credential(good + `,"apiProducts":[{"apiproduct":"p","status":"revoked"},§{"apiproduct":"p","status":"approved"}]`), `credential 1: product "p" stands twice on the credential`, false},
		{"key twice", head + `,"credentials":[{` + good + `},§{` + good + `}]}`, `credential 2: the consumer key stands on two credentials of the app`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := strings.Replace(tt.in, "§", "", 1)
			want := fmt.Sprintf("f:1:%d: %s", strings.Index(tt.in, "§")+1, tt.want)
			all := readAll(t, strings.NewReader(in), false)
			if len(all) != 1 || len(all[0].Refused) != 1 {
				t.Fatalf("got %v, want one refusal", words(all))
			}
			got := all[0].Refused[0].Error()
			if got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			if (all[0].App == nil) != tt.whole {
				t.Errorf("app refused: %v, want %v", all[0].App == nil, tt.whole)
			}
			if strings.Contains(got, key) || strings.Contains(got, secret) {
				t.Errorf("the refusal shows the key or the secret: %s", got)
			}
		})
	}
}

// A developer and a product in either rendering.
func TestDeveloperAndProduct(t *testing.T) {
	all := readAll(t, strings.NewReader(`{"developer":[{"apps":["a","b"],"attributes":[],"companies":[],"createdAt":"1415728893126","developerId":"d","email":"Ann@Example.com","firstName":"Ann","lastModifiedAt":1420682967414,"lastName":"L","organizationName":"o","status":"Inactive","userName":"ann"}]}
		{"apiResources":["/"],"approvalType":"manual","createdAt":"1","name":"P","quota":"10"}`), false)
	if len(all) != 2 || all[0].Developer == nil || all[1].Product == nil {
		t.Fatalf("got %v, want a developer and a product", words(all))
	}
	d, p := all[0].Developer, all[1].Product
	if d.ID != "d" || d.Email != "ann@example.com" || d.Status != authz.StatusInactive {
		t.Errorf("got developer %q, %q, %v", d.ID, d.Email, d.Status)
	}
	details, _ := d.Details.MarshalJSON()
	if got, want := string(details), `{"apps":[],"attributes":[],"companies":[],"createdAt":1415728893126,"developerId":"d","email":"ann@example.com","firstName":"Ann","lastModifiedAt":1420682967414,"lastName":"L","organizationName":"o","userName":"ann"}`; got != want {
		t.Errorf("details of the developer: %s", cmp.Diff(want, got))
	}
	details, _ = p.Details.MarshalJSON()
	if got, want := string(details), `{"apiResources":["/"],"approvalType":"manual","createdAt":1,"name":"P","quota":"10"}`; got != want || p.Name != "P" || !p.Manual() {
		t.Errorf("details of product %q: %s", p.Name, cmp.Diff(want, got))
	}
}

// A key and its secret are handed on for whoever seals them, and show nowhere.
func TestPlainKeyAndSecret(t *testing.T) {
	all := readAll(t, strings.NewReader(weatherApp(t)), false)
	c := all[0].App.Credentials[0]
	if c.PlainKey.Reveal() != key || c.PlainSecret.Reveal() != secret {
		t.Errorf("got %q and %q, want the key and the secret", c.PlainKey.Reveal(), c.PlainSecret.Reveal())
	}
	if said := fmt.Sprintf("%v %+v %#v %+v", all[0], c, c, *all[0].App); strings.Contains(said, key) || strings.Contains(said, secret) {
		t.Errorf("the credential shows its key or secret: %s", said)
	}
}

// Of the pages of a list the last must be among the inputs.
func TestPages(t *testing.T) {
	page := func(list, record, token string) string {
		return fmt.Sprintf(`{"%s":[%s],"nextPageToken":%q}`, list, record, token)
	}
	const missing = `the list of %s is not complete: this page has a "nextPageToken", and no page without one was given; add the pages that follow it`
	for _, tt := range []struct {
		name string
		in   []string
		want []string
	}{
		{"one, the last", []string{page("app", app("a"), "")}, nil},
		{"without a token", []string{`{"app":[` + app("a") + `]}`}, nil},
		{"one, not the last", []string{" " + page("app", app("a"), "x")}, []string{"f:1:2: " + fmt.Sprintf(missing, "apps")}},
		{"token before the list", []string{`{"nextPageToken":"x","app":[` + app("a") + `]}`}, []string{"f:1:1: " + fmt.Sprintf(missing, "apps")}},
		{"two", []string{page("app", app("a"), "x"), page("app", app("b"), "")}, nil},
		{"two in one input", []string{page("app", app("a"), "x") + "\n" + page("app", app("b"), "")}, nil},
		{"two, not the last", []string{page("app", app("a"), "x") + "\n" + page("app", app("b"), "y")}, []string{"f:2:1: " + fmt.Sprintf(missing, "apps")}},
		{"another kind's last", []string{page("app", app("a"), "x"), page("developer", developer("b"), ""), page("apiProduct", product("p"), "z")},
			[]string{"f:1:1: " + fmt.Sprintf(missing, "apps"), "f:1:1: " + fmt.Sprintf(missing, "API products")}},
		{"a token in a record", []string{`{"app":[{"nextPageToken":"x",` + app("a")[1:] + `]}` + "\n" + `{"nextPageToken":"x",` + app("b")[1:]}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var pages apigee.Pages
			for _, text := range tt.in {
				in := apigee.NewReader(apigee.ReaderConfig{Name: "f", Pages: &pages}, iotest.OneByteReader(strings.NewReader(text)))
				for {
					s, err := in.Next()
					if err == io.EOF {
						break
					}
					if err != nil || len(s.Refused) > 0 {
						t.Fatalf("Next: %v, %v", s.Refused, err)
					}
				}
			}
			var got []string
			for _, m := range pages.Missing() {
				got = append(got, m.Error())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("missing (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAllowWeakKeys(t *testing.T) {
	in := `{"appId":"a","developerId":"d","name":"n","status":"approved","credentials":[{"consumerKey":"demo","consumerSecret":"demo","note":"demo","status":"approved","scopes":null}]}`
	all := readAll(t, strings.NewReader(in), true)
	if len(all) != 1 || len(all[0].Refused) > 0 {
		t.Fatalf("got %v, want one app", words(all))
	}
	c := all[0].App.Credentials[0]
	details, _ := c.Details.MarshalJSON()
	if got, want := string(details), `{"note":"demo","scopes":[],"expiresAt":-1}`; got != want || c.Hint != "" || c.ExpiresAt != authz.NeverExpires {
		t.Errorf("got %s, hint %q, expires %d, want %s, no hint, -1", got, c.Hint, c.ExpiresAt, want)
	}
}

func TestDigest(t *testing.T) {
	all := readAll(t, strings.NewReader(weatherApp(t)+strings.Join(strings.Fields(weatherApp(t)), "")+app("a")), false)
	if len(all) != 3 || all[0].Digest != all[1].Digest || all[0].Digest == all[2].Digest {
		t.Errorf("want two equal digests and another, got %v", words(all))
	}
}

func TestReadError(t *testing.T) {
	broken := errors.New("disk on fire")
	in := apigee.NewReader(apigee.ReaderConfig{Name: "f"}, io.MultiReader(strings.NewReader(app("a")+"\n{"), iotest.ErrReader(broken)))
	if s, err := in.Next(); err != nil || s.App == nil {
		t.Fatalf("first: got %v, want an app", err)
	}
	if _, err := in.Next(); !errors.Is(err, broken) {
		t.Errorf("got %v, want %v", err, broken)
	}
}

// repeat reads a text again and again.
type repeat struct {
	text string
	left int
	at   int
}

func (r *repeat) Read(p []byte) (n int, err error) {
	for n < len(p) && r.left > 0 {
		c := copy(p[n:], r.text[r.at:])
		n += c
		if r.at += c; r.at == len(r.text) {
			r.at, r.left = 0, r.left-1
		}
	}
	if n == 0 {
		err = io.EOF
	}
	return n, err
}

// A record without an end is given up, not read into memory, and what comes
// behind it is read.
func TestEndlessRecord(t *testing.T) {
	in := io.MultiReader(strings.NewReader(`{"appId":"`), &repeat{text: "0123456789abcdef", left: 1<<20 + 4096}, strings.NewReader("\n"+app("a")))
	got := words(readAll(t, in, false))
	if want := []string{"f:1:16777218: the record is longer than 16 MiB", "a at f:2:1"}; !cmp.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Broken lines cost no more than good ones: each is looked at once, and a
// bounded number of times when it could belong to the record before it.
func TestManyBadLines(t *testing.T) {
	for _, line := range []string{"{\"appId\":\n", "{\"a\":[\n", "x\n", "{},\n", "{\"a\":[{},\n", "[\n"} {
		const lines = 20_000
		in := apigee.NewReader(apigee.ReaderConfig{Name: "f"}, &repeat{text: line, left: lines})
		n := 0
		for {
			if _, err := in.Next(); err != nil {
				break
			}
			n++
		}
		if n > 2*lines {
			t.Errorf("%q: %d refusals for %d lines", line, n, lines)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte(weatherApp(f)))
	f.Add([]byte("[" + app("a") + ",{\"a\":[1}\n" + app("b") + "]"))
	f.Add([]byte(`{"x":1,"app":[` + app("a") + `],"y":[{}]}` + "\n{\n" + app("c")))
	f.Add([]byte(`{"apiProducts":[` + product("p") + `],"apps":[` + app("a") + `],"developers":[` + developer("d") + `],"nextPageToken":"x"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var stream []string
		for _, s := range readAll(t, strings.NewReader(string(data)), true) {
			if s.App == nil && s.Developer == nil && s.Product == nil && len(s.Refused) == 0 {
				t.Errorf("%v: neither a record nor a refusal", s.Place)
			}
			if s.Developer != nil {
				if err := s.Developer.Validate(); err != nil {
					t.Errorf("%v: read a developer that is not valid: %v", s.Place, err)
				}
			}
			if s.Product != nil {
				if err := s.Product.Validate(); err != nil {
					t.Errorf("%v: read a product that is not valid: %v", s.Place, err)
				}
			}
			if s.App != nil {
				if err := s.App.Validate(); err != nil {
					t.Errorf("%v: read an app that is not valid: %v", s.Place, err)
				}
			}
			stream = append(stream, words([]catalog.Submission{s})...)
		}
		if slow := words(readAll(t, iotest.OneByteReader(strings.NewReader(string(data))), true)); !cmp.Equal(stream, slow) {
			t.Errorf("read at once and byte by byte differ: %s", cmp.Diff(stream, slow))
		}
	})
}
