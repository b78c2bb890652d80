package cachestore

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// Sum is what [Store.Sum] counts.
type Sum struct {
	Objects         int64
	CompleteObjects int64
	PresentBytes    int64
	Stores          int64 // under stores that were looked into
}

// Sum counts the cached objects that are wanted. want is called once per under store and says
// which of its keys are, or nil for none; keys are not to be kept. Of these, counts says which objects count. Keys are in the
// index only, so this is one pass over that: not for the path of a read.
func (s *Store) Sum(ctx context.Context, want func(object.Store) func(key []byte) bool, counts func(object.ID) bool) (sum Sum, err error) {
	stores, err := s.eachWanted(ctx, want, func(id object.ID, nonce uint64, _ objectRecord) {
		if counts(id) {
			s.addTo(&sum, id, nonce)
		}
	})
	if err != nil {
		return Sum{}, fmt.Errorf("sum the cache up: %w", err)
	}
	sum.Stores = stores
	return sum, nil
}

// IDs are the objects that are wanted, as for [Store.Sum], and have a cache file or a tail; those with both are there twice.
func (s *Store) IDs(ctx context.Context, want func(object.Store) func(key []byte) bool) (ids []object.ID, err error) {
	if _, err := s.eachWanted(ctx, want, func(id object.ID, _ uint64, o objectRecord) { ids = append(ids, o.of(id)) }); err != nil {
		return nil, fmt.Errorf("look the cache through: %w", err)
	}
	return ids, nil
}

// Older are the objects of which something has been cached for longer than limit says of their store and key: since before
// that time, of which the zero one stands for any. As with IDs some are there twice.
func (s *Store) Older(ctx context.Context, limit func(object.Store) func(key []byte) time.Time) (ids []object.ID, err error) {
	var before time.Time // of the key that was wanted last
	want := func(o object.Store) func([]byte) bool {
		of := limit(o)
		if of == nil {
			return nil
		}
		return func(key []byte) bool { before = of(key); return !before.IsZero() }
	}
	_, err = s.eachWanted(ctx, want, func(id object.ID, nonce uint64, o objectRecord) {
		if s.sinceOf(id, nonce, o).Before(before) {
			ids = append(ids, o.of(id))
		}
	})
	if err != nil {
		return nil, fmt.Errorf("look for what is too old: %w", err)
	}
	return ids, nil
}

// sinceOf is since when something of an object is cached. A release that did not note that has left the time of the last
// write; what is not known is now.
func (s *Store) sinceOf(id object.ID, nonce uint64, o objectRecord) time.Time {
	if !o.since.IsZero() {
		return o.since
	}
	var st unix.Stat_t
	if err := unix.Fstatat(s.dir.fd(), objectPath(id, nonce), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return time.Now()
	}
	return time.Unix(st.Mtim.Unix())
}

// eachWanted calls f for each object's record that is wanted, and counts the stores that were looked into.
func (s *Store) eachWanted(ctx context.Context, want func(object.Store) func(key []byte) bool, f func(object.ID, uint64, objectRecord)) (stores int64, err error) {
	select {
	case <-s.load.done: // before, s.entries does not tell what is present
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	if !s.load.ended.Load() {
		return 0, errIndex
	}
	wanted := map[object.Store]func([]byte) bool{}
	err = s.index.eachObject(ctx, func(id object.ID, nonce uint64, o objectRecord) {
		is, met := wanted[object.Store(o.store)]
		if !met {
			is = want(object.Store(o.store))
			wanted[object.Store(o.store)] = is
			if is != nil {
				stores++
			}
		}
		if is != nil && is(o.key) {
			f(id, nonce, o)
		}
	})
	return stores, err
}

// addTo counts an object, if the record is that of its cache file.
func (s *Store) addTo(sum *Sum, id object.ID, nonce uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil || e.nonce != nonce || e.tail {
		return
	}
	sum.Objects++
	sum.PresentBytes += e.presentBytes()
	if e.complete() {
		sum.CompleteObjects++
	}
}

// objectRecord is what a record says its object is; valid until the next one is read.
type objectRecord struct {
	store, key []byte
	sizeBytes  int64
	tail       bool
	since      time.Time // something of it is cached; zero if it was not noted
}

// of is the object's id, given that of the record.
func (o objectRecord) of(id object.ID) object.ID {
	if o.tail {
		return tailID(id)
	}
	return id
}

// eachObject calls f for each object's record. It ends with ctx, and with the index.
func (x *index) eachObject(ctx context.Context, f func(object.ID, uint64, objectRecord)) error {
	var text []byte
	return x.iterate(ctx, []byte{spaceFile}, []byte{spaceFile + 1}, func(it *pebble.Iterator) error {
		k := it.Key()
		isObject := len(k) == filePrefixLen+1 && k[filePrefixLen] == kindObject
		if !isObject {
			skipParts(it)
			return nil
		}
		v, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		text = append(text[:0], v...) // the iterator goes on
		var file [filePrefixLen]byte
		copy(file[:], k)
		o, ok := readObject(text)
		if it.Next() && isSince(it.Key()) && bytes.HasPrefix(it.Key(), file[:]) {
			if v, err = it.ValueAndErr(); err != nil {
				return err
			}
			o.since, _ = decodeSince(v)
		}
		if ok {
			f(object.ID(file[1:17]), binary.BigEndian.Uint64(file[17:]), o)
		}
		if o.sizeBytes > manyChunks*object.ChunkSize {
			it.SeekGE(after(file[:]))
		}
		return nil
	})
}

// skipParts leaves records of chunks and grants behind, but not all at once: iterate looks at its
// context in between.
func skipParts(it *pebble.Iterator) {
	for n := 0; n < 1024 && it.Next(); n++ {
		if k := it.Key(); len(k) == filePrefixLen+1 {
			return
		}
	}
}

// manyChunks have more records than it costs to look the next file up.
const manyChunks = 64

// readObject is decodeObject with the key.
func readObject(v []byte) (o objectRecord, ok bool) {
	store, size, tail, ok := decodeObject(v)
	if !ok {
		return o, false
	}
	n, w := binary.Uvarint(v)
	v = v[w+int(n):]
	n, w = binary.Uvarint(v)
	return objectRecord{store: store, key: v[w : w+int(n)], sizeBytes: size, tail: tail}, true
}
