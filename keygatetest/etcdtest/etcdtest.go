// Package etcdtest gives tests a real etcd: in the test's process, as a child
// that can be killed, frozen and given a slow or broken disk, as a cluster of
// such children, over TLS with users and passwords, and behind a proxy that
// loses, delays and damages what passes.
//
// All of it ends with the test that started it, and an error ends the test.
package etcdtest

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"keygate/statestore/embedded"
)

// startTimeout bounds the start of one etcd, on a machine that is busy with
// other tests.
const startTimeout = 30 * time.Second

// Etcd is a single member in the process of the test.
type Etcd struct {
	dataDir  string
	endpoint string
}

// Start runs an etcd in this process, in a new directory, until the test ends.
func Start(t testing.TB) *Etcd {
	t.Helper()
	e := &Etcd{dataDir: DataDir(t)}
	var err error
	if e.endpoint, err = embedded.Endpoint(e.dataDir); err != nil {
		t.Fatalf("endpoint of test etcd: %v", err)
	}
	// t.Context ends before cleanups run; the clients of a test, closed in
	// cleanups registered later than this one, go first.
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- embedded.Serve(ctx, embedded.Config{DataDir: e.dataDir, Logger: testLogger()}, func() { close(ready) })
	}()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		t.Fatalf("start test etcd: %v", err)
	case <-time.After(startTimeout):
		cancel()
		t.Fatalf("test etcd is not ready after %v", startTimeout)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("test etcd ended with %v, want nil", err)
		}
	})
	return e
}

// Endpoint of the member, "unix:///…".
func (e *Etcd) Endpoint() string { return e.endpoint }

// DataDir of the member.
func (e *Etcd) DataDir() string { return e.dataDir }

// Client returns a new client of the member, closed when the test ends.
func (e *Etcd) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	return dial(t, clientv3.Config{Endpoints: []string{e.endpoint}})
}

// DataDir returns a new data directory, removed when the test ends. Its path
// is short, unlike t.TempDir's, so that a socket in it has a valid address.
func DataDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatalf("make data directory: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func dial(t testing.TB, cfg clientv3.Config) *clientv3.Client {
	t.Helper()
	cfg.DialTimeout = startTimeout
	cfg.Logger = zap.NewNop()
	c, err := clientv3.New(cfg)
	if err != nil {
		t.Fatalf("dial %s: %v", strings.Join(cfg.Endpoints, ","), err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func testLogger() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}
