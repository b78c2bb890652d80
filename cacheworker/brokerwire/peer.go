package brokerwire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// Handler answers one request. files are the caller's to close, except those that the
// handler has set to nil because it keeps them. The files it returns are sent and closed.
type Handler func(ctx context.Context, m Message, files []*os.File) (Message, []*os.File, error)

// Peer is one end of a connection: it calls, and it answers. Safe for concurrent use.
type Peer struct {
	conn   *net.UnixConn
	handle Handler

	sendMu sync.Mutex // one datagram at a time; held across sendmsg

	mu     sync.Mutex // guards the fields below
	next   uint64
	calls  map[uint64]chan reply
	closed error
}

type reply struct {
	m     Message
	files []*os.File
}

// NewPeer wraps a connected SOCK_SEQPACKET socket. Nothing is read before Run.
func NewPeer(conn *net.UnixConn, handle Handler) *Peer {
	return &Peer{conn: conn, handle: handle, calls: map[uint64]chan reply{}}
}

// Run reads until the peer has gone or ctx ends, answers requests, each in its own goroutine, and
// waits for them. Calls under way fail with object.ErrUnavailable.
func (p *Peer) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { p.conn.Close() })
	defer stop()
	var answering sync.WaitGroup
	defer answering.Wait()
	defer cancel()

	buf, oob := make([]byte, maxMessage+1), make([]byte, unix.CmsgSpace(4*maxFDs)*2)
	for {
		m, files, err := receive(p.conn, buf, oob)
		if errors.Is(err, object.ErrInvalid) {
			p.refuse(m, err)
			continue
		}
		if err != nil {
			p.hangUp(err)
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
				return nil
			}
			return err
		}
		if m.Verb == "" {
			p.deliver(m, files)
			continue
		}
		answering.Go(func() { p.answer(ctx, m, files) })
	}
}

// refuse answers a request that does not parse; a reply that does not is its call's error.
func (p *Peer) refuse(m Message, err error) {
	if m.Verb == "" {
		p.deliver(withID(fail(err), m.ID), nil)
		return
	}
	p.send(withID(fail(err), m.ID), nil)
}

func withID(m Message, id uint64) Message { m.ID = id; return m }

func (p *Peer) answer(ctx context.Context, m Message, files []*os.File) {
	r, out, err := p.handle(ctx, m, files)
	CloseFiles(files) // before the reply, which says that they are done with
	defer CloseFiles(out)
	if err != nil {
		r, out = fail(err), nil
	}
	p.send(withID(r, m.ID), out) // a peer that has gone needs no answer
}

func (p *Peer) send(m Message, files []*os.File) error {
	p.sendMu.Lock()
	defer p.sendMu.Unlock()
	return send(p.conn, m, files)
}

func (p *Peer) deliver(m Message, files []*os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ch := p.calls[m.ID]
	delete(p.calls, m.ID)
	if ch == nil {
		CloseFiles(files) // its caller gave up
		return
	}
	ch <- reply{m, files} // has room for one
}

func (p *Peer) hangUp(err error) {
	p.conn.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = fmt.Errorf("connection ended (%v): %w", err, object.ErrUnavailable)
	for id, ch := range p.calls {
		delete(p.calls, id)
		close(ch)
	}
}

// Call sends a request with descriptors (which stay the caller's) and waits for its reply,
// whose descriptors are then the caller's. The error is the peer's, as a sentinel of
// package object where it was one, or object.ErrUnavailable if the peer has gone.
func (p *Peer) Call(ctx context.Context, m Message, files ...*os.File) (Message, []*os.File, error) {
	ch := make(chan reply, 1)
	p.mu.Lock()
	if p.closed != nil {
		p.mu.Unlock()
		return Message{}, nil, p.closed
	}
	p.next++
	m.ID = p.next
	p.calls[m.ID] = ch
	p.mu.Unlock()

	if err := p.send(m, files); err != nil {
		p.forget(m.ID, ch)
		return Message{}, nil, fmt.Errorf("%s: %w", m.Verb, gone(err))
	}
	select {
	case r, ok := <-ch:
		if !ok {
			return Message{}, nil, fmt.Errorf("%s: peer has gone: %w", m.Verb, object.ErrUnavailable)
		}
		if err := r.m.Err(); err != nil {
			CloseFiles(r.files)
			return Message{}, nil, err
		}
		return r.m, r.files, nil
	case <-ctx.Done():
		p.forget(m.ID, ch)
		return Message{}, nil, fmt.Errorf("%s: %w", m.Verb, context.Cause(ctx))
	}
}

// gone is what a failed send means: the peer is unavailable, unless we asked for nonsense.
func gone(err error) error {
	if errors.Is(err, object.ErrInvalid) {
		return err
	}
	return fmt.Errorf("%v: %w", err, object.ErrUnavailable)
}

// forget gives a call up; a reply that is already there is dropped.
func (p *Peer) forget(id uint64, ch chan reply) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.calls, id)
	select {
	case r := <-ch:
		CloseFiles(r.files)
	default:
	}
}

// Close ends the connection; Run returns.
func (p *Peer) Close() error { return p.conn.Close() }

// Dial connects to the broker's socket. Paths may be longer than the 108 bytes of sun_path.
func Dial(ctx context.Context, path string) (*net.UnixConn, error) {
	return dial(ctx, "unixpacket", path)
}

// DialStream is Dial for SOCK_STREAM.
func DialStream(ctx context.Context, path string) (*net.UnixConn, error) {
	return dial(ctx, "unix", path)
}

func dial(ctx context.Context, network, path string) (*net.UnixConn, error) {
	dir, err := openDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", path, err)
	}
	defer dir.Close()
	var d net.Dialer
	c, err := d.DialContext(ctx, network, throughFD(dir, path))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %v: %w", path, err, object.ErrUnavailable)
	}
	return c.(*net.UnixConn), nil
}

// ListenPacket listens at path with the given mode; a socket file left there is replaced.
func ListenPacket(path string, mode os.FileMode) (*net.UnixListener, error) {
	return listen("unixpacket", path, mode)
}

// ListenStream is ListenPacket for SOCK_STREAM; mode 0 leaves it to the file system.
func ListenStream(path string, mode os.FileMode) (*net.UnixListener, error) {
	return listen("unix", path, mode)
}

func listen(network, path string, mode os.FileMode) (*net.UnixListener, error) {
	dir, err := openDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", path, err)
	}
	defer dir.Close()
	if err := unix.Unlinkat(int(dir.Fd()), filepath.Base(path), 0); err != nil && err != unix.ENOENT {
		return nil, fmt.Errorf("listen %s: remove the old socket: %w", path, err)
	}
	l, err := net.Listen(network, throughFD(dir, path))
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", path, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // the name was bound through a descriptor that is closed by then
	if mode == 0 {
		return l.(*net.UnixListener), nil
	}
	if err := os.Chmod(throughFD(dir, path), mode); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen %s: %w", path, err)
	}
	return l.(*net.UnixListener), nil
}

func openDir(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

func throughFD(dir *os.File, path string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
}
