package access_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"keygate/access"
	"keygate/authz"
)

func TestNewToken(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		secret, id := access.NewToken()
		sum := sha256.Sum256([]byte(secret))
		if want := hex.EncodeToString(sum[:]); id != want || len(secret) != 43 || !strings.HasPrefix(secret, "kgm_") {
			t.Fatalf("got %d characters and id %s, want kgm_… and id %s", len(secret), id, want)
		}
		if got, err := access.ParseToken(secret); err != nil || got != id {
			t.Fatalf("parse: got %s, %v, want %s", got, err, id)
		}
		if seen[id] {
			t.Fatal("the same token twice")
		}
		seen[id] = true
	}
}

func TestParseToken(t *testing.T) {
	secret, _ := access.NewToken()
	last := "0"
	if strings.HasSuffix(secret, last) {
		last = "1"
	}
	for name, s := range map[string]string{
		"empty": "", "a word": "admin", "the prefix": "kgm_", "a consumer key": authz.GenerateKey(),
		"a consumer key with its prefix": "kgm_" + authz.GenerateKey()[3:], "another checksum": secret[:42] + last,
		"in capitals": strings.ToUpper(secret), "a blank behind": secret + " ", "a newline behind": secret + "\n", "a blank before": " " + secret,
		"twice": secret + secret, "half": secret[:20], "large": strings.Repeat("k", 1<<20), "NUL": secret[:42] + "\x00", "a JWT": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.",
	} {
		id, err := access.ParseToken(s)
		if err == nil || id != "" {
			t.Errorf("%s: got %s, %v, want an error", name, id, err)
			continue
		}
		if len(s) > 4 && strings.Contains(err.Error(), s) || strings.Contains(err.Error(), secret[4:20]) {
			t.Errorf("%s: the error quotes it: %v", name, err)
		}
	}
	// A management token is no consumer key of keygate's.
	if own, _ := authz.KeyFormat.Checksum(secret); own {
		t.Error("a management token has the form of a consumer key")
	}
}

func TestIn(t *testing.T) {
	tests := []struct {
		of, asked authz.Organization
		want      bool
	}{
		{"acme", "acme", true}, {"acme", "Acme", false}, {"acme", "acme2", false}, {"acme", "acm", false}, {"acme", "", false}, {"acme", "*", false},
		{"*", "acme", true}, {"*", "other", true}, {"*", "*", true}, {"*", "", false}, {"", "acme", false}, {"", "", false}, {"", "*", false},
	}
	for _, tt := range tests {
		if got := (access.Token{Organization: tt.of}).In(tt.asked); got != tt.want {
			t.Errorf("a token for %q in %q: got %v, want %v", tt.of, tt.asked, got, tt.want)
		}
	}
}

func TestExpired(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	for _, tt := range []struct {
		at   int64
		want bool
	}{
		{now.UnixMilli() + 1, false}, {now.UnixMilli(), true}, {now.UnixMilli() - 1, true}, {access.NeverExpires, false}, {0, true}, {-2, true},
	} {
		if got := (access.Token{ExpiresAt: tt.at}).Expired(now); got != tt.want {
			t.Errorf("expires at %d, now %d: got %v, want %v", tt.at, now.UnixMilli(), got, tt.want)
		}
	}
}

func good() access.Token {
	return access.Token{ID: "ab", Name: "CI <1>", Role: access.Operator, Organization: "acme", CreatedAt: 1, ExpiresAt: access.NeverExpires, CreatedBy: "ann"}
}

func TestValidate(t *testing.T) {
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		field  string
		change func(*access.Token)
	}{
		"no name":         {"name", func(t *access.Token) { t.Name = "" }},
		"a long name":     {"name", func(t *access.Token) { t.Name = strings.Repeat("n", 256) }},
		"a newline":       {"name", func(t *access.Token) { t.Name = "a\nb" }},
		"invalid UTF-8":   {"name", func(t *access.Token) { t.Name = "a\xff" }},
		"a blank":         {"name", func(t *access.Token) { t.Name = "a " }},
		"no role":         {"role", func(t *access.Token) { t.Role = access.NoRole }},
		"an unknown role": {"role", func(t *access.Token) { t.Role = 99 }},
		"no organization": {"organization", func(t *access.Token) { t.Organization = "" }},
		"a dot":           {"organization", func(t *access.Token) { t.Organization = ".x" }},
		"not text":        {"organization", func(t *access.Token) { t.Organization = "a\xff" }},
		"no expiry":       {"expiresAt", func(t *access.Token) { t.ExpiresAt = 0 }},
		"before 1970":     {"expiresAt", func(t *access.Token) { t.ExpiresAt = -2 }},
	} {
		token := good()
		tt.change(&token)
		var field *access.FieldError
		if err := token.Validate(); !errors.As(err, &field) || field.Field != tt.field || !strings.HasPrefix(err.Error(), tt.field+": ") {
			t.Errorf("%s: got %v, want an error of %s", name, err, tt.field)
		}
	}
}

// The stored form is a promise: tokens of an older keygate must go on working.
const stored = `{"v":1,"name":"CI \u003c1\u003e","role":"operator","organization":"acme","createdAt":1,"expiresAt":-1,"createdBy":"ann"}`

func TestStored(t *testing.T) {
	token := good()
	token.LastUsed = 7
	if got := token.Value(); got != stored {
		t.Errorf("got %s, want %s", got, stored)
	}
	if got, err := access.Parse("ab", []byte(stored)); err != nil || got != good() {
		t.Errorf("got %+v, %v, want %+v", got, err, good())
	}
	replace := func(old, new string) string {
		if !strings.Contains(stored, old) {
			t.Fatalf("%s is not in the stored form", old)
		}
		return strings.Replace(stored, old, new, 1)
	}
	for name, text := range map[string]string{
		"empty": "", "not JSON": "admin", "a list": "[" + stored + "]", "null": "null", "empty object": "{}", "half": stored[:50],
		"data behind it":         stored + "x",
		"version 2":              replace(`"v":1`, `"v":2`),
		"version as text":        replace(`"v":1`, `"v":"1"`),
		"no version":             replace(`"v":1,`, ``),
		"version null":           replace(`"v":1`, `"v":null`),
		"an unknown role":        replace(`operator`, `root`),
		"role none":              replace(`operator`, `none`),
		"role in capitals":       replace(`operator`, `Operator`),
		"role null":              replace(`"operator"`, `null`),
		"role a number":          replace(`"operator"`, `3`),
		"role twice":             replace(`"role":"operator"`, `"role":"operator","role":"admin"`),
		"role misspelt":          replace(`"role"`, `"Role"`),
		"no role":                replace(`"role":"operator",`, ``),
		"role twice, once so":    replace(`"role":"operator"`, `"role":"operator","Role":"admin"`),
		"an unknown member":      replace(`{`, `{"x":1,`),
		"organization empty":     replace(`"acme"`, `""`),
		"organization null":      replace(`"acme"`, `null`),
		"expiry null":            replace(`-1`, `null`),
		"expiry as text":         replace(`-1`, `"-1"`),
		"expiry 0":               replace(`-1`, `0`),
		"expiry a fraction":      replace(`-1`, `1.5`),
		"expiry missing":         replace(`"expiresAt":-1,`, ``),
		"expiry beyond 64 bits":  replace(`-1`, `99999999999999999999`),
		"name missing":           replace(`"name":"CI \u003c1\u003e",`, ``),
		"creation missing":       replace(`"createdAt":1,`, ``),
		"creation null":          replace(`"createdAt":1`, `"createdAt":null`),
		"who made it is null":    replace(`"ann"`, `null`),
		"who made it is missing": replace(`,"createdBy":"ann"`, ``),
	} {
		if got, err := access.Parse("ab", []byte(text)); err == nil || got != (access.Token{}) {
			t.Errorf("%s: got %+v, %v, want an error", name, got, err)
		}
	}
}

// FuzzParse holds that whatever is read has a role that can be given, is for
// some organization, and is what would be stored.
func FuzzParse(f *testing.F) {
	f.Add([]byte(stored))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		token, err := access.Parse("ab", value)
		if err != nil {
			if token != (access.Token{}) {
				t.Fatalf("an error and a token: %+v", token)
			}
			return
		}
		if err := token.Validate(); err != nil {
			t.Fatalf("%s: %v", value, err)
		}
		if again, err := access.Parse("ab", []byte(token.Value())); err != nil || again != token {
			t.Fatalf("%s: stored again it is %+v, %v", value, again, err)
		}
	})
}
