package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"keygate/client"
	"keygate/config"
)

// changeFlags are what every change may be told.
func changeFlags(cmd *cobra.Command) *client.Change {
	ch := &client.Change{}
	cmd.Flags().StringVar(&ch.Reason, "reason", "", "`text` for the audit that says why")
	cmd.Flags().StringVar(&ch.Ticket, "ticket", "", "`id` of the ticket behind it, for the audit")
	cmd.Flags().BoolVar(&ch.DryRun, "dry-run", false, "show what would change and what it would stop, and write nothing")
	return ch
}

// changedJSON is the JSON of a change that answers no object. Stable.
type changedJSON struct {
	Name     string               `json:"name"`
	DryRun   bool                 `json:"dryRun,omitempty"`
	Revision int64                `json:"revision"`
	Changes  []client.ValueChange `json:"changes,omitempty"`
	Stops    []client.Stop        `json:"stops,omitempty"`
}

// printChanged says what has been done to what, or would be.
func (a *app) printChanged(name, participle string, ch client.Change, done client.Done, format string) error {
	switch {
	case format == "name":
		_, err := fmt.Fprintln(a.stdout, printable(name))
		return err
	case format != "table":
		document, err := jsonOf(changedJSON{name, ch.DryRun, done.Revision, done.Changes, done.Stops})
		if err != nil {
			return err
		}
		return printDocument(a.stdout, document, format)
	case !ch.DryRun:
		_, err := fmt.Fprintf(a.stdout, "%s %s at revision %d\n", printable(name), participle, done.Revision)
		return err
	}
	if _, err := fmt.Fprintf(a.stdout, "%s would be %s; %s would change, %s would stop\n", printable(name), participle,
		count(len(done.Changes), "value"), count(len(done.Stops), "use")); err != nil {
		return err
	}
	return a.printPreview(done)
}

// printPreview lists what a dry run found.
func (a *app) printPreview(done client.Done) error {
	var rows [][]string
	for _, c := range done.Changes {
		rows = append(rows, []string{"change", c.Path, shortValue(c.Before) + " -> " + shortValue(c.After)})
	}
	for _, s := range done.Stops {
		rows = append(rows, []string{"stop", "key " + s.Key, "product " + s.Product + " of app " + s.App})
	}
	if len(rows) == 0 {
		return nil
	}
	return printTable(a.stdout, rows...)
}

// shortValue shows a status as it is, and of a record that there is one.
func shortValue(v *string) string {
	switch {
	case v == nil:
		return "absent"
	case len(*v) > 20 || strings.HasPrefix(*v, "{"):
		return "a record"
	}
	return *v
}

func newDeleteCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "delete",
		Short:   "Delete developers, apps, keys or API products",
		Long:    "Delete developers, apps, keys or API products, with all that belongs to them.\nA revocation can be undone, this cannot.\n" + whereHelp,
		GroupID: groupUse,
		Example: `  keygate delete app AnotherTestApp --developer ann@example.com --dry-run
  printf %s "$KEY" | keygate delete key - --ticket SEC-12`,
	}
	parent(cmd)
	for _, n := range nouns {
		cmd.AddCommand(deleteCommand(a, n))
	}
	return cmd
}

var deleteHelp = map[string]string{
	"developer": "Delete developers, with their apps and keys.",
	"app":       "Delete apps, with their keys.",
	"key":       "Delete keys by their ids (keygate key-id prints them), or with - the one key on\nstandard input.",
	"product":   "Delete API products. Keys keep their approval of one until it is removed.",
}

var deleteExamples = map[string]string{
	"developer": `  keygate delete developer ann@example.com --dry-run
  keygate delete developer ann@example.com --reason left --ticket HR-7`,
	"app": `  keygate delete app AnotherTestApp --developer ann@example.com
  keygate delete app 6ed3a4d1-4733-439a-80a4-0d71149ec9ad --dry-run`,
	"key": `  printf %s "$KEY" | keygate delete key -
  keygate delete key $(printf %s "$KEY" | keygate key-id -) --dry-run`,
	"product": `  keygate delete product Weather-Product --dry-run
  keygate delete product Weather-Product --ticket API-3`,
}

func deleteCommand(a *app, n noun) *cobra.Command {
	argument := n.argument + "..."
	if n.singular == "key" {
		argument += " | -"
	}
	cmd := n.command(argument, n.singular, "Delete "+n.plural)
	cmd.Long, cmd.Example = deleteHelp[n.singular], deleteExamples[n.singular]
	var f nounFlags
	if n.pathFlags != nil {
		n.pathFlags(cmd.Flags(), &f)
	}
	ch := changeFlags(cmd)
	yes := cmd.Flags().Bool("yes", false, "do not ask, however many it deletes")
	output := outputFlag(cmd, "table", "json", "yaml", "name")
	flags := config.Register(cmd.Flags(), managed()...)
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError(cmd, "name at least one %s", n.singular)
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		if args, err = a.keyArguments(cmd, n, args); err != nil {
			return err
		}
		args = distinct(args)
		if len(args) > 1 && !*yes && !ch.DryRun {
			if err := a.agree(cmd.Context(), count(len(args), n.singular)+" would be deleted"); err != nil {
				return err
			}
		}
		c, release, err := a.manage(cmd, cfg, refuseAbsent, false)
		if err != nil {
			return err
		}
		defer release()
		for _, arg := range args {
			name, done, err := n.remove(cmd.Context(), c, &f, arg, *ch)
			if err != nil {
				return apiError(err, arg, f.developer)
			}
			if ch.DryRun && n.singular != "app" && n.singular != "key" {
				name = n.singular + "/" + arg
			}
			if err := a.printChanged(name, "deleted", *ch, done, output.value); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}
