package fusefs

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/source"
)

// tally counts the kernel's requests by their names, as go-fuse prints them.
type tally struct {
	slog.Handler

	mu   sync.Mutex // guards seen
	seen map[string]int
}

func (l *tally) Handle(ctx context.Context, r slog.Record) error {
	line, ok := strings.CutPrefix(r.Message, "rx ")
	if !ok {
		if strings.HasPrefix(r.Message, "tx ") || strings.HasPrefix(r.Message, "doBatchForget") {
			return nil
		}
		return l.Handler.Handle(ctx, r)
	}
	_, line, _ = strings.Cut(line, ": ")
	name, _, _ := strings.Cut(line, " ")
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seen[name]++
	return nil
}

// take is what was asked since the last call.
func (l *tally) take() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := l.seen
	l.seen = map[string]int{}
	return seen
}

// newTally is a world whose requests are counted.
func newTally(t *testing.T, o options) (*world, *tally) {
	l := &tally{Handler: testLog(t).Handler(), seen: map[string]int{}}
	o.log = slog.New(l)
	return newWorld(t, o), l
}

// except is what remains when those that nobody waits for are left out.
func except(seen map[string]int, names ...string) map[string]int {
	seen = maps.Clone(seen)
	for _, name := range names {
		delete(seen, name)
	}
	return seen
}

var asynchronous = []string{"RELEASE", "RELEASEDIR", "FORGET", "BATCH_FORGET"}

// A small file costs its open two requests and its bytes one, and later only the open: there is no GETATTR, no FLUSH, no
// second READ that finds the end.
func TestASmallFileCostsFewRequests(t *testing.T) {
	const files = 20
	for name, f := range map[string]Features{"passthrough": allFeatures, "without": {Resend: true, Splice: true}} {
		t.Run(name, func(t *testing.T) {
			w, l := newTally(t, options{features: &f})
			u := newUser(t, 0)
			for i := range files {
				w.put(fmt.Sprint("d/", i), bytesOf(uint64(i), 4096))
			}
			u.stat(w.data("d"))
			round := func(what string, want map[string]int) {
				t.Helper()
				l.take()
				for i := range files {
					if u.sum(w.data(fmt.Sprint("d/", i))) != sumOf(bytesOf(uint64(i), 4096)) {
						t.Error("wrong bytes")
					}
				}
				if got := except(l.take(), asynchronous...); !maps.Equal(got, want) {
					t.Errorf("%s: %v; want %v", what, got, want)
				}
			}
			round("cold", map[string]int{"LOOKUP": files, "OPEN": files, "READ": files})
			for i := range files {
				w.complete(u, fmt.Sprint("d/", i))
			}
			for i := range files { // each is in the mode in which it stays
				u.sum(w.data(fmt.Sprint("d/", i)))
			}
			round("warm", map[string]int{"OPEN": files})
			w.forget()
			eventually(t, "the kernel forgets", func() bool { nodes, _ := w.served().Stats(); return nodes < files/2 })
			u.stat(w.data("d"))
			round("cached, and the kernel knows nothing", map[string]int{"LOOKUP": files, "OPEN": files})
		})
	}
}

// A listing brings the attributes of all with it.
func TestAListingCostsNoRequestPerFile(t *testing.T) {
	const folders, files = 5, 400
	w, l := newTally(t, options{})
	u := newUser(t, 0)
	for d := range folders {
		for i := range files {
			w.put(fmt.Sprintf("t/%d/%d", d, i), []byte("x"))
		}
	}
	u.stat(w.data("t"))
	l.take()
	w.mem.Requests()
	for d := range folders {
		dir := fmt.Sprint("t/", d)
		fd := u.open(w.data(dir), unix.O_DIRECTORY)
		es := u.entries(fd, 32<<10, files+3)
		u.close(fd)
		for _, e := range es {
			if st := u.stat(w.data(dir + "/" + e.Name)); e.Name[0] != '.' && st.Size != 1 {
				t.Fatalf("%s has %d bytes", e.Name, st.Size)
			}
		}
		if len(es) != files+2 {
			t.Errorf("%d entries in %s", len(es), dir)
		}
	}
	got := except(l.take(), asynchronous...)
	if got["LOOKUP"] > folders || got["GETATTR"] > 0 || got["OPENDIR"] != folders {
		t.Errorf("%v for %d files in %d folders", got, folders*files, folders)
	}
	rs := w.mem.Requests()
	if lists, heads := memsource.Count(rs, source.List), memsource.Count(rs, source.Head); lists > folders+1 || heads > 0 { // one more for the folder that they lie in
		t.Errorf("%d LISTs and %d HEADs for %d folders", lists, heads, folders)
	}
}
