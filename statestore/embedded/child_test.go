package embedded_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keygate/keygatetest/etcdtest"
	"keygate/statestore/embedded"
)

// run runs the child until the returned function stops it.
func run(t *testing.T, cfg embedded.ChildConfig) (c *embedded.Child, stop func()) {
	t.Helper()
	c, err := embedded.NewChild(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stopped := false
	stop = func() {
		t.Helper()
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run after its context ended: got %v, want nil", err)
		}
		if got := c.Pid(); got != 0 {
			t.Errorf("Pid after the end: got %d, want 0", got)
		}
	}
	t.Cleanup(stop)
	return c, stop
}

func mustBeReady(t *testing.T, c *embedded.Child) {
	t.Helper()
	select {
	case <-c.Ready():
	case <-time.After(patience):
		t.Fatalf("child is not ready after %v", patience)
	}
}

// gone is true of a process that has ended, also before somebody has asked how.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(state, "Z")
}

func TestChild(t *testing.T) {
	var log logBuffer
	dir := filepath.Join(etcdtest.DataDir(t), "d")
	c, stop := run(t, embedded.ChildConfig{DataDir: dir, QuotaBytes: 1 << 30, Logger: log.logger(slog.LevelInfo)})
	mustBeReady(t, c)
	pid := c.Pid()
	if group, err := syscall.Getpgid(pid); err != nil || group != pid {
		t.Errorf("process group of the child: got %d, %v, want its own, %d", group, err, pid)
	}
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	want := strings.Join([]string{"etcd", "--data-dir", dir, "--etcd-quota", "1073741824", ""}, "\x00")
	if err != nil || !strings.HasSuffix(string(arguments), want) {
		t.Errorf("arguments of the child: got %q, %v, want %q at the end", arguments, err, want)
	}
	mustPut(t, dial(t, dir), "k", "v")
	if want, err := embedded.Endpoint(dir); c.Endpoint() != want {
		t.Errorf("Endpoint: got %q, want %q, %v", c.Endpoint(), want, err)
	}

	began := time.Now()
	stop()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("stop: took %v, want less than 3 s", took)
	}
	if !gone(pid) {
		t.Errorf("process %d is still there after the stop", pid)
	}
	mustBeClean(t, dir)
	for _, line := range log.lines() {
		// A busy disk is no fault of the start.
		if strings.Contains(line, "level=INFO") || strings.Contains(line, "took too long") || strings.Contains(line, "slow fdatasync") {
			continue
		}
		t.Errorf("log of a normal start and stop: got %q", line)
	}
}

// The lines that a child logs keep their level and attributes.
func TestChildLog(t *testing.T) {
	var log logBuffer
	dir := etcdtest.DataDir(t)
	c, stop := run(t, embedded.ChildConfig{DataDir: dir, Logger: log.logger(slog.LevelDebug)})
	mustBeReady(t, c)
	stop()
	for _, want := range []string{
		`level=DEBUG msg="etcd: starting an etcd server"`,
		`quota-backend-bytes=2147483648`,
		`level=INFO msg="etcd is serving" endpoint=unix://` + dir,
	} {
		if !log.has(want) {
			t.Errorf("log: got no line with %q", want)
		}
	}
}

// Promise 5: an acknowledged write survives kill -9 at any instant. The child
// comes back by itself, on the same endpoint.
func TestChildKilledUnderWrites(t *testing.T) {
	const rounds, writes = 10, 30
	var log logBuffer
	dir := etcdtest.DataDir(t)
	c, _ := run(t, embedded.ChildConfig{DataDir: dir, Logger: log.logger(slog.LevelWarn)})
	mustBeReady(t, c)
	client := dial(t, dir)

	var acknowledged atomic.Int64 // key n is acknowledged for every n below, in order
	writing, stopWriting := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for writing.Err() == nil {
			n := strconv.FormatInt(acknowledged.Load(), 10)
			ctx, cancel := context.WithTimeout(writing, time.Second)
			if _, err := client.Put(ctx, "k/"+n, n); err == nil {
				acknowledged.Add(1)
			}
			cancel()
		}
	}()
	defer func() { stopWriting(); <-done }()

	var worst time.Duration
	for range rounds {
		before := acknowledged.Load()
		eventually(t, "writes are acknowledged", func() bool { return acknowledged.Load() >= before+writes })
		began := time.Now()
		if err := syscall.Kill(c.Pid(), syscall.SIGKILL); err != nil {
			t.Fatalf("kill the child: %v", err)
		}
		at := acknowledged.Load()
		eventually(t, "a write is acknowledged after the kill", func() bool { return acknowledged.Load() > at+1 })
		worst = max(worst, time.Since(began))
	}
	stopWriting()
	<-done
	t.Logf("%d writes acknowledged in %d rounds, at worst back after %v", acknowledged.Load(), rounds, worst)
	for n := range acknowledged.Load() {
		key := strconv.FormatInt(n, 10)
		mustGet(t, client, "k/"+key, key)
	}
	if got := c.Restarts(); got < rounds {
		t.Errorf("Restarts: got %d, want %d at least", got, rounds)
	}
	if !log.has("etcd ended and is started again") || !log.has("signal: killed") {
		t.Errorf("log: got %q, want it to say that etcd was killed and is started again", log.lines())
	}
}

// etcd ends its process when the disk refuses a write. The log says so in a
// line, and the next process goes on with what was acknowledged.
func TestChildWhoseDiskFails(t *testing.T) {
	var log logBuffer
	dir := etcdtest.DataDir(t)
	c, _ := run(t, embedded.ChildConfig{DataDir: dir, Logger: log.logger(slog.LevelWarn)})
	mustBeReady(t, c)
	client := dial(t, dir)
	mustPut(t, client, "k", "v")

	// From now on every write to a file fails, in this process alone.
	if err := unix.Prlimit(c.Pid(), unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 1, Max: 1}, nil); err != nil {
		t.Fatalf("limit the child's files: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := client.Put(ctx, "k", "w"); err == nil {
		t.Error("put without a disk: got it acknowledged")
	}
	eventually(t, "started again", func() bool { return c.Restarts() > 0 })
	mustGet(t, client, "k", "v")
	if want := `error="etcd: exit status 1: etcd: failed to save Raft hard state and entries`; !log.has(want) {
		t.Errorf("log: got %q, want a line with %q", log.lines(), want)
	}
	if log.has("goroutine ") {
		t.Errorf("log: got a stack trace in %q", log.lines())
	}
}

// A permanent error at the first start is the caller's to tell.
func TestChildPermanentError(t *testing.T) {
	p := etcdtest.StartProcess(t)
	open := etcdtest.DataDir(t)
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		cfg  embedded.ChildConfig
		want string
	}{
		{"in use", embedded.ChildConfig{DataDir: p.DataDir()}, fmt.Sprintf("etcd: data directory %s is in use by process %d", p.DataDir(), p.Pid())},
		{"open directory", embedded.ChildConfig{DataDir: open}, "chmod 700 " + open},
		{"no binary", embedded.ChildConfig{DataDir: etcdtest.DataDir(t), Path: "/nonexistent"}, "start etcd: fork/exec /nonexistent: no such file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := embedded.NewChild(test.cfg)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if err := c.Run(ctx); !contains(err, test.want) {
				t.Errorf("Run: got %v, want an error with %q", err, test.want)
			}
			select {
			case <-c.Ready():
				t.Error("the child counts as ready, want not: somebody else answers there")
			default:
			}
		})
	}
	mustPut(t, p.Client(t), "k", "v")

	if _, err := embedded.NewChild(embedded.ChildConfig{DataDir: "/" + strings.Repeat("d", 97)}); !contains(err, "108 bytes") {
		t.Errorf("NewChild with a long path: got %v, want an error with the length", err)
	}
}

// Whatever ends otherwise is tried again, and its last words are in the log.
func TestChildTriesAgain(t *testing.T) {
	var log logBuffer
	c, stop := run(t, embedded.ChildConfig{
		DataDir: etcdtest.DataDir(t),
		Path:    "/bin/sh", Args: []string{"-c", "echo first; echo the disk is full; exit 1"},
		Logger: log.logger(slog.LevelWarn),
	})
	eventually(t, "started three times", func() bool { return c.Restarts() >= 2 })
	stop()
	if want := `error="etcd: exit status 1: first | the disk is full" in=200ms`; !log.has(want) {
		t.Errorf("log: got %q, want a line with %q", log.lines(), want)
	}
	if want := `in=400ms`; !log.has(want) {
		t.Errorf("log: got %q, want a line with %q", log.lines(), want)
	}
}

// Of a crash the cause is kept, not the end of the stack trace.
func TestChildCrash(t *testing.T) {
	var log logBuffer
	c, stop := run(t, embedded.ChildConfig{
		DataDir: etcdtest.DataDir(t),
		Path:    "/bin/sh", Args: []string{"-c", "printf 'panic: page 7\n\ngoroutine 1 [running]:\nmain.main()\n'; exit 2"},
		Logger: log.logger(slog.LevelError),
	})
	eventually(t, "started again", func() bool { return c.Restarts() >= 1 })
	stop()
	if want := `error="etcd: exit status 2: panic: page 7"`; !log.has(want) {
		t.Errorf("log: got %q, want a line with %q", log.lines(), want)
	}
}

func TestChildThatDoesNotStop(t *testing.T) {
	t.Parallel() // it waits for 5 s
	var log logBuffer
	c, stop := run(t, embedded.ChildConfig{DataDir: etcdtest.DataDir(t), Args: []string{"stubborn"}, Logger: log.logger(slog.LevelWarn)})
	eventually(t, "the child ignores SIGTERM", func() bool { return log.has("stubborn") })
	pid := c.Pid()
	stop()
	if !gone(pid) {
		t.Errorf("process %d is still there after the stop", pid)
	}
	if !log.has("did not stop in time and is killed") {
		t.Errorf("log: got %q, want it to say that the child was killed", log.lines())
	}
}

// Somebody may switch on authentication with etcdctl; the child's parent then
// has to know a password, and the child is up all the same.
func TestChildWithAuthentication(t *testing.T) {
	dir := etcdtest.DataDir(t)
	c, stop := run(t, embedded.ChildConfig{DataDir: dir})
	mustBeReady(t, c)
	client := dial(t, dir)
	_, err := client.RoleAdd(t.Context(), "root")
	if err == nil {
		_, err = client.UserAdd(t.Context(), "root", "secret")
	}
	if err == nil {
		_, err = client.UserGrantRole(t.Context(), "root", "root")
	}
	if err == nil {
		_, err = client.AuthEnable(t.Context())
	}
	if err != nil {
		t.Fatalf("switch on authentication: %v", err)
	}
	stop()
	c, _ = run(t, embedded.ChildConfig{DataDir: dir})
	mustBeReady(t, c)
}

// A parent that is killed takes its child along, and the directory is free.
func TestChildOfKilledParent(t *testing.T) {
	dir := etcdtest.DataDir(t)
	parent := exec.Command(os.Args[0], "parent", dir)
	parent.Stderr = os.Stderr
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	pid, convErr := strconv.Atoi(strings.TrimSpace(line))
	if err := errors.Join(err, convErr); err != nil {
		t.Errorf("process id of the child: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() && pid > 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL) // the orphan that this test is about
		}
	})
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := parent.Wait(); err == nil {
		t.Error("the killed parent ended with status 0")
	}
	eventually(t, "the child is gone", func() bool { return gone(pid) })
	serve(t, embedded.Config{DataDir: dir})
}
