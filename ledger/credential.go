package ledger

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// Credential is the record behind a consumer key, as it is stored.
type Credential struct {
	catalog.Credential
	// Revision is the greatest of its values: its ETag.
	Revision int64
	// SealedKey and SealedSecret are what is kept of key and secret; empty
	// without a sealing key.
	SealedKey, SealedSecret string
	// ConsumerKey and ConsumerSecret, where they have just been made or are
	// revealed.
	ConsumerKey, ConsumerSecret string
}

// has tells whether a product is on it.
func (c Credential) has(name authz.ProductName) bool {
	return slices.ContainsFunc(c.Products, func(p catalog.ProductRef) bool { return p.Name == name })
}

// KeySpec is what somebody asks of a key.
type KeySpec struct {
	// Key and Secret of a new key; empty means new random ones.
	Key, Secret string
	// ExpiresIn is when a new key expires, in seconds from now; 0 and -1 mean
	// never.
	ExpiresIn int64
	// Products are added to a key that is there. A new one has none.
	Products []authz.ProductName
	// Attributes replace those of the key, if HasAttributes.
	Attributes    []catalog.Attribute
	HasAttributes bool
	// Scopes replace those of the key, if HasScopes. They must be contained in
	// those of its products.
	Scopes    []string
	HasScopes bool
}

// MaxKeyProducts that a key can get here. An import may bring more.
const MaxKeyProducts = 50

// newKey is a key that is to be written.
type newKey struct {
	id                authz.KeyID
	hint, key, secret string
	issued, expires   int64 // ms
	products          []authz.ProductName
	attributes        []catalog.Attribute
	scopes            []string
}

// appKey is the key that is made with an app, or for it.
func (l *Ledger) appKey(spec AppSpec, scopes []string, now int64) (newKey, error) {
	k := newKey{key: authz.GenerateKey(), secret: authz.NewSecret(), products: distinctProducts(spec.Products), scopes: scopes}
	if err := catalog.CheckKeyExpiresIn(spec.KeyExpiresIn); err != nil {
		return k, invalid("/keyExpiresIn", err)
	}
	return k, k.complete(now, spec.KeyExpiresIn, "/keyExpiresIn")
}

// complete a key that expires in some milliseconds.
func (k *newKey) complete(now, expiresIn int64, pointer string) (err error) {
	k.issued, k.expires = now, authz.NeverExpires
	if expiresIn > 0 {
		k.expires = now + expiresIn
	}
	if err := catalog.CheckExpiry(k.expires); err != nil {
		return invalid(pointer, err)
	}
	if len(k.products) > MaxKeyProducts {
		return tooManyProducts(len(k.products))
	}
	if k.id, k.hint, err = catalog.ParseKey(k.key, false); err != nil {
		return invalid("/"+catalog.MemberKey, err)
	}
	return nil
}

func tooManyProducts(n int) *Error {
	return &Error{Kind: Limit, Code: "keygate.limit", Pointer: "/" + catalog.MemberProducts,
		Message: fmt.Sprintf("the key would have %d products, want at most %d", n, MaxKeyProducts)}
}

// reveal the key among the credentials of its app.
func (k newKey) reveal(credentials []Credential) {
	for i := range credentials {
		if c := &credentials[i]; c.Key == k.id && k.key != "" {
			c.ConsumerKey, c.ConsumerSecret = k.key, k.secret
		}
	}
}

func distinctProducts(all []authz.ProductName) (kept []authz.ProductName) {
	for _, p := range all {
		if !slices.Contains(kept, p) {
			kept = append(kept, p)
		}
	}
	return kept
}

// addKey writes a new key of an app, with its indexes.
func (t *tx) addKey(ctx context.Context, app authz.AppID, developer authz.DeveloperID, k newKey) error {
	r := keyspace.KeyRecord(t.org, k.id)
	if err := t.vacate(ctx, r); err != nil {
		return err
	}
	head := jsonobject.Object{}.
		With(keyspace.MemberVersion, keyspace.Version).
		With(keyspace.MemberApp, app).
		With(keyspace.MemberDeveloper, developer).
		With(catalog.MemberHint, k.hint)
	if t.l.seal != nil {
		head = head.
			With(catalog.MemberSealedKey, t.l.seal.Seal(k.key, sealContext(catalog.MemberKey, k.id))).
			With(catalog.MemberSealedSecret, t.l.seal.Seal(k.secret, sealContext(catalog.MemberSecret, k.id)))
	}
	refs := make([]jsonobject.Object, 0, len(k.products))
	for _, name := range k.products {
		refs = append(refs, jsonobject.Object{}.With(catalog.MemberProduct, name))
	}
	if err := t.addProducts(ctx, r, k.products, k.products, k.scopes); err != nil {
		return err
	}
	o := catalog.WithAttributes(jsonobject.Object{}.With(catalog.MemberProducts, refs), k.attributes).
		With(catalog.MemberExpiresAt, k.expires).
		With(catalog.MemberIssuedAt, k.issued).
		With(catalog.MemberScopes, append([]string{}, k.scopes...))
	if err := t.rewrite(r, merge(head, o, nil)); err != nil {
		return err
	}
	t.put(t.l.space.Status(r), authz.StatusApproved.String())
	t.put(t.l.space.IndexAppKeys(t.org, app)+k.id.String(), "")
	return nil
}

// vacate makes room for a new key. It is an error that there is one, unless its
// app has been deleted and it only has not been removed yet.
func (t *tx) vacate(ctx context.Context, r keyspace.Record) error {
	paths, err := t.list(ctx, t.l.space.Folder(r))
	if err != nil || len(paths) == 0 {
		return err
	}
	taken := &Error{Kind: Exists, Code: "keymanagement.service.ConsumerKeyAlreadyExists", Pointer: "/" + catalog.MemberKey, Message: "ConsumerKey already exists"}
	value, there := t.value(t.l.space.Details(r))
	stored := t.l.space.Credential([]keyspace.Entry{{Key: t.l.space.Details(r), Value: []byte(value)}})
	if !there || stored.Problem != "" {
		return taken
	}
	app := t.l.space.Details(keyspace.AppRecord(t.org, stored.App))
	if err := t.get(ctx, app); err != nil {
		return err
	}
	if _, there := t.value(app); there {
		return taken
	}
	object, _ := jsonobject.Parse([]byte(value)) // it could be read
	for _, ref := range productRefs(object) {
		if err := t.dropIndex(ctx, r, ref.name); err != nil {
			return err
		}
	}
	for _, path := range paths {
		t.delete(path)
		if p, err := t.l.space.Parse(path); err == nil && p.Field == keyspace.FieldProduct {
			if err := t.dropIndex(ctx, r, p.Product); err != nil {
				return err
			}
		}
	}
	return nil
}

// dropIndex takes a key out of a product's index.
func (t *tx) dropIndex(ctx context.Context, r keyspace.Record, product authz.ProductName) error {
	index := t.l.space.IndexProductKeys(t.org, product) + r.Key.String()
	if err := t.get(ctx, index); err != nil {
		return err
	}
	t.delete(index)
	return nil
}

// addProducts puts flags and indexes of new products on a key, and checks the
// scopes that it asks for against all its products.
func (t *tx) addProducts(ctx context.Context, r keyspace.Record, fresh, all []authz.ProductName, scopes []string) error {
	asked := fresh
	if len(scopes) > 0 {
		asked = all
	}
	var paths []string
	for _, name := range asked {
		paths = append(paths, t.l.space.Details(keyspace.ProductRecord(t.org, name)))
	}
	if err := t.get(ctx, paths...); err != nil {
		return err
	}
	s := state{}
	for _, path := range paths {
		if value, there := t.value(path); there {
			s.add(t.l.space, path, value, t.revision(path))
		}
	}
	var offered []string
	for _, name := range asked {
		p, _ := t.productIn(s, name)
		offered = append(offered, words(p.Details, catalog.MemberScopes)...)
	}
	for _, scope := range scopes {
		if !slices.Contains(offered, scope) {
			slices.Sort(offered)
			return &Error{Kind: Invalid, Code: "keymanagement.service.InvalidScopes", Pointer: "/" + catalog.MemberScopes,
				Message: "Invalid scopes. Scopes must be contained in [" + strings.Join(slices.Compact(offered), ", ") + "]"}
		}
	}
	for i, name := range fresh {
		p, there := t.productIn(s, name)
		if !there {
			err := noProduct(t.org, name)
			err.Pointer = fmt.Sprintf("/%s/%d", catalog.MemberProducts, i)
			return err
		}
		status := authz.StatusApproved
		if p.Manual() {
			status = authz.StatusPending
		}
		t.put(t.l.space.KeyProduct(r, name), status.String())
		t.put(t.l.space.IndexProductKeys(t.org, name)+r.Key.String(), "")
	}
	return nil
}

// checkScopes tells what is wrong with the scopes among the members of what was
// handed in.
func checkScopes(o jsonobject.Object) error {
	if err := catalog.CheckScopes(words(o, catalog.MemberScopes)); err != nil {
		return invalid("/"+catalog.MemberScopes, err)
	}
	return nil
}

// Errors of keys.
func noKey() *Error {
	return errorf(NotFound, "keymanagement.service.InvalidClientIdForGivenApp", "Invalid consumer key for Given App")
}

// key finds a key of an app and reads and guards all of it.
func (t *tx) key(ctx context.Context, p appPlace, ref string) (authz.KeyID, error) {
	listed := listedKeys(p.object)
	for _, id := range keyRefs(ref) {
		r := keyspace.KeyRecord(t.org, id)
		paths, err := t.list(ctx, t.l.space.Folder(r))
		if err != nil {
			return id, err
		}
		if len(paths) == 0 {
			continue
		}
		s := state{}
		for _, path := range paths {
			value, _ := t.value(path)
			s.add(t.l.space, path, value, t.revision(path))
		}
		if _, app, ok := t.credentialIn(s, id); ok && (app == p.id || app == "" && slices.Contains(listed, id)) {
			return id, nil
		}
	}
	return authz.KeyID{}, noKey()
}

// Key reads a key of an app. ref is the consumer key, or its id with "sha256:"
// before it or without.
func (l *Ledger) Key(ctx context.Context, org authz.Organization, developer, app, ref string) (c Credential, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		p, err := t.app(ctx, developer, app)
		if err != nil {
			return err
		}
		id, err := t.key(ctx, p, ref)
		c, _, _ = t.credentialIn(t.state(t.value), id)
		return err
	})
	return c, err
}

// FindKey reads a key and the app it belongs to, without the app's other keys.
func (l *Ledger) FindKey(ctx context.Context, org authz.Organization, id authz.KeyID) (a App, c Credential, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		a, c = App{}, Credential{}
		if _, err := t.list(ctx, l.space.Folder(keyspace.KeyRecord(org, id))); err != nil {
			return err
		}
		found, app, ok := t.credentialIn(t.state(t.value), id)
		if !ok || app == "" {
			return noKey()
		}
		apps, err := t.loadApps(ctx, []authz.AppID{app}, false)
		if err != nil {
			return err
		}
		if len(apps) == 0 {
			return noKey()
		}
		a, c = apps[0], found
		a.LastModified, err = t.modified(ctx, a.LastModified, a.detailsRevision, a.Revision, map[int64]int64{})
		return err
	})
	return a, c, err
}

// CreateKey gives an app a further key, approved and without products.
func (l *Ledger) CreateKey(ctx context.Context, by By, org authz.Organization, developer, app string, spec KeySpec) (created Credential, done Done, err error) {
	now := l.now().UnixMilli()
	k := newKey{key: spec.Key, secret: spec.Secret, attributes: spec.Attributes, scopes: spec.Scopes}
	if k.key == "" {
		k.key = authz.GenerateKey()
	} else if err := catalog.CheckOwnKey(k.key); err != nil {
		return created, done, invalid("/"+catalog.MemberKey, err)
	}
	if k.secret == "" {
		k.secret = authz.NewSecret()
	} else if err := catalog.CheckOwnSecret(k.secret); err != nil {
		return created, done, invalid("/"+catalog.MemberSecret, err)
	}
	if err := catalog.CheckAttributes(k.attributes); err != nil {
		return created, done, invalid("/"+catalog.MemberAttributes, err)
	}
	if err := catalog.CheckScopes(k.scopes); err != nil {
		return created, done, invalid("/"+catalog.MemberScopes, err)
	}
	if err := catalog.CheckExpiresInSeconds(spec.ExpiresIn); err != nil {
		return created, done, invalid("/expiresInSeconds", err)
	}
	if err := k.complete(now, spec.ExpiresIn*1000, "/expiresInSeconds"); err != nil {
		return created, done, err
	}
	done, err = l.change(ctx, by, org, "create", fmt.Sprintf("key of app %q", app), func(ctx context.Context, t *tx) (any, error) {
		p, err := t.app(ctx, developer, app)
		if err != nil {
			return nil, err
		}
		o, err := t.changeApp(ctx, &p)
		if err != nil {
			return nil, err
		}
		t.record.Object = l.space.Details(keyspace.KeyRecord(org, k.id))
		if o, err = withKey(o, k.id); err != nil {
			return nil, err
		}
		if err := t.addKey(ctx, p.id, p.developer, k); err != nil {
			return nil, err
		}
		if err := t.rewrite(p.record, stamp(o, by, now, false)); err != nil {
			return nil, err
		}
		created, _, _ = t.credentialIn(t.state(t.overlay), k.id)
		created.ConsumerKey, created.ConsumerSecret = k.key, k.secret
		return created, nil
	})
	created.Revision = done.at(0)
	return created, done, err
}

// changeKey plans a change of one key. plan gets the key as it is and its JSON,
// and returns the JSON as it will be, nil to leave it.
func (l *Ledger) changeKey(ctx context.Context, by By, org authz.Organization, action, developer, app, ref string,
	plan func(ctx context.Context, t *tx, p appPlace, before Credential, o jsonobject.Object) (jsonobject.Object, error),
) (changed Credential, done Done, err error) {
	done, err = l.change(ctx, by, org, action, fmt.Sprintf("key of app %q", app), func(ctx context.Context, t *tx) (any, error) {
		p, err := t.app(ctx, developer, app)
		if err != nil {
			return nil, err
		}
		id, err := t.key(ctx, p, ref)
		if err != nil {
			return nil, err
		}
		before, _, _ := t.credentialIn(t.state(t.value), id)
		if err := t.check(before.Revision); err != nil {
			return nil, err
		}
		r := keyspace.KeyRecord(org, id)
		t.record.Object = l.space.Details(r)
		value, _ := t.value(l.space.Details(r))
		o, _ := jsonobject.Parse([]byte(value)) // what cannot be read is only deleted
		o, err = plan(ctx, t, p, before, o)
		if err != nil {
			return nil, err
		}
		if changed = before; o != nil {
			if err := t.rewrite(r, o); err != nil {
				return nil, err
			}
			changed, _, _ = t.credentialIn(t.state(t.overlay), id)
		}
		return changed, nil
	})
	changed.Revision = done.at(changed.Revision)
	return changed, done, err
}

// UpdateKey adds products to a key, and replaces its attributes and its scopes
// if they are given. The status of a product that is on the key already stays as
// it is.
func (l *Ledger) UpdateKey(ctx context.Context, by By, org authz.Organization, developer, app, ref string, spec KeySpec) (Credential, Done, error) {
	if err := catalog.CheckAttributes(spec.Attributes); err != nil {
		return Credential{}, Done{}, invalid("/"+catalog.MemberAttributes, err)
	}
	if err := catalog.CheckScopes(spec.Scopes); err != nil {
		return Credential{}, Done{}, invalid("/"+catalog.MemberScopes, err)
	}
	return l.changeKey(ctx, by, org, "update", developer, app, ref,
		func(ctx context.Context, t *tx, _ appPlace, before Credential, _ jsonobject.Object) (jsonobject.Object, error) {
			r := keyspace.KeyRecord(org, before.Key)
			o, err := t.rewritten(r)
			if err != nil {
				return nil, err
			}
			var all, fresh []authz.ProductName
			refs := []jsonobject.Object{}
			for _, ref := range productRefs(o) {
				refs = append(refs, ref.ref)
			}
			for _, p := range before.Products {
				all = append(all, p.Name)
			}
			for _, name := range distinctProducts(spec.Products) {
				if !before.has(name) {
					all, fresh = append(all, name), append(fresh, name)
					refs = append(refs, jsonobject.Object{}.With(catalog.MemberProduct, name))
				}
			}
			if len(fresh) > 0 && len(all) > MaxKeyProducts {
				return nil, tooManyProducts(len(all))
			}
			var scopes []string
			if spec.HasScopes {
				scopes = spec.Scopes
				o = o.With(catalog.MemberScopes, append([]string{}, scopes...))
			}
			if err := t.addProducts(ctx, r, fresh, all, scopes); err != nil {
				return nil, err
			}
			if spec.HasAttributes {
				o = catalog.WithAttributes(o, spec.Attributes)
			}
			if len(fresh) > 0 {
				o = o.With(catalog.MemberProducts, refs)
			}
			return o, nil
		})
}

// RemoveKeyProduct takes a product off a key, whatever its status there.
func (l *Ledger) RemoveKeyProduct(ctx context.Context, by By, org authz.Organization, developer, app, ref string, product authz.ProductName) (Credential, Done, error) {
	return l.changeKey(ctx, by, org, "update", developer, app, ref,
		func(ctx context.Context, t *tx, _ appPlace, before Credential, _ jsonobject.Object) (jsonobject.Object, error) {
			if !before.has(product) {
				return nil, errorf(NotFound, "keygate.product_not_on_key", "APIProduct is not associated with consumer key")
			}
			r := keyspace.KeyRecord(org, before.Key)
			o, err := t.rewritten(r)
			if err != nil {
				return nil, err
			}
			refs := []jsonobject.Object{}
			for _, ref := range productRefs(o) {
				if ref.name != product {
					refs = append(refs, ref.ref)
				}
			}
			t.delete(l.space.KeyProduct(r, product))
			return o.With(catalog.MemberProducts, refs), t.dropIndex(ctx, r, product)
		})
}

// DeleteKey deletes a key, and returns what it was.
func (l *Ledger) DeleteKey(ctx context.Context, by By, org authz.Organization, developer, app, ref string) (Credential, Done, error) {
	now := l.now().UnixMilli()
	return l.changeKey(ctx, by, org, "delete", developer, app, ref,
		func(ctx context.Context, t *tx, p appPlace, before Credential, _ jsonobject.Object) (jsonobject.Object, error) {
			object := t.record.Object
			o, err := t.rewritten(p.record)
			if err != nil {
				return nil, err
			}
			t.record.Object = object
			ids := slices.DeleteFunc(append([]string{}, keyIDs(o)...), func(id string) bool { return id == before.Key.String() })
			if err := t.rewrite(p.record, stamp(o.With(catalog.MemberCredentials, ids), by, now, false)); err != nil {
				return nil, err
			}
			fits, err := t.deleteKey(ctx, p.id, before.Key)
			if err == nil && !fits {
				err = errorf(TooLarge, "keygate.too_large", "the key has more products than one transaction of etcd holds: take some off first")
			}
			return nil, err
		})
}

// Reveal fills in the consumer keys and secrets of credentials that hold them
// sealed, and returns of how many. That is noted in the audit trail before it
// returns; if it cannot be noted nothing is revealed. What no sealing key opens
// is logged and stays as it is.
func (l *Ledger) Reveal(ctx context.Context, by By, org authz.Organization, credentials ...*Credential) (revealed int, err error) {
	const most = 100 // ids in the note
	type plain struct {
		to          *Credential
		key, secret string
	}
	var opened []plain
	var ids []string
	for _, c := range credentials {
		if l.seal == nil || c.SealedKey == "" && c.SealedSecret == "" {
			continue
		}
		p := plain{to: c}
		var failed error
		for _, m := range []struct {
			sealed, member string
			into           *string
		}{{c.SealedKey, catalog.MemberKey, &p.key}, {c.SealedSecret, catalog.MemberSecret, &p.secret}} {
			if m.sealed != "" && failed == nil {
				*m.into, failed = l.seal.Open(m.sealed, sealContext(m.member, c.Key))
			}
		}
		if failed != nil {
			l.log.Warn("a consumer key cannot be revealed", "keyId", c.Key.String(), "cause", failed)
			continue
		}
		opened = append(opened, p)
		if len(ids) < most {
			ids = append(ids, c.Key.String())
		}
	}
	if len(opened) == 0 {
		return 0, nil
	}
	object, note := l.space.Details(keyspace.KeyRecord(org, opened[0].to.Key)), ""
	if len(opened) > 1 {
		object, note = "", fmt.Sprintf("%d keys: %s", len(opened), strings.Join(ids, " "))
		if len(opened) > len(ids) {
			note += " and more"
		}
	}
	if err := l.Note(ctx, by, org, "reveal", object, note); err != nil {
		return 0, err
	}
	for _, p := range opened {
		p.to.ConsumerKey, p.to.ConsumerSecret = p.key, p.secret
	}
	return len(opened), nil
}
