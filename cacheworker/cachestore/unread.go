package cachestore

import (
	"math/bits"
	"sync/atomic"
)

// Chunks that were put before anybody asked for them are marked until somebody reads them, so that what was fetched in
// vain can be counted. A mark is taken by whoever clears its bit: it is counted once. After a restart nothing is marked.

// MarkUnread says that nobody has asked for chunk i, which is put next. Put failed, or somebody has asked meanwhile:
// Unmark.
func (f *File) MarkUnread(i int) {
	s, e := f.s, f.e
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.evicted.Load() || e.isPresent(i) {
		return
	}
	marks := e.unread.Load()
	if marks == nil {
		m := make([]atomic.Uint64, (e.chunks()+63)/64)
		marks = &m
		e.unread.Store(marks)
	}
	if (*marks)[i/64].Or(1<<(i%64))>>(i%64)&1 == 0 {
		s.unread.Add(int64(e.chunkLen(i)))
	}
}

// Unmark takes the mark of chunk i away, and returns the chunk's bytes if there was one. It may be called after Close.
func (f *File) Unmark(i int) int64 { return f.s.unmark(f.e, i) }

func (s *Store) unmark(e *entry, i int) (bytes int64) {
	marks := e.unread.Load()
	if marks == nil || (*marks)[i/64].Load()>>(i%64)&1 == 0 || (*marks)[i/64].And(^(uint64(1)<<(i%64)))>>(i%64)&1 == 0 {
		return 0
	}
	bytes = int64(e.chunkLen(i))
	s.unread.Add(-bytes)
	return bytes
}

// Touch says that the chunks [first, last] are being read.
func (f *File) Touch(first, last int) {
	if f.e.unread.Load() == nil {
		return
	}
	for i := first; i <= last; i++ {
		f.s.foreseen.Add(f.s.unmark(f.e, i))
	}
}

// unmarkAll takes all marks away and returns the bytes of their chunks.
func (s *Store) unmarkAll(e *entry) (bytes int64) {
	marks := e.unread.Swap(nil)
	if marks == nil {
		return 0
	}
	for w := range *marks {
		for word := (*marks)[w].Swap(0); word != 0; word &= word - 1 {
			bytes += int64(e.chunkLen(w*64 + bits.TrailingZeros64(word)))
		}
	}
	s.unread.Add(-bytes)
	return bytes
}
