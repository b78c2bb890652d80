package tiers

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
)

// mover is what moves, and what is to be.
type mover struct {
	stop    context.CancelFunc
	running sync.WaitGroup
	woken   chan struct{}
	uses    atomic.Int64

	moving sync.Mutex // one move at a time; held across it. Guards the fields below
	buf    []byte     // one chunk
	seen   int64      // uses when the last chunk was copied
	owed   time.Duration

	wanting sync.Mutex // guards the fields below
	wanted  []object.ID
	queued  map[object.ID]struct{}
}

const (
	maxWanted = 1024 // objects that wait to be copied into a faster tier; more are forgotten, and asked for again
	moveEvery = time.Second
	restLeast = 5 * time.Millisecond // a shorter rest would be longer than asked for
)

func (m *mover) init() {
	m.woken = make(chan struct{}, 1)
	m.queued = map[object.ID]struct{}{}
}

// kick has the mover look.
func (m *mover) kick() {
	select {
	case m.woken <- struct{}{}:
	default:
	}
}

// want has an object considered for a faster tier.
func (m *mover) want(id object.ID) {
	m.wanting.Lock()
	defer m.wanting.Unlock()
	if _, ok := m.queued[id]; ok || len(m.wanted) >= maxWanted {
		return
	}
	m.queued[id] = struct{}{}
	m.wanted = append(m.wanted, id)
	m.kick()
}

func (m *mover) next() (id object.ID, ok bool) {
	m.wanting.Lock()
	defer m.wanting.Unlock()
	if len(m.wanted) == 0 {
		return id, false
	}
	id = m.wanted[0]
	m.wanted = m.wanted[1:]
	delete(m.queued, id)
	return id, true
}

// run moves until ctx ends.
func (c *Cache) run(ctx context.Context) {
	tick := time.NewTicker(moveEvery)
	defer tick.Stop()
	for {
		c.makeMargins(ctx)
		for id, ok := c.next(); ok && ctx.Err() == nil; id, ok = c.next() {
			c.promote(ctx, id)
			c.makeMargins(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-c.woken:
		case <-tick.C:
		}
	}
}

// makeMargins moves victims down until each tier but the last has its margin free, as far as it can.
func (c *Cache) makeMargins(ctx context.Context) {
	c.moving.Lock()
	defer c.moving.Unlock()
	for i, t := range c.tiers[:len(c.tiers)-1] {
		for ctx.Err() == nil && t.Free() < t.margin && c.demote(ctx, i) {
		}
	}
}

// demote moves the next victim of a tier to a slower one, and reports whether it has gone. Requires c.moving.
func (c *Cache) demote(ctx context.Context, from int) bool {
	if !c.tiers[from].Accepts() || !c.slowerAccepts(from) {
		return false
	}
	v := c.tiers[from].Victim()
	if v == nil {
		return false
	}
	to := c.below(ctx, from, v.Object().Size)
	err := object.ErrNoSpace
	if to >= 0 {
		if err = c.copy(ctx, v, to); err == nil {
			return v.Drop()
		}
		c.tiers[to].Spare(v.Object().ID(), true) // what was copied
	}
	c.log.Debug("move down", "object", v.Object(), "err", err)
	if err := v.Keep(); err != nil {
		c.log.Warn("give up lease", "object", v.Object(), "err", err)
	}
	return errors.Is(err, errWanted)
}

func (c *Cache) slowerAccepts(than int) bool {
	for _, t := range c.tiers[than+1:] {
		if t.Accepts() {
			return true
		}
	}
	return false
}

// below is the next slower tier that takes a file of that size, where it has made room by moving others further down; -1 for
// none. Requires c.moving.
func (c *Cache) below(ctx context.Context, from int, size int64) int {
	for i := from + 1; i < len(c.tiers); i++ {
		t := c.tiers[i]
		if !t.takes(size) {
			continue
		}
		for ctx.Err() == nil && t.Free() < size && i+1 < len(c.tiers) && c.demote(ctx, i) {
		}
		return i
	}
	return -1
}

// promote copies an object to the fastest tier that lets it in.
func (c *Cache) promote(ctx context.Context, id object.ID) {
	c.moving.Lock()
	defer c.moving.Unlock()
	from := c.best(id, 0)
	if from <= 0 {
		return
	}
	m := c.tiers[from].Copy(id)
	if m == nil {
		return
	}
	defer m.Keep()
	for to, t := range c.tiers[:from] {
		if !m.Complete() || !t.takes(m.Object().Size) || !c.admit(ctx, to, m) {
			continue
		}
		err := c.copy(ctx, m, to)
		if err == nil && t.Peek(id).Complete {
			c.tiers[from].Spare(id, true)
			c.tell(id)
			return
		}
		c.log.Debug("move up", "object", m.Object(), "err", err)
		if ctx.Err() == nil { // else the next worker goes on
			t.Evict(id)
		}
		return
	}
}

// admit makes room for an object by moving down who was asked for less, beside the margin; false if that is not enough.
// Requires c.moving.
func (c *Cache) admit(ctx context.Context, to int, m *cachestore.Move) bool {
	t := c.tiers[to]
	for t.Free() < m.Object().Size+t.margin {
		if ctx.Err() != nil || !t.Admits(m.Asked()) || !c.demote(ctx, to) {
			return false
		}
	}
	return true
}

var (
	errWanted = errors.New("somebody has opened it") // so the victim stays
	errGone   = errors.New("it was evicted meanwhile")
)

// copy brings what a file has, and who may read it, into another tier. Requires c.moving.
func (c *Cache) copy(ctx context.Context, m *cachestore.Move, to int) error {
	obj, t := m.Object(), c.tiers[to]
	dst, err := t.Receive(obj, m.Asked(), m.Since())
	if err != nil {
		return err
	}
	err = c.copyChunks(ctx, m, dst, to)
	for _, g := range m.Grants() {
		t.Grant(obj, g.Principal, g.At)
	}
	if m.Evicted() { // by name: the copy is not to outlive it
		t.Evict(obj.ID())
		err = errGone
	}
	return errors.Join(err, dst.Close())
}

func (c *Cache) copyChunks(ctx context.Context, m *cachestore.Move, dst *cachestore.File, to int) error {
	if len(c.buf) == 0 {
		c.buf = make([]byte, object.ChunkSize)
	}
	for i := range m.Object().Chunks() {
		if dst.Has(i) {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if m.Wanted() {
			return errWanted
		}
		began := time.Now()
		b, err := m.Chunk(i, c.buf)
		if errors.Is(err, object.ErrIncomplete) || errors.Is(err, object.ErrCorrupt) {
			continue // it is a miss where it was, too
		}
		if err == nil {
			if m.Unmark(i) > 0 {
				dst.MarkUnread(i)
			}
			err = dst.Put(i, b)
		}
		if err != nil {
			dst.Unmark(i)
			return fmt.Errorf("chunk %d: %w", i, err)
		}
		c.tiers[to].received.Add(int64(len(b)))
		c.rest(ctx, time.Since(began))
	}
	return nil
}

// rest leaves half of the time to others while they use the cache. Requires c.moving.
func (c *Cache) rest(ctx context.Context, worked time.Duration) {
	now := c.uses.Load()
	if now != c.seen {
		c.owed += worked
	}
	if c.seen = now; c.owed < restLeast {
		return
	}
	t := time.NewTimer(c.owed)
	defer t.Stop()
	c.owed = 0
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// Pin has an object stay that is complete here, in the slowest tier that outlives the machine and takes it: others may have copies,
// which come and go. Errors are those of [cachestore.Store.Pin].
func (c *Cache) Pin(ctx context.Context, id object.ID) error {
	c.moving.Lock()
	defer c.moving.Unlock()
	at, in := c.look(id, 0)
	if at < 0 || !in.Complete {
		return fmt.Errorf("pin %v: %w", id, object.ErrIncomplete)
	}
	var err error
	for i := len(c.tiers) - 1; i >= 0 && (err == nil || errors.Is(err, object.ErrNoSpace)); i-- {
		t := c.tiers[i]
		if t.kind == Memory && c.tiers[len(c.tiers)-1].kind != Memory {
			break
		}
		if err = c.pinIn(ctx, id, at, i); err == nil {
			return nil
		}
	}
	return err
}

// pinIn pins an object in a tier, to which it is copied if need be. Requires c.moving.
func (c *Cache) pinIn(ctx context.Context, id object.ID, from, to int) error {
	t := c.tiers[to]
	if t.Peek(id).Complete {
		return t.Pin(id)
	}
	m := c.tiers[from].Copy(id)
	if m == nil {
		return fmt.Errorf("pin %v: %w", id, object.ErrIncomplete)
	}
	defer m.Keep()
	if s := t.Stats(); s.PinnedBytes+m.Object().Size > s.CapacityBytes/2 {
		return fmt.Errorf("pin %v: %w: %d of %d bytes are pinned", id, object.ErrNoSpace, s.PinnedBytes, s.CapacityBytes)
	}
	if err := c.copy(ctx, m, to); err != nil {
		return err
	}
	return t.Pin(id)
}

// Unpin lets an object be evicted again. It reports whether it was pinned.
func (c *Cache) Unpin(id object.ID) (was bool) {
	for _, t := range c.tiers {
		was = t.Unpin(id) || was
	}
	return was
}
