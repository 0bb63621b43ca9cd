package variant

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

const (
	pkg  = "./cmd/keygate"
	file = "cmd/keygate/version.go"
	// Stands in file exactly once.
	declaration = "\nvar version string\n"
)

func TestBuild(t *testing.T) {
	before, err := os.ReadFile("../../" + file)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name      string
		mutations []Mutation
		want      string // in what keygate version prints
	}{
		{"none", nil, "keygate"},
		{"one", []Mutation{{file, declaration, "\nvar version = \"variant-one\"\n"}}, "variant-one"},
		{"one after the other in a file, and another file", []Mutation{
			{file, declaration, "\nvar version = variantName\n"},
			{file, "\nvar version = variantName\n", "\nvar version = variantName + \"-two\"\n"},
			{"cmd/keygate/main.go", "\nfunc main() {\n", "\nconst variantName = \"variant\"\n\nfunc main() {\n"},
		}, "variant-two"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			binary := Build(t, pkg, false, tt.mutations...)
			out, err := exec.CommandContext(t.Context(), binary, "version").CombinedOutput()
			if err != nil {
				t.Fatalf("run the variant: %v\n%s", err, out)
			}
			if !strings.Contains(string(out), tt.want) {
				t.Errorf("keygate version printed %q, want %q in it", out, tt.want)
			}
		})
	}
	after, err := os.ReadFile("../../" + file)
	if err != nil {
		t.Fatal(err)
	}
	if string(after) != string(before) {
		t.Error("the source itself was changed")
	}
}

func TestBuildRefuses(t *testing.T) {
	tests := []struct {
		name     string
		mutation Mutation
		want     string
	}{
		{"text that is not there", Mutation{file, "nothing of the kind", "x"}, "0 times"},
		{"text that is there more than once", Mutation{file, "version", "x"}, "times, want once"},
		{"empty text", Mutation{file, "", "x"}, "nothing to change"},
		{"the same text", Mutation{file, declaration, declaration}, "nothing to change"},
		{"no such file", Mutation{"cmd/keygate/none.go", "a", "b"}, "no such file"},
		{"a file outside the module", Mutation{"../version.go", "a", "b"}, "below the module's root"},
		{"what does not compile", Mutation{file, declaration, "\nvar version int\n"}, "go build"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := build(t.Context(), t.TempDir(), pkg, false, []Mutation{tt.mutation})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q in it", err, tt.want)
			}
		})
	}
}
