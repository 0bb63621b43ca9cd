package management

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"keygate/apigee"
)

// request is what the layers around a handler know of a request, for the access
// log and for answers.
type request struct {
	id      string
	edition apigee.Edition
	// pattern of the route, never the path: consumer keys stand in paths.
	pattern string
	org     string
	actor   string
	// release gives the place among the requests under way back; again it does
	// nothing.
	release func()
}

const (
	// bodyTimeout is how long a body may take, from when the request is here.
	bodyTimeout = 5 * time.Second
	// writeTimeout is how long an answer may take to be written, from its first
	// byte. What comes before, a receipt of the fleet too, does not count.
	writeTimeout = 10 * time.Second
)

type requestKey struct{}

func requestOf(r *http.Request) *request { return r.Context().Value(requestKey{}).(*request) }

// observe gives a request its id and writes its line in the log. A panic below
// is answered without details.
func (s *Server) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		rq := &request{id: requestID(r.Header.Get("X-Request-Id")), edition: editionOf(r), pattern: "none", release: func() {}}
		r = r.WithContext(context.WithValue(r.Context(), requestKey{}, rq))
		h := w.Header()
		h.Set("X-Request-Id", rq.id)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		seen := &seen{ResponseWriter: w, status: http.StatusOK}
		// Where there is no connection there is nothing to bound.
		_ = http.NewResponseController(w).SetReadDeadline(began.Add(bodyTimeout))
		defer func() {
			if p := recover(); p != nil {
				// The value may hold anything, a consumer key too.
				s.cfg.Logger.Error("a request panicked", "requestId", rq.id, "route", rq.pattern, "stack", string(debug.Stack()))
				if !seen.wrote {
					writeError(seen, rq, &refusal{status: http.StatusInternalServerError, code: "keygate.internal",
						message: "the request could not be handled; the log of the server says why, under the request's id"})
				}
			}
			s.cfg.Logger.LogAttrs(r.Context(), slog.LevelInfo, "request", slog.String("method", method(r)), slog.String("route", rq.pattern),
				slog.Int("status", seen.status), slog.Float64("ms", float64(time.Since(began).Microseconds())/1000), slog.Int("bytes", seen.bytes),
				slog.String("requestId", rq.id), slog.String("organization", rq.org), slog.String("actor", rq.actor), slog.String("address", address(r)))
		}()
		next.ServeHTTP(seen, r)
	})
}

// guard lets in what comes from a client that meant this server.
func (s *Server) guard(next http.Handler) http.Handler {
	crossSite := http.NewCrossOriginProtection()
	return s.observe(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rq := requestOf(r)
		if !s.knownAs(r) {
			writeError(w, rq, &refusal{status: http.StatusMisdirectedRequest, code: "keygate.host",
				message: "this server is not known by the name in Host; an administrator can allow it"})
			return
		}
		if err := crossSite.Check(r); err != nil {
			writeError(w, rq, &refusal{status: http.StatusForbidden, code: "keygate.cross_site", message: "the request comes from another site's page"})
			return
		}
		next.ServeHTTP(w, r)
	}))
}

// knownAs tells whether the name in Host is this server's. A page whose name was
// bound to this address comes with its own name.
func (s *Server) knownAs(r *http.Request) bool {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
	if host == "localhost" || slices.ContainsFunc(s.cfg.AllowedHosts, func(a string) bool { return strings.EqualFold(a, host) }) {
		return true
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	if ip.IsLoopback() {
		return true
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return ok && local.AddrPort().Addr().Unmap() == ip.Unmap()
}

// address that the request came from, without the port.
func address(r *http.Request) string {
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		return host
	}
	return r.RemoteAddr
}

// methods that are shown as they are; a method may be anything, a consumer key
// too.
var methods = []string{"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"}

func method(r *http.Request) string {
	if slices.Contains(methods, r.Method) {
		return r.Method
	}
	return "other"
}

// requestID is the client's, if it is one that can stand in a header and a log,
// or a new one.
func requestID(given string) string {
	ok := given != "" && len(given) <= 64
	for _, c := range []byte(given) {
		ok = ok && (c == '-' || c == '_' || c == '.' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z')
	}
	if ok {
		return given
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// seen notes what was answered, and bounds how long the writing of it may take.
type seen struct {
	http.ResponseWriter
	status, bytes int
	wrote         bool
}

// Unwrap is for http.ResponseController.
func (s *seen) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// begin with an answer.
func (s *seen) begin(status int) {
	if s.wrote {
		return
	}
	s.status, s.wrote = status, true
	_ = http.NewResponseController(s.ResponseWriter).SetWriteDeadline(time.Now().Add(writeTimeout)) // as of the read deadline
}

func (s *seen) WriteHeader(status int) {
	s.begin(status)
	s.ResponseWriter.WriteHeader(status)
}

func (s *seen) Write(b []byte) (int, error) {
	s.begin(http.StatusOK)
	n, err := s.ResponseWriter.Write(b)
	s.bytes += n
	return n, err
}
