package cachestore

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

func TestAVictimGoesUnlessSomebodyOpensIt(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 64<<20))
	a, b := obj("a", 2*chunk), obj("b", chunk+5)
	fill(t, s, a, b)
	who := object.Principal{1}
	s.Grant(a, who, time.Now())
	s.Grant(a, object.Principal{2}, time.Now())
	s.Revoke(object.Principal{2}, a.Store)

	m := s.Victim()
	if m == nil || m.Object() != a {
		t.Fatalf("the victim is %v, want all of what is known of %v", m, a)
	}
	if g := m.Grants(); len(g) != 1 || g[0].Principal != who {
		t.Errorf("grants %v, want that of %v alone", g, who)
	}
	buf := make([]byte, chunk)
	for i := range a.Chunks() {
		if got, err := m.Chunk(i, buf); err != nil || string(got) != string(content(a, i)) {
			t.Errorf("chunk %d: %v", i, err)
		}
	}
	if other := s.Victim(); other == nil || other.Object() != b {
		t.Errorf("the next victim is %v, want %v", other, b)
	} else {
		other.Keep()
	}
	checkInvariants(t, s)
	f := lease(t, s, a)
	if !m.Wanted() || m.Drop() {
		t.Error("what somebody has opened goes")
	}
	wantChunk(t, f, 1)
	f.Close()
	for _, want := range []object.Object{b, a} {
		m := s.Victim()
		if m == nil || m.Object() != want || m.Wanted() || !m.Drop() {
			t.Errorf("%v does not go: %v", want, m)
		}
	}
	if st := s.Stats(); st.Objects != 0 || st.DiskBytes != 0 {
		t.Errorf("%+v", st)
	}
}

// What was in use while its victim was copied, however short, may have got more chunks than were copied.
func TestAVictimThatWasOpenedAndClosedStays(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 64<<20))
	o := obj("o", 3*chunk)
	f := lease(t, s, o)
	put(t, f, 0)
	f.Close()
	m := s.Victim()
	f = lease(t, s, o)
	put(t, f, 2)
	f.Close()
	if m.Drop() {
		t.Error("it goes, with a chunk that nobody has copied")
	}
	if in := s.Peek(o.ID()); in.PresentBytes != 2*chunk {
		t.Errorf("%+v", in)
	}
}

func TestABadChunkIsNotMoved(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 64<<20))
	o := obj("o", 2*chunk)
	fill(t, s, o)
	m := s.Copy(o.ID())
	defer m.Keep()
	if _, err := m.file.f.WriteAt([]byte("not what was there"), 77); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Chunk(0, make([]byte, chunk)); !errors.Is(err, object.ErrCorrupt) {
		t.Errorf("a chunk with other bytes: %v", err)
	}
	if _, err := m.Chunk(0, make([]byte, chunk)); !errors.Is(err, object.ErrIncomplete) {
		t.Errorf("once more: %v", err)
	}
	if _, err := m.Chunk(1, make([]byte, chunk)); err != nil {
		t.Error(err)
	}
}

// Each fetch of a file opens it, beside whoever reads it: that is one use.
func TestUsesAreCountedOnce(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 64<<20))
	o := obj("o", chunk)
	for n := range 4 {
		f := lease(t, s, o)
		put(t, f, 0)
		for range 5 {
			lease(t, s, o).Close()
		}
		if f.Close(); f.Asked() != uint8(n) {
			t.Errorf("asked for again %d times, want %d", f.Asked(), n)
		}
	}
	if n := s.Ask(o.ID()); n != 4 {
		t.Errorf("asked for again %d times, want 4", n)
	}
}

func TestPinnedObjectsStay(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 10*chunk)
	s := open(t, cfg)
	var pinned []object.Object
	for n := range 5 {
		o := obj(fmt.Sprint("pinned", n), chunk)
		fill(t, s, o)
		if err := s.Pin(o.ID()); err != nil {
			t.Fatal(err)
		}
		pinned = append(pinned, o)
	}
	one := obj("one more", 10)
	fill(t, s, one)
	if err := s.Pin(one.ID()); !errors.Is(err, object.ErrNoSpace) {
		t.Errorf("more than half is pinned: %v", err)
	}
	part := obj("part", 2*chunk)
	f := lease(t, s, part)
	put(t, f, 0)
	f.Close()
	for _, o := range []object.Object{part, obj("nowhere", 5)} {
		if err := s.Pin(o.ID()); !errors.Is(err, object.ErrIncomplete) {
			t.Errorf("pin %v: %v", o, err)
		}
	}
	washOut := func(s *Store, round int) {
		for n := range 20 {
			fill(t, s, obj(fmt.Sprint("scan", round, n), chunk))
		}
		checkInvariants(t, s)
	}
	all := func(s *Store, objects []object.Object) {
		t.Helper()
		for _, o := range objects {
			if !s.Peek(o.ID()).Complete {
				t.Errorf("%v has gone", o)
			}
		}
		if st := s.Stats(); st.PinnedObjects != len(objects) || st.PinnedBytes != int64(len(objects))*chunk {
			t.Errorf("%+v", st)
		}
	}
	washOut(s, 1)
	all(s, pinned)
	if m := s.Victim(); m == nil || s.Stats().PinnedObjects == 0 {
		t.Error("nobody else can go")
	} else {
		m.Keep()
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	washOut(s, 2)
	all(s, pinned)

	if !s.Evict(pinned[0].ID()) || !s.Unpin(pinned[1].ID()) || s.Unpin(pinned[1].ID()) {
		t.Error("it can be neither evicted by name nor unpinned")
	}
	for m := s.Victim(); m != nil; m = s.Victim() {
		m.Drop()
	}
	all(s, pinned[2:])
	if st := s.Stats(); st.Objects != 3 {
		t.Errorf("something stays without a pin: %+v", st)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	cfg.CapacityBytes = 5 * chunk // of which half are two
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	<-s.swept
	if st := s.Stats(); st.PinnedObjects != 2 {
		t.Errorf("%+v", st)
	}
}

func TestTheWorkersIdentityReplacesATiersOwn(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 64<<20)
	if _, err := ReadIdentity(cfg.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of an empty folder: %v", err)
	}
	open(t, cfg).Close()
	id := NewIdentity()
	cfg.Identity = &id
	s := open(t, cfg)
	if s.UUID() != id.UUID || string(s.NodeKey()) != string(id.NodeKey) {
		t.Errorf("%v is not %v", s.UUID(), id.UUID)
	}
	if kept, err := ReadIdentity(cfg.Dir); err != nil || kept.UUID != id.UUID || string(kept.NodeKey) != string(id.NodeKey) {
		t.Errorf("kept is %v, %v", kept, err)
	}
}
