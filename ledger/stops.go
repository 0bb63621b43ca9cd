package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// Stop is a consumer key that may use a product now and may not after a change.
type Stop struct {
	Key     authz.KeyID       `json:"key"`
	Hint    string            `json:"hint,omitempty"`
	App     authz.AppID       `json:"appId"`
	Product authz.ProductName `json:"product"`
}

// maxStops bounds what a preview lists.
const maxStops = 10_000

// fixed is a Source of records that were read.
type fixed authz.Records

func (f fixed) Records(context.Context, authz.Organization, authz.KeyID) (authz.Records, error) {
	return authz.Records(f), nil
}

// always is the proof of what is only asked as if.
type always struct{}

func (always) Valid() bool { return true }

// stops works out what the writes of a transaction would close.
func (t *tx) stops(ctx context.Context) ([]Stop, error) {
	return t.l.stops(ctx, t.org, t.rev, t.writes, t.folders)
}

// stops works out which keys the writes would close for which products. It asks
// the ladder that checks climb, of the records as they are at a revision and as
// they would be.
func (l *Ledger) stops(ctx context.Context, org authz.Organization, rev int64, writes map[string]write, folders []string) ([]Stop, error) {
	records := map[keyspace.Record]bool{}
	for path := range writes {
		if p, err := l.space.Parse(path); err == nil {
			records[p.Record] = true
		}
	}
	for _, f := range folders {
		if p, err := l.space.Parse(f + "status"); err == nil {
			records[p.Record] = true
		}
	}
	keys := map[authz.KeyID]bool{}
	for r := range records {
		var found Selection
		var err error
		switch r.Kind {
		case keyspace.KindKey:
			keys[r.Key] = true
		case keyspace.KindApp:
			found, err = AppKeys(ctx, l.store, l.space, org, authz.AppID(r.Name))
		case keyspace.KindDeveloper:
			found, err = DeveloperKeys(ctx, l.store, l.space, org, authz.DeveloperID(r.Name))
		}
		if err != nil && !errors.Is(err, ErrNotFound) { // what is being created has no keys yet
			return nil, err
		}
		for _, id := range found.Keys {
			keys[id] = true
		}
	}
	after := func(now view) view {
		then := maps.Clone(now)
		for path := range then {
			if slices.ContainsFunc(folders, func(f string) bool { return strings.HasPrefix(path, f) }) {
				delete(then, path)
			}
		}
		for path, w := range writes {
			if w.deletion {
				delete(then, path)
			} else {
				then[path] = entry{value: w.value}
			}
		}
		return then
	}

	var stops []Stop
	ids := slices.SortedFunc(maps.Keys(keys), func(a, b authz.KeyID) int { return slices.Compare(a[:], b[:]) })
	for part := range slices.Chunk(ids, maxOps) {
		now := view{}
		var ops []clientv3.Op
		folder := func(r keyspace.Record) {
			ops = append(ops, clientv3.OpGet(l.space.Folder(r), clientv3.WithPrefix(), clientv3.WithRev(rev)))
		}
		for _, id := range part {
			folder(keyspace.KeyRecord(org, id))
		}
		if err := now.read(ctx, l.store, ops); err != nil {
			return nil, err
		}
		ops = ops[:0]
		asked, credentials := map[keyspace.Record]bool{}, l.records(now)
		for _, id := range part {
			c := l.space.Credential(credentials[keyspace.KeyRecord(org, id)])
			if !c.Exists || c.Problem != "" {
				continue
			}
			for _, r := range []keyspace.Record{keyspace.AppRecord(org, c.App), keyspace.DeveloperRecord(org, c.Developer)} {
				if !asked[r] {
					asked[r] = true
					folder(r)
				}
			}
		}
		if err := now.read(ctx, l.store, ops); err != nil {
			return nil, err
		}
		before, then := l.records(now), l.records(after(now))
		for _, id := range part {
			record := keyspace.KeyRecord(org, id)
			c := l.space.Credential(before[record])
			if !c.Exists {
				continue
			}
			for _, product := range slices.Sorted(maps.Keys(c.Products)) {
				if !l.opens(ctx, org, id, product, before) || l.opens(ctx, org, id, product, then) {
					continue
				}
				details, _ := jsonobject.Parse([]byte(now[l.space.Details(record)].value)) // it opens, so it can be read
				stop := Stop{Key: id, App: c.App, Product: product}
				if hint, ok := details.Get(catalog.MemberHint); ok {
					_ = json.Unmarshal(hint, &stop.Hint) // one that is no string is shown as none
				}
				if stops = append(stops, stop); len(stops) == maxStops {
					return stops, nil
				}
			}
		}
	}
	return stops, nil
}

// records of a view.
func (l *Ledger) records(v view) map[keyspace.Record][]keyspace.Entry {
	all := map[keyspace.Record][]keyspace.Entry{}
	for path, e := range v {
		if p, err := l.space.Parse(path); err == nil {
			all[p.Record] = append(all[p.Record], keyspace.Entry{Key: path, Value: []byte(e.value)})
		}
	}
	return all
}

// opens tells whether a check of the key for the product would be allowed.
func (l *Ledger) opens(ctx context.Context, org authz.Organization, id authz.KeyID, product authz.ProductName, records map[keyspace.Record][]keyspace.Entry) bool {
	r := fixed{Proof: always{}}
	r.Credential = l.space.Credential(records[keyspace.KeyRecord(org, id)])
	if r.Credential.Exists && r.Credential.Problem == "" {
		r.App = l.space.App(records[keyspace.AppRecord(org, r.Credential.App)])
	}
	if r.App.Exists && r.App.Problem == "" { // its developer is the authority
		r.Developer = l.space.Developer(records[keyspace.DeveloperRecord(org, r.App.Developer)])
	}
	a := authz.Authorizer{Source: r, Now: l.now}
	return a.Decide(ctx, authz.Request{Organization: org, KeyID: id, Products: []authz.ProductName{product}}).Allowed()
}
