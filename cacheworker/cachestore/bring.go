package cachestore

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// Bring reads complete objects, each as a whole, for somebody who may open them soon: all of them at once from the disk. It is
// no use of them, see Use. What cannot be read is left out, and told to whoever opens it.
func (s *Store) Bring(ids []object.ID, got func(object.ID, []byte)) {
	s.writing.RLock() // the directory stays open
	defer s.writing.RUnlock()
	files := make([]*os.File, len(ids))
	entries := make([]*entry, len(ids))
	for i, id := range ids {
		entries[i], files[i] = s.openIdle(id)
	}
	for i, f := range files {
		if f == nil {
			continue
		}
		b := make([]byte, entries[i].size)
		n, err := s.dir.sys.pread(f, b, 0)
		f.Close()
		s.idleAgain(entries[i])
		if err == nil && n == len(b) {
			got(ids[i], b)
		}
	}
}

// openIdle opens the file of a complete object that nobody has open, and has the disk begin to read it. With a file,
// idleAgain has to follow.
func (s *Store) openIdle(id object.ID) (*entry, *os.File) {
	s.mu.Lock()
	e := s.entries[id]
	if s.closed || e == nil || e.file != nil || e.busy > 0 || !e.complete() {
		s.mu.Unlock()
		return nil, nil
	}
	e.busy++
	s.mu.Unlock()
	f, err := s.dir.open(objectPath(id, e.nonce), unix.O_RDONLY, 0)
	if err == nil {
		err = control(f, func(fd int) error { return unix.Fadvise(fd, 0, e.size, unix.FADV_WILLNEED) })
		if err == nil {
			return e, f
		}
		f.Close()
	}
	s.idleAgain(e)
	return nil, nil
}

// idleAgain ends what e.busy counts.
func (s *Store) idleAgain(e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.isIdle(e)
}
