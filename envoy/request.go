package envoy

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"keygate/authz"
)

// Where a route names its API product and its organization. Both are the
// operator's own configuration; nothing that a client can write is read:
// neither metadata_context (dynamic metadata), nor headers, nor the path.
const (
	metadataNamespace    = "keygate"
	metadataProduct      = "product"      // a string, or a list of strings: any one of them
	metadataOrganization = "organization" // a string
	extensionProduct     = "keygate.product"
	extensionOrg         = "keygate.organization"
)

// Bounds of what a route may name.
const (
	maxName     = 256 // bytes in the name of a product or an organization
	maxProducts = 64
)

// question is what a CheckRequest asks. With a reason other than Allowed it
// cannot be asked; request then holds what was understood of it.
type question struct {
	request authz.Request
	reason  authz.Reason
	problem string // for the operator; holds no part of a key
}

// read understands req. A missing or malformed key comes before anything that
// is wrong with the route.
func (s *Service) read(req *authv3.CheckRequest) question {
	attributes := req.GetAttributes()
	key, reason, problem := s.key(attributes.GetRequest().GetHttp())
	q := question{request: authz.Request{KeyID: key}, reason: reason, problem: problem}

	fields := attributes.GetRouteMetadataContext().GetFilterMetadata()[metadataNamespace].GetFields()
	extensions := attributes.GetContextExtensions()
	products, err := routeProducts(fields, extensions)
	org, orgErr := s.routeOrganization(fields, extensions)
	if err == nil {
		err = orgErr
	}
	q.request.Products, q.request.Organization = products, org
	if q.reason == authz.Allowed && err != nil {
		q.reason, q.problem = authz.ProductUnresolved, err.Error()
	}
	return q
}

// key finds the consumer key in the configured places. All candidates are
// counted and none of two is ever picked, with one exception: a header and a
// query parameter that hold the same are one key, and both are stripped.
func (s *Service) key(http *authv3.AttributeContext_HttpRequest) (authz.KeyID, authz.Reason, string) {
	header, n, ok := headerCandidate(http, s.config.KeyHeader)
	if !ok {
		return authz.KeyID{}, authz.KeyMalformed, "the key header's two forms differ"
	}
	if n > 1 {
		return authz.KeyID{}, authz.KeyMalformed, fmt.Sprintf("%d key headers", n)
	}
	candidate := header
	if s.config.KeyQuery != "" {
		query, m, err := queryCandidate(http.GetPath(), s.config.KeyQuery)
		switch {
		case err != "":
			return authz.KeyID{}, authz.KeyMalformed, err
		case m > 1:
			return authz.KeyID{}, authz.KeyMalformed, fmt.Sprintf("%d key parameters in the query", m)
		case m == 1 && n == 1 && query != header:
			return authz.KeyID{}, authz.KeyMalformed, "the key header and the key parameter in the query differ"
		case m == 1:
			candidate = query
		}
	}
	key, reason := authz.ParseConsumerKey(candidate)
	switch reason {
	case authz.Allowed:
		return key.ID(), reason, ""
	case authz.KeyMissing:
		return authz.KeyID{}, reason, ""
	}
	return authz.KeyID{}, reason, "not in the form of a key"
}

// headerCandidate counts the values of a header, in header_map
// (encode_raw_headers) and in headers, and returns the last. Envoy fills one
// of the two; should both be filled, both count. In headers a comma may join
// several; no key holds one. It is false for an entry whose value and
// raw_value differ.
func headerCandidate(http *authv3.AttributeContext_HttpRequest, name string) (value string, n int, ok bool) {
	for _, h := range http.GetHeaderMap().GetHeaders() {
		if !strings.EqualFold(h.GetKey(), name) {
			continue
		}
		if value, ok = headerValue(h); !ok {
			return "", 0, false
		}
		n++
	}
	for k, v := range http.GetHeaders() {
		if strings.EqualFold(k, name) {
			value, n = v, n+1
		}
	}
	return value, n, true
}

func headerValue(h *corev3.HeaderValue) (string, bool) {
	raw, value := h.GetRawValue(), h.GetValue()
	switch {
	case len(raw) == 0:
		return value, true
	case value != "" && value != string(raw):
		return "", false
	case len(raw) > authz.MaxKeyLength:
		// As long as it takes to be refused, without a copy of it all.
		return string(raw[:authz.MaxKeyLength+1]), true
	}
	return string(raw), true
}

// queryCandidate counts the parameters of this very name and returns the last
// one's value, unescaped ("+" is a blank, so a key's own must come as %2B).
// Only the name as it stands counts, because only that one is removed by Envoy:
// a name that is the same only after unescaping is an error, and so is
// anything that parsers read differently, above all a semicolon. The path is
// never parsed as a URL: one that begins with "//" would lose its front.
func queryCandidate(path, name string) (value string, n int, problem string) {
	_, query, _ := strings.Cut(path, "?")
	for query != "" {
		var parameter string
		parameter, query, _ = strings.Cut(query, "&")
		if strings.Contains(parameter, ";") {
			return "", 0, "a semicolon in the query"
		}
		rawName, rawValue, _ := strings.Cut(parameter, "=")
		unescaped, err := url.QueryUnescape(rawName)
		if err != nil {
			return "", 0, "a broken escape in the query"
		}
		v, err := url.QueryUnescape(rawValue)
		if err != nil {
			return "", 0, "a broken escape in the query"
		}
		switch {
		case rawName == name:
			value, n = v, n+1
		case unescaped == name:
			return "", 0, "the key parameter's name is escaped"
		}
	}
	return value, n, ""
}

// routeProducts is what the route names. Two places that name something must
// name the same.
func routeProducts(fields map[string]*structpb.Value, extensions map[string]string) ([]authz.ProductName, error) {
	field, inMetadata := fields[metadataProduct]
	extension, inExtensions := extensions[extensionProduct]
	if !inMetadata && !inExtensions {
		return nil, fmt.Errorf("the route names no product: neither metadata %s.%s nor context extension %s", metadataNamespace, metadataProduct, extensionProduct)
	}
	var products []authz.ProductName
	if inMetadata {
		var err error
		if products, err = metadataProducts(field); err != nil {
			return nil, fmt.Errorf("route metadata %s.%s: %w", metadataNamespace, metadataProduct, err)
		}
	}
	if inExtensions {
		if err := checkName(extension); err != nil {
			return nil, fmt.Errorf("context extension %s: %w", extensionProduct, err)
		}
		if inMetadata && (len(products) != 1 || string(products[0]) != extension) {
			return nil, fmt.Errorf("route metadata and context extension %s name different products", extensionProduct)
		}
		products = []authz.ProductName{authz.ProductName(extension)}
	}
	return products, nil
}

func metadataProducts(v *structpb.Value) ([]authz.ProductName, error) {
	list, isList := v.GetKind().(*structpb.Value_ListValue)
	if !isList {
		name, err := stringValue(v)
		if err != nil {
			return nil, err
		}
		return []authz.ProductName{authz.ProductName(name)}, nil
	}
	values := list.ListValue.GetValues()
	if len(values) == 0 || len(values) > maxProducts {
		return nil, fmt.Errorf("a list of %d, want 1 to %d", len(values), maxProducts)
	}
	products := make([]authz.ProductName, 0, len(values))
	for _, v := range values {
		name, err := stringValue(v)
		if err != nil {
			return nil, err
		}
		products = append(products, authz.ProductName(name))
	}
	return products, nil
}

func (s *Service) routeOrganization(fields map[string]*structpb.Value, extensions map[string]string) (authz.Organization, error) {
	field, inMetadata := fields[metadataOrganization]
	extension, inExtensions := extensions[extensionOrg]
	if !inMetadata && !inExtensions {
		if s.config.Organization == "" {
			return "", errors.New("the route names no organization and there is no default")
		}
		return s.config.Organization, nil
	}
	org := extension
	if inMetadata {
		var err error
		if org, err = stringValue(field); err != nil {
			return "", fmt.Errorf("route metadata %s.%s: %w", metadataNamespace, metadataOrganization, err)
		}
	}
	switch err := checkOrganization(org); {
	case err != nil:
		return "", fmt.Errorf("the route's organization: %w", err)
	case inMetadata && inExtensions && extension != org:
		return "", fmt.Errorf("route metadata and context extension %s name different organizations", extensionOrg)
	}
	return authz.Organization(org), nil
}

// checkOrganization tells whether name can be an organization's: it never
// begins with a dot.
func checkOrganization(name string) error {
	if strings.HasPrefix(name, ".") {
		return errors.New("a name that begins with a dot")
	}
	return checkName(name)
}

// stringValue is the name in a metadata value, which must be a string.
func stringValue(v *structpb.Value) (string, error) {
	s, ok := v.GetKind().(*structpb.Value_StringValue)
	if !ok {
		return "", errors.New("a value that is not a string")
	}
	return s.StringValue, checkName(s.StringValue)
}

func checkName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("a name of %d bytes, want 1 to %d", len(name), maxName)
	}
	return nil
}
