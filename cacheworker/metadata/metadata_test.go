package metadata

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// world is a store in memory and a cache over it.
type world struct {
	t     *testing.T
	store *memsource.Store
	cache *Cache
	view  *View
}

func newWorld(t *testing.T, cfg Config, files ...string) *world {
	w := &world{t: t, store: &memsource.Store{}}
	for _, f := range files {
		w.store.Put(f, []byte(f))
	}
	w.cache = New(cfg)
	w.view = w.cache.View(w.store.Source("alice"))
	t.Cleanup(func() { checkInvariants(t, w.cache) })
	return w
}

// asked returns how many LISTs and HEADs were made since the last call.
func (w *world) asked() string {
	rs := w.store.Requests()
	return fmt.Sprintf("%d LIST %d HEAD", memsource.Count(rs, source.List), memsource.Count(rs, source.Head))
}

func (w *world) lookup(dir, name string, maxAge time.Duration) string {
	return w.describe(w.view.Lookup(w.t.Context(), dir, name, maxAge))
}

func (w *world) describe(e Entry, err error) string {
	switch {
	case errors.Is(err, object.ErrNotFound):
		return "none"
	case errors.Is(err, object.ErrDenied):
		return "denied"
	case err != nil:
		return err.Error()
	case e.Folder:
		return "folder"
	}
	if !strings.HasSuffix(e.Object.Key, e.Name) || e.Object.Store != "memory://test" || e.Object.ModTime.IsZero() {
		w.t.Errorf("entry of %q: %+v", e.Name, e)
	}
	return "file"
}

// want fails unless the answer and the requests for it are these.
func (w *world) want(got, answer, requests string) {
	w.t.Helper()
	if r := w.asked(); got != answer || r != requests {
		w.t.Errorf("got %s after %s, want %s after %s", got, r, answer, requests)
	}
}

// all lists dir to its end.
func (w *world) all(dir string, maxAge time.Duration) (names []string) {
	w.t.Helper()
	after := ""
	for {
		entries, more, err := w.view.List(w.t.Context(), dir, after, maxAge)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, e.Cookie())
		}
		if !more {
			return names
		}
		if len(entries) == 0 {
			w.t.Fatal("no entries, but more")
		}
		after = entries[len(entries)-1].Cookie()
	}
}

// eventually asks again until a deadline, where nothing tells.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came that %s", what)
		}
	}
}

// checkInvariants compares the books with what is there.
func checkInvariants(t *testing.T, c *Cache) {
	t.Helper()
	eventually(t, "what is listed ahead has come", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.ahead == 0
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	entries, segs := 0, 0
	for _, tab := range c.tables {
		for prefix, f := range tab.folders {
			for i, s := range f.segs {
				entries += s.cost()
				segs++
				if !below(s.lo, s.hi) || i > 0 && (f.segs[i-1].hi == "" || f.segs[i-1].hi > s.lo) {
					t.Errorf("folder %q: segment %d [%q, %q) is out of order", prefix, i, s.lo, s.hi)
				}
				if s.in != f || s.elem == nil {
					t.Errorf("folder %q: segment %d is not in the books", prefix, i)
				}
				for k, sl := range s.slots {
					rel := sl.key[len(prefix):]
					if rel < s.lo || !below(rel, s.hi) || k > 0 && s.slots[k-1].key >= sl.key {
						t.Errorf("folder %q: %q is out of place in [%q, %q)", prefix, rel, s.lo, s.hi)
					}
				}
			}
		}
	}
	if c.stats.Entries != entries || c.lru.Len() != segs {
		t.Errorf("books: %d entries, %d segments; there are %d, %d", c.stats.Entries, c.lru.Len(), entries, segs)
	}
	if len(c.flights) != 0 {
		t.Errorf("%d requests are still under way", len(c.flights))
	}
}

func TestOneListAnswersAllLookupsInAFolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{}, "d/a", "d/b", "d/c/x")
		w.want(w.lookup("d/", "a", time.Minute), "file", "1 LIST 0 HEAD")
		w.want(w.lookup("d/", "b", time.Minute), "file", "0 LIST 0 HEAD")
		w.want(w.lookup("d/", "c", time.Minute), "folder", "0 LIST 0 HEAD")
		w.want(w.lookup("d/", "nope", time.Minute), "none", "0 LIST 0 HEAD")
		w.want(w.lookup("d/", "zzz", time.Minute), "none", "0 LIST 0 HEAD")
		w.want(fmt.Sprint(w.all("d/", time.Minute)), "[a b c/]", "0 LIST 0 HEAD")
		time.Sleep(time.Minute + time.Second) // of the fake clock
		w.store.Put("d/nope", nil)
		w.want(w.lookup("d/", "nope", time.Minute), "file", "1 LIST 0 HEAD")
	})
}

func TestWhatNoPathCanExpressDoesNotExist(t *testing.T) {
	w := newWorld(t, Config{}, "d/a")
	for _, name := range []string{"", ".", "..", "a/b", "a\x00", strings.Repeat("x", 256)} {
		w.want(w.lookup("d/", name, 0), "none", "0 LIST 0 HEAD")
	}
}

func TestFreshnessZeroAsksEachTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{}, "d/a", "d/c/x")
		w.want(w.lookup("d/", "a", 0), "file", "0 LIST 1 HEAD")
		w.want(w.lookup("d/", "a", 0), "file", "0 LIST 1 HEAD")
		w.want(w.lookup("d/", "c", 0), "folder", "1 LIST 1 HEAD")
		w.want(w.lookup("d/", "c", 0), "folder", "1 LIST 0 HEAD") // known as a folder
		w.want(w.lookup("d/", "nope", 0), "none", "1 LIST 1 HEAD")
		w.store.Delete("d/a")
		w.want(w.lookup("d/", "a", 0), "none", "1 LIST 1 HEAD")
		w.store.Put("d/new", nil)
		w.want(fmt.Sprint(w.all("d/", 0)), "[c/ new]", "1 LIST 0 HEAD")
		w.want(fmt.Sprint(w.all("d/", 0)), "[c/ new]", "1 LIST 0 HEAD")
		w.store.Delete("d/c/x")
		w.store.Put("d/c", nil)
		w.want(w.lookup("d/", "c", 0), "file", "1 LIST 1 HEAD")
	})
}

// gate holds requests until they are let through.
type gate struct {
	arrived chan memsource.Request
	pass    chan struct{}
}

func (w *world) gate() *gate {
	g := &gate{make(chan memsource.Request, 100), make(chan struct{})}
	w.store.Before = func(ctx context.Context, r memsource.Request) error {
		g.arrived <- r
		select {
		case <-g.pass:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return g
}

func TestFreshnessZeroSharesOnlyRequestsSentAfterTheAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{}, "d/a")
		g := w.gate()
		var wg sync.WaitGroup
		answers := make(chan string, 6)
		ask := func() { wg.Go(func() { answers <- w.lookup("d/", "a", 0) }) }
		ask()
		synctest.Wait() // its HEAD is under way
		for range 5 {
			ask()
		}
		synctest.Wait()
		if n := len(g.arrived); n != 1 {
			t.Errorf("%d requests at once", n)
		}
		g.pass <- struct{}{}
		synctest.Wait()
		g.pass <- struct{}{} // one for the five
		wg.Wait()
		for range 6 {
			if a := <-answers; a != "file" {
				t.Error(a)
			}
		}
		if got := w.asked(); got != "0 LIST 2 HEAD" {
			t.Errorf("%s; want two HEADs: the second for those who asked after the first was sent", got)
		}
	})
}

func TestTheAnswerIsNeverOlderThanTheAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		old := w.store.Put("d/a", []byte("old"))
		held := make(chan struct{})
		first := true
		slow := slowHead{w.store.Source("alice"), held, &first}
		w.view = w.cache.View(slow)

		lookup := func() <-chan Entry {
			got := make(chan Entry, 1)
			go func() {
				e, err := w.view.Lookup(t.Context(), "d/", "a", 0)
				if err != nil {
					t.Error(err)
				}
				got <- e
			}()
			return got
		}
		before := lookup()
		synctest.Wait() // the store has answered "old", but the answer is on its way
		now := w.store.Put("d/a", []byte("newer"))
		after := lookup()
		synctest.Wait()
		close(held)
		if e := <-before; e.Object.Version != old.Version {
			t.Errorf("first: %v", e.Object)
		}
		if e := <-after; e.Object.Version != now.Version {
			t.Errorf("second asked after the change and got %v, want %v", e.Object, now)
		}
	})
}

// slowHead delivers the answer of the first HEAD late.
type slowHead struct {
	source.Source
	held  chan struct{}
	first *bool
}

func (s slowHead) Head(ctx context.Context, key string) (object.Object, error) {
	o, err := s.Source.Head(ctx, key)
	if *s.first {
		*s.first = false
		<-s.held
	}
	return o, err
}

func TestTwentyViewsMakeTheTrafficOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		for i := range 300 {
			w.store.Put(fmt.Sprintf("d/%d/f%d", i%10, i), nil)
		}
		w.store.PageSize = 20
		walk := func(v *View) {
			for dirs := []string{""}; len(dirs) > 0; {
				dir := dirs[0]
				dirs = dirs[1:]
				for after, more := "", true; more; {
					var es []Entry
					var err error
					if es, more, err = v.List(t.Context(), dir, after, time.Minute); err != nil {
						t.Error(err)
						return
					}
					for _, e := range es {
						after = e.Cookie()
						if e.Folder {
							dirs = append(dirs, dir+e.Name+"/")
						} else if _, err := v.Lookup(t.Context(), dir, e.Name, time.Minute); err != nil {
							t.Error(err)
						}
					}
				}
			}
		}
		walk(w.view)
		one := w.asked()
		w.cache = New(Config{})
		var wg sync.WaitGroup
		for range 20 {
			v := w.cache.View(w.store.Source("alice"))
			wg.Go(func() { walk(v) })
		}
		wg.Wait()
		// A view that asks between an answer and its being known asks once more: at most 1.05 times in all.
		if twenty := w.asked(); requests(t, twenty)*100 > requests(t, one)*105 {
			t.Errorf("twenty views: %s; one: %s", twenty, one)
		}
		walk(w.cache.View(w.store.Source("bob")))
		if bob := w.asked(); bob != one {
			t.Errorf("another principal: %s; want its own %s", bob, one)
		}
	})
}

func TestInvalidateMakesTheNextLookupAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{}, "d/a", "d/b", "d/c")
		w.want(w.lookup("d/", "b", time.Hour), "file", "1 LIST 0 HEAD")
		now := w.store.Put("d/b", []byte("other"))
		w.view.Invalidate("d/", "b")
		e, err := w.view.Lookup(t.Context(), "d/", "b", time.Hour)
		if err != nil || e.Object.Version != now.Version {
			t.Errorf("%+v, %v; want version %s", e, err, now.Version)
		}
		w.want("", "", "0 LIST 1 HEAD")
		w.want(w.lookup("d/", "b", time.Hour), "file", "0 LIST 0 HEAD")
		w.want(w.lookup("d/", "a", time.Hour), "file", "0 LIST 0 HEAD")
		w.want(fmt.Sprint(w.all("d/", time.Hour)), "[a b c]", "0 LIST 0 HEAD")

		now = w.store.Put("d/b", []byte("third"))
		w.view.Invalidate("d/", "b")
		es, _, err := w.view.List(t.Context(), "d/", "a", time.Hour)
		if err != nil || es[0].Object.Version != now.Version {
			t.Errorf("list after invalidation: %+v, %v; want version %s", es, err, now.Version)
		}
		w.store.Delete("d/c")
		w.view.Invalidate("d/", "c")
		w.want(w.lookup("d/", "c", time.Hour), "none", "2 LIST 1 HEAD") // a LIST for the list above, one for a folder of that name
	})
}

func TestAListSentBeforeTheInvalidationDoesNotUndoIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.store.Put("d/a", []byte("old"))
		held := make(chan struct{})
		w.view = w.cache.View(&slowList{w.store.Source("alice"), held})
		done := make(chan struct{})
		go func() {
			w.all("d/", time.Hour)
			close(done)
		}()
		synctest.Wait() // answered, not arrived
		now := w.store.Put("d/a", []byte("newer"))
		w.view.Invalidate("d/", "a")
		close(held)
		<-done
		e, err := w.view.Lookup(t.Context(), "d/", "a", time.Hour)
		if err != nil || e.Object.Version != now.Version {
			t.Errorf("%v, %v; want %v", e.Object, err, now)
		}
	})
}

type slowList struct {
	source.Source
	held chan struct{}
}

func (s *slowList) List(ctx context.Context, in source.ListInput) (source.Page, error) {
	p, err := s.Source.List(ctx, in)
	<-s.held
	return p, err
}

func TestNamesBehindTheKnownPageAreAskedForAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		for i := range 1000 {
			w.store.Put(fmt.Sprintf("d/f%04d", i), nil)
		}
		w.store.PageSize = 100
		w.want(w.lookup("d/", "f0500", time.Minute), "file", "1 LIST 1 HEAD")
		w.want(w.lookup("d/", "f0500", time.Minute), "file", "0 LIST 0 HEAD")
		w.want(w.lookup("d/", "f0600", time.Minute), "file", "0 LIST 1 HEAD")
		w.want(w.lookup("d/", "f0601", time.Minute), "file", "0 LIST 1 HEAD")
		w.want(w.lookup("d/", "f0602", time.Minute), "file", "0 LIST 1 HEAD")
		w.want(w.lookup("d/", "f0603", time.Minute), "file", "1 LIST 0 HEAD") // enough of that: a page there
		w.want(w.lookup("d/", "f0604", time.Minute), "file", "0 LIST 0 HEAD")
		w.want(w.lookup("d/", "f0700", time.Minute), "file", "0 LIST 0 HEAD")
		w.want(w.lookup("d/", "f06035", time.Minute), "none", "0 LIST 0 HEAD")
		if n := len(w.all("d/", time.Minute)); n != 1000 {
			t.Errorf("%d names", n)
		}
		w.asked()
		w.want(fmt.Sprint(len(w.all("d/", time.Minute))), "1000", "0 LIST 0 HEAD")
	})
}

func TestALargeFolderIsListedPageByPageWithinTheBound(t *testing.T) {
	w := newWorld(t, Config{MaxEntries: 2500})
	want := []string{}
	for i := range 20_000 {
		name := fmt.Sprintf("f%06d", i)
		w.store.Put("d/"+name, nil)
		want = append(want, name)
	}
	if got := w.all("d/", time.Hour); !slices.Equal(got, want) {
		t.Errorf("%d names, want %d", len(got), len(want))
	}
	if n := memsource.Count(w.store.Requests(), source.List); n > 21 {
		t.Errorf("%d LISTs for 20 pages", n)
	}
	if s := w.cache.Stats(); s.Entries > 2500 || s.Evicted == 0 {
		t.Errorf("%+v", s)
	}
}

func TestAFolderHidesAFileOfTheSameName(t *testing.T) {
	for _, page := range []int{1, 2, 3, 1000} {
		t.Run(fmt.Sprint(page), func(t *testing.T) {
			w := newWorld(t, Config{}, "d/a", "d/a-1", "d/a-2", "d/a-3", "d/a/x", "d/b", "d/b-1", "d/c")
			w.store.PageSize = page
			want := "[a-1 a-2 a-3 a/ b b-1 c]"
			if got := fmt.Sprint(w.all("d/", time.Hour)); got != want {
				t.Errorf("%s, want %s", got, want)
			}
			if got := w.lookup("d/", "a", time.Hour); got != "folder" {
				t.Error(got)
			}
			if got := fmt.Sprint(w.all("d/", 0)); got != want {
				t.Errorf("asked anew: %s, want %s", got, want)
			}
			if s := w.cache.Stats(); s.Shadowed == 0 && page > 3 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestAPlainNameGoesOnBehindItsFolder(t *testing.T) {
	w := newWorld(t, Config{}, "d/a-1", "d/a/x", "d/b")
	w.all("d/", time.Hour)
	es, more, err := w.view.List(t.Context(), "d/", "a", time.Hour)
	if err != nil || more || len(es) != 1 || es[0].Name != "b" {
		t.Errorf("%+v %v %v", es, more, err)
	}
}

func TestHiddenKeysAreCountedAndLoggedOnce(t *testing.T) {
	var log strings.Builder
	w := newWorld(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))}, "d/a", "d/..", "d/"+strings.Repeat("x", 300), "d//y", "e/.", "e/f")
	w.all("d/", time.Hour)
	w.all("e/", time.Hour)
	if s := w.cache.Stats(); s.Hidden != 4 {
		t.Errorf("%d hidden, want 4", s.Hidden)
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("%d lines in the log: %s", n, log.String())
	}
}

func TestARefusalForgetsThePrincipalAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var denied []object.Principal
		w := newWorld(t, Config{OnDenied: func(p object.Principal, s object.Store) {
			if s != "memory://test" {
				t.Errorf("store %s", s)
			}
			denied = append(denied, p)
		}}, "d/a", "d/b", "e/c")
		bob := w.cache.View(w.store.Source("bob"))
		if _, err := bob.Lookup(t.Context(), "d/", "a", time.Hour); err != nil {
			t.Error(err)
		}
		w.lookup("d/", "a", time.Hour)
		w.asked()
		alice := w.store.Source("alice").Principal()
		w.store.Before = func(_ context.Context, r memsource.Request) error {
			if r.Principal == alice {
				return fmt.Errorf("%w: no more", object.ErrDenied)
			}
			return nil
		}
		w.want(w.lookup("d/", "a", time.Hour), "file", "0 LIST 0 HEAD")
		w.want(w.lookup("e/", "c", time.Hour), "denied", "1 LIST 1 HEAD")
		if len(denied) == 0 || denied[0] != alice {
			t.Errorf("OnDenied: %v", denied)
		}
		w.want(w.lookup("d/", "a", time.Hour), "denied", "1 LIST 1 HEAD")
		w.want(w.describe(bob.Lookup(t.Context(), "d/", "b", time.Hour)), "file", "0 LIST 0 HEAD")
	})
}

func TestACredentialThatMayNotListFindsFilesByHead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refusals := 0
		w := newWorld(t, Config{OnDenied: func(object.Principal, object.Store) { refusals++ }}, "d/a", "d/b")
		w.store.Before = func(_ context.Context, r memsource.Request) error {
			if r.Kind == source.List {
				return object.ErrDenied
			}
			return nil
		}
		w.want(w.lookup("d/", "a", time.Minute), "file", "1 LIST 1 HEAD")
		w.want(w.lookup("d/", "a", time.Minute), "file", "0 LIST 0 HEAD")
		w.want(w.lookup("d/", "b", time.Minute), "file", "0 LIST 1 HEAD")
		time.Sleep(2 * time.Minute)
		w.want(w.lookup("d/", "b", time.Minute), "file", "0 LIST 1 HEAD")
		if refusals != 1 {
			t.Errorf("%d refusals reported, want 1", refusals)
		}
		if err := w.view.Check(t.Context(), "d/"); !errors.Is(err, object.ErrDenied) || !strings.Contains(err.Error(), "memory://test/d/") {
			t.Errorf("check: %v", err)
		}
	})
}

func TestHeadsAreReportedAsGrants(t *testing.T) {
	var got []object.Object
	w := newWorld(t, Config{OnHead: func(o object.Object, p object.Principal, _ time.Time) { got = append(got, o) }}, "d/a")
	w.lookup("d/", "a", time.Hour)
	if len(got) != 0 {
		t.Errorf("a LIST granted %v", got)
	}
	w.lookup("d/", "a", 0)
	if len(got) != 1 || got[0].Key != "d/a" {
		t.Errorf("granted %v", got)
	}
}

func TestTheLastOneOutCancelsTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{}, "d/a")
		g := w.gate()
		ctx1, cancel1 := context.WithCancel(t.Context())
		ctx2, cancel2 := context.WithCancel(t.Context())
		errs := make(chan error, 3)
		for _, ctx := range []context.Context{ctx1, ctx2} {
			go func() {
				_, err := w.view.Lookup(ctx, "d/", "a", time.Hour)
				errs <- err
			}()
		}
		synctest.Wait()
		cancel1()
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		synctest.Wait()
		if len(w.cache.flights) != 1 {
			t.Error("the request did not outlive its first waiter")
		}
		cancel2()
		<-errs
		synctest.Wait()
		if len(w.cache.flights) != 0 {
			t.Error("the request outlives its last waiter")
		}
		go func() { g.pass <- struct{}{} }()
		if got := w.lookup("d/", "a", time.Hour); got != "file" {
			t.Error(got)
		}
	})
}

func TestAStoreThatFailsIsNotRemembered(t *testing.T) {
	w := newWorld(t, Config{}, "d/a")
	w.store.Before = func(context.Context, memsource.Request) error { return object.ErrUnavailable }
	if _, err := w.view.Lookup(t.Context(), "d/", "a", time.Hour); !errors.Is(err, object.ErrUnavailable) {
		t.Error(err)
	}
	w.store.Before = nil
	if got := w.lookup("d/", "a", time.Hour); got != "file" {
		t.Error(got)
	}
}

// history is what a name was over time.
type history []struct {
	at    time.Time
	state string
}

// during are the states that a name had in [from, to].
func (h history) during(from, to time.Time) (states []string) {
	states = []string{"none"}
	for _, e := range h {
		if e.at.After(to) {
			break
		}
		if !e.at.After(from) {
			states = states[:0]
		}
		states = append(states, e.state)
	}
	return states
}

// TestAnswersAreWhatTheStoreHeldWithinTheirAge compares random lookups and lists with the history of
// every name.
func TestAnswersAreWhatTheStoreHeldWithinTheirAge(t *testing.T) {
	for range 30 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { model(t, rand.New(rand.NewPCG(seed, 0))) })
		})
	}
}

func model(t *testing.T, rnd *rand.Rand) {
	w := newWorld(t, Config{MaxEntries: 5 + rnd.IntN(60)})
	w.store.PageSize = 1 + rnd.IntN(8)
	names := []string{"a", "a-1", "a0", "b", "b.c", "b/", "c/", "é", "d1", "d2", "d3", "d4", "d5", "z/", "z-"}
	past := map[string]history{}
	set := func(name string, there bool) {
		key := "p/" + name
		if strings.HasSuffix(name, "/") {
			key += "x"
		}
		state := "none"
		if there {
			state = "/"
			if o := w.store.Put(key, fmt.Appendf(nil, "%d", rnd.Int())); !strings.HasSuffix(name, "/") {
				state = o.Version
			}
		} else {
			w.store.Delete(key)
		}
		past[name] = append(past[name], struct {
			at    time.Time
			state string
		}{time.Now(), state})
	}
	state := func(e Entry) string {
		if e.Folder {
			return "/"
		}
		return e.Object.Version
	}
	for range 1500 {
		time.Sleep(time.Duration(rnd.IntN(1000)) * time.Millisecond)
		name := names[rnd.IntN(len(names))]
		plain := strings.TrimSuffix(name, "/")
		maxAge := []time.Duration{0, time.Second, 10 * time.Second, time.Minute}[rnd.IntN(4)]
		from := time.Now().Add(-maxAge)
		switch op := rnd.IntN(10); {
		case op < 3:
			set(name, rnd.IntN(3) > 0)
			if maxAge == 0 {
				w.view.Invalidate("p/", plain)
				from = time.Now()
				checkLookup(t, w, past, plain, from, time.Hour, state)
			}
		case op < 8:
			checkLookup(t, w, past, plain, from, maxAge, state)
		default:
			after := ""
			last := ""
			for more := true; more; {
				var es []Entry
				var err error
				es, more, err = w.view.List(t.Context(), "p/", after, maxAge)
				if err != nil || more && len(es) == 0 {
					t.Fatalf("list: %d entries, more %v, %v", len(es), more, err)
				}
				seen := map[string]bool{}
				for _, e := range es {
					if e.Cookie() <= last {
						t.Fatalf("%q after %q", e.Cookie(), last)
					}
					last = e.Cookie()
					seen[last] = true
					if ok := past[last].during(from, time.Now()); !slices.Contains(ok, state(e)) {
						t.Fatalf("list at most %v old shows %q as %s; it was %v", maxAge, last, state(e), ok)
					}
				}
				for n := range past {
					inside := n > after && (n <= last || !more)
					states := past[n].during(from, time.Now())
					hidden := slices.Contains(past[n+"/"].during(from, time.Now()), "/")
					if inside && !seen[n] && !slices.Contains(states, "none") && !hidden {
						t.Fatalf("list at most %v old of (%q, %q] misses %q; it was %v", maxAge, after, last, n, states)
					}
				}
				after = last
			}
		}
	}
}

func checkLookup(t *testing.T, w *world, past map[string]history, plain string, from time.Time, maxAge time.Duration, state func(Entry) string) {
	t.Helper()
	e, err := w.view.Lookup(t.Context(), "p/", plain, maxAge)
	if err != nil && !errors.Is(err, object.ErrNotFound) {
		t.Fatal(err)
	}
	got := "none"
	if err == nil {
		got = state(e)
	}
	files := past[plain].during(from, time.Now())
	folders := past[plain+"/"].during(from, time.Now())
	ok := slices.Contains(files, got) && got != "none" || slices.Contains(folders, got) && got != "none" ||
		got == "none" && slices.Contains(files, "none") && slices.Contains(folders, "none")
	if !ok {
		t.Fatalf("lookup of %q at most %v old: %s; the file was %v, the folder %v", plain, maxAge, got, files, folders)
	}
}

func benchStore(testing.TB) *memsource.Store {
	s := &memsource.Store{}
	for i := range 5000 {
		s.Put(fmt.Sprintf("d/f%05d", i), nil)
	}
	return s
}

// requests is how many w.asked tells of.
func requests(t *testing.T, asked string) int {
	var lists, heads int
	if _, err := fmt.Sscanf(asked, "%d LIST %d HEAD", &lists, &heads); err != nil {
		t.Fatal(err)
	}
	return lists + heads
}
