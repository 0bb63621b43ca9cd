package management_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"keygate/access"
	"keygate/audit"
	"keygate/authz"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
	"keygate/management"
	"keygate/statestore/keyspace"
)

// A token that is good gets in from an address where somebody tries many, and
// each is told when to come again.
func TestManyFailuresLockNobodyOut(t *testing.T) {
	var clock atomic.Int64
	clock.Store(time.Now().UnixMilli())
	a := newAPI(t, nil, func(c *management.Config) { c.Now = func() time.Time { return time.UnixMilli(clock.Load()) } })
	w := a.people()
	late := a.token(access.Viewer, acme) // has not been seen yet
	var refused, limited int
	for i := range 300 {
		r := a.do("GET", w.app, nil, as("kgm_guess"+strconv.Itoa(i)))
		switch r.StatusCode {
		case 401:
			refused++
		case 429:
			limited++
			if after, err := strconv.Atoi(r.Header.Get("Retry-After")); err != nil || after < 1 {
				t.Fatalf("Retry-After is %q", r.Header.Get("Retry-After"))
			}
		default:
			t.Fatalf("got %d, want 401 or 429", r.StatusCode)
		}
	}
	if refused == 0 || limited == 0 {
		t.Errorf("got %d times 401 and %d times 429, want both", refused, limited)
	}
	a.want(200, "GET", w.app, nil)
	a.want(200, "GET", w.app, nil, as(late))
	clock.Add(1500)
	a.want(401, "GET", w.app, nil, as("kgm_guess"))

}

// A token that was good once and is tried on and on is not looked up for ever.
func TestRevokedTokenIsLookedUpNowAndThen(t *testing.T) {
	a := newAPI(t, nil)
	revoked := a.token(access.Viewer, acme)
	store := &counting{Store: a.kv}
	now := time.Now()
	server, err := management.New(management.Config{Ledger: ledger.New(ledger.Config{Store: store, Space: a.space}), Store: store, Space: a.space,
		Organization: acme, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	b := *a
	b.http = httptest.NewServer(server.Handler())
	defer b.http.Close()
	b.want(200, "GET", mountX+"acme", nil, as(revoked))
	if _, _, err := a.ledger.RevokeToken(t.Context(), ledger.By{}, acme, tokenID(t, revoked)); err != nil {
		t.Fatal(err)
	}
	store.n.Store(0)
	const tries = 100
	for range tries {
		if r := b.do("GET", mountX+"acme", nil, as(revoked)); r.StatusCode != 401 && r.StatusCode != 429 {
			t.Fatalf("got %d, want 401 or 429", r.StatusCode)
		}
	}
	if n := store.n.Load(); n < 1 || n > tries/2 {
		t.Errorf("it was looked up %d times in %d tries, want a few", n, tries)
	}
	b.want(200, "GET", mountX+"acme", nil)
}

// counting is a Store that counts transactions.
type counting struct {
	ledger.Store
	n atomic.Int64
}

func (c *counting) Txn(ctx context.Context) clientv3.Txn {
	c.n.Add(1)
	return c.Store.Txn(ctx)
}

func tokenID(t *testing.T, secret string) string {
	t.Helper()
	id, err := access.ParseToken(secret)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestRateOfOneToken(t *testing.T) {
	now := time.Now()
	a := newAPI(t, nil, func(c *management.Config) { c.RequestsPerSecond, c.Now = 5, func() time.Time { return now } })
	other := a.token(access.Viewer, acme)
	var limited int
	for range 20 {
		if r := a.do("GET", mountX+"acme", nil); r.StatusCode == 429 && r.Header.Get("Retry-After") != "" {
			limited++
		}
	}
	if limited != 15 {
		t.Errorf("%d of 20 requests were refused, want 15", limited)
	}
	a.want(200, "GET", mountX+"acme", nil, as(other))
}

// blocking is a Store whose reads wait, but those in transactions.
type blocking struct {
	ledger.Store
	began chan struct{}
	go_   chan struct{}
}

func (b *blocking) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	b.began <- struct{}{}
	<-b.go_
	return b.Store.Get(ctx, key, opts...)
}

func TestConcurrentRequestsAreBounded(t *testing.T) {
	a := newAPI(t, nil)
	store := &blocking{a.kv, make(chan struct{}, 10), make(chan struct{})}
	server, err := management.New(management.Config{Ledger: a.ledger, Store: store, Space: a.space, Organization: acme, Concurrent: 2})
	if err != nil {
		t.Fatal(err)
	}
	b := *a
	b.http = httptest.NewServer(server.Handler())
	defer b.http.Close()
	var under sync.WaitGroup
	third := a.token(access.Viewer, acme)
	for _, token := range []string{a.admin, a.token(access.Auditor, acme)} {
		under.Go(func() {
			if r, err := b.try(t.Context(), "GET", mountX+"acme/audit", nil, as(token)); err != nil || r.StatusCode != 200 {
				t.Errorf("got %d, %v, want 200", r.StatusCode, err)
			}
		})
	}
	<-store.began
	<-store.began
	if r := b.do("GET", mountX+"acme", nil); r.StatusCode != 429 || r.code() != "keygate.concurrency" || r.Header.Get("Retry-After") == "" {
		t.Errorf("a second one with the same token: got %d %s, want 429", r.StatusCode, r.body)
	}
	if r := b.do("GET", mountX+"acme", nil, as(third)); r.StatusCode != 503 || r.code() != "keygate.overloaded" || r.Header.Get("Retry-After") == "" {
		t.Errorf("a third one: got %d %s, want 503", r.StatusCode, r.body)
	}
	close(store.go_)
	under.Wait()
	b.want(200, "GET", mountX+"acme", nil)
}

// slowClient is the other end of a request in this process: it takes no answer
// until it is let, and notes what time it is given.
type slowClient struct {
	header         http.Header
	status         int
	read, write    time.Time // deadlines
	writing, let   chan struct{}
	readSet, begun bool
}

func newSlowClient() *slowClient {
	return &slowClient{header: http.Header{}, writing: make(chan struct{}), let: make(chan struct{})}
}

func (s *slowClient) Header() http.Header    { return s.header }
func (s *slowClient) WriteHeader(status int) { s.status = status }

func (s *slowClient) Write(b []byte) (int, error) {
	if !s.begun {
		s.begun = true
		close(s.writing)
	}
	<-s.let
	return len(b), nil
}

func (s *slowClient) SetReadDeadline(at time.Time) error {
	s.read, s.readSet = at, true
	return nil
}

func (s *slowClient) SetWriteDeadline(at time.Time) error {
	s.write = at
	return nil
}

// send a request in this process. done is closed when it has been handled.
func (a *api) send(s *slowClient, method, path string, body io.Reader, opts ...option) (done chan struct{}) {
	r := httptest.NewRequest(method, path, body)
	r.Host = "localhost"
	for _, o := range opts {
		o(r)
	}
	done = make(chan struct{})
	go func() {
		defer close(done)
		a.server.Handler().ServeHTTP(s, r)
	}()
	return done
}

// Whoever reads an answer slowly keeps nobody out, and has some seconds for it.
func TestSlowReadersHoldNoPlace(t *testing.T) {
	a := newAPI(t, nil, func(c *management.Config) { c.Concurrent = 1 })
	for path, who := range map[string]option{"/docs": nobody, "/openapi.json": nobody, mountX + "acme": as(a.admin), mountX + "acme/nothing": as(a.admin)} {
		s := newSlowClient()
		done := a.send(s, "GET", path, nil, who)
		<-s.writing
		if limit := time.Now().Add(management.WriteTimeout); s.write.IsZero() || s.write.After(limit) {
			t.Errorf("%s: got write deadline %v, want one of %v at most", path, s.write, limit)
		}
		if r := a.do("GET", mountX+"acme", nil); r.StatusCode != 200 {
			t.Errorf("beside a slow reader of %s: got %d %s, want 200", path, r.StatusCode, r.body)
		}
		close(s.let)
		<-done
	}
}

// slowBody comes when it is let.
type slowBody struct {
	io.Reader
	reading, let chan struct{}
	begun        bool
}

func (s *slowBody) Read(b []byte) (int, error) {
	if !s.begun {
		s.begun = true
		close(s.reading)
	}
	<-s.let
	return s.Reader.Read(b)
}

// Whoever sends a body slowly keeps nobody out, on a path that looks at it and
// on one that does not, and has some seconds for it.
func TestSlowBodiesHoldNoPlace(t *testing.T) {
	a := newAPI(t, nil, func(c *management.Config) { c.Concurrent = 1 })
	w := a.people()
	for path, status := range map[string]int{mountX + "acme/keys:search": 200, w.app + "?action=revoke": 204} {
		s := newSlowClient()
		close(s.let)
		body := &slowBody{Reader: strings.NewReader(`{"consumerKey":"` + w.key + `"}`), reading: make(chan struct{}), let: make(chan struct{})}
		done := a.send(s, "POST", path, body, as(a.admin))
		select {
		case <-body.reading:
		case <-done:
			t.Fatalf("POST %s: answered %d before its body was read", path, s.status)
		}
		if limit := time.Now().Add(management.BodyTimeout); !s.readSet || s.read.IsZero() || s.read.After(limit) {
			t.Errorf("POST %s: got read deadline %v, want one of %v at most", path, s.read, limit)
		}
		if r := a.do("GET", mountX+"acme", nil); r.StatusCode != 200 {
			t.Errorf("beside a slow body of %s: got %d %s, want 200", path, r.StatusCode, r.body)
		}
		close(body.let)
		<-done
		if s.status != status || !s.read.IsZero() {
			t.Errorf("POST %s: got %d and read deadline %v at the end, want %d and none: who waits for the fleet goes on", path, s.status, s.read, status)
		}
	}
}

// bursting is a Store that panics.
type bursting struct{ ledger.Store }

func (b bursting) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	panic("the secret giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb")
}

func TestPanicSaysNothing(t *testing.T) {
	a := newAPI(t, nil)
	server, err := management.New(management.Config{Ledger: a.ledger, Store: bursting{a.kv}, Space: a.space, Organization: acme, Logger: newLogger(a)})
	if err != nil {
		t.Fatal(err)
	}
	b := *a
	b.http = httptest.NewServer(server.Handler())
	defer b.http.Close()
	r := b.want(500, "GET", mountX+"acme/audit", nil)
	if r.code() != "keygate.internal" || strings.Contains(string(r.body), "giIC9") || strings.Contains(a.logs.String(), "giIC9") {
		t.Errorf("got %s and log %s", r.body, a.logs.String())
	}
	if !strings.Contains(a.logs.String(), "panicked") || !strings.Contains(a.logs.String(), r.Header.Get("X-Request-Id")) {
		t.Errorf("the log has no panic under the request's id: %s", a.logs.String())
	}
	b.want(200, "GET", mountX+"acme", nil)
}

// etcd that does not answer: within five seconds, and never anything that sounds
// like a failure of what may have happened.
func TestStoreDoesNotAnswer(t *testing.T) {
	etcd := etcdtest.Start(t)
	proxy := etcdtest.NewProxy(t, etcd.Endpoint())
	kv, err := clientv3.New(clientv3.Config{Endpoints: []string{proxy.Endpoint()}, DialTimeout: patience, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kv.Close() })
	a := newAPI(t, kv)
	w := a.people()

	// It does what it is asked, and the answer is lost.
	slow := &losing{Store: kv, proxy: proxy}
	server, err := management.New(management.Config{Ledger: ledger.New(ledger.Config{Store: slow, Space: a.space}), Store: slow, Space: a.space, Organization: acme})
	if err != nil {
		t.Fatal(err)
	}
	b := *a
	b.http = httptest.NewServer(server.Handler())
	defer b.http.Close()
	once := header("Idempotency-Key", "revoke it once")
	slow.armed.Store(true)
	began := time.Now()
	r := b.want(503, "POST", w.app+"?action=revoke", nil, once)
	took := time.Since(began)
	if r.code() != "keygate.outcome_unknown" || !strings.Contains(r.message(), "outcome unknown") || !strings.Contains(r.message(), "Idempotency-Key") || r.Header.Get("Retry-After") == "" {
		t.Errorf("got %s after %v, want the outcome to be unknown", r.body, took)
	}
	t.Logf("answered after %v", took)
	if limit := management.ChangeTimeout + patience; took > limit {
		t.Errorf("answered after %v, want %v at most", took, limit)
	}
	began = time.Now()
	r = b.want(503, "POST", w.app+"?action=revoke", nil) // the token cannot be looked up
	t.Logf("then after %v: %s", time.Since(began), r.message())
	if r.code() != "keygate.unavailable" || !strings.Contains(r.message(), "nothing was changed") {
		t.Errorf("got %s, want that nothing was changed", r.body)
	}
	proxy.Heal()
	r = b.want(204, "POST", w.app+"?action=revoke", nil, once)
	if got := b.want(200, "GET", w.app, nil).member("status"); got != `"revoked"` {
		t.Errorf("got status %s after the repetition, want revoked", got)
	}
	var changed int
	for _, rec := range a.records() {
		if rec.Action == "revoke" && !rec.NoOp {
			changed++
		}
	}
	if changed != 1 {
		t.Errorf("%d records of the change, want 1", changed)
	}
}

// etcd that is not there at all is not the request's fault either.
func TestStoreIsGone(t *testing.T) {
	proxy := etcdtest.NewProxy(t, etcdtest.Start(t).Endpoint())
	kv, err := clientv3.New(clientv3.Config{Endpoints: []string{proxy.Endpoint()}, DialTimeout: patience, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kv.Close() })
	a := newAPI(t, kv)
	w := a.people()
	b := *a
	b.http = httptest.NewServer(a.server.Local(audit.Actor{Kind: audit.ActorCLI}))
	defer b.http.Close()
	proxy.Refuse()
	proxy.Cut()
	if r := b.want(503, "POST", w.app+"?action=revoke", nil); r.code() != "keygate.unavailable" && r.code() != "keygate.outcome_unknown" {
		t.Errorf("got %s", r.body)
	}
	proxy.Accept()
	for ends := time.Now().Add(patience); ; { // the client looks for etcd now and then
		r := b.do("POST", w.app+"?action=revoke", nil)
		if r.StatusCode == 204 {
			break
		}
		if r.StatusCode != 503 || time.Now().After(ends) {
			t.Fatalf("got %d %s, want 204 once etcd is back", r.StatusCode, r.body)
		}
	}
}

// losing is a Store whose etcd does not answer from the first write on, once it
// is armed.
type losing struct {
	ledger.Store
	proxy *etcdtest.Proxy
	armed atomic.Bool
}

type losingTxn struct {
	clientv3.Txn
	l      *losing
	writes bool
}

func (l *losing) Txn(ctx context.Context) clientv3.Txn {
	return &losingTxn{Txn: l.Store.Txn(ctx), l: l}
}

func (t *losingTxn) If(cs ...clientv3.Cmp) clientv3.Txn { t.Txn = t.Txn.If(cs...); return t }

func (t *losingTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	for _, op := range ops {
		t.writes = t.writes || op.IsPut() || op.IsDelete()
	}
	t.Txn = t.Txn.Then(ops...)
	return t
}

func (t *losingTxn) Commit() (*clientv3.TxnResponse, error) {
	if t.writes && t.l.armed.CompareAndSwap(true, false) {
		t.l.proxy.FreezeAnswers()
	}
	return t.Txn.Commit()
}

// replica registers one that answers nothing by itself.
func (a *api) replica(id string, budget time.Duration) keyspace.Replica {
	a.t.Helper()
	r := keyspace.Replica{ID: id, Version: "test", Host: "host", Pid: 7, StalenessBudget: budget, Fresh: true, At: time.Now()}
	if _, err := a.kv.Put(a.t.Context(), a.space.Replica(id), r.Value()); err != nil {
		a.t.Fatal(err)
	}
	return r
}

// acknowledge everything that is written from now on, as a replica does, until
// the test ends.
func (a *api) acknowledge(r keyspace.Replica) {
	ctx, cancel := context.WithCancel(a.t.Context())
	done := make(chan struct{})
	events := a.kv.Watch(ctx, a.space.Watched(), clientv3.WithPrefix())
	go func() {
		defer close(done)
		for resp := range events {
			for _, e := range resp.Events {
				if strings.HasSuffix(string(e.Kv.Key), "/.barrier") {
					r.Acknowledged = e.Kv.ModRevision
					_, _ = a.kv.Put(ctx, a.space.Replica(r.ID), r.Value())
				}
			}
		}
	}()
	a.t.Cleanup(func() { cancel(); <-done })
}

func TestWaitFleet(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	a.acknowledge(a.replica("one", time.Minute))
	for _, path := range []string{w.app + "/keys/" + w.key + "/apiproducts/Weather-Product", w.app + "/keys/" + w.key, w.app} {
		for i, action := range []string{"revoke", "revoke", "approve"} {
			var got struct {
				Revision           int64
				Action             string
				Changed, Unchanged int
				Replicas           struct{ Total, Applied int }
			}
			r := a.want(200, "POST", path+"?wait=fleet&action="+action, nil)
			r.into(t, &got)
			changed := map[int]int{1: 0}[i] + map[bool]int{true: 1}[i != 1]
			if got.Action != action || got.Changed != changed || got.Unchanged != 1-changed || got.Replicas.Total != 1 || got.Replicas.Applied != 1 || strconv.FormatInt(got.Revision, 10) != r.revision() {
				t.Errorf("%s: got %s, want %d changed and one replica that applied it", action, r.body, changed)
			}
		}
	}
	r := a.want(200, "POST", mountX+"acme/statuses?wait=fleet", map[string]any{"action": "revoke", "targets": []any{map[string]any{"app": w.appID}}})
	if !strings.Contains(r.member("receipt"), `"applied":1`) {
		t.Errorf("statuses: got %s, want a receipt of one replica", r.body)
	}
}

// Whoever goes away while it waits undoes nothing, and holds no place.
func TestDisconnectDuringWait(t *testing.T) {
	a := newAPI(t, nil, func(c *management.Config) { c.Concurrent = 1 })
	w := a.people()
	a.replica("silent", time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := a.try(ctx, "POST", w.app+"?action=revoke&wait=fleet", nil)
		failed <- err
	}()
	ends := time.Now().Add(patience)
	for revoked := false; ; {
		if !revoked { // asked of the store: the one place is the other's
			app, err := a.ledger.DeveloperApp(t.Context(), acme, "ann@example.com", "weather")
			if err != nil {
				t.Fatal(err)
			}
			revoked = app.Status == authz.StatusRevoked
		} else if r := a.do("GET", w.app, nil); r.StatusCode == http.StatusOK && r.member("status") == `"revoked"` {
			break // it was given back
		}
		if time.Now().After(ends) {
			t.Fatalf("revoked is %v, want it so while somebody waits, and room for another request", revoked)
		}
	}
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("the request ended with %v before its receipt, want it to wait", err)
	}
	if got := a.want(200, "GET", w.app, nil).member("status"); got != `"revoked"` {
		t.Errorf("got %s after the client went away, want revoked", got)
	}
}

// The handler for the CLI on the store: no token, every right, the same answers.
func TestLocal(t *testing.T) {
	a := newAPI(t, nil)
	a.people()
	b := *a
	b.http = httptest.NewServer(a.server.Local(audit.Actor{Kind: audit.ActorCLI, Name: "root"}))
	defer b.http.Close()
	r := b.want(200, "GET", mountX+"acme/developers/ann@example.com/apps/weather", nil, nobody, host("any.example"))
	if !strings.Contains(string(r.body), `"consumerKey":"kg_`) {
		t.Errorf("got %s, want the key", r.body)
	}
	b.want(204, "POST", mountX+"acme/developers/ann@example.com?action=inactive", nil, nobody)
	b.want(404, "GET", mountX+"acme/nothing", nil, nobody)
	b.want(404, "GET", "/docs", nil, nobody)
	var found bool
	for _, rec := range a.records() {
		found = found || rec.Action == "revoke" && rec.Actor.Kind == audit.ActorCLI && rec.Actor.Name == "root"
	}
	if !found {
		t.Error("the audit trail does not name the caller")
	}
}
