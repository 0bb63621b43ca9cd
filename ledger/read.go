package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// read calls f with a tx that is only read from, so all that f reads is of one
// revision, the newest one. f is called again if that revision has been
// compacted before f had all: it sets its results anew each time.
func (l *Ledger) read(ctx context.Context, org authz.Organization, f func(ctx context.Context, t *tx) error) error {
	if err := keyspace.CheckOrganization(org); err != nil {
		return &Error{Kind: Invalid, Code: "keygate.organization", Message: err.Error()}
	}
	var err error
	for range maxAttempts {
		err = f(ctx, &tx{l: l, org: org, view: view{}, guards: map[string]bool{}})
		if !errors.Is(err, rpctypes.ErrCompacted) {
			break
		}
	}
	var refusal *Error
	if err != nil && !errors.As(err, &refusal) {
		return fmt.Errorf("read: %w", err)
	}
	return err
}

// look is one way to see the values of a tx: tx.value as they were read,
// tx.overlay as they will be.
type look func(path string) (string, bool)

// state is what is known of each record.
type state map[keyspace.Record]*folder

// folder is one record.
type folder struct {
	entries []keyspace.Entry
	revs    []int64 // of the entries
	newest  int64   // of them
	// There is a JSON value, which is the record as far as the management goes;
	// object is empty if it cannot be read.
	there  bool
	object jsonobject.Object
	rev    int64
}

func (s state) add(space keyspace.Space, path, value string, rev int64) {
	p, err := space.Parse(path)
	if err != nil || p.Record.Kind == keyspace.KindNone {
		return
	}
	f := s[p.Record]
	if f == nil {
		f = &folder{}
		s[p.Record] = f
	}
	f.entries = append(f.entries, keyspace.Entry{Key: path, Value: []byte(value)})
	f.revs = append(f.revs, rev)
	f.newest = max(f.newest, rev)
	if p.Field == keyspace.FieldDetails {
		f.there, f.rev = true, rev
		f.object, _ = jsonobject.Parse([]byte(value)) // what cannot be read is shown as empty, and never rewritten
	}
}

// state of all records that the tx knows of.
func (t *tx) state(now look) state {
	s := state{}
	for path, e := range t.view {
		if value, there := now(path); there {
			s.add(t.l.space, path, value, e.rev)
		}
	}
	for path := range t.writes {
		if _, read := t.view[path]; read {
			continue
		}
		if value, there := now(path); there {
			s.add(t.l.space, path, value, 0)
		}
	}
	return s
}

// readFolders reads everything below the prefixes without guarding it, and
// returns the paths of each.
func (t *tx) readFolders(ctx context.Context, prefixes ...string) ([][]string, error) {
	return t.readAll(ctx, prefixes, clientv3.WithPrefix())
}

// readValues reads the paths that have not been read yet without guarding them.
func (t *tx) readValues(ctx context.Context, paths ...string) error {
	paths = slices.DeleteFunc(slices.Clone(paths), func(p string) bool {
		_, read := t.view[p]
		return read
	})
	_, err := t.readAll(ctx, paths)
	return err
}

func (t *tx) readAll(ctx context.Context, keys []string, opts ...clientv3.OpOption) (found [][]string, err error) {
	for part := range slices.Chunk(keys, maxOps) {
		ops := make([]clientv3.Op, 0, len(part))
		for _, k := range part { // from the second part on the revision is known
			ops = append(ops, clientv3.OpGet(k, append(opts, clientv3.WithRev(t.rev))...))
		}
		some, err := t.ask(ctx, ops)
		if err != nil {
			return nil, err
		}
		found = append(found, some...)
	}
	return found, nil
}

// text of a member, empty if it is absent or no string.
func text(o jsonobject.Object, name string) (s string) {
	if raw, ok := o.Get(name); !ok || json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// number of a member, or of a string that holds one.
func number(o jsonobject.Object, name string) (n int64, ok bool) {
	raw, ok := o.Get(name)
	if !ok {
		return 0, false
	}
	digits := string(raw)
	if s := text(o, name); s != "" {
		digits = s
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	return n, err == nil
}

// words of a member that is a list of strings.
func words(o jsonobject.Object, name string) (list []string) {
	if raw, ok := o.Get(name); !ok || json.Unmarshal(raw, &list) != nil {
		return nil
	}
	return list
}

// shown is a status as it works: one that is absent or cannot be read closes.
func shown(f authz.Flag, closed authz.Status) authz.Status {
	if f.Status == authz.StatusNone {
		return closed
	}
	return f.Status
}

// details are the members of a stored value that are not the store's own.
func details(o jsonobject.Object, check func(name string) error) jsonobject.Object {
	d := jsonobject.Object{}
	for _, m := range o {
		if check(m.Name) == nil {
			d = append(d, m)
		}
	}
	return d
}

// emptied keeps the place of a list whose elements are elsewhere.
func emptied(o jsonobject.Object, name string) jsonobject.Object {
	if _, ok := o.Get(name); !ok {
		return o
	}
	return o.With(name, []string{})
}

func (t *tx) developerIn(s state, id authz.DeveloperID) (d Developer, ok bool) {
	f := s[keyspace.DeveloperRecord(t.org, id)]
	if f == nil || !f.there {
		return d, false
	}
	d.ID, d.Email = id, text(f.object, catalog.MemberEmail)
	d.Status = shown(t.l.space.Developer(f.entries).Status, authz.StatusInactive)
	d.Details = details(f.object, catalog.CheckDeveloperMember)
	d.LastModified, _ = number(f.object, catalog.MemberLastModifiedAt)
	d.Revision, d.detailsRevision = f.newest, f.rev
	return d, true
}

// appIn is an app without its credentials.
func (t *tx) appIn(s state, id authz.AppID) (a App, ok bool) {
	f := s[keyspace.AppRecord(t.org, id)]
	if f == nil || !f.there {
		return a, false
	}
	a.ID = id
	a.Developer = authz.DeveloperID(text(f.object, catalog.MemberDeveloperID))
	a.Name = text(f.object, catalog.MemberName)
	a.Status = shown(t.l.space.App(f.entries).Status, authz.StatusRevoked)
	a.Details = emptied(details(f.object, catalog.CheckAppMember), catalog.MemberCredentials)
	a.LastModified, _ = number(f.object, catalog.MemberLastModifiedAt)
	a.Revision, a.detailsRevision = f.newest, f.rev
	if d, ok := t.developerIn(s, a.Developer); ok {
		a.Email = d.Email
	}
	return a, true
}

// appWithKeys is an app with its credentials: those that its record lists, in
// that order, then those of the index alone.
func (t *tx) appWithKeys(s state, id authz.AppID, indexed []authz.KeyID) (a App, ok bool) {
	if a, ok = t.appIn(s, id); !ok {
		return a, false
	}
	seen := map[authz.KeyID]bool{}
	for _, key := range append(listedKeys(s[keyspace.AppRecord(t.org, id)].object), indexed...) {
		if seen[key] {
			continue
		}
		seen[key] = true
		if c, of, ok := t.credentialIn(s, key); ok && (of == id || of == "") {
			a.Credentials = append(a.Credentials, c)
			a.Revision = max(a.Revision, c.Revision)
		}
	}
	return a, true
}

// listedKeys are the ids that a stored app lists.
func listedKeys(app jsonobject.Object) (keys []authz.KeyID) {
	for _, id := range keyIDs(app) {
		if key, err := authz.ParseKeyID(id); err == nil {
			keys = append(keys, key)
		}
	}
	return keys
}

// credentialIn also returns the app that the credential says it belongs to,
// nothing if that cannot be read.
func (t *tx) credentialIn(s state, id authz.KeyID) (c Credential, app authz.AppID, ok bool) {
	f := s[keyspace.KeyRecord(t.org, id)]
	if f == nil {
		return c, "", false
	}
	stored := t.l.space.Credential(f.entries)
	if stored.Problem == "" {
		app = stored.App
	}
	c.Key, c.Hint = id, text(f.object, catalog.MemberHint)
	c.Status = shown(stored.Status, authz.StatusRevoked)
	c.ExpiresAt = authz.NeverExpires
	if ms, ok := number(f.object, catalog.MemberExpiresAt); ok {
		c.ExpiresAt = ms
	}
	c.SealedKey, c.SealedSecret = text(f.object, catalog.MemberSealedKey), text(f.object, catalog.MemberSealedSecret)
	c.Details = emptied(details(f.object, catalog.CheckCredentialMember), catalog.MemberProducts)
	for _, ref := range productRefs(f.object) {
		if c.has(ref.name) {
			continue
		}
		c.Products = append(c.Products, catalog.ProductRef{
			Name: ref.name, Status: shown(stored.Products[ref.name], authz.StatusRevoked), Details: ref.ref.Without(catalog.MemberStatus),
		})
	}
	for _, name := range sortedNames(stored.Products) { // that were written by etcdctl
		if !c.has(name) {
			c.Products = append(c.Products, catalog.ProductRef{
				Name: name, Status: shown(stored.Products[name], authz.StatusRevoked), Details: jsonobject.Object{}.With(catalog.MemberProduct, name),
			})
		}
	}
	c.Revision = f.newest
	return c, app, true
}

func (t *tx) productIn(s state, name authz.ProductName) (p Product, ok bool) {
	f := s[keyspace.ProductRecord(t.org, name)]
	if f == nil || !f.there {
		return p, false
	}
	p.Name = name
	p.Details = details(f.object, catalog.CheckProductMember)
	p.LastModified, _ = number(f.object, catalog.MemberLastModifiedAt)
	p.Revision, p.detailsRevision = f.newest, f.rev
	return p, true
}

// developer finds a developer by e-mail address or id, and reads and guards it.
func (t *tx) developer(ctx context.Context, ref string) (authz.DeveloperID, error) {
	absent := errorf(NotFound, "developer.service.DeveloperIdDoesNotExist", "DeveloperId %s does not exist in organization %s", ref, t.org)
	if ref == "" {
		return "", absent
	}
	email := t.l.space.IndexEmail(t.org, strings.ToLower(ref))
	own := keyspace.DeveloperRecord(t.org, authz.DeveloperID(ref))
	if err := t.get(ctx, email, t.l.space.Details(own), t.l.space.Status(own)); err != nil {
		return "", err
	}
	if id, there := t.value(email); there && id != "" {
		r := keyspace.DeveloperRecord(t.org, authz.DeveloperID(id))
		if err := t.get(ctx, t.l.space.Details(r), t.l.space.Status(r)); err != nil {
			return "", err
		}
		if _, there := t.value(t.l.space.Details(r)); there {
			return authz.DeveloperID(id), nil
		}
	}
	if _, there := t.value(t.l.space.Details(own)); there {
		return authz.DeveloperID(ref), nil
	}
	return "", absent
}

// appPlace is where an app was found.
type appPlace struct {
	id        authz.AppID
	developer authz.DeveloperID
	name      string // in the index
	record    keyspace.Record
	object    jsonobject.Object // its JSON
	indexed   []authz.KeyID     // by readKeys
}

// app finds a developer's app by its name, and reads and guards it, without its
// keys.
func (t *tx) app(ctx context.Context, developer, name string) (p appPlace, err error) {
	absent := errorf(NotFound, "developer.service.AppDoesNotExist", "App named %s does not exist under %s", name, developer)
	p = appPlace{name: name}
	if p.developer, err = t.developer(ctx, developer); err != nil {
		return p, err
	}
	if name == "" {
		return p, absent
	}
	index := t.l.space.IndexDeveloperApp(t.org, p.developer, name)
	if err := t.get(ctx, index); err != nil {
		return p, err
	}
	id, there := t.value(index)
	if !there || id == "" {
		return p, absent
	}
	p.id = authz.AppID(id)
	p.record = keyspace.AppRecord(t.org, p.id)
	if err := t.get(ctx, t.l.space.Details(p.record), t.l.space.Status(p.record)); err != nil {
		return p, err
	}
	value, there := t.value(t.l.space.Details(p.record))
	if !there {
		return p, absent
	}
	object, err := jsonobject.Parse([]byte(value))
	if err == nil && text(object, catalog.MemberDeveloperID) != string(p.developer) {
		return p, absent // the index is wrong
	}
	p.object = object
	return p, nil
}

// indexedKeys are the keys that paths of an index end in.
func indexedKeys(paths []string) (keys []authz.KeyID) {
	for _, path := range paths {
		if key, err := authz.ParseKeyID(path[strings.LastIndexByte(path, '/')+1:]); err == nil {
			keys = append(keys, key)
		}
	}
	return keys
}

// loadApps reads apps, with their credentials or without. Those that are not
// there are left out.
func (t *tx) loadApps(ctx context.Context, ids []authz.AppID, keys bool) ([]App, error) {
	var paths []string
	for _, id := range ids {
		r := keyspace.AppRecord(t.org, id)
		paths = append(paths, t.l.space.Details(r), t.l.space.Status(r))
	}
	if err := t.readValues(ctx, paths...); err != nil {
		return nil, err
	}
	places := make([]appPlace, 0, len(ids))
	paths = paths[:0]
	for _, id := range ids {
		value, there := t.value(t.l.space.Details(keyspace.AppRecord(t.org, id)))
		if !there {
			continue
		}
		object, _ := jsonobject.Parse([]byte(value)) // shown as empty
		places = append(places, appPlace{id: id, object: object})
		r := keyspace.DeveloperRecord(t.org, authz.DeveloperID(text(object, catalog.MemberDeveloperID)))
		paths = append(paths, t.l.space.Details(r))
	}
	if err := t.readValues(ctx, distinctStrings(paths)...); err != nil {
		return nil, err
	}
	if keys {
		if err := t.readKeys(ctx, places); err != nil {
			return nil, err
		}
	}
	s := t.state(t.value)
	apps := make([]App, 0, len(places))
	for _, p := range places {
		a, _ := t.appIn(s, p.id)
		if keys {
			a, _ = t.appWithKeys(s, p.id, p.indexed)
		}
		apps = append(apps, a)
	}
	return apps, nil
}

// readKeys reads what stands in the index and in the records of the apps' keys,
// without guarding it.
func (t *tx) readKeys(ctx context.Context, places []appPlace) error {
	var indexes, folders []string
	for _, p := range places {
		indexes = append(indexes, t.l.space.IndexAppKeys(t.org, p.id))
	}
	found, err := t.readFolders(ctx, indexes...)
	if err != nil {
		return err
	}
	for i := range places {
		places[i].indexed = indexedKeys(found[i])
		for _, key := range append(listedKeys(places[i].object), places[i].indexed...) {
			folders = append(folders, t.l.space.Folder(keyspace.KeyRecord(t.org, key)))
		}
	}
	_, err = t.readFolders(ctx, distinctStrings(folders)...)
	return err
}

func distinctStrings(all []string) []string {
	seen := make(map[string]bool, len(all))
	kept := make([]string, 0, len(all))
	for _, s := range all {
		if !seen[s] {
			seen[s] = true
			kept = append(kept, s)
		}
	}
	return kept
}

// modified is when something was changed last: as its JSON says, or if one of
// its other values is newer, when that was written. times keeps what was found.
func (t *tx) modified(ctx context.Context, stored, details, newest int64, times map[int64]int64) (int64, error) {
	if newest <= details {
		return stored, nil
	}
	ms, known := times[newest]
	if !known {
		var err error
		if ms, _, err = audit.TimeOf(ctx, t.l.store, t.l.space, newest); err != nil {
			return 0, err
		}
		times[newest] = ms
	}
	return max(stored, ms), nil
}

// keyRefs are the ids that a reference to a key may mean: a consumer key, or an
// id, with "sha256:" before it or without.
func keyRefs(ref string) (ids []authz.KeyID) {
	if hex, ok := strings.CutPrefix(ref, "sha256:"); ok {
		ref = hex
	} else if key, reason := authz.ParseConsumerKey(ref); reason == authz.Allowed {
		ids = append(ids, key.ID())
	}
	if id, err := authz.ParseKeyID(ref); err == nil {
		ids = append(ids, id)
	}
	return ids
}

// invalid is what is wrong with a member of what was handed in.
func invalid(pointer string, err error) *Error {
	var field *catalog.FieldError
	if errors.As(err, &field) {
		return &Error{Kind: Invalid, Code: "keygate.invalid", Pointer: pointer + field.Pointer, Message: field.Message}
	}
	return &Error{Kind: Invalid, Code: "keygate.invalid", Pointer: pointer, Message: err.Error()}
}

// unreadable is why a record is not rewritten.
func unreadable(what, problem string) *Error {
	return errorf(Conflict, "keygate.record_unreadable", "the stored record of %s cannot be read, so it is not rewritten: %s", what, problem)
}
