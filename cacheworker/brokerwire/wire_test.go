package brokerwire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

func TestDecodeRejectsWhatNoPeerMaySend(t *testing.T) {
	long := strings.Repeat("a", 4097)
	for name, in := range map[string]string{
		"nothing":            ``,
		"no json":            `hello`,
		"another type":       `["mount"]`,
		"cut short":          `{"id":1,"verb":"mount"`,
		"two values":         `{"id":1}{"id":2}`,
		"negative id":        `{"id":-1}`,
		"backing too large":  `{"id":1,"backing":4294967296}`,
		"path not absolute":  `{"id":1,"path":"a/b"}`,
		"path with dots":     `{"id":1,"path":"/a/../b"}`,
		"path with a dot":    `{"id":1,"path":"/a/./b"}`,
		"path with //":       `{"id":1,"path":"/a//b"}`,
		"path ending in /":   `{"id":1,"path":"/a/"}`,
		"target not clean":   `{"id":1,"target":"/a/.."}`,
		"NUL in a path":      `{"id":1,"path":"/a\u0000b"}`,
		"NUL in a volume id": `{"id":1,"mount":"a\u0000b"}`,
		"over-long path":     `{"id":1,"path":"/` + long + `"}`,
		"over-long volume":   `{"id":1,"mount":"` + long + `"}`,
		"uuid with a slash":  `{"id":1,"uuid":"../x"}`,
		"over-long uuid":     `{"id":1,"uuid":"` + strings.Repeat("0", 65) + `"}`,
		"sub of one's own":   `{"id":1,"sub":"domain"}`,
		"sub with dots":      `{"id":1,"sub":"data/.."}`,
		"lone credentials":   `{"id":1,"credentials":{"accessKeyID":"a"}}`,
	} {
		if m, err := Decode([]byte(in)); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("%s: %+v, %v; want ErrInvalid", name, m, err)
		}
	}
}

// A newer peer says more than this one knows.
func TestUnknownFieldsAreIgnored(t *testing.T) {
	m, err := Decode([]byte(`{"id":1,"verb":"mount","path":"/a","new":{"x":[7]},"volume":{"id":"v","new":true},"list":[{"volumeID":"w","new":null}]}`))
	if err != nil || m.ID != 1 || m.Path != "/a" || m.Volume.ID != "v" || m.List[0].VolumeID != "w" {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestPeersSpeakTheNewestVersionThatBothKnow(t *testing.T) {
	for _, c := range []struct{ newest, oldest, want int }{
		{Version, Oldest, Version},
		{Version + 1, Version, Version},
		{Version + 7, Oldest, Version},
		{Version + 1, Version + 1, 0},
		{Oldest - 1, Oldest - 1, 0},
		{Version, 0, 0},
		{0, 0, 0},
		{Version, Version + 1, 0},
		{-1, 1, 0},
	} {
		got, err := agreed(c.newest, c.oldest)
		if got != c.want || (err == nil) != (c.want > 0) || err != nil && !errors.Is(err, object.ErrInvalid) {
			t.Errorf("a peer with %d to %d: %d, %v; want %d", c.oldest, c.newest, got, err, c.want)
		}
	}
}

func TestABadRequestCanStillBeAnswered(t *testing.T) {
	m, err := Decode([]byte(`{"id":7,"verb":"mount","path":"relative","mount":"v"}`))
	if want := (Message{ID: 7, Verb: MountVolume}); err == nil || !reflect.DeepEqual(m, want) {
		t.Errorf("got %+v, %v; want id and verb alone", m, err)
	}
}

// someSecrets have a name and a value that is the same.
func someSecrets(names ...string) Secrets {
	of := map[string]Credentials{}
	for _, n := range names {
		of[n] = Credentials{n, n, n}
	}
	s, err := NewSecrets(of)
	if err != nil {
		panic(err)
	}
	return s
}

func TestSecretsAreFoundByName(t *testing.T) {
	s := someSecrets("b", "a")
	if c, ok := s.Get("a"); !ok || c.SecretAccessKey != "a" || s != someSecrets("a", "b") || !slices.Equal(s.Names(), []string{"a", "b"}) {
		t.Errorf("%v, %v, %v", c, ok, s.Names())
	}
	if c, ok := s.Get("c"); ok || !c.IsZero() {
		t.Error("found what is not there")
	}
	if _, ok := (Secrets{}).Get("a"); ok {
		t.Error("found in nothing")
	}
	if _, err := NewSecrets(map[string]Credentials{"x": {SessionToken: strings.Repeat("t", maxSecrets)}}); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("too many: %v", err)
	}
}

func fullMessage() Message {
	now := time.Date(2026, 11, 22, 1, 2, 3, 4, time.UTC)
	v := Volume{ID: "v", Source: "s3://b/p", Endpoint: "http://h:1", Region: "r", PathStyle: true, Layout: LayoutData,
		Freshness: time.Minute, Complete: CompleteAlways, UID: 1, GID: 2, FileMode: 0o440, DirMode: 0o550, Inline: true,
		Path: "/n", Tenant: "t", Credentials: Credentials{"id", "secret", "token"}, Secrets: someSecrets("a", "b")}
	return Message{ID: 1, Verb: MountVolume, Version: 2, Oldest: 1, Role: RoleNode, UUID: "0-1", Stage: Giving, Mount: "v", Path: "/a b/c", Sub: "data",
		Target: "/", ReadOnly: true, Fresh: true, Node: 1 << 63, Backing: 3, Volume: &v,
		List: []Mount{{VolumeID: "v", Path: "/a", Volume: v, Since: now, Served: true, Takeovers: 4, Socket: "s",
			Worker: "u", WorkerPID: 5, WorkerSince: now, LongestStall: time.Second, Without: []string{"resend"}, Secrets: []string{"a"}}},
		PID: 6, Leaving: true, Keep: true,
		Code: "busy", Text: "t"}
}

func TestAMessageComesBackAsItWasSent(t *testing.T) {
	want := fullMessage()
	want.List[0].Volume.Credentials, want.List[0].Volume.Secrets = Credentials{}, Secrets{} // those of a list stay here
	if v := reflect.ValueOf(want); v.NumField() > 0 {
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Fatalf("the test leaves %s out", v.Type().Field(i).Name)
			}
		}
	}
	b, err := encode(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, want)
	}
}

func TestErrorsKeepSentinelAndTextOverTheWire(t *testing.T) {
	all := []error{object.ErrNotFound, object.ErrChanged, object.ErrDenied, object.ErrUnavailable, object.ErrNoSpace,
		object.ErrBusy, object.ErrInvalid, ErrExists}
	if len(all) != len(codes) {
		t.Errorf("%d sentinels tested, %d on the wire", len(all), len(codes))
	}
	for _, sentinel := range all {
		for _, err := range []error{
			sentinel,
			fmt.Errorf("mount /x: %w", sentinel),
			fmt.Errorf("%w: with words behind it", sentinel),
		} {
			got := fail(err).Err()
			if !errors.Is(got, sentinel) || got.Error() != err.Error() {
				t.Errorf("%q became %q, %v", err, got, errors.Is(got, sentinel))
			}
		}
	}
	got := fail(errors.New("a bug")).Err()
	if got == nil || got.Error() != "a bug" {
		t.Errorf("an error without a sentinel became %v", got)
	}
	for _, s := range all {
		if errors.Is(got, s) {
			t.Errorf("an error without a sentinel is now %v", s)
		}
	}
	if err := (Message{Code: "made-up", Text: "t"}).Err(); err == nil {
		t.Error("an unknown code is no error")
	}
	if err := (Message{}).Err(); err != nil {
		t.Errorf("no code is the error %v", err)
	}
	if n := len(fail(errors.New(strings.Repeat("x", maxMessage))).Text); n > 4096 {
		t.Errorf("an error of any length is sent: %d bytes", n)
	}
}

const canary = "canary-7f3a"

func TestCredentialsNeverPrint(t *testing.T) {
	c := Credentials{AccessKeyID: canary, SecretAccessKey: canary, SessionToken: canary}
	v := Volume{ID: "v", Credentials: c, Secrets: someSecrets(canary)}
	m := Message{Volume: &v, List: []Mount{{Volume: v}}}
	st := State{Volume: v}
	var out bytes.Buffer
	for _, x := range []any{v.Secrets, &v.Secrets, c, &c, []Credentials{c}, v, &v, m, &m, *m.Volume, m.List, st, &st, map[string]Volume{"v": v}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&out, verb+"\n", x)
		}
		fmt.Fprintln(&out, x)
		fmt.Fprint(&out, fmt.Errorf("wrap %v", x))
		if err := json.NewEncoder(&out).Encode(x); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		l := slog.New(h)
		l.Info("credentials", "c", c, "p", &c, "any", slog.AnyValue(c))
		l.Info("volume", "v", v, "p", &v, "message", m, "state", st, "list", m.List)
		l.With("v", v).WithGroup("g").Info("message", "p", &m, "many", []Volume{v})
	}
	if i := strings.Index(out.String(), canary); i >= 0 {
		t.Errorf("a secret is printed: …%s…", out.String()[max(0, i-200):i+len(canary)])
	}
	hex := fmt.Sprintf("%x", canary)
	if strings.Contains(out.String(), hex) {
		t.Error("a secret is printed in hexadecimal")
	}
	if !strings.Contains(out.String(), "credentials") || !strings.Contains(fmt.Sprintf("%+v", v), "Freshness") {
		t.Error("hardly anything was printed")
	}
}

func TestZeroCredentialsAreKnown(t *testing.T) {
	if !(Credentials{}).IsZero() || (Credentials{SessionToken: "x"}).IsZero() {
		t.Error("IsZero is wrong")
	}
}

// FuzzDecode holds that what Decode accepts is encoded and accepted again as the same, and keeps what
// Validate promises.
func FuzzDecode(f *testing.F) {
	whole, err := encode(fullMessage())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	for _, s := range []string{`{}`, `{"id":1,"verb":"hello","version":1,"role":"worker","uuid":"a-b"}`, `{"id":1,"path":"/a/../b"}`,
		`{"id":18446744073709551615,"code":"busy","text":"x"}`, `{"ID":1,"id":2}`, `{"volume":null,"list":[{}]}`, "\x00", `{"path":"/\ud800"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Decode(b)
		if err != nil {
			if !errors.Is(err, object.ErrInvalid) {
				t.Fatalf("error %v is not ErrInvalid", err)
			}
			return
		}
		for _, p := range []string{m.Path, m.Target} {
			if p != "" && (p[0] != '/' || strings.Contains(p+"/", "/../") || strings.ContainsRune(p, 0)) {
				t.Fatalf("path %q was accepted", p)
			}
		}
		again, err := encode(m)
		if err != nil {
			t.Fatal(err)
		}
		n, err := Decode(again)
		if err != nil {
			t.Fatalf("%s is not accepted: %v", again, err)
		}
		if third, err := encode(n); err != nil || !bytes.Equal(third, again) {
			t.Fatalf("%s became %s, %v", again, third, err)
		}
	})
}
