package management

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"keygate/jsonobject"
)

//go:embed openapi.yaml
var openapiYAML []byte

//go:embed docs.html
var docsHTML string

//go:embed docs.css
var docsCSS string

// document is the description of the API in the forms in which it is served.
type document struct {
	json, page []byte
	policy     string // Content-Security-Policy of the page
}

// newDocument makes the forms out of openapi.yaml.
func newDocument(version string) (d document, err error) {
	var root yaml.Node
	if err := yaml.Unmarshal(openapiYAML, &root); err != nil {
		return d, fmt.Errorf("openapi.yaml: %w", err)
	}
	if d.json, err = ordered(root.Content[0]); err != nil {
		return d, fmt.Errorf("openapi.yaml: %w", err)
	}
	model, err := newPage(d.json, version)
	if err != nil {
		return d, fmt.Errorf("openapi.yaml: %w", err)
	}
	style := sha256.Sum256([]byte(docsCSS))
	d.policy = fmt.Sprintf("default-src 'none'; style-src 'sha256-%s'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
		base64.StdEncoding.EncodeToString(style[:]))
	t, err := template.New("docs").Funcs(template.FuncMap{"text": prose, "css": func() template.CSS { return template.CSS(docsCSS) }}).Parse(docsHTML)
	if err != nil {
		return d, err
	}
	var page bytes.Buffer
	if err := t.Execute(&page, model); err != nil {
		return d, fmt.Errorf("render the page of openapi.yaml: %w", err)
	}
	d.page = page.Bytes()
	return d, nil
}

// serve answers a request for one of the forms; false if it is for something
// else.
func (d document) serve(w http.ResponseWriter, r *http.Request) bool {
	forms := map[string]struct {
		contentType string
		body        []byte
	}{
		"/openapi.json": {"application/json", d.json},
		"/openapi.yaml": {"application/yaml", openapiYAML},
		"/docs":         {"text/html; charset=utf-8", d.page},
	}
	form, ok := forms[r.URL.Path]
	if !ok || r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	requestOf(r).pattern = r.URL.Path
	w.Header().Set("Content-Type", form.contentType)
	if r.URL.Path == "/docs" {
		w.Header().Set("Content-Security-Policy", d.policy)
	}
	_, _ = w.Write(form.body) // the client has gone, or has all of it
	return true
}

// ordered writes YAML as JSON, members in their order.
func ordered(n *yaml.Node) ([]byte, error) {
	switch n.Kind {
	case yaml.MappingNode:
		o := jsonobject.Object{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			value, err := ordered(n.Content[i+1])
			if err != nil {
				return nil, err
			}
			o = append(o, jsonobject.Member{Name: n.Content[i].Value, Value: value})
		}
		return json.Marshal(o)
	case yaml.SequenceNode:
		list := []json.RawMessage{}
		for _, e := range n.Content {
			value, err := ordered(e)
			if err != nil {
				return nil, err
			}
			list = append(list, value)
		}
		return json.Marshal(list)
	case yaml.ScalarNode:
		var value any
		if err := n.Decode(&value); err != nil {
			return nil, err
		}
		return json.Marshal(value)
	}
	return nil, fmt.Errorf("line %d: neither an object, a list nor a value", n.Line)
}

// page is what docs.html renders.
type page struct {
	Title, Summary, Description, Version string
	Groups                               []pageGroup
	Schemas                              []pageSchema
}

type pageGroup struct {
	ID, Name, Description string
	Operations            []pageOperation
}

type pageOperation struct {
	ID, Method, Path, Summary, Description string
	Parameters                             []pageParameter
	Body                                   *pageBody
	Responses                              []pageResponse
}

type pageParameter struct {
	Name, In, Type, Description string
	Required                    bool
}

type pageBody struct {
	Schemas  []string
	Example  string
	Optional bool
}

type pageResponse struct {
	Status, Description string
	Schemas             []string
	Error               bool
}

type pageSchema struct {
	Name, Description, Example string
	Alternatives               []pageAlternative
}

// pageAlternative is one form that a schema may have.
type pageAlternative struct {
	Type, Description string
	Members           []pageParameter
}

// The parts of the document that the page shows.
type (
	docSchema struct {
		Ref         string            `json:"$ref"`
		Type        any               `json:"type"`
		Description string            `json:"description"`
		Enum        []string          `json:"enum"`
		Const       any               `json:"const"`
		Required    []string          `json:"required"`
		Properties  jsonobject.Object `json:"properties"`
		Items       *docSchema        `json:"items"`
		OneOf       []docSchema       `json:"oneOf"`
		AnyOf       []docSchema       `json:"anyOf"`
		AllOf       []docSchema       `json:"allOf"`
		Example     json.RawMessage   `json:"example"`
	}
	docContent   map[string]struct{ Schema docSchema }
	docParameter struct {
		Ref, Name, In, Description string
		Required                   bool
		Schema                     docSchema
	}
	docOperation struct {
		OperationID          string `json:"operationId"`
		Summary, Description string
		Tags                 []string
		Parameters           []json.RawMessage
		RequestBody          *struct {
			Required bool
			Content  docContent
		}
		Responses jsonobject.Object
	}
	docResponse struct {
		Description string
		Content     docContent
	}
	docRoot struct {
		Info       struct{ Title, Summary, Description string }
		Tags       []struct{ Name, Description string }
		Paths      jsonobject.Object
		Components map[string]jsonobject.Object
	}
)

// newPage reads the document for the page.
func newPage(doc []byte, version string) (p page, err error) {
	var root docRoot
	if err := json.Unmarshal(doc, &root); err != nil {
		return p, err
	}
	p = page{Title: root.Info.Title, Summary: root.Info.Summary, Description: root.Info.Description, Version: version}
	for _, t := range root.Tags {
		p.Groups = append(p.Groups, pageGroup{ID: strings.ReplaceAll(strings.ToLower(t.Name), " ", "-"), Name: t.Name, Description: t.Description})
	}
	for _, path := range root.Paths {
		var item jsonobject.Object
		if err := json.Unmarshal(path.Value, &item); err != nil {
			return p, fmt.Errorf("%s: %w", path.Name, err)
		}
		var shared []json.RawMessage
		for _, m := range item {
			if m.Name == "parameters" {
				if err := json.Unmarshal(m.Value, &shared); err != nil {
					return p, fmt.Errorf("%s: %w", path.Name, err)
				}
				continue
			}
			op, tag, err := root.operation(path.Name, m, shared)
			if err != nil {
				return p, fmt.Errorf("%s %s: %w", m.Name, path.Name, err)
			}
			i := slices.IndexFunc(p.Groups, func(g pageGroup) bool { return g.Name == tag })
			if i < 0 {
				return p, fmt.Errorf("%s %s: there is no tag %q", m.Name, path.Name, tag)
			}
			p.Groups[i].Operations = append(p.Groups[i].Operations, op)
		}
	}
	for _, m := range root.Components["schemas"] {
		var s docSchema
		if err := json.Unmarshal(m.Value, &s); err != nil {
			return p, fmt.Errorf("schema %s: %w", m.Name, err)
		}
		shown, err := s.page(m.Name)
		if err != nil {
			return p, fmt.Errorf("schema %s: %w", m.Name, err)
		}
		p.Schemas = append(p.Schemas, shown)
	}
	return p, nil
}

// resolve reads v out of raw, or out of the component that raw refers to.
func (d docRoot) resolve(raw json.RawMessage, v any) error {
	var ref struct {
		Ref string `json:"$ref"`
	}
	if err := json.Unmarshal(raw, &ref); err != nil {
		return err
	}
	if ref.Ref != "" {
		parts := strings.Split(ref.Ref, "/") // #/components/kind/name
		found, ok := d.Components[parts[2]].Get(parts[3])
		if !ok {
			return fmt.Errorf("there is no %s", ref.Ref)
		}
		raw = found
	}
	return json.Unmarshal(raw, v)
}

func (d docRoot) operation(path string, m jsonobject.Member, shared []json.RawMessage) (op pageOperation, tag string, err error) {
	var o docOperation
	if err := json.Unmarshal(m.Value, &o); err != nil {
		return op, "", err
	}
	op = pageOperation{ID: o.OperationID, Method: strings.ToUpper(m.Name), Path: path, Summary: o.Summary, Description: o.Description}
	for _, raw := range slices.Concat(shared, o.Parameters) {
		var q docParameter
		if err := d.resolve(raw, &q); err != nil {
			return op, "", err
		}
		op.Parameters = append(op.Parameters, pageParameter{q.Name, q.In, q.Schema.kind(), q.Description, q.Required})
	}
	if o.RequestBody != nil {
		s := o.RequestBody.Content["application/json"].Schema
		op.Body = &pageBody{Schemas: s.names(), Optional: !o.RequestBody.Required}
		for _, name := range op.Body.Schemas {
			var named docSchema
			raw, _ := d.Components["schemas"].Get(name)
			if err := json.Unmarshal(raw, &named); err != nil {
				return op, "", err
			}
			op.Body.Example = indented(named.Example)
		}
	}
	for _, r := range o.Responses {
		var response docResponse
		if err := d.resolve(r.Value, &response); err != nil {
			return op, "", err
		}
		op.Responses = append(op.Responses, pageResponse{r.Name, response.Description, response.Content["application/json"].Schema.names(), r.Name >= "4"})
	}
	if len(o.Tags) == 1 {
		tag = o.Tags[0]
	}
	return op, tag, nil
}

// names of the components that a schema is, or is one of.
func (s docSchema) names() (names []string) {
	if s.Ref != "" {
		return []string{s.Ref[strings.LastIndexByte(s.Ref, '/')+1:]}
	}
	for _, one := range slices.Concat(s.OneOf, s.AnyOf) {
		names = append(names, one.names()...)
	}
	return names
}

// kind of value, for people.
func (s docSchema) kind() string {
	switch {
	case s.Ref != "":
		return s.names()[0]
	case s.Items != nil:
		return "list of " + s.Items.kind()
	case s.Const != nil:
		return fmt.Sprint(s.Const)
	case s.Type == nil && len(s.Required) > 0:
		return "always with " + strings.Join(s.Required, ", ")
	case len(s.Enum) > 0:
		return strings.Join(s.Enum, " | ")
	}
	switch t := s.Type.(type) {
	case string:
		return t
	case []any:
		var words []string
		for _, w := range t {
			words = append(words, fmt.Sprint(w))
		}
		return strings.Join(words, " or ")
	}
	return "any"
}

func (s docSchema) page(name string) (p pageSchema, err error) {
	p = pageSchema{Name: name, Description: s.Description, Example: indented(s.Example)}
	forms := slices.Concat(s.OneOf, s.AllOf)
	if forms == nil {
		s.Description = "" // it stands above
		forms = []docSchema{s}
	}
	for _, f := range forms {
		a := pageAlternative{Type: f.kind(), Description: f.Description}
		for _, m := range f.Properties {
			var member docSchema
			if err := json.Unmarshal(m.Value, &member); err != nil {
				return p, fmt.Errorf("%s: %w", m.Name, err)
			}
			a.Members = append(a.Members, pageParameter{Name: m.Name, Type: member.kind(), Description: member.Description, Required: slices.Contains(f.Required, m.Name)})
		}
		p.Alternatives = append(p.Alternatives, a)
	}
	return p, nil
}

// indented is JSON for people, empty for none.
func indented(raw json.RawMessage) string {
	var b bytes.Buffer
	if len(raw) == 0 || json.Indent(&b, raw, "", "  ") != nil {
		return ""
	}
	return b.String()
}

// prose is a description as HTML: paragraphs, and code between backquotes.
func prose(text string) template.HTML {
	if text == "" {
		return ""
	}
	var b strings.Builder
	for paragraph := range strings.SplitSeq(strings.TrimSpace(text), "\n\n") {
		b.WriteString("<p>")
		for i, part := range strings.Split(paragraph, "`") {
			if i%2 == 1 {
				b.WriteString("<code>" + template.HTMLEscapeString(part) + "</code>")
			} else {
				b.WriteString(template.HTMLEscapeString(part))
			}
		}
		b.WriteString("</p>")
	}
	return template.HTML(b.String())
}
