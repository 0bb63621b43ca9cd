package authz

import (
	"crypto/rand"
	"hash/crc32"
	"strings"
	"unsafe"
)

// Format of the strings that keygate makes up: this prefix, 32 random
// characters of base62 (190 bits), an underscore, and the CRC-32 of all that
// precedes it in six characters of base62. The shape is GitHub's token format
// (github.blog, 2021-04-05): scanners find what has leaked, and junk is told
// without a look-up. The checksum is a filter and no secret: anybody can work
// it out.
type Format string

// KeyFormat is that of the consumer keys that keygate generates.
const KeyFormat Format = "kg_"

const (
	base62       = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	randomLength = 32
	sumLength    = 6 // 62^6 is more than 2^32
)

// GenerateKey returns a new consumer key in KeyFormat.
func GenerateKey() string { return KeyFormat.New() }

// NewSecret returns a new consumer secret: 32 random characters of base62.
func NewSecret() string { return random(new(strings.Builder)).String() }

// New returns a new string in the format. It is safe for concurrent use.
func (f Format) New() string {
	var b strings.Builder
	b.Grow(f.length())
	b.WriteString(string(f))
	random(&b).WriteByte('_')
	sum := checksum(b.String())
	b.Write(sum[:])
	return b.String()
}

// Checksum tells whether s has exactly the format's length and shape, and if so
// whether its checksum is right. A string that has not the shape is none of the
// format's, and ok is false. It does not allocate.
func (f Format) Checksum(s string) (own, ok bool) {
	if len(s) != f.length() || s[:len(f)] != string(f) || s[len(s)-sumLength-1] != '_' {
		return false, false
	}
	for i := len(f); i < len(s); i++ {
		if !base62Byte[s[i]] && i != len(s)-sumLength-1 {
			return false, false
		}
	}
	sum := checksum(s[:len(s)-sumLength])
	return true, s[len(s)-sumLength:] == string(sum[:])
}

func (f Format) length() int { return len(f) + randomLength + 1 + sumLength }

// random writes randomLength characters, all of them equally likely. crypto/rand
// never fails: it ends the process instead.
func random(b *strings.Builder) *strings.Builder {
	const even = 256 / len(base62) * len(base62) // above it some characters would be likelier
	var buf [randomLength]byte
	for n := 0; n < randomLength; {
		_, _ = rand.Read(buf[:])
		for _, r := range buf {
			if int(r) < even && n < randomLength {
				b.WriteByte(base62[int(r)%len(base62)])
				n++
			}
		}
	}
	return b
}

// checksum of s, with zeros in front.
func checksum(s string) (sum [sumLength]byte) {
	// The bytes of s itself: a copy would be one allocation for each key that is
	// presented.
	n := crc32.ChecksumIEEE(unsafe.Slice(unsafe.StringData(s), len(s)))
	for i := sumLength - 1; i >= 0; i-- {
		sum[i] = base62[n%uint32(len(base62))]
		n /= uint32(len(base62))
	}
	return sum
}

var base62Byte = func() (ok [256]bool) {
	for _, b := range []byte(base62) {
		ok[b] = true
	}
	return ok
}()
