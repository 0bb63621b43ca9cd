// Package keyspace is the etcd schema as code: it builds and parses the paths
// of keygate's keys and reads the values that stand there. It is pure.
//
// The schema is a public interface: etcdctl is a first-class way in. Path
// segments are url.PathEscape'd names; a segment in any other form is not
// canonical, and a path that holds one names nothing.
//
//	<prefix>/<org>/keys/<id>/status              approved | revoked | pending
//	<prefix>/<org>/keys/<id>/products/<product>  approved | revoked | pending
//	<prefix>/<org>/keys/<id>/credential          JSON
//	<prefix>/<org>/apps/<appId>/status           approved | revoked | pending
//	<prefix>/<org>/apps/<appId>/app              JSON
//	<prefix>/<org>/developers/<id>/status        active | inactive
//	<prefix>/<org>/developers/<id>/developer     JSON
//	<prefix>/<org>/products/<product>/product    JSON
//	<prefix>/<org>/.barrier                      written by a revocation that waits for the fleet
//	<prefix>.index/<org>/…                       for management only, outside the watched prefix
//	<prefix>.replicas/<id>                       a live replica, under a lease; likewise outside
//	<prefix>.audit/<org>/<id>                    one change, written by its own transaction
//	<prefix>.chain/<revision>                    what makes the audit trail tamper-evident; also its head, and leader
//	<prefix>.tokens/<id>                         a management token, by its SHA-256
//	<prefix>.once/<org>/<id>                     the answer to a request with an Idempotency-Key
//	<prefix>.intent/<org>/<id>                   a change of several transactions that has begun
package keyspace

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"keygate/authz"
)

// DefaultPrefix of all keys.
const DefaultPrefix = "/keygate"

// Space is the part of etcd below one prefix. The zero Space is not valid; use
// New.
type Space struct{ prefix string }

// New returns the space below prefix, such as "/keygate": it begins with a
// slash, does not end in one and has no empty segment.
func New(prefix string) (Space, error) {
	if len(prefix) < 2 || prefix[0] != '/' || strings.HasSuffix(prefix, "/") || strings.Contains(prefix, "//") {
		return Space{}, fmt.Errorf("prefix %q: want a path such as %q, without a slash at its end", prefix, DefaultPrefix)
	}
	for _, r := range prefix {
		if r <= ' ' || r > '~' {
			return Space{}, fmt.Errorf("prefix %q: want printable ASCII without blanks", prefix)
		}
	}
	return Space{prefix}, nil
}

// Prefix that the space was made of.
func (s Space) Prefix() string { return s.prefix }

// Watched is the prefix of every key that a check may depend on, with its
// final slash.
func (s Space) Watched() string { return s.prefix + "/" }

// Index is the prefix of the management indexes of org, with its final slash.
func (s Space) Index(org authz.Organization) string {
	return s.prefix + ".index/" + url.PathEscape(string(org)) + "/"
}

// Probe is a key that is never written, for a read that asks only for the
// current revision. It lies under Watched, so whoever may read the records may
// read it.
func (s Space) Probe() string { return s.prefix + "/.probe" }

// AllOrganizations stands for every organization where a right is given. It
// names none.
const AllOrganizations authz.Organization = "*"

// CheckOrganization tells whether org can name an organization.
func CheckOrganization(org authz.Organization) error {
	switch {
	case org == "":
		return errors.New("the organization has no name")
	case org[0] == '.':
		return fmt.Errorf("organization %q begins with a dot", string(org))
	case org == AllOrganizations:
		return fmt.Errorf("organization %q is the word for all of them", string(org))
	}
	return nil
}

// Kind of a record.
type Kind uint8

// The zero Kind is no record.
const (
	KindNone Kind = iota
	KindKey
	KindApp
	KindDeveloper
	KindProduct
)

// kinds gives each kind its folder and the name of its JSON value.
var kinds = [...]struct{ folder, details string }{
	KindKey:       {"keys", "credential"},
	KindApp:       {"apps", "app"},
	KindDeveloper: {"developers", "developer"},
	KindProduct:   {"products", "product"},
}

// String returns the kind's folder.
func (k Kind) String() string {
	if k == KindNone || int(k) >= len(kinds) {
		return "none"
	}
	return kinds[k].folder
}

// Record names one folder of keys that is read, and changes, as a whole. It is
// comparable, and equal only to itself.
type Record struct {
	Kind         Kind
	Organization authz.Organization
	Key          authz.KeyID // of KindKey
	Name         string      // of every other kind: appId, developerId or product
}

// KeyRecord names the record of a consumer key.
func KeyRecord(org authz.Organization, id authz.KeyID) Record {
	return Record{Kind: KindKey, Organization: org, Key: id}
}

// AppRecord names the record of a developer app.
func AppRecord(org authz.Organization, id authz.AppID) Record {
	return Record{Kind: KindApp, Organization: org, Name: string(id)}
}

// DeveloperRecord names the record of a developer.
func DeveloperRecord(org authz.Organization, id authz.DeveloperID) Record {
	return Record{Kind: KindDeveloper, Organization: org, Name: string(id)}
}

// ProductRecord names the record of an API product.
func ProductRecord(org authz.Organization, name authz.ProductName) Record {
	return Record{Kind: KindProduct, Organization: org, Name: string(name)}
}

// name is the record's own segment.
func (r Record) name() string {
	if r.Kind == KindKey {
		return r.Key.String()
	}
	return url.PathEscape(r.Name)
}

// Folder is the prefix of all the record's keys, with its final slash.
func (s Space) Folder(r Record) string {
	return s.prefix + "/" + url.PathEscape(string(r.Organization)) + "/" + kinds[r.Kind].folder + "/" + r.name() + "/"
}

// Status is the path of the record's status flag.
func (s Space) Status(r Record) string { return s.Folder(r) + "status" }

// Details is the path of the record's JSON value.
func (s Space) Details(r Record) string { return s.Folder(r) + kinds[r.Kind].details }

// KeyProduct is the path of the flag of a product on a key. r is a key's
// record.
func (s Space) KeyProduct(r Record, p authz.ProductName) string {
	return s.Folder(r) + "products/" + url.PathEscape(string(p))
}

// Barrier is the path that a revocation which waits for the fleet writes.
func (s Space) Barrier(org authz.Organization) string {
	return s.prefix + "/" + url.PathEscape(string(org)) + "/.barrier"
}

// Field tells what stands at a path within its record.
type Field uint8

// The zero Field is a key that the schema does not know. It still belongs to
// its record.
const (
	FieldOther   Field = iota
	FieldStatus        // the record's flag
	FieldProduct       // the flag of a product on a key
	FieldDetails       // the record's JSON
)

// Flag tells whether the field is a status by itself: one of a few plain words.
func (f Field) Flag() bool { return f == FieldStatus || f == FieldProduct }

// Path is what a key in etcd is about. A barrier has a Record of KindNone, with
// nothing but an Organization.
type Path struct {
	Record  Record
	Field   Field
	Product authz.ProductName // of FieldProduct
}

// Parse reads a key. An error says why it names nothing: it lies outside the
// space, a segment is not in canonical form, or the schema has no such folder.
func (s Space) Parse(key string) (Path, error) {
	rest, ok := strings.CutPrefix(key, s.prefix+"/")
	if !ok {
		return Path{}, fmt.Errorf("%s is outside %q", s.shown(key), s.Watched())
	}
	seg := strings.Split(rest, "/")
	org, err := canonical(seg[0])
	if err == nil {
		err = CheckOrganization(authz.Organization(org))
	}
	if err != nil {
		return Path{}, fmt.Errorf("%s: %w", s.shown(key), err)
	}
	p := Path{Record: Record{Organization: authz.Organization(org)}}
	if len(seg) == 2 && seg[1] == ".barrier" {
		return p, nil
	}
	if len(seg) < 4 {
		return Path{}, fmt.Errorf("%s: want <org>/<folder>/<name>/<field>", s.shown(key))
	}
	for k := KindKey; int(k) < len(kinds); k++ {
		if kinds[k].folder == seg[1] {
			p.Record.Kind = k
		}
	}
	switch p.Record.Kind {
	case KindNone:
		return Path{}, fmt.Errorf("%s: no folder %q in the schema", s.shown(key), bounded(seg[1]))
	case KindKey:
		p.Record.Key, err = authz.ParseKeyID(seg[2])
	default:
		p.Record.Name, err = canonical(seg[2])
	}
	if err != nil {
		return Path{}, fmt.Errorf("%s: %w", s.shown(key), err)
	}
	switch field := seg[3]; {
	case len(seg) == 4 && field == "status" && p.Record.Kind != KindProduct:
		p.Field = FieldStatus
	case len(seg) == 4 && field == kinds[p.Record.Kind].details:
		p.Field = FieldDetails
	case len(seg) == 5 && field == "products" && p.Record.Kind == KindKey:
		product, err := canonical(seg[4])
		if err != nil {
			return Path{}, fmt.Errorf("%s: %w", s.shown(key), err)
		}
		p.Field, p.Product = FieldProduct, authz.ProductName(product)
	}
	return p, nil
}

// shown quotes a key for an error. It is bounded, and leaves out what stands
// in the place of a key's id without being one: that may be the consumer key.
func (s Space) shown(key string) string {
	seg := strings.SplitN(strings.TrimPrefix(key, s.prefix+"/"), "/", 4)
	if len(seg) > 2 && seg[1] == kinds[KindKey].folder {
		if _, err := authz.ParseKeyID(seg[2]); err != nil {
			return fmt.Sprintf("%q", bounded(s.prefix+"/"+seg[0]+"/"+seg[1]+"/")+"…")
		}
	}
	return fmt.Sprintf("%q", bounded(key))
}

func bounded(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}

// canonical unescapes a segment that is in the one form url.PathEscape gives.
func canonical(seg string) (string, error) {
	name, err := url.PathUnescape(seg)
	if err != nil || name == "" || url.PathEscape(name) != seg {
		if err == nil && name != "" {
			return "", fmt.Errorf("segment %q is not canonical, want %q", bounded(seg), bounded(url.PathEscape(name)))
		}
		return "", fmt.Errorf("segment %q is not an escaped name", bounded(seg))
	}
	return name, nil
}
