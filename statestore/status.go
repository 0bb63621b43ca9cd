package statestore

import (
	"log/slog"
	"sync"
	"time"
)

// Status is what a store can say of itself. Counters only grow.
type Status struct {
	// Fresh tells whether the store answers; if not, Problem says why.
	Fresh   bool   `json:"fresh"`
	Problem string `json:"problem,omitempty"`
	// ProofAge is the time since the last proof was begun, in nanoseconds in
	// JSON; -1 before the first.
	ProofAge        time.Duration `json:"proofAge"`
	StalenessBudget time.Duration `json:"stalenessBudget"`
	AppliedRevision int64         `json:"appliedRevision"`
	Epoch           int64         `json:"epoch"`
	ClusterID       uint64        `json:"clusterId,string"`

	// Registration is RegistrationOff, or tells whether the replica is in the
	// registry, under ReplicaID; Acknowledged is the newest revision that it has
	// acknowledged there.
	Registration     Registration `json:"registration"`
	ReplicaID        string       `json:"replicaId,omitempty"`
	Acknowledged     int64        `json:"acknowledgedRevision"`
	Acknowledgements int64        `json:"acknowledgements"`
	AckErrors        int64        `json:"acknowledgementErrors"`
	Unregistered     int64        `json:"registrationsLost"` // or failed

	// Index tells whether checks are answered from a copy of all records, how many
	// that holds, and how many checks it has answered.
	Index        IndexState `json:"index"`
	IndexRecords int        `json:"indexRecords"`
	Indexed      int64      `json:"indexAnswers"`

	Hits        int64 `json:"cacheHits"`         // records used from the cache
	AbsentHits  int64 `json:"negativeCacheHits"` // keys known not to exist
	CaughtUp    int64 `json:"cacheCaughtUp"`     // cached records brought up to date by the one event they lacked
	Misses      int64 `json:"cacheMisses"`       // records that had to be loaded
	Loads       int64 `json:"loads"`             // reads sent to etcd
	LoadErrors  int64 `json:"loadErrors"`
	LocalLoads  int64 `json:"loadsLocal"`    // answered by one member, without a leader
	Joined      int64 `json:"loadsJoined"`   // checks that shared another's load
	Shed        int64 `json:"loadsShed"`     // loads refused to protect etcd
	Rereads     int64 `json:"loadsRepeated"` // reads repeated because an event came meanwhile
	Waits       int64 `json:"waits"`         // checks that waited for the watch to catch up with a load
	Snapshots   int64 `json:"snapshots"`     // checks that read all records in one transaction
	Unreadable  int64 `json:"unreadable"`    // loads of a record that cannot be read
	Events      int64 `json:"events"`
	Repeated    int64 `json:"eventsRepeated"`
	Ignored     int64 `json:"eventsIgnored"` // on keys outside the schema
	Gaps        int64 `json:"gaps"`
	Replaced    int64 `json:"watchesReplaced"`
	Probes      int64 `json:"probes"`
	ProbeErrors int64 `json:"probeErrors"`
}

// Registration is a replica's place in the fleet.
type Registration string

// The registrations. A replica whose registration is off is outside of every
// receipt.
const (
	RegistrationOff  Registration = "off"
	Registered       Registration = "registered"
	RegistrationLost Registration = "none"
)

// Status returns the figures of now, each by itself exact.
func (s *Store) Status() Status {
	e, c := s.epoch.Load(), &s.counts
	st := Status{
		ProofAge: -1, StalenessBudget: s.budget, AppliedRevision: e.applied.Load(), Epoch: e.number, ClusterID: e.cluster,
		Hits: c.hits.Load(), AbsentHits: c.absentHits.Load(), CaughtUp: c.caughtUp.Load(), Misses: c.misses.Load(),
		Loads: c.loads.Load(), LoadErrors: c.loadErrors.Load(), LocalLoads: c.localLoads.Load(), Joined: c.joined.Load(), Shed: c.shed.Load(),
		Rereads: c.rereads.Load() + c.rejoined.Load(), Waits: c.waits.Load(), Snapshots: c.snapshots.Load(), Unreadable: c.unreadable.Load(),
		Events: c.events.Load(), Repeated: c.repeated.Load(), Ignored: c.ignored.Load(), Gaps: c.gaps.Load(), Replaced: c.replaced.Load(),
		Probes: c.probes.Load(), ProbeErrors: c.probeErrors.Load(),
	}
	f := s.fleet
	switch {
	case f.registry == nil:
		st.Registration = RegistrationOff
	case f.current.Load() == nil:
		st.Registration = RegistrationLost
	default:
		st.Registration = Registered
	}
	st.ReplicaID, st.Acknowledged = f.self.ID, f.acknowledged.Load()
	st.Acknowledgements, st.AckErrors, st.Unregistered = f.acknowledgements.Load(), f.failures.Load(), f.losses.Load()
	state, size := s.indexState(e)
	st.Index, st.IndexRecords, st.Indexed = state, size.Keys+size.Apps, c.indexed.Load()
	if p := e.proof.Load(); p != nil {
		st.ProofAge = now() - p.t0
	}
	if err := s.Fresh(); err != nil {
		st.Problem = err.Error()
	} else {
		st.Fresh = true
	}
	return st
}

// limitedLog is a logger that a flood cannot flood: at most ten warnings a
// second with one message, with the number left out. Other levels pass.
type limitedLog struct {
	log *slog.Logger

	mu    sync.Mutex
	gates map[string]*gate // by message, of which there are few
}

type gate struct {
	until   time.Duration // now, before which warnings are left out
	skipped int64
}

func (l *limitedLog) Info(msg string, args ...any)  { l.log.Info(msg, args...) }
func (l *limitedLog) Error(msg string, args ...any) { l.log.Error(msg, args...) }

// Warn logs unless it has logged the same message within the last 100 ms.
func (l *limitedLog) Warn(msg string, args ...any) {
	skipped, ok := l.pass(msg)
	if !ok {
		return
	}
	if skipped > 0 {
		args = append(args, "warnings_left_out", skipped)
	}
	l.log.Warn(msg, args...)
}

func (l *limitedLog) pass(msg string) (skipped int64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.gates[msg]
	if g == nil {
		g = &gate{}
		l.gates[msg] = g
	}
	t := now()
	if t < g.until {
		g.skipped++
		return 0, false
	}
	skipped, g.skipped, g.until = g.skipped, 0, t+100*time.Millisecond
	return skipped, true
}
