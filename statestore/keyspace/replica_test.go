package keyspace_test

import (
	"testing"
	"time"

	"keygate/statestore/keyspace"
)

func TestReplica(t *testing.T) {
	space, err := keyspace.New("/k")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := space.Replica("ID1"), "/k.replicas/ID1"; got != want {
		t.Errorf("path: got %s, want %s", got, want)
	}
	at := time.UnixMilli(1_764_000_000_123)
	for _, want := range []keyspace.Replica{
		{Version: "v1", Host: "pod-1", Pid: 7, StalenessBudget: 5 * time.Second, Acknowledged: 42, Fresh: true, ProofAge: 312 * time.Millisecond, At: at},
		{StalenessBudget: time.Minute, ProofAge: -1, At: at},
	} {
		got, err := keyspace.ParseReplica([]byte(want.Value()))
		if err != nil || got != want {
			t.Errorf("%s: got %+v, %v; want %+v", want.Value(), got, err, want)
		}
	}
	const full = `{"v":1,"version":"v1","host":"h","pid":7,"stalenessBudgetMs":5000,"organizations":["*"],"acknowledged":42,"fresh":true,"proofAgeMs":312,"at":1764000000123}`
	if got := (keyspace.Replica{Version: "v1", Host: "h", Pid: 7, StalenessBudget: 5 * time.Second, Acknowledged: 42, Fresh: true, ProofAge: 312 * time.Millisecond, At: at}).Value(); got != full {
		t.Errorf("value: got %s, want %s", got, full)
	}
	for _, bad := range []string{"", "{}", "null", `{"v":2,"acknowledged":9}`, `{"v":1,"acknowledged":"9"}`, `[1]`, full + "x"} {
		if r, err := keyspace.ParseReplica([]byte(bad)); err == nil {
			t.Errorf("%s: got %+v, want an error", bad, r)
		}
	}
}
