package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
)

// check applies the rules between settings, for the groups that a command
// uses. It opens no file.
func (c *Config) check(groups []Group) (problems []error) {
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	from := c.given
	// pair requires two settings to be given together.
	pair := func(a, b, valueA, valueB string) {
		switch {
		case valueA != "" && valueB == "":
			problem("%s is given without --%s", from(a), b)
		case valueA == "" && valueB != "":
			problem("%s is given without --%s", from(b), a)
		}
	}

	if slices.Contains(groups, External) {
		pair("etcd-cert", "etcd-key", c.EtcdCert, c.EtcdKey)
		pair("etcd-user", "etcd-password-file", c.EtcdUser, c.EtcdPasswordFile)
		for _, s := range settings {
			switch {
			case s.group != External || s.name == "etcd-endpoints" || s.get(c) == "":
			case c.Embedded():
				problem("%s is given without --etcd-endpoints", from(s.name))
			case strings.HasSuffix(s.name, "cert") || strings.HasSuffix(s.name, "key"):
				if e := c.EtcdEndpoints[0]; strings.HasPrefix(e, "http://") || strings.HasPrefix(e, "unix:") {
					problem("%s is for TLS, which the endpoint %s does not use", from(s.name), e)
				}
			}
		}
		if slices.Contains(groups, Embedded) && !c.Embedded() && c.DataDir != settingNamed("data-dir").def {
			problem("%s and %s are given together: an embedded etcd means one replica, an external one holds the data for all; choose one", from("data-dir"), from("etcd-endpoints"))
		}
	}
	type listener struct {
		group     Group
		name      string // of the setting, without -listen
		secured   string // what the settings of its TLS begin with
		address   Address
		cert, key string
		insecure  bool
		advice    string
	}
	listeners := []listener{
		{Authz, "authz", "authz", c.AuthzListen, c.AuthzTLSCert, c.AuthzTLSKey, c.AuthzInsecure, " (best with --authz-client-ca)"},
		{Authz, "authz-http", "authz", c.AuthzHTTPListen, c.AuthzTLSCert, c.AuthzTLSKey, c.AuthzInsecure, " (best with --authz-client-ca)"},
		{Management, "management", "management", c.ManagementListen, c.ManagementTLSCert, c.ManagementTLSKey, c.ManagementInsecure, ""},
		{Health, "health", "health", c.HealthListen, "", "", true, ""},
	}
	listeners = slices.DeleteFunc(listeners, func(l listener) bool { return !slices.Contains(groups, l.group) })
	for i, l := range listeners {
		isTLS := l.cert != "" && l.key != ""
		if l.name == l.secured { // once for listeners that share it
			pair(l.name+"-tls-cert", l.name+"-tls-key", l.cert, l.key)
			if l.group == Authz && c.AuthzClientCA != "" && l.cert == "" {
				problem("%s is given without --authz-tls-cert and --authz-tls-key", from("authz-client-ca"))
			}
			if l.insecure && isTLS {
				problem("%s and %s are given together: plaintext or TLS, choose one", from(l.name+"-insecure"), from(l.name+"-tls-cert"))
			}
		}
		if l.address == (Address{}) {
			continue
		}
		if !l.address.Local() && !isTLS && !l.insecure {
			problem("%[1]s: %[2]s is not a loopback address: give --%[3]s-tls-cert and --%[3]s-tls-key%[4]s, listen on a unix socket, or ask for plaintext with --%[3]s-insecure",
				from(l.name+"-listen"), l.address, l.secured, l.advice)
		}
		for _, other := range listeners[i+1:] {
			if l.address == other.address && !strings.HasSuffix(l.address.Address, ":0") {
				problem("%s and %s are both %s", from(l.name+"-listen"), from(other.name+"-listen"), l.address)
			}
		}
	}
	if slices.Contains(groups, Authz) && c.KeyQuery != "" && c.AuthzHTTPListen != (Address{}) {
		problem("%s and %s are given together: Envoy's HTTP ext_authz can neither send nor remove a key in the query", from("key-query"), from("authz-http-listen"))
	}
	for _, s := range []struct {
		group    Group
		variable string
	}{{Sealing, variableSealingKey}, {Client, variableToken}} {
		file := secrets[s.variable]
		if slices.Contains(groups, s.group) && c.secrets[s.variable] != "" && settingNamed(file).get(c) != "" {
			problem("%s and %s are given together: choose one", s.variable, from(file))
		}
	}
	if slices.Contains(groups, Client) {
		if c.ServerCACert != "" && c.Server != "" && !strings.HasPrefix(c.Server, "https://") {
			problem("%s is for TLS, which %s does not use", from("server-cacert"), c.Server)
		}
		if plaintextServer(c.Server) && !c.Insecure {
			problem("%s: %s would send the token in plaintext: give https://, or ask for plaintext with --insecure", from("server"), c.Server)
		}
	}
	return problems
}

// given names a setting by the place where it was given.
func (c *Config) given(flag string) string {
	switch src := c.sources[flag]; src.Kind {
	case FromFile:
		return fmt.Sprintf("%s: %s", src, settingNamed(flag).field())
	case FromEnvironment:
		return src.Name
	}
	return "--" + flag
}

func settingNamed(flag string) setting {
	for _, s := range settings {
		if s.name == flag {
			return s
		}
	}
	panic("no setting " + flag)
}

// CheckFiles opens the files that settings of the command's groups name, as a
// server would at its start: certificates fit their keys, CA files hold a
// certificate, and files of secrets are private. The error joins all that is
// wrong.
func (c *Config) CheckFiles() error {
	var problems []error
	check := func(flag string, err error) {
		if err != nil && (c.groups == nil || slices.Contains(c.groups, settingNamed(flag).group)) {
			problems = append(problems, fmt.Errorf("%s: %w", c.given(flag), err))
		}
	}
	for _, p := range []struct{ flag, cert, key string }{
		{"etcd-cert", c.EtcdCert, c.EtcdKey},
		{"authz-tls-cert", c.AuthzTLSCert, c.AuthzTLSKey},
		{"management-tls-cert", c.ManagementTLSCert, c.ManagementTLSKey},
	} {
		if p.cert != "" {
			_, err := tls.LoadX509KeyPair(p.cert, p.key)
			check(p.flag, err)
		}
	}
	for _, p := range []struct{ flag, file string }{
		{"etcd-cacert", c.EtcdCACert},
		{"authz-client-ca", c.AuthzClientCA},
		{"server-cacert", c.ServerCACert},
	} {
		if p.file != "" {
			pem, err := os.ReadFile(p.file)
			if err == nil && !x509.NewCertPool().AppendCertsFromPEM(pem) {
				err = fmt.Errorf("%s holds no PEM certificate", p.file)
			}
			check(p.flag, err)
		}
	}
	_, err := c.EtcdPassword()
	check("etcd-password-file", err)
	if c.SealingKeyFile != "" {
		_, err := readPrivate(c.SealingKeyFile, maxSealingKeys)
		check("sealing-key-file", err)
	}
	if c.TokenFile != "" {
		_, err := c.Token()
		check("token-file", err)
	}
	return errors.Join(problems...)
}

// Bounds of the files that hold secrets, in bytes.
const (
	maxPassword    = 4096
	maxSealingKeys = 256 << 10
)

// EtcdPassword reads the password file; without one it returns "". One newline
// at its end is not part of the password. A file that the group or others may
// read is refused. The caller keeps the password out of logs.
func (c *Config) EtcdPassword() (string, error) {
	if c.EtcdPasswordFile == "" {
		return "", nil
	}
	return readLine(c.EtcdPasswordFile)
}

// Token returns the management token: that of KEYGATE_TOKEN, else what
// TokenFile holds; "" if neither is given. One newline at its end is not part of
// it, and a token that holds a control character is refused. A file that the group or others may
// read is refused. The caller keeps the token out of logs.
func (c *Config) Token() (string, error) {
	if token := c.secrets[variableToken]; token != "" || c.TokenFile == "" {
		return checkToken(variableToken, withoutNewline(token))
	}
	return readToken(c.TokenFile)
}

// readToken reads a private file that holds a token.
func readToken(name string) (string, error) {
	token, err := readLine(name)
	if err != nil {
		return "", err
	}
	return checkToken(name, token)
}

// checkToken returns the token that where holds, if a header can hold it too.
func checkToken(where, token string) (string, error) {
	if strings.ContainsFunc(token, unicode.IsControl) {
		return "", fmt.Errorf("%s holds a line break or another control character, want a token as it was printed", where)
	}
	return token, nil
}

// withoutNewline drops one newline at the end.
func withoutNewline(s string) string {
	return strings.TrimSuffix(strings.TrimSuffix(s, "\n"), "\r")
}

// AdminTokenPath is the file of the token that the server writes at its first
// start with the embedded etcd; "" with another etcd.
func (c *Config) AdminTokenPath() string {
	if !c.Embedded() {
		return ""
	}
	return filepath.Join(c.DataDir, "admin-token")
}

// AdminToken reads the token in AdminTokenPath, under the rules of Token. The
// error wraps fs.ErrNotExist if there is none.
func (c *Config) AdminToken() (string, error) {
	if c.AdminTokenPath() == "" {
		return "", fs.ErrNotExist
	}
	return readToken(c.AdminTokenPath())
}

// AuditSpool is the folder where audit records wait that the embedded etcd has
// no space for; "" with another etcd, which has no folder here.
func (c *Config) AuditSpool() string {
	if !c.Embedded() {
		return ""
	}
	return filepath.Join(c.DataDir, "audit-spool")
}

// SealingKeyPath is the file of the sealing keys; "" for none. own: nobody has
// named it, it is the embedded etcd's, and it is made when it is not there.
func (c *Config) SealingKeyPath() (path string, own bool) {
	switch {
	case c.secrets[variableSealingKey] != "":
		return "", false
	case c.SealingKeyFile != "":
		return c.SealingKeyFile, false
	case c.Embedded():
		return filepath.Join(c.DataDir, "sealing-key"), true
	}
	return "", false
}

// SealingKeys returns the text of the sealing keys: that of KEYGATE_SEALING_KEY,
// else what the file SealingKeyPath holds; nil if there is neither. A file that
// the group or others may read is refused. The error wraps fs.ErrNotExist if
// the file is not there. The caller keeps the text out of logs.
func (c *Config) SealingKeys() ([]byte, error) {
	if text := c.secrets[variableSealingKey]; text != "" {
		return []byte(text), nil
	}
	path, _ := c.SealingKeyPath()
	if path == "" {
		return nil, nil
	}
	return readPrivate(path, maxSealingKeys)
}

// readPrivate reads a file that only its owner may use, of at most limit bytes.
func readPrivate(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if mode := info.Mode(); mode.Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %#o: others than its owner may use it; chmod 600", name, mode.Perm())
	}
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	switch {
	case len(text) == 0:
		return nil, fmt.Errorf("%s is empty", name)
	case int64(len(text)) > limit:
		return nil, fmt.Errorf("%s is longer than a secret, at most %d bytes", name, limit)
	}
	return text, nil
}

// readLine reads a private file that holds one line.
func readLine(name string) (string, error) {
	text, err := readPrivate(name, maxPassword)
	if err != nil {
		return "", err
	}
	line := withoutNewline(string(text))
	switch {
	case len(line) == 0:
		return "", fmt.Errorf("%s is empty", name)
	case strings.ContainsAny(line, "\n\r\x00"):
		return "", fmt.Errorf("%s holds more than one line", name)
	}
	return line, nil
}
