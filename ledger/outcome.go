package ledger

import (
	"fmt"

	"keygate/authz"
	"keygate/catalog"
	"keygate/statestore/keyspace"
)

// Action is what became of one thing that was handed in.
type Action uint8

// The zero Action is Unchanged.
const (
	Unchanged Action = iota // it stands in the store as it was handed in
	Created
	Changed
	Kept    // the store says something else, or more, and keeps it
	Refused // not taken
	numActions
)

var actionWords = [numActions]string{"unchanged", "created", "changed", "kept", "refused"}

// String returns the action's word.
func (a Action) String() string {
	if a >= numActions {
		return "unknown"
	}
	return actionWords[a]
}

// MarshalText makes the word the action's JSON.
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// Outcome is what became of one submission.
type Outcome struct {
	Place catalog.Place `json:"place"`
	// App with its Name, Developer with the e-mail address as Name, or Product;
	// all empty when the submission could not be read.
	App       authz.AppID       `json:"appId,omitempty"`
	Developer authz.DeveloperID `json:"developerId,omitempty"`
	Product   authz.ProductName `json:"product,omitempty"`
	Name      string            `json:"name,omitempty"`
	// Items has one for each record (app, developer, credential, product), then
	// those that need a word of their own, of the same records.
	Items []Item `json:"items"`
}

// Item is one record, or one value of a record, of an outcome.
type Item struct {
	Action Action `json:"action"`
	// Kind of the record; KindNone for one that could not be read.
	Kind keyspace.Kind `json:"-"`
	// Whole tells that the item stands for its record, and not for one value.
	Whole bool `json:"-"`
	// Path of the record, or of the value, in etcd; empty if it has none.
	Path string `json:"path,omitempty"`
	// Hint at the consumer key of a credential: its last characters.
	Hint string `json:"hint,omitempty"`
	// Stored and Submitted values of a status or an expiry that differ.
	Stored    string `json:"stored,omitempty"`
	Submitted string `json:"submitted,omitempty"`
	// Place of what was refused, where it is known more closely than by the
	// outcome's.
	Place *catalog.Place `json:"place,omitempty"`
	// Reason for Kept or Refused.
	Reason string `json:"reason,omitempty"`
}

// Count of the whole records of one kind, by action.
type Count [numActions]int

// Report adds up outcomes. The zero Report is ready to use. It grows with
// nothing but its numbers.
type Report struct {
	Apps, Developers, Credentials, Products Count
	// Statuses, expiries and records that were kept against what was handed in,
	// or without its knowing of them.
	Kept int
	// Refused submissions and credentials.
	Refused int
	// Written tells that at least one record was created or changed.
	Written bool
}

// Add counts one more outcome.
func (r *Report) Add(o Outcome) {
	for _, it := range o.Items {
		switch it.Action {
		case Kept:
			r.Kept++
		case Refused:
			r.Refused++
		case Created, Changed:
			r.Written = true
		}
		if !it.Whole {
			continue
		}
		switch it.Kind {
		case keyspace.KindApp:
			r.Apps[it.Action]++
		case keyspace.KindDeveloper:
			r.Developers[it.Action]++
		case keyspace.KindKey:
			r.Credentials[it.Action]++
		case keyspace.KindProduct:
			r.Products[it.Action]++
		}
	}
}

// String returns the report in one line.
func (r Report) String() string {
	count := func(what string, c Count) string {
		return fmt.Sprintf("%s: %d created, %d changed, %d unchanged", what, c[Created], c[Changed], c[Unchanged])
	}
	return fmt.Sprintf("%s; %s; %s; %s; %d kept, %d refused",
		count("apps", r.Apps), count("credentials", r.Credentials), count("developers", r.Developers), count("products", r.Products), r.Kept, r.Refused)
}
