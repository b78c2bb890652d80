package fill

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/object"
)

// link gives a store in a bubble an object store's manners: what is asked for comes late, each
// connection is only so fast, and all together are.
type link struct {
	late       time.Duration
	connection float64 // bytes a second
	all        float64
	uneven     bool // a GET may come twice as late, and half as fast

	mu    sync.Mutex // guards the fields below
	rnd   *rand.Rand
	free  time.Time // when the link is
	conns map[string]*connection
}

type connection struct {
	free time.Time
	rate float64
}

func (l *link) before(w *world) {
	l.conns = map[string]*connection{}
	l.rnd = rand.New(rand.NewPCG(1, 2))
	w.store.Before = func(ctx context.Context, _ memsource.Request) error {
		select {
		case <-time.After(time.Duration(float64(l.late) * l.times())):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	const piece = 128 << 10
	w.store.Piece = piece
	w.store.Reading = func(ctx context.Context, r memsource.Request, _ int64) error {
		select {
		case <-time.After(time.Until(l.reserve(fmt.Sprint(r.Key, r.Off), piece))):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// times is by how much a GET is worse than it could be.
func (l *link) times() float64 {
	if !l.uneven {
		return 1
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return 1 + l.rnd.Float64()
}

func (l *link) reserve(conn string, n float64) time.Time {
	times := l.times()
	l.mu.Lock()
	defer l.mu.Unlock()
	pass := func(at time.Time, rate float64) time.Time {
		if now := time.Now(); at.Before(now) {
			at = now
		}
		return at.Add(time.Duration(n / rate * float64(time.Second)))
	}
	l.free = pass(l.free, l.all)
	c := l.conns[conn]
	if c == nil {
		c = &connection{rate: l.connection / times}
		l.conns[conn] = c
	}
	if c.free = pass(c.free, c.rate); c.free.After(l.free) {
		return c.free
	}
	return l.free
}

// sequence reads [off, off+n) in pieces as the kernel asks for them.
func (w *world) sequence(r *Reader, off, n int64) {
	p := make([]byte, 256<<10)
	for end := off + n; off < end; off += int64(len(p)) {
		if _, err := r.ReadAt(w.t.Context(), p[:min(int64(len(p)), end-off)], off); err != nil {
			w.t.Error(err)
			return
		}
	}
}

// TestTheLinkIsUsed compares with a link that is busy from the first byte to the last.
func TestTheLinkIsUsed(t *testing.T) {
	const size = 256 * mib
	late := 30 * time.Millisecond
	for _, c := range []struct {
		name       string
		all        float64
		uneven     bool
		readers    int
		read       func(w *world, r *Reader, obj object.Object)
		roundTrips float64 // that may be lost, the first one included
	}{
		{"OneReader", 400e6, false, 1, func(w *world, r *Reader, obj object.Object) { w.sequence(r, 0, obj.Size) }, 2.5},
		{"OneReaderOfAnUnevenStore", 400e6, true, 1, func(w *world, r *Reader, obj object.Object) { w.sequence(r, 0, obj.Size) }, 4},
		{"OneReaderOfAWideLink", 1000e6, false, 1, func(w *world, r *Reader, obj object.Object) { w.sequence(r, 0, obj.Size) }, 5},
		{"EightReaders", 400e6, false, 8, func(w *world, r *Reader, obj object.Object) { w.sequence(r, 0, obj.Size) }, 3},
		{"EightReadersOfAnUnevenStore", 400e6, true, 8, func(w *world, r *Reader, obj object.Object) { w.sequence(r, 0, obj.Size) }, 4},
		{"RandomStarts", 400e6, false, 1, randomStarts, 5},
		{"RandomStartsInAnUnevenStore", 400e6, true, 1, randomStarts, 8},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, w *world) {
				(&link{late: late, connection: 90e6, all: c.all, uneven: c.uneven}).before(w)
				var wg sync.WaitGroup
				start := time.Now()
				for i := range c.readers {
					obj := w.store.Put(fmt.Sprint("f", i), make([]byte, size/c.readers))
					wg.Go(func() {
						r := w.open(obj, "alice")
						defer r.Close()
						r.Whole()
						c.read(w, r, obj)
					})
				}
				wg.Wait()
				lost := time.Since(start) - time.Duration(size/c.all*float64(time.Second))
				synctest.Wait()
				s := w.fills.Stats()
				t.Logf("%v lost, %d GETs", lost, s.Gets)
				if lost > time.Duration(c.roundTrips*float64(late)) {
					t.Errorf("%v lost, %.1f round trips; want at most %.1f", lost, float64(lost)/float64(late), c.roundTrips)
				}
				if s.FetchedBytes != size {
					t.Errorf("%d bytes fetched of %d", s.FetchedBytes, size)
				}
			})
		})
	}
}

// randomStarts reads as safetensors does, in pieces of 4 to 20 MiB that are not in the file's order.
func randomStarts(w *world, r *Reader, obj object.Object) {
	rnd := rand.New(rand.NewPCG(1, 2))
	type piece struct{ off, n int64 }
	var all []piece
	for at := int64(0); at < obj.Size; {
		n := min(4*mib+rnd.Int64N(16*mib)&^4095, obj.Size-at)
		all = append(all, piece{at, n})
		at += n
	}
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, p := range all {
		w.sequence(r, p.off, p.n)
	}
}
