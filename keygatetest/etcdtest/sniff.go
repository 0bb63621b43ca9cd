package etcdtest

import (
	"bytes"
	"io"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Links are kinds of connections, by the calls that a client makes on them. A
// connection may be of several kinds, and of none while it has made no call.
type Links uint8

const (
	// WatchLinks have carried a watch.
	WatchLinks Links = 1 << iota
	// KVLinks have carried a read, a write or a transaction.
	KVLinks
	// LeaseLinks have carried a call about leases.
	LeaseLinks

	// AllLinks are the above, and those of no kind.
	AllLinks Links = 0xff
)

// services of etcd's API that make a kind, as the paths of their calls begin.
var services = []struct {
	prefix string
	links  Links
}{
	{"/etcdserverpb.Watch/", WatchLinks},
	{"/etcdserverpb.KV/", KVLinks},
	{"/etcdserverpb.Lease/", LeaseLinks},
}

// frameHeader is the length of an HTTP/2 frame before its payload.
const frameHeader = 9

// sniffer reads along what a client sends and finds the calls in it. It knows
// plain HTTP/2 only: behind TLS there is nothing to see, and no kind.
type sniffer struct {
	buf     bytes.Buffer // what was sent, up to the next whole frame
	begun   bool         // the preface was seen
	blind   bool         // something else is spoken
	framer  *http2.Framer
	headers *hpack.Decoder
	found   Links
}

func newSniffer() *sniffer {
	s := &sniffer{}
	s.framer = http2.NewFramer(io.Discard, &s.buf)
	// Every block must be decoded: later ones refer to its fields.
	const tableBytes = 4096 // HTTP/2's default, to which etcd keeps
	s.headers = hpack.NewDecoder(tableBytes, func(f hpack.HeaderField) {
		if f.Name != ":path" {
			return
		}
		for _, service := range services {
			if strings.HasPrefix(f.Value, service.prefix) {
				s.found |= service.links
			}
		}
	})
	return s
}

// read takes the next bytes and returns the kinds seen so far.
func (s *sniffer) read(b []byte) Links {
	if s.blind {
		return s.found
	}
	s.buf.Write(b)
	if !s.begun {
		if s.buf.Len() < len(http2.ClientPreface) {
			return s.found
		}
		s.begun = true
		if string(s.buf.Next(len(http2.ClientPreface))) != http2.ClientPreface {
			return s.giveUp()
		}
	}
	for {
		h := s.buf.Bytes()
		if len(h) < frameHeader || len(h) < frameHeader+int(h[0])<<16+int(h[1])<<8+int(h[2]) {
			return s.found
		}
		frame, err := s.framer.ReadFrame()
		if err != nil {
			return s.giveUp()
		}
		var block []byte
		var last bool
		switch frame := frame.(type) {
		case *http2.HeadersFrame:
			block, last = frame.HeaderBlockFragment(), frame.HeadersEnded()
		case *http2.ContinuationFrame:
			block, last = frame.HeaderBlockFragment(), frame.HeadersEnded()
		default:
			continue
		}
		if _, err := s.headers.Write(block); err != nil {
			return s.giveUp()
		}
		if last {
			if err := s.headers.Close(); err != nil {
				return s.giveUp()
			}
		}
	}
}

func (s *sniffer) giveUp() Links {
	s.blind = true
	s.buf = bytes.Buffer{}
	return s.found
}
