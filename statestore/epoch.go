package statestore

import (
	"context"
	"fmt"
	"maps"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"

	"keygate/authz"
	"keygate/statestore/index"
	"keygate/statestore/keyspace"
)

// epoch is one uninterrupted history of one cluster. A restore, or another
// cluster behind the same address, begins a new one; nothing read in an
// earlier epoch is ever used again.
type epoch struct {
	number  int64
	cluster uint64

	// fence[slot] is the newest revision of an event on a record of that slot.
	// Two records that share a slot cost each other loads, never correctness.
	fence []atomic.Int64
	// recent holds the newest change of a flag among the records that share a
	// place in it. It is stored before the fence that it raises.
	recent []atomic.Pointer[change]
	// floor is the revision below which no record may be used, whatever its
	// fence. It is never 0 while anything may load.
	floor atomic.Int64
	// applied is how far the fences have come. It only grows, and it is stored
	// after the fences that it stands for.
	applied atomic.Int64
	// term and seen are the newest raft term and revision that a linearizable
	// read has answered. Loads run ahead of the watch, so seen may be beyond
	// applied.
	term atomic.Uint64
	seen atomic.Int64
	// index is the copy of all records that is being made or complete; nil for none.
	// The watcher applies each change to it before applied says so. It answers
	// only while its revision is not below floor.
	index     atomic.Pointer[index.Index]
	indexFull atomic.Bool // and given up
	// proof of freshness, nil before the first.
	proof atomic.Pointer[proof]

	// grown is closed and replaced whenever applied grows and someone waits.
	grown struct {
		sync.Mutex
		ch chan struct{}
	}
	// end is closed when the epoch is over; dead says so without a channel.
	end struct {
		sync.Once
		ch    chan struct{}
		cause error
	}
	dead atomic.Bool
}

func newEpoch(number int64, slots int) *epoch {
	e := &epoch{number: number, fence: make([]atomic.Int64, slots), recent: make([]atomic.Pointer[change], min(slots, recentChanges))}
	e.floor.Store(math.MaxInt64)
	e.end.ch = make(chan struct{})
	return e
}

// proof says that a linearizable read begun at t0 answered revision H and found
// the replica registered, and that the watch has applied H. Times are those of
// now; validUntil is not beyond the registration's lease.
type proof struct {
	epoch      *epoch
	member     *registration
	t0         time.Duration
	validUntil time.Duration
	made       time.Time // before t0
}

// Valid tells whether the proof may still be answered on.
func (p *proof) Valid() bool {
	return !p.epoch.dead.Load() && !p.member.lost.Load() && now() < p.validUntil
}

// stands tells the same by Go's clock, which costs a tenth of a system call and
// does not run through a suspend: enough to refuse early, never to allow.
func (p *proof) stands() bool {
	return !p.epoch.dead.Load() && !p.member.lost.Load() && time.Since(p.made) < p.validUntil-p.t0
}

// record is one folder of keys as it was at revision rev. Immutable. Exactly
// one of its three bodies is set, or none: the record did not exist.
type record struct {
	epoch *epoch
	id    keyspace.Record
	rev   int64 // of the read
	mod   int64 // newest ModRevision among its keys; 0 if there are none

	credential *authz.Credential
	app        *authz.App
	developer  *authz.Developer
}

func (r *record) exists() bool { return r.mod > 0 }

// bound is the revision that a record of slot must have to be used.
func (e *epoch) bound(slot uint64) int64 { return max(e.fence[slot].Load(), e.floor.Load()) }

// recentChanges is how many changes an epoch remembers at most: those that
// checks may meet before they have loaded the record again.
const recentChanges = 4096

// change is one put of a flag: all that changed in a record at revision rev,
// unless something else did since revision prev. Immutable.
type change struct {
	record  keyspace.Record
	field   keyspace.Field
	product authz.ProductName
	value   string
	rev     int64
	prev    int64 // the fence of the record's slot before this event
}

// raise lifts the fence of record k, of hash h, to rev. c, if not nil, is all
// that happened to k at rev. Only the watcher calls it.
func (e *epoch) raise(h uint64, rev int64, c *change) {
	fence := &e.fence[e.slot(h)]
	prev := fence.Load()
	if prev >= rev {
		return
	}
	if c != nil {
		c.rev, c.prev = rev, prev
		e.recent[h%uint64(len(e.recent))].Store(c)
	}
	fence.Store(rev)
}

// catchUp brings r, which is not current, up to date by the one event that it
// lacks, if that is the put of a flag and still remembered. nil if not.
//
// It is exact: c is the newest event on any record of its slot, and r was read
// at or after the one before, so nothing else happened to the record between
// r.rev and c.rev.
func (e *epoch) catchUp(r *record, want keyspace.Record, h uint64) *record {
	bound := e.bound(e.slot(h))
	c := e.recent[h%uint64(len(e.recent))].Load()
	if c == nil || c.record != want || c.rev < bound ||
		r.epoch != e || r.id != want || r.rev < c.prev || r.rev < e.floor.Load() {
		return nil
	}
	n := *r
	n.rev, n.mod = c.rev, c.rev
	switch {
	case r.credential != nil && c.field == keyspace.FieldStatus:
		body := *r.credential
		body.Status = keyspace.ParseStatus([]byte(c.value))
		n.credential = &body
	case r.credential != nil && c.field == keyspace.FieldProduct:
		body := *r.credential
		body.Products = maps.Clone(body.Products)
		body.Products[c.product] = keyspace.ParseStatus([]byte(c.value))
		n.credential = &body
	case r.app != nil && c.field == keyspace.FieldStatus:
		body := *r.app
		body.Status = keyspace.ParseStatus([]byte(c.value))
		n.app = &body
	case r.developer != nil && c.field == keyspace.FieldStatus:
		body := *r.developer
		body.Status = keyspace.ParseDeveloperStatus([]byte(c.value))
		n.developer = &body
	default: // it did not exist, and one flag is not all of it
		return nil
	}
	return &n
}

// advance stores applied, after the fences up to rev were raised. Only the
// watcher calls it.
func (e *epoch) advance(rev int64) {
	if rev <= e.applied.Load() {
		return
	}
	e.applied.Store(rev)
	e.grown.Lock()
	if e.grown.ch != nil {
		close(e.grown.ch)
		e.grown.ch = nil
	}
	e.grown.Unlock()
}

// await waits until applied has reached rev, ctx ends or the epoch does.
func (e *epoch) await(ctx context.Context, rev int64) error {
	for {
		e.grown.Lock()
		if e.grown.ch == nil {
			e.grown.ch = make(chan struct{})
		}
		grown := e.grown.ch
		e.grown.Unlock()
		if e.applied.Load() >= rev {
			return nil
		}
		select {
		case <-grown:
		case <-e.end.ch:
			return e.end.cause
		case <-ctx.Done():
			return fmt.Errorf("applied revision %d has not reached %d: %w", e.applied.Load(), rev, ctx.Err())
		}
	}
}

// kill ends the epoch: every proof in it is void at once.
func (e *epoch) kill(cause error) {
	e.end.Do(func() {
		e.end.cause = cause
		e.dead.Store(true)
		close(e.end.ch)
	})
}

// mark is what was known of the history before a read was sent.
type mark struct {
	revision int64
	term     uint64
}

func (e *epoch) mark() mark { return mark{max(e.applied.Load(), e.seen.Load()), e.term.Load()} }

// admit checks that the header of a linearizable read, sent after m was taken,
// does not contradict this epoch's history: the same cluster, no older raft
// term, no older revision than was applied or read before. If it does, the
// store was restored from a copy or is another cluster, and the epoch ends.
func (e *epoch) admit(m mark, h *etcdserverpb.ResponseHeader) error {
	if err := e.same(h); err != nil {
		return err
	}
	var err error
	switch {
	case h.RaftTerm < m.term:
		err = restored("raft term fell from %d to %d", m.term, h.RaftTerm)
	case h.Revision < m.revision:
		err = restored("revision fell from %d to %d", m.revision, h.Revision)
	default:
		grow(&e.term, h.RaftTerm)
		grow(&e.seen, h.Revision)
		return nil
	}
	e.kill(err)
	return err
}

// same checks that the header is of this epoch's cluster, which is all that an
// answer without a leader's word can be held to. If not, the epoch ends.
func (e *epoch) same(h *etcdserverpb.ResponseHeader) error {
	if h.ClusterId == e.cluster {
		return nil
	}
	err := restored("cluster id changed from %x to %x", e.cluster, h.ClusterId)
	e.kill(err)
	return err
}

func restored(format string, args ...any) error {
	return fmt.Errorf("%w: the store was restored or replaced: %s", authz.ErrUnavailable, fmt.Sprintf(format, args...))
}

// grow raises an atomic number to v.
func grow[T uint64 | int64](a interface {
	Load() T
	CompareAndSwap(old, new T) bool
}, v T) {
	for old := a.Load(); v > old && !a.CompareAndSwap(old, v); old = a.Load() {
	}
}

// current tells whether r is the record want, and nothing applied since it was
// read has touched it. This comparison is what makes a cached record usable;
// everything else may be wrong.
func (e *epoch) current(r *record, want keyspace.Record, h uint64) bool {
	return r.epoch == e && r.id == want && r.rev >= e.bound(e.slot(h))
}

// slot of a record's hash. len(fence) is a power of two.
func (e *epoch) slot(h uint64) uint64 { return (h >> 32) & uint64(len(e.fence)-1) }
