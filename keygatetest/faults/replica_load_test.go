package faults

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
)

// A read of a record is answered by etcd and then delayed. The record is revoked
// meanwhile: the watch tells of it, the receipt comes, and then the old answer
// arrives. Whoever waits for that read must not be told what it says.
func TestDelayedLoad(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "delayed load", Faults: "the answer to a read arrives after a later revocation's event and receipt",
		Guarantees: []Guarantee{G2, G5},
		Options:    Options{Replicas: 2, Keys: 32},
		Run:        delayedLoad,
		Guards: []Guard{{
			Name: "the comparison of a load with the fence after it", Guarantee: G2,
			Mutations: []variant.Mutation{
				{File: "statestore/load.go", Old: "if !e.current(recs[i], w, hashes[i]) {", New: "if recs[i].rev == 0 {"},
				{File: "statestore/load.go", Old: "if e.current(f.rec, want, h) {", New: "if f.rec.rev > 0 {"},
			},
		}},
	})
}

func delayedLoad(w *World) {
	const slow = 0
	r := w.Replicas[slow]
	s := w.Rec.Stream()
	ask := func(all *sync.WaitGroup, key int) {
		all.Go(func() { w.checkOn(context.Background(), s, slow, key) })
	}
	var early Times
	asked := 0
	before, _ := r.Metric("keygate_loads_repeated_total")
	rounds := w.Rounds(12, 120)
	for n := range rounds {
		key, level := n%len(w.Keys), Level(n/2%int(numLevels))
		w.Until("the key to be allowed", func() bool { return w.Allowed(slow, key) })
		// One event would be applied to the cached record; after two it is read
		// again.
		w.Approve(key, level, false)
		last := w.Approve(key, level, false)
		w.Until("the approvals to be applied", func() bool {
			applied, _ := r.Metric("keygate_applied_revision")
			return int64(applied) >= last.Revision
		})

		over := w.Fault(slow, "replica %d: reads are answered late", slow)
		loads, _ := r.Metric("keygate_loads_total")
		for _, l := range r.Links {
			l.Only(etcdtest.KVLinks)
			l.FreezeAnswers()
		}
		var all sync.WaitGroup
		ask(&all, key)
		w.Until("the read to be sent", func() bool {
			now, _ := r.Metric("keygate_loads_total")
			return now > loads
		})
		w.Wait(5 * time.Millisecond) // for etcd to answer it
		one := w.Revoke(key, level, true)
		if one.Receipt != nil && one.Receipt.Fenced == 0 {
			early.Add(one.Receipt.End - one.End)
		}
		for range 8 {
			ask(&all, key)
			asked++
		}
		w.Wait(rand.N(60 * time.Millisecond))
		if n%10 == 9 {
			w.Wait(time.Second) // until the read is given up
		}
		for _, l := range r.Links {
			l.Heal()
		}
		all.Wait()
		over()
		for range 4 {
			ask(&all, key)
		}
		all.Wait()
		w.Approve(key, level, false)
	}
	after, _ := r.Metric("keygate_loads_repeated_total")
	w.Figure(G2, "delayed load: reads that were overtaken", "%d of %d; read again: %.0f", early.Count(), rounds, after-before)
	w.Figure(G2, "delayed load: checks that joined such a read after the receipt, all refused", "%d", asked)
}
