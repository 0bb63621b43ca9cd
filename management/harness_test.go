package management_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/access"
	"keygate/audit"
	"keygate/authz"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
	"keygate/management"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

func TestMain(m *testing.M) { etcdtest.Main(m) }

const (
	acme  authz.Organization = "acme"
	other authz.Organization = "other"
)

// The mounts, up to the organization.
const (
	mountX    = "/v1/organizations/"
	mountEdge = "/v1/o/"
	mountBase = "/edge/v1/organizations/"
)

// api is a server over a real etcd, and a client whose every answer is held
// against the document.
type api struct {
	t      *testing.T
	kv     *clientv3.Client
	space  keyspace.Space
	ledger *ledger.Ledger
	seal   *seal.Keyring
	server *management.Server
	http   *httptest.Server
	client *http.Client
	logs   *syncBuffer
	admin  string // a token
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// newAPI serves over kv; nil starts an etcd.
func newAPI(t *testing.T, kv *clientv3.Client, settings ...func(*management.Config)) *api {
	t.Helper()
	if kv == nil {
		kv = etcdtest.Start(t).Client(t)
	}
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := seal.Parse([]byte(seal.Generate("test")))
	if err != nil {
		t.Fatal(err)
	}
	a := &api{t: t, kv: kv, space: space, seal: keys, logs: &syncBuffer{}}
	log := slog.New(slog.NewJSONHandler(a.logs, nil))
	a.ledger = ledger.New(ledger.Config{Store: kv, Space: space, Seal: keys, Logger: log})
	cfg := management.Config{Ledger: a.ledger, Store: kv, Space: space, Organization: acme, Version: "test", Logger: log}
	for _, set := range settings {
		set(&cfg)
	}
	if a.server, err = management.New(cfg); err != nil {
		t.Fatal(err)
	}
	a.http = httptest.NewServer(a.server.Handler())
	t.Cleanup(a.http.Close)
	a.client = &http.Client{Transport: &validating{t: t, next: a.http.Client().Transport, doc: theDocument(t)}}
	a.admin = a.token(access.Admin, acme)
	return a
}

// token mints one, on the store.
func (a *api) token(role access.Role, org authz.Organization) string {
	a.t.Helper()
	secret, _, _, err := a.ledger.CreateToken(a.t.Context(), ledger.By{Actor: audit.Actor{Kind: audit.ActorCLI, Name: "test"}},
		access.Token{Name: role.String() + "@" + string(org), Role: role, Organization: org, ExpiresAt: access.NeverExpires})
	if err != nil {
		a.t.Fatalf("create a token: %v", err)
	}
	return secret
}

// reply is an answer with its body.
type reply struct {
	*http.Response
	body []byte
}

// option changes a request.
type option func(*http.Request)

func header(name, value string) option { return func(r *http.Request) { r.Header.Set(name, value) } }
func as(token string) option           { return header("Authorization", "Bearer "+token) }
func nobody(r *http.Request)           { r.Header.Del("Authorization") }
func host(name string) option          { return func(r *http.Request) { r.Host = name } }

// do sends a request as the admin; body is sent as it is if it is a string, else
// as JSON, nil not at all.
func (a *api) do(method, path string, body any, opts ...option) reply {
	a.t.Helper()
	r, err := a.try(a.t.Context(), method, path, body, opts...)
	if err != nil {
		a.t.Fatalf("%s %s: %v", method, path, err)
	}
	return r
}

func (a *api) try(ctx context.Context, method, path string, body any, opts ...option) (reply, error) {
	var sent io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		sent = strings.NewReader(b)
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			return reply{}, err
		}
		sent = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.http.URL+path, sent)
	if err != nil {
		return reply{}, err
	}
	req.Header.Set("Authorization", "Bearer "+a.admin)
	if sent != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, o := range opts {
		o(req)
	}
	res, err := a.client.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	return reply{res, answer}, err
}

// want sends a request and ends the test unless it is answered with status.
func (a *api) want(status int, method, path string, body any, opts ...option) reply {
	a.t.Helper()
	r := a.do(method, path, body, opts...)
	if r.StatusCode != status {
		a.t.Fatalf("%s %s: got %d %s, want %d", method, path, r.StatusCode, r.body, status)
	}
	return r
}

// into decodes the body.
func (r reply) into(t *testing.T, v any) {
	t.Helper()
	if err := json.Unmarshal(r.body, v); err != nil {
		t.Fatalf("read the answer %s: %v", r.body, err)
	}
}

// code of an error, in either rendering.
func (r reply) code() string {
	var e struct {
		Code  string
		Error struct {
			Details []struct{ Violations []struct{ Type string } }
		}
	}
	var x struct {
		Error struct {
			Details []struct{ Violations []struct{ Type string } }
		}
	}
	if json.Unmarshal(r.body, &e) == nil && e.Code != "" {
		return e.Code
	}
	if json.Unmarshal(r.body, &x) == nil && len(x.Error.Details) > 0 && len(x.Error.Details[0].Violations) > 0 {
		return x.Error.Details[0].Violations[0].Type
	}
	return ""
}

// message of an error, in either rendering.
func (r reply) message() string {
	var e struct {
		Message string
		Error   struct{ Message string }
	}
	_ = json.Unmarshal(r.body, &e)
	return e.Message + e.Error.Message
}

// member of the answer, as JSON.
func (r reply) member(name string) string {
	var o map[string]json.RawMessage
	_ = json.Unmarshal(r.body, &o)
	return string(o[name])
}

// revision that the answer says.
func (r reply) revision() string { return r.Header.Get("X-Keygate-Revision") }

// world holds the developer Ann with the app weather, whose one key has the
// product Weather-Product.
type world struct {
	app, key, secret string
	appID            string
}

// people makes a world in an organization, by the API.
func (a *api) people() world {
	a.t.Helper()
	x := mountX + string(acme)
	a.want(201, "POST", x+"/apiproducts", map[string]any{"name": "Weather-Product", "displayName": "Weather", "approvalType": "auto"})
	a.want(201, "POST", x+"/apiproducts", map[string]any{"name": "Manual", "displayName": "Manual", "approvalType": "manual"})
	a.want(201, "POST", x+"/developers", ann)
	r := a.want(201, "POST", x+"/developers/ann@example.com/apps", map[string]any{"name": "weather", "apiProducts": []string{"Weather-Product"}})
	var app struct {
		AppID       string
		Credentials []struct{ ConsumerKey, ConsumerSecret string }
	}
	r.into(a.t, &app)
	if len(app.Credentials) != 1 || app.Credentials[0].ConsumerKey == "" || app.Credentials[0].ConsumerSecret == "" {
		a.t.Fatalf("got %s, want an app with one key and its secret", r.body)
	}
	return world{x + "/developers/ann@example.com/apps/weather", app.Credentials[0].ConsumerKey, app.Credentials[0].ConsumerSecret, app.AppID}
}

var ann = map[string]any{"email": "ann@example.com", "firstName": "Ann", "lastName": "Field", "userName": "ann"}

// dump is everything that etcd holds.
func (a *api) dump() string {
	a.t.Helper()
	resp, err := a.kv.Get(a.t.Context(), "\x00", clientv3.WithFromKey())
	if err != nil {
		a.t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range resp.Kvs {
		b.WriteString(string(e.Key) + " = " + string(e.Value) + "\n")
	}
	return b.String()
}

// records of the audit trail of acme.
func (a *api) records() (all []audit.Record) {
	a.t.Helper()
	resp, err := a.kv.Get(a.t.Context(), a.space.Audit(acme), clientv3.WithPrefix())
	if err != nil {
		a.t.Fatal(err)
	}
	for _, e := range resp.Kvs {
		r, err := audit.Parse(e.Value)
		if err != nil {
			a.t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

var theDocument = func() func(t *testing.T) *openapi3.T {
	var once sync.Once
	var doc *openapi3.T
	var failed error
	return func(t *testing.T) *openapi3.T {
		t.Helper()
		once.Do(func() {
			if doc, failed = openapi3.NewLoader().LoadFromFile("openapi.yaml"); failed == nil {
				failed = doc.Validate(context.Background())
			}
		})
		if failed != nil {
			t.Fatalf("openapi.yaml: %v", failed)
		}
		return doc
	}
}()

// validating holds every request that was taken, and every answer, against the
// document.
type validating struct {
	t    *testing.T
	next http.RoundTripper
	doc  *openapi3.T
}

func (v *validating) RoundTrip(r *http.Request) (*http.Response, error) {
	var sent []byte
	if r.Body != nil {
		sent, _ = io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(sent))
	}
	res, err := v.next.RoundTrip(r)
	if err != nil {
		return res, err
	}
	body, err := io.ReadAll(res.Body)
	res.Body.Close()
	res.Body = io.NopCloser(bytes.NewReader(body))
	if err != nil {
		return res, err
	}
	v.check(r, sent, res, body)
	return res, nil
}

func (v *validating) check(r *http.Request, sent []byte, res *http.Response, body []byte) {
	v.t.Helper()
	for name, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"} {
		if got := res.Header.Get(name); got != want {
			v.t.Errorf("%s %s: %s is %q, want %q", r.Method, r.URL.Path, name, got, want)
		}
	}
	if res.Header.Get("X-Request-Id") == "" || res.Header.Get("Content-Security-Policy") == "" {
		v.t.Errorf("%s %s: X-Request-Id or Content-Security-Policy is missing", r.Method, r.URL.Path)
	}
	if r.Method == http.MethodHead { // as GET, without the body that the document wants
		return
	}
	route, params := v.find(r)
	if route == nil {
		if res.StatusCode < 300 && !slices.Contains([]string{"/openapi.json", "/openapi.yaml", "/docs"}, r.URL.Path) {
			v.t.Errorf("%s %s: answered %d, and is not in the document", r.Method, r.URL.Path, res.StatusCode)
		}
		return
	}
	request := r.Clone(context.Background())
	request.Body = io.NopCloser(bytes.NewReader(sent))
	input := &openapi3filter.RequestValidationInput{
		Request: request, PathParams: params, Route: route,
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true, SkipSettingDefaults: true},
	}
	if res.StatusCode < 300 {
		if err := openapi3filter.ValidateRequest(context.Background(), input); err != nil {
			v.t.Errorf("%s %s: answered %d, but the document forbids the request: %v", r.Method, r.URL.Path, res.StatusCode, err)
		}
	}
	err := openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: input, Status: res.StatusCode, Header: res.Header, Options: input.Options,
		Body: io.NopCloser(bytes.NewReader(body)),
	})
	if err != nil {
		v.t.Errorf("%s %s: the document forbids the answer %d %.2000s: %v", r.Method, r.URL.Path, res.StatusCode, body, err)
	}
}

// find the operation that a request is. A literal segment counts before a
// parameter.
func (v *validating) find(r *http.Request) (*routers.Route, map[string]string) {
	rest, ok := "", false
	for _, m := range []string{mountBase, mountX, mountEdge} {
		if rest, ok = strings.CutPrefix(r.URL.EscapedPath(), m); ok {
			break
		}
	}
	if !ok {
		return nil, nil
	}
	_, rest, _ = strings.Cut(rest, "/")
	path := strings.Split("/"+rest, "/")
	for i := range path {
		path[i], _ = url.PathUnescape(path[i])
	}
	var best *routers.Route
	var params map[string]string
	for name, item := range v.doc.Paths.Map() {
		pattern := strings.Split(name, "/")
		if len(pattern) != len(path) {
			continue
		}
		these := map[string]string{}
		fits := true
		for i, p := range pattern {
			if strings.HasPrefix(p, "{") {
				these[strings.Trim(p, "{}")] = path[i]
			} else if p != path[i] {
				fits = false
			}
		}
		op := item.GetOperation(r.Method)
		if fits && op != nil && (best == nil || len(these) < len(params)) {
			best, params = &routers.Route{Spec: v.doc, Path: name, PathItem: item, Method: r.Method, Operation: op}, these
		}
	}
	return best, params
}

// patience for what happens beside a request.
const patience = 30 * time.Second
