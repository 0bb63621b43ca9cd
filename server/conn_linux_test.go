package server

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
)

// pipe connects two connections as the server has them.
func pipe() (c1, c2 net.Conn, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, nil, err
	}
	defer l.Close()
	dialed := make(chan error, 1)
	go func() {
		var err error
		c1, err = net.Dial("tcp", l.Addr().String())
		dialed <- err
	}()
	if c2, err = (answering{l}).Accept(); err != nil {
		return nil, nil, nil, err
	}
	if err = <-dialed; err != nil {
		return nil, nil, nil, err
	}
	c1 = yieldingConn{direct(c1)}
	return c1, c2, func() { _, _ = c1.Close(), c2.Close() }, nil
}

// All that is expected of a net.Conn: deadlines, closing, use by many goroutines.
func TestConn(t *testing.T) { nettest.TestConn(t, pipe) }

// A connection reads and writes past Go's net package.
func TestConnIsDirect(t *testing.T) {
	_, c, stop, err := pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if _, ok := c.(yieldingConn).Conn.(*directConn); !ok {
		t.Errorf("the server has a %T", c.(yieldingConn).Conn)
	}
}

// More than the socket takes at once, and an end by reset, which is an error
// that names the call.
func TestConnLargeAndReset(t *testing.T) {
	near, far, stop, err := pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	sent, all := 16<<20, make(chan error, 1)
	go func() {
		n, err := far.Write(make([]byte, sent))
		if err == nil && n != sent {
			err = errors.New("a part was written, without an error")
		}
		all <- err
	}()
	b := make([]byte, 64<<10)
	for got := 0; got < sent; {
		n, err := near.Read(b)
		if err != nil || n == 0 {
			t.Fatal(n, err)
		}
		got += n
	}
	if err := <-all; err != nil {
		t.Fatal(err)
	}
	tcp := near.(yieldingConn).Conn.(*directConn).Conn.(*net.TCPConn)
	if err := errors.Join(tcp.SetLinger(0), tcp.Close()); err != nil {
		t.Fatal(err)
	}
	if err := far.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var call *os.SyscallError
	if n, err := far.Read(b); n != 0 || !errors.Is(err, syscall.ECONNRESET) || !errors.As(err, &call) || call.Syscall != "read" {
		t.Errorf("read %d, %v, want a reset", n, err)
	}
}

// What a connection costs: neither direction allocates.
func TestConnAllocates(t *testing.T) {
	near, far, stop, err := pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	b := make([]byte, 1000)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := far.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := near.Read(b); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
