package statestore

import (
	"context"
	"fmt"
	"hash/maphash"
	"time"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

const (
	// appliedWait is how long a check waits for the event of a change that a
	// load has already seen.
	appliedWait = 50 * time.Millisecond
	// answerMargin is kept free before a caller's deadline, so that a refusal
	// still reaches it.
	answerMargin = 5 * time.Millisecond
	// viewAttempts bounds how often a check starts over because its records
	// changed while it looked at them.
	viewAttempts = 4
)

// view is the three records of one check, hashes beside them. A nil record was
// not asked for, because nothing leads to it.
type view struct {
	want [3]keyspace.Record
	hash [3]uint64
	rec  [3]*record
}

func (v *view) records(p *proof, revision int64) authz.Records {
	r := authz.Records{Revision: revision, Proof: p}
	if v.rec[0] != nil && v.rec[0].credential != nil {
		r.Credential = *v.rec[0].credential
	}
	if v.rec[1] != nil && v.rec[1].app != nil {
		r.App = *v.rec[1].app
	}
	if v.rec[2] != nil && v.rec[2].developer != nil {
		r.Developer = *v.rec[2].developer
	}
	return r
}

// newest ModRevision among the records.
func (v *view) newest() (mod int64) {
	for _, r := range v.rec {
		if r != nil {
			mod = max(mod, r.mod)
		}
	}
	return mod
}

// Records implements authz.Source. From a complete index, and with all three
// records cached and current, it allocates nothing and asks nobody.
func (s *Store) Records(ctx context.Context, org authz.Organization, id authz.KeyID) (authz.Records, error) {
	// The proof first, before any fence: a proof taken later could vouch for
	// records compared with fences that it does not cover. Whether it is valid is
	// asked at the end, by who decides.
	e := s.epoch.Load()
	p := e.proof.Load()
	if p == nil || !p.stands() {
		return authz.Records{}, s.stale(e, p)
	}
	if r, ok := s.indexed(e, p, org, id); ok {
		return r, nil
	}
	// The caches are closed after the last check that is in them.
	s.checks.RLock()
	defer s.checks.RUnlock()
	if s.closed.Load() {
		return authz.Records{}, errClosing
	}
	var v view
	for range viewAttempts {
		// Before the fences as well: all records below pass fences that stand
		// for at least this revision.
		applied := e.applied.Load()
		if err := s.fill(ctx, e, &v, org, id); err != nil {
			return authz.Records{}, err
		}
		newest := v.newest()
		if newest <= applied {
			return v.records(p, applied), nil
		}
		// A load has run ahead of the watch: one record may hold a change that
		// comes after one which another record lacks. Together they could be a
		// state that never was.
		s.counts.waits.Add(1)
		wait, cancel := context.WithTimeout(ctx, appliedWait)
		err := e.await(wait, newest)
		cancel()
		if err != nil {
			ok, err := s.snapshot(ctx, e, &v)
			if err != nil {
				return authz.Records{}, err
			}
			if ok {
				return v.records(p, applied), nil
			}
		}
	}
	return authz.Records{}, fmt.Errorf("%w: the records changed during each of %d looks", authz.ErrUnavailable, viewAttempts)
}

// fill brings all records of v up to date: the key, the app that it names, the
// developer that the app names.
func (s *Store) fill(ctx context.Context, e *epoch, v *view, org authz.Organization, id authz.KeyID) error {
	want, more := keyspace.KeyRecord(org, id), true
	for i := range v.rec {
		if !more {
			v.rec[i] = nil
			continue
		}
		if err := s.use(ctx, e, v, i, want); err != nil {
			return err
		}
		want, more = v.next(i)
	}
	return nil
}

// use puts record want into v, at i: the one in hand, else the cached one, if
// it is current; else it is loaded.
func (s *Store) use(ctx context.Context, e *epoch, v *view, i int, want keyspace.Record) error {
	h := s.hash(want)
	if r := v.rec[i]; r != nil && e.current(r, want, h) {
		return nil
	}
	v.want[i], v.hash[i] = want, h
	known := false
	if r, ok := s.caches.records.Get(h); ok && r != nil {
		if e.current(r, want, h) {
			s.counts.hits.Add(1)
			v.rec[i] = r
			return nil
		}
		if r := e.catchUp(r, want, h); r != nil {
			s.counts.caughtUp.Add(1)
			s.caches.put(h, r)
			v.rec[i] = r
			return nil
		}
		known = r.id == want
	}
	// Also of a record that was there once: what the other cache still holds of it
	// says nothing.
	if r, ok := s.caches.absent.Get(h); ok && r != nil && e.current(r, want, h) {
		s.counts.absentHits.Add(1)
		v.rec[i] = r
		return nil
	}
	s.counts.misses.Add(1)
	ctx, cancel := bounded(ctx)
	defer cancel()
	r, err := s.load(ctx, e, want, h, known)
	if err != nil {
		return err
	}
	v.rec[i] = r
	return nil
}

// bounded is ctx for a load: with a little time left before the caller's own
// deadline, and never without one.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	end := time.Now().Add(loadTimeout)
	if deadline, ok := ctx.Deadline(); ok && deadline.Add(-answerMargin).Before(end) {
		end = deadline.Add(-answerMargin)
	}
	return context.WithDeadline(ctx, end)
}

// snapshot reads the records of v in one transaction, so that they are one
// state that existed. ok is false if they no longer lead to each other.
func (s *Store) snapshot(ctx context.Context, e *epoch, v *view) (ok bool, err error) {
	n := 0
	for n < len(v.rec) && v.rec[n] != nil {
		n++
	}
	s.counts.snapshots.Add(1)
	ctx, cancel := bounded(ctx)
	defer cancel()
	if err := s.known.acquire(ctx); err != nil {
		return false, err
	}
	defer s.known.release()
	recs, err := s.loader.read(ctx, e, v.hash[:n], v.want[:n]...)
	if err != nil {
		return false, err
	}
	for i, r := range recs {
		s.caches.put(v.hash[i], r)
		v.rec[i] = r
	}
	// The chain must lead where it led: to no other record, and no further.
	for i := range n {
		next, more := v.next(i)
		if last := i == n-1; more == last || (!last && next != v.want[i+1]) {
			return false, nil
		}
	}
	return true, nil
}

// next names the record that the i-th leads to, if any.
func (v *view) next(i int) (keyspace.Record, bool) {
	r := v.rec[i]
	switch {
	case r == nil:
	case r.credential != nil && r.credential.App != "":
		return keyspace.AppRecord(r.id.Organization, r.credential.App), true
	case r.app != nil && r.app.Developer != "":
		return keyspace.DeveloperRecord(r.id.Organization, r.app.Developer), true
	}
	return keyspace.Record{}, false
}

// hash of a record, under a seed of this process: nobody outside can choose
// keys that collide.
func (s *Store) hash(r keyspace.Record) uint64 {
	h := maphash.String(s.seed, string(r.Organization)) + uint64(r.Kind)
	if r.Kind == keyspace.KindKey {
		return h*0x9e3779b97f4a7c15 ^ maphash.Bytes(s.seed, r.Key[:])
	}
	return h*0x9e3779b97f4a7c15 ^ maphash.String(s.seed, r.Name)
}
