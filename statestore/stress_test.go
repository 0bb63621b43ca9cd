package statestore_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strconv"
	"strings"
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

// stressTruth is what the watcher has applied: the newest revision of the
// details, and of the flag, of key k that had been applied when it was stored.
type stressTruth struct {
	ids [stressKeys]authz.KeyID
	idx map[authz.KeyID]int
	rev [stressKeys]struct{ details, flag atomic.Int64 }
}

// state is the revisions that a read found in a key's details and flag.
type state struct{ details, flag int64 }

// saw notes an event.
func (s *stressTruth) saw(p keyspace.Path, rev int64) {
	if p.Record.Kind != keyspace.KindKey {
		return
	}
	at := &s.rev[s.idx[p.Record.Key]]
	switch p.Field {
	case keyspace.FieldDetails:
		at.details.Store(rev)
	case keyspace.FieldProduct:
		at.flag.Store(rev)
	}
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

// A flag's value is the revision that wrote it, too. That is no status, so it
// shows in the flag's problem.
func stressFlag(rev int64) string { return strconv.FormatInt(rev, 10) }

func flagRevision(f authz.Flag) int64 {
	_, number, _ := strings.Cut(f.Problem, `"`)
	number, _, _ = strings.Cut(number, `"`)
	rev, _ := strconv.ParseInt(number, 10, 64)
	return rev
}

// stress lets readers look up random keys while a writer changes them, until
// stressReads were made. read returns the state it got, false if it got none. A state older than what had been applied before the read
// began is stale.
func stress(t *testing.T, f *storetest.Fake, s *stressTruth, read func(k int) (got state, ok bool, err error)) (reads, answered, stale int64) {
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
				r := keyspace.KeyRecord(storetest.Org, s.ids[k])
				if rand.N(2) == 0 {
					f.PutNext(storetest.Space.Details(r), stressValue)
				} else {
					f.PutNext(storetest.Space.KeyProduct(r, storetest.Weather), stressFlag)
				}
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
			for n := total.Add(1); n <= stressReads; n = total.Add(1) {
				if n%64 == 0 {
					runtime.Gosched() // a reader that never waits would keep the writer and the watcher out
				}
				k := int(zipf.Uint64())
				// Before the read begins.
				want := state{s.rev[k].details.Load(), s.rev[k].flag.Load()}
				now, ok, err := read(k)
				if err != nil {
					t.Error(err)
					return
				}
				if !ok {
					continue
				}
				got.Add(1)
				if now.details < want.details || now.flag < want.flag {
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

// naiveEntry is a value by itself: a key's details, or its flag.
type naiveEntry struct {
	key uint64
	rev int64
}

func field(p keyspace.Path) int {
	if p.Field == keyspace.FieldProduct {
		return 1
	}
	return 0
}

// Ten million reads under eviction pressure (a tenth of that under the race
// detector): none may see a state from before an event that had been applied
// when it began. Beside it the scheme that everybody writes first: a watcher
// that Sets.
func TestStress(t *testing.T) {
	t.Run("a watcher that Sets", func(t *testing.T) {
		f, s := storetest.NewFake(), newTruth()
		c, err := ristretto.NewCache(&ristretto.Config[uint64, naiveEntry]{
			NumCounters: 20 * stressCapacity, MaxCost: 2 * stressCapacity, BufferItems: 64, IgnoreInternalCost: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		w, err := f.Watch(ctx, storetest.Space.Watched(), 2)
		if err != nil {
			t.Fatal(err)
		}
		// What everybody writes: the watcher Sets what an event says, a reader that
		// finds nothing loads and Sets.
		set := func(e naiveEntry) { c.Set(e.key, e, 1) }
		var watcher sync.WaitGroup
		watcher.Go(func() {
			for u := range w.Updates() {
				for _, ev := range u.Events {
					p, err := storetest.Space.Parse(string(ev.Kv.Key))
					if err != nil {
						t.Error(err)
					}
					k := s.idx[p.Record.Key]
					set(naiveEntry{key: uint64(2*k + field(p)), rev: ev.Kv.ModRevision})
					s.saw(p, ev.Kv.ModRevision)
				}
			}
		})
		reads, answered, stale := stress(t, f, s, func(k int) (got state, ok bool, err error) {
			details, ok1 := c.Get(uint64(2 * k))
			flag, ok2 := c.Get(uint64(2*k + 1))
			if ok1 && ok2 {
				return state{details.rev, flag.rev}, true, nil
			}
			snap, err := f.Read(ctx, storetest.Space.Folder(keyspace.KeyRecord(storetest.Org, s.ids[k])))
			if err != nil {
				return got, false, err
			}
			for _, kv := range snap.Ranges[0] {
				p, err := storetest.Space.Parse(string(kv.Key))
				if err != nil {
					return got, false, err
				}
				set(naiveEntry{key: uint64(2*k + field(p)), rev: kv.ModRevision})
				*[]*int64{&got.details, &got.flag}[field(p)] = kv.ModRevision
			}
			return got, len(snap.Ranges[0]) == 2, nil
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
	t.Run("validate on read", func(t *testing.T) { stressStore(t, 0) })
	t.Run("index", func(t *testing.T) { stressStore(t, 1000) })
}

// stressStore puts a Store under stress, with or without an index.
func stressStore(t *testing.T, indexRecords int) {
	f, s := storetest.NewFake(), newTruth()
	store, err := statestore.New(statestore.Config{
		Backend: f, Space: storetest.Space, CacheBytes: stressCapacity * 500,
		UnknownLoadsPerSecond: 1e6, // evicted keys are unknown keys, and many
		IndexRecords:          indexRecords,
		OnChange:              func(c statestore.Change) { s.saw(c.Path, c.Revision) },
	})
	if err != nil {
		t.Fatal(err)
	}
	c := storetest.Cluster{Put: f.Put}
	c.PutApp()
	for _, id := range s.ids {
		// Overwritten before the store starts: the first have no revision in them.
		c.PutKey(id)
		r := keyspace.KeyRecord(storetest.Org, id)
		f.PutNext(storetest.Space.Details(r), stressValue)
		f.PutNext(storetest.Space.KeyProduct(r, storetest.Weather), stressFlag)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = store.Run(ctx) }()
	if err := store.Await(ctx); err != nil {
		t.Fatal(err)
	}
	for indexRecords > 0 && store.Status().Index != statestore.IndexReady {
		time.Sleep(time.Millisecond)
	}
	var refused atomic.Int64
	reads, answered, stale := stress(t, f, s, func(k int) (state, bool, error) {
		r, err := store.Records(ctx, storetest.Org, s.ids[k])
		if err != nil {
			// A refusal is never stale; too many would mean that nothing was tested.
			if !errors.Is(err, authz.ErrUnavailable) && !errors.Is(err, authz.ErrOverloaded) {
				return state{}, false, err
			}
			refused.Add(1)
			return state{}, false, nil
		}
		return state{r.Credential.ExpiresAt, flagRevision(r.Credential.Products[storetest.Weather])}, true, nil
	})
	t.Logf("%d reads, %d answered, %d stale, %d refused; %+v", reads, answered, stale, refused.Load(), store.Status())
	if stale > 0 {
		t.Errorf("%d stale reads of %d, want 0", stale, answered)
	}
	if answered < reads*9/10 {
		t.Errorf("only %d of %d reads were answered, the run says too little", answered, reads)
	}
	cancel()
	<-done
}
