// Command noop is the ext_authz server that keygate is measured against: what
// one writes first, plain grpc-go with its default options and the types that
// go-control-plane generates. It says yes to every check and looks at nothing.
//
// It prints where it listens as one line of JSON and ends with SIGTERM, or with
// its standard input.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
)

type authorization struct {
	authv3.UnimplementedAuthorizationServer
}

func (authorization) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return &authv3.CheckResponse{
		Status:       &status.Status{},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}},
	}, nil
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "noop:", err)
		os.Exit(1)
	}
}

func run() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	metrics, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	authv3.RegisterAuthorizationServer(server, authorization{})
	// For Envoy's health check, and for ghz. Neither costs a check anything.
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	reflection.Register(server)

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	go func() { // whoever started it has ended
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	context.AfterFunc(ctx, server.Stop)
	mux := http.NewServeMux()
	mux.HandleFunc("/metrics", serveMetrics)
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) {}) // an upstream, for who needs one
	go func() { _ = http.Serve(metrics, mux) }()
	if err := json.NewEncoder(os.Stdout).Encode(map[string]string{"authz": listener.Addr().String(), "health": metrics.Addr().String()}); err != nil {
		return err
	}
	return server.Serve(listener)
}

// serveMetrics tells the one figure that cannot be read from outside, under the
// name that it has in keygate's metrics.
func serveMetrics(w http.ResponseWriter, _ *http.Request) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	_, _ = fmt.Fprintf(w, "go_memstats_mallocs_total %d\n", m.Mallocs)
}
