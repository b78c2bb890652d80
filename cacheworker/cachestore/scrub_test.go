package cachestore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

func scrubbed(t *testing.T, s *Store) {
	t.Helper()
	eventually(t, "all is verified", func() bool { st := s.Stats(); return st.UnverifiedBytes == 0 && st.LeasedObjects == 0 })
}

// TestWhatWasCachedBeforeTheBootIsVerified without anybody reading it, and becomes whole files again.
func TestWhatWasCachedBeforeTheBootIsVerified(t *testing.T) {
	cfg, _ := viewConfig(t, 256*chunk)
	s := open(t, cfg)
	var objects []object.Object
	for n := range 20 {
		objects = append(objects, obj(fmt.Sprint("o", n), int64(n%4+1)*chunk-17))
	}
	fill(t, s, objects...)
	part := obj("part", 3*chunk)
	f := lease(t, s, part)
	put(t, f, 0, 2)
	f.Close()
	damage(t, cfg, s, objects[7], 5) // of 4 chunks
	damage(t, cfg, s, part, 2*chunk+5)
	cached := s.Stats().CachedBytes
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	cfg.BootID = "boot-2"
	s, start := unread(t, cfg)
	if st := s.Stats(); !st.Reading {
		t.Errorf("not reading the index: %+v", st)
	}
	start()
	scrubbed(t, s)
	st := s.Stats()
	if st.BadChunks != 2 || st.CompleteObjects != len(objects)-1 || st.CachedBytes != cached-2*chunk || st.Reading {
		t.Errorf("%+v", st)
	}
	for n, o := range objects {
		f := lease(t, s, o)
		if v, err := f.View(); err == nil {
			v.Close()
		} else if n != 7 {
			t.Errorf("object %d: %v", n, err)
		}
		if f.Has(0) == (n == 7) {
			t.Errorf("object %d has its first chunk: %v", n, f.Has(0))
		}
		for i := range o.Chunks() {
			if f.Has(i) {
				wantChunk(t, f, i)
			}
		}
		f.Close()
	}
	checkInvariants(t, s)

	// Under the same boot nothing is looked at again.
	s = reopenUnchecked(t, s, cfg)
	if st := s.Stats(); st.UnverifiedBytes != 0 || st.CompleteObjects != len(objects)-1 {
		t.Errorf("after a restart: %+v", st)
	}
}

// TestAScrubberThatIsStopped is followed by one that goes on where it was.
func TestAScrubberThatIsStopped(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 1<<40)
	s := open(t, cfg)
	fill(t, s, obj("a", 40*chunk), obj("b", 3*chunk))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.BootID = "boot-2"
	slow := make(chan struct{})
	sys := &faulty{fail: func(op string) error {
		if op == "read" {
			<-slow
		}
		return nil
	}}
	cfg.sys = sys
	s = open(t, cfg)
	go func() {
		for range 5 {
			slow <- struct{}{}
		}
		close(slow)
	}()
	eventually(t, "some is verified", func() bool { return s.Stats().UnverifiedBytes < 43*chunk })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	left := s.Stats().UnverifiedBytes
	s = openUnscrubbed(t, cfg)
	if st := s.Stats(); st.UnverifiedBytes != left {
		t.Errorf("%d bytes unverified, %d when it was stopped", st.UnverifiedBytes, left)
	}
}

// TestTheFirstByteOfALargeFile after a reboot costs one chunk, not the file: the figure is of 10 GiB, in a sparse file.
func TestTheFirstByteOfALargeFile(t *testing.T) {
	const size = 10 << 30
	cfg := testConfig(t, t.TempDir(), 1<<40)
	s := open(t, cfg)
	large, small := obj("large", size), obj("small", chunk)
	f, err := s.Open(large)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(f.Fd(), size); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, chunk)
	if err := f.Put(0, zeros); err != nil {
		t.Fatal(err)
	}
	sum := xxhash.Sum64(zeros)
	err = s.index.write(func(b *pebble.Batch) error {
		var errs []error
		for i := range large.Chunks() {
			errs = append(errs, b.Set(chunkKey(f.e.Key, f.e.nonce, i), encodeChunk(sum, s.epoch), nil))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	fill(t, s, small)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	first := func(o object.Object, boot string) time.Duration {
		cfg.BootID = boot
		began := time.Now()
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		f := lease(t, s, o)
		n, err := f.ReadAt(make([]byte, 1), o.Size/2)
		took := time.Since(began)
		if n != 1 || err != nil {
			t.Errorf("%v under %s: %d, %v", o, boot, n, err)
		}
		if info := s.Peek(o.ID()); info.PresentBytes != o.Size || info.Complete && o.Size == size {
			t.Errorf("%v under %s: %+v", o, boot, info)
		}
		f.Close()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return took
	}
	var known, unknown, one time.Duration
	for n := range 3 { // the least of three: others use the machine, too
		one = least(one, first(small, fmt.Sprint("boot-a", n)))
		unknown = least(unknown, first(large, fmt.Sprint("boot-b", n)))
	}
	known = unknown // for the figure: the same start once more, under the same boot
	known = least(known, first(large, "boot-b2"))
	t.Logf("from the start to the first byte after a reboot: %v of 10 GiB, %v of 1 MiB (ratio %.1f); %v without a reboot", unknown, one, float64(unknown)/float64(one), known)
	if unknown > 20*one {
		t.Errorf("the first byte of 10 GiB took %v, that of 1 MiB %v", unknown, one)
	}
}

func least(a, b time.Duration) time.Duration {
	if a == 0 {
		return b
	}
	return min(a, b)
}

// TestALostIndex starts at once, and leaves nothing: not a file, not a byte uncounted that somebody still holds.
func TestALostIndex(t *testing.T) {
	for name, lose := range map[string]func(dir string) error{
		"removed": func(dir string) error { return os.RemoveAll(dir + "/" + indexName) },
		"broken": func(dir string) error {
			manifests, err := filepath.Glob(dir + "/" + indexName + "/db/MANIFEST-*")
			for _, m := range manifests {
				err = errors.Join(err, os.Truncate(m, 3))
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg, _ := viewConfig(t, 16*chunk)
			s := open(t, cfg)
			kept, gone := obj("kept", 4*chunk), obj("gone", 4*chunk)
			fill(t, s, kept, gone)
			f := lease(t, s, kept)
			v, err := f.View()
			if err != nil {
				t.Fatal(err)
			}
			defer v.Close()
			f.Close()
			if err := errors.Join(s.Close(), lose(cfg.Dir)); err != nil {
				t.Fatal(err)
			}

			s, start := unread(t, cfg)
			if n := countFiles(t, cfg.Dir+"/"+objectsName); n != 0 {
				t.Errorf("%d files", n)
			}
			g := lease(t, s, gone) // before anything is removed
			if g.Has(0) || s.Peek(kept.ID()).Exists {
				t.Error("something is known")
			}
			start()
			if st := s.Stats(); st.UnlinkedBytes != 4*chunk || st.UnlinkedFiles != 1 {
				t.Errorf("somebody holds 4 chunks: %+v", st)
			}
			if aside, err := filepath.Glob(cfg.Dir + "/" + asidePrefix + "*"); len(aside) != 0 || err != nil {
				t.Errorf("left behind: %v, %v", aside, err)
			}
			putAll(t, g)
			wantChunk(t, g, 3)
			b := make([]byte, 1)
			if _, err := v.ReadAt(b, 0); err != nil || b[0] != content(kept, 0)[0] {
				t.Errorf("who held the file reads %v, %v", b, err)
			}
			v.Close()
			eventually(t, "what was held is released", func() bool { return s.Stats().UnlinkedBytes == 0 })
			g.Close()
			s = reopenUnchecked(t, s, cfg)
			wantChunk(t, lease(t, s, gone), 1)
		})
	}
}

// TestPutsWhileTheIndexIsRead take what room the file system surely has, and else are told that there is none.
func TestPutsWhileTheIndexIsRead(t *testing.T) {
	cfg := testConfig(t, tmpfs(t, "size=128m"), 64*chunk)
	s := open(t, cfg)
	old := obj("old", 8*chunk)
	fill(t, s, old)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, start := unread(t, cfg)
	close(s.load.late)
	s.load.late = make(chan struct{}) // start closes it once more
	late := s.load.late
	close(late)
	f := lease(t, s, obj("new", 8*chunk))
	put(t, f, 0)
	wantChunk(t, f, 0)
	if err := os.WriteFile(cfg.Dir+"/foreign", make([]byte, 60<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.fsAt = time.Time{}
	s.mu.Unlock()
	if err := f.Put(1, content(f.Object(), 1)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("put, though it may be too much: %v", err)
	}
	if !s.Peek(old.ID()).Complete {
		t.Error("something was evicted, though nobody knows how full the tier is")
	}
	s.load.late = make(chan struct{})
	start()
	put(t, f, 1)
	wantChunk(t, f, 1)
	wantChunk(t, lease(t, s, old), 7)
}

// TestAFileThatCannotBeWrittenBack is not given away, and fetched again.
func TestAFileThatCannotBeWrittenBack(t *testing.T) {
	var log logCounter
	cfg, _ := viewConfig(t, 64*chunk)
	fail, on := only("write back", syscall.EIO)
	cfg.sys, cfg.Log = &faulty{fail: fail}, log.logger(t)
	s := open(t, cfg)
	told := make(chan object.ID, 10)
	s.OnEvict(func(id object.ID) { told <- id })
	o := obj("a", 2*chunk)
	on.Store(true)
	f := lease(t, s, o)
	putAll(t, f)
	if id := <-told; id != o.ID() {
		t.Errorf("%v was evicted", id)
	}
	if v, err := f.View(); !errors.Is(err, object.ErrIncomplete) {
		t.Errorf("view %v: %v", v, err)
	}
	if s.Peek(o.ID()).Exists || s.Stats().PutErrors != 1 || log.errors.Load() != 1 {
		t.Errorf("%+v, %d errors logged", s.Stats(), log.errors.Load())
	}
	on.Store(false)
	g := lease(t, s, o)
	putAll(t, g)
	v, err := g.View()
	if err != nil {
		t.Fatal(err)
	}
	v.Close()
}

// TestAFileOfAnEarlierWorkerIsWrittenBack before it is given away: that one may have been killed before it could.
func TestAFileOfAnEarlierWorkerIsWrittenBack(t *testing.T) {
	cfg, _ := viewConfig(t, 64*chunk)
	s := open(t, cfg)
	o := obj("a", 2*chunk)
	fill(t, s, o)
	fail, on := only("write back", syscall.EIO)
	cfg.sys = &faulty{fail: fail}
	s = reopenUnchecked(t, s, cfg)
	on.Store(true)
	f := lease(t, s, o)
	if v, err := f.View(); !errors.Is(err, object.ErrIncomplete) {
		t.Errorf("view %v: %v", v, err)
	}
	if s.Peek(o.ID()).Exists {
		t.Error("still there")
	}
	on.Store(false)
}
