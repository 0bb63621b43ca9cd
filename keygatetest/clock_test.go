package keygatetest_test

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"keygate/authz"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
)

// fakeClock is the true wall clock, moved.
type fakeClock struct{ moved, looks atomic.Int64 }

func (c *fakeClock) now() time.Time {
	c.looks.Add(1)
	return time.Now().Add(time.Duration(c.moved.Load()))
}

const clockJumps = "keygate_clock_backward_jumps_total"

// Through jumps of the wall clock: expiry follows it, but a key seen expired
// stays so until it is written again; no other key is touched, and freshness is
// never lost.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	const hour, day = time.Hour, 24 * time.Hour
	var clock fakeClock
	var made decisions
	etcd := statestore.EtcdConfig{Endpoints: []string{etcdtest.Start(t).Endpoint()}}
	k := keygatetest.Start(t, keygatetest.Options{Etcd: etcd, Now: clock.now, OnDecision: made.add})
	conn := k.Conn(t)

	in := func(d time.Duration) int64 { return time.Now().Add(d).UnixMilli() }
	named := func(name string, expiresAt int64) keygatetest.Key {
		return keygatetest.Key{Key: "key-that-expires-" + name, ExpiresAt: expiresAt, Products: map[authz.ProductName]string{
			quickstart.WeatherProduct: "approved", quickstart.OrdersProduct: "approved",
		}}
	}
	soon, unseen, late, never := named("soon", in(hour)), named("soon-unseen", in(hour)), named("late", in(10*day)), named("never", 0)
	record, space := soon.Record(t), k.Settings.Space
	k.Applied(t, k.PutKeys(t, soon, unseen, late, never))

	// want checks keys with the clock moved, and the jumps counted until now.
	want := func(moved time.Duration, jumps float64, step string, wants map[*keygatetest.Key]authz.Reason) {
		t.Helper()
		clock.moved.Store(int64(moved))
		for key, reason := range wants {
			if got := mustCheck(t, conn, key.Key); got != reason.String() {
				t.Errorf("%s: %s: got %s, want %v", step, key.Key, got, reason)
			}
		}
		// A check and the freshness tick look at the clock: after two more looks
		// with no check, one whole tick has passed.
		looks := clock.looks.Load()
		keygatetest.Eventually(t, keygatetest.Patience, "two looks at the clock", func() bool { return clock.looks.Load() > looks+1 })
		if got := k.Metrics(t)[clockJumps]; got != jumps {
			t.Errorf("%s: %s: got %v, want %v", step, clockJumps, got, jumps)
		}
		if status, body := k.Health(t, "/readyz"); status != 200 {
			t.Errorf("%s: readyz: got %d, want 200: %s", step, status, body)
		}
	}
	const allowed, expired = authz.Allowed, authz.KeyExpired
	all := func(soonIs, lateIs authz.Reason) map[*keygatetest.Key]authz.Reason {
		return map[*keygatetest.Key]authz.Reason{&soon: soonIs, &late: lateIs, &never: allowed}
	}
	want(0, 0, "before", all(allowed, allowed))
	want(2*hour, 0, "2 h ahead", all(expired, allowed))
	want(2*hour-500*time.Millisecond, 0, "back half a second", all(expired, allowed))
	want(0, 1, "back", all(expired, allowed))
	if !slices.ContainsFunc(made.list(), func(d authz.Decision) bool {
		return d.Reason == expired && strings.Contains(d.Problem, "clock was set back")
	}) {
		t.Error("no decision says that the clock was set back")
	}
	want(0, 1, "back, a key never seen expired", map[*keygatetest.Key]authz.Reason{&unseen: allowed})
	want(-10*time.Minute, 2, "10 min behind", all(expired, allowed))
	want(day, 2, "a day ahead", all(expired, allowed))
	want(-day, 3, "a day behind", all(expired, allowed))
	want(0, 3, "back again", all(expired, allowed))
	want(0, 3, "back again, a key never seen expired", map[*keygatetest.Key]authz.Reason{&unseen: allowed})
	if got := count(k.Log(), "level=WARN", "wall clock went back"); got != 3 {
		t.Errorf("got %d lines on a clock that went back, want 3", got)
	}

	// The same credential, with its status written again, and then loaded again
	// after an event that is no flag's put: still the one that was seen expired.
	k.Applied(t, k.Put(t, space.Status(record), "revoked"))
	want(0, 3, "revoked", all(authz.KeyRevoked, allowed))
	k.Applied(t, k.Put(t, space.Status(record), "approved"))
	want(0, 3, "approved again", all(expired, allowed))
	loads := k.Status(t).Store.Loads
	k.Applied(t, k.Delete(t, space.KeyProduct(record, quickstart.OrdersProduct)))
	want(0, 3, "loaded again", all(expired, allowed))
	if now := k.Status(t).Store.Loads; now <= loads {
		t.Errorf("loads: got %d, then %d: the record was not loaded again", loads, now)
	}

	// Written again it is another credential, with the same expiry or a later one.
	write := func(key keygatetest.Key) {
		k.Applied(t, k.Put(t, space.Details(record), key.Values(t, space)[space.Details(record)]))
	}
	write(soon)
	want(0, 3, "written again", all(allowed, allowed))
	want(2*hour, 3, "written again, 2 h ahead", all(expired, allowed))
	want(0, 4, "written again, back", all(expired, allowed))
	write(named("soon", in(3*hour)))
	want(0, 4, "with a later expiry", all(allowed, allowed))
	want(2*hour, 4, "with a later expiry, 2 h ahead", all(allowed, allowed))
	want(4*hour, 4, "with a later expiry, 4 h ahead", all(expired, allowed))
	want(0, 5, "with a later expiry, back", all(expired, allowed))

	if n := k.Checks(t, authz.Stale); n != 0 {
		t.Errorf("got %v checks refused as stale, want 0: freshness does not follow the wall clock", n)
	}

	// What was seen is not kept over a restart.
	k.Stop(t)
	k = keygatetest.Start(t, keygatetest.Options{Etcd: etcd, Now: clock.now})
	if got := mustCheck(t, k.Conn(t), soon.Key); got != allowed.String() {
		t.Errorf("after a restart: got %s, want %v", got, allowed)
	}
}
