package ledger

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/catalog"
	"keygate/statestore/keyspace"
)

const (
	// MaxPage of a list.
	MaxPage = 1000
	// scanValues that are read from etcd at a time; more only where one record
	// has more.
	scanValues = 100
	// maxScan of values that are looked at for one page. What is found until then
	// is the page, and its token goes on from there.
	maxScan = 10_000
	// keysCost of an app whose keys are read to see whether it matches, in values.
	keysCost = 5
	// maxIndexed is how many keys of a product are looked up one by one to find
	// their apps; if there are more, the apps are looked through.
	maxIndexed = 2000
	// loadAtOnce of apps.
	loadAtOnce = 100
	// loadWithKeys of apps with their credentials.
	loadWithKeys = 10
	// maxScans under way in this process; others wait.
	maxScans = 4
)

// scans are those under way: each may hold a page in memory.
var scans = make(chan struct{}, maxScans)

// startScan waits until a scan may begin. If err is nil, end must follow.
func startScan(ctx context.Context) (end func(), err error) {
	select {
	case scans <- struct{}{}:
		return func() { <-scans }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %d other lists are being read: %w", authz.ErrUnavailable, maxScans, ctx.Err())
	}
}

// scan is read for what may take long and hold much.
func (l *Ledger) scan(ctx context.Context, org authz.Organization, f func(ctx context.Context, t *tx) error) error {
	end, err := startScan(ctx)
	if err != nil {
		return err
	}
	defer end()
	return l.read(ctx, org, f)
}

// pageSize of a list; 0 means the default.
func pageSize(n, otherwise int, pointer string) (int, error) {
	switch {
	case n == 0:
		return otherwise, nil
	case n < 0 || n > MaxPage:
		return 0, &Error{Kind: Invalid, Code: "keygate.invalid", Pointer: pointer, Message: fmt.Sprintf("is %d, want 1 to %d", n, MaxPage)}
	}
	return n, nil
}

// pageToken says where a list goes on. It is good for the list that gave it
// only.
type pageToken struct {
	List         string             `json:"l"`
	Organization authz.Organization `json:"o"`
	Query        string             `json:"q"` // a hash
	After        string             `json:"a"` // the name of the last record
}

// newToken of a list that is told apart by query. It goes on after a name.
func newToken(list string, org authz.Organization, query any, after string) pageToken {
	sum := sha256.Sum256(fmt.Appendf(nil, "%+v", query))
	return pageToken{list, org, hex.EncodeToString(sum[:8]), after}
}

func (p pageToken) String() string {
	b, err := json.Marshal(p)
	if err != nil { // of strings
		panic("ledger: " + err.Error())
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// resume reads a token of the same list.
func (p pageToken) resume(token string) (after string, err error) {
	bad := &Error{Kind: Invalid, Code: "keygate.page_token", Pointer: "?pageToken", Message: "it is not one that this list gave: begin without it"}
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil {
		return "", bad
	}
	var given pageToken
	if json.Unmarshal(b, &given) != nil || given.After == "" || given.String() != token {
		return "", bad
	}
	p.After = given.After
	if given != p {
		return "", bad
	}
	return given.After, nil
}

// kindFolder is the prefix of all records of a kind.
func (t *tx) kindFolder(kind keyspace.Kind) string {
	folder := strings.TrimSuffix(t.l.space.Folder(keyspace.Record{Kind: kind, Organization: t.org, Name: "x"}), "/")
	return folder[:strings.LastIndexByte(folder, '/')+1]
}

// scanner reads the records of one kind in the order of their paths. What it
// reads does not stay in the tx.
type scanner struct {
	t        *tx
	from     string // the path to go on at
	end      string
	values   int
	finished bool
}

// scan begins at a path, or with the first record.
func (t *tx) scan(kind keyspace.Kind, from string) *scanner {
	folder := t.kindFolder(kind)
	if from == "" {
		from = folder
	}
	return &scanner{t: t, from: from, end: clientv3.GetPrefixRangeEnd(folder)}
}

// next returns some further records; none at the end.
func (s *scanner) next(ctx context.Context) ([]keyspace.Record, state, error) {
	limit := int64(scanValues)
	for !s.finished {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		resp, err := s.t.l.store.Do(ctx, clientv3.OpGet(s.from, clientv3.WithRange(s.end), clientv3.WithLimit(limit), clientv3.WithRev(s.t.rev)))
		if err != nil {
			return nil, nil, err
		}
		page := resp.Get()
		if s.t.rev == 0 {
			s.t.rev = page.Header.Revision
		}
		s.values += len(page.Kvs)
		s.finished = !page.More
		start := s.from
		var records []keyspace.Record
		found := state{}
		for _, kv := range page.Kvs {
			s.from = string(kv.Key) + "\x00"
			p, err := s.t.l.space.Parse(string(kv.Key))
			if err != nil {
				continue
			}
			if found[p.Record] == nil {
				records = append(records, p.Record)
			}
			found.add(s.t.l.space, string(kv.Key), string(kv.Value), kv.ModRevision)
		}
		// The last one may go on behind the limit: it is read again, as a whole.
		last := len(records) - 1
		if page.More && last >= 0 && strings.HasPrefix(s.from, s.t.l.space.Folder(records[last])) {
			if last == 0 {
				s.from, limit = start, 2*limit
				continue
			}
			s.from = s.t.l.space.Folder(records[last])
			delete(found, records[last])
			records = records[:last]
		}
		if len(records) > 0 {
			return records, found, nil
		}
	}
	return nil, nil, nil
}

// spent tells whether it has looked at enough for one page.
func (s *scanner) spent() bool { return s.values >= maxScan }

// keep puts the values of a record that was found into the view.
func (t *tx) keep(f *folder) {
	for i, e := range f.entries {
		t.view[e.Key] = entry{string(e.Value), f.revs[i]}
	}
}

// DeveloperQuery of Developers.
type DeveloperQuery struct {
	// StartKey is the e-mail address or id of the first one; it must be there.
	StartKey string
	// Count at most; 0 means MaxPage.
	Count int
	// IDs are the e-mail addresses or ids of those that are wanted; others are
	// left out, and so are those that are not there.
	IDs []string
	// App is a name, or an id: only developers that have this app.
	App string
	// Expand also reads the names of the apps, and when a status changed.
	Expand bool
}

// noStart is err as Apigee has it where what a list is to begin with is not
// there. noun is Apigee's.
func noStart(err error, noun string) error {
	var e *Error
	if !errors.As(err, &e) || e.Kind != NotFound {
		return err
	}
	return &Error{Kind: NotFound, Code: "keymanagement.service." + noun + "_doesnot_exist", Message: e.Message}
}

// Developers lists developers in the order of their ids.
func (l *Ledger) Developers(ctx context.Context, org authz.Organization, q DeveloperQuery) (found []Developer, err error) {
	count, err := pageSize(q.Count, MaxPage, "?count")
	if err != nil {
		return nil, err
	}
	err = l.scan(ctx, org, func(ctx context.Context, t *tx) error {
		found = []Developer{}
		from := ""
		if q.StartKey != "" {
			id, err := t.developer(ctx, q.StartKey)
			if err != nil {
				return noStart(err, "developer")
			}
			from = l.space.Folder(keyspace.DeveloperRecord(org, id))
		}
		var wanted map[authz.DeveloperID]bool
		for _, ref := range q.IDs {
			if wanted == nil {
				wanted = map[authz.DeveloperID]bool{}
			}
			id, err := t.developer(ctx, ref)
			if err != nil && !isKind(err, NotFound) {
				return err
			}
			wanted[id] = true
		}
		for s := t.scan(keyspace.KindDeveloper, from); len(found) < count; {
			records, read, err := s.next(ctx)
			if err != nil {
				return err
			}
			if len(records) == 0 {
				break
			}
			var some []Developer
			for _, r := range records {
				id := authz.DeveloperID(r.Name)
				if d, ok := t.developerIn(read, id); ok && (wanted == nil || wanted[id]) {
					some = append(some, d)
				}
			}
			if some, err = t.withApp(ctx, some, q.App); err != nil {
				return err
			}
			found = append(found, some[:min(len(some), count-len(found))]...)
		}
		if !q.Expand {
			return nil
		}
		return t.completeDevelopers(ctx, found)
	})
	return found, err
}

// withApp are those of the developers that have an app.
func (t *tx) withApp(ctx context.Context, all []Developer, app string) ([]Developer, error) {
	if app == "" {
		return all, nil
	}
	paths := []string{t.appPath(authz.AppID(app))}
	for _, d := range all {
		paths = append(paths, t.l.space.IndexDeveloperApp(t.org, d.ID, app))
	}
	if err := t.readValues(ctx, paths...); err != nil {
		return nil, err
	}
	a, _ := t.appIn(t.state(t.value), authz.AppID(app))
	var some []Developer
	for i, d := range all {
		if _, named := t.value(paths[i+1]); named || d.ID == a.Developer {
			some = append(some, d)
		}
	}
	return some, nil
}

func (t *tx) completeDevelopers(ctx context.Context, all []Developer) error {
	times := map[int64]int64{}
	ids := make([]authz.DeveloperID, 0, len(all))
	for i := range all {
		var err error
		if all[i].LastModified, err = t.modified(ctx, all[i].LastModified, all[i].detailsRevision, all[i].Revision, times); err != nil {
			return err
		}
		ids = append(ids, all[i].ID)
	}
	names, err := t.appNames(ctx, ids...)
	if err != nil {
		return err
	}
	for i := range all {
		all[i].Apps = names[i]
	}
	return nil
}

// ProductQuery of Products.
type ProductQuery struct {
	// StartKey is the name of the first one; it must be there.
	StartKey string
	// Count at most; 0 means MaxPage.
	Count int
	// AttributeName and AttributeValue: only products that have this attribute,
	// with this value. An empty name means any product, an empty value any value.
	AttributeName, AttributeValue string
	// Expand is for the caller: all of a product is read in any case.
	Expand bool
}

// Products lists products in the order of their names.
func (l *Ledger) Products(ctx context.Context, org authz.Organization, q ProductQuery) (found []Product, err error) {
	count, err := pageSize(q.Count, MaxPage, "?count")
	if err != nil {
		return nil, err
	}
	err = l.scan(ctx, org, func(ctx context.Context, t *tx) error {
		found = []Product{}
		from := ""
		if q.StartKey != "" {
			p, err := t.product(ctx, authz.ProductName(q.StartKey))
			if err != nil {
				return err
			}
			from = l.space.Folder(keyspace.ProductRecord(org, p.Name))
		}
		for s := t.scan(keyspace.KindProduct, from); ; {
			records, read, err := s.next(ctx)
			if err != nil || len(records) == 0 {
				return err
			}
			for _, r := range records {
				p, ok := t.productIn(read, authz.ProductName(r.Name))
				if !ok || !q.match(p) {
					continue
				}
				if found = append(found, p); len(found) == count {
					return nil
				}
			}
		}
	})
	return found, err
}

func (q ProductQuery) match(p Product) bool {
	return q.AttributeName == "" || slices.ContainsFunc(catalog.Attributes(p.Details), func(a catalog.Attribute) bool {
		return a.Name == q.AttributeName && (q.AttributeValue == "" || a.Value == q.AttributeValue)
	})
}

// AppQuery of DeveloperApps.
type AppQuery struct {
	// StartKey is the name of the first one; it must be there.
	StartKey string
	// Count at most; 0 means 100.
	Count int
	// Expand also reads the credentials, and when a status changed.
	Expand bool
}

// DeveloperApps lists the apps of a developer in the order of their names.
func (l *Ledger) DeveloperApps(ctx context.Context, org authz.Organization, developer string, q AppQuery) (apps []App, err error) {
	count, err := pageSize(q.Count, maxAppNames, "?count")
	if err != nil {
		return nil, err
	}
	err = l.scan(ctx, org, func(ctx context.Context, t *tx) error {
		apps = []App{}
		id, err := t.developer(ctx, developer)
		if err != nil {
			return err
		}
		prefix := l.space.IndexDeveloperApps(org, id)
		from := prefix
		if q.StartKey != "" {
			if _, err := t.app(ctx, developer, q.StartKey); err != nil {
				return noStart(err, "app")
			}
			from += url.PathEscape(q.StartKey)
		}
		for len(apps) < count { // more than once only if the index names apps that are gone
			resp, err := l.store.Do(ctx, clientv3.OpGet(from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(prefix)),
				clientv3.WithLimit(int64(count-len(apps))), clientv3.WithRev(t.rev)))
			if err != nil {
				return err
			}
			var ids []authz.AppID
			for _, kv := range resp.Get().Kvs {
				from = string(kv.Key) + "\x00"
				ids = append(ids, authz.AppID(kv.Value))
			}
			some, err := t.loadAll(ctx, ids, q.Expand)
			if err != nil {
				return err
			}
			for _, a := range some {
				if a.Developer == id {
					apps = append(apps, a)
				}
			}
			if !resp.Get().More {
				break
			}
		}
		return t.completeApps(ctx, apps, q.Expand)
	})
	return apps, err
}

// loadAll is loadApps of many, a part at a time.
func (t *tx) loadAll(ctx context.Context, ids []authz.AppID, keys bool) (apps []App, err error) {
	for part := range slices.Chunk(ids, atOnce(keys)) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		some, err := t.loadApps(ctx, part, keys)
		if err != nil {
			return nil, err
		}
		apps = append(apps, some...)
		t.forget()
	}
	return apps, nil
}

// atOnce is how many apps are loaded at a time.
func atOnce(keys bool) int {
	if keys {
		return loadWithKeys
	}
	return loadAtOnce
}

// forget what was read, where nothing will be written.
func (t *tx) forget() { t.view, t.guards = view{}, map[string]bool{} }

func (t *tx) completeApps(ctx context.Context, apps []App, expand bool) (err error) {
	if !expand {
		return nil
	}
	times := map[int64]int64{}
	for i := range apps {
		a := &apps[i]
		if a.LastModified, err = t.modified(ctx, a.LastModified, a.detailsRevision, a.Revision, times); err != nil {
			return err
		}
	}
	return nil
}

// AppsQuery of Apps. The conditions that are given must all hold.
type AppsQuery struct {
	IDs            []authz.AppID
	Keys           []authz.KeyID // of one of these
	Name           string
	DeveloperEmail string // or the developer's id
	Product        authz.ProductName
	Status         authz.Status // of the app
	KeyStatus      authz.Status // of one of its keys

	// StartKey is the id of the first one; it must be there.
	StartKey string
	// PageSize at most; 0 means MaxPage.
	PageSize int
	// PageToken of the page before; it excludes StartKey.
	PageToken string
	// Expand also reads the credentials, and when a status changed.
	Expand bool
	// Whole is for a client that cannot carry a page token: the page ends only
	// when it is full or the list ends, however long that takes. When ctx ends
	// before, the error wraps authz.ErrUnavailable.
	Whole bool
}

// AppsPage is a part of a list.
type AppsPage struct {
	Apps []App
	// NextPageToken is empty at the end. A page with a token may have fewer apps
	// than were asked for, even none.
	NextPageToken string
}

// Apps lists the apps of all developers in the order of their ids.
func (l *Ledger) Apps(ctx context.Context, org authz.Organization, q AppsQuery) (page AppsPage, err error) {
	size, err := pageSize(q.PageSize, MaxPage, "?pageSize")
	if err != nil {
		return page, err
	}
	same := q
	same.StartKey, same.PageSize, same.PageToken, same.Expand, same.Whole = "", 0, "", false, false
	token := newToken("apps", org, same, "")
	err = l.scan(ctx, org, func(ctx context.Context, t *tx) error {
		page = AppsPage{Apps: []App{}}
		from := ""
		switch {
		case q.PageToken != "" && q.StartKey != "":
			return &Error{Kind: Invalid, Code: "keygate.invalid", Pointer: "?startKey", Message: "stands beside a page token: want one of them"}
		case q.PageToken != "":
			after, err := token.resume(q.PageToken)
			if err != nil {
				return err
			}
			from = clientv3.GetPrefixRangeEnd(l.space.Folder(keyspace.AppRecord(org, authz.AppID(after))))
		case q.StartKey != "":
			path := t.appPath(authz.AppID(q.StartKey))
			if err := t.get(ctx, path); err != nil {
				return err
			}
			if _, there := t.value(path); !there {
				return noStart(noApp(org, authz.AppID(q.StartKey)), "app")
			}
			from = l.space.Folder(keyspace.AppRecord(org, authz.AppID(q.StartKey)))
		}
		ids, known, err := t.candidates(ctx, q)
		if err != nil {
			return err
		}
		// take adds those of the apps that match; it tells whether the page is full,
		// and knows that there is more.
		take := func(ids []authz.AppID) (full bool, err error) {
			for part := range slices.Chunk(ids, atOnce(q.Expand || q.needsKeys())) {
				if err := ctx.Err(); err != nil {
					return false, err
				}
				apps, err := t.loadApps(ctx, part, q.Expand || q.needsKeys())
				if err != nil {
					return false, err
				}
				for _, a := range apps {
					if !q.match(a) {
						continue
					}
					if len(page.Apps) == size {
						token.After = string(page.Apps[size-1].ID)
						page.NextPageToken = token.String()
						return true, nil
					}
					if !q.Expand {
						a.Credentials = nil // they were only looked at
					}
					page.Apps = append(page.Apps, a)
				}
				t.forget()
			}
			return false, nil
		}
		if known {
			ids = slices.DeleteFunc(ids, func(id authz.AppID) bool { return l.space.Folder(keyspace.AppRecord(org, id)) < from })
			if _, err := take(ids); err != nil {
				return err
			}
			return t.completeApps(ctx, page.Apps, q.Expand)
		}
		for s := t.scan(keyspace.KindApp, from); ; {
			records, read, err := s.next(ctx)
			if err != nil {
				return err
			}
			if len(records) == 0 {
				break
			}
			ids = ids[:0]
			for _, r := range records {
				a, ok := t.appIn(read, authz.AppID(r.Name))
				if !ok || !q.matchApp(a) {
					continue
				}
				t.keep(read[r])
				ids = append(ids, a.ID)
			}
			full, err := take(ids)
			if err != nil {
				return err
			}
			if full {
				break
			}
			if q.needsKeys() {
				s.values += keysCost * len(ids)
			}
			if s.spent() && !s.finished && !q.Whole {
				token.After = records[len(records)-1].Name
				page.NextPageToken = token.String()
				break
			}
		}
		return t.completeApps(ctx, page.Apps, q.Expand)
	})
	if q.Whole && err != nil && ctx.Err() != nil {
		return AppsPage{}, fmt.Errorf("%w: the list is too long for the time there is, ask for fewer or for pages: %w", authz.ErrUnavailable, err)
	}
	return page, err
}

func (q AppsQuery) needsKeys() bool {
	return q.KeyStatus != authz.StatusNone || q.Product != "" || len(q.Keys) > 0
}

// matchApp looks at what is known of an app without its credentials and its
// developer.
func (q AppsQuery) matchApp(a App) bool {
	return (q.Status == authz.StatusNone || a.Status == q.Status) && (q.Name == "" || a.Name == q.Name)
}

func (q AppsQuery) match(a App) bool {
	if !q.matchApp(a) || q.DeveloperEmail != "" && a.Email != strings.ToLower(q.DeveloperEmail) && string(a.Developer) != q.DeveloperEmail {
		return false
	}
	has := func(ok func(Credential) bool) bool { return slices.ContainsFunc(a.Credentials, ok) }
	return (q.Product == "" || has(func(c Credential) bool { return c.has(q.Product) })) &&
		(q.KeyStatus == authz.StatusNone || has(func(c Credential) bool { return c.Status == q.KeyStatus })) &&
		(len(q.Keys) == 0 || has(func(c Credential) bool { return slices.Contains(q.Keys, c.Key) }))
}

// candidates are the apps that an index has for the query, in the order of their
// paths; not known if it takes a look at all of them.
func (t *tx) candidates(ctx context.Context, q AppsQuery) (ids []authz.AppID, known bool, err error) {
	switch {
	case len(q.IDs) > 0:
		ids, known = slices.Clone(q.IDs), true
	case len(q.Keys) > 0:
		ids, err = t.appsOf(ctx, q.Keys)
		known = true
	case q.DeveloperEmail != "":
		id, err := t.developer(ctx, q.DeveloperEmail)
		if isKind(err, NotFound) {
			return nil, true, nil
		}
		if err != nil {
			return nil, false, err
		}
		found, err := t.readFolders(ctx, t.l.space.IndexDeveloperApps(t.org, id))
		if err != nil {
			return nil, false, err
		}
		for _, path := range found[0] {
			app, _ := t.value(path)
			ids = append(ids, authz.AppID(app))
		}
		known = true
	case q.Product != "":
		keys, err := t.productKeys(ctx, q.Product, maxIndexed)
		if errors.Is(err, errTooManyKeys) {
			return nil, false, nil
		}
		if err != nil {
			return nil, false, err
		}
		if ids, err = t.appsOf(ctx, keys); err != nil {
			return nil, false, err
		}
		known = true
	}
	folder := func(id authz.AppID) string { return t.l.space.Folder(keyspace.AppRecord(t.org, id)) }
	slices.SortFunc(ids, func(a, b authz.AppID) int { return strings.Compare(folder(a), folder(b)) })
	return slices.Compact(ids), known, err
}

// appsOf are the apps that keys say they belong to.
func (t *tx) appsOf(ctx context.Context, keys []authz.KeyID) (ids []authz.AppID, err error) {
	var paths []string
	for _, id := range keys {
		paths = append(paths, t.l.space.Details(keyspace.KeyRecord(t.org, id)))
	}
	if err := t.readValues(ctx, paths...); err != nil {
		return nil, err
	}
	for _, path := range paths {
		value, _ := t.value(path)
		if c := t.l.space.Credential([]keyspace.Entry{{Key: path, Value: []byte(value)}}); c.Problem == "" {
			ids = append(ids, c.App)
		}
	}
	return ids, nil
}

// KeysQuery of Credentials. The conditions that are given must all hold.
type KeysQuery struct {
	// Status of the key; pending also finds keys on which a product is pending.
	Status authz.Status
	// Expired keys only.
	Expired bool
	// ExpiringBefore: only keys that expire between now and then.
	ExpiringBefore time.Time
	// PageSize at most; 0 means MaxPage.
	PageSize int
	// PageToken of the page before.
	PageToken string
}

// KeysPage is a part of a list.
type KeysPage struct {
	Keys []AppKey
	// NextPageToken is empty at the end. A page with a token may have fewer keys
	// than were asked for, even none.
	NextPageToken string
}

// AppKey is a key with the app that it belongs to, which is without its
// credentials.
type AppKey struct {
	App        App
	Credential Credential
}

// Credentials lists keys in the order of their ids.
func (l *Ledger) Credentials(ctx context.Context, org authz.Organization, q KeysQuery) (page KeysPage, err error) {
	size, err := pageSize(q.PageSize, MaxPage, "?pageSize")
	if err != nil {
		return page, err
	}
	// The time moves on from page to page.
	token := newToken("keys", org, [3]any{q.Status, q.Expired, !q.ExpiringBefore.IsZero()}, "")
	now := l.now().UnixMilli()
	err = l.scan(ctx, org, func(ctx context.Context, t *tx) error {
		page = KeysPage{Keys: []AppKey{}}
		from := ""
		if q.PageToken != "" {
			after, err := token.resume(q.PageToken)
			if err != nil {
				return err
			}
			id, err := authz.ParseKeyID(after)
			if err != nil {
				return &Error{Kind: Invalid, Code: "keygate.page_token", Pointer: "?pageToken", Message: "it is not one that this list gave: begin without it"}
			}
			from = clientv3.GetPrefixRangeEnd(l.space.Folder(keyspace.KeyRecord(org, id)))
		}
		for s := t.scan(keyspace.KindKey, from); ; {
			records, read, err := s.next(ctx)
			if err != nil || len(records) == 0 {
				return err
			}
			var some []AppKey
			for _, r := range records {
				if c, app, ok := t.credentialIn(read, r.Key); ok && app != "" && q.match(c, now) {
					k := AppKey{Credential: c}
					k.App.ID = app
					some = append(some, k)
				}
			}
			if some, err = t.withApps(ctx, some); err != nil {
				return err
			}
			if more := size - len(page.Keys); len(some) > more {
				page.Keys = append(page.Keys, some[:more]...)
				token.After = page.Keys[size-1].Credential.Key.String()
				page.NextPageToken = token.String()
				return nil
			}
			page.Keys = append(page.Keys, some...)
			if s.spent() && !s.finished {
				token.After = records[len(records)-1].Key.String()
				page.NextPageToken = token.String()
				return nil
			}
		}
	})
	return page, err
}

func (q KeysQuery) match(c Credential, now int64) bool {
	pending := q.Status == authz.StatusPending && slices.ContainsFunc(c.Products, func(p catalog.ProductRef) bool { return p.Status == authz.StatusPending })
	expired := c.ExpiresAt != authz.NeverExpires && c.ExpiresAt <= now
	expiring := !expired && c.ExpiresAt != authz.NeverExpires && c.ExpiresAt < q.ExpiringBefore.UnixMilli()
	return (q.Status == authz.StatusNone || c.Status == q.Status || pending) &&
		(!q.Expired || expired) &&
		(q.ExpiringBefore.IsZero() || expiring)
}

// withApps reads the apps of keys. Keys whose app is gone are left out.
func (t *tx) withApps(ctx context.Context, keys []AppKey) ([]AppKey, error) {
	var ids []authz.AppID
	seen := map[authz.AppID]bool{}
	for _, k := range keys {
		if !seen[k.App.ID] {
			seen[k.App.ID] = true
			ids = append(ids, k.App.ID)
		}
	}
	apps, err := t.loadAll(ctx, ids, false)
	if err != nil {
		return nil, err
	}
	byID := make(map[authz.AppID]App, len(apps))
	for _, a := range apps {
		byID[a.ID] = a
	}
	some := keys[:0]
	for _, k := range keys {
		if a, there := byID[k.App.ID]; there {
			k.App = a
			some = append(some, k)
		}
	}
	return some, nil
}
