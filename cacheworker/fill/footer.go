package fill

import (
	"context"
	"errors"

	"github.com/larderfs/larder/cacheworker/fill/parquet"
	"github.com/larderfs/larder/cacheworker/object"
)

const (
	maxFooter = 4 * mib // of a footer that is looked into
	learners  = 4       // footers that are, at once
	maxParts  = 1 << 18 // of the layouts that are remembered, 16 bytes each

	// beyond is how far behind a column's part somebody may read who does not want the next one: the kernel reads
	// ahead twice what it is told to.
	beyond = 1 * mib

	guessed = 64 << 10 // bytes that readers ask for at a file's end who do not know the footer's length

	maxInARow = 4 // columns, until it is believed that all are read

	pageSize = 4096
)

// seeTail is told the bytes at the object's end when they are read first. Where they say how long a footer is, all of
// it is asked for at once: the reader would do so piece by piece.
func (r *Reader) seeTail(ctx context.Context, end []byte) {
	if len(end) < parquet.Tail || r.tailSeen.Swap(true) {
		return
	}
	length, ok := parquet.FooterLen(end[len(end)-parquet.Tail:])
	if !ok {
		return
	}
	r.columnar.Store(true)
	if length > min(r.obj.Size-parquet.Tail, r.f.cfg.MaxGetBytes) {
		return
	}
	kept := r.f.store.TailBytes(r.id)
	if kept < parquet.Tail+length {
		r.prefetchFooter(ctx, length)
	}
	if length <= maxFooter {
		r.learn(ctx, length, kept != 0 || r.obj.Chunks() == 1)
	}
}

// tailFrom is where the object's tail begins that is kept for its footer: readers guess at a footer's length, and the
// kernel reads whole pages. It is not in another chunk than the footer, which would have to be fetched.
func (r *Reader) tailFrom(length int64) int64 {
	footer := r.obj.Size - parquet.Tail - length
	from := min(footer, r.obj.Size-guessed) &^ (pageSize - 1)
	return max(from, int64(chunkAt(footer))*object.ChunkSize)
}

// readTail fills p with bytes that outlived the object's cache file.
func (r *Reader) readTail(p []byte, off int64) bool {
	if off < r.obj.Size-maxFooter-guessed || !r.f.store.ReadTail(r.obj, p, off) {
		return false
	}
	r.countDisk(off, len(p))
	return true
}

func (r *Reader) prefetchFooter(ctx context.Context, length int64) {
	from, last := chunkAt(r.obj.Size-parquet.Tail-length), chunkAt(r.obj.Size-1)
	if from == last {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() {
		return
	}
	l := r.leased()
	if l != nil {
		defer l.release()
	}
	r.prefetch(ctx, l, &r.elsewhere, max(from, last-int(r.f.cfg.MaxGetBytes/object.ChunkSize)), last)
}

// learn has the footer looked into beside the reader, until that is closed. kept says that its bytes are kept, or
// need not be.
func (r *Reader) learn(ctx context.Context, length int64, kept bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, known := f.layouts[r.id]; known && kept || f.closed || r.closed.Load() {
		return
	}
	ctx, r.unlearn = context.WithCancel(context.WithoutCancel(ctx))
	f.wg.Go(func() {
		select {
		case f.learners <- struct{}{}:
			defer func() { <-f.learners }()
		case <-ctx.Done():
			return
		}
		own := f.Open(r.obj, r.src)
		defer own.Close()
		own.tailSeen.Store(true)
		if err := own.readFooter(ctx, length, kept); err != nil {
			f.cfg.Log.Debug("look into a footer", "object", r.obj, "err", err)
		}
	})
}

// readFooter remembers where the footer says that the columns are, and keeps its bytes.
func (r *Reader) readFooter(ctx context.Context, length int64, kept bool) error {
	from := r.tailFrom(length)
	last := make([]byte, r.obj.Size-from)
	if _, err := r.ReadAt(ctx, last, from); err != nil {
		return err
	}
	end := len(last) - parquet.Tail
	parts, err := parquet.Parse(last[end-int(length):end], r.obj.Size-parquet.Tail-length)
	if err == nil {
		r.f.rememberLayout(r.id, parts)
	}
	if !kept {
		err = errors.Join(err, r.f.store.KeepTail(r.obj, last))
	}
	return err
}

// rememberLayout keeps a layout, in place of some others if there are too many.
func (f *Fills) rememberLayout(id object.ID, parts parquet.Layout) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, known := f.layouts[id]; known || len(parts) == 0 {
		return
	}
	f.layoutParts += len(parts)
	for k, l := range f.layouts {
		if f.layoutParts <= maxParts {
			break
		}
		f.layoutParts -= len(l)
		delete(f.layouts, k)
	}
	f.layouts[id] = parts
}

// layout is what is known of the object's columns. Requires r.mu.
func (r *Reader) layout() parquet.Layout {
	if r.parts == nil && (!r.looked || r.columnar.Load()) {
		r.looked = true
		r.f.mu.Lock()
		r.parts = r.f.layouts[r.id]
		r.f.mu.Unlock()
		if r.parts != nil {
			r.columnar.Store(true)
		}
	}
	return r.parts
}

// within notes which column's part the stream surely reads, and how far that goes.
func (st *stream) within(parts parquet.Layout, off int64) {
	p, ok := parts.Begins(off, pageSize)
	switch {
	case ok && off >= st.until: // else the end of the part before it is in that page, too
	case st.until != 0:
		p, _ = parts.At(st.end - beyond)
	default:
		if p, ok = parts.At(st.start); !ok {
			p.End = st.start
		}
	}
	if p.End > st.until {
		st.until = p.End
		st.parts++
	}
	st.sure = st.sure || ok && st.start&^(pageSize-1) == p.Start&^(pageSize-1)
}

// ends is where read-ahead has to end; ok is false if the stream goes on over the ends of columns.
func (st *stream) ends(parts parquet.Layout) (end int64, ok bool) {
	return st.until, parts != nil && st.parts <= maxInARow
}
