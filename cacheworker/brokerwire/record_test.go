package brokerwire

import (
	"errors"
	"os"
	"testing"

	"github.com/larderfs/larder/cacheworker/object"
)

func newRecord(t *testing.T, id string) *Record {
	t.Helper()
	r, err := NewRecord(State{Volume: Volume{ID: id}, Path: "/p"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestWhatIsUpdatedIsInTheFile(t *testing.T) {
	r := newRecord(t, "v")
	if err := r.Update(func(s *State) { s.Takeovers, s.Socket = 3, "u" }); err != nil {
		t.Fatal(err)
	}
	other, err := OpenRecord(r.File())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []State{r.State(), other.State()} {
		if s.Volume.ID != "v" || s.Takeovers != 3 || s.Socket != "u" {
			t.Errorf("%+v", s)
		}
	}
	if err := r.Update(func(s *State) { s.Volume.Attributes = string(make([]byte, slotSize)) }); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("too much: %v", err)
	}
	if s := r.State(); s.Volume.Attributes != "" || s.Takeovers != 3 {
		t.Errorf("after a failed update: %+v", s)
	}
}

// A worker that compacts its node table gives the broker another memfd, with whatever header.
func TestAReplacedFileGetsTheBrokersHeader(t *testing.T) {
	r, forged := newRecord(t, "v"), newRecord(t, "another")
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := r.Replace(null); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("no memfd: %v", err)
	}
	was := r.File()
	if err := r.Replace(forged.File()); err != nil {
		t.Fatal(err)
	}
	if s, err := ReadState(r.File()); err != nil || s.Volume.ID != "v" || r.File() != forged.File() {
		t.Errorf("the file says %+v, %v", s, err)
	}
	if _, err := was.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the old file: %v", err)
	}
}
