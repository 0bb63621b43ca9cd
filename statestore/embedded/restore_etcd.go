//go:build !noembed

package embedded

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"keygate/statestore/keyspace"
)

// revisionBump is how far a restored store is ahead of the newest revision that
// the snapshot or the present data has. Whoever knew the old history may have
// seen any revision that was committed after the snapshot, on a disk that is lost
// by now. etcd commits a few thousand a second at most; at 1,500 a second this is
// more than a week of them, and etcd's own documentation proposes it. It is
// small enough: 63 bits hold it nine thousand million times.
const revisionBump = 1_000_000_000

// Names in the data directory while a restore is under way, and after it.
const (
	// restoreFolder holds everything that a restore makes before it is in place.
	restoreFolder = "restore-new"
	// In it: two folders to exchange, the snapshot's database, the new member's
	// folder while it is made, the same when it is complete, and what may be removed
	// at any time.
	restoreProbe    = "probe"
	restoreDatabase = "snapshot.db"
	restoreBuild    = "build"
	restoreSwap     = "swap"
	restoreDiscard  = "discard"
	// restoreMark is a file in the folder of a restored member. It holds the token
	// of that restore and so tells, after a crash, which of two folders is new.
	restoreMark = "restored"
	// movedPrefix and the time are the name of the data that was there before.
	movedPrefix = memberFolder + ".before-restore-"
)

// describe fills in what only the content of the snapshot's database tells. It
// reads all of it and checks its structure.
func describe(file string, info *SnapshotInfo) error {
	return guarded(func() error {
		s, err := snapshot.NewV3(quietLog()).Status(file)
		if err != nil {
			return fmt.Errorf("%s is not a snapshot of etcd: %w", info.File, err)
		}
		info.Revision, info.Keys = s.Revision, int64(s.TotalKey)
		return nil
	})
}

// quietLog makes the lines with which etcd gives up into panics, which guarded
// returns.
func quietLog() *zap.Logger {
	return zap.NewNop().WithOptions(zap.WithFatalHook(zapcore.WriteThenPanic))
}

// guarded turns the panics of etcd's storage, which it has instead of errors,
// into errors.
func guarded(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("the data is damaged or was not written by etcd (panic: %v)", v)
		}
	}()
	return f()
}

// Restore makes a new cluster in cfg.DataDir from a snapshot. What was there is
// moved aside, not deleted. After an error the old data is in place, unless the
// report says Restored; killed at any instant it leaves the old data in place or
// the new, complete, and another Restore cleans up. The old data has the keys,
// values and revision that it had; its files may differ, for the comparison starts
// etcd on them, which writes to its log: the term of its election, at least.
//
//  1. The snapshot's hash is verified; the directory is locked, and stays so.
//  2. Leases, and the keys under them, are of processes that are gone: they are
//     removed, the registrations of replicas among them. A lease that nobody
//     renews would keep its keys until it runs out, and a receipt would wait for
//     replicas that nobody knows.
//  3. What decides in the snapshot is compared with the present data, as etcd
//     reads it ([Difference]); without leave nothing is opened.
//  4. The new member is made beside the old one: a new random cluster token, so a
//     new cluster id; the revision bumped beyond every one of before; all of it
//     marked as compacted. So every watch and every replica that knew the old
//     history is told so, and starts again.
//  5. The new member is started, read and compared with what it should hold.
//  6. It is exchanged with the old one in one step.
func Restore(ctx context.Context, cfg RestoreConfig) (*RestoreReport, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.QuotaBytes == 0 {
		cfg.QuotaBytes = DefaultQuotaBytes
	}
	report := &RestoreReport{}
	socket, err := socketPath(cfg.DataDir)
	if err != nil {
		return report, err
	}
	cfg.DataDir = filepath.Dir(socket)
	file, err := os.Open(cfg.Snapshot)
	if err != nil {
		return report, fmt.Errorf("snapshot: %w", err)
	}
	defer file.Close()
	if report.Snapshot, err = checkSnapshot(file); err != nil {
		return report, fmt.Errorf("snapshot: %w", err)
	}
	// A directory that holds nothing is made only for a restore that goes on.
	member := filepath.Join(cfg.DataDir, memberFolder)
	if _, err := os.Stat(member); errors.Is(err, fs.ErrNotExist) {
		report.NotCompared = "there is no data in " + cfg.DataDir
		if err := judge(cfg, report); err != nil {
			return report, errors.Join(err, describe(cfg.Snapshot, &report.Snapshot))
		}
	}
	dir, err := openDirectory(ctx, cfg.DataDir)
	if err != nil {
		return report, refused{err}
	}
	defer dir.close()
	if _, err := os.Stat(member); err == nil {
		report.NotCompared = "" // made while nobody held the lock
	}
	if info, err := os.Lstat(member); err == nil && !info.IsDir() {
		return report, refused{fmt.Errorf("restore refused: %s is a link or a file, and the new data would stand in its place in %s, on the disk of that: "+
			"make it a folder there (move the data, or mount its disk on %[2]s), or restore to a directory that holds no data", member, dir.path)}
	}
	r := &restoration{cfg: cfg, dir: dir, file: file, report: report, folder: filepath.Join(dir.path, restoreFolder)}
	if err := r.cleanUp(); err != nil {
		return report, fmt.Errorf("clean up after an earlier restore: %w", err)
	}
	err = r.run(ctx)
	if cleanErr := r.discard(); cleanErr != nil {
		cfg.Logger.Warn("a restore left something behind; the next one removes it", "error", cleanErr)
	}
	return report, err
}

// restoration is one restore under way, in a directory that is locked.
type restoration struct {
	cfg    RestoreConfig
	dir    *directory
	file   *os.File
	report *RestoreReport
	folder string
}

func (r *restoration) path(name ...string) string {
	return filepath.Join(append([]string{r.folder}, name...)...)
}

func (r *restoration) run(ctx context.Context) error {
	if err := os.Mkdir(r.folder, 0o700); err != nil {
		return err
	}
	if err := r.probe(); err != nil {
		return err
	}
	token, err := clusterToken(r.folder)
	if err != nil {
		return err
	}
	if err := r.copySnapshot(); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if err := describe(r.path(restoreDatabase), &r.report.Snapshot); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	var want content
	if err := guarded(func() (err error) { want, err = r.prepare(ctx); return err }); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	bump := max(want.revision, r.report.Now) - want.lastKey + revisionBump
	if err := guarded(func() error { return r.build(token, bump) }); err != nil {
		return fmt.Errorf("make the new member: %w", err)
	}
	if err := r.prove(ctx, want); err != nil {
		return fmt.Errorf("start the new member: %w", err)
	}
	if err := r.swap(token); err != nil {
		return fmt.Errorf("put the new member in its place: %w", err)
	}
	return nil
}

// probe tries what swap will do, where there is data to exchange: not every file
// system can, and that is better known before the work than after it.
func (r *restoration) probe() error {
	if _, err := os.Lstat(filepath.Join(r.dir.path, memberFolder)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	a, b := r.path(restoreProbe), r.path(restoreProbe+"-2")
	if err := errors.Join(os.Mkdir(a, 0o700), os.Mkdir(b, 0o700)); err != nil {
		return err
	}
	if err := exchange(a, b); err != nil {
		return refused{fmt.Errorf("restore refused: the file system of %s cannot exchange two folders in one step (%w): restore to a directory that holds no data", r.dir.path, err)}
	}
	return errors.Join(os.Remove(a), os.Remove(b))
}

// copySnapshot copies the database, and compares the hash once more with what
// it copied: the file may have changed since it was looked at.
func (r *restoration) copySnapshot() error {
	info, err := checkShape(r.file)
	if err != nil {
		return err
	}
	to, err := os.OpenFile(r.path(restoreDatabase), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(copyDatabase(to, r.file, info), to.Close())
}

// content is what the restored member must hold.
type content struct {
	sum      []byte
	revision int64 // of the store, before the bump
	lastKey  int64 // the newest revision of a key, which the bump is added to
}

// prepare makes the copy what the new member will hold.
func (r *restoration) prepare(ctx context.Context) (want content, err error) {
	lg := quietLog()
	be := backend.NewDefaultBackend(lg, r.path(restoreDatabase), backend.WithMmapSize(0))
	defer be.Close()
	if err := schema.Validate(lg, be.ReadTx()); err != nil {
		return want, fmt.Errorf("snapshot: it is of another version of etcd: %w", err)
	}
	alarms := carriedAlarms(be)
	for _, a := range alarms {
		if a.Alarm == etcdserverpb.AlarmType_CORRUPT {
			r.report.Armed = []string{a.Alarm.String()}
		}
	}
	kv := mvcc.New(lg, be, &lease.FakeLessor{}, mvcc.StoreConfig{CompactionBatchLimit: 100_000})
	defer kv.Close()
	// Not etcdutl's figures: it counts the record of an earlier bump as a key, and
	// overlooks a compaction.
	r.report.Snapshot.Revision = kv.Rev()
	counted, err := kv.Range(ctx, []byte{0}, []byte{}, mvcc.RangeOptions{CountOnly: true})
	if err != nil {
		return want, fmt.Errorf("snapshot: count its keys: %w", err)
	}
	r.report.Snapshot.Keys = int64(counted.Count)
	if err := r.expire(ctx, be, kv); err != nil {
		return want, err
	}
	if err := r.compare(ctx, kv); err != nil {
		return want, err
	}
	if err := judge(r.cfg, r.report); err != nil {
		return want, err
	}
	if r.cfg.KeepRevocations {
		for _, o := range r.report.Difference.Opens {
			if o.now == nil {
				kv.DeleteRange([]byte(o.Key), nil)
			} else {
				kv.Put([]byte(o.Key), o.now, lease.NoLease)
			}
			r.report.Kept++
		}
	}
	kv.Commit()
	if err := r.shrink(ctx, be, kv); err != nil {
		return want, err
	}
	r.disarm(be, alarms)

	want.revision = kv.Rev()
	sum := newSum()
	for e, err := range stored(ctx, kv) {
		if err != nil {
			return want, err
		}
		sum.add(e)
	}
	want.sum = sum.hash.Sum(nil)
	tx := be.ReadTx()
	tx.RLock()
	defer tx.RUnlock()
	return want, tx.UnsafeForEach(schema.Key, func(k, _ []byte) error {
		want.lastKey = max(want.lastKey, mvcc.BytesToRev(k).Main)
		return nil
	})
}

// expire removes all leases and what is under them, as if each had run out.
func (r *restoration) expire(ctx context.Context, be backend.Backend, kv mvcc.KV) error {
	replicas := r.cfg.Space.Replicas()
	var keys []string
	for e, err := range pages(ctx, kv) {
		if err != nil {
			return err
		}
		if e.Lease != 0 || strings.HasPrefix(string(e.Key), replicas) {
			keys = append(keys, string(e.Key))
		}
	}
	for _, key := range keys {
		kv.DeleteRange([]byte(key), nil)
	}
	r.report.Expired = len(keys)
	kv.Commit()

	tx := be.BatchTx()
	tx.LockOutsideApply()
	defer tx.Unlock()
	schema.UnsafeCreateLeaseBucket(tx) // where there is none yet
	for _, l := range schema.MustUnsafeGetAllLeases(tx) {
		schema.UnsafeDeleteLease(tx, l)
		r.report.Leases++
	}
	return nil
}

// compare fills in what the restore would change. That the present data cannot
// be read is no error.
func (r *restoration) compare(ctx context.Context, kv mvcc.KV) error {
	if r.report.NotCompared != "" {
		return nil
	}
	now, err := startReader(ctx, r.cfg, r.dir, ".")
	if err == nil {
		defer now.stop()
		r.report.Difference, err = compare(r.cfg.Space, stored(ctx, kv), now.entries())
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		r.report.NotCompared, r.report.Difference = fmt.Sprintf("the data in %s cannot be read: %v", r.dir.path, err), Difference{}
		return nil
	}
	r.report.Compared, r.report.Now = true, now.header.Revision
	return nil
}

// carriedAlarms are those in the snapshot.
func carriedAlarms(be backend.Backend) []*etcdserverpb.AlarmMember {
	store := schema.NewAlarmBackend(quietLog(), be)
	store.CreateAlarmBucket()
	alarms, err := store.GetAllAlarms()
	if err != nil {
		panic(err) // guarded; a bucket that cannot be parsed
	}
	return alarms
}

// shrink drops the history, which the restored member marks as compacted
// anyway, and returns its room to the disk. etcd's limit is on the file.
func (r *restoration) shrink(ctx context.Context, be backend.Backend, kv mvcc.KV) error {
	done, err := kv.Compact(traceutil.TODO(), kv.Rev())
	if err != nil && !errors.Is(err, mvcc.ErrCompacted) {
		return fmt.Errorf("snapshot: compact: %w", err)
	}
	select {
	case <-done:
	case <-ctx.Done():
		return ctx.Err()
	}
	kv.Commit()
	if err := be.Defrag(); err != nil {
		return fmt.Errorf("snapshot: defragment: %w", err)
	}
	return nil
}

// disarm clears alarms of the old members, which etcdutl leaves in place and
// under which the new member would refuse every write, or all: the shortage of
// room if there is room now, and the damage, which judge has asked about.
func (r *restoration) disarm(be backend.Backend, alarms []*etcdserverpb.AlarmMember) {
	store := schema.NewAlarmBackend(quietLog(), be)
	r.report.Armed = nil
	for _, a := range alarms {
		if a.Alarm == etcdserverpb.AlarmType_NOSPACE && be.Size() >= r.cfg.QuotaBytes {
			r.report.Armed = append(r.report.Armed, a.Alarm.String())
			continue
		}
		store.MustDeleteAlarm(a)
		r.report.Disarmed = append(r.report.Disarmed, a.Alarm.String())
	}
	store.ForceCommit()
}

// build makes the new member's folder, by etcd's own tool.
func (r *restoration) build(token string, bump int64) error {
	peer := "http://" + peerHost
	return snapshot.NewV3(quietLog()).Restore(snapshot.RestoreConfig{
		SnapshotPath:        r.path(restoreDatabase),
		SkipHashCheck:       true, // verified before it was changed
		Name:                memberName,
		OutputDataDir:       r.path(restoreBuild),
		PeerURLs:            []string{peer},
		InitialCluster:      memberName + "=" + peer,
		InitialClusterToken: token,
		RevisionBump:        uint64(bump),
		MarkCompacted:       true,
	})
}

// prove starts the new member where it is and reads all that it holds.
func (r *restoration) prove(ctx context.Context, want content) error {
	member, err := startReader(ctx, r.cfg, r.dir, filepath.Join(restoreFolder, restoreBuild))
	if err != nil {
		return err
	}
	defer member.stop()
	sum := newSum()
	for e, err := range member.entries() {
		if err != nil {
			return err
		}
		sum.add(e)
	}
	if !bytes.Equal(sum.hash.Sum(nil), want.sum) {
		return errors.New("it does not hold what the snapshot held")
	}
	if above := max(want.revision, r.report.Now); member.header.Revision < above+revisionBump {
		return fmt.Errorf("its revision is %d, want at least %d", member.header.Revision, above+revisionBump)
	}
	r.report.Revision, r.report.ClusterID = member.header.Revision, member.header.ClusterID
	return nil
}

// swap puts the new member into the place of the old one.
func (r *restoration) swap(token string) error {
	built := r.path(restoreBuild, memberFolder)
	if err := writeSynced(filepath.Join(built, restoreMark), token+"\n"); err != nil {
		return err
	}
	if err := syncTree(r.folder); err != nil {
		return err
	}
	// From here on the folder may be mistaken for data: cleanUp reads its mark.
	if err := os.Rename(built, r.path(restoreSwap)); err != nil {
		return err
	}
	if err := syncFile(r.folder); err != nil {
		return err
	}
	// etcd reads the token only where there is no member: it may go first.
	name := filepath.Join(r.dir.path, tokenFile)
	if err := writeSynced(name+".new", token+"\n"); err != nil {
		return err
	}
	if err := os.Rename(name+".new", name); err != nil {
		return err
	}
	member := filepath.Join(r.dir.path, memberFolder)
	if _, err := os.Lstat(member); errors.Is(err, fs.ErrNotExist) {
		if err := os.Rename(r.path(restoreSwap), member); err != nil {
			return err
		}
		r.report.Restored = true
		return syncFile(r.dir.path)
	}
	// With two renames there would be an instant without data, and a start in it
	// would make an empty store.
	if err := exchange(r.path(restoreSwap), member); err != nil {
		return fmt.Errorf("exchange %s with the new member in one step (is it where another disk is mounted?): %w; restore to a directory that holds no data", member, err)
	}
	r.report.Restored = true
	if err := errors.Join(syncFile(r.dir.path), syncFile(r.folder), r.moveAside()); err != nil {
		return fmt.Errorf("the snapshot is in place, but the data of before: %w", err)
	}
	return nil
}

// moveAside gives the old data, which the exchange has left in the swap folder,
// a name of its own.
func (r *restoration) moveAside() error {
	name := filepath.Join(r.dir.path, movedPrefix+time.Now().UTC().Format("20060102T150405.000Z"))
	if _, err := os.Lstat(name); err == nil {
		return fmt.Errorf("%s: %w", name, fs.ErrExist)
	}
	if err := os.Rename(r.path(restoreSwap), name); err != nil {
		return err
	}
	r.report.MovedTo = name
	return syncFile(r.dir.path)
}

// cleanUp removes what an earlier restore, cut off, has left. If it came as far
// as the exchange, the swap folder is the old data and is kept.
func (r *restoration) cleanUp() error {
	if _, err := os.Lstat(r.folder); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if _, err := os.Lstat(r.path(restoreSwap)); err == nil {
		token, err := os.ReadFile(r.path(tokenFile))
		if err != nil {
			return err
		}
		mark, err := os.ReadFile(r.path(restoreSwap, restoreMark))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if !bytes.Equal(mark, token) {
			if err := r.moveAside(); err != nil {
				return err
			}
			r.cfg.Logger.Warn("an earlier restore was cut off after it was in place; the data of before it was moved", "to", r.report.MovedTo)
			r.report.MovedTo = ""
		}
	}
	return r.discard()
}

// discard removes the restore's folder, but never a swap folder that holds the
// old data.
func (r *restoration) discard() error {
	if _, err := os.Lstat(r.path(restoreSwap)); err == nil {
		mark, _ := os.ReadFile(r.path(restoreSwap, restoreMark))
		if token, err := os.ReadFile(r.path(tokenFile)); err != nil || !bytes.Equal(mark, token) {
			return fmt.Errorf("%s holds data", r.path(restoreSwap))
		}
		// Out of the way in one step: half of it would be taken for old data.
		if err := os.Rename(r.path(restoreSwap), r.path(restoreDiscard)); err != nil {
			return err
		}
	}
	return os.RemoveAll(r.folder)
}

// syncTree makes a folder and all in it outlast the machine.
func syncTree(folder string) error {
	return filepath.WalkDir(folder, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return syncFile(name)
	})
}

// sum is a hash of keys and values in their order.
type sum struct{ hash hash.Hash }

func newSum() sum { return sum{sha256.New()} }

func (s sum) add(e keyspace.Entry) {
	for _, b := range [][]byte{[]byte(e.Key), e.Value} {
		s.hash.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		s.hash.Write(b)
	}
}
