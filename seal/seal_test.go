package seal_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"keygate/seal"
)

// key is base64 of 32 times one byte.
func key(b byte) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32)) }

func parse(t testing.TB, lines ...string) *seal.Keyring {
	t.Helper()
	k, err := seal.Parse([]byte(strings.Join(lines, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestParse(t *testing.T) {
	good := "a:" + key(1)
	for name, tt := range map[string]struct{ text, current string }{
		"one":                    {good, "a"},
		"a newline":              {good + "\n", "a"},
		"comments, blank lines":  {"# the keys\n\n  # b:" + key(9) + "\n \t" + good + " \n\n", "a"},
		"Windows' newlines":      {"b:" + key(2) + "\r\n" + good + "\r\n", "b"},
		"the first is current":   {"b.2-x_Y:" + key(2) + "\n" + good, "b.2-x_Y"},
		"blanks behind a colon":  {"a: " + key(1), "a"},
		"an id as long as it is": {strings.Repeat("i", 64) + ":" + key(1), strings.Repeat("i", 64)},
	} {
		k, err := seal.Parse([]byte(tt.text))
		if err != nil || k.Current() != tt.current {
			t.Errorf("%s: got %v, %v, want current %s", name, k, err, tt.current)
		}
	}
	const secret = "PLANTEDplantedPLANTEDplanted"
	for name, tt := range map[string]struct{ text, want string }{
		"empty":                {"", "no key"},
		"only comments":        {"# a\n\n#" + good, "no key"},
		"no colon":             {good + "\n" + secret, "line 2: no colon"},
		"no id":                {":" + key(1), "line 1: the id has 0 characters"},
		"a long id":            {strings.Repeat("i", 65) + ":" + key(1), "line 1: the id has 65 characters"},
		"a blank in the id":    {"#\n" + secret + " x:" + key(1), "line 2: the id has a character"},
		"a slash in the id":    {secret + "/x:" + key(1), "line 1: the id has a character"},
		"the same id":          {good + "\n\na:" + key(2), "line 3: the id is that of line 1"},
		"the same key":         {good + "\nb:" + key(2) + "\nc:" + key(1), "line 3: the key is that of line 1"},
		"not base64":           {"a:" + secret + "!", "line 1: the key is not base64"},
		"no padding":           {"a:" + strings.TrimRight(key(1), "="), "line 1: the key is not base64"},
		"a bit behind its end": {"a:" + key(1)[:42] + "F=", "line 1: the key is not base64"},
		"hex":                  {"a:" + strings.Repeat("0f", 32), "line 1: the key has 48 bytes, want 32"},
		"AES-128":              {"a:" + base64.StdEncoding.EncodeToString(make([]byte, 16)), "line 1: the key has 16 bytes, want 32"},
		"nothing behind it":    {"a:", "line 1: the key has 0 bytes, want 32"},
		"the two exchanged":    {secret + "+" + key(1) + ":a", "line 1: the id has"},
		"binary":               {"\x00\xff\xfe" + secret, "line 1: no colon"},
	} {
		k, err := seal.Parse([]byte(tt.text))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, %v, want an error with %q", name, k, err, tt.want)
			continue
		}
		for _, leak := range []string{secret, key(1), key(2)} {
			if strings.Contains(err.Error(), leak) {
				t.Errorf("%s: the error quotes what may be a key: %v", name, err)
			}
		}
	}
	var many []string
	for i := range 1001 {
		many = append(many, seal.Generate(fmt.Sprint("k", i)))
	}
	if _, err := seal.Parse([]byte(strings.Join(many, "\n"))); err == nil || !strings.Contains(err.Error(), "line 1001") {
		t.Errorf("1001 keys: got %v, want an error of line 1001", err)
	}
}

func TestSealAndOpen(t *testing.T) {
	k := parse(t, "new:"+key(1), "old:"+key(2))
	for _, plain := range []string{"", "x", "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb", strings.Repeat("k", 2048), "\x00\xff:v1:"} {
		sealed := k.Seal(plain, "consumerKey 1")
		if again := k.Seal(plain, "consumerKey 1"); again == sealed {
			t.Errorf("%.40q: sealed twice it is the same: the nonce does not change", plain)
		}
		if id, ok := seal.IDOf(sealed); id != "new" || !ok {
			t.Errorf("id: got %q, %v, want new", id, ok)
		}
		if len(plain) > 1 && strings.Contains(sealed, plain) {
			t.Errorf("%.40q stands in what was sealed", plain)
		}
		if got, err := k.Open(sealed, "consumerKey 1"); err != nil || got != plain {
			t.Errorf("open: got %.40q, %v, want %.40q", got, err, plain)
		}
		if got, err := k.Open(sealed, "consumerKey 2"); err == nil {
			t.Errorf("in another context: got %.40q, want an error", got)
		}
	}
}

// What stands at rest is a promise: "v1:<id>:", then base64 of 12 bytes of nonce,
// the ciphertext and 16 bytes of tag, with "v1:<id>:<context>" authenticated.
func TestForm(t *testing.T) {
	block, err := aes.NewCipher(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := []byte("twelve bytes")
	made := "v1:k7:" + base64.StdEncoding.EncodeToString(gcm.Seal(nonce, nonce, []byte("secret"), []byte("v1:k7:here")))
	k := parse(t, "k7:"+key(7))
	if got, err := k.Open(made, "here"); err != nil || got != "secret" {
		t.Errorf("got %q, %v, want what another implementation sealed", got, err)
	}
}

func TestRotation(t *testing.T) {
	old := parse(t, "a:"+key(1))
	sealed := old.Seal("secret", "here")
	rotated := parse(t, "b:"+key(2), "a:"+key(1))
	if got, err := rotated.Open(sealed, "here"); err != nil || got != "secret" {
		t.Errorf("the old key: got %q, %v, want secret", got, err)
	}
	next := rotated.Seal("secret", "here")
	if id, _ := seal.IDOf(next); id != "b" {
		t.Errorf("sealed under %q, want b", id)
	}
	_, err := old.Open(next, "here")
	if !errors.Is(err, seal.ErrUnknownKey) || !strings.Contains(err.Error(), `"b"`) || !strings.Contains(err.Error(), "[a]") {
		t.Errorf("without the new key: got %v, want ErrUnknownKey that names b, and a", err)
	}
	// The same id for another key, and the same key under another id.
	if _, err := parse(t, "a:"+key(3)).Open(sealed, "here"); err == nil || errors.Is(err, seal.ErrUnknownKey) {
		t.Errorf("another key of that id: got %v, want that it cannot be opened", err)
	}
	renamed := "v1:c" + strings.TrimPrefix(sealed, "v1:a")
	if got, err := parse(t, "c:"+key(1)).Open(renamed, "here"); err == nil {
		t.Errorf("a value that was made another key's: got %q, want an error", got)
	}
}

// A value with any byte changed, cut off or put in does not open.
func TestTampering(t *testing.T) {
	const plain, context = "PLANTED-secret-9Au6XP82wJ1o", "consumerKey 1"
	k := parse(t, "current:"+key(1), "curreny:"+key(2))
	sealed := k.Seal(plain, context)
	refused := func(how, tampered string) {
		t.Helper()
		got, err := k.Open(tampered, context)
		if err == nil || got != "" {
			t.Errorf("%s: got %q, %v, want an error", how, got, err)
			return
		}
		for _, leak := range []string{plain, plain[:8], context, tampered} {
			if len(leak) > 4 && strings.Contains(err.Error(), leak) {
				t.Errorf("%s: the error quotes %q: %v", how, leak, err)
			}
		}
	}
	for i := range len(sealed) {
		for b := range 256 {
			if byte(b) != sealed[i] {
				refused(fmt.Sprintf("byte %d is %#x", i, b), sealed[:i]+string([]byte{byte(b)})+sealed[i+1:])
			}
		}
		refused(fmt.Sprintf("cut off at %d", i), sealed[:i])
		refused(fmt.Sprintf("without byte %d", i), sealed[:i]+sealed[i+1:])
		for _, more := range []string{"\n", "\r", " ", "=", "A", ":"} {
			refused(fmt.Sprintf("%q before byte %d", more, i), sealed[:i]+more+sealed[i:])
		}
	}
	for _, more := range []string{"\n", "\r", " ", "=", "A", ":", "\x00"} {
		refused(fmt.Sprintf("%q behind it", more), sealed+more)
	}
	refused("not sealed", plain)
	refused("another version", "v2"+sealed[2:])
}

func TestIDOf(t *testing.T) {
	for value, want := range map[string]string{
		"v1:a:": "a", "v1:a:b": "a", "v1:a-1.x_Y:QUJD": "a-1.x_Y",
		"": "", "v1": "", "v1:": "", "v1:a": "", "v1::b": "", "v2:a:b": "", "v1:a b:c": "", "a:b:c": "", "V1:a:b": "",
	} {
		if id, ok := seal.IDOf(value); id != want || ok != (want != "") {
			t.Errorf("%q: got %q, %v, want %q", value, id, ok, want)
		}
	}
}

func TestGenerate(t *testing.T) {
	a, b := seal.Generate("a"), seal.Generate("b")
	if k := parse(t, a, b); k.Current() != "a" {
		t.Errorf("got %v, want a first", k)
	}
	if a[2:] == b[2:] {
		t.Error("two keys are the same")
	}
	defer func() {
		if recover() == nil {
			t.Error("an id with a colon: got a line, want a panic")
		}
	}()
	seal.Generate("a:b")
}

// TestKeyringRevealsNothing prints a keyring every way we know.
func TestKeyringRevealsNothing(t *testing.T) {
	secret := []byte("PLANTED-KEY-9Au6XP82wJ1oxZuQU4L7")
	k := parse(t, "two:"+base64.StdEncoding.EncodeToString(secret), "one:"+key(1))
	type hidden struct{ k *seal.Keyring } // fmt cannot call methods on it
	type valued struct{ k seal.Keyring }
	type open struct{ K *seal.Keyring }
	var leaks []string
	for _, part := range [][]byte{secret, secret[:8], secret[16:]} {
		leaks = append(leaks, string(part), fmt.Sprintf("%x", part), fmt.Sprintf("%X", part), fmt.Sprint(part)[1:20],
			base64.StdEncoding.EncodeToString(part)[:8])
	}
	check := func(how, out string) {
		t.Helper()
		for _, leak := range leaks {
			if strings.Contains(out, leak) {
				t.Errorf("%s reveals a key: %s", how, out)
			}
		}
	}
	for name, v := range map[string]any{
		"pointer": k, "value": *k, "hidden": hidden{k}, "hidden value": valued{*k}, "open": open{k}, "slice": []any{k, *k, hidden{k}},
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%d", "%o", "%b", "%c", "%U", "%T", "%40v", "%!"} {
			check(name+" by "+verb, fmt.Sprintf(verb, v))
		}
		if out, err := json.Marshal(v); err == nil {
			check(name+" by json", string(out))
		}
		var b bytes.Buffer
		slog.New(slog.NewTextHandler(&b, nil)).Info("keys", "v", v, slog.Any("a", []any{v}))
		slog.New(slog.NewJSONHandler(&b, nil)).Info("keys", "v", v, slog.Any("a", []any{v}))
		check(name+" by slog", b.String())
	}
	const want = "sealing keys [two one]"
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		if got := fmt.Sprintf(verb, k); got != want {
			t.Errorf("%s: got %s, want %s", verb, got, want)
		}
	}
	if got := k.LogValue().String(); got != want {
		t.Errorf("LogValue: got %s, want %s", got, want)
	}
	if got, err := json.Marshal(open{k}); err != nil || string(got) != `{"K":"`+want+`"}` {
		t.Errorf("json: got %s, %v, want the ids", got, err)
	}
	if got := (*seal.Keyring)(nil).String(); got != "sealing keys []" {
		t.Errorf("none: got %s", got)
	}
}

// FuzzOpen holds that Open never panics, opens what was sealed, and nothing
// else in its place.
func FuzzOpen(f *testing.F) {
	k := parse(f, "b:"+key(2), "a:"+key(1))
	// "secret" in "here", by b. Made once: each process of a fuzzing run makes its
	// own seeds.
	const sealed = "v1:b:BIVIPDR+QlyFv5B/2pirxSnIUenjyt+GOCr6Y293goF5bA=="
	f.Add(sealed, "here", "secret", 7, byte(1))
	f.Add(strings.Replace(sealed, "v1:b", "v1:a", 1), "here", "", 0, byte(0))
	f.Add("v1:b:", "", "", 5, byte(0x80))
	f.Add("v1:b:AAAA", "", "v1:b:AAAA", 90, byte(32))
	f.Fuzz(func(t *testing.T, foreign, context, plain string, at int, flip byte) {
		if got, err := k.Open(foreign, context); err == nil && (foreign != sealed || context != "here" || got != "secret") {
			t.Fatalf("%q opens as %q in %q", foreign, got, context)
		}
		own := k.Seal(plain, context)
		if got, err := k.Open(own, context); err != nil || got != plain {
			t.Fatalf("got %q, %v, want %q", got, err, plain)
		}
		if _, err := k.Open(own, context+"x"); err == nil {
			t.Fatal("opens in another context")
		}
		if flip != 0 {
			b := []byte(own)
			b[uint(at)%uint(len(b))] ^= flip
			if got, err := k.Open(string(b), context); err == nil {
				t.Fatalf("byte %d changed by %#x: got %q, want an error", uint(at)%uint(len(b)), flip, got)
			}
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	k := parse(b, "a:"+key(1))
	sealed := k.Seal("giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb", "consumerKey")
	b.Run("seal", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			k.Seal("giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb", "consumerKey")
		}
	})
	b.Run("open", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := k.Open(sealed, "consumerKey"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
