package faults

import (
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"keygate/keygatetest/variant"
)

// The soak in short: three faults, drawn anew each time. The whole of it is
// TestSoak, behind a build tag.
func TestSoakInShort(t *testing.T) {
	t.Parallel()
	s := soakInShort(t, nil)
	for _, wrong := range s.red() {
		t.Error(wrong)
	}
	if len(s.faults) != 3 {
		t.Errorf("got %d faults, want 3", len(s.faults))
	}
	if err := s.write(t.TempDir(), ""); err != nil {
		t.Error(err)
	}
	if !Long() {
		return
	}
	const raised = "\tfence.Store(rev)\n" // by each event
	for _, broken := range []struct{ name, by, want string }{
		{"what it must refuse", "", " violated at "},
		{"its goroutines", raised + "\tgo func() { select {} }()\n", " leaks: goroutines "},
	} {
		t.Run("a replica that forgets "+broken.name, func(t *testing.T) {
			s := soakInShort(t, &Guard{Mutations: []variant.Mutation{{File: "statestore/epoch.go", Old: raised, New: broken.by}}})
			red := s.red()
			i := slices.IndexFunc(red, func(wrong string) bool { return strings.Contains(wrong, broken.want) })
			if i < 0 {
				t.Errorf("got %q, want one with %q", red, broken.want)
				return
			}
			t.Logf("as it should be: %s", firstLine(red[i]))
		})
	}
}

func soakInShort(t *testing.T, guard *Guard) *soak {
	t.Helper()
	const lasts, every = 8 * time.Second, 2 * time.Second
	s := newSoak(New(t, soakOptions(false), guard), lasts, every, rand.Uint64())
	s.run()
	t.Logf("seed %d: %d checks, %d changes, %d receipts; %s", s.seed, s.total.Checks, s.total.Writes, s.total.Receipts, s.sorts())
	return s
}

func TestAlarms(t *testing.T) {
	const quiet = "time=2026-01-02 level=INFO msg=\"no panic: here\"\n"
	for name, c := range map[string]struct {
		log  string
		want []string // beginnings
	}{
		"nothing":        {quiet + quiet, nil},
		"a race":         {quiet + "==================\nWARNING: DATA RACE\nWrite at 0x1 by goroutine 7:\n", []string{"WARNING: DATA RACE\nWrite at"}},
		"a panic":        {quiet + "panic: index out of range\n\ngoroutine 1 [running]:\n", []string{"panic: index"}},
		"the runtime":    {"fatal error: concurrent map writes\n" + quiet, []string{"fatal error: concurrent"}},
		"one was caught": {"time=2026-01-02 level=ERROR msg=\"panic while answering a call; it was refused\"\n", []string{"time=2026-01-02 level=ERROR"}},
		"two":            {"WARNING: DATA RACE\n" + quiet + "WARNING: DATA RACE\n", []string{"WARNING", "WARNING"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := alarms(c.log)
			if len(got) != len(c.want) {
				t.Fatalf("got %q, want %q", got, c.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], c.want[i]) {
					t.Errorf("got %q, want it to begin with %q", got[i], c.want[i])
				}
			}
		})
	}
}

func TestLeaks(t *testing.T) {
	quiet := [2]span{{from: 0, to: time.Minute}, {from: 9 * time.Minute, to: 10 * time.Minute}}
	for name, c := range map[string]struct {
		goroutines func(minute float64) float64
		want       string // is in what is said; "" for nothing
	}{
		"flat":              {func(float64) float64 { return 90 }, ""},
		"falling":           {func(m float64) float64 { return 90 - m }, ""},
		"growing":           {func(m float64) float64 { return 90 + 2*m }, "replica 0 leaks: goroutines never under 108"},
		"high in the midst": {func(m float64) float64 { return 90 + 1000*math.Round(math.Sin(math.Pi*m/10)) }, ""},
		"restless":          {func(m float64) float64 { return 90 + 50*math.Mod(m*7, 1) }, ""},
		"a few more":        {func(m float64) float64 { return 90 + min(m, 5) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			u := &usage{replicas: 1, points: map[usageOf][]point{}}
			for at := time.Duration(0); at <= quiet[1].to; at += 5 * time.Second {
				u.add(usageOf{figureMemory, 0}, point{at: at, value: at.Minutes()}) // may grow
				u.add(usageOf{figureHeap, 0}, point{at: at, value: at.Minutes()})
				u.add(usageOf{figureGoroutines, 0}, point{at: at, value: c.goroutines(at.Minutes())})
				u.add(usageOf{figureDescriptors, 0}, point{at: at, value: 20})
			}
			switch got := u.leaks(quiet); {
			case c.want == "" && len(got) > 0:
				t.Errorf("got %q, want nothing", got)
			case c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)):
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	if got := (&usage{replicas: 1}).leaks(quiet); len(got) != len(usageFigures) {
		t.Errorf("nobody looked: got %q, want one for each figure", got)
	}
}
