package proxy_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"keygate/authz"
	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/envoy/proxy/proxytest"
)

// doorRig is a rig whose Envoy asks by HTTP, and its server of checks.
type doorRig struct {
	*rig
	server *http.Server
	checks *counted
}

// counted counts what reaches a handler.
type counted struct {
	http.Handler
	seen chan *http.Request
}

func (c *counted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.RequestURI != envoy.HTTPHealthPath {
		select {
		case c.seen <- r.Clone(r.Context()):
		default:
		}
	}
	c.Handler.ServeHTTP(w, r)
}

// last is the newest check that was seen since the last call; nil if there is
// none.
func (c *counted) last() (r *http.Request) {
	for {
		select {
		case r = <-c.seen:
		default:
			return r
		}
	}
}

// MustDoorRig starts what MustRig does, with an Envoy that asks by HTTP.
func MustDoorRig(t *testing.T, edit func(*envoy.Bootstrap)) *doorRig {
	t.Helper()
	r := &doorRig{rig: &rig{}, checks: &counted{seen: make(chan *http.Request, 64)}}
	service, err := envoy.New(envoy.Config{
		Authorizer: &authz.Authorizer{Source: source{}}, Organization: "default",
		OnDecision: func(d authz.Decision, _ time.Duration) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.decisions = append(r.decisions, d)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.server, err = service.HTTPServer(nil); err != nil {
		t.Fatal(err)
	}
	r.checks.Handler, r.server.Handler = r.server.Handler, r.checks
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- r.server.Serve(l) }()
	t.Cleanup(func() {
		_ = r.server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serve checks: %v", err)
		}
	})
	echo := proxy.Echo()
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.upstream++
		r.mu.Unlock()
		if _, err := io.Copy(io.Discard, req.Body); err != nil {
			t.Errorf("the upstream: %v", err)
		}
		echo.ServeHTTP(w, req)
	}))
	t.Cleanup(upstream.Close)
	b := envoy.Bootstrap{
		Listen: "127.0.0.1:0", Authz: []string{l.Addr().String()}, Upstream: upstream.Listener.Addr().String(), HTTP: envoy.DoorHTTP1,
		Routes: doorRoutes(), AccessLog: true,
	}
	if edit != nil {
		edit(&b)
	}
	r.envoy, err = proxy.Start(t.Context(), proxy.Config{
		Binary: proxytest.Binary(t), Bootstrap: b, Concurrency: 1, AccessLog: &r.accessLog,
	})
	if err != nil {
		t.Fatalf("start Envoy: %v", err)
	}
	t.Cleanup(r.envoy.Stop)
	return r
}

func doorRoutes() []envoy.Route {
	return append(envoy.QuickstartRoutes(),
		envoy.Route{Prefix: "/admin", Products: []string{"Admin-Product"}},
		envoy.Route{Prefix: "/any", Products: []string{"Orders-Product", "Weather-Product"}},
		envoy.Route{Prefix: "/preflight", Method: "OPTIONS", Open: true},
		envoy.Route{Prefix: "/preflight", Products: []string{"Weather-Product"}},
		envoy.Route{Prefix: "/unnamed"},
		envoy.Route{Prefix: "/acme", Products: []string{"Weather-Product"}, Organization: "acme"},
		envoy.Route{Prefix: "/elsewhere", Products: []string{"Weather-Product"}, Organization: "elsewhere"},
		envoy.Route{Prefix: "/strange", Products: []string{"a/b ü%?#;\n..", "..", "Weather-Product"}},
		envoy.Route{Prefix: "/organization", Products: []string{"organization", "product"}},
	)
}

// Whatever a client sends, it gets the same answer through both doors, the
// upstream sees the same, and keygate decides the same.
func TestBothDoorsThroughEnvoy(t *testing.T) {
	byGRPC := MustRig(t, func(_ *envoy.Config, b *envoy.Bootstrap) { b.Routes = doorRoutes() })
	http1 := MustDoorRig(t, nil)
	http2 := MustDoorRig(t, func(b *envoy.Bootstrap) { b.HTTP = envoy.DoorHTTP2 })

	const key = "x-api-key: " + goodKey
	get := func(path string, headers ...string) string { return raw("GET "+path+" HTTP/1.1", headers...) }
	requests := []string{
		get("/weather", key), get("/weather/x?a=b&product=c", "X-API-KEY: \t"+goodKey+" "), get("/weather", "x-api-key: "+bareKey), get("/any", key),
		get("/acme", key), get("/elsewhere", key), get("/strange", key), get("/organization", key), get("/orders", key), get("/admin", key), get("/unnamed", key), get("/nothing", key), get("/nothing"),

		// The key.
		get("/weather"), get("/weather", "x-api-key:"), get("/weather", "x-api-key: \t "), get("/weather", key, key), get("/weather", key, "X-Api-Key: other"),
		get("/weather", key, "x-api-key:"), get("/weather", "x-api-key:", key), get("/weather", key+","+goodKey), get("/weather", "x-api-key: k\xff\xfe1"), get("/weather", "x-api-key: K\u00e91"),
		get("/weather", "x-api-key: k\x80\xa0"), get("/weather", "x-api-key: k!!1"), get("/weather", key+"%20"), get("/weather", "x-api-key: "+strings.ToUpper(goodKey)),
		get("/weather", "x-api-key: "+strings.Repeat("k", 2048)), get("/weather", "x-api-key: "+strings.Repeat("k", 2049)), get("/weather", "x-api-key: "+strings.Repeat("k", 58_000)),
		get("/weather", key, "x-much: "+strings.Repeat("k", 70_000)), get("/weather", "X_API_Key: "+goodKey), get("/weather?apikey=" + goodKey), get("/weather", "x-api-key: a\tb"),
		get("/weather", "x-api-key: a\x00b"), get("/weather", "x-api-key: a\x01b"), get("/weather", "x-api-key: a\x7fb"), get("/weather", "x-api-key: abc\r\n def"), get("/weather", "x-api-key : "+goodKey),
		strings.Replace(get("/weather", key), "Connection: close", "Connection: close, x-api-key", 1),

		// What names the product, as a client might.
		get("/unnamed", key, "x-keygate-product: Weather-Product"), get("/unnamed", key, "x-keygate-product: a", "X-KEYGATE-PRODUCT: Weather-Product"),
		get("/unnamed", key, "x-envoy-original-path: /v1/check/product/Weather-Product"), get("/orders", key, ":path: /v1/check/product/Weather-Product"),
		get("/orders", key, "path: /v1/check/product/Weather-Product"), get("/orders", key, "x-original-url: /v1/check/product/Weather-Product"),
		get("/v1/check/product/Weather-Product", key), get("/orders/../v1/check/product/Weather-Product", key), get("/orders/v1/check/product/Weather-Product", key),
		get("/unnamed?/v1/check/product/Weather-Product", key), get("/orders?product=Weather-Product", key), get("/orders%0d%0a:path:%20/v1/check/product/Weather-Product", key),
		get("http://keygate/v1/check/product/Weather-Product", key), get("/v1/health", key), get("/v1/health"),
		get("/orders", key, "x-envoy-auth-headers-to-remove: x-api-key"), get("/weather", key, "x-envoy-auth-headers-to-remove: host"),
		get("/orders", key, "x-envoy-expected-rq-timeout-ms: 1", "x-envoy-upstream-rq-timeout-ms: 1"), get("/weather", key, "x-envoy-expected-rq-timeout-ms: 1"),
		get("/weather", key, "Authorization: Basic c2VjcmV0", "Cookie: c=secret", "User-Agent: x", "Proxy-Authorization: Basic eA=="),
		get("/weather", key, "x-keygate-app: evil", "X-Keygate-App: evil2", "x-keygate-organization: evil", "x-keygate-scopes: root", "x-other: stays"),
		get("/weather", "x-api-key: "+bareKey, "x-keygate-scopes: root", "x-keygate-scopes: admin"), get("/weather", key, "x_keygate_app: evil"),

		// Paths.
		get("/weather/../admin", key), get("/weather/%2e%2e/admin", key), get("/weather/..\\admin", key), get("/weather/..;/admin", key), get("/weather%2f..%2fadmin", key),
		get("/weather%5c..%5cadmin", key), get("/weather/%252f", key), get("//admin", key), get("/weather//x", key), get("//weather", key), get("/weatherfoo", key), get("/WEATHER", key),
		get("/weather#/x", key), get("/weather?#", key), get("/weather?", key), get("/weather??a", key), get("http://other.example/weather", key), get("*", key), get("/weather/%00", key),

		// Methods and versions.
		raw("HEAD /weather HTTP/1.1", key), raw("OPTIONS /weather HTTP/1.1", "Origin: http://x", "Access-Control-Request-Method: GET"), raw("OPTIONS /weather HTTP/1.1", key),
		raw("OPTIONS /preflight HTTP/1.1"), get("/preflight"), raw("OPTIONS * HTTP/1.1", key), raw("CONNECT api.example.com:443 HTTP/1.1", key),
		raw("CONNECT /v1/check/product/Weather-Product HTTP/1.1", key), raw("BREW /weather HTTP/1.1", key), raw("TRACE /weather HTTP/1.1", key), raw("DELETE /orders HTTP/1.1", key),
		raw("PUT /weather HTTP/1.1", key, "Content-Length: 3") + "abc", raw("POST /weather HTTP/1.1", key, "Transfer-Encoding: chunked") + "3\r\nabc\r\n0\r\n\r\n",
		raw("POST /orders HTTP/1.1", key, "Content-Length: 3") + "abc", raw("POST /weather HTTP/1.1", key, "Content-Length: 3", "Transfer-Encoding: chunked") + "0\r\n\r\n",
		raw("POST /orders HTTP/1.1", key, "content-type: application/grpc", "te: trailers", "content-length: 0"),
		raw("PUT /weather HTTP/1.1", key, "Content-Length: 3000000") + strings.Repeat("b", 3_000_000),
		get("/weather", key, "Connection: upgrade", "Upgrade: websocket"), get("/weather", key, "Connection: upgrade, http2-settings", "Upgrade: h2c"),
		"GET /weather HTTP/1.0\r\n" + key + "\r\n\r\n", get("/weather", key, "Host: other.example"),
	}
	for _, text := range requests {
		want := byGRPC.mustAsk(t, text)
		for name, r := range map[string]*doorRig{"HTTP/1.1": http1, "HTTP/2": http2} {
			if got := r.mustAsk(t, text); got != want {
				t.Errorf("%.90q over %s:\ngot  %+v\nwant %+v", text, name, got, want)
			}
			seen := r.checks.last()
			if seen == nil {
				if want.reason != "not asked" {
					t.Errorf("%.90q over %s: keygate was not asked", text, name)
				}
				continue
			}
			// What keygate sees is the route's own path, the key, and what Envoy
			// itself writes.
			for header := range seen.Header {
				if !slices.Contains([]string{"X-Api-Key", "Content-Length", "X-Envoy-Internal", "X-Envoy-Expected-Rq-Timeout-Ms"}, header) {
					t.Errorf("%.90q over %s: keygate saw header %s", text, name, header)
				}
			}
			if !strings.HasPrefix(seen.RequestURI, "/v1/check") || seen.ContentLength != 0 || seen.Header.Get("X-Envoy-Expected-Rq-Timeout-Ms") != "250" {
				t.Errorf("%.90q over %s: keygate saw path %q, %d bytes of body and %v", text, name, seen.RequestURI, seen.ContentLength, seen.Header)
			}
		}
	}

	// An outage is 503 at all of them; the body is Envoy's to give, and it gives
	// none at the HTTP door.
	for name, r := range map[string]*rig{"gRPC": byGRPC, "HTTP/1.1": http1.rig, "HTTP/2": http2.rig} {
		var got answered
		for range 6 { // one more than would eject keygate
			got = r.mustAsk(t, get("/weather", "x-api-key: "+staleKey))
		}
		if got.status != 503 || got.reason != "stale" || got.passed {
			t.Errorf("%s: got %+v, want 503 for stale", name, got)
		}
		if empty := got.body == ""; empty != (name != "gRPC") {
			t.Errorf("%s: 503 with body %q", name, got.body)
		}
	}
	// The access log has the identity of who passed, and no key.
	waitFor(t, "the access log to tell who", func() bool {
		return strings.Contains(http1.accessLog.String(), `"x-keygate-key-id":"`+keyID(goodKey).String())
	})
	for name, r := range map[string]*doorRig{"HTTP/1.1": http1, "HTTP/2": http2} {
		if strings.Contains(r.accessLog.String(), goodKey) {
			t.Errorf("%s: the access log holds the key", name)
		}
		if body := adminStats(t, r.rig, "cluster.keygate.health_check.(success|failure)$"); !strings.Contains(body, "failure: 0") || strings.Contains(body, "success: 0") {
			t.Errorf("%s: %s; want health checks that succeed", name, body)
		}
		// And no client has made a check fail, which would eject keygate.
		if body := adminStats(t, r.rig, "cluster.keygate.(upstream_rq_rx_reset|upstream_rq_retry|outlier_detection.ejections_enforced_total)"); strings.Contains(body, ": ") {
			for line := range strings.Lines(body) {
				if !strings.HasSuffix(strings.TrimSpace(line), ": 0") && !strings.Contains(line, "backoff") {
					t.Errorf("%s: %s", name, line)
				}
			}
		}
	}

	// keygate away is 503.
	for name, r := range map[string]*doorRig{"HTTP/1.1": http1, "HTTP/2": http2} {
		_ = r.server.Close()
		if got := r.mustAsk(t, get("/weather", key)); got.status != 503 || got.passed {
			t.Errorf("%s: without keygate: got %+v, want 503", name, got)
		}
	}
}

// A keygate that hangs is an outage, and is left out after five timeouts; one that
// answers is not, whatever it answers (see above).
func TestHTTPDoorHangs(t *testing.T) {
	r := MustDoorRig(t, nil)
	release := make(chan struct{})
	defer close(release)
	r.checks.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release })
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			if got, err := r.send(raw("GET /weather HTTP/1.1", "x-api-key: "+goodKey)); err != nil || got.status != 503 {
				t.Errorf("got %d, %v, want 503", got.status, err)
			}
		})
	}
	wg.Wait()
	if stats := adminStats(t, r.rig, "cluster.keygate.outlier_detection.ejections_enforced_total"); !strings.Contains(stats, ": 1") {
		t.Errorf("%s; want one ejection", stats)
	}
}

// answered is what can be compared of an answer.
type answered struct {
	status  int
	reason  string
	passed  bool
	headers string // towards the client
	body    string // of a refusal, or what the upstream saw
}

func (r *rig) mustAsk(t *testing.T, raw string) answered {
	t.Helper()
	asked, passed := r.counts()
	got, err := r.send(raw)
	if err != nil {
		t.Fatalf("%.90q: %v", raw, err)
	}
	a := answered{status: got.status, reason: r.lastReason(asked), body: got.body}
	if _, now := r.counts(); now != passed {
		a.passed = true
	}
	for _, h := range []string{"Content-Type", "Www-Authenticate", "Retry-After", "Grpc-Status", "Location", "X-Keygate-App", "X-Envoy-Auth-Headers-To-Remove"} {
		a.headers += fmt.Sprintf("%s=%q ", h, got.header.Values(h))
	}
	if got.echoed.Method != "" {
		for _, h := range []string{"X-Request-Id", "X-Envoy-Expected-Rq-Timeout-Ms", "X-Forwarded-For", "X-Envoy-External-Address"} {
			got.echoed.Headers.Del(h)
		}
		a.body = fmt.Sprint(got.echoed)
	}
	return a
}

func adminStats(t *testing.T, r *rig, filter string) string {
	t.Helper()
	resp, err := http.Get(r.envoy.AdminURL() + "/stats?filter=" + filter)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}
