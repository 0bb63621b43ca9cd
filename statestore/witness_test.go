package statestore_test

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dgraph-io/ristretto/v2"

	"keygate/authz"
	"keygate/statestore"
	"keygate/statestore/keyspace"
	"keygate/statestore/storetest"
)

// The four witnesses: interleavings in which a cache that trusts ristretto
// stays wrong. Each is played twice by hand, once on the scheme that it breaks
// and once on the Store; none depends on luck.

// entry is what the naive schemes cache.
type entry struct {
	rev    int64
	status string
}

// stall is a ristretto configuration whose one processing goroutine can be
// stopped between two items: it calls Cost for an item of cost 0.
type stall struct{ gates chan chan struct{} }

func newStall() stall { return stall{make(chan chan struct{}, 8)} }

func (s stall) wait() { <-<-s.gates }

// stop queues an item at which processing stops until release is called.
func stop[V any](s stall, c *ristretto.Cache[uint64, V]) (release func()) {
	gate := make(chan struct{})
	s.gates <- gate
	var none V
	c.Set(^uint64(0)-uint64(len(s.gates)), none, 0)
	return sync.OnceFunc(func() { close(gate) })
}

func naiveCache(t *testing.T, s stall) *ristretto.Cache[uint64, entry] {
	t.Helper()
	c, err := ristretto.NewCache(&ristretto.Config[uint64, entry]{
		NumCounters: 1000, MaxCost: 1000, BufferItems: 64, IgnoreInternalCost: true,
		Cost: func(entry) int64 { s.wait(); return 1 },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// holding is a Store over a fake, with a stallable cache and one approved key.
type holding struct {
	*storetest.Fake
	storetest.Cluster
	stall
	t     *testing.T
	store *statestore.Store
	key   keyspace.Record
}

func hold(t *testing.T, onCall func()) *holding {
	t.Helper()
	f := storetest.NewFake()
	h := &holding{Fake: f, stall: newStall(), t: t, key: keyspace.KeyRecord(storetest.Org, storetest.Key),
		Cluster: storetest.Cluster{Backend: f, Put: f.Put, Delete: f.Delete}}
	var err error
	h.store, err = statestore.New(statestore.Config{Backend: f, Space: storetest.Space, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	ours, err := statestore.NewCache(h.stall.wait, onCall)
	if err != nil {
		t.Fatal(err)
	}
	h.store.UseCache(ours)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = h.store.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	h.PutApp()
	h.PutKey(storetest.Key)
	if err := h.store.Await(t.Context()); err != nil {
		t.Fatal(err)
	}
	// App and developer are cached before anything stalls.
	for _, r := range []keyspace.Record{keyspace.AppRecord(storetest.Org, storetest.App), keyspace.DeveloperRecord(storetest.Org, storetest.Developer)} {
		if err := h.store.Fill(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	ours.Wait()
	return h
}

func (h *holding) check() authz.Reason {
	a := authz.Authorizer{Source: h.store}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return a.Decide(ctx, authz.Request{Organization: storetest.Org, KeyID: storetest.Key, Products: []authz.ProductName{storetest.Weather}}).Reason
}

func (h *holding) want(want authz.Reason) {
	h.t.Helper()
	if got := h.check(); got != want {
		h.t.Fatalf("check answered %v, want %v", got, want)
	}
}

// revoke revokes the key and returns once that is applied.
func (h *holding) revoke() int64 {
	h.t.Helper()
	rev := h.Fake.Put(storetest.Space.Status(h.key), "revoked")
	h.until("the revocation is applied", func() bool { return h.store.Status().AppliedRevision >= rev })
	return rev
}

func (h *holding) until(what string, ok func() bool) {
	h.t.Helper()
	for end := time.Now().Add(5 * time.Second); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			h.t.Fatalf("not within 5 s: %s", what)
		}
	}
}

// cached returns the revision that the cache holds of the key; 0 for nothing.
func (h *holding) cached() int64 {
	r, _ := h.store.Cache().Get(h.store.Hash(h.key))
	return statestore.Rev(r)
}

// Two Sets of a key that is not stored yet: the second is dropped although both
// returned true.
func TestWitnessNewerSetIsLost(t *testing.T) {
	t.Run("a watcher that Sets", func(t *testing.T) {
		s := newStall()
		c := naiveCache(t, s)
		release := stop(s, c)
		loaded := c.Set(1, entry{10, "approved"}, 1) // by a load
		watched := c.Set(1, entry{11, "revoked"}, 1) // by the watcher
		release()
		c.Wait()
		if got, _ := c.Get(1); !loaded || !watched || got.rev != 10 {
			t.Fatalf("Sets answered %v, %v and the cache holds %+v; the witness wants true, true and the older value", loaded, watched, got)
		}
	})
	t.Run("validate on read", func(t *testing.T) {
		h := hold(t, nil)
		release := stop(h.stall, h.store.Cache())
		defer release()
		h.want(authz.Allowed)
		rev := h.revoke()
		h.want(authz.KeyRevoked)
		release()
		h.store.Cache().Wait()
		if got := h.cached(); got == 0 || got >= rev {
			t.Fatalf("the cache holds revision %d; the witness wants one before the revocation at %d", got, rev)
		}
		h.want(authz.KeyRevoked)
	})
}

// A loader compares, is overtaken by the watcher's [mark, Del, Wait, applied],
// and only then Sets.
func TestWitnessLateSet(t *testing.T) {
	t.Run("mark, Del and Wait", func(t *testing.T) {
		c := naiveCache(t, newStall())
		fence, applied := int64(0), int64(0)
		loaded := entry{10, "approved"}
		if loaded.rev < fence { // the loader's comparison
			t.Fatal("compared wrongly")
		}
		fence = 11 // the watcher: mark, Del, Wait, applied
		c.Del(1)
		c.Wait()
		applied = fence
		c.Set(1, loaded, 1) // the loader goes on
		c.Wait()
		if got, _ := c.Get(1); got.status != "approved" || applied != 11 {
			t.Fatalf("the cache holds %+v; the witness wants the approval, for ever", got)
		}
	})
	t.Run("validate on read", func(t *testing.T) {
		h := hold(t, nil)
		h.want(authz.Allowed)
		h.store.Cache().Wait()
		old, _ := h.store.Cache().Get(h.store.Hash(h.key))
		rev := h.revoke()
		h.store.Cache().Del(h.store.Hash(h.key))
		h.store.Cache().Wait()
		h.store.Cache().Set(h.store.Hash(h.key), old, 1)
		h.store.Cache().Wait()
		if got := h.cached(); got == 0 || got >= rev {
			t.Fatalf("the cache holds revision %d; the witness wants the late one, before %d", got, rev)
		}
		for range 3 {
			h.want(authz.KeyRevoked)
		}
	})
}

// Del deletes at once, and again when its item is processed. A Set that was
// queued before is stored, and readable, in between.
func TestWitnessReadBetweenTwoDeletes(t *testing.T) {
	t.Run("Del without Wait", func(t *testing.T) {
		s := newStall()
		c := naiveCache(t, s)
		first := stop(s, c)
		c.Set(1, entry{10, "approved"}, 1) // by a load
		second := stop(s, c)
		defer second()
		c.Del(1) // by the watcher, which has now applied 11
		first()
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Microsecond) {
			if got, ok := c.Get(1); ok && got.rev == 10 {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the deleted value never came back; the witness wants it to")
			}
		}
	})
	t.Run("validate on read", func(t *testing.T) {
		h := hold(t, nil)
		first := stop(h.stall, h.store.Cache())
		defer first()
		h.want(authz.Allowed)
		second := stop(h.stall, h.store.Cache())
		defer second()
		rev := h.revoke()
		h.store.Cache().Del(h.store.Hash(h.key))
		first()
		h.until("the old record is readable again", func() bool { return h.cached() > 0 })
		if got := h.cached(); got >= rev {
			t.Fatalf("the cache holds revision %d, the witness wants one before %d", got, rev)
		}
		h.want(authz.KeyRevoked)
	})
}

// A check that begins after the revocation was applied shares a load that read
// before it.
func TestWitnessJoinedLoad(t *testing.T) {
	t.Run("singleflight without a second look", func(t *testing.T) {
		type flight struct {
			done chan struct{}
			rec  entry
		}
		f := &flight{done: make(chan struct{}), rec: entry{10, "approved"}} // has read, not answered yet
		applied := int64(11)                                                // the watcher
		got := make(chan entry)
		go func() { <-f.done; got <- f.rec }() // a check that begins now joins
		close(f.done)
		if r := <-got; r.rev >= applied {
			t.Fatalf("the joiner got %+v; the witness wants the approval of before", r)
		}
	})
	t.Run("validate on read, overtaken in the network", func(t *testing.T) {
		h := hold(t, nil)
		read, answer := make(chan struct{}), make(chan struct{})
		var once sync.Once
		h.AfterRead(func(prefixes []string) {
			if prefixes[0] == storetest.Space.Folder(h.key) {
				once.Do(func() { close(read); <-answer })
			}
		})
		h.joins(read, answer)
	})
	t.Run("validate on read, overtaken after its comparison", func(t *testing.T) {
		// The cache is called next when the load has compared and Sets.
		read, answer := make(chan struct{}), make(chan struct{})
		var armed atomic.Bool
		h := hold(t, func() {
			if armed.CompareAndSwap(true, false) {
				close(read)
				<-answer
			}
		})
		var once sync.Once
		h.AfterRead(func(prefixes []string) {
			if prefixes[0] == storetest.Space.Folder(h.key) {
				once.Do(func() { armed.Store(true) })
			}
		})
		h.joins(read, answer)
	})
}

// joins starts a check, revokes while its load is held at read, starts another
// check and lets the load end.
func (h *holding) joins(read, answer chan struct{}) {
	h.t.Helper()
	first, second := make(chan authz.Reason, 1), make(chan authz.Reason, 1)
	go func() { first <- h.check() }()
	<-read
	release := sync.OnceFunc(func() { close(answer) })
	defer release() // whatever fails, the load must end
	h.revoke()
	joined := h.store.Status().Joined
	go func() { second <- h.check() }()
	h.until("the second check has joined", func() bool { return h.store.Status().Joined > joined })
	release()
	if got := <-second; got != authz.KeyRevoked {
		h.t.Errorf("the check that began after the revocation answered %v, want key_revoked", got)
	}
	// The first began before the revocation: either answer is right.
	if got := <-first; got != authz.KeyRevoked && got != authz.Allowed {
		h.t.Errorf("the check that began before answered %v", got)
	}
}
