package faults

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/version"
)

// write the page and the picture, soak.md and soak.svg, into a folder.
func (s *soak) write(dir, release string) error {
	picture := plot{
		title:  fmt.Sprintf("keygate under load and random faults for %v (seed %d)", s.quiet[1].to.Round(time.Second), s.seed),
		lasts:  s.quiet[1].to,
		panels: s.usage.panels(),
		marks:  s.marks(),
	}
	for name, text := range map[string]string{"soak.md": s.page(release), "soak.svg": picture.svg()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return fmt.Errorf("write the soak's report: %w", err)
		}
	}
	return nil
}

// page is docs/soak.md.
func (s *soak) page(release string) string {
	var b strings.Builder
	put := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	detector := "without the race detector"
	if s.w.Options.Race {
		detector = "built with the race detector"
	}
	violations := 0
	for _, n := range s.total.Violations {
		violations += n
	}
	put("# Soak\n")
	put("Written by `make soak DURATION=%v SEED=%d` on %s; nothing here is typed.", s.lasts, s.seed, time.Now().UTC().Format(time.DateOnly))
	put("%d replicas, %s, on one etcd, each behind a proxy of its own, under load throughout,", len(s.w.Replicas), detector)
	put("and a random fault every %v. After each the history is held against the guarantees, as in the fault suite. The seed", s.every)
	put("repeats the faults, not what the machine makes of them.\n")
	put("| | |\n|---|---|")
	row := func(name, format string, args ...any) { put("| %s | %s |", name, cell(fmt.Sprintf(format, args...))) }
	row("duration", "%v, of which %v quiet at the beginning and %v at the end", s.quiet[1].to.Round(time.Second),
		(s.quiet[0].to - s.quiet[0].from).Round(time.Second), (s.quiet[1].to - s.quiet[1].from).Round(time.Second))
	row("seed", "%d", s.seed)
	row("versions", "keygate %s, etcd %s, %s on %s/%s, %d CPUs for replicas, etcd, proxies and load", cmp.Or(release, "(version not given)"), version.Version,
		runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	row("staleness budget S", "%v", s.w.Options.S)
	row("load", "%d checks/s, %d changes/s, and up to %d/s that wait for their receipt", soakChecks, soakChanges, soakReceipts)
	row("checks", "%d: %d allowed, %d answered 503, %d not answered", s.total.Checks, s.total.Allowed, s.total.Unavailable, s.total.Failed)
	row("changes acknowledged", "%d, receipts %d", s.total.Writes, s.total.Receipts)
	row("faults injected", "%d: %s", len(s.faults), s.sorts())
	row("violations", "%d", violations)
	row("data races, panics, leaks, replicas that ended by themselves", "%d", len(s.problems))
	put("")
	for _, p := range s.problems {
		put("- %s", strings.TrimSpace(firstLine(p)))
	}
	put("## What the processes take\n")
	put("First and last are the medians of the two quiet parts. Replica 0 lives as long as the run; the others are restarted now and")
	put("then. The slope is that of a straight line through the second half of the last life. The race detector remembers the addresses that")
	put("were used, several bytes for each, so resident memory under it is a few times that in production and takes minutes to settle; the")
	put("live heap, which is what the collector found in use when it last ran, is the replica's own. Over a few minutes a slope tells of the")
	put("steps in the picture, not of an hour.\n")
	put("Goroutines and descriptors that are more at the end than at the beginning, by more than %s, are a leak and fail the run.\n", number(usageFigures[figureGoroutines].slack))
	put("| figure | process | first | last | highest | slope per hour | over |\n|---|---|---|---|---|---|---|")
	for i, f := range usageFigures {
		for process := range s.usage.replicas {
			put("%s", s.usageRow(f.name, fmt.Sprintf("replica %d", process), s.usage.points[usageOf{i, process}]))
		}
		if i == figureMemory {
			put("%s", s.usageRow(f.name, "etcd", s.usage.points[usageOf{i, etcdProcess}]))
		}
	}
	put("\n![Resident memory, live heap, goroutines and open descriptors of each replica, and the memory of etcd, over time; each fault is shaded](soak.svg)\n")
	put("## Faults\n")
	put("| | at | fault | | lasted | all ready after | checks with 503 | without an answer | violations |\n|---|---|---|---|---|---|---|---|---|")
	for i, f := range s.faults {
		put("| %d | %v | %s | %s | %.1f s | %s | %d | %d | %d |", i+1, f.from.Round(time.Second), cell(f.name), cell(f.says), (f.to - f.from).Seconds(),
			milliseconds(f.back), f.unavailable, f.failed, f.violations)
	}
	return b.String()
}

// usageRow of the table; a figure that nobody saw has none.
func (s *soak) usageRow(figure, process string, points []point) string {
	if len(points) == 0 {
		return fmt.Sprintf("| %s | %s | | | | | |", figure, process)
	}
	var all []float64
	for _, p := range points {
		all = append(all, p.value)
	}
	half := settled(points)
	return fmt.Sprintf("| %s | %s | %.1f | %.1f | %.1f | %+.1f | %v |", figure, process, median(within(points, s.quiet[0])), median(within(points, s.quiet[1])),
		slices.Max(all), slope(half), (half[len(half)-1].at - half[0].at).Round(time.Second))
}

// firstLine of a text.
func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
