package quickstart

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keygate/authz"
	apps "keygate/examples/quickstart"
)

// startPollers asks handler until the test ends.
func startPollers(t *testing.T, handler http.HandlerFunc) *pollers {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	p := newPollers(s.URL, "x-api-key", apps.WeatherKey)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for i := range numPollers {
		running.Go(func() { p.run(ctx, i) })
	}
	t.Cleanup(func() { cancel(); running.Wait() })
	return p
}

func mustSettle(t *testing.T, x *expectation) {
	t.Helper()
	select {
	case <-x.settled:
	case <-time.After(stepTimeout):
		t.Fatal("the answers did not settle")
	}
}

func TestPollersSeeAChange(t *testing.T) {
	var status atomic.Int64
	status.Store(200)
	p := startPollers(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("x-api-key") != apps.WeatherKey {
			t.Errorf("got key %q", r.Header.Get("x-api-key"))
		}
		w.WriteHeader(int(status.Load()))
	})
	mustSettle(t, p.expect(200))
	for _, want := range []int{401, 200, 401} {
		x := p.expect(want)
		changed := time.Now()
		status.Store(int64(want))
		mustSettle(t, x)
		if x.broken != nil || x.first.Before(changed) {
			t.Errorf("%d: got %v, first %v after the change, want it after", want, x.broken, x.first.Sub(changed))
		}
	}
	<-p.time()
	if took, n := p.requests(); n < calmRequests || took.Median <= 0 || took.Max < took.P99 || took.P99 < took.Median {
		t.Errorf("got %+v of %d requests", took, n)
	}
}

// A yes to a request that began after the first no had ended is what must not
// be; the tour would end with it.
func TestPollersSeeARevocationUndone(t *testing.T) {
	var asked atomic.Int64
	p := startPollers(t, func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) == 50 {
			w.WriteHeader(401)
		}
	})
	x := p.expect(401)
	mustSettle(t, x)
	if x.broken == nil || !strings.Contains(x.broken.Error(), "began after the first 401 got 200") {
		t.Errorf("got %v, want it broken", x.broken)
	}
	tour := &tour{pollers: p}
	if err := tour.await(t.Context(), x, action{"revoked", authz.KeyRevoked}, "put"); err == nil || !strings.HasPrefix(err.Error(), "put: a request that began after") {
		t.Errorf("tour: got %v, want that it is broken", err)
	}
}

func TestTourWantsTheReason(t *testing.T) {
	p := startPollers(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) })
	x := p.expect(401)
	p.decided(authz.Decision{Reason: authz.AppRevoked, KeyID: apps.KeyID(apps.OrdersKey)}, 1) // another key's
	p.decided(authz.Decision{Reason: authz.Allowed, KeyID: apps.KeyID(apps.WeatherKey)}, 1)   // from before
	p.decided(authz.Decision{Reason: authz.KeyRevoked, KeyID: apps.KeyID(apps.WeatherKey)}, 7)
	tour := &tour{pollers: p}
	if err := tour.await(t.Context(), x, action{"revoked", authz.KeyRevoked}, "put"); err != nil {
		t.Errorf("got %v, want nil", err)
	}
	if _, check := p.decision(x); check != 7 {
		t.Errorf("got a check of %v, want 7ns", check)
	}
	err := tour.await(t.Context(), x, action{"revoked", authz.AppRevoked}, "put")
	if err == nil || err.Error() != "put: 401 through Envoy for the reason key_revoked, want app_revoked" {
		t.Errorf("got %v, want that the reason is another", err)
	}
}

// A step that is not seen ends the tour, with what was seen.
func TestTourGivesUp(t *testing.T) {
	p := startPollers(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) })
	tour := &tour{pollers: p}
	err := tour.await(t.Context(), p.expect(401), action{"revoked", authz.KeyRevoked}, "put /a revoked")
	if want := "put /a revoked: no 401 through Envoy within 5s; the last answer was: 503"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestSpread(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(100-i))
	}
	for _, tt := range []struct {
		of   []time.Duration
		want Spread
	}{
		{nil, Spread{}},
		{[]time.Duration{7}, Spread{7, 7, 7}},
		{[]time.Duration{3, -1, 2}, Spread{2, 3, 3}},
		{hundred, Spread{50, 99, 100}},
	} {
		if got := spread(tt.of); got != tt.want {
			t.Errorf("got %v, want %v", got, tt.want)
		}
	}
	b, err := json.Marshal(Spread{-1500 * time.Microsecond, 2 * time.Millisecond, 3})
	if want := `{"medianMs":-1.500,"p99Ms":2.000,"maxMs":0.000}`; err != nil || string(b) != want {
		t.Errorf("got %s, %v, want %s", b, err, want)
	}
}

func TestGoal(t *testing.T) {
	for _, tt := range []struct {
		answer, event time.Duration
		met           bool
	}{{2500, 1000, true}, {2501, 1000, false}, {1000, 0, true}, {1001, 0, false}} {
		calm := []time.Duration{1000}
		tour := &tour{pollers: &pollers{calm: calm}, refusals: times{sentToAnswer: []time.Duration{tt.answer}, sentToEvent: []time.Duration{tt.event}}}
		if got := tour.sum(); got.Met != tt.met {
			t.Errorf("%v after %v: got met %t at a goal of %v, want %t", tt.answer, tt.event, got.Met, time.Duration(got.Goal), tt.met)
		}
	}
}

func TestReachable(t *testing.T) {
	for in, want := range map[string]string{
		"127.0.0.1:9000": "127.0.0.1:9000", "[::]:9000": "127.0.0.1:9000", "0.0.0.0:1": "127.0.0.1:1", "unix:///a/b": "unix:///a/b", "[::1]:1": "[::1]:1",
	} {
		if got := reachable(in); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}
