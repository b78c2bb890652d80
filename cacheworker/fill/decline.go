package fill

const maxDeclined = 64 // places that are remembered, per open file

// span is the bytes [from, to) of an object.
type span struct{ from, to int64 }

// Decline reports whether a read of n bytes at off is better not answered, because it would fetch a chunk in which no
// column is that anybody reads: it goes on behind the read in which a column ended. The kernel reads ahead so; mayBe says
// that the read may be of that kind. Whoever wants the bytes asks again, and from then on is answered in all of the file.
func (r *Reader) Decline(off int64, n int, mayBe bool) bool {
	if r.whole.Load() {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	asked := span{off, off + int64(n)}
	r.comeTo(asked)
	if !mayBe || r.mistaken || r.closed.Load() || !r.overshoots(off) || !r.absentAside(asked) {
		return false
	}
	if r.f.pardons.Load() > 0 {
		r.f.pardons.Add(-1)
		return false
	}
	if len(r.declined) == maxDeclined {
		r.declined = append(r.declined[:0], r.declined[1:]...)
	}
	r.declined = append(r.declined, asked)
	return true
}

// comeTo notes that somebody reads s: if any of it was declined, that was a mistake. Requires r.mu.
func (r *Reader) comeTo(s span) {
	for _, d := range r.declined {
		if !r.mistaken && s.from < d.to && d.from < s.to {
			r.mistaken = true
			r.f.pardons.Store(int32(r.f.cfg.Pardoned))
		}
	}
}

// overshoots reports whether a read at off goes on a row whose last read went over a column's end: whoever has read the
// column until there has caused both. Requires r.mu.
func (r *Reader) overshoots(off int64) bool {
	parts := r.layout()
	if parts == nil {
		return false
	}
	for i := range r.streams.all {
		st := &r.streams.all[i]
		if st.end != off {
			continue
		}
		p, ok := parts.Begins(st.begun, pageSize)
		if !ok {
			p, ok = parts.At(st.begun)
		}
		return ok && p.End <= off
	}
	return false
}

// absentAside reports whether some chunk of s is absent, and none of the absent ones is touched by a column that is being
// read. Requires r.mu.
func (r *Reader) absentAside(s span) bool {
	l := r.leased()
	if l != nil {
		defer l.release()
	}
	some := false
	for i := chunkAt(s.from); i <= chunkAt(s.to-1); i++ {
		switch {
		case l != nil && l.file.Has(i) || r.onTheWay(i):
		case r.touched(i):
			return false
		default:
			some = true
		}
	}
	return some
}

func (r *Reader) onTheWay(i int) bool {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	return r.f.chunks[chunkKey{r.id, i}] != nil
}

// touched reports whether chunk i has bytes of a column that a row of reads has begun. Requires r.mu.
func (r *Reader) touched(i int) bool {
	chunk := span{int64(i) * mib, int64(i+1) * mib}
	for _, st := range r.streams.all {
		if st.start < chunk.to && chunk.from < max(st.until, st.begun+1) {
			return true
		}
	}
	return false
}
