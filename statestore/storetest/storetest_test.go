package storetest_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
	"keygate/statestore/storetest"
)

func TestMain(m *testing.M) { etcdtest.Main(m) }

func TestFake(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Cluster {
		f := storetest.NewFake()
		return storetest.Cluster{
			Backend: f, Put: f.Put, PutAll: f.PutAll, Delete: f.Delete, Compact: f.Compact, Freeze: f.Freeze, Thaw: f.Thaw,
			CutOff:    func() { f.Hold(true) },
			Reconnect: func() { f.Hold(false) },
			Replace:   func() { f.Restore(storetest.NewFake(), 77, 9) },
		}
	})
}

func TestEtcd(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Cluster {
		etcd := etcdtest.StartProcess(t)
		proxy := etcdtest.NewProxy(t, etcd.Endpoint())
		backend, err := statestore.NewEtcd(statestore.EtcdConfig{Endpoints: []string{proxy.Endpoint()}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { backend.Close() })
		cli := etcd.Client(t)
		ctx := func() context.Context {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			t.Cleanup(cancel)
			return ctx
		}
		must := func(err error) {
			if err != nil {
				t.Helper()
				t.Fatal(err)
			}
		}
		return storetest.Cluster{
			Backend: backend,
			Put: func(key, value string) int64 {
				r, err := cli.Put(ctx(), key, value)
				must(err)
				return r.Header.Revision
			},
			Delete: func(key string) int64 {
				r, err := cli.Delete(ctx(), key)
				must(err)
				return r.Header.Revision
			},
			PutAll: func(keysAndValues ...string) int64 {
				var ops []clientv3.Op
				for kv := range slices.Chunk(keysAndValues, 2) {
					ops = append(ops, clientv3.OpPut(kv[0], kv[1]))
				}
				r, err := cli.Txn(ctx()).Then(ops...).Commit()
				must(err)
				return r.Header.Revision
			},
			Compact: func() {
				r, err := cli.Get(ctx(), "/", clientv3.WithCountOnly())
				must(err)
				_, err = cli.Compact(ctx(), r.Header.Revision, clientv3.WithCompactPhysical())
				must(err)
			},
			Freeze:    proxy.Freeze,
			Thaw:      proxy.Thaw,
			CutOff:    func() { proxy.Refuse(); proxy.Cut() },
			Reconnect: proxy.Accept,
			Replace: func() {
				etcd.Kill()
				entries, err := os.ReadDir(etcd.DataDir())
				must(err)
				for _, e := range entries {
					must(os.RemoveAll(filepath.Join(etcd.DataDir(), e.Name())))
				}
				etcd.Restart()
			},
		}
	})
}
