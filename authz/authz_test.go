package authz_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"keygate/authz"
)

// now is the wall clock of every test here.
var now = time.UnixMilli(1_700_000_000_000)

// proof that holds, or does not.
type proof bool

func (p proof) Valid() bool { return bool(p) }

// source answers with what it holds, whoever asks.
type source struct {
	records authz.Records
	err     error
	asked   int
}

func (s *source) Records(context.Context, authz.Organization, authz.KeyID) (authz.Records, error) {
	s.asked++
	return s.records, s.err
}

func approved() authz.Flag { return authz.Flag{Status: authz.StatusApproved} }
func active() authz.Flag   { return authz.Flag{Status: authz.StatusActive} }

func keyID(t testing.TB, key string) authz.KeyID {
	t.Helper()
	k, reason := authz.ParseConsumerKey(key)
	if reason != authz.Allowed {
		t.Fatalf("key %q: got %v, want a usable key", key, reason)
	}
	return k.ID()
}

// good is a set of records that opens Weather and Maps, and knows News as
// revoked and Tides as pending.
func good() authz.Records {
	return authz.Records{
		Credential: authz.Credential{Exists: true,
			Status: approved(),
			Products: map[authz.ProductName]authz.Flag{
				"Weather": approved(),
				"Maps":    approved(),
				"News":    {Status: authz.StatusRevoked},
				"Tides":   {Status: authz.StatusPending},
				"Broken":  {Problem: `status "aproved" is not one of approved, revoked, pending`},
			},
			App: "app-1", Developer: "dev-1", ExpiresAt: authz.NeverExpires, Scopes: "READ WRITE",
		},
		App:       authz.App{Exists: true, Status: approved(), Developer: "dev-1"},
		Developer: authz.Developer{Exists: true, Status: active()},
		Revision:  42,
		Proof:     proof(true),
	}
}

// Changes to the good records, by name, so that a case reads as a sentence.
type change func(*authz.Records)

func key(s authz.Status) change {
	return func(r *authz.Records) { r.Credential.Status = authz.Flag{Status: s} }
}

func app(s authz.Status) change {
	return func(r *authz.Records) { r.App.Status = authz.Flag{Status: s} }
}

func developer(s authz.Status) change {
	return func(r *authz.Records) { r.Developer.Status = authz.Flag{Status: s} }
}

func weather(s authz.Status) change {
	return func(r *authz.Records) { r.Credential.Products["Weather"] = authz.Flag{Status: s} }
}

func expires(ms int64) change { return func(r *authz.Records) { r.Credential.ExpiresAt = ms } }

func noKey(r *authz.Records)       { r.Credential = authz.Credential{} }
func noApp(r *authz.Records)       { r.App = authz.App{} }
func noDeveloper(r *authz.Records) { r.Developer = authz.Developer{} }
func noWeather(r *authz.Records)   { delete(r.Credential.Products, "Weather") }
func noProducts(r *authz.Records)  { r.Credential.Products = nil }
func noProof(r *authz.Records)     { r.Proof = nil }
func proofEnded(r *authz.Records)  { r.Proof = proof(false) }

func badKey(r *authz.Records)       { r.Credential.Problem = "credential: empty, want JSON" }
func badApp(r *authz.Records)       { r.App.Problem = "app: empty, want JSON" }
func badDeveloper(r *authz.Records) { r.Developer.Problem = "developer: empty, want JSON" }
func otherDeveloper(r *authz.Records) {
	r.App.Developer = "dev-2"
}

func TestDecide(t *testing.T) {
	const beyond = authz.Status(200)
	ms := now.UnixMilli()
	tests := []struct {
		name     string
		products []authz.ProductName // nil asks for Weather
		changes  []change
		want     authz.Reason
		product  authz.ProductName // "" wants the first one asked for
	}{
		{name: "everything approved", want: authz.Allowed},

		// One level at a time.
		{name: "no record of the key", changes: []change{noKey}, want: authz.KeyUnknown},
		{name: "key revoked", changes: []change{key(authz.StatusRevoked)}, want: authz.KeyRevoked},
		{name: "key pending", changes: []change{key(authz.StatusPending)}, want: authz.KeyPending},
		{name: "key without status", changes: []change{key(authz.StatusNone)}, want: authz.RecordUnreadable},
		{name: "key with a developer's word", changes: []change{key(authz.StatusActive)}, want: authz.RecordUnreadable},
		{name: "key with a developer's other word", changes: []change{key(authz.StatusInactive)}, want: authz.RecordUnreadable},
		{name: "key with a status out of range", changes: []change{key(beyond)}, want: authz.RecordUnreadable},
		{name: "credential unreadable", changes: []change{badKey}, want: authz.RecordUnreadable},
		{name: "app revoked", changes: []change{app(authz.StatusRevoked)}, want: authz.AppRevoked},
		{name: "app pending", changes: []change{app(authz.StatusPending)}, want: authz.AppPending},
		{name: "app without status", changes: []change{app(authz.StatusNone)}, want: authz.RecordUnreadable},
		{name: "app with a developer's word", changes: []change{app(authz.StatusActive)}, want: authz.RecordUnreadable},
		{name: "app with a status out of range", changes: []change{app(beyond)}, want: authz.RecordUnreadable},
		{name: "app unreadable", changes: []change{badApp}, want: authz.RecordUnreadable},
		{name: "app does not exist", changes: []change{noApp}, want: authz.RecordUnreadable},
		{name: "app of another developer", changes: []change{otherDeveloper}, want: authz.RecordUnreadable},
		{name: "developer inactive", changes: []change{developer(authz.StatusInactive)}, want: authz.DeveloperInactive},
		{name: "developer without status", changes: []change{developer(authz.StatusNone)}, want: authz.RecordUnreadable},
		{name: "developer with an app's word", changes: []change{developer(authz.StatusApproved)}, want: authz.RecordUnreadable},
		{name: "developer revoked is no word", changes: []change{developer(authz.StatusRevoked)}, want: authz.RecordUnreadable},
		{name: "developer with a status out of range", changes: []change{developer(beyond)}, want: authz.RecordUnreadable},
		{name: "developer unreadable", changes: []change{badDeveloper}, want: authz.RecordUnreadable},
		{name: "developer does not exist", changes: []change{noDeveloper}, want: authz.RecordUnreadable},
		{name: "neither app nor developer", changes: []change{noApp, noDeveloper}, want: authz.RecordUnreadable},
		{name: "product not on key", changes: []change{noWeather}, want: authz.ProductNotOnKey},
		{name: "no product on key", changes: []change{noProducts}, want: authz.ProductNotOnKey},
		{name: "product revoked", changes: []change{weather(authz.StatusRevoked)}, want: authz.ProductRevoked},
		{name: "product pending", changes: []change{weather(authz.StatusPending)}, want: authz.ProductPending},
		{name: "product without status", changes: []change{weather(authz.StatusNone)}, want: authz.RecordUnreadable},
		{name: "product with a developer's word", changes: []change{weather(authz.StatusActive)}, want: authz.RecordUnreadable},
		{name: "product with a status out of range", changes: []change{weather(beyond)}, want: authz.RecordUnreadable},
		{name: "name in other case is another product", products: []authz.ProductName{"weather"}, want: authz.ProductNotOnKey},

		// Which of several refusals is named: the ladder's order.
		{name: "key before expiry", changes: []change{key(authz.StatusRevoked), expires(1)}, want: authz.KeyRevoked},
		{name: "key pending before app revoked", changes: []change{key(authz.StatusPending), app(authz.StatusRevoked)}, want: authz.KeyPending},
		{name: "unreadable key status before expiry", changes: []change{key(authz.StatusNone), expires(1)}, want: authz.RecordUnreadable},
		{name: "expiry before app", changes: []change{expires(1), app(authz.StatusRevoked)}, want: authz.KeyExpired},
		{name: "unreadable credential before app", changes: []change{badKey, app(authz.StatusRevoked)}, want: authz.RecordUnreadable},
		{name: "key revoked before unreadable credential", changes: []change{key(authz.StatusRevoked), badKey}, want: authz.KeyRevoked},
		{name: "app before developer", changes: []change{app(authz.StatusRevoked), developer(authz.StatusInactive)}, want: authz.AppRevoked},
		{name: "app pending before developer", changes: []change{app(authz.StatusPending), developer(authz.StatusInactive)}, want: authz.AppPending},
		{name: "app revoked before its developer disagrees", changes: []change{app(authz.StatusRevoked), otherDeveloper}, want: authz.AppRevoked},
		{name: "app revoked before unreadable app", changes: []change{app(authz.StatusRevoked), badApp}, want: authz.AppRevoked},
		{name: "developer before product", changes: []change{developer(authz.StatusInactive), weather(authz.StatusRevoked)}, want: authz.DeveloperInactive},
		{name: "developer before product not on key", changes: []change{developer(authz.StatusInactive), noWeather}, want: authz.DeveloperInactive},
		{name: "developer inactive before unreadable developer", changes: []change{developer(authz.StatusInactive), badDeveloper}, want: authz.DeveloperInactive},
		{name: "no key before everything", changes: []change{noKey, app(authz.StatusRevoked), developer(authz.StatusInactive)}, want: authz.KeyUnknown},
		{name: "every level refuses", changes: []change{key(authz.StatusRevoked), expires(1), app(authz.StatusRevoked), developer(authz.StatusInactive), weather(authz.StatusRevoked)}, want: authz.KeyRevoked},

		// Several products: any one of them opens; else the first one speaks.
		{name: "first of two approved", products: []authz.ProductName{"Weather", "Maps"}, want: authz.Allowed, product: "Weather"},
		{name: "order is the route's", products: []authz.ProductName{"Maps", "Weather"}, want: authz.Allowed, product: "Maps"},
		{name: "second opens", products: []authz.ProductName{"News", "Maps"}, want: authz.Allowed, product: "Maps"},
		{name: "last opens", products: []authz.ProductName{"Nothing", "Tides", "Broken", "Maps"}, want: authz.Allowed, product: "Maps"},
		{name: "none opens, first revoked", products: []authz.ProductName{"News", "Tides"}, want: authz.ProductRevoked, product: "News"},
		{name: "none opens, first pending", products: []authz.ProductName{"Tides", "News"}, want: authz.ProductPending, product: "Tides"},
		{name: "none opens, first not on key", products: []authz.ProductName{"Nothing", "News"}, want: authz.ProductNotOnKey, product: "Nothing"},
		{name: "none opens, first unreadable", products: []authz.ProductName{"Broken", "News"}, want: authz.RecordUnreadable, product: "Broken"},
		{name: "an approved product opens no revoked app", products: []authz.ProductName{"News", "Maps"}, changes: []change{app(authz.StatusRevoked)}, want: authz.AppRevoked, product: "Maps"},

		// Expiry, in milliseconds; -1 is Apigee's "never".
		{name: "expired 1 ms ago", changes: []change{expires(ms - 1)}, want: authz.KeyExpired},
		{name: "expires now", changes: []change{expires(ms)}, want: authz.KeyExpired},
		{name: "expires in 1 ms", changes: []change{expires(ms + 1)}, want: authz.Allowed},
		{name: "expires at 0", changes: []change{expires(0)}, want: authz.KeyExpired},
		{name: "expires at -1", changes: []change{expires(-1)}, want: authz.Allowed},
		{name: "expires at -2", changes: []change{expires(-2)}, want: authz.RecordUnreadable},
		{name: "expires at the smallest number", changes: []change{expires(-1 << 63)}, want: authz.RecordUnreadable},
		{name: "expires at 1e18", changes: []change{expires(1e18)}, want: authz.RecordUnreadable},
		{name: "expires at the largest number", changes: []change{expires(1<<63 - 1)}, want: authz.RecordUnreadable},
		{name: "expires in seconds by mistake", changes: []change{expires(now.Unix() + 3600)}, want: authz.KeyExpired},
		{name: "expires at the end of 9999", changes: []change{expires(253402300799999)}, want: authz.Allowed},
		{name: "expires in the year 10000", changes: []change{expires(253402300800000)}, want: authz.RecordUnreadable},

		// Nothing counts without a proof, refusals included.
		{name: "no proof", changes: []change{noProof}, want: authz.Stale},
		{name: "proof ended", changes: []change{proofEnded}, want: authz.Stale},
		{name: "proof ended on a revoked key", changes: []change{proofEnded, key(authz.StatusRevoked)}, want: authz.Stale},
		{name: "proof ended on no record", changes: []change{proofEnded, noKey}, want: authz.Stale},
		{name: "no proof of no record", changes: []change{noProof, noKey}, want: authz.Stale},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &source{records: good()}
			for _, change := range tt.changes {
				change(&s.records)
			}
			products := tt.products
			if products == nil {
				products = []authz.ProductName{"Weather"}
			}
			wantProduct := tt.product
			if wantProduct == "" {
				wantProduct = products[0]
			}
			a := &authz.Authorizer{Source: s, Now: func() time.Time { return now }}
			req := authz.Request{Organization: "acme", KeyID: keyID(t, "a-good-consumer-key"), Products: products}
			d := a.Decide(t.Context(), req)
			if d.Reason != tt.want {
				t.Errorf("reason: got %v (%s), want %v", d.Reason, d.Problem, tt.want)
			}
			if d.Allowed() != (tt.want == authz.Allowed) {
				t.Errorf("allowed: got %v with reason %v", d.Allowed(), d.Reason)
			}
			if d.Product != wantProduct {
				t.Errorf("product: got %q, want %q", d.Product, wantProduct)
			}
			if d.Organization != req.Organization || d.KeyID != req.KeyID {
				t.Errorf("got organization %q and key %v, want the request's", d.Organization, d.KeyID)
			}
			if d.Revision != 42 {
				t.Errorf("revision: got %d, want the records' 42", d.Revision)
			}
			if s.records.Credential.Exists && (d.App != "app-1" || d.Developer != "dev-1" || d.Scopes != "READ WRITE") {
				t.Errorf("identity: got app %q developer %q scopes %q, want the credential's", d.App, d.Developer, d.Scopes)
			}
			agree(t, a, req, d)
		})
	}
}

func TestDecidePassesTheProblemOn(t *testing.T) {
	bad := func(problem string) authz.Flag { return authz.Flag{Problem: problem} }
	tests := []struct {
		name   string
		change change
		want   string
	}{
		{"key", func(r *authz.Records) { r.Credential.Status = bad("k") }, "k"},
		{"credential", badKey, "credential: empty, want JSON"},
		{"expiry", expires(-2), "expiresAt is neither -1 nor a time in milliseconds"},
		{"app", func(r *authz.Records) { r.App.Status = bad("a") }, "a"},
		{"app's details", badApp, "app: empty, want JSON"},
		{"no app", noApp, "the credential's app does not exist"},
		{"developers disagree", otherDeveloper, "the credential and its app name different developers"},
		{"developer", func(r *authz.Records) { r.Developer.Status = bad("d") }, "d"},
		{"developer's details", badDeveloper, "developer: empty, want JSON"},
		{"no developer", noDeveloper, "the app's developer does not exist"},
		{"product", func(r *authz.Records) { r.Credential.Products["Weather"] = bad("p") }, "p"},
		{"no problem in a known refusal", app(authz.StatusRevoked), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := good()
			tt.change(&r)
			a := &authz.Authorizer{Source: &source{records: r}, Now: func() time.Time { return now }}
			d := a.Decide(t.Context(), request(t))
			if d.Problem != tt.want {
				t.Errorf("problem: got %q with %v, want %q", d.Problem, d.Reason, tt.want)
			}
		})
	}
}

// agree checks that Explain tells the same story as Decide.
func agree(t *testing.T, a *authz.Authorizer, req authz.Request, d authz.Decision) {
	t.Helper()
	explained, rungs := a.Explain(t.Context(), req)
	if explained != d {
		t.Errorf("explain: got %+v, decide said %+v", explained, d)
	}
	if rungs == nil {
		return
	}
	var levels []string
	first := authz.Allowed
	for _, r := range rungs {
		levels = append(levels, r.Level)
		if first == authz.Allowed {
			first = r.Reason
		}
	}
	want := []string{"key", "key status", "expiry", "app status", "developer status", "product on key"}
	if !slices.Equal(levels, want) {
		t.Errorf("levels: got %q, want %q", levels, want)
	}
	if d.Reason != authz.Stale && first != d.Reason {
		t.Errorf("first refusal of the rungs: got %v, decide said %v", first, d.Reason)
	}
}

func TestDecideEveryCombination(t *testing.T) {
	// 4 key statuses x 4 app x 3 developer x 5 product: only one of them opens.
	flags := []authz.Status{authz.StatusApproved, authz.StatusRevoked, authz.StatusPending, authz.StatusNone}
	developers := []authz.Status{authz.StatusActive, authz.StatusInactive, authz.StatusNone}
	keyWant := []authz.Reason{authz.Allowed, authz.KeyRevoked, authz.KeyPending, authz.RecordUnreadable}
	appWant := []authz.Reason{authz.Allowed, authz.AppRevoked, authz.AppPending, authz.RecordUnreadable}
	developerWant := []authz.Reason{authz.Allowed, authz.DeveloperInactive, authz.RecordUnreadable}
	productWant := []authz.Reason{authz.Allowed, authz.ProductRevoked, authz.ProductPending, authz.RecordUnreadable, authz.ProductNotOnKey}
	opened := 0
	for ki, k := range flags {
		for ai, ap := range flags {
			for di, de := range developers {
				for pi := range productWant {
					s := &source{records: good()}
					key(k)(&s.records)
					app(ap)(&s.records)
					developer(de)(&s.records)
					if pi < len(flags) {
						weather(flags[pi])(&s.records)
					} else {
						noWeather(&s.records)
					}
					want := authz.Allowed
					for _, r := range []authz.Reason{keyWant[ki], appWant[ai], developerWant[di], productWant[pi]} {
						if want == authz.Allowed {
							want = r
						}
					}
					a := &authz.Authorizer{Source: s, Now: func() time.Time { return now }}
					got := a.Decide(t.Context(), request(t))
					if got.Reason != want {
						t.Errorf("key %q, app %q, developer %q, product case %d: got %v, want %v", k, ap, de, pi, got.Reason, want)
					}
					if got.Allowed() {
						opened++
					}
				}
			}
		}
	}
	if opened != 1 {
		t.Errorf("got %d combinations that open, want 1", opened)
	}
}

func request(t testing.TB) authz.Request {
	t.Helper()
	return authz.Request{Organization: "acme", KeyID: keyID(t, "a-good-consumer-key"), Products: []authz.ProductName{"Weather"}}
}

func TestDecideIncompleteRequest(t *testing.T) {
	id := keyID(t, "a-good-consumer-key")
	products := []authz.ProductName{"Weather"}
	tests := []struct {
		name string
		req  authz.Request
		want authz.Reason
	}{
		{"nothing", authz.Request{}, authz.KeyMissing},
		{"no key", authz.Request{Organization: "acme", Products: products}, authz.KeyMissing},
		{"no organization", authz.Request{KeyID: id, Products: products}, authz.ProductUnresolved},
		{"no products", authz.Request{Organization: "acme", KeyID: id}, authz.ProductUnresolved},
		{"empty products", authz.Request{Organization: "acme", KeyID: id, Products: []authz.ProductName{}}, authz.ProductUnresolved},
		{"a product without name", authz.Request{Organization: "acme", KeyID: id, Products: []authz.ProductName{"Weather", ""}}, authz.ProductUnresolved},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &source{records: good()}
			a := &authz.Authorizer{Source: s}
			d := a.Decide(t.Context(), tt.req)
			if d.Reason != tt.want || d.Allowed() {
				t.Errorf("got %v, want %v", d.Reason, tt.want)
			}
			if s.asked != 0 {
				t.Errorf("the source was asked %d times, want 0: the refusal needs no record", s.asked)
			}
			if _, rungs := a.Explain(t.Context(), tt.req); rungs != nil {
				t.Errorf("rungs: got %v, want none", rungs)
			}
		})
	}
}

func TestDecideSourceErrors(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want authz.Reason
	}{
		{"unavailable", authz.ErrUnavailable, authz.Stale},
		{"unavailable, wrapped twice", fmt.Errorf("key: %w", fmt.Errorf("read: %w", authz.ErrUnavailable)), authz.Stale},
		{"unavailable, joined", errors.Join(context.DeadlineExceeded, authz.ErrUnavailable), authz.Stale},
		{"overloaded", authz.ErrOverloaded, authz.Overloaded},
		{"overloaded, wrapped", fmt.Errorf("key: %w", authz.ErrOverloaded), authz.Overloaded},
		{"cancelled", context.Canceled, authz.Internal},
		{"anything", os.ErrClosed, authz.Internal},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			// The records beside an error are not looked at, however good.
			a := &authz.Authorizer{Source: &source{records: good(), err: tt.err}}
			d := a.Decide(t.Context(), request(t))
			if d.Reason != tt.want || d.Allowed() {
				t.Errorf("got %v, want %v", d.Reason, tt.want)
			}
			if d.Problem != tt.err.Error() {
				t.Errorf("problem: got %q, want %q", d.Problem, tt.err)
			}
			if d.Product != "Weather" || d.Revision != 0 {
				t.Errorf("got product %q at revision %d, want Weather at 0", d.Product, d.Revision)
			}
			explained, rungs := a.Explain(t.Context(), request(t))
			if explained != d || rungs != nil {
				t.Errorf("explain: got %+v with %d rungs, decide said %+v", explained, len(rungs), d)
			}
		})
	}
}

func TestDecideProofIsAskedLast(t *testing.T) {
	// The proof holds until the records have been handed out and no longer: an
	// answer made of them must not count.
	p := &endingProof{}
	a := &authz.Authorizer{Source: sourceFunc(func() authz.Records {
		r := good()
		r.Proof = p
		return r
	}), Now: func() time.Time { p.ended = true; return now }}
	if d := a.Decide(t.Context(), request(t)); d.Reason != authz.Stale {
		t.Errorf("a proof that ended while deciding: got %v, want %v", d.Reason, authz.Stale)
	}
}

type endingProof struct{ ended bool }

func (p *endingProof) Valid() bool { return !p.ended }

type sourceFunc func() authz.Records

func (f sourceFunc) Records(context.Context, authz.Organization, authz.KeyID) (authz.Records, error) {
	return f(), nil
}

func TestDecideWithoutNowFollowsTheWallClock(t *testing.T) {
	for _, tt := range []struct {
		in   time.Duration
		want authz.Reason
	}{{-time.Second, authz.KeyExpired}, {time.Hour, authz.Allowed}} {
		r := good()
		r.Credential.ExpiresAt = time.Now().Add(tt.in).UnixMilli()
		a := &authz.Authorizer{Source: &source{records: r}}
		if d := a.Decide(t.Context(), request(t)); d.Reason != tt.want {
			t.Errorf("expiry %v from now: got %v, want %v", tt.in, d.Reason, tt.want)
		}
	}
}

func TestExplainNamesEveryRefusal(t *testing.T) {
	r := good()
	for _, change := range []change{key(authz.StatusRevoked), expires(1), app(authz.StatusPending), developer(authz.StatusInactive), weather(authz.StatusRevoked)} {
		change(&r)
	}
	a := &authz.Authorizer{Source: &source{records: r}, Now: func() time.Time { return now }}
	d, rungs := a.Explain(t.Context(), request(t))
	if d.Reason != authz.KeyRevoked {
		t.Errorf("got %v, want %v", d.Reason, authz.KeyRevoked)
	}
	want := []authz.Rung{
		{Level: "key", Reason: authz.Allowed},
		{Level: "key status", Status: authz.StatusRevoked, Reason: authz.KeyRevoked},
		{Level: "expiry", Reason: authz.KeyExpired},
		{Level: "app status", Status: authz.StatusPending, Reason: authz.AppPending},
		{Level: "developer status", Status: authz.StatusInactive, Reason: authz.DeveloperInactive},
		{Level: "product on key", Status: authz.StatusRevoked, Reason: authz.ProductRevoked},
	}
	if !slices.Equal(rungs, want) {
		t.Errorf("got %+v\nwant %+v", rungs, want)
	}
}

func TestRefuse(t *testing.T) {
	req := request(t)
	for reason := range authz.NumReasons {
		d := authz.Refuse(req, reason)
		want := reason
		if reason == authz.Allowed {
			want = authz.Internal
		}
		if d.Reason != want || d.Allowed() {
			t.Errorf("refuse with %v: got %v, want %v", reason, d.Reason, want)
		}
		if d.Organization != req.Organization || d.KeyID != req.KeyID || d.Product != "Weather" {
			t.Errorf("refuse with %v: got %+v, want the request's own names", reason, d)
		}
	}
	if d := authz.Refuse(authz.Request{}, authz.KeyMissing); d.Product != "" {
		t.Errorf("product of an empty request: got %q, want none", d.Product)
	}
	if (authz.Decision{}).Allowed() {
		t.Error("the zero Decision opens")
	}
}

func TestReasons(t *testing.T) {
	// The public, closed set. A word here is a metric label, a log field and a
	// piece of somebody's dashboard: it can be added, never changed.
	want := map[string]authz.Reason{
		"allowed": authz.Allowed, "key_missing": authz.KeyMissing, "key_malformed": authz.KeyMalformed,
		"product_unresolved": authz.ProductUnresolved, "key_unknown": authz.KeyUnknown, "key_revoked": authz.KeyRevoked,
		"key_pending": authz.KeyPending, "key_expired": authz.KeyExpired, "app_revoked": authz.AppRevoked,
		"app_pending": authz.AppPending, "developer_inactive": authz.DeveloperInactive,
		"product_not_on_key": authz.ProductNotOnKey, "product_revoked": authz.ProductRevoked,
		"product_pending": authz.ProductPending, "record_unreadable": authz.RecordUnreadable,
		"stale": authz.Stale, "overloaded": authz.Overloaded, "internal": authz.Internal,
	}
	seen := map[string]bool{}
	for r := range authz.NumReasons {
		word := r.String()
		if seen[word] {
			t.Errorf("two reasons say %q", word)
		}
		seen[word] = true
		if known, ok := want[word]; !ok || known != r {
			t.Errorf("reason %d says %q, which is not its word", uint8(r), word)
		}
		text, err := r.MarshalText()
		if err != nil || string(text) != word {
			t.Errorf("MarshalText: got %q, %v, want %q", text, err, word)
		}
	}
	if len(seen) != len(want) {
		t.Errorf("got %d reasons, want %d", len(seen), len(want))
	}
	for _, r := range []authz.Reason{authz.NumReasons, 255} {
		if r.String() != "internal" {
			t.Errorf("reason %d: got %q, want internal", uint8(r), r)
		}
	}
}

func TestStatusWords(t *testing.T) {
	want := []string{"", "approved", "revoked", "pending", "active", "inactive", "", ""}
	for s, word := range want {
		if got := authz.Status(s).String(); got != word {
			t.Errorf("status %d: got %q, want %q", s, got, word)
		}
		if got, err := authz.Status(s).MarshalText(); err != nil || string(got) != word {
			t.Errorf("status %d: MarshalText gives %q, %v, want %q", s, got, err, word)
		}
	}
}

// FuzzDecide holds one law: nothing but an exact approved (developer: active)
// at every level, on a key that has not expired, under a proof that holds,
// ever opens.
func FuzzDecide(f *testing.F) {
	f.Add(uint8(1), uint8(1), uint8(4), uint8(1), uint8(1), uint8(0), int64(-1), uint8(0))
	f.Add(uint8(2), uint8(1), uint8(4), uint8(1), uint8(1), uint8(0), int64(-1), uint8(0))
	f.Add(uint8(1), uint8(1), uint8(4), uint8(2), uint8(1), uint8(1), int64(1<<40), uint8(0))
	f.Add(uint8(1), uint8(4), uint8(1), uint8(1), uint8(1), uint8(2), int64(0), uint8(255))
	f.Fuzz(func(t *testing.T, k, ap, de, p1, p2, asked uint8, expiry int64, missing uint8) {
		s := &source{records: good()}
		r := &s.records
		r.Credential.Status = authz.Flag{Status: authz.Status(k)}
		r.App.Status = authz.Flag{Status: authz.Status(ap)}
		r.Developer.Status = authz.Flag{Status: authz.Status(de)}
		r.Credential.Products = map[authz.ProductName]authz.Flag{"Weather": {Status: authz.Status(p1)}, "Maps": {Status: authz.Status(p2)}}
		r.Credential.ExpiresAt = expiry
		products := [][]authz.ProductName{{"Weather"}, {"Weather", "Maps"}, {"Nothing"}}[asked%3]
		changes := []change{noKey, noApp, noDeveloper, noWeather, proofEnded, badKey, badApp, otherDeveloper}
		for i, change := range changes {
			if missing&(1<<i) != 0 && (i == 0 || missing&1 == 0) && (i != 6 && i != 7 || missing&2 == 0) {
				change(r)
			}
		}
		// Of all that can be taken away only the flag of Weather may be missing,
		// and then only Maps opens.
		opens := missing == 0 || missing == 1<<3
		opens = opens && k == 1 && ap == 1 && de == 4
		opens = opens && (expiry == -1 || expiry > now.UnixMilli() && expiry <= 253402300799999)
		weather, maps := p1 == 1 && missing == 0, p2 == 1
		opens = opens && (weather && asked%3 < 2 || maps && asked%3 == 1)

		a := &authz.Authorizer{Source: s, Now: func() time.Time { return now }}
		req := request(t)
		req.Products = products
		d := a.Decide(t.Context(), req)
		if d.Allowed() != opens {
			t.Errorf("key %d app %d developer %d products %d,%d asked %q expiry %d missing %08b: got %v, want opens=%v",
				k, ap, de, p1, p2, products, expiry, missing, d.Reason, opens)
		}
		if !slices.Contains(products, d.Product) {
			t.Errorf("product: got %q, want one of %q", d.Product, products)
		}
		agree(t, a, req, d)
	})
}

func TestDecideAllocatesNothing(t *testing.T) {
	for _, tt := range []struct {
		name    string
		changes []change
	}{
		{"allowed", nil},
		{"revoked", []change{app(authz.StatusRevoked)}},
		{"unknown", []change{noKey}},
		{"expired", []change{expires(1)}},
		{"stale", []change{proofEnded}},
	} {
		s := &source{records: good()}
		for _, change := range tt.changes {
			change(&s.records)
		}
		a := &authz.Authorizer{Source: s}
		req, ctx := request(t), t.Context()
		presented := strings.Repeat("k", 32)
		if n := testing.AllocsPerRun(1000, func() {
			k, _ := authz.ParseConsumerKey(presented)
			req.KeyID = k.ID()
			a.Decide(ctx, req)
		}); n != 0 {
			t.Errorf("%s: got %v allocations, want 0", tt.name, n)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	a := &authz.Authorizer{Source: &source{records: good()}}
	req, ctx := request(b), b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if d := a.Decide(ctx, req); !d.Allowed() {
			b.Fatalf("got %v, want allowed", d.Reason)
		}
	}
}
