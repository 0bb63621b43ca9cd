package envoy

import (
	"context"
	"path/filepath"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"keygate/authz"
)

// benchmarked are CheckRequests for measuring: one with as little as Envoy can
// send, and one as a browser's request brings it, in either form that Envoy has.
func benchmarked(tb testing.TB) map[string]*authv3.CheckRequest {
	tb.Helper()
	var browser authv3.CheckRequest
	mustReadJSON(tb, filepath.Join("..", "examples", "ghz", "check-20-headers.json"), &browser)
	asMap := proto.CloneOf(&browser)
	http := asMap.Attributes.Request.Http
	http.Headers = map[string]string{}
	for _, h := range http.HeaderMap.Headers {
		http.Headers[h.Key] = string(h.RawValue)
	}
	http.HeaderMap = nil
	return map[string]*authv3.CheckRequest{"1 header": request(approvedKey), "20 headers": &browser, "20 headers in a map": asMap}
}

// cannedDecide allows everything and costs nothing.
func cannedDecide(_ context.Context, req authz.Request) authz.Decision {
	return authz.Decision{
		Reason: authz.Allowed, Organization: req.Organization, KeyID: req.KeyID, Product: req.Products[0],
		App: "2f4f7e4e-4a6e-4f0c-8f0e-0d6c8c2d3e4f", Developer: "7c1d1c5e-5f3a-4d2b-9a2b-1e2f3a4b5c6d", Scopes: "read write", Revision: 7,
	}
}

func BenchmarkDecode(b *testing.B) {
	for name, req := range benchmarked(b) {
		wire := mustMarshal(req)
		s := MustService(b, nil)
		b.Run("wire/"+name, func(b *testing.B) {
			c := s.call()
			b.ReportAllocs()
			for b.Loop() {
				c.attributes.reset()
				if problem := c.attributes.readWire(wire, s.schema.request, s.config.KeyHeader); problem != "" {
					b.Fatal(problem)
				}
			}
		})
		b.Run("standard/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var req authv3.CheckRequest
				if err := proto.Unmarshal(wire, &req); err != nil {
					b.Fatal(err)
				}
				var a attributes
				a.read(&req, s.config.KeyHeader)
			}
		})
	}
}

// From the bytes to the decision, over a source that costs nothing.
func BenchmarkDecide(b *testing.B) {
	for name, req := range benchmarked(b) {
		var wire mem.Buffer = mem.SliceBuffer(mustMarshal(req))
		b.Run(name, func(b *testing.B) {
			s := MustService(b, func(c *Config) { c.Authorizer = authorizerFunc(cannedDecide) })
			c := s.call()
			ctx := b.Context()
			b.ReportAllocs()
			for b.Loop() {
				c.attributes.reset()
				c.hold(wire)
				if s.decideWire(ctx, c); !c.decision.Allowed() {
					b.Fatal(c.decision)
				}
			}
		})
	}
}

func BenchmarkEncode(b *testing.B) {
	s := MustService(b, nil)
	allowed := cannedDecide(b.Context(), authz.Request{Organization: worldOrg, KeyID: idOf(approvedKey), Products: []authz.ProductName{weather}})
	denied := allowed
	denied.Reason = authz.KeyRevoked
	for name, d := range map[string]authz.Decision{"allowed": allowed, "denied": denied} {
		b.Run("wire/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r := s.reply()
				s.answers.encode(r, &d)
				r.seal()
				r.out.Free()
			}
		})
		b.Run("standard/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := proto.Marshal(s.answers.respond(d)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
