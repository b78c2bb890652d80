package fill

import (
	"bytes"
	"testing"
	"testing/synctest"
)

// lend borrows bytes and compares them.
func (w *world) lend(r *Reader, data []byte, off int64, n int) *Loan {
	w.t.Helper()
	l, err := r.Lend(w.t.Context(), make([]byte, n), off)
	if err != nil {
		w.t.Fatal(err)
	}
	w.lent(l, data[off:min(off+int64(n), int64(len(data)))])
	return l
}

func (w *world) lent(l *Loan, want []byte) {
	w.t.Helper()
	if got := bytes.Join(l.Pieces(), nil); !bytes.Equal(got, want) || l.Size() != len(want) {
		w.t.Errorf("%d bytes lent in %d pieces, which are not the %d that were asked for", l.Size(), len(l.Pieces()), len(want))
	}
}

func TestWhatIsLentStaysUntilItIsReturned(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 20*mib+5)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		l := w.lend(r, data, mib-1000, 5000) // of two chunks, in memory
		if len(l.Pieces()) != 2 || len(l.chunks) != 2 {
			t.Errorf("%d pieces, %d of them in memory; want both", len(l.Pieces()), len(l.chunks))
		}
		for off := int64(0); off < int64(len(data)); off += mib { // which needs the memory of those that were stored
			w.read(r, data, off, mib)
			synctest.Wait()
		}
		w.lent(l, data[mib-1000:mib+4000])
		l.Return()
	})
}

func TestWhatIsOnTheDiskIsReadIntoTheBorrowersBuffer(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		data := content(1, 8*mib)
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		w.read(r, data, 3*mib, 4096)
		synctest.Wait()
		for _, c := range []struct {
			off      int64
			n        int
			inMemory int
		}{
			{3*mib + 4096, 8192, 0},
			{4*mib - 5000, 10_000, 1}, // behind what is on the disk
			{3*mib - 5000, 10_000, 1}, // before it
			{8*mib - 10, 100, 1},      // to the end
			{8 * mib, 100, 0},
		} {
			l := w.lend(r, data, c.off, c.n)
			if len(l.chunks) != c.inMemory {
				t.Errorf("at %d: %d pieces in memory; want %d", c.off, len(l.chunks), c.inMemory)
			}
			l.Return()
			synctest.Wait()
		}
	})
}
