package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/envoy/proxy/proxytest"
)

func config(t *testing.T) proxy.Config {
	t.Helper()
	return proxy.Config{
		Binary:      proxytest.Binary(t),
		Concurrency: 1,
		Bootstrap: envoy.Bootstrap{
			Listen: "127.0.0.1:0", Authz: []string{"127.0.0.1:1"}, Upstream: "127.0.0.1:1", Routes: envoy.QuickstartRoutes(),
		},
	}
}

// mustWriteScript makes a file that stands in for an Envoy.
func mustWriteScript(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "envoy")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// alive tells whether a process is there, and not as a zombie.
func alive(pid int) bool {
	if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func TestFind(t *testing.T) {
	pinned := proxytest.Binary(t)
	t.Setenv("ENVOY", pinned)
	if got, err := proxy.Find(t.Context()); err != nil || got != pinned {
		t.Errorf("by $ENVOY: %q, %v, want %q", got, err, pinned)
	}
	const answer = "echo 'envoy  version: 0123abc/%s/Clean/RELEASE/BoringSSL'"
	newer, older := mustWriteScript(t, fmt.Sprintf(answer, "1.41.2-dev")), mustWriteScript(t, fmt.Sprintf(answer, "1.39.9"))
	for name, test := range map[string]struct{ env, path, want, err string }{
		"on PATH":         {path: filepath.Dir(newer), want: newer},
		"$ENVOY is first": {env: newer, path: filepath.Dir(older), want: newer},
		"PATH too old":    {path: filepath.Dir(older), err: "is Envoy 1.39.9, want 1.40.0 or newer"},
		"$ENVOY too old":  {env: older, path: filepath.Dir(newer), err: "$ENVOY: "},
		"nowhere":         {path: t.TempDir(), err: "no Envoy"},
		"not there":       {env: "/does/not/exist", err: "no such file"},
		"not Envoy":       {env: mustWriteScript(t, "echo hello"), err: "does not answer as Envoy does"},
	} {
		t.Setenv("ENVOY", test.env)
		t.Setenv("PATH", test.path)
		got, err := proxy.Find(t.Context())
		if got != test.want || (err == nil) != (test.err == "") {
			t.Errorf("%s: %q, %v, want %q", name, got, err, test.want)
		}
		if err != nil && (!strings.Contains(err.Error(), test.err) || !strings.Contains(err.Error(), "make tools")) {
			t.Errorf("%s: %v; want %q and how to get one", name, err, test.err)
		}
	}
}

func TestStartAndStop(t *testing.T) {
	p, err := proxy.Start(t.Context(), config(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	if !alive(p.Pid()) {
		t.Errorf("no process %d", p.Pid())
	}
	if group, err := syscall.Getpgid(p.Pid()); err != nil || group != p.Pid() {
		t.Errorf("process group %d, %v, want its own, %d", group, err, p.Pid())
	}
	conn, err := net.DialTimeout("tcp", p.Address(), 5*time.Second)
	if err != nil {
		t.Fatalf("%s: %v", p.URL(), err)
	}
	_ = conn.Close()
	start := time.Now()
	p.Stop()
	p.Stop()
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("a clean stop took %v", took)
	}
	if alive(p.Pid()) {
		t.Errorf("process %d is still there", p.Pid())
	}
}

// Run ends with its context, and Envoy with it.
func TestRun(t *testing.T) {
	p, err := proxy.Start(t.Context(), config(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if alive(p.Pid()) {
		t.Errorf("process %d is still there", p.Pid())
	}
}

// An Envoy that dies is told, with how.
func TestRunDies(t *testing.T) {
	p, err := proxy.Start(t.Context(), config(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	if err := syscall.Kill(p.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("Run: %v, want how it ended", err)
	}
}

func TestPortTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c := config(t)
	c.Binary = mustWriteScript(t, "touch \"$0.started\"")
	c.Bootstrap.Listen = l.Addr().String()
	if _, err := proxy.Start(t.Context(), c); err == nil || !strings.HasPrefix(err.Error(), l.Addr().String()+" is taken") {
		t.Errorf("Start: %v, want that %v is taken", err, l.Addr())
	}
	if _, err := os.Stat(c.Binary + ".started"); err == nil {
		t.Errorf("Envoy was started all the same")
	}
	// Another Envoy would share the port in silence.
	first := proxytest.MustStart(t, config(t).Bootstrap)
	c.Bootstrap.Listen = first.Address()
	if _, err := proxy.Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "is taken") {
		t.Errorf("Start on another Envoy's port: %v, want that it is taken", err)
	}
}

// What Envoy said last is in the error of a start that fails.
func TestStartFails(t *testing.T) {
	c := config(t)
	c.Binary = mustWriteScript(t, "echo first >&2; echo 'something is wrong' >&2; printf 'no newline' >&2; exit 3")
	_, err := proxy.Start(t.Context(), c)
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "something is wrong\n  no newline") {
		t.Errorf("Start: %v, want the status and the last lines", err)
	}
	c = config(t)
	c.Bootstrap.Routes[0].FilterMetadata = map[string]any{"keygate": "not a struct"}
	if _, err := proxy.Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "keygate") {
		t.Errorf("Start with a configuration that Envoy refuses: %v, want Envoy's own words", err)
	}
	c.Bootstrap.Routes = nil
	c.Binary = "/does/not/exist"
	if _, err := proxy.Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "start envoy") {
		t.Errorf("Start without a binary: %v", err)
	}
}

// An Envoy that never gets ready is ended, with all its children.
func TestStartTimesOut(t *testing.T) {
	c := config(t)
	pids := filepath.Join(t.TempDir(), "pids")
	c.Binary = mustWriteScript(t, "trap '' TERM; sleep 100 & echo $$ $! >"+pids+"; wait; wait")
	c.StartTimeout = 300 * time.Millisecond
	if _, err := proxy.Start(t.Context(), c); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Start: %v, want DeadlineExceeded", err)
	}
	text, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	var parent, child int
	if _, err := fmt.Sscan(string(text), &parent, &child); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{parent, child} {
		waitFor(t, fmt.Sprintf("process %d to end", pid), func() bool { return !alive(pid) })
	}
}

// Envoy does not outlive a process that is killed.
func TestDiesWithParent(t *testing.T) {
	if os.Getenv("TEST_CHILD") != "" {
		p, err := proxy.Start(t.Context(), config(t))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("pid %d\n", p.Pid())
		<-t.Context().Done()
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDiesWithParent$", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), "TEST_CHILD=1", "TEST_ENVOY="+proxytest.Binary(t))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanf(out, "pid %d\n", &pid); err != nil {
		t.Fatalf("the child said nothing: %v", err)
	}
	if !alive(pid) {
		t.Fatalf("no process %d", pid)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	waitFor(t, "Envoy to end with its parent", func() bool { return !alive(pid) })
}
