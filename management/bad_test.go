package management_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"keygate/access"
	"keygate/management"
)

// deep is JSON nested so deep.
func deep(n int) string { return strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n) }

// Inputs that cannot be right, each with its answer. Nothing of them changes
// anything.
func TestBadInputs(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	x := mountX + "acme"
	ann := x + "/developers/ann@example.com"
	key := w.app + "/keys/" + w.key
	weather := key + "/apiproducts/Weather-Product"
	viewer, operator := a.token(access.Viewer, acme), a.token(access.Operator, acme)
	app := func(extra string) string { return `{"name":"bad"` + extra + `}` }
	manyProducts := make([]string, 1000)
	for i := range manyProducts {
		manyProducts[i] = fmt.Sprintf("p%d", i)
	}
	many, err := json.Marshal(map[string]any{"name": "bad", "apiProducts": manyProducts})
	if err != nil {
		t.Fatal(err)
	}
	before := a.dump()
	type row struct {
		name, method, path string
		body               any
		status             int
		says               string // the message holds it
		opts               []option
	}
	rows := []row{
		// M1: tokens.
		{"no token", "GET", w.app, nil, 401, "", []option{nobody}},
		{"empty bearer", "GET", w.app, nil, 401, "", []option{header("Authorization", "Bearer ")}},
		{"another scheme", "GET", w.app, nil, 401, "", []option{header("Authorization", "Digest "+a.admin)}},
		{"a consumer key as token", "GET", w.app, nil, 401, "", []option{as(w.key)}},
		{"a token cut short", "GET", w.app, nil, 401, "", []option{as(a.admin[:len(a.admin)-1])}},
		{"alg none", "GET", w.app, nil, 401, "", []option{as("eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.")}},
		{"the token in the query", "GET", w.app + "?access_token=" + a.admin, nil, 401, "", []option{nobody}},
		// M2
		{"viewer revokes", "POST", w.app + "?action=revoke", nil, 403, "status", []option{as(viewer)}},
		{"operator deletes", "DELETE", w.app, nil, 403, "write", []option{as(operator)}},
		{"operator writes a status in the body", "POST", mountEdge + "acme/developers/ann@example.com/apps/weather", `{"status":"revoke"}`, 403, "", []option{as(operator)}},
		// M4
		{"action misspelt", "POST", w.app + "?action=revok", nil, 400, "revoke or approve", nil},
		{"action in capitals", "POST", w.app + "?action=REVOKE", nil, 400, "revoke or approve", nil},
		{"action empty", "POST", w.app + "?action=", nil, 400, "revoke or approve", nil},
		{"action twice", "POST", w.app + "?action=revoke&action=approve", nil, 400, "?action", nil},
		{"action missing", "POST", weather, nil, 400, "revoke or approve", nil},
		{"action missing, developer", "POST", ann, nil, 400, "inactive or active", nil},
		{"another noun's action", "POST", ann + "?action=revoke", nil, 400, "inactive or active", nil},
		{"another noun's action, app", "POST", w.app + "?action=inactive", nil, 400, "revoke or approve", nil},
		{"wait misspelt", "POST", w.app + "?action=revoke&wait=flet", nil, 400, "?wait: want fleet", nil},
		{"wait on another change", "DELETE", key + "?wait=fleet", nil, 400, "?wait", nil},
		{"dryRun misspelt", "POST", w.app + "?action=revoke&dryRun=yes", nil, 400, "?dryRun", nil},
		{"dryRun empty", "DELETE", w.app + "?dryRun", nil, 400, "?dryRun", nil},
		{"dryRun twice", "DELETE", w.app + "?dryRun=true&dryRun=true", nil, 400, "?dryRun", nil},
		{"a query that is none", "POST", w.app + "?action=revoke&%zz", nil, 400, "query", nil},
		{"a long reason", "POST", w.app + "?action=revoke&reason=" + strings.Repeat("x", 1025), nil, 400, "?reason", nil},
		// M6
		{"no such app", "POST", w.app + "x?action=revoke", nil, 404, "weatherx", nil},
		{"no such developer", "POST", x + "/developers/bo@example.com/apps/weather?action=revoke", nil, 404, "bo@example.com", nil},
		{"no such key", "POST", w.app + "/keys/no-such-key-at-all?action=revoke", nil, 404, "Invalid consumer key", nil},
		{"no such product on it", "POST", key + "/apiproducts/Manual?action=approve", nil, 404, "Manual", nil},
		{"another app's key", "POST", x + "/developers/ann@example.com/apps/none/keys/" + w.key + "?action=revoke", nil, 404, "", nil},
		// M7
		{"near miss of a member", "POST", ann + "/apps", app(`,"apiProduct":["Weather-Product"]`), 400, "apiProducts", nil},
		{"a member twice", "POST", ann + "/apps", app(`,"name":"other"`), 400, "twice", nil},
		{"a wrong type", "POST", ann + "/apps", `{"name":7}`, 400, "/name", nil},
		{"a wrong type, deeper", "POST", ann + "/apps", app(`,"attributes":[{"name":"a","value":"b"},{"name":3}]`), 400, "/attributes/1/name", nil},
		{"data behind", "POST", ann + "/apps", app("") + "{}", 400, "", nil},
		{"a byte order mark", "POST", ann + "/apps", "\xef\xbb\xbf" + app(""), 400, "", nil},
		{"NaN", "POST", ann + "/apps", app(`,"keyExpiresIn":NaN`), 400, "", nil},
		{"a fraction", "POST", ann + "/apps", app(`,"keyExpiresIn":1.5`), 400, "/keyExpiresIn", nil},
		{"17 deep", "POST", ann + "/apps", app(`,"x":` + deep(16)), 400, "deeper than 16", nil},
		{"10,000 deep", "POST", ann + "/apps", deep(10000), 400, "deeper than 16", nil},
		{"more than 1 MiB", "POST", ann + "/apps", app(`,"x":"` + strings.Repeat("x", 1<<20) + `"`), 413, "1048576", nil},
		{"invalid UTF-8", "POST", ann + "/apps", "{\"name\":\"\xff\"}", 400, "UTF-8", nil},
		{"a zero character", "POST", ann + "/apps", `{"name":"a\u0000"}`, 400, "/name", nil},
		{"a list", "POST", ann + "/apps", `[]`, 400, "", nil},
		{"null", "POST", ann + "/apps", `null`, 400, "", nil},
		{"no name", "POST", ann + "/apps", `{}`, 400, "/name", nil},
		{"no body", "POST", ann + "/apps", nil, 400, "/name", nil},
		{"unknown in keygate's own", "POST", x + "/keys:search", `{"consumerKey":"` + w.key + `","x":1}`, 400, "consumerKey", nil},
		{"wrong type in keygate's own", "POST", x + "/check", `{"consumerKey":"k","product":["a"]}`, 400, "/product", nil},
		{"the key in an attribute", "POST", key, `{"attributes":[{"name":"a","value":"x"},{"name":"b","value":"is ` + w.key + `"}]}`, 400, "/attributes/1", nil},
		{"the key as an attribute", "PUT", key, `{"attributes":[{"name":"` + w.key + `","value":""}]}`, 400, "/attributes/0", nil},
		{"null in keygate's own", "POST", x + "/check", `{"consumerKey":null,"product":"a"}`, 400, "/consumerKey", nil},
		{"no key to check", "POST", x + "/check", `{"product":"a"}`, 400, "/consumerKey", nil},
		{"no product to check", "POST", x + "/check", `{"consumerKey":"k"}`, 400, "/product", nil},
		{"no key to search", "POST", x + "/keys:search", `{}`, 400, "/consumerKey", nil},
		{"a target of two", "POST", x + "/statuses", `{"action":"revoke","targets":[{"app":"a","developer":"d"}]}`, 400, "/targets/0", nil},
		{"a target without a name", "POST", x + "/statuses", `{"action":"revoke","targets":[{"app":"` + w.appID + `"},{}]}`, 400, "/targets/1", nil},
		{"a product on an app", "POST", x + "/statuses", `{"action":"revoke","targets":[{"app":"a","product":"p"}]}`, 400, "/targets/0", nil},
		{"a key as target", "POST", x + "/statuses", `{"action":"revoke","targets":[{"key":"` + w.key + `"}]}`, 400, "/targets/0/key", nil},
		{"no targets", "POST", x + "/statuses", `{"action":"revoke","targets":[]}`, 400, "/targets", nil},
		{"10,001 targets", "POST", x + "/statuses", `{"action":"revoke","targets":[` + strings.Repeat(`{"app":"a"},`, 10000) + `{"app":"a"}]}`, 400, "/targets", nil},
		{"no target there", "POST", x + "/statuses", `{"action":"revoke","targets":[{"app":"nothing"}]}`, 404, "nothing", nil},
		{"a status as action", "POST", x + "/statuses", `{"action":"revoked","targets":[{"app":"a"}]}`, 400, "/action", nil},
		{"no role", "POST", x + "/tokens", `{"name":"n"}`, 400, "/role", nil},
		{"an unknown role", "POST", x + "/tokens", `{"name":"n","role":"root"}`, 400, "/role", nil},
		{"a token that has expired", "POST", x + "/tokens", `{"name":"n","role":"admin","expiresIn":"-1h"}`, 400, "/expiresIn", nil},
		{"no unit", "POST", x + "/tokens", `{"name":"n","role":"admin","expiresIn":"5"}`, 400, "/expiresIn", nil},
		// M11
		{"page size 0", "GET", x + "/apps?pageSize=0", nil, 400, "?pageSize", nil},
		{"page size -1", "GET", x + "/apps?rows=-1", nil, 400, "?rows", nil},
		{"page size 1e9", "GET", x + "/developers?count=1000000000", nil, 400, "?count", nil},
		{"page size of words", "GET", x + "/keys?status=pending&pageSize=ten", nil, 400, "?pageSize", nil},
		{"audit page size", "GET", x + "/audit?pageSize=1001", nil, 400, "?pageSize", nil},
		{"a forged page token", "GET", x + "/apps?pageToken=AAAA", nil, 400, "pageToken", nil},
		{"a forged page token of keys", "GET", x + "/keys?status=approved&pageToken=eyJhIjoxfQ", nil, 400, "pageToken", nil},
		{"a forged page token of the audit", "GET", x + "/audit?pageToken=..%2F..%2Fother", nil, 400, "pageToken", nil},
		{"expand of another kind", "GET", x + "/apps?expand=1", nil, 400, "?expand", nil},
		{"an unknown status", "GET", x + "/apps?status=open", nil, 400, "status", nil},
		{"an unknown filter", "GET", x + "/apps?filter=color%3Dred", nil, 400, "?filter", nil},
		{"a time that is none", "GET", x + "/audit?from=yesterday", nil, 400, "?from", nil},
		{"expiring within nothing", "GET", x + "/keys?expiringWithin=5", nil, 400, "?expiringWithin", nil},
		{"a start that is not there", "GET", x + "/developers?startKey=bo@example.com", nil, 404, "", nil},
		// M12
		{"1,000 products on a key", "POST", ann + "/apps", string(many), 400, "", nil},
		{"19 attributes", "POST", w.app + "/attributes", `{"attribute":[` + strings.TrimSuffix(strings.Repeat(`{"name":"n%d","value":"v"},`, 19), ",") + `]}`, 400, "", nil},
		{"an attribute of 3 KiB", "POST", w.app + "/attributes/a", `{"value":"` + strings.Repeat("v", 3<<10) + `"}`, 400, "/value", nil},
		// M13, M14
		{"cross-site", "POST", w.app + "?action=revoke", nil, 403, "another site", []option{header("Sec-Fetch-Site", "cross-site")}},
		{"same-site", "POST", w.app + "?action=revoke", nil, 403, "another site", []option{header("Sec-Fetch-Site", "same-site")}},
		{"another origin", "POST", w.app + "?action=revoke", "x", 403, "another site", []option{header("Origin", "https://evil.example"), header("Content-Type", "text/plain")}},
		{"origin null", "POST", w.app + "?action=revoke", nil, 403, "another site", []option{header("Origin", "null")}},
		{"another host", "GET", w.app, nil, 421, "Host", []option{host("evil.example")}},
		{"another host with our port", "GET", "/docs", nil, 421, "Host", []option{host("evil.example:80"), nobody}},
		{"another address", "GET", w.app, nil, 421, "Host", []option{host("192.0.2.1:8080")}},
		// Routes.
		{"no such path", "GET", x + "/companies", nil, 404, "", nil},
		{"a slash too many", "GET", x + "/developers/", nil, 404, "", nil},
		{"an empty segment", "GET", x + "//developers", nil, 404, "", nil},
		{"dots", "GET", x + "/developers/../apps/..", nil, 404, "", nil},
		{"another method", "PATCH", w.app, nil, 405, "DELETE, GET, POST or PUT", nil},
		{"a method of one's own", "REVOKE", w.app, nil, 405, "", nil},
		{"no key is called create", "GET", w.app + "/keys/create", nil, 405, "takes POST", nil},
		{"read-only", "PUT", x + "/apps/" + w.appID, nil, 405, "GET", nil},
	}
	for _, r := range rows {
		for _, mount := range []string{mountX, mountBase} {
			path := strings.Replace(r.path, mountX, mount, 1)
			got := a.do(r.method, path, r.body, r.opts...)
			if got.StatusCode != r.status && !(r.status == 401 && got.StatusCode == 429) {
				t.Errorf("%s: %s %.120s: got %d %.300s, want %d", r.name, r.method, path, got.StatusCode, got.body, r.status)
				continue
			}
			if got.StatusCode == 429 {
				continue
			}
			if !strings.Contains(got.message(), r.says) {
				t.Errorf("%s: got message %q, want it to say %q", r.name, got.message(), r.says)
			}
			if got.code() == "" || got.Header.Get("Content-Type") != "application/json" {
				t.Errorf("%s: got %s of type %q, want a code and application/json", r.name, got.body, got.Header.Get("Content-Type"))
			}
			edge := strings.HasPrefix(path, mountEdge) || strings.HasPrefix(path, mountBase)
			if edge == strings.HasPrefix(string(got.body), `{"error":`) {
				t.Errorf("%s: %s answers in the wrong shape: %s", r.name, mount, got.body)
			}
			if strings.Contains(string(got.body), w.key) || strings.Contains(string(got.body), a.admin) {
				t.Errorf("%s: the error holds a key or a token: %s", r.name, got.body)
			}
		}
	}
	changed := func(dump string) (records string) {
		for line := range strings.SplitSeq(dump, "\n") {
			if strings.HasPrefix(line, "/keygate/") || strings.HasPrefix(line, "/keygate.index/") || strings.HasPrefix(line, "/keygate.tokens/") {
				records += line + "\n"
			}
		}
		return records
	}
	if got := changed(a.dump()); got != changed(before) {
		t.Errorf("something changed:\n%s\nwas\n%s", got, changed(before))
	}
}

// What is right and looks wrong.
func TestGoodInputs(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	for _, o := range []option{
		header("Sec-Fetch-Site", "same-origin"), header("Sec-Fetch-Site", "none"), header("Origin", a.http.URL),
		host("localhost"), host("LOCALHOST:80"), host("127.0.0.1"), host("[::1]:8080"),
		header("Content-Type", "text/plain"), header("Content-Type", "application/x-www-form-urlencoded"),
		func(r *http.Request) { r.Header.Del("Authorization"); r.SetBasicAuth("anybody", a.admin) },
	} {
		a.want(204, "POST", w.app+"?action=approve&alt=json&prettyPrint=false&key=x&key=y", nil, o)
	}
	for _, name := range []string{"keygate.example", "KEYGATE.example:8080"} {
		b := newAPI(t, a.kv, func(c *management.Config) { c.AllowedHosts = []string{"keygate.example"} })
		b.want(200, "GET", w.app, nil, host(name))
		b.want(421, "GET", w.app, nil, host("x"+name))
	}
	if r := a.do("HEAD", w.app, nil); r.StatusCode != 200 || len(r.body) != 0 || r.Header.Get("ETag") == "" {
		t.Errorf("HEAD: got %d, %q and ETag %q", r.StatusCode, r.body, r.Header.Get("ETag"))
	}
	// Markup in names and attributes comes back as text, escaped in JSON.
	for _, evil := range []string{`</script><script>alert(1)</script>`, `javascript:alert(1)`, `=cmd|' /C calc'!A0`, "line\r\nSet-Cookie: a=b"} {
		r := a.want(200, "POST", w.app+"/attributes/Notes", map[string]any{"value": evil})
		if strings.Contains(string(r.body), "<script") || r.Header.Get("Set-Cookie") != "" {
			t.Errorf("got %v and %s", r.Header, r.body)
		}
		var back struct{ Value string }
		if r.into(t, &back); back.Value != evil {
			t.Errorf("got %q, want %q", back.Value, evil)
		}
	}
	// The request id of a client is kept if it can stand in a header and a log.
	if got := a.do("GET", w.app, nil, header("X-Request-Id", "my.own-1")).Header.Get("X-Request-Id"); got != "my.own-1" {
		t.Errorf("got request id %q, want my.own-1", got)
	}
	for _, bad := range []string{"a b", strings.Repeat("x", 65), "<x>"} {
		if got := a.do("GET", w.app, nil, header("X-Request-Id", bad)).Header.Get("X-Request-Id"); len(got) != 32 {
			t.Errorf("got request id %q for %q, want a new one", got, bad)
		}
	}
	// A repetition is a success, and says so.
	a.want(204, "POST", w.app+"?action=revoke&reason=because&ticket=T-1", nil)
	a.want(204, "POST", w.app+"?action=revoke", nil)
	var noOps, reasons int
	for _, r := range a.records() {
		if r.Action == "revoke" && r.NoOp {
			noOps++
		}
		if r.Reason == "because" && r.Ticket == "T-1" && r.Actor.Name == "admin@acme" && r.Actor.Address == "127.0.0.1" && r.RequestID != "" && len(r.Changes) == 1 {
			reasons++
		}
	}
	if noOps != 1 || reasons != 1 {
		t.Errorf("got %d records of a revocation that was one already and %d with their reason, want 1 and 1", noOps, reasons)
	}
}
