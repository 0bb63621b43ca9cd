package embedded_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"keygate/keygatetest/etcdtest"
	"keygate/statestore/embedded"
)

const patience = 20 * time.Second

// The test binary is also what a Child runs ("etcd"), a process that has a
// Child ("parent"), a child that does not stop when told to ("stubborn"), and a
// process that saves a snapshot ("save") or restores it ("restore").
func TestMain(m *testing.M) {
	etcdtest.Reexec()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "etcd":
			os.Exit(etcdMain(os.Args[2:]))
		case "parent":
			os.Exit(parentMain(os.Args[2]))
		case "save":
			os.Exit(saveMain(os.Args[2], os.Args[3]))
		case "restore":
			os.Exit(restoreMain(os.Args[2], os.Args[3]))
		case "stubborn":
			signal.Ignore(syscall.SIGTERM)
			fmt.Fprintln(os.Stderr, "stubborn")
			time.Sleep(time.Minute)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

func etcdMain(args []string) int {
	flags := flag.NewFlagSet("etcd", flag.ExitOnError)
	dataDir := flags.String("data-dir", "", "")
	quota := flags.Int64("etcd-quota", 0, "")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	var handler slog.Handler = slog.NewTextHandler(os.Stderr, nil)
	if embedded.Supervised() {
		handler = slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	err := embedded.Serve(ctx, embedded.Config{DataDir: *dataDir, QuotaBytes: *quota, Logger: slog.New(handler)}, nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return embedded.ExitCode(err)
}

// parentMain prints the child's process id and waits to be killed.
func parentMain(dataDir string) int {
	child, err := embedded.NewChild(embedded.ChildConfig{DataDir: dataDir})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go func() {
		<-child.Ready()
		fmt.Println(child.Pid())
	}()
	if err := child.Run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return 1
}

// serve runs Serve until the returned function stops it.
func serve(t *testing.T, cfg embedded.Config) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- embedded.Serve(ctx, cfg, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		t.Fatalf("Serve: got %v, want it ready", err)
	case <-time.After(patience):
		cancel()
		t.Fatalf("Serve: not ready after %v", patience)
	}
	stopped := false
	stop = func() {
		t.Helper()
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve after its context ended: got %v, want nil", err)
			}
		case <-time.After(patience):
			t.Fatalf("Serve still runs %v after its context ended", patience)
		}
	}
	t.Cleanup(stop)
	return stop
}

// etcdProcess runs the command to its end, which must come by itself.
func etcdProcess(t *testing.T, dataDir string) (output string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, os.Args[0], "etcd", "--data-dir", dataDir).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("run etcd: %v", err)
	}
	if ctx.Err() != nil {
		t.Fatalf("etcd still runs after %v; it said:\n%s", patience, out)
	}
	if exit == nil {
		return string(out), 0
	}
	return string(out), exit.ExitCode()
}

// dial returns a client that tries to connect as often as a test likes.
func dial(t *testing.T, dataDir string) *clientv3.Client {
	t.Helper()
	endpoint, err := embedded.Endpoint(dataDir)
	if err != nil {
		t.Fatal(err)
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{endpoint},
		Logger:    zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1, MaxDelay: 20 * time.Millisecond},
		})},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func mustPut(t *testing.T, c *clientv3.Client, key, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Put(ctx, key, value); err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
}

func mustGet(t *testing.T, c *clientv3.Client, key, want string) *clientv3.GetResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := c.Get(ctx, key)
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if len(r.Kvs) != 1 || string(r.Kvs[0].Value) != want {
		t.Fatalf("get %s: got %v, want %q", key, r.Kvs, want)
	}
	return r
}

// eventually polls until the condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !condition() {
		select {
		case <-deadline:
			t.Fatalf("%s: not so after %v", what, patience)
		case <-tick.C:
		}
	}
}

// mustBeClean reports what a stopped member must not leave behind.
func mustBeClean(t *testing.T, dataDir string) {
	t.Helper()
	for _, name := range []string{"etcd.sock", "peer.sock"} {
		if _, err := os.Lstat(filepath.Join(dataDir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s after a stop: got %v, want it gone", name, err)
		}
	}
}

// logBuffer collects a logger's output.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.FieldsFunc(l.b.String(), func(r rune) bool { return r == '\n' })
}

func (l *logBuffer) has(s string) bool {
	for _, line := range l.lines() {
		if strings.Contains(line, s) {
			return true
		}
	}
	return false
}

func (l *logBuffer) logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: level}))
}
