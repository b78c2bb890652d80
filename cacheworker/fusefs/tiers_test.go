package fusefs

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
)

// fileOf is the cache file of that size in a tier, "" for none.
func (w *world) fileOf(tier string, size int64) (path string) {
	w.t.Helper()
	files, err := filepath.Glob(filepath.Join(tier, "objects", "*", "*"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range files {
		if st, err := os.Stat(f); err == nil && st.Size() == size {
			path = f
		}
	}
	return path
}

// readsFrom reports whether the kernel reads a file of the mount from a cache file: other bytes are put there for a moment.
func (w *world) readsFrom(u *user, path, cacheFile string) bool {
	w.t.Helper()
	reads := w.counters.Reads.Load()
	f, err := os.OpenFile(cacheFile, os.O_RDWR, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	was, other := make([]byte, 6), []byte("others")
	if _, err := f.ReadAt(was, 70); err != nil {
		w.t.Fatal(err)
	}
	fd := u.open(path)
	defer u.close(fd)
	if _, err := f.WriteAt(other, 70); err != nil {
		w.t.Fatal(err)
	}
	got := u.pread(fd, 70, len(other))
	if _, err := f.WriteAt(was, 70); err != nil {
		w.t.Fatal(err)
	}
	return bytes.Equal(got, other) && w.counters.Reads.Load() == reads
}

// A broker that does not know a tier yet refuses its files: they are read without passthrough, until there is a broker that
// does.
func TestPassthroughIsTriedAgainWithAnotherBroker(t *testing.T) {
	old := &outdated{}
	w := newWorld(t, options{broker: func(b Broker) Broker { old.Broker = b; return old }})
	old.refuses.Store(true)
	u := newUser(t, 65534)
	want := bytesOf(1, 1<<20)
	w.put("f", want)
	w.complete(u, "f")
	for range 2 {
		if got := u.sum(w.data("f")); got != sumOf(want) || w.backing(w.node("f")) != 0 {
			t.Error("refused, it is not read without passthrough")
		}
	}
	old.refuses.Store(false)
	w.served().TryPassthrough()
	for range 2 {
		if got := u.sum(w.data("f")); got != sumOf(want) {
			t.Error("wrong bytes")
		}
	}
	if w.backing(w.node("f")) == 0 {
		t.Error("it is not passed through again")
	}
}

// outdated is a broker that refuses files, or not.
type outdated struct {
	Broker
	refuses atomic.Bool
}

func (o *outdated) Register(ctx context.Context, volume string, node uint64, f *os.File) (int32, error) {
	if o.refuses.Load() {
		return 0, object.ErrDenied
	}
	return o.Broker.Register(ctx, volume, node, f)
}

// A file of the slower tier is passed through, by a view of its own. Asked for more often it is copied up, and then the kernel
// reads it there.
func TestPassthroughFollowsAFileToAFasterTier(t *testing.T) {
	w := newWorld(t, options{capacity: 128 << 20, memory: 16 << 20})
	u := newUser(t, 65534)
	const size = 3<<20 + 77
	want := bytesOf(1, size)
	w.put("f", want)
	w.put("full1", bytesOf(7, 7<<20)) // 14 of 16 MiB
	w.put("full2", bytesOf(7, 7<<20))
	for _, name := range []string{"full1", "full2", "f"} {
		w.complete(u, name)
	}
	slow := w.fileOf(w.tier(), size)
	if slow == "" || w.fileOf(w.memory, size) != "" {
		t.Fatal("it does not begin in the tier that has room")
	}
	if !w.readsFrom(u, w.data("f"), slow) {
		t.Error("a file of the slower tier is not passed through")
	}
	n := w.node("f")
	eventually(t, "opens lead to another node", func() bool {
		u.close(u.open(w.data("f")))
		return w.node("f") != n
	})
	fast := w.fileOf(w.memory, size)
	if fast == "" || !w.readsFrom(u, w.data("f"), fast) {
		t.Error("the copy in memory is not passed through")
	}
	for _, name := range []string{"full1", "full2"} {
		if got := u.sum(w.data(name)); got != sumOf(bytesOf(7, 7<<20)) {
			t.Errorf("%s, which may have made way, has wrong bytes", name)
		}
	}
	if got := u.sum(w.data("f")); got != sumOf(want) {
		t.Error("wrong bytes")
	}
	if s := w.store.Stats(); s.Evictions != 0 || s.BadChunks != 0 {
		t.Errorf("%+v", s)
	}
}
