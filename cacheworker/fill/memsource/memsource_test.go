package memsource

import (
	"context"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/source/sourcetest"
)

func TestKeepsThePromisesOfASource(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T) sourcetest.Store {
		s := &Store{}
		stranger := s.Source("stranger")
		s.Before = func(_ context.Context, r Request) error {
			if r.Principal == stranger.Principal() {
				return object.ErrDenied
			}
			return nil
		}
		return sourcetest.Store{
			Open:   func(*testing.T) source.Source { return s.Source("alice") },
			Denied: func(*testing.T) source.Source { return stranger },
			Put:    func(_ *testing.T, key string, data []byte) { s.Put(key, data) },
			Delete: func(_ *testing.T, key string) { s.Delete(key) },
		}
	})
}

func TestRequestsAreTakenOnce(t *testing.T) {
	s := &Store{}
	s.Put("a", nil)
	if _, err := s.Source("x").Head(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if n := Count(s.Requests(), source.Head); n != 1 {
		t.Errorf("%d requests", n)
	}
	if n := len(s.Requests()); n != 0 {
		t.Errorf("%d requests again", n)
	}
}
