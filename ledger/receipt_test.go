package ledger_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// brief is a staleness budget for replicas that do not answer: with the second
// for the clocks a wait takes a little over a second.
const brief = 200 * time.Millisecond

func registered(id string, budget time.Duration, acknowledged int64) string {
	return keyspace.Replica{Version: "test", Host: "host-" + id, Pid: 7, StalenessBudget: budget, Acknowledged: acknowledged, Fresh: true, At: time.Now()}.Value()
}

// register stands for a replica that has begun.
func (s *store) register(id string, budget time.Duration) {
	s.t.Helper()
	s.set(s.space.Replica(id), registered(id, budget, 0))
}

// ack stands for a replica that acknowledges a revision.
func (s *store) ack(id string, budget time.Duration, revision int64) {
	s.t.Helper()
	s.set(s.space.Replica(id), registered(id, budget, revision))
}

// waiting runs Wait beside the test.
type waiting struct {
	done    chan struct{}
	receipt ledger.Receipt
	err     error
	took    time.Duration
}

func wait(ctx context.Context, c ledger.Change) *waiting {
	w := &waiting{done: make(chan struct{})}
	began := time.Now()
	go func() {
		defer close(w.done)
		w.receipt, w.err = c.Wait(ctx)
		w.took = time.Since(began)
	}()
	return w
}

func (w *waiting) get(t *testing.T) ledger.Receipt {
	t.Helper()
	select {
	case <-w.done:
	case <-time.After(20 * time.Second):
		t.Fatal("the receipt does not come")
	}
	if w.err != nil {
		t.Fatalf("wait: %v", w.err)
	}
	return w.receipt
}

// still fails the test if the receipt comes within d.
func (w *waiting) still(t *testing.T, d time.Duration, why string) {
	t.Helper()
	select {
	case <-w.done:
		t.Fatalf("the receipt came %s: %+v, %v", why, w.receipt, w.err)
	case <-time.After(d):
	}
}

func (s *store) prepared() *store {
	s.mustLoad(ledger.ImportOptions{}, weather())
	return s
}

// Acknowledgements come in any order, and the receipt with the last of them.
func TestReceipt(t *testing.T) {
	s := newStore(t).prepared()
	const n = 12
	for i := range n {
		s.register(fmt.Sprint(i), time.Minute)
	}
	c := s.mustSet(ledger.Revoke, keyTarget)
	w := wait(t.Context(), c)
	for i, id := range rand.Perm(n) {
		if i == n-1 {
			w.still(t, 50*time.Millisecond, "with one acknowledgement missing")
		}
		s.ack(fmt.Sprint(id), time.Minute, c.Revision+int64(i)) // at it, or a little above
	}
	r := w.get(t)
	if r.Revision != c.Revision || len(r.Replicas) != n || r.Count(ledger.Applied) != n || r.Slowest() <= 0 || r.Unread != nil {
		t.Errorf("got %+v, want %d applied at %d", r, n, c.Revision)
	}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"revision":%d,"replicas":{"total":12,"applied":12,"fenced":0},"slowestMs":`, c.Revision)
	if !strings.HasPrefix(string(text), want) || strings.Contains(string(text), "notAnswered") {
		t.Errorf("got %s, want %s…", text, want)
	}
	if by := time.Until(r.UnregisteredBy); by > 61*time.Second || by < 30*time.Second {
		t.Errorf("unregistered replicas refuse in %v, want about 61 s", by)
	}
	// Whoever asks later is told the same.
	if r, err := c.Wait(t.Context()); err != nil || r.Count(ledger.Applied) != n {
		t.Errorf("later: got %+v, %v", r, err)
	}
}

// What is no acknowledgement: each ends as fenced, not before its time.
func TestNoAcknowledgement(t *testing.T) {
	for _, tt := range []struct {
		name     string
		before   func(s *store) // before the revocation
		after    func(s *store, revision int64)
		vanished bool
	}{
		{"silence", func(s *store) {}, func(*store, int64) {}, false},
		{"the registration vanishes", func(s *store) {}, func(s *store, _ int64) { s.set(s.space.Replica("r"), "-") }, true},
		{"below the revision", func(s *store) {}, func(s *store, rev int64) { s.ack("r", brief, rev-1) }, false},
		{"above what there is", func(s *store) {}, func(s *store, rev int64) { s.ack("r", brief, rev+100) }, false},
		{"at its own revision", func(s *store) {}, func(s *store, rev int64) { s.ack("r", brief, rev+1) }, false},
		{"from before", func(s *store) { s.ack("r", brief, 1_000_000) }, func(*store, int64) {}, false},
		{"another's", func(s *store) {}, func(s *store, rev int64) { s.ack("r2", brief, rev) }, false},
		{"unreadable", func(s *store) {}, func(s *store, rev int64) {
			s.set(s.space.Replica("r"), strings.Replace(registered("r", brief, rev), `"v":1`, `"v":2`, 1))
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t).prepared()
			s.register("r", brief)
			s.register("good", time.Minute)
			tt.before(s)
			c := s.mustSet(ledger.Revoke, keyTarget)
			answered := c.UnregisteredBy().Add(-61 * time.Second)
			w := wait(t.Context(), c)
			tt.after(s, c.Revision)
			// Others go on, and write on.
			s.set("/keygate/acme/.barrier", "x", "/keygate/acme/.barrier", "y")
			s.ack("good", time.Minute, c.Revision)
			r := w.get(t)
			if took := time.Since(answered); took < time.Second+brief {
				t.Errorf("the receipt came after %v, want S + 1 s", took)
			}
			if len(r.Replicas) != 2 || r.Count(ledger.Fenced) != 1 || r.Count(ledger.Applied) != 1 || r.Unread != nil {
				t.Fatalf("got %+v, want one fenced of two", r)
			}
			for _, a := range r.Replicas {
				if a.ID == "r" && (a.Answer != ledger.Fenced || a.Vanished != tt.vanished) {
					t.Errorf("got %+v, want it fenced", a)
				}
			}
			j := r.JSON()
			if len(j.NotAnswered) != 1 || j.NotAnswered[0].ID != "r" || j.NotAnswered[0].Vanished != tt.vanished {
				t.Errorf("got %+v, want the one that did not answer named", j)
			}
		})
	}
}

// A registration that comes back with an acknowledgement has acknowledged.
func TestVanishedAndBack(t *testing.T) {
	s := newStore(t).prepared()
	s.register("r", time.Minute)
	c := s.mustSet(ledger.Revoke, keyTarget)
	w := wait(t.Context(), c)
	s.set(s.space.Replica("r"), "-")
	s.register("r", time.Minute)
	w.still(t, 100*time.Millisecond, "for a registration without an acknowledgement")
	s.ack("r", time.Minute, c.Revision)
	if r := w.get(t); r.Count(ledger.Applied) != 1 || r.Replicas[0].Vanished {
		t.Errorf("got %+v, want it applied", r)
	}
}

// A registration that cannot be read counts with the largest S that is allowed,
// and so does one that claims more, or none.
func TestUnreadableRegistration(t *testing.T) {
	s := newStore(t).prepared()
	for id, value := range map[string]string{
		"garbage": "\xff", "empty": "", "other version": `{"v":2,"stalenessBudgetMs":1}`,
		"no budget": registered("x", 0, 0), "negative": registered("x", -time.Second, 0), "large": registered("x", time.Hour, 0),
	} {
		s.set(s.space.Replica(id), value)
	}
	s.register("brief", brief)
	c := s.mustSet(ledger.Revoke, keyTarget)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	r, err := c.Wait(ctx)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the end of the test's patience", err)
	}
	if len(r.Replicas) != 7 || r.Count(ledger.Fenced) != 1 || r.Count(ledger.Pending) != 6 {
		t.Errorf("got %+v, want one fenced of seven", r)
	}
}

// Who registers after the revision is not waited for: its first proof is younger.
func TestRegisteredLater(t *testing.T) {
	s := newStore(t).prepared()
	s.register("r", time.Minute)
	c := s.mustSet(ledger.Revoke, keyTarget)
	s.register("late", time.Minute)
	w := wait(t.Context(), c)
	s.ack("r", time.Minute, c.Revision)
	if r := w.get(t); len(r.Replicas) != 1 || r.Count(ledger.Applied) != 1 {
		t.Errorf("got %+v, want one replica", r)
	}
}

// One acknowledgement covers every barrier below it.
func TestCoalescedAcknowledgements(t *testing.T) {
	s := newStore(t).prepared()
	s.register("r", time.Minute)
	var all []*waiting
	var last ledger.Change
	for i := range 5 {
		last = s.mustSet(ledger.StatusAction(i%2), keyTarget)
		all = append(all, wait(t.Context(), last))
	}
	s.ack("r", time.Minute, last.Revision)
	for _, w := range all {
		if r := w.get(t); r.Count(ledger.Applied) != 1 {
			t.Errorf("got %+v, want it applied", r)
		}
	}
}

func TestNoReplica(t *testing.T) {
	s := newStore(t).prepared()
	c := s.mustSet(ledger.Revoke, keyTarget)
	if r, err := c.Wait(t.Context()); err != nil || len(r.Replicas) != 0 || r.Revision != c.Revision {
		t.Errorf("got %+v, %v", r, err)
	}
	c, err := s.setStatus(ledger.Revoke, ledger.StatusOptions{}, appTarget)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(t.Context()); err == nil {
		t.Error("got a receipt without a barrier")
	}
}

// What the watch missed by a compaction is read from the list.
func TestCompactedWatch(t *testing.T) {
	s := newStore(t).prepared()
	s.register("r", time.Minute)
	s.register("gone", brief)
	c := s.mustSet(ledger.Revoke, keyTarget)
	s.ack("r", time.Minute, c.Revision)
	s.set(s.space.Replica("gone"), "-")
	_, rev := s.dump()
	if _, err := s.kv.Compact(s.ctx(), rev); err != nil {
		t.Fatal(err)
	}
	r := wait(t.Context(), c).get(t)
	if r.Count(ledger.Applied) != 1 || r.Count(ledger.Fenced) != 1 {
		t.Errorf("got %+v, want one applied and one fenced", r)
	}
	for _, a := range r.Replicas {
		if a.Vanished != (a.ID == "gone") {
			t.Errorf("got %+v", a)
		}
	}
}

// deaf has a watch that says nothing.
type deaf struct{ *clientv3.Client }

func (d deaf) Watch(ctx context.Context, _ string, _ ...clientv3.OpOption) clientv3.WatchChan {
	c := make(chan clientv3.WatchResponse)
	context.AfterFunc(ctx, func() { close(c) })
	return c
}

// A watch that is dead without a word does not hide an acknowledgement.
func TestDeafWatch(t *testing.T) {
	s := newStore(t).prepared()
	s.register("r", time.Minute)
	c, err := ledger.New(ledger.Config{Store: deaf{s.kv}, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, ledger.Revoke, []ledger.Target{keyTarget}, ledger.StatusOptions{Barrier: true})
	if err != nil {
		t.Fatal(err)
	}
	s.ack("r", time.Minute, c.Revision)
	if r := wait(t.Context(), c).get(t); r.Count(ledger.Applied) != 1 {
		t.Errorf("got %+v, want it applied", r)
	}
}

// unlisted lets nobody list anything.
type unlisted struct{ *clientv3.Client }

func (u unlisted) Do(context.Context, clientv3.Op) (clientv3.OpResponse, error) {
	return clientv3.OpResponse{}, errors.New("no list today")
}

// Lists that fail do not hide an acknowledgement either, and where there is none
// the receipt says why.
func TestNoList(t *testing.T) {
	s := newStore(t).prepared()
	s.register("r", time.Minute)
	s.register("silent", brief)
	c, err := ledger.New(ledger.Config{Store: unlisted{s.kv}, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, ledger.Revoke, []ledger.Target{keyTarget}, ledger.StatusOptions{Barrier: true})
	if err != nil {
		t.Fatal(err)
	}
	w := wait(t.Context(), c)
	s.ack("r", time.Minute, c.Revision)
	r := w.get(t)
	if r.Count(ledger.Applied) != 1 || r.Count(ledger.Fenced) != 1 || r.Unread == nil {
		t.Errorf("got %+v, want one applied, one fenced, and why there is no list", r)
	}
}

// elsewhere is an etcd in whose place another one answers after the change.
type elsewhere struct {
	*clientv3.Client
	other *clientv3.Client
}

func (e elsewhere) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	return e.other.Do(ctx, op)
}

func (e elsewhere) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	return e.other.Watch(ctx, key, opts...)
}

// What another cluster holds is no acknowledgement, whatever its revision, and no
// registration that vanished: an etcd was restored or replaced, and is named.
func TestReplacedDuringWait(t *testing.T) {
	for name, listed := range map[string]bool{"watched": false, "listed": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, other := newStore(t).prepared(), newStore(t).prepared()
			s.register("r", brief)
			s.register("gone", brief)
			kv := elsewhere{s.kv, other.kv}
			c, err := ledger.New(ledger.Config{Store: kv, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, ledger.Revoke, []ledger.Target{keyTarget}, ledger.StatusOptions{Barrier: true})
			if err != nil {
				t.Fatal(err)
			}
			for rev := int64(0); rev <= c.Revision; _, rev = other.dump() {
				other.set("/x", "x")
			}
			if listed {
				other.ack("r", brief, c.Revision)
			}
			w := wait(t.Context(), c)
			if !listed {
				other.ack("r", brief, c.Revision)
			}
			r := w.get(t)
			if r.Count(ledger.Fenced) != 2 || !errors.Is(r.Unread, ledger.ErrReplaced) || !strings.Contains(r.JSON().AcknowledgementsUnread, "restored or replaced") {
				t.Errorf("got %+v, want both fenced, and that another cluster answers", r)
			}
			for _, a := range r.Replicas {
				if a.Vanished {
					t.Errorf("got %+v: the other cluster knows nothing of it", a)
				}
			}
		})
	}
}

// A caller that gives up leaves the change as it is, and is told how far it
// came.
func TestWaitGivenUp(t *testing.T) {
	s := newStore(t).prepared()
	s.register("r1", time.Minute)
	s.register("r2", time.Minute)
	c := s.mustSet(ledger.Revoke, keyTarget)
	s.ack("r1", time.Minute, c.Revision)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	r, err := c.Wait(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || r.Count(ledger.Applied) != 1 || r.Count(ledger.Pending) != 1 || r.Revision != c.Revision {
		t.Errorf("got %+v, %v: want one applied, one pending", r, err)
	}
	if got, _ := s.value(keyFolder + "status"); got != "revoked" {
		t.Errorf("got %q, want revoked", got)
	}
}

// etcd away during the wait: the time holds, and the receipt says that nothing
// could be read. Back in time, the acknowledgements are read.
func TestEtcdAwayDuringWait(t *testing.T) {
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	for name, back := range map[string]bool{"gone": false, "back": true} {
		t.Run(name, func(t *testing.T) {
			p := etcdtest.StartProcess(t)
			s := (&store{t: t, kv: p.Client(t), space: space}).prepared()
			budget := brief
			if back {
				budget = time.Minute
			}
			s.register("r", budget)
			c := s.mustSet(ledger.Revoke, keyTarget)
			began := time.Now()
			w := wait(t.Context(), c)
			w.still(t, 50*time.Millisecond, "without an acknowledgement")
			p.Kill()
			if back {
				p.Restart()
				s.ack("r", budget, c.Revision)
			}
			r := w.get(t)
			took := time.Since(began)
			switch {
			case back && (r.Count(ledger.Applied) != 1 || r.Unread != nil):
				t.Errorf("got %+v, want it applied", r)
			case !back && (r.Count(ledger.Fenced) != 1 || r.Unread == nil || r.JSON().AcknowledgementsUnread == ""):
				t.Errorf("got %+v, want it fenced, and why nothing was read", r)
			case !back && (took < time.Second || took > 10*time.Second):
				t.Errorf("the receipt came after %v, want S + 1 s", took)
			}
		})
	}
}

// replicas acknowledge barriers as real ones do, until the test ends.
func (s *store) replicas(n int, budget time.Duration) {
	for i := range n {
		s.register(fmt.Sprintf("auto-%d", i), budget)
	}
	ctx, cancel := context.WithCancel(s.t.Context())
	_, rev := s.dump()
	events := s.kv.Watch(ctx, s.space.Watched(), clientv3.WithPrefix(), clientv3.WithRev(rev+1))
	var wg sync.WaitGroup
	wg.Go(func() {
		for resp := range events {
			for _, e := range resp.Events {
				if !strings.HasSuffix(string(e.Kv.Key), "/.barrier") {
					continue
				}
				for i := range n {
					id := fmt.Sprintf("auto-%d", i)
					if _, err := s.kv.Put(ctx, s.space.Replica(id), registered(id, budget, e.Kv.ModRevision)); err != nil && ctx.Err() == nil {
						s.t.Errorf("acknowledge: %v", err)
					}
				}
			}
		}
	})
	s.t.Cleanup(func() { cancel(); wg.Wait() })
}

// Many revocations at once over a fleet, each with a receipt of its own.
func TestReceiptsAtOnce(t *testing.T) {
	s := newStore(t)
	targets := s.manyKeys(40)
	s.replicas(5, time.Minute)
	var wg sync.WaitGroup
	for _, target := range targets {
		wg.Go(func() {
			c, err := ledger.New(ledger.Config{Store: s.kv, Space: s.space}).SetStatus(t.Context(), ledger.By{}, ledger.Revoke, []ledger.Target{target}, ledger.StatusOptions{Barrier: true})
			if err != nil {
				t.Error(err)
				return
			}
			if r, err := c.Wait(t.Context()); err != nil || r.Count(ledger.Applied) != 5 {
				t.Errorf("got %+v, %v: want 5 applied", r, err)
			}
		})
	}
	wg.Wait()
}

func TestBarrierAndList(t *testing.T) {
	s := newStore(t)
	s.replicas(2, time.Minute)
	s.set(s.space.Replica("broken"), "{")
	c, err := ledger.Barrier(t.Context(), s.kv, s.space, org)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	r, err := c.Wait(ctx)
	if err == nil || r.Count(ledger.Applied) != 2 || r.Count(ledger.Pending) != 1 {
		t.Errorf("got %+v, %v: want two applied, one pending", r, err)
	}
	all, rev, err := ledger.Replicas(t.Context(), s.kv, s.space)
	if err != nil || len(all) != 3 || rev < c.Revision {
		t.Fatalf("got %+v at %d, %v", all, rev, err)
	}
	for _, replica := range all {
		if (replica.Problem != "") != (replica.ID == "broken") || replica.Problem == "" && replica.Replica.Acknowledged != c.Revision {
			t.Errorf("got %+v", replica)
		}
	}
	if _, err := ledger.Barrier(t.Context(), s.kv, s.space, ".x"); err == nil {
		t.Error("got a barrier of an organization that cannot be")
	}
}
