package keygatetest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keygate/authz"
	"keygate/config"
	"keygate/envoy"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
)

// tlsConfig of a replica of e, with the user's password.
func tlsConfig(e *etcdtest.TLS, user, password string) statestore.EtcdConfig {
	return statestore.EtcdConfig{
		Endpoints: []string{e.Endpoint}, CACert: e.Files.CA, Cert: e.Files.ClientCert, Key: e.Files.ClientKey,
		User: user, Password: password, DialTimeout: 2 * time.Second,
	}
}

// Somebody else's cluster: TLS, client certificates, users and passwords, and a
// role that may read the prefix and nothing else. A revocation takes effect, and
// no check asks for anything that the role may not read, whatever its key or
// its route is called.
func TestExternalCluster(t *testing.T) {
	t.Parallel()
	e := etcdtest.StartTLS(t)
	for _, login := range []struct{ name, user, password string }{
		{"password", etcdtest.ReplicaUser, etcdtest.ReplicaPassword},
		{"certificate alone", "", ""},
	} {
		t.Run(login.name, func(t *testing.T) {
			k := keygatetest.Start(t, keygatetest.Options{
				Envoy: true, Etcd: tlsConfig(e, login.user, login.password), Writer: e.Client(t, etcdtest.RootUser, etcdtest.RootPassword),
				Bootstrap: func(b *envoy.Bootstrap) { b.Routes = routes() },
			})
			key := keygatetest.Key{Key: "key-in-somebody-elses-etcd"}
			k.Applied(t, k.PutKeys(t, key))
			wantReply(t, k.Get(t, "/weather", header(key.Key)), authz.Allowed)
			// What a path-shaped name might reach, were it a path.
			for _, secret := range []string{"/audit", "/keygate.audit/default/x", "/keygate.index/default/keys", "/keygate.replicas/x"} {
				k.Put(t, secret, "approved")
			}
			for _, test := range []struct {
				path, key string
				want      authz.Reason
			}{
				{"/weather", "../../audit", authz.KeyUnknown}, {"/weather", "/keygate.audit/default/x", authz.KeyUnknown},
				{"/weather", "../../../keygate.index/default/keys", authz.KeyUnknown}, {"/escaping", key.Key, authz.KeyUnknown},
				{"/elsewhere", key.Key, authz.KeyUnknown}, {"/strange", key.Key, authz.ProductNotOnKey},
			} {
				wantReply(t, k.Get(t, test.path, header(test.key)), test.want)
			}
			if st := k.Status(t); st.Store.LoadErrors != 0 || st.Store.ProbeErrors != 0 || st.Etcd.Embedded {
				t.Errorf("got %d load errors and %d probe errors, embedded %v, want none: a read went beyond the role", st.Store.LoadErrors, st.Store.ProbeErrors, st.Etcd.Embedded)
			}
			status := k.Settings.Space.Status(key.Record(t))
			k.Applied(t, k.Put(t, status, "revoked"))
			wantReply(t, k.Get(t, "/weather", header(key.Key)), authz.KeyRevoked)
			for _, secret := range []string{etcdtest.ReplicaPassword, etcdtest.RootPassword} {
				if _, body := k.Health(t, "/status"); strings.Contains(body+k.Log(), secret) {
					t.Error("a password stands in the status or the log")
				}
			}
		})
	}
}

// Without the right to read, every check is refused, and readiness, status and
// log say what is missing, in etcd's words; with the right granted the replica
// goes on by itself.
func TestExternalClusterRefuses(t *testing.T) {
	t.Parallel()
	e := etcdtest.StartTLS(t)
	root := e.Client(t, etcdtest.RootUser, etcdtest.RootPassword)
	const stranger, password = "stranger", "stranger-password"
	if _, err := root.UserAdd(t.Context(), stranger, password); err != nil {
		t.Fatal(err)
	}
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, Unready: true, Etcd: tlsConfig(e, stranger, password), Writer: root})
	key := keygatetest.Key{Key: "key-that-cannot-be-read-00"}
	k.PutKeys(t, key)
	keygatetest.Eventually(t, 10*time.Second, "/readyz to name the missing permission", func() bool {
		code, body := k.Health(t, "/readyz")
		return code == 503 && strings.Contains(body, "permission denied")
	})
	if st := k.Status(t); st.Ready || !strings.Contains(st.Problem, "permission denied") || !strings.Contains(st.Store.Problem, "permission denied") {
		t.Errorf("/status: got ready %v, %q, want the missing permission", st.Ready, st.Problem)
	}
	if !strings.Contains(k.Log(), "permission denied") {
		t.Error("the log does not name the missing permission")
	}
	wantReply(t, k.Get(t, "/weather", header(key.Key)), authz.Stale)
	if _, err := root.UserGrantRole(t.Context(), stranger, "keygate-replica"); err != nil {
		t.Fatal(err)
	}
	k.WaitReady(t)
	wantReply(t, k.Get(t, "/weather", header(key.Key)), authz.Allowed)

	// And taken away again: not a yes beyond the budget, and no crash.
	if _, err := root.UserRevokeRole(t.Context(), stranger, "keygate-replica"); err != nil {
		t.Fatal(err)
	}
	keygatetest.Eventually(t, k.Settings.StalenessBudget+5*time.Second, "checks to be refused without the right to read", func() bool {
		return k.Get(t, "/weather", header(key.Key)).Status == 503
	})
	if _, body := k.Health(t, "/readyz"); !strings.Contains(body, "permission denied") {
		t.Errorf("/readyz: got %s, want the missing permission", body)
	}
}

// A login that etcd refuses ends the start, with etcd's words.
func TestExternalClusterLogin(t *testing.T) {
	t.Parallel()
	e := etcdtest.StartTLS(t)
	for _, test := range []struct {
		name string
		edit func(*statestore.EtcdConfig)
		want string
	}{
		{"no such file", func(c *statestore.EtcdConfig) { c.Cert = filepath.Join(t.TempDir(), "none.crt") }, "no such file"},
		{"not a certificate", func(c *statestore.EtcdConfig) { c.CACert = e.Files.ClientKey }, "holds no PEM certificate"},
	} {
		cfg := tlsConfig(e, etcdtest.ReplicaUser, etcdtest.ReplicaPassword)
		test.edit(&cfg)
		err := startError(t, nil, cfg)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", test.name, err, test.want)
		}
	}
	// A login that etcd refuses is for etcd's administrator to mend: the replica
	// waits, and says why.
	for name, edit := range map[string]func(*statestore.EtcdConfig){
		"wrong password": func(c *statestore.EtcdConfig) { c.Password = "not-the-password" },
		"unknown user":   func(c *statestore.EtcdConfig) { c.User = "nobody" },
	} {
		cfg := tlsConfig(e, etcdtest.ReplicaUser, etcdtest.ReplicaPassword)
		edit(&cfg)
		k := keygatetest.Start(t, keygatetest.Options{Unready: true, Etcd: cfg, Writer: e.Client(t, etcdtest.RootUser, etcdtest.RootPassword)})
		keygatetest.Eventually(t, 10*time.Second, name+": /readyz to say so", func() bool {
			code, body := k.Health(t, "/readyz")
			if strings.Contains(body, "not-the-password") {
				t.Fatalf("/readyz holds the password: %s", body)
			}
			return code == 503 && strings.Contains(body, "invalid user ID or password")
		})
	}
	// With a certificate that etcd does not take, there is no answer at all; the
	// replica waits for better days and says that it is not ready.
	cfg := tlsConfig(e, "", "")
	cfg.Cert, cfg.Key = e.Files.ExpiredCert, e.Files.ExpiredKey
	k := keygatetest.Start(t, keygatetest.Options{Unready: true, Etcd: cfg, Writer: e.Client(t, etcdtest.RootUser, etcdtest.RootPassword)})
	keygatetest.Eventually(t, 10*time.Second, "/readyz to say that there is no connection", func() bool {
		code, body := k.Health(t, "/readyz")
		return code == 503 && strings.Contains(body, "no connection to etcd at "+e.Endpoint)
	})
	if got := mustCheck(t, k.Conn(t), "key-that-nobody-can-look-up"); got != "stale" {
		t.Errorf("a check meanwhile: got %s, want stale", got)
	}

	// Its renewal needs no restart.
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "replica.crt"), filepath.Join(dir, "replica.key")
	mustCopy(t, e.Files.ExpiredCert, cert)
	mustCopy(t, e.Files.ExpiredKey, key)
	cfg.Cert, cfg.Key = cert, key
	k = keygatetest.Start(t, keygatetest.Options{Unready: true, Etcd: cfg, Writer: e.Client(t, etcdtest.RootUser, etcdtest.RootPassword),
		Settings: func(c *config.Config) { c.StalenessBudget = statestore.MinStalenessBudget }})
	mustCopy(t, e.Files.ClientKey, key)
	mustCopy(t, e.Files.ClientCert, cert)
	k.WaitReady(t)
}

func mustCopy(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}
