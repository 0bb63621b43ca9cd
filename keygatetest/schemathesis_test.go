package keygatetest_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"keygate/keygatetest"
)

// schemathesisChecks are those that a contract can be held to:
//
//   - not_a_server_error, status_code_conformance, content_type_conformance,
//     response_headers_conformance, response_schema_conformance: what is answered
//     is what the document says;
//   - unsupported_method, allow_header_conformance: so is what is not there;
//   - negative_data_rejection: what the document calls invalid is refused;
//   - missing_required_header: so is a request without a header that it calls
//     required.
//
// Left out are positive_data_acceptance, for most of what fits the schemas is
// about developers, apps and keys that are not there, which 404 says, and some
// of it breaks a rule that no schema can say; ensure_resource_availability, which
// asks for what was made, and use_after_free, for what was deleted: both follow
// links, and the document has none; ignored_auth, for after some requests without
// a token they are answered 429; and object_level_authorization, which needs a
// second user. Who may do what is tested in the package management.
var schemathesisChecks = []string{
	"not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance",
	"unsupported_method", "allow_header_conformance", "negative_data_rejection", "missing_required_header",
}

// Inputs that schemathesis finds by the API's own document meet no server error
// and no answer that the document does not promise: valid ones on what is there,
// and then valid and invalid ones on anything.
func TestSchemathesis(t *testing.T) {
	k := keygatetest.Start(t, keygatetest.Options{Manage: true, Seal: newSeal(t)})
	a := manage(t, k)
	makeApp(t, k, a)
	a.call(t, 201, "POST", appPath+"/keys", `{"consumerKey":"`+ownKey+`","consumerSecret":"SXg8JizqeTA8j3gX"}`)
	a.call(t, 200, "POST", appPath+"/keys/"+ownKey, `{"apiProducts":["Weather-Product"]}`)
	for _, of := range []string{annPath, appPath, "/apiproducts/Weather-Product"} {
		a.call(t, 200, "POST", of+"/attributes/colour", `{"name":"colour","value":"blue"}`)
	}
	var app struct{ AppID, DeveloperID string } // of the developer, whose e-mail address is changed
	a.call(t, 200, "GET", appPath, "").into(t, &app)

	s := schemathesis{binary: tool(t, "TEST_SCHEMATHESIS", "schemathesis"), api: a, document: "http://" + k.Server.ManagementAddr() + "/openapi.json"}
	s.run(t, map[string]string{
		"developer": app.DeveloperID, "app": "AnotherTestApp", "key": ownKey, "product": "Weather-Product", "attribute": "colour", "appId": app.AppID,
	}, "--phases", "examples,fuzzing", "--mode", "positive", "--max-examples", "6", "--exclude-method", "DELETE")
	s.run(t, nil, "--phases", "examples,coverage,fuzzing", "--max-examples", "4")

	requests, succeeded := map[string]int{}, map[string]int{}
	for line := range strings.Lines(k.Log()) {
		if m := requestLine.FindStringSubmatch(line); m != nil && m[2] != "none" {
			requests[m[1]+" "+m[2]]++
			succeeded[m[1]+" "+m[2]] += map[bool]int{true: 1}[m[3] == "2"]
		}
		if strings.Contains(line, "level=ERROR") {
			t.Errorf("an error in the server's log: %s", line)
		}
	}
	never := slices.DeleteFunc(slices.Sorted(maps.Keys(requests)), func(route string) bool { return succeeded[route] > 0 })
	t.Logf("%d routes and methods, of which never with success: %q", len(requests), never)
	if len(requests) < 50 || len(never) > len(requests)/4 {
		t.Errorf("got %d routes and methods, %d of them never with success: it has not looked at much", len(requests), len(never))
	}
}

var requestLine = regexp.MustCompile(`msg=request method=(\w+) route=(\S+) status=(\d)`)

// schemathesis runs over one API.
type schemathesis struct {
	binary   string
	api      *api
	document string // its URL
}

// run fails the test with schemathesis' report if it finds anything. parameters
// are of paths, by name; without one it makes them up.
func (s schemathesis) run(t *testing.T, parameters map[string]string, args ...string) {
	t.Helper()
	dir := t.TempDir() // it reads its settings there, and may leave files
	settings := "[parameters]\n"
	for name, value := range parameters {
		settings += fmt.Sprintf("%q = %q\n", "path."+name, value)
	}
	if err := os.WriteFile(filepath.Join(dir, "schemathesis.toml"), []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	// The same inputs in each run, and as many. One worker: two get in each other's
	// way in some releases of Python.
	cmd := exec.CommandContext(ctx, s.binary, append([]string{"run", s.document,
		"--url", s.api.base, "--header", "Authorization: Bearer " + s.api.token, "--checks", strings.Join(schemathesisChecks, ","),
		"--generation-deterministic", "--no-shrink", "--suppress-health-check", "all", "--continue-on-failure", "--workers", "1",
		"--request-timeout", "30", "--max-redirects", "0", "--warnings", "off", "--no-color", "--output-sanitize", "true"}, args...)...)
	cmd.Dir = dir
	// A proxy that nobody runs: it talks to this machine alone.
	const nowhere = "http://127.0.0.1:1"
	cmd.Env = append(os.Environ(), "HOME="+dir, "HTTP_PROXY="+nowhere, "HTTPS_PROXY="+nowhere, "http_proxy="+nowhere, "https_proxy="+nowhere,
		"NO_PROXY=127.0.0.1", "no_proxy=127.0.0.1", "PYTHONDONTWRITEBYTECODE=1")
	began := time.Now()
	out, err := cmd.CombinedOutput()
	report := string(out)
	if err != nil {
		t.Errorf("schemathesis: %v after %v:\n%s", err, time.Since(began).Round(time.Second), report)
		return
	}
	_, summary, _ := strings.Cut(report, "= SUMMARY =")
	t.Logf("schemathesis, %v: %s", time.Since(began).Round(time.Second), strings.Join(strings.Fields(strings.Trim(summary, "= ")), " "))
}
