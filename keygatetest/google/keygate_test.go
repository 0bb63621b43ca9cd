package google_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	// patience bounds every wait, on a machine that is busy.
	patience = 30 * time.Second
	org      = "organizations/acme"
)

// binary is the keygate under test, made by TestMain.
var binary string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "keygate-google")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = os.RemoveAll(dir) }()
		binary = filepath.Join(dir, "keygate")
		// The parent module: what is tested here is only what a user would run.
		build := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "./cmd/keygate")
		build.Dir = filepath.Join("..", "..")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build keygate: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// keygate is a `keygate serve` with an etcd of its own.
type keygate struct {
	// url of the management API, without a slash at its end.
	url string
	// token of its administrator.
	token string
	// requests that its clients have made; safe for concurrent use.
	requests *recorder
}

// start runs one until the test ends.
func start(t *testing.T) *keygate {
	t.Helper()
	// Short, unlike t.TempDir's: etcd's socket in it has at most 107 bytes.
	dir, err := os.MkdirTemp("", "kg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	const anyPort = "127.0.0.1:0"
	cmd := exec.Command(binary, "serve", "--data-dir", dir, "--org", "acme", "--log-format", "json",
		"--authz-listen", anyPort, "--health-listen", anyPort, "--management-listen", anyPort)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "KEYGATE_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start keygate: %v", err)
	}
	served, ended := make(chan string, 1), make(chan struct{})
	var log strings.Builder // read after ended is closed
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			log.WriteString(lines.Text() + "\n")
			var line struct{ Msg, Address string }
			if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "the management API is served" {
				served <- line.Address
			}
		}
		_, _ = io.Copy(io.Discard, stderr) // a line that was too long for the scanner
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(patience):
			t.Errorf("keygate has not ended %v after SIGTERM", patience)
			_ = cmd.Process.Kill() // its etcd goes with it
			<-ended
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("keygate ended with %v, want nil", err)
		}
		if t.Failed() {
			t.Logf("keygate's log:\n%s", log.String())
		}
	})
	k := &keygate{requests: &recorder{next: http.DefaultTransport}}
	select {
	case address := <-served:
		k.url = "http://" + address
	case <-ended:
		t.Fatal("keygate has ended before it served")
	case <-time.After(patience):
		t.Fatalf("keygate does not serve the API after %v", patience)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		token, err := os.ReadFile(filepath.Join(dir, "admin-token"))
		if err == nil {
			k.token = strings.TrimSpace(string(token))
			return k
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("no admin token after %v: %v", patience, err)
		}
	}
}

// client sends the token with each request. Google's client takes either an
// HTTP client or a source of tokens: this is what its users do where both are
// needed.
func (k *keygate) client() *http.Client { return &http.Client{Transport: bearer{k.token, k.requests}} }

type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

// recorder notes which requests passed, as "METHOD /path".
type recorder struct {
	next http.RoundTripper

	state struct {
		sync.Mutex
		all []string
	}
}

func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.next.RoundTrip(req)
	if err == nil && resp.StatusCode < 300 {
		r.state.Lock()
		defer r.state.Unlock()
		r.state.all = append(r.state.all, req.Method+" "+req.URL.EscapedPath())
	}
	return resp, err
}

func (r *recorder) list() []string {
	r.state.Lock()
	defer r.state.Unlock()
	return append([]string{}, r.state.all...)
}
