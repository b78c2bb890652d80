package shortcircuit

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/internal/wire"
	"github.com/larderfs/larder/cacheworker/object"
)

// What a sound server does is tested beside it, in package domainsocket. Here the other end is
// played by the test, which may do anything.

func descriptors(t testing.TB) []string {
	t.Helper()
	des, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, de := range des {
		to, err := os.Readlink("/proc/self/fd/" + de.Name())
		if err == nil && !strings.HasSuffix(to, "/fd") && !strings.Contains(to, "anon_inode") {
			out = append(out, to)
		}
	}
	slices.Sort(out)
	return out
}

func noLeak(t testing.TB) {
	t.Helper()
	before := descriptors(t)
	t.Cleanup(func() {
		if after := descriptors(t); len(after) != len(before) {
			t.Errorf("descriptors before: %q\nafter: %q", before, after)
		}
	})
}

// other is the server's end of one connection.
type other struct {
	t testing.TB
	c *net.UnixConn
}

var sound = wire.ServerHello{Version: 1, MaxRequest: wire.MaxRequest, MaxReply: 1000, Requests: 8, Leases: 8}

// socketpair is a connection and its other end.
func socketpair(t testing.TB) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "socketpair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

// pair is a client and its other end, which has said hello.
func pair(t testing.TB) (*Client, *other) {
	t.Helper()
	ours, theirs := socketpair(t)
	theirs.Write(sound.Append(nil))
	cn, err := greet(t.Context(), ours)
	if err != nil {
		t.Fatal(err)
	}
	io.ReadFull(theirs, make([]byte, wire.ClientHelloLen))
	c := newClient("/nonexistent/socket")
	if err := c.use(cn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, &other{t, theirs}
}

func (o *other) receive() (wire.Header, []byte) {
	o.t.Helper()
	b := make([]byte, wire.HeaderLen)
	if _, err := io.ReadFull(o.c, b); err != nil {
		o.t.Error(err)
		return wire.Header{}, nil
	}
	h := wire.ParseHeader(b)
	p := make([]byte, h.Len)
	io.ReadFull(o.c, p)
	return h, p
}

func (o *other) send(h wire.Header, payload []byte, files ...*os.File) {
	o.t.Helper()
	b := wire.Finish(append(wire.Frame(), payload...), h)
	var oob []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := o.c.WriteMsgUnix(b, oob, nil); err != nil {
		o.t.Error(err)
	}
}

func opened(t testing.TB, o wire.Opened) []byte {
	t.Helper()
	b, err := o.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func file(t testing.TB, n int) *os.File {
	t.Helper()
	p := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(p, bytes.Repeat([]byte("x"), n), 0o600); err != nil {
		t.Fatal(err)
	}
	return open(t, p)
}

func open(t testing.TB, p string) *os.File {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestBadRepliesAreErrors(t *testing.T) {
	noLeak(t)
	dir, ten, null := open(t, t.TempDir()), file(t, 10), open(t, "/dev/null")
	lease := opened(t, wire.Opened{Lease: 4, Size: 10, Version: "v"})
	ok := func(h wire.Header) wire.Header {
		return wire.Header{Type: h.Type, ID: h.ID, Flags: wire.FlagDescriptor}
	}
	for name, c := range map[string]struct {
		answer func(o *other, h wire.Header)
		want   error
	}{
		"folder":         {func(o *other, h wire.Header) { o.send(ok(h), lease, dir) }, wire.ErrProtocol},
		"device":         {func(o *other, h wire.Header) { o.send(ok(h), opened(t, wire.Opened{Lease: 4}), null) }, wire.ErrProtocol},
		"other size":     {func(o *other, h wire.Header) { o.send(ok(h), opened(t, wire.Opened{Lease: 4, Size: 11}), ten) }, wire.ErrProtocol},
		"two":            {func(o *other, h wire.Header) { o.send(ok(h), lease, ten, ten) }, object.ErrUnavailable},
		"many":           {func(o *other, h wire.Header) { o.send(ok(h), lease, slices.Repeat([]*os.File{ten}, 100)...) }, object.ErrUnavailable},
		"none":           {func(o *other, h wire.Header) { o.send(ok(h), lease) }, object.ErrUnavailable},
		"short":          {func(o *other, h wire.Header) { o.send(ok(h), lease[:9], ten) }, wire.ErrProtocol},
		"error with one": {func(o *other, h wire.Header) { r := ok(h); r.Code = wire.CodeDenied; o.send(r, nil, ten) }, object.ErrDenied},
		"other type":     {func(o *other, h wire.Header) { r := ok(h); r.Type = wire.Stat; o.send(r, lease, ten) }, wire.ErrProtocol},
		"other request":  {func(o *other, h wire.Header) { r := ok(h); r.ID += 7; o.send(r, lease, ten) }, object.ErrUnavailable},
		"too large":      {func(o *other, h wire.Header) { r := ok(h); r.Flags = 0; o.send(r, make([]byte, 1001)) }, object.ErrUnavailable},
		"cut": {func(o *other, h wire.Header) {
			b := wire.Finish(append(wire.Frame(), lease...), ok(h))
			o.c.WriteMsgUnix(b[:len(b)-1], unix.UnixRights(int(ten.Fd())), nil)
			o.c.Close()
		}, object.ErrUnavailable},
		"nothing": {func(o *other, h wire.Header) { o.c.Close() }, object.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			client, o := pair(t)
			got := make(chan error, 1)
			go func() {
				f, err := client.Open(t.Context(), "a")
				if err == nil {
					f.Close()
				}
				got <- err
			}()
			h, _ := o.receive()
			c.answer(o, h)
			if err := <-got; !errors.Is(err, c.want) {
				t.Errorf("open: %v; want %v", err, c.want)
			}
		})
	}
}

func TestDescriptorsBelongToTheirFrames(t *testing.T) {
	noLeak(t)
	client, o := pair(t)
	sizes := []int{10, 20, 30, 40}
	var files []*os.File
	for _, n := range sizes {
		files = append(files, file(t, n))
	}
	got := make(chan error, len(sizes))
	for range sizes {
		go func() {
			f, err := client.Open(t.Context(), "a")
			if err == nil {
				f.Close()
			}
			got <- err
		}()
	}
	var ids []uint64
	for range sizes {
		h, _ := o.receive()
		ids = append(ids, h.ID)
	}
	// in one batch, the first without a descriptor
	o.send(wire.Header{Type: wire.Open, ID: ids[0]}, opened(t, wire.Opened{Size: 10}))
	for i := 3; i > 0; i-- {
		o.send(wire.Header{Type: wire.Open, ID: ids[i], Flags: wire.FlagDescriptor}, opened(t, wire.Opened{Size: int64(sizes[i])}), files[i])
	}
	for range sizes {
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
}

// A server may send a frame in pieces; then a second descriptor is there before the first is taken.
func TestDescriptorsKeepTheirOrder(t *testing.T) {
	noLeak(t)
	ours, theirs := socketpair(t)
	one, two := file(t, 10), file(t, 20)
	theirs.WriteMsgUnix([]byte("a"), unix.UnixRights(int(one.Fd())), nil)
	theirs.Write([]byte("b"))
	theirs.WriteMsgUnix([]byte("c"), unix.UnixRights(int(two.Fd())), nil)
	theirs.Close()
	in := &receiver{uc: ours}
	if b, err := io.ReadAll(in); err != nil || string(b) != "abc" {
		t.Errorf("%q, %v", b, err)
	}
	for _, size := range []int64{10, 20} {
		f, err := in.take()
		if err != nil {
			t.Fatal(err)
		}
		if err := check(f, size); err != nil {
			t.Error(err)
		}
		f.Close()
	}
	if _, err := in.take(); !errors.Is(err, wire.ErrProtocol) {
		t.Errorf("a third: %v", err)
	}
}

func TestLeaseOfAnAbandonedOpenIsGivenBack(t *testing.T) {
	noLeak(t)
	client, o := pair(t)
	ten := file(t, 10)
	before := len(descriptors(t))
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error, 1)
	go func() { _, err := client.Open(ctx, "a"); got <- err }()
	asked, _ := o.receive()
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("open: %v", err)
	}
	if h, _ := o.receive(); h.Type != wire.Cancel || h.ID != asked.ID {
		t.Errorf("%+v; want a cancel", h)
	}
	o.send(wire.Header{Type: wire.Open, ID: asked.ID, Flags: wire.FlagDescriptor}, opened(t, wire.Opened{Lease: 77, Size: 10}), ten)
	if h, p := o.receive(); h.Type != wire.Release || wire.NewDecoder(p).Uint64() != 77 {
		t.Errorf("%+v %x; want a release", h, p)
	}
	client.Close() // waits for what was abandoned
	if after := descriptors(t); len(after) != before-1 {
		t.Errorf("%d descriptors before, now %q", before, after)
	}
}

func TestCloseEndsWhatWaits(t *testing.T) {
	noLeak(t)
	client, o := pair(t)
	got := make(chan error, 1)
	go func() { _, err := client.Stat(t.Context(), "a"); got <- err }()
	o.receive()
	client.Close()
	if err := <-got; err == nil {
		t.Error("answered by nobody")
	}
	if _, err := client.Stat(t.Context(), "a"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("stat after close: %v", err)
	}
}

func TestRequestsInFlightKeepToTheHello(t *testing.T) {
	noLeak(t)
	client, o := pair(t)
	const n = 30
	got := make(chan error, n)
	for range n {
		go func() { _, err := client.Stat(t.Context(), "a"); got <- err }()
	}
	entry, _ := wire.Entry{Name: "a"}.Append(nil)
	var inFlight []uint64
	for range sound.Requests {
		h, _ := o.receive()
		inFlight = append(inFlight, h.ID)
	}
	o.c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := o.c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a request more than the hello allows: %v", err)
	}
	o.c.SetReadDeadline(time.Time{})
	for answered := 0; answered < n; answered++ {
		o.send(wire.Header{Type: wire.Stat, ID: inFlight[0]}, entry)
		if inFlight = inFlight[1:]; answered+int(sound.Requests) < n {
			h, _ := o.receive()
			inFlight = append(inFlight, h.ID)
		}
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
}

func TestBadHellos(t *testing.T) {
	noLeak(t)
	dir, err := os.MkdirTemp("", "sc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	with := func(change func(*wire.ServerHello)) []byte {
		h := sound
		change(&h)
		return h.Append(nil)
	}
	for name, c := range map[string]struct {
		hello []byte
		want  error
	}{
		"version":        {wire.ServerHello{Version: 3, Code: wire.CodeVersion}.Append(nil), ErrVersion},
		"busy":           {wire.ServerHello{Code: wire.CodeBusy}.Append(nil), object.ErrBusy},
		"other version":  {with(func(h *wire.ServerHello) { h.Version = 2 }), wire.ErrProtocol},
		"no requests":    {with(func(h *wire.ServerHello) { h.Requests = 0 }), wire.ErrProtocol},
		"no reply":       {with(func(h *wire.ServerHello) { h.MaxReply = 0 }), wire.ErrProtocol},
		"large replies":  {with(func(h *wire.ServerHello) { h.MaxReply = 1<<20 + 1 }), wire.ErrProtocol},
		"small requests": {with(func(h *wire.ServerHello) { h.MaxRequest = 100 }), wire.ErrProtocol},
		"HTTP":           {[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), wire.ErrProtocol},
	} {
		go func() {
			s, err := l.AcceptUnix()
			if err != nil {
				t.Error(err)
				return
			}
			s.Write(c.hello)
			s.Close()
		}()
		if _, err := Dial(t.Context(), filepath.Join(dir, "s")); !errors.Is(err, c.want) {
			t.Errorf("%s: %v; want %v", name, err, c.want)
		}
	}
	l.Close()
	if _, err := Dial(t.Context(), filepath.Join(dir, "s")); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("nobody holds the socket: %v", err)
	}
}

// A worker that nobody restarts: the backlog fills, and then connect() itself has to wait.
func TestDialWaitsWhileTheBacklogIsFull(t *testing.T) {
	noLeak(t)
	dir, err := os.MkdirTemp("", "sc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	held := os.NewFile(uintptr(fd), "listener")
	defer held.Close()
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	first, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if c, err := net.Dial("unix", path); !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("the backlog is not full: %v, %v", c, err)
	}
	got := make(chan error, 1)
	go func() {
		c, err := Dial(t.Context(), path)
		if err == nil {
			c.Close()
		}
		got <- err
	}()
	l, err := net.FileListener(held)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 2 {
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.Write(sound.Append(nil))
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestFind(t *testing.T) {
	dir, err := os.MkdirTemp("", "sc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	listen := func(name string) {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	const id, id2 = "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "6ba7b811-9dad-11d1-80b4-00c04fd430c8"
	if err := os.WriteFile(filepath.Join(dir, id2), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	listen("other.sock")
	listen("6ba7b810-9dad-11d1-80b4_00c04fd430c8")
	if p, err := Find(dir); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("Find = %q, %v", p, err)
	}
	listen(id)
	if p, err := Find(dir); err != nil || p != filepath.Join(dir, id) {
		t.Errorf("Find = %q, %v", p, err)
	}
	listen("aba7b810-9dad-11d1-80b4-00c04fd430c8")
	if p, err := Find(dir); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("Find = %q, %v", p, err)
	}
	if _, err := Find(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

// FuzzReplies answers a client with anything, a descriptor somewhere between. It must end when the
// server does, and keep no descriptor.
func FuzzReplies(f *testing.F) {
	frame := func(t wire.Type, id uint64, flags uint8, payload []byte) []byte {
		return wire.Finish(append(wire.Frame(), payload...), wire.Header{Type: t, ID: id, Flags: flags})
	}
	entry, _ := wire.Entry{Name: "a", Size: 10, Version: "v"}.Append(nil)
	list := append([]byte{0, 0, 0, 0, 1}, entry...)
	op, _ := wire.Opened{Lease: 1, Size: 10, Version: "v"}.Append(nil)
	head := slices.Concat(frame(wire.Stat, 1, 0, entry), frame(wire.List, 2, 0, list))
	f.Add([]byte{}, uint16(0))
	f.Add(slices.Concat(head, frame(wire.Open, 3, 1, op), frame(wire.Status, 4, 0, wire.State{Volume: "v"}.Append(nil))), uint16(len(head)))
	f.Add(slices.Concat(head, frame(wire.Open, 3, 0, op), frame(wire.Read, 4, 0, []byte("0123456789"))), uint16(1))
	f.Add(slices.Concat(head, frame(wire.Open, 3, 1, op)), uint16(9999))
	f.Add(binary.BigEndian.AppendUint32(nil, 1<<31), uint16(2))

	p := filepath.Join(f.TempDir(), "f")
	if err := os.WriteFile(p, []byte("0123456789"), 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte, at uint16) {
		noLeak(t)
		client, o := pair(t)
		fd := open(t, p)
		go io.Copy(io.Discard, o.c)
		cut := min(int(at), len(in))
		o.c.Write(in[:cut])
		if cut < len(in) {
			o.c.WriteMsgUnix(in[cut:], unix.UnixRights(int(fd.Fd())), nil)
		}
		o.c.CloseWrite()

		ctx := t.Context()
		client.Stat(ctx, "a")
		client.List(ctx, "", "", 0)
		if f, err := client.Open(ctx, "a"); err == nil {
			b := make([]byte, 20)
			if n, _ := f.ReadAt(b, 0); n < 0 || n > len(b) || int64(n) > f.Size() {
				t.Errorf("read %d bytes of %d", n, f.Size())
			}
			if f.Local() {
				if m, err := f.Mmap(); err != nil || int64(len(m)) != f.Size() {
					t.Errorf("%d bytes mapped of %d: %v", len(m), f.Size(), err)
				}
			}
			client.Status(ctx)
			f.Close()
		}
	})
}
