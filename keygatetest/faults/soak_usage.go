package faults

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// usage is what the processes of a world take, looked at again and again.
type usage struct {
	replicas int
	done     chan struct{}
	wg       sync.WaitGroup

	mu     sync.Mutex
	points map[usageOf][]point
}

// usageOf is one figure of one process.
type usageOf struct {
	figure  int // in usageFigures
	process int // replica, or etcd
}

// etcdProcess stands for etcd among the replicas.
const etcdProcess = -1

// usageFigures of a replica, as it tells them at /metrics. A figure with slack
// leaks if it has grown by more than that from one quiet part to the other.
var usageFigures = [...]struct {
	name, metric string
	per          float64 // of the unit that the name tells
	slack        float64
}{
	figureMemory:      {name: "resident memory, MiB", metric: "process_resident_memory_bytes", per: 1 << 20},
	figureHeap:        {name: "live heap, MiB", metric: "go_memstats_next_gc_bytes", per: 2 << 20}, // the collector's goal is twice what it found alive
	figureGoroutines:  {name: "goroutines", metric: "go_goroutines", per: 1, slack: 8},
	figureDescriptors: {name: "open descriptors", metric: "process_open_fds", per: 1, slack: 8},
}

const (
	figureMemory = iota
	figureHeap
	figureGoroutines
	figureDescriptors
)

// newUsage looks at every replica, and at the etcd with the id that pid returns,
// at this interval until it is stopped. A process that does not answer is left
// out.
func newUsage(w *World, now func() time.Duration, interval time.Duration, pid func() int64) *usage {
	u := &usage{replicas: len(w.Replicas), done: make(chan struct{}), points: map[usageOf][]point{}}
	again := func(look func()) {
		u.wg.Go(func() {
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for {
				look()
				select {
				case <-tick.C:
				case <-u.done:
					return
				case <-w.T.Context().Done():
					return
				}
			}
		})
	}
	for _, r := range w.Replicas {
		again(func() {
			life := r.Pid()
			_, body, err := r.Ask("/metrics")
			if err != nil || r.Pid() != life {
				return
			}
			at := now()
			for i, f := range usageFigures {
				if v, ok := sample(body, f.metric); ok {
					u.add(usageOf{i, r.Index}, point{at, v / f.per, life})
				}
			}
		})
	}
	again(func() {
		life := int(pid())
		if pages, ok := residentPages(life); ok {
			u.add(usageOf{figureMemory, etcdProcess}, point{now(), float64(pages*os.Getpagesize()) / (1 << 20), life})
		}
	})
	return u
}

func (u *usage) add(of usageOf, p point) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.points[of] = append(u.points[of], p)
}

// stop looking. The points may be read then.
func (u *usage) stop() {
	close(u.done)
	u.wg.Wait()
}

// sample of a metric without labels.
func sample(metrics, name string) (float64, bool) {
	for line := range strings.Lines(metrics) {
		if rest, is := strings.CutPrefix(line, name+" "); is {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			return v, err == nil
		}
	}
	return 0, false
}

// residentPages of memory that a process has.
func residentPages(pid int) (int, bool) {
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, false
	}
	fields := bytes.Fields(statm)
	if len(fields) < 2 {
		return 0, false
	}
	n, err := strconv.Atoi(string(fields[1]))
	return n, err == nil
}

// within the time of a span.
func within(points []point, s span) (values []float64) {
	for _, p := range points {
		if s.from <= p.at && p.at <= s.to {
			values = append(values, p.value)
		}
	}
	return values
}

// settled is the second half of a process's last life: what it takes when it has
// what it needs.
func settled(points []point) []point {
	for i := len(points) - 1; i > 0; i-- {
		if points[i-1].life != points[i].life {
			points = points[i:]
			break
		}
	}
	return points[len(points)/2:]
}

// leaks compares the two quiet parts. What never came down, in the last one, to
// the most that it was in the first has grown; it has leaked if by more than its
// slack.
func (u *usage) leaks(quiet [2]span) (all []string) {
	for replica := range u.replicas {
		for i, f := range usageFigures {
			points := u.points[usageOf{i, replica}]
			before, after := within(points, quiet[0]), within(points, quiet[1])
			switch {
			case len(before) == 0 || len(after) == 0:
				all = append(all, fmt.Sprintf("replica %d: nobody has seen its %s in both quiet parts", replica, f.name))
			case f.slack == 0:
			case slices.Min(after) > slices.Max(before)+f.slack:
				all = append(all, fmt.Sprintf("replica %d leaks: %s never under %s in the quiet part at the end, never over %s in that at the beginning",
					replica, f.name, number(slices.Min(after)), number(slices.Max(before))))
			}
		}
	}
	return all
}

// panels of the picture: etcd's memory has a panel of its own.
func (u *usage) panels() (all []panel) {
	for i, f := range usageFigures {
		p := panel{title: f.name}
		for replica := range u.replicas {
			p.lines = append(p.lines, line{fmt.Sprintf("replica %d", replica), u.points[usageOf{i, replica}]})
		}
		all = append(all, p)
	}
	return append(all, panel{
		title: usageFigures[figureMemory].name + ", of etcd",
		lines: []line{{"etcd", u.points[usageOf{figureMemory, etcdProcess}]}},
	})
}
