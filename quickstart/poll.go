package quickstart

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"keygate/authz"
	apps "keygate/examples/quickstart"
)

const (
	// numPollers ask at a time. More see a change sooner after it took effect,
	// until they keep etcd and keygate from their processors.
	numPollers = 2
	// calmRequests are timed while nothing changes.
	calmRequests = 400
)

// pollers send the same request back to back, each over a connection of its
// own that it keeps, and look at the answers.
type pollers struct {
	url, header, key string
	id               authz.KeyID

	mu       sync.Mutex
	expected *expectation    // nil before the first
	count    int             // of all answers
	calm     []time.Duration // of requests while nothing changes
	calmGoal int             // its length for now
	calmDone chan struct{}   // closed when it has that
}

// expectation of an answer with a status. What is not a channel is guarded by
// the pollers' mutex until settled is closed, and constant afterwards.
type expectation struct {
	status int
	// first is when the first such answer had been read to its end.
	first time.Time
	// since tells which pollers have had such an answer to a request that began
	// after first: no request that is under way is then older than the change.
	since [numPollers]bool
	// reason of keygate's last decision that belongs to the status, and how long
	// the first such check took in keygate.
	reason authz.Reason
	check  time.Duration
	// other is the last answer that was not it.
	other answer
	// broken tells that a request which began after first got another answer.
	broken error
	// settled is closed when all pollers have had such an answer since first,
	// or it is broken.
	settled chan struct{}
}

// answer to one request.
type answer struct {
	began, ended time.Time
	status       int
	err          error
}

func (a answer) String() string {
	switch {
	case a.err != nil:
		return a.err.Error()
	case a.status == 0:
		return "no answer"
	}
	return fmt.Sprintf("%d", a.status)
}

func newPollers(url, header, key string) *pollers {
	return &pollers{url: url, header: header, key: key, id: apps.KeyID(key)}
}

// run is poller number i, until ctx ends.
func (p *pollers) run(ctx context.Context, i int) {
	transport := &http.Transport{DisableCompression: true}
	defer transport.CloseIdleConnections()
	for ctx.Err() == nil {
		a := p.ask(ctx, transport)
		if ctx.Err() == nil {
			p.answered(i, a)
		}
	}
}

func (p *pollers) ask(ctx context.Context, transport *http.Transport) answer {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url, nil)
	if err != nil {
		return answer{err: err}
	}
	req.Header.Set(p.header, p.key)
	a := answer{began: time.Now()}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		a.err = err
		return a
	}
	_, err = io.Copy(io.Discard, resp.Body)
	a.ended, a.status, a.err = time.Now(), resp.StatusCode, errors.Join(err, resp.Body.Close())
	return a
}

// answered takes the answer to poller i.
func (p *pollers) answered(i int, a answer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count++
	if a.err == nil && len(p.calm) < p.calmGoal {
		p.calm = append(p.calm, a.ended.Sub(a.began))
		if len(p.calm) == p.calmGoal {
			close(p.calmDone)
		}
	}
	x := p.expected
	if x == nil || x.isSettled() {
		return
	}
	after := !x.first.IsZero() && a.began.After(x.first)
	switch {
	case a.err == nil && a.status == x.status && x.first.IsZero():
		x.first = a.ended
	case a.err == nil && a.status == x.status:
		x.since[i] = x.since[i] || after
		for _, had := range x.since {
			if !had {
				return
			}
		}
		close(x.settled)
	case after:
		x.broken = fmt.Errorf("a request that began after the first %d got %v", x.status, a)
		close(x.settled)
	default:
		x.other = a
	}
}

func (x *expectation) isSettled() bool {
	select {
	case <-x.settled:
		return true
	default:
		return false
	}
}

// decided is keygate's decision about some request.
func (p *pollers) decided(d authz.Decision, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if x := p.expected; x != nil && d.KeyID == p.id && d.Allowed() == (x.status == http.StatusOK) {
		x.reason = d.Reason
		if x.check == 0 {
			x.check = took
		}
	}
}

// expect looks for answers with status from now on. Whatever was expected
// before must have settled.
func (p *pollers) expect(status int) *expectation {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expected = &expectation{status: status, settled: make(chan struct{})}
	return p.expected
}

func (p *pollers) decision(x *expectation) (authz.Reason, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return x.reason, x.check
}

// lastOther says what came instead of what x expects.
func (p *pollers) lastOther(x *expectation) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("the last answer was: %v", x.other)
}

// time takes the times of calmRequests more requests, until the channel is
// closed; meanwhile nothing must change.
func (p *pollers) time() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calmGoal += calmRequests
	p.calmDone = make(chan struct{})
	return p.calmDone
}

// requests tells how long those took that were timed, and how many there were
// in all.
func (p *pollers) requests() (Spread, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return spread(p.calm), p.count
}
