package envoy

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"keygate/authz"
)

// Consumer keys of the world, one for every way a check of Weather-Product can
// end, and products that approvedKey has.
const (
	approvedKey   = "approved-key-0000000001"
	bareKey       = "approved-without-scopes"
	strangeKey    = "approved-strange-names1"
	revokedKey    = "revoked-key-00000000001"
	pendingKey    = "pending-key-00000000001"
	expiredKey    = "expired-key-00000000001"
	appRevoked    = "app-revoked-key-0000001"
	appPending    = "app-pending-key-0000001"
	inactiveKey   = "developer-inactive-key1"
	unreadableKey = "unreadable-key-00000001"
	staleKey      = "stale-key-0000000000001"
	overloadedKey = "overloaded-key-00000001"
	brokenKey     = "broken-source-key-00001"
	panicKey      = "panicking-source-key-01"

	weather = "Weather-Product" // approved on approvedKey
	orders  = "Orders-Product"  // revoked on approvedKey
	maps    = "Maps-Product"    // pending on approvedKey
	other   = "Other-Product"   // not on any key

	worldOrg = "default"
)

var worldKeys = []string{approvedKey, bareKey, strangeKey, revokedKey, pendingKey, expiredKey, appRevoked, appPending,
	inactiveKey, unreadableKey, staleKey, overloadedKey, brokenKey, panicKey}

type valid struct{}

func (valid) Valid() bool { return true }

// world is a Source that always answers the same.
type world map[authz.KeyID]answer

type answer struct {
	records authz.Records
	err     error
	panics  any
}

func newWorld() world {
	approved := authz.Flag{Status: authz.StatusApproved}
	build := func(edit func(*authz.Records)) answer {
		r := authz.Records{
			Credential: authz.Credential{Exists: true,
				Status: approved,
				Products: map[authz.ProductName]authz.Flag{
					weather: approved, orders: {Status: authz.StatusRevoked}, maps: {Status: authz.StatusPending},
				},
				App: "app-1", Developer: "developer-1", ExpiresAt: authz.NeverExpires, Scopes: "read write",
			},
			App:       authz.App{Exists: true, Status: approved, Developer: "developer-1"},
			Developer: authz.Developer{Exists: true, Status: authz.Flag{Status: authz.StatusActive}},
			Revision:  7, Proof: valid{},
		}
		edit(&r)
		return answer{records: r}
	}
	w := world{}
	for key, edit := range map[string]func(*authz.Records){
		approvedKey: func(*authz.Records) {},
		bareKey:     func(r *authz.Records) { r.Credential.Scopes = "" },
		strangeKey: func(r *authz.Records) {
			r.Credential.App, r.Credential.Developer, r.App.Developer = "50% off\r\nx: y", "Jürgen", "Jürgen"
		},
		revokedKey:    func(r *authz.Records) { r.Credential.Status.Status = authz.StatusRevoked },
		pendingKey:    func(r *authz.Records) { r.Credential.Status.Status = authz.StatusPending },
		expiredKey:    func(r *authz.Records) { r.Credential.ExpiresAt = 1 },
		appRevoked:    func(r *authz.Records) { r.App.Status.Status = authz.StatusRevoked },
		appPending:    func(r *authz.Records) { r.App.Status.Status = authz.StatusPending },
		inactiveKey:   func(r *authz.Records) { r.Developer.Status.Status = authz.StatusInactive },
		unreadableKey: func(r *authz.Records) { r.App = authz.App{} },
	} {
		w[idOf(key)] = build(edit)
	}
	w[idOf(staleKey)] = answer{err: fmt.Errorf("get: %w", authz.ErrUnavailable)}
	w[idOf(overloadedKey)] = answer{err: fmt.Errorf("get: %w", authz.ErrOverloaded)}
	w[idOf(brokenKey)] = answer{err: errors.New("something else")}
	w[idOf(panicKey)] = answer{panics: "panic with " + panicKey}
	return w
}

// Records implements authz.Source.
func (w world) Records(_ context.Context, org authz.Organization, id authz.KeyID) (authz.Records, error) {
	a, ok := w[id]
	if a.panics != nil {
		panic(a.panics)
	}
	if !ok || org != worldOrg {
		return authz.Records{Proof: valid{}, Revision: 7}, nil
	}
	return a.records, a.err
}

func idOf(key string) authz.KeyID {
	k, reason := authz.ParseConsumerKey(key)
	if reason != authz.Allowed {
		panic("not a key: " + key)
	}
	return k.ID()
}

// MustService returns a service over the world.
func MustService(tb testing.TB, edit func(*Config)) *Service {
	tb.Helper()
	config := Config{Authorizer: &authz.Authorizer{Source: newWorld()}, Organization: worldOrg}
	if edit != nil {
		edit(&config)
	}
	s, err := New(config)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// recorder keeps the last decision.
type recorder struct{ decisions []authz.Decision }

func (r *recorder) observe(d authz.Decision, took time.Duration) {
	if took < 0 {
		panic("negative time")
	}
	r.decisions = append(r.decisions, d)
}

// holdsKey tells which of the world's keys s holds in clear; "" for none.
func holdsKey(s string) string {
	for _, k := range worldKeys {
		if strings.Contains(s, k) {
			return k
		}
	}
	return ""
}
