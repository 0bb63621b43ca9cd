package ledger

import (
	"context"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

// Explain answers what a check of a key for the products would answer, by the
// ladder of the data path, with each of its rungs. What a replica alone knows,
// such as an expiry that it saw before its clock was set back, is not in it.
func (l *Ledger) Explain(ctx context.Context, org authz.Organization, id authz.KeyID, products []authz.ProductName) (d authz.Decision, rungs []authz.Rung, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		key := keyspace.KeyRecord(org, id)
		if _, err := t.readFolders(ctx, l.space.Folder(key)); err != nil {
			return err
		}
		// From the key to its app, and from there to the developer, as a replica does.
		records := fixed{Proof: always{}, Revision: t.rev}
		records.Credential = l.space.Credential(l.records(t.view)[key])
		if c := records.Credential; c.Exists && c.App != "" {
			app := keyspace.AppRecord(org, c.App)
			if _, err := t.readFolders(ctx, l.space.Folder(app)); err != nil {
				return err
			}
			records.App = l.space.App(l.records(t.view)[app])
		}
		if a := records.App; a.Exists && a.Developer != "" {
			developer := keyspace.DeveloperRecord(org, a.Developer)
			if _, err := t.readFolders(ctx, l.space.Folder(developer)); err != nil {
				return err
			}
			records.Developer = l.space.Developer(l.records(t.view)[developer])
		}
		a := authz.Authorizer{Source: records, Now: l.now}
		d, rungs = a.Explain(ctx, authz.Request{Organization: org, KeyID: id, Products: products})
		return nil
	})
	return d, rungs, err
}

// DeveloperTarget is the flag of a developer, by e-mail address or id.
func (l *Ledger) DeveloperTarget(ctx context.Context, org authz.Organization, ref string) (target Target, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		id, err := t.developer(ctx, ref)
		target = Target{Record: keyspace.DeveloperRecord(org, id)}
		return err
	})
	return target, err
}

// AppTarget is the flag of a developer's app.
func (l *Ledger) AppTarget(ctx context.Context, org authz.Organization, developer, app string) (target Target, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		p, err := t.app(ctx, developer, app)
		target = Target{Record: p.record}
		return err
	})
	return target, err
}

// KeyTarget is the flag of a key; see Key for ref.
func (l *Ledger) KeyTarget(ctx context.Context, org authz.Organization, developer, app, ref string) (target Target, err error) {
	err = l.read(ctx, org, func(ctx context.Context, t *tx) error {
		p, err := t.app(ctx, developer, app)
		if err != nil {
			return err
		}
		id, err := t.key(ctx, p, ref)
		target = Target{Record: keyspace.KeyRecord(org, id)}
		return err
	})
	return target, err
}

// KeyProductTarget is the flag of a product on a key. Whether the product is on
// the key shows when the flag is changed.
func (l *Ledger) KeyProductTarget(ctx context.Context, org authz.Organization, developer, app, ref string, product authz.ProductName) (Target, error) {
	t, err := l.KeyTarget(ctx, org, developer, app, ref)
	t.Product = product
	return t, err
}
