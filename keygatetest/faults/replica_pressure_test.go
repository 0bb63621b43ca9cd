package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"keygate/authz"
	"keygate/keygatetest/variant"
)

// Keys that nobody has ever had are presented by the ten thousand a second, to
// a replica whose cache holds little more than the keys that there are.
func TestCachePressure(t *testing.T) {
	Run(t, Scenario{
		Name: "cache pressure", Faults: "a flood of random keys, a cache of 64 KiB",
		Guarantees: []Guarantee{G1, G5, G8},
		Options: Options{Keys: 24, Replicas: 2, Mutations: []variant.Mutation{
			{File: "statestore/statestore.go", Old: "orDefault(cfg.CacheBytes, 256<<20)", New: "orDefault(cfg.CacheBytes, 64<<10)"},
			// Enough to fill the cache of what is not there in a long run, and so little
			// that a million keys take a minute or two on two processors.
			{File: "statestore/statestore.go", Old: "orDefault(cfg.UnknownLoadsPerSecond, 5000)", New: "orDefault(cfg.UnknownLoadsPerSecond, 1000)"},
		}},
		Run: cachePressure,
		Guards: []Guard{{
			Name: "turns of their own for records that are known", Guarantee: G8,
			Mutations: []variant.Mutation{
				{File: "statestore/load.go", Old: "known = known || want.Kind != keyspace.KindKey", New: "known = want.Kind == keyspace.KindNone"},
				// So that a slow machine has no need to be faster than the usual limit.
				{File: "statestore/statestore.go", Old: "orDefault(cfg.UnknownLoadsPerSecond, 1000)", New: "orDefault(cfg.UnknownLoadsPerSecond, 100)"},
			},
		}},
	})
}

func cachePressure(w *World) {
	const stable, revoked = 8, 8 // keys: approved all the time, revoked all the time; the rest changes
	for key := stable; key < stable+revoked; key++ {
		w.Revoke(key, Level(key%int(numLevels)), false)
	}
	var changing []int
	for key := stable + revoked; key < len(w.Keys); key++ {
		changing = append(changing, key)
	}
	w.Checks(150)
	w.Changes(10, changing...)
	// What an approved key meets: each of its checks is measured.
	var refused, answered atomic.Int64
	phase := func(d *Times, end func() bool) {
		s := w.Rec.Stream()
		for n := 0; !end(); n++ {
			key, replica := n%stable, n%len(w.Replicas)
			if n%8 == 0 { // two events, after which it is loaded again
				w.Approve(key, LevelKey, false)
				w.Approve(key, LevelKey, false)
			}
			c := w.checkOn(context.Background(), s, replica, key)
			d.Add(c.End - c.Start)
			answered.Add(1)
			if !c.Failed && !c.Yes() {
				refused.Add(1)
			}
			w.Wait(5 * time.Millisecond)
		}
	}
	var calm, flooded Times
	until := w.Rec.Now() + w.For(time.Second, 3*time.Second)
	phase(&calm, func() bool { return w.Rec.Now() > until })
	w.Expect(G8, refused.Load() == 0, "%d of %d checks of approved keys are refused with nothing to press them", refused.Load(), answered.Load())
	answered.Store(0)
	before := w.Replicas[0].memory()

	flood, stop := context.WithCancel(w.T.Context())
	defer stop()
	var asked, allowed atomic.Int64
	const clients = 48
	began := w.Rec.Now()
	all := int64(w.Rounds(30_000, 1_000_000))
	load, _ := w.load()
	for i := range clients {
		load.wg.Go(func() {
			for n := rand.Uint64(); flood.Err() == nil && asked.Add(1) <= all; n++ {
				if w.ask(0, newCheckRequest(fmt.Sprintf("nobody-%016x-%02d", n*0x9e3779b97f4a7c15, i))) == authz.Allowed {
					allowed.Add(1)
				}
			}
		})
	}
	most := before
	next := w.Rec.Now()
	phase(&flooded, func() bool {
		if w.Rec.Now() > next {
			most, next = max(most, w.Replicas[0].memory()), w.Rec.Now()+200*time.Millisecond
		}
		return asked.Load() >= all || w.Rec.Now()-began > w.For(4*time.Second, 150*time.Second)
	})
	took := w.Rec.Now() - began
	stop()
	load.Stop()
	w.Expect(G7, allowed.Load() == 0, "%d keys that nobody has were allowed", allowed.Load())
	w.Expect(G8, refused.Load()*100 <= answered.Load(), "%d of %d checks of approved keys were refused", refused.Load(), answered.Load())
	// What is not there is remembered in 64 Ki entries of about 250 bytes.
	const budget = 96 << 20
	w.Expect(G8, most-before < budget, "the replica's memory has grown from %d to %d MiB", before>>20, most>>20)
	n := min(asked.Load(), all)
	w.Figure(G5, "cache pressure: random keys", "%d at %.0f/s, none allowed; revoked keys never", n, float64(n)/took.Seconds())
	w.Figure(G8, "cache pressure: approved keys refused meanwhile", "%d of %d checks", refused.Load(), answered.Load())
	w.Figure(G8, "cache pressure: p99 of approved keys", "%s before, %s during (generator and replicas share the processors)", milliseconds(calm.Percentile(99)), milliseconds(flooded.Percentile(99)))
	w.Figure(G8, "cache pressure: memory of a replica", "%d MiB before, %d MiB at the most", before>>20, most>>20)
}

// memory is the replica's resident set, in bytes.
func (r *Replica) memory() int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.Pid()))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return n << 10
		}
	}
	return 0
}
