package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// A string comes out of YAML as it was in JSON, whoever reads it.
func TestYAMLStrings(t *testing.T) {
	for s, want := range map[string]string{
		"Free for all": "Free for all", "/free/**": "/free/**", "ann@example.com": "ann@example.com", "https://a.example/x": "https://a.example/x",
		"😀": `"\U0001F600"`, "": `""`, "y": `"y"`, "No": `"No"`, "YES": `"YES"`, "on": `"on"`, "off": `"off"`, "true": `"true"`, "null": `"null"`, "~": `"~"`, "=": `"="`, "<<": `"<<"`,
		"1e3": `"1e3"`, "0x1": `"0x1"`, "12:30:00": `"12:30:00"`, "2026-01-02": `"2026-01-02"`, ".inf": `".inf"`, "-1": `"-1"`, "007": `"007"`,
		"a: b": `"a: b"`, "a #b": `"a #b"`, "a:": `"a:"`, " a": `" a"`, "a ": `"a "`, "a\nb": `"a\nb"`, "- a": `"- a"`, "*a": `"*a"`,
		"\u009b": `"\x9B"`, "a\u202eb": `"a\U0000202eb"`, "\U000e0001": `"\U000E0001"`,
	} {
		document, err := json.Marshal(map[string]any{"v": s})
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		if err := printDocument(&out, document, "yaml"); err != nil {
			t.Errorf("%q: %v", s, err)
			continue
		}
		if got := out.String(); got != "v: "+want+"\n" {
			t.Errorf("%q: got %q, want %q", s, got, "v: "+want+"\n")
		}
		var back map[string]string
		if err := yaml.Unmarshal([]byte(out.String()), &back); err != nil || back["v"] != s {
			t.Errorf("%q: got %q, %v when it is read", s, back["v"], err)
		}
	}
}

func TestYAMLDocument(t *testing.T) {
	const document = `{"z":"\ud83d\ude00","a":[1,2.5e+30,true,null,{},[],["x"]],"no":{"n":"t"}}`
	const want = "z: \"\\U0001F600\"\na:\n  - 1\n  - 2.5e+30\n  - true\n  - null\n  - {}\n  - []\n  - - x\n\"no\":\n  \"n\": t\n"
	var out strings.Builder
	if err := printDocument(&out, json.RawMessage(document), "yaml"); err != nil || out.String() != want {
		t.Errorf("got %q, %v, want %q", out.String(), err, want)
	}
	if err := printDocument(&out, json.RawMessage(`{"a":`), "yaml"); err == nil {
		t.Error("got no error of half a document")
	}
}

// What could turn a terminal's line, or command it, is written as an escape.
func TestUnprintable(t *testing.T) {
	const odd = "a\u202eb\u2028c\u2029d\u009be\u007ff\u200bg\U000e0001h😀"
	const escaped = `a\u202eb\u2028c\u2029d\u009be\x7ff\u200bg\U000e0001h😀`
	if got := printable(odd); got != escaped {
		t.Errorf("got %s, want %s", got, escaped)
	}
	raw, err := json.Marshal(map[string]any{"app": []any{map[string]string{"appId": odd, "name": odd}}, "records": []any{map[string]string{"id": odd, "reason": odd}}})
	if err != nil {
		t.Fatal(err)
	}
	server := fakeAPI(t, map[string]string{"": "200 " + string(raw)})
	for args, want := range map[string]string{
		"get apps -o name":   "app/" + escaped + "\n",
		"audit list -o name": "audit/" + escaped + "\n",
		"get apps":           "",
		"audit list -o json": "",
		"audit list -o yaml": "",
		"audit export":       "",
		"get app a -o json":  "",
	} {
		stdout, stderr, code := runWith([]string{"KEYGATE_TOKEN=canary"}, append(strings.Fields(args), "--server", server)...)
		if code != exitOK || want != "" && stdout != want {
			t.Errorf("%s: got status %d, %q, %q, want %q", args, code, stdout, stderr, want)
		}
		if strings.ContainsAny(stdout, "\u202e\u2028\u2029\u009b\u007f\u200b\U000e0001") {
			t.Errorf("%s: got %q, want escapes", args, stdout)
		}
	}
	var out strings.Builder
	if err := printJSON(&out, []string{odd}); err != nil {
		t.Fatal(err)
	}
	var back []string
	if err := json.Unmarshal([]byte(out.String()), &back); err != nil || !reflect.DeepEqual(back, []string{odd}) || strings.Contains(out.String(), "\u009b") {
		t.Errorf("got %q, %q, %v, want what was given, escaped", out.String(), back, err)
	}
}

// A token that no header can hold is a mistake in it, not a server that cannot
// be reached.
func TestTokenOfSeveralLines(t *testing.T) {
	server := fakeAPI(t, map[string]string{"": `200 {"name":"p"}`})
	file := filepath.Join(t.TempDir(), "token")
	for _, tt := range []struct {
		token string
		code  int
	}{
		{"canary", exitOK}, {"canary\n", exitOK}, {"canary\r\n", exitOK},
		{"canary\ncanary", exitUsage}, {"canary\n\n", exitUsage}, {"canary\r\ncanary", exitUsage},
		{"canary\x1b[2J", exitUsage}, {"canary\tcanary", exitUsage}, {"canary\x7f", exitUsage}, {"canary\u009b", exitUsage},
	} {
		if err := os.WriteFile(file, []byte(tt.token), 0o600); err != nil {
			t.Fatal(err)
		}
		for env, args := range map[string][]string{"KEYGATE_TOKEN=" + tt.token: nil, "KEYGATE_TOKEN=": {"--token-file", file}} {
			_, stderr, code := runWith([]string{env}, append([]string{"get", "product", "p", "--server", server}, args...)...)
			if code != tt.code || tt.code != exitOK && !strings.Contains(stderr, "line") || strings.Contains(stderr, "canary") {
				t.Errorf("%q %v: got status %d, %q, want %d", env, args, code, stderr, tt.code)
			}
		}
	}
}

// What is of all organizations is asked for by '*', in the audit and as a flag
// alone.
func TestAuditOfAllOrganizations(t *testing.T) {
	server := fakeAPI(t, map[string]string{
		"GET /v1/organizations/*/audit": `200 {"records":[{"id":"r","organization":"*"}]}`, "": "500 {}",
	})
	const usage = `organization "*" is the word for all of them`
	for _, tt := range []struct {
		args, env, stdout, stderr string
		code                      int
	}{
		{"audit list -o name --org *", "", "audit/r\n", "", exitOK},
		{"audit export --org *", "", `{"id":"r","organization":"*"}` + "\n", "", exitOK},
		{"audit list", "KEYGATE_ORG=*", "", "KEYGATE_ORG: " + usage, exitUsage},
		{"audit verify --org *", "", "", "--org: " + usage, exitUsage},
		{"get apps --org *", "", "", "--org: " + usage, exitUsage},
		{"token create --role viewer --org *", "", "", "--org: " + usage, exitUsage},
		{"audit list --org .x", "", "", "--org: organization \".x\" begins with a dot", exitUsage},
	} {
		args := strings.Fields(tt.args)
		if args[1] != "verify" {
			args = append(args, "--server", server)
		}
		stdout, stderr, code := runWith([]string{"KEYGATE_TOKEN=canary", tt.env}, args...)
		if code != tt.code || stdout != tt.stdout || !strings.Contains(stderr, tt.stderr) || tt.stderr == "" && stderr != "" {
			t.Errorf("%s %s: got status %d, %q, %q, want %s", tt.env, tt.args, code, stdout, stderr, fmt.Sprint(tt.code, " ", tt.stdout, tt.stderr))
		}
	}
}
