package main

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/larderfs/larder/sanity/stack"
)

// churn makes mount calls all the time: a further volume is provisioned, staged, published,
// read, and taken back, in the order of Kubernetes. A call that fails is repeated, as the
// kubelet does: the broker may have died under it.
type churn struct {
	node  *node
	fleet *fleet
	in    stack.PublishInput
	files []file // which it reads

	mu     sync.Mutex // guards the fields below
	busy   int64      // when the call under way began; 0 while there is none
	staged string     // id of the volume between two calls, for which broker and worker answer
	rounds int
	calls  int
	again  int // calls that failed and were repeated
}

// patience is how long a call may fail.
const patience = 30 * time.Second

func (c *churn) run(ctx context.Context) error {
	for i := 0; ctx.Err() == nil; i++ {
		if err := c.round(ctx, i); err != nil && ctx.Err() == nil {
			c.fleet.fail(err.Error())
		}
		pause(ctx, 20*time.Millisecond)
	}
	return nil
}

// round is the life of one volume. Once it is there it is taken back, whatever happens.
func (c *churn) round(ctx context.Context, i int) error {
	in := c.in
	in.Name = fmt.Sprintf("churn-%d", i)
	var v *stack.Volume
	err := c.call(ctx, "CreateVolume", false, func(ctx context.Context) (err error) {
		v, err = c.node.CreateVolume(ctx, in)
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*patience)
		defer cancel()
		if err := c.takeBack(ctx, v); err != nil {
			c.fleet.fail(err.Error())
		}
	}()
	var target string
	err = c.call(ctx, "Stage", true, func(ctx context.Context) error { return c.node.Stage(ctx, v) })
	if err == nil {
		c.set(v.ID)
		err = c.call(ctx, "Publish", true, func(ctx context.Context) (err error) {
			target, err = c.node.PublishPod(ctx, v, "pod")
			return err
		})
	}
	if err != nil {
		return err
	}
	return c.read(ctx, filepath.Join(target, "data"), uint64(i))
}

func (c *churn) takeBack(ctx context.Context, v *stack.Volume) error {
	for _, target := range append([]string{}, v.Targets...) {
		err := c.call(ctx, "Unpublish", true, func(ctx context.Context) error { return c.node.UnpublishPod(ctx, v, target) })
		if err != nil {
			return err
		}
	}
	c.set("")
	err := c.call(ctx, "Unstage", true, func(ctx context.Context) error { return c.unstage(ctx, v) })
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.rounds++
	c.mu.Unlock()
	return c.call(ctx, "DeleteVolume", false, func(ctx context.Context) error { return c.node.DeleteVolume(ctx, v) })
}

// unstage keeps in mind where the volume is staged until the call has succeeded.
func (c *churn) unstage(ctx context.Context, v *stack.Volume) error {
	staging := v.Staging
	err := c.node.Unstage(ctx, v)
	if err != nil {
		v.Staging = staging
	}
	return err
}

func (c *churn) read(ctx context.Context, root string, seed uint64) error {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	m, err := c.fleet.start(ctx, task{Way: "once", Root: root, Files: c.files, Seed: seed})
	if err != nil {
		return err
	}
	defer c.fleet.done(m)
	select {
	case <-m.ended:
		return nil // its errors are known
	case <-time.After(patience):
	}
	err = fmt.Errorf("a reader of the further volume %s hangs\n%s", c.volume(), stacks(m.cmd.Process.Pid))
	m.closing.Store(true)
	cancel()
	<-m.ended
	return err
}

func (c *churn) set(staged string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.staged = staged
}

// volume is the id of the further volume, if it is between two calls.
func (c *churn) volume() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.staged
}

// underWay reports whether a mount call has begun and not ended.
func (c *churn) underWay() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.busy != 0
}

// call repeats a call until it succeeds. mounts says that the broker takes part in it.
func (c *churn) call(ctx context.Context, name string, mounts bool, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for tries := 1; ; tries++ {
		begin := now()
		if mounts {
			c.note(begin)
		}
		err := do(ctx)
		if mounts {
			c.note(0)
			c.fleet.called(begin, now())
		}
		c.mu.Lock()
		c.calls++
		if err != nil {
			c.again++
		}
		c.mu.Unlock()
		if err == nil {
			return nil
		}
		if !pause(ctx, 50*time.Millisecond) {
			return fmt.Errorf("%s fails for %v, %d times: %w", name, patience, tries, err)
		}
	}
}

func (c *churn) note(begin int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy = begin
}
