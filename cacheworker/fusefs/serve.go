package fusefs

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
)

const (
	maxRequest    = 1 << 20 // bytes of a READ
	maxBackground = 64      // READs of the kernel's read-ahead under way at once

	notifyResend = 7 // FUSE_NOTIFY_RESEND
)

// Adopt takes a mount: device is its /dev/fuse, memfd its state, init the socket on which the
// broker plays the kernel's INIT. fresh says that no worker served it before; otherwise the
// node table is read from the memfd, to which an earlier worker may still append: it may go on
// serving until CatchUp is called. On success device and memfd are the mount's; init is
// consumed in any case. CatchUp and Serve, or End, have to follow.
func Adopt(cfg Config, device, memfd, init *os.File, fresh bool, uuid string) (_ *Served, err error) {
	st, err := brokerwire.ReadState(memfd)
	if err != nil {
		init.Close()
		return nil, err
	}
	m := newMount(cfg, memfd, uuid)
	if m.table.foreign = !fresh; !fresh {
		if err := m.table.load(); err != nil {
			init.Close()
			return nil, err
		}
	}
	// go-fuse takes the descriptor by its number and closes it itself.
	fd, err := unix.FcntlInt(init.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	init.Close()
	if err != nil {
		return nil, fmt.Errorf("dup INIT socket: %w", err)
	}
	srv, err := fuse.NewServer(counted{m}, fmt.Sprintf("/dev/fd/%d", fd), m.options(st.Negotiated()))
	if err == nil {
		err = touchBuffers(srv)
	}
	if err != nil {
		return nil, fmt.Errorf("answer INIT of %s: %w", st.Path, err)
	}
	if err := unix.Dup3(int(device.Fd()), fd, unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("take over %s: %w", st.Path, err)
	}
	if offersExpire(st.InitIn) {
		m.notify = func(b []byte) error { _, err := unix.Write(int(device.Fd()), b); return err }
	}
	m.store = srv.InodeNotifyStoreCache
	return &Served{Mount: m, srv: srv, fd: fd, device: device, fresh: fresh}, nil
}

// options are what INIT is answered with: by a first worker, or by a later one, which is offered what was negotiated and has to
// take it.
func (m *Mount) options(later bool) *fuse.MountOptions {
	f := m.cfg.Features
	o := &fuse.MountOptions{
		MaxWrite:      maxRequest,
		MaxBackground: maxBackground,
		IDMappedMount: true,
		MaxStackDepth: 1,
		DisableSplice: !f.Splice,
		Debug:         m.cfg.logRequests,
		Logger:        slog.NewLogLogger(m.cfg.Log.Handler(), slog.LevelWarn),
		// All that a later version may want: it cannot be asked for again. Not ASYNC_DIO: a process that
		// waits for an O_DIRECT read could not be killed.
		ExtraCapabilities: fuse.CAP_HAS_RESEND | fuse.CAP_DIRECT_IO_ALLOW_MMAP,
	}
	if !later {
		o.DisabledCapabilities |= fuse.CAP_AUTO_INVAL_DATA // or each read compares attributes, which never change
	}
	if !f.Passthrough {
		o.DisabledCapabilities |= fuse.CAP_PASSTHROUGH
	}
	if !f.Resend {
		o.DisabledCapabilities |= fuse.CAP_HAS_RESEND
	}
	return o
}

// Init implements fuse.RawFileSystem: INIT has been answered.
func (m *Mount) Init(s *fuse.Server) {
	kernel := s.KernelSettings().Flags64()
	m.negotiated = m.cfg.Features.Passthrough && kernel&fuse.CAP_PASSTHROUGH != 0
	m.pass.Store(m.negotiated)
	m.resend = m.cfg.Features.Resend && kernel&fuse.CAP_HAS_RESEND != 0
}

// Served is a mount with its server.
type Served struct {
	*Mount
	srv    *fuse.Server
	fd     int // go-fuse's own number of the device
	device *os.File
	fresh  bool
	once   sync.Once

	serving atomic.Bool
}

// CatchUp makes the mount this worker's, whose earlier one has ended: it reads what that one has
// noted since Adopt.
func (s *Served) CatchUp() error {
	t := s.table
	t.mu.Lock()
	if !t.foreign {
		t.mu.Unlock()
		return nil
	}
	if err := t.readOn(); err != nil {
		t.mu.Unlock()
		return err
	}
	t.foreign = false
	backed := slices.Collect(maps.Keys(t.backed))
	t.mu.Unlock()
	s.later(func() { // readers wait
		for _, id := range backed {
			if d := s.data.Load(); !d.Peek(id).Exists || d.Unlinked(id) { // evicted since
				s.Evicted(id)
			}
		}
		for _, n := range t.sweep() {
			s.letGo(n)
		}
	})
	return nil
}

// Serve answers requests until the file system is unmounted everywhere, or the connection
// aborted. What an earlier worker has read and not answered the kernel delivers again.
func (s *Served) Serve() {
	s.serving.Store(true)
	if !s.fresh && s.resend {
		s.askAgain()
	}
	s.srv.Serve()
	s.End()
}

// Detach takes the connection away from this process's server: what it still answers reaches nobody, and
// the next worker is asked again. For a process that is about to end, and after AwaitReaders also for one
// that is not.
func (s *Served) Detach() error {
	// Reads of it wait, for the end of the process: its other end stays open.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	defer unix.Close(pair[0])
	if err := unix.Dup3(pair[0], s.fd, unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	s.table.detach()
	s.close()
	return nil
}

// AwaitReaders returns when no thread of this process is in a read(2) any more that has begun before,
// and could still take a request of a mount that was detached. A signal interrupts it, and is
// not pending any more when the thread has left the kernel; a restarted read finds another file.
func AwaitReaders(ctx context.Context) error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	const sig = unix.SIGURG // which the Go runtime handles, in each of its threads, and takes for nothing
	for _, t := range threads {
		tid, err := strconv.Atoi(t.Name())
		if err == nil {
			err = unix.Tgkill(os.Getpid(), tid, sig)
		}
		if err != nil && err != unix.ESRCH {
			return fmt.Errorf("interrupt thread %s: %w", t.Name(), err)
		}
	}
	tick := time.NewTicker(100 * time.Microsecond) // nothing tells
	defer tick.Stop()
	for _, t := range threads {
		for pending(t.Name(), sig) {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return fmt.Errorf("thread %s stays in the kernel: %w", t.Name(), context.Cause(ctx))
			}
		}
	}
	return nil
}

// pending reports whether a thread has not taken a signal that was sent to it.
func pending(tid string, sig unix.Signal) bool {
	b, err := os.ReadFile("/proc/self/task/" + tid + "/status")
	if err != nil { // it has ended
		return false
	}
	_, mask, _ := strings.Cut(string(b), "SigPnd:")
	mask, _, _ = strings.Cut(mask, "\n")
	bits, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
	return err != nil || bits>>(sig-1)&1 == 1
}

// askAgain has the kernel deliver every request again that was read and not answered.
func (s *Served) askAgain() {
	var h [16]byte // struct fuse_out_header: length, error = code, unique = 0
	binary.LittleEndian.PutUint32(h[0:], uint32(len(h)))
	binary.LittleEndian.PutUint32(h[4:], notifyResend)
	if _, err := unix.Write(int(s.device.Fd()), h[:]); err != nil {
		s.cfg.Log.Warn("resend", "volume", s.cfg.Volume.ID, "err", err)
		return
	}
	s.cfg.Counters.Resends.Add(1)
}

// End lets go of a mount that is unmounted, or was not served.
func (s *Served) End() {
	s.once.Do(func() {
		s.finish()
		if !s.serving.Load() {
			if err := s.giveUp(); err != nil {
				s.cfg.Log.Error("let go of a mount that was not served", "volume", s.cfg.Volume.ID, "err", err)
			}
		}
		s.table.mu.Lock()
		defer s.table.mu.Unlock()
		for n := range s.table.nodes.all() {
			if n.file != nil && n.file.reader != nil {
				n.file.reader.Close()
				n.file.reader = nil
			}
		}
		s.table.log.Close()
		s.device.Close()
	})
}

// giveUp closes the connection of a mount that was not served. The descriptor's number is go-fuse's, which
// closes it when the server is collected: closed here it would be somebody else's by then.
func (s *Served) giveUp() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1]) // reads of the other end are at an end
	return unix.Dup3(pair[0], s.fd, unix.O_CLOEXEC)
}

// TryPassthrough is for when there is another broker: it may know a tier that the last one refused files of.
func (m *Mount) TryPassthrough() { m.pass.Store(m.negotiated) }

// Passthrough and Resend report what was negotiated.
func (m *Mount) Passthrough() bool { return m.pass.Load() }

// Resend reports whether requests survive the worker that read them.
func (m *Mount) Resend() bool { return m.resend }

// Hold returns what the broker is given back after its death: the files, which stay the
// mount's, and the backing ids that nodes have.
func (s *Served) Hold() (device, memfd *os.File, backings []int32) {
	s.table.mu.RLock()
	defer s.table.mu.RUnlock()
	for _, nodes := range s.table.backed {
		for _, n := range nodes {
			backings = append(backings, n.file.backing)
		}
	}
	return s.device, s.table.log, backings
}

// Nodes is how many the kernel may name.
func (m *Mount) Nodes() int {
	m.table.mu.RLock()
	defer m.table.mu.RUnlock()
	return m.table.nodes.len()
}

// Stats of the mount.
func (m *Mount) Stats() (nodes, open int) {
	m.table.mu.RLock()
	defer m.table.mu.RUnlock()
	for n := range m.table.nodes.all() {
		if n.file != nil {
			open += int(n.file.opens)
		}
	}
	return m.table.nodes.len(), open
}
