package embedded_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"go.uber.org/zap"

	"keygate/authz"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
	"keygate/statestore/embedded"
	"keygate/statestore/keyspace"
)

// restoreMain is a process that restores, to be killed.
func restoreMain(file, dataDir string) int {
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err == nil {
		_, err = embedded.Restore(context.Background(), embedded.RestoreConfig{Snapshot: file, DataDir: dataDir, Space: space, Yes: true})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// saveMain is a process that saves a snapshot, on a disk that fails.
func saveMain(dataDir, file string) int {
	endpoint, err := embedded.Endpoint(dataDir)
	if err == nil {
		var client *clientv3.Client
		if client, err = (statestore.EtcdConfig{Endpoints: []string{endpoint}}).Dial(); err == nil {
			defer client.Close()
			_, err = embedded.SaveSnapshot(context.Background(), client, file)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// failing runs this binary with some system calls failing.
func failing(t *testing.T, inject string, options []string, args ...string) (output string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	call, _, _ := strings.Cut(inject, ":")
	strace := append([]string{"-f", "-qq", "-o", os.DevNull, "-e", "trace=" + call, "-e", "inject=" + inject}, options...)
	cmd := exec.CommandContext(ctx, cmp.Or(os.Getenv("TEST_STRACE"), "strace"), append(append(strace, self), args...)...)
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("%q with %s: got %v, want status 1: %s", args, inject, err, out)
	}
	return string(out)
}

func mustSpace(t *testing.T) keyspace.Space {
	t.Helper()
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return space
}

// world is a store with three approved keys of one app.
type world struct {
	dir   string
	space keyspace.Space
	keys  []authz.KeyID
}

func newWorld(t *testing.T) world {
	return world{filepath.Join(etcdtest.DataDir(t), "d"), mustSpace(t), []authz.KeyID{{1}, {2}, {3}}}
}

func (w world) status(i int) string { return w.space.Status(keyspace.KeyRecord("acme", w.keys[i])) }

func (w world) fill(t *testing.T, c *clientv3.Client) {
	t.Helper()
	for i, id := range w.keys {
		r := keyspace.KeyRecord("acme", id)
		mustPut(t, c, w.space.Details(r), `{"v":1,"appId":"a","developerId":"d","expiresAt":-1}`)
		mustPut(t, c, w.space.KeyProduct(r, "p"), "approved")
		mustPut(t, c, w.status(i), "approved")
	}
	app, developer := keyspace.AppRecord("acme", "a"), keyspace.DeveloperRecord("acme", "d")
	mustPut(t, c, w.space.Details(app), `{"v":1,"developerId":"d"}`)
	mustPut(t, c, w.space.Status(app), "approved")
	mustPut(t, c, w.space.Details(developer), `{"v":1}`)
	mustPut(t, c, w.space.Status(developer), "active")
}

// save takes a snapshot of what is served in the world's directory.
func (w world) save(t *testing.T, c *clientv3.Client) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	file := filepath.Join(t.TempDir(), "s.snapshot")
	if _, err := embedded.SaveSnapshot(ctx, c, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// restore is Restore with what a test waits at most.
func (w world) restore(t *testing.T, file string, change func(*embedded.RestoreConfig)) (*embedded.RestoreReport, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	cfg := embedded.RestoreConfig{Snapshot: file, DataDir: w.dir, Space: w.space}
	if change != nil {
		change(&cfg)
	}
	return embedded.Restore(ctx, cfg)
}

func yes(cfg *embedded.RestoreConfig)  { cfg.Yes = true }
func keep(cfg *embedded.RestoreConfig) { cfg.KeepRevocations = true }

// contents of a directory, by name: the hash of each file, of a large one its
// size and time.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Size() > 1<<20 {
			got[strings.TrimPrefix(name, dir)] = fmt.Sprint(info.Size(), info.ModTime())
			return nil
		}
		b, err := os.ReadFile(name)
		got[strings.TrimPrefix(name, dir)] = fmt.Sprintf("%x", sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func names(t *testing.T, dir string) (got []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		got = append(got, e.Name())
	}
	return got
}

func TestSaveSnapshot(t *testing.T) {
	w := newWorld(t)
	serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	last := mustGet(t, c, w.status(0), "approved").Header.Revision
	dir := t.TempDir()
	file := filepath.Join(dir, "s.snapshot")
	info, err := embedded.SaveSnapshot(t.Context(), c, file)
	if err != nil {
		t.Fatal(err)
	}
	stat, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Revision != last || info.Keys != 13 || info.Size != stat.Size() || info.File != file {
		t.Errorf("snapshot: got %+v, want revision %d, 13 keys, %d bytes of %s", info, last, stat.Size(), file)
	}
	if got := stat.Mode(); got != 0o600 {
		t.Errorf("mode: got %v, want 0600", got)
	}
	// Never over something, be it a link to nowhere.
	before := contents(t, dir)
	link := filepath.Join(dir, "link")
	if err := os.Symlink("nowhere", link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{file, link, dir} {
		if _, err := embedded.SaveSnapshot(t.Context(), c, name); !errors.Is(err, fs.ErrExist) {
			t.Errorf("snapshot over %s: got %v, want %v", name, err, fs.ErrExist)
		}
	}
	if got := contents(t, dir); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("folder after refused snapshots: got %v, want %v", got, before)
	}
}

// A file that is there is said to be there, also when its folder cannot be made to
// outlast the machine.
func TestSaveSnapshotNotSynced(t *testing.T) {
	w := newWorld(t)
	serve(t, embedded.Config{DataDir: w.dir})
	w.fill(t, dial(t, w.dir))
	dir := t.TempDir()
	file := filepath.Join(dir, "s.snapshot")
	out := failing(t, "fsync:error=EIO", []string{"-P", dir}, "save", w.dir, file)
	if !strings.Contains(out, file+": "+embedded.ErrNotSynced.Error()) {
		t.Errorf("got %q, want that the file is there", out)
	}
	if got := names(t, dir); !slices.Equal(got, []string{"s.snapshot"}) {
		t.Errorf("folder: got %q, want the snapshot", got)
	}
}

// Where folders cannot be exchanged, that is known before the work, and before
// etcd is started on the data.
func TestRestoreWithoutExchange(t *testing.T) {
	w := newWorld(t)
	stop := serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	file := w.save(t, c)
	stop()
	before := contents(t, w.dir)
	out := failing(t, "renameat2:error=EINVAL", nil, "restore", file, w.dir)
	if !strings.Contains(out, "cannot exchange two folders in one step (invalid argument): restore to a directory that holds no data") {
		t.Errorf("got %q, want what to do", out)
	}
	after := contents(t, w.dir)
	delete(before, "/etcd.lock") // holds the process id
	delete(after, "/etcd.lock")
	if fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("data after it: got %v, want %v", after, before)
	}
}

// A member on another disk is not exchanged with one on this.
func TestRestoreOverLink(t *testing.T) {
	w := newWorld(t)
	stop := serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	file := w.save(t, c)
	stop()
	member, disk := filepath.Join(w.dir, "member"), filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.Rename(member, disk), os.Symlink(disk, member)); err != nil {
		t.Fatal(err)
	}
	before := contents(t, disk)
	r, err := w.restore(t, file, yes)
	if !errors.Is(err, embedded.ErrRefused) || !contains(err, member+" is a link") || r.Restored {
		t.Errorf("got %+v, %v, want it refused", r, err)
	}
	if got := contents(t, disk); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("data after it: got %v, want %v", got, before)
	}
	if slices.Contains(names(t, w.dir), "restore-new") {
		t.Error("directory: got restore-new in it")
	}
}

// A stream that ends early, or is altered on its way, leaves nothing.
func TestSaveSnapshotCut(t *testing.T) {
	w := newWorld(t)
	serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	for i := range 8 {
		mustPut(t, c, fmt.Sprintf("/large/%d", i), strings.Repeat("x", 1<<20))
	}
	socket := filepath.Join(etcdtest.DataDir(t), "p.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("unix", filepath.Join(w.dir, "etcd.sock"))
			if err != nil {
				conn.Close()
				return
			}
			go func() { _, _ = io.Copy(to, conn); to.Close() }()
			go func() { _, _ = io.CopyN(conn, to, 3<<20); conn.Close(); to.Close() }()
		}
	}()
	cut, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + socket}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer cut.Close()
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if info, err := embedded.SaveSnapshot(ctx, cut, filepath.Join(dir, "s.snapshot")); err == nil || ctx.Err() != nil {
		t.Errorf("snapshot over a connection that is cut: got %+v, %v, want an error before %v", info, err, patience)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := embedded.SaveSnapshot(ctx, c, filepath.Join(dir, "s.snapshot")); err == nil {
		t.Error("interrupted snapshot: got none, want an error")
	}
	if got := names(t, dir); got != nil {
		t.Errorf("folder after a cut snapshot: got %v, want nothing", got)
	}
}

// The promise: a restore brings no approval back unseen, and nobody who knew the
// old history goes on with it.
func TestRestore(t *testing.T) {
	w := newWorld(t)
	stop := serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	endpoint, err := embedded.Endpoint(w.dir)
	if err != nil {
		t.Fatal(err)
	}

	// A replica that lives through all of it.
	back, err := statestore.NewEtcd(statestore.EtcdConfig{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	store, err := statestore.New(statestore.Config{Backend: back, Space: w.space, StalenessBudget: statestore.MinStalenessBudget})
	if err != nil {
		t.Fatal(err)
	}
	storeCtx, stopStore := context.WithCancel(t.Context())
	stored := make(chan error, 1)
	go func() { stored <- store.Run(storeCtx) }()
	defer func() {
		stopStore()
		<-stored
		back.Close()
	}()
	authorizer := authz.Authorizer{Source: store}
	allowed := func(i int) bool {
		return authorizer.Decide(t.Context(), authz.Request{Organization: "acme", KeyID: w.keys[i], Products: []authz.ProductName{"p"}}).Allowed()
	}
	eventually(t, "the replica allows", func() bool { return allowed(0) && allowed(1) && allowed(2) })

	file := w.save(t, c)
	mustPut(t, c, w.status(0), "revoked")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Delete(ctx, w.status(1)); err != nil {
		t.Fatal(err)
	}
	header := mustGet(t, c, w.status(0), "revoked").Header
	eventually(t, "the replica refuses", func() bool { return !allowed(0) && !allowed(1) && allowed(2) })

	if _, err := w.restore(t, file, yes); !errors.Is(err, embedded.ErrRefused) || !contains(err, "in use by process") {
		t.Errorf("restore while it is served: got %v, want it in use", err)
	}
	mustGet(t, c, w.status(0), "revoked")
	epoch := store.Status().Epoch
	stop()

	wantOpens := []string{w.status(0) + " approved revoked", w.status(1) + " approved absent"}
	check := func(what string, r *embedded.RestoreReport) {
		t.Helper()
		var opens []string
		for _, o := range r.Difference.Opens {
			opens = append(opens, o.Key+" "+o.Snapshot+" "+o.Now)
		}
		if !r.Compared || !slices.Equal(opens, wantOpens) || r.Difference.Records != 5 || r.Difference.OnlyNow+r.Difference.OnlySnapshot+r.Difference.Closes != 0 {
			t.Errorf("%s: got %+v with %q, want it to open %q", what, r, opens, wantOpens)
		}
	}
	before := names(t, w.dir)
	r, err := w.restore(t, file, nil)
	if !errors.Is(err, embedded.ErrRefused) || r.Restored {
		t.Fatalf("restore that opens: got %v, want it refused", err)
	}
	check("refused restore", r)
	if got := names(t, w.dir); !slices.Equal(got, before) {
		t.Errorf("directory after a refusal: got %q, want %q", got, before)
	}

	// serveAgain looks at what was restored.
	serveAgain := func(r *embedded.RestoreReport, old *etcdserverpb.ResponseHeader, first, second bool) *etcdserverpb.ResponseHeader {
		t.Helper()
		if allowed(0) || allowed(1) {
			t.Error("the replica allows what was revoked, before etcd is back")
		}
		stop = serve(t, embedded.Config{DataDir: w.dir})
		c := dial(t, w.dir)
		h := mustGet(t, c, w.status(2), "approved").Header
		if h.ClusterId == old.ClusterId || h.ClusterId != r.ClusterID {
			t.Errorf("cluster id: got %x, want that of the report, %x, and not that of before, %x", h.ClusterId, r.ClusterID, old.ClusterId)
		}
		if h.Revision <= old.Revision || h.Revision != r.Revision {
			t.Errorf("revision: got %d, want that of the report, %d, above %d", h.Revision, r.Revision, old.Revision)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		for _, rev := range []int64{1, old.Revision + 1, r.Revision - 1} {
			answer := <-c.Watch(ctx, "/keygate/", clientv3.WithPrefix(), clientv3.WithRev(rev))
			if !errors.Is(answer.Err(), rpctypes.ErrCompacted) {
				t.Errorf("watch from revision %d: got %v, want %v", rev, answer.Err(), rpctypes.ErrCompacted)
			}
		}
		// Until it is in the new history it allows nothing of what was revoked.
		eventually(t, "the replica follows the new cluster", func() bool {
			s := store.Status()
			fresh := s.Fresh && s.ClusterID == r.ClusterID
			if !fresh && (!first && allowed(0) || !second && allowed(1)) {
				t.Fatal("the replica allows what was revoked, on what it knew before")
			}
			return fresh
		})
		if got := store.Status().Epoch; got <= epoch {
			t.Errorf("epoch: got %d, want one after %d", got, epoch)
		}
		epoch = store.Status().Epoch
		if got := []bool{allowed(0), allowed(1), allowed(2)}; !slices.Equal(got, []bool{first, second, true}) {
			t.Errorf("the replica allows: got %v, want %v", got, []bool{first, second, true})
		}
		mustPut(t, c, w.status(2), "approved") // it takes writes
		return mustGet(t, c, w.status(2), "approved").Header
	}

	r, err = w.restore(t, file, keep)
	if err != nil || !r.Restored || r.Kept != 2 {
		t.Fatalf("restore with what was revoked: got %+v, %v, want two kept", r, err)
	}
	check("restore with what was revoked", r)
	if r.MovedTo == "" || len(contents(t, r.MovedTo)) == 0 {
		t.Errorf("the data of before: got it at %q, want it there", r.MovedTo)
	}
	header = serveAgain(r, header, false, false)
	stop()

	first := r.MovedTo
	r, err = w.restore(t, file, yes)
	if err != nil || !r.Restored || r.Kept != 0 {
		t.Fatalf("restore by name: got %+v, %v, want it", r, err)
	}
	check("restore by name", r)
	if r.MovedTo == first {
		t.Errorf("the data of before: got it at %s twice", first)
	}
	serveAgain(r, header, true, true)
	for _, name := range names(t, w.dir) {
		if name == "restore-new" || name == "read.sock" || strings.HasSuffix(name, ".new") {
			t.Errorf("directory after a restore: got %s in it, want it gone", name)
		}
	}
	if token, err := os.ReadFile(filepath.Join(w.dir, "cluster-token")); err != nil || !bytes.HasPrefix(token, []byte("keygate-")) {
		t.Errorf("token: got %q, %v, want one", token, err)
	}
}

// What processes held, with which they are gone, does not come back.
func TestRestoreLeases(t *testing.T) {
	w := newWorld(t)
	stop := serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := c.Grant(ctx, 600)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{w.space.Replica("r"), w.status(0)} {
		if _, err := c.Put(ctx, key, "approved", clientv3.WithLease(l.ID)); err != nil {
			t.Fatal(err)
		}
	}
	mustPut(t, c, w.space.Replica("without a lease"), "r")
	file := w.save(t, c)
	stop()
	r, err := w.restore(t, file, nil)
	if err != nil || r.Expired != 3 || r.Leases != 1 || len(r.Difference.Opens) != 0 || r.Difference.Closes != 1 {
		t.Fatalf("restore: got %+v, %v, want 3 keys and a lease left out, and one approval closed", r, err)
	}
	serve(t, embedded.Config{DataDir: w.dir})
	got, err := dial(t, w.dir).Get(ctx, w.space.Replicas(), clientv3.WithPrefix())
	if err != nil || got.Count != 0 {
		t.Errorf("registrations: got %v, %v, want none", got, err)
	}
	leases, err := dial(t, w.dir).Leases(ctx)
	if err != nil || len(leases.Leases) != 0 {
		t.Errorf("leases: got %v, %v, want none", leases, err)
	}
	if got, err := dial(t, w.dir).Get(ctx, w.status(0)); err != nil || got.Count != 0 {
		t.Errorf("status under a lease: got %v, %v, want none", got, err)
	}
}

// edit changes the database in a snapshot and gives it a new hash.
func edit(t *testing.T, file string, change func(backend.Backend)) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "edited")
	if err := os.WriteFile(name, b[:len(b)-sha256.Size], 0o600); err != nil {
		t.Fatal(err)
	}
	be := backend.NewDefaultBackend(zap.NewNop(), name)
	change(be)
	be.ForceCommit()
	if err := be.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err = os.ReadFile(name); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	if err := os.WriteFile(name, append(b, sum[:]...), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// A snapshot that is not whole is refused, and nothing has changed.
func TestRestoreDamaged(t *testing.T) {
	w := newWorld(t)
	stop := serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	file := w.save(t, c)
	stop()
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	size := len(whole)
	before := contents(t, w.dir)
	refused := func(what, file, want string) {
		t.Helper()
		if r, err := w.restore(t, file, yes); !contains(err, want) || r.Restored {
			t.Errorf("restore of a snapshot %s: got %+v, %v, want an error with %q", what, r, err, want)
		}
		if got := contents(t, w.dir); fmt.Sprint(got) != fmt.Sprint(before) {
			t.Fatalf("data after a snapshot %s: got %v, want %v", what, got, before)
		}
	}
	damaged := filepath.Join(t.TempDir(), "damaged")
	write := func(b []byte) string {
		t.Helper()
		if err := os.WriteFile(damaged, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return damaged
	}
	for _, at := range []int{0, 1, 16, 4096, size / 3, size / 2, size - 33, size - 32, size - 1} {
		b := bytes.Clone(whole)
		b[at] ^= 1
		refused(fmt.Sprintf("with byte %d changed", at), write(b), "is damaged")
	}
	for _, n := range []int{1, 31, 32, 33, 512, size / 2, size - 32, size - 1} {
		want := "has no hash"
		if n%512 == 32 && n > 32 {
			want = "is damaged"
		}
		refused(fmt.Sprintf("cut to %d bytes", n), write(whole[:n]), want)
	}
	refused("cut to a possible size", write(whole[:size-512]), "is damaged")
	refused("that is longer", write(append(bytes.Clone(whole), 0)), "has no hash")
	refused("that is empty", write(nil), "is empty")
	refused("that is a folder", t.TempDir(), "is not a file")
	refused("that is absent", filepath.Join(t.TempDir(), "x"), "no such file")
	refused("that is a database", filepath.Join(w.dir, "member/snap/db"), "copied out of a data directory")
	junk := bytes.Repeat([]byte("junk"), 4096)
	sum := sha256.Sum256(junk)
	refused("of something else", write(append(junk, sum[:]...)), "is not a snapshot of etcd")
	refused("of a later etcd", edit(t, file, func(be backend.Backend) {
		tx := be.BatchTx()
		tx.LockOutsideApply()
		defer tx.Unlock()
		tx.UnsafePut(schema.Meta, []byte("storageVersion"), []byte("9.1.0"))
	}), "another version of etcd")
}

// The data that is there may be why somebody restores.
func TestRestoreOverDamagedData(t *testing.T) {
	w := newWorld(t)
	stop := serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	file := w.save(t, c)
	stop()
	db := filepath.Join(w.dir, "member/snap/db")
	info, err := os.Stat(db)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(db, bytes.Repeat([]byte{0xA5}, int(info.Size())), 0o600); err != nil {
		t.Fatal(err)
	}
	before := contents(t, w.dir)
	for _, change := range []func(*embedded.RestoreConfig){nil, keep} {
		r, err := w.restore(t, file, change)
		if !errors.Is(err, embedded.ErrRefused) || r.Compared || !strings.Contains(r.NotCompared, "cannot be read: ") {
			t.Errorf("restore over damaged data: got %+v, %v, want it refused, with nothing compared", r, err)
		}
	}
	if got := contents(t, w.dir); got["/member/snap/db"] != before["/member/snap/db"] {
		t.Error("the damaged data has changed")
	}
	r, err := w.restore(t, file, yes)
	if err != nil || !r.Restored {
		t.Fatalf("restore over damaged data, by name: got %+v, %v, want it", r, err)
	}
	if got := contents(t, r.MovedTo); got["/snap/db"] != before["/member/snap/db"] {
		t.Error("the damaged data was not kept as it was")
	}
	serve(t, embedded.Config{DataDir: w.dir})
	mustGet(t, dial(t, w.dir), w.status(0), "approved")
}

// etcdutl leaves alarms in place, under which the new member would refuse
// every put.
func TestRestoreAlarm(t *testing.T) {
	w := newWorld(t)
	const quota = 16 << 20
	stop := serve(t, embedded.Config{DataDir: w.dir, QuotaBytes: quota})
	c := dial(t, w.dir)
	w.fill(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var err error
	for err == nil { // one key, over and over: history
		_, err = c.Put(ctx, "/large", strings.Repeat("x", 1<<20))
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatalf("fill: got %v, want %v", err, rpctypes.ErrNoSpace)
	}
	file := w.save(t, c)
	stop()
	r, err := w.restore(t, file, func(cfg *embedded.RestoreConfig) { cfg.QuotaBytes = 64 << 10 })
	if err != nil || len(r.Disarmed) != 0 || !slices.Equal(r.Armed, []string{"NOSPACE"}) {
		t.Fatalf("restore with no room: got %+v, %v, want the alarm to stand", r, err)
	}
	r, err = w.restore(t, file, func(cfg *embedded.RestoreConfig) { cfg.QuotaBytes = quota })
	if err != nil || len(r.Armed) != 0 || !slices.Equal(r.Disarmed, []string{"NOSPACE"}) {
		t.Fatalf("restore with room: got %+v, %v, want the alarm cleared", r, err)
	}
	stop = serve(t, embedded.Config{DataDir: w.dir, QuotaBytes: quota})
	mustPut(t, dial(t, w.dir), w.status(0), "revoked")
	stop()

	corrupt := edit(t, file, func(be backend.Backend) {
		schema.NewAlarmBackend(zap.NewNop(), be).MustPutAlarm(&etcdserverpb.AlarmMember{MemberID: 7, Alarm: etcdserverpb.AlarmType_CORRUPT})
	})
	if _, err := w.restore(t, corrupt, keep); !errors.Is(err, embedded.ErrRefused) || !contains(err, "CORRUPT") {
		t.Errorf("restore of data that etcd has called corrupt: got %v, want it refused", err)
	}
	if r, err = w.restore(t, corrupt, yes); err != nil || len(r.Disarmed) != 2 {
		t.Fatalf("restore of it by name: got %+v, %v, want two alarms cleared", r, err)
	}
	serve(t, embedded.Config{DataDir: w.dir, QuotaBytes: quota})
	mustPut(t, dial(t, w.dir), w.status(0), "revoked")
}

// A socket's address holds 107 bytes, and a data directory may use all of them.
func TestRestoreLongPath(t *testing.T) {
	w := newWorld(t)
	root := etcdtest.DataDir(t)
	w.dir = filepath.Join(root, strings.Repeat("d", 97-len(root)-1))
	stop := serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	file := w.save(t, c)
	stop()
	if r, err := w.restore(t, file, nil); err != nil || !r.Compared {
		t.Errorf("restore: got %+v, %v, want it compared", r, err)
	}
}

// Killed at any instant, a restore leaves the old data or the new, and the next
// one is not hindered.
func TestRestoreKilled(t *testing.T) {
	w := newWorld(t)
	stop := serve(t, embedded.Config{DataDir: w.dir})
	c := dial(t, w.dir)
	w.fill(t, c)
	file := w.save(t, c)
	mustPut(t, c, w.status(0), "revoked")
	stop()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	moved := func() (n int) {
		for _, name := range names(t, w.dir) {
			if strings.HasPrefix(name, "member.before-restore-") {
				n++
			}
		}
		return n
	}
	look := func(what string) (now string) {
		t.Helper()
		stop := serve(t, embedded.Config{DataDir: w.dir})
		defer stop()
		c := dial(t, w.dir)
		defer c.Close()
		r, err := c.Get(t.Context(), w.status(0))
		if err != nil || len(r.Kvs) != 1 {
			t.Fatalf("status after %s: got %v, %v, want it there", what, r, err)
		}
		now = string(r.Kvs[0].Value)
		mustPut(t, c, w.status(0), "revoked") // for the next round
		return now
	}
	var olds, news, between int
	round := func(what string, cmd *exec.Cmd, kill func(*os.Process)) {
		t.Helper()
		before := moved()
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		cmd.WaitDelay = time.Second
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill(cmd.Process)
		_ = cmd.Wait()
		// The reader ends with the restore, or it would hold the lock.
		want := before + 1
		if now := look(what); now == "approved" {
			news++
			want++
			if moved() == before {
				between++
			}
		} else {
			olds++
		}
		if r, err := w.restore(t, file, yes); err != nil || !r.Restored {
			t.Fatalf("restore after %s: got %+v, %v, want it; the killed one said %s", what, r, err, &out)
		}
		if now := look("the restore after " + what); now != "approved" {
			t.Errorf("status after the restore after %s: got %s, want approved", what, now)
		}
		// The old data is there, also when only the second restore found it.
		if got := moved(); got != want {
			t.Errorf("data moved aside after %s: got %d folders, want %d", what, got, want)
		}
		if slices.Contains(names(t, w.dir), "restore-new") {
			t.Errorf("directory after the restore after %s: got restore-new in it", what)
		}
	}
	restore := func() *exec.Cmd { return exec.Command(self, "restore", file, w.dir) }
	for _, when := range []string{"restore-new/snapshot.db", "restore-new/build", "restore-new/build/member/wal/0000000000000000-0000000000000000.wal"} {
		round("a kill at "+when, restore(), func(p *os.Process) {
			eventually(t, when, func() bool {
				_, err := os.Lstat(filepath.Join(w.dir, when))
				return err == nil
			})
			_ = p.Kill()
		})
	}
	for _, after := range []time.Duration{100, 250} {
		round(fmt.Sprintf("a kill after %d ms", after), restore(), func(p *os.Process) {
			<-time.After(after * time.Millisecond)
			_ = p.Kill()
		})
	}
	// At the very step: before each rename, and before and after the exchange.
	traced := func(at, inject string) *exec.Cmd {
		const renames = "rename,renameat,renameat2"
		strace := cmp.Or(os.Getenv("TEST_STRACE"), "strace")
		cmd := exec.Command(strace, "-f", "-qq", "-o", os.DevNull, "-P", filepath.Join(w.dir, at),
			"-e", "trace="+renames, "-e", "inject="+renames+":"+inject, self, "restore", file, w.dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		return cmd
	}
	for _, at := range []string{"restore-new/build/member", "cluster-token", "member"} {
		round("a kill at the rename of "+at, traced(at, "signal=KILL"), func(*os.Process) {})
	}
	round("a kill after the exchange", traced("member", "delay_exit=10000000"), func(p *os.Process) {
		mark, _ := os.ReadFile(filepath.Join(w.dir, "member/restored"))
		eventually(t, "the exchange", func() bool {
			now, err := os.ReadFile(filepath.Join(w.dir, "member/restored"))
			return err == nil && !bytes.Equal(now, mark)
		})
		_ = syscall.Kill(-p.Pid, syscall.SIGKILL)
	})
	t.Logf("after %d kills the old data was in place, after %d the new, %d times with the old one still in the restore's folder", olds, news, between)
	if olds == 0 || news == 0 || between == 0 {
		t.Error("want each of these")
	}
}
