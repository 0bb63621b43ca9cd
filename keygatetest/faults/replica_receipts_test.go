package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// Revocations, each waiting for its receipt, while all kinds of faults come and
// go on the replicas. As soon as there is a receipt, every replica is asked for
// the key many times at once: the checker wants no yes to any of them.
func TestReceipts(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "receipts", Faults: "all kinds on every replica (network, pause, kill, lease), while revocations wait",
		Guarantees: []Guarantee{G2, G3, G5, G6},
		Options:    Options{Keys: 96},
		Run:        receipts,
		Guards: []Guard{
			{
				Name: "acknowledgement of what has been applied alone", Guarantee: G2, Tries: 5,
				Mutations: []variant.Mutation{
					{File: "statestore/register.go", Old: "applied := e.applied.Load()\n\tif r == nil", New: "applied := m.revision\n\tif r == nil"},
					// As soon as a read has told of a newer revision.
					{File: "statestore/probe.go", Old: "h := head.Header.Revision\n", New: "h := head.Header.Revision\n\tsignal(s.fleet.due)\n"},
				},
			},
			{
				// In the manager: every revocation is by its command, see revoke.
				Name: "the wait for who does not answer", Guarantee: G2, Tries: 4,
				Mutations: []variant.Mutation{{File: "ledger/receipt.go",
					Old: "if s.Answer == Pending && time.Since(w.change.answered) >= s.budget+clockRates {",
					New: "if s.Answer == Pending {",
				}, {File: "ledger/receipt.go",
					Old: "return least - time.Since(w.change.answered)",
					New: "return least - time.Since(w.change.answered) - w.change.registered[0].budget()",
				}},
			},
			{
				Name: "registration before the first proof", Guarantee: G2,
				Mutations: []variant.Mutation{
					{File: "statestore/probe.go", Old: "member, err := s.fleet.await(read) // before t0", New: "member, err := newRegistration(0, 1<<62), error(nil)"},
					// Nothing hurries it then.
					{File: "statestore/register.go", Old: "func (s *Store) register(ctx context.Context) {\n", New: "func (s *Store) register(ctx context.Context) {\n\ttime.Sleep(4 * time.Second)\n"},
				},
			},
		},
	})
}

func receipts(w *World) {
	w.Checks(w.Rounds(150, 300))
	r := &revokers{w: w}
	ctx, stop := context.WithCancel(w.T.Context())
	defer stop()
	workers := w.Rounds(8, 16)
	var running sync.WaitGroup
	for i := range workers {
		var own []int
		for key := i; key < len(w.Keys); key += workers {
			own = append(own, key)
		}
		running.Go(func() { r.run(ctx, own, i%2 == 0) })
	}
	w.Wait(300 * time.Millisecond)
	kinds := troubles(r)
	trouble := &troubled{w: w}
	trouble.begin(kinds[0], 4500*time.Millisecond) // what each guard needs
	for round := range w.Rounds(1, 4) {
		rest := slices.Clone(kinds)
		rand.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
		if !w.Long {
			rest = rest[:2]
		}
		for _, k := range rest {
			w.Wait(rand.N(w.For(300*time.Millisecond, time.Second)))
			trouble.begin(k, rand.N(w.For(2*time.Second, 5*time.Second)))
		}
		if w.Long && round%2 == 1 {
			trouble.endAll()
			w.Wait(3 * time.Second)
		}
	}
	trouble.endAll()
	// In calm weather they take milliseconds; a machine that is busy needs its time.
	for enough, end := w.Rounds(40, 1000), w.Rec.Now()+3*time.Minute; r.count() < enough; w.Wait(10 * time.Millisecond) {
		if w.Rec.Now() > end {
			w.T.Fatalf("%d receipts, want %d", r.count(), enough)
		}
	}
	stop()
	running.Wait()
	r.figures()
}

// revokers revoke keys, wait for the receipt, ask everybody, and approve the
// keys again.
type revokers struct {
	w *World
	// told is held by whoever takes a live replica's registration away, until the
	// replica knows: so long a receipt does not count on it.
	told sync.RWMutex

	early, late Times // acknowledged by all; some have been silent for too long
	asked       Times // checks right after a receipt
	commands    Times // receipts that keygate revoke printed
}

func (r *revokers) count() int { return r.early.Count() + r.late.Count() }

func (r *revokers) figures() {
	w := r.w
	w.Figure(G2, "receipts: revocations that waited", "%d: %d acknowledged by every replica, %d by time; %d of them by keygate revoke --wait",
		r.count(), r.early.Count(), r.late.Count(), r.commands.Count())
	w.Figure(G2, "receipts: checks that began right after one, all refused", "%d", r.asked.Count())
	w.Figure(G2, "receipts: time of those acknowledged", "%v", &r.early)
	w.Figure(G2, "receipts: time of the others", "%v (S + 1 s = %v)", &r.late, w.Options.S+time.Second)
}

// run takes its keys in turn. One that it has approved again has been asked for
// by everybody when its turn comes, and is in every cache.
func (r *revokers) run(ctx context.Context, keys []int, commands bool) {
	w, s := r.w, r.w.Rec.Stream()
	onlyCommands := w.Guard != nil && strings.HasPrefix(w.Guard.Mutations[0].File, "ledger/")
	for n := 0; ctx.Err() == nil; n++ {
		key, level := keys[n%len(keys)], Level(n/len(keys)%int(numLevels))
		var one Write
		if onlyCommands || commands && n%16 == 7 {
			level = LevelKey
			one = r.command(s, key)
		} else {
			one = r.revoke(s, key, level)
		}
		if one.Receipt != nil {
			var all sync.WaitGroup
			for i := range w.Replicas {
				for range 4 {
					all.Go(func() {
						c := w.checkOn(context.Background(), s, i, key)
						r.asked.Add(c.End - c.Start)
					})
				}
			}
			all.Wait()
		}
		w.set(s, key, level, opening(level), false)
	}
}

// revoke as the management API will: by the ledger, in this process.
func (r *revokers) revoke(s *Stream, key int, level Level) Write {
	w, k := r.w, r.w.Keys[key]
	one := Write{Path: k.Paths[level], Level: level, Keys: k.with[level], Value: closing(level)}
	r.told.RLock()
	change := w.commit(&one, k.flags[level], true)
	r.told.RUnlock()
	if change != nil {
		one.Receipt = w.receipt(*change)
	}
	r.add(&one)
	s.Write(one)
	return one
}

// command revokes as an operator does: keygate revoke --wait, the receipt is
// there when it has ended.
func (r *revokers) command(s *Stream, key int) Write {
	w, k := r.w, r.w.Keys[key]
	one := Write{Path: k.Paths[LevelKey], Level: LevelKey, Keys: k.with[LevelKey], Value: closing(LevelKey), Managed: true}
	r.told.RLock()
	defer r.told.RUnlock() // nobody here knows when it commits
	cmd := exec.Command(w.binary, "revoke", "key", k.flags[LevelKey].Record.Key.String(), "--yes", "--wait", "-o", "json",
		"--etcd-endpoints", w.Store.Endpoint())
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	one.Start = w.Rec.Now()
	err := cmd.Run()
	one.End = w.Rec.Now()
	var receipt ledger.ReceiptJSON
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &receipt)
	}
	if err != nil {
		w.Note("keygate revoke: %v: %s", err, problem.String())
		s.Write(one)
		return one
	}
	one.Outcome, one.Revision = Acked, receipt.Revision
	one.Receipt = &Receipt{End: one.End, Total: receipt.Replicas.Total, Applied: receipt.Replicas.Applied, Fenced: receipt.Replicas.Fenced}
	r.add(&one)
	r.commands.Add(one.End - one.Start)
	s.Write(one)
	return one
}

func (r *revokers) add(one *Write) {
	switch {
	case one.Receipt == nil:
	case one.Receipt.Applied == one.Receipt.Total:
		r.early.Add(one.Receipt.End - one.Start)
	default:
		r.late.Add(one.Receipt.End - one.Start)
	}
}

// --- trouble -------------------------------------------------------------------

// kind of trouble that one replica may have.
type kind struct {
	name  string
	begin func(r *Replica) (end func())
}

// troubles are all kinds. The first is the one in which a replica that is not
// waited for, or acknowledges too early, is caught: it has just come, is warm,
// and answers reads but hears of nothing.
func troubles(revokers *revokers) []kind {
	links := func(set, unset func(p *etcdtest.Proxy)) func(*Replica) func() {
		return func(r *Replica) func() {
			for _, l := range r.Links {
				set(l)
			}
			return func() {
				for _, l := range r.Links {
					unset(l)
				}
			}
		}
	}
	heal := func(p *etcdtest.Proxy) { p.Heal() }
	nothing := func(*etcdtest.Proxy) {}
	deaf := links(func(p *etcdtest.Proxy) { p.Only(etcdtest.WatchLinks); p.FreezeAnswers() }, heal)
	return []kind{
		{"restarted, then hears of nothing", func(r *Replica) func() {
			r.restartAtOnce()
			r.w.Wait(400 * time.Millisecond)
			return deaf(r)
		}},
		{"hears of nothing", deaf},
		{"cut off", func(r *Replica) func() { return r.CutOff() }},
		{"its requests vanish", links((*etcdtest.Proxy).FreezeRequests, heal)},
		{"its answers vanish", links((*etcdtest.Proxy).FreezeAnswers, heal)},
		{"its reads vanish", links(func(p *etcdtest.Proxy) { p.Only(etcdtest.KVLinks); p.Freeze() }, heal)},
		{"connections cut", links((*etcdtest.Proxy).Cut, nothing)},
		{"connections cut and refused", links(func(p *etcdtest.Proxy) { p.Refuse(); p.Cut() }, heal)},
		{"slow network", links(func(p *etcdtest.Proxy) { p.Delay(1, 20*time.Millisecond, 200*time.Millisecond) }, heal)},
		{"dripping watch", links(func(p *etcdtest.Proxy) { p.Only(etcdtest.WatchLinks); p.Drip(500) }, heal)},
		{"paused", func(r *Replica) func() { r.Stop(); return r.Cont }},
		{"killed", func(r *Replica) func() {
			r.Kill()
			r.unregister()
			return func() { r.Start() }
		}},
		{"lease revoked", func(r *Replica) func() { revokers.unregister(r); return func() {} }},
	}
}

// troubled keeps who is in trouble, and until when. It belongs to the
// scenario's goroutine.
type troubled struct {
	w   *World
	now []running
}

type running struct {
	replica int
	until   time.Duration
	end     func()
}

// begin makes trouble for a replica that has none, as soon as there is one.
func (t *troubled) begin(k kind, lasts time.Duration) {
	for {
		t.endUntil(t.w.Rec.Now())
		var free []int
	replicas:
		for i, r := range t.w.Replicas {
			for _, x := range t.now {
				if x.replica == i {
					continue replicas
				}
			}
			if code, _, _ := r.Ask("/readyz"); code == 200 {
				free = append(free, i)
			}
		}
		if len(free) > 0 {
			replica := free[rand.IntN(len(free))]
			over := t.w.Fault(replica, "replica %d: %s", replica, k.name)
			end := k.begin(t.w.Replicas[replica])
			t.now = append(t.now, running{replica, t.w.Rec.Now() + lasts, func() { end(); over() }})
			return
		}
		if t.w.T.Context().Err() != nil {
			return
		}
		t.w.Wait(10 * time.Millisecond)
	}
}

// endUntil ends what should have ended by now.
func (t *troubled) endUntil(now time.Duration) {
	var rest []running
	for _, x := range t.now {
		if x.until <= now {
			x.end()
		} else {
			rest = append(rest, x)
		}
	}
	t.now = rest
}

// endAll waits until everything has ended, and everybody is ready.
func (t *troubled) endAll() {
	for len(t.now) > 0 && t.w.T.Context().Err() == nil {
		t.endUntil(t.w.Rec.Now())
		t.w.Wait(10 * time.Millisecond)
	}
	for _, r := range t.w.Replicas {
		t.w.Until("the replica to be ready after all", func() bool { code, _, _ := r.Ask("/readyz"); return code == 200 })
	}
}

// lease of the process that runs, or ran last, as etcd has it; 0 if it is not
// registered.
func (r *Replica) lease() clientv3.LeaseID {
	r.w.T.Helper()
	ctx, cancel := context.WithTimeout(r.w.T.Context(), patience)
	defer cancel()
	resp, err := r.w.Client.Get(ctx, r.w.Space.Replicas(), clientv3.WithPrefix())
	if err != nil {
		r.w.T.Fatalf("list the replicas: %v", err)
	}
	for _, kv := range resp.Kvs {
		if one, err := keyspace.ParseReplica(kv.Value); err == nil && one.Pid == r.Pid() {
			return clientv3.LeaseID(kv.Lease)
		}
	}
	return 0
}

// unregister ends the lease of the replica's process, as somebody with the
// rights to do it might.
func (r *Replica) unregister() {
	r.w.T.Helper()
	r.w.Rec.Mark(Note, r.Index, "lease revoked")
	ctx, cancel := context.WithTimeout(r.w.T.Context(), patience)
	defer cancel()
	if lease := r.lease(); lease != 0 {
		if _, err := r.w.Client.Revoke(ctx, lease); err != nil {
			r.w.T.Fatalf("revoke the lease of replica %d: %v", r.Index, err)
		}
	}
}

// unregister takes the registration of a live replica away, and lets nobody
// revoke until it knows.
func (r *revokers) unregister(replica *Replica) {
	r.told.Lock()
	defer r.told.Unlock()
	before := replica.lease()
	replica.unregister()
	r.w.Until("the replica to register again", func() bool { now := replica.lease(); return now != 0 && now != before })
}

// restartAtOnce kills the replica, ends the lease that it leaves, so that no
// receipt waits for the dead, and starts it again.
func (r *Replica) restartAtOnce() {
	r.w.T.Helper()
	r.Kill()
	r.unregister()
	r.Start()
	r.WaitReady()
}
