package fill

import (
	"encoding/binary"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/larderfs/larder/cacheworker/fill/parquet"
	"github.com/larderfs/larder/cacheworker/object"
)

func TestAFooterTakesTwoRequests(t *testing.T) {
	const length, size = 5*mib + 100<<10, 40 * mib
	for _, c := range []struct {
		name   string
		length uint32
		word   string
		gets   string
	}{
		{"Parquet", length, "PAR1", "[34+5 39+1]"},
		{"WithinItsChunk", 100 << 10, "PAR1", "[39+1]"},
		{"LongerThanTheFile", size, "PAR1", "[39+1]"},
		{"SomethingElse", length, "PAR2", "[39+1]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, w *world) {
				data := content(1, size)
				copy(data[size-8:], append(binary.LittleEndian.AppendUint32(nil, c.length), c.word...))
				r := w.open(w.store.Put("a", data), "alice")
				defer r.Close()
				w.read(r, data, size-4096, 4096) // as the kernel reads 8 bytes
				w.want(c.gets, 0)
				if c.length == length && c.word == "PAR1" {
					w.read(r, data, size-8-length, length)
					w.want("[]", 0)
				}
			})
		})
	}
}

// TestAColumnOfAParquetFileIsNotReadBeyond reads parts as long as a chunk, at the file's beginning too.
func TestAColumnOfAParquetFileIsNotReadBeyond(t *testing.T) {
	const size = 40 * mib
	for _, word := range []string{"PAR1", "PAR2"} {
		t.Run(word, func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, w *world) {
				data := content(1, size)
				copy(data[size-8:], append(binary.LittleEndian.AppendUint32(nil, 1000), word...))
				r := w.open(w.store.Put("a", data), "alice")
				defer r.Close()
				r.Whole()
				w.read(r, data, size-4096, 4096)
				w.sequence(r, 0, mib)
				w.sequence(r, 20*mib, mib)
				synctest.Wait()
				gets, _ := w.asked()
				if alone := len(gets) == 3; alone != (word == "PAR1") {
					t.Errorf("%d GETs for the end and two chunks: %v", len(gets), gets)
				}
			})
		})
	}
}

// parquetFile is a file with these parts of columns, as one row group.
func parquetFile(size int, parts ...parquet.Part) []byte {
	meta := []byte{0x49, 0x1c, 0x19, 0xfc} // row_groups: 1, columns: so many
	meta = binary.AppendUvarint(meta, uint64(len(parts)))
	for _, p := range parts {
		meta = append(meta, 0x3c, 0x76) // meta_data, total_compressed_size
		meta = binary.AppendVarint(meta, p.End-p.Start)
		meta = append(meta, 0x26) // data_page_offset
		meta = binary.AppendVarint(meta, p.Start)
		meta = append(meta, 0, 0)
	}
	meta = append(meta, 0, 0)
	data := content(1, size)
	copy(data[size-8-len(meta):], append(binary.LittleEndian.AppendUint32(meta, uint32(len(meta))), "PAR1"...))
	return data
}

// TestOnlyColumnsThatAreReadAreFetched reads two of four columns as the kernel does for a reader of whole columns: in pieces
// of 256 KiB, and 512 KiB beyond the end.
func TestOnlyColumnsThatAreReadAreFetched(t *testing.T) {
	const step = 256 << 10
	parts := []parquet.Part{{Start: 4, End: mib / 2}, {Start: mib / 2, End: 9*mib + 100}, {Start: 9*mib + 100, End: 20 * mib}, {Start: 20 * mib, End: 30*mib + mib/2}}
	data := parquetFile(40*mib, parts...)
	column := func(w *world, r *Reader, p parquet.Part) {
		t.Helper()
		for off := p.Start &^ 4095; off < p.End+2*step; off += step {
			w.read(r, data, off, step)
			synctest.Wait()
		}
	}
	bubble(t, Config{}, func(t *testing.T, w *world) {
		obj := w.store.Put("a", data)
		r := w.open(obj, "alice")
		w.read(r, data, 40*mib-4096, 4096)
		w.want("[39+1]", 0)
		w.read(r, data, parts[1].Start, step) // all of it is known to be wanted, and asked for as far as the window goes
		w.want("[0+1 1+2 3+2 5+1]", 0)
		column(w, r, parts[1])
		w.want("[6+2 8+1 9+1]", 0)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r = w.open(obj, "alice") // does not read the footer, as who has read it before
		defer r.Close()
		column(w, r, parts[3])
		synctest.Wait()
		gets, _ := w.asked()
		got := map[int]int{}
		for _, g := range gets {
			var first, n int
			if _, err := fmt.Sscanf(g, "%d+%d", &first, &n); err != nil {
				t.Fatal(err)
			}
			for i := range n {
				got[first+i]++
			}
		}
		for i := range 40 {
			if want := i >= 20 && i <= 30; got[i] != 0 != want || got[i] > 1 {
				t.Errorf("chunk %d was fetched %d times by %v", i, got[i], gets)
			}
		}
	})
}

// TestAllColumnsInARowAreReadAhead: who goes on over the ends of columns is not kept waiting at each of them.
func TestAllColumnsInARowAreReadAhead(t *testing.T) {
	var parts []parquet.Part
	for i := range int64(40) {
		parts = append(parts, parquet.Part{Start: 10*mib + i*mib/2 + i, End: 10*mib + (i+1)*mib/2 + i + 1})
	}
	data := parquetFile(40*mib, parts...)
	bubble(t, Config{}, func(t *testing.T, w *world) {
		r := w.open(w.store.Put("a", data), "alice")
		defer r.Close()
		w.read(r, data, 40*mib-4096, 4096)
		synctest.Wait()
		w.sequence(r, 10*mib, 10*mib)
		synctest.Wait()
		if s := w.fills.Stats(); s.AheadBytes == 0 {
			t.Error("nothing was read ahead")
		}
	})
}

func TestLayoutsAreBounded(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, w *world) {
		long := make(parquet.Layout, maxParts/3)
		for i := range 10 {
			w.fills.rememberLayout(object.ID{byte(i)}, long)
		}
		if n, parts := len(w.fills.layouts), w.fills.layoutParts; n != 3 || parts != 3*len(long) {
			t.Errorf("%d layouts of %d parts are remembered", n, parts)
		}
	})
}

// TestAFooterOutlivesItsFile has a scan wash the file out: who opens it again makes no GET for its footer, and no HEAD
// unless nobody with that credential has read it before.
func TestAFooterOutlivesItsFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, openCache(t, 32*mib), Config{})
		defer w.close()
		const size = 8*mib + 100<<10
		data := parquetFile(size, parquet.Part{Start: mib, End: 3 * mib})
		obj := w.store.Put("a", data)
		footer := func(who string) {
			t.Helper()
			r := w.open(obj, who)
			defer r.Close()
			w.read(r, data, size-4096, 4096)
			w.read(r, data, size-32<<10, 32<<10) // as who guesses at its length
			synctest.Wait()
		}
		footer("alice")
		w.want("[8+1]", 0)
		if st := w.cache.Stats(); st.Objects != 1 || w.cache.TailBytes(obj.ID()) == 0 {
			t.Fatalf("the footer is not kept: %+v", st)
		}
		for i := range uint64(10) {
			other := content(i, 8*mib)
			r := w.open(w.store.Put(fmt.Sprint("scan", i), other), "alice")
			w.read(r, other, 0, len(other))
			synctest.Wait()
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if w.cache.Peek(obj.ID()).Exists {
			t.Fatal("the scan is too short")
		}
		w.asked()
		footer("alice")
		w.want("[]", 0)
		footer("bob")
		w.want("[]", 1)
		if w.cache.Peek(obj.ID()).Exists {
			t.Error("reading the footer made a cache file")
		}
		r := w.open(obj, "alice")
		defer r.Close()
		w.read(r, data, mib, 4096)
		w.want("[1+1]", 0)
	})
}
