package envoy

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"
)

//go:embed bootstrap.yaml
var bootstrapTemplate string

// Bootstrap is the hardened Envoy configuration (bootstrap.yaml) with its few
// parameters. Addresses are "host:port", or "unix:///path" where noted.
type Bootstrap struct {
	// Listen is where clients connect, an IP address and a port; port 0 lets
	// Envoy choose.
	Listen string
	// Admin is Envoy's own interface, which must stay on loopback. Empty means
	// "127.0.0.1:0".
	Admin string
	// Authz is where the replicas of keygate answer checks, in plain text:
	// loopback addresses, or unix:///path. One at least. A name stands for all
	// the addresses that it resolves to, and does not go with unix:///path.
	Authz []string
	// HTTP has checks sent by Envoy's HTTP client to what Service.HTTPServer
	// serves, which is then what Authz names: DoorHTTP1 or DoorHTTP2. Empty
	// means gRPC.
	HTTP string
	// Upstream is the protected backend; unix:///path will do.
	Upstream string
	// KeyHeader as in Config. Config.KeyQuery has no counterpart: Envoy sends
	// the path with its query in any case, keygate's answer strips the
	// parameter, and no query is logged.
	KeyHeader string
	// AccessLog writes one JSON line a request to standard output.
	AccessLog bool
	// WebSocket lets WebSocket upgrades through, checked as any request.
	WebSocket bool
	// Routes in their order. After them, a catch-all without a product.
	Routes []Route
}

// Values of Bootstrap.HTTP: the version of HTTP that Envoy speaks with keygate.
const (
	DoorHTTP1 = "http1"
	DoorHTTP2 = "http2"
)

// Route is one route to the upstream.
type Route struct {
	// Prefix of whole path segments, such as "/weather".
	Prefix string
	// Method limits the route to one; empty means any.
	Method string
	// Products that the route needs one of. None: keygate refuses.
	Products []string
	// Organization whose products they are; empty means keygate's default.
	Organization string
	// FilterMetadata adds namespaces to the route's metadata, or replaces
	// what Products and Organization make of namespace "keygate".
	FilterMetadata map[string]any
	// ContextExtensions are sent with every check of the route.
	ContextExtensions map[string]string
	// Open leaves the route unchecked.
	Open bool
}

// HTTPPath of the checks of the route at the HTTP door.
func (r Route) HTTPPath() string { return httpPath(r.Organization, r.Products) }

// Metadata of the route in Envoy's configuration, by namespace.
func (r Route) Metadata() map[string]any {
	own := map[string]any{}
	switch len(r.Products) {
	case 0:
	case 1:
		own[metadataProduct] = r.Products[0]
	default:
		own[metadataProduct] = r.Products
	}
	if r.Organization != "" {
		own[metadataOrganization] = r.Organization
	}
	all := map[string]any{}
	if len(own) > 0 {
		all[metadataNamespace] = own
	}
	for namespace, fields := range r.FilterMetadata {
		all[namespace] = fields
	}
	return all
}

// QuickstartRoutes are two products beside each other; all other paths are the
// catch-all's.
func QuickstartRoutes() []Route {
	return []Route{
		{Prefix: "/weather", Products: []string{"Weather-Product"}},
		{Prefix: "/orders", Products: []string{"Orders-Product"}},
	}
}

// Render writes the configuration as YAML, or says what is wrong with b.
func (b Bootstrap) Render() ([]byte, error) {
	if b.Admin == "" {
		b.Admin = "127.0.0.1:0"
	}
	if b.KeyHeader == "" {
		b.KeyHeader = DefaultKeyHeader
	}
	b.KeyHeader = strings.ToLower(b.KeyHeader)
	if err := b.check(); err != nil {
		return nil, err
	}
	t, err := template.New("bootstrap.yaml").Funcs(template.FuncMap{
		"json": toJSON, "address": envoyAddress, "clusterType": clusterType, "mutable": mutableHeaders, "list": list,
		"noProduct": func() string { return httpNoProduct }, "healthPath": func() string { return HTTPHealthPath },
	}).Parse(bootstrapTemplate)
	if err != nil {
		return nil, fmt.Errorf("parse the bootstrap template: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, b); err != nil {
		return nil, fmt.Errorf("render the bootstrap: %w", err)
	}
	return out.Bytes(), nil
}

func (b Bootstrap) check() error {
	if err := CheckKeyHeader(b.KeyHeader); err != nil {
		return err
	}
	type named struct{ what, address string }
	addresses := []named{{"listen", b.Listen}, {"admin", b.Admin}, {"upstream", b.Upstream}}
	for _, a := range b.Authz {
		addresses = append(addresses, named{"keygate", a})
	}
	for _, a := range addresses {
		if _, err := envoyAddress(a.address); err != nil {
			return fmt.Errorf("%s address: %w", a.what, err)
		}
	}
	if err := checkReplicas(b.Authz); err != nil {
		return err
	}
	if listenIP(b.Listen) == nil {
		return fmt.Errorf("listen address %q: want an IP address and a port", b.Listen)
	}
	if !listenIP(b.Admin).IsLoopback() {
		return fmt.Errorf("admin address %q: want an IP address on loopback: who reaches it can end the process", b.Admin)
	}
	if b.HTTP != "" && b.HTTP != DoorHTTP1 && b.HTTP != DoorHTTP2 {
		return fmt.Errorf("HTTP door %q: want %s, %s or nothing for gRPC", b.HTTP, DoorHTTP1, DoorHTTP2)
	}
	for _, r := range b.Routes {
		_, own := r.FilterMetadata[metadataNamespace]
		if b.HTTP != "" && (own || len(r.ContextExtensions) > 0) {
			return fmt.Errorf("route %q: metadata of namespace %s and context extensions do not reach the HTTP door, Products and Organization do", r.Prefix, metadataNamespace)
		}
		if len(r.Prefix) < 2 || r.Prefix[0] != '/' || strings.HasSuffix(r.Prefix, "/") || strings.ContainsAny(r.Prefix, "?#") {
			return fmt.Errorf("route %q: want a path such as \"/weather\", without a slash at its end", r.Prefix)
		}
		if len(r.Products) > maxProducts {
			return fmt.Errorf("route %q: %d products, want at most %d", r.Prefix, len(r.Products), maxProducts)
		}
	}
	return nil
}

// checkReplicas tells what is wrong with addresses of which each is well-formed.
func checkReplicas(addresses []string) error {
	if len(addresses) == 0 {
		return errors.New("no keygate address, want one at least")
	}
	for i, a := range addresses {
		switch {
		case slices.Contains(addresses[:i], a):
			return fmt.Errorf("keygate address %q stands there twice", a)
		case strings.HasPrefix(a, "unix://") && clusterType(addresses) != typeStatic:
			return fmt.Errorf("keygate address %q: want no name beside a unix socket: Envoy resolves all of a cluster or nothing", a)
		}
	}
	return nil
}

// listenIP is the IP address of "ip:port"; nil if it is not of that form. Envoy
// resolves no names to listen on.
func listenIP(address string) net.IP {
	host, _, _ := net.SplitHostPort(address)
	return net.ParseIP(host)
}

func toJSON(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}

// envoyAddress is Envoy's form of an address, as JSON.
func envoyAddress(address string) (string, error) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return "", fmt.Errorf("%q: want unix:///absolute/path", address)
		}
		return toJSON(map[string]any{"pipe": map[string]any{"path": path}})
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	switch {
	case err != nil:
		return "", fmt.Errorf("%q: port %q is not a number up to 65535", address, port)
	case host == "":
		return "", errors.New("no host in " + strconv.Quote(address))
	}
	return toJSON(map[string]any{"socket_address": map[string]any{"address": host, "port_value": n}})
}

// Types of a cluster, in Envoy's words.
const (
	typeStatic = "STATIC"
	typeDNS    = "STRICT_DNS"
)

// clusterType is STATIC where no name needs to be resolved.
func clusterType(addresses []string) string {
	for _, a := range addresses {
		host, _, _ := net.SplitHostPort(a)
		if !strings.HasPrefix(a, "unix://") && net.ParseIP(host) == nil {
			return typeDNS
		}
	}
	return typeStatic
}

// list is for the template, which has no literal of one.
func list(s ...string) []string { return s }

// mutableHeaders is the regular expression of all header names that an allow
// sets or removes, as JSON. The key header's name needs no quoting (see
// CheckKeyHeader).
func mutableHeaders(keyHeader string) (string, error) {
	either := func(name string) string { return strings.ReplaceAll(name, "-", "[-_]") }
	return toJSON(either("x-keygate-") + ".*|" + either(keyHeader))
}
