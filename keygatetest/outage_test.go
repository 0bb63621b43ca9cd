package keygatetest_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keygate/authz"
	"keygate/config"
	"keygate/envoy"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
)

// shortBudget is the smallest staleness budget, for tests that wait it out.
func shortBudget(c *config.Config) { c.StalenessBudget = statestore.MinStalenessBudget }

// An etcd that is gone, in two ways: killed, so that connections are refused,
// and frozen, so that nothing answers. Within the budget known keys go on; after
// it, every answer that needs a record is 503 and says when to try again, those
// that need none stay what they are, and health, readiness and status say why.
// Once etcd is back, so is the replica, within two seconds and by itself.
func TestEtcdOutage(t *testing.T) {
	for _, outage := range []struct {
		name       string
		begin, end func(*etcdtest.Process)
		why        string // in what readiness says
	}{
		{"killed", (*etcdtest.Process).Kill, (*etcdtest.Process).Restart, "no connection to etcd at unix:///"},
		{"frozen", (*etcdtest.Process).Stop, (*etcdtest.Process).Cont, "deadline exceeded"},
	} {
		t.Run(outage.name, func(t *testing.T) {
			t.Parallel()
			etcd := etcdtest.StartProcess(t)
			k := keygatetest.Start(t, keygatetest.Options{
				Envoy: true, Settings: shortBudget, Writer: etcd.Client(t),
				Etcd: statestore.EtcdConfig{Endpoints: []string{etcd.Endpoint()}},
			})
			conn := k.Conn(t)
			const known, revoked, fresh = "key-known-before-the-outage", "key-revoked-before-outage-0", "key-not-cached-at-all-0000"
			k.PutKeys(t, keygatetest.Key{Key: known}, keygatetest.Key{Key: revoked, Status: "revoked"}, keygatetest.Key{Key: fresh})
			get := func(key string) keygatetest.Reply { t.Helper(); return k.Get(t, "/weather", header(key)) }
			wantReply(t, get(known), authz.Allowed)
			wantReply(t, get(revoked), authz.KeyRevoked)

			outage.begin(etcd)
			began := time.Now()
			age := k.Status(t).Store.ProofAge
			allowed, refusedAt := 0, time.Duration(0)
			for refusedAt == 0 {
				r := get(known)
				switch {
				case r.Status == http.StatusOK:
					allowed++
				default:
					wantReply(t, r, authz.Stale)
					refusedAt = time.Since(began)
				}
				if time.Since(began) > 10*time.Second {
					t.Fatal("a known key is still allowed 10 s after etcd went away")
				}
				if r := get(revoked); r.Status == http.StatusOK {
					t.Error("a revoked key was allowed")
				}
			}
			// The proof in force may have been up to one probe old, and one that had
			// begun may still have ended.
			budget := k.Settings.StalenessBudget
			if refusedAt < budget-age-100*time.Millisecond || refusedAt > budget+time.Second {
				t.Errorf("first refused %v after the outage began with a proof %v old, want about %v", refusedAt, age, budget-age)
			}
			if allowed == 0 {
				t.Error("a known key was not allowed for a moment of the budget")
			}

			for _, test := range []struct {
				path    string
				headers []string
				want    authz.Reason
			}{
				{"/weather", []string{header(known)}, authz.Stale},
				{"/weather", []string{header(revoked)}, authz.Stale},
				{"/weather", []string{header(fresh)}, authz.Stale},
				{"/weather", []string{header("key-that-nobody-ever-had-00")}, authz.Stale},
				{"/weather", nil, authz.KeyMissing},
				{"/weather", []string{header(known), header(known)}, authz.KeyMalformed},
				{"/no/such/route", []string{header(known)}, authz.ProductUnresolved},
			} {
				wantReply(t, k.Get(t, test.path, test.headers...), test.want)
			}
			code, body := k.Health(t, "/readyz?verbose")
			if code != http.StatusServiceUnavailable || !strings.Contains(body, "not ready: current state not proven") ||
				!strings.Contains(body, "staleness budget of 3s") || !strings.Contains(body, outage.why) || !strings.Contains(body, "[-]proof of freshness") {
				t.Errorf("/readyz: got %d: %s", code, body)
			}
			if code, _ := k.Health(t, "/livez"); code != http.StatusOK {
				t.Errorf("/livez: got %d, want 200: a restart would not help", code)
			}
			st := k.Status(t)
			if st.Ready || st.Store.Fresh || st.Problem == "" || st.Store.ProbeErrors == 0 {
				t.Errorf("/status: got %+v, want not ready, not fresh, a problem and errors of probes", st)
			}
			if got := k.Metrics(t)["keygate_fresh"]; got != 0 {
				t.Errorf("keygate_fresh: got %v, want 0", got)
			}
			for _, service := range []string{"", envoy.ServiceName} {
				keygatetest.Eventually(t, 2*time.Second, "health to be NOT_SERVING", func() bool { return healthOf(t, conn, service) == "NOT_SERVING" })
			}
			// Long enough for a client that backs off to have backed off far.
			keygatetest.Eventually(t, 20*time.Second, "ten seconds of outage", func() bool { return time.Since(began) > 10*time.Second })

			outage.end(etcd) // returns when a killed one answers
			back := time.Now()
			for get(known).Status != http.StatusOK {
				if time.Since(back) > 2*time.Second {
					t.Fatalf("not recovered 2 s after etcd was back: %s", k.Status(t).Problem)
				}
			}
			took := time.Since(back)
			wantReply(t, get(fresh), authz.Allowed)
			wantReply(t, get(revoked), authz.KeyRevoked)
			keygatetest.Eventually(t, time.Second, "health to be SERVING", func() bool { return healthOf(t, conn, "") == "SERVING" })
			if code, body := k.Health(t, "/readyz"); code != http.StatusOK || body != "ok\n" {
				t.Errorf("/readyz: got %d: %s, want 200, ok", code, body)
			}
			if n := count(k.Log(), "level=ERROR", "not serving"); n != 1 {
				t.Errorf("the log tells of %d outages, want 1", n)
			}
			// The watch is back as well.
			k.Applied(t, k.Put(t, k.Settings.Space.Status(keygatetest.Key{Key: known}.Record(t)), "revoked"))
			wantReply(t, get(known), authz.KeyRevoked)
			t.Logf("%s: %d requests allowed within the budget, first 503 after %v, recovered %v after etcd was back",
				outage.name, allowed, refusedAt.Round(time.Millisecond), took.Round(time.Millisecond))
		})
	}
}

// With etcd frozen and a proof still valid, keys that nobody knows fill the
// turns that they have; the next is turned away at once, and known keys are not.
func TestOverloadedThroughEnvoy(t *testing.T) {
	t.Parallel()
	etcd := etcdtest.StartProcess(t)
	var made decisions
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, OnDecision: made.add, Writer: etcd.Client(t),
		Etcd: statestore.EtcdConfig{Endpoints: []string{etcd.Endpoint()}}})
	const known = "key-known-before-the-freeze"
	k.PutKeys(t, keygatetest.Key{Key: known})
	wantReply(t, k.Get(t, "/weather", header(known)), authz.Allowed)
	conn := k.Conn(t)
	etcd.Stop()
	defer etcd.Cont()
	var wg sync.WaitGroup
	for i := range 72 { // there are 64 turns
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
			defer cancel()
			_, _ = check(ctx, conn, fmt.Sprintf("key-of-nobody-that-waits-%03d", i)) // it cannot be answered
		})
	}
	keygatetest.Eventually(t, 2*time.Second, "all turns to be taken", func() bool { return k.Server.Store().Status().Loads >= 64 })
	got := k.Get(t, "/weather", header("key-of-nobody-that-is-late"))
	found := false
	for _, d := range made.list() {
		if d.KeyID == keygatetest.KeyID(t, "key-of-nobody-that-is-late") {
			found = true
			if d.Reason != authz.Overloaded {
				t.Errorf("one unknown key too many: got %v, want %v", d.Reason, authz.Overloaded)
			}
		}
	}
	if !found {
		t.Error("one unknown key too many: it was not decided")
	}
	wantReply(t, got, authz.Overloaded)
	wantReply(t, k.Get(t, "/weather", header(known)), authz.Allowed)
	wg.Wait()
	if got := k.Metrics(t)["keygate_loads_shed_total"]; got == 0 {
		t.Error("keygate_loads_shed_total: got 0, want it to count")
	}
}

// etcd's process killed under load: the server starts it again, no check fails
// within the budget, and no write that was acknowledged is lost.
func TestChildKilledUnderLoad(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{Child: true, Envoy: true})
	const keys = 20
	name := func(i int) string { return fmt.Sprintf("key-that-must-not-fail-%03d", i) }
	for i := range keys {
		k.PutKeys(t, keygatetest.Key{Key: name(i)})
		wantReply(t, k.Get(t, "/weather", header(name(i))), authz.Allowed) // cached
	}
	const witness = "key-whose-status-is-written"
	witnessKey := keygatetest.Key{Key: witness}
	k.PutKeys(t, witnessKey)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	var checks, failed atomic.Int64
	var firstFailure sync.Once
	for i := range 4 {
		wg.Go(func() {
			for n := i; ctx.Err() == nil; n++ {
				r, err := k.TryGet(context.WithoutCancel(ctx), "/weather", header(name(n%keys)))
				checks.Add(1)
				if err != nil || r.Status != http.StatusOK {
					failed.Add(1)
					firstFailure.Do(func() { t.Errorf("a check during the kill: got %d %s, %v, want 200", r.Status, r.Body, err) })
				}
			}
		})
	}
	// One writer, that knows of each write whether it was acknowledged.
	var acknowledged []string
	written := make(chan struct{})
	space := k.Settings.Space
	go func() {
		defer close(written)
		for n := 0; ctx.Err() == nil; n++ {
			path := space.KeyProduct(witnessKey.Record(t), authz.ProductName(fmt.Sprintf("product-%05d", n)))
			put, stop := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			if _, err := k.Writer.Put(put, path, "revoked"); err == nil {
				acknowledged = append(acknowledged, path)
			}
			stop()
		}
	}()
	var outages []time.Duration
	for range 3 {
		keygatetest.Eventually(t, keygatetest.Patience, "the child to run and the proof to be young", func() bool {
			st := k.Server.Store().Status()
			return k.Child.Pid() != 0 && st.Fresh && st.ProofAge < 500*time.Millisecond
		})
		probes, pid := k.Server.Store().Status().Probes, k.Child.Pid()
		restarts := k.Child.Restarts()
		kill(t, pid)
		outages = append(outages, keygatetest.Eventually(t, keygatetest.Patience, "etcd to be back and proven", func() bool {
			st := k.Server.Store().Status()
			return k.Child.Restarts() > restarts && st.Probes > probes && st.Fresh && st.ProofAge < 300*time.Millisecond
		}).Round(time.Millisecond))
	}
	cancel()
	wg.Wait()
	<-written
	if len(acknowledged) == 0 {
		t.Error("no write was acknowledged")
	}
	for _, path := range acknowledged {
		r, err := k.Writer.Get(t.Context(), path)
		if err != nil || len(r.Kvs) != 1 {
			t.Errorf("acknowledged write %s: got %v, %v, want it there", path, r, err)
		}
	}
	st := k.Status(t)
	if !st.Etcd.Embedded || st.Etcd.Restarts != 3 || st.Etcd.Pid == 0 {
		t.Errorf("/status of etcd: got %+v, want embedded, 3 restarts and a pid", st.Etcd)
	}
	if code, body := k.Health(t, "/readyz?verbose"); code != 200 || !strings.Contains(body, fmt.Sprintf("[+]embedded etcd: pid %d, 3 restarts", st.Etcd.Pid)) {
		t.Errorf("/readyz: got %d: %s", code, body)
	}
	t.Logf("%d checks through Envoy, %d failed; %d writes acknowledged, none lost; etcd back and proven after %v", checks.Load(), failed.Load(), len(acknowledged), outages)
}

// What was revoked before a restart stays revoked after it, and no check is
// answered in between on what was known before.
func TestRestartKeepsStatuses(t *testing.T) {
	t.Parallel()
	dir := etcdtest.DataDir(t)
	const revoked, deleted, good = "key-revoked-before-restart", "key-deleted-before-restart", "key-good-before-restart-00"
	first := keygatetest.Start(t, keygatetest.Options{Child: true, DataDir: dir})
	first.PutKeys(t, keygatetest.Key{Key: revoked}, keygatetest.Key{Key: deleted}, keygatetest.Key{Key: good})
	conn := first.Conn(t)
	for _, key := range []string{revoked, deleted, good} {
		if got := mustCheck(t, conn, key); got != "allowed" {
			t.Errorf("before: got %s, want allowed", got)
		}
	}
	space := first.Settings.Space
	first.Put(t, space.Status(keygatetest.Key{Key: revoked}.Record(t)), "revoked")
	first.Delete(t, space.Status(keygatetest.Key{Key: deleted}.Record(t)))
	pid := first.Child.Pid()
	first.Stop(t)
	if alive(pid) {
		t.Errorf("the etcd child, process %d, outlived its server", pid)
	}

	second := keygatetest.Start(t, keygatetest.Options{Child: true, DataDir: dir, Unready: true})
	conn = second.Conn(t)
	for second.Server.Store().Fresh() != nil { // not a yes before the first proof
		if got := mustCheck(t, conn, good); got == "allowed" && second.Server.Store().Fresh() != nil {
			t.Error("a key was allowed before the first proof")
		}
		select {
		case <-second.Ended():
			t.Fatal("the second server ended")
		default:
		}
	}
	for key, want := range map[string]string{revoked: "key_revoked", deleted: "record_unreadable", good: "allowed"} {
		if got := mustCheck(t, conn, key); got != want {
			t.Errorf("after the restart: got %s, want %s", got, want)
		}
	}
}

// Stopping behind Envoy: first the health service says so, while checks are
// still answered; then those under way end with an answer.
func TestDrainThroughEnvoy(t *testing.T) {
	t.Parallel()
	etcd := etcdtest.Start(t)
	link := etcdtest.NewProxy(t, etcd.Endpoint())
	const drain = 2 * time.Second
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, Drain: drain, Writer: etcd.Client(t),
		Etcd: statestore.EtcdConfig{Endpoints: []string{link.Endpoint()}}})
	const key, slow = "key-that-is-asked-all-along", "key-that-is-asked-at-the-end"
	k.PutKeys(t, keygatetest.Key{Key: key}, keygatetest.Key{Key: slow})
	conn := k.Conn(t)
	keygatetest.Eventually(t, 5*time.Second, "health to be SERVING", func() bool { return healthOf(t, conn, "") == "SERVING" })

	began := time.Now()
	k.Terminate()
	keygatetest.Eventually(t, time.Second, "health to be NOT_SERVING", func() bool { return healthOf(t, conn, envoy.ServiceName) == "NOT_SERVING" })
	noticed := time.Since(began)
	if code, body := k.Health(t, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "stopping") {
		t.Errorf("/readyz: got %d: %s, want 503, stopping", code, body)
	}
	// For the rest of the drain, nothing fails.
	checks := 0
	for time.Since(began) < drain-200*time.Millisecond {
		wantReply(t, k.Get(t, "/weather", header(key)), authz.Allowed)
		checks++
	}
	// And a check that is under way when the drain ends is answered.
	link.Freeze()
	answer := make(chan string, 1)
	go func() {
		reason, err := check(context.WithoutCancel(t.Context()), conn, slow)
		answer <- fmt.Sprint(reason, err)
	}()
	keygatetest.Eventually(t, 5*time.Second, "the drain to have ended", func() bool {
		return time.Since(began) > drain+200*time.Millisecond
	})
	select {
	case got := <-answer:
		t.Fatalf("the slow check was answered before its record could be: %s", got)
	default:
	}
	link.Thaw()
	if got := <-answer; got != "allowed<nil>" {
		t.Errorf("a check under way at the end of the drain: got %s, want allowed", got)
	}
	k.Stop(t)
	if _, err := check(t.Context(), k.Conn(t), key); err == nil {
		t.Error("a check after the stop: got an answer, want none")
	}
	t.Logf("NOT_SERVING after %v, then %d checks through Envoy, none failed", noticed.Round(time.Millisecond), checks)
}
