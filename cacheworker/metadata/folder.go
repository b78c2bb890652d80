package metadata

import (
	"cmp"
	"container/list"
	"slices"
	"time"
)

// segment is what one answer of the store said about the names in [lo, hi) of a folder. Names are
// relative to the folder's prefix, those of folders with "/" behind them, as they sort in
// the store. It never changes; a newer one that overlaps cuts it (see [Cache.insert]).
type segment struct {
	lo, hi string        // hi "" is the end of the folder
	slots  []slot        // by key
	void   bool          // nothing is known here, and what was asked before seq is wrong
	page   bool          // of a LIST
	next   string        // of a page with others behind it: the store's name for its end
	from   string        // of a page: the cookie it was listed behind
	hidden int           // keys of the page that no path can express
	at     time.Duration // when it was asked, since Cache.start
	seq    uint64        // when it was asked, in the order of Cache.seq

	cache *Cache
	in    *folder       // nil unless remembered
	elem  *list.Element // in Cache.lru
}

// slot is one name: a file or, where the key ends in "/", a folder.
type slot struct {
	key     string // full
	version string
	size    int64
	mtime   int64 // Unix nanoseconds, 0 where unknown
}

// folder holds the segments of one prefix, disjoint and in order.
type folder struct {
	t        *table
	prefix   string
	segs     []*segment
	lone     int           // HEADs made because the name was in no segment
	deniedAt time.Duration // when its LIST was refused, far in the past if never
	scan     *scan         // nil unless somebody reads on
	walk     walk
}

// fact is what a folder knows of one key: nothing if seg is nil.
type fact struct {
	seg     *segment
	slot    slot
	present bool
}

func (f fact) void() bool { return f.seg != nil && f.seg.void }

func (f fact) voidSeq() uint64 {
	if f.void() {
		return f.seg.seq
	}
	return 0
}

func (f *folder) find(key string) fact {
	seg := f.covering(key)
	if seg == nil {
		return fact{}
	}
	i, ok := slices.BinarySearchFunc(seg.slots, key, func(s slot, k string) int {
		return cmp.Compare(s.key[len(f.prefix):], k)
	})
	if !ok {
		return fact{seg: seg}
	}
	return fact{seg: seg, slot: seg.slots[i], present: true}
}

// covering returns the segment that key lies in.
func (f *folder) covering(key string) *segment {
	i := firstAbove(f.segs, key)
	if i < len(f.segs) && f.segs[i].lo <= key {
		return f.segs[i]
	}
	return nil
}

// firstAbove is the index of the first segment that ends above key.
func firstAbove(segs []*segment, key string) int {
	i, _ := slices.BinarySearchFunc(segs, key, func(s *segment, k string) int {
		if below(k, s.hi) {
			return 1
		}
		return -1
	})
	return i
}

// below reports key < hi, where hi "" is above everything.
func below(key, hi string) bool { return hi == "" || key < hi }

func (s *segment) time() time.Time { return s.cache.start.Add(s.at) }

func (s *segment) cost() int { return max(1, len(s.slots)) }

// onward returns the slots from key on.
func (s *segment) onward(key string, prefixLen int) []slot {
	i, _ := slices.BinarySearchFunc(s.slots, key, func(s slot, k string) int {
		return cmp.Compare(s.key[prefixLen:], k)
	})
	return s.slots[i:]
}

// cut returns the part of s in [lo, hi), nil if that is empty.
func (s *segment) cut(lo, hi string, prefixLen int) *segment {
	if lo < s.lo {
		lo = s.lo
	}
	if hi == "" || s.hi != "" && s.hi < hi {
		hi = s.hi
	}
	if !below(lo, hi) {
		return nil
	}
	n := *s
	n.lo, n.hi, n.in, n.elem = lo, hi, nil, nil
	n.slots = n.onward(lo, prefixLen)
	if hi != "" {
		n.slots = n.slots[:len(n.slots)-len(n.onward(hi, prefixLen))]
	}
	if hi != s.hi {
		n.next = ""
	}
	if lo != s.lo {
		n.hidden = 0
	}
	return &n
}

// insert remembers n: it replaces what is older and gives way to what is newer. Requires c.mu.
func (c *Cache) insert(t *table, prefix string, n *segment) {
	f := t.folders[prefix]
	if f == nil {
		f = &folder{t: t, prefix: prefix, deniedAt: -deniedMemory}
		t.folders[prefix] = f
	}
	i := firstAbove(f.segs, n.lo)
	j := i
	for j < len(f.segs) && below(f.segs[j].lo, n.hi) {
		j++
	}
	old := slices.Clone(f.segs[i:j])
	var now []*segment
	rest := n // the part of n behind the old segments seen so far
	for _, o := range old {
		if o.seq > n.seq {
			if rest != nil {
				now = appendSome(now, rest.cut(rest.lo, o.lo, len(prefix)))
				rest = rest.after(o.hi, len(prefix))
			}
			now = append(now, o)
			continue
		}
		c.forget(o)
		if o.lo < n.lo {
			now = append(now, o.cut(o.lo, n.lo, len(prefix)))
		}
		if right := o.after(n.hi, len(prefix)); right != nil {
			if n.page {
				right.from = cookieBefore(n.hi)
			}
			now = append(now, right)
		}
	}
	now = appendSome(now, rest)
	slices.SortFunc(now, func(a, b *segment) int { return cmp.Compare(a.lo, b.lo) })
	f.segs = slices.Replace(f.segs, i, j, now...)
	for _, s := range now {
		c.remember(f, s)
	}
	c.shrink()
}

// after returns the part of s from hi on, nil where there is none.
func (s *segment) after(hi string, prefixLen int) *segment {
	if hi == "" {
		return nil
	}
	return s.cut(hi, "", prefixLen)
}

func appendSome(segs []*segment, s *segment) []*segment {
	if s == nil {
		return segs
	}
	return append(segs, s)
}

// remember and forget keep the books for a segment that is in a folder. Require c.mu.
func (c *Cache) remember(f *folder, s *segment) {
	if s.in != nil {
		return
	}
	s.in = f
	s.elem = c.lru.PushFront(s)
	c.stats.Entries += s.cost()
	c.stats.Hidden += s.hidden
}

func (c *Cache) forget(s *segment) {
	c.lru.Remove(s.elem)
	s.in, s.elem = nil, nil
	c.stats.Entries -= s.cost()
	c.stats.Hidden -= s.hidden
}

func (c *Cache) touch(s *segment) {
	if s != nil && s.elem != nil {
		c.lru.MoveToFront(s.elem)
	}
}

// shrink forgets the segments used longest ago until the bound is kept, but never the
// youngest. Requires c.mu.
func (c *Cache) shrink() {
	for c.stats.Entries > c.cfg.MaxEntries && c.lru.Len() > 1 {
		s := c.lru.Back().Value.(*segment)
		f := s.in
		c.stats.Evicted += uint64(s.cost())
		c.forget(s)
		i := firstAbove(f.segs, s.lo)
		f.segs = slices.Delete(f.segs, i, i+1)
		if len(f.segs) == 0 {
			delete(f.t.folders, f.prefix)
		}
	}
}

// denied forgets all that the principal was told by the store, and says so.
func (c *Cache) denied(t *table) {
	c.mu.Lock()
	for _, f := range t.folders {
		for _, s := range f.segs {
			c.forget(s)
		}
	}
	clear(t.folders)
	c.mu.Unlock()
	if c.cfg.OnDenied != nil {
		c.cfg.OnDenied(t.principal, t.store)
	}
}
