package faults

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"keygate/keygatetest/variant"
	"keygate/ledger"
)

// A replica of a newer keygate is in the fleet, whose registration nobody here
// can read. It may be anything: a receipt waits for it as long as for any
// replica that says nothing.
func TestVersionSkew(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "version skew", Faults: "replicas register in a version that the manager cannot read",
		Guarantees: []Guarantee{G2},
		// They acknowledge all the same, in their own way.
		Options: Options{Keys: 8, Replicas: 2, Mutations: []variant.Mutation{{
			File: "statestore/keyspace/replica.go", Old: "replicaJSON{Version, r.Version,", New: "replicaJSON{Version + 1, r.Version,",
		}}},
		Run: versionSkew,
		Guards: []Guard{{
			Name: "the refusal of a registration of another version", Guarantee: G2,
			Mutations: []variant.Mutation{{File: "statestore/keyspace/replica.go", Old: "if j.V != Version {", New: "if j.V < Version {"}},
		}},
	})
}

func versionSkew(w *World) {
	w.Checks(100)
	var asked Times
	command := len(w.Keys) - 1
	began := w.Rec.Now()
	within, cancel := context.WithTimeout(w.T.Context(), 2*time.Second)
	defer cancel()
	// As a command, too, which a guard can be taken out of.
	cmd := exec.CommandContext(within, w.binary, "revoke", "key", w.Keys[command].flags[LevelKey].Record.Key.String(), "--yes", "--wait", "--etcd-endpoints", w.Store.Endpoint())
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	out, err := cmd.CombinedOutput()
	w.main.Write(Write{Start: began, End: w.Rec.Now(), Path: w.Keys[command].Paths[LevelKey], Level: LevelKey, Keys: w.Keys[command].with[LevelKey],
		Value: closing(LevelKey), Managed: true})
	w.Expect(G2, err != nil, "keygate revoke --wait has a receipt after %v from replicas whose registrations cannot be read: %s", round(w.Rec.Now()-began), out)

	for key := range w.Rounds(1, 4) {
		k := w.Keys[key]
		one := Write{Path: k.Paths[LevelKey], Level: LevelKey, Keys: k.with[LevelKey], Value: closing(LevelKey)}
		change := w.commit(&one, k.flags[LevelKey], true)
		w.main.Write(one)
		if change == nil {
			w.T.Fatalf("the revocation was not written: %v", one.Outcome)
		}
		within, cancel := context.WithTimeout(w.T.Context(), 2*time.Second)
		r, err := change.Wait(within)
		cancel()
		asked.Add(w.Rec.Now() - one.End)
		w.Expect(G2, err != nil && r.Count(ledger.Pending) == len(w.Replicas), "a receipt after %v, %d applied and %d fenced, from replicas whose registrations cannot be read",
			round(w.Rec.Now()-one.End), r.Count(ledger.Applied), r.Count(ledger.Fenced))
		left := time.Until(change.Latest())
		w.Expect(G2, left > time.Minute-5*time.Second, "the receipt would come in %v; want the largest staleness budget, for the own one is not known", left)
		for _, a := range r.Replicas {
			w.Expect(G2, a.Problem != "", "the receipt does not say that registration %s cannot be read", a.ID)
		}
	}
	w.Figure(G2, "version skew: waits for registrations that cannot be read", "%d, none with a receipt; they would end after 61 s", asked.Count())
}
