package envoy

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"keygate/authz"
)

// encodedForm is what the bytes of an answer say.
func encodedForm(tb testing.TB, s *Service, d authz.Decision) *authv3.CheckResponse {
	tb.Helper()
	r := s.reply()
	s.answers.encode(r, &d)
	if !s.answers.clear(r, &d) {
		tb.Errorf("%v: the answer is not clear", d.Reason)
	}
	r.seal()
	defer r.out.Free()
	var resp authv3.CheckResponse
	if err := proto.Unmarshal(r.out.Materialize(), &resp); err != nil {
		tb.Fatalf("%v: %v", d.Reason, err)
	}
	return &resp
}

// randomNames are what a name may look like.
var randomNames = []string{"", "a", "Weather-Product", "two words", " led", "50% off\r\nx: y", "Jürgen", "日本語", "\xff\xfe", "o\xffo", "\x00", "a\u2028b",
	strings.Repeat("long", 64), strings.Repeat("é", 3000)}

// In bytes every decision gives the response that respond builds of it, and a
// reply that was used before adds nothing.
func TestEncodeEqualsRespond(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	name := func() string { return randomNames[r.IntN(len(randomNames))] }
	for config, edit := range map[string]func(*Config){
		"header": nil, "query": func(c *Config) { c.KeyQuery = "apikey" }, "uniform": func(c *Config) { c.DenialBody = DenialUniform },
		"other header": func(c *Config) { c.KeyHeader = "a-b-c-d-e" },
	} {
		s := MustService(t, edit)
		for i := range 5000 {
			d := authz.Decision{
				Reason: authz.Reason(r.UintN(uint(authz.NumReasons) + 2)), Organization: authz.Organization(name()), Product: authz.ProductName(name()),
				App: authz.AppID(name()), Developer: authz.DeveloperID(name()), Scopes: name(), Problem: "not for the client",
			}
			if i%5 > 0 {
				d.KeyID = idOf(worldKeys[i%len(worldKeys)])
			}
			if i%3 == 0 {
				d.Reason = authz.Allowed
			}
			want := s.answers.respond(d)
			if got := encodedForm(t, s, d); !proto.Equal(want, got) || !complete(got) {
				t.Fatalf("%s: %+v (-respond +encode):\n%s", config, d, cmp.Diff(want, got, protocmp.Transform()))
			}
		}
	}
}

// The answer to a check that failed here is whole by itself.
func TestEncodedInternal(t *testing.T) {
	s := MustService(t, nil)
	out, err := newCodec().Marshal(s.answers.encoded.internal)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // it is used again and again
		var got authv3.CheckResponse
		if err := proto.Unmarshal(out.Materialize(), &got); err != nil {
			t.Fatal(err)
		}
		if want := s.answers.deny(authz.Decision{}); !proto.Equal(want, &got) {
			t.Errorf("got %v, want %v", &got, want)
		}
		out.Ref()
		out.Free()
		out.Free()
	}
}

// An answer that does not begin as its decision says is not sent.
func TestClear(t *testing.T) {
	s := MustService(t, nil)
	allowed := authz.Decision{Reason: authz.Allowed, Organization: worldOrg, KeyID: idOf(approvedKey), Product: weather}
	denied := allowed
	denied.Reason = authz.KeyRevoked
	encode := func(d authz.Decision) []byte {
		r := new(reply)
		s.answers.encode(r, &d)
		return r.data
	}
	for name, test := range map[string]struct {
		data []byte
		d    authz.Decision
		want bool
	}{
		"allowed":               {encode(allowed), allowed, true},
		"denied":                {encode(denied), denied, true},
		"nothing, allowed":      {nil, allowed, false},
		"nothing, denied":       {nil, denied, false},
		"a status alone":        {s.answers.encoded.ok, allowed, false},
		"a yes for a no":        {encode(allowed), denied, false},
		"a no for a yes":        {encode(denied), allowed, false},
		"a yes for nobody":      {encode(allowed), authz.Decision{Reason: authz.Allowed}, false},
		"a reason that is none": {encode(denied), authz.Decision{Reason: authz.NumReasons}, false},
	} {
		if got := s.answers.clear(&reply{data: test.data}, &test.d); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
	if !bytes.HasPrefix(s.answers.encoded.internal.out[0].ReadOnlyData(), []byte{1<<3 | 2}) {
		t.Errorf("the status does not come first")
	}
}

// Reading, judging and answering a check takes no memory of its own, whatever
// comes of it.
func TestCheckAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("a sync.Pool forgets under the race detector")
	}
	var reason authz.Reason
	s := MustService(t, func(c *Config) {
		c.Authorizer = authorizerFunc(func(_ context.Context, req authz.Request) authz.Decision {
			d := cannedDecide(context.Background(), req)
			d.Reason = reason
			return d
		})
	})
	list := request(approvedKey)
	list.Attributes.RouteMetadataContext = routeMetadata(map[string]any{"product": []any{other, weather}, "organization": worldOrg})
	noRoute := request(approvedKey)
	noRoute.Attributes.RouteMetadataContext = nil
	requests := benchmarked(t)
	requests["list"], requests["no key"], requests["no route"], requests["malformed key"] = list, request(), noRoute, request("a,b")
	requests["two header forms"] = request(approvedKey)
	requests["two header forms"].Attributes.Request.Http.Headers = map[string]string{":path": "/"}
	codec := newCodec()
	for name, req := range requests {
		for _, wire := range [][]byte{mustMarshal(req), append(mustMarshal(req), 0xff)} {
			pool := mem.DefaultBufferPool()
			for reason = range authz.NumReasons {
				data := mem.BufferSlice{mem.Copy(wire, pool)}
				decode := func(v any) error { return codec.Unmarshal(data, v) }
				ctx := t.Context()
				allocated := testing.AllocsPerRun(100, func() {
					resp, err := s.checkWire(nil, ctx, decode, nil)
					if err != nil {
						panic(err)
					}
					out, err := codec.Marshal(resp)
					if err != nil || out.Len() == 0 {
						panic("no answer")
					}
					out.Free()
				})
				if allocated > 0 {
					t.Errorf("%s, %v: %v allocations, want none", name, reason, allocated)
				}
			}
		}
	}
}
