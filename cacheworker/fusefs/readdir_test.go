package fusefs

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

const many = 3000

// putMany fills a folder: files and folders, names of all lengths.
func putMany(w *world) (names []string) {
	for i := range many {
		name := fmt.Sprintf("%04d%s", i, string(make255(i)))
		if i%10 == 3 {
			w.put("big/"+name+"/x", []byte("x"))
		} else {
			w.put("big/"+name, []byte(name))
		}
		names = append(names, name)
	}
	w.mem.PageSize = 700 // the listing is of several pages
	return names
}

func make255(i int) []byte {
	b := make([]byte, i*7%252)
	for j := range b {
		b[j] = 'a' + byte(i%26)
	}
	return b
}

// entries reads on until it has n more, or the end.
func (u *user) entries(fd, size, n int) (es []dirent) {
	u.t.Helper()
	for len(es) < n {
		got := u.must(call{Op: "getdents", FD: fd, Len: size}).Dir
		if len(got) == 0 {
			break
		}
		es = append(es, got...)
	}
	return es
}

func names(es []dirent) (out []string) {
	for _, e := range es {
		if e.Name != "." && e.Name != ".." {
			out = append(out, e.Name)
		}
	}
	return out
}

// isAll checks that names are all there, each once, in any order.
func isAll(t *testing.T, when string, got, want []string) {
	t.Helper()
	got, want = slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))
	if !slices.Equal(got, want) {
		t.Errorf("%s: %d names, %d of them different; want %d", when, len(got), len(slices.Compact(got)), len(want))
	}
}

// forget has the kernel drop what no process uses, and waits until the worker has heard it.
func (w *world) forget() {
	w.t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		w.t.Fatal(err)
	}
}

func TestALargeFolderIsListedCompletely(t *testing.T) {
	w := newWorld(t, options{})
	want := putMany(w)
	u := newUser(t, 65534)
	for _, size := range []int{1000, 4096, 1 << 20} {
		fd := u.open(w.data("big"), unix.O_DIRECTORY)
		es := u.entries(fd, size, many+3)
		isAll(t, fmt.Sprint("buffers of ", size), names(es), want)
		for _, e := range es {
			if folder := e.Type == unix.DT_DIR; e.Name[0] != '.' && folder != (e.Name[3] == '3') {
				t.Fatalf("%s is of type %d", e.Name, e.Type)
			}
		}
		if again := u.entries(fd, size, 1); len(again) != 0 {
			t.Errorf("behind the end: %d entries", len(again))
		}
		u.close(fd)
	}
}

func TestRewindSeekAndTell(t *testing.T) {
	w := newWorld(t, options{})
	want := putMany(w)
	u := newUser(t, 0)
	fd := u.open(w.data("big"), unix.O_DIRECTORY)
	es := u.entries(fd, 4096, many+3)
	if len(es) != many+2 {
		t.Fatalf("%d entries", len(es))
	}
	seek := func(off int64) { u.must(call{Op: "seek", FD: fd, Off: off}) }
	seek(0)
	isAll(t, "rewound", names(u.entries(fd, 4096, many+3)), want)

	for _, forgotten := range []bool{false, true} {
		if forgotten {
			w.forget()
			eventually(t, "the kernel forgets", func() bool { nodes, _ := w.served().Stats(); return nodes < many/2 })
		}
		for _, i := range []int{1, 2, 500, 1700, many, 0, many / 2} { // behind an entry, forwards and backwards
			seek(es[i].Off)
			got := u.entries(fd, 4096, 5)
			for j := range min(5, len(es)-i-1) {
				if got[j].Name != es[i+1+j].Name {
					t.Errorf("forgotten %v: behind %s comes %s, want %s", forgotten, es[i].Name, got[j].Name, es[i+1+j].Name)
				}
			}
		}
		seek(es[len(es)-1].Off)
		if got := u.entries(fd, 4096, 1); len(got) != 0 {
			t.Errorf("behind the last entry comes %s", got[0].Name)
		}
	}
	seek(1 << 40) // no entry ever had it
	if a := u.do(call{Op: "getdents", FD: fd, Len: 4096}); a.Errno != unix.ENOENT {
		t.Errorf("an invalid position: %v; want ENOENT", a.Errno)
	}
	u.close(fd)
}

func TestAFolderIsReadOnWhileItsEntriesAreForgotten(t *testing.T) {
	w := newWorld(t, options{})
	want := putMany(w)
	u := newUser(t, 0)
	fds := []int{u.open(w.data("big"), unix.O_DIRECTORY), u.open(w.data("big"), unix.O_DIRECTORY)}
	got := make([][]dirent, 2)
	for i := range 12 { // two readers at different places
		for r, fd := range fds {
			got[r] = append(got[r], u.entries(fd, 1000+3000*r, 100)...)
		}
		if i%4 == 1 {
			w.forget()
		}
	}
	for r, fd := range fds {
		got[r] = append(got[r], u.entries(fd, 4096, many)...)
		w.forget()
		if more := u.entries(fd, 4096, 1); len(more) != 0 {
			t.Errorf("behind the end: %d entries", len(more))
		}
		isAll(t, fmt.Sprint("reader ", r), names(got[r]), want)
		u.close(fd)
	}
	w.forget()
	eventually(t, "nothing of the folder is held", func() bool { nodes, _ := w.served().Stats(); return nodes < 20 })
}

// A position pins nodes; those that the kernel has forgotten meanwhile go with it, and with them
// what they hold.
func TestWhatOnlyAPositionHeldIsGivenUpWithIt(t *testing.T) {
	w := newWorld(t, options{})
	w.put("d/f", bytesOf(1, 100_000))
	u := newUser(t, 0)
	w.complete(u, "d/f")
	u.sum(w.data("d/f"))
	if w.backing(w.node("d/f")) == 0 {
		t.Fatal("the file is not passed through")
	}
	fd := u.open(w.data("d"), unix.O_DIRECTORY)
	u.entries(fd, 4096, 3)
	w.forget()
	eventually(t, "the kernel forgets", func() bool {
		w.forget()
		n := w.node("d/f")
		if n == nil {
			t.Fatal("the position was not held")
		}
		w.served().table.mu.RLock()
		defer w.served().table.mu.RUnlock()
		return n.lookups == 0
	})
	u.close(fd)
	eventually(t, "the backing file is given up", func() bool {
		tab := w.served().table
		tab.mu.RLock()
		defer tab.mu.RUnlock()
		return len(tab.backed) == 0
	})
	id := w.mem.Put("set/d/f", bytesOf(1, 100_000)).ID()
	w.store.Evict(id)
	eventually(t, "the kernel holds no file", func() bool { return w.store.Stats().UnlinkedBytes == 0 })
}
