package audit

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/statestore/keyspace"
)

const (
	// DefaultPageSize and MaxPageSize of List.
	DefaultPageSize = 100
	MaxPageSize     = 1000
	// maxScanned records by one List that filters.
	maxScanned = 10_000
)

// ErrQuery is wrapped by the error of a query that cannot be answered.
var ErrQuery = errors.New("audit query")

// Query of List. Empty members let everything pass.
type Query struct {
	// From and before To, by the times in the records' ids, in milliseconds.
	From, To time.Time
	// Action is exact.
	Action string
	// Object is a prefix of what the action was asked for, or of any path that it
	// changed.
	Object string
	// Actor is an actor's name, or its kind.
	Actor string
	// Reverse lists the newest first.
	Reverse bool
	// PageSize is at most MaxPageSize; 0 means DefaultPageSize.
	PageSize int
	// PageToken is the NextPageToken of the page before, of the same query; the
	// PageSize may be another.
	PageToken string
}

// Page of records.
type Page struct {
	Records []Record
	// NextPageToken is empty on the last page. A page may have fewer records than
	// were asked for, even none, and not be the last.
	NextPageToken string
}

// ActionUnreadable is the Action of what List and Export show for a record that
// cannot be read: something else than keygate wrote it.
const ActionUnreadable = "unreadable"

// pageToken is what a token holds.
type pageToken struct {
	Query string `json:"q"` // hash of the query that it belongs to
	After string `json:"a"` // the last id that was looked at
}

// tokenQuery is the hash of what must not change from page to page.
func (q Query) tokenQuery(org authz.Organization) string {
	b, _ := json.Marshal([]any{org, q.From.UnixMilli(), q.To.UnixMilli(), q.Action, q.Object, q.Actor, q.Reverse}) // strings and numbers
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

// List returns the records of org that q asks for, in the order of their ids,
// and so of their times. The Revision of each is filled in. A query that makes
// no sense is an error that wraps ErrQuery.
func List(ctx context.Context, kv clientv3.KV, space keyspace.Space, org authz.Organization, q Query) (Page, error) {
	if q.PageSize == 0 {
		q.PageSize = DefaultPageSize
	}
	if q.PageSize < 1 || q.PageSize > MaxPageSize {
		return Page{}, fmt.Errorf("%w: page size %d, want 1 to %d", ErrQuery, q.PageSize, MaxPageSize)
	}
	prefix := space.Audit(org)
	from, to := prefix, clientv3.GetPrefixRangeEnd(prefix)
	if !q.From.IsZero() && q.From.UnixMilli() > 0 {
		from = prefix + FirstID(q.From)
	}
	if !q.To.IsZero() {
		to = prefix + FirstID(time.UnixMilli(max(0, q.To.UnixMilli())))
	}
	if q.PageToken != "" {
		after, err := q.after(org)
		if err != nil {
			return Page{}, err
		}
		if q.Reverse {
			to = min(to, prefix+after)
		} else {
			from = max(from, prefix+after+"\x00")
		}
	}
	var page Page
	last, more := "", false
	for scanned := 0; from < to; {
		var kvs []*mvccpb.KeyValue
		var err error
		if q.Reverse {
			kvs, err = lastOf(ctx, kv, prefix, from, to, q.PageSize)
		} else {
			kvs, err = firstOf(ctx, kv, from, to, q.PageSize)
		}
		if err != nil {
			return Page{}, fmt.Errorf("list audit records: %w", err)
		}
		if len(kvs) == 0 {
			break
		}
		for _, e := range kvs {
			if len(page.Records) == q.PageSize {
				more = true
				break
			}
			last = string(e.Key)
			if r := read(org, prefix, e); q.matches(r) {
				page.Records = append(page.Records, r)
			}
		}
		if more {
			break
		}
		if q.Reverse {
			to = last
		} else {
			from = last + "\x00"
		}
		if scanned += len(kvs); scanned >= maxScanned {
			more = true
			break
		}
	}
	if more {
		b, _ := json.Marshal(pageToken{q.tokenQuery(org), strings.TrimPrefix(last, prefix)}) // strings
		page.NextPageToken = base64.RawURLEncoding.EncodeToString(b)
	}
	return page, nil
}

// after is the id that the page begins behind.
func (q Query) after(org authz.Organization) (string, error) {
	b, err := base64.RawURLEncoding.DecodeString(q.PageToken)
	var t pageToken
	if err == nil {
		err = json.Unmarshal(b, &t)
	}
	switch {
	case err != nil, t.After == "":
		return "", fmt.Errorf("%w: the page token is none that a list gave", ErrQuery)
	case t.Query != q.tokenQuery(org):
		return "", fmt.Errorf("%w: the page token is of another query: repeat everything but the page size", ErrQuery)
	}
	return t.After, nil
}

func (q Query) matches(r Record) bool {
	return (q.Action == "" || r.Action == q.Action) &&
		(q.Actor == "" || r.Actor.Name == q.Actor || r.Actor.Kind == q.Actor) &&
		(q.Object == "" || strings.HasPrefix(r.Object, q.Object) ||
			slices.ContainsFunc(r.Changes, func(c Change) bool { return strings.HasPrefix(c.Path, q.Object) }))
}

// read a stored record, with its revision.
func read(org authz.Organization, prefix string, kv *mvccpb.KeyValue) Record {
	r, err := Parse(kv.Value)
	if err != nil {
		r = Record{
			Version: Version, ID: listedPath(strings.TrimPrefix(string(kv.Key), prefix)), Organization: org,
			Actor: Actor{Kind: ActorExternal}, Action: ActionUnreadable, Note: "this is not an audit record of keygate",
		}
	}
	if r.Revision == 0 {
		r.Revision = kv.ModRevision
	}
	return r
}

// firstOf returns at least n+1 of a range, in order, or all of it.
func firstOf(ctx context.Context, kv clientv3.KV, from, to string, n int) ([]*mvccpb.KeyValue, error) {
	resp, err := kv.Get(ctx, from, clientv3.WithRange(to), clientv3.WithLimit(int64(n)+1))
	if err != nil {
		return nil, err
	}
	return resp.Kvs, nil
}

// lastOf returns the last n+1 of a range or some more, or all of it, the last
// first. etcd reads the whole of a range that it is asked for in descending
// order; so the range is made short first, by counting, which reads no values.
func lastOf(ctx context.Context, kv clientv3.KV, prefix, from, to string, n int) ([]*mvccpb.KeyValue, error) {
	count := func(from string) (int64, error) {
		resp, err := kv.Get(ctx, from, clientv3.WithRange(to), clientv3.WithCountOnly())
		if err != nil {
			return 0, err
		}
		return resp.Count, nil
	}
	want := int64(n) + 1
	lo, _ := millis(prefix, from) // 0 without one
	hi, ok := millis(prefix, to)
	enough := int64(-1) // from here on there are enough
	short := hi         // and from here on too few
	at := func(ms int64) string { return max(from, prefix+fmt.Sprintf("%012x", ms)) }
	if !ok { // the end of the folder
		hi = time.Now().UnixMilli()
		short = hi
		c, err := count(at(hi))
		if err != nil {
			return nil, err
		}
		if c >= want { // by clocks that are ahead
			enough, short = hi, 1<<(8*6)-1
		}
	}
	// Back in ever longer steps until there are enough …
	for step := int64(1000); enough < 0 && short > lo; step *= 8 {
		ms := max(lo, hi-step)
		c, err := count(at(ms))
		if err != nil {
			return nil, err
		}
		if c >= want {
			enough = ms
		} else {
			short = ms
		}
	}
	// … and forth again while there are far too many.
	for enough >= 0 && short-enough > 1 {
		mid := enough + (short-enough)/2
		c, err := count(at(mid))
		if err != nil {
			return nil, err
		}
		if c < want {
			short = mid
			continue
		}
		enough = mid
		if c <= 4*want {
			break
		}
	}
	begin := from
	if enough >= 0 {
		begin = at(enough)
	}
	resp, err := kv.Get(ctx, begin, clientv3.WithRange(to))
	if err != nil {
		return nil, err
	}
	slices.Reverse(resp.Kvs)
	return resp.Kvs, nil
}

// millis is the time in a path's id; ok is false if it has none.
func millis(prefix, path string) (ms int64, ok bool) {
	id, ok := strings.CutPrefix(path, prefix)
	if !ok || len(id) < 12 {
		return 0, false
	}
	ms, err := strconv.ParseInt(id[:12], 16, 64)
	return max(ms, 0), err == nil
}

// walk reads a range page by page at one revision; 0 means the current one, of
// the first page.
func walk(ctx context.Context, kv clientv3.KV, from, to string, rev, page int64, each func(*mvccpb.KeyValue) error) error {
	for {
		resp, err := kv.Get(ctx, from, clientv3.WithRange(to), clientv3.WithLimit(page), clientv3.WithRev(rev))
		if err != nil {
			return err
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		for _, e := range resp.Kvs {
			if err := each(e); err != nil {
				return err
			}
		}
		if !resp.More {
			return nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

// Export writes all records of org as JSON lines, in the order of their ids, at
// one revision, with the Revision of each filled in. It returns how many it has
// written. It holds one page of them at a time.
func Export(ctx context.Context, kv clientv3.KV, space keyspace.Space, org authz.Organization, w io.Writer) (n int, err error) {
	prefix := space.Audit(org)
	out := bufio.NewWriter(w)
	err = walk(ctx, kv, prefix, clientv3.GetPrefixRangeEnd(prefix), 0, recordsPage, func(e *mvccpb.KeyValue) error {
		if _, err := out.WriteString(read(org, prefix, e).Value() + "\n"); err != nil {
			return err
		}
		n++
		return nil
	})
	if err = errors.Join(err, out.Flush()); err != nil {
		return n, fmt.Errorf("export audit records: %w", err)
	}
	return n, nil
}
