package main

import (
	"context"
	"fmt"

	"keygate/bench/load"
)

// runLatency measures how long a check takes at a fixed rate, on one connection
// and on four. A check counts from the time it should have been sent.
func runLatency(ctx context.Context, b *bench) (*Result, error) {
	result := &Result{
		Title: "Latency of a check at " + number(rate) + "/s",
		About: []string{
			"The rate does not depend on how fast the server is, and a check counts from the time at which it should have been sent: a server that stalls is charged for all that it keeps waiting.",
			"The generator shares the processors with the server, and what it is late by itself is in the numbers of both.",
		},
	}
	for _, count := range b.keys {
		t, err := b.latency(ctx, count, result)
		if err != nil {
			return nil, err
		}
		result.Tables = append(result.Tables, t)
	}
	return result, nil
}

func (b *bench) latency(ctx context.Context, count int, result *Result) (Table, error) {
	t := Table{Title: number(float64(count)) + " keys", Subjects: pairNames}
	pair, stop, err := b.pair(ctx, count, 1)
	if err != nil {
		return t, err
	}
	defer stop()
	for _, connections := range []int{1, 4} {
		for _, s := range pair {
			s.generator.Close()
			if s.generator, err = b.dial(s.process, count, connections); err != nil {
				return t, err
			}
		}
		on := "1 connection"
		if connections > 1 {
			on = fmt.Sprintf("%d connections", connections)
		}
		p50 := Figure{Name: "p50, " + on, Unit: "µs", Values: make([][]float64, len(pair))}
		p99 := Figure{Name: "p99, " + on, Unit: "µs", Values: make([][]float64, len(pair))}
		late := make([][]float64, len(pair))
		err = b.alternate(ctx, pair, []namedPlan{{on, load.Plan{Rate: rate, Duration: b.duration}}}, func(_, subject int, w window) {
			p50.Values[subject] = append(p50.Values[subject], w.quantile(0.5))
			p99.Values[subject] = append(p99.Values[subject], w.quantile(0.99))
			late[subject] = append(late[subject], float64(load.Quantile(w.Late, 0.99).Microseconds()))
		})
		if err != nil {
			return t, err
		}
		t.Figures = append(t.Figures, p50, p99)
		result.Notes = append(result.Notes, fmt.Sprintf("%s keys, %s: the generator itself was late by %v µs at p99 beside the no-op, by %v µs beside keygate.",
			number(float64(count)), on, spreadOf(late[0]), spreadOf(late[1])))
	}
	return t, nil
}
