package statestore_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
	"keygate/statestore/keyspace"
	"keygate/statestore/storetest"
)

// registry is a real one whose answers a test may change. The functions are set
// before the store runs, and may be called concurrently.
type registry struct {
	statestore.Registry
	grant func(time.Duration, error) (time.Duration, error)
	renew func(time.Duration, error) (time.Duration, error)
	keep  atomic.Bool // no lease is released
	write func(path string, w statestore.Written, err error) (statestore.Written, error)
}

func (r *registry) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	id, granted, err := r.Registry.Grant(ctx, ttl)
	if r.grant != nil {
		granted, err = r.grant(granted, err)
	}
	return id, granted, err
}

func (r *registry) Renew(ctx context.Context, lease int64) (time.Duration, error) {
	granted, err := r.Registry.Renew(ctx, lease)
	if r.renew != nil {
		granted, err = r.renew(granted, err)
	}
	return granted, err
}

func (r *registry) Release(ctx context.Context, lease int64) error {
	if r.keep.Load() {
		return context.DeadlineExceeded
	}
	return r.Registry.Release(ctx, lease)
}

func (r *registry) Write(ctx context.Context, path, value string, lease, created int64) (statestore.Written, error) {
	w, err := r.Registry.Write(ctx, path, value, lease, created)
	if r.write != nil {
		w, err = r.write(path, w, err)
	}
	return w, err
}

// member is a registered replica over a real etcd.
type member struct {
	t     testing.TB
	cli   *clientv3.Client
	proxy *etcdtest.Proxy // between the replica and etcd
	store *statestore.Store
	stop  func()
}

func join(t testing.TB, change func(*registry)) *member {
	t.Helper()
	etcd := etcdtest.Start(t)
	m := &member{t: t, cli: etcd.Client(t), proxy: etcdtest.NewProxy(t, etcd.Endpoint())}
	c := storetest.Cluster{Put: m.put}
	c.PutApp()
	c.PutKey(storetest.Key)
	backend, err := statestore.NewEtcd(statestore.EtcdConfig{Endpoints: []string{m.proxy.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = backend.Close() })
	r := &registry{Registry: backend}
	if change != nil {
		change(r)
	}
	cfg := statestore.Config{
		Backend: backend, Space: storetest.Space, StalenessBudget: statestore.MinStalenessBudget,
		Registry: r, Version: "v-test", CacheBytes: 1 << 20, FenceSlots: 1 << 10,
	}
	if t, ok := t.(*testing.T); ok {
		cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	if m.store, err = statestore.New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = m.store.Run(ctx)
	}()
	m.stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(m.stop)
	return m
}

func (m *member) put(key, value string) int64 {
	m.t.Helper()
	r, err := m.cli.Put(m.t.Context(), key, value)
	if err != nil {
		m.t.Fatal(err)
	}
	return r.Header.Revision
}

func (m *member) barrier() int64 {
	m.t.Helper()
	return m.put(storetest.Space.Barrier(storetest.Org), "")
}

// registration that stands in etcd, with its lease; nil if there is none that
// can be read.
func (m *member) registration() (*keyspace.Replica, *clientv3.GetResponse) {
	m.t.Helper()
	r, err := m.cli.Get(m.t.Context(), storetest.Space.Replicas(), clientv3.WithPrefix())
	if err != nil {
		m.t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return nil, r
	}
	got, err := keyspace.ParseReplica(r.Kvs[0].Value)
	if err != nil {
		return nil, r
	}
	return &got, r
}

func (m *member) reason() authz.Reason {
	a := authz.Authorizer{Source: m.store}
	return a.Decide(m.t.Context(), authz.Request{Organization: storetest.Org, KeyID: storetest.Key, Products: []authz.ProductName{storetest.Weather}}).Reason
}

func (m *member) until(what string, ok func() bool) {
	m.t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("not within 10 s: %s; status %+v", what, m.store.Status())
		}
	}
}

func (m *member) await() {
	m.t.Helper()
	m.until("a proof", func() bool { return m.store.Fresh() == nil })
}

// settle waits until all acknowledgements have been written.
func (m *member) settle() {
	m.t.Helper()
	count, since := int64(-1), time.Now()
	m.until("the acknowledgements to end", func() bool {
		if n := m.store.Status().Acknowledgements; n != count {
			count, since = n, time.Now()
		}
		return count > 0 && time.Since(since) > 100*time.Millisecond
	})
}

// A replica is in the registry before its first yes, acknowledges what it has
// applied, and leaves only when it has ceased to answer.
func TestRegistration(t *testing.T) {
	t.Parallel()
	registered := make(chan struct{})
	m := join(t, func(r *registry) {
		r.write = func(_ string, w statestore.Written, err error) (statestore.Written, error) {
			<-registered // the answer is late
			return w, err
		}
	})
	m.until("the registration to be written", func() bool { r, _ := m.registration(); return r != nil })
	if m.store.Fresh() == nil || m.reason() != authz.Stale {
		t.Error("a proof before the registration was acknowledged")
	}
	close(registered)
	m.await()
	if got := m.reason(); got != authz.Allowed {
		t.Fatalf("check answered %v, want allowed", got)
	}

	r, at := m.registration()
	st := m.store.Status()
	if st.Registration != statestore.Registered || st.ReplicaID == "" || string(at.Kvs[0].Key) != storetest.Space.Replica(st.ReplicaID) {
		t.Errorf("status: got %q, id %q; the key is %s", st.Registration, st.ReplicaID, at.Kvs[0].Key)
	}
	if r.Version != "v-test" || r.StalenessBudget != 3*time.Second || r.Host == "" || r.Pid == 0 {
		t.Errorf("got %+v, want version, budget, host and pid", r)
	}
	lease, err := m.cli.TimeToLive(t.Context(), clientv3.LeaseID(at.Kvs[0].Lease))
	if err != nil || lease.GrantedTTL != 15 {
		t.Errorf("lease: got %+v, %v, want 15 s", lease, err)
	}

	rev := m.barrier()
	m.until("the barrier to be acknowledged", func() bool { r, _ := m.registration(); return r != nil && r.Acknowledged >= rev })
	if r, _ := m.registration(); !r.Fresh || r.ProofAge < 0 || r.At.IsZero() {
		t.Errorf("got %+v, want the figures of a fresh replica", r)
	}
	// A change without a barrier is nobody's business.
	count := m.store.Status().Acknowledgements
	m.put(storetest.Space.Status(keyspace.KeyRecord(storetest.Org, storetest.Key)), "revoked")
	m.until("the revocation to be applied", func() bool { return m.reason() == authz.KeyRevoked })
	// One acknowledgement covers all barriers before it.
	for range 200 {
		rev = m.barrier()
	}
	m.until("the last of 200 barriers to be acknowledged", func() bool { r, _ := m.registration(); return r.Acknowledged >= rev })
	if got := m.store.Status().Acknowledgements - count; got > 100 {
		t.Errorf("200 barriers took %d acknowledgements, want them put together", got)
	}

	m.stop()
	if r, _ := m.registration(); r != nil {
		t.Errorf("the registration is still there after the end: %+v", r)
	}
	if m.store.Fresh() == nil {
		t.Error("fresh after the end")
	}
}

// A registration that was removed by hand voids the proofs at the next probe, and
// a new one stands before the next yes.
func TestRegistrationRemoved(t *testing.T) {
	t.Parallel()
	for name, remove := range map[string]func(*member, *clientv3.GetResponse) error{
		"key deleted": func(m *member, at *clientv3.GetResponse) error {
			_, err := m.cli.Delete(t.Context(), string(at.Kvs[0].Key))
			return err
		},
		"lease revoked": func(m *member, at *clientv3.GetResponse) error {
			_, err := m.cli.Revoke(t.Context(), clientv3.LeaseID(at.Kvs[0].Lease))
			return err
		},
		"key written by another": func(m *member, at *clientv3.GetResponse) error {
			key := string(at.Kvs[0].Key)
			_, err := m.cli.Delete(t.Context(), key)
			if err == nil {
				_, err = m.cli.Put(t.Context(), key, "{}")
			}
			if err == nil {
				go func() { // it does not stay
					m.until("the loss to be seen", func() bool { return m.store.Status().Unregistered > 0 })
					_, _ = m.cli.Delete(m.t.Context(), key)
				}()
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := join(t, nil)
			m.await()
			m.settle() // so that it is a probe that finds out
			_, before := m.registration()
			if err := remove(m, before); err != nil {
				t.Fatal(err)
			}
			lost := func() bool { return m.store.Status().Registration == statestore.RegistrationLost }
			m.until("the loss to be seen", func() bool {
				if !lost() {
					return false
				}
				if got := m.reason(); lost() && got != authz.Stale {
					t.Errorf("without a registration: got %v, want stale", got)
				}
				return true
			})
			m.until("a new registration", func() bool {
				_, now := m.registration()
				return len(now.Kvs) == 1 && now.Kvs[0].CreateRevision > before.Header.Revision && now.Kvs[0].Lease != 0
			})
			m.await()
			rev := m.barrier()
			m.until("the barrier to be acknowledged", func() bool { r, _ := m.registration(); return r != nil && r.Acknowledged >= rev })
		})
	}
}

// No proof outlives the lease as the replica counts it, whatever the budget and
// the probes say.
func TestProofEndsWithLease(t *testing.T) {
	t.Parallel()
	m := join(t, nil)
	m.await()
	m.store.ShortenLease(200 * time.Millisecond)
	m.until("checks to be refused", func() bool { return m.reason() == authz.Stale })
	probes := m.store.Status().Probes
	m.until("another probe", func() bool { return m.store.Status().Probes > probes+1 })
	if got := m.reason(); got != authz.Stale {
		t.Errorf("after the lease: got %v, want stale", got)
	}
	m.until("the renewal to open it again", func() bool { return m.reason() == authz.Allowed })
}

// Without a registration nothing is answered, and the cause is said with its
// cure.
func TestRegistrationRefused(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		grant func(time.Duration, error) (time.Duration, error)
		want  string
	}{
		{"permission", func(time.Duration, error) (time.Duration, error) { return 0, rpctypes.ErrPermissionDenied }, "--register=false"},
		{"full", func(time.Duration, error) (time.Duration, error) { return 0, rpctypes.ErrNoSpace }, "etcd is full"},
		{"short lease", func(time.Duration, error) (time.Duration, error) { return 5 * time.Second, nil }, "a lease of 5s, want at least 15s"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			m := join(t, func(r *registry) { r.grant = test.grant })
			m.until("the cause to be said", func() bool {
				err := m.store.Fresh()
				return errors.Is(err, authz.ErrUnavailable) && strings.Contains(err.Error(), test.want)
			})
			if st := m.store.Status(); st.Registration != statestore.RegistrationLost || m.reason() != authz.Stale {
				t.Errorf("got registration %q, a check %v; want none and stale", st.Registration, m.reason())
			}
		})
	}
}

// A registration whose answer was lost is given up, not taken over.
func TestRegistrationOutcomeUnknown(t *testing.T) {
	t.Parallel()
	var writes atomic.Int64
	m := join(t, func(r *registry) {
		r.write = func(_ string, w statestore.Written, err error) (statestore.Written, error) {
			if writes.Add(1) == 1 {
				return statestore.Written{}, context.DeadlineExceeded
			}
			return w, err
		}
	})
	m.await()
	if got := m.store.Status().Unregistered; got < 1 {
		t.Errorf("got %d lost registrations, want the first", got)
	}
	if _, at := m.registration(); len(at.Kvs) != 1 {
		t.Errorf("got %d registrations, want 1", len(at.Kvs))
	}
}

// An outage ends the lease for the replica, which cannot say so to etcd, and
// etcd keeps it: the replica takes it out when it is back, and does not wait for
// the lease's end.
func TestRegistrationAfterOutage(t *testing.T) {
	t.Parallel()
	var away atomic.Bool
	var r *registry
	m := join(t, func(made *registry) {
		r = made
		r.renew = func(granted time.Duration, err error) (time.Duration, error) {
			if away.Load() {
				return 0, context.DeadlineExceeded
			}
			return granted, err
		}
	})
	m.await()
	m.settle()
	r.keep.Store(true)
	away.Store(true)
	m.store.ShortenLease(0)
	m.until("the loss to be seen", func() bool { return m.store.Status().Unregistered > 0 })
	_, before := m.registration()
	if len(before.Kvs) != 1 {
		t.Fatalf("got %d registrations, want the old one: the test is about it", len(before.Kvs))
	}
	r.keep.Store(false)
	away.Store(false)
	began := time.Now()
	m.await()
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("registered again after %v, want it not to wait for the old lease", took)
	}
	if _, now := m.registration(); len(now.Kvs) != 1 || now.Kvs[0].CreateRevision <= before.Header.Revision {
		t.Errorf("got %v, want a new registration", now.Kvs)
	}
}

// An acknowledgement that cannot be written costs no check, and is made up for.
func TestAcknowledgementFails(t *testing.T) {
	t.Parallel()
	var full atomic.Bool
	m := join(t, func(r *registry) {
		inner := r.Registry
		r.Registry = refusing{inner, &full}
	})
	m.await()
	m.until("the first acknowledgement", func() bool { r, _ := m.registration(); return r.Acknowledged > 0 })
	full.Store(true)
	rev := m.barrier()
	m.until("it to fail", func() bool { return m.store.Status().AckErrors > 1 })
	if got := m.reason(); got != authz.Allowed {
		t.Errorf("a check meanwhile: got %v, want allowed", got)
	}
	if r, _ := m.registration(); r.Acknowledged >= rev {
		t.Errorf("revision %d is acknowledged", rev)
	}
	full.Store(false)
	m.until("the barrier to be acknowledged", func() bool { r, _ := m.registration(); return r.Acknowledged >= rev })
}

// refusing refuses writes, and nothing else, as a full etcd does.
type refusing struct {
	statestore.Registry
	full *atomic.Bool
}

func (r refusing) Write(ctx context.Context, path, value string, lease, created int64) (statestore.Written, error) {
	if r.full.Load() {
		return statestore.Written{}, rpctypes.ErrNoSpace
	}
	return r.Registry.Write(ctx, path, value, lease, created)
}

// An acknowledgement that another cluster has answered ends the epoch: what was
// acknowledged is not that cluster's history.
func TestAcknowledgementInAnotherCluster(t *testing.T) {
	t.Parallel()
	var foreign atomic.Bool
	m := join(t, func(r *registry) {
		r.write = func(_ string, w statestore.Written, err error) (statestore.Written, error) {
			if err == nil && foreign.Load() {
				w.Header.ClusterId++
			}
			return w, err
		}
	})
	m.await()
	epoch := m.store.Status().Epoch
	foreign.Store(true)
	m.barrier()
	m.until("a new epoch", func() bool { return m.store.Status().Epoch > epoch })
	foreign.Store(false)
	m.await()
}

// After a gap the replica acknowledges without having seen the barrier's event.
func TestAcknowledgementAfterGap(t *testing.T) {
	t.Parallel()
	m := join(t, nil)
	m.await()
	m.proxy.Refuse()
	m.proxy.Cut()
	rev := m.barrier()
	if _, err := m.cli.Compact(t.Context(), m.put("/elsewhere", "")); err != nil {
		t.Fatal(err)
	}
	m.proxy.Accept()
	m.until("the barrier to be acknowledged", func() bool { r, _ := m.registration(); return r != nil && r.Acknowledged >= rev })
	if got := m.store.Status().Gaps; got != 1 {
		t.Errorf("got %d gaps, want 1: the test is not about one", got)
	}
}
