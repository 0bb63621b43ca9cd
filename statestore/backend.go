package statestore

import (
	"context"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Backend is the part of etcd that a Store reads. It cannot write. [Etcd] is
// the real one; storetest has one that fails on demand. Methods are safe for
// concurrent use.
type Backend interface {
	// Read reads every key under each prefix in one linearizable, read-only
	// transaction: one revision holds for all of the Snapshot. It ends with ctx.
	Read(ctx context.Context, prefixes ...string) (Snapshot, error)

	// ReadLocal is Read of what the member that answers has: one revision holds for
	// all of the Snapshot, but it may be an old one. It needs no leader.
	ReadLocal(ctx context.Context, prefixes ...string) (Snapshot, error)

	// List reads all keys under prefix in one linearizable read, in parts, and hands
	// each to each, which must not keep it. The header is of the one revision that
	// all parts are of. It ends with ctx, or with the first error of each.
	List(ctx context.Context, prefix string, each func([]*mvccpb.KeyValue) error) (*etcdserverpb.ResponseHeader, error)

	// Watch opens a watch on all keys under prefix, from revision from on, over
	// a connection and a stream of its own. It returns once the server has
	// created the watch. ctx bounds the opening only; the watch then lives
	// until Close.
	Watch(ctx context.Context, prefix string, from int64) (Watch, error)
}

// Snapshot is the answer to a Read. The caller owns it.
type Snapshot struct {
	Header *etcdserverpb.ResponseHeader
	// Ranges holds the keys under each prefix, in the order asked.
	Ranges [][]*mvccpb.KeyValue
}

// Watch is one open watch.
type Watch interface {
	// Updates delivers events and progress notifications in revision order. It
	// is closed when the watch ends by itself; the last update then has an Err.
	Updates() clientv3.WatchChan
	// RequestProgress asks for a progress notification in this watch's own
	// stream. No answer is normal while events are on their way. It may block
	// on a dead connection until ctx ends.
	RequestProgress(ctx context.Context) error
	// Close ends the watch and its connection.
	Close()
}
