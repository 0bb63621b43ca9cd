// Package ledger makes the changes: it writes records, statuses and indexes to
// etcd, together, and never over something it has not read.
//
// # What a change of status does
//
// [SetStatus] revokes and approves, flag by flag, and [Change.Wait] returns when
// no replica answers by what was before: the receipt.
//
// # What an import does
//
// An [Importer] brings developers, developer apps with their credentials, and
// API products into the store. An app whose developer is not there brings it
// along, active, with nothing but its id. In the store:
//
//   - The JSON of each has the members that were handed in, in their order,
//     without the status; an app's credentials is a list of key ids, a
//     developer's apps an empty list. A credential's has them without key,
//     secret and status; apiProducts keeps its order and loses the statuses.
//     All begin with "v", a credential's then has appId, developerId and hint,
//     and with a sealing key sealedKey and sealedSecret.
//   - Statuses, and the flags of products on keys, are keys of their own.
//   - Members of a stored value that were not handed in stay, behind the others.
//     So do credentials and products: an import removes nothing, and reports
//     what the submission does not know of as kept.
//
// A status that is in the store stays, whichever way it differs, unless
// Overwrite is asked for; and so does a credential's expiry. That is reported
// as kept. A status that was in the store and is gone has been revoked by
// deletion: it is not written again either. That it was there is known from its
// record or from the index. One status is not kept: that of a developer whom an
// app brought along, as long as nobody has written it since. It was a guess, and
// the developer's own record says better.
//
// Several records share a transaction, each with an audit record of its own. An
// app that one does not hold (128 operations, 1.5 MiB) takes several: first what
// closes, then what opens, where a new key is closed until its details are
// written, and a new app until the last transaction. Whatever is left by an
// import that ends half-way, it opens nothing that the whole would not have
// opened, and the next import completes it. Every transaction compares that what
// it was planned on has not changed.
package ledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/audit"
)

const (
	// maxOps of an etcd transaction: of comparisons as well as of operations.
	// etcd's own default.
	maxOps = 128
	// maxRequest in bytes that a single group of writes may take: etcd's
	// default of 1.5 MiB, less the frame around it.
	maxRequest = 3<<19 - 16<<10
	// maxBatch in bytes up to which groups share a transaction.
	maxBatch = 1 << 20
	// maxAttempts of a change to something that others are changing.
	maxAttempts = 8
)

// view is what was read.
type view map[string]entry

type entry struct {
	value string
	rev   int64
}

// read asks for all of ops and adds the answers.
func (v view) read(ctx context.Context, kv clientv3.KV, ops []clientv3.Op) error {
	_, err := v.readAt(ctx, kv, ops)
	return err
}

// readAt also returns the revision of the first answer.
func (v view) readAt(ctx context.Context, kv clientv3.KV, ops []clientv3.Op) (rev int64, err error) {
	for part := range slices.Chunk(ops, maxOps) {
		resp, err := kv.Txn(ctx).Then(part...).Commit()
		if err != nil {
			return 0, err
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		for _, r := range resp.Responses {
			for _, e := range r.GetResponseRange().Kvs {
				v[string(e.Key)] = entry{string(e.Value), e.ModRevision}
			}
		}
	}
	return rev, nil
}

// write of one value. A deletion has no value.
type write struct {
	path, value string
	deletion    bool
}

// group of writes that belong into one transaction.
type group struct {
	order  order
	writes []write
	// guards are paths that must not have changed either.
	guards []string

	// object is the path of the record that they belong to, and changes what
	// its audit record says of them.
	object  string
	changes []audit.Change
}

// order of groups among transactions.
type order uint8

const (
	closing  order = iota // statuses that refuse
	products              // flags that open a product on a key
	keys                  // keys that are new, or opened
	apps                  // the app itself
	numOrders
)

var errTooLarge = errors.New("the record is too large for etcd")

// bytes that the group takes in a request, or a little less.
func (g group) bytes() (n int) {
	for _, w := range g.writes {
		n += 2*len(w.path) + len(w.value) + 64
	}
	for _, path := range g.guards {
		n += len(path) + 32
	}
	for _, c := range g.changes {
		n += len(c.Path) + 64
		for _, value := range []*string{c.Before, c.After} {
			if value != nil {
				n += len(*value) + len(*value)/4 // with its quotes escaped
			}
		}
	}
	return n
}

// batch is what goes into one transaction.
type batch struct {
	compare map[string]bool
	writes  map[string]write
	changes map[string][]audit.Change // by object
	size    int
}

// add takes the group in, if there is room for it.
func (b *batch) add(g group) bool {
	compare, writes, objects := len(b.compare), len(b.writes), len(b.changes)
	more := func(path string) {
		if !b.compare[path] {
			compare++
		}
	}
	for _, w := range g.writes {
		more(w.path)
		if _, there := b.writes[w.path]; !there {
			writes++
		}
	}
	for _, path := range g.guards {
		more(path)
	}
	if _, there := b.changes[g.object]; !there {
		objects++
		more(g.object)
	}
	size := b.size + g.bytes()
	if len(b.writes) > 0 && (compare > maxOps || writes+objects > maxOps || size > maxBatch) {
		return false
	}
	b.size = size
	for _, w := range g.writes {
		b.compare[w.path] = true
		b.writes[w.path] = w // a later one knows of an earlier one
	}
	for _, path := range g.guards {
		b.compare[path] = true
	}
	b.compare[g.object] = true
	b.changes[g.object] = append(b.changes[g.object], g.changes...)
	return true
}

// transactions puts the groups, in their order, into as few batches as hold
// them.
func transactions(groups []group) ([]batch, error) {
	slices.SortStableFunc(groups, func(a, b group) int { return int(a.order) - int(b.order) })
	var all []batch
	for _, g := range groups {
		if n := g.bytes(); n > maxRequest {
			return nil, fmt.Errorf("%w: %s and what belongs to it take %d bytes, a request at most %d", errTooLarge, g.writes[0].path, n, maxRequest)
		}
		if len(all) == 0 || !all[len(all)-1].add(g) {
			b := batch{compare: map[string]bool{}, writes: map[string]write{}, changes: map[string][]audit.Change{}}
			b.add(g)
			all = append(all, b)
		}
	}
	return all, nil
}

// commit sends one transaction, with the audit records that record begins. It
// tells whether it took place; not so when something in the view has changed
// meanwhile.
func (b batch) commit(ctx context.Context, kv clientv3.KV, v view, audits string, record func(object string) audit.Record) (bool, error) {
	var conditions []clientv3.Cmp
	for path := range b.compare {
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(path), "=", v[path].rev))
	}
	var ops []clientv3.Op
	for _, w := range b.writes {
		if w.deletion {
			ops = append(ops, clientv3.OpDelete(w.path))
		} else {
			ops = append(ops, clientv3.OpPut(w.path, w.value))
		}
	}
	for object, changes := range b.changes {
		r := record(object)
		r.Changes = changes
		slices.SortFunc(r.Changes, func(a, b audit.Change) int { return strings.Compare(a.Path, b.Path) })
		ops = append(ops, clientv3.OpPut(audits+r.ID, r.Value()))
	}
	resp, err := kv.Txn(ctx).If(conditions...).Then(ops...).Commit()
	return err == nil && resp.Succeeded, err
}
