package client

import (
	"context"
	"encoding/json"
	"iter"
	"net/http"
	"net/url"
	"time"

	"keygate/authz"
)

// Target is one flag: of a key, of a product on it, of an app or of a developer.
type Target struct {
	Key       string `json:"key,omitempty"` // its id
	Product   string `json:"product,omitempty"`
	App       string `json:"app,omitempty"`       // its id
	Developer string `json:"developer,omitempty"` // its id
}

// StatusChange asks for one.
type StatusChange struct {
	Change
	// Action is approve or revoke. A developer becomes active or inactive.
	Action  string
	Targets []Target
	// Wait for every registered replica to have applied it, or to refuse by
	// itself.
	Wait bool
}

// Flag is what became of a target.
type Flag struct {
	Target Target `json:"target"`
	Path   string `json:"path"` // in etcd
	// Before is the value that was found, empty if there was none.
	Before string `json:"before"`
	// Changed is false if the flag was so already.
	Changed bool `json:"changed"`
}

// StatusDone is what a change of statuses did.
type StatusDone struct {
	Done
	Action     string `json:"action"`
	Flags      []Flag `json:"flags"`
	ByDeletion bool   `json:"byDeletion"`
	NoSpace    bool   `json:"noSpace"`
	// UnregisteredBy is when any replica, registered or not, has applied it or
	// refuses.
	UnregisteredBy time.Time `json:"unregisteredBy"`
	// NotFound are targets that were not there. The rest is done.
	NotFound []Target `json:"notFound"`
	// Partial says why not all could be done; empty if all was.
	Partial string `json:"partial"`
	// Interrupted: the server stopped waiting before the receipt was complete.
	Interrupted bool     `json:"interrupted"`
	Receipt     *Receipt `json:"receipt"` // with Wait, unless NoReceipt
	// NoReceipt though it was asked for: too many wait already.
	NoReceipt bool `json:"noReceipt"`
	// Replayed: the change was made by an earlier attempt of this request, whose
	// answer was lost. Flags are not known.
	Replayed bool `json:"replayed"`
}

// Receipt says how far a change has come in the fleet.
type Receipt struct {
	Revision int64 `json:"revision"`
	Replicas struct {
		Total   int `json:"total"`
		Applied int `json:"applied"`
		Fenced  int `json:"fenced"`
	} `json:"replicas"`
	SlowestMs              int64         `json:"slowestMs"`
	NotAnswered            []NotAnswered `json:"notAnswered"`
	UnregisteredBy         time.Time     `json:"unregisteredBy"`
	AcknowledgementsUnread string        `json:"acknowledgementsUnread"`
	// Raw is the receipt as it was answered.
	Raw json.RawMessage `json:"-"`
}

// NotAnswered is a replica that has not acknowledged.
type NotAnswered struct {
	ID       string `json:"id"`
	Host     string `json:"host"`
	Pid      int    `json:"pid"`
	Vanished bool   `json:"vanished"`
	Problem  string `json:"problem"`
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *Receipt) UnmarshalJSON(b []byte) error {
	type plain Receipt
	r.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(r))
}

// SetStatuses approves or revokes at most 10,000 targets. If it returns no error
// at least one is as it should be; what is not stands in the answer.
func (c *Client) SetStatuses(ctx context.Context, s StatusChange) (done StatusDone, err error) {
	q := url.Values{}
	if s.Wait {
		q.Set("wait", "fleet")
	}
	body := struct {
		Action  string   `json:"action"`
		Targets []Target `json:"targets"`
	}{s.Action, s.Targets}
	_, err = c.do(ctx, request{method: http.MethodPost, path: "/statuses", query: q, body: body, change: &s.Change}, &done)
	return done, err
}

// Selection is the keys that a change of many would name.
type Selection struct {
	Keys  []SelectedKey `json:"keys"`
	Apps  []string      `json:"apps"`
	Notes []string      `json:"notes"` // for people: where records and indexes disagree
}

// SelectedKey is what is stored of a key. Products are those with a flag and
// those that the credential lists; the status of one without a flag is empty.
type SelectedKey struct {
	Key      string       `json:"key"`
	There    bool         `json:"there"`
	App      string       `json:"appId"`
	Status   string       `json:"status"`
	Products []ProductRef `json:"products"`
}

// SelectBy names keys: one of the three.
type SelectBy struct {
	App       string   `json:"app,omitempty"` // its id
	Developer string   `json:"developer,omitempty"`
	Keys      []string `json:"keys,omitempty"`
}

// Select finds keys.
func (c *Client) Select(ctx context.Context, by SelectBy) (s Selection, err error) {
	_, err = c.do(ctx, request{method: http.MethodPost, path: "/statuses:select", body: by}, &s)
	return s, err
}

// Found is a key with its app.
type Found struct {
	App App        `json:"app"`
	Key Credential `json:"key"`
}

// Search finds a key, which travels in the body. It reveals nothing.
func (c *Client) Search(ctx context.Context, key Secret) (Found, error) {
	return c.search(ctx, key.Reveal())
}

// FindKey finds a key by its id. It reveals nothing.
func (c *Client) FindKey(ctx context.Context, id authz.KeyID) (Found, error) {
	return c.search(ctx, keyName(id))
}

func (c *Client) search(ctx context.Context, key string) (f Found, err error) {
	body := struct {
		Key string `json:"consumerKey"`
	}{key}
	_, err = c.do(ctx, request{method: http.MethodPost, path: "/keys:search", body: body}, &f)
	return f, err
}

// KeyQuery selects keys of the organization: one of the three.
type KeyQuery struct {
	// Status that the key has; pending also finds a product that is pending on
	// it.
	Status string
	// Expired ones.
	Expired bool
	// ExpiringWithin this time from now.
	ExpiringWithin time.Duration
}

// ListedKey is a key in a list of the organization's.
type ListedKey struct {
	ID             string       `json:"keyId"`
	Hint           string       `json:"hint"` // its last characters, if they are known
	AppID          string       `json:"appId"`
	AppName        string       `json:"appName"`
	DeveloperID    string       `json:"developerId"`
	DeveloperEmail string       `json:"developerEmail"`
	Status         string       `json:"status"`
	ExpiresAt      Millis       `json:"expiresAt"`
	Products       []ProductRef `json:"apiProducts"`
	// Raw is the whole object as it was answered.
	Raw json.RawMessage `json:"-"`
}

// UnmarshalJSON implements json.Unmarshaler.
func (k *ListedKey) UnmarshalJSON(b []byte) error {
	type plain ListedKey
	k.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(k))
}

// Keys lists keys of the organization.
func (c *Client) Keys(ctx context.Context, by KeyQuery) iter.Seq2[ListedKey, error] {
	q := url.Values{}
	switch {
	case by.Expired:
		q.Set("expired", "true")
	case by.ExpiringWithin > 0:
		q.Set("expiringWithin", by.ExpiringWithin.String())
	default:
		q.Set("status", by.Status)
	}
	return byPageToken[ListedKey](ctx, c, "/keys", "keys", q)
}

// Explanation of what a check would answer.
type Explanation struct {
	Decision  string  `json:"decision"` // allowed or denied
	Reason    string  `json:"reason"`
	Problem   string  `json:"problem"`
	Revision  int64   `json:"revision"`
	KeyID     string  `json:"keyId"`
	Product   string  `json:"product"`
	App       string  `json:"app"`
	Developer string  `json:"developer"`
	Scopes    string  `json:"scopes"`
	Levels    []Level `json:"levels"`
	// Raw is the whole object as it was answered.
	Raw json.RawMessage `json:"-"`
}

// Level of a check.
type Level struct {
	Level   string `json:"level"`
	Status  string `json:"status"`
	Reason  string `json:"reason"`
	Problem string `json:"problem"`
	EtcdKey string `json:"etcdKey"`
}

// UnmarshalJSON implements json.Unmarshaler.
func (e *Explanation) UnmarshalJSON(b []byte) error {
	type plain Explanation
	e.Raw = append(json.RawMessage(nil), b...)
	return json.Unmarshal(b, (*plain)(e))
}

// Check explains what a check of the key for the product would answer. The key
// travels in the body.
func (c *Client) Check(ctx context.Context, key Secret, product string) (e Explanation, err error) {
	body := struct {
		Key     string `json:"consumerKey"`
		Product string `json:"product"`
	}{key.Reveal(), product}
	_, err = c.do(ctx, request{method: http.MethodPost, path: "/check", body: body}, &e)
	return e, err
}
