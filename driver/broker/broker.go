// Package broker is the only privileged code of Larder: it mounts, binds, unmounts, holds
// FUSE descriptors and registers backing files.
//
// What it holds of a mount (the /dev/fuse descriptor, the memfd with everything that belongs
// to it, the listening domain socket) the worker holds too: either may be killed, the other
// gives it back, and no reader sees an error. A worker is untrusted: what it sends is
// checked here, and it can name nothing but mounts, node ids and descriptors.
package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// Config of a broker.
type Config struct {
	Name      string // of its mounts in the mount table, their "source"; "" means larder
	Socket    string // path of its own socket
	WorkerUID uint32 // only this user may be the worker
	TierDir   string // the cache directory; its file system is where backing files may be
	ViewDir   string // where TierDir is shown read-only; "" makes no view
	ReadAhead int64  // bytes the kernel asks ahead in a mount; 0 means 256 KiB

	// TakeoverDeadline is how long a mount waits for its next worker; 0 means 10 minutes.
	TakeoverDeadline time.Duration

	// OwnsView mounts the view at start, unless it is there; it stays (see RemoveView).
	OwnsView bool
	// UnmountAtExit removes every mount when Run returns; otherwise the worker keeps them.
	UnmountAtExit bool

	// Lost is told where mounts were that are given up or found dead, and why; it must not wait. May be nil.
	Lost func(paths []string, why string)

	Log *slog.Logger
}

// Validate reports all mistakes at once.
func (c Config) Validate() error {
	var errs []error
	for _, p := range []struct{ name, path string }{{"broker socket", c.Socket}, {"tier", c.TierDir}} {
		if p.path == "" {
			errs = append(errs, fmt.Errorf("%s: a path is needed", p.name))
		}
	}
	if c.TakeoverDeadline < 0 {
		errs = append(errs, fmt.Errorf("take-over deadline %v is negative", c.TakeoverDeadline))
	}
	if c.ReadAhead < 0 {
		errs = append(errs, fmt.Errorf("read-ahead %d is negative", c.ReadAhead))
	}
	return errors.Join(errs...)
}

// Broker holds the mounts of a node.
type Broker struct {
	cfg Config
	dev uint64 // st_dev of the tier

	adoptions sync.WaitGroup // hand-overs under way
	stopping  chan struct{}  // closed when Run ends
	takeovers atomic.Int64   // since the start
	stalled   atomic.Int64   // nanoseconds that mounts were without a worker before those
	mounting  sync.Mutex     // one mount or unmount at a time; held across both

	mu      sync.Mutex // guards the fields below; never held across a call to the worker or a mount
	mounts  map[string]*mount
	pending string        // id of the volume that is being mounted
	worker  *session      // nil while there is none
	came    chan struct{} // closed when a worker comes; then replaced
}

// session is a connected worker.
type session struct {
	peer *brokerwire.Peer
	uid  uint32

	mu   sync.Mutex // guards the fields below, which Hello sets once
	role brokerwire.Role
	uuid string
}

// New checks the configuration. Nothing is mounted before Run.
func New(cfg Config) (*Broker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Name == "" {
		cfg.Name = "larder"
	}
	if cfg.TakeoverDeadline == 0 {
		cfg.TakeoverDeadline = 10 * time.Minute
	}
	if cfg.ReadAhead == 0 {
		cfg.ReadAhead = 256 << 10
	}
	return &Broker{cfg: cfg, mounts: map[string]*mount{}, came: make(chan struct{}), stopping: make(chan struct{})}, nil
}

// Run serves the socket until ctx ends.
func (b *Broker) Run(ctx context.Context) (err error) {
	var st unix.Stat_t
	if err := unix.Stat(b.cfg.TierDir, &st); err != nil {
		return fmt.Errorf("tier %s: %w", b.cfg.TierDir, err)
	}
	b.dev = st.Dev
	if b.cfg.OwnsView {
		if err := makeView(b.cfg.TierDir, b.cfg.ViewDir); err != nil {
			return err
		}
	}
	warnTimeout(b.cfg.Log)
	if err := mountFusectl(); err != nil {
		b.cfg.Log.Warn("no fusectl: a mount without a worker cannot be aborted while a stopped process holds it", "err", err)
	}
	l, err := brokerwire.ListenPacket(b.cfg.Socket, 0o666) // who may do what is decided by SO_PEERCRED
	if err != nil {
		return err
	}
	defer os.Remove(b.cfg.Socket)
	defer b.adoptions.Wait()
	defer close(b.stopping)
	g, gctx := errgroup.WithContext(ctx)
	context.AfterFunc(gctx, func() { l.Close() })
	if b.cfg.UnmountAtExit {
		defer func() { err = errors.Join(err, b.unmountEverything()) }()
	}
	for {
		c, aerr := l.AcceptUnix()
		if aerr != nil {
			if gctx.Err() != nil {
				return g.Wait()
			}
			return errors.Join(fmt.Errorf("accept: %w", aerr), g.Wait())
		}
		g.Go(func() error { b.serve(gctx, c); return nil })
	}
}

// serve answers one connection. Its first message says who it is; the kernel says whether
// that may be.
func (b *Broker) serve(ctx context.Context, c *net.UnixConn) {
	uid, err := peerUID(c)
	if err != nil {
		b.cfg.Log.Error("peer credentials", "err", err)
		c.Close()
		return
	}
	s := &session{uid: uid}
	s.peer = brokerwire.NewPeer(c, func(ctx context.Context, m brokerwire.Message, files []*os.File) (brokerwire.Message, []*os.File, error) {
		return b.dispatch(ctx, s, m, files)
	})
	if err := s.peer.Run(ctx); err != nil {
		b.cfg.Log.Warn("broker connection", "err", err)
	}
	b.leave(s)
}

// admit checks a Hello.
func (b *Broker) admit(s *session, m brokerwire.Message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.role != "" {
		return fmt.Errorf("said hello already: %w", object.ErrInvalid)
	}
	if m.Version != brokerwire.Version {
		return fmt.Errorf("protocol version %d, this broker speaks %d: %w", m.Version, brokerwire.Version, object.ErrInvalid)
	}
	switch {
	case m.Role == brokerwire.RoleNode && s.uid == uint32(os.Getuid()):
		s.role = m.Role
		return nil
	case m.Role == brokerwire.RoleWorker && s.uid == b.cfg.WorkerUID:
		if m.UUID == "" {
			return fmt.Errorf("a worker has a uuid: %w", object.ErrInvalid)
		}
		s.role, s.uuid = m.Role, m.UUID
		b.welcome(s)
		return nil
	}
	return fmt.Errorf("uid %d may not be %q: %w", s.uid, m.Role, object.ErrDenied)
}

var verbs = map[brokerwire.Role][]brokerwire.Verb{
	brokerwire.RoleNode: {brokerwire.MountVolume, brokerwire.RefreshVolume, brokerwire.Bind, brokerwire.Unmount, brokerwire.Mounts},
	brokerwire.RoleWorker: {brokerwire.Give, brokerwire.Given, brokerwire.Register, brokerwire.Unregister, brokerwire.Replace,
		brokerwire.Mounts},
}

// may reports whether the peer's role has the verb.
func (s *session) may(v brokerwire.Verb) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(verbs[s.role], v) {
		return fmt.Errorf("verb %q is not for role %q: %w", v, s.role, object.ErrDenied)
	}
	return nil
}

// isCurrent refuses what a worker still asks that another one has replaced.
func (b *Broker) isCurrent(s *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.role == brokerwire.RoleWorker && b.worker != s {
		return fmt.Errorf("another worker has taken over: %w", object.ErrUnavailable)
	}
	return nil
}

func (b *Broker) dispatch(ctx context.Context, s *session, m brokerwire.Message, files []*os.File) (brokerwire.Message, []*os.File, error) {
	var r brokerwire.Message
	if m.Verb == brokerwire.Hello {
		return brokerwire.Message{Version: brokerwire.Version}, nil, b.admit(s, m)
	}
	err := s.may(m.Verb)
	if err == nil {
		err = b.isCurrent(s)
	}
	if err != nil {
		return r, nil, err
	}
	switch m.Verb {
	case brokerwire.MountVolume:
		err = b.mountVolume(ctx, m)
	case brokerwire.RefreshVolume:
		err = b.refresh(ctx, m)
	case brokerwire.Bind:
		err = b.bind(m)
	case brokerwire.Unmount:
		err = b.unmount(ctx, m.Path)
	case brokerwire.Mounts:
		r.List = b.list()
	case brokerwire.Give:
		err = b.takeBack(s, m, files)
	case brokerwire.Given:
		err = b.reconcile()
	case brokerwire.Register:
		r.Backing, err = b.register(m, files)
	case brokerwire.Unregister:
		err = b.unregister(m)
	case brokerwire.Replace:
		err = b.replace(m, files)
	}
	return r, nil, err
}

// welcome makes s the worker. One that is still connected is replaced: it is dead, or
// hands over.
func (b *Broker) welcome(s *session) {
	b.mu.Lock()
	old := b.worker
	b.worker = s
	close(b.came)
	b.came = make(chan struct{})
	held := make([]*mount, 0, len(b.mounts))
	for _, m := range b.mounts {
		held = append(held, m)
	}
	b.mu.Unlock()
	if old != nil {
		old.peer.Close()
	}
	b.cfg.Log.Info("worker connected", "uuid", s.uuid, "mounts", len(held))
	// The reply to Hello comes first; the adoptions follow it on the same connection.
	for _, m := range held {
		b.adoptions.Go(func() { b.handOver(s, m) })
	}
}

// handOver gives a mount that lost its worker to the next one.
func (b *Broker) handOver(s *session, m *mount) {
	ctx, cancel := context.WithTimeout(context.Background(), adoptTimeout)
	defer cancel()
	if adopted, err := m.readopt(ctx, s); err != nil {
		b.cfg.Log.Error("take-over", "volume", m.id, "err", err)
		return
	} else if !adopted {
		return
	}
	m.mu.Lock()
	stall := time.Since(m.lost)
	m.mu.Unlock()
	if !m.canResend() {
		b.adoptions.Go(func() { b.watchLost(m) })
	}
	b.takeovers.Add(1)
	b.stalled.Add(int64(stall))
	if err := m.ensureSocket(ctx, s); err != nil {
		b.cfg.Log.Error("bind domain socket", "volume", m.id, "err", err)
	}
	b.cfg.Log.Info("take-over", "volume", m.id, "worker", s.uuid, "without", stall)
}

func (b *Broker) leave(s *session) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range b.mounts {
		m.orphaned(s, b.cfg.TakeoverDeadline, func() { b.expire(m) })
	}
	if b.worker == s {
		b.worker = nil
		b.cfg.Log.Info("worker disconnected", "uuid", s.uuid, "mounts", len(b.mounts))
	}
}

// current is the connected worker; it waits for one until ctx ends.
func (b *Broker) current(ctx context.Context) (*session, error) {
	for {
		b.mu.Lock()
		s, came := b.worker, b.came
		b.mu.Unlock()
		if s != nil {
			return s, nil
		}
		select {
		case <-came:
		case <-ctx.Done():
			return nil, fmt.Errorf("no cache worker is running on this node: %w", object.ErrUnavailable)
		}
	}
}

func (b *Broker) lookup(id string) (*mount, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if m := b.mounts[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("volume %q is not mounted: %w", id, object.ErrNotFound)
}

func (b *Broker) list() []brokerwire.Mount {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]brokerwire.Mount, 0, len(b.mounts))
	for _, m := range b.mounts {
		out = append(out, m.info(b.worker))
	}
	return out
}

func peerUID(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return cred.Uid, nil
}
