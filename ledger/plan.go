package ledger

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/statestore/keyspace"
)

// planner works out what one attempt to import an app writes, from what it
// read.
type planner struct {
	space     keyspace.Space
	org       authz.Organization
	app       catalog.App
	overwrite bool

	view   view
	paths  []string // of the view, sorted
	groups []group
	items  []Item
	extra  []Item // behind the items
}

func (p *planner) appRecord() keyspace.Record { return keyspace.AppRecord(p.org, p.app.ID) }
func (p *planner) developerRecord() keyspace.Record {
	return keyspace.DeveloperRecord(p.org, p.app.Developer)
}

// nameIndex is the path that an app's name has in the index.
func (p *planner) nameIndex(name string) string {
	return p.space.IndexDeveloperApp(p.org, p.app.Developer, name)
}

func (p *planner) keyIndex(id authz.KeyID) string {
	return p.space.IndexAppKeys(p.org, p.app.ID) + id.String()
}

func (p *planner) productIndex(name authz.ProductName, id authz.KeyID) string {
	return p.space.IndexProductKeys(p.org, name) + id.String()
}

// read fills the view: every path that the plan looks at.
func (p *planner) read(ctx context.Context, kv clientv3.KV) error {
	p.view = view{}
	ops := []clientv3.Op{
		clientv3.OpGet(p.space.Folder(p.appRecord()), clientv3.WithPrefix()),
		clientv3.OpGet(p.space.Folder(p.developerRecord()), clientv3.WithPrefix()),
		clientv3.OpGet(p.space.IndexDeveloperApps(p.org, p.app.Developer), clientv3.WithPrefix(), clientv3.WithLimit(1)),
		clientv3.OpGet(p.nameIndex(p.app.Name)),
		clientv3.OpGet(p.space.IndexAppKeys(p.org, p.app.ID), clientv3.WithPrefix()),
	}
	for _, c := range p.app.Credentials {
		ops = append(ops, clientv3.OpGet(p.space.Folder(keyspace.KeyRecord(p.org, c.Key)), clientv3.WithPrefix()))
		for _, ref := range c.Products {
			ops = append(ops, clientv3.OpGet(p.productIndex(ref.Name, c.Key)))
		}
	}
	if err := p.view.read(ctx, kv, ops); err != nil {
		return err
	}
	if name := p.storedName(); name != "" && name != p.app.Name {
		if err := p.view.read(ctx, kv, []clientv3.Op{clientv3.OpGet(p.nameIndex(name))}); err != nil {
			return err
		}
	}
	p.paths = slices.Sorted(maps.Keys(p.view))
	return nil
}

// storedName of the app, empty if there is none to be read.
func (p *planner) storedName() (name string) {
	o, _ := p.object(p.space.Details(p.appRecord()))
	raw, _ := o.Get(catalog.MemberName)
	if json.Unmarshal(raw, &name) != nil {
		return ""
	}
	return name
}

// object returns a stored JSON value, empty if there is none or it is not one.
func (p *planner) object(path string) (o jsonobject.Object, ok bool) {
	e, there := p.view[path]
	if !there {
		return nil, false
	}
	o, err := jsonobject.Parse([]byte(e.value))
	return o, err == nil
}

// plan fills groups and items. A reason refuses the app.
func (p *planner) plan() (reason string) {
	rec := p.appRecord()
	path := p.space.Details(rec)
	details, there := p.view[path]
	if there {
		stored := p.space.App([]keyspace.Entry{{Key: path, Value: []byte(details.value)}})
		switch {
		case stored.Problem != "":
			return "the stored record cannot be read: " + stored.Problem
		case stored.Developer != p.app.Developer:
			return fmt.Sprintf("the app belongs to developer %q in the store, to %q here", stored.Developer, p.app.Developer)
		}
	}
	name := p.nameIndex(p.app.Name)
	indexed, taken := p.view[name]
	if taken && indexed.value != string(p.app.ID) {
		return fmt.Sprintf("developer %q has another app of this name, %q: %s", p.app.Developer, indexed.value, name)
	}
	known := there || taken
	if known && !there && !p.overwrite {
		p.items = append(p.items, Item{Action: Kept, Kind: rec.Kind, Whole: true, Path: path, Stored: "absent",
			Reason: "the app was in the store and its record has been deleted"})
		return ""
	}

	p.developer()
	stored, _ := p.object(path)
	listed := keyIDs(stored)
	ids := make([]string, 0, len(p.app.Credentials))
	mentioned := make(map[string]bool, len(p.app.Credentials))
	onList := make(map[string]bool, len(listed))
	for _, id := range listed {
		onList[id] = true
	}
	for _, c := range p.app.Credentials {
		id := c.Key.String()
		mentioned[id] = true
		if p.credential(c, onList[id]) {
			ids = append(ids, id)
		}
	}
	var more []string // that the submission does not mention
	for _, id := range listed {
		if !mentioned[id] {
			mentioned[id] = true
			more = append(more, id)
		}
	}
	ids = append(ids, more...)
	for _, path := range p.under(p.space.IndexAppKeys(p.org, p.app.ID)) {
		if id := path[strings.LastIndexByte(path, '/')+1:]; !mentioned[id] {
			more = append(more, id)
		}
	}
	for _, id := range more {
		if key, err := authz.ParseKeyID(id); err == nil {
			p.kept(keyspace.KindKey, p.space.Details(keyspace.KeyRecord(p.org, key)), "", "", "the credential is not in what is imported")
		}
	}

	value := merge(jsonobject.Object{}.With(keyspace.MemberVersion, keyspace.Version), p.app.Details.With(catalog.MemberCredentials, ids), stored)
	g := group{order: apps}
	action := p.put(&g, path, value)
	if p.flag(&g, rec.Kind, p.space.Status(rec), p.app.Status, known) && action == Unchanged {
		action = Changed
	}
	p.index(&g, name, string(p.app.ID))
	if old := p.storedName(); old != "" && old != p.app.Name {
		if e, ok := p.view[p.nameIndex(old)]; ok && e.value == string(p.app.ID) {
			g.writes = append(g.writes, write{path: p.nameIndex(old), deletion: true})
		}
	}
	if len(g.writes) > 0 && action == Unchanged {
		action = Changed
	}
	p.add(g)
	p.items = append([]Item{{Action: action, Kind: rec.Kind, Whole: true, Path: path}}, p.items...)
	p.items = append(p.items, p.extra...)
	return ""
}

// developer creates the app's developer where there is none.
func (p *planner) developer() {
	rec := p.developerRecord()
	details, status := p.space.Details(rec), p.space.Status(rec)
	_, there := p.view[details]
	known := there || len(p.under(p.space.IndexDeveloperApps(p.org, p.app.Developer))) > 0
	item := Item{Kind: rec.Kind, Whole: true, Path: details}
	g := group{order: apps}
	switch {
	case !there && known && !p.overwrite:
		item.Action, item.Stored = Kept, "absent"
		item.Reason = "the developer was in the store and its record has been deleted"
	case !there:
		value := jsonobject.Object{}.With(keyspace.MemberVersion, keyspace.Version).With(keyspace.MemberDeveloper, p.app.Developer)
		item.Action = p.put(&g, details, value)
		if _, set := p.view[status]; !set {
			g.writes = append(g.writes, write{path: status, value: authz.StatusActive.String()})
		}
	}
	p.items = append(p.items, item)
	p.add(g)
}

// credential plans one of the app's. It tells whether it is the app's own.
// listed: the stored app names it.
func (p *planner) credential(c catalog.Credential, listed bool) bool {
	rec := keyspace.KeyRecord(p.org, c.Key)
	path := p.space.Details(rec)
	item := Item{Kind: rec.Kind, Whole: true, Path: path, Hint: c.Hint}
	details, there := p.view[path]
	if there {
		stored := p.space.Credential([]keyspace.Entry{{Key: path, Value: []byte(details.value)}})
		switch {
		case stored.Problem != "":
			item.Reason = "the stored record cannot be read: " + stored.Problem
		case stored.App != p.app.ID:
			item.Reason = fmt.Sprintf("the key belongs to app %q in the store", stored.App)
		case stored.Developer != p.app.Developer:
			item.Reason = fmt.Sprintf("the key belongs to developer %q in the store, its app to %q", stored.Developer, p.app.Developer)
		}
		if item.Reason != "" {
			item.Action = Refused
			p.items = append(p.items, item)
			return false
		}
	}
	_, indexed := p.view[p.keyIndex(c.Key)]
	known := there || indexed || listed
	if known && !there && !p.overwrite {
		item.Action, item.Stored = Kept, "absent"
		item.Reason = "the credential was in the store and its record has been deleted"
		p.items = append(p.items, item)
		return true
	}

	// The flags of the products, each with its index.
	stored, _ := p.object(path)
	listedProducts := productRefs(stored)
	refs := make([]jsonobject.Object, 0, len(c.Products))
	touched := false
	for _, ref := range c.Products {
		refs = append(refs, ref.Details.With(catalog.MemberProduct, ref.Name))
		index := p.productIndex(ref.Name, c.Key)
		_, onKey := p.view[index]
		for _, l := range listedProducts {
			onKey = onKey || l.name == ref.Name
		}
		g := group{order: products, guards: []string{path}}
		p.flag(&g, rec.Kind, p.space.KeyProduct(rec, ref.Name), ref.Status, onKey)
		if ref.Status != authz.StatusApproved {
			g.order = closing
		}
		p.index(&g, index, "")
		touched = touched || len(g.writes) > 0
		p.add(g)
	}
	named := func(name authz.ProductName) bool {
		return slices.ContainsFunc(c.Products, func(ref catalog.ProductRef) bool { return ref.Name == name })
	}
	for _, l := range listedProducts {
		if !named(l.name) {
			refs = append(refs, l.ref)
		}
	}
	for _, flag := range p.under(p.space.Folder(rec) + "products/") {
		if at, err := p.space.Parse(flag); err == nil && !named(at.Product) {
			p.kept(rec.Kind, flag, shorten(p.view[flag].value), "", "the product is not in what is imported")
		}
	}

	// The credential itself. While it is new it opens nothing before its
	// details are there: they, its status and its index go together.
	o := c.Details
	if old, ok := stored.Get(catalog.MemberExpiresAt); ok && !p.overwrite {
		if now, _ := o.Get(catalog.MemberExpiresAt); string(now) != string(old) {
			p.kept(rec.Kind, path, catalog.MemberExpiresAt+" "+string(old), catalog.MemberExpiresAt+" "+string(now), "the expiry in the store stays")
			o = o.With(catalog.MemberExpiresAt, old)
		}
	}
	head := jsonobject.Object{}.
		With(keyspace.MemberVersion, keyspace.Version).
		With(keyspace.MemberApp, p.app.ID).
		With(keyspace.MemberDeveloper, p.app.Developer)
	if c.Hint != "" {
		head = head.With(catalog.MemberHint, c.Hint)
	}
	gate := group{order: keys, guards: []string{path}}
	item.Action = p.put(&gate, path, merge(head, o.With(catalog.MemberProducts, refs), stored))
	flag := &gate
	if there && c.Status != authz.StatusApproved {
		flag = &group{order: closing, guards: []string{path}}
	}
	p.flag(flag, rec.Kind, p.space.Status(rec), c.Status, known)
	p.index(&gate, p.keyIndex(c.Key), "")
	if flag != &gate {
		touched = touched || len(flag.writes) > 0
		p.add(*flag)
	}
	p.add(gate)
	if item.Action == Unchanged && (touched || len(gate.writes) > 0) {
		item.Action = Changed
	}
	p.items = append(p.items, item)
	return true
}

// flag plans a status. known: it, or what it belongs to, has been in the store,
// so if it is absent it has been deleted. It tells whether it writes.
func (p *planner) flag(g *group, kind keyspace.Kind, path string, status authz.Status, known bool) bool {
	stored, there := p.view[path]
	word := status.String()
	switch {
	case there && stored.value == word:
		return false
	case !there && !known:
		g.writes = append(g.writes, write{path: path, value: word})
		return true
	}
	was := shorten(stored.value)
	if !there {
		was = "absent"
	}
	if !p.overwrite {
		p.kept(kind, path, was, word, "the status in the store stays")
		return false
	}
	g.writes = append(g.writes, write{path: path, value: word})
	p.extra = append(p.extra, Item{Action: Changed, Kind: kind, Path: path, Stored: was, Submitted: word})
	return true
}

// shorten a value that should have been a word.
func shorten(value string) string {
	if len(value) > 24 {
		return fmt.Sprintf("%q… (%d bytes)", value[:24], len(value))
	}
	if strings.Trim(value, "abcdefghijklmnopqrstuvwxyz") == "" && value != "" {
		return value
	}
	return fmt.Sprintf("%q", value)
}

func (p *planner) kept(kind keyspace.Kind, path, stored, submitted, reason string) {
	p.extra = append(p.extra, Item{Action: Kept, Kind: kind, Path: path, Stored: stored, Submitted: submitted, Reason: reason})
}

// put plans a JSON value, if it is not there already.
func (p *planner) put(g *group, path string, o jsonobject.Object) Action {
	value, err := o.MarshalJSON()
	if err != nil { // every member is valid JSON, or was made here
		panic("ledger: " + err.Error())
	}
	stored, there := p.view[path]
	switch {
	case !there:
		g.writes = append(g.writes, write{path: path, value: string(value)})
		return Created
	case stored.value != string(value):
		g.writes = append(g.writes, write{path: path, value: string(value)})
		return Changed
	}
	return Unchanged
}

// index plans an index's value, if it is not there already.
func (p *planner) index(g *group, path, value string) {
	if e, there := p.view[path]; !there || e.value != value {
		g.writes = append(g.writes, write{path: path, value: value})
	}
}

func (p *planner) add(g group) {
	if len(g.writes) > 0 {
		p.groups = append(p.groups, g)
	}
}

// under returns the paths below a prefix that were read, in order.
func (p *planner) under(prefix string) []string {
	from, _ := slices.BinarySearch(p.paths, prefix)
	to := from
	for to < len(p.paths) && strings.HasPrefix(p.paths[to], prefix) {
		to++
	}
	return p.paths[from:to]
}

// merge returns head, then the members of o, then those of stored that neither
// has.
func merge(head, o, stored jsonobject.Object) jsonobject.Object {
	m := append(head[:len(head):len(head)], o...)
	for _, s := range stored {
		if _, ok := m.Get(s.Name); !ok {
			m = append(m, s)
		}
	}
	return m
}

// keyIDs that a stored app lists.
func keyIDs(app jsonobject.Object) (ids []string) {
	raw, _ := app.Get(catalog.MemberCredentials)
	if json.Unmarshal(raw, &ids) != nil {
		return nil
	}
	return ids
}

type storedRef struct {
	name authz.ProductName
	ref  jsonobject.Object
}

// productRefs that a stored credential lists.
func productRefs(credential jsonobject.Object) (refs []storedRef) {
	raw, _ := credential.Get(catalog.MemberProducts)
	var objects []jsonobject.Object
	if json.Unmarshal(raw, &objects) != nil {
		return nil
	}
	for _, o := range objects {
		var name authz.ProductName
		if raw, _ := o.Get(catalog.MemberProduct); json.Unmarshal(raw, &name) == nil {
			refs = append(refs, storedRef{name, o})
		}
	}
	return refs
}
