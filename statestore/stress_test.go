package statestore_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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

const (
	stressKeys     = 64
	stressReaders  = 6
	stressCapacity = 32 // records: half the keys must go
	stressEvents   = 10_000
)

// stressTruth is what the watcher has applied: rev[k] is the newest revision of
// key k that had been applied when it was stored.
type stressTruth struct {
	ids [stressKeys]authz.KeyID
	idx map[authz.KeyID]int
	rev [stressKeys]atomic.Int64
}

func newTruth() *stressTruth {
	s := &stressTruth{idx: map[authz.KeyID]int{}}
	for k := range s.ids {
		s.ids[k] = storetest.KeyID(fmt.Sprintf("stress-key-%016d", k))
		s.idx[s.ids[k]] = k
	}
	return s
}

// value of a key's credential: its expiresAt is the revision that wrote it.
func stressValue(rev int64) string {
	return fmt.Sprintf(`{"v":1,"developerId":%q,"appId":%q,"expiresAt":%d}`, storetest.Developer, storetest.App, rev)
}

// stress lets readers look up random keys while a writer changes them, until
// stressReads were made. read returns the revision of the state it got, false
// if it got none. A state older than what had been applied before the read
// began is stale.
func stress(t *testing.T, f *storetest.Fake, s *stressTruth, read func(k int) (rev int64, ok bool, err error)) (reads, answered, stale int64) {
	t.Helper()
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			for range stressEvents / 1000 {
				k := rand.N(stressKeys)
				f.PutNext(storetest.Space.Details(keyspace.KeyRecord(storetest.Org, s.ids[k])), stressValue)
			}
		}
	})
	var readers sync.WaitGroup
	var total, got, old atomic.Int64
	for range stressReaders {
		readers.Go(func() {
			// Some keys are asked for often, most seldom: a cache of half of them
			// both hits and evicts.
			zipf := rand.NewZipf(rand.New(rand.NewPCG(rand.Uint64(), 1)), 1.4, 1, stressKeys-1)
			for total.Add(1) <= stressReads {
				k := int(zipf.Uint64())
				want := s.rev[k].Load() // before the read begins
				rev, ok, err := read(k)
				if err != nil {
					t.Error(err)
					return
				}
				if !ok {
					continue
				}
				got.Add(1)
				if rev < want {
					old.Add(1)
				}
			}
		})
	}
	readers.Wait()
	close(stop)
	writer.Wait()
	return min(total.Load(), stressReads), got.Load(), old.Load()
}

// Ten million reads under eviction pressure (a tenth of that under the race
// detector): none may see a state from before an event that had been applied
// when it began. Beside it the scheme that everybody writes first: a watcher
// that Sets.
func TestStress(t *testing.T) {
	t.Run("a watcher that Sets", func(t *testing.T) {
		f, s := storetest.NewFake(), newTruth()
		c, err := ristretto.NewCache(&ristretto.Config[uint64, entry]{
			NumCounters: 10 * stressCapacity, MaxCost: stressCapacity, BufferItems: 64, IgnoreInternalCost: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		w, err := f.Watch(ctx, storetest.Space.Watched(), 2)
		if err != nil {
			t.Fatal(err)
		}
		var watcher sync.WaitGroup
		watcher.Go(func() {
			for u := range w.Updates() {
				for _, ev := range u.Events {
					p, err := storetest.Space.Parse(string(ev.Kv.Key))
					if err != nil {
						t.Error(err)
					}
					k := s.idx[p.Record.Key]
					c.Set(uint64(k), entry{rev: ev.Kv.ModRevision}, 1)
					s.rev[k].Store(ev.Kv.ModRevision)
				}
			}
		})
		reads, answered, stale := stress(t, f, s, func(k int) (int64, bool, error) {
			if e, ok := c.Get(uint64(k)); ok {
				return e.rev, true, nil
			}
			snap, err := f.Read(ctx, storetest.Space.Folder(keyspace.KeyRecord(storetest.Org, s.ids[k])))
			if err != nil || len(snap.Ranges[0]) == 0 {
				return 0, false, err
			}
			e := entry{rev: snap.Ranges[0][0].ModRevision}
			c.Set(uint64(k), e, 1)
			return e.rev, true, nil
		})
		t.Logf("naive: %d reads, %d answered, %d stale", reads, answered, stale)
		if stale == 0 {
			t.Error("the naive watcher was never stale: the run does not see what it looks for")
		}
		w.Close()
		watcher.Wait()
		cancel()
		c.Close()
	})
	t.Run("validate on read", func(t *testing.T) {
		f, s := storetest.NewFake(), newTruth()
		store, err := statestore.New(statestore.Config{
			Backend: f, Space: storetest.Space, CacheBytes: stressCapacity * 500,
			UnknownLoadsPerSecond: 1e6, // evicted keys are unknown keys, and many
			OnChange: func(c statestore.Change) {
				if c.Path.Field == keyspace.FieldDetails && c.Path.Record.Kind == keyspace.KindKey {
					s.rev[s.idx[c.Path.Record.Key]].Store(c.Revision)
				}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		c := storetest.Cluster{Put: f.Put}
		c.PutApp()
		for _, id := range s.ids {
			// Overwritten before the store starts: the first has no revision in it.
			c.PutKey(id)
			f.PutNext(storetest.Space.Details(keyspace.KeyRecord(storetest.Org, id)), stressValue)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = store.Run(ctx) }()
		if err := store.Await(ctx); err != nil {
			t.Fatal(err)
		}
		var refused atomic.Int64
		reads, answered, stale := stress(t, f, s, func(k int) (int64, bool, error) {
			r, err := store.Records(ctx, storetest.Org, s.ids[k])
			if err != nil {
				// A refusal is never stale; too many would mean that nothing was tested.
				if !errors.Is(err, authz.ErrUnavailable) && !errors.Is(err, authz.ErrOverloaded) {
					return 0, false, err
				}
				refused.Add(1)
				return 0, false, nil
			}
			if r.Credential == nil {
				return 0, true, nil // a state too: stale if the key had been applied
			}
			return r.Credential.ExpiresAt, true, nil
		})
		t.Logf("validate on read: %d reads, %d answered, %d stale, %d refused; %+v", reads, answered, stale, refused.Load(), store.Status())
		if stale > 0 {
			t.Errorf("%d stale reads of %d, want 0", stale, answered)
		}
		if answered < reads*9/10 {
			t.Errorf("only %d of %d reads were answered, the run says too little", answered, reads)
		}
		cancel()
		<-done
	})
}
