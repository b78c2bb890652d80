package broker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

const (
	// FSType is what /proc/mounts calls our file systems.
	FSType = "fuse.larder"

	adoptTimeout = 30 * time.Second // for a worker to answer INIT and check its source
	dropTimeout  = 2 * time.Second  // for a worker to let go; one that is stopped must not keep an unmount waiting
	maxRead      = 1 << 20          // bytes of one READ; what the first INIT negotiates
)

// mount is one FUSE connection and everything that belongs to it.
type mount struct {
	id   string // of the volume
	path string
	dev  uint64 // st_dev of the FUSE file system

	adopting sync.Mutex // one adoption at a time; held across calls to the worker
	binding  sync.Mutex // one ensureSocket at a time; held until a worker has answered. Taken without adopting
	gone     atomic.Bool

	fuse *os.File // /dev/fuse

	mu       sync.Mutex // guards the fields below; never held across a call
	memfd    *os.File
	state    brokerwire.State
	listener *os.File           // nil until the socket is bound
	heard    *session           // the worker that has the listener
	server   *session           // the worker it was given to
	lost     time.Time          // when that one went; zero while it is there
	expiry   *time.Timer        // ends the mount if no worker returns; nil while one is there
	backing  map[int32]struct{} // ids registered in the kernel
}

func (m *mount) serves(s *session) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.server == s
}

func (m *mount) info(worker *session) brokerwire.Mount {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.state.Volume
	v.Credentials = brokerwire.Credentials{}
	return brokerwire.Mount{VolumeID: m.id, Path: m.path, Volume: v, Since: m.state.Since,
		Served: worker != nil && m.server == worker, Takeovers: m.state.Takeovers, Socket: m.state.Socket}
}

// setState changes the header in the memfd.
func (m *mount) setState(change func(*brokerwire.State)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.state
	change(&s)
	if err := brokerwire.WriteState(m.memfd, s); err != nil {
		return err
	}
	m.state = s
	return nil
}

// mountVolume mounts a volume, or refreshes one that is mounted at the same path. A failure
// leaves nothing mounted.
func (b *Broker) mountVolume(ctx context.Context, in brokerwire.Message) error {
	if in.Volume == nil || in.Volume.ID == "" || in.Path == "" {
		return fmt.Errorf("mount: volume and path are needed: %w", object.ErrInvalid)
	}
	b.mounting.Lock() // one at a time: the second mount of a volume must see the first
	defer b.mounting.Unlock()
	if m, err := b.lookup(in.Volume.ID); err == nil {
		if m.path != in.Path {
			return fmt.Errorf("volume %q is mounted at %s: %w", m.id, m.path, brokerwire.ErrExists)
		}
		return b.refresh(ctx, in)
	}
	b.setPending(in.Volume.ID)
	defer b.setPending("")
	if err := clearDead(in.Path, b.cfg.Name); err != nil {
		return err
	}
	if err := os.MkdirAll(in.Path, 0o750); err != nil {
		return fmt.Errorf("mount point %s: %w", in.Path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	s, err := b.current(ctx)
	if err != nil {
		return err
	}
	m, err := b.newMount(*in.Volume, in.Path)
	if err != nil {
		return err
	}
	m.adopting.Lock()
	err = m.adopt(ctx, s, true)
	m.adopting.Unlock()
	if err == nil {
		if err := setReadAhead(m.dev, b.cfg.ReadAhead); err != nil { // INIT would have lowered it
			b.cfg.Log.Warn("read-ahead", "path", m.path, "err", err)
		}
		b.enlist(m, s)
		err = m.ensureSocket(ctx, s)
	}
	if err != nil {
		b.discard(context.WithoutCancel(ctx), m)
		return err
	}
	b.cfg.Log.Info("mounted", "volume", m.id, "path", in.Path, "source", in.Volume.Source)
	return nil
}

// enlist adds a mount that s serves: from here on a worker that dies is followed by the next.
// One that came meanwhile did not find the mount.
func (b *Broker) enlist(m *mount, s *session) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mounts[m.id] = m
	if next := b.worker; next != nil && next != s {
		b.adoptions.Go(func() { b.handOver(next, m) })
	}
}

// newMount mounts and reads the kernel's INIT, which is answered by adopt.
func (b *Broker) newMount(v brokerwire.Volume, path string) (_ *mount, err error) {
	fuse, err := os.OpenFile("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse (is the fuse module loaded?): %w", err)
	}
	defer func() {
		if err != nil {
			fuse.Close()
		}
	}()
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=%d", fuse.Fd(), maxRead)
	if err := unix.Mount(b.cfg.Name, path, FSType, unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
		return nil, fmt.Errorf("mount %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Unmount(path, unix.MNT_DETACH))
		}
	}()
	init := make([]byte, 64<<10)
	n, err := unix.Read(int(fuse.Fd()), init) // the kernel has sent it by mount(2)
	if err != nil {
		return nil, fmt.Errorf("read INIT of %s: %w", path, err)
	}
	dev, err := mountDev(path)
	if err != nil {
		return nil, err
	}
	st := brokerwire.State{Volume: v, Path: path, Dev: dev, Since: time.Now(), InitIn: init[:n]}
	memfd, err := brokerwire.NewState(st)
	if err != nil {
		return nil, err
	}
	return &mount{id: v.ID, path: path, dev: dev, fuse: fuse, memfd: memfd, state: st, backing: map[int32]struct{}{}}, nil
}

// readopt is adopt for a mount that lost its worker, unless it has gone or s has it already.
func (m *mount) readopt(ctx context.Context, s *session) (bool, error) {
	m.adopting.Lock()
	defer m.adopting.Unlock()
	if m.gone.Load() || m.serves(s) {
		return false, nil
	}
	err := m.adopt(ctx, s, false)
	return err == nil, err
}

// adopt feeds a worker: it plays the kernel's INIT to it, checks that it answers as the first
// one did, whose answer goes to the kernel, and sends it the descriptors. Requires m.adopting.
func (m *mount) adopt(ctx context.Context, s *session, fresh bool) error {
	m.mu.Lock()
	st, files := m.state, []*os.File{m.fuse, m.memfd}
	listener := m.listener
	m.mu.Unlock()
	init, err := st.Ask()
	if err != nil {
		return err
	}
	defer init.Close()
	files = append(files, init.Theirs)
	if listener != nil {
		files = append(files, listener)
	}
	if _, _, err := s.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Adopt, Mount: m.id, Fresh: fresh}, files...); err != nil {
		return err
	}
	answer, err := init.Answer()
	if err == nil && !st.Negotiated() {
		err = m.answerInit(answer)
	}
	if err != nil {
		s.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Drop, Mount: m.id}) // its error is of no use: ours is returned
		return err
	}
	m.mu.Lock()
	m.server = s
	if m.expiry != nil {
		m.expiry.Stop()
		m.expiry = nil
	}
	if listener != nil && listener == m.listener {
		m.heard = s
	}
	m.mu.Unlock()
	if !fresh {
		return m.setState(func(st *brokerwire.State) { st.Takeovers++ })
	}
	return nil
}

func (m *mount) answerInit(answer []byte) error {
	if _, err := unix.Write(int(m.fuse.Fd()), answer); err != nil {
		return fmt.Errorf("answer INIT: %w", err)
	}
	// Behind the answer: a mount whose state has none, when a worker gives it back, is not finished.
	return m.setState(func(s *brokerwire.State) { s.InitOut = answer })
}

// ensureSocket binds domain/<uuid> through the mount and hands the listener to the worker.
// A worker with another uuid gets a socket of that name. If s dies meanwhile, whoever comes
// after it is asked instead: adopting is free.
func (m *mount) ensureSocket(ctx context.Context, s *session) error {
	m.binding.Lock()
	defer m.binding.Unlock()
	m.mu.Lock()
	bound := m.listener != nil && m.state.Socket == s.uuid
	m.mu.Unlock()
	if !bound {
		if err := m.bindSocket(ctx, s); err != nil {
			return err
		}
	}
	m.mu.Lock()
	s, l, heard := m.server, m.listener, m.heard
	m.mu.Unlock()
	if l == nil || heard == s {
		return nil
	}
	_, _, err := s.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Listen, Mount: m.id}, l)
	if errors.Is(err, object.ErrUnavailable) {
		return nil // it has died: the next one gets the listener with the mount
	}
	if err == nil {
		m.mu.Lock()
		m.heard = s
		m.mu.Unlock()
	}
	return err
}

// bindSocket makes domain/<uuid>. Requires m.binding.
func (m *mount) bindSocket(ctx context.Context, s *session) error {
	type result struct {
		l   *os.File
		err error
	}
	done := make(chan result, 1)
	go func() { // it asks the worker; if that dies it waits for the next one, or for the mount's end
		var l *os.File
		err := setReadOnly(m.path, false)
		if err == nil {
			l, err = bindThrough(m.path, s.uuid)
			err = errors.Join(err, setReadOnly(m.path, true))
		}
		done <- result{l, err}
	}()
	var l *os.File
	select {
	case r := <-done:
		if r.err != nil {
			return fmt.Errorf("bind domain/%s: %w", s.uuid, r.err)
		}
		l = r.l
	case <-ctx.Done():
		go func() { brokerwire.CloseFiles([]*os.File{(<-done).l}) }()
		return fmt.Errorf("bind domain/%s: %w", s.uuid, context.Cause(ctx))
	}
	m.mu.Lock()
	old := m.listener
	m.listener, m.heard = l, nil
	m.mu.Unlock()
	if old != nil {
		old.Close()
	}
	return m.setState(func(st *brokerwire.State) { st.Socket = s.uuid })
}

func (m *mount) volume() brokerwire.Volume {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Volume
}

// refresh puts new credentials into the memfd and tells the worker.
func (b *Broker) refresh(ctx context.Context, in brokerwire.Message) error {
	if in.Volume == nil {
		return fmt.Errorf("refresh: a volume is needed: %w", object.ErrInvalid)
	}
	m, err := b.lookup(in.Volume.ID)
	if err != nil {
		return err
	}
	if m.volume() == *in.Volume {
		return nil
	}
	if err := m.setState(func(s *brokerwire.State) { s.Volume = *in.Volume }); err != nil {
		return err
	}
	b.mu.Lock()
	s := b.worker
	b.mu.Unlock()
	if s == nil {
		return nil // the next worker reads the memfd
	}
	_, _, err = s.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Reload, Mount: m.id})
	return err
}

// discard undoes a mount.
func (b *Broker) discard(ctx context.Context, m *mount) {
	if err := unix.Unmount(m.path, unix.MNT_DETACH); err != nil {
		b.cfg.Log.Error("unmount", "path", m.path, "err", err)
	}
	b.release(ctx, m)
}

// orphaned notes that the mount's worker has gone. Its readers wait for the next one, until
// the deadline: then expire lets them fail.
func (m *mount) orphaned(s *session, deadline time.Duration, expire func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.server != s || m.gone.Load() {
		return
	}
	m.server, m.lost = nil, time.Now()
	m.expiry = time.AfterFunc(deadline, expire)
}

// expire ends a mount to which no worker returned, so that its pods can end: the connection is
// aborted, reads fail, and Unmount finds nobody waiting.
func (b *Broker) expire(m *mount) {
	m.mu.Lock()
	served := m.server != nil
	m.mu.Unlock()
	if served {
		return
	}
	b.giveUp(m, fmt.Sprintf("no cache worker returned within %v, so its mount was given up", b.cfg.TakeoverDeadline))
}

// giveUp aborts a mount's connection: what waits fails.
func (b *Broker) giveUp(m *mount, why string) {
	b.cfg.Log.Error("a mount is given up, its pods must be restarted", "volume", m.id, "path", m.path, "why", why)
	paths, err := otherMounts(m.dev, "")
	if err != nil {
		b.cfg.Log.Error("where a mount is published", "volume", m.id, "err", err)
	}
	if err := abort(m.dev); err != nil { // else the connection ends with its last descriptor, which should be ours
		b.cfg.Log.Warn("abort connection", "path", m.path, "err", err)
	}
	b.release(context.Background(), m)
	b.lost(paths, why)
}

func (b *Broker) lost(paths []string, why string) {
	if b.cfg.Lost != nil && len(paths) > 0 {
		b.cfg.Lost(paths, why)
	}
}

// watchLost ends a mount whose kernel cannot deliver requests again and that lost some with its
// worker: they would wait for ever. None was lost if, at any moment until the deadline, none waits.
func (b *Broker) watchLost(m *mount) {
	t := time.NewTicker(lostSample)
	defer t.Stop()
	for end := time.Now().Add(b.cfg.TakeoverDeadline); time.Now().Before(end); {
		n, err := waiting(m.dev)
		if err != nil || n == 0 || m.gone.Load() {
			return
		}
		select {
		case <-t.C:
		case <-b.stopping:
			return
		}
	}
	b.giveUp(m, "requests were lost with a cache worker, on a kernel without FUSE_NOTIFY_RESEND, so its mount was given up")
}

const lostSample = 100 * time.Millisecond

func (m *mount) canResend() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.CanResend()
}

// reconcile removes mounts of this broker's name that nobody holds: both holders died. Only after a
// worker has given back what it held.
func (b *Broker) reconcile() error {
	b.mounting.Lock()
	defer b.mounting.Unlock()
	held := map[uint64]bool{}
	b.mu.Lock()
	for _, m := range b.mounts {
		held[m.dev] = true
	}
	b.mu.Unlock()
	dead, err := removeDead(b.cfg.Name, held)
	for _, path := range dead {
		b.cfg.Log.Error("removed a dead mount: worker and broker had both died; pods that used it must be restarted", "path", path)
	}
	b.lost(dead, "its cache worker and the node plugin had both died")
	return err
}

// release lets go of a mount that is no longer in the mount table.
func (b *Broker) release(ctx context.Context, m *mount) {
	if m.gone.Swap(true) {
		return
	}
	b.mu.Lock()
	if b.mounts[m.id] == m {
		delete(b.mounts, m.id)
	}
	s := b.worker
	b.mu.Unlock()
	if s != nil {
		ctx, cancel := context.WithTimeout(ctx, dropTimeout)
		defer cancel()
		if _, _, err := s.peer.Call(ctx, brokerwire.Message{Verb: brokerwire.Drop, Mount: m.id}); err != nil && !errors.Is(err, object.ErrNotFound) {
			b.cfg.Log.Warn("drop", "volume", m.id, "err", err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.expiry != nil {
		m.expiry.Stop()
	}
	m.fuse.Close()
	m.memfd.Close()
	if m.listener != nil {
		m.listener.Close()
	}
}

// unmount removes whatever is mounted at path; a volume with it if that was its FUSE mount.
func (b *Broker) unmount(ctx context.Context, path string) error {
	if path == "" {
		return fmt.Errorf("unmount: a path is needed: %w", object.ErrInvalid)
	}
	b.mounting.Lock()
	defer b.mounting.Unlock()
	m := b.at(path)
	if m != nil {
		if others, err := otherMounts(m.dev, path); err != nil || len(others) > 0 {
			return errors.Join(err, fmt.Errorf("volume %q is still published at %q: %w", m.id, others, object.ErrBusy))
		}
	}
	if err := unmountAll(path); err != nil {
		return err
	}
	if m != nil {
		b.release(ctx, m)
		b.cfg.Log.Info("unmounted", "volume", m.id, "path", path)
	}
	return nil
}

func (b *Broker) at(path string) *mount {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range b.mounts {
		if m.path == path {
			return m
		}
	}
	return nil
}

// unmountEverything removes every mount and its binds: `larder up` leaves none.
func (b *Broker) unmountEverything() error {
	b.mu.Lock()
	held := make([]*mount, 0, len(b.mounts))
	for _, m := range b.mounts {
		held = append(held, m)
	}
	b.mu.Unlock()
	var errs []error
	for _, m := range held {
		paths, err := otherMounts(m.dev, "")
		errs = append(errs, err)
		for _, p := range paths {
			if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
				errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
			}
		}
		b.release(context.Background(), m)
	}
	return errors.Join(errs...)
}

// bind shows a volume, or its data/, at a target. The new mount is read-only before
// anybody can see it.
func (b *Broker) bind(in brokerwire.Message) error {
	m, err := b.lookup(in.Mount)
	if err != nil {
		return err
	}
	if in.Target == "" {
		return fmt.Errorf("bind: a target is needed: %w", object.ErrInvalid)
	}
	return bindTree(m.path, in.Sub, in.Target, in.ReadOnly, m.dev)
}
