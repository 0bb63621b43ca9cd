// Command bench measures keygate against a server that does nothing, and says
// what it found as ratios of the two inside one run.
//
//	go run ./bench cpu            # CPU time and allocations of a check
//	go run ./bench latency        # p50 and p99 at a fixed rate
//	go run ./bench revoke         # from a put to the first refusal
//	go run ./bench flood          # good keys beside a flood of unknown ones
//	go run ./bench scale          # the start, and checks, with many keys
//	go run ./bench bulk           # checks beside a bulk change
//	go run ./bench index          # the index by itself, beside a Go map
//	go run ./bench ghz            # a million checks by ghz
//	go run ./bench envoy          # through a real Envoy
//	go run ./bench report         # docs/performance.md of all that was measured
//	go run ./bench capture        # the requests in testdata again, from .tools/envoy
//
// Each scenario is a file of its own, writes a file into bench/results, and
// prints its table. It runs the two servers as processes of their own, on
// loopback, by turns: while one is loaded the other one is idle.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// scenario is something to measure.
type scenario struct {
	name, says string
	run        func(context.Context, *bench) (*Result, error)
}

// scenarios in the order of the report.
var scenarios = []scenario{
	{"cpu", "CPU time and allocations of a check", runCPU},
	{"latency", "p50 and p99 of a check at a fixed rate", runLatency},
	{"revoke", "from a put to the first refusal", runRevoke},
	{"index", "memory, garbage collection and look-ups of the index beside a map", runIndex},
	{"scale", "the start and checks with many keys beside few", runScale},
	{"flood", "good keys beside a flood of unknown ones", runFlood},
	{"bulk", "checks and revocations beside a bulk change", runBulk},
	{"ghz", "checks by ghz, as users measure", runGhz},
	{"envoy", "through a real Envoy, and without any of it", runEnvoy},
}

// options of the command line.
type options struct {
	rounds   int
	duration time.Duration
	keys     []int
	request  string
	count    int
	bulk     int
	results  string
	docs     string
	envoy    string
	ghz      string
	keep     string
	env      string
}

// bench is one run of a scenario.
type bench struct {
	options
	root    string // of the module
	folder  string // for what is built and stored, removed at the end
	command string // that runs it again
	notes   []string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

const usage = `usage: go run ./bench <what> [flags]

what:
`

func run(ctx context.Context, args []string) error {
	b := &bench{}
	if len(args) == 4 && args[0] == floodCommand {
		return b.flood(ctx, args[1:])
	}
	set := flag.NewFlagSet("bench", flag.ContinueOnError)
	set.IntVar(&b.rounds, "rounds", 5, "`rounds`, in each of which every server has its turn")
	set.DurationVar(&b.duration, "duration", 4*time.Second, "`duration` of each measurement")
	keys := set.String("keys", "100", "`numbers` of keys in the store, with commas between")
	set.StringVar(&b.request, "request", allHeaders, "captured `request` to send: "+allHeaders+" (20 of them) or "+hardened)
	set.IntVar(&b.count, "n", 1_000_000, "`checks` by ghz")
	set.IntVar(&b.bulk, "bulk", 300_000, "`keys` that bulk imports and revokes, in all rounds together")
	set.StringVar(&b.results, "results", "", "`folder` of the results (default bench/results)")
	set.StringVar(&b.docs, "docs", "", "`folder` that report writes performance.md and its plots to (default docs)")
	set.StringVar(&b.envoy, "envoy", "", "Envoy's `binary` (default .tools/envoy)")
	set.StringVar(&b.ghz, "ghz", "", "ghz's `binary` (default .tools/ghz)")
	set.StringVar(&b.keep, "profile", "", "`folder` to write what perf samples of each loaded server to")
	set.StringVar(&b.env, "env", "", "`variables` for keygate alone, such as GOMAXPROCS=1, with spaces between")
	set.Usage = func() {
		out := set.Output()
		_, _ = fmt.Fprint(out, usage)
		for _, s := range scenarios {
			_, _ = fmt.Fprintf(out, "  %-9s %s\n", s.name, s.says)
		}
		_, _ = fmt.Fprintf(out, "  %-9s %s\n  %-9s %s\n\nflags:\n", "report", "write docs/performance.md of the results", "capture", "have Envoy send the requests in testdata again")
		set.PrintDefaults()
	}
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		set.Usage()
		return errors.New("what to do?")
	}
	if err := set.Parse(args[1:]); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if set.NArg() > 0 {
		return fmt.Errorf("unexpected %q", set.Args())
	}
	b.command = "go run ./bench " + strings.Join(args, " ")
	for n := range strings.SplitSeq(*keys, ",") {
		count, err := strconv.Atoi(n)
		if err != nil || count < 1 {
			return fmt.Errorf("-keys %s: want numbers with commas between", *keys)
		}
		b.keys = append(b.keys, count)
	}
	if b.rounds < 1 || b.duration <= 0 || b.count < 1 {
		return errors.New("-rounds, -duration and -n must be above 0")
	}
	if err := b.fill(); err != nil {
		return err
	}
	switch what := args[0]; what {
	case "report":
		return report(b.results, b.docs)
	case "capture":
		return captureRequests(ctx, b.envoy, filepath.Join(b.root, "bench", "testdata"))
	default:
		for _, s := range scenarios {
			if s.name == what {
				return b.scenario(ctx, s)
			}
		}
		set.Usage()
		return fmt.Errorf("there is no %q", what)
	}
}

// fill in what depends on the module's folder.
func (b *bench) fill() (err error) {
	if b.root, err = moduleRoot(); err != nil {
		return err
	}
	for _, f := range []struct {
		value *string
		path  string
	}{{&b.results, "bench/results"}, {&b.docs, "docs"}, {&b.envoy, ".tools/envoy"}, {&b.ghz, ".tools/ghz"}} {
		if *f.value == "" {
			*f.value = filepath.Join(b.root, f.path)
		}
	}
	return nil
}

// scenario runs s, prints its table and writes its file.
func (b *bench) scenario(ctx context.Context, s scenario) error {
	var err error
	if b.folder, err = os.MkdirTemp("", "keygate-bench-"); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.folder) }()
	if b.keep != "" {
		if err := os.MkdirAll(b.keep, 0o777); err != nil {
			return err
		}
	}
	result, err := s.run(ctx, b)
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	if ctx.Err() != nil { // cut short: not a measurement
		return ctx.Err()
	}
	result.Scenario, result.Command, result.Time = s.name, b.command, time.Now().UTC().Truncate(time.Second)
	result.Versions = b.versions(ctx)
	result.Notes = append(result.Notes, b.notes...)
	result.Smoke = b.rounds < 3 || b.duration < time.Second
	fmt.Printf("\n%s\n", result.markdown())
	return result.write(b.results)
}

// progress tells what is going on.
func (b *bench) progress(format string, args ...any) {
	_, _ = fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}

// moduleRoot is the folder of go.mod.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env: %w", err)
	}
	file := strings.TrimSpace(string(out))
	if filepath.Base(file) != "go.mod" {
		return "", errors.New("not in the project's folder: the bench builds what it measures")
	}
	return filepath.Dir(file), nil
}
