package keygatetest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"keygate/keygatetest"
)

// recorded keeps what comes in on a connection.
type recorded struct {
	net.Conn
	mu *sync.Mutex
	in *bytes.Buffer
}

func (c recorded) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in.Write(b[:n])
	return n, err
}

// Checks that come one by one are answered without pings, each of which would be
// a wake-up more for both sides. grpc-go sends them unless its windows are static.
func TestNoPings(t *testing.T) {
	t.Parallel()
	k := keygatetest.Start(t, keygatetest.Options{})
	var mu sync.Mutex
	var in bytes.Buffer
	conn, err := grpc.NewClient("passthrough:///"+k.Server.AuthzAddr(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
			return recorded{c, &mu, &in}, err
		}))
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		mustCheck(t, conn, "anUnknownConsumerKey")
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	frames, answers := http2.NewFramer(io.Discard, &in), 0
	for {
		f, err := frames.ReadFrame()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch f := f.(type) {
		case *http2.DataFrame:
			answers++
		case *http2.PingFrame:
			if !f.IsAck() {
				t.Errorf("a ping after %d answers", answers)
			}
		}
	}
	if answers < 20 {
		t.Errorf("saw %d answers, want 20", answers)
	}
}
