package compose_test

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"testing"

	"keygate/envoy"
	"keygate/envoy/proxy/proxytest"
)

//go:generate go test -count=1 -run ^TestEnvoyConfiguration$ . -update

var update = flag.Bool("update", false, "write envoy.yaml anew")

// TestEnvoyConfiguration holds that the Envoy of docker-compose.yaml runs the
// hardened configuration, and that Envoy takes it.
func TestEnvoyConfiguration(t *testing.T) {
	want, err := envoy.Bootstrap{
		Listen:    "0.0.0.0:10000", // inside the container; published on loopback
		Admin:     "127.0.0.1:9901",
		Authz:     []string{"unix:///sockets/authz.sock"},
		Upstream:  "upstream:8080",
		AccessLog: true,
		Routes:    envoy.QuickstartRoutes(),
	}.Render()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("envoy.yaml", want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile("envoy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("envoy.yaml is not what the envoy package renders; run `go generate ./deploy/compose`")
	}
	out, err := exec.CommandContext(t.Context(), proxytest.Binary(t), "--mode", "validate", "-c", "envoy.yaml", "-l", "error").CombinedOutput()
	if err != nil {
		t.Errorf("envoy --mode validate: %v\n%s", err, out)
	}
}
