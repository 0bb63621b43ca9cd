package access_test

import (
	"encoding/json"
	"testing"

	"keygate/access"
)

// TestRights is the whole table, each role with each right: what is not marked
// is refused.
func TestRights(t *testing.T) {
	rights := []access.Right{access.None, access.Read, access.Status, access.Write, access.Reveal, access.Tokens, access.Audit}
	table := map[access.Role]string{
		//                none, read, status, write, reveal, tokens, audit
		access.NoRole:   "-------",
		access.Viewer:   "-x-----",
		access.Operator: "-xx----",
		access.Admin:    "-xxxxxx",
		access.Auditor:  "-x----x",
	}
	for role := range 256 {
		role := access.Role(role)
		want, known := table[role]
		if !known {
			want = table[access.NoRole]
		}
		for i, right := range rights {
			if got := role.Can(right); got != (want[i] == 'x') {
				t.Errorf("role %d (%v), %v: got %v, want %v", role, role, right, got, !got)
			}
		}
		// Rights that there may be one day are nobody's.
		for right := len(rights); right < 256; right++ {
			if role.Can(access.Right(right)) {
				t.Errorf("role %d (%v) has right %d, which does not exist", role, role, right)
			}
		}
	}
}

func TestWords(t *testing.T) {
	words := map[string]access.Role{"viewer": access.Viewer, "operator": access.Operator, "admin": access.Admin, "auditor": access.Auditor}
	if got := access.Roles(); len(got) != len(words) {
		t.Errorf("got %v, want %d roles", got, len(words))
	}
	for word, want := range words {
		got, err := access.ParseRole(word)
		if err != nil || got != want || got.String() != word {
			t.Errorf("%s: got %v, %v, want %v", word, got, err, want)
		}
		text, err := json.Marshal(want)
		if err != nil || string(text) != `"`+word+`"` {
			t.Errorf("JSON of %v: got %s, %v", want, text, err)
		}
	}
	for _, word := range []string{"", "none", "Admin", "ADMIN", "admin ", " admin", "admins", "root", "*", "0", "3", "\x00"} {
		if got, err := access.ParseRole(word); err == nil || got != access.NoRole {
			t.Errorf("%q: got %v, %v, want an error", word, got, err)
		}
		role := access.Admin
		if err := role.UnmarshalText([]byte(word)); err == nil || role != access.NoRole {
			t.Errorf("JSON %q: got %v, %v, want an error and no role", word, role, err)
		}
	}
	if got := access.Role(200).String(); got != "none" {
		t.Errorf("role 200: got %s, want none", got)
	}
	if got := access.Right(200).String(); got != "none" {
		t.Errorf("right 200: got %s, want none", got)
	}
	if got := access.Tokens.String(); got != "tokens" {
		t.Errorf("got %s, want tokens", got)
	}
}
