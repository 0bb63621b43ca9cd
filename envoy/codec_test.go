package envoy

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"keygate/authz"
)

// mustServeAll serves s as a replica does, with health and reflection.
func mustServeAll(t *testing.T, s *Service, logger *slog.Logger) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(ServerOptions(logger)...)
	s.Register(server)
	if got, want := server.GetServiceInfo()[ServiceName].Metadata, authv3.Authorization_ServiceDesc.Metadata; got != want {
		t.Errorf("the service says that its file is %v, want %v", got, want)
	}
	healthpb.RegisterHealthServer(server, health.NewServer())
	reflection.Register(server)
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

// eachCodec runs a test with both values of Config.StandardCodec.
func eachCodec(t *testing.T, test func(t *testing.T, edit func(*Config))) {
	for name, standard := range map[string]bool{"wire": false, "standard": true} {
		t.Run(name, func(t *testing.T) { test(t, func(c *Config) { c.StandardCodec = standard }) })
	}
}

// A client of gRPC gets the golden answers from a listener.
func TestGoldenOverListener(t *testing.T) {
	eachCodec(t, func(t *testing.T, edit func(*Config)) {
		clients, services := map[string]authv3.AuthorizationClient{}, map[string]*Service{}
		for folder, folderEdit := range goldenConfigs {
			s := MustService(t, func(c *Config) {
				edit(c)
				if folderEdit != nil {
					folderEdit(c)
				}
			})
			services[folder] = s
			clients[folder] = authv3.NewAuthorizationClient(mustDial(t, mustServeAll(t, s, nil)))
		}
		for name, req := range goldenRequests(t) {
			folder, _, _ := strings.Cut(name, "/")
			want, err := services[folder].Check(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			got, err := clients[folder].Check(t.Context(), req)
			if err != nil || !proto.Equal(got, want) {
				t.Errorf("%s: %v, %v, want %v", name, got, err, want)
			}
		}
	})
}

// Health and reflection go on working beside the checks' own codec.
func TestOtherServices(t *testing.T) {
	eachCodec(t, func(t *testing.T, edit func(*Config)) {
		conn := mustDial(t, mustServeAll(t, MustService(t, edit), nil))
		if resp, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil ||
			resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("health: %v, %v", resp, err)
		}
		stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ask := func(req *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
			t.Helper()
			if err := stream.Send(req); err != nil {
				t.Fatal(err)
			}
			resp, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			return resp
		}
		list := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		var names []string
		for _, s := range list.GetListServicesResponse().GetService() {
			names = append(names, s.GetName())
		}
		if !slices.Contains(names, ServiceName) {
			t.Errorf("reflection lists %v", names)
		}
		file := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: ServiceName + ".Check"}})
		var descriptor descriptorpb.FileDescriptorProto
		if raw := file.GetFileDescriptorResponse().GetFileDescriptorProto(); len(raw) == 0 || proto.Unmarshal(raw[0], &descriptor) != nil ||
			descriptor.GetName() != "envoy/service/auth/v3/external_auth.proto" {
			t.Errorf("reflection does not tell the file of Check: %v", file)
		}
	})
}

// Whatever panics or says nothing, Envoy gets a denial with 500.
func TestWirePanics(t *testing.T) {
	const secret = "the-secret-key-in-a-panic"
	for name, edit := range map[string]func(*Config){
		"authorizer": func(c *Config) {
			c.Authorizer = authorizerFunc(func(context.Context, authz.Request) authz.Decision { panic(secret) })
		},
		"observer": func(c *Config) { c.OnDecision = func(authz.Decision, time.Duration) { panic(secret) } },
		"allow of nobody": func(c *Config) {
			c.Authorizer = authorizerFunc(func(context.Context, authz.Request) authz.Decision { return authz.Decision{Reason: authz.Allowed} })
		},
		"no reason at all": func(c *Config) {
			c.Authorizer = authorizerFunc(func(context.Context, authz.Request) authz.Decision { return authz.Decision{Reason: 200} })
		},
	} {
		eachCodec(t, func(t *testing.T, codec func(*Config)) {
			var log bytes.Buffer
			logger := slog.New(slog.NewTextHandler(&log, nil))
			s := MustService(t, func(c *Config) { codec(c); c.Logger = logger; edit(c) })
			client := authv3.NewAuthorizationClient(mustDial(t, mustServeAll(t, s, logger)))
			for range 3 { // and the process lives on
				resp, err := client.Check(t.Context(), request(approvedKey))
				if err != nil || resp.GetStatus().GetCode() != int32(codes.Internal) || resp.GetDeniedResponse().GetStatus().GetCode() != 500 {
					t.Errorf("%s: %v, %v, want a denial with 500", name, resp, err)
				}
			}
			if strings.Contains(log.String(), secret) {
				t.Errorf("%s: the log holds what was panicked with: %s", name, log.String())
			}
		})
	}
}

// What is no CheckRequest is refused by a response, which no failure_mode_allow
// opens, and told as malformed.
func TestMalformedIsADenial(t *testing.T) {
	var seen recorder
	s := MustService(t, func(c *Config) { c.OnDecision = seen.observe })
	conn := mustDial(t, mustServeAll(t, s, nil), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{})))
	good := mustMarshal(request(approvedKey))
	for name, wire := range map[string][]byte{
		"cut off": good[:len(good)-3], "random": []byte("GET / HTTP/1.1\r\n\r\n"), "doubled": append(slices.Clone(good), good...),
		"not UTF-8": bytes.Replace(good, []byte("/weather"), []byte("/weath\xff\xfe"), 1),
	} {
		var out []byte
		if err := conn.Invoke(t.Context(), authv3.Authorization_Check_FullMethodName, wire, &out); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var resp authv3.CheckResponse
		if err := proto.Unmarshal(out, &resp); err != nil || resp.GetDeniedResponse().GetStatus().GetCode() != 500 {
			t.Errorf("%s: answered %v, want a denial with 500", name, &resp)
		}
		if d := seen.decisions[len(seen.decisions)-1]; d.Reason != authz.Internal || !strings.HasPrefix(d.Problem, malformed) {
			t.Errorf("%s: told %v, %q", name, d.Reason, d.Problem)
		}
	}
	var out []byte
	if err := conn.Invoke(t.Context(), authv3.Authorization_Check_FullMethodName, good, &out); err != nil || len(out) == 0 {
		t.Errorf("afterwards: %v", err)
	}
}

// A second message in one call is an error of the client's, and takes no
// memory with it.
func TestTwoMessages(t *testing.T) {
	conn := mustDial(t, mustServeAll(t, MustService(t, nil), nil))
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, authv3.Authorization_Check_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := stream.SendMsg(request(approvedKey)); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(new(authv3.CheckResponse)); status.Code(err) != codes.Internal {
		t.Errorf("two messages: %v, want Internal", err)
	}
}

// A caller that has gone costs no work, and a deadline reaches the authorizer.
func TestWireDeadline(t *testing.T) {
	s := MustService(t, func(c *Config) {
		c.Authorizer = authorizerFunc(func(context.Context, authz.Request) authz.Decision { t.Error("asked"); return authz.Decision{} })
	})
	ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	wire := mem.SliceBuffer(mustMarshal(request(approvedKey)))
	resp, err := s.checkWire(nil, ctx, func(v any) error { return newCodec().Unmarshal(mem.BufferSlice{wire}, v) }, nil)
	if status.Code(err) != codes.DeadlineExceeded || resp != nil {
		t.Errorf("got %v, %v, want DeadlineExceeded", resp, err)
	}
}

// scribbler is where a message goes back to: it writes over it.
type scribbler struct{ puts int }

func (*scribbler) Get(n int) *[]byte { return new(make([]byte, n)) }

func (s *scribbler) Put(b *[]byte) {
	s.puts++
	for i := range *b {
		(*b)[i] = '!'
	}
}

// The message is held for as long as its bytes are looked at, and then let go,
// once, whatever comes of the check.
func TestMessageIsHeld(t *testing.T) {
	for name, wire := range map[string][]byte{"allowed": mustMarshal(request(approvedKey)), "malformed": bytes.Repeat([]byte{0xff}, 20), "empty": {}} {
		s := MustService(t, nil)
		pool := new(scribbler)
		message := append(make([]byte, 0, 2048), wire...) // grpc-go pools nothing small
		decode := func(v any) error {
			data := mem.BufferSlice{mem.NewBuffer(&message, pool)}
			defer data.Free()
			if err := newCodec().Unmarshal(data, v); err != nil {
				return err
			}
			if pool.puts != 0 {
				t.Errorf("%s: let go before it was read", name)
			}
			return nil
		}
		resp, err := s.checkWire(nil, t.Context(), decode, nil)
		if err != nil {
			t.Fatal(err)
		}
		if pool.puts != 1 {
			t.Errorf("%s: let go %d times, want once", name, pool.puts)
		}
		var decoded authv3.CheckResponse
		if err := proto.Unmarshal(resp.(*reply).out.Materialize(), &decoded); err != nil || (decoded.GetOkResponse() != nil) != (name == "allowed") {
			t.Errorf("%s: %v, %v", name, &decoded, err)
		}
	}
}

// Many checks at once get each its own answer: the memory that they share is
// never shared at the same time.
func TestConcurrentKeys(t *testing.T) {
	eachCodec(t, func(t *testing.T, edit func(*Config)) {
		s := MustService(t, func(c *Config) {
			edit(c)
			c.Authorizer = authorizerFunc(func(_ context.Context, req authz.Request) authz.Decision {
				return authz.Decision{Reason: authz.Allowed, Organization: req.Organization, KeyID: req.KeyID, Product: req.Products[0],
					App: authz.AppID("app of " + req.KeyID.String()), Developer: authz.DeveloperID(strings.Repeat("d", 200+int(req.KeyID[0])*8))}
			})
		})
		address := mustServeAll(t, s, nil)
		var wg sync.WaitGroup
		for worker := range 8 {
			client := authv3.NewAuthorizationClient(mustDial(t, address))
			wg.Go(func() {
				for i := range 200 {
					key, product := fmt.Sprintf("key-of-worker-%d-number-%d", worker, i), fmt.Sprintf("product-%d-%d", worker, i%7)
					req := request(key)
					req.Attributes.RouteMetadataContext = routeMetadata(map[string]any{"product": product})
					resp, err := client.Check(t.Context(), req)
					fields := resp.GetDynamicMetadata().GetFields()
					id := idOf(key).String()
					if err != nil || fields["key_id"].GetStringValue() != id || fields["product"].GetStringValue() != product ||
						fields["app"].GetStringValue() != "app of "+id || resp.GetOkResponse() == nil {
						t.Errorf("%s, %s: %v, %v", key, product, resp, err)
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

// Checks pass over interceptors; calls of other services do not.
func TestInterceptorsSeeOthers(t *testing.T) {
	seen := map[string]int{}
	interceptor := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		seen[info.FullMethod]++
		return handler(ctx, req)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(append(ServerOptions(nil), grpc.ChainUnaryInterceptor(interceptor))...)
	MustService(t, nil).Register(server)
	healthpb.RegisterHealthServer(server, health.NewServer())
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	conn := mustDial(t, l.Addr().String())
	_, checkErr := authv3.NewAuthorizationClient(conn).Check(t.Context(), request(approvedKey))
	_, healthErr := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	server.Stop()
	if err := <-done; err != nil || checkErr != nil || healthErr != nil {
		t.Fatal(err, checkErr, healthErr)
	}
	if seen[authv3.Authorization_Check_FullMethodName] != 0 || seen[healthpb.Health_Check_FullMethodName] != 1 {
		t.Errorf("interceptors saw %v, want health alone", seen)
	}
}

// No bytes would be a yes to Envoy.
func TestUnfinishedAnswer(t *testing.T) {
	if out, err := newCodec().Marshal(MustService(t, nil).reply()); err == nil {
		t.Errorf("an answer that was not finished is sent as %v, want an error", out)
	}
}
