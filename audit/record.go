package audit

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"keygate/authz"
)

// Version is the "v" of the records that this code writes.
const Version = 1

// Record is one change, or one answer that revealed a consumer key: who, what,
// before, after. It never holds a consumer key, a secret or a token.
type Record struct {
	Version int `json:"v"`
	// ID is time-ordered, and the record's name in etcd.
	ID string `json:"id"`
	// At is when the change was made, by the clock of who made it, in
	// milliseconds since the Unix epoch.
	At           int64              `json:"at"`
	Organization authz.Organization `json:"organization"`
	Actor        Actor              `json:"actor"`
	// Action is a verb: revoke, approve, create, update, delete, import, reveal,
	// refuse, put.
	Action string `json:"action"`
	// Object is what the action was asked for, by its path in etcd: the flag or
	// the record.
	Object string `json:"object,omitempty"`
	// Changes are the values that changed, in the order of their paths. Of a
	// change that found everything as it should be there are none.
	Changes []Change `json:"changes,omitempty"`
	// NoOp: everything was as it should be already.
	NoOp      bool   `json:"noOp,omitempty"`
	Reason    string `json:"reason,omitempty"`
	Ticket    string `json:"ticket,omitempty"`
	RequestID string `json:"requestId,omitempty"`
	// Note is for people: what does not follow from the rest.
	Note string `json:"note,omitempty"`
	// Revision of the change, if the record was written after it: a change made
	// by etcdctl, or one whose record waited in a spool. Else it is the record's
	// own.
	Revision int64 `json:"revision,omitempty"`
}

// Actor is who made a change.
type Actor struct {
	// Kind is one of the Actor constants.
	Kind string `json:"kind"`
	// Name for people: of the token, of the system's user, empty if nobody knows.
	Name string `json:"name,omitempty"`
	// Token is the id of the token that was used.
	Token string `json:"token,omitempty"`
	// Address that the request came from.
	Address string `json:"address,omitempty"`
}

// Kinds of actors.
const (
	ActorToken    = "token"    // by the management API, with a token
	ActorCLI      = "cli"      // keygate on the store itself
	ActorExternal = "external" // etcdctl, or anything else that writes to etcd
	ActorKeygate  = "keygate"  // keygate by itself, such as finishing what another began
)

// Change of one value in etcd.
type Change struct {
	Path string `json:"path"`
	// Before and After; nil is absent. What is sealed in a value is not shown.
	Before *string `json:"before"`
	After  *string `json:"after"`
}

// idBytes of an id: 6 of its time in milliseconds, 8 random.
const idBytes = 14

// NewID returns an id: ids of different milliseconds sort by time.
func NewID(at time.Time) string {
	var b [idBytes]byte
	_, _ = rand.Read(b[6:]) // never fails
	ms := at.UnixMilli()
	for i := range 6 {
		b[i] = byte(ms >> (8 * (5 - i)))
	}
	return hex.EncodeToString(b[:])
}

// FirstID is not greater than any id of at or later: where a list that begins
// there begins.
func FirstID(at time.Time) string { return fmt.Sprintf("%012x", at.UnixMilli()) }

// Value is the record as it is stored.
func (r Record) Value() string {
	b, err := json.Marshal(r)
	if err != nil { // it has only strings and numbers
		panic("audit: " + err.Error())
	}
	return string(b)
}

// Parse reads a stored record.
func Parse(value []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(value, &r); err != nil {
		return r, fmt.Errorf("audit record: %w", err)
	}
	if r.Version != Version {
		return r, fmt.Errorf("audit record: \"v\" is %d, want %d", r.Version, Version)
	}
	return r, nil
}
