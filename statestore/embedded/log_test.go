//go:build !noembed

package embedded

import (
	"context"
	"errors"
	"log/slog"
	"syscall"
	"testing"
	"testing/synctest"

	"go.uber.org/zap"
)

// stuckHandler is a log that nobody reads until release is closed.
type stuckHandler struct {
	slog.Handler
	release chan struct{}
	records []slog.Record
}

func (h *stuckHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *stuckHandler) Handle(_ context.Context, r slog.Record) error {
	<-h.release
	h.records = append(h.records, r)
	return nil
}

// A read loop of etcd's that waits for its log is a watch that stands still.
func TestBridgeNeverBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &stuckHandler{release: make(chan struct{})}
		b := newBridge(slog.New(h))
		go b.run()
		lg := b.zap()
		const lines = 10 * bridgeLines
		for range lines {
			lg.Warn("slow", zap.Int("n", 1))
		}
		b.flush() // gives up after a second
		close(h.release)
		synctest.Wait()
		b.flush()

		var written, dropped int64
		for _, r := range h.records {
			written++
			r.Attrs(func(a slog.Attr) bool {
				if a.Key == "dropped_lines" {
					written--
					dropped += a.Value.Int64()
				}
				return true
			})
		}
		if written+dropped != lines || dropped == 0 {
			t.Errorf("lines written and dropped: got %d + %d, want %d in all", written, dropped, lines)
		}
	})
}

func TestBridgeLevels(t *testing.T) {
	h := &stuckHandler{release: make(chan struct{})}
	close(h.release)
	b := newBridge(slog.New(h))
	go b.run()
	lg := b.zap().With(zap.String("member", "m"))
	lg.Debug("debug")
	lg.Info("info")
	lg.Warn("warning", zap.String("stacktrace", "main.main()"))
	lg.Warn(routine[0])
	lg.Warn("8e9e05c52164694d cannot campaign at term 1 since there are still pending configuration changes to apply")
	lg.Error("error", zap.Error(errors.New("cause")))
	b.closing.Store(true)
	lg.Warn("late warning")
	lg.Error("late error")
	b.flush()

	var got []string
	for _, r := range h.records {
		s := r.Level.String() + " " + r.Message
		r.Attrs(func(a slog.Attr) bool { s += " " + a.String(); return true })
		got = append(got, s)
	}
	want := []string{
		"DEBUG etcd: info member=m",
		"WARN etcd: warning member=m",
		"DEBUG etcd: " + routine[0] + " member=m",
		"DEBUG etcd: 8e9e05c52164694d cannot campaign at term 1 since there are still pending configuration changes to apply member=m",
		"ERROR etcd: error error=cause member=m",
	}
	if len(got) != len(want) {
		t.Fatalf("lines: got %q, want %q", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("line %d: got %q, want %q", i, got[i], want[i])
		}
	}
}

// Before etcd has started, what would end the process is an error of the start,
// and its cause decides whether another start makes sense.
func TestBridgeFatal(t *testing.T) {
	b := newBridge(slog.New(slog.DiscardHandler))
	returned := make(chan bool, 1)
	go func() {
		defer func() { returned <- recover() != nil }()
		b.zap().Fatal("failed to create WAL", zap.Error(syscall.ENOSPC))
		panic("Fatal returned")
	}()
	err := <-b.fatal
	if got, want := err.Error(), "failed to create WAL: no space left on device"; got != want {
		t.Errorf("error: got %q, want %q", got, want)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("error: got %v, want it to wrap %v", err, syscall.ENOSPC)
	}
	if <-returned {
		t.Error("Fatal returned to its caller")
	}
}
