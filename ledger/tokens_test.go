package ledger_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/access"
	"keygate/audit"
	"keygate/authz"
	"keygate/keygatetest/etcdtest"
	"keygate/ledger"
)

// tokens is a Ledger on a real etcd, and its clock.
type tokens struct {
	*store
	*ledger.Ledger
	clock *atomic.Int64 // ms
	log   *strings.Builder
}

// withTokens returns a Ledger on st, which is s.kv if it is nil.
func (s *store) withTokens(st ledger.Store, spool *ledger.Spool) tokens {
	if st == nil {
		st = s.kv
	}
	k := tokens{store: s, clock: &atomic.Int64{}, log: &strings.Builder{}}
	k.clock.Store(1_700_000_000_000)
	k.Ledger = ledger.New(ledger.Config{
		Store: st, Space: s.space, Spool: spool,
		Now:    func() time.Time { return time.UnixMilli(k.clock.Load()) },
		Logger: slog.New(slog.NewJSONHandler(k.log, nil)),
	})
	return k
}

func (k tokens) create(role access.Role, org authz.Organization, expires int64) (string, access.Token) {
	k.t.Helper()
	secret, token, done, err := k.CreateToken(k.ctx(), tokenBy, access.Token{Name: "CI", Role: role, Organization: org, ExpiresAt: expires})
	if err != nil || done.Revision == 0 || secret == "" {
		k.t.Fatalf("create: got revision %d and %v", done.Revision, err)
	}
	return secret, token
}

var tokenBy = ledger.By{Actor: audit.Actor{Kind: audit.ActorCLI, Name: "ann"}, Reason: "a new pipeline", RequestID: "r-1"}

// uses tells how often a last use was written, and the last one.
func (k tokens) uses(id string) (times int64, at string) {
	k.t.Helper()
	resp, err := k.kv.Get(k.ctx(), k.space.TokensUsed()+id)
	if err != nil {
		k.t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return 0, ""
	}
	return resp.Kvs[0].Version, string(resp.Kvs[0].Value)
}

// until waits for something that happens in the background.
func (k tokens) until(what string, ok func() bool) {
	k.t.Helper()
	ctx := k.ctx()
	for tick := time.NewTicker(time.Millisecond); !ok(); <-tick.C {
		if ctx.Err() != nil {
			k.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// refused wants the one answer to whoever is not let in.
func (k tokens) refused(what, secret string) {
	k.t.Helper()
	token, err := k.Authenticate(k.ctx(), secret)
	if err != ledger.ErrUnauthenticated || token != (access.Token{}) { // with nothing around it
		k.t.Errorf("%s: got %+v, %v, want ErrUnauthenticated and no more", what, token, err)
	}
}

func (k tokens) accepted(what, secret string, want access.Token) {
	k.t.Helper()
	got, err := k.Authenticate(k.ctx(), secret)
	got.LastUsed = want.LastUsed
	if err != nil || got != want {
		k.t.Errorf("%s: got %+v, %v, want %+v", what, got, err, want)
	}
}

// clean wants that the secret, and any good part of it, is neither in etcd nor
// in the log.
func (k tokens) clean(secrets ...string) {
	k.t.Helper()
	all, _ := k.dump()
	text := k.log.String()
	for path, value := range all {
		text += path + "\n" + value + "\n"
	}
	for _, secret := range secrets {
		for _, part := range []string{secret, secret[4:20], secret[20:36]} {
			if strings.Contains(text, part) {
				k.t.Errorf("etcd or the log holds a part of a token")
			}
		}
	}
}

// records of the audit trail of org, the oldest first.
func (k tokens) records(org authz.Organization) (all []audit.Record) {
	k.t.Helper()
	resp, err := k.kv.Get(k.ctx(), k.space.Audit(org), clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	if err != nil {
		k.t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		r, err := audit.Parse(kv.Value)
		if err != nil {
			k.t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

func TestTokenLife(t *testing.T) {
	k := newStore(t).withTokens(nil, nil)
	expires := k.clock.Load() + 1000
	secret, token := k.create(access.Operator, org, expires)
	want := access.Token{
		ID: token.ID, Name: "CI", Role: access.Operator, Organization: org,
		CreatedAt: k.clock.Load(), ExpiresAt: expires, CreatedBy: "ann",
	}
	if id, err := access.ParseToken(secret); err != nil || id != token.ID || token != want {
		t.Fatalf("got %+v for id %s, %v, want %+v", token, id, err, want)
	}
	k.accepted("new", secret, want)
	// To the millisecond, and back: it is the clock that counts.
	k.clock.Add(999)
	k.accepted("1 ms before it expires", secret, want)
	k.clock.Add(1)
	k.refused("as it expires", secret)
	k.clock.Add(-1)

	stored, _ := k.dump()
	if value := stored["/keygate.tokens/"+token.ID]; value != want.Value() {
		t.Errorf("stored is %s, want %s", value, want.Value())
	}
	other := k.store.withTokens(nil, nil) // another server
	other.clock.Store(k.clock.Load())
	other.accepted("by another server", secret, want)
	revoked, done, err := k.RevokeToken(k.ctx(), tokenBy, org, token.ID[:8])
	revoked.LastUsed = 0
	if err != nil || revoked != want || done.Revision == 0 || len(done.Changes) != 1 {
		t.Fatalf("revoke: got %+v, %+v, %v, want %+v", revoked, done, err, want)
	}
	other.refused("revoked, by another server", secret)
	k.refused("revoked", secret)
	if _, _, err := k.RevokeToken(k.ctx(), tokenBy, org, token.ID); kindOf(err) != ledger.NotFound {
		t.Errorf("revoke again: got %v, want NotFound", err)
	}

	all := k.records(org)
	if len(all) != 2 || all[0].Action != "create" || all[1].Action != "revoke" {
		t.Fatalf("audit: got %+v, want a creation and a revocation", all)
	}
	path, value := "/keygate.tokens/"+token.ID, want.Value()
	for i, c := range []audit.Change{{Path: path, After: &value}, {Path: path, Before: &value}} {
		r := all[i]
		got, _ := json.Marshal(r.Changes)
		if should, _ := json.Marshal([]audit.Change{c}); string(got) != string(should) || r.Object != path || r.Actor != tokenBy.Actor || r.Reason != tokenBy.Reason || r.RequestID != "r-1" {
			t.Errorf("audit: got %+v with %s, want %s", r, got, should)
		}
	}
	k.clean(secret)
}

func kindOf(err error) ledger.ErrorKind {
	var e *ledger.Error
	if !errors.As(err, &e) {
		return 255
	}
	return e.Kind
}

func TestTokensOfOrganizations(t *testing.T) {
	k := newStore(t).withTokens(nil, nil)
	var ids []string
	var secrets []string
	for _, o := range []authz.Organization{org, "other", access.AllOrganizations, org} {
		secret, token := k.create(access.Admin, o, access.NeverExpires)
		k.clock.Add(1)
		ids, secrets = append(ids, token.ID), append(secrets, secret)
	}
	for o, want := range map[authz.Organization][]string{
		org: {ids[0], ids[3]}, "other": {ids[1]}, access.AllOrganizations: ids, "nobody": nil, "acm": nil, "": nil,
	} {
		var got []string
		all, err := k.Tokens(k.ctx(), o)
		for _, token := range all {
			got = append(got, token.ID)
		}
		if err != nil || all == nil || !slices.Equal(got, want) {
			t.Errorf("tokens of %q: got %v, %v, want %v", o, got, err, want)
		}
	}
	// A foreign token is not there, whatever way it is named.
	for _, id := range []string{ids[1], ids[2], ids[2][:8]} {
		if _, _, err := k.RevokeToken(k.ctx(), tokenBy, org, id); kindOf(err) != ledger.NotFound {
			t.Errorf("revoke a foreign token: got %v, want NotFound", err)
		}
	}
	for i, secret := range secrets {
		if _, err := k.Authenticate(k.ctx(), secret); err != nil {
			t.Errorf("token %d: got %v, want that it is as before", i, err)
		}
	}
	// Who may everywhere names them all. Each stands in the trail of its own
	// organization.
	for _, id := range []string{ids[1], ids[2]} {
		if _, _, err := k.RevokeToken(k.ctx(), tokenBy, access.AllOrganizations, id); err != nil {
			t.Errorf("revoke: %v", err)
		}
	}
	all, _ := k.dump()
	for _, o := range []string{"%2A", "other"} {
		found := 0
		for path := range all {
			if strings.HasPrefix(path, "/keygate.audit/"+o+"/") {
				found++
			}
		}
		if found != 2 {
			t.Errorf("got %d audit records of organization %s, want 2: a creation, a revocation", found, o)
		}
	}
}

func TestTokenByPrefix(t *testing.T) {
	k := newStore(t).withTokens(nil, nil)
	value := func(o authz.Organization) string {
		return access.Token{Name: "n", Role: access.Viewer, Organization: o, CreatedAt: 1, ExpiresAt: -1}.Value()
	}
	id := func(prefix string) string { return prefix + strings.Repeat("0", 64-len(prefix)) }
	a, b, foreign, broken := id("aaaaaaaa1"), id("aaaaaaaa2"), id("bbbbbbbb1"), id("bbbbbbbb2")
	k.set("/keygate.tokens/"+a, value(org), "/keygate.tokens/"+b, value(org), "/keygate.tokens/"+foreign, value("other"), "/keygate.tokens/"+broken, "{")
	revoke := func(o authz.Organization, id string) (access.Token, error) {
		token, _, err := k.RevokeToken(k.ctx(), tokenBy, o, id)
		return token, err
	}
	_, err := revoke(org, "aaaaaaaa")
	if kindOf(err) != ledger.Conflict || !strings.Contains(err.Error(), a) || !strings.Contains(err.Error(), b) {
		t.Errorf("two of them: got %v, want a Conflict that names both", err)
	}
	if token, err := revoke(org, "aaaaaaaa1"); err != nil || token.ID != a {
		t.Errorf("one more character: got %+v, %v, want %s", token, err, a)
	}
	if token, err := revoke(org, "aaaaaaaa"); err != nil || token.ID != b {
		t.Errorf("the only one now: got %+v, %v, want %s", token, err, b)
	}
	if _, err := revoke(org, "bbbbbbbb"); kindOf(err) != ledger.NotFound {
		t.Errorf("another organization's, and one that cannot be read: got %v, want NotFound", err)
	}
	if token, err := revoke("other", "bbbbbbbb"); err != nil || token.ID != foreign {
		t.Errorf("got %+v, %v, want %s", token, err, foreign)
	}
	if all, err := k.Tokens(k.ctx(), access.AllOrganizations); err != nil || len(all) != 0 || !strings.Contains(k.log.String(), broken) {
		t.Errorf("got %+v, %v, want none, and a warning of %s", all, err, broken)
	}
	if token, err := revoke(access.AllOrganizations, broken); err != nil || token.ID != broken {
		t.Errorf("one that cannot be read: got %+v, %v, want %s", token, err, broken)
	}
	secret, _ := access.NewToken()
	for _, id := range []string{"", "aaaaaaa", "AAAAAAAA", "aaaaaaaa/", "aaaaaaaa*", "../../..", id("aaaaaaaa") + "0", secret, "........", "zzzzzzzz"} {
		_, err := revoke(org, id)
		if kindOf(err) != ledger.Invalid {
			t.Errorf("%q: got %v, want Invalid", id, err)
		} else if strings.Contains(err.Error(), secret[4:20]) {
			t.Errorf("the error quotes a token")
		}
	}
}

func TestTokenSpec(t *testing.T) {
	k := newStore(t).withTokens(nil, nil)
	for name, tt := range map[string]struct {
		spec    access.Token
		pointer string
	}{
		"nothing":         {access.Token{}, "/name"},
		"no role":         {access.Token{Name: "n", Organization: org, ExpiresAt: -1}, "/role"},
		"no organization": {access.Token{Name: "n", Role: access.Admin, ExpiresAt: -1}, "/organization"},
		"no expiry":       {access.Token{Name: "n", Role: access.Admin, Organization: org}, "/expiresAt"},
		"expired":         {access.Token{Name: "n", Role: access.Admin, Organization: org, ExpiresAt: k.clock.Load()}, "/expiresAt"},
	} {
		secret, _, _, err := k.CreateToken(k.ctx(), tokenBy, tt.spec)
		var e *ledger.Error
		if !errors.As(err, &e) || e.Kind != ledger.Invalid || e.Pointer != tt.pointer || secret != "" {
			t.Errorf("%s: got %v, want Invalid at %s", name, err, tt.pointer)
		}
	}
	by := tokenBy
	by.DryRun = true
	good := access.Token{Name: "n", Role: access.Admin, Organization: org, ExpiresAt: k.clock.Load() + 1}
	secret, token, done, err := k.CreateToken(k.ctx(), by, good)
	if err != nil || secret != "" || token.ID == "" || len(done.Changes) != 1 {
		t.Errorf("dry run: got %+v, %+v, %v, want one change and no secret", token, done, err)
	}
	if all, rev := k.dump(); len(all) != 0 {
		t.Errorf("something was written: %v at %d", all, rev)
	}
	kept, token := k.create(access.Admin, org, access.NeverExpires)
	if _, done, err := k.RevokeToken(k.ctx(), by, org, token.ID); err != nil || len(done.Changes) != 1 {
		t.Errorf("dry run of a revocation: got %+v, %v, want one change", done, err)
	}
	k.accepted("after a dry run", kept, token)
}

// A request that is sent again makes no second token, and its answer holds the
// first, which is nowhere in etcd to be read.
func TestTokenOnce(t *testing.T) {
	k := newStore(t).withTokens(nil, nil)
	by := tokenBy
	by.Once = &ledger.Once{Key: "a-key-of-the-client", Request: [32]byte{1}, Body: func(result any) ([]byte, error) {
		made := result.(ledger.CreatedToken)
		return []byte(made.Secret + " " + made.ID), nil
	}}
	spec := access.Token{Name: "n", Role: access.Admin, Organization: org, ExpiresAt: -1}
	secret, token, _, err := k.CreateToken(k.ctx(), by, spec)
	if err != nil {
		t.Fatal(err)
	}
	again, _, done, err := k.CreateToken(k.ctx(), by, spec)
	if err != nil || again != "" || string(done.Replayed) != secret+" "+token.ID {
		t.Errorf("again: got a secret of %d characters, %+v, %v, want the first answer", len(again), done, err)
	}
	if all, err := k.Tokens(k.ctx(), org); err != nil || len(all) != 1 {
		t.Errorf("got %d tokens, %v, want 1", len(all), err)
	}
	k.clean(secret)
}

func TestUnauthenticated(t *testing.T) {
	s := newStore(t)
	st := &tokenStore{Client: s.kv}
	k := s.withTokens(st, nil)
	secret, token := k.create(access.Admin, org, access.NeverExpires)
	asked := st.reads.Load()
	for what, presented := range map[string]string{
		"nothing": "", "a blank": " ", "junk": "admin", "half": secret[:20], "a blank behind": secret + " ", "its id": token.ID,
		"another checksum": secret[:len(secret)-1] + string('a'+(secret[len(secret)-1]-'a'+1)%26), "a consumer key": authz.GenerateKey(), "large": strings.Repeat("k", 1<<20),
	} {
		k.refused(what, presented)
	}
	if got := st.reads.Load(); got != asked {
		t.Errorf("etcd was asked %d times for what has not the form of a token, want never", got-asked)
	}
	unknown, _ := access.NewToken()
	k.refused("unknown", unknown)
	if got := st.reads.Load() - asked; got != 1 {
		t.Errorf("an unknown token took %d reads, want 1", got)
	}
	k.accepted("the right one", secret, token)
	path := "/keygate.tokens/" + token.ID
	for what, value := range map[string]string{
		"empty": "", "no JSON": "admin", "another version": strings.Replace(token.Value(), `"v":1`, `"v":2`, 1),
		"an unknown role": strings.Replace(token.Value(), "admin", "root", 1), "one that is twice": strings.Replace(token.Value(), `{`, `{"role":"admin",`, 1),
	} {
		k.set(path, value)
		k.refused(what, secret)
	}
	if !strings.Contains(k.log.String(), token.ID) {
		t.Error("the log does not tell of a token that cannot be read")
	}
	k.set(path, "-")
	k.refused("deleted by etcdctl", secret)
	k.clean(secret, unknown)
}

func TestAuthenticateWithoutEtcd(t *testing.T) {
	s := newStore(t)
	secret, token := s.withTokens(nil, nil).create(access.Admin, org, access.NeverExpires)
	p := etcdtest.NewProxy(t, s.kv.Endpoints()[0])
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{p.Endpoint()}, DialTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	k := s.withTokens(client, nil)
	k.accepted("through the proxy", secret, token)
	p.Freeze()
	ctx, cancel := context.WithTimeout(k.ctx(), 50*time.Millisecond)
	defer cancel()
	got, err := k.Authenticate(ctx, secret)
	if !errors.Is(err, authz.ErrUnavailable) || errors.Is(err, ledger.ErrUnauthenticated) || got != (access.Token{}) {
		t.Errorf("got %+v, %v, want authz.ErrUnavailable", got, err)
	} else if strings.Contains(err.Error(), secret[4:20]) {
		t.Error("the error quotes the token")
	}
	k.refused("malformed, which needs no etcd", "admin")
	p.Thaw()
}

// tokenStore counts reads, and does with writes what hold says.
type tokenStore struct {
	*clientv3.Client
	reads   atomic.Int64
	waiting atomic.Int64
	hold    func(context.Context) error // nil: nothing
}

type tokenTxn struct {
	clientv3.Txn
	ctx   context.Context
	s     *tokenStore
	write bool
}

func (s *tokenStore) Txn(ctx context.Context) clientv3.Txn {
	return &tokenTxn{Txn: s.Client.Txn(ctx), ctx: ctx, s: s}
}

func (t *tokenTxn) If(c ...clientv3.Cmp) clientv3.Txn { t.Txn = t.Txn.If(c...); return t }

func (t *tokenTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	t.write = t.write || slices.ContainsFunc(ops, clientv3.Op.IsPut)
	t.Txn = t.Txn.Then(ops...)
	return t
}

func (t *tokenTxn) Commit() (*clientv3.TxnResponse, error) {
	if !t.write {
		t.s.reads.Add(1)
	} else if t.s.hold != nil {
		t.s.waiting.Add(1)
		defer t.s.waiting.Add(-1)
		if err := t.s.hold(t.ctx); err != nil {
			return nil, err
		}
	}
	return t.Txn.Commit()
}

// The last use is written at most once a minute, however many requests and
// servers there are.
func TestLastUse(t *testing.T) {
	s := newStore(t)
	k := s.withTokens(nil, nil)
	secret, token := k.create(access.Viewer, org, access.NeverExpires)
	_, revision := k.dump()
	start := k.clock.Load()
	storm := func() {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 20 {
					k.accepted("at once", secret, token)
				}
			})
		}
		wg.Wait()
	}
	used := func(times int64, at int64) func() bool {
		return func() bool {
			n, value := k.uses(token.ID)
			return n == times && value == fmt.Sprint(at)
		}
	}
	storm()
	k.until("the first use", used(1, start))
	k.clock.Add(59_999)
	storm()
	s.withTokens(nil, nil).accepted("by another server", secret, token) // whose clock is 59.999 s behind
	k.clock.Add(1)
	storm()
	k.until("a use a minute later, and only that", used(2, start+60_000))
	all, err := k.Tokens(k.ctx(), org)
	if err != nil || len(all) != 1 || all[0].LastUsed != start+60_000 {
		t.Errorf("got %+v, %v, want the last use %d", all, err, start+60_000)
	}
	// A clock that was far ahead once is not believed for ever.
	k.set(k.space.TokensUsed()+token.ID, fmt.Sprint(start+3_600_000))
	k.clock.Add(60_000)
	storm()
	k.until("a use after one of the future", used(4, start+120_000))
	k.set(k.space.TokensUsed()+token.ID, "junk")
	k.clock.Add(60_000)
	storm()
	k.until("a use after one that cannot be read", used(6, start+180_000))
	if got := k.records(org); len(got) != 1 {
		t.Errorf("got %d audit records, want that of the creation alone", len(got))
	}
	if _, now := k.dump(); now != revision+6 {
		t.Errorf("%d writes, want 6: four uses and two of this test", now-revision)
	}
	if _, _, err := k.RevokeToken(k.ctx(), tokenBy, org, token.ID); err != nil {
		t.Fatal(err)
	}
	if n, _ := k.uses(token.ID); n != 0 {
		t.Error("the last use of a revoked token is still there")
	}
}

// An etcd that takes no writes, or takes its time, delays and fails no request;
// not more than a few wait for it.
func TestLastUseNeverBlocks(t *testing.T) {
	s := newStore(t)
	direct := s.withTokens(nil, nil)
	const n = 20
	var secrets []string
	var made []access.Token
	for range n {
		secret, token := direct.create(access.Viewer, org, access.NeverExpires)
		secrets, made = append(secrets, secret), append(made, token)
	}
	release := make(chan struct{})
	st := &tokenStore{Client: s.kv, hold: func(ctx context.Context) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	k := s.withTokens(st, nil)
	for i := range secrets {
		ctx, cancel := context.WithCancel(k.ctx())
		if got, err := k.Authenticate(ctx, secrets[i]); err != nil || got != made[i] {
			t.Errorf("got %+v, %v while etcd takes no writes, want %+v", got, err, made[i])
		}
		cancel() // a request that has ended takes no write with it
	}
	k.until("some uses to wait", func() bool { return st.waiting.Load() == 4 })
	// The token is revoked while its last use is on its way.
	if _, _, err := direct.RevokeToken(k.ctx(), tokenBy, org, made[0].ID); err != nil {
		t.Fatal(err)
	}
	if got := st.waiting.Load(); got != 4 {
		t.Errorf("%d uses wait, want 4", got)
	}
	close(release)
	k.until("the uses to be written", func() bool { return st.waiting.Load() == 0 })
	all, err := k.Tokens(k.ctx(), org)
	used := 0
	for _, token := range all {
		if token.LastUsed != 0 {
			used++
		}
	}
	if err != nil || used != 3 {
		t.Errorf("got %d tokens with a last use, %v, want 3", used, err)
	}
	if times, _ := k.uses(made[0].ID); times != 0 {
		t.Error("the last use of a revoked token came back")
	}
	failing := s.withTokens(&tokenStore{Client: s.kv, hold: func(context.Context) error { return rpctypes.ErrNoSpace }}, nil)
	for i := 1; i < n; i++ {
		failing.accepted("while writes fail", secrets[i], made[i])
	}
}

// A token must be ended also when etcd has no space for the record of it.
func TestRevokeTokenWithoutSpace(t *testing.T) {
	spool, err := ledger.OpenSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var k tokens
	var secret, kept string
	var token, other access.Token
	s := fullStore(t, func(s *store) {
		k = s.withTokens(nil, spool)
		secret, token = k.create(access.Admin, org, access.NeverExpires)
		kept, other = k.create(access.Admin, org, access.NeverExpires)
	})
	if _, _, _, err := k.CreateToken(k.ctx(), tokenBy, access.Token{Name: "n", Role: access.Admin, Organization: org, ExpiresAt: -1}); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("create: got %v, want that there is no space", err)
	}
	k.accepted("without space", secret, token)
	revoked, done, err := k.RevokeToken(k.ctx(), tokenBy, org, token.ID)
	if err != nil || revoked.ID != token.ID || done.Revision == 0 || len(done.Changes) != 1 {
		t.Fatalf("revoke: got %+v, %+v, %v", revoked, done, err)
	}
	k.refused("revoked", secret)
	k.accepted("another", kept, other)
	if left, err := spool.Drain(k.ctx(), s.kv, s.space); err == nil && left == 0 {
		t.Error("the spool is empty, want the record of the revocation")
	}
	if _, err := s.kv.Delete(s.ctx(), "/filler/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	resp, err := s.kv.Get(s.ctx(), "/")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.Compact(s.ctx(), resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.Defragment(s.ctx(), s.kv.Endpoints()[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.AlarmDisarm(s.ctx(), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	if left, err := spool.Drain(k.ctx(), s.kv, s.space); err != nil || left != 0 {
		t.Fatalf("drain: %d left, %v", left, err)
	}
	all := k.records(org)
	last := all[len(all)-1]
	if last.Action != "revoke" || last.Object != "/keygate.tokens/"+token.ID || last.Revision != done.Revision || last.NoOp || len(last.Changes) != 1 {
		t.Errorf("got %+v, want the record of the revocation at %d", last, done.Revision)
	}
}
