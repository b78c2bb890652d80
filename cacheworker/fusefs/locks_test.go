package fusefs

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/driver/broker"
	"github.com/larderfs/larder/sanity/leak"
)

// bench is a volume with a file in every state, published read-only at target.
type bench struct {
	*world
	target string
	want   map[string][]byte
	cached map[string][]byte // cache files by path, as they are
	users  map[string]*user
}

func newBench(t *testing.T, o options) *bench {
	t.Helper()
	b := &bench{world: newWorld(t, o), want: map[string][]byte{}, cached: map[string][]byte{}, users: map[string]*user{}}
	for i, name := range []string{"cold", "part", "complete", "folder/inner"} {
		b.want[name] = bytesOf(uint64(i), 2<<20+1)
		b.put(name, b.want[name])
	}
	b.users["root"], b.users["uid 65534"] = newUser(t, 0), newUser(t, 65534)
	root := b.users["root"]
	fd := root.open(b.data("part"))
	root.pread(fd, 0, 10)
	root.close(fd)
	b.complete(root, "complete")
	root.sum(b.data("complete")) // registers it
	if n := b.node("complete"); b.backing(n) == 0 {
		t.Fatal("the file is not passed through")
	}
	b.target = filepath.Join(b.dir, "target")
	if err := os.Mkdir(b.target, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := b.client.Bind(t.Context(), "v", "data", b.target, true); err != nil {
		t.Fatal(err)
	}
	b.cached = b.cacheFiles()
	return b
}

func (b *bench) cacheFiles() map[string][]byte {
	b.t.Helper()
	files := map[string][]byte{}
	err := filepath.WalkDir(filepath.Join(b.tier(), "objects"), func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		files[p], err = os.ReadFile(p)
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	if len(files) == 0 {
		b.t.Fatal("no cache files found")
	}
	return files
}

// unchanged checks cache files, source, and what the volume shows.
func (b *bench) unchanged(after string) {
	b.t.Helper()
	now := b.cacheFiles()
	for p, was := range b.cached {
		if !bytes.Equal(now[p], was) {
			b.t.Errorf("%s: cache file %s has changed", after, p)
		}
	}
	es, err := os.ReadDir(b.target)
	if err != nil || len(es) != 4 {
		b.t.Errorf("%s: the volume shows %v, %v", after, es, err)
	}
	for name, want := range b.want {
		obj, err := b.mem.Source("p").Head(b.t.Context(), "set/"+name)
		if err != nil {
			b.t.Fatal(err)
		}
		r, err := b.mem.Source("p").Get(b.t.Context(), obj, 0, obj.Size)
		if err != nil {
			b.t.Fatal(err)
		}
		got := make([]byte, len(want)+1)
		n, _ := readAll(r, got)
		if !bytes.Equal(got[:n], want) {
			b.t.Errorf("%s: %s has changed in the store", after, name)
		}
	}
}

func readAll(r interface{ Read([]byte) (int, error) }, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

var files = []string{"cold", "part", "complete", "folder/inner"}

// tryAll has everybody try everything at a place, and checks that each ends with one of the
// errnos and changes nothing.
func (b *bench) tryAll(place string, allowed ...syscall.Errno) {
	b.t.Helper()
	b.cached = b.cacheFiles()
	for who, u := range b.users {
		for _, m := range mutations {
			for _, name := range files {
				a := u.do(call{Op: m.name, Path: filepath.Join(place, name)})
				ok := false
				for _, e := range allowed {
					ok = ok || a.Errno == e
				}
				if !ok {
					b.t.Errorf("%s, %s of %s: %d (%v); want one of %v", who, m.name, name, a.Errno, a.Errno, allowed)
				}
			}
		}
	}
	b.unchanged("afterwards")
	for name, want := range b.want {
		for who, u := range b.users {
			if a := u.do(call{Op: "sum", Path: filepath.Join(place, name)}); a.Errno != 0 || a.Sum != sumOf(want) {
				b.t.Errorf("%s: %s reads otherwise: %v", who, name, a.Errno)
			}
		}
	}
}

// With all locks on, whoever writes whatever in whatever way is told EROFS.
func TestWritingIsEROFS(t *testing.T) {
	for name, mode := range map[string]uint32{"0444": 0o444, "0666": 0o666} {
		t.Run("mode "+name, func(t *testing.T) {
			b := newBench(t, options{volume: brokerwire.Volume{FileMode: mode, DirMode: mode | 0o111}})
			b.tryAll(b.target, syscall.EROFS)
			b.tryAll(filepath.Join(b.path, "data"), syscall.EROFS) // the stage mount
		})
	}
}

func TestNobodyMakesAnythingInTheDomain(t *testing.T) {
	b := newBench(t, options{})
	for who, u := range b.users {
		for _, m := range mutations {
			for _, at := range []string{"domain/" + uuid, "data", "domain", "x"} {
				if m.name == "rmdir" || m.name == "open to truncate" && at == "domain/"+uuid {
					continue
				}
				if a := u.do(call{Op: m.name, Path: filepath.Join(b.path, at)}); a.Errno == 0 {
					t.Errorf("%s, %s of %s went well", who, m.name, at)
				}
			}
		}
	}
	if got := b.users["root"].must(call{Op: "readdir", Path: b.path}).Names; len(got) != 2 {
		t.Errorf("the root shows %q", got)
	}
	if got := b.users["root"].must(call{Op: "readdir", Path: filepath.Join(b.path, "domain")}).Names; len(got) != 1 || got[0] != uuid {
		t.Errorf("domain/ shows %q", got)
	}
}

// writable takes the broker's locks on the mounts off: the file system's, which is what a
// volume with writes would have, and the published bind's.
func (b *bench) writable(bind bool) {
	b.t.Helper()
	fd, err := unix.Fspick(unix.AT_FDCWD, b.path, unix.FSPICK_CLOEXEC)
	if err != nil {
		b.t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.FsconfigSetFlag(fd, "rw"); err != nil {
		b.t.Fatal(err)
	}
	if err := unix.FsconfigReconfigure(fd); err != nil {
		b.t.Fatal(err)
	}
	if !bind {
		return
	}
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, b.target, 0, &attr); err != nil {
		b.t.Fatal(err)
	}
}

// Each lock of DESIGN §5.6 taken off in turn; mode 0666, so that permissions are none.

var all = brokerwire.Volume{FileMode: 0o666, DirMode: 0o777}

func TestTheReadOnlyBindAloneHolds(t *testing.T) {
	b := newBench(t, options{volume: all, lockOff: true, broker: loose})
	b.writable(false)
	b.tryAll(b.target, syscall.EROFS)
}

func TestTheWorkersLockAloneHolds(t *testing.T) {
	b := newBench(t, options{volume: all, broker: loose})
	b.writable(true)
	b.tryAll(b.target, syscall.EROFS, syscall.EPERM) // only its owner may change a mode
}

// The worker lets everything through and the mounts are writable: what the kernel reopens
// lies on a read-only mount. What then fails is the open, with EIO.
func TestTheReadOnlyMountOfBackingFilesAloneHolds(t *testing.T) {
	b := newBench(t, options{volume: all, lockOff: true})
	b.writable(true)
	b.tryAll(b.target, syscall.EROFS, syscall.EIO, syscall.EPERM)
}

// Without any lock a write through passthrough does change the cache file: the tests above
// test something.
func TestWithoutLocksACacheFileIsOverwritten(t *testing.T) {
	b := newBench(t, options{volume: all, lockOff: true, broker: loose})
	b.writable(true)
	if a := b.users["uid 65534"].do(call{Op: "open to write", Path: filepath.Join(b.target, "complete")}); a.Errno != 0 {
		t.Fatalf("the write failed: %v", a.Errno)
	}
	changed := false
	for p, now := range b.cacheFiles() {
		changed = changed || !bytes.Equal(now, b.cached[p])
	}
	if !changed {
		t.Error("no cache file was overwritten")
	}
}

// loose is a broker that checks no descriptor, for a worker that sends writable ones.
func loose(b Broker) Broker { return looseBroker{b.(*testWorker)} }

type looseBroker struct{ *testWorker }

func (l looseBroker) Register(_ context.Context, volume string, _ uint64, f *os.File) (int32, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	rw, err := l.writable(st.Ino)
	if err != nil {
		return 0, err
	}
	defer rw.Close()
	arg := struct {
		fd, flags int32
		padding   uint64
	}{fd: int32(rw.Fd())}
	return l.ioctl(volume, 0x4010e501, unsafe.Pointer(&arg))
}

func (l looseBroker) Unregister(_ context.Context, volume string, id int32) error {
	_, err := l.ioctl(volume, 0x4004e502, unsafe.Pointer(&id))
	return err
}

func (l looseBroker) ioctl(volume string, op uintptr, arg unsafe.Pointer) (int32, error) {
	device, _, _ := l.mount(volume).Hold()
	id, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), op, uintptr(arg))
	if errno != 0 {
		return 0, errno
	}
	return int32(id), nil
}

// writable opens the cache file with that inode number through the writable mount.
func (l looseBroker) writable(ino uint64) (f *os.File, err error) {
	for _, m := range leak.Mounts(os.TempDir()) {
		if m.Type == broker.FSType || filepath.Base(m.Point) != "view" {
			continue
		}
		err = filepath.WalkDir(filepath.Join(filepath.Dir(m.Point), "tier", "objects"), func(p string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(p, &st); err != nil || st.Ino != ino {
				return err
			}
			f, err = os.OpenFile(p, os.O_RDWR, 0)
			return err
		})
	}
	if f == nil && err == nil {
		err = os.ErrNotExist
	}
	return f, err
}
