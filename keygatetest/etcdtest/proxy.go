package etcdtest

import (
	"errors"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
)

// Proxy forwards connections on 127.0.0.1 to one etcd and fails on request. Its
// methods may be called from any goroutine.
type Proxy struct {
	scheme   string // of the endpoint
	listener *net.TCPListener
	network  string // of the target
	target   string
	running  sync.WaitGroup

	state struct {
		sync.Mutex
		refusing bool
		closed   bool
		frozen   chan struct{} // closed by Thaw; nil when not frozen
		links    map[*link]struct{}
	}
}

// link is one connection through the proxy.
type link struct {
	cut  chan struct{} // closed when the link is
	once sync.Once
	near *net.TCPConn
	far  net.Conn // nil while the target has not been dialled; under Proxy.state
}

// NewProxy listens until the test ends. The target is an endpoint as etcd's
// clients take it: unix:///…, http://, https:// or host:port.
func NewProxy(t testing.TB, target string) *Proxy {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatalf("listen for the proxy: %v", err)
	}
	p := &Proxy{scheme: "http", listener: l, network: "tcp", target: target}
	if strings.Contains(target, "://") {
		u, err := url.Parse(target)
		if err != nil {
			t.Fatalf("target of the proxy: %v", err)
		}
		if u.Scheme == "unix" {
			p.network, p.target = "unix", u.Path
		} else {
			p.scheme, p.target = u.Scheme, u.Host
		}
	}
	p.state.links = map[*link]struct{}{}
	p.running.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// Endpoint to dial instead of the target's: http:// or, for an https:// target,
// https://, and a port on 127.0.0.1.
func (p *Proxy) Endpoint() string { return p.scheme + "://" + p.Addr() }

// Addr is the host and port of Endpoint.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Freeze stops all bytes in both directions, on present and future
// connections, and closes nothing: a network that drops packets.
func (p *Proxy) Freeze() {
	p.state.Lock()
	defer p.state.Unlock()
	if p.state.frozen == nil {
		p.state.frozen = make(chan struct{})
	}
}

// Thaw ends a Freeze. Nothing was lost.
func (p *Proxy) Thaw() {
	p.state.Lock()
	defer p.state.Unlock()
	if p.state.frozen != nil {
		close(p.state.frozen)
		p.state.frozen = nil
	}
}

// Cut resets all present connections on both sides. New ones are forwarded.
func (p *Proxy) Cut() {
	p.state.Lock()
	defer p.state.Unlock()
	for l := range p.state.links {
		l.reset()
	}
}

// Refuse resets every new connection until Accept. Present ones stay.
func (p *Proxy) Refuse() {
	p.state.Lock()
	defer p.state.Unlock()
	p.state.refusing = true
}

// Accept ends a Refuse.
func (p *Proxy) Accept() {
	p.state.Lock()
	defer p.state.Unlock()
	p.state.refusing = false
}

// Connections counts the present connections.
func (p *Proxy) Connections() int {
	p.state.Lock()
	defer p.state.Unlock()
	return len(p.state.links)
}

func (p *Proxy) close() {
	p.state.Lock()
	p.state.closed = true
	p.state.Unlock()
	p.listener.Close()
	p.Cut()
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
		l := &link{cut: make(chan struct{}), near: conn}
		p.state.Lock()
		take := !p.state.refusing && !p.state.closed
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
	if !p.pass(l) {
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
	both.Go(func() { p.copy(l, far, l.near) })
	both.Go(func() { p.copy(l, l.near, far) })
	both.Wait()
}

// copy carries one direction. Its end is the end of the link: etcd's clients
// never close one direction alone.
func (p *Proxy) copy(l *link, to, from net.Conn) {
	defer func() {
		p.state.Lock()
		defer p.state.Unlock()
		l.reset()
	}()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if !p.pass(l) {
				return
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// pass waits while the proxy is frozen; false: the link was cut meanwhile.
func (p *Proxy) pass(l *link) bool {
	p.state.Lock()
	frozen := p.state.frozen
	p.state.Unlock()
	if frozen == nil {
		return true
	}
	select {
	case <-frozen:
		return true
	case <-l.cut:
		return false
	}
}

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
