package fusefs

import (
	"bytes"
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/source"
)

// slow makes each request of the kind take a second.
func (w *world) slow(kind source.Kind) {
	w.mem.SetBefore(func(ctx context.Context, r memsource.Request) error {
		if r.Kind != kind {
			return nil
		}
		select {
		case <-time.After(time.Second):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
}

// A profiler's timer must not become an I/O error: O_DIRECT reads and opens are interrupted
// by any signal, also with SA_RESTART.
func TestATimerSignalDoesNotFailWhatTakesASecond(t *testing.T) {
	for name, c := range map[string]struct {
		kind  source.Kind
		flags int
	}{
		"read":        {source.Get, 0},
		"direct read": {source.Get, unix.O_DIRECT},
		"open":        {source.Head, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it takes its time
			w := newWorld(t, options{volume: brokerwire.Volume{Freshness: -1}})
			want := bytesOf(1, 2<<20)
			w.put("f", want)
			u := newUser(t, 65534)
			u.stat(w.data("f"))
			w.slow(c.kind)
			a := u.do(call{Op: "pelted", Path: w.data("f"), Flags: c.flags, Off: 4096, Len: 8192})
			if a.Errno != 0 || !bytes.Equal(a.Data, want[4096:4096+8192]) {
				t.Errorf("%d bytes, %v", len(a.Data), a.Errno)
			}
			if a.N < 5 {
				t.Errorf("%d signals: the test did not come to what it tests", a.N)
			}
		})
	}
}

// Who is killed must end soon, though the store never answers.
func TestAReaderThatIsKilledEnds(t *testing.T) {
	for name, c := range map[string]call{
		"read":        {Op: "sum"},
		"direct read": {Op: "sum", Flags: unix.O_DIRECT},
		"look-up":     {Op: "stat"},
		"listing":     {Op: "readdir"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it takes its time
			w := newWorld(t, options{volume: brokerwire.Volume{Freshness: -1}})
			w.put("d/f", bytesOf(1, 2<<20))
			u := newUser(t, 65534)
			u.stat(w.data("d/f"))
			asked, given := make(chan struct{}, 100), make(chan struct{}, 100)
			w.mem.SetBefore(func(ctx context.Context, r memsource.Request) error {
				if c.Op == "sum" && r.Kind != source.Get {
					return nil
				}
				asked <- struct{}{}
				<-ctx.Done()
				given <- struct{}{}
				return ctx.Err()
			})
			c.Path = w.data("d/f")
			if c.Op == "readdir" {
				c.Path = w.data("d")
			}
			u.ask(c)
			<-asked
			if err := u.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- u.cmd.Wait() }()
			select {
			case <-ended:
			case <-time.After(patience):
				t.Fatal("it does not end")
			}
			if name == "read" {
				return // the kernel's read-ahead has no reader that could be killed
			}
			select {
			case <-given:
			case <-time.After(patience):
				t.Error("the request goes on, for nobody")
			}
		})
	}
}
