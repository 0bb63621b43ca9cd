package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/version"
	"google.golang.org/grpc"
)

// Result of a scenario, as its file in bench/results holds it.
type Result struct {
	Scenario string    `json:"scenario"`
	Title    string    `json:"title"`
	About    []string  `json:"about"` // a sentence each
	Command  string    `json:"command"`
	Time     time.Time `json:"time"`
	Versions Versions  `json:"versions"`
	// Smoke marks numbers of a run that was too short to mean anything.
	Smoke  bool     `json:"smoke,omitempty"`
	Tables []Table  `json:"tables"`
	Notes  []string `json:"notes,omitempty"`
}

// Versions of all that took part.
type Versions struct {
	Keygate    string `json:"keygate"`
	Go         string `json:"go"`
	GRPC       string `json:"grpc"`
	Etcd       string `json:"etcd"`
	Envoy      string `json:"envoy,omitempty"`
	Processors int    `json:"processors"`
}

// Table of figures that were measured of the same subjects.
type Table struct {
	Title string `json:"title"`
	// Subjects; the first is what the others are compared with.
	Subjects []string `json:"subjects"`
	Figures  []Figure `json:"figures"`
}

// Figure is one quantity.
type Figure struct {
	Name string `json:"name"`
	Unit string `json:"unit,omitempty"`
	// Plain is a figure of which no ratio is made.
	Plain bool `json:"plain,omitempty"`
	// Values of each subject, in the order of the rounds.
	Values [][]float64 `json:"values"`
}

// write the file of the result. One file for each number of keys.
func (r *Result) write(folder string) error {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	// A list of numbers in a line.
	data = regexp.MustCompile(`\[\s+(-?[0-9.e+-]+,\s+)*-?[0-9.e+-]+\s+\]`).ReplaceAllFunc(data, func(list []byte) []byte {
		return []byte("[" + strings.Join(strings.Fields(strings.Trim(string(list), "[]")), " ") + "]")
	})
	return os.WriteFile(filepath.Join(folder, r.Scenario+".json"), append(data, '\n'), 0o644)
}

// readResults reads all files of results, in the order of the scenarios.
func readResults(folder string) (all []*Result, err error) {
	for _, s := range scenarios {
		data, err := os.ReadFile(filepath.Join(folder, s.name+".json"))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		r := &Result{}
		if err := json.Unmarshal(data, r); err != nil {
			return nil, fmt.Errorf("read the result of %s: %w", s.name, err)
		}
		all = append(all, r)
	}
	return all, nil
}

// versions of what runs here.
func (b *bench) versions(ctx context.Context) Versions {
	v := Versions{Keygate: "unknown", Go: runtime.Version(), GRPC: grpc.Version, Etcd: version.Version, Processors: runtime.NumCPU()}
	cmd := exec.CommandContext(ctx, "git", "describe", "--tags", "--always", "--dirty")
	cmd.Dir = b.root
	if out, err := cmd.Output(); err == nil {
		v.Keygate = strings.TrimSpace(string(out))
	}
	if e, err := envoyVersion(ctx, b.envoy); err == nil {
		v.Envoy = strings.TrimPrefix(e, "Envoy ")
	}
	return v
}

// envoyVersion as "Envoy 1.40.0".
func envoyVersion(ctx context.Context, binary string) (string, error) {
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("envoy --version: %w", err)
	}
	m := regexp.MustCompile(`version: [0-9a-f]+/([0-9.]+)`).FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("envoy --version: %q names none", out)
	}
	return "Envoy " + string(m[1]), nil
}

// spread is a median with the least and the greatest.
type spread struct{ median, least, most float64 }

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	s := slices.Sorted(slices.Values(values))
	n := len(s)
	return spread{median: (s[(n-1)/2] + s[n/2]) / 2, least: s[0], most: s[n-1]}
}

// ratios of two subjects, round by round.
func ratios(base, of []float64) (all []float64) {
	for i := range min(len(base), len(of)) {
		if base[i] != 0 {
			all = append(all, of[i]/base[i])
		}
	}
	return all
}

// String as "0.92 [0.90 .. 0.95]".
func (s spread) String() string {
	if s.least == s.most {
		return number(s.median)
	}
	return fmt.Sprintf("%s [%s .. %s]", number(s.median), number(s.least), number(s.most))
}

// number with three digits that count, and all those before the point.
func number(v float64) string {
	digits := 0
	for limit := 100.0; v != 0 && v < limit && v > -limit && digits < 4; limit /= 10 {
		digits++
	}
	s := strconv.FormatFloat(v, 'f', digits, 64)
	if digits == 0 { // 1,234,567
		for at := len(s) - 3; at > 0 && s[at-1] != '-'; at -= 3 {
			s = s[:at] + "," + s[at:]
		}
	}
	return s
}

// markdown of the tables and the notes.
func (r *Result) markdown() string {
	var b strings.Builder
	for i, t := range r.Tables {
		if i > 0 {
			b.WriteString("\n")
		}
		if t.Title != "" {
			fmt.Fprintf(&b, "%s:\n\n", t.Title)
		}
		if len(t.Subjects) > 2 {
			t.bySubject(&b)
		} else {
			t.byFigure(&b)
		}
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "\n%s\n", n)
	}
	if r.Smoke {
		b.WriteString("\nThis run was too short to mean anything.\n")
	}
	return b.String()
}

// byFigure is a row a figure: two subjects and their ratio.
func (t Table) byFigure(b *strings.Builder) {
	header := "| | unit |"
	rule := "|---|---|"
	for _, s := range t.Subjects {
		header += " " + cell(s) + " |"
		rule += "---|"
	}
	if len(t.Subjects) == 2 {
		header += fmt.Sprintf(" %s / %s |", cell(t.Subjects[1]), cell(t.Subjects[0]))
		rule += "---|"
	}
	b.WriteString(header + "\n" + rule + "\n")
	for _, f := range t.Figures {
		fmt.Fprintf(b, "| %s | %s |", cell(f.Name), cell(f.Unit))
		for _, v := range f.Values {
			fmt.Fprintf(b, " %v |", spreadOf(v))
		}
		switch {
		case len(f.Values) == 2 && f.Plain:
			b.WriteString(" |")
		case len(f.Values) == 2:
			fmt.Fprintf(b, " **%v** |", spreadOf(ratios(f.Values[0], f.Values[1])))
		}
		b.WriteString("\n")
	}
}

// bySubject is a row a subject, with a ratio to the first behind each value.
func (t Table) bySubject(b *strings.Builder) {
	header, rule := "| |", "|---|"
	for _, f := range t.Figures {
		header += fmt.Sprintf(" %s, %s |", cell(f.Name), cell(f.Unit))
		rule += "---|"
		if !f.Plain {
			header += " ratio |"
			rule += "---|"
		}
	}
	b.WriteString(header + "\n" + rule + "\n")
	for i, s := range t.Subjects {
		fmt.Fprintf(b, "| %s |", cell(s))
		for _, f := range t.Figures {
			fmt.Fprintf(b, " %v |", spreadOf(f.Values[i]))
			switch {
			case f.Plain:
			case i == 0:
				b.WriteString(" 1 |")
			default:
				fmt.Fprintf(b, " **%v** |", spreadOf(ratios(f.Values[0], f.Values[i])))
			}
		}
		b.WriteString("\n")
	}
}

// cell of a table.
func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }
