package keygatetest_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"keygate/access"
	"keygate/audit"
	"keygate/authz"
	"keygate/config"
	"keygate/keygatetest"
	"keygate/ledger"
	"keygate/seal"
	"keygate/statestore/keyspace"
)

// api is a client of a management API, with one token. It is safe for concurrent
// use.
type api struct {
	// base is the URL of the organization, without a slash at its end.
	base, token string
	http        *http.Client

	refused struct {
		sync.Mutex
		bodies []string // of the answers that were errors
	}
}

// answer of a management API.
type answer struct {
	status int
	header http.Header
	body   string
}

// revision of the change that was answered.
func (a answer) revision(t testing.TB) int64 {
	t.Helper()
	n, err := strconv.ParseInt(a.header.Get("X-Keygate-Revision"), 10, 64)
	if err != nil {
		t.Fatalf("x-keygate-revision: %v, of %d %s", err, a.status, a.body)
	}
	return n
}

// into reads the body.
func (a answer) into(t testing.TB, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), v); err != nil {
		t.Fatalf("read an answer: %v: %s", err, a.body)
	}
}

// newToken makes a token for the organization of the tests.
func newToken(t testing.TB, store ledger.Store, space keyspace.Space, role access.Role) string {
	t.Helper()
	by := ledger.By{Actor: audit.Actor{Kind: audit.ActorCLI, Name: "test"}}
	token, _, _, err := ledger.New(ledger.Config{Store: store, Space: space}).CreateToken(t.Context(), by, access.Token{
		Name: role.String(), Role: role, Organization: "default", ExpiresAt: access.NeverExpires,
	})
	if err != nil {
		t.Fatalf("make a token: %v", err)
	}
	return token
}

// newAPI is a client of the API at an address, in Apigee X's rendering.
func newAPI(t testing.TB, address, token string) *api {
	t.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	return &api{
		base: "http://" + address + "/v1/organizations/default", token: token,
		// Longer than a receipt may take.
		http: &http.Client{Transport: transport, Timeout: 2 * time.Minute},
	}
}

// manage is a client with all rights.
func manage(t testing.TB, k *keygatetest.Keygate) *api {
	t.Helper()
	return newAPI(t, k.Server.ManagementAddr(), newToken(t, k.Writer, k.Settings.Space, access.Admin))
}

// try sends a request, with headers as "name: value". It is for any goroutine.
func (a *api) try(ctx context.Context, method, path, body string, headers ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, err
	}
	if resp.StatusCode >= 400 {
		a.refused.Lock()
		defer a.refused.Unlock()
		a.refused.bodies = append(a.refused.bodies, fmt.Sprint(resp.StatusCode, resp.Header, string(text)))
	}
	return answer{resp.StatusCode, resp.Header, string(text)}, nil
}

// call sends a request that is answered with this status.
func (a *api) call(t testing.TB, want int, method, path, body string, headers ...string) answer {
	t.Helper()
	got, err := a.try(t.Context(), method, path, body, headers...)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	if got.status != want {
		t.Fatalf("%s %s: got %d, want %d: %s", method, path, got.status, want, got.body)
	}
	return got
}

// refusals are all error bodies until now, with their headers.
func (a *api) refusals() string {
	a.refused.Lock()
	defer a.refused.Unlock()
	return strings.Join(a.refused.bodies, "\n")
}

// madeKey is a key as the answer that made it shows it.
type madeKey struct {
	ConsumerKey    string
	ConsumerSecret string
	ExpiresAt      int64 `json:",string"`
}

// Paths of what the tests make.
const (
	annPath = "/developers/ann@example.com"
	appPath = annPath + "/apps/AnotherTestApp"
	ownKey  = "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb"
)

// makeApp makes two products, the second of which asks for approval, a
// developer, and an app with a key for both, and waits until checks know of it.
func makeApp(t testing.TB, k *keygatetest.Keygate, a *api) madeKey {
	t.Helper()
	a.call(t, 201, "POST", "/apiproducts", `{"name":"Weather-Product","displayName":"Weather","approvalType":"auto"}`)
	a.call(t, 201, "POST", "/apiproducts", `{"name":"Orders-Product","displayName":"Orders","approvalType":"manual"}`)
	a.call(t, 201, "POST", "/developers", `{"email":"ann@example.com","firstName":"Ann","lastName":"Lee","userName":"ann"}`)
	made := a.call(t, 201, "POST", annPath+"/apps", `{"name":"AnotherTestApp","apiProducts":["Weather-Product","Orders-Product"]}`)
	var app struct{ Credentials []madeKey }
	made.into(t, &app)
	if len(app.Credentials) != 1 {
		t.Fatalf("got %d credentials, want one: %s", len(app.Credentials), made.body)
	}
	k.Applied(t, made.revision(t))
	return app.Credentials[0]
}

// newSeal returns a sealing key.
func newSeal(t testing.TB) *seal.Keyring {
	t.Helper()
	ring, err := seal.Parse([]byte(seal.Generate("test")))
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

// receipt of a change that waits for the fleet.
type receipt struct {
	Action   string
	Revision int64
	Changed  int
	Replicas struct{ Total, Applied, Fenced int }
}

// What is made by API opens its route; each level is closed and opened by API,
// and with wait=fleet the very next request is answered so.
func TestManagementThroughEnvoy(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, Manage: true, Seal: newSeal(t)})
	a := manage(t, k)
	key := makeApp(t, k, a)
	wantReply(t, k.Get(t, "/weather", header(key.ConsumerKey)), authz.Allowed)
	wantReply(t, k.Get(t, "/orders", header(key.ConsumerKey)), authz.ProductPending)

	// set changes a flag and returns when the fleet, which is one, has applied it.
	set := func(path, action string, changed int) {
		t.Helper()
		got := a.call(t, 200, "POST", path+"?action="+action+"&wait=fleet&reason=test&ticket=T-1", "", "Content-Type: application/octet-stream")
		var r receipt
		got.into(t, &r)
		if r.Replicas.Total != 1 || r.Replicas.Applied != 1 || r.Revision != got.revision(t) || r.Revision == 0 || r.Changed != changed {
			t.Fatalf("%s of %s: got the receipt %s, want %d changed, and 1 of 1 applied", action, path, got.body, changed)
		}
	}
	keyPath := appPath + "/keys/" + key.ConsumerKey
	set(keyPath+"/apiproducts/Orders-Product", "approve", 1)
	wantReply(t, k.Get(t, "/orders", header(key.ConsumerKey)), authz.Allowed)
	for _, level := range []struct {
		path, no, yes string
		reason        authz.Reason
		orders        authz.Reason // of the other product
	}{
		{keyPath + "/apiproducts/Weather-Product", "revoke", "approve", authz.ProductRevoked, authz.Allowed},
		{keyPath, "revoke", "approve", authz.KeyRevoked, authz.KeyRevoked},
		{appPath, "revoke", "approve", authz.AppRevoked, authz.AppRevoked},
		{annPath, "inactive", "active", authz.DeveloperInactive, authz.DeveloperInactive},
	} {
		for range 3 {
			set(level.path, level.no, 1)
			wantReply(t, k.Get(t, "/weather", header(key.ConsumerKey)), level.reason)
			wantReply(t, k.Get(t, "/orders", header(key.ConsumerKey)), level.orders)
			set(level.path, level.no, 0)
			set(level.path, level.yes, 1)
			wantReply(t, k.Get(t, "/weather", header(key.ConsumerKey)), authz.Allowed)
			wantReply(t, k.Get(t, "/orders", header(key.ConsumerKey)), authz.Allowed)
		}
	}
	// Without a wait it is 204 at once, and the revision says how far to wait.
	got := a.call(t, 204, "POST", keyPath+"?action=revoke", "")
	k.Applied(t, got.revision(t))
	wantReply(t, k.Get(t, "/weather", header(key.ConsumerKey)), authz.KeyRevoked)
	set(keyPath, "approve", 1)

	// A key of the client's own opens nothing until it has a product, and nothing
	// when it is deleted.
	a.call(t, 201, "POST", appPath+"/keys/create", `{"consumerKey":"`+ownKey+`","consumerSecret":"SXg8JizqeTA8j3gX"}`)
	wantReply(t, k.Get(t, "/weather", header(ownKey)), authz.ProductNotOnKey)
	k.Applied(t, a.call(t, 200, "POST", appPath+"/keys/"+ownKey, `{"apiProducts":["Weather-Product"]}`).revision(t))
	wantReply(t, k.Get(t, "/weather", header(ownKey)), authz.Allowed)
	k.Applied(t, a.call(t, 200, "DELETE", appPath+"/keys/"+ownKey, "").revision(t))
	wantReply(t, k.Get(t, "/weather", header(ownKey)), authz.KeyUnknown)
	k.Applied(t, a.call(t, 200, "DELETE", annPath, "").revision(t))
	wantReply(t, k.Get(t, "/weather", header(key.ConsumerKey)), authz.KeyUnknown)
}

// A key expires at its millisecond: a request that ends before it is allowed, one
// that begins at it or later is refused.
func TestManagementExpiry(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, Manage: true, Seal: newSeal(t)})
	a := manage(t, k)
	makeApp(t, k, a)
	for seconds := 2; ; seconds *= 2 {
		key := fmt.Sprintf("key-that-expires-after-%d-seconds", seconds)
		made := a.call(t, 201, "POST", appPath+"/keys", fmt.Sprintf(`{"consumerKey":%q,"consumerSecret":"s","expiresInSeconds":"%d"}`, key, seconds))
		var credential madeKey
		made.into(t, &credential)
		k.Applied(t, a.call(t, 200, "PUT", appPath+"/keys/"+key, `{"apiProducts":["Weather-Product"]}`).revision(t))
		expires := time.UnixMilli(credential.ExpiresAt)
		allowed, lastYes := 0, time.Time{}
		var firstNo time.Time
		keygatetest.Eventually(t, keygatetest.Patience, "the key to expire", func() bool {
			began := time.Now()
			got := k.Get(t, "/weather", header(key))
			ended := time.Now()
			switch {
			case ended.Before(expires):
				wantReply(t, got, authz.Allowed)
				allowed, lastYes = allowed+1, ended
			case !began.Before(expires):
				wantReply(t, got, authz.KeyExpired)
				firstNo = began
			}
			return !firstNo.IsZero()
		})
		if allowed == 0 && seconds < 32 {
			continue // a machine so slow that it had expired before the first answer
		}
		t.Logf("%d requests were allowed, the last %v before the expiry; the first after it, %v later, was refused",
			allowed, expires.Sub(lastYes), firstNo.Sub(expires))
		if allowed == 0 {
			t.Errorf("no request was answered before the key expired, of %d s", seconds)
		}
		return
	}
}

// A key in keygate's own format with a wrong checksum is refused without a
// look-up: it is neither read from etcd nor counted as unknown.
func TestManagementChecksum(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, Manage: true, Seal: newSeal(t), Settings: func(c *config.Config) { c.LogDecisions = "denied" }})
	key := makeApp(t, k, manage(t, k)).ConsumerKey
	wantReply(t, k.Get(t, "/weather", header(key)), authz.Allowed)
	loads := func() uint64 { return uint64(k.Status(t).Store.Loads) }

	before := loads()
	for i := range 20 {
		typo := []byte(key)
		at := len(key) - 1 - i
		if typo[at] == '_' {
			continue
		}
		typo[at] = map[bool]byte{true: 'x', false: 'y'}[typo[at] != 'x']
		wantReply(t, k.Get(t, "/weather", header(string(typo))), authz.KeyMalformed)
	}
	if after := loads(); after != before {
		t.Errorf("loads: got %d, want %d as before keys with a wrong checksum", after, before)
	}
	if got := k.Checks(t, authz.KeyMalformed); got != 19 {
		t.Errorf("malformed keys: got %v, want 19", got)
	}
	if got := k.Checks(t, authz.KeyUnknown); got != 0 {
		t.Errorf("unknown keys: got %v, want none", got)
	}
	// One whose checksum is right is looked up.
	wantReply(t, k.Get(t, "/weather", header(authz.GenerateKey())), authz.KeyUnknown)
	if after := loads(); after == before {
		t.Errorf("loads: got %d before and after a key that has to be looked up", after)
	}
	k.Stop(t)
	if got := count(k.Log(), "msg=denied", "reason=key_malformed"); got != 19 {
		t.Errorf("lines of malformed keys: got %d, want 19", got)
	}
}

// Keys, secrets and tokens that the management API has made, taken and shown
// stand nowhere else: not in the log at its lowest level, not in metrics, status,
// audit trail, error bodies, etcd, nor Envoy's log.
func TestManagementCanary(t *testing.T) {
	t.Parallel()
	const (
		own    = "CANARYkeyQ7w9XzL2mV4tR8bN6"
		secret = "CANARYsecretK3j5H8pYdF1gS"
		absent = "CANARYabsentU4n6B2vTcX9eW"
	)
	wrong, _ := access.NewToken()
	k := keygatetest.Start(t, keygatetest.Options{Envoy: true, Manage: true, Seal: newSeal(t), Child: true, Settings: func(c *config.Config) {
		c.LogDecisions, c.KeyQuery = "all", "apikey"
	}})
	a := manage(t, k)
	made := makeApp(t, k, a)
	var minted struct{ Token string }
	a.call(t, 201, "POST", "/tokens", `{"name":"minted","role":"admin","expiresIn":"1h"}`).into(t, &minted)
	planted := map[string]string{
		"own key": own, "own secret": secret, "absent key": absent, "made key": made.ConsumerKey, "made secret": made.ConsumerSecret,
		"token": a.token, "minted token": minted.Token, "wrong token": wrong,
	}
	for name, value := range planted {
		if len(value) < 20 {
			t.Fatalf("%s has %d characters: nothing to look for", name, len(value))
		}
	}

	others := []*api{a, newAPI(t, k.Server.ManagementAddr(), minted.Token), newAPI(t, k.Server.ManagementAddr(), wrong),
		newAPI(t, k.Server.ManagementAddr(), newToken(t, k.Writer, k.Settings.Space, access.Viewer)),
		newAPI(t, k.Server.ManagementAddr(), made.ConsumerKey)}
	planted["viewer's token"] = others[3].token
	answered := map[int]int{}
	send := func(method, path, body string, headers ...string) {
		t.Helper()
		for _, who := range others {
			got, err := who.try(t.Context(), method, path, body, headers...)
			if err != nil {
				t.Fatalf("%s: %v", method, err)
			}
			answered[got.status]++
		}
	}
	keysPath := appPath + "/keys"
	newKey := `{"consumerKey":"` + own + `","consumerSecret":"` + secret + `"`
	for _, body := range []string{
		newKey + `}`, newKey + `}`, // made, and there already
		newKey, newKey + `,"x"}`, `[` + newKey + `}]`, // no JSON, or not an object
		newKey + `,"consumerKey":"` + own + `"}`,             // twice
		newKey + `,"` + own + `":1,"` + own + `":2}`,         // a name twice
		newKey + `,"consumerSecrt":"` + secret + `"}`,        // misspelt
		newKey + `,"attributes":[{"name":"` + own + `"}]}`,   // in the clear
		newKey + `,"scopes":["` + secret + `"]}`,             // likewise
		newKey + `,"expiresInSeconds":"` + own + `"}`,        // of another type
		newKey + `,"apiProducts":[{"apiproduct":{}}]}`,       // likewise
		`{"consumerKey":["` + own + `"]}`,                    // likewise
		`{"consumerKey":"` + own + ` !"}`,                    // not of a key's form
		`{"consumerKey":"` + own + strings.Repeat("x", 3000), // too long, cut off
		`{"sealedKey":"` + own + `"}`,                        // keygate's own member
	} {
		send("POST", keysPath, body, "Idempotency-Key: canary-"+strconv.Itoa(len(body)))
		send("POST", keysPath+"/create", body)
		send("POST", "/keys:search", body)
		send("POST", "/check", body)
		send("POST", "/statuses", body)
		if strings.Contains(body, "attributes") || strings.Contains(body, "scopes") {
			continue // elsewhere these are anything
		}
		send("POST", keysPath+"/"+own, body)
		send("PUT", keysPath+"/"+own, body)
		send("POST", keysPath+"/"+made.ConsumerKey, body)
		send("POST", annPath+"/apps", body)
		send("POST", appPath, body)
	}
	for _, key := range []string{own, absent, made.ConsumerKey, absent + "%21", "%00" + absent} {
		for _, query := range []string{"", "?action=revoke&wait=fleet&reason=gone&ticket=T-1", "?action=approve", "?action=retract", "?dryRun=true&action=revoke"} {
			send("POST", keysPath+"/"+key+query, "{}")
			send("POST", keysPath+"/"+key+"/apiproducts/Weather-Product"+query, "")
			send("POST", keysPath+"/"+key+"/apiproducts/None"+query, "")
		}
		send("GET", keysPath+"/"+key, "")
		send("GET", keysPath+"/"+key+"?reveal=false", "")
		send("GET", annPath+"/apps/none/keys/"+key, "")
		send("GET", "/developers/none@example.com/apps/none/keys/"+key, "")
		send("PATCH", keysPath+"/"+key, "")
		send("GET", keysPath+"/"+key+"/"+key, "")
		send(key[:6], keysPath, "")
		send("GET", "/apps?expand=true&filter=consumerKey="+key, "")
		send("GET", "/apps?filter="+key, "")
		send("GET", "/apps?pageToken="+key, "")
		send("GET", "/apps?action="+key, "", "If-Match: "+strconv.Quote(strings.Trim(key, "%")))
		send("POST", "/keys:search", `{"consumerKey":"`+key+`"}`)
		send("POST", "/check", `{"consumerKey":"`+key+`","product":"Weather-Product"}`)
		send("GET", "/keys?status="+key, "")
		send("GET", "/keys?pageToken="+key, "")
		send("POST", "/statuses", `{"action":"revoke","targets":[{"key":"`+key+`"}]}`)
		send("POST", "/statuses:select", `{"keys":["`+key+`"]}`)
	}
	for _, token := range []string{minted.Token, wrong} {
		send("DELETE", "/tokens/"+token, "")
		send("POST", "/tokens", `{"name":"x","role":"`+token+`"}`)
	}
	send("GET", "/apps?expand=true&includeCred=true", "")
	send("GET", appPath, "")
	send("GET", annPath+"/apps?expand=true", "")
	send("GET", "/audit", "")
	send("GET", "/keys?expired=true", "")
	for _, status := range []int{200, 201, 204, 400, 401, 403, 404, 405, 409} {
		if answered[status] == 0 {
			t.Errorf("no answer was %d: got %v", status, answered)
		}
	}
	var answers []string
	for _, key := range []string{own, absent, made.ConsumerKey} {
		for _, path := range []string{"/weather", "/orders", "/no/such/route"} {
			answers = append(answers, fmt.Sprint(k.Get(t, path, header(key))))
		}
	}
	send("DELETE", keysPath+"/"+own, "")
	send("DELETE", keysPath+"/"+own, "")
	send("DELETE", annPath, "")

	var exported bytes.Buffer
	n, err := audit.Export(t.Context(), k.Writer, k.Settings.Space, "default", &exported)
	if err != nil || n < 20 {
		t.Errorf("got %d audit records, %v, want at least 20", n, err)
	}
	places := map[string]string{
		"the server's log": k.Log(), "the audit trail": exported.String(), "etcd": k.Dump(t), "an answer of Envoy's": strings.Join(answers, "\n"),
	}
	if n := count(places["the server's log"], "msg=request"); n < 500 {
		t.Errorf("the log has %d lines of requests, want at least 500", n)
	}
	if !strings.Contains(places["etcd"], keygatetest.KeyID(t, made.ConsumerKey).String()) {
		t.Error("the id of the key that was made stands nowhere in etcd: the test looks in the wrong place")
	}
	for i, who := range others {
		places[fmt.Sprintf("error bodies of client %d", i)] = who.refusals()
	}
	for _, path := range []string{"/metrics", "/status", "/readyz?verbose", "/version"} {
		_, places[path] = k.Health(t, path)
	}
	keygatetest.Eventually(t, keygatetest.Patience, "the access log to be written", func() bool {
		places["Envoy's access log"] = k.AccessLog()
		return strings.Count(places["Envoy's access log"], "\n") >= len(answers)
	})
	for place, text := range places {
		lower := strings.ToLower(text)
		for name, value := range planted {
			forms := []string{value, value[:16], value[8:], url.QueryEscape(value), hex.EncodeToString([]byte(value)),
				base64.StdEncoding.EncodeToString([]byte(value))[:20]}
			for _, form := range forms {
				if at := strings.Index(lower, strings.ToLower(form)); at >= 0 {
					t.Errorf("%s: a form of the %s: …%s…", place, name, text[max(0, at-200):min(len(text), at+60)])
					break
				}
			}
		}
	}
	// And nothing that is kept under its hash alone is lost.
	if !slices.ContainsFunc(strings.Split(places["etcd"], "\n"), func(line string) bool { return strings.HasPrefix(line, k.Settings.Space.Tokens()) }) {
		t.Error("no token stands in etcd: the test looks in the wrong place")
	}
}
