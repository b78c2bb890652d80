// Package domainsocket serves one volume over a Unix domain socket: the short circuit of
// pods that sit on the worker's node. A client asks for a file and is given its descriptor
// where the cache has all of it, else its bytes.
//
// Reaching the socket is the authorisation (DESIGN §5.5): a server knows one [Volume] and
// nothing else can be named through it. The listening socket outlives this process, because
// others hold it too: it is never shut down and its file never removed, so connect()
// succeeds while no worker lives, and the next one answers.
//
// A lease lives no longer than the connection that asked for it, so that a client that dies
// gives up what it holds. What one client can take is bounded (see [Config]), and a client
// that does not read its replies keeps nobody waiting but itself.
//
// The protocol is in PROTOCOL.md, byte by byte; package shortcircuit is its Go client.
package domainsocket

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/internal/wire"
	"github.com/larderfs/larder/cacheworker/object"
)

// Volume is what a socket serves. Paths were checked: "" is the root of data/, else segments
// parted by single slashes, none of them empty, ".", "..", over-long or with a NUL. Errors wrap the
// sentinels of package object; their text is sent to the client, so it must name nothing outside the volume.
// All methods are safe for concurrent use and return soon after their context has ended.
type Volume interface {
	Stat(ctx context.Context, path string) (Entry, error)

	// List gives at most max entries of a folder behind the name after ("" = from the start),
	// in key order, and whether there are more.
	List(ctx context.Context, path, after string, max int) (entries []Entry, more bool, err error)

	// Open opens a file with the volume's own credential: object.ErrDenied without a grant.
	// It is an object.ErrInvalid to open a folder.
	Open(ctx context.Context, path string) (File, error)

	Status(ctx context.Context) Status
}

// File is one open object. The server holds it until the client releases it or goes away.
type File interface {
	Object() object.Object

	// ReadAt is short only at the end of the object.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)

	// Descriptor gives an open file description of its own on each call, read-only for root
	// too (DESIGN §5.6), which the caller closes; object.ErrIncomplete where none can be given.
	Descriptor() (*os.File, error)

	Close() error
}

// Entry is one file or folder as a client sees it.
type Entry = wire.Entry

// Status is what a volume says of itself and its worker.
type Status struct {
	VolumeID      string
	Worker        string // UUID
	CachedBytes   int64  // of the whole cache
	CapacityBytes int64
}

// Config of a server; every zero has a default.
type Config struct {
	Volume   Volume // required
	Counters *Counters
	Log      *slog.Logger

	Connections int           // at once; more are told to try again. 0 means 256
	Leases      int           // of all connections. 0 means 4096
	ConnLeases  int           // of one connection. 0 means 1024
	Requests    int           // in flight on one connection. 0 means 64
	ReplyBytes  int64         // of replies to reads, in memory for one connection; at least one frame. 0 means 2 MiB
	Hello       time.Duration // how long a client may take to say hello. 0 means 10 s
}

// Counters are shared by all servers of a worker.
type Counters struct {
	Clients     atomic.Int64 // now
	Requests    atomic.Uint64
	Descriptors atomic.Uint64 // given
	ReadBytes   atomic.Uint64 // in replies
}

func (c Config) withDefaults() Config {
	set := func(p *int, n int) {
		if *p <= 0 {
			*p = n
		}
	}
	set(&c.Connections, 256)
	set(&c.Leases, 4096)
	set(&c.ConnLeases, 1024)
	set(&c.Requests, 64)
	if c.ReplyBytes <= 0 {
		c.ReplyBytes = 2 << 20
	}
	c.ReplyBytes = max(c.ReplyBytes, wire.MaxReply)
	if c.Hello <= 0 {
		c.Hello = 10 * time.Second
	}
	if c.Counters == nil {
		c.Counters = &Counters{}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Server serves one volume.
type Server struct {
	cfg          Config
	conns        atomic.Int32
	leases       atomic.Int32
	small, large sync.Pool // of *[]byte: header and payload of a reply to a read
}

const smallReply = 16 << 10 // payload of the buffers in Server.small

// New makes a server.
func New(cfg Config) *Server {
	buffers := func(n int) sync.Pool {
		return sync.Pool{New: func() any { b := make([]byte, wire.HeaderLen+n); return &b }}
	}
	return &Server{cfg: cfg.withDefaults(), small: buffers(smallReply), large: buffers(wire.MaxReply)}
}

// Serve accepts clients from l until ctx ends, and then returns nil, once every connection
// is closed and every lease given up. It closes l, this process's descriptor of the
// socket; other holders go on listening.
//
// The open file description is shared with them, O_NONBLOCK included: who calls
// [os.File.Fd] on theirs makes it blocking for everybody, and Serve cannot stop. Use SyscallConn.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	var sessions sync.WaitGroup
	defer sessions.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	l.SetUnlinkOnClose(false)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	for {
		c, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close() // unanswered: the client asks again, and the next worker answers
			}
			return nil
		case err == nil:
			sessions.Go(func() { s.serveConn(ctx, c) })
		case !passing(err):
			return fmt.Errorf("accept on %v: %w", l.Addr(), err)
		default:
			s.cfg.Log.Warn("accept on domain socket", "err", err)
			pause(ctx, 100*time.Millisecond)
		}
	}
}

// passing says whether accept may succeed later.
func passing(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// serveConn serves one client and returns when it is gone or ctx has ended; its requests
// have ended and its leases are given up by then.
func (s *Server) serveConn(ctx context.Context, c *net.UnixConn) {
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() { c.Close() })()

	defer s.conns.Add(-1)
	if int(s.conns.Add(1)) > s.cfg.Connections {
		c.Write(wire.ServerHello{Code: wire.CodeBusy}.Append(nil))
		c.Close()
		cancel()
		return
	}
	ss := &session{
		srv:      s,
		conn:     c,
		bytes:    semaphore.NewWeighted(s.cfg.ReplyBytes),
		inflight: map[uint64]context.CancelCauseFunc{},
		leases:   map[uint64]*lease{},
	}
	s.cfg.Counters.Clients.Add(1)
	defer s.cfg.Counters.Clients.Add(-1)
	err := ss.run(ctx)
	cancel()
	c.Close()
	ss.handlers.Wait()
	ss.releaseAll()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		s.cfg.Log.Debug("domain socket client", "err", err)
	}
}

// buffer is a frame with room for a payload of n bytes; put gives it back.
func (s *Server) buffer(n int) (frame []byte, put func()) {
	pool := &s.small
	if n > smallReply {
		pool = &s.large
	}
	b := pool.Get().(*[]byte)
	return (*b)[:wire.HeaderLen+n], func() { pool.Put(b) }
}
