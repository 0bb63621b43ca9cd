//go:build noembed

package embedded

import (
	"context"
	"errors"
)

// Restore returns an error: this build has no etcd in it.
func Restore(context.Context, RestoreConfig) (*RestoreReport, error) {
	return &RestoreReport{}, permanent(errors.New("this keygate was built without etcd (build tag noembed): restore with etcdutl, or with a build that has it"))
}

// describe leaves out what only etcd can read.
func describe(string, *SnapshotInfo) error { return nil }
