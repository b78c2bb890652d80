package master

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const unixScheme = "unix://"

// listen binds "unix:///path" or "host:port" and returns the address with the port that was
// bound. A socket's path may be longer than sun_path; a dead one in the way is replaced.
func listen(addr string, mode fs.FileMode) (l net.Listener, bound string, err error) {
	path, ok := strings.CutPrefix(addr, unixScheme)
	if !ok {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, "", err
		}
		return l, l.Addr().String(), nil
	}
	if l, err = listenUnix(path, mode); err != nil {
		return nil, "", fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, addr, nil
}

func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	short := "/proc/self/fd/" + strconv.Itoa(fd) + "/" + filepath.Base(path)

	if fi, err := os.Lstat(short); err == nil && fi.Mode().Type() == fs.ModeSocket {
		c, err := net.Dial("unix", short)
		if err == nil {
			return nil, errors.Join(syscall.EADDRINUSE, c.Close())
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			err = os.Remove(short)
		}
		if err != nil {
			return nil, err
		}
	}
	cfg := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error // before bind the mode is the new file's
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), uint32(mode.Perm())) }), err)
	}}
	l, err := cfg.Listen(context.Background(), "unix", short)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)        // short names nothing any more
	if err := os.Chmod(short, mode.Perm()); err != nil { // the umask may have cut it
		return nil, errors.Join(err, l.Close())
	}
	return &socket{Listener: l, path: path}, nil
}

// socket removes its file when it is closed, once: later there may be another master's.
type socket struct {
	net.Listener
	path string
	once sync.Once
}

func (s *socket) Close() error {
	var err error
	s.once.Do(func() { err = os.Remove(s.path) })
	return errors.Join(err, s.Listener.Close())
}
