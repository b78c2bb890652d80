package memsource

import (
	"testing"
)

func TestRequestsAreTakenOnce(t *testing.T) {
	s := &Store{}
	s.Put("a", nil)
	s.Source("x").Head(t.Context(), "a")
	if n := len(s.Requests()); n != 1 {
		t.Errorf("%d requests", n)
	}
	if n := len(s.Requests()); n != 0 {
		t.Errorf("%d requests again", n)
	}
}
