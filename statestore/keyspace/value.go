package keyspace

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"

	"keygate/authz"
	"keygate/jsonobject"
)

// Version is the "v" of every JSON value that this code reads and writes.
// Another version is unreadable, and so refused.
const Version = 1

// Names of the members of the stored JSON values that a check depends on.
// Others stand beside them: Apigee's own, and unknown ones, which survive a
// rewrite.
const (
	MemberVersion   = "v"           // credential, app, developer, product
	MemberApp       = "appId"       // credential, app
	MemberDeveloper = "developerId" // credential, app, developer
	MemberExpiresAt = "expiresAt"   // credential: ms since the epoch, -1 never
	MemberScopes    = "scopes"      // credential: list of strings
)

// Entry is one key and its value as read from etcd.
type Entry struct {
	Key   string
	Value []byte
}

// ParseStatus reads the flag of a key, an app or a product on a key: exactly
// one of approved, revoked, pending.
func ParseStatus(value []byte) authz.Flag {
	return parseFlag(value, authz.StatusApproved, authz.StatusRevoked, authz.StatusPending)
}

// ParseDeveloperStatus reads a developer's flag: exactly active or inactive.
func ParseDeveloperStatus(value []byte) authz.Flag {
	return parseFlag(value, authz.StatusActive, authz.StatusInactive)
}

func parseFlag(value []byte, words ...authz.Status) authz.Flag {
	var known []string
	for _, w := range words {
		if string(value) == w.String() {
			return authz.Flag{Status: w}
		}
		known = append(known, w.String())
	}
	return authz.Flag{Problem: fmt.Sprintf("status %s is not one of %s", quote(value), strings.Join(known, ", "))}
}

// quote shows a value that should have been a short word, bounded.
func quote(value []byte) string {
	if len(value) > 24 {
		return fmt.Sprintf("%q… (%d bytes)", value[:24], len(value))
	}
	return fmt.Sprintf("%q", value)
}

// NoStatus is the flag of a record of which none is stored.
var NoStatus = authz.Flag{Problem: "status is absent"}

// NoCredential, NoApp and NoDeveloper are records without any of their parts, to
// which Credential, App and Developer then add what is stored. They exist.
func NoCredential() authz.Credential {
	return authz.Credential{Exists: true, Status: NoStatus, Problem: "credential is absent"}
}

// NoApp is explained at NoCredential.
func NoApp() authz.App { return authz.App{Exists: true, Status: NoStatus, Problem: "app is absent"} }

// NoDeveloper is explained at NoCredential.
func NoDeveloper() authz.Developer {
	return authz.Developer{Exists: true, Status: NoStatus, Problem: "developer is absent"}
}

// Credential reads the record of a key from all the entries of its folder. No
// entry at all is no record: the zero one. Entries whose path is not canonical name
// nothing and are passed over.
func (s Space) Credential(entries []Entry) authz.Credential {
	if len(entries) == 0 {
		return authz.Credential{}
	}
	c := NoCredential()
	c.Products = map[authz.ProductName]authz.Flag{}
	for _, e := range entries {
		switch p, err := s.Parse(e.Key); {
		case err != nil:
		case p.Field == FieldStatus:
			c.Status = ParseStatus(e.Value)
		case p.Field == FieldProduct:
			c.Products[p.Product] = ParseStatus(e.Value)
		case p.Field == FieldDetails:
			ReadCredential(&c, e.Value)
		}
	}
	return c
}

// ReadCredential reads the JSON of a credential into c: all of it but the flags.
func ReadCredential(c *authz.Credential, value []byte) {
	c.Problem = problem("credential", readCredential(c, value))
}

func readCredential(c *authz.Credential, value []byte) (err error) {
	o, err := open(value)
	if err != nil {
		return err
	}
	if c.App, err = text[authz.AppID](o, MemberApp); err != nil {
		return err
	}
	if c.Developer, err = text[authz.DeveloperID](o, MemberDeveloper); err != nil {
		return err
	}
	if err := member(o, MemberExpiresAt, &c.ExpiresAt); err != nil {
		return err
	}
	if _, ok := o.Get(MemberScopes); !ok {
		return nil
	}
	var scopes []string
	if err := member(o, MemberScopes, &scopes); err != nil {
		return err
	}
	for _, scope := range scopes {
		if scope == "" || strings.ContainsFunc(scope, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
			return fmt.Errorf("%q: scope %q is empty or holds a blank", MemberScopes, scope)
		}
	}
	c.Scopes = strings.Join(scopes, " ")
	return nil
}

// App reads the record of an app, as Credential reads a key's.
func (s Space) App(entries []Entry) authz.App {
	if len(entries) == 0 {
		return authz.App{}
	}
	a := NoApp()
	for _, e := range entries {
		switch p, err := s.Parse(e.Key); {
		case err != nil:
		case p.Field == FieldStatus:
			a.Status = ParseStatus(e.Value)
		case p.Field == FieldDetails:
			ReadApp(&a, e.Value)
		}
	}
	return a
}

// ReadApp reads the JSON of an app into a: all of it but the flag.
func ReadApp(a *authz.App, value []byte) { a.Problem = problem("app", readApp(a, value)) }

func readApp(a *authz.App, value []byte) error {
	o, err := open(value)
	if err == nil {
		a.Developer, err = text[authz.DeveloperID](o, MemberDeveloper)
	}
	return err
}

// Developer reads the record of a developer, as Credential reads a key's.
func (s Space) Developer(entries []Entry) authz.Developer {
	if len(entries) == 0 {
		return authz.Developer{}
	}
	d := NoDeveloper()
	for _, e := range entries {
		switch p, err := s.Parse(e.Key); {
		case err != nil:
		case p.Field == FieldStatus:
			d.Status = ParseDeveloperStatus(e.Value)
		case p.Field == FieldDetails:
			ReadDeveloper(&d, e.Value)
		}
	}
	return d
}

// ReadDeveloper reads the JSON of a developer into d: all of it but the flag.
func ReadDeveloper(d *authz.Developer, value []byte) {
	_, err := open(value)
	d.Problem = problem("developer", err)
}

// problem is bounded: an error quotes what somebody stored, which may be large.
func problem(what string, err error) string {
	if err == nil {
		return ""
	}
	p := what + ": " + err.Error()
	if len(p) > 200 {
		p = strings.ToValidUTF8(p[:200], "") + "…"
	}
	return p
}

// open parses a stored JSON value and checks its version.
func open(value []byte) (jsonobject.Object, error) {
	o, err := jsonobject.Parse(value)
	if err != nil {
		return nil, err
	}
	switch v, ok := o.Get(MemberVersion); {
	case !ok:
		return nil, fmt.Errorf("%q is absent", MemberVersion)
	case string(v) != strconv.Itoa(Version):
		return nil, fmt.Errorf("%q is %s, want %d", MemberVersion, quote(v), Version)
	}
	return o, nil
}

// text reads a member that must be a non-empty string.
func text[T ~string](o jsonobject.Object, name string) (T, error) {
	if raw, ok := o.Get(name); ok && len(raw) > 2 && plainString(raw) { // the quick way, with the same result
		return T(raw[1 : len(raw)-1]), nil
	}
	var t T
	if err := member(o, name, &t); err != nil {
		return "", err
	}
	if t == "" {
		return "", fmt.Errorf("%q is empty", name)
	}
	return t, nil
}

// plainString tells whether a JSON value is a string that stands for its own
// bytes.
func plainString(raw []byte) bool {
	if raw[0] != '"' {
		return false
	}
	for _, b := range raw[1 : len(raw)-1] {
		if b < ' ' || b > '~' || b == '\\' {
			return false
		}
	}
	return true
}

// member reads a member that must be there and not be null.
func member(o jsonobject.Object, name string, into any) error {
	raw, ok := o.Get(name)
	if !ok {
		return fmt.Errorf("%q is absent", name)
	}
	if string(raw) == "null" {
		return fmt.Errorf("%q is null", name)
	}
	if number, ok := into.(*int64); ok && len(raw) < 19 { // the quick way, with the same result
		if n, err := strconv.ParseInt(string(raw), 10, 64); err == nil {
			*number = n
			return nil
		}
	}
	if err := json.Unmarshal(raw, into); err != nil {
		var kind *json.UnmarshalTypeError
		if errors.As(err, &kind) {
			return fmt.Errorf("%q is a %s, want %s", name, kind.Value, kind.Type)
		}
		return fmt.Errorf("%q: %w", name, err)
	}
	return nil
}
