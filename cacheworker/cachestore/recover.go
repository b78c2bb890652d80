package cachestore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// recover brings files and index together. It reports whether the last stop was unclean.
func (s *Store) recover() (unclean bool, err error) {
	if err := errors.Join(s.dir.mkdir(objectsName), s.dir.mkdir(heldName)); err != nil {
		return false, err
	}
	if err = s.openAndLoad(); err != nil {
		if !indexIsLost(err) {
			return false, fmt.Errorf("index: %w", err)
		}
		s.log.Error("cache index cannot be read: the cache starts empty", "dir", s.cfg.Dir, "err", err.Error())
		if err := s.startEmpty(); err != nil {
			return false, err
		}
	}
	if err := errors.Join(s.restoreAll(), s.findHeld()); err != nil {
		return false, errors.Join(err, s.index.close())
	}
	clean, err := s.index.get(metaClean)
	if err == nil && clean != nil {
		err = s.index.write(func(b *pebble.Batch) error { return b.Delete(metaClean, nil) })
	}
	if err != nil {
		return false, errors.Join(err, s.index.close())
	}
	return clean == nil, nil
}

// indexIsLost tells a broken index from a system that would not let us read it just now.
func indexIsLost(err error) bool {
	for _, e := range []error{
		syscall.EACCES, syscall.EPERM, syscall.EROFS, syscall.EAGAIN, syscall.ENOMEM,
		syscall.EMFILE, syscall.ENFILE, syscall.ENOSPC, syscall.EDQUOT,
	} {
		if errors.Is(err, e) {
			return false
		}
	}
	return true
}

func (s *Store) openAndLoad() (err error) {
	if err := s.dir.mkdir(indexName); err != nil {
		return err
	}
	f, err := s.dir.open(indexName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	s.indexDir = dir{f} // one before it stays open: what is left of its database must not find this one by number
	if s.index, err = openIndex(s.indexDir, s.log); err != nil {
		return err
	}
	if err = s.loadEpoch(); err == nil {
		err = s.load()
	}
	if err != nil {
		return errors.Join(err, s.index.close())
	}
	return nil
}

func (s *Store) startEmpty() error {
	clear(s.entries)
	clear(s.revoked)
	for _, name := range []string{indexName, objectsName} {
		if err := s.dir.removeAll(name); err != nil {
			return err
		}
	}
	if err := s.dir.mkdir(objectsName); err != nil {
		return err
	}
	if err := s.openAndLoad(); err != nil {
		return fmt.Errorf("new index: %w", err)
	}
	return nil
}

// loadEpoch counts the boots of the machine that this index has seen.
func (s *Store) loadEpoch() error {
	v, err := s.index.get(metaEpoch)
	if err != nil {
		return err
	}
	if len(v) > 4 {
		s.epoch = binary.BigEndian.Uint32(v)
		if string(v[4:]) == s.cfg.BootID {
			return nil
		}
	}
	s.epoch++
	return s.index.write(func(b *pebble.Batch) error {
		v := append(binary.BigEndian.AppendUint32(nil, s.epoch), s.cfg.BootID...)
		return b.Set(metaEpoch, v, nil)
	})
}

func (s *Store) markClean() {
	s.mu.Lock()
	clean := true
	for _, e := range s.entries {
		clean = clean && len(e.waste) == 0
	}
	s.mu.Unlock()
	if clean {
		s.index.write(func(b *pebble.Batch) error { return b.Set(metaClean, nil, nil) })
	}
}

// load reads the index in one pass; a file's own record comes before those of its parts.
func (s *Store) load() error {
	it, err := s.index.db.NewIter(&pebble.IterOptions{LowerBound: []byte{spaceMeta}})
	if err != nil {
		return err
	}
	now := time.Now()
	var e *entry      // whose records these are
	var prefix []byte // of e, or of a file that is not wanted
	for valid := it.First(); valid; valid = it.Next() {
		k := it.Key()
		v, err := it.ValueAndErr()
		if err != nil {
			return errors.Join(err, it.Close())
		}
		switch {
		case k[0] == spaceMeta:
			s.loadRevocation(k, v, now)
			continue
		case k[0] != spaceFile || len(k) <= filePrefixLen:
			continue
		}
		if string(k[:filePrefixLen]) != string(prefix) {
			prefix = append(prefix[:0], k[:filePrefixLen]...)
			if e = s.loadObject(k, v); e == nil {
				s.index.deleteLater(prefix)
			}
			continue
		}
		if e == nil {
			continue
		}
		switch rest := k[filePrefixLen+1:]; k[filePrefixLen] {
		case kindChunk:
			s.loadChunk(e, rest, v)
		case kindGrant:
			s.loadGrant(e, rest, v, now)
		}
	}
	return errors.Join(it.Error(), it.Close())
}

// loadObject makes the entry of an object record; nil if it is none, or of an older file.
func (s *Store) loadObject(k, v []byte) *entry {
	if len(k) != filePrefixLen+1 || k[filePrefixLen] != kindObject {
		return nil
	}
	name, size, ok := decodeObject(v)
	if !ok {
		return nil
	}
	id, nonce := object.ID(k[1:17]), binary.BigEndian.Uint64(k[17:])
	if old := s.entries[id]; old != nil { // of one of the two the file is gone
		var st unix.Stat_t
		if unix.Fstatat(s.dir.fd(), objectPath(id, old.nonce), &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			return nil
		}
		s.deleteRecords(id, old.nonce)
	}
	e := newEntry(id, nonce, size)
	e.indexed = true
	e.store = s.internStore(name)
	s.entries[id] = e
	return e
}

func (s *Store) internStore(name []byte) uint32 {
	if id, ok := s.storeIDs[object.Store(name)]; ok { // without allocating
		return id
	}
	return s.storeID(object.Store(name))
}

func (s *Store) loadChunk(e *entry, key, v []byte) {
	_, epoch, ok := decodeChunk(v)
	if !ok || len(key) != 4 {
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

// restoreAll counts what the index knows. Files are looked for later (sweep): one that is missing
// when it is opened is made again, without the chunks (openFile).
func (s *Store) restoreAll() error {
	for id, e := range s.entries {
		if e.present.Load() > 0 || e.size == 0 {
			s.restore(e)
			continue
		}
		delete(s.entries, id)
		s.deleteRecords(id, e.nonce)
		if err := s.dir.unlink(objectPath(id, e.nonce)); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) restore(e *entry) {
	var disk int64
	last := e.chunks() - 1
	if disk = int64(e.present.Load()) * object.ChunkSize; last >= 0 && e.isPresent(last) {
		disk -= object.ChunkSize - onDisk(e.chunkLen(last))
	}
	s.policy.Restore(&e.Node, disk)
	s.live += disk
	s.cached += e.presentBytes()
	if e.complete() {
		s.complete++
	}
}

// findHeld counts the evicted files that were held when the last process ended.
func (s *Store) findHeld() error {
	names, err := s.dir.names(heldName)
	if err != nil {
		return err
	}
	for _, name := range names {
		id, nonce, ok := parseFileName(name)
		var st unix.Stat_t
		err := unix.Fstatat(s.dir.fd(), heldName+"/"+name, &st, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return fmt.Errorf("stat held file: %w", err)
		case !ok:
			if err := s.dir.unlink(heldName + "/" + name); err != nil {
				return err
			}
		default:
			s.hold(heldKey{id, nonce}, st.Blocks*512)
		}
	}
	return nil
}
