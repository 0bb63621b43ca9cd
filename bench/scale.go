package main

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/bench/load"
)

// runScale compares a store of many keys with one of few: the start, and a
// check.
func runScale(ctx context.Context, b *bench) (*Result, error) {
	few, many := b.keys[0], b.keys[len(b.keys)-1]
	result := &Result{
		Title: fmt.Sprintf("%s keys beside %s", number(float64(many)), number(float64(few))),
		About: []string{
			"The index is ready when checks are answered from it; until then records are read through the cache. Beside it a client of the same etcd streams the same list and throws it away: nobody can have the data sooner. Each round starts keygate anew over the data that is there.",
			"Checks are saturated, on four connections with 16 in flight each, and go through all keys by turns.",
		},
	}
	binary, err := b.build(ctx, "./cmd/keygate")
	if err != nil {
		return nil, err
	}
	var subjects []*subject
	defer func() {
		for _, s := range subjects {
			s.stop()
		}
	}()
	for _, count := range []int{few, many} {
		dataDir := filepath.Join(b.folder, fmt.Sprintf("data-%d", count))
		began := time.Now()
		if err := b.seedInto(ctx, binary, dataDir, count); err != nil {
			return nil, fmt.Errorf("seed %d keys: %w", count, err)
		}
		b.progress("%s keys are in etcd after %.1f s", number(float64(count)), time.Since(began).Seconds())
		t := Table{Title: "Start with " + number(float64(count)) + " keys", Subjects: []string{"raw list", "index ready"}, Figures: []Figure{
			{Name: "time", Unit: "s", Values: make([][]float64, 2)},
		}}
		memory := []float64{}
		var s *subject
		for round := range b.rounds {
			p, err := b.keygate(ctx, binary, dataDir)
			if err != nil {
				return nil, err
			}
			s = &subject{process: p}
			took, err := indexReady(ctx, p)
			if err == nil {
				var raw time.Duration
				if raw, err = rawList(ctx, dataDir); err == nil {
					t.Figures[0].Values[0] = append(t.Figures[0].Values[0], raw.Seconds())
					t.Figures[0].Values[1] = append(t.Figures[0].Values[1], took.Seconds())
					b.progress("round %d/%d: raw list %.2f s, index ready after %.2f s", round+1, b.rounds, raw.Seconds(), took.Seconds())
				}
			}
			m, metricsErr := p.metrics(ctx)
			if err == nil {
				err = metricsErr
			}
			if err != nil {
				p.stop()
				return nil, err
			}
			memory = append(memory, m["process_resident_memory_bytes"]/(1<<20))
			if round < b.rounds-1 {
				p.stop()
			}
		}
		subjects = append(subjects, s)
		result.Tables = append(result.Tables, t)
		result.Notes = append(result.Notes, fmt.Sprintf("%s keys: keygate's resident memory when the index was ready: %v MB.", number(float64(count)), spreadOf(memory)))
		if s.generator, err = b.dial(s.process, count, 4); err != nil {
			return nil, err
		}
		if err := b.warm(ctx, s, min(count, 100_000)); err != nil {
			return nil, err
		}
	}
	t := Table{Title: "Checks", Subjects: []string{number(float64(few)) + " keys", number(float64(many)) + " keys"}, Figures: []Figure{
		{Name: "CPU a check, saturated", Unit: "µs"}, {Name: "p99, saturated", Unit: "µs"}, {Name: "checks a second", Unit: ""}, {Name: "allocations a check", Unit: ""},
	}}
	for f := range t.Figures {
		t.Figures[f].Values = make([][]float64, 2)
	}
	err = b.alternate(ctx, subjects, []namedPlan{{"saturated", load.Plan{Streams: 16, Duration: b.duration}}}, func(_, subject int, w window) {
		for f, v := range []float64{w.cpuPerCheck(), w.quantile(0.99), w.perSecond(), w.mallocsPerCheck()} {
			t.Figures[f].Values[subject] = append(t.Figures[f].Values[subject], v)
		}
	})
	if err != nil {
		return nil, err
	}
	result.Tables = append(result.Tables, t)
	for i, s := range subjects {
		m, err := s.metrics(ctx)
		if err != nil {
			return nil, err
		}
		result.Notes = append(result.Notes, fmt.Sprintf("%s: %s reads of etcd for all of the checks.", t.Subjects[i], number(m["keygate_loads_total"])))
	}
	return result, nil
}

var indexTook = regexp.MustCompile(`"msg":"index complete[^}]*"took":([0-9]+)`)

// indexReady waits until keygate says that its index is complete, and returns
// how long that took it.
func indexReady(ctx context.Context, p *process) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		if m := indexTook.FindStringSubmatch(p.log.String()); m != nil {
			ns, err := strconv.ParseInt(m[1], 10, 64)
			return time.Duration(ns), err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return 0, fmt.Errorf("the index is not complete: %w\n%s", ctx.Err(), p.log)
		}
	}
}

// rawList streams all of the watched keys.
func rawList(ctx context.Context, dataDir string) (time.Duration, error) {
	etcd, err := dialEtcd(dataDir)
	if err != nil {
		return 0, err
	}
	defer func() { _ = etcd.Close() }()
	if _, err := etcd.Get(ctx, space.Probe()); err != nil { // connected
		return 0, err
	}
	began := time.Now()
	parts, err := etcd.GetStream(ctx, space.Watched(), clientv3.WithPrefix())
	if err != nil {
		return 0, err
	}
	for part := range parts {
		if err := part.Err(); err != nil {
			return 0, fmt.Errorf("list: %w", err)
		}
	}
	return time.Since(began), nil
}
