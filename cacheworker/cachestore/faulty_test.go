package cachestore

import (
	"errors"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// faulty is a disk that fails when fail says so: before a call does anything, but a write fails half way, and a
// read leaves other bytes behind.
type faulty struct {
	kernel
	fail   func(op string) error
	faults atomic.Int64
}

func (f *faulty) failed(op string) error {
	err := f.fail(op)
	if err != nil {
		f.faults.Add(1)
	}
	return err
}

func (f *faulty) openat(dir int, name string, flags int, perm uint32) (int, error) {
	op := "open"
	if flags&unix.O_CREAT != 0 {
		op = "create"
	} else if flags&unix.O_DIRECT != 0 {
		op = "open direct"
	}
	if err := f.failed(op); err != nil {
		return -1, err
	}
	return f.kernel.openat(dir, name, flags, perm)
}

func (f *faulty) mkdirat(dir int, name string) error {
	if err := f.failed("mkdir"); err != nil {
		return err
	}
	return f.kernel.mkdirat(dir, name)
}

func (f *faulty) renameat(dir int, from, to string) error {
	if err := f.failed("rename"); err != nil {
		return err
	}
	return f.kernel.renameat(dir, from, to)
}

func (f *faulty) unlinkat(dir int, name string) error {
	if err := f.failed("unlink"); err != nil {
		return err
	}
	return f.kernel.unlinkat(dir, name)
}

func (f *faulty) statfs(dir int, st *unix.Statfs_t) error {
	if err := f.failed("statfs"); err != nil {
		return err
	}
	return f.kernel.statfs(dir, st)
}

func (f *faulty) pread(file *os.File, p []byte, off int64) (int, error) {
	if err := f.failed("read"); err != nil {
		for i := range p[:len(p)/2] {
			p[i] ^= 0x5a
		}
		return len(p) / 2, err
	}
	return f.kernel.pread(file, p, off)
}

func (f *faulty) preadOnce(file *os.File, p []byte, off int64) (int, error) {
	if err := f.failed("read"); err != nil {
		return 0, err
	}
	return f.kernel.preadOnce(file, p, off)
}

func (f *faulty) pwrite(file *os.File, p []byte, off int64) (int, error) {
	if flags, err := unix.FcntlInt(file.Fd(), unix.F_GETFL, 0); err == nil && flags&unix.O_DIRECT != 0 {
		if err := f.failed("write direct"); err != nil {
			return 0, err
		}
	}
	if err := f.failed("write"); err != nil {
		n, _ := f.kernel.pwrite(file, p[:len(p)/2], off)
		return n, err
	}
	return f.kernel.pwrite(file, p, off)
}

func (f *faulty) writeBack(file *os.File) error {
	if err := f.failed("write back"); err != nil {
		return err
	}
	return f.kernel.writeBack(file)
}

// only fails one kind of calls, while on.
func only(op string, err error) (fail func(string) error, on *atomic.Bool) {
	on = new(atomic.Bool)
	return func(o string) error {
		if o == op && on.Load() {
			return err
		}
		return nil
	}, on
}

// TestTheFaultyDiskFails is the fault layer's own.
func TestTheFaultyDiskFails(t *testing.T) {
	var ops []string
	broken := true
	sys := &faulty{fail: func(op string) error {
		ops = append(ops, op)
		if broken {
			return syscall.EIO
		}
		return nil
	}}
	d, err := openDir(t.TempDir(), sys)
	if err != nil {
		t.Fatal(err)
	}
	defer d.f.Close()
	f, err := os.Create(d.f.Name() + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("abcdefgh"); err != nil {
		t.Fatal(err)
	}
	calls := []func() error{
		func() error { _, err := d.open("f", unix.O_RDONLY, 0); return err },
		func() error { _, err := d.open("g", unix.O_RDWR|unix.O_CREAT, 0o600); return err },
		func() error { return d.mkdir("h") },
		func() error { return d.rename("f", "i") },
		func() error { return d.unlink("i") },
		func() error { _, err := d.room(); return err },
		func() error { _, err := sys.pread(f, make([]byte, 8), 0); return err },
		func() error { _, err := sys.preadOnce(f, make([]byte, 8), 0); return err },
		func() error { _, err := sys.pwrite(f, []byte("ABCDEFGH"), 0); return err },
		func() error { return sys.writeBack(f) },
	}
	for i, call := range calls {
		if err := call(); !errors.Is(err, syscall.EIO) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	if b, err := os.ReadFile(d.f.Name() + "/f"); string(b) != "ABCDefgh" || err != nil {
		t.Errorf("the file holds %q after half a write, and is in its place: %v", b, err)
	}
	if n := sys.faults.Load(); int(n) != len(calls) || len(ops) != len(calls) {
		t.Errorf("%d faults of %v", n, ops)
	}
	broken = false
	for i, call := range calls {
		if err := call(); err != nil {
			t.Errorf("call %d of a whole disk: %v", i, err)
		}
	}
}
