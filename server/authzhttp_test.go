package server_test

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"keygate/config"
	"keygate/envoy"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
)

const checkPath = "/v1/check/product/" + string(quickstart.WeatherProduct)

// checkHTTP asks the HTTP door of a replica and returns the status.
func checkHTTP(t *testing.T, transport *http.Transport, url, key string) (int, error) {
	t.Helper()
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+checkPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("x-api-key", key)
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// The HTTP door is off unless it is asked for; it then serves on a unix socket
// too, and its address is told and given back like the others.
func TestAuthzHTTPListen(t *testing.T) {
	t.Parallel()
	if k := keygatetest.Start(t, keygatetest.Options{Etcd: nowhere, Unready: true}); k.Server.AuthzHTTPAddr() != "" {
		t.Errorf("by default: served at %s, want nowhere", k.Server.AuthzHTTPAddr())
	}

	path := filepath.Join(shortDir(t), "http.sock")
	socket := config.Address{Network: "unix", Address: path}
	k := keygatetest.Start(t, keygatetest.Options{Settings: func(c *config.Config) { c.AuthzHTTPListen = socket }})
	const key = "key-at-a-socket-of-http00"
	k.Applied(t, k.PutKeys(t, keygatetest.Key{Key: key}))
	overSocket := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	if k.Server.AuthzHTTPAddr() != "unix://"+path {
		t.Errorf("served at %s, want unix://%s", k.Server.AuthzHTTPAddr(), path)
	}
	for key, want := range map[string]int{key: 200, "no-such-key-at-a-socket00": 401} {
		if got, err := checkHTTP(t, overSocket, "http://keygate", key); got != want {
			t.Errorf("key %s: got %d, %v, want %d", key, got, err, want)
		}
	}

	err := made(t, func(c *config.Config) { c.AuthzHTTPListen = socket })
	if err == nil || !strings.Contains(err.Error(), "--authz-http-listen") || !strings.Contains(err.Error(), "taken by another process") {
		t.Errorf("a second server at the same socket: got %v", err)
	}
	err = made(t, func(c *config.Config) {
		c.AuthzHTTPListen, c.KeyQuery = config.Address{Network: "tcp", Address: "127.0.0.1:0"}, "apikey"
	})
	if err == nil || !strings.Contains(err.Error(), "--authz-http-listen") {
		t.Errorf("a key in the query: got %v, want a refusal that names the setting", err)
	}
	k.Stop(t)
	if _, err := checkHTTP(t, overSocket, "http://keygate", key); err == nil {
		t.Error("the socket is still served after the stop")
	}
}

// The HTTP door has the TLS of the other one: without a certificate of the CA
// there is no answer.
func TestAuthzHTTPOverTLS(t *testing.T) {
	t.Parallel()
	files := etcdtest.Certificates(t)
	k := keygatetest.Start(t, keygatetest.Options{Settings: func(c *config.Config) {
		c.AuthzTLSCert, c.AuthzTLSKey, c.AuthzClientCA = files.ServerCert, files.ServerKey, files.CA
		c.AuthzHTTPListen = config.Address{Network: "tcp", Address: "127.0.0.1:0"}
	}})
	const key = "key-at-the-door-with-tls0"
	k.Applied(t, k.PutKeys(t, keygatetest.Key{Key: key}))
	url := "https://" + k.Server.AuthzHTTPAddr()
	for _, http2 := range []bool{false, true} {
		with := func(client *tls.Config) (int, error) {
			transport := &http.Transport{TLSClientConfig: client, Protocols: new(http.Protocols)}
			transport.Protocols.SetHTTP1(!http2)
			transport.Protocols.SetHTTP2(http2)
			return checkHTTP(t, transport, url, key)
		}
		if got, err := with(files.ClientConfig.Clone()); got != 200 {
			t.Errorf("HTTP/2 %t: with a certificate: got %d, %v, want 200", http2, got, err)
		}
		bare := files.ClientConfig.Clone()
		bare.Certificates = nil
		if got, err := with(bare); err == nil {
			t.Errorf("HTTP/2 %t: without a certificate: got %d, want an error", http2, got)
		}
	}
	plain := &http.Transport{}
	if got, err := checkHTTP(t, plain, "http://"+k.Server.AuthzHTTPAddr(), key); err == nil && got/100 == 2 {
		t.Errorf("in plain text: got %d, want a refusal", got)
	}
}

// A replica that knows nothing yet refuses at its HTTP door, and its health path
// says so.
func TestAuthzHTTPStale(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{Etcd: nowhere, Unready: true, Settings: func(c *config.Config) {
		c.AuthzHTTPListen = config.Address{Network: "tcp", Address: "127.0.0.1:0"}
	}})
	url := "http://" + k.Server.AuthzHTTPAddr()
	if got, err := checkHTTP(t, &http.Transport{}, url, "any-key-that-is-well-formed"); got != 503 {
		t.Errorf("a check: got %d, %v, want 503", got, err)
	}
	resp, err := http.Get(url + envoy.HTTPHealthPath)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != 503 {
		t.Errorf("health: got %s, want 503", resp.Status)
	}
}
