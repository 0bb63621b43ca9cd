package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"keygate/config"
	"keygate/quickstart"
)

func newDemoCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See a revoke take effect through real Envoy, and how fast",
		Long: `Take a tour that ends by itself: approve, revoke, delete and approve again a
status of each level by plain puts to etcd, while requests go through a real
Envoy back to back, and print after how long the answer changed.

ACK TO ANSWER is from etcd's answer to the put until the first response with the
new answer has been read to its end; it is negative where that came first. PUT
TO ANSWER is the same from just before the put was sent, and PUT TO EVENT until
a bare etcd watch of the path had the event, in the same rounds. The goal: a
median refusal comes within 1.5 times the bare watch's median, and one request.

It uses a folder and ports of its own, whatever else runs, and leaves nothing
behind. A step that is not seen within 5 s ends it with exit code 1. A goal that
is missed does not.`,
		Example: `  keygate demo
  keygate demo --rounds 100 -o json`,
		GroupID: groupRun,
		Args:    noArguments,
	}
	envoy, listen := envoyFlags(cmd, "127.0.0.1:0")
	rounds := cmd.Flags().Int("rounds", 20, "`number` of times that each level is changed, 1 to 10000")
	output := outputFlag(cmd, "table", "json")
	flags := config.Register(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		loaded, err := a.load(flags)
		if err != nil {
			return err
		}
		if err := checkListen(cmd, *listen); err != nil {
			return err
		}
		if *rounds < 1 || *rounds > 10000 {
			return usageError(cmd, "--rounds: %d is out of range, want 1 to 10000", *rounds)
		}
		dir, err := os.MkdirTemp("", "keygate-demo-")
		if err != nil {
			return fmt.Errorf("folder for the demo's data: %w", err)
		}
		defer func() {
			if rmErr := os.RemoveAll(dir); err == nil {
				err = rmErr
			}
		}()
		cfg := demoSettings(*loaded, dir)
		out := a.stdout
		if output.value == "json" {
			out = io.Discard
		}
		world := a.worldConfig(cfg, *envoy, *listen)
		if cfg.Source("log-level").Kind == config.FromDefault {
			world.Logger = newLogger(a.stderr, "text", slog.LevelError) // the tour does what keygate warns of
		}
		var tour quickstart.Tour
		err = quickstart.Run(cmd.Context(), world, func(ctx context.Context, w *quickstart.World) error {
			p := &tourPrinter{w: out}
			p.head(w, *rounds)
			var err error
			if tour, err = quickstart.RunTour(ctx, w, quickstart.TourConfig{Rounds: *rounds, OnStep: p.step}); err == nil {
				p.sum(tour)
			}
			return err
		})
		if err == nil && output.value == "json" {
			err = printJSON(a.stdout, tour)
		}
		return err
	}
	return cmd
}

// demoSettings keeps of the user's settings what has no place: a demo must not
// meet their data, their etcd or their ports.
func demoSettings(cfg config.Config, dataDir string) *config.Config {
	free := config.Address{Network: "tcp", Address: "127.0.0.1:0"}
	cfg.DataDir, cfg.EtcdEndpoints = dataDir, nil
	cfg.LogDecisions = "none"
	cfg.AuthzListen, cfg.HealthListen = free, free
	cfg.AuthzTLSCert, cfg.AuthzTLSKey, cfg.AuthzClientCA = "", "", ""
	return &cfg
}

// tourPrinter writes a tour as it goes.
type tourPrinter struct {
	w    io.Writer
	last quickstart.Level
}

const tourRow = "%-9s%-9s%-23s%7s%9s%8s%8s%7s\n"

func (p *tourPrinter) head(w *quickstart.World, rounds int) {
	fmt.Fprintf(p.w, "Real Envoy on %s asks keygate, which watches a real etcd.\n", w.URL())
	fmt.Fprintf(p.w, "Statuses are changed by plain puts to etcd; milliseconds, medians of %d rounds.\n\n", rounds)
	fmt.Fprintf(p.w, "%48s%17s%8s\n", "ACK TO", "PUT TO ANSWER", "PUT TO")
	fmt.Fprintf(p.w, tourRow, "CHANGE", "", "ANSWER THROUGH ENVOY", "ANSWER", "median", "max", "EVENT", "RATIO")
}

func (p *tourPrinter) step(s quickstart.Step) {
	if s.Level != p.last {
		fmt.Fprintf(p.w, "\n%s: %s\n", s.Level, s.Path)
		p.last = s.Level
	}
	verb, value := "put", s.Value
	switch {
	case s.Rounds == 0:
		verb = "imported"
	case s.Value == "":
		verb = "delete"
	}
	answer := strconv.Itoa(s.Status) + " " + s.Reason.String()
	if s.Rounds == 0 {
		fmt.Fprintf(p.w, "%-9s%-9s%s\n", verb, value, answer)
		return
	}
	fmt.Fprintf(p.w, tourRow, verb, value, answer, milliseconds(s.AckToAnswer.Median), milliseconds(s.SentToAnswer.Median),
		milliseconds(s.SentToAnswer.Max), milliseconds(s.SentToEvent.Median), fmt.Sprintf("%.2f", s.Ratio()))
}

func (p *tourPrinter) sum(t quickstart.Tour) {
	r := t.Refusals
	fmt.Fprintf(p.w, "\n%-34s %8s %8s %8s\n", fmt.Sprintf("%d refusals, ms", r.Rounds), "median", "p99", "max")
	for _, row := range []struct {
		what string
		of   quickstart.Spread
	}{
		{"put to refusal through Envoy", r.SentToAnswer},
		{"put to event of a bare etcd watch", r.SentToEvent},
		{"put's answer to refusal", r.AckToAnswer},
		{"keygate's own check in it", r.Check},
		{"one request, nothing changing", t.Request},
	} {
		fmt.Fprintf(p.w, "%-34s %8s %8s %8s\n", row.what, milliseconds(row.of.Median), milliseconds(row.of.P99), milliseconds(row.of.Max))
	}
	verdict := "met"
	if !t.Met {
		verdict = "missed"
	}
	fmt.Fprintf(p.w, "\nA refusal takes %.2f times as long as a bare watch's event.\n", r.Ratio)
	fmt.Fprintf(p.w, "Goal %s: %s ms, at most %.1f x %s + one request of %s = %s ms.\n", verdict, milliseconds(r.SentToAnswer.Median),
		quickstart.GoalFactor, milliseconds(r.SentToEvent.Median), milliseconds(t.Request.Median), milliseconds(time.Duration(t.Goal)))
}

// milliseconds with two places, without a sign before zero.
func milliseconds(d time.Duration) string {
	ms := math.Round(float64(d)/float64(time.Millisecond)*100) / 100
	return strconv.FormatFloat(ms+0, 'f', 2, 64)
}
