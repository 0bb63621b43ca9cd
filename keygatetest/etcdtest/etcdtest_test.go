package etcdtest_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"keygate/keygatetest/etcdtest"
)

func TestMain(m *testing.M) {
	etcdtest.Reexec()
	goleak.VerifyTestMain(m)
}

func mustPut(t *testing.T, c *clientv3.Client, key, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := c.Put(ctx, key, value); err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
}

func mustGet(t *testing.T, c *clientv3.Client, key, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, err := c.Get(ctx, key)
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if len(r.Kvs) != 1 || string(r.Kvs[0].Value) != want {
		t.Errorf("get %s: got %v, want %q", key, r.Kvs, want)
	}
}

func TestStart(t *testing.T) {
	a, b := etcdtest.Start(t), etcdtest.Start(t)
	mustPut(t, a.Client(t), "k", "a")
	mustPut(t, b.Client(t), "k", "b")
	mustGet(t, a.Client(t), "k", "a")
}

func TestProcess(t *testing.T) {
	p := etcdtest.StartProcess(t)
	c := p.Client(t)
	mustPut(t, c, "k", "v")

	p.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := c.Get(ctx, "k"); err == nil {
		t.Error("get from a killed etcd: got an answer, want none")
	}
	p.Restart()
	mustGet(t, c, "k", "v")

	p.Stop()
	ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := c.Get(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("get from a frozen etcd: got %v, want a deadline exceeded", err)
	}
	p.Cont()
	mustGet(t, c, "k", "v")

	p.Terminate()
	p.Restart()
	mustGet(t, c, "k", "v")
}

func TestTLS(t *testing.T) {
	e := etcdtest.StartTLS(t)
	mustPut(t, e.Client(t, etcdtest.RootUser, etcdtest.RootPassword), "/keygate/o/x", "v")

	for _, test := range []struct{ name, user, password string }{
		{"password", etcdtest.ReplicaUser, etcdtest.ReplicaPassword},
		{"certificate alone", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := e.Client(t, test.user, test.password)
			mustGet(t, c, "/keygate/o/x", "v")
			mustPut(t, c, "/keygate.replicas/r", "v")
			if _, err := c.Put(t.Context(), "/keygate/o/x", "w"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
				t.Errorf("put by a replica: got %v, want %v", err, rpctypes.ErrPermissionDenied)
			}
		})
	}

	t.Run("refused", func(t *testing.T) {
		load := func(cert, key string) []tls.Certificate {
			p, err := tls.LoadX509KeyPair(cert, key)
			if err != nil {
				t.Fatal(err)
			}
			return []tls.Certificate{p}
		}
		f := e.Files
		for name, certs := range map[string][]tls.Certificate{
			"none":    nil,
			"expired": load(f.ExpiredCert, f.ExpiredKey),
			"foreign": load(f.ForeignCert, f.ForeignKey),
		} {
			cfg := f.ClientConfig.Clone()
			cfg.Certificates = certs
			c, err := clientv3.New(clientv3.Config{Endpoints: []string{e.Endpoint}, TLS: cfg, Logger: zap.NewNop()})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			if _, err := c.Get(ctx, "k"); err == nil {
				t.Errorf("get with certificate %q: got an answer, want none", name)
			}
			cancel()
			c.Close()
		}
	})
}

func TestProxy(t *testing.T) {
	for _, test := range []struct {
		name   string
		target func(t *testing.T) string
	}{
		{"unix", func(t *testing.T) string { return etcdtest.Start(t).Endpoint() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := etcdtest.NewProxy(t, test.target(t))
			c, err := clientv3.New(clientv3.Config{Endpoints: []string{p.Endpoint()}, Logger: zap.NewNop()})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			mustPut(t, c, "k", "v")

			p.Freeze()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if _, err := c.Get(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("get through a frozen proxy: got %v, want a deadline exceeded", err)
			}
			if got := p.Connections(); got != 1 {
				t.Errorf("connections while frozen: got %d, want 1", got)
			}
			p.Thaw()
			mustGet(t, c, "k", "v")

			p.Refuse()
			mustGet(t, c, "k", "v") // over the connection that is there
			p.Cut()
			ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if _, err := c.Get(ctx, "k"); err == nil {
				t.Error("get through a cut proxy: got an answer, want none")
			}
			p.Accept()
			mustGet(t, c, "k", "v")
		})
	}
}

// A reset is an error to the peer, not the end of a stream.
func TestProxyCutResets(t *testing.T) {
	p := etcdtest.NewProxy(t, etcdtest.Start(t).Endpoint())
	conn, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for deadline := time.Now().Add(5 * time.Second); p.Connections() == 0; {
		if time.Now().After(deadline) {
			t.Fatal("the proxy has not taken the connection after 5 s")
		}
	}
	p.Cut()
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1024)
	for err == nil {
		_, err = conn.Read(buf) // what etcd had sent before
	}
	if !strings.Contains(err.Error(), "reset") {
		t.Errorf("read after a cut: got %v, want a connection reset", err)
	}
}
