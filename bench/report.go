package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// report writes performance.md into folder docs, and a plot of each scenario
// beside it, of all results that there are.
func report(results, docs string) error {
	all, err := readResults(results)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return errors.New("there is no result yet: run a scenario first")
	}
	benchmarks, err := os.ReadFile(filepath.Join(results, "benchstat.txt"))
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := os.MkdirAll(docs, 0o755); err != nil {
		return err
	}
	for _, r := range all {
		if err := os.WriteFile(filepath.Join(docs, plotName(r)), []byte(svg(r.Title, r.panels())), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(docs, "performance.md"), []byte(page(all, string(benchmarks))), 0o644)
}

func plotName(r *Result) string { return "performance-" + r.Scenario + ".svg" }

// page is performance.md.
func page(all []*Result, benchmarks string) string {
	var b strings.Builder
	b.WriteString(`# Performance

Written by ` + "`go run ./bench report`" + `; nothing here is typed.

The no-op is what a check costs at least in Go: plain grpc-go with its default options and go-control-plane's types,
which says yes and looks at nothing ([bench/noop](../bench/noop/main.go), of the same go.mod). Both servers are processes of
their own on one machine, with the load generator beside them, and have their turns in the same run: one is idle while the
other is loaded. A number is the median over the rounds, with the least and the greatest in brackets; a ratio is
made inside each round. Absolute numbers are those of that machine; the ratios are what to compare. keygate runs with its default settings, its metrics on, over its own etcd.

The checks are what a real Envoy sent, kept byte by byte ([bench/testdata](../bench/testdata)), with the consumer key
exchanged from check to check.
`)
	for _, r := range all {
		fmt.Fprintf(&b, "\n## %s\n\n", r.Title)
		b.WriteString(strings.Join(r.About, "\n") + "\n\n")
		fmt.Fprintf(&b, "On %s, %s.\n\n    %s\n\n", r.Time.Format("2006-01-02"), r.Versions, r.Command)
		b.WriteString(r.markdown())
		fmt.Fprintf(&b, "\n![%s: the medians, and the least and the greatest of the rounds](%s)\n", r.Title, plotName(r))
	}
	if benchmarks != "" {
		b.WriteString("\n## Go benchmarks\n\nBy benchstat, beside `bench/baseline.txt`: those of the last release, and until there is one, of commit b571029.\n\n    make bench-go\n\n```\n" +
			strings.TrimSpace(benchmarks) + "\n```\n")
	}
	return b.String()
}

// String for a sentence.
func (v Versions) String() string {
	s := fmt.Sprintf("keygate %s, %s, grpc-go %s, etcd %s", v.Keygate, strings.Replace(v.Go, "go", "Go ", 1), v.GRPC, v.Etcd)
	if v.Envoy != "" {
		s += ", Envoy " + v.Envoy
	}
	return s + fmt.Sprintf(", %d processors", v.Processors)
}
