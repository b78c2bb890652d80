package domainsocket

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// How fast is a warm file by its descriptor, by replies, and the same file read directly?

const benchFile = 64 << 20

func benchRead(b *testing.B, open func(b *testing.B, v *folder) io.ReaderAt) {
	for _, size := range []int{4 << 10, 1 << 20} {
		b.Run(strconv.Itoa(size>>10)+"K", func(b *testing.B) {
			v := newFolder(b)
			v.write(b, "a", benchFile)
			r := open(b, v)
			p := make([]byte, size)
			b.SetBytes(int64(size))
			off := int64(0)
			for b.Loop() {
				if _, err := r.ReadAt(p, off); err != nil {
					b.Fatal(err)
				}
				off = (off + int64(size)) % benchFile
			}
		})
	}
}

func BenchmarkReadByDescriptor(b *testing.B) {
	benchRead(b, func(b *testing.B, v *folder) io.ReaderAt {
		f := open(b, dial(b, newWorker(b, Config{Volume: v})), "a")
		if !f.Local() {
			b.Fatal("no descriptor")
		}
		return f
	})
}

func BenchmarkReadByReply(b *testing.B) {
	benchRead(b, func(b *testing.B, v *folder) io.ReaderAt {
		v.incomplete.Store(true)
		return open(b, dial(b, newWorker(b, Config{Volume: v})), "a")
	})
}

func BenchmarkReadNative(b *testing.B) {
	benchRead(b, func(b *testing.B, v *folder) io.ReaderAt {
		f, err := os.Open(filepath.Join(v.dir, "a"))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { f.Close() })
		return f
	})
}

// What does one open cost, descriptor, lease and release included?
func BenchmarkOpenByDescriptor(b *testing.B) {
	v := newFolder(b)
	v.write(b, "a", 4096)
	c := dial(b, newWorker(b, Config{Volume: v}))
	for b.Loop() {
		f, err := c.Open(b.Context(), "a")
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
		v.released(b)
	}
}
