package faults

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/variant"
	"keygate/ledger"
)

// Guards that stand in the scenarios of this file.
const (
	oneTransaction = "one transaction for all flags of a change"
	logOnDisk      = "the log of what was acknowledged"
)

// etcd is killed at random instants under a manager that changes two flags of a
// key at a time, one change after the other.
func TestStoreKilled(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "store killed", Faults: "kill -9 of etcd at random instants",
		Guarantees: []Guarantee{G4, G5, G8},
		Options:    Options{Keys: 6},
		Run:        storeKilled,
		Guards:     []Guard{{Name: logOnDisk, Guarantee: G4}, {Name: oneTransaction, Guarantee: G4}},
	})
}

func storeKilled(w *World) {
	w.Checks(100)
	m := w.startManager(len(w.Keys))
	var answers, acknowledged Times
	rounds := w.Rounds(6, 100)
	over := w.Fault(Everyone, "etcd is killed again and again")
	for n := range rounds {
		w.Wait(20*time.Millisecond + rand.N(300*time.Millisecond))
		killed := w.Rec.Now()
		w.Store.Kill()
		if n == rounds/2 && w.lacks(logOnDisk) {
			w.forget(func() { m.another(w) })
		}
		w.Store.Restart()
		answers.Add(w.Rec.Now() - killed)
		m.expectWhole(w)
		m.another(w)
		acknowledged.Add(w.Rec.Now() - killed)
	}
	over()
	m.stop()
	w.Figure(G4, "etcd killed", "%d times, %d acknowledged writes lost, %d changes acknowledged", rounds, w.lostWrites(), m.acked.Load())
	w.Figure(G4, "etcd killed: answers again after", "%v", &answers)
	w.Figure(G4, "etcd killed: next write acknowledged after", "%v", &acknowledged)
}

// lostWrites counts the acknowledged writes that are not in etcd's history.
func (w *World) lostWrites() int {
	h := w.finish()
	h.Resolve()
	v := &verifier{h: h, told: map[Guarantee]int{}}
	v.lost()
	return len(v.found)
}

// forget makes an etcd that is down come up without what it acknowledges in
// between: three changes, each awaited by another.
func (w *World) forget(another func()) {
	w.T.Helper()
	old := filepath.Join(w.T.TempDir(), "old")
	run := func(name string, args ...string) {
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			w.T.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	run("cp", "-a", "--sparse=always", w.Store.DataDir()+"/.", old)
	w.Store.Restart()
	for range 3 {
		another()
	}
	w.Store.Kill()
	run("find", w.Store.DataDir(), "-mindepth", "1", "-delete")
	run("cp", "-a", "--sparse=always", old+"/.", w.Store.DataDir())
}

// manager changes two flags of a key in one transaction, one key after the
// other and each change after the one before.
type manager struct {
	keys  int // the first so many
	acked atomic.Int64
	load  *Load
}

// startManager starts one for the first so many keys, and returns when each has
// been changed.
func (w *World) startManager(keys int) *manager {
	m := &manager{keys: keys}
	l, ctx := w.load()
	m.load = l
	s, begun := w.Rec.Stream(), make(chan struct{})
	l.wg.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			key, action := n%keys, ledger.StatusAction(n/keys%2)
			flags := []flagOf{{key, LevelKey}, {key, LevelProduct}}
			if w.lacks(oneTransaction) {
				w.setTogether(s, w.Client, action, flags[0])
				flags = flags[1:]
			}
			if all := w.setTogether(s, w.Client, action, flags...); all[0].Outcome == Acked {
				m.acked.Add(1)
			}
			if n == 2*keys {
				close(begun)
			}
			w.Wait(time.Millisecond)
		}
	})
	select {
	case <-begun:
	case <-time.After(patience):
		w.T.Fatal("the manager did not come to change each key")
	}
	return m
}

// another returns when one more change has been acknowledged.
func (m *manager) another(w *World) {
	w.T.Helper()
	n := m.acked.Load()
	w.Until("a change to be acknowledged", func() bool { return m.acked.Load() > n })
}

func (m *manager) stop() { m.load.Stop() }

// expectWhole reads what the manager changes: two flags that change together have
// changed at the same revision.
func (m *manager) expectWhole(w *World) {
	w.T.Helper()
	for _, k := range w.Keys[:m.keys] {
		var r *clientv3.TxnResponse
		w.Until("etcd to answer", func() (ok bool) {
			var err error
			r, err = w.Client.Txn(w.T.Context()).Then(clientv3.OpGet(k.Paths[LevelKey]), clientv3.OpGet(k.Paths[LevelProduct])).Commit()
			return err == nil
		})
		var at []int64
		for _, one := range r.Responses {
			for _, kv := range one.GetResponseRange().Kvs {
				at = append(at, kv.ModRevision)
			}
		}
		w.Expect(G4, len(at) == 2 && at[0] == at[1], "the flags of key %d were changed in one transaction and are of the revisions %v", k.Index, at)
	}
}

// keygate serve is killed with its etcd below it, also while it starts, under
// the same manager.
func TestServeKilled(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "keygate killed", Faults: "kill -9 of keygate serve, which runs its own etcd, at random instants",
		Guarantees: []Guarantee{G4, G5, G6},
		Options:    Options{Keys: 6, Embedded: true},
		Run:        serveKilled,
		Guards: []Guard{{
			Name: "the end of the child with its parent", Guarantee: G4,
			Mutations: []variant.Mutation{{File: "statestore/embedded/child_linux.go", Old: "Setpgid: true, Pdeathsig: syscall.SIGKILL}", New: "Setpgid: true}"}},
		}, {
			Name: "a proof before the first yes", Guarantee: G6,
			Mutations: []variant.Mutation{{
				File: "statestore/read.go",
				Old:  "\tif p == nil || !p.stands() {\n",
				New:  "\tif p == nil {\n\t\tp = &proof{epoch: e, member: newRegistration(0, 1<<62), validUntil: 1 << 62, made: time.Now()}\n\t}\n\tif !p.stands() {\n",
			}},
		}},
	})
}

func serveKilled(w *World) {
	w.Checks(1000)
	m := w.startManager(len(w.Keys))
	r := w.Replicas[0]
	var ready, acknowledged Times
	rounds := w.Rounds(4, 100)
	over := w.Fault(Everyone, "keygate and its etcd are killed again and again")
	for n := range rounds {
		w.Wait(20*time.Millisecond + rand.N(300*time.Millisecond))
		killed := w.Rec.Now()
		w.killWithChild(r)
		if n%3 == 1 { // not even ready
			r.Start()
			w.Wait(rand.N(400 * time.Millisecond))
			w.killWithChild(r)
		}
		r.Start()
		r.WaitReady()
		ready.Add(w.Rec.Now() - killed)
		m.expectWhole(w)
		m.another(w)
		acknowledged.Add(w.Rec.Now() - killed)
	}
	over()
	m.stop()
	for i := range w.Keys {
		read, ok := w.ReadFlag(i, LevelKey)
		w.Eventually(G5, w.Options.S, fmt.Sprintf("key %d to be answered as it stands", i), func() bool {
			return ok && w.Allowed(0, i) == (read.Value == opening(LevelKey))
		})
	}
	w.Figure(G4, "keygate killed", "%d times, %d acknowledged writes lost, %d changes acknowledged", rounds, w.lostWrites(), m.acked.Load())
	w.Figure(G6, "keygate killed: ready again after", "%v", &ready)
	w.Figure(G4, "keygate killed: next write acknowledged after", "%v", &acknowledged)
}

// killWithChild kills a replica and expects that its etcd ends with it.
func (w *World) killWithChild(r *Replica) {
	children := childrenOf(r.Pid())
	r.Kill()
	// The kernel's signal is on its way when the parent is gone.
	_, gone := w.Eventually(G4, 2*time.Second, "the etcd of a keygate that was killed to end: two would share a directory", func() bool {
		for _, pid := range children {
			if alive(pid) {
				return false
			}
		}
		return true
	})
	if gone {
		return
	}
	for _, pid := range children {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended by now
		w.Until("the orphan to end", func() bool { return !alive(pid) })
	}
}

// childrenOf lists the processes whose parent is pid.
func childrenOf(pid int) (children []int) {
	names, _ := filepath.Glob("/proc/[0-9]*/stat") // fails only on a bad pattern
	for _, name := range names {
		if state, parent := processState(name); parent == pid && state != 'Z' {
			if child, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
				children = append(children, child)
			}
		}
	}
	return children
}

func alive(pid int) bool {
	state, _ := processState(fmt.Sprintf("/proc/%d/stat", pid))
	return state != 0 && state != 'Z'
}

// processState reads the state and the parent of a process; 0 if it is gone.
func processState(name string) (state byte, parent int) {
	stat, err := os.ReadFile(name)
	// Both follow the command's name, which stands in brackets.
	i := bytes.LastIndexByte(stat, ')')
	if err != nil || i < 0 {
		return 0, 0
	}
	var s string
	if _, err := fmt.Sscan(string(stat[i+1:]), &s, &parent); err != nil {
		return 0, 0
	}
	return s[0], parent
}
