package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// parseFile reads the text of a configuration file. Every problem begins with
// the place in the file. Values are checked later, by their settings; here it
// is decided that each is a scalar of the right type.
func parseFile(file string, text []byte) (given map[string]input, problems []error) {
	given = map[string]input{}
	at := func(n *yaml.Node, format string, args ...any) {
		problems = append(problems, fmt.Errorf("%s:%d:%d: %w", file, n.Line, n.Column, fmt.Errorf(format, args...)))
	}
	var document, second yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	switch err := decoder.Decode(&document); {
	case errors.Is(err, io.EOF): // nothing but comments
		return given, nil
	case err != nil:
		return given, []error{syntaxError(file, text, err)}
	}
	switch err := decoder.Decode(&second); {
	case err == nil:
		at(&second, "a second document, want one")
	case !errors.Is(err, io.EOF):
		return given, []error{syntaxError(file, text, err)}
	}

	root := document.Content[0]
	if isNull(root) {
		return given, problems
	}
	if root.Kind != yaml.MappingNode {
		at(root, "want fields such as %q, got %s", "org: default", describe(root))
		return given, problems
	}
	byField := map[string]setting{}
	var fields []string
	for _, s := range settings {
		if s.name != fileSetting {
			byField[s.field()] = s
			fields = append(fields, s.field())
		}
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		switch {
		case key.Tag == "!!merge":
			at(key, "a merge key (<<); write each field out")
			continue
		case key.Kind != yaml.ScalarNode:
			at(key, "want the name of a field, got %s", describe(key))
			continue
		}
		s, ok := byField[key.Value]
		switch {
		case !ok && value.Kind == yaml.MappingNode && len(value.Content) > 0:
			// etcd: {endpoints: …} is how other tools nest.
			at(key, "unknown field %q; fields are not nested%s", key.Value, didYouMean(key.Value+value.Content[0].Value, fields))
			continue
		case !ok:
			at(key, "unknown field %q%s", key.Value, didYouMean(key.Value, fields))
			continue
		case seen[key.Value] > 0:
			at(key, "field %q stands here again, first in line %d", key.Value, seen[key.Value])
			continue
		}
		seen[key.Value] = key.Line
		if n, what := decorated(key, value); n != nil {
			at(n, "%s; write the plain value", what)
			continue
		}
		text, err := scalar(s, value)
		if err != nil {
			at(value, "%s: %w", key.Value, err)
			continue
		}
		given[s.name] = input{
			text:   text,
			source: Source{Kind: FromFile, Name: file, Line: key.Line},
			where:  fmt.Sprintf("%s:%d:%d: %s", file, value.Line, value.Column, key.Value),
		}
	}
	return given, problems
}

// decorated finds a node that is more than a plain value: an anchor, an alias or
// a tag on a field, its value or an item of its list.
func decorated(key, value *yaml.Node) (n *yaml.Node, what string) {
	for _, n := range append([]*yaml.Node{key, value}, value.Content...) {
		switch {
		case n.Kind == yaml.AliasNode:
			return n, "an alias (*" + n.Value + ")"
		case n.Anchor != "":
			return n, "an anchor (&" + n.Anchor + ")"
		case n.Style&yaml.TaggedStyle != 0:
			return n, "a tag (" + n.Tag + ")"
		}
	}
	return nil, ""
}

// scalar returns a value as a flag would be given it.
func scalar(s setting, n *yaml.Node) (string, error) {
	if isNull(n) {
		return "", fmt.Errorf("no value; leave the field out for its default (%q)", s.def)
	}
	if s.kind == list && n.Kind == yaml.SequenceNode {
		var items []string
		for _, item := range n.Content {
			if item.Kind != yaml.ScalarNode || item.Tag != "!!str" {
				return "", fmt.Errorf("want a list of strings, got %s in it", describe(item))
			}
			if item.Value == "" || strings.Contains(item.Value, ",") {
				return "", fmt.Errorf("%q in the list, want one endpoint in each item", item.Value)
			}
			items = append(items, item.Value)
		}
		return strings.Join(items, ","), nil
	}
	got := ""
	if n.Kind == yaml.ScalarNode {
		got = n.Tag
	}
	switch {
	case s.kind == boolean && got == "!!bool",
		s.kind == integer && got == "!!int",
		s.kind == size && (got == "!!int" || got == "!!str"),
		s.kind == duration && (got == "!!int" || got == "!!float" || got == "!!str"), // the setting asks for a unit
		(s.kind == text || s.kind == list) && got == "!!str":
		return n.Value, nil
	case s.kind == text && (got == "!!int" || got == "!!float" || got == "!!bool" || got == "!!timestamp"):
		return "", fmt.Errorf("want a string, got %s; put it in quotes", describe(n))
	case s.kind == boolean:
		return "", fmt.Errorf("want true or false, got %s", describe(n))
	}
	return "", fmt.Errorf("want %s, got %s", s.kind.article(), describe(n))
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// describe names what stands at a node, without its contents where they may be
// long.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	switch n.Tag {
	case "!!int", "!!float":
		return "the number " + n.Value
	case "!!bool":
		return "the boolean " + n.Value
	case "!!null":
		return "nothing"
	case "!!timestamp":
		return "the date " + n.Value
	}
	return "the string " + quote(n.Value)
}

var yamlError = regexp.MustCompile(`(?s)^yaml: (?:unmarshal errors:\s*)?(?:line (\d+)(?:, column \d+)?: )?(.*)$`)

// syntaxError gives the YAML library's error its place. The library does not
// say the column; for a tab, the most common mistake, it is found again.
func syntaxError(file string, text []byte, err error) error {
	for i, line := range strings.Split(string(text), "\n") {
		indent := line[:len(line)-len(strings.TrimLeft(line, " \t"))]
		if tab := strings.IndexByte(indent, '\t'); tab >= 0 && strings.TrimSpace(line) != "" {
			return fmt.Errorf("%s:%d:%d: a tab; YAML is indented with spaces", file, i+1, tab+1)
		}
	}
	m := yamlError.FindStringSubmatch(err.Error())
	switch {
	case m == nil:
		return fmt.Errorf("%s:1:1: %w", file, err)
	case m[1] == "":
		return fmt.Errorf("%s:1:1: not YAML: %s", file, m[2])
	}
	return fmt.Errorf("%s:%s:1: not YAML: %s", file, m[1], m[2])
}
