package keygatetest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/envoy/proxy/proxytest"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
	"keygate/statestore"
)

// longFaults tells whether the long forms of the fault tests are asked for.
func longFaults() bool { return os.Getenv("FAULTS") == "long" }

// withoutDrain is a keygate that stops answering as soon as it is told to stop.
var withoutDrain = variant.Mutation{File: "server/server.go", Old: "DefaultDrain = 3 * time.Second", New: "DefaultDrain = 0"}

// Replicas behind one Envoy that stop one after the other, or die, fail no
// request and let no revoked key through.
func TestRollingRestart(t *testing.T) {
	binary := variant.Build(t, "./cmd/keygate", false)
	t.Run("stopped", func(t *testing.T) {
		f := startFleet(t, binary, proxytest.Binary(t))
		l := f.load(t)
		f.roll(t, l, 2)
		l.check(t, false)
	})
	t.Run("killed", func(t *testing.T) {
		f := startFleet(t, binary, proxytest.Binary(t))
		l := f.load(t)
		f.killOne(t, l)
		l.check(t, false)
	})
}

// The drain alone keeps a rolling restart whole. Without it requests fail, and
// the test sees them, although Envoy tries a second replica; without the second
// try, a replica that dies takes requests with it.
func TestRollingRestartControls(t *testing.T) {
	if !longFaults() {
		return // half a minute
	}
	product, abrupt := variant.Build(t, "./cmd/keygate", false), variant.Build(t, "./cmd/keygate", false, withoutDrain)
	roll := func(t *testing.T, f *fleet, l *load) { f.roll(t, l, 2) }
	kill := func(t *testing.T, f *fleet, l *load) { f.killOne(t, l) }
	tests := []struct {
		name, binary, envoy string
		fault               func(*testing.T, *fleet, *load)
		fails               bool
	}{
		{"stopped, drain without retries", product, withoutRetries(t), roll, false},
		{"stopped, retries without drain", abrupt, proxytest.Binary(t), roll, true},
		{"stopped, neither", abrupt, withoutRetries(t), roll, true},
		{"killed, without retries", product, withoutRetries(t), kill, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := startFleet(t, tt.binary, tt.envoy)
			l := f.load(t)
			tt.fault(t, f, l)
			l.check(t, tt.fails)
		})
	}
}

// fleet is three replicas of keygate on one etcd, each in a process of its own,
// behind one Envoy.
type fleet struct {
	etcd     *etcdtest.Process
	writer   *clientv3.Client
	replicas []*replica
	envoy    *proxy.Proxy
	upstream *httptest.Server
	// keys are good ones and, after them, as many that were revoked before
	// anything started.
	keys []string
}

const fleetKeys = 20

func startFleet(t *testing.T, binary, envoyBinary string) *fleet {
	t.Helper()
	// A disk that stalls while a replica loads its first records is another test's
	// fault: where there is memory to put etcd's data in, it goes there.
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		t.Setenv("TMPDIR", "/dev/shm")
	}
	f := &fleet{etcd: etcdtest.StartProcess(t)}
	f.writer = f.etcd.Client(t)
	space := keygatetest.Settings().Space
	for i := range 2 * fleetKeys {
		key := keygatetest.Key{Key: fmt.Sprintf("key-in-a-rolling-restart-%02d", i)}
		if i >= fleetKeys {
			key.Status = "revoked"
		}
		f.keys = append(f.keys, key.Key)
		for path, value := range key.Values(t, space) {
			f.put(t, path, value)
		}
	}
	var addresses []string
	for range 3 {
		r := &replica{binary: binary, etcd: f.etcd.Endpoint(), authz: freeAddress(t), health: freeAddress(t)}
		f.replicas = append(f.replicas, r)
		addresses = append(addresses, r.authz)
		r.start(t)
		t.Cleanup(func() { r.kill(t) })
	}
	for _, r := range f.replicas {
		r.waitReady(t)
	}
	f.upstream = httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(f.upstream.Close)
	var err error
	f.envoy, err = proxy.Start(t.Context(), proxy.Config{
		Binary: envoyBinary, Concurrency: 1,
		Bootstrap: envoy.Bootstrap{
			Listen: "127.0.0.1:0", Authz: addresses, Upstream: f.upstream.Listener.Addr().String(),
			Routes: envoy.QuickstartRoutes(),
		},
	})
	if err != nil {
		t.Fatalf("start Envoy: %v", err)
	}
	t.Cleanup(f.envoy.Stop)
	keygatetest.Eventually(t, keygatetest.Patience, "Envoy to find three healthy replicas", func() bool {
		return f.stat(t, "cluster.keygate.membership_healthy") == 3
	})
	return f
}

func (f *fleet) put(t *testing.T, path, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), keygatetest.Patience)
	defer cancel()
	if _, err := f.writer.Put(ctx, path, value); err != nil {
		t.Fatalf("put %s: %v", path, err)
	}
}

// admin asks Envoy's own interface.
func (f *fleet) admin(t *testing.T, method, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, f.envoy.AdminURL()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatalf("ask Envoy: %v", err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("ask Envoy for %s: %s, %v: %s", path, resp.Status, err, body)
	}
	return string(body)
}

// stat is one of Envoy's counters or gauges.
func (f *fleet) stat(t *testing.T, name string) (n int) {
	t.Helper()
	for line := range strings.Lines(f.admin(t, http.MethodGet, "/stats?filter=^"+name+"$")) {
		if _, err := fmt.Sscanf(strings.TrimPrefix(line, name), ": %d", &n); err != nil {
			t.Fatalf("Envoy's %s: %q: %v", name, line, err)
		}
	}
	return n
}

// withoutRetries is an Envoy that takes every first failure for the answer.
func withoutRetries(t *testing.T) string {
	t.Helper()
	script := filepath.Join(t.TempDir(), "envoy")
	const runtime = `{layered_runtime: {layers: [{name: test, static_layer: {upstream.use_retry: 0}}]}}`
	text := fmt.Sprintf("#!/bin/sh\nexec '%s' \"$@\" --config-yaml '%s'\n", proxytest.Binary(t), runtime)
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return script
}

// roll restarts one replica after the other, each as soon as the one before says
// that it is ready, and revokes a key while each of them is away.
func (f *fleet) roll(t *testing.T, l *load, rounds int) {
	t.Helper()
	space := keygatetest.Settings().Space
	for round := range rounds {
		for i, r := range f.replicas {
			if l.broken() {
				return // enough has been seen
			}
			l.phase(fmt.Sprintf("round %d, replica %d stops", round+1, i+1))
			r.signal(t, syscall.SIGTERM)
			key := f.keys[round*len(f.replicas)+i]
			l.revoking(key)
			f.put(t, space.Status(keygatetest.Key{Key: key}.Record(t)), "revoked")
			l.revoked(key)
			r.wait(t)
			l.phase(fmt.Sprintf("round %d, replica %d starts", round+1, i+1))
			r.start(t)
			r.waitReady(t)
		}
	}
	l.phase("all are back")
	keygatetest.Eventually(t, keygatetest.Patience, "Envoy to find three healthy replicas", func() bool {
		return f.stat(t, "cluster.keygate.membership_healthy") == len(f.replicas)
	})
}

// killOne kills a replica, and starts it again when Envoy has noticed.
func (f *fleet) killOne(t *testing.T, l *load) {
	t.Helper()
	healthy := func(n int) {
		t.Helper()
		keygatetest.Eventually(t, keygatetest.Patience, fmt.Sprintf("Envoy to find %d healthy replicas", n), func() bool {
			return f.stat(t, "cluster.keygate.membership_healthy") == n
		})
	}
	keygatetest.Eventually(t, keygatetest.Patience, "some requests", func() bool { return l.requested() > 500 })
	l.phase("a replica is killed")
	r := f.replicas[0]
	r.signal(t, syscall.SIGKILL)
	<-r.exited
	healthy(2)
	l.phase("it starts again")
	r.start(t)
	r.waitReady(t)
	healthy(3)
	// It gets checks again, with nothing in its cache.
	n := l.requested()
	keygatetest.Eventually(t, keygatetest.Patience, "some more requests", func() bool { return l.requested() > n+500 })
}

// replica is keygate authz in a process of its own, on addresses that stay.
type replica struct {
	binary, etcd, authz, health string

	cmd    *exec.Cmd
	exited chan struct{} // closed after err is set
	err    error
	log    syncBuffer
}

func (r *replica) start(t *testing.T) {
	t.Helper()
	cmd := exec.Command(r.binary, "authz", "--etcd-endpoints", r.etcd, "--authz-listen", r.authz, "--health-listen", r.health)
	cmd.Stdout, cmd.Stderr = &r.log, &r.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, exited := make(chan error, 1), make(chan struct{})
	go func() {
		// The signal comes when the thread that forked ends: this one stays.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			r.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("start a replica: %v", err)
	}
	r.cmd, r.exited = cmd, exited
}

func (r *replica) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("send %v to a replica: %v", s, err)
	}
}

// wait until a replica that was told to stop has.
func (r *replica) wait(t *testing.T) {
	t.Helper()
	select {
	case <-r.exited:
		if r.err != nil {
			t.Errorf("a replica ended with %v, want exit status 0; its log:\n%s", r.err, r.log.String())
		}
	case <-time.After(keygatetest.Patience):
		t.Fatalf("a replica is still there %v after SIGTERM", keygatetest.Patience)
	}
}

func (r *replica) kill(t *testing.T) {
	t.Helper()
	r.signal(t, syscall.SIGKILL)
	<-r.exited
	if t.Failed() {
		t.Logf("the log of the replica at %s:\n%s", r.authz, r.log.String())
	}
}

// waitReady polls /readyz, as Kubernetes would.
func (r *replica) waitReady(t *testing.T) {
	t.Helper()
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	keygatetest.Eventually(t, keygatetest.Patience, "a replica to be ready", func() bool {
		select {
		case <-r.exited:
			t.Fatalf("a replica ended with %v; its log:\n%s", r.err, r.log.String())
		default:
		}
		resp, err := client.Get("http://" + r.health + "/readyz")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// freeAddress on loopback, for a process that gives it up and takes it again: its
// port is below those that the system hands out by itself.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20_000+rand.IntN(10_000)))
		if err != nil {
			continue
		}
		address := l.Addr().String()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return address
	}
	t.Fatal("100 ports in a row are taken")
	return ""
}

// load is clients of Envoy that never pause for an answer's sake.
type load struct {
	fleet *fleet
	began time.Time
	stop  context.CancelFunc
	done  sync.WaitGroup

	state struct {
		sync.Mutex
		phase string
		// closed holds when the revocation of a key was acknowledged; the zero
		// time while it is not yet.
		closed map[string]time.Time
		result
	}
}

// result is what the clients saw.
type result struct {
	requests, refused int
	failed            []string // neither a yes to a good key nor a no to a bad one
	stale             []string // yes to a key whose revocation is older than S
	lastYes           time.Duration
	took              []time.Duration
}

const (
	loadWorkers = 20
	loadPause   = 20 * time.Millisecond // between two requests of a worker: at most 1,000/s in all
	// brokenAt is how many failures say all that there is to say.
	brokenAt = 1000
)

// load begins at once, and ends with the test at the latest.
func (f *fleet) load(t *testing.T) *load {
	t.Helper()
	l := &load{fleet: f, began: time.Now()}
	l.state.phase, l.state.closed = "before", map[string]time.Time{}
	for _, key := range f.keys[fleetKeys:] {
		l.state.closed[key] = l.began
	}
	ctx, cancel := context.WithCancel(context.Background())
	transport := &http.Transport{MaxIdleConnsPerHost: loadWorkers}
	client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
	var next atomic.Int64
	for range loadWorkers {
		l.done.Go(func() {
			tick := time.NewTicker(loadPause)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				// Four requests with good keys, or such that become bad, for one
				// with a bad key.
				n := int(next.Add(1))
				key := f.keys[n%fleetKeys]
				if n%5 == 0 {
					key = f.keys[fleetKeys+n/5%fleetKeys]
				}
				l.one(client, key)
			}
		})
	}
	l.stop = func() {
		cancel()
		l.done.Wait()
		transport.CloseIdleConnections()
	}
	t.Cleanup(l.stop)
	return l
}

// one request, and what its answer says of keygate.
func (l *load) one(client *http.Client, key string) {
	l.state.Lock()
	acked, closed := l.state.closed[key]
	l.state.Unlock()
	began := time.Now()
	status, answer := ask(client, l.fleet.envoy.URL()+"/weather", key)
	took := time.Since(began)

	l.state.Lock()
	defer l.state.Unlock()
	l.state.requests++
	l.state.took = append(l.state.took, took)
	_, closing := l.state.closed[key] // by now
	switch late := began.Sub(acked); {
	case status == http.StatusOK && (!closed || acked.IsZero()):
	case status == http.StatusOK && late <= statestore.DefaultStalenessBudget:
		l.state.lastYes = max(l.state.lastYes, late)
	case status == http.StatusOK:
		l.state.stale = append(l.state.stale, fmt.Sprintf("%v after the revocation, in %s", late, l.state.phase))
	case status == http.StatusUnauthorized && closing:
		l.state.refused++
	default:
		l.state.failed = append(l.state.failed, fmt.Sprintf("at %v, in %s, after %v: %s",
			began.Sub(l.began).Round(time.Millisecond), l.state.phase, took.Round(time.Millisecond), answer))
	}
}

// ask returns the status, 0 without one, and what there is to say of it.
func ask(client *http.Client, url, key string) (status int, answer string) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return 0, err.Error()
	}
	req.Header.Set("x-api-key", key)
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, resp.Status + " " + string(body)
}

func (l *load) phase(name string) {
	l.state.Lock()
	defer l.state.Unlock()
	l.state.phase = name
}

// revoking says that a key is about to be revoked, revoked that it has been.
func (l *load) revoking(key string) {
	l.state.Lock()
	defer l.state.Unlock()
	l.state.closed[key] = time.Time{}
}

func (l *load) revoked(key string) {
	l.state.Lock()
	defer l.state.Unlock()
	l.state.closed[key] = time.Now()
}

func (l *load) requested() int {
	l.state.Lock()
	defer l.state.Unlock()
	return l.state.requests
}

func (l *load) broken() bool {
	l.state.Lock()
	defer l.state.Unlock()
	return len(l.state.failed) >= brokenAt
}

// end stops the clients and returns what they saw. A yes to a revoked key fails
// the test, whatever else it is about.
func (l *load) end(t *testing.T) result {
	t.Helper()
	l.stop()
	r := l.state.result
	seconds := time.Since(l.began).Seconds()
	t.Logf("%d requests in %.1f s (%.0f/s): %d failed, %d refused, %d wrong; p50 %v, p99 %v, longest %v; last yes to a revoked key %v after its revocation",
		r.requests, seconds, float64(r.requests)/seconds, len(r.failed), r.refused, len(r.stale),
		quantile(r.took, 0.5), quantile(r.took, 0.99), quantile(r.took, 1), r.lastYes)
	var stats []string
	for _, name := range []string{"upstream_rq_retry", "upstream_rq_retry_success", "upstream_rq_timeout", "upstream_cx_connect_fail",
		"upstream_cx_total", "outlier_detection.ejections_enforced_total", "lb_healthy_panic", "health_check.failure"} {
		if n := l.fleet.stat(t, "cluster.keygate."+name); n > 0 {
			stats = append(stats, fmt.Sprintf("%s %d", name, n))
		}
	}
	t.Logf("Envoy counted: %s", strings.Join(stats, ", "))
	for i, s := range r.stale {
		if i < 10 {
			t.Errorf("a revoked key was let through: %s", s)
		}
	}
	if r.refused == 0 {
		t.Error("no revoked key was refused: none was tried")
	}
	return r
}

// check ends the load. Requests that fail end the test, unless that is what it
// wants to see; then it wants at least one.
func (l *load) check(t *testing.T, wantFailures bool) {
	t.Helper()
	r := l.end(t)
	report := t.Errorf
	if wantFailures {
		report = t.Logf
		if len(r.failed) == 0 {
			t.Errorf("none of %d requests failed: the test cannot see a failure", r.requests)
		}
	}
	for i, f := range r.failed {
		if i == 10 {
			report("and %d more", len(r.failed)-i)
			break
		}
		report("a request failed: %s", f)
	}
}

// syncBuffer keeps what is written to it. It is safe for concurrent use.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
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
