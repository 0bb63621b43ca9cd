package ledger

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// Product is an API product as it is stored.
type Product struct {
	catalog.Product
	// Revision is the product's ETag.
	Revision int64
	// LastModified in milliseconds since the Unix epoch.
	LastModified int64

	detailsRevision int64
}

// productMembers that somebody may set: an update removes those that it has
// not.
var productMembers = []string{
	catalog.MemberDisplayName, catalog.MemberDescription, catalog.MemberApprovalType, catalog.MemberResources, catalog.MemberProxies,
	catalog.MemberEnvironments, catalog.MemberScopes, catalog.MemberAttributes, "quota", "quotaInterval", "quotaTimeUnit", "quotaCounterScope",
	catalog.MemberOperationGroup, "graphqlOperationGroup", "grpcOperationGroup", "llmOperationGroup", "payloadOperationGroup",
	"llmQuota", "llmQuotaInterval", "llmQuotaTimeUnit", "space",
}

func noProduct(org authz.Organization, name authz.ProductName) *Error {
	return errorf(NotFound, "keymanagement.service.apiproduct_doesnot_exist", "APIProduct named %s does not exist in organization %s", name, org)
}

// Product reads a product.
func (l *Ledger) Product(ctx context.Context, org authz.Organization, name authz.ProductName) (p Product, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		p, err = t.product(ctx, name)
		return err
	})
	return p, err
}

// product reads and guards a product.
func (t *tx) product(ctx context.Context, name authz.ProductName) (Product, error) {
	path := t.l.space.Details(keyspace.ProductRecord(t.org, name))
	if err := t.get(ctx, path); err != nil {
		return Product{}, err
	}
	p, there := t.productIn(t.state(t.value), name)
	if !there {
		return p, noProduct(t.org, name)
	}
	return p, nil
}

// CreateProduct creates a product.
func (l *Ledger) CreateProduct(ctx context.Context, by By, org authz.Organization, p catalog.Product) (created Product, done Done, err error) {
	if err := catalog.CheckProductName(string(p.Name)); err != nil {
		return created, done, invalid("/"+catalog.MemberName, err)
	}
	if err := checkAttributes(p.Details); err != nil {
		return created, done, err
	}
	if err := checkScopes(p.Details); err != nil {
		return created, done, err
	}
	r := keyspace.ProductRecord(org, p.Name)
	o := given(p.Details, catalog.CheckProductMember, readOnlyMembers...).With(catalog.MemberName, p.Name)
	o = sorted(stamp(withAttributes(o), by, l.now().UnixMilli(), true))
	done, err = l.change(ctx, by, org, "create", l.space.Details(r), func(ctx context.Context, t *tx) (any, error) {
		if err := t.check(0); err != nil { // there is nothing yet
			return nil, err
		}
		switch _, err := t.product(ctx, p.Name); {
		case err == nil:
			return nil, &Error{Kind: Exists, Code: "keymanagement.service.apiproduct_already_exists", Pointer: "/" + catalog.MemberName,
				Message: fmt.Sprintf("APIProduct with name %s already exists", p.Name)}
		case !isKind(err, NotFound):
			return nil, err
		}
		if err := t.create(r, o); err != nil {
			return nil, err
		}
		created, _ = t.productIn(t.state(t.overlay), p.Name)
		return created, nil
	})
	created.Revision = done.at(created.Revision)
	return created, done, err
}

// UpdateProduct replaces what somebody may set of a product. Its name stays, and
// so do members that Apigee does not know, and the status of the product on keys
// that have it, whatever becomes of its approval type.
func (l *Ledger) UpdateProduct(ctx context.Context, by By, org authz.Organization, p catalog.Product) (Product, Done, error) {
	if err := checkAttributes(p.Details); err != nil {
		return Product{}, Done{}, err
	}
	if err := checkScopes(p.Details); err != nil {
		return Product{}, Done{}, err
	}
	fresh := withAttributes(given(p.Details, catalog.CheckProductMember, append(readOnlyMembers, catalog.MemberName)...))
	return l.changeProduct(ctx, by, org, p.Name, func(_ *tx, o jsonobject.Object) (jsonobject.Object, error) {
		return replaced(o, fresh, productMembers), nil
	})
}

// changeProduct rewrites a product's JSON.
func (l *Ledger) changeProduct(ctx context.Context, by By, org authz.Organization, name authz.ProductName, rewrite func(*tx, jsonobject.Object) (jsonobject.Object, error)) (updated Product, done Done, err error) {
	r, now := keyspace.ProductRecord(org, name), l.now().UnixMilli()
	done, err = l.change(ctx, by, org, "update", l.space.Details(r), func(ctx context.Context, t *tx) (any, error) {
		before, err := t.product(ctx, name)
		if err != nil {
			return nil, err
		}
		if err := t.check(before.Revision); err != nil {
			return nil, err
		}
		o, err := t.rewritten(r)
		if err != nil {
			return nil, err
		}
		if o, err = rewrite(t, o); err != nil {
			return nil, err
		}
		if err := t.rewrite(r, stamp(o, by, now, false)); err != nil {
			return nil, err
		}
		updated, _ = t.productIn(t.state(t.overlay), name)
		return updated, nil
	})
	updated.Revision = done.at(updated.Revision)
	return updated, done, err
}

// maxStale is how many entries of an index that stand for no key any more are
// cleaned up with the product.
const maxStale = 50

// DeleteProduct deletes a product that no key has, and returns what it was.
func (l *Ledger) DeleteProduct(ctx context.Context, by By, org authz.Organization, name authz.ProductName) (deleted Product, done Done, err error) {
	r := keyspace.ProductRecord(org, name)
	index := l.space.IndexProductKeys(org, name)
	done, err = l.change(ctx, by, org, "delete", l.space.Details(r), func(ctx context.Context, t *tx) (any, error) {
		var err error
		if deleted, err = t.product(ctx, name); err != nil {
			return nil, err
		}
		if err := t.check(deleted.Revision); err != nil {
			return nil, err
		}
		resp, err := l.store.Do(ctx, clientv3.OpGet(index, clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithRev(t.rev)))
		if err != nil {
			return nil, err
		}
		held := func(n int64) error {
			keys := "keys have it"
			if n == 1 {
				keys = "key has it"
			}
			return errorf(Conflict, "keygate.product_in_use", "API product %s is not deleted, for %d %s: take it off them first", name, n, keys)
		}
		if n := resp.Get().Count; n > maxStale {
			return nil, held(n)
		}
		// Nothing may get there meanwhile; what is there may stand for a key that
		// is gone.
		paths, err := t.list(ctx, index)
		if err != nil {
			return nil, err
		}
		holders, err := t.holders(ctx, name, indexedKeys(paths))
		if err != nil {
			return nil, err
		}
		if len(holders) > 0 {
			return nil, held(int64(len(holders)))
		}
		for _, path := range paths {
			t.delete(path)
		}
		t.delete(l.space.Details(r))
		return deleted, nil
	})
	return deleted, done, err
}

// ProductHolder is a key that has a product.
type ProductHolder struct {
	App    authz.AppID
	Key    authz.KeyID
	Status authz.Status // of the product on the key
}

// maxHolders that are listed.
const maxHolders = 100_000

// ProductHolders returns the keys that have a product, by the index, in the
// order of their ids.
func (l *Ledger) ProductHolders(ctx context.Context, org authz.Organization, name authz.ProductName) (holders []ProductHolder, err error) {
	err = l.scan(ctx, org, func(ctx context.Context, t *tx) error {
		if _, err := t.product(ctx, name); err != nil {
			return err
		}
		keys, err := t.productKeys(ctx, name, maxHolders)
		if errors.Is(err, errTooManyKeys) {
			return errorf(Limit, "keygate.limit", "more than %d keys have API product %s: too many for one list", maxHolders, name)
		}
		if err != nil {
			return err
		}
		holders, err = t.holders(ctx, name, keys)
		return err
	})
	return holders, err
}

var errTooManyKeys = errors.New("there are more keys")

// productKeys reads the keys that a product's index has; errTooManyKeys if they
// are more than limit.
func (t *tx) productKeys(ctx context.Context, name authz.ProductName, limit int64) ([]authz.KeyID, error) {
	resp, err := t.l.store.Do(ctx, clientv3.OpGet(t.l.space.IndexProductKeys(t.org, name),
		clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(limit+1), clientv3.WithRev(t.rev)))
	if err != nil {
		return nil, err
	}
	if int64(len(resp.Get().Kvs)) > limit {
		return nil, errTooManyKeys
	}
	paths := make([]string, 0, len(resp.Get().Kvs))
	for _, kv := range resp.Get().Kvs {
		paths = append(paths, string(kv.Key))
	}
	return indexedKeys(paths), nil
}

// holders are those of the keys that have a product, and whose app is there.
func (t *tx) holders(ctx context.Context, name authz.ProductName, keys []authz.KeyID) (holders []ProductHolder, err error) {
	var folders, apps []string
	for _, id := range keys {
		folders = append(folders, t.l.space.Folder(keyspace.KeyRecord(t.org, id)))
	}
	if _, err := t.readFolders(ctx, folders...); err != nil {
		return nil, err
	}
	s := t.state(t.value)
	for _, id := range keys {
		c, app, ok := t.credentialIn(s, id)
		if !ok || !c.has(name) {
			continue
		}
		h := ProductHolder{App: app, Key: id}
		for _, p := range c.Products {
			if p.Name == name {
				h.Status = p.Status
			}
		}
		holders = append(holders, h)
		apps = append(apps, t.appPath(app))
	}
	if err := t.readValues(ctx, distinctStrings(apps)...); err != nil {
		return nil, err
	}
	there := holders[:0]
	for _, h := range holders {
		if _, ok := t.value(t.appPath(h.App)); ok {
			there = append(there, h)
		}
	}
	return there, nil
}

func (t *tx) appPath(id authz.AppID) string {
	return t.l.space.Details(keyspace.AppRecord(t.org, id))
}
