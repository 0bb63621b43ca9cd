package keygatetest_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"keygate/authz"
	"keygate/config"
	"keygate/envoy"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
)

const (
	weather = quickstart.WeatherProduct
	orders  = quickstart.OrdersProduct
)

// fault is Apigee's body of a denial.
func fault(code, text string) string {
	return fmt.Sprintf(`{"fault":{"faultstring":%q,"detail":{"errorcode":%q}}}`, text, code)
}

// What a client is told for each reason that a record can give.
var (
	invalidKey  = fault("oauth.v2.InvalidApiKey", "Invalid ApiKey")
	notApproved = fault("oauth.v2.ApiKeyNotApproved", "ApiKey not approved")
	wrongThing  = fault("oauth.v2.InvalidApiKeyForGivenResource", "Invalid ApiKey for given resource")
	bodies      = map[authz.Reason]string{
		authz.KeyMissing:        fault("steps.oauth.v2.FailedToResolveAPIKey", "Failed to resolve API Key variable request.header.x-api-key"),
		authz.KeyMalformed:      invalidKey,
		authz.KeyUnknown:        invalidKey,
		authz.RecordUnreadable:  invalidKey,
		authz.KeyRevoked:        notApproved,
		authz.KeyPending:        notApproved,
		authz.KeyExpired:        fault("keymanagement.service.consumer_key_expired", "Key Expired"),
		authz.AppRevoked:        fault("keymanagement.service.invalid_client-app_not_approved", "App not Approved"),
		authz.AppPending:        fault("keymanagement.service.invalid_client-app_not_approved", "App not Approved"),
		authz.DeveloperInactive: fault("keymanagement.service.DeveloperStatusNotActive", "Developer Status is not Active"),
		authz.ProductNotOnKey:   wrongThing,
		authz.ProductRevoked:    wrongThing,
		authz.ProductPending:    wrongThing,
		authz.ProductUnresolved: fault("oauth.v2.InvalidApiKeyForGivenResource", "Path Validation Failed. Product not resolved"),
		authz.Stale:             fault("keygate.ServiceUnavailable", "The Service is temporarily unavailable"),
		authz.Overloaded:        fault("keygate.ServiceUnavailable", "The Service is temporarily unavailable"),
	}
)

// wantReply checks all that a client sees of a decision.
func wantReply(t *testing.T, got keygatetest.Reply, want authz.Reason) {
	t.Helper()
	status, challenge, retry := http.StatusUnauthorized, `ApiKey realm="keygate", header="x-api-key"`, ""
	switch want {
	case authz.Allowed:
		status, challenge = http.StatusOK, ""
	case authz.ProductUnresolved:
		status, challenge = http.StatusForbidden, ""
	case authz.Stale, authz.Overloaded:
		status, challenge, retry = http.StatusServiceUnavailable, "", "1"
	}
	if got.Status != status {
		t.Errorf("status: got %d, want %d (%v): %s", got.Status, status, want, got.Body)
		return
	}
	if v := got.Header.Get("Www-Authenticate"); v != challenge {
		t.Errorf("www-authenticate for %v: got %q, want %q", want, v, challenge)
	}
	if v := got.Header.Get("Retry-After"); v != retry {
		t.Errorf("retry-after for %v: got %q, want %q", want, v, retry)
	}
	if want != authz.Allowed && got.Body != bodies[want] {
		t.Errorf("body for %v: got %s, want %s", want, got.Body, bodies[want])
	}
}

// Every combination of the flags behind a key, through Envoy: the first level
// of Apigee's order that refuses is the reason, whatever the levels below say.
func TestEveryCombinationThroughEnvoy(t *testing.T) {
	t.Parallel()
	var made decisions
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, OnDecision: made.add})

	type combination struct {
		key  keygatetest.Key
		want authz.Reason
	}
	var all []combination
	hour := time.Hour.Milliseconds()
	for _, key := range []string{"approved", "revoked", "pending"} {
		for _, expired := range []bool{false, true} {
			for _, app := range []string{"approved", "revoked", "pending"} {
				for _, developer := range []string{"active", "inactive"} {
					for _, product := range []string{"approved", "revoked", "pending", keygatetest.Absent} {
						c := combination{key: keygatetest.Key{
							Key:    fmt.Sprintf("combination-of-levels-%04d", len(all)),
							Status: key, AppStatus: app, DeveloperStatus: developer,
							Products:  map[authz.ProductName]string{weather: product, orders: "approved"},
							ExpiresAt: time.Now().UnixMilli() + hour,
						}}
						if expired {
							c.key.ExpiresAt -= 2 * hour
						}
						for _, level := range []struct {
							refuses bool
							reason  authz.Reason
						}{
							{key == "revoked", authz.KeyRevoked}, {key == "pending", authz.KeyPending},
							{expired, authz.KeyExpired},
							{app == "revoked", authz.AppRevoked}, {app == "pending", authz.AppPending},
							{developer == "inactive", authz.DeveloperInactive},
							{product == "revoked", authz.ProductRevoked}, {product == "pending", authz.ProductPending},
							{product == keygatetest.Absent, authz.ProductNotOnKey},
							{true, authz.Allowed},
						} {
							if level.refuses {
								c.want = level.reason
								break
							}
						}
						all = append(all, c)
					}
				}
			}
		}
	}
	keys := make([]keygatetest.Key, len(all))
	for i, c := range all {
		keys[i] = c.key
	}
	k.PutKeys(t, keys...)
	seen := map[authz.Reason]int{}
	for _, c := range all {
		passed := k.Passed()
		got := k.Get(t, "/weather", header(c.key.Key))
		if reason := made.last().Reason; reason != c.want {
			t.Errorf("key %s, app %s, developer %s, product %q, expiry %d: got %v, want %v",
				c.key.Status, c.key.AppStatus, c.key.DeveloperStatus, c.key.Products[weather], c.key.ExpiresAt, reason, c.want)
			continue
		}
		wantReply(t, got, c.want)
		if reached := k.Passed() > passed; reached != (c.want == authz.Allowed) {
			t.Errorf("%v: upstream reached: got %v, want %v", c.want, reached, !reached)
		}
		seen[c.want]++
	}
	if len(seen) != 10 {
		t.Errorf("got reasons %v, want ten different ones", seen)
	}
	for reason, n := range seen {
		if got := k.Checks(t, reason); got != float64(n) {
			t.Errorf("metric of %v: got %v, want %d", reason, got, n)
		}
	}
}

// routes for the tests of where product and organization come from.
func routes() []envoy.Route {
	extension := func(pairs ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			m["keygate."+pairs[i]] = pairs[i+1]
		}
		return m
	}
	metadata := func(prefix string, product any) envoy.Route {
		return envoy.Route{Prefix: prefix, FilterMetadata: map[string]any{"keygate": map[string]any{"product": product}}}
	}
	w := []string{string(weather)}
	return append(envoy.QuickstartRoutes(),
		envoy.Route{Prefix: "/extension", ContextExtensions: extension("product", string(weather))},
		envoy.Route{Prefix: "/agree", Products: w, ContextExtensions: extension("product", string(weather))},
		envoy.Route{Prefix: "/disagree", Products: w, ContextExtensions: extension("product", string(orders))},
		envoy.Route{Prefix: "/any", Products: []string{string(orders), string(weather)}},
		envoy.Route{Prefix: "/none", Products: []string{"No-Product", string(orders)}},
		envoy.Route{Prefix: "/strange", Products: []string{"Ünits/100% & more"}},
		envoy.Route{Prefix: "/unknown-product", Products: []string{"No-Product"}},
		envoy.Route{Prefix: "/unnamed"},
		metadata("/number", 7), metadata("/empty", ""), metadata("/list-with-number", []any{string(weather), 7}),
		metadata("/nested", map[string]any{"name": string(weather)}), metadata("/long", strings.Repeat("p", 10_000)),
		envoy.Route{Prefix: "/namespace", FilterMetadata: map[string]any{"other": map[string]any{"product": string(weather)}}},
		envoy.Route{Prefix: "/acme", Products: w, Organization: "acme"},
		envoy.Route{Prefix: "/acme-extension", Products: w, ContextExtensions: extension("organization", "acme")},
		envoy.Route{Prefix: "/acme-agree", Products: w, Organization: "acme", ContextExtensions: extension("organization", "acme")},
		envoy.Route{Prefix: "/acme-disagree", Products: w, Organization: "acme", ContextExtensions: extension("organization", "default")},
		envoy.Route{Prefix: "/elsewhere", Products: w, Organization: "elsewhere"},
		envoy.Route{Prefix: "/escaping", Products: w, Organization: "default/keys"},
		envoy.Route{Prefix: "/dots", Products: w, Organization: "../default"},
	)
}

// Where product and organization come from, with records of two organizations.
func TestRoutesThroughEnvoy(t *testing.T) {
	t.Parallel()
	var made decisions
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, OnDecision: made.add,
		Bootstrap: func(b *envoy.Bootstrap) { b.Routes = routes() }})
	const (
		key     = "key-of-organization-default"
		acmeKey = "key-of-organization-acme-00"
		strange = authz.ProductName("Ünits/100% & more")
	)
	k.PutKeys(t,
		keygatetest.Key{Key: key, App: "app 1/ü", Developer: "dev-1", Scopes: []string{"read", "write"},
			Products: map[authz.ProductName]string{weather: "approved", orders: "revoked", strange: "approved"}},
		keygatetest.Key{Key: acmeKey, Organization: "acme"},
	)
	for _, test := range []struct {
		path string
		keys []string
		want authz.Reason
	}{
		{"/weather", []string{key}, authz.Allowed},
		{"/weather", nil, authz.KeyMissing},
		{"/weather", []string{""}, authz.KeyMissing},
		{"/weather", []string{key, key}, authz.KeyMalformed},
		{"/weather", []string{key + "," + acmeKey}, authz.KeyMalformed},
		{"/weather", []string{"k!" + key}, authz.KeyMalformed},
		{"/weather", []string{strings.ToUpper(key)}, authz.KeyUnknown},
		{"/weather", []string{key + "="}, authz.KeyUnknown},
		{"/weather", []string{key + "."}, authz.KeyUnknown},
		{"/weather", []string{key + "%20"}, authz.KeyMalformed},
		{"/weather", []string{"../../audit"}, authz.KeyUnknown},
		{"/weather", []string{"/keygate/default/keys/" + keygatetest.KeyID(t, key).String()}, authz.KeyUnknown},
		{"/weather", []string{keygatetest.KeyID(t, key).String()}, authz.KeyUnknown},
		{"/orders", []string{key}, authz.ProductRevoked},
		{"/extension", []string{key}, authz.Allowed},
		{"/agree", []string{key}, authz.Allowed},
		{"/disagree", []string{key}, authz.ProductUnresolved},
		{"/any", []string{key}, authz.Allowed},
		{"/none", []string{key}, authz.ProductNotOnKey},
		{"/strange", []string{key}, authz.Allowed},
		{"/strange", []string{acmeKey}, authz.KeyUnknown},
		{"/unknown-product", []string{key}, authz.ProductNotOnKey},
		{"/unnamed", []string{key}, authz.ProductUnresolved},
		{"/no/such/route", []string{key}, authz.ProductUnresolved},
		{"/no/such/route", nil, authz.KeyMissing},
		{"/number", []string{key}, authz.ProductUnresolved},
		{"/empty", []string{key}, authz.ProductUnresolved},
		{"/list-with-number", []string{key}, authz.ProductUnresolved},
		{"/nested", []string{key}, authz.ProductUnresolved},
		{"/long", []string{key}, authz.ProductUnresolved},
		{"/namespace", []string{key}, authz.ProductUnresolved},
		{"/acme", []string{key}, authz.KeyUnknown},
		{"/acme", []string{acmeKey}, authz.Allowed},
		{"/weather", []string{acmeKey}, authz.KeyUnknown},
		{"/acme-extension", []string{acmeKey}, authz.Allowed},
		{"/acme-agree", []string{acmeKey}, authz.Allowed},
		{"/acme-disagree", []string{acmeKey}, authz.ProductUnresolved},
		{"/elsewhere", []string{acmeKey}, authz.KeyUnknown},
		{"/escaping", []string{key}, authz.KeyUnknown},
		{"/dots", []string{key}, authz.ProductUnresolved},
	} {
		var headers []string
		for _, one := range test.keys {
			headers = append(headers, header(one))
		}
		got := k.Get(t, test.path, headers...)
		if reason := made.last().Reason; reason != test.want {
			t.Errorf("%s with %d keys: got %v, want %v", test.path, len(test.keys), reason, test.want)
			continue
		}
		wantReply(t, got, test.want)
	}

	t.Run("identity", func(t *testing.T) {
		spoofed := []string{header(key), "x-keygate-app: evil", "x-keygate-app: evil2", "X-Keygate-Organization: evil",
			"x-keygate-developer: evil", "x-keygate-product: evil", "x-keygate-key-id: evil", "x-keygate-scopes: admin", "x-other: stays"}
		got := k.Get(t, "/any", spoofed...)
		for name, want := range map[string][]string{
			"X-Keygate-Organization": {"default"}, "X-Keygate-Developer": {"dev-1"}, "X-Keygate-App": {"app%201%2F%C3%BC"},
			"X-Keygate-Product": {string(weather)}, "X-Keygate-Key-Id": {keygatetest.KeyID(t, key).String()},
			"X-Keygate-Scopes": {"read write"}, "X-Api-Key": nil, "X-Other": {"stays"},
		} {
			if v := got.Upstream.Headers[name]; !slices.Equal(v, want) {
				t.Errorf("%s: the upstream saw %q, want %q", name, v, want)
			}
		}
		got = k.Get(t, "/acme", header(acmeKey), "x-keygate-scopes: admin")
		if v := got.Upstream.Headers.Get("X-Keygate-Organization"); v != "acme" {
			t.Errorf("organization: the upstream saw %q, want acme", v)
		}
		if v, ok := got.Upstream.Headers["X-Keygate-Scopes"]; ok {
			t.Errorf("scopes of a key without any: the upstream saw %q, want none", v)
		}
	})

	t.Run("access log", func(t *testing.T) {
		want := made.list()
		var lines []string
		keygatetest.Eventually(t, 5*time.Second, "the access log to be written", func() bool {
			lines = strings.Split(strings.TrimSpace(k.AccessLog()), "\n")
			return len(lines) >= len(want)
		})
		for i, line := range lines {
			var entry struct {
				Decision struct {
					Reason       string `json:"reason"`
					KeyID        string `json:"key_id"`
					App          string `json:"app"`
					Organization string `json:"organization"`
				} `json:"decision"`
			}
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatalf("access log: %v: %s", err, line)
			}
			d, got := want[i], entry.Decision
			id := ""
			if d.KeyID != (authz.KeyID{}) {
				id = d.KeyID.String()
			}
			if got.Reason != d.Reason.String() || got.KeyID != id || got.App != string(d.App) || got.Organization != string(d.Organization) {
				t.Errorf("access log line %d: got %+v, want %v of key %s, app %s, organization %s", i+1, got, d.Reason, id, d.App, d.Organization)
			}
		}
	})
}

// A uniform denial tells nothing of the level: body, headers and status are the
// same for every refused key. The operator still sees the reason.
func TestUniformDenialThroughEnvoy(t *testing.T) {
	t.Parallel()
	var made decisions
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, OnDecision: made.add,
		Settings: func(c *config.Config) { c.DenialBody = envoy.DenialUniform }})
	keys := []keygatetest.Key{
		{Key: "uniform-key-revoked-000", Status: "revoked"},
		{Key: "uniform-key-expired-000", ExpiresAt: 1},
		{Key: "uniform-app-revoked-000", AppStatus: "revoked"},
		{Key: "uniform-developer-00000", DeveloperStatus: "inactive"},
		{Key: "uniform-product-revoked", Products: map[authz.ProductName]string{weather: "revoked"}},
		{Key: "uniform-product-none-00", Products: map[authz.ProductName]string{}},
		{Key: "uniform-unreadable-0000", Status: "aproved"},
	}
	k.PutKeys(t, keys...)
	headers := [][]string{nil, {header("uniform-unknown-key-00")}, {header("a,b")}}
	for _, key := range keys {
		headers = append(headers, []string{header(key.Key)})
	}
	reasons := map[authz.Reason]bool{}
	for _, h := range headers {
		got := k.Get(t, "/weather", h...)
		got.Header.Del("Date")
		reason := made.last().Reason
		reasons[reason] = true
		if got.Status != 401 || got.Body != invalidKey || len(got.Header) != 4 {
			t.Errorf("%v: got %d, %s, headers %v, want 401, %s and four headers", reason, got.Status, got.Body, got.Header, invalidKey)
		}
	}
	if len(reasons) != len(headers) {
		t.Errorf("got reasons %v, want %d different ones", reasons, len(headers))
	}
}

// The key in the query, where that is switched on, with real records.
func TestQueryThroughEnvoy(t *testing.T) {
	t.Parallel()
	var made decisions
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, OnDecision: made.add,
		Settings: func(c *config.Config) { c.KeyQuery = "apikey" }})
	const key, other = "key-that-comes-in-the-query", "another-key-for-the-query00"
	k.PutKeys(t, keygatetest.Key{Key: key}, keygatetest.Key{Key: other, Status: "revoked"})
	for _, test := range []struct {
		query   string
		headers []string
		want    authz.Reason
		path    string
	}{
		{"?apikey=" + key, nil, authz.Allowed, "/weather"},
		{"?a=1&apikey=" + key + "&b=2", nil, authz.Allowed, "/weather?a=1&b=2"},
		{"?apikey=" + key, []string{header(key)}, authz.Allowed, "/weather"},
		{"?a=1", []string{header(key)}, authz.Allowed, "/weather?a=1"},
		{"?apikey=" + other, []string{header(key)}, authz.KeyMalformed, ""},
		{"?apikey=" + key + "&apikey=" + key, nil, authz.KeyMalformed, ""},
		{"?apikey=" + other, nil, authz.KeyRevoked, ""},
		{"?ApiKey=" + key, nil, authz.KeyMissing, ""},
		{"?apikey=" + key + "%20", nil, authz.KeyMalformed, ""},
		{"", nil, authz.KeyMissing, ""},
	} {
		got := k.Get(t, "/weather"+test.query, test.headers...)
		name := strings.ReplaceAll(strings.ReplaceAll(test.query, key, "KEY"), other, "OTHER")
		if reason := made.last().Reason; reason != test.want || got.Upstream.Path != test.path {
			t.Errorf("%q: got %v and upstream path %q, want %v and %q", name, reason, got.Upstream.Path, test.want, test.path)
		}
		if h := got.Header.Get("Www-Authenticate"); got.Status == 401 && h != `ApiKey realm="keygate", header="x-api-key", query="apikey"` {
			t.Errorf("%q: got www-authenticate %q", name, h)
		}
		if strings.Contains(got.Body, key) {
			t.Errorf("%q: the key came back, so the upstream saw it", name)
		}
	}
}

// Whatever stands where a status should, only the exact word opens; and the
// next good word heals. Nobody else is affected.
func TestUnreadableRecords(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	conn := k.Conn(t)
	const witness = "key-of-somebody-else-000"
	k.PutKeys(t, keygatetest.Key{Key: witness})
	words := []string{"aproved", "Approved", "APPROVED", "approved\n", " approved", "approved ", "\"approved\"", "", "true", "1", "null", "{}",
		"approved\x00", "\xff\xfe\x00", "аpproved" /* a Cyrillic a */, strings.Repeat("approved", 1000)}
	space := k.Settings.Space
	for i, level := range []struct {
		name string
		path func(keygatetest.Key) string
		good string
		bad  []string
	}{
		{"key", func(key keygatetest.Key) string { return space.Status(key.Record(t)) }, "approved", []string{"active"}},
		{"app", func(key keygatetest.Key) string { return space.Status(key.AppRecord(t)) }, "approved", []string{"active"}},
		{"developer", func(key keygatetest.Key) string { return space.Status(key.DeveloperRecord(t)) }, "active", []string{"approved", "Active", "active\n"}},
		{"product", func(key keygatetest.Key) string { return space.KeyProduct(key.Record(t), weather) }, "approved", []string{"active"}},
	} {
		key := keygatetest.Key{Key: fmt.Sprintf("key-with-strange-status-%d", i)}
		k.PutKeys(t, key)
		path := level.path(key)
		set := func(word string) { k.Applied(t, k.Put(t, path, word)) }
		for _, word := range append(level.bad, words...) {
			set(word)
			if got := mustCheck(t, conn, key.Key); got != "record_unreadable" {
				t.Errorf("%s status %.30q: got %s, want record_unreadable", level.name, word, got)
			}
		}
		set(level.good)
		if got := mustCheck(t, conn, key.Key); got != "allowed" {
			t.Errorf("%s status %q: got %s, want allowed", level.name, level.good, got)
		}
		k.Applied(t, k.Delete(t, path))
		want := "record_unreadable"
		if level.name == "product" {
			want = "product_not_on_key"
		}
		if got := mustCheck(t, conn, key.Key); got != want {
			t.Errorf("%s status deleted: got %s, want %s", level.name, got, want)
		}
		if got := mustCheck(t, conn, witness); got != "allowed" {
			t.Errorf("another key beside a strange %s status: got %s, want allowed", level.name, got)
		}
	}
	if got := k.Metrics(t)["keygate_unreadable_records_total"]; got == 0 {
		t.Error("keygate_unreadable_records_total: got 0, want it to count")
	}
	if log := k.Log(); !strings.Contains(log, "record cannot be read") {
		t.Error("the log does not name an unreadable record")
	}
}

// A credential's JSON, and above all its expiry.
func TestCredentialEdges(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	conn := k.Conn(t)
	now := time.Now().UnixMilli()
	credential := func(expiry string) string {
		return `{"v":1,"appId":"app","developerId":"dev","expiresAt":` + expiry + `}`
	}
	for i, test := range []struct{ name, credential, want string }{
		{"never", credential("-1"), "allowed"},
		{"in an hour", credential(fmt.Sprint(now + 3_600_000)), "allowed"},
		{"last year of four digits", credential("253402300799999"), "allowed"},
		{"1 ms ago", credential(fmt.Sprint(now - 1)), "key_expired"},
		{"0", credential("0"), "key_expired"},
		{"-2", credential("-2"), "record_unreadable"},
		{"1e18", credential("1000000000000000000"), "record_unreadable"},
		{"1e18 as written by some", credential("1e18"), "record_unreadable"},
		{"beyond 64 bits", credential("99999999999999999999"), "record_unreadable"},
		{"a string", credential(`"-1"`), "record_unreadable"},
		{"null", credential("null"), "record_unreadable"},
		{"twice", credential(`-1,"expiresAt":1`), "record_unreadable"},
		{"absent", `{"v":1,"appId":"app","developerId":"dev"}`, "record_unreadable"},
		{"another version", strings.Replace(credential("-1"), `"v":1`, `"v":2`, 1), "record_unreadable"},
		{"no version", strings.Replace(credential("-1"), `"v":1,`, "", 1), "record_unreadable"},
		{"another developer", strings.Replace(credential("-1"), `"dev"`, `"other"`, 1), "record_unreadable"},
		{"no such app", strings.Replace(credential("-1"), `"app"`, `"other"`, 1), "record_unreadable"},
		{"an app elsewhere", strings.Replace(credential("-1"), `"app"`, `"../../acme/apps/app"`, 1), "record_unreadable"},
		{"truncated", credential("-1")[:20], "record_unreadable"},
		{"with something behind", credential("-1") + "x", "record_unreadable"},
		{"random bytes", "\x9c\xff\x00\x17", "record_unreadable"},
		{"deeply nested", strings.Replace(credential("-1"), `"v":1`, `"v":1,"x":`+strings.Repeat("[", 10_000)+strings.Repeat("]", 10_000), 1), "record_unreadable"},
		{"1.4 MB of something else", strings.Repeat("x", 1_400_000), "record_unreadable"},
		{"1.4 MB in an unknown member", strings.Replace(credential("-1"), `"v":1`, `"v":1,"x":"`+strings.Repeat("x", 1_400_000)+`"`, 1), "allowed"},
		{"absent as a whole", keygatetest.Absent, "record_unreadable"},
		{"unknown members", strings.Replace(credential("-1"), `"v":1`, `"v":1,"new":{"a":[1]}`, 1), "allowed"},
	} {
		key := fmt.Sprintf("key-with-edge-%06d", i)
		k.PutKeys(t, keygatetest.Key{Key: key, App: "app", Developer: "dev", Credential: test.credential})
		if got := mustCheck(t, conn, key); got != test.want {
			t.Errorf("%s: got %s, want %s", test.name, got, test.want)
		}
	}

	// A cached key expires by itself, at its millisecond and not before.
	const soon = "key-that-expires-very-soon"
	expiry := time.Now().Add(300 * time.Millisecond).UnixMilli()
	k.PutKeys(t, keygatetest.Key{Key: soon, ExpiresAt: expiry})
	if got := mustCheck(t, conn, soon); got != "allowed" {
		t.Errorf("before the expiry: got %s, want allowed", got)
	}
	keygatetest.Eventually(t, 5*time.Second, "the key to expire", func() bool {
		before := time.Now().UnixMilli()
		got := mustCheck(t, conn, soon)
		if got == "allowed" && before >= expiry {
			t.Errorf("%d ms after the expiry: got allowed", before-expiry)
		}
		if got == "key_expired" && time.Now().UnixMilli() < expiry {
			t.Error("expired before its time")
		}
		return got == "key_expired"
	})
}
