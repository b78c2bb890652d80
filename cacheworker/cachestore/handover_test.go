package cachestore

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// A store that was handed over reads what it has, also what it had not open, and changes
// nothing; the next one finds all of it, and may evict it under the first one's hands.
func TestAStoreThatWasHandedOverGoesOnReading(t *testing.T) {
	cfg, _ := viewConfig(t, 64<<20)
	first := open(t, cfg)
	a, b, part := obj("a", 2*chunk), obj("b", 2*chunk), obj("part", 2*chunk)
	fill(t, first, a, b)
	put(t, lease(t, first, part), 0)
	leased, who := lease(t, first, a), object.Principal{1}
	first.Grant(a, who, time.Now())

	if err := first.HandOver(); err != nil {
		t.Fatal(err)
	}
	second := open(t, cfg) // the lock is free
	for _, o := range []object.Object{a, b} {
		f := lease(t, first, o)
		wantChunk(t, f, 0)
		wantChunk(t, f, 1)
		v, err := f.View()
		if err != nil {
			t.Fatalf("view of %v: %v", o, err)
		}
		v.Close()
	}
	if err := lease(t, first, part).Put(1, content(part, 1)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("Put: %v, want ErrNoSpace", err)
	}
	if _, err := first.Open(obj("other", 100)); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("Open of what is not there: %v, want ErrNoSpace", err)
	}
	if first.Evict(b.ID()) {
		t.Error("the first store evicts")
	}
	if first.Grant(b, who, time.Now()); !first.Granted(b.ID(), who) {
		t.Error("a grant is forgotten at once")
	}

	if s := second.Stats(); s.Objects != 3 || s.CompleteObjects != 2 || !second.Granted(a.ID(), who) {
		t.Errorf("the second store has %+v", s)
	}
	second.Evict(a.ID())
	second.Evict(b.ID())
	wantChunk(t, leased, 1)
	if err := first.Close(); err != nil {
		t.Error(err)
	}
}

// What the next store has evicted is a miss in one that was handed over, and not made again.
func TestAfterTheHandOverFilesMayGo(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 64<<20)
	first := open(t, cfg)
	o := obj("o", chunk)
	fill(t, first, o)
	if err := first.HandOver(); err != nil {
		t.Fatal(err)
	}
	second := open(t, cfg)
	second.Evict(o.ID())
	if _, err := first.Open(o); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("Open: %v, want ErrNoSpace", err)
	}
	if n := countFiles(t, cfg.Dir+"/objects"); n != 0 {
		t.Errorf("%d cache files", n)
	}
}

// What is being put when the directory is handed over is whole in the index or not there at
// all: the next store has what was announced, and nothing else.
func TestHandOverWaitsForPuts(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 256<<20)
	first := open(t, cfg)
	o := obj("o", 100*chunk)
	for i := range o.Chunks() {
		content(o, i) // beforehand
	}
	f := lease(t, first, o)
	stored := make([]bool, o.Chunks())
	var putting sync.WaitGroup
	tried := make(chan struct{}, o.Chunks())
	for w := range 4 {
		putting.Go(func() {
			for i := w; i < o.Chunks(); i += 4 {
				err := f.Put(i, content(o, i))
				if stored[i] = err == nil; err != nil && !errors.Is(err, object.ErrNoSpace) {
					t.Error(err)
				}
				tried <- struct{}{}
			}
		})
	}
	for range 20 {
		<-tried
	}
	if err := first.HandOver(); err != nil {
		t.Fatal(err)
	}
	second := open(t, cfg)
	putting.Wait()
	g := lease(t, second, o)
	for i, ok := range stored {
		if g.Has(i) != ok {
			t.Errorf("chunk %d: the first store said %v, the second has it: %v", i, ok, g.Has(i))
		}
	}
}

// Whoever waits for the directory asks its owner, again if that one cannot hand it over yet.
func TestTheOwnerIsAsked(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t, t.TempDir(), 64<<20)
	first := open(t, cfg)
	asked := 0
	cfg.AskOwner = func() {
		if asked++; asked < 2 {
			return
		}
		if err := first.HandOver(); err != nil {
			t.Error(err)
		}
	}
	open(t, cfg)
	if asked != 2 {
		t.Errorf("asked %d times", asked)
	}
}

// A worker in reserve has the directory as soon as nobody else has it, and can be called off.
func TestWhoAwaitsTheDirectoryGetsIt(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 64<<20)
	first := open(t, cfg)
	fill(t, first, obj("a", chunk))
	ctx, cancel := context.WithCancel(t.Context())
	called := make(chan error, 1)
	go func() { _, err := Await(ctx, cfg.Dir); called <- err }()
	cancel()
	if err := <-called; !errors.Is(err, context.Canceled) {
		t.Errorf("called off: %v", err)
	}
	locked := make(chan *os.File, 1)
	go func() {
		f, err := Await(t.Context(), cfg.Dir)
		if err != nil {
			t.Error(err)
		}
		locked <- f
	}()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	late := cfg
	cfg.Lock = <-locked
	second := open(t, cfg)
	wantChunk(t, lease(t, second, obj("a", chunk)), 0)
	late.LockWait = 50 * time.Millisecond
	if _, err := Open(late); err == nil {
		t.Error("two stores have the directory")
	}
}
