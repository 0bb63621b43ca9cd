package statestore

import (
	"context"
	"time"

	"github.com/dgraph-io/ristretto/v2"

	"keygate/statestore/keyspace"
)

// Cache is the store's cache of records, for tests that drive ristretto into
// the corners where it loses or resurrects a Set.
type Cache = ristretto.Cache[uint64, *record]

// NewCache returns a cache that calls stall when it processes an item of cost
// 0, and onCall, if not nil, at the start of each Get and Set, under no lock.
func NewCache(stall, onCall func()) (*Cache, error) {
	cfg := &ristretto.Config[uint64, *record]{
		NumCounters: 100_000, MaxCost: 1 << 20, BufferItems: 64, IgnoreInternalCost: true,
		Cost: func(*record) int64 { stall(); return 1 },
	}
	if onCall != nil {
		cfg.KeyToHash = func(key uint64) (uint64, uint64) { onCall(); return key, 0 }
	}
	return ristretto.NewCache(cfg)
}

// UseCache replaces the cache of records. Before Run only.
func (s *Store) UseCache(c *Cache) {
	s.caches.records.Close()
	s.caches.records = c
}

// Cache returns the cache of records.
func (s *Store) Cache() *Cache { return s.caches.records }

// Hash of a record: its key in the Cache.
func (s *Store) Hash(r keyspace.Record) uint64 { return s.hash(r) }

// Rev is the revision at which a cached record was read; 0 for nil.
func Rev(r *record) int64 {
	if r == nil {
		return 0
	}
	return r.rev
}

// Fill brings one record into the cache, as a check would.
func (s *Store) Fill(ctx context.Context, want keyspace.Record) error {
	var v view
	return s.use(ctx, s.epoch.Load(), &v, 0, want)
}

// ShortenLease makes the store believe that its lease ends in d.
func (s *Store) ShortenLease(d time.Duration) { s.fleet.current.Load().end.Store(int64(now() + d)) }
