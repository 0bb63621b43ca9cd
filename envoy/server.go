package envoy

import (
	"context"
	"log/slog"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"keygate/authz"
)

// Limits of a server made with ServerOptions.
const (
	// MaxMessageBytes of a CheckRequest. Envoy itself takes 60 KiB of headers.
	MaxMessageBytes = 256 << 10
	// MaxHeaderBytes of the metadata of a gRPC call.
	MaxHeaderBytes = 64 << 10
	// MaxConcurrentStreams of a connection: checks in flight from one Envoy
	// worker.
	MaxConcurrentStreams = 1000
	// MaxConnectionAge after which a connection is asked to end, so that new
	// replicas get their share; MaxConnectionAgeGrace is how long the calls
	// under way then have.
	MaxConnectionAge      = 5 * time.Minute
	MaxConnectionAgeGrace = 30 * time.Second
	// ConnectionTimeout of the handshakes of a new connection, until the first
	// SETTINGS frame.
	ConnectionTimeout = 5 * time.Second
	// KeepaliveTime of silence after which a peer is pinged, and KeepaliveTimeout
	// after which it is taken for gone. Only whole frames count: a connection
	// that stalls, in a frame or before one, is closed after 15 s.
	KeepaliveTime    = 10 * time.Second
	KeepaliveTimeout = 5 * time.Second
)

// ServerOptions are the options of a gRPC server for Envoy: limits, keepalive
// that suits Envoy's, the codec of Service.Register, and outermost interceptors
// that end no call in a panic and no check in a response that Envoy would take
// as a yes by mistake. Other options may follow, but no other codec;
// interceptors chained later run inside these, and not for the checks of a
// service that reads the wire (see Service.Register). A nil logger logs nothing.
func ServerOptions(logger *slog.Logger) []grpc.ServerOption {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	g := guard{logger: logger, answers: newAnswers(Config{KeyHeader: DefaultKeyHeader})}
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.MaxHeaderListSize(MaxHeaderBytes),
		grpc.MaxConcurrentStreams(MaxConcurrentStreams),
		grpc.ConnectionTimeout(ConnectionTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionAge:      MaxConnectionAge,
			MaxConnectionAgeGrace: MaxConnectionAgeGrace,
			Time:                  KeepaliveTime,
			Timeout:               KeepaliveTimeout,
		}),
		// The default (5 minutes, none without a call) answers Envoy's
		// connection_keepalive with GOAWAY.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		// Also for the standard codec's checks, which it hands on.
		grpc.ForceServerCodecV2(newCodec()),
		grpc.ChainUnaryInterceptor(g.unary),
		grpc.ChainStreamInterceptor(g.stream),
	}
}

// guard is the last thing between a handler and the wire.
type guard struct {
	logger  *slog.Logger
	answers answers
}

func (g guard) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	check := info.FullMethod == authv3.Authorization_Check_FullMethodName
	defer func() {
		if p := recover(); p != nil {
			logPanic(ctx, g.logger, p)
			resp, err = g.internal(check)
		}
	}()
	resp, err = handler(ctx, req)
	if err == nil && check && !complete(resp) {
		g.logger.ErrorContext(ctx, "a check was answered without a clear yes or no; it was refused")
		return g.internal(check)
	}
	return resp, err
}

// internal is the answer to a call that failed here. A gRPC error would do for
// any method but a check, where an operator's failure_mode_allow would open it.
func (g guard) internal(check bool) (any, error) {
	if check {
		return g.answers.deny(authz.Decision{Reason: authz.Internal}), nil
	}
	return nil, status.Error(codes.Internal, "internal error")
}

func (g guard) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			logPanic(ss.Context(), g.logger, p)
			err = status.Error(codes.Internal, "internal error")
		}
	}()
	return handler(srv, ss)
}

// complete tells whether a response says clearly yes or no. Envoy goes by the
// status code alone, and its absence is a yes.
func complete(resp any) bool {
	r, ok := resp.(*authv3.CheckResponse)
	if !ok || r == nil || r.GetStatus() == nil {
		return false
	}
	if codes.Code(r.GetStatus().GetCode()) == codes.OK {
		return r.GetOkResponse() != nil
	}
	return r.GetDeniedResponse() != nil && r.GetDeniedResponse().GetStatus().GetCode() >= 400
}
