package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore/keyspace"
)

const testOrg = authz.Organization("acme")

// failing is an etcd that ends a process, as it were: after so many transactions
// that write, none is taken any more.
type failing struct {
	*clientv3.Client
	left   int
	refuse int // the transaction, counted down from left, that alone is refused
}

var errKilled = fmt.Errorf("%w: killed here", errNotSent)

type failingTxn struct {
	clientv3.Txn
	f     *failing
	write bool
}

func (f *failing) Txn(ctx context.Context) clientv3.Txn {
	return &failingTxn{Txn: f.Client.Txn(ctx), f: f}
}

func (f *failing) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	if !op.IsGet() && f.left <= 0 {
		return clientv3.OpResponse{}, errKilled
	}
	return f.Client.Do(ctx, op)
}

func (t *failingTxn) If(c ...clientv3.Cmp) clientv3.Txn { t.Txn = t.Txn.If(c...); return t }
func (t *failingTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	for _, op := range ops {
		t.write = t.write || !op.IsGet()
	}
	t.Txn = t.Txn.Then(ops...)
	return t
}
func (t *failingTxn) Commit() (*clientv3.TxnResponse, error) {
	if t.write {
		if t.f.left <= 0 {
			return nil, errKilled
		}
		t.f.left--
		if t.f.left+1 == t.f.refuse {
			return nil, rpctypes.ErrTooManyRequests
		}
	}
	return t.Txn.Commit()
}

func testLedger(t *testing.T, client *clientv3.Client, store Store) *Ledger {
	t.Helper()
	space, err := keyspace.New(fmt.Sprintf("/t%d", time.Now().UnixNano()))
	if err != nil {
		t.Fatal(err)
	}
	if store == nil {
		store = client
	}
	return New(Config{Store: store, Space: space})
}

func manyFlags(t *testing.T, l *Ledger, client *clientv3.Client, n int, word string) (targets []Target) {
	t.Helper()
	for i := range n {
		target := Target{Record: keyspace.KeyRecord(testOrg, authz.KeyID{byte(i >> 8), byte(i)})}
		targets = append(targets, target)
		if _, err := client.Put(t.Context(), target.Path(l.space), word); err != nil {
			t.Fatal(err)
		}
	}
	return targets
}

func count(t *testing.T, l *Ledger, client *clientv3.Client, targets []Target, word string) (n int) {
	t.Helper()
	for _, target := range targets {
		resp, err := client.Get(t.Context(), target.Path(l.space))
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Kvs) == 1 && string(resp.Kvs[0].Value) == word {
			n++
		}
	}
	return n
}

// Wherever a change of many flags is cut off, the next keygate finishes it, or
// nothing of it has been done.
func TestCutOff(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	const n = 150 // three transactions, after the intent
	for _, action := range []StatusAction{Revoke, Approve} {
		from, to := "approved", "revoked"
		if action == Approve {
			from, to = to, from
		}
		for writes := range 6 {
			f := &failing{Client: client, left: writes}
			l := testLedger(t, client, f)
			targets := manyFlags(t, l, client, n, from)
			_, err := l.SetStatus(t.Context(), By{Actor: audit.Actor{Kind: audit.ActorCLI, Name: "ann"}}, action, targets, StatusOptions{})
			if (err != nil) != (writes < 4) {
				t.Errorf("%v, cut off after %d writes: got error %v", action, writes, err)
			}
			// Others change one flag there and back before it is finished.
			other := targets[n-1]
			if writes >= 1 && writes < 4 {
				for _, word := range []string{to, from} {
					if _, err := client.Put(t.Context(), other.Path(l.space), word); err != nil {
						t.Fatal(err)
					}
				}
			}
			next := New(Config{Store: client, Space: l.space})
			if done, err := next.finish(t.Context(), time.Hour); done != 0 || err != nil {
				t.Errorf("a young intent: got %d finished, %v, want it left to whoever began it", done, err)
			}
			if _, err := next.finish(t.Context(), 0); err != nil {
				t.Errorf("finish: %v", err)
			}
			want := n
			switch writes {
			case 0:
				want = 0
			case 1, 2, 3:
				want = n - 1 // not what others have changed since
			}
			if got := count(t, l, client, targets, to); got != want {
				t.Errorf("%v, cut off after %d writes: got %d flags %s, want %d of %d", action, writes, got, to, want, n)
			}
			left, err := client.Get(t.Context(), l.space.Intents(), clientv3.WithPrefix(), clientv3.WithCountOnly())
			if err != nil || left.Count != 0 {
				t.Errorf("cut off after %d writes: %d intents are left, %v", writes, left.Count, err)
			}
		}
	}
}

// A change that is repeated is done before it is answered, though the first time
// left most of it.
func TestRepeatedHalfWay(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	l := testLedger(t, client, &failing{Client: client, left: 100, refuse: 99})
	targets := manyFlags(t, l, client, 100, "approved")
	by := By{Once: &Once{Key: "k", Request: [32]byte{1}}}
	if c, err := l.SetStatus(t.Context(), by, Revoke, targets, StatusOptions{}); err == nil || len(c.Flags) != 0 {
		t.Fatalf("the first time: got %d flags, %v, want an error behind the intent", len(c.Flags), err)
	}
	c, err := l.SetStatus(t.Context(), by, Revoke, targets, StatusOptions{})
	if got := count(t, l, client, targets, "revoked"); err != nil || !c.Replayed || got != len(targets) {
		t.Errorf("the second time: got %d revoked, replayed %v, %v, want all", got, c.Replayed, err)
	}
}

// An intent of which something is absent stays until the rest is done.
func TestFinishPartly(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	f := &failing{Client: client, left: 1}
	l := testLedger(t, client, f)
	targets := manyFlags(t, l, client, 150, "approved")
	if _, err := l.SetStatus(t.Context(), By{}, Revoke, targets, StatusOptions{}); err == nil {
		t.Fatal("got no error, want the change cut off")
	}
	if _, err := client.Delete(t.Context(), targets[0].Path(l.space)); err != nil {
		t.Fatal(err)
	}
	f.left, f.refuse = 100, 99
	if n, err := l.finish(t.Context(), 0); n != 0 || err == nil {
		t.Errorf("half-way: got %d finished, %v", n, err)
	}
	if n, err := l.finish(t.Context(), 0); n != 1 || err != nil {
		t.Errorf("then: got %d finished, %v", n, err)
	}
	if got := count(t, l, client, targets, "revoked"); got != len(targets)-1 {
		t.Errorf("got %d revoked, want %d", got, len(targets)-1)
	}
}

// A revocation of a flag that is revoked already comes after an approval that
// began before it, though the approval is finished later.
func TestRevocationBehindIntent(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	l := testLedger(t, client, &failing{Client: client, left: 1})
	targets := manyFlags(t, l, client, 100, "revoked")
	if _, err := l.SetStatus(t.Context(), By{}, Approve, targets, StatusOptions{}); err == nil {
		t.Fatal("got no error, want the change cut off")
	}
	next := New(Config{Store: client, Space: l.space})
	if c, err := next.SetStatus(t.Context(), By{}, Revoke, targets[50:51], StatusOptions{}); err != nil || c.Changed() != 0 {
		t.Fatalf("revoke: got %+v, %v", c, err)
	}
	if _, err := next.finish(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if got := count(t, l, client, targets[50:51], "revoked"); got != 1 {
		t.Error("a key that was revoked after the approval began is approved")
	}
	if got := count(t, l, client, targets, "approved"); got != 99 {
		t.Errorf("got %d approved, want the other 99", got)
	}
}

// Keys with more products than a transaction holds are cleaned up too, and those
// that an app of the same id has again stay.
func TestCleanup(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	l := testLedger(t, client, nil)
	put := func(path, value string) {
		t.Helper()
		if _, err := client.Put(t.Context(), path, value); err != nil {
			t.Fatal(err)
		}
	}
	key := func(n byte, products int) keyspace.Record {
		r := keyspace.KeyRecord(testOrg, authz.KeyID{n})
		put(l.space.Details(r), `{"v":1,"appId":"a","developerId":"d","expiresAt":-1}`)
		put(l.space.Status(r), "approved")
		put(l.space.IndexAppKeys(testOrg, "a")+r.Key.String(), "")
		for i := range products {
			p := authz.ProductName(fmt.Sprint("p", i))
			put(l.space.KeyProduct(r, p), "approved")
			put(l.space.IndexProductKeys(testOrg, p)+r.Key.String(), "")
		}
		return r
	}
	for n, products := range []int{26, 40, 150, 0, 3} {
		key(byte(n), products)
	}
	in := l.newIntent(By{}, cleanup)
	in.App = "a"
	put(l.space.Intent(testOrg, in.ID), in.value())
	kept := keyspace.KeyRecord(testOrg, authz.KeyID{4}) // listed again
	put(l.space.Details(keyspace.AppRecord(testOrg, "a")), `{"v":1,"appId":"a","developerId":"d","credentials":["`+kept.Key.String()+`"]}`)
	fresh := key(9, 2)
	if n, err := l.finish(t.Context(), 0); n != 1 || err != nil {
		t.Fatalf("got %d finished, %v, want 1", n, err)
	}
	resp, err := client.Get(t.Context(), l.space.Watched(), clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, kv := range resp.Kvs {
		path := string(kv.Key)
		switch {
		case strings.HasPrefix(path, l.space.Folder(kept)), strings.HasPrefix(path, l.space.Folder(fresh)):
			left++
		case !strings.HasPrefix(path, l.space.Folder(keyspace.AppRecord(testOrg, "a"))):
			t.Errorf("left: %s", path)
		}
	}
	if left != 2+3+2+2 {
		t.Errorf("got %d values of the keys that stay, want all 9", left)
	}
}

// An intent of a newer keygate stays, and is said.
func TestForeignIntent(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	l := testLedger(t, client, nil)
	for _, value := range []string{`{"v":2,"action":"revoke"}`, `{"v":1,"action":"rotate"}`, `{`} {
		if _, err := client.Put(t.Context(), l.space.Intent(testOrg, "1"), value); err != nil {
			t.Fatal(err)
		}
		if n, err := l.finish(t.Context(), 0); n != 0 || err == nil {
			t.Errorf("intent %s: got %d finished, %v, want an error", value, n, err)
		}
	}
}

// The same request with the same Idempotency-Key is applied once and answered
// the same; another request is refused.
func TestOnce(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	l := testLedger(t, client, nil)
	path := l.space.Watched() + "acme/apps/a/app"
	put := func(key string, request byte) (Done, error) {
		by := By{Once: &Once{Key: key, Request: [32]byte{request}, Body: func(v any) ([]byte, error) { return fmt.Appendf(nil, "secret %v", v), nil }}}
		return l.change(t.Context(), by, testOrg, "create", path, func(ctx context.Context, tx *tx) (any, error) {
			if err := tx.get(ctx, path); err != nil {
				return nil, err
			}
			now, _ := tx.value(path)
			tx.put(path, now+"+")
			return now + "+", nil
		})
	}
	first, err := put("k1", 1)
	if err != nil || first.Replayed != nil {
		t.Fatalf("first: got %+v, %v", first, err)
	}
	again, err := put("k1", 1)
	if err != nil || string(again.Replayed) != "secret +" || again.Revision != first.Revision {
		t.Errorf("again: got %q at %d, %v, want the first answer at %d", again.Replayed, again.Revision, err, first.Revision)
	}
	var refusal *Error
	if _, err := put("k1", 2); !errors.As(err, &refusal) || refusal.Kind != Mismatch {
		t.Errorf("another request: got %v, want a mismatch", err)
	}
	if _, err := put("k2", 1); err != nil {
		t.Error(err)
	}
	if resp, err := client.Get(t.Context(), path); err != nil || string(resp.Kvs[0].Value) != "++" {
		t.Errorf("got %v, %v, want two changes of three", resp.Kvs, err)
	}
	kept, err := client.Get(t.Context(), l.space.Prefix()+".once/", clientv3.WithPrefix())
	if err != nil || len(kept.Kvs) != 2 {
		t.Fatalf("got %d kept answers, %v, want 2", len(kept.Kvs), err)
	}
	for _, kv := range kept.Kvs {
		for _, secret := range []string{"secret", "k1", "k2"} {
			if strings.Contains(string(kv.Key)+string(kv.Value), secret) {
				t.Errorf("what is kept holds %q", secret)
			}
		}
		if kv.Lease == 0 {
			t.Error("what is kept has no lease")
		}
	}

	// The lease is gone, as after a restore.
	if _, err := client.Revoke(t.Context(), l.once.id); err != nil {
		t.Fatal(err)
	}
	flag := Target{Record: keyspace.AppRecord(testOrg, "a")}
	if _, err := client.Put(t.Context(), flag.Path(l.space), "approved"); err != nil {
		t.Fatal(err)
	}
	by := By{Once: &Once{Key: "k3", Request: [32]byte{3}}}
	c, err := l.SetStatus(t.Context(), by, Revoke, []Target{flag}, StatusOptions{})
	if err != nil || c.Changed() != 1 {
		t.Fatalf("revoke: got %+v, %v", c, err)
	}
	if _, err := client.Put(t.Context(), flag.Path(l.space), "approved"); err != nil {
		t.Fatal(err)
	}
	r, err := l.SetStatus(t.Context(), by, Revoke, []Target{flag}, StatusOptions{})
	if err != nil || !r.Replayed || r.Revision != c.Revision {
		t.Errorf("revoke again: got %+v, %v, want a replay at %d", r, err, c.Revision)
	}
	if got := count(t, l, client, []Target{flag}, "approved"); got != 1 {
		t.Error("a repeated revocation undid the approval that came in between")
	}
}

// A dry run writes nothing and tells what would stop.
func TestDryRun(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	l := testLedger(t, client, nil)
	id := authz.KeyID{7}
	for path, value := range map[string]string{
		"acme/keys/" + id.String() + "/status":        "approved",
		"acme/keys/" + id.String() + "/products/good": "approved",
		"acme/keys/" + id.String() + "/products/bad":  "pending",
		"acme/keys/" + id.String() + "/credential":    `{"v":1,"appId":"a","developerId":"d","hint":"wxyz","expiresAt":-1}`,
		"acme/apps/a/status":                          "approved",
		"acme/apps/a/app":                             `{"v":1,"appId":"a","developerId":"d","credentials":["` + id.String() + `"]}`,
		"acme/developers/d/status":                    "active",
		"acme/developers/d/developer":                 `{"v":1,"developerId":"d"}`,
	} {
		if _, err := client.Put(t.Context(), l.space.Watched()+path, value); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.Put(t.Context(), l.space.IndexDeveloperApp(testOrg, "d", "n"), "a"); err != nil {
		t.Fatal(err)
	}
	before, err := client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	want := Stop{Key: id, Hint: "wxyz", App: "a", Product: "good"}
	for _, target := range []Target{
		{Record: keyspace.KeyRecord(testOrg, id)}, {Record: keyspace.KeyRecord(testOrg, id), Product: "good"},
		{Record: keyspace.AppRecord(testOrg, "a")}, {Record: keyspace.DeveloperRecord(testOrg, "d")},
	} {
		c, err := l.SetStatus(t.Context(), By{DryRun: true}, Revoke, []Target{target}, StatusOptions{Barrier: true})
		if err != nil || len(c.Stops) != 1 || c.Stops[0] != want || c.Changed() != 1 {
			t.Errorf("%v: got %+v, %v, want %+v stopped", target, c, err, want)
		}
		if c, err := l.SetStatus(t.Context(), By{DryRun: true}, Approve, []Target{target}, StatusOptions{}); err != nil || len(c.Stops) != 0 || c.Changed() != 0 {
			t.Errorf("approve %v: got %+v, %v, want nothing", target, c, err)
		}
	}
	bad := Target{Record: keyspace.KeyRecord(testOrg, id), Product: "bad"}
	if c, err := l.SetStatus(t.Context(), By{DryRun: true}, Revoke, []Target{bad}, StatusOptions{}); err != nil || len(c.Stops) != 0 || c.Changed() != 1 {
		t.Errorf("a product that is pending: got %+v, %v, want nothing stopped", c.Stops, err)
	}
	if after, err := client.Get(t.Context(), "x"); err != nil || after.Header.Revision != before.Header.Revision {
		t.Errorf("a dry run wrote: revision %d after %d, %v", after.Header.Revision, before.Header.Revision, err)
	}
}

// An If-Match that is not the present revision changes nothing.
func TestStatusIfMatch(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	l := testLedger(t, client, nil)
	flag := Target{Record: keyspace.AppRecord(testOrg, "a")}
	first, err := client.Put(t.Context(), flag.Path(l.space), "approved")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(t.Context(), l.space.Details(flag.Record), "{}"); err != nil {
		t.Fatal(err)
	}
	var refusal *Error
	if _, err := l.SetStatus(t.Context(), By{IfMatch: first.Header.Revision}, Revoke, []Target{flag}, StatusOptions{}); !errors.As(err, &refusal) || refusal.Kind != Precondition {
		t.Errorf("an old revision: got %v, want a precondition", err)
	}
	if c, err := l.SetStatus(t.Context(), By{IfMatch: first.Header.Revision + 1}, Revoke, []Target{flag}, StatusOptions{}); err != nil || c.Changed() != 1 {
		t.Errorf("the present one: got %+v, %v", c, err)
	}
}

// full is an etcd without space.
type full struct {
	*clientv3.Client
	full bool
}

type fullTxn struct {
	clientv3.Txn
	f   *full
	put bool
}

func (f *full) Txn(ctx context.Context) clientv3.Txn { return &fullTxn{Txn: f.Client.Txn(ctx), f: f} }
func (t *fullTxn) If(c ...clientv3.Cmp) clientv3.Txn { t.Txn = t.Txn.If(c...); return t }
func (t *fullTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	for _, op := range ops {
		t.put = t.put || op.IsPut()
	}
	t.Txn = t.Txn.Then(ops...)
	return t
}
func (t *fullTxn) Commit() (*clientv3.TxnResponse, error) {
	if t.put && t.f.full {
		return nil, rpctypes.ErrNoSpace
	}
	return t.Txn.Commit()
}

// A revocation by deletion leaves its audit record in the spool, from where it
// gets into etcd once.
func TestSpool(t *testing.T) {
	client := etcdtest.Start(t).Client(t)
	dir := t.TempDir()
	spool, err := OpenSpool(filepath.Join(dir, "spool"))
	if err != nil {
		t.Fatal(err)
	}
	f := &full{client, true}
	l := testLedger(t, client, f)
	l.spool = spool
	targets := manyFlags(t, l, client, 70, "approved")
	c, err := l.SetStatus(t.Context(), By{Reason: "leaked"}, Revoke, targets, StatusOptions{})
	if err != nil || !c.ByDeletion || c.Changed() != 70 {
		t.Fatalf("got %+v, %v, want 70 deleted", c, err)
	}
	if left, err := spool.Drain(t.Context(), f, l.space); left != 2 || err != nil {
		t.Errorf("without space: got %d left, %v, want 2", left, err)
	}
	f.full = false
	damaged := filepath.Join(dir, "spool", "00.json")
	if err := os.WriteFile(damaged, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if left, err := spool.Drain(t.Context(), f, l.space); left != 1 || err == nil {
			t.Errorf("with a damaged record: got %d left, %v, want 1 and its name", left, err)
		}
	}
	resp, err := client.Get(t.Context(), l.space.Audit(testOrg), clientv3.WithPrefix())
	if err != nil || len(resp.Kvs) != 2 {
		t.Fatalf("got %d records, %v, want 2", len(resp.Kvs), err)
	}
	n := 0
	for _, kv := range resp.Kvs {
		r, err := audit.Parse(kv.Value)
		if err != nil || r.Reason != "leaked" || r.Revision == 0 || r.Revision > c.Revision {
			t.Errorf("got %+v, %v", r, err)
		}
		n += len(r.Changes)
	}
	if n != 70 {
		t.Errorf("got %d changes in the records, want 70", n)
	}
}
