package faults

import (
	"cmp"
	"context"
	crand "crypto/rand"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/keygatetest/etcdtest"
)

// soak is a world under load for as long as one likes, in which a random fault
// happens from time to time. The history is verified after each fault and then
// forgotten, so that its size is that of one.
//
// A run begins and ends with a quiet part, of the same load and without faults:
// what a replica has more of at the end than at the beginning, it has leaked.
//
// The first replica is never restarted: what grows slowly needs a long life.
type soak struct {
	w *World
	// lasts altogether, a fault every so often. seed repeats the faults, in their
	// order, of the same sort and length; it cannot repeat what the machine does.
	lasts, every time.Duration
	seed         uint64

	began   time.Duration // by the recorder
	rng     *rand.Rand    // of the faults
	deck    []mishap      // those not drawn yet
	etcdPid atomic.Int64
	usage   *usage
	scanned []int // of each replica's log, in bytes

	// What came of it.
	total    Row
	faults   []happened
	quiet    [2]span
	problems []string // what is wrong besides violations
	shown    []string // violations, the first few with what happened around them
}

// happened is one fault that did.
type happened struct {
	from, to time.Duration
	name     string
	says     string
	// back is from its end until every replica was ready.
	back        time.Duration
	unavailable int // checks answered 503, from here to the next
	failed      int // and not answered
	violations  int
}

// Load of a soak. Keys of the second kind of changes are the last ones.
const (
	soakKeys         = 48
	soakReceiptKeys  = 16
	soakChecks       = 300 // a second
	soakChanges      = 10
	soakReceipts     = 4
	soakJunk         = 1500
	soakJunkWorkers  = 12
	soakShownAtMost  = 5
	soakQuietAtMost  = time.Minute
	soakQuietPart    = 10 // of the whole, for each of the two
	soakSampledTimes = 400
)

// newSoak of a world whose replicas are ready.
func newSoak(w *World, lasts, every time.Duration, seed uint64) *soak {
	s := &soak{w: w, lasts: lasts, every: every, seed: seed, rng: rand.New(rand.NewPCG(seed, 0)), scanned: make([]int, len(w.Replicas))}
	s.total.Violations = map[Guarantee]int{}
	s.etcdPid.Store(int64(w.Store.Pid()))
	return s
}

// soakOptions of a world for it.
func soakOptions(race bool) Options { return Options{Keys: soakKeys, Race: race} }

// run it. What came of it stands in s; it does not fail the test.
func (s *soak) run() {
	w := s.w
	s.began = w.Rec.Now()
	s.usage = newUsage(w, s.now, max(s.lasts/soakSampledTimes, 100*time.Millisecond), s.etcdPid.Load)
	quiet := min(s.lasts/soakQuietPart, soakQuietAtMost)
	count := int((s.lasts - 2*quiet) / s.every)
	s.load()
	s.quiet[0] = s.calm(quiet)
	for i := range count {
		w.Wait(quiet + time.Duration(i)*s.every - s.now())
		s.window()
		s.load()
		if w.T.Context().Err() != nil {
			break
		}
		s.fault()
	}
	w.Wait(quiet + time.Duration(count)*s.every - s.now())
	s.window()
	s.load()
	s.quiet[1] = s.calm(quiet)
	s.window()
	s.usage.stop()
	s.problems = append(s.problems, s.usage.leaks(s.quiet)...)
}

func (s *soak) now() time.Duration { return s.w.Rec.Now() - s.began }

func (s *soak) load() {
	w := s.w
	var plain, waiting []int
	for i := range w.Keys {
		if i < len(w.Keys)-soakReceiptKeys {
			plain = append(plain, i)
		} else {
			waiting = append(waiting, i)
		}
	}
	w.Checks(soakChecks)
	w.Changes(soakChanges, plain...)
	w.ChangesWithReceipts(soakReceipts, waiting...)
}

// calm lets time pass and returns which.
func (s *soak) calm(d time.Duration) span {
	from := s.now()
	s.w.Wait(d)
	return span{from: from, to: s.now()}
}

// window ends one part of the history, holds it against the guarantees and
// begins another: all keys are open again and every replica knows it. No load
// runs when it returns.
func (s *soak) window() {
	w := s.w
	s.running()
	h := w.finish()
	found := append(Verify(h, Rules{S: w.Options.S}), w.violations()...)
	w.state.Lock()
	w.state.found, w.state.loads = nil, nil
	w.state.Unlock()
	row := newRow(Scenario{}, w, h, found, 0)
	s.total.Checks += row.Checks
	s.total.Allowed += row.Allowed
	s.total.Unavailable += row.Unavailable
	s.total.Failed += row.Failed
	s.total.Writes += row.Writes - s.flags() // those that opened them
	s.total.Receipts += row.Receipts
	for g, n := range row.Violations {
		s.total.Violations[g] += n
	}
	if n := len(s.faults); n > 0 {
		f := &s.faults[n-1]
		f.violations += len(found)
		f.unavailable += row.Unavailable
		f.failed += row.Failed
	}
	for _, v := range found {
		if len(s.shown) == soakShownAtMost {
			break
		}
		s.shown = append(s.shown, h.Show(v))
	}
	s.scan()
	s.open()
}

// flags of all keys.
func (s *soak) flags() int {
	paths := map[string]bool{}
	for _, k := range s.w.Keys {
		for _, p := range k.Paths {
			paths[p] = true
		}
	}
	return len(paths)
}

// open forgets the history and begins it anew, as newWorld did.
func (s *soak) open() {
	w := s.w
	w.Rec.forget()
	w.main = w.Rec.Stream()
	begin := w.Rec.Now()
	var ops []clientv3.Op
	var writes []*Write
	ctx, cancel := context.WithTimeout(w.T.Context(), patience)
	defer cancel()
	commit := func() {
		r, err := w.Client.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			w.T.Fatalf("open the keys again: %v", err)
		}
		for _, one := range writes {
			one.End, one.Revision = w.Rec.Now(), r.Header.Revision
			w.main.Write(*one)
		}
		w.setup, ops, writes = r.Header.Revision, nil, nil
	}
	for _, k := range w.Keys {
		for l, path := range k.Paths {
			if slices.Min(k.with[l]) != k.Index {
				continue // another key's too, and written with that
			}
			value := opening(Level(l))
			ops = append(ops, clientv3.OpPut(path, value))
			writes = append(writes, &Write{Start: begin, Path: path, Level: Level(l), Keys: k.with[l], Value: value, Outcome: Acked})
		}
		if len(ops)+int(numLevels) > 128 { // etcd's limit
			commit()
		}
	}
	if len(ops) > 0 {
		commit()
	}
	for _, r := range w.Replicas {
		w.Until(fmt.Sprintf("replica %d to have applied that all keys are open", r.Index), func() bool {
			return r.Status().Store.AppliedRevision >= w.setup
		})
	}
}

// forget what was recorded. Streams that were handed out record nothing any
// more. The clock goes on.
func (r *Recorder) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.main.mu.Lock()
	defer r.main.mu.Unlock()
	r.main.h = History{}
	r.streams = []*Stream{r.main}
}

// running looks whether a replica has ended by itself, and starts it again.
func (s *soak) running() {
	for _, r := range s.w.Replicas {
		if !r.Running() {
			s.problem("replica %d ended by itself: %s", r.Index, s.w.without(tail(r.Log(), 2000)))
			r.Restart()
		}
	}
}

// scan reads what the replicas have logged since the last time.
func (s *soak) scan() {
	for i, r := range s.w.Replicas {
		log := r.Log()[s.scanned[i]:]
		log = log[:strings.LastIndexByte(log, '\n')+1] // a line that is not whole is read the next time
		s.scanned[i] += len(log)
		for _, alarm := range alarms(log) {
			s.problem("replica %d: %s", i, s.w.without(alarm))
		}
	}
}

// alarmLines is how much of the log is shown from an alarm on.
const alarmLines = 40

// alarms in a log: what the race detector, the runtime or a panic that was
// caught wrote there, each with the lines after it.
func alarms(log string) (all []string) {
	lines := strings.SplitAfter(log, "\n")
	for i, l := range lines {
		raised := strings.HasPrefix(l, "WARNING: DATA RACE") || strings.HasPrefix(l, "panic: ") || strings.HasPrefix(l, "fatal error: ") ||
			strings.Contains(l, "level=ERROR") && strings.Contains(l, "panic")
		if raised {
			all = append(all, strings.Join(lines[i:min(len(lines), i+alarmLines)], ""))
		}
	}
	return all
}

func (s *soak) problem(format string, args ...any) {
	s.problems = append(s.problems, fmt.Sprintf(format, args...))
	s.w.T.Logf("%v  WRONG: "+format, append([]any{s.now().Round(time.Second)}, args...)...)
}

// red is all that must not be.
func (s *soak) red() []string {
	all := slices.Clone(s.problems)
	for _, f := range s.total.Violations {
		if f > 0 {
			all = append(all, s.shown...)
			break
		}
	}
	return all
}

// --- faults ------------------------------------------------------------------

// mishap is one sort of fault. do breaks something, for about as long as it is
// told, mends it and says what it was.
type mishap struct {
	name string
	do   func(s *soak, lasts time.Duration) string
}

// A fault lasts between these parts of the time to the next.
const (
	soakFaultShortest = 15
	soakFaultLongest  = 2
)

// fault lets one happen. All sorts have had their turn before one comes again.
func (s *soak) fault() {
	w := s.w
	if len(s.deck) == 0 {
		s.deck = mishaps()
		s.rng.Shuffle(len(s.deck), func(i, j int) { s.deck[i], s.deck[j] = s.deck[j], s.deck[i] })
	}
	m := s.deck[0]
	s.deck = s.deck[1:]
	lasts := s.between(s.every/soakFaultShortest, s.every/soakFaultLongest)
	f := happened{from: s.now(), name: m.name}
	f.says = m.do(s, lasts)
	f.to = s.now()
	s.running()
	f.back, _ = w.Eventually(G3, patience, "every replica to be ready after "+m.name, func() bool {
		for _, r := range w.Replicas {
			if code, _, _ := r.Ask("/readyz"); code != http.StatusOK {
				return false
			}
		}
		return true
	})
	s.faults = append(s.faults, f)
	w.T.Logf("%v  %d. %s: %s; %v, and every replica ready %v after it", f.from.Round(100*time.Millisecond), len(s.faults), f.name, f.says,
		(f.to - f.from).Round(100*time.Millisecond), f.back.Round(time.Millisecond))
}

// mishaps are all sorts of faults that can be made here. A disk is made slow by
// strace; without it, that one is left out.
func mishaps() []mishap {
	all := []mishap{
		{"black hole", func(s *soak, lasts time.Duration) string {
			r := s.anyone()
			heal := r.CutOff()
			s.w.Wait(lasts)
			heal()
			return fmt.Sprintf("nothing passes between replica %d and etcd", r.Index)
		}},
		onLink("black hole one way", func(s *soak) (string, func(*etcdtest.Proxy)) {
			return "etcd's answers do not arrive", (*etcdtest.Proxy).FreezeAnswers
		}),
		onLink("silent watch", func(s *soak) (string, func(*etcdtest.Proxy)) {
			return "the watch hears nothing, reads are answered", func(p *etcdtest.Proxy) {
				p.Only(etcdtest.WatchLinks)
				p.Freeze()
			}
		}),
		onLink("refused", func(s *soak) (string, func(*etcdtest.Proxy)) {
			return "connections reset, new ones too", func(p *etcdtest.Proxy) {
				p.Refuse()
				p.Cut()
			}
		}),
		onLink("resets", func(s *soak) (string, func(*etcdtest.Proxy)) {
			share := 0.01 + 0.09*s.rng.Float64()
			return fmt.Sprintf("a connection reset instead of %.0f %% of what passes", 100*share), func(p *etcdtest.Proxy) { p.Reset(share) }
		}),
		onLink("delay", func(s *soak) (string, func(*etcdtest.Proxy)) {
			share := 0.05 + 0.3*s.rng.Float64()
			return fmt.Sprintf("%.0f %% of what passes is up to 500 ms late", 100*share), func(p *etcdtest.Proxy) { p.Delay(share, 0, 500*time.Millisecond) }
		}),
		onLink("drip", func(s *soak) (string, func(*etcdtest.Proxy)) {
			rate := 200 + s.rng.IntN(4000)
			return fmt.Sprintf("%d bytes/s", rate), func(p *etcdtest.Proxy) { p.Drip(rate) }
		}),
		{"cuts", func(s *soak, lasts time.Duration) string {
			over := s.w.Fault(Everyone, "connections cut again and again")
			defer over()
			n := 0
			for end := s.now() + lasts; s.now() < end; n++ {
				for _, r := range s.w.Replicas {
					for _, p := range r.Links {
						p.Cut()
					}
				}
				s.w.Wait(s.between(100*time.Millisecond, 300*time.Millisecond))
			}
			return fmt.Sprintf("all connections of all replicas to etcd reset, %d times", n)
		}},
		{"replica killed", func(s *soak, lasts time.Duration) string {
			r := s.mortal()
			defer s.w.Fault(r.Index, "killed")()
			r.Kill()
			s.w.Wait(lasts / 4)
			r.Start()
			r.WaitReady()
			return fmt.Sprintf("replica %d, kill -9", r.Index)
		}},
		{"replica terminated", func(s *soak, lasts time.Duration) string {
			r := s.mortal()
			defer s.w.Fault(r.Index, "terminated")()
			r.Terminate()
			r.Gone()
			s.w.Wait(lasts / 4)
			r.Start()
			r.WaitReady()
			return fmt.Sprintf("replica %d, SIGTERM", r.Index)
		}},
		{"replica paused", func(s *soak, lasts time.Duration) string {
			r := s.anyone()
			defer s.w.Fault(r.Index, "paused")()
			r.Stop()
			s.w.Wait(lasts)
			r.Cont()
			return fmt.Sprintf("replica %d, SIGSTOP", r.Index)
		}},
		{"etcd killed", func(s *soak, lasts time.Duration) string {
			defer s.w.Fault(Everyone, "etcd killed")()
			s.w.Store.Kill()
			s.w.Wait(lasts)
			s.w.Store.Restart()
			s.etcdPid.Store(int64(s.w.Store.Pid()))
			return "kill -9, and started again"
		}},
		{"etcd frozen", func(s *soak, lasts time.Duration) string {
			defer s.w.Fault(Everyone, "etcd frozen")()
			s.w.Store.Stop()
			s.w.Wait(lasts)
			s.w.Store.Cont()
			return "SIGSTOP"
		}},
		{"compaction", func(s *soak, lasts time.Duration) string {
			r := s.anyone()
			heal := r.CutOff()
			s.w.Wait(lasts)
			s.compact()
			heal()
			return fmt.Sprintf("to the newest revision, while nothing passes between replica %d and etcd", r.Index)
		}},
		{"lease revoked", func(s *soak, lasts time.Duration) string {
			r := s.anyone()
			defer s.w.Fault(r.Index, "lease revoked")()
			says := s.revokeLease(r)
			s.w.Wait(lasts)
			return says
		}},
		{"junk keys", func(s *soak, lasts time.Duration) string {
			defer s.w.Fault(Everyone, "a flood of junk keys")()
			return s.flood(lasts)
		}},
	}
	if canTrace() {
		all = append(all, mishap{"slow disk", func(s *soak, lasts time.Duration) string {
			by := s.between(20*time.Millisecond, 500*time.Millisecond).Round(time.Millisecond)
			defer s.w.Fault(Everyone, "each sync takes longer")()
			end := s.w.Store.Inject(etcdtest.SlowSync(by))
			s.w.Wait(lasts)
			end()
			return fmt.Sprintf("each sync of etcd's takes %v longer", by)
		}})
	}
	return all
}

// canTrace tells whether there is a strace.
func canTrace() bool {
	if os.Getenv("TEST_STRACE") != "" {
		return true
	}
	_, err := exec.LookPath("strace")
	return err == nil
}

// onLink is a fault of what one replica and etcd say to each other.
func onLink(name string, draw func(s *soak) (says string, begin func(*etcdtest.Proxy))) mishap {
	return mishap{name, func(s *soak, lasts time.Duration) string {
		r := s.anyone()
		says, begin := draw(s)
		defer s.w.Fault(r.Index, "%s", name)()
		for _, p := range r.Links {
			begin(p)
		}
		s.w.Wait(lasts)
		for _, p := range r.Links {
			p.Heal()
		}
		return fmt.Sprintf("replica %d: %s", r.Index, says)
	}}
}

func (s *soak) anyone() *Replica { return s.w.Replicas[s.rng.IntN(len(s.w.Replicas))] }

// mortal is a replica that may be restarted: not the first.
func (s *soak) mortal() *Replica { return s.w.Replicas[1+s.rng.IntN(len(s.w.Replicas)-1)] }

func (s *soak) between(least, most time.Duration) time.Duration {
	return least + time.Duration(s.rng.Int64N(int64(max(1, most-least))))
}

func (s *soak) compact() {
	ctx, cancel := context.WithTimeout(s.w.T.Context(), patience)
	defer cancel()
	r, err := s.w.Client.Get(ctx, s.w.Space.Watched())
	if err == nil {
		_, err = s.w.Client.Compact(ctx, r.Header.Revision)
	}
	if err != nil {
		s.problem("compact: %v", err)
	}
}

// revokeLease takes a replica's registration away.
func (s *soak) revokeLease(r *Replica) string {
	ctx, cancel := context.WithTimeout(s.w.T.Context(), patience)
	defer cancel()
	got, err := s.w.Client.Get(ctx, s.w.Space.Replica(r.Status().Store.ReplicaID))
	switch {
	case err != nil:
	case len(got.Kvs) != 1:
		err = fmt.Errorf("replica %d is not registered", r.Index)
	default:
		_, err = s.w.Client.Revoke(ctx, clientv3.LeaseID(got.Kvs[0].Lease))
	}
	if err != nil {
		s.problem("revoke a lease: %v", err)
	}
	return fmt.Sprintf("replica %d loses its registration", r.Index)
}

// flood asks for keys that nobody has. None may be allowed; most are unknown,
// some shed.
func (s *soak) flood(lasts time.Duration) string {
	w := s.w
	ctx, cancel := context.WithTimeout(w.T.Context(), lasts)
	defer cancel()
	var asked, yes atomic.Int64
	var wg sync.WaitGroup
	for i := range soakJunkWorkers {
		client := w.Replicas[i%len(w.Replicas)].client
		wg.Go(func() {
			every(ctx, soakJunk, soakJunkWorkers, i, func() {
				var b [24]byte
				_, _ = crand.Read(b[:]) // it does not fail
				asked.Add(1)
				if resp, err := client.Check(ctx, newCheckRequest(hex.EncodeToString(b[:]))); err == nil {
					if reason, _ := answer(resp); reason == authz.Allowed {
						yes.Add(1)
					}
				}
			})
		})
	}
	wg.Wait()
	w.Expect(G7, yes.Load() == 0, "%d of %d keys that nobody has were allowed", yes.Load(), asked.Load())
	return fmt.Sprintf("%d keys that nobody has", asked.Load())
}

// marks of the faults, for the picture.
func (s *soak) marks() (all []mark) {
	for i, f := range s.faults {
		all = append(all, mark{f.from, f.to, fmt.Sprint(i + 1), f.name + ": " + f.says})
	}
	return all
}

// sorts of faults that happened, and how often.
func (s *soak) sorts() string {
	count := map[string]int{}
	for _, f := range s.faults {
		count[f.name]++
	}
	var all []string
	for name := range count {
		all = append(all, name)
	}
	slices.SortFunc(all, func(a, b string) int { return cmp.Or(count[b]-count[a], strings.Compare(a, b)) })
	for i, name := range all {
		if n := count[name]; n > 1 {
			all[i] = fmt.Sprintf("%s (%d)", name, n)
		}
	}
	return strings.Join(all, ", ")
}
