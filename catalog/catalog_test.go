package catalog_test

import (
	"strings"
	"testing"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

func TestParseStatus(t *testing.T) {
	for _, tt := range []struct {
		word string
		want authz.Status
	}{
		{"approved", authz.StatusApproved},
		{"Approved", authz.StatusApproved},
		{"APPROVED", authz.StatusApproved},
		{"revoked", authz.StatusRevoked},
		{"Pending", authz.StatusPending},
		{"", authz.StatusNone},
		{"approve", authz.StatusNone},
		{"approved ", authz.StatusNone},
		{"active", authz.StatusNone},
		{"revo\u212Aed", authz.StatusNone}, // the Kelvin sign folds to k
		{strings.Repeat("approved", 100), authz.StatusNone},
	} {
		got, err := catalog.ParseStatus(tt.word)
		if got != tt.want || (err == nil) != (tt.want != authz.StatusNone) {
			t.Errorf("ParseStatus(%q) = %v, %v, want %v", tt.word, got, err, tt.want)
		}
		if err != nil && len(tt.word) > 12 && strings.Contains(err.Error(), tt.word[:12]) {
			t.Errorf("ParseStatus quotes a long value: %v", err)
		}
	}
}

func TestParseKey(t *testing.T) {
	const key = "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb"
	id, hint, err := catalog.ParseKey(key, false)
	if want := "KLhb"; err != nil || hint != want {
		t.Errorf("ParseKey = hint %q, %v, want %q", hint, err, want)
	}
	if parsed, _ := authz.ParseConsumerKey(key); id != parsed.ID() {
		t.Errorf("ParseKey = id %v, want %v", id, parsed.ID())
	}
	for _, tt := range []struct {
		key       string
		allowWeak bool
		want      string // of the error; empty for none
	}{
		{"abcdefghijklmnop", false, ""},
		{"abcdefghijklmno", false, "the consumer key is weak: it has 15 characters, want at least 16"},
		{"abcdefghijklmno", true, ""},
		{"", true, "the consumer key is empty"},
		{"  ", true, "the consumer key is empty"},
		{"abcdefghijklmnop,", true, "the consumer key holds a character outside A-Z a-z 0-9 . _ ~ + / = -"},
		{" abcdefghijklmnop", true, "the consumer key holds a character outside A-Z a-z 0-9 . _ ~ + / = -"},
		{strings.Repeat("a", 2049), true, "the consumer key has 2049 bytes, want at most 2048"},
	} {
		_, hint, err := catalog.ParseKey(tt.key, tt.allowWeak)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("ParseKey(%q, %v) = %q, want %q", tt.key, tt.allowWeak, got, tt.want)
		}
		if len(tt.key) < catalog.MinKeyLength && hint != "" {
			t.Errorf("ParseKey(%q) has hint %q, want none for a weak key", tt.key, hint)
		}
	}
}

func TestValidate(t *testing.T) {
	key := authz.KeyID{1}
	valid := func() catalog.App {
		return catalog.App{
			ID: "a", Developer: "d", Name: "n", Status: authz.StatusApproved,
			Credentials: []catalog.Credential{{
				Key: key, Status: authz.StatusRevoked, ExpiresAt: authz.NeverExpires,
				Products: []catalog.ProductRef{{Name: "p", Status: authz.StatusPending}},
			}},
		}
	}
	for _, tt := range []struct {
		name   string
		damage func(*catalog.App)
		want   string
	}{
		{"valid", func(*catalog.App) {}, ""},
		{"no id", func(a *catalog.App) { a.ID = "" }, `"appId" is empty`},
		{"long developer", func(a *catalog.App) { a.Developer = authz.DeveloperID(strings.Repeat("d", 256)) }, `"developerId" has 256 bytes, want at most 255`},
		{"control character", func(a *catalog.App) { a.Name = "a\x00b" }, `"name" holds a control character`},
		{"not UTF-8", func(a *catalog.App) { a.Name = "a\xff" }, `"name" is not valid Unicode`},
		{"developer's status", func(a *catalog.App) { a.Status = authz.StatusActive }, `status "active" is none of approved, revoked, pending`},
		{"version", func(a *catalog.App) { a.Details = jsonobject.Object{}.With("v", 1) }, `member "v": the stored record uses this name itself`},
		{"status in details", func(a *catalog.App) { a.Details = jsonobject.Object{}.With("status", "x") }, `member "status" belongs to a key of its own`},
		{"no key", func(a *catalog.App) { a.Credentials[0].Key = authz.KeyID{} }, `has no key`},
		{"key twice", func(a *catalog.App) { a.Credentials = append(a.Credentials, a.Credentials[0]) }, `stands twice in the app`},
		{"no status", func(a *catalog.App) { a.Credentials[0].Status = authz.StatusNone }, `status "" is none of approved, revoked, pending`},
		{"expiry", func(a *catalog.App) { a.Credentials[0].ExpiresAt = -2 }, `"expiresAt": -2 is no time: want milliseconds since 1970, or -1 for never`},
		{"expiry in microseconds", func(a *catalog.App) { a.Credentials[0].ExpiresAt = 1415728893126000 }, `"expiresAt": 1415728893126000 is no time`},
		{"hint", func(a *catalog.App) { a.Credentials[0].Details = jsonobject.Object{}.With("hint", "x") }, `member "hint": the stored record uses this name itself`},
		{"secret", func(a *catalog.App) { a.Credentials[0].Details = jsonobject.Object{}.With("ConsumerSecret", "x") }, `member "ConsumerSecret" would store a consumer key or secret`},
		{"product without name", func(a *catalog.App) { a.Credentials[0].Products[0].Name = "" }, `"apiproduct" is empty`},
		{"product without status", func(a *catalog.App) { a.Credentials[0].Products[0].Status = authz.StatusNone }, `product "p": status "" is none of`},
		{"product twice", func(a *catalog.App) {
			a.Credentials[0].Products = append(a.Credentials[0].Products, a.Credentials[0].Products[0])
		}, `product "p" stands twice on the credential`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := valid()
			tt.damage(&a)
			err := a.Validate()
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got %v, want nil", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// The names that are kept free must be the ones that the store uses.
func TestReservedMembers(t *testing.T) {
	for _, name := range []string{keyspace.MemberVersion, keyspace.MemberApp, keyspace.MemberDeveloper, catalog.MemberHint} {
		if catalog.CheckCredentialMember(name) == nil {
			t.Errorf("a credential may have a member %q, want it reserved", name)
		}
	}
	if catalog.CheckAppMember(keyspace.MemberVersion) == nil {
		t.Errorf("an app may have a member %q, want it reserved", keyspace.MemberVersion)
	}
	for _, pair := range [][2]string{
		{catalog.MemberAppID, keyspace.MemberApp}, {catalog.MemberDeveloperID, keyspace.MemberDeveloper},
		{catalog.MemberExpiresAt, keyspace.MemberExpiresAt}, {catalog.MemberScopes, keyspace.MemberScopes},
		{catalog.MemberVersion, keyspace.MemberVersion},
	} {
		if pair[0] != pair[1] {
			t.Errorf("catalog says %q, keyspace %q, want one word", pair[0], pair[1])
		}
	}
}
