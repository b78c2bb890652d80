package fusefs

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/master/record"
	"github.com/larderfs/larder/sanity/leak"
)

func mountOf(path, uri string) record.Mount { return record.Mount{Path: path, URI: uri} }

// remount has a mounted volume of a path show other mounts.
func (w *world) remount(mounts ...record.Mount) {
	w.t.Helper()
	w.mu.Lock()
	w.mounts = mounts
	w.mu.Unlock()
	s := w.served()
	s.SetDataset(w.dataset(s.cfg.Volume))
	s.background.Wait() // the kernel has been told
}

func (u *user) names(path string) []string {
	u.t.Helper()
	fd := u.open(path, unix.O_DIRECTORY)
	defer u.close(fd)
	return names(u.entries(fd, 4096, 1000))
}

func (u *user) errno(op, path string) error {
	u.t.Helper()
	if a := u.do(call{Op: op, Path: path}); a.Errno != 0 {
		return a.Errno
	}
	return nil
}

func TestOneTreeOverSeveralStores(t *testing.T) {
	w := newWorld(t, options{volume: brokerwire.Volume{Path: "/sales"}, mounts: []record.Mount{
		mountOf("/sales", "file:///a"), mountOf("/sales/2026/archive", "file:///b/deep"), mountOf("/sales/only/below", "file:///c"), mountOf("/hr", "file:///hr"),
	}})
	w.mem.PageSize = 2 // lists of several pages have mounts between
	for _, key := range []string{"a/2025/x", "a/2026/aa", "a/2026/archive/hidden", "a/2026/archive.txt", "a/2026/zz", "a/top", "b/deep/q1/y", "b/other", "c/z", "hr/secret"} {
		w.mem.Put(key, []byte(key))
	}
	u := newUser(t, 65534)
	for dir, want := range map[string][]string{
		"": {"2025", "2026", "only", "top"}, "2026": {"aa", "archive", "archive.txt", "zz"}, "2026/archive": {"q1"}, "only": {"below"}, "only/below": {"z"},
	} {
		isAll(t, "/"+dir, u.names(w.data(dir)), want)
	}
	for name, key := range map[string]string{"top": "a/top", "2026/aa": "a/2026/aa", "2026/archive/q1/y": "b/deep/q1/y", "only/below/z": "c/z"} {
		if got := u.sum(w.data(name)); got != sumOf([]byte(key)) {
			t.Errorf("%s is not %s", name, key)
		}
	}
	for _, name := range []string{"2026/archive/hidden", "only/x", "only/below/x", "../hr", "hr"} {
		if err := u.errno("stat", w.data(name)); err != unix.ENOENT {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is open is read to its end; what is looked up from then on is what is mounted then.
func TestMountsComeAndGoUnderReaders(t *testing.T) {
	volume := brokerwire.Volume{Path: "/sales", Freshness: -1} // the kernel keeps no names but those of mounts, for a moment
	w := newWorld(t, options{volume: volume, mounts: []record.Mount{mountOf("/sales", "file:///a"), mountOf("/sales/old", "file:///b")}})
	before, after := bytesOf(1, 5<<20), bytesOf(2, 5<<20)
	w.mem.Put("a/f", before)
	w.mem.Put("b/f", before)
	w.mem.Put("b/g", before)
	w.mem.Put("c/f", after)
	w.mem.Put("d/f", before) // the same bytes, and so the same version, of another store
	u := newUser(t, 65534)

	fd, dir := u.open(w.data("old/f")), u.open(w.data("old"), unix.O_DIRECTORY)
	if got := u.pread(fd, 0, 10); !slices.Equal(got, before[:10]) {
		t.Error("not what was put there")
	}
	w.remount(mountOf("/sales", "file:///a")) // the mount is removed
	if got := u.pread(fd, 4<<20, 1000); !slices.Equal(got, before[4<<20:4<<20+1000]) {
		t.Error("a file that was open is not read to its end")
	}
	for _, name := range []string{"old", "old/f", "old/g"} {
		if err := u.errno("stat", w.data(name)); err != unix.ENOENT {
			t.Errorf("%s is still there: %v", name, err)
		}
	}
	if a := u.do(call{Op: "getdents", FD: dir, Len: 4096}); a.Errno == 0 && len(names(a.Dir)) > 0 {
		t.Errorf("a folder that was open still lists %v", names(a.Dir))
	}
	isAll(t, "the root without it", u.names(w.data("")), []string{"f"})

	w.remount(mountOf("/sales", "file:///a"), mountOf("/sales/old", "file:///c")) // another one in its place
	isAll(t, "the root", u.names(w.data("")), []string{"f", "old"})
	if got := u.sum(w.data("old/f")); got != sumOf(after) {
		t.Error("the new mount's file is not what is read")
	}
	if got := u.pread(fd, 3<<20, 1000); !slices.Equal(got, before[3<<20:3<<20+1000]) {
		t.Error("the old file is not read to its end beside the new one")
	}
	u.close(fd)

	w.remount(mountOf("/sales", "file:///d")) // the path itself
	if got := u.sum(w.data("f")); got != sumOf(before) {
		t.Error("not the new store's file")
	}
	if n := w.node("f"); w.served().table.objectOf(n).Key != "d/f" {
		t.Errorf("read from %s", w.served().table.objectOf(n).Key)
	}
	w.remount() // nothing at all
	if err := u.errno("open", w.data("f")); err != unix.ENOENT {
		t.Errorf("nothing is mounted: %v", err)
	}
	w.remount(mountOf("/sales", "file:///a")) // and back: the same folder
	if got := u.sum(w.data("f")); got != sumOf(before) {
		t.Error("not there again")
	}
}

// The kernel may keep names for an hour, and yet it sees at once where mounts begin and end.
func TestTheKernelIsToldOfMounts(t *testing.T) {
	w := newWorld(t, options{volume: brokerwire.Volume{Path: "/sales"}, mounts: []record.Mount{mountOf("/sales", "file:///a")}})
	w.mem.Put("a/sub/under/f", []byte("f"))
	w.mem.Put("b/g", []byte("g"))
	u := newUser(t, 65534)
	if err := u.errno("stat", w.data("sub/new")); err != unix.ENOENT {
		t.Fatal(err)
	}
	ino := u.stat(w.data("sub")).Ino
	root := newUser(t, 0)
	root.must(call{Op: "bind", Path: t.TempDir(), To: w.data("sub/under")})
	defer root.do(call{Op: "umount", Path: w.data("sub/under")})
	w.remount(mountOf("/sales", "file:///a"), mountOf("/sales/sub/new", "file:///b"))
	if got := u.names(w.data("sub/new")); !slices.Equal(got, []string{"g"}) {
		t.Errorf("the new mount shows %v", got)
	}
	if u.stat(w.data("sub")).Ino != ino {
		t.Error("a folder that leads to the new mount is another one")
	}
	if !slices.ContainsFunc(leak.Mounts(w.dir), func(m leak.Mount) bool { return m.Point == w.data("sub/under") }) {
		t.Error("what was mounted below such a folder is gone")
	}
	fd := u.open(w.data("sub/new/g"))
	defer u.close(fd)
	w.remount(mountOf("/sales", "file:///a"))
	if err := u.errno("stat", w.data("sub/new")); err != unix.ENOENT {
		t.Errorf("the kernel still knows the mount: %v", err)
	}
	if err := u.errno("open", w.data("sub/new/g")); err != unix.ENOENT {
		t.Errorf("a file of it can still be opened: %v", err)
	}
}

// A name that the kernel keeps for an hour is not opened as what was mounted there before.
func TestAnOpenIsOfWhatIsMountedNow(t *testing.T) {
	w := newWorld(t, options{volume: brokerwire.Volume{Path: "/sales"}, mounts: []record.Mount{mountOf("/sales", "file:///a")},
		features: &Features{Resend: true}}) // or a file that is complete would be looked up again anyway
	w.mem.Put("a/f", []byte("of a"))
	w.mem.Put("b/f", []byte("of b"))
	w.mem.Put("a/gone", []byte("x"))
	u := newUser(t, 65534)
	for _, name := range []string{"f", "gone"} {
		u.sum(w.data(name))
	}
	w.remount(mountOf("/sales", "file:///b"))
	if u.sum(w.data("f")) != sumOf([]byte("of b")) {
		t.Error("opened what was mounted before")
	}
	if err := u.errno("open", w.data("gone")); err != unix.ENOENT {
		t.Errorf("opened what is not mounted any more: %v", err)
	}
}

// A file of a mount that a volume may not use is denied, and hides what lies under it.
func TestAMountThatIsNotForTheVolume(t *testing.T) {
	closed := mountOf("/sales/old", "file:///b")
	closed.AllowClass = []string{"team-b"}
	w := newWorld(t, options{volume: brokerwire.Volume{Path: "/sales", Tenant: "team-a", Freshness: -1}, mounts: []record.Mount{mountOf("/sales", "file:///a"), closed}})
	w.mem.Put("a/f", []byte("f"))
	w.mem.Put("a/old/under", []byte("x"))
	w.mem.Put("b/g", []byte("g"))
	u := newUser(t, 65534)
	isAll(t, "the root", u.names(w.data("")), []string{"f"})
	for _, name := range []string{"old", "old/under", "old/g"} {
		if err := u.errno("stat", w.data(name)); err != unix.EACCES {
			t.Errorf("%s: %v", name, err)
		}
	}
	closed.AllowClass = []string{"team-a", "team-b"}
	w.remount(mountOf("/sales", "file:///a"), closed)
	fd := u.open(w.data("old/g"))
	closed.AllowClass = []string{"-"} // taken away again
	w.remount(mountOf("/sales", "file:///a"), closed)
	if err := u.errno("open", w.data("old/g")); err != unix.EACCES {
		t.Errorf("opened: %v", err)
	}
	if got := u.pread(fd, 0, 1); string(got) != "g" {
		t.Errorf("what was open reads %q", got)
	}
	u.close(fd)
}

// Every file of a random tree of mounts is what the deepest mount above it has there.
func TestFilesAreOfTheDeepestMount(t *testing.T) {
	mounts := []record.Mount{mountOf("/n", "file:///s0")}
	dirs := []string{""}
	for i, d := range []string{"a", "a/b", "a/b/c", "b", "b/a/a", "c/c"} {
		mounts = append(mounts, mountOf("/n/"+d, fmt.Sprintf("file:///s%d", i+1)))
		dirs = append(dirs, d)
	}
	w := newWorld(t, options{volume: brokerwire.Volume{Path: "/n"}, mounts: mounts})
	for i := range mounts {
		for _, sub := range []string{"", "a/", "b/", "c/", "a/a/", "a/b/", "b/c/", "c/c/", "a/b/c/"} {
			w.mem.Put(fmt.Sprintf("s%d/%sf", i, sub), fmt.Appendf(nil, "s%d/%s", i, sub))
		}
	}
	u := newUser(t, 65534)
	for _, dir := range []string{"", "a/", "a/b/", "a/b/c/", "a/c/", "b/", "b/a/", "b/a/a/", "b/a/a/c/", "c/", "c/c/", "c/c/a/b/"} {
		best := 0
		for i, d := range dirs {
			if d != "" && len(d) > len(dirs[best]) && len(dir) > len(d) && dir[:len(d)+1] == d+"/" {
				best = i
			}
		}
		rest := dir
		if best > 0 {
			rest = dir[len(dirs[best])+1:]
		}
		want := fmt.Sprintf("s%d/%s", best, rest)
		err := u.errno("stat", w.data(dir+"f"))
		_, there := w.mem.Get(want + "f")
		switch {
		case !there && !errors.Is(err, unix.ENOENT), there && err != nil:
			t.Errorf("%sf: %v; want %s", dir, err, want)
		case there && u.sum(w.data(dir+"f")) != sumOf([]byte(want)):
			t.Errorf("%sf is not that of %s", dir, want)
		}
	}
}

var _ dataset.Sources = (*testWorker)(nil)
