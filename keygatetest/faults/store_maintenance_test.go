package faults

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	crand "crypto/rand"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/variant"
)

// A large database is defragmented, which stops etcd for as long as it takes,
// and copied, while keys are checked and revoked.
func TestMaintenance(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "maintenance", Faults: "a large database is compacted, defragmented and copied under load",
		Guarantees: []Guarantee{G1, G5},
		Options:    Options{WriteTimeout: 30 * time.Second},
		Run:        maintenance,
		Guards: []Guard{{
			Name: "the comparison with the fence", Guarantee: G1,
			Mutations: []variant.Mutation{{File: "statestore/epoch.go", Old: "r.id == want && r.rev >= e.bound(e.slot(h))", New: "r.id == want && r.rev > 0"}},
		}},
	})
}

func maintenance(w *World) {
	w.enlarge(w.Rounds(24<<20, 300<<20))
	w.know(w.all(nil))
	w.Checks(300)
	var effect Effect
	l, ctx := w.load()
	l.wg.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			key, level := n%len(w.Keys), Level(n/len(w.Keys)%int(numLevels))
			w.RevokeAndWatch(&effect, key, level)
			w.Approve(key, level, false)
			w.Wait(20 * time.Millisecond)
		}
	})
	var defragmented, copied Times
	began := w.Rec.Now()
	for n := range w.Rounds(2, 3) {
		start := w.Rec.Now()
		if n == 0 {
			start = w.fragment()
		}
		if _, err := w.Client.Defragment(w.T.Context(), w.Store.Endpoint()); err != nil {
			w.T.Fatalf("defragment: %v", err)
		}
		defragmented.Add(w.Rec.Now() - start)
		w.Wait(w.For(300*time.Millisecond, time.Second))
		start = w.Rec.Now()
		file := filepath.Join(w.T.TempDir(), "snapshot")
		cmd := exec.CommandContext(w.T.Context(), w.binary, "etcd", "snapshot", file, "--etcd-endpoints", w.Store.Endpoint())
		if out, err := cmd.CombinedOutput(); err != nil {
			w.T.Fatalf("keygate etcd snapshot: %v\n%s", err, out)
		}
		copied.Add(w.Rec.Now() - start)
		if err := os.Remove(file); err != nil {
			w.T.Fatal(err)
		}
		w.Wait(w.For(300*time.Millisecond, time.Second))
	}
	l.Stop()
	st, err := w.Client.Status(w.T.Context(), w.Store.Endpoint())
	if err != nil {
		w.T.Fatalf("status of etcd: %v", err)
	}
	w.Figure(G1, "maintenance: X, acknowledgement to the last check that was still allowed", "%v", &effect.Yes)
	w.Figure(G1, "maintenance: database", "%d MB; defragmented in at most %s, copied in at most %s; %d checks refused meanwhile",
		st.DbSize>>20, milliseconds(defragmented.Max()), milliseconds(copied.Max()), len(w.unanswered(began, w.all(nil))))
}

// enlarge etcd's database by so many bytes that nobody watches.
func (w *World) enlarge(bytes int) {
	w.T.Helper()
	const size = 512 << 10
	value := make([]byte, size)
	for n := range bytes / size {
		_, _ = crand.Read(value) // never fails
		if _, err := w.Client.Put(w.T.Context(), fmt.Sprintf("/filler/%06d", n), string(value)); err != nil {
			w.T.Fatalf("enlarge the database: %v", err)
		}
	}
}

// fragment deletes a part of what enlarge wrote, and compacts. It returns when
// that was done.
func (w *World) fragment() time.Duration {
	w.T.Helper()
	ctx, cancel := context.WithTimeout(w.T.Context(), patience)
	defer cancel()
	r, err := w.Client.Delete(ctx, "/filler/", clientv3.WithRange("/filler/000010"))
	if err == nil {
		_, err = w.Client.Compact(ctx, r.Header.Revision, clientv3.WithCompactPhysical())
	}
	if err != nil {
		w.T.Fatalf("fragment the database: %v", err)
	}
	return w.Rec.Now()
}
