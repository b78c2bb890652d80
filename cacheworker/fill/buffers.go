package fill

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// keepIdle is how many buffers are kept while none is in use.
const keepIdle = 16

// buffers are the memory of chunks, outside the Go heap: the collector would wait for as much garbage again
// before it gave a buffer back, and the kernel would clear each page anew.
type buffers struct {
	mu   sync.Mutex // guards the fields below
	free [][]byte
	used int
}

// take returns a buffer of a whole chunk, with anything in it.
func (b *buffers) take() ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.free); n > 0 {
		buf := b.free[n-1]
		b.free = b.free[:n-1]
		b.used++
		return buf, nil
	}
	buf, err := unix.Mmap(-1, 0, object.ChunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("memory for a chunk: %w", err)
	}
	b.used++
	return buf, nil
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

// trim gives all but n free buffers back to the kernel. Requires b.mu.
func (b *buffers) trim(n int) {
	for len(b.free) > n {
		last := len(b.free) - 1
		unix.Munmap(b.free[last]) // fails for what Mmap did not return only
		b.free = b.free[:last]
	}
}

func (b *buffers) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.trim(0)
}
