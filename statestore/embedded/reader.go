//go:build !noembed

package embedded

import (
	"bufio"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"golang.org/x/sys/unix"

	"keygate/statestore/keyspace"
)

const (
	// readVariable tells a process that calls Serve to read the data out instead:
	// of the member in this folder below the data directory.
	readVariable = "KEYGATE_READ_MEMBER"
	// The reader's files. It inherits the lock, so that nobody can get in between
	// what it has read and what its parent does.
	readerLock = 3
	readerPipe = 4
	// readerSocket is not where anybody looks for etcd: what was written during
	// the comparison would be lost unseen.
	readerSocket = "read.sock"
	// readerPatience is how long a reader may take to its first answer. etcd starts
	// in under a second, and reads its log at 100 MB a second.
	readerPatience = time.Minute
	// pageKeys is the number of keys per read of a whole store; smaller pages count
	// the rest of it more often.
	pageKeys = 10_000
)

// message of a reader: a header, entries, and an end.
type message struct {
	ClusterID uint64
	Revision  int64 // of the header
	Key       string
	Value     []byte
	End       bool
}

// pages reads all of a store at one revision, in the order of the keys.
func pages(ctx context.Context, kv mvcc.ReadView) iter.Seq2[*mvccpb.KeyValue, error] {
	return func(yield func(*mvccpb.KeyValue, error) bool) {
		rev, from := kv.Rev(), []byte{0}
		for {
			r, err := kv.Range(ctx, from, []byte{}, mvcc.RangeOptions{Rev: rev, Limit: pageKeys})
			if err != nil {
				yield(nil, fmt.Errorf("read the store: %w", err))
				return
			}
			for _, e := range r.KVs {
				if !yield(e, nil) {
					return
				}
			}
			if len(r.KVs) < pageKeys {
				return
			}
			from = append(r.KVs[len(r.KVs)-1].Key, 0)
		}
	}
}

// stored is pages without what etcd adds.
func stored(ctx context.Context, kv mvcc.ReadView) entries {
	return func(yield func(keyspace.Entry, error) bool) {
		for e, err := range pages(ctx, kv) {
			if err != nil {
				yield(keyspace.Entry{}, err)
				return
			}
			if !yield(keyspace.Entry{Key: string(e.Key), Value: e.Value}, nil) {
				return
			}
		}
	}
}

// serveReader starts the member in a folder below the data directory, writes
// all that it holds to the parent, and ends.
func serveReader(ctx context.Context, cfg Config, folder string) error {
	lock := os.NewFile(readerLock, "lock")
	out := os.NewFile(readerPipe, "pipe")
	if lock == nil || out == nil || unix.Flock(readerLock, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return permanent(fmt.Errorf("%s is set, and this is not the reader of a restore: unset it", readVariable))
	}
	socket, err := socketPath(cfg.DataDir)
	if err != nil {
		return err
	}
	// Sockets have short relative names here, however long the path.
	if err := os.Chdir(filepath.Join(filepath.Dir(socket), folder)); err != nil {
		return permanent(err)
	}
	logger := cfg.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	log := newBridge(logger)
	go log.run()
	defer log.flush()
	config := embedConfig(cfg, &directory{path: "."}, log)
	config.ListenClientUrls = []url.URL{{Scheme: "unix", Path: readerSocket}}
	config.AdvertiseClientUrls = []url.URL{{Scheme: "unix", Path: socket}} // stands in the data
	e, err := start(ctx, config, log)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	defer func() {
		log.closing.Store(true)
		e.Close()
	}()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-e.Err():
		return stopped(err)
	case <-e.Server.StopNotify():
		return stopped(nil)
	case <-e.Server.ReadyNotify():
	}
	log.started.Store(true)
	if err := e.Server.LinearizableReadNotify(ctx); err != nil {
		return fmt.Errorf("linearizable read: %w", err)
	}
	w := bufio.NewWriterSize(out, 1<<20)
	enc := gob.NewEncoder(w)
	err = enc.Encode(message{ClusterID: uint64(e.Server.Cluster().ID()), Revision: e.Server.KV().Rev()})
	for entry, readErr := range stored(ctx, e.Server.KV()) {
		if err = errors.Join(err, readErr); err != nil {
			return err
		}
		err = enc.Encode(message{Key: entry.Key, Value: entry.Value})
	}
	return errors.Join(err, enc.Encode(message{End: true}), w.Flush())
}

// reader is a process that reads a member's data out: a database that is
// damaged may end the process that opens it, and a restore must outlive that.
type reader struct {
	header message
	cmd    *exec.Cmd
	cancel context.CancelFunc
	pipe   *os.File
	dec    *gob.Decoder
	log    *childLog
	slow   atomic.Bool // killed for having no answer
	ended  error       // how the process ended, once gone
	gone   bool
	thread chan struct{} // closed to let go of the thread
}

// startReader returns a reader that has started the member in a folder below
// the data directory. The caller stops it.
func startReader(ctx context.Context, cfg RestoreConfig, dir *directory, folder string) (*reader, error) {
	child, err := NewChild(ChildConfig{Path: cfg.Path, Args: cfg.Args, DataDir: dir.path, QuotaBytes: cfg.QuotaBytes})
	if err != nil {
		return nil, err
	}
	in, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer out.Close()
	ctx, cancel := context.WithCancel(ctx)
	r := &reader{cancel: cancel, pipe: in, dec: gob.NewDecoder(bufio.NewReaderSize(in, 1<<20)), log: &childLog{logger: cfg.Logger}, thread: make(chan struct{})}
	r.cmd = exec.CommandContext(ctx, child.path, child.args...)
	r.cmd.Env = append(os.Environ(), supervisedVariable+"=1", readVariable+"="+folder)
	r.cmd.Stdout, r.cmd.Stderr = r.log, r.log
	r.cmd.WaitDelay = time.Second
	r.cmd.SysProcAttr = childAttributes()
	r.cmd.ExtraFiles = []*os.File{dir.lock, out}
	// It ends with the thread that starts it, so with this process: see Child.Run.
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		started <- r.cmd.Start()
		<-r.thread
	}()
	if err := <-started; err != nil {
		close(r.thread)
		cancel()
		in.Close()
		return nil, fmt.Errorf("start a reader: %w", err)
	}
	out.Close() // else the pipe would not end with the process
	timeout := time.AfterFunc(readerPatience, func() { r.slow.Store(true); cancel() })
	defer timeout.Stop()
	if err := r.dec.Decode(&r.header); err != nil {
		return nil, r.failed(err)
	}
	return r, nil
}

// entries yields what the member holds, all of it or an error at the end. It
// may be called once.
func (r *reader) entries() entries {
	return func(yield func(keyspace.Entry, error) bool) {
		for {
			var m message
			if err := r.dec.Decode(&m); err != nil {
				yield(keyspace.Entry{}, r.failed(err))
				return
			}
			if m.End || !yield(keyspace.Entry{Key: m.Key, Value: m.Value}, nil) {
				return
			}
		}
	}
}

// failed stops the reader, which did not come to its end, and says why.
func (r *reader) failed(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = errors.New("it ended early")
	}
	// It ends by itself, its last words written, before the pipe is closed.
	r.wait()
	if r.slow.Load() {
		err = fmt.Errorf("etcd did not start in it within %v", readerPatience)
	} else if lines := r.log.last(); len(lines) > 0 {
		err = errors.New(lines[len(lines)-1])
	} else if r.ended != nil {
		err = fmt.Errorf("%w: %w", err, r.ended)
	}
	r.stop()
	return err
}

func (r *reader) wait() {
	if !r.gone {
		r.gone = true
		r.ended = r.cmd.Wait()
		close(r.thread)
	}
}

// stop returns when the process is gone.
func (r *reader) stop() {
	r.pipe.Close()
	if !r.gone {
		// etcd stops in order when nobody reads on, or has nothing more to write.
		timer := time.AfterFunc(stopWait, r.cancel)
		r.wait()
		timer.Stop()
	}
	r.cancel()
}
