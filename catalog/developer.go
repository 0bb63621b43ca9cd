package catalog

import (
	"errors"
	"fmt"
	"strings"
	"unicode"

	"keygate/authz"
	"keygate/jsonobject"
)

// Names of the members of a developer's JSON that have a meaning here, besides
// MemberDeveloperID.
const (
	MemberEmail        = "email"
	MemberFirstName    = "firstName"
	MemberLastName     = "lastName"
	MemberUserName     = "userName"
	MemberOrganization = "organizationName"
)

// Developer is who registers apps.
type Developer struct {
	ID authz.DeveloperID
	// Email in lower case, unique in the organization. Empty for a developer of
	// whom only the id is known, as an import of an app alone brings it.
	Email string
	// Status is active or inactive.
	Status authz.Status
	// Details are the members of the developer's JSON in their order, unknown
	// ones too; id and e-mail are among them. There is no status.
	Details jsonobject.Object
}

// ParseEmail returns an e-mail address in the form in which it names a
// developer: lower case. It checks no more than that the address is plausible.
func ParseEmail(s string) (string, error) {
	email := strings.ToLower(s)
	if err := CheckName(email); err != nil {
		return "", err
	}
	local, domain, ok := strings.Cut(email, "@")
	if !ok || local == "" || domain == "" || strings.Contains(domain, "@") || strings.ContainsFunc(email, unicode.IsSpace) {
		return "", errors.New("is no e-mail address: want something like ann@example.com")
	}
	return email, nil
}

// ParseDeveloperStatus reads the status of a developer, ignoring the case of
// ASCII letters.
func ParseDeveloperStatus(word string) (authz.Status, error) {
	return parseStatus(word, authz.StatusActive, authz.StatusInactive)
}

// Validate tells the first thing that is wrong with the developer.
func (d Developer) Validate() error {
	if err := CheckName(string(d.ID)); err != nil {
		return fmt.Errorf("%q %w", MemberDeveloperID, err)
	}
	if d.Email != "" {
		switch email, err := ParseEmail(d.Email); {
		case err != nil:
			return fmt.Errorf("%q %w", MemberEmail, err)
		case email != d.Email:
			return fmt.Errorf("%q has upper-case letters, want %q", MemberEmail, email)
		}
	}
	if d.Status != authz.StatusActive && d.Status != authz.StatusInactive {
		return fmt.Errorf("status %q is none of active, inactive", d.Status.String())
	}
	for _, m := range d.Details {
		if err := CheckDeveloperMember(m.Name); err != nil {
			return err
		}
	}
	return nil
}

// CheckDeveloperMember tells whether a member of that name can be kept in a
// developer's details.
func CheckDeveloperMember(name string) error { return checkMember(name, MemberVersion) }
