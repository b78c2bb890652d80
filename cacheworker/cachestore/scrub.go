package cachestore

import (
	"context"
	"os"
	"slices"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// scrub verifies what was cached under an earlier boot of the machine, while nobody has to wait for it: whole
// files, which can be passed through then, before those in part.
func (s *Store) scrub(ctx context.Context) {
	select {
	case <-s.swept:
	case <-ctx.Done():
		return
	}
	entries := s.unverified()
	if len(entries) == 0 {
		return
	}
	before, started := s.Stats(), time.Now()
	s.log.Info("verifying what was cached before the machine started", "objects", len(entries), "bytes", before.UnverifiedBytes)
	p := pace{s: s}
	for _, e := range entries {
		if !s.scrubFile(ctx, e, &p) {
			return
		}
	}
	after := s.Stats()
	s.log.Info("verified what was cached before the machine started", "objects", len(entries),
		"bytes", before.UnverifiedBytes-after.UnverifiedBytes, "badChunks", after.BadChunks, "took", time.Since(started).Round(time.Millisecond))
}

// unverified are the entries with chunks that are not, whole ones first.
func (s *Store) unverified() (entries []*entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var inPart []*entry
	for _, e := range s.entries {
		switch present := e.present.Load(); {
		case present == e.verified.Load():
		case int(present) == e.chunks():
			entries = append(entries, e)
		default:
			inPart = append(inPart, e)
		}
	}
	return slices.Concat(entries, inPart)
}

// scrubFile verifies the chunks of one file, and reports whether to go on.
func (s *Store) scrubFile(ctx context.Context, e *entry, p *pace) bool {
	s.mu.Lock()
	if s.closed || s.entries[e.Key] != e {
		defer s.mu.Unlock()
		return !s.closed
	}
	f := s.lease(e, object.Object{Size: e.size})
	s.mu.Unlock()
	defer f.Close()
	if f.openOnce(false) != nil {
		return true // whoever reads it will say so
	}
	more := true
	e.presentChunks(func(i int) {
		if more && !e.isVerified(i) {
			began := time.Now()
			f.check(i, s.dir.sys.preadOnce)
			s.scrubbed.Add(int64(e.chunkLen(i)))
			more = p.rest(ctx, time.Since(began))
		}
	})
	return more && ctx.Err() == nil
}

// pace leaves the disk and the processor to others while they use the store.
type pace struct {
	s    *Store
	uses int64
	owed time.Duration
}

const (
	scrubBusy = 3                    // times as long as it works, the scrubber rests while the store is in use
	restLeast = 5 * time.Millisecond // a shorter one would be longer than asked for
)

// rest is called after so much work, and reports whether to go on.
func (p *pace) rest(ctx context.Context, worked time.Duration) bool {
	p.s.mu.Lock()
	busy := p.s.uses != p.uses || p.s.leased > 1 // one is the scrubber's
	p.uses = p.s.uses
	p.s.mu.Unlock()
	if busy {
		p.owed += scrubBusy * worked
	}
	if p.owed < restLeast {
		return ctx.Err() == nil
	}
	t := time.NewTimer(p.owed)
	defer t.Stop()
	p.owed = 0
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// reader is pread, or preadOnce.
type reader func(f *os.File, p []byte, off int64) (int, error)
