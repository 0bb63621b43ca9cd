package etcdtest_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/metadata"

	"keygate/keygatetest/etcdtest"
)

// through returns a new client behind the proxy, with a connection of its own.
func through(t *testing.T, p *etcdtest.Proxy) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{p.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// watch returns the keys of what c sees change under "w", after the watch is
// known to etcd. It ends with ctx.
func watch(ctx context.Context, t *testing.T, c *clientv3.Client) <-chan string {
	t.Helper()
	keys, created := make(chan string, 100), make(chan struct{})
	go func() {
		for r := range c.Watch(ctx, "w", clientv3.WithPrefix(), clientv3.WithCreatedNotify()) {
			if r.Created {
				close(created)
			}
			for _, event := range r.Events {
				keys <- string(event.Kv.Key)
			}
		}
	}()
	select {
	case <-created:
	case <-time.After(10 * time.Second):
		t.Fatal("no watch after 10 s")
	}
	return keys
}

func mustSee(t *testing.T, keys <-chan string, want string) {
	t.Helper()
	select {
	case got := <-keys:
		if got != want {
			t.Errorf("watch: got %s, want %s", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("watch: got nothing for 10 s, want %s", want)
	}
}

// mustNotSee gives an event the time it needs many times over.
func mustNotSee(t *testing.T, keys <-chan string) {
	t.Helper()
	select {
	case got := <-keys:
		t.Errorf("watch: got %s, want nothing", got)
	case <-time.After(100 * time.Millisecond):
	}
}

func TestProxy(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		target func(t *testing.T) string
	}{
		{"unix", func(t *testing.T) string { return etcdtest.Start(t).Endpoint() }},
		{"tcp", func(t *testing.T) string { return etcdtest.StartCluster(t, 1).Member(0).Endpoint() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := etcdtest.NewProxy(t, test.target(t))
			c := through(t, p)
			mustPut(t, c, "k", "v")

			p.Freeze()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if _, err := c.Get(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("get through a frozen proxy: got %v, want a deadline exceeded", err)
			}
			if got := p.Connections(); got != 1 {
				t.Errorf("connections while frozen: got %d, want 1", got)
			}
			p.Thaw()
			mustGet(t, c, "k", "v")

			p.Refuse()
			mustGet(t, c, "k", "v") // over the connection that is there
			p.Cut()
			ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if _, err := c.Get(ctx, "k"); err == nil {
				t.Error("get through a cut proxy: got an answer, want none")
			}
			p.Accept()
			mustGet(t, c, "k", "v")
		})
	}
}

// A reset is an error to the peer, not the end of a stream.
func TestProxyCutResets(t *testing.T) {
	t.Parallel()
	p := etcdtest.NewProxy(t, etcdtest.Start(t).Endpoint())
	conn, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for deadline := time.Now().Add(5 * time.Second); p.Connections() == 0; {
		if time.Now().After(deadline) {
			t.Fatal("the proxy has not taken the connection after 5 s")
		}
	}
	p.Cut()
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1024)
	for err == nil {
		_, err = conn.Read(buf) // what etcd had sent before
	}
	if !strings.Contains(err.Error(), "reset") {
		t.Errorf("read after a cut: got %v, want a connection reset", err)
	}
}

// One client's connection fails and the other's does not.
func TestProxyOnly(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	direct := e.Client(t)
	p := etcdtest.NewProxy(t, e.Endpoint())
	reader := through(t, p)
	mustPut(t, reader, "k", "v")
	keys := watch(t.Context(), t, through(t, p))
	if w, kv, all := p.Count(etcdtest.WatchLinks), p.Count(etcdtest.KVLinks), p.Connections(); w != 1 || kv != 1 || all != 2 {
		t.Fatalf("links: got %d of watches and %d of reads among %d, want 1 and 1 among 2", w, kv, all)
	}

	p.Only(etcdtest.WatchLinks)
	p.Freeze()
	mustPut(t, direct, "w1", "v")
	mustGet(t, reader, "w1", "v")
	mustNotSee(t, keys)
	// The frozen link is another: what waits goes on, what did not waits.
	p.Only(etcdtest.KVLinks)
	mustSee(t, keys, "w1")
	if err := get(t, reader, "k"); !timedOut(err) {
		t.Errorf("get over a frozen link: got %v, want a deadline exceeded", err)
	}
	mustPut(t, direct, "w2", "v")
	mustSee(t, keys, "w2")
	p.Heal()
	mustGet(t, reader, "k", "v")

	p.Only(etcdtest.WatchLinks)
	p.Refuse()
	p.Cut()
	mustPut(t, direct, "w3", "v")
	mustGet(t, reader, "w3", "v")
	mustGet(t, through(t, p), "w3", "v") // on a new connection
	mustNotSee(t, keys)
	p.Accept()
	mustSee(t, keys, "w3")

	t.Run("one connection for both", func(t *testing.T) {
		p.Heal()
		both := through(t, p)
		keys := watch(t.Context(), t, both)
		mustGet(t, both, "k", "v")
		p.Only(etcdtest.WatchLinks)
		p.Freeze()
		if err := get(t, both, "k"); !timedOut(err) {
			t.Errorf("get over the frozen link of a watch: got %v, want a deadline exceeded", err)
		}
		p.Heal()
		mustPut(t, direct, "w4", "v")
		mustSee(t, keys, "w4")
	})

	t.Run("a call of many frames", func(t *testing.T) {
		p := etcdtest.NewProxy(t, e.Endpoint())
		ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), "pad", strings.Repeat("x", 50_000)))
		defer cancel()
		c := through(t, p)
		watch(ctx, t, c)
		if got := p.Count(etcdtest.WatchLinks); got != 1 {
			t.Errorf("links of watches: got %d, want 1", got)
		}
		// The calls after it are told apart as well.
		mustGet(t, c, "k", "v")
		if got := p.Count(etcdtest.KVLinks); got != 1 {
			t.Errorf("links of reads: got %d, want 1", got)
		}
	})
}

// What a proxy cannot see, it leaves alone, or all of it fails.
// What is stranded stays so; what comes after it is as good as new.
func TestProxyStrand(t *testing.T) {
	t.Parallel()
	p := etcdtest.NewProxy(t, etcdtest.Start(t).Endpoint())
	old := through(t, p)
	keys := watch(t.Context(), t, old)
	p.Strand()
	p.Thaw()
	next := through(t, p)
	later := watch(t.Context(), t, next)
	if _, err := next.Put(t.Context(), "w1", ""); err != nil {
		t.Fatalf("put through a new connection: %v", err)
	}
	mustSee(t, later, "w1")
	mustNotSee(t, keys)
	p.Cut() // the old client's next connection resumes
	mustSee(t, keys, "w1")
}

func TestProxyTLS(t *testing.T) {
	t.Parallel()
	e := etcdtest.StartTLS(t)
	p := etcdtest.NewProxy(t, e.Endpoint)
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{p.Endpoint()}, TLS: e.Files.ClientConfig.Clone(), Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	mustPut(t, e.Client(t, etcdtest.RootUser, etcdtest.RootPassword), "/keygate/x", "v")
	mustGet(t, c, "/keygate/x", "v")
	if got := p.Count(etcdtest.KVLinks); got != 0 {
		t.Errorf("links of reads over TLS: got %d, want 0", got)
	}
	p.Only(etcdtest.KVLinks)
	p.Freeze()
	mustGet(t, c, "/keygate/x", "v")
	p.Only(etcdtest.AllLinks)
	if err := get(t, c, "/keygate/x"); !timedOut(err) {
		t.Errorf("get over TLS, frozen: got %v, want a deadline exceeded", err)
	}
}

func TestProxyHalfOpen(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	direct := e.Client(t)
	p := etcdtest.NewProxy(t, e.Endpoint())
	c := through(t, p)
	keys := watch(t.Context(), t, c)
	put := func(key string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if _, err := c.Put(ctx, key, "v"); !timedOut(err) {
			t.Errorf("put over a half open link: got %v, want a deadline exceeded", err)
		}
	}
	p.FreezeAnswers()
	put("w1")
	mustGet(t, direct, "w1", "v")
	mustNotSee(t, keys)
	p.Thaw()
	mustSee(t, keys, "w1")

	p.FreezeRequests()
	put("w2")
	if r, err := direct.Get(t.Context(), "w2"); err != nil || len(r.Kvs) != 0 {
		t.Errorf("what was put over a link that is frozen towards etcd: got %v, %v, want nothing", r, err)
	}
	mustPut(t, direct, "w3", "v")
	mustSee(t, keys, "w3")
}

// A network that drops packets does not tell that the other side is gone.
func TestProxyFrozenHidesAnEnd(t *testing.T) {
	t.Parallel()
	e := etcdtest.StartProcess(t)
	p := etcdtest.NewProxy(t, e.Endpoint())
	c := through(t, p)
	mustPut(t, c, "k", "v")
	p.Freeze()
	e.Kill()
	if err := get(t, c, "k"); !timedOut(err) {
		t.Errorf("get through a frozen proxy from a killed etcd: got %v, want a deadline exceeded", err)
	}
	// A new connection would have no kind yet.
	if got := p.Count(etcdtest.KVLinks); got != 1 {
		t.Errorf("links of reads while frozen: got %d, want the one that was there", got)
	}
	p.Thaw()
	eventually(t, "the connection to end", func() bool { return p.Count(etcdtest.KVLinks) == 0 })
}

func TestProxySlow(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	direct := e.Client(t)
	p := etcdtest.NewProxy(t, e.Endpoint())
	c := through(t, p)
	const size = 20_000
	mustPut(t, direct, "big", strings.Repeat("x", size))
	took := func() time.Duration {
		t.Helper()
		began := time.Now()
		mustGet(t, c, "big", strings.Repeat("x", size))
		return time.Since(began)
	}
	took()
	fast := took()
	for _, test := range []struct {
		name       string
		begin, end func()
		least      time.Duration // what it must cost at least
	}{
		{"drip", func() { p.Drip(2 * size) }, func() { p.Drip(0) }, 450 * time.Millisecond},
		{"delay", func() { p.Delay(1, 50*time.Millisecond, 60*time.Millisecond) }, func() { p.Delay(0, 0, 0) }, 100 * time.Millisecond},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.begin()
			slow := took()
			p.Only(etcdtest.WatchLinks)
			spared := took()
			p.Only(etcdtest.AllLinks)
			test.end()
			t.Logf("a read of %d bytes takes %v, %v without and %v with only watches slow", size, slow, fast, spared)
			if slow < test.least || spared >= slow {
				t.Errorf("a read of %d bytes: got %v, and %v with only watches slow, want %v at least, and less", size, slow, spared, test.least)
			}
		})
	}
}

// A flipped bit is an error to the client or, without TLS, a wrong value.
func TestProxyCorrupt(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	p := etcdtest.NewProxy(t, e.Endpoint())
	c := through(t, p)
	value := strings.Repeat("x", 100_000)
	mustPut(t, e.Client(t), "big", value)
	mustGet(t, c, "big", value)
	p.Corrupt(len(value) / 4)
	wrong, failed := 0, 0
	eventually(t, "a wrong value and an error", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		r, err := c.Get(ctx, "big")
		switch {
		case err != nil:
			failed++
		case len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value:
			wrong++
		}
		return wrong > 0
	})
	t.Logf("%d wrong values and %d errors, with about 4 bits flipped a read", wrong, failed)
	p.Heal()
	p.Cut() // a broken stream need not end by itself
	mustGet(t, c, "big", value)
}

func TestProxyReset(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	p := etcdtest.NewProxy(t, e.Endpoint())
	c := through(t, p)
	keys := watch(t.Context(), t, through(t, p))
	mustPut(t, c, "k", "v")
	p.Only(etcdtest.KVLinks)
	p.Reset(1)
	if err := get(t, c, "k"); err == nil {
		t.Error("get over links that are reset: got an answer, want none")
	}
	p.Heal()
	mustPut(t, c, "w1", "v")
	mustSee(t, keys, "w1")
}

// Everything at once, from everywhere: a client that is served badly is served
// rightly, and well afterwards. Bits stay as they are.
func TestProxyConcurrent(t *testing.T) {
	t.Parallel()
	e := etcdtest.Start(t)
	p := etcdtest.NewProxy(t, e.Endpoint())
	c := through(t, p)
	keys := watch(t.Context(), t, through(t, p))
	mustPut(t, c, "k", "v")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var all sync.WaitGroup
	for _, change := range []func(){
		p.Freeze, p.FreezeAnswers, p.FreezeRequests, p.Thaw, p.Thaw, p.Cut, p.Refuse, p.Accept, p.Heal,
		func() { p.Only(etcdtest.WatchLinks) }, func() { p.Only(etcdtest.KVLinks | etcdtest.LeaseLinks) }, func() { p.Only(etcdtest.AllLinks) },
		func() { p.Delay(0.05, 0, 500*time.Millisecond) }, func() { p.Drip(1000) }, func() { p.Reset(0.01) }, func() { p.Connections() },
	} {
		all.Go(func() {
			for ctx.Err() == nil {
				change()
				time.Sleep(rand.N(20 * time.Millisecond))
			}
		})
	}
	for ctx.Err() == nil {
		one, done := context.WithTimeout(ctx, 50*time.Millisecond)
		if r, err := c.Get(one, "k"); err == nil && (len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "v") {
			t.Errorf("get: got %v, want %q", r.Kvs, "v")
		}
		done()
	}
	all.Wait()
	p.Heal()
	mustGet(t, c, "k", "v")
	mustPut(t, c, "w1", "v")
	mustSee(t, keys, "w1")
}
