package source_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/source"
)

// troubled is a store that fails while it is down. Callers ask it as a client does: all attempts under one guard, the
// second and later ones as retries.
type troubled struct {
	g        *source.Guard
	down     atomic.Bool
	requests atomic.Int64
	under    atomic.Int64
	most     atomic.Int64
}

var errDown = errors.New("503")

func (s *troubled) send(ctx context.Context) error {
	p, err := s.g.Enter(ctx)
	if err != nil {
		return err
	}
	s.requests.Add(1)
	n := s.under.Add(1)
	for m := s.most.Load(); n > m && !s.most.CompareAndSwap(m, n); m = s.most.Load() {
	}
	defer s.under.Add(-1)
	<-time.After(10 * time.Millisecond) // of the bubble's clock
	if s.down.Load() {
		p.Failed(errDown, 0)
		return errDown
	}
	p.OK()
	return nil
}

// call makes attempts until one succeeds.
func (s *troubled) call(ctx context.Context) error {
	err := s.send(ctx)
	for errors.Is(err, errDown) {
		if err = s.g.Retry(ctx); err == nil {
			err = s.send(ctx)
		}
	}
	return err
}

// callers run calls from n places at once, one after the other in each, until the store has been down for so long.
func (s *troubled) callers(t *testing.T, n int, d time.Duration) (failed int64) {
	ctx, stop := context.WithTimeout(t.Context(), d)
	defer stop()
	var wg sync.WaitGroup
	var bad atomic.Int64
	for range n {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := s.call(ctx); err != nil && ctx.Err() == nil {
					bad.Add(1)
					select { // as an application that tries again
					case <-time.After(100 * time.Millisecond):
					case <-ctx.Done():
					}
				}
			}
		})
	}
	wg.Wait()
	return bad.Load()
}

func TestAStoreThatIsDownIsAskedNowAndThenOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &troubled{g: source.NewGuard(source.GuardConfig{})}
		s.down.Store(true)
		const readers, outage = 64, 25 * time.Second
		if failed := s.callers(t, readers, outage); failed != 0 {
			t.Errorf("%d calls failed before they had waited for long", failed)
		}
		if n := s.requests.Load(); n > readers+20 {
			t.Errorf("%d requests in %v of %d readers", n, outage, readers)
		}

		s.requests.Store(0)
		failed := s.callers(t, readers, time.Minute)
		if n := s.requests.Load(); n > 40 || failed < readers {
			t.Errorf("down for long: %d requests, %d calls failed", n, failed)
		}
		start := time.Now()
		if _, err := s.g.Enter(t.Context()); err != nil && !errors.Is(err, object.ErrUnavailable) || time.Since(start) > 0 {
			t.Errorf("down for long: %v after %v; want an answer at once", err, time.Since(start))
		}
	})
}

func TestAStoreThatIsBackIsNotOverrun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &troubled{g: source.NewGuard(source.GuardConfig{})}
		s.down.Store(true)
		const readers = 64
		var wg sync.WaitGroup
		for range readers {
			wg.Go(func() {
				if err := s.call(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(10 * time.Second)
		if n := s.under.Load(); n > 1 {
			t.Errorf("%d requests at once while it is down", n)
		}
		s.most.Store(0)
		s.down.Store(false)
		back := time.Now()
		time.Sleep(5*time.Second + 25*time.Millisecond) // the next probe has come, and what it lets through
		wg.Wait()
		if took := time.Since(back); took > 20*time.Second {
			t.Errorf("all were answered %v after it was back", took)
		}
		if n := s.most.Load(); n > readers/2 {
			t.Errorf("%d of %d requests at once when it was back", n, readers)
		}
		s.most.Store(0)
		s.callers(t, readers, 5*time.Second)
		if n := s.most.Load(); n != readers {
			t.Errorf("later %d at once; want %d", n, readers)
		}
	})
}

// A store of whose answers a part are failures gets a part more requests, not a multiple.
func TestRetriesAreAShareOfWhatSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := source.NewGuard(source.GuardConfig{Failures: 1000})
		retries, successes := 0, 0
		end := time.Now().Add(time.Minute)
		for time.Now().Before(end) {
			p, err := g.Enter(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
			if successes%2 == 0 && retries%2 == 0 {
				p.Failed(errDown, 0)
			} else {
				p.OK()
				successes++
			}
			if err := g.Retry(t.Context()); err != nil { // each is tried again: the worst there may be
				t.Fatal(err)
			}
			retries++
		}
		if limit := 40 + 4*60 + successes/4; retries > limit+1 {
			t.Errorf("%d retries after %d successes in a minute; want at most %d", retries, successes, limit)
		}
	})
}

func TestAProbeThatIsGivenUpMakesRoomForTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := source.NewGuard(source.GuardConfig{Failures: 1, Pause: time.Second})
		enter := func() source.Pass {
			p, err := g.Enter(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		enter().Failed(errDown, 3*time.Second)
		start := time.Now()
		probe := enter()
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("the probe went after %v; the store wanted 3s", d)
		}
		next := make(chan source.Pass)
		go func() { next <- enter() }()
		synctest.Wait()
		probe.Canceled()
		p := <-next
		waiting, stop := context.WithCancel(t.Context())
		stop()
		if _, err := g.Enter(waiting); !errors.Is(err, context.Canceled) {
			t.Errorf("while it is probed: %v", err)
		}
		p.OK()
		enter().OK()
	})
}
