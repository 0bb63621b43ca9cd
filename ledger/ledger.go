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
// [Import] brings one developer app into the store, with its credentials, and
// creates its developer, active, where there is none. In the store:
//
//   - The app's JSON has the members that were handed in, in their order,
//     without the status; credentials is a list of key ids. A credential's has
//     them without key, secret and status; apiProducts keeps its order and
//     loses the statuses. Both begin with "v", a credential's then has appId,
//     developerId and hint.
//   - Statuses, and the flags of products on keys, are keys of their own.
//   - Members of a stored value that were not handed in stay, behind the others.
//     So do credentials and products: an import removes nothing, and reports
//     what the submission does not know of as kept.
//
// A status that is in the store stays, whichever way it differs, unless
// Overwrite is asked for; and so does a credential's expiry. That is reported
// as kept. A status that was in the store and is gone has been revoked by
// deletion: it is not written again either. That it was there is known from its
// record or from the index.
//
// It writes in one transaction if that holds everything (128 operations, 1.5
// MiB), else in several: first what closes, then what opens, where a new key is
// closed until its details are written, and a new app until the last
// transaction. Whatever is left by an import that ends half-way, it opens
// nothing that the whole would not have opened, and the next import completes
// it. Every transaction compares that what it was planned on has not changed.
package ledger

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/statestore/keyspace"
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
	// maxAttempts to import an app that others are changing.
	maxAttempts = 8
)

// ImportOptions of Import.
type ImportOptions struct {
	// Overwrite statuses and expiries in the store by those handed in, and
	// write again what has been deleted. The developer's status is not in what
	// is handed in: it is never overwritten.
	Overwrite bool
}

// Import brings app into the store. It is safe for concurrent use, and may be
// called again: a second time it writes nothing. The outcome tells what was
// done; an app or a credential that the store cannot take is refused there. The
// error is for a store that did not answer: it is not known then how far the
// import came, and it should be repeated.
func Import(ctx context.Context, kv clientv3.KV, space keyspace.Space, org authz.Organization, app catalog.App, opts ImportOptions) (Outcome, error) {
	out := Outcome{App: app.ID, Name: app.Name}
	path := space.Details(keyspace.AppRecord(org, app.ID))
	refuse := func(reason string) (Outcome, error) {
		out.Items = []Item{{Action: Refused, Kind: keyspace.KindApp, Whole: true, Path: path, Reason: reason}}
		return out, nil
	}
	if err := keyspace.CheckOrganization(org); err != nil {
		return out, err
	}
	if err := app.Validate(); err != nil {
		return refuse(err.Error())
	}
	for range maxAttempts {
		p := &planner{space: space, org: org, app: app, overwrite: opts.Overwrite}
		if err := p.read(ctx, kv); err != nil {
			return out, fmt.Errorf("import app %q: read: %w", app.ID, err)
		}
		if reason := p.plan(); reason != "" {
			return refuse(reason)
		}
		switch done, err := commit(ctx, kv, path, p.view, p.groups); {
		case errors.Is(err, errTooLarge), errors.Is(err, rpctypes.ErrRequestTooLarge):
			return refuse(err.Error())
		case err != nil:
			return out, fmt.Errorf("import app %q: write: %w", app.ID, err)
		case done:
			out.Items = p.items
			return out, nil
		}
	}
	return refuse(fmt.Sprintf("others kept changing it: given up after %d attempts", maxAttempts))
}

// view is what was read.
type view map[string]entry

type entry struct {
	value string
	rev   int64
}

// read asks for all of ops and adds the answers.
func (v view) read(ctx context.Context, kv clientv3.KV, ops []clientv3.Op) error {
	for part := range slices.Chunk(ops, maxOps) {
		resp, err := kv.Txn(ctx).Then(part...).Commit()
		if err != nil {
			return err
		}
		for _, r := range resp.Responses {
			for _, e := range r.GetResponseRange().Kvs {
				v[string(e.Key)] = entry{string(e.Value), e.ModRevision}
			}
		}
	}
	return nil
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

// commit writes the groups in their order, in as few transactions as hold them.
// It tells whether all of them took place; not so when something in the view
// has changed meanwhile.
func commit(ctx context.Context, kv clientv3.KV, app string, v view, groups []group) (bool, error) {
	slices.SortStableFunc(groups, func(a, b group) int { return int(a.order) - int(b.order) })
	for len(groups) > 0 {
		compare := map[string]bool{app: true}
		var ops []clientv3.Op
		size, n := 0, 0
		for ; n < len(groups); n++ {
			more := map[string]bool{}
			bytes := 0
			for _, w := range groups[n].writes {
				more[w.path] = true
				bytes += 2*len(w.path) + len(w.value) + 64
			}
			for _, path := range groups[n].guards {
				more[path] = true
				bytes += len(path) + 32
			}
			if bytes > maxRequest {
				return false, fmt.Errorf("%w: %s and what belongs to it take %d bytes, a request at most %d", errTooLarge, groups[n].writes[0].path, bytes, maxRequest)
			}
			for path := range compare {
				delete(more, path)
			}
			full := len(compare)+len(more) > maxOps || len(ops)+len(groups[n].writes) > maxOps || size+bytes > maxBatch
			if n > 0 && full {
				break
			}
			maps.Copy(compare, more)
			size += bytes
			for _, w := range groups[n].writes {
				if w.deletion {
					ops = append(ops, clientv3.OpDelete(w.path))
				} else {
					ops = append(ops, clientv3.OpPut(w.path, w.value))
				}
			}
		}
		var conditions []clientv3.Cmp
		for path := range compare {
			conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(path), "=", v[path].rev))
		}
		resp, err := kv.Txn(ctx).If(conditions...).Then(ops...).Commit()
		if err != nil {
			return false, err
		}
		if !resp.Succeeded {
			return false, nil
		}
		groups = groups[n:]
	}
	return true, nil
}
