package management

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"keygate/catalog"
	"keygate/ledger"
)

// answer of a handler.
type answer struct {
	status int // 0 is 200, or 204 if there is no body
	body   []byte
	// revision of a change, in x-keygate-revision; 0 is none.
	revision int64
	// etag is the revision of what the body shows; 0 is none.
	etag int64
	// replayed: the body is that of an earlier request.
	replayed bool
}

// Headers of answers, besides those of HTTP.
const (
	headerRevision = "X-Keygate-Revision"
	headerReplayed = "Idempotency-Replayed"
)

func writeAnswer(w http.ResponseWriter, a answer) {
	h := w.Header()
	if a.revision != 0 {
		h.Set(headerRevision, strconv.FormatInt(a.revision, 10))
	}
	if a.etag != 0 {
		h.Set("ETag", etag(a.etag))
	}
	if a.replayed {
		h.Set(headerReplayed, "true")
	}
	if a.status == 0 && len(a.body) == 0 {
		a.status = http.StatusNoContent
	} else if a.status == 0 {
		a.status = http.StatusOK
	}
	if len(a.body) > 0 {
		h.Set("Content-Type", "application/json")
		h.Set("Content-Length", strconv.Itoa(len(a.body)))
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body) // the client has gone, or has all of it
}

// etag is a revision as an entity tag.
func etag(revision int64) string { return strconv.Quote(strconv.FormatInt(revision, 10)) }

// marshal renders what is keygate's own.
func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // it has only strings, numbers and lists of them
		panic("management: " + err.Error())
	}
	return b
}

// refusal is an error that knows its answer.
type refusal struct {
	status     int
	code       string
	message    string
	retryAfter time.Duration // 0 sends none
	allow      string        // of 405
}

func (e *refusal) Error() string { return e.message }

// statuses of the ledger's refusals.
var statuses = map[ledger.ErrorKind]int{
	ledger.Invalid:      http.StatusBadRequest,
	ledger.NotFound:     http.StatusNotFound,
	ledger.Exists:       http.StatusConflict,
	ledger.Conflict:     http.StatusConflict,
	ledger.Precondition: http.StatusPreconditionFailed,
	ledger.Mismatch:     http.StatusUnprocessableEntity,
	ledger.Limit:        http.StatusBadRequest,
	ledger.TooLarge:     http.StatusBadRequest,
}

// failures are the errors that are not refusals, in the order in which they are
// looked for.
var failures = []struct {
	err     error
	refusal refusal
}{
	{ledger.ErrNotFound, refusal{status: http.StatusNotFound, code: "keygate.not_found"}},
	{ledger.ErrOutcomeUnknown, refusal{status: http.StatusServiceUnavailable, code: "keygate.outcome_unknown", retryAfter: time.Second,
		message: "outcome unknown: the store did not answer, and the change may have taken place or may yet; repeat the request: with the same Idempotency-Key it is made once"}},
	{ledger.ErrConflict, refusal{status: http.StatusConflict, code: "keygate.conflict", message: "others kept changing the same; nothing was written, repeat the request"}},
	{ledger.ErrListDenied, refusal{status: http.StatusServiceUnavailable, code: "keygate.receipt_denied",
		message: "keygate may not list the replicas in etcd, so there is no receipt to wait for; nothing was written"}},
	{ledger.ErrReplaced, refusal{status: http.StatusServiceUnavailable, code: "keygate.store_replaced",
		message: "etcd was restored or replaced during the wait, and may not hold the change any more: look at what it holds now, and repeat the request"}},
	{rpctypes.ErrNoSpace, refusal{status: http.StatusServiceUnavailable, code: "keygate.no_space",
		message: "etcd has no space left, and takes nothing but revocations until it is compacted and defragmented and its alarm is disarmed; nothing was written"}},
}

// refusalOf words an error for a client. A write that failed for want of an
// answer, and is not ErrOutcomeUnknown, was not sent.
func refusalOf(err error) (out *refusal) {
	if errors.As(err, &out) {
		return out
	}
	var refused *ledger.Error
	if errors.As(err, &refused) && !errors.Is(err, ledger.ErrOutcomeUnknown) {
		message := refused.Message
		if strings.HasPrefix(refused.Code, "keygate.") { // else the words are Apigee's own
			message = refused.Error()
		}
		return &refusal{status: statuses[refused.Kind], code: refused.Code, message: message}
	}
	var field *catalog.FieldError
	if errors.As(err, &field) {
		return &refusal{status: http.StatusBadRequest, code: "keygate.body", message: field.Error()}
	}
	for _, f := range failures {
		if errors.Is(err, f.err) {
			out := f.refusal
			var missing *ledger.NotFoundError
			if errors.As(err, &missing) {
				out.message = missing.Error()
			}
			return &out
		}
	}
	var etcd rpctypes.EtcdError
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.As(err, &etcd) || status.Code(err) != codes.Unknown {
		return &refusal{status: http.StatusServiceUnavailable, code: "keygate.unavailable", retryAfter: time.Second,
			message: "the store does not answer as it should; nothing was changed, and repeating the request is safe"}
	}
	return &refusal{status: http.StatusInternalServerError, code: "keygate.internal",
		message: "the request could not be handled; the log of the server says why, under the request's id"}
}

func writeError(w http.ResponseWriter, rq *request, e *refusal) {
	h := w.Header()
	switch e.status {
	case http.StatusUnauthorized:
		h.Set("WWW-Authenticate", `Bearer realm="keygate"`)
	case http.StatusMethodNotAllowed:
		h.Set("Allow", e.allow)
	}
	if e.retryAfter > 0 {
		h.Set("Retry-After", retryAfter(e.retryAfter))
	}
	writeAnswer(w, answer{status: e.status, body: rq.edition.Error(e.status, e.code, e.message, rq.id)})
}
