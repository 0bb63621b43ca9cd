package authz

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"unsafe"
)

// MaxKeyLength of a consumer key, in bytes: Apigee's limit.
const MaxKeyLength = 2048

// KeyID names a consumer key without revealing it: the SHA-256 of the key.
// Keys are high-entropy, so a fast hash is right.
type KeyID [sha256.Size]byte

// String returns the id in lower-case hex, as it stands in etcd paths.
func (id KeyID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText makes the hex form the id's JSON.
func (id KeyID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// ParseKeyID reads the form that String writes, and no other: one key has one
// path.
func ParseKeyID(s string) (id KeyID, err error) {
	if len(s) != 2*len(id) {
		return KeyID{}, fmt.Errorf("key id has %d characters, want %d", len(s), 2*len(id))
	}
	if strings.ToLower(s) != s {
		return KeyID{}, fmt.Errorf("key id has upper-case letters, want lower-case hex")
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return KeyID{}, fmt.Errorf("key id is not hex: %w", err)
	}
	return id, nil
}

// ConsumerKey is the string a client presents, in a valid form. However it is
// printed, logged or marshalled it shows its KeyID, never itself. It refers to
// the parsed string's bytes and copies nothing.
type ConsumerKey struct {
	// A pointer and a length rather than a string: fmt prints the contents of
	// a string in somebody's unexported field past every method of its type.
	p *byte
	n int
	_ [0]func() // not comparable: two equal keys may have different pointers
}

// ParseConsumerKey checks the form of a presented key: 1 to MaxKeyLength bytes
// of [A-Za-z0-9._~+/=-]. The reason is Allowed when the key can be used,
// KeyMissing for an empty or blank string, KeyMalformed for any other. Nothing
// is trimmed into a valid key. A string that is plainly meant to be one of
// keygate's own keys (see KeyFormat) and has a wrong checksum is malformed: no
// such key was ever generated, so nobody needs to look it up. It does not
// allocate.
func ParseConsumerKey(s string) (ConsumerKey, Reason) {
	if len(s) > MaxKeyLength {
		return ConsumerKey{}, KeyMalformed
	}
	blank := true
	for i := range len(s) {
		blank = blank && (s[i] == ' ' || s[i] == '\t')
		if !blank && !keyByte[s[i]] {
			return ConsumerKey{}, KeyMalformed
		}
	}
	if blank {
		return ConsumerKey{}, KeyMissing
	}
	if !keyByte[s[0]] { // leading blanks, then something
		return ConsumerKey{}, KeyMalformed
	}
	if own, ok := KeyFormat.Checksum(s); own && !ok {
		return ConsumerKey{}, KeyMalformed
	}
	return ConsumerKey{p: unsafe.StringData(s), n: len(s)}, Allowed
}

var keyByte = func() (ok [256]bool) {
	for _, b := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~+/=-") {
		ok[b] = true
	}
	return ok
}()

// ID returns the key's name. It does not allocate. The zero ConsumerKey has
// the zero KeyID.
func (k ConsumerKey) ID() KeyID {
	if k.n == 0 {
		return KeyID{}
	}
	return sha256.Sum256(unsafe.Slice(k.p, k.n))
}

// String returns "sha256:" and the KeyID.
func (k ConsumerKey) String() string { return "sha256:" + k.ID().String() }

// Format prints String whatever the verb.
func (k ConsumerKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, k.String()) }

// LogValue logs String.
func (k ConsumerKey) LogValue() slog.Value { return slog.StringValue(k.String()) }

// MarshalText marshals String.
func (k ConsumerKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }
