package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"

	"keygate/bench/load"
	"keygate/examples/quickstart"
)

var update = flag.Bool("update", false, "write the golden files")

// example has a pair of subjects, and three of them.
func example() *Result {
	return &Result{
		Scenario: "cpu", Title: "Cost of a check", About: []string{"A sentence.", "Another one."}, Command: "go run ./bench cpu",
		Time:     time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Versions: Versions{Keygate: "v1.2.3", Go: "go1.26.0", GRPC: "1.85.0", Etcd: "3.7.3", Envoy: "1.40.0", Processors: 2},
		Tables: []Table{
			{Title: "100 keys", Subjects: []string{"no-op", "keygate"}, Figures: []Figure{
				{Name: "CPU", Unit: "µs", Values: [][]float64{{40, 44, 42}, {20, 33, 21}}},
				{Name: "a | b", Unit: "", Values: [][]float64{{1234567}, {7654321}}},
				{Name: "errors", Plain: true, Values: [][]float64{{0}, {0}}},
			}},
			{Subjects: []string{"none", "no-op", "keygate"}, Figures: []Figure{
				{Name: "p50", Unit: "µs", Values: [][]float64{{1, 2}, {2, 2}, {3, 8}}},
				{Name: "added p50", Unit: "µs", Plain: true, Values: [][]float64{{0, 0}, {1, 0}, {2, 6}}},
			}},
		},
		Notes: []string{"A note."}, Smoke: true,
	}
}

func TestReport(t *testing.T) {
	results, docs := t.TempDir(), t.TempDir()
	if err := report(results, docs); err == nil {
		t.Error("a report of nothing: got nil, want an error")
	}
	if err := example().write(results); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(results, "benchstat.txt"), []byte("BenchmarkX 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := report(results, docs); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"performance.md", "performance-cpu.svg"} {
		got, err := os.ReadFile(filepath.Join(docs, name))
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", "golden-"+name)
		if *update {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Errorf("%s is not %s; go test ./bench -update shows the difference by git diff. Got:\n%s", name, golden, got)
		}
	}
}

func TestSpread(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		want   string
	}{
		{nil, "0"}, {[]float64{5}, "5.00"}, {[]float64{3, 1, 2}, "2.00 [1.00 .. 3.00]"}, {[]float64{1, 2}, "1.50 [1.00 .. 2.00]"},
		{[]float64{1234567.8}, "1,234,568"}, {[]float64{-1234}, "-1,234"}, {[]float64{0.05}, "0.0500"}, {[]float64{999}, "999"}, {[]float64{45.67}, "45.7"},
	} {
		if got := spreadOf(tt.values).String(); got != tt.want {
			t.Errorf("spread of %v: got %s, want %s", tt.values, got, tt.want)
		}
	}
	if got := ratios([]float64{2, 0, 4}, []float64{1, 1, 8}); len(got) != 2 || got[0] != 0.5 || got[1] != 2 {
		t.Errorf("ratios: got %v, want 0.5 and 2: there is none to 0", got)
	}
}

// The requests are what their README says, and every key of the bench fits.
func TestCaptured(t *testing.T) {
	for name, headers := range map[string]int{allHeaders: 20, hardened: 1} {
		c, err := load.ReadCaptured(filepath.Join("testdata", name+".json"))
		if err != nil {
			t.Fatal(err)
		}
		var check authv3.CheckRequest
		if err := proto.Unmarshal(c.Message, &check); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		h := check.GetAttributes().GetRequest().GetHttp()
		if got := len(h.GetHeaders()) + len(h.GetHeaderMap().GetHeaders()); got != headers {
			t.Errorf("%s: got %d headers, want %d", name, got, headers)
		}
		if got := check.GetAttributes().GetRouteMetadataContext().GetFilterMetadata()["keygate"].GetFields()["product"].GetStringValue(); got != string(product) {
			t.Errorf("%s: got product %q, want %q", name, got, product)
		}
		if _, err := load.NewRequest(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	seen := map[string]bool{}
	for n := range uint64(1000) {
		key := make([]byte, len(quickstart.OrdersKey))
		cycle(1000)(n, key)
		keyRecord(string(key)) // panics if it is not valid
		seen[string(key)] = true
	}
	if len(seen) != 1000 || !seen[keyText(999)] {
		t.Errorf("a cycle of 1000 keys has %d", len(seen))
	}
}

// Smoke: the scenario starts both servers, loads them by turns and writes its
// file. Its numbers mean nothing and go into a folder of the test's.
func TestSmoke(t *testing.T) {
	results := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := run(ctx, []string{"cpu", "-rounds", "1", "-duration", "100ms", "-keys", "20", "-results", results}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(results, "cpu.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got Result
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if !got.Smoke || len(got.Tables) != 1 || !strings.Contains(got.markdown(), "too short to mean anything") {
		t.Errorf("got %+v, want one table, marked as too short", got)
	}
	for _, f := range got.Tables[0].Figures {
		for i, v := range f.Values {
			if len(v) != 1 || v[0] <= 0 {
				t.Errorf("%s of %s: got %v, want one value above 0", f.Name, got.Tables[0].Subjects[i], v)
			}
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"-rounds", "1"}, {"cpux"}, {"cpu", "-rounds", "0"}, {"cpu", "-keys", "none"}, {"cpu", "more"}} {
		if err := run(t.Context(), args); err == nil {
			t.Errorf("bench %s: got nil, want an error", fmt.Sprint(args))
		}
	}
}
