package faults

import (
	"math/rand/v2"
	"testing"
	"time"

	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
)

// The connections of all replicas are reset several times a second, and their
// watches fall silent in between, under a stream of changes.
func TestConnectionsReset(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "connection resets", Faults: "connections to etcd reset every 100 to 300 ms, and watches that fall silent",
		Guarantees: []Guarantee{G2, G3, G5},
		Run:        connectionsReset,
		Guards: []Guard{{
			Name: "a watch that goes on from where the fences are", Guarantee: G3,
			Mutations: []variant.Mutation{{
				File: "statestore/probe.go",
				Old:  "w, err := s.backend.Watch(open, s.space.Watched(), e.applied.Load()+1)",
				New:  "w, err := s.backend.Watch(open, s.space.Watched(), 0)",
			}},
		}},
	})
}

func connectionsReset(w *World) {
	over := w.Fault(Everyone, "connections to etcd are reset, and watches silent")
	w.Checks(300)
	receipts := []int{0, 1, 2, 3, 4, 5, 6, 7}
	w.ChangesWithReceipts(20, receipts...)
	w.Changes(20, all(w, 8, 16)...)
	resets := 0
	for range w.Rounds(1, 5) {
		for range w.Rounds(8, 20) {
			w.Wait(100*time.Millisecond + rand.N(200*time.Millisecond))
			for _, r := range w.Replicas {
				r.Links[0].Cut()
			}
			resets++
		}
		w.silentWatch()
	}
	over()
	gaps := 0.0
	for _, r := range w.Replicas {
		n, ok := r.Metric("keygate_watch_gaps_total")
		w.Expect(G5, ok, "replica %d does not say how many gaps there were", r.Index)
		gaps += n
	}
	w.Expect(G5, gaps == 0, "got %v gaps, want none: nothing was compacted, so nothing need be missed", gaps)
	w.Figure(G5, "connection resets", "%d on each replica, %v gaps", resets, gaps)
}

// silentWatch silences the watch of each replica, and nothing else, until it is
// replaced. A key is revoked meanwhile, and nothing but the new watch can tell.
func (w *World) silentWatch() {
	key := 16 + rand.IntN(8) // no load changes it
	for _, r := range w.Replicas {
		w.Until("a watch, after the last reset", func() bool { return r.Links[0].Count(etcdtest.WatchLinks) > 0 })
		w.Eventually(G3, w.Options.S, "the key to be open", func() bool { return w.Allowed(r.Index, key) })
	}
	before := make([]float64, len(w.Replicas))
	for i, r := range w.Replicas {
		before[i], _ = r.Metric("keygate_watches_replaced_total")
		r.Links[0].Only(etcdtest.WatchLinks)
		r.Links[0].Strand()
		r.Links[0].Only(etcdtest.AllLinks)
	}
	one := w.Revoke(key, LevelKey, false)
	for i, r := range w.Replicas {
		w.Eventually(G3, 2*w.Options.S, "the silent watch to be replaced", func() bool {
			n, _ := r.Metric("keygate_watches_replaced_total")
			return n > before[i]
		})
	}
	for w.Rec.Now() < one.End+w.Options.S+100*time.Millisecond {
		w.Wait(10 * time.Millisecond)
	}
	for i := range w.Replicas {
		w.Check(i, key)
	}
	w.Approve(key, LevelKey, false)
}

// all keys from one to another.
func all(w *World, from, to int) (keys []int) {
	for i := from; i < to && i < len(w.Keys); i++ {
		keys = append(keys, i)
	}
	return keys
}
