package faults

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"keygate/authz"
	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
)

// The leader of three members is killed. Nothing can be written until there is
// another, and no check is refused for it while that takes less than S.
func TestLeaderKilled(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "leader killed", Faults: "kill -9 of the leader of three members",
		Guarantees: []Guarantee{G2, G3, G4, G5},
		Options:    Options{Members: 3, S: 5 * time.Second, Keys: 16, WriteTimeout: 5 * time.Second},
		Run:        leaderKilled,
		Guards: []Guard{{
			Name: "the smallest staleness budget, which outlasts an election", Guarantee: G3,
			Mutations: []variant.Mutation{{File: "statestore/keyspace/replica.go", Old: "MinStalenessBudget = 3 * time.Second", New: "MinStalenessBudget = time.Second"}},
			Options:   func(o *Options) { o.S = time.Second },
		}},
	})
}

// longestElection of members that have the CPU they need; 2.1 s have been seen.
const longestElection = 2500 * time.Millisecond

func leaderKilled(w *World) {
	// A record that a replica has not read yet, or that has changed too often since,
	// it cannot read in an election: what must go on is counted on keys that nobody
	// changes.
	still := all(w, 8, len(w.Keys))
	w.know(w.all(nil))
	w.Checks(600)
	w.ChangesWithReceipts(5, all(w, 0, 8)...)
	var outage Times
	rounds, refused, changing := w.Rounds(2, 20), 0, 0
	for range rounds {
		leader := w.Cluster.Leader(w.T)
		began := w.Rec.Now()
		over := w.Fault(Everyone, "member %d, the leader, is killed", leader)
		w.Cluster.Member(leader).Kill()
		// No flag, so no part of the history. What is sent to a member that knows no
		// leader is lost, and its writer waits in vain: many short ones.
		w.Until("a write to be acknowledged", func() bool {
			ctx, cancel := context.WithTimeout(w.T.Context(), 100*time.Millisecond)
			defer cancel()
			_, err := w.Client.Put(ctx, "/outage", "")
			return err == nil
		})
		took := w.Rec.Now() - began
		outage.Add(took)
		w.Until("a proof of each replica since", func() bool {
			return !slices.ContainsFunc(w.Replicas, func(r *Replica) bool { return !w.Allowed(r.Index, 9) || proofAge(r) > time.Second })
		})
		w.Cluster.Member(leader).Restart()
		over()
		w.Wait(time.Second)
		changing += len(w.unanswered(began, all(w, 0, 8)))
		if took > longestElection {
			w.Note("an election of %v is no measure of anything", took)
			continue
		}
		refused += w.expectAnswers(began, still, "an election of %v, S is %v", round(took), w.Options.S)
	}
	var receipts Times
	for _, one := range w.Rec.History().Writes {
		if one.Receipt != nil {
			receipts.Add(one.Receipt.End - one.End)
		}
	}
	w.Figure(G2, "leader killed: receipt after the acknowledgement", "%v", &receipts)
	w.Figure(G3, "leader killed: no write for", "%v", &outage)
	w.Figure(G3, "leader killed: checks refused for it", "%d in %d elections (S = %v); and %d of keys whose records had changed and were to be read again", refused, rounds, w.Options.S, changing)
}

// proofAge of a replica, as it says; very long if there is none.
func proofAge(r *Replica) time.Duration {
	age, ok := r.Metric("keygate_proof_age_seconds")
	if !ok || age < 0 {
		return time.Hour
	}
	return time.Duration(age * float64(time.Second))
}

// know makes each replica read the records of keys that are open, and keep them.
func (w *World) know(keys []int) {
	w.T.Helper()
	for i, r := range w.Replicas {
		loads := -1.0
		w.Until("the replica to know the keys", func() bool {
			for _, k := range keys {
				if !w.Allowed(i, k) {
					return false
				}
			}
			before := loads
			loads, _ = r.Metric("keygate_loads_total")
			return loads == before // a cache may have dropped what it was given
		})
	}
}

// unanswered are the checks of some keys that were answered 503 since then.
func (w *World) unanswered(began time.Duration, keys []int) (all []Check) {
	for _, c := range w.Rec.History().Checks {
		if c.Start >= began && slices.Contains(keys, int(c.Key)) && !c.Failed && !c.decided() {
			all = append(all, c)
		}
	}
	return all
}

// expectAnswers expects that there are none, and counts them.
func (w *World) expectAnswers(began time.Duration, keys []int, format string, args ...any) int {
	all := w.unanswered(began, keys)
	if len(all) > 0 {
		first := all[0]
		w.Expect(G3, false, "%s: %d checks were refused with 503, the first on replica %d for key %d, %v from the beginning (%v)",
			fmt.Sprintf(format, args...), len(all), first.Replica, first.Key, round(first.Start-began), first.Reason)
	}
	return len(all)
}

// A member is frozen: its connections stay open, and it answers nothing. The
// watch of a replica is on it.
func TestMemberFrozen(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "member frozen", Faults: "one of three members stopped (SIGSTOP), with a replica's watch on it",
		Guarantees: []Guarantee{G2, G3, G5},
		Options:    Options{Members: 3, Keys: 12},
		Run:        memberFrozen,
		Guards: []Guard{{
			Name: "the replacement of a silent watch", Guarantee: G3,
			Mutations: []variant.Mutation{{File: "statestore/probe.go", Old: "\t\tif silent {\n", New: "\t\tif silent && s.interval == 0 {\n"}},
		}},
	})
}

func memberFrozen(w *World) {
	w.know(w.all(nil))
	w.Checks(300)
	w.ChangesWithReceipts(5, all(w, 0, 4)...)
	var without Times
	rounds := w.Rounds(1, 4)
	for range rounds {
		member := 0
		w.Until("a watch of the first replica", func() bool {
			member = slices.IndexFunc(w.Replicas[0].Links, func(l *etcdtest.Proxy) bool { return l.Count(etcdtest.WatchLinks) > 0 })
			return member >= 0
		})
		began := w.Rec.Now()
		over := w.Fault(Everyone, "member %d is frozen", member)
		w.Cluster.Member(member).Stop()
		w.Wait(w.Options.S)
		// Whoever has a proof now has it by another member.
		for i, r := range w.Replicas {
			took, ok := w.Eventually(G3, 3*w.Options.S, fmt.Sprintf("replica %d to have a proof by another member", i), func() bool {
				return w.Allowed(i, 11) && proofAge(r) < w.Rec.Now()-began
			})
			if ok {
				without.Add(took)
			}
		}
		w.Cluster.Member(member).Cont()
		over()
		w.Wait(w.For(time.Second/2, 3*time.Second))
	}
	w.Figure(G3, "member frozen: without an answer, after S", "%v", &without)
}

// Two of three members are gone, and every replica is bound to the third, which
// answers: reads that need no leader, and its watches.
func TestQuorumLost(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Name: "quorum lost", Faults: "two of three members killed, replicas bound to the third",
		Guarantees: []Guarantee{G3, G5},
		Options:    Options{Members: 3, Keys: 4},
		Run:        quorumLost,
		Guards: []Guard{{
			Name: "a linearizable read in each proof", Guarantee: G3,
			Mutations: []variant.Mutation{{
				File: "statestore/etcd.go",
				Old:  "return b.read(ctx, prefixes, clientv3.WithPrefix())",
				New:  "return b.ReadLocal(ctx, prefixes...)",
			}},
		}},
	})
}

func quorumLost(w *World) {
	w.Checks(200)
	const bound = 2
	for _, r := range w.Replicas {
		for i, l := range r.Links {
			if i != bound {
				l.Refuse()
				l.Cut()
			}
		}
	}
	w.Until("a proof of each replica, by the third member", func() bool {
		return !slices.ContainsFunc(w.Replicas, func(r *Replica) bool { return !w.Allowed(r.Index, 0) || proofAge(r) > w.Options.S/5 })
	})
	over := w.Fault(Everyone, "two of three members are killed")
	for i := range bound {
		w.Cluster.Member(i).Kill()
	}
	began := w.Rec.Now()
	for _, r := range w.Replicas {
		w.Rec.Mark(CutOff, r.Index, "no quorum")
	}
	firsts := make([]time.Duration, len(w.Replicas))
	for end := began + w.Options.S + w.For(1500*time.Millisecond, 12*time.Second); w.Rec.Now() < end; w.Wait(2 * time.Millisecond) {
		for i := range w.Replicas {
			if c := w.Check(i, 0); firsts[i] == 0 && c.Reason == authz.Stale {
				firsts[i] = c.Start - began
			}
		}
	}
	var first Times
	for i, at := range firsts {
		w.Expect(G3, at > 0, "replica %d never refused after the quorum was lost", i)
		first.Add(at)
	}
	for _, r := range w.Replicas {
		w.Rec.Mark(Healed, r.Index, "")
	}
	for i := range bound {
		w.Cluster.Member(i).StartAgain()
	}
	for i := range bound {
		w.Cluster.Member(i).WaitReady()
	}
	over()
	took, _ := w.Eventually(G3, 10*time.Second, "the replicas to answer again", func() bool {
		return !slices.ContainsFunc(w.Replicas, func(r *Replica) bool { return !w.Allowed(r.Index, 0) })
	})
	w.Figure(G3, "quorum lost: first refusal after", "%v (S = %v)", &first, w.Options.S)
	w.Figure(G3, "quorum lost: answers again after its return", "%s", milliseconds(took))
}
