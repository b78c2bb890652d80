package domainsocket

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/domainsocket/internal/wire"
	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
	"github.com/larderfs/larder/cacheworker/object"
)

// A child process of the tests is a client; its first argument is what it does, the second the socket.
const childEnv = "LARDER_TEST_CLIENT"

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		if err := child(what, os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(what, socket string) error {
	ctx := context.Background()
	c, err := shortcircuit.Dial(ctx, socket)
	if err != nil {
		return err
	}
	switch what {
	case "hold": // until killed
		f, err := c.Open(ctx, "a")
		if err != nil {
			return err
		}
		fmt.Println("local", f.Local())
		select {}
	case "full": // no descriptor is free
		free := must(os.Open("/dev/null"))
		n := uint64(free.Fd())
		free.Close()
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			return err
		}
		f, err := c.Open(ctx, "a")
		if err != nil {
			return err
		}
		b := make([]byte, f.Size())
		_, err = f.ReadAt(b, 0)
		fmt.Println("local", f.Local(), len(b), err)
		return f.Close()
	}
	return errors.New(what)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func dial(t testing.TB, w *worker) *shortcircuit.Client {
	t.Helper()
	c, err := shortcircuit.Dial(t.Context(), w.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func open(t testing.TB, c *shortcircuit.Client, name string) *shortcircuit.File {
	t.Helper()
	f, err := c.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func readAll(t testing.TB, f *shortcircuit.File) []byte {
	t.Helper()
	b := make([]byte, f.Size())
	if n, err := f.ReadAt(b, 0); n != len(b) || err != nil && err != io.EOF {
		t.Fatalf("read %d of %d bytes: %v", n, len(b), err)
	}
	return b
}

func TestStatListStatus(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "d/a", 10)
	v.write(t, "d/b/c", 20)
	v.write(t, "d/z", 0)
	c := dial(t, newWorker(t, Config{Volume: v}))
	ctx := t.Context()

	e, err := c.Stat(ctx, "d/a")
	want := shortcircuit.Entry(must(v.entry("d/a")))
	if err != nil || !e.ModTime.Equal(want.ModTime) {
		t.Errorf("Stat = %+v, %v; want %+v", e, err, want)
	}
	if e.ModTime = want.ModTime; e != want {
		t.Errorf("Stat = %+v; want %+v", e, want)
	}
	if e, err := c.Stat(ctx, ""); err != nil || e.Name != "" || !e.Folder {
		t.Errorf("Stat of the root = %+v, %v", e, err)
	}

	var names []string
	for after, more := "", true; more; {
		var es []shortcircuit.Entry
		if es, more, err = c.List(ctx, "d", after, 2); err != nil || len(es) == 0 || len(es) > 2 {
			t.Fatalf("List after %q = %v, %v", after, es, err)
		}
		for _, e := range es {
			names = append(names, e.Name)
			after = e.Name
		}
	}
	if got := strings.Join(names, " "); got != "a b z" {
		t.Errorf("List gives %q", got)
	}

	st, err := c.Status(ctx)
	if want := (shortcircuit.Status{Volume: "vol-1", Worker: "6ba7b810-9dad-11d1-80b4-00c04fd430c8", CachedBytes: 7, CapacityBytes: 70, Connections: 1}); err != nil || st != want {
		t.Errorf("Status = %+v, %v; want %+v", st, err, want)
	}
}

func TestListIsCutToAFrame(t *testing.T) {
	v := newFolder(t)
	const n = 1200
	for i := range n {
		v.write(t, fmt.Sprintf("%s-%04d", strings.Repeat("n", 250), i), 0)
	}
	c := dial(t, newWorker(t, Config{Volume: v}))
	got, pages := 0, 0
	for after, more := "", true; more; pages++ {
		es, m, err := c.List(t.Context(), "", after, 0)
		if err != nil || len(es) == 0 {
			t.Fatalf("List: %d entries, %v", len(es), err)
		}
		for _, e := range es {
			if e.Name <= after {
				t.Fatalf("%q behind %q", e.Name, after)
			}
			after = e.Name
		}
		got, more = got+len(es), m
	}
	if got != n || pages < 2 {
		t.Errorf("%d entries in %d pages", got, pages)
	}
}

func TestErrorsAreSentinels(t *testing.T) {
	v := newFolder(t)
	v.write(t, "d/a", 1)
	c := dial(t, newWorker(t, Config{Volume: v}))
	for path, want := range map[string]error{
		"none":                      object.ErrNotFound,
		"secret":                    object.ErrDenied,
		"../a":                      object.ErrInvalid,
		"/a":                        object.ErrInvalid,
		"d//a":                      object.ErrInvalid,
		"d/a/":                      object.ErrInvalid,
		"a\x00b":                    object.ErrInvalid,
		strings.Repeat("x", 256):    object.ErrInvalid,
		strings.Repeat("x/", 1<<16): object.ErrInvalid,
		strings.Repeat("x/", 3000):  object.ErrInvalid,
	} {
		if _, err := c.Stat(t.Context(), path); !errors.Is(err, want) {
			t.Errorf("Stat(%.20q): %v; want %v", path, err, want)
		}
	}
	if _, err := c.Stat(t.Context(), "broken"); err == nil || !strings.Contains(err.Error(), "something else") {
		t.Errorf("an error without a sentinel: %v", err)
	}
	if _, err := c.Open(t.Context(), "d"); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("open of a folder: %v", err)
	}
	if _, err := c.Open(t.Context(), "none"); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("open of nothing: %v", err)
	}
	if st := must(c.Status(t.Context())); st.Leases != 0 {
		t.Errorf("%d leases of what could not be opened", st.Leases)
	}
	if _, err := c.Open(t.Context(), ""); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("open of the root: %v", err)
	}
}

func TestOpenGivesADescriptionOfItsOwn(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	want := v.write(t, "a", 3<<20+5)
	c := dial(t, newWorker(t, Config{Volume: v}))
	f, g := open(t, c, "a"), open(t, c, "a")
	if !f.Local() || !g.Local() {
		t.Fatal("no descriptor")
	}
	if !bytes.Equal(readAll(t, f), want) {
		t.Error("other bytes by descriptor")
	}
	m, err := g.Mmap()
	if err != nil || !bytes.Equal(m, want) {
		t.Errorf("other bytes by mmap: %v", err)
	}
	if st := must(c.Status(t.Context())); st.Leases != 2 || v.open.Load() != 2 {
		t.Errorf("%d leases, %d files; want 2", st.Leases, v.open.Load())
	}
	f.Close()
	v.released(t)
	g.Close()
	v.released(t)
	if st := must(c.Status(t.Context())); st.Leases != 0 {
		t.Errorf("%d leases; want 0", st.Leases)
	}
	if _, err := f.ReadAt(m[:0:0], 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read of a closed file: %v", err)
	}
}

func TestIncompleteFileIsReadByReplies(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.incomplete.Store(true)
	c := dial(t, newWorker(t, Config{Volume: v}))
	for _, n := range []int{0, 1, 1000, 100_000, wire.MaxReply, 1<<20 + 17} {
		name := fmt.Sprint("f", n)
		want := v.write(t, name, n)
		f := open(t, c, name)
		if f.Local() {
			t.Fatal("a descriptor of an incomplete file")
		}
		if b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<40)); err != nil || !bytes.Equal(b, want) {
			t.Errorf("%d bytes: other bytes, %v", n, err)
		}
		if n <= 1000 {
			if err := iotest.TestReader(io.NewSectionReader(f, 0, f.Size()), want); err != nil {
				t.Errorf("%d bytes: %v", n, err)
			}
		}
		if n, err := f.ReadAt(make([]byte, 1), f.Size()); n != 0 || err != io.EOF {
			t.Errorf("at the end: %d, %v", n, err)
		}
		if _, err := f.Mmap(); !errors.Is(err, object.ErrIncomplete) {
			t.Errorf("Mmap: %v", err)
		}
		f.Close()
		v.released(t)
	}
}

func TestLeasesOfAKilledClientAreGivenUp(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 100)
	w := newWorker(t, Config{Volume: v})
	cmd := exec.Command("/proc/self/exe", w.path)
	cmd.Env = append(os.Environ(), childEnv+"=hold")
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, _ := out.Read(line)
	if string(line[:n]) != "local true\n" || v.open.Load() != 1 {
		t.Errorf("client says %q, %d files open", line[:n], v.open.Load())
	}
	cmd.Process.Kill()
	if p := v.released(t); p != "a" || v.open.Load() != 0 {
		t.Errorf("released %q, %d files open", p, v.open.Load())
	}
	cmd.Wait()
}

func TestClientWithoutAFreeDescriptorReadsByReplies(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 1000)
	w := newWorker(t, Config{Volume: v})
	cmd := exec.Command("/proc/self/exe", w.path)
	cmd.Env = append(os.Environ(), childEnv+"=full")
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "local false 1000 <nil>\n" {
		t.Errorf("client says %q, %v", out, err)
	}
}

func TestConnectSucceedsWhileNoWorkerServes(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 5)
	w := newWorker(t, Config{Volume: v})
	w.halt()
	raw, err := net.Dial("unix", w.path) // the file is there, the socket listens
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	type result struct {
		e   shortcircuit.Entry
		err error
	}
	got := make(chan result, 1)
	go func() {
		c, err := shortcircuit.Dial(t.Context(), w.path)
		if err != nil {
			got <- result{err: err}
			return
		}
		defer c.Close()
		e, err := c.Stat(t.Context(), "a")
		got <- result{e, err}
	}()
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := shortcircuit.Dial(short, w.path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial that may not wait: %v", err)
	}
	select {
	case r := <-got:
		t.Fatalf("answered by nobody: %+v", r)
	default:
	}
	w.start()
	if r := <-got; r.err != nil || r.e.Size != 5 {
		t.Errorf("the next worker answers %+v", r)
	}
}

func TestRestartIsNotNoticed(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	data := map[string][]byte{}
	for _, n := range []string{"local", "byreply", "changed"} {
		data[n] = v.write(t, n, 400_000)
	}
	w := newWorker(t, Config{Volume: v})
	c := dial(t, w)
	local := open(t, c, "local")
	v.incomplete.Store(true)
	byReply, changed := open(t, c, "byreply"), open(t, c, "changed")
	readAll(t, byReply)

	w.halt()
	for range 3 {
		v.released(t)
	}
	if !bytes.Equal(readAll(t, local), data["local"]) {
		t.Error("descriptor in hand, no worker: other bytes")
	}
	v.replace("changed", "v2")
	v.incomplete.Store(false)
	w.start()

	if !bytes.Equal(readAll(t, byReply), data["byreply"]) {
		t.Error("other bytes from the next worker")
	}
	if !byReply.Local() {
		t.Error("no descriptor, although the file was opened again and is complete by now")
	}
	for range 2 {
		if _, err := changed.ReadAt(make([]byte, 1), 0); !errors.Is(err, object.ErrChanged) {
			t.Errorf("read of a replaced object: %v", err)
		}
	}
	if again := open(t, c, "changed"); again.Version() != "v2" {
		t.Errorf("opened again: version %q", again.Version())
	}
	// local, byreply, and the new "changed"; that the lease of local was asked for again no read has waited for
	eventually(t, func() bool {
		st, err := c.Status(t.Context())
		return err == nil && st.Leases == 3
	})
	if !bytes.Equal(readAll(t, local), data["local"]) {
		t.Error("descriptor in hand, next worker: other bytes")
	}
}

func TestEveryRequestSurvivesRestarts(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.incomplete.Store(true)
	want := v.write(t, "a", 300_000)
	w := newWorker(t, Config{Volume: v})
	c := dial(t, w)
	f := open(t, c, "a")
	for range 20 {
		w.halt()
		got := make(chan error, 1)
		go func() {
			b := make([]byte, len(want))
			_, err := f.ReadAt(b, 0)
			if err == nil && !bytes.Equal(b, want) {
				err = errors.New("other bytes")
			}
			got <- err
		}()
		w.start()
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	}
}

func TestServeReturnsWithNothingHeld(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 100)
	v.hold, v.holding = make(chan struct{}), make(chan error, 4)
	w := newWorker(t, Config{Volume: v})
	c := dial(t, w)
	for range 20 {
		open(t, c, "a")
		ctx, cancel := context.WithCancel(t.Context())
		waiting := make(chan error, 1)
		go func() { _, err := c.Stat(ctx, "a"); waiting <- err }()
		<-v.holding
		w.halt()
		if v.open.Load() != 0 {
			t.Errorf("%d files open after Serve", v.open.Load())
		}
		if err := <-v.holding; err == nil {
			t.Error("a request outlived Serve")
		}
		w.start()
		select {
		case <-v.holding: // the next worker is asked
		case err := <-waiting:
			t.Fatalf("the client was told %v rather than to ask the next worker", err)
		}
		cancel()
		if err := <-waiting; !errors.Is(err, context.Canceled) {
			t.Errorf("canceled: %v", err)
		}
		<-v.holding
	}
	if _, err := os.Lstat(w.path); err != nil {
		t.Error(err)
	}
}

func TestCancelReachesTheVolume(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 100)
	v.hold, v.holding = make(chan struct{}), make(chan error, 4)
	c := dial(t, newWorker(t, Config{Volume: v}))
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan error, 1)
	go func() { _, err := c.Stat(ctx, "a"); waiting <- err }()
	<-v.holding
	cancel()
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Errorf("client: %v", err)
	}
	if err := <-v.holding; !errors.Is(err, context.Canceled) {
		t.Errorf("volume: %v", err)
	}
	close(v.hold)
	if _, err := c.Stat(t.Context(), "a"); err != nil {
		t.Errorf("the connection after a cancel: %v", err)
	}
}

func TestLimits(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 100)
	v.holding = make(chan error, 100)
	w := newWorker(t, Config{Volume: v, Connections: 2, Leases: 3, ConnLeases: 2, Requests: 2})
	c, d := dial(t, w), dial(t, w)
	if _, err := shortcircuit.Dial(t.Context(), w.path); !errors.Is(err, object.ErrBusy) {
		t.Errorf("third connection: %v", err)
	}

	f := open(t, c, "a")
	open(t, c, "a")
	if _, err := c.Open(t.Context(), "a"); !errors.Is(err, object.ErrBusy) {
		t.Errorf("third lease of a connection: %v", err)
	}
	open(t, d, "a")
	if _, err := d.Open(t.Context(), "a"); !errors.Is(err, object.ErrBusy) {
		t.Errorf("fourth lease of the volume: %v", err)
	}
	f.Close()
	v.released(t)
	open(t, d, "a")
	d.Close()
	v.released(t)
	v.released(t)

	r := rawDial(t, w)
	v.mu.Lock()
	v.hold = make(chan struct{})
	v.mu.Unlock()
	for id := uint64(1); id <= 3; id++ {
		r.send(wire.Stat, id, wire.AppendString(nil, "a"))
	}
	if h, text := r.receive(); h.ID != 3 || h.Code != wire.CodeBusy {
		t.Errorf("third request: %+v %q", h, text)
	}
	close(v.hold)
	for range 2 {
		if h, text := r.receive(); h.Code != wire.CodeOK {
			t.Errorf("request within the limit: %+v %q", h, text)
		}
	}
}

// A client that never reads its replies: others are served, its death is noticed, and what it can
// make the server hold is bounded.
func TestSlowReaderKeepsNobodyWaiting(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.incomplete.Store(true)
	want := v.write(t, "a", 1<<20)
	v.write(t, "slow", 1<<20)
	const held = 3 // replies
	w := newWorker(t, Config{Volume: v, ReplyBytes: held * wire.MaxReply})
	slow := rawDial(t, w)
	slow.send(wire.Open, 1, append([]byte{0}, wire.AppendString(nil, "slow")...))
	h, p := slow.receive()
	lease := wire.NewDecoder(p).Opened().Lease
	if h.Code != wire.CodeOK {
		t.Fatalf("open: %+v", h)
	}
	for id := range uint64(40) {
		b := wire.AppendUint64(nil, lease)
		b = wire.AppendUint64(b, 0)
		slow.send(wire.Read, id, wire.AppendUint32(b, wire.MaxReply))
	}
	c := dial(t, w)
	for range 10 {
		f := open(t, c, "a")
		if !bytes.Equal(readAll(t, f), want) {
			t.Error("other bytes")
		}
		f.Close()
		v.released(t)
	}
	eventually(t, func() bool { return v.slowReads.Load() >= held }) // the socket has no room for one
	if n := v.slowReads.Load(); n != held {
		t.Errorf("%d replies in memory, %d allowed", n, held)
	}
	slow.c.Close()
	if p := v.released(t); p != "slow" {
		t.Errorf("released %q", p)
	}
}

func TestUnreadDescriptorsAreBounded(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 10)
	w := newWorker(t, Config{Volume: v})
	r := rawDial(t, w)
	const n = unreadFiles + 20
	for round := range 2 {
		for id := range uint64(n) {
			r.send(wire.Open, id, append([]byte{0}, wire.AppendString(nil, "a")...))
		}
		r.queued(n * (wire.HeaderLen + 28))
		with := 0
		for range n {
			h, _ := r.receive()
			if h.Flags&wire.FlagDescriptor != 0 {
				with++
			}
		}
		if with != unreadFiles {
			t.Errorf("round %d: %d descriptors unread; want %d", round, with, unreadFiles)
		}
	}
}

func TestVersionMismatch(t *testing.T) {
	noLeak(t)
	w := newWorker(t, Config{Volume: newFolder(t)})
	for _, h := range []wire.ClientHello{{Min: 2, Max: 9}, {Min: 0, Max: 0}, {Min: 9, Max: 1}} {
		c, err := net.Dial("unix", w.path)
		if err != nil {
			t.Fatal(err)
		}
		c.Write(h.Append(nil))
		b, err := io.ReadAll(c)
		c.Close()
		got, perr := wire.ParseServerHello(b)
		if err != nil || perr != nil || got.Code != wire.CodeVersion || got.Version != wire.Version {
			t.Errorf("%+v is answered %+v, %v, %v", h, got, err, perr)
		}
	}
	r := rawDialWith(t, w, wire.ClientHello{Min: 0, Max: 7})
	r.send(wire.Status, 1, nil)
	if h, _ := r.receive(); h.Code != wire.CodeOK {
		t.Errorf("client that speaks later versions too: %+v", h)
	}
}

func TestBadFrames(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 10)
	w := newWorker(t, Config{Volume: v})
	header := func(n uint32, typ wire.Type, flags uint8, code wire.Code, rest ...byte) []byte {
		b := make([]byte, wire.HeaderLen)
		wire.Header{Len: n, Type: typ, Flags: flags, Code: code, ID: 1}.Put(b)
		return append(b, rest...)
	}
	for name, c := range map[string]struct {
		frame []byte
		code  wire.Code
		ends  bool
	}{
		"too large":           {header(wire.MaxRequest+1, wire.Stat, 0, 0), wire.CodeInvalid, true},
		"unknown type":        {header(0, 99, 0, 0), wire.CodeInvalid, false},
		"type 0":              {header(2, 0, 0, 0, 1, 2), wire.CodeInvalid, false},
		"flags":               {header(2, wire.Stat, 1, 0, 0, 0), wire.CodeInvalid, false},
		"code":                {header(2, wire.Stat, 0, 1, 0, 0), wire.CodeInvalid, false},
		"stat without path":   {header(0, wire.Stat, 0, 0), wire.CodeInvalid, false},
		"stat with more":      {header(3, wire.Stat, 0, 0, 0, 0, 0), wire.CodeInvalid, false},
		"string too short":    {header(3, wire.Stat, 0, 0, 0, 9, 'x'), wire.CodeInvalid, false},
		"dots":                {header(6, wire.Stat, 0, 0, 0, 4, '.', '.', '/', 'a'), wire.CodeInvalid, false},
		"list":                {header(1, wire.List, 0, 0, 0), wire.CodeInvalid, false},
		"list after dots":     {header(10, wire.List, 0, 0, 0, 0, 0, 0, 0, 2, '.', '.', 0, 0), wire.CodeInvalid, false},
		"open flags":          {header(4, wire.Open, 0, 0, 4, 0, 1, 'a'), wire.CodeInvalid, false},
		"both flags":          {header(4, wire.Open, 0, 0, 3, 0, 1, 'a'), wire.CodeInvalid, false},
		"open of nothing":     {header(4, wire.Open, 0, 0, 0, 0, 1, 'b'), wire.CodeNotFound, false},
		"read without lease":  {header(20, wire.Read, 0, 0, make([]byte, 20)...), wire.CodeInvalid, false},
		"read short":          {header(3, wire.Read, 0, 0, 1, 2, 3), wire.CodeInvalid, false},
		"release of no lease": {header(8, wire.Release, 0, 0, make([]byte, 8)...), wire.CodeInvalid, false},
		"status with more":    {header(1, wire.Status, 0, 0, 1), wire.CodeInvalid, false},
	} {
		r := rawDial(t, w)
		r.c.Write(c.frame)
		h, text := r.receive()
		if h.Code != c.code || h.ID != 1 || len(text) == 0 {
			t.Errorf("%s: %+v %q; want code %d", name, h, text, c.code)
		}
		if c.ends {
			if _, err := r.c.Read(make([]byte, 1)); err == nil {
				t.Errorf("%s: the connection goes on", name)
			}
		} else {
			r.send(wire.Status, 2, nil)
			if h, text := r.receive(); h.Code != wire.CodeOK || h.ID != 2 {
				t.Errorf("%s: the next request: %+v %q", name, h, text)
			}
		}
		r.c.Close()
	}
}

func TestRefusalsEndTheConnection(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.hold, v.holding = make(chan struct{}), make(chan error, 4)
	w := newWorker(t, Config{Volume: v})
	hasty := newWorker(t, Config{Volume: v, Hello: time.Millisecond})

	c := must(net.Dial("unix", w.path))
	defer c.Close()
	c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	if b, _ := io.ReadAll(c); len(b) != 0 {
		t.Errorf("HTTP is answered %q", b)
	}
	silent := must(net.Dial("unix", hasty.path))
	defer silent.Close()
	if b, err := io.ReadAll(silent); len(b) != 0 || err != nil {
		t.Errorf("silence is answered %q, %v", b, err)
	}
	r := rawDial(t, w)
	r.send(wire.Stat, 1, wire.AppendString(nil, "a"))
	<-v.holding
	r.send(wire.Stat, 1, wire.AppendString(nil, "a"))
	if _, err := r.c.Read(make([]byte, 1)); err == nil {
		t.Error("an id twice in flight is answered")
	}
}

func TestDescriptorsOfAClientAreDropped(t *testing.T) {
	noLeak(t)
	w := newWorker(t, Config{Volume: newFolder(t)})
	r := rawDial(t, w)
	before := len(descriptors(t))
	f := must(os.Open("/dev/null"))
	for id := range uint64(50) {
		b := wire.Finish(wire.Frame(), wire.Header{Type: wire.Status, ID: id})
		if _, _, err := r.c.WriteMsgUnix(b, unix.UnixRights(int(f.Fd()), int(f.Fd())), nil); err != nil {
			t.Fatal(err)
		}
		r.receive()
	}
	f.Close()
	if after := descriptors(t); len(after) != before {
		t.Errorf("the server keeps descriptors: %q", after)
	}
}

func TestOpenOrFail(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	v.write(t, "a", 10)
	v.incomplete.Store(true)
	r := rawDial(t, newWorker(t, Config{Volume: v}))
	r.send(wire.Open, 1, append([]byte{wire.OpenOrFail}, wire.AppendString(nil, "a")...))
	if h, _ := r.receive(); h.Code != wire.CodeIncomplete {
		t.Errorf("incomplete: %+v", h)
	}
	v.released(t)
	v.incomplete.Store(false)
	r.send(wire.Open, 2, append([]byte{wire.OpenOrFail}, wire.AppendString(nil, "a")...))
	if h, _ := r.receive(); h.Code != wire.CodeOK || h.Flags != wire.FlagDescriptor {
		t.Errorf("complete: %+v", h)
	}
	r.send(wire.Open, 3, append([]byte{wire.OpenNoDescriptor}, wire.AppendString(nil, "a")...))
	if h, _ := r.receive(); h.Code != wire.CodeOK || h.Flags != 0 {
		t.Errorf("none wanted: %+v", h)
	}
}

func TestManyClients(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	data := map[string][]byte{}
	for i := range 8 {
		name := fmt.Sprint("f", i)
		data[name] = v.write(t, name, 50_000*i+1)
	}
	w := newWorker(t, Config{Volume: v})
	var clients sync.WaitGroup
	for range 16 {
		clients.Go(func() {
			c, err := shortcircuit.Dial(t.Context(), w.path)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			var users sync.WaitGroup
			for range 4 {
				users.Go(func() {
					for name, want := range data {
						v.incomplete.Store(!v.incomplete.Load())
						f, err := c.Open(t.Context(), name)
						if err != nil {
							t.Error(err)
							return
						}
						b := make([]byte, len(want))
						if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF || !bytes.Equal(b, want) {
							t.Errorf("%s: other bytes, %v", name, err)
						}
						f.Close()
					}
				})
			}
			users.Wait()
		})
	}
	clients.Wait()
	for v.open.Load() > 0 {
		v.released(t)
	}
}

func TestLongPath(t *testing.T) {
	noLeak(t)
	v := newFolder(t)
	w := newWorker(t, Config{Volume: v})
	deep := t.TempDir()
	for range 10 {
		deep = filepath.Join(deep, strings.Repeat("p", 40))
	}
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	long := filepath.Join(deep, "6ba7b810-9dad-11d1-80b4-00c04fd430c8")
	if err := os.Link(w.path, long); err != nil { // as a bind mount of its folder shows it
		t.Fatal(err)
	}
	found, err := shortcircuit.Find(deep)
	if err != nil || found != long {
		t.Fatalf("Find = %q, %v", found, err)
	}
	c, err := shortcircuit.Dial(t.Context(), found)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// raw is a client that speaks frames.
type raw struct {
	t testing.TB
	c *net.UnixConn
}

func rawDial(t testing.TB, w *worker) *raw {
	t.Helper()
	return rawDialWith(t, w, wire.ClientHello{Min: 1, Max: 1})
}

func rawDialWith(t testing.TB, w *worker, h wire.ClientHello) *raw {
	t.Helper()
	c, err := net.Dial("unix", w.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	r := &raw{t, c.(*net.UnixConn)}
	r.c.Write(h.Append(nil))
	b := make([]byte, wire.ServerHelloLen)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *raw) send(t wire.Type, id uint64, payload []byte) {
	r.t.Helper()
	if _, err := r.c.Write(wire.Finish(append(wire.Frame(), payload...), wire.Header{Type: t, ID: id})); err != nil {
		r.t.Fatal(err)
	}
}

// receive reads a reply by read(2), which drops descriptors.
func (r *raw) receive() (wire.Header, []byte) {
	r.t.Helper()
	b := make([]byte, wire.HeaderLen)
	if _, err := io.ReadFull(r.c, b); err != nil {
		r.t.Fatal(err)
	}
	p := make([]byte, binary.BigEndian.Uint32(b))
	if _, err := io.ReadFull(r.c, p); err != nil {
		r.t.Fatal(err)
	}
	return wire.ParseHeader(b), p
}

// queued waits until n bytes wait to be read, for which the kernel has no event.
func (r *raw) queued(n int) {
	r.t.Helper()
	sc, err := r.c.SyscallConn()
	if err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, func() bool {
		got := 0
		if cerr := sc.Control(func(fd uintptr) { got, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ) }); cerr != nil || err != nil {
			r.t.Fatal(cerr, err)
		}
		return got >= n
	})
}

// eventually asks until the answer is yes.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within 30 s")
		}
	}
}
