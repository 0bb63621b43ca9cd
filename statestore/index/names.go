package index

import (
	"encoding/binary"
	"hash/maphash"
	"unsafe"
)

// names are strings, each kept once, under a number. Number 0 is the empty one.
//
// Their bytes lie in chunks that are only ever appended to, so a string that was
// handed out stays what it is for as long as somebody has it. A chunk of which
// more than half is of no more use is given up, after what is left has moved.
type names struct {
	seed    maphash.Seed
	entries []nameEntry
	free    []uint32
	byText  table
	chunks  []chunk
	unused  []uint32 // numbers of chunks that were given up
	current uint32
}

type nameEntry struct {
	chunk, offset, length uint32
	refs                  uint32
	hash                  uint32
}

// chunk holds names, each behind its number and its length, 4 bytes each.
type chunk struct {
	bytes []byte
	dead  int // bytes of names that were released or have moved
}

const (
	chunkSize  = 64 << 10
	nameHeader = 8
)

func (s *names) init() {
	s.seed = maphash.MakeSeed()
	s.entries = []nameEntry{{}}
	s.chunks = []chunk{{}}
}

// at returns a name. It is valid for ever.
func (s *names) at(n uint32) string {
	if n == 0 {
		return ""
	}
	e := &s.entries[n]
	return unsafe.String(&s.chunks[e.chunk].bytes[e.offset], e.length)
}

func (s *names) hash(text string) uint32 { return uint32(maphash.String(s.seed, text)) }

// spread makes the 64 bits that a table wants of a name's 32.
func spread(hash uint32) uint64 { return uint64(hash) * 0x9e3779b97f4a7c15 }

// find returns the number of a name; 0 if there is none.
func (s *names) find(text string) uint32 {
	if text == "" {
		return 0
	}
	h := s.hash(text)
	for p := s.byText.probe(spread(h)); p.next(); {
		if s.entries[p.row].hash == h && s.at(p.row) == text {
			return p.row
		}
	}
	return 0
}

// intern returns the number of a name, which is then used once more.
func (s *names) intern(text string) uint32 {
	if text == "" {
		return 0
	}
	n := s.find(text)
	if n == 0 {
		if last := len(s.free) - 1; last >= 0 {
			n, s.free = s.free[last], s.free[:last]
		} else {
			n = uint32(len(s.entries))
			s.entries = append(s.entries, nameEntry{})
		}
		s.entries[n] = nameEntry{hash: s.hash(text), length: uint32(len(text))}
		s.place(n, text)
		s.byText.insert(spread(s.entries[n].hash), n, func(n uint32) uint64 { return spread(s.entries[n].hash) })
	}
	s.entries[n].refs++
	return n
}

// release ends one use of a name.
func (s *names) release(n uint32) {
	if n == 0 {
		return
	}
	e := &s.entries[n]
	if e.refs--; e.refs > 0 {
		return
	}
	s.byText.remove(spread(e.hash), n)
	at, size := e.chunk, nameHeader+int(e.length)
	*e = nameEntry{}
	s.free = append(s.free, n)
	s.bury(at, size)
}

// replace makes *n the number of text.
func (s *names) replace(n *uint32, text string) {
	if s.at(*n) == text {
		return
	}
	old := *n
	*n = s.intern(text)
	s.release(old)
}

// place writes a name into the current chunk, or the next.
func (s *names) place(n uint32, text string) {
	size := nameHeader + len(text)
	c := &s.chunks[s.current]
	if cap(c.bytes)-len(c.bytes) < size {
		next := chunk{bytes: make([]byte, 0, max(chunkSize, size))}
		full := s.current
		if last := len(s.unused) - 1; last >= 0 {
			s.current, s.unused = s.unused[last], s.unused[:last]
			s.chunks[s.current] = next
		} else {
			s.current = uint32(len(s.chunks))
			s.chunks = append(s.chunks, next)
		}
		s.bury(full, 0) // it may have been more than half dead while it was current
		c = &s.chunks[s.current]
	}
	e := &s.entries[n]
	e.chunk, e.offset = s.current, uint32(len(c.bytes)+nameHeader)
	c.bytes = binary.LittleEndian.AppendUint32(c.bytes, n)
	c.bytes = binary.LittleEndian.AppendUint32(c.bytes, e.length)
	c.bytes = append(c.bytes, text...)
}

// bury notes that bytes of a chunk are of no more use, and gives the chunk up if
// most of it is.
func (s *names) bury(at uint32, size int) {
	c := &s.chunks[at]
	c.dead += size
	if at == s.current || c.bytes == nil || 2*c.dead < cap(c.bytes) {
		return
	}
	bytes := c.bytes
	*c = chunk{}
	// The names that are left move. A number that has been given to another name
	// since shows by its place.
	for i := 0; i < len(bytes); {
		n, length := binary.LittleEndian.Uint32(bytes[i:]), binary.LittleEndian.Uint32(bytes[i+4:])
		i += nameHeader
		if e := &s.entries[n]; e.refs > 0 && e.chunk == at && e.offset == uint32(i) {
			s.place(n, unsafe.String(&bytes[i], length))
		}
		i += int(length)
	}
	s.unused = append(s.unused, at)
}
