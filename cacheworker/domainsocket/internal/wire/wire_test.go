package wire

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// PROTOCOL.md promises these numbers to programs in other languages.
func TestCodesAreWhatTheProtocolSays(t *testing.T) {
	for err, code := range map[error]Code{
		nil:                      0,
		errors.New("x"):          1,
		object.ErrNotFound:       2,
		object.ErrChanged:        3,
		object.ErrDenied:         4,
		object.ErrUnavailable:    5,
		object.ErrCorrupt:        5,
		context.DeadlineExceeded: 5,
		object.ErrInvalid:        6,
		ErrProtocol:              6,
		object.ErrBusy:           7,
		object.ErrNoSpace:        7,
		object.ErrIncomplete:     8,
		ErrVersion:               9,
		context.Canceled:         10,
	} {
		wrapped := err
		if err != nil {
			wrapped = fmt.Errorf("do it: %w", err)
		}
		if got := CodeOf(wrapped); got != code {
			t.Errorf("code of %v is %d, want %d", err, got, code)
		}
	}
}

func TestErrorsComeBackAsTheirSentinels(t *testing.T) {
	for _, err := range []error{
		object.ErrNotFound, object.ErrChanged, object.ErrDenied, object.ErrUnavailable, object.ErrInvalid,
		object.ErrBusy, object.ErrIncomplete, ErrVersion, context.Canceled,
	} {
		sent := fmt.Errorf("do it: %w", err)
		got := Error(CodeOf(sent), []byte(Text(sent)))
		if !errors.Is(got, err) || got.Error() != sent.Error() {
			t.Errorf("%q arrives as %q", sent, got)
		}
		if got := Error(CodeOf(err), nil); !errors.Is(got, err) {
			t.Errorf("%q without text arrives as %q", err, got)
		}
	}
	if err := Error(CodeOK, nil); err != nil {
		t.Error(err)
	}
	for _, code := range []Code{CodeInternal, 11, 65535} {
		err := Error(code, []byte("text \xff"+strings.Repeat("x", 5000)))
		if err == nil || len(err.Error()) > maxText || !strings.HasPrefix(err.Error(), "text x") {
			t.Errorf("code %d arrives as %q", code, err)
		}
		if Error(code, nil).Error() == "" {
			t.Errorf("code %d without text says nothing", code)
		}
	}
}

// The bytes of PROTOCOL.md, by hand.
func TestBytesAreWhatTheProtocolSays(t *testing.T) {
	entry, err := Entry{Name: "a", Size: 0x102, Version: "v1", ModTime: time.Unix(0, 5), CachedBytes: 3}.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := Opened{Lease: 7, Size: 1, Version: "e"}.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, got, want string }{
		{"client hello", string(ClientHello{1, 2}.Append(nil)), "LRDR\x00\x01\x00\x02"},
		{"server hello", string(ServerHello{1, 9, 2, 3, 4, 5}.Append(nil)), "LRDR\x00\x01\x00\x09\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00\x04\x00\x00\x00\x05"},
		{"frame", string(Finish(append(Frame(), 'x'), Header{Type: Read, Flags: 1, Code: 2, ID: 3})), "\x00\x00\x00\x01\x04\x01\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03x"},
		{"entry", string(entry), "\x00" + "\x00\x00\x00\x00\x00\x00\x01\x02" + "\x00\x00\x00\x00\x00\x00\x00\x05" + "\x00\x00\x00\x00\x00\x00\x00\x03" + "\x00\x01a" + "\x00\x02v1"},
		{"opened", string(opened), "\x00\x00\x00\x00\x00\x00\x00\x07" + "\x00\x00\x00\x00\x00\x00\x00\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00" + "\x00\x01e"},
		{"state", string(State{"v", "w", 1, 2, 3, 4}.Append(nil)), "\x00\x01v\x00\x01w" + "\x00\x00\x00\x00\x00\x00\x00\x01" + "\x00\x00\x00\x00\x00\x00\x00\x02" + "\x00\x00\x00\x03\x00\x00\x00\x04"},
	} {
		if c.got != c.want {
			t.Errorf("%s is %q, want %q", c.name, c.got, c.want)
		}
	}
	d := NewDecoder(append(entry, opened...))
	if e := d.Entry(); e.Name != "a" || e.Size != 0x102 || !e.ModTime.Equal(time.Unix(0, 5)) || e.CachedBytes != 3 || e.Version != "v1" {
		t.Errorf("entry %+v", e)
	}
	if o := d.Opened(); o.Lease != 7 || o.Size != 1 || !o.ModTime.IsZero() || o.Version != "e" {
		t.Errorf("opened %+v", o)
	}
	if err := d.End(); err != nil {
		t.Error(err)
	}
}

func TestWhatDoesNotFitIsNotSent(t *testing.T) {
	for name, e := range map[string]Entry{
		"slash":    {Name: "a/b"},
		"dots":     {Name: ".."},
		"long":     {Name: strings.Repeat("x", 256)},
		"version":  {Name: "a", Version: strings.Repeat("x", maxVersion+1)},
		"negative": {Name: "a", Size: -1},
	} {
		if b, err := e.Append(nil); err == nil || len(b) != 0 {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

// FuzzDecode decodes anything as everything; what is accepted can be encoded, and is safe to join.
func FuzzDecode(f *testing.F) {
	e, _ := Entry{Name: "a", Size: 1}.Append(nil)
	o, _ := Opened{Lease: 1, Version: "v"}.Append(nil)
	f.Add(e)
	f.Add(o)
	f.Add(State{Volume: "v"}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := NewDecoder(b)
		if e := d.Entry(); d.Err() == nil {
			if strings.ContainsAny(e.Name, "/\x00") || e.Name == ".." || e.Name == "." {
				t.Errorf("name %q", e.Name)
			}
			if _, err := e.Append(nil); err != nil {
				t.Errorf("%+v: %v", e, err)
			}
		}
		NewDecoder(b).Opened()
		NewDecoder(b).State()
		if p := NewDecoder(b).String(); CheckPath(p) == nil && strings.Contains("/"+p+"/", "/../") {
			t.Errorf("path %q", p)
		}
		ParseClientHello(b)
		ParseServerHello(b)
	})
}
