// Package envoy translates between Envoy's ext_authz v3 and authz.
//
// A CheckRequest becomes an authz.Request, an authz.Decision becomes a
// CheckResponse. Nothing is decided here except what cannot even be asked: a
// request without one well-formed consumer key, or of a route that does not
// clearly name its API product.
//
// Envoy takes an empty CheckResponse, and one without a status, as ALLOW, and
// a gRPC error as a failure that the operator may have opened
// (failure_mode_allow). So every refusal is a denied_response, there is one
// constructor of an allow in each form that an answer has, and [ServerOptions] and
// [Service.Register] turn whatever else might leave the process into a refusal.
//
// A check can be read in two ways, and answered in two: with the generated code
// of go-control-plane, or, for about a sixth of the work, from the bytes of the one
// message to those of the other ([Service.Register]). Both end in the same
// judgement and in the same tables.
//
// [Bootstrap] is the hardened Envoy configuration that the service is meant
// for. It is the only package that imports go-control-plane.
package envoy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/status"

	"keygate/authz"
)

// ServiceName of ext_authz v3, for the gRPC health service.
const ServiceName = "envoy.service.auth.v3.Authorization"

// DefaultKeyHeader carries the consumer key unless told otherwise.
const DefaultKeyHeader = "x-api-key"

// Values of Config.DenialBody.
const (
	// DenialApigee answers with the fault that Apigee would, so a client can
	// tell at which level its key was refused.
	DenialApigee = "apigee"
	// DenialUniform answers every refusal of a key with one and the same 401.
	DenialUniform = "uniform"
)

// Authorizer decides requests. *authz.Authorizer is one. It is safe for
// concurrent use and does not keep the request.
type Authorizer interface {
	Decide(context.Context, authz.Request) authz.Decision
}

// Config of a Service.
type Config struct {
	// Authorizer is required.
	Authorizer Authorizer
	// KeyHeader is the one header that carries the consumer key, in any case;
	// empty means DefaultKeyHeader.
	KeyHeader string
	// KeyQuery is the one query parameter that may carry the key instead;
	// empty, the default, means that the query is never looked at.
	KeyQuery string
	// DenialBody is DenialApigee or DenialUniform; empty means DenialApigee.
	DenialBody string
	// Organization of routes that name none. Empty: such routes are refused.
	Organization authz.Organization
	// OnDecision is told every decision and how long it took, before the
	// answer leaves. It is called concurrently and must not block. May be nil.
	OnDecision func(authz.Decision, time.Duration)
	// Logger is for panics; nil means none.
	Logger *slog.Logger
	// StandardCodec makes Register serve checks through the generated code of
	// go-control-plane. False, the default, reads what is needed off the wire and
	// writes the answer's bytes: the same answers for less work.
	StandardCodec bool
}

// Service answers Envoy's checks. It is safe for concurrent use, and immutable
// but for what it keeps so that a check needs no memory.
type Service struct {
	authv3.UnimplementedAuthorizationServer
	config  Config
	answers answers
	schema  *schema
	names   names
	calls   sync.Pool // of *call
	replies sync.Pool // of *reply
}

// New returns the service, or what is wrong with config.
func New(config Config) (*Service, error) {
	if config.Authorizer == nil {
		return nil, errors.New("no authorizer")
	}
	config.KeyHeader = strings.ToLower(config.KeyHeader)
	if config.KeyHeader == "" {
		config.KeyHeader = DefaultKeyHeader
	}
	if err := CheckKeyHeader(config.KeyHeader); err != nil {
		return nil, err
	}
	if err := CheckKeyQuery(config.KeyQuery); err != nil {
		return nil, err
	}
	switch config.DenialBody {
	case "":
		config.DenialBody = DenialApigee
	case DenialApigee, DenialUniform:
	default:
		return nil, fmt.Errorf("denial body %q: want %s or %s", config.DenialBody, DenialApigee, DenialUniform)
	}
	if config.Organization != "" {
		if err := checkOrganization(string(config.Organization)); err != nil {
			return nil, fmt.Errorf("the default organization: %w", err)
		}
	}
	if config.OnDecision == nil {
		config.OnDecision = func(authz.Decision, time.Duration) {}
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	return &Service{config: config, answers: newAnswers(config), schema: newSchema()}, nil
}

// maxHyphens in the key header's name. Each of them doubles the names that an
// allow removes (see underscored).
const maxHyphens = 4

// CheckKeyHeader tells whether name can be Config.KeyHeader. Headers that Envoy
// does not let go of cannot: the key would travel on. Authorization and Cookie
// hold more than a bare key.
func CheckKeyHeader(name string) error {
	name = strings.ToLower(name)
	for i := range len(name) {
		if b := name[i]; (b < 'a' || b > 'z') && (b < '0' || b > '9') && b != '-' {
			return fmt.Errorf("key header %q: want letters, digits and hyphens only", name)
		}
	}
	switch {
	case name == "":
		return errors.New("key header: no name")
	case strings.Count(name, "-") > maxHyphens:
		return fmt.Errorf("key header %q: want at most %d hyphens", name, maxHyphens)
	case strings.HasPrefix(name, "x-keygate-"), strings.HasPrefix(name, "x-envoy-"), strings.HasPrefix(name, "x-forwarded-"):
		return fmt.Errorf("key header %q: the name is taken by a gateway", name)
	}
	switch name {
	case "authorization", "proxy-authorization", "cookie", "host", "connection", "te", "upgrade", "expect", "via",
		"transfer-encoding", "content-length", "content-type", "content-encoding", "user-agent", "accept", "x-request-id":
		return fmt.Errorf("key header %q: the name has another meaning", name)
	}
	return nil
}

// CheckKeyQuery tells whether name can be Config.KeyQuery; the empty name is
// "off". It is matched as it stands in the URL, so nothing in it may need
// escaping.
func CheckKeyQuery(name string) error {
	for i := range len(name) {
		b := name[i]
		if (b < 'a' || b > 'z') && (b < 'A' || b > 'Z') && (b < '0' || b > '9') && !strings.ContainsRune("-._~", rune(b)) {
			return fmt.Errorf("key query parameter %q: want letters, digits and -._~ only", name)
		}
	}
	return nil
}

// Check answers one request of Envoy. Every decision is a CheckResponse; an
// error means only that the caller had gone before anything was done. The
// response shares parts with others and must not be changed.
func (s *Service) Check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	start := time.Now()
	if err := ctx.Err(); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	d := s.decide(ctx, req)
	resp := s.answers.respond(d)
	s.config.OnDecision(d, time.Since(start))
	return resp, nil
}

func (s *Service) decide(ctx context.Context, req *authv3.CheckRequest) (d authz.Decision) {
	defer s.refusePanic(ctx, &d)
	var a attributes
	a.read(req, s.config.KeyHeader)
	return s.ask(ctx, s.judge(&a, nil))
}

// refusePanic is deferred by what makes the decision d.
func (s *Service) refusePanic(ctx context.Context, d *authz.Decision) {
	if p := recover(); p != nil {
		logPanic(ctx, s.config.Logger, p)
		*d = authz.Refuse(authz.Request{}, authz.Internal)
		d.Problem = "panic while deciding: " + describePanic(p)
	}
}

// ask answers q, by the authorizer if q can be asked.
func (s *Service) ask(ctx context.Context, q question) authz.Decision {
	if q.reason != authz.Allowed {
		d := authz.Refuse(q.request, q.reason)
		d.Problem = q.problem
		return d
	}
	d := s.config.Authorizer.Decide(ctx, q.request)
	if d.Allowed() && !identified(d) {
		d.Reason, d.Problem = authz.Internal, "allowed, but not whom or what"
	}
	return d
}

// describePanic tells what was panicked with. Only the runtime's own words are
// repeated: anything else may hold a piece of the request.
func describePanic(p any) string {
	if err, ok := p.(runtime.Error); ok {
		return err.Error()
	}
	return fmt.Sprintf("a value of type %T", p)
}

// logPanic also logs the stack, which shows functions, lines and addresses,
// never what stands at them.
func logPanic(ctx context.Context, logger *slog.Logger, p any) {
	logger.ErrorContext(ctx, "panic while answering a call; it was refused",
		"panic", describePanic(p), "stack", string(debug.Stack()))
}
