package server

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"unsafe"
)

// direct returns a connection that reads and writes by system calls which Go's
// scheduler is not told of.
//
// It is told of calls that may block, and these cannot: Go's sockets never do.
// What it does when it is told is to wake its monitor thread, which then looks
// about every 20 µs for as long as a processor is busy. A server that answers one
// request at a time is idle in between, so that each request would wake the
// monitor, which is more work than the answer.
//
// A connection that has no descriptor is returned as it is.
func direct(c net.Conn) net.Conn {
	s, ok := c.(syscall.Conn)
	if !ok {
		return c
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return c
	}
	d := &directConn{Conn: c}
	d.read = transfer{name: "read", number: syscall.SYS_READ, wait: raw.Read}
	d.write = transfer{name: "write", number: syscall.SYS_WRITE, wait: raw.Write, all: true}
	d.read.step, d.write.step = d.read.do, d.write.do // once: a method value is allocated
	return d
}

type directConn struct {
	net.Conn
	read, write transfer
}

func (c *directConn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return c.Conn.Read(b)
	}
	n, err := c.read.transfer(b)
	if n == 0 && err == nil {
		return 0, io.EOF
	}
	return n, err
}

func (c *directConn) Write(b []byte) (int, error) { return c.write.transfer(b) }

// transfer is one direction of a connection.
type transfer struct {
	name   string
	number uintptr                           // of the system call
	wait   func(func(fd uintptr) bool) error // calls until it is told true, each time the socket is ready
	all    bool                              // go on until all is done
	step   func(fd uintptr) bool

	mu sync.Mutex // a net.Conn may be used by several goroutines
	// What the call in progress is about.
	rest  []byte
	done  int
	errno syscall.Errno
}

func (t *transfer) transfer(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rest, t.done, t.errno = b, 0, 0
	err := t.wait(t.step)
	t.rest = nil
	if err == nil && t.errno != 0 {
		err = os.NewSyscallError(t.name, t.errno)
	}
	return t.done, err
}

// do tells whether the call in progress has ended; false waits until the socket
// is ready.
func (t *transfer) do(fd uintptr) bool {
	for {
		n, _, errno := syscall.RawSyscall(t.number, fd, uintptr(unsafe.Pointer(unsafe.SliceData(t.rest))), uintptr(len(t.rest)))
		switch errno {
		case 0:
			t.done += int(n)
			if t.rest = t.rest[n:]; t.all && len(t.rest) > 0 {
				continue
			}
			return true
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			t.errno = errno
			return true
		}
	}
}
