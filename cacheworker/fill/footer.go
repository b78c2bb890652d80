package fill

import (
	"context"
	"encoding/binary"

	"github.com/larderfs/larder/cacheworker/object"
)

// tail is what a Parquet file ends with: the length of its footer, then a word. Readers ask for
// it first, and then for the footer.
const tail = 8

// seeTail is told the bytes at the object's end when they are read first. Where they say how long a footer is, all of
// it is asked for at once: the reader would do so piece by piece.
func (r *Reader) seeTail(ctx context.Context, end []byte) {
	if r.tailSeen.Swap(true) || len(end) < tail {
		return
	}
	end = end[len(end)-tail:]
	length := int64(binary.LittleEndian.Uint32(end))
	if string(end[4:]) != "PAR1" {
		return
	}
	r.columnar.Store(true)
	if length > min(r.obj.Size-tail, r.f.cfg.MaxGetBytes) {
		return
	}
	from, last := chunkAt(r.obj.Size-tail-length), chunkAt(r.obj.Size-1)
	if from == last {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() {
		return
	}
	l := r.leased()
	if l != nil {
		defer l.release()
	}
	r.prefetch(ctx, l, max(from, last-int(r.f.cfg.MaxGetBytes/object.ChunkSize)), last)
}
