package server

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"keygate/authz"
	"keygate/statestore"
)

const (
	// eventRate and eventBurst bound the lines a second; what is over is
	// counted.
	eventRate, eventBurst = 100, 200
	// eventQueue is how many lines wait for a slow disk or terminal.
	eventQueue = 512
)

// eventLog writes a line for a decision or a status change, without ever
// making a check or the watcher wait.
type eventLog struct {
	which   string // none, denied or all
	log     *slog.Logger
	limit   *rate.Limiter
	lines   chan eventLine
	leftOut atomic.Int64
}

// eventLine is either a decision or, with a Key, a change.
type eventLine struct {
	decision authz.Decision
	took     time.Duration
	change   statestore.Change
}

func newEventLog(which string, log *slog.Logger) *eventLog {
	return &eventLog{which: which, log: log, limit: rate.NewLimiter(eventRate, eventBurst), lines: make(chan eventLine, eventQueue)}
}

func (l *eventLog) decision(d authz.Decision, took time.Duration) {
	if l.which == "all" || l.which == "denied" && !d.Allowed() {
		l.offer(eventLine{decision: d, took: took})
	}
}

// change takes the changes of flags. Details change with every import.
func (l *eventLog) change(c statestore.Change) {
	if c.Path.Field.Flag() {
		l.offer(eventLine{change: c})
	}
}

func (l *eventLog) offer(line eventLine) {
	if !l.limit.Allow() {
		l.leftOut.Add(1)
		return
	}
	select {
	case l.lines <- line:
	default:
		l.leftOut.Add(1)
	}
}

// run writes lines until ctx ends, and then those that still wait.
func (l *eventLog) run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case line := <-l.lines:
			l.write(line)
		case <-tick.C:
			l.writeLeftOut()
		case <-ctx.Done():
		}
	}
	for range len(l.lines) {
		l.write(<-l.lines)
	}
	l.writeLeftOut()
	return nil
}

func (l *eventLog) writeLeftOut() {
	if n := l.leftOut.Swap(0); n > 0 {
		l.log.Warn("decisions and changes not logged, too many", "lines", n)
	}
}

func (l *eventLog) write(line eventLine) {
	if c := line.change; c.Key != "" {
		value := c.Value
		if c.Deleted {
			value = "(deleted)"
		}
		l.log.Info("status", "etcd_key", c.Key, "value", value, "revision", c.Revision)
		return
	}
	d := line.decision
	word := "denied"
	if d.Allowed() {
		word = "allowed"
	}
	attrs := []any{"reason", d.Reason.String(), "organization", string(d.Organization)}
	for _, a := range []struct{ name, value string }{
		{"product", string(d.Product)}, {"app", string(d.App)}, {"developer", string(d.Developer)}, {"problem", d.Problem},
	} {
		if a.value != "" {
			attrs = append(attrs, a.name, a.value)
		}
	}
	if d.KeyID != (authz.KeyID{}) {
		attrs = append(attrs, "key_id", d.KeyID.String())
	}
	l.log.Info(word, append(attrs, "revision", d.Revision, "took", line.took)...)
}
