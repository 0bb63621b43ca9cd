package storetest

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/statestore"
)

// Fake is etcd's revisions, ranges and watches in memory, with the faults that
// the real one shows only by chance. The zero value is not usable; use NewFake.
// All methods are safe for concurrent use.
type Fake struct {
	mu        sync.Mutex
	changed   *sync.Cond
	revision  int64
	compacted int64
	cluster   uint64
	term      uint64
	kvs       map[string]*mvccpb.KeyValue
	log       [][]*clientv3.Event // by revision, from 2 on
	watches   map[*fakeWatch]bool

	faults faults
}

// faults are under Fake.mu.
type faults struct {
	read       error         // every read fails with it
	leaderless *Fake         // no read is confirmed; a local one sees this state
	thaw       chan struct{} // while set, nothing is answered or delivered until it is closed
	noProgress bool          // progress requests are dropped
	held       bool          // events are kept back, progress with them
	afterRead  func(prefixes []string)
	onList     func()
}

var _ statestore.Backend = (*Fake)(nil)

// NewFake returns an empty cluster at revision 1.
func NewFake() *Fake {
	f := &Fake{revision: 1, cluster: 1, term: 2, kvs: map[string]*mvccpb.KeyValue{}, watches: map[*fakeWatch]bool{}}
	f.changed = sync.NewCond(&f.mu)
	return f
}

// Put writes one key and returns the revision.
func (f *Fake) Put(key, value string) int64 { return f.PutAll(key, value) }

// PutAll writes keys and values, in turn, in one transaction.
func (f *Fake) PutAll(keysAndValues ...string) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.putLocked(keysAndValues)
}

// PutNext is Put of a value that knows the revision it will have.
func (f *Fake) PutNext(key string, value func(rev int64) string) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.putLocked([]string{key, value(f.revision + 1)})
}

func (f *Fake) putLocked(keysAndValues []string) int64 {
	f.revision++
	var events []*clientv3.Event
	for kv := range slices.Chunk(keysAndValues, 2) {
		put := &mvccpb.KeyValue{Key: []byte(kv[0]), Value: []byte(kv[1]), ModRevision: f.revision}
		f.kvs[kv[0]] = put
		events = append(events, &clientv3.Event{Type: clientv3.EventTypePut, Kv: put})
	}
	f.log = append(f.log, events)
	f.changed.Broadcast()
	return f.revision
}

// Delete deletes one key and returns the revision; that of now if there was no
// such key.
func (f *Fake) Delete(key string) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.kvs[key] == nil {
		return f.revision
	}
	f.revision++
	delete(f.kvs, key)
	f.log = append(f.log, []*clientv3.Event{{Type: clientv3.EventTypeDelete, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: f.revision}}})
	f.changed.Broadcast()
	return f.revision
}

// Compact forgets the history up to now: a watch that has not seen it ends.
func (f *Fake) Compact() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.compacted = f.revision
	f.changed.Broadcast()
}

// FailReads makes every read fail with err; nil ends it.
func (f *Fake) FailReads(err error) { f.fault(func() { f.faults.read = err }) }

// Leaderless lets every Read fail, as in an election, and ReadLocal see the state
// of now, however old it grows; false ends it.
func (f *Fake) Leaderless(on bool) {
	var state *Fake
	if on {
		state = f.Copy()
	}
	f.fault(func() { f.faults.leaderless = state })
}

// DropProgress drops progress requests in silence, as etcd does while a
// watcher of the stream is behind.
func (f *Fake) DropProgress(on bool) { f.fault(func() { f.faults.noProgress = on }) }

// Hold keeps the events of all present and future watches back, and progress
// notifications with them, until it is called with false.
func (f *Fake) Hold(on bool) { f.fault(func() { f.faults.held = on }) }

// Repeat lets each watch deliver the events of a revision again.
func (f *Fake) Repeat(revision int64) {
	f.fault(func() {
		for w := range f.watches {
			w.repeat = revision
		}
	})
}

// Step lets each held watch deliver one revision, under a header that knows of all
// of them: a replay in batches.
func (f *Fake) Step() {
	f.fault(func() {
		for w := range f.watches {
			w.step = true
		}
	})
}

// AfterRead is called, if set, when a read has been taken from the store and
// before its answer arrives: the moment in which a change can overtake it.
func (f *Fake) AfterRead(hook func(prefixes []string)) { f.fault(func() { f.faults.afterRead = hook }) }

// OnList is called, if set, before each part of a list is handed over.
func (f *Fake) OnList(hook func()) { f.fault(func() { f.faults.onList = hook }) }

// Silence makes the present watches deliver nothing more, without an error:
// their connection has died unseen. Watches opened later work.
func (f *Fake) Silence() {
	f.fault(func() {
		for w := range f.watches {
			w.silent = true
		}
	})
}

// Freeze lets nothing in or out until Thaw: a network that drops packets.
func (f *Fake) Freeze() {
	f.fault(func() {
		if f.faults.thaw == nil {
			f.faults.thaw = make(chan struct{})
		}
	})
}

// Thaw ends a Freeze.
func (f *Fake) Thaw() {
	f.fault(func() {
		if f.faults.thaw != nil {
			close(f.faults.thaw)
			f.faults.thaw = nil
		}
	})
}

// Copy returns the state of now, for Restore.
func (f *Fake) Copy() *Fake {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := NewFake()
	c.revision, c.compacted, c.cluster, c.term = f.revision, f.compacted, f.cluster, f.term
	c.kvs, c.log = maps.Clone(f.kvs), slices.Clone(f.log)
	return c
}

// Restore puts an older copy back, under a cluster id and a raft term to choose.
// Watches from a future revision stay, and are silent, as etcd's are.
func (f *Fake) Restore(c *Fake, cluster, term uint64) {
	f.fault(func() {
		f.revision, f.compacted, f.cluster, f.term = c.revision, c.compacted, cluster, term
		f.kvs, f.log = maps.Clone(c.kvs), slices.Clone(c.log)
	})
}

func (f *Fake) fault(set func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	set()
	f.changed.Broadcast()
}

// reach waits while the network is frozen.
func (f *Fake) reach(ctx context.Context) error {
	for {
		f.mu.Lock()
		thaw := f.faults.thaw
		f.mu.Unlock()
		if thaw == nil {
			return ctx.Err()
		}
		select {
		case <-thaw:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (f *Fake) header(revision int64) *etcdserverpb.ResponseHeader {
	return &etcdserverpb.ResponseHeader{ClusterId: f.cluster, RaftTerm: f.term, Revision: revision}
}

// ReadLocal implements statestore.Backend.
func (f *Fake) ReadLocal(ctx context.Context, prefixes ...string) (statestore.Snapshot, error) {
	f.mu.Lock()
	state := f.faults.leaderless
	f.mu.Unlock()
	if state == nil {
		state = f
	}
	return state.Read(ctx, prefixes...)
}

// Read implements statestore.Backend.
func (f *Fake) Read(ctx context.Context, prefixes ...string) (statestore.Snapshot, error) {
	if err := f.reach(ctx); err != nil {
		return statestore.Snapshot{}, err
	}
	f.mu.Lock()
	err, hook := f.faults.read, f.faults.afterRead
	if f.faults.leaderless != nil {
		err = rpctypes.ErrNoLeader
	}
	s := statestore.Snapshot{Header: f.header(f.revision)}
	for _, p := range prefixes {
		var kvs []*mvccpb.KeyValue
		for k, kv := range f.kvs {
			if strings.HasPrefix(k, p) {
				kvs = append(kvs, kv)
			}
		}
		s.Ranges = append(s.Ranges, kvs)
	}
	f.mu.Unlock()
	if err != nil {
		return statestore.Snapshot{}, err
	}
	if hook != nil {
		hook(prefixes)
	}
	if err := f.reach(ctx); err != nil {
		return statestore.Snapshot{}, err
	}
	return s, nil
}

// List implements statestore.Backend: in parts of two keys, in no order.
func (f *Fake) List(ctx context.Context, prefix string, each func([]*mvccpb.KeyValue) error) (*etcdserverpb.ResponseHeader, error) {
	s, err := f.Read(ctx, prefix)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	hook := f.faults.onList
	f.mu.Unlock()
	for part := range slices.Chunk(s.Ranges[0], 2) {
		if hook != nil {
			hook()
		}
		if err := f.reach(ctx); err != nil {
			return nil, err
		}
		if err := each(part); err != nil {
			return nil, err
		}
	}
	return s.Header, nil
}

// Watch implements statestore.Backend.
func (f *Fake) Watch(ctx context.Context, prefix string, from int64) (statestore.Watch, error) {
	if err := f.reach(ctx); err != nil {
		return nil, err
	}
	w := &fakeWatch{fake: f, prefix: prefix, next: from, updates: make(chan clientv3.WatchResponse), closed: make(chan struct{})}
	f.mu.Lock()
	f.watches[w] = true
	f.mu.Unlock()
	go w.deliver()
	return w, nil
}

type fakeWatch struct {
	fake    *Fake
	prefix  string
	updates chan clientv3.WatchResponse
	closed  chan struct{}
	once    sync.Once

	// Under fake.mu.
	next     int64 // the revision to look at next
	progress bool  // asked for
	silent   bool
	step     bool // one revision, although held
	repeat   int64
}

func (w *fakeWatch) Updates() clientv3.WatchChan { return w.updates }

func (w *fakeWatch) RequestProgress(ctx context.Context) error {
	if err := w.fake.reach(ctx); err != nil {
		return err
	}
	w.fake.fault(func() { w.progress = !w.fake.faults.noProgress })
	return nil
}

func (w *fakeWatch) Close() {
	w.once.Do(func() { close(w.closed) })
	w.fake.fault(func() { delete(w.fake.watches, w) })
}

// deliver sends events and progress until the watch is closed or compacted.
func (w *fakeWatch) deliver() {
	defer close(w.updates)
	for {
		u, ok := w.wait()
		if !ok || w.fake.reach(context.Background()) != nil {
			return
		}
		select {
		case w.updates <- u:
		case <-w.closed:
			return
		}
		if u.Canceled {
			return
		}
	}
}

// wait returns the next response, as etcd orders them: events before the
// progress that covers them.
func (w *fakeWatch) wait() (u clientv3.WatchResponse, ok bool) {
	f := w.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		select {
		case <-w.closed:
			return u, false
		default:
		}
		switch {
		case w.repeat > 0:
			events := f.log[w.repeat-2]
			w.repeat = 0
			return clientv3.WatchResponse{Header: f.header(f.revision), Events: events}, true
		case w.step && w.next <= f.revision:
			w.step = false
			w.next++
			return clientv3.WatchResponse{Header: f.header(f.revision), Events: f.log[w.next-3]}, true
		case w.silent || f.faults.held || f.faults.thaw != nil || w.next > f.revision+1:
		case w.next <= f.compacted:
			return clientv3.WatchResponse{Header: f.header(f.revision), Canceled: true, CompactRevision: f.compacted + 1}, true
		case w.next <= f.revision:
			var events []*clientv3.Event
			for ; w.next <= f.revision; w.next++ {
				for _, ev := range f.log[w.next-2] {
					if strings.HasPrefix(string(ev.Kv.Key), w.prefix) {
						events = append(events, ev)
					}
				}
			}
			if len(events) > 0 {
				return clientv3.WatchResponse{Header: f.header(f.revision), Events: events}, true
			}
			continue
		case w.progress:
			w.progress = false
			return clientv3.WatchResponse{Header: f.header(f.revision)}, true
		}
		f.changed.Wait()
	}
}
