package proxy_test

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"keygate/envoy"
)

// What a client may send, through the real Envoy with the hardened
// configuration: the status it gets, what keygate decided, and what the
// upstream saw.
func TestThroughEnvoy(t *testing.T) {
	r := MustRig(t, func(_ *envoy.Config, b *envoy.Bootstrap) {
		b.Routes = append(b.Routes,
			envoy.Route{Prefix: "/admin", Products: []string{"Admin-Product"}},
			envoy.Route{Prefix: "/any", Products: []string{"Orders-Product", "Weather-Product"}},
			envoy.Route{Prefix: "/preflight", Method: "OPTIONS", Open: true},
			envoy.Route{Prefix: "/preflight", Products: []string{"Weather-Product"}},
			envoy.Route{Prefix: "/unnamed"},
			envoy.Route{Prefix: "/extension", ContextExtensions: map[string]string{"keygate.product": "Weather-Product"}},
			envoy.Route{Prefix: "/agree", Products: []string{"Weather-Product"}, ContextExtensions: map[string]string{"keygate.product": "Weather-Product"}},
			envoy.Route{Prefix: "/disagree", Products: []string{"Weather-Product"}, ContextExtensions: map[string]string{"keygate.product": "Orders-Product"}},
			envoy.Route{Prefix: "/acme", Products: []string{"Weather-Product"}, Organization: "acme"},
			envoy.Route{Prefix: "/elsewhere", Products: []string{"Weather-Product"}, Organization: "elsewhere"},
			envoy.Route{Prefix: "/organizations-disagree", Products: []string{"Weather-Product"}, Organization: "acme",
				ContextExtensions: map[string]string{"keygate.organization": "default"}},
			metadataRoute("/number", map[string]any{"product": 7}),
			metadataRoute("/empty", map[string]any{"product": ""}),
			metadataRoute("/nested", map[string]any{"product": map[string]any{"name": "Weather-Product"}}),
			metadataRoute("/mixed-list", map[string]any{"product": []any{"Weather-Product", 7}}),
			metadataRoute("/long", map[string]any{"product": strings.Repeat("p", 10_000)}),
			envoy.Route{Prefix: "/namespace", FilterMetadata: map[string]any{"other": map[string]any{"product": "Weather-Product"}}},
		)
	})
	const key = "x-api-key: " + goodKey
	for _, test := range []struct {
		name   string
		raw    string
		status int
		reason string
		path   string // as the upstream sees it; "" for not at all
	}{
		{"good key", raw("GET /weather HTTP/1.1", key), 200, "allowed", "/weather"},
		{"header name in another case, value with blanks around", raw("GET /weather/x?a=b HTTP/1.1", "X-API-KEY: \t"+goodKey+" "), 200, "allowed", "/weather/x?a=b"},
		{"no key", raw("GET /weather HTTP/1.1"), 401, "key_missing", ""},
		{"empty key", raw("GET /weather HTTP/1.1", "x-api-key:"), 401, "key_missing", ""},
		{"blank key", raw("GET /weather HTTP/1.1", "x-api-key: \t "), 401, "key_missing", ""},
		{"key named in Connection", strings.Replace(raw("GET /weather HTTP/1.1", key), "Connection: close", "Connection: close, x-api-key", 1), 401, "key_missing", ""},
		{"two keys", raw("GET /weather HTTP/1.1", key, key), 401, "key_malformed", ""},
		{"a good key and another", raw("GET /weather HTTP/1.1", key, "X-Api-Key: other"), 401, "key_malformed", ""},
		{"a good key and an empty one", raw("GET /weather HTTP/1.1", key, "x-api-key:"), 401, "key_malformed", ""},
		{"joined keys", raw("GET /weather HTTP/1.1", key+","+goodKey), 401, "key_malformed", ""},
		{"bytes ff fe", raw("GET /weather HTTP/1.1", "x-api-key: k\xff\xfe1"), 401, "key_malformed", ""},
		{"UTF-8", raw("GET /weather HTTP/1.1", "x-api-key: K\u00e91"), 401, "key_malformed", ""},
		{"exclamation mark", raw("GET /weather HTTP/1.1", "x-api-key: k!!1"), 401, "key_malformed", ""},
		{"escaped blank", raw("GET /weather HTTP/1.1", key+"%20"), 401, "key_malformed", ""},
		{"other case", raw("GET /weather HTTP/1.1", "x-api-key: "+strings.ToUpper(goodKey)), 401, "key_unknown", ""},
		{"one more =", raw("GET /weather HTTP/1.1", key+"="), 401, "key_unknown", ""},
		{"path as a key", raw("GET /weather HTTP/1.1", "x-api-key: ../../audit"), 401, "key_unknown", ""},
		{"2048 bytes", raw("GET /weather HTTP/1.1", "x-api-key: "+strings.Repeat("k", 2048)), 401, "key_unknown", ""},
		{"2049 bytes", raw("GET /weather HTTP/1.1", "x-api-key: "+strings.Repeat("k", 2049)), 401, "key_malformed", ""},
		{"50 KB", raw("GET /weather HTTP/1.1", "x-api-key: "+strings.Repeat("k", 50_000)), 401, "key_malformed", ""},
		{"headers of 70 KB", raw("GET /weather HTTP/1.1", key, "x-much: "+strings.Repeat("k", 70_000)), 431, "not asked", ""},
		{"underscore header", raw("GET /weather HTTP/1.1", "X_API_Key: "+goodKey), 400, "not asked", ""},
		{"underscore identity", raw("GET /weather HTTP/1.1", key, "x_keygate_app: evil"), 400, "not asked", ""},
		{"key in the query, which is off", raw("GET /weather?apikey=" + goodKey + " HTTP/1.1"), 401, "key_missing", ""},
		{"no answer in time to be fresh", raw("GET /weather HTTP/1.1", "x-api-key: "+staleKey), 503, "stale", ""},

		{"revoked product", raw("GET /orders HTTP/1.1", key), 401, "product_revoked", ""},
		{"other product", raw("GET /admin HTTP/1.1", key), 401, "product_not_on_key", ""},
		{"any of a list", raw("GET /any HTTP/1.1", key), 200, "allowed", "/any"},
		{"dots", raw("GET /weather/../admin HTTP/1.1", key), 401, "product_not_on_key", ""},
		{"escaped dots", raw("GET /weather/%2e%2e/admin HTTP/1.1", key), 401, "product_not_on_key", ""},
		{"backslash", raw("GET /weather/..\\admin HTTP/1.1", key), 401, "product_not_on_key", ""},
		{"dots with a parameter", raw("GET /weather/..;/admin HTTP/1.1", key), 401, "product_not_on_key", ""},
		{"escaped slash", raw("GET /weather%2f..%2fadmin HTTP/1.1", key), 400, "not asked", ""},
		{"escaped backslash", raw("GET /weather%5c..%5cadmin HTTP/1.1", key), 400, "not asked", ""},
		{"slash escaped twice", raw("GET /weather/%252f HTTP/1.1", key), 200, "allowed", "/weather/%252f"},
		{"two slashes", raw("GET //admin HTTP/1.1", key), 401, "product_not_on_key", ""},
		{"two slashes within", raw("GET /weather//x HTTP/1.1", key), 200, "allowed", "/weather/x"},
		{"longer word", raw("GET /weatherfoo HTTP/1.1", key), 403, "product_unresolved", ""},
		{"upper case", raw("GET /WEATHER HTTP/1.1", key), 403, "product_unresolved", ""},
		{"no such route", raw("GET /elsewhat HTTP/1.1", key), 403, "product_unresolved", ""},
		{"no such route, no key", raw("GET /elsewhat HTTP/1.1"), 401, "key_missing", ""},
		{"fragment", raw("GET /weather#/x HTTP/1.1", key), 400, "not asked", ""},
		{"absolute form", raw("GET http://other.example/weather HTTP/1.1", key), 200, "allowed", "/weather"},
		{"spoofed original path", raw("GET /weather HTTP/1.1", key, "x-envoy-original-path: /admin"), 200, "allowed", "/weather"},
		{"spoofed product", raw("GET /unnamed HTTP/1.1", key, "x-keygate-product: Weather-Product"), 403, "product_unresolved", ""},

		{"route without a product", raw("GET /unnamed HTTP/1.1", key), 403, "product_unresolved", ""},
		{"context extension", raw("GET /extension HTTP/1.1", key), 200, "allowed", "/extension"},
		{"two sources agree", raw("GET /agree HTTP/1.1", key), 200, "allowed", "/agree"},
		{"two sources disagree", raw("GET /disagree HTTP/1.1", key), 403, "product_unresolved", ""},
		{"organization", raw("GET /acme HTTP/1.1", key), 200, "allowed", "/acme"},
		{"other organization", raw("GET /elsewhere HTTP/1.1", key), 401, "key_unknown", ""},
		{"organizations disagree", raw("GET /organizations-disagree HTTP/1.1", key), 403, "product_unresolved", ""},
		{"number", raw("GET /number HTTP/1.1", key), 403, "product_unresolved", ""},
		{"empty", raw("GET /empty HTTP/1.1", key), 403, "product_unresolved", ""},
		{"nested", raw("GET /nested HTTP/1.1", key), 403, "product_unresolved", ""},
		{"mixed list", raw("GET /mixed-list HTTP/1.1", key), 403, "product_unresolved", ""},
		{"long", raw("GET /long HTTP/1.1", key), 403, "product_unresolved", ""},
		{"other namespace", raw("GET /namespace HTTP/1.1", key), 403, "product_unresolved", ""},

		{"HEAD", raw("HEAD /weather HTTP/1.1", key), 200, "allowed", "/weather"},
		{"unknown method", raw("BREW /weather HTTP/1.1"), 400, "not asked", ""},
		{"preflight", raw("OPTIONS /weather HTTP/1.1", "Origin: http://x", "Access-Control-Request-Method: GET"), 401, "key_missing", ""},
		{"preflight of a route that opens it", raw("OPTIONS /preflight HTTP/1.1"), 200, "not asked", "/preflight"},
		{"the same route otherwise", raw("GET /preflight HTTP/1.1"), 401, "key_missing", ""},
		{"OPTIONS *", raw("OPTIONS * HTTP/1.1", key), 404, "not asked", ""},
		{"CONNECT", raw("CONNECT api.example.com:443 HTTP/1.1", key), 404, "not asked", ""},
		{"WebSocket, which is off", raw("GET /weather HTTP/1.1", key, "Connection: upgrade", "Upgrade: websocket"), 403, "not asked", ""},
		{"HTTP/1.0", "GET /weather HTTP/1.0\r\n" + key + "\r\n\r\n", 426, "not asked", ""},
		{"NUL", raw("GET /weather HTTP/1.1", "x-api-key: a\x00b"), 400, "not asked", ""},
		{"folded line", raw("GET /weather HTTP/1.1", "x-api-key: abc\r\n def"), 401, "key_malformed", ""},
		{"blank before the colon", raw("GET /weather HTTP/1.1", "x-api-key : "+goodKey), 400, "not asked", ""},
		{"both lengths", raw("POST /weather HTTP/1.1", key, "Content-Length: 3", "Transfer-Encoding: chunked") + "0\r\n\r\n", 400, "not asked", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			asked, passed := r.counts()
			got, err := r.send(test.raw)
			if err != nil {
				t.Fatalf("send: %v", err)
			}
			if reason := r.lastReason(asked); got.status != test.status || reason != test.reason {
				t.Errorf("status %d, %s; want %d, %s (body %q)", got.status, reason, test.status, test.reason, got.body)
			}
			if _, now := r.counts(); (now != passed) != (test.path != "") {
				t.Errorf("%d requests reached the upstream, want it to be reached: %t", now-passed, test.path != "")
			}
			if got.echoed.Method != "" && got.echoed.Path != test.path {
				t.Errorf("the upstream saw %s, want %s", got.echoed.Path, test.path)
			}
			if strings.Contains(got.body, goodKey) {
				t.Errorf("the key came back, so the upstream saw it: %s", got.body)
			}
		})
	}
	if log := r.accessLog.String(); strings.Contains(log, goodKey) {
		t.Errorf("the access log holds the key:\n%s", log)
	}
}

func metadataRoute(prefix string, own map[string]any) envoy.Route {
	return envoy.Route{Prefix: prefix, FilterMetadata: map[string]any{"keygate": own}}
}

// The upstream learns who called from keygate alone.
func TestIdentityHeaders(t *testing.T) {
	r := MustRig(t, nil)
	spoofed := []string{
		"X-Keygate-Organization: evil", "x-keygate-organization: evil2", "x-keygate-developer: evil", "x-keygate-app: evil", "x-keygate-app: evil",
		"x-keygate-product: evil", "x-keygate-key-id: evil", "x-keygate-scopes: admin", "x-keygate-scopes: root",
	}
	for key, scopes := range map[string][]string{goodKey: {"read write"}, bareKey: nil} {
		got, err := r.send(raw("GET /weather HTTP/1.1", append(spoofed, "x-api-key: "+key, "x-other: stays")...))
		if err != nil || got.status != 200 {
			t.Fatalf("got %d %s, %v", got.status, got.body, err)
		}
		for name, want := range map[string][]string{
			"X-Keygate-Organization": {"default"}, "X-Keygate-Developer": {"dev-1"}, "X-Keygate-App": {"app-1"},
			"X-Keygate-Product": {"Weather-Product"}, "X-Keygate-Key-Id": {keyID(key).String()}, "X-Keygate-Scopes": scopes,
			"X-Api-Key": nil, "X-Other": {"stays"},
		} {
			if values := got.echoed.Headers[name]; !slices.Equal(values, want) {
				t.Errorf("%s: the upstream saw %q, want %q", name, values, want)
			}
		}
	}
}

// A refusal is what Apigee would answer.
func TestDenialThroughEnvoy(t *testing.T) {
	r := MustRig(t, nil)
	for _, test := range []struct {
		raw    string
		header string
		value  string
		body   string
	}{
		{raw("GET /weather HTTP/1.1"), "Www-Authenticate", `ApiKey realm="keygate", header="x-api-key"`,
			`{"fault":{"faultstring":"Failed to resolve API Key variable request.header.x-api-key","detail":{"errorcode":"steps.oauth.v2.FailedToResolveAPIKey"}}}`},
		{raw("GET /orders HTTP/1.1", "x-api-key: "+goodKey), "Content-Type", "application/json",
			`{"fault":{"faultstring":"Invalid ApiKey for given resource","detail":{"errorcode":"oauth.v2.InvalidApiKeyForGivenResource"}}}`},
		{raw("GET /weather HTTP/1.1", "x-api-key: "+staleKey), "Retry-After", "1",
			`{"fault":{"faultstring":"The Service is temporarily unavailable","detail":{"errorcode":"keygate.ServiceUnavailable"}}}`},
		{raw("POST /weather HTTP/1.1", "content-type: application/grpc", "te: trailers", "content-length: 0"), "Grpc-Status", "16", ""},
	} {
		got, err := r.send(test.raw)
		if err != nil {
			t.Fatal(err)
		}
		if got.header.Get(test.header) != test.value || got.body != test.body {
			t.Errorf("got %s: %q and body %s, want %q and %s", test.header, got.header.Get(test.header), got.body, test.value, test.body)
		}
		if len(got.header.Values("Content-Type")) != 1 {
			t.Errorf("content types %q, want one", got.header.Values("Content-Type"))
		}
	}
	waitFor(t, "the access log to tell why", func() bool {
		log := r.accessLog.String()
		return strings.Contains(log, `"reason":"product_revoked"`) && strings.Contains(log, keyID(goodKey).String())
	})
}

// A key in the query, where that is switched on, goes no further than keygate.
func TestQueryThroughEnvoy(t *testing.T) {
	r := MustRig(t, func(c *envoy.Config, _ *envoy.Bootstrap) { c.KeyQuery = "apikey" })
	const key = "x-api-key: " + goodKey
	for _, test := range []struct {
		name   string
		raw    string
		status int
		reason string
		path   string
	}{
		{"alone", raw("GET /weather?apikey=" + goodKey + " HTTP/1.1"), 200, "allowed", "/weather"},
		{"among others", raw("GET /weather?a=1&apikey=" + goodKey + "&b=%20 HTTP/1.1"), 200, "allowed", "/weather?a=1&b=%20"},
		{"header only", raw("GET /weather?a=1 HTTP/1.1", key), 200, "allowed", "/weather?a=1"},
		{"both, equal", raw("GET /weather?apikey="+goodKey+" HTTP/1.1", key), 200, "allowed", "/weather"},
		{"both, different", raw("GET /weather?apikey="+bareKey+" HTTP/1.1", key), 401, "key_malformed", ""},
		{"twice", raw("GET /weather?apikey=" + goodKey + "&apikey=" + goodKey + " HTTP/1.1"), 401, "key_malformed", ""},
		{"escaped name", raw("GET /weather?api%6bey=" + goodKey + " HTTP/1.1"), 401, "key_malformed", ""},
		{"other case", raw("GET /weather?ApiKey=" + goodKey + " HTTP/1.1"), 401, "key_missing", ""},
		{"semicolon", raw("GET /weather?a=b;apikey=" + goodKey + " HTTP/1.1"), 401, "key_malformed", ""},
		{"leading semicolon", raw("GET /weather?;apikey=" + goodKey + " HTTP/1.1"), 401, "key_malformed", ""},
		{"unknown", raw("GET /weather?apikey=" + strings.ToUpper(goodKey) + " HTTP/1.1"), 401, "key_unknown", ""},
		{"empty", raw("GET /weather?apikey= HTTP/1.1"), 401, "key_missing", ""},
		{"escaped value", raw("GET /weather?apikey=" + strings.ReplaceAll(goodKey, "-", "%2d") + "&c=d HTTP/1.1"), 200, "allowed", "/weather?c=d"},
		{"two slashes in front", raw("GET //weather?apikey=" + goodKey + " HTTP/1.1"), 200, "allowed", "/weather"},
	} {
		t.Run(test.name, func(t *testing.T) {
			asked, passed := r.counts()
			got, err := r.send(test.raw)
			if err != nil {
				t.Fatalf("send: %v", err)
			}
			if reason := r.lastReason(asked); got.status != test.status || reason != test.reason {
				t.Errorf("status %d, %s; want %d, %s (body %q)", got.status, reason, test.status, test.reason, got.body)
			}
			if _, now := r.counts(); (now != passed) != (test.path != "") || got.echoed.Path != test.path {
				t.Errorf("%d requests reached the upstream, as %q, want %q", now-passed, got.echoed.Path, test.path)
			}
			if unescaped, err := url.QueryUnescape(got.body); err != nil || strings.Contains(unescaped, goodKey) {
				t.Errorf("the upstream saw the key (%v): %s", err, got.body)
			}
		})
	}
	waitFor(t, "an access log without queries", func() bool {
		return strings.Count(r.accessLog.String(), "\n") >= 14
	})
	if log := r.accessLog.String(); strings.Contains(strings.ToLower(log), goodKey) || strings.Contains(log, "?") {
		t.Errorf("the access log holds a query:\n%s", log)
	}
}

// An upgrade is checked as any request is.
func TestWebSocketThroughEnvoy(t *testing.T) {
	r := MustRig(t, func(_ *envoy.Config, b *envoy.Bootstrap) { b.WebSocket = true })
	upgrade := func(headers ...string) string {
		return "GET /weather HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n" + strings.Join(append(headers, ""), "\r\n") + "\r\n"
	}
	if got, err := r.send(upgrade()); err != nil || got.status != 401 {
		t.Errorf("without a key: %d, %v, want 401", got.status, err)
	}
	if _, passed := r.counts(); passed != 0 {
		t.Errorf("%d upgrades reached the upstream without a key", passed)
	}
	// The upstream declines to upgrade; that it was reached is the point.
	if got, err := r.send(upgrade("x-api-key: " + goodKey)); err != nil || got.status == 401 || got.status == 403 {
		t.Errorf("with a key: %d, %v, want it to pass", got.status, err)
	}
	if _, passed := r.counts(); passed != 1 {
		t.Errorf("%d upgrades reached the upstream, want 1", passed)
	}
}

// keygate gone is a 503, not a bad key, and nothing passes.
func TestKeygateGone(t *testing.T) {
	r := MustRig(t, nil)
	good := raw("GET /weather HTTP/1.1", "x-api-key: "+goodKey)
	if got, err := r.send(good); err != nil || got.status != 200 {
		t.Fatalf("before: %d, %v, want 200", got.status, err)
	}
	r.keygate.Stop()
	_, before := r.counts()
	for range 5 {
		if got, err := r.send(good); err != nil || got.status != http.StatusServiceUnavailable {
			t.Errorf("after: %d, %v, want 503", got.status, err)
		}
	}
	if _, after := r.counts(); after != before {
		t.Errorf("%d requests passed unchecked", after-before)
	}
}

// waitFor polls cond for up to ten seconds.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-deadline:
			t.Fatalf("waited in vain for %s", what)
		case <-tick.C:
		}
	}
}
