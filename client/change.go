package client

import (
	"net/http"
	"net/url"
	"strconv"
)

// Change says how a change is made. The zero Change makes it.
type Change struct {
	// Reason and Ticket stand in the audit record.
	Reason, Ticket string
	// DryRun works the change out and writes nothing.
	DryRun bool
	// IfMatch is the ETag that the object must have; empty means any.
	IfMatch string
}

// add says it in a query.
func (ch Change) add(q url.Values) {
	for name, value := range map[string]string{"reason": ch.Reason, "ticket": ch.Ticket} {
		if value != "" {
			q.Set(name, value)
		}
	}
	if ch.DryRun {
		q.Set("dryRun", "true")
	}
}

// Done is what a change did, or on a dry run would have done.
type Done struct {
	// Revision of the transaction; on a dry run that of the reads.
	Revision int64 `json:"revision"`
	// Changes and Stops are those of a dry run.
	Changes []ValueChange `json:"changes"`
	Stops   []Stop        `json:"stops"`
}

// ValueChange is the change of one value in etcd. A nil Before or After is
// absent.
type ValueChange struct {
	Path   string  `json:"path"`
	Before *string `json:"before"`
	After  *string `json:"after"`
}

// Stop is a consumer key that may use a product now and may not after the
// change.
type Stop struct {
	Key     string `json:"key"` // its id
	Hint    string `json:"hint,omitempty"`
	App     string `json:"appId"`
	Product string `json:"product"`
}

// revisionHeader of the answer to a change.
const revisionHeader = "x-keygate-revision"

func revision(h http.Header) int64 {
	n, _ := strconv.ParseInt(h.Get(revisionHeader), 10, 64) // 0 if there is none
	return n
}
