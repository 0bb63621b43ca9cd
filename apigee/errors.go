package apigee

import "net/http"

// statusWords are Google's for the HTTP statuses that an answer can have.
var statusWords = map[int]string{
	http.StatusBadRequest:            "INVALID_ARGUMENT",
	http.StatusUnauthorized:          "UNAUTHENTICATED",
	http.StatusForbidden:             "PERMISSION_DENIED",
	http.StatusNotFound:              "NOT_FOUND",
	http.StatusMethodNotAllowed:      "UNIMPLEMENTED",
	http.StatusConflict:              "ABORTED",
	http.StatusPreconditionFailed:    "FAILED_PRECONDITION",
	http.StatusRequestEntityTooLarge: "INVALID_ARGUMENT",
	http.StatusMisdirectedRequest:    "INVALID_ARGUMENT",
	http.StatusUnprocessableEntity:   "INVALID_ARGUMENT",
	http.StatusTooManyRequests:       "RESOURCE_EXHAUSTED",
	http.StatusInternalServerError:   "INTERNAL",
	http.StatusNotImplemented:        "UNIMPLEMENTED",
	http.StatusBadGateway:            "UNAVAILABLE",
	http.StatusServiceUnavailable:    "UNAVAILABLE",
	http.StatusGatewayTimeout:        "DEADLINE_EXCEEDED",
}

type preconditionFailure struct {
	Type       string      `json:"@type"`
	Violations []violation `json:"violations"`
}

type violation struct {
	Type        string `json:"type"`
	Subject     string `json:"subject"`
	Description string `json:"description"`
}

type requestInfo struct {
	Type      string `json:"@type"`
	RequestID string `json:"requestId"`
}

// Error renders a refusal. status is the HTTP status of the answer, which X
// repeats; code is stable and for programs, message for people. Edge has no
// room for the request id.
func (e Edition) Error(status int, code, message, requestID string) []byte {
	var body any
	switch e {
	case X:
		word, ok := statusWords[status]
		switch {
		case ok:
		case status < http.StatusInternalServerError:
			word = "INVALID_ARGUMENT"
		default:
			word = "INTERNAL"
		}
		type details struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
			Status  string `json:"status"`
			Details []any  `json:"details"`
		}
		body = struct {
			Error details `json:"error"`
		}{details{status, message, word, []any{
			// Clients look for the code in the first of the details.
			preconditionFailure{"type.googleapis.com/google.rpc.PreconditionFailure", []violation{{code, requestID, message}}},
			requestInfo{"type.googleapis.com/google.rpc.RequestInfo", requestID},
		}}}
	case Edge:
		body = struct {
			Code     string   `json:"code"`
			Message  string   `json:"message"`
			Contexts []string `json:"contexts"`
		}{code, message, []string{}}
	}
	return marshal(body)
}
