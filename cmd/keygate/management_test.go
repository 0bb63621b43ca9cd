package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"keygate/client"
	"keygate/config"
)

// fakeAPI answers the paths below the organization; "" stands for all others.
func fakeAPI(t *testing.T, answers map[string]string) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, ok := answers[r.Method+" "+strings.TrimPrefix(r.URL.Path, "/v1/organizations/default/")]
		if !ok {
			answer = answers[""]
		}
		status, body, _ := strings.Cut(answer, " ")
		var code int
		if _, err := fmt.Sscan(status, &code); err != nil {
			t.Errorf("%s %s: no answer", r.Method, r.URL.Path)
			code = http.StatusTeapot
		}
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

// runWith is run with variables of the environment.
func runWith(environ []string, args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs, environ: environ}
	code = a.main(args)
	return out.String(), errs.String(), code
}

// What the API answers decides the exit code; what it refuses is said in its
// words.
func TestAPIExitCodes(t *testing.T) {
	const body = `{"error":{"code":0,"message":"it is so","details":[]}}`
	for answer, want := range map[string]int{
		"200 {}": exitOK, "400 " + body: exitUsage, "401 " + body: exitAuth, "403 " + body: exitAuth, "404 " + body: exitNotFound,
		"409 " + body: exitConflict, "412 " + body: exitConflict, "422 " + body: exitConflict, "429 " + body: exitUnreachable,
		"500 " + body: exitFailed, "502 <html>": exitUnreachable, "503 " + body: exitUnreachable, "200 <html>": exitFailed,
	} {
		stdout, stderr, code := runWith([]string{"KEYGATE_TOKEN=canary"}, "get", "product", "p", "-o", "json", "--server", fakeAPI(t, map[string]string{"": answer}))
		if code != want {
			t.Errorf("%s: got status %d, want %d: %s", answer, code, want, stderr)
		}
		if strings.Contains(answer, "it is so") && stderr != "keygate: it is so\n" {
			t.Errorf("%s: got %q, want its words", answer, stderr)
		}
		if strings.Contains(stdout+stderr, "canary") {
			t.Errorf("%s: the token in %s%s", answer, stdout, stderr)
		}
	}
}

// What a server says of a change of statuses is told as of one in the store.
func TestStatusesByAPI(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	const notFound = `404 {"error":{"code":404,"message":"not in organization","details":[{"violations":[{"type":"keygate.not_found"}]}]}}`
	for _, tt := range []struct {
		name   string
		args   string
		answer string
		code   int
		stdout []string
		stderr string
	}{
		{"plain", "revoke app a", `200 {"revision":7,"unregisteredBy":"2026-01-02T03:04:05Z","flags":[{"target":{"app":"a"},"before":"approved","changed":true}]}`, exitOK,
			[]string{"revoked at revision 7\nevery replica refuses by 2026-01-02T03:04:05Z at the latest, as a rule in milliseconds; --wait tells when\nundo: keygate approve app a --server http://127.0.0.1:"}, ""},
		{"settings in the undo", "revoke app a --insecure --org default", `200 {"revision":7,"flags":[{"target":{"app":"a"},"before":"approved","changed":true}]}`, exitOK,
			[]string{"undo: keygate approve app a --org default --server ", " --insecure=true\n"}, ""},
		{"fenced", "revoke app a --wait", `200 {"revision":7,"flags":[{"target":{"app":"a"},"before":"approved","changed":true}],
			"receipt":{"revision":7,"replicas":{"total":3,"applied":1,"fenced":2},"slowestMs":4,"notAnswered":[{"id":"R1","host":"h","pid":5},{"id":"R2","host":"h","pid":6,"vanished":true}]}}`, exitOK,
			[]string{"revoked at revision 7; applied on 1/3 replicas, slowest 4 ms; 2 did not answer: by now each has applied it, or refuses\n",
				"no answer: h pid 5 (R1)\nno answer: h pid 6 (R2); its registration is gone: it has ended, or lost etcd\n"}, ""},
		{"no receipt", "revoke app a --wait", `200 {"revision":7,"flags":[{"target":{"app":"a"},"before":"approved","changed":true}],"noReceipt":true}`, exitOK,
			[]string{"revoked at revision 7; no receipt, for the replicas were not asked: repeat it\n"}, ""},
		{"answer lost the first time", "revoke app a", `200 {"revision":7,"flags":[],"replayed":true}`, exitOK,
			[]string{"already revoked, at revision 7\nevery replica refuses by 20"}, ""},
		{"some are not there", "revoke key " + id + " --product p --product q --yes",
			`200 {"revision":7,"flags":[{"target":{"key":"` + id + `","product":"p"},"before":"approved","changed":true}],"notFound":[{"key":"` + id + `","product":"q"}]}`, exitNotFound,
			[]string{"revoked 1 of 2 at revision 7\n", "undo: keygate approve key " + id + " --product p --server "}, "keygate: revoke: not in organization \"default\": product \"q\" on key " + id + "\n"},
		{"half done", "revoke key " + id + " --product p --product q --yes",
			`200 {"revision":7,"flags":[{"target":{"key":"` + id + `","product":"p"},"before":"approved","changed":true}],"partial":"the store went away"}`, exitFailed,
			[]string{"revoked 1 of 2 at revision 7\n"}, "keygate: revoke: 1 of 2 done, and repeating it is safe: the store went away\n"},
		{"not there", "approve key " + id, notFound, exitNotFound, nil, "keygate: approve: not in organization \"default\": key " + id + "\n"},
		{"conflict", "revoke app a", `409 {"error":{"message":"others kept changing it"}}`, exitConflict, nil, "keygate: others kept changing it\n"},
		{"dry run", "revoke app a --dry-run -o json", `200 {"dryRun":true,"revision":7,"flags":[{"target":{"app":"a"},"before":"approved","changed":true}],"stops":[{"key":"k","appId":"a","product":"p"}]}`, exitOK,
			[]string{`"dryRun": true,`, `"changed": 1,`, `"product": "p"`}, ""},
	} {
		stdout, stderr, code := runWith([]string{"KEYGATE_TOKEN=canary"}, append(strings.Fields(tt.args), "--server", fakeAPI(t, map[string]string{
			"POST statuses":        tt.answer,
			"POST statuses:select": `200 {"keys":[{"key":"` + id + `","there":true,"appId":"a","status":"approved","products":[{"apiproduct":"p","status":"approved"},{"apiproduct":"q","status":"approved"}]}]}`,
		}))...)
		if code != tt.code {
			t.Errorf("%s: got status %d, want %d", tt.name, code, tt.code)
		}
		for _, part := range tt.stdout {
			if !strings.Contains(stdout, part) {
				t.Errorf("%s: no %q in:\n%s", tt.name, part, stdout)
			}
		}
		if tt.stdout == nil && stdout != "" || !strings.HasSuffix(stderr, tt.stderr) || tt.stderr == "" && stderr != "" {
			t.Errorf("%s: got %q and %q, want %q", tt.name, stdout, stderr, tt.stderr)
		}
		if strings.Contains(stdout+stderr, "canary") {
			t.Errorf("%s: the token in %s%s", tt.name, stdout, stderr)
		}
	}
}

// Ctrl-C while the server waits for the fleet says what is known.
func TestInterruptedWaitByAPI(t *testing.T) {
	asked := make(chan struct{}, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // so that the end of the connection is seen
		asked <- struct{}{}
		<-r.Context().Done()
	}))
	defer srv.Close()
	var stderr bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "keygate", "revoke", "app", "a", "--wait", "--server", srv.URL)
	cmd.Env, cmd.Stderr = append(environ(), "KEYGATE_TOKEN=canary"), &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-asked:
	case <-ctx.Done():
		t.Fatal("it asks nobody")
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != exitInterrupted || stderr.String() != "keygate: interrupted: the revocation was sent, and may stand; the same again tells\n" {
		t.Errorf("got status %d: %s", got, &stderr)
	}
}

// Whoever reads the output has gone: the command ends by that, and prints no
// more.
func TestClosedPipe(t *testing.T) {
	server := fakeAPI(t, map[string]string{"": `200 {"app":[{"appId":"a","name":"n"}],"records":[{"id":"r"}]}`})
	for _, args := range []string{"get apps", "get apps -o json", "get apps -o name", "audit export"} {
		reader, writer, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := reader.Close(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var stderr bytes.Buffer
		cmd := exec.CommandContext(ctx, "keygate", append(strings.Fields(args), "--server", server)...)
		cmd.Env, cmd.Stdout, cmd.Stderr = append(environ(), "KEYGATE_TOKEN=canary"), writer, &stderr
		err = cmd.Run()
		_ = writer.Close()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGPIPE || stderr.Len() > 0 {
			t.Errorf("%s: got %v and %q, want an end by %v", args, err, &stderr, syscall.SIGPIPE)
		}
	}
}

// selfSigned writes a certificate for a name, and its key.
func selfSigned(t *testing.T, name string) (certFile, keyFile string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// Which of a server, the machine's own keygate and the store a command line
// means, and whose token goes where.
func TestPlaces(t *testing.T) {
	var got string // the token that was sent
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r.Header.Get("Authorization")
		_, _ = io.WriteString(w, `{"name":"p"}`)
	})
	plain := httptest.NewServer(handler)
	defer plain.Close()
	certFile, keyFile := selfSigned(t, "keygate.example")
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	secure := httptest.NewUnstartedServer(handler)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that do not trust it
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	secure.StartTLS()
	defer secure.Close()

	root, err := os.MkdirTemp("/tmp", "kg") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(root)
	token := filepath.Join(root, "token")
	dirs := map[string]string{}
	for _, name := range []string{"served", "notoken", "idle"} {
		dir := filepath.Join(root, name)
		dirs[name] = dir
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if name != "notoken" {
			if err := os.WriteFile(filepath.Join(dir, "admin-token"), []byte("own\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if name != "idle" { // whoever listens there stands for an etcd
			l, err := net.Listen("unix", filepath.Join(dir, "etcd.sock"))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
	}
	if err := os.WriteFile(token, []byte("named\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	plainAt, secureAt := strings.TrimPrefix(plain.URL, "http://"), strings.TrimPrefix(secure.URL, "https://")
	isStore := "the store"
	for _, tt := range []struct {
		name, args, env string
		token, problem  string // what was sent, or what is wrong
	}{
		{"server", "--server " + plain.URL + " --token-file " + token, "", "Bearer named", ""},
		{"server by environment", "", "KEYGATE_SERVER=" + plain.URL + " KEYGATE_TOKEN=env", "Bearer env", ""},
		{"server without a token", "--server " + plain.URL, "", "", "no management token"},
		{"own", "", "KEYGATE_DATA_DIR=" + dirs["served"] + " KEYGATE_MANAGEMENT_LISTEN=" + plainAt, "Bearer own", ""},
		{"own by its URL", "--server " + plain.URL, "KEYGATE_DATA_DIR=" + dirs["served"] + " KEYGATE_MANAGEMENT_LISTEN=" + plainAt, "Bearer own", ""},
		{"own token not for another", "--server " + plain.URL, "KEYGATE_DATA_DIR=" + dirs["served"] + " KEYGATE_MANAGEMENT_LISTEN=" + secureAt, "", "no management token"},
		{"own with TLS", "", "KEYGATE_DATA_DIR=" + dirs["served"] + " KEYGATE_MANAGEMENT_LISTEN=" + secureAt +
			" KEYGATE_MANAGEMENT_TLS_CERT=" + certFile + " KEYGATE_MANAGEMENT_TLS_KEY=" + keyFile, "Bearer own", ""},
		{"TLS by an unknown CA", "--server " + secure.URL + " --token-file " + token, "", "", "certificate"},
		{"own etcd is not running", "", "KEYGATE_DATA_DIR=" + dirs["idle"] + " KEYGATE_MANAGEMENT_LISTEN=" + plainAt, "", isStore},
		{"own without a token", "", "KEYGATE_DATA_DIR=" + dirs["notoken"] + " KEYGATE_MANAGEMENT_LISTEN=" + plainAt, "", isStore},
		{"own is off", "", "KEYGATE_DATA_DIR=" + dirs["served"] + " KEYGATE_MANAGEMENT_LISTEN=off", "", isStore},
		{"store by flag", "--data-dir " + dirs["served"], "KEYGATE_SERVER=" + plain.URL + " KEYGATE_TOKEN=env KEYGATE_MANAGEMENT_LISTEN=" + plainAt, "", isStore},
		{"cluster by flag", "--etcd-endpoints http://127.0.0.1:1", "KEYGATE_SERVER=" + plain.URL + " KEYGATE_TOKEN=env", "", isStore},
		{"both by flags", "--server " + plain.URL + " --data-dir " + dirs["served"], "", "", "choose one"},
	} {
		got = ""
		cmd := &cobra.Command{Use: "get"}
		loaded := false
		a := &app{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard, environ: strings.Fields(tt.env)}
		err := func() error {
			flags := config.Register(cmd.Flags(), managed()...)
			if err := cmd.ParseFlags(strings.Fields(tt.args)); err != nil {
				return err
			}
			cfg, err := a.loadFor(flags)
			if err != nil {
				return err
			}
			loaded = true
			at, err := findPlace(t.Context(), cmd, cfg)
			if err != nil {
				return err
			}
			if at.server == "" {
				return errors.New(isStore)
			}
			c, err := at.client(cfg, false)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Product(t.Context(), "p")
			return err
		}()
		switch {
		case tt.problem == "" && (err != nil || got != tt.token):
			t.Errorf("%s: got %q, %v, want %q", tt.name, got, err, tt.token)
		case tt.problem != "" && (err == nil || !strings.Contains(err.Error(), tt.problem) || got != ""):
			t.Errorf("%s: got %q, %v, want %q", tt.name, got, err, tt.problem)
		case !loaded:
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// What may be a consumer key is not repeated, and what is none is.
func TestRefusalsHideArguments(t *testing.T) {
	refusal := &client.Error{Status: 404, Message: "App named giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb does not exist under ann@example.com"}
	got := apiError(fmt.Errorf("get: %w", refusal), "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb", "ann@example.com")
	if text := got.Error(); strings.Contains(text, "giIC9") || !strings.Contains(text, "App named giIC… does not exist under ann@example.com") ||
		!strings.Contains(text, "give - and the key on standard input") || exitCode(got) != exitNotFound {
		t.Errorf("got %v, status %d", got, exitCode(got))
	}
	if got := apiError(refusal, "MyApp", "ann@example.com"); got.Error() != refusal.Message {
		t.Errorf("got %v, want the message as it is", got)
	}
	if got := apiError(io.EOF, "MyApp"); got != io.EOF {
		t.Errorf("got %v, want %v", got, io.EOF)
	}
}
