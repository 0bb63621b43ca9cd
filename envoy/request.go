package envoy

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"unsafe"

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

// attributes are what a check says, in whatever form it came: whoever reads a
// check fills them in, and judge alone says what they mean. The strings may be
// views of memory that is used again once the check has been answered; nothing
// that judge returns refers to them.
type attributes struct {
	// keys counts the key headers, key is the last one's value. differs tells of
	// one whose value and raw_value are not the same.
	keys    int
	key     string
	differs bool
	path    string // with the query
	// What the route's metadata says in keygate's namespace. The product may be a
	// list, which has listed items; list is the first maxProducts of them.
	product, organization value
	list                  []value
	listed                int
	// Context extensions.
	extensionProduct, extensionOrganization value
}

// value is one of the things that a route may name.
type value struct {
	kind valueKind
	text string // of a valueText
}

type valueKind uint8

const (
	valueAbsent valueKind = iota
	valueText
	valueList
	valueOther // there is something, and it is no string and no list
)

// text is b as a string that shares its memory.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// addItem takes one value of the product's list.
func (a *attributes) addItem(v value) {
	if a.listed++; a.listed <= maxProducts {
		a.list = append(a.list, v)
	}
}

// addKey takes one key header of header_map. In one form or in both it holds one
// value.
func (a *attributes) addKey(value, raw string) {
	if raw == "" {
		raw = value
	}
	a.differs = a.differs || value != "" && value != raw
	a.key = raw
	a.keys++
}

// reset forgets everything but the memory of the list.
func (a *attributes) reset() {
	clear(a.list)
	*a = attributes{list: a.list[:0]}
}

// read fills a from req. Envoy puts headers into one of header_map
// (encode_raw_headers) and headers; should both be filled, both count. In
// headers a comma may join several; no key holds one.
func (a *attributes) read(req *authv3.CheckRequest, header string) {
	attributes := req.GetAttributes()
	http := attributes.GetRequest().GetHttp()
	a.path = http.GetPath()
	for _, h := range http.GetHeaderMap().GetHeaders() {
		if strings.EqualFold(h.GetKey(), header) {
			a.addKey(h.GetValue(), text(h.GetRawValue()))
		}
	}
	for k, v := range http.GetHeaders() {
		if strings.EqualFold(k, header) {
			a.addKey(v, "")
		}
	}
	fields := attributes.GetRouteMetadataContext().GetFilterMetadata()[metadataNamespace].GetFields()
	if v, ok := fields[metadataProduct]; ok {
		a.product = readValue(v)
		for _, item := range v.GetListValue().GetValues() {
			a.addItem(readValue(item))
		}
	}
	if v, ok := fields[metadataOrganization]; ok {
		a.organization = readValue(v)
	}
	extensions := attributes.GetContextExtensions()
	if v, ok := extensions[extensionProduct]; ok {
		a.extensionProduct = value{valueText, v}
	}
	if v, ok := extensions[extensionOrg]; ok {
		a.extensionOrganization = value{valueText, v}
	}
}

func readValue(v *structpb.Value) value {
	switch kind := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		return value{valueText, kind.StringValue}
	case *structpb.Value_ListValue:
		return value{kind: valueList}
	}
	return value{kind: valueOther}
}

// question is what a CheckRequest asks. With a reason other than Allowed it
// cannot be asked; request then holds what was understood of it.
type question struct {
	request authz.Request
	reason  authz.Reason
	problem string // for the operator; holds no part of a key
}

// judge understands a. A missing or malformed key comes before anything that
// is wrong with the route. The request's products are appended to products.
func (s *Service) judge(a *attributes, products []authz.ProductName) question {
	var q question
	q.request.KeyID, q.reason, q.problem = judgeKey(a, s.config.KeyQuery)
	products, err := s.routeProducts(a, products)
	org, orgErr := s.routeOrganization(a)
	if err == nil {
		err = orgErr
	}
	q.request.Products, q.request.Organization = products, org
	if q.reason == authz.Allowed && err != nil {
		q.reason, q.problem = authz.ProductUnresolved, err.Error()
	}
	return q
}

// judgeKey finds the consumer key in the configured places. All candidates are
// counted and none of two is ever picked, with one exception: a header and a
// query parameter that hold the same are one key, and both are stripped.
func judgeKey(a *attributes, query string) (authz.KeyID, authz.Reason, string) {
	if a.differs {
		return authz.KeyID{}, authz.KeyMalformed, "the key header's two forms differ"
	}
	if a.keys > 1 {
		return authz.KeyID{}, authz.KeyMalformed, fmt.Sprintf("%d key headers", a.keys)
	}
	candidate := a.key
	if query != "" {
		value, n, err := queryCandidate(a.path, query)
		switch {
		case err != "":
			return authz.KeyID{}, authz.KeyMalformed, err
		case n > 1:
			return authz.KeyID{}, authz.KeyMalformed, fmt.Sprintf("%d key parameters in the query", n)
		case n == 1 && a.keys == 1 && value != a.key:
			return authz.KeyID{}, authz.KeyMalformed, "the key header and the key parameter in the query differ"
		case n == 1:
			candidate = value
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

// Errors that every check of some route ends in are made once.
var (
	errNoProduct = fmt.Errorf("the route names no product: neither metadata %s.%s nor context extension %s",
		metadataNamespace, metadataProduct, extensionProduct)
	errNoOrganization  = errors.New("the route names no organization and there is no default")
	errNotString       = errors.New("a value that is not a string")
	errProductsDiffer  = fmt.Errorf("route metadata and context extension %s name different products", extensionProduct)
	errOrganizationDot = errors.New("a name that begins with a dot")
)

// routeProducts appends what the route names to products. Two places that name
// something must name the same.
func (s *Service) routeProducts(a *attributes, products []authz.ProductName) ([]authz.ProductName, error) {
	inMetadata, inExtensions := a.product.kind != valueAbsent, a.extensionProduct.kind != valueAbsent
	if !inMetadata && !inExtensions {
		return nil, errNoProduct
	}
	if inMetadata {
		var err error
		if products, err = s.metadataProducts(a, products); err != nil {
			return nil, fmt.Errorf("route metadata %s.%s: %w", metadataNamespace, metadataProduct, err)
		}
	}
	if inExtensions {
		extension := a.extensionProduct.text
		if err := checkName(extension); err != nil {
			return nil, fmt.Errorf("context extension %s: %w", extensionProduct, err)
		}
		if inMetadata && (len(products) != 1 || string(products[0]) != extension) {
			return nil, errProductsDiffer
		}
		if !inMetadata {
			products = append(products, authz.ProductName(s.names.own(extension)))
		}
	}
	return products, nil
}

func (s *Service) metadataProducts(a *attributes, products []authz.ProductName) ([]authz.ProductName, error) {
	if a.product.kind != valueList {
		name, err := a.product.name()
		if err != nil {
			return nil, err
		}
		return append(products, authz.ProductName(s.names.own(name))), nil
	}
	if a.listed == 0 || a.listed > maxProducts {
		return nil, fmt.Errorf("a list of %d, want 1 to %d", a.listed, maxProducts)
	}
	for _, v := range a.list {
		name, err := v.name()
		if err != nil {
			return nil, err
		}
		products = append(products, authz.ProductName(s.names.own(name)))
	}
	return products, nil
}

func (s *Service) routeOrganization(a *attributes) (authz.Organization, error) {
	inMetadata, inExtensions := a.organization.kind != valueAbsent, a.extensionOrganization.kind != valueAbsent
	if !inMetadata && !inExtensions {
		if s.config.Organization == "" {
			return "", errNoOrganization
		}
		return s.config.Organization, nil
	}
	extension := a.extensionOrganization.text
	org := extension
	if inMetadata {
		var err error
		if org, err = a.organization.name(); err != nil {
			return "", fmt.Errorf("route metadata %s.%s: %w", metadataNamespace, metadataOrganization, err)
		}
	}
	switch err := checkOrganization(org); {
	case err != nil:
		return "", fmt.Errorf("the route's organization: %w", err)
	case inMetadata && inExtensions && extension != org:
		return "", fmt.Errorf("route metadata and context extension %s name different organizations", extensionOrg)
	}
	return authz.Organization(s.names.own(org)), nil
}

// checkOrganization tells whether name can be an organization's: it never
// begins with a dot.
func checkOrganization(name string) error {
	if strings.HasPrefix(name, ".") {
		return errOrganizationDot
	}
	return checkName(name)
}

// name is the name that v holds, which must be a string.
func (v value) name() (string, error) {
	if v.kind != valueText {
		return "", errNotString
	}
	return v.text, checkName(v.text)
}

func checkName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("a name of %d bytes, want 1 to %d", len(name), maxName)
	}
	return nil
}
