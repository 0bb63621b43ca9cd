package envoy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// mustServe serves the checks of s with our options and returns the address.
func mustServe(t *testing.T, s authv3.AuthorizationServer, logger *slog.Logger) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(ServerOptions(logger)...)
	if own, ok := s.(*Service); ok {
		own.Register(server)
	} else {
		authv3.RegisterAuthorizationServer(server, s)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return l.Addr().String()
}

func mustDial(t *testing.T, address string, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn, err := grpc.NewClient("passthrough:///"+address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// handler answers checks as it is told.
type handler struct {
	authv3.UnimplementedAuthorizationServer
	check func() (*authv3.CheckResponse, error)
}

func (h handler) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return h.check()
}

// Whatever a handler does, Envoy gets no yes that was not meant.
func TestGuard(t *testing.T) {
	const secret = "the-secret-key-in-a-panic"
	ok, denied := &statuspb.Status{}, &statuspb.Status{Code: 16}
	for name, check := range map[string]func() (*authv3.CheckResponse, error){
		"panic":              func() (*authv3.CheckResponse, error) { panic(secret) },
		"panic with error":   func() (*authv3.CheckResponse, error) { panic(errors.New(secret)) },
		"runtime error":      func() (*authv3.CheckResponse, error) { var p *Service; return nil, errors.New(p.config.KeyHeader) },
		"nil, nil":           func() (*authv3.CheckResponse, error) { return nil, nil },
		"empty":              func() (*authv3.CheckResponse, error) { return &authv3.CheckResponse{}, nil },
		"ok without a word":  func() (*authv3.CheckResponse, error) { return &authv3.CheckResponse{Status: ok}, nil },
		"denied without one": func() (*authv3.CheckResponse, error) { return &authv3.CheckResponse{Status: denied}, nil },
		"no status, allowed": func() (*authv3.CheckResponse, error) {
			return &authv3.CheckResponse{HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}, nil
		},
		"ok status, denied": func() (*authv3.CheckResponse, error) {
			return &authv3.CheckResponse{Status: ok, HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{}}}, nil
		},
		"denied status, allowed": func() (*authv3.CheckResponse, error) {
			return &authv3.CheckResponse{Status: denied, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}, nil
		},
		"denied with 200": func() (*authv3.CheckResponse, error) {
			return &authv3.CheckResponse{Status: denied, HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{}}}, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			conn := mustDial(t, mustServe(t, handler{check: check}, slog.New(slog.NewTextHandler(&log, nil))))
			resp, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), request())
			if err != nil || resp.GetStatus().GetCode() != int32(codes.Internal) || resp.GetDeniedResponse().GetStatus().GetCode() != 500 {
				t.Errorf("got %v, %v, want a denial with 500", resp, err)
			}
			if strings.Contains(log.String(), secret) || log.Len() == 0 {
				t.Errorf("log: %s; want something, without the secret", log.String())
			}
		})
	}
	t.Run("an error stays one", func(t *testing.T) {
		conn := mustDial(t, mustServe(t, handler{check: func() (*authv3.CheckResponse, error) {
			return nil, status.Error(codes.DeadlineExceeded, "late")
		}}, nil))
		if resp, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), request()); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v, %v, want DeadlineExceeded", resp, err)
		}
	})
}

// A panic in what observes decisions is a refusal too.
func TestObserverPanics(t *testing.T) {
	s := MustService(t, nil)
	s.config.OnDecision = nil // calling it panics
	conn := mustDial(t, mustServe(t, s, nil))
	resp, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), request(approvedKey))
	if err != nil || resp.GetDeniedResponse().GetStatus().GetCode() != 500 {
		t.Errorf("got %v, %v, want a denial with 500", resp, err)
	}
}

// Methods other than a check fail with an error, and the process lives on.
func TestGuardOtherMethods(t *testing.T) {
	g := guard{logger: slog.New(slog.DiscardHandler)}
	_, err := g.unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/x/Y"}, func(context.Context, any) (any, error) { panic("x") })
	if status.Code(err) != codes.Internal {
		t.Errorf("unary: %v, want Internal", err)
	}
	err = g.stream(nil, fakeStream{ctx: t.Context()}, nil, func(any, grpc.ServerStream) error { panic("x") })
	if status.Code(err) != codes.Internal {
		t.Errorf("stream: %v, want Internal", err)
	}
}

type fakeStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s fakeStream) Context() context.Context { return s.ctx }

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// Bytes that are no CheckRequest, or too much of one, are never a yes. Read off
// the wire they are not even an error.
func TestRawRequests(t *testing.T) { eachCodec(t, testRawRequests) }

func testRawRequests(t *testing.T, edit func(*Config)) {
	s := MustService(t, edit)
	conn := mustDial(t, mustServe(t, s, nil), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{})))
	good, err := proto.Marshal(request(approvedKey))
	if err != nil {
		t.Fatal(err)
	}
	random := make([]byte, 4096)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(random)

	headers := func(n int) []byte {
		entry := protowire.AppendTag(nil, 3, protowire.BytesType) // HttpRequest.headers
		entry = protowire.AppendBytes(entry, []byte("\x0a\x01a\x12\x01b"))
		b := bytes.Repeat(entry, n)
		for _, field := range []protowire.Number{2, 4, 1} { // http in request in attributes in CheckRequest
			b = protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), b)
		}
		return b
	}
	nested := func(depth int) []byte {
		// Value{list_value: ListValue{values: Value{…}}}, from the inside out;
		// built backwards, for no quadratic copying.
		var reversed []byte
		length := 0
		for range depth {
			for _, field := range []protowire.Number{1, 6} {
				head := protowire.AppendVarint(protowire.AppendTag(nil, field, protowire.BytesType), uint64(length))
				length += len(head)
				slices.Reverse(head)
				reversed = append(reversed, head...)
			}
		}
		slices.Reverse(reversed)
		wrap := func(field protowire.Number, b []byte) []byte {
			return protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), b)
		}
		pair := func(key string, value []byte) []byte {
			return append(wrap(1, []byte(key)), wrap(2, value)...)
		}
		fields := wrap(1, pair("product", reversed)) // Struct.fields
		return wrap(1, wrap(13, wrap(1, pair("keygate", fields))))
	}
	for name, test := range map[string]struct {
		wire []byte
		want []codes.Code // OK: a response, which must refuse
	}{
		"nothing":                  {nil, []codes.Code{codes.OK}},
		"random":                   {random, []codes.Code{codes.Internal, codes.InvalidArgument}},
		"truncated":                {good[:len(good)-3], []codes.Code{codes.Internal, codes.InvalidArgument}},
		"4 MB":                     {bytes.Repeat([]byte{0x0a}, 4<<20), []codes.Code{codes.ResourceExhausted}},
		"10,000 headers":           {headers(10_000), []codes.Code{codes.OK}},
		"1,000,000 headers":        {headers(1_000_000), []codes.Code{codes.ResourceExhausted}},
		"nested 10,000 deep":       {nested(10_000), []codes.Code{codes.Internal, codes.InvalidArgument}},
		"nested 100 deep":          {nested(100), []codes.Code{codes.OK}},
		"invalid UTF-8 in a value": {bytes.Replace(good, []byte("/weather"), []byte("/weath\xff\xfe"), 1), []codes.Code{codes.Internal, codes.InvalidArgument}},
	} {
		if !s.config.StandardCodec && !slices.Contains(test.want, codes.ResourceExhausted) {
			test.want = []codes.Code{codes.OK}
		}
		var out []byte
		err := conn.Invoke(t.Context(), authv3.Authorization_Check_FullMethodName, test.wire, &out)
		if !slices.Contains(test.want, status.Code(err)) {
			t.Errorf("%s: %v, want one of %v", name, err, test.want)
		}
		var resp authv3.CheckResponse
		if err == nil && (proto.Unmarshal(out, &resp) != nil || resp.GetStatus().GetCode() == 0) {
			t.Errorf("%s: answered %v, want a refusal", name, &resp)
		}
		if k := holdsKey(status.Convert(err).Message()); k != "" {
			t.Errorf("%s: the error holds the key %s", name, k)
		}
	}
	// And the server still answers.
	var out []byte
	if err := conn.Invoke(t.Context(), authv3.Authorization_Check_FullMethodName, good, &out); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// Methods that are not there, and one without a slash, are Unimplemented.
func TestUnknownMethods(t *testing.T) {
	address := mustServe(t, MustService(t, nil), nil)
	conn := mustDial(t, address)
	for _, method := range []string{"/envoy.service.auth.v3.Authorization/Other", "/envoy.service.auth.v2.Authorization/Check"} {
		if err := conn.Invoke(t.Context(), method, request(approvedKey), &authv3.CheckResponse{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v, want Unimplemented", method, err)
		}
	}
	// No client library sends the path without its slash.
	if got := rawCall(t, address, "envoy.service.auth.v3.Authorization/Check"); got != "12" {
		t.Errorf("path without a slash: grpc-status %q, want 12", got)
	}
	if got := rawCall(t, address, "/envoy.service.auth.v3.Authorization/Check"); got != "0" {
		t.Errorf("path with its slash: grpc-status %q, want 0", got)
	}
}

// rawCall sends an empty message to path over HTTP/2 and returns the
// grpc-status that comes back.
func rawCall(t *testing.T, address, path string) string {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", "x"},
		{"content-type", "application/grpc"}, {"te", "trailers"}} {
		if err := enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
			t.Fatal(err)
		}
	}
	message := make([]byte, 5)
	binary.BigEndian.PutUint32(message[1:], 0)
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := errors.Join(
		framer.WriteSettings(),
		framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true}),
		framer.WriteData(1, true, message),
	); err != nil {
		t.Fatal(err)
	}
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatalf("%s: read: %v", path, err)
		}
		if h, ok := frame.(*http2.MetaHeadersFrame); ok && h.StreamEnded() {
			for _, f := range h.Fields {
				if f.Name == "grpc-status" {
					return f.Value
				}
			}
			return ""
		}
	}
}
