package fill

import "time"

// staleReady is how long read-ahead that is on the disk, too, may wait in memory for its reader when others could use that.
const staleReady = 2 * time.Second

// streamed reports whether the fetch is of what its reader comes to next.
func (ft *fetch) streamed() bool { return ft.reader != nil && ft.way != &ft.reader.elsewhere }

// waits reports whether somebody is going to read what he has not got yet of a chunk that was stored. Requires f.mu.
func (f *Fills) waits(c *chunk) bool {
	r := c.fetch.reader
	return c.fetch.streamed() && !r.closed.Load() && !c.left && c.given.Load() < int64(c.size) && !f.closed && !f.budget.starved()
}

// keepReady puts a chunk that was stored among those that wait. Requires f.mu.
func (f *Fills) keepReady(c *chunk) {
	c.refs++
	c.since = time.Now()
	c.ready = f.ready.PushBack(c)
	f.nready.Add(1)
	c.call()
}

// dropReady forgets one. Requires f.mu.
func (f *Fills) dropReady(c *chunk) {
	f.ready.Remove(c.ready)
	c.ready = nil
	f.nready.Add(-1)
	f.gen++
	f.leave(c, nil)
	f.unref(c)
}

// dropReadyOf forgets those that a reader has not come to. Requires f.mu.
func (f *Fills) dropReadyOf(r *Reader) {
	for e := f.ready.Front(); e != nil; {
		c := e.Value.(*chunk)
		e = e.Next()
		if c.fetch.reader == r {
			f.dropReady(c)
		}
	}
}

// feed gives the memory of those that wait to the fetches that wait for it, the oldest first.
func (f *Fills) feed() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.ready.Len() > 0 && f.budget.starved() {
		f.dropReady(f.ready.Front().Value.(*chunk))
	}
}

// giveWay forgets those that wait for long, or that the reader who now reads there has jumped away from, as many as have size
// bytes, and reports whether there were any.
func (f *Fills) giveWay(r *Reader, there *way, size int64) (some bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for e := f.ready.Front(); e != nil && size > 0; {
		c := e.Value.(*chunk)
		e = e.Next()
		if c.fetch.reader == r && c.fetch.way != there || time.Since(c.since) >= staleReady {
			size -= int64(c.size)
			f.dropReady(c)
			some = true
		}
	}
	return some
}

// inMemory reports whether one of the chunks [first, last] waits in memory though it is on the disk.
func (r *Reader) inMemory(first, last int) bool {
	f := r.f
	if f.nready.Load() == 0 {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := first; i <= last; i++ {
		if c := f.chunks[chunkKey{r.id, i}]; c != nil && c.ready != nil {
			return true
		}
	}
	return false
}
