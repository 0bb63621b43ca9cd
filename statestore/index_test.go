package statestore_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"keygate/authz"
	"keygate/statestore"
	"keygate/statestore/keyspace"
	"keygate/statestore/storetest"
)

func withIndex(records int) func(*statestore.Config) {
	return func(c *statestore.Config) { c.IndexRecords = records }
}

func (w *world) indexed() {
	w.t.Helper()
	w.until("the index is complete", func() bool { return w.store.Status().Index == statestore.IndexReady })
}

// With a complete index neither keys that exist nor keys that do not cost a read.
func TestIndexAnswersWithoutReads(t *testing.T) {
	t.Parallel()
	w := begin(t, withIndex(100))
	w.indexed()
	before := w.store.Status()
	w.want(authz.Allowed)
	for i := range 1000 {
		if d := w.decide(t.Context(), storetest.KeyID(fmt.Sprintf("junk-%016d", i))); d.Reason != authz.KeyUnknown {
			t.Fatalf("a key nobody knows was answered %v, want key_unknown", d.Reason)
		}
	}
	w.applied(w.Put(storetest.Space.Status(w.key), "revoked"))
	w.want(authz.KeyRevoked)
	if after := w.store.Status(); after.Loads != before.Loads || after.Misses != before.Misses || after.Indexed-before.Indexed != 1002 {
		t.Errorf("%d loads, %d misses, %d answers of the index; want 0, 0, 1002",
			after.Loads-before.Loads, after.Misses-before.Misses, after.Indexed-before.Indexed)
	}
}

// Until it is complete, checks are read through, and changes beside the list are
// in it.
func TestIndexWhileListed(t *testing.T) {
	t.Parallel()
	w := begin(t, func(c *statestore.Config) {
		c.IndexRecords = 100
		f := c.Backend.(*storetest.Fake)
		first := true
		f.OnList(func() {
			if first { // of the first part: the list is older than all of this
				first = false
				f.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, storetest.Key)), "revoked")
				f.Delete(storetest.Space.Status(keyspace.AppRecord(storetest.Org, storetest.App)))
				f.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, authz.KeyID{7})), "approved")
				time.Sleep(50 * time.Millisecond)
			}
		})
	})
	w.want(authz.KeyRevoked) // read through
	if st := w.store.Status(); st.Index != statestore.IndexLoading && st.Index != statestore.IndexReady {
		t.Errorf("the index is %s", st.Index)
	}
	w.indexed()
	w.want(authz.KeyRevoked)
	w.applied(w.Put(storetest.Space.Status(w.key), "approved"))
	if d := w.decide(t.Context(), storetest.Key); d.Reason != authz.RecordUnreadable {
		t.Errorf("answered %v, want record_unreadable: the app's status was deleted beside the list", d.Reason)
	}
	if d := w.decide(t.Context(), authz.KeyID{7}); d.Reason != authz.RecordUnreadable {
		t.Errorf("a key made beside the list was answered %v, want record_unreadable", d.Reason)
	}
}

// More records than the index may hold are no fault: all are read through.
func TestIndexOverTheLimit(t *testing.T) {
	t.Parallel()
	for name, records := range map[string]int{"by the list": 2, "by a change": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := begin(t, withIndex(records))
			if records == 3 {
				w.indexed()
				w.applied(storetest.Cluster{Put: w.Put}.PutKey(storetest.KeyID("one-key-too-many-0123")))
			}
			w.until("the index is given up", func() bool { return w.store.Status().Index == statestore.IndexFull })
			w.want(authz.Allowed)
			w.applied(w.Put(storetest.Space.Status(w.key), "revoked"))
			w.want(authz.KeyRevoked)
			if st := w.store.Status(); st.Index != statestore.IndexFull || st.IndexRecords != 0 {
				t.Errorf("status %s with %d records, want it given up for good", st.Index, st.IndexRecords)
			}
		})
	}
}

// After a gap nothing of the old index answers, and another is made.
func TestIndexAfterGap(t *testing.T) {
	t.Parallel()
	w := begin(t, withIndex(100))
	w.indexed()
	w.Hold(true)
	w.Put(storetest.Space.Status(w.key), "revoked")
	w.Put("/elsewhere", "x")
	w.Compact()
	var listing bool
	w.OnList(func() { listing = true; time.Sleep(20 * time.Millisecond) })
	w.Hold(false)
	w.until("the gap", func() bool { return w.store.Status().Gaps > 0 })
	for w.store.Status().Index != statestore.IndexReady {
		if d := w.decide(t.Context(), storetest.Key); d.Allowed() {
			t.Fatal("allowed after the gap")
		}
	}
	w.want(authz.KeyRevoked)
	if !listing {
		t.Error("no list was read after the gap")
	}
}

// A list that fails is asked for again, and checks go on meanwhile.
func TestIndexListFails(t *testing.T) {
	t.Parallel()
	failures := 2
	w := begin(t, func(c *statestore.Config) {
		c.IndexRecords = 100
		c.Backend = failingLists{c.Backend.(*storetest.Fake), &failures}
	})
	w.want(authz.Allowed)
	w.indexed()
	w.want(authz.Allowed)
	if failures != 0 {
		t.Errorf("%d failures left: the index was made of a list that failed", failures)
	}
}

// Without the guards in update, an event that comes again, older than what the
// index holds, would bring an approval back.
func TestIndexRepeatedEvent(t *testing.T) {
	t.Parallel()
	w := begin(t, withIndex(100))
	w.indexed()
	old := w.Put(storetest.Space.Status(w.key), "approved")
	w.applied(w.Put(storetest.Space.Status(w.key), "revoked"))
	w.Repeat(old)
	w.until("the event has come again", func() bool { return w.store.Status().Repeated > 0 })
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
		w.want(authz.KeyRevoked)
	}
	w.indexed()
	w.want(authz.KeyRevoked)
}

func BenchmarkIndexed(b *testing.B) {
	w := begin(b, withIndex(100))
	w.indexed()
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := w.store.Records(ctx, storetest.Org, storetest.Key); err != nil {
			b.Fatal(err)
		}
	}
}

var errList = errors.New("the list was cut off")

// failingLists cuts the first lists off after a part.
type failingLists struct {
	*storetest.Fake
	left *int
}

func (f failingLists) List(ctx context.Context, prefix string, each func([]*mvccpb.KeyValue) error) (*etcdserverpb.ResponseHeader, error) {
	return f.Fake.List(ctx, prefix, func(kvs []*mvccpb.KeyValue) error {
		if err := each(kvs); err != nil || *f.left == 0 {
			return err
		}
		*f.left--
		return errList
	})
}

// An answer of the index is never older than what had been applied when it was
// asked for.
func TestIndexIsNotBehindApplied(t *testing.T) {
	t.Parallel()
	w := begin(t, withIndex(100))
	w.indexed()
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				w.Put(storetest.Space.Status(w.key), "approved")
				time.Sleep(10 * time.Microsecond)
			}
		}
	})
	for range 20_000 {
		applied := w.store.Status().AppliedRevision
		r, err := w.store.Records(t.Context(), storetest.Org, storetest.Key)
		if err != nil || r.Revision < applied {
			t.Errorf("answered of revision %d after %d had been applied: %v", r.Revision, applied, err)
			break
		}
	}
	close(stop)
	writer.Wait()
}

// A transaction larger than what the index takes at once is seen whole: of key
// and app, one is always approved and one revoked.
func TestIndexTransactionIsSeenWhole(t *testing.T) {
	t.Parallel()
	w := begin(t, withIndex(1000))
	key, app := storetest.Space.Status(w.key), storetest.Space.Status(keyspace.AppRecord(storetest.Org, storetest.App))
	last := w.PutAll(key, "approved", app, "revoked")
	w.indexed()
	w.applied(last)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				r, err := w.store.Records(t.Context(), storetest.Org, storetest.Key)
				if err != nil || r.Credential.Status == r.App.Status {
					t.Errorf("key and app are both %v: %v", r.App.Status, err)
					return
				}
				runtime.Gosched()
			}
		})
	}
	for i := range 200 {
		states := []string{"approved", "revoked"}
		changes := []string{key, states[(i+1)%2]}
		for n := range 150 {
			changes = append(changes, storetest.Space.Status(keyspace.KeyRecord(storetest.Org, authz.KeyID{1, byte(n)})), "approved")
		}
		w.applied(w.PutAll(append(changes, app, states[i%2])...))
	}
	close(stop)
	readers.Wait()
}

// A list that is ahead of the watch is not answered from until the watch has come
// so far.
func TestIndexWaitsForTheWatch(t *testing.T) {
	t.Parallel()
	f := storetest.NewFake()
	c := storetest.Cluster{Put: f.Put}
	c.PutApp()
	c.PutKey(storetest.Key)
	store, err := statestore.New(statestore.Config{Backend: f, Space: storetest.Space, IndexRecords: 100})
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	f.AfterRead(func([]string) { // after the revision at which the watch begins, before the list
		once.Do(func() {
			f.Hold(true)
			f.Put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, storetest.Key)), "revoked")
		})
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = store.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if st := store.Status(); st.Index == statestore.IndexReady {
			t.Fatalf("the index is ready at applied revision %d, before the event that the list holds", st.AppliedRevision)
		}
	}
	f.Hold(false)
	for end := time.Now().Add(5 * time.Second); store.Status().Index != statestore.IndexReady; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the index is not ready: %+v", store.Status())
		}
	}
}
