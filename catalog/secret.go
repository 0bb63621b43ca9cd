package catalog

import (
	"fmt"
	"log/slog"
)

// Names of the members of a stored credential that hold the consumer key and
// the secret, sealed. Nothing that is taken in may use them.
const (
	MemberSealedKey    = "sealedKey"
	MemberSealedSecret = "sealedSecret"
)

// Secret carries a consumer key or a consumer secret to whoever seals it.
// However it is printed, logged or marshalled it shows nothing. The zero Secret
// is none.
type Secret struct {
	// A pointer rather than a string: fmt prints the contents of a string in
	// somebody's unexported field past every method of its type.
	text *string
}

// NewSecret keeps text; an empty one is no Secret.
func NewSecret(text string) Secret {
	if text == "" {
		return Secret{}
	}
	return Secret{&text}
}

// Reveal returns the text, empty if there is none.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

// String returns nothing.
func (s Secret) String() string { return "" }

// Format prints nothing, whatever the verb.
func (s Secret) Format(fmt.State, rune) {}

// LogValue logs nothing.
func (s Secret) LogValue() slog.Value { return slog.StringValue("") }

// MarshalText marshals nothing.
func (s Secret) MarshalText() ([]byte, error) { return []byte{}, nil }
