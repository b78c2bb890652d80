package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/fill"
	"github.com/larderfs/larder/cacheworker/metadata"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/telemetry"
)

const (
	writing = syscall.O_ACCMODE | syscall.O_TRUNC

	// slack is added to freshness at an open that follows a look-up: it was of the same open(2).
	slack = time.Second

	// maxTold is how many threads are remembered that were told to look a name up again; one
	// that is not comes to no harm but in a race.
	maxTold = 4096

	// registerWait is how long an open waits for a broker that is being restarted; then the
	// file is read without passthrough.
	registerWait = 2 * time.Second

	// spliceMin is the largest READ for which a copy costs less than the way through a pipe.
	spliceMin = 16 << 10

	// spliceMax is the largest READ that is spliced: a pipe holds 1 MiB, and go-fuse wants
	// header and payload in one.
	spliceMax = 512 << 10
)

// Open implements fuse.RawFileSystem. What it answers depends on the node alone: its mode
// never changes.
func (m *Mount) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := m.table.get(in.NodeId)
	if n == nil {
		return estale
	}
	if n.kind != fileKind {
		return fuse.EINVAL
	}
	if in.Flags&writing != 0 && !m.cfg.allowWrites {
		return erofs
	}
	ctx, stop := m.requestContext(cancel, opOpen)
	defer stop()
	if err := m.check(ctx, n, in.Pid); err != nil {
		return m.status("open", n, err)
	}
	n.file.mu.Lock()
	defer n.file.mu.Unlock()
	r := m.hold(n, true)
	if err := r.Authorize(ctx); err != nil {
		m.unhold(n, true)
		return m.failed("open", n, err)
	}
	m.answerOpen(ctx, n, r, out)
	return fuse.OK
}

// check returns nil if the node may be opened: its name still leads to it, for which the store
// is asked if what is known of it is too old, and it is in the mode that a new node would be.
// Else it returns object.ErrChanged, upon which the kernel looks the name up again and comes a second
// time, the last. Then another mode will do, and a version that has been looked up just now.
func (m *Mount) check(ctx context.Context, n *node, thread uint32) error {
	m.table.mu.Lock()
	m.table.names.settle(n.parent)
	gone, checked, looked := n.file.gone, n.file.checked, n.file.looked
	n.file.looked = false
	m.table.mu.Unlock()
	d := m.data.Load()
	limit := d.Freshness
	if looked {
		limit += slack
	}
	switch {
	case !m.isOf(d, n): // its mount was moved or removed
		m.setGone(n)
	case !gone && time.Since(checked) > limit:
		e, err := d.Lookup(ctx, n.parent.key, n.name, d.Freshness)
		if err != nil && !errors.Is(err, object.ErrNotFound) {
			return err
		}
		m.found(n, e, err == nil)
	}
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	told, again := m.told[thread]
	delete(m.told, thread)
	switch {
	case !n.file.stale && (n.file.mode == m.wantedMode(n.file.size, func() object.ID { return m.table.objectOf(n).ID() }) || m.usable(n.file)):
		return nil
	case again && (!n.file.gone || told != n.id && looked):
		return nil
	case again && told == n.id: // a bind mount of the file itself: the kernel cannot look it up
	case len(m.told) < maxTold:
		m.told[thread] = n.id
	}
	m.cfg.Counters.Stale.Add(1)
	return fmt.Errorf("open node %d: %w", n.id, object.ErrChanged)
}

// isOf reports whether a file is what d has at its path, as far as mounts decide that.
func (m *Mount) isOf(d *dataset.Dataset, n *node) bool {
	if m.cfg.Volume.Path == "" {
		return true
	}
	o, ok := d.Origin(n.parent.key)
	return ok && o == m.table.origin(n.file.origin).Origin
}

// found notes what a file's name leads to now, if to anything.
func (m *Mount) found(n *node, e metadata.Entry, ok bool) {
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	if !ok || e.Folder || !n.file.of(e.Object) {
		n.supersede(true)
		return
	}
	n.file.checked = e.At
}

func (m *Mount) setGone(n *node) {
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	n.supersede(true)
}

// hold returns the node's reader, opened if it was not. opening counts an open file; a READ
// of a node without one (its open was an earlier worker's) stands for it.
func (m *Mount) hold(n *node, opening bool) *fill.Reader {
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	f := n.file
	if opening || f.opens == 0 {
		m.table.setOpens(n, f.opens+1)
		f.opened++
	}
	if !opening {
		f.reading++
	}
	if f.reader == nil {
		d := m.data.Load()
		o := m.table.origin(f.origin)
		f.reader = d.Reader(o.Origin, o.Spec, m.table.objectOf(n))
		if d.Complete != brokerwire.CompleteNever {
			f.reader.Whole()
		}
	}
	return f.reader
}

func (m *Mount) unhold(n *node, opening bool) {
	m.table.mu.Lock()
	f := n.file
	if opening {
		m.table.setOpens(n, f.opens-1)
	} else {
		f.reading--
	}
	var r *fill.Reader
	if f.opens == 0 && f.reading == 0 {
		r, f.reader = f.reader, nil
	}
	backing := m.retire(n)
	m.table.mu.Unlock()
	if r != nil {
		r.Close()
	}
	m.unregister(backing)
}

// answerOpen opens in the node's mode. Requires n.file.mu.
func (m *Mount) answerOpen(ctx context.Context, n *node, r *fill.Reader, out *fuse.OpenOut) {
	out.OpenFlags = fuse.FOPEN_NOFLUSH | fuse.FOPEN_KEEP_CACHE
	if n.file.mode == passthrough {
		backing, err := m.backing(ctx, n, r)
		if err != nil {
			// No page of this inode may be cached, and none is: the kernel asks us for each read.
			level := slog.LevelWarn
			if errors.Is(err, object.ErrIncomplete) {
				level = slog.LevelDebug
			}
			m.cfg.Log.Log(ctx, level, "passthrough", "volume", m.cfg.Volume.ID, "object", r.Object().String(), "err", err)
			out.OpenFlags = fuse.FOPEN_NOFLUSH | fuse.FOPEN_DIRECT_IO
			m.cfg.Counters.Unpassed.Add(1)
			return
		}
		m.cfg.Counters.Passed.Add(1)
		m.cfg.Counters.PassedBytes.Add(uint64(n.file.size))
		r.Passed()
		out.BackingID = backing
		out.OpenFlags = fuse.FOPEN_NOFLUSH | fuse.FOPEN_PASSTHROUGH
		return
	}
	m.cfg.Counters.Cached.Add(1)
	m.completeMaybe(n, r)
	m.give(n, r)
}

var smallBuffers = sync.Pool{New: func() any { return new([smallFile]byte) }}

// give puts the bytes of a small file that is cached into the kernel's page cache, before its open is answered:
// nobody has to ask for them then. It does so once, because whoever opens it again finds them there, and it does not say
// whether it did: what is not there is asked for. Requires n.file.mu.
func (m *Mount) give(n *node, r *fill.Reader) {
	size := int(n.file.size)
	if n.file.given || size == 0 || size > smallFile {
		return
	}
	d := m.data.Load()
	if b := m.brought.take(r.ID()); len(b) == size && r.Granted() {
		d.Used(r.ID())
		r.Gave()
		n.file.given = m.store(n.id, 0, b).Ok()
		m.bringBehind(d, n)
		return
	}
	fd, release, ok := r.Span(0, size)
	if !ok {
		return
	}
	m.bringBehind(d, n)
	buf := smallBuffers.Get().(*[smallFile]byte)
	defer smallBuffers.Put(buf)
	got, err := syscall.Pread(fd, buf[:size], 0)
	release()
	if err == nil && got == size {
		n.file.given = m.store(n.id, 0, buf[:size]).Ok()
	}
}

// backing is the id of the node's backing file, registered now if it was not. It stays
// until the kernel forgets the node or the cache file is evicted. Requires n.file.mu.
func (m *Mount) backing(ctx context.Context, n *node, r *fill.Reader) (int32, error) {
	m.table.mu.RLock()
	id, others := n.file.backing, n.file.opens > 1
	m.table.mu.RUnlock()
	if id != 0 {
		if !others {
			m.data.Load().Used(r.Object().ID())
		}
		return id, nil
	}
	if others { // opened without: what one of them has mapped is in the page cache, and the kernel mixes nothing
		return 0, fmt.Errorf("opened without passthrough before: %w", object.ErrIncomplete)
	}
	file := r.File()
	if file == nil {
		return 0, object.ErrIncomplete
	}
	view, err := file.View()
	if err != nil {
		return 0, err
	}
	defer view.Close()
	wait, stop := context.WithTimeout(ctx, registerWait)
	defer stop()
	id, err = m.cfg.Broker.Register(wait, m.cfg.Volume.ID, n.id, view)
	if err != nil {
		if errors.Is(err, object.ErrDenied) && m.pass.Swap(false) {
			m.cfg.Log.Error("passthrough is off: the broker refuses our files", "volume", m.cfg.Volume.ID, "err", err)
		}
		return 0, err
	}
	m.table.mu.Lock()
	defer m.table.mu.Unlock()
	m.table.setBacking(n, id)
	n.file.evicted = file.Evicted() // Evicted was called, perhaps, when the node had no backing file yet
	return id, nil
}

// completeMaybe has the rest of the file filled, as the volume says.
func (m *Mount) completeMaybe(n *node, r *fill.Reader) {
	d := m.data.Load()
	obj, o := r.Object(), m.table.origin(n.file.origin)
	switch d.Complete {
	case brokerwire.CompleteAlways:
		d.CompleteLater(o.Origin, o.Spec, obj)
	case brokerwire.CompleteAuto:
		if obj.Chunks() <= 1 {
			return // it is, once it has been read
		}
		m.table.mu.RLock()
		again := n.file.opened > 1
		m.table.mu.RUnlock()
		if again {
			d.CompleteLater(o.Origin, o.Spec, obj)
		}
	}
}

// failed is status for reads and opens: a version that has gone ends the node.
func (m *Mount) failed(op string, n *node, err error) fuse.Status {
	if errors.Is(err, object.ErrChanged) || errors.Is(err, object.ErrNotFound) {
		m.setGone(n)
		o := m.table.origin(n.file.origin)
		m.data.Load().Changed(o.Origin, o.Key(n.parent.key+n.name))
		return m.cfg.Counters.failures.note(estale)
	}
	return m.status(op, n, err)
}

// Read implements fuse.RawFileSystem.
func (m *Mount) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n := m.table.get(in.NodeId)
	if n == nil || n.kind != fileKind {
		return nil, estale
	}
	m.cfg.Counters.Reads.Add(1)
	r := m.hold(n, false)
	off, size := int64(in.Offset), int(min(int64(in.Size), max(0, n.file.size-int64(in.Offset))))
	m.cfg.Counters.ReadBytes.Add(uint64(size))
	if fd, release, ok := r.Span(off, size); ok && size > 0 {
		if m.cfg.Features.Splice && size > spliceMin && size <= spliceMax {
			m.cfg.Counters.Spliced.Add(1)
			return span{m: m, n: n, r: r, cancel: cancel, fd: fd, off: off, size: size, release: release}, fuse.OK
		}
		got, err := syscall.Pread(fd, buf[:size], off)
		release()
		if err == nil && got == size {
			m.unhold(n, false)
			return copied(buf[:got]), fuse.OK
		}
	}
	if r.Decline(off, size, readAhead(n, in)) {
		m.unhold(n, false)
		m.cfg.Counters.Declined.Add(1)
		return nil, fuse.EAGAIN
	}
	began := time.Now()
	ctx, stop := m.requestContext(cancel, opRead)
	defer stop()
	if span := telemetry.Current(ctx); span.Recorded() {
		span.Text("key", r.Object().Key)
		span.Int("offset", off)
		span.Int("bytes", int64(size))
	}
	loan, err := r.Lend(ctx, buf[:size], off)
	m.cfg.Counters.Took[opRead].Since(began)
	if err != nil {
		defer m.unhold(n, false)
		return nil, m.failed("read", n, err)
	}
	l := lent{loan, m, n}
	if loan.Size() == 0 { // go-fuse forgets about it
		l.Done()
		return copied(nil), fuse.OK
	}
	return l, fuse.OK
}

// readAhead reports whether a READ is surely of the kernel's read-ahead. Nobody is told if that fails: its folios stay
// in the page cache without their bytes, and who wants one, by whatever call, has it read alone. Such a READ, of one folio, begins at a
// multiple of its size. An O_DIRECT read names the owner of locks, and a node whose pages are not cached has others.
func readAhead(n *node, in *fuse.ReadIn) bool {
	if n.file.mode != cached || in.ReadFlags&fuse.READ_LOCKOWNER != 0 || in.Flags&syscall.O_DIRECT != 0 {
		return false
	}
	folio := uint64(1) << bits.Len32(max(in.Size, 1)-1)
	return in.Offset%folio != 0
}

// lent is an answer that lies in the memory of chunks, from which the kernel copies it. It is valid until Done.
type lent struct {
	*fill.Loan
	m *Mount
	n *node
}

func (l lent) Done() {
	l.Return()
	l.m.unhold(l.n, false)
}

func (l lent) Slices() ([][]byte, fuse.Status) { return l.Pieces(), fuse.OK }

// Bytes is for when there is no writev.
func (l lent) Bytes(buf []byte) ([]byte, fuse.Status) {
	n := 0
	for _, p := range l.Pieces() {
		n += copy(buf[n:], p)
	}
	return buf[:n], fuse.OK
}

// span is an answer that lies in the cache file, from which go-fuse splices it. It is valid
// until Done.
type span struct {
	m       *Mount
	n       *node
	r       *fill.Reader
	cancel  <-chan struct{}
	fd      int
	off     int64
	size    int
	release func()
}

func (s span) Size() int { return s.size }

func (s span) Done() {
	s.release()
	s.m.unhold(s.n, false)
}

func (s span) Seekable() (fd uintptr, off int64, size int) { return uintptr(s.fd), s.off, s.size }

// Bytes is for when splicing fails: if the disk does, the bytes are the store's.
func (s span) Bytes(buf []byte) ([]byte, fuse.Status) {
	if n, err := syscall.Pread(s.fd, buf[:s.size], s.off); err == nil && n == s.size {
		return buf[:n], fuse.OK
	}
	ctx, stop := s.m.requestContext(s.cancel, opRead)
	defer stop()
	n, err := s.r.ReadAt(ctx, buf[:s.size], s.off)
	if err != nil {
		return nil, s.m.failed("read", s.n, err)
	}
	return buf[:n], fuse.OK
}

// copied is an answer in memory. go-fuse tries to splice what has no Slices.
type copied []byte

func (c copied) Size() int                          { return len(c) }
func (c copied) Done()                              {}
func (c copied) Bytes([]byte) ([]byte, fuse.Status) { return c, fuse.OK }
func (c copied) Slices() ([][]byte, fuse.Status)    { return [][]byte{c}, fuse.OK }

// Release implements fuse.RawFileSystem.
func (m *Mount) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if n := m.table.get(in.NodeId); n != nil && n.kind == fileKind {
		m.readInPart(n)
		m.unhold(n, true)
	}
}

// readInPart completes a file of which a good share was read.
func (m *Mount) readInPart(n *node) {
	d := m.data.Load()
	if d.Complete != brokerwire.CompleteAuto || n.file.mode != cached || n.file.size <= object.ChunkSize {
		return
	}
	obj := m.table.objectOf(n)
	if info := d.Peek(obj.ID()); !info.Complete && info.PresentBytes > obj.Size/2 {
		o := m.table.origin(n.file.origin)
		d.CompleteLater(o.Origin, o.Spec, obj)
	}
}
