package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"keygate/bench/load"
)

// subject is a server under measurement and who loads it.
type subject struct {
	*process
	generator *load.Generator
}

// stop closes the generator's connections and ends the server.
func (s *subject) stop() {
	if s.generator != nil {
		s.generator.Close()
	}
	s.process.stop()
}

// subjects in the order in which a table names them.
var pairNames = []string{"no-op", "keygate"}

// pair starts the two servers over a store of count keys, and connects to both.
// The caller stops them.
func (b *bench) pair(ctx context.Context, count, connections int) (pair []*subject, stop func(), err error) {
	stop = func() {
		for _, s := range pair {
			s.stop()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	binary, err := b.build(ctx, "./cmd/keygate")
	if err != nil {
		return nil, stop, err
	}
	noop, err := b.noop(ctx)
	if err != nil {
		return nil, stop, err
	}
	pair = append(pair, &subject{process: noop})
	keygate, err := b.seeded(ctx, binary, count)
	if err != nil {
		return pair, stop, err
	}
	pair = append(pair, &subject{process: keygate})
	for _, s := range pair {
		if err = b.connect(ctx, s, count, connections); err != nil {
			return pair, stop, err
		}
	}
	return pair, stop, nil
}

// connect gives s a generator of the first count keys, and warms both up.
func (b *bench) connect(ctx context.Context, s *subject, count, connections int) (err error) {
	if s.generator, err = b.dial(s.process, count, connections); err != nil {
		return err
	}
	return b.warm(ctx, s, count)
}

// captured is the request to send.
func (b *bench) captured(name string) (*load.Request, error) {
	c, err := load.ReadCaptured(filepath.Join(b.root, "bench", "testdata", name+".json"))
	if err != nil {
		return nil, err
	}
	return load.NewRequest(c)
}

func (b *bench) dial(p *process, count, connections int) (*load.Generator, error) {
	request, err := b.captured(b.request)
	if err != nil {
		return nil, err
	}
	g, err := load.Dial(load.Config{Address: p.authz, Connections: connections, Request: request, Key: cycle(count)})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", p.name, err)
	}
	return g, nil
}

// warmAtMost bounds how long every key is checked once before anything is
// measured.
const warmAtMost = 90 * time.Second

// warm has every key checked once, and the server run for a second at least.
func (b *bench) warm(ctx context.Context, s *subject, count int) error {
	plans := []load.Plan{{Streams: 16, Duration: min(time.Second, b.duration)}}
	if s.name != pairNames[0] { // to which all keys are the same
		plans = append(plans, load.Plan{Streams: 16, Count: uint64(count), Duration: warmAtMost})
	}
	for _, plan := range plans {
		r, err := s.generator.Run(ctx, plan)
		if err == nil && ctx.Err() == nil {
			err = b.accept(s.name, r)
		}
		if err != nil {
			return fmt.Errorf("warm %s up: %w", s.name, err)
		}
	}
	return nil
}

// failedAtMost is the part of the checks that may have had no answer for a
// measurement to count.
const failedAtMost = 0.001

// accept wants every check allowed. A few that had no answer in Envoy's time are
// told beside the numbers.
func (b *bench) accept(name string, r load.Result) error {
	if err := r.Err(); err == nil {
		return nil
	} else if r.Denied > 0 || float64(r.Failed) > failedAtMost*float64(r.Sent) {
		return err
	}
	note := fmt.Sprintf("%s: %d of %s checks had no answer %v.", name, r.Failed, number(float64(r.Sent)), r.Problems)
	b.progress("%s", note)
	b.notes = append(b.notes, note)
	return nil
}

// window is what one measurement found.
type window struct {
	load.Result
	cpu     time.Duration // of the server
	mallocs float64       // of the server
}

// cpuPerCheck in microseconds.
func (w window) cpuPerCheck() float64 {
	return float64(w.cpu) / float64(w.Answered()) / float64(time.Microsecond)
}

func (w window) mallocsPerCheck() float64 { return w.mallocs / float64(w.Answered()) }

func (w window) perSecond() float64 { return float64(w.Answered()) / w.Elapsed.Seconds() }

// quantile of the latencies in microseconds.
func (w window) quantile(q float64) float64 {
	return float64(load.Quantile(w.Latency, q)) / float64(time.Microsecond)
}

// measure runs the plan on a subject, and wants every check allowed.
func (b *bench) measure(ctx context.Context, s *subject, plan namedPlan) (window, error) {
	var w window
	// Reading the metrics allocates too: as much each time.
	m0, err := s.mallocs(ctx)
	if err != nil {
		return w, err
	}
	m1, err := s.mallocs(ctx)
	if err != nil {
		return w, err
	}
	stopProfile := b.profile(s, plan.name)
	c0, err := s.cpu()
	if err != nil {
		return w, err
	}
	if w.Result, err = s.generator.Run(ctx, plan.Plan); err != nil {
		return w, err
	}
	c1, err := s.cpu()
	if err != nil {
		return w, err
	}
	stopProfile()
	m2, err := s.mallocs(ctx)
	if err != nil {
		return w, err
	}
	w.cpu, w.mallocs = c1-c0, m2-m1-(m1-m0)
	if ctx.Err() == nil {
		err = b.accept(s.name, w.Result)
	}
	if err != nil {
		return w, fmt.Errorf("%s: %w", s.name, err)
	}
	return w, nil
}

// profile has perf sample a server's processors while it is loaded, if that was
// asked for. Of several rounds the last one's profile stays.
func (b *bench) profile(s *subject, plan string) (stop func()) {
	if b.keep == "" {
		return func() {}
	}
	cmd := exec.Command("perf", "record", "-q", "-g", "-F", "999", "-o", filepath.Join(b.keep, s.name+" "+plan+".perf"), "-p", strconv.Itoa(s.pid()))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.progress("no profile: %v", err)
		return func() {}
	}
	return func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
	}
}

// alternate measures each subject once a round under every plan, by turns, and
// hands over what was found.
func (b *bench) alternate(ctx context.Context, pair []*subject, plans []namedPlan, found func(plan, subject int, w window)) error {
	for round := range b.rounds {
		for p, plan := range plans {
			for i, s := range pair {
				w, err := b.measure(ctx, s, plan)
				if err != nil {
					return err
				}
				if ctx.Err() != nil {
					return ctx.Err()
				}
				found(p, i, w)
				b.progress("round %d/%d, %s, %s: %.1f µs of CPU, %.1f allocations, p50 %.0f µs, p99 %.0f µs, %.0f/s", round+1, b.rounds, plan.name, s.name,
					w.cpuPerCheck(), w.mallocsPerCheck(), w.quantile(0.5), w.quantile(0.99), w.perSecond())
			}
		}
	}
	return nil
}

// namedPlan is a plan, in words.
type namedPlan struct {
	name string
	load.Plan
}
