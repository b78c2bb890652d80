package cacheworker

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/larderfs/larder/cacheworker/brokerwire"
)

// lingering is what [Worker.Linger] may know before Run has begun.
type lingering struct {
	serving atomic.Pointer[mounts] // nil before
}

// Linger is for a worker that is told to stop: it returns when Run may end. That is at once if no
// volume is mounted, else after patience; but if within that time the broker says that no other
// worker will come, because Larder is being uninstalled, it is when no volume is mounted any more.
// Meanwhile everything goes on.
func (w *Worker) Linger(ctx context.Context, patience time.Duration) {
	tick := time.NewTicker(lingerEvery)
	defer tick.Stop()
	last := false
	for end := time.Now().Add(patience); last || time.Now().Before(end); {
		ms := w.serving.Load()
		if ms == nil || len(ms.all()) == 0 {
			return
		}
		leaving, err := ms.isLeaving(ctx)
		if err == nil && leaving && !last {
			w.log.Info("larder is being uninstalled: the worker stays until no volume is in use")
		}
		if err == nil {
			last = leaving
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

const lingerEvery = 100 * time.Millisecond

// isLeaving asks the broker whether it will be the last.
func (ms *mounts) isLeaving(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	r, err := ms.call(ctx, brokerwire.Message{Verb: brokerwire.Mounts})
	return r.Leaving, err
}
