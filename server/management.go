package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/access"
	"keygate/audit"
	"keygate/ledger"
	"keygate/management"
)

const (
	// tidyEvery is how often it is looked for what others have begun and left,
	// and for audit records that wait for space.
	tidyEvery = time.Second
	// receiptTimeout is how long an answer may take to be written: longer than
	// the longest wait for a receipt.
	receiptTimeout = 75 * time.Second
)

// manager is the management side of a server: the API, and what keeps the audit
// trail whole. No check depends on it; it has a client of its own.
type manager struct {
	log      *slog.Logger
	client   *clientv3.Client
	ledger   *ledger.Ledger
	spool    *ledger.Spool
	follower *audit.Follower
	listener net.Listener // nil: no API
	http     *http.Server
	token    string // file of the admin token; "" for none
	secret   string // the admin token until it is in its file; of tidy's goroutine
}

// newManager takes the address and talks to nobody yet.
func newManager(cfg Config) (_ *manager, err error) {
	set := cfg.Settings
	m := &manager{log: cfg.Logger}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	if m.client, err = cfg.Etcd.Dial(); err != nil {
		return nil, err
	}
	if cfg.Child != nil { // else there is no folder of keygate's own
		m.token = set.AdminTokenPath()
		if m.spool, err = ledger.OpenSpool(set.AuditSpool()); err != nil {
			return nil, err
		}
	}
	m.ledger = ledger.New(ledger.Config{Store: m.client, Space: set.Space, Seal: cfg.Seal, Spool: m.spool, Logger: m.log})
	m.follower = audit.NewFollower(audit.FollowerConfig{Client: m.client, Space: set.Space, Logger: m.log})
	if set.ManagementListen.Network == "" {
		return m, nil
	}
	api, err := management.New(management.Config{
		Ledger: m.ledger, Store: m.client, Space: set.Space, Organization: set.Organization,
		AllowedHosts: set.ManagementHosts, Version: cfg.Version, Logger: m.log,
	})
	if err != nil {
		return nil, err
	}
	if m.listener, err = listen("management-listen", set.ManagementListen); err != nil {
		return nil, err
	}
	m.http = &http.Server{
		Handler:           api.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      receiptTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(m.log.Handler(), slog.LevelDebug),
	}
	if set.ManagementTLSCert != "" {
		if m.http.TLSConfig, err = serverTLS("management", set.ManagementTLSCert, set.ManagementTLSKey, ""); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *manager) close() {
	if m.listener != nil {
		_ = m.listener.Close()
	}
	if m.client != nil {
		_ = m.client.Close()
	}
}

// serve answers until ctx ends, and lets requests under way end.
func (m *manager) serve(ctx context.Context) error {
	stopped := make(chan struct{})
	defer context.AfterFunc(ctx, func() {
		defer close(stopped)
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if m.http.Shutdown(within) != nil {
			_ = m.http.Close()
		}
	})()
	serve := m.http.Serve
	if m.http.TLSConfig != nil {
		serve = func(l net.Listener) error { return m.http.ServeTLS(l, "", "") }
	}
	err := serve(m.listener)
	if !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-stopped
	return nil
}

// tidy finishes what others have begun, drains the spool and, once, makes the
// admin token, until ctx ends.
func (m *manager) tidy(ctx context.Context) error {
	tick := time.NewTicker(tidyEvery)
	defer tick.Stop()
	made := m.token == ""
	said := "" // the last problem, which is said once
	for {
		err := m.tidyOnce(ctx)
		if !made {
			tokenErr := m.makeToken(ctx)
			made = tokenErr == nil
			err = errors.Join(err, tokenErr)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			said = ""
		case err.Error() != said:
			said = err.Error()
			m.log.Warn("the management's housekeeping goes on trying", "cause", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (m *manager) tidyOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	n, err := m.ledger.Finish(ctx)
	if n > 0 {
		m.log.Info("finished what another keygate had begun", "changes", n)
	}
	if m.spool != nil {
		_, spoolErr := m.spool.Drain(ctx, m.client, m.ledger.Space())
		err = errors.Join(err, spoolErr)
	}
	return err
}

// makeToken writes a token for the administrator of this machine into the data
// directory, if there is no such file. It says so if there is one and etcd does
// not know it, as after a restore of an older snapshot.
func (m *manager) makeToken(ctx context.Context) error {
	text, err := os.ReadFile(m.token)
	if err == nil {
		_, err := m.ledger.Authenticate(ctx, strings.TrimSpace(string(text)))
		if errors.Is(err, ledger.ErrUnauthenticated) {
			m.log.Warn("etcd does not know the admin token in the data directory: delete the file and start again to have a new one", "file", m.token)
			return nil
		}
		return err
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("admin token: %w", err)
	}
	if m.secret == "" { // else it was made, and could not be written
		host, _ := os.Hostname() // for people
		by := ledger.By{Actor: audit.Actor{Kind: audit.ActorKeygate, Name: host}, Reason: "the first start in this data directory"}
		m.secret, _, _, err = m.ledger.CreateToken(ctx, by, access.Token{
			Name: "admin@" + host, Role: access.Admin, Organization: access.AllOrganizations, ExpiresAt: access.NeverExpires,
		})
		if err != nil {
			m.secret = ""
			return fmt.Errorf("admin token: %w", err)
		}
	}
	if err := writeWhole(m.token, m.secret+"\n"); err != nil {
		return fmt.Errorf("admin token: %w", err)
	}
	m.secret = ""
	m.log.Info("made an admin token", "file", m.token)
	return nil
}

// writeWhole writes a file that nobody else may read: whole, or not at all.
func writeWhole(name, content string) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*.tmp") // 0600
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
