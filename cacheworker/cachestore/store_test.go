package cachestore

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

const chunk = object.ChunkSize

// obj names an object whose bytes content makes.
func obj(key string, size int64) object.Object {
	return object.Object{Store: "s3://host/bucket", Key: key, Version: "v1", Size: size, ModTime: time.Unix(1700000000, 0)}
}

var contents sync.Map // what content made, because making it is most of these tests' time

// content is chunk i of an object: other bytes for every object and chunk. Not to be changed.
func content(o object.Object, i int) []byte {
	id := o.ID()
	var seed [32]byte
	copy(seed[:], id[:])
	seed[31], seed[30] = byte(i), byte(i>>8)
	if b, ok := contents.Load(seed); ok {
		return b.([]byte)
	}
	b := make([]byte, o.ChunkLen(i))
	rand.NewChaCha8(seed).Read(b)
	contents.Store(seed, b)
	return b
}

func testConfig(t testing.TB, dir string, capacity int64) Config {
	return Config{Dir: dir, CapacityBytes: capacity, BootID: "boot-1", LockWait: time.Minute,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
}

func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	<-s.swept
	t.Cleanup(func() {
		checkInvariants(t, s)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func lease(t testing.TB, s *Store, o object.Object) *File {
	t.Helper()
	f, err := s.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func put(t testing.TB, f *File, chunks ...int) {
	t.Helper()
	for _, i := range chunks {
		if err := f.Put(i, content(f.Object(), i)); err != nil {
			t.Fatalf("put chunk %d of %v: %v", i, f.Object(), err)
		}
	}
}

func putAll(t testing.TB, f *File) {
	t.Helper()
	for i := range f.Object().Chunks() {
		put(t, f, i)
	}
}

// fill caches objects and gives their leases up.
func fill(t testing.TB, s *Store, objects ...object.Object) {
	t.Helper()
	for _, o := range objects {
		f := lease(t, s, o)
		putAll(t, f)
		f.Close()
	}
}

func wantChunk(t testing.TB, f *File, i int) {
	t.Helper()
	got := make([]byte, f.Object().ChunkLen(i))
	n, err := f.ReadAt(got, int64(i)*chunk)
	if err != nil && err != io.EOF || n != len(got) || !bytes.Equal(got, content(f.Object(), i)) {
		t.Errorf("chunk %d of %v: n=%d err=%v, wrong bytes: %v", i, f.Object(), n, err, !bytes.Equal(got, content(f.Object(), i)))
	}
}

// checkInvariants compares the store's counts with its tables and with the disk.
func checkInvariants(t testing.TB, s *Store) {
	t.Helper()
	s.evicting.Lock()
	defer s.evicting.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	var cached, verified, live, held int64
	var complete, leased, tails int
	var unread int64
	for _, e := range s.entries {
		if marks := e.unread.Load(); marks != nil {
			for i := range e.chunks() {
				if (*marks)[i/64].Load()>>(i%64)&1 == 1 {
					unread += int64(e.chunkLen(i))
				}
			}
		}
		if e.tail {
			tails++
		}
		cached += e.presentBytes()
		verified += e.verifiedBytes()
		live += e.Bytes()
		if e.whole() {
			complete++
		}
		if e.file != nil {
			leased++
		}
	}
	for _, b := range s.held {
		held += b
	}
	if cached != s.cached || verified != s.verified || live != s.live || held != s.heldBytes || complete != s.complete || leased != s.leased {
		t.Errorf("counted cached %d verified %d live %d held %d complete %d leased %d; are %d %d %d %d %d %d",
			s.cached, s.verified, s.live, s.heldBytes, s.complete, s.leased, cached, verified, live, held, complete, leased)
	}
	if tails != s.tails || unread != s.unread.Load() {
		t.Errorf("counted %d tails and %d bytes unread, are %d and %d", s.tails, s.unread.Load(), tails, unread)
	}
	if s.policy.Bytes() != live || s.policy.Len() != len(s.entries) {
		t.Errorf("policy has %d bytes of %d objects, store %d of %d", s.policy.Bytes(), s.policy.Len(), live, len(s.entries))
	}
	if s.live+s.heldBytes > s.cfg.CapacityBytes {
		t.Errorf("%d bytes are more than the capacity of %d", s.live+s.heldBytes, s.cfg.CapacityBytes)
	}
	if files := countFiles(t, s.dir.path()+"/objects"); files != len(s.entries) {
		t.Errorf("%d files of %d objects", files, len(s.entries))
	}
}

func countFiles(t testing.TB, dir string) (n int) {
	t.Helper()
	err := filepath.WalkDir(dir+"/", func(_ string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			n++
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return n
}

func TestPutIsReadBackByAllLeases(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 64<<20))
	o := obj("a", 2*chunk+777)
	f, g := lease(t, s, o), lease(t, s, o)
	if f.Fd() != g.Fd() {
		t.Errorf("two leases have descriptors %d and %d", f.Fd(), g.Fd())
	}
	if f.Has(1) {
		t.Error("a chunk of a new file is present")
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, object.ErrIncomplete) {
		t.Errorf("read of an absent chunk: %v", err)
	}
	put(t, f, 2, 0)
	wantChunk(t, g, 2)
	wantChunk(t, g, 0)
	if info := s.Peek(o.ID()); info != (Info{Exists: true, PresentBytes: chunk + 777}) {
		t.Errorf("peek: %+v", info)
	}
	put(t, g, 1)
	if !f.Complete() || !s.Peek(o.ID()).Complete {
		t.Error("not complete with all chunks")
	}
	all := make([]byte, o.Size+10)
	if n, err := f.ReadAt(all, 0); n != int(o.Size) || err != io.EOF {
		t.Errorf("read past the end: %d, %v", n, err)
	}
	if st := s.Stats(); st.CachedBytes != o.Size || st.CompleteObjects != 1 || st.DiskBytes != 2*chunk+4096 {
		t.Errorf("%+v", st)
	}
}

func TestRestartKeepsTheCache(t *testing.T) {
	dir := t.TempDir()
	o := obj("a", 3*chunk)
	s := open(t, testConfig(t, dir, 64<<20))
	f := lease(t, s, o)
	put(t, f, 0, 2)
	f.Close()
	id, key := s.UUID(), s.NodeKey()
	before := s.Stats()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, testConfig(t, dir, 64<<20))
	if s.UUID() != id || !bytes.Equal(s.NodeKey(), key) {
		t.Error("another identity after a restart")
	}
	if after := s.Stats(); after.CachedBytes != before.CachedBytes || after.DiskBytes != before.DiskBytes {
		t.Errorf("before %+v, after %+v", before, after)
	}
	f = lease(t, s, o)
	wantChunk(t, f, 0)
	wantChunk(t, f, 2)
	if f.Has(1) {
		t.Error("a chunk that was never put is present")
	}
}
