//go:build !race

package statestore_test

import (
	"context"
	"testing"
	"time"

	"keygate/authz"
	"keygate/statestore/storetest"
)

// stressReads is how many reads the stress run makes.
const stressReads = 10_000_000

// A check whose three records are cached asks nobody and allocates nothing.
// Under the race detector sync.Pool drops what it is given, and ristretto
// allocates.
func TestCachedReadAllocatesNothing(t *testing.T) {
	w := begin(t, nil)
	w.cached()
	a := authz.Authorizer{Source: w.store}
	req := authz.Request{Organization: storetest.Org, KeyID: storetest.Key, Products: []authz.ProductName{storetest.Weather}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if n := testing.AllocsPerRun(1000, func() {
		if d := a.Decide(ctx, req); !d.Allowed() {
			t.Fatalf("answered %v", d.Reason)
		}
	}); n != 0 {
		t.Errorf("a cached check allocates %v times, want 0", n)
	}
}
