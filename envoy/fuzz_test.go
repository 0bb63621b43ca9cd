package envoy

import (
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"keygate/authz"
)

// FuzzCheck holds one law over any bytes as a CheckRequest: never a panic,
// never a yes unless the model says so, and always a response that is a clear
// yes or no, can be sent and holds no key.
func FuzzCheck(f *testing.F) {
	for folder := range goldenConfigs {
		files, err := filepath.Glob(filepath.Join("testdata", "check", folder, "*.request.json"))
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range files {
			var req authv3.CheckRequest
			mustReadJSON(f, file, &req)
			wire, err := proto.Marshal(&req)
			if err != nil {
				f.Fatalf("%s: %v", file, err)
			}
			f.Add(wire)
		}
	}
	source := newWorld()
	delete(source, idOf(panicKey)) // recovery is tested elsewhere
	services := map[string]*Service{}
	for name, query := range map[string]string{"header": "", "query": "apikey"} {
		services[name] = MustService(f, func(c *Config) {
			c.Authorizer, c.KeyQuery = &authz.Authorizer{Source: source}, query
		})
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		var req authv3.CheckRequest
		if proto.Unmarshal(wire, &req) != nil {
			return // grpc answers with an error, which no Envoy of ours lets through
		}
		for name, s := range services {
			resp, err := s.Check(t.Context(), &req)
			if err != nil || !complete(resp) {
				t.Fatalf("%s: no clear answer: %v, %v", name, resp, err)
			}
			if resp.GetStatus().GetCode() == 0 && !modelAllows(&req, s.config.KeyQuery) {
				t.Fatalf("%s: allowed, against the model: %v", name, resp)
			}
			out, err := proto.Marshal(resp)
			if err != nil {
				t.Fatalf("%s: the response cannot be sent: %v", name, err)
			}
			// A route may be named as a key is; nothing else may show one.
			if k := holdsKey(string(out)); k != "" && !routeHolds(&req, k) {
				t.Fatalf("%s: the response holds the key %s", name, k)
			}
		}
	})
}

func routeHolds(req *authv3.CheckRequest, s string) bool {
	a := req.GetAttributes()
	return strings.Contains(a.GetRouteMetadataContext().String(), s) ||
		strings.Contains(a.GetContextExtensions()["keygate.product"]+a.GetContextExtensions()["keygate.organization"], s)
}

// modelAllows is the law in its plainest words, written apart from the code:
// everything in the key's places is one and the same approved key, and
// everything the route says names the world's organization and Weather-Product.
func modelAllows(req *authv3.CheckRequest, query string) bool {
	http := req.GetAttributes().GetRequest().GetHttp()
	var header, all []string
	for _, h := range http.GetHeaderMap().GetHeaders() {
		if strings.ToLower(h.GetKey()) == "x-api-key" {
			header = append(header, string(h.GetRawValue()))
			if len(h.GetRawValue()) == 0 {
				header[len(header)-1] = h.GetValue()
			}
		}
	}
	for k, v := range http.GetHeaders() {
		if strings.ToLower(k) == "x-api-key" {
			header = append(header, v)
		}
	}
	if len(header) > 1 {
		return false
	}
	all = header
	if query != "" {
		_, raw, _ := strings.Cut(http.GetPath(), "?")
		values, err := url.ParseQuery(raw)
		if err != nil || len(values[query]) > 1 {
			return false
		}
		all = append(all, values[query]...)
	}
	if len(all) == 0 {
		return false
	}
	for _, k := range all {
		if k != all[0] || !slices.Contains([]string{approvedKey, bareKey, strangeKey}, k) {
			return false
		}
	}

	var products []string
	field, inMetadata := req.GetAttributes().GetRouteMetadataContext().GetFilterMetadata()["keygate"].GetFields()["product"]
	if inMetadata {
		items := []*structpb.Value{field}
		if field.GetListValue() != nil {
			items = field.GetListValue().GetValues()
		}
		for _, item := range items {
			products = append(products, item.GetStringValue())
		}
	}
	extension, inExtensions := req.GetAttributes().GetContextExtensions()["keygate.product"]
	if inExtensions && inMetadata && !slices.Equal(products, []string{extension}) {
		return false
	}
	if inExtensions {
		products = []string{extension}
	}
	orgs := []string{}
	if v, ok := req.GetAttributes().GetRouteMetadataContext().GetFilterMetadata()["keygate"].GetFields()["organization"]; ok {
		orgs = append(orgs, v.GetStringValue())
	}
	if v, ok := req.GetAttributes().GetContextExtensions()["keygate.organization"]; ok {
		orgs = append(orgs, v)
	}
	for _, o := range orgs {
		if o != worldOrg {
			return false
		}
	}
	return slices.Contains(products, weather) && !slices.Contains(products, "")
}
