package source

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
)

// Guard stands before all requests to one store, of whatever bucket and credential, and keeps a store in
// trouble from being asked more than one that is well.
//
// Retries are at most a share of what succeeded, and a few a second. After some failures in a row it
// is shut: one request at a time asks whether the store is back, and all others wait for what it is told, or,
// once that has lasted, fail at once. Then it lets through two, four, and so on, until all.
type Guard struct {
	cfg GuardConfig

	mu      sync.Mutex // guards the fields below
	failed  int        // in a row
	last    error      // of them
	shut    time.Time  // since when; zero where it is not
	probing bool
	next    time.Time     // of the probe
	pause   time.Duration // before it
	limit   int           // of requests at once while it is opening; 0 is none
	under   int           // requests
	retries float64       // that may be made
	filled  time.Time     // when that was last made more by time
	changed chan struct{} // closed when who waits should look again; nil if nobody does
	stats   GuardStats
}

// GuardStats say how a store is.
type GuardStats struct {
	Shut    bool // now
	Waiting int  // now, requests
	Trips   int  // times that it was shut since the start
	Retries int  // since the start
}

// Stats returns them.
func (g *Guard) Stats() GuardStats {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.stats
	s.Shut = !g.shut.IsZero()
	return s
}

// GuardConfig is the zero value, but in tests.
type GuardConfig struct {
	Failures     int           // in a row that shut it; 0 means 10
	Pause        time.Duration // before the first probe, then doubled up to MaxPause; 0 means 250ms
	MaxPause     time.Duration // also of a Retry-After; 0 means 5s
	Hold         time.Duration // for so long after it was shut requests wait, later they fail; 0 means 30s
	RetryShare   float64       // retries for each success; 0 means a quarter
	RetriesPerS  float64       // and in each second; 0 means 4
	RetriesBurst float64       // at most at once; 0 means 40
	Log          *slog.Logger  // nil discards
	Store        string        // for it
}

// opened is how many requests at once are enough to know that a store is well again.
const opened = 64

// NewGuard returns one that lets through.
func NewGuard(cfg GuardConfig) *Guard {
	def := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	number := func(v *float64, d float64) {
		if *v <= 0 {
			*v = d
		}
	}
	if cfg.Failures <= 0 {
		cfg.Failures = 10
	}
	def(&cfg.Pause, 250*time.Millisecond)
	def(&cfg.MaxPause, 5*time.Second)
	def(&cfg.Hold, 30*time.Second)
	number(&cfg.RetryShare, 0.25)
	number(&cfg.RetriesPerS, 4)
	number(&cfg.RetriesBurst, 40)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Guard{cfg: cfg, retries: cfg.RetriesBurst, filled: time.Now()}
}

// Pass is the leave to send one request. Exactly one of its methods has to be called.
type Pass struct {
	g     *Guard
	probe bool
}

// Enter waits until a request may be sent. Its error wraps object.ErrUnavailable, or is the context's.
func (g *Guard) Enter(ctx context.Context) (Pass, error) {
	for {
		g.mu.Lock()
		p, wait, err := g.admit(time.Now())
		if p.g != nil || err != nil {
			g.mu.Unlock()
			return p, err
		}
		changed := g.change()
		g.stats.Waiting++
		g.mu.Unlock()
		err = sleep(ctx, wait, changed)
		g.mu.Lock()
		g.stats.Waiting--
		g.mu.Unlock()
		if err != nil {
			return Pass{}, err
		}
	}
}

// admit lets a request through, or says for how long to wait if nothing changes. Requires g.mu.
func (g *Guard) admit(now time.Time) (p Pass, wait time.Duration, err error) {
	switch held := now.Sub(g.shut); {
	case g.shut.IsZero() && (g.limit == 0 || g.under < g.limit):
		g.under++
		return Pass{g: g}, 0, nil
	case g.shut.IsZero():
		return Pass{}, time.Hour, nil
	case !g.probing && !now.Before(g.next):
		g.probing = true
		g.under++
		return Pass{g: g, probe: true}, 0, nil
	case held >= g.cfg.Hold:
		return Pass{}, 0, fmt.Errorf("%w: the store has failed for %v, now: %v", object.ErrUnavailable, held.Truncate(time.Second), g.last)
	case g.probing:
		return Pass{}, g.cfg.Hold - held, nil
	default:
		return Pass{}, min(g.cfg.Hold-held, g.next.Sub(now)), nil
	}
}

// sleep ends after a time, or when the channel is closed, or with an error when the context ends.
func sleep(ctx context.Context, d time.Duration, changed <-chan struct{}) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-changed:
	case <-ctx.Done():
		return fmt.Errorf("wait for the store: %w", context.Cause(ctx))
	}
	return nil
}

// OK says that the store has answered, if only with a refusal.
func (p Pass) OK() {
	g := p.g
	g.mu.Lock()
	defer g.leave(p)
	g.failed = 0
	g.retries = min(g.cfg.RetriesBurst, g.retries+g.cfg.RetryShare)
	switch {
	case !g.shut.IsZero():
		g.cfg.Log.Info("the store answers again", "store", g.cfg.Store, "after", time.Since(g.shut).Truncate(time.Millisecond))
		g.shut, g.limit = time.Time{}, 2
	case g.limit >= opened:
		g.limit = 0
	case g.limit > 0:
		g.limit++ // that doubles it while each answer lets two more through
	}
}

// Failed says that the store has not answered, or that it cannot now, and for how long it wants to be left alone.
func (p Pass) Failed(err error, after time.Duration) {
	g := p.g
	g.mu.Lock()
	defer g.leave(p)
	g.failed++
	g.last = err
	switch {
	case !g.shut.IsZero() && !p.probe: // it was sent before
		return
	case !g.shut.IsZero():
		g.pause = min(2*g.pause, g.cfg.MaxPause)
	case g.limit == 0 && g.failed < g.cfg.Failures:
		return
	default:
		g.pause = g.cfg.Pause
		g.shut = time.Now()
		g.stats.Trips++
		g.cfg.Log.Warn("the store is left alone until it answers", "store", g.cfg.Store, "failures", g.failed, "err", err)
	}
	g.next = time.Now().Add(max(g.pause/2+rand.N(g.pause/2+1), min(after, g.cfg.MaxPause)))
}

// Canceled says that nobody waited for the answer any more.
func (p Pass) Canceled() {
	p.g.mu.Lock()
	p.g.leave(p)
}

// leave ends a request and gives up g.mu.
func (g *Guard) leave(p Pass) {
	g.under--
	if p.probe {
		g.probing = false
	}
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
	g.mu.Unlock()
}

// change is closed at the next end of a request. Requires g.mu.
func (g *Guard) change() <-chan struct{} {
	if g.changed == nil {
		g.changed = make(chan struct{})
	}
	return g.changed
}

// Trouble is what went wrong last, for the end of an error's text; "" if the last request was answered.
func (g *Guard) Trouble() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.failed == 0 {
		return ""
	}
	return fmt.Sprintf("; of all requests the last %d failed: %v", g.failed, g.last)
}

// Retry waits until a request may be sent once more.
func (g *Guard) Retry(ctx context.Context) error {
	for {
		g.mu.Lock()
		now := time.Now()
		g.retries = min(g.cfg.RetriesBurst, g.retries+now.Sub(g.filled).Seconds()*g.cfg.RetriesPerS)
		g.filled = now
		if g.retries >= 1 {
			g.retries--
			g.stats.Retries++
			g.mu.Unlock()
			return nil
		}
		wait := time.Duration((1 - g.retries) / g.cfg.RetriesPerS * float64(time.Second))
		changed := g.change()
		g.mu.Unlock()
		if err := sleep(ctx, wait+time.Microsecond, changed); err != nil {
			return err
		}
	}
}
