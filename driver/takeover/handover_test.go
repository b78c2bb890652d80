package takeover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// process is a worker of which the broker's end is tested: it notes what it is asked.
type process struct {
	*brokerwire.Session
	die  func()
	told chan string // "verb mount", or "verb text"
}

// agreeable answers INIT as every other worker does.
func agreeable(init *os.File) error { return answerInit(init, resend) }

// connect makes a worker at a stage; err is the broker's answer to its hello.
func connect(t *testing.T, ms *Mounts, stage brokerwire.Stage, adopt func(init *os.File) error) (p *process, err error) {
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
	p = &process{told: make(chan string, 64)}
	theirs := brokerwire.NewPeer(ends[1], func(_ context.Context, m brokerwire.Message, files []*os.File) (brokerwire.Message, []*os.File, error) {
		p.told <- string(m.Verb) + " " + m.Mount + m.Text
		if m.Verb == brokerwire.Adopt {
			return brokerwire.Message{}, nil, adopt(files[2])
		}
		return brokerwire.Message{}, nil, nil
	})
	p.Session = &brokerwire.Session{Role: brokerwire.RoleWorker, UUID: "u", Stage: stage}
	p.Peer = brokerwire.NewPeer(ends[0], func(context.Context, brokerwire.Message, []*os.File) (brokerwire.Message, []*os.File, error) {
		return brokerwire.Message{}, nil, object.ErrInvalid
	})
	left := make(chan struct{})
	go theirs.Run(context.Background())
	go func() { defer close(left); p.Run(context.Background()); ms.Leave(p.Session) }()
	p.die = func() { theirs.Close(); <-left }
	t.Cleanup(p.die)
	return p, ms.Welcome(p.Session)
}

func (p *process) expect(t *testing.T, prefix string) string {
	t.Helper()
	select {
	case got := <-p.told:
		if !strings.HasPrefix(got, prefix) {
			t.Fatalf("told %q, want %q", got, prefix)
		}
		return got
	case <-time.After(10 * time.Second):
		t.Fatalf("not told %q", prefix)
	}
	panic("not reached")
}

// quiet checks that the worker was told nothing more.
func (p *process) quiet(t *testing.T) {
	t.Helper()
	select {
	case got := <-p.told:
		t.Errorf("told %q", got)
	default:
	}
}

// owner is the worker of one mount, which has given back what it held.
func owner(t *testing.T, ms *Mounts) (*process, *Mount) {
	t.Helper()
	p, err := connect(t, ms, brokerwire.Owner, agreeable)
	if err != nil {
		t.Fatal(err)
	}
	m := serve(t, ms, worker{p.Session, p.die})
	for range 3 {
		<-p.told // adopt, serve, listen
	}
	ms.Settled(p.Session)
	return p, m
}

func heirOf(t *testing.T, ms *Mounts) *process {
	t.Helper()
	heir, err := connect(t, ms, brokerwire.Taking, agreeable)
	if err != nil {
		t.Fatal(err)
	}
	return heir
}

func TestAnHeirServesWhenTheWorkerHasEnded(t *testing.T) {
	ms, _ := newMounts(t, time.Hour)
	elder, m := owner(t, ms)
	heir := heirOf(t, ms)
	heir.expect(t, "adopt v")
	elder.expect(t, "yield")
	heir.quiet(t)
	if !ms.IsWorker(elder.Session) || ms.IsWorker(heir.Session) {
		t.Error("the heir is the worker while the worker lives")
	}
	if err := m.Replace(nil); !errors.Is(err, object.ErrBusy) {
		t.Errorf("the worker compacts under the heir's hands: %v", err)
	}
	waited := make(chan *brokerwire.Session)
	go func() { s, _ := ms.Worker(t.Context()); waited <- s }()
	elder.die()
	heir.expect(t, "serve v")
	if got := <-waited; got != heir.Session {
		t.Error("a mount in the middle gets the worker that ends")
	}
	eventually(t, func() bool { return ms.List()[0].Takeovers == 1 })
	heirOf(t, ms).expect(t, "adopt v") // at once: the heir had nothing to give back
}

// A worker that dies before its heir is ready, or is not waited for any longer, leaves the mounts
// to the heir, who serves each when it is ready.
func TestAnHeirThatIsSlowServesLater(t *testing.T) {
	ms, _ := newMounts(t, time.Hour)
	elder, _ := owner(t, ms)
	ready := make(chan struct{})
	heir, err := connect(t, ms, brokerwire.Taking, func(init *os.File) error { <-ready; return agreeable(init) })
	if err != nil {
		t.Fatal(err)
	}
	heir.expect(t, "adopt v")
	elder.die()
	heir.quiet(t)
	close(ready)
	heir.expect(t, "serve v")
}

// A worker that does not end when it is told to loses its mounts all the same.
func TestAWorkerThatDoesNotEndIsReplaced(t *testing.T) {
	ms, _ := newMounts(t, time.Hour)
	ms.patience = time.Millisecond
	elder, _ := owner(t, ms)
	heir := heirOf(t, ms)
	elder.expect(t, "yield")
	heir.expect(t, "adopt v")
	heir.expect(t, "serve v")
	if _, err := connect(t, ms, brokerwire.Giving, agreeable); !errors.Is(err, brokerwire.ErrExists) {
		t.Errorf("when it goes on: %v", err)
	}
}

func TestWhoComesAtTheWrongStageIsRefused(t *testing.T) {
	ms, _ := newMounts(t, time.Hour)
	if _, err := connect(t, ms, brokerwire.Taking, agreeable); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("an heir of nobody: %v", err)
	}
	first, err := connect(t, ms, brokerwire.Giving, agreeable) // the broker has died in between
	if err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t, ms, brokerwire.Taking, agreeable); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("an heir before its worker has given back what it holds: %v", err)
	}
	ms.Settled(first.Session)
	heirOf(t, ms)
	if _, err := connect(t, ms, brokerwire.Taking, agreeable); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("a second heir: %v", err)
	}
	if _, err := connect(t, ms, brokerwire.Giving, agreeable); !errors.Is(err, brokerwire.ErrExists) {
		t.Errorf("a worker that was slow to end: %v", err)
	}
}

// An heir that cannot have every mount gets none and is told why; the worker stays.
func TestAnHeirThatCannotServeIsSentAway(t *testing.T) {
	for name, adopt := range map[string]func(*os.File) error{
		"it negotiates other flags": func(init *os.File) error { return answerInit(init, resend|pass) },
		"it does not know the source": func(*os.File) error {
			return fmt.Errorf("source ftp://h: not known: %w", object.ErrInvalid)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ms, _ := newMounts(t, time.Hour)
			elder, _ := owner(t, ms)
			heir, err := connect(t, ms, brokerwire.Taking, adopt)
			if err != nil {
				t.Fatal(err)
			}
			got := heir.expect(t, "adopt v")
			for !strings.HasPrefix(got, "yield") { // a drop is between, if it had taken it
				got = heir.expect(t, "")
			}
			if !strings.Contains(got, `volume "v": `) {
				t.Errorf("told %q: that does not say why", got)
			}
			heir.die()
			elder.quiet(t)
			if !ms.IsWorker(elder.Session) || !ms.List()[0].Served {
				t.Error("the worker has lost its mount")
			}
		})
	}
}
