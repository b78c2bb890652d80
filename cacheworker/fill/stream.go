package fill

import (
	"slices"

	"github.com/larderfs/larder/cacheworker/object"
)

const (
	maxStreams  = 16
	slackAhead  = 2 * mib // a read so far in front of a stream may still be part of it: the kernel's come in any order
	slackBack   = 8 * mib
	leastGet    = 2       // chunks
	mostPieces  = 8       // GETs in which one who reads alone asks for a window
	leastPieces = 2       // and one of many: the next has to be on its way when one ends
	minLong     = 4 * mib // of a stream in whose file the next one is believed to be long, too
)

// stream is a row of reads that goes forward through a file.
type stream struct {
	start   int64 // of its first read
	begun   int64 // of the read that was farthest, or of the first of several that may be of one window of the kernel's
	end     int64 // behind it
	longest int64 // of its reads
	run     int64 // bytes read in a row up to end
	skipped int64 // bytes below end that were passed over and did not come yet
	reads   int
	ahead   int   // chunks below this were asked for
	hope    int64 // how long it may become: as the others in the file
	used    uint64
	until   int64 // where the column's part ends that is read; 0 if that is not known
	parts   int   // of columns that it has read or begun, one behind the other
	sure    bool  // the stream began where the part does
	way     *way
}

// way counts the bytes that were asked for and are not here.
type way struct {
	bytes int64 // guarded by Fills.mu
}

// streams finds the rows among the reads of one open file. The zero value has seen none.
type streams struct {
	all  []stream
	tick uint64
	last int   // in all: the one used last
	long int64 // how long the earlier ones became, the later the more it counts
}

// note takes a read of n bytes at off into account and returns its stream, valid until the
// next call.
func (s *streams) note(off int64, n int) *stream {
	s.tick++
	st := s.find(off)
	if st == nil {
		if len(s.all) > 0 {
			s.long = (s.long + s.all[s.last].run) / 2
		}
		st = s.fresh()
		*st = stream{start: off, begun: off, end: off, hope: s.long, way: new(way)}
	}
	st.used = s.tick
	s.last = slices.IndexFunc(s.all, func(o stream) bool { return o.used == st.used })
	st.reads++
	st.longest = max(st.longest, int64(n))
	last := off + int64(n)
	if last <= st.end { // late, or read again
		st.skipped = max(0, st.skipped-int64(n))
		return st
	}
	st.skipped += max(0, off-st.end)
	st.run += min(int64(n), last-st.end)
	if last-st.begun > st.longest {
		st.begun = off
	}
	st.end = last
	return st
}

// find returns the stream that a read at off goes on with: the one whose end is nearest.
func (s *streams) find(off int64) (best *stream) {
	nearest := int64(slackBack + 1)
	for i := range s.all {
		st := &s.all[i]
		d := off - st.end
		if d < -slackBack || d > slackAhead || off < st.start-slackAhead {
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

// sequential reports whether reading ahead is worth it. Who begins with a long read is believed at once at the
// beginning of the file or of a column, and where earlier streams were long.
func (st *stream) sequential() bool {
	sure := st.sure || st.reads >= 2 || st.start == 0 || st.hope >= minLong
	return sure && st.run >= minStreamRead && st.skipped <= st.run/2
}

// longestGet is how long one may be. Who jumps about in a file waits, at each jump, for what is on its way from
// elsewhere: that is the less, the shorter the GETs are.
func (st *stream) longestGet(most int64) int64 {
	if st.hope == 0 {
		return most
	}
	return min(most, max(leastGet*object.ChunkSize, st.hope/16))
}

// next returns the chunks [from, to) that are to be read ahead now, and how many of them make a
// GET. The stream is sequential. The window grows with what was read in a row, so that it opens within a few round
// trips; it begins with a little, or with more where the file is read from its beginning, which hardly anybody
// does who wants less than all of it. At the file's end the GETs become shorter, so that they end together.
func (st *stream) next(chunks int, maxWindow, maxGet int64, pieces int) (from, to, get int) {
	least := max(minLong, min(st.hope, firstWindow))
	if st.start == 0 {
		least = max(least, 4*minLong)
	}
	window := min(least+4*st.run, maxWindow)
	from = max(st.ahead, chunkAt(st.end+object.ChunkSize-1))
	to = min(chunks, chunkAt(st.end+window+object.ChunkSize-1))
	get = int(min(window/int64(pieces), maxGet) / object.ChunkSize)
	get = max(min(get, (chunks-from)/pieces), leastGet, 1)
	if to-from < get && to < chunks {
		return 0, 0, 0
	}
	return from, to, get
}

func chunkAt(off int64) int { return int(off / object.ChunkSize) }
