package faults

import (
	"strings"
	"testing"
	"time"

	"keygate/authz"
)

// S of the histories below; times in them are milliseconds.
const testBudget = 3 * time.Second

func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

// story is a history that is made by hand. Key 0 has the flags /key, /app,
// /developer and /product, all opened at revision 1.
type story struct{ h History }

func newStory() *story {
	s := &story{}
	for l := range numLevels {
		s.h.Writes = append(s.h.Writes, Write{Path: "/" + l.String(), Level: l, Keys: []int{0}, Value: opening(l), Outcome: Acked, Revision: 1})
	}
	return s
}

func (s *story) write(start, end int, l Level, value string, revision int64) *Write {
	w := Write{Start: ms(start), End: ms(end), Path: "/" + l.String(), Level: l, Keys: []int{0}, Value: value, Outcome: Acked, Revision: revision}
	if value == Absent {
		w.Value, w.Deleted = "", true
	}
	s.h.Writes = append(s.h.Writes, w)
	return &s.h.Writes[len(s.h.Writes)-1]
}

func (s *story) check(start, end int, r authz.Reason) { s.checkOn(0, start, end, r) }

func (s *story) checkOn(replica, start, end int, r authz.Reason) {
	s.h.Checks = append(s.h.Checks, Check{Start: ms(start), End: ms(end), Replica: int32(replica), Key: 0, Reason: r})
}

func (s *story) mark(at int, kind Kind, replica int) {
	s.h.Marks = append(s.h.Marks, Mark{At: ms(at), Kind: kind, Replica: replica})
}

func (s *story) poll(start int, ready bool) {
	s.h.Polls = append(s.h.Polls, Poll{Start: ms(start), End: ms(start + 1), Replica: 0, Ready: ready})
}

// final says what stands in etcd at the end, and that nothing else is known.
func (s *story) final(l Level, value string, revision int64) {
	if s.h.Final == nil {
		s.h.Final = map[string]Event{}
		for l := range numLevels {
			path := "/" + l.String()
			s.h.Final[path] = Event{Path: path, Value: opening(l), Revision: 1}
		}
	}
	path := "/" + l.String()
	if value == Absent {
		delete(s.h.Final, path)
		return
	}
	s.h.Final[path] = Event{Path: path, Value: value, Revision: revision}
}

func (s *story) event(l Level, value string, revision int64) {
	e := Event{Path: "/" + l.String(), Value: value, Revision: revision}
	if value == Absent {
		e.Value, e.Deleted = "", true
	}
	s.h.Events, s.h.EventsFrom = append(s.h.Events, e), 1
}

// The proof of the suite's own eye: for each guarantee, histories that break it
// and histories that come close and do not.
func TestVerify(t *testing.T) {
	const revoked = "revoked"
	tests := []struct {
		name string
		tell func(*story)
		want string // guarantees that are violated
	}{
		{"nothing happens", func(s *story) { s.check(10, 11, authz.Allowed) }, ""},
		{"an answer before a write that found its work done at another's revision", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(120, 121, authz.AppRevoked)
			s.write(130, 140, LevelApp, revoked, 2).Already = true
			s.write(150, 160, LevelApp, "approved", 3)
			s.check(170, 171, authz.Allowed)
		}, ""},

		// A new key is known within S, and then for good.
		{"a new key that is not known yet", func(s *story) {
			s.check(2, 3, authz.KeyUnknown)
			s.check(4, 5, authz.Allowed)
		}, ""},
		{"a new key that is not known after S", func(s *story) { s.check(3001, 3002, authz.KeyUnknown) }, "G8"},
		{"a key that was known and is not", func(s *story) {
			s.check(2, 3, authz.Allowed)
			s.check(4, 5, authz.KeyUnknown)
		}, "G8"},
		{"a new key that is revoked, which nobody did", func(s *story) { s.check(2, 3, authz.KeyRevoked) }, "G8"},

		// G1 and G3: a yes that is too late.
		{"a yes within S", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(3109, 3110, authz.Allowed)
		}, ""},
		{"a yes after S", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(3120, 3121, authz.Allowed)
		}, "G1 G8"},
		{"a yes after S, begun in time", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(3100, 9000, authz.Allowed)
		}, ""},
		{"a yes after S, while something is broken", func(s *story) {
			s.mark(50, FaultOn, 0)
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(3120, 3121, authz.Allowed)
			s.mark(4000, FaultOff, 0)
		}, "G3 G8"},
		{"a yes after S, when what was broken is long mended", func(s *story) {
			s.mark(50, FaultOn, 0)
			s.mark(60, FaultOff, 0)
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(3120, 3121, authz.Allowed)
		}, "G1 G8"},
		{"two faults at once: the first to end ends nothing", func(s *story) {
			s.mark(50, FaultOn, Everyone)
			s.mark(60, FaultOn, Everyone)
			s.mark(70, FaultOff, Everyone)
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(3120, 3121, authz.Allowed)
		}, "G3 G8"},
		{"approved again", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(3000, 3010, LevelApp, "approved", 3)
			s.check(3120, 3121, authz.Allowed)
		}, ""},
		{"an approval that has only begun", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(3120, 3999, LevelApp, "approved", 3)
			s.check(3119, 3121, authz.Allowed)
		}, ""},
		{"an approval that begins after the answer", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(3122, 3130, LevelApp, "approved", 3)
			s.check(3120, 3121, authz.Allowed)
		}, "G1 G8"},
		{"an approval of an older revision that was told late", func(s *story) {
			s.write(90, 3000, LevelApp, "approved", 2)
			s.write(100, 110, LevelApp, revoked, 3)
			s.check(3120, 3121, authz.Allowed)
		}, "G1 G8"},
		{"an approval at another level", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(200, 210, LevelKey, "approved", 3)
			s.check(3220, 3221, authz.Allowed)
		}, "G1 G8"},
		{"an approval of unknown outcome explains it", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			w := s.write(200, 210, LevelApp, "approved", 0)
			w.Outcome = Unknown
			s.check(3220, 3221, authz.Allowed)
		}, ""},
		{"an approval of unknown outcome that etcd does not know of", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			w := s.write(200, 210, LevelApp, "approved", 0)
			w.Outcome = Unknown
			s.event(LevelApp, revoked, 2)
			s.check(3220, 3221, authz.Allowed)
		}, "G1 G8"},
		{"a revocation of unknown outcome binds nobody", func(s *story) {
			w := s.write(100, 110, LevelApp, revoked, 0)
			w.Outcome = Unknown
			s.check(3220, 3221, authz.Allowed)
		}, ""},
		{"a revocation that failed binds nobody", func(s *story) {
			w := s.write(100, 110, LevelApp, revoked, 0)
			w.Outcome = Failed
			s.check(3220, 3221, authz.Allowed)
		}, ""},
		{"a deletion closes", func(s *story) {
			s.write(100, 110, LevelDeveloper, Absent, 2)
			s.check(3120, 3121, authz.Allowed)
		}, "G1 G8"},
		{"an answer through Envoy counts", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.checkOn(Everyone, 3120, 3121, authz.Allowed)
		}, "G1"},

		// G3: cut off.
		{"cut off for less than S", func(s *story) {
			s.mark(100, CutOff, 0)
			s.check(3099, 3100, authz.Allowed)
			s.mark(3101, Healed, 0)
		}, ""},
		{"cut off for longer than S", func(s *story) {
			s.mark(100, CutOff, 0)
			s.check(3101, 3102, authz.Allowed)
			s.mark(3103, Healed, 0)
		}, "G3"},
		{"cut off for longer than S, and refusing", func(s *story) {
			s.mark(100, CutOff, 0)
			s.check(3101, 3102, authz.Stale)
			s.mark(3103, Healed, 0)
		}, ""},
		{"another one is cut off", func(s *story) {
			s.mark(100, CutOff, 1)
			s.check(3101, 3102, authz.Allowed)
			s.mark(3103, Healed, 1)
		}, ""},
		{"healed before the answer", func(s *story) {
			s.mark(100, CutOff, 0)
			s.check(3101, 3104, authz.Allowed)
			s.mark(3103, Healed, 0)
		}, ""},

		// G2: a yes after a receipt.
		{"a yes before the receipt", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2).Receipt = &Receipt{End: ms(120), Total: 1, Applied: 1}
			s.check(119, 125, authz.Allowed)
		}, ""},
		{"a yes after the receipt", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2).Receipt = &Receipt{End: ms(120), Total: 1, Applied: 1}
			s.check(121, 125, authz.Allowed)
		}, "G2 G8"},
		{"a yes after the receipt, on a replica outside of it", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2).Receipt = &Receipt{End: ms(120), Total: 1, Applied: 1}
			s.checkOn(outsider, 121, 125, authz.Allowed)
		}, ""},
		{"a yes after the receipt and a new approval", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2).Receipt = &Receipt{End: ms(120), Total: 1, Applied: 1}
			s.write(130, 140, LevelKey, "approved", 3)
			s.check(131, 132, authz.Allowed)
		}, ""},

		// G4: what was acknowledged is there.
		{"all there", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2)
			s.final(LevelKey, revoked, 2)
			s.event(LevelKey, revoked, 2)
		}, ""},
		{"the last write is lost", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2)
			s.final(LevelKey, "approved", 1)
		}, "G4"},
		{"the flag is lost", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2)
			s.final(LevelKey, Absent, 0)
		}, "G4"},
		{"a deletion is lost", func(s *story) {
			s.write(100, 110, LevelKey, Absent, 2)
			s.final(LevelKey, "approved", 1)
		}, "G4"},
		{"a deletion is there", func(s *story) {
			s.write(100, 110, LevelKey, Absent, 2)
			s.final(LevelKey, Absent, 0)
		}, ""},
		{"the right value, by an older write", func(s *story) {
			s.write(50, 60, LevelKey, revoked, 2)
			s.write(70, 80, LevelKey, "approved", 3)
			s.write(100, 110, LevelKey, revoked, 4)
			s.final(LevelKey, revoked, 2)
		}, "G4"},
		{"a write of unknown outcome stands there", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2)
			s.write(120, 130, LevelKey, "approved", 0).Outcome = Unknown
			s.final(LevelKey, "approved", 3)
		}, ""},
		{"a write of unknown outcome does not stand there", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2)
			s.write(120, 130, LevelKey, "approved", 0).Outcome = Unknown
			s.final(LevelKey, revoked, 2)
		}, ""},
		{"a write in the middle is lost, and nothing of it shows at the end", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 2)
			s.write(120, 130, LevelKey, "approved", 3)
			s.event(LevelKey, "approved", 3)
			s.final(LevelKey, "approved", 3)
		}, "G4"},
		{"a flag that was so already is not written again", func(s *story) {
			w := s.write(100, 110, LevelKey, "approved", 2)
			w.Already, w.Managed = true, true
			s.final(LevelKey, "approved", 1)
			s.event(LevelApp, "approved", 3)
		}, ""},
		{"the ledger's second transaction", func(s *story) {
			s.write(100, 110, LevelKey, revoked, 5).Managed = true
			s.event(LevelKey, revoked, 2)
			s.final(LevelKey, revoked, 2)
		}, ""},

		// G5: a revocation that undoes itself, within S of it.
		{"refused, then allowed", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(120, 121, authz.AppRevoked)
			s.check(130, 131, authz.Allowed)
		}, "G5 G8"},
		{"refused, then allowed by another replica", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.checkOn(0, 120, 121, authz.AppRevoked)
			s.checkOn(1, 130, 131, authz.Allowed)
		}, ""},
		{"refused and allowed at the same time", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(120, 131, authz.AppRevoked)
			s.check(130, 132, authz.Allowed)
		}, ""},
		{"refused, approved, allowed", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(120, 121, authz.AppRevoked)
			s.write(122, 140, LevelApp, "approved", 3)
			s.check(130, 131, authz.Allowed)
		}, ""},
		{"refused, with 503 between, then allowed", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(120, 121, authz.AppRevoked)
			s.check(122, 123, authz.Stale)
			s.check(130, 131, authz.Allowed)
		}, "G5 G8"},
		{"503, then allowed", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(122, 123, authz.Stale)
			s.check(130, 131, authz.Allowed)
		}, ""},
		{"back behind an approval that it has answered on", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(120, 130, LevelApp, "approved", 3)
			s.write(140, 150, LevelKey, revoked, 4)
			s.check(160, 161, authz.KeyRevoked)
			s.check(170, 171, authz.AppRevoked)
		}, "G8"},
		{"forward over two changes", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(120, 130, LevelApp, "approved", 3)
			s.write(140, 150, LevelKey, revoked, 4)
			s.check(155, 156, authz.AppRevoked)
			s.check(160, 161, authz.Allowed)
			s.check(170, 171, authz.KeyRevoked)
		}, ""},

		// G6: a yes before readiness.
		{"a yes before it is ready", func(s *story) {
			s.mark(10, Started, 0)
			s.poll(20, false)
			s.check(25, 26, authz.Allowed)
			s.poll(30, false)
			s.poll(40, true)
		}, "G6"},
		{"a yes between the last look and readiness", func(s *story) {
			s.mark(10, Started, 0)
			s.poll(20, false)
			s.check(25, 26, authz.Allowed)
			s.poll(40, true)
		}, ""},
		{"a 503 before it is ready", func(s *story) {
			s.mark(10, Started, 0)
			s.check(25, 26, authz.Stale)
			s.poll(30, false)
			s.poll(40, true)
		}, ""},
		{"not ready later on, which is S's affair", func(s *story) {
			s.mark(10, Started, 0)
			s.poll(40, true)
			s.check(50, 51, authz.Allowed)
			s.poll(60, false)
		}, ""},
		{"a yes in the second life before it is ready", func(s *story) {
			s.mark(10, Started, 0)
			s.poll(20, true)
			s.mark(50, Ended, 0)
			s.mark(60, Started, 0)
			s.check(70, 71, authz.Allowed)
			s.poll(80, false)
			s.poll(90, true)
		}, "G6"},

		// G7: values that are no words.
		{"a misspelt word opens", func(s *story) {
			s.write(100, 110, LevelProduct, "aproved", 2)
			s.check(3120, 3121, authz.Allowed)
		}, "G7 G8"},
		{"a word with a newline opens", func(s *story) {
			s.write(100, 110, LevelKey, "approved\n", 2)
			s.check(3120, 3121, authz.Allowed)
		}, "G7 G8"},
		{"another level's word opens", func(s *story) {
			s.write(100, 110, LevelDeveloper, "approved", 2)
			s.check(3120, 3121, authz.Allowed)
		}, "G7 G8"},
		{"a misspelt word refuses", func(s *story) {
			s.write(100, 110, LevelProduct, "aproved", 2)
			s.check(3120, 3121, authz.RecordUnreadable)
		}, ""},

		// G8: one order, and an approval no slower than a revocation.
		{"a refusal that nothing explains", func(s *story) { s.check(10, 11, authz.KeyRevoked) }, "G8"},
		{"a refusal for another level than the one that is closed", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.check(120, 121, authz.KeyRevoked)
		}, "G8"},
		{"a refusal within S after an approval", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(120, 130, LevelApp, "approved", 3)
			s.check(3129, 3130, authz.AppRevoked)
		}, ""},
		{"a refusal later than S after an approval", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(120, 130, LevelApp, "approved", 3)
			s.check(3140, 3141, authz.AppRevoked)
		}, "G8"},
		{"a refusal after the receipt of an approval", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.write(120, 130, LevelApp, "approved", 3).Receipt = &Receipt{End: ms(140), Total: 1, Applied: 1}
			s.check(150, 151, authz.AppRevoked)
		}, "G8"},
		{"a linearizable read of an older value", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.h.Reads = append(s.h.Reads, Read{Start: ms(120), End: ms(121), Path: "/app", Value: "approved", Revision: 1})
		}, "G8"},
		{"a linearizable read during the write", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 2)
			s.h.Reads = append(s.h.Reads, Read{Start: ms(105), End: ms(121), Path: "/app", Value: "approved", Revision: 1})
		}, ""},
		{"a linearizable read of a deletion", func(s *story) {
			s.write(100, 110, LevelApp, Absent, 2)
			s.h.Reads = append(s.h.Reads, Read{Start: ms(120), End: ms(121), Path: "/app", Absent: true})
		}, ""},
		{"a write of unknown outcome that took place", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 0).Outcome = Unknown
			s.h.Reads = append(s.h.Reads,
				Read{Start: ms(120), End: ms(121), Path: "/app", Value: "approved", Revision: 1},
				Read{Start: ms(130), End: ms(131), Path: "/app", Value: revoked, Revision: 2})
		}, ""},
		{"a write of unknown outcome that another found done, at its revision", func(s *story) {
			s.write(100, 110, LevelApp, revoked, 0).Outcome = Unknown
			s.write(130, 140, LevelApp, revoked, 2).Already = true
			s.event(LevelApp, revoked, 2)
			s.h.Reads = append(s.h.Reads, Read{Start: ms(120), End: ms(121), Path: "/app", Value: revoked, Revision: 2})
		}, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newStory()
			test.tell(s)
			found := Verify(&s.h, Rules{S: testBudget, Outside: []int{outsider}})
			var got []string
			for _, g := range Guarantees {
				for _, v := range found {
					if v.Guarantee == g.Name {
						got = append(got, string(g.Name))
						break
					}
				}
			}
			if strings.Join(got, " ") != test.want {
				t.Errorf("got violations of %q, want %q", strings.Join(got, " "), test.want)
				for _, v := range found {
					t.Log(s.h.Show(v))
				}
			}
		})
	}
}

// outsider is a replica that does not register.
const outsider = 7

// A violation shows what led to it, and no more than that.
func TestShow(t *testing.T) {
	s := newStory()
	s.mark(50, FaultOn, 0)
	s.write(100, 110, LevelApp, "revoked", 2)
	for i := range 1000 {
		s.check(200+i, 200+i, authz.Allowed)
	}
	s.check(3120, 3121, authz.Allowed)
	found := Verify(&s.h, Rules{S: testBudget})
	if len(found) == 0 {
		t.Fatal("got no violation")
	}
	got := s.h.Show(found[len(found)-1])
	for _, want := range []string{"G3 violated at 3.12s", `"revoked" at revision 2 on app`, "fault on", `write "revoked" on app, acknowledged at 110ms`, "1000 checks until"} {
		if !strings.Contains(got, want) {
			t.Errorf("got %s, want %q in it", got, want)
		}
	}
	if n := strings.Count(got, "\n"); n > 25 {
		t.Errorf("got %d lines, want 25 at most", n)
	}
}

// A history as long as a run's is verified in seconds.
func TestVerifyLongHistory(t *testing.T) {
	s := newStory()
	for i := range 300 {
		l := Level(i / 2 % int(numLevels))
		value := closing(l)
		if i%2 == 1 {
			value = opening(l)
		}
		s.write(i*1000, i*1000+1, l, value, int64(i+2))
	}
	reasons := map[Level]authz.Reason{LevelKey: authz.KeyRevoked, LevelApp: authz.AppRevoked, LevelDeveloper: authz.DeveloperInactive, LevelProduct: authz.ProductRevoked}
	const checks = 300_000
	for i := range checks {
		r := authz.Allowed
		if n := (i - 1) / 1000; i >= 2 && n%2 == 0 {
			r = reasons[Level(n/2%int(numLevels))]
		}
		if i%1000 < 3 {
			continue // around a change
		}
		s.checkOn(i%3, i, i, r)
	}
	began := time.Now()
	found := Verify(&s.h, Rules{S: testBudget})
	t.Logf("%d checks in %v", len(s.h.Checks), time.Since(began))
	if len(found) > 0 {
		t.Errorf("got %d violations, want none: %s", len(found), s.h.Show(found[0]))
	}
}
