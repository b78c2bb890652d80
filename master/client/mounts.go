package client

import (
	"context"
	"errors"
	"time"

	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/record"
)

// FollowMounts calls push with the mount table, and again after each change, until ctx ends. A master
// that is away is asked again, or the next one; it is logged, once. What a master tells that never
// had a table is not pushed: it has lost it, and is given what restore returns, unless that has no ID.
func (c *Client) FollowMounts(ctx context.Context, restore func() Table, push func(Table)) {
	lost := false
	for ctx.Err() == nil {
		err := c.followMounts(ctx, restore, func(t Table) {
			if lost {
				c.log.Info("the master tells of mounts again")
			}
			lost = false
			push(t)
		})
		if ctx.Err() != nil {
			return
		}
		if !lost {
			c.log.Warn("the master does not tell of changes of the mount table; the last one known goes on", "err", err)
		}
		lost = true
		if !sleep(ctx, pause(0, 0, err)) {
			return
		}
	}
}

// followMounts is one stream of one master.
func (c *Client) followMounts(ctx context.Context, restore func() Table, push func(Table)) (err error) {
	i := c.current.Load()
	defer func() {
		if errors.Is(err, ErrUnavailable) {
			c.current.CompareAndSwap(i, (i+1)%int64(len(c.masters)))
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	slow := time.AfterFunc(c.timeout, cancel) // for the first answer
	defer slow.Stop()
	stream, err := c.masters[i].FollowMounts(ctx, &masterpb.FollowMountsRequest{})
	if err != nil {
		return masterpb.FromStatus(err)
	}
	for {
		x, err := stream.Recv()
		slow.Stop()
		if err != nil {
			return masterpb.FromStatus(err)
		}
		t := x.Record()
		if t.ID != "" {
			push(t)
			continue
		}
		if had := restore(); had.ID != "" {
			_, err := do(ctx, c, masterpb.MasterClient.RestoreMounts, masterpb.FromTable(had))
			if err != nil && !errors.Is(err, record.ErrRefused) { // another worker was first
				return err
			}
			continue
		}
		push(t)
	}
}
