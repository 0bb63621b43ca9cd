package faults

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
)

// The watch of one replica gets a trickle of the events that are written, about
// a thousand a second. Its reads work, so that it knows that it falls behind.
func TestStarvedWatch(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "starved watch", Faults: "one replica's watch drips while 1,000 events a second are written",
		Guarantees: []Guarantee{G3, G5},
		Options:    Options{Keys: 32},
		Run:        starvedWatch,
		Guards: []Guard{{
			Name: "a proof's wait for the watch", Guarantee: G3,
			Mutations: []variant.Mutation{{File: "statestore/probe.go", Old: "for e.applied.Load() < h {", New: "for h < 0 {"}},
		}},
	})
}

func starvedWatch(w *World) {
	const starved = 0
	r := w.Replicas[starved]
	w.Checks(300)
	w.Until("the replica to know the keys", func() bool {
		for key := range w.Keys {
			if !w.Allowed(starved, key) {
				return false
			}
		}
		return true
	})
	over := w.Fault(starved, "replica %d gets 2 kB/s of its watch", starved)
	for _, l := range r.Links {
		l.Only(etcdtest.WatchLinks)
		l.Drip(2000)
	}
	began := w.Rec.Now()

	// Of an organization of their own: no key of this world changes by them.
	writing, stop := context.WithCancel(w.T.Context())
	defer stop()
	var written atomic.Int64
	var writers sync.WaitGroup
	const clients, rate = 16, 1000
	for i := range clients {
		writers.Go(func() {
			every(writing, rate, clients, i, func() {
				path := fmt.Sprintf("/keygate/elsewhere/apps/app-%d-%d/status", i, written.Add(1)%100)
				_, _ = w.Client.Put(writing, path, "approved")
			})
		})
	}
	w.Wait(500 * time.Millisecond)
	next, lag, age := 0, 0.0, 0.0
	others, stale := 0, time.Duration(0)
	for end := began + w.Options.S + w.For(2500*time.Millisecond, 20*time.Second); w.Rec.Now() < end; w.Wait(100 * time.Millisecond) {
		if next < len(w.Keys)/2 {
			w.Revoke(next, Level(next%int(numLevels)), false)
			next++
		}
		mine, ok := r.Metric("keygate_applied_revision")
		proof, _ := r.Metric("keygate_proof_age_seconds")
		theirs, also := w.Replicas[1].Metric("keygate_applied_revision")
		if ok && also {
			lag, age = max(lag, theirs-mine), max(age, proof)
		}
		if code, _, _ := r.Ask("/readyz"); code == 503 && stale == 0 {
			stale = w.Rec.Now() - began
		}
		for i := 1; i < len(w.Replicas); i++ {
			if c := w.Check(i, len(w.Keys)-1); !c.Yes() && !c.Failed {
				others++
			}
		}
	}
	w.Expect(G3, stale > 0, "the replica never said that it is not ready")
	w.Expect(G3, age > w.Options.S.Seconds(), "the age of its proof rose to %.1f s alone", age)
	w.Expect(G3, others == 0, "%d checks of a good key were refused by replicas that are not starved", others)
	stop()
	writers.Wait()
	for _, l := range r.Links {
		l.Heal()
	}
	took, _ := w.Eventually(G3, 20*time.Second, "the replica to answer again", func() bool { return w.Allowed(starved, len(w.Keys)-1) })
	over()
	w.Figure(G3, "starved watch: events written", "%d, of which the replica lacked %.0f", written.Load(), lag)
	w.Figure(G3, "starved watch: refuses", "%s after it began (S = %v), oldest proof %.1f s", milliseconds(stale), w.Options.S, age)
	w.Figure(G3, "starved watch: answers again after its end", "%s", milliseconds(took))
}

// Every connection of every replica loses what it should carry: some bytes come
// late, and all behind them; some connections are reset. Events of several
// changes arrive together, then.
func TestLossyNetwork(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "lossy network", Faults: "5 % of the chunks delayed by up to 500 ms, 1 % of them reset the connection",
		Guarantees: []Guarantee{G2, G3, G5, G8},
		Options:    Options{Keys: 48},
		Run:        lossyNetwork,
		Guards: []Guard{{
			Name: "catching up by the one event that is lacking, never by the last of several", Guarantee: G5,
			Mutations: []variant.Mutation{{File: "statestore/epoch.go", Old: "r.id != want || r.rev < c.prev ||", New: "r.id != want ||"}},
		}},
	})
}

func lossyNetwork(w *World) {
	w.Checks(w.Rounds(500, 1500))
	over := w.Fault(Everyone, "every network is lossy")
	for _, r := range w.Replicas {
		for _, l := range r.Links {
			l.Delay(0.05, 0, 500*time.Millisecond)
			l.Reset(0.01)
		}
	}
	// Keys enough that each changes seldom: the checker then knows an order soon.
	const measured, swapped = 16, 8
	end := w.Rec.Now() + w.For(5*time.Second, 40*time.Second)
	var rest []int
	for key := measured + swapped; key < len(w.Keys); key++ {
		rest = append(rest, key)
	}
	w.Changes(12, rest...)
	var all sync.WaitGroup
	for i := range swapped {
		s, key := w.Rec.Stream(), measured+i
		all.Go(func() {
			// One flag of a record closes as another opens: at no time are both open.
			w.set(s, key, LevelProduct, closing(LevelProduct), false)
			for n := 0; w.Rec.Now() < end; n++ {
				closes, opens := LevelKey, LevelProduct
				if n%2 == 1 {
					closes, opens = opens, closes
				}
				w.set(s, key, closes, closing(closes), false)
				w.set(s, key, opens, opening(opens), false)
				w.Wait(1200 * time.Millisecond)
			}
		})
	}
	var effect Effect
	receipts := w.Rec.Stream()
	var waits Times
	for n := 0; w.Rec.Now() < end; n++ {
		key, level := n%measured, Level(n/measured%int(numLevels))
		if n%4 == 3 {
			if one := w.set(receipts, key, level, closing(level), true); one.Receipt != nil {
				waits.Add(one.Receipt.End - one.End)
				for i := range w.Replicas {
					w.Check(i, key)
				}
			}
		} else {
			w.RevokeAndWatch(&effect, key, level)
		}
		w.Approve(key, level, false)
	}
	all.Wait()
	over()
	for _, r := range w.Replicas {
		for _, l := range r.Links {
			l.Heal()
		}
	}
	w.Figure(G3, "lossy network: acknowledgement to first refusal", "%v", &effect.Refused)
	w.Figure(G3, "lossy network: acknowledgement to the last check that was still allowed", "%v", &effect.Yes)
	w.Figure(G2, "lossy network: receipts", "%v", &waits)
}
