package cachestore

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/larderfs/larder/cacheworker/object"
)

// older names the objects of which something is older than an hour.
func older(t testing.TB, s *Store, objects ...object.Object) (keys []string) {
	t.Helper()
	ids, err := s.Older(t.Context(), func(object.Store) func([]byte) time.Time {
		return func(key []byte) time.Time {
			if string(key) == "exempt" {
				return time.Time{}
			}
			return time.Now().Add(-time.Hour)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		if slices.Contains(ids, o.ID()) {
			keys = append(keys, o.Key)
		}
	}
	return keys
}

// age has an object be cached since long ago.
func age(t testing.TB, s *Store, o object.Object) {
	t.Helper()
	e := s.entries[o.ID()]
	err := s.index.write(func(b *pebble.Batch) error {
		return b.Set(sinceKey(e.Key, e.nonce), encodeSince(time.Now().Add(-2*time.Hour)), nil)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestHowOldAnObjectIsOutlivesRestartsMovesAndTheObject(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 200*chunk)
	s := open(t, cfg)
	old, young, exempt, tailed, big := obj("old", 2*chunk), obj("young", chunk), obj("exempt", chunk), obj("tailed", 2*chunk), obj("big", (manyChunks+2)*chunk)
	everything := []object.Object{old, young, exempt, tailed, big}
	fill(t, s, old, young, exempt, tailed)
	f := lease(t, s, big)
	put(t, f, 3)
	f.Close()
	if got := older(t, s, everything...); len(got) > 0 {
		t.Errorf("%v are old from the start", got)
	}
	for _, o := range []object.Object{old, exempt, tailed, big} {
		age(t, s, o)
	}
	put(t, lease(t, s, big), 5) // what is added makes it no younger
	keepTail(t, s, tailed)
	if !s.Evict(tailed.ID()) || s.TailBytes(tailed.ID()) == 0 {
		t.Fatal("an object takes its tail along")
	}
	for range 2 {
		if got := older(t, s, everything...); !slices.Equal(got, []string{"old", "tailed", "big"}) {
			t.Errorf("%v are old", got)
		}
		s = reopen(t, s, cfg, "boot-2")
	}
	m := s.Copy(old.ID())
	if m == nil || time.Since(m.Since()) < time.Hour {
		t.Fatalf("what is moved is of %v", m)
	}
	other := open(t, testConfig(t, t.TempDir(), 64*chunk))
	fill(t, other, young)
	for _, o := range []object.Object{old, young} {
		f, err := other.Receive(o, 0, m.Since())
		if err != nil {
			t.Fatal(err)
		}
		putAll(t, f)
		f.Close()
	}
	m.Keep()
	if got := older(t, other, everything...); !slices.Equal(got, []string{"old", "young"}) {
		t.Errorf("%v are old where they were moved to", got)
	}
	ids, err := s.IDs(t.Context(), below("tailed"))
	if err != nil || !slices.Equal(ids, []object.ID{tailed.ID()}) || !s.EvictTail(tailed.ID()) || s.EvictTail(tailed.ID()) || s.TailBytes(tailed.ID()) != 0 {
		t.Errorf("the tail of %v: %v, %v", tailed.ID(), ids, err)
	}
}

// A release that did not note it has left files alone.
func TestWithoutARecordTheFilesOwnTimeCounts(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 64*chunk)
	s := open(t, cfg)
	a, b := obj("a", chunk), obj("b", chunk)
	fill(t, s, a, b)
	err := s.index.write(func(batch *pebble.Batch) error {
		for _, o := range []object.Object{a, b} {
			batch.Delete(sinceKey(o.ID(), s.entries[o.ID()].nonce), nil)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	then := time.Now().Add(-3 * time.Hour)
	if err := os.Chtimes(cfg.Dir+"/"+objectPath(a.ID(), s.entries[a.ID()].nonce), then, then); err != nil {
		t.Fatal(err)
	}
	if got := older(t, s, a, b); !slices.Equal(got, []string{"a"}) {
		t.Errorf("%v are old", got)
	}
}
