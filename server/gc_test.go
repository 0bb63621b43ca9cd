package server

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestGCPercent(t *testing.T) {
	for _, tt := range []struct {
		headroom, base uint64
		want           int
	}{
		{64 << 20, 8 << 20, 800}, {64 << 20, 64 << 20, 100}, {64 << 20, 1 << 30, 100}, {64 << 20, 0, 10_000}, {1 << 40, 1 << 20, 10_000},
	} {
		if got := gcPercent(tt.headroom, tt.base); got != tt.want {
			t.Errorf("headroom %d over %d: got %d %%, want %d", tt.headroom, tt.base, got, tt.want)
		}
	}
}

var sink [][]byte

// The percentage follows the heap, and is put back.
func TestCollector(t *testing.T) {
	t.Setenv("GOGC", "")
	before := debug.SetGCPercent(goPercent)
	defer debug.SetGCPercent(before)
	current := func() int {
		runtime.GC()
		n := debug.SetGCPercent(goPercent)
		debug.SetGCPercent(n)
		return n
	}
	follows := func(what string, ok func(percent int) bool) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); !ok(current()); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: the percentage stays at %d", what, current())
			}
		}
	}
	stop := SetGCHeadroom(64 << 20)
	follows("a small heap", func(p int) bool { return p > 200 })
	for range 128 {
		sink = append(sink, make([]byte, 1<<20))
	}
	follows("a heap larger than the headroom", func(p int) bool { return p == goPercent })
	sink = nil
	follows("a small heap again", func(p int) bool { return p > 200 })
	stop()
	if p := current(); p != goPercent {
		t.Errorf("after stop: %d %%, want %d", p, goPercent)
	}
	t.Setenv("GOGC", "50")
	SetGCHeadroom(64 << 20)()
	if p := current(); p != goPercent {
		t.Errorf("with GOGC set by the user: %d %%, want it left alone", p)
	}
}
