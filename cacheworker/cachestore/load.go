package cachestore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// loading is the reading of the index, while the store is in use: an object's records are read
// when it is first asked for, all others in the order of their ids. Until the end nothing is put,
// because nobody knows how full the tier is.
type loading struct {
	done  chan struct{} // closed at the end, also if that is an early one
	late  chan struct{} // closed some time after the start: Puts wait no longer
	begun atomic.Bool   // the index is open, and Store.epoch is known
	ended atomic.Bool   // all there is, is in Store.entries; set under Store.mu

	// Guarded by Store.mu.
	next  object.ID              // what is below it is in Store.entries, too
	asked map[object.ID]struct{} // and these, unless they have gone since
}

// loadWait is how long a Put waits for the end of the loading. Then it takes what room the file system
// surely has for it.
const loadWait = time.Second

// over reports whether the index is not being read any more.
func (l *loading) over() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// knows reports whether Store.entries tells all about an object. Requires s.mu.
func (l *loading) knows(id object.ID) bool {
	if l.ended.Load() || bytes.Compare(id[:], l.next[:]) < 0 {
		return true
	}
	_, asked := l.asked[id]
	return asked
}

// ensure has what is known of an object in Store.entries. Requires s.mu not held.
func (s *Store) ensure(id object.ID) {
	if s.load.ended.Load() || !s.load.begun.Load() {
		return
	}
	s.mu.Lock()
	known := s.load.knows(id)
	s.mu.Unlock()
	if known {
		return
	}
	files, err := s.filesOf(id)
	if err != nil {
		return // the index is closed or broken: a miss
	}
	void := s.choose(files)
	s.mu.Lock()
	if s.load.knows(id) {
		s.mu.Unlock()
		return
	}
	s.load.asked[id] = struct{}{}
	void = append(void, s.enter(files)...)
	s.mu.Unlock()
	s.drop(void)
}

// filesOf reads the records of an object.
func (s *Store) filesOf(id object.ID) (files []cacheFile, err error) {
	prefix := append([]byte{spaceFile}, id[:]...)
	err = s.index.iterate(context.Background(), prefix, after(prefix), func(it *pebble.Iterator) error {
		f, err := s.readFile(it)
		files = append(files, f)
		return err
	})
	return files, err
}

// loadAll reads the index.
func (s *Store) loadAll(ctx context.Context) error {
	const batch = 256
	var files []cacheFile
	err := s.index.iterate(ctx, []byte{spaceFile}, []byte{spaceFile + 1}, func(it *pebble.Iterator) error {
		f, err := s.readFile(it)
		if err != nil {
			return err
		}
		if len(files) >= batch && files[len(files)-1].id != f.id {
			s.enterBelow(f.id, false, files)
			files = files[:0]
		}
		files = append(files, f)
		return nil
	})
	if err == nil {
		s.enterBelow(object.ID{}, true, files)
	}
	return err
}

// enterBelow enters what was not asked for meanwhile, and says that all below next is entered.
func (s *Store) enterBelow(next object.ID, ended bool, files []cacheFile) {
	void := s.choose(files)
	s.mu.Lock()
	kept := files[:0]
	for _, f := range files {
		if _, asked := s.load.asked[f.id]; !asked {
			kept = append(kept, f)
		}
	}
	void = append(void, s.enter(kept)...)
	s.load.next = next
	if ended {
		s.load.ended.Store(true)
		s.load.asked = nil
	}
	s.mu.Unlock()
	s.drop(void)
}

// cacheFile is what the index says of one.
type cacheFile struct {
	id     object.ID
	nonce  uint64
	e      *entry // nil if the records make none
	store  object.Store
	grants []foundGrant
	pinned bool
}

type foundGrant struct {
	principal object.Principal
	at        int64 // unix nanoseconds
}

// readFile reads the records of the cache file whose first one the iterator is at, and leaves it
// behind them.
func (s *Store) readFile(it *pebble.Iterator) (f cacheFile, err error) {
	var head [filePrefixLen]byte
	prefix := head[:copy(head[:], it.Key())]
	if len(prefix) == filePrefixLen {
		f.id, f.nonce = object.ID(head[1:17]), binary.BigEndian.Uint64(head[17:])
	}
	for valid := true; valid && bytes.HasPrefix(it.Key(), prefix); valid = it.Next() {
		k := it.Key()
		v, err := it.ValueAndErr()
		if err != nil {
			return f, err
		}
		if len(k) <= filePrefixLen {
			continue
		}
		switch rest := k[filePrefixLen+1:]; k[filePrefixLen] {
		case kindObject:
			if store, size, tail, ok := decodeObject(v); ok && len(rest) == 0 {
				f.e, f.store = newEntry(f.id, f.nonce, size), s.canonical(store)
				f.e.indexed, f.e.tail = true, tail
			}
		case kindChunk:
			s.readChunk(f.e, rest, v)
		case kindGrant:
			if len(rest) == 16 && len(v) == 8 && f.e != nil {
				f.grants = append(f.grants, foundGrant{object.Principal(rest), int64(binary.BigEndian.Uint64(v))})
			}
		case kindPin:
			f.pinned = true
		}
	}
	if f.e != nil && f.e.present.Load() == 0 && f.e.size > 0 {
		f.e = nil
	}
	return f, nil
}

// canonical is the store's name, without allocating it for each object.
func (s *Store) canonical(name []byte) object.Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id, ok := s.storeIDs[object.Store(name)]; ok {
		return s.stores[id]
	}
	return s.stores[s.storeID(object.Store(name))]
}

func (s *Store) readChunk(e *entry, key, v []byte) {
	_, epoch, ok := decodeChunk(v)
	if !ok || len(key) != 4 || e == nil {
		return
	}
	i := int(binary.BigEndian.Uint32(key))
	if i >= e.chunks() {
		return
	}
	e.setPresent(i)
	if epoch == s.epoch {
		e.setVerified(i)
	}
}

// choose takes the entry from files that make none, and from all but one of an object: their files
// are gone. It returns these files.
func (s *Store) choose(files []cacheFile) (void []cacheFile) {
	best := -1
	for i := range files {
		if best >= 0 && files[best].id != files[i].id {
			best = -1
		}
		worse := i
		if files[i].e != nil {
			if best < 0 || !s.exists(files[best]) {
				worse, best = best, i
			}
		}
		if worse >= 0 {
			void = append(void, files[worse])
			files[worse].e = nil
		}
	}
	return void
}

func (s *Store) exists(f cacheFile) bool {
	var st unix.Stat_t
	return unix.Fstatat(s.dir.fd(), objectPath(f.id, f.nonce), &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

// enter makes entries of what was read, and returns what was made anew since. Files are looked for
// later (sweep): one that is missing when it is opened is made again, without the chunks (openFile).
// Requires s.mu.
func (s *Store) enter(files []cacheFile) (void []cacheFile) {
	now := time.Now()
	for _, f := range files {
		switch {
		case f.e == nil:
		case s.entries[f.id] != nil:
			void = append(void, f)
		default:
			s.enterFile(f, now)
		}
	}
	return void
}

func (s *Store) enterFile(f cacheFile, now time.Time) {
	f.e.store = s.storeID(f.store)
	s.entries[f.id] = f.e
	for _, g := range f.grants {
		if now.Sub(time.Unix(0, g.at)) < s.cfg.GrantTTL {
			s.setGrant(f.e, g.principal, g.at)
		}
	}
	s.restore(f.e)
	if f.pinned && s.mayPin(f.e) {
		s.pin(f.e)
	}
}

// drop forgets in the index what has no entry; the sweep removes the files.
func (s *Store) drop(void []cacheFile) {
	for _, f := range void {
		s.deleteRecords(f.id, f.nonce)
	}
}

// iterate calls f at the first record of each row that it reads: it leaves the iterator behind that. It
// ends with ctx, and with the index.
func (x *index) iterate(ctx context.Context, from, to []byte, f func(*pebble.Iterator) error) error {
	x.reading.RLock()
	defer x.reading.RUnlock()
	if x.closed || !x.isReady() {
		return errIndex
	}
	it, err := x.db.NewIterWithContext(ctx, &pebble.IterOptions{LowerBound: from, UpperBound: to})
	if err != nil {
		return err
	}
	it.First()
	for it.Valid() {
		if err := f(it); err != nil {
			return errors.Join(err, it.Close())
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), it.Close())
		case <-x.quit: // close waits for this pass
			return errors.Join(errIndex, it.Close())
		default:
		}
	}
	return errors.Join(it.Error(), it.Close())
}
