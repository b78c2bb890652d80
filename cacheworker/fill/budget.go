package fill

import (
	"context"
	"fmt"
	"sync"
)

// budget bounds bytes in flight and requests. Foreground fetches wait in a queue; read-ahead takes
// only what leaves a reserve, and never waits; completion waits until that reserve is there
// and nobody is in the queue. Whoever holds bytes gives them back without needing more, so
// the queue always moves.
type budget struct {
	total        int64
	reserve      int64
	reserveSlots int

	feed func() // called when a fetch has begun to wait: may give bytes

	mu     sync.Mutex // guards the fields below
	free   int64
	slots  int
	queue  []*claim
	low    []*claim
	active int           // fetches under way or waiting, completion not counted
	begun  uint64        // such fetches so far
	idle   chan struct{} // closed when active falls to 0; nil unless somebody waits
}

type claim struct {
	bytes int64
	ready chan struct{} // closed when it was granted
}

func newBudget(bytes int64, requests int) *budget {
	return &budget{
		total: bytes, free: bytes, slots: requests,
		reserve: bytes / 4, reserveSlots: max(1, requests/4),
		feed: func() {},
	}
}

func (b *budget) used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.total - b.free
}

// waiting is how many fetches wait for bytes or a request.
func (b *budget) waiting() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.queue) + len(b.low)
}

// starved reports whether the fetch that is next lacks bytes.
func (b *budget) starved() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.queue) > 0 {
		return b.free < b.queue[0].bytes
	}
	return len(b.low) > 0 && b.free-b.low[0].bytes < b.reserve
}

// take waits for bytes and a request, as a foreground fetch.
func (b *budget) take(ctx context.Context, bytes int64) error {
	return b.wait(ctx, bytes, &b.queue)
}

// takeLow waits for them as completion.
func (b *budget) takeLow(ctx context.Context, bytes int64) error {
	return b.wait(ctx, bytes, &b.low)
}

func (b *budget) wait(ctx context.Context, bytes int64, queue *[]*claim) error {
	c := &claim{bytes, make(chan struct{})}
	b.mu.Lock()
	*queue = append(*queue, c)
	b.dispatch()
	b.mu.Unlock()
	b.feed()
	select {
	case <-c.ready:
		return nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, q := range *queue {
		if q == c {
			*queue = append((*queue)[:i:i], (*queue)[i+1:]...)
			b.dispatch()
			return fmt.Errorf("wait for memory: %w", context.Cause(ctx))
		}
	}
	return nil // granted at the same moment; the caller sees its context itself
}

// try takes them if that leaves the reserve, as read-ahead.
func (b *budget) try(bytes int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.queue) > 0 || !b.spare(bytes) {
		return false
	}
	b.free -= bytes
	b.slots--
	return true
}

func (b *budget) spare(bytes int64) bool {
	return b.free-bytes >= b.reserve && b.slots > b.reserveSlots
}

// give returns bytes and requests.
func (b *budget) give(bytes int64, requests int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += bytes
	b.slots += requests
	b.dispatch()
}

// dispatch requires b.mu.
func (b *budget) dispatch() {
	for len(b.queue) > 0 && b.free >= b.queue[0].bytes && b.slots > 0 {
		b.grant(&b.queue)
	}
	for len(b.queue) == 0 && len(b.low) > 0 && b.spare(b.low[0].bytes) {
		b.grant(&b.low)
	}
}

func (b *budget) grant(queue *[]*claim) {
	c := (*queue)[0]
	*queue = (*queue)[1:]
	b.free -= c.bytes
	b.slots--
	close(c.ready)
}

// begin and end count a fetch that completion gives way to.
func (b *budget) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.active++
	b.begun++
}

// fetches counts those that completion gives way to, so far.
func (b *budget) fetches() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.begun
}

func (b *budget) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.active--; b.active == 0 && b.idle != nil {
		close(b.idle)
		b.idle = nil
	}
}

// waitIdle returns when no fetch is under way.
func (b *budget) waitIdle(ctx context.Context) error {
	for {
		b.mu.Lock()
		if b.active == 0 {
			b.mu.Unlock()
			return ctx.Err()
		}
		if b.idle == nil {
			b.idle = make(chan struct{})
		}
		idle := b.idle
		b.mu.Unlock()
		select {
		case <-idle:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
