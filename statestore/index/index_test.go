package index_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"keygate/authz"
	"keygate/statestore/index"
	"keygate/statestore/keyspace"
)

var space = func() keyspace.Space {
	s, err := keyspace.New("/kg")
	if err != nil {
		panic(err)
	}
	return s
}()

// store is the keys and values of a store, and an index beside it.
type store struct {
	t      testing.TB
	values map[string]string
	mod    map[string]int64
	rev    int64
	x      *index.Index
}

func newStore(t testing.TB) *store {
	s := &store{t: t, values: map[string]string{}, mod: map[string]int64{}, rev: 1, x: index.New()}
	s.x.Begin()
	s.x.End(s.rev)
	s.x.Complete()
	return s
}

func (s *store) path(key string) keyspace.Path {
	s.t.Helper()
	p, err := space.Parse(key)
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

func (s *store) put(key, value string) {
	s.rev++
	s.values[key], s.mod[key] = value, s.rev
	s.x.Begin()
	s.x.Apply(index.Put(s.path(key), key, []byte(value), s.rev))
	s.x.End(s.rev)
}

func (s *store) delete(key string) {
	if _, ok := s.values[key]; !ok {
		return
	}
	s.rev++
	delete(s.values, key)
	s.x.Begin()
	s.x.Apply(index.Delete(s.path(key), key, s.rev))
	s.x.End(s.rev)
}

// want is what a read of the store makes of a key.
func (s *store) want(org authz.Organization, id authz.KeyID) (r authz.Records) {
	entries := func(rec keyspace.Record) (e []keyspace.Entry) {
		for key, value := range s.values {
			if p, err := space.Parse(key); err == nil && p.Record == rec {
				e = append(e, keyspace.Entry{Key: key, Value: []byte(value)})
			}
		}
		return e
	}
	key := keyspace.KeyRecord(org, id)
	r.Revision = s.rev
	if r.Credential = space.Credential(entries(key)); !r.Credential.Exists {
		return r
	}
	if _, ok := s.values[space.Details(key)]; ok {
		r.Credential.Revision = s.mod[space.Details(key)]
	}
	if r.Credential.App == "" {
		return r
	}
	if r.App = space.App(entries(keyspace.AppRecord(org, r.Credential.App))); r.App.Developer == "" {
		return r
	}
	r.Developer = space.Developer(entries(keyspace.DeveloperRecord(org, r.App.Developer)))
	return r
}

func (s *store) compare(org authz.Organization, id authz.KeyID) {
	s.t.Helper()
	got, ok := s.x.Records(org, id)
	if want := s.want(org, id); !ok || !reflect.DeepEqual(got, want) {
		s.t.Fatalf("at revision %d, %v:\n got %+v\nwant %+v", s.rev, id, got, want)
	}
}

// names of a small world, in which everything meets everything.
var (
	orgs       = []authz.Organization{"acme", "über corp"}
	ids        = []authz.KeyID{{}, {1}, {1, 2}, {0, 0, 0, 0, 0, 0, 0, 0, 9}, {0, 0, 0, 0, 0, 0, 0, 0, 8}}
	apps       = []string{"app-1", "app/2", "dev-1", "acme"}
	developers = []string{"dev-1", "dev-2", "app-1"}
	products   = []string{"Weather", "a b", "Orders", strings.Repeat("long", 40)}
	words      = []string{"approved", "revoked", "pending", "active", "inactive", "aproved", "", "approved\n", "x"}
)

func pick[T any](rnd *rand.Rand, of []T) T { return of[rnd.IntN(len(of))] }

// change writes or deletes one key of the store at random.
func (s *store) change(rnd *rand.Rand) {
	org := pick(rnd, orgs)
	r := keyspace.KeyRecord(org, pick(rnd, ids))
	switch rnd.IntN(3) {
	case 1:
		r = keyspace.AppRecord(org, authz.AppID(pick(rnd, apps)))
	case 2:
		r = keyspace.DeveloperRecord(org, authz.DeveloperID(pick(rnd, developers)))
	}
	key, value := space.Status(r), pick(rnd, words)
	switch rnd.IntN(5) {
	case 0, 1:
		key = space.Details(r)
		value = pick(rnd, []string{
			fmt.Sprintf(`{"v":1,"developerId":%q,"appId":%q,"expiresAt":%d,"scopes":["A","B%d"]}`, pick(rnd, developers), pick(rnd, apps), rnd.IntN(9)-1, rnd.IntN(3)),
			fmt.Sprintf(`{"v":1,"developerId":%q,"appId":%q,"expiresAt":"x"}`, pick(rnd, developers), pick(rnd, apps)),
			`{"v":2}`, ``, `null`,
		})
	case 2:
		key = space.Folder(r) + pick(rnd, []string{"note", "other", "more/of it"})
	case 3:
		if r.Kind == keyspace.KindKey {
			key = space.KeyProduct(r, authz.ProductName(pick(rnd, products)))
		}
	}
	if rnd.IntN(3) == 0 {
		s.delete(key)
	} else {
		s.put(key, value)
	}
}

// Whatever is written and deleted, the copy says what a read of the store would.
func TestIndexIsTheStore(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		s, rnd := newStore(t), rand.New(rand.NewPCG(seed, 0))
		for range 600 {
			s.change(rnd)
			s.compare(pick(rnd, orgs), pick(rnd, ids))
		}
		for _, key := range slices.Collect(maps.Keys(s.values)) {
			s.delete(key)
			s.compare(pick(rnd, orgs), pick(rnd, ids))
		}
		if size := s.x.Size(); size.Keys != 0 || size.Apps != 0 {
			t.Errorf("after everything was deleted: %+v", size)
		}
		if left := s.x.Left(); left != "" {
			t.Errorf("after everything was deleted there is left: %s", left)
		}
	}
}

// A list that changes overtake, in any order, ends in the state of the store.
func TestListBesideChanges(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		s, rnd := newStore(t), rand.New(rand.NewPCG(seed, 1))
		for range 60 {
			s.change(rnd)
		}
		x := index.New()
		s.x = x
		began := rnd.IntN(40)
		for range began { // before the list, after the copy was registered
			s.change(rnd)
		}
		listed, mods, at := maps.Clone(s.values), maps.Clone(s.mod), s.rev
		for key, value := range listed {
			if rnd.IntN(2) == 0 {
				s.change(rnd)
			}
			x.Begin()
			x.List(index.Put(s.path(key), key, []byte(value), mods[key]))
			x.End(0)
			if _, ok := x.Records("acme", ids[0]); ok {
				t.Fatal("a copy that is not complete answers")
			}
		}
		x.Begin()
		x.End(at)
		x.Complete()
		for range 60 {
			for _, org := range orgs {
				for _, id := range ids {
					s.compare(org, id)
				}
			}
			s.change(rnd)
		}
	}
}

// Names and their memory come and go.
func TestNamesAreGivenBack(t *testing.T) {
	t.Parallel()
	s, rnd := newStore(t), rand.New(rand.NewPCG(3, 3))
	var held, want []string
	credential := func(i int) string {
		return fmt.Sprintf(`{"v":1,"developerId":"dev-%d","appId":"app-%d-%s","expiresAt":-1}`, i%7, i, strings.Repeat("x", i%300))
	}
	for i := range 30_000 {
		id := authz.KeyID{byte(i), byte(i >> 8), byte(rnd.IntN(2))}
		key := keyspace.KeyRecord("acme", id)
		s.put(space.Details(key), credential(i))
		if i%11 == 0 { // kept by a reader, with what it should go on saying
			r, _ := s.x.Records("acme", id)
			held = append(held, string(r.Credential.App))
			want = append(want, fmt.Sprintf("app-%d-%s", i, strings.Repeat("x", i%300)))
		}
		if i > 500 {
			s.delete(space.Details(keyspace.KeyRecord("acme", authz.KeyID{byte(i - 500), byte((i - 500) >> 8), 0})))
			s.delete(space.Details(keyspace.KeyRecord("acme", authz.KeyID{byte(i - 500), byte((i - 500) >> 8), 1})))
		}
	}
	if n, live := s.x.NameBytes(); live < 1000 || n > 3*live+1<<17 {
		t.Errorf("the arena holds %d bytes for %d that are in use", n, live)
	}
	if !slices.Equal(held, want) {
		t.Error("a name that was handed out has changed since")
	}
	for _, key := range slices.Sorted(maps.Keys(s.values))[:200] {
		s.compare("acme", s.path(key).Record.Key)
	}
}

// Readers beside a writer see states that existed: the app's status and the
// key's are always written together, and never both approved.
func TestReadersSeeWholeStates(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	key, app := keyspace.KeyRecord("acme", ids[1]), keyspace.AppRecord("acme", "app-1")
	s.put(space.Details(key), `{"v":1,"developerId":"dev-1","appId":"app-1","expiresAt":-1}`)
	s.put(space.Details(app), `{"v":1,"developerId":"dev-1"}`)
	s.put(space.Status(key), "approved")
	s.put(space.Status(app), "revoked")
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for last := int64(0); ; {
				select {
				case <-stop:
					return
				default:
				}
				r, _ := s.x.Records("acme", ids[1])
				if r.Credential.Status == r.App.Status {
					t.Errorf("key and app were never both %v", r.App.Status)
					return
				}
				if r.Revision < last {
					t.Errorf("revision %d after %d", r.Revision, last)
				}
				last = r.Revision
				runtime.Gosched()
			}
		})
	}
	for i := range 20_000 {
		a, b := "approved", "revoked"
		if i%2 == 0 {
			a, b = b, a
		}
		s.rev++
		s.x.Begin()
		s.x.Apply(index.Put(s.path(space.Status(key)), space.Status(key), []byte(a), s.rev))
		s.x.Apply(index.Put(s.path(space.Status(app)), space.Status(app), []byte(b), s.rev))
		s.x.End(s.rev)
	}
	close(stop)
	readers.Wait()
}
