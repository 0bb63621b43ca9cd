// Package seal keeps what must be read again and must not lie open at rest:
// consumer keys and secrets. It seals them with AES-256-GCM under one of the
// keys of a [Keyring].
//
// A sealed value names the key that it was sealed under, so keys are rotated by
// putting a new one first: it seals from then on, and the others still open
// what they have sealed. A key may be taken out when nothing that it sealed is
// left.
package seal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

const (
	version = "v1"
	// keySize of AES-256, in bytes.
	keySize = 32
	// maxID of a key's id, in bytes.
	maxID = 64
	// maxKeys in a keyring. Whoever rotates daily has taken old ones out by then.
	maxKeys = 1000
)

// encoding of keys and of what is sealed. It is strict: one value has one form.
var encoding = base64.StdEncoding.Strict()

// Keyring seals under its current key and opens with any. It is immutable and
// safe for concurrent use. However it is printed it shows the ids of its keys,
// the current one first, and never a key.
//
// Nonces are random, so one key must not seal more than 2^32 values (NIST SP
// 800-38D, 8.3): rotate before.
type Keyring struct {
	keys []key // the current one first
}

type key struct {
	id   string
	aead cipher.AEAD
}

// ErrUnknownKey is wrapped by the error of Open for a value that was sealed
// under a key which is not in the keyring.
var ErrUnknownKey = errors.New("not in the keyring")

// Parse reads a keyring: a key a line, "<id>:<base64 of 32 random bytes>", the
// current one first. Blank lines, and lines that begin with #, are skipped. An
// error names the line, and quotes nothing of it.
func Parse(text []byte) (*Keyring, error) {
	k := &Keyring{}
	lines := map[string]int{}            // of the ids
	materials := map[[keySize]byte]int{} // of the keys
	for i, line := range strings.Split(string(text), "\n") {
		n := i + 1
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		id, encoded, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("line %d: no colon, want <id>:<base64 of %d bytes>", n, keySize)
		}
		if err := CheckID(id); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if first, twice := lines[id]; twice {
			return nil, fmt.Errorf("line %d: the id is that of line %d, want another", n, first)
		}
		material, err := encoding.DecodeString(strings.TrimSpace(encoded))
		if err != nil {
			return nil, fmt.Errorf("line %d: the key is not base64, want that of %d bytes", n, keySize)
		}
		if len(material) != keySize {
			return nil, fmt.Errorf("line %d: the key has %d bytes, want %d", n, len(material), keySize)
		}
		if first, twice := materials[[keySize]byte(material)]; twice {
			return nil, fmt.Errorf("line %d: the key is that of line %d, want another", n, first)
		}
		if len(k.keys) == maxKeys {
			return nil, fmt.Errorf("line %d: more than %d keys", n, maxKeys)
		}
		lines[id], materials[[keySize]byte(material)] = n, n
		block, err := aes.NewCipher(material)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		aead, err := cipher.NewGCMWithRandomNonce(block)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		k.keys = append(k.keys, key{id, aead})
	}
	if len(k.keys) == 0 {
		return nil, fmt.Errorf("no key, want a line <id>:<base64 of %d bytes>", keySize)
	}
	return k, nil
}

// CheckID tells whether id can name a key: 1 to 64 of [A-Za-z0-9._-]. The error
// does not quote it: it may be a key in the wrong place.
func CheckID(id string) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("the id has %d characters, want 1 to %d", len(id), maxID)
	}
	if strings.ContainsFunc(id, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '_' && r != '-'
	}) {
		return errors.New("the id has a character other than A-Z a-z 0-9 . _ -")
	}
	return nil
}

// Generate returns a new key as a line for Parse, without a newline. It panics
// if CheckID refuses the id. The line is secret.
func Generate(id string) string {
	if err := CheckID(id); err != nil {
		panic("seal: generate: " + err.Error())
	}
	var material [keySize]byte
	_, _ = rand.Read(material[:]) // never fails
	return id + ":" + encoding.EncodeToString(material[:])
}

// Seal returns plain sealed under the current key, as "v1:<id>:<base64>". It
// opens in the same context only, so a value cannot be put into another's
// place; the context is not secret, and not in the result.
func (k *Keyring) Seal(plain, context string) string {
	current := k.keys[0]
	sealed := current.aead.Seal(nil, nil, []byte(plain), additional(current.id, context))
	return version + ":" + current.id + ":" + encoding.EncodeToString(sealed)
}

// Open returns what Seal was given. The error says what is wrong, and quotes
// neither the value nor the context; it wraps ErrUnknownKey, and names the id,
// if the key is missing.
func (k *Keyring) Open(sealed, context string) (string, error) {
	id, encoded, ok := split(sealed)
	if !ok {
		return "", errors.New("open a sealed value: it has not the form " + version + ":<id>:<base64>")
	}
	for _, own := range k.keys {
		if own.id != id {
			continue
		}
		// The decoder passes over newlines.
		data, err := encoding.DecodeString(encoded)
		if err != nil || strings.ContainsAny(encoded, "\r\n") {
			return "", errors.New("open a sealed value: its last part is not base64")
		}
		plain, err := own.aead.Open(nil, nil, data, additional(id, context))
		if err != nil {
			return "", fmt.Errorf("open a value sealed under %q: it was changed, belongs elsewhere, or the keyring has another key of that id", id)
		}
		return string(plain), nil
	}
	return "", fmt.Errorf("open a value sealed under %q: %w, which has %v", id, ErrUnknownKey, k)
}

// additional data that is authenticated with a value. An id has no colon, so
// two pairs of id and context never give the same.
func additional(id, context string) []byte { return []byte(version + ":" + id + ":" + context) }

// IDOf returns the id of the key that a value is sealed under; ok is false if
// the value has not the form of a sealed one.
func IDOf(sealed string) (id string, ok bool) {
	id, _, ok = split(sealed)
	return id, ok
}

func split(sealed string) (id, encoded string, ok bool) {
	rest, ok := strings.CutPrefix(sealed, version+":")
	if !ok {
		return "", "", false
	}
	id, encoded, ok = strings.Cut(rest, ":")
	if !ok || CheckID(id) != nil {
		return "", "", false
	}
	return id, encoded, true
}

// Current is the id of the key that seals.
func (k *Keyring) Current() string { return k.keys[0].id }

// String returns the ids, the current one first: "sealing keys [b a]".
func (k *Keyring) String() string {
	if k == nil {
		return "sealing keys []"
	}
	var ids []string
	for _, own := range k.keys {
		ids = append(ids, own.id)
	}
	return fmt.Sprintf("sealing keys %v", ids)
}

// Format prints String whatever the verb.
func (k *Keyring) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, k.String()) }

// LogValue logs String.
func (k *Keyring) LogValue() slog.Value { return slog.StringValue(k.String()) }

// MarshalText marshals String.
func (k *Keyring) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// prepend puts a line before the first key of a keyring's text.
func prepend(text []byte, line string) []byte {
	var out bytes.Buffer
	put := false
	for l := range bytes.Lines(text) {
		if trimmed := bytes.TrimSpace(l); !put && len(trimmed) > 0 && trimmed[0] != '#' {
			out.WriteString(line + "\n")
			put = true
		}
		out.Write(l)
	}
	return out.Bytes()
}
