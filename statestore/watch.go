package statestore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/statestore/index"
	"keygate/statestore/keyspace"
)

const (
	// openTimeout bounds the reads and the watch that begin an epoch. Watch
	// itself would wait for ever on a dead connection.
	openTimeout = 5 * time.Second
	// shownValue bounds the bytes of a status that a Change shows.
	shownValue = 64
)

// errGap: events are missing. The cure is a new floor.
var errGap = errors.New("gap in the watch")

// follow proves and keeps one uninterrupted watch: it starts at a linearizable
// read's revision and returns when events may be missing, the history turned
// out to be another one, or ctx ended.
func (s *Store) follow(ctx context.Context) error {
	// Noted before the read: whatever it answers must not be older.
	e := s.epoch.Load()
	m := e.mark()
	open, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	head, err := s.backend.Read(open, s.space.Probe())
	if err != nil {
		return fmt.Errorf("read the current revision: %w", err)
	}
	if e.number == 0 || e.dead.Load() || e.admit(m, head.Header) != nil {
		if e.number > 0 {
			s.log.Error("new epoch: nothing known before is used again", "cause", e.end.cause,
				"cluster", fmt.Sprintf("%x", head.Header.ClusterId), "revision", head.Header.Revision)
		}
		e = newEpoch(e.number+1, s.slots)
		e.cluster = head.Header.ClusterId
		e.term.Store(head.Header.RaftTerm)
		e.seen.Store(head.Header.Revision)
	} else if e.applied.Load() > 0 {
		s.counts.gaps.Add(1)
	}
	// The order of these four is the protocol: see the package comment.
	h0 := head.Header.Revision
	e.floor.Store(h0)
	e.index.Store(nil) // it lacks what was missed; below the floor it answers no more
	e.indexFull.Store(false)
	s.epoch.Store(e)
	if s.closed.Load() { // Expire may have met the epoch before
		s.Expire()
	}
	w, err := s.backend.Watch(open, s.space.Watched(), h0+1)
	if err != nil {
		return fmt.Errorf("open the watch: %w", err)
	}
	e.advance(h0)
	signal(s.fleet.due) // whatever barrier lies behind
	s.log.Info("watching", "prefix", s.space.Watched(), "revision", h0, "epoch", e.number)

	ctx, stop := context.WithCancel(ctx)
	replacements := make(chan Watch)
	probed := make(chan struct{})
	go func() {
		defer close(probed)
		s.probe(ctx, e, w, replacements)
	}()
	filled := make(chan struct{})
	go func() {
		defer close(filled)
		s.fillIndex(ctx, e)
	}()
	err = s.apply(ctx, e, w, replacements)
	stop()
	<-probed
	<-filled
	return err
}

// apply is the watcher: the one goroutine that raises fences. It owns w and
// every replacement, and closes them.
func (s *Store) apply(ctx context.Context, e *epoch, w Watch, replacements <-chan Watch) error {
	defer func() { w.Close() }()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-e.end.ch:
			return e.end.cause
		case r := <-replacements:
			// Whatever the old watch still had, the new one delivers: it began at
			// applied + 1.
			w.Close()
			w = r
		case u, ok := <-w.Updates():
			if !ok {
				return errors.New("the watch ended without a reason")
			}
			if err := s.update(e, u); err != nil {
				return err
			}
		}
	}
}

// update applies one response of the watch.
func (s *Store) update(e *epoch, u clientv3.WatchResponse) error {
	arrived := now()
	// The watch has a connection of its own, and the client resumes on whatever
	// answers at the address: its events may be another history's.
	if u.Header != nil {
		if err := e.same(u.Header); err != nil {
			return err
		}
	}
	if err := u.Err(); err != nil {
		if errors.Is(err, rpctypes.ErrCompacted) {
			return fmt.Errorf("%w: compacted at revision %d", errGap, u.CompactRevision)
		}
		return fmt.Errorf("watch: %w", err)
	}
	x := e.index.Load()
	if u.IsProgressNotify() {
		if x != nil {
			s.applyIndex(e, x, nil, u.Header.Revision)
		}
		e.advance(u.Header.Revision)
		return nil
	}
	// The header's revision of a response with events is not progress: a replay
	// carries the current one on every batch. Only the events' own count.
	last := int64(0)
	var changes []Change
	var copied []indexChange
	barrier := false
	for i, ev := range u.Events {
		rev := ev.Kv.ModRevision
		if rev < last {
			return fmt.Errorf("%w: event at revision %d after %d", errGap, rev, last)
		}
		last = rev
		if rev <= e.applied.Load() {
			// A repetition after a resume: the fence is there already. Raising it
			// again costs nothing and would mend a notification that came too early.
			s.counts.repeated.Add(1)
			// To the index it may be older than what stands there, and there is no
			// telling what else is amiss.
			s.dropIndex(e)
			x = nil
		}
		path, err := s.space.Parse(string(ev.Kv.Key))
		if err != nil {
			s.counts.ignored.Add(1)
			s.log.Warn("key ignored", "cause", err, "revision", rev)
			continue
		}
		if path.Record.Kind == keyspace.KindNone {
			barrier = true
			continue
		}
		// All events of a revision come in one response: etcd guarantees it, and the
		// client puts fragments of one together before it hands them on. A
		// revision with more than one record's is a transaction, of which no event by
		// itself is all that happened; a barrier beside it says nothing of records.
		var c *change
		if s.alone(u.Events, i) {
			c = flagChange(path, ev)
		}
		e.raise(s.hash(path.Record), rev, c)
		if s.onChange != nil {
			changes = append(changes, announced(path, ev))
		}
		if x != nil {
			c := indexChange{rev: rev}
			if ev.Type == mvccpb.Event_DELETE {
				c.change = index.Delete(path, string(ev.Kv.Key), rev)
			} else {
				c.change = index.Put(path, string(ev.Kv.Key), ev.Kv.Value, rev)
			}
			copied = append(copied, c)
		}
	}
	if x != nil {
		s.applyIndex(e, x, copied, last)
	}
	e.advance(last)
	if barrier {
		signal(s.fleet.due)
	}
	s.counts.events.Add(int64(len(u.Events)))
	if s.onApply != nil && len(u.Events) > 0 {
		s.onApply(len(u.Events), now()-arrived)
	}
	for _, c := range changes {
		s.onChange(c)
	}
	return nil
}

// alone tells whether no other event but barriers has the i-th event's revision.
func (s *Store) alone(events []*clientv3.Event, i int) bool {
	rev := events[i].Kv.ModRevision
	for _, step := range []int{-1, 1} {
		for j := i + step; j >= 0 && j < len(events) && events[j].Kv.ModRevision == rev; j += step {
			if path, err := s.space.Parse(string(events[j].Kv.Key)); err != nil || path.Record.Kind != keyspace.KindNone {
				return false
			}
		}
	}
	return true
}

// flagChange is the put of a flag; nil for any other event. A delete may leave
// nothing of its record, so it is loaded again.
func flagChange(path keyspace.Path, ev *clientv3.Event) *change {
	if ev.Type != mvccpb.Event_PUT || !path.Field.Flag() || len(ev.Kv.Value) > shownValue {
		return nil
	}
	return &change{record: path.Record, field: path.Field, product: path.Product, value: string(ev.Kv.Value)}
}

// announced is what OnChange is told of an event.
func announced(path keyspace.Path, ev *clientv3.Event) Change {
	c := Change{Revision: ev.Kv.ModRevision, Path: path, Key: string(ev.Kv.Key), Deleted: ev.Type == mvccpb.Event_DELETE}
	if path.Field.Flag() {
		c.Value = string(ev.Kv.Value[:min(len(ev.Kv.Value), shownValue)])
	}
	return c
}
