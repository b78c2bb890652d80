// Package takeover keeps a worker behind every mount.
//
// A mount outlives its workers: its readers wait for the next one, which is fed what the first one
// was, or until the deadline, when the mount is given up so that they can end. None of this needs
// a privilege; what does, package broker lends (see [Config]).
package takeover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/mounttable"
)

const (
	adoptTimeout = 30 * time.Second // for a worker to answer INIT and check its source
	yieldTimeout = 10 * time.Second
	dropTimeout  = 2 * time.Second // for a worker to let go; one that is stopped must not keep an unmount waiting
	guardEvery   = 100 * time.Millisecond
)

// Config says how long to wait, and lends what needs privilege.
type Config struct {
	Deadline time.Duration // for the next worker
	Log      *slog.Logger

	Bind     func(path, name string) (*os.File, error) // makes and listens on domain/<name> of a mount, which asks its worker
	Answered func(*Mount)                              // the kernel has its INIT
	Waiting  func(*Mount) (int, error)                 // requests of the kernel without an answer
	Abort    func(*Mount) error                        // lets them fail

	// Lost is told where mounts were that are given up or found dead, and why; it must not wait. May be nil.
	Lost func(paths []string, why string)
}

// Mounts are those that are held, and who serves them. Safe for concurrent use.
type Mounts struct {
	cfg      Config
	patience time.Duration  // for a worker to end when its heir is ready
	tasks    sync.WaitGroup // hand-overs and guards under way
	stopping chan struct{}  // closed by Close

	mu      sync.Mutex        // guards the fields below; never held across a call to the worker
	held    map[string]*Mount // by volume
	worker  *brokerwire.Session
	heir    *brokerwire.Session // has the cache directory, and becomes the worker when that one ends
	settled *brokerwire.Session // the worker, once it has given back all that it held
	came    chan struct{}       // closed when a worker comes; then replaced
	observed
}

// New holds nothing yet.
func New(cfg Config) *Mounts {
	return &Mounts{cfg: cfg, patience: yieldTimeout, held: map[string]*Mount{}, came: make(chan struct{}), stopping: make(chan struct{})}
}

// Close ends hand-overs and deadlines, and lets go of what is held.
func (ms *Mounts) Close() {
	close(ms.stopping)
	ms.tasks.Wait()
	for _, m := range ms.All() {
		ms.Release(context.Background(), m)
	}
}

// Welcome makes s the worker, or its heir. A worker that is still connected and hands nothing
// over is replaced: it is dead.
func (ms *Mounts) Welcome(s *brokerwire.Session) error {
	ms.mu.Lock()
	old := ms.worker
	switch {
	case s.Stage == brokerwire.Giving && old != nil:
		ms.mu.Unlock()
		return fmt.Errorf("the next worker serves already: %w", brokerwire.ErrExists)
	case s.Stage == brokerwire.Taking && (old == nil || ms.settled != old || ms.heir != nil):
		ms.mu.Unlock() // it may be about to give back what nobody else holds
		return fmt.Errorf("the worker that hands over is not here: %w", object.ErrUnavailable)
	case s.Stage == brokerwire.Taking:
		ms.heir = s
		ms.mu.Unlock()
		ms.tasks.Go(func() { ms.succeed(old, s) })
		return nil
	}
	heir := ms.heir
	ms.promote(s)
	ms.mu.Unlock()
	if heir != nil {
		heir.Close()
	}
	if old != nil {
		old.Close()
		ms.Leave(old)
	}
	ms.begin(s)
	return nil
}

// promote makes s the worker; nil is none. Requires ms.mu.
func (ms *Mounts) promote(s *brokerwire.Session) {
	ms.worker, ms.heir = s, nil
	if s != nil {
		close(ms.came)
		ms.came = make(chan struct{})
	}
}

// begin has the worker serve all mounts.
func (ms *Mounts) begin(s *brokerwire.Session) {
	held := ms.All()
	ms.cfg.Log.Info("worker connected", "uuid", s.UUID, "pid", s.PID, "mounts", len(held))
	for _, m := range held {
		ms.HandOver(m, s)
	}
}

// Settled notes that a worker has given back all that it held.
func (ms *Mounts) Settled(s *brokerwire.Session) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	ms.settled = s
}

// succeed has the heir of a worker adopt all mounts, and that one end; then [Mounts.Leave] makes the heir
// the worker. An heir that cannot have every mount gets none: it has to end, whereupon the worker does.
func (ms *Mounts) succeed(old, heir *brokerwire.Session) {
	ctx, cancel := context.WithTimeout(context.Background(), adoptTimeout)
	defer cancel()
	held := ms.All()
	ms.cfg.Log.Info("heir connected", "uuid", heir.UUID, "pid", heir.PID, "of", old.PID, "mounts", len(held))
	var feeding errgroup.Group
	for _, m := range held {
		feeding.Go(func() error {
			m.adopting.Lock()
			defer m.adopting.Unlock()
			if err := ms.feed(ctx, m, heir); err != nil && !m.gone.Load() {
				return fmt.Errorf("volume %q: %w", m.ID, err)
			}
			return nil
		})
	}
	err := feeding.Wait()
	ms.mu.Lock()
	waiting, came := ms.heir == heir, ms.came
	ms.mu.Unlock()
	switch {
	case !waiting: // it is the worker already, because the old one died, or has died itself
		return
	case err != nil:
		ms.cfg.Log.Error("the heir cannot take over", "pid", heir.PID, "err", err)
		heir.Call(ctx, brokerwire.Message{Verb: brokerwire.Yield, Text: err.Error()}) // it answers by ending
		return
	}
	old.Call(ctx, brokerwire.Message{Verb: brokerwire.Yield}) // so does this
	t := time.NewTimer(ms.patience)
	defer t.Stop()
	select {
	case <-came:
	case <-ms.stopping:
	case <-t.C:
		ms.cfg.Log.Error("the worker does not end for its heir", "pid", old.PID)
		old.Close()
	}
}

// HandOver has a worker serve a mount, in the background.
func (ms *Mounts) HandOver(m *Mount, s *brokerwire.Session) {
	ms.tasks.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), adoptTimeout)
		defer cancel()
		if err := ms.Serve(ctx, m, s); err != nil && !m.gone.Load() {
			ms.cfg.Log.Error("take-over", "volume", m.ID, "worker", s.UUID, "pid", s.PID, "err", err)
		}
	})
}

// Leave lets the mounts of a worker that has gone wait for the next one. It may be called again.
func (ms *Mounts) Leave(s *brokerwire.Session) {
	var next *brokerwire.Session
	ms.mu.Lock()
	switch s {
	case ms.heir:
		ms.heir = nil
		ms.cfg.Log.Warn("heir disconnected", "uuid", s.UUID, "pid", s.PID)
	case ms.worker: // first: see adopt
		next = ms.heir
		ms.promote(next)
		ms.settled = next // it had nothing to give back
		ms.cfg.Log.Info("worker disconnected", "uuid", s.UUID, "pid", s.PID, "mounts", len(ms.held))
	}
	ms.mu.Unlock()
	for _, m := range ms.All() {
		if lost, ok := m.orphaned(s); ok {
			ms.tasks.Go(func() { ms.guard(m, lost) })
		}
	}
	if next != nil {
		ms.begin(next)
	}
}

// IsWorker reports whether s is the worker, and not one that another has replaced.
func (ms *Mounts) IsWorker(s *brokerwire.Session) bool {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return ms.worker == s
}

// Worker is the worker; it waits for one, and for the end of a hand-over, until ctx ends.
func (ms *Mounts) Worker(ctx context.Context) (*brokerwire.Session, error) {
	for {
		ms.mu.Lock()
		s, came, heir := ms.worker, ms.came, ms.heir
		ms.mu.Unlock()
		if s != nil && heir == nil {
			return s, nil
		}
		select {
		case <-came:
		case <-ctx.Done():
			return nil, fmt.Errorf("no cache worker is running on this node: %w", object.ErrUnavailable)
		}
	}
}

// Add holds a mount: from here on a worker that dies is followed by the next.
func (ms *Mounts) Add(m *Mount) error {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if ms.held[m.ID] != nil {
		return fmt.Errorf("volume %q is held already: %w", m.ID, brokerwire.ErrExists)
	}
	ms.held[m.ID] = m
	return nil
}

// Lookup is a volume's mount.
func (ms *Mounts) Lookup(id string) (*Mount, error) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if m := ms.held[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("volume %q is not mounted: %w", id, object.ErrNotFound)
}

// At is the mount at a path; nil if there is none.
func (ms *Mounts) At(path string) *Mount {
	for _, m := range ms.All() {
		if m.Path == path {
			return m
		}
	}
	return nil
}

// All are the mounts that are held now.
func (ms *Mounts) All() []*Mount {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return slices.Collect(maps.Values(ms.held))
}

// List tells of them, without credentials.
func (ms *Mounts) List() []brokerwire.Mount {
	out := []brokerwire.Mount{}
	for _, m := range ms.All() {
		out = append(out, m.info())
	}
	return out
}

// Refresh puts new credentials into the memfd and tells the worker; keep leaves the volume's own as
// they are.
func (ms *Mounts) Refresh(ctx context.Context, m *Mount, v *brokerwire.Volume, keep bool) error {
	if v == nil || v.ID != m.ID {
		return fmt.Errorf("refresh: volume %q itself is needed: %w", m.ID, object.ErrInvalid)
	}
	before, now := m.Record.State().Volume, *v
	now.Proven = before.Proven && before.ServiceAccount == now.ServiceAccount
	if keep {
		now.Credentials = before.Credentials
	}
	if before == now && !now.Unproven() {
		return nil
	}
	if err := m.Record.Update(func(s *brokerwire.State) { s.Volume = now }); err != nil {
		return err
	}
	reload := brokerwire.Message{Verb: brokerwire.Reload, Mount: m.ID}
	if !now.Unproven() {
		return ms.tell(ctx, reload)
	}
	s, err := ms.Worker(ctx) // the next one would not prove it
	if err == nil {
		_, _, err = s.Call(ctx, reload)
	}
	if err != nil {
		return err
	}
	return m.Prove()
}

// Prove notes that a worker was given a session for a volume that reads as its pod, for the workers that follow.
func (m *Mount) Prove() error {
	if !m.Record.State().Volume.Unproven() {
		return nil
	}
	return m.Record.Update(func(s *brokerwire.State) { s.Volume.Proven = true })
}

// tell is for what the next worker reads in the memfd, if there is none now.
func (ms *Mounts) tell(ctx context.Context, in brokerwire.Message) error {
	ms.mu.Lock()
	s := ms.worker
	ms.mu.Unlock()
	if s == nil {
		return nil
	}
	_, _, err := s.Call(ctx, in)
	return err
}

// Release lets go of a mount that is no longer in the mount table, or shall not be.
func (ms *Mounts) Release(ctx context.Context, m *Mount) {
	if m.gone.Swap(true) {
		return
	}
	ms.mu.Lock()
	if ms.held[m.ID] == m {
		delete(ms.held, m.ID)
	}
	ms.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, dropTimeout)
	defer cancel()
	if err := ms.tell(ctx, brokerwire.Message{Verb: brokerwire.Drop, Mount: m.ID}); err != nil && !errors.Is(err, object.ErrNotFound) {
		ms.cfg.Log.Warn("drop", "volume", m.ID, "err", err)
	}
	m.close()
}

// guard gives a mount up whose readers wait in vain since its worker went: until the deadline no
// other has come, or one has, but what was lost with the first cannot be delivered again.
func (ms *Mounts) guard(m *Mount, lost time.Time) {
	t := time.NewTicker(guardEvery)
	defer t.Stop()
	for end := lost.Add(ms.cfg.Deadline); time.Now().Before(end); {
		if ms.recovered(m, lost) {
			return
		}
		select {
		case <-t.C:
		case <-ms.stopping:
			return
		}
	}
	ms.giveUp(m)
}

// giveUp aborts the connection of a mount, so that what uses it ends.
func (ms *Mounts) giveUp(m *Mount) {
	why := fmt.Sprintf("no cache worker returned within %v", ms.cfg.Deadline)
	if m.served() {
		why = fmt.Sprintf("requests were lost with a cache worker, on a kernel without FUSE_NOTIFY_RESEND, and waited for %v", ms.cfg.Deadline)
	}
	ms.givenUp.Add(1)
	ms.cfg.Log.Error("a mount is given up, its pods must be restarted", "volume", m.ID, "path", m.Path, "why", why)
	table, err := mounttable.Read()                          // before: then it is still there
	if err = errors.Join(err, ms.cfg.Abort(m)); err != nil { // else the connection ends with its last descriptor, which should be ours
		ms.cfg.Log.Warn("abort connection", "path", m.Path, "err", err)
	}
	ms.Release(context.Background(), m)
	ms.Lost(table.Others(m.Dev, ""), why+", so the mount was given up")
}

// Lost tells where mounts were that are dead.
func (ms *Mounts) Lost(paths []string, why string) {
	if ms.cfg.Lost != nil && len(paths) > 0 {
		ms.cfg.Lost(paths, why)
	}
}

// recovered reports whether nobody waits any more for the worker that went then. Without resend no
// request was lost if, at any moment since, none waits.
func (ms *Mounts) recovered(m *Mount, lost time.Time) bool {
	if m.gone.Load() {
		return true
	}
	if m.Record.State().CanResend() {
		return m.served() || m.lostAgain(lost)
	}
	n, err := ms.cfg.Waiting(m)
	return m.served() && (err != nil || n == 0)
}
