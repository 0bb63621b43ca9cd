package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"keygate/authz"
	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/envoy/proxy/proxytest"
)

const (
	goodKey  = "consumer-key-that-is-approved"
	bareKey  = "consumer-key-without-scopes00"
	staleKey = "consumer-key-with-no-answer00"
)

type valid struct{}

func (valid) Valid() bool { return true }

// source knows goodKey and bareKey in organizations default and acme: approved
// for Weather-Product, revoked for Orders-Product.
type source struct{}

func (source) Records(_ context.Context, org authz.Organization, id authz.KeyID) (authz.Records, error) {
	r := authz.Records{Revision: 1, Proof: valid{}}
	approved := authz.Flag{Status: authz.StatusApproved}
	switch id {
	case keyID(staleKey):
		return r, authz.ErrUnavailable
	case keyID(goodKey), keyID(bareKey):
	default:
		return r, nil
	}
	if org != "default" && org != "acme" {
		return r, nil
	}
	r.App = authz.App{Exists: true, Status: approved, Developer: "dev-1"}
	r.Developer = authz.Developer{Exists: true, Status: authz.Flag{Status: authz.StatusActive}}
	r.Credential = authz.Credential{Exists: true,
		Status: approved, App: "app-1", Developer: "dev-1", ExpiresAt: authz.NeverExpires,
		Products: map[authz.ProductName]authz.Flag{"Weather-Product": approved, "Orders-Product": {Status: authz.StatusRevoked}},
	}
	if id == keyID(goodKey) {
		r.Credential.Scopes = "read write"
	}
	return r, nil
}

func keyID(key string) authz.KeyID {
	k, _ := authz.ParseConsumerKey(key)
	return k.ID()
}

// rig is a client's view of Envoy, with keygate and an upstream behind it.
type rig struct {
	envoy     *proxy.Proxy
	keygate   *grpc.Server
	accessLog lockedBuffer

	mu        sync.Mutex
	decisions []authz.Decision
	upstream  int // requests that got through
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// MustRig starts all three; edit may change either side's settings.
func MustRig(t *testing.T, edit func(*envoy.Config, *envoy.Bootstrap)) *rig {
	t.Helper()
	r := &rig{}
	config := envoy.Config{
		Authorizer:   &authz.Authorizer{Source: source{}},
		Organization: "default",
		OnDecision: func(d authz.Decision, _ time.Duration) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.decisions = append(r.decisions, d)
		},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	echo := proxy.Echo()
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.upstream++
		r.mu.Unlock()
		echo.ServeHTTP(w, req)
	}))
	t.Cleanup(upstream.Close)
	b := envoy.Bootstrap{
		Listen: "127.0.0.1:0", Authz: []string{l.Addr().String()}, Upstream: upstream.Listener.Addr().String(),
		Routes: envoy.QuickstartRoutes(), AccessLog: true,
	}
	if edit != nil {
		edit(&config, &b)
	}
	service, err := envoy.New(config)
	if err != nil {
		t.Fatal(err)
	}
	r.keygate = grpc.NewServer(envoy.ServerOptions(nil)...)
	service.Register(r.keygate)
	healthpb.RegisterHealthServer(r.keygate, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- r.keygate.Serve(l) }()
	t.Cleanup(func() {
		r.keygate.Stop()
		if err := <-served; err != nil {
			t.Errorf("serve checks: %v", err)
		}
	})
	r.envoy, err = proxy.Start(t.Context(), proxy.Config{
		Binary: proxytest.Binary(t), Bootstrap: b, Concurrency: 1, AccessLog: &r.accessLog,
	})
	if err != nil {
		t.Fatalf("start Envoy: %v", err)
	}
	t.Cleanup(r.envoy.Stop)
	return r
}

// counts are the decisions made and the requests that reached the upstream.
func (r *rig) counts() (decisions, upstream int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.decisions), r.upstream
}

// lastReason is the word of the decision after the first n; "not asked" if
// there is none.
func (r *rig) lastReason(n int) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch len(r.decisions) - n {
	case 0:
		return "not asked"
	case 1:
		return r.decisions[n].Reason.String()
	}
	return fmt.Sprintf("%d decisions", len(r.decisions)-n)
}

// reply is what the client got.
type reply struct {
	status int
	header http.Header
	body   string
	echoed proxy.Echoed // of a 200
}

// send writes raw bytes, which Go's client would tidy, and reads one reply.
func (r *rig) send(raw string) (reply, error) {
	conn, err := net.DialTimeout("tcp", r.envoy.Address(), 5*time.Second)
	if err != nil {
		return reply{}, err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return reply{}, err
	}
	// A refusal may come, and the connection close, before all is written.
	_, writeErr := conn.Write([]byte(raw))
	method, _, _ := strings.Cut(raw, " ")
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return reply{}, errors.Join(writeErr, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return reply{}, err
	}
	out := reply{status: resp.StatusCode, header: resp.Header, body: string(body)}
	if resp.StatusCode == http.StatusOK && strings.HasPrefix(string(body), "{") {
		if err := json.Unmarshal(body, &out.echoed); err != nil {
			return reply{}, fmt.Errorf("the upstream answered %s: %w", body, err)
		}
	}
	return out, nil
}

// raw builds a request of its first line and headers.
func raw(line string, headers ...string) string {
	return line + "\r\nHost: api.example.com\r\nConnection: close\r\n" + strings.Join(append(headers, ""), "\r\n") + "\r\n"
}
