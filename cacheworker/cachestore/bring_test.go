package cachestore

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// pagesOf is how many pages of a file are in memory.
func pagesOf(t testing.TB, f *os.File) uint64 {
	t.Helper()
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0); err != nil {
		t.Fatal(err)
	}
	return st.Cache
}

func TestCompleteObjectsAreBroughtAsAWhole(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), CapacityBytes: 64 * chunk}
	s := open(t, cfg)
	whole, part := obj("whole", 100_000), obj("part", 2*chunk)
	fill(t, s, whole)
	f := lease(t, s, part)
	put(t, f, 1)
	f.Close()
	onDiskOnly := func(o object.Object) *os.File {
		file, err := os.Open(filepath.Join(cfg.Dir, objectPath(o.ID(), s.entries[o.ID()].nonce)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { file.Close() })
		eventually(t, "no page is in memory", func() bool {
			if err := file.Sync(); err != nil {
				t.Fatal(err)
			}
			unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)
			return pagesOf(t, file) == 0
		})
		return file
	}
	wholeFile, partFile := onDiskOnly(whole), onDiskOnly(part)
	hits := s.policy.Hits(&s.entries[whole.ID()].Node)
	brought := map[object.ID][]byte{}
	s.Bring([]object.ID{obj("unknown", 1).ID(), part.ID(), whole.ID()}, func(id object.ID, b []byte) { brought[id] = b })
	if len(brought) != 1 || !bytes.Equal(brought[whole.ID()], content(whole, 0)) {
		t.Errorf("%d objects, or wrong bytes", len(brought))
	}
	if n := pagesOf(t, wholeFile); n != (100_000+4095)/4096 {
		t.Errorf("%d pages were read", n)
	}
	if n := pagesOf(t, partFile); n > 0 {
		t.Errorf("%d pages of what is not complete", n)
	}
	if now := s.policy.Hits(&s.entries[whole.ID()].Node); now != hits {
		t.Errorf("counted as %d uses", now-hits)
	}
}

// A file that is being brought is not one that somebody holds.
func TestBringingKeepsNothingFromBeingEvicted(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir(), CapacityBytes: 64 * chunk})
	const files = 50
	var g sync.WaitGroup
	for i := range files {
		o := obj(fmt.Sprint(i), 4096)
		fill(t, s, o)
		g.Go(func() {
			for range 20 {
				s.Bring([]object.ID{o.ID()}, func(object.ID, []byte) {})
			}
		})
		s.Evict(o.ID())
	}
	g.Wait()
	if st := s.Stats(); st.Objects > 0 || st.UnlinkedFiles > 0 {
		t.Errorf("%+v", st)
	}
}
