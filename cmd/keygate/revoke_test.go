package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/keygatetest"
	"keygate/keygatetest/etcdtest"
	"keygate/statestore"
	"keygate/statestore/embedded"
	"keygate/statestore/keyspace"
)

const testApp = "/keygate/default/apps/a/"

func mustPut(t *testing.T, cli *clientv3.Client, pairs ...string) {
	t.Helper()
	for p := range slices.Chunk(pairs, 2) {
		if _, err := cli.Put(t.Context(), p[0], p[1]); err != nil {
			t.Fatalf("put %s: %v", p[0], err)
		}
	}
}

// silent is a replica that answers nothing.
func silent(budget time.Duration) string {
	return keyspace.Replica{Version: "v1", Host: "node-7", Pid: 4711, StalenessBudget: budget, Acknowledged: 1, Fresh: true,
		ProofAge: time.Second, At: time.Now().Add(-time.Minute)}.Value()
}

func mustValue(t *testing.T, cli *clientv3.Client, path string) string {
	t.Helper()
	r, err := cli.Get(t.Context(), path)
	if err != nil {
		t.Fatalf("get %s: %v", path, err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// run is a command in this process.
func run(args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
	code = a.main(args)
	return out.String(), errs.String(), code
}

// Ctrl-C ends the waiting, not the revocation, and says so.
func TestInterruptedWait(t *testing.T) {
	etcd := etcdtest.Start(t)
	cli := etcd.Client(t)
	for _, format := range []string{"table", "json"} {
		mustPut(t, cli, testApp+"status", "approved", "/keygate.replicas/R1", silent(time.Minute))
		var stdout, stderr bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "keygate", "revoke", "app", "a", "--wait", "-o", format, "--etcd-endpoints", etcd.Endpoint())
		cmd.Env, cmd.Stdout, cmd.Stderr = environ(), &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(20 * time.Second); mustValue(t, cli, testApp+"status") != "revoked"; time.Sleep(5 * time.Millisecond) { // between two looks
			if time.Now().After(end) {
				t.Fatal("it revokes nothing")
			}
		}
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != exitInterrupted || !strings.HasPrefix(stderr.String(), "keygate: interrupted: the revocation stands at revision ") {
			t.Errorf("got status %d, want %d: %s", got, exitInterrupted, &stderr)
		}
		for _, part := range map[string][]string{
			"table": {"revoked at revision ", "; applied on 0/1 replicas, so far\n", "no answer: node-7 pid 4711 (R1)\n", "undo: keygate approve app a --etcd-endpoints unix:"},
			"json":  {`"interrupted": true`, `"applied": 0`, `"id": "R1"`, `"keygate approve app a --etcd-endpoints unix:`},
		}[format] {
			if !strings.Contains(stdout.String(), part) {
				t.Errorf("%s: no %q in:\n%s", format, part, &stdout)
			}
		}
		if got := mustValue(t, cli, testApp+"status"); got != "revoked" {
			t.Errorf("got %q, want revoked", got)
		}
	}
}

// Who does not answer is named, and the receipt holds.
func TestFencedReplicas(t *testing.T) {
	etcd := etcdtest.Start(t)
	cli := etcd.Client(t)
	mustPut(t, cli, testApp+"status", "approved", "/keygate.replicas/R1", silent(100*time.Millisecond))
	stdout, stderr, code := run("revoke", "app", "a", "--wait", "-o", "json", "--etcd-endpoints", etcd.Endpoint())
	var got struct {
		Revision    int64
		Replicas    struct{ Total, Applied, Fenced int }
		NotAnswered []struct {
			ID, Host string
			Pid      int
		}
		UnregisteredBy time.Time
		Undo           []string
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || code != exitOK || stderr != "" {
		t.Fatalf("got status %d, %v: %s%s", code, err, stdout, stderr)
	}
	if got.Revision == 0 || got.Replicas.Total != 1 || got.Replicas.Fenced != 1 || len(got.NotAnswered) != 1 || got.NotAnswered[0].Host != "node-7" ||
		got.NotAnswered[0].ID != "R1" || time.Until(got.UnregisteredBy) < 30*time.Second {
		t.Errorf("got %+v", got)
	}

	// The fleet's table has its last figures, and their age.
	stdout, stderr, code = run("status", "--health-listen", "unix://"+filepath.Join(t.TempDir(), "no.sock"), "--etcd-endpoints", etcd.Endpoint())
	if code != exitFailed || stderr != "" || !strings.Contains(stdout, "fleet: 0/1 replicas answered the barrier at revision ") {
		t.Errorf("got status %d: %s%s", code, stdout, stderr)
	}
	for _, part := range []string{"node-7/4711   no answer   1.000 s     1 of ", "   0.100 s   6", " s old   v1        R1\n"} {
		if !strings.Contains(stdout, part) {
			t.Errorf("no %q in:\n%s", part, stdout)
		}
	}

	// One that cannot be read is there all the same.
	mustPut(t, cli, "/keygate.replicas/R1", "\x1b[31m{")
	stdout, _, code = run("status", "--etcd-endpoints", etcd.Endpoint(), "--health-listen", "unix:///nobody.sock")
	if code != exitFailed || !strings.Contains(stdout, "unreadable   no answer") || strings.Contains(stdout, "\x1b") {
		t.Errorf("got status %d: %s", code, stdout)
	}
}

// An etcd in whose place another one answers during the wait is no success: it
// may not hold the revocation.
func TestEtcdReplacedDuringWait(t *testing.T) {
	dir := etcdtest.DataDir(t)
	old := exec.Command("keygate", "etcd", "--data-dir", dir)
	old.Env = environ()
	if err := old.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = old.Process.Kill(); _ = old.Wait() })
	keygatetest.Eventually(t, keygatetest.Patience, "etcd to start", func() bool { return embedded.Running(t.Context(), dir) })
	link := filepath.Join(etcdtest.DataDir(t), "etcd.sock")
	if err := os.Symlink(filepath.Join(dir, "etcd.sock"), link); err != nil {
		t.Fatal(err)
	}
	cli, err := statestore.EtcdConfig{Endpoints: []string{"unix://" + link}}.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	mustPut(t, cli, testApp+"status", "approved", "/keygate.replicas/R1", silent(6*time.Second))
	var stdout, stderr string
	var code int
	done := make(chan struct{})
	go func() {
		defer close(done)
		stdout, stderr, code = run("revoke", "app", "a", "--wait", "--etcd-endpoints", "unix://"+link)
	}()
	keygatetest.Eventually(t, keygatetest.Patience, "the revocation", func() bool { return mustValue(t, cli, testApp+"status") == "revoked" })
	if err := errors.Join(os.Remove(link), os.Symlink(strings.TrimPrefix(etcdtest.Start(t).Endpoint(), "unix://"), link), old.Process.Kill()); err != nil {
		t.Fatal(err)
	}
	<-done
	if code != exitFailed || !strings.Contains(stderr, "etcd was restored or replaced during the wait") || !strings.Contains(stderr, "repeat it") ||
		!strings.Contains(stdout, "applied on 0/1 replicas; 1 did not answer") {
		t.Errorf("got status %d: %s%s", code, stdout, stderr)
	}
}

// A user who may not write is told so; the fleet is listed without asking.
func TestWithoutTheRight(t *testing.T) {
	etcd := etcdtest.StartTLS(t)
	mustPut(t, etcd.Client(t, etcdtest.RootUser, etcdtest.RootPassword), testApp+"status", "approved", "/keygate.replicas/R1", silent(time.Minute))
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte(etcdtest.ReplicaPassword), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := []string{"--etcd-endpoints", etcd.Endpoint, "--etcd-cacert", etcd.Files.CA, "--etcd-cert", etcd.Files.ClientCert, "--etcd-key", etcd.Files.ClientKey,
		"--etcd-user", etcdtest.ReplicaUser, "--etcd-password-file", password}
	stdout, stderr, code := run(append([]string{"revoke", "app", "a", "--wait"}, flags...)...)
	if code != exitAuth || stdout != "" || !strings.Contains(stderr, "permission denied") {
		t.Errorf("revoke: got status %d: %s%s", code, stdout, stderr)
	}
	stdout, stderr, code = run(append([]string{"status", "--health-listen", "unix:///nobody.sock"}, flags...)...)
	if code != exitFailed || stderr != "" || !strings.Contains(stdout, "fleet: 1 replica, not asked (write a barrier: ") || !strings.Contains(stdout, "   not asked   ") || !strings.Contains(stdout, ": nobody knows whether they are fresh\n") {
		t.Errorf("status: got status %d: %s%s", code, stdout, stderr)
	}
	// Who may write and not list the replicas is told what is missing.
	root := etcd.Client(t, etcdtest.RootUser, etcdtest.RootPassword)
	const writer = "writer"
	for _, step := range []func() error{
		func() error { _, err := root.RoleAdd(t.Context(), writer); return err },
		func() error {
			_, err := root.RoleGrantPermission(t.Context(), writer, "/keygate/", clientv3.GetPrefixRangeEnd("/keygate/"), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error {
			_, err := root.RoleGrantPermission(t.Context(), writer, "/keygate.audit/", clientv3.GetPrefixRangeEnd("/keygate.audit/"), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error {
			_, err := root.RoleGrantPermission(t.Context(), writer, "/keygate.intent/", clientv3.GetPrefixRangeEnd("/keygate.intent/"), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := root.UserAdd(t.Context(), writer, etcdtest.ReplicaPassword); return err },
		func() error { _, err := root.UserGrantRole(t.Context(), writer, writer); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	flags[slices.Index(flags, etcdtest.ReplicaUser)] = writer
	stdout, stderr, code = run(append([]string{"revoke", "app", "a", "--wait"}, flags...)...)
	if code != exitAuth || stdout != "" || !strings.Contains(stderr, "needs the right to read /keygate.replicas/") || !strings.HasSuffix(stderr, "(without --wait)\n") {
		t.Errorf("revoke: got status %d: %s%s", code, stdout, stderr)
	}
	// What earlier transactions did stands, and that there is no receipt is said.
	var ids []string
	for i := range 64 {
		ids = append(ids, authz.KeyID{1, byte(i)}.String())
		mustPut(t, root, "/keygate/default/keys/"+ids[i]+"/status", "approved")
	}
	t.Chdir(t.TempDir()) // where the undo's file is written
	if err := os.WriteFile("ids", []byte(strings.Join(ids, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	for format, want := range map[string]string{"table": "revoked 62 of 64 at revision ", "json": `"noReceipt": true`} {
		stdout, stderr, code = run(append([]string{"revoke", "key", "--from-file", "ids", "--yes", "--wait", "-o", format}, flags...)...)
		if code != exitAuth || !strings.Contains(stdout, want) || !strings.Contains(stderr, "\nno receipt: ask the replicas: ") {
			t.Errorf("revoke 64: got status %d: %s%s", code, stdout, stderr)
		}
		if format == "table" && !strings.Contains(stdout, "; no receipt, for the replicas were not asked: repeat it\n") {
			t.Errorf("revoke 64: got %s", stdout)
		}
		for _, id := range ids {
			mustPut(t, root, "/keygate/default/keys/"+id+"/status", "approved")
		}
	}
	// The undo names files and users, and nothing of what is in them.
	flags[slices.Index(flags, writer)] = etcdtest.RootUser
	if err := os.WriteFile(password, []byte(etcdtest.RootPassword), 0o600); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code = run(append([]string{"revoke", "app", "a"}, flags...)...)
	if code != exitOK || !strings.Contains(stdout, "--etcd-user root --etcd-password-file "+password) || strings.Contains(stdout+stderr, etcdtest.RootPassword) {
		t.Errorf("revoke: got status %d: %s%s", code, stdout, stderr)
	}
}

// At its quota etcd takes a revocation, by deletion, and no approval.
func TestRevokeAtTheQuota(t *testing.T) {
	dir := etcdtest.DataDir(t)
	cmd := exec.Command("keygate", "etcd", "--data-dir", dir, "--etcd-quota", "16MiB")
	cmd.Env = environ()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Signal(os.Interrupt); _ = cmd.Wait() })
	for end := time.Now().Add(20 * time.Second); !embedded.Running(t.Context(), dir); time.Sleep(10 * time.Millisecond) { // between two looks
		if time.Now().After(end) {
			t.Fatal("etcd does not start")
		}
	}
	endpoint, err := embedded.Endpoint(dir)
	if err != nil {
		t.Fatal(err)
	}
	cli, err := statestore.EtcdConfig{Endpoints: []string{endpoint}}.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	mustPut(t, cli, testApp+"status", "approved", testApp+"app", `{"v":1,"developerId":"d"}`, "/keygate.replicas/R1", silent(100*time.Millisecond))
	for i := 0; ; i++ {
		if _, err := cli.Put(t.Context(), "/filler", strings.Repeat("x", 1<<20)); errors.Is(err, rpctypes.ErrNoSpace) {
			break
		} else if err != nil || i > 100 {
			t.Fatalf("fill etcd: %v", err)
		}
	}
	stdout, stderr, code := run("revoke", "app", "a", "--wait", "--data-dir", dir)
	if code != exitOK || stderr != "" || mustValue(t, cli, testApp+"status") != "" {
		t.Errorf("revoke: got status %d: %s%s", code, stdout, stderr)
	}
	for _, part := range []string{"revoked at revision ", "applied on 0/1 replicas; 1 did not answer: by now it has applied it, or refuses\n", "etcd has no space left: flags were deleted", "what is known is the time\n", "a replica that does not register refuses by "} {
		if !strings.Contains(stdout, part) {
			t.Errorf("no %q in:\n%s", part, stdout)
		}
	}
	// Once more nothing is deleted, and it still is no receipt but one of time.
	stdout, stderr, code = run("revoke", "app", "a", "--wait", "--data-dir", dir)
	if code != exitOK || stderr != "" || strings.Contains(stdout, "flags were deleted") || !strings.Contains(stdout, "already revoked") || !strings.Contains(stdout, "what is known is the time\n") {
		t.Errorf("revoke again: got status %d: %s%s", code, stdout, stderr)
	}
	stdout, stderr, code = run("approve", "app", "a", "--data-dir", dir)
	if code != exitFailed || stdout != "" || !strings.Contains(stderr, "etcdctl compact, defrag, alarm disarm") {
		t.Errorf("approve: got status %d: %s%s", code, stdout, stderr)
	}
	stdout, _, code = run("status", "--data-dir", dir) // the keygate at the default address may be missing
	if code != exitFailed || !strings.Contains(stdout, "not asked (write a barrier: etcdserver: mvcc: database space exceeded)") {
		t.Errorf("status: got status %d: %s", code, stdout)
	}
}

func TestShellWord(t *testing.T) {
	for in, want := range map[string]string{
		"": "''", "a-b.c/d@e": "a-b.c/d@e", "a b": "'a b'", "it's": `'it'\''s'`, "$(x)": "'$(x)'", "~": "'~'", "\x1b[0m": `'\x1b[0m'`,
	} {
		if got := shellWord(in); got != want {
			t.Errorf("%q: got %s, want %s", in, got, want)
		}
	}
}
