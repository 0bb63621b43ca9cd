package statestore

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/ristretto/v2"
	"golang.org/x/time/rate"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

const (
	// loadTimeout bounds a load, whoever still waits for it.
	loadTimeout = time.Second
	// confirmWait is how long a load waits for the answer that a leader confirms.
	// Envoy gives a whole check 250 ms.
	confirmWait = 100 * time.Millisecond
	// slotWait is how long a load waits for its turn before it is shed.
	slotWait = 100 * time.Millisecond
	// rereads bounds how often a record is read again because an event on it
	// arrived while it was being read.
	rereads = 8
	// negativeEntries bounds the cache of records known not to exist: 64 Ki at
	// about 250 bytes each.
	negativeEntries = 64 << 10
)

// caches hold records. Nothing is assumed of them: a Set may be dropped,
// delayed, reordered or undone, and a Get may find another record's value.
// Records that do not exist have a cache of their own, so that junk can never
// evict a real one.
type caches struct {
	records *ristretto.Cache[uint64, *record]
	absent  *ristretto.Cache[uint64, *record]
}

func newCaches(bytes int64) (c caches, err error) {
	// ristretto wants about ten counters an entry; an entry is at least 256 bytes.
	if c.records, err = ristretto.NewCache(&ristretto.Config[uint64, *record]{
		MaxCost: bytes, NumCounters: max(10*bytes/256, 1000), BufferItems: 64, IgnoreInternalCost: true,
	}); err != nil {
		return c, fmt.Errorf("create cache: %w", err)
	}
	if c.absent, err = ristretto.NewCache(&ristretto.Config[uint64, *record]{
		MaxCost: negativeEntries, NumCounters: 10 * negativeEntries, BufferItems: 64, IgnoreInternalCost: true,
	}); err != nil {
		c.records.Close()
		return c, fmt.Errorf("create negative cache: %w", err)
	}
	return c, nil
}

func (c caches) put(h uint64, r *record) {
	if r.exists() {
		c.records.Set(h, r, r.cost())
	} else {
		c.absent.Set(h, r, 1)
	}
}

// cost estimates the bytes that a record keeps alive, ristretto's own included.
func (r *record) cost() int64 {
	n := 400 + len(r.id.Organization) + len(r.id.Name)
	if c := r.credential; c != nil {
		n += len(c.App) + len(c.Developer) + len(c.Scopes) + len(c.Problem)
		for p, f := range c.Products {
			n += 96 + len(p) + len(f.Problem)
		}
	}
	return int64(n)
}

func (c caches) close() {
	c.records.Close()
	c.absent.Close()
}

// loader reads records from the backend: one load a record at a time, and no
// more at once, or a second, than the store can bear.
type loader struct {
	backend Backend
	space   keyspace.Space
	caches  caches
	log     *limitedLog
	counts  *counts

	// Records seen before, and apps and developers, which only a real key leads
	// to, load in turns of their own: keys nobody knows can take no turn of
	// theirs, not even when a gap makes every record load again.
	known, unknown turns
	// unknownRate bounds the reads a second that find no record. Keys that exist
	// and have not been seen yet, as after a start, cost nothing of it.
	unknownRate *rate.Limiter

	// checks is held, shared, by each check while it uses the caches.
	checks sync.RWMutex

	flights struct {
		sync.Mutex
		byRecord map[keyspace.Record]*flight
		closed   bool
		wg       sync.WaitGroup
	}
}

// flight is a load under way. rec and err are set before done is closed.
type flight struct {
	epoch *epoch
	turn  atomic.Bool // it has got its turn
	done  chan struct{}
	rec   *record
	err   error
}

// turns is a bounded number of loads with a bounded queue before it.
type turns struct {
	slots   chan struct{}
	waiting atomic.Int64
}

func (t *turns) acquire(ctx context.Context) error {
	select {
	case t.slots <- struct{}{}:
		return nil
	default:
	}
	// A queue longer than what can be served while one may wait is of no use.
	defer t.waiting.Add(-1)
	if t.waiting.Add(1) > int64(16*cap(t.slots)) {
		return fmt.Errorf("%w: the queue is full", authz.ErrOverloaded)
	}
	timer := time.NewTimer(slotWait)
	defer timer.Stop()
	select {
	case t.slots <- struct{}{}:
		return nil
	case <-timer.C:
		return fmt.Errorf("%w: no turn within %v", authz.ErrOverloaded, slotWait)
	case <-ctx.Done():
		return noTurn(ctx)
	}
}

// noTurn is the error of a check that ended before its load began. That is a
// lack of turns, whoever's patience ended first.
func noTurn(ctx context.Context) error {
	return fmt.Errorf("%w: no turn: %w", authz.ErrOverloaded, ctx.Err())
}

func (t *turns) release() { <-t.slots }

// load returns record want as of now: read after the call began, or read
// earlier and nothing happened to it since. h is want's hash; known tells that
// the record has been seen to exist.
func (l *loader) load(ctx context.Context, e *epoch, want keyspace.Record, h uint64, known bool) (*record, error) {
	known = known || want.Kind != keyspace.KindKey
	for range rereads {
		f, err := l.join(e, want, h, known)
		if err != nil {
			return nil, err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			if !f.turn.Load() {
				return nil, noTurn(ctx)
			}
			return nil, fmt.Errorf("%w: load: %w", authz.ErrUnavailable, ctx.Err())
		}
		if f.err != nil {
			return nil, f.err
		}
		// The flight may have read before this call began, and before an event
		// that had been applied by then. The fence tells: it is at least what it
		// was when the call began.
		if e.current(f.rec, want, h) {
			return f.rec, nil
		}
		l.counts.rejoined.Add(1)
	}
	return nil, fmt.Errorf("%w: %s changed during each of %d loads", authz.ErrUnavailable, want.Kind, rereads)
}

// join returns the flight of want in epoch e, started if need be.
func (l *loader) join(e *epoch, want keyspace.Record, h uint64, known bool) (*flight, error) {
	l.flights.Lock()
	defer l.flights.Unlock()
	if l.flights.closed {
		return nil, errClosing
	}
	if f := l.flights.byRecord[want]; f != nil && f.epoch == e {
		l.counts.joined.Add(1)
		return f, nil
	}
	if !known && l.unknownRate.Tokens() < 1 {
		l.counts.shed.Add(1)
		return nil, fmt.Errorf("%w: more than %v unknown keys a second", authz.ErrOverloaded, l.unknownRate.Limit())
	}
	f := &flight{epoch: e, done: make(chan struct{})}
	l.flights.byRecord[want] = f
	l.flights.wg.Add(1)
	go l.fly(f, want, h, known)
	return f, nil
}

// fly runs a flight on a context of its own: a caller that hangs up does not
// fail the others.
func (l *loader) fly(f *flight, want keyspace.Record, h uint64, known bool) {
	defer l.flights.wg.Done()
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	t := &l.unknown
	if known {
		t = &l.known
	}
	if f.err = t.acquire(ctx); f.err == nil {
		f.turn.Store(true)
		var recs []*record
		if recs, f.err = l.read(ctx, f.epoch, []uint64{h}, want); f.err == nil {
			f.rec = recs[0]
			if !known && !f.rec.exists() {
				// Into debt, if need be: loads that were under way when the last
				// token went are paid for by those that are not begun.
				l.unknownRate.Reserve()
			}
			l.caches.put(h, f.rec)
		}
		t.release()
	} else {
		l.counts.shed.Add(1)
	}
	l.flights.Lock()
	if l.flights.byRecord[want] == f {
		delete(l.flights.byRecord, want)
	}
	l.flights.Unlock()
	close(f.done)
}

// read reads records in one transaction, again if an event on one of them
// arrived meanwhile. The records' epoch is the one held before the read was
// sent. hashes are those of want, in order.
func (l *loader) read(ctx context.Context, e *epoch, hashes []uint64, want ...keyspace.Record) ([]*record, error) {
	folders := make([]string, len(want))
	for i, w := range want {
		folders[i] = l.space.Folder(w)
	}
again:
	for range rereads {
		l.counts.loads.Add(1)
		snap, err := l.fetch(ctx, e, folders)
		if err != nil {
			return nil, err
		}
		recs := make([]*record, len(want))
		for i, w := range want {
			recs[i] = l.record(e, w, snap, i)
			// After the read: had the event come before it, the read would hold it.
			if !e.current(recs[i], w, hashes[i]) {
				l.counts.rereads.Add(1)
				continue again
			}
		}
		return recs, nil
	}
	return nil, fmt.Errorf("%w: %s changed during each of %d reads", authz.ErrUnavailable, want[0].Kind, rereads)
}

// fetch reads folders, and holds the answer against the epoch. Without a leader,
// as in an election, no read is confirmed; then what one member has will do.
// Whether a record may be used does not depend on when it was read, but on its
// revision: not below fence and floor.
func (l *loader) fetch(ctx context.Context, e *epoch, folders []string) (snap Snapshot, err error) {
	m := e.mark()
	confirmed, cancel := context.WithTimeout(ctx, confirmWait)
	defer cancel()
	if snap, err = l.backend.Read(confirmed, folders...); err == nil {
		return snap, e.admit(m, snap.Header)
	}
	local, errLocal := l.backend.ReadLocal(ctx, folders...)
	if errLocal != nil {
		l.counts.loadErrors.Add(1)
		return snap, fmt.Errorf("%w: load: %w", authz.ErrUnavailable, errLocal)
	}
	l.counts.localLoads.Add(1)
	return local, e.same(local.Header)
}

// record builds record want from the i-th range of a snapshot.
func (l *loader) record(e *epoch, want keyspace.Record, snap Snapshot, i int) *record {
	r := &record{epoch: e, id: want, rev: snap.Header.Revision}
	var entries []keyspace.Entry
	var details int64 // ModRevision of the record's details
	for _, kv := range snap.Ranges[i] {
		key := string(kv.Key)
		// The same test as for an event: a key that raises no fence of this
		// record is not part of it.
		p, err := l.space.Parse(key)
		if err != nil || p.Record != want {
			continue
		}
		entries = append(entries, keyspace.Entry{Key: key, Value: kv.Value})
		r.mod = max(r.mod, kv.ModRevision)
		if p.Field == keyspace.FieldDetails {
			details = kv.ModRevision
		}
	}
	var problem string
	switch want.Kind {
	case keyspace.KindKey:
		if c := l.space.Credential(entries); c.Exists {
			r.credential = &c
			// Of the value itself, not of the read: it outlives eviction and reload.
			r.credential.Revision = details
			problem = r.credential.Problem + r.credential.Status.Problem
		}
	case keyspace.KindApp:
		if a := l.space.App(entries); a.Exists {
			r.app = &a
			problem = r.app.Problem + r.app.Status.Problem
		}
	case keyspace.KindDeveloper:
		if d := l.space.Developer(entries); d.Exists {
			r.developer = &d
			problem = r.developer.Problem + r.developer.Status.Problem
		}
	}
	if problem != "" {
		l.counts.unreadable.Add(1)
		l.log.Warn("record cannot be read, and so refuses", "folder", l.space.Folder(want), "problem", problem, "revision", r.rev)
	}
	return r
}

// close waits for the flights and the checks under way and closes the caches:
// ristretto panics when it is closed beside a Set or a Get.
func (l *loader) close() {
	l.flights.Lock()
	l.flights.closed = true
	l.flights.Unlock()
	l.flights.wg.Wait()
	l.checks.Lock()
	defer l.checks.Unlock()
	l.caches.close()
}
