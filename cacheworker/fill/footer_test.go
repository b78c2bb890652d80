package fill

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
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
