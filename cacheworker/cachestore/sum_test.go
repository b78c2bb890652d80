package cachestore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/larderfs/larder/cacheworker/object"
)

// below wants the keys with a prefix in every store.
func below(prefix string) func(object.Store) func([]byte) bool {
	return func(object.Store) func([]byte) bool {
		return func(key []byte) bool { return bytes.HasPrefix(key, []byte(prefix)) }
	}
}

func all(object.ID) bool { return true }

func sum(t testing.TB, s *Store, want func(object.Store) func([]byte) bool) Sum {
	t.Helper()
	got, err := s.Sum(t.Context(), want, all)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestSumCountsWhatIsPresentBelowAPrefix(t *testing.T) {
	cfg := testConfig(t, t.TempDir(), 200*chunk)
	s := open(t, cfg)
	put(t, lease(t, s, obj("a/1", 2*chunk)), 0, 1)
	put(t, lease(t, s, obj("a/2", 2*chunk+5)), 2) // the short one only
	put(t, lease(t, s, obj("a/big", (manyChunks+2)*chunk)), 7, 9)
	put(t, lease(t, s, obj("b/1", chunk)), 0)
	elsewhere := obj("a/1", chunk)
	elsewhere.Store = "s3://other/bucket"
	put(t, lease(t, s, elsewhere), 0)
	lease(t, s, obj("a/empty", chunk)) // nothing is present

	for _, c := range []struct {
		what string
		want func(object.Store) func([]byte) bool
		sum  Sum
	}{
		{"a/", below("a/"), Sum{Objects: 4, CompleteObjects: 2, PresentBytes: 5*chunk + 5, Stores: 2}},
		{"all", below(""), Sum{Objects: 5, CompleteObjects: 3, PresentBytes: 6*chunk + 5, Stores: 2}},
		{"none", below("c"), Sum{Stores: 2}},
		{"one store", func(o object.Store) func([]byte) bool {
			if o != elsewhere.Store {
				return nil
			}
			return below("")(o)
		}, Sum{Objects: 1, CompleteObjects: 1, PresentBytes: chunk, Stores: 1}},
	} {
		if got := sum(t, s, c.want); got != c.sum {
			t.Errorf("%s: %+v; want %+v", c.what, got, c.sum)
		}
	}

	again := reopen(t, s, cfg, "boot-2") // present, to be verified
	if got, want := sum(t, again, below("b/")), (Sum{Objects: 1, PresentBytes: chunk, Stores: 2}); got != want {
		t.Errorf("after a boot: %+v; want %+v", got, want)
	}
}

func TestSumForgetsWhatIsEvicted(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 8*chunk))
	for i := range 40 {
		f, err := s.Open(obj(fmt.Sprintf("a/%d", i), chunk))
		if err != nil {
			t.Fatal(err)
		}
		put(t, f, 0)
		f.Close()
	}
	st := s.Stats()
	if got := sum(t, s, below("a/")); got.Objects != int64(st.Objects) || got.PresentBytes != st.CachedBytes || st.Evictions == 0 {
		t.Errorf("%+v; the store has %+v", got, st)
	}
}

func TestSumEndsWithItsContextAndWithTheIndex(t *testing.T) {
	s := open(t, testConfig(t, t.TempDir(), 8*chunk))
	put(t, lease(t, s, obj("a", chunk)), 0)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Sum(over, below(""), all); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over: %v", err)
	}
	if err := s.HandOver(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sum(t.Context(), below(""), all); !errors.Is(err, errIndex) {
		t.Errorf("without an index: %v", err)
	}
}

// BenchmarkSumOfAMillionChunks is what a `larder locate` costs a worker: 50 000 objects of
// which each has 20 chunks.
func BenchmarkSumOfAMillionChunks(b *testing.B) {
	const objects, chunks = 50_000, 20
	s := benchStore(b)
	now := time.Now()
	for n := 0; n < objects; {
		err := s.index.write(func(batch *pebble.Batch) error {
			for end := n + 500; n < end; n++ {
				o := obj(fmt.Sprintf("warehouse/table/day=%d/part-%05d.parquet", n%365, n), chunks*chunk)
				id := o.ID()
				batch.Set(objectKey(id, 1), encodeObject(o, false), nil)
				for i := range chunks {
					batch.Set(chunkKey(id, 1, i), encodeChunk(uint64(n), 1), nil)
				}
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	b.Logf("written in %v", time.Since(now))
	seen := 0
	for b.Loop() {
		seen = 0
		_, err := s.Sum(b.Context(), func(object.Store) func([]byte) bool {
			return func(key []byte) bool { seen++; return bytes.HasPrefix(key, []byte("warehouse/table/day=7/")) }
		}, all)
		if err != nil {
			b.Fatal(err)
		}
	}
	if seen != objects {
		b.Fatalf("saw %d objects", seen)
	}
}
