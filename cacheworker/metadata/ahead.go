package metadata

import (
	"context"
	"slices"
	"strings"
	"time"
)

// What is listed ahead of who reads. Reading on in a folder starts a [scan] of it: the pages behind are
// asked for before they are wanted, and, as the folder turns out to be large, from several places
// at once. Reading a second folder of a parent starts the lists of those behind it, for
// whoever reads a tree reads them all. Both are bounded by what has been of use before: one request in six
// may bring nothing new, and none is made for who reads one page.
const (
	maxAhead    = 32              // requests under way that nobody waits for
	maxLanes    = 16              // of one folder
	lanePages   = 8               // what one lane lists, at a guess
	maxUnread   = 128 * 1000      // entries of a folder that are known and were not read
	wasteShare  = 6               // one request in so many may bring nothing new
	readerGone  = 5 * time.Second // a folder that nobody has read on for so long is not listed on
	walkGone    = 10 * time.Second
	maxSiblings = 32   // folders listed ahead
	siblingScan = 4096 // names looked through for them
)

// scan is the list of one folder going on. Its lanes are disjoint parts of the names, each listed page
// by page. Guarded by Cache.mu.
type scan struct {
	v     *View
	dir   string
	ask   ask
	lanes []*lane // in key order

	reader string        // the reader is here
	readAt time.Duration // and was at that time
	ahead  []span        // pages behind it

	useful, waste float64 // pages
	before        float64 // pages that an earlier list had: as many are to be expected
	guesses       int     // ends of lanes that were not reached yet
}

// lane lists the names in [cookie, end).
type lane struct {
	cookie  string
	end     string // "" is the folder's
	first   string // name of its first page
	pages   int    // listed so far
	pace    pace
	flying  bool // a request is under way
	guessed bool // its end was a guess of ours
}

// span is a page that was listed, and how many entries it had.
type span struct {
	lo, hi string
	n      int
}

// reading notes that a list of dir behind after is asked for, and starts what will be. Requires c.mu.
func (v *View) reading(dir, after string, a ask) {
	if after == "" {
		v.walking(dir, a)
		v.t.begun = begun{dir, v.c.now()}
		return
	}
	f := v.t.folders[dir]
	if f == nil {
		return
	}
	c := v.c
	s := f.scan
	if s == nil {
		gap, end := f.gap(above(after), a)
		if gap == nil {
			f.scan = nil
			return
		}
		s = &scan{v: v, dir: dir, ask: a, useful: 1, before: float64(len(f.segs)),
			lanes: []*lane{{cookie: cookieBefore(*gap), end: end}}}
		if i := firstAbove(f.segs, after); i < len(f.segs) {
			s.lanes[0].listed(f.segs[i], len(dir))
		}
		f.scan = s
	}
	s.v, s.reader, s.readAt = v, above(after), c.now()
	if s.ask.oldest < a.oldest || !a.aged {
		s.ask = a
	}
	s.ahead = slices.DeleteFunc(s.ahead, func(p span) bool { return p.hi != "" && p.hi <= s.reader })
	for _, p := range s.ahead { // or what was read pushes out what will be
		c.touch(f.covering(p.lo))
	}
	s.schedule()
}

// gap is the first key from from on that no answer covers which a accepts, and where such answers go on; nil if there
// is none.
func (f *folder) gap(from string, a ask) (gap *string, end string) {
	i := firstAbove(f.segs, from)
	for ; i < len(f.segs) && f.segs[i].lo <= from && a.accepts(f.segs[i]); i++ {
		if from = f.segs[i].hi; from == "" {
			return nil, ""
		}
	}
	for ; i < len(f.segs); i++ {
		if a.accepts(f.segs[i]) {
			return &from, f.segs[i].lo
		}
	}
	return &from, ""
}

// news is how many entries of a page nobody has listed before. Requires c.mu.
func (s *scan) news(f *folder, page *segment) int {
	n := len(page.slots)
	for i := firstAbove(f.segs, page.lo); i < len(f.segs) && below(f.segs[i].lo, page.hi); i++ {
		if known := page.cut(f.segs[i].lo, f.segs[i].hi, len(f.prefix)); known != nil && s.ask.accepts(f.segs[i]) {
			n -= len(known.slots)
		}
	}
	return n
}

// schedule sends what may be sent now. Requires c.mu.
func (s *scan) schedule() {
	c := s.v.c
	if c.now()-s.readAt > readerGone {
		return
	}
	for c.ahead < maxAhead {
		l := s.idle()
		if l == nil {
			l = s.split()
		}
		if l == nil {
			return
		}
		l.flying = true
		if known := s.v.listAhead(s.dir, l.cookie, s.ask); known != nil {
			s.take(known, 0)
		}
	}
}

// full reports whether enough is listed that was not read. What is remembered must not push out what will be read.
func (s *scan) full() bool {
	n := 0
	for _, p := range s.ahead {
		n += p.n
	}
	return n >= min(maxUnread, s.v.c.cfg.MaxEntries/4)
}

// idle is the first lane without a request. What is read next is listed however much is unread.
func (s *scan) idle() *lane {
	full := s.full()
	for _, l := range s.lanes {
		if !l.flying && (!full || above(l.cookie) <= s.reader) {
			return l
		}
	}
	return nil
}

// split ends a lane that is long some pages further on, and returns a new one for what is behind. The name between
// them is a guess. It costs one request at most: the page in which the one before ends, or the new one's if there
// is nothing.
func (s *scan) split() *lane {
	if len(s.lanes) >= maxLanes || s.full() || s.waste+float64(s.guesses)+1 > max(s.useful, s.before)/wasteShare {
		return nil
	}
	for i, l := range s.lanes {
		at, ok := s.cut(l, i == len(s.lanes)-1)
		if !ok || s.isKnown(above(at)) { // that the folder ends before it, perhaps
			continue
		}
		s.guesses++
		behind := &lane{cookie: at, end: l.end, pace: l.pace, guessed: l.guessed}
		l.end, l.guessed = above(at), true
		s.lanes = slices.Insert(s.lanes, i+1, behind)
		return behind
	}
	return nil
}

func (s *scan) isKnown(key string) bool {
	f := s.v.t.folders[s.dir]
	return f != nil && s.ask.accepts(f.covering(key))
}

// cut is where a lane may be split; the last one may always be, others if they are long.
func (s *scan) cut(l *lane, last bool) (at string, ok bool) {
	if at, ok = s.known(l); !ok {
		if at, ok = l.pace.beyond(l.cookie, 2*lanePages); !last && (!ok || !below(above(at), l.end)) {
			return "", false
		}
		at, ok = l.pace.beyond(l.cookie, lanePages)
	}
	return at, ok && at > l.cookie && below(above(at), l.end)
}

// known is where an earlier list of the folder had a page begin, lanePages behind the lane.
func (s *scan) known(l *lane) (at string, ok bool) {
	f := s.v.t.folders[s.dir]
	if f == nil {
		return "", false
	}
	i := firstAbove(f.segs, above(l.cookie)) + lanePages
	if i >= len(f.segs) || !f.segs[i].page {
		return "", false
	}
	return cookieBefore(f.segs[i].lo), true
}

// listAhead asks for a page that nobody waits for, or returns it where it is known. Requires c.mu.
func (v *View) listAhead(dir, cookie string, a ask) *segment {
	key := flightKey{v.t, "list", dir, cookie}
	c := v.c
	if c.flights[key] != nil {
		return nil
	}
	if seg := key.listed(); a.accepts(seg) {
		return seg
	}
	fl := v.start(context.Background(), key, v.lister(dir, cookie))
	fl.waiters++ // it is seen to its end, which the source bounds
	fl.ahead = true
	c.ahead++
	return nil
}

// listed notes that a page has come, or, if seg is nil, that it has not. Requires c.mu.
func (c *Cache) listed(t *table, dir string, seg *segment, fresh int) {
	f := t.folders[dir]
	if f == nil || f.scan == nil {
		return
	}
	if seg == nil {
		f.scan = nil // the reader asks itself, and is told
		return
	}
	s := f.scan
	s.take(seg, fresh)
	s.schedule()
}

// listed takes a page of the lane into its pace.
func (l *lane) listed(seg *segment, prefixLen int) {
	if len(seg.slots) == 0 {
		return
	}
	if l.pages++; l.pages == 1 {
		l.first = seg.slots[0].key[prefixLen:]
	}
	if p := paceOf(l.first, l.pages, seg.slots, prefixLen); p.step > 0 {
		l.pace = p
	}
}

// take takes a page into account, with so many entries that were not known. Requires c.mu.
func (s *scan) take(seg *segment, fresh int) {
	i := slices.IndexFunc(s.lanes, func(l *lane) bool { return above(l.cookie) == seg.lo })
	if i < 0 {
		return
	}
	l := s.lanes[i]
	l.flying = false
	share := 0.0
	if n := len(seg.slots); n > 0 {
		share = float64(fresh) / float64(n)
		s.ahead = append(s.ahead, span{seg.lo, seg.hi, n})
	}
	s.useful += share
	s.waste += 1 - share
	l.listed(seg, len(s.dir))
	next := cookieBefore(seg.hi)
	if below(seg.hi, l.end) && seg.hi != "" && next > l.cookie {
		l.cookie = next
		return
	}
	if l.guessed {
		s.guesses--
	}
	s.lanes = slices.Delete(s.lanes, i, i+1)
	if f := s.v.t.folders[s.dir]; len(s.lanes) == 0 && f != nil && f.scan == s {
		f.scan = nil
	}
}

// begun is the folder that was read last from its beginning.
type begun struct {
	dir string
	at  time.Duration
}

// walk is how a folder's own folders are being read, one after the other.
type walk struct {
	n    int
	last string // the one that was begun last
	at   time.Duration
}

// walking notes that a folder is read from its beginning, and lists the next ones of its parent. Requires c.mu.
func (v *View) walking(dir string, a ask) {
	c := v.c
	path := strings.TrimSuffix(dir, "/")
	cut := strings.LastIndexByte(path, '/') + 1
	parent := v.t.folders[path[:cut]]
	if parent == nil || path == "" {
		return
	}
	w := &parent.walk
	if c.now()-w.at > walkGone {
		w.n = 0
	}
	w.at = c.now()
	if w.last != dir { // or many readers of one folder would look like one of many
		w.n, w.last = w.n+1, dir
	}
	if b := v.t.begun; w.n == 1 && b.dir == parent.prefix && c.now()-b.at < walkGone && slices.Equal(parent.foldersBehind("", 1), []string{dir}) {
		w.n = 2 // the parent was the last one read, and this is its first folder: that is how trees are read
	}
	if w.n < 2 {
		return
	}
	n := min(maxSiblings, 1<<min(w.n-1, 10))
	for _, key := range parent.foldersBehind(path[cut:]+"/", n) {
		if c.ahead >= maxAhead {
			return
		}
		if f := v.t.folders[key]; f == nil || !a.accepts(f.covering("")) && c.now()-f.deniedAt >= deniedMemory {
			v.listAhead(key, "", a)
		}
	}
}

// foldersBehind are the keys of at most n folders that follow a name.
func (f *folder) foldersBehind(name string, n int) (keys []string) {
	seen := 0
	for i := firstAbove(f.segs, above(name)); i < len(f.segs); i++ {
		for _, s := range f.segs[i].onward(above(name), len(f.prefix)) {
			if seen++; len(keys) == n || seen > siblingScan {
				return keys
			}
			if strings.HasSuffix(s.key, "/") {
				keys = append(keys, s.key)
			}
		}
	}
	return keys
}

// Behind are at most n files that follow a name in a folder, as far as that is known, however old it is.
func (v *View) Behind(dir, name string, n int) (files []Entry) {
	v.c.mu.Lock()
	defer v.c.mu.Unlock()
	f := v.t.folders[dir]
	if f == nil {
		return nil
	}
	key := above(name)
	for {
		seg := f.covering(key)
		if seg == nil {
			return files
		}
		for _, s := range seg.onward(key, len(dir)) {
			if len(files) == n {
				return files
			}
			if !strings.HasSuffix(s.key, "/") {
				files = append(files, v.t.entry(s, s.key[len(dir):], seg))
			}
		}
		if key = seg.hi; key == "" {
			return files
		}
	}
}
