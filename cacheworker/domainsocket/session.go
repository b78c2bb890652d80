package domainsocket

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/internal/wire"
	"github.com/larderfs/larder/cacheworker/object"
)

const (
	listMax      = 1000                   // entries of one reply at most; fewer where the frame is full
	readPatience = 100 * time.Millisecond // in all, for a client to read what was sent
	unreadFiles  = 16                     // descriptors a client may leave unread in its socket
)

// errNoDescriptor means that a reply was not sent because its descriptor cannot be now.
var errNoDescriptor = errors.New("too many descriptors in flight")

// errCanceled is why a request ends whose client has sent a cancel.
var errCanceled = fmt.Errorf("by the client: %w", context.Canceled)

// session is one connection. run reads the requests, a goroutine each answers them: what a
// request waits for never keeps another one waiting, or a release, or the end of the client from being noticed.
type session struct {
	srv      *Server
	conn     *net.UnixConn
	bytes    *semaphore.Weighted // of replies to reads that are in memory
	handlers sync.WaitGroup

	wmu    sync.Mutex // held while a frame is written, hence as long as the client does not read
	unread int        // descriptors sent since the client was last seen to have read everything

	mu        sync.Mutex // guards the fields below; never held across I/O
	inflight  map[uint64]context.CancelCauseFunc
	leases    map[uint64]*lease
	opening   int // leases asked for and not yet in the map
	lastLease uint64
}

// lease holds a file. The map has one reference, each read in flight another.
type lease struct {
	file File
	refs int // guarded by session.mu
}

func (ss *session) run(ctx context.Context) error {
	in := bufio.NewReader(ss.conn)
	if err := ss.hello(in); err != nil {
		return err
	}
	var head [wire.HeaderLen]byte
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			if err == io.EOF {
				return nil
			}
			return fmt.Errorf("read header: %w", err)
		}
		h := wire.ParseHeader(head[:])
		if h.Len > wire.MaxRequest {
			ss.fail(h, fmt.Errorf("request of %d bytes: %w", h.Len, wire.ErrProtocol))
			return fmt.Errorf("request of %d bytes: %w", h.Len, wire.ErrProtocol)
		}
		payload := make([]byte, h.Len)
		if _, err := io.ReadFull(in, payload); err != nil {
			return fmt.Errorf("read payload: %w", err)
		}
		if err := ss.dispatch(ctx, h, payload); err != nil {
			return err
		}
	}
}

func (ss *session) hello(in *bufio.Reader) error {
	if err := ss.conn.SetReadDeadline(time.Now().Add(ss.srv.cfg.Hello)); err != nil {
		return err
	}
	var b [wire.ClientHelloLen]byte
	if _, err := io.ReadFull(in, b[:]); err != nil {
		return fmt.Errorf("read hello: %w", err)
	}
	ch, err := wire.ParseClientHello(b[:])
	if err != nil {
		return err
	}
	sh := wire.ServerHello{
		Version:    wire.Version,
		MaxRequest: wire.MaxRequest,
		MaxReply:   wire.MaxReply,
		Requests:   uint32(ss.srv.cfg.Requests),
		Leases:     uint32(ss.srv.cfg.ConnLeases),
	}
	if ch.Min > wire.Version || ch.Max < wire.Version {
		err = fmt.Errorf("client speaks %d to %d, not %d: %w", ch.Min, ch.Max, wire.Version, wire.ErrVersion)
		sh = wire.ServerHello{Version: wire.Version, Code: wire.CodeVersion}
	}
	if _, werr := ss.conn.Write(sh.Append(nil)); err == nil {
		err = werr
	}
	return errors.Join(err, ss.conn.SetReadDeadline(time.Time{}))
}

// dispatch starts a request. An error ends the connection.
func (ss *session) dispatch(ctx context.Context, h wire.Header, payload []byte) error {
	ss.srv.cfg.Counters.Requests.Add(1)
	switch {
	case h.Flags != 0 || h.Code != 0:
		ss.fail(h, fmt.Errorf("%w: flags or code in a request", object.ErrInvalid))
		return nil
	case h.Type == wire.Cancel:
		ss.mu.Lock()
		cancel := ss.inflight[h.ID]
		ss.mu.Unlock()
		if cancel != nil {
			cancel(errCanceled)
		}
		return nil
	case h.Type == wire.Release:
		ss.reply(h, wire.Frame(), ss.release(wire.NewDecoder(payload)))
		return nil
	case h.Type < wire.Stat || h.Type > wire.Status:
		ss.fail(h, fmt.Errorf("%w: request type %d", object.ErrInvalid, h.Type))
		return nil
	}

	ctx, cancel := context.WithCancelCause(ctx)
	ss.mu.Lock()
	_, twice := ss.inflight[h.ID]
	full := len(ss.inflight) >= ss.srv.cfg.Requests
	if !twice && !full {
		ss.inflight[h.ID] = cancel
	}
	ss.mu.Unlock()
	switch {
	case twice:
		cancel(nil)
		return fmt.Errorf("request id %d is in flight: %w", h.ID, wire.ErrProtocol)
	case full:
		cancel(nil)
		ss.fail(h, fmt.Errorf("%w: %d requests in flight", object.ErrBusy, ss.srv.cfg.Requests))
	default:
		ss.handlers.Go(func() {
			defer cancel(nil)
			ss.handle(ctx, h, wire.NewDecoder(payload))
		})
	}
	return nil
}

func (ss *session) handle(ctx context.Context, h wire.Header, d *wire.Decoder) {
	frame := wire.Frame()
	var err error
	switch h.Type {
	case wire.Stat:
		frame, err = ss.stat(ctx, frame, d)
	case wire.List:
		frame, err = ss.list(ctx, frame, d)
	case wire.Status:
		if err = d.End(); err == nil {
			frame = ss.status(ctx, frame)
		}
	case wire.Open:
		if err = ss.open(ctx, h, d); err == nil {
			return
		}
	case wire.Read:
		if err = ss.read(ctx, h, d); err == nil {
			return
		}
	}
	if err != nil && ctx.Err() != nil && context.Cause(ctx) != errCanceled {
		return // the connection ends: the client asks the next worker rather than be told of this one's end
	}
	ss.reply(h, frame, err)
}

func (ss *session) stat(ctx context.Context, b []byte, d *wire.Decoder) ([]byte, error) {
	p, err := lastPath(d)
	if err != nil {
		return b, err
	}
	e, err := ss.srv.cfg.Volume.Stat(ctx, p)
	if err != nil {
		return b, err
	}
	if e.Name = path.Base(p); p == "" {
		e.Name = ""
	}
	return e.Append(b)
}

func (ss *session) list(ctx context.Context, b []byte, d *wire.Decoder) ([]byte, error) {
	n, after := d.Uint32(), d.String()
	p, err := lastPath(d)
	if err == nil && after != "" {
		err = wire.CheckName(after)
	}
	if err != nil {
		return b, err
	}
	if n == 0 || n > listMax {
		n = listMax
	}
	entries, more, err := ss.srv.cfg.Volume.List(ctx, p, after, int(n))
	if err != nil {
		return b, err
	}
	b = append(b, 0, 0, 0, 0, 0)
	count := 0
	for _, e := range entries {
		next, err := e.Append(b)
		if err != nil {
			return b, err
		}
		if len(next)-wire.HeaderLen > wire.MaxReply {
			more = true
			break
		}
		b = next
		count++
	}
	if more {
		b[wire.HeaderLen] = 1
	}
	wire.PutUint32(b[wire.HeaderLen+1:], uint32(count))
	return b, nil
}

func (ss *session) status(ctx context.Context, b []byte) []byte {
	st := ss.srv.cfg.Volume.Status(ctx)
	return wire.State{
		Volume:        st.VolumeID,
		Worker:        st.Worker,
		CachedBytes:   st.CachedBytes,
		CapacityBytes: st.CapacityBytes,
		Connections:   uint32(ss.srv.conns.Load()),
		Leases:        uint32(ss.srv.leases.Load()),
	}.Append(b)
}

// open answers a request to open, or returns an error that is still to be sent; then it holds nothing.
func (ss *session) open(ctx context.Context, h wire.Header, d *wire.Decoder) error {
	flags := d.Uint8()
	p, err := lastPath(d)
	if err != nil {
		return err
	}
	if flags > wire.OpenOrFail {
		return fmt.Errorf("%w: open flags %#x", object.ErrInvalid, flags)
	}
	if p == "" {
		return fmt.Errorf("%w: the root is a folder", object.ErrInvalid)
	}
	id, l, err := ss.lease(ctx, p)
	if err != nil {
		return err
	}
	err = ss.sendOpened(h, id, l.file, flags)
	if err != nil {
		ss.forget(id)
	}
	return err
}

// sendOpened replies to an open, with a descriptor if that is wanted and can be.
func (ss *session) sendOpened(h wire.Header, id uint64, f File, flags uint8) error {
	o := f.Object()
	frame, err := wire.Opened{Lease: id, Size: o.Size, ModTime: o.ModTime, Version: o.Version}.Append(wire.Frame())
	if err != nil {
		return err
	}
	if flags&wire.OpenNoDescriptor == 0 {
		var fd *os.File
		if fd, err = f.Descriptor(); err == nil {
			defer fd.Close()
			with := h
			with.Flags = wire.FlagDescriptor
			err = ss.send(with, frame, fd)
		}
		if err == nil {
			ss.srv.cfg.Counters.Descriptors.Add(1)
			return nil
		}
		if !errors.Is(err, object.ErrIncomplete) {
			ss.srv.cfg.Log.Warn("give descriptor to domain socket client", "object", o, "err", err)
		}
	}
	if flags&wire.OpenOrFail != 0 {
		return object.ErrIncomplete
	}
	return ss.send(h, frame, nil)
}

func (ss *session) read(ctx context.Context, h wire.Header, d *wire.Decoder) error {
	id, off, n := d.Uint64(), d.Uint64(), int64(d.Uint32())
	if err := d.End(); err != nil {
		return err
	}
	l := ss.acquire(id)
	if l == nil {
		return fmt.Errorf("%w: lease %d is not held", object.ErrInvalid, id)
	}
	defer ss.drop(l)
	if off > math.MaxInt64 {
		return fmt.Errorf("%w: offset %d", object.ErrInvalid, off)
	}
	n = max(0, min(n, wire.MaxReply, l.file.Object().Size-int64(off)))
	if err := ss.bytes.Acquire(ctx, n); err != nil {
		return err
	}
	defer ss.bytes.Release(n)
	frame, put := ss.srv.buffer(int(n))
	defer put()
	got := 0
	if n > 0 {
		var err error
		got, err = l.file.ReadAt(ctx, frame[wire.HeaderLen:], int64(off))
		if err != nil && (got == 0 || err != io.EOF) {
			return err
		}
	}
	ss.srv.cfg.Counters.ReadBytes.Add(uint64(got))
	return ss.send(h, frame[:wire.HeaderLen+got], nil)
}

// lastPath reads and checks the path that every request with one ends in.
func lastPath(d *wire.Decoder) (string, error) {
	p := d.String()
	if err := d.End(); err != nil {
		return "", err
	}
	return p, wire.CheckPath(p)
}

// reply sends a frame, or the error instead.
func (ss *session) reply(h wire.Header, frame []byte, err error) {
	if err != nil {
		ss.fail(h, err)
		return
	}
	ss.send(h, frame, nil)
}

func (ss *session) fail(h wire.Header, err error) {
	h.Code = wire.CodeOf(err)
	ss.send(wire.Header{Type: h.Type, Code: h.Code, ID: h.ID}, append(wire.Frame(), wire.Text(err)...), nil)
}

// send writes a reply, with a descriptor or without. From then on the request is not in
// flight. errNoDescriptor leaves the request unanswered; every other failure ends the
// connection and is not reported, because the client is gone.
func (ss *session) send(h wire.Header, frame []byte, fd *os.File) error {
	frame = wire.Finish(frame, h)
	ss.wmu.Lock()
	defer ss.wmu.Unlock()
	if fd != nil && ss.unread >= unreadFiles && !ss.awaitRead() {
		return errNoDescriptor
	}
	ss.finish(h.ID)
	var err error
	if fd == nil {
		_, err = ss.conn.Write(frame)
	} else {
		err = ss.sendWith(frame, fd)
		if errors.Is(err, unix.ETOOMANYREFS) {
			return errNoDescriptor
		}
		ss.unread++
	}
	if err != nil {
		ss.conn.Close() // half a frame may be out
	}
	return nil
}

func (ss *session) sendWith(frame []byte, fd *os.File) error {
	raw, err := fd.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	cerr := raw.Control(func(fd uintptr) {
		n, _, err = ss.conn.WriteMsgUnix(frame, unix.UnixRights(int(fd)), nil)
	})
	if err = errors.Join(cerr, err); err != nil {
		return err
	}
	if n < len(frame) {
		_, err = ss.conn.Write(frame[n:])
	}
	return err
}

// awaitRead gives the client a moment to read what was sent: with many requests in flight
// there is hardly ever an instant in which nothing is under way. Requires wmu.
func (ss *session) awaitRead() bool {
	for pause := 20 * time.Microsecond; pause < readPatience/2; pause *= 2 { // no event tells of it
		if ss.allRead() {
			return true
		}
		time.Sleep(pause)
	}
	return ss.allRead()
}

// allRead says whether the client has read all that was sent. Descriptors in flight count
// against the limit of this user, all volumes together. Requires wmu.
func (ss *session) allRead() bool {
	raw, err := ss.conn.SyscallConn()
	if err != nil {
		return false
	}
	n := 1
	if cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); cerr != nil || err != nil || n != 0 {
		return false
	}
	ss.unread = 0
	return true
}

func (ss *session) finish(id uint64) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	delete(ss.inflight, id)
}

// lease opens a file and holds it.
func (ss *session) lease(ctx context.Context, p string) (uint64, *lease, error) {
	if err := ss.reserve(); err != nil {
		return 0, nil, err
	}
	f, err := ss.srv.cfg.Volume.Open(ctx, p)
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.opening--
	if err != nil {
		ss.srv.leases.Add(-1)
		return 0, nil, err
	}
	ss.lastLease++
	l := &lease{file: f, refs: 1}
	ss.leases[ss.lastLease] = l
	return ss.lastLease, l, nil
}

func (ss *session) reserve() error {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.opening+len(ss.leases) >= ss.srv.cfg.ConnLeases {
		return fmt.Errorf("%w: %d leases on this connection", object.ErrBusy, ss.srv.cfg.ConnLeases)
	}
	if int(ss.srv.leases.Add(1)) > ss.srv.cfg.Leases {
		ss.srv.leases.Add(-1)
		return fmt.Errorf("%w: %d leases on this volume", object.ErrBusy, ss.srv.cfg.Leases)
	}
	ss.opening++
	return nil
}

func (ss *session) release(d *wire.Decoder) error {
	id := d.Uint64()
	if err := d.End(); err != nil {
		return err
	}
	if !ss.forget(id) {
		return fmt.Errorf("%w: lease %d is not held", object.ErrInvalid, id)
	}
	return nil
}

// forget takes a lease out of the map; reads in flight hold the file until they end.
func (ss *session) forget(id uint64) bool {
	ss.mu.Lock()
	l := ss.leases[id]
	delete(ss.leases, id)
	ss.mu.Unlock()
	if l != nil {
		ss.drop(l)
	}
	return l != nil
}

// acquire references a lease for a read, or is nil; drop gives it back.
func (ss *session) acquire(id uint64) *lease {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	l := ss.leases[id]
	if l != nil {
		l.refs++
	}
	return l
}

func (ss *session) drop(l *lease) {
	ss.mu.Lock()
	l.refs--
	last := l.refs == 0
	ss.mu.Unlock()
	if !last {
		return
	}
	ss.srv.leases.Add(-1)
	if err := l.file.Close(); err != nil {
		ss.srv.cfg.Log.Warn("close file of a domain socket client", "object", l.file.Object(), "err", err)
	}
}

func (ss *session) releaseAll() {
	ss.mu.Lock()
	left := ss.leases
	ss.leases = nil
	ss.mu.Unlock()
	for _, l := range left {
		ss.drop(l)
	}
}
