package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

// killer kills worker and broker in turn. Never both before the survivor has handed over: that
// no mount could survive.
type killer struct {
	node   *node
	fleet  *fleet
	churn  *churn
	memory *memory // nil where there is none
	rng    *rand.Rand
	stable []string // volumes that are mounted all the time

	takeovers map[string]int   // of the stable volumes, before the last kill
	since     map[string]int64 // when a part was back the last time
	kills     []*kill
	stops     int // SIGSTOP and SIGCONT without a kill between
	starved   int // kills by the kernel for want of memory
	beside    int // kills of the master and the controller, at any time
}

// ways to kill, by weight.
var deaths = map[string][]struct {
	how    string
	weight int
	do     func(*killer, context.Context, string) error
}{
	workerPart: {
		{"kill", 12, (*killer).kill},
		{"stopped", 3, (*killer).killStopped},
		{"again", 3, (*killer).killAgain},
		{"other stopped", 3, (*killer).killBesideStopped},
		{"oom", 2, (*killer).starve},
		{"stop", 2, (*killer).stop},
	},
	brokerPart: {
		{"kill", 6, (*killer).kill},
		{"mounting", 8, (*killer).killMounting},
		{"stopped", 3, (*killer).killStopped},
		{"again", 3, (*killer).killAgain},
		{"other stopped", 3, (*killer).killBesideStopped},
		{"stop", 2, (*killer).stop},
	},
}

// counted are the kills of a part that count.
func (k *killer) counted(part string) (n int) {
	for _, d := range k.kills {
		if d.Target == part && d.Counted {
			n++
		}
	}
	return n
}

// round kills a part once, or twice in a row, in some way, and waits until all is as before.
func (k *killer) round(ctx context.Context, part string) error {
	pause(ctx, time.Duration(k.since[part]+int64(settled)-now()))
	ways := deaths[part]
	total := 0
	for _, w := range ways {
		total += w.weight
	}
	i, pick := 0, k.rng.IntN(total)
	for pick -= ways[0].weight; pick >= 0; pick -= ways[i].weight {
		i++
	}
	return k.do(ctx, part, ways[i].how, ways[i].do)
}

// settled is how long a part lives at least before it is killed (but for killAgain): what dies
// more often is started again after longer and longer waits, as it should.
const settled = 1100 * time.Millisecond

// do is round for a way that is chosen.
func (k *killer) do(ctx context.Context, part, how string, do func(*killer, context.Context, string) error) error {
	before := len(k.kills)
	if err := k.countTakeovers(ctx); err != nil {
		return err
	}
	if err := do(k, ctx, part); err != nil {
		return fmt.Errorf("%s, %s: %w", part, how, err)
	}
	dead := k.kills[before:]
	if err := k.awaitBack(ctx, part, len(dead)); err != nil {
		return fmt.Errorf("%s, %s: %w", part, how, err)
	}
	back := now()
	k.since[part] = back
	for _, d := range dead {
		d.How, d.Back = how, back
	}
	err := eventually(ctx, "what the readers began before ends", func() bool { return k.fleet.caughtUp(back) })
	k.fleet.evaluate(dead...)
	pause(ctx, time.Duration(k.rng.IntN(150))*time.Millisecond)
	return err
}

// countTakeovers notes how many there were before a kill. The broker has to live.
func (k *killer) countTakeovers(ctx context.Context) error {
	mounts, err := k.node.mounts(ctx)
	if err != nil {
		return fmt.Errorf("ask the broker: %w", err)
	}
	for _, id := range k.stable {
		k.takeovers[id] = mounts[id].Takeovers
	}
	return nil
}

// awaitBack waits until broker and worker hold every mount, and the worker answers it.
func (k *killer) awaitBack(ctx context.Context, part string, deaths int) error {
	var lacks string
	err := eventually(ctx, "every mount is held and served", func() bool {
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		mounts, err := k.node.mounts(call)
		if err != nil {
			lacks = err.Error()
			return false
		}
		for _, m := range mounts {
			if !m.Served {
				lacks = m.VolumeID + " is not served"
				return false
			}
		}
		for _, id := range k.stable {
			m, ok := mounts[id]
			if !ok || part == workerPart && deaths > 0 && m.Takeovers <= k.takeovers[id] {
				lacks = id + " is not back"
				return false
			}
		}
		if id := k.churn.volume(); id != "" && mounts[id].VolumeID == "" && id == k.churn.volume() {
			lacks = id + " is not held"
			return false
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("%w: %s", err, lacks)
	}
	return nil
}

// moment waits for one, at random, at which a kill counts.
func (k *killer) moment(ctx context.Context, part string) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	pause(ctx, time.Duration(k.rng.IntN(20_000))*time.Microsecond)
	for ctx.Err() == nil {
		if part == workerPart && k.fleet.inFlight() || part == brokerPart && (k.fleet.held() > 0 || k.churn.underWay()) {
			return
		}
		pause(ctx, 50*time.Microsecond) // many an operation takes no longer than that
	}
}

func (k *killer) kill(ctx context.Context, part string) error {
	p, err := k.node.find(ctx, part, 0)
	if err != nil {
		return err
	}
	defer p.close()
	k.moment(ctx, part)
	return k.end(ctx, part, p)
}

// end kills a process and notes it.
func (k *killer) end(ctx context.Context, part string, p process) error {
	d, err := k.strike(part, p)
	if err != nil {
		return err
	}
	return k.bury(ctx, p, d)
}

func (k *killer) strike(part string, p process) (*kill, error) {
	d := &kill{Target: part, Held: k.fleet.held() > 0, At: now()}
	if err := p.signal(unix.SIGKILL); err != nil {
		return nil, fmt.Errorf("kill %s: %w", part, err)
	}
	k.kills = append(k.kills, d)
	return d, nil
}

func (k *killer) bury(ctx context.Context, p process, d *kill) error {
	err := p.awaitEnd(ctx)
	d.Dead = now()
	return err
}

// killMounting kills the broker while a mount call is under way.
func (k *killer) killMounting(ctx context.Context, part string) error {
	p, err := k.node.find(ctx, part, 0)
	if err != nil {
		return err
	}
	defer p.close()
	wait, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	eventually(wait, "", func() bool { return !k.churn.underWay() })
	eventually(wait, "", k.churn.underWay)
	pause(wait, time.Duration(k.rng.IntN(20_000))*time.Microsecond)
	return k.end(ctx, part, p)
}

// killAgain kills, and kills the successor while it starts.
func (k *killer) killAgain(ctx context.Context, part string) error {
	p, err := k.node.find(ctx, part, 0)
	if err != nil {
		return err
	}
	defer p.close()
	k.moment(ctx, part)
	if err := k.end(ctx, part, p); err != nil {
		return err
	}
	next, err := k.node.find(ctx, part, p.pid)
	if err != nil {
		return err
	}
	defer next.close()
	pause(ctx, time.Duration(k.rng.IntN(120))*time.Millisecond)
	if part == brokerPart {
		return k.end(ctx, part, next)
	}
	from := now()
	if err := next.signal(unix.SIGSTOP); err != nil { // so that it takes over nothing more
		return err
	}
	err = k.countTakeovers(ctx)
	k.fleet.stopped(from, now())
	return errors.Join(err, k.end(ctx, part, next))
}

// whileStopped does something while a process is stopped.
func (k *killer) whileStopped(ctx context.Context, p process, do func() error) error {
	from := now()
	if err := p.signal(unix.SIGSTOP); err != nil {
		return err
	}
	err := do()
	pause(ctx, time.Duration(20+k.rng.IntN(300))*time.Millisecond)
	if cerr := p.signal(unix.SIGCONT); cerr != nil && !errors.Is(cerr, unix.ESRCH) {
		err = errors.Join(err, cerr)
	}
	k.fleet.stopped(from, now())
	return err
}

// stop stops a process for a while.
func (k *killer) stop(ctx context.Context, part string) error {
	p, err := k.node.find(ctx, part, 0)
	if err != nil {
		return err
	}
	defer p.close()
	k.moment(ctx, part)
	k.stops++
	return k.whileStopped(ctx, p, func() error { return nil })
}

// killStopped kills a process that was stopped for a while.
func (k *killer) killStopped(ctx context.Context, part string) error {
	p, err := k.node.find(ctx, part, 0)
	if err != nil {
		return err
	}
	defer p.close()
	k.moment(ctx, part)
	from := now()
	if err := p.signal(unix.SIGSTOP); err != nil {
		return err
	}
	pause(ctx, time.Duration(20+k.rng.IntN(300))*time.Millisecond)
	k.fleet.stopped(from, now())
	return k.end(ctx, part, p)
}

// killBesideStopped kills a process while the other one is stopped: the hand-over has to wait. So may the
// end of a broker that has just asked something of a mount whose worker is stopped.
func (k *killer) killBesideStopped(ctx context.Context, part string) error {
	p, err := k.node.find(ctx, part, 0)
	if err != nil {
		return err
	}
	defer p.close()
	other, err := k.node.find(ctx, map[string]string{workerPart: brokerPart, brokerPart: workerPart}[part], 0)
	if err != nil {
		return err
	}
	defer other.close()
	k.moment(ctx, part)
	var d *kill
	err = k.whileStopped(ctx, other, func() (err error) {
		d, err = k.strike(part, p)
		return err
	})
	if err != nil {
		return err
	}
	return k.bury(ctx, p, d)
}

// starve has the kernel kill the worker for want of memory.
func (k *killer) starve(ctx context.Context, part string) error {
	if k.memory == nil {
		return k.kill(ctx, part)
	}
	p, err := k.node.find(ctx, part, 0)
	if err != nil {
		return err
	}
	defer p.close()
	k.moment(ctx, part)
	d := &kill{Target: part, Held: k.fleet.held() > 0, At: now()}
	killed, err := k.memory.starve(ctx, p)
	if err != nil {
		return err
	}
	if !killed {
		return k.end(ctx, part, p)
	}
	k.starved++
	d.At = now() // the kernel's signal came a moment ago; what was asked before is in flight
	d.Dead = d.At
	k.kills = append(k.kills, d)
	return nil
}

// others kills, now and then, what no reader needs, where it is a process of its own.
func (k *killer) others(ctx context.Context, apart bool) error {
	if !apart || k.rng.IntN(3) > 0 {
		return nil
	}
	return k.beat(ctx, []string{masterPart, masterPart, controllerPart}[k.rng.IntN(3)])
}

// beat kills a part that no reader needs, and waits until it is there again.
func (k *killer) beat(ctx context.Context, part string) error {
	p, err := k.node.find(ctx, part, 0)
	if err != nil {
		return err
	}
	defer p.close()
	k.beside++
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	next, err := k.node.find(ctx, part, p.pid)
	if err == nil {
		next.close()
	}
	return err
}

// both is what no mount survives: for the test that the readers would notice.
func (k *killer) both(ctx context.Context) error {
	w, err := k.node.find(ctx, workerPart, 0)
	if err != nil {
		return err
	}
	defer w.close()
	b, err := k.node.find(ctx, brokerPart, 0)
	if err != nil {
		return err
	}
	defer b.close()
	if err := b.signal(unix.SIGSTOP); err != nil { // or it might hand over before it is killed
		return err
	}
	return errors.Join(w.signal(unix.SIGKILL), b.signal(unix.SIGKILL))
}

// eventually asks until it is so, or ctx or a minute ends.
func eventually(ctx context.Context, what string, so func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, hangs)
	defer cancel()
	for !so() {
		if !pause(ctx, time.Millisecond) {
			return fmt.Errorf("waited in vain until %s: %w", what, context.Cause(ctx))
		}
	}
	return nil
}

// pause returns false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
