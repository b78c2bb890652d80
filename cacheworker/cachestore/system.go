package cachestore

import (
	"os"

	"golang.org/x/sys/unix"
)

// system is how a store touches its cache files; pebble's files are not among them. Tests put faults before it.
type system interface {
	openat(dir int, name string, flags int, perm uint32) (fd int, err error)
	mkdirat(dir int, name string) error
	renameat(dir int, from, to string) error
	unlinkat(dir int, name string) error
	statfs(dir int, st *unix.Statfs_t) error

	pread(f *os.File, p []byte, off int64) (int, error)
	pwrite(f *os.File, p []byte, off int64) (int, error)
	preadOnce(f *os.File, p []byte, off int64) (int, error) // and leaves no pages in memory that were not there
	writeBack(f *os.File) error                             // returns when no page of it is dirty, and tells of all that could not be written
}

type kernel struct{}

func (kernel) openat(dir int, name string, flags int, perm uint32) (int, error) {
	return unix.Openat(dir, name, flags, perm)
}

func (kernel) mkdirat(dir int, name string) error                  { return unix.Mkdirat(dir, name, 0o700) }
func (kernel) renameat(dir int, from, to string) error             { return unix.Renameat(dir, from, dir, to) }
func (kernel) unlinkat(dir int, name string) error                 { return unix.Unlinkat(dir, name, 0) }
func (kernel) statfs(dir int, st *unix.Statfs_t) error             { return unix.Fstatfs(dir, st) }
func (kernel) pread(f *os.File, p []byte, off int64) (int, error)  { return f.ReadAt(p, off) }
func (kernel) pwrite(f *os.File, p []byte, off int64) (int, error) { return f.WriteAt(p, off) }

// preadOnce asks for RWF_DONTCACHE, which kernels have since 6.14 for some file systems.
func (k kernel) preadOnce(f *os.File, p []byte, off int64) (int, error) {
	var n int
	err := control(f, func(fd int) (err error) {
		n, err = unix.Preadv2(fd, [][]byte{p}, off, unix.RWF_DONTCACHE)
		return err
	})
	if err != nil || n < len(p) {
		return k.pread(f, p, off)
	}
	return n, nil
}

// writeBack does without fdatasync's commit of the journal and flush of the device: what a power cut takes is found
// by its sum.
func (kernel) writeBack(f *os.File) error {
	return control(f, func(fd int) error {
		return unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE_AND_WAIT)
	})
}

// control calls do with the descriptor, which stays open meanwhile.
func control(f *os.File, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := c.Control(func(fd uintptr) { err = do(int(fd)) })
	if cerr != nil {
		return cerr
	}
	return err
}
