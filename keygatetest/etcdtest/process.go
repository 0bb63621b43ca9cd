package etcdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"keygate/statestore/embedded"
)

// processVariable holds the data directory in the environment of a test binary
// that is to be an etcd.
const processVariable = "ETCDTEST_DATA_DIR"

// Main runs the tests of a package that uses [StartProcess]:
//
//	func TestMain(m *testing.M) { etcdtest.Main(m) }
func Main(m *testing.M) {
	Reexec()
	os.Exit(m.Run())
}

// Reexec does not return if this process is to be an etcd, and does nothing
// otherwise. It is for a TestMain that has more to do than [Main].
func Reexec() {
	dir := os.Getenv(processVariable)
	if dir == "" {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	err := embedded.Serve(ctx, embedded.Config{DataDir: dir, Logger: testLogger()}, nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(embedded.ExitCode(err))
}

// Process is a single member in a process of its own: this test binary, run
// again. Its methods are for one goroutine, the test's.
type Process struct {
	t        testing.TB
	dataDir  string
	endpoint string
	cmd      *exec.Cmd
	exited   chan struct{} // closed when cmd has ended
}

// StartProcess runs an etcd as a child, in a process group of its own and in a
// new directory, until the test ends or this process does. The package's
// TestMain must call [Main] or [Reexec].
func StartProcess(t testing.TB) *Process {
	t.Helper()
	p := &Process{t: t, dataDir: DataDir(t)}
	var err error
	if p.endpoint, err = embedded.Endpoint(p.dataDir); err != nil {
		t.Fatalf("endpoint of test etcd: %v", err)
	}
	t.Cleanup(func() {
		if p.cmd != nil {
			p.Kill()
		}
	})
	p.Restart()
	return p
}

// Endpoint of the member, "unix:///…"; it stays the same over restarts.
func (p *Process) Endpoint() string { return p.endpoint }

// DataDir of the member.
func (p *Process) DataDir() string { return p.dataDir }

// Pid of the process that runs now, or ran last.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Client returns a new client of the member, closed when the test ends.
func (p *Process) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	return dial(t, clientv3.Config{Endpoints: []string{p.endpoint}})
}

// Kill ends the process with SIGKILL and returns when it has ended.
func (p *Process) Kill() {
	p.signal(syscall.SIGKILL)
	<-p.exited
}

// Terminate ends the process with SIGTERM and returns when it has ended.
func (p *Process) Terminate() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(startTimeout):
		p.t.Fatalf("test etcd is still there %v after SIGTERM", startTimeout)
	}
}

// Stop freezes the process: its connections stay open and nothing answers.
func (p *Process) Stop() {
	p.t.Helper()
	p.signal(syscall.SIGSTOP)
	// The signal reaches one thread after the other; until the last has stopped
	// there may be an answer.
	for end := time.Now().Add(startTimeout); !p.stopped(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			p.t.Fatalf("test etcd has not stopped %v after SIGSTOP", startTimeout)
		}
	}
}

// stopped tells whether each thread of the process is.
func (p *Process) stopped() bool {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.Pid()))
	if err != nil || len(stats) == 0 {
		return false
	}
	for _, name := range stats {
		stat, err := os.ReadFile(name)
		// The state follows the command's name, which stands in brackets.
		if i := bytes.LastIndexByte(stat, ')'); err != nil || i < 0 || !bytes.HasPrefix(stat[i:], []byte(") T")) {
			return false
		}
	}
	return true
}

// Cont ends a Stop.
func (p *Process) Cont() { p.signal(syscall.SIGCONT) }

func (p *Process) signal(s syscall.Signal) {
	// The group is the process alone; it may have ended already.
	if err := syscall.Kill(-p.cmd.Process.Pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
		p.t.Errorf("send %v to test etcd: %v", s, err)
	}
}

// Restart kills the process if there is one, starts it again on the same
// directory and endpoint, and returns when it answers.
func (p *Process) Restart() {
	p.t.Helper()
	p.StartAgain()
	p.WaitReady()
}

// StartAgain is Restart without waiting for an answer.
func (p *Process) StartAgain() {
	p.t.Helper()
	if p.cmd != nil {
		p.Kill()
	}
	exe, err := os.Executable()
	if err != nil {
		p.t.Fatalf("find test binary: %v", err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), processVariable+"="+p.dataDir)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	started, exited := make(chan error, 1), make(chan struct{})
	go func() {
		// The signal comes when the thread that forked ends, not the process:
		// this one stays as long as the child does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			// Ended by a signal as a rule: the tests look at what etcd answers.
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		p.t.Fatalf("start test etcd: %v", err)
	}
	p.cmd, p.exited = cmd, exited
}

// WaitReady returns when the member answers a linearizable read.
func (p *Process) WaitReady() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	exited := p.exited
	go func() {
		select {
		case <-exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	if err := waitReady(ctx, p.dataDir, p.endpoint); err != nil {
		select {
		case <-exited:
			p.t.Fatal("test etcd ended before it was ready; its last words are above")
		default:
			p.t.Fatalf("test etcd is not ready: %v", err)
		}
	}
}

// waitReady asks until there is an answer. The client is made once the socket
// is there: a client that was refused waits a second before it tries again.
func waitReady(ctx context.Context, dataDir, endpoint string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !embedded.Running(ctx, dataDir) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Get(ctx, "ready", clientv3.WithCountOnly())
	return err
}
