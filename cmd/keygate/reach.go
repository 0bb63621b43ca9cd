package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/config"
	"keygate/statestore"
	"keygate/statestore/embedded"
)

// How long a command that does one thing waits for etcd.
const (
	startTimeout = 30 * time.Second // for one that it starts itself
	reachTimeout = 5 * time.Second  // for one that runs
)

// externalEtcd is how to reach the cluster that --etcd-endpoints names.
func externalEtcd(cfg *config.Config) (statestore.EtcdConfig, error) {
	if _, err := cfg.EtcdPassword(); err != nil { // now, where somebody reads the error
		return statestore.EtcdConfig{}, exitWith(exitUsage, fmt.Errorf("etcd password: %w", err))
	}
	return statestore.EtcdConfig{
		Endpoints: cfg.EtcdEndpoints,
		CACert:    cfg.EtcdCACert, Cert: cfg.EtcdCert, Key: cfg.EtcdKey,
		User: cfg.EtcdUser, ReadPassword: cfg.EtcdPassword,
	}, nil
}

// absent says what to do when there is no data directory.
type absent bool

const (
	createAbsent absent = true  // the command writes: begin a new one
	refuseAbsent absent = false // the command reads: there is nothing
)

// reachEtcd returns how to reach the etcd that cfg names, for a command that
// does one thing. When it is the embedded one and no process serves it, it runs
// as a child of this command until release is called. release waits for its end
// and may be called once; it is not nil when err is.
func (a *app) reachEtcd(ctx context.Context, cfg *config.Config, dataDir absent, log *slog.Logger) (etcd statestore.EtcdConfig, release func(), err error) {
	if !cfg.Embedded() {
		etcd, err := externalEtcd(cfg)
		return etcd, func() {}, err
	}
	endpoint, err := embedded.Endpoint(cfg.DataDir)
	if err != nil {
		return etcd, nil, exitWith(exitUsage, err)
	}
	etcd.Endpoints = []string{endpoint}
	if embedded.Running(ctx, cfg.DataDir) {
		return etcd, func() {}, nil
	}
	if _, err := os.Stat(cfg.DataDir); errors.Is(err, fs.ErrNotExist) && dataDir == refuseAbsent {
		return etcd, nil, exitWith(exitNotFound, fmt.Errorf("no data in %s: give --data-dir or --etcd-endpoints, or start keygate serve", cfg.DataDir))
	}

	child, err := embedded.NewChild(embedded.ChildConfig{DataDir: cfg.DataDir, QuotaBytes: cfg.EtcdQuota, Logger: log})
	if err != nil {
		return etcd, nil, err
	}
	childCtx, stop := context.WithCancel(context.WithoutCancel(ctx)) // it outlives an interrupted command's last words
	ended := make(chan error, 1)
	go func() { ended <- child.Run(childCtx) }()
	release = func() {
		stop()
		<-ended
	}
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case <-child.Ready():
		return etcd, release, nil
	case err := <-ended:
		stop()
		return etcd, nil, exitWith(exitUnreachable, fmt.Errorf("start etcd in %s: %w", cfg.DataDir, err))
	case <-ctx.Done():
		release()
		return etcd, nil, ctx.Err()
	case <-timeout.C:
		release()
		return etcd, nil, exitWith(exitUnreachable, fmt.Errorf("etcd in %s is not ready after %v", cfg.DataDir, startTimeout))
	}
}

// dial returns a client that has had an answer, so that a cluster that is not
// there is said at once and in its own words.
func dial(ctx context.Context, cfg *config.Config, etcd statestore.EtcdConfig) (*clientv3.Client, error) {
	where := strings.Join(etcd.Endpoints, ",")
	client, err := etcd.Dial()
	if err != nil {
		return nil, fmt.Errorf("reach etcd at %s: %w", where, err)
	}
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	if _, err := client.Get(ctx, cfg.Space.Probe()); err != nil {
		_ = client.Close()
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("no answer within %v: %w", reachTimeout, err)
		}
		return nil, fmt.Errorf("reach etcd at %s: %w", where, err)
	}
	return client, nil
}
