package cachestore

import (
	"errors"
	"fmt"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// An object may have a tail: its last bytes, once more, in a cache file of their own with a derived id. The policy
// keeps tails apart from all else, so a scan that washes the objects out leaves them. They are counted as bytes and not
// as objects, and have the object's grants: who may read one may read the other.

// tailID is the derived id. Ids are hashes: no other object has it.
func tailID(id object.ID) object.ID {
	id[len(id)-1] ^= 0xff
	id[len(id)-2] ^= 0xff
	return id
}

// KeepTail keeps the object's last bytes, unless there is a tail already. The error wraps object.ErrNoSpace if they
// cannot be kept.
func (s *Store) KeepTail(obj object.Object, last []byte) error {
	id := tailID(obj.ID())
	if s.Peek(id).Complete {
		return nil
	}
	f, err := s.open(id, tailOf(obj, int64(len(last))), keepingTail)
	if err != nil {
		return fmt.Errorf("keep the tail of %v: %w", obj, err)
	}
	f.since = s.sinceObject(obj.ID())
	if f.e.size != int64(len(last)) { // of another length
		return f.Close()
	}
	for i := range f.e.chunks() {
		from := i * object.ChunkSize
		if err == nil {
			err = f.Put(i, last[from:from+f.e.chunkLen(i)])
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("keep the tail of %v: %w", obj, err)
	}
	s.shareGrants(obj.ID(), id)
	return nil
}

// sinceObject is the zero time for an object of which nothing is cached.
func (s *Store) sinceObject(id object.ID) (since time.Time) {
	s.ensure(id)
	s.mu.Lock()
	e := s.entries[id]
	s.mu.Unlock()
	if e != nil {
		since = s.since(e)
	}
	return since
}

// EvictTail takes the object's tail away. It reports whether there was one.
func (s *Store) EvictTail(id object.ID) bool { return s.evict(tailID(id)) }

func tailOf(obj object.Object, bytes int64) object.Object {
	obj.Size = bytes
	return obj
}

// ReadTail fills p with the object's bytes at off, if they are in its tail.
func (s *Store) ReadTail(obj object.Object, p []byte, off int64) bool {
	id := tailID(obj.ID())
	s.ensure(id)
	s.mu.Lock()
	e := s.entries[id]
	if e == nil || e.present.Load() == 0 || off < obj.Size-e.size || off+int64(len(p)) > obj.Size {
		s.mu.Unlock()
		return false
	}
	from, size := off-(obj.Size-e.size), e.size
	s.mu.Unlock()
	f, err := s.open(id, tailOf(obj, size), readingTail)
	if err != nil {
		return false
	}
	defer f.Close()
	n, _ := f.ReadAt(p, from)
	return f.e.size == size && n == len(p)
}

// TailBytes is how long the object's tail is; 0 if it has none.
func (s *Store) TailBytes(id object.ID) int64 {
	id = tailID(id)
	s.ensure(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[id]; e != nil && e.complete() {
		return e.size
	}
	return 0
}
