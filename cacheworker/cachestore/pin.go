package cachestore

import (
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/larderfs/larder/cacheworker/object"
)

// pinShare of the capacity is how much may be pinned: the rest has to go round.
const pinShare = 2

// Pin has an object stay that is complete here: it is never evicted for others' sake, until Unpin or Evict. It survives
// a restart. The error wraps object.ErrIncomplete if some of the object is not here, object.ErrNoSpace if too much
// is pinned.
func (s *Store) Pin(id object.ID) error {
	s.ensure(id)
	s.mu.Lock()
	e := s.entries[id]
	switch {
	case e == nil || !e.complete():
		s.mu.Unlock()
		return fmt.Errorf("pin %v: %w", id, object.ErrIncomplete)
	case e.pinned:
		s.mu.Unlock()
		return nil
	case !s.mayPin(e):
		pinned := s.pinned
		s.mu.Unlock()
		return fmt.Errorf("pin %v of %d bytes: %w: %d of %d bytes are pinned, and half of them may be", id, e.size, object.ErrNoSpace, pinned, s.cfg.CapacityBytes)
	}
	s.pin(e)
	e.indexed = true
	s.mu.Unlock()
	err := s.index.write(func(b *pebble.Batch) error { return b.Set(pinKey(id, e.nonce), nil, nil) })
	if err != nil {
		s.unpin(id)
		return fmt.Errorf("pin %v: %w: %w", id, object.ErrNoSpace, err)
	}
	return nil
}

// Unpin lets an object be evicted again. It reports whether it was pinned.
func (s *Store) Unpin(id object.ID) bool {
	e := s.unpin(id)
	if e == nil {
		return false
	}
	s.index.writeLazily(func(b *pebble.Batch) error { return b.Delete(pinKey(id, e.nonce), nil) })
	return true
}

func (s *Store) unpin(id object.ID) *entry {
	s.ensure(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil || !e.pinned {
		return nil
	}
	s.unpinned(e)
	s.policy.Return(&e.Node)
	return e
}

// Pinned reports whether the object is.
func (s *Store) Pinned(id object.ID) bool {
	s.ensure(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	return e != nil && e.pinned
}

// mayPin requires s.mu.
func (s *Store) mayPin(e *entry) bool {
	return s.pinned+e.wholeOnDisk() <= s.cfg.CapacityBytes/pinShare
}

// pin requires s.mu.
func (s *Store) pin(e *entry) {
	e.moving, e.pinned = false, true
	s.policy.Keep(&e.Node)
	s.pins++
	s.pinned += e.wholeOnDisk()
}

// unpinned takes a pin away, if there is one. Requires s.mu.
func (s *Store) unpinned(e *entry) {
	if !e.pinned {
		return
	}
	e.pinned = false
	s.pins--
	s.pinned -= e.wholeOnDisk()
}

// wholeOnDisk is what all chunks occupy.
func (e *entry) wholeOnDisk() (bytes int64) {
	if last := e.chunks() - 1; last >= 0 {
		bytes = int64(last)*object.ChunkSize + onDisk(e.chunkLen(last))
	}
	return bytes
}
