package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"keygate/apigee"
	"keygate/catalog"
	"keygate/config"
	"keygate/ledger"
)

func newImportCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import FILE... | FOLDER | -",
		Short: "Import an Apigee organization from its JSON",
		Long: `Import an Apigee organization, or a part of it: developers, developer apps with
their credentials, API products. A file has the JSON that Apigee answers with:
one of them or several, a list or one a line; {"developer": [...]}, {"app":
[...]} or {"apiProduct": [...]} of a list call with expand=true; or one document
with all of it. All pages of a list are given together. A folder is one that
"apigeecli organizations export" has filled. - is standard input.

An import opens nothing that the store keeps closed: a status that is there
stays, and is reported as kept, unless --overwrite-status says otherwise. The
same import again changes nothing. A broken record refuses itself, not the rest;
the exit code is then 1.

A consumer key is named by its SHA-256. With a sealing key it is kept, sealed,
and so is its secret; without one neither is.

It writes to the etcd of --etcd-endpoints or --data-dir. If no process serves
the data directory, the command does for as long as it runs.`,
		Example: `  keygate import --org acme weather-app.json
  keygate import --org acme --reason migration export/
  keygate import -o json - < apps.jsonl`,
		GroupID: groupUse,
		Args: func(cmd *cobra.Command, args []string) error {
			inputs := 0
			for _, arg := range args {
				if arg == "-" {
					inputs++
				}
			}
			switch {
			case len(args) == 0:
				return usageError(cmd, "no file; give - to read standard input")
			case inputs > 1:
				return usageError(cmd, "standard input can be read once")
			}
			return nil
		},
	}
	output := outputFlag(cmd, "table", "json")
	overwrite := cmd.Flags().Bool("overwrite-status", false, "write statuses and expiries over those in the store, also where that opens")
	reason := cmd.Flags().String("reason", "", "`text` for the audit: why")
	ticket := cmd.Flags().String("ticket", "", "`id` for the audit: of the ticket that asks for it")
	allowWeak := cmd.Flags().Bool("allow-weak-keys", false, fmt.Sprintf("take consumer keys under %d characters", catalog.MinKeyLength))
	flags := config.Register(cmd.Flags(), config.Org, config.External, config.Embedded, config.Keys, config.Sealing)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		files, total, err := inputs(args)
		if err != nil {
			return exitWith(exitUsage, err)
		}
		ctx := cmd.Context()
		store, err := a.openStore(ctx, cfg, createAbsent, withSealing)
		if err != nil {
			return err
		}
		defer store.close()

		isTTY := isTerminal(a.stderr)
		bar := progressbar.NewOptions64(total,
			progressbar.OptionSetDescription("importing"), progressbar.OptionSetWriter(a.stderr), progressbar.OptionSetVisibility(isTTY),
			progressbar.OptionShowBytes(true), progressbar.OptionFullWidth(), progressbar.OptionClearOnFinish(),
		)
		report := &importReport{w: a.stdout, asJSON: output.value == "json", clear: func() {
			if isTTY {
				_ = bar.Clear()
			}
		}}
		importer := ledger.NewImporter(ledger.ImporterConfig{
			KV: store.etcd, Space: cfg.Space, Organization: cfg.Organization, Seal: store.keys,
			Options: ledger.ImportOptions{Overwrite: *overwrite},
			Actor:   localActor(), Reason: *reason, Ticket: *ticket,
		})
		var pages apigee.Pages
		reader := apigee.ReaderConfig{AllowWeakKeys: *allowWeak, Pages: &pages}
		for _, file := range files {
			if err = a.importFile(ctx, importer, file, reader, bar, report.add); err != nil {
				break
			}
		}
		if err == nil {
			for _, m := range pages.Missing() {
				err = errors.Join(err, report.add(ledger.Outcome{Place: m.Place, Items: []ledger.Item{{Action: ledger.Refused, Reason: m.Reason}}}))
			}
		}
		_ = bar.Finish()
		if sumErr := report.finish(); err == nil {
			err = sumErr
		}
		return err
	}
	return cmd
}

// exported are the files of an organization in the folder that "apigeecli
// organizations export" fills, of which this is what keygate holds. Developers
// come first: no app has to bring its own.
var exported = []string{"developers.json", "products.json", "apps.json"}

// inputs are the files that are named, or stand in a folder that is, and the sum
// of their sizes, -1 if one is not known. Each of them is there.
func inputs(args []string) (files []string, total int64, err error) {
	for _, arg := range args {
		if arg == "-" {
			files, total = append(files, arg), -1
			continue
		}
		info, err := os.Stat(arg)
		if err != nil {
			return nil, 0, err
		}
		if !info.IsDir() {
			files, total = append(files, arg), addSize(total, info)
			continue
		}
		found := false
		for _, name := range exported {
			file := filepath.Join(arg, name)
			switch info, err := os.Stat(file); {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				return nil, 0, err
			default:
				found = true
				files, total = append(files, file), addSize(total, info)
			}
		}
		if !found {
			return nil, 0, fmt.Errorf("the folder %s has none of %s: give the files by name", arg, strings.Join(exported, ", "))
		}
	}
	return files, total, nil
}

// addSize adds the size of a file, if both are known.
func addSize(total int64, info fs.FileInfo) int64 {
	if total < 0 || !info.Mode().IsRegular() {
		return -1
	}
	return total + info.Size()
}

// importFile imports one file; - is standard input. Outcomes come in the order
// of the file.
func (a *app) importFile(ctx context.Context, importer *ledger.Importer, file string, cfg apigee.ReaderConfig, bar io.Writer, report func(ledger.Outcome) error) error {
	var input io.Reader
	cfg.Name = "stdin"
	if file == "-" {
		input = a.input(ctx)
	} else {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		input, cfg.Name = f, file
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ordered := &inOrder{
		in: apigee.NewReader(cfg, io.TeeReader(input, bar)),
		report: func(o ledger.Outcome) {
			if err := report(o); err != nil {
				cancel(fmt.Errorf("report: %w", err)) // nobody reads it
			}
		},
	}
	err := importer.Import(ctx, ordered, ordered.add)
	ordered.flush()
	if err != nil {
		return fmt.Errorf("import %s: %w", cfg.Name, err)
	}
	return nil
}

// inOrder passes submissions on and their outcomes back, in the order of the
// submissions, where an Importer has no order. It is safe for concurrent use.
type inOrder struct {
	in     *apigee.Reader
	report func(ledger.Outcome)

	mu      sync.Mutex
	waiting []*slot // in the order of submissions
}

// slot waits for the outcome of the submission at a place.
type slot struct {
	place   catalog.Place
	outcome *ledger.Outcome
}

// Next implements ledger.Submissions.
func (q *inOrder) Next() (catalog.Submission, error) {
	s, err := q.in.Next()
	if err == nil {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.waiting = append(q.waiting, &slot{place: s.Place})
	}
	return s, err
}

// add takes an outcome and reports all that are next.
func (q *inOrder) add(o ledger.Outcome) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, s := range q.waiting {
		if s.place == o.Place && s.outcome == nil {
			s.outcome = &o
			break
		}
	}
	for len(q.waiting) > 0 && q.waiting[0].outcome != nil {
		q.report(*q.waiting[0].outcome)
		q.waiting = q.waiting[1:]
	}
}

// flush reports what is left over of an import that stopped half-way.
func (q *inOrder) flush() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, s := range q.waiting {
		if s.outcome != nil {
			q.report(*s.outcome)
		}
	}
	q.waiting = nil
}

// importReport writes outcomes as they come, and their sum. It holds the sum
// only, however long the import.
type importReport struct {
	w      io.Writer
	asJSON bool
	clear  func() // the progress bar's line
	sum    ledger.Report
	begun  bool
}

// add writes one outcome: as JSON whole, as text what a person must know.
func (r *importReport) add(o ledger.Outcome) error {
	r.sum.Add(o)
	if r.asJSON {
		return r.addJSON(o)
	}
	for _, item := range o.Items {
		var line string
		switch place := o.Place; item.Action {
		case ledger.Refused:
			if item.Place != nil {
				place = *item.Place
			}
			line = fmt.Sprintf("refused  %s: %s", place, item.Reason)
		case ledger.Kept:
			line = "kept     " + item.Path
			if item.Stored != "" || item.Submitted != "" {
				line += fmt.Sprintf(" = %s, not %s", word(item.Stored), word(item.Submitted))
			}
			if item.Reason != "" {
				line += ": " + item.Reason
			}
		default:
			continue
		}
		r.clear()
		if _, err := fmt.Fprintln(r.w, printable(line)); err != nil {
			return err
		}
	}
	return nil
}

// word shows a value that may be absent.
func word(s string) string {
	if s == "" {
		return "absent"
	}
	return s
}

// The outcomes of an import may be many: they are written one by one.
const (
	jsonBegin = `{"outcomes": [`
	jsonEnd   = "\n],\n\"sum\": %s}\n"
)

func (r *importReport) addJSON(o ledger.Outcome) error {
	before := ","
	if !r.begun {
		r.begun, before = true, jsonBegin
	}
	if o.Items == nil {
		o.Items = []ledger.Item{}
	}
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(r.w, "%s\n  %s", before, text)
	return err
}

// finish writes the sum. The error says that something was refused.
func (r *importReport) finish() error {
	var err error
	if r.asJSON {
		err = r.finishJSON()
	} else {
		rows := [][]string{{"", "CREATED", "CHANGED", "UNCHANGED"}}
		for _, k := range r.kinds() {
			rows = append(rows, []string{k.name, strconv.Itoa(k.Created), strconv.Itoa(k.Changed), strconv.Itoa(k.Unchanged)})
		}
		last := fmt.Sprintf("%d kept as stored, %d refused", r.sum.Kept, r.sum.Refused)
		if !r.sum.Written {
			last += "; nothing had to be written"
		}
		rows = append(rows, []string{last})
		err = printTable(r.w, rows...)
	}
	if err == nil && r.sum.Refused > 0 {
		err = exitWith(exitFailed, fmt.Errorf("import: %d refused", r.sum.Refused))
	}
	return err
}

// kindSum is the JSON of one kind of record in the sum. Stable.
type kindSum struct {
	name      string
	Created   int `json:"created"`
	Changed   int `json:"changed"`
	Unchanged int `json:"unchanged"`
}

func (r *importReport) kinds() (sums []kindSum) {
	for _, k := range []struct {
		name  string
		count ledger.Count
	}{{"apps", r.sum.Apps}, {"credentials", r.sum.Credentials}, {"developers", r.sum.Developers}, {"products", r.sum.Products}} {
		sums = append(sums, kindSum{k.name, k.count[ledger.Created], k.count[ledger.Changed], k.count[ledger.Unchanged]})
	}
	return sums
}

func (r *importReport) finishJSON() error {
	if !r.begun {
		if _, err := io.WriteString(r.w, jsonBegin); err != nil {
			return err
		}
	}
	k := r.kinds()
	text, err := json.Marshal(struct {
		Apps        kindSum `json:"apps"`
		Credentials kindSum `json:"credentials"`
		Developers  kindSum `json:"developers"`
		Products    kindSum `json:"products"`
		Kept        int     `json:"kept"`
		Refused     int     `json:"refused"`
		Written     bool    `json:"written"`
	}{k[0], k[1], k[2], k[3], r.sum.Kept, r.sum.Refused, r.sum.Written})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(r.w, jsonEnd, text)
	return err
}
