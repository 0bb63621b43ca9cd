package apigee_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keygate/apigee"
	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
)

// parsers of bodies. Each returns what it read in a form that can be compared.
var parsers = map[string]func(body string) (any, error){
	"developer": func(body string) (any, error) {
		d, err := apigee.ParseDeveloper([]byte(body))
		return shown(d.Email, d.Details), err
	},
	"product": func(body string) (any, error) {
		p, err := apigee.ParseProduct([]byte(body), "")
		return shown(p.Name, p.Details), err
	},
	"product Weather": func(body string) (any, error) {
		p, err := apigee.ParseProduct([]byte(body), "Weather")
		return shown(p.Name, p.Details), err
	},
	"app": func(body string) (any, error) {
		a, err := apigee.ParseApp([]byte(body), "")
		return shown(a.Name, a.Products, a.KeyExpiresIn, a.Action, a.Details), err
	},
	"app One": func(body string) (any, error) {
		a, err := apigee.ParseApp([]byte(body), "One")
		return shown(a.Name, a.Products, a.KeyExpiresIn, a.Action, a.Details), err
	},
	"key":     func(body string) (any, error) { return shownKey(apigee.ParseKey([]byte(body))) },
	"new key": func(body string) (any, error) { return shownKey(apigee.ParseNewKey([]byte(body))) },
	"attributes": func(body string) (any, error) {
		list, err := apigee.ParseAttributes([]byte(body))
		return shown(list), err
	},
	"attribute tier": func(body string) (any, error) {
		a, err := apigee.ParseAttribute([]byte(body), "tier")
		return shown(a), err
	},
}

func shownKey(k apigee.KeyBody, err error) (any, error) {
	return shown(k.Key, k.Secret, k.ExpiresIn, k.Products, k.HasAttributes, k.Attributes, k.HasScopes, k.Scopes), err
}

func shown(values ...any) string {
	for i, v := range values {
		if o, ok := v.(jsonobject.Object); ok {
			b, err := o.MarshalJSON()
			if err != nil {
				return err.Error()
			}
			values[i] = string(b)
		}
	}
	return strings.TrimSuffix(fmt.Sprintln(values...), "\n")
}

func TestBodies(t *testing.T) {
	const people = `"email":"Ann@Example.com","firstName":"Ann","lastName":"Q","userName":"ann"`
	for _, tt := range []struct{ parser, body, want string }{
		{"developer", `{` + people + `}`, `ann@example.com {"email":"ann@example.com","firstName":"Ann","lastName":"Q","userName":"ann"}`},
		// A client that puts back what it has read, members of its own included.
		{"developer", `{"apps":["a"],"attributes":[{"name":"x"}],"companies":[],"createdAt":1,"createdBy":"r","developerId":"d","lastModifiedAt":"2",
			"lastModifiedBy":7,"organizationName":"acme","status":"inactive","accessType":null,"tempToken":{"a":[1]},` + people + `}`,
			`ann@example.com {"attributes":[{"name":"x","value":""}],"email":"ann@example.com","firstName":"Ann","lastName":"Q","userName":"ann"}`},

		{"product", `{"name":"Weather","displayName":"W"}`, `Weather {"approvalType":"auto","displayName":"W","name":"Weather"}`},
		{"product Weather", `{"displayName":"W","approvalType":""}`, `Weather {"approvalType":"auto","displayName":"W","name":"Weather"}`},
		{"product Weather", `{"name":"Weather","displayName":"W","approvalType":"manual","apiResources":["/","/a/**"],"quota":10,"quotaInterval":"1","quotaTimeUnit":"minute","proxies":[],"scopes":["A"]}`,
			`Weather {"apiResources":["/","/a/**"],"approvalType":"manual","displayName":"W","name":"Weather","quota":"10","quotaInterval":"1","quotaTimeUnit":"minute","scopes":["A"]}`},
		{"product Weather", `{"displayName":"W","apiResources":[],"operationGroup":{"operationConfigs":[{"apiSource":"p","operations":[{"resource":"/a/*","methods":["GET"]}],"quota":{"limit":"1"}}]}}`,
			`Weather {"approvalType":"auto","displayName":"W","name":"Weather","operationGroup":{"operationConfigs":[{"apiSource":"p","operations":[{"resource":"/a/*","methods":["GET"]}],"quota":{"limit":"1"}}]}}`},

		{"app", `{"name":"One"}`, `One [] -1  {"name":"One"}`},
		{"app", `{"name":"One","apiProducts":["Weather",{"apiproduct":"Maps","status":"approved"},"Weather"],"keyExpiresIn":"86400000","callbackUrl":"https://x","scopes":["A"],"accessType":"read"}`,
			`One [Weather Maps] 86400000  {"accessType":"read","callbackUrl":"https://x","name":"One","scopes":["A"]}`},
		{"app", `{"name":"One","keyExpiresIn":86400000,"apiProducts":null}`, `One [] 86400000  {"name":"One"}`},
		{"app", `{"name":"One","keyExpiresIn":"-1","status":"revoked","credentials":[{"consumerKey":"abc"}],"appId":"x"}`, `One [] -1  {"name":"One"}`},
		{"app One", `{}`, `One [] -1  {"name":"One"}`},
		{"app One", `{"status":"approve"}`, `One [] -1 approve {"name":"One"}`},
		{"app One", `{"status":"revoke","name":"One"}`, `One [] -1 revoke {"name":"One"}`},
		{"app One", `{"status":"approved","attributes":[],"callbackUrl":""}`, `One [] -1  {"name":"One"}`},

		{"key", `{}`, `  -1 [] false [] false []`},
		{"key", `{"apiProducts":["a",{"apiproduct":"b"}],"attributes":[],"scopes":[],"consumerKey":"sha256:no matter","consumerSecret":""}`, `  -1 [a b] true [] true []`},
		{"key", `{"attributes":[{"name":"n","value":"v"}],"scopes":null,"expiresInSeconds":"60","expiresAt":"-1"}`, `  60 [] true [{n v}] false []`},
		{"new key", `{"consumerKey":"my-own_key-0123456789","consumerSecret":"s","expiresInSeconds":60}`, `my-own_key-0123456789 s 60 [] false [] false []`},
		{"new key", `{"expiresInSeconds":0,"consumerKey":null,"status":"revoked","issuedAt":"1"}`, `  -1 [] false [] false []`},

		{"attributes", `{"attribute":[{"name":"a","value":"1"},{"name":"b","id":7}]}`, `[{a 1} {b }]`},
		{"attributes", `{}`, `[]`},
		{"attribute tier", `{"name":"tier","value":"gold"}`, `{tier gold}`},
		{"attribute tier", `{"value":"gold"}`, `{tier gold}`},
		{"attribute tier", `{"name":"tier"}`, `{tier }`},
		{"attribute tier", ` {"value":""} `, `{tier }`},
	} {
		got, err := parsers[tt.parser](tt.body)
		if err != nil {
			t.Errorf("%s %s: got %v, want it taken", tt.parser, tt.body, err)
		} else if diff := cmp.Diff(any(tt.want), got); diff != "" {
			t.Errorf("%s %s (-want +got):\n%s", tt.parser, tt.body, diff)
		}
	}
}

func TestBadBodies(t *testing.T) {
	const (
		syntax = "the body is not the JSON that is wanted: "
		secret = "0123456789abcdef-secret"
	)
	good := func(more string) string {
		return `{"email":"ann@example.com","firstName":"Ann","lastName":"Q","userName":"ann",` + more + `}`
	}
	tests := []struct{ parser, body, pointer, message string }{
		// JSON that is none, or too much.
		{"key", ``, "", syntax + "empty, want JSON"},
		{"key", `{"a":1} x`, "", syntax + "1:9: data after the JSON value"},
		{"key", "{\n\"scopes\":[],\n\"scopes\":[]}", "", syntax + "3:9: a member stands twice in one object"},
		{"key", `{"` + secret + `":1,"` + secret + `":1}`, "", syntax + "1:55: a member stands twice in one object"},
		{"key", "\ufeff{}", "", "1:1: a byte order mark, want UTF-8 without one"},
		{"key", `{"expiresInSeconds":NaN}`, "", syntax + "1:21: invalid character 'N' looking for beginning of value"},
		{"key", "{\"scopes\":[\"\xff\"]}", "", syntax + "1:13: invalid UTF-8"},
		{"key", strings.Repeat(`{"a":`, 10_000) + "1" + strings.Repeat("}", 10_000), "", syntax + "1:162: nested deeper than 32"},
		{"key", `[]`, "", "is a list, want an object"},
		{"key", ` "x"`, "", "is a string, want an object"},
		{"key", `null`, "", "is null, want an object"},

		// Names.
		{"developer", good(`"staus":"inactive"`), "/staus", `is not known, did you mean "status"?`},
		{"developer", good(`"Attributes":[]`), "/Attributes", `is not known, did you mean "attributes"?`},
		{"developer", good(`"org":"acme"`), "/org", "is read-only: keygate uses this name itself"},
		{"developer", good(`"revision":7`), "/revision", "is read-only: keygate uses this name itself"},
		{"developer", good(`"v":1`), "/v", "is read-only: keygate uses this name itself"},
		{"key", `{"sealedKey":"x"}`, "/sealedKey", "is read-only: keygate uses this name itself"},
		{"key", `{"scope":["A"]}`, "/scope", `is not known, did you mean "scopes"?`},
		{"key", `{"apiProdcuts":["A"]}`, "/apiProdcuts", `is not known, did you mean "apiProducts"?`},
		{"attributes", `{"attributes":[]}`, "/attributes", `is not known, did you mean "attribute"?`},

		// Required members.
		{"developer", `{}`, "/email", "is required, want a string that is not empty"},
		{"developer", `{"email":"ann@example.com","firstName":"","lastName":"Q","userName":"ann"}`, "/firstName", "is required, want a string that is not empty"},
		{"developer", `{"email":"ann@example.com","firstName":"Ann","lastName":null,"userName":"ann"}`, "/lastName", "is required, want a string that is not empty"},
		{"product", `{"displayName":"W"}`, "/name", "is required, want a string that is not empty"},
		{"product", `{"name":"W"}`, "/displayName", "is required, want a string that is not empty"},
		{"app", `{}`, "/name", "is required, want a string that is not empty"},
		{"attribute tier", `{}`, "", `has neither "name" nor "value", want an attribute's value`},

		// Types.
		{"app", `{"name":7}`, "/name", "is a number, want a string"},
		{"app One", `{"callbackUrl":true}`, "/callbackUrl", "is a boolean, want a string"},
		{"app One", `{"scopes":"A"}`, "/scopes", "is a string, want a list"},
		{"app One", `{"scopes":["A",{}]}`, "/scopes/1", "is an object, want a string"},
		{"app One", `{"apiProducts":[7]}`, "/apiProducts/0", `is a number, want a product's name or {"apiproduct": its name}`},
		{"app One", `{"apiProducts":["a",{"apiproduct":7}]}`, "/apiProducts/1/apiproduct", "is a number, want a string"},
		{"app One", `{"apiProducts":[{}]}`, "/apiProducts/0/apiproduct", "is required, want a string that is not empty"},
		{"app One", `{"apiProducts":[{"apiProduct":"a"}]}`, "/apiProducts/0/apiProduct", `is not known, did you mean "apiproduct"?`},
		{"app One", `{"keyExpiresIn":"soon"}`, "/keyExpiresIn", "is no integer of 64 bits, want one as a number or a string"},
		{"app One", `{"keyExpiresIn":1.5}`, "/keyExpiresIn", "is no integer of 64 bits, want one as a number or a string"},
		{"app One", `{"keyExpiresIn":9223372036854775808}`, "/keyExpiresIn", "is no integer of 64 bits, want one as a number or a string"},
		{"app One", `{"keyExpiresIn":"null"}`, "/keyExpiresIn", "is no integer of 64 bits, want one as a number or a string"},
		{"app One", `{"attributes":{}}`, "/attributes", "is an object, want a list"},
		{"app One", `{"attributes":[["a","b"]]}`, "/attributes/0", "is a list, want an object"},
		{"app One", `{"attributes":[{"name":"a","value":7}]}`, "/attributes/0/value", "is a number, want a string"},
		{"product Weather", `{"displayName":"W","operationGroup":[]}`, "/operationGroup", "is a list, want an object"},

		// Values.
		{"developer", good(`"attributes":[{"name":"x"},{"value":"y"}]`), "/attributes/1/name", "is empty, want 1 to 1024 bytes"},
		{"developer", `{"email":"ann","firstName":"Ann","lastName":"Q","userName":"ann"}`, "/email", "is no e-mail address: want something like ann@example.com"},
		{"developer", `{"email":"ann@example.com","firstName":"A\u0000","lastName":"Q","userName":"ann"}`, "/firstName", "holds a control character"},
		{"developer", `{"email":"ann@example.com","firstName":"A","lastName":"Q","userName":"` + strings.Repeat("x", 256) + `"}`, "/userName", "has 256 bytes, want at most 255"},
		{"app", `{"name":"<script>"}`, "/name", "holds '<', want only letters and digits of ASCII, space and ._#-$%"},
		{"app One", `{"name":"Two"}`, "/name", `is "Two", and the URL says "One": a name cannot be changed, leave it out`},
		{"app One", `{"keyExpiresIn":-2}`, "/keyExpiresIn", "is -2, want milliseconds until the key expires, or -1 for never"},
		{"app One", `{"apiProducts":["a\u0000"]}`, "/apiProducts/0", "holds a control character"},
		{"app One", `{"scopes":["A B"]}`, "/scopes/0", "a scope is empty or holds a blank"},
		{"app One", `{"scopes":[` + strings.Repeat(`"a",`, 1000) + `"a"]}`, "/scopes", "has 1001 elements, want at most 1000"},
		{"app One", `{"callbackUrl":"x\r\ny"}`, "/callbackUrl", "holds a control character"},
		{"product", `{"name":"a/b","displayName":"W"}`, "/name", "holds '/', want only letters and digits of ASCII, space and ._#-$%"},
		{"product Weather", `{"displayName":"W","approvalType":"maybe"}`, "/approvalType", "is none of auto, manual"},
		{"product Weather", `{"displayName":"W","quotaTimeUnit":"fortnight"}`, "/quotaTimeUnit", "is none of minute, hour, day, month"},
		{"product Weather", `{"displayName":"W","apiResources":["/","/a*"]}`, "/apiResources/1", `has a wildcard that is not a whole segment, want "/*"`},
		{"product Weather", `{"displayName":"W","apiResources":["/"],"operationGroup":{}}`, "/operationGroup", `stands beside "apiResources", want one of them`},
		{"product Weather", `{"displayName":"W","operationGroup":{"operationConfigs":[{"operations":[{"resource":"/"},{"resource":"a"}]}]}}`,
			"/operationGroup/operationConfigs/0/operations/1/resource", `does not begin with "/", want "/a"`},
		{"product Weather", `{"displayName":"W","operationGroup":{"operationConfigs":[{"operations":[{}]}]}}`,
			"/operationGroup/operationConfigs/0/operations/0/resource", "is required, want a path"},
		{"product Weather", `{"displayName":"W","operationGroup":{"operationConfigs":7}}`,
			"/operationGroup", `is not of the form {"operationConfigs":[{"apiSource":"…","operations":[{"resource":"/…","methods":[…]}]}]}`},
		{"product Weather", `{"displayName":"W","attributes":[{"name":"a"}],"operationGroup":{"operationConfigs":[{"attributes":[` + strings.Repeat(`{},`, 17) + `{}]}]}}`,
			"/operationGroup", "and the product have 19 attributes together, want at most 18"},
		{"attribute tier", `{"name":"other","value":"x"}`, "/name", `is "other", and the URL says "tier": a name cannot be changed, leave it out`},
		{"attribute tier", `{"value":"` + strings.Repeat("x", 2049) + `"}`, "/value", "has 2049 bytes, want at most 2048"},
		{"attributes", `{"attribute":[{"name":"a"},{"name":"a"}]}`, "/attribute/1/name", "is the name of another attribute too, want each once"},

		// Keys of one's own.
		{"new key", `{"consumerKey":"create"}`, "/consumerKey", `is "create", which the API uses itself`},
		{"new key", `{"consumerKey":""}`, "/consumerKey", "is empty, want 16 to 2048 characters"},
		{"new key", `{"consumerKey":"` + secret + `."}`, "/consumerKey", "holds a character outside A-Z a-z 0-9 _ -"},
		{"new key", `{"consumerKey":["` + secret + `"]}`, "/consumerKey", "is a list, want a string"},
		{"new key", `{"consumerSecret":"` + secret + ` "}`, "/consumerSecret", "holds a character outside A-Z a-z 0-9 _ -"},
		{"new key", `{"consumerSecret":"` + secret + `","attributes":[{"name":"a","value":"it is ` + secret + `"}]}`, "/attributes/0", "holds the consumer key or secret, which is not stored in the clear"},
		{"new key", `{"consumerKey":"` + secret + `","scopes":["a","` + secret + `"]}`, "/scopes/1", "holds the consumer key or secret, which is not stored in the clear"},
		{"new key", `{"expiresInSeconds":-2}`, "/expiresInSeconds", "is -2, want seconds until the key expires, or -1 for never"},
	}
	for _, tt := range tests {
		got, err := parsers[tt.parser](tt.body)
		bad := (*catalog.FieldError)(nil)
		if !errors.As(err, &bad) {
			t.Errorf("%s %.200s: got %v, %v, want a FieldError", tt.parser, tt.body, got, err)
			continue
		}
		if want := (catalog.FieldError{Pointer: tt.pointer, Message: tt.message}); *bad != want {
			t.Errorf("%s %.200s:\ngot  %q\nwant %q", tt.parser, tt.body, *bad, want)
		}
		if strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error shows a key or a secret: %v", tt.parser, err)
		}
	}
}

// What is taken is rendered as JSON in both editions, and read from there again
// it says the same. Nothing makes a parser panic.
func FuzzBodies(f *testing.F) {
	for _, s := range []string{
		`{"email":"Ann@x","firstName":"<script>","lastName":"\u2028","userName":"u","attributes":[{"name":"a\"","value":"\r\n"}],"accessType":"x"}`,
		`{"name":"W","displayName":"&","approvalType":"manual","apiResources":["/a/**"],"quota":1e3,"operationGroup":null,"description":"a\nb"}`,
		`{"name":"W","displayName":"W","operationGroup":{"operationConfigs":[{"operations":[{"resource":"/<"}]}]},"llmOperationGroup":{}}`,
		`{"name":"One","apiProducts":["a",{"apiproduct":"b"}],"keyExpiresIn":"5","callbackUrl":"javascript:1","scopes":["A"],"status":"approve"}`,
		`{"consumerKey":"0123456789abcdef","consumerSecret":"s","expiresInSeconds":-1,"attributes":[],"scopes":[]}`,
		`{"attribute":[{"name":"n"}],"value":"v"}`, `{"org":1}`, `{"staus":1}`, `[`, "\ufeff{}", `{"name":"\ud800"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		again := func(what string, want any, rendered []byte, parse func(body []byte) (any, error)) {
			t.Helper()
			if err := jsonobject.Check(rendered); err != nil {
				t.Fatalf("%s of %q: %v in %q", what, body, err, rendered)
			}
			if strings.ContainsAny(string(rendered), "<>&\u2028\u2029") {
				t.Fatalf("%s of %q is not escaped: %q", what, body, rendered)
			}
			got, err := parse(rendered)
			if err != nil {
				t.Fatalf("%s of %q: read again: %v: %q", what, body, err, rendered)
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("%s of %q: read again from %q:\ngot  %v\nwant %v", what, body, rendered, got, want)
			}
		}
		for word, e := range editions {
			if d, err := apigee.ParseDeveloper(body); err == nil {
				again("developer "+word, shown(d.Email, d.Details), e.Developer(apigee.Developer{Developer: d}), func(b []byte) (any, error) {
					d, err := apigee.ParseDeveloper(b)
					return shown(d.Email, d.Details), err
				})
			}
			if p, err := apigee.ParseProduct(body, ""); err == nil {
				again("product "+word, shown(p.Name, p.Details), e.Product(apigee.Product{Product: p}), func(b []byte) (any, error) {
					p, err := apigee.ParseProduct(b, "")
					return shown(p.Name, p.Details), err
				})
			}
			if a, err := apigee.ParseApp(body, ""); err == nil {
				details := a.Details
				if e == apigee.X {
					details = details.Without("accessType")
				}
				if _, ok := details.Get("appFamily"); !ok {
					details = details.With("appFamily", "default")
				}
				shownApp := apigee.App{App: catalog.App{ID: "i", Developer: "d", Name: a.Name, Status: authz.StatusApproved, Details: a.Details}}
				again("app "+word, sortedMembers(details), e.App(shownApp), func(b []byte) (any, error) {
					a, err := apigee.ParseApp(b, "")
					return sortedMembers(a.Details), err
				})
			}
			if k, err := apigee.ParseNewKey(body); err == nil {
				if _, err := apigee.ParseKey(body); err != nil {
					t.Fatalf("%q makes a key and does not change one: %v", body, err)
				}
				c := apigee.Credential{Credential: catalog.Credential{ExpiresAt: 1, Details: jsonobject.Object{}.With("scopes", k.Scopes)}, ConsumerKey: k.Key, ConsumerSecret: k.Secret}
				c.Details = catalog.WithAttributes(c.Details, k.Attributes)
				for _, p := range k.Products {
					c.Products = append(c.Products, catalog.ProductRef{Name: p})
				}
				again("key "+word, shown(k.Products, k.Attributes, k.Scopes), e.Credential(c), func(b []byte) (any, error) {
					k, err := apigee.ParseKey(b)
					return shown(k.Products, k.Attributes, k.Scopes), err
				})
			}
			if list, err := apigee.ParseAttributes(body); err == nil {
				again("attributes "+word, shown(list), e.Attributes(list), func(b []byte) (any, error) {
					list, err := apigee.ParseAttributes(b)
					return shown(list), err
				})
			}
			if a, err := apigee.ParseAttribute(body, "n"); err == nil {
				again("attribute "+word, shown(a), e.Attribute(a), func(b []byte) (any, error) {
					a, err := apigee.ParseAttribute(b, "n")
					return shown(a), err
				})
			}
		}
	})
}

func sortedMembers(o jsonobject.Object) map[string]string {
	m := map[string]string{}
	for _, member := range o {
		m[member.Name] = string(member.Value)
	}
	return m
}
