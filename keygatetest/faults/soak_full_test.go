//go:build soak

package faults

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// TestSoak is `make soak`. The environment tells it how long it lasts (SOAK, such
// as 10m), which faults come (SEED; drawn if it is empty), where soak.md and
// soak.svg go (SOAK_DOCS; nowhere if it is empty) and of which version they are
// (SOAK_VERSION).
func TestSoak(t *testing.T) {
	const every = 30 * time.Second
	lasts, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil || lasts < 2*every {
		t.Fatalf("SOAK=%q: want how long the soak lasts, at least %v, such as 10m: make soak DURATION=10m", os.Getenv("SOAK"), 2*every)
	}
	seed := rand.Uint64N(1 << 32) // few enough digits to type
	if given := os.Getenv("SEED"); given != "" {
		if seed, err = strconv.ParseUint(given, 10, 64); err != nil {
			t.Fatalf("SEED=%q: want a number, such as 1", given)
		}
	}
	t.Logf("SEED=%d repeats these faults", seed)
	s := newSoak(New(t, soakOptions(true), nil), lasts, every, seed)
	s.run()
	if dir := os.Getenv("SOAK_DOCS"); dir != "" {
		if err := s.write(dir, os.Getenv("SOAK_VERSION")); err != nil {
			t.Error(err)
		}
	}
	for _, wrong := range s.red() {
		t.Error(wrong)
	}
	t.Logf("%d faults, %d checks, %d changes, %d receipts, violations: %v", len(s.faults), s.total.Checks, s.total.Writes, s.total.Receipts, s.total.Violations)
}
