package cachestore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/policy"
)

// heldKey names an evicted file whose bytes are still on the disk.
type heldKey struct {
	id    object.ID
	nonce uint64
}

const (
	roomAge    = time.Second // how old a statfs may be while there is plenty
	plenty     = 256 << 20   // bytes above what is kept free
	plentyInos = 4096
	probeEvery = time.Second // for held files; sooner when room is wanted
	probeSoon  = 50 * time.Millisecond
	probeMax   = 1024 // held files looked at in one go
)

// reserve takes room for bytes and inodes, evicting what it must. The bytes are counted from
// now on: settle makes them the entry's. object.ErrNoSpace if all that is left is leased or held.
func (s *Store) reserve(bytes, inodes int64) error {
	if bytes > 0 {
		select {
		case <-s.load.done:
		case <-s.load.late:
		}
		if s.load.over() && !s.load.ended.Load() {
			return fmt.Errorf("%w: the index was not read to its end", object.ErrNoSpace)
		}
	}
	s.refreshRoom()
	if s.take(bytes, inodes) {
		return nil
	}
	evicted, err := s.makeRoom(bytes, inodes)
	for _, id := range evicted {
		s.notify(id)
	}
	return err
}

// makeRoom is reserve for a full tier. It returns whom the caller must notify.
func (s *Store) makeRoom(bytes, inodes int64) (evicted []object.ID, err error) {
	s.evicting.Lock()
	defer s.evicting.Unlock()
	for !s.take(bytes, inodes) {
		if bytes > 0 && !s.load.ended.Load() {
			return evicted, fmt.Errorf("%w: the index is being read", object.ErrNoSpace)
		}
		if s.probeIfDue() {
			continue
		}
		e := s.victim()
		if e == nil {
			return evicted, fmt.Errorf("%w: all of it is in use", object.ErrNoSpace)
		}
		s.remove(e)
		evicted = append(evicted, e.Key)
	}
	return evicted, nil
}

func (s *Store) notify(id object.ID) {
	if f := s.onEvict.Load(); f != nil {
		(*f)(id)
	}
}

// take reserves if there is room.
func (s *Store) take(bytes, inodes int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed ||
		s.inUse(bytes)+bytes > s.cfg.CapacityBytes ||
		s.fsRoom.bytes-bytes < s.cfg.MinFreeBytes ||
		s.fsRoom.totalInodes > 0 && s.fsRoom.inodes-inodes < s.cfg.MinFreeInodes {
		return false
	}
	s.live += bytes
	s.fsRoom.bytes -= bytes
	s.fsRoom.inodes -= inodes
	return true
}

// inUse is how many bytes are ours, for somebody who wants some more. Until the index is read these are all
// that the file system has not free. Requires s.mu.
func (s *Store) inUse(more int64) int64 {
	n := s.live + s.heldBytes
	if more > 0 && !s.load.ended.Load() {
		n = max(n, s.fsRoom.totalBytes-s.fsRoom.bytes)
	}
	return n
}

// refreshRoom asks the file system, in which others write too: every time when it is nearly
// full. Not between evictions: some file systems free later, and we would evict too much.
func (s *Store) refreshRoom() {
	s.mu.Lock()
	fresh := time.Since(s.fsAt) < roomAge &&
		s.fsRoom.bytes > s.cfg.MinFreeBytes+plenty &&
		(s.fsRoom.totalInodes == 0 || s.fsRoom.inodes > s.cfg.MinFreeInodes+plentyInos)
	s.mu.Unlock()
	if fresh {
		return
	}
	r, err := s.dir.room()
	if err != nil {
		return
	}
	s.mu.Lock()
	s.fsRoom, s.fsAt = r, time.Now()
	s.mu.Unlock()
}

// victim takes one entry out of the store; nil if all are leased.
func (s *Store) victim() *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.leased == len(s.entries) {
		return nil
	}
	n := s.policy.Evict(func(n *policy.Node[object.ID]) bool { return s.entries[n.Key].file != nil })
	if n == nil {
		return nil
	}
	e := s.entries[n.Key]
	s.countEviction(e)
	s.forget(e)
	return e
}

func (s *Store) countEviction(e *entry) {
	s.evictions.Add(1)
	s.evictedBytes.Add(e.presentBytes())
}

// forget takes an entry out of all tables; its bytes become held ones. Requires s.mu. The
// caller removes the file.
func (s *Store) forget(e *entry) {
	e.evicted.Store(true)
	delete(s.entries, e.Key)
	s.policy.Remove(&e.Node)
	s.cached -= e.presentBytes()
	s.verified -= e.verifiedBytes()
	if e.whole() {
		s.complete--
	}
	if e.tail {
		s.tails--
	}
	if e.file != nil {
		s.leased--
	}
	s.unpinned(e)
	s.wasted.Add(s.unmarkAll(e))
	s.live -= e.Bytes()
	s.hold(heldKey{e.Key, e.nonce}, e.Bytes())
}

// Unlinked reports whether somebody holds a file of the object that was evicted.
func (s *Store) Unlinked(id object.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.held {
		if k.id == id {
			return true
		}
	}
	return false
}

// hold counts bytes of an evicted file. Requires s.mu.
func (s *Store) hold(k heldKey, bytes int64) {
	s.held[k] += bytes
	s.heldBytes += bytes
}

// release stops counting an evicted file that is gone.
func (s *Store) release(k heldKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fsRoom.bytes += s.held[k]
	s.fsRoom.inodes++
	s.heldBytes -= s.held[k]
	delete(s.held, k)
	delete(s.stuck, k)
}

// Evict takes an object's file away now, leased or not; open Files go on reading it. It
// reports whether there was one.
func (s *Store) Evict(id object.ID) bool {
	if !s.evict(id) {
		return false
	}
	s.notify(id)
	return true
}

func (s *Store) evict(id object.ID) bool {
	s.ensure(id)
	return s.evictIf(id, func(*entry) bool { return true })
}

func (s *Store) evictIf(id object.ID, it func(*entry) bool) bool {
	s.evicting.Lock()
	defer s.evicting.Unlock()
	s.mu.Lock()
	e := s.entries[id]
	if e == nil || s.closed || !it(e) {
		s.mu.Unlock()
		return false
	}
	s.countEviction(e)
	s.forget(e)
	s.mu.Unlock()
	s.remove(e)
	return true
}

// remove takes the file of a forgotten entry off the disk, or, if somebody has it open, into the folder
// "held", where no view finds it. Requires s.evicting, since before forget: a probe must not
// look for the file before it is there.
func (s *Store) remove(e *entry) {
	k := heldKey{e.Key, e.nonce}
	s.mu.Lock()
	indexed := e.indexed
	s.mu.Unlock()
	if indexed {
		s.deleteRecords(k.id, k.nonce)
	}
	s.awaitWriteBack(e)
	name := objectPath(k.id, k.nonce)
	if !s.unlinkUnheld(k, name) {
		if err := s.dir.rename(name, heldPath(k.id, k.nonce)); err != nil {
			s.mu.Lock()
			s.stuck[k] = struct{}{}
			s.mu.Unlock()
			s.trouble(fmt.Errorf("evicted cache file stays in its place: %w", err))
		}
	}
}

// unlinkUnheld deletes a file unless somebody has it open or mapped. The write lease is
// granted only if ours is the only open description; while it lasts nobody opens the file,
// so nobody has it when it is gone.
func (s *Store) unlinkUnheld(k heldKey, name string) bool {
	f, err := s.dir.open(name, unix.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		s.release(k)
		return true
	}
	if err != nil {
		return false
	}
	defer f.Close() // ends the lease
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	if errors.Is(err, unix.EAGAIN) {
		return false
	}
	if err != nil { // a file system without leases: nothing can be known
		s.noLeases.Do(func() {
			s.log.Warn("the file system has no leases: bytes of evicted files that somebody holds are not counted", "err", err)
		})
	}
	if err := s.dir.unlink(name); err != nil {
		s.trouble(fmt.Errorf("unlink cache file: %w", err))
		return false
	}
	s.release(k)
	return true
}

// probe unlinks the held files that nobody holds any more and reports whether there were any.
// Requires s.evicting.
func (s *Store) probe() (freed bool) {
	s.mu.Lock()
	s.probedAt = time.Now()
	paths := make(map[heldKey]string, min(len(s.held), probeMax))
	for k := range s.held { // in random order: all of them have their turn
		if len(paths) == probeMax {
			break
		}
		paths[k] = heldPath(k.id, k.nonce)
		if _, stuck := s.stuck[k]; stuck {
			paths[k] = objectPath(k.id, k.nonce)
		}
	}
	s.mu.Unlock()
	for k, path := range paths {
		if s.unlinkUnheld(k, path) {
			freed = true
		}
	}
	return freed
}

func (s *Store) probeIfDue() bool {
	s.mu.Lock()
	due := len(s.held) > 0 && time.Since(s.probedAt) > probeSoon
	s.mu.Unlock()
	return due && s.probe()
}

// janitor reads the index, removes what belongs to no object, releases held files and keeps the file system's free
// room when others write to it. After an unclean stop it also counts what Puts that never ended left
// on the disk.
func (s *Store) janitor(ctx context.Context) {
	s.takeStock(ctx)
	s.reserve(0, 0) // the capacity may be smaller than it was
	close(s.swept)
	var unaudited []*entry
	if s.unclean {
		unaudited = s.all()
	}
	var st storm
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for {
		unaudited = s.audit(ctx, unaudited)
		s.reserve(0, 0) // evicts until there is room; if all is in use, so be it
		s.saveRevocations()
		s.wellAgain()
		if evicted, storm := st.note(time.Now(), s.evictedBytes.Load(), s.cfg.CapacityBytes); storm {
			s.log.Warn("the cache is too small for what is read: much is evicted; said again after a quiet while", "evictedBytes", evicted, "within", stormWindow, "capacityBytes", s.cfg.CapacityBytes)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.evicting.Lock()
		s.probe()
		s.evicting.Unlock()
	}
}

// storm is more than half of the cache evicted within a few minutes.
type storm struct {
	since time.Time // when the window began
	bytes int64     // evicted until then
	blows bool
}

const stormWindow = 5 * time.Minute

// note is told what was evicted so far, and reports whether a storm has begun, with what it took. It ends with a window without.
func (st *storm) note(now time.Time, bytes, capacity int64) (evicted int64, begins bool) {
	if st.since.IsZero() {
		st.since, st.bytes = now, bytes
	}
	evicted = bytes - st.bytes
	much := evicted > capacity/2
	begins = much && !st.blows
	switch {
	case much:
		st.blows, st.since, st.bytes = true, now, bytes
	case now.Sub(st.since) >= stormWindow:
		st.blows, st.since, st.bytes = false, now, bytes
	}
	return evicted, begins
}

// takeStock reads the index, which may not be open yet, and holds it against the files.
func (s *Store) takeStock(ctx context.Context) {
	err := s.index.awaitReady(ctx)
	if err == nil && !s.load.begun.Load() {
		err = s.begin()
	}
	if err == nil {
		s.removeAside(ctx) // before the end of the loading: these files are counted by nobody
		err = s.loadAll(ctx)
	}
	close(s.load.done)
	if err != nil {
		if ctx.Err() == nil {
			s.lose(err)
		}
		return
	}
	if err := s.sweep(ctx); err != nil {
		s.log.Warn("look for cache files that belong to no object", "dir", s.cfg.Dir, "err", err)
	}
}

func (s *Store) all() []*entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.entries))
}

// audit compares what is counted of files with what they occupy, and returns those that
// were being put into: for the next time.
func (s *Store) audit(ctx context.Context, entries []*entry) (busy []*entry) {
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil
		}
		before, ok := s.quiet(e)
		if !ok {
			busy = append(busy, e)
			continue
		}
		var st unix.Stat_t
		if unix.Fstatat(s.dir.fd(), objectPath(e.Key, e.nonce), &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			continue // evicted
		}
		if !s.countMore(e, before, st.Blocks*512) {
			busy = append(busy, e)
		}
	}
	return busy
}

// quiet reports what is counted of an entry, if no Put is changing it. Requires s.mu not held.
func (s *Store) quiet(e *entry) (bytes int64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return e.Bytes(), e.file == nil || len(e.file.putting) == 0
}

func (s *Store) countMore(e *entry, before, onDisk int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.evicted.Load() {
		return true
	}
	if e.Bytes() != before || e.file != nil && len(e.file.putting) > 0 {
		return false
	}
	if more := onDisk - before; more > 0 {
		s.policy.Grow(&e.Node, more)
		s.live += more
	}
	return true
}
