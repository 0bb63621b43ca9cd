package etcdtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"keygate/statestore/embedded"
)

// processVariable holds, in the environment of a test binary that is to be an
// etcd, what it is to be, as JSON.
const processVariable = "ETCDTEST_PROCESS"

// processConfig is what the process is told.
type processConfig struct {
	DataDir    string
	QuotaBytes int64
	Member     *memberConfig // nil: the embedded member, alone and on a socket
}

// Main runs the tests of a package that uses [StartProcess] or [StartCluster]:
//
//	func TestMain(m *testing.M) { etcdtest.Main(m) }
func Main(m *testing.M) {
	Reexec()
	os.Exit(m.Run())
}

// Reexec does not return if this process is to be an etcd, and does nothing
// otherwise. It is for a TestMain that has more to do than [Main].
func Reexec() {
	value := os.Getenv(processVariable)
	if value == "" {
		return
	}
	allowTracing()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var cfg processConfig
	err := json.Unmarshal([]byte(value), &cfg)
	switch {
	case err != nil:
		err = fmt.Errorf("read %s: %w", processVariable, err)
	case cfg.Member != nil:
		err = serveMember(ctx, cfg)
	default:
		err = embedded.Serve(ctx, embedded.Config{DataDir: cfg.DataDir, QuotaBytes: cfg.QuotaBytes, Logger: testLogger()}, nil)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		os.Exit(exitPortTaken)
	}
	os.Exit(embedded.ExitCode(err))
}

// ProcessOption changes how a process is started.
type ProcessOption func(*processOptions)

type processOptions struct {
	quotaBytes int64
	faults     []Fault
}

// Quota limits the size of the database, in bytes; beyond it etcd refuses every
// put. Without it, or with 0, the limit is etcd's default of 2 GiB.
func Quota(bytes int64) ProcessOption {
	return func(o *processOptions) { o.quotaBytes = bytes }
}

// Strace runs the process under strace, which injects the faults from its first
// system call on. They hold for every restart, until Options says otherwise.
// See [Process.Inject] for faults that begin and end while it runs.
func Strace(faults ...Fault) ProcessOption {
	return func(o *processOptions) { o.faults = faults }
}

// Process is a single member in a process of its own: this test binary, run
// again. Its methods are for one goroutine at a time, as a rule the test's.
type Process struct {
	t        testing.TB
	dataDir  string
	endpoint string
	member   *memberConfig // nil: not of a cluster
	options  processOptions
	cmd      *exec.Cmd
	exited   chan struct{} // closed when cmd has ended
}

// StartProcess runs an etcd as a child, in a process group of its own and in a
// new directory, until the test ends or this process does. The package's
// TestMain must call [Main] or [Reexec].
func StartProcess(t testing.TB, opts ...ProcessOption) *Process {
	t.Helper()
	p := &Process{t: t, dataDir: DataDir(t)}
	p.Options(opts...)
	var err error
	if p.endpoint, err = embedded.Endpoint(p.dataDir); err != nil {
		t.Fatalf("endpoint of test etcd: %v", err)
	}
	t.Cleanup(p.end)
	p.Restart()
	return p
}

// Options replaces all options. They hold from the next Restart or StartAgain.
func (p *Process) Options(opts ...ProcessOption) {
	p.options = processOptions{}
	for _, opt := range opts {
		opt(&p.options)
	}
}

// Endpoint of the member, "unix:///…", or "http://…" in a cluster; it stays the
// same over restarts.
func (p *Process) Endpoint() string { return p.endpoint }

// DataDir of the member.
func (p *Process) DataDir() string { return p.dataDir }

// Pid of the etcd that runs now, or ran last.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Client returns a new client of the member, closed when the test ends.
func (p *Process) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	return dial(t, clientv3.Config{Endpoints: []string{p.endpoint}})
}

// Kill ends the process with SIGKILL and returns when it has ended.
func (p *Process) Kill() {
	// The group: the process, and the strace that it may have.
	p.signal(-p.Pid(), syscall.SIGKILL)
	<-p.exited
}

// Terminate ends the process with SIGTERM and returns when it has ended.
func (p *Process) Terminate() {
	p.t.Helper()
	p.signal(p.Pid(), syscall.SIGTERM)
	p.Wait()
}

// Wait returns when the process has ended, by itself or by a signal.
func (p *Process) Wait() {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(startTimeout):
		p.t.Fatalf("test etcd is still there after %v", startTimeout)
	}
}

// Running tells whether the process has not ended. A stopped one runs.
func (p *Process) Running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Stop freezes the process: its connections stay open and nothing answers.
func (p *Process) Stop() {
	p.t.Helper()
	p.signal(p.Pid(), syscall.SIGSTOP)
	// The signal reaches one thread after the other; until the last has stopped
	// there may be an answer.
	for end := time.Now().Add(startTimeout); !p.stopped(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			p.t.Fatalf("test etcd has not stopped %v after SIGSTOP", startTimeout)
		}
	}
}

// stopped tells whether each thread of the process is: T, or t under strace.
func (p *Process) stopped() bool {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.Pid()))
	if err != nil || len(stats) == 0 {
		return false
	}
	for _, name := range stats {
		stat, err := os.ReadFile(name)
		// The state follows the command's name, which stands in brackets.
		i := bytes.LastIndexByte(stat, ')')
		if err != nil || i < 0 || !bytes.HasPrefix(bytes.ToUpper(stat[i:]), []byte(") T")) {
			return false
		}
	}
	return true
}

// Cont ends a Stop.
func (p *Process) Cont() { p.signal(p.Pid(), syscall.SIGCONT) }

// signal sends to a process, or to a group by its negative id, unless it has
// ended and its id may be somebody else's.
func (p *Process) signal(pid int, s syscall.Signal) {
	if !p.Running() {
		return
	}
	if err := syscall.Kill(pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
		p.t.Errorf("send %v to test etcd: %v", s, err)
	}
}

// end kills the process if one was ever started.
func (p *Process) end() {
	if p.cmd != nil {
		p.Kill()
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
	p.end()
	exe, err := os.Executable()
	if err != nil {
		p.t.Fatalf("find test binary: %v", err)
	}
	config, err := json.Marshal(processConfig{DataDir: p.dataDir, QuotaBytes: p.options.quotaBytes, Member: p.member})
	if err != nil {
		p.t.Fatalf("configure test etcd: %v", err)
	}
	cmd := exec.Command(exe)
	if len(p.options.faults) > 0 {
		// -D: strace is the grandchild, and our child becomes the etcd. The
		// filter keeps it from stopping at every other system call.
		cmd = exec.Command(strace(p.t), append(traceArguments(p.options.faults), "--seccomp-bpf", "-D", exe)...)
	}
	cmd.Env = append(os.Environ(), processVariable+"="+string(config))
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

// errExited: the process ended while it was waited for.
var errExited = errors.New("test etcd ended before it was ready; its last words are above")

// WaitReady returns when the member answers a linearizable read. In a cluster
// that takes a leader.
func (p *Process) WaitReady() {
	p.t.Helper()
	if err := p.waitReady(); err != nil {
		p.t.Fatal(err)
	}
}

func (p *Process) waitReady() error {
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
	err := waitReady(ctx, p.endpoint)
	switch {
	case err == nil:
		return nil
	case !p.Running():
		return errExited
	default:
		return fmt.Errorf("test etcd is not ready: %w", err)
	}
}

// waitReady asks until there is an answer. The client is made once somebody
// listens: a client that was refused waits a second before it tries again.
func waitReady(ctx context.Context, endpoint string) error {
	network, address, err := splitEndpoint(endpoint)
	if err != nil {
		return err
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !listening(ctx, network, address) {
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
	// A member that has just joined refuses until it knows a leader.
	for {
		_, err = c.Get(ctx, "ready", clientv3.WithCountOnly())
		if err == nil || ctx.Err() != nil {
			return err
		}
		<-tick.C
	}
}

func listening(ctx context.Context, network, address string) bool {
	d := net.Dialer{Timeout: time.Second}
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// splitEndpoint takes an endpoint as etcd's clients take it: unix:///…, http://,
// https:// or host:port.
func splitEndpoint(endpoint string) (network, address string, err error) {
	if !strings.Contains(endpoint, "://") {
		return "tcp", endpoint, nil
	}
	u, err := url.Parse(endpoint)
	switch {
	case err != nil:
		return "", "", err
	case u.Scheme == "unix":
		return "unix", u.Path, nil
	default:
		return "tcp", u.Host, nil
	}
}
