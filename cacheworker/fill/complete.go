package fill

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/larderfs/larder/cacheworker/cachestore"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// job is an object to complete in the background.
type job struct {
	obj object.Object
	src source.Source
	u   *Usage
}

// Complete fetches all absent chunks, at low priority: it takes no memory that a reader waits for. It
// returns object.ErrNoSpace if the cache has no room for all of them.
func (r *Reader) Complete(ctx context.Context) error {
	return r.complete(ctx, func(context.Context) error { return nil })
}

func (r *Reader) complete(ctx context.Context, before func(context.Context) error) error {
	maxGet := int(r.f.cfg.MaxGetBytes / object.ChunkSize)
	for i, tries := 0, 0; i < r.obj.Chunks(); {
		if err := before(ctx); err != nil {
			return err
		}
		end, err := r.completeRun(ctx, i, min(r.obj.Chunks(), i+maxGet))
		if err != nil {
			return fmt.Errorf("complete %v: %w", r.obj, err)
		}
		if end == i { // others were at it: look again
			if tries++; tries > 2 {
				return fmt.Errorf("complete %v: %w", r.obj, object.ErrNoSpace)
			}
			continue
		}
		i, tries = end, 0
	}
	return nil
}

// completeRun brings the chunks from first on to the disk, and returns the first that may
// still be absent, at most end.
func (r *Reader) completeRun(ctx context.Context, first, end int) (int, error) {
	l := r.leased()
	if l == nil {
		return 0, object.ErrNoSpace
	}
	if l.file.Evicted() {
		l.release()
		if l = r.openLease(l); l == nil {
			return 0, object.ErrNoSpace
		}
	}
	defer l.release()
	for first < end && l.file.Has(first) {
		first++
	}
	if first == end {
		return end, nil
	}
	stop := first
	for stop < end && !l.file.Has(stop) {
		stop++
	}
	held, err := r.startBackground(ctx, first, stop)
	if err != nil {
		return 0, err
	}
	for _, c := range held {
		if err == nil {
			err = r.f.awaitStored(ctx, c)
			if errors.Is(err, object.ErrNoSpace) {
				err = r.f.storeAgain(l.file, c)
			}
		}
		r.f.done(c, err == nil)
	}
	if err != nil {
		return 0, err
	}
	for first < stop && l.file.Has(first) {
		first++
	}
	return first, nil
}

// startBackground pays for the chunks [first, end) and asks for them; those that somebody else has asked for
// meanwhile are joined.
func (r *Reader) startBackground(ctx context.Context, first, end int) ([]*chunk, error) {
	f := r.f
	size := r.bytes(first, end)
	if err := f.budget.takeLow(ctx, size); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.lostErr(r.id)
	if f.closed {
		err = errClosed
	}
	if err != nil {
		f.budget.give(size, 1)
		return nil, err
	}
	var held []*chunk
	i := first
	for ; i < end; i++ {
		c := r.join(i)
		if c == nil {
			break
		}
		held = append(held, c)
	}
	stop := i
	for stop < end && f.chunks[chunkKey{r.id, stop}] == nil {
		stop++
	}
	if i == stop {
		f.budget.give(size, 1)
		return held, nil
	}
	f.budget.give(size-r.bytes(i, stop), 0)
	ft := r.start(ctx, i, stop-1, background)
	for _, c := range ft.chunks {
		f.want(c)
		held = append(held, c)
	}
	return held, nil
}

// awaitStored returns when the chunk is on the disk, or known not to find room there.
func (f *Fills) awaitStored(ctx context.Context, c *chunk) error {
	for {
		f.mu.Lock()
		if c.left || c.elem != nil || c.ready != nil {
			defer f.mu.Unlock()
			if c.elem != nil {
				return object.ErrNoSpace
			}
			return c.err
		}
		if c.wake == nil {
			c.wake = make(chan struct{})
		}
		wake := c.wake
		f.mu.Unlock()
		select {
		case <-wake:
		case <-ctx.Done():
			return fmt.Errorf("wait for chunk %d: %w", c.key.i, context.Cause(ctx))
		}
	}
}

// storeAgain puts a chunk that has found no room before, and is in memory: there may be some now.
func (f *Fills) storeAgain(file *cachestore.File, c *chunk) error {
	f.mu.Lock()
	kept := c.elem != nil
	f.mu.Unlock()
	if !kept {
		return object.ErrNoSpace
	}
	if err := c.put(file, file.Put); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gen++
	if c.elem != nil {
		f.forget(c)
	}
	return nil
}

// CompleteLater queues the object to be completed while no reader waits for a fetch. What
// does not fit into the queue is forgotten, as are failures: it is an improvement, not a promise. It is counted
// for u, unless that is nil.
func (f *Fills) CompleteLater(obj object.Object, src source.Source, u *Usage) {
	id := obj.ID()
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.queued[id]; ok || f.closed || f.sealed || len(f.queue) >= maxQueue {
		return
	}
	f.queued[id] = struct{}{}
	f.queue = append(f.queue, job{obj, src, u})
	if f.workers < f.cfg.CompleteWorkers {
		f.workers++
		f.wg.Go(f.completer)
	}
}

// StopCompleting gives up what is queued to be completed, for good: the store is handed over.
func (f *Fills) StopCompleting() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.queue, f.sealed = nil, true
}

// cacheShare of the capacity is what completion may have others evicted for, as long as nobody reads it.
const cacheShare = 4

// quiet is how long nobody may have fetched before a piece is: a reader who jumps about fetches nothing between two reads.
const quiet = 100 * time.Millisecond

// gently returns what a completer waits for before each piece of an object: that nobody has fetched for as long a time as
// its last piece took, so that it has half of one connection at the most, and of that only what readers leave. Its
// error wraps object.ErrNoSpace if the rest of the object would push others out of the cache for too much that nobody
// reads.
func (f *Fills) gently(obj object.Object) func(context.Context) error {
	var began time.Time
	return func(ctx context.Context) error {
		rest := obj.Size - f.store.Peek(obj.ID()).PresentBytes
		if s := f.store.Stats(); rest > f.store.Free() && s.UnreadBytes+rest > s.CapacityBytes/cacheShare {
			return fmt.Errorf("%w: too much was fetched that nobody reads", object.ErrNoSpace)
		}
		pause := quiet
		if !began.IsZero() {
			pause = max(pause, time.Since(began))
		}
		for {
			if err := f.budget.waitIdle(ctx); err != nil {
				return err
			}
			fetches := f.budget.fetches()
			if err := sleep(ctx, pause); err != nil {
				return err
			}
			if f.budget.fetches() == fetches {
				began = time.Now()
				return nil
			}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// work completes objects until the queue is empty.
func (f *Fills) work(ctx context.Context) {
	for {
		f.mu.Lock()
		if len(f.queue) == 0 || f.closed {
			f.workers--
			f.mu.Unlock()
			return
		}
		j := f.queue[0]
		f.queue = f.queue[1:]
		f.mu.Unlock()

		r := f.Open(j.obj, j.src).For(j.u)
		err := r.complete(ctx, f.gently(j.obj))
		r.Close()
		if err == nil {
			f.count.completed.Add(1)
		} else {
			f.cfg.Log.Debug("complete in the background", "object", j.obj, "err", err)
		}
		f.mu.Lock()
		delete(f.queued, j.obj.ID())
		f.mu.Unlock()
	}
}
