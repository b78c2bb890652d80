package brokerwire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	return conn(t, fds[0]), conn(t, fds[1])
}

func conn(t *testing.T, fd int) *net.UnixConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// run runs a peer until the test ends, or the returned function is called.
func run(t *testing.T, c *net.UnixConn, h Handler) (p *Peer, wait func() error) {
	t.Helper()
	if h == nil {
		h = func(context.Context, Message, []*os.File) (Message, []*os.File, error) {
			return Message{}, nil, errors.New("nobody should ask this")
		}
	}
	p = NewPeer(c, h)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	var err error
	go func() { err = p.Run(ctx); close(done) }()
	t.Cleanup(func() { stop(); <-done })
	return p, func() error { <-done; return err }
}

// openFiles is how many descriptors this process has.
func openFiles(t *testing.T) int {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}

func file(t *testing.T, text string) *os.File {
	t.Helper()
	return memfd(t, []byte(text), 0)
}

func text(t *testing.T, f *os.File) string {
	t.Helper()
	b := make([]byte, 100)
	n, _ := f.ReadAt(b, 0)
	return string(b[:n])
}

func TestCallsAreAnsweredAtOnceAndInAnyOrder(t *testing.T) {
	a, b := pair(t)
	const calls = 20
	var together sync.WaitGroup
	together.Add(calls) // no handler answers before all have been asked
	run(t, b, func(_ context.Context, m Message, _ []*os.File) (Message, []*os.File, error) {
		together.Done()
		together.Wait()
		return Message{Mount: "answer to " + m.Mount}, nil, nil
	})
	p, _ := run(t, a, nil)
	var wg sync.WaitGroup
	for i := range calls {
		wg.Go(func() {
			r, _, err := p.Call(t.Context(), Message{Verb: Bind, Mount: fmt.Sprint(i)})
			if err != nil || r.Mount != fmt.Sprint("answer to ", i) {
				t.Errorf("call %d: %+v, %v", i, r, err)
			}
		})
	}
	wg.Wait()
}

func TestBothEndsCallAndAnswer(t *testing.T) {
	a, b := pair(t)
	var pb *Peer
	ready := make(chan struct{})
	pb, _ = run(t, b, func(ctx context.Context, m Message, _ []*os.File) (Message, []*os.File, error) {
		<-ready
		r, _, err := pb.Call(ctx, Message{Verb: Adopt, Mount: m.Mount}) // before it answers
		return r, nil, err
	})
	close(ready)
	pa, _ := run(t, a, func(_ context.Context, m Message, _ []*os.File) (Message, []*os.File, error) {
		return Message{Path: "/" + m.Mount}, nil, nil
	})
	if r, _, err := pa.Call(t.Context(), Message{Verb: Bind, Mount: "x"}); err != nil || r.Path != "/x" {
		t.Errorf("got %+v, %v", r, err)
	}
}

func TestDescriptorsTravelBothWays(t *testing.T) {
	a, b := pair(t)
	run(t, b, func(_ context.Context, m Message, files []*os.File) (Message, []*os.File, error) {
		if len(files) != 2 {
			return Message{}, nil, fmt.Errorf("%d files", len(files))
		}
		return Message{Mount: text(t, files[0]) + text(t, files[1])}, []*os.File{file(t, "back")}, nil
	})
	p, _ := run(t, a, nil)
	one, two := file(t, "one"), file(t, "two")
	r, files, err := p.Call(t.Context(), Message{Verb: Give}, one, two)
	if err != nil || r.Mount != "onetwo" || len(files) != 1 || text(t, files[0]) != "back" {
		t.Errorf("got %+v, %d files, %v", r, len(files), err)
	}
	for _, f := range files {
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("a descriptor that was received would be inherited: %v", err)
		}
	}
	CloseFiles(files)
	if text(t, one) != "one" {
		t.Error("a descriptor that was sent is no longer ours")
	}
}

func TestTheErrorOfACallIsTheHandlers(t *testing.T) {
	a, b := pair(t)
	run(t, b, func(context.Context, Message, []*os.File) (Message, []*os.File, error) {
		return Message{Mount: "x"}, []*os.File{file(t, "not for an error")}, fmt.Errorf("volume %q: %w", "v", object.ErrBusy)
	})
	p, _ := run(t, a, nil)
	_, files, err := p.Call(t.Context(), Message{Verb: Bind})
	if !errors.Is(err, object.ErrBusy) || err.Error() != `volume "v": try again` || len(files) != 0 {
		t.Errorf("got %v, %d files", err, len(files))
	}
}

func TestCallsFailWhenThePeerDies(t *testing.T) {
	a, b := pair(t)
	asked := make(chan struct{}, 2)
	never := make(chan struct{})
	pb, _ := run(t, b, func(ctx context.Context, _ Message, _ []*os.File) (Message, []*os.File, error) {
		asked <- struct{}{}
		select {
		case <-never:
		case <-ctx.Done(): // the peer's end is the end of what it asked
		}
		return Message{}, nil, ctx.Err()
	})
	p, wait := run(t, a, nil)
	errs := make(chan error, 2)
	for range 2 {
		go func() {
			_, _, err := p.Call(context.Background(), Message{Verb: Bind})
			errs <- err
		}()
		<-asked
	}
	pb.Close()
	for range 2 {
		if err := <-errs; !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("a call under way: %v", err)
		}
	}
	if err := wait(); err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, _, err := p.Call(context.Background(), Message{Verb: Bind}); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("a call afterwards: %v", err)
	}
}

func TestACallEndsWithItsContext(t *testing.T) {
	a, b := pair(t)
	p, _ := run(t, a, nil)
	late := file(t, "too late")
	before := openFiles(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	errs := make(chan error, 1)
	go func() { _, _, err := p.Call(ctx, Message{Verb: Bind}); errs <- err }()
	m, _, err := receive(b, make([]byte, maxMessage), make([]byte, 1000))
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("the caller lost patience")
	cancel(cause)
	if err := <-errs; !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	if err := send(b, Message{ID: m.ID}, []*os.File{late}); err != nil {
		t.Fatal(err)
	}
	barrier(t, p, b)
	if now := openFiles(t); now > before { // fewer: the collector closed one of an earlier test
		t.Errorf("%d descriptors, there were %d: those of a late reply stay open", now, before)
	}
}

// barrier returns when all that the other end sent before has been looked at: what its conn is sent here by
// hand is behind it.
func barrier(t *testing.T, p *Peer, other *net.UnixConn) {
	t.Helper()
	ch := make(chan reply, 1)
	p.mu.Lock()
	p.calls[1<<40] = ch
	p.mu.Unlock()
	if err := send(other, Message{ID: 1 << 40}, nil); err != nil {
		t.Fatal(err)
	}
	<-ch
}

func TestAReplyThatRacesWithTheEndOfItsCallLeavesNoDescriptor(t *testing.T) {
	a, b := pair(t)
	shared := file(t, "x")
	p, _ := run(t, a, nil)
	before := openFiles(t)
	var echo sync.WaitGroup
	echo.Go(func() { // answers in order, so that the barrier is behind all
		buf, oob := make([]byte, maxMessage), make([]byte, 1000)
		for {
			m, _, err := receive(b, buf, oob)
			if err != nil || m.Verb == Unmount {
				return
			}
			send(b, Message{ID: m.ID}, []*os.File{shared})
		}
	})
	for i := range 300 {
		ctx, cancel := context.WithCancel(t.Context())
		if i%2 == 0 {
			cancel()
		} else {
			go cancel()
		}
		_, files, _ := p.Call(ctx, Message{Verb: Bind})
		CloseFiles(files)
		cancel()
	}
	if err := p.send(Message{ID: 1 << 41, Verb: Unmount}, nil); err != nil {
		t.Fatal(err)
	}
	echo.Wait()
	barrier(t, p, b)
	if now := openFiles(t); now > before { // fewer: the collector closed one of an earlier test
		t.Errorf("%d descriptors, there were %d", now, before)
	}
}

func TestDescriptorsThatNobodyTakesAreClosed(t *testing.T) {
	rights := func(t *testing.T, n int) []byte {
		f := file(t, "x")
		fds := make([]int, n)
		for i := range fds {
			fds[i] = int(f.Fd())
		}
		return unix.UnixRights(fds...)
	}
	for name, c := range map[string]struct {
		datagram string
		files    int
		ends     bool // the connection
	}{
		"beside what the handler leaves":  {`{"id":9,"verb":"bind"}`, 4, false},
		"beside garbage":                  {`garbage`, 4, false},
		"beside a reply nobody waits for": {`{"id":9}`, 4, false},
		"beside a verb nobody knows":      {`{"id":9,"verb":"x"}`, 1, false},
		"more than a message may have":    {`{"id":9,"verb":"bind"}`, 200, false},
		"beside an empty datagram":        {``, 4, true},
		"beside one that is too large":    {`{"id":9,"verb":"bind","text":"` + strings.Repeat("x", maxMessage) + `"}`, 4, false},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t)
			p, wait := run(t, a, func(context.Context, Message, []*os.File) (Message, []*os.File, error) {
				return Message{}, nil, nil
			})
			oob := rights(t, c.files)
			before := openFiles(t)
			sendRaw(t, b, []byte(c.datagram), oob)
			if c.ends {
				if err := wait(); err != nil {
					t.Errorf("Run: %v", err)
				}
				before-- // the socket
			} else {
				barrier(t, p, b)
				eventuallyAnswered(t, b, c.datagram)
			}
			if now := openFiles(t); now > before { // fewer: the collector closed one of an earlier test
				t.Errorf("%d descriptors, there were %d", now, before)
			}
		})
	}
}

// sendRaw is sendmsg(2): Go's adds a byte to an empty datagram.
func sendRaw(t *testing.T, c *net.UnixConn, b, oob []byte) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	h := unix.Msghdr{Control: &oob[0]}
	h.SetControllen(len(oob))
	var iov unix.Iovec
	if len(b) > 0 {
		iov.Base = &b[0]
		iov.SetLen(len(b))
		h.Iov = &iov
		h.SetIovlen(1)
	}
	err = raw.Write(func(fd uintptr) bool {
		_, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&h)), 0)
		if errno != 0 && errno != unix.EAGAIN {
			t.Errorf("sendmsg: %v", errno)
		}
		return errno != unix.EAGAIN
	})
	if err != nil {
		t.Fatal(err)
	}
}

// eventuallyAnswered waits for the end of the handler: its answer, where the datagram was a request.
func eventuallyAnswered(t *testing.T, b *net.UnixConn, datagram string) {
	t.Helper()
	if m, _ := Decode([]byte(datagram)); m.Verb == "" || len(datagram) > maxMessage {
		return
	}
	buf, oob := make([]byte, maxMessage), make([]byte, 1000)
	if m, _, err := receive(b, buf, oob); err != nil || m.ID != 9 {
		t.Errorf("answer: %+v, %v", m, err)
	}
}

func TestABadRequestIsAnsweredAndTheConnectionGoesOn(t *testing.T) {
	a, b := pair(t)
	run(t, a, func(context.Context, Message, []*os.File) (Message, []*os.File, error) { return Message{}, nil, nil })
	buf, oob := make([]byte, maxMessage), make([]byte, 1000)
	fds := make([]int, 200)
	for i := range fds {
		fds[i] = 0
	}
	for name, d := range map[string]struct {
		text string
		oob  []byte
	}{
		"wrong type":           {`{"id":5,"verb":"mount","mount":1}`, nil},
		"relative path":        {`{"id":5,"verb":"mount","path":"x"}`, nil},
		"too many descriptors": {`{"id":5,"verb":"mount"}`, unix.UnixRights(fds...)},
	} {
		if _, _, err := b.WriteMsgUnix([]byte(d.text), d.oob, nil); err != nil {
			t.Fatal(err)
		}
		if m, _, err := receive(b, buf, oob); err != nil || m.ID != 5 || !errors.Is(m.Err(), object.ErrInvalid) {
			t.Errorf("%s: answer %+v, %v", name, m, err)
		}
	}
	if err := send(b, Message{ID: 6, Verb: Bind}, nil); err != nil {
		t.Fatal(err)
	}
	if m, _, err := receive(b, buf, oob); err != nil || m.ID != 6 || m.Err() != nil {
		t.Errorf("a good request afterwards: %+v, %v", m, err)
	}
}

func TestABadReplyIsItsCallsError(t *testing.T) {
	a, b := pair(t)
	p, _ := run(t, a, nil)
	errs := make(chan error, 1)
	go func() { _, _, err := p.Call(context.Background(), Message{Verb: Bind}); errs <- err }()
	buf, oob := make([]byte, maxMessage), make([]byte, 1000)
	m, _, err := receive(b, buf, oob)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(b, `{"id":%d,"path":"x"}`, m.ID); err != nil {
		t.Fatal(err)
	}
	if err := <-errs; !errors.Is(err, object.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

func TestWhatIsTooLargeIsNotSent(t *testing.T) {
	a, b := pair(t)
	run(t, b, func(context.Context, Message, []*os.File) (Message, []*os.File, error) { return Message{}, nil, nil })
	p, _ := run(t, a, nil)
	if _, _, err := p.Call(t.Context(), Message{Verb: Bind, Text: strings.Repeat("x", maxMessage)}); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("a large message: %v", err)
	}
	f := file(t, "x")
	if _, _, err := p.Call(t.Context(), Message{Verb: Bind}, f, f, f, f, f); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("five descriptors: %v", err)
	}
	if _, _, err := p.Call(t.Context(), Message{Verb: Bind, Text: strings.Repeat("x", maxMessage-100)}, f, f, f, f); err != nil {
		t.Errorf("as large as allowed: %v", err)
	}
}

func TestSocketPathsMayBeLong(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	for range 2 { // the second one replaces the first one's file
		l, err := ListenPacket(path, 0o640)
		if err != nil {
			t.Fatal(err)
		}
		st, err := os.Lstat(path)
		if err != nil || st.Mode().Perm() != 0o640 {
			t.Errorf("socket file: %v, %v", st.Mode(), err)
		}
		c, err := Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		if err := send(c, Message{ID: 3}, nil); err != nil {
			t.Fatal(err)
		}
		if m, _, err := receive(s, make([]byte, 1000), make([]byte, 1000)); err != nil || m.ID != 3 {
			t.Errorf("got %+v, %v", m, err)
		}
		c.Close()
		s.Close()
		l.Close()
	}
	if _, err := Dial(t.Context(), path); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("dial without a listener: %v", err)
	}
	if _, err := Dial(t.Context(), filepath.Join(dir, "none", "s")); err == nil {
		t.Error("dial without a folder went well")
	}
	sl, err := ListenStream(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer sl.Close()
	c, err := DialStream(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := sl.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := c.Write([]byte("ab")); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	for got.Len() < 2 { // a stream, not datagrams
		one := make([]byte, 1)
		if _, err := s.Read(one); err != nil {
			t.Fatal(err)
		}
		got.Write(one)
	}
}
