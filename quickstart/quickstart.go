// Package quickstart is the world to try keygate in: keygate with its embedded
// etcd, a real Envoy before it and an upstream that echoes what it received,
// all on this machine, with the apps of examples/quickstart in the store.
//
// [Run] starts and stops it, [Feed] tells what happens in it, and [RunTour]
// changes every level and measures how soon Envoy answers otherwise.
package quickstart

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/apigee"
	"keygate/audit"
	"keygate/authz"
	"keygate/config"
	"keygate/envoy"
	"keygate/envoy/proxy"
	apps "keygate/examples/quickstart"
	"keygate/ledger"
	"keygate/seal"
	"keygate/server"
	"keygate/statestore"
	"keygate/statestore/keyspace"
)

// Paths of envoy.QuickstartRoutes.
const (
	WeatherPath = "/weather"
	OrdersPath  = "/orders"
)

const (
	// startTimeout for etcd and the first proof; a large store takes seconds.
	startTimeout = 30 * time.Second
	// throughTimeout for the first check through an Envoy that is ready.
	throughTimeout = 10 * time.Second
	// importTimeout for two apps.
	importTimeout = 10 * time.Second
)

// Config of a World.
type Config struct {
	// Settings of keygate: with the embedded etcd, and ext_authz in plain text.
	// Required.
	Settings *config.Config
	// NewServer completes sc by Settings and makes the server. Required.
	NewServer func(sc server.Config) (*server.Server, error)
	// Envoy is its binary; empty means what proxy.Find finds.
	Envoy string
	// Listen is where Envoy takes requests: an IP address and a port, 0 for one
	// that is free. Errors call it --listen.
	Listen string
	// Manage also serves the management API.
	Manage bool
	// Seal, which may be nil, returns what keeps the sample's consumer keys, so
	// that the API can show them. It is called when nothing is known to be missing.
	Seal func() (*seal.Keyring, error)
	// Logger gets what the parts log; nil discards.
	Logger *slog.Logger
}

// World is a keygate, an Envoy and an upstream that run. Its methods are safe
// for concurrent use.
type World struct {
	settings *config.Config
	seal     *seal.Keyring
	server   *server.Server
	proxy    *proxy.Proxy
	client   *clientv3.Client
	observer atomic.Pointer[Observer]
	imported Imported
}

// Observer is told what happens. Its functions must not block, may be called
// concurrently, and may be nil.
type Observer struct {
	OnDecision func(authz.Decision, time.Duration)
	OnChange   func(statestore.Change)
}

// Imported is what the import of the apps came to.
type Imported struct {
	Report ledger.Report
	// Kept are the statuses that the store had, and that the files have
	// otherwise: those of an earlier run.
	Kept []ledger.Item
	// Names of the apps.
	Names map[authz.AppID]string
}

// Run starts a world, calls use when all of it answers, and stops it when use
// returns, in the reverse order of the start: Envoy, upstream, keygate, etcd.
// Nothing is left running, however it ends.
//
// The context that use gets ends with ctx, or when a part ends by itself; Run
// then returns why it did. Else it returns use's error.
func Run(ctx context.Context, cfg Config, use func(context.Context, *World) error) error {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	running, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	err := run(running, fail, cfg, use)
	if cause := context.Cause(running); cause != nil && ctx.Err() == nil {
		return cause // what use or the start met is only its consequence
	}
	return err
}

func run(ctx context.Context, fail func(error), cfg Config, use func(context.Context, *World) error) (err error) {
	// What may be missing or taken is said before anything starts.
	if cfg.Envoy == "" {
		if cfg.Envoy, err = proxy.Find(ctx); err != nil {
			return fmt.Errorf("%w; then set $ENVOY, or give it with --envoy", err)
		}
	} else if _, err := exec.LookPath(cfg.Envoy); err != nil {
		return fmt.Errorf("--envoy: %w", err)
	}
	if err := checkFree(ctx, cfg.Listen); err != nil {
		return err
	}
	w := &World{settings: cfg.Settings}
	if cfg.Seal != nil {
		if w.seal, err = cfg.Seal(); err != nil {
			return err
		}
	}
	w.server, err = cfg.NewServer(server.Config{
		Drain:  -1, // Envoy, the only client, stops before it
		Manage: cfg.Manage,
		OnDecision: func(d authz.Decision, took time.Duration) {
			if o := w.observer.Load(); o != nil && o.OnDecision != nil {
				o.OnDecision(d, took)
			}
		},
		OnChange: func(c statestore.Change) {
			if o := w.observer.Load(); o != nil && o.OnChange != nil {
				o.OnChange(c)
			}
		},
		Logger: cfg.Logger,
	})
	if err != nil {
		return err
	}
	// start runs a part on a context of its own and returns how to stop it.
	start := func(run func(context.Context) error) (stop func()) {
		part, cancel := context.WithCancel(context.WithoutCancel(ctx))
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := run(part); err != nil {
				fail(err)
			}
		}()
		return func() { cancel(); <-done }
	}
	defer start(w.server.Run)()
	if err := w.awaitStore(ctx); err != nil {
		return err
	}

	etcd := statestore.EtcdConfig{Endpoints: []string{w.Etcd()}}
	if w.client, err = etcd.Dial(); err != nil {
		return err
	}
	defer w.client.Close()
	if err := w.importApps(ctx); err != nil {
		return err
	}

	upstream, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	defer start(func(ctx context.Context) error { return ServeEcho(ctx, upstream) })()

	w.proxy, err = proxy.Start(ctx, proxy.Config{
		Binary: cfg.Envoy,
		Bootstrap: envoy.Bootstrap{
			Listen: cfg.Listen, Authz: []string{reachable(w.server.AuthzAddr())}, Upstream: upstream.Addr().String(),
			KeyHeader: cfg.Settings.KeyHeader, Routes: envoy.QuickstartRoutes(),
		},
		Logger: cfg.Logger,
	})
	if err != nil {
		return fmt.Errorf("start Envoy: %w", err)
	}
	defer start(w.proxy.Run)()
	if err := w.awaitEnvoy(ctx); err != nil {
		return err
	}
	return use(ctx, w)
}

// checkFree says that a port is taken while nothing has been started yet.
// proxy.Start looks again.
func checkFree(ctx context.Context, address string) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("--listen: %s is taken by another process; stop it, or choose another address for Envoy", address)
	case err != nil:
		return fmt.Errorf("--listen: %w", err)
	}
	return l.Close()
}

// reachable is where to connect to what listens on every address.
func reachable(address string) string {
	host, port, err := net.SplitHostPort(address)
	if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return address
}

func (w *World) awaitStore(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := w.server.Store().Await(ctx); err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return ctx.Err()
		}
		return fmt.Errorf("keygate is not ready after %v: %w", startTimeout, err)
	}
	return nil
}

// awaitEnvoy waits until a request without a key is refused by keygate, which
// tells that all of the way is there.
func (w *World) awaitEnvoy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, throughTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	var last error
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.URL()+WeatherPath, nil)
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(req)
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusUnauthorized {
				return nil
			}
			err = fmt.Errorf("a request without a key got %s, want 401", resp.Status)
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return ctx.Err()
			}
			return fmt.Errorf("keygate does not answer through Envoy after %v: %w", throughTimeout, last)
		}
	}
}

// importApps brings the sample into the store. The sample's keys are public, so
// a store with other apps in it is left alone, unless it is the sample's.
func (w *World) importApps(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, importTimeout)
	defer cancel()
	space, org := w.settings.Space, w.settings.Organization
	own := space.Folder(keyspace.AppRecord(org, apps.WeatherApp))
	all := strings.TrimSuffix(own, string(apps.WeatherApp)+"/")
	count := func(prefix string) (int64, error) {
		r, err := w.client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", prefix, err)
		}
		return r.Count, nil
	}
	others, err := count(all)
	if err != nil {
		return err
	}
	if sample, err := count(own); err != nil {
		return err
	} else if others > 0 && sample == 0 {
		return fmt.Errorf("organization %q in %s holds apps that are not the quickstart's, whose keys are public: choose another --data-dir", org, w.settings.DataDir)
	}

	importer := ledger.NewImporter(ledger.ImporterConfig{
		KV: w.client, Space: space, Organization: org, Seal: w.seal,
		Actor: audit.Actor{Kind: audit.ActorKeygate, Name: "quickstart"},
	})
	w.imported.Names = map[authz.AppID]string{}
	for _, name := range append([]string{apps.CatalogFile}, apps.Files()...) {
		var refused error
		in := apigee.NewReader(apigee.ReaderConfig{Name: name}, bytes.NewReader(apps.Read(name)))
		err := importer.Import(ctx, in, func(o ledger.Outcome) {
			w.imported.Report.Add(o)
			if o.App != "" {
				w.imported.Names[o.App] = o.Name
			}
			for _, item := range o.Items {
				switch {
				case item.Action == ledger.Refused:
					refused = fmt.Errorf("import %s: refused: %s", name, item.Reason)
				case item.Action == ledger.Kept && item.Submitted != "":
					w.imported.Kept = append(w.imported.Kept, item)
				}
			}
		})
		if err != nil {
			return fmt.Errorf("import %s: %w", name, err)
		}
		if refused != nil {
			return refused
		}
	}
	return nil
}

// URL where Envoy takes requests, without a slash at its end.
func (w *World) URL() string { return w.proxy.URL() }

// Etcd is the endpoint of the store, "unix:///…/etcd.sock".
func (w *World) Etcd() string { return w.server.Status().Etcd.Endpoints[0] }

// AuthzAddr is where ext_authz is served.
func (w *World) AuthzAddr() string { return w.server.AuthzAddr() }

// HealthAddr is where health and metrics are served.
func (w *World) HealthAddr() string { return w.server.HealthAddr() }

// ManagementAddr is where the management API is served; empty if it is not.
func (w *World) ManagementAddr() string { return w.server.ManagementAddr() }

// Imported tells what the import of the apps came to. The caller does not
// change it.
func (w *World) Imported() Imported { return w.imported }

// Follow tells o every decision and every change from now on, and whoever
// followed before no longer.
func (w *World) Follow(o Observer) { w.observer.Store(&o) }

// Decide answers, as a check would, for one of the sample's keys. No observer
// is told.
func (w *World) Decide(ctx context.Context, key string, product authz.ProductName) authz.Decision {
	a := authz.Authorizer{Source: w.server.Store()}
	return a.Decide(ctx, authz.Request{
		Organization: w.settings.Organization, KeyID: apps.KeyID(key), Products: []authz.ProductName{product},
	})
}

// ServeEcho serves proxy.Echo on l until ctx ends, and then returns nil. It
// closes l.
func ServeEcho(ctx context.Context, l net.Listener) error {
	s := &http.Server{Handler: proxy.Echo(), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("upstream: %w", err)
	}
	return nil
}
