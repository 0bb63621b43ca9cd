package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const rows = `{"scenario":"black hole","faults":"network swallows | everything","guarantees":["G3"],"time":"2026-01-02T03:04:05Z","checks":10,"unavailable":4,"writes":2,"violations":{"G3":1}}
{"scenario":"black hole","faults":"network swallows | everything","guarantees":["G3"],"time":"2026-01-02T03:04:06Z","checks":20,"unavailable":5,"writes":3,"violations":{},"figures":[{"guarantee":"G3","name":"first refusal","value":"2.9 s"},{"guarantee":"G3","name":"leader killed: no write for","value":"1.2 s"}]}
{"scenario":"black hole","faults":"network swallows | everything","guarantees":["G3"],"guard":"the end of a proof","guardOf":"G3","time":"2026-01-02T03:04:07Z","violations":{"G3":500}}
{"scenario":"baseline","faults":"none","guarantees":["G1","G3"],"time":"2026-01-02T03:04:05Z","checks":7,"writes":1,"receipts":1,"violations":{}}
`

func TestRun(t *testing.T) {
	dir := t.TempDir()
	in, readme, docs := filepath.Join(dir, "rows"), filepath.Join(dir, "README.md"), filepath.Join(dir, "docs", "faults.md")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(path string) string {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	write(in, rows)
	write(readme, "before\n"+begin+"\nold\n"+end+"\nafter\n")
	for range 2 { // the second run finds what the first has written
		if err := run(in, readme, docs, "make test-faults", "v1"); err != nil {
			t.Fatal(err)
		}
	}
	got := read(readme)
	for _, want := range []string{"before\n" + begin + "\n| guarantee |", end + "\nafter\n",
		"| baseline; black hole | 0 | leader killed: no write for: 1.2 s |"} {
		if !strings.Contains(got, want) {
			t.Errorf("README: got %s, want %q in it", got, want)
		}
	}
	if strings.Contains(got, "old") {
		t.Errorf("README: got %s, want the old table gone", got)
	}
	got = read(docs)
	for _, want := range []string{"on 2026-01-02", "2 scenarios, 27 checks, 4 acknowledged writes, 1 receipts: 0 violations. 1 runs with a guard switched off.",
		"keygate v1, etcd 3.", "| black hole | the end of a proof | G3 | 500 |", `| black hole | network swallows \| everything | G3 | 20 | 5 | 3 | 0 | 0 | first refusal: 2.9 s; leader killed: no write for: 1.2 s |`,
		`| none; network swallows \| everything | 0 | first refusal: 2.9 s; leader killed`} {
		if !strings.Contains(got, want) {
			t.Errorf("page: got %s, want %q in it", got, want)
		}
	}
}

func TestRunTellsWhatIsWrong(t *testing.T) {
	tests := []struct{ name, rows, readme, want string }{
		{"no rows", "", begin + end, "empty"},
		{"no markers", rows, "text", "no line " + begin},
		{"half of the markers", rows, begin, "no line " + end},
		{"not JSON", "x", begin + end, "read the report"},
		{"a violation", `{"scenario":"a","violations":{"G3":2}}`, begin + end, "a: violations map[G3:2]"},
		{"a guard that nobody misses", `{"scenario":"a","guard":"b","guardOf":"G3","violations":{"G1":2}}`, begin + end, "a without b: nothing was seen"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			in, readme := filepath.Join(dir, "rows"), filepath.Join(dir, "README.md")
			for path, text := range map[string]string{in: test.rows, readme: test.readme} {
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			err := run(in, readme, filepath.Join(dir, "faults.md"), "", "")
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
}
