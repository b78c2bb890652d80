package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/mounttable"
	"github.com/larderfs/larder/driver/takeover"
)

const mountTimeout = 30 * time.Second // for a worker to come, and to check its source

// mountVolume mounts a volume, or refreshes one that is mounted at the same path. A failure
// leaves nothing mounted.
func (b *Broker) mountVolume(ctx context.Context, in brokerwire.Message) error {
	if in.Volume == nil || in.Volume.ID == "" || in.Path == "" {
		return fmt.Errorf("mount: volume and path are needed: %w", object.ErrInvalid)
	}
	b.mounting.Lock() // one at a time: the second mount of a volume must see the first
	defer b.mounting.Unlock()
	if m, err := b.held.Lookup(in.Volume.ID); err == nil {
		if m.Path != in.Path {
			return fmt.Errorf("volume %q is mounted at %s: %w", m.ID, m.Path, brokerwire.ErrExists)
		}
		return b.held.Refresh(ctx, m, in.Volume, false)
	}
	if err := clearDead(in.Path, b.cfg.Name); err != nil {
		return err
	}
	if err := os.MkdirAll(in.Path, 0o750); err != nil {
		return fmt.Errorf("mount point %s: %w", in.Path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, mountTimeout)
	defer cancel()
	s, err := b.held.Worker(ctx)
	if err != nil {
		return err
	}
	in.Volume.Proven = false // that is for us to say
	m, err := mountFUSE(b.cfg.Name, *in.Volume, in.Path)
	if err != nil {
		return err
	}
	if err = b.held.Add(m); err == nil {
		err = b.held.Serve(ctx, m, s)
	}
	if err == nil {
		err = m.Prove()
	}
	if err != nil {
		err = errors.Join(err, unix.Unmount(m.Path, unix.MNT_DETACH))
		b.held.Release(context.WithoutCancel(ctx), m)
		return err
	}
	b.cfg.Log.Info("mounted", "volume", m.ID, "path", in.Path, "source", cmp.Or(in.Volume.Source, in.Volume.Path))
	return nil
}

// mountFUSE opens a FUSE connection, mounts it, and reads the kernel's INIT, which a worker answers.
func mountFUSE(name string, v brokerwire.Volume, path string) (_ *takeover.Mount, err error) {
	fuse, err := os.OpenFile("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse (is the fuse module loaded?): %w", err)
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=%d", fuse.Fd(), maxRead)
	if err := unix.Mount(name, path, FSType, unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
		fuse.Close()
		return nil, fmt.Errorf("mount %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			fuse.Close()
			err = errors.Join(err, unix.Unmount(path, unix.MNT_DETACH))
		}
	}()
	init := make([]byte, 64<<10)
	n, err := unix.Read(int(fuse.Fd()), init) // the kernel has sent it by mount(2)
	if err != nil {
		return nil, fmt.Errorf("read INIT of %s: %w", path, err)
	}
	dev, err := mounttable.Dev(path)
	if err != nil {
		return nil, err
	}
	rec, err := brokerwire.NewRecord(brokerwire.State{Volume: v, Path: path, Dev: dev, Since: time.Now(), InitIn: init[:n]})
	if err != nil {
		return nil, err
	}
	return takeover.NewMount(fuse, rec), nil
}

// answered sets how far the kernel asks ahead: INIT has lowered it.
func (b *Broker) answered(m *takeover.Mount) {
	if err := setReadAhead(m.Dev, b.cfg.ReadAhead); err != nil {
		b.cfg.Log.Warn("read-ahead", "path", m.Path, "err", err)
	}
}

// unmount removes whatever is mounted at path; a volume with it if that was its FUSE mount.
func (b *Broker) unmount(ctx context.Context, path string) error {
	if path == "" {
		return fmt.Errorf("unmount: a path is needed: %w", object.ErrInvalid)
	}
	b.mounting.Lock()
	defer b.mounting.Unlock()
	m := b.held.At(path)
	if m != nil {
		table, err := mounttable.Read()
		if others := table.Others(m.Dev, path); err != nil || len(others) > 0 {
			return errors.Join(err, fmt.Errorf("volume %q is still published at %q: %w", m.ID, others, object.ErrBusy))
		}
	}
	if err := unmountAll(path); err != nil {
		return err
	}
	if m != nil {
		b.held.Release(ctx, m)
		b.cfg.Log.Info("unmounted", "volume", m.ID, "path", path)
	}
	return nil
}

// reconcile removes mounts of this broker's name that nobody holds: both holders died. Only after a
// worker has given back what it held. What pods have stays until the next publish or unpublish: a
// container that starts meanwhile is to find an error, not an empty directory.
func (b *Broker) reconcile() error {
	b.mounting.Lock()
	defer b.mounting.Unlock()
	held := b.held.All()
	var dead []string
	_, err := detach(func(e mounttable.Entry) bool {
		if !ours(e, b.cfg.Name) || slices.ContainsFunc(held, func(m *takeover.Mount) bool { return m.Dev == e.Dev }) {
			return false
		}
		dead = append(dead, e.Path)
		return !strings.Contains(e.Path, "/volumes/kubernetes.io~") // binds of a part of it (subPath) the kubelet makes anew
	})
	for _, path := range dead {
		b.cfg.Log.Error("a dead mount: worker and broker had both died; pods that used it must be restarted", "path", path)
	}
	b.held.Lost(dead, "its cache worker and the node plugin had both died")
	return err
}
