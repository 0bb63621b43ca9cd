package ledger

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

// planner works out what one attempt to import an app, a developer or an API
// product writes, from what was read.
type planner struct {
	space     keyspace.Space
	org       authz.Organization
	seal      *seal.Keyring
	overwrite bool
	in        catalog.Submission
	app       catalog.App // of in, if it is one

	view   view     // all that reads and readsAfter asked for
	paths  []string // of the view, sorted
	groups []group
	items  []Item
	extra  []Item // behind the items
}

// record that the submission is about.
func (p *planner) record() keyspace.Record {
	switch {
	case p.in.Developer != nil:
		return keyspace.DeveloperRecord(p.org, p.in.Developer.ID)
	case p.in.Product != nil:
		return keyspace.ProductRecord(p.org, p.in.Product.Name)
	}
	return p.appRecord()
}

// check tells what is wrong with the submission by itself.
func (p *planner) check() error {
	switch {
	case p.in.Developer != nil:
		return p.in.Developer.Validate()
	case p.in.Product != nil:
		return p.in.Product.Validate()
	}
	return p.app.Validate()
}

// reads are every path that the plan looks at.
func (p *planner) reads() []clientv3.Op {
	switch {
	case p.in.Developer != nil:
		return []clientv3.Op{
			clientv3.OpGet(p.space.Folder(p.record()), clientv3.WithPrefix()),
			clientv3.OpGet(p.space.IndexDeveloperApps(p.org, p.in.Developer.ID), clientv3.WithPrefix(), clientv3.WithLimit(1)),
			clientv3.OpGet(p.emailIndex(p.in.Developer.Email)),
		}
	case p.in.Product != nil:
		return []clientv3.Op{clientv3.OpGet(p.space.Details(p.record()))}
	}
	return p.readsApp()
}

// readsAfter are those that what was read tells of: where the index has an older
// name or e-mail address.
func (p *planner) readsAfter() []clientv3.Op {
	switch {
	case p.in.Developer != nil:
		if old := p.stored(catalog.MemberEmail); old != "" && old != p.in.Developer.Email {
			return []clientv3.Op{clientv3.OpGet(p.emailIndex(old))}
		}
	case p.in.App != nil:
		if old := p.stored(catalog.MemberName); old != "" && old != p.app.Name {
			return []clientv3.Op{clientv3.OpGet(p.nameIndex(old))}
		}
	}
	return nil
}

// plan fills groups and items. A reason refuses what was handed in.
func (p *planner) plan() (reason string) {
	p.paths = slices.Sorted(maps.Keys(p.view))
	switch {
	case p.in.Developer != nil:
		return p.planDeveloper()
	case p.in.Product != nil:
		return p.planProduct()
	}
	return p.planApp()
}

func (p *planner) appRecord() keyspace.Record { return keyspace.AppRecord(p.org, p.app.ID) }
func (p *planner) developerRecord() keyspace.Record {
	return keyspace.DeveloperRecord(p.org, p.app.Developer)
}

// nameIndex is the path that an app's name has in the index.
func (p *planner) nameIndex(name string) string {
	return p.space.IndexDeveloperApp(p.org, p.app.Developer, name)
}

// emailIndex is the path that an e-mail address has in the index.
func (p *planner) emailIndex(email string) string { return p.space.IndexEmail(p.org, email) }

func (p *planner) keyIndex(id authz.KeyID) string {
	return p.space.IndexAppKeys(p.org, p.app.ID) + id.String()
}

func (p *planner) productIndex(name authz.ProductName, id authz.KeyID) string {
	return p.space.IndexProductKeys(p.org, name) + id.String()
}

func (p *planner) readsApp() []clientv3.Op {
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
	return ops
}

// stored text of a member of the record, empty if there is none to be read.
func (p *planner) stored(member string) (text string) {
	o, _ := p.object(p.space.Details(p.record()))
	raw, _ := o.Get(member)
	if json.Unmarshal(raw, &text) != nil {
		return ""
	}
	return text
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

func (p *planner) planApp() (reason string) {
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
	if old := p.stored(catalog.MemberName); old != "" && old != p.app.Name {
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

func (p *planner) planDeveloper() (reason string) {
	d, rec := p.in.Developer, p.record()
	path, status := p.space.Details(rec), p.space.Status(rec)
	details, there := p.view[path]
	if there {
		if stored := p.space.Developer([]keyspace.Entry{{Key: path, Value: []byte(details.value)}}); stored.Problem != "" {
			return "the stored record cannot be read: " + stored.Problem
		}
	}
	email := p.emailIndex(d.Email)
	indexed, taken := p.view[email]
	if taken && indexed.value != string(d.ID) {
		return fmt.Sprintf("another developer has this e-mail address, %q: %s", indexed.value, email)
	}
	known := there || taken || len(p.under(p.space.IndexDeveloperApps(p.org, d.ID))) > 0
	if known && !there && !p.overwrite {
		p.items = append(p.items, p.deletedDeveloper(path))
		return ""
	}
	stored, _ := p.object(path)
	value := merge(jsonobject.Object{}.With(keyspace.MemberVersion, keyspace.Version), d.Details, stored)
	g := group{order: apps}
	action := p.put(&g, path, value)
	if flag := p.view[status]; there && p.guessed(details, flag) && flag.value != d.Status.String() {
		g.writes = append(g.writes, write{path: status, value: d.Status.String()})
	} else {
		p.flag(&g, rec.Kind, status, d.Status, known)
	}
	p.index(&g, email, string(d.ID))
	if old := p.stored(catalog.MemberEmail); old != "" && old != d.Email {
		if e, ok := p.view[p.emailIndex(old)]; ok && e.value == string(d.ID) {
			g.writes = append(g.writes, write{path: p.emailIndex(old), deletion: true})
		}
	}
	if len(g.writes) > 0 && action == Unchanged {
		action = Changed
	}
	p.add(g)
	p.items = append([]Item{{Action: action, Kind: rec.Kind, Whole: true, Path: path}}, p.extra...)
	return ""
}

// guessed tells whether the status of a developer is still the one that it got
// from the app that brought it: both were written together, and nothing is known
// of the developer but its id.
func (p *planner) guessed(details, status entry) bool {
	return status.value == authz.StatusActive.String() && status.rev == details.rev && p.stored(catalog.MemberEmail) == ""
}

func (p *planner) planProduct() (reason string) {
	path := p.space.Details(p.record())
	stored, readable := p.object(path)
	version, _ := stored.Get(keyspace.MemberVersion)
	if _, there := p.view[path]; there && (!readable || string(version) != strconv.Itoa(keyspace.Version)) {
		return fmt.Sprintf("the stored record cannot be read: want a JSON object whose %q is %d", keyspace.MemberVersion, keyspace.Version)
	}
	g := group{order: apps}
	action := p.put(&g, path, merge(jsonobject.Object{}.With(keyspace.MemberVersion, keyspace.Version), p.in.Product.Details, stored))
	p.add(g)
	p.items = []Item{{Action: action, Kind: keyspace.KindProduct, Whole: true, Path: path}}
	return ""
}

func (p *planner) deletedDeveloper(path string) Item {
	return Item{Action: Kept, Kind: keyspace.KindDeveloper, Whole: true, Path: path, Stored: "absent",
		Reason: "the developer was in the store and its record has been deleted"}
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
		item = p.deletedDeveloper(details)
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
	for _, m := range []struct {
		name, what string
		plain      catalog.Secret
	}{
		{catalog.MemberSealedKey, catalog.MemberKey, c.PlainKey},
		{catalog.MemberSealedSecret, catalog.MemberSecret, c.PlainSecret},
	} {
		if sealed := p.sealed(stored, m.name, sealContext(m.what, c.Key), m.plain.Reveal()); sealed != "" {
			head = head.With(m.name, sealed)
		}
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

// sealed is what a member of the stored credential is to hold: what it holds, if
// that opens to plain or if there is nothing to seal, else plain, sealed.
func (p *planner) sealed(stored jsonobject.Object, name, context, plain string) string {
	var old string
	if raw, ok := stored.Get(name); ok && json.Unmarshal(raw, &old) != nil {
		old = ""
	}
	if p.seal == nil || plain == "" {
		return old
	}
	if opened, err := p.seal.Open(old, context); err == nil && opened == plain {
		return old
	}
	return p.seal.Seal(plain, context)
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
		g.object = p.space.Details(p.record())
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
