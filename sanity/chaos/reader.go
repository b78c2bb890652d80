package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
)

// task is what a child process is to read; it comes in on standard input, whose end is also
// the end of the child.
type task struct {
	Way   string `json:"way"`
	Root  string `json:"root"` // the folder of the volume
	Files []file `json:"files"`
	Seed  uint64 `json:"seed"`
}

// noted is how long an operation takes that is reported one by one; shorter ones are only counted.
const noted = 3 * time.Millisecond

// maxFaults ends a reader that has nothing new to say.
const maxFaults = 20

// reader is a child process: one thread that reads, in one way, for ever.
type reader struct {
	task
	slot   *slot
	out    *json.Encoder
	rng    *rand.Rand
	buf    []byte
	faults int

	client *shortcircuit.Client // of the way socket
}

var ways = map[string]func(*reader) error{
	"sequential":  (*reader).sequential,
	"random":      (*reader).random,
	"direct":      (*reader).direct,
	"mmap":        (*reader).mmap,
	"readdir":     (*reader).readdir,
	"open":        (*reader).open,
	"tree":        (*reader).tree,
	"timer":       (*reader).timer,
	"holder":      (*reader).holder,
	"passthrough": (*reader).passthrough,
	"socket":      (*reader).socket,
	"once":        (*reader).once,
}

// read is the child process.
func read(in io.Reader, out io.Writer, shared *os.File) error {
	var r reader
	if err := json.NewDecoder(in).Decode(&r.task); err != nil {
		return fmt.Errorf("read the task: %w", err)
	}
	go func() { // the task was all that comes
		io.Copy(io.Discard, in)
		os.Exit(0)
	}()
	var err error
	if r.slot, err = mapSlot(shared); err != nil {
		return err
	}
	r.out = json.NewEncoder(out)
	r.rng = rand.New(rand.NewPCG(r.Seed, 1))
	// Aligned for O_DIRECT, and not the garbage collector's.
	if r.buf, err = unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return err
	}
	debug.SetPanicOnFault(true) // a page of a mapping that cannot be read is an error, not the end
	way := ways[r.Way]
	if way == nil {
		return fmt.Errorf("no way to read is called %q", r.Way)
	}
	for r.faults < maxFaults {
		if err := way(&r); errors.Is(err, errDone) {
			return nil
		}
	}
	return fmt.Errorf("%s: gave up after %d errors", r.Way, r.faults)
}

var errDone = errors.New("done")

// names of operations, for the slot.
var ops = []string{"open", "pread", "touch", "getdents", "stat", "close", "chdir", "lseek", "dial"}

func number(op string) int64 {
	for i, o := range ops {
		if o == op {
			return int64(i)
		}
	}
	return -1
}

// op does one operation of the kind, and reports it if it failed or took long. needs says that the worker has to answer it;
// after, if it is not nil, can tell better than that once it is over.
func (r *reader) op(kind, what string, needs bool, after func() bool, do func() error) error {
	s := r.slot
	s.Op.Store(number(kind))
	s.Needs.Store(0)
	if needs {
		s.Needs.Store(1)
	}
	begin := now()
	s.Begin.Store(begin)
	err := do()
	end := now()
	if end-begin > int64(noted) {
		if after != nil {
			needs = after()
		}
		r.report(report{Op: r.Way + " " + kind, Begin: begin, End: end, Needs: needs})
	}
	s.Begin.Store(0)
	s.Ops.Add(1)
	if err != nil {
		r.fault(report{Err: fmt.Sprintf("%s: %s %s: %v (%v after it began)", r.Way, kind, what, err, time.Duration(end-begin)), Begin: begin, End: end})
	}
	return err
}

func (r *reader) report(m report) {
	r.out.Encode(m) // a parent that has gone ends us anyway
	r.slot.Sent.Add(1)
}

func (r *reader) fault(m report) {
	r.faults++
	r.report(m)
}

// openFile opens a file of the volume. An open always needs the worker: it answers with the
// mode, or with ESTALE.
func (r *reader) openFile(f file, flags int) (fd int, err error) {
	return r.openAt(unix.AT_FDCWD, filepath.Join(r.Root, f.Path), flags)
}

func (r *reader) openAt(dir int, name string, flags int) (fd int, err error) {
	err = r.op("open", name, true, nil, func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	return fd, err
}

func (r *reader) close(fd int) {
	r.op("close", "", false, nil, func() error { return unix.Close(fd) })
}

// pread reads a piece of the file, once, and checks it. known says how the handle reads.
func (r *reader) pread(fd int, f file, off int64, size int, known mode) error {
	want := int(min(int64(size), f.Size-off))
	after := func() bool { return known == cached && r.inPageCache(fd, off) || known == straight }
	n := 0
	err := r.op("pread", fmt.Sprintf("%s at %d", f.Path, off), known != passed, after, func() (err error) {
		n, err = unix.Pread(fd, r.buf[:size], off)
		return err
	})
	if err != nil {
		return err
	}
	if n < want { // POSIX lets a read be short; a regular file's is not
		err := fmt.Errorf("%s: pread %s at %d: %d bytes, want %d", r.Way, f.Path, off, n, want)
		r.fault(report{Err: err.Error()})
		return err
	}
	return r.checked(f, off, r.buf[:n])
}

func (r *reader) checked(f file, off int64, b []byte) error {
	if at := f.check(b, off); at >= 0 {
		err := fmt.Errorf("%s: %s: wrong byte at %d (read %d bytes at %d)", r.Way, f.Path, at, len(b), off)
		r.fault(report{Wrong: err.Error()})
		return err
	}
	r.slot.Bytes.Add(int64(len(b)))
	return nil
}

// mode is how an open file is read.
type mode int

const (
	cached   mode = iota // READs to the worker, pages in the page cache of the mount
	straight             // O_DIRECT: READs to the worker, no pages
	passed               // the kernel reads the cache file
)

// modeOf finds out. A page of a mapping comes from the backing file where there is one: then
// the mount's own page cache stays empty.
func (r *reader) modeOf(fd int, f file) (mode, error) {
	off := r.rng.Int64N(f.Size) &^ 4095
	b, err := unix.Mmap(fd, off, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		r.fault(report{Err: fmt.Sprintf("%s: mmap %s: %v", r.Way, f.Path, err)})
		return 0, err
	}
	defer unix.Munmap(b)
	if err := r.touch(f, b, off, 0, true, nil); err != nil {
		return 0, err
	}
	if r.inPageCache(fd, off) {
		return cached, nil
	}
	return passed, nil
}

// touch checks one page of a mapping that begins at off of the file.
func (r *reader) touch(f file, b []byte, off, page int64, needs bool, after func() bool) error {
	var first byte
	err := r.op("touch", fmt.Sprintf("%s at %d", f.Path, off+page), needs, after, func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("SIGBUS: %v", p)
			}
		}()
		first = b[page]
		return nil
	})
	if err != nil {
		return err
	}
	piece := b[page:min(page+4096, f.Size-off)]
	r.buf[0] = first
	return r.checked(f, off+page, piece)
}

func (r *reader) inPageCache(fd int, off int64) bool {
	var st unix.Cachestat_t
	err := unix.Cachestat(uint(fd), &unix.CachestatRange{Off: uint64(off), Len: 4096}, &st, 0)
	return err == nil && st.Cache > 0
}

// drop takes pages out of the page cache of the mount.
func drop(fd int, off, n int64) { unix.Fadvise(fd, off, n, unix.FADV_DONTNEED) }

// idle lets others run.
func idle(d time.Duration) { time.Sleep(d) }

func (r *reader) pick() file { return r.Files[r.rng.IntN(len(r.Files))] }

// place is an offset in the file, aligned to 4 KiB.
func (r *reader) place(f file) int64 { return r.rng.Int64N((f.Size+4095)/4096) * 4096 }
