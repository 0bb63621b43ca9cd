package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
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
	if slices.Contains(groups, Authz) {
		pair("authz-tls-cert", "authz-tls-key", c.AuthzTLSCert, c.AuthzTLSKey)
		isTLS := c.AuthzTLSCert != "" && c.AuthzTLSKey != ""
		if c.AuthzClientCA != "" && c.AuthzTLSCert == "" {
			problem("%s is given without --authz-tls-cert and --authz-tls-key", from("authz-client-ca"))
		}
		if c.AuthzInsecure && isTLS {
			problem("%s and %s are given together: plaintext or TLS, choose one", from("authz-insecure"), from("authz-tls-cert"))
		}
		if !c.AuthzListen.Local() && !isTLS && !c.AuthzInsecure {
			problem("%s: %s is not a loopback address: give --authz-tls-cert and --authz-tls-key (best with --authz-client-ca), listen on a unix socket, or ask for plaintext with --authz-insecure", from("authz-listen"), c.AuthzListen)
		}
		if c.AuthzListen == c.HealthListen && !strings.HasSuffix(c.AuthzListen.Address, ":0") && slices.Contains(groups, Health) {
			problem("%s and %s are both %s", from("authz-listen"), from("health-listen"), c.AuthzListen)
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

// CheckFiles opens the files that settings name, as a server would at its
// start: certificates fit their keys, CA files hold a certificate, and the
// password file is private. The error joins all that is wrong.
func (c *Config) CheckFiles() error {
	var problems []error
	check := func(flag string, err error) {
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", c.given(flag), err))
		}
	}
	for _, p := range []struct{ flag, cert, key string }{
		{"etcd-cert", c.EtcdCert, c.EtcdKey},
		{"authz-tls-cert", c.AuthzTLSCert, c.AuthzTLSKey},
	} {
		if p.cert != "" {
			_, err := tls.LoadX509KeyPair(p.cert, p.key)
			check(p.flag, err)
		}
	}
	for _, p := range []struct{ flag, file string }{
		{"etcd-cacert", c.EtcdCACert},
		{"authz-client-ca", c.AuthzClientCA},
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
	return errors.Join(problems...)
}

// maxPassword bounds the password file, in bytes.
const maxPassword = 4096

// EtcdPassword reads the password file; without one it returns "". One newline
// at its end is not part of the password. A file that the group or others may
// read is refused. The caller keeps the password out of logs.
func (c *Config) EtcdPassword() (string, error) {
	if c.EtcdPasswordFile == "" {
		return "", nil
	}
	f, err := os.Open(c.EtcdPasswordFile)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if mode := info.Mode(); mode.Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s has mode %#o: others than its owner may use it; chmod 600", c.EtcdPasswordFile, mode.Perm())
	}
	password, err := io.ReadAll(io.LimitReader(f, maxPassword+1))
	if err != nil {
		return "", err
	}
	password = bytes.TrimSuffix(bytes.TrimSuffix(password, []byte("\n")), []byte("\r"))
	switch {
	case len(password) == 0:
		return "", fmt.Errorf("%s is empty", c.EtcdPasswordFile)
	case len(password) > maxPassword:
		return "", fmt.Errorf("%s is longer than a password, at most %d bytes", c.EtcdPasswordFile, maxPassword)
	case bytes.ContainsAny(password, "\n\r\x00"):
		return "", fmt.Errorf("%s holds more than one line", c.EtcdPasswordFile)
	}
	return string(password), nil
}
