package broker

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/mounttable"
)

// mountDev is the device of the topmost mount at path.
func mountDev(path string) (uint64, error) {
	e, ok, err := mounttable.At(path)
	if err == nil && !ok {
		err = fmt.Errorf("nothing is mounted at %s: %w", path, object.ErrNotFound)
	}
	return e.Dev, err
}

// otherMounts are the places, except path, where the file system dev is mounted.
func otherMounts(dev uint64, path string) ([]string, error) {
	es, err := mounttable.Read()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range es {
		if e.Dev == dev && e.Path != path {
			out = append(out, e.Path)
		}
	}
	return out, nil
}

// unmountAll removes every mount stacked at path; none is no error.
func unmountAll(path string) error {
	for refused := 0; ; {
		if _, ok, err := mounttable.At(path); err != nil || !ok {
			return err
		}
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
		case (err == unix.EINVAL || err == unix.ENOENT) && refused < 3: // somebody else was faster
			refused++
		case err == unix.EBUSY:
			return fmt.Errorf("unmount %s: a process still uses it: %w", path, object.ErrBusy)
		default:
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// clearDead removes mounts of brokers with our name at path that nobody holds: both holders
// died. One that a worker still holds is left to it: it will be given back.
func clearDead(path, name string) error {
	for {
		e, ok, err := mounttable.At(path)
		if err != nil || !ok {
			return err
		}
		if e.FSType != FSType || e.Source != name {
			return fmt.Errorf("%s is a mount point of %s %s: %w", path, e.FSType, e.Source, brokerwire.ErrExists)
		}
		if !dead(path) {
			return fmt.Errorf("%s is mounted and held by a worker that has not given it back yet: %w", path, object.ErrBusy)
		}
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount dead %s: %w", path, err)
		}
	}
}

// dead reports whether the FUSE file system at path has lost its connection. Where somebody
// still has the descriptor, and does not answer, a request would wait.
func dead(path string) bool {
	answer := make(chan error, 1)
	go func() { // ends with an answer, or with the connection
		var fs unix.Statfs_t
		answer <- unix.Statfs(path, &fs)
	}()
	select {
	case err := <-answer:
		return err == unix.ENOTCONN || err == unix.ECONNABORTED
	case <-time.After(aliveAfter):
		return false
	}
}

// aliveAfter is how long a dead file system has to say so: it does at once.
const aliveAfter = time.Second

// bindTree shows from[/sub], a file system's root, at target. It is idempotent; something else at target is
// ErrExists.
func bindTree(from, sub, target string, readOnly bool, dev uint64) error {
	if e, ok, err := mounttable.At(target); err != nil {
		return err
	} else if ok {
		if e.Dev != dev || e.Root != path.Join("/", sub) || e.ReadOnly != readOnly {
			return fmt.Errorf("%s: %w", target, brokerwire.ErrExists)
		}
		return nil
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, filepath.Join(from, sub), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("open tree %s: %w", filepath.Join(from, sub), err)
	}
	defer unix.Close(fd)
	if readOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("make the bind of %s read-only: %w", from, err)
		}
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("bind %s at %s: %w", from, target, err)
	}
	return nil
}

// RemoveDead removes every mount that brokers with this name made. Only for who knows that
// none of their processes lives: a mount that a worker still serves would go too.
func RemoveDead(name string) error {
	_, err := removeDead(name, nil)
	return err
}

// removeDead removes mounts of a name but those of held devices, and says which.
func removeDead(name string, held map[uint64]bool) (dead []string, err error) {
	es, err := mounttable.Read()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, e := range slices.Backward(es) {
		if e.FSType != FSType || e.Source != name || held[e.Dev] {
			continue
		}
		if err := unix.Unmount(e.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
			errs = append(errs, fmt.Errorf("unmount %s: %w", e.Path, err))
			continue
		}
		dead = append(dead, e.Path)
	}
	return dead, errors.Join(errs...)
}

const fusectl = "/sys/fs/fuse/connections"

// mountFusectl makes the kernel's control files of FUSE connections available.
func mountFusectl() error {
	if _, ok, err := mounttable.At(fusectl); err != nil || ok {
		return err
	}
	return unix.Mount("fusectl", fusectl, "fusectl", 0, "")
}

// abort ends a FUSE connection: even a process that is stopped and still holds a descriptor
// cannot keep its readers waiting.
func abort(dev uint64) error {
	err := os.WriteFile(fmt.Sprintf("%s/%d/abort", fusectl, unix.Minor(dev)), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) { // ended already, or no fusectl
		return nil
	}
	return err
}

// waiting is the number of requests of a connection that have no answer yet.
func waiting(dev uint64) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("%s/%d/waiting", fusectl, unix.Minor(dev)))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// makeView mounts dir a second time, read-only. One that is there, made by a broker that was
// killed, stays: the worker uses it.
func makeView(dir, view string) error {
	if err := os.MkdirAll(view, 0o755); err != nil {
		return fmt.Errorf("view: %w", err)
	}
	var want, have unix.Stat_t
	if err := errors.Join(unix.Stat(dir, &want), unix.Stat(view, &have)); err != nil {
		return fmt.Errorf("view of %s: %w", dir, err)
	}
	if want.Dev == have.Dev && want.Ino == have.Ino {
		var fs unix.Statfs_t
		if err := unix.Statfs(view, &fs); err == nil && fs.Flags&unix.ST_RDONLY != 0 {
			return nil
		}
	}
	if err := unmountAll(view); err != nil {
		return err
	}
	return bindTree(dir, "", view, true, want.Dev)
}

// RemoveView undoes what a broker with Config.OwnsView did.
func RemoveView(view string) error {
	err := unmountAll(view)
	if errors.Is(err, object.ErrBusy) { // the worker that uses it is about to end
		return unix.Unmount(view, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	return err
}

// setReadAhead sets how far the kernel asks ahead in a mount.
func setReadAhead(dev uint64, bytes int64) error {
	name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(dev), unix.Minor(dev))
	return os.WriteFile(name, strconv.AppendInt(nil, bytes>>10, 10), 0)
}

// setReadOnly changes the file system at path, and with it all mounts of it: nobody but the broker, for
// a moment, can write there, and everybody is told EROFS, also who had not the permission.
func setReadOnly(path string, on bool) error {
	if e, ok, err := mounttable.At(path); err != nil || ok && e.FSReadOnly == on {
		return err // to reconfigure drops all that the kernel knows of names
	}
	fd, err := unix.Fspick(unix.AT_FDCWD, path, unix.FSPICK_CLOEXEC|unix.FSPICK_SYMLINK_NOFOLLOW|unix.FSPICK_NO_AUTOMOUNT)
	if err != nil {
		return fmt.Errorf("reconfigure %s: %w", path, err)
	}
	defer unix.Close(fd)
	flag := "rw"
	if on {
		flag = "ro"
	}
	if err := errors.Join(unix.FsconfigSetFlag(fd, flag), unix.FsconfigReconfigure(fd)); err != nil {
		return fmt.Errorf("reconfigure %s as %s: %w", path, flag, err)
	}
	return nil
}

// warnTimeout says that a sysctl would kill mounts that wait for a worker.
func warnTimeout(log *slog.Logger) {
	const name = "/proc/sys/fs/fuse/max_request_timeout"
	b, err := os.ReadFile(name)
	if s := strings.TrimSpace(string(b)); err == nil && s != "0" {
		log.Warn("sysctl fs.fuse.max_request_timeout is not 0: mounts die while they wait for a worker", "seconds", s)
	}
}

// bindThrough makes the socket domain/name in the FUSE file system at path and listens on
// it; one of that name, of a broker that was killed, is replaced. It goes through a detached mount, because a bound socket keeps the mount that it was
// bound through busy, and through a descriptor, because a kubelet's paths are longer than sun_path.
func bindThrough(path, name string) (*os.File, error) {
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return nil, fmt.Errorf("open tree: %w", err)
	}
	defer unix.Close(tree)
	dir, err := unix.Openat(tree, "domain", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open domain: %w", err)
	}
	defer unix.Close(dir)
	at := fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)
	l, err := net.Listen("unix", at)
	if errors.Is(err, unix.EADDRINUSE) {
		if err = unix.Unlinkat(dir, name, 0); err == nil {
			l, err = net.Listen("unix", at)
		}
	}
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	defer l.Close()
	return l.(*net.UnixListener).File()
}
