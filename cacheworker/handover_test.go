package cacheworker

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/workerpb"
)

// dialAs connects as another user.
func dialAs(uid int, path string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			done <- result{err: errno}
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		}
		f := os.NewFile(uintptr(fd), "socket")
		defer f.Close()
		if err != nil {
			done <- result{err: err}
			return
		}
		c, err := net.FileConn(f)
		done <- result{c, err}
	}()
	r := <-done
	return r.c, r.err
}

// The control socket tells a worker's own user and root from others, and a worker that cannot hand
// over says why.
func TestWhoMayAskForTheCache(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "ask")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := brokerwire.ListenStream(path, 0o666) // its mode alone would keep others out
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w := &Worker{cfg: Config{ControlSocket: path}, log: slog.New(slog.DiscardHandler), handover: newHandover(), mounts: &mounts{}}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serveControl(ctx, l, w) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for uid, want := range map[int]codes.Code{os.Getuid(): codes.FailedPrecondition, 65534: codes.PermissionDenied} {
		t.Run(fmt.Sprint("uid ", uid), func(t *testing.T) {
			conn, err := grpc.NewClient("passthrough:///w", grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dialAs(uid, path) }))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			stream, err := workerpb.NewWorkerClient(conn).HandOver(t.Context(), &workerpb.HandOverRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			if status.Code(err) != want {
				t.Errorf("%v, want %v", err, want)
			}
		})
	}
}
