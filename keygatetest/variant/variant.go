// Package variant builds a command of this module with a few lines of its
// source changed, so that a test can run it with a guard taken out and see what
// the guard was for. Nothing in the product knows of it: the changed copies
// exist only in the build.
//
//	binary := variant.Build(t, "./cmd/keygate", false, variant.Mutation{
//		File: "server/server.go",
//		Old:  "DefaultDrain = 3 * time.Second",
//		New:  "DefaultDrain = 0",
//	})
package variant

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

// Mutation replaces one piece of source text by another.
type Mutation struct {
	// File that is changed: its path below the module's root, with slashes.
	File string
	// Old text, which must stand in the file exactly once; mutations before
	// this one have been made by then. A test that takes out a guard that has
	// been rewritten since would otherwise show nothing.
	Old string
	// New text in its place; it may be empty, but not the same.
	New string
}

// Build builds a command of this module and returns the path of the binary,
// which is removed when the test ends. Package pkg is relative to the module's
// root, such as "./cmd/keygate"; race builds it with the race detector. Without
// mutations it is the product as it stands.
//
// A mutation that does not fit, or does not compile, ends the test. Build may be
// called from any test at any time; Go's build cache makes the second of the
// same kind cheap.
func Build(t testing.TB, pkg string, race bool, mutations ...Mutation) (binary string) {
	t.Helper()
	binary, err := build(t.Context(), t.TempDir(), pkg, race, mutations)
	if err != nil {
		t.Fatalf("build a variant of %s: %v", pkg, err)
	}
	return binary
}

// Fits ends the test if a mutation does not fit the source. It builds nothing.
func Fits(t testing.TB, mutations ...Mutation) {
	t.Helper()
	root, err := moduleRoot(t.Context())
	if err == nil {
		_, err = writeOverlay(t.TempDir(), root, mutations)
	}
	if err != nil {
		t.Fatalf("change the source: %v", err)
	}
}

// build puts the binary, and the changed copies, into dir.
func build(ctx context.Context, dir, pkg string, race bool, mutations []Mutation) (string, error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, path.Base(pkg))
	// The repository's state is of no use in a binary that is not of it.
	args := []string{"build", "-buildvcs=false", "-o", binary}
	if race {
		args = append(args, "-race")
	}
	if len(mutations) > 0 {
		overlay, err := writeOverlay(dir, root, mutations)
		if err != nil {
			return "", err
		}
		args = append(args, "-overlay", overlay)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, pkg)...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return binary, nil
}

// moduleRoot is the folder of the go.mod above the working directory, which in
// a test is the package's own.
func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module's root: %w", err)
	}
	file := string(bytes.TrimSpace(out))
	if filepath.Base(file) != "go.mod" {
		return "", errors.New("find the module's root: no go.mod above the test's folder")
	}
	return filepath.Dir(file), nil
}

// writeOverlay writes the changed copies into dir, and the file that tells go
// build of them; it returns that file's path.
func writeOverlay(dir, root string, mutations []Mutation) (string, error) {
	changed := map[string]string{} // source by its full path
	for _, m := range mutations {
		if !filepath.IsLocal(m.File) {
			return "", fmt.Errorf("file %q: want a path below the module's root", m.File)
		}
		original := filepath.Join(root, filepath.FromSlash(m.File))
		source, ok := changed[original]
		if !ok {
			b, err := os.ReadFile(original)
			if err != nil {
				return "", fmt.Errorf("read the source to change: %w", err)
			}
			source = string(b)
		}
		switch n := strings.Count(source, m.Old); {
		case m.Old == "" || m.Old == m.New:
			return "", fmt.Errorf("%s: nothing to change", m.File)
		case n != 1:
			return "", fmt.Errorf("%s holds %q %d times, want once: the source has moved on, or the text is too short", m.File, m.Old, n)
		}
		changed[original] = strings.Replace(source, m.Old, m.New, 1)
	}
	replace := map[string]string{}
	for original, source := range changed {
		replaced := filepath.Join(dir, fmt.Sprintf("%d-%s", len(replace), filepath.Base(original)))
		if err := os.WriteFile(replaced, []byte(source), 0o600); err != nil {
			return "", fmt.Errorf("write the changed source: %w", err)
		}
		replace[original] = replaced
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", fmt.Errorf("write the overlay: %w", err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return "", fmt.Errorf("write the overlay: %w", err)
	}
	return file, nil
}
