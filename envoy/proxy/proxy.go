// Package proxy finds an Envoy and runs it as a child process with the hardened
// configuration of package envoy.
package proxy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"keygate/envoy"
)

// Config of an Envoy.
type Config struct {
	// Binary of Envoy; empty means what Find finds.
	Binary string
	// Bootstrap is its configuration.
	Bootstrap envoy.Bootstrap
	// Edit may change the YAML that Bootstrap renders, for a configuration that
	// is not the hardened one. Its listener stays Bootstrap.Listen. Nil leaves it.
	Edit func(bootstrap []byte) ([]byte, error)
	// AccessLog gets Envoy's standard output, one line a request where the
	// bootstrap asks for an access log; nil drops it. It is written to from
	// one goroutine.
	AccessLog io.Writer
	// Concurrency is the number of Envoy's workers; 0 means one per core.
	Concurrency int
	// StartTimeout until Envoy is ready; 0 means 30 s.
	StartTimeout time.Duration
	// Logger gets Envoy's own warnings; nil means none.
	Logger *slog.Logger
}

// Proxy is a running Envoy. Its methods are safe for concurrent use.
type Proxy struct {
	url    string
	admin  string
	pid    int
	tail   *tail
	exited chan struct{} // closed after err is set
	err    error         // why it exited; read only after exited
}

// Start runs Envoy and returns when it is ready to take requests. It dies with
// this process, and when ctx ends before it is ready; once it is ready, ctx no
// longer matters and the caller owns it: Run or Stop ends it. A listen address
// that is taken is told before anything is started.
func Start(ctx context.Context, config Config) (*Proxy, error) {
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	if config.StartTimeout == 0 {
		config.StartTimeout = 30 * time.Second
	}
	bootstrap, err := config.Bootstrap.Render()
	if err != nil {
		return nil, fmt.Errorf("envoy configuration: %w", err)
	}
	if config.Edit != nil {
		if bootstrap, err = config.Edit(bootstrap); err != nil {
			return nil, fmt.Errorf("edit envoy's configuration: %w", err)
		}
	}
	if config.Binary == "" {
		if config.Binary, err = Find(ctx); err != nil {
			return nil, err
		}
	}
	if err := checkFree(ctx, config.Bootstrap.Listen); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "keygate-envoy-")
	if err != nil {
		return nil, fmt.Errorf("folder for envoy's configuration: %w", err)
	}
	// Envoy reads the configuration once, and the admin address is read before
	// Start returns.
	defer func() { _ = os.RemoveAll(dir) }()
	file := filepath.Join(dir, "bootstrap.yaml")
	if err := os.WriteFile(file, bootstrap, 0o600); err != nil {
		return nil, fmt.Errorf("write envoy's configuration: %w", err)
	}
	adminFile := filepath.Join(dir, "admin")

	args := []string{"-c", file, "--admin-address-path", adminFile, "--disable-hot-restart", "--log-level", "warning",
		"--file-flush-interval-msec", "200"} // of the access log; Envoy's default is 10 s
	if config.Concurrency > 0 {
		args = append(args, "--concurrency", strconv.Itoa(config.Concurrency))
	}
	p := &Proxy{tail: &tail{logger: config.Logger}, exited: make(chan struct{})}
	if err := p.launch(config, args); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, config.StartTimeout)
	defer cancel()
	if err := p.awaitReady(ctx, adminFile); err != nil {
		p.kill()
		return nil, err
	}
	return p, nil
}

// checkFree tells whether address can be listened on. Envoy itself shares a
// port with whoever lets it (SO_REUSEPORT), and would say nothing.
func checkFree(ctx context.Context, address string) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s is taken: stop what listens there, or choose another address for Envoy", address)
	}
	if err != nil {
		return fmt.Errorf("%s cannot be listened on: %w", address, err)
	}
	return l.Close()
}

// launch starts the process and the goroutines that follow it to its end.
func (p *Proxy) launch(config Config, args []string) error {
	cmd := exec.Command(config.Binary, args...)
	cmd.SysProcAttr = processAttributes()
	cmd.Stdout = config.AccessLog
	cmd.Stderr = p.tail
	// A grandchild may hold the pipes open; it is in the group that kill ends.
	cmd.WaitDelay = 2 * time.Second
	started := make(chan error)
	go func() {
		// The kernel ends the child when the thread that started it ends, so
		// this thread must last as long as the child. The goroutine ends with
		// it locked, and the thread is not used again.
		runtime.LockOSThread()
		if err := cmd.Start(); err != nil {
			started <- fmt.Errorf("start envoy: %w", err)
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		err := cmd.Wait()
		if err == nil {
			err = errors.New("exit status 0")
		}
		p.err = fmt.Errorf("envoy ended (%w)%s", err, p.tail)
		close(p.exited)
	}()
	return <-started
}

// awaitReady polls until Envoy answers that it is live, and reads where.
func (p *Proxy) awaitReady(ctx context.Context, adminFile string) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("it has not opened its admin port")
	for {
		select {
		case <-p.exited:
			return p.err
		case <-ctx.Done():
			return fmt.Errorf("envoy was not ready in time (%w): %w%s", ctx.Err(), last, p.tail)
		case <-tick.C:
		}
		address, err := os.ReadFile(adminFile)
		if err != nil || len(address) == 0 {
			continue
		}
		p.admin = "http://" + strings.TrimSpace(string(address))
		if _, last = p.ask(ctx, http.MethodGet, "/ready"); last != nil {
			continue
		}
		body, err := p.ask(ctx, http.MethodGet, "/listeners?format=json")
		if last = err; err != nil {
			continue
		}
		if p.url, last = listenerURL(body); last == nil {
			return nil
		}
	}
}

// ask sends one request to the admin interface; any status but 200 is an error.
func (p *Proxy) ask(ctx context.Context, method, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, p.admin+path, nil)
	if err != nil {
		return nil, err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask envoy's admin interface: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return nil, fmt.Errorf("read the answer of envoy's admin interface: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("envoy's admin interface: %s: %s %s", path, resp.Status, strings.TrimSpace(string(body)))
	}
	return body, nil
}

// listenerURL is the address of the one listener.
func listenerURL(body []byte) (string, error) {
	var listeners struct {
		Statuses []struct {
			Address struct {
				Socket struct {
					Address string `json:"address"`
					Port    int    `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &listeners); err != nil {
		return "", fmt.Errorf("read envoy's listeners: %w", err)
	}
	if len(listeners.Statuses) != 1 || listeners.Statuses[0].Address.Socket.Port == 0 {
		return "", fmt.Errorf("envoy has %d listeners on TCP, want 1", len(listeners.Statuses))
	}
	socket := listeners.Statuses[0].Address.Socket
	host := socket.Address
	switch host { // an address to listen on, not one to connect to
	case "0.0.0.0":
		host = "127.0.0.1"
	case "::":
		host = "::1"
	}
	return "http://" + net.JoinHostPort(host, strconv.Itoa(socket.Port)), nil
}

// URL where clients connect, without a slash at its end.
func (p *Proxy) URL() string { return p.url }

// Address where clients connect, as host:port.
func (p *Proxy) Address() string { return strings.TrimPrefix(p.url, "http://") }

// AdminURL of Envoy's own interface, without a slash at its end.
func (p *Proxy) AdminURL() string { return p.admin }

// Pid of the process.
func (p *Proxy) Pid() int { return p.pid }

// Exited is closed when the process has ended, for whatever reason.
func (p *Proxy) Exited() <-chan struct{} { return p.exited }

// Run waits until ctx ends, stops Envoy and returns nil; or until Envoy ends
// by itself, and returns why, with its last log lines.
func (p *Proxy) Run(ctx context.Context) error {
	select {
	case <-p.exited:
		return p.err
	case <-ctx.Done():
		p.Stop()
		return nil
	}
}

// Stop ends Envoy and returns when it has ended: it is asked to quit, then
// sent SIGTERM, then killed, within about six seconds in all. Requests under
// way are cut. Stopping twice is fine.
func (p *Proxy) Stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	// It may have ended already, or end before it answers; the wait tells.
	_, _ = p.ask(ctx, http.MethodPost, "/quitquitquit")
	if p.wait(2 * time.Second) {
		return
	}
	_ = syscall.Kill(-p.pid, syscall.SIGTERM)
	if p.wait(2 * time.Second) {
		return
	}
	p.kill()
}

func (p *Proxy) wait(limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-p.exited:
		return true
	case <-t.C:
		return false
	}
}

// kill ends the whole process group and waits for Envoy itself.
func (p *Proxy) kill() {
	select {
	case <-p.exited: // the number may be another's by now
		return
	default:
	}
	_ = syscall.Kill(-p.pid, syscall.SIGKILL)
	<-p.exited
}

// tail keeps the last lines that were written to it. It is safe for concurrent
// use.
type tail struct {
	logger *slog.Logger

	mu      sync.Mutex
	partial []byte
	lines   []string
}

// Bounds of what is kept of Envoy's log.
const (
	tailLines = 20
	tailLine  = 1000 // bytes
)

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.partial = append(t.partial, b...)
	for {
		n, line, _ := bufio.ScanLines(t.partial, false)
		if n == 0 {
			break
		}
		t.addLocked(string(line))
		t.partial = t.partial[n:]
	}
	if len(t.partial) > tailLine {
		t.addLocked(string(t.partial))
		t.partial = nil
	}
	return len(b), nil
}

func (t *tail) addLocked(line string) {
	if len(line) > tailLine {
		line = line[:tailLine] + "…"
	}
	t.logger.Warn("envoy", "line", line)
	if t.lines = append(t.lines, line); len(t.lines) > tailLines {
		t.lines = t.lines[1:]
	}
}

// String is the end of a sentence that tells the last lines.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := t.lines
	if len(t.partial) > 0 {
		lines = append(lines[:len(lines):len(lines)], string(t.partial))
	}
	if len(lines) == 0 {
		return "; it logged nothing"
	}
	return "; its last log lines:\n  " + strings.Join(lines, "\n  ")
}
