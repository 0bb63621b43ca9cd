package embedded

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// SnapshotInfo says what is in a snapshot file.
type SnapshotInfo struct {
	// File and its Size in bytes.
	File string
	Size int64
	// Written is when the file was last written, by its file system. Of a copy
	// that did not preserve it, that is when it was copied.
	Written time.Time
	// Revision that the snapshot holds, and the number of Keys; 0 and -1 in a
	// build without etcd, which cannot look inside.
	Revision int64
	Keys     int64
}

// SaveSnapshot writes a snapshot of the etcd that client reaches to file, with
// mode 0600: it holds the whole store. The file appears under its name only when
// it is complete, on the disk, and verified against the hash that etcd sends
// with it; after an error there is none, unless the error wraps ErrNotSynced. An
// error wraps [fs.ErrExist] if something stands at the name: nothing is ever
// replaced.
//
// A snapshot is what one member has. client should have one endpoint only and
// have read through it, linearizably: the snapshot then holds all that was
// acknowledged before that read.
func SaveSnapshot(ctx context.Context, client *clientv3.Client, file string) (info SnapshotInfo, err error) {
	if _, err := os.Lstat(file); err == nil {
		return info, fmt.Errorf("save snapshot: %s: %w", file, fs.ErrExist)
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".part-*") // 0600
	if err != nil {
		return info, fmt.Errorf("save snapshot: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	stream, err := client.Snapshot(ctx)
	if err != nil {
		return info, fmt.Errorf("save snapshot: %w", err)
	}
	defer stream.Close()
	if _, err = io.Copy(f, stream); err == nil {
		err = f.Sync()
	}
	if err != nil {
		return info, fmt.Errorf("save snapshot: %w", err)
	}
	if info, err = checkSnapshot(f); err != nil {
		return info, fmt.Errorf("save snapshot: %w", err)
	}
	if err := describe(f.Name(), &info); err != nil {
		return info, fmt.Errorf("save snapshot: %w", err)
	}
	// etcdutl counts the record with which a restore bumps the revision, too.
	if info.Revision > 0 {
		if r, err := client.Get(ctx, "\x00", clientv3.WithFromKey(), clientv3.WithCountOnly(), clientv3.WithRev(info.Revision)); err == nil {
			info.Keys = r.Count
		}
	}
	info.File = file
	if err := publish(f.Name(), file); err != nil {
		return info, fmt.Errorf("save snapshot: %w", err)
	}
	return info, nil
}

// ErrNotSynced is wrapped by the error of [SaveSnapshot] after which the file is
// there, complete and verified, and only its name may not outlast the machine: its
// folder could not be synchronized with the disk.
var ErrNotSynced = errors.New("the snapshot is there, complete and verified, and may be gone after a crash of the machine")

// publish gives the complete file its name, if that is free.
func publish(temporary, name string) error {
	err := os.Link(temporary, name)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		// A file system without hard links: look, then rename.
		if _, statErr := os.Lstat(name); errors.Is(statErr, fs.ErrNotExist) {
			err = os.Rename(temporary, name)
		}
	}
	if err != nil {
		return err
	}
	if err := syncFile(filepath.Dir(name)); err != nil {
		return fmt.Errorf("%s: %w: sync its folder: %w", name, ErrNotSynced, err)
	}
	return nil
}

// syncFile makes what was written to a file, or renamed in a folder, outlast
// the machine.
func syncFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// A snapshot is a database, whose size is a multiple of a disk's sector, and the
// SHA-256 of it.
const sectorSize = 512

// checkSnapshot reads the whole file and compares it with the hash at its end.
func checkSnapshot(f *os.File) (SnapshotInfo, error) {
	info, err := checkShape(f)
	if err != nil {
		return info, err
	}
	return info, copyDatabase(io.Discard, f, info)
}

// checkShape refuses what cannot be a snapshot by its size.
func checkShape(f *os.File) (SnapshotInfo, error) {
	stat, err := f.Stat()
	if err != nil {
		return SnapshotInfo{}, err
	}
	info := SnapshotInfo{File: f.Name(), Size: stat.Size(), Written: stat.ModTime(), Keys: -1}
	switch {
	case !stat.Mode().IsRegular():
		return info, fmt.Errorf("%s is not a file", f.Name())
	case stat.Size() == 0:
		return info, fmt.Errorf("%s is empty", f.Name())
	case stat.Size()%sectorSize != sha256.Size || stat.Size() == sha256.Size:
		return info, fmt.Errorf("%s has no hash at its end: it was cut, or copied out of a data directory; want a file that keygate etcd snapshot or etcdctl snapshot save has written", f.Name())
	}
	return info, nil
}

// copyDatabase copies the snapshot without its hash, and compares the hash with
// what it copied.
func copyDatabase(w io.Writer, f *os.File, info SnapshotInfo) error {
	size := info.Size - sha256.Size
	hash := sha256.New()
	if _, err := io.Copy(io.MultiWriter(w, hash), io.NewSectionReader(f, 0, size)); err != nil {
		return err
	}
	want := make([]byte, sha256.Size)
	if _, err := f.ReadAt(want, size); err != nil {
		return err
	}
	if !bytes.Equal(hash.Sum(nil), want) {
		return fmt.Errorf("%s is damaged: its content does not have the hash at its end", f.Name())
	}
	return nil
}
