package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
)

// sequential reads whole files, opened anew each time, that the page cache does not have.
func (r *reader) sequential() error {
	f := r.pick()
	fd, err := r.openFile(f, 0)
	if err != nil {
		return err
	}
	defer r.close(fd)
	drop(fd, 0, 0)
	m, err := r.modeOf(fd, f)
	if err != nil {
		return err
	}
	for off := int64(0); off < f.Size; off += 256 << 10 {
		if err := r.pread(fd, f, off, 256<<10, m); err != nil {
			return err
		}
		idle(8 * time.Millisecond)
	}
	return nil
}

// random reads at random places of files that stay open for a while.
func (r *reader) random() error {
	const files = 4
	var fds [files]int
	var fs [files]file
	var ms [files]mode
	for i := range fds {
		fs[i] = r.pick()
		fd, err := r.openFile(fs[i], 0)
		if err != nil {
			return err
		}
		defer r.close(fd)
		fds[i] = fd
		if ms[i], err = r.modeOf(fd, fs[i]); err != nil {
			return err
		}
	}
	for range 1000 {
		i := r.rng.IntN(files)
		off, size := r.place(fs[i]), []int{4 << 10, 4 << 10, 60 << 10, 300 << 10, 1 << 20}[r.rng.IntN(5)]
		drop(fds[i], 0, 0)
		if err := r.pread(fds[i], fs[i], off, size, ms[i]); err != nil {
			return err
		}
		idle(10 * time.Millisecond)
	}
	return nil
}

// direct reads past the page cache.
func (r *reader) direct() error {
	f := r.pick()
	fd, err := r.openFile(f, unix.O_DIRECT)
	if err != nil {
		return err
	}
	defer r.close(fd)
	m, err := r.modeOf(fd, f)
	if err != nil {
		return err
	}
	if m == cached {
		m = straight
	}
	for range 200 {
		if err := r.pread(fd, f, r.place(f), 4096<<r.rng.IntN(8), m); err != nil {
			return err
		}
		idle(10 * time.Millisecond)
	}
	return nil
}

// mmap touches pages of a mapping that outlives many kills.
func (r *reader) mmap() error {
	f := r.pick()
	fd, err := r.openFile(f, 0)
	if err != nil {
		return err
	}
	m, err := r.modeOf(fd, f)
	if err != nil {
		r.close(fd)
		return err
	}
	b, err := unix.Mmap(fd, 0, int(f.Size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		r.fault(report{Err: fmt.Sprintf("mmap %s: %v", f.Path, err)})
		r.close(fd)
		return err
	}
	defer unix.Munmap(b)
	defer r.close(fd)
	for range 500 {
		page := r.place(f)
		unix.Madvise(b, unix.MADV_DONTNEED)
		drop(fd, 0, 0)
		err := r.touch(f, b, 0, page, m != passed, func() bool { return m == cached && r.inPageCache(fd, page) })
		if err != nil {
			return err
		}
		idle(10 * time.Millisecond)
	}
	return nil
}

// readdir reads a folder of many entries to its end, with buffers that hold one entry and such that hold
// hundreds, and with pauses, so that it is often in the middle.
func (r *reader) readdir() error {
	want := make([]string, len(r.Files))
	for i, f := range r.Files {
		want[i] = path.Base(f.Path)
	}
	slices.Sort(want)
	fd, err := r.openAt(unix.AT_FDCWD, path.Join(r.Root, path.Dir(r.Files[0].Path)), unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer r.close(fd)
	for _, size := range []int{400, 4096, 700, 32 << 10} {
		names, err := r.names(fd, size, time.Millisecond)
		if err != nil {
			return err
		}
		slices.Sort(names)
		if !slices.Equal(names, want) {
			err := fmt.Errorf("readdir with %d bytes: %d names, want %d: %s", size, len(names), len(want), difference(names, want))
			r.fault(report{Wrong: err.Error()})
			return err
		}
		if err := r.op("lseek", "", false, nil, func() error { _, err := unix.Seek(fd, 0, unix.SEEK_SET); return err }); err != nil {
			return err
		}
	}
	return nil
}

// difference names the first few of what sorted lists differ in; duplicates are more than one of a name.
func difference(got, want []string) string {
	var out []string
	for i, j := 0, 0; (i < len(got) || j < len(want)) && len(out) < 5; {
		switch {
		case j == len(want) || i < len(got) && got[i] < want[j]:
			out = append(out, "+"+got[i])
			i++
		case i == len(got) || got[i] > want[j]:
			out = append(out, "-"+want[j])
			j++
		default:
			i, j = i+1, j+1
		}
	}
	return strings.Join(out, " ")
}

// names reads an open folder from where it is to its end.
func (r *reader) names(fd, size int, pace time.Duration) ([]string, error) {
	var names []string
	for {
		n := 0
		err := r.op("getdents", fmt.Sprintf("after %d names", len(names)), true, nil, func() (err error) {
			n, err = unix.Getdents(fd, r.buf[:size])
			return err
		})
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return names, nil
		}
		names = append(names, entries(r.buf[:n])...)
		if pace > 0 && len(names)%4 == 0 {
			idle(pace)
		}
	}
}

// entries are the names in what getdents64 returned, without the dots.
func entries(b []byte) []string {
	const reclen, name = 16, 19 // in struct linux_dirent64
	var names []string
	for len(b) > 0 {
		n := int(binary.LittleEndian.Uint16(b[reclen:]))
		s, _, _ := strings.Cut(string(b[name:n]), "\x00")
		if s != "." && s != ".." {
			names = append(names, s)
		}
		b = b[n:]
	}
	return names
}

// open opens, looks at and closes small files.
func (r *reader) open() error {
	f := r.pick()
	name := path.Join(r.Root, f.Path)
	var st unix.Stat_t
	if err := r.op("stat", name, false, nil, func() error { return unix.Stat(name, &st) }); err != nil {
		return err
	}
	fd, err := r.openFile(f, 0)
	if err != nil {
		return err
	}
	defer r.close(fd)
	if err := r.op("stat", name, false, nil, func() error { return unix.Fstat(fd, &st) }); err != nil {
		return err
	}
	if st.Size != f.Size {
		err := fmt.Errorf("%s: %d bytes, want %d", name, st.Size, f.Size)
		r.fault(report{Wrong: err.Error()})
		return err
	}
	idle(4 * time.Millisecond)
	return nil
}

// tree walks a tree as git and grep -r do: from folder to folder by relative names, every file
// read to its end.
func (r *reader) tree() error {
	want := map[string]file{}
	for _, f := range r.Files {
		want[f.Path] = f
	}
	root, err := r.openAt(unix.AT_FDCWD, r.Root, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer r.close(root)
	seen, err := r.walk(root, "", want)
	if err != nil {
		return err
	}
	if seen != len(want) {
		err := fmt.Errorf("tree: %d files, want %d", seen, len(want))
		r.fault(report{Wrong: err.Error()})
		return err
	}
	return nil
}

func (r *reader) walk(dir int, prefix string, want map[string]file) (seen int, err error) {
	if err := r.op("chdir", prefix, false, nil, func() error { return unix.Fchdir(dir) }); err != nil {
		return 0, err
	}
	names, err := r.names(dir, 4096, 0)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		if prefix == "" && name == "many" { // the folder of another reader
			continue
		}
		var st unix.Stat_t
		if err := r.op("stat", prefix+name, false, nil, func() error { return unix.Lstat(name, &st) }); err != nil {
			return seen, err
		}
		n := 0
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			n, err = r.walkInto(dir, name, prefix, want)
		} else {
			n, err = 1, r.whole(name, prefix, want)
		}
		if err != nil {
			return seen, err
		}
		seen += n
	}
	return seen, nil
}

// walkInto walks a folder and comes back.
func (r *reader) walkInto(dir int, name, prefix string, want map[string]file) (int, error) {
	fd, err := r.openAt(unix.AT_FDCWD, name, unix.O_DIRECTORY)
	if err != nil {
		return 0, err
	}
	defer r.close(fd)
	n, err := r.walk(fd, prefix+name+"/", want)
	if err != nil {
		return n, err
	}
	return n, r.op("chdir", prefix, false, nil, func() error { return unix.Fchdir(dir) })
}

func (r *reader) whole(name, prefix string, want map[string]file) error {
	f, ok := want[prefix+name]
	if !ok {
		err := fmt.Errorf("tree: there is %s%s", prefix, name)
		r.fault(report{Wrong: err.Error()})
		return err
	}
	fd, err := r.openAt(unix.AT_FDCWD, name, 0)
	if err != nil {
		return err
	}
	defer r.close(fd)
	drop(fd, 0, 0)
	if err := r.pread(fd, f, 0, 64<<10, cached); err != nil {
		return err
	}
	idle(3 * time.Millisecond)
	return nil
}

// timer is interrupted all the time, as by a profiler: a signal with SA_RESTART (Go's handlers
// have it) must not show.
func (r *reader) timer() error {
	every := unix.Itimerval{Interval: unix.NsecToTimeval(4e6), Value: unix.NsecToTimeval(4e6)}
	if _, err := unix.Setitimer(unix.ITIMER_REAL, every); err != nil {
		r.fault(report{Err: fmt.Sprintf("setitimer: %v", err)})
		return err
	}
	if r.rng.IntN(2) == 0 {
		return r.direct()
	}
	return r.sequential()
}

// holder opens a file as soon as the kernel reads it past the worker, never closes it, and reads and maps it for
// ever: no kill may be felt at all.
func (r *reader) holder() error {
	f := r.Files[0]
	fd, err := r.passedOpen(f)
	if err != nil {
		return err
	}
	b, err := unix.Mmap(fd, 0, int(f.Size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		r.fault(report{Err: fmt.Sprintf("mmap %s: %v", f.Path, err)})
		return err
	}
	r.slot.Holds.Add(1)
	defer r.slot.Holds.Add(-1)
	for {
		size := 4096 << r.rng.IntN(5)
		if err := r.pread(fd, f, r.place(f), size, passed); err != nil {
			return err
		}
		r.slot.Passing.Add(int64(size))
		if err := r.touch(f, b, 0, r.place(f), false, nil); err != nil {
			return err
		}
		idle(5 * time.Millisecond)
	}
}

// passedOpen opens until the file is read past the worker.
func (r *reader) passedOpen(f file) (int, error) {
	for {
		fd, err := r.openFile(f, 0)
		if err != nil {
			return 0, err
		}
		m, err := r.modeOf(fd, f)
		if err == nil && m == passed {
			return fd, nil
		}
		if err == nil {
			for off := int64(0); off < f.Size && err == nil; off += 1 << 20 {
				err = r.pread(fd, f, off, 1<<20, m)
			}
		}
		r.close(fd)
		if err != nil {
			return 0, err
		}
		idle(50 * time.Millisecond)
	}
}

// passthrough opens, reads and closes files that are complete.
func (r *reader) passthrough() error {
	f := r.pick()
	fd, err := r.openFile(f, 0)
	if err != nil {
		return err
	}
	defer r.close(fd)
	m, err := r.modeOf(fd, f)
	if err != nil {
		return err
	}
	if m == passed {
		r.slot.Holds.Add(1)
		defer r.slot.Holds.Add(-1)
	}
	for range 8 {
		if err := r.pread(fd, f, r.place(f), 256<<10, m); err != nil {
			return err
		}
		if m == passed {
			r.slot.Passing.Add(256 << 10)
		}
		idle(5 * time.Millisecond)
	}
	return nil
}

// socket reads by the domain socket: connecting, too, must not fail while the worker is dead.
func (r *reader) socket() error {
	ctx := context.Background()
	if r.client == nil || r.rng.IntN(4) == 0 {
		if r.client != nil {
			r.client.Close()
		}
		err := r.op("dial", r.Root, true, nil, func() error {
			at, err := shortcircuit.Find(r.Root)
			if err == nil {
				r.client, err = shortcircuit.Dial(ctx, at)
			}
			return err
		})
		if err != nil {
			r.client = nil
			return err
		}
	}
	f := r.pick()
	var h *shortcircuit.File
	err := r.op("open", f.Path, true, nil, func() (err error) {
		h, err = r.client.Open(ctx, f.Path)
		return err
	})
	if err != nil {
		return err
	}
	defer h.Close()
	for range 20 {
		off := r.place(f)
		n := int(min(64<<10, f.Size-off))
		err := r.op("pread", fmt.Sprintf("%s at %d by the socket", f.Path, off), !h.Local(), nil, func() error {
			_, err := h.ReadAt(r.buf[:n], off)
			return err
		})
		if err == nil {
			err = r.checked(f, off, r.buf[:n])
		}
		if err != nil {
			return err
		}
		idle(10 * time.Millisecond)
	}
	return nil
}

// once reads every file once and ends.
func (r *reader) once() error {
	for _, f := range r.Files {
		fd, err := r.openFile(f, 0)
		if err != nil {
			return errDone
		}
		for off := int64(0); off < f.Size; off += 1 << 20 {
			if err := r.pread(fd, f, off, 1<<20, cached); err != nil {
				return errDone
			}
		}
		r.close(fd)
	}
	return errDone
}
