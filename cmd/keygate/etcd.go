package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/config"
	"keygate/statestore"
	"keygate/statestore/embedded"
)

func newEtcdCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "etcd [COMMAND]",
		Short: "Run the embedded etcd alone, save and restore its data",
		Long: `Run the embedded etcd alone: one member, on the unix socket etcd.sock in the
data directory. keygate serve starts this command by itself, as a child; run it
to reach the data while nothing serves. With a subcommand: save the data, or
restore it.`,
		Example: `  keygate etcd --data-dir /var/lib/keygate
  etcdctl --endpoints unix://$PWD/keygate-data/etcd.sock get --prefix /keygate/`,
		GroupID: groupRun,
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.Args = cobra.ArbitraryArgs // else cobra repeats them
	flags := config.Register(cmd.Flags(), config.Embedded)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			// An argument may be a secret that lost its flag: only what is almost a
			// subcommand is answered by its name.
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				return usageError(cmd, "unknown command, did you mean %q?", near[0])
			}
			return noArguments(cmd, args)
		}
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
	cmd.AddCommand(newEtcdSnapshotCommand(a), newEtcdRestoreCommand(a))
	return cmd
}

// oneFile wants the name of one file.
func oneFile(cmd *cobra.Command, args []string) error {
	if len(args) != 1 || args[0] == "" {
		return usageError(cmd, "want the name of one file, got %d arguments", len(args))
	}
	return nil
}

func newEtcdSnapshotCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot FILE",
		Short: "Save all of etcd to a file",
		Long: `Save all of etcd, at one revision, to a file that only its owner can read. The
file is there when it is complete and verified, and not before; an existing one
is not replaced (exit code 6).

It reads the etcd of --etcd-endpoints or --data-dir, while that serves or not.
The file is etcd's own format: etcdutl can restore it too.`,
		Example: `  keygate etcd snapshot --data-dir /var/lib/keygate keygate-$(date +%F).snapshot
  keygate etcd snapshot --etcd-endpoints https://etcd-0:2379 -o json b.snapshot`,
		Args: oneFile,
	}
	output := outputFlag(cmd, "table", "json")
	flags := config.Register(cmd.Flags(), config.External, config.Embedded, config.Keys)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		ctx := cmd.Context()
		etcd, release, err := a.reachEtcd(ctx, cfg, refuseAbsent, a.toolLogger(cfg))
		if err != nil {
			return err
		}
		defer release()
		client, err := dialOne(ctx, cfg, etcd)
		if err != nil {
			return err
		}
		defer client.Close()
		info, err := embedded.SaveSnapshot(ctx, client, args[0])
		switch {
		case errors.Is(err, fs.ErrExist):
			// The command is right; what is there is in its way, and may be the only
			// backup.
			return exitWith(exitConflict, fmt.Errorf("save snapshot: %s is there already: name a new file, or move it away", args[0]))
		case errors.Is(err, fs.ErrNotExist):
			return exitWith(exitUsage, err)
		case err != nil:
			return err
		}
		if output.value == "json" {
			return printJSON(a.stdout, snapshotOutput(info))
		}
		return printTable(a.stdout, []string{"saved", info.File}, []string{"holds", snapshotContent(info)})
	}
	return cmd
}

// dialOne is dial to the first of the endpoints that answers. A snapshot is what
// one member has: the read that dial makes through it brings that member up to
// date.
func dialOne(ctx context.Context, cfg *config.Config, etcd statestore.EtcdConfig) (*clientv3.Client, error) {
	var errs []error
	for _, endpoint := range etcd.Endpoints {
		one := etcd
		one.Endpoints = []string{endpoint}
		client, err := dial(ctx, cfg, one)
		if err == nil {
			return client, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// snapshotJSON is a snapshot in the output. Stable.
type snapshotJSON struct {
	File     string `json:"file"`
	Revision int64  `json:"revision"`
	Keys     int64  `json:"keys"`
	Bytes    int64  `json:"bytes"`
	Written  string `json:"written"`
}

func snapshotOutput(s embedded.SnapshotInfo) snapshotJSON {
	return snapshotJSON{s.File, s.Revision, s.Keys, s.Size, s.Written.UTC().Format(time.RFC3339)}
}

func snapshotContent(s embedded.SnapshotInfo) string {
	content := fmt.Sprintf("%d bytes, written %s", s.Size, s.Written.UTC().Format(time.DateTime+" UTC"))
	if s.Revision > 0 {
		content = fmt.Sprintf("revision %d, %s, %s", s.Revision, plural(s.Keys, "key"), content)
	}
	return content
}

func plural(n int64, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.FormatInt(n, 10) + " " + one + "s"
}

func newEtcdRestoreCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Make a new embedded etcd from a snapshot",
		Long: `Make a new embedded etcd in --data-dir from a snapshot, while nothing serves it.
What is there now is moved aside, not deleted. It becomes another cluster, at a
revision beyond all earlier ones, so that no keygate goes on with what it knew.
Registrations of replicas, and all else under a lease, are not restored.

A snapshot is older than the revocations made after it. So it is compared with
the data that is there now, and what the restore would open is listed and
refused (exit code 6), unless --keep-revocations keeps it closed or --yes opens
it. Without data to compare with, --yes is needed too.`,
		Example: `  keygate etcd restore --data-dir /var/lib/keygate backup.snapshot
  keygate etcd restore --keep-revocations -o json backup.snapshot`,
		Args: oneFile,
	}
	output := outputFlag(cmd, "table", "json")
	yes := cmd.Flags().Bool("yes", false, "open what is open in the snapshot and closed now")
	keep := cmd.Flags().Bool("keep-revocations", false, "keep closed what is closed now")
	flags := config.Register(cmd.Flags(), config.Embedded, config.Keys)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		if _, err := embedded.Endpoint(cfg.DataDir); err != nil {
			return exitWith(exitUsage, err)
		}
		report, err := embedded.Restore(cmd.Context(), embedded.RestoreConfig{
			Snapshot: args[0], DataDir: cfg.DataDir, QuotaBytes: cfg.EtcdQuota, Space: cfg.Space,
			Yes: *yes, KeepRevocations: *keep, Logger: a.toolLogger(cfg),
		})
		switch {
		case errors.Is(err, embedded.ErrRefused):
			err = exitWith(exitConflict, err)
		case errors.Is(err, fs.ErrNotExist) && report.Snapshot.Size == 0:
			err = exitWith(exitUsage, err)
		}
		// What it found is worth knowing also when it was refused.
		if report.Snapshot.Revision > 0 {
			var printErr error
			if output.value == "json" {
				printErr = printJSON(a.stdout, restoreOutput(report))
			} else {
				printErr = a.printRestore(cfg, report, *keep)
			}
			if err == nil {
				err = printErr
			}
		}
		return err
	}
	return cmd
}

// restoreJSON is the output of a restore. Stable.
type restoreJSON struct {
	Snapshot     snapshotJSON  `json:"snapshot"`
	Restored     bool          `json:"restored"`
	Compared     bool          `json:"compared"`
	NotCompared  string        `json:"notCompared,omitempty"`
	NowRevision  int64         `json:"nowRevision,omitempty"`
	Opens        []openingJSON `json:"opens"`
	Closes       int           `json:"closes"`
	Changes      int           `json:"changes"`
	OnlySnapshot int           `json:"recordsOnlyInSnapshot"`
	OnlyNow      int           `json:"recordsOnlyNow"`
	Kept         int           `json:"revocationsKept"`
	Revision     int64         `json:"revision,omitempty"`
	ClusterID    string        `json:"clusterId,omitempty"`
	Expired      int           `json:"leasedKeysRemoved"`
	Leases       int           `json:"leasesRemoved"`
	Disarmed     []string      `json:"alarmsCleared,omitempty"`
	Armed        []string      `json:"alarmsStanding,omitempty"`
	MovedTo      string        `json:"movedTo,omitempty"`
}

type openingJSON struct {
	Key      string `json:"key"`
	Snapshot string `json:"snapshot"`
	Now      string `json:"now"`
}

func restoreOutput(r *embedded.RestoreReport) restoreJSON {
	out := restoreJSON{
		Snapshot: snapshotOutput(r.Snapshot), Restored: r.Restored, Compared: r.Compared, NotCompared: r.NotCompared, NowRevision: r.Now,
		Opens: []openingJSON{}, Closes: r.Difference.Closes, Changes: r.Difference.Changes,
		OnlySnapshot: r.Difference.OnlySnapshot, OnlyNow: r.Difference.OnlyNow,
	}
	for _, o := range r.Difference.Opens {
		out.Opens = append(out.Opens, openingJSON{o.Key, o.Snapshot, o.Now})
	}
	if r.Restored {
		out.Kept, out.Revision, out.ClusterID = r.Kept, r.Revision, fmt.Sprintf("%x", r.ClusterID)
		out.Expired, out.Leases, out.Disarmed, out.Armed, out.MovedTo = r.Expired, r.Leases, r.Disarmed, r.Armed, r.MovedTo
	}
	return out
}

// openingsShown in a table; the JSON has all.
const openingsShown = 20

func (a *app) printRestore(cfg *config.Config, r *embedded.RestoreReport, keep bool) error {
	d := r.Difference
	opens, closes, changes := "would open", "would close", "change"
	if r.Restored {
		closes, changes = "closed", "changed"
		if !keep {
			opens = "opened"
		}
	}
	rows := [][]string{{"snapshot", r.Snapshot.File + ": " + snapshotContent(r.Snapshot)}}
	if r.Compared {
		rows = append(rows,
			[]string{"compared", fmt.Sprintf("%s with those in %s at revision %d", plural(int64(d.Compared), "value"), cfg.DataDir, r.Now)},
			[]string{closes, strconv.Itoa(d.Closes) + ", and " + changes + " " + strconv.Itoa(d.Changes) + " otherwise"},
			[]string{"records", fmt.Sprintf("%d only in the snapshot, %d only in the data", d.OnlySnapshot, d.OnlyNow)},
			[]string{opens, strconv.Itoa(len(d.Opens))},
		)
		for _, o := range d.Opens[:min(len(d.Opens), openingsShown)] {
			rows = append(rows, []string{"", fmt.Sprintf("%s = %s, now %s", o.Key, o.Snapshot, o.Now)})
		}
		if more := len(d.Opens) - openingsShown; more > 0 {
			rows = append(rows, []string{"", fmt.Sprintf("and %d more: -o json lists all", more)})
		}
	} else {
		rows = append(rows, []string{"compared", "with nothing: " + r.NotCompared},
			[]string{"", "revocations made after the snapshot are not in it"})
	}
	if !r.Restored {
		return printTable(a.stdout, rows...)
	}
	if keep {
		rows = append(rows, []string{"kept closed", strconv.Itoa(r.Kept)})
	}
	if r.Expired+r.Leases > 0 {
		rows = append(rows, []string{"left out", fmt.Sprintf("%s, and %s of replicas and under leases", plural(int64(r.Leases), "lease"), plural(int64(r.Expired), "key"))})
	}
	if len(r.Disarmed) > 0 {
		rows = append(rows, []string{"alarm cleared", strings.Join(r.Disarmed, ", ")})
	}
	if len(r.Armed) > 0 {
		rows = append(rows, []string{"alarm stands", strings.Join(r.Armed, ", ") + ": the data fills --etcd-quota, give more"})
	}
	rows = append(rows, []string{"restored", fmt.Sprintf("%s at revision %d, as cluster %x", cfg.DataDir, r.Revision, r.ClusterID)})
	if r.MovedTo != "" {
		rows = append(rows, []string{"before", "moved to " + r.MovedTo})
	}
	return printTable(a.stdout, rows...)
}
