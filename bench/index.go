package main

import (
	"context"
	"math/rand/v2"
	"runtime"
	"time"

	"keygate/authz"
	"keygate/statestore/index"
	"keygate/statestore/keyspace"
)

// lookups of one measurement.
const lookups = 1_000_000

// runIndex feeds the index, and a Go map of the same records, in this process:
// what a record costs in memory, what the garbage collector then has to do, and
// what a look-up takes. Ten million keys are more than one etcd holds.
func runIndex(ctx context.Context, b *bench) (*Result, error) {
	result := &Result{
		Title: "The index by itself",
		About: []string{
			"The index is fed the values of etcd, one by one, in this process. Beside it the same records as Go structs in maps: keys by their SHA-256, apps and developers by organization and name, one map of products for each key.",
			"Memory is what is live on the heap after a collection, divided by all records: keys, apps and developers. A look-up is that of one of the keys, at random, with its app and developer.",
		},
	}
	for _, count := range b.keys {
		t := Table{Title: number(float64(count)) + " keys", Subjects: []string{"map", "index"}, Figures: []Figure{
			{Name: "heap a record", Unit: "B"}, {Name: "full GC cycle", Unit: "ms"}, {Name: "look-up", Unit: "ns"}, {Name: "built in", Unit: "s"},
		}}
		for f := range t.Figures {
			t.Figures[f].Values = make([][]float64, len(t.Subjects))
		}
		for round := range b.rounds {
			for i, hold := range []func(int) holder{newMapHolder, newIndexHolder} {
				found := measureHolder(hold, count)
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				for f, v := range found {
					t.Figures[f].Values[i] = append(t.Figures[f].Values[i], v)
				}
				b.progress("round %d/%d, %d keys, %s: %s bytes a record, GC %s ms, look-up %s ns, built in %s s", round+1, b.rounds, count, t.Subjects[i],
					number(found[0]), number(found[1]), number(found[2]), number(found[3]))
			}
		}
		result.Tables = append(result.Tables, t)
	}
	return result, nil
}

// holder holds the records of the bench's world.
type holder interface {
	put(path, value string)
	done()
	// get tells whether the key, its app and its developer are there and open.
	get(id authz.KeyID) bool
	records() int
}

// measureHolder fills a holder with count keys and what they hang on. The
// figures are those of the table, in its order.
func measureHolder(hold func(int) holder, count int) [4]float64 {
	before := liveHeap()
	began := time.Now()
	h := hold(count)
	world(0, count, h.put)
	h.done()
	built := time.Since(began)
	heap := liveHeap() - before

	began = time.Now()
	const cycles = 3
	for range cycles {
		runtime.GC()
	}
	cycle := time.Since(began) / cycles

	ids := make([]authz.KeyID, min(count, 100_000))
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range ids {
		ids[i] = keyRecord(keyText(rnd.IntN(count))).Key
	}
	began = time.Now()
	for i := range lookups {
		if !h.get(ids[i%len(ids)]) {
			panic("a key of the bench's world is not there")
		}
	}
	took := time.Since(began)
	return [4]float64{float64(heap) / float64(h.records()), ms(cycle), float64(took) / lookups, built.Seconds()}
}

// liveHeap is what a collection leaves, in bytes.
func liveHeap() int64 {
	runtime.GC()
	runtime.GC() // what the first one only made free
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// indexPart is how many values are put between two times that readers could come
// in.
const indexPart = 64

type indexHolder struct {
	x    *index.Index
	part []index.Change
	rev  int64
}

func newIndexHolder(int) holder { return &indexHolder{x: index.New()} }

func (h *indexHolder) put(path, value string) {
	p, err := space.Parse(path)
	if err != nil {
		panic(err) // of the bench's own making
	}
	h.rev++
	if h.part = append(h.part, index.Put(p, path, []byte(value), h.rev)); len(h.part) == indexPart {
		h.flush()
	}
}

func (h *indexHolder) flush() {
	h.x.Begin()
	for _, c := range h.part {
		h.x.List(c)
	}
	h.x.End(h.rev)
	h.part = h.part[:0]
}

func (h *indexHolder) done() { h.flush(); h.part = nil; h.x.Complete() }

func (h *indexHolder) get(id authz.KeyID) bool {
	r, ok := h.x.Records(organization, id)
	return ok && r.Developer.Status.Status == authz.StatusActive && r.Credential.Status.Status == authz.StatusApproved
}

func (h *indexHolder) records() int { s := h.x.Size(); return s.Keys + s.Apps }

// mapHolder is what one would write first.
type mapHolder struct {
	keys       map[authz.KeyID]*authz.Credential
	apps       map[name]*authz.App
	developers map[name]*authz.Developer
}

type name struct {
	org  authz.Organization
	name string
}

func newMapHolder(count int) holder {
	return &mapHolder{make(map[authz.KeyID]*authz.Credential, count), map[name]*authz.App{}, map[name]*authz.Developer{}}
}

func (h *mapHolder) put(path, value string) {
	p, err := space.Parse(path)
	if err != nil {
		panic(err) // of the bench's own making
	}
	r := p.Record
	at := name{r.Organization, r.Name}
	switch {
	case r.Kind == keyspace.KindKey:
		c := h.keys[r.Key]
		if c == nil {
			c = &authz.Credential{Exists: true, Products: map[authz.ProductName]authz.Flag{}}
			h.keys[r.Key] = c
		}
		switch p.Field {
		case keyspace.FieldStatus:
			c.Status = keyspace.ParseStatus([]byte(value))
		case keyspace.FieldProduct:
			c.Products[p.Product] = keyspace.ParseStatus([]byte(value))
		case keyspace.FieldDetails:
			keyspace.ReadCredential(c, []byte(value))
		}
	case r.Kind == keyspace.KindApp:
		if h.apps[at] == nil {
			h.apps[at] = &authz.App{Exists: true}
		}
		if p.Field == keyspace.FieldStatus {
			h.apps[at].Status = keyspace.ParseStatus([]byte(value))
		} else {
			keyspace.ReadApp(h.apps[at], []byte(value))
		}
	case r.Kind == keyspace.KindDeveloper:
		if h.developers[at] == nil {
			h.developers[at] = &authz.Developer{Exists: true}
		}
		if p.Field == keyspace.FieldStatus {
			h.developers[at].Status = keyspace.ParseDeveloperStatus([]byte(value))
		} else {
			keyspace.ReadDeveloper(h.developers[at], []byte(value))
		}
	}
}

func (h *mapHolder) done() {}

func (h *mapHolder) get(id authz.KeyID) bool {
	c := h.keys[id]
	if c == nil {
		return false
	}
	a := h.apps[name{organization, string(c.App)}]
	if a == nil {
		return false
	}
	d := h.developers[name{organization, string(a.Developer)}]
	return d != nil && d.Status.Status == authz.StatusActive && c.Status.Status == authz.StatusApproved
}

func (h *mapHolder) records() int { return len(h.keys) + len(h.apps) + len(h.developers) }
