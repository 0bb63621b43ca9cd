package envoy

import (
	"bytes"
	"encoding/json"
	"net/url"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"

	"keygate/authz"
)

// outcome is what a client is told of a reason.
type outcome struct {
	http typev3.StatusCode
	code codes.Code
	// errorcode and faultstring as Apigee's VerifyAPIKey has them. Those that
	// begin with "keygate." stand for what Apigee has no word for.
	errorcode   string
	faultstring string // headerPlaceholder stands for the key header's name
	retryAfter  string // seconds; "" for no such header
}

const headerPlaceholder = "{header}"

// outcomes is the one table from reasons to answers.
//
// An unreadable record is an invalid key, as it is for Apigee, whose query
// joins key, app, developer and product and finds nothing if one is missing.
// A route without a product has the words of apid, Apigee's open verifier.
var outcomes = [authz.NumReasons]outcome{
	authz.Allowed: {http: typev3.StatusCode_OK, code: codes.OK},
	authz.KeyMissing: {http: 401, code: codes.Unauthenticated,
		errorcode: "steps.oauth.v2.FailedToResolveAPIKey", faultstring: "Failed to resolve API Key variable request.header." + headerPlaceholder},
	authz.KeyMalformed: {http: 401, code: codes.Unauthenticated,
		errorcode: "oauth.v2.InvalidApiKey", faultstring: "Invalid ApiKey"},
	authz.KeyUnknown: {http: 401, code: codes.Unauthenticated,
		errorcode: "oauth.v2.InvalidApiKey", faultstring: "Invalid ApiKey"},
	authz.KeyRevoked: {http: 401, code: codes.Unauthenticated,
		errorcode: "oauth.v2.ApiKeyNotApproved", faultstring: "ApiKey not approved"},
	authz.KeyPending: {http: 401, code: codes.Unauthenticated,
		errorcode: "oauth.v2.ApiKeyNotApproved", faultstring: "ApiKey not approved"},
	authz.KeyExpired: {http: 401, code: codes.Unauthenticated,
		errorcode: "keymanagement.service.consumer_key_expired", faultstring: "Key Expired"},
	authz.AppRevoked: {http: 401, code: codes.Unauthenticated,
		errorcode: "keymanagement.service.invalid_client-app_not_approved", faultstring: "App not Approved"},
	authz.AppPending: {http: 401, code: codes.Unauthenticated,
		errorcode: "keymanagement.service.invalid_client-app_not_approved", faultstring: "App not Approved"},
	authz.DeveloperInactive: {http: 401, code: codes.Unauthenticated,
		errorcode: "keymanagement.service.DeveloperStatusNotActive", faultstring: "Developer Status is not Active"},
	authz.ProductNotOnKey: {http: 401, code: codes.Unauthenticated,
		errorcode: "oauth.v2.InvalidApiKeyForGivenResource", faultstring: "Invalid ApiKey for given resource"},
	authz.ProductRevoked: {http: 401, code: codes.Unauthenticated,
		errorcode: "oauth.v2.InvalidApiKeyForGivenResource", faultstring: "Invalid ApiKey for given resource"},
	authz.ProductPending: {http: 401, code: codes.Unauthenticated,
		errorcode: "oauth.v2.InvalidApiKeyForGivenResource", faultstring: "Invalid ApiKey for given resource"},
	authz.RecordUnreadable: {http: 401, code: codes.Unauthenticated,
		errorcode: "oauth.v2.InvalidApiKey", faultstring: "Invalid ApiKey"},
	authz.ProductUnresolved: {http: 403, code: codes.PermissionDenied,
		errorcode: "oauth.v2.InvalidApiKeyForGivenResource", faultstring: "Path Validation Failed. Product not resolved"},
	authz.Stale: {http: 503, code: codes.Unavailable,
		errorcode: "keygate.ServiceUnavailable", faultstring: "The Service is temporarily unavailable", retryAfter: "1"},
	authz.Overloaded: {http: 503, code: codes.Unavailable,
		errorcode: "keygate.ServiceUnavailable", faultstring: "The Service is temporarily unavailable", retryAfter: "1"},
	authz.Internal: {http: 500, code: codes.Internal,
		errorcode: "keygate.InternalError", faultstring: "Internal error"},
}

// Headers that an allow sets towards the upstream, or removes where the
// decision has nothing to say: whatever a client sent under these names is
// gone. No other x-keygate- name means anything.
//
// A value that holds a byte outside printable ASCII, or a percent sign, is
// url.PathEscape'd, so that unescaping always gives the name; scopes are
// joined by blanks, which stay.
var identityHeaders = [...]struct {
	name  string
	value func(authz.Decision) string
}{
	{"x-keygate-organization", func(d authz.Decision) string { return string(d.Organization) }},
	{"x-keygate-developer", func(d authz.Decision) string { return string(d.Developer) }},
	{"x-keygate-app", func(d authz.Decision) string { return string(d.App) }},
	{"x-keygate-product", func(d authz.Decision) string { return string(d.Product) }},
	{"x-keygate-key-id", func(d authz.Decision) string { return d.KeyID.String() }},
	{"x-keygate-scopes", func(d authz.Decision) string { return d.Scopes }},
}

// answers builds CheckResponses. It is immutable.
type answers struct {
	denials [authz.NumReasons]denial
	ok      *statuspb.Status
	remove  []string // headers that every allow removes
	query   []string // query parameters that every allow removes
}

// denial is the part of a refusal that is the same every time: shared between
// responses, never changed.
type denial struct {
	status   *statuspb.Status
	response *authv3.CheckResponse_DeniedResponse
}

func newAnswers(config Config) answers {
	a := answers{
		ok:     &statuspb.Status{Code: int32(codes.OK)},
		remove: append([]string{config.KeyHeader}, underscored(config.KeyHeader)...),
	}
	for _, h := range identityHeaders {
		a.remove = append(a.remove, underscored(h.name)...)
	}
	if config.KeyQuery != "" {
		a.query = []string{config.KeyQuery}
	}
	for r := range authz.NumReasons {
		a.denials[r] = newDenial(r, config)
	}
	return a
}

// underscored lists the names that a backend may take for name because it
// folds hyphens and underscores (CGI, WSGI): every mixture but name itself.
func underscored(name string) []string {
	var at []int
	for i := range len(name) {
		if name[i] == '-' {
			at = append(at, i)
		}
	}
	var names []string
	for mask := 1; mask < 1<<len(at); mask++ {
		variant := []byte(name)
		for bit, i := range at {
			if mask&(1<<bit) != 0 {
				variant[i] = '_'
			}
		}
		names = append(names, string(variant))
	}
	return names
}

// newDenial builds the constant part of a refusal; that of Allowed is an
// internal error's, should anyone ask for it.
func newDenial(reason authz.Reason, config Config) denial {
	if reason == authz.Allowed {
		reason = authz.Internal
	}
	o := outcomes[reason]
	shown := o
	if config.DenialBody == DenialUniform && o.http == 401 {
		shown = outcomes[authz.KeyUnknown]
	}
	headers := []*corev3.HeaderValueOption{header("content-type", "application/json")}
	if o.http == 401 {
		challenge := `ApiKey realm="keygate", header="` + config.KeyHeader + `"`
		if config.KeyQuery != "" {
			challenge += `, query="` + config.KeyQuery + `"`
		}
		headers = append(headers, header("www-authenticate", challenge))
	}
	if o.retryAfter != "" {
		headers = append(headers, header("retry-after", o.retryAfter))
	}
	return denial{
		status: &statuspb.Status{Code: int32(o.code), Message: reason.String()},
		response: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status:  &typev3.HttpStatus{Code: o.http},
			Headers: headers,
			Body:    faultBody(shown.errorcode, strings.ReplaceAll(shown.faultstring, headerPlaceholder, config.KeyHeader)),
		}},
	}
}

// faultBody is Apigee's JSON of a fault.
func faultBody(errorcode, faultstring string) string {
	type detail struct {
		Errorcode string `json:"errorcode"`
	}
	type fault struct {
		Faultstring string `json:"faultstring"`
		Detail      detail `json:"detail"`
	}
	var b bytes.Buffer
	// Neither the types nor a buffer can fail.
	_ = json.NewEncoder(&b).Encode(map[string]fault{"fault": {faultstring, detail{errorcode}}})
	return strings.TrimSuffix(b.String(), "\n")
}

func header(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: name, Value: value},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}

// respond is the one way from a decision to a response.
func (a *answers) respond(d authz.Decision) *authv3.CheckResponse {
	if resp, ok := a.allow(d); ok {
		return resp
	}
	return a.deny(d)
}

// allow is the one constructor of a response that Envoy takes as a yes. It is
// false unless d allows and says whom and what.
func (a *answers) allow(d authz.Decision) (*authv3.CheckResponse, bool) {
	if !d.Allowed() || !identified(d) {
		return nil, false
	}
	ok := &authv3.OkHttpResponse{
		Headers:                 make([]*corev3.HeaderValueOption, 0, len(identityHeaders)),
		HeadersToRemove:         a.remove,
		QueryParametersToRemove: a.query,
	}
	for i, h := range identityHeaders {
		if value := headerSafe(h.value(d)); value != "" {
			ok.Headers = append(ok.Headers, header(h.name, value))
			continue
		}
		if len(ok.HeadersToRemove) == len(a.remove) { // still the shared slice
			ok.HeadersToRemove = append(make([]string, 0, len(a.remove)+len(identityHeaders)-i), a.remove...)
		}
		ok.HeadersToRemove = append(ok.HeadersToRemove, h.name)
	}
	return &authv3.CheckResponse{
		Status:          a.ok,
		HttpResponse:    &authv3.CheckResponse_OkResponse{OkResponse: ok},
		DynamicMetadata: metadata(d),
	}, true
}

// identified tells whether d says whose key it is and what it may use.
func identified(d authz.Decision) bool {
	return d.KeyID != (authz.KeyID{}) && d.Organization != "" && d.Product != ""
}

// deny is the one constructor of a refusal. A decision that allows is refused
// as an internal error: it got here because no allow could be built of it.
func (a *answers) deny(d authz.Decision) *authv3.CheckResponse {
	if d.Reason >= authz.NumReasons || d.Reason == authz.Allowed {
		d.Reason = authz.Internal
	}
	constant := a.denials[d.Reason]
	return &authv3.CheckResponse{
		Status:          constant.status,
		HttpResponse:    constant.response,
		DynamicMetadata: metadata(d),
	}
}

// metadata is what Envoy's access log and later filters learn, in namespace
// envoy.filters.http.ext_authz: names as they are, without escaping.
func metadata(d authz.Decision) *structpb.Struct {
	fields := make(map[string]*structpb.Value, 8)
	set := func(name, value string) {
		if value != "" {
			// A string that is not UTF-8 could not be sent, and what cannot be
			// sent is an error to Envoy rather than an answer.
			fields[name] = structpb.NewStringValue(strings.ToValidUTF8(value, "\uFFFD"))
		}
	}
	set("reason", d.Reason.String())
	if d.KeyID != (authz.KeyID{}) {
		set("key_id", d.KeyID.String())
	}
	set("organization", string(d.Organization))
	set("developer", string(d.Developer))
	set("app", string(d.App))
	set("product", string(d.Product))
	set("scopes", d.Scopes)
	return &structpb.Struct{Fields: fields}
}

// headerSafe is value in a form that any HTTP header can hold.
func headerSafe(value string) string {
	for i := range len(value) {
		blankAtEnd := value[i] == ' ' && (i == 0 || i == len(value)-1)
		if value[i] < ' ' || value[i] > '~' || value[i] == '%' || blankAtEnd {
			return url.PathEscape(value)
		}
	}
	return value
}
