package cachestore

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/larderfs/larder/cacheworker/object"
)

func benchStore(b *testing.B) *Store {
	s, err := Open(Config{Dir: b.TempDir(), CapacityBytes: 4 << 30, Log: testConfig(b, "", 0).Log})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	return s
}

// BenchmarkPut1MiB is what a fill pays for each chunk, eviction included once the tier is full.
func BenchmarkPut1MiB(b *testing.B) {
	s := benchStore(b)
	data := make([]byte, chunk)
	b.SetBytes(chunk)
	n := 0
	var f *File
	for b.Loop() {
		if n%64 == 0 {
			if f != nil {
				f.Close()
			}
			var err error
			if f, err = s.Open(obj(fmt.Sprint(n), 64*chunk)); err != nil {
				b.Fatal(err)
			}
		}
		if err := f.Put(n%64, data); err != nil {
			b.Fatal(err)
		}
		n++
	}
	f.Close()
}

// BenchmarkPut4KiBObject is what a small file costs: a file, its records, its lease.
func BenchmarkPut4KiBObject(b *testing.B) {
	s := benchStore(b)
	data := make([]byte, 4096)
	n := 0
	for b.Loop() {
		f, err := s.Open(obj(fmt.Sprint(n), 4096))
		if err != nil {
			b.Fatal(err)
		}
		if err := f.Put(0, data); err != nil {
			b.Fatal(err)
		}
		f.Close()
		n++
	}
}

// BenchmarkReadAt4K is a copy out of the page cache through the store.
func BenchmarkReadAt4K(b *testing.B) {
	s := benchStore(b)
	f := lease(b, s, obj("a", 64*chunk))
	for i := range 64 {
		if err := f.Put(i, make([]byte, chunk)); err != nil {
			b.Fatal(err)
		}
	}
	p := make([]byte, 4096)
	b.SetBytes(4096)
	off := int64(0)
	for b.Loop() {
		if _, err := f.ReadAt(p, off); err != nil {
			b.Fatal(err)
		}
		off = (off + 7919*4096) % (64 * chunk)
	}
}

var manyObjects = flag.Int("objects", 20_000, "how many objects the index has in TestAStartWithManyObjects")

// indexMany makes a tier whose index has so many objects of one chunk, each granted to somebody. The last one has a file.
func indexMany(t testing.TB, objects int) (Config, object.Object) {
	cfg := testConfig(t, t.TempDir(), 1<<42)
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	<-s.swept // it would find files missing
	now := binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano()))
	for n := 0; n < objects; n += 1000 {
		err := s.index.write(func(batch *pebble.Batch) error {
			var err error
			for i := n; i < min(n+1000, objects); i++ {
				o := obj(fmt.Sprint(i), 100)
				id, nonce := o.ID(), uint64(i)
				err = errors.Join(err, batch.Set(objectKey(id, nonce), encodeObject(o, false), nil),
					batch.Set(chunkKey(id, nonce, 0), encodeChunk(1, s.epoch), nil), batch.Set(grantKey(id, nonce, principal(1)), now, nil))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	last := obj("last", 100)
	fill(t, s, last)
	s.Grant(last, principal(1), time.Now())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return cfg, last
}

// TestAStartWithManyObjects prints what each of them costs in memory, and when the first answer comes: before the index
// is read. With -objects=1000000 these are the figures of a large node.
func TestAStartWithManyObjects(t *testing.T) {
	cfg, asked := indexMany(t, *manyObjects)
	s, err := prepare(cfg)
	if err != nil {
		t.Fatal(err)
	}
	before := heapBytes() // without pebble's own
	if !s.Peek(asked.ID()).Complete || !s.Granted(asked.ID(), principal(1)) || len(s.entries) != 1 {
		t.Error("the first answer is wrong, or took more than its own records")
	}
	if err := s.loadAll(t.Context()); err != nil || s.Stats().Objects != *manyObjects+1 {
		t.Fatalf("%+v: %v", s.Stats(), err)
	}
	each := (heapBytes() - before) / uint64(*manyObjects)
	s.quit = func() {} // there is no janitor, which would look for files
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	began := time.Now()
	if s, err = Open(cfg); err != nil {
		t.Fatal(err)
	}
	f := lease(t, s, asked)
	wantChunk(t, f, 0)
	first := time.Since(began)
	<-s.load.done
	all := time.Since(began)
	f.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d objects: %d bytes of memory for each; first byte %v after the start, all of the index read after %v", *manyObjects, each, first, all)
	if each > 500 {
		t.Errorf("%d bytes for each object", each)
	}
	if *manyObjects >= 1_000_000 && first > all/2 {
		t.Errorf("the first byte came after %v, all of the index was read after %v", first, all)
	}
}

func heapBytes() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestAnObjectTakesLessThan500BytesOfMemory counts what the tables hold of objects at rest.
func TestAnObjectTakesLessThan500BytesOfMemory(t *testing.T) {
	const objects = 100_000
	s := open(t, testConfig(t, t.TempDir(), 1<<40))
	name := object.Store("s3://host/bucket")
	before := heapBytes()
	s.mu.Lock()
	for n := range objects {
		o := object.Object{Store: "s3://host/bucket", Key: fmt.Sprint(n), Version: "v", Size: 40 * chunk}
		e := newEntry(o.ID(), newNonce(), o.Size)
		e.store = s.storeID(name)
		e.setPresent(0)
		e.setVerified(0)
		s.entries[e.Key] = e
		s.restore(e)
		s.setGrant(e, principal(1), 1)
		s.setGrant(e, principal(2), 1)
	}
	s.mu.Unlock()
	each := (heapBytes() - before) / objects
	t.Logf("%d bytes for each of %d objects", each, objects)
	if each > 500 {
		t.Errorf("%d bytes for each object", each)
	}
	s.mu.Lock()
	for id, e := range s.entries { // they have no files: the checks of other tests are not for them
		s.policy.Remove(&e.Node)
		delete(s.entries, id)
	}
	s.cached, s.verified, s.live = 0, 0, 0
	s.mu.Unlock()
}
