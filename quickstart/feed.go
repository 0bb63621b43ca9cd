package quickstart

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"keygate/authz"
	"keygate/statestore"
	"keygate/statestore/keyspace"
)

const (
	// decisionRate and decisionBurst bound the lines a second: a person reads
	// fewer, and a load test is not to be slowed by its terminal.
	decisionRate, decisionBurst = 100, 200
	// feedQueue is how many lines wait for a slow terminal.
	feedQueue = 1024
)

// Feed writes one line for each decision and each status change, and never
// makes who tells it wait: what is too much is left out, and counted.
type Feed struct {
	w       io.Writer
	space   keyspace.Space
	org     authz.Organization
	names   map[authz.AppID]string
	colour  bool
	limit   *rate.Limiter
	lines   chan feedLine
	leftOut atomic.Int64
}

// feedLine is either a decision or, with a Key, a change.
type feedLine struct {
	at       time.Time
	decision authz.Decision
	took     time.Duration
	change   statestore.Change
}

// NewFeed returns a feed of w's world that writes to out, in colour if colour.
func NewFeed(out io.Writer, w *World, colour bool) *Feed {
	return newFeed(out, w.settings.Space, w.settings.Organization, w.imported.Names, colour)
}

func newFeed(out io.Writer, space keyspace.Space, org authz.Organization, names map[authz.AppID]string, colour bool) *Feed {
	return &Feed{
		w: out, space: space, org: org, names: names, colour: colour,
		limit: rate.NewLimiter(decisionRate, decisionBurst), lines: make(chan feedLine, feedQueue),
	}
}

// Observer tells the feed. It may be used from any goroutine.
func (f *Feed) Observer() Observer {
	return Observer{
		OnDecision: func(d authz.Decision, took time.Duration) {
			if !f.limit.Allow() {
				f.leftOut.Add(1)
				return
			}
			f.offer(feedLine{at: time.Now(), decision: d, took: took})
		},
		OnChange: func(c statestore.Change) {
			// Details change with every import; what decides is a flag.
			if c.Path.Field.Flag() {
				f.offer(feedLine{at: time.Now(), change: c})
			}
		},
	}
}

func (f *Feed) offer(line feedLine) {
	select {
	case f.lines <- line:
	default:
		f.leftOut.Add(1)
	}
}

// Run writes lines until ctx ends, and then those that still wait. The error is
// the writer's.
func (f *Feed) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for ctx.Err() == nil {
		var err error
		select {
		case line := <-f.lines:
			err = f.write(line)
		case <-tick.C:
			err = f.writeLeftOut()
		case <-ctx.Done():
		}
		if err != nil {
			return err
		}
	}
	for range len(f.lines) {
		if err := f.write(<-f.lines); err != nil {
			return err
		}
	}
	return f.writeLeftOut()
}

func (f *Feed) writeLeftOut() error {
	n := f.leftOut.Swap(0)
	if n == 0 {
		return nil
	}
	_, err := fmt.Fprintf(f.w, "%s  (%d more lines left out)\n", time.Now().Format(feedTime), n)
	return err
}

// feedTime is the time of day, in milliseconds.
const feedTime = "15:04:05.000"

// ANSI colours of a line's first word.
const (
	green  = "\x1b[32m"
	red    = "\x1b[31m"
	cyan   = "\x1b[36m"
	normal = "\x1b[0m"
)

func (f *Feed) write(line feedLine) error {
	word, colour, rest := "denied", red, ""
	switch {
	case line.change.Key != "":
		word, colour, rest = "status", cyan, f.changed(line.change)
	case line.decision.Allowed():
		word, colour = "allowed", green
		fallthrough
	default:
		rest = f.decided(line.decision, line.took)
	}
	if f.colour {
		word = colour + word + normal + strings.Repeat(" ", 7-len(word))
	}
	_, err := fmt.Fprintf(f.w, "%s  %-7s  %s\n", line.at.Format(feedTime), word, rest)
	return err
}

func (f *Feed) decided(d authz.Decision, took time.Duration) string {
	reason, product, app, key := d.Reason.String(), shown(string(d.Product)), "", ""
	if d.Allowed() {
		reason = "" // the first word has said it
	}
	if product == "" {
		product = "-"
	}
	if d.App != "" {
		name, ok := f.names[d.App]
		if !ok {
			name = shortened(string(d.App))
		}
		app = "app " + shown(name)
	}
	if d.KeyID != (authz.KeyID{}) {
		key = "key " + d.KeyID.String()[:shortLength]
	}
	line := fmt.Sprintf("%-18s  %-15s  %-18s  %-12s  %7s", reason, product, app, key, readable(took))
	if d.Problem != "" {
		line += "  " + shown(d.Problem)
	}
	return line
}

func (f *Feed) changed(c statestore.Change) string {
	value := shown(c.Value)
	if c.Deleted {
		value = "(deleted)"
	} else if value == "" {
		value = `""`
	}
	return fmt.Sprintf("%-18s  %s  revision %d", value, f.path(c), c.Revision)
}

// path is the changed key below the organization's folder, a key's id in it
// shortened.
func (f *Feed) path(c statestore.Change) string {
	folder := f.space.Folder(keyspace.AppRecord(f.org, "x"))
	key := strings.TrimPrefix(c.Key, strings.TrimSuffix(folder, "apps/x/"))
	if c.Path.Record.Kind == keyspace.KindKey {
		id := c.Path.Record.Key.String()
		key = strings.Replace(key, id, shortened(id), 1)
	}
	return shown(key)
}

// shortLength of an id is enough for a person to tell a few apart.
const shortLength = 8

func shortened(id string) string {
	if len(id) <= shortLength {
		return id
	}
	return id[:shortLength] + "…"
}

// shown escapes what is not to be written to a terminal.
func shown(s string) string {
	if q := strconv.Quote(s); q[1:len(q)-1] != s {
		return q
	}
	return s
}

// readable is a duration with the digits that matter.
func readable(d time.Duration) string {
	if d < time.Millisecond {
		return fmt.Sprintf("%d µs", d.Microseconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}
