package keygatetest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"keygate/keygatetest/etcdtest"
	"keygate/statestore/embedded"
)

// childArgument is the first argument of a test binary that is to be the etcd
// child of a server; the data directory follows.
const childArgument = "keygatetest-etcd"

// Reexec does not return if this process is to be an etcd, for
// [Options].Child or etcdtest.StartProcess, and does nothing otherwise. It is
// the first thing that a TestMain does:
//
//	func TestMain(m *testing.M) { keygatetest.Reexec(); os.Exit(m.Run()) }
func Reexec() {
	etcdtest.Reexec()
	if len(os.Args) != 3 || os.Args[1] != childArgument {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	// What keygate etcd does under a supervisor.
	logger := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	err := embedded.Serve(ctx, embedded.Config{DataDir: os.Args[2], Logger: logger}, nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(embedded.ExitCode(err))
}

func newChild(t testing.TB, dataDir string, logger *slog.Logger) *embedded.Child {
	t.Helper()
	c, err := embedded.NewChild(embedded.ChildConfig{DataDir: dataDir, Args: []string{childArgument, dataDir}, Logger: logger})
	if err != nil {
		t.Fatalf("make the etcd child: %v", err)
	}
	return c
}
