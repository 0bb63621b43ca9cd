package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"

	"keygate/authz"
	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/envoy/proxy/proxytest"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/keygatetest/variant"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// patience bounds every wait for something that should be there soon.
const patience = 30 * time.Second

// Options of a world.
type Options struct {
	// Replicas of keygate; zero means 3.
	Replicas int
	// Members of etcd: 1 (the zero value means that), or 3.
	Members int
	// Etcd are options of each member's process.
	Etcd []etcdtest.ProcessOption
	// Embedded runs one keygate serve with an etcd of its own, instead of
	// keygate authz on an etcd of the test's. Members, Etcd and the proxies are
	// then absent.
	Embedded bool
	// TLS runs one etcd in this process that wants client certificates and a
	// password, instead of processes of its own. Members and Etcd are then absent,
	// and the proxies cannot tell one call from another.
	TLS bool
	// S, the staleness budget; zero means 3 s, the smallest.
	S time.Duration
	// Keys that are there and approved at the beginning; zero means 24.
	Keys int
	// KeysPerApp share an app and its developer; zero means 1.
	KeysPerApp int
	// Race builds keygate with the race detector.
	Race bool
	// Mutations of the source that break something in keygate's own process which
	// cannot be broken from outside of it, such as its clock.
	Mutations []variant.Mutation
	// Args are further arguments of each replica.
	Args []string
	// Envoy starts one in front of all replicas.
	Envoy bool
	// Bootstrap may change Envoy's configuration before it is used.
	Bootstrap func(*envoy.Bootstrap)
	// WriteTimeout of each change; zero means 2 s.
	WriteTimeout time.Duration
}

// World is an etcd, replicas and what happens to them. Unless said otherwise
// its methods are safe for concurrent use; those that start, stop or break
// something belong to the scenario's goroutine.
type World struct {
	T       *testing.T
	Options Options
	// Long runs last as long as a release deserves; see For and Rounds. A run with
	// a guard switched off is short.
	Long bool
	// Guard that is switched off; nil in a plain run.
	Guard *Guard

	Rec   *Recorder
	Space keyspace.Space
	// Store is the one etcd of a world with one member, Cluster that of more; nil
	// otherwise.
	Store   *etcdtest.Process
	Cluster *etcdtest.Cluster
	// TLS is the etcd of a world with Options.TLS; nil otherwise.
	TLS *etcdtest.TLS
	// Client of etcd itself, past all proxies.
	Client   *clientv3.Client
	Replicas []*Replica
	Keys     []*Key
	// Envoy in front of all replicas; nil without Options.Envoy.
	Envoy *proxy.Proxy

	binary string
	http   *http.Client
	main   *Stream
	setup  int64 // revision after which the history begins

	flags struct { // one writer of a flag at a time
		sync.Mutex
		byPath map[string]*sync.Mutex
	}
	state struct {
		sync.Mutex
		loads   []*Load
		found   []Violation
		figures []Figure
	}
}

// Key of a world, and the flags that it needs.
type Key struct {
	Index int
	Name  string // the consumer key
	Paths [numLevels]string
	with  [numLevels][]int // all keys that the flag concerns
	flags [numLevels]ledger.Target
	check checkRequest
}

// New returns a world that is ready: keys written, replicas started, each with a
// proof. It ends with the test.
func New(t *testing.T, o Options, guard *Guard) *World {
	t.Helper()
	w := newWorld(t, o, guard)
	for _, r := range w.Replicas {
		r.Start()
	}
	for _, r := range w.Replicas {
		r.WaitReady()
	}
	if w.Options.Envoy {
		w.startEnvoy()
	}
	return w
}

// newWorld is New before any replica runs.
func newWorld(t *testing.T, o Options, guard *Guard) *World {
	t.Helper()
	o.Replicas, o.Members, o.S = orDefault(o.Replicas, 3), orDefault(o.Members, 1), orDefault(o.S, 3*time.Second)
	o.Keys, o.KeysPerApp = orDefault(o.Keys, 24), orDefault(o.KeysPerApp, 1)
	o.WriteTimeout = orDefault(o.WriteTimeout, 2*time.Second)
	if o.Embedded {
		o.Replicas = 1
	}
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	w := &World{T: t, Options: o, Guard: guard, Long: Long() && guard == nil, Rec: NewRecorder(), Space: space,
		http: &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 2 * clients}}}
	w.main = w.Rec.Stream()
	w.flags.byPath = map[string]*sync.Mutex{}
	w.binary = binary(t, o.Race, o.Mutations, guard)
	t.Cleanup(w.http.CloseIdleConnections)

	var endpoints []string
	switch {
	case o.Embedded:
	case o.TLS:
		w.TLS = etcdtest.StartTLS(t)
		endpoints = []string{w.TLS.Endpoint}
	case o.Members > 1:
		w.Cluster = etcdtest.StartCluster(t, o.Members, o.Etcd...)
		endpoints = w.Cluster.Endpoints()
	default:
		w.Store = etcdtest.StartProcess(t, o.Etcd...)
		endpoints = []string{w.Store.Endpoint()}
	}
	for i := range o.Replicas {
		w.Replicas = append(w.Replicas, newReplica(w, i, endpoints))
	}
	if o.Embedded {
		endpoints = []string{w.Replicas[0].startEmbedded()}
	}
	if o.TLS {
		w.Client = w.TLS.Client(t, etcdtest.RootUser, etcdtest.RootPassword)
	} else {
		w.Client = w.Dial(endpoints...)
	}
	w.makeKeys()
	return w
}

func orDefault[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// Dial returns a client of etcd that tries again soon after it was refused,
// closed when the test ends.
func (w *World) Dial(endpoints ...string) *clientv3.Client {
	w.T.Helper()
	c, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints, DialTimeout: patience, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(quickly)},
	})
	if err != nil {
		w.T.Fatalf("client of etcd: %v", err)
	}
	w.T.Cleanup(func() { _ = c.Close() })
	return c
}

// quickly is how connections that were lost are made again.
var quickly = grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.6, MaxDelay: 100 * time.Millisecond}, MinConnectTimeout: time.Second}

// makeKeys writes the keys, each open, in as few transactions as hold them.
func (w *World) makeKeys() {
	w.T.Helper()
	values := map[string]string{}
	apps := (w.Options.Keys + w.Options.KeysPerApp - 1) / w.Options.KeysPerApp
	flags := map[string]*Write{}
	begin := w.Rec.Now()
	for i := range w.Options.Keys {
		app := i / w.Options.KeysPerApp
		given := keygatetest.Key{
			Key: fmt.Sprintf("faults-%06d-%016x", i, rand.Uint64()),
			App: authz.AppID(fmt.Sprintf("app-%d-of-%d", app, apps)), Developer: authz.DeveloperID(fmt.Sprintf("developer-%d", app)),
		}
		for path, value := range given.Values(w.T, w.Space) {
			values[path] = value
		}
		record := given.Record(w.T)
		k := &Key{Index: i, Name: given.Key, check: newCheckRequest(given.Key)}
		k.Paths = [numLevels]string{
			LevelKey: w.Space.Status(record), LevelProduct: w.Space.KeyProduct(record, quickstart.WeatherProduct),
			LevelApp: w.Space.Status(given.AppRecord(w.T)), LevelDeveloper: w.Space.Status(given.DeveloperRecord(w.T)),
		}
		k.flags = [numLevels]ledger.Target{
			LevelKey: {Record: record}, LevelProduct: {Record: record, Product: quickstart.WeatherProduct},
			LevelApp: {Record: given.AppRecord(w.T)}, LevelDeveloper: {Record: given.DeveloperRecord(w.T)},
		}
		w.Keys = append(w.Keys, k)
		for l, path := range k.Paths {
			if flags[path] == nil {
				flags[path] = &Write{Start: begin, Path: path, Level: Level(l), Value: values[path], Outcome: Acked}
			}
			flags[path].Keys = append(flags[path].Keys, i)
		}
	}
	var ops []clientv3.Op
	var paths []string
	commit := func() {
		if len(ops) == 0 {
			return
		}
		ctx, cancel := context.WithTimeout(w.T.Context(), patience)
		defer cancel()
		r, err := w.Client.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			w.T.Fatalf("write the keys: %v", err)
		}
		for _, path := range paths {
			if f := flags[path]; f != nil {
				f.End, f.Revision = w.Rec.Now(), r.Header.Revision
			}
		}
		w.setup, ops, paths = r.Header.Revision, nil, nil
	}
	for path, value := range values {
		ops, paths = append(ops, clientv3.OpPut(path, value)), append(paths, path)
		if len(ops) == 128 { // etcd's limit
			commit()
		}
	}
	commit()
	for _, f := range flags {
		w.main.Write(*f)
	}
	for _, k := range w.Keys {
		for l, path := range k.Paths {
			k.with[l] = flags[path].Keys
		}
	}
}

// For is how long something lasts: short in the tests of every change, long
// with FAULTS=long.
func (w *World) For(short, long time.Duration) time.Duration {
	if w.Long {
		return long
	}
	return short
}

// Rounds is For of a number.
func (w *World) Rounds(short, long int) int {
	if w.Long {
		return long
	}
	return short
}

// Wait lets time pass, for that is what a fault takes. It ends early if the
// test does.
func (w *World) Wait(d time.Duration) {
	select {
	case <-time.After(d):
	case <-w.T.Context().Done():
	}
}

// Until waits for something that has nothing to do with the guarantees, and
// ends the test if it does not happen.
func (w *World) Until(what string, cond func() bool) time.Duration {
	w.T.Helper()
	return keygatetest.Eventually(w.T, patience, what, cond)
}

// Expect records a violation of a guarantee unless ok. It is how a scenario
// says what only it knows: in a plain run it makes the test red, in a run with a
// guard switched off it is what the run is for.
func (w *World) Expect(g Guarantee, ok bool, format string, args ...any) bool {
	if !ok {
		w.state.Lock()
		defer w.state.Unlock()
		w.state.found = append(w.state.found, Violation{Guarantee: g, At: w.Rec.Now(), Replica: -1, Key: -1, What: fmt.Sprintf(format, args...)})
	}
	return ok
}

// Eventually is Expect of something that must be so within a time; it returns
// how long it took.
func (w *World) Eventually(g Guarantee, within time.Duration, what string, cond func() bool) (time.Duration, bool) {
	began := w.Rec.Now()
	for !cond() {
		if w.Rec.Now()-began > within {
			w.Expect(g, false, "waited %v in vain for %s", within, what)
			return within, false
		}
		w.Wait(time.Millisecond)
	}
	return w.Rec.Now() - began, true
}

// Figure that was measured, for the report. It belongs to a guarantee; several
// runs of a scenario are not added up.
func (w *World) Figure(g Guarantee, name, format string, args ...any) {
	w.state.Lock()
	defer w.state.Unlock()
	w.state.figures = append(w.state.figures, Figure{Guarantee: g, Name: name, Value: fmt.Sprintf(format, args...)})
}

// Note writes a line into the history.
func (w *World) Note(format string, args ...any) { w.Rec.Mark(Note, Everyone, format, args...) }

// Fault notes that something is broken from now on, on one replica or for
// Everyone; the returned function notes that it no longer is. Whatever fails in
// between is held against G3 instead of G1.
func (w *World) Fault(replica int, format string, args ...any) (over func()) {
	text := fmt.Sprintf(format, args...)
	w.Rec.Mark(FaultOn, replica, "%s", text)
	return func() { w.Rec.Mark(FaultOff, replica, "%s", text) }
}

// --- changes -----------------------------------------------------------------

// Absent as a value deletes the flag.
const Absent = keygatetest.Absent

// Revoke closes one flag of a key, by its word. With wait it returns when there
// is a receipt, or none can be had.
func (w *World) Revoke(key int, level Level, wait bool) Write {
	return w.Set(key, level, closing(level), wait)
}

// Approve opens one flag of a key, likewise.
func (w *World) Approve(key int, level Level, wait bool) Write {
	return w.Set(key, level, opening(level), wait)
}

func closing(l Level) string {
	if l == LevelDeveloper {
		return authz.StatusInactive.String()
	}
	return authz.StatusRevoked.String()
}

func opening(l Level) string {
	if l == LevelDeveloper {
		return authz.StatusActive.String()
	}
	return authz.StatusApproved.String()
}

// Set writes a value, whatever it is, into one flag of a key, as etcdctl would;
// [Absent] deletes it. The write is recorded and returned.
//
// With wait, a value that revokes or approves is written as keygate revoke and
// approve do, and Set returns when there is a receipt, or none can be had.
func (w *World) Set(key int, level Level, value string, wait bool) Write {
	return w.set(w.main, key, level, value, wait)
}

func (w *World) set(s *Stream, key int, level Level, value string, wait bool) Write {
	k := w.Keys[key]
	one := Write{Path: k.Paths[level], Level: level, Keys: k.with[level], Value: value}
	if value == Absent {
		one.Value, one.Deleted = "", true
	}
	change := w.commit(&one, k.flags[level], wait)
	if change != nil {
		one.Receipt = w.receipt(*change)
	}
	s.Write(one)
	return one
}

// commit writes one, alone on its flag, and returns the change that may be
// waited for; nil if there is none.
func (w *World) commit(one *Write, flag ledger.Target, wait bool) *ledger.Change {
	mu := w.flag(one.Path)
	mu.Lock()
	defer mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), w.Options.WriteTimeout)
	defer cancel()
	one.Start = w.Rec.Now()
	if wait && (one.Value == closing(one.Level) || one.Value == opening(one.Level)) {
		one.Managed = true
		action := ledger.Revoke
		if one.Open() {
			action = ledger.Approve
		}
		c, err := ledger.New(ledger.Config{Store: w.Client, Space: w.Space}).SetStatus(ctx, ledger.By{}, action, []ledger.Target{flag}, ledger.StatusOptions{Barrier: true})
		one.End, one.Outcome = w.Rec.Now(), outcome(err)
		if err != nil {
			return nil
		}
		one.Revision, one.Already = c.Revision, c.Changed() == 0
		if c.ByDeletion {
			one.Value, one.Deleted = "", true
			return nil
		}
		return &c
	}
	var err error
	if one.Deleted {
		var r *clientv3.DeleteResponse
		if r, err = w.Client.Delete(ctx, one.Path); err == nil {
			one.Revision, one.Already = r.Header.Revision, r.Deleted == 0
		}
	} else {
		var r *clientv3.PutResponse
		if r, err = w.Client.Put(ctx, one.Path, one.Value); err == nil {
			one.Revision = r.Header.Revision
		}
	}
	one.End, one.Outcome = w.Rec.Now(), outcome(err)
	return nil
}

func (w *World) flag(path string) *sync.Mutex {
	w.flags.Lock()
	defer w.flags.Unlock()
	if w.flags.byPath[path] == nil {
		w.flags.byPath[path] = &sync.Mutex{}
	}
	return w.flags.byPath[path]
}

// receipt waits for a change; nil if there is none.
func (w *World) receipt(c ledger.Change) *Receipt {
	ctx, cancel := context.WithTimeout(context.Background(), w.Options.S+patience)
	defer cancel()
	r, err := c.Wait(ctx)
	if err != nil {
		w.Note("no receipt: %v", err)
		return nil
	}
	return &Receipt{End: w.Rec.Now(), Total: len(r.Replicas), Applied: r.Count(ledger.Applied), Fenced: r.Count(ledger.Fenced)}
}

// outcome of a write that ended with err.
func outcome(err error) Outcome {
	var e rpctypes.EtcdError
	switch {
	case err == nil:
		return Acked
	case errors.Is(err, ledger.ErrOutcomeUnknown):
		return Unknown
	case errors.Is(err, ledger.ErrNotFound), errors.Is(err, ledger.ErrConflict):
		return Failed
	case errors.As(err, &e):
		switch e.Code() {
		// etcd answered, and said no. Anything else may have been committed.
		case codes.ResourceExhausted, codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated:
			return Failed
		}
	}
	return Unknown
}

// ReadFlag reads one flag of a key past all proxies, linearizably, and records
// it. ok is false if there was no answer.
func (w *World) ReadFlag(key int, level Level) (r Read, ok bool) {
	ctx, cancel := context.WithTimeout(context.Background(), w.Options.WriteTimeout)
	defer cancel()
	r = Read{Start: w.Rec.Now(), Path: w.Keys[key].Paths[level], Absent: true}
	resp, err := w.Client.Get(ctx, r.Path)
	if err != nil {
		return Read{}, false
	}
	r.End = w.Rec.Now()
	for _, kv := range resp.Kvs {
		r.Absent, r.Value, r.Revision = false, string(kv.Value), kv.ModRevision
	}
	w.main.Read(r)
	return r, true
}

// --- Envoy -------------------------------------------------------------------

func (w *World) startEnvoy() {
	w.T.Helper()
	upstream := httptest.NewServer(proxy.Echo())
	w.T.Cleanup(upstream.Close)
	var addresses []string
	for _, r := range w.Replicas {
		addresses = append(addresses, r.Authz)
	}
	b := envoy.Bootstrap{Authz: addresses, Upstream: upstream.Listener.Addr().String(), Routes: envoy.QuickstartRoutes()}
	if w.Options.Bootstrap != nil {
		w.Options.Bootstrap(&b)
	}
	w.Envoy = proxytest.MustStart(w.T, b)
}

// Get asks for a key through Envoy, and records what came of it as an answer of
// Everyone: nobody knows which replica it was. It returns the HTTP status, 0 for
// none.
func (w *World) Get(key int) int { return w.getOn(w.main, key) }

func (w *World) getOn(s *Stream, key int) int {
	c := Check{Start: w.Rec.Now(), Replica: Everyone, Key: int32(key)}
	status := w.get(key)
	c.End = w.Rec.Now()
	switch {
	case status == http.StatusOK:
		c.Reason = authz.Allowed
	case status == http.StatusUnauthorized:
		c.Reason = authz.RecordUnreadable // some flag: the body would tell which
	case status == http.StatusServiceUnavailable:
		c.Reason = authz.Stale
	default:
		c.Failed = true
	}
	s.Check(c)
	return status
}

func (w *World) get(key int) int {
	req, err := http.NewRequest(http.MethodGet, w.Envoy.URL()+"/weather", nil)
	if err != nil {
		return 0
	}
	req.Header.Set("x-api-key", w.Keys[key].Name)
	resp, err := w.http.Do(req)
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// --- the end -----------------------------------------------------------------

// finish stops what runs, and returns the history with what etcd itself has to
// say.
func (w *World) finish() *History {
	w.state.Lock()
	loads := w.state.loads
	w.state.Unlock()
	for _, l := range loads {
		l.Stop()
	}
	h := w.Rec.History()
	ctx, cancel := context.WithTimeout(w.T.Context(), patience)
	defer cancel()
	resp, err := w.Client.Get(ctx, w.Space.Watched(), clientv3.WithPrefix())
	if err != nil {
		w.T.Errorf("read etcd at the end: %v: a scenario leaves an etcd that answers", err)
		return h
	}
	h.Final = map[string]Event{}
	for _, kv := range resp.Kvs {
		h.Final[string(kv.Key)] = Event{Path: string(kv.Key), Value: string(kv.Value), Revision: kv.ModRevision}
	}
	if h.Events, err = w.events(ctx, w.setup, resp.Header.Revision); err != nil {
		w.T.Logf("etcd's own history: %v", err)
	}
	h.EventsFrom = w.setup
	return h
}

// events are etcd's own history, after one revision and up to another.
func (w *World) events(ctx context.Context, after, until int64) ([]Event, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events := []Event{}
	ch := w.Client.Watch(ctx, w.Space.Watched(), clientv3.WithPrefix(), clientv3.WithRev(after+1))
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case r, ok := <-ch:
			if err := r.Err(); err != nil || !ok {
				return nil, fmt.Errorf("read it: %w", errors.Join(err, ctx.Err()))
			}
			for _, ev := range r.Events {
				events = append(events, Event{Path: string(ev.Kv.Key), Value: string(ev.Kv.Value), Deleted: ev.Type == clientv3.EventTypeDelete, Revision: ev.Kv.ModRevision})
			}
			if r.IsProgressNotify() && r.Header.Revision >= until {
				return events, nil
			}
		case <-tick.C: // dropped in silence while events are under way
			_ = w.Client.RequestProgress(ctx)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// violations that the scenario found itself.
func (w *World) violations() []Violation {
	w.state.Lock()
	defer w.state.Unlock()
	return w.state.found
}

// without the consumer keys, for what is printed.
func (w *World) without(s string) string {
	for _, k := range w.Keys {
		s = strings.ReplaceAll(s, k.Name, fmt.Sprintf("(key %d)", k.Index))
	}
	return s
}
