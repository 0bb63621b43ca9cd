package keygatetest_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"keygate/authz"
	"keygate/envoy"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
)

// bytesCodec sends and receives messages as they are.
type bytesCodec struct{}

func (bytesCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (bytesCodec) Name() string                       { return "proto" }

// send calls a method with raw bytes and reads the answer as a CheckResponse.
func send(ctx context.Context, conn *grpc.ClientConn, method string, message []byte) (*authv3.CheckResponse, error) {
	var answer []byte
	if err := conn.Invoke(ctx, method, &message, &answer, grpc.ForceCodec(bytesCodec{})); err != nil {
		return nil, err
	}
	var resp authv3.CheckResponse
	return &resp, proto.Unmarshal(answer, &resp)
}

func mustMarshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Bytes that no Envoy sends, against the real listener: an error or a refusal,
// never a yes, and the server goes on.
func TestHostileMessages(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	const key = "key-among-hostile-messages"
	k.PutKeys(t, keygatetest.Key{Key: key})
	conn := k.Conn(t)
	good := mustMarshal(t, request(weather, key))

	t.Run("sizes", func(t *testing.T) {
		many := request(weather, key)
		for i := range 1_000_000 / 20 { // as many as the client itself would send in 4 MB
			many.Attributes.Request.Http.HeaderMap.Headers = append(many.Attributes.Request.Http.HeaderMap.Headers,
				&corev3.HeaderValue{Key: fmt.Sprintf("x-%d", i), RawValue: []byte("v")})
		}
		for name, message := range map[string][]byte{
			"4 MB":              append(bytes.Clone(good), bytes.Repeat([]byte{0}, 4<<20)...),
			"50,000 headers":    mustMarshal(t, many),
			"a byte too many":   append(bytes.Clone(good), make([]byte, envoy.MaxMessageBytes+1-len(good))...),
			"64 MB of one path": mustMarshal(t, &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Path: strings.Repeat("/", 64<<20)}}}}),
		} {
			resp, err := send(t.Context(), conn, authv3.Authorization_Check_FullMethodName, message)
			if status.Code(err) != codes.ResourceExhausted {
				t.Errorf("%s: got %v, %v, want ResourceExhausted", name, resp, err)
			}
		}
		padded := request(weather, key)
		padded.Attributes.Request.Http.Body = strings.Repeat("b", envoy.MaxMessageBytes-len(good)-20)
		resp, err := send(t.Context(), conn, authv3.Authorization_Check_FullMethodName, mustMarshal(t, padded))
		if err != nil || reasonOf(resp) != "allowed" {
			t.Errorf("a message just under the limit: got %v, %v, want allowed", resp, err)
		}
	})

	t.Run("nesting", func(t *testing.T) {
		v := structpb.NewStringValue("Weather-Product")
		for range 3_000 {
			v = structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{"a": v}})
		}
		deep := request(weather, key)
		deep.Attributes.RouteMetadataContext.FilterMetadata["keygate"].Fields["product"] = v
		resp, err := send(t.Context(), conn, authv3.Authorization_Check_FullMethodName, mustMarshal(t, deep))
		if err != nil || reasonOf(resp) != "internal" {
			t.Errorf("product nested 3,000 deep: got %s, %v, want internal", reasonOf(resp), err)
		}
		// Depth without size: groups that never end.
		message := bytes.Repeat([]byte{0x0b}, 100_000)
		if resp, err := send(t.Context(), conn, authv3.Authorization_Check_FullMethodName, message); err != nil || reasonOf(resp) != "internal" {
			t.Errorf("100,000 open groups: got %s, %v, want internal", reasonOf(resp), err)
		}
	})

	t.Run("random", func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		for i := range 3000 {
			var message []byte
			switch i % 3 {
			case 0: // nothing but noise
				message = make([]byte, random.IntN(400))
				for j := range message {
					message[j] = byte(random.Uint32())
				}
			case 1: // cut off, inside or between fields
				message = bytes.Clone(good[:random.IntN(len(good))])
			case 2: // some bits flipped in what is not the key
				message = bytes.Clone(good)
				at := bytes.Index(message, []byte(key))
				for range 1 + random.IntN(4) {
					if j := random.IntN(len(message)); j < at || j >= at+len(key) {
						message[j] ^= 1 << random.IntN(8)
					}
				}
			}
			resp, err := send(t.Context(), conn, authv3.Authorization_Check_FullMethodName, message)
			if err != nil { // which failure_mode_allow opens
				t.Fatalf("message %d: %x: got %v, want a response", i, message, err)
			}
			var req authv3.CheckRequest
			readable := proto.Unmarshal(message, &req) == nil
			switch reason := reasonOf(resp); {
			case reason == "no clear answer":
				t.Fatalf("message %d: %x: got %v, want a clear answer", i, message, resp)
			case !readable && reason == "allowed":
				t.Fatalf("message %d: %x is no CheckRequest, and was allowed", i, message)
			case reason == "allowed" && !asksGood(&req, key):
				t.Fatalf("message %d: %x: got allowed for %v", i, message, &req)
			}
		}
	})

	if got := mustCheck(t, conn, key); got != "allowed" {
		t.Errorf("after all of it: got %s, want allowed", got)
	}
	if log := k.Log(); strings.Contains(log, "panic") {
		t.Errorf("something panicked: %s", log)
	}
}

// asksGood tells whether a flipped message still asks what opens: the key in
// its header, once, and its product from the route alone.
func asksGood(req *authv3.CheckRequest, key string) bool {
	n := 0
	for _, h := range req.GetAttributes().GetRequest().GetHttp().GetHeaderMap().GetHeaders() {
		if strings.EqualFold(h.GetKey(), "x-api-key") && string(h.GetRawValue())+h.GetValue() == key {
			n++
		}
	}
	product := req.GetAttributes().GetRouteMetadataContext().GetFilterMetadata()["keygate"].GetFields()["product"].GetStringValue()
	return n == 1 && product == string(weather)
}

// An unknown field, as a newer Envoy sends, changes nothing.
func TestUnknownFieldsOfANewerEnvoy(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	const key = "key-of-a-newer-envoy-0000"
	k.PutKeys(t, keygatetest.Key{Key: key})
	message := protowire.AppendTag(mustMarshal(t, request(weather, key)), 1234, protowire.BytesType)
	message = protowire.AppendBytes(message, []byte("new"))
	resp, err := send(t.Context(), k.Conn(t), authv3.Authorization_Check_FullMethodName, message)
	if err != nil || reasonOf(resp) != "allowed" {
		t.Errorf("got %v, %v, want allowed", resp, err)
	}
}

// Keys that the wire can carry and Envoy would not: straight at the listener,
// over real records.
func TestKeyFormsOverRealRecords(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	const key = "Key-With-Both-Cases.00=="
	k.PutKeys(t, keygatetest.Key{Key: key})
	conn := k.Conn(t)
	for _, test := range []struct{ key, want string }{
		{key, "allowed"},
		{strings.ToLower(key), "key_unknown"}, {strings.ToUpper(key), "key_unknown"},
		{key + " ", "key_malformed"}, {" " + key, "key_malformed"}, {key + "\t", "key_malformed"}, {key + "\n", "key_malformed"},
		{key + "\r\n", "key_malformed"}, {key + "\x00", "key_malformed"}, {key + "%20", "key_malformed"}, {"\ufeff" + key, "key_malformed"},
		{key + "=", "key_unknown"}, {key + ".", "key_unknown"}, {strings.TrimRight(key, "="), "key_unknown"},
		{key[1:], "key_unknown"}, {key + key, "key_unknown"},
		{"../../audit", "key_unknown"}, {"/", "key_unknown"}, {"a/b", "key_unknown"}, {"..", "key_unknown"}, {".probe", "key_unknown"},
		{"*", "key_malformed"}, {"\x00", "key_malformed"}, {"\"", "key_malformed"}, {"'", "key_malformed"}, {"", "key_missing"}, {" \t", "key_missing"},
		{strings.Repeat("k", 2048), "key_unknown"}, {strings.Repeat("k", 2049), "key_malformed"}, {strings.Repeat("k", 50_000), "key_malformed"},
	} {
		if got := mustCheck(t, conn, test.key); got != test.want {
			t.Errorf("key %.40q: got %s, want %s", test.key, got, test.want)
		}
	}
}

func TestUnknownMethods(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	const key = "key-for-unknown-methods-0"
	k.PutKeys(t, keygatetest.Key{Key: key})
	conn := k.Conn(t)
	message := mustMarshal(t, request(weather, key))
	for _, method := range []string{
		"/envoy.service.auth.v3.Authorization/Nothing", "/envoy.service.auth.v2.Authorization/Check", "/nothing/at/all", "/", "//",
		"envoy.service.auth.v3.Authorization/Check", "/envoy.service.auth.v3.Authorization/Check/", "/envoy.service.auth.v3.Authorization//Check",
		"/ENVOY.service.auth.v3.Authorization/Check",
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		resp, err := send(ctx, conn, method, message)
		cancel()
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("method %q: got %v, %v, want Unimplemented", method, resp, err)
		}
	}
	if got := mustCheck(t, conn, key); got != "allowed" {
		t.Errorf("after them: got %s, want allowed", got)
	}
}

// A call whose deadline has passed before it began is not worked on. grpc-go's
// own client would not even send it.
func TestDeadlineThatHasPassed(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	const key = "key-with-no-time-left-000"
	k.PutKeys(t, keygatetest.Key{Key: key})
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	call := func(timeout string) string {
		message := mustMarshal(t, request(weather, key))
		body := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+k.Server.AuthzAddr()+authv3.Authorization_Check_FullMethodName, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}, "Grpc-Timeout": {timeout}}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatalf("call with a timeout of %s: %v", timeout, err)
		}
		defer func() { _ = resp.Body.Close() }()
		_, err = io.Copy(io.Discard, resp.Body)
		code := resp.Trailer.Get("Grpc-Status") + resp.Header.Get("Grpc-Status") // a refusal may be headers alone
		if code == "" {
			return fmt.Sprintf("reset: %v", err)
		}
		return code
	}
	if got := call("10S"); got != "0" {
		t.Fatalf("with time: got status %s, want 0", got)
	}
	before, checks := k.Server.Store().Status(), k.Checks(t, authz.Allowed)
	for range 20 {
		// Either the handler says so, or the transport ended the stream first.
		if got := call("1n"); got != "4" && !strings.HasPrefix(got, "reset") {
			t.Errorf("without time: got status %s, want 4, DeadlineExceeded", got)
		}
	}
	after := k.Server.Store().Status()
	if before.Loads != after.Loads || before.Hits != after.Hits || k.Checks(t, authz.Allowed) != checks {
		t.Errorf("calls without time were worked on: loads %d to %d, hits %d to %d", before.Loads, after.Loads, before.Hits, after.Hits)
	}
}

// Health and reflection are there, for Envoy and for ghz and grpcurl.
func TestHealthAndReflection(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	conn := k.Conn(t)
	for _, service := range []string{"", envoy.ServiceName} {
		keygatetest.Eventually(t, 5*time.Second, "health of "+service+" to be SERVING", func() bool { return healthOf(t, conn, service) == "SERVING" })
	}
	if got := healthOf(t, conn, "nothing"); got != "NotFound" {
		t.Errorf("health of an unknown service: got %s, want NotFound", got)
	}
	stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range r.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	for _, want := range []string{envoy.ServiceName, "grpc.health.v1.Health"} {
		if !strings.Contains(strings.Join(names, " "), want) {
			t.Errorf("reflection lists %q, want %s among them", names, want)
		}
	}
}

// healthOf a service: its status, or the code of the error.
func healthOf(t *testing.T, conn *grpc.ClientConn, service string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	r, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
	if err != nil {
		return status.Code(err).String()
	}
	return r.GetStatus().String()
}

// The load tool of the README, against the whole service with the quickstart's
// records.
func TestGhz(t *testing.T) {
	ghz := tool(t, "TEST_GHZ", "ghz")
	k := keygatetest.Start(t, keygatetest.Options{})
	k.ImportQuickstart(t)
	const checks = 2000
	out, err := exec.CommandContext(t.Context(), ghz, "--insecure", "--call", envoy.ServiceName+"/Check",
		"-D", "../examples/ghz/check.json", "-n", fmt.Sprint(checks), "-c", "8", "-O", "json", k.Server.AuthzAddr()).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			out = append(out, exit.Stderr...)
		}
		t.Fatalf("ghz: %v: %s", err, out)
	}
	var report struct {
		Count                  int
		Rps                    float64
		Average                time.Duration
		StatusCodeDistribution map[string]int
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("read ghz's report: %v", err)
	}
	if report.Count != checks || report.StatusCodeDistribution["OK"] != checks {
		t.Errorf("got %d checks, by status %v, want %d OK", report.Count, report.StatusCodeDistribution, checks)
	}
	if got := k.Metrics(t)[`keygate_checks_total{decision="allowed",reason="allowed"}`]; got != checks {
		t.Errorf("got %v checks allowed, want %d: does check.json still hold the quickstart's key for %s?", got, checks, quickstart.OrdersApp)
	}
	t.Logf("ghz: %d checks, %.0f a second, mean %v", report.Count, report.Rps, report.Average)
}
