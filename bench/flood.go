package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"keygate/bench/load"
)

// floodRate of keys that nobody knows, a second.
const floodRate = 20_000

// runFlood measures what a flood of unknown keys does to the checks of good
// ones, and to etcd; and what as many checks do to a server that does nothing.
func runFlood(ctx context.Context, b *bench) (*Result, error) {
	count := b.keys[len(b.keys)-1]
	result := &Result{
		Title: "A flood of unknown keys",
		About: []string{
			fmt.Sprintf("%s checks a second of good keys on four connections, quiet and beside %s a second of keys that nobody knows, each another one, on two connections more.", number(rate), number(floodRate)),
			"Those come from another process, of the lowest priority: its processors are not the server's elsewhere. It still shares the caches, and the kernel's part of a connection has no priority.",
			"The no-op gets the same, and allows it all: that is what so many checks do to any server on these processors. The witness is a second keygate on the same etcd: its good keys are checked while the *first* has the flood. It serves nothing else: what the flood does to it, it does by taking the processors.",
		},
	}
	pair, stop, err := b.pair(ctx, count, 4)
	if err != nil {
		return nil, err
	}
	defer stop()
	keygate := pair[1]
	witness, err := b.replica(ctx, keygate.cmd.Path, keygate.process)
	if err != nil {
		return nil, err
	}
	apart := &subject{process: witness}
	defer apart.stop()
	if err := b.connect(ctx, apart, count, 4); err != nil {
		return nil, err
	}
	cases := []struct {
		name    string
		good    *subject
		flooded *process
	}{
		{pairNames[0], pair[0], pair[0].process},
		{pairNames[1], keygate, keygate.process},
		{"the witness", apart, keygate.process},
	}
	tables := make([]Table, len(cases))
	for i, c := range cases {
		tables[i] = Table{Title: c.name + ", " + number(float64(count)) + " keys", Subjects: []string{"quiet", "flood"}, Figures: []Figure{
			{Name: "p50 of good keys", Unit: "µs"}, {Name: "p99 of good keys", Unit: "µs"},
			{Name: "p99 of the generator's own lateness", Unit: "µs"},
			{Name: "reads of etcd", Plain: true}, {Name: "unknown keys a second", Unit: "/s", Plain: true},
		}}
		for f := range tables[i].Figures {
			tables[i].Figures[f].Values = make([][]float64, 2)
		}
	}
	for round := range b.rounds {
		for i, c := range cases {
			for subject, rate := range []int{0, floodRate} {
				found, err := b.flooded(ctx, c.good, c.flooded, rate)
				if err != nil {
					return nil, err
				}
				for f, v := range found {
					tables[i].Figures[f].Values[subject] = append(tables[i].Figures[f].Values[subject], v)
				}
				b.progress("round %d/%d, %s, %s: p50 %.0f µs, p99 %.0f µs, late %.0f µs, %.0f unknown/s",
					round+1, b.rounds, c.name, tables[i].Subjects[subject], found[0], found[1], found[2], found[4])
			}
		}
	}
	result.Tables = tables
	return result, nil
}

// flooded is one measurement of good keys of s beside so many unknown ones a
// second of a server, which may be the same. The figures are those of the table,
// in its order.
func (b *bench) flooded(ctx context.Context, s *subject, server *process, unknown int) (found [5]float64, err error) {
	before, err := server.metrics(ctx)
	if err != nil {
		return found, err
	}
	end := func() (load.Result, error) { return load.Result{}, nil }
	if unknown > 0 {
		if end, err = b.startFlood(ctx, server.authz, unknown); err != nil {
			return found, err
		}
	}
	w, err := s.generator.Run(ctx, load.Plan{Rate: rate, Duration: b.duration})
	junk, failed := end()
	if err = errors.Join(err, failed); err != nil {
		return found, err
	}
	if err := w.Err(); err != nil {
		return found, err
	}
	if junk.Failed > 0 || junk.Allowed > 0 && server.name == pairNames[1] {
		return found, fmt.Errorf("of the unknown keys %d were allowed and %d failed %v", junk.Allowed, junk.Failed, junk.Problems)
	}
	after, err := server.metrics(ctx)
	if err != nil {
		return found, err
	}
	quantile := window{Result: w}.quantile
	late := float64(load.Quantile(w.Late, 0.99).Microseconds())
	found = [5]float64{quantile(0.5), quantile(0.99), late, after["keygate_loads_total"] - before["keygate_loads_total"], 0}
	if unknown > 0 {
		found[4] = float64(junk.Answered()) / junk.Elapsed.Seconds()
	}
	return found, nil
}

// startFlood starts this program as the flood of a server. end ends it and
// returns what it did.
func (b *bench) startFlood(ctx context.Context, address string, rate int) (end func() (load.Result, error), err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "nice", "-n", "19", self, floodCommand, address, b.request, strconv.Itoa(rate))
	cmd.Stderr = os.Stderr
	var out bytes.Buffer
	cmd.Stdout = &out
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return func() (r load.Result, err error) {
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			return r, fmt.Errorf("the flood: %w", err)
		}
		return r, json.Unmarshal(out.Bytes(), &r)
	}, nil
}

// floodCommand is the first argument of a process that is a flood; the address,
// the request and the rate follow.
const floodCommand = "flood-of"

// flood sends unknown keys until standard input ends, and prints what became of
// them.
func (b *bench) flood(ctx context.Context, args []string) error {
	address, rate := args[0], 0
	b.request = args[1]
	if err := b.fill(); err != nil {
		return err
	}
	if _, err := fmt.Sscan(args[2], &rate); err != nil {
		return err
	}
	junk, err := b.junk(address)
	if err != nil {
		return err
	}
	defer junk.Close()
	ctx, stop := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	r, err := junk.Run(ctx, load.Plan{Rate: float64(rate)})
	if err != nil {
		return err
	}
	r.Latency, r.Late = nil, nil
	return json.NewEncoder(os.Stdout).Encode(r)
}

// junk checks keys that nobody knows, each once.
func (b *bench) junk(address string) (*load.Generator, error) {
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
	return load.Dial(load.Config{Address: address, Connections: 2, Request: request, Key: func(_ uint64, key []byte) {
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
