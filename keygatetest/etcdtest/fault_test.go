package etcdtest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/etcdtest"
)

// A full etcd refuses what adds and lets pass what deletes.
func TestQuota(t *testing.T) {
	t.Parallel()
	p := etcdtest.StartProcess(t, etcdtest.Quota(1<<20))
	c := p.Client(t)
	value := strings.Repeat("x", 64<<10)
	var err error
	// etcd compares the quota with the size at its last commit, one each 100 ms or
	// when it gets to it: how much fits between two of them is no business of the test.
	began := time.Now()
	for i := 0; err == nil; i++ {
		if time.Since(began) > 10*time.Second {
			t.Fatalf("no refusal of %d puts of 64 KiB in 10 s, with a quota of 1 MiB", i)
		}
		_, err = c.Put(t.Context(), fmt.Sprint("k", i%3), value)
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatalf("put beyond the quota: got %v, want %v", err, rpctypes.ErrNoSpace)
	}
	if r, err := c.Delete(t.Context(), "k0"); err != nil || r.Deleted != 1 {
		t.Errorf("delete beyond the quota: got %v, %v, want 1 deleted", r, err)
	}
}

// quickest of a few puts, which a busy machine makes slow but not quick.
func quickest(t *testing.T, c *clientv3.Client) time.Duration {
	t.Helper()
	best := time.Hour
	for range 5 {
		began := time.Now()
		mustPut(t, c, "k", "v")
		best = min(best, time.Since(began))
	}
	return best
}

func TestSlowSync(t *testing.T) {
	t.Parallel()
	const delay = 50 * time.Millisecond
	p := etcdtest.StartProcess(t)
	c := p.Client(t)
	slower := func(what string, slow, fast time.Duration) {
		t.Helper()
		t.Logf("%s: a put takes %v, and %v without", what, slow, fast)
		if slow < 2*fast {
			t.Errorf("%s: a put takes %v, and %v without: want twice as much at least", what, slow, fast)
		}
	}
	fast := quickest(t, c)
	end := p.Inject(etcdtest.SlowSync(delay))
	slower("while it runs", quickest(t, c), fast)
	p.Stop() // what is traced can be frozen, and let go of while it is
	end()
	end() // does nothing
	p.Cont()
	fast = quickest(t, c)

	p.Options(etcdtest.Strace(etcdtest.SlowSync(delay)))
	p.Restart()
	slow := quickest(t, c)
	slower("from the start", slow, fast)
	// The etcd itself, not strace, is what these reach.
	p.Stop()
	if err := get(t, c, "k"); !timedOut(err) {
		t.Errorf("get from a frozen etcd: got %v, want a deadline exceeded", err)
	}
	p.Cont()
	mustGet(t, c, "k", "v")
	tracer := tracerOf(t, p.Pid())
	if tracer == 0 {
		t.Error("tracer of an etcd under strace: got none")
	}
	p.Kill()
	eventually(t, "strace to be gone", func() bool { return ended(tracer) })

	p.Options()
	p.Restart()
	slower("from the start, then not", slow, quickest(t, c))
}

// tracerOf returns the process id of the strace at work on pid.
func tracerOf(t *testing.T, pid int) (tracer int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(status), "TracerPid:")
	if _, err := fmt.Sscan(line, &tracer); err != nil {
		t.Fatalf("tracer of %d: %v", pid, err)
	}
	return tracer
}

// ended is true of a process that is gone, or that nobody has asked for yet.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

// A write that fails ends etcd; what it had acknowledged is there afterwards.
func TestDiskFaults(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		fault etcdtest.Fault
	}{
		{"failing sync", etcdtest.FailingSync},
		{"full disk", etcdtest.FullDisk},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := etcdtest.StartProcess(t)
			c := p.Client(t)
			mustPut(t, c, "k", "v")
			p.Inject(test.fault)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := c.Put(ctx, "during", "v")
			t.Logf("put during the fault: %v", err)
			if err == nil && test.fault == etcdtest.FailingSync {
				t.Error("put that cannot be made safe: got an acknowledgement")
			}
			p.Wait()
			p.Restart()
			mustGet(t, c, "k", "v")
			if err == nil {
				mustGet(t, c, "during", "v")
			}
		})
	}

	t.Run("from the start", func(t *testing.T) {
		p := etcdtest.StartProcess(t)
		p.Options(etcdtest.Strace(etcdtest.FailingSync))
		p.StartAgain()
		p.Wait()
		p.Options()
		p.Restart()
		if logs, err := filepath.Glob(filepath.Join(p.DataDir(), "member", "wal", "*.wal")); err != nil || len(logs) == 0 {
			t.Errorf("log files: got %v, %v", logs, err)
		}
	})

	t.Run("in a cluster", func(t *testing.T) {
		cluster := etcdtest.StartCluster(t, 3)
		c := cluster.Client(t)
		mustPut(t, c, "k", "v")
		leader := cluster.Leader(t)
		cluster.Member(leader).Inject(etcdtest.FailingSync)
		putEventually(t, c, "during")
		cluster.Member(leader).Wait()
		if got := cluster.Leader(t); got == leader {
			t.Errorf("leader after member %d ended: got the same", got)
		}
		cluster.Member(leader).Restart()
		mustGet(t, cluster.Member(leader).Client(t), "during", "v")
	})
}
