package authz

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
)

// latch remembers which credentials have been seen expired, so that a wall
// clock set back opens none of them again. The zero latch is empty and takes no
// memory before the first expired credential. Safe for concurrent use; a look
// takes no lock, and nothing here allocates but the table, once.
//
// It holds single credentials, never the latest time seen: after one jump ahead
// that would refuse every good key until the time had been reached again.
//
// Memory is bounded at 1 MiB: 128 Ki marks of 8 bytes, in sets of 16. Where a
// set is full its oldest mark goes, and that credential follows the clock
// again. Of 64 Ki credentials marked, in whatever time, fewer than one in a
// hundred are lost so. A restart forgets all.
type latch struct{ table atomic.Pointer[latchTable] }

const (
	latchSets = 8 << 10
	latchWays = 16
)

type latchTable struct {
	seed maphash.Seed
	// marks are hashes, 0 for none: two credentials share one by a chance of
	// 1 in 2^64, and the second is then refused until it is written again.
	marks [latchSets][latchWays]atomic.Uint64

	added struct {
		sync.Mutex
		// next place to be written in each set; it wraps at a multiple of latchWays.
		next [latchSets]uint8
	}
}

// latched is what a mark stands for: a credential as it was written. Writing
// it again makes another one, under which nothing has been seen yet. The
// expiry is part of it because revisions begin anew after a restore; the
// organization is not, because to have one key, one revision and one expiry in
// two of them is to be expired in both.
type latched struct {
	id                  KeyID
	revision, expiresAt int64
}

// add marks the credential of id as seen expired.
func (l *latch) add(id KeyID, c *Credential) {
	t := l.table.Load()
	if t == nil {
		l.table.CompareAndSwap(nil, &latchTable{seed: maphash.MakeSeed()})
		t = l.table.Load()
	}
	h := t.hash(id, c)
	if t.has(h) {
		return
	}
	t.added.Lock()
	defer t.added.Unlock()
	if t.has(h) { // by another check meanwhile
		return
	}
	set := h % latchSets
	t.marks[set][t.added.next[set]%latchWays].Store(h)
	t.added.next[set]++
}

// has tells whether the credential of id has been marked.
func (l *latch) has(id KeyID, c *Credential) bool {
	t := l.table.Load()
	return t != nil && t.has(t.hash(id, c))
}

func (t *latchTable) has(h uint64) bool {
	set := &t.marks[h%latchSets]
	for i := range set {
		if set[i].Load() == h {
			return true
		}
	}
	return false
}

// hash is never 0. Its seed is this table's own: nobody outside can choose
// keys that push others out.
func (t *latchTable) hash(id KeyID, c *Credential) uint64 {
	return max(maphash.Comparable(t.seed, latched{id, c.Revision, c.ExpiresAt}), 1)
}
