package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"keygate/config"
	"keygate/server"
	"keygate/statestore"
	"keygate/statestore/embedded"
)

func newServeCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve ext_authz and the management API",
		Long: `Serve Envoy's ext_authz checks, and the management API. Without --etcd-endpoints
keygate runs an etcd of its own as a child process, with its data and its socket
in --data-dir; with it keygate uses your cluster and runs nothing beside itself.

Checks are refused with 503 until the first proof that the statuses are current,
and whenever the last such proof is older than --staleness-budget.

The management API wants a token (keygate token create). The first start in a
data directory leaves one for the administrator of this machine in admin-token,
which the commands that need it find there, and makes the sealing key.`,
		Example: `  keygate serve --log-decisions denied
  keygate serve --etcd-endpoints https://etcd-0:2379,https://etcd-1:2379`,
		GroupID: groupRun,
		Args:    noArguments,
	}
	flags := config.Register(cmd.Flags(), config.External, config.Embedded, config.Keys, config.Org, config.Authz, config.Health, config.Management, config.Sealing)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		return a.serve(cmd, cfg, true)
	}
	return cmd
}

func newAuthzCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "authz",
		Short: "Serve ext_authz alone, from a cluster of yours",
		Long: `Serve Envoy's ext_authz checks from an etcd cluster, and nothing else: the data
plane alone, for a sidecar. It reads the keys below --prefix and writes its own
registration beside them, below <prefix>.replicas/, by which a revocation knows
that it has taken effect here. With --register=false it only reads, and stands
outside of the receipts.`,
		Example: `  keygate authz --etcd-endpoints https://etcd-0:2379,https://etcd-1:2379
  # Beside another keygate's embedded etcd, for an Envoy on this machine
  keygate authz --etcd-endpoints unix:///var/lib/keygate/etcd.sock \
    --authz-listen unix:///run/keygate/authz.sock`,
		GroupID: groupRun,
		Args:    noArguments,
	}
	flags := config.Register(cmd.Flags(), config.External, config.Keys, config.Org, config.Authz, config.Health)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		if cfg.Embedded() {
			return usageError(cmd, "no --etcd-endpoints: authz runs no etcd of its own")
		}
		return a.serve(cmd, cfg, false)
	}
	return cmd
}

// serve runs a server until the command is stopped.
func (a *app) serve(cmd *cobra.Command, cfg *config.Config, manage bool) error {
	out := newServerLog(a.stderr)
	s, err := a.newServer(cfg, server.Config{Logger: a.logger(cfg, out), Manage: manage})
	if err != nil {
		return err
	}
	defer out.start()()
	defer server.SetGCHeadroom(cfg.GCHeadroom)()
	return s.Run(cmd.Context())
}

// newServer makes a server of cfg; the rest of sc is the caller's.
func (a *app) newServer(cfg *config.Config, sc server.Config) (*server.Server, error) {
	sc.Settings, sc.Version = cfg, buildVersion().Version
	var err error
	if sc.Manage {
		if sc.Seal, err = sealingKeys(cfg); err != nil {
			return nil, err
		}
	}
	if cfg.Embedded() {
		if sc.Child, err = embedded.NewChild(embedded.ChildConfig{DataDir: cfg.DataDir, QuotaBytes: cfg.EtcdQuota, Logger: sc.Logger}); err != nil {
			return nil, fmt.Errorf("embedded etcd: %w", err)
		}
		sc.Etcd = statestore.EtcdConfig{Endpoints: []string{sc.Child.Endpoint()}}
	} else if sc.Etcd, err = externalEtcd(cfg); err != nil {
		return nil, err
	}
	return server.New(sc)
}
