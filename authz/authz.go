// Package authz decides whether a consumer key may use an API product.
//
// It is the pure core: a [Request] goes in, a [Decision] with exactly one
// [Reason] comes out. Where the records come from is behind [Source]; how a
// request arrives and an answer leaves is another package's business. It
// imports the standard library only.
package authz

import (
	"context"
	"errors"
	"time"
)

// Names of the things a decision speaks of. They are types of their own so
// that the compiler keeps them apart.
type (
	// Organization is the tenant that keys, apps, developers and products
	// belong to. A name never begins with a dot.
	Organization string
	// AppID is Apigee's appId: it never changes, an app's name may.
	AppID string
	// DeveloperID is Apigee's developerId: it never changes, an e-mail
	// address may.
	DeveloperID string
	// ProductName is an API product's name, never its display name.
	ProductName string
)

// The two ways in which a [Source] can leave a question unanswered. A source
// wraps them; anything else that it returns is an internal error.
var (
	// ErrUnavailable: what is true now is not known, or cannot be proven.
	ErrUnavailable = errors.New("current state not proven")
	// ErrOverloaded: the answer was not looked up, to protect the store.
	ErrOverloaded = errors.New("too many loads")
)

// Request asks whether one consumer key may use one API product.
type Request struct {
	// Organization whose key it is. Empty names no organization and is
	// refused as ProductUnresolved: the route does not say enough.
	Organization Organization
	// KeyID of the consumer key. The zero KeyID means that none was given.
	KeyID KeyID
	// Products that the route names: any one of them, approved on the key,
	// opens. Empty is refused as ProductUnresolved. Decide only reads it.
	Products []ProductName
}

// Source answers what is true now about the records of a check.
// Implementations are safe for concurrent use.
type Source interface {
	// Records returns the credential of a key with the app and the developer
	// it belongs to. A record that is known not to exist is the zero one; that is
	// an answer, not an error. What the result refers to is shared and immutable.
	// Errors wrap ErrUnavailable or ErrOverloaded.
	Records(ctx context.Context, org Organization, id KeyID) (Records, error)
}

// Proof tells whether records may still be used to answer. It was taken
// before any of them was read.
type Proof interface {
	// Valid is cheap and safe for concurrent use. Once false it stays false.
	Valid() bool
}

// Records is what a [Source] knows about one key. A zero record does not
// exist; a record that exists but cannot be read says so in its Problem. They
// are values, so that a source that keeps its records in another form needs no
// memory to answer.
type Records struct {
	Credential Credential
	App        App
	Developer  Developer
	// Revision of the store that had been applied when the records were asked
	// for: every record is at least as new.
	Revision int64
	// Proof of freshness. A nil proof proves nothing: the answer is Stale.
	Proof Proof
}

// Credential is the record behind a consumer key. Immutable.
type Credential struct {
	// Exists tells whether there is such a record.
	Exists   bool
	Status   Flag
	Products map[ProductName]Flag
	App      AppID
	// Developer the credential was issued under. The app's is the authority;
	// a credential that disagrees with it is refused.
	Developer DeveloperID
	// ExpiresAt in milliseconds since the Unix epoch; [NeverExpires] for never.
	ExpiresAt int64
	// Revision of the store at which ExpiresAt was written last; 0 if the source
	// does not tell. A credential seen expired stays so for as long as this and
	// ExpiresAt do.
	Revision int64
	// Scopes, joined by single spaces.
	Scopes string
	// Problem says why the credential's details cannot be used; empty when
	// they can. Status and Products are valid either way.
	Problem string
}

// App is a developer app's record. Immutable.
type App struct {
	// Exists tells whether there is such a record.
	Exists    bool
	Status    Flag
	Developer DeveloperID
	// Problem says why the app's details cannot be used; empty when they can.
	Problem string
}

// Developer is a developer's record. Immutable.
type Developer struct {
	// Exists tells whether there is such a record.
	Exists bool
	Status Flag
	// Problem says why the developer's details cannot be used; empty when
	// they can.
	Problem string
}

// NeverExpires is the ExpiresAt of a credential that does not expire
// (Apigee's own word for it).
const NeverExpires int64 = -1

// Authorizer decides requests over a Source. Its fields are set once, before
// use; it is then safe for concurrent use, and must not be copied.
//
// A credential that it has seen expired stays expired, whatever the clock says
// later, until the credential is written again; a change of its status alone
// does not open it. No other credential is touched by that. The memory for it
// is bounded (1 MiB, the oldest of about 100,000 credentials go first), and is
// this Authorizer's own: another one, or the next process, begins without.
type Authorizer struct {
	Source Source
	// Now is the wall clock that expiry follows; nil means time.Now. It must be
	// safe for concurrent use.
	Now func() time.Time

	expired latch
}

// Decision is the answer to a Request. The zero Decision is a refusal
// (Internal).
type Decision struct {
	Reason Reason
	// Organization and KeyID are the request's own.
	Organization Organization
	KeyID        KeyID
	// Product decided on: the first approved one of the request's, else the
	// first of the request's.
	Product ProductName
	// App, Developer and Scopes of the key, where they are known.
	App       AppID
	Developer DeveloperID
	Scopes    string
	// Revision of the store that the decision is at least as new as; 0 when no
	// record was needed.
	Revision int64
	// Problem says more than the reason, for the operator: what cannot be read,
	// why nothing is proven, what is wrong with the route or the key's form, that
	// the clock was set back behind an expiry. It may be empty, holds no secret
	// and is not for the client.
	Problem string
}

// Allowed tells whether the decision opens.
func (d Decision) Allowed() bool { return d.Reason == Allowed }

// Refuse is the decision for a request that could not even be asked, such as
// one with a malformed key. A reason of Allowed becomes Internal.
func Refuse(req Request, reason Reason) Decision {
	if reason == Allowed {
		reason = Internal
	}
	d := Decision{Reason: reason, Organization: req.Organization, KeyID: req.KeyID}
	if len(req.Products) > 0 {
		d.Product = req.Products[0]
	}
	return d
}

// Decide answers req. It allocates nothing unless the source does.
func (a *Authorizer) Decide(ctx context.Context, req Request) Decision {
	d, _, _ := a.decide(ctx, req)
	return d
}

// Explain answers req as Decide does, by the same ladder, and also returns
// each rung of it. The rungs are empty when no record could be asked for.
func (a *Authorizer) Explain(ctx context.Context, req Request) (Decision, []Rung) {
	d, rungs, climbed := a.decide(ctx, req)
	if !climbed {
		return d, nil
	}
	return d, rungs[:]
}

func (a *Authorizer) decide(ctx context.Context, req Request) (d Decision, rungs [numRungs]Rung, climbed bool) {
	if reason := complete(req); reason != Allowed {
		return Refuse(req, reason), rungs, false
	}
	records, err := a.Source.Records(ctx, req.Organization, req.KeyID)
	if err != nil {
		d = Refuse(req, reasonOf(err))
		d.Problem = err.Error()
		return d, rungs, false
	}
	now := time.Now
	if a.Now != nil {
		now = a.Now
	}
	rungs, product := climb(req, &records, now(), &a.expired)
	d = Decision{
		Reason: Allowed, Organization: req.Organization, KeyID: req.KeyID,
		Product: product, Revision: records.Revision,
	}
	for _, r := range rungs {
		if r.Reason != Allowed {
			d.Reason, d.Problem = r.Reason, r.Problem
			break
		}
	}
	d.App, d.Developer, d.Scopes = records.Credential.App, records.Credential.Developer, records.Credential.Scopes
	// The last step, after everything was decided: an answer counts only while
	// the proof that was taken first still holds.
	if records.Proof == nil || !records.Proof.Valid() {
		d.Reason, d.Problem = Stale, "the proof of freshness ended before the answer"
	}
	return d, rungs, true
}

// complete tells whether req can be asked at all.
func complete(req Request) Reason {
	switch {
	case req.KeyID == KeyID{}:
		return KeyMissing
	case req.Organization == "" || len(req.Products) == 0:
		return ProductUnresolved
	}
	for _, p := range req.Products {
		if p == "" {
			return ProductUnresolved
		}
	}
	return Allowed
}

func reasonOf(err error) Reason {
	switch {
	case errors.Is(err, ErrUnavailable):
		return Stale
	case errors.Is(err, ErrOverloaded):
		return Overloaded
	}
	return Internal
}
