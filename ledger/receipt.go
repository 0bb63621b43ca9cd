package ledger

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/statestore/keyspace"
)

// The argument for a receipt. A replica that has not applied revision R has only
// proofs that began before R was committed, and refuses everything once the
// last of them is as old as its staleness budget S. So, counted from the moment
// when the transaction's answer was here, which is not before the commit, each
// replica has applied R after S, or refuses. A replica that acknowledges R has
// applied it, and needs no more waiting for. The list of replicas is read by the
// transaction itself: whoever registers later proves itself later, by a read
// that R is in.
const (
	// clockRates is added to S: the clock here and the clock there may run at
	// rates that differ.
	clockRates = time.Second
	// pollEvery is how often the registrations are listed beside the watch, which
	// may have died in silence. An acknowledgement takes milliseconds, so it is
	// the exception that comes to a poll.
	pollEvery = time.Second
	// shortestPoll is how long etcd has at least to answer one.
	shortestPoll = 250 * time.Millisecond
)

// Registration of a replica, as it was read last.
type Registration struct {
	// ID of the process.
	ID string
	// Replica as it says of itself; zero if Problem says why it cannot be read.
	Replica keyspace.Replica
	Problem string
}

// Name is what a person finds the replica by.
func (r Registration) Name() string {
	if r.Problem != "" {
		return "unreadable registration " + r.ID
	}
	return fmt.Sprintf("%s pid %d (%s)", r.Replica.Host, r.Replica.Pid, r.ID)
}

// budget after which the replica refuses by itself; the largest there is for a
// registration that cannot be read.
func (r Registration) budget() time.Duration {
	if s := r.Replica.StalenessBudget; r.Problem == "" && s > 0 {
		return min(s, keyspace.MaxStalenessBudget)
	}
	return keyspace.MaxStalenessBudget
}

type registration struct {
	Registration
	rev int64 // ModRevision
}

// registrations reads a list of them.
func registrations(space keyspace.Space, kvs []*mvccpb.KeyValue) []registration {
	all := make([]registration, 0, len(kvs))
	for _, kv := range kvs {
		r := registration{Registration: Registration{ID: strings.TrimPrefix(string(kv.Key), space.Replicas())}, rev: kv.ModRevision}
		var err error
		if r.Replica, err = keyspace.ParseReplica(kv.Value); err != nil {
			r.Problem = err.Error()
		}
		r.Replica.ID = r.ID
		all = append(all, r)
	}
	return all
}

// Replicas lists the registrations as they are now, and the revision of now.
func Replicas(ctx context.Context, kv clientv3.KV, space keyspace.Space) ([]Registration, int64, error) {
	resp, err := kv.Do(ctx, listReplicas(space))
	if err != nil {
		return nil, 0, fmt.Errorf("list the replicas: %w", err)
	}
	list := resp.Get()
	var all []Registration
	for _, r := range registrations(space, list.Kvs) {
		all = append(all, r.Registration)
	}
	return all, list.Header.Revision, nil
}

// Answer of a replica to a change.
type Answer uint8

// The zero Answer is Pending.
const (
	Pending Answer = iota
	Applied        // it has acknowledged the revision
	Fenced         // it has not for so long that by now it has applied it, or refuses, or is gone
)

// ReplicaAnswer is one line of a receipt.
type ReplicaAnswer struct {
	Registration
	Answer Answer
	// After the transaction's answer: when the acknowledgement was seen here.
	After time.Duration
	// Vanished: its registration is gone, which is no acknowledgement. Somebody
	// may have deleted it by hand.
	Vanished bool
}

// Receipt says how far a change has come in the fleet.
type Receipt struct {
	Revision int64
	// Replicas that were registered at Revision, in the order of their names.
	Replicas []ReplicaAnswer
	// UnregisteredBy is when any replica that does not register has applied the
	// change, or refuses.
	UnregisteredBy time.Time
	// Unread says why the last acknowledgements could not be read: etcd was away,
	// and the receipt holds all the same, as one of time; or etcd is another one now
	// (ErrReplaced).
	Unread error
}

// ErrReplaced is what Receipt.Unread wraps when etcd was restored or replaced
// during the wait. The receipt is of the etcd that took the change; what the
// other one holds may be older, and a replica that follows it decides by that.
var ErrReplaced = errors.New("etcd was restored or replaced during the wait, and may not hold the change any more")

// Count of the replicas with this answer.
func (r Receipt) Count(a Answer) (n int) {
	for _, replica := range r.Replicas {
		if replica.Answer == a {
			n++
		}
	}
	return n
}

// Slowest acknowledgement.
func (r Receipt) Slowest() (d time.Duration) {
	for _, replica := range r.Replicas {
		if replica.Answer == Applied {
			d = max(d, replica.After)
		}
	}
	return d
}

// ReceiptJSON is the receipt as a document. Stable.
type ReceiptJSON struct {
	Revision int64 `json:"revision"`
	Replicas struct {
		Total   int `json:"total"`
		Applied int `json:"applied"`
		Fenced  int `json:"fenced"`
	} `json:"replicas"`
	SlowestMs int64 `json:"slowestMs"` // rounded up
	// NotAnswered names those that are not applied.
	NotAnswered            []NotAnswered `json:"notAnswered,omitempty"`
	UnregisteredBy         time.Time     `json:"unregisteredBy"`
	AcknowledgementsUnread string        `json:"acknowledgementsUnread,omitempty"`
}

// NotAnswered is a replica that has not acknowledged.
type NotAnswered struct {
	ID       string `json:"id"`
	Host     string `json:"host,omitempty"`
	Pid      int    `json:"pid,omitempty"`
	Vanished bool   `json:"vanished,omitempty"`
	Problem  string `json:"problem,omitempty"`
}

// JSON form of the receipt.
func (r Receipt) JSON() ReceiptJSON {
	j := ReceiptJSON{Revision: r.Revision, SlowestMs: int64((r.Slowest() + time.Millisecond - 1) / time.Millisecond),
		UnregisteredBy: r.UnregisteredBy.UTC().Truncate(time.Second)}
	j.Replicas.Total, j.Replicas.Applied, j.Replicas.Fenced = len(r.Replicas), r.Count(Applied), r.Count(Fenced)
	for _, a := range r.Replicas {
		if a.Answer != Applied {
			j.NotAnswered = append(j.NotAnswered, NotAnswered{a.ID, a.Replica.Host, a.Replica.Pid, a.Vanished, a.Problem})
		}
	}
	if r.Unread != nil {
		j.AcknowledgementsUnread = r.Unread.Error()
	}
	return j
}

// MarshalJSON writes JSON.
func (r Receipt) MarshalJSON() ([]byte, error) { return json.Marshal(r.JSON()) }

// UnregisteredBy is when any replica, registered or not, has applied the change
// or refuses.
func (c Change) UnregisteredBy() time.Time {
	return c.answered.Add(keyspace.MaxStalenessBudget + clockRates)
}

// Asked tells whether the replicas were asked, so that Wait has something to wait
// for: a barrier was written, or they were listed where etcd takes none.
func (c Change) Asked() bool { return c.listed }

// Latest is when Wait returns at the latest.
func (c Change) Latest() time.Time {
	latest := c.answered
	for _, r := range c.registered {
		if end := c.answered.Add(r.budget() + clockRates); end.After(latest) {
			latest = end
		}
	}
	return latest
}

// Wait returns when no replica can answer a check that begins from now on by what
// was before the change: every one that was registered at c.Revision has
// acknowledged it, or has not for so long (S + 1 s after the transaction) that
// by now it has applied it, or refuses by itself. It may be called again, and by
// several at once; each counts for itself.
//
// An acknowledgement is what the replica itself has written after c.Revision, in
// the etcd that took the change. A registration that is gone is none, and one
// that came later is not waited for. etcd may be away meanwhile: the time holds
// without it.
//
// The error is for a ctx that ended, and for a change without a barrier. The
// change stands, and the receipt says how far it has come until now.
func (c Change) Wait(ctx context.Context) (Receipt, error) {
	w := c.newWait()
	if !c.listed {
		return w.receipt(), errors.New("wait for the replicas: the change has no barrier, so nobody was asked")
	}
	if w.pending() == 0 {
		return w.receipt(), nil
	}
	if w.left() <= 0 { // the time is over; what was acknowledged may still be read
		w.poll(ctx, pollEvery)
		w.fence()
		if w.pending() == 0 {
			return w.receipt(), nil
		}
	}
	watching, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	running.Go(func() { w.watch(watching) })
	running.Go(func() { w.pollUntil(watching) })
	for {
		timer := time.NewTimer(w.left())
		select {
		case <-w.news:
		case <-timer.C:
			w.fence()
		case <-ctx.Done():
			timer.Stop()
			return w.receipt(), fmt.Errorf("wait for the replicas: %w", ctx.Err())
		}
		timer.Stop()
		if w.pending() == 0 {
			return w.receipt(), nil
		}
	}
}

// wait for the acknowledgements of one change.
type wait struct {
	change Change
	news   chan struct{} // an acknowledgement came; holds one

	state struct {
		sync.Mutex
		replicas map[string]*waiting // by id; the keys do not change
		seen     int64               // revision up to which state is known from lists
		unread   error
		replaced error // as soon as another cluster has answered
	}
}

type waiting struct {
	ReplicaAnswer
	rev    int64         // of what is known of it
	budget time.Duration // of the registration that the transaction listed
}

func (c Change) newWait() *wait {
	w := &wait{change: c, news: make(chan struct{}, 1)}
	w.state.replicas = make(map[string]*waiting, len(c.registered))
	w.state.seen = c.Revision
	for _, r := range c.registered {
		w.state.replicas[r.ID] = &waiting{ReplicaAnswer: ReplicaAnswer{Registration: r.Registration}, rev: r.rev, budget: r.budget()}
	}
	return w
}

func (w *wait) receipt() Receipt {
	w.state.Lock()
	defer w.state.Unlock()
	r := Receipt{Revision: w.change.Revision, UnregisteredBy: w.change.UnregisteredBy(), Unread: w.state.unread}
	for _, s := range w.state.replicas {
		r.Replicas = append(r.Replicas, s.ReplicaAnswer)
	}
	if r.Count(Applied) == len(r.Replicas) {
		r.Unread = nil
	}
	if w.state.replaced != nil {
		r.Unread = w.state.replaced
	}
	slices.SortFunc(r.Replicas, func(a, b ReplicaAnswer) int {
		return cmp.Or(cmp.Compare(a.Replica.Host, b.Replica.Host), cmp.Compare(a.Replica.Pid, b.Replica.Pid), cmp.Compare(a.ID, b.ID))
	})
	return r
}

// pending counts the replicas without an answer.
func (w *wait) pending() (n int) {
	w.state.Lock()
	defer w.state.Unlock()
	for _, s := range w.state.replicas {
		if s.Answer == Pending {
			n++
		}
	}
	return n
}

// left is the time until the next replica is fenced.
func (w *wait) left() time.Duration {
	w.state.Lock()
	defer w.state.Unlock()
	least := keyspace.MaxStalenessBudget + clockRates
	for _, s := range w.state.replicas {
		if s.Answer == Pending {
			least = min(least, s.budget+clockRates)
		}
	}
	return least - time.Since(w.change.answered)
}

// fence ends the waiting for those whose time is over.
func (w *wait) fence() {
	w.state.Lock()
	defer w.state.Unlock()
	for _, s := range w.state.replicas {
		if s.Answer == Pending && time.Since(w.change.answered) >= s.budget+clockRates {
			s.Answer = Fenced
		}
	}
}

// note takes what a replica has written at a revision after the change.
func (w *wait) note(r registration) {
	w.state.Lock()
	defer w.state.Unlock()
	s := w.state.replicas[r.ID]
	if s == nil || r.rev <= s.rev || r.rev <= w.change.Revision {
		return
	}
	s.Registration, s.rev, s.Vanished = r.Registration, r.rev, false
	// What was applied when it was written lies before it. Anything else was not
	// written by a replica of this history. What cannot be read acknowledges 0.
	ack := r.Replica.Acknowledged
	if s.Answer != Applied && ack >= w.change.Revision && ack < r.rev {
		s.Answer, s.After = Applied, time.Since(w.change.answered)
		w.tell()
	}
}

// noteGone takes that a registration is not there at a revision.
func (w *wait) noteGone(id string, rev int64) {
	w.state.Lock()
	defer w.state.Unlock()
	if s := w.state.replicas[id]; s != nil && rev > s.rev {
		s.rev, s.Vanished = rev, true
	}
}

// foreign tells whether an answer is of another cluster than the change, whose
// revisions and acknowledgements say nothing of it, and notes it if so.
func (w *wait) foreign(cluster uint64) bool {
	if cluster == w.change.cluster {
		return false
	}
	w.state.Lock()
	defer w.state.Unlock()
	w.state.replaced = fmt.Errorf("%w: cluster %x answers, the change was made in %x", ErrReplaced, cluster, w.change.cluster)
	return true
}

func (w *wait) tell() {
	select {
	case w.news <- struct{}{}:
	default: // it is being told
	}
}

// watch notes events until ctx ends. A watch that is lost, by compaction or
// otherwise, begins again at what the last list did not hold.
func (w *wait) watch(ctx context.Context) {
	prefix := w.change.space.Replicas()
	for ctx.Err() == nil {
		w.state.Lock()
		from := w.state.seen + 1
		w.state.Unlock()
		// Its own context, so that the watch that is given up is ended as well.
		one, end := context.WithCancel(ctx)
		for resp := range w.change.store.Watch(one, prefix, clientv3.WithPrefix(), clientv3.WithRev(from)) {
			if len(resp.Events) > 0 && w.foreign(resp.Header.ClusterId) {
				break
			}
			for _, e := range resp.Events {
				switch e.Type {
				case clientv3.EventTypeDelete:
					w.noteGone(strings.TrimPrefix(string(e.Kv.Key), prefix), e.Kv.ModRevision)
				default:
					w.note(registrations(w.change.space, []*mvccpb.KeyValue{e.Kv})[0])
				}
			}
		}
		end()
		if ctx.Err() == nil {
			w.poll(ctx, pollEvery)
			pause(ctx, 50*time.Millisecond)
		}
	}
}

// pollUntil lists until ctx ends.
func (w *wait) pollUntil(ctx context.Context) {
	for ctx.Err() == nil {
		// At least twice before the next one is fenced.
		every := max(min(pollEvery, w.left()/4), 20*time.Millisecond)
		pause(ctx, every)
		if ctx.Err() == nil {
			w.poll(ctx, max(every, shortestPoll))
		}
	}
}

// poll notes the list of now.
func (w *wait) poll(ctx context.Context, within time.Duration) {
	asking, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	resp, err := w.change.store.Do(asking, listReplicas(w.change.space))
	if err != nil {
		if ctx.Err() == nil {
			w.state.Lock()
			defer w.state.Unlock()
			w.state.unread = fmt.Errorf("list the replicas: %w", err)
		}
		return
	}
	list := resp.Get()
	if w.foreign(list.Header.ClusterId) {
		return
	}
	there := make(map[string]bool, len(list.Kvs))
	for _, r := range registrations(w.change.space, list.Kvs) {
		there[r.ID] = true
		w.note(r)
	}
	w.state.Lock()
	var gone []string
	for id := range w.state.replicas {
		if !there[id] {
			gone = append(gone, id)
		}
	}
	w.state.unread = nil
	w.state.seen = max(w.state.seen, list.Header.Revision)
	w.state.Unlock()
	for _, id := range gone {
		w.noteGone(id, list.Header.Revision)
	}
}

// pause until ctx ends, or for d.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
