package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
	"keygate/statestore/keyspace"
)

// Spool keeps the audit records that etcd has no space for until it has: a file
// for each in one folder, which several processes may share. It is safe for
// concurrent use.
type Spool struct{ dir string }

// OpenSpool returns the spool in a folder, which is made if it is not there.
func OpenSpool(dir string) (*Spool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("audit spool: %w", err)
	}
	return &Spool{dir}, nil
}

const spooled = ".json"

// Add keeps a record. When it returns nil the record is on the disk.
func (s *Spool) Add(r audit.Record) error {
	if err := s.add(r); err != nil {
		return fmt.Errorf("audit spool: %w", err)
	}
	return nil
}

func (s *Spool) add(r audit.Record) error {
	f, err := os.CreateTemp(s.dir, r.ID+".*.tmp")
	if err != nil {
		return err
	}
	_, err = f.WriteString(r.Value())
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(s.dir, r.ID+spooled)); err != nil {
		return err
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Drain writes the records to etcd, oldest first, and removes those that are
// there. It returns how many are left behind: etcd may still have no space,
// which is not an error. A record that cannot be read stays, and is an error
// that names its file; the others are written.
func (s *Spool) Drain(ctx context.Context, kv clientv3.KV, space keyspace.Space) (left int, err error) {
	entries, err := os.ReadDir(s.dir) // sorted: ids are time-ordered
	if err != nil {
		return 0, fmt.Errorf("audit spool: %w", err)
	}
	var failed error
	full := false
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), spooled) {
			continue
		}
		if !full {
			switch err := s.drain(ctx, kv, space, filepath.Join(s.dir, e.Name())); {
			case err == nil:
				continue
			case errors.Is(err, rpctypes.ErrNoSpace):
				full = true
			case ctx.Err() != nil:
				return left + 1, fmt.Errorf("audit spool: %w", err)
			default:
				failed = errors.Join(failed, fmt.Errorf("audit spool: %w", err))
			}
		}
		left++
	}
	return left, failed
}

func (s *Spool) drain(ctx context.Context, kv clientv3.KV, space keyspace.Space, file string) error {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) { // another process was quicker
		return nil
	} else if err != nil {
		return err
	}
	r, err := audit.Parse(text)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	path := space.Audit(r.Organization) + r.ID
	// Written once, whoever else does it and however often.
	if _, err := kv.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(path), "=", 0)).Then(clientv3.OpPut(path, string(text))).Commit(); err != nil {
		return err
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
