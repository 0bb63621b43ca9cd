package etcdtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	// exitPortTaken is EX_TEMPFAIL of sysexits.h.
	exitPortTaken = 75
	// portAttempts is how often a cluster looks for ports.
	portAttempts = 5
	// statusTimeout bounds the question who leads; a member that is frozen
	// never answers it.
	statusTimeout = 500 * time.Millisecond
)

// memberConfig is one member of a cluster, as its process is told.
type memberConfig struct {
	Name    string
	Client  string // URL
	Peer    string // URL
	Cluster string // name=peer,…
	Token   string
}

// Cluster is several members of one etcd, each a process of its own on TCP
// ports of 127.0.0.1, without TLS. They elect as etcd does by default, with a
// heartbeat of 100 ms and an election timeout of 1 s, so that the loss of a
// leader costs what it costs in the field.
//
// Its methods are for one goroutine, the test's; those of its members are too.
type Cluster struct {
	t       testing.TB
	members []*Process
}

// StartCluster runs n members until the test ends or this process does, and
// returns when all of them answer. The package's TestMain must call [Main] or
// [Reexec].
func StartCluster(t testing.TB, n int, opts ...ProcessOption) *Cluster {
	t.Helper()
	c := &Cluster{t: t}
	for range n {
		p := &Process{t: t, dataDir: DataDir(t)}
		p.Options(opts...)
		t.Cleanup(p.end)
		c.members = append(c.members, p)
	}
	// A port that was free may be taken when the member gets to it.
	for range portAttempts - 1 {
		err := c.start(freePorts(t, 2*n))
		if err == nil {
			return c
		}
		if !c.portTaken() {
			t.Fatalf("start a cluster of %d: %v", n, err)
		}
		c.clear()
	}
	if err := c.start(freePorts(t, 2*n)); err != nil {
		t.Fatalf("start a cluster of %d, with the %dth set of ports: %v", n, portAttempts, err)
	}
	return c
}

// start gives every member two of the ports and waits until all answer.
func (c *Cluster) start(ports []int) error {
	token := fmt.Sprintf("etcdtest-%016x", rand.Uint64())
	var initial []string
	for i, p := range c.members {
		p.endpoint = fmt.Sprintf("http://127.0.0.1:%d", ports[2*i])
		p.member = &memberConfig{
			Name: fmt.Sprintf("m%d", i), Client: p.endpoint, Token: token,
			Peer: fmt.Sprintf("http://127.0.0.1:%d", ports[2*i+1]),
		}
		initial = append(initial, p.member.Name+"="+p.member.Peer)
	}
	for _, p := range c.members {
		p.member.Cluster = strings.Join(initial, ",")
		p.StartAgain()
	}
	errs := make([]error, len(c.members))
	var all sync.WaitGroup
	for i, p := range c.members {
		all.Go(func() { errs[i] = p.waitReady() })
	}
	all.Wait()
	return errors.Join(errs...)
}

// portTaken tells whether a member ended for that.
func (c *Cluster) portTaken() bool {
	for _, p := range c.members {
		if !p.Running() && p.cmd.ProcessState.ExitCode() == exitPortTaken {
			return true
		}
	}
	return false
}

// clear removes what a start in vain has left.
func (c *Cluster) clear() {
	for _, p := range c.members {
		p.end()
		if err := os.RemoveAll(p.dataDir); err != nil {
			c.t.Fatalf("clear data directory: %v", err)
		}
	}
}

// Members are the processes, running or not, by index.
func (c *Cluster) Members() []*Process { return c.members }

// Member is one of Members.
func (c *Cluster) Member(i int) *Process { return c.members[i] }

// Endpoints of all members.
func (c *Cluster) Endpoints() []string {
	var all []string
	for _, p := range c.members {
		all = append(all, p.Endpoint())
	}
	return all
}

// Client returns a new client of all members, closed when the test ends.
func (c *Cluster) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	return dial(t, clientv3.Config{Endpoints: c.Endpoints()})
}

// Leader waits until a member says that it leads and most members agree, and
// returns its index.
func (c *Cluster) Leader(t testing.TB) int {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: c.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		t.Fatalf("dial cluster: %v", err)
	}
	defer client.Close()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); <-tick.C {
		if leader, ok := c.leader(client); ok {
			return leader
		}
	}
	t.Fatalf("no leader after %v", startTimeout)
	return 0
}

func (c *Cluster) leader(client *clientv3.Client) (int, bool) {
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	answers := make([]*clientv3.StatusResponse, len(c.members))
	var all sync.WaitGroup
	for i, p := range c.members {
		if !p.Running() {
			continue
		}
		all.Go(func() {
			if r, err := client.Status(ctx, p.endpoint); err == nil {
				answers[i] = r
			}
		})
	}
	all.Wait()
	for i, claim := range answers {
		if claim == nil || claim.Leader != claim.Header.MemberId {
			continue
		}
		votes := 0
		for _, r := range answers {
			if r != nil && r.Leader == claim.Leader && r.RaftTerm == claim.RaftTerm {
				votes++
			}
		}
		if votes > len(c.members)/2 {
			return i, true
		}
	}
	return 0, false
}

// freePorts returns ports of 127.0.0.1 on which nobody listens, below those
// that the kernel gives to connections and to listeners without a wish: a
// member that is down for a while finds its ports free.
func freePorts(t testing.TB, n int) []int {
	t.Helper()
	const first, end = 10000, 32768
	var ports []int
	for range 1000 {
		port := first + rand.IntN(end-first)
		l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
		if err != nil {
			continue
		}
		defer l.Close() // all are open until all are found
		if ports = append(ports, port); len(ports) == n {
			return ports
		}
	}
	t.Fatalf("found %d free ports from %d to %d, want %d", len(ports), first, end-1, n)
	return nil
}

// serveMember runs a member in this process until ctx ends. The embedded one
// cannot be taken: it is alone, and has no network listener to switch on.
func serveMember(ctx context.Context, p processConfig) error {
	client, err := url.Parse(p.Member.Client)
	if err != nil {
		return err
	}
	peer, err := url.Parse(p.Member.Peer)
	if err != nil {
		return err
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = p.Member.Name, p.DataDir
	cfg.TickMs, cfg.ElectionMs = 100, 1000
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, "1h"
	cfg.QuotaBackendBytes = p.QuotaBytes // 0: etcd's default
	cfg.EnableGRPCGateway = false
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	cfg.InitialCluster, cfg.InitialClusterToken = p.Member.Cluster, p.Member.Token
	// What goes wrong with others is the purpose of such a cluster; what ends
	// the process is said.
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(zapcore.NewCore(
		zapcore.NewConsoleEncoder(zap.NewDevelopmentEncoderConfig()), zapcore.Lock(os.Stderr), zapcore.DPanicLevel)))
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("start member %s: %w", cfg.Name, err)
	}
	defer e.Close()
	select {
	case <-ctx.Done():
		return nil
	case err := <-e.Err():
		return err
	case <-e.Server.StopNotify():
		return errors.New("etcd stopped by itself")
	}
}
