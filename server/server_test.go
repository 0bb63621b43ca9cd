package server_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"keygate/config"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/server"
	"keygate/statestore"
)

func TestMain(m *testing.M) {
	keygatetest.Reexec()
	os.Exit(m.Run())
}

// nowhere is an etcd that New need not reach.
var nowhere = statestore.EtcdConfig{Endpoints: []string{"http://127.0.0.1:1"}}

// made is what New says of settings.
func made(t *testing.T, edit func(*config.Config)) error {
	t.Helper()
	settings := keygatetest.Settings()
	edit(settings)
	s, err := server.New(server.Config{Settings: settings, Etcd: nowhere})
	if err == nil {
		s.Close()
	}
	return err
}

// An address that is taken is told before anything starts, with the flag and
// what to do; and what was taken meanwhile is given back.
func TestTakenAddresses(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	taken := config.Address{Network: "tcp", Address: l.Addr().String()}
	dir := shortDir(t)
	served := filepath.Join(dir, "served.sock")
	ul, err := net.Listen("unix", served)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ul.Close() }()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	unix := func(path string) config.Address { return config.Address{Network: "unix", Address: path} }
	for _, test := range []struct {
		name string
		edit func(*config.Config)
		want []string
	}{
		{"authz port", func(c *config.Config) { c.AuthzListen = taken }, []string{"--authz-listen", taken.Address, "taken by another process"}},
		{"health port", func(c *config.Config) { c.HealthListen = taken }, []string{"--health-listen", taken.Address, "taken by another process"}},
		{"served socket", func(c *config.Config) { c.AuthzListen = unix(served) }, []string{"--authz-listen", served, "taken by another process"}},
		{"a file", func(c *config.Config) { c.AuthzListen = unix(file) }, []string{"--authz-listen", file, "no socket"}},
		{"a link to a file", func(c *config.Config) { c.HealthListen = unix(link) }, []string{"--health-listen", link, "no socket"}},
		{"a folder", func(c *config.Config) { c.AuthzListen = unix(dir) }, []string{"--authz-listen", dir, "no socket"}},
		{"no such folder", func(c *config.Config) { c.AuthzListen = unix(filepath.Join(dir, "none", "s")) }, []string{"--authz-listen", "no such file"}},
	} {
		// The other listener is free: New took it first or would take it next.
		free := config.Address{Network: "tcp", Address: freeAddress(t)}
		err := made(t, func(c *config.Config) {
			c.AuthzListen, c.HealthListen = free, config.Address{Network: "tcp", Address: "127.0.0.1:0"}
			test.edit(c)
		})
		for _, want := range test.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v, want %q in it", test.name, err, want)
			}
		}
		again, err := net.Listen("tcp", free.Address)
		if err != nil {
			t.Errorf("%s: the other address was kept: %v", test.name, err)
			continue
		}
		_ = again.Close()
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file in the way: got %q, %v, want it as it was", b, err)
	}
	if c, err := net.Dial("unix", served); err != nil {
		t.Errorf("the socket of another process: %v, want it served on", err)
	} else {
		_ = c.Close()
	}
}

// A socket file that a killed process left behind is replaced, and the service
// answers on it; after the stop it is gone.
func TestStaleSocketIsReplaced(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "authz.sock")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Close(fd)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("there is no stale socket: %v", err)
	}
	k := keygatetest.Start(t, keygatetest.Options{Settings: func(c *config.Config) {
		c.AuthzListen = config.Address{Network: "unix", Address: path}
	}})
	if got := k.Server.AuthzAddr(); got != "unix://"+path {
		t.Errorf("address: got %s, want unix://%s", got, path)
	}
	keygatetest.Eventually(t, 5*time.Second, "SERVING on the socket", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r, err := grpc_health_v1.NewHealthClient(k.Conn(t)).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err == nil && r.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING
	})
	k.Stop(t)
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket after the stop: got %v, want it gone", err)
	}
}

// Only a client with a certificate of the CA gets through; the others are
// refused in the handshake, which is logged once a minute for a peer.
func TestClientCertificates(t *testing.T) {
	t.Parallel()
	files := etcdtest.Certificates(t)
	k := keygatetest.Start(t, keygatetest.Options{Settings: func(c *config.Config) {
		c.AuthzTLSCert, c.AuthzTLSKey, c.AuthzClientCA = files.ServerCert, files.ServerKey, files.CA
	}})
	ask := func(creds credentials.TransportCredentials) error {
		conn, err := grpc.NewClient("passthrough:///"+k.Server.AuthzAddr(), grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	}
	with := func(cert, key string) credentials.TransportCredentials {
		c := files.ClientConfig.Clone()
		c.Certificates = nil
		if cert != "" {
			pair, err := tls.LoadX509KeyPair(cert, key)
			if err != nil {
				t.Fatal(err)
			}
			// Sent whether or not the server's list of CAs names its issuer.
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
		}
		return credentials.NewTLS(c)
	}
	for name, creds := range map[string]credentials.TransportCredentials{
		"none": with("", ""), "of another CA": with(files.ForeignCert, files.ForeignKey), "expired": with(files.ExpiredCert, files.ExpiredKey),
		"a server's": with(files.ServerCert, files.ServerKey),
	} {
		for range 2 {
			if err := ask(creds); status.Code(err) != codes.Unavailable {
				t.Errorf("certificate %s: got %v, want the handshake to fail", name, err)
			}
		}
	}
	// Not TLS at all, and a peer that says nothing.
	raw, err := net.Dial("tcp", k.Server.AuthzAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	if _, err := raw.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if err := ask(with(files.ClientCert, files.ClientKey)); err != nil {
		t.Errorf("a certificate of the CA: got %v, want nil", err)
	}
	lines := 0
	for line := range strings.Lines(k.Log()) {
		if strings.Contains(line, "TLS handshake refused") {
			lines++
			if !strings.Contains(line, "peer=127.0.0.1") || !strings.Contains(line, "cause=") {
				t.Errorf("got %q, want the peer and the cause", line)
			}
		}
	}
	if lines != 1 {
		t.Errorf("got %d lines of refused handshakes from one peer, want 1", lines)
	}
}

// Files of the listener's TLS that cannot be used stop the start, by the flag's
// name.
func TestListenerCertificateFiles(t *testing.T) {
	t.Parallel()
	files := etcdtest.Certificates(t)
	for _, test := range []struct {
		name, cert, key, ca, want string
	}{
		{"no such file", "none.crt", files.ServerKey, "", "--authz-tls-cert"},
		{"another's key", files.ServerCert, files.ClientKey, "", "--authz-tls-key"},
		{"no CA file", files.ServerCert, files.ServerKey, "none.crt", "--authz-client-ca"},
		{"a CA file without a certificate", files.ServerCert, files.ServerKey, files.ServerKey, "holds no PEM certificate"},
	} {
		err := made(t, func(c *config.Config) { c.AuthzTLSCert, c.AuthzTLSKey, c.AuthzClientCA = test.cert, test.key, test.ca })
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", test.name, err, test.want)
		}
	}
}

// Every metric that the code names is there, and none besides Go's own.
func TestMetricsArePresent(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{}
	for _, m := range regexp.MustCompile(`Name: "(keygate_\w+)"`).FindAllStringSubmatch(string(source), -1) {
		want[m[1]] = true
	}
	for _, m := range regexp.MustCompile(`\t(gauge|counter)\("(\w+)"`).FindAllStringSubmatch(string(source), -1) {
		want["keygate_"+m[2]+map[string]string{"counter": "_total"}[m[1]]] = true
	}
	if len(want) < 20 {
		t.Fatalf("found %d metrics in the source: the test looks in the wrong place", len(want))
	}
	k := keygatetest.Start(t, keygatetest.Options{})
	k.PutKeys(t, keygatetest.Key{Key: "key-for-the-metrics-00000"})
	_, body := k.Health(t, "/metrics")
	got := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (keygate_\w+) `).FindAllStringSubmatch(body, -1) {
		got[m[1]] = true
		if !strings.Contains(body, "# HELP "+m[1]+" ") {
			t.Errorf("%s has no help", m[1])
		}
	}
	for name := range want {
		if !got[name] {
			t.Errorf("%s is not in /metrics", name)
		}
	}
	for name := range got {
		if !want[name] {
			t.Errorf("%s is in /metrics and not in the source as the test reads it", name)
		}
	}
	m := k.Metrics(t)
	st := k.Status(t)
	if m["keygate_fresh"] != 1 || m["keygate_staleness_budget_seconds"] != 5 || m["keygate_epoch"] != 1 ||
		m["keygate_applied_revision"] < 1 || int64(m["keygate_applied_revision"]) > st.Store.AppliedRevision || m["keygate_proof_age_seconds"] < 0 || m["keygate_probes_total"] < 1 {
		t.Errorf("fresh %v, budget %v, epoch %v, revision %v, proof age %v, probes %v: want those of a fresh replica", m["keygate_fresh"],
			m["keygate_staleness_budget_seconds"], m["keygate_epoch"], m["keygate_applied_revision"], m["keygate_proof_age_seconds"], m["keygate_probes_total"])
	}
}

// The health listener says what it should, and nothing that it should not.
func TestHealthEndpoints(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	for _, test := range []struct {
		path string
		code int
		want string
	}{
		{"/livez", 200, "ok\n"}, {"/readyz", 200, "ok\n"}, {"/healthz", 200, "ok\n"}, {"/readyz?verbose", 200, "[+]watch: applied revision "},
		{"/version", 200, `"version": "test"`}, {"/status", 200, `"fresh": true`},
		{"/", 404, ""}, {"/debug/pprof/", 404, ""}, {"/debug/vars", 404, ""},
	} {
		if code, body := k.Health(t, test.path); code != test.code || !strings.Contains(body, test.want) {
			t.Errorf("%s: got %d, %q, want %d and %q", test.path, code, body, test.code, test.want)
		}
	}
}

// A replica without any etcd starts, refuses, says why and stops at once.
func TestStartWithoutEtcd(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{Etcd: nowhere, Unready: true})
	keygatetest.Eventually(t, 10*time.Second, "/readyz to say that there is no connection", func() bool {
		code, body := k.Health(t, "/readyz")
		return code == 503 && strings.Contains(body, "no connection to etcd at http://127.0.0.1:1")
	})
	if code, _ := k.Health(t, "/livez"); code != 200 {
		t.Errorf("/livez: got %d, want 200", code)
	}
	if st := k.Status(t); st.Ready || st.Store.ProofAge >= 0 || st.Store.AppliedRevision != 0 {
		t.Errorf("/status: got %+v, want nothing known", st)
	}
	began := time.Now()
	k.Stop(t)
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("the stop took %v, want it at once", took)
	}
}

// An embedded etcd that cannot start ends the server, with its words.
func TestChildThatCannotStart(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	first := keygatetest.Start(t, keygatetest.Options{Child: true, DataDir: dir})
	second := keygatetest.Start(t, keygatetest.Options{Child: true, DataDir: dir, Unready: true})
	if err := second.Wait(t); err == nil || !strings.Contains(err.Error(), "embedded etcd: ") || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second server on the same data: got %v, want the embedded etcd's error", err)
	}
	first.WaitReady(t)
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// shortDir is a folder whose sockets have valid addresses.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(fmt.Errorf("remove %s: %w", dir, err))
		}
	})
	return dir
}
