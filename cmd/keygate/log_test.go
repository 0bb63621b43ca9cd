package main

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// A standard error that nobody reads stops nobody who logs; what was left out
// is said once it is read again.
func TestServerLogNeverBlocks(t *testing.T) {
	r, w := io.Pipe()
	out := newServerLog(w)
	stop := out.start()
	log := newLogger(out, "json", slog.LevelInfo)
	log.Info("line that is written, and stands")
	for len(out.lines) > 0 { // else what is left out could be counted, and forgotten, before
		time.Sleep(time.Millisecond)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 3 * logQueue {
			log.Info(fmt.Sprint("line ", i))
		}
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("logging waits for the reader")
	}
	if n := out.leftOut.Load(); n < logQueue {
		t.Errorf("%d lines left out, want at least %d", n, logQueue)
	}
	text := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(r) // nil at the end of the pipe
		text <- string(b)
	}()
	stop()
	w.Close()
	got := <-text
	if !strings.Contains(got, "log lines left out") || strings.Count(got, `"msg":"line `) < logQueue {
		t.Errorf("got %d lines, said what was left out: %v; want %d at least, and true",
			strings.Count(got, "\n"), strings.Contains(got, "log lines left out"), logQueue)
	}
}
