package authz

// Reason is why a decision is what it is: a public, closed set. Its word is
// the same in metric, log, JSON and dynamic metadata.
type Reason uint8

// The zero Reason is Internal, so that a decision nobody filled in refuses.
const (
	Internal Reason = iota // keygate itself is at fault
	Allowed
	KeyMissing        // the request carries no consumer key
	KeyMalformed      // more than one candidate, or not a consumer key's form
	ProductUnresolved // the route names no product, or not clearly
	KeyUnknown        // no record of the key in the organization
	KeyRevoked
	KeyPending
	KeyExpired
	AppRevoked
	AppPending
	DeveloperInactive
	ProductNotOnKey // the key's record does not list the product
	ProductRevoked
	ProductPending
	RecordUnreadable // a status is absent or unknown, or details cannot be read
	Stale            // what is true now cannot be proven
	Overloaded       // the record was not looked up, to protect the store
	NumReasons       // how many there are; not a reason
)

var reasonWords = [NumReasons]string{
	Internal: "internal", Allowed: "allowed", KeyMissing: "key_missing", KeyMalformed: "key_malformed",
	ProductUnresolved: "product_unresolved", KeyUnknown: "key_unknown", KeyRevoked: "key_revoked",
	KeyPending: "key_pending", KeyExpired: "key_expired", AppRevoked: "app_revoked", AppPending: "app_pending",
	DeveloperInactive: "developer_inactive", ProductNotOnKey: "product_not_on_key",
	ProductRevoked: "product_revoked", ProductPending: "product_pending",
	RecordUnreadable: "record_unreadable", Stale: "stale", Overloaded: "overloaded",
}

// String returns the reason's word.
func (r Reason) String() string {
	if r >= NumReasons {
		return reasonWords[Internal]
	}
	return reasonWords[r]
}

// MarshalText makes the word the reason's JSON.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// Status is the word stored at one level. Levels are independent flags: none
// is derived from another.
type Status uint8

// The zero Status is StatusNone, which opens nothing.
const (
	StatusNone     Status = iota // absent, or not a known word
	StatusApproved               // credential, product on credential, app
	StatusRevoked
	StatusPending
	StatusActive // developer
	StatusInactive
	numStatuses
)

var statusWords = [numStatuses]string{
	StatusNone: "", StatusApproved: "approved", StatusRevoked: "revoked", StatusPending: "pending",
	StatusActive: "active", StatusInactive: "inactive",
}

// String returns the word as it is stored; "" for StatusNone.
func (s Status) String() string {
	if s >= numStatuses {
		return ""
	}
	return statusWords[s]
}

// MarshalText makes the word the status's JSON.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Flag is a status as it was found. Problem says why Status is StatusNone.
type Flag struct {
	Status  Status
	Problem string
}
