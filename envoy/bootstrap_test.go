package envoy_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"keygate/envoy"
	"keygate/envoy/proxy/proxytest"
)

func bootstrap(edit func(*envoy.Bootstrap)) envoy.Bootstrap {
	b := envoy.Bootstrap{
		Listen: "127.0.0.1:10000", Authz: []string{"127.0.0.1:9000"}, Upstream: "127.0.0.1:8000",
		Routes: envoy.QuickstartRoutes(),
	}
	if edit != nil {
		edit(&b)
	}
	return b
}

// Envoy itself accepts every rendering.
func TestBootstrapValidates(t *testing.T) {
	binary := proxytest.Binary(t)
	for name, edit := range map[string]func(*envoy.Bootstrap){
		"quickstart": nil,
		"access log": func(b *envoy.Bootstrap) { b.AccessLog = true },
		"other key":  func(b *envoy.Bootstrap) { b.KeyHeader = "X-Acme-Key" },
		"unix socket": func(b *envoy.Bootstrap) {
			b.Authz, b.Upstream = []string{"unix:///run/keygate.sock"}, "unix:///run/up.sock"
		},
		"replicas": func(b *envoy.Bootstrap) {
			b.Authz = []string{"127.0.0.1:9000", "[::1]:9000", "unix:///run/keygate.sock"}
		},
		"replicas by name": func(b *envoy.Bootstrap) {
			b.Authz = []string{"keygate-0:9000", "keygate-1:9000", "127.0.0.1:9000"}
		},
		"names": func(b *envoy.Bootstrap) {
			b.Listen, b.Admin, b.Authz, b.Upstream = "0.0.0.0:10000", "127.0.0.1:9901", []string{"keygate:9000"}, "upstream:8000"
		},
		"IPv6":          func(b *envoy.Bootstrap) { b.Listen, b.Authz = "[::]:0", []string{"[::1]:9000"} },
		"no routes":     func(b *envoy.Bootstrap) { b.Routes = nil },
		"websocket":     func(b *envoy.Bootstrap) { b.WebSocket = true },
		"HTTP/1.1 door": func(b *envoy.Bootstrap) { b.HTTP = envoy.DoorHTTP1 },
		"HTTP/2 door":   func(b *envoy.Bootstrap) { b.HTTP, b.AccessLog = envoy.DoorHTTP2, true },
		"HTTP door, odd routes": func(b *envoy.Bootstrap) {
			b.HTTP, b.Authz = envoy.DoorHTTP1, []string{"keygate-0:9002", "keygate-1:9002"}
			b.Routes = []envoy.Route{
				{Prefix: "/list", Products: []string{"A", "B"}, Organization: "acme"},
				{Prefix: "/none"},
				{Prefix: "/other", FilterMetadata: map[string]any{"other": map[string]any{"x": 7}}},
				{Prefix: "/open", Method: "OPTIONS", Open: true},
				{Prefix: `/quote"'{{x}}: &*`, Products: []string{"a\"b\\c\n<é>", "{}: x", "..", "a/b"}},
			}
		},
		"routes of all kinds": func(b *envoy.Bootstrap) {
			b.Routes = []envoy.Route{
				{Prefix: "/list", Products: []string{"A", "B"}, Organization: "acme"},
				{Prefix: "/none"},
				{Prefix: "/odd", FilterMetadata: map[string]any{"keygate": map[string]any{"product": 7}}},
				{Prefix: "/ext", ContextExtensions: map[string]string{"keygate.product": "A"}},
				{Prefix: "/open", Method: "OPTIONS", Open: true},
				{Prefix: `/quote"'{{x}}: &*`, Products: []string{"a\"b\\c\n<é>", "{}: x"}},
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			config, err := bootstrap(edit).Render()
			if err != nil {
				t.Fatalf("Render: %v", err)
			}
			file := filepath.Join(t.TempDir(), "envoy.yaml")
			if err := os.WriteFile(file, config, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), binary, "--mode", "validate", "-c", file, "--log-level", "warning").CombinedOutput()
			if err != nil {
				t.Errorf("envoy does not accept it: %v\n%s\n%s", err, out, config)
			}
			if bytes.Contains(bytes.ToLower(out), []byte("deprecated")) {
				t.Errorf("it uses something deprecated:\n%s", out)
			}
		})
	}
}

// What makes the configuration hardened is in every rendering. The list is
// what the linter of configurations looks for.
func TestBootstrapHardened(t *testing.T) {
	config, err := bootstrap(nil).Render()
	if err != nil {
		t.Fatal(err)
	}
	var parsed any
	if err := yaml.Unmarshal(config, &parsed); err != nil {
		t.Fatalf("not YAML: %v", err)
	}
	for _, want := range []string{
		"failure_mode_allow: false", "status_on_error: {code: ServiceUnavailable}", "encode_raw_headers: true",
		"clear_route_cache: false", "validate_mutations: true", "normalize_path: true", "merge_slashes: true",
		"path_with_escaped_slashes_action: REJECT_REQUEST", "headers_with_underscores_action: REJECT_REQUEST",
		`allowed_headers: {patterns: [{exact: "x-api-key", ignore_case: true}]}`, "use_remote_address: true",
		`match: {prefix: /}`, `path_separated_prefix: "/weather"`, `{"keygate":{"product":"Weather-Product"}}`,
	} {
		if n := strings.Count(string(config), want); n != 1 {
			t.Errorf("%q stands there %d times, want once", want, n)
		}
	}
	if strings.Contains(string(config), "access_log") {
		t.Errorf("an access log that nobody asked for")
	}
}

// So it is with the HTTP door: each service names a path that leaves nothing of
// the client's, and the one of a route that has none names no product.
func TestBootstrapHardenedHTTP(t *testing.T) {
	config, err := bootstrap(func(b *envoy.Bootstrap) { b.HTTP = envoy.DoorHTTP1 }).Render()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]int{
		"http_service:": 3, "path_prefix": 0, "grpc": 0, "allowed_client_headers:": 3, "allowed_upstream_headers:": 3,
		`path_override: "/v1/check"`: 1, `path_override: "/v1/check/product/Weather-Product"`: 1, `path_override: "/v1/check/product/Orders-Product"`: 1,
		"failure_mode_allow: false": 1, "status_on_error: {code: ServiceUnavailable}": 1, "encode_raw_headers: true": 1, "clear_route_cache: false": 1,
		"validate_mutations: true": 1, "normalize_path: true": 1, "merge_slashes: true": 1, "headers_with_underscores_action: REJECT_REQUEST": 1,
		`allowed_headers: {patterns: [{exact: "x-api-key", ignore_case: true}]}`: 1, "disallowed_headers: {patterns: [{exact: authorization, ignore_case: true}]}": 1,
	} {
		if n := strings.Count(string(config), text); n != want {
			t.Errorf("%q stands there %d times, want %d", text, n, want)
		}
	}
}

// Every replica is an endpoint, and one name makes the cluster ask the DNS.
func TestBootstrapReplicas(t *testing.T) {
	tests := []struct {
		name  string
		authz []string
		want  string // the cluster's type
	}{
		{"one", []string{"127.0.0.1:9000"}, "STATIC"},
		{"three", []string{"127.0.0.1:9000", "127.0.0.1:9001", "unix:///run/keygate.sock"}, "STATIC"},
		{"a name among addresses", []string{"127.0.0.1:9000", "keygate:9000"}, "STRICT_DNS"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			config, err := bootstrap(func(b *envoy.Bootstrap) { b.Authz = tt.authz }).Render()
			if err != nil {
				t.Fatalf("Render: %v", err)
			}
			var parsed struct {
				Static struct {
					Clusters []struct {
						Name, Type string
						Load       struct {
							Endpoints []struct {
								LB []any `yaml:"lb_endpoints"`
							}
						} `yaml:"load_assignment"`
					}
				} `yaml:"static_resources"`
			}
			if err := yaml.Unmarshal(config, &parsed); err != nil {
				t.Fatal(err)
			}
			cluster := parsed.Static.Clusters[0]
			if cluster.Name != "keygate" || cluster.Type != tt.want || len(cluster.Load.Endpoints) != 1 || len(cluster.Load.Endpoints[0].LB) != len(tt.authz) {
				t.Errorf("got %+v, want the cluster keygate of type %s with %d endpoints", cluster, tt.want, len(tt.authz))
			}
		})
	}
}

func TestBootstrapRefuses(t *testing.T) {
	for name, edit := range map[string]func(*envoy.Bootstrap){
		"admin off loopback":      func(b *envoy.Bootstrap) { b.Admin = "0.0.0.0:9901" },
		"admin by name":           func(b *envoy.Bootstrap) { b.Admin = "localhost:9901" },
		"listen by name":          func(b *envoy.Bootstrap) { b.Listen = "localhost:10000" },
		"listen without a host":   func(b *envoy.Bootstrap) { b.Listen = ":10000" },
		"no keygate":              func(b *envoy.Bootstrap) { b.Authz = nil },
		"an empty keygate":        func(b *envoy.Bootstrap) { b.Authz = []string{"127.0.0.1:9000", ""} },
		"one keygate twice":       func(b *envoy.Bootstrap) { b.Authz = []string{"127.0.0.1:9000", "127.0.0.1:9000"} },
		"a name and a socket":     func(b *envoy.Bootstrap) { b.Authz = []string{"unix:///run/keygate.sock", "keygate:9000"} },
		"port out of range":       func(b *envoy.Bootstrap) { b.Authz[0] = "127.0.0.1:90000" },
		"relative socket":         func(b *envoy.Bootstrap) { b.Authz[0] = "unix://keygate.sock" },
		"key header":              func(b *envoy.Bootstrap) { b.KeyHeader = "x|.*" },
		"route without a slash":   func(b *envoy.Bootstrap) { b.Routes[0].Prefix = "weather" },
		"route with a last slash": func(b *envoy.Bootstrap) { b.Routes[0].Prefix = "/weather/" },
		"route of everything":     func(b *envoy.Bootstrap) { b.Routes[0].Prefix = "/" },
		"route with a query":      func(b *envoy.Bootstrap) { b.Routes[0].Prefix = "/a?b" },
		"another door":            func(b *envoy.Bootstrap) { b.HTTP = "http3" },
		"HTTP door, extensions": func(b *envoy.Bootstrap) {
			b.HTTP, b.Routes[0].ContextExtensions = envoy.DoorHTTP1, map[string]string{"keygate.product": "A"}
		},
		"HTTP door, metadata of keygate": func(b *envoy.Bootstrap) {
			b.HTTP, b.Routes[0].FilterMetadata = envoy.DoorHTTP1, map[string]any{"keygate": map[string]any{"product": "A"}}
		},
		"too many products": func(b *envoy.Bootstrap) { b.Routes[0].Products = make([]string, 65) },
	} {
		if out, err := bootstrap(edit).Render(); err == nil {
			t.Errorf("%s: rendered\n%s", name, out)
		}
	}
}
