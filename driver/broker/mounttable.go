package broker

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// entry is a line of /proc/self/mountinfo. Reading it never touches a file system, so a
// dead FUSE mount cannot block us.
type entry struct {
	dev    uint64
	path   string
	fstype string
	source string
}

func mountTable() ([]entry, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	defer f.Close()
	var out []entry
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		if e, ok := parseEntry(sc.Text()); ok {
			out = append(out, e)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	return out, nil
}

// parseEntry reads "36 35 98:0 /root /mount/point opts - type source opts".
func parseEntry(line string) (entry, bool) {
	left, right, ok := strings.Cut(line, " - ")
	f, g := strings.Fields(left), strings.Fields(right)
	if !ok || len(f) < 5 || len(g) < 2 {
		return entry{}, false
	}
	major, minor, ok := strings.Cut(f[2], ":")
	ma, err1 := strconv.ParseUint(major, 10, 32)
	mi, err2 := strconv.ParseUint(minor, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return entry{}, false
	}
	return entry{dev: unix.Mkdev(uint32(ma), uint32(mi)), path: unescape(f[4]), fstype: g[0], source: unescape(g[1])}, true
}

// unescape undoes the kernel's \040 for space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountDev is the device of the topmost mount at path.
func mountDev(path string) (uint64, error) {
	es, err := mountTable()
	if err != nil {
		return 0, err
	}
	for i := len(es) - 1; i >= 0; i-- {
		if es[i].path == path {
			return es[i].dev, nil
		}
	}
	return 0, fmt.Errorf("nothing is mounted at %s: %w", path, object.ErrNotFound)
}

// otherMounts are the places, except path, where the file system dev is mounted.
func otherMounts(dev uint64, path string) ([]string, error) {
	es, err := mountTable()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range es {
		if e.dev == dev && e.path != path {
			out = append(out, e.path)
		}
	}
	return out, nil
}

// unmountAll removes every mount stacked at path; none is no error.
func unmountAll(path string) error {
	for {
		if _, err := mountDev(path); errors.Is(err, object.ErrNotFound) {
			return nil
		} else if err != nil {
			return err
		}
		switch err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err {
		case nil, unix.EINVAL, unix.ENOENT:
		case unix.EBUSY:
			return fmt.Errorf("unmount %s: a process still uses it: %w", path, object.ErrBusy)
		default:
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// clearDead removes mounts of ours at path that no broker holds: both holders died.
func clearDead(path string) error {
	es, err := mountTable()
	if err != nil {
		return err
	}
	for _, e := range es {
		if e.path != path {
			continue
		}
		if e.fstype != FSType {
			return fmt.Errorf("%s is a mount point of %s: %w", path, e.fstype, brokerwire.ErrExists)
		}
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount dead %s: %w", path, err)
		}
	}
	return nil
}

// bindTree shows from[/sub] at target. It is idempotent; something else at target is ErrExists.
func bindTree(from, sub, target string, readOnly bool, dev uint64) error {
	if d, err := mountDev(target); err == nil {
		if d != dev {
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
	es, err := mountTable()
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range slices.Backward(es) {
		if e.fstype == FSType && e.source == name {
			if err := unix.Unmount(e.path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
				errs = append(errs, fmt.Errorf("unmount %s: %w", e.path, err))
			}
		}
	}
	return errors.Join(errs...)
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
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(dev), unix.Minor(dev))
	return os.WriteFile(path, strconv.AppendInt(nil, bytes>>10, 10), 0)
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
// it. It goes through a detached mount, because a bound socket keeps the mount that it was
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
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir, name))
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	defer l.Close()
	return l.(*net.UnixListener).File()
}
