package fusefs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// A Parquet file with two columns behind a short one. The kernel reads ahead beyond the first of them, into its second chunk.
const (
	columnBegin = 5 * 4096
	columnEnd   = object.ChunkSize - 100<<10
	nextEnd     = 5*object.ChunkSize - 300<<10
	tableSize   = 8 * object.ChunkSize
)

func columns(seed uint64) []byte {
	meta := []byte{0x49, 0x1c, 0x19, 0x3c} // row_groups: 1, columns: 3
	start := int64(4)
	for _, end := range []int64{columnBegin, columnEnd, nextEnd} {
		meta = append(meta, 0x3c, 0x76) // meta_data, total_compressed_size
		meta = binary.AppendVarint(meta, end-start)
		meta = append(meta, 0x26) // data_page_offset
		meta = binary.AppendVarint(meta, start)
		meta = append(meta, 0, 0)
		start = end
	}
	meta = append(meta, 0, 0)
	data := bytesOf(seed, tableSize)
	copy(data[tableSize-8-len(meta):], append(binary.LittleEndian.AppendUint32(meta, uint32(len(meta))), "PAR1"...))
	return data
}

// putTables writes t0, t1 and so on.
func (w *world) putTables(n int) (objects []object.Object) {
	for i := range n {
		objects = append(objects, w.put(fmt.Sprint("t", i), columns(uint64(i))))
	}
	return objects
}

// readColumn opens a table and reads its footer and its column, until read-ahead beyond that has been declined.
func (w *world) readColumn(u *user, name string, obj object.Object, want []byte) (fd int) {
	w.t.Helper()
	fd = u.open(w.data(name))
	u.pread(fd, tableSize-64<<10, 64<<10)
	eventually(w.t, "the footer was looked into", func() bool { return w.store.TailBytes(obj.ID()) != 0 })
	declined := w.counters.Declined.Load()
	w.mem.Requests()
	for off := int64(columnBegin); off < columnEnd; off += 64 << 10 {
		n := int(min(64<<10, columnEnd-off))
		if got := u.pread(fd, off, n); !bytes.Equal(got, want[off:off+int64(n)]) {
			w.t.Errorf("%d bytes at %d are wrong", n, off)
		}
	}
	eventually(w.t, "read-ahead beyond the column was declined", func() bool { return w.counters.Declined.Load() == declined+1 })
	for _, r := range w.mem.Requests() {
		if r.N != 0 && r.Off+r.N > object.ChunkSize {
			w.t.Errorf("GET of %d bytes at %d: the column has none of them", r.N, r.Off)
		}
	}
	return fd
}

// Nobody but the kernel's read-ahead is told that a READ was declined: every way to read the same bytes gives them.
func TestWhatReadAheadWasDeclinedIsRead(t *testing.T) {
	const behind = columnEnd &^ 4095
	ways := []struct {
		name string
		read func(u *user, path string, fd int) (off int64, a answer)
	}{
		{"pread of 4 KiB", piece("pread", behind, 4096)},
		{"pread of 1 MiB", piece("pread", behind, 1<<20)},
		{"pread from the middle", piece("pread", columnEnd+200_000, 300_000)},
		{"pread over the column's end", piece("pread", columnBegin+100, 2<<20)},
		{"sendfile", piece("sendfile", behind, 1<<20)},
		{"splice", piece("splice", behind, 1<<20)},
		{"aio", piece("aio", behind, 1<<20)},
		{"no wait, then pread", piece("nowait", behind, 1<<20)},
		{"readahead, then pread", piece("willneed", behind, 1<<20)},
		{"shared mapping", viaMap(mapShared, behind, 1<<20)},
		{"private mapping", viaMap(mapPrivate, behind, 1<<20)},
		{"populated mapping", viaMap(mapShared|unix.MAP_POPULATE, behind, 1<<20)},
		{"another open", func(u *user, path string, _ int) (int64, answer) {
			fd := u.open(path)
			defer u.close(fd)
			return behind, u.do(call{Op: "pread", FD: fd, Off: behind, Len: 1 << 20})
		}},
		{"O_DIRECT", func(u *user, path string, _ int) (int64, answer) {
			fd := u.open(path, unix.O_DIRECT)
			defer u.close(fd)
			return behind, u.do(call{Op: "aligned", FD: fd, Off: behind, Len: 1 << 20})
		}},
	}
	for name, f := range map[string]Features{"all features": allFeatures, "none": {}} {
		w := newWorld(t, options{features: &f})
		objects := w.putTables(len(ways))
		root, other := newUser(t, 0), newUser(t, 65534)
		for i, way := range ways {
			t.Run(name+"/"+way.name, func(t *testing.T) {
				want := columns(uint64(i))
				file := fmt.Sprint("t", i)
				fd := w.readColumn(other, file, objects[i], want)
				for _, u := range []*user{other, root} {
					mine := fd
					if u == root {
						mine = u.open(w.data(file))
					}
					off, a := way.read(u, w.data(file), mine)
					if a.Errno != 0 || a.N == 0 || !bytes.Equal(a.Data, want[off:off+int64(len(a.Data))]) {
						t.Errorf("%d bytes, %v; right: %v", a.N, a.Errno, bytes.Equal(a.Data, want[off:off+int64(len(a.Data))]))
					}
					u.close(mine)
				}
				if got := other.sum(w.data(file)); got != sumOf(want) {
					t.Error("the whole is wrong")
				}
				w.complete(other, file)
				if got := root.sum(w.data(file)); got != sumOf(want) {
					t.Error("complete, the whole is wrong")
				}
			})
		}
	}
}

// piece reads by one call, or several.
func piece(op string, off int64, n int) func(*user, string, int) (int64, answer) {
	return func(u *user, _ string, fd int) (int64, answer) {
		return off, u.do(call{Op: op, FD: fd, Off: off, Len: n})
	}
}

func viaMap(flags int, off int64, n int) func(*user, string, int) (int64, answer) {
	return func(u *user, _ string, fd int) (int64, answer) {
		m := u.must(call{Op: "mmap", FD: fd, Len: tableSize, Flags: flags}).N
		defer func() { u.must(call{Op: "munmap", FD: int(m)}) }()
		a := u.do(call{Op: "load", FD: int(m), Off: off, Len: n})
		a.N = int64(len(a.Data))
		return off, a
	}
}

// TestWhatIsNoReadAheadIsNotDeclined: these READs have the place of one that would be, and their readers would see an error.
func TestWhatIsNoReadAheadIsNotDeclined(t *testing.T) {
	const step = 256 << 10
	for name, read := range map[string]func(u *user, path string, off int64, n int) answer{
		"O_DIRECT": func(u *user, path string, off int64, n int) answer {
			fd := u.open(path, unix.O_DIRECT)
			defer u.close(fd)
			return u.do(call{Op: "aligned", FD: fd, Off: off, Len: n})
		},
		"pages of a mapping, one by one": func(u *user, path string, off int64, n int) answer {
			fd := u.open(path)
			defer u.close(fd)
			m := u.must(call{Op: "mmap", FD: fd, Len: tableSize, Flags: mapShared}).N
			defer func() { u.must(call{Op: "munmap", FD: int(m)}) }()
			u.must(call{Op: "random", FD: int(m)})
			return u.do(call{Op: "load", FD: int(m), Off: off, Len: n})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{})
			u := newUser(t, 65534)
			want := columns(1)
			obj := w.put("t", want)
			fd := u.open(w.data("t")) // so that its reader stays
			defer u.close(fd)
			u.pread(fd, tableSize-64<<10, 64<<10)
			eventually(t, "the footer was looked into", func() bool { return w.store.TailBytes(obj.ID()) != 0 })
			for off := int64(columnBegin); off < columnEnd+4*step; off += step {
				if a := read(u, w.data("t"), off, step); a.Errno != 0 || !bytes.Equal(a.Data, want[off:off+step]) {
					t.Errorf("%d bytes at %d: %v", step, off, a.Errno)
				}
			}
			if n := w.counters.Declined.Load(); n != 0 {
				t.Errorf("%d READs were declined", n)
			}
		})
	}
}

// TestManyReadAtOnceWhatReadAheadWasDeclined: eight jobs, some of whom read only the column.
func TestManyReadAtOnceWhatReadAheadWasDeclined(t *testing.T) {
	w := newWorld(t, options{})
	users := []*user{newUser(t, 0), newUser(t, 65534)}
	for round, obj := range w.putTables(6) {
		want := columns(uint64(round))
		file := fmt.Sprint("t", round)
		fd := w.readColumn(users[0], file, obj, want)
		var jobs sync.WaitGroup
		for job := range 8 {
			jobs.Go(func() {
				u := users[job%2]
				n := []int{4096, 1 << 20, 64 << 10, 300_001}[job/2]
				fd := u.open(w.data(file))
				defer u.close(fd)
				from := int64(columnBegin)
				if job%4 < 2 {
					from = columnEnd - 10
				}
				for off := from; off < columnEnd+2<<20; off += int64(n) {
					if a := u.do(call{Op: "pread", FD: fd, Off: off, Len: n}); a.Errno != 0 || !bytes.Equal(a.Data, want[off:off+int64(n)]) {
						t.Errorf("%d bytes at %d: %v", n, off, a.Errno)
					}
				}
			})
		}
		jobs.Wait()
		users[0].close(fd)
	}
}

// Who reads one column after the other is asked to come twice once, not at each of their ends.
func TestWhoReadsColumnAfterColumnIsDeclinedOnce(t *testing.T) {
	w := newWorld(t, options{})
	u := newUser(t, 65534)
	want := columns(0)
	fd := w.readColumn(u, "t0", w.putTables(1)[0], want)
	defer u.close(fd)
	for off := int64(columnEnd); off < nextEnd; off += 64 << 10 {
		n := int(min(64<<10, nextEnd-off))
		if got := u.pread(fd, off, n); !bytes.Equal(got, want[off:off+int64(n)]) {
			t.Errorf("%d bytes at %d are wrong", n, off)
		}
	}
	u.pread(fd, nextEnd, 2<<20)
	if n := w.counters.Declined.Load(); n != 1 {
		t.Errorf("%d READs were declined; want 1", n)
	}
	if n := memsource.Count(w.mem.Requests(), source.Get); n == 0 {
		t.Error("the next column came from nowhere")
	}
}

// readBy are ways to read a piece of a file.
var readBy = map[string]func(c call, b []byte) (int, error){
	"aligned": func(c call, b []byte) (int, error) {
		m, err := unix.Mmap(-1, 0, len(b), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return 0, err
		}
		defer unix.Munmap(m)
		n, err := unix.Pread(c.FD, m, c.Off)
		return copy(b, m[:max(0, n)]), err
	},
	"willneed": func(c call, b []byte) (int, error) {
		if err := unix.Fadvise(c.FD, c.Off, int64(len(b)), unix.FADV_WILLNEED); err != nil {
			return 0, err
		}
		return preadFull(c.FD, b, c.Off)
	},
	"nowait": func(c call, b []byte) (int, error) { // as io_uring does
		n, err := unix.Preadv2(c.FD, [][]byte{b}, c.Off, unix.RWF_NOWAIT)
		if err == syscall.EAGAIN || err == syscall.EOPNOTSUPP { // Linux 6.18 has it for no file of FUSE
			n, err = 0, nil
		}
		if err != nil {
			return 0, err
		}
		m, err := preadFull(c.FD, b[n:], c.Off+int64(n))
		return n + m, err
	},
	"sendfile": func(c call, b []byte) (int, error) {
		to, err := unix.MemfdCreate("sendfile", unix.MFD_CLOEXEC)
		if err != nil {
			return 0, err
		}
		defer unix.Close(to)
		for off, n := c.Off, 0; n < len(b); {
			m, err := unix.Sendfile(to, c.FD, &off, len(b)-n)
			if err != nil || m == 0 {
				return n, err
			}
			n += m
		}
		return preadFull(to, b, 0)
	},
	"splice": func(c call, b []byte) (n int, err error) {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return 0, err
		}
		defer unix.Close(p[0])
		defer unix.Close(p[1])
		for off := c.Off; n < len(b); {
			m, err := unix.Splice(c.FD, &off, p[1], nil, len(b)-n, 0)
			if err != nil || m == 0 {
				return n, err
			}
			for end := n + int(m); n < end; {
				k, err := unix.Read(p[0], b[n:end])
				if err != nil {
					return n, err
				}
				n += k
			}
		}
		return n, nil
	},
	"aio": aioRead,
}

// aioRead reads by io_submit(2).
func aioRead(c call, b []byte) (int, error) {
	var ring uintptr
	if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&ring)), 0); e != 0 {
		return 0, os.NewSyscallError("io_setup", e)
	}
	defer unix.Syscall(unix.SYS_IO_DESTROY, ring, 0, 0)
	cb := &struct { // struct iocb, little-endian
		data          uint64
		key, rwFlags  uint32
		opcode, prio  uint16
		fd            uint32
		buf           unsafe.Pointer
		bytes, offset uint64
		reserved      uint64
		flags, event  uint32
	}{fd: uint32(c.FD), buf: unsafe.Pointer(&b[0]), bytes: uint64(len(b)), offset: uint64(c.Off)} // opcode 0 is IOCB_CMD_PREAD
	list := [1]unsafe.Pointer{unsafe.Pointer(cb)}
	if _, _, e := unix.Syscall(unix.SYS_IO_SUBMIT, ring, 1, uintptr(unsafe.Pointer(&list))); e != 0 {
		return 0, e
	}
	var event struct {
		data, obj uint64
		res, res2 int64
	}
	if _, _, e := unix.Syscall6(unix.SYS_IO_GETEVENTS, ring, 1, 1, uintptr(unsafe.Pointer(&event)), 0, 0); e != 0 {
		return 0, e
	}
	if event.res < 0 {
		return 0, syscall.Errno(-event.res)
	}
	return int(event.res), nil
}
