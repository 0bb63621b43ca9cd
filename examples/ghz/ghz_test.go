package ghz_test

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/encoding/protojson"

	"keygate/authz"
	"keygate/envoy"
	"keygate/examples/quickstart"
)

var files = []struct {
	name    string
	headers int
}{{"check.json", 5}, {"check-20-headers.json", 20}}

// source knows the quickstart's key and no other.
type source struct{}

func (source) Records(_ context.Context, _ authz.Organization, id authz.KeyID) (authz.Records, error) {
	r := authz.Records{Revision: 1, Proof: valid{}}
	if id == quickstart.KeyID(quickstart.OrdersKey) {
		r.Credential = authz.Credential{Exists: true,
			Status: authz.Flag{Status: authz.StatusApproved}, ExpiresAt: authz.NeverExpires,
			App: quickstart.OrdersApp, Developer: quickstart.OrdersDeveloper,
			Products: map[authz.ProductName]authz.Flag{quickstart.WeatherProduct: {Status: authz.StatusApproved}},
		}
		r.App = authz.App{Exists: true, Status: authz.Flag{Status: authz.StatusApproved}, Developer: quickstart.OrdersDeveloper}
		r.Developer = authz.Developer{Exists: true, Status: authz.Flag{Status: authz.StatusActive}}
	}
	return r, nil
}

type valid struct{}

func (valid) Valid() bool { return true }

func TestRequestsAreCheckRequests(t *testing.T) {
	for _, f := range files {
		data, err := os.ReadFile(f.name)
		if err != nil {
			t.Fatal(err)
		}
		var req authv3.CheckRequest
		if err := protojson.Unmarshal(data, &req); err != nil { // refuses unknown fields
			t.Errorf("%s: %v", f.name, err)
			continue
		}
		if got := len(req.GetAttributes().GetRequest().GetHttp().GetHeaderMap().GetHeaders()); got != f.headers {
			t.Errorf("%s: got %d headers, want %d", f.name, got, f.headers)
		}
	}
}

// TestGhz runs the README's command against the real service.
func TestGhz(t *testing.T) {
	ghz := os.Getenv("TEST_GHZ")
	if ghz == "" {
		ghz = filepath.Join("..", "..", ".tools", "ghz")
	}
	if _, err := os.Stat(ghz); err != nil {
		t.Fatalf("no ghz for tests: %v; run `make tools`", err)
	}
	var decided [authz.NumReasons]atomic.Int64
	service, err := envoy.New(envoy.Config{
		Authorizer: &authz.Authorizer{Source: source{}}, Organization: "default",
		OnDecision: func(d authz.Decision, _ time.Duration) { decided[d.Reason].Add(1) },
	})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(envoy.ServerOptions(nil)...)
	service.Register(server)
	reflection.Register(server)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})

	const checks = 200
	for _, f := range files {
		before := decided[authz.Allowed].Load()
		out, err := exec.CommandContext(t.Context(), ghz, "--insecure", "--call", "envoy.service.auth.v3.Authorization/Check",
			"-D", f.name, "-n", "200", "-c", "4", "-O", "json", listener.Addr().String()).Output()
		if err != nil {
			t.Fatalf("%s: ghz: %v\n%s", f.name, err, out)
		}
		var report struct {
			Count                  int
			StatusCodeDistribution map[string]int
		}
		if err := json.Unmarshal(out, &report); err != nil {
			t.Fatalf("%s: read ghz's report: %v\n%s", f.name, err, out)
		}
		if report.Count != checks || report.StatusCodeDistribution["OK"] != checks {
			t.Errorf("%s: got %d checks, by status %v, want %d OK", f.name, report.Count, report.StatusCodeDistribution, checks)
		}
		if got := decided[authz.Allowed].Load() - before; got != checks {
			t.Errorf("%s: got %d allowed, want %d", f.name, got, checks)
		}
	}
	for reason := range authz.NumReasons {
		if n := decided[reason].Load(); n != 0 && reason != authz.Allowed {
			t.Errorf("got %d checks refused as %v, want none", n, reason)
		}
	}
}
