package config

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

// Group of settings that a command takes together.
type Group uint8

// The groups, in the order of the help.
const (
	Common     Group = iota // --config, logging
	External                // an etcd of the user's own
	Embedded                // the etcd in the data directory
	Keys                    // --prefix: where keygate's keys are
	Org                     // --org
	Authz                   // the data plane
	Health                  // --health-listen
	Management              // the management API, as it is served
	Sealing                 // the key that seals consumer keys and secrets at rest
	Client                  // the management API, as a command reaches it
)

// All returns every group.
func All() []Group {
	return []Group{Common, External, Embedded, Keys, Org, Authz, Health, Management, Sealing, Client}
}

// kind of a value: how it may be written.
type kind uint8

const (
	text     kind = iota // a string
	boolean              // true or false
	list                 // strings, in a flag with commas between
	duration             // with a unit
	size                 // bytes, or with a unit
	integer
)

// String names the kind in help, beside the flag.
func (k kind) String() string {
	return [...]string{"string", "bool", "list", "duration", "size", "int"}[k]
}

func (k kind) article() string {
	return [...]string{"a string", "true or false", "a list of strings", "a duration such as 5s", "a size such as 2GiB", "a number"}[k]
}

// setting is one row of the table: all that flags, environment, file, help and
// config print know.
type setting struct {
	name  string // of the flag; the others follow
	group Group
	kind  kind
	def   string
	help  string // with the value's name in backquotes
	// set parses a value, which may be empty, and checks it by itself.
	set func(c *Config, s string) error
	// get returns the value as a flag would be given it.
	get func(c *Config) string
}

const fileSetting = "config"

// Bounds that hold for every deployment.
const (
	// MinEtcdQuota and MaxEtcdQuota in bytes. etcd advises against more than
	// 8 GiB and goes on working well beyond it.
	MinEtcdQuota = 16 << 20
	MaxEtcdQuota = 64 << 30

	// MaxIndexRecords, MaxAuthzWorkers and MaxGCHeadroom (bytes) are far beyond what
	// is of use.
	MaxIndexRecords = 1 << 30
	MaxAuthzWorkers = 1 << 16
	MaxGCHeadroom   = 64 << 30
)

var settings = []setting{
	{fileSetting, Common, text, "", "YAML `file` to read settings from",
		func(*Config, string) error { return nil },
		func(c *Config) string { return c.File }},
	word("log-format", Common, "auto", "`format` of log lines: auto (text on a terminal, else json), text or json",
		[]string{"auto", "text", "json"}, func(c *Config) *string { return &c.LogFormat }),
	{"log-level", Common, text, "info", "lowest `level` to log: debug, info, warn or error",
		func(c *Config, s string) error {
			if err := oneOf(s, []string{"debug", "info", "warn", "error"}); err != nil {
				return err
			}
			return c.LogLevel.UnmarshalText([]byte(s))
		},
		func(c *Config) string { return strings.ToLower(c.LogLevel.String()) }},

	{"etcd-endpoints", External, list, "", "`urls` of an external etcd, with commas between; without it keygate runs its own",
		func(c *Config, s string) (err error) {
			c.EtcdEndpoints, err = parseEndpoints(s)
			return err
		},
		func(c *Config) string { return strings.Join(c.EtcdEndpoints, ",") }},
	path("etcd-cacert", External, "", "PEM `file` of the CAs that sign etcd's certificates (default the system's)", func(c *Config) *string { return &c.EtcdCACert }),
	path("etcd-cert", External, "", "PEM `file` of the client certificate for etcd", func(c *Config) *string { return &c.EtcdCert }),
	path("etcd-key", External, "", "PEM `file` of its private key", func(c *Config) *string { return &c.EtcdKey }),
	path("etcd-user", External, "", "`name` of the etcd user", func(c *Config) *string { return &c.EtcdUser }),
	path("etcd-password-file", External, "", "`file` that holds the user's password, not readable by others", func(c *Config) *string { return &c.EtcdPasswordFile }),

	{"data-dir", Embedded, text, "./keygate-data", "`folder` of the embedded etcd's data and socket",
		func(c *Config, s string) error {
			if s == "" {
				return errors.New("no folder")
			}
			c.DataDir = s
			return nil
		},
		func(c *Config) string { return c.DataDir }},
	{"etcd-quota", Embedded, size, "2GiB", "`size` that the embedded etcd's data may have",
		func(c *Config, s string) error {
			n, err := parseSize(s)
			if err != nil {
				return err
			}
			if n < MinEtcdQuota || n > MaxEtcdQuota {
				return fmt.Errorf("%s is out of range, want %s to %s", formatSize(n), formatSize(MinEtcdQuota), formatSize(MaxEtcdQuota))
			}
			c.EtcdQuota = n
			return nil
		},
		func(c *Config) string { return formatSize(c.EtcdQuota) }},

	{"prefix", Keys, text, keyspace.DefaultPrefix, "`path` of keygate's keys in etcd",
		func(c *Config, s string) (err error) {
			c.Space, err = keyspace.New(s)
			return err
		},
		func(c *Config) string { return c.Space.Prefix() }},
	{"org", Org, text, "default", "`name` of the organization, where nothing else names one",
		func(c *Config, s string) error {
			c.Organization = authz.Organization(s)
			return keyspace.CheckOrganization(c.Organization)
		},
		func(c *Config) string { return string(c.Organization) }},

	address("authz-listen", Authz, "127.0.0.1:9000", "`address` to serve ext_authz on, host:port or unix:///path", func(c *Config) *Address { return &c.AuthzListen }),
	optionalAddress("authz-http-listen", Authz, off, "`address` to serve checks on for Envoy's HTTP ext_authz too, host:port or unix:///path, or off", func(c *Config) *Address { return &c.AuthzHTTPListen }),
	path("authz-tls-cert", Authz, "", "PEM `file` of the certificate to serve ext_authz with", func(c *Config) *string { return &c.AuthzTLSCert }),
	path("authz-tls-key", Authz, "", "PEM `file` of its private key", func(c *Config) *string { return &c.AuthzTLSKey }),
	path("authz-client-ca", Authz, "", "PEM `file` of the CAs that sign Envoy's certificates; with it one is required", func(c *Config) *string { return &c.AuthzClientCA }),
	boolFlag("authz-insecure", Authz, "false", "serve plaintext beyond the loopback interface", func(c *Config) *bool { return &c.AuthzInsecure }),
	{"key-header", Authz, text, "x-api-key", "`name` of the request header that holds the consumer key",
		func(c *Config, s string) error {
			c.KeyHeader = strings.ToLower(s)
			return checkHeader(c.KeyHeader)
		},
		func(c *Config) string { return c.KeyHeader }},
	{"key-query", Authz, text, "", "`name` of a query parameter that may hold it instead (default none)",
		func(c *Config, s string) error {
			c.KeyQuery = s
			if s != "" && (len(s) > maxName || strings.Trim(s, letters+digits+"-._~") != "") {
				return fmt.Errorf("%s: want a parameter name of at most %d letters, digits and any of -._~", quote(s), maxName)
			}
			return nil
		},
		func(c *Config) string { return c.KeyQuery }},
	word("denial-body", Authz, "apigee", "`kind` of body of a denial: apigee (its fault, which names the level) or uniform",
		[]string{"apigee", "uniform"}, func(c *Config) *string { return &c.DenialBody }),
	word("authz-codec", Authz, "wire", "`how` checks over gRPC are read and answered: wire, or standard, which answers the same for several times the work",
		[]string{"wire", "standard"}, func(c *Config) *string { return &c.AuthzCodec }),
	word("log-decisions", Authz, "none", "`which` decisions to log: none, denied or all; limited in rate",
		[]string{"none", "denied", "all"}, func(c *Config) *string { return &c.LogDecisions }),
	{"staleness-budget", Authz, duration, "5s", "`duration` after which unproven knowledge refuses, 3s to 60s",
		func(c *Config, s string) error {
			d, err := parseDuration(s)
			if err != nil {
				return err
			}
			if d < keyspace.MinStalenessBudget || d > keyspace.MaxStalenessBudget {
				return fmt.Errorf("%s is out of range, want 3s to 60s", s)
			}
			c.StalenessBudget = d
			return nil
		},
		func(c *Config) string { return formatDuration(c.StalenessBudget) }},

	number("index-records", Authz, "4000000", "`number` of records that the index may hold, about 110 bytes each; beyond it, and with 0, they are read through the cache",
		MaxIndexRecords, func(c *Config) *int { return &c.IndexRecords }),
	number("authz-workers", Authz, "64", "`number` of goroutines kept to answer checks; with 0, one for each check",
		MaxAuthzWorkers, func(c *Config) *int { return &c.AuthzWorkers }),
	{"gc-headroom", Authz, size, "16MiB", "`size` that garbage may grow to before it is collected; with 0, as Go does without being told",
		func(c *Config, s string) error {
			n, err := parseSize(s)
			if err != nil {
				return err
			}
			if n > MaxGCHeadroom {
				return fmt.Errorf("%s is out of range, want at most %s", formatSize(n), formatSize(MaxGCHeadroom))
			}
			c.GCHeadroom = n
			return nil
		},
		func(c *Config) string { return formatSize(c.GCHeadroom) }},

	boolFlag("register", Authz, "true", "register in etcd, so that receipts count on this replica; false needs no right to write, and is outside of them",
		func(c *Config) *bool { return &c.Register }),

	address("health-listen", Health, "127.0.0.1:8081", "`address` of health, metrics and version, host:port or unix:///path", func(c *Config) *Address { return &c.HealthListen }),

	optionalAddress("management-listen", Management, "127.0.0.1:8080", "`address` to serve the management API on, host:port or unix:///path, or off", func(c *Config) *Address { return &c.ManagementListen }),
	path("management-tls-cert", Management, "", "PEM `file` of the certificate to serve it with", func(c *Config) *string { return &c.ManagementTLSCert }),
	path("management-tls-key", Management, "", "PEM `file` of its private key", func(c *Config) *string { return &c.ManagementTLSKey }),
	boolFlag("management-insecure", Management, "false", "serve the management API in plaintext beyond the loopback interface", func(c *Config) *bool { return &c.ManagementInsecure }),
	{"management-hosts", Management, list, "", "`names` that a request's Host may have besides the address itself and localhost, with commas between",
		func(c *Config, s string) (err error) {
			c.ManagementHosts, err = parseHosts(s)
			return err
		},
		func(c *Config) string { return strings.Join(c.ManagementHosts, ",") }},

	path("sealing-key-file", Sealing, "", "`file` of the keys that seal consumer keys and secrets in etcd, not readable by others (default for the embedded etcd sealing-key in --data-dir)",
		func(c *Config) *string { return &c.SealingKeyFile }),

	{"server", Client, text, "", "`url` of a management API, such as https://keygate.example:8080 or unix:///path",
		func(c *Config, s string) (err error) {
			c.Server, err = parseServer(s)
			return err
		},
		func(c *Config) string { return c.Server }},
	path("server-cacert", Client, "", "PEM `file` of the CAs that sign its certificate (default the system's)", func(c *Config) *string { return &c.ServerCACert }),
	path("token-file", Client, "", "`file` that holds a management token, not readable by others", func(c *Config) *string { return &c.TokenFile }),
	boolFlag("insecure", Client, "false", "send the token in plaintext beyond the loopback interface", func(c *Config) *bool { return &c.Insecure }),
}

// off is the value of an address where nothing listens.
const off = "off"

// secrets are the variables of the environment that hold a secret. They are no
// settings: no flag and no field of the file has them, and nothing prints them.
// Each excludes the setting that names a file for the same.
var secrets = map[string]string{
	variableSealingKey: "sealing-key-file",
	variableToken:      "token-file",
}

const (
	variableSealingKey = "KEYGATE_SEALING_KEY"
	variableToken      = "KEYGATE_TOKEN"
)

// variable is the setting's name in the environment.
func (s setting) variable() string {
	return "KEYGATE_" + strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
}

// field is the setting's name in the file.
func (s setting) field() string {
	words := strings.Split(s.name, "-")
	for i, w := range words[1:] {
		words[i+1] = strings.ToUpper(w[:1]) + w[1:]
	}
	return strings.Join(words, "")
}

// data is the value for JSON.
func (s setting) data(c *Config) any {
	switch s.kind {
	case boolean:
		return s.get(c) == "true"
	case integer:
		n, _ := strconv.Atoi(s.get(c)) // it was made of one
		return n
	case list:
		if s.get(c) == "" {
			return []string{}
		}
		return strings.Split(s.get(c), ",")
	}
	return s.get(c)
}

// path is a setting that is a string of any contents.
func path(name string, group Group, def, help string, field func(*Config) *string) setting {
	return setting{name, group, text, def, help,
		func(c *Config, s string) error {
			*field(c) = s
			if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				return errors.New("a control character")
			}
			return nil
		},
		func(c *Config) string { return *field(c) },
	}
}

// boolFlag is a setting that is true or false.
func boolFlag(name string, group Group, def, help string, field func(*Config) *bool) setting {
	return setting{name, group, boolean, def, help,
		func(c *Config, s string) (err error) {
			if *field(c), err = strconv.ParseBool(s); err != nil {
				return fmt.Errorf("want true or false, got %s", quote(s))
			}
			return nil
		},
		func(c *Config) string { return strconv.FormatBool(*field(c)) },
	}
}

// word is a setting that is one of a few words.
func word(name string, group Group, def, help string, words []string, field func(*Config) *string) setting {
	return setting{name, group, text, def, help,
		func(c *Config, s string) error { *field(c) = s; return oneOf(s, words) },
		func(c *Config) string { return *field(c) },
	}
}

func oneOf(s string, words []string) error {
	if slices.Contains(words, s) {
		return nil
	}
	return fmt.Errorf("%s is not one of %s%s", quote(s), strings.Join(words, ", "), didYouMean(s, words))
}

// Address to listen on.
type Address struct {
	// Network is "tcp" or "unix"; Address is what net.Listen takes with it.
	Network, Address string
}

// String is the form of the flag: host:port or unix:///path.
func (a Address) String() string {
	if a.Network == "unix" {
		return "unix://" + a.Address
	}
	return a.Address
}

// Local tells whether only this machine can reach the address: a unix socket or
// the loopback interface. A name other than localhost is not resolved and not
// local.
func (a Address) Local() bool {
	if a.Network == "unix" {
		return true
	}
	host, _, _ := net.SplitHostPort(a.Address)
	ip, _ := netip.ParseAddr(host)
	return host == "localhost" || ip.Unmap().IsLoopback()
}

// maxSocketPath is what fits in Linux's sockaddr_un, in bytes, with its final
// zero.
const maxSocketPath = 107

func address(name string, group Group, def, help string, field func(*Config) *Address) setting {
	return setting{name, group, text, def, help,
		func(c *Config, s string) (err error) {
			*field(c), err = parseAddress(s)
			return err
		},
		func(c *Config) string { return field(c).String() },
	}
}

// number is a number from 0 to most.
func number(name string, group Group, def, help string, most int, field func(*Config) *int) setting {
	return setting{name, group, integer, def, help,
		func(c *Config, s string) error {
			n, err := strconv.Atoi(s)
			if err != nil || n < 0 || n > most {
				return fmt.Errorf("%s is not a number from 0 to %d", quote(s), most)
			}
			*field(c) = n
			return nil
		},
		func(c *Config) string { return strconv.Itoa(*field(c)) },
	}
}

// optionalAddress is an address that may be off, which is the zero Address.
func optionalAddress(name string, group Group, def, help string, field func(*Config) *Address) setting {
	return setting{name, group, text, def, help,
		func(c *Config, s string) (err error) {
			*field(c) = Address{}
			if s != "" && s != off {
				*field(c), err = parseAddress(s)
			}
			return err
		},
		func(c *Config) string {
			if *field(c) == (Address{}) {
				return off
			}
			return field(c).String()
		},
	}
}

func parseAddress(s string) (Address, error) {
	if p, ok := strings.CutPrefix(s, "unix:"); ok {
		p, ok = strings.CutPrefix(p, "//")
		switch {
		case !ok || len(p) < 2 || p[0] != '/' || strings.HasSuffix(p, "/"):
			return Address{}, fmt.Errorf("%s: want unix:///path, three slashes and a file", quote(s))
		case len(p) > maxSocketPath:
			return Address{}, fmt.Errorf("%s: the path has %d bytes, a unix socket's at most %d", quote(s), len(p), maxSocketPath)
		}
		return Address{"unix", p}, nil
	}
	if strings.Contains(s, "://") {
		return Address{}, fmt.Errorf("%s: want host:port or unix:///path, without another scheme", quote(s))
	}
	if _, err := splitHostPort(s, 0); err != nil {
		return Address{}, err
	}
	return Address{"tcp", s}, nil
}

// splitHostPort checks host:port and returns the host. The port is a number.
func splitHostPort(s string, minPort int) (host string, err error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", fmt.Errorf("%s: want host:port", quote(s))
	}
	if n, err := strconv.Atoi(port); err != nil || n < minPort || n > math.MaxUint16 || port[0] == '+' {
		return "", fmt.Errorf("%s: port %s is not a number from %d to 65535", quote(s), quote(port), minPort)
	}
	if _, err := netip.ParseAddr(host); err != nil && strings.Trim(host, letters+digits+"-._") != "" {
		return "", fmt.Errorf("%s: %s is not a host", quote(s), quote(host))
	}
	return host, nil
}

// parseEndpoints reads etcd's endpoints: all of one scheme. An error never
// shows an endpoint that may hold a password.
func parseEndpoints(s string) ([]string, error) {
	if s == "" {
		return nil, nil
	}
	var endpoints []string
	scheme := ""
	for _, e := range strings.Split(s, ",") {
		e = strings.TrimSpace(e)
		if e == "" {
			return nil, errors.New("an empty endpoint between commas")
		}
		own, err := parseEndpoint(e)
		if err != nil {
			return nil, err
		}
		if len(endpoints) > 0 && own != scheme {
			return nil, fmt.Errorf("%s and %s endpoints together, want one scheme for all", schemeName(scheme), schemeName(own))
		}
		if slices.Contains(endpoints, e) {
			return nil, fmt.Errorf("%s stands twice", quote(e))
		}
		scheme = own
		endpoints = append(endpoints, e)
	}
	return endpoints, nil
}

func parseEndpoint(e string) (scheme string, err error) {
	const want = "want http://host:port, https://host:port, unix:///path or host:port"
	if strings.Contains(e, "@") {
		return "", fmt.Errorf("an endpoint with a user in it; give --etcd-user and --etcd-password-file")
	}
	scheme, rest, ok := strings.Cut(e, "://")
	if !ok {
		_, err := splitHostPort(e, 1)
		if err != nil {
			return "", fmt.Errorf("%w: %s", err, want)
		}
		return "", nil
	}
	switch scheme {
	case "unix":
		if len(rest) < 2 || rest[0] != '/' {
			return "", fmt.Errorf("%s: want unix:///path, three slashes and a file", quote(e))
		}
	case "http", "https":
		u, err := url.Parse(e)
		if err != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.ForceQuery {
			return "", fmt.Errorf("%s: %s, nothing after it", quote(e), want)
		}
		if host, err := splitHostPort(u.Host, 1); err != nil || host == "" {
			return "", fmt.Errorf("%s: %s", quote(e), want)
		}
	default:
		return "", fmt.Errorf("%s: unknown scheme %s, %s", quote(e), quote(scheme), want)
	}
	return scheme, nil
}

// parseHosts reads names and addresses as a Host header may hold them, without
// a port.
func parseHosts(s string) (hosts []string, err error) {
	if s == "" {
		return nil, nil
	}
	for _, h := range strings.Split(s, ",") {
		h = strings.ToLower(strings.TrimSpace(h))
		bare := strings.TrimSuffix(strings.TrimPrefix(h, "["), "]")
		if _, err := netip.ParseAddr(bare); err != nil && (h == "" || strings.Trim(h, letters+digits+"-._") != "") {
			return nil, fmt.Errorf("%s is not a host; want names without scheme and port", quote(h))
		}
		if slices.Contains(hosts, bare) {
			return nil, fmt.Errorf("%s stands twice", quote(h))
		}
		hosts = append(hosts, bare)
	}
	return hosts, nil
}

// parseServer checks the URL of a management API. An error never shows one that
// may hold a password.
func parseServer(s string) (string, error) {
	const want = "want https://host, http://host or unix:///path, a path before /v1 after the host if there is one"
	if s == "" {
		return "", nil
	}
	if strings.Contains(s, "@") {
		return "", errors.New("a URL with a user in it; give --token-file")
	}
	if rest, ok := strings.CutPrefix(s, "unix:"); ok {
		a, err := parseAddress("unix:" + rest)
		return a.String(), err
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.ForceQuery {
		return "", fmt.Errorf("%s: %s", quote(s), want)
	}
	return strings.TrimRight(s, "/"), nil
}

// plaintextServer tells whether the server's URL sends what it is given in
// plaintext beyond this machine.
func plaintextServer(server string) bool {
	u, err := url.Parse(server)
	return err == nil && u.Scheme == "http" && !Address{"tcp", net.JoinHostPort(u.Hostname(), "0")}.Local()
}

func schemeName(s string) string {
	if s == "" {
		return "host:port"
	}
	return s + "://"
}

const (
	letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	digits  = "0123456789"
	maxName = 128 // bytes of a header's or a parameter's name
)

// checkHeader takes a lower-case name.
func checkHeader(name string) error {
	switch {
	case name == "" || len(name) > maxName || strings.Trim(name, letters+digits+"!#$%&'*+-.^_`|~") != "":
		return fmt.Errorf("%s is not the name of a header, such as x-api-key", quote(name))
	case name == "authorization" || name == "cookie" || name == "set-cookie":
		return fmt.Errorf("%s is not supported as the consumer key's place; use a header of its own, such as x-api-key", quote(name))
	case slices.Contains([]string{
		"connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade",
		"host", "content-length", "content-type", "content-encoding",
	}, name):
		return fmt.Errorf("%s has a meaning of its own in HTTP; use a header of its own, such as x-api-key", quote(name))
	case strings.HasPrefix(name, "x-keygate-") || strings.HasPrefix(name, "x-envoy-") || strings.HasPrefix(name, "x-forwarded-"):
		return fmt.Errorf("%s is set on the way; use a header of its own, such as x-api-key", quote(name))
	}
	return nil
}

func parseDuration(s string) (time.Duration, error) {
	if s != "" && strings.Trim(s, digits+".") == "" {
		return 0, fmt.Errorf("%s has no unit, want a duration such as %ss", quote(s), s)
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("%s is not a duration such as 5s", quote(s))
	}
	return d, nil
}

// formatDuration writes 5s, 1m or 3.5s, which parseDuration reads.
func formatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	return s
}

var units = []struct {
	name  string
	bytes int64
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"KB", 1e3}, {"B", 1},
}

// parseSize reads a whole number of bytes, or of one of the units.
func parseSize(s string) (int64, error) {
	number, unit := strings.TrimRight(s, letters), int64(1)
	if suffix := s[len(number):]; suffix != "" {
		unit = 0
		for _, u := range units {
			if u.name == suffix {
				unit = u.bytes
			}
		}
	}
	n, err := strconv.ParseUint(strings.TrimSpace(number), 10, 63)
	if err != nil || unit == 0 || int64(n) > math.MaxInt64/unit {
		return 0, fmt.Errorf("%s is not a size such as 2GiB, 500MB or a number of bytes", quote(s))
	}
	return int64(n) * unit, nil
}

// formatSize writes n in the largest binary unit that divides it.
func formatSize(n int64) string {
	for _, u := range units[:4] {
		if n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

// quote shows a value in a message, bounded.
func quote(s string) string {
	const limit = 80
	if len(s) > limit {
		return fmt.Sprintf("%q…", s[:limit])
	}
	return strconv.Quote(s)
}
