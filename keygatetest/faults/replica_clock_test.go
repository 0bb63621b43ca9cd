package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"keygate/authz"
	"keygate/keygatetest"
	"keygate/keygatetest/variant"
)

// clockVariable names the file that holds by how much the wall clock of a
// variant is wrong.
const clockVariable = "FAULTS_CLOCK"

// The wall clock of the replicas jumps by hours and days, and slews. Keys that
// expire follow it, and one that was seen expired stays so; nothing else does.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "clock jumps", Faults: "wall clock set by -1 day to +1 day, and slewed, under keys that expire",
		Guarantees: []Guarantee{G1, G5, G8},
		Options: Options{Keys: 24, Replicas: 2, Mutations: []variant.Mutation{{
			File: "server/server.go", Old: "cfg.Now = time.Now\n",
			New: `cfg.Now = func() time.Time {
			text, _ := os.ReadFile(os.Getenv("` + clockVariable + `"))
			wrong, _ := time.ParseDuration(string(text))
			return time.Now().Add(wrong)
		}
`,
		}}},
		Run: clockJumps,
		Guards: []Guard{
			{
				Name: "the memory of what has been seen expired", Guarantee: G5,
				Mutations: []variant.Mutation{{File: "authz/ladder.go", Old: "case expired.has(id, c):", New: "case expired == nil:"}},
			},
		},
	})
}

func clockJumps(w *World) {
	file := filepath.Join(w.T.TempDir(), "clock")
	now := time.Duration(0)
	set := func(wrong time.Duration) {
		// At once, not half of it.
		if err := os.WriteFile(file+".new", []byte(wrong.String()), 0o600); err != nil {
			w.T.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			w.T.Fatal(err)
		}
		w.Note("the wall clock is wrong by %v, before by %v", wrong, now)
		now = wrong
	}
	set(0)
	for _, r := range w.Replicas {
		r.Env = append(r.Env, clockVariable+"="+file)
		r.Restart()
	}
	w.Checks(200)
	w.Changes(30)
	expect := func(g Guarantee, x *extra, want authz.Reason, when string) {
		for i := range w.Replicas {
			got := x.ask(i)
			w.Expect(g, got == want, "replica %d answers %v for a key that %s; want %v", i, got, when, want)
		}
	}
	jumps := 0
	for n := range w.Rounds(1, 12) {
		in := func(d time.Duration) int64 { return time.Now().Add(d).UnixMilli() }
		key := func(what string, expires int64) *extra {
			return w.extra(keygatetest.Key{Key: fmt.Sprintf("clock-%04d-%s-00000000", n, what), ExpiresAt: expires})
		}
		never, seen, unseen, other := key("never", 0), key("seen", in(time.Hour)), key("unseen", in(time.Hour)), key("revoked", 0)
		for _, x := range []*extra{never, seen, unseen, other} {
			expect(G8, x, authz.Allowed, "has not expired")
		}
		for _, jump := range []time.Duration{24 * time.Hour, 2 * time.Hour} {
			set(jump)
			jumps++
			expect(G7, seen, authz.KeyExpired, "has expired by a clock that was set ahead")
			expect(G8, never, authz.Allowed, "never expires")
			w.Wait(200 * time.Millisecond)
			expect(G8, never, authz.Allowed, "never expires")
		}
		backward, _ := w.Replicas[0].Metric("keygate_clock_backward_jumps_total")
		for i, back := range []time.Duration{0, -10 * time.Minute, -time.Hour, -24 * time.Hour} {
			set(back)
			jumps++
			if i == 1 {
				w.Applied(other.put(w.Space.Status(other.given.Record(w.T)), "revoked"))
			}
			if i > 0 {
				expect(G5, other, authz.KeyRevoked, "is revoked")
			}
			expect(G5, seen, authz.KeyExpired, "has been seen expired before the clock went back")
			expect(G8, unseen, authz.Allowed, "has not been seen expired and has not")
			w.Wait(150 * time.Millisecond)
			expect(G8, never, authz.Allowed, "never expires")
		}
		w.Eventually(G5, 2*time.Second, "the jumps back to be counted", func() bool {
			after, _ := w.Replicas[0].Metric("keygate_clock_backward_jumps_total")
			return after >= backward+3
		})
		// Slewed, back to what is right: no jump.
		before, _ := w.Replicas[0].Metric("keygate_clock_backward_jumps_total")
		set(0)
		for range 10 {
			set(now - 20*time.Millisecond)
			w.Wait(60 * time.Millisecond)
		}
		set(0)
		slewed, _ := w.Replicas[0].Metric("keygate_clock_backward_jumps_total")
		w.Expect(G5, slewed == before, "a clock that is slewed is counted as %.0f jumps", slewed-before)
		w.Applied(seen.put(seen.credential, seen.value(seen.credential)))
		expect(G8, seen, authz.Allowed, "has been written again")
		for i, r := range w.Replicas {
			code, _, _ := r.Ask("/readyz")
			w.Expect(G8, code == 200, "replica %d is not ready: freshness follows the wall clock", i)
		}
	}
	w.Figure(G5, "clock jumps", "%d, of up to a day; what was seen expired stayed so, what had not expired was allowed", jumps)
}
