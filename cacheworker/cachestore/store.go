// Package cachestore keeps cache files: one sparse local file per object, in one tier
// directory with a capacity.
//
// A chunk, once present, never changes. Hence a reader needs no lock, a descriptor can be
// given away, and eviction is unlink. A chunk's index record is written after its bytes, so
// after a SIGKILL the index tells the truth; after another boot of the machine every chunk
// is checked against its checksum before its first use, and a bad one is a miss.
//
// Bytes are counted until they have left the disk: an evicted file that somebody outside
// still holds (a descriptor, a mapping, a backing file of a FUSE mount) stays in the folder
// "held" and in the count until a write lease on it (F_SETLEASE) says that nobody does.
package cachestore

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/bits"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/uuid"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/policy"
)

// Config is one tier.
type Config struct {
	Dir     string // of the tier, existing; owned by this process; may be /proc/self/fd/N
	ViewDir string // the same directory through a read-only mount; "" means that no descriptor can be given away

	CapacityBytes int64 // of cache files, whole blocks; 0 means nine tenths of the file system. The index is not in it
	MinFreeBytes  int64 // of the file system, kept free by evicting; never less than 8 MiB, which the index needs
	MinFreeInodes int64

	BootID   string        // of the machine; "" reads /proc/sys/kernel/random/boot_id
	Identity *Identity     // of the worker; nil means the one that is kept here, or a new one
	Lock     *os.File      // from Await or Lock, and the store's from Open on, also when that fails; nil has Open take it
	LockWait time.Duration // for another process that has the directory; 0 means 10 s
	AskOwner func()        // called now and then while another process has the directory, to ask that one for it; may be nil
	GrantTTL time.Duration // 0 means 24 h
	Log      *slog.Logger  // nil means slog.Default()

	sys  system // nil is the kernel
	disk vfs.FS // of the index; nil is the kernel's
}

// Store is one tier of cache files. All methods are safe for concurrent use.
type Store struct {
	cfg      Config
	log      *slog.Logger
	dir      dir
	view     dir // zero without Config.ViewDir
	lock     *os.File
	indexDir dir
	index    *index
	uuid     uuid.UUID
	nodeKey  []byte
	epoch    uint32 // of this boot; a chunk record of another epoch is unverified

	unclean bool // the last stop was; set by begin

	quit  context.CancelFunc
	work  sync.WaitGroup // what quit ends
	views sync.WaitGroup // write-backs that Views wait for
	swept chan struct{}  // closed when the janitor has looked at all files

	load loading

	onEvict atomic.Pointer[func(object.ID)]
	counters
	revokedUnsaved atomic.Bool // a revocation is not in the index

	noLeases sync.Once

	handed   atomic.Bool  // another process has the directory
	indirect atomic.Bool  // the file system has refused to write past the page cache
	writing  sync.RWMutex // held for reading by whoever makes or writes a cache file; taken before evicting

	evicting sync.Mutex // one eviction or probe at a time; held across its file I/O, taken before mu

	mu         sync.Mutex // guards the fields below; never held across file I/O
	closed     bool
	entries    map[object.ID]*entry
	policy     *policy.Cache[object.ID] // of all entries
	leased     int                      // entries with leases: eviction passes over them
	cached     int64                    // bytes of present chunks of entries
	verified   int64                    // bytes of those that are verified
	uses       int64                    // Opens and Puts
	backlog    backlog
	idle       chan struct{}        // closed when the next write-back ends; may be nil
	complete   int                  // entries complete and verified, but for tails
	tails      int                  // entries that are
	pins       int                  // entries that are pinned
	pinned     int64                // bytes on disk of them
	live       int64                // bytes on disk of entries, and reserved for Puts in flight
	held       map[heldKey]int64    // evicted files that are not gone yet: bytes on disk
	stuck      map[heldKey]struct{} // those of them that are still in their old place
	heldBytes  int64                // sum of held
	probedAt   time.Time
	troubleAt  time.Time // of the last refusal by the file system
	troubled   int       // refusals since it was said that there are none
	fsRoom     room      // as of fsAt, less what was written since
	fsAt       time.Time
	storeIDs   map[object.Store]uint32
	stores     []object.Store
	principals map[object.Principal]uint32
	revoked    map[revocation]int64 // grants up to then (unix nanoseconds) are void
}

type counters struct {
	evictions, evictedBytes        atomic.Int64
	rejected, badChunks, putErrors atomic.Int64
	scrubbed                       atomic.Int64
	unread, foreseen, wasted       atomic.Int64
}

// Stats is a snapshot.
type Stats struct {
	CapacityBytes   int64
	CachedBytes     int64 // of present chunks of live files
	UnverifiedBytes int64 // of those: of chunks that are checked before their first use
	Reading         bool  // the index: what is cached is not known yet, all above is what was read of it
	DiskBytes       int64 // whole blocks of live files, room taken for Puts in flight, and UnlinkedBytes; at most CapacityBytes
	UnlinkedBytes   int64 // of evicted files that somebody still holds
	Objects         int
	CompleteObjects int // complete and verified
	LeasedObjects   int
	UnlinkedFiles   int
	Healthy         bool // the disk has refused nothing within the last minute
	PinnedObjects   int
	PinnedBytes     int64 // on disk

	Evictions    int64 // since the start, as all below
	EvictedBytes int64 // of present chunks
	Rejected     int64 // Opens and Puts that found no room
	BadChunks    int64 // chunks that were not what their sum says, or not there
	PutErrors    int64 // Puts that the file system or the index refused

	ScrubbedBytes int64 // of chunks that were looked at in the background

	UnreadBytes   int64 // now, of chunks that were put before anybody asked for them, and that nobody has read
	ForeseenBytes int64 // of such chunks, read since
	WastedBytes   int64 // evicted before anybody has
}

// Plus are the stats of two tiers together.
func (s Stats) Plus(o Stats) Stats {
	s.Reading, s.Healthy = s.Reading || o.Reading, s.Healthy && o.Healthy
	for _, n := range []struct {
		of   *int64
		more int64
	}{
		{&s.CapacityBytes, o.CapacityBytes}, {&s.CachedBytes, o.CachedBytes}, {&s.UnverifiedBytes, o.UnverifiedBytes},
		{&s.DiskBytes, o.DiskBytes}, {&s.UnlinkedBytes, o.UnlinkedBytes}, {&s.PinnedBytes, o.PinnedBytes},
		{&s.Evictions, o.Evictions}, {&s.EvictedBytes, o.EvictedBytes}, {&s.Rejected, o.Rejected},
		{&s.BadChunks, o.BadChunks}, {&s.PutErrors, o.PutErrors}, {&s.ScrubbedBytes, o.ScrubbedBytes},
		{&s.UnreadBytes, o.UnreadBytes}, {&s.ForeseenBytes, o.ForeseenBytes}, {&s.WastedBytes, o.WastedBytes},
	} {
		*n.of += n.more
	}
	s.Objects += o.Objects
	s.CompleteObjects += o.CompleteObjects
	s.LeasedObjects += o.LeasedObjects
	s.UnlinkedFiles += o.UnlinkedFiles
	s.PinnedObjects += o.PinnedObjects
	return s
}

// Info is what [Store.Peek] knows.
type Info struct {
	Exists       bool
	Complete     bool // present and verified, every chunk
	PresentBytes int64
}

// Open opens the tier: takes its lock and the index, which is read while the store is in use. An index
// that cannot be opened is removed together with all cache files.
func Open(cfg Config) (*Store, error) {
	s, err := prepare(cfg)
	if err != nil {
		return nil, fmt.Errorf("open cache %s: %w", cfg.Dir, err)
	}
	s.start()
	return s, nil
}

// prepare is Open but for the janitor.
func prepare(cfg Config) (_ *Store, err error) {
	s := &Store{
		cfg: cfg, log: cfg.Log, lock: cfg.Lock, swept: make(chan struct{}),
		entries: make(map[object.ID]*entry), held: make(map[heldKey]int64), stuck: make(map[heldKey]struct{}),
		storeIDs: make(map[object.Store]uint32), principals: make(map[object.Principal]uint32),
		revoked: make(map[revocation]int64), backlog: backlog{more: make(chan struct{}, 1)},
		load: loading{done: make(chan struct{}), late: make(chan struct{}), asked: make(map[object.ID]struct{})},
	}
	defer func() {
		if err != nil {
			s.closeFiles()
			s.lock.Close()
		}
	}()
	if err := s.setDefaults(); err != nil {
		return nil, err
	}
	if s.dir, err = openDir(cfg.Dir, s.cfg.sys); err != nil {
		return nil, err
	}
	if cfg.ViewDir != "" {
		if s.view, err = openDir(cfg.ViewDir, s.cfg.sys); err != nil {
			return nil, err
		}
	}
	if s.lock == nil {
		if s.lock, err = s.dir.lock(context.Background(), s.cfg.LockWait, cfg.AskOwner); err != nil {
			return nil, err
		}
	}
	if s.fsRoom, err = s.dir.room(); err != nil {
		return nil, err
	}
	if s.cfg.CapacityBytes == 0 {
		s.cfg.CapacityBytes = s.fsRoom.totalBytes / 10 * 9
	}
	s.policy = policy.New[object.ID](s.cfg.CapacityBytes)
	if err := s.openIdentity(); err != nil {
		return nil, err
	}
	return s, s.recover()
}

func (s *Store) start() {
	ctx, cancel := context.WithCancel(context.Background())
	s.quit = cancel
	late := time.AfterFunc(loadWait, func() { close(s.load.late) })
	context.AfterFunc(ctx, func() { late.Stop() })
	s.work.Go(func() { s.janitor(ctx) })
	s.work.Go(func() { s.scrub(ctx) })
	s.work.Go(func() { s.writeBackAll(ctx) })
}

const lockWait = 10 * time.Second

// minHeadroom of the file system is left to the index: a full disk must not stop it.
const minHeadroom = 8 << 20

func (s *Store) setDefaults() error {
	c := &s.cfg
	if c.CapacityBytes < 0 || c.MinFreeBytes < 0 || c.MinFreeInodes < 0 {
		return fmt.Errorf("%w: negative capacity or free room", object.ErrInvalid)
	}
	c.MinFreeBytes = max(c.MinFreeBytes, minHeadroom)
	c.LockWait = cmp.Or(c.LockWait, lockWait)
	if c.GrantTTL == 0 {
		c.GrantTTL = 24 * time.Hour
	}
	if c.sys == nil {
		c.sys = kernel{}
	}
	if c.disk == nil {
		c.disk = vfs.Default
	}
	if c.Log == nil {
		s.log = slog.Default()
	}
	if c.BootID == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return err
		}
		c.BootID = strings.TrimSpace(string(b))
	}
	return nil
}

// UUID is the worker's, kept with the cache.
func (s *Store) UUID() uuid.UUID { return s.uuid }

// NodeKey is the secret under which principals are made, kept with the cache.
func (s *Store) NodeKey() []byte { return s.nodeKey }

// OnEvict sets what is called after a file was unlinked, without locks held, possibly by
// several goroutines at once. It must not wait for a Put.
func (s *Store) OnEvict(f func(object.ID)) { s.onEvict.Store(&f) }

// Peek tells what is cached of an object, without a lease.
func (s *Store) Peek(id object.ID) Info {
	s.ensure(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil {
		return Info{}
	}
	return Info{Exists: true, Complete: e.complete(), PresentBytes: e.presentBytes()}
}

// Stats is cheap enough for every scrape.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{
		CapacityBytes: s.cfg.CapacityBytes, CachedBytes: s.cached, UnverifiedBytes: s.cached - s.verified, Reading: !s.load.over(),
		DiskBytes: s.live + s.heldBytes, UnlinkedBytes: s.heldBytes,
		Objects: len(s.entries) - s.tails, CompleteObjects: s.complete, LeasedObjects: s.leased, UnlinkedFiles: len(s.held),
		PinnedObjects: s.pins, PinnedBytes: s.pinned,
		Evictions: s.evictions.Load(), EvictedBytes: s.evictedBytes.Load(), Rejected: s.rejected.Load(),
		BadChunks: s.badChunks.Load(), PutErrors: s.putErrors.Load(), ScrubbedBytes: s.scrubbed.Load(),
		Healthy:     time.Since(s.troubleAt) > troubleOver && !s.index.isBroken() && !s.index.health.isSick(),
		UnreadBytes: s.unread.Load(), ForeseenBytes: s.foreseen.Load(), WastedBytes: s.wasted.Load(),
	}
}

// HandOver writes the index out and lets another process have the directory. What is present can
// still be opened and read, as long as that one keeps it; nothing is added, verified or evicted
// any more. Close has to follow.
func (s *Store) HandOver() error {
	s.handed.Store(true)
	return s.giveUp()
}

// Close writes the index out and gives the directory up. Files still open go on reading
// until they are closed; their Puts fail.
func (s *Store) Close() error {
	err := s.giveUp()
	s.handed.Store(false)
	s.lock.Close()
	s.closeFiles()
	return err
}

// giveUp ends all writing and gives the lock up.
func (s *Store) giveUp() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.quit()
	s.work.Wait()
	s.views.Wait()
	s.writing.Lock()
	defer s.writing.Unlock()
	s.evicting.Lock() // whoever evicts has ended
	defer s.evicting.Unlock()
	s.markClean()
	err := s.index.close()
	if !s.index.isStuck() { // else its database may still write
		s.lock.Close()
	}
	return err
}

func (s *Store) closeFiles() {
	files := []*os.File{s.view.f, s.dir.f}
	if s.index == nil || !s.index.isStuck() {
		files = append(files, s.indexDir.f)
	}
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// entry is one object's cache file. A million of them must fit: no more than some 200 bytes
// each, and no allocation per chunk.
type entry struct {
	policy.Node[object.ID] // Key, and bytes on disk: of present chunks and waste; under Store.mu
	nonce                  uint64
	size                   int64
	bits                   []atomic.Uint64 // first half: present chunks; second half: those of them verified
	present, verified      atomic.Int32    // how many
	file                   *file           // while leased; under Store.mu
	grants                 []grant         // under Store.mu
	waste                  []uint32        // chunks not present whose bytes are counted all the same; under Store.mu
	store                  uint32          // number of its object.Store
	puts, putsWritten      uint32          // puts so far, and those of them that are on the disk; under Store.mu
	indexed                bool            // may have records in the index; under Store.mu
	seen                   bool            // its file was found since the start; under Store.mu
	queued                 bool            // in Store.backlog; under Store.mu
	moving                 bool            // a Move wants to drop it; under Store.mu
	pinned                 bool            // under Store.mu
	tail                   bool            // of an object
	busy                   int8            // write-backs and Brings that have it open; under Store.mu
	evicted                atomic.Bool
	unread                 atomic.Pointer[[]atomic.Uint64] // marks, as bits; made under Store.mu
}

func newEntry(id object.ID, nonce uint64, size int64) *entry {
	e := &entry{Node: policy.Node[object.ID]{Key: id}, nonce: nonce, size: size, puts: 1} // by an earlier worker
	words := (e.chunks() + 63) / 64
	e.bits = make([]atomic.Uint64, 2*words)
	return e
}

func (e *entry) chunks() int { return object.Object{Size: e.size}.Chunks() }

func (e *entry) chunkLen(i int) int { return object.Object{Size: e.size}.ChunkLen(i) }

func (e *entry) isPresent(i int) bool { return e.bits[i/64].Load()>>(i%64)&1 == 1 }

func (e *entry) isVerified(i int) bool {
	return e.bits[len(e.bits)/2+i/64].Load()>>(i%64)&1 == 1
}

func (e *entry) complete() bool { return int(e.verified.Load()) == e.chunks() }

// whole reports whether the entry counts as a complete object.
func (e *entry) whole() bool { return !e.tail && e.complete() }

// setPresent and setVerified report whether the bit is new. Present is set first and taken
// away last, so a verified chunk is always present.
func (e *entry) setPresent(i int) bool {
	if e.bits[i/64].Or(1<<(i%64))>>(i%64)&1 == 1 {
		return false
	}
	e.present.Add(1)
	return true
}

func (e *entry) setVerified(i int) bool {
	if e.bits[len(e.bits)/2+i/64].Or(1<<(i%64))>>(i%64)&1 == 1 {
		return false
	}
	e.verified.Add(1)
	return true
}

// clear takes a chunk away and reports what it was.
func (e *entry) clear(i int) (present, verified bool) {
	mask := ^(uint64(1) << (i % 64))
	if verified = e.bits[len(e.bits)/2+i/64].And(mask)>>(i%64)&1 == 1; verified {
		e.verified.Add(-1)
	}
	if present = e.bits[i/64].And(mask)>>(i%64)&1 == 1; present {
		e.present.Add(-1)
	}
	return present, verified
}

// presentBytes are those of the chunks, not of the disk.
func (e *entry) presentBytes() int64 { return e.bytesOf(e.present.Load(), e.isPresent) }

func (e *entry) verifiedBytes() int64 { return e.bytesOf(e.verified.Load(), e.isVerified) }

// bytesOf are those of so many chunks; one of them may be the last.
func (e *entry) bytesOf(chunks int32, has func(int) bool) int64 {
	n := int64(chunks) * object.ChunkSize
	if last := e.chunks() - 1; last >= 0 && has(last) {
		n -= object.ChunkSize - int64(e.chunkLen(last))
	}
	return n
}

// presentChunks calls f for each.
func (e *entry) presentChunks(f func(i int)) {
	for w := range len(e.bits) / 2 {
		for b := e.bits[w].Load(); b != 0; b &= b - 1 {
			f(w*64 + bits.TrailingZeros64(b))
		}
	}
}

func (s *Store) storeID(name object.Store) uint32 {
	id, ok := s.storeIDs[name]
	if !ok {
		id = uint32(len(s.stores))
		s.storeIDs[name] = id
		s.stores = append(s.stores, name)
	}
	return id
}

func newNonce() uint64 {
	var b [8]byte
	rand.Read(b[:])
	return binary.BigEndian.Uint64(b[:])
}

// deleteRecords forgets a file in the index. Without it (the index is broken) the next start
// finds records without a file and drops them.
func (s *Store) deleteRecords(id object.ID, nonce uint64) {
	s.index.deleteLater(filePrefix(id, nonce))
}
