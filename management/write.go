package management

import (
	"fmt"
	"net/http"

	"keygate/audit"
	"keygate/ledger"
)

// preview is the answer to a dry run.
type preview struct {
	DryRun   bool           `json:"dryRun"`
	Revision int64          `json:"revision"`
	Changes  []audit.Change `json:"changes"`
	Stops    []ledger.Stop  `json:"stops"`
}

func previewed(revision int64, changes []audit.Change, stops []ledger.Stop) answer {
	// Lists are there, empty or not.
	p := preview{true, revision, append([]audit.Change{}, changes...), append([]ledger.Stop{}, stops...)}
	return answer{body: marshal(p), revision: revision}
}

// change makes one change and answers what it is about, in the given status.
// With an Idempotency-Key the answer is rendered in the transaction, and given as
// it was kept there.
func change[T any](c *call, status int, render func(T) []byte, do func(ledger.By) (T, ledger.Done, error)) (answer, error) {
	by, err := c.by()
	if err != nil {
		return answer{}, err
	}
	if c.query.has("wait") {
		return answer{}, invalid("?wait", "waits for a change of statuses: want it with ?action=, or on POST statuses")
	}
	var kept []byte
	if by.Once != nil {
		by.Once.Body = func(result any) ([]byte, error) {
			v, ok := result.(T)
			if !ok {
				return nil, fmt.Errorf("render the answer to keep: it is a %T, want a %T", result, v)
			}
			kept = render(v)
			return kept, nil
		}
	}
	v, done, err := do(by)
	switch {
	case err != nil:
		return answer{}, err
	case by.DryRun:
		return previewed(done.Revision, done.Changes, done.Stops), nil
	case done.Replayed != nil:
		if c.route.secret {
			note := fmt.Sprintf("replayed answer: that of %s %s at revision %d", c.route.method, c.route.pattern, done.Revision)
			if err := c.cfg.Ledger.Note(c.ctx, by, c.org, "reveal", "", note); err != nil {
				return answer{}, err
			}
		}
		return answer{status: status, body: done.Replayed, revision: done.Revision, replayed: true}, nil
	case kept == nil:
		kept = render(v)
	}
	a := answer{status: status, body: kept, revision: done.Revision}
	if c.r.Method != http.MethodDelete {
		a.etag = revisionOf(v)
	}
	return a, nil
}

// revisionOf an entity: its ETag.
func revisionOf(v any) int64 {
	switch v := v.(type) {
	case ledger.Developer:
		return v.Revision
	case ledger.App:
		return v.Revision
	case ledger.Credential:
		return v.Revision
	case ledger.Product:
		return v.Revision
	}
	return 0
}
