package takeover

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// agreeable answers INIT as every other worker does.
func agreeable(init *os.File) error { return answerInit(init, resend) }

// at connects a worker at a stage of its life.
func at(t *testing.T, ms *Mounts, stage brokerwire.Stage, adopt func(init *os.File) error) (worker, error) {
	t.Helper()
	return connect(t, ms, &brokerwire.Session{UUID: "u", Stage: stage}, adopt)
}

func (w worker) expect(t *testing.T, prefix string) string {
	t.Helper()
	select {
	case got := <-w.told:
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
func (w worker) quiet(t *testing.T) {
	t.Helper()
	select {
	case got := <-w.told:
		t.Errorf("told %q", got)
	default:
	}
}

// owner is the worker of one mount, which has given back what it held.
func owner(t *testing.T, ms *Mounts) (worker, *Mount) {
	t.Helper()
	w, err := at(t, ms, brokerwire.Owner, agreeable)
	if err != nil {
		t.Fatal(err)
	}
	m := serve(t, ms, w)
	for range 3 {
		<-w.told // adopt, serve, listen
	}
	ms.Settled(w.Session)
	return w, m
}

func heirOf(t *testing.T, ms *Mounts) worker {
	t.Helper()
	heir, err := at(t, ms, brokerwire.Taking, agreeable)
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
	heir, err := at(t, ms, brokerwire.Taking, func(init *os.File) error { <-ready; return agreeable(init) })
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
	if _, err := at(t, ms, brokerwire.Giving, agreeable); !errors.Is(err, brokerwire.ErrExists) {
		t.Errorf("when it goes on: %v", err)
	}
}

func TestWhoComesAtTheWrongStageIsRefused(t *testing.T) {
	ms, _ := newMounts(t, time.Hour)
	if _, err := at(t, ms, brokerwire.Taking, agreeable); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("an heir of nobody: %v", err)
	}
	first, err := at(t, ms, brokerwire.Giving, agreeable) // the broker has died in between
	if err != nil {
		t.Fatal(err)
	}
	if _, err := at(t, ms, brokerwire.Taking, agreeable); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("an heir before its worker has given back what it holds: %v", err)
	}
	ms.Settled(first.Session)
	heirOf(t, ms)
	if _, err := at(t, ms, brokerwire.Taking, agreeable); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("a second heir: %v", err)
	}
	if _, err := at(t, ms, brokerwire.Giving, agreeable); !errors.Is(err, brokerwire.ErrExists) {
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
			heir, err := at(t, ms, brokerwire.Taking, adopt)
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
