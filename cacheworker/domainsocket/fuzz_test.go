package domainsocket

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/internal/wire"
)

// socketpair is a connection and its other end.
func socketpair(t testing.TB) (a, b *net.UnixConn) {
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
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

// conversation makes a seed.
func conversation(frames ...[]byte) []byte {
	b := wire.ClientHello{Min: 1, Max: 1}.Append(nil)
	for _, f := range frames {
		b = append(b, f...)
	}
	return b
}

func request(t wire.Type, id uint64, payload ...byte) []byte {
	return wire.Finish(append(wire.Frame(), payload...), wire.Header{Type: t, ID: id})
}

// FuzzConversation gives a server all that a client might send. It must end when the client does,
// hold nothing then, and answer in frames.
func FuzzConversation(f *testing.F) {
	a := wire.AppendString(nil, "a")
	lease := binary.BigEndian.AppendUint64(nil, 1)
	read := append(append(append([]byte{}, lease...), make([]byte, 8)...), 0, 0, 0, 9)
	f.Add([]byte{}, false)
	f.Add([]byte("LRDR\x00\x02\x00\x09"), false)
	f.Add(conversation(request(wire.Stat, 1, a...), request(wire.Status, 2), request(wire.List, 3, 0, 0, 0, 2, 0, 0, 0, 0)), false)
	f.Add(conversation(request(wire.Open, 1, append([]byte{0}, a...)...), request(wire.Read, 2, read...), request(wire.Release, 3, lease...)), false)
	f.Add(conversation(request(wire.Open, 1, append([]byte{1}, a...)...), request(wire.Cancel, 1), request(wire.Read, 2, read...)), true)
	f.Add(conversation(request(wire.Open, 1, append([]byte{2}, a...)...), request(99, 1, 7), []byte("\xff\xff\xff\xff\x01")), true)

	v := newFolder(f)
	v.write(f, "a", 100_000)
	v.write(f, "d/b", 10)
	f.Fuzz(func(t *testing.T, in []byte, incomplete bool) {
		v.incomplete.Store(incomplete)
		before := len(descriptors(t))
		s := New(Config{Volume: v, Hello: time.Minute, Requests: 4, ConnLeases: 3})
		server, client := socketpair(t)
		ended := make(chan struct{})
		go func() { s.serveConn(context.Background(), server); close(ended) }()
		answered := make(chan []byte)
		go func() { b, _ := io.ReadAll(client); answered <- b }()
		client.Write(in)
		client.CloseWrite()
		<-ended
		frames(t, <-answered)
		client.Close()
		if n := v.open.Load(); n != 0 || s.leases.Load() != 0 || s.conns.Load() != 0 {
			t.Errorf("%d files open, %d leases, %d connections", n, s.leases.Load(), s.conns.Load())
		}
		for len(v.closed) > 0 {
			<-v.closed
		}
		if after := descriptors(t); len(after) != before {
			t.Errorf("%d descriptors before, now %q", before, after)
		}
	})
}

// frames checks what a server says; the last frame may be cut short by the end of the client.
func frames(t *testing.T, b []byte) {
	if len(b) == 0 {
		return
	}
	if len(b) < wire.ServerHelloLen {
		t.Fatalf("hello of %d bytes", len(b))
	}
	if _, err := wire.ParseServerHello(b[:wire.ServerHelloLen]); err != nil {
		t.Fatal(err)
	}
	for b = b[wire.ServerHelloLen:]; len(b) >= wire.HeaderLen; {
		h := wire.ParseHeader(b)
		if h.Len > wire.MaxReply || h.Code > wire.CodeCanceled || h.Flags > wire.FlagDescriptor {
			t.Fatalf("reply %+v", h)
		}
		b = b[min(len(b), wire.HeaderLen+int(h.Len)):]
	}
}
