package broker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/mounttable"
)

// ioctls of /dev/fuse (include/uapi/linux/fuse.h).
const (
	backingOpen  = 0x4010e501 // FUSE_DEV_IOC_BACKING_OPEN, struct fuse_backing_map
	backingClose = 0x4004e502 // FUSE_DEV_IOC_BACKING_CLOSE, u32
)

type backingMap struct {
	fd      int32
	flags   uint32
	padding uint64
}

// register makes a worker's file the backing of passthrough reads, if it passes checkBacking.
func (b *Broker) register(in brokerwire.Message, files []*os.File) (int32, error) {
	m, err := b.lookup(in.Mount)
	if err != nil {
		return 0, err
	}
	if len(files) != 1 {
		return 0, fmt.Errorf("register: one descriptor is needed, not %d: %w", len(files), object.ErrInvalid)
	}
	if err := checkBacking(files[0], b.dev, b.cfg.WorkerUID); err != nil {
		b.cfg.Log.Error("backing file refused", "volume", in.Mount, "err", err)
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gone.Load() {
		return 0, fmt.Errorf("register: volume %q has gone: %w", in.Mount, object.ErrNotFound)
	}
	id, err := m.openBacking(files[0])
	if err == nil {
		m.backing[id] = struct{}{}
	}
	return id, err
}

// checkBacking is DESIGN §5.6: the kernel reopens a backing file with the reader's flags and
// the broker's rights, so it must lie where even those cannot write.
func checkBacking(f *os.File, tierDev uint64, workerUID uint32) error {
	refuse := func(why string) error { return fmt.Errorf("backing file: %s: %w", why, object.ErrDenied) }
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("backing file: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return refuse("not a regular file")
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("backing file: %w", err)
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_PATH != 0 {
		return refuse("not opened read-only")
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("backing file: %w", err)
	}
	if fs.Flags&unix.ST_RDONLY == 0 {
		return refuse("not opened through a read-only mount")
	}
	if st.Uid != workerUID {
		return refuse(fmt.Sprintf("owned by uid %d, not by the worker (%d)", st.Uid, workerUID))
	}
	if uint64(st.Dev) != tierDev {
		return refuse("not on the tier's file system")
	}
	return nil
}

// unregister closes a backing id. Open files keep what they have.
func (b *Broker) unregister(in brokerwire.Message) error {
	m, err := b.lookup(in.Mount)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.backing[in.Backing]; !ok {
		return fmt.Errorf("backing id %d: %w", in.Backing, object.ErrNotFound)
	}
	if err := m.closeBacking(in.Backing); err != nil {
		return err
	}
	delete(m.backing, in.Backing)
	return nil
}

// replace takes a compacted memfd. Its header is written anew: a worker has no say in it.
func (b *Broker) replace(in brokerwire.Message, files []*os.File) error {
	m, err := b.lookup(in.Mount)
	if err != nil {
		return err
	}
	if len(files) != 1 {
		return fmt.Errorf("replace: one descriptor is needed, not %d: %w", len(files), object.ErrInvalid)
	}
	if _, err := brokerwire.ReadState(files[0]); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := brokerwire.WriteState(files[0], m.state); err != nil {
		return err
	}
	m.memfd.Close()
	m.memfd, files[0] = files[0], nil
	return nil
}

// takeBack accepts what a worker held while there was no broker.
func (b *Broker) takeBack(s *session, in brokerwire.Message, files []*os.File) error {
	if len(files) < 3 || len(files) > 4 {
		return fmt.Errorf("give: three or four descriptors are needed, not %d: %w", len(files), object.ErrInvalid)
	}
	if b.has(in.Mount) {
		return fmt.Errorf("give: volume %q is held already: %w", in.Mount, brokerwire.ErrExists)
	}
	st, err := brokerwire.ReadState(files[1])
	if err != nil {
		return err
	}
	if st.Volume.ID != in.Mount {
		return fmt.Errorf("give: state is of volume %q, not %q: %w", st.Volume.ID, in.Mount, object.ErrInvalid)
	}
	if err := b.checkFuse(files[0], st); err != nil {
		return err
	}
	if !st.Negotiated() {
		return errors.Join(fmt.Errorf("give: the mount of volume %q was not finished: %w", in.Mount, object.ErrNotFound),
			unix.Unmount(st.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	if err := setReadOnly(st.Path, true); err != nil { // the broker before may have died while it was not
		return err
	}
	live, err := brokerwire.ReadBackings(files[2])
	if err != nil {
		return err
	}
	m := &mount{id: in.Mount, path: st.Path, dev: st.Dev, fuse: files[0], memfd: files[1], state: st, server: s, backing: live}
	if err := m.closeOrphans(); err != nil {
		b.cfg.Log.Warn("close orphaned backing files", "volume", in.Mount, "err", err)
	}
	if len(files) == 4 {
		m.listener, m.heard = files[3], s
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mounts[in.Mount] != nil {
		return fmt.Errorf("give: volume %q is held already: %w", in.Mount, brokerwire.ErrExists)
	}
	b.mounts[in.Mount] = m
	files[0], files[1] = nil, nil
	if m.listener != nil {
		files[3] = nil
	}
	if m.listener == nil { // the broker before died between binding it and handing it over
		b.adoptions.Go(func() { b.bindAgain(s, m) })
	}
	b.cfg.Log.Info("mount given back", "volume", in.Mount, "path", st.Path)
	return nil
}

// has reports whether a volume is mounted, or being mounted just now: then it is not
// finished, but not lost either.
func (b *Broker) has(id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mounts[id] != nil || b.pending == id
}

// setPending says which volume is being mounted; "" is none.
func (b *Broker) setPending(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pending = id
}

func (b *Broker) bindAgain(s *session, m *mount) {
	ctx, cancel := context.WithTimeout(context.Background(), adoptTimeout)
	defer cancel()
	if err := m.ensureSocket(ctx, s); err != nil && !m.gone.Load() {
		b.cfg.Log.Error("bind domain socket", "volume", m.id, "err", err)
	}
}

// closeOrphans closes backing ids that a broker registered and died before it could say so.
// The kernel counts ids up, so they are among the latest: a file of ours tells how far it has come.
func (m *mount) closeOrphans() error {
	const window = 1024 // more than a worker registers at once
	if !m.state.CanPassthrough() {
		return nil
	}
	probe, err := brokerwire.NewBackings(nil)
	if err != nil {
		return err
	}
	defer probe.Close()
	next, err := m.openBacking(probe)
	if err != nil {
		return err
	}
	delete(m.backing, next) // it was nobody's, whatever the worker says
	latest := int32(0)
	for id := range m.backing {
		latest = max(latest, id)
	}
	for id := max(1, min(latest, next)-window); id <= next; id++ {
		if _, live := m.backing[id]; !live {
			if err := m.closeBacking(id); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	return nil
}

func (m *mount) openBacking(f *os.File) (int32, error) {
	arg := backingMap{fd: int32(f.Fd())}
	id, _, errno := unix.Syscall(unix.SYS_IOCTL, m.fuse.Fd(), backingOpen, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return 0, fmt.Errorf("register backing file: %w", errno)
	}
	return int32(id), nil
}

func (m *mount) closeBacking(id int32) error {
	arg := uint32(id)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, m.fuse.Fd(), backingClose, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return fmt.Errorf("close backing id %d: %w", id, errno)
	}
	return nil
}

// checkFuse holds a descriptor against what is mounted: it must be /dev/fuse, and the path
// that its state names must show a file system of ours with the device that it names.
func (b *Broker) checkFuse(f *os.File, st brokerwire.State) error {
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
	if !ok || e.Dev != st.Dev || e.Root != "/" || e.FSType != FSType || e.Source != b.cfg.Name {
		return fmt.Errorf("give: %s does not show the file system that the state names: %w", st.Path, object.ErrNotFound)
	}
	return nil
}
