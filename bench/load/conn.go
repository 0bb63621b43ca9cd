package load

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
)

// Limits of HTTP/2 until somebody says otherwise (RFC 9113, 6.5.2).
const (
	frameHeader   = 9
	maxFrame      = 16384
	defaultWindow = 65535
	defaultTable  = 4096
)

// ring is the number of streams that can be in flight on a connection. A power
// of two: a stream's slot is found by its number.
const ring = 4096

// dialTimeout of a connection.
const dialTimeout = 2 * time.Second

// conn is one HTTP/2 connection, read and written by one thread.
type conn struct {
	request *Request
	file    *os.File // owns fd
	fd      int
	in      []byte // read, from start to end not looked at yet
	start   int
	end     int
	out     []byte // to be written, from sent on
	sent    int

	decoder    *hpack.Decoder
	current    *slot // whose headers are being decoded; never nil
	nextID     uint32
	slots      [ring]slot
	inFlight   int
	discarded  slot // of streams that nobody waits for
	sendWindow int64
	maxStreams int
	window     int64 // for what the server sends, altogether
	consumed   int64 // of it, since it was last told
	away       bool  // it was asked to go away
	last       uint32
}

// slot is a stream in flight; one without an id is free.
type slot struct {
	id         uint32
	began      time.Duration
	httpStatus int
	grpcStatus int // -1 until it has come
	problem    string
	head       [16]byte // of the message, with its frame
	n          int
}

func dial(address string, r *Request) (*conn, error) {
	network := "tcp"
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		network, address = "unix", path
	}
	nc, err := net.DialTimeout(network, address, dialTimeout)
	if err != nil {
		return nil, err
	}
	defer func() { _ = nc.Close() }() // the file is a duplicate
	var file *os.File
	switch nc := nc.(type) {
	case *net.TCPConn:
		file, err = nc.File()
	case *net.UnixConn:
		file, err = nc.File()
	}
	if err != nil {
		return nil, fmt.Errorf("descriptor of a connection: %w", err)
	}
	c := &conn{
		request: r, file: file, fd: int(file.Fd()), in: make([]byte, 1<<16), nextID: 1,
		sendWindow: defaultWindow, maxStreams: ring, window: defaultWindow + int64(r.window),
	}
	if err := unix.SetNonblock(c.fd, true); err != nil {
		c.close()
		return nil, fmt.Errorf("make a connection non-blocking: %w", err)
	}
	table := uint32(defaultTable)
	for _, s := range r.settings {
		if s.ID == http2.SettingHeaderTableSize {
			table = s.Val
		}
	}
	c.current = &c.discarded
	c.decoder = hpack.NewDecoder(table, func(f hpack.HeaderField) { c.current.header(f) })
	var opening bytes.Buffer
	opening.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&opening, nil)
	err = f.WriteSettings(r.settings...)
	if r.window > 0 {
		err = errors.Join(err, f.WriteWindowUpdate(0, r.window))
	}
	c.out = opening.Bytes()
	return c, err
}

// close also forgets what was to be written: the descriptor's number may soon be
// another file's.
func (c *conn) close() {
	c.out, c.sent = nil, 0
	_ = c.file.Close()
}

// ready tells whether a request can be sent now.
func (c *conn) ready() bool {
	return !c.away && c.inFlight < c.maxStreams && int64(len(c.request.message)) <= c.sendWindow && c.slots[c.nextID/2%ring].id == 0
}

// frame appends a frame's header.
func (c *conn) frame(length int, kind http2.FrameType, flags http2.Flags, stream uint32) {
	c.out = append(c.out, byte(length>>16), byte(length>>8), byte(length), byte(kind), byte(flags))
	c.out = binary.BigEndian.AppendUint32(c.out, stream)
}

// send appends the nth request to what is to be written.
func (c *conn) send(n uint64, key func(uint64, []byte), began time.Duration) {
	r, id := c.request, c.nextID
	block, keys := r.next, r.keysNext
	if id == 1 {
		block, keys = r.first, r.keysFirst
	}
	exchange := func(base int, keys []int) {
		for _, at := range keys {
			if key != nil {
				key(n, c.out[base+at:base+at+r.keyLen])
			}
		}
	}
	flags := http2.FlagHeadersEndHeaders
	if r.message == nil {
		flags |= http2.FlagHeadersEndStream
	}
	c.frame(len(block), http2.FrameHeaders, flags, id)
	c.out = append(c.out, block...)
	exchange(len(c.out)-len(block), keys)
	if r.message != nil {
		c.frame(len(r.message), http2.FrameData, http2.FlagDataEndStream, id)
		c.out = append(c.out, r.message...)
		exchange(len(c.out)-len(r.message), r.keysMessage)
		c.sendWindow -= int64(len(r.message))
	}
	c.slots[id/2%ring] = slot{id: id, began: began, grpcStatus: -1}
	c.nextID += 2
	c.inFlight++
}

// flush writes what the kernel takes.
func (c *conn) flush() error {
	for c.sent < len(c.out) {
		n, err := unix.Write(c.fd, c.out[c.sent:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("write: %w", err)
		}
		c.sent += n
	}
	c.out, c.sent = c.out[:0], 0
	return nil
}

// receive reads what has come and calls ended with each stream that has ended.
func (c *conn) receive(ended func(*conn, *slot)) error {
	for {
		if c.start > 0 {
			copy(c.in, c.in[c.start:c.end])
			c.start, c.end = 0, c.end-c.start
		}
		n, err := unix.Read(c.fd, c.in[c.end:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("read: %w", err)
		case n == 0:
			return fmt.Errorf("read: %w", io.EOF)
		}
		c.end += n
		full := c.end == len(c.in)
		for c.end-c.start >= frameHeader {
			h := c.in[c.start:]
			length := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
			if length > maxFrame {
				return fmt.Errorf("read: a frame of %d bytes", length)
			}
			if c.end-c.start < frameHeader+length {
				break
			}
			id := binary.BigEndian.Uint32(h[5:]) &^ (1 << 31)
			if err := c.take(http2.FrameType(h[3]), http2.Flags(h[4]), id, h[frameHeader:frameHeader+length], ended); err != nil {
				return err
			}
			c.start += frameHeader + length
		}
		if !full {
			return nil // the rest has not come yet
		}
	}
}

// slot of a stream; one to be thrown away if nobody waits for it.
func (c *conn) slot(id uint32) *slot {
	if s := &c.slots[id/2%ring]; s.id == id && id != 0 {
		return s
	}
	c.discarded = slot{}
	return &c.discarded
}

func (c *conn) take(kind http2.FrameType, flags http2.Flags, id uint32, payload []byte, ended func(*conn, *slot)) error {
	end := func() {
		s := c.slot(id)
		if s.id == 0 {
			return
		}
		got := *s
		*s = slot{}
		c.inFlight--
		ended(c, &got)
	}
	switch kind {
	case http2.FrameData:
		if c.consumed += int64(len(payload)); c.consumed >= c.window/2 {
			c.frame(4, http2.FrameWindowUpdate, 0, 0)
			c.out = binary.BigEndian.AppendUint32(c.out, uint32(c.consumed))
			c.consumed = 0
		}
		data, err := unpad(flags.Has(http2.FlagDataPadded), payload)
		if err != nil {
			return err
		}
		s := c.slot(id)
		s.n += copy(s.head[s.n:], data)
		if flags.Has(http2.FlagDataEndStream) {
			end()
		}
	case http2.FrameHeaders:
		data, err := unpad(flags.Has(http2.FlagHeadersPadded), payload)
		if err == nil && flags.Has(http2.FlagHeadersPriority) {
			if len(data) < 5 {
				return errors.New("read: a short HEADERS frame")
			}
			data = data[5:]
		}
		if err != nil {
			return err
		}
		if !flags.Has(http2.FlagHeadersEndHeaders) {
			return errors.New("read: headers of more than one frame")
		}
		c.current = c.slot(id)
		if _, err := c.decoder.Write(data); err != nil {
			return fmt.Errorf("read headers: %w", err)
		}
		if err := c.decoder.Close(); err != nil {
			return fmt.Errorf("read headers: %w", err)
		}
		if flags.Has(http2.FlagHeadersEndStream) {
			end()
		}
	case http2.FrameRSTStream:
		if len(payload) != 4 {
			return errors.New("read: a RST_STREAM frame of another length")
		}
		c.slot(id).problem = "reset by " + http2.ErrCode(binary.BigEndian.Uint32(payload)).String()
		end()
	case http2.FrameSettings:
		if flags.Has(http2.FlagSettingsAck) {
			return nil
		}
		for p := payload; len(p) >= 6; p = p[6:] {
			if err := c.setting(http2.Setting{ID: http2.SettingID(binary.BigEndian.Uint16(p)), Val: binary.BigEndian.Uint32(p[2:])}); err != nil {
				return err
			}
		}
		c.frame(0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	case http2.FramePing:
		if !flags.Has(http2.FlagPingAck) {
			c.frame(len(payload), http2.FramePing, http2.FlagPingAck, 0)
			c.out = append(c.out, payload...)
		}
	case http2.FrameWindowUpdate:
		if len(payload) != 4 {
			return errors.New("read: a WINDOW_UPDATE frame of another length")
		}
		if id == 0 { // a stream's window holds its one message from the beginning
			c.sendWindow += int64(binary.BigEndian.Uint32(payload) &^ (1 << 31))
		}
	case http2.FrameGoAway:
		if len(payload) < 8 {
			return errors.New("read: a short GOAWAY frame")
		}
		c.away, c.last = true, binary.BigEndian.Uint32(payload)&^(1<<31)
		if code := http2.ErrCode(binary.BigEndian.Uint32(payload[4:])); code != http2.ErrCodeNo {
			return fmt.Errorf("read: GOAWAY %v %q", code, payload[8:])
		}
	case http2.FrameContinuation, http2.FramePushPromise:
		return fmt.Errorf("read: a %v frame", kind)
	}
	return nil
}

func unpad(padded bool, payload []byte) ([]byte, error) {
	if !padded {
		return payload, nil
	}
	if len(payload) == 0 || int(payload[0]) >= len(payload) {
		return nil, errors.New("read: a frame with more padding than bytes")
	}
	return payload[1 : len(payload)-int(payload[0])], nil
}

func (c *conn) setting(s http2.Setting) error {
	switch s.ID {
	case http2.SettingHeaderTableSize:
		if s.Val < defaultTable {
			return fmt.Errorf("the server has a header table of %d bytes: the requests are encoded for %d", s.Val, defaultTable)
		}
	case http2.SettingInitialWindowSize:
		if int(s.Val) < len(c.request.message) {
			return fmt.Errorf("the server takes %d bytes of a stream, the message has %d", s.Val, len(c.request.message))
		}
	case http2.SettingMaxConcurrentStreams:
		c.maxStreams = int(min(s.Val, ring))
	}
	return nil
}

// refused takes out the streams that the server will not look at, and returns
// when they began.
func (c *conn) refused() (all []time.Duration) {
	for i := range c.slots {
		if s := &c.slots[i]; s.id > c.last {
			all = append(all, s.began)
			*s = slot{}
			c.inFlight--
		}
	}
	return all
}

// header of an answer.
func (s *slot) header(f hpack.HeaderField) {
	switch f.Name {
	case ":status":
		s.httpStatus, _ = strconv.Atoi(f.Value)
	case "grpc-status":
		s.grpcStatus, _ = strconv.Atoi(f.Value)
	}
}

// verdict of an answer that has ended.
func (s *slot) verdict(grpc bool) (Verdict, string) {
	switch {
	case s.problem != "":
		return Failed, s.problem
	case !grpc && s.httpStatus >= 200 && s.httpStatus < 300:
		return Allowed, ""
	case !grpc && (s.httpStatus == 401 || s.httpStatus == 403):
		return Denied, ""
	case s.httpStatus != 200:
		return Failed, problem("status", s.httpStatus)
	case s.grpcStatus != 0:
		return Failed, problem("grpc-status", s.grpcStatus)
	}
	// A CheckResponse begins with its status, and that with its code, which is
	// left out if it is 0.
	m := s.head[:s.n]
	switch {
	case s.n < grpcPrefix+2 || m[0] != 0 || m[grpcPrefix] != 0x0a:
		return Failed, "an answer without a status"
	case m[grpcPrefix+1] == 0:
		return Allowed, ""
	case s.n < grpcPrefix+4 || m[grpcPrefix+2] != 0x08:
		return Failed, "an answer without a status code"
	case m[grpcPrefix+3] == 0:
		return Allowed, ""
	}
	return Denied, ""
}
