package cachestore

import (
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// Warm has the kernel read the file of a complete object into the page cache, for somebody who may open it soon. It
// waits for the inode alone, and is no use of the object. What fails is not told: whoever opens the file is.
func (s *Store) Warm(id object.ID) {
	s.writing.RLock() // the directory stays open
	defer s.writing.RUnlock()
	s.mu.Lock()
	e := s.entries[id]
	if s.closed || e == nil || e.file != nil || e.busy > 0 || !e.complete() {
		s.mu.Unlock()
		return
	}
	e.busy++
	s.mu.Unlock()
	if f, err := s.dir.open(objectPath(id, e.nonce), unix.O_RDONLY, 0); err == nil {
		control(f, func(fd int) error { return unix.Fadvise(fd, 0, e.size, unix.FADV_WILLNEED) })
		f.Close()
	}
	s.mu.Lock()
	s.isIdle(e)
	s.mu.Unlock()
}
