package fill

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/fill/parquet"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/telemetry"
)

// batch is how many chunks one step of a long read asks for at once.
const batch = 8

// Reader reads one object as one principal: one per open file, because it finds the rows
// among its reads. All methods are safe for concurrent use; Close comes after them.
type Reader struct {
	f         *Fills
	obj       object.Object
	id        object.ID
	src       source.Source
	principal object.Principal
	usage     *Usage

	lease   atomic.Pointer[lease]
	through atomic.Bool // the cache has no room for an object of this size
	whole   atomic.Bool // see Whole

	tailSeen atomic.Bool // the object's last bytes were read
	columnar atomic.Bool // they are Parquet's: rows of reads are as long as a column's part. Where that ends is in parts; until then no more is read ahead than was read
	closed   atomic.Bool
	opening  sync.Mutex // one opens the lease; held across its I/O

	mu      sync.Mutex // guards the fields below
	streams streams
	ahead   []*chunk // what was asked for by read-ahead and was not here when last looked at
	rest    int      // readRest has asked for all chunks below
	parts   parquet.Layout
	looked  bool   // for parts
	unlearn func() // ends the look into the footer; may be nil

	declined []span // see Decline
	mistaken bool   // somebody came to such a place: no more in this file

	aheadBytes int64   // on their way to the reader; guarded by Fills.mu
	came       arrival // of what was; guarded by Fills.mu
	elsewhere  way     // of no stream
}

// lease is a cache file that several uses share: the reader's own, and spans.
type lease struct {
	file    *cachestore.File
	uses    atomic.Int32
	release func() // ends one use
}

func newLease(file *cachestore.File) *lease {
	l := &lease{file: file}
	l.uses.Store(1)
	l.release = func() {
		if l.uses.Add(-1) == 0 {
			l.file.Close()
		}
	}
	return l
}

func (l *lease) use() bool {
	for {
		n := l.uses.Load()
		if n == 0 {
			return false
		}
		if l.uses.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// ID is that of the object.
func (r *Reader) ID() object.ID { return r.id }

// Gave counts a read of the whole object, whose bytes somebody else has taken from the cache file.
func (r *Reader) Gave() { r.countDisk(0, int(r.obj.Size)) }

// Passed counts an open after which the kernel reads the cache file itself.
func (r *Reader) Passed() { r.usage.Passed.Add(uint64(r.obj.Size)) }

// Object is what is read.
func (r *Reader) Object() object.Object { return r.obj }

// File is the lease, nil where the object is read through or the reader is closed. It is
// valid until Close, or until a read finds it evicted: check File.Evicted.
func (r *Reader) File() *cachestore.File {
	l := r.leased()
	if l == nil {
		return nil
	}
	defer l.release()
	return l.file
}

// leased returns the lease, opened now if it was not, in use by the caller, who releases it; nil where the
// object is read through.
func (r *Reader) leased() *lease {
	if l := r.lease.Load(); l != nil && l.use() {
		return l
	}
	if r.through.Load() || r.closed.Load() {
		return nil
	}
	return r.openLease(nil)
}

// fresh reports whether nothing of the object is on the disk and no lease has been opened: then that can
// wait until the store is asked.
func (r *Reader) fresh() bool {
	return r.lease.Load() == nil && !r.f.store.Peek(r.id).Exists
}

// openLease opens the cache file, in place of the lease old.
func (r *Reader) openLease(old *lease) *lease {
	r.opening.Lock()
	defer r.opening.Unlock()
	if l := r.lease.Load(); l != old && l != nil && l.use() {
		return l
	}
	if r.closed.Load() || r.through.Load() {
		return nil
	}
	file, err := r.f.store.Open(r.obj)
	if err != nil {
		r.noRoom(err)
		return nil
	}
	l := newLease(file)
	l.uses.Add(1)
	r.lease.Store(l)
	if old != nil {
		old.release()
	}
	return l
}

// noRoom notes that the object is read through.
func (r *Reader) noRoom(err error) {
	if !errors.Is(err, object.ErrNoSpace) {
		r.f.cfg.Log.Error("open cache file", "object", r.obj, "err", err)
	}
	if r.lease.Load() == nil && !r.through.Swap(true) {
		r.f.mu.Lock()
		r.f.through++
		r.f.mu.Unlock()
	}
}

// Close gives up the lease and the interest in what was read ahead.
func (r *Reader) Close() error {
	if r.closed.Swap(true) {
		return nil
	}
	r.opening.Lock()
	l := r.lease.Swap(nil)
	r.opening.Unlock()
	if l != nil {
		l.release()
	}
	r.mu.Lock()
	left := r.ahead
	r.ahead = nil
	if r.unlearn != nil {
		r.unlearn()
	}
	r.mu.Unlock()

	f := r.f
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dropReadyOf(r)
	if r.through.Load() {
		f.through--
	}
	for _, c := range left {
		f.lessInterest(c)
	}
	return nil
}

// Span is the fast path of a read of n bytes at off: where all of it (up to the object's end) is in
// the cache file and granted, the caller may read it from fd until it calls release. Otherwise
// ReadAt does what is missing.
func (r *Reader) Span(off int64, n int) (fd int, release func(), ok bool) {
	n = r.clip(off, n)
	if n == 0 || r.fresh() {
		return 0, nil, false
	}
	l := r.leased()
	if l == nil {
		return 0, nil, false
	}
	first, last := chunkAt(off), chunkAt(off+int64(n)-1)
	if !has(l, first, last) || r.inMemory(first, last) || !r.Granted() {
		l.release()
		return 0, nil, false
	}
	r.fromDisk(l, off, n)
	if !l.file.Complete() {
		r.readAhead(context.Background(), off, n)
	}
	return l.file.Fd(), l.release, true
}

func has(l *lease, first, last int) bool {
	for i := first; i <= last; i++ {
		if !l.file.Has(i) {
			return false
		}
	}
	return true
}

// clip returns how many of n bytes at off the object has.
func (r *Reader) clip(off int64, n int) int {
	if off < 0 || off >= r.obj.Size || n <= 0 {
		return 0
	}
	return int(min(int64(n), r.obj.Size-off))
}

// ReadAt reads len(p) bytes at off, fewer only at the object's end, where n is 0 and err nil. The
// error wraps a sentinel of package object; then none of p may be used.
func (r *Reader) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := r.readAt(ctx, p, off, nil)
	if err != nil {
		return 0, fmt.Errorf("read %v at %d: %w", r.obj, off, err)
	}
	return n, nil
}

// readAt copies into p, or if lend is not nil only what is not in memory, and then notes there where all of it is.
func (r *Reader) readAt(ctx context.Context, p []byte, off int64, lend *Loan) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%w: negative offset", object.ErrInvalid)
	}
	p = p[:r.clip(off, len(p))]
	for done := 0; done < len(p); {
		at := off + int64(done)
		n := min(len(p)-done, int((int64(chunkAt(at))+batch)*object.ChunkSize-at))
		if err := r.step(ctx, p[done:done+n], at, lend); err != nil {
			return 0, err
		}
		done += n
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.authorize(ctx); err != nil {
		return 0, err
	}
	if off+int64(len(p)) == r.obj.Size {
		r.seeTail(ctx, lend.end(p, parquet.Tail))
	}
	return len(p), nil
}

// step reads a piece of at most batch chunks.
func (r *Reader) step(ctx context.Context, p []byte, off int64, lend *Loan) error {
	first, last := chunkAt(off), chunkAt(off+int64(len(p))-1)
	if r.fresh() {
		// Ask first.
	} else if l := r.leased(); l != nil {
		if has(l, first, last) && !r.inMemory(first, last) {
			n, err := l.file.ReadAt(p, off)
			complete := l.file.Complete()
			if n == len(p) {
				r.fromDisk(l, off, n)
			}
			l.release()
			if n == len(p) {
				lend.add(p, nil)
				if !complete {
					r.readAhead(ctx, off, n)
				}
				return nil
			}
			if r.closed.Load() {
				return errClosed
			}
			r.f.cfg.Log.Debug("read cache file", "object", r.obj, "off", off, "err", err) // the cache has counted it
		} else {
			l.release()
		}
	}
	if r.readTail(p, off) {
		lend.add(p, nil)
		return nil
	}
	var room [batch]*chunk
	held, own, err := r.acquire(ctx, room[:0], first, last)
	if err != nil {
		return err
	}
	r.readAhead(ctx, off, len(p))
	for k, c := range held {
		if err == nil {
			lo := max(off, int64(first+k)*object.ChunkSize)
			hi := min(off+int64(len(p)), int64(first+k+1)*object.ChunkSize)
			err = r.copyChunk(ctx, c, own>>k&1 == 1, p[lo-off:hi-off], first+k, lo, lend)
		} else if c != nil {
			r.f.done(c, false)
		}
	}
	return err
}

// acquire takes hold of the chunks [first, last]: entry k of the result is nil if chunk first+k is on the
// disk, else it is in flight or in memory, and bit k of own says that this call asked for it.
func (r *Reader) acquire(ctx context.Context, held []*chunk, first, last int) (_ []*chunk, own uint, err error) {
	f := r.f
	held = held[:last-first+1]
	clear(held)
	for {
		f.mu.Lock()
		gen := f.gen
		missing := false
		for k := range held {
			if held[k] == nil {
				held[k] = r.join(first + k)
			}
			missing = missing || held[k] == nil
		}
		f.mu.Unlock()
		if !missing {
			return held, own, nil
		}
		absent := r.absent(held, first)
		if absent == 0 {
			return held, own, nil
		}
		f.mu.Lock()
		if f.gen != gen { // one of them may have been stored meanwhile
			f.mu.Unlock()
			continue
		}
		err := f.lostErr(r.id)
		if f.closed {
			err = errClosed
		}
		if err == nil {
			own |= r.startAbsent(ctx, held, first, absent)
		}
		f.mu.Unlock()
		if err != nil {
			for _, c := range held {
				if c != nil {
					f.done(c, false)
				}
			}
			return nil, 0, err
		}
		return held, own, nil
	}
}

// join takes hold of a chunk that is in flight or in memory, nil if it is neither. Requires
// f.mu.
func (r *Reader) join(i int) *chunk {
	c := r.f.chunks[chunkKey{r.id, i}]
	if c != nil {
		r.f.want(c)
		if c.elem == nil && c.ready == nil {
			r.f.count.joined.Add(1)
		}
	}
	return c
}

// absent tells which chunks are neither held nor on the disk, as bits from first on.
func (r *Reader) absent(held []*chunk, first int) (bits uint) {
	if r.fresh() {
		for k, c := range held {
			if c == nil {
				bits |= 1 << k
			}
		}
		return bits
	}
	l := r.leased()
	if l != nil && l.file.Evicted() && !has(l, first, first+len(held)-1) {
		l.release()
		l = r.openLease(l)
	}
	for k, c := range held {
		if c == nil && (l == nil || !l.file.Has(first+k)) {
			bits |= 1 << k
		}
	}
	if l != nil {
		l.release()
	}
	return bits
}

// startAbsent asks for the absent chunks, one GET for those in a row. Requires f.mu.
func (r *Reader) startAbsent(ctx context.Context, held []*chunk, first int, absent uint) (own uint) {
	maxGet := int(r.f.cfg.MaxGetBytes / object.ChunkSize)
	for k := 0; k < len(held); k++ {
		if absent>>k&1 == 0 || held[k] != nil {
			continue
		}
		if held[k] = r.join(first + k); held[k] != nil { // somebody was faster
			continue
		}
		end := k
		for end+1 < len(held) && end+1-k < maxGet && absent>>(end+1)&1 == 1 && r.f.chunks[chunkKey{r.id, first + end + 1}] == nil {
			end++
		}
		ft := r.start(ctx, first+k, first+end, foreground)
		for j, c := range ft.chunks {
			r.f.want(c)
			held[k+j] = c
			own |= 1 << (k + j)
		}
		k = end
	}
	return own
}

// copyChunk fills p with the bytes at off, which are of chunk i: from c, or from the disk if c is nil. It
// ends the hold on c. Where somebody else's fetch failed, it tries with its own.
func (r *Reader) copyChunk(ctx context.Context, c *chunk, own bool, p []byte, i int, off int64, lend *Loan) error {
	for retried := false; ; {
		err := r.copyOnce(ctx, c, p, i, off, lend)
		switch {
		case err == nil || ctx.Err() != nil || r.closed.Load():
			return err
		case errors.Is(err, object.ErrDenied) && (c == nil || c.fetch.principal == r.principal):
			return err
		case errors.Is(err, object.ErrDenied): // somebody else's credential
		case own || retried || errors.Is(err, object.ErrChanged) || errors.Is(err, object.ErrNotFound):
			return err
		default:
			retried = true
		}
		var room [1]*chunk
		held, mine, err := r.acquire(ctx, room[:0], i, i)
		if err != nil {
			return err
		}
		c, own = held[0], mine != 0
	}
}

func (r *Reader) copyOnce(ctx context.Context, c *chunk, p []byte, i int, off int64, lend *Loan) error {
	if c == nil {
		err := r.copyDisk(p, off)
		if err == nil {
			lend.add(p, nil)
		}
		return err
	}
	telemetry.Current(ctx).WaitsFor(c.fetch.span)
	begin := int(off - int64(i)*object.ChunkSize)
	waited, err := r.f.await(ctx, c, begin+len(p))
	if err != nil {
		r.f.done(c, false)
		return err
	}
	r.fromFetch(len(p), waited)
	r.f.got(c)
	c.given.Add(int64(len(p)))
	if begin+len(p) == c.size {
		r.f.pass(c)
	}
	if lend != nil {
		lend.add(c.buf[begin:begin+len(p)], c)
		return nil
	}
	copy(p, c.buf[begin:])
	r.f.done(c, true)
	return nil
}

func (r *Reader) copyDisk(p []byte, off int64) error {
	l := r.leased()
	if l == nil {
		return errClosed
	}
	defer l.release()
	n, err := l.file.ReadAt(p, off)
	if n < len(p) {
		return err
	}
	r.fromDisk(l, off, n)
	return nil
}

// fromDisk counts a read that a cache file served.
func (r *Reader) fromDisk(l *lease, off int64, n int) {
	l.file.Touch(chunkAt(off), chunkAt(off+int64(n)-1))
	r.countDisk(off, n)
}

func (r *Reader) countDisk(off int64, n int) {
	chunks := uint64(chunkAt(off+int64(n)-1) - chunkAt(off) + 1)
	r.f.count.disk.Add(uint64(n))
	r.f.count.hits.Add(chunks)
	r.usage.DiskBytes.Add(uint64(n))
	r.usage.Hits.Add(chunks)
}

// fromFetch counts one that a chunk in memory served, at once or after its bytes had come.
func (r *Reader) fromFetch(n int, waited bool) {
	bytes, usage := &r.f.count.memory, &r.usage.MemoryBytes
	if waited {
		bytes, usage = &r.f.count.store, &r.usage.StoreBytes
	}
	bytes.Add(uint64(n))
	usage.Add(uint64(n))
	r.f.count.misses.Add(1)
	r.usage.Misses.Add(1)
}

// readAhead takes a read into account and asks for what a stream will read next.
func (r *Reader) readAhead(ctx context.Context, off int64, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() {
		return
	}
	r.comeTo(span{off, off + int64(n)})
	st := r.streams.note(off, n)
	if parts := r.layout(); parts != nil {
		st.within(parts, off)
	}
	r.goOn(ctx, st)
}

// more asks for what comes next of the stream that was used last, when something has come: its reader may wait
// for the slowest of several GETs, and all others would end meanwhile.
func (r *Reader) more(ctx context.Context) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed.Load() && len(r.streams.all) > 0 {
		r.goOn(ctx, &r.streams.all[r.streams.last])
	}
}

// goOn asks for what comes next of a stream. Requires r.mu.
func (r *Reader) goOn(ctx context.Context, st *stream) {
	if !st.sequential() {
		return
	}
	l := r.leased() // before the window: now it is known whether the object is read through
	if l != nil {
		defer l.release()
	}
	longest := st.longestGet(r.f.cfg.MaxGetBytes)
	window, flight, pieces := r.window(longest)
	chunks := r.obj.Chunks()
	if end, ok := st.ends(r.parts); ok {
		chunks = chunkAt(end + object.ChunkSize - 1)
	} else if r.columnar.Load() {
		window = min(window, st.run)
	}
	from, to, get := st.next(chunks, window, longest, pieces)
	for from < to && r.onWay(st.way)+r.bytes(from, min(to, from+get)) <= flight {
		end := min(to, from+get)
		if !r.prefetch(ctx, l, st.way, from, end) {
			break
		}
		from = end
		st.ahead = end
	}
	if st.hope > 0 && r.whole.Load() && !r.columnar.Load() && l != nil && l.file.PresentBytes() > r.obj.Size/4 {
		r.readRest(ctx, l, flight)
	}
}

// Whole allows to read all of the object ahead when more than a quarter of it is here and the reader goes on in
// long pieces: whoever jumps about among them would find the link idle after each jump.
func (r *Reader) Whole() { r.whole.Store(true) }

// readRest asks for absent chunks from the object's beginning on, as long as less than flight is on its way. Requires r.mu.
func (r *Reader) readRest(ctx context.Context, l *lease, flight int64) {
	const most = 64 // chunks looked at in one call
	for end := min(r.obj.Chunks(), r.rest+most); r.rest < end && r.onWay(nil) < flight; r.rest += leastGet {
		if !r.prefetch(ctx, l, &r.elsewhere, r.rest, min(end, r.rest+leastGet)) {
			return
		}
	}
}

// onWay is how much a stream has asked for and not got; nil means all of them.
func (r *Reader) onWay(w *way) int64 {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	if w == nil {
		return r.aheadBytes
	}
	return w.bytes
}

// spare is how much more is kept on its way than a store needs at the speed it has now: that may become greater.
const spare = 2

// window is how far a stream may be read ahead, and how much of that may be on its way, in GETs of that size. It is the
// reader's own arrivals that count: how fast a stream goes forward says little while it waits for one of many GETs.
// Chunks that only the recent memory can hold must not push each other out before they are read. And it is in how many
// pieces the window is asked for: all who read ahead use the link together, and each GET costs the store and us something.
func (r *Reader) window(get int64) (window, flight int64, pieces int) {
	f := r.f
	f.mu.Lock()
	defer f.mu.Unlock()
	window, flight = firstWindow, firstWindow
	if r.came.rate > 0 {
		flight = max(leastFlight, f.paces[r.obj.Store].inFlight(spare*r.came.rate, get))
		window = max(firstWindow, 2*flight)
	}
	// What comes before its reader needs it waits in memory, which all readers share.
	readers := max(1, f.ahead)
	window = min(window, max(leastFlight, (f.budget.total-f.budget.reserve)/int64(readers)))
	if r.through.Load() {
		window = min(window, f.cfg.RecentBytes/int64(2*max(1, f.through)))
	}
	return min(window, f.cfg.MaxWindowBytes), flight, max(leastPieces, mostPieces/readers)
}

// prefetch asks for the absent ones of the chunks [from, to), and reports whether there was memory
// for it. Requires r.mu.
func (r *Reader) prefetch(ctx context.Context, l *lease, w *way, from, to int) bool {
	f := r.f
	r.prune()
	for from < to {
		f.mu.Lock()
		gen := f.gen
		f.mu.Unlock()
		for from < to && l != nil && l.file.Has(from) {
			from++
		}
		end := from
		for end < to && (l == nil || !l.file.Has(end)) {
			end++
		}
		if from == end {
			return true
		}
		size := r.bytes(from, end)
		if !r.share(size) || !f.budget.try(size) && !(f.giveWay(r, w, size) && f.budget.try(size)) {
			return false
		}
		from = r.startAhead(ctx, w, from, end, gen, size)
	}
	return true
}

// startAhead asks for the first ones in a row of the chunks [first, end) that are not in flight, and returns the one
// behind them. It does nothing if something was stored since gen was read. Requires r.mu.
func (r *Reader) startAhead(ctx context.Context, w *way, first, end int, gen uint64, paid int64) (next int) {
	f := r.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gen != gen {
		f.budget.give(paid, 1)
		return first
	}
	for first < end && f.chunks[chunkKey{r.id, first}] != nil {
		first++
	}
	stop := first
	for stop < end && f.chunks[chunkKey{r.id, stop}] == nil {
		stop++
	}
	if first == stop || f.closed || f.lostErr(r.id) != nil {
		f.budget.give(paid, 1)
		return end
	}
	f.budget.give(paid-r.bytes(first, stop), 0)
	ft := r.start(ctx, first, stop-1, ahead)
	ft.reader, ft.way = r, w
	if r.aheadBytes == 0 {
		f.ahead++
	}
	for _, c := range ft.chunks {
		c.interest++
		r.aheadBytes += int64(c.size)
		w.bytes += int64(c.size)
	}
	r.ahead = append(r.ahead, ft.chunks...)
	return stop
}

func (r *Reader) bytes(first, end int) int64 {
	return min(int64(end)*object.ChunkSize, r.obj.Size) - int64(first)*object.ChunkSize
}

// prune forgets what read-ahead has brought. Requires r.mu.
func (r *Reader) prune() {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	kept := r.ahead[:0]
	for _, c := range r.ahead {
		if c.over {
			c.interest--
		} else {
			kept = append(kept, c)
		}
	}
	clear(r.ahead[len(kept):])
	r.ahead = kept
}

// share reports whether size more bytes of read-ahead are fair to the others that read ahead.
func (r *Reader) share(size int64) bool {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	fair := r.f.cfg.MaxInFlightBytes / int64(max(1, r.f.ahead))
	return r.aheadBytes+size <= max(fair, 2*object.ChunkSize)
}
