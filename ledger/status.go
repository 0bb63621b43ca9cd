package ledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

const (
	// maxFlags of one transaction. An absent flag compares two paths, itself and
	// what tells that it belongs there. The audit record, the Idempotency-Key and
	// the intents of the organization are compared besides.
	maxFlags = (maxOps - 4) / 2
	// changeTimeout bounds one transaction with all that it takes: the reads
	// before it, its repetitions, and finding out what became of it.
	changeTimeout = 5 * time.Second
)

// StatusAction is a change of flags.
type StatusAction uint8

// The zero StatusAction is Revoke.
const (
	Revoke  StatusAction = iota // developer: make inactive
	Approve                     // developer: make active
)

// String returns the verb.
func (a StatusAction) String() string {
	if a == Approve {
		return "approve"
	}
	return "revoke"
}

// Undo is the other action.
func (a StatusAction) Undo() StatusAction { return 1 - a }

// word that a flag of this kind has after the action.
func (a StatusAction) word(kind keyspace.Kind) string {
	status := authz.StatusRevoked
	switch {
	case kind == keyspace.KindDeveloper && a == Approve:
		status = authz.StatusActive
	case kind == keyspace.KindDeveloper:
		status = authz.StatusInactive
	case a == Approve:
		status = authz.StatusApproved
	}
	return status.String()
}

// Target is one flag: of a key, an app or a developer, or with a Product that
// of the product on a key. It is comparable.
type Target struct {
	Record  keyspace.Record
	Product authz.ProductName
}

// String names the target as an error does.
func (t Target) String() string {
	if t.Product != "" {
		return fmt.Sprintf("product %q on key %s", string(t.Product), t.Record.Key)
	}
	switch t.Record.Kind {
	case keyspace.KindKey:
		return "key " + t.Record.Key.String()
	case keyspace.KindDeveloper:
		return fmt.Sprintf("developer %q", t.Record.Name)
	}
	return fmt.Sprintf("app %q", t.Record.Name)
}

// Path of the flag.
func (t Target) Path(space keyspace.Space) string {
	if t.Product != "" {
		return space.KeyProduct(t.Record, t.Product)
	}
	return space.Status(t.Record)
}

// check tells whether there is such a flag in the schema.
func (t Target) check() error {
	switch k := t.Record.Kind; {
	case k != keyspace.KindKey && k != keyspace.KindApp && k != keyspace.KindDeveloper:
		return fmt.Errorf("a record of kind %v has no status", k)
	case t.Product != "" && k != keyspace.KindKey:
		return fmt.Errorf("%v has no status for a product: only a key has", Target{Record: t.Record})
	}
	return keyspace.CheckOrganization(t.Record.Organization)
}

// Store is what a change of statuses needs of etcd; a *clientv3.Client has it.
type Store interface {
	clientv3.KV
	Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan
	Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error)
}

// StatusOptions of SetStatus.
type StatusOptions struct {
	// Barrier asks all replicas for an acknowledgement, so that Change.Wait has
	// something to wait for.
	Barrier bool
	// Progress is called after each transaction, if it is not nil.
	Progress func(done, total int)
}

// Flag is what became of one target.
type Flag struct {
	Target Target
	// Path in etcd.
	Path string
	// Before is the value that was found, empty if there was none.
	Before string
	// Changed is false if the flag was in that state already.
	Changed bool
}

// Change is what SetStatus did.
type Change struct {
	Action StatusAction
	// Revision at which the last flag was what it should be; 0 if none is.
	Revision int64
	// Flags that are as they should be, in the order of the targets. A target
	// that was given twice stands here once.
	Flags []Flag
	// NoSpace: etcd has no space left. It takes no barrier, and no acknowledgement
	// of a replica: what is known is the time.
	NoSpace bool
	// Stops, on a dry run, are the pairs of a key and a product that open now and
	// would not after.
	Stops []Stop
	// Replayed: the change was made the first time that it was asked for, at
	// Revision. Nothing else is known of it.
	Replayed bool
	// ByDeletion: for want of space flags that opened were deleted instead: an
	// absent flag refuses.
	ByDeletion bool

	store      Store
	space      keyspace.Space
	cluster    uint64         // whose Revision that is
	listed     bool           // registered is known
	registered []registration // at Revision
	answered   time.Time      // when the last transaction's answer was here
}

// Changed counts the flags that were in another state before.
func (c Change) Changed() (n int) {
	for _, f := range c.Flags {
		if f.Changed {
			n++
		}
	}
	return n
}

// Errors of SetStatus, besides those of etcd.
var (
	// ErrNotFound: there is no such key, app, developer or product on a key. A
	// NotFoundError says which.
	ErrNotFound = errors.New("not found")
	// ErrConflict: others kept changing the same flags. Nothing was written.
	ErrConflict = errors.New("others kept changing it")
	// ErrOutcomeUnknown: the change may have taken place, or may not.
	ErrOutcomeUnknown = errors.New("outcome unknown")
	// ErrListDenied: a change with a barrier lists the replicas in the same
	// transaction, and the user may not read them. Nothing of it was written;
	// without a barrier it needs no such right.
	ErrListDenied = errors.New("the replicas may not be listed")
)

// NotFoundError names what was not there.
type NotFoundError struct{ Targets []Target }

func (e *NotFoundError) Error() string {
	const most = 10
	var names []string
	for i, t := range e.Targets {
		if i == most {
			names = append(names, fmt.Sprintf("%d more", len(e.Targets)-most))
			break
		}
		names = append(names, t.String())
	}
	if len(names) == 0 {
		return ErrNotFound.Error()
	}
	return fmt.Sprintf("not in organization %q: %s", string(e.Targets[0].Record.Organization), strings.Join(names, ", "))
}

func (e *NotFoundError) Unwrap() error { return ErrNotFound }

// PartialError says how far a change of several flags came. The rest has not
// been done, or it is not known; the same again is safe.
type PartialError struct {
	Done, Total int
	// Begun: the rest will be done, by the next keygate that finds the intent.
	Begun bool
	Err   error
}

func (e *PartialError) Error() string {
	if e.Begun {
		return fmt.Sprintf("%d of %d done, the rest will be finished by a running keygate, and repeating it is safe: %v", e.Done, e.Total, e.Err)
	}
	return fmt.Sprintf("%d of %d done, and repeating it is safe: %v", e.Done, e.Total, e.Err)
}

func (e *PartialError) Unwrap() error { return e.Err }

// SetStatus revokes or approves the targets, which are all of one organization.
// It is safe for concurrent use and for repetition: a flag that is in that state
// already is not written again, but by a revocation while there is an intent,
// which has to be seen to come after it. The audit record is part of the
// transaction.
//
// An approval creates nothing that was not there: a flag that is absent was
// revoked by deletion, and is written again, only if its record tells that it
// belongs there. For a product on a key that is the credential's list of
// products, or the index.
//
// Up to 62 flags change in one transaction, at one revision. More take several,
// after an intent that makes them all-or-nothing: if this process ends, another
// finishes what the intent says ([Ledger.Finish]); a flag that somebody has
// changed after the intent stays as it is. About 8,000 flags share an intent; with
// by.Once more are refused, for one answer cannot stand for several intents.
//
// The error is a NotFoundError if some of the targets are not there, and the
// rest is done; a PartialError, or for a single target its cause, if not all
// could be done. The Change tells in either case what was. A transaction whose
// answer is lost is looked into for as long as 5 s; if that does not resolve it
// the error is ErrOutcomeUnknown, never anything that sounds like a failure. A
// transaction that has been sent is waited for even when ctx is cancelled.
//
// The barrier is part of the last transaction. If that one does not take place
// and others did, the replicas are asked by a barrier alone, so that there is a
// receipt for what stands; but not when ctx is cancelled. Change.Asked tells.
//
// When etcd has no space left a revocation deletes the flags: etcd takes that,
// and an absent flag refuses. Its audit record goes to the spool. An approval
// then is an error.
//
// by.IfMatch is for a single target, and compared with its record and flags.
func (l *Ledger) SetStatus(ctx context.Context, by By, action StatusAction, targets []Target, opts StatusOptions) (Change, error) {
	c := Change{Action: action, store: l.store, space: l.space}
	targets, err := distinct(targets)
	if err != nil {
		return c, fmt.Errorf("%v: %w", action, err)
	}
	switch {
	case by.IfMatch != 0 && len(targets) > 1:
		err = errorf(Invalid, "keygate.if_match", "If-Match is of one object, and %d are to be changed", len(targets))
	case by.DryRun:
		err = l.preview(ctx, by, &c, targets)
	case len(targets) <= maxFlags:
		err = l.setFlags(ctx, by, &c, targets, journal{}, opts.Barrier, func(done int) { opts.tell(done, len(targets)) })
	default:
		err = l.setMany(ctx, by, &c, targets, opts)
	}
	var partial *PartialError
	if err != nil && opts.Barrier && !by.DryRun && len(c.Flags) > 0 && ctx.Err() == nil && (!errors.Is(err, ErrNotFound) || errors.As(err, &partial)) {
		if askErr := c.ask(ctx, targets[0].Record.Organization); askErr != nil {
			err = errors.Join(err, fmt.Errorf("no receipt: %w", askErr))
		}
	}
	var refusal *Error
	if err != nil && !errors.As(err, &refusal) {
		err = fmt.Errorf("%v: %w", action, err)
	}
	return c, err
}

func (o StatusOptions) tell(done, total int) {
	if o.Progress != nil {
		o.Progress(done, total)
	}
}

// setMany changes more flags than one transaction holds.
func (l *Ledger) setMany(ctx context.Context, by By, c *Change, targets []Target, opts StatusOptions) error {
	parts := l.journals(targets)
	if by.Once != nil && len(parts) > 1 {
		return errorf(Limit, "keygate.limit", "%d flags are too many for one change that is made once: %d of them fit", len(targets), len(parts[0]))
	}
	var missing error
	done := 0
	for _, part := range parts {
		j, err := l.begin(ctx, by, c, part)
		switch {
		case c.Replayed:
			c.Revision = j.rev
			return err
		case errors.Is(err, rpctypes.ErrNoSpace) && c.Action == Revoke: // by deletion, and each for itself
			j = journal{}
		case err != nil:
			return errors.Join(missing, &PartialError{Done: len(c.Flags), Total: len(targets), Err: err})
		}
		rest := by
		rest.Once = nil // the intent's own
		barrier := opts.Barrier && done+len(part) == len(targets)
		err = l.setFlags(ctx, rest, c, part, j, barrier, func(n int) { opts.tell(done+n, len(targets)) })
		done += len(part)
		var partial *PartialError
		if errors.As(err, &partial) {
			partial.Done, partial.Total = len(c.Flags), len(targets)
			partial.Begun = partial.Begun && done == len(targets) // what comes behind is in no intent
			return errors.Join(missing, err)
		}
		missing = errors.Join(missing, err)
		if j.path != "" {
			// What is left of it is found by whoever finishes: nothing to do.
			_, _ = l.store.Do(ctx, clientv3.OpDelete(j.path))
		}
	}
	return missing
}

// setFlags changes flags, as many in a transaction as fit. The error may be a
// NotFoundError together with a PartialError.
func (l *Ledger) setFlags(ctx context.Context, by By, c *Change, targets []Target, j journal, barrier bool, progress func(done int)) error {
	var missing []Target
	var failed error
	before, handled := len(c.Flags), 0
	for part := range slices.Chunk(targets, maxFlags) {
		handled += len(part)
		s := setter{l: l, by: by, change: c, journal: j, barrier: barrier && handled == len(targets), once: by.Once}
		absent, err := s.set(ctx, part)
		missing = append(missing, absent...)
		if err != nil {
			failed = errors.Join(failed, err)
			if c.Action != Revoke || !errors.Is(err, ErrConflict) {
				break
			}
		}
		if progress != nil {
			progress(handled)
		}
	}
	if failed != nil && len(targets) > 1 {
		failed = &PartialError{Done: len(c.Flags) - before, Total: len(targets), Begun: j.path != "", Err: failed}
	}
	if len(missing) > 0 {
		failed = errors.Join(failed, &NotFoundError{missing})
	}
	return failed
}

// preview works out what a change would do.
func (l *Ledger) preview(ctx context.Context, by By, c *Change, targets []Target) error {
	var missing []Target
	writes := map[string]write{}
	for part := range slices.Chunk(targets, maxFlags) {
		s := setter{l: l, by: by, change: c, record: l.record(by, targets[0].Record.Organization, c.Action.String(), "")}
		if err := s.read(ctx, part); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if err := s.plan(part); err != nil {
			return err
		}
		if by.IfMatch != 0 {
			if err := s.matches(ctx); err != nil {
				return err
			}
		}
		missing = append(missing, s.absent...)
		c.Flags = append(c.Flags, s.flags...)
		c.Revision = s.revision
		for _, f := range s.flags {
			if f.Changed {
				writes[f.Path] = write{path: f.Path, value: c.Action.word(f.Target.Record.Kind)}
			}
		}
	}
	stops, err := l.stops(ctx, targets[0].Record.Organization, c.Revision, writes, nil)
	if err != nil {
		return fmt.Errorf("work out what it would stop: %w", err)
	}
	c.Stops = stops
	if len(missing) > 0 {
		return &NotFoundError{missing}
	}
	return nil
}

// Barrier asks all replicas for an acknowledgement of everything up to now, and
// changes nothing. org is any organization: every replica sees its barrier.
func Barrier(ctx context.Context, store Store, space keyspace.Space, org authz.Organization) (Change, error) {
	c := Change{store: store, space: space}
	if err := keyspace.CheckOrganization(org); err != nil {
		return c, fmt.Errorf("barrier: %w", err)
	}
	resp, err := store.Txn(ctx).Then(barrierOps(space, org)...).Commit()
	if err != nil {
		return c, fmt.Errorf("write a barrier: %w", err)
	}
	c.took(resp, true)
	return c, nil
}

// ask asks all replicas for what has been done until now, by a transaction of
// its own.
func (c *Change) ask(ctx context.Context, org authz.Organization) error {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	ops := barrierOps(c.space, org)
	if c.NoSpace {
		ops = []clientv3.Op{listReplicas(c.space)}
	}
	resp, err := c.store.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return fmt.Errorf("ask the replicas: %w", err)
	}
	c.took(resp, true)
	return nil
}

// barrierOps write the barrier and list the replicas, at one revision: a list
// that was read earlier may miss one that registers, proves itself and answers
// in between.
func barrierOps(space keyspace.Space, org authz.Organization) []clientv3.Op {
	return []clientv3.Op{clientv3.OpPut(space.Barrier(org), time.Now().UTC().Format(time.RFC3339Nano)), listReplicas(space)}
}

func listReplicas(space keyspace.Space) clientv3.Op {
	return clientv3.OpGet(space.Replicas(), clientv3.WithPrefix())
}

// took notes a transaction's answer. listed: its last operation lists the
// replicas.
func (c *Change) took(resp *clientv3.TxnResponse, listed bool) {
	c.answered, c.Revision, c.cluster = time.Now(), resp.Header.Revision, resp.Header.ClusterId
	if listed {
		list := resp.Responses[len(resp.Responses)-1].GetResponseRange()
		c.listed, c.registered = true, registrations(c.space, list.Kvs)
	}
}

// distinct returns the targets without repetitions.
func distinct(targets []Target) ([]Target, error) {
	if len(targets) == 0 {
		return nil, errors.New("nothing is named")
	}
	seen := make(map[Target]bool, len(targets))
	var all []Target
	for _, t := range targets {
		if err := t.check(); err != nil {
			return nil, err
		}
		if t.Record.Organization != targets[0].Record.Organization {
			return nil, fmt.Errorf("organizations %q and %q: want one at a time", string(targets[0].Record.Organization), string(t.Record.Organization))
		}
		if !seen[t] {
			seen[t] = true
			all = append(all, t)
		}
	}
	return all, nil
}

// setter changes the flags of one transaction.
type setter struct {
	l       *Ledger
	by      By
	change  *Change
	journal journal
	barrier bool
	once    *Once
	record  audit.Record // of this transaction

	revision int64 // of the first read

	view   view
	absent []Target
	flags  []Flag
	guards map[string]bool // paths of the view that must not have changed
	first  map[string]entry
	lost   bool // a transaction was sent and its answer is lost
}

// set returns the targets that are not there.
func (s *setter) set(ctx context.Context, targets []Target) ([]Target, error) {
	budget, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	object := ""
	if len(targets) == 1 {
		object = targets[0].Path(s.change.space)
	}
	s.record = s.l.record(s.by, targets[0].Record.Organization, s.change.Action.String(), object)
	err := s.attempt(budget, targets)
	switch {
	case err == nil:
	case s.lost && s.change.NoSpace: // its record would otherwise be lost with the answer
		s.record.Note = "etcd had no space left: done by deletion, as far as is known"
		s.l.keep(s.record)
		fallthrough
	case s.lost:
		return nil, fmt.Errorf("%w: %w: it may have taken place, now or in a moment: look at %s, or repeat it", ErrOutcomeUnknown, err, targets[0].Path(s.change.space))
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return nil, s.denied(budget, err)
	case errors.Is(err, rpctypes.ErrNoSpace):
		return nil, noSpace(err)
	}
	if err == nil {
		s.change.Flags = append(s.change.Flags, s.flags...)
	}
	return s.absent, err
}

// denied tells a right that the change needs from one that only its barrier
// needs, for etcd refuses both in the same words.
func (s *setter) denied(ctx context.Context, err error) error {
	list := s.change.space.Replicas()
	if s.barrier {
		if _, listErr := s.change.store.Do(ctx, listReplicas(s.change.space)); errors.Is(listErr, rpctypes.ErrPermissionDenied) {
			return fmt.Errorf("%w: %w, so none of it was written: a change with a barrier needs the right to read %s beside that to write; grant it, or repeat the change without a barrier",
				err, ErrListDenied, list)
		}
	}
	return s.l.needs(err)
}

// needs adds to etcd's refusal which rights a change needs.
func (l *Ledger) needs(err error) error {
	return fmt.Errorf("%w: a change needs the right to read and write %s and %s, and of many flags %s", err, l.space.Watched(), l.space.Audits(), l.space.Intents())
}

// attempt repeats read and write until the one holds while the other is done.
func (s *setter) attempt(ctx context.Context, targets []Target) error {
	for range maxAttempts {
		if err := s.read(ctx, targets); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if s.once != nil {
			if e, there := s.view[s.oncePath()]; there && !s.lost {
				_, err := s.once.replay(e.value)
				s.change.Replayed, s.change.Revision = err == nil, e.rev
				return err
			}
		}
		if e, there := s.view[s.auditPath()]; there {
			// The transaction whose answer was lost took place, with the flags that
			// were planned for it. What others have written since stays.
			s.change.answered, s.change.Revision = time.Now(), e.rev
			if s.barrier {
				// Without an answer there is no receipt, and Change.Asked says so.
				_ = s.change.ask(ctx, s.record.Organization)
			}
			return nil
		}
		if err := s.plan(targets); err != nil {
			return err
		}
		if len(s.flags) == 0 && (!s.barrier || s.change.Revision == 0) {
			return nil // nothing is there, and nothing was before
		}
		resp, err := s.commit(ctx)
		if s.change.Action == Revoke && errors.Is(err, rpctypes.ErrNoSpace) {
			s.change.NoSpace = true
			continue
		}
		switch {
		case errors.Is(err, rpctypes.ErrLeaseNotFound): // of the Once: etcd was restored
			s.l.once.forget()
		case err != nil && !refused(err):
			s.lost = true
			// Read what became of it. To write once more is safe: a transaction
			// that takes place after all would find the flags changed, or change
			// them so that the second one does not.
			if ctx.Err() != nil {
				return err
			}
		case err != nil:
			return fmt.Errorf("write: %w", err)
		case resp.Succeeded:
			s.change.took(resp, s.barrier)
			s.change.ByDeletion = s.change.ByDeletion || s.deleted()
			if s.change.NoSpace {
				s.record.Revision, s.record.Note = resp.Header.Revision, "etcd had no space left: done by deletion, and recorded later"
				s.l.keep(s.record)
			}
			return nil
		case s.by.IfMatch != 0:
			if err := s.matches(ctx); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("%w: given up after %d attempts", ErrConflict, maxAttempts)
}

// read fills the view: the flags, and for those that are absent what may tell
// that they belong there.
func (s *setter) read(ctx context.Context, targets []Target) error {
	s.view = view{}
	space := s.change.space
	var ops []clientv3.Op
	for _, t := range targets {
		ops = append(ops, clientv3.OpGet(t.Path(space)))
	}
	ops = append(ops, clientv3.OpGet(s.auditPath()), clientv3.OpGet(s.intents(), clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(1)))
	if s.once != nil {
		ops = append(ops, clientv3.OpGet(s.oncePath()))
	}
	rev, err := s.view.readAt(ctx, s.change.store, ops)
	if err != nil {
		return err
	}
	s.revision = rev
	asked := map[string]bool{}
	ops = ops[:0]
	ask := func(path string) {
		if !asked[path] {
			asked[path] = true
			ops = append(ops, clientv3.OpGet(path))
		}
	}
	for _, t := range targets {
		if _, there := s.view[t.Path(space)]; there {
			continue
		}
		ask(space.Details(t.Record))
		if t.Product != "" {
			ask(productIndex(space, t))
		}
	}
	return s.view.read(ctx, s.change.store, ops)
}

func productIndex(space keyspace.Space, t Target) string {
	return space.IndexProductKeys(t.Record.Organization, t.Product) + t.Record.Key.String()
}

// plan works out flags, absent and guards from the view.
func (s *setter) plan(targets []Target) error {
	s.flags, s.absent, s.guards = nil, nil, map[string]bool{}
	if s.first == nil {
		s.first = make(map[string]entry, len(targets))
		for _, t := range targets {
			path := t.Path(s.change.space)
			s.first[path] = s.view[path]
		}
	}
	for _, t := range targets {
		path := t.Path(s.change.space)
		now, there := s.view[path]
		if !there {
			if s.journal.late { // deleted since the intent, for all that can be known
				s.absent = append(s.absent, t)
				continue
			}
			guard := s.belongs(t)
			if guard == "" {
				s.absent = append(s.absent, t)
				continue
			}
			s.guards[guard] = true
		}
		first := s.first[path]
		if s.lost && now.rev != first.rev && !s.done(t, now, there) {
			// Changed, perhaps by what was sent, and changed back by others: who
			// writes it again would undo what came later.
			return fmt.Errorf("%s is %s at revision %d, by others: %w", path, shorten(now.value), now.rev, ErrConflict)
		}
		f := Flag{Target: t, Path: path, Before: now.value, Changed: !s.done(t, now, there)}
		if s.lost && now.rev != first.rev {
			f.Before, f.Changed = first.value, true
		}
		s.flags = append(s.flags, f)
	}
	return nil
}

// done tells whether the flag is as it should be.
func (s *setter) done(t Target, now entry, there bool) bool {
	if s.change.NoSpace && !there || s.journal.rev != 0 && now.rev > s.journal.rev {
		return true // of the second: by this change, or by others after it
	}
	return there && now.value == s.change.Action.word(t.Record.Kind)
}

// deleted tells whether a flag was deleted, by the transaction that took place
// or by one before it whose answer was lost.
func (s *setter) deleted() bool {
	return s.change.NoSpace && slices.ContainsFunc(s.flags, func(f Flag) bool {
		now, there := s.view[f.Path]
		return f.Changed && !(there && s.done(f.Target, now, there))
	})
}

// belongs returns the path whose value tells that an absent flag belongs there,
// or nothing.
func (s *setter) belongs(t Target) string {
	details := s.change.space.Details(t.Record)
	value, there := s.view[details]
	if !there || t.Product == "" {
		if !there {
			return ""
		}
		return details
	}
	credential, _ := jsonobject.Parse([]byte(value.value)) // one that cannot be read opens nothing; the index may still tell
	for _, ref := range productRefs(credential) {
		if ref.name == t.Product {
			return details
		}
	}
	if index := productIndex(s.change.space, t); s.has(index) {
		return index
	}
	return ""
}

func (s *setter) has(path string) bool {
	_, there := s.view[path]
	return there
}

// commit sends one transaction. Once sent it is waited for, whoever hangs up.
func (s *setter) commit(ctx context.Context) (*clientv3.TxnResponse, error) {
	var conditions []clientv3.Cmp
	var ops []clientv3.Op
	for _, f := range s.flags {
		now, there := s.view[f.Path]
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(f.Path), "=", now.rev))
		switch {
		case s.done(f.Target, now, there) && !s.after(now):
		case s.change.NoSpace:
			ops = append(ops, clientv3.OpDelete(f.Path))
		default:
			ops = append(ops, clientv3.OpPut(f.Path, s.change.Action.word(f.Target.Record.Kind)))
		}
	}
	for path := range s.guards {
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(path), "=", s.view[path].rev))
	}
	s.describe()
	if !s.change.NoSpace {
		// The record is written once, so it tells of a transaction whose answer was
		// lost whether it took place.
		conditions = append(conditions, clientv3.Compare(clientv3.CreateRevision(s.auditPath()), "=", 0))
		ops = append(ops, clientv3.OpPut(s.auditPath(), s.record.Value()))
		if s.once != nil {
			op, err := s.l.keepOnce(ctx, s.once, s.record.Organization, s.by.Actor, nil)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", errNotSent, err)
			}
			conditions = append(conditions, clientv3.Compare(clientv3.CreateRevision(s.oncePath()), "=", 0))
			ops = append(ops, op)
		}
		if s.change.Action == Revoke {
			conditions = append(conditions, clientv3.Compare(clientv3.CreateRevision(s.intents()), "<", s.revision+1).WithPrefix())
		}
	}
	if s.by.IfMatch != 0 {
		for folder := range s.folders() {
			conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(folder), "<", s.by.IfMatch+1).WithPrefix())
		}
	}
	switch {
	case s.barrier && s.change.NoSpace:
		ops = append(ops, listReplicas(s.change.space))
	case s.barrier:
		ops = append(ops, barrierOps(s.change.space, s.record.Organization)...)
	case len(ops) == 0:
		// Without an operation a member compares with what it has itself, however old.
		ops = append(ops, clientv3.OpGet(s.flags[0].Path, clientv3.WithCountOnly()))
	}
	return send(ctx, s.change.store, conditions, ops)
}

// after tells whether a flag that is as it should be is written all the same: a
// revocation is newer than every intent that is there, and must look it, or the
// late half of an approval would undo it.
func (s *setter) after(now entry) bool {
	if s.change.Action != Revoke || s.change.NoSpace || s.journal.rev != 0 && now.rev > s.journal.rev {
		return false
	}
	for path := range s.view {
		if strings.HasPrefix(path, s.intents()) && path != s.journal.path {
			return true
		}
	}
	return false
}

// intents is the folder of the organization's.
func (s *setter) intents() string { return s.change.space.Intent(s.record.Organization, "") }

// describe lists the flags that change in the audit record.
func (s *setter) describe() {
	s.record.Changes = nil
	for _, f := range s.flags {
		if !f.Changed {
			continue
		}
		c := audit.Change{Path: f.Path}
		if now, there := s.view[f.Path]; there {
			before := audit.Redact(now.value)
			c.Before = &before
		}
		if !s.change.NoSpace {
			after := s.change.Action.word(f.Target.Record.Kind)
			c.After = &after
		}
		s.record.Changes = append(s.record.Changes, c)
	}
	s.record.NoOp = len(s.record.Changes) == 0
}

// folders of the records that the flags belong to.
func (s *setter) folders() map[string]bool {
	all := map[string]bool{}
	for _, f := range s.flags {
		all[s.change.space.Folder(f.Target.Record)] = true
	}
	return all
}

// matches tells whether the records are still what By.IfMatch says.
func (s *setter) matches(ctx context.Context) error {
	for folder := range s.folders() {
		resp, err := s.change.store.Do(ctx, clientv3.OpGet(folder, clientv3.WithPrefix(), clientv3.WithKeysOnly()))
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		for _, kv := range resp.Get().Kvs {
			if kv.ModRevision > s.by.IfMatch {
				return errorf(Precondition, "keygate.if_match", "it is at revision %d, not at %d: read it again", kv.ModRevision, s.by.IfMatch)
			}
		}
	}
	return nil
}

func (s *setter) auditPath() string {
	return s.change.space.Audit(s.record.Organization) + s.record.ID
}

func (s *setter) oncePath() string {
	return s.once.path(s.change.space, s.record.Organization, s.by.Actor)
}

var errNotSent = errors.New("not sent")

// refused tells whether an error says that a transaction did not take place and
// will not. Of any other that is not known: etcd may have it.
func refused(err error) bool {
	for _, no := range []error{
		errNotSent, rpctypes.ErrNoSpace, rpctypes.ErrLeaseNotFound, rpctypes.ErrTooManyOps, rpctypes.ErrDuplicateKey, rpctypes.ErrRequestTooLarge, rpctypes.ErrTooManyRequests,
		rpctypes.ErrPermissionDenied, rpctypes.ErrAuthFailed, rpctypes.ErrUserEmpty, rpctypes.ErrInvalidAuthToken, rpctypes.ErrAuthOldRevision,
	} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}
