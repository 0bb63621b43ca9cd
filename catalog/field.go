package catalog

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"keygate/authz"
)

// FieldError is what is wrong with one member of a noun's JSON. It holds
// neither a consumer key nor a secret.
type FieldError struct {
	// Pointer is a JSON pointer (RFC 6901) to the member, "/attributes/2/name".
	// Empty means the whole.
	Pointer string
	// Message says what is wrong and what would be right.
	Message string
}

// Error returns the pointer and the message.
func (e *FieldError) Error() string {
	if e.Pointer == "" {
		return e.Message
	}
	return e.Pointer + ": " + e.Message
}

// CheckText tells whether s is one line of at most limit bytes: valid Unicode
// without control characters. It may be empty.
func CheckText(s string, limit int) error { return checkLimited(s, limit, false) }

// CheckLines is CheckText for a text of several lines: tab, CR and LF may stand
// in it.
func CheckLines(s string, limit int) error { return checkLimited(s, limit, true) }

func checkLimited(s string, limit int, lines bool) error {
	if len(s) > limit {
		return fmt.Errorf("has %d bytes, want at most %d", len(s), limit)
	}
	return checkText(s, lines)
}

func checkText(s string, lines bool) error {
	if !utf8.ValidString(s) {
		return errors.New("is not valid Unicode")
	}
	if strings.ContainsFunc(s, func(r rune) bool {
		return unicode.IsControl(r) && !(lines && (r == '\t' || r == '\r' || r == '\n'))
	}) {
		return errors.New("holds a control character")
	}
	return nil
}

// MaxCallbackURL of an app, in bytes.
const MaxCallbackURL = 2048

// CheckCallbackURL tells whether s can be an app's callback. It is stored and
// shown, never followed: any scheme may stand there.
func CheckCallbackURL(s string) error { return CheckText(s, MaxCallbackURL) }

// CheckAppName tells whether s can be the name of a new app: a letter or digit,
// then letters, digits, space and ._#-$%. An app that is imported keeps the name
// it has: CheckName.
func CheckAppName(s string) error {
	if err := checkNewName(s); err != nil {
		return err
	}
	if !alphanumeric(s[0]) {
		return errors.New("does not begin with a letter or digit of ASCII")
	}
	return nil
}

// CheckProductName tells whether s can be the name of a new product: letters,
// digits, space and ._#-$%.
func CheckProductName(s string) error {
	if err := checkNewName(s); err != nil {
		return err
	}
	if s == "." || s == ".." { // as a segment of a URL it would name another place
		return errors.New(`is "." or "..", want a name with a letter or digit`)
	}
	return nil
}

func checkNewName(s string) error {
	const marks = "._#-$%"
	if err := CheckName(s); err != nil {
		return err
	}
	for _, r := range s {
		if r >= utf8.RuneSelf || !alphanumeric(byte(r)) && r != ' ' && !strings.ContainsRune(marks, r) {
			return fmt.Errorf("holds %q, want only letters and digits of ASCII, space and %s", r, marks)
		}
	}
	if s[0] == ' ' || s[len(s)-1] == ' ' {
		return errors.New("begins or ends with a space")
	}
	return nil
}

func alphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// tokenPrefix that every management token begins with. One that is mistaken for
// a consumer key would travel with every request of the app.
const tokenPrefix = "kgm_"

// CheckOwnKey tells whether key can be a consumer key that its creator chose:
// a key that is not weak, of letters, digits, _ and -. The error does not hold
// the key.
func CheckOwnKey(key string) error {
	switch {
	case key == "create": // the last segment of the path that makes a key
		return errors.New(`is "create", which the API uses itself`)
	case key == "":
		return fmt.Errorf("is empty, want %d to %d characters", MinKeyLength, authz.MaxKeyLength)
	case strings.HasPrefix(key, tokenPrefix):
		return errors.New("looks like a management token, which is no consumer key")
	}
	if err := checkOwn(key); err != nil {
		return err
	}
	if len(key) < MinKeyLength {
		return fmt.Errorf("is weak: it has %d characters, want at least %d", len(key), MinKeyLength)
	}
	if _, _, err := ParseKey(key, false); err != nil {
		return err
	}
	return nil
}

// CheckOwnSecret tells whether secret can be a consumer secret that its creator
// chose: of letters, digits, _ and -. The error does not hold the secret.
func CheckOwnSecret(secret string) error {
	if secret == "" {
		return fmt.Errorf("is empty, want 1 to %d characters", authz.MaxKeyLength)
	}
	return checkOwn(secret)
}

func checkOwn(s string) error {
	if len(s) > authz.MaxKeyLength {
		return fmt.Errorf("has %d bytes, want at most %d", len(s), authz.MaxKeyLength)
	}
	for i := range len(s) {
		if c := s[i]; !alphanumeric(c) && c != '_' && c != '-' {
			return errors.New("holds a character outside A-Z a-z 0-9 _ -")
		}
	}
	return nil
}

// CheckKeyExpiresIn tells whether ms can be the time after which a new key
// expires, in milliseconds. 0 and -1 mean never.
func CheckKeyExpiresIn(ms int64) error { return checkExpiresIn(ms, latestExpiry, "milliseconds") }

// CheckExpiresInSeconds is CheckKeyExpiresIn for seconds.
func CheckExpiresInSeconds(s int64) error { return checkExpiresIn(s, latestExpiry/1000, "seconds") }

func checkExpiresIn(n, latest int64, unit string) error {
	if n < authz.NeverExpires || n > latest {
		return fmt.Errorf("is %d, want %s until the key expires, or -1 for never", n, unit)
	}
	return nil
}
