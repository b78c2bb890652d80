package cachestore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/policy"
)

// Move is a cache file that is copied to another tier: a lease that is no use of the object. Keep or Drop ends it.
type Move struct {
	*File
	victim bool
}

// Grant is one that a move takes along.
type Grant struct {
	Principal object.Principal
	At        time.Time
}

// Victim is the file that would be evicted next, but for tails; nil if none can be. While it is moved nobody else evicts it, and
// it stays if somebody opens it.
func (s *Store) Victim() *Move {
	s.mu.Lock()
	if s.closed || !s.load.ended.Load() || s.leased == len(s.entries) {
		s.mu.Unlock()
		return nil
	}
	n := s.policy.Evict(func(n *policy.Node[object.ID]) bool { e := s.entries[n.Key]; return e.file != nil || e.tail })
	if n == nil {
		s.mu.Unlock()
		return nil
	}
	e := s.entries[n.Key]
	e.moving = true
	s.policy.Keep(n)
	return s.move(e, true)
}

// Copy is the file of an object, which stays here; nil if there is none.
func (s *Store) Copy(id object.ID) *Move {
	s.ensure(id)
	s.mu.Lock()
	e := s.entries[id]
	if e == nil || s.closed {
		s.mu.Unlock()
		return nil
	}
	return s.move(e, false)
}

// move requires s.mu, which it gives up.
func (s *Store) move(e *entry, victim bool) *Move {
	f := s.lease(e, object.Object{Size: e.size})
	f.asked = s.policy.Hits(&e.Node)
	s.mu.Unlock()
	m := &Move{f, victim}
	obj, err := s.object(e)
	if err == nil {
		f.obj = obj
		err = f.openOnce(false)
	}
	if err != nil {
		m.Keep()
		return nil
	}
	return m
}

// object reads what an entry caches.
func (s *Store) object(e *entry) (object.Object, error) {
	v, err := s.index.get(objectKey(e.Key, e.nonce))
	if err != nil {
		return object.Object{}, err
	}
	o, ok := decodeWhole(v)
	if !ok || o.ID() != e.Key {
		return o, fmt.Errorf("%w: no record of %v", object.ErrCorrupt, e.Key)
	}
	return o, nil
}

// decodeWhole undoes encodeObject.
func decodeWhole(v []byte) (o object.Object, ok bool) {
	r, ok := readObject(v)
	if !ok {
		return o, false
	}
	o.Store, o.Key, o.Size = object.Store(r.store), string(r.key), r.sizeBytes
	for range 2 {
		n, w := binary.Uvarint(v)
		v = v[w+int(n):]
	}
	n, w := binary.Uvarint(v)
	o.Version = string(v[w : w+int(n)])
	v = v[w+int(n):]
	_, w = binary.Uvarint(v)
	mtime, k := binary.Varint(v[w:])
	if k <= 0 {
		return o, false
	}
	o.ModTime = time.Unix(0, mtime)
	return o, true
}

// Chunk reads a chunk into buf and holds it against its sum: object.ErrIncomplete if it is absent, object.ErrCorrupt if the
// disk did not give it back, and it is absent from then on. The rest of buf is not used.
func (m *Move) Chunk(i int, buf []byte) ([]byte, error) {
	f := m.File
	if !f.Has(i) {
		return nil, object.ErrIncomplete
	}
	v, err := f.s.index.get(chunkKey(f.e.Key, f.e.nonce, i))
	if err != nil {
		return nil, err
	}
	want, _, ok := decodeChunk(v)
	b := buf[:f.e.chunkLen(i)]
	_, err = f.s.dir.sys.preadOnce(f.file.f, b, int64(i)*object.ChunkSize)
	if err == nil && (!ok || xxhash.Sum64(b) != want) {
		err = errors.New("the sum is another")
	}
	if err != nil {
		f.s.dropChunk(f.e, i, err)
		return nil, fmt.Errorf("%w: chunk %d of %v: %w", object.ErrCorrupt, i, f.e.Key, err)
	}
	return b, nil
}

// Since is since when something of the object is cached, in whatever tier.
func (m *Move) Since() time.Time { return m.s.since(m.e) }

// since is now for what is not recorded yet.
func (s *Store) since(e *entry) time.Time {
	v, err := s.index.get(sinceKey(e.Key, e.nonce))
	o := objectRecord{}
	if err == nil {
		o.since, _ = decodeSince(v)
	}
	return s.sinceOf(e.Key, e.nonce, o)
}

// Grants are those that hold now.
func (m *Move) Grants() (all []Grant) {
	s := m.File.s
	s.mu.Lock()
	defer s.mu.Unlock()
	numbers := map[uint32]int64{}
	for _, g := range m.e.grants {
		numbers[g.principal] = g.at
	}
	for p, n := range s.principals {
		at, ok := numbers[n]
		if ok && s.holds(p, m.e.store, at) {
			all = append(all, Grant{p, time.Unix(0, at)})
		}
	}
	return all
}

// Wanted says that somebody has opened the victim, so that it stays.
func (m *Move) Wanted() bool {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	return m.victim && !m.e.moving
}

// Keep ends the move, and the file stays.
func (m *Move) Keep() error {
	s, e := m.s, m.e
	s.mu.Lock()
	if m.victim && e.moving {
		e.moving = false
		if !e.evicted.Load() {
			s.policy.Return(&e.Node)
		}
	}
	s.mu.Unlock()
	return m.Close()
}

// Drop ends the move of a victim and takes it away, unless somebody has opened it meanwhile. It reports whether it
// has gone.
func (m *Move) Drop() bool {
	if err := m.Close(); err != nil {
		m.s.trouble(err)
	}
	if !m.drop() {
		m.Keep()
		return false
	}
	m.s.notify(m.e.Key)
	return true
}

func (m *Move) drop() bool {
	s, e := m.s, m.e
	s.evicting.Lock()
	defer s.evicting.Unlock()
	s.mu.Lock()
	if s.closed || e.evicted.Load() || !e.moving {
		s.mu.Unlock()
		return false
	}
	s.forget(e)
	s.mu.Unlock()
	s.remove(e)
	return true
}

// Receive opens the file of an object that is copied here from another tier, where it was asked for again so often, and is cached
// since then. What can be had elsewhere no longer counts as such.
func (s *Store) Receive(obj object.Object, asked uint8, since time.Time) (*File, error) {
	f, err := s.openAs(obj, receiving)
	if err != nil {
		return nil, err
	}
	if f.since = since; s.since(f.e).After(since) {
		err := s.index.write(func(b *pebble.Batch) error { return b.Set(sinceKey(f.e.Key, f.e.nonce), encodeSince(since), nil) })
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%w: %w", object.ErrNoSpace, err), f.Close())
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !f.e.evicted.Load() {
		s.policy.Credit(&f.e.Node, asked)
		if !f.e.pinned {
			s.policy.Return(&f.e.Node)
		}
	}
	return f, nil
}

// Spare says whether another tier has the object, too: then it is the first to go here.
func (s *Store) Spare(id object.ID, spare bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	switch {
	case e == nil || e.pinned || e.moving:
	case spare:
		s.policy.Spare(&e.Node)
	default:
		s.policy.Return(&e.Node)
	}
}

// Use says that an object was opened whose file, or whose bytes, the caller has: all of it counts as read.
func (s *Store) Use(id object.ID) { s.Ask(id) }

// Ask is Use, and returns how often the object was asked for again.
func (s *Store) Ask(id object.ID) (asked uint8) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.uses++
	e := s.entries[id]
	if e == nil {
		return 0
	}
	s.asked(e)
	s.foreseen.Add(s.unmarkAll(e))
	return s.policy.Hits(&e.Node)
}

// Admits reports whether an object that was asked for again so often in another tier would last here, where it takes the place of
// others.
func (s *Store) Admits(asked uint8) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.policy.Admits(asked)
}

// Free is how many bytes can be put without evicting anybody.
func (s *Store) Free() int64 {
	s.refreshRoom()
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, min(s.cfg.CapacityBytes-s.inUse(1), s.fsRoom.bytes-s.cfg.MinFreeBytes))
}

// Capacity is the tier's, in bytes.
func (s *Store) Capacity() int64 { return s.cfg.CapacityBytes }

// Accepts reports whether new bytes can be put now: the index is open, the disk does not refuse, nobody else has the
// directory.
func (s *Store) Accepts() bool {
	return s.load.begun.Load() && !s.handed.Load() && !s.index.isBroken() && !s.index.health.isSick()
}
