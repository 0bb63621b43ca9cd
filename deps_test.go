// Package keygate_test holds what is true of the module as a whole: who may
// import whom, and how old a dependency may be.
package keygate_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Modules, under the names that graph gives them.
const (
	cobra        = "github.com/spf13/cobra"
	controlPlane = "github.com/envoyproxy/go-control-plane"
	etcdAPI      = "go.etcd.io/etcd/api"
	etcdClient   = "go.etcd.io/etcd/client"
	etcdPkg      = "go.etcd.io/etcd/pkg"
	etcdutl      = "go.etcd.io/etcd/etcdutl"
	etcdServer   = "go.etcd.io/etcd/server"
	genproto     = "google.golang.org/genproto"
	grpc         = "google.golang.org/grpc"
	hdrhistogram = "github.com/HdrHistogram/hdrhistogram-go"
	pflag        = "github.com/spf13/pflag"
	porcupine    = "github.com/anishathalye/porcupine"
	progress     = "github.com/schollz/progressbar"
	prometheus   = "github.com/prometheus/client_golang"
	protobuf     = "google.golang.org/protobuf"
	rate         = "golang.org/x/time/rate"
	ristretto    = "github.com/dgraph-io/ristretto"
	sys          = "golang.org/x/sys"
	term         = "golang.org/x/term"
	xnet         = "golang.org/x/net"
	yaml         = "go.yaml.in/yaml"
	zap          = "go.uber.org/zap"
)

// edge is a row of graph: what one package may import besides the standard
// library.
type edge struct {
	pkg     string
	own     string // packages of this module
	modules []string
}

// graph is every edge that is allowed. It has no arrow between envoy,
// statestore and ledger: they meet in authz, in catalog and in server. Adding
// to it is a design change. A package that stands nowhere here may not exist.
var graph = []edge{
	// What decides, and what it is made of. authz is the standard library and
	// itself, so whoever reads it has read all of it.
	{"authz", "", nil},
	{"jsonobject", "", nil},
	{"catalog", "authz jsonobject", nil},
	{"apigee", "authz catalog jsonobject", nil},
	{"seal", "", nil},
	{"access", "authz jsonobject", nil},
	{"statestore/keyspace", "authz jsonobject", nil},

	// What knows. ristretto is here and nowhere else; so is a watch.
	{"statestore/index", "authz statestore/keyspace", nil},
	{"statestore", "authz statestore/index statestore/keyspace", []string{etcdAPI, etcdClient, grpc, rate, ristretto, sys, zap}},
	// The etcd server runs as a process of its own: one package starts it, saves
	// and restores its data. A restore compares statuses, so it knows the schema.
	{"statestore/embedded", "authz statestore/keyspace", []string{etcdAPI, etcdClient, etcdPkg, etcdServer, etcdutl, grpc, sys, zap}},

	// What changes, and the trail of it.
	{"audit", "authz jsonobject statestore/keyspace", []string{etcdAPI, etcdClient, grpc}},
	{"ledger", "access audit authz catalog jsonobject seal statestore/keyspace", []string{etcdAPI, etcdClient}},

	// What speaks with people and their scripts. The client knows the API alone.
	{"management", "access apigee audit authz catalog jsonobject ledger statestore/keyspace", []string{etcdAPI, grpc, rate, yaml}},
	{"client", "apigee authz catalog jsonobject", nil},

	// What speaks with Envoy.
	{"envoy", "authz", []string{controlPlane, genproto, grpc, protobuf}},
	{"envoy/proxy", "envoy", []string{sys}},

	// What puts them together. cmd/keygate reads etcd's and gRPC's errors for
	// its exit codes.
	{"config", "authz statestore/keyspace", []string{pflag, yaml}},
	{"server", "access apigee audit authz catalog config envoy envoy/proxy examples/quickstart ledger management seal statestore statestore/embedded statestore/keyspace",
		[]string{etcdAPI, etcdClient, grpc, prometheus, rate, sys}},
	{"quickstart", "apigee audit authz config envoy envoy/proxy examples/quickstart ledger seal server statestore statestore/keyspace",
		[]string{etcdClient, rate}},
	{"cmd/keygate", "access apigee audit authz catalog client config envoy envoy/proxy examples/quickstart ledger management quickstart seal server statestore statestore/embedded statestore/keyspace",
		[]string{cobra, etcdAPI, etcdClient, grpc, pflag, progress, rate, sys, term, yaml}},
	{"examples/quickstart", "authz", nil},

	// What only tests import.
	{"envoy/proxy/proxytest", "envoy envoy/proxy", nil},
	{"statestore/storetest", "authz statestore statestore/keyspace", []string{etcdAPI, etcdClient}},
	{"keygatetest", "apigee authz catalog config envoy envoy/proxy envoy/proxy/proxytest examples/quickstart keygatetest/etcdtest ledger seal server statestore statestore/embedded statestore/keyspace",
		[]string{etcdAPI, etcdClient, grpc}},
	{"keygatetest/etcdtest", "statestore/embedded", []string{etcdClient, etcdServer, sys, xnet, zap}},
	{"keygatetest/faults", "authz envoy envoy/proxy envoy/proxy/proxytest examples/quickstart keygatetest keygatetest/etcdtest keygatetest/variant ledger server statestore/embedded statestore/keyspace",
		[]string{controlPlane, etcdAPI, etcdClient, grpc, porcupine, protobuf, zap}},
	{"keygatetest/faults/report", "keygatetest/faults", []string{etcdAPI}},
	{"keygatetest/variant", "", nil},

	// What measures. It starts the services as processes, so it knows none of
	// their code but the names of what stands in etcd.
	{"bench", "authz bench/load envoy envoy/proxy examples/quickstart statestore/index statestore/keyspace",
		[]string{controlPlane, etcdAPI, etcdClient, genproto, grpc, sys, xnet, yaml}},
	{"bench/load", "", []string{hdrhistogram, sys, xnet}},
	{"bench/noop", "", []string{controlPlane, genproto, grpc}},
}

// unreachable is what a package may not import through others either, however
// the rows above change.
var unreachable = []struct {
	pkg, from string // pkg is reached by none of from
}{
	{"keygate/statestore", "envoy envoy/proxy catalog apigee config audit ledger management client"},
	{"keygate/envoy", "statestore ledger catalog apigee config audit management client"},
	{"keygate/ledger", "envoy statestore catalog apigee config audit client"},
	{"keygate/management", "envoy statestore ledger catalog apigee config audit client"},
	{"keygate/server", "envoy statestore ledger catalog apigee config examples/quickstart audit management client"},
	{controlPlane, "statestore ledger catalog apigee config audit management client"},
	{ristretto, "envoy ledger catalog apigee config statestore/keyspace audit management client"},
	{etcdServer, "envoy ledger catalog apigee config statestore/keyspace audit management client"},
	{etcdClient, "envoy catalog apigee config statestore/keyspace client"},
	{"testing", "cmd/keygate server authz statestore/embedded statestore/keyspace ledger catalog apigee config"},
}

// listed is what go list says of a package, its tests left out.
type listed struct {
	ImportPath             string
	Imports, Deps, GoFiles []string
}

// own cuts the module's path off; ok is false for others' packages.
func own(path string) (string, bool) { return strings.CutPrefix(path, "keygate/") }

// standard tells whether path is of the standard library.
func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".") && first != "keygate"
}

func within(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func packages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,Deps,GoFiles", "./...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var all []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("read go list: %v", err)
		}
		all = append(all, p)
	}
}

func TestImports(t *testing.T) {
	rows := map[string]edge{}
	for _, e := range graph {
		if _, ok := rows[e.pkg]; ok {
			t.Errorf("%s stands twice in the graph", e.pkg)
		}
		rows[e.pkg] = e
	}
	found := 0
	for _, p := range packages(t) {
		name, ok := own(p.ImportPath)
		if !ok || len(p.GoFiles) == 0 { // the module's root and folders of tests only
			continue
		}
		found++
		row, ok := rows[name]
		if !ok {
			t.Errorf("%s has no row in the graph", name)
			continue
		}
		allowed := strings.Fields(row.own)
		for _, i := range p.Imports {
			if standard(i) {
				continue
			}
			if other, ok := own(i); ok {
				if !slices.Contains(allowed, other) {
					t.Errorf("%s imports %s: not an edge of the graph", name, other)
				}
				continue
			}
			if !slices.ContainsFunc(row.modules, func(m string) bool { return within(i, m) }) {
				t.Errorf("%s imports %s: not an edge of the graph", name, i)
			}
		}
	}
	if found < 10 {
		t.Errorf("go list found %d packages: the test looks in the wrong place", found)
	}
}

func TestUnreachable(t *testing.T) {
	for _, p := range packages(t) {
		name, ok := own(p.ImportPath)
		if !ok {
			continue
		}
		for _, u := range unreachable {
			if !slices.Contains(strings.Fields(u.from), name) {
				continue
			}
			for _, d := range p.Deps {
				// One of this module's packages is itself; of another module, any.
				if d == u.pkg || !strings.HasPrefix(u.pkg, "keygate/") && within(d, u.pkg) {
					t.Errorf("%s reaches %s through its imports", name, d)
				}
			}
		}
	}
}

func TestCoreIsStandardLibraryOnly(t *testing.T) {
	for _, p := range packages(t) {
		if p.ImportPath != "keygate/authz" && p.ImportPath != "keygate/jsonobject" {
			continue
		}
		for _, d := range p.Deps {
			if !standard(d) {
				t.Errorf("%s depends on %s", p.ImportPath, d)
			}
		}
	}
}

// floors are the releases that first hold the fixes keygate counts on.
var floors = []struct{ module, version, why string }{
	{"go", "1.26.0", "the standard library's fixes go to the two newest releases"},
	{"go.etcd.io/etcd/api/v3", "3.7.1", "with the server's"},
	{"go.etcd.io/etcd/client/v3", "3.7.1", "with the server's"},
	{"go.etcd.io/etcd/server/v3", "3.7.1", "GHSA-xg4h-6gfc-h4m8 (a watch beyond its range), CVE-2026-44283, GHSA-rfx7-8w68-q57q, GHSA-q8m4-xhhv-38mg"},
	{"google.golang.org/grpc", "1.79.3", "CVE-2026-33186 (method paths without a slash), CVE-2023-44487 (rapid reset)"},
	{"go.opentelemetry.io/otel/sdk", "1.40.0", "CVE-2026-24051"},
	{"github.com/envoyproxy/go-control-plane/envoy", "1.40.0", "the API of the Envoy that is tested"},
}

func TestVersionFloors(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "mod", "edit", "-json").Output()
	if err != nil {
		t.Fatalf("go mod edit: %v", err)
	}
	var mod struct {
		Go      string
		Require []struct{ Path, Version string }
		Replace []struct{ Old struct{ Path string } }
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	has := map[string]string{"go": mod.Go}
	for _, r := range mod.Require {
		has[r.Path] = strings.TrimPrefix(r.Version, "v")
	}
	for _, f := range floors {
		got, ok := has[f.module]
		if !ok {
			t.Errorf("%s is not in go.mod: delete its floor", f.module)
			continue
		}
		switch older, err := less(got, f.version); {
		case err != nil:
			t.Errorf("%s: %v", f.module, err)
		case older:
			t.Errorf("%s is %s, want %s or newer: %s", f.module, got, f.version, f.why)
		}
	}
	for _, r := range mod.Replace {
		t.Errorf("%s is replaced: what is built is then not what its version says", r.Old.Path)
	}
	for path, version := range has {
		if strings.HasPrefix(path, "gopkg.in/yaml.") {
			t.Errorf("%s %s is archived, want go.yaml.in/yaml", path, version)
		}
	}
}

// less compares releases; a pre-release is older than its release.
func less(a, b string) (bool, error) {
	x, err := release(a)
	if err != nil {
		return false, err
	}
	y, err := release(b)
	if err != nil {
		return false, err
	}
	return slices.Compare(x, y) < 0, nil
}

func release(version string) ([]int, error) {
	core, pre, isPre := strings.Cut(version, "-")
	var n []int
	for _, s := range strings.Split(core, ".") {
		i, err := strconv.Atoi(s)
		if err != nil {
			return nil, fmt.Errorf("version %q: %w", version, err)
		}
		n = append(n, i)
	}
	for len(n) < 3 {
		n = append(n, 0)
	}
	last := 1
	if isPre && pre != "" {
		last = 0
	}
	return append(n, last), nil
}

func TestLess(t *testing.T) {
	tests := []struct {
		a, b string
		want bool
	}{
		{"1.2.3", "1.2.3", false}, {"1.2.3", "1.2.4", true}, {"1.10.0", "1.9.0", false}, {"1.26", "1.26.0", false},
		{"3.7.1-rc.1", "3.7.1", true}, {"3.8.0-alpha.0", "3.7.1", false}, {"0.9.9", "1.0.0", true},
	}
	for _, tt := range tests {
		if got, err := less(tt.a, tt.b); err != nil || got != tt.want {
			t.Errorf("%s older than %s: got %v, %v, want %v", tt.a, tt.b, got, err, tt.want)
		}
	}
	if _, err := less("1.x", "1.0.0"); err == nil {
		t.Error("1.x: got nil, want an error")
	}
}
