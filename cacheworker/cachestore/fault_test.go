package cachestore

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// TestTheIndexWaitsForTheDisk has the disk of the index refuse, and take again: what is cached is read meanwhile,
// nobody waits, and the store goes on where it was.
func TestTheIndexWaitsForTheDisk(t *testing.T) {
	for _, refusal := range diskErrors {
		t.Run(refusal.Error(), func(t *testing.T) {
			t.Parallel()
			var log logCounter
			var on atomic.Bool
			cfg, _ := viewConfig(t, 64*chunk)
			cfg.Log = log.logger(t)
			SetFaults(&cfg, func(op string) error {
				if op == "index" && on.Load() {
					return refusal
				}
				return nil
			})
			s := open(t, cfg)
			o, other, gone := obj("a", 4*chunk), obj("b", chunk), obj("gone", chunk)
			f := lease(t, s, o)
			put(t, f, 0)
			fill(t, s, other, gone)
			s.Grant(other, principal(1), time.Now())
			s.Grant(other, principal(2), time.Now())

			on.Store(true)
			for i := range 300 { // more than the queue of the index holds
				if err := f.Put(1+i%3, content(o, 1+i%3)); !errors.Is(err, object.ErrNoSpace) {
					t.Fatalf("put %d: %v", i, err)
				}
				s.Grant(other, principal(byte(3+i%100)), time.Now().Add(time.Duration(i)*time.Hour))
			}
			s.Revoke(principal(1), other.Store)
			if s.Granted(other.ID(), principal(1)) || !s.Granted(other.ID(), principal(2)) {
				t.Error("grants are others")
			}
			if !s.Evict(gone.ID()) {
				t.Error("not evicted")
			}
			wantChunk(t, f, 0)
			g := lease(t, s, other)
			wantChunk(t, g, 0)
			v, err := g.View()
			if err != nil {
				t.Fatal(err)
			}
			v.Close()
			checkInvariants(t, s)
			if st := s.Stats(); st.PutErrors == 0 || log.errors.Load() != 1 {
				t.Errorf("%d errors logged, %+v", log.errors.Load(), st)
			}

			on.Store(false)
			eventually(t, "the index is written again", func() bool { return f.Put(1, content(o, 1)) == nil })
			put(t, f, 2, 3)
			eventually(t, "the revocation is saved", func() bool { return !s.revokedUnsaved.Load() })
			f.Close()
			s = reopen(t, s, cfg, "boot-1")
			if st := s.Stats(); st.Objects != 2 || st.CompleteObjects != 2 {
				t.Errorf("after a restart: %+v", st)
			}
			if s.Granted(other.ID(), principal(1)) || !s.Granted(other.ID(), principal(2)) {
				t.Error("after a restart: grants are others")
			}
			f = lease(t, s, o)
			for i := range 4 {
				wantChunk(t, f, i)
			}
		})
	}
}

// TestAStartOnADiskThatRefuses reads through, and has its cache when the disk takes again.
func TestAStartOnADiskThatRefuses(t *testing.T) {
	var on atomic.Bool
	var log logCounter
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	s := open(t, cfg)
	o := obj("a", 2*chunk)
	fill(t, s, o)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.Log = log.logger(t)
	SetFaults(&cfg, func(op string) error {
		if op == "index" && on.Load() {
			return syscall.ENOSPC
		}
		return nil
	})
	on.Store(true)
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	if _, err := s.Open(o); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("open: %v", err)
	}
	s.Grant(o, principal(1), time.Now())
	s.Revoke(principal(1), o.Store)
	if st := s.Stats(); !st.Reading || s.Peek(o.ID()).Exists || s.Evict(o.ID()) || s.Granted(o.ID(), principal(1)) {
		t.Errorf("%+v", st)
	}
	on.Store(false)
	<-s.swept
	f := lease(t, s, o)
	wantChunk(t, f, 1)
	fill(t, s, obj("b", chunk))
	if st := s.Stats(); st.Reading || st.CompleteObjects != 2 || log.errors.Load() != 1 {
		t.Errorf("%d errors logged, %+v", log.errors.Load(), st)
	}
	checkInvariants(t, s)
	f.Close()
}

// TestAStoreClosesThoughTheDiskRefuses: a worker that ends then must not wait for the disk.
func TestAStoreClosesThoughTheDiskRefuses(t *testing.T) {
	var on atomic.Bool
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	SetFaults(&cfg, func(op string) error {
		if op == "index" && on.Load() {
			return syscall.EIO
		}
		return nil
	})
	for _, start := range []bool{false, true} {
		on.Store(start)
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		on.Store(true)
		if !start {
			<-s.swept
			f, err := s.Open(obj("a", chunk))
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Put(0, content(f.Object(), 0)); !errors.Is(err, object.ErrNoSpace) {
				t.Errorf("put: %v", err)
			}
			f.Close()
		}
		if err := s.Close(); err == nil {
			t.Error("closed without a word")
		}
		s.lock.Close()
	}
}

// TestARealFileSystemIsFull of bytes and of inodes, its index with it, while the store runs and when it starts.
func TestARealFileSystemIsFull(t *testing.T) {
	for name, exhaust := range map[string]struct {
		options string
		fill    func(dir string) error
	}{
		"bytes": {"size=64m", func(dir string) error {
			f, err := os.Create(dir + "/foreign/bytes")
			if err != nil {
				return err
			}
			defer f.Close()
			for n := 1 << 20; n >= 1; n /= 4 {
				for err = nil; err == nil; {
					_, err = f.Write(make([]byte, n))
				}
			}
			return err
		}},
		"inodes": {"size=64m,nr_inodes=700", func(dir string) (err error) {
			for n := 0; err == nil; n++ {
				err = unix.Mknod(fmt.Sprint(dir, "/foreign/", n), unix.S_IFREG|0o600, 0)
			}
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var log logCounter
			dir := tmpfs(t, exhaust.options)
			cfg := testConfig(t, dir, 32*chunk)
			cfg.Log = log.logger(t)
			s := open(t, cfg)
			o, part := obj("a", 3*chunk), obj("part", 6*chunk)
			fill(t, s, o)
			f := lease(t, s, part)
			put(t, f, 0)
			use := func() {
				if err := os.Mkdir(dir+"/foreign", 0o700); err != nil {
					t.Fatal(err)
				}
				if err := exhaust.fill(dir); !errors.Is(err, syscall.ENOSPC) {
					t.Fatal(err)
				}
				s.mu.Lock()
				s.fsAt = time.Now().Add(time.Hour) // it is not evicted just now
				s.mu.Unlock()
			}
			use()
			wantChunk(t, lease(t, s, o), 2)
			for n := range 20 { // what is refused is refused at once
				if g, err := s.Open(obj(fmt.Sprint("new", n), chunk)); err == nil {
					err = g.Put(0, content(g.Object(), 0))
					if !errors.Is(err, object.ErrNoSpace) && err != nil {
						t.Error(err)
					}
					g.Close()
				} else if !errors.Is(err, object.ErrNoSpace) {
					t.Error(err)
				}
			}
			checkInvariants(t, s)
			if n := log.errors.Load(); n > 1 {
				t.Errorf("%d errors logged", n)
			}
			f.Close()
			s.Close() // may be unable to say that it was clean
			s.lock.Close()

			s, err := Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				checkInvariants(t, s)
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}()
			if g, err := s.Open(o); err == nil { // where the index could be opened
				wantChunk(t, g, 1)
				g.Close()
			}
			if err := os.RemoveAll(dir + "/foreign"); err != nil {
				t.Fatal(err)
			}
			<-s.swept
			eventually(t, "the tier is back", func() bool {
				g, err := s.Open(part)
				if err != nil {
					return false
				}
				defer g.Close()
				for i := range part.Chunks() {
					if g.Put(i, content(part, i)) != nil {
						return false
					}
				}
				wantChunk(t, g, 5)
				return g.Complete()
			})
		})
	}
}

// TestAFileThatCannotBeRemovedStaysCounted until it can.
func TestAFileThatCannotBeRemovedStaysCounted(t *testing.T) {
	for _, op := range []string{"unlink", "rename"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			fail, on := only(op, syscall.EIO)
			cfg, _ := viewConfig(t, 8*chunk)
			cfg.sys = &faulty{fail: fail}
			s := open(t, cfg)
			o := obj("a", 2*chunk)
			fill(t, s, o)
			f := lease(t, s, o)
			v, err := f.View()
			if err != nil {
				t.Fatal(err)
			}
			defer v.Close()
			on.Store(true)
			s.Evict(o.ID())
			f.Close()
			v.Close()
			for range 3 {
				s.evicting.Lock()
				s.probe()
				s.evicting.Unlock()
			}
			st := s.Stats()
			if files := countFiles(t, cfg.Dir+"/objects") + countFiles(t, cfg.Dir+"/held"); (files == 1) != (st.UnlinkedBytes == 2*chunk) {
				t.Errorf("%d files, %+v", files, st)
			}
			on.Store(false)
			eventually(t, "it is removed", func() bool { return s.Stats().UnlinkedBytes == 0 })
			if files := countFiles(t, cfg.Dir+"/objects") + countFiles(t, cfg.Dir+"/held"); files != 0 {
				t.Errorf("%d files", files)
			}
		})
	}
}
