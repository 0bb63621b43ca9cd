package keyspace

import (
	"fmt"
	"net/url"

	"keygate/authz"
)

// The folders of the management. They lie outside the watched prefix: no check
// depends on them.

// Management is the range of everything that is not a record: the keys from
// the first result to before the second.
func (s Space) Management() (from, to string) { return s.prefix + ".", s.prefix + "/" }

// All is the range of everything below the prefix: what Management spans, and
// the records.
func (s Space) All() (from, to string) { return s.prefix + ".", s.prefix + "0" }

// Audit is the prefix of the audit records of org, with its final slash. The
// record's time-ordered id follows it.
func (s Space) Audit(org authz.Organization) string {
	return s.prefix + ".audit/" + url.PathEscape(string(org)) + "/"
}

// Audits is the prefix of the audit records of all organizations, with its
// final slash.
func (s Space) Audits() string { return s.prefix + ".audit/" }

// Chain is the prefix of the links of the audit chain, with its final slash.
func (s Space) Chain() string { return s.prefix + ".chain/" }

// ChainLink is the path of the link whose last revision is rev. Paths are in
// the order of the revisions.
func (s Space) ChainLink(rev int64) string { return fmt.Sprintf("%s%016x", s.Chain(), rev) }

// ChainHead is the path of the newest link's revision and hash. It sorts behind
// every link.
func (s Space) ChainHead() string { return s.Chain() + "head" }

// Tokens is the prefix of the management tokens, with its final slash. The
// SHA-256 of the token, in hex, follows it.
func (s Space) Tokens() string { return s.prefix + ".tokens/" }

// TokensUsed is the prefix of when each token was last used, with its final
// slash. The token's SHA-256, in hex, follows it.
func (s Space) TokensUsed() string { return s.prefix + ".used/" }

// Once is the path of the answer to a request with an Idempotency-Key. id is a
// hash of who asked with which key.
func (s Space) Once(org authz.Organization, id string) string {
	return s.prefix + ".once/" + url.PathEscape(string(org)) + "/" + id
}

// Intents is the prefix of the changes of several transactions that have begun,
// of all organizations, with its final slash.
func (s Space) Intents() string { return s.prefix + ".intent/" }

// Intent is the path of one of them.
func (s Space) Intent(org authz.Organization, id string) string {
	return s.Intents() + url.PathEscape(string(org)) + "/" + id
}
