package envoy

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"keygate/authz"
)

// lengthed is a field that holds what parts are together.
func lengthed(number protowire.Number, parts ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), slices.Concat(parts...))
}

func stringField(number protowire.Number, s string) []byte { return lengthed(number, []byte(s)) }

func numberField(number protowire.Number) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, number, protowire.VarintType), 1)
}

// wireParts are the pieces of a request that is allowed, for tests that put
// them together otherwise.
type wireParts struct {
	header, path, product, organization []byte
}

func newWireParts() wireParts {
	return wireParts{
		header: lengthed(headerMapHeaders, stringField(headerKey, "x-api-key"), stringField(headerRaw, approvedKey)),
		path:   stringField(httpRequestPath, "/weather"),
		product: lengthed(structFields, stringField(entryKey, "product"),
			lengthed(entryValue, stringField(valueString, weather))),
		organization: lengthed(structFields, stringField(entryKey, "organization"),
			lengthed(entryValue, stringField(valueString, worldOrg))),
	}
}

func wireHTTP(parts ...[]byte) []byte { return lengthed(requestHTTP, parts...) }

func wireRequest(parts ...[]byte) []byte { return lengthed(attributesRequest, parts...) }

func wireMetadata(parts ...[]byte) []byte { return lengthed(attributesRouteMetadata, parts...) }

func wireNamespace(name string, fields ...[]byte) []byte {
	return lengthed(metadataFilter, stringField(entryKey, name), lengthed(entryValue, fields...))
}

func wireCheck(attributes ...[]byte) []byte { return lengthed(requestAttributes, attributes...) }

// nestedValue is a google.protobuf.Value of lists in lists.
func nestedValue(lists int) []byte {
	b := stringField(valueString, "x")
	for range lists {
		b = lengthed(valueListValue, lengthed(listValues, b))
	}
	return b
}

// What the walk refuses, and what it takes as proto.Unmarshal does.
func TestWireForms(t *testing.T) {
	p := newWireParts()
	headers := lengthed(httpRequestHeaderMap, p.header)
	request := wireRequest(wireHTTP(p.path, headers))
	route := wireMetadata(wireNamespace("keygate", p.product, p.organization))
	whole := wireCheck(request, route)
	within := func(fields ...[]byte) []byte {
		return wireCheck(request, wireMetadata(wireNamespace("keygate", fields...)))
	}
	withHTTP := func(parts ...[]byte) []byte { return wireCheck(wireRequest(wireHTTP(parts...)), route) }
	withAttribute := func(b ...byte) []byte { return wireCheck(request, route, b) }
	const allowed = "allowed"
	extension := func(name, value string) []byte {
		return lengthed(attributesExtensions, stringField(entryKey, name), stringField(entryValue, value))
	}
	for name, test := range map[string]struct {
		wire []byte
		want string // allowed, a word of wire.go, or a reason
	}{
		"whole":                   {whole, allowed},
		"reordered":               {wireCheck(route, wireRequest(wireHTTP(headers, p.path))), allowed},
		"attributes twice":        {slices.Concat(whole, whole), wireRepeated},
		"attributes in two parts": {slices.Concat(wireCheck(request), wireCheck(route)), wireRepeated},
		"request twice":           {wireCheck(request, request, route), wireRepeated},
		"http twice":              {wireCheck(wireRequest(wireHTTP(p.path), wireHTTP(headers)), route), wireRepeated},
		"path twice":              {withHTTP(p.path, p.path, headers), wireRepeated},
		"header map twice":        {withHTTP(headers, lengthed(httpRequestHeaderMap)), wireRepeated},
		"two key headers":         {withHTTP(lengthed(httpRequestHeaderMap, p.header, p.header)), "key_malformed"},
		"headers' key twice": {withHTTP(lengthed(httpRequestHeaders, stringField(1, "x-api-key"), stringField(2, approvedKey)),
			lengthed(httpRequestHeaders, stringField(1, "x-api-key"), stringField(2, approvedKey))), "key_malformed"},
		"headers":              {withHTTP(lengthed(httpRequestHeaders, stringField(1, "x-api-key"), stringField(2, approvedKey))), allowed},
		"headers, value first": {withHTTP(lengthed(httpRequestHeaders, stringField(2, approvedKey), stringField(1, "x-api-key"))), allowed},
		"header with two keys": {withHTTP(lengthed(httpRequestHeaderMap, lengthed(1, stringField(headerKey, "x-api-key"),
			stringField(headerKey, "x"), stringField(headerRaw, approvedKey)))), wireRepeated},
		"header key not UTF-8": {withHTTP(lengthed(httpRequestHeaderMap, p.header, lengthed(1, stringField(headerKey, "\xff"), stringField(headerRaw, "x")))), wireUTF8},
		"header with a key and another": {withHTTP(lengthed(httpRequestHeaderMap, lengthed(1, stringField(headerKey, "x-api-key"),
			stringField(headerRaw+1, approvedKey)))), "key_missing"},
		"header with a key, twice": {withHTTP(lengthed(httpRequestHeaderMap, lengthed(1, stringField(headerKey, "x-api-key"),
			stringField(headerKey, approvedKey)))), wireRepeated},
		"header with two values": {withHTTP(lengthed(httpRequestHeaderMap, lengthed(1, stringField(headerKey, "x-api-key"),
			stringField(headerRaw, "x"), stringField(headerRaw, approvedKey)))), wireRepeated},
		"entry with two keys":          {withHTTP(lengthed(httpRequestHeaders, stringField(1, "x"), stringField(1, "x-api-key"), stringField(2, approvedKey))), wireRepeated},
		"metadata twice":               {wireCheck(request, route, route), wireRepeated},
		"namespace twice":              {wireCheck(request, wireMetadata(wireNamespace("keygate"), wireNamespace("keygate", p.product))), wireKey},
		"another's twice":              {wireCheck(request, wireMetadata(wireNamespace("x"), wireNamespace("keygate", p.product), wireNamespace("x", p.product))), allowed},
		"product twice":                {within(p.product, p.product), wireKey},
		"organization twice":           {within(p.product, p.organization, p.organization), wireKey},
		"another field twice":          {within(p.product, lengthed(structFields, stringField(1, "x")), lengthed(structFields, stringField(1, "x"))), allowed},
		"field with two keys":          {within(lengthed(structFields, stringField(1, "x"), stringField(1, "product"), lengthed(2, stringField(valueString, weather)))), wireRepeated},
		"field with two values":        {within(lengthed(structFields, stringField(1, "product"), lengthed(2, stringField(valueString, weather)), lengthed(2))), wireRepeated},
		"two kinds":                    {within(lengthed(structFields, stringField(1, "product"), lengthed(2, []byte{8, 0}, stringField(valueString, weather)))), wireKinds},
		"one kind twice":               {within(lengthed(structFields, stringField(1, "product"), lengthed(2, stringField(3, other), stringField(3, weather)))), wireKinds},
		"product without value":        {within(lengthed(structFields, stringField(1, "product"))), "product_unresolved"},
		"product of no kind":           {within(lengthed(structFields, stringField(1, "product"), lengthed(2))), "product_unresolved"},
		"list":                         {within(lengthed(structFields, stringField(1, "product"), lengthed(2, lengthed(6, lengthed(1, stringField(3, weather)))))), allowed},
		"list of lists":                {within(lengthed(structFields, stringField(1, "product"), lengthed(2, nestedValue(2)))), "product_unresolved"},
		"65 products":                  {within(lengthed(structFields, stringField(1, "product"), lengthed(2, lengthed(6, bytes.Repeat(lengthed(1, stringField(3, weather)), 65))))), "product_unresolved"},
		"extension":                    {wireCheck(request, extension("keygate.product", weather)), allowed},
		"extension twice":              {wireCheck(request, extension("keygate.product", weather), extension("keygate.product", weather)), wireKey},
		"empty extension twice":        {wireCheck(request, extension("keygate.product", ""), extension("keygate.product", weather)), wireKey},
		"another's extension twice":    {wireCheck(request, route, extension("x", ""), extension("x", "")), allowed},
		"product of another wire type": {within(lengthed(structFields, stringField(1, "product"), numberField(entryValue))), "product_unresolved"},
		"path of another wire type":    {withHTTP(headers, numberField(httpRequestPath), p.path), allowed},
		"unknown number":               {withAttribute(0xf8, 0x07, 1), allowed},
		"number 0":                     {withAttribute(0x00, 1), wireBroken},
		"number too large":             {withAttribute(0x80, 0x80, 0x80, 0x80, 0x10, 1), wireBroken},
		"unknown group":                {withAttribute(0xfb, 0x07, 8, 1, 0xfc, 0x07), allowed},
		"group of a known number":      {withAttribute(attributesRequest<<3|3, attributesRequest<<3|4), allowed},
		"group that does not end":      {withAttribute(0xfb, 0x07, 8, 1), wireBroken},
		"end of another group":         {withAttribute(0xfb, 0x07, 8, 1, 0xf4, 0x07), wireBroken},
		"end of no group":              {withAttribute(0xfc, 0x07), wireBroken},
		"wire type 7":                  {withAttribute(0xff, 0x07), wireBroken},
		"varint of 11 bytes":           {withAttribute(append([]byte{0xf8, 0x07}, bytes.Repeat([]byte{0x80}, 11)...)...), wireBroken},
		"broken time":                  {wireCheck(wireRequest(lengthed(1, []byte{8}), wireHTTP(headers)), route), wireBroken},
		"path not UTF-8":               {withHTTP(stringField(httpRequestPath, "\xff"), headers), wireUTF8},
		"host not UTF-8":               {withHTTP(stringField(5, "\xff"), headers), wireUTF8},
		"raw body not UTF-8":           {withHTTP(stringField(12, "\xff"), headers), allowed},
		"header not UTF-8":             {withHTTP(headers, lengthed(httpRequestHeaders, stringField(1, "x"), stringField(2, "\xff"))), wireUTF8},
		"raw value not UTF-8":          {withHTTP(lengthed(httpRequestHeaderMap, p.header, lengthed(1, stringField(headerKey, "x"), stringField(headerRaw, "\xff")))), allowed},
		"label not UTF-8":              {wireCheck(request, route, lengthed(1, lengthed(3, stringField(1, "\xff")))), wireUTF8},
		"deep string not UTF-8":        {within(p.product, lengthed(structFields, stringField(1, "x"), lengthed(2, bytes.ReplaceAll(nestedValue(30), []byte("x"), []byte("\xff"))))), wireUTF8},
		"nested 40 deep":               {within(p.product, lengthed(structFields, stringField(1, "x"), lengthed(2, nestedValue(40)))), allowed},
		"nested 60 deep":               {within(p.product, lengthed(structFields, stringField(1, "x"), lengthed(2, nestedValue(60)))), wireNesting},
		"nested in the product":        {within(lengthed(structFields, stringField(1, "product"), lengthed(2, nestedValue(60)))), wireNesting},
		"bytes of an Any":              {wireCheck(request, route, lengthed(11, lengthed(2, stringField(1, "x"), lengthed(2, stringField(2, "\xff\xff"))))), allowed},
	} {
		for _, query := range []string{"", "apikey"} {
			s := MustService(t, func(c *Config) { c.KeyQuery = query })
			d := decideBytes(t, s, test.wire)
			got := d.Reason.String()
			if strings.HasPrefix(d.Problem, malformed) && d.Reason == authz.Internal {
				got = d.Problem
			}
			if got != test.want {
				t.Errorf("%s: %s, want %s", name, got, test.want)
			}
			if problem := sameDecision(t, s, test.wire); problem != "" {
				t.Errorf("%s: %s", name, problem)
			}
		}
	}
}

// mutated is the fields of a message, now and then one of them left out, twice,
// elsewhere, of another number or type, or mutated within.
func mutated(r *rand.Rand, b []byte, m *message) []byte {
	var fields [][]byte
	for len(b) > 0 {
		number, t, tag := protowire.ConsumeTag(b)
		n := protowire.ConsumeFieldValue(number, t, b[tag:])
		if tag < 0 || n < 0 {
			fields = append(fields, b)
			break
		}
		field := b[:tag+n]
		b = b[tag+n:]
		if int(number) < len(m.fields) && m.fields[number].message != nil && t == protowire.BytesType && r.IntN(4) > 0 {
			inner, _ := protowire.ConsumeBytes(field[tag:])
			field = lengthed(number, mutated(r, inner, m.fields[number].message))
		}
		switch r.IntN(60) {
		case 0:
			continue
		case 1:
			fields = append(fields, field)
		case 2:
			field = slices.Concat(protowire.AppendTag(nil, number+protowire.Number(r.IntN(3)), protowire.Type(r.IntN(6))), field[tag:])
		case 3:
			field = slices.Clone(field)
			field[r.IntN(len(field))] = byte(r.UintN(256))
		case 4:
			field = lengthed(protowire.Number(1+r.IntN(14)), field)
		case 5:
			field = stringField(number, []string{"keygate", "product", "organization", "x-api-key", weather, "keygate.product", "\xff", ""}[r.IntN(8)])
		}
		fields = append(fields, field)
	}
	if len(fields) > 0 && r.IntN(10) == 0 {
		r.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
	}
	return slices.Concat(fields...)
}

// The law of FuzzWire over requests that are nearly good, which random bytes
// seldom are.
func TestWireMutations(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	source := newWorld()
	delete(source, idOf(panicKey))
	s := MustService(t, func(c *Config) { c.Authorizer, c.KeyQuery = &authz.Authorizer{Source: source}, "apikey" })
	var seeds [][]byte
	requests := goldenRequests(t)
	for _, req := range requests {
		seeds = append(seeds, mustWire(t, req))
	}
	slices.SortFunc(seeds, bytes.Compare) // the same in each run, but for the maps in them
	ends := map[string]int{}
	for range 30_000 {
		wire := mutated(r, seeds[r.IntN(len(seeds))], s.schema.request)
		if problem := sameDecision(t, s, wire); problem != "" {
			t.Fatalf("%x: %s", wire, problem)
		}
		d := decideBytes(t, s, wire)
		ends[d.Reason.String()]++
		if strings.HasPrefix(d.Problem, malformed) {
			ends[d.Problem]++
		}
		var req authv3.CheckRequest
		if proto.Unmarshal(wire, &req) != nil {
			continue
		}
		got, want := decideBytes(t, s, mustWire(t, &req)), s.decide(t.Context(), &req)
		if got != want {
			t.Fatalf("%x: of what proto.Marshal writes: %+v, want %+v", wire, got, want)
		}
	}
	for _, end := range []string{"allowed", "key_unknown", "key_malformed", "product_unresolved", wireBroken, wireUTF8, wireRepeated, wireKey, wireKinds} {
		if ends[end] < 10 {
			t.Errorf("%d requests end in %s, want more: %v", ends[end], end, ends)
		}
	}
}

// A request that was cut off anywhere, and one that came in any two pieces.
func TestWireCut(t *testing.T) {
	s := MustService(t, nil)
	whole := mustWire(t, request(approvedKey))
	for i := range whole {
		if d := decideBytes(t, s, whole[:i]); d.Allowed() {
			t.Errorf("allowed although cut off after %d of %d bytes", i, len(whole))
		}
		if problem := sameDecision(t, s, whole[:i]); problem != "" {
			t.Errorf("cut off after %d bytes: %s", i, problem)
		}
		if resp := checkBytes(t, s, whole[:i], whole[i:]); resp.GetOkResponse() == nil {
			t.Errorf("in two pieces, of %d bytes and the rest: %v", i, resp)
		}
	}
}

// FuzzWire holds the law of the walk: for any bytes its decision is the one on
// the message that proto.Unmarshal makes of them, or a refusal; and for bytes
// that proto.Marshal wrote it is that decision.
func FuzzWire(f *testing.F) {
	p := newWireParts()
	for _, req := range goldenRequests(f) {
		wire := mustWire(f, req)
		f.Add(wire, uint16(len(wire)/2))
		f.Add(wire[:len(wire)*2/3], uint16(1))
		f.Add(slices.Concat(wire, wire), uint16(0))
		f.Add(slices.Concat(wire, []byte{0xfb, 0x07, 8, 1, 0xfc, 0x07}), uint16(3))
		f.Add(bytes.ReplaceAll(wire, []byte("weather"), []byte("weath\xff\xfe")), uint16(9))
	}
	f.Add(wireCheck(wireMetadata(wireNamespace("keygate", p.product, p.product)), wireRequest(wireHTTP(lengthed(httpRequestHeaderMap, p.header)))), uint16(5))
	f.Add(wireCheck(wireMetadata(wireNamespace("keygate", lengthed(structFields, stringField(1, "product"), lengthed(2, nestedValue(30)))))), uint16(5))
	source := newWorld()
	delete(source, idOf(panicKey))
	var services []*Service
	for _, query := range []string{"", "apikey"} {
		services = append(services, MustService(f, func(c *Config) {
			c.Authorizer, c.KeyQuery = &authz.Authorizer{Source: source}, query
		}))
	}
	f.Fuzz(func(t *testing.T, wire []byte, cut uint16) {
		var req authv3.CheckRequest
		err := proto.Unmarshal(wire, &req)
		at := min(int(cut), len(wire))
		for _, s := range services {
			if problem := sameDecision(t, s, wire); problem != "" {
				t.Fatal(problem)
			}
			resp := checkBytes(t, s, wire[:at], wire[at:])
			if !complete(resp) {
				t.Fatalf("no clear answer: %v", resp)
			}
			if err != nil {
				continue
			}
			if resp.GetStatus().GetCode() == 0 && !modelAllows(&req, s.config.KeyQuery) {
				t.Fatalf("allowed, against the model: %v", resp)
			}
			got, want := decideBytes(t, s, mustWire(t, &req)), s.decide(t.Context(), &req)
			if got != want && got.Problem != wireNesting {
				t.Fatalf("of what proto.Marshal writes: %+v, want %+v", got, want)
			}
		}
	})
}

// The memory that one check leaves behind shows nothing to the next.
func TestCallIsForgotten(t *testing.T) {
	s := MustService(t, nil)
	c := new(call)
	full := request(approvedKey)
	full.Attributes.RouteMetadataContext = routeMetadata(map[string]any{"product": []any{weather, orders, maps}, "organization": worldOrg})
	full.Attributes.ContextExtensions = map[string]string{"keygate.organization": worldOrg}
	full.Attributes.Request.Http.Path = "/?apikey=x"
	c.hold(mem.SliceBuffer(mustWire(t, full)))
	s.decideWire(t.Context(), c)
	if !c.decision.Allowed() {
		t.Fatalf("not allowed: %+v", c.decision)
	}
	c.forget()
	list := c.attributes.list
	if c.message != nil || c.attributes.key != "" || c.attributes.product.kind != valueAbsent || c.attributes.listed != 0 || len(list) != 0 ||
		c.attributes.extensionOrganization.kind != valueAbsent || c.attributes.path != "" || c.decision != (authz.Decision{}) {
		t.Errorf("after one check: %+v", c)
	}
	for _, v := range list[:cap(list)] {
		if v != (value{}) {
			t.Errorf("a list keeps %v", v)
		}
	}
	for _, name := range c.products {
		if name != "" {
			t.Errorf("products keep %s", name)
		}
	}
	bare := request(revokedKey)
	bare.Attributes.RouteMetadataContext = nil
	c.hold(mem.SliceBuffer(mustWire(t, bare)))
	s.decideWire(t.Context(), c)
	if c.decision.Reason != authz.ProductUnresolved || c.decision.Product != "" {
		t.Errorf("a check without a product, after one with: %+v", c.decision)
	}
}

// Nothing of a decision refers to the message, whose memory is used again.
func TestDecisionOutlivesMessage(t *testing.T) {
	for name, edit := range map[string]func(*authv3.AttributeContext){
		"metadata": func(a *authv3.AttributeContext) {
			a.RouteMetadataContext = routeMetadata(map[string]any{"product": weather, "organization": worldOrg})
		},
		"list": func(a *authv3.AttributeContext) {
			a.RouteMetadataContext = routeMetadata(map[string]any{"product": []any{other, weather}, "organization": worldOrg})
		},
		"extensions": func(a *authv3.AttributeContext) {
			a.RouteMetadataContext = nil
			a.ContextExtensions = map[string]string{"keygate.product": weather, "keygate.organization": worldOrg}
		},
	} {
		var asked authz.Request
		s := MustService(t, func(c *Config) {
			c.Authorizer = authorizerFunc(func(ctx context.Context, req authz.Request) authz.Decision {
				asked = req
				asked.Products = slices.Clone(req.Products)
				return authz.Decision{Reason: authz.Allowed, Organization: req.Organization, KeyID: req.KeyID, Product: req.Products[len(req.Products)-1]}
			})
		})
		req := request(approvedKey)
		edit(req.Attributes)
		wire := mustWire(t, req)
		for round := range 2 { // the second finds the names known
			message := slices.Clone(wire)
			d := decideBytes(t, s, message)
			for i := range message {
				message[i] = '!'
			}
			if d.Product != weather || d.Organization != worldOrg || d.KeyID != idOf(approvedKey) || asked.Organization != worldOrg ||
				asked.Products[len(asked.Products)-1] != weather {
				t.Errorf("%s, round %d: after the message's memory was used again: %+v of %+v", name, round, d, asked)
			}
		}
	}
}
