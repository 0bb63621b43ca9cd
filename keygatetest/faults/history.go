// Package faults breaks keygate on purpose and watches what it answers: real
// replicas as processes, on a real etcd, behind proxies that fail, under load.
// Everything that is asked and answered is recorded on one clock, and one
// checker holds the record against the guarantees.
//
// A scenario is a [Scenario]: it is run as it is, and must show no violation;
// and once for each of its guards with that guard switched off, and must then
// show one. A suite that cannot see a broken keygate proves nothing about one
// that works.
package faults

import (
	"cmp"
	"fmt"
	"slices"
	"sort"
	"sync"
	"time"

	"keygate/authz"
)

// Level of a flag: which of the four that a key needs.
type Level uint8

// The levels, in the order of the ladder.
const (
	LevelKey Level = iota
	LevelApp
	LevelDeveloper
	LevelProduct
	numLevels
)

// String names the level.
func (l Level) String() string {
	return [...]string{"key", "app", "developer", "product"}[l]
}

// Opens tells whether a value is the one exact word that opens the level.
func (l Level) Opens(value string) bool {
	if l == LevelDeveloper {
		return value == authz.StatusActive.String()
	}
	return value == authz.StatusApproved.String()
}

// closes tells whether a value is a word that closes the level by name. Any
// other that does not open is nonsense, which must not open either.
func (l Level) closes(value string) bool {
	if l == LevelDeveloper {
		return value == authz.StatusInactive.String()
	}
	return value == authz.StatusRevoked.String() || value == authz.StatusPending.String()
}

// Outcome of a write, as its writer knows it.
type Outcome uint8

// The outcomes. A write whose outcome is unknown may take effect at any time
// after its start, or never.
const (
	Unknown Outcome = iota
	Acked
	Failed
)

// String names the outcome.
func (o Outcome) String() string { return [...]string{"unknown", "acknowledged", "failed"}[o] }

// Write is one change of a flag.
type Write struct {
	// Start and End of the call, by the recorder's clock.
	Start, End time.Duration
	// Path of the flag in etcd, its level, and the keys that it concerns.
	Path  string
	Level Level
	Keys  []int
	// Value that was written, unless Deleted.
	Value   string
	Deleted bool
	Outcome Outcome
	// Already: the flag was so before, and nothing was written.
	Already bool
	// Managed: the ledger wrote it, which may need more than one transaction.
	Managed bool
	// Revision at which it was committed; 0 while that is not known.
	Revision int64
	// Receipt, if the write waited for one and got it.
	Receipt *Receipt
}

// Open tells whether the write opens its flag.
func (w *Write) Open() bool { return !w.Deleted && w.Level.Opens(w.Value) }

func (w *Write) word() string {
	if w.Deleted {
		return "(deleted)"
	}
	return fmt.Sprintf("%q", w.Value)
}

// Receipt of the fleet: after End, no registered replica says yes to what the
// write closed.
type Receipt struct {
	End time.Duration
	// Total replicas were registered, Applied of them have acknowledged, Fenced
	// refuse by themselves.
	Total, Applied, Fenced int
}

// Read is a linearizable read of a flag.
type Read struct {
	Start, End time.Duration
	Path       string
	// Value, unless Absent.
	Value  string
	Absent bool
	// Revision at which the value was written.
	Revision int64
}

// Check is one question to one replica.
type Check struct {
	Start, End time.Duration
	Replica    int32
	Key        int32
	// Failed: there was no answer, and so no yes.
	Failed bool
	// Reason of the answer; Allowed is the yes.
	Reason authz.Reason
}

// Yes tells whether the check was allowed.
func (c *Check) Yes() bool { return !c.Failed && c.Reason == authz.Allowed }

// decided tells whether the answer says anything of the key's flags.
func (c *Check) decided() bool {
	if c.Failed {
		return false
	}
	switch c.Reason {
	case authz.Stale, authz.Overloaded, authz.Internal, authz.KeyMissing, authz.KeyMalformed, authz.ProductUnresolved, authz.KeyExpired:
		return false
	}
	return true
}

func (c *Check) answer() string {
	if c.Failed {
		return "no answer"
	}
	return c.Reason.String()
}

// Poll is one look at a replica's readiness.
type Poll struct {
	Start, End time.Duration
	Replica    int
	Ready      bool
}

// Kind of a mark.
type Kind uint8

// The kinds.
const (
	// Note is for whoever reads the history.
	Note Kind = iota
	// FaultOn and FaultOff enclose the time in which something was broken; what
	// goes wrong outside of it goes wrong on the healthy path.
	FaultOn
	FaultOff
	// CutOff and Healed enclose the time in which a replica reached no etcd at
	// all.
	CutOff
	Healed
	// Started, Ready and Ended are those of a replica's process.
	Started
	Ready
	Ended
)

// String names the kind.
func (k Kind) String() string {
	return [...]string{"note", "fault on", "fault off", "cut off", "healed", "started", "ready", "ended"}[k]
}

// Everyone is the replica of a mark that concerns no replica by itself, and of an
// answer that came through Envoy from nobody knows which.
const Everyone = -1

// Mark is something that happened.
type Mark struct {
	At      time.Duration
	Kind    Kind
	Replica int
	Text    string
}

// Recorder keeps what happens, on one monotonic clock that begins with it. It
// is safe for concurrent use.
type Recorder struct {
	began time.Time

	mu      sync.Mutex
	streams []*Stream
	main    *Stream
}

// NewRecorder returns an empty one.
func NewRecorder() *Recorder {
	r := &Recorder{began: time.Now()}
	r.main = r.Stream()
	return r
}

// Now is the time since the recorder was made.
func (r *Recorder) Now() time.Duration { return time.Since(r.began) }

// Stream returns a new buffer. Each worker takes one, so that recording waits
// for nobody.
func (r *Recorder) Stream() *Stream {
	s := &Stream{}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.streams = append(r.streams, s)
	return s
}

// Mark records that something happened, now.
func (r *Recorder) Mark(kind Kind, replica int, format string, args ...any) {
	r.main.Mark(Mark{At: r.Now(), Kind: kind, Replica: replica, Text: fmt.Sprintf(format, args...)})
}

// History is all that was recorded so far, in the order of its beginning.
func (r *Recorder) History() *History {
	r.mu.Lock()
	streams := slices.Clone(r.streams)
	r.mu.Unlock()
	h := &History{}
	for _, s := range streams {
		s.mu.Lock()
		h.Checks = append(h.Checks, s.h.Checks...)
		h.Writes = append(h.Writes, s.h.Writes...)
		h.Reads = append(h.Reads, s.h.Reads...)
		h.Polls = append(h.Polls, s.h.Polls...)
		h.Marks = append(h.Marks, s.h.Marks...)
		s.mu.Unlock()
	}
	slices.SortStableFunc(h.Checks, func(a, b Check) int { return cmp.Compare(a.Start, b.Start) })
	slices.SortStableFunc(h.Writes, func(a, b Write) int { return cmp.Compare(a.Start, b.Start) })
	slices.SortStableFunc(h.Reads, func(a, b Read) int { return cmp.Compare(a.Start, b.Start) })
	slices.SortStableFunc(h.Polls, func(a, b Poll) int { return cmp.Compare(a.Start, b.Start) })
	slices.SortStableFunc(h.Marks, func(a, b Mark) int { return cmp.Compare(a.At, b.At) })
	return h
}

// Stream is one worker's buffer of a Recorder.
type Stream struct {
	mu sync.Mutex // held by the worker, and by History
	h  History
}

// Check records one.
func (s *Stream) Check(c Check) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.h.Checks = append(s.h.Checks, c)
}

// Write records one.
func (s *Stream) Write(w Write) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.h.Writes = append(s.h.Writes, w)
}

// Read records one.
func (s *Stream) Read(r Read) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.h.Reads = append(s.h.Reads, r)
}

// Poll records one.
func (s *Stream) Poll(p Poll) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.h.Polls = append(s.h.Polls, p)
}

// Mark records one.
func (s *Stream) Mark(m Mark) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.h.Marks = append(s.h.Marks, m)
}

// Event is one change of a flag as etcd's own history has it.
type Event struct {
	Path     string
	Value    string
	Deleted  bool
	Revision int64
}

// History is what happened: each kind in the order of its beginning.
type History struct {
	Checks []Check
	Writes []Write
	Reads  []Read
	Polls  []Poll
	Marks  []Mark
	// Final is what stands in etcd at the end, by path; nil if nobody looked.
	Final map[string]Event
	// Events are etcd's own history after revision EventsFrom, in its order; nil
	// if it was compacted away or nobody looked.
	Events     []Event
	EventsFrom int64
	// Undecided is how many keys or flags porcupine had no time for; Verify counts
	// them.
	Undecided int
}

// Resolve finds in etcd's own history what became of the writes whose outcome
// their writers do not know. Those that it does not hold never happened.
//
// It also finds the revision of a write by the ledger whose first transaction
// was committed and its answer lost: the ledger then looks, writes only its
// barrier again, and tells the revision of that.
func (h *History) Resolve() {
	if h.Events == nil {
		return
	}
	byPath := map[string][]Event{}
	for _, e := range h.Events {
		byPath[e.Path] = append(byPath[e.Path], e)
	}
	for i := range h.Writes {
		w := &h.Writes[i]
		if !w.Managed || w.Already || w.Revision == 0 {
			continue
		}
		all := byPath[w.Path]
		n := sort.Search(len(all), func(i int) bool { return all[i].Revision > w.Revision })
		if n > 0 && all[n-1].Deleted == w.Deleted && all[n-1].Value == w.Value {
			w.Revision = all[n-1].Revision
		}
	}
	known := map[string]map[int64]bool{} // path, revision: some writer's own
	for i := range h.Writes {
		if w := &h.Writes[i]; w.Revision > 0 && !w.Already { // who wrote nothing is told the revision of others
			if known[w.Path] == nil {
				known[w.Path] = map[int64]bool{}
			}
			known[w.Path][w.Revision] = true
		}
	}
	for _, e := range h.Events {
		if known[e.Path][e.Revision] {
			continue
		}
		// The first that may have been it: writers of one flag take turns, and a
		// later one that was meant writes the same.
		for i := range h.Writes {
			w := &h.Writes[i]
			if w.Outcome == Unknown && w.Revision == 0 && w.Path == e.Path && w.Deleted == e.Deleted && w.Value == e.Value {
				w.Revision = e.Revision
				break
			}
		}
	}
	for i := range h.Writes {
		if w := &h.Writes[i]; w.Outcome == Unknown && w.Revision == 0 {
			w.Outcome = Failed
		}
	}
}
