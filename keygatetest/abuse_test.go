package keygatetest_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	"keygate/envoy"
	"keygate/examples/quickstart"
	"keygate/keygatetest"
)

const (
	abuseKey = "key-of-the-well-behaved-0001"
	// closedWithin is what a connection that stalls may last.
	closedWithin = 20 * time.Second
	// memoryOfAPeer while its connection lasts, in bytes of heap: 1,000 calls
	// under way, and what waits to be written of those that were reset.
	memoryOfAPeer = 128 << 20
	// memoryForGood is what may stay when all have gone.
	memoryForGood = 16 << 20
)

// Peers that abuse HTTP/2 on the port of ext_authz: each is refused or closed,
// checks on another connection are allowed all the while, and what it cost is
// given back.
func TestAbuseOfHTTP2(t *testing.T) {
	k := keygatetest.Start(t, keygatetest.Options{})
	k.Applied(t, k.PutKeys(t, keygatetest.Key{Key: abuseKey}))
	conn := k.Conn(t)
	for range 100 {
		if got := mustCheck(t, conn, abuseKey); got != "allowed" {
			t.Fatalf("a good key: got %s, want allowed", got)
		}
	}
	flood := time.Second
	if longFaults() {
		flood = 3 * time.Second
	}
	message, err := proto.Marshal(request(quickstart.WeatherProduct, abuseKey))
	if err != nil {
		t.Fatal(err)
	}
	call := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...) // as gRPC frames it

	// checks asks for the good key until the context ends, once at least, and returns how long
	// each answer took.
	checks := func(ctx context.Context) (took []time.Duration) {
		for len(took) == 0 || ctx.Err() == nil {
			began := time.Now()
			got, err := check(context.WithoutCancel(ctx), conn, abuseKey)
			took = append(took, time.Since(began))
			if err != nil || got != "allowed" {
				t.Errorf("a good check beside the abuse: got %s, %v, want allowed", got, err)
			}
		}
		return took
	}
	ctx, cancel := context.WithTimeout(t.Context(), flood)
	calm := checks(ctx)
	cancel()
	heap, _ := memory(t)
	goroutines := runtime.NumGoroutine()

	// ratio of the 99th percentiles, with and without abuse.
	ratio := func(stormy []time.Duration) string {
		with, without := quantile(stormy, 0.99), quantile(calm, 0.99)
		return fmt.Sprintf("%d good checks beside it, all allowed: p99 %v, %.1f times the calm %v", len(stormy), with, float64(with)/float64(without), without)
	}

	// Floods, one after the other, for as long as the server lets them. Each
	// returns what there is to say of it.
	floods := []struct {
		name  string
		abuse func(t *testing.T, p *peer, end time.Time) string
	}{
		{"10,000 streams", func(t *testing.T, p *peer, _ time.Time) string {
			const streams = 10_000
			for range streams {
				p.headers(p.next())
			}
			p.flush()
			p.await(t, "the streams beyond the limit to be refused", func(s seen) bool {
				return s.resets[http2.ErrCodeRefusedStream] >= streams-envoy.MaxConcurrentStreams
			})
			refused := p.seen().resets[http2.ErrCodeRefusedStream]
			if refused != streams-envoy.MaxConcurrentStreams || p.err != nil {
				t.Errorf("refused %d streams of %d (%v), want all but %d", refused, streams, p.err, envoy.MaxConcurrentStreams)
			}
			return fmt.Sprintf("%d of %d refused", refused, streams)
		}},
		{"rapid reset, 50,000 a second", func(_ *testing.T, p *peer, end time.Time) string {
			return p.paced(end, 50_000, func() {
				p.headers(p.next())
				p.reset(p.last)
			})
		}},
		{"rapid reset, as fast as can be", func(_ *testing.T, p *peer, end time.Time) string {
			return p.forLong(end, func() {
				p.headers(p.next())
				p.reset(p.last)
			})
		}},
		{"rapid reset of whole calls, 20,000 a second", func(_ *testing.T, p *peer, end time.Time) string {
			return p.paced(end, 20_000, func() {
				p.headers(p.next())
				p.data(p.last, call)
				p.reset(p.last)
			})
		}},
		{"PING flood", func(t *testing.T, p *peer, end time.Time) string {
			said := p.forLong(end, func() { p.ping() })
			p.awaitClosed(t)
			if got := p.seen().goAway; got != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("GOAWAY: got %v, want ENHANCE_YOUR_CALM", got)
			}
			return said
		}},
		{"CONTINUATION flood", func(t *testing.T, p *peer, end time.Time) string {
			p.openHeaders(p.next())
			said := p.forLong(end, func() { p.continuation(p.last, junk(8000), false) })
			p.awaitClosed(t)
			return said
		}},
		{"header lists of 1 MB", func(t *testing.T, p *peer, end time.Time) string {
			said := p.forLong(end, func() {
				p.openHeaders(p.next())
				for i := range 64 {
					p.continuation(p.last, junk(16_000), i == 63)
				}
			})
			p.awaitClosed(t)
			return said
		}},
		{"HPACK bomb", func(t *testing.T, p *peer, end time.Time) string {
			// A field of 4,000 bytes in the table, which a byte then stands for,
			// 10,000 times in a frame: 40 MB.
			p.write(p.fr.WriteHeaders(http2.HeadersFrameParam{
				StreamID: p.next(), EndHeaders: true, EndStream: true,
				BlockFragment: p.block(append(callFields(), hpack.HeaderField{Name: "x-bomb", Value: strings.Repeat("b", 4000)})...),
			}))
			p.flush()
			p.await(t, "the first call to be answered", func(s seen) bool { return s.headers == 1 })
			const newest = 0x80 | 62 // the first index after those of the static table
			bomb := bytes.Repeat([]byte{newest}, 10_000)
			said := p.forLong(end, func() {
				p.write(p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: p.next(), BlockFragment: bomb, EndHeaders: true, EndStream: true}))
			})
			s := p.seen()
			if s.headers != 1 {
				t.Errorf("%d calls with 40 MB of headers were answered, want none", s.headers-1)
			}
			if s.resets[http2.ErrCodeFrameSize] == 0 && !p.isClosed() {
				t.Error("40 MB of headers were neither reset, nor the connection closed")
			}
			return said
		}},
	}
	for _, tt := range floods {
		t.Run(tt.name, func(t *testing.T) {
			p := dialPeer(t, k.Server.AuthzAddr())
			p.begin()
			p.listen()
			ctx, cancel := context.WithCancel(t.Context())
			stormy := make(chan []time.Duration, 1)
			go func() { stormy <- checks(ctx) }()
			said := tt.abuse(t, p, time.Now().Add(flood))
			cancel()
			t.Logf("%s; %s", said, ratio(<-stormy))
			during, _ := memory(t) // the connection is still there, or was until now
			if grown := int64(during) - int64(heap); grown > memoryOfAPeer {
				t.Errorf("the heap grew by %d MB, want %d at most", grown>>20, memoryOfAPeer>>20)
			}
			p.close()
		})
	}

	// Stalls, all at once, until the server has had enough of each.
	stalls := []struct {
		name  string
		abuse func(p *peer)
		deaf  bool // reads nothing
	}{
		{"nothing at all", func(*peer) {}, false},
		{"HTTP/1.1", func(p *peer) { p.raw("GET / HTTP/1.1\r\nHost: a\r\n\r\n") }, false},
		{"half a preface", func(p *peer) { p.raw(http2.ClientPreface[:10]) }, false},
		{"a preface byte by byte", func(p *peer) { p.drip(http2.ClientPreface) }, false},
		{"no SETTINGS", func(p *peer) { p.raw(http2.ClientPreface) }, false},
		{"no SETTINGS ack", func(p *peer) { p.begin() }, false},
		{"half a frame", func(p *peer) { p.begin(); p.raw(halfAFrame) }, false},
		{"a frame byte by byte", func(p *peer) { p.begin(); p.drip(halfAFrame + strings.Repeat("a", 1000)) }, false},
		{"empty CONTINUATIONs without end", func(p *peer) {
			p.begin()
			p.openHeaders(p.next())
			p.slowly(time.Millisecond, func() { p.continuation(p.last, nil, false) })
		}, false},
		{"calls without end", func(p *peer) {
			p.begin()
			for range envoy.MaxConcurrentStreams {
				p.headers(p.next())
			}
			p.flush()
		}, false},
		{"no window for the responses", func(p *peer) {
			p.begin(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
			for range 100 {
				p.headers(p.next())
				p.data(p.last, call)
			}
			p.flush()
		}, false},
		{"SETTINGS without end, and nothing read", func(p *peer) {
			p.begin()
			p.forLong(time.Now().Add(closedWithin), func() { p.write(p.fr.WriteSettings()) })
		}, true},
	}
	ctx, cancel = context.WithCancel(t.Context())
	stormy := make(chan []time.Duration, 1)
	go func() { stormy <- checks(ctx) }()
	var stalled sync.WaitGroup
	for _, tt := range stalls {
		p := dialPeer(t, k.Server.AuthzAddr())
		stalled.Go(func() {
			began := time.Now()
			if !tt.deaf {
				p.listen()
			}
			tt.abuse(p)
			p.listen()
			select {
			case <-p.closed:
				t.Logf("%s: closed after %.1f s", tt.name, time.Since(began).Seconds())
			case <-time.After(time.Until(began.Add(closedWithin))):
				t.Errorf("%s: not closed after %v", tt.name, closedWithin)
			}
			p.close()
		})
	}
	stalled.Wait()
	cancel()
	t.Logf("stalls: %s", ratio(<-stormy))

	const slack = 20 // what the runtime and gRPC begin and end by themselves
	keygatetest.Eventually(t, keygatetest.Patience, "the goroutines of the abuse to end", func() bool {
		return runtime.NumGoroutine() <= goroutines+slack
	})
	after, _ := memory(t)
	t.Logf("goroutines: %d before, %d after; heap: %.1f MB before, %.1f after", goroutines, runtime.NumGoroutine(), float64(heap)/(1<<20), float64(after)/(1<<20))
	if grown := int64(after) - int64(heap); grown > memoryForGood {
		t.Errorf("the heap grew for good by %d MB, want %d at most", grown>>20, memoryForGood>>20)
	}
}

// halfAFrame is the head of a DATA frame of 4 KB, and three bytes of it.
const halfAFrame = "\x00\x10\x00\x00\x00\x00\x00\x00\x01abc"

// peer speaks raw HTTP/2. Its methods are for one goroutine, but what it reads is
// read by another.
type peer struct {
	conn net.Conn
	w    *bufio.Writer
	fr   *http2.Framer
	enc  *hpack.Encoder
	buf  bytes.Buffer // of enc
	last uint32       // id of the newest stream
	err  error        // the first of a write; the ones after it do nothing

	listening sync.Once
	closed    chan struct{} // when no more is to be read
	state     struct {
		sync.Mutex
		seen
	}
}

// seen is what the server has sent.
type seen struct {
	resets  map[http2.ErrCode]int
	headers int
	goAway  http2.ErrCode
}

// dialPeer connects; the connection is closed when the test ends.
func dialPeer(t *testing.T, address string) *peer {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	p := &peer{conn: conn, w: bufio.NewWriterSize(conn, 16<<10), closed: make(chan struct{})}
	p.write(conn.SetWriteDeadline(time.Now().Add(closedWithin)))
	p.fr = http2.NewFramer(p.w, conn)
	p.enc = hpack.NewEncoder(&p.buf)
	p.state.resets = map[http2.ErrCode]int{}
	return p
}

// listen reads what the server sends, and acknowledges nothing of it.
func (p *peer) listen() {
	p.listening.Do(func() {
		go func() {
			defer close(p.closed)
			for {
				f, err := p.fr.ReadFrame()
				if err != nil {
					return
				}
				p.state.Lock()
				switch f := f.(type) {
				case *http2.RSTStreamFrame:
					p.state.resets[f.ErrCode]++
				case *http2.HeadersFrame:
					p.state.headers++
				case *http2.GoAwayFrame:
					p.state.goAway = f.ErrCode
				}
				p.state.Unlock()
			}
		}()
	})
}

func (p *peer) seen() seen {
	p.state.Lock()
	defer p.state.Unlock()
	s := p.state.seen
	s.resets = maps.Clone(s.resets)
	return s
}

func (p *peer) isClosed() bool {
	select {
	case <-p.closed:
		return true
	default:
		return false
	}
}

// close ends the connection and what reads from it.
func (p *peer) close() {
	_ = p.conn.Close() // the server may have been first
	<-p.closed
}

func (p *peer) await(t *testing.T, what string, cond func(seen) bool) {
	t.Helper()
	keygatetest.Eventually(t, closedWithin, what, func() bool { return cond(p.seen()) })
}

func (p *peer) awaitClosed(t *testing.T) {
	t.Helper()
	keygatetest.Eventually(t, closedWithin, "the connection to be closed", p.isClosed)
}

// write notes the outcome of one.
func (p *peer) write(err error) {
	if p.err == nil {
		p.err = err
	}
}

func (p *peer) flush() { p.write(p.w.Flush()) }

// raw writes text as it stands.
func (p *peer) raw(text string) {
	_, err := p.w.WriteString(text)
	p.write(err)
	p.flush()
}

// forLong does abuse again and again, and says how often.
func (p *peer) forLong(end time.Time, abuse func()) string {
	began, n := time.Now(), 0
	for p.err == nil && !p.isClosed() && time.Now().Before(end) {
		abuse()
		n++
	}
	p.flush()
	took := time.Since(began)
	return fmt.Sprintf("%d times in %v (%.0f/s), closed by the server: %v", n, took.Round(time.Millisecond), float64(n)/took.Seconds(), p.err != nil || p.isClosed())
}

// paced is forLong at a rate, in bursts of a millisecond.
func (p *peer) paced(end time.Time, perSecond int, abuse func()) string {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	began, n := time.Now(), 0
	said := p.forLong(end, func() {
		<-tick.C
		for due := int(time.Since(began).Seconds() * float64(perSecond)); n < due && time.Now().Before(end); n++ {
			abuse()
		}
		p.flush()
	})
	return fmt.Sprintf("%d in bursts, %s", n, said)
}

// slowly does abuse with a pause after each, for as long as a connection may
// last.
func (p *peer) slowly(pause time.Duration, abuse func()) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	enough := time.After(closedWithin)
	for p.err == nil {
		select {
		case <-enough:
			return
		case <-p.closed:
			return
		case <-tick.C:
		}
		abuse()
		p.flush()
	}
}

// drip writes text byte by byte.
func (p *peer) drip(text string) {
	p.slowly(500*time.Millisecond, func() {
		if text != "" {
			_, err := p.w.WriteString(text[:1])
			p.write(err)
			text = text[1:]
		}
	})
}

// begin writes what every client begins with.
func (p *peer) begin(settings ...http2.Setting) {
	p.raw(http2.ClientPreface)
	p.write(p.fr.WriteSettings(settings...))
	p.flush()
}

// next is the id of a new stream.
func (p *peer) next() uint32 {
	if p.last == 0 {
		p.last = 1
	} else {
		p.last += 2
	}
	return p.last
}

// callFields are the headers of a check.
func callFields() []hpack.HeaderField {
	return []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: "keygate"},
		{Name: ":path", Value: "/" + envoy.ServiceName + "/Check"}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}
}

// junk is a header of n bytes that goes into no table.
func junk(n int) []hpack.HeaderField {
	return []hpack.HeaderField{{Name: "x-junk", Value: strings.Repeat("~", n), Sensitive: true}}
}

// block is fields in HPACK, valid until the next block.
func (p *peer) block(fields ...hpack.HeaderField) []byte {
	p.buf.Reset()
	for _, f := range fields {
		p.write(p.enc.WriteField(f))
	}
	return p.buf.Bytes()
}

// headers begins a call, which data or reset ends.
func (p *peer) headers(id uint32) {
	p.write(p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(callFields()...), EndHeaders: true}))
}

// openHeaders begins a call whose headers go on.
func (p *peer) openHeaders(id uint32) {
	p.write(p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(callFields()...)}))
}

func (p *peer) continuation(id uint32, fields []hpack.HeaderField, end bool) {
	p.write(p.fr.WriteContinuation(id, end, p.block(fields...)))
}

func (p *peer) data(id uint32, b []byte) { p.write(p.fr.WriteData(id, true, b)) }

func (p *peer) reset(id uint32) { p.write(p.fr.WriteRSTStream(id, http2.ErrCodeCancel)) }

func (p *peer) ping() { p.write(p.fr.WritePing(false, [8]byte{1})) }
