package keygatetest_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	"keygate/authz"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
)

func TestMain(m *testing.M) {
	keygatetest.Reexec()
	os.Exit(m.Run())
}

// decisions are those that a server made, in their order.
type decisions struct {
	mu  sync.Mutex
	all []authz.Decision
}

func (d *decisions) add(one authz.Decision, _ time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all = append(d.all, one)
}

func (d *decisions) list() []authz.Decision {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.all)
}

// last decision; the zero one if there is none.
func (d *decisions) last() authz.Decision {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.all) == 0 {
		return authz.Decision{}
	}
	return d.all[len(d.all)-1]
}

// request as the hardened Envoy sends it: one raw header for each key, the
// product in the route's metadata.
func request(product authz.ProductName, keys ...string) *authv3.CheckRequest {
	http := &authv3.AttributeContext_HttpRequest{Method: "GET", Path: "/weather", Host: "api.example.com", HeaderMap: &corev3.HeaderMap{}}
	for _, key := range keys {
		http.HeaderMap.Headers = append(http.HeaderMap.Headers, &corev3.HeaderValue{Key: "x-api-key", RawValue: []byte(key)})
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Request: &authv3.AttributeContext_Request{Http: http},
		RouteMetadataContext: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			"keygate": {Fields: map[string]*structpb.Value{"product": structpb.NewStringValue(string(product))}},
		}},
	}}
}

// reasonOf a response, as its dynamic metadata has it; "no clear answer" for one
// that is neither a yes with identity nor a refusal.
func reasonOf(resp *authv3.CheckResponse) string {
	reason := resp.GetDynamicMetadata().GetFields()["reason"].GetStringValue()
	allowed := resp.GetStatus() != nil && resp.GetStatus().GetCode() == 0 && resp.GetOkResponse() != nil
	denied := resp.GetStatus().GetCode() != 0 && resp.GetDeniedResponse().GetStatus().GetCode() >= 400
	if allowed == denied || allowed != (reason == "allowed") {
		return "no clear answer"
	}
	return reason
}

// check asks for one key and Weather-Product.
func check(ctx context.Context, conn grpc.ClientConnInterface, key string) (string, error) {
	resp, err := authv3.NewAuthorizationClient(conn).Check(ctx, request(quickstart.WeatherProduct, key))
	if err != nil {
		return "", err
	}
	return reasonOf(resp), nil
}

func mustCheck(t *testing.T, conn grpc.ClientConnInterface, key string) string {
	t.Helper()
	reason, err := check(t.Context(), conn, key)
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	return reason
}

// header is the key header that a client of Envoy sends.
func header(key string) string { return "x-api-key: " + key }

// tool returns the path of a tool that make tools makes: $variable, else name
// in .tools beside go.mod.
func tool(t *testing.T, variable, name string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		path = filepath.Join("..", ".tools", name)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no %s for tests: %v; run `make tools`", name, err)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// count of the lines of a log that hold all of words.
func count(log string, words ...string) (n int) {
	for line := range strings.Lines(log) {
		all := true
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			n++
		}
	}
	return n
}
