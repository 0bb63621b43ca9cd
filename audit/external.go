package audit

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

const (
	// maxChanges of one revision that are recorded, in bytes of their JSON: a
	// link, with the records of what it saw, is one transaction.
	maxChanges = 128 << 10
	// maxOrganizations that one revision's records are written for.
	maxOrganizations = 32
	// maxListed audit records of one revision. etcd takes 128 operations in a
	// transaction unless it is told otherwise.
	maxListed = 1000
)

// unknownValue stands for a value that etcd has compacted.
const unknownValue = "(unknown: compacted)"

// entryOf is what the chain says of a revision; ok is false if nothing of it is
// covered.
func entryOf(space keyspace.Space, events []*clientv3.Event) (e entry, ok bool) {
	var text []byte
	for _, ev := range events {
		path := string(ev.Kv.Key)
		in := folderOf(space, path)
		if in == folderNone {
			continue
		}
		if ev.Type == mvccpb.Event_DELETE {
			text = fmt.Appendf(text, "delete %d %s\n", len(path), path)
			continue
		}
		value := digest(ev.Kv.Value)
		text = fmt.Appendf(text, "put %d %s %s\n", len(path), path, value)
		if in == folderAudit && len(e.records) < maxListed {
			e.records = append(e.records, listed{listedPath(path), value})
		}
	}
	e.hash = digest(text)
	return e, len(text) > 0
}

// external returns the records of what was changed without one in a revision:
// one for each organization. An audit record that is written again or deleted is
// such a change, whatever else the revision has.
func external(space keyspace.Space, events []*clientv3.Event, at time.Time) []Record {
	recorded := false
	for _, ev := range events {
		recorded = recorded || ev.IsCreate() && folderOf(space, string(ev.Kv.Key)) == folderAudit
	}
	var all []*Record
	of := map[authz.Organization]*Record{}
	more := map[*Record]int{}
	size := 0
	for _, ev := range events {
		switch in := folderOf(space, string(ev.Kv.Key)); {
		case in == folderNone, in == folderAudit && ev.IsCreate(), in != folderAudit && recorded:
			continue
		}
		org := organizationOf(space, ev)
		r := of[org]
		switch {
		case r == nil && len(all) == maxOrganizations:
			r = all[len(all)-1]
		case r == nil:
			r = &Record{
				Version: Version, ID: NewID(at), At: at.UnixMilli(), Organization: org,
				Actor: Actor{Kind: ActorExternal}, Action: ActionDelete, Object: shownPath(space, string(ev.Kv.Key)),
				Revision: ev.Kv.ModRevision,
			}
			of[org], all = r, append(all, r)
		}
		if ev.Type == mvccpb.Event_PUT {
			r.Action = ActionPut
		}
		c := changeOf(space, ev)
		b, _ := json.Marshal(c) // strings
		if size+len(b) > maxChanges {
			more[r]++
			continue
		}
		size += len(b)
		r.Changes = append(r.Changes, c)
	}
	records := make([]Record, len(all))
	for i, r := range all {
		if n := more[r]; n > 0 {
			r.Note = fmt.Sprintf("the revision made %d changes more, which are not shown", n)
		}
		records[i] = *r
	}
	return records
}

// Actions of changes that something else than keygate made.
const (
	ActionPut    = "put"
	ActionDelete = "delete"
)

// changeOf an event.
func changeOf(space keyspace.Space, ev *clientv3.Event) Change {
	c := Change{Path: shownPath(space, string(ev.Kv.Key))}
	if ev.PrevKv != nil {
		before := Redact(string(ev.PrevKv.Value))
		c.Before = &before
	} else if !ev.IsCreate() { // there was one
		before := unknownValue
		c.Before = &before
	}
	if ev.Type == mvccpb.Event_PUT {
		after := Redact(string(ev.Kv.Value))
		c.After = &after
	}
	return c
}

// organizationOf is whose trail an event belongs to. Of a token it is the
// token's; what belongs to none belongs to all.
func organizationOf(space keyspace.Space, ev *clientv3.Event) authz.Organization {
	path := string(ev.Kv.Key)
	if rest, ok := strings.CutPrefix(path, space.Audits()); ok {
		return organization(rest)
	}
	if rest, ok := strings.CutPrefix(path, space.Watched()); ok {
		return organization(rest)
	}
	for _, kv := range []*mvccpb.KeyValue{ev.PrevKv, ev.Kv} {
		var token struct {
			Organization authz.Organization `json:"organization"`
		}
		if kv != nil && json.Unmarshal(kv.Value, &token) == nil && keyspace.CheckOrganization(token.Organization) == nil {
			return token.Organization
		}
	}
	return keyspace.AllOrganizations
}

// organization whose folder a path begins with.
func organization(rest string) authz.Organization {
	seg, _, _ := strings.Cut(rest, "/")
	name, err := url.PathUnescape(seg)
	org := authz.Organization(name)
	if err != nil || url.PathEscape(name) != seg || len(seg) > maxPath || keyspace.CheckOrganization(org) != nil {
		return keyspace.AllOrganizations
	}
	return org
}

// shownPath is a path as a record may show it: bounded, and without what stands
// in the place of an id and is none, for that may be a consumer key or a token.
func shownPath(space keyspace.Space, path string) string {
	if rest, ok := strings.CutPrefix(path, space.Tokens()); ok {
		if _, err := authz.ParseKeyID(rest); err != nil {
			return space.Tokens() + "(not an id)"
		}
	}
	if rest, ok := strings.CutPrefix(path, space.Watched()); ok {
		seg := strings.Split(rest, "/")
		if len(seg) > 2 && seg[1] == keyspace.KindKey.String() {
			if _, err := authz.ParseKeyID(seg[2]); err != nil {
				seg[2] = "(not an id)"
				path = space.Watched() + strings.Join(seg, "/")
				if len(path) > maxPath {
					path = space.Watched() + "(too long)/" + seg[1] + "/" + seg[2]
				}
				return strings.ToValidUTF8(path, "\ufffd")
			}
		}
	}
	return listedPath(path)
}
