package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// printYAML writes a JSON document as YAML, its members in their order. Whoever
// reads it finds the same strings, by YAML 1.1 too.
func printYAML(w io.Writer, document json.RawMessage) error {
	d := json.NewDecoder(bytes.NewReader(document))
	d.UseNumber()
	node, err := yamlNode(d)
	if err != nil {
		return fmt.Errorf("write the answer as YAML: %w", err)
	}
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(node); err != nil {
		return err
	}
	if err := e.Close(); err != nil {
		return err
	}
	_, err = w.Write(escapeStrings(out.Bytes(), func(r rune) string { return fmt.Sprintf(`\U%08x`, r) }))
	return err
}

// yamlNode reads the next value, or the next name in an object. JSON is not read
// as YAML: a pair of escaped surrogates means one character only in JSON.
func yamlNode(d *json.Decoder) (*yaml.Node, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch v := token.(type) {
	case json.Delim:
		n := &yaml.Node{Kind: yaml.MappingNode}
		if v == '[' {
			n.Kind = yaml.SequenceNode
		}
		for d.More() {
			child, err := yamlNode(d)
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, child)
		}
		_, err := d.Token() // its end
		return n, err
	case string:
		n := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: v}
		if !plainYAML(v) {
			n.Style = yaml.DoubleQuotedStyle
		}
		return n, nil
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: strconv.FormatBool(v)}, nil
	case json.Number:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: v.String()}, nil
	default:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: "null"}, nil
	}
}

// plainText is what can stand in YAML without quotes, except for yamlWords. What
// begins with a digit, a sign or a dot may be a number or a time to somebody.
var plainText = regexp.MustCompile(`^[A-Za-z/](?:[ :]?[A-Za-z0-9_./@*-])*$`)

// yamlWords mean something else than a string, in any case of their letters.
// https://yaml.org/type/bool.html
var yamlWords = []string{"y", "n", "yes", "no", "on", "off", "true", "false", "null"}

func plainYAML(s string) bool {
	return plainText.MatchString(s) && !slices.Contains(yamlWords, strings.ToLower(s))
}
