package authz_test

import (
	"context"
	"encoding/binary"
	"runtime"
	"sync"
	"testing"
	"time"

	"keygate/authz"
)

// Walks of one key through clocks and writes: once seen expired it stays so
// until it is written again.
func TestExpiryOnceSeen(t *testing.T) {
	const hour = time.Hour
	type step struct {
		clock  time.Duration // from now
		change change        // to the records, before the check
		want   authz.Reason
	}
	ms := now.UnixMilli()
	inOneHour := expires(ms + hour.Milliseconds())
	writtenAt := func(revision int64) change {
		return func(r *authz.Records) { r.Credential.Revision = revision }
	}
	both := func(a, b change) change { return func(r *authz.Records) { a(r); b(r) } }
	tests := []struct {
		name  string
		steps []step
	}{
		{"the clock ahead and back", []step{
			{0, inOneHour, authz.Allowed}, {2 * hour, nil, authz.KeyExpired}, {0, nil, authz.KeyExpired}, {-24 * hour, nil, authz.KeyExpired},
		}},
		{"back to the very expiry and the instant before", []step{
			{0, inOneHour, authz.Allowed}, {hour, nil, authz.KeyExpired}, {hour - time.Millisecond, nil, authz.KeyExpired},
		}},
		{"never seen expired", []step{
			{0, inOneHour, authz.Allowed}, {hour - time.Millisecond, nil, authz.Allowed}, {-hour, nil, authz.Allowed}, {0, nil, authz.Allowed},
		}},
		{"never expires", []step{
			{0, nil, authz.Allowed}, {1e6 * hour, nil, authz.Allowed}, {0, nil, authz.Allowed},
		}},
		{"a later expiry is written", []step{
			{0, both(inOneHour, writtenAt(7)), authz.Allowed}, {2 * hour, nil, authz.KeyExpired},
			{0, both(expires(ms+3*hour.Milliseconds()), writtenAt(9)), authz.Allowed}, {4 * hour, nil, authz.KeyExpired}, {0, nil, authz.KeyExpired},
		}},
		{"the same expiry is written again", []step{
			{0, both(inOneHour, writtenAt(7)), authz.Allowed}, {2 * hour, nil, authz.KeyExpired},
			{0, writtenAt(9), authz.Allowed}, {2 * hour, nil, authz.KeyExpired}, {0, nil, authz.KeyExpired},
		}},
		{"a restored store has another expiry at the revision", []step{
			{0, both(inOneHour, writtenAt(7)), authz.Allowed}, {2 * hour, nil, authz.KeyExpired},
			{0, expires(ms + 3*hour.Milliseconds()), authz.Allowed}, {0, inOneHour, authz.KeyExpired},
		}},
		{"seen under another refusal", []step{
			{2 * hour, both(inOneHour, key(authz.StatusRevoked)), authz.KeyRevoked}, {0, key(authz.StatusApproved), authz.KeyExpired},
		}},
		{"a status changes, and the newest revision with it", []step{
			{2 * hour, both(inOneHour, writtenAt(7)), authz.KeyExpired}, {0, func(r *authz.Records) { r.Revision++ }, authz.KeyExpired},
			{0, weather(authz.StatusRevoked), authz.KeyExpired}, {0, weather(authz.StatusApproved), authz.KeyExpired},
		}},
		{"an unreadable credential is not seen expired", []step{
			{2 * hour, both(inOneHour, badKey), authz.RecordUnreadable},
			{0, func(r *authz.Records) { r.Credential.Problem = "" }, authz.Allowed},
		}},
		{"an expiry that is no time is not seen expired", []step{
			{0, expires(0), authz.KeyExpired}, {0, expires(-2), authz.RecordUnreadable}, {0, expires(authz.NeverExpires), authz.Allowed},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &source{records: good()}
			var at time.Time
			clock := func() time.Time { return at }
			a := &authz.Authorizer{Source: s, Now: clock}
			for i, st := range tt.steps {
				if st.change != nil {
					st.change(&s.records)
				}
				c := s.records.Credential
				at = now.Add(st.clock)
				d := a.Decide(t.Context(), request(t))
				if d.Reason != st.want {
					t.Errorf("step %d, clock at %v: got %v, want %v", i, st.clock, d.Reason, st.want)
				}
				agree(t, a, request(t), d)
				if d.Reason == authz.KeyExpired && (d.Problem == "") != (at.UnixMilli() >= c.ExpiresAt) {
					t.Errorf("step %d: problem: got %q, want one if, and only if, the clock says otherwise", i, d.Problem)
				}
			}
		})
	}
}

// Explain alone makes an expiry be seen, as Decide does.
func TestExplainSeesAnExpiry(t *testing.T) {
	s := &source{records: good()}
	expires(now.UnixMilli())(&s.records)
	at := now
	a := &authz.Authorizer{Source: s, Now: func() time.Time { return at }}
	a.Explain(t.Context(), request(t))
	at = now.Add(-time.Hour)
	if d := a.Decide(t.Context(), request(t)); d.Reason != authz.KeyExpired {
		t.Errorf("decide after explain saw it expired: got %v, want %v", d.Reason, authz.KeyExpired)
	}
	// What one Authorizer has seen is its own: a new process begins without.
	other := &authz.Authorizer{Source: s, Now: a.Now}
	if d := other.Decide(t.Context(), request(t)); d.Reason != authz.Allowed {
		t.Errorf("another authorizer: got %v, want %v", d.Reason, authz.Allowed)
	}
}

// fleet answers for any key with one good credential that expires.
type fleet struct{ records authz.Records }

func (f *fleet) Records(context.Context, authz.Organization, authz.KeyID) (authz.Records, error) {
	return f.records, nil
}

// numbered is a request with the i-th of many keys.
func numbered(t *testing.T, i int) authz.Request {
	req := request(t)
	binary.BigEndian.PutUint64(req.KeyID[:], uint64(i))
	return req
}

// Many more expired keys than are remembered: memory stays bounded, the newest
// are remembered, the oldest follow the clock again, and nobody else is
// refused.
func TestExpiredFlood(t *testing.T) {
	const keys, newest, others = 200_000, 10_000, 50_000
	f := &fleet{good()}
	expires(now.UnixMilli())(&f.records)
	at := now
	a := &authz.Authorizer{Source: f, Now: func() time.Time { return at }}
	ctx := t.Context()
	count := func(from, n int) (expired int) {
		for i := range n {
			switch d := a.Decide(ctx, numbered(t, from+i)); d.Reason {
			case authz.KeyExpired:
				expired++
			case authz.Allowed:
			default:
				t.Fatalf("key %d: got %v", from+i, d.Reason)
			}
		}
		return expired
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	if got := count(0, keys); got != keys {
		t.Fatalf("at the expiry: got %d of %d expired, want all", got, keys)
	}
	// The table is 1 MiB; the rest is what a test binary does by itself.
	if grown := int64(heap()) - int64(before); grown > 2<<20 {
		t.Errorf("%d expired keys took %d KiB, want at most 2 MiB", keys, grown>>10)
	}
	at = now.Add(-time.Hour)
	if got := count(keys, others); got != 0 {
		t.Errorf("never seen expired: got %d of %d refused, want 0", got, others)
	}
	if got := count(keys-newest, newest); got < newest*99/100 {
		t.Errorf("the newest: got %d of %d still expired, want 99%%", got, newest)
	}
	if got := count(0, keys); got > 128<<10 || got < 96<<10 {
		t.Errorf("of all: got %d still expired, want about the 128 Ki that there is room for", got)
	}
	runtime.KeepAlive(a)
}

// As many as half the room are remembered nearly all, wherever they hash to.
func TestExpiredWithinBound(t *testing.T) {
	const keys = 64 << 10
	f := &fleet{good()}
	expires(now.UnixMilli())(&f.records)
	at := now
	a := &authz.Authorizer{Source: f, Now: func() time.Time { return at }}
	// From several goroutines, each key twice.
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := g % 2; i < keys; i += 2 {
				a.Decide(t.Context(), numbered(t, i))
			}
		})
	}
	wg.Wait()
	at = now.Add(-time.Hour)
	lost := 0
	for i := range keys {
		if a.Decide(t.Context(), numbered(t, i)).Reason != authz.KeyExpired {
			lost++
		}
	}
	if lost > keys/100 {
		t.Errorf("got %d of %d forgotten, want fewer than one in a hundred", lost, keys)
	}
}

// BenchmarkDecideExpiring is a key with an expiry to come, where others have
// been seen expired: each check asks what has been seen.
func BenchmarkDecideExpiring(b *testing.B) {
	s := &source{records: good()}
	expires(now.UnixMilli())(&s.records)
	a := &authz.Authorizer{Source: s}
	req, ctx := request(b), b.Context()
	if d := a.Decide(ctx, req); d.Reason != authz.KeyExpired {
		b.Fatalf("got %v, want %v", d.Reason, authz.KeyExpired)
	}
	expires(time.Now().Add(24 * time.Hour).UnixMilli())(&s.records)
	b.ReportAllocs()
	for b.Loop() {
		if d := a.Decide(ctx, req); !d.Allowed() {
			b.Fatalf("got %v, want allowed", d.Reason)
		}
	}
}
