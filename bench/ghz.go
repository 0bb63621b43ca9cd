package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// ghzAtOnce is how many checks ghz has in flight, as in make ghz.
const ghzAtOnce = 50

// allowedMetric counts the checks that keygate has allowed.
const allowedMetric = `keygate_checks_total{decision="allowed",reason="allowed"}`

// runGhz has ghz send its checks to both servers, one after the other.
func runGhz(ctx context.Context, b *bench) (*Result, error) {
	result := &Result{
		Title: "By ghz",
		About: []string{
			fmt.Sprintf("`.tools/ghz` sends %s checks of `examples/ghz/check.json` to each server, %d at a time on one connection.", number(float64(b.count)), ghzAtOnce),
			"ghz waits for an answer before it sends the next check, and takes more of the processors than either server: the numbers say more about ghz than the others do.",
		},
	}
	t := Table{Subjects: pairNames, Figures: []Figure{
		{Name: "answered OK", Plain: true}, {Name: "errors", Plain: true}, {Name: "checks a second"},
		{Name: "p50", Unit: "µs"}, {Name: "p99", Unit: "µs"}, {Name: "CPU of the server a check", Unit: "µs"},
	}}
	pair, stop, err := b.pair(ctx, 100, 1)
	if err != nil {
		return nil, err
	}
	defer stop()
	for _, s := range pair {
		got, err := b.ghzOn(ctx, s)
		if err != nil {
			return nil, err
		}
		for i := range t.Figures {
			t.Figures[i].Values = append(t.Figures[i].Values, got[i:i+1])
		}
		b.progress("ghz, %s: %.0f OK, %.0f errors, %.0f/s", s.name, got[0], got[1], got[2])
	}
	result.Tables = append(result.Tables, t)
	return result, nil
}

// ghzOn runs ghz once and returns the figures in their order.
func (b *bench) ghzOn(ctx context.Context, s *subject) ([]float64, error) {
	before, err := s.metrics(ctx)
	if err != nil {
		return nil, err
	}
	c0, err := s.cpu()
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, b.ghz, "--insecure", "--call", "envoy.service.auth.v3.Authorization/Check",
		"-D", filepath.Join(b.root, "examples", "ghz", "check.json"), "-n", strconv.Itoa(b.count), "-c", strconv.Itoa(ghzAtOnce),
		"-O", "json", s.authz).Output()
	if err != nil {
		return nil, fmt.Errorf("ghz: %w", err)
	}
	c1, err := s.cpu()
	if err != nil {
		return nil, err
	}
	after, err := s.metrics(ctx)
	if err != nil {
		return nil, err
	}
	var report struct {
		Count                  int
		Rps                    float64
		StatusCodeDistribution map[string]int
		LatencyDistribution    []struct {
			Percentage int
			Latency    time.Duration
		}
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return nil, fmt.Errorf("read ghz's report: %w", err)
	}
	ok := report.StatusCodeDistribution["OK"]
	// To ghz a refusal is OK as well.
	if allowed := int(after[allowedMetric] - before[allowedMetric]); s.name == "keygate" && allowed != ok {
		return nil, fmt.Errorf("keygate allowed %d of the %d checks that ghz calls OK", allowed, ok)
	}
	quantile := func(percentage int) float64 {
		for _, l := range report.LatencyDistribution {
			if l.Percentage == percentage {
				return float64(l.Latency) / float64(time.Microsecond)
			}
		}
		return 0
	}
	return []float64{float64(ok), float64(report.Count - ok), report.Rps, quantile(50), quantile(99),
		float64(c1-c0) / float64(report.Count) / float64(time.Microsecond)}, nil
}
