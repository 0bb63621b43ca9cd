package main

import (
	"bufio"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"keygate/audit"
	"keygate/client"
	"keygate/config"
)

func newAuditCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "audit",
		Short:   "List, export and verify the audit trail",
		Long:    "List, export and verify the audit trail: who changed what, when and why. A hash\nchain over all changes, those by etcdctl among them, makes it tamper-evident.\n" + whereHelp,
		GroupID: groupUse,
		Example: `  keygate audit list --from 24h
  keygate audit verify`,
	}
	parent(cmd)
	cmd.AddCommand(newAuditListCommand(a), newAuditExportCommand(a), newAuditVerifyCommand(a))
	return cmd
}

// auditFlags select records.
type auditFlags struct{ from, to, action, object, actor string }

func (f *auditFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.from, "from", "", "not before this `time`, date, or how long ago")
	fs.StringVar(&f.to, "to", "", "before this `time`, date, or how long ago")
	fs.StringVar(&f.action, "action", "", "one `verb`, such as revoke")
	fs.StringVar(&f.object, "object", "", "`path` in etcd of what was changed, or how it begins")
	fs.StringVar(&f.actor, "actor", "", "`name` of who changed it")
}

func (f *auditFlags) query(cmd *cobra.Command) (q client.AuditQuery, err error) {
	q = client.AuditQuery{Action: f.action, Object: f.object, Actor: f.actor}
	if q.From, err = parseTime(cmd, "from", f.from); err != nil {
		return q, err
	}
	q.To, err = parseTime(cmd, "to", f.to)
	return q, err
}

// defaultRecords that audit list shows.
const defaultRecords = 100

// allOrganizationsHelp says of the commands that list records what else they
// take as the organization.
const allOrganizationsHelp = `
With --org '*' they are those that are of no one organization, such as the
tokens for all organizations. By the API it takes such a token.`

func newAuditListCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "List changes, the newest first",
		Long: "List changes, the newest first.\n" + allOrganizationsHelp,
		Example: `  keygate audit list --action revoke --from 168h
  keygate audit list --limit 1 -o yaml`,
		Args: noArguments,
	}
	var f auditFlags
	f.add(cmd)
	limit := cmd.Flags().Int("limit", defaultRecords, "at most this `number` of records, 0 for all")
	output := outputFlag(cmd, "table", "json", "yaml", "name")
	noHeaders := cmd.Flags().Bool("no-headers", false, "no header in the table")
	flags := config.Register(cmd.Flags(), managed()...)
	flags.AllOrganizations = true
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		if *limit < 0 {
			return usageError(cmd, "--limit: want a number from 0")
		}
		q, err := f.query(cmd)
		if err != nil {
			return err
		}
		q.Reverse = true
		c, release, err := a.manage(cmd, cfg, refuseAbsent, false)
		if err != nil {
			return err
		}
		defer release()
		n := noun{plural: "records", member: "records", header: []string{"TIME", "WHO", "ACTION", "OBJECT", "REASON", "REVISION", "ID"}}
		p := listPrinter{noun: n, format: output.value, headers: !*noHeaders}
		return apiError(p.print(a, func(yield func(item, error) bool) {
			shown := 0
			for r, err := range each(c.Audit(cmd.Context(), q), auditItem) {
				if shown++; !yield(r, err) || shown == *limit {
					return
				}
			}
		}))
	}
	return cmd
}

func auditItem(r client.AuditRecord) item {
	who := r.Actor.Kind
	if r.Actor.Name != "" {
		who += " " + r.Actor.Name
	}
	object := r.Object
	if object == "" && len(r.Changes) > 0 {
		object = r.Changes[0].Path
		if more := len(r.Changes) - 1; more > 0 {
			object += fmt.Sprintf(" and %d more", more)
		}
	}
	action := r.Action
	if r.NoOp {
		action += " (no change)"
	}
	reason := r.Reason
	if r.Ticket != "" {
		reason = r.Ticket + " " + reason
	}
	return item{
		name: "audit/" + r.ID, raw: r.Raw,
		row: []string{moment(r.At), who, action, dash(object), dash(reason), strconv.FormatInt(r.Revision, 10), r.ID},
	}
}

func newAuditExportCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "export", Short: "Write changes as JSON lines, the oldest first",
		Long: "Write changes as JSON lines, the oldest first.\n" + allOrganizationsHelp,
		Example: `  keygate audit export > audit.jsonl
  keygate audit export --from 2026-01-01 --to 2026-02-01 > january.jsonl`,
		Args: noArguments,
	}
	var f auditFlags
	f.add(cmd)
	flags := config.Register(cmd.Flags(), managed()...)
	flags.AllOrganizations = true
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		q, err := f.query(cmd)
		if err != nil {
			return err
		}
		c, release, err := a.manage(cmd, cfg, refuseAbsent, false)
		if err != nil {
			return err
		}
		defer release()
		progress := a.counter("exporting")
		out := bufio.NewWriter(a.stdout)
		for r, recordErr := range c.Audit(cmd.Context(), q) {
			if err = recordErr; err != nil {
				break
			}
			_ = progress.Add(1)
			if _, err = out.Write(append(escapeJSON(r.Raw), '\n')); err != nil {
				break
			}
		}
		_ = progress.Finish()
		return apiError(errors.Join(err, out.Flush()))
	}
	return cmd
}

func newAuditVerifyCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "verify", Short: "Verify the hash chain of the audit trail",
		Long: `Verify the hash chain of the audit trail, on the etcd that --data-dir or
--etcd-endpoints names: every record is as it was chained, and none is missing.
It prints the head of the chain. With --head, one that was noted earlier, also
that the chain still holds what it held then: who can write to etcd can make up
a chain, but not one that passes through a head kept elsewhere.

Exit code 0: it holds, 1: it does not.`,
		Example: `  keygate audit verify
  keygate audit verify --head "$(cat head.txt)" -o json`,
		Args: noArguments,
	}
	head := cmd.Flags().String("head", "", "`head` that was printed earlier")
	output := outputFlag(cmd, "table", "json")
	flags := config.Register(cmd.Flags(), config.Org, config.External, config.Embedded, config.Keys)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		s, err := a.openStore(cmd.Context(), cfg, refuseAbsent, withoutSealing)
		if err != nil {
			return err
		}
		defer s.close()
		report, err := audit.Verify(cmd.Context(), s.etcd, cfg.Space, audit.VerifyOptions{Head: *head})
		if err != nil && !errors.Is(err, audit.ErrTampered) {
			return err
		}
		if printErr := a.printVerified(report, output.value); err == nil {
			err = printErr
		}
		return err
	}
	return cmd
}

// verifiedJSON is the JSON of audit verify. Stable.
type verifiedJSON struct {
	Head      string        `json:"head"`
	Revision  int64         `json:"revision"`
	Behind    int64         `json:"behind"`
	Begun     int64         `json:"begun"`
	Links     int           `json:"links"`
	Revisions int           `json:"revisions"`
	Records   int           `json:"records"`
	Unproven  int           `json:"unproven"`
	Unchained int           `json:"unchained"`
	Gaps      []gapJSON     `json:"gaps,omitempty"`
	Notes     []string      `json:"notes,omitempty"`
	Found     int           `json:"found"`
	Findings  []findingJSON `json:"findings,omitempty"`
}

type gapJSON struct {
	From int64 `json:"from"`
	To   int64 `json:"to"`
}

type findingJSON struct {
	Revision int64  `json:"revision"`
	Path     string `json:"path"`
	Problem  string `json:"problem"`
}

func (a *app) printVerified(r audit.Report, format string) error {
	if format == "json" {
		out := verifiedJSON{
			Head: r.Head, Revision: r.Revision, Behind: r.Behind, Begun: r.Begun, Links: r.Links, Revisions: r.Revisions, Records: r.Records,
			Unproven: r.Unproven, Unchained: r.Unchained, Notes: r.Notes, Found: r.Found,
		}
		for _, g := range r.Gaps {
			out.Gaps = append(out.Gaps, gapJSON(g))
		}
		for _, f := range r.Findings {
			out.Findings = append(out.Findings, findingJSON(f))
		}
		return printJSON(a.stdout, out)
	}
	rows := [][]string{
		{"head", dash(r.Head)},
		{"chain", fmt.Sprintf("%s over %s since revision %d, %d behind etcd's %d", count(r.Links, "link"), count(r.Revisions, "revision"), r.Begun, r.Behind, r.Revision)},
		{"records", fmt.Sprintf("%d compared, %d in a gap or before the chain, %d not yet chained", r.Records, r.Unproven, r.Unchained)},
	}
	for _, g := range r.Gaps {
		rows = append(rows, []string{"gap", fmt.Sprintf("revisions %d to %d", g.From, g.To)})
	}
	for _, n := range r.Notes {
		rows = append(rows, []string{"note", n})
	}
	for _, f := range r.Findings {
		rows = append(rows, []string{"FINDING", f.String()})
	}
	return printTable(a.stdout, rows...)
}
