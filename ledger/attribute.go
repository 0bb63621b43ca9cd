package ledger

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// Holder names what has attributes: a developer, a developer's app, or a
// product.
type Holder struct {
	Developer string // by e-mail address or id
	App       string // by name, under its Developer
	Product   string
}

// SetAttributes replaces all attributes of a developer, an app or a product.
func (l *Ledger) SetAttributes(ctx context.Context, by By, org authz.Organization, of Holder, attributes []catalog.Attribute) ([]catalog.Attribute, Done, error) {
	attributes = append([]catalog.Attribute{}, attributes...)
	if err := catalog.CheckAttributes(attributes); err != nil {
		return nil, Done{}, invalid("/attribute", err)
	}
	done, err := l.changeAttributes(ctx, by, org, of, func([]catalog.Attribute) ([]catalog.Attribute, any, error) {
		return attributes, attributes, nil
	})
	return attributes, done, err
}

// SetAttribute sets one attribute, behind the others if it is new.
func (l *Ledger) SetAttribute(ctx context.Context, by By, org authz.Organization, of Holder, attribute catalog.Attribute) (catalog.Attribute, Done, error) {
	if err := catalog.CheckAttributeName(attribute.Name); err != nil {
		return attribute, Done{}, invalid("/"+catalog.MemberName, err)
	}
	if err := catalog.CheckAttributeValue(attribute.Value); err != nil {
		return attribute, Done{}, invalid("/"+catalog.MemberValue, err)
	}
	done, err := l.changeAttributes(ctx, by, org, of, func(all []catalog.Attribute) ([]catalog.Attribute, any, error) {
		if i := indexAttribute(all, attribute.Name); i >= 0 {
			all[i] = attribute
			return all, attribute, nil
		}
		if len(all) >= catalog.MaxAttributes {
			return nil, nil, errorf(Limit, "keygate.limit", "there are %d attributes, want at most %d", len(all), catalog.MaxAttributes)
		}
		return append(all, attribute), attribute, nil
	})
	return attribute, done, err
}

// DeleteAttribute removes one attribute, and returns what it was.
func (l *Ledger) DeleteAttribute(ctx context.Context, by By, org authz.Organization, of Holder, name string) (deleted catalog.Attribute, done Done, err error) {
	done, err = l.changeAttributes(ctx, by, org, of, func(all []catalog.Attribute) ([]catalog.Attribute, any, error) {
		i := indexAttribute(all, name)
		if i < 0 {
			return nil, nil, NoAttribute(name)
		}
		deleted = all[i]
		return slices.Delete(all, i, i+1), deleted, nil
	})
	return deleted, done, err
}

// checkAttributes tells what is wrong with the attributes among the members of
// what was handed in.
func checkAttributes(o jsonobject.Object) error {
	raw, ok := o.Get(catalog.MemberAttributes)
	if !ok {
		return nil
	}
	var all []catalog.Attribute
	err := json.Unmarshal(raw, &all)
	if err == nil {
		err = catalog.CheckAttributes(all)
	}
	if err != nil {
		return invalid("/"+catalog.MemberAttributes, err)
	}
	return nil
}

// NoAttribute is the error for an attribute that is not there.
func NoAttribute(name string) *Error {
	return errorf(NotFound, "organizations.keymanagement.AttributeDoesntExist", "Attribute named %s does not exist", name)
}

func indexAttribute(all []catalog.Attribute, name string) int {
	return slices.IndexFunc(all, func(a catalog.Attribute) bool { return a.Name == name })
}

// changeAttributes rewrites the attributes of a holder. edit gets those it has,
// and also returns what the change results in.
func (l *Ledger) changeAttributes(ctx context.Context, by By, org authz.Organization, of Holder, edit func([]catalog.Attribute) ([]catalog.Attribute, any, error)) (Done, error) {
	now := l.now().UnixMilli()
	return l.change(ctx, by, org, "update", fmt.Sprintf("attributes of %+v", of), func(ctx context.Context, t *tx) (any, error) {
		r, o, err := t.holder(ctx, of)
		if err != nil {
			return nil, err
		}
		all, result, err := edit(catalog.Attributes(o))
		if err != nil {
			return nil, err
		}
		return result, t.rewrite(r, stamp(catalog.WithAttributes(o, all), by, now, false))
	})
}

// holder reads and guards what has attributes, compares its revision with the
// one that is asked for, and returns its JSON to be changed.
func (t *tx) holder(ctx context.Context, of Holder) (r keyspace.Record, o jsonobject.Object, err error) {
	switch {
	case of.Product != "":
		p, err := t.product(ctx, authz.ProductName(of.Product))
		if err != nil {
			return r, nil, err
		}
		if err := t.check(p.Revision); err != nil {
			return r, nil, err
		}
		r = keyspace.ProductRecord(t.org, authz.ProductName(of.Product))
	case of.App != "":
		p, err := t.app(ctx, of.Developer, of.App)
		if err != nil {
			return r, nil, err
		}
		o, err := t.changeApp(ctx, &p)
		return p.record, o, err
	default:
		id, err := t.developer(ctx, of.Developer)
		if err != nil {
			return r, nil, err
		}
		d, _ := t.developerIn(t.state(t.value), id)
		if err := t.check(d.Revision); err != nil {
			return r, nil, err
		}
		r = keyspace.DeveloperRecord(t.org, id)
	}
	o, err = t.rewritten(r)
	return r, o, err
}
