package management_test

import (
	"fmt"
	"strings"
	"testing"

	"keygate/access"
	"keygate/management"
)

// rightsByHand says once more, apart from the table of routes, what each call
// needs. A line with ?action is the row for that.
const rightsByHand = `
read   GET
read   GET developers
write  POST developers
read   GET developers/{developer}
write  PUT developers/{developer}
write  DELETE developers/{developer}
status POST developers/{developer}
read   GET developers/{developer}/attributes
write  POST developers/{developer}/attributes
read   GET developers/{developer}/attributes/{attribute}
write  POST developers/{developer}/attributes/{attribute}
write  DELETE developers/{developer}/attributes/{attribute}
read   GET developers/{developer}/apps
write  POST developers/{developer}/apps
read   GET developers/{developer}/apps/{app}
write  PUT developers/{developer}/apps/{app}
write  DELETE developers/{developer}/apps/{app}
status POST developers/{developer}/apps/{app}?action
write  POST developers/{developer}/apps/{app}
read   GET developers/{developer}/apps/{app}/attributes
write  POST developers/{developer}/apps/{app}/attributes
read   GET developers/{developer}/apps/{app}/attributes/{attribute}
write  POST developers/{developer}/apps/{app}/attributes/{attribute}
write  DELETE developers/{developer}/apps/{app}/attributes/{attribute}
write  POST developers/{developer}/apps/{app}/keys
write  POST developers/{developer}/apps/{app}/keys/create
read   GET developers/{developer}/apps/{app}/keys/{key}
write  PUT developers/{developer}/apps/{app}/keys/{key}
write  DELETE developers/{developer}/apps/{app}/keys/{key}
status POST developers/{developer}/apps/{app}/keys/{key}?action
write  POST developers/{developer}/apps/{app}/keys/{key}
status POST developers/{developer}/apps/{app}/keys/{key}/apiproducts/{product}
write  DELETE developers/{developer}/apps/{app}/keys/{key}/apiproducts/{product}
read   GET apps
read   GET apps/{appId}
read   GET apiproducts
write  POST apiproducts
read   GET apiproducts/{product}
write  PUT apiproducts/{product}
write  DELETE apiproducts/{product}
read   GET apiproducts/{product}/attributes
write  POST apiproducts/{product}/attributes
read   GET apiproducts/{product}/attributes/{attribute}
write  POST apiproducts/{product}/attributes/{attribute}
write  DELETE apiproducts/{product}/attributes/{attribute}
read   POST keys:search
read   GET keys
read   POST check
status POST statuses
read   POST statuses:select
audit  GET audit
tokens GET tokens
tokens POST tokens
tokens DELETE tokens/{token}
`

// mayByHand is who has which right.
var mayByHand = map[string]string{
	"read":   "viewer operator admin auditor",
	"status": "operator admin",
	"write":  "admin",
	"tokens": "admin",
	"audit":  "admin auditor",
}

// Every route, every role, every mount.
func TestEveryRouteForEveryRole(t *testing.T) {
	a := newAPI(t, nil)
	a.people()
	type caller struct {
		name, token, org string
	}
	callers := []caller{{"nobody", "", "acme"}, {"admin of another", a.token(access.Admin, other), "acme"}, {"admin of all", a.token(access.Admin, access.AllOrganizations), "acme"}}
	for _, role := range access.Roles() {
		callers = append(callers, caller{role.String(), a.token(role, acme), "acme"})
	}
	lines := strings.Split(strings.TrimSpace(rightsByHand), "\n")
	table := management.Routes()
	if len(lines) != len(table) {
		t.Fatalf("the table has %d routes, the list by hand %d", len(table), len(lines))
	}
	// Nothing that is named is there, so nobody's turn changes the next one's.
	names := strings.NewReplacer("{developer}", "no@example.com", "{app}", "none", "{key}", "none", "{product}", "none",
		"{attribute}", "none", "{appId}", "none", "{token}", "00000000")
	for i, line := range lines {
		right, call, _ := strings.Cut(line, " ")
		method, pattern, _ := strings.Cut(strings.TrimSpace(call), " ")
		pattern, query, _ := strings.Cut(pattern, "?")
		if got := table[i]; got.Method != method || got.Pattern != pattern || got.Right != right {
			t.Errorf("the table's row %d is %v, the list's %q", i, got, line)
		}
		if query != "" {
			query = "?action=revoke"
		}
		for _, mount := range []string{mountX, mountEdge, mountBase} {
			for _, c := range callers {
				path := strings.TrimSuffix(mount+c.org+"/"+names.Replace(pattern), "/") + query
				opts := []option{as(c.token)}
				if c.token == "" {
					opts = []option{nobody}
				}
				r := a.do(method, path, nil, opts...)
				allowed := c.name == "admin of all" || strings.Contains(" "+mayByHand[right]+" ", " "+c.name+" ")
				foreign := r.StatusCode == 404 && r.code() == "keygate.organization_doesnot_exist"
				var want string
				switch ok := r.StatusCode == 200 || r.StatusCode == 400 || r.StatusCode == 404 && !foreign; {
				case c.name == "nobody" && r.StatusCode != 401 && r.StatusCode != 429:
					want = "401"
				case c.name == "admin of another" && !foreign:
					want = "404 for the organization"
				case c.name == "nobody" || c.name == "admin of another":
				case allowed && !ok:
					want = "the handler's answer"
				case !allowed && r.StatusCode != 403:
					want = "403"
				}
				if want != "" {
					t.Errorf("%s %s as %s: got %d %s, want %s", method, path, c.name, r.StatusCode, r.body, want)
				}
			}
		}
	}
}

// Whose organization it is not finds the same as whose there is none.
func TestForeignOrganization(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	foreign := a.token(access.Admin, other)
	same := func(org, path string) reply {
		r := a.do("GET", mountX+org+path, nil, as(foreign), header("X-Request-Id", "one"))
		if r.StatusCode != 404 {
			t.Errorf("GET %s%s: got %d, want 404", org, path, r.StatusCode)
		}
		return r
	}
	for _, path := range []string{"", "/apps", "/apps/" + w.appID, "/developers/ann@example.com", "/audit", "/tokens"} {
		if there, absent := same("acme", path), same("nowhere", path); string(there.body) != string(absent.body) {
			t.Errorf("%q: got %s for another's organization, %s for none", path, there.body, absent.body)
		}
	}
	for _, org := range []string{"..%2facme", "%2e%2e%2facme", "acme%00", "ACME", "*", ".barrier"} {
		same(org, "/apps")
	}
	// Of one's own organization nothing of another's is found.
	x := mountX + string(other)
	for _, c := range []struct {
		method, path string
		body         any
	}{
		{"GET", "/apps/" + w.appID, nil},
		{"POST", "/keys:search", map[string]any{"consumerKey": w.key}},
		{"POST", "/statuses:select", map[string]any{"app": w.appID}},
		{"POST", "/statuses", map[string]any{"action": "revoke", "targets": []any{map[string]any{"app": w.appID}}}},
		{"POST", "/tokens", map[string]any{"name": "x", "role": "admin", "organization": "acme"}},
		{"POST", "/tokens", map[string]any{"name": "x", "role": "admin", "organization": "*"}},
	} {
		if r := a.do(c.method, x+c.path, c.body, as(foreign)); r.StatusCode != 404 {
			t.Errorf("%s %s: got %d %s, want 404", c.method, c.path, r.StatusCode, r.body)
		}
	}
	var tokens struct {
		Tokens []struct{ Organization string }
	}
	a.want(200, "GET", x+"/tokens", nil, as(foreign)).into(t, &tokens)
	for _, tok := range tokens.Tokens {
		if tok.Organization != "other" {
			t.Errorf("the tokens of %q are listed", tok.Organization)
		}
	}
	if got := a.want(200, "GET", w.app, nil).member("status"); got != `"approved"` {
		t.Errorf("the app is %s after another's requests, want approved", got)
	}
}

// What belongs to no one organization is under the word for all of them, for
// those who may in all of them.
func TestAllOrganizations(t *testing.T) {
	a := newAPI(t, nil)
	x := mountX + string(acme)
	all := as(a.token(access.Admin, access.AllOrganizations))
	common, foreign := a.token(access.Viewer, access.AllOrganizations), a.token(access.Viewer, other)
	for _, org := range []string{"*", "%2A"} {
		r := a.want(200, "GET", mountX+org+"/audit", nil, all)
		if !strings.Contains(string(r.body), tokenID(t, common)) || strings.Contains(string(r.body), tokenID(t, foreign)) {
			t.Errorf("audit: got %s, want the records of tokens for all organizations alone", r.body)
		}
		r = a.want(200, "GET", mountX+org+"/tokens", nil, all)
		if !strings.Contains(string(r.body), tokenID(t, common)) || strings.Contains(string(r.body), tokenID(t, foreign)) {
			t.Errorf("tokens: got %s, want those for all organizations alone", r.body)
		}
		for _, path := range []string{"", "/apps", "/developers/ann@example.com", "/keys"} {
			if r := a.want(404, "GET", mountX+org+path, nil, all); r.code() != "keygate.organization_doesnot_exist" {
				t.Errorf("GET %s%s: got %s, want that there is no such organization", org, path, r.body)
			}
		}
		for _, path := range []string{"/audit", "/tokens"} {
			a.want(404, "GET", mountX+org+path, nil)
		}
		a.want(403, "GET", mountX+org+"/audit", nil, as(common))
	}
	// Another organization's token is not there, whoever asks.
	a.want(404, "DELETE", x+"/tokens/"+tokenID(t, foreign), nil, all)
	a.want(404, "DELETE", x+"/tokens/"+tokenID(t, common), nil)
	a.want(200, "GET", mountX+string(other), nil, as(foreign))
	a.want(200, "DELETE", mountX+"*/tokens/"+tokenID(t, common), nil, all)
	a.want(401, "GET", mountX+string(other), nil, as(common))
	a.want(200, "DELETE", mountX+string(other)+"/tokens/"+tokenID(t, foreign), nil, all)
}

// What was refused for want of a right, and who tried to get in, stands in the
// audit trail, and not once for each try.
func TestRefusalsAreAudited(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	viewer := a.token(access.Viewer, acme)
	const tries = 200
	for range tries {
		a.want(403, "POST", w.app+"?action=revoke", nil, as(viewer))
		if r := a.do("GET", w.app, nil, as("kgm_wrong")); r.StatusCode != 401 && r.StatusCode != 429 {
			t.Fatalf("got %d, want 401 or 429", r.StatusCode)
		}
	}
	var forbidden, unsigned int
	for _, r := range a.records() {
		switch {
		case r.Action == "refuse" && r.Actor.Name == "viewer@acme" && strings.Contains(r.Note, "status"):
			forbidden++
		case r.Action == "refuse" && strings.Contains(r.Note, "token"):
			unsigned++
		}
	}
	if forbidden < 1 || forbidden > tries/2 || unsigned < 1 || unsigned > 3 {
		t.Errorf("got %d records of refused changes and %d of refused sign-ins, of %d tries each: want some, and few", forbidden, unsigned, tries)
	}
	if fmt.Sprint(a.want(200, "GET", w.app, nil).member("status")) != `"approved"` {
		t.Error("the app was changed")
	}
}
