package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"keygate/jsonobject"
)

const (
	// maxShown of a value in a record, in bytes.
	maxShown = 4 << 10
	// maxWord is how long a value that is not JSON may be to be shown: it should
	// have been a status.
	maxWord = 64
)

// hidden is what is shown of the members that hold a consumer key or a secret:
// sealed, or by a mistake of whoever wrote them in the clear.
var hidden = map[string]string{
	"sealedkey": "(sealed)", "sealedsecret": "(sealed)",
	"consumerkey": "(hidden)", "consumersecret": "(hidden)",
}

// Redact is a stored value as a record may show it. Members that hold a
// consumer key or a secret are replaced, at any depth; a value that is neither
// JSON nor as short as a status is not shown, for nobody knows what it is; and
// the rest is cut at 4 KiB, with a note.
func Redact(value string) string {
	switch trimmed := strings.TrimLeft(value, " \t\r\n"); {
	case trimmed != "" && (trimmed[0] == '{' || trimmed[0] == '['):
		if jsonobject.Check([]byte(value)) != nil {
			return fmt.Sprintf("(%d bytes that are not valid JSON)", len(value))
		}
		value = string(redact(json.RawMessage(value)))
	case len(value) > maxWord:
		return fmt.Sprintf("(%d bytes that are not JSON)", len(value))
	}
	return bounded(strings.ToValidUTF8(value, "\ufffd"))
}

// redact a valid JSON value; the order of members and the text of what is not
// replaced stay.
func redact(value json.RawMessage) json.RawMessage {
	value = bytes.TrimSpace(value)
	switch value[0] {
	case '{':
		o, err := jsonobject.Parse(value)
		if err != nil { // it was checked
			return json.RawMessage(`"(unreadable)"`)
		}
		out := []byte{'{'}
		for i, m := range o {
			if i > 0 {
				out = append(out, ',')
			}
			name, _ := json.Marshal(m.Name) // a string
			out = append(append(out, name...), ':')
			if instead, ok := hidden[strings.ToLower(m.Name)]; ok {
				out = append(append(append(out, '"'), instead...), '"')
			} else {
				out = append(out, redact(m.Value)...)
			}
		}
		return append(out, '}')
	case '[':
		var list []json.RawMessage
		if err := json.Unmarshal(value, &list); err != nil { // it was checked
			return json.RawMessage(`"(unreadable)"`)
		}
		out := []byte{'['}
		for i, v := range list {
			if i > 0 {
				out = append(out, ',')
			}
			out = append(out, redact(v)...)
		}
		return append(out, ']')
	}
	return value
}

// bounded cuts valid UTF-8 at maxShown, with a note.
func bounded(s string) string {
	if len(s) <= maxShown {
		return s
	}
	n := maxShown
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return fmt.Sprintf("%s… (cut, %d bytes)", s[:n], len(s))
}
