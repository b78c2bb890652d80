package fusefs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

func TestAttributesAreTheVolumes(t *testing.T) {
	w := newWorld(t, options{volume: brokerwire.Volume{UID: 12, GID: 34, FileMode: 0o440, DirMode: 0o550}})
	u := newUser(t, 0)
	obj := w.put("d/f", bytesOf(1, 12345))
	f, d := u.stat(w.data("d/f")), u.stat(w.data("d"))
	if f.Mode != unix.S_IFREG|0o440 || f.Uid != 12 || f.Gid != 34 || f.Size != 12345 || f.Blocks != 25 || f.Mtim.Nano() != obj.ModTime.UnixNano() || f.Nlink != 1 {
		t.Errorf("file: %+v", f)
	}
	if d.Mode != unix.S_IFDIR|0o550 || d.Uid != 12 || d.Gid != 34 {
		t.Errorf("folder: %+v", d)
	}
	for _, uid := range []int{12, 99} {
		if a := newUser(t, uid).do(call{Op: "sum", Path: w.data("d/f")}); (a.Errno == 0) != (uid == 12) || uid != 12 && a.Errno != syscall.EACCES {
			t.Errorf("uid %d: %v", uid, a.Errno)
		}
	}
	root := u.must(call{Op: "readdir", Path: w.path}).Names
	if !slices.Equal(root, []string{"data", "domain"}) {
		t.Errorf("the root shows %q", root)
	}
	s := u.stat(w.path + "/domain/" + uuid)
	if s.Mode&unix.S_IFMT != unix.S_IFSOCK {
		t.Errorf("the socket is %+v", s)
	}
}

func TestXAttrsTellVersionCachedAndSource(t *testing.T) {
	w := newWorld(t, options{})
	u := newUser(t, 65534)
	obj := w.put("d/f", bytesOf(1, 3<<20))
	get := func(name string, size int) answer {
		return u.do(call{Op: "getxattr", Path: w.data("d/f"), To: name, Len: size})
	}
	fd := u.open(w.data("d/f"))
	u.pread(fd, 0, 10)
	id := obj.ID()
	eventually(t, "a chunk is cached", func() bool { return w.store.Peek(id).PresentBytes > 0 })
	for name, want := range map[string]string{
		"user.larder.version": obj.Version,
		"user.larder.source":  "memory://test/set/d/f",
		"user.larder.cached":  fmt.Sprint(w.store.Peek(id).PresentBytes),
	} {
		if a := get(name, 1000); a.Errno != 0 || string(a.Data) != want {
			t.Errorf("%s is %q, %v; want %q", name, a.Data, a.Errno, want)
		}
		if a := get(name, 0); a.Errno != 0 || a.N != int64(len(want)) {
			t.Errorf("the size of %s is %d, %v", name, a.N, a.Errno)
		}
		if a := get(name, 1); len(want) > 1 && a.Errno != syscall.ERANGE {
			t.Errorf("%s into one byte: %v", name, a.Errno)
		}
	}
	if a := get("user.larder.none", 10); a.Errno != syscall.ENODATA {
		t.Errorf("another attribute: %v", a.Errno)
	}
	for _, name := range []string{"security.selinux", "system.posix_acl_access"} { // ls -l stops asking then
		if a := get(name, 10); a.Errno != syscall.EOPNOTSUPP {
			t.Errorf("%s: %v", name, a.Errno)
		}
	}
	list := u.must(call{Op: "listxattr", Path: w.data("d/f"), Len: 1000}).Data
	if got := strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00"); !slices.Equal(slices.Sorted(slices.Values(got)),
		[]string{"user.larder.cached", "user.larder.source", "user.larder.version"}) {
		t.Errorf("attributes %q", got)
	}
	if a := u.must(call{Op: "listxattr", Path: w.data("d"), Len: 1000}); a.N != 0 {
		t.Errorf("a folder has attributes %q", a.Data)
	}
}

func TestStatfsIsTheCaches(t *testing.T) {
	w := newWorld(t, options{capacity: 64 << 20})
	u := newUser(t, 65534)
	w.put("f", bytesOf(1, 8<<20))
	free := func() int64 {
		s := u.must(call{Op: "statfs", Path: w.data(".")}).FS
		if got := int64(s.Blocks) * s.Bsize; got != 64<<20 || s.Bavail != 0 || s.Namelen != 255 {
			t.Errorf("%d bytes, %d available, names of %d", got, s.Bavail, s.Namelen)
		}
		return int64(s.Bfree) * s.Bsize
	}
	before := free()
	w.complete(u, "f")
	if now := free(); before-now != 8<<20 {
		t.Errorf("8 MiB were cached, %d less are free", before-now)
	}
}

func TestErrorsOfTheStoreAreErrnos(t *testing.T) {
	var mu sync.Mutex // guards the two below
	var fail error
	w := newWorld(t, options{volume: brokerwire.Volume{Freshness: -1}})
	u := newUser(t, 65534)
	w.put("f", bytesOf(1, 2<<20))
	w.put("g", bytesOf(2, 2<<20))
	fd := u.open(w.data("f"))
	var kinds []source.Kind
	w.mem.SetBefore(func(_ context.Context, r memsource.Request) error {
		mu.Lock()
		defer mu.Unlock()
		if slices.Contains(kinds, r.Kind) {
			return fail
		}
		return nil
	})
	for _, c := range []struct {
		err  error
		want syscall.Errno
	}{
		{object.ErrDenied, syscall.EACCES},
		{object.ErrUnavailable, syscall.EIO},
		{errors.New("a bug"), syscall.EIO},
	} {
		mu.Lock()
		fail, kinds = fmt.Errorf("store: %w", c.err), []source.Kind{source.Head, source.List, source.Get}
		mu.Unlock()
		if a := u.do(call{Op: "open", Path: w.data("f")}); a.Errno != c.want {
			t.Errorf("open, %v: %v; want %v", c.err, a.Errno, c.want)
		}
		if a := u.do(call{Op: "readdir", Path: w.data(".")}); a.Errno != c.want {
			t.Errorf("readdir, %v: %v; want %v", c.err, a.Errno, c.want)
		}
		if a := u.do(call{Op: "pread", FD: fd, Len: 10}); a.Errno != c.want {
			t.Errorf("read, %v: %v; want %v", c.err, a.Errno, c.want)
		}
		mu.Lock()
		kinds = nil
		mu.Unlock()
	}
	u.must(call{Op: "pread", FD: fd, Len: 10})
	if a := u.do(call{Op: "open", Path: w.data("none")}); a.Errno != syscall.ENOENT {
		t.Errorf("a missing file: %v", a.Errno)
	}
	if a := u.do(call{Op: "open", Path: w.data("f/none")}); a.Errno != syscall.ENOTDIR {
		t.Errorf("below a file: %v", a.Errno)
	}
	if a := u.do(call{Op: "open", Path: w.path + "/none"}); a.Errno != syscall.ENOENT {
		t.Errorf("in the root: %v", a.Errno)
	}
	w.mem.Delete("set/f")
	if a := u.do(call{Op: "open", Path: w.data("f")}); a.Errno != syscall.ENOENT {
		t.Errorf("a deleted file: %v", a.Errno)
	}
	if a := u.do(call{Op: "pread", FD: fd, Off: 1 << 20, Len: 10}); a.Errno != syscall.ESTALE {
		t.Errorf("a deleted file that is open: %v", a.Errno)
	}
}

func TestNamesMayHave255Bytes(t *testing.T) {
	w := newWorld(t, options{})
	u := newUser(t, 0)
	name := strings.Repeat("ä", 127) + "x"
	w.put(name, []byte("x"))
	u.sum(w.data(name))
	for _, long := range []string{name + "y", strings.Repeat("x", 300)} {
		for _, dir := range []string{w.path + "/data/", w.path + "/", w.path + "/domain/"} {
			if a := u.do(call{Op: "stat", Path: dir + long}); a.Errno != syscall.ENAMETOOLONG {
				t.Errorf("%d bytes: %v; want ENAMETOOLONG", len(long), a.Errno)
			}
		}
	}
}

// With a grant of nobody's, a principal that the store refuses gets no cached bytes.
func TestCachedBytesAreNotForWhoMayNotReadThem(t *testing.T) {
	w := newWorld(t, options{})
	u := newUser(t, 0)
	w.put("f", bytesOf(1, 2<<20))
	w.complete(u, "f")
	w.mem.SetBefore(func(_ context.Context, r memsource.Request) error {
		if r.Kind != source.List {
			return object.ErrDenied
		}
		return nil
	})
	w.mu.Lock()
	w.src = w.mem.Source("somebody else")
	w.mu.Unlock()
	other := w.path + "-other"
	if err := w.client.Mount(t.Context(), brokerwire.Volume{ID: "w", Source: "file:///set", Freshness: time.Hour, Complete: brokerwire.CompleteNever,
		FileMode: 0o444, DirMode: 0o555}, other); err != nil {
		t.Fatal(err)
	}
	if a := u.do(call{Op: "sum", Path: other + "/data/f"}); a.Errno != syscall.EACCES {
		t.Errorf("the other volume: %v; want EACCES", a.Errno)
	}
	u.sum(w.data("f")) // whose grant is a day old at most
	if err := w.client.Unmount(t.Context(), other); err != nil {
		t.Error(err)
	}
}

func TestTheKernelIsToldForHowLongANameDoesNotExist(t *testing.T) {
	w := newWorld(t, options{})
	u := newUser(t, 0)
	w.put("f", []byte("x"))
	if a := u.do(call{Op: "stat", Path: w.data("none")}); a.Errno != syscall.ENOENT {
		t.Fatalf("stat: %v", a.Errno)
	}
	var out fuse.EntryOut
	st := w.served().Lookup(nil, &fuse.InHeader{NodeId: dataID}, "none", &out)
	if valid := out.EntryTimeout(); st != fuse.OK || out.NodeId != 0 || valid <= 0 || valid > time.Hour {
		t.Errorf("status %v, node %d, valid for %v", st, out.NodeId, valid)
	}
}

func TestAFileMayBecomeAFolder(t *testing.T) {
	w := newWorld(t, options{volume: brokerwire.Volume{Freshness: -1}})
	u := newUser(t, 0)
	w.put("x", []byte("file"))
	u.sum(w.data("x"))
	w.mem.Delete("set/x")
	w.put("x/y", []byte("below"))
	if got := u.sum(w.data("x/y")); got != sumOf([]byte("below")) {
		t.Error("wrong bytes below the new folder")
	}
	w.mem.Delete("set/x/y")
	w.put("x", []byte("file again"))
	if got := u.sum(w.data("x")); got != sumOf([]byte("file again")) {
		t.Error("wrong bytes of the new file")
	}
}
