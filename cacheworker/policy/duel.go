package policy

import "hash/maphash"

const (
	sampleMost = 2048 // keys of the sample
	turnsHalf  = 8    // how often the capacity is asked for until the score counts half
)

// duel goes through the motions of two caches, one for each way of choosing, with a sample of the keys and the same
// share of the capacity, and counts the bytes that each of them hits. Only their orders are kept.
type duel[K comparable] struct {
	capacity int64
	shift    uint // a key of 1<<shift is in the sample
	seed     maphash.Seed
	sides    [2]side[K] // [1] is recent
	asks     int64      // bytes asked for since the score was halved
}

type side[K comparable] struct {
	cache *Cache[K]
	nodes map[K]*Node[K]
	score int64 // bytes hit
}

func newDuel[K comparable](capacity int64) *duel[K] {
	d := &duel[K]{capacity: capacity, seed: maphash.MakeSeed()}
	for i := range d.sides {
		d.sides[i] = side[K]{cache: single[K](capacity, i == 1), nodes: map[K]*Node[K]{}}
	}
	return d
}

// recent reports whether that way hits more, by a sixteenth at least.
func (d *duel[K]) recent() bool {
	by := d.sides[1].score - d.sides[0].score
	return by > d.sides[0].score/16 && by > d.sides[0].cache.capacity/16
}

func (d *duel[K]) sampled(key K) bool {
	return maphash.Comparable(d.seed, key)&(1<<d.shift-1) == 0
}

// asked notes that a node of the cache was asked for.
func (d *duel[K]) asked(n *Node[K]) {
	if !d.sampled(n.Key) {
		return
	}
	for i := range d.sides {
		d.sides[i].asked(n)
	}
	if d.asks += n.bytes; d.asks >= turnsHalf*d.sides[0].cache.capacity {
		d.asks = 0
		for i := range d.sides {
			d.sides[i].score /= 2
		}
	}
	for len(d.sides[0].nodes)+len(d.sides[1].nodes) > 2*sampleMost {
		d.thin()
	}
}

// grew has the sides charge what the cache does.
func (d *duel[K]) grew(n *Node[K]) {
	for i := range d.sides {
		s := &d.sides[i]
		if m := s.nodes[n.Key]; m != nil && n.bytes > m.bytes {
			s.cache.Grow(m, n.bytes-m.bytes)
			s.trim(m)
		}
	}
}

func (d *duel[K]) forget(key K) {
	for i := range d.sides {
		d.sides[i].forget(key)
	}
}

// thin halves the sample.
func (d *duel[K]) thin() {
	d.shift++
	for i := range d.sides {
		s := &d.sides[i]
		s.score /= 2
		s.cache.capacity = d.capacity >> d.shift
		for key := range s.nodes {
			if !d.sampled(key) {
				s.forget(key)
			}
		}
	}
}

func (s *side[K]) asked(n *Node[K]) {
	m := s.nodes[n.Key]
	if m != nil {
		s.score += m.bytes
		s.cache.Hit(m)
		return
	}
	m = &Node[K]{Key: n.Key}
	s.nodes[n.Key] = m
	s.cache.Insert(m, n.bytes)
	s.trim(m)
}

// trim evicts until the capacity is kept. Node m is in use.
func (s *side[K]) trim(m *Node[K]) {
	for s.cache.Bytes() > s.cache.capacity {
		old := s.cache.Evict(func(n *Node[K]) bool { return n == m })
		if old == nil {
			return
		}
		delete(s.nodes, old.Key)
	}
}

func (s *side[K]) forget(key K) {
	if m := s.nodes[key]; m != nil {
		s.cache.Remove(m)
		delete(s.nodes, key)
	}
}
