// Package client is a Go client of keygate's management API, in the rendering
// of Apigee X.
//
// Every method takes a context and ends with it. A refusal by the server is an
// [*Error]; any other error says why there was no answer, and is
// [authz.ErrUnavailable] if none came. A change is sent with an
// Idempotency-Key, so that the client may repeat it when its answer was lost,
// and it happens once.
//
// A consumer key never stands in a URL: keys are named by their [authz.KeyID].
package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"keygate/authz"
)

// Secret is a string that prints, logs and marshals as a placeholder.
type Secret string

const hidden = "[secret]"

// String implements fmt.Stringer.
func (Secret) String() string { return hidden }

// GoString implements fmt.GoStringer.
func (Secret) GoString() string { return hidden }

// MarshalText implements encoding.TextMarshaler.
func (Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// Reveal returns the secret.
func (s Secret) Reveal() string { return string(s) }

// Config of a Client.
type Config struct {
	// Server is the URL before /v1: http://, https:// or unix:///path. Empty
	// needs a Transport.
	Server string
	// Organization that all methods speak of; required. "*" is all of them, which
	// only Audit takes: its records are those of no one organization.
	Organization authz.Organization
	// Token is sent with every request; empty sends none.
	Token Secret
	// Reveal asks for consumer keys and secrets in the answers to reads, where the
	// token may have them and they are kept. Each such answer is audited. Without
	// it keys are named by their ids, and secrets left out.
	Reveal bool
	// TLS of an https server; nil is Go's own.
	TLS *tls.Config
	// Transport sends the requests; nil makes one for Server. See [Handler].
	Transport http.RoundTripper
	// UserAgent names the program; empty is keygate-client.
	UserAgent string
}

// Client of one organization of a management API. It is safe for concurrent
// use.
type Client struct {
	http         http.Client
	server       string // for people
	base         string // with the organization, without a final slash
	organization authz.Organization
	token        func() string // not a field, which fmt would print
	userAgent    string
	reveal       bool
	repeats      bool // the way to the server may lose an answer
}

// New returns a client. It talks to nobody yet.
func New(cfg Config) (*Client, error) {
	if cfg.Organization == "" {
		return nil, errors.New("management client: no organization")
	}
	if strings.ContainsFunc(cfg.Token.Reveal(), unicode.IsControl) {
		return nil, errors.New("management client: the token holds a line break or another control character")
	}
	server := strings.TrimRight(cfg.Server, "/")
	transport := cfg.Transport
	switch {
	case server == "" && transport == nil:
		return nil, errors.New("management client: no server")
	case transport == nil:
		transport = newTransport(server, cfg.TLS)
	}
	named := server
	if server == "" || strings.HasPrefix(server, "unix:") {
		server = "http://localhost" // the name that a server takes from anybody
	}
	if u, err := url.Parse(server); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("management client: the server is no URL such as https://keygate.example:8080")
	}
	c := &Client{
		server:       named,
		base:         server + "/v1/organizations/" + url.PathEscape(string(cfg.Organization)),
		organization: cfg.Organization, token: cfg.Token.Reveal, userAgent: cfg.UserAgent, reveal: cfg.Reveal, repeats: cfg.Server != "",
	}
	if c.userAgent == "" {
		c.userAgent = "keygate-client"
	}
	c.http = http.Client{
		Transport: transport,
		// A redirect would take the token to another place.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// answerTimeout bounds the wait for the beginning of an answer. The longest is
// that of a change that waits for the fleet: 61 s.
const answerTimeout = 90 * time.Second

func newTransport(server string, tlsConfig *tls.Config) http.RoundTripper {
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	t := &http.Transport{
		TLSClientConfig: tlsConfig, ForceAttemptHTTP2: true, Proxy: http.ProxyFromEnvironment,
		DialContext: dialer.DialContext, TLSHandshakeTimeout: 5 * time.Second, ResponseHeaderTimeout: answerTimeout,
		IdleConnTimeout: time.Minute,
	}
	if path, ok := strings.CutPrefix(server, "unix://"); ok {
		t.Proxy = nil
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		}
	}
	return t
}

// Close ends connections that nobody uses.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Organization that the client speaks of.
func (c *Client) Organization() authz.Organization { return c.organization }

// maxAnswer bounds an answer, in bytes. A page of the server's is smaller.
const maxAnswer = 64 << 20

// request is one call.
type request struct {
	method string
	path   string // below the organization, escaped
	query  url.Values
	body   any // marshalled; nil sends none
	change *Change
}

// Attempts of a request whose answer was lost.
const (
	maxAttempts = 3
	firstPause  = 100 * time.Millisecond
)

// do sends a request and decodes the answer into out, if it is not nil.
func (c *Client) do(ctx context.Context, r request, out any) (http.Header, error) {
	var body []byte
	if r.body != nil {
		var err error
		if body, err = json.Marshal(r.body); err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
	}
	once := ""
	if r.change != nil && c.repeats {
		once = rand.Text()
	}
	pause := firstPause
	for attempt := 1; ; attempt++ {
		answer, header, err := c.send(ctx, r, body, once)
		var refusal *Error
		lost := err != nil && !errors.As(err, &refusal)
		if lost && c.repeats && attempt < maxAttempts && ctx.Err() == nil {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return nil, err
			}
			pause *= 2
			continue
		}
		if err == nil && out != nil && len(answer) > 0 {
			if err = json.Unmarshal(answer, out); err != nil {
				err = fmt.Errorf("read the answer of the management API: %w", err)
			}
		}
		return header, err
	}
}

// send sends it once.
func (c *Client) send(ctx context.Context, r request, body []byte, once string) ([]byte, http.Header, error) {
	query := url.Values{}
	for name, values := range r.query {
		query[name] = values
	}
	switch {
	case r.change != nil:
		r.change.add(query)
	case !c.reveal:
		query.Set("reveal", "false")
	}
	target := c.base + r.path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, r.method, target, bytes.NewReader(body))
	if err != nil {
		return nil, nil, fmt.Errorf("management API: %w", cause(err))
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", c.userAgent)
	if len(body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	if token := c.token(); token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if once != "" {
		req.Header.Set("Idempotency-Key", once)
	}
	if r.change != nil && r.change.IfMatch != "" {
		req.Header.Set("If-Match", r.change.IfMatch)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, nil, &unreachable{fmt.Errorf("reach the management API at %s: %w", c.server, cause(err))}
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, nil, &unreachable{fmt.Errorf("read the answer of the management API at %s: %w", c.server, err)}
	case len(answer) > maxAnswer:
		return nil, nil, &Error{Status: res.StatusCode, Message: fmt.Sprintf("the answer has more than %d bytes", maxAnswer)}
	case res.StatusCode < 200 || res.StatusCode > 299:
		return nil, res.Header, parseError(res, answer)
	}
	return answer, res.Header, nil
}

// unreachable is the error of a request that was not answered.
type unreachable struct{ error }

func (e *unreachable) Unwrap() error { return e.error }

func (e *unreachable) Is(target error) bool { return target == authz.ErrUnavailable }

// cause of an error of net/http, without the URL.
func cause(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// path joins escaped segments.
func path(segments ...string) string {
	var p strings.Builder
	for _, s := range segments {
		p.WriteString("/" + url.PathEscape(s))
	}
	return p.String()
}

// Error is a refusal by the server.
type Error struct {
	// Status of HTTP.
	Status int
	// Code is stable: Apigee's, or keygate's own, which begins with "keygate.".
	Code string
	// Message says what was wrong, where, and what would be right.
	Message string
	// RequestID finds the request in the server's log and in the audit.
	RequestID string
	// Details as the server sent them.
	Details []json.RawMessage
}

// Error returns the message.
func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("the management API answered %d %s", e.Status, http.StatusText(e.Status))
	}
	return e.Message
}

// Is tells authz.ErrUnavailable of a 502, 503 and 504.
func (e *Error) Is(target error) bool {
	switch e.Status {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return target == authz.ErrUnavailable
	}
	return false
}

func parseError(res *http.Response, body []byte) *Error {
	e := &Error{Status: res.StatusCode, RequestID: res.Header.Get("x-request-id")}
	var wrapped struct {
		Error struct {
			Message string            `json:"message"`
			Details []json.RawMessage `json:"details"`
		} `json:"error"`
	}
	if json.Unmarshal(body, &wrapped) != nil {
		return e // a proxy's, perhaps: its page is of no use here
	}
	e.Message, e.Details = wrapped.Error.Message, wrapped.Error.Details
	for _, raw := range e.Details {
		var detail struct {
			Violations []struct {
				Type string `json:"type"`
			} `json:"violations"`
			RequestID string `json:"requestId"`
		}
		if json.Unmarshal(raw, &detail) != nil {
			continue
		}
		if e.Code == "" && len(detail.Violations) > 0 {
			e.Code = detail.Violations[0].Type
		}
		if detail.RequestID != "" {
			e.RequestID = detail.RequestID
		}
	}
	return e
}

// Millis is a time in milliseconds since the Unix epoch, or a duration in
// milliseconds; -1 is never. It reads a JSON string or number.
type Millis int64

// UnmarshalJSON implements json.Unmarshaler.
func (m *Millis) UnmarshalJSON(b []byte) error {
	n, err := strconv.ParseInt(strings.Trim(string(b), `"`), 10, 64)
	if err != nil {
		return fmt.Errorf("%.40s is no whole number", b)
	}
	*m = Millis(n)
	return nil
}

// Time is zero for none and for never.
func (m Millis) Time() time.Time {
	if m <= 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(m)).UTC()
}
