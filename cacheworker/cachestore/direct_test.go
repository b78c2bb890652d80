package cachestore

import (
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// putDirect puts chunks from memory that begins a page.
func putDirect(t testing.TB, f *File, chunks ...int) error {
	t.Helper()
	p, err := unix.Mmap(-1, 0, chunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(p)
	for _, i := range chunks {
		n := copy(p, content(f.Object(), i))
		if err := f.PutDirect(i, p[:n]); err != nil {
			return err
		}
	}
	return nil
}

// resident is how many pages of chunk i the kernel has in memory.
func resident(t testing.TB, f *File, i int) uint64 {
	t.Helper()
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: uint64(i) * chunk, Len: chunk}, &st, 0); err != nil {
		t.Fatal(err)
	}
	return st.Cache
}

func TestADirectPutLeavesNoPagesInMemory(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 64*chunk))
	f := lease(t, s, obj("a", 2*chunk+100))
	put(t, f, 0)
	if err := putDirect(t, f, 1, 2); err != nil {
		t.Fatal(err)
	}
	if n := resident(t, f, 0); n == 0 {
		t.Error("a chunk that was put is not in memory: the test cannot tell")
	}
	var fsys unix.Statfs_t
	if err := unix.Fstatfs(f.Fd(), &fsys); err != nil {
		t.Fatal(err)
	}
	if n := resident(t, f, 1); n != 0 && fsys.Type != unix.TMPFS_MAGIC { // which has no other place
		t.Errorf("%d pages of a chunk that was put directly are in memory", n)
	}
	for i := range 3 {
		wantChunk(t, f, i)
	}
	if !f.Complete() {
		t.Error("the file is not complete")
	}
}

// TestReadingBesideDirectPuts has the kernel read ahead where a chunk is just being put: the zeros that were there must not stay
// in memory.
func TestReadingBesideDirectPuts(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 256*chunk))
	f := lease(t, s, obj("a", 48*chunk))
	var ready atomic.Int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		p := make([]byte, 128<<10)
		for off := int64(0); ; off += int64(len(p)) {
			select {
			case <-stop:
				return
			default:
			}
			if end := ready.Load(); off+int64(len(p)) > end {
				off = max(0, end-2*chunk) // to its end again, with what lies behind
			}
			unix.Pread(f.Fd(), p, off) // what it reads is compared below
		}
	}()
	for i := range f.Object().Chunks() {
		if err := putDirect(t, f, i); err != nil {
			t.Fatal(err)
		}
		ready.Store(int64(i+1) * chunk)
	}
	close(stop)
	<-done
	for i := range f.Object().Chunks() {
		wantChunk(t, f, i)
	}
}

func TestAFileSystemThatRefusesDirectWrites(t *testing.T) {
	for _, op := range []string{"open direct", "write direct"} {
		t.Run(op, func(t *testing.T) {
			refuse, on := only(op, syscall.EINVAL)
			sys := &faulty{fail: refuse}
			on.Store(true)
			cfg := testConfig(t, t.TempDir(), 64*chunk)
			cfg.sys = sys
			s := open(t, cfg)
			for _, key := range []string{"a", "b"} {
				f := lease(t, s, obj(key, 2*chunk))
				if err := putDirect(t, f, 0, 1); err != nil {
					t.Fatal(err)
				}
				wantChunk(t, f, 0)
				wantChunk(t, f, 1)
			}
			if n := sys.faults.Load(); n != 1 {
				t.Errorf("it was asked %d times; want once", n)
			}
		})
	}
}

func TestADirectPutThatFailsLeavesNoChunk(t *testing.T) {
	fail, on := only("write", syscall.EIO)
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	cfg.sys = &faulty{fail: fail}
	s := open(t, cfg)
	f := lease(t, s, obj("a", chunk))
	on.Store(true)
	if err := putDirect(t, f, 0); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("put: %v; want no space", err)
	}
	if f.Has(0) {
		t.Error("the chunk is there")
	}
	on.Store(false)
	if err := putDirect(t, f, 0); err != nil {
		t.Error(err)
	}
	wantChunk(t, f, 0)
}
