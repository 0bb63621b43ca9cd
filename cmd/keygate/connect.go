package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/client"
	"keygate/config"
	"keygate/ledger"
	"keygate/management"
	"keygate/seal"
	"keygate/statestore/embedded"
)

// managed are the settings of the commands that use the management API, or the
// store without one.
func managed() []config.Group {
	return []config.Group{config.Org, config.Client, config.External, config.Embedded, config.Keys, config.Sealing}
}

// place is where a command finds what it manages: an API, or the store itself.
type place struct {
	server string // URL of the API; empty for the store
	token  client.Secret
	// tokenFile that the token came from without having been named: the
	// machine's own.
	tokenFile string
	tls       *tls.Config // nil is Go's own
}

// answerTimeout is how long the machine's own keygate has to take a connection.
const answerTimeout = time.Second

// findPlace decides it: a flag that names the store means the store; else a
// server that is named; else the keygate of this machine, if it answers and its
// admin token can be read; else the store.
func findPlace(ctx context.Context, cmd *cobra.Command, cfg *config.Config) (place, error) {
	given := func(flag string) bool { return cfg.Source(flag).Kind == config.FromFlag }
	for _, flag := range []string{"data-dir", "etcd-endpoints"} {
		if given(flag) {
			if given("server") {
				return place{}, usageError(cmd, "--server and --%s are given together: the API or the store, choose one", flag)
			}
			return place{}, nil
		}
	}
	if cfg.Server == "" {
		own, _ := ownPlace(ctx, cfg)
		return own, nil
	}
	token, err := cfg.Token()
	if err != nil {
		return place{}, exitWith(exitUsage, fmt.Errorf("management token: %w", err))
	}
	if token == "" {
		if own, ok := ownPlace(ctx, cfg); ok && own.server == cfg.Server {
			return own, nil
		}
		return place{}, exitWith(exitAuth, errors.New("no management token: give --token-file, or KEYGATE_TOKEN in the environment"))
	}
	p := place{server: cfg.Server, token: client.Secret(token)}
	if cfg.ServerCACert != "" {
		if p.tls, err = trust(cfg.ServerCACert); err != nil {
			return place{}, exitWith(exitUsage, err)
		}
	}
	return p, nil
}

// trust returns a configuration that verifies by the CAs in a file.
func trust(file string) (*tls.Config, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no PEM certificate", file)
	}
	return &tls.Config{RootCAs: roots}, nil
}

// ownPlace is the API of the keygate that serves the data directory. Its token
// is sent only while its etcd runs: else another program may have its address.
func ownPlace(ctx context.Context, cfg *config.Config) (place, bool) {
	listen := cfg.ManagementListen
	if listen == (config.Address{}) || !cfg.Embedded() || !embedded.Running(ctx, cfg.DataDir) {
		return place{}, false
	}
	token, err := cfg.AdminToken()
	if err != nil {
		return place{}, false
	}
	p := place{server: "http://" + dialable(listen), token: client.Secret(token), tokenFile: cfg.AdminTokenPath()}
	switch {
	case listen.Network == "unix" && cfg.ManagementTLSCert != "":
		return place{}, false // a client speaks no TLS on a socket
	case listen.Network == "unix":
		p.server = listen.String()
	case cfg.ManagementTLSCert != "":
		// The server's own certificate, by whatever name: the file says which.
		pair, err := trust(cfg.ManagementTLSCert)
		if err != nil {
			return place{}, false
		}
		if pair.ServerName, err = nameIn(cfg.ManagementTLSCert, cfg.ManagementTLSKey); err != nil {
			return place{}, false
		}
		p.server, p.tls = "https://"+dialable(listen), pair
	}
	dialing, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(dialing, listen.Network, dialable(listen))
	if err != nil {
		return place{}, false
	}
	_ = conn.Close()
	return p, true
}

// nameIn returns a name that the certificate is good for.
func nameIn(cert, key string) (string, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	switch {
	case err != nil:
		return "", err
	case len(pair.Leaf.DNSNames) > 0:
		return pair.Leaf.DNSNames[0], nil
	case len(pair.Leaf.IPAddresses) > 0:
		return pair.Leaf.IPAddresses[0].String(), nil
	}
	return "", fmt.Errorf("%s names no host", cert)
}

// manage returns a client of the management API that a command line names: over
// the network, or in this process on the store itself. release ends what was
// begun for it; it is not nil when err is.
func (a *app) manage(cmd *cobra.Command, cfg *config.Config, dataDir absent, reveal bool) (_ *client.Client, release func(), err error) {
	ctx := cmd.Context()
	at, err := findPlace(ctx, cmd, cfg)
	if err != nil {
		return nil, nil, err
	}
	if at.server != "" {
		c, err := at.client(cfg, reveal)
		if err != nil {
			return nil, nil, exitWith(exitUsage, err)
		}
		return c, c.Close, nil
	}
	s, err := a.openStore(ctx, cfg, dataDir, withSealing)
	if err != nil {
		return nil, nil, err
	}
	c, err := s.client(cfg, reveal)
	if err != nil {
		s.close()
		return nil, nil, err
	}
	return c, s.close, nil
}

// client of the API at a place.
func (p place) client(cfg *config.Config, reveal bool) (*client.Client, error) {
	return client.New(client.Config{
		Server: p.server, Organization: cfg.Organization, Token: p.token, TLS: p.tls, Reveal: reveal,
		UserAgent: "keygate/" + buildVersion().Version,
	})
}

// store is an etcd with a ledger on it.
type store struct {
	etcd    *clientv3.Client
	ledger  *ledger.Ledger
	keys    *seal.Keyring
	log     *slog.Logger
	release func()
}

// sealing says whether a command reads or keeps consumer keys and secrets. One
// that does not works without the sealing keys.
type sealing bool

const (
	withSealing    sealing = true
	withoutSealing sealing = false
)

// openStore reaches the etcd that cfg names.
func (a *app) openStore(ctx context.Context, cfg *config.Config, dataDir absent, sealed sealing) (_ *store, err error) {
	log := a.toolLogger(cfg)
	etcd, release, err := a.reachEtcd(ctx, cfg, dataDir, log)
	if err != nil {
		return nil, err
	}
	s := &store{log: log, release: release}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.etcd, err = dial(ctx, cfg, etcd); err != nil {
		return nil, err
	}
	if sealed {
		if s.keys, err = sealingKeys(cfg); err != nil {
			return nil, err
		}
	}
	var spool *ledger.Spool
	if folder := cfg.AuditSpool(); folder != "" {
		var spoolErr error
		if spool, spoolErr = ledger.OpenSpool(folder); spoolErr != nil { // no reason not to revoke
			log.Warn("audit records cannot wait for space in etcd", "cause", spoolErr)
		}
	}
	s.ledger = ledger.New(ledger.Config{Store: s.etcd, Space: cfg.Space, Seal: s.keys, Spool: spool, Logger: log})
	return s, nil
}

func (s *store) close() {
	if s.etcd != nil {
		_ = s.etcd.Close()
	}
	s.release()
}

// client of the API in this process.
func (s *store) client(cfg *config.Config, reveal bool) (*client.Client, error) {
	api, err := management.New(management.Config{
		Ledger: s.ledger, Store: s.etcd, Space: cfg.Space,
		Organization: "default", // for attempts to sign in: nobody does here
		Version:      buildVersion().Version, Logger: s.log,
	})
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{Organization: cfg.Organization, Reveal: reveal, Transport: client.Handler(api.Local(localActor()))})
}

// localActor is who runs the command, as the audit names them.
func localActor() audit.Actor {
	name, host := "unknown", "unknown"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return audit.Actor{Kind: audit.ActorCLI, Name: name + "@" + host}
}

// sealingKeys reads the keys that cfg names; nil for none. Those of the embedded
// etcd are made when they are not there.
func sealingKeys(cfg *config.Config) (*seal.Keyring, error) {
	path, own := cfg.SealingKeyPath()
	text, err := cfg.SealingKeys()
	if own && errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(cfg.DataDir, 0o700); err == nil {
			_, err = seal.CreateFile(path)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) { // another was faster
			return nil, err
		}
		text, err = cfg.SealingKeys()
	}
	if err != nil {
		return nil, exitWith(exitUsage, fmt.Errorf("sealing keys: %w", err))
	}
	if text == nil {
		return nil, nil
	}
	keys, err := seal.Parse(text)
	if err != nil {
		if path == "" {
			path = "KEYGATE_SEALING_KEY"
		}
		return nil, exitWith(exitUsage, fmt.Errorf("sealing keys in %s: %w", path, err))
	}
	return keys, nil
}

// clientExit is the status to exit with for a refusal by the API.
func clientExit(e *client.Error) int {
	switch e.Status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
		return exitUsage
	case http.StatusUnauthorized, http.StatusForbidden:
		return exitAuth
	case http.StatusNotFound:
		return exitNotFound
	case http.StatusConflict, http.StatusPreconditionFailed, http.StatusUnprocessableEntity:
		return exitConflict
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return exitUnreachable
	}
	return exitFailed
}
