package embedded

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math"
	"strings"
	"time"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

// RestoreConfig says what to restore, and what that may open.
type RestoreConfig struct {
	// Snapshot is a file that [SaveSnapshot] or etcd's own tools have written.
	Snapshot string
	// DataDir and QuotaBytes, as in [Config]. No process may serve it.
	DataDir    string
	QuotaBytes int64
	// Space is where keygate's keys are, in the snapshot and in the data.
	Space keyspace.Space
	// Yes restores also what is open in the snapshot and closed now, and where
	// there is nothing to compare with.
	Yes bool
	// KeepRevocations takes what is closed now over into the restored data. It
	// wins over Yes; it needs data that can be read.
	KeepRevocations bool
	// Path and Args of a binary that calls [Serve] on DataDir, as in
	// [ChildConfig]. It reads the data, for a database that is damaged can end the
	// process that opens it.
	Path string
	Args []string
	// Logger receives what etcd says. nil drops all.
	Logger *slog.Logger
}

// RestoreReport says what [Restore] found and did. It is filled as far as
// Restore came: an error does not void it.
type RestoreReport struct {
	Snapshot SnapshotInfo
	// Compared tells whether there was data to compare the snapshot with, at
	// revision Now; else NotCompared says why not.
	Compared    bool
	NotCompared string
	Now         int64
	Difference  Difference
	// Restored tells whether the snapshot is in place. The other fields say
	// nothing before that.
	Restored bool
	// Revision and ClusterID of the restored data.
	Revision  int64
	ClusterID uint64
	// Kept is how many of Difference.Opens were closed again, by KeepRevocations.
	Kept int
	// Expired is the number of registrations and other keys under leases that
	// were removed, Leases that of the leases.
	Expired, Leases int
	// Disarmed are the alarms that were raised in the snapshot and cleared, Armed
	// those that stand.
	Disarmed, Armed []string
	// MovedTo is where the data is that stood there before, "" if there was none.
	MovedTo string
}

// ErrRefused is wrapped by the errors of [Restore] after which the data is what it
// was, because of what is in the data directory: it is in use or unfit, or the
// restore would open what is closed, or nobody can tell.
var ErrRefused = errors.New("restore refused")

// refused gives err its place in the errors that wrap ErrRefused.
type refused struct{ error }

func (r refused) Unwrap() error        { return r.error }
func (r refused) Is(target error) bool { return target == ErrRefused }

// Difference is what a restore would change of what decides.
type Difference struct {
	// Compared is the number of flags, and of JSON values that a check depends
	// on, on either side.
	Compared int
	// Opens is what is open in the snapshot and closed now, in the order of etcd's
	// keys. A restore would undo the revocations among them.
	Opens []Opening
	// Closes is the number of those that are open now and closed in the snapshot,
	// Changes of those that differ and open nothing and close nothing.
	Closes, Changes int
	// OnlySnapshot and OnlyNow are the numbers of whole records that the other
	// side does not have.
	OnlySnapshot, OnlyNow int
	// Records of the snapshot.
	Records int
}

// Opening is one key in etcd that a restore would open.
type Opening struct {
	// Key in etcd.
	Key string
	// Snapshot and Now say in a word what it is on each side: its status,
	// "absent", "unreadable", or of a JSON value what it says of the expiry.
	Snapshot, Now string

	now []byte // its value, nil if it is absent
}

// entries are keys and values in the order of the keys.
type entries = iter.Seq2[keyspace.Entry, error]

// compare reads the snapshot and the present data side by side, both in the
// order of their keys. It holds no more of them than the openings.
//
// Beside the flags it looks at the JSON of keys, apps and developers as far as a
// check depends on it: an approval also comes back by an expiry that has been
// shortened since, by a credential that was deleted, or by an app that led to
// somebody else.
func compare(space keyspace.Space, snapshot, now entries) (d Difference, err error) {
	before, stopBefore := iter.Pull2(snapshot)
	defer stopBefore()
	after, stopAfter := iter.Pull2(now)
	defer stopAfter()
	a, aErr, aOK := before()
	b, bErr, bOK := after()

	var record keyspace.Record
	var inA, inB bool // the record has an entry there
	count := func() {
		if inA {
			d.Records++
		}
		if inA && !inB {
			d.OnlySnapshot++
		}
		if inB && !inA {
			d.OnlyNow++
		}
		inA, inB = false, false
	}
	defer count()
	for aOK || bOK {
		if err := errors.Join(aErr, bErr); err != nil {
			return d, err
		}
		onA := aOK && (!bOK || a.Key <= b.Key)
		onB := bOK && (!aOK || b.Key <= a.Key)
		key := a.Key
		if !onA {
			key = b.Key
		}
		if p, err := space.Parse(key); err == nil && p.Record.Kind != keyspace.KindNone {
			if p.Record != record {
				count()
				record = p.Record
			}
			inA, inB = inA || onA, inB || onB
			if p.Field != keyspace.FieldOther {
				d.Compared++
				if onA != onB || string(a.Value) != string(b.Value) {
					d.add(space, p, key, pick(onA, a), pick(onB, b))
				}
			}
		}
		if onA {
			a, aErr, aOK = before()
		}
		if onB {
			b, bErr, bOK = after()
		}
	}
	return d, nil
}

// pick returns the entry if it is on its side.
func pick(on bool, e keyspace.Entry) *keyspace.Entry {
	if !on {
		return nil
	}
	return &e
}

// add counts one value that differs; nil is absent.
func (d *Difference) add(space keyspace.Space, p keyspace.Path, key string, snapshot, now *keyspace.Entry) {
	was, is := read(space, p, snapshot), read(space, p, now)
	switch {
	case was.opens(is):
		o := Opening{Key: key, Snapshot: was.word, Now: is.word}
		if now != nil {
			o.now = append([]byte{}, now.Value...) // not nil, if it is empty
		}
		d.Opens = append(d.Opens, o)
	case is.opens(was):
		d.Closes++
	default:
		d.Changes++
	}
}

const (
	absentWord     = "absent"
	unreadableWord = "unreadable"
)

// reading is what one value says to a check.
type reading struct {
	word  string
	open  bool
	until int64  // of a credential: when it expires, in ms
	leads string // of a credential or an app: to whom
}

// opens tells whether r in the place of now lets pass what now does not.
func (r reading) opens(now reading) bool {
	return r.open && (!now.open || r.until > now.until || r.leads != now.leads)
}

func read(space keyspace.Space, p keyspace.Path, e *keyspace.Entry) reading {
	if e == nil {
		return reading{word: absentWord}
	}
	one := []keyspace.Entry{*e}
	flag := func(f authz.Flag, open authz.Status) reading {
		if f.Problem != "" {
			return reading{word: unreadableWord}
		}
		return reading{word: f.Status.String(), open: f.Status == open}
	}
	details := func(problem, word string) reading {
		if problem != "" {
			return reading{word: unreadableWord}
		}
		return reading{word: word, open: true}
	}
	switch kind := p.Record.Kind; {
	case p.Field == keyspace.FieldStatus && kind == keyspace.KindDeveloper:
		return flag(keyspace.ParseDeveloperStatus(e.Value), authz.StatusActive)
	case p.Field.Flag():
		return flag(keyspace.ParseStatus(e.Value), authz.StatusApproved)
	case p.Field != keyspace.FieldDetails:
	case kind == keyspace.KindKey:
		c := space.Credential(one)
		word, until := "expires never", int64(math.MaxInt64)
		if c.ExpiresAt >= 0 {
			until = c.ExpiresAt
			word = "expires " + time.UnixMilli(c.ExpiresAt).UTC().Format(time.RFC3339)
		}
		r := details(c.Problem, word)
		if r.open {
			r.until, r.leads = until, fmt.Sprintf("%q %q", string(c.App), string(c.Developer))
			r.word += ", of app " + string(c.App) + ", developer " + string(c.Developer)
		}
		return r
	case kind == keyspace.KindApp:
		a := space.App(one)
		r := details(a.Problem, "of developer "+string(a.Developer))
		r.leads = string(a.Developer)
		return r
	case kind == keyspace.KindDeveloper:
		return details(space.Developer(one).Problem, "readable")
	}
	return reading{word: "readable"} // no check depends on it
}

// judge says whether the restore may go on.
func judge(cfg RestoreConfig, r *RestoreReport) error {
	d := r.Difference
	switch {
	case !r.Compared && cfg.KeepRevocations:
		return refused{fmt.Errorf("restore refused: no revocations can be kept, for there is nothing to compare with: %s", r.NotCompared)}
	case !r.Compared && !cfg.Yes:
		return refused{fmt.Errorf("restore refused: nobody can tell what it would open, for there is nothing to compare with: %s. "+
			"What was revoked after the snapshot was taken would be open again: give --yes to accept that", r.NotCompared)}
	case r.Snapshot.Keys > 0 && d.Records == 0 && !cfg.Yes:
		return refused{fmt.Errorf("restore refused: the snapshot holds %d keys and no record under %s: "+
			"name the --prefix that it was taken under, or give --yes to restore it", r.Snapshot.Keys, cfg.Space.Watched())}
	case len(d.Opens) > 0 && !cfg.Yes && !cfg.KeepRevocations:
		return refused{fmt.Errorf("restore refused: it would open %s in the snapshot and closed now: "+
			"give --keep-revocations to keep that closed, or --yes to open it", count(len(d.Opens), "value that is open", "values that are open"))}
	case len(r.Armed) > 0 && !cfg.Yes:
		return refused{fmt.Errorf("restore refused: the snapshot was taken under the alarm %s, that its data is damaged: give --yes to trust it",
			strings.Join(r.Armed, ", "))}
	}
	return nil
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
