package authz_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"keygate/authz"
)

func TestParseConsumerKey(t *testing.T) {
	const page = "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb"
	tests := []struct {
		name, key string
		want      authz.Reason
	}{
		{"Apigee's own", page, authz.Allowed},
		{"one byte", "k", authz.Allowed},
		{"every byte of the alphabet", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~+/=-", authz.Allowed},
		{"longest", strings.Repeat("k", 2048), authz.Allowed},
		{"shaped as a path", "../../audit", authz.Allowed}, // only its digest is looked up
		{"a slash", "/", authz.Allowed},

		{"empty", "", authz.KeyMissing},
		{"one blank", " ", authz.KeyMissing},
		{"blanks and tabs", " \t \t", authz.KeyMissing},

		{"one over the longest", strings.Repeat("k", 2049), authz.KeyMalformed},
		{"50 KB", strings.Repeat("k", 50_000), authz.KeyMalformed},
		{"2,049 blanks", strings.Repeat(" ", 2049), authz.KeyMalformed},
		{"blank after", page + " ", authz.KeyMalformed},
		{"blank before", " " + page, authz.KeyMalformed},
		{"tab before", "\t" + page, authz.KeyMalformed},
		{"blank within", "good evil", authz.KeyMalformed},
		{"newline after", page + "\n", authz.KeyMalformed},
		{"CR LF", page + "\r\nx: y", authz.KeyMalformed},
		{"only a newline", "\n", authz.KeyMalformed},
		{"NUL", page + "\x00", authz.KeyMalformed},
		{"two keys", "GOOD,EVIL", authz.KeyMalformed},
		{"two keys and a blank", "GOOD, EVIL", authz.KeyMalformed},
		{"what Envoy makes of a bad byte", "k!1", authz.KeyMalformed},
		{"0xff", "k\xff1", authz.KeyMalformed},
		{"UTF-8", "Ké1", authz.KeyMalformed},
		{"percent", page + "%20", authz.KeyMalformed},
		{"star", "*", authz.KeyMalformed},
		{"quote", `"` + page + `"`, authz.KeyMalformed},
		{"DEL", "k\x7f", authz.KeyMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, reason := authz.ParseConsumerKey(tt.key)
			if reason != tt.want {
				t.Fatalf("got %v, want %v", reason, tt.want)
			}
			if reason != authz.Allowed {
				if k.ID() != (authz.KeyID{}) {
					t.Errorf("a refused key has id %v, want none", k.ID())
				}
				return
			}
			if want := authz.KeyID(sha256.Sum256([]byte(tt.key))); k.ID() != want {
				t.Errorf("id: got %v, want %v, that of the whole key", k.ID(), want)
			}
		})
	}
}

func TestParseConsumerKeyRefusesEveryOtherByte(t *testing.T) {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~+/=-"
	for b := range 256 {
		s := "key" + string([]byte{byte(b)}) + "key"
		want := authz.KeyMalformed
		if strings.IndexByte(alphabet, byte(b)) >= 0 {
			want = authz.Allowed
		}
		if _, reason := authz.ParseConsumerKey(s); reason != want {
			t.Errorf("%q: got %v, want %v", s, reason, want)
		}
	}
}

func TestKeyID(t *testing.T) {
	// What printf %s giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb | sha256sum prints.
	const page = "e5dd58ddbabe4096300f9e19c688651ebadf0fc66605b69493d772c65fa8c1da"
	if got := keyID(t, "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb").String(); got != page {
		t.Errorf("id of the page's key: got %s, want %s", got, page)
	}
	k, _ := authz.ParseConsumerKey("abc")
	// The SHA-256 of "abc", FIPS 180-2 appendix B.1.
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	if got := k.ID().String(); got != abc {
		t.Errorf("id of abc: got %s, want %s", got, abc)
	}
	id, err := authz.ParseKeyID(abc)
	if err != nil || id != k.ID() {
		t.Errorf("parse: got %v, %v, want %v", id, err, k.ID())
	}
	if text, err := json.Marshal(id); err != nil || string(text) != `"`+abc+`"` {
		t.Errorf("JSON: got %s, %v, want %q", text, err, abc)
	}
	if id := keyID(t, "ABC"); id == k.ID() {
		t.Error("keys that differ in case have one id")
	}
	for _, s := range []string{
		"", "ba78", strings.ToUpper(abc), "B" + abc[1:], abc + "0", abc[:63], abc[:63] + "g", " " + abc[1:],
		abc[:62] + "\n0", "../" + abc[3:], abc[:63] + "\x00",
	} {
		if id, err := authz.ParseKeyID(s); err == nil || id != (authz.KeyID{}) {
			t.Errorf("parse %q: got %v, %v, want an error", s, id, err)
		}
	}
}

// TestConsumerKeyRevealsNothing prints a key every way we know.
func TestConsumerKeyRevealsNothing(t *testing.T) {
	secret := strings.Join([]string{"PLANTED", "KEY", "9Au6XP82wJ1o"}, "-")
	k, reason := authz.ParseConsumerKey(secret)
	if reason != authz.Allowed {
		t.Fatalf("got %v, want a usable key", reason)
	}
	type hidden struct{ key authz.ConsumerKey } // fmt cannot call methods on it
	type deep struct {
		in  hidden
		ptr *hidden
		any any
		arr []hidden
	}
	type open struct{ Key authz.ConsumerKey }
	values := map[string]any{
		"value": k, "pointer": &k, "hidden": hidden{k}, "hidden pointer": &hidden{k},
		"deep": deep{in: hidden{k}, ptr: &hidden{k}, any: hidden{k}, arr: []hidden{{k}}},
		"open": open{k}, "open pointer": &open{k},
		"map": map[string]authz.ConsumerKey{"k": k}, "map of hidden": map[string]hidden{"k": {k}},
		"slice": []authz.ConsumerKey{k}, "array": [1]authz.ConsumerKey{k}, "any": []any{k, &k},
		"error": fmt.Errorf("check of %v: %w", k, errors.New("no")), "joined": errors.Join(fmt.Errorf("%#v", k)),
	}
	// What a reader must not find: the key, a good part of it, its bytes in
	// hex or as numbers.
	leaks := []string{secret, secret[:8], secret[8:], fmt.Sprintf("%x", secret[:8]), fmt.Sprintf("%X", secret[:8]), fmt.Sprint([]byte(secret[:8]))[1:20]}
	check := func(how, out string) {
		t.Helper()
		for _, leak := range leaks {
			if strings.Contains(out, leak) {
				t.Errorf("%s reveals the key: %s", how, out)
			}
		}
	}
	for name, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%d", "%o", "%b", "%c", "%U", "%t", "%g", "%T", "%40v", "%!"} {
			check(name+" by "+verb, fmt.Sprintf(verb, v))
		}
		check(name+" by Sprint", fmt.Sprint(v))
		check(name+" by Sprintln", fmt.Sprintln(v))
		check(name+" by Append", string(fmt.Append(nil, v)))
		if out, err := json.Marshal(v); err == nil {
			check(name+" by json", string(out))
		}
		for _, opts := range []*slog.HandlerOptions{nil, {AddSource: true}} {
			var b bytes.Buffer
			slog.New(slog.NewTextHandler(&b, opts)).Info("check", "v", v, slog.Group("g", "v", v), slog.Any("a", []any{v}))
			slog.New(slog.NewJSONHandler(&b, opts)).Info("check", "v", v, slog.Group("g", "v", v), slog.Any("a", []any{v}))
			check(name+" by slog", b.String())
		}
	}
	want := "sha256:" + k.ID().String()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		if got := fmt.Sprintf(verb, k); got != want {
			t.Errorf("%s: got %s, want %s", verb, got, want)
		}
	}
	if got, err := json.Marshal(open{k}); err != nil || string(got) != `{"Key":"`+want+`"}` {
		t.Errorf("json: got %s, %v, want the digest", got, err)
	}
	if got := k.LogValue().String(); got != want {
		t.Errorf("LogValue: got %s, want %s", got, want)
	}
}

func TestParseConsumerKeyAllocatesNothing(t *testing.T) {
	for _, s := range []string{"giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb", "", "bad,key", strings.Repeat("k", 50_000)} {
		if n := testing.AllocsPerRun(100, func() {
			k, _ := authz.ParseConsumerKey(s)
			_ = k.ID()
		}); n != 0 {
			t.Errorf("a key of %d bytes: got %v allocations, want 0", len(s), n)
		}
	}
}

func BenchmarkConsumerKey(b *testing.B) {
	b.ReportAllocs()
	s := "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb"
	for b.Loop() {
		k, _ := authz.ParseConsumerKey(s)
		if k.ID() == (authz.KeyID{}) {
			b.Fatal("no id")
		}
	}
}
