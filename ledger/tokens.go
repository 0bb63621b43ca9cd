package ledger

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/access"
	"keygate/authz"
	"keygate/statestore/keyspace"
)

// ErrUnauthenticated: what was presented is no token, is not known, has been
// revoked or has expired. It never says which.
var ErrUnauthenticated = errors.New("not authenticated: want a valid management token")

const (
	// useInterval is how exactly the last use of a token is known.
	useInterval = time.Minute
	// maxUses that are being written at once. Behind an etcd that is slow more of
	// them would only wait; one that is left out is written a minute later.
	maxUses = 4
	// minTokenPrefix of an id that a token is named by.
	minTokenPrefix = 8
	// maxTokensNamed by one prefix that are told apart. They have 32 bits in
	// common: there is one.
	maxTokensNamed = 16
)

// CreatedToken is what CreateToken hands to Once.Body.
type CreatedToken struct {
	Secret string // shown this once
	access.Token
}

// CreateToken makes a token with spec's Name, Role, Organization and ExpiresAt,
// and sets the rest. The secret is returned and kept nowhere; the store holds
// its hash. On a dry run there is no secret, and of a repetition neither secret
// nor token: the answer of the first time is in Done.Replayed.
//
// Whether by's actor may make such a token is for the caller to know.
func (l *Ledger) CreateToken(ctx context.Context, by By, spec access.Token) (secret string, t access.Token, done Done, err error) {
	now := l.now()
	if err := spec.Validate(); err != nil {
		return "", t, done, invalidToken(err)
	}
	if spec.Expired(now) {
		return "", t, done, invalidToken(&access.FieldError{Field: "expiresAt", Err: fmt.Errorf("%d has passed, it is %d: want a time to come", spec.ExpiresAt, now.UnixMilli())})
	}
	secret, spec.ID = access.NewToken()
	spec.CreatedAt, spec.LastUsed = now.UnixMilli(), 0
	spec.CreatedBy = cmp.Or(by.Actor.Name, by.Actor.Kind)
	path := l.space.Tokens() + spec.ID
	done, err = l.change(ctx, by, spec.Organization, "create", path, func(ctx context.Context, t *tx) (any, error) {
		if err := t.get(ctx, path); err != nil {
			return nil, err
		}
		t.put(path, spec.Value())
		return CreatedToken{secret, spec}, t.check(0)
	})
	switch {
	case err != nil || done.Replayed != nil:
		return "", access.Token{}, done, err
	case by.DryRun:
		secret = ""
	}
	return secret, spec, done, nil
}

// invalidToken is an error of access as one of a request.
func invalidToken(err error) error {
	e := &Error{Kind: Invalid, Code: "keygate.token", Message: err.Error()}
	var field *access.FieldError
	if errors.As(err, &field) {
		e.Pointer, e.Message = "/"+field.Field, field.Err.Error()
	}
	return e
}

// Tokens lists the tokens for org, in the order in which they were made, the
// expired ones too, with their last use. Those for all organizations are listed
// only for access.AllOrganizations, and then with all others. A stored token
// that cannot be read is no token: it is logged and left out.
func (l *Ledger) Tokens(ctx context.Context, org authz.Organization) ([]access.Token, error) {
	resp, err := l.store.Txn(ctx).Then(
		clientv3.OpGet(l.space.Tokens(), clientv3.WithPrefix()),
		clientv3.OpGet(l.space.TokensUsed(), clientv3.WithPrefix()),
	).Commit()
	if err != nil {
		return nil, fmt.Errorf("list tokens: %w", err)
	}
	used := map[string]int64{}
	for _, kv := range resp.Responses[1].GetResponseRange().Kvs {
		used[strings.TrimPrefix(string(kv.Key), l.space.TokensUsed())] = parseUse(kv.Value)
	}
	all := []access.Token{}
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		id := strings.TrimPrefix(string(kv.Key), l.space.Tokens())
		t, err := access.Parse(id, kv.Value)
		if err != nil {
			l.log.Warn("a stored management token cannot be read: it opens nothing", "token", id, "error", err)
			continue
		}
		if listed(t, org) {
			t.LastUsed = used[id]
			all = append(all, t)
		}
	}
	slices.SortStableFunc(all, func(a, b access.Token) int { return cmp.Compare(a.CreatedAt, b.CreatedAt) })
	return all, nil
}

// listed tells whether t is for whoever asks for the tokens of org.
func listed(t access.Token, org authz.Organization) bool {
	return org == access.AllOrganizations || t.Organization == org
}

// RevokeToken ends a token for org, at once: it is deleted, with its last use.
// id is the token's, or at least the first 8 characters of it; of tokens that
// Tokens would not list for org it finds none. The audit record stands in the
// trail of the token's own organization, whoever revokes it. When etcd has no space left it is
// deleted all the same, and the audit record goes to the spool.
func (l *Ledger) RevokeToken(ctx context.Context, by By, org authz.Organization, id string) (revoked access.Token, done Done, err error) {
	if len(id) < minTokenPrefix || len(id) > 2*len(authz.KeyID{}) || strings.Trim(id, "0123456789abcdef") != "" {
		// It is not quoted: it may be the token itself.
		return revoked, done, errorf(Invalid, "keygate.token_id", "that is no token's id: want %d to %d characters of lower-case hex, as keygate token list prints them", minTokenPrefix, 2*len(authz.KeyID{}))
	}
	own := org // whose trail it is noted in
	if org == access.AllOrganizations {
		if own, err = l.tokenOwner(ctx, by, id); err != nil {
			return revoked, done, err
		}
	}
	var last *tx
	done, err = l.change(ctx, by, own, "revoke", l.space.Tokens()+id, func(ctx context.Context, t *tx) (any, error) {
		last = t
		paths, err := t.peek(ctx, l.space.Tokens()+id, maxTokensNamed)
		if err != nil {
			return nil, err
		}
		var found []access.Token
		for _, path := range paths {
			full := strings.TrimPrefix(path, l.space.Tokens())
			value, _ := t.value(path)
			token, err := access.Parse(full, []byte(value))
			if err != nil { // whose it is cannot be told
				token = access.Token{ID: full}
			}
			if listed(token, org) {
				found = append(found, token)
			}
		}
		switch {
		case len(found) == 0:
			return nil, errorf(NotFound, "keygate.token_not_found", "no token whose id begins with %s", id)
		case len(found) > 1:
			var ids []string
			for _, token := range found {
				ids = append(ids, token.ID)
			}
			return nil, errorf(Conflict, "keygate.token_ambiguous", "%d tokens have an id that begins with %s, want more of it: %s", len(found), id, strings.Join(ids, ", "))
		}
		revoked = found[0]
		if owner(revoked) != own { // it has been replaced since
			return nil, ErrConflict
		}
		path, use := l.space.Tokens()+revoked.ID, l.space.TokensUsed()+revoked.ID
		if err := t.get(ctx, path, use); err != nil {
			return nil, err
		}
		if value, there := t.value(use); there {
			revoked.LastUsed = parseUse([]byte(value))
		}
		t.record.Object = path
		t.delete(path)
		t.delete(use)
		return revoked, t.check(t.revision(path))
	})
	if errors.Is(err, rpctypes.ErrNoSpace) {
		done, err = l.deleteToken(ctx, last, revoked.ID)
	}
	if err != nil || done.Replayed != nil {
		revoked = access.Token{}
	}
	return revoked, done, err
}

// owner is the organization whose trail a change of t is noted in.
func owner(t access.Token) authz.Organization {
	if keyspace.CheckOrganization(t.Organization) != nil {
		return access.AllOrganizations
	}
	return t.Organization
}

// tokenOwner is the owner of the only token whose id begins so. If that is gone
// it is who by.Once has kept an answer under, so that the change finds it there;
// else all organizations.
func (l *Ledger) tokenOwner(ctx context.Context, by By, id string) (authz.Organization, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	failed := func(err error) (authz.Organization, error) { return "", fmt.Errorf("find a token: %w", err) }
	resp, err := l.store.Do(ctx, clientv3.OpGet(l.space.Tokens()+id, clientv3.WithPrefix(), clientv3.WithLimit(2)))
	if err != nil {
		return failed(err)
	}
	if found := resp.Get().Kvs; len(found) > 0 {
		t, err := access.Parse(strings.TrimPrefix(string(found[0].Key), l.space.Tokens()), found[0].Value)
		if err != nil || len(found) > 1 {
			return access.AllOrganizations, nil
		}
		return owner(t), nil
	}
	if by.Once == nil {
		return access.AllOrganizations, nil
	}
	// Whoever has an answer has an audit record too: one look for each trail.
	all := l.space.Audits()
	for from := all; ; {
		resp, err := l.store.Do(ctx, clientv3.OpGet(from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(all)), clientv3.WithKeysOnly(), clientv3.WithLimit(1)))
		if err != nil {
			return failed(err)
		}
		if len(resp.Get().Kvs) == 0 {
			return access.AllOrganizations, nil
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(string(resp.Get().Kvs[0].Key), all), "/")
		from = clientv3.GetPrefixRangeEnd(all + name + "/")
		org, err := url.PathUnescape(name)
		if err != nil {
			continue
		}
		kept, err := l.store.Do(ctx, clientv3.OpGet(by.Once.path(l.space, authz.Organization(org), by.Actor), clientv3.WithCountOnly()))
		if err != nil {
			return failed(err)
		}
		if kept.Get().Count > 0 {
			return authz.Organization(org), nil
		}
	}
}

// deleteToken does what t could not for want of space, without the records
// beside it.
func (l *Ledger) deleteToken(ctx context.Context, t *tx, id string) (Done, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	path := l.space.Tokens() + id
	resp, err := send(ctx, l.store,
		[]clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(path), "=", t.revision(path))},
		[]clientv3.Op{clientv3.OpDelete(path), clientv3.OpDelete(l.space.TokensUsed() + id)})
	switch {
	case err != nil && refused(err):
		return Done{}, fmt.Errorf("revoke %s: %w", path, err)
	case err != nil:
		return Done{}, fmt.Errorf("revoke %s: %w: %w", path, ErrOutcomeUnknown, err)
	case !resp.Succeeded:
		return Done{}, fmt.Errorf("revoke %s: %w", path, ErrConflict)
	}
	t.record.Revision = resp.Header.Revision
	l.keep(t.record)
	return Done{Revision: resp.Header.Revision, Changes: t.record.Changes}, nil
}

// Authenticate returns the token whose secret is presented. It asks etcd by one
// linearizable read, so a token that has been revoked is refused by the next
// call on every server. A secret that has not the form of a token is refused
// without asking.
//
// The error is ErrUnauthenticated, with no detail, or wraps
// authz.ErrUnavailable when etcd did not answer within 5 s.
//
// The last use is noted at most once a minute, behind the caller's back: it
// neither delays nor fails anything, and is not audited.
func (l *Ledger) Authenticate(ctx context.Context, secret string) (access.Token, error) {
	id, err := access.ParseToken(secret)
	if err != nil {
		return access.Token{}, ErrUnauthenticated
	}
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	resp, err := l.store.Txn(ctx).Then(clientv3.OpGet(l.space.Tokens()+id), clientv3.OpGet(l.space.TokensUsed()+id)).Commit()
	if err != nil {
		return access.Token{}, fmt.Errorf("authenticate: %w: %w", authz.ErrUnavailable, err)
	}
	found := resp.Responses[0].GetResponseRange().Kvs
	if len(found) == 0 {
		return access.Token{}, ErrUnauthenticated
	}
	t, err := access.Parse(id, found[0].Value)
	if err != nil {
		l.log.Warn("a stored management token cannot be read: it opens nothing", "token", id, "error", err)
		return access.Token{}, ErrUnauthenticated
	}
	now := l.now()
	if t.Expired(now) {
		return access.Token{}, ErrUnauthenticated
	}
	if kvs := resp.Responses[1].GetResponseRange().Kvs; len(kvs) > 0 {
		t.LastUsed = parseUse(kvs[0].Value)
	}
	if !recent(now, time.UnixMilli(t.LastUsed)) && l.uses.begin(id, now) {
		go l.noteUse(context.WithoutCancel(ctx), id, now)
	}
	return t, nil
}

// noteUse writes when a token was used, unless it is gone: a use does not come
// back after its token was revoked.
func (l *Ledger) noteUse(ctx context.Context, id string, at time.Time) {
	defer l.uses.end()
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	_, err := l.store.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(l.space.Tokens()+id), ">", 0)).
		Then(clientv3.OpPut(l.space.TokensUsed()+id, strconv.FormatInt(at.UnixMilli(), 10))).
		Commit()
	if err != nil {
		l.log.Debug("the last use of a management token was not noted", "token", id, "error", err)
	}
}

// parseUse reads a last use; what cannot be read is none.
func parseUse(value []byte) int64 {
	ms, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil {
		return 0
	}
	return ms
}

// recent tells whether a use need not be noted again. One that lies far ahead
// was written by a clock that was wrong.
func recent(now, use time.Time) bool { return now.Sub(use).Abs() < useInterval }

// tokenUses are the last uses that this process has tried to write. The zero
// value is ready.
type tokenUses struct {
	sync.Mutex
	tried   map[string]time.Time // by the token's id; none older than useInterval
	running int
}

// begin tells whether a use is to be written; then end must follow.
func (u *tokenUses) begin(id string, now time.Time) bool {
	u.Lock()
	defer u.Unlock()
	if u.running == maxUses {
		return false
	}
	maps.DeleteFunc(u.tried, func(_ string, at time.Time) bool { return !recent(now, at) })
	if _, tried := u.tried[id]; tried {
		return false
	}
	if u.tried == nil {
		u.tried = map[string]time.Time{}
	}
	u.tried[id] = now
	u.running++
	return true
}

func (u *tokenUses) end() {
	u.Lock()
	defer u.Unlock()
	u.running--
}
