package broker

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/takeover"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv("BROKER_TEST_SOCKET"); socket != "" {
		os.Exit(sayHello(socket, brokerwire.Role(os.Getenv("BROKER_TEST_ROLE"))))
	}
	os.Exit(leak.Run(m))
}

const workerUID = 54321

// started is a running broker over a tier with a file of the worker's in it.
type started struct {
	*Broker
	tier, view, file string
	worker           *brokerwire.Session
	mount            *takeover.Mount
}

func start(t *testing.T, more ...string) *started {
	t.Helper()
	dir := t.TempDir()
	s := &started{tier: filepath.Join(dir, "tier"), view: filepath.Join(dir, "view"), file: "file"}
	if err := os.Mkdir(s.tier, 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(s.tier, s.file), workerUID)
	var views []string
	for _, d := range more {
		views = append(views, d+"-view")
	}
	views = append(views, s.view)
	b, err := New(Config{Name: "larder-test-" + strconv.Itoa(os.Getpid()), Socket: filepath.Join(dir, "broker.sock"), WorkerUID: workerUID,
		TierDirs: append(more, s.tier), ViewDirs: views, UnmountAtExit: true, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	s.Broker = b
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		for _, v := range views {
			if err := RemoveView(v); err != nil {
				t.Error(err)
			}
		}
	})
	client := brokerwire.NewClient(b.cfg.Socket)
	defer client.Close()
	eventually(t, func() bool { _, err := client.Mounts(t.Context()); return err == nil })
	s.worker = &brokerwire.Session{Role: brokerwire.RoleWorker, UID: workerUID}
	s.held.Welcome(s.worker)
	rec, err := brokerwire.NewRecord(brokerwire.State{Volume: brokerwire.Volume{ID: "v"}, Path: "/nowhere"})
	if err != nil {
		t.Fatal(err)
	}
	s.mount = takeover.NewMount(openFile(t, "/dev/fuse", unix.O_RDWR), rec)
	if err := s.held.Add(s.mount); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.forget)
	return s
}

// forget takes the worker and its mount away, which are none: nobody may unmount or call them.
func (s *started) forget() {
	s.held.Leave(s.worker)
	s.held.Release(context.Background(), s.mount)
}

func put(t *testing.T, path string, uid int) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path, []byte("bytes"), 0o644), os.Chown(path, uid, uid)); err != nil {
		t.Fatal(err)
	}
}

func openFile(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	t.Cleanup(func() { f.Close() })
	return f
}

func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited 10 s in vain")
		}
	}
}

// register asks as the worker does.
func (s *started) register(volume string, files ...*os.File) error {
	_, err := s.handle(context.Background(), s.worker,
		brokerwire.Message{Verb: brokerwire.Register, Mount: volume, Node: 42}, files)
	return err
}

func (s *started) refuses(t *testing.T, why string, files ...*os.File) {
	t.Helper()
	err := s.register("v", files...)
	if err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("register: %v; want it refused because it is %q", err, why)
	}
	if err := s.mount.Backing(func(ids map[int32]struct{}) error {
		if len(ids) != 0 {
			t.Errorf("%d files are registered", len(ids))
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// The control: the worker's own file, read-only through the view, passes every check and
// is given to the kernel, which refuses it because that descriptor has no file system.
func TestGoodDescriptorReachesTheKernel(t *testing.T) {
	s := start(t)
	err := s.register("v", openFile(t, filepath.Join(s.view, s.file), unix.O_RDONLY))
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("register: %v; want the kernel's refusal", err)
	}
}

// What lies in another tier is as good, and what lies in none is refused, also if both are on a tmpfs.
func TestEveryTiersDescriptorsReachTheKernel(t *testing.T) {
	memory, other := filepath.Join(t.TempDir(), "memory"), t.TempDir()
	for _, dir := range []string{memory, other} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("t", dir, "tmpfs", 0, "size=1m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		put(t, filepath.Join(dir, "file"), workerUID)
	}
	s := start(t, memory)
	for _, path := range []string{filepath.Join(s.view, s.file), filepath.Join(memory+"-view", "file")} {
		if err := s.register("v", openFile(t, path, unix.O_RDONLY)); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EOPNOTSUPP) {
			t.Errorf("register %s: %v; want the kernel's refusal", path, err)
		}
	}
	if err := unix.Mount("", other, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	s.refuses(t, "not on a tier's file system", openFile(t, filepath.Join(other, "file"), unix.O_RDONLY))
	s.refuses(t, "not opened through a read-only mount", openFile(t, filepath.Join(memory, "file"), unix.O_RDONLY))
}

func TestWritableDescriptorIsRefused(t *testing.T) {
	s := start(t)
	s.refuses(t, "not opened read-only", openFile(t, filepath.Join(s.tier, s.file), unix.O_RDWR))
}

func TestWriteOnlyDescriptorIsRefused(t *testing.T) {
	s := start(t)
	s.refuses(t, "not opened read-only", openFile(t, filepath.Join(s.tier, s.file), unix.O_WRONLY))
}

func TestPathDescriptorIsRefused(t *testing.T) {
	s := start(t)
	s.refuses(t, "not opened read-only", openFile(t, filepath.Join(s.view, s.file), unix.O_PATH))
}

func TestDescriptorThroughAWritableMountIsRefused(t *testing.T) {
	s := start(t)
	s.refuses(t, "not opened through a read-only mount", openFile(t, filepath.Join(s.tier, s.file), unix.O_RDONLY))
}

func TestDescriptorOfAnotherOwnerIsRefused(t *testing.T) {
	s := start(t)
	put(t, filepath.Join(s.tier, "roots"), 0)
	s.refuses(t, "owned by uid 0", openFile(t, filepath.Join(s.view, "roots"), unix.O_RDONLY))
}

func TestDescriptorOnAnotherFileSystemIsRefused(t *testing.T) {
	s := start(t)
	dir := t.TempDir()
	if err := unix.Mount("t", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	put(t, filepath.Join(dir, "file"), workerUID)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	s.refuses(t, "not on a tier's file system", openFile(t, filepath.Join(dir, "file"), unix.O_RDONLY))
}

func TestDirectoryIsRefused(t *testing.T) {
	s := start(t)
	s.refuses(t, "not a regular file", openFile(t, s.view, unix.O_RDONLY))
}

func TestPipeIsRefused(t *testing.T) {
	s := start(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	s.refuses(t, "not a regular file", r)
}

func TestDeviceIsRefused(t *testing.T) {
	s := start(t)
	s.refuses(t, "not a regular file", openFile(t, "/dev/zero", unix.O_RDONLY))
}

func TestSocketIsRefused(t *testing.T) {
	s := start(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "socket")
	t.Cleanup(func() { f.Close(); unix.Close(fds[1]) })
	s.refuses(t, "not a regular file", f)
}

func TestNumberOfDescriptorsIsChecked(t *testing.T) {
	s := start(t)
	good := openFile(t, filepath.Join(s.view, s.file), unix.O_RDONLY)
	s.refuses(t, "one descriptor is needed")
	s.refuses(t, "one descriptor is needed", good, good)
	if err := s.register("unknown", good); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("a mount that is not held: %v", err)
	}
}

func TestAReplacedWorkerIsRefused(t *testing.T) {
	s := start(t)
	old := *s.worker
	for _, v := range []brokerwire.Verb{brokerwire.Mounts, brokerwire.Give, brokerwire.Given, brokerwire.Register, brokerwire.Unregister, brokerwire.Replace} {
		if _, err := s.handle(t.Context(), &old, brokerwire.Message{Verb: v, Mount: "v"}, nil); !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("%q: %v", v, err)
		}
	}
	if _, err := s.handle(t.Context(), s.worker, brokerwire.Message{Verb: brokerwire.Mounts}, nil); err != nil {
		t.Errorf("the worker itself: %v", err)
	}
}

// Who a peer is, the kernel says: a process of another user is neither worker nor node service.
func TestStrangersAreRefused(t *testing.T) {
	s := start(t)
	s.forget()
	for _, c := range []struct {
		uid      uint32
		role     brokerwire.Role
		admitted bool
	}{
		{workerUID, brokerwire.RoleWorker, true}, {workerUID, brokerwire.RoleNode, false},
		{0, brokerwire.RoleNode, true}, {0, brokerwire.RoleWorker, false},
		{65534, brokerwire.RoleWorker, false}, {65534, brokerwire.RoleNode, false}, {0, "other", false},
	} {
		conn, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(conn, &unix.SockaddrUnix{Name: s.cfg.Socket}); err != nil {
			t.Fatal(err)
		}
		unix.Close(conn) // the socket is there for everybody
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = append(os.Environ(), "BROKER_TEST_SOCKET=/proc/self/fd/3/"+filepath.Base(s.cfg.Socket), "BROKER_TEST_ROLE="+string(c.role))
		cmd.ExtraFiles = []*os.File{openFile(t, filepath.Dir(s.cfg.Socket), unix.O_PATH|unix.O_DIRECTORY)}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.uid, Gid: c.uid}}
		out, err := cmd.CombinedOutput()
		if (err == nil) != c.admitted {
			t.Errorf("uid %d as %q: %v %s", c.uid, c.role, err, out)
		}
	}
}

// sayHello is the child of TestStrangersAreRefused.
func sayHello(socket string, role brokerwire.Role) int {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := brokerwire.Dial(ctx, socket)
	if err != nil {
		return 2
	}
	p := brokerwire.NewPeer(conn, func(context.Context, brokerwire.Message, []*os.File) (brokerwire.Message, []*os.File, error) {
		return brokerwire.Message{}, nil, object.ErrInvalid
	})
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	_, _, err = p.Call(ctx, brokerwire.Message{Verb: brokerwire.Hello, Version: brokerwire.Version, Oldest: brokerwire.Oldest, Role: role, UUID: "u"})
	p.Close()
	<-done
	if errors.Is(err, object.ErrDenied) {
		return 1
	}
	if err != nil {
		return 3
	}
	return 0
}
