// Package catalog holds the management nouns, which are Apigee's: a developer
// app with its credentials and the products on them. It is plain data with the
// rules for it; where it is stored and how it is rendered is not its business.
package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"keygate/authz"
	"keygate/jsonobject"
)

// Names of the members of Apigee's JSON that have a meaning here.
const (
	MemberAppID       = "appId"
	MemberDeveloperID = "developerId"
	MemberName        = "name"
	MemberStatus      = "status"
	MemberCredentials = "credentials"
	MemberProducts    = "apiProducts" // of a credential
	MemberProduct     = "apiproduct"  // the name in an element of apiProducts
	MemberExpiresAt   = "expiresAt"
	MemberScopes      = "scopes"
	MemberKey         = "consumerKey"
	MemberSecret      = "consumerSecret"
	MemberCallbackURL = "callbackUrl"
	MemberIssuedAt    = "issuedAt"

	MemberCreatedAt      = "createdAt"
	MemberCreatedBy      = "createdBy"
	MemberLastModifiedAt = "lastModifiedAt"
	MemberLastModifiedBy = "lastModifiedBy"
)

// Names that the stored form of a record adds to Apigee's members. Nothing that
// is taken in may use them.
const (
	MemberVersion = "v"    // every record
	MemberHint    = "hint" // credential, as are those of secret.go
)

// App is a developer app with its credentials.
type App struct {
	ID        authz.AppID
	Developer authz.DeveloperID
	// Name is unique under the developer.
	Name   string
	Status authz.Status
	// Credentials in Apigee's order.
	Credentials []Credential
	// Details are the members of the app's JSON in their order, unknown ones
	// too. There is no status among them; credentials, if it is there, only
	// keeps its place.
	Details jsonobject.Object
}

// Credential is the record behind a consumer key. Its details hold neither the
// key nor the secret.
type Credential struct {
	Key authz.KeyID
	// PlainKey and PlainSecret as they were handed in; zero where they are not
	// known. They are never stored in the clear.
	PlainKey, PlainSecret Secret
	// Hint is the last four characters of a key that is not weak, else empty.
	Hint   string
	Status authz.Status
	// ExpiresAt in milliseconds since the Unix epoch; authz.NeverExpires for
	// never.
	ExpiresAt int64
	// Products in Apigee's order, names distinct.
	Products []ProductRef
	// Details are the members of the credential's JSON in their order, unknown
	// ones too. There is no status, key or secret among them; apiProducts, if
	// it is there, only keeps its place; expiresAt is a number.
	Details jsonobject.Object
}

// ProductRef is a product on a credential, with its status there.
type ProductRef struct {
	Name   authz.ProductName
	Status authz.Status
	// Details are the members of the reference's JSON in their order, the name
	// among them, but no status.
	Details jsonobject.Object
}

// MaxNameLength of an id or a name, in bytes.
const MaxNameLength = 255

// CheckName tells whether s can be an id or a name: 1 to MaxNameLength bytes of
// UTF-8 without control characters.
func CheckName(s string) error {
	switch {
	case s == "":
		return errors.New("is empty")
	case len(s) > MaxNameLength:
		return fmt.Errorf("has %d bytes, want at most %d", len(s), MaxNameLength)
	case !utf8.ValidString(s) || strings.ContainsRune(s, utf8.RuneError):
		return errors.New("is not valid Unicode")
	case strings.ContainsFunc(s, unicode.IsControl):
		return errors.New("holds a control character")
	}
	return nil
}

// statuses of an app, a credential and a product on a credential.
var statuses = []authz.Status{authz.StatusApproved, authz.StatusRevoked, authz.StatusPending}

// ParseStatus reads the status of an app, a credential or a product on a
// credential as Apigee's own verifier does, ignoring the case of ASCII letters
// and nothing else.
func ParseStatus(word string) (authz.Status, error) { return parseStatus(word, statuses...) }

func parseStatus(word string, known ...authz.Status) (authz.Status, error) {
	words := make([]string, 0, len(known))
	for _, s := range known {
		// Of equal length: no letter from beyond ASCII that folds to one of its
		// letters gets in.
		w := s.String()
		if len(word) == len(w) && strings.EqualFold(word, w) {
			return s, nil
		}
		words = append(words, w)
	}
	shown := fmt.Sprintf("%q", word)
	if len(word) > 12 { // no word anybody meant as a status
		shown = fmt.Sprintf("of %d bytes", len(word))
	}
	return authz.StatusNone, fmt.Errorf("status %s is none of %s", shown, strings.Join(words, ", "))
}

func checkStatus(s authz.Status) error {
	for _, known := range statuses {
		if s == known {
			return nil
		}
	}
	return fmt.Errorf("status %q is none of approved, revoked, pending", s.String())
}

// latestExpiry is the end of the year 9999. A check refuses a later one as a
// mistake, so it is not taken in.
const latestExpiry = 253402300799999

// CheckExpiry tells whether ms can be the expiry of a credential.
func CheckExpiry(ms int64) error {
	if ms < authz.NeverExpires || ms > latestExpiry {
		return fmt.Errorf("%d is no time: want milliseconds since 1970, or -1 for never", ms)
	}
	return nil
}

// CheckScope tells whether scope can stand in a list that is joined by blanks.
func CheckScope(scope string) error {
	if scope == "" || strings.ContainsFunc(scope, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
		return errors.New("a scope is empty or holds a blank")
	}
	return nil
}

// Bounds of the scopes of one noun.
const (
	MaxScopes      = 100
	MaxScope       = 255     // bytes of each
	MaxScopesBytes = 4 << 10 // of all together
)

// CheckScopes tells the first thing that is wrong with the scopes of a noun, as
// a [*FieldError] whose pointer begins at their list. What is imported may have
// more of them, and longer ones, up to MaxScopesBytes.
func CheckScopes(scopes []string) error {
	if len(scopes) > MaxScopes {
		return &FieldError{Message: fmt.Sprintf("has %d scopes, want at most %d", len(scopes), MaxScopes)}
	}
	for i, s := range scopes {
		err := CheckScope(s)
		if err == nil {
			err = CheckText(s, MaxScope)
		}
		if err != nil {
			return &FieldError{fmt.Sprintf("/%d", i), err.Error()}
		}
	}
	return checkScopesBytes(scopes)
}

func checkScopesBytes(scopes []string) error {
	n := 0
	for _, s := range scopes {
		n += len(s)
	}
	if n > MaxScopesBytes {
		return &FieldError{Message: fmt.Sprintf("has scopes of %d bytes together, want at most %d", n, MaxScopesBytes)}
	}
	return nil
}

// checkKeptScopes is what is asked of the scopes of something that is imported.
func checkKeptScopes(details jsonobject.Object) error {
	var scopes []string
	if raw, ok := details.Get(MemberScopes); !ok || json.Unmarshal(raw, &scopes) != nil {
		return nil // whoever reads them says what is wrong with it
	}
	if err := checkScopesBytes(scopes); err != nil {
		return fmt.Errorf("%q %w", MemberScopes, err)
	}
	return nil
}

// MinKeyLength of a consumer key that is not weak: its hash is stored unsalted,
// and a short key could be found from it.
const MinKeyLength = 16

// ParseKey checks a consumer key and returns its name and hint. The error does
// not hold the key. A weak key is an error unless allowWeak.
func ParseKey(key string, allowWeak bool) (id authz.KeyID, hint string, err error) {
	k, reason := authz.ParseConsumerKey(key)
	switch {
	case reason == authz.KeyMissing:
		return authz.KeyID{}, "", errors.New("the consumer key is empty")
	case len(key) > authz.MaxKeyLength:
		return authz.KeyID{}, "", fmt.Errorf("the consumer key has %d bytes, want at most %d", len(key), authz.MaxKeyLength)
	case miscopied(key):
		return authz.KeyID{}, "", errors.New("the consumer key looks like one that keygate made, but its checksum is wrong: was it copied whole?")
	case reason != authz.Allowed:
		return authz.KeyID{}, "", errors.New("the consumer key holds a character outside A-Z a-z 0-9 . _ ~ + / = -")
	case len(key) >= MinKeyLength:
		return k.ID(), strings.Clone(key[len(key)-4:]), nil
	case !allowWeak:
		return authz.KeyID{}, "", fmt.Errorf("the consumer key is weak: it has %d characters, want at least %d", len(key), MinKeyLength)
	}
	return k.ID(), "", nil
}

// miscopied tells whether key has the form of keygate's own keys and a checksum
// that is not its own.
func miscopied(key string) bool {
	own, ok := authz.KeyFormat.Checksum(key)
	return own && !ok
}

// Validate tells the first thing that is wrong with the app, its credentials
// included.
func (a App) Validate() error {
	if err := CheckName(string(a.ID)); err != nil {
		return fmt.Errorf("%q %w", MemberAppID, err)
	}
	if err := CheckName(string(a.Developer)); err != nil {
		return fmt.Errorf("%q %w", MemberDeveloperID, err)
	}
	if err := CheckName(a.Name); err != nil {
		return fmt.Errorf("%q %w", MemberName, err)
	}
	if err := checkStatus(a.Status); err != nil {
		return err
	}
	for _, m := range a.Details {
		if err := CheckAppMember(m.Name); err != nil {
			return err
		}
	}
	if err := checkKeptScopes(a.Details); err != nil {
		return err
	}
	seen := make(map[authz.KeyID]bool, len(a.Credentials))
	for _, c := range a.Credentials {
		if seen[c.Key] {
			return fmt.Errorf("credential %s: stands twice in the app", c.Key)
		}
		seen[c.Key] = true
		if err := c.Validate(); err != nil {
			return fmt.Errorf("credential %s: %w", c.Key, err)
		}
	}
	return nil
}

// Validate tells the first thing that is wrong with the credential.
func (c Credential) Validate() error {
	if c.Key == (authz.KeyID{}) {
		return errors.New("has no key")
	}
	if err := checkStatus(c.Status); err != nil {
		return err
	}
	if err := CheckExpiry(c.ExpiresAt); err != nil {
		return fmt.Errorf("%q: %w", MemberExpiresAt, err)
	}
	for _, m := range c.Details {
		if err := CheckCredentialMember(m.Name); err != nil {
			return err
		}
	}
	if err := checkKeptScopes(c.Details); err != nil {
		return err
	}
	seen := make(map[authz.ProductName]bool, len(c.Products))
	for _, p := range c.Products {
		if err := CheckName(string(p.Name)); err != nil {
			return fmt.Errorf("%q %w", MemberProduct, err)
		}
		if seen[p.Name] {
			return fmt.Errorf("product %q stands twice on the credential", p.Name)
		}
		seen[p.Name] = true
		if err := checkStatus(p.Status); err != nil {
			return fmt.Errorf("product %q: %w", p.Name, err)
		}
	}
	return nil
}

// CheckAppMember tells whether a member of that name can be kept in an app's
// details.
func CheckAppMember(name string) error { return checkMember(name, MemberVersion) }

// CheckCredentialMember tells whether a member of that name can be kept in a
// credential's details.
func CheckCredentialMember(name string) error {
	return checkMember(name, MemberVersion, MemberHint, MemberSealedKey, MemberSealedSecret, MemberAppID, MemberDeveloperID)
}

func checkMember(name string, reserved ...string) error {
	for _, r := range reserved {
		if name == r {
			return fmt.Errorf("member %q: the stored record uses this name itself", name)
		}
	}
	if name == MemberStatus {
		return fmt.Errorf("member %q belongs to a key of its own", name)
	}
	return CheckSecretMember(name)
}

// CheckSecretMember tells whether a member's name, in whatever case, announces
// a consumer key or secret, which are never kept.
func CheckSecretMember(name string) error {
	if strings.EqualFold(name, MemberKey) || strings.EqualFold(name, MemberSecret) {
		return fmt.Errorf("member %q would store a consumer key or secret", name)
	}
	return nil
}
