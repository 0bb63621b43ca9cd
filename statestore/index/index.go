// Package index is an exact copy of all records that checks read, as they are
// at one revision of the store, in little memory and with few pointers.
//
// A copy in which every record is present answers for the keys that do not
// exist as well as for those that do, without asking anybody. It is exact
// because it is built of whole states and every change after them: whoever
// feeds it lists the store and applies each event of a watch (see [Index.List]).
//
// Memory. A record is a row of fixed size without pointers; what is shared is
// kept once: names in an arena (names.go), sets of products as maps, of which
// there are few. So the garbage collector passes over almost all of it, and a
// million keys take about 100 MB.
//
// Concurrency. A reader takes one of several locks, so that readers on
// different processors do not meet; a writer takes all of them. All records of
// one answer are therefore of one revision: a state that existed.
package index

import (
	"encoding/binary"
	"slices"
	"strings"
	"sync"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

// readLocks is how many readers can enter without meeting on one lock.
const readLocks = 16

// Index is the copy. Make it with New. All methods are safe for concurrent use;
// those that write are called between Begin and End.
type Index struct {
	locks [readLocks]paddedLock
	write sync.Mutex // held by a writer, before the locks

	// What follows is read under one of locks, and written under all of them.

	revision int64
	complete bool

	keys     rows[keyRow]
	entities rows[entityRow] // apps and developers
	byKey    table           // of keys, by id
	byName   table           // of entities, by kind, organization and name
	names    names
	sets     productSets

	// others are the keys of the store that belong to a record and mean nothing: a
	// record exists as long as one of them does.
	others map[owner]map[string]bool
	// touched are the keys of the store that were changed since the copy was begun;
	// nil once it is complete. What a list says of them may be older.
	touched map[string]bool
}

// paddedLock has a cache line of its own.
type paddedLock struct {
	sync.RWMutex
	_ [64 - 24]byte
}

// owner is the row that a key of the store belongs to.
type owner struct {
	kind keyspace.Kind
	row  uint32
}

// keyRow is a credential. Names are numbers of Index.names, 0 for none. What it
// belongs to is named by the row: a look-up goes from row to row, each of which
// is in no cache of the processor when there are many.
type keyRow struct {
	id        authz.KeyID
	expiresAt int64
	details   int64 // revision at which the details were written
	flag      flag
	org       uint32
	app       uint32 // number of a row, 0 for none
	developer uint32 // likewise
	scopes    uint32
	products  uint32 // number of a set
	problem   uint32 // of the details
}

// entityRow is an app or a developer: one that is stored, or that a stored record
// names. Row 0 is none.
type entityRow struct {
	flag      flag
	org, name uint32
	developer uint32 // of an app: number of a row, 0 for none
	problem   uint32
	uses      uint32 // rows that name it
	kind      keyspace.Kind
}

// flag is a record's status and which of its parts are stored.
type flag struct {
	problem uint32
	status  authz.Status
	parts   parts
}

// parts of a record that are stored. A row without any is free.
type parts uint8

const (
	partStatus parts = 1 << iota
	partDetails
	partOthers
)

// New returns an empty copy, which is not complete.
func New() *Index {
	x := &Index{others: map[owner]map[string]bool{}, touched: map[string]bool{}}
	x.names.init()
	x.sets.init()
	x.entities.add()
	return x
}

// Begin locks everybody else out until End.
func (x *Index) Begin() {
	x.write.Lock()
	for i := range x.locks {
		x.locks[i].Lock()
	}
}

// End says that all changes up to revision rev have been applied, and lets the
// others in. 0 says nothing of it, as between two parts of a list.
func (x *Index) End(rev int64) {
	x.revision = max(x.revision, rev)
	for i := range x.locks {
		x.locks[i].Unlock()
	}
	x.write.Unlock()
}

// Complete says that the list has ended, and that all changes since the list
// began, up to its revision at least, have been applied: from now on Records
// answers.
func (x *Index) Complete() {
	x.Begin()
	x.complete, x.touched = true, nil
	x.End(0)
}

// Size is what a copy holds.
type Size struct {
	Keys int
	// Apps and developers, those included that are only named.
	Apps int
	// Touched keys of the store, while the copy is not complete.
	Touched  int
	Complete bool
	Revision int64
}

// Size returns the numbers of now.
func (x *Index) Size() Size {
	x.locks[0].RLock()
	defer x.locks[0].RUnlock()
	return Size{Keys: x.keys.len(), Apps: x.entities.len() - 1, Touched: len(x.touched), Complete: x.complete, Revision: x.revision}
}

// Records returns the credential of a key with its app and developer, and the
// revision of which they are. It is false while the copy is not complete. The
// result refers to memory that is never written again. It allocates nothing.
func (x *Index) Records(org authz.Organization, id authz.KeyID) (r authz.Records, ok bool) {
	lock := &x.locks[id[0]%readLocks]
	lock.RLock()
	defer lock.RUnlock()
	if !x.complete {
		return r, false
	}
	r.Revision = x.revision
	n, found := x.findKey(org, &id)
	if !found {
		return r, true
	}
	k := x.keys.at(n)
	x.credential(k, &r.Credential)
	a := x.entities.at(k.app)
	if a.flag.parts == 0 {
		return r, true
	}
	x.app(a, &r.App)
	if d := x.entities.at(a.developer); d.flag.parts != 0 {
		x.developer(d, &r.Developer)
	}
	return r, true
}

func (x *Index) credential(k *keyRow, c *authz.Credential) {
	c.Exists = true
	c.Status = x.status(k.flag)
	c.Products = x.sets.at(k.products)
	c.App = authz.AppID(x.names.at(x.entities.at(k.app).name))
	c.Developer = authz.DeveloperID(x.names.at(x.entities.at(k.developer).name))
	c.ExpiresAt, c.Revision = k.expiresAt, k.details
	c.Scopes, c.Problem = x.names.at(k.scopes), x.names.at(k.problem)
}

func (x *Index) app(e *entityRow, a *authz.App) {
	a.Exists = true
	a.Status = x.status(e.flag)
	a.Developer, a.Problem = authz.DeveloperID(x.names.at(x.entities.at(e.developer).name)), x.names.at(e.problem)
}

func (x *Index) developer(e *entityRow, d *authz.Developer) {
	d.Exists = true
	d.Status, d.Problem = x.status(e.flag), x.names.at(e.problem)
}

func (x *Index) status(f flag) authz.Flag {
	return authz.Flag{Status: f.status, Problem: x.names.at(f.problem)}
}

func (x *Index) findKey(org authz.Organization, id *authz.KeyID) (n uint32, ok bool) {
	for p := x.byKey.probe(keyHash(id)); p.next(); {
		if k := x.keys.at(p.row); k.id == *id && x.names.at(k.org) == string(org) {
			return p.row, true
		}
	}
	return 0, false
}

func (x *Index) findEntity(kind keyspace.Kind, org, name uint32) (n uint32, ok bool) {
	for p := x.byName.probe(entityHash(kind, org, name)); p.next(); {
		if e := x.entities.at(p.row); e.name == name && e.org == org && e.kind == kind {
			return p.row, true
		}
	}
	return 0, false
}

// keyHash is a piece of a SHA-256: nobody who does not choose the stored keys
// can choose what it collides with.
func keyHash(id *authz.KeyID) uint64 { return binary.LittleEndian.Uint64(id[:8]) }

func entityHash(kind keyspace.Kind, org, name uint32) uint64 {
	h := uint64(name)<<32 | uint64(org)<<8 | uint64(kind)
	h *= 0x9e3779b97f4a7c15
	h ^= h >> 29
	return h * 0xbf58476d1ce4e5b9
}

// Change is what became of one key of the store, decoded: with locks held there
// is then nothing to do that takes long.
type Change struct {
	path     keyspace.Path
	key      string // of the store
	revision int64
	deleted  bool

	flag       authz.Flag
	credential authz.Credential
	app        authz.App
	developer  authz.Developer
}

// Put is the change that a value was written at a revision. It copies nothing
// of value.
func Put(path keyspace.Path, key string, value []byte, revision int64) Change {
	c := Change{path: path, key: key, revision: revision}
	switch {
	case path.Field == keyspace.FieldProduct:
		c.flag = keyspace.ParseStatus(value)
	case path.Field == keyspace.FieldStatus && path.Record.Kind == keyspace.KindDeveloper:
		c.flag = keyspace.ParseDeveloperStatus(value)
	case path.Field == keyspace.FieldStatus:
		c.flag = keyspace.ParseStatus(value)
	case path.Field == keyspace.FieldDetails:
		switch path.Record.Kind {
		case keyspace.KindKey:
			keyspace.ReadCredential(&c.credential, value)
		case keyspace.KindApp:
			keyspace.ReadApp(&c.app, value)
		case keyspace.KindDeveloper:
			keyspace.ReadDeveloper(&c.developer, value)
		}
	}
	return c
}

// Delete is the change that a key was deleted at a revision.
func Delete(path keyspace.Path, key string, revision int64) Change {
	return Change{path: path, key: key, revision: revision, deleted: true}
}

// List takes a part of a list of the store into a copy that is not complete.
// Between Begin and End.
//
// A list and the changes may come in any order as long as every change is
// applied whose revision is above that of the list, in their own order, and the
// copy is completed when all up to the list's revision have been: a key that a
// change has touched keeps what the change says, which is at least as new as
// what a later change says or as the list.
func (x *Index) List(c Change) {
	if !x.touched[c.key] {
		x.apply(c)
	}
}

// Apply takes a change. Between Begin and End; changes in their order.
func (x *Index) Apply(c Change) {
	if x.touched != nil { // not complete yet
		x.touched[c.key] = true
	}
	x.apply(c)
}

func (x *Index) apply(c Change) {
	switch c.path.Record.Kind {
	case keyspace.KindKey:
		x.applyKey(c)
	case keyspace.KindApp, keyspace.KindDeveloper:
		x.applyEntity(c)
	}
}

func (x *Index) applyKey(c Change) {
	org, id := c.path.Record.Organization, c.path.Record.Key
	n, found := x.findKey(org, &id)
	if !found {
		if c.deleted {
			return
		}
		n = x.keys.add()
		k := x.keys.at(n)
		*k = keyRow{id: id, org: x.names.intern(string(org))}
		x.setStatus(&k.flag, authz.Flag{}, true)
		x.setCredential(k, authz.Credential{}, 0, true)
		x.byKey.insert(keyHash(&id), n, func(n uint32) uint64 { return keyHash(&x.keys.at(n).id) })
	}
	k := x.keys.at(n)
	switch c.path.Field {
	case keyspace.FieldStatus:
		x.setStatus(&k.flag, c.flag, c.deleted)
	case keyspace.FieldProduct:
		k.products = x.sets.with(k.products, c.path.Product, c.flag, c.deleted)
	case keyspace.FieldDetails:
		x.setCredential(k, c.credential, c.revision, c.deleted)
	case keyspace.FieldOther:
		x.setOther(&k.flag, owner{keyspace.KindKey, n}, c)
	}
	if k.flag.parts == 0 && k.products == 0 {
		x.byKey.remove(keyHash(&id), n)
		for _, name := range []uint32{k.org, k.scopes, k.problem, k.flag.problem} {
			x.names.release(name)
		}
		x.unlink(k.app)
		x.unlink(k.developer)
		x.keys.free(n)
	}
}

func (x *Index) applyEntity(c Change) {
	record := c.path.Record
	org, name := x.names.find(string(record.Organization)), x.names.find(record.Name)
	n, found := uint32(0), false
	if org > 0 && name > 0 {
		n, found = x.findEntity(record.Kind, org, name)
	}
	if !found {
		if c.deleted {
			return
		}
		n = x.addEntity(record.Kind, string(record.Organization), record.Name)
	}
	e := x.entities.at(n)
	switch c.path.Field {
	case keyspace.FieldStatus:
		x.setStatus(&e.flag, c.flag, c.deleted)
	case keyspace.FieldDetails:
		x.setEntity(e, c)
	default:
		x.setOther(&e.flag, owner{record.Kind, n}, c)
	}
	x.dropUnused(n)
}

func (x *Index) addEntity(kind keyspace.Kind, org, name string) uint32 {
	n := x.entities.add()
	e := x.entities.at(n)
	*e = entityRow{kind: kind, org: x.names.intern(org), name: x.names.intern(name)}
	x.setStatus(&e.flag, authz.Flag{}, true)
	x.setEntity(e, Change{deleted: true})
	x.byName.insert(entityHash(e.kind, e.org, e.name), n, func(n uint32) uint64 {
		e := x.entities.at(n)
		return entityHash(e.kind, e.org, e.name)
	})
	return n
}

// relink makes *n the number of the app or developer with a name, which then has
// one more use; 0 for no name.
func (x *Index) relink(n *uint32, kind keyspace.Kind, org uint32, name string) {
	if x.names.at(x.entities.at(*n).name) == name {
		return
	}
	old := *n
	if *n = 0; name != "" {
		found := false
		if number := x.names.find(name); number > 0 {
			*n, found = x.findEntity(kind, org, number)
		}
		if !found {
			*n = x.addEntity(kind, x.names.at(org), name)
		}
		x.entities.at(*n).uses++
	}
	x.unlink(old)
}

// unlink ends one use of an app or developer.
func (x *Index) unlink(n uint32) {
	if n > 0 {
		x.entities.at(n).uses--
		x.dropUnused(n)
	}
}

// dropUnused frees the row of an app or developer that is neither stored nor
// named.
func (x *Index) dropUnused(n uint32) {
	e := x.entities.at(n)
	if e.flag.parts != 0 || e.uses > 0 {
		return
	}
	x.byName.remove(entityHash(e.kind, e.org, e.name), n)
	for _, name := range []uint32{e.org, e.name, e.problem, e.flag.problem} {
		x.names.release(name)
	}
	x.unlink(e.developer)
	x.entities.free(n)
}

func (x *Index) setStatus(f *flag, to authz.Flag, absent bool) {
	if absent {
		to = keyspace.NoStatus
	}
	f.parts.set(partStatus, !absent)
	f.status = to.Status
	x.names.replace(&f.problem, to.Problem)
}

func (x *Index) setCredential(k *keyRow, to authz.Credential, revision int64, absent bool) {
	if absent {
		to, revision = keyspace.NoCredential(), 0
	}
	k.flag.parts.set(partDetails, !absent)
	k.expiresAt, k.details = to.ExpiresAt, revision
	x.relink(&k.app, keyspace.KindApp, k.org, string(to.App))
	x.relink(&k.developer, keyspace.KindDeveloper, k.org, string(to.Developer))
	x.names.replace(&k.scopes, to.Scopes)
	x.names.replace(&k.problem, to.Problem)
}

func (x *Index) setEntity(e *entityRow, c Change) {
	developer, problem := c.app.Developer, c.app.Problem
	if e.kind == keyspace.KindDeveloper {
		problem = c.developer.Problem
	}
	if c.deleted {
		developer, problem = "", keyspace.NoApp().Problem
		if e.kind == keyspace.KindDeveloper {
			problem = keyspace.NoDeveloper().Problem
		}
	}
	e.flag.parts.set(partDetails, !c.deleted)
	x.relink(&e.developer, keyspace.KindDeveloper, e.org, string(developer))
	x.names.replace(&e.problem, problem)
}

func (x *Index) setOther(f *flag, o owner, c Change) {
	keys := x.others[o]
	switch {
	case c.deleted:
		delete(keys, c.key)
	case keys == nil:
		x.others[o] = map[string]bool{c.key: true}
		keys = x.others[o]
	default:
		keys[c.key] = true
	}
	if len(keys) == 0 {
		delete(x.others, o)
	}
	f.parts.set(partOthers, len(keys) > 0)
}

func (p *parts) set(part parts, on bool) {
	if on {
		*p |= part
	} else {
		*p &^= part
	}
}

// productSets are the sets of products on keys, each kept once and never
// changed. Number 0 is the empty one.
type productSets struct {
	all  []productSet
	free []uint32
	byID map[string]uint32
	id   []byte // for with
}

type productSet struct {
	flags map[authz.ProductName]authz.Flag
	names []string // in order; nil for a number that is free
	id    string
	keys  int // that have it
}

func (s *productSets) init() {
	s.byID = map[string]uint32{}
	s.all = []productSet{{flags: map[authz.ProductName]authz.Flag{}}}
}

func (s *productSets) at(n uint32) map[authz.ProductName]authz.Flag { return s.all[n].flags }

// with returns the set of a key that has had set n once product has a flag, or
// has none if it is absent.
func (s *productSets) with(n uint32, product authz.ProductName, f authz.Flag, absent bool) uint32 {
	old := &s.all[n]
	at, there := slices.BinarySearch(old.names, string(product))
	if absent && !there || there && !absent && old.flags[product] == f {
		return n
	}
	s.id = s.id[:0]
	for _, name := range old.names[:at] {
		s.id = appendFlag(s.id, name, old.flags[authz.ProductName(name)])
	}
	if !absent {
		s.id = appendFlag(s.id, string(product), f)
	}
	rest := old.names[at:]
	if there {
		rest = rest[1:]
	}
	for _, name := range rest {
		s.id = appendFlag(s.id, name, old.flags[authz.ProductName(name)])
	}
	to, known := s.byID[string(s.id)]
	if len(s.id) == 0 {
		to, known = 0, true
	}
	if !known {
		// Strings of its own: what it was made of may be a part of something large.
		set := productSet{id: string(s.id), flags: make(map[authz.ProductName]authz.Flag, len(old.names)+1)}
		set.names = append(set.names, old.names[:at]...)
		if !absent {
			set.names = append(set.names, strings.Clone(string(product)))
		}
		set.names = append(set.names, rest...)
		for _, name := range set.names {
			set.flags[authz.ProductName(name)] = old.flags[authz.ProductName(name)]
		}
		if !absent {
			set.flags[authz.ProductName(set.names[at])] = f
		}
		to = s.add(set)
	}
	if to > 0 {
		s.all[to].keys++
	}
	s.release(n)
	return to
}

func (s *productSets) add(set productSet) (n uint32) {
	if last := len(s.free) - 1; last >= 0 {
		n, s.free = s.free[last], s.free[:last]
		s.all[n] = set
	} else {
		n = uint32(len(s.all))
		s.all = append(s.all, set)
	}
	s.byID[set.id] = n
	return n
}

func (s *productSets) release(n uint32) {
	if n == 0 {
		return
	}
	set := &s.all[n]
	if set.keys--; set.keys > 0 {
		return
	}
	delete(s.byID, set.id)
	*set = productSet{}
	s.free = append(s.free, n)
}

// appendFlag writes one product and its flag so that no two differ in it only by
// where one ends.
func appendFlag(b []byte, product string, f authz.Flag) []byte {
	b = binary.AppendUvarint(b, uint64(len(product)))
	b = append(b, product...)
	b = append(b, byte(f.Status))
	b = binary.AppendUvarint(b, uint64(len(f.Problem)))
	return append(b, f.Problem...)
}
