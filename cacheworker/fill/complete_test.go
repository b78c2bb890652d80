package fill

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larderfs/larder/cacheworker/fill/memsource"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// slowly has each GET take so long, and counts those at once.
func (w *world) slowly(d time.Duration) (most *atomic.Int32) {
	var now atomic.Int32
	most = new(atomic.Int32)
	w.store.Before = func(ctx context.Context, r memsource.Request) error {
		if r.Kind != source.Get {
			return nil
		}
		most.Store(max(most.Load(), now.Add(1)))
		defer now.Add(-1)
		return sleep(ctx, d)
	}
	return most
}

// TestCompletionHasHalfOfOneConnection completes two objects of five GETs each, while nobody else fetches.
func TestCompletionHasHalfOfOneConnection(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		most := w.slowly(time.Second)
		began := time.Now()
		for i := range uint64(2) {
			w.fills.CompleteLater(w.store.Put(fmt.Sprint(i), content(i, 40*mib)), w.store.Source("alice"), nil)
		}
		for w.fills.Stats().Completed < 2 {
			time.Sleep(time.Second / 10)
		}
		gets, _ := w.asked()
		if took := time.Since(began); len(gets) != 10 || most.Load() != 1 || took < 18*time.Second || took > 20*time.Second {
			t.Errorf("%d GETs of a second each, %d at once, took %v", len(gets), most.Load(), took)
		}
	})
}

// TestAReaderHasTheLinkForItself: a completion waits for it, and the piece under way is the last that it shares the
// link with.
func TestAReaderHasTheLinkForItself(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		w.slowly(time.Second)
		data := content(1, 64*mib)
		w.fills.CompleteLater(w.store.Put("b", content(2, 64*mib)), w.store.Source("alice"), nil)
		time.Sleep(time.Second / 2)
		w.asked()
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		for off := int64(0); off < 20*mib; off += mib { // random reads: one GET at a time
			w.read(r, data, (off*13)%(64*mib), 4096)
		}
		for _, q := range w.store.Requests() {
			if q.Key != "a" {
				t.Errorf("GET of %s at %d while a reader fetched", q.Key, q.Off)
			}
		}
	})
}

// TestCompletionIsBoundedInTheCache has it want more than there is room for: into free room all goes, of a full cache it gets a
// share, until what it has brought is read.
func TestCompletionIsBoundedInTheCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const capacity = 64 * mib
		w := newWorld(t, openCache(t, capacity), Config{})
		defer w.close()
		var objects []object.Object
		complete := func(name string, n int) {
			for i := range n {
				o := w.store.Put(fmt.Sprint(name, i), content(uint64(i), 8*mib))
				objects = append(objects, o)
				w.fills.CompleteLater(o, w.store.Source("alice"), nil)
			}
			for w.fills.Stats().CompletesQueue > 0 {
				time.Sleep(time.Second)
			}
			time.Sleep(time.Minute)
		}
		complete("free", 6)
		if n := w.fills.Stats().Completed; n != 6 {
			t.Errorf("%d objects of 6 were completed into free room", n)
		}
		for _, o := range objects[:6] { // they are in use
			r := w.open(o, "alice")
			w.read(r, content(0, 8*mib)[:0], 9*mib, 1)
			for off := range int64(8) {
				if _, err := r.ReadAt(t.Context(), make([]byte, 1), off*mib); err != nil {
					t.Error(err)
				}
			}
			r.Close()
		}
		if st := w.cache.Stats(); st.UnreadBytes != 0 {
			t.Errorf("%d bytes are unread though all were read", st.UnreadBytes)
		}
		complete("full", 20)
		if st := w.cache.Stats(); st.UnreadBytes > capacity/cacheShare || st.UnreadBytes < 8*mib {
			t.Errorf("%d MiB that nobody reads are in a cache of %d", st.UnreadBytes/mib, capacity/mib)
		}
		if n := w.fills.Stats().Completed; n > 6+2 {
			t.Errorf("%d objects were completed", n)
		}
	})
}
