package cachestore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// sweep holds the folders of cache files against the entries, once after a start and beside all
// else: what a SIGKILL left of either without the other goes.
func (s *Store) sweep(ctx context.Context) error {
	for shard := range 256 {
		if ctx.Err() != nil {
			return nil
		}
		if err := s.sweepFolder(byte(shard)); err != nil {
			return err
		}
	}
	for _, e := range s.all() {
		if ctx.Err() != nil {
			return nil
		}
		s.dropMissing(e)
	}
	return nil
}

func (s *Store) sweepFolder(shard byte) error {
	folder := fmt.Sprintf("%s/%02x", objectsName, shard)
	names, err := s.dir.names(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range names {
		id, nonce, ok := parseFileName(name)
		ok = ok && id[0] == shard
		if ok && s.saw(heldKey{id, nonce}) {
			continue
		}
		if err := s.removeStranger(heldKey{id, nonce}, ok, folder+"/"+name); err != nil {
			return err
		}
	}
	return nil
}

// saw reports whether a file is an entry's, and notes that it is there.
func (s *Store) saw(k heldKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[k.id]
	if e == nil || e.nonce != k.nonce {
		return false
	}
	e.seen = true
	return true
}

// removeStranger deletes a file unless it is an entry's after all: that is made before its file,
// and who evicts it holds s.evicting until the file is out of the way.
func (s *Store) removeStranger(k heldKey, named bool, path string) error {
	s.evicting.Lock()
	defer s.evicting.Unlock()
	if named && s.saw(k) {
		return nil
	}
	return s.dir.unlink(path)
}

// dropMissing forgets an entry whose file is not there.
func (s *Store) dropMissing(e *entry) {
	s.mu.Lock()
	seen := e.seen
	s.mu.Unlock()
	if !seen && s.evictMissing(e) {
		s.notify(e.Key)
	}
}

func (s *Store) evictMissing(e *entry) bool {
	s.evicting.Lock()
	defer s.evicting.Unlock()
	var st unix.Stat_t
	if unix.Fstatat(s.dir.fd(), objectPath(e.Key, e.nonce), &st, unix.AT_SYMLINK_NOFOLLOW) != unix.ENOENT {
		return false
	}
	s.mu.Lock()
	if e.seen || e.file != nil || e.evicted.Load() { // what is open has a file, or is about to
		s.mu.Unlock()
		return false
	}
	s.forget(e)
	s.mu.Unlock()
	s.remove(e)
	return true
}
