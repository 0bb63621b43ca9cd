package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/examples/quickstart"
	"keygate/statestore/keyspace"
)

// The world that is seeded: apps of 10 keys each, developers of 4 apps each,
// all of them open for the product of the captured requests. The quickstart's
// key, which the captured requests and ghz's hold, is one more.
const (
	keysPerApp       = 10
	appsPerDeveloper = 4
	organization     = authz.Organization("default")
	product          = quickstart.WeatherProduct
)

// Bounds of a transaction, etcd's own, and of transactions at once.
const (
	opsPerTxn = 128
	writers   = 4
)

var space = func() keyspace.Space {
	s, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		panic(err) // the default is valid
	}
	return s
}()

// writeKey writes the nth consumer key, of the length of the captured one.
func writeKey(n uint64, key []byte) {
	for i := len(key) - 1; i >= len(keyName); i-- {
		key[i] = '0' + byte(n%10)
		n /= 10
	}
	copy(key, keyName)
}

const keyName = "benchkey"

// keyText is the nth consumer key.
func keyText(n int) string {
	key := make([]byte, len(quickstart.OrdersKey))
	writeKey(uint64(n), key)
	return string(key)
}

// stride between a key and the next one to be checked: neighbours are of one
// app, and of one node of any tree. It is prime, so that all keys have their
// turn.
const stride = 7_368_787

// cycle checks count keys, all of them by turns.
func cycle(count int) func(n uint64, key []byte) {
	step := uint64(stride)
	return func(n uint64, key []byte) { writeKey(n*step%uint64(count), key) }
}

// keyRecord of a consumer key.
func keyRecord(key string) keyspace.Record {
	k, reason := authz.ParseConsumerKey(key)
	if reason != authz.Allowed {
		panic(fmt.Sprintf("a key of the bench is not valid: %v", reason))
	}
	return keyspace.KeyRecord(organization, k.ID())
}

// etcdEndpoint of the embedded etcd in a data directory.
func etcdEndpoint(dataDir string) string { return "unix://" + filepath.Join(dataDir, "etcd.sock") }

// dialEtcd connects to the embedded etcd in a data directory.
func dialEtcd(dataDir string) (*clientv3.Client, error) {
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{etcdEndpoint(dataDir)}, DialTimeout: 5 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("client of etcd: %w", err)
	}
	return c, nil
}

// seed writes count keys and what they hang on, and forgets how they came there,
// as etcd does after an hour: the follower of the audit trail would otherwise
// write a record of each, for minutes, beside what is measured.
func seed(ctx context.Context, etcd *clientv3.Client, count int) error {
	_, err := inTransactions(ctx, etcd, func(put func(path, value string)) {
		world(0, count, put)
		sample(put)
	})
	if err != nil {
		return err
	}
	now, err := etcd.Get(ctx, space.Probe())
	if err == nil {
		_, err = etcd.Compact(ctx, now.Header.Revision)
	}
	return err
}

// inTransactions writes what values puts, and returns how many values that were.
func inTransactions(ctx context.Context, etcd *clientv3.Client, values func(put func(path, value string))) (written int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	batches := make(chan []clientv3.Op, writers)
	var running sync.WaitGroup
	for range writers {
		running.Go(func() {
			for ops := range batches {
				if ctx.Err() != nil {
					continue
				}
				if _, err := etcd.Txn(ctx).Then(ops...).Commit(); err != nil {
					cancel(fmt.Errorf("write %d values: %w", len(ops), err))
				}
			}
		})
	}
	var ops []clientv3.Op
	values(func(path, value string) {
		written++
		if ops = append(ops, clientv3.OpPut(path, value)); len(ops) == opsPerTxn {
			batches <- ops
			ops = nil
		}
	})
	if len(ops) > 0 {
		batches <- ops
	}
	close(batches)
	running.Wait()
	return written, context.Cause(ctx)
}

// world tells the values of count keys, from the first on, and of what they hang
// on.
func world(first, count int, put func(path, value string)) {
	for i := first; i < first+count; i++ {
		app := authz.AppID(fmt.Sprintf("%08x-4733-439a-80a4-0d71149ec9ad", i/keysPerApp))
		developer := authz.DeveloperID(fmt.Sprintf("developer%07d", i/keysPerApp/appsPerDeveloper))
		if i%(keysPerApp*appsPerDeveloper) == 0 {
			putDeveloper(put, developer)
		}
		if i%keysPerApp == 0 {
			putApp(put, app, developer)
		}
		putKey(put, keyText(i), app, developer)
	}
}

// sample tells the values of the quickstart's key, on an app of its own.
func sample(put func(path, value string)) {
	putDeveloper(put, quickstart.OrdersDeveloper)
	putApp(put, quickstart.OrdersApp, quickstart.OrdersDeveloper)
	putKey(put, quickstart.OrdersKey, quickstart.OrdersApp, quickstart.OrdersDeveloper)
}

func putDeveloper(put func(path, value string), id authz.DeveloperID) {
	putRecord(put, keyspace.DeveloperRecord(organization, id), "active", map[string]any{})
}

func putApp(put func(path, value string), id authz.AppID, developer authz.DeveloperID) {
	putRecord(put, keyspace.AppRecord(organization, id), "approved", map[string]any{keyspace.MemberDeveloper: developer})
}

func putKey(put func(path, value string), text string, app authz.AppID, developer authz.DeveloperID) {
	r := keyRecord(text)
	putRecord(put, r, "approved", map[string]any{keyspace.MemberApp: app, keyspace.MemberDeveloper: developer,
		keyspace.MemberExpiresAt: authz.NeverExpires, keyspace.MemberScopes: []string{}})
	put(space.KeyProduct(r, product), "approved")
}

func putRecord(put func(path, value string), r keyspace.Record, status string, details map[string]any) {
	details[keyspace.MemberVersion] = keyspace.Version
	b, err := json.Marshal(details)
	if err != nil {
		panic(err) // plain values
	}
	put(space.Status(r), status)
	put(space.Details(r), string(b))
}

// seedInto writes count keys into a new data directory, with nothing but etcd
// over it.
func (b *bench) seedInto(ctx context.Context, binary, dataDir string, count int) error {
	p := &process{name: "etcd", cmd: exec.Command(binary, "etcd", "--data-dir", dataDir)}
	p.cmd.Env = withoutKeygate(os.Environ())
	if err := p.launch(); err != nil {
		return err
	}
	defer p.stop()
	waiting, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	// The client would log that there is no socket yet.
	for {
		if _, err := os.Stat(filepath.Join(dataDir, "etcd.sock")); err == nil {
			break
		}
		select {
		case <-p.ended:
			return fmt.Errorf("etcd has ended:\n%s", p.log)
		case <-waiting.Done():
			return fmt.Errorf("etcd does not start: %w\n%s", waiting.Err(), p.log)
		case <-time.After(10 * time.Millisecond):
		}
	}
	etcd, err := dialEtcd(dataDir)
	if err != nil {
		return err
	}
	defer func() { _ = etcd.Close() }()
	if _, err := etcd.Get(waiting, space.Probe()); err != nil {
		return fmt.Errorf("etcd does not answer: %w\n%s", err, p.log)
	}
	return seed(ctx, etcd, count)
}

// seeded starts keygate over a store of count keys, which it finds there.
func (b *bench) seeded(ctx context.Context, binary string, count int, args ...string) (*process, error) {
	dataDir := filepath.Join(b.folder, fmt.Sprintf("data-%d", count))
	began := time.Now()
	if err := b.seedInto(ctx, binary, dataDir, count); err != nil {
		return nil, fmt.Errorf("seed %d keys: %w", count, err)
	}
	b.progress("%s keys are in etcd after %.1f s", number(float64(count)), time.Since(began).Seconds())
	return b.keygate(ctx, binary, dataDir, args...)
}
