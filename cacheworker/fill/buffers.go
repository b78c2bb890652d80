package fill

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

const (
	slabBuffers = 2 // are as long as a huge page
	keepIdle    = 8 // slabs that are kept while no buffer is in use
)

// buffers are the memory of chunks, outside the Go heap: the collector would wait for as much garbage again
// before it gave a buffer back, and the kernel would clear each page anew. It is asked to use huge pages: they are faster to get
// and, for a write past the page cache, to hold.
type buffers struct {
	mu    sync.Mutex // guards the fields below
	slabs [][]byte
	free  [][]byte
	used  int
}

// take returns a buffer of a whole chunk, with anything in it.
func (b *buffers) take() ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.free) == 0 {
		slab, err := unix.Mmap(-1, 0, slabBuffers*object.ChunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return nil, fmt.Errorf("memory for a chunk: %w", err)
		}
		unix.Madvise(slab, unix.MADV_HUGEPAGE) // a kernel without them refuses, and has others
		b.slabs = append(b.slabs, slab)
		b.cut(slab)
	}
	last := len(b.free) - 1
	buf := b.free[last]
	b.free = b.free[:last]
	b.used++
	return buf, nil
}

// cut makes the buffers of a slab free. Requires b.mu.
func (b *buffers) cut(slab []byte) {
	for i := range slabBuffers {
		b.free = append(b.free, slab[i*object.ChunkSize:(i+1)*object.ChunkSize:(i+1)*object.ChunkSize])
	}
}

// give takes a buffer back that take returned.
func (b *buffers) give(buf []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free = append(b.free, buf[:object.ChunkSize])
	if b.used--; b.used == 0 {
		b.trim(keepIdle)
	}
}

// trim gives all but n slabs back to the kernel. No buffer is in use. Requires b.mu.
func (b *buffers) trim(n int) {
	if len(b.slabs) <= n {
		return
	}
	for _, slab := range b.slabs[n:] {
		unix.Munmap(slab) // fails for what Mmap did not return only
	}
	clear(b.slabs[n:])
	b.slabs = b.slabs[:n]
	b.free = b.free[:0]
	for _, slab := range b.slabs {
		b.cut(slab)
	}
}

func (b *buffers) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used == 0 {
		b.trim(0)
	}
}
