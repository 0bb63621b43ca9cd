package load

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Captured is a request as a real Envoy sent it, kept in a file.
type Captured struct {
	// Envoy that sent it, and with what configuration.
	Envoy string `json:"envoy"`
	// Opening of the connection: its SETTINGS, and the credit that follows them.
	Settings []http2.Setting `json:"settings"`
	Window   uint32          `json:"window"`
	// Headers in their order, pseudo headers first.
	Headers []Header `json:"headers"`
	// Key in Message, or in a header's value; it is what Request exchanges.
	Key string `json:"key"`
	// Message without its gRPC frame; none means a request without a body.
	Message []byte `json:"message,omitempty"`
}

// Header of a request.
type Header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// ReadCaptured reads a file that WriteCaptured has written.
func ReadCaptured(path string) (Captured, error) {
	var c Captured
	data, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("read the captured request: %w", err)
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("read %s: %w", path, err)
	}
	return c, nil
}

// Write the request into a file.
func (c Captured) Write(path string) error {
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the captured request: %w", err)
	}
	return nil
}

// Request is a captured request made ready to be sent: its header blocks and its
// message are encoded once. It is immutable.
type Request struct {
	settings []http2.Setting
	window   uint32
	// first is the header block of a connection's first request, next that of every
	// other: all but a key among the headers is then in the dynamic table.
	first, next []byte
	message     []byte // in its gRPC frame; nil without a body
	// Where keys stand, within the block or the message.
	keysFirst, keysNext, keysMessage []int
	keyLen                           int
	grpc                             bool
}

// grpcPrefix is the length of the frame before each gRPC message.
const grpcPrefix = 5

// NewRequest encodes a captured request.
func NewRequest(c Captured) (*Request, error) {
	r := &Request{settings: c.Settings, window: c.Window, keyLen: len(c.Key)}
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	encode := func() ([]byte, []int) {
		block.Reset()
		var keys []int
		for _, h := range c.Headers {
			if c.Key != "" && h.Value == c.Key {
				// By hand: a literal that is never indexed, and not compressed, so that
				// another key fits in its place (RFC 7541, 6.2.3).
				raw := hpack.AppendHuffmanString(nil, h.Name)
				block.WriteByte(0x10)
				appendLength(&block, len(raw), 0x80)
				block.Write(raw)
				appendLength(&block, len(h.Value), 0)
				keys = append(keys, block.Len())
				block.WriteString(h.Value)
				continue
			}
			// A bytes.Buffer returns no error.
			_ = e.WriteField(hpack.HeaderField{Name: h.Name, Value: h.Value})
		}
		return bytes.Clone(block.Bytes()), keys
	}
	r.first, r.keysFirst = encode()
	r.next, r.keysNext = encode()
	if err := r.repeats(c.Headers); err != nil {
		return nil, err
	}
	for _, h := range c.Headers {
		r.grpc = r.grpc || h.Name == "content-type" && h.Value == "application/grpc"
	}
	if c.Message != nil {
		r.message = append([]byte{0, byte(len(c.Message) >> 24), byte(len(c.Message) >> 16), byte(len(c.Message) >> 8), byte(len(c.Message))}, c.Message...)
		for from := 0; c.Key != ""; {
			at := bytes.Index(r.message[from:], []byte(c.Key))
			if at < 0 {
				break
			}
			r.keysMessage = append(r.keysMessage, from+at)
			from += at + len(c.Key)
		}
	}
	if c.Key != "" && len(r.keysFirst)+len(r.keysMessage) == 0 {
		return nil, fmt.Errorf("the key of %d characters stands nowhere in the request", len(c.Key))
	}
	if longest := max(len(r.first), len(r.message)); longest > maxFrame {
		return nil, fmt.Errorf("a frame of %d bytes, want at most %d: the generator sends one for all headers and one for the message", longest, maxFrame)
	}
	return r, nil
}

// repeats checks that next says the same after first and after itself.
func (r *Request) repeats(want []Header) error {
	var got []Header
	d := hpack.NewDecoder(defaultTable, func(f hpack.HeaderField) { got = append(got, Header{f.Name, f.Value}) })
	for i, block := range [][]byte{r.first, r.next, r.next, r.next} {
		got = got[:0]
		if _, err := d.Write(block); err != nil {
			return fmt.Errorf("headers of request %d: %w", i+1, err)
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("the headers do not fit into the dynamic table: request %d says %q", i+1, got)
		}
	}
	return nil
}

// appendLength of a string in HPACK (RFC 7541, 5.1 and 5.2).
func appendLength(b *bytes.Buffer, n int, huffman byte) {
	if n < 0x7f {
		b.WriteByte(huffman | byte(n))
		return
	}
	b.WriteByte(huffman | 0x7f)
	for n -= 0x7f; n >= 0x80; n >>= 7 {
		b.WriteByte(byte(n) | 0x80)
	}
	b.WriteByte(byte(n))
}

// KeyLen is the length that every key must have.
func (r *Request) KeyLen() int { return r.keyLen }
