package broker

import (
	"errors"
	"fmt"
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
	"github.com/larderfs/larder/driver/takeover"
)

const (
	// FSType is what the mount table calls our file systems.
	FSType = "fuse.larder"

	maxRead = 1 << 20 // bytes of one READ; what the first INIT negotiates
	fusectl = "/sys/fs/fuse/connections"
)

// ours reports whether a broker of this name made a mount.
func ours(e mounttable.Entry, name string) bool { return e.FSType == FSType && e.Source == name }

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

// detach takes mounts away although they are in use, the youngest first, and says which.
func detach(which func(mounttable.Entry) bool) (paths []string, err error) {
	table, err := mounttable.Read()
	if err != nil {
		return nil, err
	}
	for _, e := range slices.Backward(table) {
		if !which(e) {
			continue
		}
		if uerr := unix.Unmount(e.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); uerr != nil && uerr != unix.EINVAL {
			err = errors.Join(err, fmt.Errorf("unmount %s: %w", e.Path, uerr))
			continue
		}
		paths = append(paths, e.Path)
	}
	return paths, err
}

// RemoveDead removes every mount that brokers with this name made. Only for who knows that
// none of their processes lives: a mount that a worker still serves would go too.
func RemoveDead(name string) error {
	_, err := detach(func(e mounttable.Entry) bool { return ours(e, name) })
	return err
}

// clearDead removes mounts of brokers with our name at path that nobody holds: both holders
// died. One that a worker still holds is left to it: it will be given back.
func clearDead(path, name string) error {
	for {
		e, ok, err := mounttable.At(path)
		if err != nil || !ok {
			return err
		}
		if !ours(e, name) {
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

// dead reports whether the FUSE file system at path has lost its connection: then it says so at
// once. Where somebody still has the descriptor, and does not answer, a request would wait.
func dead(path string) bool {
	answer := make(chan error, 1)
	go func() { // ends with an answer, or with the connection
		var fs unix.Statfs_t
		answer <- unix.Statfs(path, &fs)
	}()
	select {
	case err := <-answer:
		return err == unix.ENOTCONN || err == unix.ECONNABORTED
	case <-time.After(time.Second):
		return false
	}
}

// bindTree shows from[/sub], a file system's root, at target, read-only before anybody can see it. It
// is idempotent; something else at target is ErrExists.
func bindTree(from, sub, target string, readOnly bool, dev uint64) error {
	if target == "" {
		return fmt.Errorf("bind: a target is needed: %w", object.ErrInvalid)
	}
	if e, ok, err := mounttable.At(target); err != nil {
		return err
	} else if ok {
		if e.Dev != dev || e.Root != path.Join("/", sub) || e.ReadOnly != readOnly {
			return fmt.Errorf("%s: %w", target, brokerwire.ErrExists)
		}
		return nil
	}
	fd, err := openTree(filepath.Join(from, sub))
	if err != nil {
		return err
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

// openTree makes a detached mount of what is shown at path.
func openTree(path string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, fmt.Errorf("open tree %s: %w", path, err)
	}
	return fd, nil
}

// bindThrough makes the socket domain/name in the FUSE file system at path and listens on
// it; one of that name, of a broker that was killed, is replaced. It goes through a detached
// mount, because a bound socket keeps the mount busy that it was bound through.
func bindThrough(path, name string) (_ *os.File, err error) {
	if err := setReadOnly(path, false); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, setReadOnly(path, true)) }()
	tree, err := openTree(path)
	if err != nil {
		return nil, err
	}
	defer unix.Close(tree)
	l, err := brokerwire.ListenStream(fmt.Sprintf("/proc/self/fd/%d/domain/%s", tree, name), 0)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.File()
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
	flag := map[bool]string{true: "ro", false: "rw"}[on]
	if err := errors.Join(unix.FsconfigSetFlag(fd, flag), unix.FsconfigReconfigure(fd)); err != nil {
		return fmt.Errorf("reconfigure %s as %s: %w", path, flag, err)
	}
	return nil
}

// makeView mounts dir a second time, read-only. One that is there, made by a broker that was
// killed, stays: the worker uses it.
func makeView(dir, view string) error {
	if err := os.MkdirAll(view, 0o755); err != nil {
		return fmt.Errorf("view: %w", err)
	}
	var want, have unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Stat(dir, &want), unix.Stat(view, &have), unix.Statfs(view, &fs)); err != nil {
		return fmt.Errorf("view of %s: %w", dir, err)
	}
	if want.Dev == have.Dev && want.Ino == have.Ino && fs.Flags&unix.ST_RDONLY != 0 {
		return nil
	}
	if err := RemoveView(view); err != nil {
		return err
	}
	return bindTree(dir, "", view, true, want.Dev)
}

// RemoveView undoes what a broker with Config.ViewDirs did. A worker that uses it is about to end.
func RemoveView(view string) error {
	_, err := detach(func(e mounttable.Entry) bool { return e.Path == view })
	return err
}

// mountFusectl makes the kernel's control files of FUSE connections available.
func mountFusectl() error {
	if _, ok, err := mounttable.At(fusectl); err != nil || ok {
		return err
	}
	return unix.Mount("fusectl", fusectl, "fusectl", 0, "")
}

// abort ends a FUSE connection: even a process that is stopped and still holds a descriptor
// cannot keep its readers waiting.
func abort(m *takeover.Mount) error {
	err := os.WriteFile(fmt.Sprintf("%s/%d/abort", fusectl, unix.Minor(m.Dev)), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) { // ended already, or no fusectl
		return nil
	}
	return err
}

// waiting is the number of requests of a connection that have no answer yet.
func waiting(m *takeover.Mount) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("%s/%d/waiting", fusectl, unix.Minor(m.Dev)))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// setReadAhead sets how far the kernel asks ahead in a mount.
func setReadAhead(dev uint64, bytes int64) error {
	name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(dev), unix.Minor(dev))
	return os.WriteFile(name, strconv.AppendInt(nil, bytes>>10, 10), 0)
}
