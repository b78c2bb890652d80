package shortcircuit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/internal/wire"
	"github.com/larderfs/larder/cacheworker/object"
)

// errLost means that the connection ended before the reply came: worth one more try on a new one.
var errLost = fmt.Errorf("connection to the worker lost: %w", object.ErrUnavailable)

// conn is one connection. A goroutine reads the replies and hands them to those who wait.
type conn struct {
	uc      *net.UnixConn
	maxRead int
	slots   chan struct{} // one for each request in flight
	done    chan struct{} // closed when the connection is of no more use
	buffers sync.Pool     // of *[]byte, maxRead long

	abandoned sync.WaitGroup // requests nobody waits for; they end with the connection

	wmu sync.Mutex // held while a frame is written

	mu       sync.Mutex // guards the fields below; not held across I/O
	waiting  map[uint64]chan reply
	lastID   uint64
	dead     bool
	answered bool // at least one request
}

// reply is what came for one request; whoever takes it closes fd and calls put.
type reply struct {
	head    wire.Header
	payload []byte
	fd      *os.File
	put     func()
}

func (r reply) drop() {
	if r.fd != nil {
		r.fd.Close()
	}
	if r.put != nil {
		r.put()
	}
}

// dial connects and says hello. While no worker serves the socket it waits, until ctx ends.
func dial(ctx context.Context, path string) (*conn, error) {
	type result struct {
		c   *net.UnixConn
		err error
	}
	got := make(chan result, 1)
	go func() { // connect waits where the path leads through a mount whose worker is away
		c, err := connect(ctx, path)
		got <- result{c, err}
	}()
	select {
	case r := <-got:
		if r.err != nil {
			return nil, r.err
		}
		return greet(ctx, r.c)
	case <-ctx.Done():
		go func() {
			if r := <-got; r.c != nil {
				r.c.Close()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

// connect reaches sockets whose path is longer than the 108 bytes of sun_path through a
// descriptor of their folder.
func connect(ctx context.Context, path string) (*net.UnixConn, error) {
	addr := path
	if len(path) >= maxSunPath {
		dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", object.ErrUnavailable, err)
		}
		defer dir.Close()
		addr = "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + filepath.Base(path)
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", addr)
		if err == nil {
			return c.(*net.UnixConn), nil
		}
		if !errors.Is(err, unix.EAGAIN) {
			return nil, fmt.Errorf("%w: %w", object.ErrUnavailable, err)
		}
		select { // the backlog is full, and nothing tells when there is room
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

const maxSunPath = 108

// greet takes over uc.
func greet(ctx context.Context, uc *net.UnixConn) (*conn, error) {
	stop := context.AfterFunc(ctx, func() { uc.Close() })
	h, err := hello(uc)
	if !stop() {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		uc.Close()
		return nil, err
	}
	c := &conn{
		uc:      uc,
		maxRead: int(h.MaxReply),
		slots:   make(chan struct{}, min(h.Requests, 1024)),
		done:    make(chan struct{}),
		waiting: map[uint64]chan reply{},
	}
	c.buffers.New = func() any { b := make([]byte, c.maxRead); return &b }
	return c, nil
}

func hello(uc *net.UnixConn) (wire.ServerHello, error) {
	// The answer may be there although the server does not want to hear us: too many connections.
	_, werr := uc.Write(wire.ClientHello{Min: wire.Version, Max: wire.Version}.Append(nil))
	var b [wire.ServerHelloLen]byte
	if _, err := io.ReadFull(uc, b[:]); err != nil {
		return wire.ServerHello{}, fmt.Errorf("%w: hello: %w", errLost, errors.Join(werr, err))
	}
	h, err := wire.ParseServerHello(b[:])
	if err == nil {
		err = wire.Error(h.Code, nil)
	}
	if err != nil {
		return wire.ServerHello{}, fmt.Errorf("hello: %w", err)
	}
	return h, nil
}

// run reads replies until the connection ends, which it says to everybody who waits.
func (c *conn) run() error {
	err := c.receive()
	c.uc.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	close(c.done)
	c.waiting = nil
	return err
}

func (c *conn) alive() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.dead
}

func (c *conn) receive() error {
	in := &receiver{uc: c.uc}
	defer in.close()
	buf := bufio.NewReaderSize(in, 32<<10)
	var head [wire.HeaderLen]byte
	for {
		if _, err := io.ReadFull(buf, head[:]); err != nil {
			return err
		}
		r := reply{head: wire.ParseHeader(head[:])}
		if int64(r.head.Len) > int64(c.maxRead) {
			return fmt.Errorf("reply of %d bytes: %w", r.head.Len, wire.ErrProtocol)
		}
		if r.head.Flags&wire.FlagDescriptor != 0 {
			var err error
			if r.fd, err = in.take(); err != nil {
				return err
			}
		}
		r.payload, r.put = c.buffer(int(r.head.Len))
		if _, err := io.ReadFull(buf, r.payload); err != nil {
			r.drop()
			return err
		}
		if err := c.deliver(r); err != nil {
			r.drop()
			return err
		}
	}
}

func (c *conn) buffer(n int) ([]byte, func()) {
	if n < 4<<10 {
		return make([]byte, n), nil
	}
	b := c.buffers.Get().(*[]byte)
	return (*b)[:n], func() { c.buffers.Put(b) }
}

func (c *conn) deliver(r reply) error {
	c.mu.Lock()
	ch, ok := c.waiting[r.head.ID]
	delete(c.waiting, r.head.ID)
	c.answered = true
	c.mu.Unlock()
	switch {
	case !ok:
		return fmt.Errorf("reply to request %d, which is not in flight: %w", r.head.ID, wire.ErrProtocol)
	case ch == nil:
		r.drop()
	default:
		ch <- r // has room for it
	}
	return nil
}

// send writes a request. Its reply goes to ch, which has room for it, or nowhere if that is nil.
func (c *conn) send(t wire.Type, frame []byte, ch chan reply) (uint64, error) {
	c.mu.Lock()
	if c.dead {
		c.mu.Unlock()
		return 0, errLost
	}
	c.lastID++
	id := c.lastID
	c.waiting[id] = ch
	c.mu.Unlock()
	return id, c.write(wire.Finish(frame, wire.Header{Type: t, ID: id}))
}

func (c *conn) write(frame []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if _, err := c.uc.Write(frame); err != nil {
		c.mu.Lock()
		c.dead = true // half a frame may be out
		c.mu.Unlock()
		c.uc.Close() // run ends
		return errLost
	}
	return nil
}

// call sends a request and waits for its reply. Where ctx ends first it is given up, and what
// still comes of it is dropped, a lease too.
func (c *conn) call(ctx context.Context, t wire.Type, frame []byte) (reply, error) {
	select {
	case c.slots <- struct{}{}:
	case <-c.done:
		return reply{}, errLost
	case <-ctx.Done():
		return reply{}, context.Cause(ctx)
	}
	ch := make(chan reply, 1)
	id, err := c.send(t, frame, ch)
	if err != nil {
		<-c.slots
		if r, ok := c.last(ch); ok { // there are servers that answer before they are asked
			r.drop()
		}
		return reply{}, err
	}
	select {
	case r := <-ch:
		<-c.slots
		return checked(t, r)
	case <-c.done:
		<-c.slots
		if r, ok := c.last(ch); ok {
			return checked(t, r)
		}
		return reply{}, errLost
	case <-ctx.Done():
		c.leave(t, id, ch)
		return reply{}, context.Cause(ctx)
	}
}

// last waits for the end of the connection and gives the reply that came before it, if one did.
func (c *conn) last(ch chan reply) (reply, bool) {
	<-c.done
	select {
	case r := <-ch:
		return r, true
	default:
		return reply{}, false
	}
}

// checked turns a reply that is an error into one.
func checked(t wire.Type, r reply) (reply, error) {
	err := wire.Error(r.head.Code, r.payload)
	if err == nil && (r.head.Type != t || r.fd != nil && t != wire.Open) {
		err = fmt.Errorf("reply of type %d to a request of type %d: %w", r.head.Type, t, wire.ErrProtocol)
	}
	if err != nil {
		r.drop()
		return reply{}, err
	}
	return r, nil
}

// leave lets a request be abandoned, unless the connection ends anyway.
func (c *conn) leave(t wire.Type, id uint64, ch chan reply) {
	c.mu.Lock()
	dead := c.dead
	if !dead {
		c.abandoned.Go(func() { c.abandon(t, id, ch) })
	}
	c.mu.Unlock()
	if dead {
		<-c.slots
		if r, ok := c.last(ch); ok {
			r.drop()
		}
	}
}

// abandon cancels a request that nobody waits for and sees to what comes of it. It ends with
// the reply or the connection.
func (c *conn) abandon(t wire.Type, id uint64, ch chan reply) {
	defer func() { <-c.slots }()
	c.write(wire.Finish(wire.Frame(), wire.Header{Type: wire.Cancel, ID: id}))
	var r reply
	select {
	case r = <-ch:
	case <-c.done:
		var ok bool
		if r, ok = c.last(ch); !ok {
			return
		}
	}
	r, err := checked(t, r)
	if err != nil {
		return
	}
	if t == wire.Open {
		c.release(wire.NewDecoder(r.payload).Opened().Lease)
	}
	r.drop()
}

// release gives a lease up and does not wait for the answer.
func (c *conn) release(lease uint64) {
	c.send(wire.Release, wire.AppendUint64(wire.Frame(), lease), nil)
}

// receiver reads bytes and keeps the descriptors that came with them, in their order. The
// kernel never gives bytes from behind a descriptor's frame together with it, so a frame that
// announces one finds it here.
type receiver struct {
	uc  *net.UnixConn
	oob [64]byte
	fds []*os.File // nil for one that had no room in this process
}

// maxQueued descriptors wait for their frames: as many as fit into one buffer, generously.
const maxQueued = 1024

func (r *receiver) Read(p []byte) (int, error) {
	n, oobn, flags, _, err := r.uc.ReadMsgUnix(p, r.oob[:])
	if oobn > 0 || flags&unix.MSG_CTRUNC != 0 {
		if ferr := r.keep(r.oob[:oobn], flags&unix.MSG_CTRUNC != 0); ferr != nil {
			return 0, ferr
		}
	}
	if errors.Is(err, io.EOF) {
		err = io.EOF // it comes wrapped
	}
	return max(n, 0), err // it is -1 beside an error
}

func (r *receiver) keep(oob []byte, cut bool) error {
	fds, err := rights(oob)
	for _, fd := range fds {
		r.fds = append(r.fds, os.NewFile(uintptr(fd), "larder object"))
	}
	if len(fds) == 0 && cut {
		r.fds = append(r.fds, nil)
	}
	if err != nil || len(fds) > 1 || len(r.fds) > maxQueued {
		return fmt.Errorf("descriptors in a frame: %w", errors.Join(wire.ErrProtocol, err))
	}
	return nil
}

// rights are the descriptors in a control message, also where an error is returned.
func rights(oob []byte) ([]int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	var fds []int
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_RIGHTS {
			got, perr := unix.ParseUnixRights(&m)
			fds = append(fds, got...)
			err = errors.Join(err, perr)
		}
	}
	return fds, err
}

// take is the descriptor of the frame that was begun; nil if this process had no room for it.
func (r *receiver) take() (*os.File, error) {
	if len(r.fds) == 0 {
		return nil, fmt.Errorf("a descriptor is announced and none came: %w", wire.ErrProtocol)
	}
	f := r.fds[0]
	r.fds = r.fds[1:]
	return f, nil
}

func (r *receiver) close() {
	for _, f := range r.fds {
		if f != nil {
			f.Close()
		}
	}
}
