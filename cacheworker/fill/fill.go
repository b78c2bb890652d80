// Package fill brings absent chunks of objects from their under stores into the cache.
//
// A chunk is fetched once, however many wait for it: all readers of the object, all
// principals. The fetch belongs to all of them; the last one out cancels it. A reader gets bytes
// as soon as they arrive, and only under a grant of its own principal (the store answered its
// own GET or HEAD). A chunk is known here until it is on the disk, or, where the cache has no
// room, as long as a small memory keeps it. Bytes in memory are bounded, and a
// foreground read never waits for read-ahead to give way.
package fill

import (
	"container/list"
	"context"
	"errors"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/fill/parquet"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

const (
	mib           = 1 << 20
	minInFlight   = 8 * mib
	lostFor       = 2 * time.Second // so long a version is known to be gone without asking
	maxQueue      = 4096            // objects waiting to be completed
	minStreamRead = 256 << 10       // bytes read in a row before there is read-ahead
	firstWindow   = 32 * mib        // that a stream's window may grow to without asking how the store is
	leastFlight   = 8 * mib         // that a stream may have on its way however slow it is
	directPuts    = 4               // at once: as many as a disk likes
)

// Config of [Fills]. The zero value works.
type Config struct {
	MaxInFlightBytes int64         // fetched and not yet on the disk; 0 means 160 MiB, at least 8 MiB
	MaxRequests      int           // GETs at once; 0 means 32, at least 4
	MaxGetBytes      int64         // of one GET; 0 means 8 MiB
	MaxWindowBytes   int64         // read ahead of one stream; 0 means 128 MiB
	RecentBytes      int64         // chunks in memory for which the cache has no room; 0 means 64 MiB
	Pardoned         int           // reads that are answered in all files after one was declined wrongly; 0 means 32, below 0 means none
	CompleteWorkers  int           // objects completed in the background at once; 0 means 1
	GrantTTL         time.Duration // of objects for which the cache has no room; 0 means 24 h
	Log              *slog.Logger
}

func (c Config) withDefaults() Config {
	def := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&c.MaxInFlightBytes, 160*mib)
	def(&c.MaxGetBytes, 8*mib)
	def(&c.MaxWindowBytes, 128*mib)
	def(&c.RecentBytes, 64*mib)
	c.MaxInFlightBytes = max(c.MaxInFlightBytes, minInFlight)
	c.MaxGetBytes = min(c.MaxGetBytes, c.MaxInFlightBytes/4)
	if c.MaxRequests <= 0 {
		c.MaxRequests = 32
	}
	c.MaxRequests = max(c.MaxRequests, 4)
	c.CompleteWorkers = max(c.CompleteWorkers, 1)
	if c.Pardoned == 0 {
		c.Pardoned = 32
	}
	if c.GrantTTL <= 0 {
		c.GrantTTL = 24 * time.Hour
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Store keeps what was fetched: one tier, or several.
type Store interface {
	Open(object.Object) (*cachestore.File, error)
	Peek(object.ID) cachestore.Info
	Grant(obj object.Object, p object.Principal, at time.Time)
	Granted(object.ID, object.Principal) bool
	Revoke(object.Principal, object.Store)

	KeepTail(obj object.Object, last []byte) error
	ReadTail(obj object.Object, p []byte, off int64) bool
	TailBytes(object.ID) int64
	Stats() cachestore.Stats
	Free() int64 // bytes that can be put without evicting anybody
}

// Fills is what all readers share.
type Fills struct {
	cfg    Config
	store  Store
	budget *budget
	bufs   buffers
	wg     sync.WaitGroup // fetches, HEADs, completers, learners

	// direct holds one entry per Put under way that goes past the page cache, and writers one per Put that copies. Those are
	// for a disk that is behind, and few, because bytes that arrive have the processors first: readers wait for
	// them, and for the disk nobody does until the memory is used up.
	direct, writers chan struct{}
	count           counters
	nready          atomic.Int64 // length of ready
	pardons         atomic.Int32 // see Decline

	mu      sync.Mutex // guards everything below, and the chunks; never held across I/O
	closed  bool
	sealed  bool   // nothing is completed any more
	gen     uint64 // counts chunks that were stored and left the map
	chunks  map[chunkKey]*chunk
	fetches map[*fetch]struct{}
	heads   map[headKey]*head
	lost    map[object.ID]lost
	paces   map[object.Store]pace
	recent  list.List // of *chunk with all bytes and no place in the cache; youngest in front
	held    int64     // bytes in recent
	ready   list.List // of *chunk that was read ahead and is on the disk, and waits for its reader; the last one stored at the back
	ahead   int       // readers that are reading ahead
	through int       // open readers for which the cache has no room
	grants  map[headKey]memoryGrant
	refused map[refusal]time.Time
	layouts map[object.ID]parquet.Layout
	queue   []job
	queued  map[object.ID]struct{}
	workers int

	layoutParts int           // in layouts
	learners    chan struct{} // holds one entry per footer that is being looked into

	completer func() // completes what is queued
	stop      context.CancelFunc
}

// lost is a version that the store no longer has.
type lost struct {
	err error
	at  time.Time
}

// Stats are counters since the start, except where they say now.
type Stats struct {
	Gets           uint64 // requests
	FetchedBytes   uint64 // from the under stores
	AheadBytes     uint64 // of them, fetched before anybody asked: read ahead, or to complete the object
	ForeseenBytes  uint64 // of AheadBytes, in chunks that were read since, or in files that were given away
	WastedBytes    uint64 // of AheadBytes, in chunks that were evicted or dropped before that
	HitChunks      uint64 // that reads touched and the cache had
	MissChunks     uint64 // that reads touched and had to wait for, or to get from memory
	DiskBytes      uint64 // served from cache files
	MemoryBytes    uint64 // served from chunks in memory
	StoreBytes     uint64 // served from chunks whose bytes the reader waited for
	Joined         uint64 // chunks waited for that somebody else had asked for
	Heads          uint64 // requests for a grant
	Canceled       uint64 // GETs given up because nobody waited
	Completed      uint64 // objects completed in the background
	InFlightBytes  int64  // now
	MemoryHeld     int64  // now, of chunks for which the cache has no room
	CompletesQueue int    // now

	InFlightLimit int64  // of InFlightBytes
	Waiting       int    // now, fetches that wait for memory or a request
	Unwritten     int64  // now, chunks that are whole and not on the disk yet
	Denied        uint64 // times that a store refused a principal, which lost its grants there
}

// Usage is what was read and fetched for somebody. The zero value is ready; all of it are counters.
type Usage struct {
	DiskBytes   atomic.Uint64 // given from cache files
	MemoryBytes atomic.Uint64 // given from chunks that were in memory
	StoreBytes  atomic.Uint64 // given from chunks whose bytes the reader waited for
	Fetched     atomic.Uint64 // bytes from the under stores
	Hits        atomic.Uint64 // chunks that the cache had
	Misses      atomic.Uint64
	Passed      atomic.Uint64 // sizes of files whose reading the kernel was given
}

type counters struct {
	hits, misses, gets, fetched, ahead, foreseen, wasted, disk, memory, store, joined, heads, canceled, completed, denied atomic.Uint64
	unwritten                                                                                                             atomic.Int64
}

// New returns fills into store. Close must be called before the store's.
func New(cfg Config, store Store) *Fills {
	cfg = cfg.withDefaults()
	f := &Fills{
		cfg:     cfg,
		store:   store,
		budget:  newBudget(cfg.MaxInFlightBytes, cfg.MaxRequests),
		direct:  make(chan struct{}, directPuts),
		writers: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
		chunks:  map[chunkKey]*chunk{},
		fetches: map[*fetch]struct{}{},
		heads:   map[headKey]*head{},
		lost:    map[object.ID]lost{},
		paces:   map[object.Store]pace{},
		queued:  map[object.ID]struct{}{},
		grants:  map[headKey]memoryGrant{},
		refused: map[refusal]time.Time{},
		layouts: map[object.ID]parquet.Layout{},

		learners: make(chan struct{}, learners),
	}
	ctx, stop := context.WithCancel(context.Background())
	f.budget.feed = f.feed
	f.completer, f.stop = func() { f.work(ctx) }, stop
	return f
}

// Close cancels all fetches, whose readers get an error, and waits for their ends.
func (f *Fills) Close() error {
	f.mu.Lock()
	f.closed = true
	f.stop()
	for ft := range f.fetches {
		ft.cancel()
	}
	for _, h := range f.heads {
		h.cancel()
	}
	f.mu.Unlock()
	f.wg.Wait()
	f.mu.Lock()
	for f.recent.Len() > 0 {
		f.forget(f.recent.Front().Value.(*chunk))
	}
	for f.ready.Len() > 0 {
		f.dropReady(f.ready.Front().Value.(*chunk))
	}
	f.mu.Unlock()
	f.bufs.close()
	return nil
}

// Stats returns the counters.
func (f *Fills) Stats() Stats {
	f.mu.Lock()
	held, queue := f.held, len(f.queue)
	f.mu.Unlock()
	onDisk := f.store.Stats()
	return Stats{
		Gets:           f.count.gets.Load(),
		FetchedBytes:   f.count.fetched.Load(),
		AheadBytes:     f.count.ahead.Load(),
		ForeseenBytes:  f.count.foreseen.Load() + uint64(onDisk.ForeseenBytes),
		WastedBytes:    f.count.wasted.Load() + uint64(onDisk.WastedBytes),
		HitChunks:      f.count.hits.Load(),
		MissChunks:     f.count.misses.Load(),
		DiskBytes:      f.count.disk.Load(),
		MemoryBytes:    f.count.memory.Load(),
		StoreBytes:     f.count.store.Load(),
		Joined:         f.count.joined.Load(),
		Heads:          f.count.heads.Load(),
		Canceled:       f.count.canceled.Load(),
		Completed:      f.count.completed.Load(),
		InFlightBytes:  f.budget.used(),
		InFlightLimit:  f.budget.total,
		Waiting:        f.budget.waiting(),
		Unwritten:      f.count.unwritten.Load(),
		Denied:         f.count.denied.Load(),
		MemoryHeld:     held,
		CompletesQueue: queue,
	}
}

// Open returns a reader of obj that fetches with src. It does no I/O.
func (f *Fills) Open(obj object.Object, src source.Source) *Reader {
	return &Reader{f: f, obj: obj, id: obj.ID(), src: src, principal: src.Principal(), usage: new(Usage)}
}

// For has what is read and fetched counted for somebody. It has to come before the first read.
func (r *Reader) For(u *Usage) *Reader {
	if u != nil {
		r.usage = u
	}
	return r
}

var errClosed = errors.New("reader or cache is closed")

// lostErr says why the version cannot be fetched, if that is known. Requires f.mu.
func (f *Fills) lostErr(id object.ID) error {
	l, ok := f.lost[id]
	if ok && time.Since(l.at) > lostFor {
		delete(f.lost, id)
		return nil
	}
	return l.err
}

// lose remembers for a moment that the version is gone. Requires f.mu.
func (f *Fills) lose(id object.ID, err error) {
	if !errors.Is(err, object.ErrChanged) && !errors.Is(err, object.ErrNotFound) {
		return
	}
	now := time.Now()
	if len(f.lost) > 1000 {
		for k, l := range f.lost {
			if now.Sub(l.at) > lostFor {
				delete(f.lost, k)
			}
		}
	}
	f.lost[id] = lost{err, now}
}
