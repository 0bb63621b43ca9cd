package faults

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Times that were measured. It is safe for concurrent use.
type Times struct {
	mu  sync.Mutex
	all []time.Duration
}

// Add one.
func (t *Times) Add(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all = append(t.all, d)
}

// Max of them; 0 if there is none.
func (t *Times) Max() time.Duration { return t.Percentile(100) }

// Percentile p of them, from 0 to 100; 0 if there is none.
func (t *Times) Percentile(p float64) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) == 0 {
		return 0
	}
	slices.Sort(t.all)
	return t.all[min(len(t.all)-1, int(float64(len(t.all))*p/100))]
}

// Count of them.
func (t *Times) Count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.all)
}

// String is p50, p99, the longest and how many there are.
func (t *Times) String() string {
	return fmt.Sprintf("p50 %s, p99 %s, max %s (n = %d)", milliseconds(t.Percentile(50)), milliseconds(t.Percentile(99)), milliseconds(t.Max()), t.Count())
}

func milliseconds(d time.Duration) string {
	ms := d.Seconds() * 1000
	switch {
	case ms >= 100:
		return fmt.Sprintf("%.0f ms", ms)
	case ms >= 10:
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.2f ms", ms)
}

// Effect of closings: how long after the acknowledgement replicas went on.
type Effect struct {
	// Refused is from the acknowledgement to the end of the first check that was
	// refused, Yes from there to the beginning of the last that was allowed: 0 if
	// none was.
	Refused, Yes Times
}

// RevokeAndWatch closes a flag of a key and asks every replica without a pause
// until it refuses, for at most 2 S. It adds what it saw to e and returns the
// write.
func (w *World) RevokeAndWatch(e *Effect, key int, level Level) Write {
	one := w.Revoke(key, level, false)
	if one.Outcome != Acked {
		return one
	}
	var wg sync.WaitGroup
	for i := range w.Replicas {
		s := w.Rec.Stream()
		wg.Go(func() {
			yes := time.Duration(0)
			for n := 0; ; n++ {
				c := w.checkOn(context.Background(), s, i, key)
				switch {
				case c.Yes():
					yes = c.Start - one.End
				case c.decided():
					e.Refused.Add(c.End - one.End)
					e.Yes.Add(yes)
					return
				}
				if c.End-one.End > 2*w.Options.S || w.T.Context().Err() != nil {
					e.Yes.Add(yes)
					return
				}
				if n > 100 {
					w.Wait(5 * time.Millisecond)
				}
			}
		})
	}
	wg.Wait()
	return one
}

// BareWatch watches etcd as any client of it would, past the replicas: the
// yardstick for what they take. Times of arrival are kept by revision until the
// test ends.
type BareWatch struct {
	mu sync.Mutex
	at map[int64]time.Duration
}

// BareWatch begins one with a client, which may stand behind a proxy as the
// replicas do.
func (w *World) BareWatch(c *clientv3.Client) *BareWatch {
	b := &BareWatch{at: map[int64]time.Duration{}}
	ch := c.Watch(w.T.Context(), w.Space.Watched(), clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-ch
	go func() {
		for r := range ch {
			now := w.Rec.Now()
			b.mu.Lock()
			for _, ev := range r.Events {
				b.at[ev.Kv.ModRevision] = now
			}
			b.mu.Unlock()
		}
	}()
	return b
}

// Arrived is when the event of a revision did.
func (b *BareWatch) Arrived(revision int64) (time.Duration, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	at, ok := b.at[revision]
	return at, ok
}
