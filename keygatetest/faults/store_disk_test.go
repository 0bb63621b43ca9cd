package faults

import (
	"errors"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
	"keygate/ledger"
)

// realSync is the guard of a slow disk: a disk that says it has synced.
const realSync = "a disk that syncs what it says"

// Every sync of etcd's disk takes 100 ms more. Acknowledgements come later, and
// what comes after them is as quick as ever.
func TestSlowDisk(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "slow disk", Faults: "each sync of etcd's disk takes 100 ms more",
		Guarantees: []Guarantee{G1, G2, G4},
		Options:    Options{Keys: 16, WriteTimeout: 10 * time.Second},
		Run:        slowDisk,
		Guards:     []Guard{{Name: realSync, Guarantee: G4}},
	})
}

func slowDisk(w *World) {
	const by = 100 * time.Millisecond
	w.Checks(300)
	fault := etcdtest.SlowSync(by)
	if w.lacks(realSync) {
		fault = "fdatasync,fsync:retval=0"
	}
	over := w.Fault(Everyone, "each sync takes %v more", by)
	end := w.Store.Inject(fault)
	var effect Effect
	var acknowledged, receipts Times
	for n := range w.Rounds(10, 60) {
		key, level := n/2%8, Level(n/8%int(numLevels))
		var one Write
		if n%2 == 0 {
			one = w.RevokeAndWatch(&effect, key, level)
		} else {
			one = w.Approve(key, level, false)
		}
		took := one.End - one.Start
		acknowledged.Add(took)
		w.Expect(G4, one.Outcome == Acked && took >= by, "a write was %v after %v, and no sync takes less than %v", one.Outcome, round(took), by)
		if n%4 == 3 {
			one = w.Revoke(8+n%8, level, true)
			w.Expect(G2, one.Receipt != nil, "no receipt on a slow disk")
			if one.Receipt != nil {
				receipts.Add(one.Receipt.End - one.Start)
			}
			w.Approve(8+n%8, level, false)
		}
	}
	end()
	over()
	w.Figure(G4, "slow disk: acknowledged after", "%v", &acknowledged)
	w.Figure(G1, "slow disk: acknowledgement to first refusal", "%v", &effect.Refused)
	w.Figure(G2, "slow disk: receipt after", "%v", &receipts)
}

// etcd's disk fails or is full, so that etcd ends its process and is started
// again. The answer to a write may be lost; none is wrong.
func TestBrokenDisk(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "broken disk", Faults: "etcd's disk fails to sync, or has no room: etcd ends and is started again",
		Guarantees: []Guarantee{G3, G4, G5},
		Options:    Options{Keys: 12},
		Run:        brokenDisk,
		Guards: []Guard{{Name: logOnDisk, Guarantee: G4}, {
			Name: "a proof that lasts until the next, within S", Guarantee: G3,
			Mutations: []variant.Mutation{{File: "statestore/probe.go", Old: "\tt0 := now()\n", New: "\te.proof.Store(nil)\n\tt0 := now()\n"}},
		}},
	})
}

func brokenDisk(w *World) {
	// A record that changes just before etcd goes away may have to be read again,
	// which it cannot be: what must go on is counted on keys that nobody changes.
	changed := len(w.Keys) / 2
	still := all(w, changed, len(w.Keys))
	w.know(still)
	m := w.startManager(changed)
	w.Checks(300)
	rounds := w.Rounds(2, 20)
	var ended, acknowledged Times
	refused := 0
	for n := range rounds {
		fault := []etcdtest.Fault{etcdtest.FailingSync, etcdtest.FullDisk}[n%2]
		w.Wait(50*time.Millisecond + rand.N(200*time.Millisecond))
		began := w.Rec.Now()
		over := w.Fault(Everyone, "the disk: %s", fault)
		end := w.Store.Inject(fault)
		w.Store.Wait()
		ended.Add(w.Rec.Now() - began)
		end()
		down := w.Rec.Now()
		w.Wait(w.Options.S / 6)
		if n == 0 && w.lacks(logOnDisk) {
			w.forget(func() { m.another(w) })
		}
		w.Store.Restart()
		m.another(w)
		acknowledged.Add(w.Rec.Now() - down)
		away := w.Rec.Now() - began
		over()
		m.expectWhole(w)
		if away < w.Options.S/2 { // the last proof was made up to S/5 before, and the next is made up to S/5 after
			refused += w.expectAnswers(began, still, "etcd was away for %v, S is %v", round(away), w.Options.S)
		}
		w.Wait(w.Options.S / 3) // for new proofs
	}
	m.stop()
	w.Figure(G4, "broken disk", "%d times, %d acknowledged writes lost", rounds, w.lostWrites())
	w.Figure(G3, "broken disk: etcd ended after", "%v", &ended)
	w.Figure(G3, "broken disk: checks refused while etcd was away", "%d, for %v", refused, &acknowledged)
}

// The database has reached its quota: etcd takes no put. A revocation goes
// through all the same, by deletion, with the command that one has at hand.
func TestQuotaReached(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "quota reached", Faults: "etcd's database is full, and takes deletions alone",
		Guarantees: []Guarantee{G2, G3, G5, G6},
		Options:    Options{Keys: 8, Etcd: []etcdtest.ProcessOption{etcdtest.Quota(8 << 20)}},
		Run:        quotaReached,
		Guards: []Guard{{
			Name: "revocation by deletion", Guarantee: G3,
			Mutations: []variant.Mutation{{
				File: "ledger/status.go",
				Old:  "if s.change.Action == Revoke && errors.Is(err, rpctypes.ErrNoSpace) {",
				New:  "if s.change.Action == Approve && errors.Is(err, errNotSent) {",
			}},
		}, {
			Name: "a registration before the first proof", Guarantee: G6,
			Mutations: []variant.Mutation{{
				File: "statestore/register.go",
				Old:  "\t\tif r := f.current.Load(); r != nil {\n\t\t\treturn r, nil\n\t\t}\n",
				New:  "\t\tif r := f.current.Load(); r != nil {\n\t\t\treturn r, nil\n\t\t}\n\t\tif f.trouble.Load() != nil {\n\t\t\treturn newRegistration(0, 1<<62), nil\n\t\t}\n",
			}},
		}},
	})
}

func quotaReached(w *World) {
	w.Checks(300)
	w.Revoke(0, LevelKey, false)
	over := w.Fault(Everyone, "the database is full")
	w.fill()
	endpoint := w.Store.Endpoint()

	approve := w.command(ledger.Approve, 0, endpoint)
	w.Expect(G3, approve.Err != nil && strings.Contains(approve.Err.Error(), "space"), "approve under a full etcd: got %v, want an error that says so", approve.Err)
	w.Expect(G3, !w.Allowed(0, 0), "a key whose approval failed is allowed")

	var refused, took Times
	for key := 1; key < 4; key++ {
		for i := range w.Replicas {
			w.Until("the key to be open", func() bool { return w.Allowed(i, key) })
		}
		revoke := w.command(ledger.Revoke, key, endpoint)
		if !w.Expect(G3, revoke.Err == nil && revoke.Deleted, "revoke under a full etcd: got %v, want a deletion (deleted: %v)", revoke.Err, revoke.Deleted) {
			continue
		}
		took.Add(revoke.Took)
		for i := range w.Replicas {
			w.Eventually(G3, w.Options.S, "the key to be refused", func() bool { return !w.Allowed(i, key) })
			refused.Add(w.Rec.Now() - revoke.End)
		}
	}
	// One that starts now cannot register, so no receipt could count on it.
	late := w.Replicas[len(w.Replicas)-1]
	late.Kill()
	late.Start()
	waited := w.command(ledger.Revoke, 4, endpoint, "--wait")
	if w.Expect(G3, waited.Err == nil, "revoke --wait under a full etcd: %v", waited.Err) {
		w.Expect(G2, waited.Receipt != nil && waited.Receipt.Fenced == len(w.Replicas), "got the receipt %+v, want one by time for each of %d replicas", waited.Receipt, len(w.Replicas))
		for i := range w.Replicas {
			w.Check(i, 4) // G2
		}
	}
	code, _, err := late.Ask("/readyz")
	w.Expect(G6, err == nil && code == http.StatusServiceUnavailable, "readiness of a replica that cannot register: got %d (%v), want %d", code, err, http.StatusServiceUnavailable)
	w.Expect(G6, strings.Contains(late.Log(), "etcd is full"), "a replica that cannot register does not say that etcd is full")
	w.drain()
	late.WaitReady()
	over()
	for key := range 5 {
		again := w.command(ledger.Approve, key, endpoint)
		w.Expect(G3, again.Err == nil, "approve after there is room again: %v", again.Err)
		for i := range w.Replicas {
			w.Eventually(G8, w.Options.S, "the key to be open again", func() bool { return w.Allowed(i, key) })
		}
	}
	w.Figure(G3, "quota reached: keygate revoke took, with its start", "%v", &took)
	w.Figure(G3, "quota reached: refused after keygate revoke ended", "%v", &refused)
	w.Figure(G2, "quota reached: receipt by time after", "%s (S = %v)", milliseconds(waited.Took), w.Options.S)
}

// fill etcd until it refuses.
func (w *World) fill() {
	w.T.Helper()
	for n := 0; ; n++ {
		// Less and less, so that no small write fits in either.
		for _, size := range []int{512 << 10, 16 << 10, 256} {
			_, err := w.Client.Put(w.T.Context(), "/filler", strings.Repeat("x", size))
			switch {
			case errors.Is(err, rpctypes.ErrNoSpace):
				return
			case err != nil:
				w.T.Fatalf("fill etcd: %v", err)
			}
		}
	}
}

// drain makes room again, as an operator does.
func (w *World) drain() {
	w.T.Helper()
	ctx := w.T.Context()
	r, err := w.Client.Delete(ctx, "/filler")
	if err == nil {
		_, err = w.Client.Compact(ctx, r.Header.Revision, clientv3.WithCompactPhysical())
	}
	if err == nil {
		_, err = w.Client.Defragment(ctx, w.Store.Endpoint())
	}
	if err == nil {
		_, err = w.Client.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	}
	if err != nil {
		w.T.Fatalf("make room in etcd: %v", err)
	}
}
