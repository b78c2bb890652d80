package brokerwire

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// initIn is a kernel's INIT that offers everything.
func initIn() []byte {
	return append(make([]byte, inFlags), bytes.Repeat([]byte{0xff}, initInSize-inFlags)...)
}

// initOut is an answer with flags.
func initOut(flags, flags2 uint32) []byte {
	return change(change(make([]byte, initOutSize), outFlags, flags), outFlags2, flags2)
}

func change(b []byte, off int, v uint32) []byte {
	b = bytes.Clone(b)
	b[off], b[off+1], b[off+2], b[off+3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
	return b
}

// interview asks as a broker does; worker answers.
func interview(t *testing.T, s State, worker func(init []byte) (answer []byte)) ([]byte, error) {
	t.Helper()
	i, err := s.Ask()
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	b := make([]byte, 4096)
	n, err := unix.Read(int(i.Theirs.Fd()), b)
	if err != nil {
		t.Fatal(err)
	}
	if a := worker(b[:n]); a != nil {
		if _, err := i.Theirs.Write(a); err != nil {
			t.Fatal(err)
		}
	}
	i.Theirs.Close()
	return i.Answer()
}

func TestTheFirstWorkerIsOfferedAllAndALaterOneWhatWasNegotiated(t *testing.T) {
	s := State{InitIn: initIn()}
	const flags, flags2 = initExt | 1<<3, resendFlag
	out, err := interview(t, s, func(init []byte) []byte {
		if !bytes.Equal(init, s.InitIn) {
			t.Errorf("the first worker is asked %x", init)
		}
		return initOut(flags, flags2)
	})
	if err != nil {
		t.Fatal(err)
	}
	s.InitOut = out
	if w := s.Without(); len(w) != 1 || w[0] != "passthrough" {
		t.Errorf("without %q", w)
	}
	if !s.Negotiated() || !s.CanResend() || s.CanPassthrough() {
		t.Errorf("negotiated %v, resend %v, passthrough %v", s.Negotiated(), s.CanResend(), s.CanPassthrough())
	}
	again, err := interview(t, s, func(init []byte) []byte {
		if u32(init, inFlags) != flags || u32(init, inFlags2) != flags2 {
			t.Errorf("a later worker is offered %#x, %#x", u32(init, inFlags), u32(init, inFlags2))
		}
		return out
	})
	if err != nil || !bytes.Equal(again, out) {
		t.Errorf("the same answer: %x, %v", again, err)
	}
	if _, err := interview(t, s, func([]byte) []byte { return initOut(flags, flags2|passthroughFlag) }); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("an answer with more: %v", err)
	}
	if _, err := interview(t, s, func([]byte) []byte { return nil }); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("no answer: %v", err)
	}
}

func TestLaterAnswersToInitMustAgree(t *testing.T) {
	first := make([]byte, initOutSize)
	first = change(first, outMaxWrite, 1<<20)
	for name, c := range map[string]struct {
		answer []byte
		says   string // "" for accepted
	}{
		"the same":              {first, ""},
		"larger requests":       {change(first, outMaxWrite, 2<<20), ""},
		"smaller requests":      {change(first, outMaxWrite, 1<<19), "fs.fuse.max_pages_limit"},
		"another minor version": {change(first, outMinor, 7), "minor version"},
		"other flags":           {change(first, outFlags, 1), "flags"},
		"other flags2":          {change(first, outFlags2, passthroughFlag), "flags2"},
		"another depth":         {change(first, outStackDepth, 2), "stack depth"},
		"an error":              {change(first, 4, 0xffffffea), "refused INIT"},
		"too short":             {first[:20], "refused INIT"},
	} {
		err := agree(first, c.answer)
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v; want %q", name, err, c.says)
		}
	}
}
