package keygatetest_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"keygate/access"
	"keygate/apigee"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
)

// paced calls do from each of so many workers, perSecond times together, for a
// time. Each call is given when it should have begun: now, or earlier if the one
// before it took too long, so that what a slow call delays counts as slow too.
func paced(workers, perSecond int, lasts time.Duration, do func(worker int, began time.Time)) {
	var running sync.WaitGroup
	every := time.Duration(workers) * time.Second / time.Duration(perSecond)
	start := time.Now()
	for w := range workers {
		running.Go(func() {
			next := start.Add(every * time.Duration(w) / time.Duration(workers))
			for next.Sub(start) < lasts {
				began := next
				if wait := time.Until(next); wait > 0 {
					<-time.After(wait)
					began = time.Now() // a timer that is late is not the server's
				}
				do(w, began)
				next = next.Add(every)
			}
		})
	}
	running.Wait()
}

// besides is what goes on beside the checks of a round.
type besides int

const (
	calm      besides = iota // nothing
	foreign                  // writes to another keygate with another etcd, on the same machine
	elsewhere                // writes of what no check reads
	checked                  // writes of what the checks read
	manyBesides
)

func (b besides) String() string { return [...]string{"calm", "foreign", "writes", "checked"}[b] }

// BenchmarkManagementLoad measures checks without and with 500 management writes
// a second beside them, by turns: one operation is five times four rounds. In one
// of each four there are no writes; in one they are of apps and keys that nobody
// checks; in one each is of an app whose key is checked, so that the next check
// of that key has to read it from etcd again, in the midst of these writes. And in
// one another keygate on this machine takes the writes, over another etcd: it
// shares nothing with the checks but the processors, which here the clients need
// too. What the writes cost the checks beyond that is the ratio to this round.
// The checks come at a rate that does not depend on how fast they are. Each of
// them is allowed.
//
// It reports the median over the rounds of a kind of their p50 and p99, and of
// what the keygate that checks and its etcd take of one processor; and over the
// rounds with writes the median, the least and the greatest ratio of the p50 and
// the p99 to those of the calm round beside it, and to those of the foreign one.
func BenchmarkManagementLoad(b *testing.B) {
	const (
		keys    = 1000
		checks  = 1000 // a second
		writes  = 500
		checker = 16 // workers
		writer  = 16
		times   = 5
		round   = 2 * time.Second
	)
	binary := buildKeygate(b)
	space := keygatetest.Settings().Space
	// Apps are imported, one key each: those that are checked, and as many others.
	var input strings.Builder
	name := func(i int) string { return fmt.Sprintf("key-checked-under-load-%05d", i) }
	for i := range 2 * keys {
		fmt.Fprintf(&input, `{"appId":"app-%d","developerId":"dev-%d","name":"app","status":"approved","credentials":[{"consumerKey":%q,"status":"approved",
			"expiresAt":-1,"apiProducts":[{"apiproduct":"Weather-Product","status":"approved"}]}]}`+"\n", i, i, name(i))
	}
	run := func() (*process, *etcdtest.Process) {
		etcd := etcdtest.StartProcess(b)
		cli := etcd.Client(b)
		importer := ledger.NewImporter(ledger.ImporterConfig{KV: cli, Space: space, Organization: "default"})
		var report ledger.Report
		if err := importer.Import(b.Context(), apigee.NewReader(apigee.ReaderConfig{Name: "apps.json"}, strings.NewReader(input.String())), report.Add); err != nil || report.Refused > 0 {
			b.Fatalf("import: %v, %v, want nothing refused", report, err)
		}
		return startProcess(b, binary, etcd.Endpoint(), newToken(b, cli, space, access.Admin)), etcd
	}
	k, etcd := run()
	other, _ := run()
	var conns [checker]*grpc.ClientConn
	for i := range conns {
		conn, err := grpc.NewClient("passthrough:///"+k.authz, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = conn.Close() })
		conns[i] = conn
	}
	keygatetest.Eventually(b, keygatetest.Patience, "a key to be allowed", func() bool {
		got, err := check(b.Context(), conns[0], name(0))
		return err == nil && got == "allowed"
	})
	checkOne := func(worker, key int, began time.Time) time.Duration {
		got, err := check(b.Context(), conns[worker], name(key))
		if err != nil || got != "allowed" {
			b.Errorf("check: got %s, %v, want allowed", got, err)
		}
		return time.Since(began)
	}
	for i := range keys { // into the cache
		checkOne(i%checker, i, time.Now())
	}

	// write changes an attribute of an app or, of one that nobody checks, the flag
	// of its key by turns.
	var written atomic.Int64
	write := func(beside besides) {
		n := written.Add(1)
		app, to := rand.IntN(keys), k.api
		if beside != checked {
			app += keys
		}
		if beside == foreign {
			to = other.api
		}
		path, body := fmt.Sprintf("/developers/dev-%d/apps/app/attributes/n", app), fmt.Sprintf(`{"name":"n","value":"%d"}`, n)
		if beside != checked && n%2 == 0 {
			path, body = fmt.Sprintf("/developers/dev-%d/apps/app/keys/%s?action=%s", app, name(app), []string{"revoke", "approve"}[rand.IntN(2)]), ""
		}
		got, err := to.try(b.Context(), http.MethodPost, path, body)
		if err != nil || got.status != http.StatusOK && got.status != http.StatusNoContent {
			b.Errorf("write: %d, %v: %s", got.status, err, got.body)
		}
	}
	type measured struct{ p50, p99, keygateCPU, etcdCPU float64 } // µs, and percent of one
	one := func(beside besides) measured {
		began := time.Now()
		keygateCPU, etcdCPU := cpu(b, k.cmd.Process.Pid), cpu(b, etcd.Pid())
		var writing sync.WaitGroup
		if beside != calm {
			writing.Go(func() { paced(writer, writes, round, func(int, time.Time) { write(beside) }) })
		}
		var all [checker][]time.Duration
		paced(checker, checks, round, func(w int, began time.Time) {
			all[w] = append(all[w], checkOne(w, rand.IntN(keys), began))
		})
		writing.Wait()
		percent := func(d time.Duration) float64 { return 100 * float64(d) / float64(time.Since(began)) }
		m := measured{keygateCPU: percent(cpu(b, k.cmd.Process.Pid) - keygateCPU), etcdCPU: percent(cpu(b, etcd.Pid()) - etcdCPU)}
		for i := range keys { // back into the cache: what was written is read here
			checkOne(i%checker, i, time.Now())
		}
		took := slices.Concat(all[:]...)
		slices.Sort(took)
		m.p50, m.p99 = float64(took[len(took)/2])/1e3, float64(took[len(took)*99/100])/1e3
		return m
	}
	for beside := range manyBesides { // everything has been used once
		one(beside)
	}
	written.Store(0)
	var rounds [manyBesides][]measured
	b.ResetTimer()
	for range b.N {
		for n := range times {
			for turn := range manyBesides { // none is always the first
				beside := (turn + besides(n)) % manyBesides
				rounds[beside] = append(rounds[beside], one(beside))
			}
		}
	}
	b.StopTimer()
	middle := func(all []float64) float64 { slices.Sort(all); return all[len(all)/2] }
	for beside, all := range rounds {
		each := func(of func(measured) float64) (values []float64) {
			for _, m := range all {
				values = append(values, of(m))
			}
			return values
		}
		for name, of := range map[string]func(measured) float64{
			"p50-µs": func(m measured) float64 { return m.p50 }, "p99-µs": func(m measured) float64 { return m.p99 },
			"keygate-cpu-%": func(m measured) float64 { return m.keygateCPU }, "etcd-cpu-%": func(m measured) float64 { return m.etcdCPU },
		} {
			b.ReportMetric(middle(each(of)), besides(beside).String()+"-"+name)
		}
		for name, of := range map[string]func(measured) float64{
			"p50": func(m measured) float64 { return m.p50 }, "p99": func(m measured) float64 { return m.p99 },
		} {
			for base := calm; base < min(elsewhere, besides(beside)); base++ {
				var ratios []float64
				for i, m := range all {
					ratios = append(ratios, of(m)/of(rounds[base][i]))
				}
				metric := fmt.Sprintf("%v/%v-%s", besides(beside), base, name)
				b.ReportMetric(middle(ratios), metric)
				b.ReportMetric(ratios[0], metric+"-least")
				b.ReportMetric(ratios[len(ratios)-1], metric+"-most")
			}
		}
	}
	b.ReportMetric(float64(written.Load())/(float64((int(manyBesides)-1)*times*b.N)*round.Seconds()), "writes/s")
}
