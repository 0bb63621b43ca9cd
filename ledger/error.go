package ledger

import "fmt"

// ErrorKind says what an Error is, whatever its code.
type ErrorKind uint8

// The zero ErrorKind is Invalid.
const (
	Invalid      ErrorKind = iota // the request cannot be right
	NotFound                      // what it names is not there
	Exists                        // what it would create is there
	Conflict                      // what is there forbids it
	Precondition                  // If-Match names another revision
	Mismatch                      // the Idempotency-Key was used for another request
	Limit                         // there would be too many
	TooLarge                      // it does not fit into one transaction
)

// Error is a change or a read that was refused, and nothing was written. It
// holds no consumer key and no secret.
type Error struct {
	Kind ErrorKind
	// Code is stable. It is Apigee's where Apigee has one; keygate's own begin
	// with "keygate.".
	Code string
	// Pointer is the JSON pointer into what was handed in, or "?name" for a
	// parameter. May be empty.
	Pointer string
	// Message says what was wrong, where, and what would be right.
	Message string
}

// Error returns the message, after the pointer if there is one.
func (e *Error) Error() string {
	if e.Pointer != "" {
		return e.Pointer + ": " + e.Message
	}
	return e.Message
}

func errorf(kind ErrorKind, code, format string, args ...any) *Error {
	return &Error{Kind: kind, Code: code, Message: fmt.Sprintf(format, args...)}
}
