package google_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"testing"
)

// The page's three calls, as it writes them for curl: by product, by key, by
// app, with an octet stream of nothing. A token stands for Google's, and for
// Edge's password.
func TestPage(t *testing.T) {
	t.Parallel()
	k := start(t)
	const base = "/v1/organizations/acme/developers/ann@example.com"
	k.post(t, "/v1/organizations/acme/apiproducts", `{"name":"Weather-Product","displayName":"Weather","approvalType":"auto"}`)
	k.post(t, "/v1/organizations/acme/developers", `{"email":"ann@example.com","firstName":"Ann","lastName":"Lee","userName":"ann"}`)
	k.post(t, base+"/apps", `{"name":"AnotherTestApp"}`)
	k.post(t, base+"/apps/AnotherTestApp/keys/create", `{"consumerKey":"`+ownKey+`","consumerSecret":"`+ownSecret+`"}`)
	k.post(t, base+"/apps/AnotherTestApp/keys/"+ownKey, `{"apiProducts":["Weather-Product"]}`)
	flags := func() (product, key, app string) {
		t.Helper()
		got := curl(t, "-H", "Authorization: Bearer "+k.token, k.url+base+"/apps/AnotherTestApp")
		var a struct {
			Status      string
			Credentials []struct {
				ConsumerKey, Status string
				APIProducts         []struct{ Status string }
			}
		}
		if err := json.Unmarshal([]byte(got.body), &a); err != nil {
			t.Fatalf("read the app: %v: %s", err, got.body)
		}
		for _, c := range a.Credentials {
			if c.ConsumerKey == ownKey && len(c.APIProducts) == 1 {
				return c.APIProducts[0].Status, c.Status, a.Status
			}
		}
		t.Fatalf("the app has no key with a product: %s", got.body)
		return
	}
	for _, one := range []struct {
		path               string
		product, key, app_ string
	}{
		{"/apps/AnotherTestApp/keys/" + ownKey + "/apiproducts/Weather-Product", "revoked", "approved", "approved"},
		{"/apps/AnotherTestApp/keys/" + ownKey, "approved", "revoked", "approved"},
		{"/apps/AnotherTestApp", "approved", "approved", "revoked"},
	} {
		for _, mount := range []string{"/v1/organizations/acme", "/v1/o/acme", "/edge/v1/organizations/acme"} {
			for _, who := range [][]string{{"-H", "Authorization: Bearer " + k.token}, {"-u", "ann@example.com:" + k.token}} {
				call := func(action string) {
					t.Helper()
					got := curl(t, append(who, "-X", "POST", "-H", "Content-Type: application/octet-stream",
						k.url+mount+"/developers/ann@example.com"+one.path+"?action="+action)...)
					if got.status != "204" || got.body != "" {
						t.Errorf("%s of %s%s: got %s %s, want 204 and no body", action, mount, one.path, got.status, got.body)
					}
				}
				call("revoke")
				if p, key, app := flags(); p != one.product || key != one.key || app != one.app_ {
					t.Errorf("%s%s revoked: got %s %s %s, want %s %s %s", mount, one.path, p, key, app, one.product, one.key, one.app_)
				}
				call("approve")
				if p, key, app := flags(); p != "approved" || key != "approved" || app != "approved" {
					t.Errorf("%s%s approved: got %s %s %s, want all of them approved", mount, one.path, p, key, app)
				}
			}
		}
	}
	if got := curl(t, "-X", "POST", "-H", "Content-Type: application/octet-stream", k.url+base+"/apps/AnotherTestApp?action=revoke"); got.status != "401" {
		t.Errorf("without a token: got %s, want 401", got.status)
	}
}

// post makes something.
func (k *keygate) post(t *testing.T, path, body string) {
	t.Helper()
	resp, err := k.client().Post(k.url+path, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode > 299 {
		t.Fatalf("post %s: %s %v: %s", path, resp.Status, err, answer)
	}
}

type answer struct{ status, body string }

// curl runs curl or, on a machine without it, does what its arguments say: -X,
// -H, -u and the URL last.
func curl(t *testing.T, args ...string) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if path, err := exec.LookPath("curl"); err == nil {
		const mark = "\nstatus "
		cmd := exec.CommandContext(ctx, path, append([]string{"-q", "-sS", "--noproxy", "*", "-w", mark + "%{http_code}"}, args...)...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("curl: %v: %s", err, stderr.String())
		}
		body, status, _ := strings.Cut(string(out), mark)
		return answer{status, body}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, args[len(args)-1], http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(args)-1; i += 2 {
		switch value := args[i+1]; args[i] {
		case "-X":
			req.Method = value
		case "-H":
			name, v, _ := strings.Cut(value, ": ")
			req.Header.Set(name, v)
		case "-u":
			user, password, _ := strings.Cut(value, ":")
			req.SetBasicAuth(user, password)
		default:
			t.Fatalf("no curl, and nothing stands in for its %s", args[i])
		}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	status, _, _ := strings.Cut(resp.Status, " ")
	return answer{status, string(body)}
}
