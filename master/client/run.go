package client

import (
	"context"
	"math/rand/v2"
	"reflect"
	"time"

	"github.com/larderfs/larder/master/masterpb"
)

// Report is all that a worker tells the master.
type Report struct {
	Registration // told when it changes, and when the master does not know the worker
	Beat         // told each time
}

// retryPause bounds the time between reports while the master is away: it is soon told when it is back.
const retryPause = 2 * time.Second

// Run keeps the worker registered until ctx ends: it registers, sends a heartbeat every
// interval (0 means a third of the lease) or when Config.Changed says so, and registers again when the report's Registration
// changes or the master has forgotten it. A master that is away is logged, once, and is no
// error: Run returns nil when ctx ends. The report is asked for from this goroutine only, and
// what it returned is not changed afterwards.
func (c *Client) Run(ctx context.Context, report func() Report, interval time.Duration) error {
	var told *Registration // what the master knows; nil for nothing
	lost := false
	var lease time.Duration
	for {
		r := report()
		got, err := c.tell(ctx, r, &told)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			lease = got
		}
		if (err != nil) != lost {
			lost = err != nil
			if lost {
				c.log.Warn("master does not answer", "err", err)
			} else {
				c.log.Info("registered with master", "node", r.Node, "lease", lease)
			}
		}
		if !c.wait(ctx, pause(interval, lease, err)) {
			return nil
		}
	}
}

// together is how long changes are waited for that come in a row: a report is all of them.
const together = 100 * time.Millisecond

// wait waits for d, or for a change of the report.
func (c *Client) wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-c.changed:
		return sleep(ctx, min(d, together))
	case <-ctx.Done():
		return false
	}
}

// pause is the time until the next report, with jitter, so that a thousand workers do not beat at once.
func pause(interval, lease time.Duration, err error) time.Duration {
	d := interval
	if d <= 0 {
		d = lease / 3
	}
	if d <= 0 || err != nil && d > retryPause {
		d = retryPause
	}
	return d - time.Duration(rand.Int64N(int64(d)/10+1))
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// tell sends one report: a heartbeat, or a registration where that is needed.
func (c *Client) tell(ctx context.Context, r Report, told **Registration) (lease time.Duration, err error) {
	if *told != nil && reflect.DeepEqual(**told, r.Registration) {
		stats, holdings := masterpb.FromBeat(r.Beat)
		resp, err := do(ctx, c, masterpb.MasterClient.Heartbeat, &masterpb.HeartbeatRequest{Uuid: r.UUID, Node: r.Node, Key: r.Key, Stats: stats, Holdings: holdings})
		if err != nil || !resp.GetUnknown() {
			return time.Duration(resp.GetLeaseMillis()) * time.Millisecond, err
		}
		c.log.Info("master has forgotten this worker", "node", r.Node)
	}
	*told = nil
	resp, err := do(ctx, c, masterpb.MasterClient.RegisterWorker, &masterpb.RegisterWorkerRequest{Worker: masterpb.FromRegistration(r.Registration), Key: r.Key})
	if err == nil {
		*told = &r.Registration
	}
	return time.Duration(resp.GetLeaseMillis()) * time.Millisecond, err
}
