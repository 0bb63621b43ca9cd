//go:build !noembed

package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	// bridgeLines waiting to be written: a burst, not a backlog.
	bridgeLines = 256
	// bridgeFlush bounds the wait for a log that is not being read.
	bridgeFlush = time.Second
)

// routine is how lines end that etcd writes as warnings and errors at a normal
// start in this configuration.
var routine = []string{
	"Running http and grpc server on single port. This is not recommended for production.",
	"simple token is not cryptographically signed",
	// It looks before its first commit, 0.1 s after the start, and again
	// every 5 s; only an upgrade to the next etcd waits for it.
	"Failed to detect schema version",
	"failed to update storage version",
	"Failed to detect storage schema version. Please wait till wal snapshot before upgrading cluster.",
	// Of a slow request, beside "apply request took too long".
	"request stats",
	// An id stands before it. The first election tick of a new member can come
	// before the member has applied that it exists; the next tick elects it.
	"cannot campaign at term 1 since there are still pending configuration changes to apply",
}

// tooLong are fields that hold pages, such as a whole request.
var tooLong = []string{"stacktrace", "request", "response", "request content"}

// bridge carries etcd's log to slog. Writing to it never blocks: etcd's read
// loop writes log lines itself and would stop with the reader of the log.
type bridge struct {
	logger *slog.Logger
	lines  chan slog.Record // never closed: etcd may log after everything
	stop   chan struct{}    // asks run to write what is there and end
	done   chan struct{}    // closed when run has ended

	dropped atomic.Int64
	// started: from here on a fatal line ends the process.
	started atomic.Bool
	// closing: errors are only the listeners going away.
	closing atomic.Bool
	// fatal takes the first fatal line before started.
	fatal chan error
}

func newBridge(logger *slog.Logger) *bridge {
	return &bridge{
		logger: logger,
		lines:  make(chan slog.Record, bridgeLines),
		stop:   make(chan struct{}),
		done:   make(chan struct{}),
		fatal:  make(chan error, 1),
	}
}

// run writes lines until flush.
func (b *bridge) run() {
	defer close(b.done)
	for {
		select {
		case r := <-b.lines:
			b.write(r)
		case <-b.stop:
			for {
				select {
				case r := <-b.lines:
					b.write(r)
				default:
					b.writeDropped()
					return
				}
			}
		}
	}
}

func (b *bridge) writeDropped() {
	if n := b.dropped.Swap(0); n > 0 {
		b.logger.Warn("etcd's log was faster than its reader", "dropped_lines", n)
	}
}

func (b *bridge) write(r slog.Record) {
	b.writeDropped()
	// The error is the handler's own, and the log is the only place for it.
	_ = b.logger.Handler().Handle(context.Background(), r)
}

// flush ends run once it has written what is waiting. It gives up after a
// second.
func (b *bridge) flush() {
	select {
	case b.stop <- struct{}{}:
	case <-b.done:
	case <-time.After(bridgeFlush):
		return
	}
	select {
	case <-b.done:
	case <-time.After(bridgeFlush):
	}
}

// zap returns the logger for etcd.
func (b *bridge) zap() *zap.Logger {
	return zap.New(&bridgeCore{bridge: b}, zap.WithFatalHook(b), zap.WithPanicHook(b))
}

// OnWrite runs after a line with which etcd gives up was written, on the
// goroutine that gives up, and does not return to it.
func (b *bridge) OnWrite(entry *zapcore.CheckedEntry, fields []zapcore.Field) {
	if b.started.Load() {
		b.flush()
		os.Exit(1)
	}
	err := errors.New(entry.Message)
	for _, f := range fields {
		if cause, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
			err = fmt.Errorf("%s: %w", entry.Message, cause)
		}
	}
	select {
	case b.fatal <- err:
	default:
	}
	runtime.Goexit()
}

// bridgeCore is the zap side of a bridge, with the fields bound so far.
type bridgeCore struct {
	*bridge
	fields []zapcore.Field
}

// level is one below zap's for the routine: a normal start is silent.
func level(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelError
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	default:
		return slog.LevelDebug
	}
}

func (c *bridgeCore) Enabled(l zapcore.Level) bool {
	return l >= zapcore.InfoLevel && c.logger.Enabled(context.Background(), level(l))
}

func (c *bridgeCore) With(fields []zapcore.Field) zapcore.Core {
	return &bridgeCore{c.bridge, slices.Concat(c.fields, fields)}
}

func (c *bridgeCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(entry.Level) {
		return checked
	}
	return checked.AddCore(entry, c)
}

func (c *bridgeCore) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	l := level(entry.Level)
	if c.closing.Load() && l > slog.LevelDebug {
		return nil
	}
	switch {
	case slices.ContainsFunc(routine, func(end string) bool { return strings.HasSuffix(entry.Message, end) }):
		l = slog.LevelDebug
	case entry.Level > zapcore.ErrorLevel && !c.started.Load():
		l = slog.LevelDebug // Serve returns it
	}
	if !c.logger.Enabled(context.Background(), l) {
		return nil
	}
	values := zapcore.NewMapObjectEncoder()
	for _, f := range slices.Concat(c.fields, fields) {
		if !slices.Contains(tooLong, f.Key) {
			f.AddTo(values)
		}
	}
	r := slog.NewRecord(entry.Time, l, "etcd: "+entry.Message, 0)
	for _, key := range slices.Sorted(maps.Keys(values.Fields)) {
		r.AddAttrs(slog.Any(key, values.Fields[key]))
	}
	select {
	case c.lines <- r:
	default:
		c.dropped.Add(1)
	}
	return nil
}

func (c *bridgeCore) Sync() error { return nil }
