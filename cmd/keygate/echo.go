package main

import (
	"fmt"
	"net"

	"github.com/spf13/cobra"

	"keygate/quickstart"
)

func newEchoCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "echo",
		Short: "Serve the quickstart's upstream: it answers with what it received",
		Long: `Serve an upstream for trying things out: it answers any request with what it
received of it, as JSON, so that one sees what Envoy and keygate let through.
It asks nobody for a key.`,
		Example: `  keygate echo
  keygate echo --listen 0.0.0.0:8080`,
		GroupID: groupRun,
		Args:    noArguments,
		Hidden:  true, // of use to docker-compose.yaml
	}
	listen := cmd.Flags().String("listen", "127.0.0.1:8080", "`address` to serve on, host:port")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		l, err := new(net.ListenConfig).Listen(cmd.Context(), "tcp", *listen)
		if err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
		if _, err := fmt.Fprintf(a.stdout, "echo on http://%s\n", l.Addr()); err != nil {
			return err
		}
		return quickstart.ServeEcho(cmd.Context(), l)
	}
	return cmd
}
