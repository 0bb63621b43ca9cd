package envoy

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"time"

	"keygate/authz"
)

// Paths of the HTTP door, in their one spelling. The whole request target is
// compared, so a query, another escape or a slash more makes it another path.
const (
	// HTTPHealthPath answers 204 when the service is ready and 503 when it is
	// not. Envoy's ext_authz takes 204 for a refusal, so a route that sends its
	// checks here by mistake is closed.
	HTTPHealthPath = "/v1/health"
	// httpNoProduct is the path of a route that names no product.
	httpNoProduct    = "/v1/check"
	httpOrganization = "/v1/check/organization/" // name, then "/product/" and names
	httpProduct      = "/v1/check/product/"      // names, with slashes between
)

// Limits of a server of the HTTP door; those of ServerOptions hold where they
// have a meaning.
const (
	// HTTPHeaderTimeout for a request, from its first byte or the connection's
	// start to the end of its header.
	HTTPHeaderTimeout = 5 * time.Second
	// HTTPWriteTimeout for an answer, from the end of the request's header.
	HTTPWriteTimeout = 10 * time.Second
	// HTTPIdleTimeout of a connection. It is longer than Envoy's in the
	// configuration that keygate brings along, so that Envoy closes first and
	// never sends a check into a connection that is being closed.
	HTTPIdleTimeout = 5 * time.Minute
	// maxHTTPTimeout is the longest deadline that a check may bring along.
	maxHTTPTimeout = time.Minute
)

// HTTPServer returns a server that answers the checks of Envoy's HTTP
// ext_authz, over HTTP/1.1 and over HTTP/2 with or without TLS. The caller
// serves and stops it. ready, which may be nil, tells the health path why
// checks should go elsewhere.
//
// Envoy sends such a check as an HTTP request: the client's method, the headers
// that are allowed to travel, and a path. The path alone says what the route
// needs, and it must be path_override of the route's own http_service:
//
//	/v1/check/product/<product>[/<product>...]
//	/v1/check/organization/<organization>/product/<product>[/<product>...]
//
// with each name url.PathEscape'd. Nothing of the client's is in such a path.
// Any other path names no product and is refused; so is CONNECT, for which
// Envoy sends the client's authority instead of a path.
//
// 200 is the answer to a check that is allowed and to nothing else. Envoy takes
// a 5xx for an error: it then answers by status_on_error, without the body, and
// lets the request pass under failure_mode_allow.
//
// A key in the query, which is not sent, cannot be seen or removed, so a service
// with Config.KeyQuery has no such door.
func (s *Service) HTTPServer(ready func() error) (*http.Server, error) {
	if s.config.KeyQuery != "" {
		return nil, errors.New("a key in the query can be neither sent nor removed by Envoy's HTTP ext_authz")
	}
	server := &http.Server{
		Handler:           newHTTPDoor(s, ready),
		Protocols:         new(http.Protocols),
		ReadHeaderTimeout: HTTPHeaderTimeout,
		ReadTimeout:       HTTPHeaderTimeout,
		WriteTimeout:      HTTPWriteTimeout,
		IdleTimeout:       HTTPIdleTimeout,
		MaxHeaderBytes:    MaxHeaderBytes,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: MaxConcurrentStreams,
			SendPingTimeout:      KeepaliveTime,
			PingTimeout:          KeepaliveTimeout,
			WriteByteTimeout:     HTTPWriteTimeout,
		},
		// net/http would answer "OPTIONS *" by itself, with 200.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(s.config.Logger.Handler(), slog.LevelDebug),
	}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetHTTP2(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	return server, nil
}

// httpDoor is the handler of HTTPServer. It is immutable, and no ServeMux: that
// would answer a path it wants otherwise with a redirect.
type httpDoor struct {
	service *Service
	ready   func() error
	header  string // the key header, in Go's spelling
	denials [authz.NumReasons]httpDenial
	remove  []string // one value that names what every allow removes
	names   [len(identityHeaders)]string
}

// httpDenial is a refusal that is ready to be written, shared and never changed.
type httpDenial struct {
	status int
	header http.Header
	body   []byte
}

// Headers of Envoy's own.
const (
	httpRemoveHeader  = "X-Envoy-Auth-Headers-To-Remove"
	httpTimeoutHeader = "X-Envoy-Expected-Rq-Timeout-Ms"
)

func newHTTPDoor(s *Service, ready func() error) *httpDoor {
	if ready == nil {
		ready = func() error { return nil }
	}
	d := &httpDoor{
		service: s, ready: ready, header: textproto.CanonicalMIMEHeaderKey(s.config.KeyHeader),
		remove: []string{strings.Join(s.answers.remove, ",")},
	}
	for i, h := range identityHeaders {
		d.names[i] = textproto.CanonicalMIMEHeaderKey(h.name)
	}
	for r := range authz.NumReasons {
		response := s.answers.denials[r].response.DeniedResponse
		denial := httpDenial{
			status: int(response.GetStatus().GetCode()),
			header: http.Header{"Content-Length": {strconv.Itoa(len(response.GetBody()))}, "Date": nil},
			body:   []byte(response.GetBody()),
		}
		for _, h := range response.GetHeaders() {
			denial.header.Set(h.GetHeader().GetKey(), h.GetHeader().GetValue())
		}
		d.denials[r] = denial
	}
	return d
}

// ServeHTTP answers one check, or a question about health.
func (d *httpDoor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			logPanic(r.Context(), d.service.config.Logger, p)
			clear(w.Header())
			d.deny(w, authz.Internal)
		}
	}()
	if r.RequestURI == HTTPHealthPath {
		d.health(w)
		return
	}
	ctx := r.Context()
	if timeout := httpTimeout(r.Header[httpTimeoutHeader]); timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	if ctx.Err() != nil { // whoever asked has gone
		d.deny(w, authz.Overloaded)
		return
	}
	decision := d.decide(ctx, r)
	allowed := decision.Allowed() && identified(decision)
	d.service.config.OnDecision(decision, time.Since(start))
	// Nothing has been written so far, and nothing can go wrong from here.
	if allowed {
		d.allow(w, decision)
		return
	}
	d.deny(w, decision.Reason)
}

// decide is Service.decide for a check that came over HTTP.
func (d *httpDoor) decide(ctx context.Context, r *http.Request) (decision authz.Decision) {
	defer d.service.refusePanic(ctx, &decision)
	return d.service.ask(ctx, d.read(r))
}

// read understands r. A missing or malformed key comes before anything that is
// wrong with the path. All values of the key header count, and none of two is
// ever picked.
func (d *httpDoor) read(r *http.Request) question {
	var a attributes
	for _, v := range r.Header[d.header] {
		a.addKey(v, "")
	}
	var q question
	q.request.KeyID, q.reason, q.problem = judgeKey(&a, "")

	org, products, err := d.route(r)
	q.request.Organization, q.request.Products = org, products
	if q.reason == authz.Allowed && err != nil {
		q.reason, q.problem = authz.ProductUnresolved, err.Error()
	}
	return q
}

// route is what the request's path says of its route.
func (d *httpDoor) route(r *http.Request) (authz.Organization, []authz.ProductName, error) {
	if r.Method == http.MethodConnect {
		return "", nil, errHTTPConnect
	}
	name, products, err := parseHTTPPath(r.RequestURI)
	org := authz.Organization(name)
	switch {
	case err != nil:
		return "", nil, err
	case name != "":
		err = checkOrganization(name)
	default:
		if org = d.service.config.Organization; org == "" {
			err = errHTTPNoOrganization
		}
	}
	return org, products, err
}

// allow is the one place of this door that writes what Envoy takes as a yes.
func (d *httpDoor) allow(w http.ResponseWriter, decision authz.Decision) {
	header := w.Header()
	remove := d.remove
	id := keyID(&decision)
	for i, h := range identityHeaders {
		if value := headerSafe(h.part.of(&decision, id)); value != "" {
			header[d.names[i]] = []string{value}
			continue
		}
		// An empty value would overwrite a client's header, and not remove it.
		remove = []string{remove[0] + "," + h.name}
	}
	header[httpRemoveHeader] = remove
	header["Content-Length"] = noLength
	header["Date"] = nil // net/http would write one, and Envoy writes its own
	w.WriteHeader(http.StatusOK)
}

var noLength = []string{"0"}

// deny writes a refusal, that of an internal error for a reason that is none.
func (d *httpDoor) deny(w http.ResponseWriter, reason authz.Reason) {
	if reason >= authz.NumReasons {
		reason = authz.Internal
	}
	denial := d.denials[reason] // of Allowed: an internal error's
	header := w.Header()
	for name, values := range denial.header {
		header[name] = values
	}
	w.WriteHeader(denial.status)
	_, _ = w.Write(denial.body) // an error is an Envoy that has gone
}

func (d *httpDoor) health(w http.ResponseWriter) {
	if err := d.ready(); err != nil {
		d.deny(w, authz.Stale)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// httpTimeout is how long Envoy waits for the answer; 0 if it does not say.
func httpTimeout(values []string) time.Duration {
	if len(values) != 1 {
		return 0
	}
	ms, err := strconv.ParseUint(values[0], 10, 31)
	if err != nil {
		return 0
	}
	return min(time.Duration(ms)*time.Millisecond, maxHTTPTimeout)
}

// httpPath is the path_override of a route.
func httpPath(organization string, products []string) string {
	if len(products) == 0 {
		return httpNoProduct
	}
	escaped := make([]string, len(products))
	for i, p := range products {
		escaped[i] = url.PathEscape(p)
	}
	names := strings.Join(escaped, "/")
	if organization == "" {
		return httpProduct + names
	}
	return httpOrganization + url.PathEscape(organization) + "/product/" + names
}

var (
	errHTTPNoProduct      = errors.New("the check's path names no product: it is not the path_override of a route that does")
	errHTTPConnect        = errors.New("a check of CONNECT, which has no path that a route could name a product in")
	errHTTPNoOrganization = errors.New("the check's path names no organization and there is no default")
	errHTTPEscape         = errors.New("a name in the check's path is not escaped as it should be")
	errHTTPProducts       = errors.New("too many products in the check's path")
)

// parseHTTPPath is the inverse of httpPath: it takes what httpPath makes, and
// only that. organization is empty if the path names none.
func parseHTTPPath(target string) (organization string, products []authz.ProductName, err error) {
	names, ok := strings.CutPrefix(target, httpProduct)
	if !ok {
		rest, ok := strings.CutPrefix(target, httpOrganization)
		if !ok {
			return "", nil, errHTTPNoProduct
		}
		escaped, after, _ := strings.Cut(rest, "/")
		if organization, err = httpName(escaped); err != nil {
			return "", nil, err
		}
		if names, ok = strings.CutPrefix(after, "product/"); !ok {
			return "", nil, errHTTPNoProduct
		}
	}
	n := strings.Count(names, "/") + 1
	if n > maxProducts {
		return "", nil, errHTTPProducts
	}
	products = make([]authz.ProductName, 0, n)
	for escaped := range strings.SplitSeq(names, "/") {
		name, err := httpName(escaped)
		if err != nil {
			return "", nil, err
		}
		products = append(products, authz.ProductName(name))
	}
	return organization, products, nil
}

// httpName is the name that one segment of a path stands for.
func httpName(escaped string) (string, error) {
	name, err := url.PathUnescape(escaped)
	if err != nil || url.PathEscape(name) != escaped {
		return "", errHTTPEscape
	}
	return name, checkName(name)
}
