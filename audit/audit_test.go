package audit_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"keygate/audit"
	"keygate/authz"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore/embedded"
	"keygate/statestore/keyspace"
)

// The test binary is also the etcd that a restore starts ("etcd").
func TestMain(m *testing.M) {
	etcdtest.Reexec()
	if len(os.Args) > 1 && os.Args[1] == "etcd" {
		flags := flag.NewFlagSet("etcd", flag.ExitOnError)
		dir, quota := flags.String("data-dir", "", ""), flags.Int64("etcd-quota", 0, "")
		_ = flags.Parse(os.Args[2:]) // ends the process on an error
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		os.Exit(embedded.ExitCode(embedded.Serve(ctx, embedded.Config{DataDir: *dir, QuotaBytes: *quota, Logger: slog.New(slog.DiscardHandler)}, nil)))
	}
	goleak.VerifyTestMain(m)
}

const (
	org    = "acme"
	status = "/keygate/acme/apps/a1/status"
	// patience of a wait that ends much sooner.
	patience = time.Minute
)

// store is a real etcd and the space in it.
type store struct {
	t     testing.TB
	etcd  *etcdtest.Etcd
	kv    *clientv3.Client
	space keyspace.Space
}

func newStore(t testing.TB) *store {
	t.Helper()
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	e := etcdtest.Start(t)
	return &store{t: t, etcd: e, kv: e.Client(t), space: space}
}

func (s *store) ctx() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	s.t.Cleanup(cancel)
	return ctx
}

func (s *store) follower() *audit.Follower {
	return audit.NewFollower(audit.FollowerConfig{Client: s.kv, Space: s.space, Logger: slog.New(slog.NewTextHandler(s.t.Output(), nil))})
}

// run starts a follower; the result ends it and waits.
func (s *store) run(f *audit.Follower) (stop func()) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("run: got %v, want nil", err)
		}
	})
	s.t.Cleanup(stop)
	return stop
}

// begun runs a follower until the chain has begun.
func (s *store) begun(f *audit.Follower) (stop func()) {
	s.t.Helper()
	stop = s.run(f)
	s.await("the chain to begin", func() bool { return s.get(s.space.ChainHead()) != "" })
	return stop
}

// await a condition, which is asked again whenever anything changed in etcd.
func (s *store) await(what string, ok func() bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	resp, err := s.kv.Get(ctx, "/", clientv3.WithLimit(1))
	if err != nil {
		s.t.Fatal(err)
	}
	changes := s.kv.Watch(ctx, "/", clientv3.WithPrefix(), clientv3.WithRev(resp.Header.Revision+1))
	for !ok() {
		if _, open := <-changes; !open || ctx.Err() != nil {
			s.t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

// op is one operation of a transaction without comparisons; the value "-"
// deletes.
func op(path, value string) clientv3.Op {
	if value == "-" {
		return clientv3.OpDelete(path)
	}
	return clientv3.OpPut(path, value)
}

// put writes as etcdctl does, pairs of path and value in one transaction, and
// returns its revision.
func (s *store) put(pairs ...string) int64 {
	s.t.Helper()
	var ops []clientv3.Op
	for i := 0; i < len(pairs); i += 2 {
		ops = append(ops, op(pairs[i], pairs[i+1]))
	}
	resp, err := s.kv.Txn(s.ctx()).Then(ops...).Commit()
	if err != nil {
		s.t.Fatalf("put: %v", err)
	}
	return resp.Header.Revision
}

// record of keygate's own.
func record(name string) audit.Record {
	now := time.Now()
	return audit.Record{
		Version: audit.Version, ID: audit.NewID(now), At: now.UnixMilli(), Organization: org,
		Actor: audit.Actor{Kind: audit.ActorCLI, Name: name}, Action: "revoke", Object: status,
	}
}

// change writes a flag as keygate does, with its record.
func (s *store) change(value string) (audit.Record, int64) {
	s.t.Helper()
	r := record("ada")
	return r, s.put(s.status(), value, s.path(r), r.Value())
}

// status of an app.
func (s *store) status() string { return s.space.Watched() + "acme/apps/a1/status" }

func (s *store) path(r audit.Record) string { return s.space.Audit(r.Organization) + r.ID }

func (s *store) get(path string) string {
	s.t.Helper()
	resp, err := s.kv.Get(s.ctx(), path)
	if err != nil {
		s.t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return ""
	}
	return string(resp.Kvs[0].Value)
}

// head of the chain and its hash.
func (s *store) head() (to int64, hash string) {
	s.t.Helper()
	if value := s.get(s.space.ChainHead()); value != "" {
		return headOf(s.t, []byte(value))
	}
	return 0, ""
}

// headOf a stored head; what a test has broken has neither.
func headOf(t testing.TB, value []byte) (to int64, hash string) {
	t.Helper()
	var h struct {
		To   int64  `json:"to"`
		Hash string `json:"hash"`
	}
	if err := json.Unmarshal(value, &h); err != nil {
		t.Fatal(err)
	}
	return h.To, h.Hash
}

// settled waits until the chain covers rev and every audit record.
func (s *store) settled(rev int64) {
	s.t.Helper()
	s.await(fmt.Sprintf("the chain to cover revision %d and every record", rev), func() bool {
		// Both of one revision: a link comes with records of its own.
		resp, err := s.kv.Txn(s.ctx()).Then(clientv3.OpGet(s.space.Audits(), clientv3.WithPrefix(), clientv3.WithKeysOnly()), clientv3.OpGet(s.space.ChainHead())).Commit()
		if err != nil {
			s.t.Fatal(err)
		}
		want := rev
		for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
			want = max(want, kv.ModRevision)
		}
		var to int64
		for _, kv := range resp.Responses[1].GetResponseRange().Kvs {
			to, _ = headOf(s.t, kv.Value)
		}
		return to >= want
	})
}

func (s *store) verify(opts audit.VerifyOptions) (audit.Report, error) {
	s.t.Helper()
	return audit.Verify(s.ctx(), s.kv, s.space, opts)
}

func (s *store) mustVerify() audit.Report {
	s.t.Helper()
	r, err := s.verify(audit.VerifyOptions{})
	if err != nil {
		s.t.Fatalf("verify: %v", err)
	}
	return r
}

func (s *store) list(q audit.Query) audit.Page {
	s.t.Helper()
	p, err := audit.List(s.ctx(), s.kv, s.space, org, q)
	if err != nil {
		s.t.Fatalf("list %+v: %v", q, err)
	}
	return p
}

// externals are the records of changes from outside, by their revisions.
func (s *store) externals() map[int64][]audit.Record {
	s.t.Helper()
	all := map[int64][]audit.Record{}
	for q := (audit.Query{Actor: audit.ActorExternal, PageSize: audit.MaxPageSize}); ; {
		p := s.list(q)
		for _, r := range p.Records {
			all[r.Revision] = append(all[r.Revision], r)
		}
		if q.PageToken = p.NextPageToken; q.PageToken == "" {
			return all
		}
	}
}

func value(p *string) string {
	if p == nil {
		return "absent"
	}
	return *p
}

func TestExternalChange(t *testing.T) {
	s := newStore(t)
	key := authz.KeyID(sha256.Sum256([]byte("canary-consumer-key"))).String()
	credential := "/keygate/acme/keys/" + key + "/credential"
	s.put(status, "approved")
	s.begun(s.follower())
	tests := []struct {
		name           string
		do             []string
		action, object string
		changes        []string // path, before, after
	}{
		{"put", []string{status, "revoked"}, "put", status, []string{status, "approved", "revoked"}},
		{"create", []string{credential, `{"v":1,"sealedKey":"v1:k:AAAA","appId":"a1"}`}, "put", credential,
			[]string{credential, "absent", `{"v":1,"sealedKey":"(sealed)","appId":"a1"}`}},
		{"delete", []string{status, "-"}, "delete", status, []string{status, "revoked", "absent"}},
		{"two", []string{credential, "-", status, "approved"}, "put", credential,
			[]string{credential, `{"v":1,"sealedKey":"(sealed)","appId":"a1"}`, "absent", status, "absent", "approved"}},
		{"a raw key in the place of its id", []string{"/keygate/acme/keys/canary-consumer-key/status", "approved"}, "put", "/keygate/acme/keys/(not an id)/status",
			[]string{"/keygate/acme/keys/(not an id)/status", "absent", "approved"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rev := s.put(tt.do...)
			s.settled(rev)
			got := s.externals()[rev]
			if len(got) != 1 {
				t.Fatalf("got %d records of revision %d, want 1: %+v", len(got), rev, got)
			}
			r := got[0]
			var changes []string
			for _, c := range r.Changes {
				changes = append(changes, c.Path, value(c.Before), value(c.After))
			}
			if r.Action != tt.action || r.Object != tt.object || fmt.Sprint(changes) != fmt.Sprint(tt.changes) || r.Actor.Kind != audit.ActorExternal {
				t.Errorf("got %+v with %q, want %s of %s with %q", r, changes, tt.action, tt.object, tt.changes)
			}
		})
	}
	token := "/keygate.tokens/" + key
	for _, owner := range []authz.Organization{org, keyspace.AllOrganizations} {
		rev := s.put(token, fmt.Sprintf(`{"v":1,"organization":%q,"role":"admin"}`, owner))
		s.settled(rev)
		p, err := audit.List(s.ctx(), s.kv, s.space, owner, audit.Query{Object: token})
		if err != nil || len(p.Records) != 1 || p.Records[0].Revision != rev {
			t.Errorf("a token of %s: got %+v, %v, want its record", owner, p, err)
		}
		s.settled(s.put(token, "-"))
	}
	// What is not covered, and what has a record, is no change from outside.
	before := len(s.externals())
	rev := s.put("/keygate/acme/.barrier", "1", "/keygate.index/acme/x", "y", "/keygate.used/t", "1", "/keygate.intent/acme/i", "1")
	_, rev2 := s.change("approved")
	s.settled(rev2)
	if got := s.externals(); len(got) != before || len(got[rev])+len(got[rev2]) > 0 {
		t.Errorf("got %d records from outside, want %d", len(got), before)
	}
	report := s.mustVerify()
	if want := len(s.dump(s.space.Audits())); report.Unchained != 0 || report.Unproven != 0 || report.Behind != 0 || report.Records != want {
		t.Errorf("got %+v, want %d records, all of them proven", report, want)
	}
	for path, text := range s.dump("/keygate.") {
		if strings.Contains(text, "canary-consumer-key") {
			t.Errorf("%s holds the consumer key: %s", path, text)
		}
	}
}

// asked counts the questions how far the watch is.
type asked struct {
	*clientv3.Client
	questions chan struct{}
}

func (a asked) RequestProgress(ctx context.Context) error {
	err := a.Client.RequestProgress(ctx)
	select {
	case a.questions <- struct{}{}:
	default:
	}
	return err
}

// Nothing is linked because of a link, so the chain comes to rest; what touched
// nothing is linked once in a while, so that compaction leaves no gap.
func TestIdle(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	client := asked{s.kv, make(chan struct{})}
	f := audit.NewFollower(audit.FollowerConfig{Client: client, Space: s.space})
	f.SetIdle(0)
	s.begun(f)
	s.settled(s.put(status, "revoked")) // with a record of the follower's own
	to, _ := s.head()
	rev := s.put("/keygate.index/acme/x", "1")
	s.await("a link of what touched nothing", func() bool { to, _ = s.head(); return to >= rev })
	for range 3 { // two answers at least
		<-client.questions
	}
	if again, _ := s.head(); again != to {
		t.Errorf("the head went on from %d to %d, and nothing happened", to, again)
	}
	if r := s.mustVerify(); r.Behind != 0 {
		t.Errorf("got %+v, want a chain that is up to date", r)
	}
}

func (s *store) dump(prefix string) map[string]string {
	s.t.Helper()
	resp, err := s.kv.Get(s.ctx(), prefix, clientv3.WithPrefix())
	if err != nil {
		s.t.Fatal(err)
	}
	all := map[string]string{}
	for _, kv := range resp.Kvs {
		all[string(kv.Key)] = string(kv.Value)
	}
	return all
}

func TestManyOrganizationsAndChangesInOneRevision(t *testing.T) {
	s := newStore(t)
	var pairs []string
	long := `{"v":1,"x":"` + strings.Repeat("<", 6000) + `"}`
	for i := range 40 {
		pairs = append(pairs, fmt.Sprintf("/keygate/org%02d/apps/a/app", i), long)
	}
	s.begun(s.follower())
	rev := s.put(pairs...)
	s.settled(rev)
	records, shown := 0, 0
	for path, text := range s.dump(s.space.Audits()) {
		r, err := audit.Parse([]byte(text))
		if err != nil || r.Revision != rev {
			t.Errorf("%s: got revision %d, %v, want %d", path, r.Revision, err, rev)
		}
		records++
		shown += len(r.Changes)
		var more int
		if _, err := fmt.Sscanf(r.Note, "the revision made %d changes more", &more); err == nil {
			shown += more
		}
	}
	if records != 32 || shown != 40 {
		t.Errorf("got %d records of %d changes, want 32 of 40", records, shown)
	}
	// One delete of everything, as by hand.
	resp, err := s.kv.Delete(s.ctx(), "/keygate/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	s.settled(resp.Header.Revision)
	s.mustVerify()
}

func sum(s string) string {
	b := sha256.Sum256([]byte(s))
	return hex.EncodeToString(b[:])
}

// An entry and a link are what the package comment says.
func TestFormat(t *testing.T) {
	s := newStore(t)
	s.begun(s.follower())
	r, rev := s.change("revoked")
	s.settled(rev)
	resp, err := s.kv.Get(s.ctx(), s.space.ChainLink(rev), clientv3.WithRange(s.space.ChainHead()), clientv3.WithLimit(1))
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("got %v, %v", resp, err)
	}
	text := string(resp.Kvs[0].Value)
	events := fmt.Sprintf("put %d %s %s\nput %d %s %s\n", len(status), status, sum("revoked"), len(s.path(r)), s.path(r), sum(r.Value()))
	entry := fmt.Sprintf(`[%d,"%s",[["%s","%s"]]]`, rev, sum(events), s.path(r), sum(r.Value()))
	if !strings.Contains(text, `"entries":[`+entry+`]`) {
		t.Errorf("got %s, want the entry %s", text, entry)
	}
	m := regexp.MustCompile(`^(\{"v":1,"from":.*),"hash":"([0-9a-f]{64})"\}$`).FindStringSubmatch(text)
	if m == nil || sum(m[1]+"}") != m[2] {
		t.Errorf("the hash of %s is not of its text", text)
	}
}

func TestTimeOf(t *testing.T) {
	s := newStore(t)
	if _, ok, err := audit.TimeOf(s.ctx(), s.kv, s.space, 1); ok || err != nil {
		t.Errorf("without a chain: got %v, %v, want nothing", ok, err)
	}
	old := s.put(status, "approved")
	began := time.Now().UnixMilli()
	s.begun(s.follower())
	_, rev := s.change("revoked")
	s.settled(rev)
	ended := time.Now().UnixMilli()
	if ms, ok, err := audit.TimeOf(s.ctx(), s.kv, s.space, rev); !ok || err != nil || ms < began || ms > ended {
		t.Errorf("got %d, %v, %v, want %d to %d", ms, ok, err, began, ended)
	}
	if ms, ok, err := audit.TimeOf(s.ctx(), s.kv, s.space, old); ok || err != nil {
		t.Errorf("older than the chain: got %d, %v, %v, want nothing", ms, ok, err)
	}
	if ms, ok, err := audit.TimeOf(s.ctx(), s.kv, s.space, rev+1000); ok || err != nil {
		t.Errorf("newer than the chain: got %d, %v, %v, want nothing", ms, ok, err)
	}
}

// Two followers that both think that they lead make one chain.
func TestTwoFollowers(t *testing.T) {
	s := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	var followers sync.WaitGroup
	for range 2 {
		f := s.follower()
		followers.Go(func() {
			for ctx.Err() == nil {
				if err := f.Follow(ctx); ctx.Err() == nil && !audit.Again(err) {
					t.Errorf("follow: %v", err)
				}
			}
		})
	}
	defer followers.Wait()
	defer cancel()
	s.await("the chain to begin", func() bool { to, _ := s.head(); return to > 0 })
	outside := map[int64]bool{}
	rev := int64(0)
	for i := range 300 {
		if i%3 == 0 {
			rev = s.put(status, fmt.Sprint(i))
			outside[rev] = true
		} else {
			_, rev = s.change(fmt.Sprint(i))
		}
	}
	s.settled(rev)
	s.once(outside)
	report := s.mustVerify()
	if report.Records != 300 || report.Revisions < 300 {
		t.Errorf("got %+v, want 300 records", report)
	}
}

// once checks that exactly these revisions have a record from outside.
func (s *store) once(revisions map[int64]bool) {
	s.t.Helper()
	got := s.externals()
	for rev := range revisions {
		if len(got[rev]) != 1 {
			s.t.Errorf("revision %d has %d records from outside, want 1", rev, len(got[rev]))
		}
	}
	if len(got) != len(revisions) {
		s.t.Errorf("got records of %d revisions from outside, want %d", len(got), len(revisions))
	}
}

// A follower that is ended at any instant leaves a valid chain, and nothing is
// recorded twice or lost.
func TestEndedAtAnyInstant(t *testing.T) {
	s := newStore(t)
	stop := s.begun(s.follower())
	outside := map[int64]bool{}
	for range 20 {
		for i := range rand.IntN(40) {
			if i%2 == 0 {
				outside[s.put(status, fmt.Sprint("x", i))] = true
			} else {
				s.change(fmt.Sprint("y", i))
			}
		}
		stop() // wherever it is
		for range rand.IntN(5) {
			outside[s.put(status, fmt.Sprint("z", rand.Int()))] = true
		}
		stop = s.run(s.follower())
	}
	rev := s.put(status, "last")
	outside[rev] = true
	s.settled(rev)
	s.once(outside)
	s.mustVerify()
}

// While one leads the other waits, and takes over when it ends or dies.
func TestElection(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	a, b := s.follower(), s.follower()
	// The lease of a leader that died.
	lease, err := s.kv.Grant(s.ctx(), 2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.Put(s.ctx(), a.LeaderPath(), "dead", clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	stop := s.begun(a)
	if st := a.Status(); !st.Leader {
		t.Errorf("the first: got %+v, want the leader", st)
	}
	s.run(b)
	leader := s.get(a.LeaderPath())
	for range 20 {
		_, rev := s.change("revoked")
		s.settled(rev)
	}
	if got := s.get(a.LeaderPath()); got != leader || b.Status().Leader {
		t.Errorf("the leader changed from %q to %q", leader, got)
	}
	stop()
	if a.Status().Leader {
		t.Error("the first leads after its end")
	}
	_, rev := s.change("approved")
	s.settled(rev)
	s.await("the status of the second", func() bool {
		st := b.Status()
		if st.Leader && st.Head >= rev && st.Lag == 0 && st.Err == nil && st.Hash != "" {
			return true
		}
		s.put("/keygate.index/acme/tick", fmt.Sprint(st)) // asks again
		return false
	})
	s.mustVerify()
}

func TestGap(t *testing.T) {
	s := newStore(t)
	stop := s.begun(s.follower())
	_, rev := s.change("revoked")
	s.settled(rev)
	stop()
	s.put(status, "approved")
	lost, _ := s.change("revoked")
	rev = s.put("/keygate.index/acme/x", "y") // the newest, and so what is compacted
	if _, err := s.kv.Compact(s.ctx(), rev); err != nil {
		t.Fatal(err)
	}
	s.run(s.follower())
	_, rev = s.change("approved")
	s.settled(rev)
	report := s.mustVerify()
	if len(report.Gaps) != 1 || report.Unproven != 1 || report.Records != 2 {
		t.Errorf("got %+v, want one gap, 1 record in it and 2 others", report)
	}
	// The record in the gap is not proven, and shown all the same.
	if p := s.list(audit.Query{}); len(p.Records) != 3 || p.Records[1].ID != lost.ID {
		t.Errorf("got %+v, want three records", p.Records)
	}
}

// Far behind, the events come piece by piece, and none is lost.
func TestCatchUpInPieces(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	s.begun(s.follower())()
	rev := int64(0)
	outside := map[int64]bool{}
	for i := range 1500 {
		if i%100 == 0 {
			rev = s.put(status, fmt.Sprint(i))
			outside[rev] = true
		} else {
			_, rev = s.change(fmt.Sprint(i))
		}
	}
	f := s.follower()
	f.SetBehind(50)
	s.run(f)
	s.settled(rev)
	s.once(outside)
	if r := s.mustVerify(); r.Records != 1500 || r.Links > 20 {
		t.Errorf("got %+v, want 1500 records in a few links", r)
	}
}

// A full etcd takes deletes, and no link; to get space it is compacted. What was
// deleted meanwhile is recorded all the same.
func TestFullEtcd(t *testing.T) {
	s := newStore(t)
	s.kv = etcdtest.StartProcess(t, etcdtest.Quota(1<<20)).Client(t)
	s.put(status, "approved")
	f := s.follower()
	s.begun(f)
	for i := 0; ; i++ {
		if _, err := s.kv.Put(s.ctx(), "/filler", strings.Repeat("x", 64<<10)); errors.Is(err, rpctypes.ErrNoSpace) {
			break
		} else if err != nil || i > 100 {
			t.Fatalf("fill etcd: %v after %d", err, i)
		}
	}
	resp, err := s.kv.Delete(s.ctx(), status)
	if err != nil {
		t.Fatal(err)
	}
	rev := resp.Header.Revision
	deadline := time.Now().Add(patience)
	for !errors.Is(f.Status().Err, rpctypes.ErrNoSpace) { // it has seen the delete
		if time.Now().After(deadline) {
			t.Fatalf("got %+v, want %v", f.Status(), rpctypes.ErrNoSpace)
		}
		s.get(status)
	}
	last, err := s.kv.Delete(s.ctx(), "/filler")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.Compact(s.ctx(), last.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.Defragment(s.ctx(), s.kv.Endpoints()[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.AlarmDisarm(s.ctx(), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	s.settled(rev)
	s.once(map[int64]bool{rev: true})
	if r := s.mustVerify(); len(r.Gaps) > 0 {
		t.Errorf("got %+v, want no gap", r)
	}
}

// A compaction of what was seen, or of what touched nothing, makes no gap.
func TestNoGap(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	stop := s.begun(s.follower())
	_, rev := s.change("revoked")
	s.settled(rev)
	stop()
	head, _ := s.head()
	s.run(s.follower()) // begins with a question how far the watch is
	s.await("a link up to the leader's own write", func() bool { to, _ := s.head(); return to > head })
	resp, err := s.kv.Get(s.ctx(), s.space.ChainHead())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.Compact(s.ctx(), resp.Header.Revision); err != nil {
		t.Fatal(err)
	}
	_, rev = s.change("approved")
	s.settled(rev)
	if r := s.mustVerify(); len(r.Gaps) != 0 || r.Records != 2 {
		t.Errorf("got %+v, want no gap and 2 records", r)
	}
}

// behindCompaction has a first watch that says how far it is, and then that all
// of it is compacted: so ends one that was cut off for a while.
type behindCompaction struct {
	*clientv3.Client
	once *sync.Once
	told clientv3.WatchResponse
}

func (c behindCompaction) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) (w clientv3.WatchChan) {
	c.once.Do(func() {
		updates := make(chan clientv3.WatchResponse, 2)
		updates <- c.told
		end := c.told
		end.Canceled, end.CompactRevision = true, c.told.Header.Revision
		updates <- end
		w = updates
	})
	if w == nil {
		w = c.Client.Watch(ctx, key, opts...)
	}
	return w
}

func TestCompactedAfterProgress(t *testing.T) {
	s := newStore(t)
	s.begun(s.follower())()
	rev := s.put("/keygate.index/acme/x", "1")
	resp, err := s.kv.Get(s.ctx(), "/")
	if err != nil {
		t.Fatal(err)
	}
	client := behindCompaction{s.kv, new(sync.Once), clientv3.WatchResponse{Header: resp.Header}}
	f := audit.NewFollower(audit.FollowerConfig{Client: client, Space: s.space})
	f.SetIdle(math.MaxInt64) // no link because of the progress
	s.run(f)
	s.settled(rev)
	if r := s.mustVerify(); len(r.Gaps) > 0 {
		t.Errorf("got %+v, want no gap: everything was seen", r)
	}
}

// Copied key by key into another cluster the revisions are others, and the
// chain is worth nothing there but for the head that is noted.
func TestCopiedIntoAnotherCluster(t *testing.T) {
	for _, before := range []int{0, 40} { // so that the new cluster is ahead of the old one, or behind
		t.Run(fmt.Sprint(before), func(t *testing.T) {
			old := newStore(t)
			for i := range before {
				old.put("/other", fmt.Sprint(i))
			}
			stop := old.begun(old.follower())
			_, rev := old.change("revoked")
			old.settled(rev)
			stop()
			_, hash := old.head()
			s := newStore(t)
			for path, value := range old.dump("/keygate") {
				s.put(path, value)
			}
			for range 2 {
				stop := s.run(s.follower())
				s.await("the chain to begin again", func() bool { _, got := s.head(); return got != hash })
				stop() // the next one goes on
			}
			s.run(s.follower())
			_, rev = s.change("approved")
			s.settled(rev)
			report := s.mustVerify()
			if len(report.Notes) != 1 || !strings.Contains(report.Notes[0], hash) || report.Records != 1 || report.Unproven != 1 {
				t.Errorf("got %+v, want a note with the old head %s", report, hash)
			}
		})
	}
}

// A snapshot that is restored into a new cluster keeps its revisions, and the
// chain goes on.
func TestRestoredSnapshot(t *testing.T) {
	old := newStore(t)
	stop := old.begun(old.follower())
	r, rev := old.change("revoked")
	old.settled(rev)
	stop()
	_, hash := old.head()
	file := filepath.Join(t.TempDir(), "snapshot")
	if _, err := embedded.SaveSnapshot(t.Context(), old.kv, file); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(etcdtest.DataDir(t), "d")
	if _, err := embedded.Restore(t.Context(), embedded.RestoreConfig{Snapshot: file, DataDir: dir, Space: old.space, Yes: true}); err != nil {
		t.Fatal(err)
	}
	s := &store{t: t, kv: serve(t, dir), space: old.space}
	s.run(s.follower())
	s.await("the chain to go on", func() bool { _, got := s.head(); return got != hash })
	_, rev = s.change("approved")
	s.settled(rev)
	report := s.mustVerify()
	if report.Records != 2 || len(report.Notes) != 1 || !strings.Contains(report.Notes[0], hash) {
		t.Errorf("got %+v, want 2 records and a note with the old head %s", report, hash)
	}
	// What was proven before still is.
	s.put(s.path(r), "-")
	if _, err := s.verify(audit.VerifyOptions{}); !errors.Is(err, audit.ErrTampered) {
		t.Errorf("a record of before is deleted: got %v, want %v", err, audit.ErrTampered)
	}
}

// serve runs an etcd on a directory until the test ends.
func serve(t *testing.T, dir string) *clientv3.Client {
	t.Helper()
	endpoint, err := embedded.Endpoint(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- embedded.Serve(ctx, embedded.Config{DataDir: dir, Logger: slog.New(slog.DiscardHandler)}, func() { close(ready) })
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	select {
	case <-ready:
	case err := <-done:
		done <- err
		t.Fatalf("serve %s: %v", dir, err)
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// scene is a chain of a few links, in a space of its own.
type scene struct {
	*store
	f       *audit.Follower
	records []audit.Record
	links   []string // by path, in order
	outside int64    // the revision of a change from outside, the last one
	noted   string   // the head
}

func (s *store) scene(t *testing.T, prefix string) *scene {
	space, err := keyspace.New(prefix)
	if err != nil {
		t.Fatal(err)
	}
	c := &scene{store: &store{t: t, etcd: s.etcd, kv: s.kv, space: space}}
	c.f = c.follower()
	stop := c.begun(c.f)
	for i := range 4 {
		r, rev := c.change(fmt.Sprint(i))
		c.settled(rev) // so that each has a link of its own
		c.records = append(c.records, r)
	}
	c.outside = c.put(c.status(), "approved")
	c.settled(c.outside)
	stop()
	c.noted = c.mustVerify().Head
	resp, err := c.kv.Get(c.ctx(), space.ChainLink(0), clientv3.WithRange(space.ChainHead()))
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		c.links = append(c.links, string(kv.Key))
	}
	return c
}

// link of the i-th record, and its text.
func (c *scene) link(i int) (path, text string) {
	c.t.Helper()
	for _, path := range c.links {
		if text := c.get(path); strings.Contains(text, c.records[i].ID) {
			return path, text
		}
	}
	c.t.Fatalf("no link has record %d", i)
	return "", ""
}

func TestTampering(t *testing.T) {
	s := newStore(t)
	replaced := func(path, old, now string) func(*scene) (string, []string) {
		return func(c *scene) (string, []string) {
			at := path
			if at == "" {
				at, _ = c.link(1)
			} else {
				at = c.space.ChainHead()
			}
			text := strings.Replace(c.get(at), old, now, 1)
			return at, []string{at, text}
		}
	}
	edit := func(c *scene) (string, []string) {
		r := c.records[1]
		r.Actor.Name = "eve"
		return c.path(r), []string{c.path(r), r.Value()}
	}
	remove := func(c *scene) (string, []string) {
		return c.path(c.records[2]), []string{c.path(c.records[2]), "-"}
	}
	forge := func(change func(*scene, *audit.Record)) func(*scene) (string, []string) {
		return func(c *scene) (string, []string) {
			r := record("eve")
			change(c, &r)
			return c.path(r), []string{c.path(r), r.Value()}
		}
	}
	headPath := func(text string) func(*scene) (string, []string) {
		return func(c *scene) (string, []string) {
			return c.space.ChainHead(), []string{c.space.ChainHead(), text}
		}
	}
	tests := []struct {
		name   string
		follow bool // a follower runs meanwhile, and goes on after it
		// do returns where the finding is, and what is put or, with "-", deleted
		do   func(*scene) (path string, pairs []string)
		text string // of the finding; if it begins with a blank, its path may be another
	}{
		{"edit a record", false, edit, "was written at"},
		{"edit a record under a follower", true, edit, "written again"},
		{"delete a record", false, remove, "is gone"},
		{"delete a record under a follower", true, remove, "is gone"},
		{"edit what a link says of a record", false, func(c *scene) (string, []string) {
			link, text := c.link(2)
			r := c.records[2]
			return c.path(r), []string{link, strings.Replace(text, sum(r.Value()), sum("x"), 1)}
		}, "its text is not"},
		{"take a record out of a link", false, func(c *scene) (string, []string) {
			link, text := c.link(2)
			r := c.records[2]
			return c.path(r), []string{link, strings.Replace(text, fmt.Sprintf(`,[["%s","%s"]]`, c.path(r), sum(r.Value())), "", 1)}
		}, "no such record"},
		{"put a record of the revision of another", true, forge(func(c *scene, r *audit.Record) {
			_, text := c.link(3)
			if _, err := fmt.Sscanf(text[strings.Index(text, `"entries":`):], `"entries":[[%d,`, &r.Revision); err != nil {
				t.Error(err)
			}
		}), "had its own record"},
		{"put a record as if a follower had", true, forge(func(c *scene, r *audit.Record) {
			r.Actor, r.Revision = audit.Actor{Kind: audit.ActorExternal}, c.outside
		}), "none did"},
		{"put a back-dated record", true, forge(func(_ *scene, r *audit.Record) {
			past := time.Now().Add(-time.Hour)
			r.ID, r.At = audit.NewID(past), past.UnixMilli()
		}), "made at"},
		{"put a record with the id of an earlier time", true, forge(func(_ *scene, r *audit.Record) {
			r.ID = audit.NewID(time.Now().Add(-time.Hour))
		}), "made at"},
		{"put a record of later", true, forge(func(_ *scene, r *audit.Record) {
			r.At += time.Hour.Milliseconds()
		}), "made at"},
		{"put a record of a revision to come", true, forge(func(_ *scene, r *audit.Record) { r.Revision = 1 << 40 }), "not before it"},
		{"put what is no record", true, func(c *scene) (string, []string) {
			path := c.space.Audit(org) + "x"
			return path, []string{path, "y"}
		}, "audit record"},
		{"copy a record to another name", true, func(c *scene) (string, []string) {
			path := c.space.Audit("other") + c.records[1].ID
			return path, []string{path, c.records[1].Value()}
		}, "it says that it is record"},
		{"edit a link", false, replaced("", `"at":`, `"at":1`), "its hash is"},
		{"edit a link under a follower", true, replaced("", `"at":`, `"at":1`), "its hash is"},
		{"add to a link", false, replaced("", `,"prev"`, `,"x":1,"prev"`), "not in the form"},
		{"write a link again", false, replaced("", "", ""), "written 2 times"},
		{"delete a link", false, func(c *scene) (string, []string) {
			path, _ := c.link(1)
			return path, []string{path, "-"}
		}, " one was altered, deleted or inserted"},
		{"swap links", false, func(c *scene) (string, []string) {
			a, first := c.link(1)
			b, second := c.link(2)
			return a, []string{a, second, b, first}
		}, " place of another"},
		{"delete the first link", false, func(c *scene) (string, []string) {
			return c.links[0], []string{c.links[0], "-"}
		}, " no genesis"},
		{"delete the last link", false, func(c *scene) (string, []string) {
			return c.space.ChainHead(), []string{c.links[len(c.links)-1], "-"}
		}, "the last link is"},
		{"delete the head", false, headPath("-"), "is gone"},
		{"delete the head under a follower", true, headPath("-"), " altered, deleted or inserted"},
		{"break the head", false, headPath("{}"), "not in the form"},
		{"break the head under a follower", true, headPath("{}"), " altered, deleted or inserted"},
		{"edit the head", false, replaced("head", `"to":`, `"to":999`), "the last link is"},
		{"edit the head under a follower", true, replaced("head", `"to":`, `"to":999`), " altered, deleted or inserted"},
		{"write the head again", false, replaced("head", "", ""), "the last link at"},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := s.scene(t, fmt.Sprintf("/t%d", i))
			if tt.follow {
				c.run(c.f)
				c.await("a leader", func() bool { return c.get(c.f.LeaderPath()) != "" })
			}
			path, pairs := tt.do(c)
			c.put(pairs...)
			if tt.follow {
				_, hash, _ := strings.Cut(c.noted, ":")
				_, rev := c.change("later")
				c.await("a new head", func() bool { _, got := c.head(); return got != "" && got != hash })
				c.settled(rev)
			}
			report, err := c.verify(audit.VerifyOptions{Head: c.noted})
			if !errors.Is(err, audit.ErrTampered) {
				t.Fatalf("got %v, want %v: %+v", err, audit.ErrTampered, report)
			}
			for _, f := range report.Findings {
				if strings.Contains(f.Problem, strings.TrimSpace(tt.text)) && (tt.text[0] == ' ' || f.Path == path) {
					return
				}
			}
			t.Errorf("got %v, want %q at %s", report.Findings, tt.text, path)
		})
	}
	t.Run("a whole new chain", func(t *testing.T) {
		t.Parallel()
		c := s.scene(t, "/new")
		_, pairs := remove(c)
		c.put(pairs...)
		if _, err := c.kv.Delete(c.ctx(), c.space.Chain(), clientv3.WithPrefix()); err != nil {
			t.Fatal(err)
		}
		c.begun(c.f)()
		if r, err := c.verify(audit.VerifyOptions{}); err != nil {
			t.Errorf("without the noted head: %v, want nil: it is consistent: %+v", err, r)
		}
		if _, err := c.verify(audit.VerifyOptions{Head: c.noted}); !errors.Is(err, audit.ErrTampered) {
			t.Errorf("with the noted head: got %v, want %v", err, audit.ErrTampered)
		}
	})
	t.Run("nothing", func(t *testing.T) {
		t.Parallel()
		c := s.scene(t, "/same")
		if _, err := c.verify(audit.VerifyOptions{Head: c.noted}); err != nil {
			t.Errorf("got %v, want nil", err)
		}
		for _, head := range []string{"x", "12", "12:ab", c.noted + "0"} {
			if _, err := c.verify(audit.VerifyOptions{Head: head}); err == nil || errors.Is(err, audit.ErrTampered) {
				t.Errorf("head %q: got %v, want an error about it", head, err)
			}
		}
	})
}

func TestList(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	begin := time.UnixMilli(1_700_000_000_000)
	var ids []string
	for i := range 57 {
		at := begin.Add(time.Duration(i*i) * time.Minute)
		r := audit.Record{
			Version: audit.Version, ID: audit.NewID(at), At: at.UnixMilli(), Organization: org,
			Actor: audit.Actor{Kind: audit.ActorToken, Name: []string{"ada", "bob"}[i%2]}, Action: []string{"revoke", "approve", "create"}[i%3],
			Object: fmt.Sprintf("/keygate/acme/apps/a%d/status", i%5),
		}
		if i == 7 {
			r.Changes = []audit.Change{{Path: "/keygate/acme/developers/d7/status"}}
		}
		rev := s.put(s.path(r), r.Value())
		if p := s.list(audit.Query{Reverse: true, PageSize: 1}); p.Records[0].Revision != rev || p.Records[0].ID != r.ID {
			t.Fatalf("got %+v, want revision %d", p.Records[0], rev)
		}
		ids = append(ids, r.ID)
	}
	s.put(s.space.Audit("acme2")+ids[0], "another organization's")
	tests := []struct {
		name string
		q    audit.Query
		want func(i int) bool
	}{
		{"all", audit.Query{}, func(int) bool { return true }},
		{"from", audit.Query{From: begin.Add(25 * time.Minute)}, func(i int) bool { return i >= 5 }},
		{"to", audit.Query{To: begin.Add(25 * time.Minute)}, func(i int) bool { return i < 5 }},
		{"both", audit.Query{From: begin.Add(25 * time.Minute), To: begin.Add(100 * time.Minute)}, func(i int) bool { return i >= 5 && i < 10 }},
		{"none", audit.Query{From: begin.Add(100 * time.Minute), To: begin}, func(int) bool { return false }},
		{"action", audit.Query{Action: "approve"}, func(i int) bool { return i%3 == 1 }},
		{"object", audit.Query{Object: "/keygate/acme/apps/a3/"}, func(i int) bool { return i%5 == 3 }},
		{"what it changed", audit.Query{Object: "/keygate/acme/developers/d7/"}, func(i int) bool { return i == 7 }},
		{"actor", audit.Query{Actor: "bob"}, func(i int) bool { return i%2 == 1 }},
		{"kind of actor", audit.Query{Actor: "external"}, func(int) bool { return false }},
		{"several", audit.Query{Actor: "bob", Action: "revoke", To: begin.Add(1000 * time.Minute)}, func(i int) bool { return i%2 == 1 && i%3 == 0 && i*i < 1000 }},
	}
	for _, tt := range tests {
		for _, reverse := range []bool{false, true} {
			for _, size := range []int{1, 4, 19, 57, 1000} {
				t.Run(fmt.Sprintf("%s/reverse=%v/%d", tt.name, reverse, size), func(t *testing.T) {
					var want, got []string
					for i, id := range ids {
						if tt.want(i) && !reverse {
							want = append(want, id)
						} else if tt.want(i) {
							want = append([]string{id}, want...)
						}
					}
					q := tt.q
					q.Reverse, q.PageSize = reverse, size
					for {
						p := s.list(q)
						if len(p.Records) > size {
							t.Fatalf("got %d records on a page of %d", len(p.Records), size)
						}
						for _, r := range p.Records {
							got = append(got, r.ID)
						}
						if q.PageToken = p.NextPageToken; q.PageToken == "" {
							break
						}
					}
					if fmt.Sprint(got) != fmt.Sprint(want) {
						t.Errorf("got %d records %v, want %d %v", len(got), got, len(want), want)
					}
				})
			}
		}
	}

	token := s.list(audit.Query{PageSize: 2}).NextPageToken
	for name, q := range map[string]audit.Query{
		"size":            {PageSize: audit.MaxPageSize + 1},
		"negative size":   {PageSize: -1},
		"token":           {PageToken: "!"},
		"token of JSON":   {PageToken: "e30"},
		"another query":   {PageToken: token, Action: "revoke"},
		"other direction": {PageToken: token, Reverse: true},
	} {
		if _, err := audit.List(s.ctx(), s.kv, s.space, org, q); !errors.Is(err, audit.ErrQuery) {
			t.Errorf("%s: got %v, want %v", name, err, audit.ErrQuery)
		}
	}
	if _, err := audit.List(s.ctx(), s.kv, s.space, "other", audit.Query{PageToken: token}); !errors.Is(err, audit.ErrQuery) {
		t.Errorf("a token of another organization: got %v, want %v", err, audit.ErrQuery)
	}

	// By a clock that is ahead, and what is no record at all.
	ahead := record("ada")
	ahead.ID = audit.NewID(time.Now().Add(24 * time.Hour))
	s.put(s.path(ahead), ahead.Value(), s.space.Audit(org)+"zzz", "junk")
	p := s.list(audit.Query{Reverse: true, PageSize: 2})
	if len(p.Records) != 2 || p.Records[0].Action != audit.ActionUnreadable || p.Records[1].ID != ahead.ID {
		t.Errorf("got %+v, want what cannot be read and then %s", p.Records, ahead.ID)
	}
	if p := s.list(audit.Query{Reverse: true, PageSize: 1}); p.Records[0].Action != audit.ActionUnreadable {
		t.Errorf("got %+v, want what cannot be read", p.Records)
	} else if p = s.list(audit.Query{Reverse: true, PageSize: 1, PageToken: p.NextPageToken}); p.Records[0].ID != ahead.ID {
		t.Errorf("behind it: got %+v, want %s", p.Records, ahead.ID)
	}

	var out bytes.Buffer
	n, err := audit.Export(s.ctx(), s.kv, s.space, org, &out)
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if err != nil || n != 59 || len(lines) != 59 {
		t.Fatalf("export: got %d, %v, %d lines, want 59", n, err, len(lines))
	}
	for i, line := range lines {
		r, err := audit.Parse([]byte(line))
		if err != nil || r.Revision == 0 || i < len(ids) && r.ID != ids[i] {
			t.Errorf("line %d: got %s, %v", i+1, line, err)
		}
	}
	if _, err := audit.Export(s.ctx(), s.kv, s.space, org, failing{}); !errors.Is(err, errFull) {
		t.Errorf("export to what fails: got %v, want %v", err, errFull)
	}
}

var errFull = errors.New("full")

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errFull }

func TestRedact(t *testing.T) {
	for _, tt := range []struct{ value, want string }{
		{"approved", "approved"},
		{"approved\n", "approved\n"},
		{"", ""},
		{`{"v":1,"sealedKey":"v1:a:b","sealedSecret":"c","z":[1, 2]}`, `{"v":1,"sealedKey":"(sealed)","sealedSecret":"(sealed)","z":[1,2]}`},
		{` {"a":[{"consumerKey":"k","ConsumerSecret":"s"}]}`, `{"a":[{"consumerKey":"(hidden)","ConsumerSecret":"(hidden)"}]}`},
		{`[{"sealedKey":{"x":1}}]`, `[{"sealedKey":"(sealed)"}]`},
		{`{"sealedKey":"x"`, "(16 bytes that are not valid JSON)"},
		{`{"sealedKey":"x","sealedKey":"y"}`, "(33 bytes that are not valid JSON)"},
		{strings.Repeat("k", 65), "(65 bytes that are not JSON)"},
		{"\xff", "\ufffd"},
	} {
		if got := audit.Redact(tt.value); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.value, got, tt.want)
		}
	}
	long := audit.Redact(`{"a":"` + strings.Repeat("é", 4000) + `"}`)
	if len(long) > 4200 || !strings.HasSuffix(long, "… (cut, 8008 bytes)") || strings.Contains(long, "\ufffd") {
		t.Errorf("got %d bytes, %q", len(long), long[len(long)-40:])
	}
}

// How fast changes are with and without a follower, and how long the chain then
// takes.
func BenchmarkCatchUp(b *testing.B) {
	for name, follow := range map[string]bool{"follower": true, "none": false} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				catchUp(b, follow)
			}
		})
	}
}

func catchUp(b *testing.B, follow bool) {
	const n = 5000
	s := newStore(b)
	s.begun(s.follower())()
	if follow {
		defer s.run(s.follower())()
	}
	began := time.Now()
	var writers sync.WaitGroup
	var last [20]int64
	for w := range last {
		writers.Go(func() {
			for i := range n / len(last) {
				r := record("ada")
				path := fmt.Sprintf("/keygate/acme/apps/a%d/status", w)
				resp, err := s.kv.Txn(b.Context()).Then(op(path, fmt.Sprint(i)), op(s.path(r), r.Value())).Commit()
				if err != nil {
					b.Error(err)
					return
				}
				last[w] = resp.Header.Revision
			}
		})
	}
	writers.Wait()
	written := time.Since(began)
	b.ReportMetric(n/written.Seconds(), "changes/s")
	if !follow {
		return
	}
	s.settled(slices.Max(last[:]))
	caught := time.Since(began)
	report := s.mustVerify()
	b.ReportMetric(float64((caught - written).Milliseconds()), "ms-behind")
	b.ReportMetric(float64(report.Links), "links")
	b.ReportMetric(float64((time.Since(began) - caught).Milliseconds()), "ms-verify")
}
