package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"keygate/authz"
	"keygate/client"
)

const testToken = "canary-token"

// seen is what a server was asked.
type seen struct {
	Method, Path, Query, Body string
	Header                    http.Header
}

// fake answers every request with status and body, and notes it.
func fake(t *testing.T, status int, body string, header ...string) (*client.Client, *[]seen) {
	t.Helper()
	var all []seen
	c, err := client.New(client.Config{Organization: "acme", Token: testToken, Transport: client.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		all = append(all, seen{r.Method, r.URL.EscapedPath(), r.URL.RawQuery, string(text), r.Header})
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))})
	if err != nil {
		t.Fatal(err)
	}
	return c, &all
}

var testKey = func() authz.KeyID {
	k, _ := authz.ParseConsumerKey("canary-consumer-key")
	return k.ID()
}()

// Every method sends what the API's document says, and a consumer key stands in
// no URL.
func TestRequests(t *testing.T) {
	id := testKey.String()
	ch := client.Change{Reason: "a b", Ticket: "T-1", DryRun: true}
	for _, tt := range []struct {
		name string
		call func(ctx context.Context, c *client.Client) error
		want seen
	}{
		{"developer", func(ctx context.Context, c *client.Client) error {
			_, err := c.Developer(ctx, "a+b/c@x.example")
			return err
		},
			seen{Method: "GET", Path: "/v1/organizations/acme/developers/a+b%2Fc@x.example", Query: "reveal=false"}},
		{"create developer", func(ctx context.Context, c *client.Client) error {
			_, _, err := c.CreateDeveloper(ctx, client.Developer{Email: "a@x", FirstName: "A", LastName: "B", UserName: "ab"}, client.Change{})
			return err
		}, seen{Method: "POST", Path: "/v1/organizations/acme/developers", Body: `{"email":"a@x","firstName":"A","lastName":"B","userName":"ab"}`}},
		{"delete developer", func(ctx context.Context, c *client.Client) error {
			_, _, err := c.DeleteDeveloper(ctx, "a@x", ch)
			return err
		},
			seen{Method: "DELETE", Path: "/v1/organizations/acme/developers/a@x", Query: "dryRun=true&reason=a+b&ticket=T-1"}},
		{"app", func(ctx context.Context, c *client.Client) error { _, err := c.App(ctx, "i d"); return err },
			seen{Method: "GET", Path: "/v1/organizations/acme/apps/i%20d", Query: "reveal=false"}},
		{"developer app", func(ctx context.Context, c *client.Client) error {
			_, err := c.DeveloperApp(ctx, "a@x", "n")
			return err
		},
			seen{Method: "GET", Path: "/v1/organizations/acme/developers/a@x/apps/n", Query: "reveal=false"}},
		{"create app", func(ctx context.Context, c *client.Client) error {
			_, _, err := c.CreateApp(ctx, "a@x", client.AppSpec{Name: "n", Products: []string{"p"}, KeyExpiresIn: time.Minute}, client.Change{})
			return err
		}, seen{Method: "POST", Path: "/v1/organizations/acme/developers/a@x/apps", Body: `{"name":"n","apiProducts":["p"],"keyExpiresIn":"60000"}`}},
		{"add key", func(ctx context.Context, c *client.Client) error {
			_, _, err := c.AddKey(ctx, "a@x", "n", client.AppSpec{Products: []string{"p"}}, client.Change{})
			return err
		}, seen{Method: "POST", Path: "/v1/organizations/acme/developers/a@x/apps/n", Body: `{"apiProducts":["p"]}`}},
		{"create key", func(ctx context.Context, c *client.Client) error {
			_, _, err := c.CreateKey(ctx, "a@x", "n", client.KeySpec{Key: "k", Secret: "s", ExpiresIn: time.Hour}, client.Change{})
			return err
		}, seen{Method: "POST", Path: "/v1/organizations/acme/developers/a@x/apps/n/keys", Body: `{"consumerKey":"k","consumerSecret":"s","expiresInSeconds":"3600"}`}},
		{"add products", func(ctx context.Context, c *client.Client) error {
			_, _, err := c.AddProducts(ctx, "a@x", "n", testKey, []string{"p"}, nil, client.Change{})
			return err
		}, seen{Method: "POST", Path: "/v1/organizations/acme/developers/a@x/apps/n/keys/sha256:" + id, Body: `{"apiProducts":["p"]}`}},
		{"key", func(ctx context.Context, c *client.Client) error {
			_, err := c.Key(ctx, "a@x", "n", testKey)
			return err
		},
			seen{Method: "GET", Path: "/v1/organizations/acme/developers/a@x/apps/n/keys/sha256:" + id, Query: "reveal=false"}},
		{"delete key", func(ctx context.Context, c *client.Client) error {
			_, _, err := c.DeleteKey(ctx, "a@x", "n", testKey, client.Change{})
			return err
		},
			seen{Method: "DELETE", Path: "/v1/organizations/acme/developers/a@x/apps/n/keys/sha256:" + id}},
		{"search", func(ctx context.Context, c *client.Client) error {
			_, err := c.Search(ctx, "canary-consumer-key")
			return err
		},
			seen{Method: "POST", Path: "/v1/organizations/acme/keys:search", Query: "reveal=false", Body: `{"consumerKey":"canary-consumer-key"}`}},
		{"find", func(ctx context.Context, c *client.Client) error { _, err := c.FindKey(ctx, testKey); return err },
			seen{Method: "POST", Path: "/v1/organizations/acme/keys:search", Query: "reveal=false", Body: `{"consumerKey":"sha256:` + id + `"}`}},
		{"check", func(ctx context.Context, c *client.Client) error {
			_, err := c.Check(ctx, "canary-consumer-key", "p")
			return err
		},
			seen{Method: "POST", Path: "/v1/organizations/acme/check", Query: "reveal=false", Body: `{"consumerKey":"canary-consumer-key","product":"p"}`}},
		{"product", func(ctx context.Context, c *client.Client) error { _, err := c.Product(ctx, "p q"); return err },
			seen{Method: "GET", Path: "/v1/organizations/acme/apiproducts/p%20q", Query: "reveal=false"}},
		{"statuses", func(ctx context.Context, c *client.Client) error {
			_, err := c.SetStatuses(ctx, client.StatusChange{Action: "revoke", Targets: []client.Target{{Key: id, Product: "p"}}, Wait: true})
			return err
		}, seen{Method: "POST", Path: "/v1/organizations/acme/statuses", Query: "wait=fleet", Body: `{"action":"revoke","targets":[{"key":"` + id + `","product":"p"}]}`}},
		{"select", func(ctx context.Context, c *client.Client) error {
			_, err := c.Select(ctx, client.SelectBy{App: "a"})
			return err
		},
			seen{Method: "POST", Path: "/v1/organizations/acme/statuses:select", Query: "reveal=false", Body: `{"app":"a"}`}},
		{"create token", func(ctx context.Context, c *client.Client) error {
			_, _, _, err := c.CreateToken(ctx, client.TokenSpec{Name: "ci", Role: "viewer", Organization: "*", ExpiresIn: time.Hour}, client.Change{})
			return err
		}, seen{Method: "POST", Path: "/v1/organizations/acme/tokens", Body: `{"name":"ci","role":"viewer","organization":"*","expiresIn":"1h0m0s"}`}},
		{"revoke token", func(ctx context.Context, c *client.Client) error {
			_, _, err := c.RevokeToken(ctx, "0123abcd", client.Change{})
			return err
		},
			seen{Method: "DELETE", Path: "/v1/organizations/acme/tokens/0123abcd"}},
		{"audit", func(ctx context.Context, c *client.Client) error {
			for _, err := range c.Audit(ctx, client.AuditQuery{From: time.UnixMilli(7), Action: "revoke", Reverse: true}) {
				return err
			}
			return nil
		}, seen{Method: "GET", Path: "/v1/organizations/acme/audit", Query: "action=revoke&from=7&pageSize=500&reveal=false&reverse=true"}},
		{"keys", func(ctx context.Context, c *client.Client) error {
			for _, err := range c.Keys(ctx, client.KeyQuery{ExpiringWithin: 720 * time.Hour}) {
				return err
			}
			return nil
		}, seen{Method: "GET", Path: "/v1/organizations/acme/keys", Query: "expiringWithin=720h0m0s&pageSize=500&reveal=false"}},
	} {
		c, all := fake(t, http.StatusOK, `{}`)
		if err := tt.call(t.Context(), c); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if len(*all) != 1 {
			t.Fatalf("%s: got %d requests, want 1", tt.name, len(*all))
		}
		got := (*all)[0]
		if auth := got.Header.Get("Authorization"); auth != "Bearer "+testToken {
			t.Errorf("%s: got Authorization %q, want the token", tt.name, auth)
		}
		got.Header = nil
		if fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s: got\n%+v\nwant\n%+v", tt.name, got, tt.want)
		}
		if strings.Contains(got.Path+got.Query, "canary") {
			t.Errorf("%s: a consumer key in the URL: %s?%s", tt.name, got.Path, got.Query)
		}
	}
}

// What a change answers: the object, or on a dry run what it would do; and the
// revision.
func TestDone(t *testing.T) {
	c, all := fake(t, http.StatusCreated, `{"email":"a@x","developerId":"d1","createdAt":"1415728893126","lastModifiedAt":2,"more":1}`, "X-Keygate-Revision", "42")
	d, done, err := c.CreateDeveloper(t.Context(), client.Developer{Email: "a@x"}, client.Change{IfMatch: `"7"`})
	if err != nil || d.ID != "d1" || d.CreatedAt != 1415728893126 || d.LastModifiedAt != 2 || done.Revision != 42 || !strings.Contains(string(d.Raw), `"more":1`) {
		t.Errorf("got %+v, %+v, %v", d, done, err)
	}
	if got := (*all)[0].Header.Get("If-Match"); got != `"7"` {
		t.Errorf("got If-Match %q, want \"7\"", got)
	}
	c, _ = fake(t, http.StatusOK, `{"dryRun":true,"revision":9,"changes":[{"path":"p","before":null,"after":"x"}],"stops":[{"key":"k","appId":"a","product":"p"}]}`)
	_, done, err = c.DeleteDeveloper(t.Context(), "a@x", client.Change{DryRun: true})
	if err != nil || done.Revision != 9 || len(done.Changes) != 1 || done.Changes[0].Before != nil || *done.Changes[0].After != "x" || len(done.Stops) != 1 || done.Stops[0].App != "a" {
		t.Errorf("got %+v, %v", done, err)
	}
	c, _ = fake(t, http.StatusCreated, `{"id":"0a","name":"ci","token":"canary"}`)
	token, secret, _, err := c.CreateToken(t.Context(), client.TokenSpec{}, client.Change{})
	if err != nil || token.ID != "0a" || secret.Reveal() != "canary" || strings.Contains(fmt.Sprintf("%v %+v %#v %s", secret, secret, secret, secret), "canary") {
		t.Errorf("got %+v, %v, %v", token, secret, err)
	}
	c, _ = fake(t, http.StatusOK, `{"revision":5,"flags":[{"target":{"app":"a"},"before":"approved","changed":true}],"notFound":[{"app":"b"}],
		"receipt":{"revision":5,"replicas":{"total":2,"applied":1,"fenced":1},"notAnswered":[{"id":"R"}],"later":1}}`)
	status, err := c.SetStatuses(t.Context(), client.StatusChange{})
	if err != nil || status.Revision != 5 || !status.Flags[0].Changed || status.NotFound[0].App != "b" || status.Receipt.Replicas.Fenced != 1 ||
		status.Receipt.NotAnswered[0].ID != "R" || !strings.Contains(string(status.Receipt.Raw), `"later":1`) {
		t.Errorf("got %+v, %v", status, err)
	}
}

func TestErrors(t *testing.T) {
	const body = `{"error":{"code":404,"message":"App named x does not exist","status":"NOT_FOUND","details":[
		{"@type":"type.googleapis.com/google.rpc.PreconditionFailure","violations":[{"type":"developer.service.AppDoesNotExist"}]},
		{"@type":"type.googleapis.com/google.rpc.RequestInfo","requestId":"r1"}]}}`
	c, _ := fake(t, http.StatusNotFound, body)
	_, err := c.App(t.Context(), "x")
	var refusal *client.Error
	if !errors.As(err, &refusal) || refusal.Status != 404 || refusal.Code != "developer.service.AppDoesNotExist" || refusal.RequestID != "r1" ||
		err.Error() != "App named x does not exist" || len(refusal.Details) != 2 || errors.Is(err, authz.ErrUnavailable) {
		t.Errorf("got %+v", err)
	}
	c, _ = fake(t, http.StatusBadGateway, "<html>", "X-Request-Id", "r2")
	_, err = c.App(t.Context(), "x")
	if !errors.As(err, &refusal) || !errors.Is(err, authz.ErrUnavailable) || refusal.RequestID != "r2" || err.Error() != "the management API answered 502 Bad Gateway" {
		t.Errorf("got %v", err)
	}
	c, _ = fake(t, http.StatusOK, "<html>")
	if _, err = c.App(t.Context(), "x"); err == nil || errors.As(err, &refusal) {
		t.Errorf("got %v, want an error that the answer cannot be read", err)
	}
	c, all := fake(t, http.StatusFound, "", "Location", "http://elsewhere.example/")
	if _, err = c.App(t.Context(), "x"); !errors.As(err, &refusal) || refusal.Status != 302 || len(*all) != 1 {
		t.Errorf("got %v after %d requests, want that a redirect is not followed", err, len(*all))
	}
}

// An answer that is lost is asked for again, with the same Idempotency-Key, and
// a read too; what was refused is not.
func TestRepeats(t *testing.T) {
	var keys []string
	var calls atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		keys = append(keys, r.Header.Get("Idempotency-Key"))
		if calls.Add(1)%3 != 0 {
			panic(http.ErrAbortHandler) // the connection breaks
		}
		if _, err := io.WriteString(w, `{"email":"a@x"}`); err != nil {
			t.Error(err)
		}
	}))
	defer srv.Close()
	c, err := client.New(client.Config{Server: srv.URL, Organization: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	d, _, err := c.CreateDeveloper(t.Context(), client.Developer{Email: "a@x"}, client.Change{})
	if err != nil || d.Email != "a@x" || len(keys) != 3 || keys[0] == "" || keys[0] != keys[1] || keys[1] != keys[2] {
		t.Errorf("got %+v, %v with the keys %q, want three times one key", d, err, keys)
	}
	first := keys[0]
	if _, _, err = c.CreateDeveloper(t.Context(), client.Developer{Email: "a@x"}, client.Change{}); err != nil || keys[3] == first {
		t.Errorf("got %v and key %q, want another one than before", err, keys[3])
	}
	srv.Close()
	_, err = c.Developer(t.Context(), "a@x")
	if !errors.Is(err, authz.ErrUnavailable) || !strings.HasPrefix(err.Error(), "reach the management API at http://127.0.0.1:") || strings.Contains(err.Error(), "/v1/") {
		t.Errorf("got %v, want that it cannot be reached", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = c.Developer(ctx, "a@x"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// Both kinds of pages are followed to their end, each element once.
func TestPages(t *testing.T) {
	var names []string
	for i := range 1100 {
		names = append(names, fmt.Sprintf("d%04d@x", i))
	}
	requests := 0
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		q := r.URL.Query()
		from, member, next := 0, "developer", ""
		size := 500
		if strings.HasSuffix(r.URL.Path, "/apps") {
			member = "app"
			if token := q.Get("pageToken"); token != "" {
				from = slices.Index(names, token)
			}
			if from+size < len(names) {
				next = names[from+size]
			}
		} else if start := q.Get("startKey"); start != "" {
			from = slices.Index(names, start)
		}
		page := []map[string]string{}
		for _, n := range names[from:min(from+size, len(names))] {
			page = append(page, map[string]string{"email": n, "appId": n})
		}
		_ = json.NewEncoder(w).Encode(map[string]any{member: page, "nextPageToken": next})
	})
	c, err := client.New(client.Config{Organization: "acme", Transport: client.Handler(handler)})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for d, err := range c.Developers(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, d.Email)
	}
	if !slices.Equal(got, names) || requests != 3 {
		t.Errorf("got %d developers in %d pages, want %d in 3", len(got), requests, len(names))
	}
	got, requests = nil, 0
	for a, err := range c.Apps(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, a.ID)
	}
	if !slices.Equal(got, names) || requests != 3 {
		t.Errorf("got %d apps in %d pages, want %d in 3", len(got), requests, len(names))
	}
	requests = 0
	for range c.Apps(t.Context()) {
		break
	}
	if requests != 1 {
		t.Errorf("got %d requests for the first app, want 1", requests)
	}
}

func TestUnixSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "m.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, `{"name":%q}`, r.Host)
	}))
	_ = srv.Listener.Close()
	srv.Listener = l
	srv.Start()
	defer srv.Close()
	c, err := client.New(client.Config{Server: "unix://" + socket, Organization: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if p, err := c.Product(t.Context(), "p"); err != nil || p.Name != "localhost" {
		t.Errorf("got %+v, %v, want the answer to a request for localhost", p, err)
	}
}

func TestNew(t *testing.T) {
	for _, cfg := range []client.Config{
		{}, {Server: "http://a"}, {Organization: "acme"}, {Organization: "acme", Server: "a:1"}, {Organization: "acme", Server: "ftp://a"},
		{Organization: "acme", Server: "http://a", Token: "a\nb"},
	} {
		if _, err := client.New(cfg); err == nil {
			t.Errorf("%+v: got no error", cfg)
		}
	}
}

// A token and a key are shown by nothing that prints.
func TestSecretsArePrintedByNothing(t *testing.T) {
	cfg := client.Config{Server: "http://a", Organization: "acme", Token: testToken}
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("a client", "config", cfg, "client", c, "token", cfg.Token)
	text, err := json.Marshal(cfg.Token)
	if err != nil {
		t.Fatal(err)
	}
	all := fmt.Sprintf("%v %+v %#v %s %q %v %+v %#v", cfg, cfg, cfg, cfg.Token, cfg.Token, c, c, c) + log.String() + string(text)
	spec := client.KeySpec{Key: "canary", Secret: "canary"}
	all += fmt.Sprintf("%v %+v %#v %s", spec, spec, spec, spec)
	if strings.Contains(all, "canary") {
		t.Errorf("a secret in %s", all)
	}
}
