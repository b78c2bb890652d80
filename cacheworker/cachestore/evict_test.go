package cachestore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// eventually waits for what the kernel gives no event for.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// usedOnDisk asks the file system, not the store.
func usedOnDisk(t testing.TB, s *Store) (n int64) {
	t.Helper()
	for _, e := range snapshotFiles(t, s) {
		n += e
	}
	return n
}

func snapshotFiles(t testing.TB, s *Store) map[string]int64 {
	t.Helper()
	files := map[string]int64{}
	add := func(folder string) {
		names, err := s.dir.names(folder)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(s.dir.fd(), folder+"/"+name, &st, 0); err == nil {
				files[folder+"/"+name] = st.Blocks * 512
			}
		}
	}
	for i := range 256 {
		add(fmt.Sprintf("%s/%02x", objectsName, i))
	}
	add(heldName)
	return files
}

func TestEvictionKeepsTheCapacity(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 8*chunk))
	var mu sync.Mutex
	told := map[object.ID]int{}
	s.OnEvict(func(id object.ID) {
		s.Peek(id) // no lock is held
		mu.Lock()
		told[id]++
		mu.Unlock()
	})
	for i := range 30 {
		fill(t, s, obj(fmt.Sprint("o", i), 1+int64(i%3)*chunk))
		if used := usedOnDisk(t, s); used > 8*chunk {
			t.Fatalf("%d bytes on disk after object %d", used, i)
		}
	}
	st := s.Stats()
	if st.Evictions == 0 || int(st.Evictions) != 30-st.Objects || len(told) != int(st.Evictions) {
		t.Errorf("%d told, %+v", len(told), st)
	}
	for i := range 30 {
		o := obj(fmt.Sprint("o", i), 1+int64(i%3)*chunk)
		if s.Peek(o.ID()).Exists == (told[o.ID()] > 0) {
			t.Errorf("%v: exists %v, evictions told %d", o, s.Peek(o.ID()).Exists, told[o.ID()])
		}
	}
}

func TestEvictionPassesOverLeasedFiles(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 4*chunk))
	a, b := lease(t, s, obj("a", 2*chunk)), lease(t, s, obj("b", 2*chunk))
	putAll(t, a)
	putAll(t, b)
	c := lease(t, s, obj("c", chunk))
	if err := c.Put(0, content(c.Object(), 0)); !errors.Is(err, object.ErrNoSpace) {
		t.Fatalf("put into a full tier of leased files: %v", err)
	}
	if s.Stats().Rejected != 1 {
		t.Errorf("%+v", s.Stats())
	}
	wantChunk(t, a, 1)
	a.Close()
	put(t, c, 0)
	if s.Peek(a.Object().ID()).Exists || !s.Peek(b.Object().ID()).Exists {
		t.Error("the wrong one was evicted")
	}
	wantChunk(t, b, 0)
	wantChunk(t, c, 0)
}

func TestAnObjectLargerThanHalfTheTierIsRefused(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 4*chunk))
	if _, err := s.Open(obj("big", 2*chunk+1)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("open: %v", err)
	}
	lease(t, s, obj("half", 2*chunk))
}

// TestUnlinkedBytesAreCountedUntilNobodyHoldsThem is invariant 3: another descriptor, a
// mapping, a descriptor in flight.
func TestUnlinkedBytesAreCountedUntilNobodyHoldsThem(t *testing.T) {
	holders := map[string]func(t *testing.T, path string) (release func()){
		"descriptor": func(t *testing.T, path string) func() {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			return func() { f.Close() }
		},
		"mapping": func(t *testing.T, path string) func() {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			return func() { unix.Munmap(m) }
		},
		"descriptor in flight": func(t *testing.T, path string) func() {
			p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := unix.Sendmsg(p[0], []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
				t.Fatal(err)
			}
			return func() { unix.Close(p[0]); unix.Close(p[1]) }
		},
	}
	for name, hold := range holders {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := testConfig(t, t.TempDir(), 4*chunk)
			s := open(t, cfg)
			a, b, c := obj("a", 2*chunk), obj("b", 2*chunk), obj("c", 2*chunk)
			fill(t, s, a)
			release := hold(t, cfg.Dir+"/"+objectPath(a.ID(), s.entries[a.ID()].nonce))
			released := false
			defer func() {
				if !released {
					release()
				}
			}()
			fill(t, s, b)
			s.Evict(a.ID())
			f := lease(t, s, c)
			put(t, f, 0) // evicts b
			if st := s.Stats(); st.UnlinkedBytes != 2*chunk || st.DiskBytes > 4*chunk || st.Objects != 1 {
				t.Errorf("while held: %+v", st)
			}
			put(t, f, 1)
			d := lease(t, s, obj("d", 1))
			if err := d.Put(0, content(d.Object(), 0)); !errors.Is(err, object.ErrNoSpace) {
				t.Errorf("a tier of held and leased files took more: %v", err)
			}
			checkInvariants(t, s)

			// Another process takes over: it still knows.
			f.Close()
			d.Close()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, cfg)
			if st := s.Stats(); st.UnlinkedBytes != 2*chunk {
				t.Errorf("after a restart: %+v", st)
			}
			release()
			released = true
			eventually(t, "unlinked bytes are released", func() bool { return s.Stats().UnlinkedBytes == 0 })
			if n := countFiles(t, s.dir.path()+"/"+heldName); n != 0 {
				t.Errorf("%d files in held", n)
			}
			fill(t, s, a, b)
		})
	}
}

func TestAnEvictedFileIsReadByItsLeases(t *testing.T) {
	t.Parallel()
	s := open(t, testConfig(t, t.TempDir(), 8*chunk))
	o := obj("a", 3*chunk)
	f := lease(t, s, o)
	put(t, f, 0, 1)
	if !s.Evict(o.ID()) || s.Evict(o.ID()) {
		t.Fatal("evicted not once")
	}
	if !f.Evicted() || s.Peek(o.ID()).Exists {
		t.Error("not evicted")
	}
	wantChunk(t, f, 1)
	if err := f.Put(2, content(o, 2)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("put into an evicted file: %v", err)
	}
	if st := s.Stats(); st.CachedBytes != 0 || st.UnlinkedBytes != 2*chunk {
		t.Errorf("%+v", st)
	}
	g := lease(t, s, o) // the same object again is another file
	putAll(t, g)
	wantChunk(t, f, 0)
	f.Close()
	eventually(t, "unlinked bytes are released", func() bool { return s.Stats().UnlinkedBytes == 0 })
	wantChunk(t, g, 2)
}

func TestAFileWithoutChunksLeavesNothing(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 8*chunk))
	evicted := false
	s.OnEvict(func(object.ID) { evicted = true })
	f, g := lease(t, s, obj("a", chunk)), lease(t, s, obj("a", chunk))
	f.Close()
	if !s.Peek(f.Object().ID()).Exists {
		t.Error("gone while leased")
	}
	g.Close()
	if s.Peek(f.Object().ID()).Exists || s.Stats().UnlinkedFiles != 0 || evicted {
		t.Errorf("evicted %v, %+v", evicted, s.Stats())
	}
}

func TestASmallerCapacityIsKeptFromTheStart(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 16*chunk)
	s := open(t, cfg)
	for i := range 8 {
		fill(t, s, obj(fmt.Sprint(i), 2*chunk))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.CapacityBytes = 6 * chunk
	s = open(t, cfg)
	eventually(t, "three objects are left", func() bool { // without a Put
		st := s.Stats()
		return st.DiskBytes == 6*chunk && st.Objects == 3
	})
}

// tmpfs mounts one for the test.
func tmpfs(t testing.TB, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("larder-test", dir, "tmpfs", 0, options); err != nil {
		t.Fatalf("mount tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

func room0(t testing.TB, dir string) (bytes, inodes int64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Ffree)
}

func TestMinFreeIsKeptByEvicting(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "size=64m,nr_inodes=2000")
	cfg := testConfig(t, dir, 1<<30)
	cfg.MinFreeBytes = 20 << 20
	s := open(t, cfg)
	for i := range 60 {
		fill(t, s, obj(fmt.Sprint(i), chunk))
		if free, _ := room0(t, dir); free < cfg.MinFreeBytes-minHeadroom { // the index grows when it will
			t.Fatalf("%d bytes free after object %d", free, i)
		}
	}
	if st := s.Stats(); st.Evictions == 0 || st.Objects < 20 {
		t.Errorf("%+v", st)
	}
	// Somebody else takes 10 MiB of it.
	if err := os.WriteFile(dir+"/foreign", make([]byte, 10<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the cache gives way", func() bool {
		free, _ := room0(t, dir)
		return free >= cfg.MinFreeBytes
	})
}

func TestMinFreeInodesAreKeptByEvicting(t *testing.T) {
	dir := tmpfs(t, "size=64m,nr_inodes=1000")
	cfg := testConfig(t, dir, 1<<30)
	cfg.MinFreeInodes = 500
	s := open(t, cfg)
	for i := range 600 {
		fill(t, s, obj(fmt.Sprint(i), 10))
	}
	if _, free := room0(t, dir); free < 490 { // pebble makes a few files on its own
		t.Errorf("%d inodes free", free)
	}
	if st := s.Stats(); st.Evictions == 0 || st.Objects < 100 {
		t.Errorf("%+v", st)
	}
}

// TestAFullFileSystemIsReadThrough fills the file system behind the store's back.
func TestAFullFileSystemIsReadThrough(t *testing.T) {
	dir := tmpfs(t, "size=48m")
	var log logCounter
	cfg := testConfig(t, dir, 1<<30)
	cfg.Log = log.logger(t)
	s := open(t, cfg)
	f := lease(t, s, obj("a", 4*chunk))
	put(t, f, 0, 1)
	foreign, err := os.Create(dir + "/foreign")
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	s.mu.Lock()
	s.fsAt = time.Now().Add(time.Hour) // the store does not look just now
	s.mu.Unlock()
	for err = nil; err == nil; {
		_, err = foreign.Write(make([]byte, 1<<20))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	for range 5 {
		s.mu.Lock()
		s.fsAt = time.Now().Add(time.Hour)
		s.fsRoom.bytes = 1 << 30
		s.mu.Unlock()
		if err := f.Put(2, content(f.Object(), 2)); !errors.Is(err, object.ErrNoSpace) || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("put: %v", err)
		}
	}
	if st := s.Stats(); st.PutErrors != 5 || st.CachedBytes != 2*chunk {
		t.Errorf("%+v", st)
	}
	if n := log.errors.Load(); n != 1 {
		t.Errorf("%d errors logged", n)
	}
	wantChunk(t, f, 0)
	wantChunk(t, f, 1)
	checkInvariants(t, s)
	if err := foreign.Truncate(0); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.fsAt = time.Time{}
	s.mu.Unlock()
	put(t, f, 2, 3)
	if !f.Complete() {
		t.Error("not complete")
	}
	wantChunk(t, f, 2)
}

// TestADiskErrorIsAMiss puts a descriptor that can neither read nor write under the file.
func TestADiskErrorIsAMiss(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 64*chunk))
	f := lease(t, s, obj("a", 2*chunk))
	put(t, f, 0)
	good, err := unix.FcntlInt(uintptr(f.Fd()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(good)
	if err := unix.Dup3(s.dir.fd(), f.Fd(), unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if err := f.Put(1, content(f.Object(), 1)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("put: %v", err)
	}
	if _, err := f.ReadAt(make([]byte, 10), 0); !errors.Is(err, object.ErrCorrupt) {
		t.Errorf("read: %v", err)
	}
	if f.Has(0) || s.Stats().BadChunks != 1 || s.Stats().CachedBytes != 0 {
		t.Errorf("has %v, %+v", f.Has(0), s.Stats())
	}
	checkInvariants(t, s)
	if err := unix.Dup3(good, f.Fd(), unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	put(t, f, 0, 1) // the room of both is taken already
	if st := s.Stats(); st.DiskBytes != 2*chunk || st.CachedBytes != 2*chunk {
		t.Errorf("%+v", st)
	}
	wantChunk(t, f, 0)
}
