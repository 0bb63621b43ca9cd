package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/statestore/keyspace"
)

// ErrTampered is wrapped by the error of a Verify that has findings.
var ErrTampered = errors.New("the audit trail was tampered with")

const (
	// maxFindings of a Report.
	maxFindings = 100
	// maxSkew between the clocks of those who write records and links.
	maxSkew = 10 * time.Minute
	// linksPage of a read; a link has some hundred kilobytes at most.
	linksPage = 32
	// recordsPage of a read; a record may have more than a hundred kilobytes.
	recordsPage = 128
)

// VerifyOptions of Verify.
type VerifyOptions struct {
	// Head that was noted earlier, "revision:hash" as of Report.Head; it must be in
	// the chain. Empty: none.
	Head string
	// MaxSkew between the clocks of the servers: a record that says another time
	// than its links, by more than that, is a finding. Zero means 10 minutes,
	// less than zero that times are not compared.
	MaxSkew time.Duration
}

// Report of Verify.
type Report struct {
	// Revision of etcd that everything was read at.
	Revision int64
	// Head is the newest link, to be noted: "revision:hash". Empty: there is no
	// chain.
	Head string
	// Behind is how many revisions of etcd are newer than the chain.
	Behind int64
	// Links of the chain, Revisions that they have an entry of, and audit Records
	// that were compared.
	Links, Revisions, Records int
	// Unproven records lie in a gap or before the chain, Unchained ones behind its
	// head: nothing is known against them.
	Unproven, Unchained int
	// Begun is the first revision of the chain.
	Begun int64
	// Gaps are what the chain does not cover, and Notes what it says of itself.
	Gaps  []Gap
	Notes []string
	// Findings, at most 100, and how many there are.
	Findings []Finding
	Found    int
}

// Gap of the chain: revisions that were compacted before they were seen, or
// that another cluster had.
type Gap struct{ From, To int64 }

// Finding is one sign of tampering.
type Finding struct {
	Revision int64
	Path     string
	Problem  string
}

// String shows all of it.
func (f Finding) String() string {
	return fmt.Sprintf("%s (revision %d): %s", f.Path, f.Revision, f.Problem)
}

// Verify walks the chain and compares every audit record with it, at one
// revision. It holds about 150 bytes for each record. If there are findings the
// error wraps ErrTampered and names the first; any other error means that the
// trail could not be read.
func Verify(ctx context.Context, kv clientv3.KV, space keyspace.Space, opts VerifyOptions) (Report, error) {
	if opts.MaxSkew == 0 {
		opts.MaxSkew = maxSkew
	}
	v := &verifier{kv: kv, space: space, opts: opts, listed: map[[16]byte]proof{}}
	err := v.run(ctx)
	if err != nil {
		return v.report, fmt.Errorf("verify the audit trail: %w", err)
	}
	if v.report.Found > 0 {
		return v.report, fmt.Errorf("%w: %d findings, the first: %v", ErrTampered, v.report.Found, v.report.Findings[0])
	}
	return v.report, nil
}

// proof is what the chain says of a record, with the hashes cut to 128 bits.
type proof struct {
	revision int64
	hash     [16]byte
	met      bool // the record is there
}

// span is what a link covers, without its entries.
type span struct {
	from, to, at, mod int64
	known             bool // not a gap, not a genesis
}

type verifier struct {
	kv     clientv3.KV
	space  keyspace.Space
	opts   VerifyOptions
	report Report
	head   head
	spans  []span
	// listed are the records by the hash of their path, as an entry lists it.
	listed map[[16]byte]proof
	// bare are the revisions that changed something and have no record.
	bare map[int64]bool
}

func (v *verifier) finding(rev int64, path, format string, args ...any) {
	v.report.Found++
	if len(v.report.Findings) < maxFindings {
		v.report.Findings = append(v.report.Findings, Finding{rev, path, fmt.Sprintf(format, args...)})
	}
}

func cut(b []byte) [16]byte {
	sum := sha256.Sum256(b)
	return [16]byte(sum[:16])
}

func (v *verifier) run(ctx context.Context) error {
	var noted head
	if v.opts.Head != "" {
		rev, hash, ok := strings.Cut(v.opts.Head, ":")
		to, err := strconv.ParseInt(rev, 10, 64)
		if !ok || err != nil || to < 1 || len(hash) != 2*sha256.Size {
			return fmt.Errorf("the noted head %q: want <revision>:<64 hex digits>", bounded(v.opts.Head))
		}
		noted = head{To: to, Hash: hash}
	}
	resp, err := v.kv.Get(ctx, v.space.ChainHead())
	if err != nil {
		return err
	}
	v.report.Revision = resp.Header.Revision
	for _, kv := range resp.Kvs {
		if v.head, err = parseHead(kv.Value, kv.ModRevision); err != nil {
			v.finding(kv.ModRevision, v.space.ChainHead(), "%v", err)
		}
	}
	found := noted.To == 0
	var last link
	var mod int64
	err = v.walk(ctx, v.space.ChainLink(0), v.space.ChainHead(), linksPage, func(kv *mvccpb.KeyValue) error {
		l := v.link(kv, last, mod)
		found = found || l.To == noted.To && l.Hash == noted.Hash
		last, mod = l, kv.ModRevision
		return nil
	})
	if err != nil {
		return err
	}
	if v.report.Links > 0 {
		v.report.Head = fmt.Sprintf("%d:%s", last.To, last.Hash)
	}
	if !found {
		v.finding(noted.To, v.space.ChainLink(noted.To), "the noted head %s is not in the chain", v.opts.Head)
	}
	switch {
	case v.head.To == 0 && v.report.Links > 0 && len(resp.Kvs) == 0:
		v.finding(last.To, v.space.ChainHead(), "it is gone, and there are links")
	case v.head.To > 0 && (v.head.To != last.To || v.head.Hash != last.Hash):
		v.finding(v.head.To, v.space.ChainHead(), "it names %d:%s, and the last link is %d:%s", v.head.To, v.head.Hash, last.To, last.Hash)
	case v.head.To > 0 && v.head.mod != mod:
		v.finding(v.head.To, v.space.ChainHead(), "it was written at revision %d, and the last link at %d", v.head.mod, mod)
	}
	v.report.Behind = v.report.Revision - last.To
	if v.head.idle(v.report.Revision) {
		v.report.Behind = 0
	}
	if err := v.walk(ctx, v.space.Audits(), clientv3.GetPrefixRangeEnd(v.space.Audits()), recordsPage, func(kv *mvccpb.KeyValue) error {
		v.record(kv)
		return nil
	}); err != nil {
		return err
	}
	return v.missing(ctx)
}

// walk reads a range at the report's revision.
func (v *verifier) walk(ctx context.Context, from, to string, page int64, each func(*mvccpb.KeyValue) error) error {
	return walk(ctx, v.kv, from, to, v.report.Revision, page, each)
}

// link checks a link against the one before it, which is zero before the first,
// and notes what it says. last's transaction was at revision mod.
func (v *verifier) link(kv *mvccpb.KeyValue, last link, mod int64) link {
	path := string(kv.Key)
	l, err := parseLink(kv.Value)
	first := v.report.Links == 0
	v.report.Links++
	bad := func(format string, args ...any) { v.finding(l.To, path, format, args...) }
	switch {
	case err != nil:
		bad("%v", err)
	case path != v.space.ChainLink(l.To):
		bad("it stands at the place of another: it says that it ends with revision %d", l.To)
	}
	if kv.Version != 1 {
		bad("it was written %d times, last at revision %d", kv.Version, kv.ModRevision)
	}
	if kv.ModRevision <= l.To || kv.ModRevision <= mod {
		bad("it was written at revision %d, want after %d", kv.ModRevision, max(l.To, mod))
	}
	switch {
	case first && !l.Genesis:
		bad("it is the first and no genesis: what was before it is gone")
	case first:
		v.report.Begun = l.From
	case l.Prev != last.Hash:
		bad("it follows %q, and the link before it is %q: one was altered, deleted or inserted", l.Prev, last.Hash)
	case l.Genesis && l.From > last.To:
		if l.From > last.To+1 {
			v.report.Gaps = append(v.report.Gaps, Gap{last.To + 1, l.From})
		}
	case l.From != last.To+1:
		bad("it begins with revision %d, and the link before it ends with %d", l.From, last.To)
	}
	if l.To < l.From {
		bad("it ends before it begins")
	}
	if l.Gap {
		v.report.Gaps = append(v.report.Gaps, Gap{l.From, l.To})
	}
	if l.Note != "" {
		v.report.Notes = append(v.report.Notes, fmt.Sprintf("revision %d: %s", l.To, l.Note))
	}
	v.spans = append(v.spans, span{l.From, l.To, l.At, kv.ModRevision, !l.Gap && !l.Genesis})
	before := l.From - 1
	for _, e := range l.Entries {
		v.report.Revisions++
		if e.revision <= before || e.revision > l.To {
			bad("its entry of revision %d is not in its place", e.revision)
		}
		before = e.revision
		if len(e.records) == 0 {
			if v.bare == nil {
				v.bare = map[int64]bool{}
			}
			v.bare[e.revision] = true
		}
		for _, r := range e.records {
			key := cut([]byte(r.path))
			if p, twice := v.listed[key]; twice {
				v.finding(e.revision, r.path, "this record of revision %d was written again", p.revision)
			}
			sum, err := parseDigest(r.hash)
			if err != nil {
				bad("its entry of revision %d: %v", e.revision, err)
			}
			v.listed[key] = proof{revision: e.revision, hash: sum}
		}
	}
	return l
}

// spanOf the link that covers revision rev; ok is false if none does.
func (v *verifier) spanOf(rev int64) (i int, ok bool) {
	lo, hi := 0, len(v.spans)
	for lo < hi {
		if mid := (lo + hi) / 2; v.spans[mid].to < rev {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo, lo < len(v.spans) && v.spans[lo].from <= rev
}

// record compares a stored record with the chain.
func (v *verifier) record(kv *mvccpb.KeyValue) {
	path, rev := string(kv.Key), kv.ModRevision
	shown := listedPath(path)
	key := cut([]byte(shown))
	p, isListed := v.listed[key]
	i, in := v.spanOf(rev)
	switch {
	case isListed && p.revision != rev:
		v.finding(rev, shown, "the chain has this record at revision %d, and it was written at %d", p.revision, rev)
	case isListed && p.hash != cut(kv.Value):
		v.finding(rev, shown, "its text is not what the chain has of revision %d", rev)
	case isListed:
		v.report.Records++
	case in && v.spans[i].known:
		v.finding(rev, shown, "the chain covers revision %d and has no such record", rev)
	case len(v.spans) > 0 && rev > v.spans[len(v.spans)-1].to:
		v.report.Unchained++
	default:
		v.report.Unproven++
	}
	if isListed {
		p.met = true
		v.listed[key] = p
	} else if kv.Version != 1 {
		v.finding(rev, shown, "it was written %d times", kv.Version)
	}
	r, err := Parse(kv.Value)
	if err != nil {
		v.finding(rev, shown, "%v", err)
		return
	}
	if path != v.space.Audit(r.Organization)+r.ID {
		v.finding(rev, shown, "it says that it is record %q of organization %q", bounded(r.ID), bounded(string(r.Organization)))
	}
	if r.Revision != 0 {
		v.late(r, rev, shown)
	}
	v.times(r, rev, shown)
}

// late checks a record that says that it was written after its change. rev is
// the record's own revision.
func (v *verifier) late(r Record, rev int64, path string) {
	if r.Revision < 0 || r.Revision >= rev {
		v.finding(rev, path, "it says that it is of revision %d, which was not before it", r.Revision)
		return
	}
	i, in := v.spanOf(r.Revision)
	if in && v.spans[i].known && !v.bare[r.Revision] {
		v.finding(rev, path, "it says that it is of revision %d, which had its own record or changed nothing", r.Revision)
	}
	// The follower writes what came from outside beside its link.
	if last := len(v.spans) - 1; r.Actor.Kind == ActorExternal && last >= 0 && rev <= v.spans[last].mod && rev > v.spans[0].mod {
		if j, ok := v.linkAt(rev); !ok || r.Revision < v.spans[j].from || r.Revision > v.spans[j].to {
			v.finding(rev, path, "it says that a follower wrote it with the link of revision %d, and none did", r.Revision)
		}
	}
}

// linkAt finds the link that was written at revision mod.
func (v *verifier) linkAt(mod int64) (i int, ok bool) {
	lo, hi := 0, len(v.spans)
	for lo < hi {
		if mid := (lo + hi) / 2; v.spans[mid].mod < mod {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo, lo < len(v.spans) && v.spans[lo].mod == mod
}

// times checks when a record says that it was made: not before the newest link
// that was written before its change, and not after the link that covers it. The
// time in its id, by which it is listed, is checked likewise.
func (v *verifier) times(r Record, rev int64, path string) {
	if v.opts.MaxSkew < 0 {
		return
	}
	change := rev
	if r.Revision > 0 && r.Revision < rev && r.Actor.Kind != ActorExternal {
		change = r.Revision // its record waited
	}
	skew := v.opts.MaxSkew.Milliseconds()
	before, _ := v.linkAt(change) // the first that was written at or after the change
	after, covered := v.spanOf(change)
	id, err := strconv.ParseInt(r.ID[:min(12, len(r.ID))], 16, 64)
	if err != nil || len(r.ID) != 2*idBytes {
		v.finding(rev, path, "its id is not one that keygate gives")
		return
	}
	for _, at := range []int64{r.At, id} {
		switch {
		case before > 0 && at < v.spans[before-1].at-skew:
			v.finding(rev, path, "it says that it was made at %s, and its revision is later than %s", clock(at), clock(v.spans[before-1].at))
			return
		case covered && at > v.spans[after].at+skew:
			v.finding(rev, path, "it says that it was made at %s, and its revision was seen at %s", clock(at), clock(v.spans[after].at))
			return
		}
	}
}

func clock(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }

// missing finds the records that are in the chain and gone.
func (v *verifier) missing(ctx context.Context) error {
	gone := 0
	for _, p := range v.listed {
		if !p.met {
			gone++
		}
	}
	if gone == 0 {
		return nil
	}
	// Their names are only in the links.
	return v.walk(ctx, v.space.ChainLink(0), v.space.ChainHead(), linksPage, func(kv *mvccpb.KeyValue) error {
		l, _ := parseLink(kv.Value) // its problem is found already
		for _, e := range l.Entries {
			for _, r := range e.records {
				if p := v.listed[cut([]byte(r.path))]; !p.met && p.revision == e.revision {
					v.finding(e.revision, r.path, "this record is gone")
				}
			}
		}
		return nil
	})
}

func parseDigest(s string) (sum [16]byte, err error) {
	if len(s) != 2*sha256.Size {
		return sum, fmt.Errorf("%q is no SHA-256", bounded(s))
	}
	for i := range sum {
		b, err := strconv.ParseUint(s[2*i:2*i+2], 16, 8)
		if err != nil {
			return sum, fmt.Errorf("%q is no SHA-256", bounded(s))
		}
		sum[i] = byte(b)
	}
	return sum, nil
}
