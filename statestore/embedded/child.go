package embedded

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	backoffMin = 200 * time.Millisecond
	backoffMax = 1200 * time.Millisecond
	// stopWait is how long a child may take to stop; etcd takes 4 to 60 ms.
	stopWait = 5 * time.Second
	// readyPoll is how often a starting child is looked at.
	readyPoll = 20 * time.Millisecond
	// readyAnswer bounds one question to a starting child.
	readyAnswer = 5 * time.Second
	// lastLines of a child that ended are repeated with its end.
	lastLines = 5
	// lineBytes is how much is kept of one line.
	lineBytes = 4 << 10
)

// supervisedVariable tells a process that a Child reads its log.
const supervisedVariable = "KEYGATE_SUPERVISED"

// Supervised reports whether this process was started by a [Child]. It should
// then log to standard error through [slog.NewJSONHandler], at every level: the
// parent passes the lines on through its own logger and filters there.
func Supervised() bool { return os.Getenv(supervisedVariable) != "" }

// ChildConfig of a supervised etcd.
type ChildConfig struct {
	// Path of the binary to run; "" means the one that is running.
	Path string
	// Args for it; nil means
	//
	//	etcd --data-dir <DataDir> [--etcd-quota <QuotaBytes>]
	//
	// The process must call [Serve] on DataDir, stop on SIGTERM and end with
	// the status that [ExitCode] gives.
	Args []string
	// DataDir, as in [Config].
	DataDir string
	// QuotaBytes, as in [Config].
	QuotaBytes int64
	// Logger receives the child's log and what happens to it. nil drops all.
	Logger *slog.Logger
}

// Child is a process that serves etcd, started again whenever it ends. The
// process has a group of its own and ends when this one does, however this one
// ends (on Linux).
//
// Run may be called once. The other methods may be called at any time, from
// any goroutine.
type Child struct {
	path     string
	args     []string
	dataDir  string
	endpoint string
	logger   *slog.Logger

	ready    chan struct{} // closed when first ready
	pid      atomic.Int64
	restarts atomic.Int64
}

// NewChild checks what can be checked before a start; it starts nothing.
func NewChild(cfg ChildConfig) (*Child, error) {
	socket, err := socketPath(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	endpoint, err := Endpoint(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	c := &Child{
		path:     cfg.Path,
		args:     slices.Clone(cfg.Args),
		dataDir:  filepath.Dir(socket),
		endpoint: endpoint,
		logger:   cfg.Logger,
		ready:    make(chan struct{}),
	}
	if c.path == "" {
		if c.path, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("find the running binary: %w", err)
		}
	}
	if c.args == nil {
		c.args = []string{"etcd", "--data-dir", c.dataDir}
		if cfg.QuotaBytes != 0 {
			c.args = append(c.args, "--etcd-quota", strconv.FormatInt(cfg.QuotaBytes, 10))
		}
	}
	if c.logger == nil {
		c.logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Endpoint to reach the child at, the same over restarts.
func (c *Child) Endpoint() string { return c.endpoint }

// Ready is closed when the child has answered a linearizable read for the
// first time. It says nothing about later.
func (c *Child) Ready() <-chan struct{} { return c.ready }

// Pid of the process that is running, 0 between two.
func (c *Child) Pid() int { return int(c.pid.Load()) }

// Restarts counts the processes after the first.
func (c *Child) Restarts() int { return int(c.restarts.Load()) }

// Run keeps the child running until ctx ends, then stops it and returns nil
// when it is gone: SIGTERM, and SIGKILL after 5 s.
//
// A child that ends is started again after 0.2 s, and after up to 1.2 s if it
// does not become ready in between. Before the first Ready, Run gives up if the
// child cannot be executed or ends with the status of a permanent error; the
// error then repeats the child's last words.
func (c *Child) Run(ctx context.Context) error {
	// The kernel's signal at the parent's death comes when the thread that
	// started the child ends. This goroutine keeps its thread for as long as
	// there is a child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	backoff := backoffMin
	for ctx.Err() == nil {
		answered, err := c.runOnce(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if answered {
			backoff = backoffMin
		}
		select {
		case <-c.ready:
		default:
			var p *permanentError
			if errors.As(err, &p) {
				return err
			}
		}
		c.logger.Error("etcd ended and is started again", "error", err, "in", backoff)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, backoffMax)
		c.restarts.Add(1)
	}
	return nil
}

// runOnce runs one process to its end. The error says how it ended.
func (c *Child) runOnce(ctx context.Context) (answered bool, err error) {
	out := &childLog{logger: c.logger}
	cmd := exec.Command(c.path, c.args...)
	cmd.Env = append(os.Environ(), supervisedVariable+"=1")
	cmd.Stdout, cmd.Stderr = out, out // one writer: one goroutine writes
	cmd.WaitDelay = time.Second       // for output held open by something else
	cmd.SysProcAttr = childAttributes()
	if err := cmd.Start(); err != nil {
		return false, permanent(fmt.Errorf("start etcd: %w", err))
	}
	pid := cmd.Process.Pid
	c.pid.Store(int64(pid))
	c.logger.Debug("etcd is starting", "pid", pid)

	exited := make(chan error, 1)
	// Waits on any thread; only the start is bound to one.
	go func() { exited <- cmd.Wait() }()

	look, stopLooking := context.WithCancel(ctx)
	defer stopLooking()
	answer := make(chan struct{})
	var looking sync.WaitGroup
	looking.Go(func() {
		if c.awaitAnswer(look, pid) {
			close(answer)
		}
	})
	defer looking.Wait()
	defer stopLooking()

	waiting := answer
	for {
		select {
		case <-waiting:
			answered, waiting = true, nil
			c.logger.Info("etcd is ready", "endpoint", c.endpoint, "pid", pid)
			select {
			case <-c.ready:
			default:
				close(c.ready)
			}
		case err := <-exited:
			c.pid.Store(0)
			return answered, c.ended(err, out)
		case <-ctx.Done():
			err := c.stop(cmd.Process, exited)
			c.pid.Store(0)
			return answered, err
		}
	}
}

// stop ends the process and returns when it is gone.
func (c *Child) stop(p *os.Process, exited <-chan error) error {
	_ = p.Signal(syscall.SIGTERM) // fails only on a process that is gone
	select {
	case err := <-exited:
		return err
	case <-time.After(stopWait):
	}
	c.logger.Warn("etcd did not stop in time and is killed", "pid", p.Pid, "waited", stopWait)
	_ = p.Kill()
	return <-exited
}

// ended describes a process that ended unasked.
func (c *Child) ended(err error, out *childLog) error {
	if err == nil {
		err = errors.New("exit status 0")
	}
	lines := out.last()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == exitPermanent && len(lines) > 0 {
		// The last line is the error of Serve, as the process printed it.
		return permanent(fmt.Errorf("etcd: %s", lines[len(lines)-1]))
	}
	if len(lines) > 0 {
		return fmt.Errorf("etcd: %w: %s", err, strings.Join(lines, " | "))
	}
	return fmt.Errorf("etcd: %w", err)
}

// awaitAnswer returns true once the process with this id answers a
// linearizable read on the socket, false when ctx ends first.
func (c *Child) awaitAnswer(ctx context.Context, pid int) bool {
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
		// Whoever holds the lock is the one on the socket. Without this look a
		// process of somebody else's would be taken for the child.
		if lockHolder(c.dataDir) == pid && Running(ctx, c.dataDir) && c.answers(ctx) {
			return true
		}
	}
}

// answers asks with a new client each time: one that was refused waits for a
// second before it tries again.
func (c *Child) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, readyAnswer)
	defer cancel()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{c.endpoint}, Logger: zap.NewNop()})
	if err != nil {
		return false
	}
	defer client.Close()
	_, err = client.Get(ctx, "ready", clientv3.WithCountOnly())
	// With authentication on, etcd refuses the stranger after the read was
	// confirmed: an answer too.
	return err == nil || errors.Is(err, rpctypes.ErrUserEmpty)
}

// childLog passes a child's output on, line by line, and keeps the last ones.
// Write is called by one goroutine.
type childLog struct {
	logger  *slog.Logger
	partial []byte

	mu struct {
		sync.Mutex
		lines   []string // of warnings and errors
		crashed bool     // the last of lines says why
	}
}

func (l *childLog) Write(b []byte) (int, error) {
	n := len(b)
	for {
		line, rest, ok := bytes.Cut(b, []byte("\n"))
		if room := lineBytes - len(l.partial); len(line) > room {
			line = line[:room]
		}
		l.partial = append(l.partial, line...)
		if !ok {
			return n, nil
		}
		l.line(string(bytes.TrimSpace(l.partial)))
		l.partial, b = l.partial[:0], rest
	}
}

// last returns the last lines, after the process has ended.
func (l *childLog) last() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.mu.lines)
}

func (l *childLog) line(s string) {
	if s == "" {
		return
	}
	level, msg, attrs := parseLine(s)
	l.logger.LogAttrs(context.Background(), level, msg, attrs...)
	if level < slog.LevelWarn {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.crashed {
		return // a stack trace
	}
	l.mu.crashed = strings.HasPrefix(s, "panic: ") || strings.HasPrefix(s, "fatal error: ")
	for _, a := range attrs {
		msg += fmt.Sprintf(" %s=%v", a.Key, a.Value)
	}
	l.mu.lines = append(l.mu.lines, msg)
	if n := len(l.mu.lines); n > lastLines {
		l.mu.lines = slices.Delete(l.mu.lines, 0, n-lastLines)
	}
}

// parseLine takes apart what slog's JSON handler wrote. Any other line is the
// process's last words: an error, a panic.
func parseLine(s string) (slog.Level, string, []slog.Attr) {
	var fields map[string]any
	var level slog.Level
	d := json.NewDecoder(strings.NewReader(s))
	d.UseNumber() // a revision is no float
	if d.Decode(&fields) != nil {
		return slog.LevelWarn, s, nil
	}
	name, _ := fields[slog.LevelKey].(string)
	msg, ok := fields[slog.MessageKey].(string)
	if !ok || level.UnmarshalText([]byte(name)) != nil {
		return slog.LevelWarn, s, nil
	}
	delete(fields, slog.TimeKey)
	delete(fields, slog.LevelKey)
	delete(fields, slog.MessageKey)
	var attrs []slog.Attr
	for key, value := range fields {
		attrs = append(attrs, slog.Any(key, value))
	}
	slices.SortFunc(attrs, func(a, b slog.Attr) int { return strings.Compare(a.Key, b.Key) })
	return level, msg, attrs
}
