// Package tiers keeps cache files in several directories of different speed.
//
// Each tier is a [cachestore.Store], whole in itself: what one of them cannot do the others do. An object may be
// in several. Its chunks never change, so each of its files is right, and whoever opens it gets the one that has most of it, the
// fastest among equals. What moves is copied beside all reads, checked against its sums, by one goroutine with one chunk in its
// hands (mover.go): down, to keep a margin of each faster tier free, before what is copied is evicted there; up, what
// was asked for again, and the copy below stays as the first to go. A move that is cut off has lost nothing.
package tiers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
)

// Kind of a tier, faster ones first.
type Kind int

const (
	Memory Kind = iota - 1 // a tmpfs: empty after each boot
	SSD
	HDD
)

var kinds = [...]string{"MEM", "SSD", "HDD"}

func (k Kind) String() string { return kinds[k-Memory] }

// ParseKind reads what String writes.
func ParseKind(s string) (Kind, bool) {
	i := slices.Index(kinds[:], s)
	return Kind(i) + Memory, i >= 0
}

// Config of a [Cache].
type Config struct {
	Tiers    []Tier // at least one; faster kinds are before slower ones, and equals in this order
	Standby  bool   // wait for the end of another process that has them, however long
	AskOwner func() // else: see cachestore.Config
	Log      *slog.Logger
}

// Tier is one of a [Cache]. Of its store's configuration Identity, Lock and AskOwner are set here.
type Tier struct {
	Kind  Kind
	Store cachestore.Config
}

// Cache is all tiers of a worker. All methods are safe for concurrent use.
type Cache struct {
	log    *slog.Logger
	tiers  []*tier // fastest first
	failed []Status

	making [64]sync.Mutex // by object: held by who makes the file of one that is in no tier
	moved  atomic.Pointer[func(object.ID)]
	mover
}

type tier struct {
	*cachestore.Store
	kind   Kind
	dir    string
	margin int64 // bytes to keep free, where there is a slower tier

	received atomic.Int64 // bytes, from other tiers
}

// marginShare of a tier is kept free for newcomers, but no more than mostMargin.
const (
	marginShare = 16
	mostMargin  = 4 << 30
)

// Locks are those of tiers that are to be opened.
type Locks struct {
	log    *slog.Logger
	tiers  []Tier // fastest first, with their locks
	failed []Status
}

// Lock takes the tiers for this process. One of several that cannot be opened is left out until the next start; but none may
// be another process's.
func Lock(ctx context.Context, cfg Config) (*Locks, error) {
	if len(cfg.Tiers) == 0 {
		return nil, fmt.Errorf("%w: no tier", object.ErrInvalid)
	}
	l := &Locks{log: cfg.Log}
	if l.log == nil {
		l.log = slog.Default()
	}
	all := slices.Clone(cfg.Tiers)
	slices.SortStableFunc(all, func(a, b Tier) int { return int(a.Kind) - int(b.Kind) })
	for _, t := range all {
		var err error
		if cfg.Standby {
			t.Store.Lock, err = cachestore.Await(ctx, t.Store.Dir)
		} else {
			t.Store.Lock, err = cachestore.Lock(ctx, t.Store.Dir, t.Store.LockWait, cfg.AskOwner)
		}
		if err == nil {
			l.tiers = append(l.tiers, t)
			continue
		}
		l.fail(t, err)
		if errors.Is(err, cachestore.ErrTaken) || ctx.Err() != nil {
			l.close()
			return nil, err
		}
	}
	if len(l.tiers) == 0 {
		return nil, l.why()
	}
	return l, nil
}

func (l *Locks) close() {
	for _, t := range l.tiers {
		t.Store.Lock.Close()
	}
}

func (l *Locks) fail(t Tier, err error) {
	l.failed = append(l.failed, Status{Dir: t.Store.Dir, Kind: t.Kind, Err: err})
}

// why is what the tiers that failed say.
func (l *Locks) why() error {
	var errs []error
	for _, f := range l.failed {
		errs = append(errs, f.Err)
	}
	return errors.Join(errs...)
}

// Open opens the tiers, whose locks are the cache's from now on, also if that fails.
func (l *Locks) Open() (*Cache, error) {
	c := &Cache{log: l.log}
	if len(l.tiers)+len(l.failed) > 1 {
		id := identity(l.tiers)
		for i := range l.tiers {
			l.tiers[i].Store.Identity = &id
		}
	}
	for _, t := range l.tiers {
		s, err := cachestore.Open(t.Store)
		if err != nil {
			l.fail(t, err)
			continue
		}
		c.tiers = append(c.tiers, &tier{Store: s, kind: t.Kind, dir: t.Store.Dir, margin: min(s.Capacity()/marginShare, mostMargin)})
	}
	if len(c.tiers) == 0 {
		return nil, l.why()
	}
	for _, f := range l.failed {
		c.log.Error("a tier cannot be opened: the cache does without it until the next start", "dir", f.Dir, "err", f.Err)
	}
	c.failed = l.failed
	c.start()
	return c, nil
}

// Open is Lock and Open.
func Open(ctx context.Context, cfg Config) (*Cache, error) {
	l, err := Lock(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return l.Open()
}

// identity is the worker's: that of the fastest tier which has one and outlives the machine, or else that of any, or a new
// one. All tiers keep it then, so that they may come and go.
func identity(all []Tier) cachestore.Identity {
	for _, durable := range []bool{true, false} {
		for _, t := range all {
			if id, err := cachestore.ReadIdentity(t.Store.Dir); err == nil && durable == (t.Kind != Memory) {
				return id
			}
		}
	}
	return cachestore.NewIdentity()
}

// start begins to move.
func (c *Cache) start() {
	for i, t := range c.tiers {
		t.OnEvict(func(id object.ID) { c.evicted(i, id) })
	}
	c.mover.init()
	if len(c.tiers) == 1 {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	c.running.Go(func() { c.run(ctx) })
}

// halt ends the mover.
func (c *Cache) halt() {
	if c.stop != nil {
		c.stop()
	}
	c.running.Wait()
}

// Home is the directory of the fastest tier that outlives the machine, if there is one: for what else is to be kept.
func (c *Cache) Home() string {
	for _, t := range c.tiers {
		if t.kind != Memory {
			return t.dir
		}
	}
	return c.tiers[0].dir
}

// UUID is the worker's, kept with the cache.
func (c *Cache) UUID() uuid.UUID { return c.tiers[0].UUID() }

// NodeKey is the secret under which principals are made, kept with the cache.
func (c *Cache) NodeKey() []byte { return c.tiers[0].NodeKey() }

// OnEvict sets what is called when an object's file was unlinked, or another one is to be read in its place. It is
// called without locks held, possibly by several goroutines at once, and must not wait for a Put.
func (c *Cache) OnEvict(f func(object.ID)) { c.moved.Store(&f) }

// Open leases the file of an object that has most of it, or a new one: in the fastest tier that has room for it, or is the last
// that takes it. Errors are those of [cachestore.Store.Open].
func (c *Cache) Open(obj object.Object) (*cachestore.File, error) {
	if len(c.tiers) == 1 {
		return c.tiers[0].Open(obj)
	}
	id := obj.ID()
	var not tierSet
	for {
		i := c.best(id, not)
		if i < 0 {
			f, err := c.make(obj, id, not)
			if f != nil || err != nil {
				return f, err
			}
			continue
		}
		f, err := c.tiers[i].OpenCached(obj)
		switch {
		case err != nil:
			not |= 1 << i // its disk: another tier
		case f != nil:
			c.used(id, i, f.Asked(), f.Complete())
			return f, nil
		} // else it has just gone from there
	}
}

// tierSet has a bit for each tier.
type tierSet uint

func (s tierSet) has(i int) bool { return s>>i&1 == 1 }

// best is the tier with the file to read; -1 for none.
func (c *Cache) best(id object.ID, not tierSet) (best int) {
	best, _ = c.look(id, not)
	return best
}

func (c *Cache) look(id object.ID, not tierSet) (best int, info cachestore.Info) {
	best = -1
	for i, t := range c.tiers {
		if not.has(i) {
			continue
		}
		in := t.Peek(id)
		if in.Exists && (best < 0 || in.Complete && !info.Complete || in.Complete == info.Complete && in.PresentBytes > info.PresentBytes) {
			best, info = i, in
		}
	}
	return best, info
}

// make makes the file of an object; nil if somebody else has.
func (c *Cache) make(obj object.Object, id object.ID, not tierSet) (f *cachestore.File, err error) {
	m := &c.making[id[0]%byte(len(c.making))]
	m.Lock()
	defer m.Unlock()
	if c.best(id, not) >= 0 {
		return nil, nil
	}
	for _, t := range c.places(obj.Size, not) {
		if f, err = t.Open(obj); err == nil {
			return f, nil
		}
	}
	return nil, err
}

// places are the tiers in which to make a file of that size, in the order to try.
func (c *Cache) places(size int64, not tierSet) (order []*tier) {
	var full []*tier
	for i, t := range c.tiers {
		if not.has(i) || !t.takes(size) {
			continue
		}
		free := t.Free()
		if free < size+t.margin {
			c.kick()
		}
		if free >= size {
			order = append(order, t)
		} else {
			full = append(full, t)
		}
	}
	slices.Reverse(full) // one of them evicts: the slowest
	if order = append(order, full...); len(order) == 0 {
		order = c.tiers[len(c.tiers)-1:] // which says why not
	}
	return order
}

// takes reports whether a file of that size can be made.
func (t *tier) takes(size int64) bool { return size <= t.Capacity()/2 && t.Accepts() }

// Use says that an object was opened whose file the caller has.
func (c *Cache) Use(id object.ID) {
	i, in := c.look(id, 0)
	if i >= 0 {
		c.used(id, i, c.tiers[i].Ask(id), in.Complete)
	}
}

// Bring reads objects that are complete; see [cachestore.Store.Bring].
func (c *Cache) Bring(ids []object.ID, got func(object.ID, []byte)) {
	in := make([][]object.ID, len(c.tiers))
	for _, id := range ids {
		if i := c.best(id, 0); i >= 0 {
			in[i] = append(in[i], id)
		}
	}
	for i, ids := range in {
		c.tiers[i].Bring(ids, got)
	}
}

// used considers an object of a slower tier for a faster one.
func (c *Cache) used(id object.ID, in int, asked uint8, complete bool) {
	c.uses.Add(1)
	if in > 0 && asked > 0 && complete && slices.ContainsFunc(c.tiers[:in], func(t *tier) bool { return t.Free() > t.margin || t.Admits(asked) }) {
		c.want(id)
	}
}

// Peek tells what is cached of an object, by the file that Open leases.
func (c *Cache) Peek(id object.ID) cachestore.Info {
	if len(c.tiers) == 1 {
		return c.tiers[0].Peek(id)
	}
	_, info := c.look(id, 0)
	return info
}

// Grant remembers that the under store answered p for obj at that time, where a tier has something of it.
func (c *Cache) Grant(obj object.Object, p object.Principal, at time.Time) {
	for _, t := range c.tiers {
		t.Grant(obj, p, at)
	}
}

// Granted reports whether p may be served cached bytes of the object.
func (c *Cache) Granted(id object.ID, p object.Principal) bool {
	return slices.ContainsFunc(c.tiers, func(t *tier) bool { return t.Granted(id, p) })
}

// Revoke voids all grants of p in a store. It survives a restart.
func (c *Cache) Revoke(p object.Principal, store object.Store) {
	for _, t := range c.tiers {
		t.Revoke(p, store)
	}
}

// Evict takes an object's files and its tail away now, pinned or not; open ones are read on. It reports whether there was one.
func (c *Cache) Evict(id object.ID) (had bool) {
	for _, t := range c.tiers {
		had = t.Evict(id) || had
		had = t.EvictTail(id) || had
	}
	return had
}

// Unlinked reports whether somebody holds a file of the object that was evicted.
func (c *Cache) Unlinked(id object.ID) bool {
	return slices.ContainsFunc(c.tiers, func(t *tier) bool { return t.Unlinked(id) })
}

// evicted is called by a tier that has evicted a file.
func (c *Cache) evicted(from int, id object.ID) {
	for i, t := range c.tiers {
		if i < from && t.Peek(id).Complete {
			return // what is read is that one
		}
		if i > from {
			t.Spare(id, false)
		}
	}
	c.tell(id)
}

func (c *Cache) tell(id object.ID) {
	if f := c.moved.Load(); f != nil {
		(*f)(id)
	}
}

// Sum counts the cached objects that are wanted, each once: see [cachestore.Store.Sum].
func (c *Cache) Sum(ctx context.Context, want func(object.Store) func(key []byte) bool) (sum cachestore.Sum, err error) {
	stores := map[object.Store]func([]byte) bool{}
	once := func(s object.Store) func([]byte) bool {
		f, met := stores[s]
		if !met {
			f = want(s)
			stores[s] = f
		}
		return f
	}
	for i, t := range c.tiers {
		part, err := t.Sum(ctx, once, func(id object.ID) bool { return len(c.tiers) == 1 || c.best(id, 0) == i })
		if err != nil {
			return cachestore.Sum{}, err
		}
		sum.Objects += part.Objects
		sum.CompleteObjects += part.CompleteObjects
		sum.PresentBytes += part.PresentBytes
	}
	for _, f := range stores {
		if f != nil {
			sum.Stores++
		}
	}
	return sum, nil
}

// IDs are the objects that are wanted, as for Sum, and of which there is something, be it the tail; each once.
func (c *Cache) IDs(ctx context.Context, want func(object.Store) func(key []byte) bool) ([]object.ID, error) {
	return c.collect(func(t *tier) ([]object.ID, error) { return t.IDs(ctx, want) })
}

// Older are the objects of which something has been cached for longer than limit says, in whatever tier, as for
// [cachestore.Store.Older]; each once, and none that is pinned.
func (c *Cache) Older(ctx context.Context, limit func(object.Store) func(key []byte) time.Time) ([]object.ID, error) {
	ids, err := c.collect(func(t *tier) ([]object.ID, error) { return t.Older(ctx, limit) })
	return slices.DeleteFunc(ids, func(id object.ID) bool {
		return slices.ContainsFunc(c.tiers, func(t *tier) bool { return t.Pinned(id) })
	}), err
}

func (c *Cache) collect(of func(*tier) ([]object.ID, error)) (ids []object.ID, err error) {
	for _, t := range c.tiers {
		part, err := of(t)
		if err != nil {
			return nil, err
		}
		ids = append(ids, part...)
	}
	slices.SortFunc(ids, func(a, b object.ID) int { return bytes.Compare(a[:], b[:]) })
	return slices.Compact(ids), nil
}

// Status is one tier's.
type Status struct {
	Dir  string
	Kind Kind
	cachestore.Stats
	ReceivedBytes int64 // from other tiers, since the start
	Err           error // why it could not be opened; nil if it was
}

// Tiers tells of each tier, those that could not be opened behind the others.
func (c *Cache) Tiers() []Status {
	var all []Status
	for _, t := range c.tiers {
		all = append(all, Status{Dir: named(t.dir), Kind: t.kind, Stats: t.Stats(), ReceivedBytes: t.received.Load()})
	}
	return append(all, c.failed...)
}

// named is a directory's name, where it was given by descriptor.
func named(dir string) string {
	if name, err := os.Readlink(dir); err == nil && strings.HasPrefix(dir, "/proc/self/fd/") {
		return name
	}
	return dir
}

// Stats are those of all tiers together: what is in two of them counts in both.
func (c *Cache) Stats() (all cachestore.Stats) {
	all = c.tiers[0].Stats()
	for _, t := range c.tiers[1:] {
		all = all.Plus(t.Stats())
	}
	return all
}

// Free is how many bytes can be put without evicting anybody.
func (c *Cache) Free() (bytes int64) {
	for _, t := range c.tiers {
		bytes += t.Free()
	}
	return bytes
}

// KeepTail keeps the object's last bytes in the fastest tier that can. Tails do not move.
func (c *Cache) KeepTail(obj object.Object, last []byte) (err error) {
	for _, t := range c.tiers {
		if err = t.KeepTail(obj, last); err == nil {
			return nil
		}
	}
	return err
}

// ReadTail is [cachestore.Store.ReadTail] of the tier that has it.
func (c *Cache) ReadTail(obj object.Object, p []byte, off int64) bool {
	return slices.ContainsFunc(c.tiers, func(t *tier) bool { return t.ReadTail(obj, p, off) })
}

// TailBytes is how long the object's tail is; 0 if it has none.
func (c *Cache) TailBytes(id object.ID) (n int64) {
	for _, t := range c.tiers {
		n = max(n, t.TailBytes(id))
	}
	return n
}

// HandOver is [cachestore.Store.HandOver] of all tiers.
func (c *Cache) HandOver() error {
	c.halt()
	return c.each((*cachestore.Store).HandOver)
}

// Close ends what is being moved, and closes all tiers.
func (c *Cache) Close() error {
	c.halt()
	return c.each((*cachestore.Store).Close)
}

func (c *Cache) each(do func(*cachestore.Store) error) (err error) {
	for _, t := range c.tiers {
		err = errors.Join(err, do(t.Store))
	}
	return err
}
