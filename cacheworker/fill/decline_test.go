package fill

import (
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/larderfs/larder/cacheworker/fill/parquet"
)

// TestReadAheadBehindAColumnIsDeclined reads a column as the kernel does for who reads no other.
func TestReadAheadBehindAColumnIsDeclined(t *testing.T) {
	const step, begin = 256 << 10, 20 << 10
	const end = 7*mib + 700<<10
	const behind = begin + (end-begin+step-1)/step*step // where the kernel goes on
	data := parquetFile(20*mib, parquet.Part{Start: 4, End: begin}, parquet.Part{Start: begin, End: end},
		parquet.Part{Start: end, End: 12 * mib}, parquet.Part{Start: 12 * mib, End: 19 * mib})
	if behind >= 8*mib || behind+step <= 8*mib {
		t.Fatal("what follows the column does not begin in its last chunk, and end in the next")
	}
	column := func(w *world, r *Reader, to int64) {
		for off := int64(begin); off < to; off += step {
			w.read(r, data, off, step)
			synctest.Wait()
		}
	}
	for _, c := range []struct {
		name  string
		reads func(w *world, r *Reader)
		may   bool
		want  bool
	}{
		{"ItsEndWasRead", func(w *world, r *Reader) { column(w, r, end) }, true, true},
		{"AnotherHadReadItsEnd", func(w *world, r *Reader) { // so that the kernel's window is read in two pieces
			column(w, r, behind-step)
			w.read(r, data, end&^4095-8192, 12288)
			w.read(r, data, behind-step, end&^4095-8192-(behind-step))
			w.read(r, data, end&^4095+4096, behind-(end&^4095+4096))
		}, true, true},
		{"ItIsNoReadAhead", func(w *world, r *Reader) { column(w, r, end) }, false, false},
		{"ItsEndWasNotRead", func(w *world, r *Reader) { column(w, r, behind-step) }, true, false},
		{"TheNextOneIsRead", func(w *world, r *Reader) { column(w, r, end); w.read(r, data, 12*mib-step, 4096) }, true, true},
		{"TheChunkIsThere", func(w *world, r *Reader) { column(w, r, end); w.read(r, data, 8*mib, 4096) }, true, false},
		{"SomebodyReadsAColumnInTheChunk", func(w *world, r *Reader) {
			column(w, r, end)
			w.read(r, data, 8*mib-8192, 4096) // of the next column, which goes on in the chunk
		}, true, false},
		{"AllOfTheFileIsWanted", func(w *world, r *Reader) { column(w, r, end); r.Whole() }, true, false},
		{"Closed", func(w *world, r *Reader) {
			column(w, r, end)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, w *world) {
				r := w.open(w.store.Put("a", data), "alice")
				defer r.Close()
				w.read(r, data, 20*mib-4096, 4096)
				synctest.Wait()
				c.reads(w, r)
				synctest.Wait()
				if got := r.Decline(behind, step, c.may); got != c.want {
					t.Errorf("declined: %v, want %v", got, c.want)
				}
			})
		})
	}
}

// TestWhoComesToWhatWasDeclinedIsAnswered, and for a while so is everybody else.
func TestWhoComesToWhatWasDeclinedIsAnswered(t *testing.T) {
	const step, begin, end = 256 << 10, 20 << 10, mib + 700<<10
	const behind = begin + (end-begin+step-1)/step*step
	data := parquetFile(20*mib, parquet.Part{Start: 4, End: begin}, parquet.Part{Start: begin, End: end}, parquet.Part{Start: end, End: 19 * mib})
	bubble(t, Config{}, func(t *testing.T, w *world) {
		overshoot := func(i int) *Reader {
			r := w.open(w.store.Put(fmt.Sprint(i), data), "alice")
			w.read(r, data, 20*mib-4096, 4096)
			synctest.Wait()
			for off := int64(begin); off < end; off += step {
				w.read(r, data, off, step)
				synctest.Wait()
			}
			return r
		}
		r := overshoot(0)
		defer r.Close()
		if !r.Decline(behind, step, true) {
			t.Fatal("it is answered the first time")
		}
		if r.Decline(behind+step-4096, 4096, false) || r.Decline(behind, step, true) {
			t.Error("it is declined the second time")
		}
		answered := 0
		for i := 1; ; i++ {
			r := overshoot(i)
			declined := r.Decline(behind, step, true)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if declined {
				break
			}
			answered++
		}
		if answered != w.fills.cfg.Pardoned {
			t.Errorf("in %d other files it is answered; want %d", answered, w.fills.cfg.Pardoned)
		}
	})
}
