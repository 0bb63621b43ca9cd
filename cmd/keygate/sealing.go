package main

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"keygate/config"
	"keygate/ledger"
	"keygate/seal"
)

func newSealingKeyCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sealing-key",
		Short: "Create and rotate the key that seals consumer keys at rest",
		Long: `Create and rotate the key that seals consumer keys and secrets in etcd. It is in
the file of --sealing-key-file, or for the embedded etcd in the data directory;
all keygates of one etcd share it. Without it consumer keys and secrets are
shown once, at their creation, and not kept.

To rotate: sealing-key rotate, restart each keygate with the new file,
sealing-key reseal, and take the old key out of the file.`,
		GroupID: groupSetUp,
		Example: `  keygate sealing-key create --sealing-key-file /etc/keygate/sealing-key
  keygate sealing-key reseal --data-dir /var/lib/keygate`,
	}
	parent(cmd)
	cmd.AddCommand(newSealingKeyCreateCommand(a), newSealingKeyRotateCommand(a), newSealingKeyResealCommand(a))
	return cmd
}

// sealingFile is the file that a command is to write.
func sealingFile(cmd *cobra.Command, cfg *config.Config) (string, error) {
	path, _ := cfg.SealingKeyPath()
	if path == "" {
		return "", usageError(cmd, "no file: give --sealing-key-file")
	}
	return path, nil
}

func newSealingKeyCreateCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "create", Short: "Make a file with a new sealing key",
		Long: "Make a file with a new sealing key, of mode 0600. A file that is there stays.\nKeep a copy elsewhere: what it seals is lost without it.",
		Example: `  keygate sealing-key create --sealing-key-file /etc/keygate/sealing-key
  keygate sealing-key create --data-dir /var/lib/keygate`,
		Args: noArguments,
	}
	flags := config.Register(cmd.Flags(), config.Sealing, config.Embedded)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.load(flags)
		if err != nil {
			return err
		}
		path, err := sealingFile(cmd, cfg)
		if err != nil {
			return err
		}
		keys, err := seal.CreateFile(path)
		switch {
		case errors.Is(err, fs.ErrExist):
			return exitWith(exitConflict, fmt.Errorf("%s is there: keygate sealing-key rotate puts a new key into it", path))
		case err != nil:
			return err
		}
		_, err = fmt.Fprintf(a.stdout, "%s holds the sealing key %s\n", printable(path), keys.Current())
		return err
	}
	return cmd
}

func newSealingKeyRotateCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "rotate", Short: "Put a new sealing key before the others of the file",
		Long: `Put a new sealing key before the others of the file, which stay: the new one
seals, all of them open. Every keygate needs the new file, and a restart, before
one of them seals under the new key; then sealing-key reseal.`,
		Example: `  keygate sealing-key rotate --sealing-key-file /etc/keygate/sealing-key
  keygate sealing-key rotate --data-dir /var/lib/keygate`,
		Args: noArguments,
	}
	flags := config.Register(cmd.Flags(), config.Sealing, config.Embedded)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.load(flags)
		if err != nil {
			return err
		}
		path, err := sealingFile(cmd, cfg)
		if err != nil {
			return err
		}
		keys, err := seal.AddKey(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return exitWith(exitNotFound, fmt.Errorf("no sealing keys in %s: keygate sealing-key create makes them", path))
		case errors.Is(err, fs.ErrExist):
			return exitWith(exitConflict, err)
		case err != nil:
			return err
		}
		_, err = fmt.Fprintf(a.stdout, "%s seals under %s from now on; restart each keygate, then keygate sealing-key reseal\n", printable(path), keys.Current())
		return err
	}
	return cmd
}

func newSealingKeyResealCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "reseal", Short: "Seal again what an older sealing key has sealed",
		Long: `Seal again, under the first key of the file, what an older one has sealed, in
the etcd that --data-dir or --etcd-endpoints names, for one organization.
It may be interrupted and repeated, while keygates run. When no organization has
anything left of a key, it may be taken out of the file.

Exit code 1: something is sealed under a key that the file does not hold.`,
		Example: `  keygate sealing-key reseal --data-dir /var/lib/keygate
  keygate sealing-key reseal --org acme --etcd-endpoints https://etcd-0:2379 \
    --sealing-key-file /etc/keygate/sealing-key`,
		Args: noArguments,
	}
	reason := cmd.Flags().String("reason", "", "`text` for the audit that says why")
	ticket := cmd.Flags().String("ticket", "", "`id` of the ticket behind it, for the audit")
	output := outputFlag(cmd, "table", "json")
	flags := config.Register(cmd.Flags(), config.Org, config.External, config.Embedded, config.Keys, config.Sealing)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		s, err := a.openStore(cmd.Context(), cfg, refuseAbsent, withSealing)
		if err != nil {
			return err
		}
		defer s.close()
		if s.keys == nil {
			return usageError(cmd, "no sealing key: give --sealing-key-file")
		}
		bar := progressbar.NewOptions(-1,
			progressbar.OptionSetDescription("sealing"), progressbar.OptionSetWriter(a.stderr), progressbar.OptionSetVisibility(isTerminal(a.stderr)),
			progressbar.OptionFullWidth(), progressbar.OptionClearOnFinish(),
		)
		by := ledger.By{Actor: localActor(), Reason: *reason, Ticket: *ticket}
		resealed, unreadable, err := s.ledger.Reseal(cmd.Context(), by, cfg.Organization, func(done, total int) {
			bar.ChangeMax(total)
			_ = bar.Set(done)
		})
		_ = bar.Finish()
		if printErr := a.printResealed(s.keys.Current(), resealed, unreadable, output.value); err == nil {
			err = printErr
		}
		if err == nil && unreadable > 0 {
			err = exitWith(exitFailed, fmt.Errorf("%s sealed under a key that the file does not hold", count(unreadable, "credential")))
		}
		return err
	}
	return cmd
}

// resealedJSON is the JSON of reseal. Stable.
type resealedJSON struct {
	Key        string `json:"key"`      // id of the sealing key
	Resealed   int    `json:"resealed"` // credentials
	Unreadable int    `json:"unreadable"`
}

func (a *app) printResealed(key string, resealed, unreadable int, format string) error {
	if format == "json" {
		return printJSON(a.stdout, resealedJSON{key, resealed, unreadable})
	}
	_, err := fmt.Fprintf(a.stdout, "%s sealed again under %s, %d cannot be opened\n", count(resealed, "credential"), key, unreadable)
	return err
}
