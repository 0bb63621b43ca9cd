package server

import (
	"os"
	"runtime"
	"runtime/debug"
	rtmetrics "runtime/metrics"
	"sync/atomic"
)

// collector lets garbage gather up to a number of bytes before Go collects it,
// however small the live heap is. A check leaves a few kilobytes of garbage to
// grpc-go and next to nothing that lives, so that Go by itself, which collects
// when the heap has doubled, would do so tens of times a second. A heap larger
// than the headroom is collected as Go does.
//
// The percentage that Go wants is worked out anew after each collection: one
// that is right for a small heap would let one that has grown fill the machine.
type collector struct {
	headroom uint64
	stopped  atomic.Bool
	percent  int // as it was set last; of the finalizer's goroutine
}

// SetGCHeadroom sets the garbage collector of the whole process until the returned
// function is called, which puts back what was. headroom is in bytes. With 0, or
// where the user has set GOGC, it does nothing.
func SetGCHeadroom(headroom int64) (stop func()) {
	if headroom <= 0 || os.Getenv("GOGC") != "" {
		return func() {}
	}
	c := &collector{headroom: uint64(headroom), percent: goPercent}
	before := debug.SetGCPercent(goPercent)
	c.adjust()
	c.again()
	return func() {
		c.stopped.Store(true)
		debug.SetGCPercent(before)
	}
}

// goPercent is Go's own: a collection when the heap has doubled.
const goPercent = 100

// again has adjust called after the next collection, by Go's one goroutine for
// finalizers.
func (c *collector) again() {
	runtime.SetFinalizer(new(collected), func(*collected) {
		if !c.stopped.Load() {
			c.adjust()
			c.again()
		}
	})
}

// collected is an object that nothing refers to. It holds a pointer because Go
// puts tiny objects without one together, and then never ends them.
type collected struct{ _ *int }

func (c *collector) adjust() {
	sample := []rtmetrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"}}
	rtmetrics.Read(sample)
	base := uint64(0)
	for _, s := range sample {
		if s.Value.Kind() == rtmetrics.KindUint64 {
			base += s.Value.Uint64()
		}
	}
	percent := gcPercent(c.headroom, base)
	// Setting it stops the world for a moment, so not for a little.
	if diff := percent - c.percent; 8*max(diff, -diff) > c.percent {
		c.percent = percent
		debug.SetGCPercent(percent)
	}
}

// gcPercent is headroom as a percentage of what a collection leaves, and not
// below Go's own.
func gcPercent(headroom, base uint64) int {
	const most = 10_000
	if base == 0 || headroom/base >= most/100 {
		return most
	}
	return max(goPercent, int(headroom*100/base))
}
