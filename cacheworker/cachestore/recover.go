package cachestore

import (
	"context"
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

// recover opens the index, or a new one. It reports whether the last stop was unclean.
func (s *Store) recover() (unclean bool, err error) {
	if err := errors.Join(s.dir.mkdir(objectsName), s.dir.mkdir(heldName)); err != nil {
		return false, err
	}
	if err = errLost; !s.isLost() {
		unclean, err = s.openIndex()
	}
	if err != nil {
		if !s.indexIsLost(err) {
			return false, fmt.Errorf("index: %w", err)
		}
		s.log.Error("cache index cannot be read: the cache starts empty", "dir", s.cfg.Dir, "err", err.Error())
		if unclean, err = s.startEmpty(); err != nil {
			return false, err
		}
	}
	if s.index.made {
		if err := s.setAside(); err != nil {
			return false, errors.Join(fmt.Errorf("cache files of a lost index: %w", err), s.index.close())
		}
	}
	if err := s.findHeld(); err != nil {
		return false, errors.Join(err, s.index.close())
	}
	return unclean, nil
}

// indexIsLost tells a broken index from a system that would not let us read it just now.
func (s *Store) indexIsLost(err error) bool {
	if errors.Is(err, errIndex) && s.index != nil && !s.index.corrupt.Load() {
		return false
	}
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

func (s *Store) openIndex() (unclean bool, err error) {
	if err := s.dir.mkdir(indexName); err != nil {
		return false, err
	}
	f, err := s.dir.open(indexName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return false, err
	}
	s.indexDir = dir{f, s.cfg.sys} // one before it stays open: what is left of its database must not find this one by number
	x, err := openIndex(s.indexDir, s.log)
	if err != nil {
		return false, err
	}
	s.index = x
	if err = s.loadEpoch(); err == nil {
		err = s.loadRevocations()
	}
	if err == nil {
		unclean, err = s.takeClean()
	}
	if err != nil {
		return false, errors.Join(err, s.index.close())
	}
	return unclean, nil
}

// takeClean removes the mark of a clean stop.
func (s *Store) takeClean() (unclean bool, err error) {
	clean, err := s.index.get(metaClean)
	if err != nil || clean == nil {
		return true, err
	}
	return false, s.index.write(func(b *pebble.Batch) error { return b.Delete(metaClean, nil) })
}

func (s *Store) startEmpty() (unclean bool, err error) {
	clear(s.revoked)
	if err := errors.Join(s.dir.removeAll(indexName), s.dir.unlink(lostName)); err != nil {
		return false, err
	}
	if unclean, err = s.openIndex(); err != nil {
		return false, fmt.Errorf("new index: %w", err)
	}
	return unclean, nil
}

// lose has the next start begin empty: the index cannot be read.
func (s *Store) lose(err error) {
	s.index.fail(err)
	if !s.indexIsLost(err) {
		return
	}
	f, merr := s.dir.open(lostName, unix.O_WRONLY|unix.O_CREAT, 0o600)
	if merr == nil {
		merr = f.Close()
	}
	s.log.Error("cache index cannot be read: the cache starts empty the next time", "dir", s.cfg.Dir, "err", errors.Join(err, merr))
}

var errLost = errors.New("the last process could not read it")

// isLost reports whether the last process found that.
func (s *Store) isLost() bool {
	var st unix.Stat_t
	return unix.Fstatat(s.dir.fd(), lostName, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
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
	clean := s.load.ended.Load()
	for _, e := range s.entries {
		clean = clean && len(e.waste) == 0
	}
	s.mu.Unlock()
	if clean {
		s.index.write(func(b *pebble.Batch) error { return b.Set(metaClean, nil, nil) })
	}
}

// loadRevocations reads what voids grants.
func (s *Store) loadRevocations() error {
	now := time.Now()
	return s.index.iterate(context.Background(), []byte{spaceMeta}, []byte{spaceMeta + 1}, func(it *pebble.Iterator) error {
		v, err := it.ValueAndErr()
		if err == nil {
			s.loadRevocation(it.Key(), v, now)
			it.Next()
		}
		return err
	})
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
	s.verified += e.verifiedBytes()
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
