package faults

import (
	"context"
	"sync"
	"testing"
	"time"

	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
)

// A replica is stopped for longer than S, as a machine that is suspended or
// starved; keys are revoked meanwhile. When it goes on it finds checks that wait
// for it, before it can have heard of anything.
func TestPausedReplica(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "paused replica", Faults: "SIGSTOP for longer than S; checks wait for it when it goes on",
		Guarantees: []Guarantee{G2, G3, G5},
		Options:    Options{Keys: 32},
		Run:        pausedReplica,
		Guards: []Guard{{
			Name: "the age of a proof", Guarantee: G3,
			Mutations: []variant.Mutation{
				{File: "statestore/epoch.go", Old: "&& now() < p.validUntil", New: ""},
				{File: "statestore/epoch.go", Old: "&& time.Since(p.made) < p.validUntil-p.t0", New: ""}, // the early refusal
			},
		}},
	})
}

func pausedReplica(w *World) {
	w.Checks(200)
	var back Times
	rounds := w.Rounds(1, 6)
	asked := 0
	for n := range rounds {
		paused := n % len(w.Replicas)
		r := w.Replicas[paused]
		w.Until("the replica to know the keys", func() bool {
			for key := range w.Keys {
				if !w.Allowed(paused, key) {
					return false
				}
			}
			return true
		})
		over := w.Fault(paused, "replica %d is stopped", paused)
		r.Stop()
		if n%2 == 0 { // nor does anything come for it, not even into its buffers: only its clock can tell
			for _, l := range r.Links {
				l.Freeze()
			}
		}
		var receipts sync.WaitGroup
		streams := w.Rec.Stream()
		for key := range w.Keys {
			if key%2 == 0 {
				receipts.Go(func() {
					w.set(streams, key, Level(key/2%int(numLevels)), closing(Level(key/2%int(numLevels))), key%4 == 0)
				})
			}
		}
		w.Wait(w.Options.S + 200*time.Millisecond)
		receipts.Wait()
		var waiting sync.WaitGroup
		for key := range w.Keys {
			for range 4 {
				s := w.Rec.Stream()
				waiting.Go(func() { w.checkOn(context.Background(), s, paused, key) })
				asked++
			}
		}
		w.Wait(100 * time.Millisecond)
		r.Cont()
		went := w.Rec.Now()
		waiting.Wait()
		w.Wait(200 * time.Millisecond)
		for _, l := range r.Links {
			l.Heal()
		}
		w.Eventually(G3, 10*time.Second, "the replica to answer again", func() bool { return w.Allowed(paused, 1) })
		back.Add(w.Rec.Now() - went)
		over()
		for key := range w.Keys {
			if key%2 == 0 {
				w.Approve(key, Level(key/2%int(numLevels)), false)
			}
		}
	}
	w.Figure(G3, "paused replica: checks that waited for it, none allowed by what was before", "%d", asked)
	w.Figure(G3, "paused replica: answers again after SIGCONT", "%v", &back)
}

// A lease goes while a revocation waits for the replica that held it, and which
// hears of nothing. It may not count as an answer; and once the registration is
// gone, later revocations do not wait for the replica, so it must refuse.
func TestLeaseLost(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "lease lost during a wait", Faults: "the lease of a replica that hears of nothing is revoked, or ends",
		Guarantees: []Guarantee{G2, G3, G6},
		Options:    Options{Keys: 24},
		Run:        leaseLost,
		Guards: []Guard{
			{
				Name: "the probe's look for its own registration", Guarantee: G2,
				Mutations: []variant.Mutation{{File: "statestore/probe.go", Old: "if member.created > 0 && !member.found(head.Ranges[1]) {", New: "if false {"}},
			},
			{
				Name: "the end of every proof with its registration", Guarantee: G2,
				Mutations: []variant.Mutation{{File: "statestore/register.go", Old: "	r.lost.Store(true)\n", New: ""}},
			},
		},
	})
}

func leaseLost(w *World) {
	w.Checks(200)
	var waits, noticed, back Times
	rounds := w.Rounds(1, 6)
	late := 0
	for n := range rounds {
		deaf, first := n%len(w.Replicas), n*4%len(w.Keys)
		r := w.Replicas[deaf]
		w.Until("the replica to know the keys", func() bool {
			for key := range w.Keys {
				if !w.Allowed(deaf, key) {
					return false
				}
			}
			return true
		})
		// Its next probe then begins when the lease is gone. One that has begun would
		// wait for a watch that hears nothing, and not look again meanwhile: a
		// lease that somebody revokes is seen by the next probe, no earlier.
		w.Until("the replica to have just proven itself", func() bool {
			age := r.Status().Store.ProofAge
			return age >= 0 && age < w.Options.S/20
		})
		over := w.Fault(deaf, "replica %d hears of nothing, and its lease is revoked", deaf)
		for _, l := range r.Links {
			l.Only(etcdtest.WatchLinks)
			l.FreezeAnswers()
		}
		var waiting sync.WaitGroup
		waiting.Go(func() {
			s := w.Rec.Stream()
			one := w.set(s, first, LevelApp, closing(LevelApp), true)
			if one.Receipt == nil {
				return
			}
			took := one.Receipt.End - one.End
			waits.Add(took)
			w.Expect(G2, took >= w.Options.S+time.Second-100*time.Millisecond && one.Receipt.Fenced > 0,
				"the receipt came %v after the commit, %d applied and %d fenced, though a replica that was on the list has not acknowledged and its lease is gone; want %v",
				round(took), one.Receipt.Applied, one.Receipt.Fenced, w.Options.S+time.Second)
			for i := range w.Replicas {
				w.checkOn(context.Background(), s, i, first)
			}
		})
		w.Wait(100 * time.Millisecond)
		before := r.lease()
		r.unregister()
		gone := w.Rec.Now()
		// It looks for its registration with every proof.
		w.Until("the replica to have had the time of a probe, and some", func() bool {
			if c := w.Check(deaf, 1); !c.Yes() && noticed.Count() == n {
				noticed.Add(c.Start - gone)
			}
			return w.Rec.Now()-gone > time.Second
		})
		// By now it may have registered again, and be waited for again. It has no
		// proof since, so it may just as well be gone.
		for _, l := range r.Links {
			l.Only(etcdtest.AllLinks)
			l.FreezeAnswers()
		}
		r.unregister()
		for i := 1; i < 4; i++ {
			one := w.Revoke((first+i)%len(w.Keys), Level(i), true)
			if one.Receipt != nil && one.Receipt.Total < len(w.Replicas) {
				late++
			}
			for range 4 {
				w.Check(deaf, (first+i)%len(w.Keys))
			}
		}
		waiting.Wait()
		for _, l := range r.Links {
			l.Heal()
		}
		healed := w.Rec.Now()
		w.Eventually(G3, 15*time.Second, "the replica to answer again", func() bool { return w.Allowed(deaf, (first+5)%len(w.Keys)) })
		back.Add(w.Rec.Now() - healed)
		now := r.lease()
		w.Expect(G6, now != 0 && now != before, "the replica says yes and is not registered again")
		over()
		w.Approve(first, LevelApp, false)
		for i := 1; i < 4; i++ {
			w.Approve((first+i)%len(w.Keys), Level(i), false)
		}
	}
	w.Figure(G2, "lease lost: receipts that waited for who had held it", "%v (S + 1 s = %v)", &waits, w.Options.S+time.Second)
	w.Figure(G2, "lease lost: the replica refuses", "%v after its registration was gone", &noticed)
	w.Figure(G2, "lease lost: later receipts that did not count on it", "%d", late)
	w.Figure(G3, "lease lost: answers again after the fault", "%v", &back)
}
