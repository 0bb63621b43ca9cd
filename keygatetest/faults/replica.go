package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
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

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"

	"keygate/authz"
	"keygate/examples/quickstart"
	"keygate/keygatetest/etcdtest"
	"keygate/server"
	"keygate/statestore/embedded"
)

// Replica is one keygate as a process, and the proxies between it and each
// member of etcd. Methods that start, stop or break it belong to the scenario's
// goroutine.
type Replica struct {
	Index int
	// Links to etcd, one for each member. Whatever they can do to a connection may
	// be done to them; CutOff is the common case, and marks it.
	Links []*etcdtest.Proxy
	// Authz and Health are the addresses it listens on, the same in each life.
	Authz, Health string
	// Args that it is started with; a change counts from the next Start on.
	Args []string
	// Password and Certificates to etcd, in a world with TLS: files of this replica's
	// own, to be replaced while it runs.
	Password                    string
	Certificate, CertificateKey string
	// Env that it gets besides the test's own, likewise.
	Env []string

	w      *World
	dir    string // of an embedded etcd
	client authv3.AuthorizationClient
	log    output
	life   struct {
		sync.Mutex
		cmd    *exec.Cmd
		exited chan struct{} // closed when cmd has ended
		ready  chan struct{} // closed when it was ready for the first time
	}
}

func newReplica(w *World, index int, endpoints []string) *Replica {
	w.T.Helper()
	r := &Replica{Index: index, w: w, Authz: address(), Health: address()}
	command := "authz"
	if w.Options.Embedded {
		command = "serve"
		r.dir = etcdtest.DataDir(w.T)
	}
	r.Args = []string{command, "--authz-listen", r.Authz, "--health-listen", r.Health,
		"--staleness-budget", w.Options.S.String(), "--log-format", "text"}
	// Of several replicas the first reads its records through the cache and the
	// others have an index: every fault meets both. The guards are those of
	// reading through; the index has its own, in statestore.
	if w.Guard != nil || index == 0 && !w.Options.Embedded {
		r.Args = append(r.Args, "--index-records", "0")
	}
	if w.Options.Embedded {
		r.Args = append(r.Args, "--data-dir", r.dir, "--management-listen", "off")
	} else {
		var dial []string
		for _, e := range endpoints {
			p := etcdtest.NewProxy(w.T, e)
			r.Links = append(r.Links, p)
			dial = append(dial, p.Endpoint())
		}
		r.Args = append(r.Args, "--etcd-endpoints", strings.Join(dial, ","))
	}
	if w.TLS != nil {
		dir := w.T.TempDir()
		r.Password, r.Certificate, r.CertificateKey = filepath.Join(dir, "password"), filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
		r.SetPassword(etcdtest.ReplicaPassword)
		r.SetCertificate(w.TLS.Files.ClientCert, w.TLS.Files.ClientKey)
		r.Args = append(r.Args, "--etcd-cacert", w.TLS.Files.CA, "--etcd-cert", r.Certificate, "--etcd-key", r.CertificateKey,
			"--etcd-user", etcdtest.ReplicaUser, "--etcd-password-file", r.Password)
	}
	r.Args = append(r.Args, w.Options.Args...)
	conn, err := grpc.NewClient("passthrough:///"+r.Authz, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(quickly))
	if err != nil {
		w.T.Fatalf("client of replica %d: %v", index, err)
	}
	r.client = authv3.NewAuthorizationClient(conn)
	w.T.Cleanup(func() {
		_ = conn.Close()
		if r.Running() {
			r.signal(syscall.SIGCONT)
			r.signal(syscall.SIGKILL)
			<-r.exited()
		}
		if w.T.Failed() {
			w.T.Logf("the end of replica %d's log:\n%s", index, r.w.without(tail(r.Log(), 4000)))
		}
	})
	return r
}

// address returns one that nobody else takes: on a loopback address of its own,
// because a port that is free now may be another test's in a moment.
func address() string {
	return fmt.Sprintf("127.%d.%d.%d:%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254), 20000+rand.IntN(10000))
}

// startEmbedded starts a replica with an etcd of its own and returns its
// endpoint once it is ready.
func (r *Replica) startEmbedded() string {
	endpoint, err := embedded.Endpoint(r.dir)
	if err != nil {
		r.w.T.Fatalf("endpoint of the embedded etcd: %v", err)
	}
	r.Start()
	r.WaitReady()
	return endpoint
}

// Start runs the replica if it does not run, and does not wait for it. From now
// on its readiness is asked for until there is one.
func (r *Replica) Start() {
	r.w.T.Helper()
	if r.Running() {
		return
	}
	cmd := exec.Command(r.w.binary, r.Args...)
	cmd.Env = append(cmd.Environ(), r.Env...)
	cmd.Stdout, cmd.Stderr = &r.log, &r.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, exited, ready := make(chan error, 1), make(chan struct{}), make(chan struct{})
	go func() {
		// The signal comes when the thread that forked ends, not the process: this
		// one stays as long as the child does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(exited)
		r.w.Rec.Mark(Started, r.Index, "")
		err := cmd.Start()
		started <- err
		if err == nil {
			// Ended by a signal as a rule.
			_ = cmd.Wait()
			r.w.Rec.Mark(Ended, r.Index, "%v", cmd.ProcessState)
		}
	}()
	if err := <-started; err != nil {
		r.w.T.Fatalf("start replica %d: %v", r.Index, err)
	}
	r.life.Lock()
	r.life.cmd, r.life.exited, r.life.ready = cmd, exited, ready
	r.life.Unlock()
	go r.poll(exited, ready)
}

// poll asks for the readiness of one life until there is one.
func (r *Replica) poll(exited, ready chan struct{}) {
	s := r.w.Rec.Stream()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-exited:
			return
		case <-tick.C:
		}
		p := Poll{Start: r.w.Rec.Now(), Replica: r.Index}
		code, _, err := r.Ask("/readyz")
		p.End, p.Ready = r.w.Rec.Now(), code == http.StatusOK
		if err != nil {
			continue // it does not listen yet
		}
		s.Poll(p)
		if p.Ready {
			r.w.Rec.Mark(Ready, r.Index, "")
			close(ready)
			return
		}
	}
}

// WaitReady returns when this life of the replica was ready for the first time.
func (r *Replica) WaitReady() {
	r.w.T.Helper()
	r.life.Lock()
	exited, ready := r.life.exited, r.life.ready
	r.life.Unlock()
	select {
	case <-ready:
	case <-exited:
		r.w.T.Fatalf("replica %d ended before it was ready", r.Index)
	case <-time.After(patience):
		_, body, _ := r.Ask("/readyz?verbose")
		r.w.T.Fatalf("replica %d is not ready after %v: %s", r.Index, patience, body)
	}
}

// exited is closed when the present life has ended; nil before the first.
func (r *Replica) exited() chan struct{} {
	r.life.Lock()
	defer r.life.Unlock()
	return r.life.exited
}

// Running tells whether it does.
func (r *Replica) Running() bool {
	exited := r.exited()
	if exited == nil {
		return false
	}
	select {
	case <-exited:
		return false
	default:
		return true
	}
}

// Pid of the process that runs now, or ran last.
func (r *Replica) Pid() int {
	r.life.Lock()
	defer r.life.Unlock()
	return r.life.cmd.Process.Pid
}

func (r *Replica) signal(s syscall.Signal) { _ = syscall.Kill(-r.Pid(), s) }

// Kill ends the process with SIGKILL and returns when it has ended.
func (r *Replica) Kill() {
	r.w.Rec.Mark(Note, r.Index, "kill -9")
	r.signal(syscall.SIGKILL)
	<-r.exited()
}

// Terminate sends SIGTERM; Gone waits for the end.
func (r *Replica) Terminate() {
	r.w.Rec.Mark(Note, r.Index, "SIGTERM")
	r.signal(syscall.SIGTERM)
}

// Gone returns when the process has ended.
func (r *Replica) Gone() {
	r.w.T.Helper()
	select {
	case <-r.exited():
	case <-time.After(patience):
		r.w.T.Fatalf("replica %d has not ended after %v", r.Index, patience)
	}
}

// Restart kills the process if it runs, starts it again and returns when it is
// ready.
func (r *Replica) Restart() {
	r.w.T.Helper()
	if r.Running() {
		r.Kill()
	}
	r.Start()
	r.WaitReady()
}

// Stop freezes the process, and returns when each of its threads has stopped.
func (r *Replica) Stop() {
	r.w.T.Helper()
	r.w.Rec.Mark(Note, r.Index, "SIGSTOP")
	r.signal(syscall.SIGSTOP)
	r.w.Until("the replica to stop", func() bool { return processStopped(r.Pid()) })
}

// Cont ends a Stop.
func (r *Replica) Cont() {
	r.w.Rec.Mark(Note, r.Index, "SIGCONT")
	r.signal(syscall.SIGCONT)
}

// SetPassword replaces the file that holds the replica's password to etcd.
func (r *Replica) SetPassword(password string) { r.replace(r.Password, []byte(password+"\n")) }

// SetCertificate replaces its client certificate by copies of these files. The
// two files are not replaced at one instant, as in life.
func (r *Replica) SetCertificate(cert, key string) {
	for to, from := range map[string]string{r.Certificate: cert, r.CertificateKey: key} {
		b, err := os.ReadFile(from)
		if err != nil {
			r.w.T.Fatal(err)
		}
		r.replace(to, b)
	}
}

// replace a file at once.
func (r *Replica) replace(path string, content []byte) {
	r.w.T.Helper()
	err := os.WriteFile(path+".new", content, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		r.w.T.Fatal(err)
	}
}

// CutOff freezes all links: nothing is closed, nothing passes. The returned
// function heals them.
func (r *Replica) CutOff() (heal func()) {
	over := r.w.Fault(r.Index, "replica %d is cut off from etcd", r.Index)
	for _, l := range r.Links {
		l.Freeze()
	}
	r.w.Rec.Mark(CutOff, r.Index, "")
	return func() {
		r.w.Rec.Mark(Healed, r.Index, "")
		for _, l := range r.Links {
			l.Thaw()
		}
		over()
	}
}

// Log is all that it has written, in all of its lives.
func (r *Replica) Log() string { return r.log.String() }

// Ask asks the health listener.
func (r *Replica) Ask(path string) (code int, body string, err error) {
	resp, err := r.w.http.Get("http://" + r.Health + path)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	var b bytes.Buffer
	_, err = b.ReadFrom(resp.Body)
	return resp.StatusCode, b.String(), err
}

// Status is /status; the zero value if there is no answer.
func (r *Replica) Status() (st server.Status) {
	if _, body, err := r.Ask("/status"); err == nil {
		_ = json.Unmarshal([]byte(body), &st) // the zero value then
	}
	return st
}

// Metric is one sample of /metrics, by its name with its labels; ok is false if
// there is none.
func (r *Replica) Metric(name string) (value float64, ok bool) {
	_, body, err := r.Ask("/metrics")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(body) {
		if rest, is := strings.CutPrefix(line, name+" "); is {
			value, err = strconv.ParseFloat(strings.TrimSpace(rest), 64)
			return value, err == nil
		}
	}
	return 0, false
}

// --- checks ------------------------------------------------------------------

// checkRequest of one key; shared by all checks, never changed.
type checkRequest = *authv3.CheckRequest

// newCheckRequest is what the hardened Envoy sends: raw headers, the product in
// the route's metadata.
func newCheckRequest(key string) checkRequest {
	header := func(name, value string) *corev3.HeaderValue {
		return &corev3.HeaderValue{Key: name, RawValue: []byte(value)}
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: "GET", Path: "/weather/forecast", Host: "api.example.com",
			HeaderMap: &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
				header(":authority", "api.example.com"), header(":path", "/weather/forecast"), header(":method", "GET"), header("x-api-key", key),
			}},
		}},
		RouteMetadataContext: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			"keygate": {Fields: map[string]*structpb.Value{"product": structpb.NewStringValue(string(quickstart.WeatherProduct))}},
		}},
	}}
}

// reasons by their words.
func reasonOf(word string) (authz.Reason, bool) {
	for r := range authz.NumReasons {
		if r.String() == word {
			return r, true
		}
	}
	return authz.Internal, false
}

// answer reads a response; false if it is neither a clear yes nor a clear no. A
// response that Envoy would take for a yes is one, whatever its reason says.
func answer(resp *authv3.CheckResponse) (authz.Reason, bool) {
	if resp.GetStatus().GetCode() == 0 && resp.GetDeniedResponse() == nil {
		return authz.Allowed, true
	}
	reason, ok := reasonOf(resp.GetDynamicMetadata().GetFields()["reason"].GetStringValue())
	if reason == authz.Allowed {
		return authz.Internal, false
	}
	return reason, ok
}

// checkTimeout is a little more than an Envoy waits.
const checkTimeout = 500 * time.Millisecond

// Check asks a replica for a key, and records it.
func (w *World) Check(replica, key int) Check {
	return w.checkOn(context.Background(), w.main, replica, key)
}

func (w *World) checkOn(ctx context.Context, s *Stream, replica, key int) Check {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	c := Check{Start: w.Rec.Now(), Replica: int32(replica), Key: int32(key)}
	resp, err := w.Replicas[replica].client.Check(ctx, w.Keys[key].check)
	c.End = w.Rec.Now()
	if err == nil {
		var ok bool
		c.Reason, ok = answer(resp)
		c.Failed = !ok
	} else {
		c.Failed = true
	}
	s.Check(c)
	return c
}

// Allowed asks a replica for a key.
func (w *World) Allowed(replica, key int) bool {
	c := w.Check(replica, key)
	return c.Yes()
}

// --- output ------------------------------------------------------------------

// output keeps what is written to it. It is safe for concurrent use.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// processStopped tells whether each thread of a process is.
func processStopped(pid int) bool {
	names, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(names) == 0 {
		return false
	}
	for _, name := range names {
		stat, err := os.ReadFile(name)
		// The state follows the command's name, which stands in brackets.
		if i := bytes.LastIndexByte(stat, ')'); err != nil || i < 0 || !bytes.HasPrefix(stat[i:], []byte(") T")) {
			return false
		}
	}
	return true
}
