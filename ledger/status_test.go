package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/examples/quickstart"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

func TestMain(m *testing.M) { etcdtest.Main(m) }

var (
	weatherID = quickstart.KeyID(quickstart.WeatherKey)

	keyTarget       = ledger.Target{Record: keyspace.KeyRecord(org, weatherID)}
	productTarget   = ledger.Target{Record: keyspace.KeyRecord(org, weatherID), Product: "Weather-Product"}
	appTarget       = ledger.Target{Record: keyspace.AppRecord(org, "6ed3a4d1-4733-439a-80a4-0d71149ec9ad")}
	developerTarget = ledger.Target{Record: keyspace.DeveloperRecord(org, "Z2S37rxX2Suzkwtg")}
)

func (s *store) setStatus(action ledger.StatusAction, opts ledger.StatusOptions, targets ...ledger.Target) (ledger.Change, error) {
	return ledger.New(ledger.Config{Store: s.kv, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, action, targets, opts)
}

// under are the paths below a prefix.
func (s *store) under(prefix string) (paths []string) {
	s.t.Helper()
	resp, err := s.kv.Get(s.ctx(), prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		paths = append(paths, string(kv.Key))
	}
	return paths
}

// records is the dump without the audit trail.
func (s *store) records() (map[string]string, int64) {
	all, rev := s.dump()
	maps.DeleteFunc(all, func(path, _ string) bool { return strings.HasPrefix(path, s.space.Audits()) })
	return all, rev
}

// audits are the records of the trail, newest first, each with its revision.
func (s *store) audits() (all []audit.Record) {
	s.t.Helper()
	resp, err := s.kv.Get(s.ctx(), s.space.Audits(), clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortDescend))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		r, err := audit.Parse(kv.Value)
		if err != nil {
			s.t.Fatal(err)
		}
		r.Revision = kv.ModRevision
		all = append(all, r)
	}
	return all
}

// mustSet sets flags and has a barrier.
func (s *store) mustSet(action ledger.StatusAction, targets ...ledger.Target) ledger.Change {
	s.t.Helper()
	c, err := s.setStatus(action, ledger.StatusOptions{Barrier: true}, targets...)
	if err != nil {
		s.t.Fatalf("%v: %v", action, err)
	}
	return c
}

// value at a path; "-" is none.
func (s *store) value(path string) (string, int64) {
	s.t.Helper()
	r, err := s.kv.Get(s.ctx(), path)
	if err != nil {
		s.t.Fatalf("get %s: %v", path, err)
	}
	if len(r.Kvs) == 0 {
		return "-", 0
	}
	return string(r.Kvs[0].Value), r.Kvs[0].ModRevision
}

func TestSetStatus(t *testing.T) {
	s := newStore(t)
	const indexed = indexStart + "products/Weather-Product/keys/"
	key, product, app, developer := keyFolder+"status", keyFolder+"products/Weather-Product", appFolder+"status", devFolder+"status"
	credential := keyFolder + "credential"
	orphan := ledger.Target{Record: keyspace.KeyRecord(org, authz.KeyID{1})}
	for _, tt := range []struct {
		name    string
		before  []string // set after the import
		action  ledger.StatusAction
		target  ledger.Target
		path    string
		want    string // value after; "-" none
		was     string // Before
		changed bool
		err     error
	}{
		{"revoke key", nil, ledger.Revoke, keyTarget, key, "revoked", "approved", true, nil},
		{"revoke pending key", []string{key, "pending"}, ledger.Revoke, keyTarget, key, "revoked", "pending", true, nil},
		{"revoke revoked key", []string{key, "revoked"}, ledger.Revoke, keyTarget, key, "revoked", "revoked", false, nil},
		{"revoke misspelt key", []string{key, "Approved"}, ledger.Revoke, keyTarget, key, "revoked", "Approved", true, nil},
		{"revoke deleted key flag", []string{key, "-"}, ledger.Revoke, keyTarget, key, "revoked", "", true, nil},
		{"approve key", []string{key, "revoked"}, ledger.Approve, keyTarget, key, "approved", "revoked", true, nil},
		{"approve pending key", []string{key, "pending"}, ledger.Approve, keyTarget, key, "approved", "pending", true, nil},
		{"approve approved key", nil, ledger.Approve, keyTarget, key, "approved", "approved", false, nil},
		{"approve key revoked by deletion", []string{key, "-"}, ledger.Approve, keyTarget, key, "approved", "", true, nil},
		{"approve key that is gone", []string{key, "-", credential, "-"}, ledger.Approve, keyTarget, key, "-", "", false, ledger.ErrNotFound},
		{"revoke key that is gone", []string{key, "-", credential, "-"}, ledger.Revoke, keyTarget, key, "-", "", false, ledger.ErrNotFound},
		{"revoke key with a flag alone", []string{credential, "-"}, ledger.Revoke, keyTarget, key, "revoked", "approved", true, nil},
		{"revoke unknown key", nil, ledger.Revoke, orphan, s.space.Status(orphan.Record), "-", "", false, ledger.ErrNotFound},

		{"revoke product", []string{product, "approved"}, ledger.Revoke, productTarget, product, "revoked", "approved", true, nil},
		{"approve product", nil, ledger.Approve, productTarget, product, "approved", "revoked", true, nil},
		{"approve product revoked by deletion", []string{product, "-"}, ledger.Approve, productTarget, product, "approved", "", true, nil},
		{"approve product of the index", []string{product, "-", credential, `{"v":1}`}, ledger.Approve, productTarget, product, "approved", "", true, nil},
		{"approve product of the record", []string{product, "-", indexed + weatherID.String(), "-"}, ledger.Approve, productTarget, product, "approved", "", true, nil},
		{"approve product of neither", []string{product, "-", indexed + weatherID.String(), "-", credential, `{"v":1}`}, ledger.Approve, productTarget, product, "-", "", false, ledger.ErrNotFound},
		{"approve product of a key that is gone", []string{product, "-", credential, "-"}, ledger.Approve, productTarget, product, "-", "", false, ledger.ErrNotFound},
		{"revoke product not on key", nil, ledger.Revoke, ledger.Target{Record: keyTarget.Record, Product: "Other"}, keyFolder + "products/Other", "-", "", false, ledger.ErrNotFound},

		{"revoke app", nil, ledger.Revoke, appTarget, app, "revoked", "approved", true, nil},
		{"approve app revoked by deletion", []string{app, "-"}, ledger.Approve, appTarget, app, "approved", "", true, nil},
		{"approve app that is gone", []string{app, "-", appFolder + "app", "-"}, ledger.Approve, appTarget, app, "-", "", false, ledger.ErrNotFound},
		{"revoke developer", nil, ledger.Revoke, developerTarget, developer, "inactive", "active", true, nil},
		{"approve developer", []string{developer, "inactive"}, ledger.Approve, developerTarget, developer, "active", "inactive", true, nil},
		{"approved is no developer's word", []string{developer, "approved"}, ledger.Approve, developerTarget, developer, "active", "approved", true, nil},
		{"approve developer that is gone", []string{developer, "-", devFolder + "developer", "-"}, ledger.Approve, developerTarget, developer, "-", "", false, ledger.ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.t = t
			s.clear()
			s.mustLoad(ledger.ImportOptions{}, weather())
			s.set(tt.before...)
			before, rev := s.records()
			_, mod := s.value(tt.path)
			c, err := s.setStatus(tt.action, ledger.StatusOptions{}, tt.target)
			if !errors.Is(err, tt.err) || tt.err == nil && err != nil {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			after, now := s.records()
			switch got, at := s.value(tt.path); {
			case got != tt.want:
				t.Errorf("got %q at %s, want %q", got, tt.path, tt.want)
			case tt.changed && at != c.Revision:
				t.Errorf("got revision %d, want that of the flag, %d", c.Revision, at)
			case !tt.changed && at != mod:
				t.Errorf("got revision %d of the flag after %d: a flag that is right was written again", at, mod)
			}
			if tt.err != nil {
				if now != rev || !strings.Contains(err.Error(), tt.target.String()) {
					t.Errorf("got revision %d after %d, and %q: want nothing written, and %s named", now, rev, err, tt.target)
				}
				return
			}
			want := []ledger.Flag{{Target: tt.target, Path: tt.path, Before: tt.was, Changed: tt.changed}}
			if diff := cmp.Diff(want, c.Flags); diff != "" {
				t.Errorf("flags (-want +got):\n%s", diff)
			}
			before[tt.path] = tt.want
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("more than the flag changed (-want +got):\n%s", diff)
			}
			record := s.audits()[0]
			if record.Action != tt.action.String() || record.Object != tt.path || record.NoOp == tt.changed || record.Revision != c.Revision {
				t.Errorf("audit: got %+v, want %v of %s at %d, no-op %v", record, tt.action, tt.path, c.Revision, !tt.changed)
			}
			if tt.changed {
				change := audit.Change{Path: tt.path, After: &tt.want}
				if tt.was != "" {
					change.Before = &tt.was
				}
				if diff := cmp.Diff([]audit.Change{change}, record.Changes); diff != "" {
					t.Errorf("audit (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestTargetsThatCannotBe(t *testing.T) {
	s := newStore(t)
	other := keyTarget
	other.Record.Organization = "other"
	for name, targets := range map[string][]ledger.Target{
		"nothing is named":                  nil,
		"has no status":                     {{Record: keyspace.ProductRecord(org, "P")}},
		"only a key has":                    {{Record: appTarget.Record, Product: "P"}},
		"organizations":                     {keyTarget, other},
		`organization ".x" begins with a `:  {{Record: keyspace.AppRecord(".x", "a")}},
		"a record of kind none has no":      {{}},
		"the organization has no name":      {{Record: keyspace.AppRecord("", "a")}},
		"not in organization \"acme\": app": {appTarget},
	} {
		_, err := s.setStatus(ledger.Revoke, ledger.StatusOptions{}, targets...)
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want %q", err, name)
		}
	}
}

// What is not there is named, and the rest is done, each target once.
func TestSomeAreNotThere(t *testing.T) {
	s := newStore(t)
	s.mustLoad(ledger.ImportOptions{}, weather())
	gone := ledger.Target{Record: keyspace.AppRecord(org, "gone")}
	c, err := s.setStatus(ledger.Revoke, ledger.StatusOptions{Barrier: true}, gone, keyTarget, keyTarget, appTarget)
	var missing *ledger.NotFoundError
	if !errors.As(err, &missing) || !slices.Equal(missing.Targets, []ledger.Target{gone}) {
		t.Errorf("got %v, want one target not found", err)
	}
	if len(c.Flags) != 2 || c.Changed() != 2 || c.Revision == 0 {
		t.Errorf("got %+v, want two flags changed", c)
	}
	if r, err := c.Wait(t.Context()); err != nil || len(r.Replicas) != 0 {
		t.Errorf("got %+v, %v: want a receipt of no replica", r, err)
	}
}

// manyKeys writes n keys with a status, an app each seven, and returns them.
func (s *store) manyKeys(n int) (targets []ledger.Target) {
	s.t.Helper()
	var ops []clientv3.Op
	for i := range n {
		r := keyspace.KeyRecord(org, authz.KeyID{1, byte(i >> 8), byte(i)})
		targets = append(targets, ledger.Target{Record: r})
		ops = append(ops, clientv3.OpPut(s.space.Status(r), "approved"))
	}
	for part := range slices.Chunk(ops, 100) {
		if _, err := s.kv.Txn(s.ctx()).Then(part...).Commit(); err != nil {
			s.t.Fatal(err)
		}
	}
	return targets
}

// More flags than a transaction holds take several, and one barrier, after an
// intent that is gone in the end.
func TestManyTargets(t *testing.T) {
	s := newStore(t)
	const n = 300
	targets := s.manyKeys(n)
	_, before := s.dump()
	var told []int
	c, err := s.setStatus(ledger.Revoke, ledger.StatusOptions{Barrier: true, Progress: func(done, total int) {
		told = append(told, done)
		if total != n {
			t.Errorf("got a total of %d, want %d", total, n)
		}
	}}, targets...)
	if err != nil {
		t.Fatal(err)
	}
	all, now := s.dump()
	for _, target := range targets {
		if got := all[target.Path(s.space)]; got != "revoked" {
			t.Fatalf("%v: got %q, want revoked", target, got)
		}
	}
	if _, at := s.value("/keygate/acme/.barrier"); at != c.Revision || now != c.Revision+1 {
		t.Errorf("got revision %d, and the barrier at %d: want both at the last but one, %d", c.Revision, at, now-1)
	}
	if left := s.under(s.space.Intents()); len(left) != 0 {
		t.Errorf("got intents %q, want none", left)
	}
	if now-before > 7 || c.Changed() != n || len(told) == 0 || told[len(told)-1] != n {
		t.Errorf("got %d transactions, %d changed, told %d", now-before, c.Changed(), told)
	}
	// The same again writes no flag.
	again := s.mustSet(ledger.Revoke, targets...)
	if again.Changed() != 0 || len(again.Flags) != n {
		t.Errorf("got %d changed of %d, want 0 of %d", again.Changed(), len(again.Flags), n)
	}
	for _, target := range targets {
		if _, at := s.value(target.Path(s.space)); at > c.Revision {
			t.Fatalf("%v: written again at revision %d", target, at)
		}
	}
}

// lossy is an etcd some of whose answers to a change are lost.
type lossy struct {
	*clientv3.Client
	// commit is called with the number of the transaction that changes, from 1.
	commit func(n int, do func() (*clientv3.TxnResponse, error)) (*clientv3.TxnResponse, error)
	read   func() error // before each transaction that reads; nil for none
	n      atomic.Int64
}

type lossyTxn struct {
	clientv3.Txn
	f       *lossy
	changes bool
}

// operations of transactions are noted, and the answer to the first that writes
// is lost.
type operations struct {
	*clientv3.Client
	of   [][]clientv3.Op
	lost bool
}

type operationsTxn struct {
	clientv3.Txn
	o     *operations
	write bool
}

func (o *operations) Txn(ctx context.Context) clientv3.Txn {
	return &operationsTxn{Txn: o.Client.Txn(ctx), o: o}
}

func (x *operationsTxn) If(cs ...clientv3.Cmp) clientv3.Txn {
	x.Txn = x.Txn.If(cs...)
	return x
}

func (x *operationsTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	x.o.of = append(x.o.of, ops)
	x.write = slices.ContainsFunc(ops, func(op clientv3.Op) bool { return !op.IsGet() })
	x.Txn = x.Txn.Then(ops...)
	return x
}

func (x *operationsTxn) Commit() (*clientv3.TxnResponse, error) {
	resp, err := x.Txn.Commit()
	if x.write && !x.o.lost {
		x.o.lost = true
		return nil, errors.New("the answer is lost")
	}
	return resp, err
}

// A change whose answer was lost is looked up by its audit record, and not made
// again.
func TestNothingToWrite(t *testing.T) {
	s := newStore(t).prepared()
	before := len(s.audits())
	o := &operations{Client: s.kv}
	c, err := ledger.New(ledger.Config{Store: o, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, ledger.Revoke, []ledger.Target{keyTarget}, ledger.StatusOptions{})
	if err != nil || c.Changed() != 1 || c.Asked() {
		t.Fatalf("got %+v, %v: want one changed, nobody asked", c, err)
	}
	if len(o.of) != 3 {
		t.Fatalf("got %d transactions, want the change with a read before it, and a read", len(o.of))
	}
	if ops := o.of[2]; slices.ContainsFunc(ops, func(op clientv3.Op) bool { return !op.IsGet() || op.IsSerializable() }) {
		t.Errorf("got %d operations, want linearizable reads", len(ops))
	}
	if _, at := s.value(keyTarget.Path(s.space)); at != c.Revision {
		t.Errorf("got revision %d, want that of the flag, %d", c.Revision, at)
	}
	if n := len(s.audits()) - before; n != 1 {
		t.Errorf("got %d audit records, want 1", n)
	}
}

// Who may write the flags and not list the replicas gets no barrier, and is told
// which right is missing.
func TestListDenied(t *testing.T) {
	etcd := etcdtest.StartTLS(t)
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	root := etcd.Client(t, etcdtest.RootUser, etcdtest.RootPassword)
	s := (&store{t: t, kv: root, space: space}).prepared()
	const password = "password"
	user := func(name string, right clientv3.PermissionType) *clientv3.Client {
		t.Helper()
		_, err1 := root.RoleAdd(s.ctx(), name)
		var err2 error
		for _, prefix := range []string{"/keygate/", "/keygate.audit/", "/keygate.intent/"} {
			_, err := root.RoleGrantPermission(s.ctx(), name, prefix, clientv3.GetPrefixRangeEnd(prefix), right)
			err2 = errors.Join(err2, err)
		}
		_, err3 := root.UserAdd(s.ctx(), name, password)
		_, err4 := root.UserGrantRole(s.ctx(), name, name)
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			t.Fatal(err)
		}
		return etcd.Client(t, name, password)
	}
	writer := user("writer", clientv3.PermissionType(clientv3.PermReadWrite))
	reader := user("reader", clientv3.PermissionType(clientv3.PermRead))
	set := func(kv *clientv3.Client, barrier bool, targets ...ledger.Target) (ledger.Change, error) {
		return ledger.New(ledger.Config{Store: kv, Space: space}).SetStatus(s.ctx(), ledger.By{}, ledger.Revoke, targets, ledger.StatusOptions{Barrier: barrier})
	}
	_, err = set(writer, true, keyTarget)
	if !errors.Is(err, ledger.ErrListDenied) || !errors.Is(err, rpctypes.ErrPermissionDenied) || !strings.Contains(err.Error(), "the right to read /keygate.replicas/") {
		t.Errorf("with a barrier: got %v, want the right that is missing", err)
	}
	if got, _ := s.value(keyTarget.Path(space)); got != "approved" {
		t.Errorf("got %q, want nothing written", got)
	}
	// What stood in earlier transactions stands, without a receipt.
	many := s.manyKeys(100)
	c, err := set(writer, true, many...)
	if !errors.Is(err, ledger.ErrListDenied) || !strings.Contains(err.Error(), "no receipt: ask the replicas: ") || c.Changed() != 62 || c.Asked() {
		t.Errorf("100 keys: got %d changed, asked %v, %v", c.Changed(), c.Asked(), err)
	}
	if c, err := set(writer, false, keyTarget); err != nil || c.Changed() != 1 {
		t.Errorf("without a barrier: got %+v, %v", c, err)
	}
	for _, barrier := range []bool{false, true} {
		if _, err := set(reader, barrier, appTarget); !errors.Is(err, rpctypes.ErrPermissionDenied) || errors.Is(err, ledger.ErrListDenied) == !barrier {
			t.Errorf("no right to write, barrier %v: got %v", barrier, err)
		}
	}
}

func (f *lossy) Txn(ctx context.Context) clientv3.Txn {
	return &lossyTxn{Txn: f.Client.Txn(ctx), f: f}
}

func (x *lossyTxn) If(cs ...clientv3.Cmp) clientv3.Txn {
	x.Txn, x.changes = x.Txn.If(cs...), true
	return x
}

func (x *lossyTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	x.Txn = x.Txn.Then(ops...)
	return x
}

func (x *lossyTxn) Commit() (*clientv3.TxnResponse, error) {
	switch {
	case x.changes:
		return x.f.commit(int(x.f.n.Add(1)), x.Txn.Commit)
	case x.f.read != nil:
		if err := x.f.read(); err != nil {
			return nil, err
		}
	}
	return x.Txn.Commit()
}

// An answer that is lost is no failure: what became of the change is read.
func TestLostAnswer(t *testing.T) {
	const path = "/keygate/acme/apps/6ed3a4d1-4733-439a-80a4-0d71149ec9ad/status"
	type answer = *clientv3.TxnResponse
	lost := rpctypes.ErrTimeout
	for _, tt := range []struct {
		name    string
		action  ledger.StatusAction
		barrier bool
		first   func(s *store, do func() (answer, error)) // the first transaction, whose answer is lost
		then    error                                     // what reads answer from then on
		want    string
		puts    int64 // of the flag
		err     error
	}{
		{"not written", ledger.Revoke, false, func(*store, func() (answer, error)) {}, nil, "revoked", 1, nil},
		{"written", ledger.Revoke, false, func(_ *store, do func() (answer, error)) { _, _ = do() }, nil, "revoked", 1, nil},
		{"not written, barrier", ledger.Revoke, true, func(*store, func() (answer, error)) {}, nil, "revoked", 1, nil},
		{"written, barrier", ledger.Revoke, true, func(_ *store, do func() (answer, error)) { _, _ = do() }, nil, "revoked", 1, nil},
		{"not written, etcd away", ledger.Revoke, true, func(*store, func() (answer, error)) {}, rpctypes.ErrNoLeader, "approved", 0, ledger.ErrOutcomeUnknown},
		{"written, etcd away", ledger.Revoke, true, func(_ *store, do func() (answer, error)) { _, _ = do() }, rpctypes.ErrNoLeader, "revoked", 1, ledger.ErrOutcomeUnknown},
		{"revoked, and approved by others", ledger.Revoke, true, func(s *store, do func() (answer, error)) { _, _ = do(); s.set(path, "approved") }, nil, "approved", 2, nil},
		{"not written, and revoked by others", ledger.Revoke, true, func(s *store, _ func() (answer, error)) { s.set(path, "revoked") }, nil, "revoked", 1, nil},
		// An approval that is written twice would undo the revocation between.
		{"approved, and revoked by others", ledger.Approve, false, func(s *store, do func() (answer, error)) { _, _ = do(); s.set(path, "revoked") }, nil, "revoked", 2, nil},
		{"approved, and deleted by others", ledger.Approve, false, func(s *store, do func() (answer, error)) { _, _ = do(); s.set(path, "-") }, nil, "-", -2, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			s.mustLoad(ledger.ImportOptions{}, weather())
			if tt.action == ledger.Approve {
				s.set(path, "revoked")
			}
			versions := func() int64 {
				r, err := s.kv.Get(s.ctx(), path)
				if err != nil {
					t.Fatal(err)
				}
				if len(r.Kvs) == 0 {
					return 0
				}
				return r.Kvs[0].Version
			}
			before := versions()
			f := &lossy{Client: s.kv}
			f.commit = func(n int, do func() (answer, error)) (answer, error) {
				if n > 1 {
					return do()
				}
				tt.first(s, do)
				f.read = func() error { return tt.then }
				return nil, lost
			}
			c, err := ledger.New(ledger.Config{Store: f, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, tt.action, []ledger.Target{appTarget}, ledger.StatusOptions{Barrier: tt.barrier})
			if !errors.Is(err, tt.err) || tt.err == nil && err != nil {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			got, rev := s.value(path)
			if puts := versions() - before; got != tt.want || puts != tt.puts {
				t.Errorf("got %q after %d puts, want %q after %d", got, puts, tt.want, tt.puts)
			}
			if tt.err != nil {
				if strings.Contains(err.Error(), "fail") || !strings.Contains(err.Error(), path) {
					t.Errorf("got %q, want the path named and no failure", err)
				}
				return
			}
			others := strings.Contains(tt.name, ", and ") && !strings.HasPrefix(tt.name, "not ")
			if c.Changed() != 1 || c.Revision < rev && !others {
				t.Errorf("got %+v, want a change at %d or later", c, rev)
			}
			if r, err := c.Wait(t.Context()); tt.barrier != (err == nil) || tt.barrier && r.Revision != c.Revision {
				t.Errorf("wait: got %+v, %v", r, err)
			}
		})
	}
}

// An error half-way tells how far it came; a transaction that others prevent
// does not keep a revocation from going on.
func TestHalfWay(t *testing.T) {
	for _, tt := range []struct {
		name   string
		action ledger.StatusAction
		err    error // of the second transaction after the intent
		done   int
	}{
		{"refused", ledger.Revoke, rpctypes.ErrPermissionDenied, 62},
		{"conflict, revoke", ledger.Revoke, nil, 138},
		{"conflict, approve", ledger.Approve, nil, 62},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			targets := s.manyKeys(200)
			if tt.action == ledger.Approve {
				s.mustSet(ledger.Revoke, targets...)
			}
			f := &lossy{Client: s.kv}
			f.commit = func(n int, do func() (*clientv3.TxnResponse, error)) (*clientv3.TxnResponse, error) {
				switch {
				case tt.err != nil && n == 3:
					return nil, tt.err
				case tt.err == nil && n >= 3 && n < 3+8: // all attempts
					return &clientv3.TxnResponse{}, nil
				}
				return do()
			}
			c, err := ledger.New(ledger.Config{Store: f, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, tt.action, targets, ledger.StatusOptions{Barrier: true})
			var partial *ledger.PartialError
			if !errors.As(err, &partial) || partial.Done != tt.done || partial.Total != 200 || len(c.Flags) != tt.done {
				t.Fatalf("got %v and %d flags, want %d of 200 done", err, len(c.Flags), tt.done)
			}
			if tt.err == nil && !errors.Is(err, ledger.ErrConflict) || !errors.Is(err, cmpErr(tt.err)) {
				t.Errorf("got %v", err)
			}
			// There is a receipt for what stands.
			if _, at := s.value("/keygate/acme/.barrier"); !c.Asked() || at != c.Revision {
				t.Errorf("asked: got %v at revision %d, the barrier at %d: want it of what stands", c.Asked(), c.Revision, at)
			} else if r, err := c.Wait(t.Context()); err != nil || r.Revision != at {
				t.Errorf("wait: got %+v, %v", r, err)
			}
			all, _ := s.dump()
			n := 0
			for _, target := range targets {
				if all[target.Path(s.space)] == map[ledger.StatusAction]string{ledger.Revoke: "revoked", ledger.Approve: "approved"}[tt.action] {
					n++
				}
			}
			if n != tt.done {
				t.Errorf("got %d flags in etcd, want %d", n, tt.done)
			}
			if again := s.mustSet(tt.action, targets...); len(again.Flags) != 200 || again.Changed() != 200-tt.done {
				t.Errorf("again: got %d of %d changed", again.Changed(), len(again.Flags))
			}
		})
	}
}

func cmpErr(err error) error {
	if err == nil {
		return ledger.ErrConflict
	}
	return err
}

// etcd that goes away under a change: back in time it is resolved, else it is
// said within some seconds that nobody knows, and the same again completes it.
func TestEtcdAwayDuringChange(t *testing.T) {
	for name, back := range map[string]bool{"killed and back": true, "frozen": false} {
		t.Run(name, func(t *testing.T) {
			p := etcdtest.StartProcess(t)
			space, err := keyspace.New(keyspace.DefaultPrefix)
			if err != nil {
				t.Fatal(err)
			}
			s := (&store{t: t, kv: p.Client(t), space: space}).prepared()
			f := &lossy{Client: s.kv}
			f.commit = func(n int, do func() (*clientv3.TxnResponse, error)) (*clientv3.TxnResponse, error) {
				if n > 1 {
					return do()
				}
				if !back {
					p.Stop()
					return do()
				}
				p.StartAgain()
				return do()
			}
			began := time.Now()
			c, err := ledger.New(ledger.Config{Store: f, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, ledger.Revoke, []ledger.Target{keyTarget}, ledger.StatusOptions{Barrier: true})
			if !back {
				if !errors.Is(err, ledger.ErrOutcomeUnknown) || time.Since(began) > 15*time.Second {
					t.Errorf("got %v after %v, want an unknown outcome soon", err, time.Since(began))
				}
				p.Cont()
				c = s.mustSet(ledger.Revoke, keyTarget)
			} else if err != nil {
				t.Fatal(err)
			}
			if got, rev := s.value(keyTarget.Path(s.space)); got != "revoked" || rev > c.Revision || len(c.Flags) != 1 {
				t.Errorf("got %q at %d, change %+v", got, rev, c)
			}
		})
	}
}

// What others change between the reading and the writing is seen: a change is
// of what it says it was, and an approval is of what is still there.
func TestChangedBetween(t *testing.T) {
	const index = indexStart + "products/Weather-Product/keys/"
	key, product, credential := keyFolder+"status", keyFolder+"products/Weather-Product", keyFolder+"credential"
	for _, tt := range []struct {
		name            string
		before, between []string
		action          ledger.StatusAction
		target          ledger.Target
		was, want       string
		err             error
	}{
		{"another word", nil, []string{key, "pending"}, ledger.Revoke, keyTarget, "pending", "revoked", nil},
		{"all deleted", nil, []string{key, "-", credential, "-"}, ledger.Revoke, keyTarget, "", "-", ledger.ErrNotFound},
		{"the record deleted", []string{key, "-"}, []string{credential, "-"}, ledger.Approve, keyTarget, "", "-", ledger.ErrNotFound},
		{"the flag written", []string{key, "-"}, []string{key, "pending"}, ledger.Approve, keyTarget, "pending", "approved", nil},
		{"the index deleted", []string{product, "-", credential, `{"v":1}`}, []string{index + weatherID.String(), "-"}, ledger.Approve, productTarget, "", "-", ledger.ErrNotFound},
		{"the product taken off", []string{product, "-", index + weatherID.String(), "-"}, []string{credential, `{"v":1}`}, ledger.Approve, productTarget, "", "-", ledger.ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t).prepared()
			s.set(tt.before...)
			f := &lossy{Client: s.kv}
			f.commit = func(n int, do func() (*clientv3.TxnResponse, error)) (*clientv3.TxnResponse, error) {
				if n == 1 {
					s.set(tt.between...)
				}
				return do()
			}
			c, err := ledger.New(ledger.Config{Store: f, Space: s.space}).SetStatus(s.ctx(), ledger.By{}, tt.action, []ledger.Target{tt.target}, ledger.StatusOptions{})
			if !errors.Is(err, tt.err) || tt.err == nil && err != nil {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			if got, _ := s.value(tt.target.Path(s.space)); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if tt.err == nil && (len(c.Flags) != 1 || c.Flags[0].Before != tt.was || !c.Flags[0].Changed) {
				t.Errorf("got %+v, want a change of %q", c.Flags, tt.was)
			}
		})
	}
}

// A caller that hangs up does not leave the outcome in the dark: what was sent
// is waited for, and nothing more is sent.
func TestHangUp(t *testing.T) {
	s := newStore(t)
	targets := s.manyKeys(100)
	ctx, cancel := context.WithCancel(t.Context())
	f := &lossy{Client: s.kv}
	f.commit = func(n int, do func() (*clientv3.TxnResponse, error)) (*clientv3.TxnResponse, error) {
		if n == 2 { // behind the intent
			cancel()
		}
		return do()
	}
	c, err := ledger.New(ledger.Config{Store: f, Space: s.space}).SetStatus(ctx, ledger.By{}, ledger.Revoke, targets, ledger.StatusOptions{Barrier: true})
	var partial *ledger.PartialError
	if !errors.As(err, &partial) || partial.Done != 62 || !errors.Is(err, context.Canceled) || errors.Is(err, ledger.ErrOutcomeUnknown) {
		t.Errorf("got %v, want 62 of 100 done", err)
	}
	if got, _ := s.value(targets[0].Path(s.space)); got != "revoked" || c.Changed() != 62 || c.Asked() {
		t.Errorf("got %q and %d changed, asked %v", got, c.Changed(), c.Asked())
	}
}

// Revocations and approvals at the same time: the last one by revision stands,
// and each that changed the flag has a revision of its own.
func TestConcurrent(t *testing.T) {
	s := newStore(t)
	s.mustLoad(ledger.ImportOptions{}, weather())
	var mu sync.Mutex
	byRevision := map[int64]ledger.StatusAction{}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 10 {
				action := ledger.StatusAction(i % 2)
				c, err := ledger.New(ledger.Config{Store: s.kv, Space: s.space}).SetStatus(t.Context(), ledger.By{}, action, []ledger.Target{keyTarget, productTarget}, ledger.StatusOptions{})
				if errors.Is(err, ledger.ErrConflict) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if c.Changed() == 0 {
					continue
				}
				mu.Lock()
				if _, twice := byRevision[c.Revision]; twice {
					t.Errorf("two changes at revision %d", c.Revision)
				}
				byRevision[c.Revision] = action
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	revisions := slices.Sorted(maps.Keys(byRevision))
	if len(revisions) < 2 {
		t.Fatalf("got %d changes", len(revisions))
	}
	last := revisions[len(revisions)-1]
	want := []string{"revoked", "approved"}[byRevision[last]]
	for _, path := range []string{keyFolder + "status", keyFolder + "products/Weather-Product"} {
		if got, rev := s.value(path); got != want || rev > last {
			t.Errorf("%s: got %q at %d, want %q at %d at the latest", path, got, rev, want, last)
		}
	}
}

// fullStore has an etcd that takes no more puts.
func fullStore(t *testing.T, prepare func(*store)) *store {
	t.Helper()
	kv := etcdtest.StartProcess(t, etcdtest.Quota(1<<20)).Client(t)
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	s := &store{t: t, kv: kv, space: space}
	prepare(s)
	for i := 0; ; i++ {
		if _, err := kv.Put(s.ctx(), fmt.Sprintf("/filler/%d", i), strings.Repeat("x", 100_000)); errors.Is(err, rpctypes.ErrNoSpace) {
			return s
		} else if err != nil || i > 1000 {
			t.Fatalf("fill etcd: %v after %d", err, i)
		}
	}
}

// A full etcd takes deletions, so a revocation still goes through, with a
// receipt of time; an approval says what to do.
func TestFullEtcd(t *testing.T) {
	const budget = 300 * time.Millisecond
	s := fullStore(t, func(s *store) {
		s.mustLoad(ledger.ImportOptions{}, weather())
		s.register("r1", budget)
	})
	if _, err := s.setStatus(ledger.Approve, ledger.StatusOptions{Barrier: true}, productTarget); !errors.Is(err, rpctypes.ErrNoSpace) ||
		!strings.Contains(err.Error(), "alarm disarm") {
		t.Errorf("approve: got %v, want what to do about a full etcd", err)
	}
	// The product is revoked already: it stays as it is.
	c := s.mustSet(ledger.Revoke, keyTarget, productTarget, appTarget)
	if !c.ByDeletion || !c.NoSpace || c.Changed() != 2 {
		t.Errorf("got %+v, want two flags deleted", c)
	}
	for path, want := range map[string]string{keyFolder + "status": "-", appFolder + "status": "-", keyFolder + "products/Weather-Product": "revoked"} {
		if got, _ := s.value(path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	if got := s.reason(weatherID, "Weather-Product"); got == authz.Allowed {
		t.Errorf("got %v after a revocation", got)
	}
	r, err := c.Wait(t.Context())
	if err != nil || r.Count(ledger.Fenced) != 1 {
		t.Errorf("got %+v, %v: want one replica fenced", r, err)
	}
	// Again: nothing to delete, the same answer. Nobody can acknowledge this either.
	for _, target := range []ledger.Target{keyTarget, productTarget} {
		if c := s.mustSet(ledger.Revoke, target); c.Changed() != 0 || c.Revision == 0 || c.ByDeletion || !c.NoSpace || !c.Asked() {
			t.Errorf("%v again: got %+v, want nothing changed, and no space", target, c)
		}
	}
	// With space again the approval restores what was.
	if _, err := s.kv.Delete(s.ctx(), "/filler/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	_, rev := s.dump()
	if _, err := s.kv.Compact(s.ctx(), rev, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.Defragment(s.ctx(), s.kv.Endpoints()[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.AlarmDisarm(s.ctx(), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	s.mustSet(ledger.Approve, keyTarget, productTarget, appTarget)
	if got := s.reason(weatherID, "Weather-Product"); got != authz.Allowed {
		t.Errorf("got %v after approval, want allowed", got)
	}
}

func TestSelection(t *testing.T) {
	s := newStore(t)
	const app, developer = "6ed3a4d1-4733-439a-80a4-0d71149ec9ad", "Z2S37rxX2Suzkwtg"
	s.mustLoad(ledger.ImportOptions{}, weather(), orders())
	one, err := ledger.AppKeys(t.Context(), s.kv, s.space, org, app)
	if err != nil || !slices.Equal(one.Keys, []authz.KeyID{weatherID}) || len(one.Notes) != 0 {
		t.Errorf("got %+v, %v: want the page's key", one, err)
	}
	index := indexStart + "apps/" + app + "/keys/"
	credential := func(app string) string {
		return fmt.Sprintf(`{"v":1,"appId":%q,"developerId":%q,"expiresAt":-1}`, app, developer)
	}
	id := func(n byte) string { return authz.KeyID{n}.String() }
	folder := func(n byte) string { return "/keygate/acme/keys/" + id(n) + "/" }
	s.set(
		index+weatherID.String(), "-", // in the record alone
		index+id(1), "", folder(1)+"credential", credential(app), // in the index alone
		index+id(2), "", // nowhere else
		index+id(3), "", folder(3)+"credential", credential("other"), // another's
		index+id(4), "", folder(4)+"status", "approved", // unreadable: ours, to be sure
		indexStart+"developers/"+developer+"/apps/gone", "gone",
		indexStart+"developers/"+developer+"/apps/foreign", "foreign",
		"/keygate/acme/apps/foreign/app", `{"v":1,"developerId":"else"}`,
	)
	want := []authz.KeyID{{1}, {4}, weatherID}
	got, err := ledger.DeveloperKeys(t.Context(), s.kv, s.space, org, developer)
	if err != nil || !slices.Equal(got.Keys, want) || !slices.Equal(got.Apps, []authz.AppID{app}) {
		t.Errorf("got %+v, %v: want %v", got, err, want)
	}
	notes := strings.Join(got.Notes, "\n")
	for _, part := range []string{
		"key " + id(1) + " is in the index of app \"" + app + "\", and not in its record",
		"key " + weatherID.String() + " is in the record of app \"" + app + "\", and not in its index",
		"key " + id(2) + " of app \"" + app + "\" is not there: left out",
		"key " + id(3) + " says that it belongs to app \"other\"",
		`app "gone", which is not there`,
		`app "foreign", which belongs to developer "else": left out`,
	} {
		if !strings.Contains(notes, part) {
			t.Errorf("no note %q in:\n%s", part, notes)
		}
	}
	for _, find := range []func() (ledger.Selection, error){
		func() (ledger.Selection, error) {
			return ledger.AppKeys(t.Context(), s.kv, s.space, org, "nobody")
		},
		func() (ledger.Selection, error) {
			return ledger.DeveloperKeys(t.Context(), s.kv, s.space, org, "nobody")
		},
	} {
		if _, err := find(); !errors.Is(err, ledger.ErrNotFound) || !strings.Contains(err.Error(), `"nobody"`) {
			t.Errorf("got %v, want not found", err)
		}
	}
	keys, err := ledger.Keys(t.Context(), s.kv, s.space, org, []authz.KeyID{weatherID, {9}})
	if err != nil || len(keys) != 2 || !keys[0].There || keys[1].There || keys[0].Credential.App != app ||
		!slices.Equal(keys[0].Products, []authz.ProductName{"Weather-Product"}) {
		t.Errorf("got %+v, %v", keys, err)
	}
}
