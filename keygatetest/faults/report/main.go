// Command report renders what the fault suite found: the table of guarantees
// into the README, between its two markers, and all of it into docs/faults.md.
//
//	go run ./keygatetest/faults/report -in FILE -readme README.md -docs docs/faults.md
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/version"

	"keygate/keygatetest/faults"
)

// The table of guarantees stands between these lines.
const (
	begin = "<!-- guarantees:begin -->"
	end   = "<!-- guarantees:end -->"
)

func main() {
	in := flag.String("in", "", "`file` that the tests wrote to, named by FAULTS_REPORT")
	readme := flag.String("readme", "README.md", "`file` to put the table of guarantees into")
	docs := flag.String("docs", "docs/faults.md", "`file` to write all of it to")
	command := flag.String("command", "make test-faults", "`command` that ran the tests, for the file to name")
	release := flag.String("version", "", "`version` of keygate, for the file to name")
	flag.Parse()
	if err := run(*in, *readme, *docs, *command, *release); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run(in, readme, docs, command, release string) error {
	f, err := os.Open(in)
	if err != nil {
		return fmt.Errorf("open the report: %w", err)
	}
	defer f.Close()
	r, err := faults.ReadReport(f)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(readme)
	if err != nil {
		return fmt.Errorf("read the README: %w", err)
	}
	changed, err := between(string(text), r.Summary())
	if err != nil {
		return fmt.Errorf("%s: %w", readme, err)
	}
	if err := os.WriteFile(readme, []byte(changed), 0o644); err != nil {
		return fmt.Errorf("write the README: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(docs), 0o755); err != nil {
		return fmt.Errorf("make the folder of %s: %w", docs, err)
	}
	if err := os.WriteFile(docs, []byte(page(r, command, release)), 0o644); err != nil {
		return fmt.Errorf("write the page: %w", err)
	}
	if wrong := r.Wrong(); len(wrong) > 0 {
		return errors.New("written, and this is wrong:\n  " + strings.Join(wrong, "\n  "))
	}
	return nil
}

// between puts the table between the markers of a text.
func between(text, table string) (string, error) {
	before, rest, ok := strings.Cut(text, begin)
	if !ok {
		return "", fmt.Errorf("no line %s", begin)
	}
	_, after, ok := strings.Cut(rest, end)
	if !ok {
		return "", fmt.Errorf("no line %s after %s", end, begin)
	}
	return before + begin + "\n" + table + end + after, nil
}

// page is docs/faults.md.
func page(r faults.Report, command, release string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# What was broken, and what keygate answered\n\n")
	fmt.Fprintf(&b, "Written by `%s` on %s; nothing here is typed. %s\n\n", command, r.Time().Format(time.DateOnly), r.Totals())
	fmt.Fprintf(&b, "keygate %s, etcd %s, %s on %s/%s with %d CPUs; store, replicas, proxies and load share them.\n",
		orUnknown(release), version.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	b.WriteString("A violation is an allow beyond S or beyond a receipt. S is the staleness budget, 3 s here; X is the time from an\nacknowledgement to the last check that began after it and was still allowed.\n")
	fmt.Fprintf(&b, "\n## Guarantees\n\n%s", r.Guarantees())
	fmt.Fprintf(&b, "\n## Scenarios\n\n%s", r.Scenarios())
	b.WriteString("\n## Guards switched off\n\nEach scenario was run again with a part of keygate, or of what stands around it, taken out. A suite that cannot see that\nthe part is missing proves nothing about a keygate that has it: every row must show violations.\n\n")
	b.WriteString(r.Guards())
	return b.String()
}

func orUnknown(s string) string {
	if s == "" {
		return "(version not given)"
	}
	return s
}
