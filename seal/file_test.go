package seal_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"keygate/seal"
)

func write(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// names in the folder of a file: nothing else may be left there.
func names(t *testing.T, path string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestReadFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	for _, mode := range []fs.FileMode{0o600, 0o400} {
		write(t, path, "a:"+key(1)+"\n", mode)
		if k, err := seal.ReadFile(path); err != nil || k.Current() != "a" {
			t.Errorf("mode %#o: got %v, %v, want a", mode, k, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, mode := range []fs.FileMode{0o640, 0o604, 0o620, 0o610, 0o644, 0o666} {
		write(t, path, "a:"+key(1)+"\n", mode)
		if _, err := seal.ReadFile(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("mode %#o: got %v, want that it is refused", mode, err)
		}
	}
	write(t, path, "a:"+key(1)+"\nb:"+key(2)[:20], 0o600)
	_, err := seal.ReadFile(path)
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "line 2") || strings.Contains(err.Error(), key(2)[:20]) {
		t.Errorf("half a key: got %v, want the file and the line and nothing of the key", err)
	}
	write(t, path, strings.Repeat("#", 1<<20), 0o600)
	if _, err := seal.ReadFile(path); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("1 MiB: got %v, want that it is too large", err)
	}
	if _, err := seal.ReadFile(path + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: got %v, want fs.ErrNotExist", err)
	}
}

func TestCreateFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	made, err := seal.CreateFile(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Fatalf("got %v, %v, want mode 0600", info.Mode(), err)
	}
	read, err := seal.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := read.Open(made.Seal("secret", "here"), "here"); err != nil || got != "secret" {
		t.Errorf("what was made and what was read differ: got %q, %v", got, err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := seal.CreateFile(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("again: got %v, want fs.ErrExist", err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("the file that was there has changed: %v", err)
	}
	if got := names(t, path); len(got) != 1 {
		t.Errorf("left behind: %v", got)
	}
	if _, err := seal.CreateFile(filepath.Join(path, "no", "folder")); err == nil {
		t.Error("no such folder: got nil, want an error")
	}
}

// Of many that create the same file one succeeds, and all who were refused can
// read what it made.
func TestCreateFileAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	var wg sync.WaitGroup
	var mu sync.Mutex
	made := 0
	for range 16 {
		wg.Go(func() {
			_, err := seal.CreateFile(path)
			if err != nil && !errors.Is(err, fs.ErrExist) {
				t.Errorf("create: %v", err)
			}
			if _, err := seal.ReadFile(path); err != nil {
				t.Errorf("read: %v", err)
			}
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				made++
			}
		})
	}
	wg.Wait()
	if made != 1 {
		t.Errorf("%d created it, want 1", made)
	}
}

func TestAddKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	write(t, path, "# mine\n\na:"+key(1)+"\n# the oldest\nb:"+key(2), 0o600)
	old, err := seal.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sealed := old.Seal("secret", "here")
	link := path + "-link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	added, err := seal.AddKey(link)
	if err != nil {
		t.Fatal(err)
	}
	read, err := seal.ReadFile(path)
	if err != nil || read.String() != added.String() {
		t.Fatalf("got %v, %v in the file, want %v", read, err, added)
	}
	if added.Current() == "a" || !strings.HasSuffix(added.String(), " a b]") {
		t.Errorf("got %v, want a new key before a and b", added)
	}
	if got, err := read.Open(sealed, "here"); err != nil || got != "secret" {
		t.Errorf("what the old key sealed: got %q, %v", got, err)
	}
	if got, err := read.Open(added.Seal("secret", "here"), "here"); err != nil || got != "secret" {
		t.Errorf("what the new key sealed: got %q, %v", got, err)
	}
	text, err := os.ReadFile(path)
	if err != nil || !strings.HasPrefix(string(text), "# mine\n\n"+added.Current()+":") || !strings.HasSuffix(string(text), "\n# the oldest\nb:"+key(2)) {
		t.Errorf("got %v and a file whose comments have not stayed where they were", err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link was replaced: %v, %v", info, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("got %v, %v, want mode 0600", info, err)
	}
	if got := names(t, path); len(got) != 2 {
		t.Errorf("left behind: %v", got)
	}
}

func TestAddKeyRefusals(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	if _, err := seal.AddKey(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: got %v, want fs.ErrNotExist", err)
	}
	for name, tt := range map[string]struct {
		text string
		mode fs.FileMode
		want string
	}{
		"open to others": {"a:" + key(1), 0o644, "chmod 600"},
		"no key":         {"# none", 0o600, "no key"},
	} {
		write(t, path, tt.text, tt.mode)
		if _, err := seal.AddKey(path); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", name, err, tt.want)
		}
		if text, err := os.ReadFile(path); err != nil || string(text) != tt.text {
			t.Errorf("%s: the file has changed: %v", name, err)
		}
		if got := names(t, path); len(got) != 1 {
			t.Errorf("%s: left behind: %v", name, got)
		}
	}
	write(t, path, "a:"+key(1), 0o600)
	write(t, path+".new", "", 0o600)
	if _, err := seal.AddKey(path); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), path+".new") {
		t.Errorf("while another adds one: got %v, want fs.ErrExist and the name of its file", err)
	}
	if got := names(t, path); len(got) != 2 {
		t.Errorf("the other's file is gone: %v", got)
	}
}

// Many at once: whoever is told that a key was added finds it in the file.
func TestAddKeyAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	if _, err := seal.CreateFile(path); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var added []string
	for range 8 {
		wg.Go(func() {
			for range 5 {
				k, err := seal.AddKey(path)
				if err != nil && !errors.Is(err, fs.ErrExist) {
					t.Errorf("add: %v", err)
				}
				if _, err := seal.ReadFile(path); err != nil {
					t.Errorf("read: %v", err)
				}
				if err == nil {
					mu.Lock()
					added = append(added, k.Current())
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	k, err := seal.ReadFile(path)
	if err != nil || len(added) == 0 {
		t.Fatalf("got %v, and %d keys added", err, len(added))
	}
	for _, id := range added {
		if !strings.Contains(k.String(), id) {
			t.Errorf("key %s was added and is lost", id)
		}
	}
	t.Logf("%d of 40 added", len(added))
}

// A service's file stays the service's when root adds a key.
func TestAddKeyKeepsOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	write(t, path, "a:"+key(1), 0o600)
	if os.Geteuid() != 0 {
		// Nobody else's file can be read: then it is refused, and stays.
		t.Logf("as user %d: only that an own file stays one's own", os.Geteuid())
	} else if err := os.Chown(path, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := seal.AddKey(path); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := owner(after), owner(before); got != want {
		t.Errorf("the file belongs to %d, want %d", got, want)
	}
}

func owner(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }
