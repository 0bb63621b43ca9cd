package server

import (
	"net"
	"runtime"
)

// answering is a listener whose connections suit many small answers.
type answering struct{ net.Listener }

func (l answering) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return yieldingConn{direct(c)}, nil
}

// yieldingConn lets other goroutines run before it writes. grpc-go writes what it
// has as soon as it has a kilobyte, and an allow is about that: each would be a
// system call of its own. The checks that end while one waits for its turn go out
// with the next write, all of them.
type yieldingConn struct{ net.Conn }

func (c yieldingConn) Write(b []byte) (int, error) {
	runtime.Gosched()
	return c.Conn.Write(b)
}
