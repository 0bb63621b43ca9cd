package tools_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// load reads ../docker-compose.yaml as the compose command does. No profile
// means what plain `docker compose up` starts.
func load(t *testing.T, profiles ...string) *types.Project {
	t.Helper()
	dir, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	options, err := cli.NewProjectOptions([]string{filepath.Join(dir, "docker-compose.yaml")},
		cli.WithWorkingDirectory(dir), cli.WithName("keygate"), cli.WithProfiles(profiles))
	if err != nil {
		t.Fatal(err)
	}
	p, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatalf("load docker-compose.yaml: %v", err)
	}
	return p
}

func names(p *types.Project) []string { return slices.Sorted(maps.Keys(p.Services)) }

func TestComposeServices(t *testing.T) {
	tests := []struct {
		profile string
		want    []string
	}{
		{"", []string{"envoy", "import", "keygate", "upstream"}},
		{"cluster", []string{
			"envoy", "envoy-cluster", "etcd-1", "etcd-2", "etcd-3", "import", "import-cluster", "keygate", "keygate-cluster", "upstream",
		}},
	}
	for _, tt := range tests {
		if got := names(load(t, tt.profile)); !slices.Equal(got, tt.want) {
			t.Errorf("profile %q: got %q, want %q", tt.profile, got, tt.want)
		}
	}
}

func TestComposeImagesArePinned(t *testing.T) {
	pinned := regexp.MustCompile(`^[a-z0-9./-]+:v\d+\.\d+\.\d+$`)
	for name, s := range load(t, "*").Services {
		if s.Build != nil {
			if s.Image != "keygate:local" {
				t.Errorf("%s is built here as %q, want keygate:local, which no registry serves", name, s.Image)
			}
			if s.PullPolicy != types.PullPolicyBuild {
				t.Errorf("%s: pull policy %q, want build", name, s.PullPolicy)
			}
			continue
		}
		if !pinned.MatchString(s.Image) {
			t.Errorf("%s: image %q is not pinned to a release", name, s.Image)
		}
	}
}

// TestComposeVersionFloors: what is shipped is what is tested, and no older
// than the releases with the fixes that keygate counts on.
func TestComposeVersionFloors(t *testing.T) {
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	tested := regexp.MustCompile(`(?m)^ENVOY_VERSION := (\S+)$`).FindSubmatch(makefile)
	if tested == nil {
		t.Fatal("no ENVOY_VERSION in the Makefile")
	}
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	etcd := regexp.MustCompile(`go\.etcd\.io/etcd/etcdctl/v3 v(\S+)`).FindSubmatch(mod)
	if etcd == nil {
		t.Fatal("no etcdctl in tools/go.mod")
	}
	for name, s := range load(t, "*").Services {
		switch {
		case strings.HasPrefix(name, "envoy"):
			if want := "envoyproxy/envoy:v" + string(tested[1]); s.Image != want {
				t.Errorf("%s: got %s, want the tested %s", name, s.Image, want)
			}
		case strings.HasPrefix(name, "etcd-"):
			if want := "quay.io/coreos/etcd:v" + string(etcd[1]); s.Image != want {
				t.Errorf("%s: got %s, want the tested %s", name, s.Image, want)
			}
		}
	}
}

func TestComposePortsAreOnLoopback(t *testing.T) {
	published := map[string]string{}
	for name, s := range load(t, "*").Services {
		for _, port := range s.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("%s publishes %s on %q, want 127.0.0.1", name, port.Published, port.HostIP)
			}
			if other, ok := published[port.Published]; ok {
				t.Errorf("%s and %s both publish %s", name, other, port.Published)
			}
			published[port.Published] = name
		}
		if s.NetworkMode == "host" {
			t.Errorf("%s uses the host's network", name)
		}
	}
	if published["10000"] != "envoy" {
		t.Errorf("port 10000: got %q, want envoy's", published["10000"])
	}
}

func TestComposeHealthAndOrder(t *testing.T) {
	p := load(t, "*")
	for name, s := range p.Services {
		oneShot := strings.HasPrefix(name, "import")
		if s.HealthCheck == nil {
			t.Errorf("%s has no healthcheck and does not switch the image's off", name)
			continue
		}
		if !s.HealthCheck.Disable && len(s.HealthCheck.Test) == 0 {
			t.Errorf("%s: empty healthcheck", name)
		}
		// What ends by itself and the echo have nothing to ask.
		if disabled := oneShot || name == "upstream"; s.HealthCheck.Disable != disabled {
			t.Errorf("%s: healthcheck disabled is %v, want %v", name, s.HealthCheck.Disable, disabled)
		}
		for other, d := range s.DependsOn {
			want := types.ServiceConditionHealthy
			switch {
			case strings.HasPrefix(other, "import"):
				want = types.ServiceConditionCompletedSuccessfully
			case other == "upstream":
				want = types.ServiceConditionStarted
			}
			if d.Condition != want {
				t.Errorf("%s waits for %s to be %s, want %s", name, other, d.Condition, want)
			}
		}
	}
	depends := map[string][]string{
		"envoy": {"import", "keygate", "upstream"}, "import": {"keygate"},
		"envoy-cluster": {"import-cluster", "keygate-cluster", "upstream"}, "import-cluster": {"keygate-cluster"},
		"keygate-cluster": {"etcd-1", "etcd-2", "etcd-3"},
	}
	for name, want := range depends {
		if got := slices.Sorted(maps.Keys(p.Services[name].DependsOn)); !slices.Equal(got, want) {
			t.Errorf("%s waits for %q, want %q", name, got, want)
		}
	}
}

func TestComposeMountedFilesExist(t *testing.T) {
	p := load(t, "*")
	used := map[string]bool{}
	for name, s := range p.Services {
		for _, v := range s.Volumes {
			switch v.Type {
			case types.VolumeTypeBind:
				if _, err := os.Stat(v.Source); err != nil {
					t.Errorf("%s mounts %s: %v", name, v.Source, err)
				}
				if !v.ReadOnly {
					t.Errorf("%s mounts %s writable", name, v.Source)
				}
			case types.VolumeTypeVolume:
				used[v.Source] = true
			default:
				t.Errorf("%s: a mount of type %s", name, v.Type)
			}
		}
	}
	for name := range p.Volumes {
		if !used[name] {
			t.Errorf("volume %s is mounted nowhere", name)
		}
	}
}

func TestComposeLeastPrivilege(t *testing.T) {
	for name, s := range load(t, "*").Services {
		if s.Privileged || !s.ReadOnly || !slices.Contains(s.CapDrop, "ALL") || !slices.Contains(s.SecurityOpt, "no-new-privileges:true") {
			t.Errorf("%s: privileged %v, read-only %v, drops %q, options %q; want a read-only root and no capabilities",
				name, s.Privileged, s.ReadOnly, s.CapDrop, s.SecurityOpt)
		}
	}
}

// TestComposeCheckNeedsNoNetwork holds that keygate and its Envoy meet on a
// unix socket in a volume that only these two share, under one user.
func TestComposeCheckNeedsNoNetwork(t *testing.T) {
	p := load(t, "*")
	for keygate, envoy := range map[string]string{"keygate": "envoy", "keygate-cluster": "envoy-cluster"} {
		k, e := p.Services[keygate], p.Services[envoy]
		if !slices.Contains(k.Command, "--authz-listen=unix:///sockets/authz.sock") {
			t.Errorf("%s: command %q does not listen on the shared socket", keygate, k.Command)
		}
		at := func(s types.ServiceConfig) string {
			for _, v := range s.Volumes {
				if v.Target == "/sockets" {
					return v.Source
				}
			}
			return ""
		}
		if at(k) == "" || at(k) != at(e) {
			t.Errorf("/sockets: %s mounts %q and %s %q, want one volume", keygate, at(k), envoy, at(e))
		}
		if k.User == "" || k.User != e.User {
			t.Errorf("%s runs as %q and %s as %q, want one user: the socket is its own", keygate, k.User, envoy, e.User)
		}
		for name, other := range p.Services {
			if name != keygate && name != envoy && at(other) == at(k) {
				t.Errorf("%s can reach the socket of %s", name, keygate)
			}
		}
	}
}

func TestComposeEtcdClusterIsOne(t *testing.T) {
	p := load(t, "*")
	flag := func(s types.ServiceConfig, name string) string {
		for _, a := range s.Command {
			if v, ok := strings.CutPrefix(a, "--"+name+"="); ok {
				return v
			}
		}
		return ""
	}
	var endpoints, members []string
	for i := 1; i <= 3; i++ {
		name := fmt.Sprintf("etcd-%d", i)
		endpoints = append(endpoints, "http://"+name+":2379")
		members = append(members, name+"=http://"+name+":2380")
	}
	for i := 1; i <= 3; i++ {
		name := fmt.Sprintf("etcd-%d", i)
		s := p.Services[name]
		for option, want := range map[string]string{
			"name": name, "initial-cluster": strings.Join(members, ","), "initial-cluster-state": "new",
			"initial-advertise-peer-urls": "http://" + name + ":2380", "advertise-client-urls": "http://" + name + ":2379",
			"listen-peer-urls": "http://0.0.0.0:2380", "listen-client-urls": "http://0.0.0.0:2379",
		} {
			if got := flag(s, option); got != want {
				t.Errorf("%s --%s: got %q, want %q", name, option, got, want)
			}
		}
		if len(s.Ports) != 0 {
			t.Errorf("%s publishes %v: whoever reaches etcd can approve a key", name, s.Ports)
		}
		if _, ok := s.Networks["etcd"]; !ok || len(s.Networks) != 1 {
			t.Errorf("%s is in networks %v, want etcd alone", name, s.Networks)
		}
	}
	if !p.Networks["etcd"].Internal {
		t.Error("network etcd is not internal")
	}
	for _, name := range []string{"keygate-cluster", "import-cluster"} {
		if got := flag(p.Services[name], "etcd-endpoints"); got != strings.Join(endpoints, ",") {
			t.Errorf("%s --etcd-endpoints: got %q, want all three members", name, got)
		}
	}
}

// TestComposeCommandsAreKeygates gives every command line and environment in
// the file to keygate itself.
func TestComposeCommandsAreKeygates(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "keygate")
	build := exec.CommandContext(t.Context(), "go", "build", "-C", "..", "-o", bin, "./cmd/keygate")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build keygate: %v\n%s", err, out)
	}
	for name, s := range load(t, "*").Services {
		if s.Build == nil {
			continue
		}
		if len(s.Command) == 0 {
			t.Errorf("%s has no command", name)
			continue
		}
		check(t, bin, name, s.Environment, s.Command)
		if s.HealthCheck != nil && !s.HealthCheck.Disable {
			test := s.HealthCheck.Test
			if len(test) < 2 || test[0] != "CMD" || test[1] != "keygate" {
				t.Errorf("%s: healthcheck %q, want CMD keygate …: the image has no shell", name, test)
				continue
			}
			check(t, bin, name+"'s healthcheck", s.Environment, test[2:])
		}
	}
}

// check asks keygate for the help of the command and looks each flag up in it;
// the settings of a server are loaded as well, values and all.
func check(t *testing.T, bin, name string, env types.MappingWithEquals, args []string) {
	t.Helper()
	var environment []string
	for k, v := range env {
		if v == nil {
			t.Errorf("%s: %s is taken from whoever runs compose", name, k)
			continue
		}
		environment = append(environment, k+"="+*v)
	}
	run := func(args ...string) (string, error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		cmd := exec.CommandContext(ctx, bin, args...)
		cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}, environment...)
		cmd.Dir = t.TempDir()
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	help, err := run(args[0], "--help")
	if err != nil {
		t.Errorf("%s: keygate %s --help: %v\n%s", name, args[0], err, help)
		return
	}
	for _, a := range args[1:] {
		flag, _, _ := strings.Cut(a, "=")
		if strings.HasPrefix(flag, "-") && !regexp.MustCompile(regexp.QuoteMeta(flag)+`\b`).MatchString(help) {
			t.Errorf("%s: keygate %s has no %s", name, args[0], flag)
		}
	}
	if args[0] == "serve" || args[0] == "authz" {
		if out, err := run(append([]string{"config", "print"}, args[1:]...)...); err != nil {
			t.Errorf("%s: keygate config print %s: %v\n%s", name, strings.Join(args[1:], " "), err, out)
		}
	}
}
