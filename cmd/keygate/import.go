package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
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
		Use:   "import FILE... | -",
		Short: "Import developer apps from Apigee's JSON",
		Long: `Import developer apps, with their credentials, from the JSON of Apigee's "get
developer app": one object, a list of them or one a line. - is standard input.

An import opens nothing that the store keeps closed: a status that is there
stays, and is reported as kept, unless --overwrite-status says otherwise. The
same import again changes nothing. A consumer key is stored as its SHA-256, its
secret not at all. A broken record refuses itself, not the rest; the exit code
is then 1.

It writes to the etcd of --etcd-endpoints or --data-dir. If no process serves
the data directory, the command does for as long as it runs.`,
		Example: `  keygate import --org acme weather-app.json
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
	allowWeak := cmd.Flags().Bool("allow-weak-keys", false, fmt.Sprintf("take consumer keys under %d characters", catalog.MinKeyLength))
	flags := config.Register(cmd.Flags(), config.Org, config.External, config.Embedded, config.Keys)
	cmd.RunE = func(cmd *cobra.Command, files []string) error {
		cfg, err := a.loadFor(flags)
		if err != nil {
			return err
		}
		total, err := inputSize(files)
		if err != nil {
			return exitWith(exitUsage, err)
		}
		ctx := cmd.Context()
		etcd, release, err := a.reachEtcd(ctx, cfg, createAbsent, a.toolLogger(cfg))
		if err != nil {
			return err
		}
		defer release()
		client, err := dial(ctx, cfg, etcd)
		if err != nil {
			return err
		}
		defer client.Close()

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
			KV: client, Space: cfg.Space, Organization: cfg.Organization,
			Options: ledger.ImportOptions{Overwrite: *overwrite},
		})
		for _, file := range files {
			if err = a.importFile(ctx, importer, file, *allowWeak, bar, report.add); err != nil {
				break
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

// inputSize sums up the sizes of files, -1 if one is not known. Each of them
// is there.
func inputSize(files []string) (total int64, err error) {
	for _, file := range files {
		if file == "-" {
			total = -1
			continue
		}
		info, err := os.Stat(file)
		switch {
		case err != nil:
			return 0, err
		case info.IsDir():
			return 0, fmt.Errorf("%s is a folder", file)
		case !info.Mode().IsRegular():
			total = -1
		case total >= 0:
			total += info.Size()
		}
	}
	return total, nil
}

// importFile imports one file; - is standard input. Outcomes come in the order
// of the file.
func (a *app) importFile(ctx context.Context, importer *ledger.Importer, file string, allowWeak bool, bar io.Writer, report func(ledger.Outcome) error) error {
	var input io.Reader
	name := "stdin"
	if file == "-" {
		input = a.input(ctx)
	} else {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		input, name = f, file
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ordered := &inOrder{
		in: apigee.NewReader(apigee.ReaderConfig{Name: name, AllowWeakKeys: allowWeak}, io.TeeReader(input, bar)),
		report: func(o ledger.Outcome) {
			if err := report(o); err != nil {
				cancel(fmt.Errorf("report: %w", err)) // nobody reads it
			}
		},
	}
	err := importer.Import(ctx, ordered, ordered.add)
	ordered.flush()
	if err != nil {
		return fmt.Errorf("import %s: %w", name, err)
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
		rows = append(rows, []string{fmt.Sprintf("%d kept as stored, %d refused", r.sum.Kept, r.sum.Refused)})
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
	}{{"apps", r.sum.Apps}, {"credentials", r.sum.Credentials}, {"developers", r.sum.Developers}} {
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
		Kept        int     `json:"kept"`
		Refused     int     `json:"refused"`
	}{k[0], k[1], k[2], r.sum.Kept, r.sum.Refused})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(r.w, jsonEnd, text)
	return err
}
