package client

import (
	"context"
	"encoding/json"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Token is a management token, without its secret.
type Token struct {
	ID           string `json:"id"`
	Name         string `json:"name"`
	Role         string `json:"role"`
	Organization string `json:"organization"`
	CreatedAt    Millis `json:"createdAt"`
	ExpiresAt    Millis `json:"expiresAt"`
	CreatedBy    string `json:"createdBy"`
	LastUsed     Millis `json:"lastUsed"`
	// Raw is the whole object as it was answered.
	Raw json.RawMessage `json:"-"`
}

// UnmarshalJSON implements json.Unmarshaler.
func (t *Token) UnmarshalJSON(b []byte) error {
	type plain Token
	t.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(t))
}

// TokenSpec is what a token is created from.
type TokenSpec struct {
	// Name for people.
	Name string `json:"name"`
	// Role is viewer, operator, admin or auditor.
	Role string `json:"role"`
	// Organization that it is good for, "*" for all; empty is the client's.
	Organization string `json:"organization,omitempty"`
	// ExpiresIn; 0 is never.
	ExpiresIn time.Duration `json:"-"`
}

// MarshalJSON implements json.Marshaler.
func (t TokenSpec) MarshalJSON() ([]byte, error) {
	type plain TokenSpec
	expires := ""
	if t.ExpiresIn > 0 {
		expires = t.ExpiresIn.String()
	}
	return json.Marshal(struct {
		plain
		ExpiresIn string `json:"expiresIn,omitempty"`
	}{plain(t), expires})
}

// CreateToken makes a token. The secret is shown this once.
func (c *Client) CreateToken(ctx context.Context, spec TokenSpec, ch Change) (Token, Secret, Done, error) {
	raw, done, err := change[json.RawMessage](ctx, c, http.MethodPost, "/tokens", spec, ch)
	if err != nil || ch.DryRun {
		return Token{}, "", done, err
	}
	var token Token
	var secret struct {
		Token string `json:"token"`
	}
	if err = json.Unmarshal(raw, &token); err == nil {
		err = json.Unmarshal(raw, &secret)
	}
	return token, Secret(secret.Token), done, err
}

// Tokens lists those that are good for the organization.
func (c *Client) Tokens(ctx context.Context) ([]Token, error) {
	var list struct {
		Tokens []Token `json:"tokens"`
	}
	_, err := c.do(ctx, request{method: http.MethodGet, path: "/tokens"}, &list)
	return list.Tokens, err
}

// RevokeToken ends a token: by its id, or at least 8 characters that it begins
// with.
func (c *Client) RevokeToken(ctx context.Context, id string, ch Change) (Token, Done, error) {
	return change[Token](ctx, c, http.MethodDelete, path("tokens", id), nil, ch)
}

// AuditQuery selects audit records. The zero AuditQuery is all.
type AuditQuery struct {
	From, To              time.Time // zero means open
	Action, Object, Actor string
	// Reverse gives the newest first.
	Reverse bool
}

// AuditRecord is one change: who, what, before, after.
type AuditRecord struct {
	ID     string `json:"id"`
	At     Millis `json:"at"`
	Actor  Actor  `json:"actor"`
	Action string `json:"action"`
	Object string `json:"object"`
	// Changes of values in etcd.
	Changes   []ValueChange `json:"changes"`
	NoOp      bool          `json:"noOp"`
	Reason    string        `json:"reason"`
	Ticket    string        `json:"ticket"`
	RequestID string        `json:"requestId"`
	Note      string        `json:"note"`
	Revision  int64         `json:"revision"`
	// Raw is the whole record as it was answered.
	Raw json.RawMessage `json:"-"`
}

// Actor is who made a change.
type Actor struct {
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Token   string `json:"token"` // its id
	Address string `json:"address"`
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *AuditRecord) UnmarshalJSON(b []byte) error {
	type plain AuditRecord
	r.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(r))
}

// Audit lists audit records, the oldest first.
func (c *Client) Audit(ctx context.Context, by AuditQuery) iter.Seq2[AuditRecord, error] {
	q := url.Values{}
	for name, value := range map[string]string{"action": by.Action, "object": by.Object, "actor": by.Actor} {
		if value != "" {
			q.Set(name, value)
		}
	}
	for name, t := range map[string]time.Time{"from": by.From, "to": by.To} {
		if !t.IsZero() {
			q.Set(name, strconv.FormatInt(t.UnixMilli(), 10))
		}
	}
	if by.Reverse {
		q.Set("reverse", "true")
	}
	return byPageToken[AuditRecord](ctx, c, "/audit", "records", q)
}
