package embedded

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

// world is what one side of a comparison holds.
type world map[string]string

func (w world) entries() entries {
	return func(yield func(keyspace.Entry, error) bool) {
		var keys []string
		for key := range w {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		for _, key := range keys {
			if !yield(keyspace.Entry{Key: key, Value: []byte(w[key])}, nil) {
				return
			}
		}
	}
}

func TestCompare(t *testing.T) {
	space, err := keyspace.New("/keygate")
	if err != nil {
		t.Fatal(err)
	}
	key := "/keygate/acme/keys/" + authz.KeyID{1}.String() + "/"
	const app, dev = "/keygate/acme/apps/a/", "/keygate/acme/developers/d/"
	const forEver = `{"v":1,"appId":"a","developerId":"d","expiresAt":-1}`
	const once = `{"v":1,"appId":"a","developerId":"d","expiresAt":1000}`
	opens := func(key, snapshot, now string) Difference {
		return Difference{Compared: 1, Records: 1, Opens: []Opening{{Key: key, Snapshot: snapshot, Now: now}}}
	}
	gone := func(d Difference) Difference { d.OnlySnapshot = 1; return d }
	for _, test := range []struct {
		name          string
		snapshot, now world
		want          Difference
	}{
		{"nothing", nil, nil, Difference{}},
		{"equal", world{key + "status": "approved"}, world{key + "status": "approved"}, Difference{Compared: 1, Records: 1}},
		{"key revoked", world{key + "status": "approved"}, world{key + "status": "revoked"}, opens(key+"status", "approved", "revoked")},
		{"key pending", world{key + "status": "approved"}, world{key + "status": "pending"}, opens(key+"status", "approved", "pending")},
		{"product revoked", world{key + "products/p": "approved"}, world{key + "products/p": "revoked"}, opens(key+"products/p", "approved", "revoked")},
		{"app revoked", world{app + "status": "approved"}, world{app + "status": "revoked"}, opens(app+"status", "approved", "revoked")},
		{"developer inactive", world{dev + "status": "active"}, world{dev + "status": "inactive"}, opens(dev+"status", "active", "inactive")},
		{"misspelt now", world{key + "status": "approved"}, world{key + "status": "approved\n"}, opens(key+"status", "approved", "unreadable")},
		{"empty now", world{key + "status": "approved"}, world{key + "status": ""}, opens(key+"status", "approved", "unreadable")},
		{"another kind's word", world{dev + "status": "active"}, world{dev + "status": "approved"}, opens(dev+"status", "active", "unreadable")},
		{"deleted", world{key + "status": "approved"}, world{}, gone(opens(key+"status", "approved", "absent"))},
		{"approved since", world{key + "status": "revoked"}, world{key + "status": "approved"}, Difference{Compared: 1, Records: 1, Closes: 1}},
		{"made since", world{}, world{key + "status": "approved"}, Difference{Compared: 1, OnlyNow: 1, Closes: 1}},
		{"made closed since", world{}, world{key + "status": "revoked"}, Difference{Compared: 1, OnlyNow: 1, Changes: 1}},
		{"closed otherwise", world{key + "status": "revoked"}, world{key + "status": "pending"}, Difference{Compared: 1, Records: 1, Changes: 1}},
		{"opened and closed", world{key + "products/p": "approved", key + "status": "revoked"}, world{key + "products/p": "revoked", key + "status": "approved"},
			Difference{Compared: 2, Records: 1, Closes: 1, Opens: []Opening{{Key: key + "products/p", Snapshot: "approved", Now: "revoked"}}}},
		{"expiry shortened", world{key + "credential": forEver}, world{key + "credential": once},
			opens(key+"credential", "expires never, of app a, developer d", "expires 1970-01-01T00:00:01Z, of app a, developer d")},
		{"expiry prolonged", world{key + "credential": once}, world{key + "credential": forEver}, Difference{Compared: 1, Records: 1, Closes: 1}},
		{"credential deleted", world{key + "credential": forEver, key + "status": "revoked"}, world{key + "status": "revoked"},
			Difference{Compared: 2, Records: 1, Opens: []Opening{{Key: key + "credential", Snapshot: "expires never, of app a, developer d", Now: "absent"}}}},
		{"credential unreadable", world{key + "credential": forEver}, world{key + "credential": `{"v":2}`},
			opens(key+"credential", "expires never, of app a, developer d", "unreadable")},
		{"app of another developer", world{app + "app": `{"v":1,"developerId":"d"}`}, world{app + "app": `{"v":1,"developerId":"e"}`},
			opens(app+"app", "of developer d", "of developer e")},
		{"developer deleted", world{dev + "developer": `{"v":1}`}, world{}, gone(opens(dev+"developer", "readable", "absent"))},
		{"a name changed", world{dev + "developer": `{"v":1}`}, world{dev + "developer": `{"v":1,"email":"e"}`}, Difference{Compared: 1, Records: 1, Changes: 1}},
		{"a product is no approval", world{"/keygate/acme/products/p/product": `{"v":1}`}, world{}, Difference{Compared: 1, Records: 1, OnlySnapshot: 1, Changes: 1}},
		{"a key that the schema does not know", world{key + "note": "x"}, world{}, Difference{Records: 1, OnlySnapshot: 1}},
		{"what names nothing", world{"/keygate/acme/keys/x/status": "approved", "/keygate/acme/.barrier": "1", "/other/status": "approved", "/keygate.replicas/r": "r"}, world{}, Difference{}},
		{"records side by side", world{app + "status": "approved", dev + "status": "inactive"}, world{"/keygate/acme/apps/b/status": "approved", dev + "status": "inactive"},
			Difference{Compared: 3, Records: 2, OnlySnapshot: 1, OnlyNow: 1, Closes: 1, Opens: []Opening{{Key: app + "status", Snapshot: "approved", Now: "absent"}}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := compare(space, test.snapshot.entries(), test.now.entries())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmpopts.IgnoreUnexported(Opening{}), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("compare (-want +got):\n%s", diff)
			}
			// What keeps a revocation is what is there now: taken over, nothing is left
			// to open.
			kept := world{}
			for key, value := range test.snapshot {
				kept[key] = value
			}
			for _, o := range got.Opens {
				if o.now == nil {
					delete(kept, o.Key)
				} else {
					kept[o.Key] = string(o.now)
				}
			}
			if got, err := compare(space, kept.entries(), test.now.entries()); err != nil || len(got.Opens) > 0 {
				t.Errorf("compare after the openings were taken back: got %v, %v, want no opening", got.Opens, err)
			}
		})
	}
	broken := func(yield func(keyspace.Entry, error) bool) { yield(keyspace.Entry{}, errors.New("cut")) }
	for _, sides := range [][2]entries{{broken, world{}.entries()}, {world{key + "status": "approved"}.entries(), broken}} {
		if _, err := compare(space, sides[0], sides[1]); err == nil || err.Error() != "cut" {
			t.Errorf("compare with a side that is cut: got %v, want its error", err)
		}
	}
}

func TestJudge(t *testing.T) {
	space, err := keyspace.New("/keygate")
	if err != nil {
		t.Fatal(err)
	}
	fine := RestoreReport{Compared: true, Snapshot: SnapshotInfo{Keys: 3}, Difference: Difference{Records: 1}}
	opens, foreign, corrupt := fine, fine, fine
	opens.Difference.Opens = make([]Opening, 2)
	foreign.Difference.Records = 0
	corrupt.Armed = []string{"CORRUPT"}
	alone := RestoreReport{NotCompared: "it is gone", Snapshot: SnapshotInfo{Keys: 3}}
	for _, test := range []struct {
		name             string
		report           RestoreReport
		plain, yes, keep string // parts of the errors
	}{
		{"equal", fine, "", "", ""},
		{"opens", opens, "would open 2 values", "", ""},
		{"nothing to compare", alone, "it is gone. What was revoked", "", "no revocations can be kept"},
		{"nothing in the snapshot", foreign, "no record under /keygate/", "", "no record under /keygate/"},
		{"damaged", corrupt, "under the alarm CORRUPT", "", "under the alarm CORRUPT"},
	} {
		for _, leave := range []struct {
			cfg  RestoreConfig
			want string
		}{{RestoreConfig{}, test.plain}, {RestoreConfig{Yes: true}, test.yes}, {RestoreConfig{KeepRevocations: true}, test.keep}} {
			leave.cfg.Space = space
			err := judge(leave.cfg, &test.report)
			if (err == nil) != (leave.want == "") || err != nil && (!errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), leave.want)) {
				t.Errorf("%s, yes %v, keep %v: got %v, want an error with %q", test.name, leave.cfg.Yes, leave.cfg.KeepRevocations, err, leave.want)
			}
		}
	}
}
