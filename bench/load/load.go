// Package load sends captured requests over raw HTTP/2, at a fixed rate or with
// a fixed number in flight, and measures how long the answers take.
//
// It is made to cost little, because it shares the processors with the server
// that it measures: requests are encoded once, one thread serves all connections
// with poll, and nothing is allocated while it runs. At a fixed rate a latency
// counts from the time at which the request should have been sent, so that a
// server that stalls is charged for all that it has kept waiting.
package load

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// Config of a Generator.
type Config struct {
	// Address of the server, "host:port" or "unix:///path", in plain text.
	Address string
	// Connections that share the load by turns; 0 means 1.
	Connections int
	// Request to send. Required.
	Request *Request
	// Key writes the key of the nth request; nil leaves the captured one. It is
	// called from Run, and keeps nothing of what it is given.
	Key func(n uint64, key []byte)
	// DrainTimeout is how long a run waits for the last answers; what is missing
	// then counts as failed. 0 means 5 s.
	DrainTimeout time.Duration
}

// Plan of a run: Rate or Streams, and when it ends.
type Plan struct {
	// Rate of requests a second on all connections together, whatever the server
	// does. 0 means a closed loop of Streams.
	Rate float64
	// Streams in flight on each connection in a closed loop; 0 means 1.
	Streams int
	// Duration after which nothing is sent any more; 0 means no end.
	Duration time.Duration
	// Count of requests after which nothing is sent any more; 0 means no end.
	Count uint64
	// Until is told of each answer, and ends the run by returning true. Nil means
	// never. It is called from Run and holds up everything.
	Until func(Answer) bool
}

// Answer to one request.
type Answer struct {
	At      time.Time
	Verdict Verdict
}

// Verdict of an answer.
type Verdict uint8

// Failed is every answer that decides nothing, and none at all.
const (
	Failed Verdict = iota
	Allowed
	Denied
)

// Result of a run.
type Result struct {
	Sent, Allowed, Denied, Failed uint64
	// Problems counts what failed by its kind.
	Problems map[string]uint64
	// Elapsed from the first request to the last answer.
	Elapsed time.Duration
	// Latency of the answers, allowed and denied, in nanoseconds.
	Latency *hdrhistogram.Histogram
	// Late is how long after its time a request was sent at a fixed rate, in
	// nanoseconds: the generator's own part of Latency, and the server's where it
	// takes no more requests.
	Late *hdrhistogram.Histogram
	// Reconnects after a GOAWAY or a lost connection.
	Reconnects int
}

// Answered are all requests that were decided.
func (r Result) Answered() uint64 { return r.Allowed + r.Denied }

// Err tells what should not be in a run in which every request is allowed.
func (r Result) Err() error {
	if r.Allowed == r.Sent && r.Sent > 0 {
		return nil
	}
	return fmt.Errorf("of %d requests %d were allowed, %d denied and %d failed %v", r.Sent, r.Allowed, r.Denied, r.Failed, r.Problems)
}

// Latencies that are told apart: from a microsecond to a minute, to three
// digits.
const (
	shortest = int64(time.Microsecond)
	longest  = int64(time.Minute)
	digits   = 3
)

// Generator holds connections to one server. It is for one goroutine at a time.
type Generator struct {
	config   Config
	conns    []*conn // one for each of Connections; nil while there is none
	draining []*conn // those that were asked to go away
	next     int     // whose turn it is
	n        uint64  // requests of all runs, for Config.Key
	redialAt time.Duration

	// Of the run under way.
	plan    Plan
	start   time.Time
	now     time.Duration // since start
	waiting queue         // begun, and not sent yet
	result  Result
	ended   bool
	polled  []unix.PollFd
	poll    []*conn // beside polled
}

// Dial connects.
func Dial(config Config) (*Generator, error) {
	config.Connections = max(1, config.Connections)
	if config.DrainTimeout == 0 {
		config.DrainTimeout = 5 * time.Second
	}
	g := &Generator{config: config, conns: make([]*conn, config.Connections)}
	for i := range g.conns {
		c, err := dial(config.Address, config.Request)
		if err != nil {
			g.Close()
			return nil, err
		}
		g.conns[i] = c
	}
	return g, nil
}

// Close ends the connections.
func (g *Generator) Close() {
	for _, c := range append(g.conns, g.draining...) {
		if c != nil {
			c.close()
		}
	}
	clear(g.conns)
	g.draining = nil
}

// Run sends requests as planned and waits for their answers. When ctx ends it
// stops sending; that is no error.
func (g *Generator) Run(ctx context.Context, plan Plan) (Result, error) {
	// A thread of its own, that wakes up when it is asked to: Go's timers are late
	// by up to a millisecond while all is idle, the kernel's by 50 µs for a thread
	// that does not care.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return Result{}, fmt.Errorf("ask for precise timers: %w", err)
	}
	plan.Streams = max(1, plan.Streams)
	g.plan, g.ended, g.waiting, g.redialAt = plan, false, queue{}, 1
	g.result = Result{
		Problems: map[string]uint64{}, Latency: hdrhistogram.New(shortest, longest, digits), Late: hdrhistogram.New(shortest, longest, digits),
	}
	g.start = time.Now()
	// Nobody has read since the last run: answer pings, and replace what the server
	// has closed meanwhile.
	for {
		if ready, err := g.receive(0); err != nil {
			return g.result, err
		} else if ready == 0 {
			break
		}
	}
	g.redial()
	g.result.Reconnects = 0
	g.start, g.now = time.Now(), 0
	var due time.Duration     // of the next request at a fixed rate
	var endedAt time.Duration // when nothing was sent any more
	begun := uint64(0)
	for {
		g.now = time.Since(g.start)
		g.ended = g.ended || ctx.Err() != nil || plan.Count > 0 && begun >= plan.Count ||
			plan.Duration > 0 && g.now >= plan.Duration && (plan.Rate == 0 || due >= plan.Duration)
		if g.ended && endedAt == 0 {
			endedAt = max(1, g.now)
		}
		g.redial()
		if !g.ended {
			begun += g.begin(begun, &due)
		}
		g.sendWaiting()
		for _, c := range g.conns {
			g.flush(c)
		}
		if g.ended && g.inFlight()+g.waiting.len() == 0 {
			break
		}
		if g.ended && g.now-endedAt > g.config.DrainTimeout {
			g.abandon()
			break
		}
		wait := 100 * time.Millisecond
		if !g.ended && plan.Rate > 0 {
			wait = min(wait, due-time.Since(g.start))
		}
		if !g.ended && plan.Duration > g.now {
			wait = min(wait, plan.Duration-g.now)
		}
		if g.ended {
			wait = min(wait, g.config.DrainTimeout)
		}
		if g.redialAt > 0 {
			wait = min(wait, g.redialAt-g.now)
		}
		if _, err := g.receive(max(0, wait)); err != nil {
			return g.result, err
		}
	}
	g.result.Elapsed = time.Since(g.start)
	return g.result, nil
}

// begin takes up the requests whose time has come: at a fixed rate by the clock,
// in a closed loop as many as are missing in flight.
func (g *Generator) begin(already uint64, due *time.Duration) (n uint64) {
	room := ^uint64(0)
	if g.plan.Count > 0 {
		room = g.plan.Count - already
	}
	if g.plan.Rate > 0 {
		for ; n < room && *due <= g.now && (g.plan.Duration == 0 || *due < g.plan.Duration); n++ {
			g.waiting.push(*due)
			*due = time.Duration(float64(already+n+1) / g.plan.Rate * float64(time.Second))
		}
		return n
	}
	for _, c := range g.conns {
		for c != nil && c.inFlight < g.plan.Streams && n < room && c.ready() {
			g.send(c, g.now)
			n++
		}
	}
	return n
}

// sendWaiting hands what waits to the connections that can take it, by turns.
func (g *Generator) sendWaiting() {
	for g.waiting.len() > 0 {
		var c *conn
		for range g.conns {
			next := g.conns[g.next]
			g.next = (g.next + 1) % len(g.conns)
			if next != nil && next.ready() {
				c = next
				break
			}
		}
		if c == nil {
			return
		}
		began := g.waiting.pop()
		record(g.result.Late, g.now-began)
		g.send(c, began)
	}
}

func (g *Generator) send(c *conn, began time.Duration) {
	c.send(g.n, g.config.Key, began)
	g.n++
	g.result.Sent++
}

func record(h *hdrhistogram.Histogram, d time.Duration) {
	// Out of range is the only error.
	_ = h.RecordValue(min(longest, max(shortest, int64(d))))
}

func (g *Generator) inFlight() (n int) {
	for _, c := range g.conns {
		if c != nil {
			n += c.inFlight
		}
	}
	for _, c := range g.draining {
		n += c.inFlight
	}
	return n
}

// flush writes what the kernel takes.
func (g *Generator) flush(c *conn) {
	if c == nil || c.sent == len(c.out) {
		return
	}
	if err := c.flush(); err != nil {
		g.lost(c, err)
	}
}

// receive waits for answers and takes what has come, on so many connections.
func (g *Generator) receive(wait time.Duration) (ready int, err error) {
	g.polled, g.poll = g.polled[:0], g.poll[:0]
	add := func(c *conn) {
		if c == nil {
			return
		}
		events := int16(unix.POLLIN)
		if c.sent < len(c.out) {
			events |= unix.POLLOUT
		}
		g.polled, g.poll = append(g.polled, unix.PollFd{Fd: int32(c.fd), Events: events}), append(g.poll, c)
	}
	for _, c := range g.conns {
		add(c)
	}
	for _, c := range g.draining {
		add(c)
	}
	timeout := unix.NsecToTimespec(int64(wait))
	switch ready, err = unix.Ppoll(g.polled, &timeout, nil); {
	case errors.Is(err, unix.EINTR):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("wait for answers: %w", err)
	}
	g.now = time.Since(g.start)
	for i, c := range g.poll {
		if g.polled[i].Revents == 0 {
			continue
		}
		if err := c.receive(g.answered); err != nil {
			g.lost(c, err)
			continue
		}
		if c.away {
			g.replace(c)
		}
		g.flush(c)
	}
	return ready, nil
}

// answered is called with the slot of each stream that has ended.
func (g *Generator) answered(c *conn, s *slot) {
	verdict, problem := s.verdict(c.request.grpc)
	switch verdict {
	case Allowed:
		g.result.Allowed++
	case Denied:
		g.result.Denied++
	default:
		g.failed(1, problem)
	}
	if verdict != Failed {
		record(g.result.Latency, g.now-s.began)
	}
	if g.plan.Until != nil && g.plan.Until(Answer{At: g.start.Add(g.now), Verdict: verdict}) {
		g.ended = true
	}
}

func (g *Generator) failed(n int, problem string) {
	if n > 0 {
		g.result.Failed += uint64(n)
		g.result.Problems[problem] += uint64(n)
	}
}

// replace opens a new connection for one that was asked to go away. What the
// server will not look at any more is sent again; it answers the rest.
func (g *Generator) replace(c *conn) {
	for _, began := range c.refused() {
		g.waiting.push(began)
		g.result.Sent-- // it is counted again
	}
	for i := range g.conns {
		if g.conns[i] == c {
			g.conns[i], g.redialAt = nil, max(1, g.now)
			g.draining = append(g.draining, c)
		}
	}
	if c.inFlight == 0 {
		g.drop(c)
	}
}

// lost is a connection that has failed.
func (g *Generator) lost(c *conn, err error) {
	n := 0
	for i := range c.slots {
		if c.slots[i].id != 0 {
			c.slots[i] = slot{}
			n++
		}
	}
	c.inFlight = 0
	g.failed(n, err.Error())
	for i := range g.conns {
		if g.conns[i] == c {
			g.conns[i], g.redialAt = nil, max(1, g.now)
		}
	}
	g.drop(c)
}

// drop closes a connection.
func (g *Generator) drop(c *conn) {
	c.close()
	for i := range g.draining {
		if g.draining[i] == c {
			g.draining = append(g.draining[:i], g.draining[i+1:]...)
			break
		}
	}
}

// redialEvery so long while the server takes no connection.
const redialEvery = 10 * time.Millisecond

// redial opens the connections that are missing.
func (g *Generator) redial() {
	if g.redialAt == 0 || g.now < g.redialAt {
		return
	}
	g.redialAt = 0
	for i := range g.conns {
		if g.conns[i] != nil {
			continue
		}
		c, err := dial(g.config.Address, g.config.Request)
		if err != nil {
			g.redialAt = g.now + redialEvery
			return
		}
		g.conns[i] = c
		g.result.Reconnects++
	}
}

// abandon gives up on what has not been answered. The connections are of no more
// use: a late answer would count in the next run.
func (g *Generator) abandon() {
	err := errors.New("no answer in time")
	for _, c := range g.conns {
		if c != nil && c.inFlight > 0 {
			g.lost(c, err)
		}
	}
	for len(g.draining) > 0 {
		g.lost(g.draining[0], err)
	}
	g.result.Sent += uint64(g.waiting.len())
	g.failed(g.waiting.len(), "not sent in time")
	if g.redialAt > 0 {
		g.redialAt = 1
		g.redial()
	}
}

// queue of times, first in, first out.
type queue struct {
	all  []time.Duration
	head int
}

func (q *queue) len() int { return len(q.all) - q.head }

func (q *queue) push(t time.Duration) {
	if q.head == len(q.all) {
		q.all, q.head = q.all[:0], 0
	}
	q.all = append(q.all, t)
}

func (q *queue) pop() time.Duration {
	t := q.all[q.head]
	q.head++
	return t
}

// Quantile of a histogram of nanoseconds, q from 0 to 1, as a duration.
func Quantile(h *hdrhistogram.Histogram, q float64) time.Duration {
	return time.Duration(h.ValueAtQuantile(q * 100))
}

// problem names what failed, with its code.
func problem(what string, code int) string { return what + " " + strconv.Itoa(code) }
