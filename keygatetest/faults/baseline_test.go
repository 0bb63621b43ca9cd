package faults

import (
	"sync"
	"testing"
	"time"

	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
)

// Nothing is broken. What is measured here is what a revocation takes, beside
// what a bare watch of the same etcd takes at the same time.
func TestBaseline(t *testing.T) {
	Run(t, Scenario{
		Name: "baseline", Faults: "none, under load",
		Guarantees: []Guarantee{G1, G2, G4, G5, G6, G8},
		Options:    Options{Keys: 64},
		Run:        baseline,
		Guards: []Guard{{
			Name: "the fence that the watcher raises", Guarantee: G1,
			Mutations: []variant.Mutation{{File: "statestore/epoch.go", Old: "\tfence.Store(rev)\n", New: ""}},
		}},
	})
}

func baseline(w *World) {
	bare := w.BareWatch(w.Dial(etcdtest.NewProxy(w.T, w.Store.Endpoint()).Endpoint()))
	rate := w.Rounds(1500, 5000)
	w.Checks(rate)
	var effect Effect
	var event Times
	end := w.Rec.Now() + w.For(5*time.Second, 90*time.Second)
	const writers, changesPerSecond = 5, 50
	var wg sync.WaitGroup
	var receipts Times
	wg.Go(func() {
		// On keys that the others leave alone.
		for n := 0; w.Rec.Now() < end && w.T.Context().Err() == nil; n++ {
			key, level := len(w.Keys)-1-n/2%(len(w.Keys)%writers), Level(n/2%int(numLevels))
			one := w.Set(key, level, []string{closing(level), opening(level)}[n%2], true)
			if one.Receipt != nil {
				receipts.Add(one.Receipt.End - one.End)
			}
			w.Wait(100 * time.Millisecond)
		}
	})
	for i := range writers {
		wg.Go(func() {
			tick := time.NewTicker(writers * time.Second / changesPerSecond)
			defer tick.Stop()
			// Closed and opened in turn, each key at each level.
			for n := 0; w.Rec.Now() < end && w.T.Context().Err() == nil; n++ {
				key, level := i+n/2%(len(w.Keys)/writers)*writers, Level(n/2%int(numLevels))
				if n%2 == 1 {
					w.Approve(key, level, false)
				} else if one := w.RevokeAndWatch(&effect, key, level); one.Outcome == Acked {
					if at, ok := bare.Arrived(one.Revision); ok {
						event.Add(max(0, at-one.End))
					}
				}
				<-tick.C
			}
		})
	}
	wg.Wait()
	w.Figure(G1, "acknowledgement to first refusal", "%v", &effect.Refused)
	w.Figure(G1, "bare etcd watch in the same run", "%v", &event)
	w.Figure(G1, "X, acknowledgement to the last check that was still allowed", "%v", &effect.Yes)
	w.Figure(G2, "acknowledgement to receipt, healthy", "%v", &receipts)
	w.Figure(G1, "load", "%d checks/s, %d changes/s, %d replicas", rate, changesPerSecond, len(w.Replicas))
}
