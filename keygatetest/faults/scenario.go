package faults

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"keygate/keygatetest"
	"keygate/keygatetest/variant"
)

// Scenario is one way in which things go wrong.
type Scenario struct {
	// Name of it, such as "black hole"; Faults says in a few words what is broken.
	Name, Faults string
	// Guarantees that it puts to the test. All are looked at in any case.
	Guarantees []Guarantee
	Options    Options
	// Run breaks things and waits. It runs once in a plain world and once for
	// each guard, in a world without it, so what it expects of keygate it says with
	// World.Expect and World.Eventually: T.Fatal is for a test that cannot go on.
	// It leaves an etcd that answers.
	Run func(w *World)
	// Guards that it must see missing.
	Guards []Guard
	// Outside lists replicas that do not register.
	Outside []int
}

// Guard is a part of keygate, or of what stands around it, without which a
// guarantee does not hold.
type Guard struct {
	Name string
	// Guarantee that breaks without it.
	Guarantee Guarantee
	// Mutations of the source that take it out of keygate's binary.
	Mutations []variant.Mutation
	// Options, if not nil, changes those of the world.
	Options func(*Options)
	// Weaken, if not nil, is called when the world is ready.
	Weaken func(*World)
	// Tries until it is seen; zero means 2. Whether a race is lost is a matter of
	// chance.
	Tries int
}

// Environment of the tests.
const (
	modeVariable     = "FAULTS"          // "long" for long runs and the guards
	guardsVariable   = "FAULTS_GUARDS"   // "only" for the guards alone
	reportVariable   = "FAULTS_REPORT"   // file that rows are added to
	binariesVariable = "FAULTS_BINARIES" // folder of what was built; of Main's own
)

// Long tells whether runs are long and guards are switched off.
func Long() bool { return os.Getenv(modeVariable) == "long" }

// Main runs the package's tests. What they build is built once.
func Main(m *testing.M) {
	keygatetest.Reexec()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "faults")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv(binariesVariable, dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// binary returns the path of a keygate with some mutations, and without a guard
// or with all of them.
func binary(t testing.TB, race bool, mutations []variant.Mutation, guard *Guard) string {
	t.Helper()
	if guard != nil {
		mutations = slices.Concat(mutations, guard.Mutations)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%v %q", race, mutations))
	path := filepath.Join(os.Getenv(binariesVariable), "keygate-"+hex.EncodeToString(sum[:8]))
	if _, err := os.Stat(path); err == nil {
		return path
	}
	// Two tests may build the same; the first to rename is as good as the second.
	if err := os.Rename(variant.Build(t, "./cmd/keygate", race, mutations...), path); err != nil {
		t.Fatalf("keep keygate's binary: %v; the package's TestMain must call Main", err)
	}
	return path
}

// Run runs a scenario: as it is, which must show no violation, and, with
// FAULTS=long, without each of its guards, which must show one of that guard's
// guarantee.
func Run(t *testing.T, s Scenario) {
	t.Helper()
	if os.Getenv(guardsVariable) != "only" {
		t.Run("plain", func(t *testing.T) {
			h, found := s.once(t, nil)
			for i, v := range found {
				if i == described {
					t.Errorf("and %d more violations", len(found)-i)
					break
				}
				t.Error(h.Show(v))
			}
		})
	}
	if !Long() && os.Getenv(guardsVariable) == "" {
		for _, g := range s.Guards { // whoever rewrites a guard is told now
			variant.Fits(t, slices.Concat(s.Options.Mutations, g.Mutations)...)
		}
		return
	}
	for _, g := range s.Guards {
		t.Run("without "+g.Name, func(t *testing.T) {
			for range orDefault(g.Tries, 2) {
				seen := false
				t.Run("try", func(t *testing.T) {
					h, found := s.once(t, &g)
					for _, v := range found {
						if v.Guarantee == g.Guarantee && !seen {
							seen = true
							t.Logf("%d violations, as there should be; the first: %s", len(found), h.Show(v))
						}
					}
					if !seen && len(found) > 0 {
						t.Logf("%d violations, none of %s; the first: %s", len(found), g.Guarantee, h.Show(found[0]))
					}
				})
				if seen || t.Failed() {
					return
				}
			}
			t.Errorf("the suite cannot see that %q is missing: got no violation of %s", g.Name, g.Guarantee)
		})
	}
}

// once runs the scenario in a world of its own, and returns what happened and
// what was wrong with it.
func (s Scenario) once(t *testing.T, g *Guard) (*History, []Violation) {
	t.Helper()
	o := s.Options
	if g != nil && g.Options != nil {
		g.Options(&o)
	}
	w := New(t, o, g)
	if g != nil && g.Weaken != nil {
		g.Weaken(w)
	}
	began := time.Now()
	s.Run(w)
	h := w.finish()
	took := time.Since(began)
	found := append(Verify(h, Rules{S: w.Options.S, Outside: s.Outside}), w.violations()...)
	row := newRow(s, w, h, found, took)
	if path := os.Getenv(reportVariable); path != "" {
		if err := row.append(path); err != nil {
			t.Errorf("report: %v", err)
		}
	}
	t.Logf("%s: %s", strings.TrimSpace(s.Name+" "+row.Guard), row.line())
	return h, found
}
