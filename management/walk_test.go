package management_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"keygate/access"
	"keygate/authz"
)

// One call after another on each mount: statuses, shapes, headers. The document
// checks the rest.
func TestWalk(t *testing.T) {
	a := newAPI(t, nil)
	for i, mount := range []string{mountX, mountEdge, mountBase} {
		t.Run(strings.Trim(mount, "/"), func(t *testing.T) {
			a.t = t
			org := mount + string(acme)
			edge := mount != mountX
			email := fmt.Sprintf("walk%d+1@example.com", i)
			d := org + "/developers/" + strings.Replace(email, "+", "%2B", 1)
			product := fmt.Sprintf("Walk %d", i)
			p := org + "/apiproducts/" + strings.Replace(product, " ", "%20", 1)

			a.want(200, "GET", org, nil)
			a.want(200, "GET", org+"/", nil)
			r := a.want(201, "POST", org+"/apiproducts", map[string]any{"name": product, "displayName": "Walk", "approvalType": "manual"})
			if r.revision() == "" || r.Header.Get("ETag") == "" || !strings.HasPrefix(r.Header.Get("Content-Type"), "application/json") {
				t.Errorf("create a product: got headers %v, want revision, ETag and JSON", r.Header)
			}
			a.want(409, "POST", org+"/apiproducts", map[string]any{"name": product, "displayName": "Walk", "approvalType": "manual"})
			a.want(200, "GET", p, nil)
			a.want(200, "PUT", p, map[string]any{"name": product, "displayName": "Walked", "approvalType": "manual"})
			a.want(200, "GET", org+"/apiproducts?expand=true&count=10", nil)
			if got := a.want(200, "GET", org+"/apiproducts", nil).body[0]; (got == '[') != edge {
				t.Errorf("the list of products begins with %c", got)
			}

			r = a.want(201, "POST", org+"/developers", map[string]any{"email": strings.ToUpper(email[:1]) + email[1:], "firstName": "W", "lastName": "K", "userName": email})
			if got := r.member("email"); got != `"`+email+`"` {
				t.Errorf("got e-mail %s, want it in lower case", got)
			}
			if got := r.member("createdAt"); strings.HasPrefix(got, `"`) == edge {
				t.Errorf("createdAt is %s", got)
			}
			a.want(200, "GET", d, nil)
			// apigeecli escapes the address twice.
			a.want(200, "GET", org+"/developers/"+strings.NewReplacer("+", "%252B", "@", "%2540").Replace(email), nil)
			a.want(200, "GET", org+"/developers/"+strings.Trim(r.member("developerId"), `"`), nil)
			a.want(200, "PUT", d, map[string]any{"email": email, "firstName": "Walter", "lastName": "K", "userName": email})
			a.want(200, "GET", org+"/developers?expand=true&startKey="+strings.Replace(email, "+", "%2B", 1), nil)
			a.want(200, "POST", d+"/attributes", map[string]any{"attribute": []any{map[string]any{"name": "a", "value": "1"}}})
			a.want(200, "POST", d+"/attributes/b", map[string]any{"value": "2"})
			if got := a.want(200, "GET", d+"/attributes/b", nil).member("value"); got != `"2"` {
				t.Errorf("got attribute %s, want 2", got)
			}
			a.want(200, "DELETE", d+"/attributes/b", nil)
			a.want(404, "GET", d+"/attributes/b", nil)
			a.want(200, "GET", d+"/attributes", nil)

			r = a.want(201, "POST", d+"/apps", map[string]any{"name": "walk", "apiProducts": []string{product}, "keyExpiresIn": "86400000", "attributes": []any{map[string]any{"name": "DisplayName", "value": "Walk"}}})
			var app struct {
				AppID       string
				Credentials []struct {
					ConsumerKey, ConsumerSecret string
					APIProducts                 []struct{ APIProduct, Status string }
				}
			}
			r.into(t, &app)
			if len(app.Credentials) != 1 || !slices.Equal(app.Credentials[0].APIProducts, []struct{ APIProduct, Status string }{{product, "pending"}}) {
				t.Fatalf("create an app: got %s, want one key with the product pending", r.body)
			}
			key := app.Credentials[0].ConsumerKey
			walk, k := d+"/apps/walk", d+"/apps/walk/keys/"+key
			id := sha256Of(t, key)
			if r := a.want(409, "POST", d+"/apps", map[string]any{"name": "walk"}); r.message() != "App with name walk already exists" {
				t.Errorf("got message %q, want Apigee's own", r.message())
			}
			a.want(200, "GET", walk, nil)
			a.want(200, "GET", org+"/apps/"+app.AppID, nil)
			a.want(200, "GET", d+"/apps", nil)
			a.want(200, "GET", d+"/apps?expand=true", nil)
			a.want(200, "GET", org+"/apps?expand=true&includeCred=true", nil)
			a.want(200, "GET", org+"/apps?apiProduct="+strings.Replace(product, " ", "%20", 1)+"&status=approved", nil)
			a.want(200, "GET", org+`/apps?filter=appName%3Dwalk%20AND%20status%3Dapproved`, nil)
			a.want(200, "GET", org+"/apps?filter=consumerKey%3Dsha256:"+id, nil)
			a.want(200, "GET", p+"?query=list&entity=apps", nil)
			r = a.want(200, "PUT", walk, map[string]any{"callbackUrl": "https://example.com/"})
			if got := r.member("callbackUrl"); got != `"https://example.com/"` {
				t.Errorf("got callback %s", got)
			}
			a.want(200, "POST", walk, map[string]any{"apiProducts": []string{product}})
			a.want(400, "POST", walk, nil)
			a.want(200, "POST", walk, "{}\n") // as Google's client asks for a key without products
			a.want(200, "POST", walk+"/attributes", map[string]any{"attribute": []any{}})
			a.want(200, "POST", walk+"/attributes/Notes", map[string]any{"name": "Notes", "value": "x"})
			a.want(200, "GET", walk+"/attributes", nil)
			a.want(200, "GET", walk+"/attributes/Notes", nil)
			a.want(200, "DELETE", walk+"/attributes/Notes", nil)

			// The four flags, by whatever content type and body.
			for _, f := range []struct{ path, off, on string }{{k + "/apiproducts/" + strings.Replace(product, " ", "%20", 1), "revoke", "approve"}, {k, "revoke", "approve"}, {walk, "revoke", "approve"}, {d, "inactive", "active"}} {
				for _, action := range []string{f.off, f.off, f.on} {
					r := a.want(204, "POST", f.path+"?action="+action+"&alt=json&prettyPrint=false", nil)
					if r.revision() == "" || len(r.body) != 0 {
						t.Errorf("%s: got revision %q and body %q", action, r.revision(), r.body)
					}
				}
				a.want(204, "POST", f.path+"?action="+f.on, nil, header("Content-Type", "application/octet-stream"))
				a.want(204, "POST", f.path+"?action="+f.on, "null\n")
				a.want(204, "POST", f.path+"?action="+f.on, `{"action":"revoke","status":"revoked"`, header("Content-Type", "application/octet-stream"))
			}
			if r := a.want(200, "GET", k, nil); !strings.Contains(string(r.body), `"status":"approved"`) || strings.Contains(string(r.body), "pending") {
				t.Errorf("after approving everything: got %s", r.body)
			}
			if edge { // the status in the body, as old documents have it
				a.want(204, "POST", walk, map[string]any{"status": "revoke"})
				if got := a.want(200, "GET", walk, nil).member("status"); got != `"revoked"` {
					t.Errorf("got %s after the body's revoke", got)
				}
				a.want(204, "POST", walk, map[string]any{"status": "approve"})
			}

			own := fmt.Sprintf("own-key-of-the-walk-%d", i)
			r = a.want(201, "POST", walk+"/keys", map[string]any{"consumerKey": own, "consumerSecret": "own-secret-of-it", "expiresInSeconds": "3600"})
			if got := r.member("consumerKey"); got != `"`+own+`"` {
				t.Errorf("got key %s, want %s", got, own)
			}
			a.want(409, "POST", walk+"/keys/create", map[string]any{"consumerKey": own})
			a.want(201, "POST", walk+"/keys/create", map[string]any{})
			ownKey := walk + "/keys/" + own
			a.want(200, "POST", ownKey, map[string]any{"apiProducts": []string{product}, "attributes": []any{map[string]any{"name": "n", "value": "v"}}})
			a.want(200, "PUT", ownKey, map[string]any{"apiProducts": []any{map[string]any{"apiproduct": product}}})
			a.want(200, "DELETE", ownKey+"/apiproducts/"+strings.Replace(product, " ", "%20", 1), nil)
			a.want(404, "DELETE", ownKey+"/apiproducts/"+strings.Replace(product, " ", "%20", 1), nil)
			a.want(200, "GET", walk+"/keys/sha256:"+sha256Of(t, own), nil)

			a.want(200, "GET", org+"/keys?status=approved&pageSize=2", nil)
			a.want(200, "GET", org+"/keys?expiringWithin=48h", nil)
			a.want(200, "GET", org+"/keys?expired=true", nil)
			r = a.want(200, "POST", org+"/keys:search", map[string]any{"consumerKey": own})
			if !strings.Contains(string(r.body), app.AppID) {
				t.Errorf("search: got %s, want the app", r.body)
			}
			a.want(200, "POST", org+"/keys:search", map[string]any{"consumerKey": "sha256:" + id})
			r = a.want(200, "POST", org+"/check", map[string]any{"consumerKey": key, "product": product})
			if got := r.member("decision"); got != `"allowed"` {
				t.Errorf("check: got %s, want allowed", r.body)
			}
			r = a.want(200, "POST", org+"/check", map[string]any{"consumerKey": own, "product": product})
			if got := r.member("reason"); got != `"product_not_on_key"` {
				t.Errorf("check: got %s, want product_not_on_key", r.body)
			}
			a.want(200, "POST", org+"/statuses:select", map[string]any{"developer": email})
			a.want(200, "POST", org+"/statuses:select", map[string]any{"keys": []string{id, strings.Repeat("0", 64)}})
			r = a.want(200, "POST", org+"/statuses", map[string]any{"action": "revoke", "targets": []any{
				map[string]any{"key": id}, map[string]any{"key": id, "product": product}, map[string]any{"app": app.AppID}, map[string]any{"key": strings.Repeat("0", 64)}}})
			if r.member("changed") != "3" || !strings.Contains(r.member("notFound"), strings.Repeat("0", 64)) {
				t.Errorf("statuses: got %s, want 3 changed and one not found", r.body)
			}
			a.want(200, "POST", org+"/statuses?wait=fleet", map[string]any{"action": "approve", "targets": []any{map[string]any{"key": id}}})
			a.want(200, "GET", org+"/audit?pageSize=5&reverse=true&action=revoke", nil)
			r = a.want(201, "POST", org+"/tokens", map[string]any{"name": "walk", "role": "viewer", "expiresIn": "1h"})
			tokenID := strings.Trim(r.member("id"), `"`)
			a.want(200, "GET", org+"/tokens", nil)
			a.want(200, "GET", walk, nil, as(strings.Trim(r.member("token"), `"`)))
			a.want(200, "DELETE", org+"/tokens/"+tokenID[:12], nil)
			a.want(401, "GET", walk, nil, as(strings.Trim(r.member("token"), `"`)))

			a.want(200, "DELETE", ownKey, nil)
			a.want(404, "GET", ownKey, nil)
			a.want(200, "DELETE", walk, nil)
			a.want(404, "GET", walk, nil)
			a.want(200, "DELETE", d, nil)
			a.want(200, "DELETE", p, nil)
		})
	}
}

func sha256Of(t *testing.T, key string) string {
	t.Helper()
	k, reason := authz.ParseConsumerKey(key)
	if reason != authz.Allowed {
		t.Fatalf("the key is %v", reason)
	}
	return k.ID().String()
}

// Only for whom it is revealed do key and secret stand in an answer, and the
// audit trail says so.
func TestReveal(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	reveals := func() (n int) {
		for _, r := range a.records() {
			if r.Action == "reveal" {
				n++
			}
		}
		return n
	}
	keyPath := w.app + "/keys/sha256:" + sha256Of(t, w.key)
	for _, path := range []string{w.app, keyPath, w.app + "/keys/" + w.key, mountX + "acme/apps/" + w.appID, mountX + "acme/apps?expand=true", mountX + "acme/developers/ann@example.com/apps?expand=true"} {
		before := reveals()
		if r := a.want(200, "GET", path, nil); !strings.Contains(string(r.body), w.key) || !strings.Contains(string(r.body), w.secret) {
			t.Errorf("%s as admin lacks key or secret: %s", path, r.body)
		}
		if got := reveals() - before; got != 1 {
			t.Errorf("%s: %d audit records, want 1", path, got)
		}
		for _, hidden := range []reply{
			a.want(200, "GET", path, nil, as(a.token(access.Viewer, acme))),
			a.want(200, "GET", path, nil, as(a.token(access.Operator, acme))),
			a.want(200, "GET", path, nil, as(a.token(access.Auditor, acme))),
			a.want(200, "GET", path+map[bool]string{true: "&", false: "?"}[strings.Contains(path, "?")]+"reveal=false", nil),
		} {
			body := string(hidden.body)
			if strings.Contains(body, w.key) || strings.Contains(body, w.secret) || !strings.Contains(body, "sha256:"+sha256Of(t, w.key)) {
				t.Errorf("%s: got %s, want the key's id alone", path, body)
			}
		}
		if got := reveals() - before; got != 1 {
			t.Errorf("%s: %d audit records after answers that reveal nothing, want 1", path, got)
		}
	}
	if r := a.want(200, "GET", mountX+"acme/apps?expand=true&includeCred=false", nil); strings.Contains(string(r.body), w.key) {
		t.Errorf("includeCred=false: got %s", r.body)
	}
}

func TestDryRun(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	x := mountX + string(acme)
	before := a.dump()
	for _, c := range []struct {
		method, path string
		body         any
		changes      int
		stops        int
	}{
		{"POST", w.app + "?action=revoke&dryRun=true", nil, 1, 1},
		{"POST", w.app + "?action=revoke&dryRun=true&wait=fleet", nil, 1, 1},
		{"POST", w.app + "?action=approve&dryRun=true", nil, 0, 0},
		{"POST", x + "/developers/ann@example.com?action=inactive&dryRun=true", nil, 1, 1},
		{"DELETE", w.app + "?dryRun=true", nil, -1, 1},
		{"DELETE", w.app + "/keys/" + w.key + "?dryRun=true", nil, -1, 1},
		{"POST", x + "/apiproducts?dryRun=true", map[string]any{"name": "New", "displayName": "New", "approvalType": "auto"}, 1, 0},
		{"POST", x + "/developers?dryRun=true", map[string]any{"email": "bo@example.com", "firstName": "B", "lastName": "O", "userName": "bo"}, -1, 0},
	} {
		var p struct {
			DryRun         bool
			Changes, Stops []any
		}
		r := a.want(200, c.method, c.path, c.body, header("Idempotency-Key", "dry"))
		if r.into(t, &p); !p.DryRun || c.changes >= 0 && len(p.Changes) != c.changes || c.changes < 0 && len(p.Changes) == 0 || len(p.Stops) != c.stops {
			t.Errorf("%s %s: got %s, want %d changes and %d stops", c.method, c.path, r.body, c.changes, c.stops)
		}
		if strings.Contains(string(r.body), w.key) {
			t.Errorf("%s: the preview holds the key", c.path)
		}
	}
	cut := func(dump string) string { // the last use of a token may be noted
		return strings.Join(slices.DeleteFunc(strings.Split(dump, "\n"), func(l string) bool { return strings.HasPrefix(l, "/keygate.used/") }), "\n")
	}
	if after := a.dump(); cut(after) != cut(before) {
		t.Errorf("a dry run wrote something:\n%s\nwas\n%s", after, before)
	}
}

func TestIdempotencyKey(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	body := map[string]any{"name": "twice", "apiProducts": []string{"Weather-Product"}}
	apps := mountX + "acme/developers/ann@example.com/apps"
	once := header("Idempotency-Key", "a client's own words")
	first := a.want(201, "POST", apps, body, once)
	second := a.want(201, "POST", apps, body, once)
	if string(first.body) != string(second.body) || first.revision() != second.revision() || first.Header.Get("Idempotency-Replayed") != "" || second.Header.Get("Idempotency-Replayed") != "true" {
		t.Errorf("got %s (%v), then %s (%v): want the same, and the second replayed", first.body, first.Header, second.body, second.Header)
	}
	other := a.want(422, "POST", apps, map[string]any{"name": "other"}, once)
	if other.code() != "keygate.idempotency_key" {
		t.Errorf("got code %q", other.code())
	}
	a.want(422, "POST", apps+"/twice?action=revoke", nil, once)
	for _, bad := range []string{strings.Repeat("x", 256)} {
		a.want(400, "POST", apps, body, header("Idempotency-Key", bad))
	}
	// A status too, with and without its receipt.
	for _, query := range []string{"?action=revoke", "?action=revoke&wait=fleet"} {
		status := map[bool]int{true: 200, false: 204}[strings.Contains(query, "wait")]
		once := header("Idempotency-Key", "status"+query)
		first := a.want(status, "POST", w.app+query, nil, once)
		a.want(204, "POST", w.app+"?action=approve", nil)
		again := a.want(status, "POST", w.app+query, nil, once)
		if again.Header.Get("Idempotency-Replayed") != "true" || again.revision() != first.revision() {
			t.Errorf("%s: got %v and %s, want a replay of %s", query, again.Header, again.body, first.revision())
		}
		if got := a.want(200, "GET", w.app, nil).member("status"); got != `"approved"` {
			t.Errorf("%s: the repetition changed the status to %s", query, got)
		}
	}
	// The answers are of those who asked: another token's key is another.
	a.want(409, "POST", apps, body, once, as(a.token(access.Admin, acme)))
}

// An answer with a key, a secret or a token in it is noted each time that it is
// given again.
func TestReplayedSecretIsAudited(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	x := mountX + string(acme)
	reveals := func() (n int) {
		for _, r := range a.records() {
			if r.Action == "reveal" && strings.HasPrefix(r.Note, "replayed answer") && r.Actor.Name == "admin@acme" {
				n++
			}
		}
		return n
	}
	for i, c := range []struct {
		path   string
		body   any
		want   int
		secret bool
	}{
		{x + "/developers/ann@example.com/apps", map[string]any{"name": "again"}, 201, true},
		{w.app, map[string]any{"apiProducts": []string{"Weather-Product"}}, 200, true},
		{w.app + "/keys", map[string]any{}, 201, true},
		{w.app + "/keys/create", map[string]any{}, 201, true},
		{x + "/tokens", map[string]any{"name": "again", "role": "viewer"}, 201, true},
		{w.app + "/attributes/Notes", map[string]any{"value": "x"}, 200, false},
	} {
		once := header("Idempotency-Key", fmt.Sprint("again ", i))
		before := reveals()
		a.want(c.want, "POST", c.path, c.body, once)
		if got := reveals() - before; got != 0 {
			t.Errorf("POST %s: %d records of a replay at first, want none", c.path, got)
		}
		for range 2 {
			if r := a.want(c.want, "POST", c.path, c.body, once); r.Header.Get("Idempotency-Replayed") != "true" {
				t.Errorf("POST %s: the second answer is no replay", c.path)
			}
		}
		if got, want := reveals()-before, map[bool]int{true: 2}[c.secret]; got != want {
			t.Errorf("POST %s: got %d records of two replays, want %d", c.path, got, want)
		}
	}
}

// A replay of many changes tells how things are, and claims nothing more.
func TestReplayedStatuses(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	absent := strings.Repeat("0", 64)
	body := map[string]any{"action": "revoke", "targets": []any{map[string]any{"app": w.appID}, map[string]any{"key": absent}}}
	once := header("Idempotency-Key", "many")
	type told struct {
		Changed, Unchanged int
		Replayed           bool
		Flags              []struct {
			Before  string
			Changed bool
		}
		NotFound []struct{ Key string }
	}
	var first, again told
	r := a.want(200, "POST", mountX+"acme/statuses", body, once)
	if r.into(t, &first); first.Changed != 1 || first.Replayed || len(first.NotFound) != 1 {
		t.Fatalf("got %s, want one changed and one not found", r.body)
	}
	for _, now := range []string{"revoked", "approved"} {
		if now == "approved" {
			a.want(204, "POST", w.app+"?action=approve", nil)
		}
		again = told{}
		r = a.want(200, "POST", mountX+"acme/statuses", body, once)
		r.into(t, &again)
		if !again.Replayed || again.Changed != 0 || again.Unchanged != 1 || len(again.Flags) != 1 || again.Flags[0].Before != now || again.Flags[0].Changed ||
			len(again.NotFound) != 1 || again.NotFound[0].Key != absent {
			t.Errorf("got %s, want a replay that changed nothing, the app %s and one not found", r.body, now)
		}
		if got := a.want(200, "GET", w.app, nil).member("status"); got != `"`+now+`"` {
			t.Errorf("got status %s after the replay, want %s", got, now)
		}
	}
}

// Edge's way to change a status by the body makes no key where it is not known.
func TestStatusInBody(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	before := a.want(200, "GET", w.app, nil).body
	for _, word := range []string{"revoke", "approve"} {
		if r := a.want(400, "POST", w.app, map[string]any{"status": word}); !strings.Contains(r.message(), "?action") {
			t.Errorf("got %s, want it to name ?action", r.body)
		}
	}
	if after := a.want(200, "GET", w.app, nil).body; string(after) != string(before) {
		t.Errorf("the app is %s after it, was %s", after, before)
	}
}

// The size of a list is told where it is known.
func TestTotalSize(t *testing.T) {
	a := newAPI(t, nil)
	a.people()
	apps := mountX + "acme/apps"
	a.want(201, "POST", mountX+"acme/developers/ann@example.com/apps", map[string]any{"name": "second"})
	r := a.want(200, "GET", apps, nil)
	var list struct{ App []struct{ AppID string } }
	if r.into(t, &list); len(list.App) != 2 || r.member("totalSize") != "2" {
		t.Fatalf("got %s, want two apps and their number", r.body)
	}
	page := a.want(200, "GET", apps+"?pageSize=1", nil)
	token := strings.Trim(page.member("nextPageToken"), `"`)
	if token == "" {
		t.Fatalf("got %s, want a page and a token", page.body)
	}
	for _, part := range []reply{page, a.want(200, "GET", apps+"?pageToken="+token, nil), a.want(200, "GET", apps+"?startKey="+list.App[1].AppID, nil)} {
		if got := part.member("totalSize"); got != "" {
			t.Errorf("got totalSize %s of a part: %s", got, part.body)
		}
	}
}

// A name that has the look of one escaped twice is found as it is.
func TestEscapedLookingName(t *testing.T) {
	a := newAPI(t, nil)
	developers := mountX + "acme/developers"
	for _, email := range []string{"a@b.example", "x%40y@b.example"} {
		a.want(201, "POST", developers, map[string]any{"email": email, "firstName": "A", "lastName": "B", "userName": email})
	}
	for path, want := range map[string]string{
		"/x%2540y@b.example": `"x%40y@b.example"`, "/x%2540y%40b.example": `"x%40y@b.example"`, "/a%2540b.example": `"a@b.example"`, "/a%40b.example": `"a@b.example"`,
	} {
		if got := a.want(200, "GET", developers+path, nil).member("email"); got != want {
			t.Errorf("GET %s: got %s, want %s", path, got, want)
		}
	}
	a.want(404, "GET", developers+"/c%2540b.example", nil)
}

func TestIfMatch(t *testing.T) {
	a := newAPI(t, nil)
	w := a.people()
	tag := a.want(200, "GET", w.app, nil).Header.Get("ETag")
	if len(tag) < 3 {
		t.Fatalf("ETag is %q", tag)
	}
	change := map[string]any{"callbackUrl": "https://example.com/1"}
	r := a.want(200, "PUT", w.app, change, header("If-Match", tag))
	if got := a.want(200, "GET", w.app, nil).Header.Get("ETag"); got != r.Header.Get("ETag") || got == tag {
		t.Errorf("the write's ETag is %s, the read's %s, the old one %s", r.Header.Get("ETag"), got, tag)
	}
	a.want(412, "PUT", w.app, map[string]any{"callbackUrl": "https://example.com/2"}, header("If-Match", tag))
	a.want(412, "POST", w.app+"?action=revoke", nil, header("If-Match", tag))
	a.want(412, "DELETE", w.app, nil, header("If-Match", `"abc"`))
	a.want(204, "POST", w.app+"?action=revoke", nil, header("If-Match", r.Header.Get("ETag")))
	a.want(200, "PUT", w.app, change, header("If-Match", "*"))
	a.want(404, "PUT", w.app+"x", change, header("If-Match", "*"))
	for _, bad := range []string{"123", `"1", "2"`, `W/"1"`, `"`, ""} {
		a.want(400, "PUT", w.app, change, func(r *http.Request) { r.Header["If-Match"] = []string{bad} })
	}
}
