//go:build noembed

package embedded

import (
	"context"
	"errors"
)

// Serve returns an error: this build has no etcd in it.
func Serve(context.Context, Config, func()) error {
	return permanent(errors.New("this keygate was built without etcd (build tag noembed): name a cluster with --etcd-endpoints"))
}
