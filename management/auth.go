package management

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"keygate/access"
	"keygate/audit"
	"keygate/authz"
	"keygate/ledger"
)

const (
	// signInTimeout bounds the look-up of a token. With changeTimeout it stays
	// under the five seconds within which a request is answered that etcd does
	// not answer.
	signInTimeout = 1500 * time.Millisecond
	// noteEvery is how often refused attempts are put into the audit trail: one
	// record stands for all that came in between.
	noteEvery = time.Minute
	// noteTimeout bounds the writing of such a record.
	noteTimeout = time.Second
)

// principal is who asks.
type principal struct {
	actor        audit.Actor
	role         access.Role
	organization authz.Organization // access.AllOrganizations for all
	all          bool               // every right; there is no role
}

func (p principal) can(right access.Right) bool { return p.all || p.role.Can(right) }

// in tells whether the principal has anything to do with an organization.
func (p principal) in(org authz.Organization) bool {
	return p.organization == access.AllOrganizations || p.organization == org
}

// gate bounds what one token, or one address, may ask.
type gate struct {
	principals *buckets // by token id, of those that have signed in
	failures   *buckets // by address, and by token id
	strangers  *rate.Limiter
	unsigned   summary // attempts to sign in that failed
	refused    *buckets
}

func newGate(perSecond float64) gate {
	return gate{
		principals: newBuckets(perSecond, max(1, int(perSecond))),
		failures:   newBuckets(failuresPerSecond, failureBurst),
		strangers:  rate.NewLimiter(strangersPerSecond, strangersPerSecond),
		refused:    newBuckets(1, failureBurst),
	}
}

// summary counts what is reported now and then.
type summary struct {
	sync.Mutex
	n    int
	last time.Time
}

// add one. report is how many to report now; 0 is none.
func (s *summary) add(now time.Time) (report int) {
	s.Lock()
	defer s.Unlock()
	s.n++
	if !s.last.IsZero() && now.Sub(s.last) < noteEvery {
		return 0
	}
	report, s.n, s.last = s.n, 0, now
	return report
}

// credential is the token of a request, as Bearer or as the password of Basic.
func credential(r *http.Request) (string, bool) {
	if _, password, ok := r.BasicAuth(); ok {
		return password, true
	}
	scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.TrimSpace(token), ok && strings.EqualFold(scheme, "Bearer")
}

// authenticate finds out who asks.
//
// Too many failures close an address for tokens that nobody has signed in with
// here, and a token for everybody; the holder of a good one is let in from
// there all the same.
func (s *Server) authenticate(r *http.Request) (principal, error) {
	now := s.cfg.Now()
	from := "address " + address(r)
	secret, given := credential(r)
	id, err := access.ParseToken(secret)
	known := err == nil && s.gate.principals.get(id, false) != nil
	switch {
	case !given || err != nil:
		return principal{}, s.failed(r, now, from)
	case s.gate.failures.empty("token "+id, now):
		return principal{}, s.failed(r, now, "token "+id)
	case !known && s.gate.failures.empty(from, now) && !s.gate.strangers.AllowN(now, 1):
		return principal{}, s.failed(r, now, from)
	}
	ctx, cancel := context.WithTimeout(r.Context(), signInTimeout)
	defer cancel()
	token, err := s.cfg.Ledger.Authenticate(ctx, secret)
	switch {
	case errors.Is(err, ledger.ErrUnauthenticated):
		s.gate.failures.take("token "+id, now)
		return principal{}, s.failed(r, now, from)
	case err != nil:
		s.cfg.Logger.Warn("a token could not be looked up", "requestId", requestOf(r).id, "cause", err)
		return principal{}, &refusal{status: http.StatusServiceUnavailable, code: "keygate.unavailable", retryAfter: time.Second,
			message: "the store does not answer, so the token could not be looked up; nothing was changed, and repeating the request is safe"}
	}
	if wait := s.gate.principals.take(id, now); wait > 0 {
		return principal{}, &refusal{status: http.StatusTooManyRequests, code: "keygate.rate_limit", retryAfter: wait,
			message: fmt.Sprintf("this token asks more than %g times a second; nothing was changed", s.cfg.RequestsPerSecond)}
	}
	return principal{
		actor: audit.Actor{Kind: audit.ActorToken, Name: token.Name, Token: id, Address: address(r)},
		role:  token.Role, organization: token.Organization,
	}, nil
}

// failed takes from a bucket of failures and words the answer.
func (s *Server) failed(r *http.Request, now time.Time, bucket string) error {
	if n := s.gate.unsigned.add(now); n > 0 {
		note := fmt.Sprintf("%d requests with no token or none that is valid, the last from %s", n, address(r))
		s.note(r, ledger.By{Actor: audit.Actor{Kind: audit.ActorToken, Address: address(r)}, RequestID: requestOf(r).id}, s.cfg.Organization, note)
	}
	if wait := s.gate.failures.take(bucket, now); wait > 0 {
		return &refusal{status: http.StatusTooManyRequests, code: "keygate.rate_limit", retryAfter: wait,
			message: "too many requests from here had no valid token"}
	}
	return &refusal{status: http.StatusUnauthorized, code: "keygate.unauthenticated",
		message: "a valid management token is needed: as Authorization: Bearer, or as the password of Basic"}
}

// forbidden is the answer to a principal without a right. It is audited, of one
// principal once a second.
func (s *Server) forbidden(r *http.Request, p principal, org authz.Organization, rt *route) error {
	if s.gate.refused.take(p.actor.Token, s.cfg.Now()) == 0 {
		s.note(r, ledger.By{Actor: p.actor, RequestID: requestOf(r).id}, org,
			fmt.Sprintf("%s %s needs the right %q, which the role %q has not", rt.method, rt.pattern, rt.right, p.role))
	}
	return &refusal{status: http.StatusForbidden, code: "keygate.forbidden",
		message: fmt.Sprintf("this needs the right %q, which the role %q has not", rt.right, p.role)}
}

// note puts an attempt that was refused into the audit trail. The answer does
// not depend on whether that is possible.
func (s *Server) note(r *http.Request, by ledger.By, org authz.Organization, note string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), noteTimeout)
	defer cancel()
	if err := s.cfg.Ledger.Note(ctx, by, org, "refuse", "", note); err != nil {
		s.cfg.Logger.Warn("a refused attempt could not be audited", "requestId", by.RequestID, "note", note, "cause", err)
	}
}
