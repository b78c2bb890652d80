package fill

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
	"github.com/larderfs/larder/cacheworker/telemetry"
)

type chunkKey struct {
	id object.ID
	i  int
}

// chunk is one that is being fetched, or that only memory holds. Its fields are guarded by
// Fills.mu; bytes of buf below n never change as long as refs says that somebody reads them.
type chunk struct {
	key   chunkKey
	fetch *fetch
	size  int

	buf  []byte // nil until its first bytes come
	n    int    // bytes of it that are here
	err  error  // why there will not be more
	over bool   // all here, or err
	left bool   // no longer in the map: stored, failed or forgotten

	given  atomic.Int64                    // bytes that readers got
	ready  *list.Element                   // in Fills.ready
	since  time.Time                       // in Fills.ready
	passed bool                            // somebody has read its last byte
	asked  atomic.Bool                     // somebody has got bytes of it
	marked atomic.Pointer[cachestore.File] // with a mark that is not counted yet; unmarked where there will be none

	wake chan struct{} // closed when n reaches need, or over, or left; nil if nobody waits
	need int

	interest int   // who wants it: waiting readers, and readers that read ahead
	refs     int   // who uses buf: waiting readers, the fetch, the recent memory
	paid     int64 // bytes of the budget that go back with buf
	elem     *list.Element
}

// class is the priority of a fetch.
type class int

const (
	foreground class = iota
	ahead
	background
)

func (c class) String() string { return [...]string{"a reader", "read-ahead", "completion"}[c] }

// fetch is one ranged GET of chunks in a row.
type fetch struct {
	obj       object.Object
	src       source.Source
	principal object.Principal
	class     class
	reader    *Reader // that reads ahead, else nil
	way       *way    // of the stream that is read ahead
	chunks    []*chunk
	usage     *Usage
	span      telemetry.Span
	cancel    context.CancelFunc
	stored    chan *chunk // to the goroutine that writes them
}

func (ft *fetch) bytes() (n int64) {
	for _, c := range ft.chunks {
		n += int64(c.size)
	}
	return n
}

// start begins a GET of the chunks [first, last]. Ahead and background fetches have paid
// already. The chunks have no interest yet: the caller adds it before it gives up f.mu,
// which start requires.
func (r *Reader) start(ctx context.Context, first, last int, cl class) *fetch {
	f := r.f
	ft := &fetch{
		obj: r.obj, src: r.src, principal: r.principal, usage: r.usage, class: cl,
		chunks: make([]*chunk, 0, last-first+1),
		stored: make(chan *chunk, last-first+1),
	}
	for i := first; i <= last; i++ {
		c := &chunk{key: chunkKey{r.id, i}, fetch: ft, size: r.obj.ChunkLen(i), need: math.MaxInt}
		ft.chunks = append(ft.chunks, c)
		f.chunks[c.key] = c
	}
	ctx, ft.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if ctx, ft.span = telemetry.Child(ctx, "fill"); ft.span.Recorded() {
		ft.span.Text("key", r.obj.Key)
		ft.span.Text("for", cl.String())
		ft.span.Int("chunk", int64(first))
		ft.span.Int("chunks", int64(last-first+1))
	}
	f.fetches[ft] = struct{}{}
	if cl != background {
		f.budget.begin()
	}
	f.count.gets.Add(1)
	f.wg.Add(2)
	go f.write(ctx, ft)
	go f.run(ctx, ft)
	return ft
}

// run fetches, from the budget to the last byte.
func (f *Fills) run(ctx context.Context, ft *fetch) {
	var err error
	defer func() { ft.span.End(&err) }()
	defer f.wg.Done()
	defer close(ft.stored)
	defer ft.cancel()
	paid := ft.bytes()
	if ft.class == foreground {
		if err = f.budget.take(ctx, paid); err != nil {
			f.fail(ft, err)
			f.finish(ft, false)
			return
		}
	}
	f.mu.Lock()
	for _, c := range ft.chunks {
		if !c.over {
			c.paid = int64(c.size)
			paid -= c.paid
		}
	}
	f.mu.Unlock()
	f.budget.give(paid, 0) // of chunks that were given up meanwhile
	if err = f.get(ctx, ft); err != nil {
		if object.Refused(err) {
			f.Revoke(ft.principal, ft.obj.Store)
		}
		f.fail(ft, err)
	}
	f.finish(ft, true)
}

func (f *Fills) finish(ft *fetch, slot bool) {
	if slot {
		f.budget.give(0, 1)
	}
	if ft.class != background {
		f.budget.end()
	}
	f.mu.Lock()
	delete(f.fetches, ft)
	f.mu.Unlock()
}

// get reads the body, chunk by chunk.
func (f *Fills) get(ctx context.Context, ft *fetch) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx, span := telemetry.Child(ctx, "store.get")
	defer func() { span.End(&err) }()
	first := ft.chunks[0]
	asked := time.Now()
	body, err := ft.src.Get(ctx, ft.obj, int64(first.key.i)*object.ChunkSize, ft.bytes())
	if err != nil {
		return err
	}
	defer body.Close()
	began := time.Now()
	f.grant(ft.obj, headKey{first.key.id, ft.principal}, asked)
	for _, c := range ft.chunks {
		if err := f.begin(c); err != nil {
			return err
		}
		if err := f.fill(c, body); err != nil {
			f.mu.Lock()
			f.unref(c)
			f.mu.Unlock()
			return err
		}
		f.count.fetched.Add(uint64(c.size))
		ft.usage.Fetched.Add(uint64(c.size))
		if ft.class != foreground {
			f.count.ahead.Add(uint64(c.size))
		}
		f.count.unwritten.Add(1)
		ft.stored <- c
		if ft.reader != nil {
			ft.reader.more(ctx)
		}
	}
	f.timed(ft.obj.Store, ft.bytes(), asked, began, time.Now())
	return nil
}

// fill reads one chunk of the body. Nobody else writes to its buffer, which stays until the
// fetch gives up its own use of it.
func (f *Fills) fill(c *chunk, body io.Reader) error {
	for n := 0; n < c.size; {
		k, err := body.Read(c.buf[n:c.size])
		if k > 0 {
			n += k
			if f.progress(c, n) {
				runtime.Gosched() // who waits for just this goes first, not the rest of the body
			}
		}
		if err != nil && n < c.size {
			return unexpected(err)
		}
	}
	return nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return fmt.Errorf("%w: %w", object.ErrUnavailable, io.ErrUnexpectedEOF)
	}
	return err
}

// begin gives the chunk its buffer, unless it was given up.
func (f *Fills) begin(c *chunk) error {
	buf, err := f.buffer(c.size)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.over {
		f.reuse(buf)
		return context.Canceled
	}
	c.buf = buf
	c.refs++
	return nil
}

// buffer returns one of size bytes, outside the heap if that is worth it.
func (f *Fills) buffer(size int) ([]byte, error) {
	if size < object.ChunkSize/2 {
		return make([]byte, size), nil
	}
	buf, err := f.bufs.take()
	if err != nil {
		return nil, err
	}
	return buf[:size], nil
}

// reuse takes a buffer back.
func (f *Fills) reuse(buf []byte) {
	if cap(buf) == object.ChunkSize {
		f.bufs.give(buf)
	}
}

// progress says that n bytes of the chunk are here, and reports whether that was waited for.
func (f *Fills) progress(c *chunk, n int) (woken bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := c.fetch.reader; r != nil {
		r.came.note(int64(n-c.n), time.Now())
	}
	c.n = n
	if n == c.size && !c.over {
		f.end(c)
		f.abandon(c.fetch) // the rest may be of no interest
	}
	if n < c.need && !c.over {
		return false
	}
	woken = c.wake != nil
	c.call()
	return woken
}

// call wakes who waits. Requires Fills.mu.
func (c *chunk) call() {
	if c.wake != nil {
		close(c.wake)
		c.wake, c.need = nil, math.MaxInt
	}
}

// write puts chunks on the disk as they become whole. It makes the cache file with the first
// of them, because a reader waits for the first bytes and nobody for the file.
func (f *Fills) write(ctx context.Context, ft *fetch) {
	defer f.wg.Done()
	var file *cachestore.File
	var err error
	for c := range ft.stored {
		if file == nil && err == nil {
			file, err = f.store.Open(ft.obj)
			f.keepGrant(ft.obj, headKey{c.key.id, ft.principal})
		}
		put := err
		if put == nil {
			put = f.put(ctx, file, c)
		}
		f.written(c, put)
	}
	if file != nil {
		if err := file.Close(); err != nil {
			f.cfg.Log.Error("give up lease", "object", ft.obj, "err", err)
		}
	}
}

// put writes the chunk to the disk, marked if nobody has asked for it. From then on whoever takes the mark away
// counts the chunk: it may be read there and in memory at the same time.
func (c *chunk) put(file *cachestore.File, put func(int, []byte) error) error {
	if !c.unasked() {
		return put(c.key.i, c.buf)
	}
	file.MarkUnread(c.key.i)
	if !c.marked.CompareAndSwap(nil, file) { // asked for meanwhile
		file.Unmark(c.key.i)
	}
	err := put(c.key.i, c.buf)
	if err != nil && c.marked.CompareAndSwap(file, nil) {
		file.Unmark(c.key.i)
	}
	return err
}

// unasked reports whether the chunk was fetched before anybody asked for it, and nobody has since.
func (c *chunk) unasked() bool { return c.fetch.class != foreground && !c.asked.Load() }

// unmarked is a chunk that is counted already.
var unmarked cachestore.File

// got notes that a reader has bytes of the chunk.
func (f *Fills) got(c *chunk) {
	if c.asked.Load() || c.asked.Swap(true) || c.fetch.class == foreground {
		return
	}
	bytes := int64(c.size)
	if file := c.marked.Swap(&unmarked); file != nil {
		bytes = file.Unmark(c.key.i)
	}
	f.count.foreseen.Add(uint64(bytes))
}

// put has the chunk written when it is its turn: past the page cache what waits in memory for its reader, unless the disk is
// behind; through it what is read here and there, because whoever does that comes back.
func (f *Fills) put(ctx context.Context, file *cachestore.File, c *chunk) (err error) {
	_, span := telemetry.Child(ctx, "cache.write")
	defer func() { span.End(&err) }()
	span.Int("chunk", int64(c.key.i))
	var behind chan struct{} // nil as long as the disk keeps up
	if f.count.unwritten.Load()*object.ChunkSize > f.cfg.MaxInFlightBytes/4 {
		behind = f.writers
	}
	direct := f.direct
	if !c.fetch.streamed() {
		direct, behind = nil, f.writers
	}
	select {
	case direct <- struct{}{}:
		defer func() { <-f.direct }()
		return c.put(file, file.PutDirect)
	case behind <- struct{}{}:
		defer func() { <-f.writers }()
		return c.put(file, file.Put)
	}
}

// written ends the fetch of a whole chunk, which is on the disk unless err says why not.
func (f *Fills) written(c *chunk, err error) {
	if err != nil && !errors.Is(err, object.ErrNoSpace) {
		f.cfg.Log.Error("store chunk", "object", c.fetch.obj, "chunk", c.key.i, "err", err)
	}
	f.count.unwritten.Add(-1)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && f.waits(c) {
		f.keepReady(c)
	} else if err == nil {
		f.gen++
		f.leave(c, nil)
	} else if !c.left {
		f.keep(c)
	}
	f.unref(c)
}

// keep puts a chunk that found no room into the recent memory. Requires f.mu.
func (f *Fills) keep(c *chunk) {
	f.budget.give(c.paid, 0)
	c.paid = 0
	c.refs++
	c.elem = f.recent.PushFront(c)
	c.call()
	f.held += int64(c.size)
	for f.held > f.cfg.RecentBytes && f.recent.Len() > 1 {
		f.forget(f.stalest())
	}
}

// stalest is the chunk that memory holds in vain, most likely: the oldest of those that were
// read to their end. What was read ahead is older than the last ones read, and stays until its turn. Requires f.mu.
func (f *Fills) stalest() *chunk {
	for e := f.recent.Back(); e != nil; e = e.Prev() {
		if c := e.Value.(*chunk); c.passed {
			return c
		}
	}
	return f.recent.Back().Value.(*chunk)
}

// forget takes a chunk out of the recent memory. Requires f.mu.
func (f *Fills) forget(c *chunk) {
	f.recent.Remove(c.elem)
	c.elem = nil
	if c.unasked() {
		f.count.wasted.Add(uint64(c.size))
	}
	f.held -= int64(c.size)
	f.leave(c, nil)
	f.unref(c)
}

// end notes that no more bytes of the chunk will come. Requires f.mu.
func (f *Fills) end(c *chunk) {
	if c.over {
		return
	}
	c.over = true
	if r := c.fetch.reader; r != nil {
		c.fetch.way.bytes -= int64(c.size)
		if r.aheadBytes -= int64(c.size); r.aheadBytes == 0 {
			f.ahead--
		}
	}
}

// leave takes a chunk out of the map; err says why it has no more bytes. Requires f.mu.
func (f *Fills) leave(c *chunk, err error) {
	if c.left {
		return
	}
	f.end(c)
	c.left, c.err = true, err
	delete(f.chunks, c.key)
	c.call()
	if c.refs == 0 {
		f.free(c)
	}
}

// unref gives up one use of the chunk's buffer. Requires f.mu.
func (f *Fills) unref(c *chunk) {
	if c.refs--; c.refs == 0 && c.left {
		f.free(c)
	}
}

// free gives the memory of a chunk back that nobody uses or can find. Requires f.mu.
func (f *Fills) free(c *chunk) {
	f.pay(c)
	if c.buf != nil {
		f.reuse(c.buf)
		c.buf = nil
	}
}

func (f *Fills) pay(c *chunk) {
	if c.paid > 0 && c.left {
		f.budget.give(c.paid, 0)
		c.paid = 0
	}
}

// fail ends all chunks of the fetch that are not whole.
func (f *Fills) fail(ft *fetch, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lose(ft.chunks[0].key.id, err)
	if f.closed && errors.Is(err, context.Canceled) {
		err = errClosed
	}
	f.giveUp(ft, err)
}

// giveUp requires f.mu.
func (f *Fills) giveUp(ft *fetch, err error) {
	for _, c := range ft.chunks {
		if c.over {
			continue
		}
		f.leave(c, err)
		if c.refs == 0 || c.buf == nil { // else the last use pays
			f.pay(c)
		}
	}
}

// abandon cancels the fetch if nobody wants what is missing of it. Requires f.mu.
func (f *Fills) abandon(ft *fetch) {
	missing := false
	for _, c := range ft.chunks {
		if c.over {
			continue
		}
		if c.interest > 0 {
			return
		}
		missing = true
	}
	if missing {
		f.count.canceled.Add(1)
		ft.cancel()
		f.giveUp(ft, context.Canceled)
	}
}

// want adds a reader's interest in a chunk, and its use of the bytes. Requires f.mu.
func (f *Fills) want(c *chunk) {
	c.interest++
	c.refs++
	if c.elem != nil {
		f.recent.MoveToFront(c.elem)
	}
}

// done ends it. A chunk of which somebody got bytes is fetched to its end; another one is
// given up if nobody else wants it.
func (f *Fills) done(c *chunk, satisfied bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !satisfied || c.over {
		f.lessInterest(c)
	}
	if c.ready != nil && c.given.Load() >= int64(c.size) {
		f.dropReady(c)
	}
	f.unref(c)
}

// pass notes that a reader goes on behind the chunk.
func (f *Fills) pass(c *chunk) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c.passed = true
}

// lessInterest requires f.mu.
func (f *Fills) lessInterest(c *chunk) {
	if c.interest--; c.interest == 0 && !c.over {
		f.abandon(c.fetch)
	}
}

// await returns when bytes of the chunk up to need are here, and whether that took waiting.
func (f *Fills) await(ctx context.Context, c *chunk, need int) (waited bool, err error) {
	for {
		f.mu.Lock()
		if c.n >= need || c.err != nil {
			err := c.err
			if c.n >= need {
				err = nil
			}
			f.mu.Unlock()
			return waited, err
		}
		if c.wake == nil {
			c.wake = make(chan struct{})
		}
		c.need = min(c.need, need)
		wake := c.wake
		f.mu.Unlock()
		waited = true
		select {
		case <-wake:
		case <-ctx.Done():
			return waited, fmt.Errorf("wait for chunk %d: %w", c.key.i, context.Cause(ctx))
		}
	}
}
