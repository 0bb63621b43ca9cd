// Package storetest is the conformance suite of a statestore.Store: one set of
// stories, run over real etcd and over a fake that fails on demand.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"keygate/authz"
	"keygate/statestore"
	"keygate/statestore/keyspace"
)

// Cluster is the store behind a Store under test, with a way to write to it and
// to hurt it. Its methods end the test on an error of their own.
type Cluster struct {
	Backend statestore.Backend
	// Put and Delete write one key and return the revision.
	Put    func(key, value string) int64
	Delete func(key string) int64
	// PutAll writes keys and values, in turn, in one transaction.
	PutAll func(keysAndValues ...string) int64
	// Compact compacts to the current revision.
	Compact func()
	// Freeze drops everything between the Backend and the cluster in silence;
	// Thaw ends that. Writes are not affected.
	Freeze, Thaw func()
	// CutOff keeps the Backend away, with errors, until Reconnect.
	CutOff, Reconnect func()
	// Replace puts an empty cluster of another identity behind the address.
	Replace func()

	indexRecords int // of the store over it
}

// Names that the suite uses. The consumer key and app are the sample of
// Apigee's page on revoking keys.
const (
	Org       authz.Organization = "acme"
	App       authz.AppID        = "6ed3a4d1-4733-439a-80a4-0d71149ec9ad"
	Developer authz.DeveloperID  = "Z2S37rxX2Suzkwtg"
	Weather   authz.ProductName  = "Weather-Product"
	budget                       = statestore.MinStalenessBudget
)

// Space is the default keyspace.
var Space = func() keyspace.Space {
	s, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		panic(err)
	}
	return s
}()

// KeyID names a consumer key of the test's choosing.
func KeyID(consumerKey string) authz.KeyID {
	k, reason := authz.ParseConsumerKey(consumerKey)
	if reason != authz.Allowed {
		panic(fmt.Sprintf("consumer key %q: %v", consumerKey, reason))
	}
	return k.ID()
}

// Key is the sample key's name.
var Key = KeyID("giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb")

// PutKey writes an approved key, for product Weather, of the sample app.
// It returns the last revision.
func (c Cluster) PutKey(id authz.KeyID) int64 {
	r := keyspace.KeyRecord(Org, id)
	c.Put(Space.KeyProduct(r, Weather), "approved")
	c.Put(Space.Details(r), fmt.Sprintf(`{"v":1,"developerId":%q,"appId":%q,"expiresAt":-1}`, Developer, App))
	return c.Put(Space.Status(r), "approved")
}

// PutApp writes the sample app and its developer, approved and active. It returns
// the last revision.
func (c Cluster) PutApp() int64 {
	app, dev := keyspace.AppRecord(Org, App), keyspace.DeveloperRecord(Org, Developer)
	c.Put(Space.Details(app), fmt.Sprintf(`{"v":1,"appId":%q,"developerId":%q}`, App, Developer))
	c.Put(Space.Details(dev), fmt.Sprintf(`{"v":1,"developerId":%q}`, Developer))
	c.Put(Space.Status(app), "approved")
	return c.Put(Space.Status(dev), "active")
}

// harness is one store over one cluster.
type harness struct {
	Cluster
	t     *testing.T
	store *statestore.Store
	authz authz.Authorizer
	began bool // the store answers
}

// PutKey is the cluster's, and waits until the store has applied it: an index
// knows nothing sooner.
func (h *harness) PutKey(id authz.KeyID) {
	h.t.Helper()
	if rev := h.Cluster.PutKey(id); h.began {
		h.applied(rev)
	}
}

// PutApp likewise.
func (h *harness) PutApp() {
	h.t.Helper()
	if rev := h.Cluster.PutApp(); h.began {
		h.applied(rev)
	}
}

func start(t *testing.T, open func(*testing.T) Cluster) *harness {
	t.Helper()
	h := prepare(t, open(t))
	h.run()
	h.fresh()
	return h
}

func prepare(t *testing.T, c Cluster) *harness {
	t.Helper()
	store, err := statestore.New(statestore.Config{
		Backend: c.Backend, Space: Space, StalenessBudget: budget, IndexRecords: c.indexRecords,
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return &harness{Cluster: c, t: t, store: store, authz: authz.Authorizer{Source: store}}
}

// run starts the store; it is stopped, and waited for, when the test ends.
func (h *harness) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.store.Run(ctx) }()
	h.t.Cleanup(func() {
		h.Thaw() // whoever waits in the network can leave
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("Run ended with %v, want nil", err)
		}
	})
}

func (h *harness) fresh() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 10*time.Second)
	defer cancel()
	if err := h.store.Await(ctx); err != nil {
		h.t.Fatalf("no proof: %v", err)
	}
	h.began = true
	if h.indexRecords > 0 {
		h.until("the index is complete", 10*time.Second, func() bool { return h.store.Status().Index == statestore.IndexReady })
	}
}

func (h *harness) check(id authz.KeyID) authz.Decision {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	return h.authz.Decide(ctx, authz.Request{Organization: Org, KeyID: id, Products: []authz.ProductName{Weather}})
}

// applied waits until the store has applied rev.
func (h *harness) applied(rev int64) {
	h.t.Helper()
	h.until(fmt.Sprintf("revision %d is applied", rev), 10*time.Second, func() bool { return h.store.Status().AppliedRevision >= rev })
}

func (h *harness) until(what string, within time.Duration, ok func() bool) {
	h.t.Helper()
	for end := time.Now().Add(within); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("not within %v: %s; status %+v", within, what, h.store.Status())
		}
	}
}

func (h *harness) want(id authz.KeyID, want authz.Reason) {
	h.t.Helper()
	if d := h.check(id); d.Reason != want {
		h.t.Fatalf("check answered %v (%s), want %v", d.Reason, d.Problem, want)
	}
}

// cached waits until checks of the sample key are answered from the cache.
func (h *harness) cached() {
	h.t.Helper()
	h.until("all three records are cached", 5*time.Second, func() bool {
		misses := h.store.Status().Misses
		h.want(Key, authz.Allowed)
		return h.store.Status().Misses == misses
	})
}

// Run runs the suite over a store that reads its records through the cache, and
// over one that answers from its index. open returns a new, empty cluster for
// each story.
func Run(t *testing.T, open func(*testing.T) Cluster) {
	t.Run("read through", func(t *testing.T) { run(t, open, 0) })
	t.Run("index", func(t *testing.T) { run(t, open, 1000) })
}

func run(t *testing.T, open func(*testing.T) Cluster, indexRecords int) {
	open = func(open func(*testing.T) Cluster) func(*testing.T) Cluster {
		return func(t *testing.T) Cluster { c := open(t); c.indexRecords = indexRecords; return c }
	}(open)
	for _, story := range []struct {
		name string
		tell func(*testing.T, func(*testing.T) Cluster)
	}{
		{"every level revokes and approves", levels},
		{"several changes between two checks", several},
		{"a transaction changes several flags", transaction},
		{"a key that is created is seen at once", created},
		{"values nobody can read refuse", hostile},
		{"keys outside the schema change nothing", outside},
		{"nothing is allowed before the first proof", coldStart},
		{"proofs go on while others write", foreignWrites},
		{"no yes on an old proof, and recovery", frozen},
		{"a deletion in a compacted gap is seen", gap},
		{"another cluster behind the address", replaced},
		{"stopping refuses", stopped},
	} {
		t.Run(story.name, func(t *testing.T) {
			t.Parallel()
			story.tell(t, open)
		})
	}
}

func levels(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	key, app, dev := keyspace.KeyRecord(Org, Key), keyspace.AppRecord(Org, App), keyspace.DeveloperRecord(Org, Developer)
	h.want(Key, authz.Allowed)
	for _, level := range []struct {
		path, good, bad       string
		revoked, whenNotThere authz.Reason
	}{
		{Space.KeyProduct(key, Weather), "approved", "revoked", authz.ProductRevoked, authz.ProductNotOnKey},
		{Space.KeyProduct(key, Weather), "approved", "pending", authz.ProductPending, authz.ProductNotOnKey},
		{Space.Status(key), "approved", "revoked", authz.KeyRevoked, authz.RecordUnreadable},
		{Space.Status(app), "approved", "revoked", authz.AppRevoked, authz.RecordUnreadable},
		{Space.Status(dev), "active", "inactive", authz.DeveloperInactive, authz.RecordUnreadable},
	} {
		// Each step twice: from the cache, and after the event that ends it.
		h.want(Key, authz.Allowed)
		h.applied(h.Put(level.path, level.bad))
		h.want(Key, level.revoked)
		h.want(Key, level.revoked)
		h.applied(h.Put(level.path, level.good))
		h.want(Key, authz.Allowed)
		h.applied(h.Delete(level.path))
		h.want(Key, level.whenNotThere)
		h.applied(h.Put(level.path, level.good))
		h.want(Key, authz.Allowed)
	}
	before := h.store.Status().Loads
	for range 100 {
		h.want(Key, authz.Allowed)
	}
	if n := h.store.Status().Loads - before; n > 3 {
		t.Errorf("100 checks of a cached key caused %d loads, want next to none", n)
	}
}

// A cached record lacks more than one event: the last by itself says too little.
func several(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	h.cached()
	key := keyspace.KeyRecord(Org, Key)
	h.Put(Space.KeyProduct(key, Weather), "revoked")
	h.applied(h.Put(Space.Status(key), "approved"))
	h.want(Key, authz.ProductRevoked)
	h.Put(Space.Status(key), "revoked")
	h.applied(h.Put(Space.KeyProduct(key, Weather), "approved"))
	h.want(Key, authz.KeyRevoked)
	h.applied(h.Put(Space.Status(key), "approved"))
	h.cached()
	// One event, of each level: no load is needed.
	loads := h.store.Status().Loads
	h.applied(h.Put(Space.Status(key), "revoked"))
	h.want(Key, authz.KeyRevoked)
	h.applied(h.Put(Space.Status(key), "approved"))
	h.applied(h.Put(Space.Status(keyspace.AppRecord(Org, App)), "pending"))
	h.want(Key, authz.AppPending)
	h.applied(h.Put(Space.Status(keyspace.AppRecord(Org, App)), "approved"))
	h.applied(h.Put(Space.Status(keyspace.DeveloperRecord(Org, Developer)), "inactive"))
	h.want(Key, authz.DeveloperInactive)
	h.applied(h.Put(Space.Status(keyspace.DeveloperRecord(Org, Developer)), "Active"))
	h.want(Key, authz.RecordUnreadable)
	if n := h.store.Status().Loads - loads; n > 2 { // a slot may be shared, a Set dropped
		t.Errorf("five single changes caused %d loads, want none", n)
	}
}

// Several events of one revision concern one record: none of them is all that
// happened to it.
func transaction(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	h.cached()
	key := keyspace.KeyRecord(Org, Key)
	h.applied(h.PutAll(Space.Status(key), "approved", Space.KeyProduct(key, Weather), "revoked"))
	h.want(Key, authz.ProductRevoked)
	h.applied(h.PutAll(Space.KeyProduct(key, Weather), "approved", Space.Status(key), "approved"))
	h.cached()
	h.applied(h.PutAll(Space.KeyProduct(key, Weather), "approved", Space.Status(key), "revoked"))
	h.want(Key, authz.KeyRevoked)
}

func created(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.want(Key, authz.KeyUnknown)
	h.want(Key, authz.KeyUnknown)
	h.PutKey(Key)
	h.applied(h.Put(Space.Status(keyspace.KeyRecord(Org, Key)), "approved"))
	h.want(Key, authz.Allowed)
	for _, field := range []string{"status", "products/" + string(Weather), "credential"} {
		h.applied(h.Delete(Space.Folder(keyspace.KeyRecord(Org, Key)) + field))
	}
	h.want(Key, authz.KeyUnknown)
}

func hostile(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	other := KeyID("another-key-0123456789")
	h.PutKey(other)
	key := keyspace.KeyRecord(Org, Key)
	good := fmt.Sprintf(`{"v":1,"developerId":%q,"appId":%q,"expiresAt":-1}`, Developer, App)
	for _, bad := range []struct{ path, value, good string }{
		{Space.Status(key), "aproved", "approved"},
		{Space.Status(key), "Approved", "approved"},
		{Space.Status(key), "approved\n", "approved"},
		{Space.Status(key), `"approved"`, "approved"},
		{Space.Status(key), "", "approved"},
		{Space.KeyProduct(key, Weather), "approved ", "approved"},
		{Space.Details(key), "", good},
		{Space.Details(key), "\xff\xfe", good},
		{Space.Details(key), "null", good},
		{Space.Details(key), good[:20], good},
		{Space.Details(key), strings.Replace(good, `"v":1`, `"v":2`, 1), good},
		{Space.Details(key), strings.Replace(good, `"v":1`, `"v":1,"v":1`, 1), good},
		{Space.Details(key), strings.Replace(good, "-1", "-2", 1), good},
		{Space.Details(key), strings.Replace(good, "-1", `"-1"`, 1), good},
		{Space.Details(key), strings.Replace(good, "-1", "1000000000000000000", 1), good},
		{Space.Details(key), strings.Replace(good, string(Developer), "someone-else", 1), good},
		{Space.Details(key), strings.Repeat("[", 100_000), good},
		{Space.Details(key), strings.Repeat("x", 1_400_000), good},
	} {
		h.applied(h.Put(bad.path, bad.value))
		if d := h.check(Key); d.Reason != authz.RecordUnreadable || d.Problem == "" || len(d.Problem) > 300 {
			t.Errorf("%s = %.40q: answered %v with problem %q, want record_unreadable and a short problem", bad.path, bad.value, d.Reason, d.Problem)
		}
		h.want(other, authz.Allowed)
		h.applied(h.Put(bad.path, bad.good))
		h.want(Key, authz.Allowed)
	}
}

func outside(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	h.want(Key, authz.Allowed)
	w := Space.Watched()
	for _, path := range []string{
		w + "acme", w + "acme/keys", w + "acme/keys//status", w + "acme/keys/" + strings.ToUpper(Key.String()) + "/status",
		w + "acme/%61pps/x/status", w + ".hidden/keys/" + Key.String() + "/status", w + "acme/things/x/status", w + "\xff\xfe/keys",
		w + "acme/.barrier", Space.Folder(keyspace.KeyRecord(Org, Key)) + "products/Weather%2dProduct",
	} {
		h.applied(h.Put(path, "revoked"))
	}
	h.want(Key, authz.Allowed)
	if n := h.store.Status().Ignored; n != 9 {
		t.Errorf("%d keys ignored, want 9", n)
	}
}

func coldStart(t *testing.T, open func(*testing.T) Cluster) {
	h := prepare(t, open(t))
	h.PutApp()
	h.PutKey(Key)
	h.want(Key, authz.Stale)
	h.Freeze()
	h.run()
	h.want(Key, authz.Stale)
	if err := h.store.Fresh(); !errors.Is(err, authz.ErrUnavailable) {
		t.Errorf("Fresh = %v, want ErrUnavailable", err)
	}
	h.Thaw()
	h.fresh()
	h.want(Key, authz.Allowed)
}

func foreignWrites(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	// Nothing of this is an event of the watch: only progress tells how far it
	// has come.
	var last int64
	for i := range 50 {
		last = h.Put(fmt.Sprintf("/elsewhere/%d", i), "x")
	}
	h.applied(last)
	before := h.store.Status().Probes
	h.until("two more probes", 10*time.Second, func() bool { return h.store.Status().Probes >= before+2 })
	h.want(Key, authz.Allowed)
	if n := h.store.Status().Replaced; n != 0 {
		t.Errorf("%d watches replaced, want 0", n)
	}
}

func frozen(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	h.cached()
	h.Freeze()
	began := time.Now()
	h.Put(Space.Status(keyspace.KeyRecord(Org, Key)), "revoked")
	acknowledged := time.Now()
	// Cached, and proven until S: this is what the budget buys.
	h.want(Key, authz.Allowed)
	for h.check(Key).Reason == authz.Allowed {
		if d := time.Since(acknowledged); d > budget {
			t.Fatalf("still allowed %v after the revocation, want at most %v", d, budget)
		}
		time.Sleep(time.Millisecond)
	}
	t.Logf("cut off: last yes %v after the revocation, budget %v", time.Since(began).Round(time.Millisecond), budget)
	h.want(Key, authz.Stale)
	if p := h.store.Status().Problem; !strings.Contains(p, "staleness budget") {
		t.Errorf("problem %q, want it to name the staleness budget", p)
	}
	h.Thaw()
	h.until("refused as revoked", 5*time.Second, func() bool {
		d := h.check(Key)
		if d.Allowed() {
			t.Fatal("allowed after the cut, want never")
		}
		return d.Reason == authz.KeyRevoked
	})
}

func gap(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	other := KeyID("another-key-0123456789")
	h.PutKey(other)
	h.want(Key, authz.Allowed)
	h.want(other, authz.Allowed)
	h.CutOff()
	r := keyspace.KeyRecord(Org, Key)
	h.Delete(Space.Status(r))
	h.Put("/elsewhere", "so that the deletion is below the compaction")
	h.Compact()
	h.Reconnect()
	h.until("the gap is noticed", 10*time.Second, func() bool { return h.store.Status().Gaps > 0 })
	// An event after the gap is all that the watch knows of the key; it is not all
	// that happened to it.
	h.applied(h.Put(Space.KeyProduct(r, Weather), "approved"))
	h.until("refused", 5*time.Second, func() bool { return h.check(Key).Reason == authz.RecordUnreadable })
	h.until("the other allowed", 5*time.Second, func() bool { return h.check(other).Allowed() })
	for range 50 {
		h.want(Key, authz.RecordUnreadable)
	}
}

func replaced(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	h.want(Key, authz.Allowed)
	epoch := h.store.Status().Epoch
	h.Replace()
	h.until("new epoch", 15*time.Second, func() bool { return h.store.Status().Epoch > epoch && h.store.Fresh() == nil })
	h.want(Key, authz.KeyUnknown)
	h.PutApp()
	h.PutKey(Key)
	h.applied(h.Put(Space.Status(keyspace.KeyRecord(Org, Key)), "revoked"))
	h.want(Key, authz.KeyRevoked)
}

func stopped(t *testing.T, open func(*testing.T) Cluster) {
	h := start(t, open)
	h.PutApp()
	h.PutKey(Key)
	h.want(Key, authz.Allowed)
	records, err := h.store.Records(t.Context(), Org, Key)
	if err != nil {
		t.Fatal(err)
	}
	h.store.Expire()
	h.want(Key, authz.Stale)
	if records.Proof.Valid() {
		t.Error("a proof taken before Expire is still valid, want not")
	}
}
