package management

import (
	"container/list"
	"math"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// maxBuckets of each kind that are remembered; the one used longest ago goes.
	maxBuckets = 4096
	// failuresPerSecond and failureBurst of one address, or with one token: of
	// attempts to sign in that are answered 401 rather than 429.
	failuresPerSecond = 1
	failureBurst      = 20
	// strangersPerSecond are the look-ups of tokens that nobody has signed in
	// with here, from all addresses with too many failures together. So whoever
	// shares an address with an attacker gets in.
	strangersPerSecond = 50
)

// buckets hold a limiter for each of the names used last.
type buckets struct {
	limit rate.Limit
	burst int

	state struct {
		sync.Mutex
		of     map[string]*list.Element // of *bucket
		recent list.List                // the newest in front
	}
}

type bucket struct {
	name    string
	limiter *rate.Limiter
}

func newBuckets(perSecond float64, burst int) *buckets {
	b := &buckets{limit: rate.Limit(perSecond), burst: burst}
	b.state.of = map[string]*list.Element{}
	return b
}

// get returns the limiter of a name; nil if there is none and make is false.
func (b *buckets) get(name string, make bool) *rate.Limiter {
	b.state.Lock()
	defer b.state.Unlock()
	if e := b.state.of[name]; e != nil {
		b.state.recent.MoveToFront(e)
		return e.Value.(*bucket).limiter
	}
	if !make {
		return nil
	}
	if len(b.state.of) >= maxBuckets {
		oldest := b.state.recent.Back()
		delete(b.state.of, oldest.Value.(*bucket).name)
		b.state.recent.Remove(oldest)
	}
	l := rate.NewLimiter(b.limit, b.burst)
	b.state.of[name] = b.state.recent.PushFront(&bucket{name, l})
	return l
}

// take one from the name's bucket. wait is how long until there is one, 0 if it
// was taken.
func (b *buckets) take(name string, now time.Time) (wait time.Duration) {
	reserved := b.get(name, true).ReserveN(now, 1)
	if wait = reserved.DelayFrom(now); wait > 0 {
		reserved.CancelAt(now)
	}
	return wait
}

// empty tells whether the name's bucket is, without taking from it.
func (b *buckets) empty(name string, now time.Time) bool {
	l := b.get(name, false)
	return l != nil && l.TokensAt(now) < 1
}

// retryAfter is the header's value: whole seconds, at least one.
func retryAfter(d time.Duration) string {
	return strconv.Itoa(max(1, int(math.Ceil(d.Seconds()))))
}
