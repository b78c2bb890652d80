package brokerwire

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// verbs is what a peer of each role may ask of a broker.
var verbs = map[Role][]Verb{
	RoleNode:   {MountVolume, RefreshVolume, Bind, Unmount, Mounts},
	RoleWorker: {Give, Given, Register, Unregister, Replace, Mounts},
}

// Session is a peer that was admitted.
type Session struct {
	*Peer
	Role  Role
	UUID  string // of a worker
	Stage Stage  // of a worker, when it came
	UID   uint32 // the kernel says so, as of PID
	PID   int32
}

// Server is the broker's end of its socket. The socket is open to everybody: a peer's first
// message says what it wants to be, the kernel says whose process it is, and a verb that is not
// of its role never reaches Handle.
type Server struct {
	Socket string
	Admit  func(uid uint32, r Role) bool
	Handle func(ctx context.Context, s *Session, m Message, files []*os.File) (Message, error)
	Came   func(*Session) error // was admitted; an error refuses it all the same
	Left   func(*Session)       // its connection has ended, and so have its calls of Handle
	Log    *slog.Logger
}

// Run serves until ctx ends, and waits for what it called.
func (v *Server) Run(ctx context.Context) error {
	l, err := ListenPacket(v.Socket, 0o666)
	if err != nil {
		return err
	}
	defer os.Remove(v.Socket)
	var serving sync.WaitGroup
	defer serving.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		serving.Go(func() { v.serve(ctx, c) })
	}
}

func (v *Server) serve(ctx context.Context, c *net.UnixConn) {
	cred, err := credentials(c)
	if err != nil {
		v.Log.Error("peer credentials", "err", err)
		c.Close()
		return
	}
	var session atomic.Pointer[Session] // nil until it was admitted
	var p *Peer
	p = NewPeer(c, func(ctx context.Context, m Message, files []*os.File) (Message, []*os.File, error) {
		if m.Verb == Hello {
			s := &Session{Peer: p, Role: m.Role, UUID: m.UUID, Stage: m.Stage, UID: cred.Uid, PID: cred.Pid}
			version, err := agreed(m.Version, m.Oldest)
			if err == nil {
				err = v.check(s)
			}
			if err != nil {
				return Message{}, nil, err
			}
			if !session.CompareAndSwap(nil, s) {
				return Message{}, nil, fmt.Errorf("said hello already: %w", object.ErrInvalid)
			}
			return Message{Version: version}, nil, v.Came(s)
		}
		s := session.Load()
		if s == nil || !slices.Contains(verbs[s.Role], m.Verb) {
			return Message{}, nil, fmt.Errorf("verb %q is not for this peer: %w", m.Verb, object.ErrDenied)
		}
		r, err := v.Handle(ctx, s, m, files)
		return r, nil, err
	})
	if err := p.Run(ctx); err != nil {
		v.Log.Warn("broker connection", "err", err)
	}
	if s := session.Load(); s != nil {
		v.Left(s)
	}
}

// check decides about a hello.
func (v *Server) check(s *Session) error {
	switch {
	case !v.Admit(s.UID, s.Role):
		return fmt.Errorf("uid %d may not be %q: %w", s.UID, s.Role, object.ErrDenied)
	case s.Role == RoleWorker && s.UUID == "":
		return fmt.Errorf("a worker has a uuid: %w", object.ErrInvalid)
	}
	return nil
}

func credentials(c *net.UnixConn) (cred *unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return nil, cerr
	}
	return cred, err
}
