package faults

import (
	"cmp"
	"container/heap"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"

	"keygate/authz"
)

// Guarantee that keygate gives.
type Guarantee string

// The guarantees. S is the staleness budget; X is the time from a write's
// acknowledgement to the last check that began after it and was still allowed.
const (
	// G1: while nothing is broken, X is milliseconds; it is measured, and above S
	// it is a violation.
	G1 Guarantee = "G1"
	// G2: no check that begins after a receipt says yes, on any registered
	// replica.
	G2 Guarantee = "G2"
	// G3: whatever is broken, no check that begins more than S after the
	// acknowledgement says yes, and none at all on a replica that has been cut off
	// for longer than S.
	G3 Guarantee = "G3"
	// G4: no acknowledged write is lost.
	G4 Guarantee = "G4"
	// G5: a revocation never undoes itself: what a replica has refused it does not
	// allow again without a new approval.
	G5 Guarantee = "G5"
	// G6: no yes before the replica is ready.
	G6 Guarantee = "G6"
	// G7: only the exact word opens.
	G7 Guarantee = "G7"
	// G8: writes and answers have one order: linearizable for each key, and an
	// approval is no slower than a revocation.
	G8 Guarantee = "G8"
)

// Guarantees in their order, with what each says in a line.
var Guarantees = []struct {
	Name Guarantee
	Says string
}{
	{G1, "Healthy: a revocation takes effect milliseconds after its acknowledgement"},
	{G2, "After a receipt, no check that begins is allowed on any registered replica"},
	{G3, "Whatever is broken: no yes to a check that begins more than S after the acknowledgement"},
	{G4, "No acknowledged write is lost"},
	{G5, "A revocation never undoes itself"},
	{G6, "No yes before a replica is ready"},
	{G7, "Only the exact word opens; an error or an unknown value refuses"},
	{G8, "Approve and revoke are ordered by revision: linearizable for each key"},
}

// Rules of a run.
type Rules struct {
	// S, the staleness budget of the replicas. Required.
	S time.Duration
	// Outside lists replicas that do not register, of which receipts say nothing.
	Outside []int
	// Patience of porcupine for one key; zero means 2 s. A history that is not
	// decided by then is no violation.
	Patience time.Duration
}

// Violation of a guarantee.
type Violation struct {
	Guarantee Guarantee
	At        time.Duration
	// Replica and Key that it was seen on; -1 where there is none.
	Replica, Key int
	// What happened. Only the first few of a guarantee say it.
	What string
}

// described is how many violations of one guarantee say what happened: a guard
// that is switched off makes thousands.
const described = 10

// Verify holds a history against the guarantees. The truth of a flag is the
// order of its writes by revision. It calls h.Resolve.
func Verify(h *History, rules Rules) []Violation {
	if rules.Patience == 0 {
		rules.Patience = 2 * time.Second
	}
	h.Resolve()
	v := &verifier{h: h, rules: rules, flags: map[string]*flag{}, keys: map[int]*key{}, told: map[Guarantee]int{}}
	v.index()
	for i := range h.Checks {
		if c := &h.Checks[i]; c.Yes() {
			v.stale(c)
		}
	}
	v.cutOff()
	v.lost()
	v.monotone()
	v.early()
	v.linearFlags()
	v.linearKeys()
	slices.SortStableFunc(v.found, func(a, b Violation) int { return cmp.Compare(a.At, b.At) })
	return v.found
}

type verifier struct {
	h      *History
	rules  Rules
	flags  map[string]*flag
	keys   map[int]*key
	faults []span // that were on
	told   map[Guarantee]int
	found  []Violation
}

// span of time. An open one ends at forever.
type span struct {
	from, to time.Duration
	replica  int
}

const forever = time.Duration(1<<63 - 1)

// flag is all writes of one path.
type flag struct {
	level Level
	// closers that were acknowledged, by their end, and by the end of their
	// receipt; each with the newest revision up to it.
	acked, received []bound
	// openers by their start, likewise. One whose revision nobody knows may have
	// any.
	openers []bound
	// tainted: a write's revision is not known and may have been committed.
	tainted bool
}

// bound says that newest is the newest revision among the writes up to at, and
// by which write.
type bound struct {
	at     time.Duration
	newest int64
	w      *Write
}

// newest of bounds whose time is before at.
func newest(b []bound, at time.Duration) (int64, *Write) {
	n := sort.Search(len(b), func(i int) bool { return b[i].at >= at })
	if n == 0 {
		return 0, nil
	}
	return b[n-1].newest, b[n-1].w
}

func accumulate(b []bound) {
	slices.SortStableFunc(b, func(x, y bound) int { return cmp.Compare(x.at, y.at) })
	for i := 1; i < len(b); i++ {
		if b[i-1].newest >= b[i].newest {
			b[i].newest, b[i].w = b[i-1].newest, b[i-1].w
		}
	}
}

// key is what the answers for one key depend on.
type key struct {
	paths  [numLevels]string
	states []state
	// tainted: the states are not known.
	tainted bool
}

// state of a key from a revision on: bit l of closed is set while the flag of
// level l is closed. Before a key's first write it is unborn.
type state struct {
	revision int64
	closed   uint8
	// start is the latest start among this write and those before: no answer that
	// ended earlier can be of this state.
	start time.Duration
	// acked is the earliest acknowledgement from here on: S after it an answer of
	// an older state is too old.
	acked time.Duration
	w     *Write
}

// unborn stands alone in closed: no replica has heard of the key yet, and says so.
const unborn uint8 = 1 << numLevels

func (v *verifier) violate(g Guarantee, at time.Duration, replica, key int, format string, args ...any) {
	x := Violation{Guarantee: g, At: at, Replica: replica, Key: key}
	if v.told[g]++; v.told[g] <= described {
		x.What = fmt.Sprintf(format, args...)
	}
	v.found = append(v.found, x)
}

func (v *verifier) index() {
	const any = int64(1<<63 - 1)
	byKey := map[int][]*Write{}
	for i := range v.h.Writes {
		w := &v.h.Writes[i]
		f := v.flags[w.Path]
		if f == nil {
			f = &flag{level: w.Level}
			v.flags[w.Path] = f
		}
		for _, k := range w.Keys {
			if v.keys[k] == nil {
				v.keys[k] = &key{}
			}
			v.keys[k].paths[w.Level] = w.Path
		}
		if w.Outcome == Failed {
			continue
		}
		revision := w.Revision
		if revision == 0 {
			revision, f.tainted = any, true
		}
		switch {
		case w.Open():
			f.openers = append(f.openers, bound{w.Start, revision, w})
		case w.Outcome == Acked:
			f.acked = append(f.acked, bound{w.End, revision, w})
			if w.Receipt != nil {
				f.received = append(f.received, bound{w.Receipt.End, revision, w})
			}
		}
		if w.Already {
			continue // no state began with it, whatever else was written at its revision
		}
		for _, k := range w.Keys {
			byKey[k] = append(byKey[k], w)
		}
	}
	for _, f := range v.flags {
		accumulate(f.acked)
		accumulate(f.received)
		accumulate(f.openers)
	}
	for k, writes := range byKey {
		v.keys[k].build(writes)
	}
	v.faults = v.spans(FaultOn, FaultOff)
}

// build the states of a key from its writes.
func (k *key) build(writes []*Write) {
	for _, w := range writes {
		if w.Revision == 0 {
			k.tainted = true
			return
		}
	}
	slices.SortStableFunc(writes, func(a, b *Write) int { return cmp.Compare(a.Revision, b.Revision) })
	k.states = append(k.states, state{closed: unborn, acked: forever, w: &Write{Level: LevelKey, Deleted: true}})
	s := state{}
	for _, w := range writes {
		s.revision, s.w, s.start = w.Revision, w, max(s.start, w.Start)
		s.acked = forever
		if w.Outcome == Acked {
			s.acked = w.End
		}
		s.closed &^= 1 << w.Level
		if !w.Open() {
			s.closed |= 1 << w.Level
		}
		if n := len(k.states); n > 0 && k.states[n-1].revision == w.Revision { // one transaction
			k.states[n-1] = s
			continue
		}
		k.states = append(k.states, s)
	}
	for i := len(k.states) - 2; i >= 0; i-- {
		k.states[i].acked = min(k.states[i].acked, k.states[i+1].acked)
	}
}

// spans between marks, for each replica.
func (v *verifier) spans(on, off Kind) (all []span) {
	type depth struct{ n, at int } // how many are open, and the place in all
	open := map[int]depth{}
	for _, m := range v.h.Marks {
		d := open[m.Replica]
		switch m.Kind {
		case on:
			if d.n == 0 {
				d.at = len(all)
				all = append(all, span{m.At, forever, m.Replica})
			}
			d.n++
		case off:
			if d.n--; d.n == 0 {
				all[d.at].to = m.At
			}
		}
		open[m.Replica] = d
	}
	return all
}

// broken tells whether something was, anywhere in the time.
func (v *verifier) broken(from, to time.Duration) bool {
	return slices.ContainsFunc(v.faults, func(s span) bool { return s.from <= to && s.to >= from })
}

// stale looks for a yes after the time in which it may still be given: G1, G2,
// G3, G7.
func (v *verifier) stale(c *Check) {
	k := v.keys[int(c.Key)]
	if k == nil {
		return
	}
	for _, path := range k.paths {
		f := v.flags[path]
		if f == nil {
			continue
		}
		opened, _ := newest(f.openers, c.End)
		if revision, w := newest(f.acked, c.Start-v.rules.S); w != nil && opened <= revision {
			g := G1
			switch {
			case !w.Deleted && !w.Level.closes(w.Value):
				g = G7
			case v.broken(w.End, c.End):
				g = G3
			}
			v.violate(g, c.Start, int(c.Replica), int(c.Key), "replica %d allowed key %d, asked %v after the acknowledgement of %s at revision %d on %s; S is %v",
				c.Replica, c.Key, round(c.Start-w.End), w.word(), w.Revision, w.Level, v.rules.S)
			return
		}
		if slices.Contains(v.rules.Outside, int(c.Replica)) {
			continue
		}
		if revision, w := newest(f.received, c.Start); w != nil && opened <= revision {
			v.violate(G2, c.Start, int(c.Replica), int(c.Key), "replica %d allowed key %d, asked %v after the receipt of %s at revision %d on %s (%d of %d applied, %d fenced)",
				c.Replica, c.Key, round(c.Start-w.Receipt.End), w.word(), w.Revision, w.Level, w.Receipt.Applied, w.Receipt.Total, w.Receipt.Fenced)
			return
		}
	}
}

// cutOff looks for a yes on a replica that cannot have a proof any more: G3.
func (v *verifier) cutOff() {
	for _, s := range v.spans(CutOff, Healed) {
		first := sort.Search(len(v.h.Checks), func(i int) bool { return v.h.Checks[i].Start > s.from+v.rules.S })
		for i := first; i < len(v.h.Checks) && v.h.Checks[i].Start < s.to; i++ {
			c := &v.h.Checks[i]
			if c.Yes() && int(c.Replica) == s.replica && c.End < s.to {
				v.violate(G3, c.Start, s.replica, int(c.Key), "replica %d allowed key %d %v after it was cut off from etcd; S is %v",
					s.replica, c.Key, round(c.Start-s.from), v.rules.S)
			}
		}
	}
}

// lost looks for acknowledged writes that are not there: G4.
func (v *verifier) lost() {
	committed := map[string]map[int64]Event{}
	for _, e := range v.h.Events {
		if committed[e.Path] == nil {
			committed[e.Path] = map[int64]Event{}
		}
		committed[e.Path][e.Revision] = e
	}
	last := map[string]*Write{}
	maybe := map[string][]*Write{}
	for i := range v.h.Writes {
		w := &v.h.Writes[i]
		switch w.Outcome {
		case Unknown:
			maybe[w.Path] = append(maybe[w.Path], w)
		case Acked:
			if l := last[w.Path]; !w.Already && (l == nil || l.Revision < w.Revision) {
				last[w.Path] = w
			}
			if v.h.Events == nil || w.Revision <= v.h.EventsFrom || w.Already {
				continue
			}
			if e, ok := committed[w.Path][w.Revision]; !ok || e.Deleted != w.Deleted || e.Value != w.Value {
				v.violate(G4, w.End, -1, first(w.Keys), "the write of %s to %s was acknowledged at revision %d, and etcd's history has %s there",
					w.word(), w.Path, w.Revision, shown(e, ok))
			}
		}
	}
	if v.h.Final == nil {
		return
	}
	for path, w := range last {
		e, there := v.h.Final[path]
		e.Deleted = e.Deleted || !there
		same := e.Deleted == w.Deleted && (e.Deleted || e.Value == w.Value && e.Revision == w.Revision)
		// A write of unknown outcome may stand there instead, unless it is older.
		other := slices.ContainsFunc(maybe[path], func(m *Write) bool {
			return m.Deleted == e.Deleted && (e.Deleted || m.Value == e.Value && e.Revision > w.Revision)
		})
		if !same && !other {
			v.violate(G4, w.End, -1, first(w.Keys), "the last acknowledged write of %s is %s at revision %d, and at the end there is %s",
				path, w.word(), w.Revision, shown(e, there))
		}
	}
}

func first(keys []int) int {
	if len(keys) == 0 {
		return -1
	}
	return keys[0]
}

func shown(e Event, there bool) string {
	switch {
	case !there:
		return "nothing"
	case e.Deleted:
		return fmt.Sprintf("a deletion at revision %d", e.Revision)
	}
	return fmt.Sprintf("%q at revision %d", e.Value, e.Revision)
}

// given is an answer and the oldest state that explains it.
type given struct {
	end   time.Duration
	state int
}

type givens []given

func (g givens) Len() int           { return len(g) }
func (g givens) Less(i, j int) bool { return g[i].end < g[j].end }
func (g givens) Swap(i, j int)      { g[i], g[j] = g[j], g[i] }
func (g *givens) Push(x any)        { *g = append(*g, x.(given)) }
func (g *givens) Pop() any {
	old := *g
	x := old[len(old)-1]
	*g = old[:len(old)-1]
	return x
}

// monotone gives each answer of a replica for a key the oldest state of the key
// that explains it and is not older than any that an earlier answer needed:
// G5. Choosing the oldest leaves the most to those after it, so if there is none,
// no choice would have helped. A refusal on a state that was replaced more than
// S ago is an approval that was slower than a revocation may be: G8.
func (v *verifier) monotone() {
	for pair, checks := range v.pairs() {
		k := v.keys[pair.key]
		if k == nil || k.tainted || len(k.states) == 0 {
			continue
		}
		var under givens // answers that may not have ended yet
		low := 0
		for _, c := range checks {
			for len(under) > 0 && under[0].end < c.Start {
				low = max(low, heap.Pop(&under).(given).state)
			}
			at := -1
			for i := low; i < len(k.states) && k.states[i].start <= c.End; i++ {
				if explains(c, k.states[i].closed) {
					at = i
					break
				}
			}
			switch {
			case at >= 0:
				heap.Push(&under, given{c.End, at})
			case c.Yes():
				v.violate(G5, c.Start, pair.replica, pair.key, "replica %d allowed key %d after it had answered on revision %d, at which %s was %s; nothing has opened it since",
					pair.replica, pair.key, k.states[low].revision, k.states[low].w.Level, k.states[low].w.word())
			default:
				v.violate(G8, c.Start, pair.replica, pair.key, "replica %d refused key %d with %v after it had answered on revision %d, and nothing has closed that since",
					pair.replica, pair.key, c.Reason, k.states[low].revision)
			}
			if at < 0 || c.Yes() {
				continue
			}
			// The newest state that explains a refusal must not be too old.
			if at+1 < len(k.states) && k.states[at+1].acked < c.Start-v.rules.S && !explained(k, at+1, c) {
				v.violate(G8, c.Start, pair.replica, pair.key, "replica %d refused key %d with %v, asked %v after the acknowledgement of %s at revision %d on %s",
					pair.replica, pair.key, c.Reason, round(c.Start-k.states[at+1].acked), k.states[at+1].w.word(), k.states[at+1].revision, k.states[at+1].w.Level)
			}
		}
	}
}

// explained tells whether a state from i on explains c.
func explained(k *key, i int, c *Check) bool {
	for ; i < len(k.states) && k.states[i].start <= c.End; i++ {
		if explains(c, k.states[i].closed) {
			return true
		}
	}
	return false
}

// explains tells whether a key whose flags are closed as said is answered so.
func explains(c *Check, closed uint8) bool {
	has := func(l Level) bool { return closed&(1<<l) != 0 }
	if closed == unborn {
		return c.Reason == authz.KeyUnknown
	}
	switch c.Reason {
	case authz.Allowed:
		return closed == 0
	case authz.KeyRevoked, authz.KeyPending, authz.KeyUnknown:
		return has(LevelKey)
	case authz.AppRevoked, authz.AppPending:
		return has(LevelApp)
	case authz.DeveloperInactive:
		return has(LevelDeveloper)
	case authz.ProductRevoked, authz.ProductPending, authz.ProductNotOnKey:
		return has(LevelProduct)
	}
	return closed != 0
}

// pair of a replica and a key, whose answers follow one order.
type pair struct{ replica, key int }

// pairs are the answers that say something, by replica and key, in order.
func (v *verifier) pairs() map[pair][]*Check {
	all := map[pair][]*Check{}
	for i := range v.h.Checks {
		if c := &v.h.Checks[i]; c.decided() && c.Replica != Everyone {
			p := pair{int(c.Replica), int(c.Key)}
			all[p] = append(all[p], c)
		}
	}
	return all
}

// early looks for a yes between the start of a process and a moment at which it
// still said that it was not ready: G6.
func (v *verifier) early() {
	for i, m := range v.h.Marks {
		if m.Kind != Started {
			continue
		}
		// Until the process's first readiness, or its end.
		end := forever
		for _, n := range v.h.Marks[i+1:] {
			if n.Replica == m.Replica && (n.Kind == Started || n.Kind == Ended) {
				end = n.At
				break
			}
		}
		unready := time.Duration(-1)
		for _, p := range v.h.Polls {
			if p.Replica != m.Replica || p.Start < m.At || p.End > end {
				continue
			}
			if p.Ready {
				break
			}
			unready = p.Start
		}
		for j := sort.Search(len(v.h.Checks), func(j int) bool { return v.h.Checks[j].Start > m.At }); j < len(v.h.Checks) && v.h.Checks[j].Start < unready; j++ {
			if c := &v.h.Checks[j]; c.Yes() && int(c.Replica) == m.Replica && c.End < unready {
				v.violate(G6, c.Start, m.Replica, int(c.Key), "replica %d allowed key %d %v after its start and %v before it still said that it was not ready",
					m.Replica, c.Key, round(c.Start-m.At), round(unready-c.End))
			}
		}
	}
}

// input of an operation for porcupine: a write of one level, or a read.
type input struct {
	write bool
	level Level
	open  bool
	// value of a flag's register; revision of a write, 0 if nobody knows.
	value    string
	revision int64
}

// linearFlags checks the writes and the linearizable reads of each flag: G8.
func (v *verifier) linearFlags() {
	type found struct {
		value  string
		absent bool
	}
	model := porcupine.Model{
		Init: func() any { return found{absent: true} },
		Step: func(s, in, out any) (bool, any) {
			if i := in.(input); i.write {
				return true, found{i.value, !i.open}
			}
			return s.(found) == out.(found), s
		},
	}
	ops := map[string][]porcupine.Operation{}
	reads := map[string]bool{}
	for i := range v.h.Writes {
		if w := &v.h.Writes[i]; w.Outcome != Failed {
			value := w.Value
			if w.Deleted {
				value = ""
			}
			ops[w.Path] = append(ops[w.Path], porcupine.Operation{
				Input: input{write: true, open: !w.Deleted, value: value}, Call: int64(w.Start), Return: int64(acknowledged(w)),
			})
		}
	}
	for i := range v.h.Reads {
		r := &v.h.Reads[i]
		reads[r.Path] = true
		ops[r.Path] = append(ops[r.Path], porcupine.Operation{
			Input: input{}, Output: found{r.Value, r.Absent}, Call: int64(r.Start), Return: int64(r.End),
		})
	}
	for path := range reads {
		if v.illegal(model, ops[path], v.rules.Patience) {
			v.violate(G8, 0, -1, -1, "writes and reads of %s have no order that explains them", path)
		}
	}
}

// illegal asks porcupine, and counts what it cannot decide in time.
func (v *verifier) illegal(model porcupine.Model, ops []porcupine.Operation, within time.Duration) bool {
	if within <= 0 { // which porcupine would take for no limit
		v.h.Undecided++
		return false
	}
	r := porcupine.CheckOperationsTimeout(model, ops, within)
	if r == porcupine.Unknown {
		v.h.Undecided++
	}
	return r == porcupine.Illegal
}

func acknowledged(w *Write) time.Duration {
	if w.Outcome != Acked {
		return forever
	}
	return w.End
}

// linearKeys checks, for each replica and key, the writes and the answers: G8.
// A write that waited has taken effect at its receipt, any other at the latest S
// after its acknowledgement; writes take effect in the order of their revisions.
func (v *verifier) linearKeys() {
	type known struct {
		closed   uint8
		revision int64 // that the replica has come to
	}
	model := porcupine.Model{
		Init: func() any { return known{closed: unborn} },
		Step: func(s, in, out any) (bool, any) {
			k, i := s.(known), in.(input)
			if i.write {
				k.closed &^= unborn
			}
			switch {
			case !i.write:
				return explains(&Check{Reason: out.(authz.Reason)}, k.closed), k
			case i.revision > 0 && i.revision < k.revision:
				return false, k
			case i.open:
				k.closed &^= 1 << i.level
			default:
				k.closed |= 1 << i.level
			}
			k.revision = max(k.revision, i.revision)
			return true, k
		},
	}
	writes := map[int][]*Write{}
	for i := range v.h.Writes {
		if w := &v.h.Writes[i]; w.Outcome != Failed && !w.Already {
			for _, k := range w.Keys {
				writes[k] = append(writes[k], w)
			}
		}
	}
	end := time.Now().Add(10 * v.rules.Patience) // for all of them
	for p, checks := range v.pairs() {
		if len(writes[p.key]) == 0 {
			continue
		}
		var ops []porcupine.Operation
		for _, w := range writes[p.key] {
			effective := forever
			switch {
			case w.Receipt != nil && !slices.Contains(v.rules.Outside, p.replica):
				effective = w.Receipt.End
			case w.Outcome == Acked:
				effective = w.End + v.rules.S
			}
			ops = append(ops, porcupine.Operation{Input: input{write: true, level: w.Level, open: w.Open(), revision: w.Revision}, Call: int64(w.Start), Return: int64(effective)})
		}
		for _, c := range thinned(checks) {
			ops = append(ops, porcupine.Operation{Input: input{}, Output: c.Reason, Call: int64(c.Start), Return: int64(c.End)})
		}
		if v.illegal(model, ops, min(v.rules.Patience, time.Until(end))) {
			v.violate(G8, 0, p.replica, p.key, "writes of key %d and answers of replica %d have no order that explains them", p.key, p.replica)
		}
	}
}

// thinned leaves out answers that stand between two equal ones: the search is
// then of the changes, and monotone has looked at each.
func thinned(checks []*Check) (kept []*Check) {
	for i, c := range checks {
		if i > 0 && i < len(checks)-1 && checks[i-1].Reason == c.Reason && checks[i+1].Reason == c.Reason {
			continue
		}
		kept = append(kept, c)
	}
	return kept
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }

// Show prints a violation and what happened around it.
func (h *History) Show(x Violation) string {
	var b strings.Builder
	what := x.What
	if what == "" {
		what = fmt.Sprintf("replica %d, key %d: as those before", x.Replica, x.Key)
	}
	fmt.Fprintf(&b, "%s violated at %v: %s\n", x.Guarantee, round(x.At), what)
	for _, line := range h.around(x, 20) {
		b.WriteString("  " + line + "\n")
	}
	return b.String()
}

// around is what concerns the violation's key and replica, the n lines nearest
// to it. A run of equal answers is one line.
func (h *History) around(x Violation, n int) []string {
	type line struct {
		at   time.Duration
		text string
	}
	var lines []line
	add := func(at time.Duration, format string, args ...any) {
		lines = append(lines, line{at, fmt.Sprintf("%12v  ", round(at)) + fmt.Sprintf(format, args...)})
	}
	for _, m := range h.Marks {
		if m.Replica == Everyone || x.Replica < 0 || m.Replica == x.Replica {
			add(m.At, "-- %v %s", m.Kind, m.Text)
		}
	}
	for i := range h.Writes {
		if w := &h.Writes[i]; x.Key < 0 || slices.Contains(w.Keys, x.Key) {
			receipt := ""
			if w.Receipt != nil {
				receipt = fmt.Sprintf(", receipt at %v", round(w.Receipt.End))
			}
			add(w.Start, "write %s on %s, %v at %v, revision %d%s", w.word(), w.Level, w.Outcome, round(w.End), w.Revision, receipt)
		}
	}
	unready := 0
	for _, p := range h.Polls {
		switch {
		case p.Replica != x.Replica:
		case p.Ready:
			add(p.Start, "ready, after %d times not", unready)
			unready = 0
		default:
			if unready++; unready == 1 {
				add(p.Start, "not ready")
			}
		}
	}
	if x.Key >= 0 {
		last, run := "", 0
		var from, to time.Duration
		flush := func() {
			if run > 0 {
				add(from, "%d checks until %v: %s", run, round(to), last)
			}
			run = 0
		}
		for i := range h.Checks {
			c := &h.Checks[i]
			if int(c.Key) != x.Key || x.Replica >= 0 && int(c.Replica) != x.Replica {
				continue
			}
			if a := c.answer(); a != last || run == 0 || c.Start == x.At {
				flush()
				last, from = a, c.Start
			}
			run++
			to = max(to, c.End)
		}
		flush()
	}
	sort.SliceStable(lines, func(i, j int) bool { return lines[i].at < lines[j].at })
	at := sort.Search(len(lines), func(i int) bool { return lines[i].at > x.At })
	from := max(0, min(at-2*n/3, len(lines)-n))
	var text []string
	for _, l := range lines[from:min(len(lines), from+n)] {
		text = append(text, l.text)
	}
	return text
}
