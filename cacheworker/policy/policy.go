// Package policy decides who is evicted from a cache that is counted in bytes: S3-FIFO
// (Yang et al., SOSP 2023). It is pure: no clock, no I/O, no goroutine, no lock of its own.
//
// What was asked for once leaves through the small queue and never displaces what was asked
// for often: a scan of any length costs the main queue nothing. The caller keeps the nodes
// (one per object, embedded in its own struct, so that a million of them cost no map here);
// a node is in at most one queue, and [Cache.Bytes] is the sum over the nodes in queues.
package policy

const (
	smallPercent = 10 // share of the capacity that newcomers pass through
	maxFreq      = 3  // hits that are remembered
	promoteFreq  = 2  // hits in the small queue that earn a place in the main one
)

// Node is one object of a [Cache]. The zero value with a Key is ready for [Cache.Insert].
type Node[K comparable] struct {
	Key K

	prev, next *Node[K]
	bytes      int64
	queue      *queue[K] // nil when in none
	freq       uint8
}

// Bytes is what the node is charged for.
func (n *Node[K]) Bytes() int64 { return n.bytes }

// Cache orders nodes. Its methods are not safe for concurrent use.
type Cache[K comparable] struct {
	capacity    int64 // bytes
	small, main queue[K]
	ghosts      ghosts[K]
}

// New makes an empty cache of so many bytes. The capacity is no limit that Cache keeps: the
// caller evicts. It says how large the small queue and the memory for the evicted may be.
func New[K comparable](capacityBytes int64) *Cache[K] {
	return &Cache[K]{capacity: capacityBytes, ghosts: ghosts[K]{at: make(map[K]uint64)}}
}

// Insert puts a new node in: behind the small queue's last, or, if its key was evicted from
// there not long ago, behind the main queue's.
func (c *Cache[K]) Insert(n *Node[K], bytes int64) {
	n.bytes, n.freq = bytes, 0
	if c.ghosts.forget(n.Key) {
		c.main.push(n)
		return
	}
	c.small.push(n)
}

// Restore puts a node of an earlier life of the cache in: behind the main queue's last, so
// that the first scan after a restart does not wash it out.
func (c *Cache[K]) Restore(n *Node[K], bytes int64) {
	n.bytes, n.freq = bytes, 0
	c.main.push(n)
}

// Hit says that the node was asked for again.
func (c *Cache[K]) Hit(n *Node[K]) { n.freq = min(n.freq+1, maxFreq) }

// Grow adds to what the node is charged for; negative bytes take away.
func (c *Cache[K]) Grow(n *Node[K], bytes int64) {
	n.bytes += bytes
	if n.queue != nil {
		n.queue.bytes += bytes
	}
}

// Remove takes a node out without remembering it. It may be in no queue.
func (c *Cache[K]) Remove(n *Node[K]) {
	if n.queue != nil {
		n.queue.remove(n)
	}
}

// Len and Bytes are over the nodes in queues.
func (c *Cache[K]) Len() int     { return c.small.len + c.main.len }
func (c *Cache[K]) Bytes() int64 { return c.small.bytes + c.main.bytes }

// Evict chooses one node, takes it out and returns it; nil if skip is true for all of them.
// A node that is skipped goes back to the young end of its queue with its hits: being held
// is being used. No node is looked at more than maxFreq+2 times, so Evict ends.
func (c *Cache[K]) Evict(skip func(*Node[K]) bool) *Node[K] {
	var smallPassed, mainPassed int // skipped in a row: a whole queue of them has no victim
	for {
		smallOver := smallPassed >= c.small.len
		mainOver := mainPassed >= c.main.len
		if smallOver && mainOver {
			return nil
		}
		fromSmall := c.small.bytes*100 > c.capacity*smallPercent || c.main.len == 0
		if fromSmall && smallOver {
			fromSmall = false
		}
		if !fromSmall && mainOver {
			fromSmall = true
		}
		if fromSmall {
			n := c.small.oldest()
			switch {
			case skip(n):
				c.small.requeue(n)
				smallPassed++
			case n.freq >= promoteFreq:
				c.small.remove(n)
				n.freq = 0
				c.main.push(n)
				mainPassed = 0 // it can be the victim now
			default:
				c.small.remove(n)
				c.ghosts.remember(n.Key, max(c.Len(), minGhosts))
				return n
			}
			continue
		}
		n := c.main.oldest()
		switch {
		case skip(n):
			c.main.requeue(n)
			mainPassed++
		case n.freq > 0:
			n.freq--
			c.main.requeue(n)
			mainPassed = 0
		default:
			c.main.remove(n)
			return n
		}
	}
}

// queue is a ring of nodes in the order of their coming; head is the oldest.
type queue[K comparable] struct {
	head  *Node[K]
	len   int
	bytes int64
}

func (q *queue[K]) oldest() *Node[K] { return q.head }

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
const minGhosts = 64

// ghosts remembers the keys evicted last from the small queue, as many as there are nodes.
type ghosts[K comparable] struct {
	at   map[K]uint64 // key → sequence number of its eviction
	ring []ghost[K]   // in the order of eviction; forgotten ones stay in it until they are oldest
	seq  uint64
}

type ghost[K comparable] struct {
	key K
	seq uint64
}

func (g *ghosts[K]) remember(key K, limit int) {
	g.seq++
	g.at[key] = g.seq
	g.ring = append(g.ring, ghost[K]{key, g.seq})
	for len(g.ring) > limit {
		old := g.ring[0]
		g.ring = g.ring[1:]
		if g.at[old.key] == old.seq {
			delete(g.at, old.key)
		}
	}
}

func (g *ghosts[K]) forget(key K) bool {
	_, ok := g.at[key]
	delete(g.at, key)
	return ok
}
