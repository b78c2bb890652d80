package cachestore

import (
	"errors"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// lateFS leaves the syncs of opening the database to settle, which follows at once: each is a commit
// of the file system's journal, which takes long where others write, and readers wait for it. A
// SIGKILL loses nothing by that; a power cut before settle has ended may cost the index.
type lateFS struct {
	vfs.FS

	mu      sync.Mutex // guards the fields below
	settled bool
	owed    []*lateFile // in the order of their syncs
}

func (l *lateFS) Unwrap() vfs.FS { return l.FS }

func (l *lateFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return l.wrap(l.FS.Create(name, c))
}

func (l *lateFS) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return l.wrap(l.FS.ReuseForWrite(from, to, c))
}

func (l *lateFS) OpenDir(name string) (vfs.File, error) { return l.wrap(l.FS.OpenDir(name)) }

func (l *lateFS) wrap(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &lateFile{File: f, fs: l}, nil
}

// settle makes good for the syncs that were left out; those after it are done when they are asked for.
func (l *lateFS) settle() error {
	l.mu.Lock()
	l.settled = true
	owed := l.owed
	l.owed = nil
	l.mu.Unlock()
	var errs []error
	for _, f := range owed {
		errs = append(errs, f.settle())
	}
	return errors.Join(errs...)
}

type lateFile struct {
	vfs.File
	fs *lateFS

	mu     sync.Mutex // guards the fields below; taken after lateFS.mu, held across a sync
	owes   bool
	closed bool // while it owes a sync, the file is open
}

// putOff reports whether a sync may wait for settle, and has it wait.
func (f *lateFile) putOff() bool {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.settled {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.owes {
		f.owes = true
		f.fs.owed = append(f.fs.owed, f)
	}
	return true
}

func (f *lateFile) Sync() error {
	if f.putOff() {
		return nil
	}
	return f.File.Sync()
}

func (f *lateFile) SyncData() error {
	if f.putOff() {
		return nil
	}
	return f.File.SyncData()
}

func (f *lateFile) SyncTo(n int64) (fullSync bool, err error) {
	if f.putOff() {
		return false, nil
	}
	return f.File.SyncTo(n)
}

func (f *lateFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.owes {
		f.closed = true
		return nil
	}
	return f.File.Close()
}

func (f *lateFile) settle() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.File.Sync()
	f.owes = false
	if f.closed {
		err = errors.Join(err, f.File.Close())
	}
	return err
}
