package brokerwire

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

func testState(path string) State {
	return State{Volume: Volume{ID: "v", Source: "s3://b", Credentials: Credentials{"id", "secret", "token"}}, Path: path, Dev: 42,
		Since: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), InitIn: []byte{1, 0, 255}, InitOut: []byte{2}, Socket: "s", Takeovers: 3, LongestStall: time.Second}
}

func newState(t *testing.T, s State) *os.File {
	t.Helper()
	f, err := NewState(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func mustRead(t *testing.T, f *os.File) State {
	t.Helper()
	s, err := ReadState(f)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStateComesBackAsItWasWritten(t *testing.T) {
	want := testState("/a")
	f := newState(t, want)
	for i := range 5 {
		if got := mustRead(t, f); !reflect.DeepEqual(got, want) {
			t.Fatalf("write %d: got %+v, want %+v", i, got, want)
		}
		want.Takeovers++
		want.Volume.Credentials.SessionToken = fmt.Sprint("token", i)
		if err := WriteState(f, want); err != nil {
			t.Fatal(err)
		}
	}
}

// A SIGKILL in the middle of a write leaves a slot of which any part is the old one.
func TestATornWriteLeavesTheOlderState(t *testing.T) {
	for name, damage := range map[string]func(slot []byte){
		"no magic":            func(b []byte) { clear(b[:8]) },
		"another generation":  func(b []byte) { b[8] ^= 0x40 },
		"a length too large":  func(b []byte) { copy(b[16:], "\xff\xff\xff\xff") },
		"a length too small":  func(b []byte) { b[16]-- },
		"another sum":         func(b []byte) { b[20] ^= 1 },
		"half of the body":    func(b []byte) { clear(b[slotHead+20:]) },
		"one bit of the body": func(b []byte) { b[slotHead+5] ^= 1 },
		"nothing but a head":  func(b []byte) { clear(b[slotHead:]) },
		"nothing":             func(b []byte) { clear(b) },
	} {
		for writes := 1; writes <= 2; writes++ { // so that each slot is the one that is torn
			t.Run(fmt.Sprint(name, " ", writes), func(t *testing.T) {
				f := newState(t, testState("/0"))
				for i := range writes {
					if err := WriteState(f, testState(fmt.Sprint("/", i+1))); err != nil {
						t.Fatal(err)
					}
				}
				tear(t, f, damage)
				if got := mustRead(t, f); got.Path != fmt.Sprint("/", writes-1) {
					t.Fatalf("path %s, want the older state", got.Path)
				}
				// The next write must not go to the only whole slot: it may be torn too.
				if err := WriteState(f, testState("/next")); err != nil {
					t.Fatal(err)
				}
				if got := mustRead(t, f); got.Path != "/next" {
					t.Fatalf("path %s, want the state written last", got.Path)
				}
				tear(t, f, damage)
				if got := mustRead(t, f); got.Path != fmt.Sprint("/", writes-1) {
					t.Fatalf("path %s after two torn writes, want the oldest", got.Path)
				}
			})
		}
	}
}

// tear damages the slot with the newest whole state.
func tear(t *testing.T, f *os.File, damage func([]byte)) {
	t.Helper()
	_, slot, err := newestSlot(f)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, slotSize)
	if _, err := f.ReadAt(b, int64(slot)*slotSize); err != nil {
		t.Fatal(err)
	}
	damage(b)
	if _, err := f.WriteAt(b, int64(slot)*slotSize); err != nil {
		t.Fatal(err)
	}
}

func TestBothSlotsTornIsAnError(t *testing.T) {
	f := newState(t, testState("/a"))
	if _, err := f.WriteAt(make([]byte, StateLog), 0); err != nil {
		t.Fatal(err)
	}
	if s, err := ReadState(f); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("got %+v, %v", s, err)
	}
}

func TestWritingAStateLeavesTheLogAlone(t *testing.T) {
	f := newState(t, testState("/a"))
	want := []byte("the node table")
	if _, err := f.WriteAt(want, StateLog); err != nil {
		t.Fatal(err)
	}
	large := testState("/b")
	large.InitIn = bytes.Repeat([]byte{7}, 64<<10)
	for range 2 {
		if err := WriteState(f, large); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, StateLog); err != nil || !bytes.Equal(got, want) {
		t.Errorf("log is %q, %v", got, err)
	}
	if s := mustRead(t, f); !reflect.DeepEqual(s, large) {
		t.Error("a large state did not come back")
	}
}

func TestAStateTooLargeForItsSlotIsRefused(t *testing.T) {
	f := newState(t, testState("/a"))
	large := testState("/b")
	large.Volume.Source = strings.Repeat("x", slotSize)
	if err := WriteState(f, large); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("written: %v", err)
	}
	if s := mustRead(t, f); s.Path != "/a" {
		t.Errorf("the state is now of %s", s.Path)
	}
}

func TestOnlyASealedMemfdIsAState(t *testing.T) {
	whole := newState(t, testState("/a"))
	b := make([]byte, StateLog)
	if _, err := whole.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for name, f := range map[string]*os.File{
		"a file":            file,
		"an unsealed one":   memfd(t, b, unix.MFD_ALLOW_SEALING),
		"an unsealable one": memfd(t, b, 0),
	} {
		if s, err := ReadState(f); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	if err := whole.Truncate(0); err == nil {
		t.Error("a state can be truncated")
	}
	if _, err := unix.FcntlInt(whole.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err == nil {
		t.Error("a state can be sealed against its writers")
	}
}

func memfd(t *testing.T, b []byte, flags int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|flags)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	return f
}

// FuzzDecodeSlot holds that what a slot says is either refused or a state with a path and a volume.
func FuzzDecodeSlot(f *testing.F) {
	fd, err := NewState(testState("/a"))
	if err != nil {
		f.Fatal(err)
	}
	defer fd.Close()
	b := make([]byte, slotSize)
	if _, err := fd.ReadAt(b, 0); err != nil {
		f.Fatal(err)
	}
	if _, err := DecodeSlot(b); err != nil { // NewState writes the other one first
		if _, err := fd.ReadAt(b, slotSize); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(bytes.TrimRight(b, "\x00"))
	f.Add(b[:slotHead])
	f.Add([]byte(magic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := DecodeSlot(b)
		if err != nil {
			if !errors.Is(err, object.ErrInvalid) {
				t.Fatalf("error %v is not ErrInvalid", err)
			}
			return
		}
		if !strings.HasPrefix(s.Path, "/") || s.Volume.ID == "" {
			t.Fatalf("accepted %+v", s)
		}
	})
}
