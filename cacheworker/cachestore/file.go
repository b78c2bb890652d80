package cachestore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// file is the one open descriptor that all leases of an entry share. No lock is between it
// and its readers: os.File itself waits with closing for reads that are under way.
type file struct {
	open sync.Once
	f    *os.File // after open
	err  error    // after open

	verify sync.Mutex // one chunk at a time is checked; held across its reading
	direct direct

	leases  int              // under Store.mu
	putting map[int]*putting // under Store.mu
}

type putting struct {
	done chan struct{}
	err  error // once done
	paid bool  // the chunk's bytes are counted already: an earlier try failed, or they were bad
}

// File is a lease on an object's cache file: while it is open, eviction passes over it. Its
// methods are safe for concurrent use.
type File struct {
	s      *Store
	obj    object.Object
	e      *entry
	file   *file
	asked  uint8     // see Asked
	since  time.Time // something of the object is cached elsewhere, from where it comes; zero for nowhere
	closed atomic.Bool
}

// Open leases the cache file of an object, a new one if there is none. The error wraps
// object.ErrNoSpace: the object is larger than half the tier, or no file can be made. Read
// through then.
func (s *Store) Open(obj object.Object) (*File, error) { return s.openAs(obj, reading) }

// OpenCached is Open for what is here: nil if there is no file of the object.
func (s *Store) OpenCached(obj object.Object) (*File, error) {
	f, err := s.openAs(obj, readingCached)
	if errors.Is(err, errAbsent) {
		return nil, nil
	}
	return f, err
}

// purpose of a lease.
type purpose int

const (
	reading       purpose = iota
	readingCached         // and no file is to be made
	receiving             // from another tier: nobody has asked for it
	keepingTail
	readingTail // and no file is to be made
)

func (p purpose) tail() bool   { return p == keepingTail || p == readingTail }
func (p purpose) cached() bool { return p == readingCached || p == readingTail }

var errAbsent = errors.New("not cached")

func (s *Store) openAs(obj object.Object, why purpose) (*File, error) {
	if obj.Size < 0 || obj.Size > maxObjectBytes {
		return nil, fmt.Errorf("%w: object of %d bytes", object.ErrInvalid, obj.Size)
	}
	if obj.Size > s.cfg.CapacityBytes/2 {
		s.rejected.Add(1)
		return nil, fmt.Errorf("%w: %d bytes are more than half the tier", object.ErrNoSpace, obj.Size)
	}
	return s.open(obj.ID(), obj, why)
}

func (s *Store) open(id object.ID, obj object.Object, why purpose) (*File, error) {
	if !s.load.begun.Load() {
		s.rejected.Add(1)
		return nil, fmt.Errorf("%w: %w", object.ErrNoSpace, errRefused)
	}
	if !s.Peek(id).Exists {
		if why.cached() {
			return nil, errAbsent
		}
		if err := s.reserve(0, 1); err != nil {
			s.rejected.Add(1)
			return nil, err
		}
	}
	s.ensure(id)
	s.mu.Lock()
	s.uses++
	if s.closed && !s.handed.Load() {
		s.mu.Unlock()
		return nil, fmt.Errorf("cache: %w", os.ErrClosed)
	}
	e, fresh := s.entries[id], false
	if e == nil && why.cached() {
		s.mu.Unlock()
		return nil, errAbsent
	}
	if e == nil && s.closed {
		s.mu.Unlock()
		return nil, fmt.Errorf("%w: the cache is handed over", object.ErrNoSpace)
	}
	if e == nil {
		e, fresh = newEntry(id, newNonce(), obj.Size), true
		e.store = s.storeID(obj.Store)
		e.puts, e.tail = 0, why.tail()
		s.entries[id] = e
		if e.tail {
			s.tails++
			s.policy.InsertTail(&e.Node, 0)
		} else {
			s.policy.Insert(&e.Node, 0)
		}
		if e.whole() { // an empty one is from the start
			s.complete++
		}
	} else if why != receiving {
		s.asked(e)
	}
	f := s.lease(e, obj)
	f.asked = s.policy.Hits(&e.Node)
	s.mu.Unlock()

	if err := f.openOnce(fresh); err != nil {
		f.Close()
		if !s.handed.Load() {
			s.trouble(err)
		}
		return nil, fmt.Errorf("%w: cache file: %w", object.ErrNoSpace, err)
	}
	return f, nil
}

// asked notes that somebody wants the object. Who opens what is open already is part of the same use: each fetch of a
// file that is read opens it. Requires s.mu.
func (s *Store) asked(e *entry) {
	if e.moving {
		e.moving = false
		s.policy.Return(&e.Node)
	} else if e.file != nil {
		return
	}
	s.policy.Hit(&e.Node)
}

// lease makes a File, which is to be opened next. Requires s.mu.
func (s *Store) lease(e *entry, obj object.Object) *File {
	if e.file == nil {
		e.file = &file{}
	}
	if e.file.leases == 0 {
		s.leased++
	}
	e.file.leases++
	return &File{s: s, obj: obj, e: e, file: e.file}
}

func (f *File) openOnce(fresh bool) error {
	f.file.open.Do(func() { f.file.f, f.file.err = f.s.openFile(f, fresh) })
	return f.file.err
}

// openFile opens or makes the file of an entry, and takes away the chunks it does not have.
func (s *Store) openFile(f *File, fresh bool) (*os.File, error) {
	s.writing.RLock()
	defer s.writing.RUnlock()
	name := objectPath(f.e.Key, f.e.nonce)
	var file *os.File
	err := fs.ErrNotExist
	if !fresh {
		file, err = s.dir.open(name, unix.O_RDWR, 0)
	}
	if errors.Is(err, fs.ErrNotExist) && !s.handed.Load() {
		file, err = s.createFile(name)
	}
	if err != nil {
		return nil, err
	}
	if fresh {
		if f.obj.Size == 0 {
			s.recordEmpty(f)
		}
		return file, nil
	}
	s.mu.Lock()
	f.e.seen = true
	s.mu.Unlock()
	st, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	f.e.presentChunks(func(i int) {
		if end := int64(i)*object.ChunkSize + int64(f.e.chunkLen(i)); end > st.Size() {
			s.dropChunk(f.e, i, errors.New("the cache file is too short"))
		}
	})
	return file, nil
}

// createFile makes a cache file, and its folder if it is the first one there.
func (s *Store) createFile(name string) (*os.File, error) {
	const flags = unix.O_RDWR | unix.O_CREAT | unix.O_EXCL
	f, err := s.dir.open(name, flags, 0o644)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	if err := s.dir.mkdir(path.Dir(name)); err != nil {
		return nil, err
	}
	return s.dir.open(name, flags, 0o644)
}

// recordEmpty enters an object of no bytes, which nobody will Put.
func (s *Store) recordEmpty(f *File) {
	s.mu.Lock()
	f.e.indexed = true
	s.mu.Unlock()
	since := time.Now() // f may be told another time while the index writes
	s.index.writeLazily(func(b *pebble.Batch) error { return f.recordObject(b, since) })
}

func (f *File) recordObject(b *pebble.Batch, since time.Time) error {
	return errors.Join(b.Set(objectKey(f.e.Key, f.e.nonce), encodeObject(f.obj, f.e.tail), nil), b.Set(sinceKey(f.e.Key, f.e.nonce), encodeSince(since), nil))
}

// Object is what the file caches.
func (f *File) Object() object.Object { return f.obj }

// Fd is the shared descriptor, for splice and pread of present chunks; valid until Close.
// It can write: give away a View instead.
func (f *File) Fd() int { return int(f.file.f.Fd()) }

// Evicted says that the object has no file any more; this one still reads what it has.
func (f *File) Evicted() bool { return f.e.evicted.Load() }

// Asked is how often the object was asked for again, of late, when the file was opened.
func (f *File) Asked() uint8 { return f.asked }

// Complete reports whether every chunk is present and verified.
func (f *File) Complete() bool { return f.e.complete() }

// PresentBytes are those of the present chunks.
func (f *File) PresentBytes() int64 { return f.e.presentBytes() }

// Has reports whether chunk i can be read. One that was cached under an earlier boot of the
// machine is checked now, which reads it once.
func (f *File) Has(i int) bool {
	if i < 0 || i >= f.e.chunks() {
		return false
	}
	if f.e.isVerified(i) {
		return true
	}
	return f.e.isPresent(i) && f.check(i, f.s.dir.sys.pread)
}

var chunkBuffers = sync.Pool{New: func() any { return new([object.ChunkSize]byte) }}

// check verifies a present chunk against the index.
func (f *File) check(i int, pread reader) bool {
	f.file.verify.Lock()
	defer f.file.verify.Unlock()
	if f.e.isVerified(i) {
		return true
	}
	if !f.e.isPresent(i) || f.closed.Load() {
		return false
	}
	key := chunkKey(f.e.Key, f.e.nonce, i)
	value, err := f.s.index.get(key)
	if err != nil {
		return false // closed or broken: nothing can be said
	}
	want, _, ok := decodeChunk(value)
	buf := chunkBuffers.Get().(*[object.ChunkSize]byte)
	defer chunkBuffers.Put(buf)
	b := buf[:f.e.chunkLen(i)]
	_, err = pread(f.file.f, b, int64(i)*object.ChunkSize)
	if errors.Is(err, os.ErrClosed) {
		return false
	}
	if err == nil && (!ok || xxhash.Sum64(b) != want) {
		err = object.ErrCorrupt
	}
	if err != nil {
		f.s.dropChunk(f.e, i, err)
		return false
	}
	f.s.markVerified(f.e, i)
	f.s.index.writeLazily(func(b *pebble.Batch) error {
		return b.Set(key, encodeChunk(want, f.s.epoch), nil)
	})
	return true
}

// ReadAt reads from present chunks; object.ErrIncomplete if one of them is absent,
// object.ErrCorrupt if the disk did not give it back (it is absent from then on), io.EOF at the object's end.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%w: read at %d", object.ErrInvalid, off)
	}
	if off >= f.e.size {
		return 0, io.EOF
	}
	atEnd := int64(len(p)) > f.e.size-off
	if atEnd {
		p = p[:f.e.size-off]
	}
	if len(p) == 0 {
		return 0, nil
	}
	first, last := int(off/object.ChunkSize), int((off+int64(len(p))-1)/object.ChunkSize)
	for i := first; i <= last; i++ {
		if !f.Has(i) {
			return 0, fmt.Errorf("%w: chunk %d of %v", object.ErrIncomplete, i, f.e.Key)
		}
	}
	n, err := f.s.dir.sys.pread(f.file.f, p, off)
	if errors.Is(err, os.ErrClosed) {
		return n, err
	}
	if err != nil {
		for i := first; i <= last; i++ {
			f.s.dropChunk(f.e, i, err)
		}
		return 0, fmt.Errorf("%w: read cache file: %w", object.ErrCorrupt, err)
	}
	if atEnd {
		err = io.EOF
	}
	return n, err
}

// Put adds chunk i, whose bytes are data, and returns when a SIGKILL cannot take it away any
// more. Putting what is present changes nothing. The error wraps object.ErrNoSpace if the
// chunk cannot be kept, for whatever reason; the bytes are good all the same.
func (f *File) Put(i int, data []byte) error { return f.putBy(f.pwrite, i, data) }

func (f *File) putBy(write writer, i int, data []byte) error {
	if i < 0 || i >= f.e.chunks() || len(data) != f.e.chunkLen(i) {
		return fmt.Errorf("%w: chunk %d of %d bytes for %v", object.ErrInvalid, i, len(data), f.obj)
	}
	if f.closed.Load() {
		return fmt.Errorf("cache file: %w", os.ErrClosed)
	}
	if f.Has(i) {
		return nil
	}
	p, mine := f.claim(i)
	if p == nil {
		return nil
	}
	if !mine {
		<-p.done
		return p.err
	}
	p.err = f.put(write, i, data, p)
	f.s.mu.Lock()
	delete(f.file.putting, i)
	f.s.mu.Unlock()
	close(p.done)
	return p.err
}

// claim makes the caller the one who puts chunk i, or returns the put to wait for; nil if
// the chunk is there.
func (f *File) claim(i int) (p *putting, mine bool) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if f.e.isPresent(i) {
		return nil, false
	}
	if p := f.file.putting[i]; p != nil {
		return p, false
	}
	if f.file.putting == nil {
		f.file.putting = make(map[int]*putting)
	}
	p = &putting{done: make(chan struct{}), paid: f.e.takeWaste(i)}
	f.file.putting[i] = p
	return p, true
}

func (f *File) put(write writer, i int, data []byte, p *putting) error {
	f.s.writing.RLock()
	defer f.s.writing.RUnlock()
	room := onDisk(len(data))
	err := f.putRoom(room, p)
	if err != nil {
		return err
	}
	if err = write(data, int64(i)*object.ChunkSize); err == nil {
		err = f.record(i, xxhash.Sum64(data))
	}
	s, e := f.s, f.e
	s.mu.Lock()
	s.uses++
	e.puts++
	s.settle(e, room, p.paid)
	if err != nil {
		e.waste = append(e.waste, uint32(i)) // part of it may be on the disk
		s.mu.Unlock()
		s.trouble(err)
		return fmt.Errorf("%w: write cache file: %w", object.ErrNoSpace, err)
	}
	if e.setPresent(i) && !e.evicted.Load() {
		s.cached += int64(len(data))
	}
	s.setVerified(e, i)
	if e.complete() {
		s.writeBackLater(e)
	}
	evicted := e.evicted.Load()
	s.mu.Unlock()
	if evicted {
		return fmt.Errorf("%w: evicted", object.ErrNoSpace)
	}
	return nil
}

// putRoom finds room for a chunk that is not paid for.
func (f *File) putRoom(room int64, p *putting) error {
	switch {
	case f.Evicted():
		return fmt.Errorf("%w: evicted", object.ErrNoSpace)
	case f.s.handed.Load():
		return fmt.Errorf("%w: the cache is handed over", object.ErrNoSpace)
	case f.s.index.isBroken():
		f.s.putErrors.Add(1)
		return fmt.Errorf("%w: %w", object.ErrNoSpace, errIndex)
	case f.s.index.health.isSick():
		f.s.rejected.Add(1)
		return fmt.Errorf("%w: %w", object.ErrNoSpace, errRefused)
	case p.paid:
		return nil
	}
	err := f.s.reserve(room, 0)
	if err != nil {
		f.s.rejected.Add(1)
	}
	return err
}

// record enters a chunk in the index, and the object before its first one.
func (f *File) record(i int, sum uint64) error {
	e, s := f.e, f.s
	first := e.present.Load() == 0
	since := f.since
	if since.IsZero() {
		since = time.Now()
	}
	s.mu.Lock()
	e.indexed = true
	s.mu.Unlock()
	return s.index.write(func(b *pebble.Batch) error {
		if first {
			if err := f.recordObject(b, since); err != nil {
				return err
			}
		}
		return b.Set(chunkKey(e.Key, e.nonce, i), encodeChunk(sum, s.epoch), nil)
	})
}

// settle turns room that was reserved into bytes of the entry. Requires s.mu.
func (s *Store) settle(e *entry, room int64, paid bool) {
	if paid {
		return
	}
	if e.evicted.Load() {
		s.live -= room
		s.hold(heldKey{e.Key, e.nonce}, room)
		return
	}
	s.policy.Grow(&e.Node, room)
}

// setVerified counts what became complete. Requires s.mu.
func (s *Store) setVerified(e *entry, i int) {
	if !e.setVerified(i) || e.evicted.Load() {
		return
	}
	s.verified += int64(e.chunkLen(i))
	if e.whole() {
		s.complete++
	}
}

func (s *Store) markVerified(e *entry, i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.isPresent(i) {
		s.setVerified(e, i)
	}
}

// dropChunk makes a chunk absent that the disk did not keep. Its bytes stay counted.
func (s *Store) dropChunk(e *entry, i int, why error) {
	s.mu.Lock()
	wasComplete := e.whole()
	present, verified := e.clear(i)
	if !present {
		s.mu.Unlock()
		return
	}
	e.waste = append(e.waste, uint32(i))
	s.wasted.Add(s.unmark(e, i))
	if !e.evicted.Load() {
		s.cached -= int64(e.chunkLen(i))
		if verified {
			s.verified -= int64(e.chunkLen(i))
		}
		if wasComplete {
			s.complete--
		}
	}
	s.mu.Unlock()
	if s.badChunks.Add(1) == 1 {
		s.log.Warn("cached chunk is bad and will be fetched again; later ones are only counted", "object", e.Key, "chunk", i, "err", why)
	}
	key := chunkKey(e.Key, e.nonce, i)
	s.index.writeLazily(func(b *pebble.Batch) error { return b.Delete(key, nil) })
}

// takeWaste reports whether the bytes of an absent chunk are counted, and forgets it.
// Requires Store.mu.
func (e *entry) takeWaste(i int) bool {
	for k, w := range e.waste {
		if int(w) == i {
			e.waste[k] = e.waste[len(e.waste)-1]
			e.waste = e.waste[:len(e.waste)-1]
			return true
		}
	}
	return false
}

// troubleOver ends a row of refusals by the file system.
const troubleOver = time.Minute

// trouble logs the first of a row of refusals by the file system.
func (s *Store) trouble(err error) {
	s.putErrors.Add(1)
	now := time.Now()
	s.mu.Lock()
	first := now.Sub(s.troubleAt) > troubleOver
	s.troubleAt, s.troubled = now, s.troubled+1
	s.fsAt = time.Time{} // look at the file system again
	s.mu.Unlock()
	if first {
		s.log.Error("cache cannot be written, reading through; what else fails until a minute has passed without it is only counted", "err", err)
	}
}

// wellAgain says, once, that the disk takes again what is written.
func (s *Store) wellAgain() {
	s.mu.Lock()
	refused := s.troubled
	over := refused > 0 && time.Since(s.troubleAt) > troubleOver && !s.index.isBroken() && !s.index.health.isSick()
	if over {
		s.troubled = 0
	}
	s.mu.Unlock()
	if over {
		s.log.Info("cache can be written again", "refused", refused)
	}
}

// View is a fresh read-only descriptor of the whole file that can be given to anyone: it was opened
// through a read-only mount, so that not even root can open it again for writing. The
// caller closes it. What is read of it nobody sees, so all of it counts as read. object.ErrIncomplete unless Complete, or
// when evicted.
func (f *File) View() (*os.File, error) {
	s := f.s
	if s.view.f == nil {
		return nil, fmt.Errorf("no read-only mount of the cache is configured: descriptors stay here")
	}
	if !f.Complete() || f.Evicted() {
		return nil, object.ErrIncomplete
	}
	if err := f.written(); err != nil {
		return nil, err
	}
	v, err := s.view.open(objectPath(f.e.Key, f.e.nonce), unix.O_RDONLY, 0)
	if err != nil {
		if f.Evicted() {
			return nil, object.ErrIncomplete
		}
		return nil, fmt.Errorf("view: %w", err)
	}
	if err := f.checkView(v); err != nil {
		return nil, errors.Join(fmt.Errorf("view %s: %w", s.cfg.ViewDir, err), v.Close())
	}
	s.foreseen.Add(s.unmarkAll(f.e))
	return v, nil
}

func (f *File) checkView(v *os.File) error {
	var fsys unix.Statfs_t
	if err := unix.Fstatfs(int(v.Fd()), &fsys); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if fsys.Flags&unix.ST_RDONLY == 0 {
		return errors.New("the mount is not read-only")
	}
	var own, theirs unix.Stat_t
	if err := errors.Join(unix.Fstat(f.Fd(), &own), unix.Fstat(int(v.Fd()), &theirs)); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if own.Dev != theirs.Dev || own.Ino != theirs.Ino {
		return fmt.Errorf("not the cache directory: device %d inode %d instead of %d, %d", theirs.Dev, theirs.Ino, own.Dev, own.Ino)
	}
	return nil
}

// Close gives the lease up. What Fd returned must not be used any more.
func (f *File) Close() error {
	if f.closed.Swap(true) {
		return nil
	}
	s, e := f.s, f.e
	s.mu.Lock()
	f.file.leases--
	if f.file.leases > 0 {
		s.mu.Unlock()
		return nil
	}
	e.file = nil
	if !e.evicted.Load() {
		s.leased--
	}
	s.writeBackLater(e)
	s.mu.Unlock()
	var err error
	if f.file.f != nil {
		err = errors.Join(f.file.direct.close(), f.file.f.Close())
	}
	if e.present.Load() == 0 && (e.size > 0 || f.file.err != nil) {
		s.dropUnused(e)
	}
	return err
}

// dropUnused removes a file in which nothing was ever put.
func (s *Store) dropUnused(e *entry) {
	s.evicting.Lock()
	defer s.evicting.Unlock()
	s.mu.Lock()
	if s.closed || e.evicted.Load() || e.file != nil || e.present.Load() > 0 {
		s.mu.Unlock()
		return
	}
	s.forget(e)
	s.mu.Unlock()
	s.remove(e)
}
