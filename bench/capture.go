package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"go.yaml.in/yaml/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"keygate/bench/load"
	"keygate/envoy"
	"keygate/envoy/proxy"
	"keygate/examples/quickstart"
)

// Requests that are captured, by the name of their file in testdata.
const (
	// hardened is what keygate's own configuration sends: of the headers the key
	// alone, raw.
	hardened = "hardened"
	// allHeaders is what Envoy sends by default: every header, 20 of them here.
	allHeaders = "all-headers"
)

// captureRequests has a real Envoy send each of the requests that the bench
// replays, and writes them into folder.
func captureRequests(ctx context.Context, binary, folder string) error {
	version, err := envoyVersion(ctx, binary)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name, says string
		edit       func([]byte) ([]byte, error)
	}{
		{hardened, "envoy/bootstrap.yaml", nil},
		{allHeaders, "envoy/bootstrap.yaml without timeout, retry_policy, encode_raw_headers and allowed_headers", func(b []byte) ([]byte, error) {
			return editFilters(b, func(filters []any) ([]any, error) {
				filter, _ := filters[0].(map[string]any)
				config, _ := filter["typed_config"].(map[string]any)
				service, ok := config["grpc_service"].(map[string]any)
				if !ok {
					return nil, errors.New("the first filter has no grpc_service")
				}
				delete(service, "timeout")
				delete(service, "retry_policy")
				delete(config, "encode_raw_headers")
				delete(config, "allowed_headers")
				return filters, nil
			})
		}},
	} {
		got, err := capture(ctx, binary, c.edit)
		if err != nil {
			return fmt.Errorf("capture %s: %w", c.name, err)
		}
		got.Envoy = version + ", " + c.says
		if err := got.Write(filepath.Join(folder, c.name+".json")); err != nil {
			return err
		}
	}
	return nil
}

// clientHeaders of a browser's request. With what Envoy adds to them, and the
// four pseudo headers, they are 20.
var clientHeaders = [][2]string{
	{"User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"},
	{"Accept", "application/json, text/plain, */*"},
	{"Accept-Language", "en-US,en;q=0.9"},
	{"Accept-Encoding", "gzip, deflate, br, zstd"},
	{"Referer", "https://www.example.com/forecast"},
	{"Origin", "https://www.example.com"},
	{"Cache-Control", "no-cache"},
	{"If-None-Match", `W/"5d8c72a5edda8d6a:0"`},
	{"Sec-Fetch-Mode", "cors"},
	{"Sec-Fetch-Site", "same-site"},
	{"Traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
	{"X-Api-Key", quickstart.OrdersKey},
}

// capture sends one request through Envoy until a second check has come on one
// connection, and returns that one.
func capture(ctx context.Context, binary string, edit func([]byte) ([]byte, error)) (load.Captured, error) {
	var got load.Captured
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return got, err
	}
	listener := &recorder{Listener: inner}
	server := grpc.NewServer()
	authv3.RegisterAuthorizationServer(server, yes{})
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()
	upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer upstream.Close()

	p, err := proxy.Start(ctx, proxy.Config{Binary: binary, Concurrency: 1, Edit: edit, Bootstrap: envoy.Bootstrap{
		Listen: "127.0.0.1:0", Authz: []string{inner.Addr().String()}, Upstream: upstream.Listener.Addr().String(), Routes: envoy.QuickstartRoutes(),
	}})
	if err != nil {
		return got, err
	}
	defer p.Stop()
	for range 2 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.URL()+"/weather/forecast?city=Paris", nil)
		if err != nil {
			return got, err
		}
		req.Host = "api.example.com"
		for _, h := range clientHeaders {
			req.Header.Set(h[0], h[1])
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return got, err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return got, fmt.Errorf("envoy answered %s, want 200", resp.Status)
		}
	}
	for _, bytes := range listener.all() {
		if got, err = parse(bytes); err == nil {
			return got, nil
		}
	}
	return got, cmp.Or(err, errors.New("envoy opened no connection"))
}

// parse finds the second check on a connection.
func parse(connection []byte) (load.Captured, error) {
	got := load.Captured{Key: quickstart.OrdersKey}
	rest, ok := bytes.CutPrefix(connection, []byte(http2.ClientPreface))
	if !ok {
		return got, errors.New("not HTTP/2")
	}
	f := http2.NewFramer(io.Discard, bytes.NewReader(rest))
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	checks, stream := 0, uint32(0)
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return got, fmt.Errorf("no second check on the connection: %w", err)
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if got.Settings == nil && !frame.IsAck() {
				_ = frame.ForeachSetting(func(s http2.Setting) error { got.Settings = append(got.Settings, s); return nil })
			}
		case *http2.WindowUpdateFrame:
			if frame.StreamID == 0 && checks == 0 {
				got.Window += frame.Increment
			}
		case *http2.MetaHeadersFrame:
			if frame.PseudoValue("path") != authv3.Authorization_Check_FullMethodName {
				continue
			}
			if checks++; checks == 2 {
				stream = frame.StreamID
				for _, h := range frame.Fields {
					got.Headers = append(got.Headers, load.Header{Name: h.Name, Value: h.Value})
				}
			}
		case *http2.DataFrame:
			if frame.StreamID == stream {
				got.Message = append(got.Message, frame.Data()...)
				if frame.StreamEnded() {
					got.Message = got.Message[5:] // its gRPC frame
					return got, nil
				}
			}
		}
	}
}

// editFilters changes the HTTP filters of a configuration, which are ext_authz
// and the router.
func editFilters(bootstrap []byte, edit func(filters []any) ([]any, error)) ([]byte, error) {
	var all struct {
		Admin           any `yaml:"admin"`
		OverloadManager any `yaml:"overload_manager"`
		Static          struct {
			Listeners []struct {
				Name    string `yaml:"name"`
				Address any    `yaml:"address"`
				Buffer  any    `yaml:"per_connection_buffer_limit_bytes"`
				Chains  []struct {
					Filters []struct {
						Name   string         `yaml:"name"`
						Config map[string]any `yaml:"typed_config"`
					} `yaml:"filters"`
				} `yaml:"filter_chains"`
			} `yaml:"listeners"`
			Clusters any `yaml:"clusters"`
		} `yaml:"static_resources"`
	}
	d := yaml.NewDecoder(bytes.NewReader(bootstrap))
	d.KnownFields(true) // what is not known would be lost
	if err := d.Decode(&all); err != nil {
		return nil, err
	}
	if len(all.Static.Listeners) != 1 || len(all.Static.Listeners[0].Chains) != 1 || len(all.Static.Listeners[0].Chains[0].Filters) != 1 {
		return nil, errors.New("not one listener with one filter")
	}
	config := all.Static.Listeners[0].Chains[0].Filters[0].Config
	filters, ok := config["http_filters"].([]any)
	if !ok || len(filters) != 2 {
		return nil, errors.New("not two HTTP filters")
	}
	filters, err := edit(filters)
	if err != nil {
		return nil, err
	}
	config["http_filters"] = filters
	return yaml.Marshal(all)
}

// yes to every check.
type yes struct {
	authv3.UnimplementedAuthorizationServer
}

func (yes) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return &authv3.CheckResponse{Status: &rpcstatus.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}, nil
}

// recorder keeps what comes in on each connection.
type recorder struct {
	net.Listener
	mu    sync.Mutex
	conns []*recorded
}

type recorded struct {
	net.Conn
	mu  sync.Mutex
	got []byte
}

func (r *recorder) Accept() (net.Conn, error) {
	c, err := r.Listener.Accept()
	if err != nil {
		return nil, err
	}
	rec := &recorded{Conn: c}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conns = append(r.conns, rec)
	return rec, nil
}

func (r *recorder) all() (all [][]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.mu.Lock()
		all = append(all, bytes.Clone(c.got))
		c.mu.Unlock()
	}
	return all
}

func (c *recorded) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	c.got = append(c.got, p[:n]...)
	c.mu.Unlock()
	return n, err
}
