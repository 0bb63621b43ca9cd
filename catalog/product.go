package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"keygate/authz"
	"keygate/jsonobject"
)

// Names of the members of a product's JSON that have a meaning here, besides
// MemberName and MemberScopes.
const (
	MemberDisplayName    = "displayName"
	MemberDescription    = "description"
	MemberApprovalType   = "approvalType"
	MemberResources      = "apiResources"
	MemberProxies        = "proxies"
	MemberEnvironments   = "environments"
	MemberOperationGroup = "operationGroup"
)

// The two approval types of a product.
const (
	ApprovalAuto   = "auto"
	ApprovalManual = "manual"
)

// Product is an API product: what a credential is approved for. It has no
// status.
type Product struct {
	// Name is unique in the organization and never changes.
	Name authz.ProductName
	// Details are the members of the product's JSON in their order, unknown ones
	// too; the name is among them.
	Details jsonobject.Object
}

// Manual tells whether the product is pending on a key until somebody approves
// it. No approval type at all, or an empty one, means auto; anything else that
// is not auto waits for approval.
func (p Product) Manual() bool {
	raw, ok := p.Details.Get(MemberApprovalType)
	if !ok || string(raw) == "null" {
		return false
	}
	var word string
	if json.Unmarshal(raw, &word) != nil {
		return true
	}
	return word != "" && word != ApprovalAuto
}

// Validate tells the first thing that is wrong with the product.
func (p Product) Validate() error {
	if err := CheckName(string(p.Name)); err != nil {
		return fmt.Errorf("%q %w", MemberName, err)
	}
	for _, m := range p.Details {
		if err := CheckProductMember(m.Name); err != nil {
			return err
		}
	}
	return checkKeptScopes(p.Details)
}

// CheckProductMember tells whether a member of that name can be kept in a
// product's details.
func CheckProductMember(name string) error { return checkMember(name, MemberVersion) }

// CheckApproval tells whether word is an approval type. Empty means auto.
func CheckApproval(word string) error {
	switch word {
	case "", ApprovalAuto, ApprovalManual:
		return nil
	}
	return errors.New("is none of auto, manual")
}

// MaxResource of a resource pattern, in bytes.
const MaxResource = 2048

// CheckResource tells whether pattern can be a resource of a product. A pattern
// is matched segment by segment on the path behind the base path: a segment of
// "*" is any one segment, "**" as the last segment is whatever follows, and "/"
// alone is every path. A segment holds no other wildcard. The error says what
// would be right.
func CheckResource(pattern string) error {
	switch {
	case pattern == "":
		return errors.New(`is empty, want a path such as "/", "/**" or "/forecast/*"`)
	case len(pattern) > MaxResource:
		return fmt.Errorf("has %d bytes, want at most %d", len(pattern), MaxResource)
	}
	if err := checkText(pattern, false); err != nil {
		return err
	}
	if pattern[0] != '/' {
		return fmt.Errorf(`does not begin with "/", want %q`, "/"+pattern)
	}
	if i := strings.IndexAny(pattern, "?#"); i >= 0 {
		return fmt.Errorf("holds %q, want the path alone: %q", pattern[i], pattern[:i])
	}
	segments := strings.Split(pattern[1:], "/")
	for i, s := range segments {
		right := strings.Join(segments[:i], "/")
		if right != "" {
			right = "/" + right
		}
		switch {
		case s == "**" && i < len(segments)-1:
			return fmt.Errorf(`has "**" before its last segment, want %q or %q`, right+"/**", right+"/*/"+strings.Join(segments[i+1:], "/"))
		case s != "*" && s != "**" && strings.Contains(s, "*"):
			return fmt.Errorf("has a wildcard that is not a whole segment, want %q", "/"+strings.Join(whole(segments), "/"))
		}
	}
	return nil
}

// whole returns the segments with each that has a wildcard in it made one.
func whole(segments []string) []string {
	w := make([]string, 0, len(segments))
	for i, s := range segments {
		switch {
		case s == "**" && i == len(segments)-1:
		case strings.Contains(s, "*"):
			s = "*"
		}
		w = append(w, s)
	}
	return w
}
