package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/bench/load"
)

// revokeTimeout of one revocation, from the put to the refusal.
const revokeTimeout = 10 * time.Second

// runRevoke measures how long a put of "revoked" takes to the first refusal, and
// to a watch of the same etcd in this process: nobody can know of it earlier.
func runRevoke(ctx context.Context, b *bench) (*Result, error) {
	result := &Result{
		Title: "From a put to the refusal",
		About: []string{
			"The status of a key is put into etcd as `revoked`. Its time is taken until an etcd client in the generator's process has the event of its watch, and until the first check of that key is refused; checks of the key are sent back to back on a connection of their own.",
			fmt.Sprintf("Quiet means that nothing else goes on; the other rows are under %s checks a second of other keys.", number(rate)),
			"Every put gives one of both times, and the ratios are of the same round.",
		},
	}
	for _, count := range b.keys {
		t, err := b.revoke(ctx, max(count, 100), result)
		if err != nil {
			return nil, err
		}
		result.Tables = append(result.Tables, t)
	}
	return result, nil
}

// revocable starts keygate over a store of count keys, of which a generator on so
// many connections checks the lower half and a revoker has the upper one. The
// caller stops them.
func (b *bench) revocable(ctx context.Context, count, connections int) (s *subject, r *revoker, stop func(), err error) {
	binary, err := b.build(ctx, "./cmd/keygate")
	if err != nil {
		return nil, nil, nil, err
	}
	keygate, err := b.seeded(ctx, binary, count)
	if err != nil {
		return nil, nil, nil, err
	}
	s = &subject{process: keygate}
	stop = func() {
		if r != nil {
			r.close()
		}
		s.stop()
	}
	if err = b.connect(ctx, s, count/2, connections); err == nil {
		r, err = b.newRevoker(ctx, keygate, count/2, count)
	}
	if err != nil {
		stop()
		return nil, nil, nil, err
	}
	return s, r, stop, nil
}

func (b *bench) revoke(ctx context.Context, count int, result *Result) (Table, error) {
	t := Table{Title: number(float64(count)) + " keys", Subjects: []string{"raw watch", "keygate"}}
	s, r, stop, err := b.revocable(ctx, count, 1)
	if err != nil {
		return t, err
	}
	defer stop()
	if _, err := r.round(ctx, min(time.Second, b.duration)); err != nil { // everything once
		return t, err
	}
	for _, under := range []string{"quiet", "under " + number(rate) + " checks/s"} {
		p50 := Figure{Name: "p50, " + under, Unit: "ms", Values: make([][]float64, 2)}
		p99 := Figure{Name: "p99, " + under, Unit: "ms", Values: make([][]float64, 2)}
		puts := 0
		for round := range b.rounds {
			found, err := b.revokeRound(ctx, r, s, under != "quiet")
			if err != nil {
				return t, err
			}
			if ctx.Err() != nil {
				return t, ctx.Err()
			}
			for i, all := range [][]time.Duration{found.watch, found.refusal} {
				slices.Sort(all)
				p50.Values[i] = append(p50.Values[i], ms(all[len(all)/2]))
				p99.Values[i] = append(p99.Values[i], ms(all[len(all)*99/100]))
			}
			puts += len(found.watch)
			b.progress("round %d/%d, %s: %d puts, to the watch p50 %v p99 %v ms, to the refusal p50 %v p99 %v ms", round+1, b.rounds, under, len(found.watch),
				number(p50.Values[0][round]), number(p99.Values[0][round]), number(p50.Values[1][round]), number(p99.Values[1][round]))
		}
		t.Figures = append(t.Figures, p50, p99)
		result.Notes = append(result.Notes, fmt.Sprintf("%s keys, %s: %s puts.", number(float64(count)), under, number(float64(puts))))
	}
	return t, nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// revokeRound is one round, beside checks of other keys or not.
func (b *bench) revokeRound(ctx context.Context, r *revoker, s *subject, loaded bool) (times, error) {
	if !loaded {
		return r.round(ctx, b.duration)
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	var background load.Result
	var failed error
	running.Go(func() { background, failed = s.generator.Run(ctx, load.Plan{Rate: rate}) })
	found, err := r.round(ctx, b.duration)
	cancel()
	running.Wait()
	if failed == nil {
		failed = background.Err()
	}
	if failed != nil {
		failed = fmt.Errorf("checks beside it: %w", failed)
	}
	return found, errors.Join(err, failed)
}

// times from a put, in the order of the puts.
type times struct{ watch, refusal []time.Duration }

// revoker revokes one key after the other.
type revoker struct {
	etcd   *clientv3.Client
	prober *load.Generator
	events chan event
	stop   context.CancelFunc

	from, to, next int    // keys to revoke, and the one whose turn it is
	probed         uint64 // the key that the prober checks
}

// event of the watch, and when it was there.
type event struct {
	path, value string
	at          time.Time
}

func (b *bench) newRevoker(ctx context.Context, keygate *process, from, to int) (*revoker, error) {
	r := &revoker{events: make(chan event, 1024), from: from, to: to, next: from}
	request, err := b.captured(b.request)
	if err != nil {
		return nil, err
	}
	if r.etcd, err = dialEtcd(keygate.dataDir); err != nil {
		return nil, err
	}
	key := func(_ uint64, key []byte) { writeKey(r.probed, key) }
	if r.prober, err = load.Dial(load.Config{Address: keygate.authz, Request: request, Key: key}); err != nil {
		_ = r.etcd.Close()
		return nil, err
	}
	ctx, r.stop = context.WithCancel(ctx)
	watch := r.etcd.Watch(clientv3.WithRequireLeader(ctx), space.Watched(), clientv3.WithPrefix())
	go func() {
		defer close(r.events)
		for resp := range watch {
			at := time.Now()
			for _, e := range resp.Events {
				select {
				case r.events <- event{string(e.Kv.Key), string(e.Kv.Value), at}:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return r, nil
}

func (r *revoker) close() {
	r.stop()
	r.prober.Close()
	_ = r.etcd.Close()
}

// round revokes and approves keys for so long.
func (r *revoker) round(ctx context.Context, lasts time.Duration) (t times, err error) {
	for began := time.Now(); time.Since(began) < lasts && ctx.Err() == nil; {
		watch, refusal, err := r.one(ctx)
		if err != nil {
			return t, err
		}
		t.watch, t.refusal = append(t.watch, watch), append(t.refusal, refusal)
	}
	return t, ctx.Err()
}

// one revocation, of a key that is checked all the while; it is approved again.
func (r *revoker) one(ctx context.Context) (watch, refusal time.Duration, err error) {
	key := r.next
	if r.next++; r.next == r.to {
		r.next = r.from
	}
	path := space.Status(keyRecord(keyText(key)))
	r.probed = uint64(key)
	ctx, cancel := context.WithTimeout(ctx, revokeTimeout)
	defer cancel()

	var refused time.Time
	allowed := make(chan struct{})
	var probing sync.WaitGroup
	var probeErr error
	probing.Go(func() {
		checks := 0
		_, probeErr = r.prober.Run(ctx, load.Plan{Streams: 1, Duration: revokeTimeout, Until: func(a load.Answer) bool {
			switch a.Verdict {
			case load.Allowed:
				if checks++; checks == 1 {
					close(allowed)
				}
			case load.Denied:
				if checks == 0 {
					return false // its approval has not been seen yet
				}
				refused = a.At
				return true
			}
			return false
		}})
	})
	select {
	case <-allowed:
	case <-ctx.Done():
		probing.Wait()
		return 0, 0, fmt.Errorf("no check of an approved key was allowed: %w", errors.Join(ctx.Err(), probeErr))
	}
	began := time.Now()
	if _, err := r.etcd.Put(ctx, path, "revoked"); err != nil {
		cancel()
		probing.Wait()
		return 0, 0, fmt.Errorf("put %s: %w", path, err)
	}
	at, err := r.await(ctx, path, "revoked")
	probing.Wait()
	if err == nil && probeErr != nil {
		err = probeErr
	}
	if err == nil && refused.IsZero() {
		err = errors.New("no check of a revoked key was refused")
	}
	if err != nil {
		return 0, 0, err
	}
	if _, err := r.etcd.Put(ctx, path, "approved"); err != nil {
		return 0, 0, fmt.Errorf("put %s: %w", path, err)
	}
	_, err = r.await(ctx, path, "approved")
	return at.Sub(began), refused.Sub(began), err
}

// await returns when the watch had an event.
func (r *revoker) await(ctx context.Context, path, value string) (time.Time, error) {
	for {
		select {
		case e, ok := <-r.events:
			if !ok {
				return time.Time{}, errors.New("the watch has ended")
			}
			if e.path == path && e.value == value {
				return e.at, nil
			}
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("the watch has no event: %w", ctx.Err())
		}
	}
}
