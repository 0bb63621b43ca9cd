package statestore

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// progressEvery is how often a progress notification is asked for while one is
// awaited: the server drops a request in silence while events are on their way.
const progressEvery = 250 * time.Millisecond

// probe makes proofs until ctx or the epoch ends. It hands a new watch over
// replacements when reads answer but applied does not follow: events then flow
// through a connection that has died unseen.
func (s *Store) probe(ctx context.Context, e *epoch, w Watch, replacements chan<- Watch) {
	tick := time.NewTicker(s.interval)
	defer tick.Stop()
	for {
		silent, err := s.prove(ctx, e, w)
		if err != nil && ctx.Err() == nil {
			s.counts.probeErrors.Add(1)
			s.report(err)
		}
		if silent {
			if r := s.reopen(ctx, e); r != nil {
				select {
				case replacements <- r:
					w = r
				case <-ctx.Done():
					r.Close()
				}
			}
		}
		select {
		case <-tick.C:
		case <-e.end.ch:
			return
		case <-ctx.Done():
			return
		}
	}
}

// prove makes one proof. silent tells that a read was answered and the watch
// did not follow.
func (s *Store) prove(ctx context.Context, e *epoch, w Watch) (silent bool, err error) {
	s.counts.probes.Add(1)
	read, cancel := context.WithTimeout(ctx, 2*s.budget/5)
	defer cancel()
	member, err := s.fleet.await(read) // before t0
	if err != nil {
		return false, err
	}
	m := e.mark()
	made := time.Now()
	t0 := now()
	prefixes := []string{s.space.Probe()}
	if member.created > 0 {
		prefixes = append(prefixes, s.fleet.path)
	}
	head, err := s.backend.Read(read, prefixes...)
	if err != nil {
		return false, fmt.Errorf("probe: %w", err)
	}
	if err := e.admit(m, head.Header); err != nil {
		return false, err
	}
	if member.created > 0 && !member.found(head.Ranges[1]) {
		member.lose()
		return false, errors.New("probe: the registration has been removed")
	}
	h := head.Header.Revision
	follow, cancel := context.WithTimeout(ctx, 2*s.budget/5)
	defer cancel()
	for e.applied.Load() < h {
		step, cancel := context.WithTimeout(follow, progressEvery)
		// Its error is the connection's; whether applied follows tells more.
		_ = w.RequestProgress(step)
		err := e.await(step, h)
		cancel()
		if err != nil && follow.Err() != nil {
			return ctx.Err() == nil, fmt.Errorf("probe: reads answer revision %d but the watch is silent "+
				"(does an etcd grpc-proxy stand between? it forwards no progress requests): %w", h, err)
		}
		if e.dead.Load() {
			return false, e.end.cause
		}
	}
	end := min(t0+s.budget, time.Duration(member.end.Load()))
	e.proof.Store(&proof{epoch: e, member: member, t0: t0, validUntil: end, made: made})
	return false, nil
}

// reopen opens another watch, on a client of its own, from where the fences
// have come. nil if it cannot: the old one is kept.
func (s *Store) reopen(ctx context.Context, e *epoch) Watch {
	open, cancel := context.WithTimeout(ctx, s.budget/5)
	defer cancel()
	w, err := s.backend.Watch(open, s.space.Watched(), e.applied.Load()+1)
	if err != nil {
		s.report(fmt.Errorf("replace the silent watch: %w", err))
		return nil
	}
	s.counts.replaced.Add(1)
	s.log.Warn("watch was silent, replaced", "applied", e.applied.Load())
	return w
}

// report keeps why no proof could be made, for Fresh to say.
func (s *Store) report(err error) { s.trouble.Store(&trouble{err}) }

// counts are monotone counters of one store.
type counts struct {
	indexed, hits, absentHits, caughtUp, misses  atomic.Int64
	loads, loadErrors, joined, rejoined, rereads atomic.Int64
	localLoads                                   atomic.Int64
	shed, waits, snapshots, unreadable           atomic.Int64
	events, repeated, ignored, gaps, replaced    atomic.Int64
	probes, probeErrors                          atomic.Int64
}
