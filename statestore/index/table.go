package index

// table finds rows by their hash: open addressing with linear probing, 4 bytes a
// place. It is made of segments, so that growing moves a small part of it at a
// time. The zero table is empty.
type table struct{ segments [256]segment }

type segment struct {
	places []uint32 // a power of two of them, or none: empty, removed, or a row and 2
	used   int      // places that are not empty
	live   int      // of these, rows
}

const (
	empty   uint32 = 0
	removed uint32 = 1
	firstID uint32 = 2
)

// probe goes through the rows that may have a hash.
type probe struct {
	row    uint32
	places []uint32
	at     uint64
}

func (t *table) probe(hash uint64) probe {
	s := &t.segments[hash>>56]
	return probe{places: s.places, at: hash - 1}
}

// next moves to the next row. There is always an empty place to end at.
func (p *probe) next() bool {
	if len(p.places) == 0 {
		return false
	}
	for {
		p.at++
		switch v := p.places[p.at&uint64(len(p.places)-1)]; v {
		case empty:
			return false
		case removed:
		default:
			p.row = v - firstID
			return true
		}
	}
}

// insert adds a row that is not in the table. hashOf is asked for the hashes of
// rows when a segment grows.
func (t *table) insert(hash uint64, row uint32, hashOf func(row uint32) uint64) {
	s := &t.segments[hash>>56]
	if 4*(s.used+1) > 3*len(s.places) {
		old := s.places
		s.places = make([]uint32, max(8, ceilPower(2*(s.live+1))))
		s.used, s.live = 0, 0
		for _, v := range old {
			if v >= firstID {
				s.put(hashOf(v-firstID), v)
			}
		}
	}
	s.put(hash, row+firstID)
}

func (s *segment) put(hash uint64, v uint32) {
	mask := uint64(len(s.places) - 1)
	i := hash & mask
	for s.places[i] != empty {
		i = (i + 1) & mask
	}
	s.places[i] = v
	s.used++
	s.live++
}

// remove takes a row out.
func (t *table) remove(hash uint64, row uint32) {
	s := &t.segments[hash>>56]
	mask := uint64(len(s.places) - 1)
	i := hash & mask
	for s.places[i] != row+firstID {
		i = (i + 1) & mask
	}
	s.places[i] = removed
	s.live--
	// Nothing needs to probe past the end of a run.
	for s.places[(i+1)&mask] == empty && s.places[i] == removed {
		s.places[i] = empty
		s.used--
		i = (i - 1) & mask
	}
}

// ceilPower is the least power of two that is not below n.
func ceilPower(n int) int {
	p := 1
	for p < n {
		p *= 2
	}
	return p
}

// rows are values of one type under numbers, in pieces: adding one never moves
// the others.
type rows[T any] struct {
	pieces [][]T
	count  int // numbers given out, free ones included
	unused []uint32
}

// rowsPiece is how many rows a piece has.
const rowsPiece = 512

func (r *rows[T]) at(n uint32) *T { return &r.pieces[n/rowsPiece][n%rowsPiece] }

// len is how many rows are in use.
func (r *rows[T]) len() int { return r.count - len(r.unused) }

// add returns the number of a zero row.
func (r *rows[T]) add() uint32 {
	if last := len(r.unused) - 1; last >= 0 {
		n := r.unused[last]
		r.unused = r.unused[:last]
		return n
	}
	if r.count == len(r.pieces)*rowsPiece {
		r.pieces = append(r.pieces, make([]T, rowsPiece))
	}
	r.count++
	return uint32(r.count - 1)
}

func (r *rows[T]) free(n uint32) {
	var zero T
	*r.at(n) = zero
	r.unused = append(r.unused, n)
}
