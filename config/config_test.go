package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// load reads a configuration whose file, if any, is named keygate.yaml.
func load(t *testing.T, args, environ []string, file string, groups ...Group) (*Config, error) {
	t.Helper()
	if len(groups) == 0 {
		groups = All()
	}
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	flags := Register(fs, groups[:]...)
	if file != "" {
		t.Chdir(t.TempDir())
		if err := os.WriteFile("keygate.yaml", []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append([]string{"--config", "keygate.yaml"}, args...)
	}
	if err := fs.Parse(args); err != nil {
		t.Fatalf("parse %q: %v", args, err)
	}
	return flags.Load(environ)
}

func TestDefaultsAreTheIssuesOwn(t *testing.T) {
	c, err := load(t, nil, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, v := range c.Values() {
		got += v.Field + "=" + v.Text + "\n"
		if v.Source.String() != "default" {
			t.Errorf("%s comes from %v, want default", v.Field, v.Source)
		}
	}
	want := `logFormat=auto
logLevel=info
etcdEndpoints=
etcdCacert=
etcdCert=
etcdKey=
etcdUser=
etcdPasswordFile=
dataDir=./keygate-data
etcdQuota=2GiB
prefix=/keygate
org=default
authzListen=127.0.0.1:9000
authzHttpListen=off
authzTlsCert=
authzTlsKey=
authzClientCa=
authzInsecure=false
keyHeader=x-api-key
keyQuery=
denialBody=apigee
authzCodec=wire
logDecisions=none
stalenessBudget=5s
indexRecords=4000000
authzWorkers=64
gcHeadroom=16MiB
register=true
healthListen=127.0.0.1:8081
managementListen=127.0.0.1:8080
managementTlsCert=
managementTlsKey=
managementInsecure=false
managementHosts=
sealingKeyFile=
server=
serverCacert=
tokenFile=
insecure=false
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if !c.Embedded() || c.EtcdQuota != 2<<30 || c.StalenessBudget != 5*time.Second {
		t.Errorf("got embedded %v, quota %d, budget %v; want the embedded etcd, 2 GiB, 5s", c.Embedded(), c.EtcdQuota, c.StalenessBudget)
	}
}

// Every setting is reachable in all three ways, by names that follow from its
// flag, and the higher precedence wins.
func TestPrecedenceOfEverySetting(t *testing.T) {
	// Three values other than the default for each, in the form of a flag.
	values := map[string][3]string{
		"log-format": {"text", "json", "text"}, "log-level": {"debug", "warn", "error"},
		"etcd-endpoints": {"https://a:1,https://b:2", "https://c:3", "https://d:4"},
		"etcd-quota":     {"1GiB", "512MiB", "17MiB"},
		"prefix":         {"/a", "/b", "/c"}, "org": {"a", "b", "c"},
		"authz-listen": {"127.0.0.1:1", "[::1]:2", "unix:///x.sock"}, "health-listen": {":1", "0.0.0.0:2", "unix:///y.sock"},
		"index-records": {"1", "0", "2000000"}, "authz-workers": {"0", "8", "64"}, "gc-headroom": {"32MiB", "0B", "1GiB"},
		"authz-http-listen": {"127.0.0.1:1", "off", "unix:///x.sock"},
		"key-header":        {"x-a", "x-b", "x-c"}, "key-query": {"a", "b", "c"},
		"denial-body": {"uniform", "apigee", "uniform"}, "authz-codec": {"standard", "wire", "standard"}, "log-decisions": {"denied", "all", "none"},
		"staleness-budget":    {"3s", "1m", "4.5s"},
		"authz-insecure":      {"true", "false", "true"},
		"register":            {"false", "true", "false"},
		"management-listen":   {"127.0.0.1:1", "off", "unix:///x.sock"},
		"management-insecure": {"true", "false", "true"},
		"management-hosts":    {"a.example,2001:db8::1", "b", "c"},
		"server":              {"https://a:1/keygate", "http://127.0.0.1:8080", "unix:///x.sock"},
		"insecure":            {"true", "false", "true"},
	}
	for _, s := range settings {
		if s.name == fileSetting {
			continue
		}
		v, ok := values[s.name]
		if !ok {
			v = [3]string{"a", "b", "c"}
		}
		inFile := s.field() + ": " + v[0] + "\n"
		if s.kind == list {
			inFile = s.field() + ": [" + strings.ReplaceAll(v[0], ",", ", ") + "]\n"
		}
		variable := "KEYGATE_" + strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
		for _, tt := range []struct {
			args, env []string
			want      string
			source    string
		}{
			{nil, nil, v[0], "keygate.yaml:2"},
			{nil, []string{variable + "=" + v[1]}, v[1], "env " + variable},
			{nil, []string{variable + "="}, v[0], "keygate.yaml:2"},
			{[]string{"--" + s.name + "=" + v[2]}, []string{variable + "=" + v[1]}, v[2], "flag --" + s.name},
		} {
			// Only the setting's own groups, and no rule between settings: most
			// of them want a second one beside them.
			c, err := load(t, tt.args, tt.env, "# a comment\n"+inFile, s.group)
			if err != nil && !strings.Contains(err.Error(), "without --") && !strings.Contains(err.Error(), "loopback") {
				t.Errorf("%s: %v", s.name, err)
			}
			if err != nil {
				continue
			}
			if got := s.get(c); got != tt.want || c.Source(s.name).String() != tt.source {
				t.Errorf("%s %q %q: got %s from %v, want %s from %s", s.name, tt.args, tt.env, got, c.Source(s.name), tt.want, tt.source)
			}
		}
	}
}

func TestFileNamedByEnvironment(t *testing.T) {
	name := filepath.Join(t.TempDir(), "k.yaml")
	if err := os.WriteFile(name, []byte("org: acme\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := load(t, nil, []string{"KEYGATE_CONFIG=" + name}, "")
	if err != nil || c.Organization != "acme" || c.File != name {
		t.Errorf("got %v, %v; want organization acme from %s", c, err, name)
	}
}

func TestEmptyFiles(t *testing.T) {
	for _, file := range []string{"\n", "# nothing\n", "---\n", "--- # one document\norg: a\n...\n", "\xef\xbb\xbforg: a\r\nkeyQuery: k\r\n", "{org: a}\n"} {
		if _, err := load(t, nil, nil, file); err != nil {
			t.Errorf("%q: %v", file, err)
		}
	}
}

// One row for each mistake: the exact message, for the file with its place.
func TestMistakes(t *testing.T) {
	for _, tt := range []struct {
		name string
		args string
		env  string
		file string
		want string
	}{
		{"field misspelt", "", "", "org: a\n\nstalnessBudget: 5s\n", `keygate.yaml:3:1: unknown field "stalnessBudget", did you mean "stalenessBudget"?`},
		{"field as flag", "", "", "etcd-endpoints: a:1\n", `keygate.yaml:1:1: unknown field "etcd-endpoints", did you mean "etcdEndpoints"?`},
		{"field nested", "", "", "etcd:\n  endpoints: a:1\n", `keygate.yaml:1:1: unknown field "etcd"; fields are not nested, did you mean "etcdEndpoints"?`},
		{"field of nothing", "", "", "colour: red\n", `keygate.yaml:1:1: unknown field "colour"`},
		{"file names a file", "", "", "config: other.yaml\n", `keygate.yaml:1:1: unknown field "config"`},
		{"field twice", "", "", "org: a\nkeyQuery: k\norg: b\n", `keygate.yaml:3:1: field "org" stands here again, first in line 1`},
		{"number for string", "", "", "org: 12\n", `keygate.yaml:1:6: org: want a string, got the number 12; put it in quotes`},
		{"bool for word", "", "", "logDecisions: false\n", `keygate.yaml:1:15: logDecisions: want a string, got the boolean false; put it in quotes`},
		{"string for bool", "", "", "authzInsecure: yes\n", `keygate.yaml:1:16: authzInsecure: want true or false, got the string "yes"`},
		{"list for string", "", "", "org: [a, b]\n", `keygate.yaml:1:6: org: want a string, got a list`},
		{"mapping for list", "", "", "etcdEndpoints: {a: b}\n", `keygate.yaml:1:16: etcdEndpoints: want a list of strings, got a mapping`},
		{"number in list", "", "", "etcdEndpoints: [a:1, 5]\n", `keygate.yaml:1:16: etcdEndpoints: want a list of strings, got the number 5 in it`},
		{"no value", "", "", "dataDir:\n", `keygate.yaml:1:9: dataDir: no value; leave the field out for its default ("./keygate-data")`},
		{"no unit", "", "", "stalenessBudget: 5\n", `keygate.yaml:1:18: stalenessBudget: "5" has no unit, want a duration such as 5s`},
		{"tab", "", "", "org: a\n\tkeyQuery: k\n", `keygate.yaml:2:1: a tab; YAML is indented with spaces`},
		{"anchor", "", "", "org: &a b\n", `keygate.yaml:1:6: an anchor (&a); write the plain value`},
		{"alias", "", "", "org: &a b\nprefix: *a\n", "keygate.yaml:1:6: an anchor (&a); write the plain value\nkeygate.yaml:2:9: an alias (*a); write the plain value"},
		{"tag", "", "", "org: !!str 5\n", `keygate.yaml:1:6: a tag (!!str); write the plain value`},
		{"merge", "", "", "<<: {org: a}\n", `keygate.yaml:1:1: a merge key (<<); write each field out`},
		{"second document", "", "", "org: a\n---\norg: b\n", `keygate.yaml:2:1: a second document, want one`},
		{"not a mapping", "", "", "- org\n", `keygate.yaml:1:1: want fields such as "org: default", got a list`},
		{"list as key", "", "", "[a]: b\n", `keygate.yaml:1:1: want the name of a field, got a list`},
		{"not YAML", "", "", "org: a\norg: 'b\n", `keygate.yaml:2:1: not YAML: found unexpected end of stream`},
		{"all at once", "--org .a", "KEYGATE_PREFIX=x/", "orgs: b\netcdQuota: 1GB\nkeyHeader: Cookie\n",
			"keygate.yaml:1:1: unknown field \"orgs\", did you mean \"org\"?\n" +
				"KEYGATE_PREFIX: prefix \"x/\": want a path such as \"/keygate\", without a slash at its end\n" +
				"--org: organization \".a\" begins with a dot\n" +
				"keygate.yaml:3:12: keyHeader: \"cookie\" is not supported as the consumer key's place; use a header of its own, such as x-api-key"},

		{"variable misspelt", "", "KEYGATE_STALENES_BUDGET=5s", "", `unknown environment variable KEYGATE_STALENES_BUDGET, did you mean "KEYGATE_STALENESS_BUDGET"?`},
		{"password in variable", "", "KEYGATE_ETCD_PASSWORD=canary", "", `unknown environment variable KEYGATE_ETCD_PASSWORD, did you mean "KEYGATE_ETCD_PASSWORD_FILE"?`},
		{"port that is no service link", "", "KEYGATE_PORT=8080", "", `unknown environment variable KEYGATE_PORT, did you mean "KEYGATE_ORG"?`},
		{"value in variable", "", "KEYGATE_DENIAL_BODY=unifrom", "", `KEYGATE_DENIAL_BODY: "unifrom" is not one of apigee, uniform, did you mean "uniform"?`},

		{"missing file", "--config nowhere.yaml", "", "", `configuration: stat nowhere.yaml: no such file or directory`},
		{"unit", "--staleness-budget 5", "", "", `--staleness-budget: "5" has no unit, want a duration such as 5s`},
		{"short", "--staleness-budget 2s", "", "", `--staleness-budget: 2s is out of range, want 3s to 60s`},
		{"long", "--staleness-budget 61s", "", "", `--staleness-budget: 61s is out of range, want 3s to 60s`},
		{"zero", "--staleness-budget 0", "", "", `--staleness-budget: "0" has no unit, want a duration such as 0s`},
		{"no duration", "--staleness-budget soon", "", "", `--staleness-budget: "soon" is not a duration such as 5s`},
		{"quota", "--etcd-quota 2", "", "", `--etcd-quota: 2B is out of range, want 16MiB to 64GiB`},
		{"quota unit", "--etcd-quota 2Gi", "", "", `--etcd-quota: "2Gi" is not a size such as 2GiB, 500MB or a number of bytes`},
		{"quota overflow", "--etcd-quota 9223372036854775807GiB", "", "", `--etcd-quota: "9223372036854775807GiB" is not a size such as 2GiB, 500MB or a number of bytes`},
		{"quota negative", "--etcd-quota=-1GiB", "", "", `--etcd-quota: "-1GiB" is not a size such as 2GiB, 500MB or a number of bytes`},
		{"level", "--log-level warning", "", "", `--log-level: "warning" is not one of debug, info, warn, error, did you mean "warn"?`},
		{"decisions", "--log-decisions denies", "", "", `--log-decisions: "denies" is not one of none, denied, all, did you mean "denied"?`},
		{"no data-dir", "--data-dir=", "", "", `--data-dir: no folder`},
		{"no org", "--org=", "", "", `--org: the organization has no name`},
		{"bool", "--authz-insecure=maybe", "", "", `--authz-insecure: want true or false, got "maybe"`},

		{"listen without port", "--authz-listen 127.0.0.1", "", "", `--authz-listen: "127.0.0.1": want host:port`},
		{"listen on named port", "--authz-listen 127.0.0.1:http", "", "", `--authz-listen: "127.0.0.1:http": port "http" is not a number from 0 to 65535`},
		{"listen on relative socket", "--authz-listen unix://a.sock", "", "", `--authz-listen: "unix://a.sock": want unix:///path, three slashes and a file`},
		{"listen on long socket", "--authz-listen unix:///" + strings.Repeat("a", 107), "", "", `--authz-listen: "unix:///` + strings.Repeat("a", 72) + `"…: the path has 108 bytes, a unix socket's at most 107`},
		{"listen with scheme", "--health-listen http://127.0.0.1:1", "", "", `--health-listen: "http://127.0.0.1:1": want host:port or unix:///path, without another scheme`},
		{"listen on a blank host", "--authz-listen a/b:1", "", "", `--authz-listen: "a/b:1": "a/b" is not a host`},

		{"header name", "--key-header x:y", "", "", `--key-header: "x:y" is not the name of a header, such as x-api-key`},
		{"pseudo-header", "--key-header :authority", "", "", `--key-header: ":authority" is not the name of a header, such as x-api-key`},
		{"hop-by-hop", "--key-header Connection", "", "", `--key-header: "connection" has a meaning of its own in HTTP; use a header of its own, such as x-api-key`},
		{"authorization", "--key-header authorization", "", "", `--key-header: "authorization" is not supported as the consumer key's place; use a header of its own, such as x-api-key`},
		{"own header", "--key-header X-Keygate-App", "", "", `--key-header: "x-keygate-app" is set on the way; use a header of its own, such as x-api-key`},
		{"query name", "--key-query a&b", "", "", `--key-query: "a&b": want a parameter name of at most 128 letters, digits and any of -._~`},

		{"endpoint scheme", "--etcd-endpoints tcp://a:1", "", "", `--etcd-endpoints: "tcp://a:1": unknown scheme "tcp", want http://host:port, https://host:port, unix:///path or host:port`},
		{"endpoint port", "--etcd-endpoints https://a", "", "", `--etcd-endpoints: "https://a": want http://host:port, https://host:port, unix:///path or host:port`},
		{"endpoint path", "--etcd-endpoints https://a:1/v3", "", "", `--etcd-endpoints: "https://a:1/v3": want http://host:port, https://host:port, unix:///path or host:port, nothing after it`},
		{"endpoint bare", "--etcd-endpoints a", "", "", `--etcd-endpoints: "a": want host:port: want http://host:port, https://host:port, unix:///path or host:port`},
		{"endpoint empty", "--etcd-endpoints a:1,,b:1", "", "", `--etcd-endpoints: an empty endpoint between commas`},
		{"endpoint twice", "--etcd-endpoints a:1 --etcd-endpoints a:1", "", "", `--etcd-endpoints: "a:1" stands twice`},
		{"endpoint with password", "--etcd-endpoints https://u:canary@a:1", "", "", `--etcd-endpoints: an endpoint with a user in it; give --etcd-user and --etcd-password-file`},
		{"endpoints mixed", "--etcd-endpoints http://a:1,https://b:1", "", "", `--etcd-endpoints: http:// and https:// endpoints together, want one scheme for all`},

		{"etcd cert alone", "--etcd-endpoints https://a:1 --etcd-cert c", "", "", `--etcd-cert is given without --etcd-key`},
		{"etcd user alone", "--etcd-endpoints https://a:1", "", "etcdUser: root\n", `keygate.yaml:1: etcdUser is given without --etcd-password-file`},
		{"password alone", "--etcd-endpoints https://a:1", "KEYGATE_ETCD_PASSWORD_FILE=p", "", `KEYGATE_ETCD_PASSWORD_FILE is given without --etcd-user`},
		{"CA for nothing", "--etcd-cacert ca", "", "", `--etcd-cacert is given without --etcd-endpoints`},
		{"CA for plaintext", "--etcd-endpoints http://a:1 --etcd-cacert ca", "", "", `--etcd-cacert is for TLS, which the endpoint http://a:1 does not use`},
		{"both etcds", "--etcd-endpoints http://a:1 --data-dir /var/lib/keygate", "", "", `--data-dir and --etcd-endpoints are given together: an embedded etcd means one replica, an external one holds the data for all; choose one`},

		{"off loopback", "--authz-listen 0.0.0.0:9000", "", "", `--authz-listen: 0.0.0.0:9000 is not a loopback address: give --authz-tls-cert and --authz-tls-key (best with --authz-client-ca), listen on a unix socket, or ask for plaintext with --authz-insecure`},
		{"off loopback in file", "", "", "\nauthzListen: :9000\n", `keygate.yaml:2: authzListen: :9000 is not a loopback address: give --authz-tls-cert and --authz-tls-key (best with --authz-client-ca), listen on a unix socket, or ask for plaintext with --authz-insecure`},
		{"by name", "--authz-listen keygate.example:9000", "", "", `--authz-listen: keygate.example:9000 is not a loopback address: give --authz-tls-cert and --authz-tls-key (best with --authz-client-ca), listen on a unix socket, or ask for plaintext with --authz-insecure`},
		{"cert without key", "--authz-tls-cert c", "", "", `--authz-tls-cert is given without --authz-tls-key`},
		{"client CA without TLS", "--authz-client-ca c", "", "", `--authz-client-ca is given without --authz-tls-cert and --authz-tls-key`},
		{"insecure TLS", "--authz-insecure --authz-tls-cert c --authz-tls-key k", "", "", `--authz-insecure and --authz-tls-cert are given together: plaintext or TLS, choose one`},
		{"one port for two", "--health-listen 127.0.0.1:9000", "", "", `--authz-listen and --health-listen are both 127.0.0.1:9000`},
		{"one port for management and health", "--management-listen 127.0.0.1:8081", "", "", `--management-listen and --health-listen are both 127.0.0.1:8081`},
		{"one port for management and authz", "", "", "managementListen: 127.0.0.1:9000\n", `--authz-listen and keygate.yaml:1: managementListen are both 127.0.0.1:9000`},

		{"HTTP door off loopback", "", "KEYGATE_AUTHZ_HTTP_LISTEN=:9002", "", `KEYGATE_AUTHZ_HTTP_LISTEN: :9002 is not a loopback address: give --authz-tls-cert and --authz-tls-key (best with --authz-client-ca), listen on a unix socket, or ask for plaintext with --authz-insecure`},
		{"one port for both doors", "", "", "authzHttpListen: 127.0.0.1:9000\n", `--authz-listen and keygate.yaml:1: authzHttpListen are both 127.0.0.1:9000`},
		{"HTTP door and half a TLS", "--authz-http-listen :9002 --authz-tls-cert c --authz-insecure", "", "", `--authz-tls-cert is given without --authz-tls-key`},
		{"HTTP door and a key in the query", "--authz-http-listen 127.0.0.1:9002 --key-query apikey", "", "", `--key-query and --authz-http-listen are given together: Envoy's HTTP ext_authz can neither send nor remove a key in the query`},

		{"management off loopback", "--management-listen :8080", "", "", `--management-listen: :8080 is not a loopback address: give --management-tls-cert and --management-tls-key, listen on a unix socket, or ask for plaintext with --management-insecure`},
		{"management key alone", "--management-tls-key k", "", "", `--management-tls-key is given without --management-tls-cert`},
		{"management insecure TLS", "--management-insecure --management-tls-cert c --management-tls-key k", "", "", `--management-insecure and --management-tls-cert are given together: plaintext or TLS, choose one`},
		{"management host with port", "--management-hosts a:1", "", "", `--management-hosts: "a:1" is not a host; want names without scheme and port`},
		{"management host twice", "--management-hosts [::1],::1", "", "", `--management-hosts: "::1" stands twice`},
		{"management host empty", "--management-hosts a,,b", "", "", `--management-hosts: "" is not a host; want names without scheme and port`},

		{"server without scheme", "--server keygate.example:8080", "", "", `--server: "keygate.example:8080": want https://host, http://host or unix:///path, a path before /v1 after the host if there is one`},
		{"server with a query", "--server https://a?b", "", "", `--server: "https://a?b": want https://host, http://host or unix:///path, a path before /v1 after the host if there is one`},
		{"server with a password", "--server https://u:canary@a", "", "", `--server: a URL with a user in it; give --token-file`},
		{"server on a relative socket", "--server unix://a", "", "", `--server: "unix://a": want unix:///path, three slashes and a file`},
		{"server in plaintext", "", "KEYGATE_SERVER=http://keygate.example:8080", "", `KEYGATE_SERVER: http://keygate.example:8080 would send the token in plaintext: give https://, or ask for plaintext with --insecure`},
		{"server's CA for plaintext", "--server http://localhost:8080 --server-cacert ca", "", "", `--server-cacert is for TLS, which http://localhost:8080 does not use`},
		{"token twice", "--token-file t", "KEYGATE_TOKEN=canary", "", `KEYGATE_TOKEN and --token-file are given together: choose one`},
		{"sealing key twice", "", "KEYGATE_SEALING_KEY=canary KEYGATE_SEALING_KEY_FILE=f", "", `KEYGATE_SEALING_KEY and KEYGATE_SEALING_KEY_FILE are given together: choose one`},
		{"token in file", "", "", "token: canary\n", `keygate.yaml:1:1: unknown field "token", did you mean "tokenFile"?`},
		{"secret misspelt", "", "KEYGATE_SEALINGKEY=canary", "", `unknown environment variable KEYGATE_SEALINGKEY, did you mean "KEYGATE_SEALING_KEY"?`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, strings.Fields(tt.args), strings.Fields(tt.env), tt.file)
			if err == nil {
				t.Fatalf("got no error, want %s", tt.want)
			}
			if err.Error() != tt.want {
				t.Errorf("got\n%s\nwant\n%s", err, tt.want)
			}
			if strings.Contains(err.Error(), "canary") {
				t.Errorf("got a password in %q", err)
			}
		})
	}
}

func TestAccepted(t *testing.T) {
	for _, args := range []string{
		"--etcd-endpoints http://10.0.0.1:2379,http://10.0.0.2:2379",
		"--etcd-endpoints http://10.0.0.1:2379 --etcd-endpoints http://10.0.0.2:2379",
		"--etcd-endpoints https://[2001:db8::1]:2379 --etcd-cacert ca.pem --etcd-cert c --etcd-key k --etcd-user u --etcd-password-file p",
		"--etcd-endpoints https://etcd.example:2379",
		"--etcd-endpoints etcd-0.etcd:2379 --etcd-cacert ca.pem",
		"--etcd-endpoints unix:///run/etcd.sock",
		"--etcd-endpoints http://a:1 --data-dir ./keygate-data",
		"--authz-listen 0.0.0.0:9000 --authz-tls-cert c --authz-tls-key k",
		"--authz-listen [::]:9000 --authz-tls-cert c --authz-tls-key k --authz-client-ca ca",
		"--authz-listen :9000 --authz-insecure",
		"--authz-listen unix:///run/keygate/authz.sock",
		"--authz-listen localhost:9000", "--authz-listen 127.8.9.1:0 --health-listen 127.8.9.1:0", "--authz-listen [::1]:9000",
		"--authz-http-listen 127.0.0.1:9002", "--authz-http-listen off --key-query apikey", "--authz-http-listen unix:///run/keygate/http.sock",
		"--authz-listen :9000 --authz-http-listen :9002 --authz-insecure", "--authz-http-listen :9002 --authz-tls-cert c --authz-tls-key k",
		"--health-listen :8081", "--key-header X-Api-Key", "--key-query apikey",
		"--management-listen off --authz-listen 127.0.0.1:8080", "--management-listen=", "--management-listen 0.0.0.0:8080 --management-insecure",
		"--management-listen :8080 --management-tls-cert c --management-tls-key k --management-hosts keygate.example,[2001:db8::1]",
		"--management-listen unix:///run/keygate/management.sock",
		"--server https://keygate.example/keygate/ --server-cacert ca --token-file t", "--server http://[::1]:8080", "--server http://10.0.0.1:8080 --insecure",
		"--etcd-quota 2147483648", "--etcd-quota 500MB", "--staleness-budget 3000ms", "--staleness-budget 1m",
	} {
		if _, err := load(t, strings.Fields(args), nil, ""); err != nil {
			t.Errorf("%s: %v", args, err)
		}
	}
}

// A Service named keygate makes Kubernetes set these in every pod.
func TestServiceLinksAreNotSettings(t *testing.T) {
	environ := []string{
		"KEYGATE_SERVICE_HOST=10.0.0.1", "KEYGATE_SERVICE_PORT=9000", "KEYGATE_SERVICE_PORT_GRPC=9000", "KEYGATE_PORT=tcp://10.0.0.1:9000",
		"KEYGATE_PORT_9000_TCP=tcp://10.0.0.1:9000", "KEYGATE_PORT_9000_TCP_PROTO=tcp", "KEYGATE_PORT_9000_TCP_PORT=9000", "KEYGATE_PORT_9000_TCP_ADDR=10.0.0.1",
		"KEYGATE_ETCD_SERVICE_HOST=10.0.0.2", "KEYGATE_ETCD_PORT=tcp://10.0.0.2:2379", "KEYGATE_ETCD_PORT_2379_TCP=tcp://10.0.0.2:2379",
	}
	if _, err := load(t, nil, environ, ""); err != nil {
		t.Error(err)
	}
}

// A rule for a server does not stop a tool that shares its environment.
func TestRulesOfOtherCommands(t *testing.T) {
	environ := []string{"KEYGATE_AUTHZ_LISTEN=0.0.0.0:9000", "KEYGATE_ETCD_CACERT=ca.pem"}
	if c, err := load(t, nil, environ, "", Health, Org); err != nil || c.AuthzListen.Local() {
		t.Errorf("got %v, want no error and the address of the environment", err)
	}
	if _, err := load(t, nil, environ, "", Authz); err == nil {
		t.Error("got no error, want that the address is refused")
	}
}

func TestEtcdPassword(t *testing.T) {
	for _, tt := range []struct {
		contents string
		mode     os.FileMode
		want     string
		problem  string
	}{
		{"pass word\n", 0o600, "pass word", ""},
		{"pass word", 0o400, "pass word", ""},
		{" pw \r\n", 0o600, " pw ", ""},
		{"canary\n\n", 0o600, "", "more than one line"},
		{"canary", 0o640, "", "mode 0640"},
		{"canary", 0o604, "", "mode 0604"},
		{"\n", 0o600, "", "is empty"},
		{strings.Repeat("canary", 1000), 0o600, "", "longer than"},
	} {
		name := filepath.Join(t.TempDir(), "password")
		if err := os.WriteFile(name, []byte(tt.contents), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, tt.mode); err != nil {
			t.Fatal(err)
		}
		c := &Config{EtcdPasswordFile: name}
		got, err := c.EtcdPassword()
		switch {
		case tt.problem == "" && (err != nil || got != tt.want):
			t.Errorf("%q: got %q, %v, want %q", tt.contents, got, err, tt.want)
		case tt.problem != "" && (err == nil || !strings.Contains(err.Error(), tt.problem) || strings.Contains(err.Error(), "canary") || got != ""):
			t.Errorf("%q, mode %o: got %q, %v, want an error with %q", tt.contents, tt.mode, got, err, tt.problem)
		}
	}
	if got, err := (&Config{}).EtcdPassword(); got != "" || err != nil {
		t.Errorf("without a file: got %q, %v", got, err)
	}
}

// What a secret is, where it comes from, and that no setting shows it.
func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return name
	}
	token, open, empty := file("token", "canary-token\n", 0o600), file("open", "canary", 0o644), file("empty", "", 0o600)
	keys := file("sealing-key", "# the second\nb:canary\na:canary\n", 0o600)
	escape := file("escape", "canary\x1b[2J", 0o600)
	file("admin-token", "canary-admin\n", 0o600)
	for _, tt := range []struct {
		args, env                  string
		token, keys, path, problem string
		own                        bool
	}{
		{"--data-dir " + dir, "", "", "# the second\nb:canary\na:canary\n", keys, "", true},
		{"--etcd-endpoints http://a:1", "", "", "", "", "", false},
		{"--etcd-endpoints http://a:1 --sealing-key-file " + keys + " --token-file " + token, "", "canary-token", "# the second\nb:canary\na:canary\n", keys, "", false},
		{"--data-dir " + dir, "KEYGATE_TOKEN=canary-env KEYGATE_SEALING_KEY=c:canary", "canary-env", "c:canary", "", "", false},
		{"--data-dir " + dir + "/none", "", "", "", dir + "/none/sealing-key", "no such file", true},
		{"--token-file " + open + " --data-dir " + dir, "", "", "# the second\nb:canary\na:canary\n", keys, "open has mode 0644", true},
		{"--data-dir " + dir + " --token-file " + escape, "", "", "# the second\nb:canary\na:canary\n", keys, "escape holds a line break or another control character", true},
		{"--sealing-key-file " + open, "", "", "", open, "open has mode 0644", false},
		{"--sealing-key-file " + empty, "", "", "", empty, "empty is empty", false},
	} {
		c, err := load(t, strings.Fields(tt.args), strings.Fields(tt.env), "")
		if err != nil {
			t.Errorf("%s %s: %v", tt.args, tt.env, err)
			continue
		}
		token, tokenErr := c.Token()
		keys, keysErr := c.SealingKeys()
		path, own := c.SealingKeyPath()
		problem := errors.Join(tokenErr, keysErr)
		if token != tt.token || string(keys) != tt.keys || path != tt.path || own != tt.own {
			t.Errorf("%s: got token %q, keys %q in %q, own %v; want %q, %q in %q, %v", tt.args, token, keys, path, own, tt.token, tt.keys, tt.path, tt.own)
		}
		if (problem != nil) != (tt.problem != "") || problem != nil && !strings.Contains(problem.Error(), tt.problem) {
			t.Errorf("%s: got error %v, want %q", tt.args, problem, tt.problem)
		}
		if problem != nil && !own && c.CheckFiles() == nil {
			t.Errorf("%s: got no error of CheckFiles, want %v", tt.args, problem)
		}
		for _, v := range c.Values() {
			if strings.Contains(v.Text, "canary") {
				t.Errorf("%s: got a secret in %s", tt.env, v.Field)
			}
		}
	}
	c, err := load(t, []string{"--data-dir", dir}, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	if admin, err := c.AdminToken(); admin != "canary-admin" || err != nil {
		t.Errorf("got admin token %q, %v, want that of the data directory", admin, err)
	}
	c, err = load(t, []string{"--etcd-endpoints", "http://a:1"}, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.AdminToken(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want that a cluster has no admin token", err)
	}
}

func TestCheckFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, text []byte) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	pair := func(name string) (cert, key string) {
		t.Helper()
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
		if err != nil {
			t.Fatal(err)
		}
		secret, err := x509.MarshalPKCS8PrivateKey(private)
		if err != nil {
			t.Fatal(err)
		}
		return file(name+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
			file(name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))
	}
	certA, keyA := pair("a")
	_, keyB := pair("b")

	good := &Config{AuthzTLSCert: certA, AuthzTLSKey: keyA, AuthzClientCA: certA, EtcdCACert: certA, ManagementTLSCert: certA, ManagementTLSKey: keyA, ServerCACert: certA}
	if err := good.CheckFiles(); err != nil {
		t.Errorf("got %v, want no error", err)
	}
	bad := &Config{
		AuthzTLSCert: certA, AuthzTLSKey: keyB, AuthzClientCA: keyA, EtcdCACert: filepath.Join(dir, "none"),
		ManagementTLSCert: certA, ManagementTLSKey: keyB, ServerCACert: keyA,
		sources: map[string]Source{"etcd-cacert": {Kind: FromFile, Name: "keygate.yaml", Line: 3}},
	}
	got := strings.ReplaceAll(bad.CheckFiles().Error(), dir, "DIR")
	want := `--authz-tls-cert: tls: private key does not match public key
--management-tls-cert: tls: private key does not match public key
keygate.yaml:3: etcdCacert: open DIR/none: no such file or directory
--authz-client-ca: DIR/a.key holds no PEM certificate
--server-cacert: DIR/a.key holds no PEM certificate`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// A file that a command does not use does not stop it.
func TestFilesOfOtherCommands(t *testing.T) {
	environ := []string{"KEYGATE_SEALING_KEY_FILE=/nowhere", "KEYGATE_AUTHZ_TLS_CERT=/nowhere", "KEYGATE_AUTHZ_TLS_KEY=/nowhere"}
	c, err := load(t, nil, environ, "", Org, Embedded)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CheckFiles(); err != nil {
		t.Errorf("got %v, want no error", err)
	}
	if c, err = load(t, nil, environ, "", Org, Sealing); err != nil || c.CheckFiles() == nil {
		t.Errorf("got %v, %v, want that the file is not there", c, err)
	}
}

// Whatever the file holds, the answer is fields that exist or problems that
// say where.
func FuzzParseFile(f *testing.F) {
	for _, seed := range []string{
		"org: a\n", "a: *b\n", "&a [*a]: 1\n", "? {a: b}\n: c\n", "<<: *x\n", "--- !!set\n", "\torg: a", "org: |\n  a\n", "%YAML 9\n---\n", "{", "org: ! a", "\x00",
		"? &k org\n: v\n", "etcdEndpoints: [[a]]", "...\n", "---\n---\n", "org: \"\\x80\"",
	} {
		f.Add([]byte(seed))
	}
	place := regexp.MustCompile(`(?s)^f:[1-9][0-9]*:[1-9][0-9]*: .`)
	f.Fuzz(func(t *testing.T, text []byte) {
		given, problems := parseFile("f", text)
		for _, p := range problems {
			if !place.MatchString(p.Error()) {
				t.Errorf("%q: got %q, want a place first", text, p)
			}
		}
		for name, in := range given {
			if s := settingNamed(name); s.name == fileSetting || in.source.Line < 1 {
				t.Errorf("%q: got %v for %s", text, in, name)
			}
			_ = settingNamed(name).set(&Config{}, in.text) // must not panic
		}
	})
}

func TestNearest(t *testing.T) {
	words := []string{"stalenessBudget", "org", "etcdPasswordFile", "authzListen"}
	for name, want := range map[string]string{
		"stalnessBudget": "stalenessBudget", "staleness_budget": "stalenessBudget", "STALENESSBUDGET": "stalenessBudget", "ogr": "org", "etcdPassword": "etcdPasswordFile",
		"authzListne": "authzListen", "colour": "", "": "",
	} {
		if got := Nearest(name, words); got != want {
			t.Errorf("Nearest(%q): got %q, want %q", name, got, want)
		}
	}
}
