package etcdtest_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/etcdtest"
)

// eventually polls until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 20 s in vain for %s", what)
		}
	}
}

// get reads through c with little patience.
func get(t *testing.T, c *clientv3.Client, key string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := c.Get(ctx, key)
	return err
}

// putEventually writes while members come and go: a client does not repeat a
// write that may have been done.
func putEventually(t *testing.T, c *clientv3.Client, key string) {
	t.Helper()
	eventually(t, "a write to be acknowledged", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := c.Put(ctx, key, "v")
		return err == nil
	})
}

// timedOut is true of what a client says when nothing answers.
func timedOut(err error) bool { return errors.Is(err, context.DeadlineExceeded) }

// Every write that a cluster acknowledged is there after its leader was killed,
// on every member, also on the one that missed half of them.
func TestCluster(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.StartCluster(t, 3)
	if got := len(cluster.Endpoints()); got != 3 {
		t.Fatalf("endpoints of a cluster of 3: got %d", got)
	}
	c := cluster.Client(t)

	var acknowledged []string
	slowest := time.Duration(0)
	put := func() {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		key := fmt.Sprintf("w%05d", len(acknowledged))
		if _, err := c.Put(ctx, key, "v"); err == nil {
			acknowledged = append(acknowledged, key)
		}
	}
	for range 50 {
		put()
	}
	before := cluster.Leader(t)
	cluster.Member(before).Kill()
	killed, n := time.Now(), len(acknowledged)
	eventually(t, "writes after the leader's death", func() bool {
		put()
		if slowest == 0 && len(acknowledged) > n {
			slowest = time.Since(killed)
		}
		return len(acknowledged) >= n+50
	})
	after := cluster.Leader(t)
	if after == before {
		t.Errorf("leader after the death of member %d: got the same", before)
	}
	t.Logf("no write was acknowledged for %v", slowest.Round(time.Millisecond))

	cluster.Member(before).Restart()
	for _, p := range cluster.Members() {
		own := p.Client(t)
		for _, key := range acknowledged {
			mustGet(t, own, key, "v")
		}
	}

	t.Run("no quorum", func(t *testing.T) {
		survivor := cluster.Leader(t)
		own := cluster.Member(survivor).Client(t)
		mustGet(t, own, "w00000", "v")
		for i, p := range cluster.Members() {
			if i != survivor {
				p.Kill()
			}
		}
		if err := get(t, own, "w00000"); err == nil {
			t.Error("linearizable read from one of three: got an answer, want none")
		}
		mustGet(t, own, "w00000", "v", clientv3.WithSerializable())
		for _, p := range cluster.Members() {
			if !p.Running() {
				p.StartAgain()
			}
		}
		for _, p := range cluster.Members() {
			p.WaitReady()
		}
		putEventually(t, c, "again")
	})

	// A leader that is frozen, not dead, is deposed as well, and learns of it.
	t.Run("frozen leader", func(t *testing.T) {
		frozen := cluster.Leader(t)
		cluster.Member(frozen).Stop()
		if got := cluster.Leader(t); got == frozen {
			t.Errorf("leader while member %d is frozen: got the same", got)
		}
		putEventually(t, c, "frozen")
		cluster.Member(frozen).Cont()
		mustGet(t, cluster.Member(frozen).Client(t), "frozen", "v")
	})

	t.Run("terminate", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		leader := cluster.Member(cluster.Leader(t))
		watch := leader.Client(t).Watch(ctx, "w", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		<-watch
		began := time.Now()
		leader.Terminate()
		t.Logf("a leader with a watch was gone %v after SIGTERM", time.Since(began).Round(time.Millisecond))
		putEventually(t, c, "terminated")
		leader.Restart()
		mustGet(t, leader.Client(t), "terminated", "v")
	})
}
