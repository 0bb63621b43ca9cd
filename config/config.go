// Package config reads keygate's settings: from flags, environment, one YAML
// file and defaults, in this order of precedence, and remembers for each value
// where it came from.
//
// One table ([settings]) names every setting once. Its flag is kebab-case
// (--staleness-budget), its environment variable follows mechanically
// (KEYGATE_STALENESS_BUDGET) and so does its field in the file
// (stalenessBudget). The file is flat and strict: an unknown or repeated
// field, a value of another type, an anchor or a second document is an error
// that says file, line, column and what was probably meant. So is an unknown
// KEYGATE_ variable. An empty variable counts as not set.
//
// Two variables hold secrets, KEYGATE_TOKEN and KEYGATE_SEALING_KEY. They are no
// settings: there is no flag and no field for them, and nothing prints them.
package config

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

// Config holds every setting. Paths are relative to the working directory.
// [Flags.Load] makes it; it is not changed afterwards.
type Config struct {
	// File that was read, as it was named; empty for none.
	File string

	// EtcdEndpoints of an external cluster; empty means the embedded etcd.
	EtcdEndpoints []string
	// EtcdCACert, EtcdCert and EtcdKey are PEM files. Without a CA the
	// system's roots verify an https endpoint.
	EtcdCACert, EtcdCert, EtcdKey string
	// EtcdUser authenticates with the password in EtcdPasswordFile; see
	// [Config.EtcdPassword].
	EtcdUser, EtcdPasswordFile string

	// DataDir and EtcdQuota (bytes) of the embedded etcd.
	DataDir   string
	EtcdQuota int64

	// Space of keygate's keys in etcd.
	Space keyspace.Space
	// Organization of a route that names none, and of commands.
	Organization authz.Organization

	// AuthzListen is where ext_authz is served.
	AuthzListen Address
	// AuthzHTTPListen is where the same checks are served to Envoy's HTTP
	// ext_authz, with AuthzListen's TLS and rules; the zero Address means
	// nowhere.
	AuthzHTTPListen Address
	// AuthzTLSCert, AuthzTLSKey and AuthzClientCA are PEM files. With a client
	// CA a client must show a certificate that it has signed.
	AuthzTLSCert, AuthzTLSKey, AuthzClientCA string
	// AuthzInsecure allows plaintext beyond the loopback interface.
	AuthzInsecure bool
	// KeyHeader holds the consumer key; a lower-case name.
	KeyHeader string
	// KeyQuery names the query parameter that may hold it; empty means none.
	KeyQuery string
	// DenialBody is "apigee" or "uniform".
	DenialBody string
	// AuthzCodec is "wire" or "standard": how AuthzListen's messages are read and
	// written. The answers are the same; "standard" is the way back should the
	// other ever be in doubt.
	AuthzCodec string
	// LogDecisions is "none", "denied" or "all".
	LogDecisions string
	// IndexRecords is how many records the index may hold; 0 for no index.
	IndexRecords int
	// AuthzWorkers are the goroutines kept to answer checks; 0 for none.
	AuthzWorkers int
	// GCHeadroom is the garbage in bytes that may gather before a collection; 0
	// leaves that to Go.
	GCHeadroom int64
	// StalenessBudget is 3 s to 60 s.
	StalenessBudget time.Duration
	// Register makes the replica part of the fleet's receipts, which needs the
	// right to write its registration.
	Register bool

	// HealthListen is where health, metrics and version are served.
	HealthListen Address

	// ManagementListen is where the management API is served; the zero Address
	// means nowhere.
	ManagementListen Address
	// ManagementTLSCert and ManagementTLSKey are PEM files.
	ManagementTLSCert, ManagementTLSKey string
	// ManagementInsecure allows plaintext beyond the loopback interface.
	ManagementInsecure bool
	// ManagementHosts are names that a request's Host header may have besides
	// the address itself and localhost: lower-case, without port and brackets.
	ManagementHosts []string

	// SealingKeyFile as it was given; see [Config.SealingKeyPath].
	SealingKeyFile string

	// Server is the URL of a management API for a command to use:
	// http://, https:// or unix:///path, without a final slash; empty for none.
	Server string
	// ServerCACert is a PEM file. Without it the system's roots verify Server.
	ServerCACert string
	// TokenFile holds a management token; see [Config.Token].
	TokenFile string
	// Insecure allows a token to be sent in plaintext beyond the loopback
	// interface.
	Insecure bool

	// LogFormat is "auto" (text on a terminal, JSON elsewhere), "text" or
	// "json".
	LogFormat string
	LogLevel  slog.Level

	groups  []Group           // that the command takes; nil means all
	sources map[string]Source // by flag name
	secrets map[string]string // by name of the variable
}

// Embedded tells whether the etcd is keygate's own, in DataDir.
func (c *Config) Embedded() bool { return len(c.EtcdEndpoints) == 0 }

// Source of the setting with the given flag name, such as "data-dir".
func (c *Config) Source(flag string) Source { return c.sources[flag] }

// SourceKind is one of the four places that a value can come from.
type SourceKind uint8

// In rising precedence.
const (
	FromDefault SourceKind = iota
	FromFile
	FromEnvironment
	FromFlag
)

// Source of a value. The zero Source is the default.
type Source struct {
	Kind SourceKind
	// Name of the flag (--org), variable (KEYGATE_ORG) or file.
	Name string
	// Line in the file, from 1.
	Line int
}

// String is "flag --org", "env KEYGATE_ORG", "keygate.yaml:12" or "default".
func (s Source) String() string {
	switch s.Kind {
	case FromFlag:
		return "flag " + s.Name
	case FromEnvironment:
		return "env " + s.Name
	case FromFile:
		return fmt.Sprintf("%s:%d", s.Name, s.Line)
	}
	return "default"
}

// Value is one setting as [Config.Values] lists it.
type Value struct {
	// Field is its name in the file.
	Field string
	// Text is the value as a flag would be given it.
	Text string
	// Data is the value for JSON: a string, a bool or a []string.
	Data   any
	Source Source
}

// Values lists every setting that the file can hold, in the order of the help.
// No secret is among them: secrets stand in files of their own.
func (c *Config) Values() []Value {
	var vs []Value
	for _, s := range settings {
		if s.name == fileSetting {
			continue
		}
		vs = append(vs, Value{Field: s.field(), Text: s.get(c), Data: s.data(c), Source: c.sources[s.name]})
	}
	return vs
}

// Flags are the settings that a command takes as flags.
type Flags struct {
	// AllOrganizations tells that the command takes --org '*', which is
	// [keyspace.AllOrganizations]. The environment and the file cannot give it.
	AllOrganizations bool

	groups []Group
	values map[string]*flagValue
}

// Register adds the flags of the groups to fs. The settings of Common are
// always among them. The environment and the file may hold any setting.
func Register(fs *pflag.FlagSet, groups ...Group) *Flags {
	f := &Flags{groups: append([]Group{Common}, groups...), values: map[string]*flagValue{}}
	for _, s := range settings {
		if !slices.Contains(f.groups, s.group) {
			continue
		}
		v := &flagValue{setting: s}
		f.values[s.name] = v
		flag := fs.VarPF(v, s.name, "", s.help)
		flag.DefValue = s.def
		if s.kind == boolean {
			flag.NoOptDefVal = "true"
		}
	}
	return f
}

// flagValue collects what the command line says; Load reads it. A list may be
// given more than once, anything else takes the last.
type flagValue struct {
	setting
	given bool
	value string
}

func (v *flagValue) Set(s string) error {
	if v.given && v.kind == list {
		s = v.value + "," + s
	}
	v.given, v.value = true, s
	return nil
}

func (v *flagValue) String() string { return v.value }
func (v *flagValue) Type() string   { return v.kind.String() }

// Load reads the configuration: the flags as parsed, the environment (as
// os.Environ gives it) and the file that one of the two names. The error joins
// everything that is wrong, one line each. Rules between settings are checked
// for the groups of f, so that a tool is not stopped by a rule for a server.
//
// Of the files that settings name none is opened; see [Config.CheckFiles].
func (f *Flags) Load(environ []string) (*Config, error) {
	c := &Config{groups: f.groups, sources: map[string]Source{}}
	given := map[string]input{} // by flag name, the one of the highest precedence
	var problems []error

	env, secrets, bad := environment(environ)
	c.secrets = secrets
	problems = append(problems, bad...)
	if in, ok := env[fileSetting]; ok {
		c.File = in.text
	}
	if v := f.values[fileSetting]; v.given {
		c.File = v.value
	}
	if c.File != "" {
		text, err := readFile(c.File)
		if err != nil {
			return nil, errors.Join(append(problems, fmt.Errorf("configuration: %w", err))...)
		}
		given, bad = parseFile(c.File, text)
		problems = append(problems, bad...)
	}
	for name, in := range env {
		given[name] = in
	}
	for name, v := range f.values {
		if v.given {
			given[name] = input{text: v.value, source: Source{Kind: FromFlag, Name: "--" + name}, where: "--" + name}
		}
	}

	for _, s := range settings {
		in, ok := given[s.name]
		if !ok {
			in = input{text: s.def, where: "default of --" + s.name}
		}
		c.sources[s.name] = in.source
		err := s.set(c, in.text)
		if s.group == Org && f.AllOrganizations && in.source.Kind == FromFlag && c.Organization == keyspace.AllOrganizations {
			err = nil
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", in.where, err))
		}
	}
	if len(problems) == 0 {
		problems = c.check(f.groups)
	}
	if len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	return c, nil
}

// input is a value as it was written somewhere.
type input struct {
	text   string
	source Source
	where  string // begins an error
}

// environment takes the KEYGATE_ variables. hidden are the secrets.
func environment(environ []string) (given map[string]input, hidden map[string]string, problems []error) {
	given, hidden = map[string]input{}, map[string]string{}
	byVariable := map[string]setting{}
	var variables []string
	for _, s := range settings {
		byVariable[s.variable()] = s
		variables = append(variables, s.variable())
	}
	for name := range secrets {
		variables = append(variables, name)
	}
	slices.Sort(variables)
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, "KEYGATE_") || isServiceLink(name, value) {
			continue
		}
		s, ok := byVariable[name]
		_, secret := secrets[name]
		switch {
		case secret:
			if value != "" {
				hidden[name] = value
			}
		case !ok:
			problems = append(problems, fmt.Errorf("unknown environment variable %s%s", name, didYouMean(name, variables)))
		case value != "":
			given[s.name] = input{text: value, source: Source{Kind: FromEnvironment, Name: name}, where: name}
		}
	}
	slices.SortFunc(problems, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return given, hidden, problems
}

// Kubernetes sets variables in every pod for a Service whose name begins with
// "keygate" (enableServiceLinks); they are not ours.
// https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
var (
	serviceLink     = regexp.MustCompile(`_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$`)
	serviceLinkPort = regexp.MustCompile(`_PORT=(tcp|udp|sctp)://`) // KEYGATE_PORT=8080 is a person's mistake
)

func isServiceLink(name, value string) bool {
	return serviceLink.MatchString(name) || serviceLinkPort.MatchString(name+"="+value)
}

// maxFile bounds the configuration file, in bytes.
const maxFile = 1 << 20

func readFile(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("%s has %d bytes, want at most %d", name, info.Size(), maxFile)
	}
	return os.ReadFile(name)
}
