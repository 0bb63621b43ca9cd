package keyspace

import (
	"encoding/json"
	"fmt"
	"time"
)

// Bounds of the staleness budget S. Below 3 s every election of an etcd leader
// (measured: 1.5 s at the median, 2.1 s at most) would be an outage. 60 s is what
// a receipt counts on for a replica of which nothing is known: whoever checks a
// budget and whoever waits for one must mean the same bound.
const (
	MinStalenessBudget = 3 * time.Second
	MaxStalenessBudget = 60 * time.Second
)

// Replicas is the prefix of the registrations of live replicas, with its final
// slash. It lies outside the watched prefix: an acknowledgement by each of N
// replicas is not N events for each of them.
func (s Space) Replicas() string { return s.prefix + ".replicas/" }

// Replica is the path at which the replica with this id registers.
func (s Space) Replica(id string) string { return s.Replicas() + id }

// Replica is what a replica says of itself at its registration, which stands
// under its lease. It is written once when the replica registers and again only
// to acknowledge a barrier: each is a write that every member of etcd stores.
type Replica struct {
	// ID is its name in the registry. It stands in the path, not in the value.
	ID string
	// Version of keygate.
	Version string
	// Host and Pid are for people to find it by.
	Host string
	Pid  int
	// StalenessBudget after which it refuses by itself.
	StalenessBudget time.Duration
	// Acknowledged: every change at or below this revision has taken effect. 0
	// until it has acknowledged anything.
	Acknowledged int64
	// Fresh tells whether it answered checks when it wrote this, ProofAge how old
	// its proof was then (-1: none yet), At when that was by its own clock.
	Fresh    bool
	ProofAge time.Duration
	At       time.Time
}

// replicaJSON is the stored form. Organizations are those it answers for: "*"
// is all.
type replicaJSON struct {
	V                 int      `json:"v"`
	Version           string   `json:"version"`
	Host              string   `json:"host"`
	Pid               int      `json:"pid"`
	StalenessBudgetMs int64    `json:"stalenessBudgetMs"`
	Organizations     []string `json:"organizations"`
	Acknowledged      int64    `json:"acknowledged"`
	Fresh             bool     `json:"fresh"`
	ProofAgeMs        int64    `json:"proofAgeMs"`
	At                int64    `json:"at"` // ms since the Unix epoch
}

// Value is r as it is stored.
func (r Replica) Value() string {
	proof := int64(-1)
	if r.ProofAge >= 0 {
		proof = r.ProofAge.Milliseconds()
	}
	b, err := json.Marshal(replicaJSON{Version, r.Version, r.Host, r.Pid, r.StalenessBudget.Milliseconds(), []string{"*"},
		r.Acknowledged, r.Fresh, proof, r.At.UnixMilli()})
	if err != nil {
		panic(err) // of strings and numbers
	}
	return string(b)
}

// ParseReplica reads a registration. Whoever cannot read one must count with a
// replica of which nothing is known.
func ParseReplica(value []byte) (Replica, error) {
	var j replicaJSON
	if err := json.Unmarshal(value, &j); err != nil {
		return Replica{}, fmt.Errorf("registration: %w", err)
	}
	if j.V != Version {
		return Replica{}, fmt.Errorf("registration of version %d, want %d", j.V, Version)
	}
	r := Replica{
		Version: j.Version, Host: j.Host, Pid: j.Pid, StalenessBudget: time.Duration(j.StalenessBudgetMs) * time.Millisecond,
		Acknowledged: j.Acknowledged, Fresh: j.Fresh, ProofAge: -1, At: time.UnixMilli(j.At),
	}
	if j.ProofAgeMs >= 0 {
		r.ProofAge = time.Duration(j.ProofAgeMs) * time.Millisecond
	}
	return r, nil
}
