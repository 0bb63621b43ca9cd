package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keygate/authz"
	"keygate/catalog"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// The model: what a few lines say that the store should hold.
type (
	modelDeveloper struct {
		id     authz.DeveloperID
		email  string
		active bool
		apps   map[string]*modelApp // by name
	}
	modelApp struct {
		id         authz.AppID
		revoked    bool
		attributes []catalog.Attribute
		keys       []*modelKey // the newest first
	}
	modelKey struct {
		id       authz.KeyID
		text     string
		revoked  bool
		expires  int64
		products []modelRef
	}
	modelRef struct {
		name   authz.ProductName
		status authz.Status
	}
	model struct {
		developers map[string]*modelDeveloper // by e-mail
		products   map[authz.ProductName]bool // manual
		dead       []authz.KeyID
	}
)

// want is the app as it should be read.
func (a *modelApp) want() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s revoked=%t %v\n", a.id, a.revoked, a.attributes)
	for _, k := range a.keys {
		fmt.Fprintf(&s, "  %s revoked=%t %d %v\n", k.id, k.revoked, k.expires, k.products)
	}
	return s.String()
}

// got is the app as it was read.
func got(a ledger.App) string {
	m := modelApp{id: a.ID, revoked: a.Status != authz.StatusApproved, attributes: append([]catalog.Attribute(nil), catalog.Attributes(a.Details)...)}
	for _, c := range a.Credentials {
		k := &modelKey{id: c.Key, revoked: c.Status != authz.StatusApproved, expires: c.ExpiresAt}
		for _, p := range c.Products {
			k.products = append(k.products, modelRef{p.Name, p.Status})
		}
		m.keys = append(m.keys, k)
	}
	return m.want()
}

// paths that the store should hold, and no other.
func (m *model) paths(space keyspace.Space) (paths []string) {
	for name := range m.products {
		paths = append(paths, space.Details(keyspace.ProductRecord(org, name)))
	}
	for _, d := range m.developers {
		r := keyspace.DeveloperRecord(org, d.id)
		paths = append(paths, space.Details(r), space.Status(r), space.IndexEmail(org, d.email))
		for name, a := range d.apps {
			r := keyspace.AppRecord(org, a.id)
			paths = append(paths, space.Details(r), space.Status(r), space.IndexDeveloperApp(org, d.id, name))
			for _, k := range a.keys {
				r := keyspace.KeyRecord(org, k.id)
				paths = append(paths, space.Details(r), space.Status(r), space.IndexAppKeys(org, a.id)+k.id.String())
				for _, p := range k.products {
					paths = append(paths, space.KeyProduct(r, p.name), space.IndexProductKeys(org, p.name)+k.id.String())
				}
			}
		}
	}
	slices.Sort(paths)
	return paths
}

func (m *model) holders(name authz.ProductName) (n int) {
	for _, d := range m.developers {
		for _, a := range d.apps {
			for _, k := range a.keys {
				if slices.ContainsFunc(k.products, func(p modelRef) bool { return p.name == name }) {
					n++
				}
			}
		}
	}
	return n
}

// reason that a check should answer with.
func (m *model) reason(d *modelDeveloper, a *modelApp, k *modelKey, product authz.ProductName, now int64) authz.Reason {
	at := slices.IndexFunc(k.products, func(p modelRef) bool { return p.name == product })
	switch {
	case k.revoked:
		return authz.KeyRevoked
	case k.expires >= 0 && k.expires <= now:
		return authz.KeyExpired
	case a.revoked:
		return authz.AppRevoked
	case !d.active:
		return authz.DeveloperInactive
	case at < 0:
		return authz.ProductNotOnKey
	case k.products[at].status == authz.StatusRevoked:
		return authz.ProductRevoked
	case k.products[at].status == authz.StatusPending:
		return authz.ProductPending
	}
	return authz.Allowed
}

// snapshot is a source of records that were read all at once.
type snapshot map[keyspace.Record][]keyspace.Entry

func (s snapshot) Records(_ context.Context, org authz.Organization, id authz.KeyID) (r authz.Records, err error) {
	space, err := keyspace.New(keyspace.DefaultPrefix)
	r.Proof = current{}
	if r.Credential = space.Credential(s[keyspace.KeyRecord(org, id)]); r.Credential.Exists {
		r.App = space.App(s[keyspace.AppRecord(org, r.Credential.App)])
	}
	if r.App.Exists {
		r.Developer = space.Developer(s[keyspace.DeveloperRecord(org, r.App.Developer)])
	}
	return r, err
}

// snapshot of all records.
func (b *book) snapshot() snapshot {
	b.t.Helper()
	all, _ := b.dump()
	return b.snapshotOf(all)
}

func (b *book) snapshotOf(all map[string]string) snapshot {
	records := snapshot{}
	for path, value := range all {
		if p, err := b.space.Parse(path); err == nil {
			records[p.Record] = append(records[p.Record], keyspace.Entry{Key: path, Value: []byte(value)})
		}
	}
	return records
}

// decider answers as a check does.
func (b *book) decider(records snapshot) func(authz.KeyID, authz.ProductName) authz.Reason {
	check := &authz.Authorizer{Source: records, Now: b.now}
	return func(id authz.KeyID, product authz.ProductName) authz.Reason {
		return check.Decide(b.ctx(), authz.Request{Organization: org, KeyID: id, Products: []authz.ProductName{product}}).Reason
	}
}

// TestModel makes random changes to the store and to the model, and compares
// after each what is answered, what is stored and what checks decide.
func TestModel(t *testing.T) {
	const steps = 120
	for _, seed := range []uint64{1, 2} {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			b := newBook(t)
			rnd := rand.New(rand.NewPCG(seed, 0))
			m := &model{developers: map[string]*modelDeveloper{}, products: map[authz.ProductName]bool{}}
			allowed := 0
			for step := range steps {
				what := b.step(rnd, m)
				allowed += b.compare(m)
				if t.Failed() {
					t.Fatalf("step %d: %s", step, what)
				}
			}
			if len(m.dead) == 0 || allowed == 0 {
				t.Errorf("%d keys were deleted and %d checks allowed: the changes test nothing", len(m.dead), allowed)
			}
		})
	}
}

func pick[T any](rnd *rand.Rand, all ...T) T { return all[rnd.IntN(len(all))] }

// step makes one change, and says which.
func (b *book) step(rnd *rand.Rand, m *model) (what string) {
	emails := []string{"ann@example.com", "bob@example.com", "cid@example.com"}
	names := []string{"A", "B", "C 1"}
	products := []authz.ProductName{"P", "Q", "R", "T"}
	email, name, product := pick(rnd, emails...), pick(rnd, names...), pick(rnd, products...)
	d := m.developers[email]
	var a *modelApp
	if d != nil {
		a = d.apps[name]
	}
	var k *modelKey
	if a != nil && len(a.keys) > 0 {
		k = pick(rnd, a.keys...)
	}
	manual, known := m.products[product]
	status := authz.StatusApproved
	if manual {
		status = authz.StatusPending
	}
	on := -1
	if k != nil {
		on = slices.IndexFunc(k.products, func(p modelRef) bool { return p.name == product })
	}
	ref := "none"
	if k != nil {
		ref = pick(rnd, k.text, k.id.String(), "sha256:"+k.id.String())
	}
	b.clock.Add(int64(rnd.IntN(20)))
	now := b.clock.Load()
	expect := func(err error, ok bool, kind ledger.ErrorKind) bool {
		var e *ledger.Error
		switch {
		case ok && err != nil:
			b.t.Errorf("got %v, want it done", err)
		case !ok && (!errors.As(err, &e) || e.Kind != kind):
			b.t.Errorf("got %v, want an error of kind %v", err, kind)
		}
		return ok && err == nil
	}
	attribute := catalog.Attribute{Name: pick(rnd, "x", "y"), Value: fmt.Sprint(rnd.IntN(100))}
	bury := func(keys ...*modelKey) {
		for _, k := range keys {
			m.dead = append(m.dead, k.id)
		}
	}
	action := pick(rnd, "developer", "developer", "developer", "products", "app", "app", "app", "app", "products", "products", "key", "key", "add", "add", "add", "remove", "delete key", "delete app",
		"delete developer", "delete product", "status", "status", "status", "status", "put", "more", "attribute", "e-mail", "approval", "wait")
	switch what = fmt.Sprintf("%s of %s %s %s %s", action, email, name, product, ref); action {
	case "developer":
		created, _, err := b.CreateDeveloper(b.ctx(), by, org, developer(email))
		if expect(err, d == nil, ledger.Exists) {
			m.developers[email] = &modelDeveloper{id: created.ID, email: email, active: true, apps: map[string]*modelApp{}}
		}
	case "products":
		_, _, err := b.CreateProduct(b.ctx(), by, org, catalog.Product{Name: product, Details: object(b.t, fmt.Sprintf(`{"approvalType":%q}`, pick(rnd, "auto", "manual")))})
		if expect(err, !known, ledger.Exists) {
			m.products[product] = must(b.Product(b.ctx(), org, product)).Manual()
		}
	case "approval":
		next := !manual
		_, _, err := b.UpdateProduct(b.ctx(), by, org, catalog.Product{Name: product, Details: object(b.t, fmt.Sprintf(`{"approvalType":%q}`, map[bool]string{false: "auto", true: "manual"}[next]))})
		if expect(err, known, ledger.NotFound) {
			m.products[product] = next
		}
	case "delete product":
		_, _, err := b.DeleteProduct(b.ctx(), by, org, product)
		kind := ledger.NotFound
		if known {
			kind = ledger.Conflict
		}
		if expect(err, known && m.holders(product) == 0, kind) {
			delete(m.products, product)
		}
	case "app":
		ms := pick[int64](rnd, 0, -1, 300, 100_000)
		created, _, err := b.CreateApp(b.ctx(), by, org, email, ledger.AppSpec{Name: name, Products: []authz.ProductName{product}, KeyExpiresIn: ms})
		kind := ledger.Exists
		if d == nil || a == nil {
			kind = ledger.NotFound
		}
		if expect(err, d != nil && a == nil && known, kind) {
			k := &modelKey{id: created.Credentials[0].Key, text: created.Credentials[0].ConsumerKey, expires: -1, products: []modelRef{{product, status}}}
			if ms > 0 {
				k.expires = now + ms
			}
			d.apps[name] = &modelApp{id: created.ID, keys: []*modelKey{k}}
		}
	case "put", "more":
		spec := ledger.AppSpec{Details: catalog.WithAttributes(nil, []catalog.Attribute{attribute})}
		if action == "more" {
			spec.Products = []authz.ProductName{product}
		}
		updated, _, err := b.UpdateApp(b.ctx(), by, org, email, name, spec)
		if expect(err, a != nil && (action == "put" || known), ledger.NotFound) {
			a.attributes = []catalog.Attribute{attribute}
			if action == "more" {
				c := updated.Credentials[0]
				a.keys = slices.Insert(a.keys, 0, &modelKey{id: c.Key, text: c.ConsumerKey, expires: -1, products: []modelRef{{product, status}}})
			}
		}
	case "attribute":
		_, _, err := b.SetAttribute(b.ctx(), by, org, ledger.Holder{Developer: email, App: name}, attribute)
		if expect(err, a != nil, ledger.NotFound) {
			i := slices.IndexFunc(a.attributes, func(o catalog.Attribute) bool { return o.Name == attribute.Name })
			if i < 0 {
				i, a.attributes = len(a.attributes), append(a.attributes, attribute)
			}
			a.attributes[i] = attribute
		}
	case "key":
		c, _, err := b.CreateKey(b.ctx(), by, org, email, name, ledger.KeySpec{})
		if expect(err, a != nil, ledger.NotFound) {
			a.keys = slices.Insert(a.keys, 0, &modelKey{id: c.Key, text: c.ConsumerKey, expires: -1})
		}
	case "add":
		_, _, err := b.UpdateKey(b.ctx(), by, org, email, name, ref, ledger.KeySpec{Products: []authz.ProductName{product}})
		if expect(err, k != nil && (known || on >= 0), ledger.NotFound) && on < 0 {
			k.products = append(k.products, modelRef{product, status})
		}
	case "remove":
		_, _, err := b.RemoveKeyProduct(b.ctx(), by, org, email, name, ref, product)
		if expect(err, on >= 0, ledger.NotFound) {
			k.products = slices.Delete(k.products, on, on+1)
		}
	case "delete key":
		_, _, err := b.DeleteKey(b.ctx(), by, org, email, name, ref)
		if expect(err, k != nil, ledger.NotFound) {
			bury(k)
			a.keys = slices.DeleteFunc(a.keys, func(o *modelKey) bool { return o == k })
		}
	case "delete app":
		_, _, err := b.DeleteApp(b.ctx(), by, org, email, name)
		if expect(err, a != nil, ledger.NotFound) {
			bury(a.keys...)
			delete(d.apps, name)
		}
	case "delete developer":
		if rnd.IntN(3) > 0 { // not so often
			return what + ", not now"
		}
		_, _, err := b.DeleteDeveloper(b.ctx(), by, org, email)
		if expect(err, d != nil, ledger.NotFound) {
			for _, a := range d.apps {
				bury(a.keys...)
			}
			delete(m.developers, email)
		}
	case "e-mail":
		other := pick(rnd, emails...)
		_, _, err := b.UpdateDeveloper(b.ctx(), by, org, email, developer(other))
		kind := ledger.NotFound
		if d != nil {
			kind = ledger.Exists
		}
		if expect(err, d != nil && (other == email || m.developers[other] == nil), kind) {
			delete(m.developers, email)
			d.email, m.developers[other] = other, d
		}
	case "status":
		if k == nil {
			return what + ": nothing there"
		}
		change, good := pick(rnd, ledger.Revoke, ledger.Approve), false
		if good = change == ledger.Approve; on >= 0 && rnd.IntN(2) == 0 {
			b.mustSet(change, must(b.KeyProductTarget(b.ctx(), org, email, name, ref, product)))
			k.products[on].status = map[bool]authz.Status{true: authz.StatusApproved, false: authz.StatusRevoked}[good]
			return what + " on the key"
		}
		switch rnd.IntN(3) {
		case 0:
			b.mustSet(change, must(b.KeyTarget(b.ctx(), org, email, name, ref)))
			k.revoked = !good
		case 1:
			b.mustSet(change, must(b.AppTarget(b.ctx(), org, email, name)))
			a.revoked = !good
		case 2:
			b.mustSet(change, must(b.DeveloperTarget(b.ctx(), org, email)))
			d.active = good
		}
	case "wait":
		b.clock.Add(200)
	}
	return what
}

// compare the store with the model. It returns how many checks were allowed.
func (b *book) compare(m *model) (allowed int) {
	b.t.Helper()
	all, _ := b.dump()
	var paths []string
	for path := range all {
		if path != b.space.Barrier(org) && (strings.HasPrefix(path, b.space.Watched()) || strings.HasPrefix(path, b.space.Index(org))) {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	if diff := cmp.Diff(m.paths(b.space), paths); diff != "" {
		b.t.Errorf("paths (-want +got):\n%s", diff)
	}
	decide := b.decider(b.snapshotOf(all))
	for _, id := range m.dead[max(0, len(m.dead)-20):] {
		if r := decide(id, "P"); r != authz.KeyUnknown {
			b.t.Errorf("deleted key %s: a check answers %v", id, r)
		}
	}
	for _, email := range slices.Sorted(maps.Keys(m.developers)) {
		d := m.developers[email]
		apps := must(b.DeveloperApps(b.ctx(), org, email, ledger.AppQuery{Expand: true}))
		if len(apps) != len(d.apps) {
			b.t.Errorf("%s has %d apps, want %d", email, len(apps), len(d.apps))
		}
		for _, a := range apps {
			want := d.apps[a.Name]
			if want == nil {
				b.t.Errorf("%s has an app %s", email, a.Name)
				continue
			}
			if diff := cmp.Diff(want.want(), got(a)); diff != "" {
				b.t.Errorf("app %s of %s (-want +got):\n%s", a.Name, email, diff)
			}
			for _, k := range want.keys {
				for _, p := range []authz.ProductName{"P", "Q", "R", "T"} {
					got, want := decide(k.id, p), m.reason(d, want, k, p, b.clock.Load())
					if got != want {
						b.t.Errorf("key %s of app %s, product %s: a check answers %v, want %v", k.id, a.Name, p, got, want)
					}
					if got == authz.Allowed {
						allowed++
					}
				}
			}
		}
	}
	return allowed
}
