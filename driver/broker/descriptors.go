package broker

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/mounttable"
	"github.com/larderfs/larder/driver/takeover"
)

// register makes a worker's file the backing of passthrough reads, if it passes checkBacking.
func (b *Broker) register(m *takeover.Mount, files []*os.File) (id int32, err error) {
	if len(files) != 1 {
		return 0, fmt.Errorf("register: one descriptor is needed, not %d: %w", len(files), object.ErrInvalid)
	}
	if err := checkBacking(files[0], b.devs, b.cfg.WorkerUID); err != nil {
		b.cfg.Log.Error("backing file refused", "volume", m.ID, "err", err)
		return 0, err
	}
	err = m.Backing(func(ids map[int32]struct{}) error {
		if id, err = openBacking(m.Device, files[0]); err == nil {
			ids[id] = struct{}{}
		}
		return err
	})
	return id, err
}

// checkBacking is DESIGN §5.6: the kernel reopens a backing file with the reader's flags and
// the broker's rights, so it must lie where even those cannot write.
func checkBacking(f *os.File, tiers []uint64, workerUID uint32) error {
	var st unix.Stat_t
	var fs unix.Statfs_t
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err := errors.Join(err, unix.Fstat(int(f.Fd()), &st), unix.Fstatfs(int(f.Fd()), &fs)); err != nil {
		return fmt.Errorf("backing file: %w", err)
	}
	for _, must := range []struct {
		hold bool
		why  string // not
	}{
		{st.Mode&unix.S_IFMT == unix.S_IFREG, "not a regular file"},
		{flags&unix.O_ACCMODE == unix.O_RDONLY && flags&unix.O_PATH == 0, "not opened read-only"},
		{fs.Flags&unix.ST_RDONLY != 0, "not opened through a read-only mount"},
		{st.Uid == workerUID, fmt.Sprintf("owned by uid %d, not by the worker (%d)", st.Uid, workerUID)},
		{slices.Contains(tiers, st.Dev), "not on a tier's file system"},
	} {
		if !must.hold {
			return fmt.Errorf("backing file: %s: %w", must.why, object.ErrDenied)
		}
	}
	return nil
}

// unregister closes a backing id. Open files keep what they have.
func unregister(m *takeover.Mount, id int32) error {
	return m.Backing(func(ids map[int32]struct{}) error {
		if _, ok := ids[id]; !ok {
			return fmt.Errorf("backing id %d: %w", id, object.ErrNotFound)
		}
		if err := closeBacking(m.Device, id); err != nil {
			return err
		}
		delete(ids, id)
		return nil
	})
}

// replace takes a compacted memfd.
func replace(m *takeover.Mount, files []*os.File) error {
	if len(files) != 1 {
		return fmt.Errorf("replace: one descriptor is needed, not %d: %w", len(files), object.ErrInvalid)
	}
	if err := m.Replace(files[0]); err != nil {
		return err
	}
	files[0] = nil
	return nil
}

// takeBack accepts what a worker held while there was no broker.
func (b *Broker) takeBack(s *brokerwire.Session, in brokerwire.Message, files []*os.File) error {
	if len(files) < 3 || len(files) > 4 {
		return fmt.Errorf("give: three or four descriptors are needed, not %d: %w", len(files), object.ErrInvalid)
	}
	if _, err := b.held.Lookup(in.Mount); err == nil {
		return fmt.Errorf("give: volume %q is held already: %w", in.Mount, brokerwire.ErrExists)
	}
	rec, err := brokerwire.OpenRecord(files[1])
	if err != nil {
		return err
	}
	st := rec.State()
	if st.Volume.ID != in.Mount {
		return fmt.Errorf("give: state is of volume %q, not %q: %w", st.Volume.ID, in.Mount, object.ErrInvalid)
	}
	if err := checkFUSE(files[0], st, b.cfg.Name); err != nil {
		return err
	}
	if !st.Negotiated() {
		return errors.Join(fmt.Errorf("give: the mount of volume %q was not finished: %w", in.Mount, object.ErrNotFound),
			unix.Unmount(st.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	live, err := brokerwire.ReadBackings(files[2])
	if err != nil {
		return err
	}
	if err := setReadOnly(st.Path, true); err != nil { // the broker before may have died while it was not
		return err
	}
	var listener *os.File
	if len(files) == 4 {
		listener = files[3]
	}
	m := takeover.Regained(s, files[0], rec, live, listener)
	err = m.Backing(func(ids map[int32]struct{}) error { // nothing is registered before the orphans are closed
		if err := b.held.Add(m); err != nil {
			return err
		}
		clear(files[:2])
		clear(files[3:])
		if err := closeOrphans(m.Device, ids, st); err != nil {
			b.cfg.Log.Warn("close orphaned backing files", "volume", in.Mount, "err", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.held.HandOver(m, s) // the broker before may have died with the listener
	b.cfg.Log.Info("mount given back", "volume", in.Mount, "path", st.Path)
	return nil
}

// checkFUSE holds a descriptor against what is mounted: it must be /dev/fuse, and the path
// that its state names must show a file system of ours with the device that it names.
func checkFUSE(f *os.File, st brokerwire.State, name string) error {
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		return fmt.Errorf("give: %w", err)
	}
	if s.Mode&unix.S_IFMT != unix.S_IFCHR || s.Rdev != unix.Mkdev(10, 229) {
		return fmt.Errorf("give: not /dev/fuse: %w", object.ErrDenied)
	}
	e, ok, err := mounttable.At(st.Path)
	if err != nil {
		return err
	}
	if !ok || e.Dev != st.Dev || e.Root != "/" || !ours(e, name) {
		return fmt.Errorf("give: %s does not show the file system that the state names: %w", st.Path, object.ErrNotFound)
	}
	return nil
}

// closeOrphans closes backing ids that a broker registered and died before it could say so.
// The kernel counts ids up, so they are among the latest: a file of ours tells how far it has come.
func closeOrphans(fuse *os.File, ids map[int32]struct{}, st brokerwire.State) error {
	const window = 1024 // more than a worker registers at once
	if !st.CanPassthrough() {
		return nil
	}
	probe, err := brokerwire.NewBackings(nil)
	if err != nil {
		return err
	}
	defer probe.Close()
	next, err := openBacking(fuse, probe)
	if err != nil {
		return err
	}
	delete(ids, next) // it was nobody's, whatever the worker says
	latest := int32(0)
	for id := range ids {
		latest = max(latest, id)
	}
	for id := max(1, min(latest, next)-window); id <= next; id++ {
		if _, live := ids[id]; !live {
			if err := closeBacking(fuse, id); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	return nil
}

// openBacking is FUSE_DEV_IOC_BACKING_OPEN (include/uapi/linux/fuse.h).
func openBacking(fuse, f *os.File) (int32, error) {
	backing := struct {
		fd      int32
		flags   uint32
		padding uint64
	}{fd: int32(f.Fd())}
	id, _, errno := unix.Syscall(unix.SYS_IOCTL, fuse.Fd(), 0x4010e501, uintptr(unsafe.Pointer(&backing)))
	if errno != 0 {
		return 0, fmt.Errorf("register backing file: %w", errno)
	}
	return int32(id), nil
}

// closeBacking is FUSE_DEV_IOC_BACKING_CLOSE.
func closeBacking(fuse *os.File, id int32) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, fuse.Fd(), 0x4004e502, uintptr(unsafe.Pointer(&id)))
	if errno != 0 {
		return fmt.Errorf("close backing id %d: %w", id, errno)
	}
	return nil
}
