package cachestore

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// A page of a cache file that the kernel cannot write to the disk is clean afterwards, and once it has left memory
// other bytes are read. So each file is written back when it is complete, or nobody has it open any more, and once
// more by the worker that finds it, before it is given away: if that fails, it is evicted.

// backlog are files that were put into.
type backlog struct {
	entries []*entry // under Store.mu
	more    chan struct{}
}

// isWritten reports whether all that was put is known to be on the disk. Requires Store.mu.
func (e *entry) isWritten() bool { return e.puts == e.putsWritten }

// writeBackLater has the file written back in the background. Requires s.mu.
func (s *Store) writeBackLater(e *entry) {
	if e.isWritten() || e.queued || e.evicted.Load() {
		return
	}
	e.queued = true
	s.backlog.entries = append(s.backlog.entries, e)
	select {
	case s.backlog.more <- struct{}{}:
	default:
	}
}

// writeBackAll works the backlog off until ctx ends.
func (s *Store) writeBackAll(ctx context.Context) {
	for {
		select {
		case <-s.backlog.more:
		case <-ctx.Done():
			return
		}
		s.mu.Lock()
		entries := s.backlog.entries
		s.backlog.entries = nil
		for _, e := range entries {
			e.queued = false
		}
		s.mu.Unlock()
		for _, e := range entries {
			if ctx.Err() != nil {
				return
			}
			s.writeBack(e) // what fails is gone, and was told
		}
	}
}

// writeBack returns when the file's bytes are on the disk. If they cannot be it evicts the file.
func (s *Store) writeBack(e *entry) error {
	s.mu.Lock()
	puts := e.puts
	if e.isWritten() || e.evicted.Load() {
		s.mu.Unlock()
		return nil
	}
	e.busy++
	s.mu.Unlock()
	lost, err := s.writeOut(e)
	s.mu.Lock()
	if err == nil {
		e.putsWritten = puts
	}
	s.isIdle(e)
	s.mu.Unlock()
	if lost {
		s.trouble(fmt.Errorf("write back: %w", err))
		s.discard(e)
	}
	return err
}

// isIdle ends what e.busy counts. Requires s.mu.
func (s *Store) isIdle(e *entry) {
	e.busy--
	if s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

func (s *Store) writeOut(e *entry) (lost bool, err error) {
	f, err := s.dir.open(objectPath(e.Key, e.nonce), unix.O_RDONLY, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	err = s.dir.sys.writeBack(f)
	return err != nil, err
}

// awaitWriteBack waits until the file is not being written back, so that nobody seems to hold it, but not for long.
func (s *Store) awaitWriteBack(e *entry) {
	t := time.NewTimer(writeBackWait)
	defer t.Stop()
	for {
		s.mu.Lock()
		if e.busy == 0 {
			s.mu.Unlock()
			return
		}
		if s.idle == nil {
			s.idle = make(chan struct{})
		}
		idle := s.idle
		s.mu.Unlock()
		select {
		case <-idle:
		case <-t.C:
			return // a probe will find it
		}
	}
}

// discard evicts an entry, rather than whichever has its object.
func (s *Store) discard(e *entry) {
	if s.evictIf(e.Key, func(now *entry) bool { return now == e }) {
		s.notify(e.Key)
	}
}

const writeBackWait = time.Second

// written returns nil when the file's bytes are on the disk; object.ErrIncomplete if that takes long.
func (f *File) written() error {
	s := f.s
	s.mu.Lock()
	done := f.e.isWritten()
	if !done && s.closed && !s.handed.Load() {
		s.mu.Unlock()
		return object.ErrIncomplete
	}
	if done {
		s.mu.Unlock()
		return nil
	}
	result := make(chan error, 1)
	s.views.Go(func() { result <- s.writeBack(f.e) }) // giveUp, which waits for it, needs s.mu first
	s.mu.Unlock()
	t := time.NewTimer(writeBackWait)
	defer t.Stop()
	select {
	case err := <-result:
		if err != nil {
			return fmt.Errorf("%w: %w", object.ErrIncomplete, err)
		}
		return nil
	case <-t.C:
		return fmt.Errorf("%w: it is being written to the disk", object.ErrIncomplete)
	}
}
