package fill

import (
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
)

func TestBuffersAreUsedAgainAndGivenBack(t *testing.T) {
	var b buffers
	var taken [][]byte
	take := func(n int) {
		seen := map[*byte]bool{}
		for range n {
			buf, err := b.take()
			if err != nil {
				t.Fatal(err)
			}
			if len(buf) != object.ChunkSize || cap(buf) != object.ChunkSize || seen[&buf[0]] {
				t.Fatalf("a buffer of %d bytes, with room for %d, taken before: %v", len(buf), cap(buf), seen[&buf[0]])
			}
			seen[&buf[0]] = true
			buf[0], buf[len(buf)-1] = 1, 1
			taken = append(taken, buf)
		}
	}
	give := func() {
		for _, buf := range taken {
			b.give(buf[:1])
		}
		taken = nil
	}
	const many = 4*keepIdle*slabBuffers + 1
	take(many)
	if got := len(b.slabs); got != many/slabBuffers+1 {
		t.Errorf("%d slabs for %d buffers", got, many)
	}
	give()
	if len(b.slabs) != keepIdle || len(b.free) != keepIdle*slabBuffers {
		t.Errorf("%d slabs and %d buffers while none is in use", len(b.slabs), len(b.free))
	}
	take(keepIdle * slabBuffers)
	if len(b.slabs) != keepIdle {
		t.Errorf("%d slabs for what the kept ones hold", len(b.slabs))
	}
	give()
	if b.close(); len(b.slabs) != 0 || len(b.free) != 0 {
		t.Errorf("%d slabs after the end", len(b.slabs))
	}
}
