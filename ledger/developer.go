package ledger

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// Developer as it is stored.
type Developer struct {
	catalog.Developer
	// Revision is the greatest of the developer's own values: its ETag.
	Revision int64
	// LastModified in milliseconds since the Unix epoch, changes of the status
	// included.
	LastModified int64
	// Apps are the names of the first maxAppNames.
	Apps []string

	detailsRevision int64
}

// maxAppNames in a Developer: Apigee's.
const maxAppNames = 100

// Developer reads a developer by e-mail address or id.
func (l *Ledger) Developer(ctx context.Context, org authz.Organization, ref string) (d Developer, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		d, err = t.readDeveloper(ctx, ref)
		if err == nil {
			d.LastModified, err = t.modified(ctx, d.LastModified, d.detailsRevision, d.Revision, map[int64]int64{})
		}
		return err
	})
	return d, err
}

// readDeveloper reads and guards a developer, and reads the names of its apps.
func (t *tx) readDeveloper(ctx context.Context, ref string) (Developer, error) {
	id, err := t.developer(ctx, ref)
	if err != nil {
		return Developer{}, err
	}
	d, _ := t.developerIn(t.state(t.value), id)
	names, err := t.appNames(ctx, id)
	if err != nil {
		return Developer{}, err
	}
	d.Apps = names[0]
	return d, nil
}

// appNames reads the names of the first apps of each developer.
func (t *tx) appNames(ctx context.Context, ids ...authz.DeveloperID) ([][]string, error) {
	prefixes := make([]string, 0, len(ids))
	for _, id := range ids {
		prefixes = append(prefixes, t.l.space.IndexDeveloperApps(t.org, id))
	}
	// Without their values the entries do not belong into the view.
	kept := t.view
	t.view = view{}
	found, err := t.readAll(ctx, prefixes, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(maxAppNames))
	t.view = kept
	if err != nil {
		return nil, err
	}
	names := make([][]string, len(ids))
	for i, paths := range found {
		for _, path := range paths {
			names[i] = append(names[i], lastSegment(path))
		}
	}
	return names, nil
}

// CreateDeveloper creates a developer, active, under a new id. d's e-mail
// address must be nobody's; its id and status are not looked at.
func (l *Ledger) CreateDeveloper(ctx context.Context, by By, org authz.Organization, d catalog.Developer) (created Developer, done Done, err error) {
	email, err := catalog.ParseEmail(d.Email)
	if err != nil {
		return created, done, invalid("/"+catalog.MemberEmail, err)
	}
	d.ID, d.Email, d.Status = authz.DeveloperID(newUUID()), email, authz.StatusActive
	now := l.now().UnixMilli()
	o := given(d.Details, catalog.CheckDeveloperMember, readOnlyMembers...).With(catalog.MemberEmail, email).With(catalog.MemberDeveloperID, d.ID)
	o = sorted(stamp(withAttributes(o), by, now, true))
	d.Details = o
	if err := d.Validate(); err != nil {
		return created, done, invalid("", err)
	}
	if err := checkAttributes(o); err != nil {
		return created, done, err
	}
	r := keyspace.DeveloperRecord(org, d.ID)
	done, err = l.change(ctx, by, org, "create", l.space.Details(r), func(ctx context.Context, t *tx) (any, error) {
		if err := t.check(0); err != nil { // there is nothing yet
			return nil, err
		}
		if err := t.takeEmail(ctx, d.Email, d.ID); err != nil {
			return nil, err
		}
		if _, err := t.list(ctx, l.space.Folder(r)); err != nil {
			return nil, err
		}
		if err := t.create(r, o); err != nil {
			return nil, err
		}
		t.put(l.space.Status(r), d.Status.String())
		created, _ = t.developerIn(t.state(t.overlay), d.ID)
		return created, nil
	})
	created.Revision = done.at(created.Revision)
	return created, done, err
}

// takeEmail puts an address into the index. It is an error that a developer has
// it already; an entry of one that is gone is taken over.
func (t *tx) takeEmail(ctx context.Context, email string, id authz.DeveloperID) error {
	index := t.l.space.IndexEmail(t.org, email)
	if err := t.get(ctx, index); err != nil {
		return err
	}
	if other, there := t.value(index); there && other != string(id) {
		details := t.l.space.Details(keyspace.DeveloperRecord(t.org, authz.DeveloperID(other)))
		if err := t.get(ctx, details); err != nil {
			return err
		}
		if _, there := t.value(details); there {
			return &Error{Kind: Exists, Code: "developer.service.DeveloperAlreadyExists", Pointer: "/" + catalog.MemberEmail,
				Message: fmt.Sprintf("developer with email %s already exists", email)}
		}
	}
	t.put(index, string(id))
	return nil
}

// developerMembers that somebody may set: an update removes those that it has
// not.
var developerMembers = []string{
	catalog.MemberFirstName, catalog.MemberLastName, catalog.MemberUserName, catalog.MemberAttributes, "accessType", "appFamily",
}

// UpdateDeveloper replaces what somebody may set of a developer. Without an
// e-mail address it keeps the one it has. Members that Apigee does not know stay.
func (l *Ledger) UpdateDeveloper(ctx context.Context, by By, org authz.Organization, ref string, d catalog.Developer) (updated Developer, done Done, err error) {
	email := ""
	if d.Email != "" {
		if email, err = catalog.ParseEmail(d.Email); err != nil {
			return updated, done, invalid("/"+catalog.MemberEmail, err)
		}
	}
	if err := checkAttributes(d.Details); err != nil {
		return updated, done, err
	}
	fresh := withAttributes(given(d.Details, catalog.CheckDeveloperMember, append([]string{catalog.MemberEmail}, readOnlyMembers...)...))
	now := l.now().UnixMilli()
	done, err = l.change(ctx, by, org, "update", "developer "+ref, func(ctx context.Context, t *tx) (any, error) {
		before, err := t.readDeveloper(ctx, ref)
		if err != nil {
			return nil, err
		}
		if err := t.check(before.Revision); err != nil {
			return nil, err
		}
		o, err := t.rewritten(keyspace.DeveloperRecord(org, before.ID))
		if err != nil {
			return nil, err
		}
		o = replaced(o, fresh, developerMembers)
		if email != "" && email != before.Email {
			if err := t.takeEmail(ctx, email, before.ID); err != nil {
				return nil, err
			}
			if err := t.leaveEmail(ctx, before.Email, before.ID); err != nil {
				return nil, err
			}
			o = o.With(catalog.MemberEmail, email)
		}
		if err := t.rewrite(keyspace.DeveloperRecord(org, before.ID), stamp(o, by, now, false)); err != nil {
			return nil, err
		}
		updated, _ = t.developerIn(t.state(t.overlay), before.ID)
		updated.Apps = before.Apps
		return updated, nil
	})
	updated.Revision = done.at(updated.Revision)
	return updated, done, err
}

// leaveEmail takes an address that a developer had out of the index.
func (t *tx) leaveEmail(ctx context.Context, email string, id authz.DeveloperID) error {
	if email == "" {
		return nil
	}
	index := t.l.space.IndexEmail(t.org, email)
	if err := t.get(ctx, index); err != nil {
		return err
	}
	if value, _ := t.value(index); value == string(id) {
		t.delete(index)
	}
	return nil
}

// maxAppsAtOnce that are deleted in the transaction that deletes their
// developer.
const maxAppsAtOnce = 40

// DeleteDeveloper deletes a developer with its apps and their keys, and returns
// what it was. With the first transaction the developer is gone and every key
// refused; apps that it did not hold are cleaned up after it.
func (l *Ledger) DeleteDeveloper(ctx context.Context, by By, org authz.Organization, ref string) (deleted Developer, done Done, err error) {
	done, err = l.change(ctx, by, org, "delete", "developer "+ref, func(ctx context.Context, t *tx) (any, error) {
		var err error
		if deleted, err = t.readDeveloper(ctx, ref); err != nil {
			return nil, err
		}
		if by.IfMatch != 0 {
			if err := t.check(deleted.Revision); err != nil {
				return nil, err
			}
		}
		r := keyspace.DeveloperRecord(org, deleted.ID)
		t.record.Object = l.space.Details(r)
		if err := t.leaveEmail(ctx, deleted.Email, deleted.ID); err != nil {
			return nil, err
		}
		t.deleteFolder(l.space.Folder(r))
		index := l.space.IndexDeveloperApps(org, deleted.ID)
		names, err := t.peek(ctx, index, maxAppsAtOnce+1)
		if err != nil {
			return nil, err
		}
		if len(names) > maxAppsAtOnce { // the rest, and what is created meanwhile, is found by the index
			names = names[:maxAppsAtOnce]
			for _, name := range names {
				t.delete(name)
			}
			in := l.newIntent(by, cleanup)
			in.Developer = deleted.ID
			t.intents = append(t.intents, in)
		} else {
			if _, err := t.list(ctx, index); err != nil {
				return nil, err
			}
			t.deleteFolder(index)
		}
		return deleted, t.deleteAppsOf(ctx, deleted.ID, names)
	})
	return deleted, done, err
}

// deleteAppsOf deletes the apps that a developer's index names at paths that were
// read, but for those that are another's by now.
func (t *tx) deleteAppsOf(ctx context.Context, developer authz.DeveloperID, names []string) error {
	var places []appPlace
	seen := map[authz.AppID]bool{}
	for _, name := range names {
		id, _ := t.value(name)
		p := appPlace{id: authz.AppID(id), developer: developer, record: keyspace.AppRecord(t.org, authz.AppID(id))}
		if seen[p.id] || id == "" {
			continue
		}
		seen[p.id] = true
		details := t.l.space.Details(p.record)
		if err := t.get(ctx, details); err != nil {
			return err
		}
		value, there := t.value(details)
		var err error
		if p.object, err = jsonobject.Parse([]byte(value)); err == nil && text(p.object, catalog.MemberDeveloperID) != string(developer) {
			continue
		}
		if there {
			places = append(places, p)
		}
	}
	return t.deleteApps(ctx, places)
}

// sortedNames of products.
func sortedNames(products map[authz.ProductName]authz.Flag) []authz.ProductName {
	names := make([]authz.ProductName, 0, len(products))
	for name := range products {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// readOnlyMembers of every noun: the store sets them itself.
var readOnlyMembers = []string{
	catalog.MemberDeveloperID, catalog.MemberAppID, catalog.MemberCredentials, catalog.MemberOrganization,
	catalog.MemberCreatedAt, catalog.MemberCreatedBy, catalog.MemberLastModifiedAt, catalog.MemberLastModifiedBy,
}

// given are the members of what was handed in that may be taken over.
func given(o jsonobject.Object, check func(name string) error, not ...string) jsonobject.Object {
	return details(o, check).Without(not...)
}

// replaced is o with the fresh members, and without those that may be set and
// are not among them.
func replaced(o, fresh jsonobject.Object, settable []string) jsonobject.Object {
	for _, name := range settable {
		if _, ok := fresh.Get(name); !ok {
			o = o.Without(name)
		}
	}
	for _, m := range fresh {
		o = o.With(m.Name, m.Value)
	}
	return o
}

// withAttributes is o with a list of attributes, which may be empty.
func withAttributes(o jsonobject.Object) jsonobject.Object {
	if _, ok := o.Get(catalog.MemberAttributes); ok {
		return o
	}
	return catalog.WithAttributes(o, nil)
}

// stamp notes who changed it, and when in milliseconds.
func stamp(o jsonobject.Object, by By, now int64, created bool) jsonobject.Object {
	if created {
		o = o.With(catalog.MemberCreatedAt, now).With(catalog.MemberCreatedBy, by.Actor.Name)
	}
	return o.With(catalog.MemberLastModifiedAt, now).With(catalog.MemberLastModifiedBy, by.Actor.Name)
}

// sorted is o in Apigee's order of members: the alphabet's.
func sorted(o jsonobject.Object) jsonobject.Object {
	return slices.SortedFunc(slices.Values(o), func(a, b jsonobject.Member) int { return strings.Compare(a.Name, b.Name) })
}

// create puts the JSON of a new record.
func (t *tx) create(r keyspace.Record, o jsonobject.Object) error {
	return t.rewrite(r, merge(jsonobject.Object{}.With(keyspace.MemberVersion, keyspace.Version), o, nil))
}

func encoded(o jsonobject.Object) string {
	value, err := o.MarshalJSON()
	if err != nil { // every member is valid JSON, or was made here
		panic("ledger: " + err.Error())
	}
	return string(value)
}

// rewritten is a record's JSON that was read, to be changed; an error if it
// cannot be read.
func (t *tx) rewritten(r keyspace.Record) (jsonobject.Object, error) {
	path := t.l.space.Details(r)
	t.record.Object = path
	value, _ := t.value(path)
	entry := []keyspace.Entry{{Key: path, Value: []byte(value)}}
	problem := ""
	switch r.Kind {
	case keyspace.KindKey:
		problem = t.l.space.Credential(entry).Problem
	case keyspace.KindApp:
		problem = t.l.space.App(entry).Problem
	case keyspace.KindDeveloper, keyspace.KindProduct: // of a product no more is asked than of a developer
		r.Kind = keyspace.KindDeveloper
		entry[0].Key = t.l.space.Details(r)
		problem = t.l.space.Developer(entry).Problem
	}
	if problem != "" {
		return nil, unreadable(path, problem)
	}
	return jsonobject.Parse([]byte(value))
}

// MaxRecord of a record's JSON that is written here, in bytes. An import may
// bring a larger one, which can be rewritten as long as it does not grow. What
// grows by itself is not counted: the keys of an app, which have a bound of
// their own, and who changed it when.
const MaxRecord = 64 << 10

// rewrite puts a record's JSON.
func (t *tx) rewrite(r keyspace.Record, o jsonobject.Object) error {
	path := t.l.space.Details(r)
	value := encoded(o)
	if len(value) > MaxRecord {
		before := 0
		if old, there := t.value(path); there {
			old, _ := jsonobject.Parse([]byte(old)) // it was to be rewritten: it can be read
			before = counted(old)
		}
		if n := counted(o); n > MaxRecord && n > before {
			return errorf(TooLarge, "keygate.too_large", "the record %s would have %d bytes, want at most %d", path, n, MaxRecord)
		}
	}
	t.put(path, value)
	return nil
}

// counted is the size of a record's JSON as MaxRecord has it.
func counted(o jsonobject.Object) int {
	return len(encoded(o.Without(catalog.MemberCredentials, catalog.MemberLastModifiedAt, catalog.MemberLastModifiedBy)))
}

// at is the revision of what was changed; as it was if nothing was written.
func (d Done) at(before int64) int64 {
	if before == 0 || len(d.Changes) > 0 {
		return d.Revision
	}
	return before
}

// newUUID returns a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
