package envoy

import (
	"context"
	"errors"
	"sync"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // the codec of everything else
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"keygate/authz"
)

// codec hands the bytes of checks to the handler that reads them, and the bytes
// of its answers back. Every other message of the server goes through the
// standard codec. It never fails for a check: grpc-go would answer with an error,
// which an operator's failure_mode_allow opens.
type codec struct{ standard encoding.CodecV2 }

// errUnsealed is better than no bytes, which Envoy takes as a yes.
var errUnsealed = errors.New("an answer that was not finished")

func newCodec() codec { return codec{standard: encoding.GetCodecV2("proto")} }

func (c codec) Name() string { return c.standard.Name() }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(*reply); ok {
		if len(r.out) == 0 {
			return nil, errUnsealed
		}
		return r.out, nil
	}
	return c.standard.Marshal(v)
}

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if call, ok := v.(*call); ok {
		call.hold(data.MaterializeToBuffer(mem.DefaultBufferPool()))
		return nil
	}
	return c.standard.Unmarshal(data, v)
}

// call is the memory of one check: the message as it came and what was read of
// it. It is used again for other checks, in other goroutines, once this one has
// been decided; then nothing may refer to it.
type call struct {
	pool       *sync.Pool
	message    mem.Buffer // nil for none
	attributes attributes
	products   [maxProducts]authz.ProductName
	decision   authz.Decision
}

// call returns an empty one.
func (s *Service) call() *call {
	c, ok := s.calls.Get().(*call)
	if !ok {
		c = &call{pool: &s.calls}
	}
	return c
}

// hold takes over a reference to a message. grpc-go decodes twice if a client
// sends a second message, which it then refuses.
func (c *call) hold(message mem.Buffer) {
	if c.message != nil {
		c.message.Free()
	}
	c.message = message
}

// release gives everything back. It is not called after a panic in the handler:
// the memory is then the collector's.
func (c *call) release() {
	c.forget()
	c.pool.Put(c)
}

func (c *call) forget() {
	if c.message != nil {
		c.message.Free()
		c.message = nil
	}
	clear(c.products[:min(c.attributes.listed+1, maxProducts)])
	c.attributes.reset()
	c.decision = authz.Decision{}
}

// String keeps what a client sent out of grpc-go's traces.
func (c *call) String() string { return "CheckRequest" }

func (r *reply) String() string { return "CheckResponse" }

// Register adds the service to a gRPC server, which must have been made with
// ServerOptions: without its codec every check is a gRPC error.
//
// Unless Config.StandardCodec is set, checks pass over the server's
// interceptors, which have no messages to see; the handler itself ends no check
// in a panic or in an answer that is not a clear yes or no.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	if s.config.StandardCodec {
		authv3.RegisterAuthorizationServer(r, s)
		return
	}
	r.RegisterService(&grpc.ServiceDesc{
		ServiceName: ServiceName,
		HandlerType: (*authv3.AuthorizationServer)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Check", Handler: s.checkWire}},
		Metadata:    authv3.Authorization_ServiceDesc.Metadata, // for reflection
	}, s)
}

// checkWire is Check for messages in bytes.
func (s *Service) checkWire(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			logPanic(ctx, s.config.Logger, p)
			resp, err = s.answers.encoded.internal, nil
		}
	}()
	c := s.call()
	if err := decode(c); err != nil {
		c.release()
		return nil, err
	}
	start := time.Now() // not earlier: decode waits for the message
	if err := ctx.Err(); err != nil {
		c.release()
		return nil, status.FromContextError(err).Err()
	}
	s.decideWire(ctx, c)
	r := s.reply()
	s.answers.encode(r, &c.decision)
	if !s.answers.clear(r, &c.decision) {
		s.config.Logger.ErrorContext(ctx, "a check was answered without a clear yes or no; it was refused")
		return s.answers.encoded.internal, nil
	}
	r.seal()
	s.config.OnDecision(c.decision, time.Since(start))
	c.release()
	return r, nil
}

// decideWire is decide for messages in bytes.
func (s *Service) decideWire(ctx context.Context, c *call) {
	defer s.refusePanic(ctx, &c.decision)
	var message []byte
	if c.message != nil {
		message = c.message.ReadOnlyData()
	}
	problem := c.attributes.readWire(message, s.schema.request, s.config.KeyHeader)
	q := question{reason: authz.Internal}
	if problem == "" {
		q = s.judge(&c.attributes, c.products[:0])
	} else {
		q.problem = problem
	}
	c.decision = s.ask(ctx, q)
}
