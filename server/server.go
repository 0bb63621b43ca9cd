// Package server puts keygate together: the etcd child, the store, the
// ext_authz listener, health and metrics, the management, started and stopped in
// an order that never answers more than is known.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"keygate/authz"
	"keygate/config"
	"keygate/envoy"
	"keygate/seal"
	"keygate/statestore"
	"keygate/statestore/embedded"
)

const (
	// DefaultDrain is three times the 1 s between two health checks of the Envoy
	// configuration that keygate brings along.
	DefaultDrain = 3 * time.Second
	// stopTimeout is how long calls under way may take after the drain.
	stopTimeout = 5 * time.Second
	// freshEvery is how often the health service follows the store.
	freshEvery = 50 * time.Millisecond
)

// Config of a Server.
type Config struct {
	// Settings, already checked. Required.
	Settings *config.Config
	// Etcd to read. With a Child it is the child's endpoint.
	Etcd statestore.EtcdConfig
	// Child is the embedded etcd, which Run runs; nil for an external cluster.
	Child *embedded.Child
	// Manage also serves the management API, unless the settings turn it off, and
	// keeps the audit trail. Without it the server is the data plane alone.
	Manage bool
	// Seal keeps consumer keys and secrets that the API creates; nil does not.
	Seal *seal.Keyring
	// Version that /version and /status tell.
	Version string
	// Drain is how long the server goes on answering after it has said that it
	// is stopping, so that Envoy can turn away. Zero means DefaultDrain,
	// negative none.
	Drain time.Duration
	// Now is the wall clock that the expiry of keys follows, and nothing else;
	// nil means time.Now. It must be safe for concurrent use.
	Now func() time.Time
	// OnDecision and OnChange are told every decision and every event on a
	// record. They must not block, and may be called concurrently. May be nil.
	OnDecision func(authz.Decision, time.Duration)
	OnChange   func(statestore.Change)
	// Logger; nil discards.
	Logger *slog.Logger
}

// Server is one replica. Its methods are safe for concurrent use.
type Server struct {
	cfg     Config
	log     *slog.Logger
	began   time.Time
	store   *statestore.Store
	backend *statestore.Etcd
	metrics *metrics
	clock   *wallClock // looked at by followStore alone
	events  *eventLog
	manager *manager // nil: the data plane alone

	authzListener, healthListener net.Listener
	authzHTTPListener             net.Listener // nil: checks come by gRPC alone
	grpc                          *grpc.Server
	authzHTTP                     *http.Server // nil with its listener
	health                        *health.Server
	http                          *http.Server

	draining atomic.Bool
}

// New checks what cfg names and takes its addresses; it starts nothing. An
// error says which setting is at fault. A server that was made must be Run, or
// Closed.
func New(cfg Config) (_ *Server, err error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Drain == 0 {
		cfg.Drain = DefaultDrain
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Server{cfg: cfg, log: cfg.Logger, began: time.Now(), clock: newWallClock(cfg.Now), health: health.NewServer()}
	s.setServing(false)
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	set := cfg.Settings
	if s.authzListener, err = listen("authz-listen", set.AuthzListen); err != nil {
		return nil, err
	}
	if set.AuthzHTTPListen != (config.Address{}) {
		if s.authzHTTPListener, err = listen("authz-http-listen", set.AuthzHTTPListen); err != nil {
			return nil, err
		}
	}
	if s.healthListener, err = listen("health-listen", set.HealthListen); err != nil {
		return nil, err
	}
	if s.backend, err = statestore.NewEtcd(cfg.Etcd); err != nil {
		return nil, err
	}
	s.metrics = newMetrics()
	s.events = newEventLog(set.LogDecisions, s.log)
	var registry statestore.Registry // of which nil is none
	if set.Register {
		registry = s.backend
	}
	s.store, err = statestore.New(statestore.Config{
		Backend: s.backend, Space: set.Space, StalenessBudget: set.StalenessBudget, Logger: s.log,
		IndexRecords: set.IndexRecords,
		Registry:     registry, Version: cfg.Version, OnChange: s.onChange, OnApply: s.metrics.applied,
	})
	if err != nil {
		return nil, err
	}
	s.metrics.watch(s.store)
	service, err := envoy.New(envoy.Config{
		Authorizer: &authz.Authorizer{Source: s.store, Now: cfg.Now},
		KeyHeader:  set.KeyHeader, KeyQuery: set.KeyQuery, DenialBody: set.DenialBody, StandardCodec: set.AuthzCodec == "standard",
		Organization: set.Organization, OnDecision: s.onDecision, Logger: s.log,
	})
	if err != nil {
		return nil, err
	}
	if s.grpc, err = s.newGRPC(service); err != nil {
		return nil, err
	}
	if s.authzHTTPListener != nil {
		if s.authzHTTP, err = s.newAuthzHTTP(service); err != nil {
			return nil, err
		}
	}
	s.http = s.newHTTP()
	if cfg.Manage {
		if s.manager, err = newManager(cfg); err != nil {
			return nil, err
		}
		s.metrics.registry.MustRegister(chainCollector{s.manager.follower})
	}
	return s, nil
}

// Store that the server answers from.
func (s *Server) Store() *statestore.Store { return s.store }

// AuthzAddr is where ext_authz is served, in the form of --authz-listen.
func (s *Server) AuthzAddr() string { return address(s.authzListener) }

// AuthzHTTPAddr is where Envoy's HTTP ext_authz is served, likewise; empty if it
// is not.
func (s *Server) AuthzHTTPAddr() string {
	if s.authzHTTPListener == nil {
		return ""
	}
	return address(s.authzHTTPListener)
}

// ManagementAddr is where the management API is served, likewise; empty if it
// is not.
func (s *Server) ManagementAddr() string {
	if s.manager == nil || s.manager.listener == nil {
		return ""
	}
	return address(s.manager.listener)
}

// HealthAddr is where health and metrics are served, likewise.
func (s *Server) HealthAddr() string { return address(s.healthListener) }

func address(l net.Listener) string {
	if l.Addr().Network() == "unix" {
		return "unix://" + l.Addr().String()
	}
	return l.Addr().String()
}

// Close gives the addresses up without a Run.
func (s *Server) Close() {
	for _, l := range []net.Listener{s.authzListener, s.authzHTTPListener, s.healthListener} {
		if l != nil {
			_ = l.Close()
		}
	}
	if s.backend != nil {
		_ = s.backend.Close()
	}
	if s.manager != nil {
		s.manager.close()
	}
}

// Run serves until ctx ends or a part fails for good, and returns when all has
// stopped: nil after ctx, else why.
//
// Checks are answered from the start, and refused as stale until the first
// proof; only then do health and readiness say yes. To stop, the server says
// so, goes on answering for the drain, ends the calls under way, and then its
// parts in the reverse order of their start.
func (s *Server) Run(ctx context.Context) error {
	defer s.Close()
	s.log.Info("keygate starts", "version", s.cfg.Version, "authz", s.AuthzAddr(), "health", s.HealthAddr(), "etcd", s.cfg.Etcd.Endpoints)
	if !s.cfg.Settings.Register {
		s.log.Warn("not registering: a receipt does not count on this replica", "refuses_after", s.cfg.Settings.StalenessBudget)
	}
	if plain := inPlainText(s.cfg.Etcd); len(plain) > 0 {
		s.log.Warn("etcd is reached without TLS: whoever stands in between can open any key; use https://", "endpoints", plain)
	}
	if s.authzHTTP != nil {
		s.log.Info("Envoy's HTTP ext_authz is served", "address", s.AuthzHTTPAddr())
	}
	failed := make(chan error, 16) // more than there are parts
	// start runs a part on a context of its own and returns how to stop it.
	start := func(what string, run func(context.Context) error) (stop func()) {
		part, cancel := context.WithCancel(context.WithoutCancel(ctx))
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := run(part); err != nil {
				failed <- fmt.Errorf("%s: %w", what, err)
			}
		}()
		return func() { cancel(); <-done }
	}

	defer start("event log", s.events.run)()
	defer start("health listener", func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { _ = s.http.Close() })()
		if err := s.http.Serve(s.healthListener); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})()
	if s.cfg.Child != nil {
		defer start("embedded etcd", s.cfg.Child.Run)()
	}
	stopStore := start("store", s.afterChild(s.store.Run))
	defer stopStore()
	if m := s.manager; m != nil {
		defer start("audit trail", s.afterChild(m.follower.Run))()
		defer start("housekeeping", s.afterChild(m.tidy))()
		if m.listener != nil {
			s.log.Info("the management API is served", "address", s.ManagementAddr())
			defer start("management listener", m.serve)()
		}
	}
	stopHealth := start("freshness", s.followStore)
	stopGRPC := start("authz listener", func(ctx context.Context) error {
		stopped := make(chan struct{})
		defer context.AfterFunc(ctx, func() { defer close(stopped); s.stopGRPC() })()
		err := s.grpc.Serve(answering{s.authzListener})
		if ctx.Err() != nil {
			<-stopped
		}
		return err
	})

	stopAuthzHTTP := func() {}
	if s.authzHTTP != nil {
		stopAuthzHTTP = start("authz HTTP listener", s.serveAuthzHTTP)
	}

	var err error
	select {
	case <-ctx.Done():
		s.log.Info("stopping", "drain", s.cfg.Drain)
	case err = <-failed:
		s.log.Error("stopping", "cause", err)
	}
	s.draining.Store(true)
	stopHealth()
	s.setServing(false)
	if err == nil && s.cfg.Drain > 0 {
		select {
		case <-time.After(s.cfg.Drain):
		case err = <-failed:
		}
	}
	// Together, and each within stopTimeout.
	stopped := make(chan struct{})
	go func() { defer close(stopped); stopAuthzHTTP() }()
	stopGRPC()
	<-stopped
	return err
}

// afterChild delays a part until the embedded etcd is ready: a client that was
// refused waits a second before it tries again.
func (s *Server) afterChild(run func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if s.cfg.Child != nil {
			select {
			case <-s.cfg.Child.Ready():
			case <-ctx.Done():
			}
		}
		return run(ctx)
	}
}

// inPlainText returns the endpoints that are reached without TLS over what may
// be a network.
func inPlainText(c statestore.EtcdConfig) (all []string) {
	for _, e := range c.Endpoints {
		scheme, address, ok := strings.Cut(e, "://")
		if !ok {
			address = e
		}
		switch {
		case ok && scheme != "http", !ok && (c.CACert != "" || c.Cert != ""):
		case config.Address{Network: "tcp", Address: address}.Local():
		default:
			all = append(all, e)
		}
	}
	return all
}

// stopGRPC lets calls under way end. Whoever is not done in time gets a
// refusal: the proof goes before the connection does.
func (s *Server) stopGRPC() {
	timer := time.AfterFunc(stopTimeout, func() {
		s.store.Expire()
		s.grpc.Stop()
	})
	defer timer.Stop()
	s.grpc.GracefulStop()
}

// serveAuthzHTTP serves until ctx ends, and then lets checks under way end as
// stopGRPC does.
func (s *Server) serveAuthzHTTP(ctx context.Context) error {
	stopped := make(chan struct{})
	defer context.AfterFunc(ctx, func() { defer close(stopped); s.stopAuthzHTTP() })()
	serve := s.authzHTTP.Serve
	if s.authzHTTP.TLSConfig != nil {
		serve = func(l net.Listener) error { return s.authzHTTP.ServeTLS(l, "", "") }
	}
	err := serve(answering{s.authzHTTPListener})
	if ctx.Err() != nil {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (s *Server) stopAuthzHTTP() {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := s.authzHTTP.Shutdown(ctx); err != nil {
		s.store.Expire()
		_ = s.authzHTTP.Close()
	}
}

// followStore keeps the gRPC health service true: SERVING only under a proof. It
// also looks at the wall clock, on which no proof depends.
func (s *Server) followStore(ctx context.Context) error {
	tick := time.NewTicker(freshEvery)
	defer tick.Stop()
	serving := false
	for {
		if err := s.store.Fresh(); (err == nil) != serving {
			serving = err == nil
			s.setServing(serving)
			if serving {
				s.log.Info("serving", "revision", s.store.Status().AppliedRevision)
			} else {
				s.log.Error("not serving: checks are refused", "cause", err)
			}
		}
		if back := s.clock.wentBack(); back > clockJump {
			s.metrics.clockBack.Inc()
			s.log.Warn("the wall clock went back: keys seen expired stay expired, others follow it", "by", back.Round(time.Millisecond))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// setServing tells the health service, under the name of the whole server and
// of the ext_authz service.
func (s *Server) setServing(serving bool) {
	status := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if serving {
		status = grpc_health_v1.HealthCheckResponse_SERVING
	}
	for _, service := range []string{"", envoy.ServiceName} {
		s.health.SetServingStatus(service, status)
	}
}

// ready tells why the server should not be sent checks; nil if it should.
func (s *Server) ready() error {
	if s.draining.Load() {
		return errors.New("stopping")
	}
	return s.store.Fresh()
}

func (s *Server) onDecision(d authz.Decision, took time.Duration) {
	s.metrics.decided(d, took)
	s.events.decision(d, took)
	if s.cfg.OnDecision != nil {
		s.cfg.OnDecision(d, took)
	}
}

func (s *Server) onChange(c statestore.Change) {
	s.events.change(c)
	if s.cfg.OnChange != nil {
		s.cfg.OnChange(c)
	}
}

// listen takes an address. flag names the setting, for the error.
func listen(flag string, a config.Address) (net.Listener, error) {
	if a.Network == "unix" {
		if err := removeStale(a.Address); err != nil {
			return nil, fmt.Errorf("--%s %s: %w", flag, a, err)
		}
	}
	l, err := net.Listen(a.Network, a.Address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("--%s: %s is taken by another process; stop it, or choose another address", flag, a)
	}
	if err != nil {
		return nil, fmt.Errorf("--%s: %w", flag, err)
	}
	return l, nil
}

// removeStale removes a socket that a killed process left behind, and nothing
// else: not one that somebody serves, not a file.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != os.ModeSocket:
		return errors.New("there is a file that is no socket")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = c.Close()
		return errors.New("taken by another process; stop it, or choose another address")
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}
