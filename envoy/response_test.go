package envoy

import (
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"keygate/authz"
)

// Every reason has a row, and none but Allowed is a yes.
func TestOutcomes(t *testing.T) {
	for r := range authz.NumReasons {
		o := outcomes[r]
		if r == authz.Allowed {
			if o.http != 200 || o.code != codes.OK {
				t.Errorf("%v: %+v, want 200 OK", r, o)
			}
			continue
		}
		if o.http < 401 || o.http > 599 || o.code == codes.OK || o.errorcode == "" || o.faultstring == "" {
			t.Errorf("%v: %+v, want a whole row that refuses", r, o)
		}
		if (o.http == 503) != (o.retryAfter != "") {
			t.Errorf("%v: status %d with retry-after %q", r, o.http, o.retryAfter)
		}
	}
}

// An allow cannot be built of a refusal, whatever else the decision says, and
// a denial is always one.
func TestAllowOnlyAllows(t *testing.T) {
	a := newAnswers(Config{KeyHeader: DefaultKeyHeader})
	whole := authz.Decision{Organization: worldOrg, KeyID: idOf(approvedKey), Product: weather, App: "a", Developer: "d"}
	for r := range authz.NumReasons + 2 { // also what is no reason at all
		d := whole
		d.Reason = r
		resp, ok := a.allow(d)
		if ok != (r == authz.Allowed) || (resp != nil) != ok {
			t.Errorf("allow of %v: %v, %v", r, resp, ok)
		}
		denied := a.deny(d)
		if denied.GetStatus().GetCode() == 0 || denied.GetDeniedResponse().GetStatus().GetCode() < 401 || denied.GetOkResponse() != nil {
			t.Errorf("deny of %v is not a denial: %v", r, denied)
		}
		if resp := a.respond(d); (resp.GetStatus().GetCode() == 0) != (r == authz.Allowed) || !complete(resp) {
			t.Errorf("response to %v: %v", r, resp)
		}
	}
	if resp := a.respond(authz.Decision{Reason: authz.Allowed}); resp.GetStatus().GetCode() == 0 {
		t.Errorf("an allow of nobody: %v", resp)
	}
}

// All refusals of a key look the same from outside when the body is uniform.
func TestUniformDenials(t *testing.T) {
	a := newAnswers(Config{KeyHeader: DefaultKeyHeader, DenialBody: DenialUniform})
	want := a.denials[authz.KeyUnknown].response.DeniedResponse
	for r := range authz.NumReasons {
		if got := a.denials[r].response.DeniedResponse; outcomes[r].http == 401 && !proto.Equal(got, want) {
			t.Errorf("%v: %v, want %v", r, got, want)
		}
	}
}

// Bodies are JSON of Apigee's form, and a 401 says how to authenticate.
func TestDenialForm(t *testing.T) {
	a := newAnswers(Config{KeyHeader: "x-key", KeyQuery: "key"})
	for r := range authz.NumReasons {
		denied := a.denials[r].response.DeniedResponse
		var body struct {
			Fault struct {
				Faultstring string
				Detail      struct{ Errorcode string }
			}
		}
		if err := json.Unmarshal([]byte(denied.GetBody()), &body); err != nil || body.Fault.Detail.Errorcode == "" {
			t.Errorf("%v: body %s: %v", r, denied.GetBody(), err)
		}
		headers := map[string]string{}
		for _, h := range denied.GetHeaders() {
			headers[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
		}
		if headers["content-type"] != "application/json" {
			t.Errorf("%v: content type %q", r, headers["content-type"])
		}
		challenge := ""
		if denied.GetStatus().GetCode() == 401 {
			challenge = `ApiKey realm="keygate", header="x-key", query="key"`
		}
		if headers["www-authenticate"] != challenge {
			t.Errorf("%v: www-authenticate %q, want %q", r, headers["www-authenticate"], challenge)
		}
	}
	const missing = `{"fault":{"faultstring":"Failed to resolve API Key variable request.header.x-key","detail":{"errorcode":"steps.oauth.v2.FailedToResolveAPIKey"}}}`
	if got := a.denials[authz.KeyMissing].response.DeniedResponse.GetBody(); got != missing {
		t.Errorf("body of a missing key: %s, want %s", got, missing)
	}
}

// Names that a header cannot hold are escaped, so that unescaping always gives
// the name back, and no two names look alike.
func TestHeaderSafe(t *testing.T) {
	for _, name := range []string{"", "plain", "two words", " led", "trailing ", " ", "50%", "50%25", "a\r\nb: c", "é", "\x00", "\xff", "tab\t", "read write"} {
		got := headerSafe(name)
		if back, err := url.PathUnescape(got); err != nil || back != name {
			t.Errorf("%q became %q and back %q, %v", name, got, back, err)
		}
		if strings.Trim(got, " ") != got || strings.ContainsFunc(got, func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("%q became %q, which a header cannot hold", name, got)
		}
	}
	if got := headerSafe("two words"); got != "two words" {
		t.Errorf("a name of printable ASCII became %q", got)
	}
}

// An allow removes every name that a backend may read as the key's header or
// as identity, and never the same header that it sets.
func TestRemovedHeaders(t *testing.T) {
	a := newAnswers(Config{KeyHeader: "x-api-key"})
	resp, _ := a.allow(authz.Decision{Reason: authz.Allowed, Organization: "o", KeyID: idOf(approvedKey), Product: "p"})
	removed := resp.GetOkResponse().GetHeadersToRemove()
	for _, name := range []string{"x-api-key", "x_api_key", "x_api-key", "x-api_key", "x_keygate_app", "x-keygate_app", "x_keygate-key_id",
		"x-keygate-app", "x-keygate-developer", "x-keygate-scopes"} {
		if !slices.Contains(removed, name) {
			t.Errorf("%s is not removed", name)
		}
	}
	for _, h := range resp.GetOkResponse().GetHeaders() {
		if slices.Contains(removed, h.GetHeader().GetKey()) {
			t.Errorf("%s is both set and removed", h.GetHeader().GetKey())
		}
	}
	again, _ := a.allow(authz.Decision{Reason: authz.Allowed, Organization: "o", KeyID: idOf(approvedKey), Product: "p", App: "a", Developer: "d", Scopes: "s"})
	if removed := again.GetOkResponse().GetHeadersToRemove(); slices.Contains(removed, "x-keygate-app") {
		t.Errorf("one response's removals reached another: %v", removed)
	}
}

// What cannot be sent would be an error to Envoy, not an answer.
func TestResponseAlwaysMarshals(t *testing.T) {
	a := newAnswers(Config{KeyHeader: "x-api-key"})
	d := authz.Decision{Reason: authz.Allowed, Organization: "o\xff", KeyID: idOf(approvedKey), Product: "p\xff", App: "a\xff", Developer: "d\xff", Scopes: "s\xff"}
	for _, reason := range []authz.Reason{authz.Allowed, authz.KeyRevoked} {
		d.Reason = reason
		if _, err := proto.Marshal(a.respond(d)); err != nil {
			t.Errorf("%v: %v", reason, err)
		}
	}
}
