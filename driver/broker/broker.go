// Package broker is the only privileged code of Larder: it mounts, binds, unmounts, holds
// FUSE descriptors and registers backing files.
//
// What it holds of a mount (the /dev/fuse descriptor, the memfd with everything that belongs
// to it, the listening domain socket) the worker holds too: either may be killed, the other
// gives it back, and no reader sees an error. A worker is untrusted: what it sends is
// checked here, and it can name nothing but mounts, node ids and descriptors.
package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/takeover"
)

// Config of a broker.
type Config struct {
	Name      string   // of its mounts in the mount table, their "source"; "" means larder
	Socket    string   // path of its own socket
	WorkerUID uint32   // only this user may be the worker
	TierDirs  []string // the cache directories; in their file systems backing files may be
	ViewDirs  []string // where Run shows each of them read-only, unless it is; they stay (see RemoveView). None makes no views
	ReadAhead int64    // bytes the kernel asks ahead in a mount; 0 means 256 KiB

	// TakeoverDeadline is how long a mount waits for its next worker; 0 means 10 minutes.
	TakeoverDeadline time.Duration

	// UnmountAtExit removes every mount when Run returns; otherwise the worker keeps them.
	UnmountAtExit bool

	// Lost is told where mounts were that are given up or found dead, and why; it must not wait. May be nil.
	Lost func(paths []string, why string)

	Log *slog.Logger
}

// Validate reports all mistakes at once.
func (c Config) Validate() error {
	var errs []error
	for _, f := range []struct {
		wrong bool
		text  string
	}{
		{c.Socket == "", "broker socket: a path is needed"},
		{len(c.TierDirs) == 0 || slices.Contains(c.TierDirs, ""), "tier: a path is needed"},
		{len(c.ViewDirs) != 0 && len(c.ViewDirs) != len(c.TierDirs), fmt.Sprintf("%d views of %d tiers", len(c.ViewDirs), len(c.TierDirs))},
		{c.TakeoverDeadline < 0, fmt.Sprintf("take-over deadline %v is negative", c.TakeoverDeadline)},
		{c.ReadAhead < 0, fmt.Sprintf("read-ahead %d is negative", c.ReadAhead)},
	} {
		if f.wrong {
			errs = append(errs, errors.New(f.text))
		}
	}
	return errors.Join(errs...)
}

// Broker makes the mounts of a node; package takeover keeps a worker behind them.
type Broker struct {
	cfg      Config
	devs     []uint64 // st_dev of each tier
	held     *takeover.Mounts
	mounting sync.Mutex // one mount or unmount at a time; held across both
	leaving  atomic.Bool
}

// New checks the configuration. Nothing is mounted before Run.
func New(cfg Config) (*Broker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Name == "" {
		cfg.Name = "larder"
	}
	if cfg.TakeoverDeadline == 0 {
		cfg.TakeoverDeadline = 10 * time.Minute
	}
	if cfg.ReadAhead == 0 {
		cfg.ReadAhead = 256 << 10
	}
	b := &Broker{cfg: cfg}
	b.held = takeover.New(takeover.Config{
		Deadline: cfg.TakeoverDeadline, Log: cfg.Log,
		Bind: bindThrough, Answered: b.answered, Waiting: waiting, Abort: abort, Lost: cfg.Lost,
	})
	return b, nil
}

// Leaving has the worker told that no other broker will come, and no other worker: it stays until no
// volume is in use.
func (b *Broker) Leaving() { b.leaving.Store(true) }

// Mounts are those that it holds.
func (b *Broker) Mounts() *takeover.Mounts { return b.held }

// Run serves the socket until ctx ends.
func (b *Broker) Run(ctx context.Context) error {
	for i, dir := range b.cfg.TierDirs {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return fmt.Errorf("tier %s: %w", dir, err)
		}
		b.devs = append(b.devs, st.Dev)
		if len(b.cfg.ViewDirs) == 0 {
			continue
		}
		if err := makeView(dir, b.cfg.ViewDirs[i]); err != nil {
			return err
		}
	}
	if err := mountFusectl(); err != nil {
		b.cfg.Log.Warn("no fusectl: a mount without a worker cannot be aborted while a stopped process holds it", "err", err)
	}
	srv := brokerwire.Server{Socket: b.cfg.Socket, Admit: b.admit, Handle: b.handle, Came: b.came, Left: b.held.Leave, Log: b.cfg.Log}
	err := srv.Run(ctx)
	if b.cfg.UnmountAtExit {
		err = errors.Join(err, RemoveDead(b.cfg.Name))
	}
	b.held.Close()
	return err
}

// admit says who may be what.
func (b *Broker) admit(uid uint32, role brokerwire.Role) bool {
	return role == brokerwire.RoleNode && uid == uint32(os.Getuid()) || role == brokerwire.RoleWorker && uid == b.cfg.WorkerUID
}

func (b *Broker) came(s *brokerwire.Session) error {
	if s.Role == brokerwire.RoleWorker {
		return b.held.Welcome(s)
	}
	return nil
}

// handle does what a peer asks, of whose role it is.
func (b *Broker) handle(ctx context.Context, s *brokerwire.Session, in brokerwire.Message, files []*os.File) (r brokerwire.Message, err error) {
	if s.Role == brokerwire.RoleWorker && !b.held.IsWorker(s) {
		return r, fmt.Errorf("another worker has taken over: %w", object.ErrUnavailable)
	}
	switch in.Verb {
	case brokerwire.MountVolume:
		return r, b.mountVolume(ctx, in)
	case brokerwire.Unmount:
		return r, b.unmount(ctx, in.Path)
	case brokerwire.Mounts:
		return brokerwire.Message{List: b.held.List(), PID: os.Getpid(), Leaving: b.leaving.Load()}, nil
	case brokerwire.Give:
		return r, b.takeBack(s, in, files)
	case brokerwire.Given:
		b.held.Settled(s)
		return r, b.reconcile()
	}
	m, err := b.held.Lookup(in.Mount)
	if err != nil {
		return r, err
	}
	switch in.Verb {
	case brokerwire.RefreshVolume:
		err = b.held.Refresh(ctx, m, in.Volume, in.Keep)
	case brokerwire.Bind:
		err = bindTree(m.Path, in.Sub, in.Target, in.ReadOnly, m.Dev)
	case brokerwire.Register:
		r.Backing, err = b.register(m, files)
	case brokerwire.Unregister:
		err = unregister(m, in.Backing)
	case brokerwire.Replace:
		err = replace(m, files)
	}
	return r, err
}
