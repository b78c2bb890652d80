package cachestore

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// logCounter counts what an operator would see.
type logCounter struct{ warnings, errors atomic.Int64 }

func (l *logCounter) logger(t testing.TB) *slog.Logger {
	return slog.New(countingHandler{slog.NewTextHandler(t.Output(), nil), l})
}

type countingHandler struct {
	slog.Handler
	l *logCounter
}

func (h countingHandler) Handle(ctx context.Context, r slog.Record) error {
	switch r.Level {
	case slog.LevelError:
		h.l.errors.Add(1)
	case slog.LevelWarn:
		h.l.warnings.Add(1)
	}
	return h.Handler.Handle(ctx, r)
}

// damage changes one byte of a cache file behind the store's back.
func damage(t testing.TB, cfg Config, s *Store, o object.Object, off int64) {
	t.Helper()
	s.mu.Lock()
	name := cfg.Dir + "/" + objectPath(o.ID(), s.entries[o.ID()].nonce)
	s.mu.Unlock()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0]++
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// openUnscrubbed opens a store that verifies only what is read.
func openUnscrubbed(t testing.TB, cfg Config) *Store {
	t.Helper()
	s, err := prepare(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.quit = cancel
	s.work.Go(func() { s.janitor(ctx) })
	<-s.swept
	t.Cleanup(func() {
		checkInvariants(t, s)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// reopen closes a store and opens it again under a boot id.
func reopen(t testing.TB, s *Store, cfg Config, boot string) *Store {
	t.Helper()
	checkInvariants(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.BootID = boot
	return openUnscrubbed(t, cfg)
}

// TestAfterAnotherBootEveryChunkIsChecked is invariant 2.
func TestAfterAnotherBootEveryChunkIsChecked(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	s := open(t, cfg)
	o := obj("a", 3*chunk+5)
	fill(t, s, o)
	damage(t, cfg, s, o, chunk+17)
	s = reopen(t, s, cfg, "boot-2")
	f := lease(t, s, o)
	if f.Complete() || s.Peek(o.ID()).Complete || s.Stats().CompleteObjects != 0 {
		t.Error("complete, though nothing is verified")
	}
	if _, err := f.View(); err == nil {
		t.Error("an unverified file was given away")
	}
	wantChunk(t, f, 0)
	if f.Has(1) {
		t.Error("a damaged chunk was taken for good")
	}
	wantChunk(t, f, 2)
	if st := s.Stats(); st.BadChunks != 1 || st.CachedBytes != 2*chunk+5 {
		t.Errorf("%+v", st)
	}

	// Half verified, and stopped: under the same boot only the other half is checked again.
	f.Close()
	damage(t, cfg, s, o, 3*chunk)
	s = reopen(t, s, cfg, "boot-2")
	f = lease(t, s, o)
	if !f.e.isVerified(0) || f.e.isVerified(3) || f.e.isPresent(1) {
		t.Errorf("verified %v %v, bad one present %v", f.e.isVerified(0), f.e.isVerified(3), f.e.isPresent(1))
	}
	if f.Has(3) {
		t.Error("a damaged chunk was taken for good")
	}
	put(t, f, 1, 3)
	if !f.Complete() || s.Stats().CompleteObjects != 1 {
		t.Error("not complete after its bad chunks were put again")
	}
	wantChunk(t, f, 1)
	wantChunk(t, f, 3)
}

func TestAShortOrMissingFileIsAMiss(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	s := open(t, cfg)
	short, gone, later := obj("short", 3*chunk), obj("gone", chunk), obj("later", chunk)
	fill(t, s, short, gone, later)
	path := func(o object.Object) string { return cfg.Dir + "/" + objectPath(o.ID(), s.entries[o.ID()].nonce) }
	if err := errors.Join(os.Truncate(path(short), 2*chunk-1), os.Remove(path(gone))); err != nil {
		t.Fatal(err)
	}
	s = reopenUnchecked(t, s, cfg)
	if s.Peek(gone.ID()).Exists {
		t.Error("an object without a file")
	}
	f := lease(t, s, short)
	if !f.Has(0) || f.Has(1) || f.Has(2) {
		t.Errorf("chunks of a file cut short: %v %v %v", f.Has(0), f.Has(1), f.Has(2))
	}
	put(t, f, 1, 2)
	wantChunk(t, f, 0)
	wantChunk(t, f, 2)
	if err := os.Remove(path(later)); err != nil {
		t.Fatal(err)
	}
	g := lease(t, s, later)
	if g.Has(0) {
		t.Error("a chunk of a file removed under the store is present")
	}
	put(t, g, 0)
	wantChunk(t, g, 0)
}

func reopenUnchecked(t testing.TB, s *Store, cfg Config) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, cfg)
}

func TestFilesOfNoObjectAreRemoved(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	s := open(t, cfg)
	o := obj("a", chunk)
	fill(t, s, o)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	shard := cfg.Dir + "/" + objectsName + "/" + o.ID().String()[:2]
	for _, name := range []string{shard + "/stranger", cfg.Dir + "/" + objectPath(o.ID(), 5), cfg.Dir + "/held/stranger"} {
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, cfg)
	if n := countFiles(t, cfg.Dir+"/objects") + countFiles(t, cfg.Dir+"/held"); n != 1 {
		t.Errorf("%d files", n)
	}
	wantChunk(t, lease(t, s, o), 0)
}

// TestAMissingFileIsAMiss: before the sweep, by it, and not under somebody's hands.
func TestAMissingFileIsAMiss(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	s := open(t, cfg)
	a, b, c := obj("a", chunk), obj("b", chunk), obj("c", chunk)
	fill(t, s, a, b, c)
	f := lease(t, s, c)
	var told []object.ID
	s.OnEvict(func(id object.ID) { told = append(told, id) })
	for _, o := range []object.Object{a, b, c} {
		if err := os.Remove(cfg.Dir + "/" + objectPath(o.ID(), s.entries[o.ID()].nonce)); err != nil {
			t.Fatal(err)
		}
		s.entries[o.ID()].seen = false // as after a start
	}
	again := lease(t, s, a)
	if again.Has(0) || again.Complete() {
		t.Error("a chunk without a file")
	}
	put(t, again, 0)
	if err := s.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantChunk(t, again, 0)
	wantChunk(t, f, 0)
	if s.Peek(b.ID()).Exists || !slices.Equal(told, []object.ID{b.ID()}) {
		t.Errorf("%+v of an object without a file; told of %v", s.Peek(b.ID()), told)
	}
	f.Close()
	s.Evict(c.ID())
	s = reopen(t, s, cfg, "boot-1")
	if n := s.Stats().Objects; n != 1 {
		t.Errorf("%d objects", n)
	}
}

func TestABrokenIndexStartsEmpty(t *testing.T) {
	breakages := map[string]func(t *testing.T, dir string){
		"manifest": func(t *testing.T, dir string) { overwrite(t, dir, "MANIFEST-*") },
		"tables":   func(t *testing.T, dir string) { overwrite(t, dir, "*.sst") },
		"no manifest": func(t *testing.T, dir string) {
			for _, name := range glob(t, dir, "MANIFEST-*") {
				if err := os.Remove(name); err != nil {
					t.Fatal(err)
				}
			}
		},
	}
	for name, breakIt := range breakages {
		t.Run(name, func(t *testing.T) {
			var log logCounter
			cfg := testConfig(t, t.TempDir(), 64*chunk)
			s := open(t, cfg)
			o := obj("a", 2*chunk)
			fill(t, s, o)
			s.Grant(o, principal(1), time.Now())
			id := s.UUID()
			if err := s.index.db.Flush(); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			breakIt(t, cfg.Dir+"/"+indexName+"/db")
			cfg.Log = log.logger(t)
			s = open(t, cfg)
			if st := s.Stats(); st.Objects != 0 || st.DiskBytes != 0 || usedOnDisk(t, s) != 0 {
				t.Errorf("%+v, %d bytes on disk", st, usedOnDisk(t, s))
			}
			if s.UUID() != id {
				t.Error("the identity was lost, too")
			}
			if log.errors.Load() == 0 {
				t.Error("nothing logged")
			}
			fill(t, s, o)
			s = reopen(t, s, cfg, "boot-1")
			wantChunk(t, lease(t, s, o), 1)
			if s.Granted(o.ID(), principal(1)) {
				t.Error("a grant outlived its object")
			}
		})
	}
}

func glob(t *testing.T, dir, pattern string) []string {
	names, err := filepath.Glob(dir + "/" + pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("no %s in %s: %v", pattern, dir, err)
	}
	return names
}

func overwrite(t *testing.T, dir, pattern string) {
	for _, name := range glob(t, dir, pattern) {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i := range b {
			b[i] ^= 0x55
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestABrokenIndexOfALivingStoreOnlyStopsPuts is what a worker does when its index dies under it.
func TestABrokenIndexOfALivingStoreOnlyStopsPuts(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 4*chunk)
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f := lease(t, s, obj("a", 2*chunk))
	put(t, f, 0)
	fill(t, s, obj("b", chunk))
	s.index.fail(errors.New("the disk of the index is gone"))
	if err := f.Put(1, content(f.Object(), 1)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("put: %v", err)
	}
	wantChunk(t, f, 0)
	s.Grant(f.Object(), principal(1), time.Now())
	s.Revoke(principal(2), f.Object().Store)
	if !s.Granted(f.Object().ID(), principal(1)) {
		t.Error("a grant needs no index")
	}
	if !s.Evict(obj("b", chunk).ID()) {
		t.Error("not evicted")
	}
	checkInvariants(t, s)
	f.Close()
	if err := s.Close(); err == nil {
		t.Error("closed without a word")
	}
}

func TestASecondProcessWaitsForTheLock(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 4*chunk)
	s := open(t, cfg)
	cfg.LockWait = 50 * time.Millisecond
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Fatalf("opened twice: %v", err)
	}
	cfg.LockWait = time.Minute
	opened := make(chan *Store)
	go func() {
		s, err := Open(cfg)
		if err != nil {
			t.Error(err)
		}
		opened <- s
	}()
	select {
	case <-opened:
		t.Fatal("opened twice")
	default:
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s := <-opened; s != nil {
		s.Close()
	}
}

// TestTheDirectoryMayBeADescriptor is a worker without rights on the folders above.
func TestTheDirectoryMayBeADescriptor(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 16*chunk)
	d, err := os.Open(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	real := cfg.Dir
	cfg.Dir = dir{f: d}.path()
	s := open(t, cfg)
	o := obj("a", 2*chunk)
	fill(t, s, o)
	moved := real + "-moved"
	if err := os.Rename(real, moved); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(moved)
	wantChunk(t, lease(t, s, o), 1)
	if err := s.index.db.Flush(); err != nil { // the index does not mind either
		t.Fatal(err)
	}
	s = reopen(t, s, cfg, "boot-1")
	wantChunk(t, lease(t, s, o), 0)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	d.Close()
}

func TestAnEmptyObjectIsCompleteAtOnce(t *testing.T) {
	cfg, _ := viewConfig(t, 16*chunk)
	s := open(t, cfg)
	o := obj("empty", 0)
	f := lease(t, s, o)
	if !f.Complete() || !s.Peek(o.ID()).Complete {
		t.Error("not complete")
	}
	if n, err := f.ReadAt(make([]byte, 5), 0); n != 0 || err != io.EOF {
		t.Errorf("read: %d, %v", n, err)
	}
	v, err := f.View()
	if err != nil {
		t.Fatal(err)
	}
	v.Close()
	f.Close()
	s = reopen(t, s, cfg, "boot-1")
	if !s.Peek(o.ID()).Complete || s.Stats().CompleteObjects != 1 {
		t.Errorf("after a restart: %+v", s.Stats())
	}
}

// viewConfig has a read-only mount of the directory beside it.
func viewConfig(t testing.TB, capacity int64) (cfg Config, view string) {
	t.Helper()
	cfg = testConfig(t, t.TempDir(), capacity)
	view = t.TempDir()
	if err := unix.Mount(cfg.Dir, view, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(view, 0); err != nil {
			t.Errorf("unmount view: %v", err)
			unix.Unmount(view, unix.MNT_DETACH)
		}
	})
	if err := unix.Mount("", view, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	cfg.ViewDir = view
	return cfg, view
}
