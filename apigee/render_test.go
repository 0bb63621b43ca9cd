package apigee_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keygate/apigee"
	"keygate/authz"
	"keygate/catalog"
	"keygate/jsonobject"
)

var update = flag.Bool("update", false, "write the golden files of the renderings")

var editions = map[string]apigee.Edition{"x": apigee.X, "edge": apigee.Edge}

// golden compares an answer with testdata/render/<name>.<edition>.json, of which
// the white space does not count.
func golden(t *testing.T, name, edition string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "render", name+"."+edition+".json")
	var shown bytes.Buffer
	if err := json.Indent(&shown, got, "", "  "); err != nil {
		t.Fatalf("%s: %v: %s", path, err, got)
	}
	shown.WriteByte('\n')
	if *update && (name != "weather-app" || edition != "edge") { // this one is the page's
		if err := os.WriteFile(path, shown.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.TrimSpace(string(want)), strings.TrimSpace(shown.String())); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func object(t testing.TB, s string) jsonobject.Object {
	t.Helper()
	o, err := jsonobject.Parse([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// The page's app, read as an import reads it and rendered, is the page's JSON,
// member for member and in its order.
func TestRenderWeatherApp(t *testing.T) {
	read := readAll(t, strings.NewReader(weatherApp(t)), false)[0].App
	a := apigee.App{App: *read, Email: "nobody@example.com"}
	for _, c := range read.Credentials {
		a.Credentials = append(a.Credentials, apigee.Credential{Credential: c, ConsumerKey: c.PlainKey.Reveal(), ConsumerSecret: c.PlainSecret.Reveal()})
	}
	golden(t, "weather-app", "edge", apigee.Edge.App(a))
	golden(t, "weather-app", "x", apigee.X.App(a))
	a.LastModifiedAt = 1420682967415
	if got := string(apigee.Edge.App(a)); !strings.Contains(got, `"lastModifiedAt":1420682967415,`) {
		t.Errorf("got %s, want the time of the last change to count", got)
	}
}

func TestRender(t *testing.T) {
	credential := apigee.Credential{Credential: catalog.Credential{
		Key: authz.KeyID{0xab}, Hint: "KLhb", Status: authz.StatusApproved, ExpiresAt: 1700000000123,
		Products: []catalog.ProductRef{
			{Name: "Weather", Status: authz.StatusPending, Details: object(t, `{"apiproduct":"Weather","since":3,"status":"approved"}`)},
			{Name: "Maps", Status: authz.StatusApproved},
			{Name: "Gone", Status: authz.StatusNone},
		},
		Details: object(t, `{"v":1,"appId":"a","developerId":"d","hint":"KLhb","sealedKey":"s1","sealedSecret":"s2","ConsumerSecret":"s3",
			"attributes":[{"name":"a","value":""},{"name":"b","value":"<script>"}],"apiProducts":[],"expiresAt":5,"expiresInSeconds":7,
			"issuedAt":1600000000000,"scopes":["READ","WRITE"],"status":"revoked","unknown":{"z":[1,"2"],"a":null}}`),
	}}
	revealed := credential
	revealed.ConsumerKey, revealed.ConsumerSecret = "giIC9Au6XP82wJ1oxZuQU4L75OdNKLhb", "SXg8JizqeTA8j3gX"
	app := apigee.App{
		App: catalog.App{
			ID: "id-1", Developer: "dev-1", Name: "One", Status: authz.StatusRevoked, Credentials: []catalog.Credential{{}},
			Details: object(t, `{"v":1,"name":"stale","zeta":[1],"attributes":[{"name":"Notes","value":"a\r\nb"}],"apiProducts":["Weather"],
				"keyExpiresIn":5,"createdAt":"1600000000000","createdBy":"ann","alpha":"","callbackUrl":7}`),
		},
		Email: "ann@example.com", LastModifiedAt: 1700000000000, Credentials: []apigee.Credential{credential},
	}
	bare := apigee.App{App: catalog.App{ID: "id-2", Developer: "dev-1", Name: "Two\u2028", Status: authz.StatusActive}}
	ann := apigee.Developer{
		Developer: catalog.Developer{
			ID: "dev-1", Email: "ann@example.com", Status: authz.StatusActive,
			Details: object(t, `{"v":1,"email":"old@example.com","firstName":"Ann","lastName":"<b>Q","userName":"ann","apps":["no"],"createdAt":1600000000000,
				"lastModifiedAt":1600000000001,"createdBy":"root","organizationName":"other","attributes":[{"name":"tier","value":"gold"}],"unknown":1.50,"more":{"<b>":"&"}}`),
		},
		Organization: "acme", Apps: []string{"One", "Two\u2028"},
	}
	idOnly := apigee.Developer{Developer: catalog.Developer{ID: "dev-2", Status: authz.StatusNone, Details: object(t, `{"v":1,"developerId":"dev-2"}`)}, Organization: "acme"}
	weather := apigee.Product{
		Product: catalog.Product{Name: "Weather", Details: object(t, `{"v":1,"name":"Weather","displayName":"Weather & more","approvalType":"manual",
			"apiResources":["/forecast/**"],"quota":"10","quotaInterval":"1","quotaTimeUnit":"minute","attributes":[{"name":"access","value":"public"}],
			"createdAt":1600000000000,"createdBy":"ann","proxies":["w1"],"operationGroup":{"operationConfigs": [ {"apiSource":"w1"} ]}}`)},
		LastModifiedAt: 1700000000000,
	}
	odd := apigee.Product{Product: catalog.Product{Name: "Odd", Details: object(t, `{"approvalType":"MANUAL","apiResources":"/","proxies":[1],"createdAt":"x","attributes":null}`)}}
	attributes := []catalog.Attribute{{Name: "DisplayName", Value: "x"}, {Name: "Notes"}}
	page := apigee.Page{NextToken: "t\"1", Total: 7}

	for word, e := range editions {
		for name, got := range map[string][]byte{
			"credential":                 e.Credential(credential),
			"credential-revealed":        e.Credential(revealed),
			"credential-new":             e.NewCredential(revealed),
			"app":                        e.App(app),
			"app-bare":                   e.App(bare),
			"app-of-organization":        e.OrganizationApp(app),
			"developer":                  e.Developer(ann),
			"developer-id-only":          e.Developer(idOnly),
			"product":                    e.Product(weather),
			"product-odd":                e.Product(odd),
			"organization":               e.Organization(apigee.Organization{Name: "acme", Environments: []string{"prod"}, CreatedAt: 1600000000000}),
			"attribute":                  e.Attribute(attributes[1]),
			"attributes":                 e.Attributes(attributes),
			"attributes-none":            e.Attributes(nil),
			"developers":                 e.Developers([]apigee.Developer{ann, idOnly}, false),
			"developers-expanded":        e.Developers([]apigee.Developer{ann}, true),
			"developers-none":            e.Developers(nil, false),
			"apps":                       e.DeveloperApps([]apigee.App{app, bare}, false),
			"apps-expanded":              e.DeveloperApps([]apigee.App{bare}, true),
			"apps-of-organization":       e.OrganizationApps([]apigee.App{app, bare}, false, page),
			"apps-of-organization-whole": e.OrganizationApps([]apigee.App{bare}, true, page),
			"products":                   e.Products([]apigee.Product{weather, odd}, false),
			"products-expanded":          e.Products([]apigee.Product{odd}, true),
			"products-none-expanded":     e.Products(nil, true),
			"error":                      e.Error(404, "developer.service.AppDoesNotExist", "App named <x> does not exist under ann@example.com", "18280987281239287153"),
		} {
			if err := jsonobject.Check(got); err != nil {
				t.Errorf("%s, %s: %v", name, word, err)
			}
			if i := bytes.IndexAny(got, "<>&\u2028\n"); i >= 0 {
				t.Errorf("%s, %s: byte %d of %q is not escaped for HTML", name, word, i, got)
			}
			for _, hidden := range []string{`"s1"`, `"s2"`, `"s3"`, "hint", `"v"`} {
				if bytes.Contains(got, []byte(hidden)) {
					t.Errorf("%s, %s: shows %s, want it hidden", name, word, hidden)
				}
			}
			golden(t, name, word, got)
		}
	}
}

// The word that X adds to an HTTP status.
func TestErrorStatusWords(t *testing.T) {
	for status, want := range map[int]string{
		400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 405: "UNIMPLEMENTED", 409: "ABORTED",
		412: "FAILED_PRECONDITION", 413: "INVALID_ARGUMENT", 418: "INVALID_ARGUMENT", 422: "INVALID_ARGUMENT",
		429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED", 599: "INTERNAL",
	} {
		var got struct {
			Error struct {
				Code   int
				Status string
			}
		}
		if err := json.Unmarshal(apigee.X.Error(status, "c", "m", "r"), &got); err != nil || got.Error.Status != want || got.Error.Code != status {
			t.Errorf("%d: got %d %s, %v, want %s", status, got.Error.Code, got.Error.Status, err, want)
		}
	}
}
