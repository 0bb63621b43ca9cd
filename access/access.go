// Package access says who may do what in the management: the roles, their
// rights, and the tokens that carry a role. It talks to nobody.
package access

import (
	"fmt"
	"slices"
	"strings"
)

// Right to one kind of thing. A request needs exactly one.
type Right uint8

// The zero Right is none, and nobody has it: a route that forgot to say what it
// needs is closed.
const (
	None   Right = iota
	Read         // see developers, apps, products and credentials, without keys and secrets
	Status       // approve and revoke, on every level
	Write        // create, change and delete; import
	Reveal       // see consumer keys and secrets that are kept sealed
	Tokens       // list, create and revoke management tokens
	Audit        // read the audit trail
	numRights
)

var rightWords = [numRights]string{"none", "read", "status", "write", "reveal", "tokens", "audit"}

// String returns the right's word.
func (r Right) String() string {
	if r >= numRights {
		return rightWords[None]
	}
	return rightWords[r]
}

// Role is a set of rights with a name.
type Role uint8

// The zero Role is no role and has no right.
const (
	NoRole Role = iota
	Viewer
	Operator
	Admin
	Auditor
	numRoles
)

var roleWords = [numRoles]string{"none", "viewer", "operator", "admin", "auditor"}

// rights is all that anybody may. What does not stand here is refused.
var rights = [numRoles]map[Right]bool{
	Viewer:   {Read: true},
	Operator: {Read: true, Status: true},
	Admin:    {Read: true, Status: true, Write: true, Reveal: true, Tokens: true, Audit: true},
	Auditor:  {Read: true, Audit: true},
}

// Can tells whether the role has the right.
func (r Role) Can(right Right) bool { return r < numRoles && rights[r][right] }

// Roles are all roles that can be given.
func Roles() []Role { return []Role{Viewer, Operator, Admin, Auditor} }

// String returns the role's word.
func (r Role) String() string {
	if r >= numRoles {
		return roleWords[NoRole]
	}
	return roleWords[r]
}

// MarshalText makes the word the role's JSON.
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads a role as ParseRole does.
func (r *Role) UnmarshalText(text []byte) (err error) {
	*r, err = ParseRole(string(text))
	return err
}

// ParseRole reads the word of a role that can be given, exactly.
func ParseRole(word string) (Role, error) {
	if i := slices.Index(roleWords[1:], word); i >= 0 {
		return Role(i + 1), nil
	}
	return NoRole, fmt.Errorf("%.40q is no role: want one of %s", word, strings.Join(roleWords[1:], ", "))
}
