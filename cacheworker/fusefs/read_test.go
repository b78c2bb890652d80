package fusefs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/larderfs/larder/cacheworker/brokerwire"
)

func TestReadsAreRightColdPartialAndComplete(t *testing.T) {
	for name, f := range map[string]Features{
		"all features": allFeatures,
		"none":         {},
		"no splice":    {Passthrough: true, Resend: true},
		"splice alone": {Splice: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{features: &f})
			u := newUser(t, 65534)
			files := map[string][]byte{}
			for i, size := range []int{0, 1, 4097, 1 << 20, 2<<20 + 5} {
				name := fmt.Sprint("f", i)
				files[name] = bytesOf(uint64(i), size)
				w.put(name, files[name])
			}
			for name, want := range files {
				readEverywhere(u, w.data(name), want) // cold, then in part
				if got := u.sum(w.data(name)); got != sumOf(want) {
					t.Errorf("%d bytes: cold, the whole is wrong", len(want))
				}
				if len(want) == 0 {
					continue // nothing is ever read of it
				}
				w.complete(u, name)
				if got := u.sum(w.data(name)); got != sumOf(want) {
					t.Errorf("%d bytes: complete, the whole is wrong", len(want))
				}
				readEverywhere(u, w.data(name), want)
				if n := w.node(name); (n.file.mode == passthrough) != (f.Passthrough && len(want) > smallFile) {
					t.Errorf("%d bytes: mode %d with passthrough %v", len(want), n.file.mode, f.Passthrough)
				}
			}
		})
	}
}

// A file that is complete is read by the kernel alone.
func TestACompleteFileIsReadWithoutTheWorker(t *testing.T) {
	w := newWorld(t, options{})
	want := bytesOf(1, 3<<20+7)
	w.put("f", want)
	root, other := newUser(t, 0), newUser(t, 65534)
	held := root.open(w.data("f")) // of the node in the other mode
	w.complete(root, "f")
	first := w.node("f")
	reads, ino := w.counters.Reads.Load(), root.stat(w.data("f")).Ino
	stale := w.counters.Stale.Load()

	for _, u := range []*user{root, other, root} {
		if got := u.sum(w.data("f")); got != sumOf(want) {
			t.Error("wrong bytes")
		}
		readEverywhere(u, w.data("f"), want)
	}
	if got := w.counters.Reads.Load(); got != reads {
		t.Errorf("%d READs reached the worker", got-reads)
	}
	if w.counters.Stale.Load() == stale {
		t.Error("the kernel, which knew the name, was not told to look it up again")
	}
	n := w.node("f")
	if n == first || n.file.mode != passthrough || w.backing(n) == 0 {
		t.Errorf("node %d in mode %d with backing id %d, before it was %d", n.id, n.file.mode, w.backing(n), first.id)
	}
	if now := root.stat(w.data("f")).Ino; now != ino {
		t.Errorf("the inode number of the same object was %d and is %d", ino, now)
	}
	if got := root.pread(held, 1<<20, 1000); !bytes.Equal(got, want[1<<20:1<<20+1000]) {
		t.Error("the handle from before reads wrong bytes")
	}
}

func TestANewVersionIsAnotherNode(t *testing.T) {
	for _, mode := range []mode{cached, passthrough} {
		t.Run(fmt.Sprint("mode ", mode), func(t *testing.T) {
			w := newWorld(t, options{volume: brokerwire.Volume{Freshness: -1}})
			u := newUser(t, 65534)
			old, now := bytesOf(1, 8<<20), bytesOf(2, 8<<20)
			w.put("f", old)
			if mode == passthrough {
				w.complete(u, "f")
			}
			fd := u.open(w.data("f"))
			if got := u.pread(fd, 0, 4096); !bytes.Equal(got, old[:4096]) {
				t.Error("wrong bytes of the old version")
			}
			before, ino := w.node("f"), u.stat(w.data("f")).Ino
			w.put("f", now)

			if got := u.sum(w.data("f")); got != sumOf(now) {
				t.Error("the path does not lead to the new version")
			}
			if n := w.node("f"); n == before || before.file.mode != mode {
				t.Errorf("node %d in mode %d was node %d in mode %d", n.id, n.file.mode, before.id, before.file.mode)
			}
			if u.stat(w.data("f")).Ino == ino {
				t.Error("both versions have one inode number")
			}
			if got := u.pread(fd, 100, 4096); !bytes.Equal(got, old[100:4196]) {
				t.Error("cached bytes of the old version are not read any more")
			}
			a := u.do(call{Op: "pread", FD: fd, Off: 7 << 20, Len: 4096})
			switch {
			case mode == passthrough && (a.Errno != 0 || !bytes.Equal(a.Data, old[7<<20:7<<20+4096])):
				t.Errorf("a complete file: %v", a.Errno)
			case mode == cached && a.Errno != syscall.ESTALE:
				t.Errorf("bytes that are not cached: %d, %v; want ESTALE", a.N, a.Errno)
			}
			u.close(fd)
		})
	}
}

// Within freshness a changed object is noticed by a read; the next open must not find it
// again.
func TestAVersionThatHasGoneIsNotOpenedAgain(t *testing.T) {
	w := newWorld(t, options{})
	u := newUser(t, 0)
	w.put("f", bytesOf(1, 2<<20))
	fd := u.open(w.data("f"))
	now := bytesOf(2, 2<<20)
	w.put("f", now)
	if a := u.do(call{Op: "pread", FD: fd, Len: 4096}); a.Errno != syscall.ESTALE {
		t.Errorf("the old version: %v", a.Errno)
	}
	if got := u.sum(w.data("f")); got != sumOf(now) {
		t.Error("wrong bytes of the new version")
	}
	w.mem.Delete("set/f")
	u.must(call{Op: "sum", Path: w.data("f")}) // it is cached, and freshness is an hour
}

// A bind mount of a single file (subPath of a file) cannot be looked up again.
func TestABindOfASingleFile(t *testing.T) {
	w := newWorld(t, options{volume: brokerwire.Volume{Freshness: -1}})
	u := newUser(t, 0)
	want := bytesOf(1, 4<<20)
	obj := w.put("f", want)
	target := filepath.Join(w.dir, "target")
	if err := os.WriteFile(target, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	u.must(call{Op: "bind", Path: w.data("f"), To: target})
	check := func(when string) {
		t.Helper()
		for range 2 {
			if got := u.sum(target); got != sumOf(want) {
				t.Errorf("%s: wrong bytes", when)
			}
			readEverywhere(u, target, want)
		}
	}
	check("cold")
	w.complete(u, "f")
	u.sum(w.data("f")) // a node in passthrough mode, which the kernel may have forgotten again
	check("complete, and the node is of the other mode")

	// Now the bind is of a node in passthrough mode, which is evicted.
	u.must(call{Op: "umount", Path: target})
	u.must(call{Op: "bind", Path: w.data("f"), To: target})
	check("in passthrough mode")
	if n := w.node("f"); w.backing(n) == 0 {
		t.Fatal("the test did not come to what it tests")
	}
	w.store.Evict(obj.ID())
	check("evicted")
	fd := u.open(target)
	w.complete(u, "f")
	w.store.Evict(obj.ID())
	if got := u.pread(fd, 1<<20, 100); !bytes.Equal(got, want[1<<20:1<<20+100]) {
		t.Error("evicted while it is open: wrong bytes")
	}
	check("evicted while it is open")
	u.close(fd)
	check("evicted again")

	w.put("f", bytesOf(2, 4<<20))
	for range 3 {
		if a := u.do(call{Op: "open", Path: target}); a.Errno != syscall.ESTALE {
			t.Errorf("the object has changed: %v; want ESTALE", a.Errno)
		}
	}
	if got := u.sum(w.data("f")); got == sumOf(want) {
		t.Error("the path still leads to the old version")
	}
}

func TestAnEvictedPassthroughFileIsReadOn(t *testing.T) {
	w := newWorld(t, options{})
	u := newUser(t, 65534)
	want := bytesOf(1, 4<<20)
	obj := w.put("f", want)
	w.complete(u, "f")
	fd := u.open(w.data("f"))
	m := u.must(call{Op: "mmap", FD: fd, Len: len(want), Flags: mapShared}).N
	n := w.node("f")
	if w.backing(n) == 0 {
		t.Fatal("the file is not open in passthrough mode")
	}
	w.store.Evict(obj.ID())
	reads := w.counters.Reads.Load()
	if got := u.pread(fd, 3<<20, 5000); !bytes.Equal(got, want[3<<20:3<<20+5000]) {
		t.Error("the handle reads wrong bytes")
	}
	if got := u.must(call{Op: "load", FD: int(m), Off: 2 << 20, Len: 5000}).Data; !bytes.Equal(got, want[2<<20:2<<20+5000]) {
		t.Error("the mapping has wrong bytes")
	}
	if w.counters.Reads.Load() != reads {
		t.Error("the kernel does not read the file it holds")
	}
	for range 3 {
		if got := u.sum(w.data("f")); got != sumOf(want) {
			t.Error("a new open reads wrong bytes")
		}
	}
	if w.store.Stats().UnlinkedBytes == 0 {
		t.Error("bytes that the kernel holds are not counted")
	}
	u.must(call{Op: "munmap", FD: int(m)})
	u.close(fd)
	eventually(t, "nobody holds the evicted file", func() bool { return w.store.Stats().UnlinkedBytes == 0 })
	w.complete(u, "f")
	if got := u.sum(w.data("f")); got != sumOf(want) || w.node("f") == n || w.backing(w.node("f")) == 0 {
		t.Error("complete again it is not passed through, by another node")
	}
}

// readEverywhere reads pieces of a file, by pread and from a mapping.
func readEverywhere(u *user, path string, want []byte) {
	u.t.Helper()
	fd := u.open(path)
	defer u.close(fd)
	for range 8 {
		off := rand.IntN(len(want) + 2)
		n := rand.IntN(300_000)
		got := u.pread(fd, int64(off), n)
		if right := want[min(off, len(want)):min(off+n, len(want))]; !bytes.Equal(got, right) {
			u.t.Errorf("%s: %d bytes at %d of %d are wrong", path, n, off, len(want))
		}
	}
	if len(want) == 0 {
		return
	}
	id := u.must(call{Op: "mmap", FD: fd, Len: len(want), Flags: []int{mapShared, mapPrivate}[rand.IntN(2)]}).N
	defer func() { u.must(call{Op: "munmap", FD: int(id)}) }()
	for range 4 {
		off := rand.IntN(len(want))
		n := min(rand.IntN(100_000), len(want)-off)
		if got := u.must(call{Op: "load", FD: int(id), Off: int64(off), Len: n}).Data; !bytes.Equal(got, want[off:off+n]) {
			u.t.Errorf("%s: %d mapped bytes at %d are wrong", path, n, off)
		}
	}
}
