package embedded_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"keygate/keygatetest/etcdtest"
	"keygate/statestore/embedded"
)

func TestEndpoint(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	long := "/" + strings.Repeat("d", 96) // 97 bytes, and 10 for "/etcd.sock"
	for _, test := range []struct{ dir, want, err string }{
		{"/var/lib/keygate", "unix:///var/lib/keygate/etcd.sock", ""},
		{"/var/lib/../keygate/", "unix:///var/keygate/etcd.sock", ""},
		{"d", "unix://" + wd + "/d/etcd.sock", ""},
		{long, "unix://" + long + "/etcd.sock", ""},
		{long + "d", "", "is 108 bytes long and a unix socket's address holds 107: choose a data directory of at most 97 bytes"},
		{"/100%/a?b", "unix:///100%25/a%3Fb/etcd.sock", ""},
		{"", "", "no data directory"},
	} {
		got, err := embedded.Endpoint(test.dir)
		if got != test.want || !contains(err, test.err) {
			t.Errorf("Endpoint(%q): got %q, %v, want %q, error with %q", test.dir, got, err, test.want, test.err)
		}
	}
}

// contains is true also for no error where none is wanted.
func contains(err error, want string) bool {
	if err == nil || want == "" {
		return err == nil && want == ""
	}
	return strings.Contains(err.Error(), want)
}

func TestServeKeepsData(t *testing.T) {
	// A client takes the endpoint for a URL.
	dir := filepath.Join(etcdtest.DataDir(t), "a b%20ü:1?#%")
	if embedded.Running(t.Context(), dir) {
		t.Error("Running before the first start: got true, want false")
	}

	stop := serve(t, embedded.Config{DataDir: dir})
	if !embedded.Running(t.Context(), dir) {
		t.Error("Running while serving: got false, want true")
	}
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o700 {
		t.Errorf("mode of the new data directory: got %o, want 700", got)
	}
	for _, name := range []string{"etcd.sock", "peer.sock"} {
		// Not an abstract socket, which has no file and no permissions.
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Type() != os.ModeSocket {
			t.Errorf("%s while serving: got %v, %v, want a socket", name, info, err)
		}
	}
	c := dial(t, dir)
	mustPut(t, c, "k", "v")
	first := mustGet(t, c, "k", "v").Header
	// An open watch does not hold up the stop, and goes on after it.
	watch := c.Watch(t.Context(), "k", clientv3.WithRev(first.Revision+1), clientv3.WithCreatedNotify())
	if r := <-watch; !r.Created {
		t.Fatalf("watch: got %v, want it created", r)
	}
	began := time.Now()
	stop()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("stop under a watch: took %v, want less than 3 s", took)
	}
	mustBeClean(t, dir)
	if embedded.Running(t.Context(), dir) {
		t.Error("Running after the stop: got true, want false")
	}

	stop = serve(t, embedded.Config{DataDir: dir})
	again := mustGet(t, dial(t, dir), "k", "v").Header
	if again.ClusterId != first.ClusterId {
		t.Errorf("cluster id after a restart: got %x, want %x", again.ClusterId, first.ClusterId)
	}
	mustPut(t, c, "k", "w")
	select {
	case r, ok := <-watch:
		if !ok || r.Err() != nil || len(r.Events) != 1 || string(r.Events[0].Kv.Value) != "w" {
			t.Errorf("watch after a restart: got %v, %v, want the put", r, ok)
		}
	case <-time.After(patience):
		t.Errorf("watch after a restart: nothing for %v", patience)
	}
	stop()
	c.Close()

	// Made anew in the same place, it is another cluster.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	serve(t, embedded.Config{DataDir: dir})
	c = dial(t, dir)
	mustPut(t, c, "k", "v")
	if got := mustGet(t, c, "k", "v").Header.ClusterId; got == first.ClusterId {
		t.Errorf("cluster id of a new directory: got %x, that of the old one", got)
	}
}

// A watch that opens while etcd stops is not waited for either.
func TestServeStopsUnderNewWatch(t *testing.T) {
	dir := etcdtest.DataDir(t)
	for i := range 16 {
		stop := serve(t, embedded.Config{DataDir: dir})
		c := dial(t, dir)
		mustPut(t, c, "k", "v")
		watch := c.Watch(t.Context(), "k")
		<-time.After(time.Duration(i%8) * 300 * time.Microsecond) // somewhere on its way
		began := time.Now()
		stop()
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("stop %d: took %v, want less than 3 s", i, took)
		}
		c.Close()
		for range watch {
		}
	}
}

func TestRunningStaleSocket(t *testing.T) {
	dir := etcdtest.DataDir(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "etcd.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // as after a kill -9
	l.Close()
	if embedded.Running(t.Context(), dir) {
		t.Error("Running on a dead socket: got true, want false")
	}
	serve(t, embedded.Config{DataDir: dir})
	mustPut(t, dial(t, dir), "k", "v")
}

// Without a lock of its own, a second instance would remove the first one's
// socket before it notices the first.
func TestServeSecondInstance(t *testing.T) {
	p := etcdtest.StartProcess(t)
	want := fmt.Sprintf("in use by process %d", p.Pid())

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := embedded.Serve(ctx, embedded.Config{DataDir: p.DataDir()}, nil)
	if !contains(err, want) {
		t.Errorf("second Serve: got %v, want an error with %q", err, want)
	}
	if got := embedded.ExitCode(err); got != 78 {
		t.Errorf("exit code of a second Serve: got %d, want 78", got)
	}
	out, code := etcdProcess(t, p.DataDir())
	if !strings.Contains(out, want) || code != 78 {
		t.Errorf("second process: got exit status %d and %q, want 78 and %q", code, out, want)
	}
	mustPut(t, p.Client(t), "k", "v") // over a new connection
}

func TestServeRefusesDirectory(t *testing.T) {
	dir := func(mode os.FileMode) string {
		d := etcdtest.DataDir(t)
		if err := os.Chmod(d, mode); err != nil {
			t.Fatal(err)
		}
		return d
	}
	file := filepath.Join(dir(0o700), "file")
	foreign := dir(0o700)
	for _, name := range []string{file, filepath.Join(foreign, "PG_VERSION")} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	other := "/" // root's
	if os.Geteuid() == 0 {
		other = dir(0o700)
		if err := os.Chown(other, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	readable, searchable := dir(0o755), dir(0o710)
	for _, test := range []struct{ name, dir, err string }{
		{"readable", readable, "has mode 0755, open to other users: chmod 700 " + readable},
		{"searchable", searchable, "has mode 0710, open to other users: chmod 700 " + searchable},
		{"file", file, "not a directory"},
		{"other things", foreign, `holds other things ("PG_VERSION")`},
		{"other user", other, "belongs to user "},
		{"too long", "/" + strings.Repeat("d", 97), "108 bytes"},
		{"none", "", "no data directory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := embedded.Serve(t.Context(), embedded.Config{DataDir: test.dir}, nil)
			if !contains(err, test.err) {
				t.Errorf("Serve: got %v, want an error with %q", err, test.err)
			}
			if got := embedded.ExitCode(err); got != 78 {
				t.Errorf("exit code: got %d, want 78", got)
			}
		})
	}
	if entries, err := os.ReadDir(foreign); err != nil || len(entries) != 1 {
		t.Errorf("the refused directory: got %v, %v, want it untouched", entries, err)
	}
}

// A tool such as etcdutl holds the database's lock and etcd waits for it; that
// must not keep the process from being stopped.
func TestServeDatabaseInUse(t *testing.T) {
	dir := filepath.Join(etcdtest.DataDir(t), "d")
	stop := serve(t, embedded.Config{DataDir: dir})
	stop()
	db, err := os.OpenFile(filepath.Join(dir, "member/snap/db"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := unix.Flock(int(db.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	var log logBuffer
	c, stop := run(t, embedded.ChildConfig{DataDir: dir, Logger: log.logger(slog.LevelDebug)})
	eventually(t, "etcd opens the database", func() bool { return log.has("starting an etcd server") })
	pid := c.Pid()
	stop()
	if want := "may be using the database"; !log.has(want) || log.has("is killed") {
		t.Errorf("log of the stop: got %q, want %q and no kill", log.lines(), want)
	}
	if !gone(pid) {
		t.Errorf("process %d is still there after the stop", pid)
	}
}

func TestExitCode(t *testing.T) {
	if got := embedded.ExitCode(nil); got != 0 {
		t.Errorf("ExitCode(nil): got %d, want 0", got)
	}
	if got := embedded.ExitCode(errors.New("x")); got != 1 {
		t.Errorf("ExitCode of any error: got %d, want 1", got)
	}
}

// What etcd answers with a stack trace or the end of the process becomes one
// line and the exit status that says "do not try again".
func TestServeCorrupted(t *testing.T) {
	damage := func(t *testing.T, name string) {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		copy(b, bytes.Repeat([]byte{0xA5}, 64<<10))
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		want   string
	}{
		{"write-ahead log", func(t *testing.T, dir string) {
			damage(t, filepath.Join(dir, "member/wal/0000000000000000-0000000000000000.wal"))
		}, "the data is damaged"},
		{"database", func(t *testing.T, dir string) {
			damage(t, filepath.Join(dir, "member/snap/db"))
		}, "database"},
		{"token", func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "cluster-token"), 0); err != nil {
				t.Fatal(err)
			}
		}, "cluster-token is empty"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(etcdtest.DataDir(t), "d")
			stop := serve(t, embedded.Config{DataDir: dir})
			mustPut(t, dial(t, dir), "k", "v")
			stop()
			test.damage(t, dir)

			out, code := etcdProcess(t, dir)
			t.Logf("etcd said: %s", out)
			last := out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:]
			if code != 78 || !strings.Contains(last, test.want) || !strings.Contains(last, dir) {
				t.Errorf("got exit status %d and %q, want 78 and a line with %q and the directory", code, last, test.want)
			}
			if strings.Contains(out, "goroutine ") {
				t.Errorf("got a stack trace, want an error:\n%s", out)
			}
			mustBeClean(t, dir)
		})
	}
}

func TestServeLogsLittle(t *testing.T) {
	var log logBuffer
	dir := etcdtest.DataDir(t)
	for range 2 { // a new directory, and one with data
		stop := serve(t, embedded.Config{DataDir: dir, Logger: log.logger(slog.LevelInfo)})
		c := dial(t, dir)
		mustPut(t, c, "k", "v")
		watch := c.Watch(t.Context(), "k", clientv3.WithCreatedNotify())
		<-watch
		stop() // under a connection, which is what etcd complains of
		c.Close()
		for range watch {
		}
	}
	for _, line := range log.lines() {
		// A machine that is busy may well be too slow for etcd's taste.
		if !strings.Contains(line, `msg="etcd is serving"`) && !strings.Contains(line, "took too long") {
			t.Errorf("log of a normal start and stop: got %q", line)
		}
	}
	if !log.has(`endpoint=unix://` + dir + "/etcd.sock") {
		t.Errorf("log of a start: got %q, want the endpoint in it", log.lines())
	}
}

func TestServeQuota(t *testing.T) {
	dir := etcdtest.DataDir(t)
	serve(t, embedded.Config{DataDir: dir, QuotaBytes: 64 << 10})
	c := dial(t, dir)
	eventually(t, "put beyond the quota is refused", func() bool {
		_, err := c.Put(t.Context(), "k", strings.Repeat("v", 10<<10))
		return errors.Is(err, rpctypes.ErrNoSpace)
	})
	if _, err := c.Delete(t.Context(), "k"); err != nil {
		t.Errorf("delete beyond the quota: got %v, want nil", err)
	}
}

// A restored snapshot has etcd's folder and no token; it is taken as it is.
func TestServeTakesMember(t *testing.T) {
	dir := filepath.Join(etcdtest.DataDir(t), "d")
	stop := serve(t, embedded.Config{DataDir: dir})
	mustPut(t, dial(t, dir), "k", "v")
	stop()
	for _, name := range []string{"cluster-token", "etcd.lock"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, embedded.Config{DataDir: dir})
	mustGet(t, dial(t, dir), "k", "v")
}
