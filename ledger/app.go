package ledger

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// App is a developer app as it is stored.
type App struct {
	catalog.App // without Credentials
	// Revision is the greatest of the app's own values and those of its
	// credentials: its ETag.
	Revision int64
	// LastModified in milliseconds since the Unix epoch, changes of statuses
	// included.
	LastModified int64
	// Email of the developer, empty if it has none.
	Email string
	// Credentials, the newest first.
	Credentials []Credential

	detailsRevision int64
}

// AppSpec is what somebody asks of an app.
type AppSpec struct {
	// Name of a new app, unique under its developer. It never changes.
	Name string
	// Products of the new key.
	Products []authz.ProductName
	// KeyExpiresIn is when the new key expires, in milliseconds from now; 0 and
	// -1 mean never.
	KeyExpiresIn int64
	// Details are the app's own members: attributes, callbackUrl, scopes (of a
	// new app, and of the new key), appFamily, accessType, and what else is to be
	// kept.
	Details jsonobject.Object
}

// MaxAppKeys that an app can get here. An import may bring more.
const MaxAppKeys = 1000

// appMembers that every stored app has.
var appMembers = []struct {
	name  string
	value any
}{
	{"accessType", ""}, {"appFamily", "default"}, {catalog.MemberAttributes, []string{}}, {catalog.MemberCallbackURL, ""}, {catalog.MemberScopes, []string{}},
}

// DeveloperApp reads an app by its developer and its name, with its
// credentials.
func (l *Ledger) DeveloperApp(ctx context.Context, org authz.Organization, developer, name string) (a App, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		p, err := t.app(ctx, developer, name)
		if err != nil {
			return err
		}
		a, err = t.loadApp(ctx, p.id)
		return err
	})
	return a, err
}

// App reads an app by its id, with its credentials.
func (l *Ledger) App(ctx context.Context, org authz.Organization, id authz.AppID) (a App, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		// Several reads follow, of the revision of this one.
		if err := t.get(ctx, l.space.Details(keyspace.AppRecord(org, id))); err != nil {
			return err
		}
		a, err = t.loadApp(ctx, id)
		return err
	})
	return a, err
}

func (t *tx) loadApp(ctx context.Context, id authz.AppID) (App, error) {
	apps, err := t.loadApps(ctx, []authz.AppID{id}, true)
	if err != nil {
		return App{}, err
	}
	if len(apps) == 0 {
		return App{}, noApp(t.org, id)
	}
	a := apps[0]
	a.LastModified, err = t.modified(ctx, a.LastModified, a.detailsRevision, a.Revision, map[int64]int64{})
	return a, err
}

func noApp(org authz.Organization, id authz.AppID) *Error {
	return errorf(NotFound, "developer.service.AppDoesNotExist", "App with id %s does not exist in organization %s", id, org)
}

// CreateApp creates an app, approved, under a new id, with one approved key for
// the products that are asked for, which may be none. A product whose approval
// is manual is pending on it.
func (l *Ledger) CreateApp(ctx context.Context, by By, org authz.Organization, developer string, spec AppSpec) (created App, done Done, err error) {
	if err := catalog.CheckAppName(spec.Name); err != nil {
		return created, done, invalid("/"+catalog.MemberName, err)
	}
	if err := spec.check(); err != nil {
		return created, done, err
	}
	now := l.now().UnixMilli()
	key, err := l.appKey(spec, words(spec.Details, catalog.MemberScopes), now)
	if err != nil {
		return created, done, err
	}
	id := authz.AppID(newUUID())
	r := keyspace.AppRecord(org, id)
	done, err = l.change(ctx, by, org, "create", fmt.Sprintf("app %q", spec.Name), func(ctx context.Context, t *tx) (any, error) {
		if err := t.check(0); err != nil { // there is nothing yet
			return nil, err
		}
		t.record.Object = l.space.Details(r)
		owner, err := t.developer(ctx, developer)
		if err != nil {
			return nil, err
		}
		if err := t.takeName(ctx, owner, spec.Name, id); err != nil {
			return nil, err
		}
		if _, err := t.list(ctx, l.space.Folder(r)); err != nil {
			return nil, err
		}
		o := given(spec.Details, catalog.CheckAppMember, append(readOnlyMembers, catalog.MemberProducts, "keyExpiresIn")...)
		for _, m := range appMembers {
			if _, ok := o.Get(m.name); !ok {
				o = o.With(m.name, m.value)
			}
		}
		o = o.With(catalog.MemberName, spec.Name).With(catalog.MemberAppID, id).With(catalog.MemberDeveloperID, owner).
			With(catalog.MemberCredentials, []authz.KeyID{key.id})
		if err := t.create(r, sorted(stamp(o, by, now, true))); err != nil {
			return nil, err
		}
		t.put(l.space.Status(r), authz.StatusApproved.String())
		if err := t.addKey(ctx, id, owner, key); err != nil {
			return nil, err
		}
		created, _ = t.appWithKeys(t.state(t.overlay), id, nil)
		key.reveal(created.Credentials)
		return created, nil
	})
	created.settle(done)
	return created, done, err
}

// settle gives what was changed its revision.
func (a *App) settle(done Done) {
	a.Revision = done.at(a.Revision)
	for i := range a.Credentials {
		c := &a.Credentials[i]
		if c.Revision == 0 {
			c.Revision = done.Revision
		}
	}
}

// check what is asked of an app, its name apart.
func (s AppSpec) check() error {
	if err := checkAttributes(s.Details); err != nil {
		return err
	}
	if err := checkScopes(s.Details); err != nil {
		return err
	}
	if err := catalog.CheckCallbackURL(text(s.Details, catalog.MemberCallbackURL)); err != nil {
		return invalid("/"+catalog.MemberCallbackURL, err)
	}
	return nil
}

// takeName puts an app's name into the index. It is an error that the developer
// has an app of that name; an entry of one that is gone is taken over.
func (t *tx) takeName(ctx context.Context, developer authz.DeveloperID, name string, id authz.AppID) error {
	index := t.l.space.IndexDeveloperApp(t.org, developer, name)
	if err := t.get(ctx, index); err != nil {
		return err
	}
	if other, there := t.value(index); there {
		details := t.l.space.Details(keyspace.AppRecord(t.org, authz.AppID(other)))
		if err := t.get(ctx, details); err != nil {
			return err
		}
		if _, there := t.value(details); there {
			return &Error{Kind: Exists, Code: "keymanagement.service.app_already_exists", Pointer: "/" + catalog.MemberName,
				Message: fmt.Sprintf("App with name %s already exists", name)}
		}
	}
	t.put(index, string(id))
	return nil
}

// UpdateApp replaces an app's attributes and callback: what the spec has not is
// removed. If it names products the app gets a further key for them. Name and
// scopes stay.
func (l *Ledger) UpdateApp(ctx context.Context, by By, org authz.Organization, developer, name string, spec AppSpec) (App, Done, error) {
	replaced := withAttributes(spec.Details)
	if _, ok := replaced.Get(catalog.MemberCallbackURL); !ok {
		replaced = replaced.With(catalog.MemberCallbackURL, "")
	}
	spec.Details = replaced
	return l.updateApp(ctx, by, org, developer, name, spec, len(spec.Products) > 0)
}

// AddAppKey gives an app a further key for the products, which may be none, and
// replaces those of the app's attributes and callback that the spec has.
func (l *Ledger) AddAppKey(ctx context.Context, by By, org authz.Organization, developer, name string, spec AppSpec) (App, Done, error) {
	return l.updateApp(ctx, by, org, developer, name, spec, true)
}

func (l *Ledger) updateApp(ctx context.Context, by By, org authz.Organization, developer, name string, spec AppSpec, further bool) (updated App, done Done, err error) {
	if err := spec.check(); err != nil {
		return updated, done, err
	}
	now := l.now().UnixMilli()
	var key newKey
	if further {
		if key, err = l.appKey(spec, words(spec.Details, catalog.MemberScopes), now); err != nil {
			return updated, done, err
		}
	}
	done, err = l.change(ctx, by, org, "update", fmt.Sprintf("app %q", name), func(ctx context.Context, t *tx) (any, error) {
		p, err := t.app(ctx, developer, name)
		if err != nil {
			return nil, err
		}
		o, err := t.changeApp(ctx, &p)
		if err != nil {
			return nil, err
		}
		for _, member := range []string{catalog.MemberAttributes, catalog.MemberCallbackURL} {
			if raw, ok := spec.Details.Get(member); ok {
				o = o.With(member, raw)
			}
		}
		if further {
			if o, err = withKey(o, key.id); err != nil {
				return nil, err
			}
			if err := t.addKey(ctx, p.id, p.developer, key); err != nil {
				return nil, err
			}
		}
		if err := t.rewrite(p.record, stamp(o, by, now, false)); err != nil {
			return nil, err
		}
		updated, _ = t.appWithKeys(t.state(t.overlay), p.id, p.indexed)
		key.reveal(updated.Credentials)
		return updated, nil
	})
	updated.settle(done)
	return updated, done, err
}

// changeApp reads all of an app that was found, compares its revision with the
// one that is asked for, and returns its JSON to be changed. Its credentials are
// not guarded: there may be more of them than a transaction compares, and what
// others change on them meanwhile is not overwritten.
func (t *tx) changeApp(ctx context.Context, p *appPlace) (jsonobject.Object, error) {
	places := []appPlace{*p}
	if err := t.readKeys(ctx, places); err != nil {
		return nil, err
	}
	*p = places[0]
	before, _ := t.appWithKeys(t.state(t.value), p.id, p.indexed)
	if err := t.check(before.Revision); err != nil {
		return nil, err
	}
	return t.rewritten(p.record)
}

// withKey puts a new key before those that a stored app lists.
func withKey(app jsonobject.Object, id authz.KeyID) (jsonobject.Object, error) {
	ids := keyIDs(app)
	if len(ids) >= MaxAppKeys {
		return nil, errorf(Limit, "keygate.limit", "the app has %d keys, want at most %d: delete those that are not used", len(ids), MaxAppKeys)
	}
	return app.With(catalog.MemberCredentials, slices.Concat([]string{id.String()}, ids)), nil
}

// DeleteApp deletes an app with its keys, and returns what it was. At the
// revision of the change all of its keys are refused; those that do not fit into
// its transaction are removed by Finish.
func (l *Ledger) DeleteApp(ctx context.Context, by By, org authz.Organization, developer, name string) (deleted App, done Done, err error) {
	done, err = l.change(ctx, by, org, "delete", fmt.Sprintf("app %q", name), func(ctx context.Context, t *tx) (any, error) {
		p, err := t.app(ctx, developer, name)
		if err != nil {
			return nil, err
		}
		t.record.Object = l.space.Details(p.record)
		places := []appPlace{p}
		if err := t.readKeys(ctx, places); err != nil {
			return nil, err
		}
		deleted, _ = t.appWithKeys(t.state(t.value), p.id, places[0].indexed)
		if err := t.check(deleted.Revision); err != nil {
			return nil, err
		}
		t.delete(l.space.IndexDeveloperApp(org, p.developer, p.name))
		if stored := deleted.Name; stored != "" && stored != p.name { // it was found by an older name
			index := l.space.IndexDeveloperApp(org, p.developer, stored)
			if err := t.get(ctx, index); err != nil {
				return nil, err
			}
			if value, _ := t.value(index); value == string(p.id) {
				t.delete(index)
			}
		}
		return deleted, t.deleteApps(ctx, places)
	})
	return deleted, done, err
}

// maxSize up to which a transaction is filled with keys that are deleted.
const maxSize = maxOps - 8

// deleteApps deletes apps, and as many of their keys as fit; the rest is left.
func (t *tx) deleteApps(ctx context.Context, places []appPlace) error {
	if err := t.readKeys(ctx, places); err != nil {
		return err
	}
	var statuses []string
	for _, p := range places {
		statuses = append(statuses, t.l.space.Status(p.record))
	}
	if err := t.readValues(ctx, statuses...); err != nil {
		return err
	}
	for _, p := range places {
		t.deleteFolder(t.l.space.Folder(p.record))
	}
	for i, p := range places {
		// Those that are not in the index first: what is left is found by it.
		var keys []authz.KeyID
		for _, key := range listedKeys(p.object) {
			if !slices.Contains(p.indexed, key) {
				keys = append(keys, key)
			}
		}
		for _, key := range append(keys, p.indexed...) {
			fits := t.size()+len(places)-i < maxSize
			if fits {
				var err error
				if fits, err = t.deleteKey(ctx, p.id, key); err != nil {
					return err
				}
			}
			if !fits {
				t.leaveCleanup(p.id)
				break
			}
		}
	}
	return nil
}

// lastSegment of a path, as a name.
func lastSegment(path string) string {
	seg := path[strings.LastIndexByte(path, '/')+1:]
	if name, err := url.PathUnescape(seg); err == nil {
		return name
	}
	return seg
}

// isKind tells whether err is an Error of that kind.
func isKind(err error, kind ErrorKind) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind == kind
}
