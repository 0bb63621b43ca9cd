package etcdtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Fault is what strace does to system calls of an etcd, in the words of its
// option --inject: names of calls, a colon, and what becomes of them.
type Fault string

// Faults of a disk. etcd writes its log by write into space that was allocated
// before, and its database by pwrite64, and makes both safe by fdatasync. Both
// faults end the process.
const (
	// FailingSync: nothing is made safe any more, and no write acknowledged.
	FailingSync Fault = "fdatasync,fsync:error=EIO"
	// FullDisk: there is no room for anything new. The log has some left, so a
	// few writes may still be acknowledged, and are safe, until the database
	// is written, which is within 0.1 s.
	FullDisk Fault = "pwrite64,fallocate,ftruncate:error=ENOSPC"
)

// SlowSync makes each sync take that much longer.
func SlowSync(by time.Duration) Fault {
	return Fault(fmt.Sprintf("fdatasync,fsync:delay_exit=%d", by.Microseconds()))
}

// calls are the names of the system calls.
func (f Fault) calls() string {
	names, _, _ := strings.Cut(string(f), ":")
	return names
}

// traceArguments for strace: all threads, no output, these faults.
func traceArguments(faults []Fault) []string {
	args := []string{"-f", "-qq", "-o", os.DevNull}
	var calls []string
	for _, f := range faults {
		calls = append(calls, f.calls())
	}
	args = append(args, "-e", "trace="+strings.Join(calls, ","))
	for _, f := range faults {
		args = append(args, "-e", "inject="+string(f))
	}
	return args
}

// strace returns the path of the program, which TEST_STRACE names and PATH
// holds otherwise.
func strace(t testing.TB) string {
	t.Helper()
	path := os.Getenv("TEST_STRACE")
	if path == "" {
		var err error
		if path, err = exec.LookPath("strace"); err != nil {
			t.Fatalf("find strace, which makes a disk slow or broken (\"make\" gets it, or set TEST_STRACE): %v", err)
		}
	}
	return path
}

// allowTracing lets strace attach to this process although it is not its
// parent, where the kernel (Yama) would refuse that to anybody but root.
func allowTracing() {
	// An error means that the kernel has no such rule.
	_ = unix.Prctl(unix.PR_SET_PTRACER, unix.PR_SET_PTRACER_ANY, 0, 0, 0)
}

// Inject attaches strace to the running process, and returns when the faults
// are in force. They end with the returned function, which the end of the
// process and of the test make harmless. While it is attached, each system call
// of etcd costs a few microseconds more. There is one strace at a time: no
// second Inject, and none on a process that was started with [Strace].
func (p *Process) Inject(faults ...Fault) (end func()) {
	p.t.Helper()
	var log strings.Builder
	cmd := exec.Command(strace(p.t), append(traceArguments(faults), "-p", fmt.Sprint(p.Pid()))...)
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		p.t.Fatalf("start strace: %v", err)
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_ = cmd.Wait() // by a signal as a rule
	}()
	end = func() {
		// It lets go of every thread before it ends.
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-gone:
		case <-time.After(startTimeout):
			_ = cmd.Process.Kill()
			p.t.Errorf("strace is still there %v after SIGTERM", startTimeout)
		}
	}
	p.t.Cleanup(end)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(startTimeout)
	for !p.tracedBy(cmd.Process.Pid) {
		select {
		case <-gone:
			if !p.Running() {
				return end // the fault has ended it
			}
			p.t.Fatalf("strace ended at once; is ptrace permitted here? It said: %s", log.String())
		case <-deadline:
			p.t.Fatalf("strace has not attached to test etcd after %v", startTimeout)
		case <-tick.C:
		}
	}
	return end
}

// tracedBy tells whether each thread of the process is traced by that one.
func (p *Process) tracedBy(tracer int) bool {
	states, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.Pid()))
	if err != nil || len(states) == 0 {
		return false
	}
	for _, name := range states {
		status, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(status), fmt.Sprintf("\nTracerPid:\t%d\n", tracer)) {
			return false
		}
	}
	return true
}
