// Package statestore knows what is true now: the records behind a consumer
// key, as etcd has them, from a cache that is proven current at the moment of
// use. It cannot change a status.
//
// # Validate on read
//
// ristretto may drop, delay, reorder or resurrect a Set and tells nobody, so
// its content is never trusted. What is trusted are three numbers that one
// goroutine, the watcher, keeps in an [epoch]:
//
//	fence[slot]  the newest revision of an event on a record of that slot
//	floor        the revision that a fresh start, or a gap, began at
//	applied      how far the two above have come; it only grows
//
// and a proof {t0, H}: a linearizable read begun at t0 answered revision H, and
// applied has reached H.
//
//  1. The watcher, for an event at revision R on record k, first sets
//     fence[k] = max(fence[k], R), and after a whole batch applied = R. It never
//     Sets, loads or blocks.
//
//  2. A check loads the epoch, the proof and applied, in this order, before
//     anything else. It uses a record only if the record was read in this epoch,
//     is the one asked for, and rev >= max(fence, floor); else it loads it.
//
//  3. A load reads the record's whole folder at one revision H, and keeps it if
//     H >= max(fence, floor) as they are after the read; else it reads again. The
//     read need not be linearizable: what matters is H.
//
//  4. If a record used holds a change newer than applied, the check waits for
//     the watch to come so far and compares all again, or reads all three in one
//     transaction: a yes is always a state that existed.
//
//  5. A cached record that lacks exactly one event, the put of a flag, is brought
//     up to date by that event instead of by a load ([epoch.catchUp]): a
//     revocation takes effect without a read, even if etcd answers none.
//
//  6. The decision counts only if the proof of step 2 is still valid after it
//     was made.
//
//  7. Start, gap and new epoch are one thing: H0 of a linearizable read; floor =
//     H0; watch from H0+1; applied = H0. Nothing is listed, nothing cleared.
//
//  8. Another cluster id, of a read or of the watch, a raft term that fell, or a
//     linearizable read below what was applied or read before: the history is
//     another one. A new epoch begins, and nothing of the old one is used.
//
//  9. A registered replica ([fleet]) has its registration acknowledged by etcd
//     before the t0 of a proof, finds it again in the proof's own read, and lets
//     no proof outlive its lease. When applied has passed a barrier, it writes
//     how far it has come.
//
//  10. The index (package index) is an exact copy of all records. It is begun empty;
//     from then on the watcher applies each change to it, before it stores applied;
//     only then a linearizable list is read into it, at revision L, in which a key
//     that a change has touched is passed over. It answers once applied has
//     reached L, under one lock for all three records of a check, and only while its
//     revision is not below floor. A change that comes a second time, a gap, or
//     more records than it may hold end it, and 2 to 5 serve.
//
// Claim 1: a check that begins after applied >= R never uses a state of record
// k older than an event on k at or before R. The fence was stored before applied, and
// applied before the check began, so the comparison sees it. A record with a
// lower revision fails the comparison; one that passes was read at a revision
// that contains the event. Across a gap the floor takes the fences' place. A
// record caught up to R from r.rev by the event at R is what a read at R would
// have answered: the fence before that event was not above r.rev, so nothing
// else happened to the record in between, and etcd delivers all events of a
// revision together, so the event was all that happened at R.
//
// From the index the same holds without a comparison. It contains every event at or
// below applied: those above L or unknown to the list because it was begun after
// they had come, and those before it because the list contains them. So the
// answer is of one revision, not older than what had been applied, and a state
// that existed.
//
// Claim 2: with S the staleness budget, no check that begins more than S after
// the acknowledgement of R says yes to what R closed. A valid proof is younger
// than S, so its read began after the acknowledgement, so its H >= R, so applied >= R
// was true when the proof was stored, and the check loaded the proof before it
// looked at a fence: claim 1.
//
// Claim 3: a revocation at R that lists the registrations in its own transaction,
// and then waits until each of them has acknowledged R, or for S + 1 s, leaves no
// registered replica that says yes to a check that begins later. One that was
// listed has applied R, or its proofs were begun before R and are over. One that
// was not listed has registered later, so that its proofs have H > R, or its
// lease had ended, and its proofs with it. docs/decisions/0005-receipt.md has the
// argument in full.
//
// No claim assumes anything of the cache, of what another machine's clock shows
// (claim 3 only that clocks run at about the same rate) or of the watch being
// alive: a watch that has gone silent ends the proofs, and with them every yes.
package statestore

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

// Limits and default of the staleness budget.
const (
	MinStalenessBudget     = keyspace.MinStalenessBudget
	MaxStalenessBudget     = keyspace.MaxStalenessBudget
	DefaultStalenessBudget = 5 * time.Second
)

// Config of a Store.
type Config struct {
	Backend Backend
	Space   keyspace.Space
	// StalenessBudget is the greatest age of a proof under which the store
	// answers. Zero means DefaultStalenessBudget.
	StalenessBudget time.Duration
	// CacheBytes bounds the memory of cached records. Zero means 256 MiB, about
	// half a million records.
	CacheBytes int64
	// FenceSlots is the number of fences, a power of two, 8 bytes each. Zero
	// means 1 Mi. Fewer slots cost more loads after an import, never
	// correctness.
	FenceSlots int
	// Loads is how many loads of known records may run at once, and as many of
	// keys not seen before. Zero means 64.
	Loads int
	// UnknownLoadsPerSecond bounds the reads that find no record. Zero means
	// 5000.
	UnknownLoadsPerSecond float64
	// IndexRecords is how many records (keys, apps and developers) the index may
	// hold: the copy of all of them that answers checks without the cache and
	// without a read, about 110 bytes each. With more than that, and until the copy
	// is complete, records are read through the cache. Zero means no index.
	IndexRecords int
	// Logger; nil discards.
	Logger *slog.Logger
	// Registry to register in, under Version: the replica then answers only while
	// it is registered, and acknowledges what it has applied. nil leaves it
	// outside of every receipt.
	Registry Registry
	Version  string
	// OnChange, if set, is called by the watcher for each event that the schema
	// knows, after it took effect. It must not block.
	OnChange func(Change)
	// OnApply, if set, is called by the watcher after each batch of events, with
	// the time from the batch's arrival to its last fence. It must not block.
	OnApply func(events int, took time.Duration)
}

// Change is one event on a record, as it was applied.
type Change struct {
	Revision int64
	Path     keyspace.Path
	Key      string // in etcd
	// Value of a status, bounded; empty for any other field and for a delete.
	Value   string
	Deleted bool
}

// Store is an authz.Source over etcd. Create it with New, then Run it. All
// methods are safe for concurrent use.
type Store struct {
	loader
	budget   time.Duration
	interval time.Duration // between probes
	slots    int
	// indexRecords bounds the index; 0 for none. reindex asks for another copy.
	indexRecords int
	reindex      chan struct{}
	seed         maphash.Seed
	onChange     func(Change)
	onApply      func(int, time.Duration)

	fleet   *fleet
	epoch   atomic.Pointer[epoch]
	counts  counts
	trouble atomic.Pointer[trouble]
	closed  atomic.Bool
}

var errClosing = fmt.Errorf("%w: shutting down", authz.ErrUnavailable)

// trouble is what last kept a proof from being made.
type trouble struct{ err error }

// New returns a store that knows nothing yet and refuses everything until Run
// has made the first proof.
func New(cfg Config) (*Store, error) {
	if cfg.Backend == nil || cfg.Space == (keyspace.Space{}) {
		return nil, errors.New("statestore: a backend and a keyspace are needed")
	}
	cfg.StalenessBudget = orDefault(cfg.StalenessBudget, DefaultStalenessBudget)
	cfg.CacheBytes = orDefault(cfg.CacheBytes, 256<<20)
	cfg.FenceSlots = orDefault(cfg.FenceSlots, 1<<20)
	cfg.Loads = orDefault(cfg.Loads, 64)
	cfg.UnknownLoadsPerSecond = orDefault(cfg.UnknownLoadsPerSecond, 5000)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case cfg.StalenessBudget < MinStalenessBudget || cfg.StalenessBudget > MaxStalenessBudget:
		return nil, fmt.Errorf("staleness budget %v: want %v to %v", cfg.StalenessBudget, MinStalenessBudget, MaxStalenessBudget)
	case cfg.FenceSlots < 1 || bits.OnesCount(uint(cfg.FenceSlots)) != 1:
		return nil, fmt.Errorf("%d fence slots: want a power of two", cfg.FenceSlots)
	case leaseTTL(cfg.StalenessBudget)-leaseMargin < cfg.StalenessBudget+time.Second:
		// A replica could leave the registry, and with it the list that a receipt
		// waits for, while a proof of it has longer to go.
		return nil, fmt.Errorf("a lease of %v is too short for a staleness budget of %v", leaseTTL(cfg.StalenessBudget), cfg.StalenessBudget)
	case cfg.IndexRecords < 0:
		return nil, fmt.Errorf("an index of %d records: want a positive number, or 0 for none", cfg.IndexRecords)
	case cfg.CacheBytes < 0 || cfg.Loads < 1 || cfg.UnknownLoadsPerSecond < 0:
		return nil, fmt.Errorf("cache of %d bytes, %d loads, %v unknown loads a second: want positive numbers",
			cfg.CacheBytes, cfg.Loads, cfg.UnknownLoadsPerSecond)
	}
	fleet, err := newFleet(cfg.Registry, cfg.Space, cfg.Version, cfg.StalenessBudget)
	if err != nil {
		return nil, err
	}
	caches, err := newCaches(cfg.CacheBytes)
	if err != nil {
		return nil, err
	}
	s := &Store{
		budget: cfg.StalenessBudget, interval: min(time.Second, cfg.StalenessBudget/5), slots: cfg.FenceSlots,
		indexRecords: cfg.IndexRecords, reindex: make(chan struct{}, 1),
		seed: maphash.MakeSeed(), onChange: cfg.OnChange, onApply: cfg.OnApply, fleet: fleet,
	}
	s.loader = loader{
		backend: cfg.Backend, space: cfg.Space, caches: caches, log: &limitedLog{log: cfg.Logger, gates: map[string]*gate{}}, counts: &s.counts,
		known:       turns{slots: make(chan struct{}, cfg.Loads)},
		unknown:     turns{slots: make(chan struct{}, cfg.Loads)},
		unknownRate: rate.NewLimiter(rate.Limit(cfg.UnknownLoadsPerSecond), int(max(cfg.UnknownLoadsPerSecond, 1))),
	}
	s.flights.byRecord = map[keyspace.Record]*flight{}
	// An epoch in which nothing is current and nothing proven.
	s.epoch.Store(newEpoch(0, 1))
	return s, nil
}

func orDefault[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// Run follows the store until ctx ends; then every later answer is a refusal,
// and only then the registration is given up. It is called once and returns nil.
func (s *Store) Run(ctx context.Context) error {
	defer s.loader.close()
	if s.fleet.registry != nil {
		registered, leave := context.WithCancel(context.WithoutCancel(ctx))
		var members sync.WaitGroup
		members.Go(func() { s.register(registered) })
		members.Go(func() { s.acknowledge(registered) })
		defer members.Wait()
		defer leave()
	}
	defer s.Expire()
	wait := time.Duration(0)
	for ctx.Err() == nil && !s.closed.Load() {
		began := now()
		err := s.follow(ctx)
		if ctx.Err() != nil || s.closed.Load() {
			break
		}
		s.report(err)
		s.log.Warn("watch lost, starting again", "cause", err)
		// At once after a gap, with back-off while nothing works.
		if wait = min(2*wait+50*time.Millisecond, time.Second); now()-began > 10*time.Second {
			wait = 0
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
	<-ctx.Done()
	return nil
}

// Expire voids every proof for good, also those that checks under way have
// taken. Part of stopping: whoever still waits for an answer gets a refusal.
func (s *Store) Expire() {
	s.closed.Store(true)
	s.epoch.Load().kill(errClosing)
}

// Fresh returns nil while a proof is valid, and else an error that wraps
// authz.ErrUnavailable and says why there is none.
func (s *Store) Fresh() error {
	e := s.epoch.Load()
	p := e.proof.Load()
	if p != nil && p.Valid() {
		return nil
	}
	return s.stale(e, p)
}

// stale says why p, the proof of e, cannot be answered on.
func (s *Store) stale(e *epoch, p *proof) error {
	cause := errors.New("no probe has ended yet")
	if t := s.trouble.Load(); t != nil {
		cause = t.err
	}
	switch {
	case s.closed.Load():
		return errClosing
	case e.dead.Load():
		return e.end.cause
	case p == nil:
		return fmt.Errorf("%w: nothing proven yet: %w", authz.ErrUnavailable, cause)
	case p.member.lost.Load():
		return fmt.Errorf("%w: not registered any more: %w", authz.ErrUnavailable, s.fleet.problem(cause))
	}
	return fmt.Errorf("%w: the last proof is %.1f s old, more than the staleness budget of %v: %w",
		authz.ErrUnavailable, (now() - p.t0).Seconds(), s.budget, cause)
}

// Await returns nil once a proof is valid, or why there is none when ctx ends.
func (s *Store) Await(ctx context.Context) error {
	for {
		err := s.Fresh()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}
