package takeover

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
)

// Mount is one FUSE connection and everything that belongs to it.
type Mount struct {
	ID     string // of the volume
	Path   string
	Dev    uint64   // st_dev of the FUSE file system
	Device *os.File // /dev/fuse
	Record *brokerwire.Record

	adopting sync.Mutex // one adoption at a time; held across calls to the worker; guards fed
	fed      *fed       // the last adoption; nil if it failed
	binding  sync.Mutex // one ensureSocket at a time; held until a worker has answered. Taken without adopting
	gone     atomic.Bool

	mu       sync.Mutex          // guards the fields below; never held across a call
	server   *brokerwire.Session // the worker it was given to; nil while there is none
	since    time.Time           // when that was
	lost     time.Time           // when the one before went
	listener *os.File            // nil until the socket is bound
	heard    *brokerwire.Session // the worker that has the listener
	backing  map[int32]struct{}  // ids registered in the kernel
}

// NewMount is a mount that no worker serves. It closes both when it is released.
func NewMount(device *os.File, rec *brokerwire.Record) *Mount {
	st := rec.State()
	return &Mount{ID: st.Volume.ID, Path: st.Path, Dev: st.Dev, Device: device, Record: rec, backing: map[int32]struct{}{}}
}

// Regained is a mount that the worker gives back which serves it. The listener may be nil.
func Regained(s *brokerwire.Session, device *os.File, rec *brokerwire.Record, backing map[int32]struct{}, listener *os.File) *Mount {
	m := NewMount(device, rec)
	m.server, m.since, m.backing, m.listener = s, time.Now(), backing, listener
	if listener != nil {
		m.heard = s
	}
	return m
}

// Backing calls f with the ids that are registered in the kernel, which f may change, unless the
// mount has gone. One call at a time.
func (m *Mount) Backing(f func(ids map[int32]struct{}) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gone.Load() {
		return fmt.Errorf("volume %q has gone: %w", m.ID, object.ErrNotFound)
	}
	return f(m.backing)
}

func (m *Mount) served() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.server != nil
}

// orphaned notes that the mount's worker has gone, if it was s. Its readers wait for the next one.
func (m *Mount) orphaned(s *brokerwire.Session) (lost time.Time, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.server != s || m.gone.Load() {
		return lost, false
	}
	m.server, m.lost = nil, time.Now()
	return m.lost, true
}

// lostAgain reports whether another worker has gone since.
func (m *Mount) lostAgain(lost time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lost != lost
}

func (m *Mount) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Record.Close()
	brokerwire.CloseFiles([]*os.File{m.Device, m.listener})
}

// Serve has a worker serve a mount and its domain socket, as far as it does not yet.
func (ms *Mounts) Serve(ctx context.Context, m *Mount, s *brokerwire.Session) error {
	if err := ms.adopt(ctx, m, s); err != nil {
		return err
	}
	return ms.ensureSocket(ctx, m, s)
}

// fed is what a worker was given of a mount.
type fed struct {
	worker   *brokerwire.Session
	listener *os.File
}

// adopt has a worker serve a mount, after it was fed. No other may serve it any more.
func (ms *Mounts) adopt(ctx context.Context, m *Mount, s *brokerwire.Session) error {
	m.adopting.Lock()
	defer m.adopting.Unlock()
	m.mu.Lock()
	done := m.server == s
	m.mu.Unlock()
	if done {
		return nil
	}
	fresh := !m.Record.State().Negotiated()
	if err := ms.feed(ctx, m, s); err != nil {
		return err
	}
	if _, _, err := s.Call(ctx, brokerwire.Message{Verb: brokerwire.Serve, Mount: m.ID}); err != nil {
		m.fed = nil
		return err
	}
	m.mu.Lock()
	stall := m.takenBy(s)
	if m.listener != nil && m.listener == m.fed.listener {
		m.heard = s
	}
	m.mu.Unlock()
	if !ms.IsWorker(s) { // it has gone meanwhile, and Leave did not find the mount
		ms.Leave(s)
	}
	if fresh {
		return nil
	}
	return ms.tookOver(m, s, stall)
}

// feed plays the kernel's INIT to a worker, sends it the descriptors, and checks that it answered as
// the first one did, whose answer goes to the kernel. Then the worker is ready to serve. Requires m.adopting.
func (ms *Mounts) feed(ctx context.Context, m *Mount, s *brokerwire.Session) error {
	if m.gone.Load() {
		return fmt.Errorf("volume %q has gone: %w", m.ID, object.ErrNotFound)
	}
	if m.fed != nil && m.fed.worker == s {
		return nil
	}
	m.fed = nil
	m.mu.Lock()
	listener := m.listener
	m.mu.Unlock()
	st := m.Record.State()
	init, err := st.Ask()
	if err != nil {
		return err
	}
	defer init.Close()
	files := []*os.File{m.Device, m.Record.File(), init.Theirs}
	if listener != nil {
		files = append(files, listener)
	}
	fresh := !st.Negotiated()
	if _, _, err := s.Call(ctx, brokerwire.Message{Verb: brokerwire.Adopt, Mount: m.ID, Fresh: fresh}, files...); err != nil {
		return err
	}
	answer, err := init.Answer()
	if err == nil && fresh {
		err = ms.answer(m, answer)
	}
	if err != nil {
		s.Call(ctx, brokerwire.Message{Verb: brokerwire.Drop, Mount: m.ID}) // its error is of no use: ours is returned
		return err
	}
	m.fed = &fed{s, listener}
	return nil
}

// Replace takes a compacted memfd from the worker, unless an heir has been given the one before. f
// is the mount's unless there is an error.
func (m *Mount) Replace(f *os.File) error {
	m.adopting.Lock()
	defer m.adopting.Unlock()
	m.mu.Lock()
	server := m.server
	m.mu.Unlock()
	if m.fed != nil && m.fed.worker != server {
		return fmt.Errorf("volume %q is being handed over: %w", m.ID, object.ErrBusy)
	}
	return m.Record.Replace(f)
}

// answer gives the kernel the first worker's answer to INIT.
func (ms *Mounts) answer(m *Mount, answer []byte) error {
	if _, err := unix.Write(int(m.Device.Fd()), answer); err != nil {
		return fmt.Errorf("answer INIT: %w", err)
	}
	ms.cfg.Answered(m)
	// Behind the answer: a mount whose state has none, when a worker gives it back, is not finished.
	return m.Record.Update(func(s *brokerwire.State) { s.InitOut = answer })
}

// ensureSocket binds domain/<uuid> through the mount and hands the listener to the worker.
// A worker with another uuid gets a socket of that name. If s dies meanwhile, whoever comes
// after it is asked instead: adopting is free.
func (ms *Mounts) ensureSocket(ctx context.Context, m *Mount, s *brokerwire.Session) error {
	m.binding.Lock()
	defer m.binding.Unlock()
	m.mu.Lock()
	bound := m.listener != nil
	m.mu.Unlock()
	if !bound || m.Record.State().Socket != s.UUID {
		if err := ms.bindSocket(ctx, m, s.UUID); err != nil {
			return fmt.Errorf("bind domain/%s: %w", s.UUID, err)
		}
	}
	m.mu.Lock()
	now, l, heard := m.server, m.listener, m.heard
	m.mu.Unlock()
	if now == nil || now == heard {
		return nil
	}
	_, _, err := now.Call(ctx, brokerwire.Message{Verb: brokerwire.Listen, Mount: m.ID}, l)
	if errors.Is(err, object.ErrUnavailable) {
		return nil // it has died: the next one gets the listener with the mount
	}
	if err == nil {
		m.mu.Lock()
		m.heard = now
		m.mu.Unlock()
	}
	return err
}

// bindSocket makes domain/<name>, which asks the worker; if that dies it waits for the next one, or
// for the mount's end. Requires m.binding.
func (ms *Mounts) bindSocket(ctx context.Context, m *Mount, name string) error {
	type result struct {
		l   *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		l, err := ms.cfg.Bind(m.Path, name)
		done <- result{l, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return r.err
		}
		m.mu.Lock()
		if m.gone.Load() { // a socket keeps the file system that it is bound in
			m.mu.Unlock()
			r.l.Close()
			return fmt.Errorf("volume %q has gone: %w", m.ID, object.ErrNotFound)
		}
		old := m.listener
		m.listener, m.heard = r.l, nil
		m.mu.Unlock()
		brokerwire.CloseFiles([]*os.File{old})
		return m.Record.Update(func(st *brokerwire.State) { st.Socket = name })
	case <-ctx.Done():
		go func() { brokerwire.CloseFiles([]*os.File{(<-done).l}) }()
		return context.Cause(ctx)
	}
}
