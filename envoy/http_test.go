package envoy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"keygate/authz"
)

// MustServeHTTP serves the HTTP door of a service and returns its address.
func MustServeHTTP(t *testing.T, s *Service, ready func() error) string {
	t.Helper()
	server, err := s.HTTPServer(ready)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
	return l.Addr().String()
}

// asked is what the door answers to a request for target, as Envoy sends it.
func asked(s *Service, method, target string, keys ...string) *http.Response {
	r := httptest.NewRequest(method, "http://api.example.com/", nil)
	r.RequestURI = target
	r.Header = http.Header{}
	for _, k := range keys {
		r.Header.Add(s.config.KeyHeader, k)
	}
	w := httptest.NewRecorder()
	newHTTPDoor(s, nil).ServeHTTP(w, r)
	return w.Result()
}

const weatherPath = "/v1/check/product/Weather-Product"

// Every reason has the same status, headers and body at both doors, and an allow
// sets and removes the same.
func TestHTTPAnswersAsGRPC(t *testing.T) {
	for folder, edit := range map[string]func(*Config){"apigee": nil, "uniform": func(c *Config) { c.DenialBody = DenialUniform }} {
		var made recorder
		s := MustService(t, func(c *Config) {
			c.OnDecision = made.observe
			if edit != nil {
				edit(c)
			}
		})
		seen := map[authz.Reason]bool{}
		for _, test := range []struct {
			path     string
			products []authz.ProductName
			keys     []string
		}{
			{weatherPath, []authz.ProductName{weather}, nil},
			{weatherPath, []authz.ProductName{weather}, []string{""}},
			{weatherPath, []authz.ProductName{weather}, []string{"a,b"}},
			{weatherPath, []authz.ProductName{weather}, []string{approvedKey, approvedKey}},
			{weatherPath, []authz.ProductName{weather}, []string{"no-such-key-0000000001"}},
			{httpPath("", []string{orders}), []authz.ProductName{orders}, []string{approvedKey}},
			{httpPath("", []string{maps}), []authz.ProductName{maps}, []string{approvedKey}},
			{httpPath("", []string{other}), []authz.ProductName{other}, []string{approvedKey}},
			{httpPath("", []string{orders, weather}), []authz.ProductName{orders, weather}, []string{approvedKey}},
			{httpPath(worldOrg, []string{weather}), []authz.ProductName{weather}, []string{approvedKey}},
			{httpNoProduct, nil, []string{approvedKey}},
		} {
			compareDoors(t, folder, s, &made, seen, test.path, test.products, test.keys)
		}
		for _, key := range worldKeys {
			compareDoors(t, folder, s, &made, seen, weatherPath, []authz.ProductName{weather}, []string{key})
		}
		for r := range authz.NumReasons {
			if !seen[r] {
				t.Errorf("%s: nothing ended in %v", folder, r)
			}
		}
	}
}

func compareDoors(t *testing.T, folder string, s *Service, made *recorder, seen map[authz.Reason]bool, path string, products []authz.ProductName, keys []string) {
	t.Helper()
	req := request(keys...)
	req.Attributes.RouteMetadataContext = nil
	if products != nil {
		list := make([]any, len(products))
		for i, p := range products {
			list[i] = string(p)
		}
		req.Attributes.RouteMetadataContext = routeMetadata(map[string]any{"product": list})
	}
	want, err := s.Check(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	got := asked(s, http.MethodGet, path, keys...)
	last := made.decisions[len(made.decisions)-2:]
	if last[0].Reason != last[1].Reason || last[0].Problem != last[1].Problem && path != httpNoProduct {
		t.Errorf("%s: %s with %q: gRPC decided %v (%s), HTTP %v (%s)", folder, path, keys, last[0].Reason, last[0].Problem, last[1].Reason, last[1].Problem)
	}
	seen[last[1].Reason] = true
	body, _ := io.ReadAll(got.Body)
	if ok := want.GetOkResponse(); ok != nil {
		set := map[string]string{}
		for _, h := range ok.GetHeaders() {
			set[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
		}
		for _, h := range identityHeaders {
			if v := got.Header.Values(h.name); len(v) > 1 || got.Header.Get(h.name) != set[h.name] || len(v) == 1 && v[0] == "" {
				t.Errorf("%s: %s of an allow: got %q, want %q", folder, h.name, v, set[h.name])
			}
		}
		if remove := strings.Split(got.Header.Get(httpRemoveHeader), ","); !slices.Equal(remove, ok.GetHeadersToRemove()) {
			t.Errorf("%s: an allow removes %q, want %q", folder, remove, ok.GetHeadersToRemove())
		}
		if got.StatusCode != 200 || len(body) != 0 {
			t.Errorf("%s: an allow is %d with body %q, want 200 without", folder, got.StatusCode, body)
		}
		return
	}
	denied := want.GetDeniedResponse()
	if got.StatusCode != int(denied.GetStatus().GetCode()) || string(body) != denied.GetBody() {
		t.Errorf("%s: %v: got %d %s, want %d %s", folder, last[1].Reason, got.StatusCode, body, denied.GetStatus().GetCode(), denied.GetBody())
	}
	got.Header.Del("Content-Length")
	if _, ok := got.Header["Date"]; ok {
		got.Header.Del("Date")
	}
	if len(got.Header) != len(denied.GetHeaders()) {
		t.Errorf("%s: %v: headers %v, want those of %v", folder, last[1].Reason, got.Header, denied.GetHeaders())
	}
	for _, h := range denied.GetHeaders() {
		if v := got.Header.Get(h.GetHeader().GetKey()); v != h.GetHeader().GetValue() {
			t.Errorf("%s: %v: %s: got %q, want %q", folder, last[1].Reason, h.GetHeader().GetKey(), v, h.GetHeader().GetValue())
		}
	}
}

// One spelling of a path opens, and no other.
func TestHTTPPath(t *testing.T) {
	s := MustService(t, nil)
	strange := []string{"a/b", "..", ".", "ü", "50%", "a b", "a\nb", "a?b#c", ";", "\xff", "product", "organization", "+&=:@$", "a,b", strings.Repeat("p", maxName)}
	for _, p := range strange {
		for _, org := range []string{"", "acme", "product", "o/ü"} {
			gotOrg, got, err := parseHTTPPath(httpPath(org, []string{p, "Other"}))
			if err != nil || gotOrg != org || !slices.Equal(got, []authz.ProductName{authz.ProductName(p), "Other"}) {
				t.Errorf("%q of %q: got %q of %q, %v", p, org, got, gotOrg, err)
			}
		}
	}
	if got := asked(s, http.MethodGet, weatherPath, approvedKey); got.StatusCode != 200 {
		t.Fatalf("the path itself: got %d, want 200", got.StatusCode)
	}
	for _, target := range []string{
		"", "/", "*", httpNoProduct, httpNoProduct + "/", "/v1/check/product", httpProduct, "/v1/check/product//", weatherPath + "/", "/" + weatherPath, "//v1/check/product/Weather-Product",
		weatherPath + "?", weatherPath + "?a=b", weatherPath + "#", weatherPath + ";a", weatherPath + "%00", weatherPath + " ", weatherPath + "%20",
		"/v1/check/product/%57eather-Product", "/v1/check/product/Weather%2DProduct", "/v1/check/product/Weather%2dProduct", "/v1/check/product/weather-product",
		"/v1/check/product/x%2fy", "/v1/check/product/Weather-Product%", "/v1/check/product/Weather-Product%zz", "/v1/check/product/ü",
		"/v1/check//product/Weather-Product", "/v1/check/./product/Weather-Product", "/v1/check/x/../product/Weather-Product", "/v1/check/product/x/../Weather-Product",
		"/v1/check/%70roduct/Weather-Product", "/V1/check/product/Weather-Product", "/v1/check/products/Weather-Product", "v1/check/product/Weather-Product",
		"http://keygate/v1/check/product/Weather-Product", "keygate/v1/check/product/Weather-Product",
		"/v1/check/organization/default", "/v1/check/organization/default/product", "/v1/check/organization/default/product/", "/v1/check/organization//product/Weather-Product",
		"/v1/check/organization/default/products/Weather-Product", "/v1/check/organization/%64efault/product/Weather-Product", "/v1/check/organization/.default/product/Weather-Product",
		"/v1/check/organization/default/x/product/Weather-Product", "/v1/check/organization/other/product/Weather-Product",
		"/v1/check/product/Weather-Product/organization/default", // no such product as organization, but all are products
		httpProduct + strings.Repeat("p", maxName+1), httpProduct + strings.Repeat("Weather-Product/", maxProducts) + "Weather-Product",
		HTTPHealthPath + "/", HTTPHealthPath + "?", "/v1/healthy",
	} {
		got := asked(s, http.MethodGet, target, approvedKey)
		want := []int{403}
		switch {
		case target == "/v1/check/product/Weather-Product/organization/default":
			want = []int{200} // any one of three products
		case strings.Contains(target, "/../") && strings.HasPrefix(target, httpProduct):
			want = []int{200} // products named x, .. and Weather-Product: the dots mean nothing
		case strings.HasPrefix(target, "/v1/check/organization/other/"), target == "/v1/check/product/weather-product":
			want = []int{401} // another organization, another product
		case strings.HasSuffix(target, "%00"), strings.HasSuffix(target, "%20"):
			want = []int{401} // the right spelling of another product
		}
		if !slices.Contains(want, got.StatusCode) {
			t.Errorf("%q: got %d, want %v", target, got.StatusCode, want)
		}
	}
	for _, method := range []string{"GET", "HEAD", "POST", "OPTIONS", "TRACE", "BREW", "PRI"} {
		if got := asked(s, method, weatherPath, approvedKey); got.StatusCode != 200 {
			t.Errorf("%s: got %d, want 200", method, got.StatusCode)
		}
	}
	if got := asked(s, http.MethodConnect, weatherPath, approvedKey); got.StatusCode != 403 {
		t.Errorf("CONNECT: got %d, want 403", got.StatusCode)
	}
}

// A service without an organization of its own needs one in the path.
func TestHTTPOrganization(t *testing.T) {
	s := MustService(t, func(c *Config) { c.Organization = "" })
	if got := asked(s, http.MethodGet, weatherPath, approvedKey); got.StatusCode != 403 {
		t.Errorf("without an organization: got %d, want 403", got.StatusCode)
	}
	if got := asked(s, http.MethodGet, httpPath(worldOrg, []string{weather}), approvedKey); got.StatusCode != 200 {
		t.Errorf("with the organization: got %d, want 200", got.StatusCode)
	}
}

// The health path is never an allow: ext_authz takes 204 for a refusal.
func TestHTTPHealth(t *testing.T) {
	s := MustService(t, nil)
	for err, want := range map[error]int{nil: 204, errors.New("stale"): 503} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, HTTPHealthPath, nil)
		r.Header.Set("x-api-key", approvedKey)
		newHTTPDoor(s, func() error { return err }).ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("ready with %v: got %d, want %d", err, w.Code, want)
		}
	}
}

// deciders for what no real Authorizer does.
type decider func(context.Context, authz.Request) authz.Decision

func (d decider) Decide(ctx context.Context, r authz.Request) authz.Decision { return d(ctx, r) }

// Whatever goes wrong is a refusal, and nothing of the key is told.
func TestHTTPUnexpected(t *testing.T) {
	allowed := func(r authz.Request) authz.Decision {
		return authz.Decision{Reason: authz.Allowed, KeyID: r.KeyID, Organization: r.Organization, Product: r.Products[0]}
	}
	for name, edit := range map[string]func(*Config){
		"panic": func(c *Config) {
			c.Authorizer = decider(func(context.Context, authz.Request) authz.Decision { panic(approvedKey) })
		},
		"panic of the observer": func(c *Config) { c.OnDecision = func(authz.Decision, time.Duration) { panic(approvedKey) } },
		"the zero Decision": func(c *Config) {
			c.Authorizer = decider(func(context.Context, authz.Request) authz.Decision { return authz.Decision{} })
		},
		"no product": func(c *Config) {
			c.Authorizer = decider(func(_ context.Context, r authz.Request) authz.Decision { d := allowed(r); d.Product = ""; return d })
		},
		"no key": func(c *Config) {
			c.Authorizer = decider(func(_ context.Context, r authz.Request) authz.Decision {
				d := allowed(r)
				d.KeyID = authz.KeyID{}
				return d
			})
		},
		"no organization": func(c *Config) {
			c.Authorizer = decider(func(_ context.Context, r authz.Request) authz.Decision {
				d := allowed(r)
				d.Organization = ""
				return d
			})
		},
		"a reason out of bounds": func(c *Config) {
			c.Authorizer = decider(func(_ context.Context, r authz.Request) authz.Decision {
				d := allowed(r)
				d.Reason = authz.NumReasons
				return d
			})
		},
	} {
		var log bytes.Buffer
		s := MustService(t, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)); edit(c) })
		got := asked(s, http.MethodGet, weatherPath, approvedKey)
		body, _ := io.ReadAll(got.Body)
		if got.StatusCode != 500 || got.Header.Get("X-Keygate-Product") != "" || got.Header.Get(httpRemoveHeader) != "" {
			t.Errorf("%s: got %d %v, want 500", name, got.StatusCode, got.Header)
		}
		if k := holdsKey(log.String() + string(body)); k != "" {
			t.Errorf("%s: the log or the body holds the key", name)
		}
	}
}

// Envoy's timeout is the deadline of the work, and a client that has gone is not
// worked for.
func TestHTTPDeadline(t *testing.T) {
	var deadline time.Duration
	calls := 0
	s := MustService(t, func(c *Config) {
		c.Authorizer = decider(func(ctx context.Context, r authz.Request) authz.Decision {
			calls++
			deadline = 0
			if at, ok := ctx.Deadline(); ok {
				deadline = time.Until(at)
			}
			return authz.Refuse(r, authz.Stale)
		})
	})
	for _, test := range []struct {
		values []string
		want   time.Duration
	}{
		{nil, 0}, {[]string{"250"}, 250 * time.Millisecond}, {[]string{"250", "1"}, 0}, {[]string{"-1"}, 0}, {[]string{"x"}, 0}, {[]string{"0"}, 0},
		{[]string{"2000000000"}, maxHTTPTimeout},
	} {
		r := httptest.NewRequest(http.MethodGet, weatherPath, nil)
		r.Header["X-Api-Key"] = []string{approvedKey}
		r.Header[httpTimeoutHeader] = test.values
		newHTTPDoor(s, nil).ServeHTTP(httptest.NewRecorder(), r)
		if deadline > test.want || deadline < test.want-time.Second && test.want > 0 {
			t.Errorf("%q: a deadline in %v, want %v", test.values, deadline, test.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	before := calls
	w := httptest.NewRecorder()
	newHTTPDoor(s, nil).ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, weatherPath, nil))
	if calls != before || w.Code != 503 {
		t.Errorf("a client that has gone: got %d after %d calls, want 503 and none", w.Code, calls-before)
	}
}

func TestHTTPAndQuery(t *testing.T) {
	s := MustService(t, func(c *Config) { c.KeyQuery = "apikey" })
	if _, err := s.HTTPServer(nil); err == nil {
		t.Error("a door that cannot see the key's query parameter was made")
	}
}

// What net/http answers by itself, before the handler, is no 2xx either.
func TestHTTPRaw(t *testing.T) {
	address := MustServeHTTP(t, MustService(t, nil), nil)
	const key = "\r\nHost: a\r\nConnection: close\r\nX-Api-Key: " + approvedKey + "\r\n\r\n"
	for raw, want := range map[string]int{
		"GET " + weatherPath + " HTTP/1.1" + key:                                           200,
		"OPTIONS " + weatherPath + " HTTP/1.1" + key:                                       200,
		"OPTIONS * HTTP/1.1" + key:                                                         403,
		"CONNECT a:443 HTTP/1.1" + key:                                                     403,
		"CONNECT " + weatherPath + " HTTP/1.1" + key:                                       403,
		"GET http://a" + weatherPath + " HTTP/1.1" + key:                                   403,
		"GET /v1/check//product/Weather-Product HTTP/1.1" + key:                            403,
		"GET /v1/check/../check/product/x HTTP/1.1" + key:                                  403,
		"GET " + weatherPath + "/ HTTP/1.1" + key:                                          403,
		"GET /%zz HTTP/1.1" + key:                                                          400,
		"GET " + weatherPath + " HTTP/1.1\r\nX-Api-Key: a\x01b" + key:                      400,
		"GET " + weatherPath + " HTTP/1.1\r\nX-Api-Key: " + approvedKey + key:              401,
		"GET " + weatherPath + " HTTP/1.1\r\nx-much: " + strings.Repeat("m", 80<<10) + key: 431,
		"GET " + weatherPath + " HTTP/1.1\r\nx-api-key: " + strings.Repeat("m", 60_000) + "\r\nHost: a\r\nConnection: close\r\n\r\n": 401,
	} {
		conn, err := net.DialTimeout("tcp", address, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(conn, raw) // refused before all is read, perhaps
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%.60q: %v", raw, err)
		} else if resp.StatusCode != want {
			t.Errorf("%.60q: got %d, want %d", raw, resp.StatusCode, want)
		}
		_ = conn.Close()
	}
}

// HTTP/2 without TLS reaches the same handler.
func TestHTTP2(t *testing.T) {
	address := MustServeHTTP(t, MustService(t, nil), nil)
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	for path, want := range map[string]int{weatherPath: 200, httpNoProduct: 403, HTTPHealthPath: 204} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("x-api-key", approvedKey)
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want || resp.ProtoMajor != 2 {
			t.Errorf("%s: got %s over %s, want %d over HTTP/2", path, resp.Status, resp.Proto, want)
		}
	}
}

// No path allows unless it is, byte for byte, the one that its products make,
// and the approved product is among them.
func FuzzHTTPPath(f *testing.F) {
	for _, seed := range []string{weatherPath, httpNoProduct, httpProduct + "a%2Fb/..", httpOrganization + "default/product/Weather-Product",
		weatherPath + "?a", "/v1/check/product/%57eather-Product", "*", "//", HTTPHealthPath} {
		f.Add(seed)
	}
	s, err := New(Config{Authorizer: &authz.Authorizer{Source: newWorld()}, Organization: worldOrg})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, target string) {
		org, products, err := parseHTTPPath(target)
		var names []string
		for _, p := range products {
			names = append(names, string(p))
		}
		if err == nil && httpPath(org, names) != target {
			t.Fatalf("%q was taken for %q of %q, whose path is %q", target, names, org, httpPath(org, names))
		}
		status := asked(s, http.MethodGet, target, approvedKey).StatusCode
		if status/100 == 2 && target != HTTPHealthPath && (err != nil || !slices.Contains(names, weather) || org != "" && org != worldOrg) {
			t.Fatalf("%q: got %d for %q of %q, %v", target, status, names, org, err)
		}
		if status == 200 && target == HTTPHealthPath {
			t.Fatal("200 for health")
		}
	})
}
