package cacheworker

import (
	"context"
	"math"
	"strings"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source/s3"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
)

const (
	expireOften  = time.Second // at most
	expireSeldom = 10 * time.Minute
	expireShare  = 20 // of the time may go into it: each look is a pass over the index
)

// expire frees what has been cached for longer than the mount that leads to it says, until ctx ends.
func (w *Worker) expire(ctx context.Context) error {
	for {
		wait := time.NewTimer(w.expireOnce(ctx, time.Now()))
		select {
		case <-wait.C:
		case <-w.namespace.changed:
		case <-ctx.Done():
		}
		wait.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// expireOnce frees what is too old at a time, and says when to look again.
func (w *Worker) expireOnce(ctx context.Context, now time.Time) (again time.Duration) {
	t, _ := w.namespace.last()
	all, shortest := limitsOf(t.Mounts, now)
	if len(all) == 0 {
		return math.MaxInt64 // or when the table has changed
	}
	began := time.Now()
	ids, err := w.store.Older(ctx, func(s object.Store) func([]byte) time.Time { return limitsIn(all, string(s)) })
	if err != nil {
		if ctx.Err() == nil {
			w.log.Warn("free what mounts have a ttl for; it will be tried again", "in", expireSeldom, "err", err)
		}
		return expireSeldom
	}
	var objects, bytes int64
	for _, id := range ids {
		had := w.store.Peek(id).PresentBytes + w.store.TailBytes(id)
		if ctx.Err() == nil && w.store.Evict(id) {
			objects, bytes = objects+1, bytes+had
		}
	}
	if w.expired.Add(bytes); objects > 0 {
		w.log.Info("freed what was cached for longer than its mount's ttl", "objects", objects, "bytes", bytes)
	}
	return max(min(shortest/10, expireSeldom), expireOften, expireShare*time.Since(began))
}

// limit is since when something may have been cached below a mount's URI.
type limit struct {
	at     record.Location
	host   string // of its endpoint
	before time.Time
}

// limitsOf are those of the mounts that have a ttl, and the shortest of these.
func limitsOf(mounts []client.Mount, now time.Time) (all []limit, shortest time.Duration) {
	for _, m := range mounts {
		ttl := m.TTL()
		if ttl == 0 || m.Validate() != nil { // of an older master: nobody is shown it
			continue
		}
		at, err := record.ParseLocation(strings.TrimSuffix(m.URI, "/")+"/", "")
		host := ""
		if err == nil && at.Scheme == "s3" {
			host, err = s3.EndpointHost(m.Options[record.OptionEndpoint], m.Options[record.OptionRegion])
		}
		if err != nil {
			continue
		}
		if shortest == 0 || ttl < shortest {
			shortest = ttl
		}
		all = append(all, limit{at, host, now.Add(-ttl)})
	}
	return all, shortest
}

// limitsIn says of a store's keys since when they may have been cached, the zero time for any: of several mounts the one
// with the shortest ttl counts. It is nil for a store of none of them.
func limitsIn(all []limit, store string) func(key []byte) time.Time {
	type rule struct {
		is     func([]byte) bool
		before time.Time
	}
	var rules []rule
	for _, l := range all {
		if is := keysAt(l.at, l.host, store); is != nil {
			rules = append(rules, rule{is, l.before})
		}
	}
	if len(rules) == 0 {
		return nil
	}
	return func(key []byte) (before time.Time) {
		for _, r := range rules {
			if r.before.After(before) && r.is(key) {
				before = r.before
			}
		}
		return before
	}
}
