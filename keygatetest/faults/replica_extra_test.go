package faults

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keygate/authz"
	"keygate/keygatetest"
)

// extra is a key beside those of the world: its records may be anything, and
// what is asked of it is not recorded, so that the scenario itself says what
// must be so.
type extra struct {
	w     *World
	given keygatetest.Key
	id    string // of the key, as it stands in etcd and in logs
	check checkRequest
	// Paths of the records' details, which are JSON.
	credential, app, developer string
}

// extra writes a key, and returns when every replica has heard of it.
func (w *World) extra(given keygatetest.Key) *extra {
	w.T.Helper()
	x := &extra{w: w, given: given, check: newCheckRequest(given.Key)}
	record := given.Record(w.T)
	x.id = record.Key.String()
	x.credential, x.app, x.developer = w.Space.Details(record), w.Space.Details(given.AppRecord(w.T)), w.Space.Details(given.DeveloperRecord(w.T))
	last := int64(0)
	for path, value := range given.Values(w.T, w.Space) {
		last = x.put(path, value)
	}
	w.Applied(last)
	return x
}

// put writes a value, and returns its revision.
func (x *extra) put(path, value string) int64 {
	x.w.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := x.w.Client.Put(ctx, path, value)
	if err != nil {
		x.w.T.Fatalf("put %s: %v", path, err)
	}
	return r.Header.Revision
}

// value of a path.
func (x *extra) value(path string) string {
	x.w.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := x.w.Client.Do(ctx, clientv3.OpGet(path))
	if err != nil || len(r.Get().Kvs) != 1 {
		x.w.T.Fatalf("get %s: %v, %d values", path, err, len(r.Get().Kvs))
	}
	return string(r.Get().Kvs[0].Value)
}

// ask a replica for it, again for a while if it gives no answer that says
// anything of the key: a machine that is busy may keep it from one.
func (x *extra) ask(replica int) (reason authz.Reason) {
	for end := x.w.Rec.Now() + 2*time.Second; ; x.w.Wait(10 * time.Millisecond) {
		reason = x.w.ask(replica, x.check)
		switch reason {
		case authz.Internal, authz.Stale, authz.Overloaded:
			if x.w.Rec.Now() < end {
				continue
			}
		}
		return reason
	}
}

// ask a replica without a record of it. No answer is Internal.
func (w *World) ask(replica int, check checkRequest) authz.Reason {
	ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
	defer cancel()
	resp, err := w.Replicas[replica].client.Check(ctx, check)
	if err != nil {
		return authz.Internal
	}
	reason, ok := answer(resp)
	if !ok {
		return authz.Internal
	}
	return reason
}

// Applied returns when every replica has applied a revision.
func (w *World) Applied(revision int64) {
	w.T.Helper()
	for _, r := range w.Replicas {
		w.Until("the replicas to apply the change", func() bool {
			applied, ok := r.Metric("keygate_applied_revision")
			return ok && int64(applied) >= revision
		})
	}
}
