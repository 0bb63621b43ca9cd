package faults

import (
	"testing"
	"time"

	"keygate/keygatetest/variant"
)

// One replica is cut off; keys are revoked and flags deleted meanwhile, and etcd
// forgets the events before the replica is back.
func TestCompactionInGap(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "compaction in a gap", Faults: "etcd compacted to its head while a watcher is cut off",
		Guarantees: []Guarantee{G2, G3, G5},
		Options:    Options{Keys: 16},
		Run:        compactionInGap,
		Guards: []Guard{{
			Name: "the floor that a gap raises", Guarantee: G5,
			Mutations: []variant.Mutation{{File: "statestore/watch.go", Old: "\te.floor.Store(h0)\n", New: "\tif e.applied.Load() == 0 {\n\t\te.floor.Store(h0)\n\t}\n"}},
		}},
	})
}

func compactionInGap(w *World) {
	w.Checks(200)
	w.Changes(10, all(w, 8, 12)...)
	w.ChangesWithReceipts(5, all(w, 12, 16)...)
	rounds := w.Rounds(2, 10)
	for n := range rounds {
		// In the long run every other one is longer than S.
		w.gapWithCompaction(w.For(300*time.Millisecond, 300*time.Millisecond+time.Duration(n%2)*w.Options.S))
	}
	gaps, _ := w.Replicas[0].Metric("keygate_watch_gaps_total")
	loads, _ := w.Replicas[0].Metric("keygate_loads_total")
	w.Expect(G5, int(gaps) >= rounds, "got %v gaps, want %d: one for each compaction", gaps, rounds)
	w.Figure(G5, "compaction in a gap", "%d times, %.0f gaps, %d keys closed in each and refused after it; %.0f loads of %d records in all", rounds, gaps, len(closedInGap), loads, 3*len(w.Keys))
}

// closedInGap are ways to close a key, one key each.
var closedInGap = []struct {
	level Level
	value string
}{
	{LevelKey, Absent}, {LevelKey, "revoked"}, {LevelProduct, Absent}, {LevelProduct, "pending"},
	{LevelApp, Absent}, {LevelApp, "revoked"}, {LevelDeveloper, Absent}, {LevelDeveloper, "inactive"},
}

func (w *World) gapWithCompaction(d time.Duration) {
	cut := w.Replicas[0]
	for i := range closedInGap {
		w.Eventually(G8, w.Options.S, "the keys to be open", func() bool { return w.Allowed(0, i) })
	}
	heal := cut.CutOff()
	link := cut.Links[0]
	link.Refuse() // else what is frozen would hold the events
	link.Cut()
	for i, c := range closedInGap {
		w.Set(i, c.level, c.value, false)
	}
	acked := w.Rec.Now()
	w.Wait(d)
	r, err := w.Client.Get(w.T.Context(), w.Space.Probe())
	if err == nil {
		_, err = w.Client.Compact(w.T.Context(), r.Header.Revision)
	}
	if err != nil {
		w.T.Fatalf("compact: %v", err)
	}
	w.Note("compacted at revision %d", r.Header.Revision)
	link.Accept()
	heal()
	w.Eventually(G5, w.Options.S, "the keys that were closed in the gap to be refused", func() bool {
		for i := range closedInGap {
			if c := w.Check(0, i); !c.decided() || c.Yes() {
				return false
			}
		}
		return true
	})
	// And not only at once.
	for w.Rec.Now() < acked+w.Options.S+200*time.Millisecond {
		w.Wait(10 * time.Millisecond)
	}
	for i, c := range closedInGap {
		w.Expect(G5, !w.Allowed(0, i), "key %d is allowed, although its %v was set to %q in the gap", i, c.level, c.value)
		w.Approve(i, c.level, false)
	}
}
