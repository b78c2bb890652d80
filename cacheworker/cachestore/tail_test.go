package cachestore

import (
	"bytes"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

const tailBytes = 64 << 10

func keepTail(t testing.TB, s *Store, o object.Object) {
	t.Helper()
	last := content(o, o.Chunks()-1)
	if err := s.KeepTail(o, last[len(last)-tailBytes:]); err != nil {
		t.Fatal(err)
	}
}

// hasTail reads a piece of the tail.
func hasTail(t testing.TB, s *Store, o object.Object) bool {
	t.Helper()
	p := make([]byte, 1000)
	if !s.ReadTail(o, p, o.Size-3000) {
		return false
	}
	last := content(o, o.Chunks()-1)
	if !bytes.Equal(p, last[len(last)-3000:][:1000]) {
		t.Errorf("wrong bytes in the tail of %v", o)
	}
	return true
}

func scan(t testing.TB, s *Store, name string) {
	t.Helper()
	for i := range 20 {
		fill(t, s, obj(fmt.Sprint(name, i), 4*chunk))
	}
}

// TestATailOutlivesItsObject has scans wash the object out, before and after a restart.
func TestATailOutlivesItsObject(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 32*chunk)
	s := open(t, cfg)
	o := obj("a", 4*chunk)
	alice, bob := principal(1), principal(2)
	f := lease(t, s, o)
	putAll(t, f)
	s.Grant(o, alice, time.Now())
	keepTail(t, s, o)
	s.Grant(o, bob, time.Now())
	f.Close()
	if st := s.Stats(); st.Objects != 1 || st.CompleteObjects != 1 || st.CachedBytes != o.Size+tailBytes {
		t.Errorf("an object with a tail: %+v", st)
	}
	for _, off := range []int64{o.Size - tailBytes - 1, o.Size - 999} {
		if s.ReadTail(o, make([]byte, 1000), off) {
			t.Errorf("1000 bytes at %d were read from a tail that does not have them", off)
		}
	}
	for i := range 2 {
		scan(t, s, fmt.Sprint("scan", i))
		if s.Peek(o.ID()).Exists {
			t.Fatal("the scan is too short")
		}
		if !hasTail(t, s, o) || !s.Granted(o.ID(), alice) || !s.Granted(o.ID(), bob) || s.TailBytes(o.ID()) != tailBytes {
			t.Errorf("after scan %d: tail %v, grants %v %v", i, hasTail(t, s, o), s.Granted(o.ID(), alice), s.Granted(o.ID(), bob))
		}
		s = reopen(t, s, cfg, "boot-1")
		<-s.load.done
	}
	s.Revoke(alice, o.Store)
	if s.Granted(o.ID(), alice) {
		t.Error("a grant of a tail outlives a revocation")
	}
}

func TestADamagedTailIsNotRead(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 32*chunk)
	s := open(t, cfg)
	o := obj("a", 2*chunk)
	keepTail(t, s, o)
	e := s.entries[tailID(o.ID())]
	name := cfg.Dir + "/" + objectPath(e.Key, e.nonce)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[7] ^= 1
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
	cfg.BootID = "boot-2"
	s = openUnscrubbed(t, cfg)
	if s.ReadTail(o, make([]byte, 10), o.Size-tailBytes) || s.TailBytes(o.ID()) != 0 {
		t.Error("bytes of a damaged tail were read")
	}
	keepTail(t, s, o)
	if !hasTail(t, s, o) {
		t.Error("a damaged tail is not replaced")
	}
}

// TestTailsAreBounded keeps more of them than their share allows in a full cache.
func TestTailsAreBounded(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 32*chunk))
	var objects []object.Object
	for i := range 40 {
		objects = append(objects, obj(fmt.Sprint("t", i), 2*chunk))
		keepTail(t, s, objects[i])
	}
	scan(t, s, "scan")
	kept := 0
	for _, o := range objects {
		if hasTail(t, s, o) {
			kept++
		}
	}
	if share := 32 * chunk / 100 * 2 / tailBytes; kept != share {
		t.Errorf("%d tails are kept; the share is %d", kept, share)
	}
	if !hasTail(t, s, objects[39]) {
		t.Error("the youngest tail is gone")
	}
}
