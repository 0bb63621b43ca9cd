package server

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"keygate/authz"
	"keygate/statestore"
	"keygate/statestore/keyspace"
)

// stuck is a log handler that writes nothing until it is let go.
type stuck struct {
	letGo chan struct{}

	mu      sync.Mutex
	lines   int
	leftOut int64
}

func (h *stuck) Enabled(context.Context, slog.Level) bool { return true }
func (h *stuck) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h *stuck) WithGroup(string) slog.Handler            { return h }

func (h *stuck) Handle(_ context.Context, r slog.Record) error {
	<-h.letGo
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.Level == slog.LevelInfo {
		h.lines++
		return nil
	}
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "lines" {
			h.leftOut += a.Value.Int64()
		}
		return true
	})
	return nil
}

// A flood before a log that is stuck makes nobody wait, and every line is either
// written or counted as left out: by the rate, and by the queue alone.
func TestEventLogNeverBlocks(t *testing.T) {
	for name, limit := range map[string]*rate.Limiter{"limited": nil, "unlimited": rate.NewLimiter(rate.Inf, 0)} {
		t.Run(name, func(t *testing.T) {
			h := &stuck{letGo: make(chan struct{})}
			l := newEventLog("all", slog.New(h))
			most := eventBurst
			if limit != nil {
				l.limit, most = limit, eventQueue+1 // and the line in hand
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- l.run(ctx) }()

			const perWriter, writers = 20_000, 4
			path := keyspace.Path{Record: keyspace.AppRecord("o", "a"), Field: keyspace.FieldStatus}
			began := time.Now()
			var wg sync.WaitGroup
			for range writers {
				wg.Go(func() {
					for i := range perWriter {
						if i%2 == 0 {
							l.decision(authz.Decision{Reason: authz.KeyRevoked}, time.Microsecond)
						} else {
							l.change(statestore.Change{Path: path, Key: "/k", Value: "revoked"})
						}
					}
				})
			}
			finished := make(chan struct{})
			go func() { wg.Wait(); close(finished) }()
			select {
			case <-finished:
			case <-time.After(10 * time.Second):
				t.Fatal("the flood waits for the log")
			}
			if limit == nil {
				most += int(time.Since(began).Seconds()*eventRate) + 1
			}
			if n := len(l.lines); n > eventQueue {
				t.Errorf("%d lines wait, want %d at most", n, eventQueue)
			}
			close(h.letGo)
			cancel()
			if err := <-done; err != nil {
				t.Errorf("run: got %v, want nil", err)
			}
			if total := int64(h.lines) + h.leftOut; total != perWriter*writers {
				t.Errorf("got %d lines written and %d left out, want %d together", h.lines, h.leftOut, perWriter*writers)
			}
			if h.lines > most || h.lines == 0 {
				t.Errorf("got %d lines, want 1 to %d", h.lines, most)
			}
		})
	}
}

// Only flags are changes to tell of: details change with every import.
func TestEventLogTellsOfFlags(t *testing.T) {
	for field, want := range map[keyspace.Field]int{keyspace.FieldStatus: 1, keyspace.FieldProduct: 1, keyspace.FieldDetails: 0, keyspace.FieldOther: 0} {
		l := newEventLog("none", slog.New(slog.DiscardHandler))
		l.change(statestore.Change{Path: keyspace.Path{Field: field}, Key: "/k"})
		if got := len(l.lines); got != want {
			t.Errorf("field %d: got %d lines, want %d", field, got, want)
		}
	}
}

func TestEventLogOfDecisions(t *testing.T) {
	for _, test := range []struct {
		which           string
		allowed, denied int
	}{{"none", 0, 0}, {"denied", 0, 1}, {"all", 1, 1}, {"", 0, 0}} {
		for reason, want := range map[authz.Reason]int{authz.Allowed: test.allowed, authz.KeyRevoked: test.denied, authz.Stale: test.denied} {
			l := newEventLog(test.which, slog.New(slog.DiscardHandler))
			l.decision(authz.Decision{Reason: reason}, 0)
			if got := len(l.lines); got != want {
				t.Errorf("%q, %v: got %d lines, want %d", test.which, reason, got, want)
			}
		}
	}
}

// A flood of peers with bad certificates takes bounded memory and one line a
// minute each.
func TestHandshakesOncePerPeer(t *testing.T) {
	c := &loggedHandshakes{last: map[string]time.Time{}}
	if !c.first("192.0.2.1") || c.first("192.0.2.1") || !c.first("192.0.2.2") {
		t.Error("got another line within the minute, or none at first")
	}
	c.last["192.0.2.1"] = time.Now().Add(-61 * time.Second)
	if !c.first("192.0.2.1") {
		t.Error("got no line after a minute")
	}
	for i := range 10 * maxPeers {
		c.first(fmt.Sprint(i))
	}
	if n := len(c.last); n > maxPeers {
		t.Errorf("%d peers are remembered, want %d at most", n, maxPeers)
	}
}
