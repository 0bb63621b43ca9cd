package envoy

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/structpb"

	"keygate/authz"
)

var update = flag.Bool("update", false, "write the golden responses in testdata anew")

// goldenConfigs are the folders of testdata/check.
var goldenConfigs = map[string]func(*Config){
	"header":  nil,
	"query":   func(c *Config) { c.KeyQuery = "apikey" },
	"uniform": func(c *Config) { c.DenialBody = DenialUniform },
}

// Every request in testdata is answered as the response beside it says.
func TestGolden(t *testing.T) {
	seen := map[authz.Reason]bool{}
	for folder, edit := range goldenConfigs {
		requests, err := filepath.Glob(filepath.Join("testdata", "check", folder, "*.request.json"))
		if err != nil || len(requests) == 0 {
			t.Fatalf("no requests for %s: %v", folder, err)
		}
		for _, file := range requests {
			name := folder + "/" + strings.TrimSuffix(filepath.Base(file), ".request.json")
			t.Run(name, func(t *testing.T) {
				var req authv3.CheckRequest
				mustReadJSON(t, file, &req)
				var log bytes.Buffer
				var seenHere recorder
				s := MustService(t, func(c *Config) {
					c.OnDecision = seenHere.observe
					c.Logger = slog.New(slog.NewTextHandler(&log, nil))
					if edit != nil {
						edit(c)
					}
				})
				got, err := s.Check(t.Context(), &req)
				if err != nil {
					t.Fatalf("Check: %v", err)
				}
				if len(seenHere.decisions) != 1 {
					t.Fatalf("OnDecision was told %d decisions, want 1", len(seenHere.decisions))
				}
				d := seenHere.decisions[0]
				seen[d.Reason] = true
				if word := got.GetDynamicMetadata().GetFields()["reason"].GetStringValue(); word != d.Reason.String() {
					t.Errorf("metadata says %q, the decision %q", word, d.Reason)
				}
				if !complete(got) {
					t.Errorf("the response is neither a clear yes nor a clear no")
				}
				if k := holdsKey(log.String() + d.Problem); k != "" {
					t.Errorf("log or problem holds the key %s", k)
				}
				golden := strings.TrimSuffix(file, "request.json") + "response.json"
				if *update {
					mustWriteJSON(t, golden, got)
				}
				var want authv3.CheckResponse
				mustReadJSON(t, golden, &want)
				if diff := cmp.Diff(&want, got, protocmp.Transform()); diff != "" {
					t.Errorf("response differs from %s (-want +got):\n%s", golden, diff)
				}
			})
		}
	}
	for r := range authz.NumReasons {
		if !seen[r] {
			t.Errorf("no golden pair ends in %v", r)
		}
	}
}

func mustReadJSON(t testing.TB, file string, m proto.Message) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := protojson.Unmarshal(b, m); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// mustWriteJSON writes a stable form: protojson varies its blanks on purpose.
func mustWriteJSON(t *testing.T, file string, m proto.Message) {
	t.Helper()
	b, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append(out.Bytes(), '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

// No golden response outlives its request.
func TestGoldenPairs(t *testing.T) {
	err := filepath.WalkDir(filepath.Join("testdata", "check"), func(path string, d fs.DirEntry, err error) error {
		if base, ok := strings.CutSuffix(path, ".response.json"); ok {
			if _, err := os.Stat(base + ".request.json"); err != nil {
				t.Errorf("%s answers no request", path)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// request asks for Weather-Product with these values of x-api-key.
func request(keys ...string) *authv3.CheckRequest {
	var headers []*corev3.HeaderValue
	for _, k := range keys {
		headers = append(headers, &corev3.HeaderValue{Key: "x-api-key", RawValue: []byte(k)})
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Path: "/weather", HeaderMap: &corev3.HeaderMap{Headers: headers},
		}},
		RouteMetadataContext: routeMetadata(map[string]any{"product": weather}),
	}}
}

func routeMetadata(fields map[string]any) *corev3.Metadata {
	s, err := structpb.NewStruct(fields)
	if err != nil {
		panic(err)
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"keygate": s}}
}

func reasonOf(tb testing.TB, s *Service, req *authv3.CheckRequest) string {
	tb.Helper()
	resp, err := s.Check(tb.Context(), req)
	if err != nil {
		tb.Fatalf("Check: %v", err)
	}
	return resp.GetDynamicMetadata().GetFields()["reason"].GetStringValue()
}

// Every single byte that is not of a key's alphabet, anywhere in a good key,
// is malformed; every other change makes another key.
func TestKeyBytes(t *testing.T) {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~+/=-"
	s := MustService(t, nil)
	for b := range 256 {
		want := "key_malformed"
		if strings.IndexByte(alphabet, byte(b)) >= 0 {
			want = "key_unknown"
		}
		for _, key := range []string{
			approvedKey + string([]byte{byte(b)}),
			string([]byte{byte(b)}) + approvedKey,
			approvedKey[:4] + string([]byte{byte(b)}) + approvedKey[4:],
		} {
			if got := reasonOf(t, s, request(key)); got != want {
				t.Errorf("key with byte %#02x: %s, want %s", b, got, want)
			}
		}
	}
}

// The forms of E1 to E12 that are about size, count and shape.
func TestKeyForms(t *testing.T) {
	s := MustService(t, nil)
	for _, test := range []struct {
		name string
		keys []string
		want string
	}{
		{"none", nil, "key_missing"},
		{"empty", []string{""}, "key_missing"},
		{"blanks", []string{" \t"}, "key_missing"},
		{"good", []string{approvedKey}, "allowed"},
		{"good twice", []string{approvedKey, approvedKey}, "key_malformed"},
		{"good and bad", []string{approvedKey, "x"}, "key_malformed"},
		{"good and empty", []string{approvedKey, ""}, "key_malformed"},
		{"joined", []string{approvedKey + "," + approvedKey}, "key_malformed"},
		{"lower case of an upper-case key", []string{strings.ToUpper(approvedKey)}, "key_unknown"},
		{"percent-encoded blank", []string{approvedKey + "%20"}, "key_malformed"},
		{"one more =", []string{approvedKey + "="}, "key_unknown"},
		{"one more .", []string{approvedKey + "."}, "key_unknown"},
		{"folded line", []string{approvedKey + "\r\n x"}, "key_malformed"},
		{"NUL", []string{approvedKey + "\x00"}, "key_malformed"},
		{"2048 bytes", []string{strings.Repeat("k", 2048)}, "key_unknown"},
		{"2049 bytes", []string{strings.Repeat("k", 2049)}, "key_malformed"},
		{"50 KB", []string{strings.Repeat("k", 50<<10)}, "key_malformed"},
		{"path upwards", []string{"../../audit"}, "key_unknown"},
		{"slash", []string{"/"}, "key_unknown"},
		{"star", []string{"*"}, "key_malformed"},
		{"path", []string{"a/b"}, "key_unknown"},
	} {
		if got := reasonOf(t, s, request(test.keys...)); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// A key that is far too long costs nothing.
func TestLongKeyAllocation(t *testing.T) {
	s := MustService(t, nil)
	req := request(strings.Repeat("k", 50<<10))
	result := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var a attributes
			a.read(req, s.config.KeyHeader)
			judgeKey(&a, "")
		}
	})
	if got := result.AllocedBytesPerOp(); got > 100 {
		t.Errorf("a key of 50 KB costs %d bytes, want at most 100", got)
	}
}

func TestNilParts(t *testing.T) {
	s := MustService(t, nil)
	for name, req := range map[string]*authv3.CheckRequest{
		"request":    nil,
		"attributes": {},
		"http":       {Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{}}},
		"headers": {Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{
			Http: &authv3.AttributeContext_HttpRequest{HeaderMap: &corev3.HeaderMap{Headers: []*corev3.HeaderValue{nil}}}}}},
	} {
		if got := reasonOf(t, s, req); got != "key_missing" {
			t.Errorf("no %s: %s, want key_missing", name, got)
		}
	}
	req := request(approvedKey)
	for name, m := range map[string]*corev3.Metadata{
		"metadata":  nil,
		"namespace": {FilterMetadata: map[string]*structpb.Struct{"keygate": nil}},
		"value":     {FilterMetadata: map[string]*structpb.Struct{"keygate": {Fields: map[string]*structpb.Value{"product": nil}}}},
		"kind":      {FilterMetadata: map[string]*structpb.Struct{"keygate": {Fields: map[string]*structpb.Value{"product": {}}}}},
		"list": {FilterMetadata: map[string]*structpb.Struct{"keygate": {Fields: map[string]*structpb.Value{
			"product": {Kind: &structpb.Value_ListValue{}}}}}},
		"item": {FilterMetadata: map[string]*structpb.Struct{"keygate": {Fields: map[string]*structpb.Value{
			"product": {Kind: &structpb.Value_ListValue{ListValue: &structpb.ListValue{Values: []*structpb.Value{nil}}}}}}}},
	} {
		req.Attributes.RouteMetadataContext = m
		if got := reasonOf(t, s, req); got != "product_unresolved" {
			t.Errorf("no %s: %s, want product_unresolved", name, got)
		}
	}
}

// Without a default organization a route must name one.
func TestNoDefaultOrganization(t *testing.T) {
	s := MustService(t, func(c *Config) { c.Organization = "" })
	req := request(approvedKey)
	if got := reasonOf(t, s, req); got != "product_unresolved" {
		t.Errorf("no organization: %s, want product_unresolved", got)
	}
	req.Attributes.ContextExtensions = map[string]string{"keygate.organization": worldOrg}
	if got := reasonOf(t, s, req); got != "allowed" {
		t.Errorf("organization from the context extension: %s, want allowed", got)
	}
}

type authorizerFunc func(context.Context, authz.Request) authz.Decision

func (f authorizerFunc) Decide(ctx context.Context, r authz.Request) authz.Decision { return f(ctx, r) }

// A caller that has gone costs no work.
func TestDeadlinePassed(t *testing.T) {
	s := MustService(t, func(c *Config) {
		c.Authorizer = authorizerFunc(func(context.Context, authz.Request) authz.Decision {
			t.Error("the authorizer was asked")
			return authz.Decision{}
		})
		c.OnDecision = func(authz.Decision, time.Duration) { t.Error("a decision was told") }
	})
	ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if resp, err := s.Check(ctx, request(approvedKey)); status.Code(err) != codes.DeadlineExceeded || resp != nil {
		t.Errorf("got %v, %v, want DeadlineExceeded", resp, err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if resp, err := s.Check(canceled, request(approvedKey)); status.Code(err) != codes.Canceled || resp != nil {
		t.Errorf("got %v, %v, want Canceled", resp, err)
	}
}

// An authorizer that allows without saying whom or what is refused, and the
// observer is told so.
func TestUnidentifiedAllow(t *testing.T) {
	whole := authz.Decision{Reason: authz.Allowed, Organization: worldOrg, KeyID: idOf(approvedKey), Product: weather}
	for name, edit := range map[string]func(*authz.Decision){
		"key":          func(d *authz.Decision) { d.KeyID = authz.KeyID{} },
		"organization": func(d *authz.Decision) { d.Organization = "" },
		"product":      func(d *authz.Decision) { d.Product = "" },
	} {
		d := whole
		edit(&d)
		var seen recorder
		s := MustService(t, func(c *Config) {
			c.Authorizer = authorizerFunc(func(context.Context, authz.Request) authz.Decision { return d })
			c.OnDecision = seen.observe
		})
		if got := reasonOf(t, s, request(approvedKey)); got != "internal" || seen.decisions[0].Reason != authz.Internal {
			t.Errorf("without %s: answered %s, told %v, want internal", name, got, seen.decisions[0].Reason)
		}
	}
}

func TestConfig(t *testing.T) {
	authorizer := &authz.Authorizer{Source: newWorld()}
	for name, config := range map[string]Config{
		"no authorizer":             {},
		"header with underscore":    {Authorizer: authorizer, KeyHeader: "x_api_key"},
		"pseudo header":             {Authorizer: authorizer, KeyHeader: ":path"},
		"authorization":             {Authorizer: authorizer, KeyHeader: "Authorization"},
		"host":                      {Authorizer: authorizer, KeyHeader: "host"},
		"own header":                {Authorizer: authorizer, KeyHeader: "X-Keygate-App"},
		"header with line break":    {Authorizer: authorizer, KeyHeader: "x-api-key\r\nx"},
		"header with five hyphens":  {Authorizer: authorizer, KeyHeader: "a-b-c-d-e-f"},
		"query that needs escaping": {Authorizer: authorizer, KeyQuery: "api key"},
		"query with an ampersand":   {Authorizer: authorizer, KeyQuery: "a&b"},
		"denial body":               {Authorizer: authorizer, DenialBody: "html"},
		"organization with a dot":   {Authorizer: authorizer, Organization: ".x"},
		"organization too long":     {Authorizer: authorizer, Organization: authz.Organization(strings.Repeat("o", 257))},
	} {
		if _, err := New(config); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	s, err := New(Config{Authorizer: authorizer, KeyHeader: "ApiKey", Organization: worldOrg})
	if err != nil {
		t.Fatal(err)
	}
	req := request(approvedKey)
	req.Attributes.Request.Http.HeaderMap.Headers[0].Key = "apikey"
	if got := reasonOf(t, s, req); got != "allowed" {
		t.Errorf("key in the configured header: %s, want allowed", got)
	}
	if got := reasonOf(t, s, request(approvedKey)); got != "key_missing" {
		t.Errorf("key in the default header although another is configured: %s, want key_missing", got)
	}
}

func BenchmarkCheck(b *testing.B) {
	s := MustService(b, nil)
	ctx := b.Context()
	for name, req := range map[string]*authv3.CheckRequest{
		"allowed": request(approvedKey),
		"denied":  request(revokedKey),
		"missing": request(),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				resp, err := s.Check(ctx, req)
				if err != nil || resp.GetStatus() == nil {
					b.Fatal(resp, err)
				}
			}
		})
	}
	b.Run("with the wire", func(b *testing.B) {
		wire, err := proto.Marshal(request(approvedKey))
		if err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		for b.Loop() {
			var req authv3.CheckRequest
			if err := proto.Unmarshal(wire, &req); err != nil {
				b.Fatal(err)
			}
			resp, err := s.Check(ctx, &req)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := proto.Marshal(resp); err != nil {
				b.Fatal(err)
			}
		}
	})
}
