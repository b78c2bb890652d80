package takeover

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/mounttable"
)

// kernel stands for what the broker lends.
type kernel struct {
	waiting func() (int, error)
	bind    func() (*os.File, error)
	aborted chan *Mount
	lost    chan []string // the paths, and why
}

func newMounts(t *testing.T, deadline time.Duration) (*Mounts, *kernel) {
	t.Helper()
	k := &kernel{bind: func() (*os.File, error) { return os.Open(os.DevNull) }, waiting: func() (int, error) { return 0, nil }, aborted: make(chan *Mount, 8), lost: make(chan []string, 8)}
	ms := New(Config{
		Deadline: deadline, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Bind:     func(string, string) (*os.File, error) { return k.bind() },
		Answered: func(*Mount) {},
		Waiting:  func(*Mount) (int, error) { return k.waiting() },
		Abort:    func(m *Mount) error { k.aborted <- m; return nil },
		Lost:     func(paths []string, why string) { k.lost <- append(paths, why) },
	})
	t.Cleanup(ms.Close)
	return ms, k
}

// worker is the other end of a session: it notes what it is asked, and agrees.
type worker struct {
	*brokerwire.Session
	die  func()
	told chan string // "verb mount", or "verb text"
}

// connect makes a worker, which answers INIT by adopt; err is the broker's answer to its hello.
func connect(t *testing.T, ms *Mounts, s *brokerwire.Session, adopt func(init *os.File) error) (w worker, err error) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
	}
	w = worker{Session: s, told: make(chan string, 256)}
	theirs := brokerwire.NewPeer(ends[1], func(_ context.Context, m brokerwire.Message, files []*os.File) (brokerwire.Message, []*os.File, error) {
		w.told <- string(m.Verb) + " " + m.Mount + m.Text
		if m.Verb == brokerwire.Adopt {
			return brokerwire.Message{}, nil, adopt(files[2])
		}
		return brokerwire.Message{}, nil, nil
	})
	s.Role = brokerwire.RoleWorker
	s.Peer = brokerwire.NewPeer(ends[0], func(context.Context, brokerwire.Message, []*os.File) (brokerwire.Message, []*os.File, error) {
		return brokerwire.Message{}, nil, object.ErrInvalid
	})
	left := make(chan struct{})
	go theirs.Run(context.Background())
	go func() { defer close(left); s.Run(context.Background()); ms.Leave(s) }()
	w.die = func() { theirs.Close(); <-left }
	t.Cleanup(w.die)
	return w, ms.Welcome(s)
}

// join connects a worker that negotiates these flags2.
func join(t *testing.T, ms *Mounts, uuid string, flags2 uint32) worker {
	t.Helper()
	w, err := connect(t, ms, &brokerwire.Session{UUID: uuid, PID: 4711}, func(init *os.File) error { return answerInit(init, flags2) })
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func answerInit(f *os.File, flags2 uint32) error {
	if _, err := unix.Read(int(f.Fd()), make([]byte, 4096)); err != nil {
		return err
	}
	out := make([]byte, 80)
	binary.LittleEndian.PutUint32(out[16+32:], flags2)
	_, err := f.Write(out)
	return err
}

const resend, pass = 1 << 7, 1 << 5 // bits of flags2

// serve mounts a volume for a worker.
func serve(t *testing.T, ms *Mounts, w worker) *Mount {
	t.Helper()
	fuse, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := mounttable.Dev("/") // it is mounted somewhere
	if err != nil {
		t.Fatal(err)
	}
	rec, err := brokerwire.NewRecord(brokerwire.State{Volume: brokerwire.Volume{ID: "v"}, Path: "/v", Dev: dev, InitIn: make([]byte, 104), Since: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	m := NewMount(fuse, rec)
	if err := errors.Join(ms.Add(m), ms.Serve(t.Context(), m, w.Session)); err != nil {
		t.Fatal(err)
	}
	return m
}

func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited 10 s in vain")
		}
	}
}

// metric is the value of one, or the count and sum of a histogram.
func metric(t *testing.T, c prometheus.Collector, name string) (value, sum float64) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c)
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == name {
			m := f.GetMetric()[0]
			if h := m.GetHistogram(); h != nil {
				return float64(h.GetSampleCount()), h.GetSampleSum()
			}
			return m.GetCounter().GetValue() + m.GetGauge().GetValue(), 0
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0, 0
}

func TestATakeOverIsCountedAndTold(t *testing.T) {
	ms, _ := newMounts(t, time.Hour)
	first := join(t, ms, "first", resend)
	m := serve(t, ms, first)
	told := func() brokerwire.Mount { return ms.List()[0] }
	if got := told(); !got.Served || got.Worker != "first" || got.WorkerPID != 4711 || got.WorkerSince.Before(got.Since) ||
		got.Takeovers != 0 || got.LongestStall != 0 || !slices.Equal(got.Without, []string{"passthrough"}) {
		t.Errorf("with its first worker: %+v", got)
	}
	served := told().WorkerSince
	first.die()
	if got := told(); got.Served || got.Worker != "" || got.WorkerPID != 0 || !got.WorkerSince.After(served) {
		t.Errorf("without a worker: %+v", got)
	}
	lost := told().WorkerSince
	join(t, ms, "second", resend)
	eventually(t, func() bool { return told().Takeovers == 1 })
	got := told()
	if !got.Served || got.Worker != "second" || !got.WorkerSince.After(lost) || got.LongestStall <= 0 || got.LongestStall > got.WorkerSince.Sub(lost) {
		t.Errorf("after a take-over: %+v, lost at %v", got, lost)
	}
	if n, sum := metric(t, ms.Collector(), "larder_broker_takeover_stall_seconds"); n != 1 || sum != got.LongestStall.Seconds() {
		t.Errorf("%v stalls of %v seconds, told are %v", n, sum, got.LongestStall)
	}
	for name, want := range map[string]float64{"larder_broker_mounts": 1, "larder_broker_served_mounts": 1, "larder_broker_given_up_mounts_total": 0} {
		if n, _ := metric(t, ms.Collector(), name); n != want {
			t.Errorf("%s is %v", name, n)
		}
	}
	if st, err := brokerwire.ReadState(m.Record.File()); err != nil || st.Takeovers != 1 || st.LongestStall != got.LongestStall {
		t.Errorf("what the next broker will know: %+v, %v", st, err)
	}
}

// A worker that is replaced while it is connected leaves no time without one, and no time since the year 1.
func TestAReplacedWorkerCountsAsItsStallWas(t *testing.T) {
	ms, _ := newMounts(t, time.Hour)
	serve(t, ms, join(t, ms, "first", resend))
	start := time.Now()
	join(t, ms, "second", resend)
	eventually(t, func() bool { return ms.List()[0].Worker == "second" && ms.List()[0].Takeovers == 1 })
	if stall := ms.List()[0].LongestStall; stall > time.Since(start) {
		t.Errorf("stall of %v", stall)
	}
}

func TestAMountWithoutAWorkerIsGivenUpAtTheDeadline(t *testing.T) {
	ms, k := newMounts(t, 10*time.Millisecond)
	w := join(t, ms, "first", resend)
	m := serve(t, ms, w)
	w.die()
	if got := <-k.aborted; got != m {
		t.Errorf("aborted %v", got.ID)
	}
	if got := <-k.lost; len(got) < 2 || !slices.Contains(got, "/") || !strings.Contains(got[len(got)-1], "within 10ms") {
		t.Errorf("told of %q", got)
	}
	if len(ms.All()) != 0 {
		t.Error("it is held still")
	}
	if n, _ := metric(t, ms.Collector(), "larder_broker_given_up_mounts_total"); n != 1 {
		t.Errorf("%v are given up", n)
	}
	if _, err := m.Device.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("its device: %v", err)
	}
}

// A listening socket pins the file system that it is bound in, and with it the worker's loop.
func TestASocketThatIsBoundTooLateIsClosed(t *testing.T) {
	var late *os.File
	t.Cleanup(func() { // when all has ended
		if _, err := late.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("the socket: %v", err)
		}
	})
	ms, k := newMounts(t, time.Hour)
	first := join(t, ms, "first", resend)
	m := serve(t, ms, first)
	first.die()
	binding, released := make(chan struct{}), make(chan struct{})
	k.bind = func() (_ *os.File, err error) {
		close(binding)
		<-released
		late, err = os.Open(os.DevNull)
		return late, err
	}
	join(t, ms, "second", resend) // its socket has another name
	<-binding
	ms.Release(t.Context(), m)
	close(released)
}

// Without resend a served mount is given up if a request waits all the time, and only then.
func TestALostRequestCostsAMountWithoutResend(t *testing.T) {
	for name, c := range map[string]struct {
		flags2  uint32
		waiting int
		givenUp bool
	}{
		"a request waits":  {pass, 1, true},
		"none waits":       {pass, 0, false},
		"it is sent again": {pass | resend, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const deadline = time.Second
			ms, k := newMounts(t, deadline)
			k.waiting = func() (int, error) { return c.waiting, nil }
			w := join(t, ms, "first", c.flags2)
			m := serve(t, ms, w)
			w.die()
			join(t, ms, "second", c.flags2)
			eventually(t, m.served)
			select {
			case <-k.aborted:
				if eventually(t, m.gone.Load); !c.givenUp {
					t.Error("it was given up")
				}
			case <-time.After(deadline + deadline/2):
				if c.givenUp {
					t.Error("it was not given up")
				}
			}
		})
	}
}
