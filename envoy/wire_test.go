package envoy

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"keygate/authz"
)

// decideBytes is the decision on a message in bytes.
func decideBytes(tb testing.TB, s *Service, wire []byte) authz.Decision {
	tb.Helper()
	c := new(call)
	c.hold(mem.SliceBuffer(wire))
	s.decideWire(tb.Context(), c)
	return c.decision
}

// checkBytes answers a message through the handler and the codec that a server
// has, and gives everything back as a server does.
func checkBytes(tb testing.TB, s *Service, pieces ...[]byte) *authv3.CheckResponse {
	tb.Helper()
	codec := newCodec()
	var data mem.BufferSlice
	for _, p := range pieces {
		data = append(data, mem.Copy(p, mem.DefaultBufferPool()))
	}
	resp, err := s.checkWire(nil, tb.Context(), func(v any) error {
		defer data.Free()
		return codec.Unmarshal(data, v)
	}, nil)
	if err != nil {
		tb.Fatalf("Check: %v", err)
	}
	out, err := codec.Marshal(resp)
	if err != nil {
		tb.Fatalf("Marshal: %v", err)
	}
	defer out.Free()
	var decoded authv3.CheckResponse
	if err := proto.Unmarshal(out.Materialize(), &decoded); err != nil {
		tb.Fatalf("the answer's bytes are no CheckResponse: %v", err)
	}
	return &decoded
}

// sameDecision compares a decision on bytes with that on the message that
// proto.Unmarshal makes of them. It tells what is wrong, or "".
func sameDecision(tb testing.TB, s *Service, wire []byte) string {
	tb.Helper()
	got := decideBytes(tb, s, wire)
	var req authv3.CheckRequest
	if err := proto.Unmarshal(wire, &req); err != nil {
		if got.Reason != authz.Internal || !strings.HasPrefix(got.Problem, malformed) {
			return "taken although it cannot be decoded: " + got.Reason.String() + " " + err.Error()
		}
		return ""
	}
	want := s.decide(tb.Context(), &req)
	if got == want {
		return ""
	}
	if got.Reason == authz.Internal && strings.HasPrefix(got.Problem, malformed) || got.Reason == authz.KeyMalformed && strings.HasSuffix(got.Problem, " key headers") {
		return "" // a key of a map twice
	}
	return "from bytes: " + got.Reason.String() + " " + got.Problem + "; decoded: " + want.Reason.String() + " " + want.Problem
}

// goldenRequests are those of one folder of testdata/check, or of all for "".
func goldenRequests(tb testing.TB) map[string]*authv3.CheckRequest {
	tb.Helper()
	requests := map[string]*authv3.CheckRequest{}
	for folder := range goldenConfigs {
		files, err := filepath.Glob(filepath.Join("testdata", "check", folder, "*.request.json"))
		if err != nil || len(files) == 0 {
			tb.Fatalf("no requests for %s: %v", folder, err)
		}
		for _, file := range files {
			var req authv3.CheckRequest
			mustReadJSON(tb, file, &req)
			requests[folder+"/"+strings.TrimSuffix(filepath.Base(file), ".request.json")] = &req
		}
	}
	return requests
}

func mustWire(tb testing.TB, m proto.Message) []byte {
	tb.Helper()
	wire, err := proto.Marshal(m)
	if err != nil {
		tb.Fatal(err)
	}
	return wire
}

// Every decision on what proto.Marshal writes is exactly that on the message.
func TestWireGolden(t *testing.T) {
	for name, req := range goldenRequests(t) {
		folder, _, _ := strings.Cut(name, "/")
		s := MustService(t, goldenConfigs[folder])
		got, want := decideBytes(t, s, mustWire(t, req)), s.decide(t.Context(), req)
		if got != want {
			t.Errorf("%s: from bytes %+v, want %+v", name, got, want)
		}
	}
}

// The schema holds all that the descriptors hold, and nothing that it has no
// form for.
func TestSchema(t *testing.T) {
	seen := map[*message]bool{}
	var compare func(m *message, d protoreflect.MessageDescriptor)
	compare = func(m *message, d protoreflect.MessageDescriptor) {
		if seen[m] {
			return
		}
		seen[m] = true
		if d.Syntax() != protoreflect.Proto3 || d.ExtensionRanges().Len() > 0 {
			t.Errorf("%s is not proto3", d.FullName())
		}
		for i := range d.Fields().Len() {
			fd := d.Fields().Get(i)
			f := m.fields[fd.Number()]
			if f.forms == ([8]form{}) || fd.Kind() == protoreflect.GroupKind {
				t.Errorf("%s is not known", fd.FullName())
			}
			if fd.Message() != nil {
				compare(f.message, fd.Message())
			}
		}
	}
	compare(newSchema().request, (&authv3.CheckRequest{}).ProtoReflect().Descriptor())
	if len(seen) < 20 {
		t.Errorf("%d kinds of message, want many more", len(seen))
	}
}

// Numbers in the code are those of the descriptors.
func TestFieldNumbers(t *testing.T) {
	d := (&authv3.CheckRequest{}).ProtoReflect().Descriptor()
	response := (&authv3.CheckResponse{}).ProtoReflect().Descriptor()
	for path, numbers := range map[string][]protowire.Number{
		"attributes.request.http.headers.value":                                                  {requestAttributes, attributesRequest, requestHTTP, httpRequestHeaders, entryValue},
		"attributes.request.http.headers.key":                                                    {requestAttributes, attributesRequest, requestHTTP, httpRequestHeaders, entryKey},
		"attributes.request.http.path":                                                           {requestAttributes, attributesRequest, requestHTTP, httpRequestPath},
		"attributes.request.http.header_map.headers.key":                                         {requestAttributes, attributesRequest, requestHTTP, httpRequestHeaderMap, headerMapHeaders, headerKey},
		"attributes.request.http.header_map.headers.value":                                       {requestAttributes, attributesRequest, requestHTTP, httpRequestHeaderMap, headerMapHeaders, headerValue},
		"attributes.request.http.header_map.headers.raw_value":                                   {requestAttributes, attributesRequest, requestHTTP, httpRequestHeaderMap, headerMapHeaders, headerRaw},
		"attributes.context_extensions.value":                                                    {requestAttributes, attributesExtensions, entryValue},
		"attributes.route_metadata_context.filter_metadata.value.fields.value.string_value":      {requestAttributes, attributesRouteMetadata, metadataFilter, entryValue, structFields, entryValue, valueString},
		"attributes.route_metadata_context.filter_metadata.value.fields.value.list_value.values": {requestAttributes, attributesRouteMetadata, metadataFilter, entryValue, structFields, entryValue, valueListValue, listValues},
		">ok_response.headers.header.key":                                                        {responseOK, okHeaders, optionHeader, headerKey},
		">ok_response.headers.append_action":                                                     {responseOK, okHeaders, optionAction},
		">ok_response.headers_to_remove":                                                         {responseOK, okRemove},
		">dynamic_metadata.fields.value.string_value":                                            {responseMetadata, structFields, entryValue, valueString},
	} {
		at := d
		if strings.HasPrefix(path, ">") {
			at = response
		}
		var got []protowire.Number
		for name := range strings.SplitSeq(strings.TrimPrefix(path, ">"), ".") {
			fd := at.Fields().ByName(protoreflect.Name(name))
			if fd == nil {
				t.Fatalf("%s: no field %s", path, name)
			}
			got = append(got, fd.Number())
			at = fd.Message()
		}
		if !reflect.DeepEqual(got, numbers) {
			t.Errorf("%s is %v, in the code %v", path, got, numbers)
		}
	}
}
