package catalog

import "fmt"

// Submission is an app, a developer or an API product as somebody handed it in,
// in a file or a request: where it stood, and what of it was not taken.
type Submission struct {
	// Place of what was handed in.
	Place Place
	// App, Developer or Product that was read: one of them, or none when it was
	// refused as a whole. Refused credentials are not in the App.
	App       *App
	Developer *Developer
	Product   *Product
	// Digest of the JSON without its white space. Two submissions with one
	// digest say the same.
	Digest [32]byte
	// Refused tells why it, or a credential of it, was not taken.
	Refused []Refusal
}

// Place is where something stands in a named input.
type Place struct {
	Name         string // of a file
	Line, Column int    // from 1, in bytes; a Line of 0 means the whole input
}

// String returns "name:line:column".
func (p Place) String() string {
	if p.Line == 0 {
		return p.Name
	}
	return fmt.Sprintf("%s:%d:%d", p.Name, p.Line, p.Column)
}

// MarshalText marshals String.
func (p Place) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// Refusal is why something was not taken. It holds neither a key nor a secret.
type Refusal struct {
	Place  Place  `json:"place"`
	Reason string `json:"reason"`
}

// Error returns the place and the reason.
func (r Refusal) Error() string { return r.Place.String() + ": " + r.Reason }
