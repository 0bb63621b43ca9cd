package faults

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Load runs beside a scenario until it is stopped, or the scenario ends.
type Load struct {
	stop context.CancelFunc
	wg   sync.WaitGroup
}

// Stop ends the load and returns when its last call has. Stopping twice is
// fine.
func (l *Load) Stop() {
	l.stop()
	l.wg.Wait()
}

func (w *World) load() (*Load, context.Context) {
	ctx, cancel := context.WithCancel(w.T.Context())
	l := &Load{stop: cancel}
	w.state.Lock()
	defer w.state.Unlock()
	w.state.loads = append(w.state.loads, l)
	return l, ctx
}

// workersPerReplica: one that waits for a replica which hangs holds up no more
// than its share.
const workersPerReplica = 4

// Checks asks all replicas in turn for all keys, or for those named, so many
// times a second altogether.
func (w *World) Checks(rate int, keys ...int) *Load {
	return w.ChecksOn(rate, nil, keys...)
}

// ChecksOn is Checks on some of the replicas; nil means all.
func (w *World) ChecksOn(rate int, replicas []int, keys ...int) *Load {
	l, ctx := w.load()
	if len(replicas) == 0 {
		for i := range w.Replicas {
			replicas = append(replicas, i)
		}
	}
	keys = w.all(keys)
	workers := len(replicas) * workersPerReplica
	for i := range workers {
		replica, s := replicas[i%len(replicas)], w.Rec.Stream()
		l.wg.Go(func() {
			n := i / len(replicas)
			every(ctx, rate, workers, i, func() {
				w.checkOn(context.WithoutCancel(ctx), s, replica, keys[n%len(keys)])
				n += workersPerReplica
			})
		})
	}
	return l
}

// Gets asks for all keys, or for those named, through Envoy, so many times a
// second altogether.
func (w *World) Gets(rate int, keys ...int) *Load {
	l, ctx := w.load()
	keys = w.all(keys)
	for i := range clients {
		s := w.Rec.Stream()
		l.wg.Go(func() {
			n := i
			every(ctx, rate, clients, i, func() {
				w.getOn(s, keys[n%len(keys)])
				n += clients
			})
		})
	}
	return l
}

// clients of Envoy at once.
const clients = 16

func (w *World) all(keys []int) []int {
	if len(keys) > 0 {
		return keys
	}
	for i := range w.Keys {
		keys = append(keys, i)
	}
	return keys
}

// every calls f as one of several workers that make rate calls a second
// together. What it cannot keep up with is left out.
func every(ctx context.Context, rate, workers, worker int, f func()) {
	interval := time.Duration(workers) * time.Second / time.Duration(rate)
	next := time.Now().Add(interval * time.Duration(worker) / time.Duration(workers))
	timer := time.NewTimer(time.Until(next))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		f()
		now := time.Now()
		if next = next.Add(interval); next.Before(now.Add(-100 * time.Millisecond)) {
			next = now
		}
		timer.Reset(time.Until(next))
	}
}

// Changers at once. Each has keys of its own, so that the writes of a flag have
// an order that is known beforehand.
const (
	changers = 4
	waiters  = 16 // each is away until its receipt
)

// Changes closes and opens flags of all keys, or of those named, at all levels
// and in all ways, so many times a second altogether. Keys are open about half
// of the time.
func (w *World) Changes(rate int, keys ...int) *Load { return w.changes(rate, false, keys) }

// ChangesWithReceipts is Changes that wait, each for its receipt.
func (w *World) ChangesWithReceipts(rate int, keys ...int) *Load { return w.changes(rate, true, keys) }

func (w *World) changes(rate int, wait bool, keys []int) *Load {
	l, ctx := w.load()
	keys = w.all(keys)
	workers := min(changers, len(keys))
	if wait {
		workers = min(waiters, len(keys))
	}
	for i := range workers {
		s := w.Rec.Stream()
		var own []int
		for n := i; n < len(keys); n += workers {
			own = append(own, keys[n])
		}
		l.wg.Go(func() {
			closed := map[int]Level{}
			every(ctx, rate, workers, i, func() {
				key := own[rand.IntN(len(own))]
				if level, is := closed[key]; is {
					w.set(s, key, level, opening(level), wait)
					delete(closed, key)
					return
				}
				level := Level(rand.IntN(int(numLevels)))
				closed[key] = level
				w.set(s, key, level, somehowClosing(level, wait), wait)
			})
		})
	}
	return l
}

// somehowClosing is a value that closes: by its word as a rule, sometimes by
// another, or by deletion.
func somehowClosing(l Level, wait bool) string {
	words := []string{closing(l), closing(l), closing(l), Absent, "pending"}
	if wait || l == LevelDeveloper {
		words = slices.DeleteFunc(words, func(s string) bool { return s == "pending" || wait && s == Absent })
	}
	return words[rand.IntN(len(words))]
}
