package faults

import (
	"testing"
	"time"

	"keygate/keygatetest/variant"
)

// Everything between one replica and etcd is swallowed, for longer than S, and
// a key is revoked meanwhile. Nothing tells the replica: no error, no event.
func TestBlackHole(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "black hole", Faults: "network swallows everything for longer than S",
		Guarantees: []Guarantee{G3, G5},
		Options:    Options{Keys: 8},
		Run:        blackHole,
		Guards: []Guard{{
			Name: "the end of a proof", Guarantee: G3,
			Mutations: []variant.Mutation{{
				File: "statestore/epoch.go",
				Old:  "return !p.epoch.dead.Load() && !p.member.lost.Load() && now() < p.validUntil",
				New:  "return true",
			}, { // the early refusal
				File: "statestore/epoch.go",
				Old:  "return !p.epoch.dead.Load() && !p.member.lost.Load() && time.Since(p.made) < p.validUntil-p.t0",
				New:  "return true",
			}},
		}},
	})
}

func blackHole(w *World) {
	w.Checks(300)
	cut := w.Replicas[0]
	w.Until("each replica to have been asked for each key", func() bool {
		return w.Allowed(0, 0) && w.Allowed(0, 1)
	})
	heal := cut.CutOff()
	began := w.Rec.Now()
	w.Wait(w.For(500*time.Millisecond, time.Second))
	w.Revoke(0, LevelProduct, false)
	first := time.Duration(0)
	for end := began + w.Options.S + w.For(2*time.Second, 27*time.Second); w.Rec.Now() < end; w.Wait(2 * time.Millisecond) {
		if c := w.Check(0, 1); first == 0 && !c.Yes() {
			first = c.Start - began
		}
	}
	w.Expect(G3, first > 0, "the replica never refused")
	heal()
	took, _ := w.Eventually(G3, 10*time.Second, "the replica to answer again", func() bool { return w.Allowed(0, 1) })
	w.Expect(G5, !w.Allowed(0, 0), "the key that was revoked meanwhile is allowed after the black hole")
	w.Figure(G3, "black hole: first refusal after it began", "%s (S = %v)", milliseconds(first), w.Options.S)
	w.Figure(G3, "black hole: answers again after its end", "%s", milliseconds(took))
}
