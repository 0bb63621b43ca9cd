package keygatetest

import (
	"bytes"
	"context"
	"encoding/json"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/apigee"
	"keygate/authz"
	"keygate/examples/quickstart"
	"keygate/ledger"
	"keygate/statestore/keyspace"
)

// Absent as a status writes no status at all.
const Absent = "\x00absent"

// Key is a consumer key with the app and the developer behind it, each of them
// open unless said otherwise.
type Key struct {
	// Key itself. Required.
	Key string
	// Organization; empty means "default".
	Organization authz.Organization
	// Status, AppStatus and DeveloperStatus are written as they stand. Empty
	// means approved, and active for the developer.
	Status, AppStatus, DeveloperStatus string
	// Products and their statuses; nil means the quickstart's Weather-Product,
	// approved.
	Products map[authz.ProductName]string
	// App and Developer; empty means "app-" or "dev-" and the first eight
	// digits of the key's id.
	App       authz.AppID
	Developer authz.DeveloperID
	// ExpiresAt in milliseconds, 0 means never. Credential replaces the whole
	// JSON value when it is not empty.
	ExpiresAt  int64
	Credential string
	Scopes     []string
}

// KeyID of a consumer key.
func KeyID(t testing.TB, key string) authz.KeyID {
	t.Helper()
	k, reason := authz.ParseConsumerKey(key)
	if reason != authz.Allowed {
		t.Fatalf("a key for a test is not valid: %v", reason)
	}
	return k.ID()
}

// Record of the key, for the paths of a keyspace.Space.
func (key Key) Record(t testing.TB) keyspace.Record {
	t.Helper()
	return keyspace.KeyRecord(orDefault(key.Organization, "default"), KeyID(t, key.Key))
}

// named fills in App and Developer.
func (key Key) named(t testing.TB) Key {
	t.Helper()
	suffix := KeyID(t, key.Key).String()[:8]
	key.Organization = orDefault(key.Organization, "default")
	key.App = orDefault(key.App, authz.AppID("app-"+suffix))
	key.Developer = orDefault(key.Developer, authz.DeveloperID("dev-"+suffix))
	return key
}

// AppRecord of the key, for the paths of a keyspace.Space.
func (key Key) AppRecord(t testing.TB) keyspace.Record {
	t.Helper()
	key = key.named(t)
	return keyspace.AppRecord(key.Organization, key.App)
}

// DeveloperRecord of the key, likewise.
func (key Key) DeveloperRecord(t testing.TB) keyspace.Record {
	t.Helper()
	key = key.named(t)
	return keyspace.DeveloperRecord(key.Organization, key.Developer)
}

// Values are the keys and values in etcd that a Key is.
func (key Key) Values(t testing.TB, space keyspace.Space) map[string]string {
	t.Helper()
	key = key.named(t)
	key.ExpiresAt = orDefault(key.ExpiresAt, authz.NeverExpires)
	if key.Products == nil {
		key.Products = map[authz.ProductName]string{quickstart.WeatherProduct: "approved"}
	}
	if key.Credential == "" {
		key.Credential = marshal(t, map[string]any{
			keyspace.MemberVersion: keyspace.Version, keyspace.MemberApp: key.App, keyspace.MemberDeveloper: key.Developer,
			keyspace.MemberExpiresAt: key.ExpiresAt, keyspace.MemberScopes: append([]string{}, key.Scopes...),
		})
	}
	record := key.Record(t)
	app, developer := key.AppRecord(t), key.DeveloperRecord(t)
	values := map[string]string{
		space.Status(record):     orDefault(key.Status, "approved"),
		space.Details(record):    key.Credential,
		space.Status(app):        orDefault(key.AppStatus, "approved"),
		space.Details(app):       marshal(t, map[string]any{keyspace.MemberVersion: keyspace.Version, keyspace.MemberDeveloper: key.Developer}),
		space.Status(developer):  orDefault(key.DeveloperStatus, "active"),
		space.Details(developer): marshal(t, map[string]any{keyspace.MemberVersion: keyspace.Version}),
	}
	for product, status := range key.Products {
		values[space.KeyProduct(record, product)] = status
	}
	for path, value := range values {
		if value == Absent {
			delete(values, path)
		}
	}
	return values
}

func orDefault[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

func marshal(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// PutKeys writes keys into etcd, as many of them in one transaction as it
// holds, and returns the last revision.
func (k *Keygate) PutKeys(t testing.TB, keys ...Key) (revision int64) {
	t.Helper()
	var ops []clientv3.Op
	// etcd takes no path twice in one transaction; keys may share an app.
	inTxn := map[string]bool{}
	commit := func() {
		if len(ops) == 0 {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), Patience)
		defer cancel()
		r, err := k.Writer.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			t.Fatalf("write %d values: %v", len(ops), err)
		}
		revision, ops = r.Header.Revision, nil
		clear(inTxn)
	}
	for _, key := range keys {
		values := key.Values(t, k.Settings.Space)
		shared := len(ops)+len(values) > 128 // etcd's limit
		for path := range values {
			shared = shared || inTxn[path]
		}
		if shared {
			commit()
		}
		for path, value := range values {
			inTxn[path] = true
			ops = append(ops, clientv3.OpPut(path, value))
		}
	}
	commit()
	return revision
}

// Put writes one value at a full path, as etcdctl would, and returns its
// revision.
func (k *Keygate) Put(t testing.TB, path, value string) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	r, err := k.Writer.Put(ctx, path, value)
	if err != nil {
		t.Fatalf("put %s: %v", path, err)
	}
	return r.Header.Revision
}

// Delete removes what stands at a full path and returns the revision.
func (k *Keygate) Delete(t testing.TB, path string) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	r, err := k.Writer.Delete(ctx, path)
	if err != nil {
		t.Fatalf("delete %s: %v", path, err)
	}
	if r.Deleted != 1 {
		t.Fatalf("delete %s: %d values were there, want 1", path, r.Deleted)
	}
	return r.Header.Revision
}

// Applied waits until the server has applied a revision.
func (k *Keygate) Applied(t testing.TB, revision int64) {
	t.Helper()
	Eventually(t, Patience, "a revision to be applied", func() bool {
		return k.Server.Store().Status().AppliedRevision >= revision
	})
}

// Import brings the apps of an input in Apigee's JSON into the store, as
// keygate import does.
func (k *Keygate) Import(t testing.TB, name string, input []byte) ledger.Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	var report ledger.Report
	importer := ledger.NewImporter(ledger.ImporterConfig{KV: k.Writer, Space: k.Settings.Space, Organization: k.Settings.Organization})
	if err := importer.Import(ctx, apigee.NewReader(apigee.ReaderConfig{Name: name}, bytes.NewReader(input)), report.Add); err != nil {
		t.Fatalf("import %s: %v", name, err)
	}
	if report.Refused > 0 {
		t.Fatalf("import %s: %v, want nothing refused", name, report)
	}
	return report
}

// ImportQuickstart imports the two apps of the quickstart and waits until the
// server has seen them.
func (k *Keygate) ImportQuickstart(t testing.TB) {
	t.Helper()
	for _, name := range quickstart.Files() {
		k.Import(t, name, quickstart.Read(name))
	}
	r, err := k.Writer.Get(t.Context(), k.Settings.Space.Probe())
	if err != nil {
		t.Fatalf("ask for etcd's revision: %v", err)
	}
	// The index lies outside the watched prefix: only a probe brings the watch up
	// to it.
	k.Applied(t, r.Header.Revision)
}

// Dump is everything in etcd, below any prefix, as "path = value" lines.
func (k *Keygate) Dump(t testing.TB) string {
	t.Helper()
	r, err := k.Writer.Get(t.Context(), "\x00", clientv3.WithFromKey())
	if err != nil {
		t.Fatalf("read all of etcd: %v", err)
	}
	var b bytes.Buffer
	for _, kv := range r.Kvs {
		b.WriteString(string(kv.Key) + " = " + string(kv.Value) + "\n")
	}
	return b.String()
}
