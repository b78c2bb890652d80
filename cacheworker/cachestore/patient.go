package cachestore

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// patientFS has the database wait while the disk refuses to write, because pebble ends for good at the first write that
// fails. Who waits for the database is let go meanwhile (health.refused). A sync that failed is
// asked for again, and then says nothing of what it lost: that may cost the index after a power cut, not a right byte.
type patientFS struct {
	vfs.FS
	h *health
}

func (p patientFS) Unwrap() vfs.FS { return p.FS }

func (p patientFS) Create(name string, c vfs.DiskWriteCategory) (f vfs.File, err error) {
	err = p.h.insist(func() error { f, err = p.FS.Create(name, c); return err })
	return p.wrap(f, err)
}

// ReuseForWrite gives up the old file when it fails: nobody knows how far it came.
func (p patientFS) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (f vfs.File, err error) {
	if f, err = p.FS.ReuseForWrite(from, to, c); err == nil {
		return p.wrap(f, nil)
	}
	if err := p.FS.Remove(from); err != nil && !errors.Is(err, os.ErrNotExist) {
		p.h.note(err)
	}
	return p.Create(to, c)
}

func (p patientFS) OpenDir(name string) (vfs.File, error) { return p.wrap(p.FS.OpenDir(name)) }

func (p patientFS) Rename(from, to string) error {
	return p.h.insist(func() error { return p.FS.Rename(from, to) })
}

func (p patientFS) MkdirAll(dir string, perm os.FileMode) error {
	return p.h.insist(func() error { return p.FS.MkdirAll(dir, perm) })
}

func (p patientFS) wrap(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return patientFile{f, p.h}, nil
}

type patientFile struct {
	vfs.File
	h *health
}

func (f patientFile) Write(p []byte) (done int, err error) {
	err = f.h.insist(func() error {
		n, err := f.File.Write(p[done:])
		done += n
		return err
	})
	return done, err
}

func (f patientFile) Sync() error     { return f.h.insist(f.File.Sync) }
func (f patientFile) SyncData() error { return f.h.insist(f.File.SyncData) }

func (f patientFile) SyncTo(n int64) (full bool, err error) {
	err = f.h.insist(func() error { full, err = f.File.SyncTo(n); return err })
	return full, err
}

// health is whether the disk takes what the database writes.
type health struct {
	trouble func(error)   // told of each refusal
	quit    chan struct{} // closed when nobody waits any more: refusals are errors then

	mu      sync.Mutex // guards the fields below
	waiting int        // operations that the disk refuses
	sick    chan struct{}
}

func newHealth(trouble func(error), quit chan struct{}) *health {
	return &health{trouble: trouble, quit: quit, sick: make(chan struct{})}
}

// refused is closed while the disk refuses, and another channel afterwards.
func (h *health) refused() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sick
}

func (h *health) isSick() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.waiting > 0
}

const insistEvery = 250 * time.Millisecond

// insist calls do until the disk does not refuse it.
func (h *health) insist(do func() error) error {
	err := do()
	if !refuses(err) {
		return err
	}
	h.change(+1)
	defer h.change(-1)
	tick := time.NewTicker(insistEvery) // a disk gives no event
	defer tick.Stop()
	for refuses(err) {
		h.note(err)
		select {
		case <-tick.C:
		case <-h.quit:
			return err
		}
		err = do()
	}
	return err
}

func (h *health) note(err error) { h.trouble(fmt.Errorf("index: %w", err)) }

func (h *health) change(by int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.waiting += by
	switch {
	case h.waiting == 1 && by == 1:
		close(h.sick)
	case h.waiting == 0:
		h.sick = make(chan struct{})
	}
}

// refuses reports whether an error is of a disk that may be well later.
func refuses(err error) bool {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
