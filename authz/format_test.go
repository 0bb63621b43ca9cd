package authz_test

import (
	"strings"
	"testing"

	"keygate/authz"
)

// Worked out with another CRC-32, zlib's, and by hand from there.
var formatted = []string{
	"kg_00000000000000000000000000000000_1MiDXV",
	"kg_0123456789ABCDEFGHIJKLMNOPQRSTUV_0eBwRj",
	"kg_giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb_2fPoKq",
	"kg_00000000000000000000000000000077_00eL5f", // a small sum: zeros in front
}

const alphanumeric = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

func TestChecksum(t *testing.T) {
	for _, key := range formatted {
		if own, ok := authz.KeyFormat.Checksum(key); !own || !ok {
			t.Errorf("%s: got own %v, ok %v, want true, true", key, own, ok)
		}
	}
	const mgmt = "kgm_giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb_099ksz"
	if own, ok := authz.Format("kgm_").Checksum(mgmt); !own || !ok {
		t.Errorf("another format: got own %v, ok %v, want true, true", own, ok)
	}
	good := formatted[2]
	for name, key := range map[string]string{
		"empty": "", "prefix only": "kg_", "prefix in capitals": "KG_" + good[3:], "another format's": mgmt,
		"one shorter": good[:len(good)-1], "one longer": good + "0", "a blank behind": good + " ", "no prefix": good[3:] + "kg_",
		"no underscore": good[:35] + "0" + good[36:], "a dash for the underscore": good[:35] + "-" + good[36:],
		"an underscore too early":  good[:34] + "__" + good[36:],
		"an underscore in the sum": good[:38] + "_" + good[39:],
		"a dash in it":             good[:10] + "-" + good[11:],
		"Apigee's":                 "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb",
		"Apigee's, as long":        "kgXP82wJ1oxZuQU4L75OdNKLhbgiIC9Au6XP82wJ1o",
		"of the same length":       strings.Repeat("k", len(good)),
	} {
		if own, ok := authz.KeyFormat.Checksum(key); own || ok {
			t.Errorf("%s: got own %v, ok %v, want false, false", name, own, ok)
		}
		if key == "" || strings.HasSuffix(key, " ") {
			continue
		}
		if _, reason := authz.ParseConsumerKey(key); reason != authz.Allowed {
			t.Errorf("%s: got %v, want a consumer key like any other", name, reason)
		}
	}
}

// A key with any one character exchanged, or two neighbours, is refused before
// any look-up, or is none of keygate's.
func TestChecksumFindsEveryTypingError(t *testing.T) {
	tried := 0
	refused := func(typed string) {
		t.Helper()
		if typed == formatted[2] {
			return
		}
		own, ok := authz.KeyFormat.Checksum(typed)
		if ok {
			t.Fatalf("%s: its checksum is right, want wrong", typed)
		}
		k, reason := authz.ParseConsumerKey(typed)
		if own && (reason != authz.KeyMalformed || k.ID() != authz.KeyID{}) {
			t.Fatalf("%s: got %v, want %v and no id", typed, reason, authz.KeyMalformed)
		}
		if own {
			tried++
		}
	}
	for i := range len(formatted[2]) {
		for _, c := range []byte(alphanumeric) {
			b := []byte(formatted[2])
			b[i] = c
			refused(string(b))
		}
		if i > 0 {
			b := []byte(formatted[2])
			b[i-1], b[i] = b[i], b[i-1]
			refused(string(b))
		}
	}
	if want := 38 * 61; tried < want {
		t.Errorf("only %d of the changed keys had the format, want at least %d", tried, want)
	}
}

func TestGenerateKey(t *testing.T) {
	const n = 2000
	seen := map[string]bool{}
	count := map[rune]int{}
	for range n {
		key := authz.GenerateKey()
		if own, ok := authz.KeyFormat.Checksum(key); !own || !ok || len(key) != 42 {
			t.Fatalf("%s: got own %v, ok %v, want a key of its own format", key, own, ok)
		}
		if k, reason := authz.ParseConsumerKey(key); reason != authz.Allowed || k.ID() == (authz.KeyID{}) {
			t.Fatalf("%s: got %v, want a usable key", key, reason)
		}
		secret := authz.NewSecret()
		if len(secret) != 32 || strings.Trim(secret, alphanumeric) != "" {
			t.Fatalf("secret %s: want 32 characters of base62", secret)
		}
		if seen[key] || seen[secret] {
			t.Fatalf("%s and %s: one of them was made twice", key, secret)
		}
		seen[key], seen[secret] = true, true
		for _, c := range key[3:35] + secret {
			count[c]++
		}
	}
	// 128,000 characters, 2,064 of each, with a standard deviation of 45: one
	// that is 8 away by chance is not seen. A byte taken modulo 62 would give
	// eight of them a quarter more.
	for _, c := range alphanumeric {
		if got := count[c]; got < 2064-8*45 || got > 2064+8*45 {
			t.Errorf("%c stands %d times, want about 2064", c, got)
		}
	}
}

func TestChecksumAllocatesNothing(t *testing.T) {
	wrong := formatted[2][:41] + "0"
	for _, s := range []string{formatted[2], wrong} {
		if n := testing.AllocsPerRun(100, func() {
			k, _ := authz.ParseConsumerKey(s)
			_ = k.ID()
		}); n != 0 {
			t.Errorf("%s: got %v allocations, want 0", s, n)
		}
	}
}

// FuzzChecksum holds that a string which has the format and the right checksum
// is in one of few shapes, and that every other stays a key like any other.
func FuzzChecksum(f *testing.F) {
	for _, key := range formatted {
		f.Add(key)
		f.Add(key[:41] + "!")
	}
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		own, ok := authz.KeyFormat.Checksum(s)
		if ok && !own || own && (len(s) != 42 || !strings.HasPrefix(s, "kg_") || strings.Trim(s, alphanumeric+"_") != "") {
			t.Fatalf("%q: got own %v, ok %v", s, own, ok)
		}
		if _, reason := authz.ParseConsumerKey(s); own && !ok && reason != authz.KeyMalformed || own && ok && reason != authz.Allowed {
			t.Fatalf("%q: own %v, ok %v, and read as %v", s, own, ok, reason)
		}
	})
}

func BenchmarkChecksum(b *testing.B) {
	for name, key := range map[string]string{
		"own": formatted[2], "wrong": formatted[2][:41] + "0", "imported": "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb",
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, reason := authz.ParseConsumerKey(key); reason == authz.KeyMissing {
					b.Fatal("no key")
				}
			}
		})
	}
}

func BenchmarkGenerateKey(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if authz.GenerateKey() == "" {
			b.Fatal("no key")
		}
	}
}
