package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

	"golang.org/x/sys/unix"
)

// startTimeout of a server. One with a million keys takes its time.
const startTimeout = 3 * time.Minute

// process is a server that runs, in a process group of its own, and that ends
// with this process.
type process struct {
	name    string
	authz   string // address of its checks
	health  string // address of its metrics
	cmd     *exec.Cmd
	stdin   io.Closer
	ended   chan struct{} // closed when it has
	log     *tail
	dataDir string
	etcd    int // pid of the etcd that is its child
}

// build makes a command of this module, with the flags of make build.
func (b *bench) build(ctx context.Context, pkg string) (string, error) {
	binary := filepath.Join(b.folder, filepath.Base(pkg))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", binary, pkg)
	if b.keep != "" { // perf wants symbols
		cmd = exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", binary, pkg)
	}
	cmd.Dir = b.root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return binary, nil
}

// noop starts the server that does nothing.
func (b *bench) noop(ctx context.Context) (*process, error) {
	binary, err := b.build(ctx, "./bench/noop")
	if err != nil {
		return nil, err
	}
	p := &process{name: "no-op", cmd: exec.Command(binary)}
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	p.stdin = in
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.launch(); err != nil {
		return nil, err
	}
	return p, p.addresses(ctx, out, "")
}

// anyPort of the loopback that is free.
const anyPort = "127.0.0.1:0"

// keygate starts the service with its default settings and an etcd of its own
// in dataDir, on ports that are free.
func (b *bench) keygate(ctx context.Context, binary, dataDir string, args ...string) (*process, error) {
	p := &process{name: "keygate", dataDir: dataDir}
	err := b.startKeygate(ctx, p, binary, append([]string{"serve", "--data-dir", dataDir, "--management-listen", anyPort}, args...)...)
	if err != nil {
		return nil, err
	}
	body, err := p.get(ctx, "/status")
	var status struct{ Etcd struct{ Pid int } }
	if err == nil {
		err = json.Unmarshal(body, &status)
	}
	if err != nil {
		p.stop()
		return nil, fmt.Errorf("status of keygate: %w", err)
	}
	p.etcd = status.Etcd.Pid
	return p, nil
}

// replica starts a second data plane, on the etcd of another keygate.
func (b *bench) replica(ctx context.Context, binary string, of *process) (*process, error) {
	p := &process{name: "keygate"}
	if err := b.startKeygate(ctx, p, binary, "authz", "--etcd-endpoints", etcdEndpoint(of.dataDir)); err != nil {
		return nil, fmt.Errorf("second keygate: %w", err)
	}
	return p, nil
}

// startKeygate returns when the index answers.
func (b *bench) startKeygate(ctx context.Context, p *process, binary string, args ...string) error {
	p.cmd = exec.Command(binary, append(args, "--log-format", "json", "--authz-listen", anyPort, "--health-listen", anyPort)...)
	out, err := p.cmd.StderrPipe()
	if err != nil {
		return err
	}
	p.cmd.Env = append(withoutKeygate(os.Environ()), strings.Fields(b.env)...)
	if err := p.launch(); err != nil {
		return err
	}
	if err := p.addresses(ctx, out, "keygate starts"); err != nil {
		return err
	}
	if err := p.ready(ctx); err != nil {
		p.stop()
		return err
	}
	took, err := p.indexed(ctx)
	if err != nil {
		p.stop()
		return err
	}
	b.progress("keygate is ready, and %s later answers from its index", took.Round(time.Millisecond))
	return nil
}

// withoutKeygate drops the settings that the environment may hold: the default
// ones are what is measured.
func withoutKeygate(environ []string) (kept []string) {
	for _, v := range environ {
		if !strings.HasPrefix(v, "KEYGATE_") {
			kept = append(kept, v)
		}
	}
	return kept
}

// launch starts the process on a thread that lasts as long: when the thread
// that started it ends, so does the child.
func (p *process) launch() error {
	p.ended = make(chan struct{})
	p.log = &tail{}
	if p.cmd.Stderr == nil {
		p.cmd.Stderr = p.log
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := p.cmd.Start(); err != nil {
			started <- fmt.Errorf("start %s: %w", p.name, err)
			return
		}
		started <- nil
		// Not Cmd.Wait: that closes the pipes that are still read.
		_, _ = p.cmd.Process.Wait()
		close(p.ended)
	}()
	return <-started
}

// addresses reads the first line whose "msg" is the given one, and goes on
// reading what the process says.
func (p *process) addresses(ctx context.Context, out io.Reader, msg string) error {
	found := make(chan struct{})
	go func() {
		once := sync.OnceFunc(func() { close(found) })
		for lines := bufio.NewScanner(out); lines.Scan(); {
			_, _ = p.log.Write(append(lines.Bytes(), '\n'))
			var line struct{ Msg, Authz, Health string }
			switch err := json.Unmarshal(lines.Bytes(), &line); {
			case err != nil:
			case line.Msg == msg && line.Authz != "":
				p.authz, p.health = line.Authz, line.Health
				once()
			}
		}
		_, _ = io.Copy(io.Discard, out)
	}()
	select {
	case <-found:
		return nil
	case <-p.ended:
		return fmt.Errorf("%s has ended:\n%s", p.name, p.log)
	case <-ctx.Done():
		p.stop()
		return ctx.Err()
	case <-time.After(startTimeout):
		p.stop()
		return fmt.Errorf("%s does not say where it listens:\n%s", p.name, p.log)
	}
}

// ready waits until the server says so.
func (p *process) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := p.get(ctx, "/readyz"); err == nil {
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("%s has ended:\n%s", p.name, p.log)
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w\n%s", p.name, ctx.Err(), p.log)
		case <-tick.C:
		}
	}
}

// indexTimeout after which a keygate is measured that has no index.
const indexTimeout = 2 * time.Minute

// indexed waits until keygate answers from its index: it is ready before.
func (p *process) indexed(ctx context.Context) (time.Duration, error) {
	for began := time.Now(); ; {
		m, err := p.metrics(ctx)
		if err != nil {
			return 0, err
		}
		if ready, is := m["keygate_index_ready"]; ready == 1 || !is {
			return time.Since(began), nil
		}
		if time.Since(began) > indexTimeout {
			return 0, fmt.Errorf("keygate has no index after %v; it counts %.0f records in it", indexTimeout, m["keygate_index_records"])
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (p *process) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.health+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return body, err
}

// stopTimeout after which a process is killed that was told to end.
const stopTimeout = 15 * time.Second

// orphanTimeout for the end of an etcd whose keygate was killed.
const orphanTimeout = 2 * time.Second

// stop ends the process, and with it its etcd. keygate would go on answering for
// some seconds, for the sake of an Envoy; here nobody needs that, so it is
// killed, and its etcd dies with it.
func (p *process) stop() {
	signal := syscall.SIGTERM
	if p.etcd != 0 {
		signal = syscall.SIGKILL
	}
	_ = p.cmd.Process.Signal(signal)
	defer func() {
		for began := time.Now(); p.etcd != 0 && syscall.Kill(p.etcd, 0) == nil && time.Since(began) < orphanTimeout; {
			time.Sleep(5 * time.Millisecond)
		}
	}()
	select {
	case <-p.ended:
	case <-time.After(stopTimeout):
		_ = syscall.Kill(-p.pid(), syscall.SIGKILL) // its group
		<-p.ended
	}
	if p.stdin != nil {
		_ = p.stdin.Close()
	}
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// cpu is the user and system time of all threads of the process, those that
// have ended too, but not of its children.
func (p *process) cpu() (time.Duration, error) { return processCPU(p.pid()) }

func processCPU(pid int) (time.Duration, error) {
	// What clock_getcpuclockid(3) makes of a process. It counts in nanoseconds,
	// /proc/<pid>/stat in hundredths of a second.
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// metrics of the server, each sample by its name with its labels.
func (p *process) metrics(ctx context.Context) (map[string]float64, error) {
	body, err := p.get(ctx, "/metrics")
	if err != nil {
		return nil, fmt.Errorf("metrics of %s: %w", p.name, err)
	}
	samples := map[string]float64{}
	for line := range bytes.Lines(body) {
		name, value, ok := strings.Cut(strings.TrimSpace(string(line)), " ")
		if v, err := strconv.ParseFloat(value, 64); ok && err == nil && name[0] != '#' {
			samples[name] = v
		}
	}
	return samples, nil
}

// mallocs is how many objects the process has allocated.
func (p *process) mallocs(ctx context.Context) (float64, error) {
	m, err := p.metrics(ctx)
	if err != nil {
		return 0, err
	}
	n, ok := m["go_memstats_mallocs_total"]
	if !ok {
		return 0, fmt.Errorf("%s does not tell its allocations", p.name)
	}
	return n, nil
}

// tail keeps the end of what is written to it. It is safe for concurrent use.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailBytes = 4000

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - tailBytes; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
