package cachestore

import (
	"errors"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// directAlign is what address and length of a direct write are multiples of, on any disk.
const directAlign = 4096

// direct is a file's descriptor for writes that leave no pages in memory, opened with the first of them.
type direct struct {
	open sync.Once
	f    *os.File // after open; nil where there is none
}

func (d *direct) close() error {
	if d.f == nil {
		return nil
	}
	return d.f.Close()
}

// writer writes all of p at off.
type writer func(p []byte, off int64) error

func (f *File) pwrite(p []byte, off int64) error {
	_, err := f.s.dir.sys.pwrite(f.file.f, p, off)
	return err
}

// PutDirect is Put past the page cache: no copy, and no memory of the machine for bytes that their reader has from
// elsewhere. It takes as long as the disk does. What the file system cannot write so, and what is no whole chunk at the
// beginning of a page, is put as by Put.
func (f *File) PutDirect(i int, data []byte) error {
	if len(data) != object.ChunkSize || uintptr(unsafe.Pointer(&data[0]))%directAlign != 0 {
		return f.Put(i, data)
	}
	return f.putBy(f.pwriteDirect, i, data)
}

func (f *File) pwriteDirect(p []byte, off int64) error {
	s, d := f.s, &f.file.direct
	d.open.Do(func() {
		if s.indirect.Load() {
			return
		}
		var err error
		d.f, err = s.dir.open(objectPath(f.e.Key, f.e.nonce), unix.O_WRONLY|unix.O_DIRECT, 0)
		s.noteDirect(err)
	})
	if d.f == nil || s.indirect.Load() {
		return f.pwrite(p, off)
	}
	_, err := s.dir.sys.pwrite(d.f, p, off)
	if s.noteDirect(err) {
		return f.pwrite(p, off)
	}
	return err
}

// noteDirect reports whether err says that the file system does not write past the page cache, and remembers that.
func (s *Store) noteDirect(err error) bool {
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
		return false
	}
	s.indirect.Store(true)
	return true
}
