package catalog_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"keygate/catalog"
)

// A Secret shows nothing, by itself or within what holds it.
func TestSecretShowsNothing(t *testing.T) {
	const text = "canary-0123456789"
	s := catalog.NewSecret(text)
	if got := s.Reveal(); got != text {
		t.Fatalf("Reveal() = %q, want %q", got, text)
	}
	if none := catalog.NewSecret(""); none != (catalog.Secret{}) || none.Reveal() != "" {
		t.Errorf("NewSecret of nothing = %q, want the zero Secret", none.Reveal())
	}
	type holder struct {
		Open   catalog.Secret
		hidden catalog.Secret
	}
	var said bytes.Buffer
	for _, value := range []any{s, &s, holder{s, s}, &holder{s, s}, []catalog.Secret{s}, map[string]catalog.Secret{"a": s}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&said, verb+"\n", value)
		}
		b, err := json.Marshal(value)
		if err != nil {
			t.Errorf("marshal: %v", err)
		}
		said.Write(b)
		slog.New(slog.NewJSONHandler(&said, nil)).Info("x", "value", value)
		slog.New(slog.NewTextHandler(&said, nil)).Info("x", "value", value)
	}
	if strings.Contains(said.String(), text) || strings.Contains(said.String(), fmt.Sprintf("%x", text)) {
		t.Errorf("the secret came out: %s", said.String())
	}
}
