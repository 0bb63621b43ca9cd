package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// server answers checks as a test wants.
type server struct {
	authv3.UnimplementedAuthorizationServer
	check func(ctx context.Context, key string) (*authv3.CheckResponse, error)
}

func (s server) Check(ctx context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return s.check(ctx, r.GetAttributes().GetRequest().GetHttp().GetHeaders()["x-api-key"])
}

func allow() *authv3.CheckResponse {
	return &authv3.CheckResponse{Status: &rpcstatus.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}
}

func deny() *authv3.CheckResponse {
	return &authv3.CheckResponse{Status: &rpcstatus.Status{Code: int32(codes.Unauthenticated), Message: "no"},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{Body: strings.Repeat("x", 100)}}}
}

// serve runs a gRPC server until the test ends.
func serve(t *testing.T, check func(context.Context, string) (*authv3.CheckResponse, error), opts ...grpc.ServerOption) (address string, stop func()) {
	t.Helper()
	l := listen(t)
	s := grpc.NewServer(opts...)
	authv3.RegisterAuthorizationServer(s, server{check: check})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return l.Addr().String(), s.Stop
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func always(context.Context, string) (*authv3.CheckResponse, error) { return allow(), nil }

// captured is Envoy's own request, without the deadline that a test would miss.
func captured(t *testing.T) Captured {
	t.Helper()
	c, err := ReadCaptured(filepath.Join("..", "testdata", "all-headers.json"))
	if err != nil {
		t.Fatal(err)
	}
	c.Headers = slices.DeleteFunc(c.Headers, func(h Header) bool { return h.Name == "grpc-timeout" })
	return c
}

func dialed(t *testing.T, config Config) *Generator {
	t.Helper()
	if config.Request == nil {
		var err error
		if config.Request, err = NewRequest(captured(t)); err != nil {
			t.Fatal(err)
		}
	}
	g, err := Dial(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g
}

func run(t *testing.T, g *Generator, plan Plan) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r, err := g.Run(ctx, plan)
	if err != nil {
		t.Fatal(err)
	}
	if ctx.Err() != nil {
		t.Fatalf("the run does not end: %d sent, %d answered", r.Sent, r.Answered())
	}
	if got := r.Allowed + r.Denied + r.Failed; got != r.Sent {
		t.Errorf("sent %d requests, and %d are accounted for", r.Sent, got)
	}
	if got := r.Latency.TotalCount(); got != int64(r.Answered()) {
		t.Errorf("got %d latencies of %d answers", got, r.Answered())
	}
	return r
}

// name writes n in letters.
func name(n uint64, key []byte) {
	for i := range key {
		key[i] = 'a' + byte(n%26)
		n /= 26
	}
}

// Every third key is denied, and the server sees each key once, in Envoy's
// request.
func TestClosedLoop(t *testing.T) {
	const checks = 3000
	var mu sync.Mutex
	seen := map[string]int{}
	var md metadata.MD
	address, _ := serve(t, func(ctx context.Context, key string) (*authv3.CheckResponse, error) {
		mu.Lock()
		defer mu.Unlock()
		seen[key]++
		md, _ = metadata.FromIncomingContext(ctx)
		if key[0]%3 == 0 {
			return deny(), nil
		}
		return allow(), nil
	})
	denied := uint64(0)
	for n := range uint64(checks) {
		if (byte(n%26)+'a')%3 == 0 {
			denied++
		}
	}
	g := dialed(t, Config{Address: address, Connections: 3, Key: name})
	r := run(t, g, Plan{Streams: 100, Count: checks}) // beyond the window of the connection
	if r.Sent != checks || r.Denied != denied || r.Allowed != checks-denied {
		t.Errorf("got %d sent, %d allowed, %d denied, want %d, %d, %d: %v", r.Sent, r.Allowed, r.Denied, checks, checks-denied, denied, r.Problems)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != checks {
		t.Errorf("the server saw %d keys, want %d", len(seen), checks)
	}
	for _, h := range captured(t).Headers {
		if strings.HasPrefix(h.Name, ":") && h.Name != ":authority" || h.Name == "te" { // which grpc-go keeps to itself
			continue
		}
		if got := md.Get(h.Name); !slices.Equal(got, []string{h.Value}) {
			t.Errorf("header %s: got %q, want %q", h.Name, got, h.Value)
		}
	}
}

// At a fixed rate, what waits behind a stall counts from when it should have been
// sent; a closed loop sends nothing meanwhile, and hardly notices.
func TestStall(t *testing.T) {
	const stall = 200 * time.Millisecond
	for _, tt := range []struct {
		name string
		plan Plan
		slow func(int64) bool
		want string
	}{
		// 100 of 500 wait, evenly between nothing and all of the stall.
		{"open", Plan{Rate: 500, Duration: time.Second}, func(n int64) bool { return n >= 70 && n <= 130 }, "about 80: those of 160 ms"},
		{"closed", Plan{Streams: 1, Count: 500}, func(n int64) bool { return n == 1 }, "1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var mu sync.Mutex
			n := 0
			address, _ := serve(t, func(context.Context, string) (*authv3.CheckResponse, error) {
				mu.Lock()
				defer mu.Unlock()
				if n++; n == 100 {
					time.Sleep(stall) // the server stalls: this is what is tested
				}
				return allow(), nil
			}, grpc.MaxConcurrentStreams(1)) // so that it is the generator that waits
			r := run(t, dialed(t, Config{Address: address}), tt.plan)
			if r.Allowed != 500 {
				t.Fatalf("got %d allowed, want 500: %v", r.Allowed, r.Problems)
			}
			slow := int64(0)
			for _, bar := range r.Latency.Distribution() {
				if bar.From >= int64(stall/5) {
					slow += bar.Count
				}
			}
			if !tt.slow(slow) {
				t.Errorf("%d answers took longer than %v, want %s", slow, stall/5, tt.want)
			}
		})
	}
}

// A generator whose connections are asked to go away loses nothing.
func TestGoAway(t *testing.T) {
	address, _ := serve(t, always, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 200 * time.Millisecond, MaxConnectionAgeGrace: time.Second}))
	g := dialed(t, Config{Address: address, Connections: 2})
	r := run(t, g, Plan{Rate: 2000, Duration: time.Second})
	if r.Allowed != 2000 || r.Reconnects < 2 {
		t.Errorf("got %d allowed and %d reconnects, want 2000 and 2 at least: %v", r.Allowed, r.Reconnects, r.Problems)
	}
	if err := r.Err(); err != nil {
		t.Error(err)
	}
}

// Between two runs nobody reads, or answers a ping; a connection that the server
// has closed for that costs the next run nothing.
func TestClosedBetweenRuns(t *testing.T) {
	address, _ := serve(t, always, grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Second, Timeout: 20 * time.Millisecond}))
	g := dialed(t, Config{Address: address, Connections: 2})
	for i := range 2 {
		if i > 0 {
			time.Sleep(1300 * time.Millisecond) // the server's time, not a goroutine's
		}
		if r := run(t, g, Plan{Count: 50}); r.Allowed != 50 {
			t.Errorf("run %d: got %d allowed, want 50: %v", i+1, r.Allowed, r.Problems)
		}
	}
}

// What a server refuses with a GOAWAY is sent again, elsewhere.
func TestGoAwayRefuses(t *testing.T) {
	l := listen(t)
	var served atomic.Int64
	go func() {
		for first := true; ; first = false {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				preface := make([]byte, len(http2.ClientPreface))
				if _, err := io.ReadFull(c, preface); err != nil {
					return
				}
				f := http2.NewFramer(c, c)
				_ = f.WriteSettings()
				var block bytes.Buffer
				e := hpack.NewEncoder(&block)
				for {
					frame, err := f.ReadFrame()
					if err != nil {
						return
					}
					d, ok := frame.(*http2.DataFrame)
					if !ok {
						continue
					}
					if first && d.StreamID == 5 {
						_ = f.WriteGoAway(1, http2.ErrCodeNo, nil)
					}
					if first && d.StreamID > 1 {
						continue
					}
					served.Add(1)
					block.Reset()
					_ = e.WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
					_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: d.StreamID, BlockFragment: block.Bytes(), EndHeaders: true, PadLength: 3})
					_ = f.WriteDataPadded(d.StreamID, false, []byte{0, 0, 0}, make([]byte, 7))
					_ = f.WriteData(d.StreamID, false, []byte{0, 2, 0x0a, 0})
					block.Reset()
					_ = e.WriteField(hpack.HeaderField{Name: "grpc-status", Value: "0"})
					_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: d.StreamID, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
				}
			}()
		}
	}()
	g := dialed(t, Config{Address: l.Addr().String()})
	r := run(t, g, Plan{Streams: 3, Count: 20})
	if r.Allowed != 20 || r.Sent != 20 || r.Reconnects != 1 || served.Load() != 20 {
		t.Errorf("got %d sent, %d allowed, %d reconnects, %d served, want 20, 20, 1, 20: %v", r.Sent, r.Allowed, r.Reconnects, served.Load(), r.Problems)
	}
}

func TestFailures(t *testing.T) {
	t.Run("status", func(t *testing.T) {
		address, _ := serve(t, func(context.Context, string) (*authv3.CheckResponse, error) {
			return nil, status.Error(codes.Internal, "no")
		})
		r := run(t, dialed(t, Config{Address: address}), Plan{Count: 10})
		if r.Failed != 10 || r.Problems["grpc-status 13"] != 10 || r.Err() == nil {
			t.Errorf("got %d failed, %v, want 10 with grpc-status 13", r.Failed, r.Problems)
		}
	})
	t.Run("without a status", func(t *testing.T) {
		address, _ := serve(t, func(context.Context, string) (*authv3.CheckResponse, error) { return &authv3.CheckResponse{}, nil })
		r := run(t, dialed(t, Config{Address: address}), Plan{Count: 10})
		if r.Failed != 10 || r.Err() == nil {
			t.Errorf("got %d failed, %v, want 10", r.Failed, r.Problems)
		}
	})
	t.Run("no answer", func(t *testing.T) {
		silent := make(chan struct{})
		var n atomic.Int64
		address, _ := serve(t, func(ctx context.Context, _ string) (*authv3.CheckResponse, error) {
			if n.Add(1) == 3 {
				<-silent
			}
			return allow(), nil
		})
		t.Cleanup(func() { close(silent) })
		g := dialed(t, Config{Address: address, DrainTimeout: 50 * time.Millisecond})
		r := run(t, g, Plan{Rate: 100, Count: 5})
		if r.Allowed != 4 || r.Failed != 1 || r.Problems["no answer in time"] != 1 {
			t.Errorf("got %d allowed, %d failed, %v, want 4 and 1 without an answer", r.Allowed, r.Failed, r.Problems)
		}
		if r := run(t, g, Plan{Count: 5}); r.Allowed != 5 { // on a new connection
			t.Errorf("afterwards: got %d allowed, want 5: %v", r.Allowed, r.Problems)
		}
	})
	t.Run("server gone", func(t *testing.T) {
		var stop func()
		var n atomic.Int64
		address, stopServer := serve(t, func(context.Context, string) (*authv3.CheckResponse, error) {
			if n.Add(1) == 50 {
				go stop()
			}
			return allow(), nil
		})
		stop = stopServer
		g := dialed(t, Config{Address: address, DrainTimeout: 50 * time.Millisecond})
		r := run(t, g, Plan{Rate: 500, Duration: 300 * time.Millisecond})
		if r.Allowed < 40 || r.Allowed > 60 || r.Failed < 90 || r.Err() == nil {
			t.Errorf("got %d allowed, %d failed, %v, want about 50 and 100", r.Allowed, r.Failed, r.Problems)
		}
	})
	t.Run("nobody there", func(t *testing.T) {
		l := listen(t)
		_ = l.Close()
		r, err := NewRequest(captured(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Dial(Config{Address: l.Addr().String(), Request: r}); err == nil {
			t.Error("got nil, want an error")
		}
	})
}

func TestUntil(t *testing.T) {
	var n atomic.Int64
	address, _ := serve(t, func(context.Context, string) (*authv3.CheckResponse, error) {
		if n.Add(1) > 20 {
			return deny(), nil
		}
		return allow(), nil
	})
	before := time.Now()
	var at time.Time
	r := run(t, dialed(t, Config{Address: address}), Plan{Until: func(a Answer) bool {
		at = a.At
		return a.Verdict == Denied
	}})
	if r.Allowed != 20 || r.Denied != 1 || at.Before(before) || at.After(time.Now()) {
		t.Errorf("got %d allowed, %d denied, the last at %v, want 20, 1 and between %v and now", r.Allowed, r.Denied, at, before)
	}
}

func TestContext(t *testing.T) {
	address, _ := serve(t, always)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	r, err := dialed(t, Config{Address: address}).Run(ctx, Plan{Rate: 1000})
	if err != nil || r.Err() != nil || r.Sent < 50 || r.Sent > 120 {
		t.Errorf("got %d sent, %v, %v, want about 100 without an error", r.Sent, err, r.Err())
	}
}

// A request without a body, as a client sends it to Envoy, with its key in a
// header.
func TestHTTP(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]bool{}
	l := listen(t)
	s := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen[r.Header.Get("x-api-key")] = true
		w.WriteHeader([]int{http.StatusOK, http.StatusUnauthorized, http.StatusServiceUnavailable}[len(seen)%3])
		_, _ = io.WriteString(w, "body")
	})}
	s.Protocols.SetUnencryptedHTTP2(true)
	go func() {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	}()
	t.Cleanup(func() { _ = s.Close() })
	request, err := NewRequest(Captured{Key: "0123456789", Headers: []Header{
		{":method", "GET"}, {":scheme", "http"}, {":authority", "api.example.com"}, {":path", "/weather"}, {"x-api-key", "0123456789"}, {"accept", "*/*"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, dialed(t, Config{Address: l.Addr().String(), Request: request, Key: name}), Plan{Count: 300, Streams: 4})
	mu.Lock()
	defer mu.Unlock()
	if r.Allowed != 100 || r.Denied != 100 || r.Problems["status 503"] != 100 || len(seen) != 300 {
		t.Errorf("got %d allowed, %d denied, %v, %d keys, want 100, 100, 100 of status 503, 300", r.Allowed, r.Denied, r.Problems, len(seen))
	}
}

func TestNewRequestRefuses(t *testing.T) {
	c := captured(t)
	c.Key = "not in it"
	if _, err := NewRequest(c); err == nil {
		t.Error("a key that stands nowhere: got nil, want an error")
	}
	c = captured(t)
	c.Message = make([]byte, maxFrame)
	if _, err := NewRequest(c); err == nil {
		t.Error("a message beyond a frame: got nil, want an error")
	}
	c = captured(t)
	for i := range 10 {
		c.Headers = append(c.Headers, Header{fmt.Sprint("x-long-", i), strings.Repeat("long", 200)})
	}
	if _, err := NewRequest(c); err != nil {
		t.Errorf("headers beyond the dynamic table, which are then sent whole: %v", err)
	}
}

// The credit of a connection is kept: a server that reads nothing yet is sent no
// more than it has allowed.
func TestWindow(t *testing.T) {
	l := listen(t)
	var waiting atomic.Int64
	s := &http.Server{Protocols: new(http.Protocols), HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: 1 << 16, MaxConcurrentStreams: 200},
		Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			waiting.Add(1)
			if waiting.Load() < 54 { // which fill the window
				time.Sleep(50 * time.Millisecond)
			}
			_, _ = io.Copy(io.Discard, r.Body)
		})}
	s.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	request, err := NewRequest(Captured{Message: make([]byte, 1200), Headers: []Header{
		{":method", "POST"}, {":scheme", "http"}, {":authority", "api.example.com"}, {":path", "/"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, dialed(t, Config{Address: l.Addr().String(), Request: request}), Plan{Count: 300, Streams: 150})
	if r.Allowed != 300 || r.Reconnects != 0 {
		t.Errorf("got %d allowed, %d reconnects, want 300 and 0: %v", r.Allowed, r.Reconnects, r.Problems)
	}
}
