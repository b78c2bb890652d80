// Package policy decides who is evicted from a cache that is counted in bytes. It is pure: no clock, no I/O, no
// goroutine, no lock of its own.
//
// Newcomers pass through a small queue. At its end a newcomer takes the place of the main queue's oldest if it was asked
// for more often, also before it was evicted the last time; else it goes. So a scan of any length costs the main
// queue nothing, and of a row of files that is read again and again and does not fit, a part stays
// (LRU and S3-FIFO keep nothing of it). What is not asked for during some rounds of the main queue counts as
// never asked for, so that the data of yesterday's job make room. Where jobs go from one dataset to another so often
// that this is too late, newcomers are let in without a question: a duel over a sample of the keys says
// which of the two ways hits more bytes. Small pieces that are asked for before anything else (footers) have a queue and a share of
// their own, which the others do not wash out. The caller keeps the nodes
// (one per object, embedded in its own struct, so that a million of them cost no map here);
// a node is in at most one queue, and [Cache.Bytes] is the sum over the nodes in queues.
package policy

const (
	smallPercent = 10 // share of the capacity that newcomers pass through
	maxFreq      = 15 // hits that are remembered
	idleRounds   = 3  // of the main queue without a hit, after which a node has none left
	ageTurns     = 20 // how often the capacity is evicted until all hits count half
	tailPercent  = 2  // share of the capacity that tails have first claim to
)

// Node is one object of a [Cache]. The zero value with a Key is ready for [Cache.Insert].
type Node[K comparable] struct {
	Key K

	prev, next *Node[K]
	bytes      int64
	queue      *queue[K] // nil when in none
	hits       hits
	again      bool  // asked for since it was last the oldest of the main queue
	idle       uint8 // how often in a row it was the oldest and not asked for
}

// Bytes is what the node is charged for.
func (n *Node[K]) Bytes() int64 { return n.bytes }

// hits is how often a key was asked for, of late.
type hits struct {
	n   uint8
	age uint32 // when n was true
}

// at is what the hits are worth now.
func (h hits) at(age uint32) uint8 {
	if age-h.age > 8 {
		return 0
	}
	return h.n >> (age - h.age)
}

// Cache orders nodes. Its methods are not safe for concurrent use.
type Cache[K comparable] struct {
	capacity    int64 // bytes
	small, main queue[K]
	spare       queue[K] // who can be had elsewhere
	kept        queue[K] // who is not to be evicted
	tails       queue[K] // the one asked for longest ago is the oldest
	ghosts      ghosts[K]
	turned      int64  // bytes evicted since the hits were halved
	age         uint32 // how often they were
	recent      bool   // newcomers need not be asked for more often than whom they replace
	duel        *duel[K]
}

// New makes an empty cache of so many bytes. The capacity is no limit that Cache keeps: the
// caller evicts. It says how large the small queue and the memory for the evicted may be.
func New[K comparable](capacityBytes int64) *Cache[K] {
	c := single[K](capacityBytes, false)
	c.duel = newDuel[K](capacityBytes)
	return c
}

// single has one way of choosing.
func single[K comparable](capacity int64, recent bool) *Cache[K] {
	return &Cache[K]{capacity: capacity, recent: recent, ghosts: ghosts[K]{at: make(map[K]memory)}}
}

// Insert puts a new node in, behind the small queue's last. If its key was evicted not long ago it has the hits
// that it had then.
func (c *Cache[K]) Insert(n *Node[K], bytes int64) {
	n.bytes, n.again, n.idle = bytes, false, 0
	old, known := c.ghosts.forget(n.Key)
	n.hits = hits{old.at(c.age), c.age}
	if known {
		c.hit(n)
	}
	c.small.push(n)
	c.asked(n)
}

// Restore puts a node of an earlier life of the cache in: behind the main queue's last, so
// that the first scan after a restart does not wash it out.
func (c *Cache[K]) Restore(n *Node[K], bytes int64) {
	n.bytes, n.hits, n.again, n.idle = bytes, hits{0, c.age}, false, 0
	c.main.push(n)
}

// InsertTail puts in a node that goes after all others, as long as tails are within their share. Beyond it they go
// first, the one asked for longest ago before the others.
func (c *Cache[K]) InsertTail(n *Node[K], bytes int64) {
	n.bytes = bytes
	c.tails.push(n)
}

// Hit says that the node was asked for again.
func (c *Cache[K]) Hit(n *Node[K]) {
	if n.queue == &c.tails {
		c.tails.remove(n)
		c.tails.push(n)
		return
	}
	c.hit(n)
	c.asked(n)
}

func (c *Cache[K]) asked(n *Node[K]) {
	if c.duel != nil {
		c.duel.asked(n)
		c.recent = c.duel.recent()
	}
}

func (c *Cache[K]) hit(n *Node[K]) {
	n.hits = hits{min(n.hits.at(c.age)+1, maxFreq), c.age}
	n.again = true
	if n.queue == &c.spare {
		c.move(n, &c.small)
	}
}

// Hits is how often the node was asked for again, of late.
func (c *Cache[K]) Hits(n *Node[K]) uint8 { return n.hits.at(c.age) }

// Credit has the node count as asked for again so often at least: it was, in another cache.
func (c *Cache[K]) Credit(n *Node[K], asked uint8) {
	n.hits = hits{max(n.hits.at(c.age), min(asked, maxFreq)), c.age}
}

// Spare says that the node can be had elsewhere, so that it goes before all others, until it is asked for or
// returned.
func (c *Cache[K]) Spare(n *Node[K]) {
	if n.queue == &c.small || n.queue == &c.main {
		c.move(n, &c.spare)
	}
}

// Keep has the node not evicted until it is returned.
func (c *Cache[K]) Keep(n *Node[K]) { c.move(n, &c.kept) }

// Return ends Keep and Spare: the node is a newcomer with the hits that it has.
func (c *Cache[K]) Return(n *Node[K]) {
	if n.queue == &c.kept || n.queue == &c.spare {
		c.move(n, &c.small)
	}
}

func (c *Cache[K]) move(n *Node[K], to *queue[K]) {
	if n.queue != nil {
		n.queue.remove(n)
	}
	to.push(n)
}

// Admits reports whether a newcomer that was asked for again so often in another cache would last here: if it was so
// more often, by two, than who would go for it. Else the two would take turns.
func (c *Cache[K]) Admits(asked uint8) bool {
	rival := c.main.head
	if n := c.small.head; n != nil && (rival == nil || c.small.bytes > c.capacity/200*smallPercent && c.Hits(n) <= c.worth(rival)) {
		rival = n
	}
	return rival == nil || c.spare.len > 0 || asked > c.worth(rival)+1
}

// Grow adds to what the node is charged for; negative bytes take away.
func (c *Cache[K]) Grow(n *Node[K], bytes int64) {
	n.bytes += bytes
	if n.queue != nil {
		n.queue.bytes += bytes
	}
	if c.duel != nil {
		c.duel.grew(n)
	}
}

// Remove takes a node out without remembering it. It may be in no queue.
func (c *Cache[K]) Remove(n *Node[K]) {
	if n.queue != nil {
		n.queue.remove(n)
	}
	if c.duel != nil {
		c.duel.forget(n.Key)
	}
}

// Len and Bytes are over the nodes in queues.
func (c *Cache[K]) Len() int {
	return c.small.len + c.main.len + c.spare.len + c.kept.len + c.tails.len
}
func (c *Cache[K]) Bytes() int64 {
	return c.small.bytes + c.main.bytes + c.spare.bytes + c.kept.bytes + c.tails.bytes
}

// Evict chooses one node, takes it out and returns it; nil if skip is true for all of them.
// A node that is skipped goes back to the young end of its queue: being held is being used. No
// queue is gone through more than twice for each node that moves to the other, so Evict ends.
func (c *Cache[K]) Evict(skip func(*Node[K]) bool) *Node[K] {
	if n := c.oldest(&c.spare, skip); n != nil {
		return c.out(n)
	}
	if c.tails.bytes > c.capacity/100*tailPercent {
		if n := c.drop(skip); n != nil {
			return n
		}
	}
	if n := c.choose(skip); n != nil {
		return n
	}
	return c.drop(skip)
}

// drop is Evict for tails.
func (c *Cache[K]) drop(skip func(*Node[K]) bool) *Node[K] {
	n := c.oldest(&c.tails, skip)
	if n != nil {
		c.tails.remove(n)
	}
	return n
}

// choose is Evict for the others.
func (c *Cache[K]) choose(skip func(*Node[K]) bool) *Node[K] {
	newest := c.oldest(&c.small, skip)
	for newest != nil && c.main.bytes+c.kept.bytes+newest.bytes <= c.capacity-c.capacity/100*smallPercent {
		c.promote(newest)
		newest = c.oldest(&c.small, skip)
	}
	rival := c.oldest(&c.main, skip)
	switch {
	case newest == nil && rival == nil:
		return nil
	case newest == nil, rival != nil && c.small.bytes <= c.capacity/200*smallPercent:
		return c.out(rival)
	case rival == nil:
		return c.out(newest)
	case !c.recent && newest.hits.at(c.age) <= c.worth(rival):
		c.main.requeue(rival)
		rival.idle = min(rival.idle+1, idleRounds)
		return c.out(newest)
	}
	c.promote(newest)
	return c.out(rival)
}

// worth is the hits of a node of the main queue.
func (c *Cache[K]) worth(n *Node[K]) uint8 {
	if n.idle >= idleRounds {
		return 0
	}
	return n.hits.at(c.age)
}

func (c *Cache[K]) promote(n *Node[K]) {
	c.small.remove(n)
	n.again, n.idle = false, 0
	c.main.push(n)
}

// oldest is the first in a queue that may go; nil if there is none. Of the main queue, those that were asked for
// since they were last looked at have their turn once more.
func (c *Cache[K]) oldest(q *queue[K], skip func(*Node[K]) bool) *Node[K] {
	for range 2 * q.len {
		n := q.head
		switch {
		case skip(n):
			q.requeue(n)
		case q == &c.main && n.again:
			n.again, n.idle = false, 0
			q.requeue(n)
		default:
			return n
		}
	}
	return nil
}

// out takes a node out, and remembers its hits.
func (c *Cache[K]) out(n *Node[K]) *Node[K] {
	if c.turned += n.bytes; c.turned >= c.capacity*ageTurns {
		c.turned = 0
		c.age++
	}
	n.queue.remove(n)
	c.ghosts.remember(n.Key, n.hits, max(c.Len(), minGhosts))
	return n
}

// queue is a ring of nodes in the order of their coming; head is the oldest.
type queue[K comparable] struct {
	head  *Node[K]
	len   int
	bytes int64
}

func (q *queue[K]) push(n *Node[K]) {
	if q.head == nil {
		n.prev, n.next = n, n
		q.head = n
	} else {
		n.prev, n.next = q.head.prev, q.head
		n.prev.next, n.next.prev = n, n
	}
	n.queue = q
	q.len++
	q.bytes += n.bytes
}

func (q *queue[K]) remove(n *Node[K]) {
	if n.next == n {
		q.head = nil
	} else {
		n.prev.next, n.next.prev = n.next, n.prev
		if q.head == n {
			q.head = n.next
		}
	}
	n.prev, n.next, n.queue = nil, nil, nil
	q.len--
	q.bytes -= n.bytes
}

// requeue makes the oldest node the youngest.
func (q *queue[K]) requeue(n *Node[K]) { q.head = n.next }

// minGhosts keeps a memory in a cache of a few large objects.
const minGhosts = 1024

// ghosts remembers the keys evicted last and their hits, as many as there are nodes.
type ghosts[K comparable] struct {
	at   map[K]memory
	ring []ghost[K] // in the order of eviction; forgotten ones stay in it until they are oldest
	seq  uint64
}

type memory struct {
	hits
	seq uint64 // number of its eviction
}

type ghost[K comparable] struct {
	key K
	seq uint64
}

func (g *ghosts[K]) remember(key K, h hits, limit int) {
	g.seq++
	g.at[key] = memory{h, g.seq}
	g.ring = append(g.ring, ghost[K]{key, g.seq})
	for len(g.ring) > limit {
		old := g.ring[0]
		g.ring = g.ring[1:]
		if g.at[old.key].seq == old.seq {
			delete(g.at, old.key)
		}
	}
}

func (g *ghosts[K]) forget(key K) (hits, bool) {
	m, ok := g.at[key]
	delete(g.at, key)
	return m.hits, ok
}
