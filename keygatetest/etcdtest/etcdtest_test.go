package etcdtest_test

import (
	"context"
	"crypto/tls"
	"errors"
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

func mustGet(t *testing.T, c *clientv3.Client, key, want string, opts ...clientv3.OpOption) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, err := c.Get(ctx, key, opts...)
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if len(r.Kvs) != 1 || string(r.Kvs[0].Value) != want {
		t.Errorf("get %s: got %v, want %q", key, r.Kvs, want)
	}
}

func TestStart(t *testing.T) {
	t.Parallel()
	a, b := etcdtest.Start(t), etcdtest.Start(t)
	mustPut(t, a.Client(t), "k", "a")
	mustPut(t, b.Client(t), "k", "b")
	mustGet(t, a.Client(t), "k", "a")
}

func TestProcess(t *testing.T) {
	t.Parallel()
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
	t.Parallel()
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
