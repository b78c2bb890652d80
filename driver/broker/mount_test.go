package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker"
	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/mounttable"
)

// odd are names that the mount table escapes.
var odd = []string{"plain", "with space", "tab\tnewline\n", `back\slash\040`, "ünï#"}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// tmpfs mounts one with a file data/f.
func tmpfs(t *testing.T, path string) (dev uint64) {
	t.Helper()
	mkdir(t, path)
	if err := unix.Mount("none", path, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(mkdir(t, filepath.Join(path, "data")), "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	dev, err := mounttable.Dev(path)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

func others(dev uint64, but string) ([]string, error) {
	table, err := mounttable.Read()
	return table.Others(dev, but), err
}

func detachLater(t *testing.T, path string) {
	t.Cleanup(func() {
		for unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
		}
	})
}

func TestABindIsReadOnlyAndIdempotent(t *testing.T) {
	for _, name := range odd {
		dir := mkdir(t, filepath.Join(t.TempDir(), name))
		from, target := filepath.Join(dir, "from"), mkdir(t, filepath.Join(dir, "target"))
		dev := tmpfs(t, from)
		detachLater(t, target)
		for range 2 {
			if err := bindTree(from, "data", target, true, dev); err != nil {
				t.Fatalf("%q: %v", name, err)
			}
		}
		if paths, err := others(dev, from); err != nil || len(paths) != 1 || paths[0] != target {
			t.Errorf("%q: bound at %q, %v", name, paths, err)
		}
		if _, err := os.Stat(filepath.Join(target, "f")); err != nil {
			t.Errorf("%q: data/ is not what is shown: %v", name, err)
		}
		if err := os.WriteFile(filepath.Join(target, "f"), nil, 0); !errors.Is(err, unix.EROFS) {
			t.Errorf("%q: a write: %v", name, err)
		}
		if err := os.WriteFile(filepath.Join(from, "data", "f"), nil, 0); err != nil {
			t.Errorf("%q: the bind made the file system read-only: %v", name, err)
		}
		for what, err := range map[string]error{
			"all of it":       bindTree(from, "", target, true, dev),
			"writable":        bindTree(from, "data", target, false, dev),
			"something else":  bindTree(from, "data", target, true, dev+1),
			"a missing thing": bindTree(from, "none", mkdir(t, filepath.Join(dir, "other")), true, dev),
		} {
			if what != "a missing thing" && !errors.Is(err, brokerwire.ErrExists) || err == nil {
				t.Errorf("%q, %s: %v", name, what, err)
			}
		}
		for range 2 {
			if err := unmountAll(target); err != nil {
				t.Errorf("%q: unmount: %v", name, err)
			}
		}
	}
}

func TestUnmountRemovesWhatIsStackedAndIsBusyWhereItIsUsed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b")
	for range 3 {
		tmpfs(t, path)
	}
	f, err := os.Open(filepath.Join(path, "data", "f"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unmountAll(path); !errors.Is(err, object.ErrBusy) {
		t.Errorf("in use: %v", err)
	}
	f.Close()
	if err := unmountAll(path); err != nil {
		t.Error(err)
	}
	if e, ok, err := mounttable.At(path); ok || err != nil {
		t.Errorf("left: %+v, %v", e, err)
	}
	if err := unmountAll(filepath.Join(path, "none")); err != nil {
		t.Errorf("nothing there: %v", err)
	}
}

// bareFUSE mounts a FUSE file system that nobody serves; its connection ends with the
// descriptor.
func bareFUSE(t *testing.T, name, path string) *os.File {
	t.Helper()
	if _, ok, _ := mounttable.At(path); !ok { // what is dead cannot be looked at
		mkdir(t, path)
	}
	f := openFile(t, "/dev/fuse", unix.O_RDWR)
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", f.Fd())
	if err := unix.Mount(name, path, FSType, unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
		t.Fatal(err)
	}
	detachLater(t, path)
	return f
}

func TestOnlyDeadMountsOfOursAreCleared(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := clearDead(at("nothing"), "us"); err != nil {
		t.Errorf("nothing there: %v", err)
	}
	tmpfs(t, at("tmpfs"))
	if err := clearDead(at("tmpfs"), "us"); !errors.Is(err, brokerwire.ErrExists) {
		t.Errorf("another file system: %v", err)
	}
	bareFUSE(t, "others", at("others")).Close()
	if err := clearDead(at("others"), "us"); !errors.Is(err, brokerwire.ErrExists) {
		t.Errorf("another broker's: %v", err)
	}
	bareFUSE(t, "us", at("dead mount")).Close()
	bareFUSE(t, "us", at("dead mount")).Close()
	if err := clearDead(at("dead mount"), "us"); err != nil {
		t.Errorf("dead ones: %v", err)
	}
	if _, ok, _ := mounttable.At(at("dead mount")); ok {
		t.Error("a dead mount is still there")
	}
	held := bareFUSE(t, "us", at("held"))
	if err := clearDead(at("held"), "us"); !errors.Is(err, object.ErrBusy) {
		t.Errorf("one that somebody holds: %v", err)
	}
	if _, ok, _ := mounttable.At(at("held")); !ok {
		t.Error("a mount that somebody holds was removed")
	}
	held.Close()
}

func TestRemoveDeadTakesAwayWhatHasTheName(t *testing.T) {
	dir, name := t.TempDir(), "larder-test dead"
	for _, p := range []string{"a", "b c", "b c"} {
		bareFUSE(t, name, filepath.Join(dir, p)).Close()
	}
	bareFUSE(t, name+"2", filepath.Join(dir, "other")).Close()
	tmpfs(t, filepath.Join(dir, "tmpfs"))
	for range 2 {
		if err := RemoveDead(name); err != nil {
			t.Fatal(err)
		}
	}
	es, err := mounttable.Read()
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, e := range es {
		if e.Source == name {
			t.Errorf("left: %+v", e)
		}
		if strings.HasPrefix(e.Path, dir) {
			left++
		}
	}
	if left != 2 {
		t.Errorf("%d others are left, want both", left)
	}
}

func TestAFileSystemIsMadeReadOnlyForAllItsMounts(t *testing.T) {
	dir := t.TempDir()
	from, target := filepath.Join(dir, "from"), mkdir(t, filepath.Join(dir, "target"))
	dev := tmpfs(t, from)
	detachLater(t, target)
	if err := bindTree(from, "", target, false, dev); err != nil {
		t.Fatal(err)
	}
	for _, on := range []bool{true, true, false, false, true} {
		if err := setReadOnly(from, on); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{from, target} {
			if err := os.WriteFile(filepath.Join(p, "data", "f"), nil, 0o644); on != errors.Is(err, unix.EROFS) || !on && err != nil {
				t.Errorf("read-only %v: a write at %s: %v", on, p, err)
			}
		}
	}
}

// node is a broker with a real worker over real files.
type node struct {
	t        *testing.T
	dir      string
	log      *slog.Logger
	client   *brokerwire.Client
	stopping func() // of the broker
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, dir: t.TempDir(), log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	mkdir(t, n.path("tier"))
	if err := os.WriteFile(filepath.Join(mkdir(t, n.path("files")), "f"), []byte("bytes"), 0o644); err != nil {
		t.Fatal(err)
	}
	n.client = brokerwire.NewClient(n.path("broker.sock"))
	t.Cleanup(func() {
		if err := errors.Join(n.client.Close(), RemoveDead(n.name()), RemoveView(n.path("view"))); err != nil {
			t.Error(err)
		}
	})
	n.startBroker()
	n.startWorker()
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }
func (n *node) name() string            { return "larder-test " + n.dir }

// startBroker starts one that leaves its mounts to the worker when it is stopped.
func (n *node) startBroker() {
	n.t.Helper()
	b, err := New(Config{Name: n.name(), Socket: n.path("broker.sock"), TierDirs: []string{n.path("tier")}, ViewDirs: []string{n.path("view")}, Log: n.log})
	if err != nil {
		n.t.Fatal(err)
	}
	n.stopping = runner(n.t, b.Run)
	eventually(n.t, func() bool { _, err := n.client.Mounts(n.t.Context()); return err == nil })
}

func (n *node) startWorker() {
	n.t.Helper()
	w, err := cacheworker.New(cacheworker.Config{Node: "n", Tiers: []cacheworker.Tier{{Dir: n.path("tier"), ViewDir: n.path("view")}}, BrokerSocket: n.path("broker.sock"),
		ControlSocket: n.path("worker.sock"), FileRoot: n.path("files"), Log: n.log})
	if err != nil {
		n.t.Fatal(err)
	}
	runner(n.t, w.Run)
}

// runner runs something until the test ends or the function is called.
func runner(t *testing.T, run func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := run(ctx); err != nil {
			t.Error(err)
		}
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

func (n *node) volume(id string) brokerwire.Volume {
	return brokerwire.Volume{ID: id, Source: "file://" + n.path("files"), Freshness: time.Hour, Complete: brokerwire.CompleteNever, FileMode: 0o444, DirMode: 0o555}
}

// reads reads a file of a mount, in another process.
func (n *node) reads(path string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "cat", path).Output()
	if err != nil || string(out) != "bytes" {
		n.t.Errorf("%s: %q, %v", path, out, err)
	}
}

func (n *node) mounts() []brokerwire.Mount {
	n.t.Helper()
	ms, err := n.client.Mounts(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	return ms
}

func TestAVolumeIsMountedPublishedAndUnmounted(t *testing.T) {
	n := newNode(t)
	ctx, c := t.Context(), n.client
	stage, target := n.path("stage dir/mnt"), mkdir(t, n.path("target dir"))
	v := n.volume("v")
	v.Credentials = brokerwire.Credentials{AccessKeyID: "a", SecretAccessKey: "canary"}
	for range 2 {
		if err := c.Mount(ctx, v, stage); err != nil {
			t.Fatal(err)
		}
	}
	n.reads(stage + "/data/f")
	if err := c.Mount(ctx, v, n.path("elsewhere")); !errors.Is(err, brokerwire.ErrExists) {
		t.Errorf("at another path: %v", err)
	}
	if ms := n.mounts(); len(ms) != 1 || ms[0].Path != stage || !ms[0].Served || ms[0].Socket == "" || !ms[0].Volume.Credentials.IsZero() {
		t.Errorf("mounts: %+v", ms)
	}
	for range 2 {
		if err := c.Bind(ctx, "v", "data", target, true); err != nil {
			t.Fatal(err)
		}
	}
	n.reads(target + "/f")
	if err := c.Unmount(ctx, stage); !errors.Is(err, object.ErrBusy) || !strings.Contains(err.Error(), target) {
		t.Errorf("unmount while it is published: %v", err)
	}
	v.Credentials.SessionToken = "new"
	if err := c.Refresh(ctx, v); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := errors.Join(c.Unmount(ctx, target), c.Unmount(ctx, stage)); err != nil {
			t.Error(err)
		}
	}
	if ms := n.mounts(); len(ms) != 0 {
		t.Errorf("mounts: %+v", ms)
	}
	for what, err := range map[string]error{
		"refresh": c.Refresh(ctx, v), "bind": c.Bind(ctx, "v", "", target, true),
	} {
		if !errors.Is(err, object.ErrNotFound) {
			t.Errorf("%s of what is not mounted: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"no path": c.Mount(ctx, v, ""), "no id": c.Mount(ctx, brokerwire.Volume{}, stage), "no target": c.Unmount(ctx, ""),
		"relative": c.Mount(ctx, v, "x"), "dots": c.Unmount(ctx, "/x/.."),
	} {
		if !errors.Is(err, object.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestAFailedMountLeavesNothing(t *testing.T) {
	n := newNode(t)
	v := n.volume("v")
	v.Source = "file://" + n.path("none")
	if err := n.client.Mount(t.Context(), v, n.path("stage")); !errors.Is(err, object.ErrInvalid) { // not below the file root
		t.Errorf("got %v", err)
	}
	if _, ok, _ := mounttable.At(n.path("stage")); ok || len(n.mounts()) != 0 {
		t.Error("something is mounted")
	}
	tmpfs(t, n.path("taken"))
	if err := n.client.Mount(t.Context(), n.volume("v"), n.path("taken")); !errors.Is(err, brokerwire.ErrExists) {
		t.Errorf("over another file system: %v", err)
	}
}

// Both holders died: the next stage finds a mount point that cannot even be looked at.
func TestADeadMountIsMountedAgain(t *testing.T) {
	n := newNode(t)
	bareFUSE(t, n.name(), n.path("stage")).Close()
	if err := n.client.Mount(t.Context(), n.volume("v"), n.path("stage")); err != nil {
		t.Fatal(err)
	}
	n.reads(n.path("stage/data/f"))
	if err := n.client.Unmount(t.Context(), n.path("stage")); err != nil {
		t.Error(err)
	}
}

func TestAMountOutlivesItsBroker(t *testing.T) {
	n := newNode(t)
	ctx, stage := t.Context(), n.path("stage")
	if err := n.client.Mount(ctx, n.volume("v"), stage); err != nil {
		t.Fatal(err)
	}
	was := n.mounts()[0]
	for range 3 {
		n.stopping()
		n.reads(stage + "/data/f")
		n.startBroker()
		eventually(t, func() bool { return len(n.mounts()) == 1 })
		if m := n.mounts()[0]; m.Path != stage || !m.Served || m.Takeovers != 0 || m.Socket != was.Socket || !m.Since.Equal(was.Since) {
			t.Errorf("given back: %+v, was %+v", m, was)
		}
	}
	if err := os.WriteFile(stage+"/data/f", nil, 0); !errors.Is(err, syscall.EROFS) {
		t.Errorf("a write: %v", err)
	}
	if err := n.client.Unmount(ctx, stage); err != nil {
		t.Error(err)
	}
}

func TestOnlyAMountOfOursIsTakenBack(t *testing.T) {
	s := start(t)
	dir := t.TempDir()
	ours := bareFUSE(t, s.cfg.Name, filepath.Join(dir, "ours"))
	dev, err := mounttable.Dev(filepath.Join(dir, "ours"))
	if err != nil {
		t.Fatal(err)
	}
	others := bareFUSE(t, "others", filepath.Join(dir, "others"))
	otherDev, err := mounttable.Dev(filepath.Join(dir, "others"))
	if err != nil {
		t.Fatal(err)
	}
	rootDev, err := mounttable.Dev("/")
	if err != nil {
		t.Fatal(err)
	}
	good := brokerwire.State{Volume: brokerwire.Volume{ID: "w"}, Path: filepath.Join(dir, "ours"), Dev: dev, InitOut: make([]byte, 80)}
	state := func(change func(*brokerwire.State)) *os.File {
		st := good
		change(&st)
		f, err := brokerwire.NewState(st)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	same := func(*brokerwire.State) {}
	ids, err := brokerwire.NewBackings(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ids.Close()
	null := openFile(t, "/dev/null", unix.O_RDWR)
	for name, c := range map[string]struct {
		files []*os.File
		want  error
	}{
		"no descriptors":          {nil, object.ErrInvalid},
		"too few":                 {[]*os.File{ours, state(same)}, object.ErrInvalid},
		"too many":                {[]*os.File{ours, state(same), ids, null, null}, object.ErrInvalid},
		"not /dev/fuse":           {[]*os.File{null, state(same), ids}, object.ErrDenied},
		"a file":                  {[]*os.File{ids, state(same), ids}, object.ErrDenied},
		"no state":                {[]*os.File{ours, null, ids}, object.ErrInvalid},
		"an unsealed state":       {[]*os.File{ours, unsealed(t, state(same)), ids}, object.ErrInvalid},
		"another volume's":        {[]*os.File{ours, state(func(s *brokerwire.State) { s.Volume.ID = "x" }), ids}, object.ErrInvalid},
		"nothing at the path":     {[]*os.File{ours, state(func(s *brokerwire.State) { s.Path = dir }), ids}, object.ErrNotFound},
		"another device":          {[]*os.File{ours, state(func(s *brokerwire.State) { s.Dev++ }), ids}, object.ErrNotFound},
		"the root file system":    {[]*os.File{ours, state(func(s *brokerwire.State) { s.Path, s.Dev = "/", rootDev }), ids}, object.ErrNotFound},
		"another broker's":        {[]*os.File{others, state(func(s *brokerwire.State) { s.Path, s.Dev = filepath.Join(dir, "others"), otherDev }), ids}, object.ErrNotFound},
		"backing ids that aren't": {[]*os.File{ours, state(same), torn(t)}, object.ErrInvalid},
	} {
		_, err := s.handle(t.Context(), s.worker, brokerwire.Message{Verb: brokerwire.Give, Mount: "w"}, c.files)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v; want %v", name, err, c.want)
		}
		if _, err := s.held.Lookup("w"); err == nil {
			t.Fatalf("%s: it was taken", name)
		}
		for i, f := range c.files {
			if f == nil {
				t.Errorf("%s: descriptor %d was kept", name, i)
			}
		}
	}
}

// unsealed is a copy in a memfd without seals.
func unsealed(t *testing.T, f *os.File) *os.File {
	t.Helper()
	b := make([]byte, brokerwire.StateLog)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	n := os.NewFile(uintptr(fd), "unsealed")
	t.Cleanup(func() { n.Close() })
	if _, err := n.Write(b); err != nil {
		t.Fatal(err)
	}
	return n
}

func torn(t *testing.T) *os.File {
	t.Helper()
	f, err := brokerwire.NewBackings([]int32{1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteAt(bytes.Repeat([]byte{0}, 3), 4); err != nil {
		t.Fatal(err)
	}
	return f
}
