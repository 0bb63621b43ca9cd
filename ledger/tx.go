package ledger

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

// Config of a Ledger.
type Config struct {
	// Store is the etcd; required.
	Store Store
	// Space of keygate's keys; required.
	Space keyspace.Space
	// Seal keeps consumer keys and secrets. With nil they are shown once, at
	// their creation, and not kept.
	Seal *seal.Keyring
	// Spool takes the audit records that etcd has no space for. With nil such a
	// record goes to the Logger, as an error.
	Spool *Spool
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
	// Logger; nil discards.
	Logger *slog.Logger
}

// Ledger reads and changes what one store holds. It is safe for concurrent use, must
// not be copied, and keeps nothing that another Ledger on the same store would have to know.
type Ledger struct {
	store Store
	space keyspace.Space
	seal  *seal.Keyring
	spool *Spool
	now   func() time.Time
	log   *slog.Logger
	once  onceLease
	uses  tokenUses
}

// New returns a Ledger. It talks to nobody yet.
func New(cfg Config) *Ledger {
	l := &Ledger{store: cfg.Store, space: cfg.Space, seal: cfg.Seal, spool: cfg.Spool, now: cfg.Now, log: cfg.Logger}
	if l.now == nil {
		l.now = time.Now
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	return l
}

// Space of keygate's keys.
func (l *Ledger) Space() keyspace.Space { return l.space }

// By says on whose behalf a change is made, and how.
type By struct {
	Actor audit.Actor
	// Reason, Ticket and RequestID stand in the audit record.
	Reason, Ticket, RequestID string
	// DryRun works the change out and writes nothing.
	DryRun bool
	// IfMatch is the revision that what is changed must be at; 0 means any.
	IfMatch int64
	// Once makes a repetition of the request answer as the first time; nil does
	// not.
	Once *Once
}

// Done is what a change did, or on a dry run would have done.
type Done struct {
	// Revision of the transaction; on a dry run that of the reads.
	Revision int64
	// Changes of values, in the order of their paths. Indexes and what is kept
	// for keygate itself are not among them.
	Changes []audit.Change
	// Stops, on a dry run, are the pairs of a key and a product that open now
	// and would not after.
	Stops []Stop
	// Replayed is the answer of the first time; nil if this was the first time.
	Replayed []byte

	intents []intent // that the transaction left
}

// record begins the audit record of a change.
func (l *Ledger) record(by By, org authz.Organization, action, object string) audit.Record {
	now := l.now()
	return audit.Record{
		Version: audit.Version, ID: audit.NewID(now), At: now.UnixMilli(), Organization: org,
		Actor: by.Actor, Action: action, Object: object,
		Reason: by.Reason, Ticket: by.Ticket, RequestID: by.RequestID,
	}
}

// Note writes an audit record that belongs to no change: an answer that
// revealed a key, an attempt that was refused.
func (l *Ledger) Note(ctx context.Context, by By, org authz.Organization, action, object, note string) error {
	r := l.record(by, org, action, object)
	r.Note = note
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	if _, err := l.store.Do(ctx, clientv3.OpPut(l.space.Audit(org)+r.ID, r.Value())); err != nil {
		return fmt.Errorf("write an audit record: %w", err)
	}
	return nil
}

// change makes one change by one transaction: plan reads and says what to
// write; all that it has read is compared when it is written, and if something
// of it has changed, plan is called again. So plan must have no effects but on
// its tx and on variables that it sets anew each time. result is what Once
// renders.
//
// An error of plan ends the change, as it is. ErrConflict, ErrOutcomeUnknown
// and refusals of etcd are as of SetStatus. The transaction that has been sent
// is waited for even when ctx is cancelled.
func (l *Ledger) change(ctx context.Context, by By, org authz.Organization, action, object string, plan func(ctx context.Context, t *tx) (result any, err error)) (Done, error) {
	if err := keyspace.CheckOrganization(org); err != nil && org != keyspace.AllOrganizations { // of a token
		return Done{}, &Error{Kind: Invalid, Code: "keygate.organization", Message: err.Error()}
	}
	done, err := l.try(ctx, by, org, l.record(by, org, action, object), plan)
	l.performOwn(ctx, org, done)
	var refusal *Error
	if err != nil && !errors.As(err, &refusal) {
		err = fmt.Errorf("%s %s: %w", action, object, err)
	}
	return done, err
}

func (l *Ledger) try(ctx context.Context, by By, org authz.Organization, record audit.Record, plan func(context.Context, *tx) (any, error)) (Done, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	lost := false // a transaction was sent, and what became of it is not known
	unknown := func(err error) error {
		if !lost {
			return err
		}
		return fmt.Errorf("%w: %w: it may have taken place, now or in a moment", ErrOutcomeUnknown, err)
	}
	for attempt := range maxPlans {
		if attempt > 0 { // apart from those who try the same
			pause(ctx, rand.N(min(time.Millisecond<<min(attempt, 10), maxPause)))
		}
		t := &tx{l: l, by: by, org: org, record: record, view: view{}, guards: map[string]bool{}, writes: map[string]write{}}
		own := l.space.Audit(org) + record.ID
		paths := []string{own}
		if by.Once != nil {
			paths = append(paths, by.Once.path(l.space, org, by.Actor))
		}
		if err := t.get(ctx, paths...); err != nil {
			return Done{}, unknown(fmt.Errorf("read: %w", err))
		}
		_, took := t.value(own)
		if by.Once != nil {
			if value, there := t.value(paths[1]); there {
				answer, err := by.Once.replay(value)
				return Done{Revision: t.revision(paths[1]), Replayed: answer}, err
			}
		}
		if took { // by the transaction whose answer was lost
			stored, _ := t.value(own)
			r, err := audit.Parse([]byte(stored))
			return Done{Revision: t.revision(own), Changes: r.Changes}, err
		}
		result, err := plan(ctx, t)
		if errors.Is(err, rpctypes.ErrCompacted) { // while it was reading; begin again
			continue
		}
		if err != nil {
			return Done{}, unknown(err)
		}
		t.record.Changes = t.changes()
		t.record.NoOp = len(t.writes)+len(t.folders)+len(t.intents) == 0
		if by.DryRun {
			stops, err := t.stops(ctx)
			return Done{Revision: t.rev, Changes: t.record.Changes, Stops: stops}, err
		}
		resp, err := t.commit(ctx, result)
		switch {
		case err == nil && resp.Succeeded:
			return Done{Revision: resp.Header.Revision, Changes: t.record.Changes, intents: t.intents}, nil
		case err == nil: // others were quicker
		case errors.Is(err, rpctypes.ErrTooManyOps), errors.Is(err, rpctypes.ErrRequestTooLarge):
			return Done{}, &Error{Kind: TooLarge, Code: "keygate.too_large", Message: "the change does not fit into one transaction of etcd: " + err.Error()}
		case errors.Is(err, rpctypes.ErrLeaseNotFound): // of the Once: etcd was restored
			l.once.forget()
		case errors.Is(err, rpctypes.ErrNoSpace):
			return Done{}, unknown(noSpace(err))
		case errors.Is(err, rpctypes.ErrPermissionDenied):
			return Done{}, unknown(l.needs(err))
		case refused(err):
			return Done{}, unknown(fmt.Errorf("write: %w", err))
		default:
			lost = true
			if ctx.Err() != nil {
				return Done{}, unknown(err)
			}
		}
	}
	return Done{}, unknown(fmt.Errorf("%w: given up after %d attempts", ErrConflict, maxPlans))
}

const (
	// maxPlans of a change that others keep getting in the way of. With the
	// pauses between them they take about as long as a change may.
	maxPlans = 64
	maxPause = 100 * time.Millisecond
)

// keep an audit record that etcd has no space for.
func (l *Ledger) keep(r audit.Record) {
	err := errors.New("there is no spool")
	if l.spool != nil {
		if err = l.spool.Add(r); err == nil {
			return
		}
	}
	l.log.Error("an audit record could not be kept", "cause", err, "record", r.Value())
}

func noSpace(err error) error {
	return fmt.Errorf("%w: etcd takes no more writes until it is compacted and defragmented and its alarm is disarmed (etcdctl compact, defrag, alarm disarm)", err)
}

// tx is one attempt of a change: what it has read, and what it will write. It
// is for one goroutine.
type tx struct {
	l      *Ledger
	by     By
	org    authz.Organization
	record audit.Record

	rev      int64 // of the first read; the others are of the same
	view     view
	guards   map[string]bool  // every path that was asked for
	prefixes map[string]bool  // below which nothing may have been created since
	frozen   map[string]bool  // below which nothing may have been written since
	writes   map[string]write // by path
	folders  []string         // prefixes that are deleted
	intents  []intent
}

// get reads the paths, all of one revision.
func (t *tx) get(ctx context.Context, paths ...string) error {
	var ops []clientv3.Op
	for _, p := range paths {
		if !t.guards[p] {
			t.guards[p] = true
			ops = append(ops, clientv3.OpGet(p))
		}
	}
	_, err := t.ask(ctx, ops)
	return err
}

// list reads everything below a prefix and returns the paths, in order. It is
// for folders that are small enough to be compared key by key.
func (t *tx) list(ctx context.Context, prefix string) ([]string, error) {
	answers, err := t.ask(ctx, []clientv3.Op{clientv3.OpGet(prefix, clientv3.WithPrefix(), clientv3.WithLimit(maxList+1))})
	if err != nil {
		return nil, err
	}
	if len(answers[0]) > maxList {
		return nil, &Error{Kind: TooLarge, Code: "keygate.too_large", Message: fmt.Sprintf("there are more than %d values below %s", maxList, prefix)}
	}
	for _, p := range answers[0] {
		t.guards[p] = true
	}
	if t.prefixes == nil {
		t.prefixes = map[string]bool{}
	}
	t.prefixes[prefix] = true
	return answers[0], nil
}

// peek reads everything below a prefix without guarding it: what a change only
// cleans up behind itself.
func (t *tx) peek(ctx context.Context, prefix string, limit int64) ([]string, error) {
	answers, err := t.ask(ctx, []clientv3.Op{clientv3.OpGet(prefix, clientv3.WithPrefix(), clientv3.WithLimit(limit))})
	if err != nil {
		return nil, err
	}
	return answers[0], nil
}

// freeze demands that nothing below a prefix has been written since the read, in
// one comparison. What was deleted since is not seen.
func (t *tx) freeze(prefix string) {
	if t.frozen == nil {
		t.frozen = map[string]bool{}
	}
	t.frozen[prefix] = true
}

// maxList of a folder that is compared key by key.
const maxList = 1 << 10

// ask sends ops, at the revision of the first read, adds the answers to the view
// and returns the paths of each.
func (t *tx) ask(ctx context.Context, ops []clientv3.Op) (paths [][]string, err error) {
	for part := range slices.Chunk(ops, maxOps) {
		for i := range part {
			clientv3.WithRev(t.rev)(&part[i])
		}
		resp, err := t.l.store.Txn(ctx).Then(part...).Commit()
		if err != nil {
			return nil, err
		}
		if t.rev == 0 {
			t.rev = resp.Header.Revision
		}
		for _, r := range resp.Responses {
			var found []string
			for _, e := range r.GetResponseRange().Kvs {
				t.view[string(e.Key)] = entry{string(e.Value), e.ModRevision}
				found = append(found, string(e.Key))
			}
			paths = append(paths, found)
		}
	}
	return paths, nil
}

// value of a path that was read.
func (t *tx) value(path string) (string, bool) {
	e, there := t.view[path]
	return e.value, there
}

// revision at which a path was last written; 0 if it is absent.
func (t *tx) revision(path string) int64 { return t.view[path].rev }

// put writes a value, unless it is what was read.
func (t *tx) put(path, value string) {
	if now, there := t.view[path]; there && now.value == value {
		delete(t.writes, path)
		return
	}
	t.writes[path] = write{path: path, value: value}
}

// delete a path that was read, if it was there.
func (t *tx) delete(path string) {
	if _, there := t.view[path]; !there {
		delete(t.writes, path)
		return
	}
	t.writes[path] = write{path: path, deletion: true}
}

// deleteFolder deletes everything below a prefix, read or not, in one operation.
// Nothing of it may be put.
func (t *tx) deleteFolder(prefix string) { t.folders = append(t.folders, prefix) }

// check compares the revision of what is changed with the one asked for.
func (t *tx) check(revision int64) error {
	if t.by.IfMatch != 0 && t.by.IfMatch != revision {
		return errorf(Precondition, "keygate.if_match", "it is at revision %d, not at %d: read it again", revision, t.by.IfMatch)
	}
	return nil
}

// size is how many operations and comparisons there are so far.
func (t *tx) size() int {
	return max(len(t.writes)+len(t.folders)+len(t.intents), len(t.guards)+len(t.prefixes)+len(t.frozen)) + 3
}

// overlay is the value that a path will have.
func (t *tx) overlay(path string) (string, bool) {
	if w, there := t.writes[path]; there {
		return w.value, !w.deletion
	}
	for _, f := range t.folders {
		if strings.HasPrefix(path, f) {
			return "", false
		}
	}
	return t.value(path)
}

// changes lists the records and flags that change.
func (t *tx) changes() (all []audit.Change) {
	touched := map[string]bool{}
	for path := range t.writes {
		touched[path] = true
	}
	for path := range t.view {
		if slices.ContainsFunc(t.folders, func(f string) bool { return strings.HasPrefix(path, f) }) {
			touched[path] = true
		}
	}
	for path := range touched {
		if c, ok := t.l.changed(path, t.value, t.overlay); ok {
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(a, b audit.Change) int { return cmp.Compare(a.Path, b.Path) })
	return all
}

// changed is how a value changes; ok only of records, flags and tokens.
func (l *Ledger) changed(path string, before, after func(string) (string, bool)) (c audit.Change, ok bool) {
	if !strings.HasPrefix(path, l.space.Watched()) && !strings.HasPrefix(path, l.space.Tokens()) {
		return c, false
	}
	c.Path = path
	if value, there := before(path); there {
		value = audit.Redact(value)
		c.Before = &value
	}
	if value, there := after(path); there {
		value = audit.Redact(value)
		c.After = &value
	}
	return c, true
}

// commit sends the transaction.
func (t *tx) commit(ctx context.Context, result any) (*clientv3.TxnResponse, error) {
	var conditions []clientv3.Cmp
	for path := range t.guards {
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(path), "=", t.revision(path)))
	}
	for prefix := range t.prefixes {
		conditions = append(conditions, clientv3.Compare(clientv3.CreateRevision(prefix), "<", t.rev+1).WithPrefix())
	}
	for prefix := range t.frozen {
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(prefix), "<", t.rev+1).WithPrefix())
	}
	var ops []clientv3.Op
	for _, w := range t.writes {
		if w.deletion {
			ops = append(ops, clientv3.OpDelete(w.path))
		} else {
			ops = append(ops, clientv3.OpPut(w.path, w.value))
		}
	}
	for _, prefix := range t.folders {
		ops = append(ops, clientv3.OpDelete(prefix, clientv3.WithPrefix()))
	}
	for _, in := range t.intents {
		ops = append(ops, clientv3.OpPut(t.l.space.Intent(t.org, in.ID), in.value()))
	}
	ops = append(ops, clientv3.OpPut(t.l.space.Audit(t.org)+t.record.ID, t.record.Value()))
	if t.by.Once != nil {
		op, err := t.l.keepOnce(ctx, t.by.Once, t.org, t.by.Actor, result)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errNotSent, err)
		}
		ops = append(ops, op)
	}
	size := 0
	for _, op := range ops {
		size += len(op.KeyBytes()) + len(op.ValueBytes()) + 32
	}
	if size > maxRequest { // the client would not send it, in words of its own
		return nil, fmt.Errorf("%w: %d bytes, at most %d", rpctypes.ErrRequestTooLarge, size, maxRequest)
	}
	if len(ops) > maxOps || len(conditions) > maxOps {
		return nil, fmt.Errorf("%w: %d operations and %d comparisons, at most %d", rpctypes.ErrTooManyOps, len(ops), len(conditions), maxOps)
	}
	return send(ctx, t.l.store, conditions, ops)
}

// send commits a transaction. Once sent it is waited for, whoever hangs up; ctx
// has a deadline.
func send(ctx context.Context, store Store, conditions []clientv3.Cmp, ops []clientv3.Op) (*clientv3.TxnResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotSent, err)
	}
	deadline, _ := ctx.Deadline()
	sent, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancel()
	return store.Txn(sent).If(conditions...).Then(ops...).Commit()
}
