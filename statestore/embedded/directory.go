package embedded

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lockPatience is how long a process that was killed may take to let go: it
// holds its files until its memory is returned.
const lockPatience = time.Second

// directory is a data directory that is fit for use and locked by this process.
type directory struct {
	path  string // absolute
	token string // initial cluster token, read once by etcd: when the member is made
	lock  *os.File
}

// openDirectory creates the directory where there is none, checks it and locks
// it. The lock is taken before etcd starts because etcd's listener removes an
// existing socket file before etcd's own lock on the database is tried: a
// second instance would leave the first one running and unreachable.
func openDirectory(ctx context.Context, path string) (_ *directory, err error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, permanent(fmt.Errorf("create data directory: %w", err))
	}
	if err := checkOwner(path); err != nil {
		return nil, permanent(err)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, permanent(fmt.Errorf("read data directory: %w", err))
	}
	if err := checkEntries(path, entries); err != nil {
		return nil, permanent(err)
	}
	d := &directory{path: path}
	if d.lock, err = takeLock(ctx, path); err != nil {
		return nil, err
	}
	if d.token, err = clusterToken(path); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// close gives the directory to the next process.
func (d *directory) close() { d.lock.Close() }

// checkOwner keeps the socket, which asks nobody for a password, and the data
// to the user of this process.
func checkOwner(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("data directory %s is not a directory", path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("data directory %s belongs to user %d and this process runs as user %d: use a directory of its own, or chown it",
			path, st.Uid, os.Geteuid())
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("data directory %s has mode %04o, open to other users: chmod 700 %s", path, mode, path)
	}
	return nil
}

// companions are what the server keeps beside etcd's data, and may have put there
// before: names, or what they begin with while they are being written.
var companions = []string{"sealing-key", "admin-token", "audit-spool"}

// checkEntries refuses a directory that serves another purpose. One with
// etcd's folder in it is taken as it is, so that a restored snapshot needs no
// more than its place.
func checkEntries(path string, entries []os.DirEntry) error {
	var foreign []string
	for _, e := range entries {
		switch e.Name() {
		case memberFolder, lockFile, tokenFile:
			return nil
		case clientSocket, peerSocket, "lost+found":
		default:
			if slices.ContainsFunc(companions, func(name string) bool { return strings.HasPrefix(e.Name(), name) }) {
				continue
			}
			foreign = append(foreign, e.Name())
		}
	}
	if foreign == nil {
		return nil
	}
	return fmt.Errorf("data directory %s holds other things (%q) and no keygate data: choose an empty or a new directory", path, foreign[0])
}

// takeLock locks the directory for as long as the file is open, which ends with
// the process however it ends, and leaves the process id in it. It waits for
// lockPatience.
func takeLock(ctx context.Context, path string) (*os.File, error) {
	name := filepath.Join(path, lockFile)
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, permanent(fmt.Errorf("open lock: %w", err))
	}
	deadline := time.After(lockPatience)
	tick := time.NewTicker(lockPatience / 50)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, permanent(fmt.Errorf("lock %s: %w", name, err))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, ctx.Err())
		case <-deadline:
			defer f.Close()
			holder := "another process"
			if pid := readPid(f); pid != 0 {
				holder = fmt.Sprintf("process %d", pid)
			}
			return nil, permanent(fmt.Errorf("data directory %s is in use by %s: stop it, or choose another directory", path, holder))
		}
	}
	if err := writePid(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("write process id: %w", err)
	}
	return f, nil
}

func writePid(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// readPid returns 0 while the holder has not written its id.
func readPid(f *os.File) int {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 32))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil {
		return 0
	}
	return pid
}

// lockHolder returns the id that the last process to lock dataDir left there,
// 0 if there is none.
func lockHolder(dataDir string) int {
	f, err := os.Open(filepath.Join(dataDir, lockFile))
	if err != nil {
		return 0
	}
	defer f.Close()
	return readPid(f)
}

// clusterToken returns the directory's token and makes it at the first start.
// etcd derives the cluster's id from it: with a constant one, a directory put
// back from an old copy, or made anew, would look like the cluster that a
// watcher had known.
func clusterToken(path string) (string, error) {
	name := filepath.Join(path, tokenFile)
	b, err := os.ReadFile(name)
	if err == nil {
		token := strings.TrimSpace(string(b))
		if token == "" {
			return "", permanent(fmt.Errorf("%s is empty: remove it", name))
		}
		return token, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", permanent(fmt.Errorf("read cluster token: %w", err))
	}
	token := "keygate-" + rand.Text()
	// Written under another name first: a crash leaves no half token.
	if err := writeSynced(name+".new", token+"\n"); err != nil {
		return "", fmt.Errorf("write cluster token: %w", err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		return "", fmt.Errorf("write cluster token: %w", err)
	}
	return token, nil
}

func writeSynced(name, content string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	return errors.Join(err, f.Sync(), f.Close())
}
