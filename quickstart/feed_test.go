package quickstart

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"keygate/authz"
	apps "keygate/examples/quickstart"
	"keygate/statestore"
	"keygate/statestore/keyspace"
)

func testFeed(t *testing.T, w interface{ Write([]byte) (int, error) }, colour bool) *Feed {
	t.Helper()
	space, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return newFeed(w, space, "default", map[authz.AppID]string{apps.WeatherApp: "AnotherTestApp"}, colour)
}

// ended is a context that has: Run then writes what waits.
func ended(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

func TestFeedLines(t *testing.T) {
	id := apps.KeyID(apps.WeatherKey)
	key := keyspace.KeyRecord("default", id)
	space, _ := keyspace.New(keyspace.DefaultPrefix)
	change := func(path, value string) statestore.Change {
		p, err := space.Parse(path)
		if err != nil {
			t.Fatal(err)
		}
		return statestore.Change{Revision: 12, Path: p, Key: path, Value: value}
	}
	deleted := change(space.Status(key), "")
	deleted.Deleted = true
	for _, tt := range []struct {
		name     string
		decision authz.Decision
		took     time.Duration
		change   statestore.Change
		want     string // behind the time
	}{
		{name: "denied", took: 31 * time.Microsecond,
			decision: authz.Decision{Reason: authz.ProductRevoked, KeyID: id, Product: apps.WeatherProduct, App: apps.WeatherApp},
			want:     "denied   product_revoked     Weather-Product  app AnotherTestApp  key e5dd58dd    31 µs"},
		{name: "allowed", took: 1260 * time.Microsecond,
			decision: authz.Decision{Reason: authz.Allowed, KeyID: id, Product: "P", App: "another-app"},
			want:     "allowed                      P                app another-…       key e5dd58dd   1.3 ms"},
		{name: "no key", decision: authz.Decision{Reason: authz.KeyMissing, Product: apps.WeatherProduct},
			want: "denied   key_missing         Weather-Product                                       0 µs"},
		{name: "problem with an escape", decision: authz.Decision{Reason: authz.RecordUnreadable, Problem: "bad \x1b[2J"},
			want: `denied   record_unreadable   -                                                     0 µs  "bad \x1b[2J"`},
		{name: "product on key", change: change(space.KeyProduct(key, apps.WeatherProduct), "approved"),
			want: "status   approved            keys/e5dd58dd…/products/Weather-Product  revision 12"},
		{name: "deleted", change: deleted, want: "status   (deleted)           keys/e5dd58dd…/status  revision 12"},
		{name: "empty", change: change(space.Status(key), ""), want: `status   ""                  keys/e5dd58dd…/status  revision 12`},
		{name: "newline", change: change(space.Status(key), "approved\n"), want: `status   "approved\n"        keys/e5dd58dd…/status  revision 12`},
		{name: "app", change: change(space.Status(keyspace.AppRecord("default", "a b")), "revoked"),
			want: "status   revoked             apps/a%20b/status  revision 12"},
		{name: "other organization", change: change(space.Status(keyspace.AppRecord("acme", "a")), "revoked"),
			want: "status   revoked             /keygate/acme/apps/a/status  revision 12"},
		{name: "details", change: change(space.Details(key), "")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, colour := range []bool{false, true} {
				var out strings.Builder
				f := testFeed(t, &out, colour)
				if o := f.Observer(); tt.change.Key != "" {
					o.OnChange(tt.change)
				} else {
					o.OnDecision(tt.decision, tt.took)
				}
				if err := f.Run(ended(t)); err != nil {
					t.Fatal(err)
				}
				got := out.String()
				if colour != strings.Contains(got, "\x1b[") && tt.want != "" {
					t.Errorf("colour %t: got %q", colour, got)
				}
				got = regexp.MustCompile("\x1b\\[\\d+m").ReplaceAllString(got, "")
				want := tt.want
				if want != "" {
					want = got[:min(len(got), len(feedTime))] + "  " + want + "\n"
				}
				if got != want {
					t.Errorf("got\n%s, want\n%s", got, want)
				}
			}
		})
	}
}

// Nobody who tells the feed waits for it, and what is left out is counted.
func TestFeedNeverBlocks(t *testing.T) {
	var out strings.Builder
	f := testFeed(t, &out, false)
	o := f.Observer()
	const told = feedQueue + decisionBurst + 5000
	for range told {
		o.OnDecision(authz.Decision{Reason: authz.KeyMissing}, 0)
	}
	space, _ := keyspace.New(keyspace.DefaultPrefix)
	path := space.Status(keyspace.AppRecord("default", "a"))
	parsed, err := space.Parse(path)
	if err != nil {
		t.Fatal(err)
	}
	o.OnChange(statestore.Change{Key: path, Path: parsed, Value: "revoked"})
	if err := f.Run(ended(t)); err != nil {
		t.Fatal(err)
	}
	lines := strings.Count(out.String(), "\n")
	if lines < decisionBurst || lines > feedQueue+1 {
		t.Errorf("got %d lines, want %d to %d", lines, decisionBurst, feedQueue)
	}
	if !strings.Contains(out.String(), "  status   revoked ") {
		t.Error("the change was lost among the decisions")
	}
	if !regexp.MustCompile(`(?m)  \(\d+ more lines left out\)$`).MatchString(out.String()) {
		t.Errorf("not told how many lines were left out: %s", out.String()[out.Len()-100:])
	}
}

type brokenWriter struct{}

var errBroken = errors.New("broken")

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func TestFeedEndsWithItsWriter(t *testing.T) {
	f := testFeed(t, brokenWriter{}, false)
	f.Observer().OnDecision(authz.Decision{}, 0)
	if err := f.Run(t.Context()); !errors.Is(err, errBroken) {
		t.Errorf("got %v, want the writer's error", err)
	}
}
