package management_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"keygate/management"
)

// The document and the table of routes are about the same.
func TestDocumentHasEveryRoute(t *testing.T) {
	doc := theDocument(t)
	documented := map[string]bool{}
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			documented[method+" "+strings.TrimPrefix(path, "/")] = true
		}
	}
	for _, r := range management.Routes() {
		name := r.Method + " " + r.Pattern
		if !documented[name] && !documentedTwice[name] {
			t.Errorf("%s: not in openapi.yaml", name)
		}
		documentedTwice[name] = true
		delete(documented, name)
	}
	for name := range documented {
		t.Errorf("%s: in openapi.yaml, and no route", name)
	}
}

// documentedTwice are calls whose two rows are one operation.
var documentedTwice = map[string]bool{}

func TestDocumentIsServed(t *testing.T) {
	a := newAPI(t, nil)
	yaml, err := os.ReadFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if r := a.want(200, "GET", "/openapi.yaml", nil, nobody); !bytes.Equal(r.body, yaml) {
		t.Error("/openapi.yaml is not the file")
	}
	var doc struct{ OpenAPI string }
	r := a.want(200, "GET", "/openapi.json", nil, nobody)
	if r.into(t, &doc); doc.OpenAPI != "3.1.0" || !json.Valid(r.body) {
		t.Errorf("/openapi.json: got version %q, want 3.1.0", doc.OpenAPI)
	}
	page := a.want(200, "GET", "/docs", nil, nobody)
	html := string(page.body)
	for _, item := range theDocument(t).Paths.Map() {
		for _, op := range item.Operations() {
			if !strings.Contains(html, `id="`+op.OperationID+`"`) {
				t.Errorf("/docs lacks %s", op.OperationID)
			}
		}
	}
	for name := range theDocument(t).Components.Schemas {
		if !strings.Contains(html, `id="object-`+name+`"`) {
			t.Errorf("/docs lacks the object %s", name)
		}
	}
	for _, link := range regexp.MustCompile(`(?:href|src)="([^"]*)"`).FindAllStringSubmatch(html, -1) {
		if target, local := strings.CutPrefix(link[1], "#"); local && !strings.Contains(html, `id="`+target+`"`) {
			t.Errorf("/docs links to #%s, which is not there", target)
		} else if !local && !strings.HasPrefix(link[1], "/openapi.") {
			t.Errorf("/docs refers to %s", link[1])
		}
	}
	if strings.Contains(html, "<script") || strings.Contains(html, " style=") || strings.Contains(html, "url(") {
		t.Error("/docs has a script, an inline style or fetches something")
	}
	style := regexp.MustCompile(`(?s)<style>(.*)</style>`).FindStringSubmatch(html)
	sum := sha256.Sum256([]byte(style[1]))
	policy := page.Header.Get("Content-Security-Policy")
	if !strings.Contains(policy, "default-src 'none'") || !strings.Contains(policy, "'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'") {
		t.Errorf("the policy %q does not allow the page's style alone", policy)
	}
	for _, want := range []string{"frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} {
		if !strings.Contains(policy, want) || strings.Contains(policy, "unsafe") {
			t.Errorf("the policy %q lacks %s, or allows what is unsafe", policy, want)
		}
	}
	for _, path := range []string{"/", "/docs/", "/openapi", "/metrics", "/debug/pprof/", "/v1/organizations", "/v1/organizations/"} {
		if r := a.do("GET", path, nil, nobody); r.StatusCode != 404 && r.StatusCode != 401 {
			t.Errorf("GET %s without a token: got %d, want 404 or 401", path, r.StatusCode)
		}
	}
}
