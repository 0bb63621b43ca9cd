package management

import (
	"container/list"
	"fmt"
	"math"
	"net/http"
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

// places of the requests under way: so many in all, and of one principal only a
// part of them.
type places struct {
	all, each int

	state struct {
		sync.Mutex
		taken int
		of    map[string]int // by principal, of those that have any
	}
}

// newPlaces has so many; one principal has a quarter of them, at least one.
func newPlaces(all int) *places {
	p := &places{all: all, each: max(1, all/4)}
	p.state.of = map[string]int{}
	return p
}

// take a place for a principal. release gives it back, and does nothing when it
// is called again; it is for one goroutine.
func (p *places) take(name string) (release func(), err error) {
	p.state.Lock()
	defer p.state.Unlock()
	switch {
	case p.state.of[name] >= p.each:
		return nil, &refusal{status: http.StatusTooManyRequests, code: "keygate.concurrency", retryAfter: time.Second,
			message: fmt.Sprintf("this token has %d requests under way, and may have no more at once; nothing was changed", p.each)}
	case p.state.taken >= p.all:
		return nil, &refusal{status: http.StatusServiceUnavailable, code: "keygate.overloaded", retryAfter: time.Second,
			message: "too many requests are under way; nothing was changed"}
	}
	p.state.taken++
	p.state.of[name]++
	held := true
	return func() {
		if !held {
			return
		}
		held = false
		p.state.Lock()
		defer p.state.Unlock()
		p.state.taken--
		if p.state.of[name]--; p.state.of[name] == 0 {
			delete(p.state.of, name)
		}
	}, nil
}

// retryAfter is the header's value: whole seconds, at least one.
func retryAfter(d time.Duration) string {
	return strconv.Itoa(max(1, int(math.Ceil(d.Seconds()))))
}
