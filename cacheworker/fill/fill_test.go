package fill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// world is a store in memory, a real cache and fills between them.
type world struct {
	t     testing.TB
	store *memsource.Store
	cache *cachestore.Store
	fills *Fills
}

// openCache opens a real cache.
func openCache(t testing.TB, capacity int64) *cachestore.Store {
	t.Helper()
	c, err := cachestore.Open(cachestore.Config{Dir: t.TempDir(), CapacityBytes: capacity, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// newWorld is for inside a bubble. The test calls close before its end.
func newWorld(t testing.TB, c *cachestore.Store, cfg Config) *world {
	w := &world{t: t, store: &memsource.Store{}, cache: c}
	w.fills = New(cfg, c)
	return w
}

// close ends the fills and checks that nothing was left behind.
func (w *world) close() {
	w.t.Helper()
	f := w.fills
	if err := f.Close(); err != nil {
		w.t.Error(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for k, c := range f.chunks {
		if c.elem == nil {
			w.t.Errorf("chunk %d is in flight for ever", k.i)
		} else if c.refs != 1 {
			w.t.Errorf("chunk %d in memory has %d users", k.i, c.refs)
		}
	}
	if used := f.budget.used(); used != 0 {
		w.t.Errorf("%d bytes of the budget are lost", used)
	}
	if f.budget.slots != f.cfg.MaxRequests || f.budget.active != 0 {
		w.t.Errorf("budget: %d of %d requests, %d active", f.budget.slots, f.cfg.MaxRequests, f.budget.active)
	}
	if f.bufs.used != 0 {
		w.t.Errorf("%d buffers are lost", f.bufs.used)
	}
	if f.ahead != 0 || f.through != 0 || len(f.fetches) != 0 || len(f.heads) != 0 {
		w.t.Errorf("%d readers ahead, %d through, %d fetches, %d heads", f.ahead, f.through, len(f.fetches), len(f.heads))
	}
	if n := w.cache.Stats().LeasedObjects; n != 0 {
		w.t.Errorf("%d leases are held", n)
	}
}

func (w *world) open(obj object.Object, who string) *Reader {
	return w.fills.Open(obj, w.store.Source(who))
}

// content is what file number seed holds.
func content(seed uint64, size int) []byte {
	b := make([]byte, size)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	rand.NewChaCha8(key).Read(b)
	return b
}

// read compares a read with what the object holds.
func (w *world) read(r *Reader, data []byte, off int64, n int) {
	w.t.Helper()
	if err := check(r, data, off, n); err != nil {
		w.t.Error(err)
	}
}

func check(r *Reader, data []byte, off int64, n int) error {
	p := make([]byte, n)
	got, err := r.ReadAt(context.Background(), p, off)
	if err != nil {
		return err
	}
	var want []byte
	if off < int64(len(data)) {
		want = data[off:min(off+int64(n), int64(len(data)))]
	}
	if !bytes.Equal(p[:got], want) {
		return fmt.Errorf("%d bytes at %d: got %d others", n, off, got)
	}
	return nil
}

// asked describes the GETs and HEADs since the last call.
func (w *world) asked() (gets []string, heads int) {
	for _, r := range w.store.Requests() {
		switch r.Kind {
		case source.Get:
			gets = append(gets, fmt.Sprintf("%d+%d", r.Off/mib, (r.N+mib-1)/mib))
		case source.Head:
			heads++
		}
	}
	return gets, heads
}

func (w *world) want(gets string, heads int) {
	w.t.Helper()
	synctest.Wait()
	g, h := w.asked()
	slices.Sort(g) // GETs at once come in any order
	if fmt.Sprint(g) != gets || h != heads {
		w.t.Errorf("GETs (chunk+chunks) %v, %d HEADs; want %s, %d", g, h, gets, heads)
	}
}

// bubble runs a test with a fake clock over a real cache.
func bubble(t *testing.T, cfg Config, test func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, openCache(t, 1<<30), cfg)
		test(t, w)
		w.close()
	})
}

// gate holds requests of a kind until they are let through.
type gate struct {
	arrived chan memsource.Request
	pass    chan error
}

func (w *world) gate(kind source.Kind) *gate {
	g := &gate{make(chan memsource.Request, 1000), make(chan error)}
	w.store.Before = func(ctx context.Context, r memsource.Request) error {
		if r.Kind != kind {
			return nil
		}
		g.arrived <- r
		select {
		case err := <-g.pass:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return g
}

func TestARandomReadFetchesOneChunk(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 20*mib+5)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		w.read(r, data, 7*mib+100, 4096)
		w.want("[7+1]", 0)
		w.read(r, data, 7*mib+500_000, 4096)
		w.want("[]", 0)
		w.read(r, data, 3*mib, 4096)
		w.want("[3+1]", 0)
		w.read(r, data, 20*mib, 4096)
		w.want("[20+1]", 0)
		w.read(r, data, 10*mib-10, 20)
		w.want("[9+2]", 0)
		w.read(r, data, 21*mib, 10)
		w.want("[]", 0)
	})
}

func TestAReadNeedNotWaitForTheWholeChunk(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, mib)
		more := make(chan struct{})
		w.store.Reading = func(ctx context.Context, r memsource.Request, n int64) error {
			if n >= 128<<10 {
				<-more
			}
			return nil
		}
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		w.read(r, data, 1000, 100_000)
		close(more)
		synctest.Wait()
		if !r.File().Complete() {
			t.Error("the chunk of which a part was read is not completed")
		}
	})
}

func TestReadersOfAllPrincipalsShareOneFetch(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, mib)
		obj := w.store.Put("a", data)
		g := w.gate(source.Get)
		var wg sync.WaitGroup
		for i := range 12 {
			wg.Go(func() {
				r := w.open(obj, []string{"alice", "bob", "carol"}[i%3])
				defer r.Close()
				w.read(r, data, int64(i)*1000, 50_000)
			})
		}
		synctest.Wait()
		if n := len(g.arrived); n != 1 {
			t.Errorf("%d GETs", n)
		}
		g.pass <- nil
		wg.Wait()
		w.want("[0+1]", 2) // and one HEAD for each of the two who did not start it
	})
}

func TestBytesAreGivenOnlyUnderAGrant(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, mib)
		obj := w.store.Put("a", data)
		mallory := w.store.Source("mallory").Principal()
		w.store.Before = func(_ context.Context, r memsource.Request) error {
			if r.Principal == mallory {
				return fmt.Errorf("%w: 403", object.ErrDenied)
			}
			return nil
		}
		r, m := w.open(obj, "alice"), w.open(obj, "mallory")
		defer r.Close()
		defer m.Close()
		if err := m.Authorize(t.Context()); err != nil {
			t.Errorf("nothing is cached, and open says %v", err)
		}
		w.want("[]", 0)
		w.read(r, data, 0, 100)
		w.want("[0+1]", 0)
		if err := r.Authorize(t.Context()); err != nil {
			t.Error(err)
		}
		if _, release, ok := r.Span(0, 100); !ok {
			t.Error("no span")
		} else {
			release()
		}
		w.want("[]", 0)

		p := make([]byte, 100)
		if n, err := m.ReadAt(t.Context(), p, 0); n != 0 || !errors.Is(err, object.ErrDenied) {
			t.Errorf("mallory read %d, %v", n, err)
		}
		if err := m.Authorize(t.Context()); !errors.Is(err, object.ErrDenied) {
			t.Errorf("mallory opened: %v", err)
		}
		if _, release, ok := m.Span(0, 100); ok {
			release()
			t.Error("mallory has a span")
		}
		w.want("[]", 2)

		w.fills.Revoke(r.principal, obj.Store)
		time.Sleep(time.Second)
		w.read(r, data, 0, 100)
		w.want("[]", 1)
		w.read(r, data, 0, 100)
		w.want("[]", 0)
	})
}

func TestARefusedFetchDoesNotFailOtherPrincipals(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, mib)
		obj := w.store.Put("a", data)
		g := w.gate(source.Get)
		m, r := w.open(obj, "mallory"), w.open(obj, "alice")
		defer m.Close()
		defer r.Close()
		refused := make(chan error, 1)
		go func() { refused <- check(m, data, 0, 10) }()
		synctest.Wait()
		served := make(chan error, 1)
		go func() { served <- check(r, data, 0, 10) }()
		synctest.Wait()
		g.pass <- object.ErrDenied
		if err := <-refused; !errors.Is(err, object.ErrDenied) {
			t.Errorf("mallory: %v", err)
		}
		synctest.Wait()
		g.pass <- nil
		if err := <-served; err != nil {
			t.Errorf("alice: %v", err)
		}
		w.want("[0+1 0+1]", 0)
	})
}

func TestAFetchOutlivesItsFirstReaderAndTheLastOneOutCancels(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 4*mib)
		obj := w.store.Put("a", data)
		g := w.gate(source.Get)
		r := w.open(obj, "alice")
		defer r.Close()
		read := func(ctx context.Context) chan error {
			done := make(chan error, 1)
			go func() {
				p := make([]byte, 10)
				_, err := r.ReadAt(ctx, p, 5)
				if err == nil && !bytes.Equal(p, data[5:15]) {
					err = errors.New("other bytes")
				}
				done <- err
			}()
			synctest.Wait()
			return done
		}
		ctx1, cancel1 := context.WithCancelCause(t.Context())
		first, second := read(ctx1), read(t.Context())
		why := errors.New("a signal")
		cancel1(why)
		if err := <-first; !errors.Is(err, why) {
			t.Errorf("first: %v", err)
		}
		g.pass <- nil
		if err := <-second; err != nil {
			t.Errorf("second: %v", err)
		}
		w.want("[0+1]", 0)

		ctx3, cancel3 := context.WithCancel(t.Context())
		third := make(chan error, 1)
		go func() {
			_, err := r.ReadAt(ctx3, make([]byte, 10), 2*mib)
			third <- err
		}()
		synctest.Wait()
		cancel3()
		if err := <-third; !errors.Is(err, context.Canceled) {
			t.Errorf("third: %v", err)
		}
		synctest.Wait()
		if s := w.fills.Stats(); s.Canceled != 1 || s.InFlightBytes != 0 {
			t.Errorf("%+v", s)
		}
		go func() { g.pass <- nil }()
		w.read(r, data, 2*mib, 10)
		w.want("[2+1 2+1]", 0)
	})
}

// stall holds the bodies of GETs where n bytes were read, until they are let go on.
func (w *world) stall(n int64) (goOn func()) {
	gate := make(chan struct{})
	w.store.Reading = func(ctx context.Context, r memsource.Request, have int64) error {
		if have < n {
			return nil
		}
		select {
		case <-gate:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return func() { close(gate) }
}

func TestSequentialReadsOpenAWindow(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 200*mib+77)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		w.read(r, data, 0, 128<<10)
		w.want("[0+1]", 0)
		w.read(r, data, 128<<10, 128<<10)
		w.want("[1+2 11+2 13+2 15+2 17+1 3+2 5+2 7+2 9+2]", 0) // in alphabetical order
		for off := int64(256 << 10); off < int64(len(data)); off += 128 << 10 {
			w.read(r, data, off, 128<<10)
		}
		synctest.Wait()
		gets, heads := w.asked()
		if len(gets) > 70 || heads != 0 {
			t.Errorf("%d GETs, %d HEADs: %v", len(gets), heads, gets)
		}
		s := w.fills.Stats()
		if s.FetchedBytes != uint64(len(data)) || !r.File().Complete() {
			t.Errorf("%d bytes fetched, the file has %d", s.FetchedBytes, len(data))
		}
		if ahead := s.AheadBytes; ahead < uint64(len(data))-mib {
			t.Errorf("only %d bytes read ahead", ahead)
		}
	})
}

func TestTheWindowIsBounded(t *testing.T) {
	bubble(t, Config{MaxWindowBytes: 6 * mib}, func(t *testing.T, w *world) {
		data := content(1, 60*mib)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		for off := int64(0); off < 20*mib; off += 256 << 10 {
			w.read(r, data, off, 256<<10)
			synctest.Wait()
		}
		if got := w.fills.Stats().FetchedBytes; got > 27*mib || got < 24*mib {
			t.Errorf("%d MiB fetched after 20 were read, window 6", got/mib)
		}
	})
}

// TestReadsInAnyOrderOfAStreamAreAStream reads as the kernel's read-ahead does.
func TestReadsInAnyOrderOfAStreamAreAStream(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 64*mib)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		rnd := rand.New(rand.NewPCG(1, 2))
		const n = 256 << 10
		var wg sync.WaitGroup
		for base := int64(0); base < int64(len(data)); base += 4 * n {
			for _, k := range rnd.Perm(4) {
				wg.Go(func() { w.read(r, data, base+int64(k)*n, n) })
			}
			synctest.Wait()
		}
		wg.Wait()
		s := w.fills.Stats()
		if s.FetchedBytes != uint64(len(data)) || s.AheadBytes < 60*mib {
			t.Errorf("%d MiB fetched, %d ahead, of 64", s.FetchedBytes/mib, s.AheadBytes/mib)
		}
	})
}

func TestSeveralStreamsInOneFile(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 160*mib)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		const streams, n = 8, 128 << 10
		for k := int64(0); k < 20*mib; k += n {
			for s := range int64(streams) {
				w.read(r, data, s*20*mib+k, n)
			}
		}
		synctest.Wait()
		gets, _ := w.asked()
		s := w.fills.Stats()
		if s.FetchedBytes != uint64(len(data)) {
			t.Errorf("%d MiB fetched of 160", s.FetchedBytes/mib)
		}
		if s.AheadBytes < 130*mib || len(gets) > 140 {
			t.Errorf("%d MiB ahead in %d GETs", s.AheadBytes/mib, len(gets))
		}
	})
}

func TestRandomReadsNeverReadAhead(t *testing.T) {
	for _, n := range []int{4 << 10, 64 << 10, 512 << 10} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, w *world) {
				data := content(1, 100*mib)
				r := w.open(w.store.Put("a", data), "alice")
				defer r.Close()
				rnd := rand.New(rand.NewPCG(3, uint64(n)))
				touched := map[int]bool{}
				for range 300 {
					off := rnd.Int64N(int64(len(data) - n))
					for i := off / mib; i <= (off+int64(n)-1)/mib; i++ {
						touched[int(i)] = true
					}
					w.read(r, data, off, n)
				}
				synctest.Wait()
				over := int(w.fills.Stats().FetchedBytes/mib) - len(touched)
				if n <= 64<<10 && over != 0 || over > 10 {
					t.Errorf("%d chunks fetched beside the %d that were read", over, len(touched))
				}
			})
		})
	}
}

func TestClosingAReaderLeavesItsReadAhead(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 40*mib)
		obj := w.store.Put("a", data)
		r := w.open(obj, "alice")
		for off := int64(0); off < 2*mib; off += 256 << 10 {
			w.read(r, data, off, 256<<10)
		}
		synctest.Wait()
		goOn := w.stall(0)
		for off := int64(2 * mib); off < 4*mib; off += 256 << 10 {
			w.read(r, data, off, 256<<10)
		}
		synctest.Wait()
		if s := w.fills.Stats(); s.InFlightBytes == 0 {
			t.Fatal("nothing is in flight")
		}
		r.Close()
		synctest.Wait()
		if s := w.fills.Stats(); s.InFlightBytes != 0 || s.Canceled == 0 {
			t.Errorf("after close: %+v", s)
		}
		goOn()
		r = w.open(obj, "alice")
		defer r.Close()
		w.read(r, data, 0, len(data))
	})
}

func TestForegroundReadsGoOnWhileReadAheadHoldsItsShare(t *testing.T) {
	bubble(t, Config{MaxInFlightBytes: 16 * mib, MaxRequests: 8}, func(t *testing.T, w *world) {
		data := content(1, 100*mib)
		obj := w.store.Put("a", data)
		r := w.open(obj, "alice")
		defer r.Close()
		for off := int64(0); off < 8*mib; off += 512 << 10 {
			w.read(r, data, off, 512<<10)
		}
		synctest.Wait()
		hold := make(chan struct{})
		foreground := int64(60 * mib)
		w.store.Reading = func(ctx context.Context, r memsource.Request, _ int64) error {
			if r.Off >= foreground {
				return nil
			}
			<-hold
			return nil
		}
		for off := int64(8 * mib); r.f.budget.used() == 0; off += 512 << 10 {
			w.read(r, data, off, 512<<10)
		}
		if used := w.fills.Stats().InFlightBytes; used > 12*mib {
			t.Errorf("read-ahead took %d MiB of 16", used/mib)
		}
		for i := range int64(30) {
			w.read(r, data, foreground+(29-i)*mib, 100)
		}
		close(hold)
	})
}

func TestAChangedVersionFailsFastAndCachedChunksGoOn(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 4*mib)
		obj := w.store.Put("a", data)
		r := w.open(obj, "alice")
		defer r.Close()
		w.read(r, data, mib, 100)
		w.want("[1+1]", 0)
		w.store.Put("a", content(2, 4*mib))
		for range 5 {
			if err := check(r, data, 3*mib, 100); !errors.Is(err, object.ErrChanged) {
				t.Errorf("%v", err)
			}
		}
		w.want("[3+1]", 0)
		w.read(r, data, mib+500, 1000)
		w.want("[]", 0)
		if err := check(r, data, mib, 2*mib); !errors.Is(err, object.ErrChanged) {
			t.Errorf("a read that is cached in part: %v", err)
		}
		time.Sleep(time.Minute)
		w.store.Put("a", data) // the same bytes: the same version
		w.read(r, data, 3*mib, 100)
	})
}

func TestAVersionThatIsBackIsReadAgainAtOnce(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 2*mib)
		obj := w.store.Put("a", data)
		r := w.open(obj, "alice")
		defer r.Close()
		w.store.Put("a", content(2, 2*mib))
		if err := check(r, data, 0, 100); !errors.Is(err, object.ErrChanged) {
			t.Errorf("%v", err)
		}
		time.Sleep(time.Millisecond)
		w.store.Put("a", data)
		if err := check(r, data, 0, 100); !errors.Is(err, object.ErrChanged) {
			t.Errorf("nobody has said that it is back: %v", err)
		}
		w.fills.Grant(obj, r.principal, time.Now())
		w.read(r, data, 0, 100)
		w.want("[0+1 0+1]", 0)
	})
}

func TestABadChunkIsFetchedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		data := content(1, 3*mib)
		w := newWorld(t, nil, Config{})
		obj := w.store.Put("a", data)
		for boot, spoil := range []bool{true, false} {
			cache, err := cachestore.Open(cachestore.Config{Dir: dir, CapacityBytes: 1 << 30, BootID: fmt.Sprint(boot), Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			w.cache, w.fills = cache, New(Config{}, cache)
			r := w.open(obj, "alice")
			w.read(r, data, 0, len(data))
			synctest.Wait()
			if spoil { // as a power cut may
				syscall.Pwrite(r.File().Fd(), []byte("not what was there"), mib+1000)
			}
			r.Close()
			w.close()
			if err := cache.Close(); err != nil {
				t.Error(err)
			}
		}
		if gets, heads := w.asked(); fmt.Sprint(gets) != "[0+3 1+1]" || heads != 0 {
			t.Errorf("%v, %d HEADs", gets, heads)
		}
	})
}

func TestCompleteSaysWhenThereIsNoRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, openCache(t, 10*mib), Config{})
		first := w.open(w.store.Put("a", content(1, 5*mib)), "alice")
		if err := first.Complete(t.Context()); err != nil {
			t.Error(err)
		}
		second := w.open(w.store.Put("b", content(2, 5*mib)), "alice")
		third := w.open(w.store.Put("c", content(3, 5*mib)), "alice")
		if err := errors.Join(second.Complete(t.Context())); err != nil {
			t.Error(err)
		}
		if err := third.Complete(t.Context()); !errors.Is(err, object.ErrNoSpace) {
			t.Errorf("the cache is full of leased files, and complete says %v", err)
		}
		w.read(third, content(3, 5*mib), mib, 2*mib)
		for _, r := range []*Reader{first, second, third} {
			r.Close()
		}
		w.close()
	})
}

func TestADeletedObjectIsNotFound(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		obj := w.store.Put("a", content(1, mib))
		w.store.Delete("a")
		r := w.open(obj, "alice")
		defer r.Close()
		if err := check(r, nil, 0, 100); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("%v", err)
		}
	})
}

func TestSomebodyElsesFailureIsTriedAgain(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, mib)
		obj := w.store.Put("a", data)
		g := w.gate(source.Get)
		r := w.open(obj, "alice")
		defer r.Close()
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { first <- check(r, data, 0, 10) }()
		synctest.Wait()
		go func() { second <- check(r, data, 0, 10) }()
		synctest.Wait()
		g.pass <- object.ErrUnavailable
		if err := <-first; !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("first: %v", err)
		}
		g.pass <- nil
		if err := <-second; err != nil {
			t.Errorf("second: %v", err)
		}
	})
}

func TestABodyThatEndsEarlyIsAnError(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 2*mib)
		w.store.Reading = func(_ context.Context, _ memsource.Request, n int64) error {
			if n > 700_000 {
				return io.EOF
			}
			return nil
		}
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		w.read(r, data, 0, 1000)
		if err := check(r, data, mib-100, 50); !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("%v", err)
		}
		w.store.Reading = nil
		w.read(r, data, 0, 2*mib)
	})
}

func TestWhatTheCacheHasNoRoomForIsReadThroughOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, openCache(t, 16*mib), Config{RecentBytes: 8 * mib})
		data := content(1, 40*mib) // more than half the tier
		obj := w.store.Put("a", data)
		r := w.open(obj, "alice")
		for off := int64(0); off < int64(len(data)); off += 128 << 10 {
			w.read(r, data, off, 128<<10)
		}
		synctest.Wait()
		if r.File() != nil {
			t.Error("it has a cache file")
		}
		s := w.fills.Stats()
		if s.FetchedBytes != uint64(len(data)) || s.MemoryHeld > 8*mib || s.Heads != 0 {
			t.Errorf("%d MiB fetched for 40, %d held, %d HEADs", s.FetchedBytes/mib, s.MemoryHeld/mib, s.Heads)
		}
		b := w.open(obj, "bob")
		w.read(b, data, 39*mib, 100)
		if s := w.fills.Stats(); s.Heads != 1 || s.FetchedBytes != uint64(len(data)) {
			t.Errorf("another principal: %d HEADs, %d MiB", s.Heads, s.FetchedBytes/mib)
		}
		w.fills.Revoke(b.principal, obj.Store)
		w.store.Before = func(context.Context, memsource.Request) error { return object.ErrDenied }
		if err := check(b, data, 39*mib, 100); !errors.Is(err, object.ErrDenied) {
			t.Errorf("after the revocation: %v", err)
		}
		r.Close()
		b.Close()
		w.close()
	})
}

func TestAnEvictedFileIsFilledAgain(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 4*mib)
		obj := w.store.Put("a", data)
		r := w.open(obj, "alice")
		defer r.Close()
		w.read(r, data, 0, 100<<10)
		synctest.Wait()
		fd, release, ok := r.Span(0, 1000)
		if !ok {
			t.Fatal("no span")
		}
		if !w.cache.Evict(obj.ID()) {
			t.Fatal("not evicted")
		}
		w.read(r, data, 0, 4*mib)
		synctest.Wait()
		if f := r.File(); f.Evicted() || !f.Has(3) {
			t.Error("the reader still has the evicted file")
		}
		p := make([]byte, 1000)
		if n, err := pread(fd, p); n != 1000 || err != nil || !bytes.Equal(p, data[:1000]) {
			t.Errorf("span of the evicted file: %d, %v", n, err)
		}
		release()
	})
}

func TestCompleteFetchesWhatIsAbsent(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 20*mib+9)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		w.read(r, data, 5*mib, 10)
		w.want("[5+1]", 0)
		if err := r.Complete(t.Context()); err != nil {
			t.Error(err)
		}
		w.want("[0+5 13+8 6+7]", 0)
		if !r.File().Complete() {
			t.Error("incomplete")
		}
		if err := r.Complete(t.Context()); err != nil {
			t.Error(err)
		}
		w.want("[]", 0)
	})
}

func TestCompleteLaterWaitsUntilNobodyFetches(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 3*mib)
		busy := w.open(w.store.Put("busy", data), "alice")
		defer busy.Close()
		obj := w.store.Put("later", data)
		hold := make(chan struct{})
		w.store.Before = func(_ context.Context, r memsource.Request) error {
			if r.Key == "busy" {
				<-hold
			}
			return nil
		}
		done := make(chan error, 1)
		go func() { done <- check(busy, data, 0, 10) }()
		synctest.Wait()
		for range 3 {
			w.fills.CompleteLater(obj, w.store.Source("alice"), nil)
		}
		w.want("[0+1]", 0)
		close(hold)
		if err := <-done; err != nil {
			t.Error(err)
		}
		time.Sleep(2 * quiet)
		w.want("[0+3]", 0)
		if !w.cache.Peek(obj.ID()).Complete || w.fills.Stats().Completed != 1 {
			t.Errorf("%+v", w.fills.Stats())
		}
	})
}

func TestCloseEndsWaitingReaders(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 3*mib)
		w.gate(source.Get)
		obj := w.store.Put("a", data)
		r := w.open(obj, "alice")
		done := make(chan error, 1)
		go func() { done <- check(r, data, 0, 10) }()
		synctest.Wait()
		w.fills.CompleteLater(w.store.Put("b", data), w.store.Source("alice"), nil)
		w.fills.Close()
		if err := <-done; !errors.Is(err, errClosed) {
			t.Errorf("%v", err)
		}
		r.Close()
	})
}

func TestEmptyObjects(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		r := w.open(w.store.Put("a", nil), "alice")
		defer r.Close()
		w.read(r, nil, 0, 100)
		if err := errors.Join(r.Authorize(t.Context()), r.Complete(t.Context())); err != nil {
			t.Error(err)
		}
		w.want("[]", 0)
	})
}

// TestEveryByteIsOfTheVersionAskedFor runs random readers over a store that fails, stalls and
// changes, with little memory and a cache that evicts.
func TestEveryByteIsOfTheVersionAskedFor(t *testing.T) {
	for range 6 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { model(t, openCache(t, 24*mib), seed) })
		})
	}
}

func model(t *testing.T, cache *cachestore.Store, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	w := newWorld(t, cache, Config{MaxInFlightBytes: 8 * mib, MaxRequests: 4, MaxWindowBytes: 4 * mib, RecentBytes: 2 * mib})
	var faults atomic.Uint64
	fault := func(ctx context.Context, one uint64) error {
		switch n := faults.Add(1); {
		case n%one == 0:
			return object.ErrUnavailable
		case n%7 == 0:
			select {
			case <-time.After(time.Duration(n%50) * time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	}
	w.store.Before = func(ctx context.Context, _ memsource.Request) error { return fault(ctx, 11) }
	w.store.Reading = func(ctx context.Context, _ memsource.Request, _ int64) error { return fault(ctx, 97) }

	type version struct {
		obj  object.Object
		data []byte
	}
	var mu sync.Mutex
	var current [6]version
	put := func(k int, n uint64) {
		size := []int{0, 1, 5000, mib, 3*mib + 17, 14 * mib}[k] // the last is read through
		data := content(n, size)
		mu.Lock()
		defer mu.Unlock()
		current[k] = version{w.store.Put(fmt.Sprint(k), data), data}
	}
	for k := range current {
		put(k, uint64(k))
	}
	var reads, good atomic.Int64
	var wg sync.WaitGroup
	for range 10 {
		rnd := rand.New(rand.NewPCG(rnd.Uint64(), 1))
		wg.Go(func() {
			for range 12 {
				mu.Lock()
				v := current[rnd.IntN(len(current))]
				mu.Unlock()
				r := w.open(v.obj, []string{"alice", "bob"}[rnd.IntN(2)])
				off := int64(0)
				step := []int{4096, 128 << 10, mib, 3 * mib}[rnd.IntN(4)]
				for range 1 + rnd.IntN(25) {
					if rnd.IntN(6) == 0 {
						off = rnd.Int64N(v.obj.Size + 1)
					}
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+rnd.IntN(400))*time.Millisecond)
					p := make([]byte, step)
					n, err := r.ReadAt(ctx, p, off)
					cancel()
					reads.Add(1)
					switch {
					case err == nil:
						good.Add(1)
						if want := v.data[min(off, v.obj.Size):min(off+int64(step), v.obj.Size)]; !bytes.Equal(p[:n], want) {
							t.Errorf("%v: %d bytes at %d are others", v.obj, step, off)
							r.Close()
							return
						}
						off += int64(n)
					case errors.Is(err, object.ErrChanged), errors.Is(err, object.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
					default:
						t.Errorf("%v at %d: %v", v.obj, off, err)
					}
				}
				r.Close()
			}
		})
	}
	for n := range uint64(20) {
		time.Sleep(100 * time.Millisecond)
		put(1+int(n)%5, 100+n)
		if rnd.IntN(3) == 0 {
			w.fills.CompleteLater(current[4].obj, w.store.Source("alice"), nil)
		}
	}
	wg.Wait()
	synctest.Wait()
	if good.Load()*2 < reads.Load() {
		t.Errorf("only %d of %d reads succeeded", good.Load(), reads.Load())
	}
	w.close()
}

func pread(fd int, p []byte) (int, error) { return syscall.Pread(fd, p, 0) }

// TestAColdSequentialReadIsNotSlowerThanAParallelDownload is over a store whose requests take 30 ms and whose
// connections bring 80 MiB/s each, and compares with what the SDK does: five at once, of 5 MiB.
func TestAColdSequentialReadIsNotSlowerThanAParallelDownload(t *testing.T) {
	for _, c := range []struct {
		size  int
		bound float64
	}{{1 * mib, 1.01}, {8 * mib, 1.1}, {64 * mib, 1.01}, {256 * mib, 0.9}} {
		t.Run(fmt.Sprintf("%dM", c.size/mib), func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, w *world) {
				obj := w.store.Put("a", make([]byte, c.size))
				w.store.Before = func(context.Context, memsource.Request) error {
					time.Sleep(30 * time.Millisecond)
					return nil
				}
				w.store.Reading = func(context.Context, memsource.Request, int64) error {
					time.Sleep(time.Second / (80 * mib / (64 << 10)))
					return nil
				}
				start := time.Now()
				download5x5(t, w.store.Source("alice"), obj)
				sdk := time.Since(start)

				r := w.open(obj, "alice")
				defer r.Close()
				start = time.Now()
				p := make([]byte, 128<<10)
				for off := int64(0); off < obj.Size; off += int64(len(p)) {
					if _, err := r.ReadAt(t.Context(), p, off); err != nil {
						t.Fatal(err)
					}
				}
				ours := time.Since(start)
				t.Logf("%v, the SDK %v", ours, sdk)
				if float64(ours) > c.bound*float64(sdk) {
					t.Errorf("%v, the SDK %v", ours, sdk)
				}
			})
		})
	}
}

func download5x5(t *testing.T, src source.Source, obj object.Object) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, 5)
	for off := int64(0); off < obj.Size; off += 5 * mib {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			body, err := src.Get(t.Context(), obj, off, min(5*mib, obj.Size-off))
			if err == nil {
				_, err = io.ReadFull(body, make([]byte, min(5*mib, obj.Size-off)))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestAChunkIsFetchedOnceEver has readers come just when a chunk goes from memory to the
// disk.
func TestAChunkIsFetchedOnceEver(t *testing.T) {
	w := newWorld(t, openCache(t, 1<<30), Config{})
	const objects = 500
	var wg sync.WaitGroup
	objs := make([]object.Object, objects)
	for k := range objs {
		objs[k] = w.store.Put(fmt.Sprint(k), content(uint64(k), 3000))
	}
	for i := range 8 {
		wg.Go(func() {
			for k, obj := range objs {
				r := w.open(obj, "alice")
				for range i + 1 {
					w.read(r, content(uint64(k), 3000), 0, 3000)
				}
				r.Close()
			}
		})
	}
	wg.Wait()
	if gets, heads := w.asked(); len(gets) != objects || heads != 0 {
		t.Errorf("%d GETs, %d HEADs for %d objects of one chunk", len(gets), heads, objects)
	}
	w.close()
}

// TestWhatIsFetchedAheadIsCounted has each such byte end as read or as wasted, wherever it was.
func TestWhatIsFetchedAheadIsCounted(t *testing.T) {
	for _, c := range []struct {
		name     string
		capacity int64
		do       func(w *world, r *Reader)
	}{
		{"Evicted", 1 << 30, func(w *world, r *Reader) {}},
		{"NoRoom", 32 * mib, func(w *world, r *Reader) {}},
		{"Completed", 1 << 30, func(w *world, r *Reader) {
			if err := r.Complete(t.Context()); err != nil {
				t.Error(err)
			}
			w.sequence(r, 10*mib, 3*mib)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, openCache(t, c.capacity), Config{})
				data := content(1, 24*mib)
				obj := w.store.Put("a", data)
				r := w.open(obj, "alice")
				w.sequence(r, 0, 4*mib)
				synctest.Wait()
				c.do(w, r)
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if s, unread := w.fills.Stats(), w.cache.Stats().UnreadBytes; c.capacity > 32*mib && int64(s.AheadBytes-s.ForeseenBytes) != unread || s.WastedBytes != 0 {
					t.Errorf("%d bytes fetched ahead, %d of them read, %d wasted, %d unread in the cache", s.AheadBytes, s.ForeseenBytes, s.WastedBytes, unread)
				}
				w.cache.Evict(obj.ID())
				w.close()
				s := w.fills.Stats()
				if s.ForeseenBytes == 0 || s.WastedBytes == 0 || s.ForeseenBytes+s.WastedBytes != s.AheadBytes {
					t.Errorf("%d bytes fetched ahead, %d of them read, %d wasted", s.AheadBytes, s.ForeseenBytes, s.WastedBytes)
				}
				if unread := w.cache.Stats().UnreadBytes; unread != 0 {
					t.Errorf("%d bytes that are gone wait to be read", unread)
				}
			})
		})
	}
}
