package etcdtest

import (
	"context"
	"net"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// Users of an etcd that StartTLS made. The replica may read what keygate
// decides by and write its own registration; its name is that of the client
// certificate, so the certificate alone makes it known as well.
const (
	RootUser        = "root"
	RootPassword    = "root-password"
	ReplicaUser     = ClientName
	ReplicaPassword = "replica-password"
)

// TLS is an etcd as somebody else runs it: on TCP, client certificates
// required, authentication on.
type TLS struct {
	Endpoint string // https://127.0.0.1:…
	Files    CertificateFiles
}

// StartTLS runs such an etcd in this process until the test ends. The users'
// rights are over the prefixes "/keygate/" and "/keygate.replicas/".
//
// It starts the server itself, because the embedded one has no network
// listener to switch on.
func StartTLS(t testing.TB) *TLS {
	t.Helper()
	e := &TLS{Files: Certificates(t)}
	dir := DataDir(t)
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.TickMs, cfg.ElectionMs = 20, 200
	cfg.BcryptCost = 4
	cfg.EnableGRPCGateway = false
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Host: filepath.Join(dir, "peer.sock")}}
	cfg.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:1"}}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ListenClientUrls = []url.URL{{Scheme: "https", Host: "127.0.0.1:0"}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ClientTLSInfo = transport.TLSInfo{
		CertFile: e.Files.ServerCert, KeyFile: e.Files.ServerKey,
		TrustedCAFile: e.Files.CA, ClientCertAuth: true,
	}
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatalf("start test etcd with TLS: %v", err)
	}
	t.Cleanup(server.Close)
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(startTimeout):
		t.Fatalf("test etcd with TLS is not ready after %v", startTimeout)
	}
	e.Endpoint = "https://" + server.Clients[0].Addr().(*net.TCPAddr).String()
	e.enableAuth(t)
	return e
}

// Client returns a client that presents the client certificate and, if user is
// not empty, a password. It is closed when the test ends.
func (e *TLS) Client(t testing.TB, user, password string) *clientv3.Client {
	t.Helper()
	return dial(t, clientv3.Config{
		Endpoints: []string{e.Endpoint},
		TLS:       e.Files.ClientConfig.Clone(),
		Username:  user,
		Password:  password,
	})
}

func (e *TLS) enableAuth(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	c := e.Client(t, "", "")
	defer c.Close()
	const replica = "keygate-replica"
	grant := func(prefix string, right clientv3.PermissionType) error {
		_, err := c.RoleGrantPermission(ctx, replica, prefix, clientv3.GetPrefixRangeEnd(prefix), right)
		return err
	}
	steps := []func() error{
		func() error { _, err := c.RoleAdd(ctx, "root"); return err },
		func() error { _, err := c.UserAdd(ctx, RootUser, RootPassword); return err },
		func() error { _, err := c.UserGrantRole(ctx, RootUser, "root"); return err },
		func() error { _, err := c.RoleAdd(ctx, replica); return err },
		func() error { return grant("/keygate/", clientv3.PermissionType(clientv3.PermRead)) },
		func() error { return grant("/keygate.replicas/", clientv3.PermissionType(clientv3.PermReadWrite)) },
		func() error { _, err := c.UserAdd(ctx, ReplicaUser, ReplicaPassword); return err },
		func() error { _, err := c.UserGrantRole(ctx, ReplicaUser, replica); return err },
		func() error { _, err := c.AuthEnable(ctx); return err },
	}
	for i, step := range steps {
		if err := step(); err != nil {
			t.Fatalf("switch on authentication, step %d: %v", i+1, err)
		}
	}
}
