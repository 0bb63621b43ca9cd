package keygatetest_test

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
)

// A flood of keys that nobody has, beside keys that are in use: these stay
// allowed, every one, and cached; memory and the reads from etcd stay bounded.
func TestFloodOfUnknownKeys(t *testing.T) {
	junkKeys := int64(100_000)
	if raceEnabled {
		junkKeys = 10_000
	}
	const (
		goodKeys = 1_000
		limit    = time.Minute // takes 9 s where nothing else runs
		// What the flood may add to memory: 64 Ki entries of the negative cache,
		// their counters, and slack.
		memoryLimit = 96 << 20
		// What keys that nobody knows may read: the rate, and its burst.
		loadsPerSecond, loadsBurst = 5000, 5000
		// Each may have a load under way when the last token goes.
		floodSenders = 16
	)
	etcd := etcdtest.StartProcess(t) // its memory is its own
	k := keygatetest.Start(t, keygatetest.Options{Writer: etcd.Client(t), Etcd: statestore.EtcdConfig{Endpoints: []string{etcd.Endpoint()}}})
	good := make([]string, goodKeys)
	records := make([]keygatetest.Key, goodKeys)
	for i := range good {
		good[i] = fmt.Sprintf("key-in-use-beside-a-flood-%05d", i)
		records[i] = keygatetest.Key{Key: good[i]}
	}
	k.Applied(t, k.PutKeys(t, records...))
	conns := []*grpc.ClientConn{k.Conn(t), k.Conn(t), k.Conn(t), k.Conn(t)}
	goodConn := k.Conn(t)

	// one goes through the good keys once and returns how long each took.
	one := func() []time.Duration {
		took := make([]time.Duration, 0, goodKeys)
		for i, key := range good {
			began := time.Now()
			got, err := check(t.Context(), goodConn, key)
			took = append(took, time.Since(began))
			if err != nil || got != "allowed" {
				t.Errorf("good key %d: got %s, %v, want allowed", i, got, err)
			}
		}
		return took
	}
	one() // into the cache
	calm := one()
	for _, c := range conns { // connected, so that its buffers are not the flood's
		mustCheck(t, c, good[0])
	}
	heap, rss := memory(t)
	before := k.Server.Store().Status()

	var reasons sync.Map // of the junk: reason to *atomic.Int64
	var next atomic.Int64
	var flood, goodOnes sync.WaitGroup
	began := time.Now()
	for i := range floodSenders {
		flood.Go(func() {
			for next.Add(1) <= junkKeys && time.Since(began) < limit {
				var b [24]byte
				_, _ = rand.Read(b[:]) // it does not fail
				reason, err := check(t.Context(), conns[i%len(conns)], hex.EncodeToString(b[:]))
				if err != nil {
					reason = err.Error()
				}
				n, _ := reasons.LoadOrStore(reason, new(atomic.Int64))
				n.(*atomic.Int64).Add(1)
			}
		})
	}
	flooded := make(chan struct{})
	var stormy []time.Duration
	goodOnes.Go(func() {
		for {
			select {
			case <-flooded:
				return
			default:
				stormy = append(stormy, one()...)
			}
		}
	})
	flood.Wait()
	took := time.Since(began)
	close(flooded)
	goodOnes.Wait()
	after := k.Server.Store().Status()
	heapAfter, rssAfter := memory(t)

	if n := next.Load(); n < junkKeys {
		t.Errorf("%d keys within %v, want %d", n, limit, junkKeys)
	}
	unknown, overloaded := int64(0), int64(0)
	reasons.Range(func(reason, n any) bool {
		switch v := n.(*atomic.Int64).Load(); reason {
		case "key_unknown":
			unknown = v
		case "overloaded":
			overloaded = v
		default:
			t.Errorf("junk: got %q %d times, want key_unknown or overloaded", reason, v)
		}
		return true
	})
	// Each good check uses three records.
	hits, uses := after.Hits-before.Hits, int64(3*len(stormy))
	ratio := float64(hits) / float64(uses)
	if ratio < 0.99 {
		t.Errorf("cache hits of good keys: got %.4f of %d, want 0.99 at least", ratio, uses)
	}
	loads := after.Loads - before.Loads
	if most := int64(took.Seconds()*loadsPerSecond) + loadsBurst + floodSenders + uses - hits; loads > most || loads > junkKeys+uses-hits {
		t.Errorf("reads from etcd: got %d in %v, want %d at most, and one for each key at most", loads, took, most)
	}
	if grown := int64(heapAfter) - int64(heap); grown > memoryLimit {
		t.Errorf("heap grew by %d MB, want %d at most", grown>>20, memoryLimit>>20)
	}
	t.Logf("%d junk keys in %v (%.0f/s): %d unknown, %d overloaded; %d reads from etcd", junkKeys, took.Round(time.Millisecond), float64(junkKeys)/took.Seconds(), unknown, overloaded, loads)
	t.Logf("%d good checks beside it, all allowed, %.2f%% from the cache; p50 %v, p99 %v (calm: p50 %v, p99 %v)",
		len(stormy), 100*ratio, quantile(stormy, 0.5), quantile(stormy, 0.99), quantile(calm, 0.5), quantile(calm, 0.99))
	t.Logf("heap %d MB before, %d after; resident %d MB before, %d after", heap>>20, heapAfter>>20, rss>>20, rssAfter>>20)
	if len(stormy) < goodKeys {
		t.Errorf("only %d good checks beside the flood", len(stormy))
	}
}

// memory of this process: the live heap and what is resident, in bytes.
func memory(t *testing.T) (heap, resident uint64) {
	t.Helper()
	runtime.GC()
	runtime.GC() // what finalizers let go of
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	var size, pages uint64
	if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
		t.Fatal(err)
	}
	return m.HeapAlloc, pages * uint64(os.Getpagesize())
}

func quantile(d []time.Duration, q float64) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[min(int(q*float64(len(d))), len(d)-1)].Round(time.Microsecond)
}
