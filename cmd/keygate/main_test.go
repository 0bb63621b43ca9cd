package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"keygate/authz"
	"keygate/config"
	"keygate/envoy/proxy/proxytest"
	"keygate/examples/quickstart"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"keygate": main,
		"kv":      kv,
	})
}

var update = flag.Bool("update", false, "rewrite the expected output in testdata/script")

// Each story in testdata/script runs the binary as its users do. Commands
// are added: "exits N prog args…" wants a certain status, "waitsocket FILE"
// waits until somebody listens there, "waitfile FILE" until it is there,
// "waitready FILE" until the keygate whose health socket it is answers checks;
// and a program: kv, a small etcdctl.
func TestScripts(t *testing.T) {
	// A unix socket's path has at most 107 bytes; the default folder is deep.
	root, err := os.MkdirTemp("/tmp", "kg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		WorkdirRoot:         root,
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("ENVOY", proxytest.Binary(t))
			e.Setenv("WEATHER_KEY", quickstart.WeatherKey)
			e.Setenv("WEATHER_ID", quickstart.KeyID(quickstart.WeatherKey).String())
			e.Setenv("OWN_ID", quickstart.KeyID("my-own-consumer-key-0001").String())
			for _, name := range quickstart.Files() {
				if err := os.WriteFile(filepath.Join(e.WorkDir, name), quickstart.Read(name), 0o600); err != nil {
					return err
				}
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      exits,
			"waitsocket": waitSocket,
			"waitready":  waitReady,
			"waitfile":   waitFile,
		},
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits status prog args...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got, exit := 0, (*exec.ExitError)(nil)
	switch {
	case errors.As(err, &exit):
		got = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("%v: got status %d, want %d", args[1:], got, want)
	}
}

func waitSocket(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: waitsocket file")
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := net.Dial("unix", ts.MkAbs(args[0]))
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("nobody listens: %v", err)
		}
		time.Sleep(10 * time.Millisecond) // between two looks at the condition
	}
}

func waitFile(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: waitfile file")
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) { // between two looks
		_, err := os.Stat(ts.MkAbs(args[0]))
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("not there: %v", err)
		}
	}
}

func waitReady(ts *testscript.TestScript, neg bool, args []string) {
	waitSocket(ts, neg, args)
	at := config.Address{Network: "unix", Address: ts.MkAbs(args[0])}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		st, err := fetchStatus(context.Background(), at)
		if err == nil && st.Ready {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("not ready: %v %s", err, st.Problem)
		}
	}
}

// kv is "kv SOCKET put KEY VALUE", "kv SOCKET del KEY" or "kv SOCKET get PREFIX".
func kv() {
	err := func() error {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + os.Args[1]}})
		if err != nil {
			return err
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		switch os.Args[2] {
		case "put":
			_, err = client.Put(ctx, os.Args[3], os.Args[4])
			return err
		case "del":
			_, err = client.Delete(ctx, os.Args[3])
			return err
		}
		r, err := client.Get(ctx, os.Args[3], clientv3.WithPrefix())
		if err != nil {
			return err
		}
		for _, e := range r.Kvs {
			fmt.Printf("%s = %s\n", e.Key, e.Value)
		}
		return nil
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// environ is the test's, without settings and what make gives to the tests.
func environ() []string {
	return slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "KEYGATE_") })
}

// A first signal ends a command in order, even one that waits for its input.
func TestInterrupt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data") // not there yet: made private
	for feedText, args := range map[string][]string{
		"abc\n": {"key-id", "-"},
		"\n":    {"import", "--data-dir", dir, "-"},
	} {
		input, feed, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer input.Close()
		defer feed.Close()
		var stderr bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, "keygate", args...)
		cmd.Env, cmd.Stdin, cmd.Stderr = environ(), input, &stderr
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// The command has begun to read once what was written is gone.
		if _, err := feed.WriteString(feedText); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(20 * time.Second)
		for n := 1; n > 0; {
			if n, err = unix.IoctlGetInt(int(input.Fd()), unix.TIOCINQ); err != nil || time.Now().After(deadline) {
				t.Fatalf("%q does not read: %d bytes left, %v: %s", args, n, err, &stderr)
			}
			time.Sleep(time.Millisecond) // between two looks at the condition
		}
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, stdout)
		_ = cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != exitInterrupted || stderr.String() != "keygate: interrupted\n" {
			t.Errorf("%q: got status %d, want %d: %s", args, got, exitInterrupted, &stderr)
		}
	}
}

// Every command has help of at most 80 columns with two examples of itself.
func TestHelp(t *testing.T) {
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Name() == "completion" || cmd.Name() == "help" { // cobra's own
			return
		}
		path := cmd.CommandPath()
		var out bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &out}
		if code := a.main(append(strings.Fields(path)[1:], "--help")); code != exitOK {
			t.Errorf("%s --help: got status %d: %s", path, code, out.String())
		}
		for i, line := range strings.Split(out.String(), "\n") {
			if n := utf8.RuneCountInString(line); n > helpWidth {
				t.Errorf("%s --help: line %d has %d columns, want %d: %s", path, i+1, n, helpWidth, line)
			}
			if strings.TrimRight(line, " ") != line {
				t.Errorf("%s --help: line %d ends in blanks: %q", path, i+1, line)
			}
		}
		examples := 0
		for _, line := range strings.Split(cmd.Example, "\n") {
			if !strings.HasPrefix(strings.TrimSpace(line), "#") {
				examples++
			}
		}
		if examples < 2 || !strings.Contains(out.String(), cmd.Example) {
			t.Errorf("%s --help: got %d examples, want 2: %s", path, examples, out.String())
		}
		if cmd.HasParent() && !cmd.Parent().HasParent() && cmd.GroupID == "" {
			t.Errorf("%s is in no group", path)
		}
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	walk(newRootCommand(&app{}))
}

// Every setting is a flag of config print, and so in its help.
func TestEverySettingHasAFlag(t *testing.T) {
	root := newRootCommand(&app{})
	cmd, _, err := root.Find([]string{"config", "print"})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(`config etcd-endpoints etcd-cacert etcd-cert etcd-key etcd-user etcd-password-file etcd-quota prefix org data-dir
		authz-listen authz-http-listen index-records authz-workers gc-headroom authz-tls-cert authz-tls-key authz-client-ca authz-insecure health-listen key-header key-query denial-body authz-codec log-decisions
		staleness-budget log-format log-level management-listen management-tls-cert management-tls-key management-insecure management-hosts
		sealing-key-file server server-cacert token-file insecure`) {
		if cmd.Flags().Lookup(name) == nil {
			t.Errorf("no flag --%s", name)
		}
	}
}

func TestExitCode(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("some"), 1},
		{fmt.Errorf("read: %w", exitWith(exitDenied, nil)), 7},
		{exitWith(exitConflict, context.DeadlineExceeded), 6},
		{fmt.Errorf("read: %w", authz.ErrUnavailable), 5},
		{fmt.Errorf("read: %w", context.DeadlineExceeded), 5},
		{fmt.Errorf("read: %w", status.Error(codes.Unavailable, "no")), 5},
		{fmt.Errorf("read: %w", rpctypes.ErrNoLeader), 5},
		{fmt.Errorf("read: %w", rpctypes.ErrAuthFailed), 3},
		{fmt.Errorf("read: %w", rpctypes.ErrPermissionDenied), 3},
		{fmt.Errorf("read: %w", rpctypes.ErrInvalidAuthToken), 3},
		{fmt.Errorf("read: %w", status.Error(codes.Unauthenticated, "no")), 3},
		{fmt.Errorf("write: %w", rpctypes.ErrNoSpace), 1},
	} {
		if got := exitCode(tt.err); got != tt.want {
			t.Errorf("%v: got %d, want %d", tt.err, got, tt.want)
		}
	}
}

// The commands that the CLI promises are there, once each.
func TestCommands(t *testing.T) {
	var got []string
	for _, c := range newRootCommand(&app{}).Commands() {
		got = append(got, c.Name())
	}
	slices.Sort(got)
	for _, name := range strings.Fields("get describe create delete import revoke approve token audit sealing-key check config etcd key-id version") {
		if !slices.Contains(got, name) {
			t.Errorf("no command %q among %q", name, got)
		}
	}
	if len(slices.Compact(slices.Clone(got))) != len(got) {
		t.Errorf("got a command twice: %q", got)
	}
}
