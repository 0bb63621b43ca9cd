package etcdtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// ClientName is the common name of the client certificates; etcd takes it as a
// user's name.
const ClientName = "replica"

// CertificateFiles are paths of PEM files, removed when the test ends.
type CertificateFiles struct {
	CA                         string // of the server's and the client's certificate
	ServerCert, ServerKey      string // for 127.0.0.1, ::1 and localhost
	ClientCert, ClientKey      string
	ExpiredCert                string // a client's, by CA, ended yesterday
	ExpiredKey                 string
	ForeignCA                  string // signed nothing but the foreign certificate
	ForeignCert                string // a client's
	ForeignKey                 string
	ServerConfig, ClientConfig *tls.Config // what the files say: client certificates required, and presented
	// NewClient makes another certificate of the client, by CA, that ends then.
	NewClient func(end time.Time) (cert, key string)
}

// Certificates makes a set of its own for each test.
func Certificates(t testing.TB) CertificateFiles {
	t.Helper()
	m := maker{t: t, dir: t.TempDir()}
	ca, foreign := m.ca("ca"), m.ca("foreign-ca")
	now := time.Now()
	var f CertificateFiles
	f.CA, f.ForeignCA = m.path("ca.crt"), m.path("foreign-ca.crt")
	f.ServerCert, f.ServerKey = m.leaf("server", ca, &x509.Certificate{
		Subject:     pkix.Name{CommonName: "server"},
		NotAfter:    now.Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		DNSNames:    []string{"localhost"},
	})
	client := func(name string, ca issuer, end time.Time) (cert, key string) {
		return m.leaf(name, ca, &x509.Certificate{
			Subject:     pkix.Name{CommonName: ClientName},
			NotAfter:    end,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
	}
	f.ClientCert, f.ClientKey = client("client", ca, now.Add(time.Hour))
	f.ExpiredCert, f.ExpiredKey = client("expired", ca, now.Add(-24*time.Hour))
	made := 0
	f.NewClient = func(end time.Time) (cert, key string) {
		made++
		return client(fmt.Sprintf("client-%d", made), ca, end)
	}
	f.ForeignCert, f.ForeignKey = client("foreign", foreign, now.Add(time.Hour))

	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	f.ServerConfig = &tls.Config{
		Certificates: []tls.Certificate{m.pair(f.ServerCert, f.ServerKey)},
		ClientCAs:    pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}
	f.ClientConfig = &tls.Config{
		Certificates: []tls.Certificate{m.pair(f.ClientCert, f.ClientKey)},
		RootCAs:      pool,
	}
	return f
}

type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

type maker struct {
	t   testing.TB
	dir string
}

func (m maker) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatalf("make certificates: %v", err)
	}
}

func (m maker) path(name string) string { return filepath.Join(m.dir, name) }

func (m maker) ca(name string) issuer {
	m.t.Helper()
	cert := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	key := m.sign(name, cert, issuer{})
	return issuer{m.read(name), key}
}

func (m maker) leaf(name string, ca issuer, cert *x509.Certificate) (certFile, keyFile string) {
	m.t.Helper()
	cert.KeyUsage = x509.KeyUsageDigitalSignature
	m.sign(name, cert, ca)
	return m.path(name + ".crt"), m.path(name + ".key")
}

// sign completes and writes a certificate; the zero issuer signs by itself.
func (m maker) sign(name string, cert *x509.Certificate, by issuer) *ecdsa.PrivateKey {
	m.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	m.must(err)
	cert.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	m.must(err)
	cert.NotBefore = cert.NotAfter.Add(-48 * time.Hour)
	if by.cert == nil {
		by = issuer{cert, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, by.cert, &key.PublicKey, by.key)
	m.must(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	m.must(err)
	m.must(os.WriteFile(m.path(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	m.must(os.WriteFile(m.path(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	return key
}

func (m maker) read(name string) *x509.Certificate {
	m.t.Helper()
	b, err := os.ReadFile(m.path(name + ".crt"))
	m.must(err)
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	m.must(err)
	return cert
}

func (m maker) pair(cert, key string) tls.Certificate {
	m.t.Helper()
	p, err := tls.LoadX509KeyPair(cert, key)
	m.must(err)
	return p
}
