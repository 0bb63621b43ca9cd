package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"

	"keygate/bench/load"
)

// floodRate of keys that nobody knows, a second.
const floodRate = 20_000

// runFlood measures what a flood of unknown keys does to the checks of good
// ones, and to etcd.
func runFlood(ctx context.Context, b *bench) (*Result, error) {
	count := b.keys[len(b.keys)-1]
	result := &Result{
		Title: "A flood of unknown keys",
		About: []string{
			fmt.Sprintf("%s checks a second of good keys on four connections, quiet and beside %s a second of keys that nobody knows, each another one, on two connections more. The generators share the processors with the server.", number(rate), number(floodRate)),
		},
	}
	binary, err := b.build(ctx, "./cmd/keygate")
	if err != nil {
		return nil, err
	}
	keygate, err := b.seeded(ctx, binary, count)
	if err != nil {
		return nil, err
	}
	defer keygate.stop()
	good, err := b.dial(keygate, count, 4)
	if err != nil {
		return nil, err
	}
	defer good.Close()
	junk, err := b.junk(keygate)
	if err != nil {
		return nil, err
	}
	defer junk.Close()
	if err := b.warm(ctx, &subject{process: keygate, generator: good}, count); err != nil {
		return nil, err
	}
	t := Table{Title: number(float64(count)) + " keys", Subjects: []string{"quiet", "flood"}, Figures: []Figure{
		{Name: "p50 of good keys", Unit: "µs"}, {Name: "p99 of good keys", Unit: "µs"},
		{Name: "reads of etcd", Plain: true}, {Name: "unknown keys a second", Unit: "/s", Plain: true},
	}}
	for f := range t.Figures {
		t.Figures[f].Values = make([][]float64, 2)
	}
	for round := range b.rounds {
		for i := range t.Subjects {
			before, err := keygate.metrics(ctx)
			if err != nil {
				return nil, err
			}
			flooding, stop := context.WithCancel(ctx)
			flooded := make(chan load.Result, 1)
			go func() {
				var r load.Result
				if i == 1 {
					r, _ = junk.Run(flooding, load.Plan{Rate: floodRate})
				}
				flooded <- r
			}()
			w, err := good.Run(ctx, load.Plan{Rate: rate, Duration: b.duration})
			stop()
			junked := <-flooded
			if err == nil {
				err = w.Err()
			}
			if err == nil && junked.Allowed+junked.Failed > 0 {
				err = fmt.Errorf("of the unknown keys %d were allowed and %d failed %v", junked.Allowed, junked.Failed, junked.Problems)
			}
			if err != nil {
				return nil, err
			}
			after, err := keygate.metrics(ctx)
			if err != nil {
				return nil, err
			}
			perSecond := 0.0
			if i == 1 {
				perSecond = float64(junked.Denied) / junked.Elapsed.Seconds()
			}
			quantile := window{Result: w}.quantile
			for f, v := range []float64{quantile(0.5), quantile(0.99), after["keygate_loads_total"] - before["keygate_loads_total"], perSecond} {
				t.Figures[f].Values[i] = append(t.Figures[f].Values[i], v)
			}
			b.progress("round %d/%d, %s: p50 %.0f µs, p99 %.0f µs, %.0f unknown/s", round+1, b.rounds, t.Subjects[i], quantile(0.5), quantile(0.99), perSecond)
		}
	}
	result.Tables = append(result.Tables, t)
	return result, nil
}

// junk checks keys that nobody knows, each once.
func (b *bench) junk(p *process) (*load.Generator, error) {
	c, err := load.ReadCaptured(filepath.Join(b.root, "bench", "testdata", b.request+".json"))
	if err != nil {
		return nil, err
	}
	request, err := load.NewRequest(c)
	if err != nil {
		return nil, err
	}
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEF"
	random := rand.NewPCG(rand.Uint64(), rand.Uint64())
	return load.Dial(load.Config{Address: p.authz, Connections: 2, Request: request, Key: func(_ uint64, key []byte) {
		var bits uint64
		for i := range key {
			if i%12 == 0 {
				bits = random.Uint64()
			}
			key[i] = letters[bits%32]
			bits >>= 5
		}
	}})
}
