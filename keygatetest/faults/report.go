package faults

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// Figure that a scenario measured.
type Figure struct {
	Guarantee Guarantee `json:"guarantee"`
	Name      string    `json:"name"`
	Value     string    `json:"value"`
}

// Row is one run of a scenario, one line of the report.
type Row struct {
	Scenario   string      `json:"scenario"`
	Faults     string      `json:"faults"`
	Guarantees []Guarantee `json:"guarantees"`
	// Guard that was switched off, and the guarantee that it is for; empty in a
	// plain run.
	Guard   string    `json:"guard,omitempty"`
	GuardOf Guarantee `json:"guardOf,omitempty"`
	Long    bool      `json:"long"`
	Time    time.Time `json:"time"`
	Seconds float64   `json:"seconds"`

	Replicas int `json:"replicas"`
	Checks   int `json:"checks"`
	Allowed  int `json:"allowed"`
	// Unavailable were answered 503, Failed not at all.
	Unavailable int `json:"unavailable"`
	Failed      int `json:"failed"`
	Writes      int `json:"writes"`
	Receipts    int `json:"receipts"`
	// Undecided keys of which porcupine found no order in time, nor that there is
	// none.
	Undecided  int               `json:"undecided,omitempty"`
	Violations map[Guarantee]int `json:"violations"`
	Figures    []Figure          `json:"figures,omitempty"`
}

func newRow(s Scenario, w *World, h *History, found []Violation, took time.Duration) Row {
	r := Row{
		Scenario: s.Name, Faults: s.Faults, Guarantees: s.Guarantees, Long: w.Long, Time: time.Now().UTC().Truncate(time.Second),
		Seconds: took.Round(100 * time.Millisecond).Seconds(), Replicas: len(w.Replicas), Checks: len(h.Checks), Violations: map[Guarantee]int{}, Figures: w.state.figures,
		Undecided: h.Undecided,
	}
	if w.Guard != nil {
		r.Guard, r.GuardOf = w.Guard.Name, w.Guard.Guarantee
	}
	for i := range h.Checks {
		switch c := &h.Checks[i]; {
		case c.Yes():
			r.Allowed++
		case c.Failed:
			r.Failed++
		case !c.decided():
			r.Unavailable++
		}
	}
	for i := range h.Writes {
		if h.Writes[i].Outcome == Acked {
			r.Writes++
		}
		if h.Writes[i].Receipt != nil {
			r.Receipts++
		}
	}
	for _, v := range found {
		r.Violations[v.Guarantee]++
	}
	return r
}

// line is the row for a test's log.
func (r Row) line() string {
	total := 0
	for _, n := range r.Violations {
		total += n
	}
	s := fmt.Sprintf("%d violations in %.1f s; %d checks (%d allowed, %d with 503, %d without an answer), %d writes acknowledged, %d receipts",
		total, r.Seconds, r.Checks, r.Allowed, r.Unavailable, r.Failed, r.Writes, r.Receipts)
	if r.Undecided > 0 {
		s += fmt.Sprintf("; porcupine had no time for %d keys", r.Undecided)
	}
	for _, f := range r.Figures {
		s += fmt.Sprintf("\n\t%s %s: %s", f.Guarantee, f.Name, f.Value)
	}
	return s
}

// append adds the row to a file, as one line of JSON.
func (r Row) append(path string) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Close())
}

// Report is all that a run of the suite found.
type Report struct {
	rows []Row // the last of each scenario and guard
}

// ReadReport reads the lines that the tests wrote. Of several of the same, the
// last counts.
func ReadReport(in io.Reader) (Report, error) {
	var r Report
	for dec := json.NewDecoder(in); ; {
		var row Row
		if err := dec.Decode(&row); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return Report{}, fmt.Errorf("read the report: %w", err)
		}
		same := func(o Row) bool { return o.Scenario == row.Scenario && o.Guard == row.Guard }
		r.rows = append(slices.DeleteFunc(r.rows, same), row)
	}
	if len(r.rows) == 0 {
		return Report{}, errors.New("the report is empty")
	}
	slices.SortStableFunc(r.rows, func(a, b Row) int { return cmp.Compare(a.Scenario, b.Scenario) })
	return r, nil
}

func (r Report) plain() (rows []Row) {
	for _, row := range r.rows {
		if row.Guard == "" {
			rows = append(rows, row)
		}
	}
	return rows
}

// headlines are the figures that the summary shows.
var headlines = []string{
	"acknowledgement to first refusal", "bare etcd watch in the same run", "load",
	"acknowledgement to receipt, healthy", "receipts: revocations that waited", "receipts: checks that began right after one, all refused",
	"black hole: first refusal after it began", "leader killed: no write for", "leader killed: checks refused for it",
	"etcd killed", "keygate killed", "keygate killed: ready again after", "compaction in a gap", "cache pressure: random keys",
	"hostile values", "two managers",
}

// Summary is the table of guarantees for who reads one page: scenarios by name,
// and the figures that matter most. Markdown.
func (r Report) Summary() string {
	return r.table(func(row Row) string { return row.Scenario }, func(f Figure) bool { return slices.Contains(headlines, f.Name) })
}

// Guarantees is the whole table of guarantees, as Markdown.
func (r Report) Guarantees() string {
	return r.table(func(row Row) string { return row.Faults }, func(Figure) bool { return true })
}

func (r Report) table(under func(Row) string, shown func(Figure) bool) string {
	var b strings.Builder
	b.WriteString("| guarantee | faults it was tried under | violations | measured |\n|---|---|---|---|\n")
	for _, g := range Guarantees {
		var faults, measured []string
		violations := 0
		for _, row := range r.plain() {
			violations += row.Violations[g.Name]
			if slices.Contains(row.Guarantees, g.Name) {
				faults = append(faults, under(row))
			}
			for _, f := range row.Figures {
				if f.Guarantee == g.Name && shown(f) {
					measured = append(measured, f.Name+": "+f.Value)
				}
			}
		}
		fmt.Fprintf(&b, "| %s %s | %s | %d | %s |\n", g.Name, g.Says, join(faults), violations, join(measured))
	}
	return b.String()
}

// Scenarios is the table of scenarios, as Markdown.
func (r Report) Scenarios() string {
	var b strings.Builder
	b.WriteString("| scenario | faults | guarantees | checks | 503 | writes | receipts | violations | measured |\n|---|---|---|---|---|---|---|---|---|\n")
	for _, row := range r.plain() {
		violations := 0
		for _, n := range row.Violations {
			violations += n
		}
		var names, measured []string
		for _, g := range row.Guarantees {
			names = append(names, string(g))
		}
		for _, f := range row.Figures {
			measured = append(measured, f.Name+": "+f.Value)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %d | %d | %d | %d | %d | %s |\n", cell(row.Scenario), cell(row.Faults), strings.Join(names, " "),
			row.Checks, row.Unavailable, row.Writes, row.Receipts, violations, join(measured))
	}
	return b.String()
}

// Guards is the table of guards that were switched off, as Markdown.
func (r Report) Guards() string {
	var b strings.Builder
	b.WriteString("| scenario | without | guarantee | violations |\n|---|---|---|---|\n")
	for _, row := range r.rows {
		if row.Guard != "" {
			fmt.Fprintf(&b, "| %s | %s | %s | %d |\n", cell(row.Scenario), cell(row.Guard), row.GuardOf, row.Violations[row.GuardOf])
		}
	}
	return b.String()
}

// Totals of the plain runs, in a sentence.
func (r Report) Totals() string {
	checks, writes, receipts, violations, guards := 0, 0, 0, 0, 0
	for _, row := range r.rows {
		if row.Guard != "" {
			guards++
			continue
		}
		checks, writes, receipts = checks+row.Checks, writes+row.Writes, receipts+row.Receipts
		for _, n := range row.Violations {
			violations += n
		}
	}
	return fmt.Sprintf("%d scenarios, %d checks, %d acknowledged writes, %d receipts: %d violations. %d runs with a guard switched off.",
		len(r.plain()), checks, writes, receipts, violations, guards)
}

// Time of the newest row.
func (r Report) Time() (t time.Time) {
	for _, row := range r.rows {
		if row.Time.After(t) {
			t = row.Time
		}
	}
	return t
}

// Wrong is what must not be in a report: violations in a plain run, and guards
// that were switched off without one.
func (r Report) Wrong() (all []string) {
	for _, row := range r.rows {
		switch {
		case row.Guard != "" && row.Violations[row.GuardOf] == 0:
			all = append(all, fmt.Sprintf("%s without %s: nothing was seen", row.Scenario, row.Guard))
		case row.Guard == "" && len(row.Violations) > 0:
			all = append(all, fmt.Sprintf("%s: violations %v", row.Scenario, row.Violations))
		}
	}
	return all
}

func join(all []string) string {
	for i := range all {
		all[i] = cell(all[i])
	}
	return strings.Join(all, "; ")
}

// cell of a table.
func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }
