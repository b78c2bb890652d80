package cachestore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/larderfs/larder/cacheworker/object"
)

// The index is one pebble database. Its keys, so that one pass over it meets a file's own
// record before those of its chunks and grants:
//
//	0 m <name>                              of the index itself
//	1 <id 16> <nonce 8> 0                   the object: store, key, version, size, mtime, and 1 if only its tail
//	1 <id 16> <nonce 8> 0 s                 unix seconds since when some of it is cached, in whatever tier
//	1 <id 16> <nonce 8> 1 <chunk 4>         xxhash64 of a chunk, epoch in which it was known to be good
//	1 <id 16> <nonce 8> 2 <principal 16>    unix seconds of a grant
//	1 <id 16> <nonce 8> 3                   the object is pinned
//
// The nonce is the cache file's: records of a file that is gone can never be taken for those of
// the same object's next one. Numbers are big endian.
const (
	spaceMeta = 0
	spaceFile = 1

	kindObject = 0
	kindChunk  = 1
	kindGrant  = 2
	kindPin    = 3

	filePrefixLen = 1 + 16 + 8
)

var metaEpoch = []byte{spaceMeta, 'm', 'e'} // epoch 4, boot id
var metaClean = []byte{spaceMeta, 'm', 'c'} // present after a clean stop
var metaFormat = []byte{spaceMeta, 'm', 'f'}

const format = 1

func filePrefix(id object.ID, nonce uint64) []byte {
	k := make([]byte, filePrefixLen, filePrefixLen+17)
	k[0] = spaceFile
	copy(k[1:], id[:])
	binary.BigEndian.PutUint64(k[17:], nonce)
	return k
}

func objectKey(id object.ID, nonce uint64) []byte {
	return append(filePrefix(id, nonce), kindObject)
}

// sinceKey is behind the object's, and passed over by workers that do not know it.
func sinceKey(id object.ID, nonce uint64) []byte {
	return append(filePrefix(id, nonce), kindObject, 's')
}

func isSince(k []byte) bool {
	return len(k) == filePrefixLen+2 && k[filePrefixLen] == kindObject && k[filePrefixLen+1] == 's'
}

func encodeSince(t time.Time) []byte { return binary.BigEndian.AppendUint64(nil, uint64(t.Unix())) }

func decodeSince(v []byte) (t time.Time, ok bool) {
	if len(v) != 8 {
		return t, false
	}
	return time.Unix(int64(binary.BigEndian.Uint64(v)), 0), true
}

func chunkKey(id object.ID, nonce uint64, i int) []byte {
	return binary.BigEndian.AppendUint32(append(filePrefix(id, nonce), kindChunk), uint32(i))
}

func grantKey(id object.ID, nonce uint64, p object.Principal) []byte {
	return append(append(filePrefix(id, nonce), kindGrant), p[:]...)
}

func pinKey(id object.ID, nonce uint64) []byte { return append(filePrefix(id, nonce), kindPin) }

func encodeChunk(sum uint64, epoch uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, sum), epoch)
}

func decodeChunk(v []byte) (sum uint64, epoch uint32, ok bool) {
	if len(v) != 12 {
		return 0, 0, false
	}
	return binary.BigEndian.Uint64(v), binary.BigEndian.Uint32(v[8:]), true
}

func encodeObject(o object.Object, tail bool) []byte {
	var b []byte
	for _, s := range []string{string(o.Store), o.Key, o.Version} {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	b = binary.AppendUvarint(b, uint64(o.Size))
	b = binary.AppendVarint(b, o.ModTime.UnixNano())
	if tail {
		b = append(b, 1)
	}
	return b
}

// decodeObject returns the parts that are kept in memory, without allocating.
func decodeObject(v []byte) (store []byte, sizeBytes int64, tail, ok bool) {
	for part := range 3 {
		n, w := binary.Uvarint(v)
		if w <= 0 || uint64(len(v)-w) < n {
			return nil, 0, false, false
		}
		if part == 0 {
			store = v[w : w+int(n)]
		}
		v = v[w+int(n):]
	}
	size, w := binary.Uvarint(v)
	if w <= 0 || int64(size) < 0 || int64(size) > maxObjectBytes {
		return nil, 0, false, false
	}
	_, mtime := binary.Varint(v[w:])
	return store, int64(size), mtime > 0 && len(v) > w+mtime, true
}

// maxObjectBytes keeps chunk numbers in their 4 bytes.
const maxObjectBytes = object.ChunkSize << 31

// index serialises what is written to the database: one goroutine takes what has come
// together into one batch. A record is in the kernel when its write returns, so a SIGKILL
// loses nothing that was reported. While the disk refuses to write, waiters are let go with errRefused, and what
// they wanted may be written later. If the database fails for good, they are let go with errIndex and the
// store goes on reading.
type index struct {
	dir  dir // the caller's
	db   *pebble.DB
	log  *slog.Logger
	made bool // now: there was none

	health  *health
	ready   chan struct{} // closed when the database is open
	openErr error         // why it never will be; set before done is closed
	writes  chan indexWrite
	quit    chan struct{} // closed by close
	done    chan struct{} // closed when the writer has ended
	synced  chan struct{} // closed when what openDB left unsynced is on the disk
	broken  chan struct{} // closed by fail: nothing more is written
	failed  sync.Once
	corrupt atomic.Bool   // before broken is closed for that
	stuck   chan struct{} // closed by giveUp: not even closing the database is safe
	gaveUp  sync.Once
	cause   error // once stuck

	reading sync.RWMutex // held for reading by get
	closed  bool         // guarded by reading: the database answers no more
}

var (
	errIndex   = errors.New("the index cannot be written")
	errRefused = errors.New("the index cannot be written just now")
)

// indexWrite is one atomic change.
type indexWrite struct {
	apply func(*pebble.Batch) error
	lazy  bool       // nobody waits, and it may stay in our memory for a second
	done  chan error // buffered; nil if lazy
}

// openIndex opens the database below d. Where the disk refuses to write it returns at once, and the index is not ready
// yet. trouble is told of refusals.
func openIndex(d dir, disk vfs.FS, log *slog.Logger, trouble func(error)) (*index, error) {
	x := &index{
		dir: d, log: log,
		ready: make(chan struct{}), writes: make(chan indexWrite, 64),
		quit: make(chan struct{}), done: make(chan struct{}), synced: make(chan struct{}),
		broken: make(chan struct{}), stuck: make(chan struct{}),
	}
	x.health = newHealth(trouble, x.quit)
	opened := make(chan error, 1)
	go x.openDB(disk, opened)
	select {
	case err := <-opened:
		return x, err
	case <-x.health.refused():
		return x, nil
	case <-x.stuck:
		return nil, x.cause
	}
}

// openDB opens the database in its own folder by descriptor: should it be given up with
// goroutines of pebble still alive, they cannot reach the folder that takes its place.
func (x *index) openDB(disk vfs.FS, opened chan<- error) {
	late := &lateFS{FS: patientFS{disk, x.health}}
	db, err := pebble.Open(x.dir.path()+"/db", &pebble.Options{
		FS:            kernelFS{late},
		Logger:        pebbleLog{x},
		EventListener: x.listener(),
		// Before the format whose log marks what was synced: ours says so without being so.
		FormatMajorVersion: pebble.FormatColumnarBlocks,
		MemTableSize:       4 << 20,
		MaxOpenFiles:       256,
	})
	x.db = db
	if err != nil {
		err = fmt.Errorf("pebble: %w", err)
	} else if err = x.checkFormat(); err != nil {
		err = errors.Join(err, db.Close())
	}
	x.openErr = err
	if err == nil {
		close(x.ready)
		go x.run()
	} else {
		close(x.done)
	}
	opened <- err
	if err := late.settle(); err != nil {
		x.fail(err)
	}
	close(x.synced)
}

// awaitReady returns when the database is open, or why it will not be.
func (x *index) awaitReady(ctx context.Context) error {
	select {
	case <-x.ready:
		return nil
	case <-x.stuck:
		return x.cause
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-x.done:
		return x.openErr
	}
}

func (x *index) isReady() bool {
	select {
	case <-x.ready:
		return true
	default:
		return false
	}
}

func (x *index) checkFormat() error {
	v, err := x.lookup(metaFormat)
	if err != nil {
		return err
	}
	if v == nil {
		x.made = true
		return x.db.Set(metaFormat, []byte{format}, pebble.Sync)
	}
	if len(v) != 1 || v[0] != format {
		return fmt.Errorf("index format %v is not %d", v, format)
	}
	return nil
}

// get returns a copy of the value, nil if there is none.
func (x *index) get(key []byte) ([]byte, error) {
	x.reading.RLock()
	defer x.reading.RUnlock()
	if x.closed || !x.isReady() {
		return nil, errIndex
	}
	return x.lookup(key)
}

func (x *index) lookup(key []byte) ([]byte, error) {
	v, c, err := x.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return append([]byte{}, v...), nil
}

// write returns when the change is in the kernel; errRefused if it may be some time, or not.
func (x *index) write(apply func(*pebble.Batch) error) error {
	refused := x.health.refused()
	if x.health.isSick() {
		return errRefused
	}
	w := indexWrite{apply: apply, done: make(chan error, 1)}
	select {
	case x.writes <- w:
	case <-refused:
		return errRefused
	case <-x.broken:
		return errIndex
	case <-x.quit:
		return errIndex
	}
	select {
	case err := <-w.done:
		return err
	case <-refused:
		return errRefused
	case <-x.broken:
		return errIndex
	case <-x.done:
		select {
		case err := <-w.done: // the writer's last one
			return err
		default:
			return errIndex
		}
	}
}

// writeLazily is for what may be lost: a later request, not wrong bytes, is its price. While the disk refuses, what
// does not fit into the queue is.
func (x *index) writeLazily(apply func(*pebble.Batch) error) {
	w := indexWrite{apply: apply, lazy: true}
	select {
	case x.writes <- w:
		return
	default:
	}
	select {
	case x.writes <- w:
	case <-x.health.refused():
	case <-x.broken:
	case <-x.quit:
	}
}

// deleteLater deletes all records with the prefix.
func (x *index) deleteLater(prefix []byte) {
	from := append([]byte{}, prefix...)
	x.writeLazily(func(b *pebble.Batch) error { return b.DeleteRange(from, after(from), nil) })
}

// after is the first key behind all with the prefix.
func after(prefix []byte) []byte {
	end := append([]byte{}, prefix...)
	for i := len(end) - 1; i >= 0; i-- {
		end[i]++
		if end[i] != 0 {
			return end[:i+1]
		}
	}
	return nil
}

const (
	maxBatch  = 256
	lazyAfter = time.Second // then what was written lazily goes to the kernel, too
)

func (x *index) run() {
	defer close(x.done)
	tick := time.NewTicker(lazyAfter)
	defer tick.Stop()
	lazy := false
	for {
		select {
		case w := <-x.writes:
			lazy = x.commit(w) || lazy
		case <-tick.C:
			if lazy {
				x.flush()
			}
			lazy = false
		case <-x.quit:
			for {
				select {
				case w := <-x.writes:
					x.commit(w)
					continue
				default:
				}
				break
			}
			x.flush()
			return
		case <-x.broken:
			return
		}
	}
}

func (x *index) flush() {
	if err := x.db.LogData(nil, pebble.Sync); err != nil {
		x.fail(err)
	}
}

// commit writes w and what waits behind it, and reports whether some of it may still be in
// our memory.
func (x *index) commit(w indexWrite) (lazy bool) {
	defer func() {
		if r := recover(); r != nil { // pebble cannot make its next log
			x.giveUp(fmt.Errorf("pebble: %v", r))
		}
	}()
	b := x.db.NewBatch()
	waiting := make([]chan error, 0, maxBatch)
	for n := 0; ; n++ {
		if err := w.apply(b); err != nil {
			x.fail(err) // a batch in memory does not fail
			return false
		}
		if !w.lazy {
			waiting = append(waiting, w.done)
		}
		if n == maxBatch {
			break
		}
		select {
		case w = <-x.writes:
			continue
		default:
		}
		break
	}
	opts := pebble.Sync
	if len(waiting) == 0 {
		opts = pebble.NoSync
	}
	err := errors.Join(b.Commit(opts), b.Close())
	if err != nil {
		x.fail(err)
		err = errIndex
	}
	for _, done := range waiting {
		done <- err
	}
	return len(waiting) == 0
}

// listener fails the index when pebble lets writers wait for tables that it cannot write:
// they would wait for ever.
func (x *index) listener() *pebble.EventListener {
	var mu sync.Mutex
	var stalled bool
	var last error
	note := func(change func()) {
		mu.Lock()
		change()
		over := stalled && last != nil
		err := last
		mu.Unlock()
		if over {
			x.giveUp(err)
		}
	}
	return &pebble.EventListener{
		BackgroundError: func(err error) {
			x.log.Warn("cache index", "err", err.Error())
			note(func() { last = err })
		},
		FlushEnd: func(i pebble.FlushInfo) {
			if i.Err == nil {
				note(func() { last = nil })
			}
		},
		DataCorruption: func(i pebble.DataCorruptionInfo) {
			x.corrupt.Store(true)
			x.fail(i.Details)
		},
		WriteStallBegin: func(pebble.WriteStallBeginInfo) { note(func() { stalled = true }) },
		WriteStallEnd:   func() { note(func() { stalled = false }) },
	}
}

// fail is the end of the index in this process.
func (x *index) fail(err error) {
	x.failed.Do(func() {
		x.log.Error("cache index: nothing new is cached until the next start", "err", err.Error())
		close(x.broken)
	})
}

// giveUp fails the index and leaves the database to the end of the process.
func (x *index) giveUp(err error) {
	x.fail(err)
	x.gaveUp.Do(func() {
		x.cause = err
		close(x.stuck)
	})
}

func (x *index) isBroken() bool {
	select {
	case <-x.broken:
		return true
	default:
		return false
	}
}

func (x *index) isStuck() bool {
	select {
	case <-x.stuck:
		return true
	default:
		return false
	}
}

// close ends the writer and closes the database, unless that could wait for ever.
func (x *index) close() error {
	close(x.quit)
	select {
	case <-x.done:
	case <-x.stuck:
	}
	if x.isStuck() {
		return errIndex
	}
	x.reading.Lock()
	x.closed = true
	x.reading.Unlock()
	<-x.synced
	if !x.isReady() {
		return x.openErr
	}
	err := x.db.Close()
	if x.isBroken() {
		err = errors.Join(errIndex, err)
	}
	return err
}

// pebbleLog takes pebble's log. A Fatalf of it must not end the worker: its readers need no index.
type pebbleLog struct{ x *index }

func (l pebbleLog) Infof(string, ...any) {}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.x.log.Warn("cache index", "err", fmt.Sprintf(format, args...))
}

func (l pebbleLog) Fatalf(format string, args ...any) {
	l.x.giveUp(fmt.Errorf(format, args...))
	select {} // pebble relies on Fatalf not returning; nobody waits for its goroutines any more
}

// kernelFS makes a sync of pebble's log end in the kernel, not on the disk. A SIGKILL loses
// nothing then, and after a power cut every chunk is checked anyway. (pebble.NoSync would
// keep up to 32 KiB of log, some hundred chunks, in this process.) A log that is closed
// is synced, because pebble takes only the last one with a torn end. Tables and the
// manifest are synced as pebble wants.
type kernelFS struct{ vfs.FS }

func (k kernelFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := k.FS.Create(name, c)
	return wrapLog(name, f), err
}

func (k kernelFS) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := k.FS.ReuseForWrite(from, to, c)
	return wrapLog(to, f), err
}

func (k kernelFS) Unwrap() vfs.FS { return k.FS }

// Lock does nothing: the whole directory is locked already.
func (kernelFS) Lock(string) (io.Closer, error) { return io.NopCloser(nil), nil }

func wrapLog(name string, f vfs.File) vfs.File {
	if f == nil || !strings.HasSuffix(name, ".log") {
		return f
	}
	return logFile{f}
}

type logFile struct{ vfs.File }

func (logFile) Sync() error                { return nil }
func (logFile) SyncData() error            { return nil }
func (logFile) SyncTo(int64) (bool, error) { return false, nil }

func (f logFile) Close() error { return errors.Join(f.File.SyncData(), f.File.Close()) }
