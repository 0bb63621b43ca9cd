package management_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keygate/access"
	"keygate/apigee"
	"keygate/ledger"
)

func newLogger(a *api) *slog.Logger { return slog.New(slog.NewJSONHandler(a.logs, nil)) }

// A consumer key, a secret and tokens that are handed in, and made, on every way
// there is, are nowhere but in the answers that are to show them.
func TestCanary(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	x := mountX + "acme"
	const key, secret, tokenLike = "canaryKEYcanaryKEYcanaryKEY", "canarySECRETcanarySECRET", "kgm_canaryTOKEN"
	viewer := a.token(access.Viewer, acme)
	var errors bytes.Buffer // bodies of refusals
	send := func(method, path string, body any, opts ...option) {
		if r := a.do(method, path, body, opts...); r.StatusCode >= 400 {
			errors.Write(r.body)
		}
	}
	own := map[string]any{"consumerKey": key, "consumerSecret": secret}
	send("POST", w.app+"/keys", own, as(viewer))
	a.want(201, "POST", w.app+"/keys", own, header("Idempotency-Key", key+"-once"))
	a.want(201, "POST", w.app+"/keys", own, header("Idempotency-Key", key+"-once"))
	for _, k := range []string{key, w.key} {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE", "PATCH"} {
			send(method, w.app+"/keys/"+k+"?action=revok", nil, as(viewer))
			send(method, x+"/nowhere/"+k, nil)
			send(method, mountX+"other/keys/"+k, nil)
			send(method, w.app+"/keys/"+k+"/x", `{"`+k+`":"`+k+`"}`)
		}
		send("POST", w.app+"/keys/"+k, `{"apiProducts":["Weather-Product"],"apiProducts":"`+k+`"}`)
		send("POST", w.app+"/keys/"+k, `{"scopes":["`+k)
		send("POST", w.app+"/keys", map[string]any{"consumerKey": k, "consumerSecret": secret})
		send("POST", w.app+"/keys", map[string]any{"consumerKey": k + "!", "consumerSecret": secret})
		send("POST", w.app+"/keys/"+k+"?action=revoke&wait=fleet&reason=leaked", nil)
		send("POST", w.app+"/keys/"+k+"/apiproducts/Weather-Product?action=approve", nil)
		send("POST", w.app+"/keys/"+k+"?action=revoke&dryRun=true", nil)
		send("POST", x+"/keys:search", map[string]any{"consumerKey": k})
		send("POST", x+"/keys:search", map[string]any{k: k})
		send("POST", x+"/check", map[string]any{"consumerKey": k, "product": "Weather-Product"})
		send("POST", x+"/statuses", map[string]any{"action": "revoke", "targets": []any{map[string]any{"key": k}}})
		send("POST", x+"/statuses:select", map[string]any{"keys": []string{k}})
		send("GET", x+"/apps?filter="+url.QueryEscape("consumerKey="+k), nil)
		send("GET", x+"/apps?filter="+url.QueryEscape(k), nil)
		send("GET", x+"/apps?status="+k, nil)
		send("GET", x+"/apps?pageToken="+k, nil)
		send("GET", w.app, nil, as(k))
		send("GET", w.app, nil, as(k), func(r *http.Request) { r.Header.Set("X-Request-Id", "x "+k) })
		send("GET", w.app+"/keys/"+k, nil)
		send("GET", x+"/keys", nil)
		send("DELETE", w.app+"/keys/"+k, nil)
	}
	send("GET", w.app, nil, as(tokenLike))
	send("GET", w.app, nil, func(r *http.Request) { r.SetBasicAuth("x", tokenLike) })
	made := a.want(201, "POST", x+"/tokens", map[string]any{"name": "made", "role": "admin"}, header("Idempotency-Key", "token"))
	madeToken := strings.Trim(made.member("token"), `"`)
	a.want(201, "POST", x+"/tokens", map[string]any{"name": "made", "role": "admin"}, header("Idempotency-Key", "token"))
	a.want(200, "GET", w.app, nil, as(madeToken))
	records := a.want(200, "GET", x+"/audit?pageSize=1000", nil).body
	if !strings.Contains(string(records), "leaked") {
		t.Error("the audit trail lacks the revocation: the test looks in the wrong place")
	}
	for name, planted := range map[string]string{"the planted key": key, "the planted secret": secret, "the made key": w.key, "the made secret": w.secret,
		"the admin's token": a.admin, "the made token": madeToken, "a guessed token": tokenLike} {
		for where, text := range map[string]string{"the log": a.logs.String(), "an error": errors.String(), "the audit trail": string(records), "etcd": a.dump()} {
			for _, form := range []string{planted, base64.StdEncoding.EncodeToString([]byte(planted))[:len(planted)], url.QueryEscape(planted)} {
				if strings.Contains(text, form) {
					i := strings.Index(text, form)
					t.Errorf("%s stands in %s: …%s…", name, where, text[max(0, i-200):min(len(text), i+100)])
					break
				}
			}
		}
	}
	if !strings.Contains(a.logs.String(), `"route":"developers/{developer}/apps/{app}/keys/{key}"`) {
		t.Error("the access log does not name routes: the test looks in the wrong place")
	}
}

// The page's app, imported with a sealing key, comes back from the Edge mount as
// the page has it, to the byte.
func TestWeatherApp(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("testdata", "weather-app.json"))
	if err != nil {
		t.Fatal(err)
	}
	a := newAPI(t, nil)
	importer := ledger.NewImporter(ledger.ImporterConfig{KV: a.kv, Space: a.space, Organization: acme, Seal: a.seal})
	var refused []string
	err = importer.Import(t.Context(), apigee.NewReader(apigee.ReaderConfig{Name: "page"}, bytes.NewReader(page)), func(o ledger.Outcome) {
		for _, i := range o.Items {
			if i.Action == ledger.Refused {
				refused = append(refused, i.Reason)
			}
		}
	})
	if err != nil && err != io.EOF || len(refused) > 0 {
		t.Fatalf("import: %v, refused %q", err, refused)
	}
	var want bytes.Buffer
	if err := json.Compact(&want, page); err != nil {
		t.Fatal(err)
	}
	for _, mount := range []string{mountEdge, mountBase} {
		got := a.want(200, "GET", mount+"acme/developers/Z2S37rxX2Suzkwtg/apps/AnotherTestApp", nil)
		if string(got.body) != want.String() {
			t.Errorf("%s: got\n%s\nwant\n%s", mount, got.body, want.String())
		}
	}
	got := a.want(200, "GET", mountX+"acme/developers/Z2S37rxX2Suzkwtg/apps/AnotherTestApp", nil)
	if !strings.Contains(string(got.body), `"createdAt":"1415728893126"`) {
		t.Errorf("X: got %s", got.body)
	}
	// The page's three calls.
	base := mountEdge + "acme/developers/Z2S37rxX2Suzkwtg/apps/AnotherTestApp"
	for _, path := range []string{"/keys/giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb/apiproducts/Weather-Product", "/keys/giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb", ""} {
		a.want(204, "POST", base+path+"?action=revoke", nil, header("Content-Type", "application/octet-stream"))
		a.want(204, "POST", base+path+"?action=approve", nil, header("Content-Type", "application/octet-stream"))
	}
}
