package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/term"

	"keygate/config"
)

// isTerminal tells whether a person sees what is written to w.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// logger of a command that runs until it is stopped: text on a terminal, JSON
// elsewhere, unless --log-format says otherwise. It writes to w, which stands
// for standard error.
func (a *app) logger(cfg *config.Config, w io.Writer) *slog.Logger {
	format := cfg.LogFormat
	if format == "auto" {
		format = "json"
		if isTerminal(a.stderr) {
			format = "text"
		}
	}
	return newLogger(w, format, cfg.LogLevel)
}

// logQueue is how many lines wait for a slow terminal or disk.
const logQueue = 1024

// serverLog is where a server's log goes: lines wait in a bounded queue, and
// what finds it full is left out and counted. A blocked standard error must
// not stop the watcher, the prober or a check.
type serverLog struct {
	w       io.Writer
	lines   chan []byte
	leftOut atomic.Int64
}

func newServerLog(w io.Writer) *serverLog {
	return &serverLog{w: w, lines: make(chan []byte, logQueue)}
}

// Write takes one line, as slog's handlers hand them over. It never blocks and
// never fails.
func (l *serverLog) Write(line []byte) (int, error) {
	select {
	case l.lines <- bytes.Clone(line):
	default:
		l.leftOut.Add(1)
	}
	return len(line), nil
}

// run writes until ctx ends, and then what still waits. A writer that has gone
// is no reason to stop.
func (l *serverLog) run(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case line := <-l.lines:
			l.write(line)
		case <-ctx.Done():
		}
	}
	for range len(l.lines) {
		l.write(<-l.lines)
	}
}

// start runs l. The function that it returns ends that, and waits for the last
// lines, but not long for a reader who does not read.
func (l *serverLog) start() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.run(ctx)
	}()
	return func() {
		cancel()
		select {
		case <-done:
		case <-time.After(time.Second):
		}
	}
}

func (l *serverLog) write(line []byte) {
	if n := l.leftOut.Swap(0); n > 0 {
		fmt.Fprintf(l.w, "keygate: %d log lines left out: they came faster than they could be written\n", n)
	}
	_, _ = l.w.Write(line)
}

// toolLogger is for a command that does one thing and ends: its answer is its
// output, so unless asked for there are warnings only, and those as text.
func (a *app) toolLogger(cfg *config.Config) *slog.Logger {
	level := cfg.LogLevel
	if cfg.Source("log-level").Kind == config.FromDefault {
		level = slog.LevelWarn
	}
	format := cfg.LogFormat
	if format == "auto" {
		format = "text"
	}
	return newLogger(a.stderr, format, level)
}

func newLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
