package access

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"keygate/authz"
	"keygate/jsonobject"
)

// AllOrganizations is the organization of a token that is for every one.
const AllOrganizations authz.Organization = "*"

// NeverExpires is the ExpiresAt of a token that does not expire.
const NeverExpires = authz.NeverExpires

// format of the tokens. Consumer keys have another: neither is ever the other.
const format authz.Format = "kgm_"

// maxName of a token, in bytes.
const maxName = 255

// version is the "v" of a stored token.
const version = 1

// Token is what is known of a management token. The token itself, the secret,
// is shown once when it is made and kept nowhere.
type Token struct {
	// ID is the SHA-256 of the secret, in lower-case hex. The secret is random
	// enough that a fast hash without salt is right.
	ID string
	// Name for people. Several tokens may have the same.
	Name string
	Role Role
	// Organization that it is for; AllOrganizations is all.
	Organization authz.Organization
	// CreatedAt and ExpiresAt in milliseconds since the Unix epoch. It no longer
	// counts at ExpiresAt; NeverExpires is never, 0 is not valid.
	CreatedAt, ExpiresAt int64
	// CreatedBy names who made it.
	CreatedBy string
	// LastUsed in milliseconds since the Unix epoch, to the minute; 0 is never. It
	// is not a part of the stored token.
	LastUsed int64
}

// NewToken makes up a token. The caller shows the secret once.
func NewToken() (secret, id string) {
	secret = format.New()
	return secret, idOf(secret)
}

// errForm does not say what is wrong: who presents a token knows, or guesses.
var errForm = errors.New("not in the form of a management token: want kgm_… as keygate token create printed it, and all of it")

// ParseToken returns the id of what is presented as a token, if it has the form
// of one and the right checksum. Whether there is such a token is for the store
// to say. The error holds nothing of the secret.
func ParseToken(secret string) (id string, err error) {
	if _, ok := format.Checksum(secret); !ok {
		return "", errForm
	}
	return idOf(secret), nil
}

func idOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// In tells whether the token is for org. No token is for the empty name; only
// one for all organizations is for AllOrganizations.
func (t Token) In(org authz.Organization) bool {
	return org != "" && (t.Organization == org || t.Organization == AllOrganizations)
}

// Expired tells whether the token no longer counts at now.
func (t Token) Expired(now time.Time) bool {
	return t.ExpiresAt != NeverExpires && now.UnixMilli() >= t.ExpiresAt
}

// FieldError says which field of a Token is not valid.
type FieldError struct {
	Field string // as in JSON: name, role, organization, expiresAt
	Err   error
}

// Error begins with the field.
func (e *FieldError) Error() string { return e.Field + ": " + e.Err.Error() }

// Unwrap returns what is wrong, without the field.
func (e *FieldError) Unwrap() error { return e.Err }

// Validate tells the first thing that is wrong with a token that is to be made,
// by a *FieldError. It does not look at the clock, nor at ID and CreatedBy.
func (t Token) Validate() error {
	wrong := func(field, text string, args ...any) error {
		return &FieldError{field, fmt.Errorf(text, args...)}
	}
	switch {
	case t.Name == "" || len(t.Name) > maxName:
		return wrong("name", "it has %d bytes, want 1 to %d", len(t.Name), maxName)
	case !utf8.ValidString(t.Name) || strings.ContainsFunc(t.Name, unicode.IsControl) || strings.TrimSpace(t.Name) != t.Name:
		return wrong("name", "%.40q: want text without control characters, and no blank at either end", t.Name)
	case t.Role == NoRole || t.Role >= numRoles:
		return wrong("role", "there is none: want one of %s", strings.Join(roleWords[1:], ", "))
	case t.Organization == "":
		return wrong("organization", "there is none: want a name, or %q for all", string(AllOrganizations))
	case t.Organization[0] == '.' || !utf8.ValidString(string(t.Organization)):
		return wrong("organization", "%.40q can be no organization's name", string(t.Organization))
	case t.ExpiresAt <= 0 && t.ExpiresAt != NeverExpires:
		return wrong("expiresAt", "%d is no time: want milliseconds since 1970, or -1 for never", t.ExpiresAt)
	}
	return nil
}

// stored is the token's JSON in etcd. The id is in the path.
type stored struct {
	Version      int                `json:"v"`
	Name         string             `json:"name"`
	Role         Role               `json:"role"`
	Organization authz.Organization `json:"organization"`
	CreatedAt    int64              `json:"createdAt"`
	ExpiresAt    int64              `json:"expiresAt"`
	CreatedBy    string             `json:"createdBy"`
}

// Value is the token as it is stored.
func (t Token) Value() string {
	b, err := json.Marshal(stored{version, t.Name, t.Role, t.Organization, t.CreatedAt, t.ExpiresAt, t.CreatedBy})
	if err != nil {
		panic("access: " + err.Error()) // of strings and numbers
	}
	return string(b)
}

// Parse reads a stored token. It takes what Value writes and nothing else: a
// member that is missing, unknown, misspelt or there twice makes it unreadable.
// A token that cannot be read opens nothing.
func Parse(id string, value []byte) (Token, error) {
	var s stored
	fields := map[string]any{
		"v": &s.Version, "name": &s.Name, "role": &s.Role, "organization": &s.Organization,
		"createdAt": &s.CreatedAt, "expiresAt": &s.ExpiresAt, "createdBy": &s.CreatedBy,
	}
	object, err := jsonobject.Parse(value)
	if err != nil {
		return Token{}, fmt.Errorf("stored token: %w", err)
	}
	for _, m := range object {
		field, known := fields[m.Name]
		if !known {
			return Token{}, fmt.Errorf("stored token: unknown member %.40q", m.Name)
		}
		delete(fields, m.Name)
		if string(m.Value) == "null" {
			return Token{}, fmt.Errorf("stored token: %q is null", m.Name)
		}
		if err := json.Unmarshal(m.Value, field); err != nil {
			return Token{}, fmt.Errorf("stored token: %q: %w", m.Name, err)
		}
	}
	for name := range fields {
		return Token{}, fmt.Errorf("stored token: no %q", name)
	}
	if s.Version != version {
		return Token{}, fmt.Errorf("stored token: \"v\" is %d, want %d", s.Version, version)
	}
	t := Token{
		ID: id, Name: s.Name, Role: s.Role, Organization: s.Organization,
		CreatedAt: s.CreatedAt, ExpiresAt: s.ExpiresAt, CreatedBy: s.CreatedBy,
	}
	if err := t.Validate(); err != nil {
		return Token{}, fmt.Errorf("stored token: %w", err)
	}
	return t, nil
}
