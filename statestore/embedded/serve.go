//go:build !noembed

package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
)

// memberName and peerHost stand in the data.
const (
	memberName = "keygate"
	peerHost   = "127.0.0.1:1" // a single member: never dialled, never listened on
)

// Serve runs a single-member etcd in this process until ctx ends, and then
// stops it in order and returns nil. It calls ready once, when etcd answers;
// ready may be nil.
//
// An error says why etcd did not start or stopped by itself; the process
// should then end with the status that [ExitCode] gives, because a start that
// fails half way may leave files open. When a write to the disk fails later,
// the *process ends at once* with status 1 and a line in the log, as etcd
// always does: what is in memory can no longer be trusted. Programs that have
// anything else to do run Serve in a [Child].
//
// In the process that [Restore] starts to read the data, it does that and ends.
func Serve(ctx context.Context, cfg Config, ready func()) error {
	if folder := os.Getenv(readVariable); folder != "" {
		return serveReader(ctx, cfg, folder)
	}
	socket, err := socketPath(cfg.DataDir)
	if err != nil {
		return err
	}
	endpoint, err := Endpoint(cfg.DataDir)
	if err != nil {
		return err
	}
	dir, err := openDirectory(ctx, filepath.Dir(socket))
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer dir.close()

	logger := cfg.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	log := newBridge(logger)
	go log.run()
	defer log.flush()

	stopping, stop := context.WithCancel(context.Background())
	defer stop()
	config := embedConfig(cfg, dir, log)
	config.GRPCAdditionalServerOptions = []grpc.ServerOption{grpc.ChainStreamInterceptor(endStreams(stopping))}
	e, err := start(ctx, config, log)
	if err != nil {
		return fmt.Errorf("start etcd in %s: %w", dir.path, err)
	}
	defer func() {
		log.closing.Store(true)
		stop()
		e.Close()
	}()
	if n := len(e.Server.Cluster().Members()); n > 1 { // 0: not applied yet
		return permanent(fmt.Errorf("start etcd in %s: the data is one member's of a cluster of %d, and keygate runs a cluster of one: restore a snapshot of it instead", dir.path, n))
	}

	select {
	case <-ctx.Done():
		return nil
	case err := <-e.Err():
		return stopped(err)
	case <-e.Server.StopNotify():
		return stopped(nil)
	case <-e.Server.ReadyNotify():
	}
	log.started.Store(true)
	logger.Info("etcd is serving", "endpoint", endpoint)
	if ready != nil {
		ready()
	}

	select {
	case <-ctx.Done():
		return nil
	case err := <-e.Err():
		return stopped(err)
	case <-e.Server.StopNotify():
		return stopped(nil)
	}
}

func stopped(err error) error {
	if err == nil {
		return errors.New("etcd stopped by itself")
	}
	return fmt.Errorf("etcd stopped by itself: %w", err)
}

// embedConfig is the whole difference between etcd's defaults and keygate's.
func embedConfig(cfg Config, dir *directory, log *bridge) *embed.Config {
	c := embed.NewConfig()
	c.Name = memberName
	c.Dir = dir.path
	c.InitialClusterToken = dir.token

	// etcd listens for peers at the URL's Host alone. A parsed unix URL has an
	// empty one, and etcd would open an abstract socket for everybody.
	c.ListenPeerUrls = []url.URL{{Scheme: "unix", Host: filepath.Join(dir.path, peerSocket)}}
	c.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: peerHost}}
	c.ListenClientUrls = []url.URL{{Scheme: "unix", Path: filepath.Join(dir.path, clientSocket)}}
	c.AdvertiseClientUrls = c.ListenClientUrls
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.EnableGRPCGateway = false // HTTP and JSON beside gRPC on the same socket

	// Nobody else votes, so the election timeout is only how long a restart
	// waits for itself: 0.2 s instead of 1 s.
	c.TickMs, c.ElectionMs = 20, 200

	// Long enough for every watcher that was cut off to resume where it was.
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModePeriodic, "1h"
	c.QuotaBackendBytes = cfg.QuotaBytes
	if c.QuotaBackendBytes == 0 {
		c.QuotaBackendBytes = DefaultQuotaBytes
	}
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(log.zap())
	return c
}

// startGrace is how long a start that is no longer wanted may take to come to
// its end, from where it can be undone.
const startGrace = 3 * time.Second

// start turns etcd's ways of giving up during a start into an error: an error,
// a log line that ends the process, a panic. etcd's start cannot be
// interrupted: a start that goes on after ctx has ended is waited for, and then
// left to the end of the process.
func start(ctx context.Context, c *embed.Config, log *bridge) (*embed.Etcd, error) {
	type result struct {
		e   *embed.Etcd
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer func() {
			if v := recover(); v != nil {
				done <- result{err: fmt.Errorf("the data is damaged or was not written by etcd (panic: %v)", v)}
			}
		}()
		e, err := embed.StartEtcd(c)
		done <- result{e, err}
	}()
	var err error
	ended := ctx.Done()
	var giveUp <-chan time.Time
waiting:
	for {
		select {
		case r := <-done:
			if r.err == nil {
				return r.e, nil
			}
			err = r.err
			break waiting
		case err = <-log.fatal:
			break waiting
		case <-ended:
			ended, giveUp = nil, time.After(startGrace)
		case <-giveUp:
			return nil, errors.New("it is waiting: another process, such as etcdutl, may be using the database")
		}
	}
	// What was left open ends with the process; the sockets are gone at once.
	log.closing.Store(true)
	for _, name := range []string{clientSocket, peerSocket} {
		os.Remove(filepath.Join(c.Dir, name))
	}
	for _, shortage := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM} {
		if errors.Is(err, shortage) {
			return nil, err
		}
	}
	return nil, permanent(err)
}
