package brokerwire

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// serve starts a server that admits worker and node service, whoever they are.
func serve(t *testing.T, handle func(*Session, Message) (Message, error)) (socket string, came, left chan *Session) {
	t.Helper()
	came, left = make(chan *Session, 8), make(chan *Session, 8)
	socket = filepath.Join(t.TempDir(), "s")
	v := Server{
		Socket: socket, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Admit:  func(uid uint32, r Role) bool { return uid == uint32(os.Getuid()) && (r == RoleWorker || r == RoleNode) },
		Handle: func(_ context.Context, s *Session, m Message, _ []*os.File) (Message, error) { return handle(s, m) },
		Came:   func(s *Session) error { came <- s; return nil },
		Left:   func(s *Session) { left <- s },
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	eventually(t, func() bool { _, err := os.Stat(socket); return err == nil })
	return socket, came, left
}

func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited 10 s in vain")
		}
	}
}

// caller is a peer that answers nothing.
func caller(t *testing.T, socket string) *Peer {
	t.Helper()
	c, err := Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	p := NewPeer(c, func(context.Context, Message, []*os.File) (Message, []*os.File, error) {
		return Message{}, nil, object.ErrInvalid
	})
	done := make(chan struct{})
	go func() { defer close(done); p.Run(context.Background()) }()
	t.Cleanup(func() { p.Close(); <-done })
	return p
}

func TestAVerbOfAnotherRoleIsNeverHandled(t *testing.T) {
	handled := make(chan Verb, 64)
	socket, _, _ := serve(t, func(_ *Session, m Message) (Message, error) { handled <- m.Verb; return Message{}, nil })
	all := []Verb{MountVolume, RefreshVolume, Bind, Unmount, Mounts, Adopt, Listen, Reload, Drop, Give, Given, Register, Unregister, Replace, "other"}
	for role, may := range map[Role][]Verb{
		"":         {},
		RoleWorker: {Give, Given, Register, Unregister, Replace, Mounts},
		RoleNode:   {MountVolume, RefreshVolume, Bind, Unmount, Mounts},
	} {
		p := caller(t, socket)
		if role != "" {
			if _, _, err := p.Call(t.Context(), Message{Verb: Hello, Version: Version, Oldest: Oldest, Role: role, UUID: "u"}); err != nil {
				t.Fatal(err)
			}
		}
		var did []Verb
		for _, v := range all {
			_, _, err := p.Call(t.Context(), Message{Verb: v})
			if err == nil {
				did = append(did, <-handled)
			} else if !errors.Is(err, object.ErrDenied) {
				t.Errorf("%q as %q: %v", v, role, err)
			}
		}
		if len(did) != len(may) || len(handled) != 0 {
			t.Errorf("%q may %q, want %q", role, did, may)
		}
	}
}

func TestAPeerSaysOnceAndTrulyWhoItIs(t *testing.T) {
	socket, came, left := serve(t, func(s *Session, _ Message) (Message, error) { return Message{UUID: s.UUID}, nil })
	p := caller(t, socket)
	for what, c := range map[string]struct {
		hello Message
		want  error
	}{
		"another version":     {Message{Version: Version + 1, Oldest: Version + 1, Role: RoleNode}, object.ErrInvalid},
		"no role":             {Message{Version: Version, Oldest: Oldest}, object.ErrDenied},
		"an unknown role":     {Message{Version: Version, Oldest: Oldest, Role: "root"}, object.ErrDenied},
		"a worker without id": {Message{Version: Version, Oldest: Oldest, Role: RoleWorker}, object.ErrInvalid},
	} {
		c.hello.Verb = Hello
		if _, _, err := p.Call(t.Context(), c.hello); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	hello := Message{Verb: Hello, Version: Version, Oldest: Oldest, Role: RoleWorker, UUID: "u"}
	if r, _, err := p.Call(t.Context(), hello); err != nil || r.Version != Version {
		t.Errorf("after refusals: %+v, %v", r, err)
	}
	s := <-came
	if s.UUID != "u" || s.Role != RoleWorker || s.UID != uint32(os.Getuid()) || s.PID != int32(os.Getpid()) {
		t.Errorf("%+v", s)
	}
	hello.Role, hello.UUID = RoleNode, "v"
	if _, _, err := p.Call(t.Context(), hello); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("a second hello: %v", err)
	}
	if r, _, err := p.Call(t.Context(), Message{Verb: Mounts}); err != nil || r.UUID != "u" {
		t.Errorf("after a second hello it is %q, %v", r.UUID, err)
	}
	p.Close()
	if got := <-left; got != s {
		t.Errorf("%+v has left, not %+v", got, s)
	}
}
