package seal

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// maxFile bounds a keyring's file, in bytes.
const maxFile = 1 << 18

// ReadFile reads a keyring from a file. One that the group or others may use is
// refused.
func ReadFile(path string) (*Keyring, error) {
	_, k, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("read sealing keys: %w", err)
	}
	return k, nil
}

func read(path string) (text []byte, k *Keyring, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if mode := info.Mode(); mode.Perm()&0o077 != 0 {
		return nil, nil, fmt.Errorf("%s has mode %#o: others than its owner may use it; chmod 600", path, mode.Perm())
	}
	if text, err = io.ReadAll(io.LimitReader(f, maxFile+1)); err != nil {
		return nil, nil, err
	}
	if len(text) > maxFile {
		return nil, nil, fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	if k, err = Parse(text); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return text, k, nil
}

// CreateFile makes a keyring with one new key, in a file of mode 0600. If there
// is a file already the error wraps fs.ErrExist and nothing has changed: of two
// that create the same file one succeeds, and nobody ever reads half of it.
// When it returns the file is on disk.
func CreateFile(path string) (*Keyring, error) {
	k, err := createFile(path)
	if err != nil {
		return nil, fmt.Errorf("create sealing keys: %w", err)
	}
	return k, nil
}

func createFile(path string) (*Keyring, error) {
	text := []byte("# What seals consumer keys and secrets. Without it they are lost: keep a copy.\n" +
		"# <id>:<key>, the first one seals, all of them open.\n" +
		Generate(newID()) + "\n")
	k, err := Parse(text)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp") // its mode is 0600
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	if err := fill(f, text); err != nil {
		return nil, err
	}
	// A link, unlike a rename, does not replace.
	if err := os.Link(f.Name(), path); err != nil {
		return nil, err
	}
	return k, syncDirectory(filepath.Dir(path))
}

// AddKey puts a new key before the others of a file, which stay: it seals from
// now on, for whoever reads the file from now on. It returns the keyring as it
// is then. The file is replaced in one step, and keeps its owner; two that add a
// key at the same moment do not lose one, the second is refused.
//
// Whoever shares the file needs the new key before anything that it seals can
// be opened there.
func AddKey(path string) (*Keyring, error) {
	k, err := addKey(path)
	if err != nil {
		return nil, fmt.Errorf("add a sealing key: %w", err)
	}
	return k, nil
}

func addKey(path string) (*Keyring, error) {
	path, err := filepath.EvalSymlinks(path) // replace the file, not a link to it
	if err != nil {
		return nil, err
	}
	// The new file is the lock, from before the old one is read.
	next := path + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("another adds one at this moment, or died of it; if nothing does, delete the file: %w", err)
	}
	if err != nil {
		return nil, err
	}
	renamed := false
	defer func() {
		if !renamed { // else next is somebody else's by now
			f.Close()
			os.Remove(next)
		}
	}()
	text, _, err := read(path)
	if err != nil {
		return nil, err
	}
	text = prepend(text, Generate(newID()))
	k, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := keepOwner(f, path); err != nil {
		return nil, err
	}
	if err := fill(f, text); err != nil {
		return nil, err
	}
	if err := os.Rename(next, path); err != nil {
		return nil, err
	}
	renamed = true
	return k, syncDirectory(filepath.Dir(path))
}

// newID names a key by its day, for people, and at random.
func newID() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return time.Now().UTC().Format("20060102") + "-" + hex.EncodeToString(b[:])
}

// fill writes the text to the disk and closes the file.
func fill(f *os.File, text []byte) error {
	_, err := f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// syncDirectory makes a new name in it last.
func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
