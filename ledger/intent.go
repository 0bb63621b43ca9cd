package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// What does not fit into one transaction is made all-or-nothing by an intent: a
// value that says what is to be done, written in a transaction of its own or in
// the first one. Before it nothing has been done; after it all of it will be, by
// whoever began it or, if that has ended, by any other keygate. What others
// write meanwhile is newer than the intent and stays as it is.

const (
	// intentAge is how old an intent must be before somebody else finishes it.
	// Two at once are safe, and only get into each other's way.
	intentAge = 10 * time.Second
	// maxIntent in bytes of its flags.
	maxIntent = 1 << 20
)

// intent is the stored form.
type intent struct {
	Version int    `json:"v"`
	ID      string `json:"id"`
	At      int64  `json:"at"` // ms
	// Action is "revoke" or "approve" of flags, or "cleanup" behind an app or a
	// developer that is gone.
	Action    string            `json:"action"`
	Flags     []string          `json:"flags,omitempty"` // by path
	App       authz.AppID       `json:"appId,omitempty"`
	Developer authz.DeveloperID `json:"developerId,omitempty"`
	// By whom, for the audit records.
	Actor     audit.Actor `json:"actor"`
	Reason    string      `json:"reason,omitempty"`
	Ticket    string      `json:"ticket,omitempty"`
	RequestID string      `json:"requestId,omitempty"`
}

const cleanup = "cleanup"

func (l *Ledger) newIntent(by By, action string) intent {
	now := l.now()
	return intent{
		Version: keyspace.Version, ID: audit.NewID(now), At: now.UnixMilli(), Action: action,
		Actor: by.Actor, Reason: by.Reason, Ticket: by.Ticket, RequestID: by.RequestID,
	}
}

func (in intent) value() string {
	b, err := json.Marshal(in)
	if err != nil { // it has only strings and numbers
		panic("ledger: " + err.Error())
	}
	return string(b)
}

func (in intent) by() By {
	return By{Actor: in.Actor, Reason: in.Reason, Ticket: in.Ticket, RequestID: in.RequestID}
}

// leaveCleanup leaves the keys of an app that is deleted here to be removed
// later: whatever the index has of it. They open nothing meanwhile, for their
// app is gone.
func (t *tx) leaveCleanup(app authz.AppID) {
	in := t.l.newIntent(t.by, cleanup)
	in.App = app
	t.intents = append(t.intents, in)
}

// Finish does what others have begun and left, and returns how many intents it
// has finished. It may run in any number of processes at once.
func (l *Ledger) Finish(ctx context.Context) (n int, err error) {
	return l.finish(ctx, intentAge)
}

func (l *Ledger) finish(ctx context.Context, age time.Duration) (n int, failed error) {
	from, end := l.space.Intents(), clientv3.GetPrefixRangeEnd(l.space.Intents())
	for {
		resp, err := l.store.Do(ctx, clientv3.OpGet(from, clientv3.WithRange(end), clientv3.WithLimit(16)))
		if err != nil {
			return n, errors.Join(failed, fmt.Errorf("finish what was begun: %w", err))
		}
		page := resp.Get()
		for _, kv := range page.Kvs {
			path := string(kv.Key)
			from = path + "\x00"
			done, err := l.finishOne(ctx, path, kv.Value, kv.ModRevision, age)
			if err != nil { // it must not keep those behind it
				failed = errors.Join(failed, fmt.Errorf("finish %s: %w", path, err))
			}
			if done {
				n++
			}
		}
		if !page.More || ctx.Err() != nil {
			return n, failed
		}
	}
}

// finishOne performs an intent that is old enough.
func (l *Ledger) finishOne(ctx context.Context, path string, value []byte, rev int64, age time.Duration) (bool, error) {
	org, err := l.organizationOf(path)
	if err != nil {
		return false, err
	}
	var in intent
	if err := json.Unmarshal(value, &in); err != nil {
		return false, err
	}
	if in.Version != keyspace.Version {
		return false, fmt.Errorf("\"v\" is %d, want %d", in.Version, keyspace.Version)
	}
	// One from the future is of a clock that cannot be believed.
	if is := l.now().Sub(time.UnixMilli(in.At)); is >= 0 && is < age {
		return false, nil
	}
	err = l.perform(ctx, org, in, path, rev)
	return err == nil, err
}

// ownShare is how long whoever leaves a cleanup goes on with it: as a rule long
// enough, and no burden on who waits for the answer.
const ownShare = 2 * time.Second

// performOwn cleans up behind a change, as far as it comes. What is left is an
// intent, so no error matters.
func (l *Ledger) performOwn(ctx context.Context, org authz.Organization, done Done) {
	ctx, cancel := context.WithTimeout(ctx, ownShare)
	defer cancel()
	for _, in := range done.intents {
		if in.Action == cleanup {
			_ = l.perform(ctx, org, in, l.space.Intent(org, in.ID), done.Revision)
		}
	}
}

// organizationOf an intent's path.
func (l *Ledger) organizationOf(path string) (authz.Organization, error) {
	// The folder of an intent is that of a record's organization, so one parser
	// knows both.
	seg, _, _ := strings.Cut(strings.TrimPrefix(path, l.space.Intents()), "/")
	p, err := l.space.Parse(l.space.Watched() + seg + "/.barrier")
	return p.Record.Organization, err
}

// perform what an intent says and remove it.
func (l *Ledger) perform(ctx context.Context, org authz.Organization, in intent, path string, rev int64) error {
	switch in.Action {
	case Revoke.String(), Approve.String():
		action := Revoke
		if in.Action == Approve.String() {
			action = Approve
		}
		var targets []Target
		for _, flag := range in.Flags {
			p, err := l.space.Parse(flag)
			if err != nil {
				return err
			}
			targets = append(targets, Target{Record: p.Record, Product: p.Product})
		}
		c := Change{Action: action, store: l.store, space: l.space}
		err := l.setFlags(ctx, in.by(), &c, targets, journal{path, rev, true}, false, nil)
		var partial *PartialError
		if err != nil && (errors.As(err, &partial) || !errors.Is(err, ErrNotFound)) {
			return err
		}
	case cleanup:
		clean := l.cleanUpKeys
		if in.Developer != "" {
			clean = l.cleanUpApps
		}
		if err := clean(ctx, org, in, rev); err != nil {
			return err
		}
	default:
		return fmt.Errorf("action %q is none of revoke, approve, cleanup: a newer keygate wrote it", in.Action)
	}
	if _, err := l.store.Do(ctx, clientv3.OpDelete(path)); err != nil {
		return err
	}
	return nil
}

// cleanUpKeys removes the keys of an app that is gone. If an app of the same id
// is there again, those stay that it lists or that are newer than the intent.
func (l *Ledger) cleanUpKeys(ctx context.Context, org authz.Organization, in intent, rev int64) error {
	index, details := l.space.IndexAppKeys(org, in.App), l.space.Details(keyspace.AppRecord(org, in.App))
	return l.cleanUp(ctx, org, in, details, index, func(ctx context.Context, t *tx, path string) (bool, error) {
		id, err := authz.ParseKeyID(strings.TrimPrefix(path, index))
		if err != nil {
			t.delete(path) // no key has such a name
			return true, nil
		}
		if value, again := t.value(details); again {
			app, _ := jsonobject.Parse([]byte(value)) // one that cannot be read lists nothing
			key := l.space.Details(keyspace.KeyRecord(org, id))
			if err := t.get(ctx, key); err != nil {
				return false, err
			}
			if slices.Contains(keyIDs(app), id.String()) || t.revision(key) > rev || t.revision(path) > rev {
				return true, nil
			}
		}
		return t.deleteKey(ctx, in.App, id)
	})
}

// cleanUpApps removes the apps of a developer who is gone. If there is one of
// the same id again, those stay that are newer than the intent.
func (l *Ledger) cleanUpApps(ctx context.Context, org authz.Organization, in intent, rev int64) error {
	index, details := l.space.IndexDeveloperApps(org, in.Developer), l.space.Details(keyspace.DeveloperRecord(org, in.Developer))
	return l.cleanUp(ctx, org, in, details, index, func(ctx context.Context, t *tx, path string) (bool, error) {
		if len(t.writes) > maxOps/2 {
			return false, nil
		}
		if t.revision(path) > rev {
			return true, nil
		}
		t.delete(path)
		return true, t.deleteAppsOf(ctx, in.Developer, []string{path})
	})
}

// cleanUp calls remove with each path below an index, in transactions one after
// another. remove tells whether there was room for it. gone is compared: while
// it is planned, what was deleted does not come back.
func (l *Ledger) cleanUp(ctx context.Context, org authz.Organization, in intent, gone, index string, remove func(context.Context, *tx, string) (bool, error)) error {
	const atOnce = 32
	from, end := index, clientv3.GetPrefixRangeEnd(index)
	for {
		next := ""
		_, err := l.change(ctx, in.by(), org, "delete", gone, func(ctx context.Context, t *tx) (any, error) {
			if err := t.get(ctx, gone); err != nil {
				return nil, err
			}
			answers, err := t.ask(ctx, []clientv3.Op{clientv3.OpGet(from, clientv3.WithRange(end), clientv3.WithLimit(atOnce))})
			if err != nil {
				return nil, err
			}
			next = ""
			for i, path := range answers[0] {
				if t.size() > maxOps/2 {
					break
				}
				fits, err := remove(ctx, t, path)
				if err != nil {
					return nil, err
				}
				if !fits {
					if i == 0 && len(t.writes)+len(t.folders) > 0 {
						next = path // the rest of it in the next transaction
					}
					break
				}
				next = path + "\x00"
			}
			if len(t.writes)+len(t.folders) == 0 {
				return nil, errNothing
			}
			return nil, nil
		})
		if err != nil && !errors.Is(err, errNothing) {
			return err
		}
		if next == "" {
			return nil
		}
		from = next
	}
}

// deleteKey deletes a key of an app with all that stands in the index. A key
// that says that it is another app's only loses its place in this one's index.
// It tells whether there is room for it in the transaction; of a key that has
// more products than one holds, as many are taken off as fit.
func (t *tx) deleteKey(ctx context.Context, app authz.AppID, id authz.KeyID) (bool, error) {
	record := keyspace.KeyRecord(t.org, id)
	folder, details := t.l.space.Folder(record), t.l.space.Details(record)
	paths, err := t.peek(ctx, folder, 0)
	if err != nil {
		return false, err
	}
	index := t.l.space.IndexAppKeys(t.org, app) + id.String()
	value, there := t.value(details)
	products := map[authz.ProductName]bool{}
	if there {
		stored := t.l.space.Credential([]keyspace.Entry{{Key: details, Value: []byte(value)}})
		if stored.Problem == "" && stored.App != app {
			if err := t.get(ctx, index, details); err != nil {
				return false, err
			}
			t.delete(index)
			return true, nil
		}
		object, _ := jsonobject.Parse([]byte(value)) // one that cannot be read lists nothing; its flags still tell
		for _, ref := range productRefs(object) {
			products[ref.name] = true
		}
	}
	for _, path := range paths {
		if p, err := t.l.space.Parse(path); err == nil && p.Field == keyspace.FieldProduct {
			products[p.Product] = true
		}
	}
	var indexed []string
	for product := range products {
		indexed = append(indexed, t.l.space.IndexProductKeys(t.org, product)+id.String())
	}
	// What the index has of products is derived: nobody's change is lost with it.
	if err := t.readValues(ctx, indexed...); err != nil {
		return false, err
	}
	indexed = slices.DeleteFunc(indexed, func(path string) bool { _, there := t.value(path); return !there })
	if room := maxOps - 4 - t.size(); len(indexed)+2 > room {
		if len(t.writes)+len(t.folders) > 0 {
			return false, nil
		}
		for _, path := range indexed[:room] {
			t.delete(path)
		}
		return false, nil
	}
	t.freeze(folder)
	if err := t.get(ctx, index); err != nil {
		return false, err
	}
	for _, path := range indexed {
		t.delete(path)
	}
	t.delete(index)
	t.deleteFolder(folder)
	return true, nil
}

// journals cuts targets into parts that fit into an intent each.
func (l *Ledger) journals(targets []Target) (parts [][]Target) {
	size, begin := 0, 0
	for i, t := range targets {
		n := len(t.Path(l.space)) + 3
		if size+n > maxIntent {
			parts, begin, size = append(parts, targets[begin:i]), i, 0
		}
		size += n
	}
	return append(parts, targets[begin:])
}

// begin writes the intent to change the targets.
func (l *Ledger) begin(ctx context.Context, by By, c *Change, targets []Target) (journal, error) {
	org := targets[0].Record.Organization
	in := l.newIntent(by, c.Action.String())
	for _, t := range targets {
		in.Flags = append(in.Flags, t.Path(l.space))
	}
	slices.Sort(in.Flags)
	path := l.space.Intent(org, in.ID)
	if by.Once != nil { // what is answered the second time: where to look whether it is done
		once := *by.Once
		once.Body = func(any) ([]byte, error) { return []byte(path), nil }
		by.Once = &once
	}
	done, err := l.change(ctx, by, org, c.Action.String(), path, func(_ context.Context, t *tx) (any, error) {
		t.record.Note = fmt.Sprintf("%d flags, in several transactions, each with a record of its own", len(targets))
		t.intents = append(t.intents, in)
		return nil, nil
	})
	if err != nil || done.Replayed == nil {
		return journal{path: path, rev: done.Revision}, err
	}
	c.Replayed = true
	return journal{rev: done.Revision}, l.complete(ctx, org, string(done.Replayed))
}

// complete performs an intent if it is still there: what was begun the first
// time is done before it is answered for the second time.
func (l *Ledger) complete(ctx context.Context, org authz.Organization, path string) error {
	resp, err := l.store.Do(ctx, clientv3.OpGet(path))
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	for _, kv := range resp.Get().Kvs {
		if _, err := l.finishOne(ctx, path, kv.Value, kv.ModRevision, 0); err != nil {
			return fmt.Errorf("finish what was begun: %w", err)
		}
	}
	return nil
}

// journal is the intent that a transaction belongs to; the zero journal is none.
type journal struct {
	path string
	rev  int64 // at which it was written
	late bool  // another process began it
}
