package server

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"keygate/envoy"
)

// Bytes that a client may send before they are read, for one check and for all
// of one connection. A check is about a kilobyte.
const (
	streamWindow = 64 << 10
	connWindow   = 1 << 20
)

// newGRPC returns the server of ext_authz, health and reflection (for ghz and
// grpcurl; it tells the protocol, which is public).
func (s *Server) newGRPC(service *envoy.Service) (*grpc.Server, error) {
	options := append(envoy.ServerOptions(s.log),
		// Windows that stay as they are. To fit them to the connection, grpc-go pings
		// the client with every check that comes when none is under way: both sides
		// then write, wake and read once more for each.
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow))
	if n := s.cfg.Settings.AuthzWorkers; n > 0 {
		// A goroutine of its own for each check would grow its stack in each.
		options = append(options, grpc.NumStreamWorkers(uint32(n)))
	}
	if set := s.cfg.Settings; set.AuthzTLSCert != "" {
		t, err := serverTLS("authz", set.AuthzTLSCert, set.AuthzTLSKey, set.AuthzClientCA)
		if err != nil {
			return nil, err
		}
		options = append(options, grpc.Creds(&loggedHandshakes{TransportCredentials: credentials.NewTLS(t), log: s.log, last: map[string]time.Time{}}))
	}
	g := grpc.NewServer(options...)
	service.Register(g)
	grpc_health_v1.RegisterHealthServer(g, s.health)
	reflection.Register(g)
	return g, nil
}

// newAuthzHTTP returns the server of Envoy's HTTP ext_authz, with the same TLS.
func (s *Server) newAuthzHTTP(service *envoy.Service) (*http.Server, error) {
	h, err := service.HTTPServer(s.ready)
	if err != nil {
		return nil, fmt.Errorf("--authz-http-listen: %w", err)
	}
	if set := s.cfg.Settings; set.AuthzTLSCert != "" {
		t, err := serverTLS("authz", set.AuthzTLSCert, set.AuthzTLSKey, set.AuthzClientCA)
		if err != nil {
			return nil, err
		}
		h.TLSConfig = t
	}
	return h, nil
}

// serverTLS returns the TLS of a listener whose settings begin with a name.
func serverTLS(name, cert, key, clientCA string) (*tls.Config, error) {
	load := func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("--%s-tls-cert, --%[1]s-tls-key: %w", name, err)
		}
		return &pair, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	t := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// Read again for each connection, of which a client keeps one for minutes: a
		// renewed certificate needs no restart.
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return load() },
	}
	if clientCA != "" {
		pem, err := os.ReadFile(clientCA)
		if err != nil {
			return nil, fmt.Errorf("--%s-client-ca: %w", name, err)
		}
		t.ClientCAs = x509.NewCertPool()
		if !t.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--%s-client-ca: %s holds no PEM certificate", name, clientCA)
		}
		t.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return t, nil
}

// loggedHandshakes are credentials that say why a handshake failed, which
// grpc-go keeps to itself: at most once a minute for each peer.
type loggedHandshakes struct {
	credentials.TransportCredentials
	log *slog.Logger

	mu   sync.Mutex
	last map[string]time.Time // by host
}

// maxPeers bounds the memory of who has been logged.
const maxPeers = 1024

func (c *loggedHandshakes) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := c.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		host, _, splitErr := net.SplitHostPort(conn.RemoteAddr().String())
		if splitErr != nil {
			host = conn.RemoteAddr().String()
		}
		if c.first(host) {
			c.log.Warn("TLS handshake refused", "peer", host, "cause", err)
		}
	}
	return secured, info, err
}

func (c *loggedHandshakes) first(host string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if now.Sub(c.last[host]) < time.Minute {
		return false
	}
	if len(c.last) >= maxPeers {
		clear(c.last)
	}
	c.last[host] = now
	return true
}

// Clone keeps the log: grpc-go clones credentials.
func (c *loggedHandshakes) Clone() credentials.TransportCredentials {
	return &loggedHandshakes{TransportCredentials: c.TransportCredentials.Clone(), log: c.log, last: map[string]time.Time{}}
}
