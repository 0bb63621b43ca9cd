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
	resp, err := l.store.Do(ctx, clientv3.OpGet(l.space.Intents(), clientv3.WithPrefix(), clientv3.WithLimit(maxOps)))
	if err != nil {
		return 0, fmt.Errorf("finish what was begun: %w", err)
	}
	for _, kv := range resp.Get().Kvs {
		path := string(kv.Key)
		var in intent
		org, err := l.organizationOf(path)
		if err == nil {
			err = json.Unmarshal(kv.Value, &in)
		}
		if err == nil && in.Version != keyspace.Version {
			err = fmt.Errorf("\"v\" is %d, want %d", in.Version, keyspace.Version)
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("finish %s: %w", path, err))
			continue
		}
		if l.now().Sub(time.UnixMilli(in.At)) < age {
			continue
		}
		if err := l.perform(ctx, org, in, path, kv.ModRevision); err != nil {
			failed = errors.Join(failed, fmt.Errorf("finish %s: %w", path, err))
			continue
		}
		n++
	}
	return n, failed
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
		if err := l.setFlags(ctx, in.by(), &c, targets, journal{path, rev, true}, false, nil); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	case cleanup:
		clean := l.cleanUpKeys
		if in.Developer != "" {
			clean = l.cleanUpApps
		}
		if err := clean(ctx, org, in); err != nil {
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

// cleanUpKeys removes the keys of an app that is gone, as many at a time as fit.
func (l *Ledger) cleanUpKeys(ctx context.Context, org authz.Organization, in intent) error {
	const atOnce = 32
	index := l.space.IndexAppKeys(org, in.App)
	return l.cleanUp(ctx, org, in, keyspace.AppRecord(org, in.App), index, atOnce, func(ctx context.Context, t *tx, paths []string) error {
		for _, path := range paths {
			id, err := authz.ParseKeyID(strings.TrimPrefix(path, index))
			switch {
			case err != nil:
				t.delete(path) // no key has such a name
			case t.size() > maxOps/2:
				return nil
			default:
				if err := t.deleteKey(ctx, in.App, id); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// cleanUpApps removes the apps of a developer who is gone, likewise.
func (l *Ledger) cleanUpApps(ctx context.Context, org authz.Organization, in intent) error {
	index := l.space.IndexDeveloperApps(org, in.Developer)
	return l.cleanUp(ctx, org, in, keyspace.DeveloperRecord(org, in.Developer), index, maxAppsAtOnce, func(ctx context.Context, t *tx, paths []string) error {
		for _, path := range paths {
			t.delete(path)
		}
		return t.deleteAppsOf(ctx, in.Developer, paths)
	})
}

// cleanUp calls remove with some of the paths below an index, in transactions
// one after another, until there is none left. gone is the record that must not
// be there.
func (l *Ledger) cleanUp(ctx context.Context, org authz.Organization, in intent, gone keyspace.Record, index string, atOnce int64, remove func(context.Context, *tx, []string) error) error {
	details := l.space.Details(gone)
	for {
		_, err := l.change(ctx, in.by(), org, "delete", details, func(ctx context.Context, t *tx) (any, error) {
			if err := t.get(ctx, details); err != nil {
				return nil, err
			}
			if _, there := t.value(details); there {
				return nil, fmt.Errorf("%s is there again: what is left of the old one stays", details)
			}
			paths, err := t.peek(ctx, index, atOnce)
			if err != nil {
				return nil, err
			}
			if len(paths) == 0 {
				return nil, errNothing
			}
			return nil, remove(ctx, t, paths)
		})
		if errors.Is(err, errNothing) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// deleteKey deletes a key of an app with all that stands in the index. A key
// that says that it is another app's only loses its place in this one's index.
func (t *tx) deleteKey(ctx context.Context, app authz.AppID, id authz.KeyID) error {
	record := keyspace.KeyRecord(t.org, id)
	details := t.l.space.Details(record)
	paths, err := t.list(ctx, t.l.space.Folder(record))
	if err != nil {
		return err
	}
	index := t.l.space.IndexAppKeys(t.org, app) + id.String()
	if err := t.get(ctx, index, details); err != nil {
		return err
	}
	t.delete(index)
	products := map[authz.ProductName]bool{}
	if value, there := t.value(details); there {
		stored := t.l.space.Credential([]keyspace.Entry{{Key: details, Value: []byte(value)}})
		if stored.Problem == "" && stored.App != app {
			return nil
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
	for product := range products {
		path := t.l.space.IndexProductKeys(t.org, product) + id.String()
		if err := t.get(ctx, path); err != nil {
			return err
		}
		t.delete(path)
	}
	t.deleteFolder(t.l.space.Folder(record))
	return nil
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
	done, err := l.change(ctx, by, org, c.Action.String(), l.space.Intent(org, in.ID), func(_ context.Context, t *tx) (any, error) {
		t.record.Note = fmt.Sprintf("%d flags, in several transactions, each with a record of its own", len(targets))
		t.intents = append(t.intents, in)
		return nil, nil
	})
	c.Replayed = done.Replayed != nil
	return journal{path: l.space.Intent(org, in.ID), rev: done.Revision}, err
}

// journal is the intent that a transaction belongs to; the zero journal is none.
type journal struct {
	path string
	rev  int64 // at which it was written
	late bool  // another process began it
}
