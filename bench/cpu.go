package main

import (
	"context"
	"fmt"

	"keygate/bench/load"
)

// rate of checks a second at which a server is not saturated.
const rate = 2000

// In a closed loop, so many connections with so many checks in flight each: what
// Envoy has with four workers under load.
const (
	saturatingConnections = 4
	saturatingStreams     = 16
)

// runCPU measures the CPU time of a check, user and system time of the server's
// process alone, and its allocations: saturated, and at a rate.
func runCPU(ctx context.Context, b *bench) (*Result, error) {
	result := &Result{
		Title: "CPU time and allocations of a check",
		About: []string{
			"Each check climbs all levels: key, app, developer, product.",
			"CPU time is the user and system time of the server's process, of all its threads, divided by the checks; keygate's etcd is another process and not in it.",
			"Allocations are all that the process allocates, its housekeeping too, divided by the checks.",
			fmt.Sprintf("Saturated means a closed loop of %d connections with %d checks in flight on each.", saturatingConnections, saturatingStreams),
		},
	}
	for _, count := range b.keys {
		t, err := b.cpu(ctx, count)
		if err != nil {
			return nil, err
		}
		result.Tables = append(result.Tables, t)
	}
	return result, nil
}

func (b *bench) cpu(ctx context.Context, count int) (Table, error) {
	t := Table{Title: number(float64(count)) + " keys", Subjects: pairNames}
	pair, stop, err := b.pair(ctx, count, saturatingConnections)
	if err != nil {
		return t, err
	}
	defer stop()
	figure := func(name, unit string) *Figure {
		return &Figure{Name: name, Unit: unit, Values: make([][]float64, len(pair))}
	}
	saturated := []*Figure{figure("CPU a check, saturated", "µs"), figure("allocations a check, saturated", ""), figure("checks a second, saturated", "")}
	add := func(f *Figure, subject int, v float64) { f.Values[subject] = append(f.Values[subject], v) }
	err = b.alternate(ctx, pair, []namedPlan{{"saturated", load.Plan{Streams: saturatingStreams, Duration: b.duration}}}, func(_, subject int, w window) {
		add(saturated[0], subject, w.cpuPerCheck())
		add(saturated[1], subject, w.mallocsPerCheck())
		add(saturated[2], subject, w.perSecond())
	})
	if err != nil {
		return t, err
	}
	// One connection instead of four.
	for _, s := range pair {
		s.generator.Close()
		if s.generator, err = b.dial(s.process, count, 1); err != nil {
			return t, err
		}
	}
	paced := []*Figure{figure("CPU a check at "+number(rate)+"/s", "µs"), figure("allocations a check at "+number(rate)+"/s", "")}
	err = b.alternate(ctx, pair, []namedPlan{{"paced", load.Plan{Rate: rate, Duration: b.duration}}}, func(_, subject int, w window) {
		add(paced[0], subject, w.cpuPerCheck())
		add(paced[1], subject, w.mallocsPerCheck())
	})
	if err != nil {
		return t, err
	}
	for _, f := range append(saturated, paced...) {
		t.Figures = append(t.Figures, *f)
	}
	return t, nil
}
