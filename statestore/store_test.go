package statestore_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"keygate/authz"
	"keygate/statestore"
	"keygate/statestore/keyspace"
	"keygate/statestore/storetest"
)

// Stories that only a fake can tell: etcd shows these faults by chance.

type world struct {
	*storetest.Fake
	t     testing.TB
	store *statestore.Store
	key   keyspace.Record
	stop  func()
}

// begin runs a store over a fake that holds the sample key, approved.
func begin(t testing.TB, change func(*statestore.Config)) *world {
	t.Helper()
	w := &world{Fake: storetest.NewFake(), t: t, key: keyspace.KeyRecord(storetest.Org, storetest.Key)}
	c := storetest.Cluster{Put: w.Put}
	c.PutApp()
	c.PutKey(storetest.Key)
	cfg := statestore.Config{Backend: w.Fake, Space: storetest.Space, StalenessBudget: statestore.MinStalenessBudget}
	if t, ok := t.(*testing.T); ok {
		cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if w.store, err = statestore.New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.store.Run(ctx)
	}()
	w.stop = sync.OnceFunc(func() { w.Thaw(); cancel(); <-done })
	t.Cleanup(w.stop)
	if err := w.store.Await(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) decide(ctx context.Context, id authz.KeyID) authz.Decision {
	a := authz.Authorizer{Source: w.store}
	return a.Decide(ctx, authz.Request{Organization: storetest.Org, KeyID: id, Products: []authz.ProductName{storetest.Weather}})
}

func (w *world) want(want authz.Reason) {
	w.t.Helper()
	if d := w.decide(w.t.Context(), storetest.Key); d.Reason != want {
		w.t.Fatalf("check answered %v (%s), want %v", d.Reason, d.Problem, want)
	}
}

func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(8 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("not within 8 s: %s; status %+v", what, w.store.Status())
		}
	}
}

func (w *world) applied(rev int64) {
	w.t.Helper()
	w.until(fmt.Sprint("revision applied: ", rev), func() bool { return w.store.Status().AppliedRevision >= rev })
}

func (w *world) cached() {
	w.t.Helper()
	w.until("all records cached", func() bool {
		misses := w.store.Status().Misses
		w.want(authz.Allowed)
		return w.store.Status().Misses == misses
	})
}

// The connection of the watch has died unseen while reads go on: a new watch
// takes over before the proof ends, and delivers what the old one kept.
func TestSilentWatchIsReplaced(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.cached()
	w.Silence()
	rev := w.Put(storetest.Space.Status(w.key), "revoked")
	w.until("the watch is replaced", func() bool { return w.store.Status().Replaced > 0 })
	w.applied(rev)
	w.want(authz.KeyRevoked)
	if err := w.store.Fresh(); err != nil {
		t.Errorf("Fresh = %v, want the proof never to have ended", err)
	}
}

// Progress that is asked for and never answered, while the revision moves on,
// proves nothing: the proofs end.
func TestNoProgressNoProof(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.DropProgress(true)
	w.Put("/elsewhere", "an event that the watch does not deliver")
	w.until("stale", func() bool { return w.store.Fresh() != nil })
	w.want(authz.Stale)
	if p := w.store.Status().Problem; !strings.Contains(p, "grpc-proxy") {
		t.Errorf("problem %q, want it to name the usual cause", p)
	}
	w.DropProgress(false)
	w.until("fresh again", func() bool { return w.store.Fresh() == nil })
	w.want(authz.Allowed)
}

// An older copy of the data put back under the same address: whatever gives it
// away, nothing known before is used again.
func TestRestore(t *testing.T) {
	t.Parallel()
	for name, as := range map[string]struct{ cluster, term uint64 }{
		"the revision fell":      {1, 2},
		"the raft term fell":     {1, 1},
		"the cluster is another": {9, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := begin(t, nil)
			old := w.Copy()
			// Then the records are read at a revision that the copy has not, while
			// none of their keys has changed.
			var last int64
			for range 5 {
				last = w.Put("/elsewhere", "x")
			}
			w.applied(last)
			w.cached()
			if as.term == 1 || as.cluster != 1 {
				for range 9 { // the copy has moved on beyond the revision applied here
					old.Put("/elsewhere", "x")
				}
			}
			old.Put(storetest.Space.Status(w.key), "revoked")
			w.Restore(old, as.cluster, as.term)
			w.until("new epoch", func() bool { return w.store.Status().Epoch == 2 })
			w.until("fresh", func() bool { return w.store.Fresh() == nil })
			w.want(authz.KeyRevoked)
		})
	}
}

// A load meets another cluster before the probe does.
func TestRestoreSeenByLoad(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.Restore(storetest.NewFake(), 9, 2)
	if d := w.decide(t.Context(), storetest.Key); d.Allowed() {
		t.Fatalf("allowed by another cluster's history: %+v", d)
	}
	w.until("new epoch", func() bool { return w.store.Status().Epoch == 2 && w.store.Fresh() == nil })
	w.want(authz.KeyUnknown)
}

// The watch has a connection of its own. Another cluster at its other end is
// seen by the first thing that it says, not by the next probe: what is approved
// there opens nothing here.
func TestForeignEvents(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.cached()
	w.applied(w.Put(storetest.Space.Status(w.key), "revoked"))
	w.want(authz.KeyRevoked)
	for probes := w.store.Status().Probes; w.store.Status().Probes == probes; time.Sleep(100 * time.Microsecond) {
	}
	w.Restore(w.Copy(), 99, 2) // at the same revision, right after a probe
	w.Put(storetest.Space.Status(w.key), "approved")
	w.until("new epoch", func() bool {
		if w.store.Status().Epoch == 1 && w.decide(t.Context(), storetest.Key).Allowed() && w.store.Status().Epoch == 1 {
			t.Fatal("allowed by an event of another cluster")
		}
		return w.store.Status().Epoch == 2 && w.store.Fresh() == nil
	})
	if n := w.store.Status().CaughtUp; n != 1 { // by the revocation
		t.Errorf("%d records caught up, want 1", n)
	}
}

// A load has read beyond what the watch has applied when an older copy is put
// back: at or after the applied revision, before the one that was read. What was
// read is of another history, and no event of this one would ever touch it.
func TestRestoreBetweenAppliedAndRead(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.cached()
	old := w.Copy()
	w.Hold(true)
	for range 5 {
		w.Put(storetest.Space.Status(keyspace.AppRecord(storetest.Org, "other")), "approved")
	}
	lost := storetest.KeyID("a-key-that-is-not-in-the-copy")
	storetest.Cluster{Put: w.Put}.PutKey(lost)
	if d := w.decide(t.Context(), lost); !d.Allowed() {
		t.Fatalf("answered %v (%s), want allowed by a read", d.Reason, d.Problem)
	}
	w.Restore(old, 1, 2)
	w.Hold(false)
	w.until("new epoch", func() bool { return w.store.Status().Epoch == 2 && w.store.Fresh() == nil })
	if d := w.decide(t.Context(), lost); d.Reason != authz.KeyUnknown {
		t.Errorf("a key of the lost history was answered %v, want key_unknown", d.Reason)
	}
}

// Whoever goes on asking with a key that was deleted, or whose app does not
// exist, is answered from memory.
func TestAbsentRecordsAreCached(t *testing.T) {
	t.Parallel()
	for name, remove := range map[string]func(*world) []string{
		"key": func(w *world) []string {
			return []string{storetest.Space.Status(w.key), storetest.Space.Details(w.key), storetest.Space.KeyProduct(w.key, storetest.Weather)}
		},
		"app": func(*world) []string {
			app := keyspace.AppRecord(storetest.Org, storetest.App)
			return []string{storetest.Space.Status(app), storetest.Space.Details(app)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := begin(t, nil)
			w.cached()
			var last int64
			for _, key := range remove(w) {
				last = w.Delete(key)
			}
			w.applied(last)
			w.until("refused from memory", func() bool {
				loads := w.store.Status().Loads
				for range 100 {
					if d := w.decide(t.Context(), storetest.Key); d.Allowed() {
						t.Fatalf("answered %v", d.Reason)
					}
				}
				return w.store.Status().Loads == loads
			})
		})
	}
}

// Checks go on while the store stops: refused, and never a panic of ristretto.
func TestStopBesideChecks(t *testing.T) {
	for range 20 {
		w := begin(t, func(c *statestore.Config) { c.FenceSlots = 1024 })
		var stopped atomic.Bool
		var others sync.WaitGroup
		for range 4 {
			others.Go(func() {
				for !stopped.Load() {
					w.decide(context.Background(), storetest.Key)
				}
			})
		}
		others.Go(func() {
			for !stopped.Load() {
				w.Put(storetest.Space.Status(w.key), "approved")
			}
		})
		w.until("some checks", func() bool { return w.store.Status().Hits > 100 })
		w.stop()
		stopped.Store(true)
		others.Wait()
		w.want(authz.Stale)
	}
}

// A load that has seen a change which the watch has not delivered yet: the
// other records may lack what came before it. The check waits, or reads all in
// one transaction; a yes that no single revision justifies is not given.
func TestLoadAheadOfWatch(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.cached()
	app := keyspace.AppRecord(storetest.Org, storetest.App)
	// Another key of the same app, not loaded yet.
	other := storetest.KeyID("another-key-0123456789")
	c := storetest.Cluster{Put: w.Put}
	c.PutKey(other)
	w.applied(w.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, other)), "revoked"))

	w.Hold(true) // events are on their way
	w.Put(storetest.Space.Status(app), "revoked")
	w.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, other)), "approved")
	// The key is read as approved, the app is cached as approved: never both.
	if d := w.decide(t.Context(), other); d.Reason != authz.AppRevoked {
		t.Errorf("check answered %v (%s), want app_revoked: key and app were never approved together", d.Reason, d.Problem)
	}
	if n := w.store.Status().Snapshots; n == 0 {
		t.Error("no transaction over all records, want one")
	}
	// With the events coming in time the check only waits.
	release := time.AfterFunc(10*time.Millisecond, func() { w.Hold(false) })
	defer release.Stop()
	if d := w.decide(t.Context(), other); d.Reason != authz.AppRevoked {
		t.Errorf("check answered %v, want app_revoked", d.Reason)
	}
}

// The header of a response with events carries the current revision, however
// many events are still to come: it is not how far the watch has come.
func TestHeaderIsNotProgress(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.cached()
	w.Hold(true)
	first := w.Put(storetest.Space.Status(keyspace.AppRecord(storetest.Org, storetest.App)), "approved")
	w.Put(storetest.Space.Status(w.key), "revoked")
	w.Step()
	w.applied(first)
	if got := w.store.Status().AppliedRevision; got != first {
		t.Errorf("applied revision %d after the event at %d of two, want %d", got, first, first)
	}
}

// ristretto compares nothing but 64 bits: a cached record is used only for the
// key that it is of.
func TestHashCollision(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.cached()
	good, _ := w.store.Cache().Get(w.store.Hash(w.key))
	other := keyspace.KeyRecord(storetest.Org, storetest.KeyID("another-key-0123456789"))
	w.store.Cache().Set(w.store.Hash(other), good, 1)
	w.store.Cache().Wait()
	if d := w.decide(t.Context(), other.Key); d.Reason != authz.KeyUnknown {
		t.Errorf("a key whose hash finds another's record was answered %v, want key_unknown", d.Reason)
	}
	if d := w.decide(t.Context(), storetest.Key); !d.Allowed() {
		t.Errorf("the other key was answered %v, want allowed", d.Reason)
	}
}

// A caller that hangs up does not fail the load that others wait for, and a
// caller with a deadline gets its refusal before it.
func TestLoadOutlivesItsCaller(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	read, answer := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.AfterRead(func(prefixes []string) {
		if strings.Contains(prefixes[0], "/keys/") {
			once.Do(func() { close(read); <-answer })
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	second := make(chan authz.Decision, 1)
	go func() {
		<-read
		second <- w.decide(context.Background(), storetest.Key)
	}()
	d := w.decide(ctx, storetest.Key)
	if d.Reason != authz.Stale || ctx.Err() != nil {
		t.Errorf("answered %v, deadline passed: %v; want stale before the deadline", d.Reason, ctx.Err())
	}
	w.until("the second has joined", func() bool { return w.store.Status().Joined > 0 })
	close(answer)
	if d := <-second; !d.Allowed() {
		t.Errorf("the second caller was answered %v (%s), want allowed", d.Reason, d.Problem)
	}
}

// Reads that fail refuse what is not cached, and nothing else, until the proof
// ends.
func TestReadsFail(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.cached()
	w.FailReads(errors.New("etcdserver: no leader"))
	w.want(authz.Allowed)
	d := w.decide(t.Context(), storetest.KeyID("never-seen-0123456789"))
	if d.Reason != authz.Stale || !strings.Contains(d.Problem, "no leader") {
		t.Errorf("answered %v (%s), want stale with etcd's words", d.Reason, d.Problem)
	}
	w.until("stale", func() bool { return w.store.Fresh() != nil })
	w.want(authz.Stale)
	w.FailReads(nil)
	w.until("fresh", func() bool { return w.store.Fresh() == nil })
	w.want(authz.Allowed)
}

// Without a leader a record that must be read is read from one member, and used
// only if it is not older than what the watch has applied.
func TestLoadWithoutLeader(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	other := authz.KeyID{7}
	storetest.Cluster{Put: w.Put}.PutKey(other)
	w.applied(w.Put("/keygate/.barrier-of-the-test", "")) // so that all of it is applied
	w.Leaderless(true)
	if d := w.decide(t.Context(), other); d.Reason != authz.Allowed {
		t.Fatalf("a key that was never read: got %v (%s), want allowed", d.Reason, d.Problem)
	}
	if got := w.store.Status().LocalLoads; got == 0 {
		t.Error("no load was local: the test is not about one")
	}
	// Two changes that the member does not have: the event alone does not do.
	w.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, other)), "approved")
	w.applied(w.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, other)), "revoked"))
	if d := w.decide(t.Context(), other); d.Reason != authz.Stale {
		t.Errorf("revoked, and the member does not know: got %v (%s), want stale", d.Reason, d.Problem)
	}
	w.Leaderless(false)
	w.until("the revocation to be read", func() bool { return w.decide(t.Context(), other).Reason == authz.KeyRevoked })
}

// A revocation with a barrier beside it takes effect without a read, as one
// without does.
func TestCaughtUpBesideBarrier(t *testing.T) {
	t.Parallel()
	w := begin(t, nil)
	w.cached()
	w.FailReads(errors.New("etcdserver: no leader"))
	w.applied(w.PutAll(storetest.Space.Status(w.key), "revoked", storetest.Space.Barrier(storetest.Org), "x"))
	w.want(authz.KeyRevoked)
	w.applied(w.PutAll("/keygate/another/.barrier", "x", storetest.Space.Status(w.key), "approved", storetest.Space.Barrier(storetest.Org), "x"))
	w.want(authz.Allowed)
}

// Keys nobody knows are shed above the rate, and take nothing from the keys
// that are known, not even when all of those must load again.
func TestUnknownKeysAreShed(t *testing.T) {
	t.Parallel()
	w := begin(t, func(c *statestore.Config) { c.UnknownLoadsPerSecond = 10 })
	w.cached()
	before := w.store.Status().Loads
	shed := 0
	for i := range 1000 {
		switch d := w.decide(t.Context(), storetest.KeyID(fmt.Sprintf("junk-%016d", i))); d.Reason {
		case authz.Overloaded:
			shed++
		case authz.KeyUnknown:
		default:
			t.Fatalf("answered %v (%s), want overloaded or key_unknown", d.Reason, d.Problem)
		}
	}
	if n := w.store.Status().Loads - before; n > 20 || shed < 980 {
		t.Errorf("1000 unknown keys caused %d loads, %d were shed; want about 10 loads", n, shed)
	}
	w.applied(w.Put(storetest.Space.Status(w.key), "approved")) // must load again
	w.want(authz.Allowed)
}

// The slots of known records and of unknown keys are apart.
func TestKnownRecordsHaveTurnsOfTheirOwn(t *testing.T) {
	t.Parallel()
	w := begin(t, func(c *statestore.Config) { c.Loads = 1 })
	w.cached()
	reading, stuck := make(chan struct{}), make(chan struct{})
	var once sync.Once
	junk := storetest.KeyID("junk-0123456789abcdef")
	w.AfterRead(func(prefixes []string) {
		if strings.Contains(prefixes[0], junk.String()) {
			once.Do(func() { close(reading) })
			<-stuck
		}
	})
	var callers sync.WaitGroup
	defer callers.Wait()
	defer close(stuck)
	callers.Go(func() { w.decide(context.Background(), junk) })
	<-reading
	if d := w.decide(t.Context(), storetest.KeyID("junk-two-0123456789")); d.Reason != authz.Overloaded {
		t.Errorf("second unknown key answered %v, want overloaded: the one turn is taken", d.Reason)
	}
	// Nor does a caller with little time hear that the state is not proven.
	hasty, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if d := w.decide(hasty, storetest.KeyID("junk-three-0123456789")); d.Reason != authz.Overloaded {
		t.Errorf("an unknown key with 20 ms answered %v, want overloaded: the one turn is taken", d.Reason)
	}
	w.applied(w.Put(storetest.Space.Status(w.key), "approved"))
	w.want(authz.Allowed)
}

// Two records in one slot cost each other loads, never a wrong answer.
func TestOneFenceSlot(t *testing.T) {
	t.Parallel()
	w := begin(t, func(c *statestore.Config) { c.FenceSlots = 1 })
	other := storetest.KeyID("another-key-0123456789")
	storetest.Cluster{Put: w.Put}.PutKey(other)
	w.applied(w.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, other)), "approved"))
	w.cached()
	w.applied(w.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, other)), "revoked"))
	w.want(authz.Allowed)
	if d := w.decide(t.Context(), other); d.Reason != authz.KeyRevoked {
		t.Errorf("answered %v, want key_revoked", d.Reason)
	}
	w.want(authz.Allowed)
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*statestore.Config){
		"no backend":         func(c *statestore.Config) { c.Backend = nil },
		"no space":           func(c *statestore.Config) { c.Space = keyspace.Space{} },
		"a budget too short": func(c *statestore.Config) { c.StalenessBudget = statestore.MinStalenessBudget - 1 },
		"a budget too long":  func(c *statestore.Config) { c.StalenessBudget = statestore.MaxStalenessBudget + 1 },
		"slots":              func(c *statestore.Config) { c.FenceSlots = 3 },
		"negative slots":     func(c *statestore.Config) { c.FenceSlots = -8 },
		"a negative cache":   func(c *statestore.Config) { c.CacheBytes = -1 },
		"negative loads":     func(c *statestore.Config) { c.Loads = -1 },
		"a negative rate":    func(c *statestore.Config) { c.UnknownLoadsPerSecond = -1 },
	} {
		cfg := statestore.Config{Backend: storetest.NewFake(), Space: storetest.Space}
		change(&cfg)
		if _, err := statestore.New(cfg); err == nil {
			t.Errorf("%s: New accepted %+v", name, cfg)
		}
	}
}

// Run leaves nothing behind, and the store refuses afterwards.
func TestRunLeavesNothing(t *testing.T) {
	before := goleak.IgnoreCurrent()
	w := begin(t, nil)
	w.want(authz.Allowed)
	w.stop()
	w.want(authz.Stale)
	goleak.VerifyNone(t, before)
}

func BenchmarkCachedRead(b *testing.B) {
	w := begin(b, nil)
	w.cached()
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := w.store.Records(ctx, storetest.Org, storetest.Key); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCheck is the whole decision, from the consumer key on.
func BenchmarkCheck(b *testing.B) {
	w := begin(b, nil)
	w.cached()
	a := authz.Authorizer{Source: w.store}
	ctx, products := b.Context(), []authz.ProductName{storetest.Weather}
	b.ReportAllocs()
	for b.Loop() {
		key, _ := authz.ParseConsumerKey("giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb")
		if d := a.Decide(ctx, authz.Request{Organization: storetest.Org, KeyID: key.ID(), Products: products}); !d.Allowed() {
			b.Fatal(d.Reason)
		}
	}
}
