package faults

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
)

// unknownOutcome is the guard of a writer whose answer is lost.
const unknownOutcome = "an outcome that is called unknown when it is"

// Two managers revoke and approve the same keys at the same time, and the
// answers of etcd are lost on their way again and again. What each of them was
// told has to fit into one order with what is read.
func TestManagersContend(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "two managers", Faults: "two managers change the same keys, their answers are lost, they try again",
		Guarantees: []Guarantee{G4, G5, G8},
		Options:    Options{Keys: 6, WriteTimeout: 300 * time.Millisecond},
		Run:        managersContend,
		Guards:     []Guard{{Name: unknownOutcome, Guarantee: G8}},
	})
}

// losing is an etcd whose answer to a change may be lost: before is called when
// one is about to be sent.
type losing struct {
	*clientv3.Client
	before func()
}

func (l losing) Txn(ctx context.Context) clientv3.Txn {
	return losingTxn{l.Client.Txn(ctx), l.before}
}

type losingTxn struct {
	clientv3.Txn
	before func()
}

// If is what a change begins with, and a read does not.
func (t losingTxn) If(conditions ...clientv3.Cmp) clientv3.Txn {
	t.before()
	return t.Txn.If(conditions...)
}

func managersContend(w *World) {
	w.Checks(100)
	over := w.Fault(Everyone, "answers to managers are lost")
	l, ctx := w.load()
	var outcomes [3]atomic.Int64
	var already atomic.Int64
	for range 2 {
		p := etcdtest.NewProxy(w.T, w.Store.Endpoint())
		s := w.Rec.Stream()
		store := losing{w.Dial(p.Endpoint()), func() {
			if rand.IntN(5) == 0 {
				p.FreezeAnswers()
				time.AfterFunc(100*time.Millisecond+rand.N(500*time.Millisecond), p.Thaw)
			}
		}}
		l.wg.Go(func() {
			for ctx.Err() == nil {
				key, level, action := rand.IntN(len(w.Keys)), []Level{LevelKey, LevelApp}[rand.IntN(2)], ledger.StatusAction(rand.IntN(2))
				one := w.manage(s, store, action, []ledger.Target{w.Keys[key].flags[level]}, []flagOf{{key, level}})[0]
				outcomes[one.Outcome].Add(1)
				if one.Already {
					already.Add(1)
				}
				w.Wait(rand.N(20 * time.Millisecond))
			}
		})
		l.wg.Go(func() {
			for ctx.Err() == nil {
				w.Wait(50*time.Millisecond + rand.N(200*time.Millisecond))
				p.Cut()
			}
		})
	}
	for end := w.Rec.Now() + w.For(5*time.Second, 15*time.Second); w.Rec.Now() < end; w.Wait(3 * time.Millisecond) {
		w.ReadFlag(rand.IntN(len(w.Keys)), []Level{LevelKey, LevelApp}[rand.IntN(2)])
	}
	l.Stop()
	over()
	w.Figure(G8, "two managers", "%d changes acknowledged (%d were so already), %d failed, %d with an unknown outcome",
		outcomes[Acked].Load(), already.Load(), outcomes[Failed].Load(), outcomes[Unknown].Load())
}
