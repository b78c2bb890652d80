package fill

import (
	"testing"
	"testing/synctest"

	"github.com/larderfs/larder/cacheworker/object"
)

// readSlowly reads in a row, and each time the disk has everything before the next read.
func (w *world) readSlowly(r *Reader, data []byte, off, n int64) {
	const each = 128 << 10
	for end := off + n; off < end; off += each {
		w.read(r, data, off, each)
		synctest.Wait()
	}
}

func TestReadAheadIsNotReadBackFromTheDisk(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 48*mib)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		w.readSlowly(r, data, 0, 48*mib)
		s := w.fills.Stats()
		if s.DiskBytes > 2*mib { // what was not read ahead
			t.Errorf("%d of 48 MiB were read from the disk", s.DiskBytes/mib)
		}
		if n := w.fills.nready.Load(); n != 0 || s.InFlightBytes != 0 {
			t.Errorf("%d chunks and %d bytes are in memory after they were read", n, s.InFlightBytes)
		}
	})
}

// readyOf is how many chunks wait in memory for a reader.
func (w *world) readyOf(r *Reader) (n int) {
	w.fills.mu.Lock()
	defer w.fills.mu.Unlock()
	for e := w.fills.ready.Front(); e != nil; e = e.Next() {
		if e.Value.(*chunk).fetch.reader == r {
			n++
		}
	}
	return n
}

func TestWhatWaitsInMemoryGivesWay(t *testing.T) {
	const total = 16 * mib
	idle := func(w *world, data []byte) *Reader { // who has read ahead, and stands still
		r := w.open(w.store.Put("a", data), "alice")
		w.readSlowly(r, data, 0, mib)
		if w.fills.nready.Load() < 8 {
			w.t.Fatalf("%d chunks wait for the reader: the test needs more", w.fills.nready.Load())
		}
		return r
	}
	t.Run("ToWhoWaitsForMemory", func(t *testing.T) {
		bubble(t, Config{MaxInFlightBytes: total}, func(t *testing.T, w *world) {
			data := content(1, 64*mib)
			r := idle(w, data)
			defer r.Close()
			before := w.readyOf(r)
			other := w.open(w.store.Put("b", data), "alice")
			defer other.Close()
			w.read(other, data, 20*mib, 12*mib)
			if n := w.readyOf(r); n >= before {
				t.Errorf("%d chunks wait, of %d before", n, before)
			}
			w.read(r, data, 0, 20*mib) // some of it from the disk now
		})
	})
	t.Run("WhenTheirReaderJumpsAway", func(t *testing.T) {
		bubble(t, Config{MaxInFlightBytes: total}, func(t *testing.T, w *world) {
			data := content(1, 64*mib)
			r := idle(w, data)
			defer r.Close()
			w.readSlowly(r, data, 40*mib, 8*mib)
			if s := w.fills.Stats(); s.DiskBytes > 2*mib {
				t.Errorf("%d of 8 MiB were read from the disk: what waits elsewhere is in the way", s.DiskBytes/mib)
			}
		})
	})
	t.Run("WhenTheirReaderIsClosed", func(t *testing.T) {
		bubble(t, Config{MaxInFlightBytes: total}, func(t *testing.T, w *world) {
			r := idle(w, content(1, 64*mib))
			r.Close()
			synctest.Wait()
			if n, s := w.fills.nready.Load(), w.fills.Stats(); n != 0 || s.InFlightBytes != 0 {
				t.Errorf("%d chunks and %d bytes are in memory, for nobody", n, s.InFlightBytes)
			}
		})
	})
}

// TestWhatIsNotReadInARowStaysInThePageCache: who reads a little of a chunk comes back to it.
func TestWhatIsNotReadInARowStaysInThePageCache(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 16*mib)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		for _, i := range []int64{9, 3, 14, 6} {
			w.read(r, data, i*mib+5000, 4096)
			synctest.Wait()
		}
		if n := w.fills.nready.Load(); n != 0 {
			t.Errorf("%d chunks wait for a reader who reads here and there", n)
		}
	})
}

func TestManyReadersAskForMoreAtOnce(t *testing.T) {
	asked := func(readers int) (gets int) {
		bubble(t, Config{}, func(t *testing.T, w *world) {
			data := content(1, 64*mib)
			obj := w.store.Put("a", data)
			var rs []*Reader
			for range readers {
				rs = append(rs, w.open(obj, "alice"))
			}
			for i, r := range rs[1:] {
				r.aheadBytes = object.ChunkSize * int64(i+1) // as who reads another object ahead
				w.fills.ahead++
			}
			for off := int64(0); off < 64*mib; off += 128 << 10 {
				w.read(rs[0], data, off, 128<<10)
			}
			synctest.Wait()
			for _, r := range rs[1:] {
				r.aheadBytes = 0
				w.fills.ahead--
			}
			for _, r := range rs {
				r.Close()
			}
			all, _ := w.asked()
			gets = len(all)
		})
		return gets
	}
	if one, many := asked(1), asked(8); many >= one {
		t.Errorf("%d GETs where eight read, %d where one does", many, one)
	}
}
