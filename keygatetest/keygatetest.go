// Package keygatetest runs the whole service in a test: a real server over a
// real etcd, behind a real Envoy where that is asked for.
//
//	k := keygatetest.Start(t, keygatetest.Options{Envoy: true})
//	k.ImportQuickstart(t)
//	got := k.Get(t, "/weather", "x-api-key: "+quickstart.OrdersKey)
//
// All of it ends with the test that started it.
package keygatetest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"keygate/authz"
	"keygate/config"
	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/envoy/proxy/proxytest"
	"keygate/keygatetest/etcdtest"
	"keygate/seal"
	"keygate/server"
	"keygate/statestore"
	"keygate/statestore/embedded"
	"keygate/statestore/keyspace"
)

// Patience bounds every wait for something that should be there at once, on a
// machine that is busy with other tests.
const Patience = 30 * time.Second

// Options of Start. The zero value is a replica with the default settings on
// ports of the system's choice, over a new etcd in the test's process.
type Options struct {
	// Etcd to read; without endpoints a new one is started in this process.
	Etcd statestore.EtcdConfig
	// Writer is the client that the helpers write with; nil means a new client
	// of Etcd.
	Writer *clientv3.Client
	// Child makes the server supervise an etcd of its own: this test binary, so
	// its TestMain must call [Reexec]. Etcd is then not looked at.
	Child bool
	// DataDir of the child; empty means a new one.
	DataDir string
	// Settings may change the settings before they are used.
	Settings func(*config.Config)
	// Envoy starts one in front, with the routes of the quickstart, and an
	// upstream that echoes.
	Envoy bool
	// Bootstrap may change Envoy's configuration before it is used.
	Bootstrap func(*envoy.Bootstrap)
	// Manage and Seal as in server.Config. The API is then at
	// Server.ManagementAddr, and with a Child the admin token in its DataDir.
	Manage bool
	Seal   *seal.Keyring
	// Drain as in server.Config, but zero means none.
	Drain time.Duration
	// Now, OnDecision and OnChange as in server.Config.
	Now        func() time.Time
	OnDecision func(authz.Decision, time.Duration)
	OnChange   func(statestore.Change)
	// Unready returns from Start without waiting for the first proof.
	Unready bool
}

// Keygate is one replica and what stands around it. Its methods are safe for
// concurrent use and end the test they are given on an error.
type Keygate struct {
	// Server that runs.
	Server *server.Server
	// Settings that it runs with; not to be changed.
	Settings *config.Config
	// Child is the server's own etcd; nil without Options.Child.
	Child *embedded.Child
	// Writer is a client of the same etcd, with the right to write.
	Writer *clientv3.Client
	// Envoy in front; nil without Options.Envoy.
	Envoy *proxy.Proxy

	log, accessLog buffer
	http           *http.Client
	passed         atomic.Int64
	stop           context.CancelFunc
	done           chan struct{} // closed after err is set
	err            error
	told           atomic.Bool // err has been reported, or handed out
}

// Settings returns the defaults of keygate serve, with ports of the system's
// choice.
func Settings() *config.Config {
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		panic(err) // the default is valid
	}
	loopback := config.Address{Network: "tcp", Address: "127.0.0.1:0"}
	return &config.Config{
		Space: space, Organization: "default", AuthzListen: loopback, HealthListen: loopback, ManagementListen: loopback,
		KeyHeader: envoy.DefaultKeyHeader, DenialBody: envoy.DenialApigee, LogDecisions: "none",
		StalenessBudget: statestore.DefaultStalenessBudget, Register: true, LogFormat: "text",
	}
}

// Start runs a replica until the test ends, and returns when it is ready.
func Start(t testing.TB, o Options) *Keygate {
	t.Helper()
	k := &Keygate{Settings: Settings(), Writer: o.Writer, done: make(chan struct{})}
	logger := slog.New(slog.NewTextHandler(&k.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if o.Child {
		if o.DataDir == "" {
			o.DataDir = etcdtest.DataDir(t)
		}
		k.Child = newChild(t, o.DataDir, logger)
		o.Etcd = statestore.EtcdConfig{Endpoints: []string{k.Child.Endpoint()}}
		k.Settings.DataDir = o.DataDir
	}
	if len(o.Etcd.Endpoints) == 0 {
		o.Etcd.Endpoints = []string{etcdtest.Start(t).Endpoint()}
	}
	if o.Settings != nil {
		o.Settings(k.Settings)
	}
	if o.Drain == 0 {
		o.Drain = -1
	}
	s, err := server.New(server.Config{
		Settings: k.Settings, Etcd: o.Etcd, Child: k.Child, Version: "test", Drain: o.Drain, Now: o.Now,
		Manage: o.Manage, Seal: o.Seal,
		OnDecision: o.OnDecision, OnChange: o.OnChange, Logger: logger,
	})
	if err != nil {
		t.Fatalf("make the server: %v", err)
	}
	k.Server = s
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	k.http = &http.Client{Transport: transport, Timeout: 10 * time.Second}
	t.Cleanup(transport.CloseIdleConnections)

	// Not the test's context: that ends before its cleanups run.
	ctx, cancel := context.WithCancel(context.Background())
	k.stop = cancel
	go func() {
		defer close(k.done)
		k.err = s.Run(ctx)
	}()
	t.Cleanup(func() {
		k.Stop(t)
		if t.Failed() {
			t.Logf("the server's log:\n%s", tail(k.Log(), 6000))
		}
	})
	if !o.Unready {
		k.WaitReady(t)
	}
	if k.Writer == nil {
		if k.Writer, err = o.Etcd.Dial(); err != nil {
			t.Fatalf("client of the server's etcd: %v", err)
		}
		t.Cleanup(func() { _ = k.Writer.Close() })
	}
	if o.Envoy {
		k.startEnvoy(t, o)
	}
	return k
}

func (k *Keygate) startEnvoy(t testing.TB, o Options) {
	t.Helper()
	echo := proxy.Echo()
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.passed.Add(1)
		echo.ServeHTTP(w, r)
	}))
	t.Cleanup(upstream.Close)
	b := envoy.Bootstrap{
		Listen: "127.0.0.1:0", Authz: []string{k.Server.AuthzAddr()}, Upstream: upstream.Listener.Addr().String(),
		KeyHeader: k.Settings.KeyHeader, Routes: envoy.QuickstartRoutes(), AccessLog: true,
	}
	if o.Bootstrap != nil {
		o.Bootstrap(&b)
	}
	var err error
	k.Envoy, err = proxy.Start(t.Context(), proxy.Config{
		Binary: proxytest.Binary(t), Bootstrap: b, Concurrency: 1, AccessLog: &k.accessLog,
	})
	if err != nil {
		t.Fatalf("start Envoy: %v", err)
	}
	t.Cleanup(k.Envoy.Stop)
}

// Stop ends the server as SIGTERM would, and returns when it has ended.
// Stopping twice is fine.
func (k *Keygate) Stop(t testing.TB) {
	t.Helper()
	k.stop()
	select {
	case <-k.done:
		if k.err != nil && !k.told.Swap(true) {
			t.Errorf("the server ended with %v, want nil", k.err)
		}
	case <-time.After(Patience):
		t.Fatalf("the server has not stopped after %v", Patience)
	}
}

// Terminate begins a Stop and does not wait.
func (k *Keygate) Terminate() { k.stop() }

// Wait returns why the server has ended, for a test that expects it to end by
// itself.
func (k *Keygate) Wait(t testing.TB) error {
	t.Helper()
	select {
	case <-k.done:
		k.told.Store(true)
		return k.err
	case <-time.After(Patience):
		t.Fatalf("the server has not ended after %v", Patience)
		return nil
	}
}

// Ended is closed when the server has stopped.
func (k *Keygate) Ended() <-chan struct{} { return k.done }

// WaitReady returns when the server has a valid proof and says so.
func (k *Keygate) WaitReady(t testing.TB) {
	t.Helper()
	Eventually(t, Patience, "the server to be ready", func() bool {
		select {
		case <-k.done:
			t.Fatalf("the server ended with %v", k.err)
		default:
		}
		return k.Server.Store().Fresh() == nil
	})
}

// Log is what the server has logged, at every level.
func (k *Keygate) Log() string { return k.log.String() }

// AccessLog is what Envoy has written of its requests, one JSON object a line.
// A line comes up to 0.2 s after its request.
func (k *Keygate) AccessLog() string { return k.accessLog.String() }

// Passed counts the requests that reached the upstream.
func (k *Keygate) Passed() int64 { return k.passed.Load() }

// Conn returns a plaintext connection to the ext_authz listener, closed when the
// test ends.
func (k *Keygate) Conn(t testing.TB) *grpc.ClientConn {
	t.Helper()
	target := k.Server.AuthzAddr()
	if !strings.HasPrefix(target, "unix:") {
		target = "passthrough:///" + target
	}
	c, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatalf("client of %s: %v", target, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// Reply is what a client of Envoy got.
type Reply struct {
	Status int
	Header http.Header
	Body   string
	// Upstream is what the upstream received; zero when it was not reached.
	Upstream proxy.Echoed
}

// Get sends a request through Envoy, with headers as "name: value".
func (k *Keygate) Get(t testing.TB, path string, headers ...string) Reply {
	t.Helper()
	r, err := k.TryGet(t.Context(), path, headers...)
	if err != nil {
		t.Fatalf("get %s: %v", path, err)
	}
	return r
}

// TryGet is Get for any goroutine: it returns an error instead of ending a test.
func (k *Keygate) TryGet(ctx context.Context, path string, headers ...string) (Reply, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.Envoy.URL()+path, nil)
	if err != nil {
		return Reply{}, err
	}
	for _, h := range headers {
		name, value, ok := strings.Cut(h, ": ")
		if !ok {
			return Reply{}, fmt.Errorf("header %q: want \"name: value\"", h)
		}
		req.Header.Add(name, value)
	}
	resp, err := k.http.Do(req)
	if err != nil {
		return Reply{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return Reply{}, err
	}
	r := Reply{Status: resp.StatusCode, Header: resp.Header, Body: string(body)}
	if r.Status == http.StatusOK {
		if err := json.Unmarshal(body, &r.Upstream); err != nil {
			return Reply{}, fmt.Errorf("the upstream answered %q: %w", body, err)
		}
	}
	return r, nil
}

// Health asks the health listener and returns status and body.
func (k *Keygate) Health(t testing.TB, path string) (int, string) {
	t.Helper()
	resp, err := k.http.Get("http://" + k.Server.HealthAddr() + path)
	if err != nil {
		t.Fatalf("ask for %s: %v", path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("ask for %s: %v", path, err)
	}
	return resp.StatusCode, string(body)
}

// Status is /status.
func (k *Keygate) Status(t testing.TB) server.Status {
	t.Helper()
	_, body := k.Health(t, "/status")
	var st server.Status
	if err := json.Unmarshal([]byte(body), &st); err != nil {
		t.Fatalf("read /status: %v: %s", err, body)
	}
	return st
}

// Metrics is /metrics: each sample's value by its name with its labels, as in
// keygate_checks_total{decision="denied",reason="key_unknown"}.
func (k *Keygate) Metrics(t testing.TB) map[string]float64 {
	t.Helper()
	_, body := k.Health(t, "/metrics")
	samples := map[string]float64{}
	for line := range strings.Lines(body) {
		line = strings.TrimSpace(line)
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || line[0] == '#' {
			continue
		}
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			t.Fatalf("read /metrics: %q: %v", line, err)
		}
		samples[line[:at]] = value
	}
	return samples
}

// Checks is the metric of checks that were decided for a reason.
func (k *Keygate) Checks(t testing.TB, reason authz.Reason) float64 {
	t.Helper()
	return k.Metrics(t)[ChecksMetric(reason)]
}

// ChecksMetric is the name and labels of the metric of a reason.
func ChecksMetric(reason authz.Reason) string {
	decision := "denied"
	if reason == authz.Allowed {
		decision = "allowed"
	}
	return fmt.Sprintf("keygate_checks_total{decision=%q,reason=%q}", decision, reason)
}

// Eventually waits until cond is true, and ends the test if it is not in time.
// It returns how long it took, to about a millisecond.
func Eventually(t testing.TB, within time.Duration, what string, cond func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if time.Since(start) > within {
			t.Fatalf("waited %v in vain for %s", within, what)
		}
		<-tick.C
	}
	return time.Since(start)
}

// buffer keeps what is written to it. It is safe for concurrent use.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *buffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *buffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}
