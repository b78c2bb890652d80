package fusefs

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// onDiskOnly has no page of an object's cache file in memory. It returns how many are, later.
func (w *world) onDiskOnly(o object.Object) (pages func() uint64) {
	w.t.Helper()
	id := o.ID()
	files, err := filepath.Glob(filepath.Join(w.tier(), "objects", "*", fmt.Sprintf("%x-*", id[:])))
	if err != nil || len(files) != 1 {
		w.t.Fatalf("%v: %v, %v", o, files, err)
	}
	f, err := os.Open(files[0])
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { f.Close() })
	pages = func() uint64 {
		var st unix.Cachestat_t
		if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0); err != nil {
			w.t.Fatal(err)
		}
		return st.Cache
	}
	eventually(w.t, "no page is in memory", func() bool {
		if err := f.Sync(); err != nil {
			w.t.Fatal(err)
		}
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		return pages() == 0
	})
	return pages
}

func TestWhoReadsSmallFilesInOrderHasTheNextOnesBrought(t *testing.T) {
	const files, size = 40, 9000
	w := newWorld(t, options{})
	u := newUser(t, 0)
	file := func(dir string, i int) string { return fmt.Sprintf("%s/%02d", dir, i) }
	objects := map[string]object.Object{}
	for i := range files {
		for n, dir := range []string{"order", "any"} {
			objects[file(dir, i)] = w.put(file(dir, i), bytesOf(uint64(n*files+i), size))
		}
	}
	for i := range files {
		u.sum(w.data(file("order", i)))
		u.sum(w.data(file("any", i)))
	}
	w.forget()
	eventually(t, "the kernel forgets", func() bool { nodes, _ := w.served().Stats(); return nodes < files/2 })
	inOrder, inAny := map[int]func() uint64{}, map[int]func() uint64{}
	for i := range files {
		inOrder[i], inAny[i] = w.onDiskOnly(objects[file("order", i)]), w.onDiskOnly(objects[file("any", i)])
	}
	for i, k := range []int{7, 3, 20, 11} {
		if u.sum(w.data(file("any", k))) != sumOf(bytesOf(uint64(files+k), size)) {
			t.Errorf("read %d: wrong bytes", i)
		}
	}
	for i := range 2 {
		if u.sum(w.data(file("order", i))) != sumOf(bytesOf(uint64(i), size)) {
			t.Errorf("file %d: wrong bytes", i)
		}
	}
	last := 1 + filesAhead
	eventually(t, "the next ones are brought", func() bool { return inOrder[last]() == (size+4095)/4096 })
	if inOrder[last+1]() > 0 {
		t.Error("and more than those")
	}
	m := w.served()
	held := func() (files, bytes int) {
		m.brought.mu.Lock()
		defer m.brought.mu.Unlock()
		return len(m.brought.of), m.brought.bytes
	}
	eventually(t, "they are in memory", func() bool { files, bytes := held(); return files == filesAhead && bytes == files*size })
	w.onDiskOnly(objects[file("order", 2)])
	served := w.fills.Stats().DiskBytes
	if u.sum(w.data(file("order", 2))) != sumOf(bytesOf(2, size)) || inOrder[2]() > 0 {
		t.Error("its bytes are wrong, or were read once more")
	}
	if n := w.fills.Stats().DiskBytes - served; n != size {
		t.Errorf("%d bytes are counted of %d", n, size)
	}
	for i, pages := range inAny {
		if n := pages(); n > 0 && i != 7 && i != 3 && i != 20 && i != 11 {
			t.Errorf("file %d of those that are read in any order has %d pages in memory", i, n)
		}
	}
	for i := 3; i < files; i++ {
		if u.sum(w.data(file("order", i))) != sumOf(bytesOf(uint64(i), size)) {
			t.Errorf("file %d: wrong bytes", i)
		}
		if i+1 < files {
			eventually(t, "the next one is brought", func() bool { return inOrder[i+1]() > 0 })
		}
	}
	eventually(t, "nothing is kept that was read", func() bool { files, bytes := held(); return files == 0 && bytes == 0 })
}

func TestWhatIsBroughtIsBounded(t *testing.T) {
	var b brought
	id := func(i int) object.ID { return object.ID{byte(i), byte(i >> 8)} }
	const n = 2 * maxBrought / smallFile
	for i := range n {
		b.put(id(i), make([]byte, smallFile))
		b.put(id(i), make([]byte, smallFile))
	}
	if b.bytes != maxBrought || len(b.of) != n/2 || b.row.Len() != n/2 {
		t.Errorf("%d bytes, %d objects, %d in the row", b.bytes, len(b.of), b.row.Len())
	}
	if b.take(id(0)) != nil || b.take(id(n-1)) == nil || b.take(id(n-1)) != nil {
		t.Error("want the youngest, once")
	}
	if b.bytes != maxBrought-smallFile || b.row.Len() != n/2-1 {
		t.Errorf("%d bytes, %d in the row", b.bytes, b.row.Len())
	}
}
