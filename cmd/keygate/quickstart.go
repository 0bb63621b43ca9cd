package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"keygate/authz"
	"keygate/config"
	apps "keygate/examples/quickstart"
	"keygate/ledger"
	"keygate/quickstart"
	"keygate/seal"
	"keygate/server"
	"keygate/statestore/keyspace"
)

func newQuickstartCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "quickstart",
		Short: "Try keygate: with Envoy, two sample apps and what to type",
		Long: `Run keygate with its embedded etcd, a real Envoy before it and an upstream that
echoes, with two sample apps imported; print what to type, and then a line for
each decision and each status change. Ctrl-C stops all of it; the exit code is
then 0.

The data stays in --data-dir: the next run starts from where this one ended, and
opens nothing that was closed. The keys of the sample are public, so a data
directory that holds other apps is refused.

Envoy is --envoy, else $ENVOY, else the one on PATH.`,
		Example: `  keygate quickstart
  keygate quickstart --envoy .tools/envoy --listen 127.0.0.1:0`,
		GroupID: groupRun,
		Args:    noArguments,
	}
	envoy, listen := envoyFlags(cmd, "127.0.0.1:10000")
	flags := config.Register(cmd.Flags(), config.Embedded, config.Keys, config.Org, config.Authz, config.Management, config.Sealing, config.Health)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		if err := checkListen(cmd, *listen); err != nil {
			return err
		}
		switch {
		case !cfg.Embedded():
			return usageError(cmd, "%s: quickstart runs an etcd of its own", cfg.Source("etcd-endpoints"))
		case cfg.AuthzTLSCert != "":
			return usageError(cmd, "%s: quickstart's Envoy speaks to keygate in plain text", cfg.Source("authz-tls-cert"))
		}
		world := a.worldConfig(cfg, *envoy, *listen)
		world.Manage = true
		world.Seal = func() (*seal.Keyring, error) { return sealingKeys(cfg) }
		err = quickstart.Run(cmd.Context(), world, func(ctx context.Context, w *quickstart.World) error {
			feed := quickstart.NewFeed(a.stdout, w, a.colour())
			if err := a.printTry(ctx, cfg, w); err != nil {
				return err
			}
			w.Follow(feed.Observer())
			return feed.Run(ctx)
		})
		return err
	}
	return cmd
}

// envoyFlags are those of commands that run an Envoy.
func envoyFlags(cmd *cobra.Command, listenDefault string) (envoy, listen *string) {
	envoy = cmd.Flags().String("envoy", "", "Envoy's `binary` (default $ENVOY, else the one on PATH)")
	listen = cmd.Flags().String("listen", listenDefault, "`address` where Envoy takes requests; port 0 means a free one")
	return envoy, listen
}

// checkListen wants what Envoy does, which resolves no names to listen on.
func checkListen(cmd *cobra.Command, address string) error {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return usageError(cmd, "--listen: %q is not an IP address and a port, such as 127.0.0.1:10000", address)
	}
	return nil
}

// worldConfig is that of a world with the settings cfg. It logs warnings only,
// unless asked for more.
func (a *app) worldConfig(cfg *config.Config, envoy, listen string) quickstart.Config {
	return quickstart.Config{
		Settings:  cfg,
		NewServer: func(sc server.Config) (*server.Server, error) { return a.newServer(cfg, sc) },
		Envoy:     envoy,
		Listen:    listen,
		Logger:    a.toolLogger(cfg),
	}
}

// colour tells whether standard output takes it, and nobody asked for none
// (https://no-color.org).
func (a *app) colour() bool {
	if !isTerminal(a.stdout) {
		return false
	}
	return !slices.ContainsFunc(a.environ, func(e string) bool {
		name, value, _ := strings.Cut(e, "=")
		return name == "NO_COLOR" && value != "" || name == "TERM" && value == "dumb"
	})
}

// printTry says what runs where, and what to type.
func (a *app) printTry(ctx context.Context, cfg *config.Config, w *quickstart.World) error {
	var out strings.Builder
	imported := w.Imported()
	fmt.Fprintf(&out, "Envoy     %s, before an upstream that echoes\n", w.URL())
	fmt.Fprintf(&out, "keygate   ext_authz on %s, health and metrics on %s\n", w.AuthzAddr(), w.HealthAddr())
	if address := w.ManagementAddr(); address != "" {
		fmt.Fprintf(&out, "API       %s, its documentation at /docs, an admin token in %s\n", managementURL(cfg, w), printable(cfg.AdminTokenPath()))
	}
	fmt.Fprintf(&out, "etcd      %s\n", w.Etcd())
	fmt.Fprintf(&out, "apps      %d created, %d from an earlier run\n",
		imported.Report.Apps[ledger.Created], imported.Report.Apps[ledger.Changed]+imported.Report.Apps[ledger.Unchanged])
	for _, item := range imported.Kept {
		fmt.Fprintf(&out, "kept      %s = %s\n", printable(item.Path), printable(word(item.Stored)))
	}
	for _, block := range tries(ctx, cfg, w) {
		fmt.Fprintf(&out, "\n%s\n", block)
	}
	out.WriteString("\nDecisions and status changes, until Ctrl-C:\n\n")
	_, err := io.WriteString(a.stdout, out.String())
	return err
}

// tries are blocks of lines to paste into another terminal.
func tries(ctx context.Context, cfg *config.Config, w *quickstart.World) []string {
	curl := func(key, path string) string {
		return fmt.Sprintf("  curl -i -H %s %s%s", shellQuote(cfg.KeyHeader+": "+key), w.URL(), path)
	}
	etcdctl, hint := findEtcdctl()
	put := func(path, value string) string {
		return fmt.Sprintf("  %s --endpoints %s put %s %s", shellQuote(etcdctl), shellQuote(w.Etcd()), shellQuote(path), value)
	}
	now := func(key string, product authz.ProductName) string {
		d := w.Decide(ctx, key, product)
		if d.Allowed() {
			return "200 now"
		}
		return "401 now, " + d.Reason.String()
	}
	key := keyspace.KeyRecord(cfg.Organization, apps.KeyID(apps.WeatherKey))
	product := cfg.Space.KeyProduct(key, apps.WeatherProduct)
	blocks := []string{
		"In another terminal, with the key of AnotherTestApp (" + now(apps.WeatherKey, apps.WeatherProduct) + "):\n" +
			curl(apps.WeatherKey, quickstart.WeatherPath),
		"Approve its product and ask again, revoke it and ask again:" + hint + "\n" +
			put(product, "approved") + "\n" + put(product, "revoked"),
		"The key itself, its app and its developer each have a status too:\n" +
			put(cfg.Space.Status(key), "revoked") + "\n" +
			put(cfg.Space.Status(keyspace.AppRecord(cfg.Organization, apps.WeatherApp)), "revoked") + "\n" +
			put(cfg.Space.Status(keyspace.DeveloperRecord(cfg.Organization, apps.WeatherDeveloper)), "inactive"),
		"OrdersApp has two keys; of one the product is still pending (" + now(apps.OrdersKey, apps.OrdersProduct) + "; " +
			now(apps.OrdersPendingKey, apps.OrdersProduct) + "):\n" +
			curl(apps.OrdersKey, quickstart.OrdersPath) + "\n" + curl(apps.OrdersPendingKey, quickstart.OrdersPath),
	}
	if url := managementURL(cfg, w); url != "" {
		app := fmt.Sprintf("%s/v1/organizations/%s/developers/%s/apps/AnotherTestApp", url, cfg.Organization, apps.WeatherEmail)
		blocks = append(blocks, "The same by Apigee's own API, which answers when it is in force everywhere:\n"+
			"  TOKEN=$(cat "+shellQuote(cfg.AdminTokenPath())+")\n"+
			"  curl -H \"Authorization: Bearer $TOKEN\" "+shellQuote(app)+"\n"+
			"  curl -X POST -H \"Authorization: Bearer $TOKEN\" "+shellQuote(app+"?action=revoke&wait=fleet"))
	}
	return blocks
}

// managementURL of the world; empty if the API is off.
func managementURL(cfg *config.Config, w *quickstart.World) string {
	switch address := w.ManagementAddr(); {
	case address == "" || strings.HasPrefix(address, "unix:"):
		return address
	case cfg.ManagementTLSCert != "":
		return "https://" + address
	default:
		return "http://" + address
	}
}

// findEtcdctl returns the path of an etcdctl: that of make tools, else the one
// on PATH. Without one the hint says so.
func findEtcdctl() (path, hint string) {
	if own, err := filepath.Abs(filepath.Join(".tools", "etcdctl")); err == nil {
		if info, err := os.Stat(own); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return own, ""
		}
	}
	path, err := exec.LookPath("etcdctl")
	if err == nil || errors.Is(err, exec.ErrDot) {
		if path, err = filepath.Abs(path); err == nil {
			return path, ""
		}
	}
	return "etcdctl", "\n(there is no etcdctl here: make tools, or your distribution's package etcd-client)"
}

// shellQuote makes s one word for a shell.
func shellQuote(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:%@+=,"
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
