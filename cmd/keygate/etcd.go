package main

import (
	"log/slog"

	"github.com/spf13/cobra"

	"keygate/config"
	"keygate/statestore/embedded"
)

func newEtcdCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "etcd",
		Short: "Run the embedded etcd alone",
		Long: `Run the embedded etcd alone: one member, on the unix socket etcd.sock in the
data directory. keygate serve starts this command by itself, as a child; run it
to reach the data while nothing serves.`,
		Example: `  keygate etcd --data-dir /var/lib/keygate
  etcdctl --endpoints unix://$PWD/keygate-data/etcd.sock get --prefix /keygate/`,
		GroupID: groupRun,
		Args:    noArguments,
	}
	flags := config.Register(cmd.Flags(), config.Embedded)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		environ := a.environ
		if embedded.Supervised() {
			environ = nil // the parent has read it, and says all that counts in flags
		}
		cfg, err := flags.Load(environ)
		if err != nil {
			return configError(err)
		}
		if _, err := embedded.Endpoint(cfg.DataDir); err != nil {
			return exitWith(exitUsage, err)
		}
		log := a.logger(cfg, a.stderr)
		if embedded.Supervised() {
			log = newLogger(a.stderr, "json", slog.LevelDebug) // the parent formats and filters
		}
		err = embedded.Serve(cmd.Context(), embedded.Config{DataDir: cfg.DataDir, QuotaBytes: cfg.EtcdQuota, Logger: log}, nil)
		if err != nil {
			return exitWith(embedded.ExitCode(err), err)
		}
		return nil
	}
	return cmd
}
