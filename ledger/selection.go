package ledger

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// Selection of keys that were found through an app or a developer.
type Selection struct {
	// Keys and Apps, each in order.
	Keys []authz.KeyID
	Apps []authz.AppID
	// Notes say where the records and the indexes disagree, and what was made of
	// it. They are for people.
	Notes []string
}

// AppKeys finds the keys of an app: those that the app's record lists and those
// of the index together, less those that are gone or say that they are another
// app's. A key that was written by etcdctl alone may stand in neither. A
// NotFoundError tells that there is no such app.
func AppKeys(ctx context.Context, kv clientv3.KV, space keyspace.Space, org authz.Organization, app authz.AppID) (Selection, error) {
	return selection(ctx, kv, space, org, func(f *finder) error { return f.apps(ctx, "", app) })
}

// DeveloperKeys finds the keys of all apps of a developer, by the index of the
// developer's apps; see AppKeys.
func DeveloperKeys(ctx context.Context, kv clientv3.KV, space keyspace.Space, org authz.Organization, developer authz.DeveloperID) (Selection, error) {
	return selection(ctx, kv, space, org, func(f *finder) error { return f.developer(ctx, developer) })
}

// finder collects a Selection.
type finder struct {
	kv    clientv3.KV
	space keyspace.Space
	org   authz.Organization
	keys  map[authz.KeyID]bool
	found Selection
}

// selection is what find finds. Few are found at a time.
func selection(ctx context.Context, kv clientv3.KV, space keyspace.Space, org authz.Organization, find func(*finder) error) (Selection, error) {
	end, err := startScan(ctx)
	if err != nil {
		return Selection{}, err
	}
	defer end()
	f := finder{kv: kv, space: space, org: org}
	if err := find(&f); err != nil {
		return Selection{}, fmt.Errorf("find keys: %w", err)
	}
	f.found.Keys = slices.SortedFunc(maps.Keys(f.keys), func(a, b authz.KeyID) int { return bytes.Compare(a[:], b[:]) })
	slices.Sort(f.found.Apps)
	return f.found, nil
}

func (f *finder) notef(format string, args ...any) {
	f.found.Notes = append(f.found.Notes, fmt.Sprintf(format, args...))
}

// appsInTxn that are read in one transaction, by two operations each.
const appsInTxn = 60

func (f *finder) developer(ctx context.Context, developer authz.DeveloperID) error {
	record := keyspace.DeveloperRecord(f.org, developer)
	index := f.space.IndexDeveloperApps(f.org, developer)
	resp, err := f.kv.Txn(ctx).Then(
		clientv3.OpGet(f.space.Folder(record), clientv3.WithPrefix(), clientv3.WithCountOnly()),
		clientv3.OpGet(index, clientv3.WithPrefix()),
	).Commit()
	if err != nil {
		return err
	}
	named := resp.Responses[1].GetResponseRange().Kvs
	if resp.Responses[0].GetResponseRange().Count == 0 && len(named) == 0 {
		return &NotFoundError{[]Target{{Record: record}}}
	}
	var apps []authz.AppID
	seen := map[authz.AppID]bool{}
	for _, kv := range named {
		if app := authz.AppID(kv.Value); !seen[app] { // else under a second name
			seen[app] = true
			apps = append(apps, app)
		}
	}
	for part := range slices.Chunk(apps, appsInTxn) {
		if err := f.apps(ctx, developer, part...); err != nil {
			return err
		}
	}
	return nil
}

// apps adds up to appsInTxn apps and their keys. A developer, if one is given,
// must be their own.
func (f *finder) apps(ctx context.Context, developer authz.DeveloperID, apps ...authz.AppID) error {
	var ops []clientv3.Op
	for _, app := range apps {
		ops = append(ops,
			clientv3.OpGet(f.space.Folder(keyspace.AppRecord(f.org, app)), clientv3.WithPrefix()),
			clientv3.OpGet(f.space.IndexAppKeys(f.org, app), clientv3.WithPrefix(), clientv3.WithKeysOnly()))
	}
	resp, err := f.kv.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return err
	}
	found := make([]appFound, 0, len(apps))
	var ids []authz.KeyID
	for i, app := range apps {
		a, err := f.read(app, developer, resp.Responses[2*i].GetResponseRange().Kvs, resp.Responses[2*i+1].GetResponseRange().Kvs)
		if err != nil {
			return err
		}
		found = append(found, a)
		ids = append(ids, a.keys...)
	}
	keys, err := Keys(ctx, f.kv, f.space, f.org, ids)
	if err != nil {
		return err
	}
	for _, a := range found {
		f.add(a, keys[:len(a.keys)])
		keys = keys[len(a.keys):]
	}
	return nil
}

// appFound is an app, with the keys that its record and its index have.
type appFound struct {
	id    authz.AppID
	left  bool // out
	keys  []authz.KeyID
	notes []string
}

// read makes an appFound of what was read of an app.
func (f *finder) read(app authz.AppID, developer authz.DeveloperID, folder, indexed []*mvccpb.KeyValue) (a appFound, err error) {
	a.id = app
	record := keyspace.AppRecord(f.org, app)
	notef := func(format string, args ...any) { a.notes = append(a.notes, fmt.Sprintf(format, args...)) }
	if len(folder) == 0 && len(indexed) == 0 {
		if developer != "" {
			notef("the index names app %q, which is not there", string(app))
			a.left = true
			return a, nil
		}
		return a, &NotFoundError{[]Target{{Record: record}}}
	}
	listed := map[string]bool{}
	for _, kv := range folder {
		if string(kv.Key) != f.space.Details(record) {
			continue
		}
		stored := f.space.App([]keyspace.Entry{{Key: string(kv.Key), Value: kv.Value}})
		if developer != "" && stored.Problem == "" && stored.Developer != developer {
			notef("the index names app %q, which belongs to developer %q: left out", string(app), string(stored.Developer))
			a.left = true
			return a, nil
		}
		object, err := jsonobject.Parse(kv.Value)
		if err != nil {
			notef("the record of app %q cannot be read: its keys are those of the index alone", string(app))
		}
		for _, id := range keyIDs(object) {
			listed[id] = true
		}
	}
	both := maps.Clone(listed)
	for _, kv := range indexed {
		id := strings.TrimPrefix(string(kv.Key), f.space.IndexAppKeys(f.org, app))
		both[id] = true
		if !listed[id] {
			notef("key %s is in the index of app %q, and not in its record", id, string(app))
		}
		delete(listed, id)
	}
	for _, id := range slices.Sorted(maps.Keys(listed)) {
		notef("key %s is in the record of app %q, and not in its index", id, string(app))
	}
	for _, text := range slices.Sorted(maps.Keys(both)) {
		if id, err := authz.ParseKeyID(text); err == nil {
			a.keys = append(a.keys, id)
		}
	}
	return a, nil
}

// add an app and what is stored of its keys.
func (f *finder) add(a appFound, keys []Key) {
	f.found.Notes = append(f.found.Notes, a.notes...)
	if a.left {
		return
	}
	f.found.Apps = append(f.found.Apps, a.id)
	for _, k := range keys {
		switch {
		case !k.There:
			f.notef("key %s of app %q is not there: left out", k.ID, string(a.id))
		case k.Credential.Problem == "" && k.Credential.App != a.id:
			f.notef("key %s says that it belongs to app %q, not to %q: left out", k.ID, string(k.Credential.App), string(a.id))
		default:
			if f.keys == nil {
				f.keys = map[authz.KeyID]bool{}
			}
			f.keys[k.ID] = true
		}
	}
}

// Key is what is stored of a consumer key.
type Key struct {
	ID authz.KeyID
	// There tells whether anything is.
	There bool
	// Credential as a check would read it. Its products are those with a flag.
	Credential authz.Credential
	// Products on the key, in order: those with a flag and those that the
	// credential lists, whose flag may have been deleted.
	Products []authz.ProductName
}

// Keys reads what is stored of each key, in the order of the ids. They are not
// of one revision.
func Keys(ctx context.Context, kv clientv3.KV, space keyspace.Space, org authz.Organization, ids []authz.KeyID) ([]Key, error) {
	keys := make([]Key, 0, len(ids))
	for part := range slices.Chunk(ids, maxOps) {
		var ops []clientv3.Op
		for _, id := range part {
			ops = append(ops, clientv3.OpGet(space.Folder(keyspace.KeyRecord(org, id)), clientv3.WithPrefix()))
		}
		resp, err := kv.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return nil, fmt.Errorf("read keys: %w", err)
		}
		for i, id := range part {
			var entries []keyspace.Entry
			products := map[authz.ProductName]bool{}
			for _, e := range resp.Responses[i].GetResponseRange().Kvs {
				entries = append(entries, keyspace.Entry{Key: string(e.Key), Value: e.Value})
				if string(e.Key) == space.Details(keyspace.KeyRecord(org, id)) {
					object, _ := jsonobject.Parse(e.Value) // the credential's Problem says it
					for _, ref := range productRefs(object) {
						products[ref.name] = true
					}
				}
			}
			k := Key{ID: id, There: len(entries) > 0}
			if k.There {
				k.Credential = space.Credential(entries)
			}
			for name := range k.Credential.Products {
				products[name] = true
			}
			k.Products = slices.Sorted(maps.Keys(products))
			keys = append(keys, k)
		}
	}
	return keys, nil
}
