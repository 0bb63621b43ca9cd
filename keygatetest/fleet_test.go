package keygatetest_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
	"keygate/statestore"
	"keygate/statestore/keyspace"
)

// replicas runs n stores, registered, in this process, each with connections of
// its own, on one etcd, until the test ends.
func replicas(t testing.TB, n int, endpoint string, space keyspace.Space) []*statestore.Store {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	stores := make([]*statestore.Store, n)
	for i := range stores {
		backend, err := statestore.NewEtcd(statestore.EtcdConfig{Endpoints: []string{endpoint}})
		if err != nil {
			t.Fatal(err)
		}
		stores[i], err = statestore.New(statestore.Config{
			Backend: backend, Registry: backend, Space: space, Version: "simulated", CacheBytes: 1 << 16, FenceSlots: 1 << 10,
		})
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			_ = stores[i].Run(ctx) // nil, says its contract
			_ = backend.Close()
		})
	}
	for i, s := range stores {
		ready, cancel := context.WithTimeout(t.Context(), 4*keygatetest.Patience)
		err := s.Await(ready)
		cancel()
		if err != nil {
			t.Fatalf("replica %d of %d: %v", i, n, err)
		}
	}
	return stores
}

// allowing counts the stores that allow the key at this moment.
func allowing(ctx context.Context, stores []*statestore.Store, id authz.KeyID) (n int) {
	for _, s := range stores {
		a := authz.Authorizer{Source: s}
		if a.Decide(ctx, authz.Request{Organization: "default", KeyID: id, Products: []authz.ProductName{quickstart.WeatherProduct}}).Allowed() {
			n++
		}
	}
	return n
}

// BenchmarkFleet measures the receipt of a fleet whose replicas are simulated in
// this process, on an etcd in another: one operation is a revocation that waits
// for all of them, and none of them allows the key after it. etcd-ms/op is the
// time of a processor that etcd spends on one, etcd-idle-% what the fleet's
// probes take of one when nothing changes.
func BenchmarkFleet(b *testing.B) {
	for _, n := range []int{1, 10, 50, 200} {
		b.Run(fmt.Sprintf("replicas=%d", n), func(b *testing.B) {
			etcd := etcdtest.StartProcess(b)
			cli := etcd.Client(b)
			space := keygatetest.Settings().Space
			stores := replicas(b, n, etcd.Endpoint(), space)
			key := keygatetest.Key{Key: "key-of-a-fleet-000000"}
			var ops []clientv3.Op
			for path, value := range key.Values(b, space) {
				ops = append(ops, clientv3.OpPut(path, value))
			}
			if _, err := cli.Txn(b.Context()).Then(ops...).Commit(); err != nil {
				b.Fatal(err)
			}
			id, target := keygatetest.KeyID(b, key.Key), []ledger.Target{{Record: key.Record(b)}}
			set := func(action ledger.StatusAction) ledger.Receipt {
				change, err := ledger.New(ledger.Config{Store: cli, Space: space}).SetStatus(b.Context(), ledger.By{}, action, target, ledger.StatusOptions{Barrier: true})
				if err != nil {
					b.Fatal(err)
				}
				receipt, err := change.Wait(b.Context())
				if err != nil || receipt.Count(ledger.Applied) != n {
					b.Fatalf("%v: got %d of %d replicas, %v", action, receipt.Count(ledger.Applied), n, err)
				}
				return receipt
			}
			set(ledger.Approve)
			keygatetest.Eventually(b, keygatetest.Patience, "every replica to allow the key", func() bool {
				return allowing(b.Context(), stores, id) == n
			})

			idle, began := cpu(b, etcd.Pid()), time.Now()
			keygatetest.Eventually(b, keygatetest.Patience, "three rounds of probes", func() bool { return time.Since(began) > 3*time.Second })
			idlePercent := 100 * float64(cpu(b, etcd.Pid())-idle) / float64(time.Since(began))

			var slowest []time.Duration
			var busy time.Duration
			b.ResetTimer()
			for range b.N {
				before := cpu(b, etcd.Pid())
				r := set(ledger.Revoke)
				busy += cpu(b, etcd.Pid()) - before
				slowest = append(slowest, r.Slowest())
				b.StopTimer()
				if yes := allowing(b.Context(), stores, id); yes > 0 {
					b.Fatalf("%d of %d replicas allow the key after the receipt of revision %d", yes, n, r.Revision)
				}
				set(ledger.Approve)
				allowing(b.Context(), stores, id) // back into every cache
				// An acknowledgement waits until 20 ms after the last: not what is measured.
				quiet := time.Now()
				keygatetest.Eventually(b, keygatetest.Patience, "the fleet to be quiet", func() bool { return time.Since(quiet) > 50*time.Millisecond })
				b.StartTimer()
			}
			slices.Sort(slowest)
			ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
			b.ReportMetric(ms(slowest[len(slowest)/2]), "p50-ms")
			b.ReportMetric(ms(slowest[len(slowest)*99/100]), "p99-ms")
			b.ReportMetric(ms(slowest[len(slowest)-1]), "max-ms")
			b.ReportMetric(ms(busy)/float64(b.N), "etcd-ms/op")
			b.ReportMetric(idlePercent, "etcd-idle-%")
		})
	}
}

// cpu is the time that a process has spent on a processor, in steps of 10 ms.
func cpu(t testing.TB, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// utime and stime, the 14th and 15th field, in hundredths of a second
	// (proc_pid_stat(5)); the second, in brackets, may hold blanks.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var sum time.Duration
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum
}
