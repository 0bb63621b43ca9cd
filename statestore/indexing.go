package statestore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"keygate/authz"
	"keygate/statestore/index"
)

const (
	// indexPart is how many changes are applied to a copy before its readers have
	// their turn: less than a tenth of a millisecond.
	indexPart = 64
	// maxTouched bounds what is remembered of changes beside a list: about 100 MB.
	maxTouched = 512 << 10
	// indexRetry is the wait before a copy is begun anew, which doubles up to
	// maxIndexRetry.
	indexRetry, maxIndexRetry = 250 * time.Millisecond, 30 * time.Second
)

// IndexState is how far the copy of all records is.
type IndexState string

// The states. Without a complete copy, records are read through the cache.
const (
	IndexOff     IndexState = "off"
	IndexLoading IndexState = "loading"
	IndexReady   IndexState = "ready"
	IndexFull    IndexState = "over the limit"
)

var (
	errIndexFull   = errors.New("more records than the index may hold")
	errIndexBehind = errors.New("too many changes beside the list")
	errIndexUnsure = errors.New("a change came twice")
)

// indexed answers from the copy of all records, if there is a complete one. The
// caller has taken p before.
//
// Whatever p proves, and whatever was applied before this call, is in the copy:
// the watcher changes it first. So no fence is compared, and no cache is asked.
func (s *Store) indexed(e *epoch, p *proof, org authz.Organization, id authz.KeyID) (r authz.Records, ok bool) {
	x := e.index.Load()
	if x == nil {
		return r, false
	}
	if r, ok = x.Records(org, id); !ok || r.Revision < e.floor.Load() {
		return authz.Records{}, false
	}
	s.counts.indexed.Add(1)
	r.Proof = p
	return r, true
}

// fillIndex keeps a copy of all records for epoch e until it is too large or ctx
// ends: it begins anew when one fails, or is dropped.
func (s *Store) fillIndex(ctx context.Context, e *epoch) {
	if s.indexRecords == 0 {
		return
	}
	for wait := indexRetry; ; wait = min(2*wait, maxIndexRetry) {
		select {
		case <-s.reindex: // asked for before this one was begun
		default:
		}
		x := index.New()
		e.index.Store(x) // before the list is asked for: what it lacks comes to the watcher later
		began := now()
		err := s.list(ctx, e, x)
		if err == nil {
			size := x.Size()
			s.log.Info("index complete: checks are answered from memory",
				"keys", size.Keys, "apps_and_developers", size.Apps, "revision", size.Revision, "took", (now() - began).Round(time.Millisecond))
			wait = indexRetry / 2
			select {
			case <-s.reindex:
				continue
			case <-ctx.Done():
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
		if e.index.CompareAndSwap(x, nil); errors.Is(err, errIndexFull) {
			s.indexFull(e)
		}
		if e.indexFull.Load() {
			return
		}
		s.log.Warn("index not complete: records are read through the cache meanwhile", "cause", err, "again_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// list fills x and completes it once the watch has applied all that the list
// holds.
func (s *Store) list(ctx context.Context, e *epoch, x *index.Index) error {
	m := e.mark()
	changes := make([]index.Change, 0, indexPart)
	flush := func() error {
		x.Begin()
		for _, c := range changes {
			x.List(c)
		}
		x.End(0)
		changes = changes[:0]
		return s.indexBound(x)
	}
	h, err := s.backend.List(ctx, s.space.Watched(), func(kvs []*mvccpb.KeyValue) error {
		for _, kv := range kvs {
			key := string(kv.Key)
			path, err := s.space.Parse(key)
			if err != nil {
				continue // it raises no fence either
			}
			changes = append(changes, index.Put(path, key, kv.Value, kv.ModRevision))
			if len(changes) == indexPart {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	if err := e.admit(m, h); err != nil {
		return err
	}
	// The watch is asked for progress once a second, by the probe.
	if err := e.await(ctx, h.Revision); err != nil {
		return err
	}
	x.Begin()
	x.End(h.Revision)
	x.Complete()
	if e.index.Load() != x {
		return errIndexUnsure
	}
	return nil
}

// indexBound tells why x must not go on growing; nil if it may.
func (s *Store) indexBound(x *index.Index) error {
	switch size := x.Size(); {
	case size.Keys+size.Apps > s.indexRecords:
		return errIndexFull
	case size.Touched > maxTouched:
		return errIndexBehind
	}
	return nil
}

// indexFull gives the copy up for good, or until the next gap.
func (s *Store) indexFull(e *epoch) {
	e.index.Store(nil)
	if !e.indexFull.Swap(true) {
		s.log.Error("index given up: there are more records than it may hold; records are read through the cache", "limit", s.indexRecords)
	}
}

// dropIndex gives the copy up and has another made. Only the watcher calls it.
func (s *Store) dropIndex(e *epoch) {
	if e.index.Swap(nil) != nil {
		signal(s.reindex)
	}
}

// indexChange is a change on its way into the copy.
type indexChange struct {
	change index.Change
	rev    int64
}

// applyIndex applies changes of whole revisions, up to last, to the copy.
func (s *Store) applyIndex(e *epoch, x *index.Index, changes []indexChange, last int64) {
	done := int64(0)
	for len(changes) > 0 {
		n := min(indexPart, len(changes))
		for n < len(changes) && changes[n].rev == changes[n-1].rev {
			n++ // a transaction is seen whole
		}
		x.Begin()
		for _, c := range changes[:n] {
			x.Apply(c.change)
		}
		done = changes[n-1].rev
		x.End(done)
		changes = changes[n:]
	}
	if done < last { // what follows the last change that concerns a record concerns none
		x.Begin()
		x.End(last)
	}
	if s.indexBound(x) == errIndexFull {
		s.indexFull(e)
	}
}

// indexState is what Status tells.
func (s *Store) indexState(e *epoch) (IndexState, index.Size) {
	x := e.index.Load()
	switch {
	case s.indexRecords == 0:
		return IndexOff, index.Size{}
	case e.indexFull.Load():
		return IndexFull, index.Size{}
	case x == nil:
		return IndexLoading, index.Size{}
	}
	size := x.Size()
	if size.Complete && size.Revision >= e.floor.Load() {
		return IndexReady, size
	}
	return IndexLoading, size
}
