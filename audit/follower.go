package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"

	"keygate/statestore/keyspace"
)

const (
	// linkInterval is the least time between two links: 20 writes a second at
	// most, however many changes there are.
	linkInterval = 50 * time.Millisecond
	// maxEntries, maxRecords and maxBytes of one link. etcd takes 128 operations
	// and 1.5 MiB in a transaction; one revision adds less than 0.9 MiB.
	maxEntries = 1000
	maxRecords = 64
	maxBytes   = 512 << 10
	// maxBehind in revisions. The client's buffer of a watch has no bound: further
	// behind, the watch is opened anew and gives its events piece by piece.
	maxBehind = 5000
	// idleLink is how old the newest link may become while there are revisions
	// without a change: the chain must not be left behind where etcd compacts.
	idleLink = 2 * time.Minute
	// progressInterval between two questions how far the watch is. etcd answers
	// none while it still catches up.
	progressInterval = time.Second

	openTimeout  = 5 * time.Second
	writeTimeout = 5 * time.Second
	// leaderTTL in seconds is how long a leader that died is waited for.
	leaderTTL = 5
	// leaderPoll is how often the others look.
	leaderPoll = time.Second
	maxBackoff = 5 * time.Second
)

var (
	// errLost: another follower appended a link.
	errLost = errors.New("another follower appended a link")
	// errAgain asks for a new watch.
	errAgain = errors.New("the watch begins again")
)

// Client is what a follower needs of etcd; a *clientv3.Client has it.
type Client interface {
	clientv3.KV
	Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan
	RequestProgress(ctx context.Context) error
	Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error)
	KeepAlive(ctx context.Context, id clientv3.LeaseID) (<-chan *clientv3.LeaseKeepAliveResponse, error)
	Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error)
}

// FollowerConfig of a Follower.
type FollowerConfig struct {
	// Client of the etcd; required.
	Client Client
	// Space of keygate's keys; required.
	Space keyspace.Space
	// Logger; nil discards.
	Logger *slog.Logger
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Follower builds the chain. Any number of them may run: one leads and writes,
// and another takes over a few seconds after it died. Two that lead by mistake
// still make one chain. It is safe for concurrent use.
type Follower struct {
	client Client
	space  keyspace.Space
	log    *slog.Logger
	now    func() time.Time

	// maxBehind and idleLink, unless a test wants others.
	behind int64
	idle   time.Duration

	linked time.Time // when the newest link was written; of the goroutine that follows

	shared struct {
		sync.Mutex
		status Status
	}
}

// Status of a follower.
type Status struct {
	// Leader: this one writes the chain.
	Leader bool
	// Head is the newest revision that the chain covers, and Hash its link's; 0
	// before anything is known.
	Head int64
	Hash string
	// Lag is how many revisions are waiting for a link: newer ones than the head,
	// as far as they are known of.
	Lag int64
	// Err is what went wrong last; nil since it works again.
	Err error
}

// NewFollower returns a Follower, which does nothing before Run.
func NewFollower(cfg FollowerConfig) *Follower {
	f := &Follower{client: cfg.Client, space: cfg.Space, log: cfg.Logger, now: cfg.Now, behind: maxBehind, idle: idleLink}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if f.now == nil {
		f.now = time.Now
	}
	return f
}

// Status is how it stands now.
func (f *Follower) Status() Status {
	f.shared.Lock()
	defer f.shared.Unlock()
	return f.shared.status
}

func (f *Follower) update(change func(*Status)) {
	f.shared.Lock()
	defer f.shared.Unlock()
	change(&f.shared.status)
}

// Run follows until ctx ends, and returns nil then. Whatever goes wrong is
// logged, stands in the Status and is tried again.
func (f *Follower) Run(ctx context.Context) error {
	failures := 0
	for ctx.Err() == nil {
		lease, err := f.campaign(ctx)
		if err == nil && lease != clientv3.NoLease {
			err = f.lead(ctx, lease)
		}
		if ctx.Err() != nil {
			break
		}
		wait := leaderPoll
		if err != nil {
			failures++
			wait = f.failed(err, failures)
		} else {
			failures = 0
		}
		pause(ctx, wait)
	}
	f.update(func(s *Status) { s.Leader = false })
	return nil
}

// failed notes an error and returns how long to wait after so many in a row.
func (f *Follower) failed(err error, failures int) time.Duration {
	f.update(func(s *Status) { s.Err = err })
	f.log.Warn("the audit chain is not written", "cause", err)
	return min(100*time.Millisecond<<min(failures, 10), maxBackoff)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// leader is the path that the follower which writes holds under its lease. It
// sorts behind the head.
func (f *Follower) leader() string { return f.space.Chain() + "leader" }

// campaign returns the lease under which this follower leads, or NoLease if
// another one does.
func (f *Follower) campaign(ctx context.Context) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	resp, err := f.client.Txn(ctx).Then(clientv3.OpGet(f.leader()), clientv3.OpGet(f.space.ChainHead())).Commit()
	if err != nil {
		return clientv3.NoLease, fmt.Errorf("look for the leader of the audit chain: %w", err)
	}
	if resp.Responses[0].GetResponseRange().Count > 0 {
		f.update(func(s *Status) {
			s.Err = nil
			for _, kv := range resp.Responses[1].GetResponseRange().Kvs {
				if h, err := parseHead(kv.Value, kv.ModRevision); err == nil {
					s.Head, s.Hash, s.Lag = h.To, h.Hash, 0
					if !h.idle(resp.Header.Revision) {
						s.Lag = resp.Header.Revision - h.To
					}
				}
			}
		})
		return clientv3.NoLease, nil
	}
	grant, err := f.client.Grant(ctx, leaderTTL)
	if err != nil {
		return clientv3.NoLease, fmt.Errorf("lead the audit chain: %w", err)
	}
	won, err := f.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(f.leader()), "=", 0)).
		Then(clientv3.OpPut(f.leader(), fmt.Sprintf("%x", grant.ID), clientv3.WithLease(grant.ID))).Commit()
	if err == nil && won.Succeeded {
		return grant.ID, nil
	}
	f.resign(ctx, grant.ID)
	if err != nil {
		err = fmt.Errorf("lead the audit chain: %w", err)
	}
	return clientv3.NoLease, err
}

// resign gives a lease up, so that another follower need not wait.
func (f *Follower) resign(ctx context.Context, lease clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaderPoll)
	defer cancel()
	_, _ = f.client.Revoke(ctx, lease) // or it ends by itself
}

// lead follows while the lease is held. It returns when the lease is lost.
func (f *Follower) lead(ctx context.Context, lease clientv3.LeaseID) error {
	defer f.resign(ctx, lease)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	alive, err := f.client.KeepAlive(ctx, lease)
	if err != nil {
		return fmt.Errorf("lead the audit chain: %w", err)
	}
	var lost sync.WaitGroup
	defer lost.Wait()
	defer cancel()
	lost.Go(func() {
		defer cancel()
		for range alive {
		}
	})
	f.update(func(s *Status) { s.Leader = true })
	defer f.update(func(s *Status) { s.Leader = false })
	for failures := 0; ctx.Err() == nil; {
		linked, err := f.follow(ctx)
		if linked {
			failures = 0
		}
		switch {
		case ctx.Err() != nil, errors.Is(err, errAgain):
		case errors.Is(err, errLost): // it leads too: both see it, and one waits
			f.log.Info("the audit chain was written by another follower too")
			pause(ctx, linkInterval)
		default:
			failures++
			pause(ctx, f.failed(err, failures))
		}
	}
	return nil
}

// session is one watch, from the head of the chain on. It is for one goroutine.
type session struct {
	f       *Follower
	head    head
	cluster uint64
	through int64 // everything up to it has been seen
	store   int64 // the newest revision known of

	entries []entry
	records []clientv3.Op
	bytes   int
	due     <-chan time.Time // when the entries are to be written; nil: there are none
}

// follow appends links until the watch ends. linked tells whether it could
// write, or had nothing to.
func (f *Follower) follow(ctx context.Context) (linked bool, err error) {
	s, err := f.open(ctx)
	if err != nil {
		return false, err
	}
	// A stream of its own: the client chooses it by the outgoing metadata.
	md := metadata.AppendToOutgoingContext(ctx, "keygate-audit", NewID(f.now()))
	watched, cancel := context.WithCancel(clientv3.WithRequireLeader(md))
	defer cancel()
	opening := time.AfterFunc(openTimeout, cancel)
	from, to := f.space.All()
	updates := f.client.Watch(watched, from, clientv3.WithRange(to), clientv3.WithRev(s.head.To+1), clientv3.WithPrevKV(), clientv3.WithFragment())
	if !opening.Stop() {
		return false, fmt.Errorf("open the watch of the audit chain: %w", context.DeadlineExceeded)
	}
	ask := func() error {
		ctx, cancel := context.WithTimeout(watched, openTimeout)
		defer cancel()
		return f.client.RequestProgress(ctx)
	}
	if err := ask(); err != nil {
		return false, fmt.Errorf("watch of the audit chain: %w", err)
	}
	tick := time.NewTicker(progressInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return true, ctx.Err()
		case r, ok := <-updates:
			if !ok {
				return linked, errors.New("watch of the audit chain: it ended without a reason")
			}
			err = s.update(ctx, r)
		case <-s.due:
			err = s.flush(ctx)
		case <-tick.C:
			err = ask()
		}
		s.report(err)
		if err != nil {
			return linked, err
		}
		linked = true
	}
}

// report to the Status.
func (s *session) report(err error) {
	s.f.update(func(st *Status) {
		st.Head, st.Hash = s.head.To, s.head.Hash
		st.Lag = int64(len(s.entries))
		if !s.head.idle(s.store) {
			st.Lag += max(0, s.store-s.through)
		}
		if err == nil {
			st.Err = nil
		}
	})
}

// open reads the head, and begins the chain if there is none or if etcd is
// another one now.
func (f *Follower) open(ctx context.Context) (*session, error) {
	reading, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	resp, err := f.client.Txn(reading).Then(
		clientv3.OpGet(f.space.ChainHead()),
		clientv3.OpGet(f.space.ChainLink(0), clientv3.WithRange(f.space.ChainHead()), clientv3.WithLimit(1), clientv3.WithKeysOnly()),
	).Commit()
	if err != nil {
		return nil, fmt.Errorf("read the head of the audit chain: %w", err)
	}
	now := resp.Header.Revision
	s := &session{f: f, cluster: resp.Header.ClusterId, store: now}
	l := link{Version: chainVersion, From: now, To: now, Genesis: true, Cluster: clusterName(s.cluster)}
	var drop []clientv3.Op
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		s.head, err = parseHead(kv.Value, kv.ModRevision)
	}
	switch links := resp.Responses[1].GetResponseRange().Count > 0; {
	case s.head.To > 0 && s.head.Cluster == l.Cluster && s.head.To <= now:
		s.through = s.head.To
		return s, nil
	case s.head.To > 0 && s.head.Cluster != l.Cluster:
		l.Note = fmt.Sprintf("etcd was restored: the chain was at %d:%s in cluster %s", s.head.To, s.head.Hash, s.head.Cluster)
		copied, err := f.copied(reading, s.head, now)
		if err != nil {
			return nil, err
		}
		if copied {
			l.Note += ", and is dropped: its revisions are not those of this cluster"
			drop = []clientv3.Op{
				clientv3.OpDelete(f.space.ChainLink(0), clientv3.WithRange(f.space.ChainLink(now))),
				clientv3.OpDelete(f.space.ChainLink(now+1), clientv3.WithRange(f.space.ChainHead())),
			}
		}
	case s.head.To > now:
		l.Note = fmt.Sprintf("the head was altered: it named revision %d, and etcd is at %d", s.head.To, now)
		s.head = head{mod: s.head.mod}
	case err != nil:
		l.Note = "the head was altered: it cannot be read"
	case links:
		l.Note = "the head was deleted"
	}
	if l.Note != "" {
		f.log.Error("the audit chain begins again", "cause", l.Note, "revision", now)
	}
	if err := s.append(ctx, l, drop); err != nil {
		return nil, err
	}
	return s, nil
}

// copied tells whether the keys were written anew into another cluster, and so
// have other revisions than the chain says: then the head is not of the
// transaction of its link any more, or is of a revision yet to come.
func (f *Follower) copied(ctx context.Context, h head, now int64) (bool, error) {
	resp, err := f.client.Get(ctx, f.space.ChainLink(h.To), clientv3.WithKeysOnly())
	if err != nil {
		return false, fmt.Errorf("read the newest link of the audit chain: %w", err)
	}
	return h.To > now || h.mod <= h.To || len(resp.Kvs) == 0 || resp.Kvs[0].ModRevision != h.mod, nil
}

// append writes a link, with other operations, and makes it the head. While etcd
// has no space it waits with what it has seen: to get space somebody will
// compact, and then nobody else can see it any more.
func (s *session) append(ctx context.Context, l link, ops []clientv3.Op) error {
	l.Version, l.At, l.Prev = chainVersion, s.f.now().UnixMilli(), s.head.Hash
	text := l.closed()
	next := head{Version: chainVersion, To: l.To, Hash: l.Hash, Cluster: clusterName(s.cluster)}
	ops = append(slices.Clip(ops), clientv3.OpPut(s.f.space.ChainLink(l.To), text), clientv3.OpPut(s.f.space.ChainHead(), next.value()))
	write := func() (*clientv3.TxnResponse, error) {
		ctx, cancel := context.WithTimeout(ctx, writeTimeout)
		defer cancel()
		return s.f.client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(s.f.space.ChainHead()), "=", s.head.mod)).
			Then(ops...).Commit()
	}
	resp, err := write()
	for n := 1; errors.Is(err, rpctypes.ErrNoSpace) && ctx.Err() == nil; n++ {
		pause(ctx, s.f.failed(fmt.Errorf("write a link of the audit chain: %w", err), n))
		resp, err = write()
	}
	if err != nil {
		return fmt.Errorf("write a link of the audit chain: %w", err)
	}
	if !resp.Succeeded {
		return errLost
	}
	next.mod = resp.Header.Revision
	s.head, s.store, s.f.linked = next, max(s.store, next.mod), time.Now()
	s.through = max(s.through, l.To)
	return nil
}

// update takes one response of the watch. The events of one revision come
// together: etcd guarantees it, and the client puts fragments together.
func (s *session) update(ctx context.Context, r clientv3.WatchResponse) error {
	if r.Header.GetClusterId() != 0 && r.Header.ClusterId != s.cluster {
		return fmt.Errorf("watch of the audit chain: cluster %x answers, want %x", r.Header.ClusterId, s.cluster)
	}
	if err := r.Err(); errors.Is(err, rpctypes.ErrCompacted) {
		return s.compacted(ctx, r.CompactRevision)
	} else if err != nil {
		return fmt.Errorf("watch of the audit chain: %w", err)
	}
	s.store = max(s.store, r.Header.Revision)
	if r.IsProgressNotify() {
		s.through = max(s.through, r.Header.Revision)
		if len(s.entries) == 0 && !s.head.idle(s.through) && time.Since(s.f.linked) > s.f.idle {
			return s.flush(ctx)
		}
		return nil
	}
	for last := int64(0); len(r.Events) > 0; {
		rev := r.Events[0].Kv.ModRevision
		n := slices.IndexFunc(r.Events, func(e *clientv3.Event) bool { return e.Kv.ModRevision != rev })
		if n < 0 {
			n = len(r.Events)
		}
		if rev <= last {
			return fmt.Errorf("watch of the audit chain: revision %d came after %d", rev, last)
		}
		last = rev
		if rev > s.through { // else a repetition after a reconnection
			if err := s.add(ctx, rev, r.Events[:n]); err != nil {
				return err
			}
			s.through = rev
		}
		r.Events = r.Events[n:]
	}
	if len(s.entries) > 0 && s.due == nil {
		s.due = time.After(linkInterval - time.Since(s.f.linked))
	}
	if s.store-s.through > s.f.behind {
		if err := s.flush(ctx); err != nil {
			return err
		}
		return errAgain
	}
	return nil
}

// add a revision, after a flush if it does not fit into the same link.
func (s *session) add(ctx context.Context, rev int64, events []*clientv3.Event) error {
	e, covered := entryOf(s.f.space, events)
	if !covered {
		return nil
	}
	e.revision = rev
	var records []clientv3.Op
	size := 100
	for _, l := range e.records {
		size += len(l.path) + len(l.hash) + 10
	}
	if len(e.records) == maxListed {
		s.f.log.Error("a revision wrote more audit records than the chain can list", "revision", rev, "listed", maxListed)
	}
	for _, r := range external(s.f.space, events, s.f.now()) {
		s.f.log.Info("a change from outside", "action", r.Action, "object", r.Object, "organization", string(r.Organization), "revision", rev)
		path, value := s.f.space.Audit(r.Organization)+r.ID, r.Value()
		records = append(records, clientv3.OpPut(path, value))
		size += len(path) + len(value)
	}
	if len(s.entries) == maxEntries || len(s.entries) > 0 && (s.bytes+size > maxBytes || len(s.records)+len(records) > maxRecords) {
		if err := s.flush(ctx); err != nil {
			return err
		}
	}
	s.entries, s.records, s.bytes = append(s.entries, e), append(s.records, records...), s.bytes+size
	return nil
}

// flush writes what there is as a link to all that has been seen, not sooner
// than linkInterval after the last one.
func (s *session) flush(ctx context.Context) error {
	if s.through <= s.head.To {
		return nil
	}
	if wait := linkInterval - time.Since(s.f.linked); wait > 0 {
		pause(ctx, wait)
	}
	if err := s.append(ctx, link{From: s.head.To + 1, To: s.through, Entries: s.entries}, s.records); err != nil {
		return err
	}
	s.entries, s.records, s.bytes, s.due = nil, nil, 0, nil
	return nil
}

// compacted writes what was seen, and if nothing was, that the revisions up to
// rev are gone.
func (s *session) compacted(ctx context.Context, rev int64) error {
	if s.through > s.head.To {
		if err := s.flush(ctx); err != nil {
			return err
		}
		return errAgain
	}
	if rev <= s.head.To {
		return fmt.Errorf("watch of the audit chain: revision %d is compacted at %d, says etcd", s.head.To+1, rev)
	}
	l := link{From: s.head.To + 1, To: rev, Gap: true, Note: "these revisions were compacted before they were seen"}
	s.f.log.Error("the audit chain has a gap: revisions were compacted before they were seen, and changes in them are not known", "from", l.From, "to", l.To)
	if err := s.append(ctx, l, nil); err != nil {
		return err
	}
	return errAgain
}
