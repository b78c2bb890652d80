package fill

import "github.com/larderfs/larder/cacheworker/object"

const (
	maxStreams = 16
	slackAhead = 2 * mib // a read so far in front of a stream may still be part of it: the kernel's come in any order
	slackBack  = 8 * mib
)

// stream is a row of reads that goes forward through a file.
type stream struct {
	start   int64 // of its first read
	end     int64 // behind the read that was farthest
	run     int64 // bytes read in a row up to end
	skipped int64 // bytes below end that were passed over and did not come yet
	reads   int
	ahead   int // chunks below this were asked for
	used    uint64
}

// streams finds the rows among the reads of one open file. The zero value has seen none.
type streams struct {
	all  []stream
	tick uint64
}

// note takes a read of n bytes at off into account and returns its stream, valid until the
// next call.
func (s *streams) note(off int64, n int) *stream {
	s.tick++
	st := s.find(off)
	if st == nil {
		st = s.fresh()
		*st = stream{start: off, end: off}
	}
	st.used = s.tick
	st.reads++
	last := off + int64(n)
	if last <= st.end { // late, or read again
		st.skipped = max(0, st.skipped-int64(n))
		return st
	}
	st.skipped += max(0, off-st.end)
	st.run += min(int64(n), last-st.end)
	st.end = last
	return st
}

// find returns the stream that a read at off goes on with: the one whose end is nearest.
func (s *streams) find(off int64) (best *stream) {
	nearest := int64(slackBack + 1)
	for i := range s.all {
		st := &s.all[i]
		d := off - st.end
		if d < -slackBack || d > slackAhead {
			continue
		}
		if d = max(d, -d); d < nearest {
			best, nearest = st, d
		}
	}
	return best
}

// fresh returns room for a stream: the one used longest ago gives way.
func (s *streams) fresh() *stream {
	if len(s.all) < maxStreams {
		s.all = append(s.all, stream{})
		return &s.all[len(s.all)-1]
	}
	oldest := &s.all[0]
	for i := range s.all {
		if s.all[i].used < oldest.used {
			oldest = &s.all[i]
		}
	}
	return oldest
}

// sequential reports whether reading ahead is worth it.
func (st *stream) sequential() bool {
	return st.reads >= 2 && st.run >= minStreamRead && st.skipped <= st.run/2
}

// next returns the chunks [from, to) that are to be read ahead now, and how many of them make a
// GET. The stream is sequential. The window is four times what was read in a row, so that it opens within a few round
// trips; it begins with a little, or with more where the file is read from its beginning, which hardly anybody
// does who wants less than all of it.
func (st *stream) next(chunks int, maxWindow, maxGet int64) (from, to, get int) {
	least := int64(4 * object.ChunkSize)
	if st.start == 0 {
		least *= 2
	}
	window := min(max(4*st.run, least), maxWindow)
	get = int(max(min(window/4, maxWindow/8, maxGet), object.ChunkSize) / object.ChunkSize)
	from = max(st.ahead, chunkAt(st.end+object.ChunkSize-1))
	to = min(chunks, chunkAt(st.end+window+object.ChunkSize-1))
	if to-from < get && to < chunks {
		return 0, 0, 0
	}
	return from, to, get
}

func chunkAt(off int64) int { return int(off / object.ChunkSize) }
