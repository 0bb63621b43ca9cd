package google_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Methods below the resources that keygate has, which keygate has not, by the
// beginning of their ids: money is no business of its own.
var without = []string{
	"apigee.organizations.apiproducts.move", // between spaces, which are Google's
	"apigee.organizations.apiproducts.rateplans.",
	"apigee.organizations.developers.balance.",
	"apigee.organizations.developers.getBalance",
	"apigee.organizations.developers.getMonetizationConfig",
	"apigee.organizations.developers.subscriptions.",
	"apigee.organizations.developers.updateMonetizationConfig",
}

// resource of Google's discovery document.
type resource struct {
	Methods map[string]struct {
		ID, HTTPMethod, FlatPath string
	}
	Resources map[string]resource
}

// walk calls f for each method of the resource and of those below it.
func (r resource) walk(f func(id, method, path string)) {
	for _, m := range r.Methods {
		f(m.ID, m.HTTPMethod, m.FlatPath)
	}
	for _, below := range r.Resources {
		below.walk(f)
	}
}

// allDriven fails the test if the document that the client was made from has a
// method of developers, apps, keys, products or attributes that no request
// called with success.
func allDriven(t *testing.T, requests []string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "google.golang.org/api").Output()
	if err != nil {
		t.Fatalf("find the client's module: %v", err)
	}
	text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "apigee", "v1", "apigee-api.json"))
	if err != nil {
		t.Fatal(err)
	}
	var document struct{ Resources map[string]resource }
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatalf("read the discovery document: %v", err)
	}
	organizations := document.Resources["organizations"]
	all := resource{Resources: map[string]resource{}}
	for _, name := range []string{"developers", "apps", "apiproducts"} {
		all.Resources[name] = organizations.Resources[name]
	}
	n := 0
	check := func(id, method, path string) {
		if slices.ContainsFunc(without, func(prefix string) bool { return strings.HasPrefix(id, prefix) }) {
			return
		}
		n++
		parts := strings.Split(path, "/")
		for i, p := range parts {
			if strings.HasPrefix(p, "{") {
				parts[i] = "[^/]+"
			} else {
				parts[i] = regexp.QuoteMeta(p)
			}
		}
		want := regexp.MustCompile("^" + method + " /" + strings.Join(parts, "/") + "$")
		if !slices.ContainsFunc(requests, want.MatchString) {
			t.Errorf("%s (%s %s) was not called with success", id, method, path)
		}
	}
	all.walk(check)
	get := organizations.Methods["get"]
	check(get.ID, get.HTTPMethod, get.FlatPath)
	if n != 43 {
		t.Errorf("the discovery document has %d such methods, want 43", n)
	}
	t.Logf("%d methods were called, by %d requests", n, len(requests))
}
