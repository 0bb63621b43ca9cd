package statestore

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// brokenTimeout bounds the question what is wrong with a connection.
const brokenTimeout = 100 * time.Millisecond

// EtcdConfig says how to reach an etcd cluster.
type EtcdConfig struct {
	// Endpoints, such as "http://127.0.0.1:2379", "https://etcd-0:2379" or
	// "unix:///run/etcd.sock". At least one.
	Endpoints []string
	// CACert, Cert and Key are PEM files. CACert empty means the system's
	// roots. Cert and Key go together; they are read again for each connection,
	// so a renewed certificate needs no restart.
	CACert, Cert, Key string
	// User and Password; empty for none.
	User, Password string
	// ReadPassword, if not nil, is asked for the password at each login instead, so
	// that one that is changed needs no restart. It must be safe for concurrent
	// use.
	ReadPassword func() (string, error)
	// DialTimeout bounds the first connection and a login. Zero means 5 s.
	DialTimeout time.Duration
}

// Dial returns a client of the cluster. It does not wait for a connection,
// except to log in. The caller closes the client.
func (c EtcdConfig) Dial() (*clientv3.Client, error) {
	if len(c.Endpoints) == 0 {
		return nil, errors.New("dial etcd: no endpoints")
	}
	if c.ReadPassword != nil {
		password, err := c.ReadPassword()
		if err != nil {
			return nil, fmt.Errorf("dial etcd: password: %w", err)
		}
		c.Password = password
	}
	cfg := clientv3.Config{
		Endpoints:   c.Endpoints,
		DialTimeout: orDefault(c.DialTimeout, 5*time.Second),
		// A backstop: what notices a dead connection in time is the probe. The
		// server allows no more, and no pings without a stream.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		Username:             c.User,
		Password:             c.Password,
		Logger:               zap.NewNop(), // errors are returned; its own lines would repeat them
		DialOptions: []grpc.DialOption{
			grpc.WithUserAgent("keygate"),
			// By default the wait between two attempts grows to two minutes, and so
			// would an outage after etcd is back.
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
				MinConnectTimeout: time.Second,
			}),
		},
	}
	if strings.HasPrefix(c.Endpoints[0], "https://") || c.CACert != "" || c.Cert != "" {
		t, err := c.tls()
		if err != nil {
			return nil, fmt.Errorf("dial etcd: %w", err)
		}
		cfg.TLS = t
	}
	cli, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("dial etcd at %s: %w", strings.Join(c.Endpoints, ","), err)
	}
	return cli, nil
}

func (c EtcdConfig) tls() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CACert != "" {
		pem, err := os.ReadFile(c.CACert)
		if err != nil {
			return nil, fmt.Errorf("read CA certificate: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA certificate: %s holds no PEM certificate", c.CACert)
		}
	}
	if c.Cert != "" {
		load := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
			if err != nil {
				return nil, fmt.Errorf("read client certificate: %w", err)
			}
			return &pair, nil
		}
		if _, err := load(); err != nil { // now, where somebody reads the error
			return nil, err
		}
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return t, nil
}

// Etcd is the Backend and the Registry over a real cluster.
type Etcd struct {
	cfg     EtcdConfig
	watches atomic.Int64

	reader struct {
		sync.Mutex
		cli    *clientv3.Client // nil before the first read
		closed bool
	}
	// renewals are one stream: each new one would be a login, which costs etcd a
	// bcrypt and a write.
	renewals struct {
		sync.Mutex
		stream etcdserverpb.Lease_LeaseKeepAliveClient // nil: none
		end    context.CancelFunc
	}
}

// NewEtcd returns a backend with a client of its own for reads, made at the
// first one: an etcd that cannot be reached, or refuses the login, is what a
// read says. An error is about the configuration. Close it after the store's
// Run has returned.
func NewEtcd(cfg EtcdConfig) (*Etcd, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, errors.New("etcd: no endpoints")
	}
	if _, err := cfg.tls(); err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	return &Etcd{cfg: cfg}, nil
}

// dial is Dial with what is left of ctx for a login.
func (b *Etcd) dial(ctx context.Context) (*clientv3.Client, error) {
	cfg := b.cfg
	if deadline, ok := ctx.Deadline(); ok {
		cfg.DialTimeout = max(time.Until(deadline), time.Millisecond)
	}
	cli, err := cfg.Dial()
	if err != nil && (errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded) {
		// The login's time was over, and the client is gone that knew why.
		cfg.User, cfg.Password, cfg.ReadPassword = "", "", nil
		if other, failed := cfg.Dial(); failed == nil {
			err = fmt.Errorf("%w%s", err, broken(other))
			_ = other.Close()
		}
	}
	return cli, err
}

// client returns the reading client.
func (b *Etcd) client(ctx context.Context) (*clientv3.Client, error) {
	b.reader.Lock()
	defer b.reader.Unlock()
	if b.reader.closed {
		return nil, errors.New("etcd: closed")
	}
	if b.reader.cli == nil {
		cli, err := b.dial(ctx)
		if err != nil {
			return nil, err
		}
		b.reader.cli = cli
	}
	return b.reader.cli, nil
}

// Close ends the reading client.
func (b *Etcd) Close() error {
	b.renewals.Lock()
	if b.renewals.stream != nil {
		b.endRenewals()
	}
	b.renewals.Unlock()
	b.reader.Lock()
	defer b.reader.Unlock()
	b.reader.closed = true
	if b.reader.cli == nil {
		return nil
	}
	return b.reader.cli.Close()
}

// Read implements Backend.
func (b *Etcd) Read(ctx context.Context, prefixes ...string) (Snapshot, error) {
	return b.read(ctx, prefixes, clientv3.WithPrefix())
}

// ReadLocal implements Backend.
func (b *Etcd) ReadLocal(ctx context.Context, prefixes ...string) (Snapshot, error) {
	return b.read(ctx, prefixes, clientv3.WithPrefix(), clientv3.WithSerializable())
}

func (b *Etcd) read(ctx context.Context, prefixes []string, how ...clientv3.OpOption) (Snapshot, error) {
	cli, err := b.client(ctx)
	if err != nil {
		return Snapshot{}, err
	}
	if len(prefixes) == 1 { // a plain range is a little cheaper than a transaction
		r, err := cli.Get(ctx, prefixes[0], how...)
		if err != nil {
			return Snapshot{}, b.explain(cli, err)
		}
		return Snapshot{Header: r.Header, Ranges: [][]*mvccpb.KeyValue{r.Kvs}}, nil
	}
	ops := make([]clientv3.Op, len(prefixes))
	for i, p := range prefixes {
		ops[i] = clientv3.OpGet(p, how...)
	}
	r, err := cli.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return Snapshot{}, b.explain(cli, err)
	}
	s := Snapshot{Header: r.Header, Ranges: make([][]*mvccpb.KeyValue, len(prefixes))}
	for i := range prefixes {
		s.Ranges[i] = r.Responses[i].GetResponseRange().Kvs
	}
	return s, nil
}

// listPage is how many keys a page has where etcd cannot stream a list. Each page
// counts the rest of the range, so small ones are quadratic.
const listPage = 10_000

// List implements Backend: as a stream, which etcd has since 3.7, or in pages.
func (b *Etcd) List(ctx context.Context, prefix string, each func([]*mvccpb.KeyValue) error) (*etcdserverpb.ResponseHeader, error) {
	cli, err := b.client(ctx)
	if err != nil {
		return nil, err
	}
	h, err := b.listStream(ctx, cli, prefix, each)
	if status.Code(err) == codes.Unimplemented {
		h, err = b.listPages(ctx, cli, prefix, each)
	}
	if err != nil {
		return nil, b.explain(cli, err)
	}
	return h, nil
}

func (b *Etcd) listStream(ctx context.Context, cli *clientv3.Client, prefix string, each func([]*mvccpb.KeyValue) error) (h *etcdserverpb.ResponseHeader, err error) {
	ctx, cancel := context.WithCancel(ctx)
	parts, err := cli.GetStream(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		cancel()
		return nil, err
	}
	defer func() {
		cancel()
		for range parts { // whoever sends them must be able to leave
		}
	}()
	for part := range parts {
		if err := part.Err(); err != nil {
			return nil, err
		}
		if part.Header != nil { // on the last part only
			h = part.Header
		}
		if err := each(part.Kvs); err != nil {
			return nil, err
		}
	}
	if h == nil {
		return nil, errors.New("etcd: a list without a header")
	}
	return h, nil
}

func (b *Etcd) listPages(ctx context.Context, cli *clientv3.Client, prefix string, each func([]*mvccpb.KeyValue) error) (h *etcdserverpb.ResponseHeader, err error) {
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	how := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(listPage)}
	for {
		r, err := cli.Get(ctx, from, how...)
		if err != nil {
			return nil, err
		}
		if h == nil {
			h = r.Header
			how = append(how, clientv3.WithRev(h.Revision))
		}
		if err := each(r.Kvs); err != nil || !r.More {
			return h, err
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}

// explain adds what the client keeps to itself: it repeats a read until ctx
// ends, whatever is wrong with the connection. A client whose password etcd does
// not take any more is given up: it would log in with the same one for ever.
func (b *Etcd) explain(cli *clientv3.Client, err error) error {
	if errors.Is(err, rpctypes.ErrAuthFailed) {
		b.reader.Lock()
		if b.reader.cli == cli {
			b.reader.cli = nil
		}
		b.reader.Unlock()
		_ = cli.Close()
	}
	if errors.Is(err, context.DeadlineExceeded) && cli.ActiveConnection().GetState() != connectivity.Ready {
		return fmt.Errorf("no connection to etcd at %s: %w%s", strings.Join(b.cfg.Endpoints, ","), err, broken(cli))
	}
	return err
}

// broken is what is wrong with the connection, such as a certificate that has
// expired: a call that the client does not repeat fails with it at once.
func broken(cli *clientv3.Client) string {
	ctx, cancel := context.WithTimeout(context.Background(), brokenTimeout)
	defer cancel()
	_, err := etcdserverpb.NewKVClient(cli.ActiveConnection()).Range(ctx, &etcdserverpb.RangeRequest{Key: []byte{0}})
	if status.Code(err) != codes.Unavailable {
		return ""
	}
	return ": " + status.Convert(err).Message()
}

// Watch implements Backend.
func (b *Etcd) Watch(ctx context.Context, prefix string, from int64) (Watch, error) {
	cli, err := b.dial(ctx)
	if err != nil {
		return nil, err
	}
	// The client chooses the stream by the outgoing metadata. A number that no
	// other watch has keeps this one, and the progress it asks for, alone.
	md := metadata.Pairs("keygate-watch", strconv.FormatInt(b.watches.Add(1), 10))
	alive, cancel := context.WithCancel(metadata.NewOutgoingContext(context.Background(), md))
	w := &etcdWatch{cli: cli, cancel: cancel, md: md}
	stop := context.AfterFunc(ctx, cancel)
	// Blocks until the server has created the watch, or for ever.
	w.updates = cli.Watch(alive, prefix, clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithFragment())
	if !stop() {
		w.Close()
		return nil, ctx.Err()
	}
	return w, nil
}

type etcdWatch struct {
	cli     *clientv3.Client
	updates clientv3.WatchChan
	cancel  context.CancelFunc
	md      metadata.MD
}

func (w *etcdWatch) Updates() clientv3.WatchChan { return w.updates }

func (w *etcdWatch) RequestProgress(ctx context.Context) error {
	return w.cli.RequestProgress(metadata.NewOutgoingContext(ctx, w.md))
}

// Close gives up the client too: a new stream on the same connection could sit
// on the same dead transport.
func (w *etcdWatch) Close() {
	w.cancel()
	_ = w.cli.Close()
}

// Grant implements Registry.
func (b *Etcd) Grant(ctx context.Context, ttl time.Duration) (lease int64, granted time.Duration, err error) {
	cli, err := b.client(ctx)
	if err != nil {
		return 0, 0, err
	}
	r, err := cli.Grant(ctx, int64(ttl/time.Second))
	if err != nil {
		return 0, 0, b.explain(cli, err)
	}
	return int64(r.ID), time.Duration(r.TTL) * time.Second, nil
}

// Renew implements Registry.
func (b *Etcd) Renew(ctx context.Context, lease int64) (granted time.Duration, err error) {
	cli, err := b.client(ctx)
	if err != nil {
		return 0, err
	}
	s := &b.renewals
	s.Lock()
	defer s.Unlock()
	if s.stream == nil {
		alive, end := context.WithCancel(context.Background())
		opening := context.AfterFunc(ctx, end)
		s.stream, err = etcdserverpb.NewLeaseClient(cli.ActiveConnection()).LeaseKeepAlive(alive)
		if s.end = end; err != nil || !opening() {
			b.endRenewals()
			return 0, b.explain(cli, cmp.Or(err, ctx.Err()))
		}
	}
	asking := context.AfterFunc(ctx, s.end)
	err = s.stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: lease})
	var r *etcdserverpb.LeaseKeepAliveResponse
	if err == nil || errors.Is(err, io.EOF) { // EOF: Recv says why
		r, err = s.stream.Recv()
	}
	if !asking() || err != nil {
		b.endRenewals()
		return 0, b.explain(cli, cmp.Or(ctx.Err(), rpctypes.Error(err)))
	}
	if r.TTL <= 0 {
		return 0, rpctypes.ErrLeaseNotFound
	}
	return time.Duration(r.TTL) * time.Second, nil
}

// endRenewals gives the stream up; the next renewal opens another. The caller
// holds the lock.
func (b *Etcd) endRenewals() {
	b.renewals.end()
	b.renewals.stream = nil
}

// Release implements Registry.
func (b *Etcd) Release(ctx context.Context, lease int64) error {
	cli, err := b.client(ctx)
	if err != nil {
		return err
	}
	_, err = cli.Revoke(ctx, clientv3.LeaseID(lease))
	return err
}

// Write implements Registry.
func (b *Etcd) Write(ctx context.Context, path, value string, lease, created int64) (Written, error) {
	cli, err := b.client(ctx)
	if err != nil {
		return Written{}, err
	}
	r, err := cli.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(path), "=", created)).
		Then(clientv3.OpPut(path, value, clientv3.WithLease(clientv3.LeaseID(lease)))).
		Else(clientv3.OpGet(path)).Commit()
	if err != nil {
		return Written{}, b.explain(cli, err)
	}
	w := Written{Header: r.Header, Done: r.Succeeded}
	if !r.Succeeded {
		for _, kv := range r.Responses[0].GetResponseRange().Kvs {
			w.Lease = kv.Lease
		}
	}
	return w, nil
}
