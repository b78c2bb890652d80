package cachestore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/larderfs/larder/cacheworker/object"
)

// unread opens a store whose index is not being read yet; start has it read.
func unread(t testing.TB, cfg Config) (s *Store, start func()) {
	t.Helper()
	s, err := prepare(cfg)
	if err != nil {
		t.Fatal(err)
	}
	start = sync.OnceFunc(func() {
		s.start()
		<-s.swept
	})
	t.Cleanup(func() {
		start()
		checkInvariants(t, s)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, start
}

func TestTheFirstAnswersAreRightBeforeTheIndexIsRead(t *testing.T) {
	cfg, _ := viewConfig(t, 64*chunk)
	s := open(t, cfg)
	whole, other, part, empty, none := obj("whole", 2*chunk), obj("other", chunk), obj("part", 3*chunk), obj("empty", 0), obj("none", chunk)
	fill(t, s, whole, other, empty)
	f := lease(t, s, part)
	put(t, f, 1)
	f.Close()
	s.Grant(whole, principal(1), time.Now())
	want := map[string]Info{}
	objects := []object.Object{whole, other, part, empty, none}
	for _, o := range objects {
		want[o.Key] = s.Peek(o.ID())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s, start := unread(t, cfg)
	for _, o := range objects {
		if got := s.Peek(o.ID()); got != want[o.Key] {
			t.Errorf("%s: %+v, want %+v", o.Key, got, want[o.Key])
		}
	}
	f = lease(t, s, whole)
	wantChunk(t, f, 1)
	v, err := f.View()
	if err != nil {
		t.Fatal(err)
	}
	v.Close()
	if !s.Granted(whole.ID(), principal(1)) || s.Granted(other.ID(), principal(1)) {
		t.Error("grants are others")
	}
	if !s.Evict(other.ID()) || s.Evict(none.ID()) {
		t.Error("evicted something else")
	}
	g := lease(t, s, part)
	written := make(chan error, 1)
	go func() { written <- g.Put(0, content(part, 0)) }() // nobody knows yet how full the tier is
	start()
	if err := <-written; err != nil {
		t.Error(err)
	}
	wantChunk(t, g, 0)
	wantChunk(t, g, 1)
	if st := s.Stats(); st.Objects != 3 || s.Peek(other.ID()).Exists {
		t.Errorf("%+v", st)
	}
}

// TestAllIsKnownHoweverItIsAskedFor: evicted, made anew, opened and looked at while the index is read.
func TestAllIsKnownHoweverItIsAskedFor(t *testing.T) {
	const objects = 2000
	cfg := testConfig(t, t.TempDir(), 1<<30)
	s := open(t, cfg)
	for n := range objects {
		f, err := s.Open(obj(fmt.Sprint(n), 10))
		if err != nil {
			t.Fatal(err)
		}
		if n%3 != 0 { // else not cached
			put(t, f, 0)
		}
		f.Close()
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s, start := unread(t, cfg)
		var wg sync.WaitGroup
		evicted := make([]bool, objects) // each object is one goroutine's
		for w := range 4 {
			wg.Go(func() {
				for range objects {
					n := rand.IntN(objects/4)*4 + w
					o := obj(fmt.Sprint(n), 10)
					cached := n%3 != 0 && !evicted[n]
					switch rand.IntN(4) {
					case 0:
						if s.Evict(o.ID()) != cached {
							t.Errorf("%d: evicted, or not, but cached: %v", n, cached)
						}
						evicted[n] = true
					case 1:
						f, err := s.Open(o)
						if err != nil {
							t.Error(err)
							continue
						}
						if f.Has(0) != cached {
							t.Errorf("%d: has its chunk: %v, cached: %v", n, f.Has(0), cached)
						}
						f.Close()
					default:
						if s.Peek(o.ID()).Complete != cached {
							t.Errorf("%d: complete: %v, cached: %v", n, s.Peek(o.ID()).Complete, cached)
						}
					}
				}
			})
		}
		start()
		wg.Wait()
		for n := range objects {
			if got, want := s.Peek(obj(fmt.Sprint(n), 10).ID()).Complete, n%3 != 0 && !evicted[n]; got != want {
				t.Errorf("%d: complete %v, want %v", n, got, want)
			}
		}
		checkInvariants(t, s)
		for n := range objects { // for the next round
			if n%3 != 0 && evicted[n] {
				f := lease(t, s, obj(fmt.Sprint(n), 10))
				put(t, f, 0)
				f.Close()
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
}

// TestAnIndexThatCannotBeReadToItsEndGoes: nothing is put then, and the next start is empty.
func TestAnIndexThatCannotBeReadToItsEndGoes(t *testing.T) {
	var log logCounter
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	s := open(t, cfg)
	o := obj("a", 2*chunk)
	fill(t, s, o)
	err := s.index.write(func(b *pebble.Batch) error { // so that a table has many blocks
		var err error
		for n := range 5000 {
			o := obj(fmt.Sprint("more", n), chunk)
			err = errors.Join(err, b.Set(objectKey(o.ID(), uint64(n)), encodeObject(o, false), nil))
		}
		return err
	})
	if err := errors.Join(err, s.index.db.Flush(), s.Close()); err != nil {
		t.Fatal(err)
	}
	cfg.Log = log.logger(t)
	s, err = prepare(cfg)
	if err != nil {
		t.Fatal(err)
	}
	damageMiddle(t, cfg.Dir+"/"+indexName+"/db", "*.sst")
	s.start()
	<-s.swept
	if f := lease(t, s, o); f.Has(0) {
		wantChunk(t, f, 0)
	}
	fresh := obj("fresh", chunk)
	if err := lease(t, s, fresh).Put(0, content(fresh, 0)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("Put: %v, want ErrNoSpace", err)
	}
	if err := s.Close(); err == nil {
		t.Error("closed without an error")
	}
	if log.errors.Load() == 0 {
		t.Error("nothing logged")
	}
	s = open(t, cfg)
	if n := countFiles(t, cfg.Dir+"/objects"); n != 0 {
		t.Errorf("%d files", n)
	}
	fill(t, s, o)
	s = reopen(t, s, cfg, "boot-1")
	wantChunk(t, lease(t, s, o), 1)
}

// damageMiddle leaves the ends of files as they are.
func damageMiddle(t *testing.T, dir, pattern string) {
	for _, name := range glob(t, dir, pattern) {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		st, err := f.Stat()
		if err == nil {
			_, err = f.WriteAt(make([]byte, st.Size()/2), st.Size()/4)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
}
