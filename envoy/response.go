package envoy

import (
	"bytes"
	"encoding/json"
	"net/url"
	"strings"
	"unicode/utf8"

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
	name string
	part part
}{
	{"x-keygate-organization", organizationPart},
	{"x-keygate-developer", developerPart},
	{"x-keygate-app", appPart},
	{"x-keygate-product", productPart},
	{"x-keygate-key-id", keyIDPart},
	{"x-keygate-scopes", scopesPart},
}

// metadataFields are what Envoy's access log and later filters learn, in
// namespace envoy.filters.http.ext_authz: names as they are, without escaping.
// What is empty is left out.
var metadataFields = [...]struct {
	name string
	part part
}{
	{"reason", reasonPart},
	{"key_id", keyIDPart},
	{"organization", organizationPart},
	{"developer", developerPart},
	{"app", appPart},
	{"product", productPart},
	{"scopes", scopesPart},
}

// part names a part of a decision. It is no function, through which every
// decision would escape to the heap.
type part uint8

const (
	reasonPart part = iota
	keyIDPart
	organizationPart
	developerPart
	appPart
	productPart
	scopesPart
)

// of returns the part of d as a text; keyID is that of the key's id, which has
// to be made, or "" for no key.
func (p part) of(d *authz.Decision, keyID string) string {
	switch p {
	case reasonPart:
		return d.Reason.String()
	case keyIDPart:
		return keyID
	case organizationPart:
		return string(d.Organization)
	case developerPart:
		return string(d.Developer)
	case appPart:
		return string(d.App)
	case productPart:
		return string(d.Product)
	case scopesPart:
		return d.Scopes
	}
	return ""
}

// keyID is the text of d's key id; "" for no key.
func keyID(d *authz.Decision) string {
	if d.KeyID == (authz.KeyID{}) {
		return ""
	}
	return d.KeyID.String()
}

// answers builds CheckResponses. It is immutable.
type answers struct {
	denials [authz.NumReasons]denial
	ok      *statuspb.Status
	remove  []string // headers that every allow removes
	query   []string // query parameters that every allow removes
	encoded encoded
}

// denial is the part of a refusal that is the same every time: shared between
// responses, never changed.
type denial struct {
	status   *statuspb.Status
	response *authv3.CheckResponse_DeniedResponse
}

// newAnswers needs a config that New has checked.
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
	a.encoded = newEncoded(&a)
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
		AppendAction: overwrite,
	}
}

const overwrite = corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD

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
	id := keyID(&d)
	for i, h := range identityHeaders {
		if value := headerSafe(h.part.of(&d, id)); value != "" {
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

// metadata is metadataFields of d.
func metadata(d authz.Decision) *structpb.Struct {
	fields := make(map[string]*structpb.Value, len(metadataFields))
	id := keyID(&d)
	for _, f := range metadataFields {
		if value := f.part.of(&d, id); value != "" {
			fields[f.name] = structpb.NewStringValue(sendable(value))
		}
	}
	return &structpb.Struct{Fields: fields}
}

// sendable is value as UTF-8: a string that is none could not be sent, and what
// cannot be sent is an error to Envoy rather than an answer.
func sendable(value string) string {
	if utf8.ValidString(value) { // many times as fast
		return value
	}
	return strings.ToValidUTF8(value, "\uFFFD")
}

// headerSafe is value in a form that any HTTP header can hold.
func headerSafe(value string) string {
	if strings.HasPrefix(value, " ") || strings.HasSuffix(value, " ") {
		return url.PathEscape(value)
	}
	for i := range len(value) {
		if b := value[i]; b < ' ' || b > '~' || b == '%' {
			return url.PathEscape(value)
		}
	}
	return value
}
