package etcdtest

import (
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// Proxy forwards connections on 127.0.0.1 to one etcd and fails on request. Its
// methods may be called from any goroutine, at any time; a fault holds for
// present and future connections until it is ended, and several hold at once.
//
// Faults are of the links that [Proxy.Only] names, at first all.
type Proxy struct {
	scheme   string // of the endpoint
	listener *net.TCPListener
	network  string // of the target
	target   string
	running  sync.WaitGroup

	state struct {
		sync.Mutex
		closed  bool
		faults  faults
		changed chan struct{} // closed, and replaced, when faults change
		links   map[*link]struct{}
	}
}

// faults are what is switched on.
type faults struct {
	only     Links
	refusing bool
	frozen   [directions]bool

	delayMin, delayMax time.Duration
	delayShare         float64
	resetShare         float64
	drip               int // bytes a second, 0 for no limit
	corrupt            int // bytes, 0 for never
}

// direction of bytes on a link.
type direction int

const (
	requests direction = iota // to etcd
	answers                   // to the client
	directions
)

// link is one connection through the proxy.
type link struct {
	cut     chan struct{} // closed when the link is
	once    sync.Once
	near    *net.TCPConn
	sniffer *sniffer // of the goroutine that carries requests

	// Under Proxy.state.
	far     net.Conn // nil while the target has not been dialled
	kinds   Links
	refused bool // it came during a Refuse that lasts, and had no kind yet
	strand  bool // frozen until it is cut
}

// NewProxy listens until the test ends. The target is an endpoint as etcd's
// clients take it: unix:///…, http://, https:// or host:port.
func NewProxy(t testing.TB, target string) *Proxy {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatalf("listen for the proxy: %v", err)
	}
	p := &Proxy{scheme: "http", listener: l}
	if p.network, p.target, err = splitEndpoint(target); err != nil {
		t.Fatalf("target of the proxy: %v", err)
	}
	if strings.HasPrefix(target, "https://") {
		p.scheme = "https"
	}
	p.state.links = map[*link]struct{}{}
	p.state.changed = make(chan struct{})
	p.state.faults.only = AllLinks
	p.running.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// Endpoint to dial instead of the target's: http:// or, for an https:// target,
// https://, and a port on 127.0.0.1.
func (p *Proxy) Endpoint() string { return p.scheme + "://" + p.Addr() }

// Addr is the host and port of Endpoint.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Only restricts every fault to links of these kinds: WatchLinks, or
// KVLinks|LeaseLinks; AllLinks ends it. A link gets its kind with the first
// call on it, and the fault reaches that call. A client that watches and reads
// over one connection has one link of both kinds. Over TLS the proxy cannot see
// the calls, and only AllLinks selects anything.
func (p *Proxy) Only(links Links) { p.set(func(f *faults) { f.only = links }) }

// Freeze stops all bytes in both directions and closes nothing: a network that
// drops packets.
func (p *Proxy) Freeze() { p.set(func(f *faults) { f.frozen = [directions]bool{true, true} }) }

// FreezeRequests stops the bytes to etcd alone; its answers arrive.
func (p *Proxy) FreezeRequests() { p.set(func(f *faults) { f.frozen[requests] = true }) }

// FreezeAnswers stops the bytes to the client alone: etcd does what it is
// asked, and nobody learns of it.
func (p *Proxy) FreezeAnswers() { p.set(func(f *faults) { f.frozen[answers] = true }) }

// Thaw ends every Freeze. Nothing was lost.
func (p *Proxy) Thaw() { p.set(func(f *faults) { f.frozen = [directions]bool{} }) }

// Strand freezes the present connections for ever: no Thaw reaches them. New
// ones are forwarded, as by a network that has forgotten what it was carrying.
func (p *Proxy) Strand() {
	p.set(func(f *faults) {
		for l := range p.state.links {
			l.strand = l.strand || f.on(l.kinds)
		}
	})
}

// Delay holds up a share (0 to 1) of the chunks, in both directions, by a
// random time from least to most. What comes behind a chunk on its connection
// waits with it, as behind a lost packet. A share of 0 ends it.
func (p *Proxy) Delay(share float64, least, most time.Duration) {
	p.set(func(f *faults) { f.delayShare, f.delayMin, f.delayMax = share, least, max(least, most) })
}

// Drip lets so many bytes a second through to the client, on each connection.
// 0 ends it.
func (p *Proxy) Drip(bytesPerSecond int) { p.set(func(f *faults) { f.drip = bytesPerSecond }) }

// Corrupt flips one random bit in about every so many bytes, in both
// directions. 0 ends it.
func (p *Proxy) Corrupt(every int) { p.set(func(f *faults) { f.corrupt = every }) }

// Reset resets a connection instead of forwarding a chunk on it, for a share (0
// to 1) of the chunks. 0 ends it.
func (p *Proxy) Reset(share float64) { p.set(func(f *faults) { f.resetShare = share }) }

// Refuse resets every new connection until Accept; if Only says which, as soon
// as it is seen to be one of those. Present ones stay.
func (p *Proxy) Refuse() { p.set(func(f *faults) { f.refusing = true }) }

// Accept ends a Refuse.
func (p *Proxy) Accept() {
	p.set(func(f *faults) {
		f.refusing = false
		for l := range p.state.links {
			l.refused = false
		}
	})
}

// Heal ends all faults. Present connections stay.
func (p *Proxy) Heal() {
	p.Accept()
	p.set(func(f *faults) { *f = faults{only: AllLinks} })
}

// Cut resets the present connections on both sides. New ones are forwarded.
func (p *Proxy) Cut() {
	p.state.Lock()
	defer p.state.Unlock()
	for l := range p.state.links {
		if p.state.faults.on(l.kinds) {
			l.reset()
		}
	}
}

// Connections counts the present connections.
func (p *Proxy) Connections() int { return p.Count(AllLinks) }

// Count is Connections of these kinds.
func (p *Proxy) Count(links Links) int {
	p.state.Lock()
	defer p.state.Unlock()
	n := 0
	for l := range p.state.links {
		if links.include(l.kinds) {
			n++
		}
	}
	return n
}

// include is true of all kinds, and of none, for AllLinks.
func (links Links) include(kinds Links) bool { return links == AllLinks || links&kinds != 0 }

// on tells whether a link of these kinds has the faults.
func (f *faults) on(kinds Links) bool { return f.only.include(kinds) }

// set changes the faults and wakes whoever waits by them.
func (p *Proxy) set(change func(*faults)) {
	p.state.Lock()
	defer p.state.Unlock()
	change(&p.state.faults)
	close(p.state.changed)
	p.state.changed = make(chan struct{})
}

// faultsOf returns what holds for a link, and a channel that is closed when
// that may be out of date.
func (p *Proxy) faultsOf(l *link) (faults, <-chan struct{}) {
	p.state.Lock()
	defer p.state.Unlock()
	var f faults
	if p.state.faults.on(l.kinds) {
		f = p.state.faults
	}
	if l.strand {
		f.frozen = [directions]bool{true, true}
	}
	return f, p.state.changed
}

func (p *Proxy) close() {
	p.state.Lock()
	p.state.closed = true
	for l := range p.state.links {
		l.reset()
	}
	p.state.Unlock()
	p.listener.Close()
	p.running.Wait()
}

func (p *Proxy) accept() {
	for {
		conn, err := p.listener.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // a connection that was gone before it was taken
		}
		l := &link{cut: make(chan struct{}), near: conn, sniffer: newSniffer()}
		p.state.Lock()
		l.refused = p.state.faults.refusing
		take := !p.state.closed && !(l.refused && p.state.faults.on(l.kinds))
		if take {
			p.state.links[l] = struct{}{}
		}
		p.state.Unlock()
		if !take {
			l.reset()
			continue
		}
		p.running.Go(func() { p.forward(l) })
	}
}

// forward carries one connection until either side ends.
func (p *Proxy) forward(l *link) {
	defer func() {
		p.state.Lock()
		defer p.state.Unlock()
		l.reset()
		delete(p.state.links, l)
	}()
	if !p.pass(l, requests) {
		return
	}
	far, err := net.Dial(p.network, p.target)
	if err != nil {
		return
	}
	p.state.Lock()
	l.far = far
	p.state.Unlock()
	select {
	case <-l.cut: // before far was known
		far.Close()
		return
	default:
	}
	var both sync.WaitGroup
	both.Go(func() { p.copy(l, requests, far, l.near) })
	both.Go(func() { p.copy(l, answers, l.near, far) })
	both.Wait()
}

// copy carries one direction. Its end is the end of the link: etcd's clients
// never close one direction alone.
func (p *Proxy) copy(l *link, d direction, to, from net.Conn) {
	defer func() {
		p.state.Lock()
		defer p.state.Unlock()
		l.reset()
	}()
	var noise noise
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if d == requests && !p.sniff(l, buf[:n]) {
				return
			}
			if !p.carry(l, d, to, buf[:n], &noise) {
				return
			}
		}
		if err != nil {
			p.pass(l, d) // a frozen link does not tell of an end either
			return
		}
	}
}

// sniff finds the kinds of a link; false: it is one of those refused.
func (p *Proxy) sniff(l *link, b []byte) bool {
	kinds := l.sniffer.read(b)
	p.state.Lock()
	defer p.state.Unlock()
	l.kinds = kinds
	f := &p.state.faults
	return !(l.refused && f.on(kinds))
}

// carry forwards a chunk as the faults allow; false: the link has ended.
func (p *Proxy) carry(l *link, d direction, to net.Conn, b []byte, noise *noise) bool {
	f, _ := p.faultsOf(l)
	if rand.Float64() < f.resetShare {
		return false
	}
	if rand.Float64() < f.delayShare && !p.wait(l, f.delayMin+rand.N(f.delayMax-f.delayMin+1)) {
		return false
	}
	for len(b) > 0 {
		if !p.pass(l, d) {
			return false
		}
		f, _ := p.faultsOf(l)
		piece := b
		if d == answers && f.drip > 0 {
			piece = b[:min(len(b), max(1, f.drip/dripsPerSecond))]
		}
		noise.add(piece, f.corrupt)
		if _, err := to.Write(piece); err != nil {
			return false
		}
		b = b[len(piece):]
		if d == answers && f.drip > 0 && !p.wait(l, time.Duration(len(piece))*time.Second/time.Duration(f.drip)) {
			return false
		}
	}
	return true
}

// dripsPerSecond is how often a dripping link is given something, if its rate
// has so many bytes.
const dripsPerSecond = 50

// wait lets time pass, or less if the faults change; false: the link was cut
// meanwhile.
func (p *Proxy) wait(l *link, d time.Duration) bool {
	_, changed := p.faultsOf(l)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-changed:
		return true
	case <-l.cut:
		return false
	}
}

// pass waits while the link is frozen in this direction; false: it was cut
// meanwhile.
func (p *Proxy) pass(l *link, d direction) bool {
	for {
		f, changed := p.faultsOf(l)
		if !f.frozen[d] {
			return true
		}
		select {
		case <-changed:
		case <-l.cut:
			return false
		}
	}
}

// noise flips bits in one direction of one link. The zero value is ready.
type noise struct {
	every int // bytes on average, as of the last chunk
	left  int // bytes until the next flip
}

func (n *noise) add(b []byte, every int) {
	if every != n.every {
		n.every = every
		n.draw()
	}
	if every == 0 {
		return
	}
	for ; n.left < len(b); n.draw() {
		b[n.left] ^= 1 << rand.IntN(8)
		b = b[n.left+1:]
	}
	n.left -= len(b)
}

// draw makes each byte as likely as any other, whatever came before it.
func (n *noise) draw() { n.left = int(rand.ExpFloat64() * float64(n.every)) }

// reset closes both sides at once, dropping what is under way. The caller
// holds Proxy.state, or nobody else knows the link.
func (l *link) reset() {
	l.once.Do(func() {
		close(l.cut)
		_ = l.near.SetLinger(0) // fails only on a closed connection
		l.near.Close()
		if tcp, ok := l.far.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		if l.far != nil {
			l.far.Close()
		}
	})
}
