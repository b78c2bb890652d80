package cachestore

import (
	"encoding/binary"
	"errors"
	"maps"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/larderfs/larder/cacheworker/object"
)

// grant says that the under store answered a principal's own request for the object.
type grant struct {
	principal uint32 // number in Store.principals
	at        int64  // unix nanoseconds
}

// revocation voids the grants of a principal in a store.
type revocation struct {
	principal object.Principal
	store     object.Store
}

// Grant remembers that the under store answered p for obj at that time. Nothing is
// remembered of an object without a cache file or a tail.
func (s *Store) Grant(obj object.Object, p object.Principal, at time.Time) {
	if p == (object.Principal{}) {
		return
	}
	id := obj.ID()
	s.grant(id, p, at.UnixNano())
	s.grant(tailID(id), p, at.UnixNano())
}

func (s *Store) grant(id object.ID, p object.Principal, at int64) {
	s.ensure(id)
	s.mu.Lock()
	e := s.entries[id]
	if e == nil || !s.setGrant(e, p, at) {
		s.mu.Unlock()
		return
	}
	e.indexed = true
	s.mu.Unlock()
	key := grantKey(e.Key, e.nonce, p)
	value := binary.BigEndian.AppendUint64(nil, uint64(at))
	s.index.writeLazily(func(b *pebble.Batch) error { return b.Set(key, value, nil) })
}

// shareGrants gives the grants of one entry to another.
func (s *Store) shareGrants(from, to object.ID) {
	at := map[object.Principal]int64{}
	s.mu.Lock()
	if e := s.entries[from]; e != nil {
		for p, n := range s.principals {
			for _, g := range e.grants {
				if g.principal == n {
					at[p] = g.at
				}
			}
		}
	}
	s.mu.Unlock()
	for p, t := range at {
		s.grant(to, p, t)
	}
}

// setGrant reports whether the grant is new, or so much newer that the index should know.
// Requires s.mu.
func (s *Store) setGrant(e *entry, p object.Principal, at int64) bool {
	n, ok := s.principals[p]
	if !ok {
		n = uint32(len(s.principals))
		s.principals[p] = n
	}
	for i := range e.grants {
		g := &e.grants[i]
		if g.principal != n {
			continue
		}
		worth := at-g.at > int64(s.cfg.GrantTTL)/64 || s.isRevoked(p, e.store, g.at)
		if worth {
			g.at = at
		}
		return worth
	}
	e.grants = append(e.grants, grant{n, at})
	return true
}

// Granted reports whether p may be served cached bytes of the object.
func (s *Store) Granted(id object.ID, p object.Principal) bool {
	return s.granted(id, p) || s.granted(tailID(id), p)
}

func (s *Store) granted(id object.ID, p object.Principal) bool {
	s.ensure(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	n, ok := s.principals[p]
	if e == nil || !ok {
		return false
	}
	for _, g := range e.grants {
		if g.principal == n {
			return s.holds(p, e.store, g.at)
		}
	}
	return false
}

// holds reports whether a grant does. Requires s.mu.
func (s *Store) holds(p object.Principal, store uint32, at int64) bool {
	return time.Since(time.Unix(0, at)) < s.cfg.GrantTTL && !s.isRevoked(p, store, at)
}

func (s *Store) isRevoked(p object.Principal, store uint32, at int64) bool {
	until, ok := s.revoked[revocation{p, s.stores[store]}]
	return ok && at <= until
}

// Revoke voids all grants of p in a store, because the store refused p there. It survives a restart.
func (s *Store) Revoke(p object.Principal, store object.Store) {
	now := time.Now().UnixNano()
	s.mu.Lock()
	s.revoked[revocation{p, store}] = now
	s.mu.Unlock()
	err := s.writeRevocation(revocation{p, store}, now)
	if errors.Is(err, errRefused) {
		s.revokedUnsaved.Store(true)
	} // a broken index is read again only after it was opened anew, empty or not: its grants end with GrantTTL
}

func (s *Store) writeRevocation(r revocation, at int64) error {
	return s.index.write(func(b *pebble.Batch) error {
		return b.Set(revocationKey(r.principal, r.store), binary.BigEndian.AppendUint64(nil, uint64(at)), nil)
	})
}

// saveRevocations writes all of them, if one could not be written when it was made.
func (s *Store) saveRevocations() {
	if s.index.health.isSick() || !s.load.begun.Load() || !s.revokedUnsaved.Swap(false) {
		return
	}
	s.mu.Lock()
	all := maps.Clone(s.revoked)
	s.mu.Unlock()
	for r, at := range all {
		if errors.Is(s.writeRevocation(r, at), errRefused) {
			s.revokedUnsaved.Store(true)
			return
		}
	}
}

func revocationKey(p object.Principal, store object.Store) []byte {
	return append(append([]byte{spaceMeta, 'r'}, p[:]...), store...)
}

func (s *Store) loadRevocation(k, v []byte, now time.Time) {
	if len(k) < 2+16 || k[1] != 'r' || len(v) != 8 {
		return
	}
	at := int64(binary.BigEndian.Uint64(v))
	if now.Sub(time.Unix(0, at)) > s.cfg.GrantTTL { // what it voids has ended by itself
		s.index.deleteLater(k)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := revocation{object.Principal(k[2:18]), object.Store(k[18:])}
	s.revoked[r] = max(s.revoked[r], at) // one may be younger that could not be written
}
