package ledger

import (
	"context"
	"encoding/json"
	"errors"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

const (
	// resealPage of keys that are read at a time.
	resealPage = 1000
	// resealBatch of credentials in one transaction, and their size in bytes.
	resealBatch = 50
	resealBytes = 512 << 10
)

// Reseal seals what credentials hold under another key than the current one
// again, under the current one, so that the other can be given up. It returns
// how many credentials it rewrote, and how many hold something that no key of
// the ring opens: these stay. progress, which may be nil, is told the values
// looked at, and all.
func (l *Ledger) Reseal(ctx context.Context, by By, org authz.Organization, progress func(done, total int)) (resealed, unreadable int, err error) {
	if l.seal == nil {
		return 0, 0, &Error{Kind: Invalid, Code: "keygate.no_sealing_key", Message: "there is no sealing key: name its file"}
	}
	if err := keyspace.CheckOrganization(org); err != nil {
		return 0, 0, &Error{Kind: Invalid, Code: "keygate.organization", Message: err.Error()}
	}
	first := l.space.Folder(keyspace.KeyRecord(org, authz.KeyID{}))
	folder := first[:len(first)-len(authz.KeyID{}.String())-1]
	end := clientv3.GetPrefixRangeEnd(folder)
	from := folder
	done, total := 0, 0
	for {
		resp, err := l.store.Do(ctx, clientv3.OpGet(from, clientv3.WithRange(end), clientv3.WithLimit(resealPage)))
		if err != nil {
			return resealed, unreadable, err
		}
		page := resp.Get()
		if total == 0 {
			total = int(page.Count)
		}
		var batches [][]string
		size := 0
		for _, kv := range page.Kvs {
			from = string(kv.Key) + "\x00"
			if p, err := l.space.Parse(string(kv.Key)); err == nil && p.Field == keyspace.FieldDetails && l.oldSeal(kv.Value) {
				last := len(batches) - 1
				if size += len(kv.Value); last < 0 || size > resealBytes || len(batches[last]) == resealBatch {
					batches, size = append(batches, nil), len(kv.Value)
					last++
				}
				batches[last] = append(batches[last], string(kv.Key))
			}
		}
		for _, part := range batches {
			n, bad := 0, 0
			_, err := l.change(ctx, by, org, "reseal", "", func(ctx context.Context, t *tx) (any, error) {
				n, bad = 0, 0
				if err := t.get(ctx, part...); err != nil {
					return nil, err
				}
				for _, path := range part {
					value, there := t.value(path)
					if !there {
						continue // deleted meanwhile
					}
					again, err := l.resealed(path, value)
					switch {
					case err != nil:
						bad++
					case again != value:
						t.put(path, again)
						n++
					}
				}
				if n == 0 {
					return nil, errNothing
				}
				return nil, nil
			})
			if err != nil && !errors.Is(err, errNothing) {
				return resealed, unreadable, err
			}
			resealed, unreadable = resealed+n, unreadable+bad
		}
		done += len(page.Kvs)
		if progress != nil {
			progress(done, max(done, total))
		}
		if !page.More {
			return resealed, unreadable, nil
		}
	}
}

// errNothing ends a change that would change nothing.
var errNothing = errors.New("nothing to change")

// sealedMembers of a stored credential, with the member each of them seals.
var sealedMembers = [...]struct{ sealed, plain string }{
	{catalog.MemberSealedKey, catalog.MemberKey},
	{catalog.MemberSealedSecret, catalog.MemberSecret},
}

// sealContext binds what is sealed to its place: it opens nowhere else.
func sealContext(plain string, id authz.KeyID) string { return plain + " " + id.String() }

// oldSeal tells whether a stored credential holds something sealed under
// another key than the current one.
func (l *Ledger) oldSeal(value []byte) bool {
	o, _ := jsonobject.Parse(value) // one that cannot be read holds nothing
	for _, m := range sealedMembers {
		var text string
		if raw, ok := o.Get(m.sealed); ok && json.Unmarshal(raw, &text) == nil {
			if id, ok := seal.IDOf(text); !ok || id != l.seal.Current() {
				return true
			}
		}
	}
	return false
}

// resealed is the value of a credential under the current key.
func (l *Ledger) resealed(path, value string) (string, error) {
	o, err := jsonobject.Parse([]byte(value))
	if err != nil {
		return "", err
	}
	p, err := l.space.Parse(path)
	if err != nil {
		return "", err
	}
	for _, m := range sealedMembers {
		raw, ok := o.Get(m.sealed)
		if !ok {
			continue
		}
		var text string
		if err := json.Unmarshal(raw, &text); err != nil {
			return "", err
		}
		if id, ok := seal.IDOf(text); ok && id == l.seal.Current() {
			continue
		}
		plain, err := l.seal.Open(text, sealContext(m.plain, p.Record.Key))
		if err != nil {
			return "", err
		}
		o = o.With(m.sealed, l.seal.Seal(plain, sealContext(m.plain, p.Record.Key)))
	}
	b, err := json.Marshal(o)
	return string(b), err
}
