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

// recover opens the index, or a new one. Where the disk refuses to write just now, begin has to follow when it is open;
// until then nothing is cached.
func (s *Store) recover() error {
	if err := errors.Join(s.dir.mkdir(objectsName), s.dir.mkdir(heldName)); err != nil {
		return err
	}
	err := errLost
	if !s.isLost() {
		err = s.openIndex()
	}
	if err != nil {
		if !s.indexIsLost(err) {
			return fmt.Errorf("index: %w", err)
		}
		s.log.Error("cache index cannot be read: the cache starts empty", "dir", s.cfg.Dir, "err", err.Error())
		if err := s.startEmpty(); err != nil {
			return err
		}
	}
	if err := s.findHeld(); err != nil {
		return errors.Join(err, s.index.close())
	}
	return nil
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

func (s *Store) openIndex() error {
	if err := s.dir.mkdir(indexName); err != nil {
		return err
	}
	f, err := s.dir.open(indexName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	s.indexDir = dir{f, s.cfg.sys} // one before it stays open: what is left of its database must not find this one by number
	x, err := openIndex(s.indexDir, s.cfg.disk, s.log, s.trouble)
	if err != nil {
		return err
	}
	s.index = x
	if !x.isReady() {
		return nil
	}
	if err := s.begin(); err != nil {
		return errors.Join(err, s.index.close())
	}
	return nil
}

// begin reads from an index that was opened what has to be known first.
func (s *Store) begin() (err error) {
	if s.index.made {
		if err := s.setAside(); err != nil {
			return fmt.Errorf("cache files of a lost index: %w", err)
		}
	}
	if err = s.loadEpoch(); err == nil {
		err = s.loadRevocations()
	}
	if err == nil {
		s.unclean, err = s.takeClean()
	}
	s.load.begun.Store(err == nil)
	return err
}

// takeClean removes the mark of a clean stop.
func (s *Store) takeClean() (unclean bool, err error) {
	clean, err := s.index.get(metaClean)
	if err != nil || clean == nil {
		return true, err
	}
	return false, s.writeInOrder(func(b *pebble.Batch) error { return b.Delete(metaClean, nil) })
}

// writeInOrder is for what has to be written before all that follows, and so may be written when the disk takes it.
func (s *Store) writeInOrder(apply func(*pebble.Batch) error) error {
	err := s.index.write(apply)
	if errors.Is(err, errRefused) {
		s.index.writeLazily(apply) // its queue is empty
		return nil
	}
	return err
}

func (s *Store) startEmpty() error {
	clear(s.revoked)
	if err := errors.Join(s.dir.removeAll(indexName), s.dir.unlink(lostName)); err != nil {
		return err
	}
	if err := s.openIndex(); err != nil {
		return fmt.Errorf("new index: %w", err)
	}
	return nil
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
	return s.writeInOrder(func(b *pebble.Batch) error {
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
	if e.tail {
		s.tails++
		s.policy.InsertTail(&e.Node, disk)
	} else {
		s.policy.Restore(&e.Node, disk)
	}
	s.live += disk
	s.cached += e.presentBytes()
	s.verified += e.verifiedBytes()
	if e.whole() {
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
