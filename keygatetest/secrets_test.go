package keygatetest_test

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"keygate/apigee"
	"keygate/authz"
	"keygate/config"
	"keygate/keygatetest"
	"keygate/ledger"
)

// A consumer key and its secret, planted by an import and then presented in
// every form, stand nowhere afterwards: not in what is stored, logged, counted,
// shown or answered.
func TestKeysAppearNowhere(t *testing.T) {
	t.Parallel()
	const (
		key    = "CANARYkeyQ7w9XzL2mV4tR8bN6"
		secret = "CANARYsecretK3j5H8pYdF1gS"
		absent = "CANARYabsentU4n6B2vTcX9eW"
	)
	k := keygatetest.Start(t, keygatetest.Options{Child: true, Envoy: true, Settings: func(c *config.Config) {
		c.LogDecisions, c.KeyQuery = "all", "apikey"
	}})
	app := fmt.Sprintf(`{"appId":"app-1","developerId":"dev-1","name":"app","status":"approved","credentials":[
		{"consumerKey":%q,"consumerSecret":%q,"status":"approved","expiresAt":-1,"apiProducts":[{"apiproduct":"Weather-Product","status":"approved"}]}]}`, key, secret)
	outcomes := []string{fmt.Sprint(k.Import(t, "app.json", []byte(app)))}
	// And an import that refuses it all.
	ctx := t.Context()
	broken := strings.NewReplacer(`"approved"`, `"aproved"`, `"expiresAt"`, `"consumerSecret":"`+secret+`","expiresAt"`).Replace(app)
	importer := ledger.NewImporter(ledger.ImporterConfig{KV: k.Writer, Space: k.Settings.Space, Organization: "default"})
	err := importer.Import(ctx, apigee.NewReader(apigee.ReaderConfig{Name: "broken.json"}, strings.NewReader(broken)), func(o ledger.Outcome) {
		b, err := json.Marshal(o)
		outcomes = append(outcomes, string(b), fmt.Sprintf("%+v %v", o, err))
	})
	outcomes = append(outcomes, fmt.Sprint(err))
	dump := k.Dump(t)
	if !strings.Contains(dump, keygatetest.KeyID(t, key).String()) {
		t.Fatalf("the import stored nothing under the key's id:\n%s", dump)
	}
	r, err := k.Writer.Get(ctx, k.Settings.Space.Probe())
	if err != nil {
		t.Fatal(err)
	}
	k.Applied(t, r.Header.Revision)

	var answers []string
	get := func(path string, headers ...string) {
		t.Helper()
		got := k.Get(t, path, headers...)
		answers = append(answers, fmt.Sprint(got))
	}
	every := func() {
		get("/weather", header(key))
		get("/orders", header(key))
		get("/no/such/route", header(key))
		get("/weather", header(key), header(absent))
		get("/weather", header(key), header(key))
		get("/weather", header(key+","+absent))
		get("/weather", header("!"+key))
		get("/weather", header(key+"\xff"))
		get("/weather", header(key+strings.Repeat("x", 2048)))
		get("/weather", header(strings.ToLower(key)))
		get("/weather", header(absent))
		get("/weather?apikey=" + key)
		get("/weather?a=b&apikey="+key, header(key))
		get("/weather?apikey="+absent, header(key))
		get("/weather?apikey=" + key + "&apikey=" + key)
		get("/weather?apikey=" + key + ";x")
		get("/weather?api%6bey=" + key)
		conn := k.Conn(t)
		for _, form := range []string{key, key + " ", key + "\n", absent, key + "\x00", strings.ToUpper(key)} {
			resp, err := authv3.NewAuthorizationClient(conn).Check(ctx, request(weather, form))
			answers = append(answers, fmt.Sprint(resp, err))
		}
		_, err := send(ctx, conn, authv3.Authorization_Check_FullMethodName, append(mustMarshal(t, request(weather, key)), 0xff))
		answers = append(answers, fmt.Sprint(err))
	}
	every()
	// An operator who took the key itself for its id.
	k.Put(t, "/keygate/default/keys/"+key+"/status", "revoked")
	k.Applied(t, k.Put(t, "/keygate/default/keys/"+key+"/credential", app))
	// A stored record that nobody can read.
	space := k.Settings.Space
	planted := keygatetest.Key{Key: key}.Record(t)
	k.Applied(t, k.Put(t, space.Details(planted), `{"v":1,"consumerSecret":"`+secret+`"`))
	every()
	k.Applied(t, k.Put(t, space.Status(planted), "revoked"))
	every()

	logged := count(k.Log(), "reason=")
	keygatetest.Eventually(t, 5*time.Second, "the access log to be written", func() bool {
		return strings.Count(k.AccessLog(), "\n") >= 3*17
	})
	if logged < 40 {
		t.Errorf("%d decisions are logged, want at least 40", logged)
	}
	places := map[string]string{
		"etcd after the import": dump, "the import's outcomes": strings.Join(outcomes, "\n"), "the server's log": k.Log(),
		"Envoy's access log": k.AccessLog(), "an answer": strings.Join(answers, "\n"),
	}
	for _, path := range []string{"/metrics", "/status", "/readyz?verbose", "/version", "/livez", "/nothing"} {
		_, places[path] = k.Health(t, path)
	}
	for name, text := range places {
		for _, planted := range []string{key, secret, absent} {
			forms := []string{planted, planted[:16], planted[8:], url.QueryEscape(planted), hex.EncodeToString([]byte(planted)),
				base64.StdEncoding.EncodeToString([]byte(planted))[:20]}
			for _, form := range forms {
				if at := strings.Index(strings.ToLower(text), strings.ToLower(form)); at >= 0 {
					t.Errorf("%s holds a form of %s…: …%s", name, planted[:9], text[max(0, at-200):at])
				}
			}
		}
	}
}

// What --log-decisions lets through.
func TestLogDecisions(t *testing.T) {
	t.Parallel()
	for which, want := range map[string]struct{ allowed, denied int }{"none": {0, 0}, "denied": {0, 2}, "all": {1, 2}} {
		t.Run(which, func(t *testing.T) {
			t.Parallel()
			k := keygatetest.Start(t, keygatetest.Options{Settings: func(c *config.Config) { c.LogDecisions = which }})
			key := keygatetest.Key{Key: "key-whose-checks-are-logged", App: "app-1"}
			k.Applied(t, k.PutKeys(t, key))
			conn := k.Conn(t)
			mustCheck(t, conn, key.Key)
			mustCheck(t, conn, "key-that-is-not-known-at-all")
			k.Applied(t, k.Put(t, k.Settings.Space.Status(key.Record(t)), "revoked"))
			mustCheck(t, conn, key.Key)
			k.Stop(t) // writes what waits
			log, id := k.Log(), keygatetest.KeyID(t, key.Key).String()
			if got := count(log, "msg=allowed", "reason=allowed", "key_id="+id, "app=app-1", "product=Weather-Product"); got != want.allowed {
				t.Errorf("allowed lines: got %d, want %d", got, want.allowed)
			}
			if got := count(log, "msg=denied"); got != want.denied {
				t.Errorf("denied lines: got %d, want %d", got, want.denied)
			}
			if got := count(log, "msg=denied", "reason=key_revoked", "key_id="+id); got != min(want.denied, 1) {
				t.Errorf("lines of the revoked key: got %d, want %d", got, min(want.denied, 1))
			}
			// Changes are logged in any case.
			if got := count(log, "msg=status", "etcd_key="+k.Settings.Space.Status(key.Record(t)), "value=revoked"); got != 1 {
				t.Errorf("lines of the revocation: got %d, want 1", got)
			}
		})
	}
}

// Decisions of every kind are counted where they belong, and the callback gets
// the same.
func TestDecisionsAreCounted(t *testing.T) {
	t.Parallel()
	var made decisions
	k := keygatetest.Start(t, keygatetest.Options{OnDecision: made.add})
	k.PutKeys(t, keygatetest.Key{Key: "key-that-is-counted-00000"})
	conn := k.Conn(t)
	for _, key := range []string{"key-that-is-counted-00000", "key-that-is-counted-00000", "key-that-is-not-counted-0", "", "!"} {
		mustCheck(t, conn, key)
	}
	want := map[authz.Reason]float64{authz.Allowed: 2, authz.KeyUnknown: 1, authz.KeyMissing: 1, authz.KeyMalformed: 1}
	metrics, sum := k.Metrics(t), 0.0
	for reason := range authz.NumReasons {
		name := keygatetest.ChecksMetric(reason)
		got, ok := metrics[name]
		if !ok || got != want[reason] {
			t.Errorf("%s: got %v, present %v, want %v", name, got, ok, want[reason])
		}
		sum += got
	}
	if n := len(made.list()); float64(n) != sum || metrics["keygate_check_duration_seconds_count"] != sum {
		t.Errorf("got %d decisions and %v durations, want %v", n, metrics["keygate_check_duration_seconds_count"], sum)
	}
}
