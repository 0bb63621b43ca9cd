package statestore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"keygate/statestore/keyspace"
)

// Registry is where a replica says that it is there: one key under a lease.
// [Etcd] is the real one. Methods are safe for concurrent use and end with ctx.
type Registry interface {
	// Grant makes a lease of at least ttl, and returns how long it really is.
	Grant(ctx context.Context, ttl time.Duration) (lease int64, granted time.Duration, err error)
	// Renew begins the time of a lease anew. The error wraps
	// rpctypes.ErrLeaseNotFound if there is no such lease any more.
	Renew(ctx context.Context, lease int64) (granted time.Duration, err error)
	// Release ends a lease, and with it the key.
	Release(ctx context.Context, lease int64) error
	// Write puts value at path under lease, if the key there was created at
	// revision created; 0 means if there is none.
	Write(ctx context.Context, path, value string, lease, created int64) (Written, error)
}

// Written is the answer to a Write.
type Written struct {
	Header *etcdserverpb.ResponseHeader
	// Done is false if the key was not as expected, and nothing was written.
	// Lease is then that of the key that stands there, 0 for none.
	Done  bool
	Lease int64
}

const (
	// leaseMargin is taken off a lease's time, for the difference in rate between
	// this machine's clock and etcd's: one second in fifteen.
	leaseMargin = time.Second
	// registerTimeout bounds each step of a registration.
	registerTimeout = 3 * time.Second
	// acknowledgeTimeout bounds an acknowledgement: one that was proposed while
	// etcd had no leader is lost, and nobody says so.
	acknowledgeTimeout = time.Second
	// acknowledgeEvery is the least time between two acknowledgements. One covers
	// every barrier before it, so a storm of revocations costs etcd 50 writes a
	// second and replica.
	acknowledgeEvery = 20 * time.Millisecond
	// againMin and againMax are the pauses after a registration or an
	// acknowledgement that failed: a full etcd, or a right that is missing, stays
	// so for long, and the whole fleet meets it.
	againMin = 200 * time.Millisecond
	againMax = 5 * time.Second
)

// retry is the pause after one failure more; reset by assigning 0. A tenth of
// it is chance, so that a fleet does not come back in step.
type retry time.Duration

func (r *retry) next() time.Duration {
	*r = retry(min(max(2*time.Duration(*r), againMin), againMax))
	return time.Duration(*r) + mathrand.N(time.Duration(*r)/10)
}

// leaseTTL is the time of a replica's lease, in whole seconds as etcd counts
// it: long enough that no lease ends in an outage that the budget survives.
func leaseTTL(budget time.Duration) time.Duration {
	ttl := max(15*time.Second, 3*(budget+time.Second)/2)
	return (ttl + time.Second - 1).Truncate(time.Second)
}

// registration is one stay in the registry. A proof is made in one, and none
// is valid beyond it.
type registration struct {
	lease   int64
	created int64        // revision of the key's first write
	end     atomic.Int64 // a time.Duration of now: until then etcd keeps the lease
	lost    atomic.Bool

	over struct {
		sync.Once
		ch chan struct{} // closed when lost
	}
}

func newRegistration(lease int64, end time.Duration) *registration {
	r := &registration{lease: lease}
	r.end.Store(int64(end))
	r.over.ch = make(chan struct{})
	return r
}

// found tells whether the key read at the replica's path is this registration.
func (r *registration) found(kvs []*mvccpb.KeyValue) bool {
	return len(kvs) == 1 && kvs[0].CreateRevision == r.created && kvs[0].Lease == r.lease
}

// lose voids every proof made in the registration.
func (r *registration) lose() {
	r.lost.Store(true)
	r.over.Do(func() { close(r.over.ch) })
}

// fleet is this replica's place among the others: it registers, and
// acknowledges the barriers that revocations write.
//
// The order is what makes a receipt exact. The registration is acknowledged by
// etcd before the first proof is begun (t0), it is found again by the read of
// each proof, and a proof is valid no longer than the lease, counted from
// before the last renewal was sent. So whoever says yes is registered, and a
// revocation that lists the registrations at its own revision misses nobody.
type fleet struct {
	registry Registry // nil: outside the receipt
	path     string
	self     keyspace.Replica // what does not change of it

	current atomic.Pointer[registration] // nil while there is none
	trouble atomic.Pointer[trouble]      // why there is none
	changed chan struct{}                // cap 1: current was set
	due     chan struct{}                // cap 1: there is something to acknowledge

	acknowledged                       atomic.Int64
	acknowledgements, failures, losses atomic.Int64
}

func newFleet(r Registry, space keyspace.Space, version string, budget time.Duration) (*fleet, error) {
	f := &fleet{registry: r, changed: make(chan struct{}, 1), due: make(chan struct{}, 1)}
	if r == nil {
		f.current.Store(newRegistration(0, math.MaxInt64))
		return f, nil
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("register: %w", err)
	}
	id := rand.Text() // of this process, never used by another
	f.path = space.Replica(id)
	f.self = keyspace.Replica{ID: id, Version: version, Host: host, Pid: os.Getpid(), StalenessBudget: budget, ProofAge: -1}
	return f, nil
}

// await returns the registration, once there is one.
func (f *fleet) await(ctx context.Context) (*registration, error) {
	for {
		if r := f.current.Load(); r != nil {
			return r, nil
		}
		select {
		case <-f.changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("not registered: %w", f.problem(ctx.Err()))
		}
	}
}

// problem is why there is no registration, else otherwise.
func (f *fleet) problem(otherwise error) error {
	if t := f.trouble.Load(); t != nil {
		return t.err
	}
	return otherwise
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// register keeps the replica registered until ctx ends, and then takes it out.
func (s *Store) register(ctx context.Context) {
	var again retry
	told := ""
	for ctx.Err() == nil {
		registered, err := s.stay(ctx)
		if ctx.Err() != nil {
			return
		}
		if registered {
			again, told = 0, ""
		}
		s.fleet.losses.Add(1)
		s.fleet.trouble.Store(&trouble{err})
		if err.Error() != told { // once, however long it lasts
			told = err.Error()
			s.log.Warn("not registered, trying again", "cause", err)
		}
		select {
		case <-time.After(again.next()):
		case <-ctx.Done():
		}
	}
}

// stay registers once and returns when that registration is over, or could not
// be made.
func (s *Store) stay(ctx context.Context) (registered bool, err error) {
	f := s.fleet
	want := leaseTTL(s.budget)
	granting, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	sent := now()
	lease, ttl, err := f.registry.Grant(granting, want)
	if err != nil {
		return false, registering("get a lease", err)
	}
	defer func() {
		release, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = f.registry.Release(release, lease) // it ends by itself at the latest
	}()
	if ttl < want {
		// Then an election could cost the lease, and the wait for a receipt could be
		// shorter than a replica may go on.
		return false, fmt.Errorf("register: etcd granted a lease of %v, want at least %v", ttl, want)
	}
	r := newRegistration(lease, sent+ttl-leaseMargin)
	writing, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	w, err := f.registry.Write(writing, f.path, f.self.Value(), lease, 0)
	switch {
	case err != nil:
		return false, registering("write "+f.path, err)
	case !w.Done && w.Lease == 0:
		return false, fmt.Errorf("register: somebody has written %s, without a lease: delete it", f.path)
	case !w.Done:
		// An earlier registration of this process, which it could not take out: etcd
		// was away, and begins all leases anew when it is back. No proof is left of it.
		_ = f.registry.Release(writing, w.Lease)
		return false, fmt.Errorf("register: %s was still there and has been taken out", f.path)
	}
	r.created = w.Header.Revision
	f.trouble.Store(nil)
	f.current.Store(r)
	signal(f.changed)
	signal(f.due) // barriers since the registration was written wait for it
	s.log.Info("registered", "key", f.path, "revision", r.created, "lease", ttl)
	defer func() {
		r.lose()
		f.current.Store(nil)
	}()
	return true, s.renew(ctx, r, ttl)
}

// renew keeps r's lease until it is over.
func (s *Store) renew(ctx context.Context, r *registration, ttl time.Duration) error {
	next := time.NewTimer(ttl / 3)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.over.ch:
			return errors.New("register: the registration has been removed")
		case <-next.C:
		}
		renewing, cancel := context.WithTimeout(ctx, registerTimeout)
		sent := now()
		granted, err := s.fleet.registry.Renew(renewing, r.lease)
		cancel()
		switch {
		case err == nil:
			grow(&r.end, int64(sent+granted-leaseMargin))
			next.Reset(granted / 3)
		case errors.Is(err, rpctypes.ErrLeaseNotFound), int64(now()) >= r.end.Load():
			return registering("renew the lease", err)
		default:
			next.Reset(time.Second)
		}
	}
}

// registering explains an error of a registration.
func registering(what string, err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		err = fmt.Errorf("%w: grant this user readwrite on the prefix of the registrations, or run with --register=false, outside the fleet's receipt", err)
	case errors.Is(err, rpctypes.ErrNoSpace):
		err = fmt.Errorf("%w: etcd is full: compact, defragment and disarm the alarm, or run with --register=false, outside the fleet's receipt", err)
	}
	return fmt.Errorf("register: %s: %w", what, err)
}

// acknowledge writes how far this replica has come whenever a barrier has taken
// effect, the newest alone, until ctx ends. The watcher does not wait for it.
func (s *Store) acknowledge(ctx context.Context) {
	var again retry
	for {
		select {
		case <-s.fleet.due:
		case <-ctx.Done():
			return
		}
		pause := acknowledgeEvery
		switch err := s.acknowledgeOnce(ctx); {
		case err == nil:
			again = 0
		case ctx.Err() == nil:
			s.fleet.failures.Add(1)
			if again == 0 { // once, however long it lasts
				s.log.Warn("not acknowledged: a receipt waits for the staleness budget instead", "cause", err)
			}
			pause = again.next()
			signal(s.fleet.due)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

func (s *Store) acknowledgeOnce(ctx context.Context) error {
	f := s.fleet
	r := f.current.Load()
	e := s.epoch.Load()
	m := e.mark()
	applied := e.applied.Load()
	if r == nil || e.dead.Load() || applied == 0 {
		return nil // a registration or an epoch that begins asks again
	}
	self := f.self
	self.Acknowledged, self.At = applied, time.Now()
	self.Fresh, self.ProofAge = s.Fresh() == nil, -1
	if p := e.proof.Load(); p != nil {
		self.ProofAge = now() - p.t0
	}
	ctx, cancel := context.WithTimeout(ctx, acknowledgeTimeout)
	defer cancel()
	w, err := f.registry.Write(ctx, f.path, self.Value(), r.lease, r.created)
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		r.lose()
		return nil
	case err != nil:
		return fmt.Errorf("acknowledge revision %d: %w", applied, err)
	case !w.Done:
		r.lose()
		return nil
	}
	if e.admit(m, w.Header) != nil {
		return nil // another history: the epoch has ended
	}
	f.acknowledged.Store(applied)
	f.acknowledgements.Add(1)
	return nil
}
