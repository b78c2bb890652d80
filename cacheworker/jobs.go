package cacheworker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/larderfs/larder/cacheworker/dataset"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
)

const (
	jobsAtOnce  = 2
	filesAtOnce = 16               // of a job; their bytes come at low priority
	filesAhead  = 256              // listed and not done
	reportEvery = 2 * time.Second  // the master writes each report to its disk
	askAgain    = 2 * time.Second  // while the master is away
	tryAgain    = 30 * time.Second // at most, while a store is away
	triesMost   = 8                // of a file
	fillMost    = 90               // percent of the cache that a job may load
)

// jobs does this node's part of the master's jobs. What is done is told with the key up to which all is, so that
// the next worker goes on from there.
type jobs struct {
	w      *Worker
	master *client.Client
	slots  chan struct{}

	mu      sync.Mutex // guards running
	running map[string]context.CancelCauseFunc
}

var (
	errCanceled = errors.New("canceled")
	errNoVolume = errors.New("no volume that is published on this node has it")
)

// workForMaster asks the master for work until ctx ends, and does it.
func (w *Worker) workForMaster(ctx context.Context) error {
	if w.cfg.Master == "" || w.cfg.Alone != nil {
		return nil
	}
	c, err := client.New(client.Config{Target: w.cfg.Master, Log: w.log})
	if err != nil {
		return err
	}
	defer c.Close()
	j := &jobs{w: w, master: c, slots: make(chan struct{}, jobsAtOnce), running: map[string]context.CancelCauseFunc{}}
	var doing sync.WaitGroup
	defer doing.Wait()
	for w.mounts.ready(ctx) != nil && ctx.Err() == nil { // before, this node seems to have no volume of anything
		sleep(ctx, redial)
	}
	for seen := int64(0); ctx.Err() == nil; {
		todo, revision, err := c.Work(ctx, w.identity(), seen)
		if seen = revision; err != nil {
			seen = 0
			sleep(ctx, askAgain)
			continue
		}
		for _, job := range todo {
			if jctx := j.begin(ctx, job); jctx != nil {
				doing.Go(func() { j.do(ctx, jctx, job) })
			}
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// identity is what the master knows this worker by.
func (w *Worker) identity() client.Registration {
	return client.Registration{UUID: w.store.UUID().String(), Node: w.cfg.Node, Key: w.network.key}
}

// begin returns a context for a job that is not being done, nil for others. One that is canceled ends.
func (j *jobs) begin(ctx context.Context, job client.Job) context.Context {
	j.mu.Lock()
	defer j.mu.Unlock()
	cancel := j.running[job.ID]
	known := cancel != nil
	if !known {
		ctx, cancel = context.WithCancelCause(ctx)
		j.running[job.ID] = cancel
	}
	if job.Canceled {
		cancel(errCanceled)
	}
	if known {
		return nil
	}
	return ctx
}

func (j *jobs) end(id string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.running[id](nil)
	delete(j.running, id)
}

// do does a job and tells the master how it ended, while this worker lives.
func (j *jobs) do(life, ctx context.Context, job client.Job) {
	defer j.end(job.ID)
	p := &progress{node: job.Nodes[0]}
	err := j.inTurn(ctx, job, p)
	if life.Err() != nil {
		return // the next worker goes on
	}
	if context.Cause(ctx) != nil {
		err = errCanceled
	}
	p.conclude(job, err)
	for life.Err() == nil {
		_, err := j.master.ReportJob(life, j.w.identity(), job.ID, p.now())
		if err == nil || errors.Is(err, client.ErrNotFound) { // forgotten, or this worker is: it will ask again
			return
		}
		sleep(life, askAgain)
	}
}

// inTurn waits for a slot, and reports while the job is being done.
func (j *jobs) inTurn(ctx context.Context, job client.Job, p *progress) error {
	select {
	case j.slots <- struct{}{}:
		defer func() { <-j.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.start()
	done := make(chan struct{})
	var reporting sync.WaitGroup
	defer reporting.Wait()
	defer close(done)
	reporting.Go(func() { j.report(ctx, job.ID, p, done) })
	switch job.Kind {
	case record.Free:
		return j.eachCached(ctx, job, p, j.w.store.Evict)
	case record.Unpin:
		return j.eachCached(ctx, job, p, j.w.store.Unpin)
	case record.Load, record.Pin:
		return j.load(ctx, job, p)
	}
	return fmt.Errorf("this worker (%s) knows no job %q", j.w.cfg.Version, job.Kind)
}

func (j *jobs) report(ctx context.Context, id string, p *progress, done <-chan struct{}) {
	t := time.NewTicker(reportEvery)
	defer t.Stop()
	for {
		canceled, err := j.master.ReportJob(ctx, j.w.identity(), id, p.now())
		if err == nil && canceled {
			j.mu.Lock()
			j.running[id](errCanceled)
			j.mu.Unlock()
		}
		select {
		case <-t.C:
		case <-done:
			return
		case <-ctx.Done():
			return
		}
	}
}

// progress is how far a job is.
type progress struct {
	mu   sync.Mutex // guards node
	node client.JobNode
}

func (p *progress) now() client.JobNode {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.node
}

func (p *progress) change(f func(*client.JobNode)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.node)
}

func (p *progress) start() {
	p.change(func(n *client.JobNode) {
		n.State = record.JobRunning
		if n.Started.IsZero() {
			n.Started = time.Now().UTC()
		}
	})
}

func (p *progress) conclude(job client.Job, err error) {
	p.change(func(n *client.JobNode) {
		switch {
		case errors.Is(err, errCanceled):
			n.State = record.JobCanceled
		case errors.Is(err, errNoVolume) && !job.Named:
			n.State = record.JobSkipped
		case err != nil:
			n.State, n.Error = record.JobFailed, cut(err.Error())
		case n.FailedFiles > 0:
			n.State = record.JobFailed
		default:
			n.State, n.URI, n.After = record.JobDone, 0, ""
		}
	})
}

func cut(text string) string { return text[:min(len(text), 1000)] }

// place is where a job's URI lies in a volume.
type place struct {
	part   dataset.Part
	prefix string // "" or ending in "/": all below is wanted
	key    string // of an object that is wanted, too; "" for none
}

// mounted are the parts of the namespace that this worker can read with the mounts' own credentials.
func (j *jobs) mounted(m *meter) []dataset.Part {
	v, err := j.w.browser(m)
	if err != nil {
		j.w.log.Warn("jobs go without what is mounted", "err", err)
		return nil
	}
	return v.dataset().Parts()
}

// places are those of a location in parts of datasets, none of them in another one; of the same the first counts.
func places(at record.Location, parts []dataset.Part) ([]place, error) {
	host, err := hostOf(at)
	if err != nil {
		return nil, err
	}
	var all []place
	for _, part := range parts {
		key, ok := keyAt(at, host, string(part.Store))
		if !ok {
			continue
		}
		folder := key
		if key != "" {
			folder += "/"
		}
		switch root := part.Prefix; {
		case strings.HasPrefix(folder, root) && folder != root && !at.Below:
			all = append(all, place{part, folder, key})
		case strings.HasPrefix(folder, root):
			all = append(all, place{part, folder, ""})
		case strings.HasPrefix(root, folder):
			all = append(all, place{part, root, ""})
		}
	}
	slices.SortStableFunc(all, func(a, b place) int {
		return cmp.Or(cmp.Compare(a.part.Store, b.part.Store), cmp.Compare(a.prefix, b.prefix), -cmp.Compare(a.key, b.key))
	})
	return slices.CompactFunc(all, func(a, b place) bool {
		return a.part.Store == b.part.Store && strings.HasPrefix(b.prefix, a.prefix)
	}), nil
}

// load caches what lies at the job's URIs.
func (j *jobs) load(ctx context.Context, job client.Job, p *progress) error {
	n := p.now()
	var found []string
	m := j.w.accounts.open(claim{})
	defer m.close()
	parts := j.w.mounts.parts()
	if job.Named {
		parts = append(parts, j.mounted(m)...)
	}
	for i, uri := range job.URIs {
		at, err := record.ParseLocation(uri, job.Endpoint)
		if err != nil {
			return err
		}
		ps, err := places(at, parts)
		if err != nil {
			return err
		}
		if len(ps) > 0 {
			found = append(found, uri)
		}
		if len(ps) > 1 && i == n.URI && n.After != "" { // the key says not in which of them
			n.After = ""
		}
		if len(ps) == 0 && job.Named {
			return fmt.Errorf("%s: %w, and no mount with a credential that this node has: publish one there, or leave the node out", uri, errNoVolume)
		}
		if i < n.URI {
			continue
		}
		for _, at := range ps {
			if err := j.loadPlace(ctx, at, n.After, job.Kind == record.Pin, p); err != nil {
				return fmt.Errorf("%s: %w", uri, err)
			}
		}
		n.After = ""
		p.change(func(n *client.JobNode) { n.URI, n.After = i+1, "" })
	}
	if len(found) == 0 {
		return errNoVolume
	}
	return nil
}

// wanted is a file to be cached.
type wanted struct {
	obj     object.Object
	done    chan struct{} // closed with the fields below set
	present bool
	err     error
}

// loadPlace lists a place and caches its files, some at once; they are counted in order.
func (j *jobs) loadPlace(ctx context.Context, at place, after string, pin bool, p *progress) error {
	order := make(chan *wanted, filesAhead)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		for f := range order {
			select {
			case <-f.done:
				p.count(f)
			case <-gctx.Done():
				return context.Cause(gctx)
			}
		}
		return nil
	})
	g.Go(func() error {
		defer close(order)
		var loading errgroup.Group
		loading.SetLimit(filesAtOnce)
		defer loading.Wait()
		room := j.w.store.Stats().CapacityBytes / 100 * fillMost
		taken := p.now().Bytes
		return at.each(gctx, after, func(obj object.Object) error {
			if taken += obj.Size; taken > room {
				return fmt.Errorf("more than %d %% of this node's cache (%d bytes): a larger one would keep it", fillMost, room)
			}
			f := &wanted{obj: obj, done: make(chan struct{})}
			select {
			case order <- f:
			case <-gctx.Done():
				return context.Cause(gctx)
			}
			loading.Go(func() error {
				defer close(f.done)
				f.present, f.err = j.loadFile(gctx, at.part, obj, pin)
				return nil
			})
			return nil
		})
	})
	return g.Wait()
}

// each calls f with the place's objects behind a key, in order.
func (at place) each(ctx context.Context, after string, f func(object.Object) error) error {
	if at.key != "" && after == "" {
		switch obj, err := at.part.Head(ctx, at.key); {
		case err == nil:
			if err := f(obj); err != nil {
				return err
			}
		case !errors.Is(err, object.ErrNotFound):
			return err
		}
	}
	if !strings.HasPrefix(after, at.prefix) { // it was the object's key
		after = ""
	}
	return at.part.Walk(ctx, at.prefix, after, f)
}

// loadFile caches an object, and pins it if it is to be: the latest version of it, and one that has gone is none.
func (j *jobs) loadFile(ctx context.Context, part dataset.Part, obj object.Object, pin bool) (present bool, err error) {
	pause := tryAgain >> (triesMost - 2)
	for try := 1; ; try++ {
		present, err = part.Load(ctx, obj)
		if err == nil && pin && obj.Size > 0 {
			err = j.w.store.Pin(ctx, obj.ID())
		}
		if errors.Is(err, object.ErrChanged) {
			obj, err = part.Head(ctx, obj.Key)
			if err == nil && try < triesMost {
				continue
			}
		}
		switch {
		case errors.Is(err, object.ErrNotFound):
			return false, nil
		case err == nil, try == triesMost, ctx.Err() != nil, !errors.Is(err, object.ErrUnavailable) && !errors.Is(err, object.ErrBusy):
			return present, err
		}
		sleep(ctx, pause)
		pause = min(2*pause, tryAgain)
	}
}

func (p *progress) count(f *wanted) {
	p.change(func(n *client.JobNode) {
		n.After = f.obj.Key
		switch {
		case f.err != nil:
			n.FailedFiles++
			n.Error = cmp.Or(n.Error, cut(f.err.Error()))
			return
		case f.present:
			n.PresentFiles++
		}
		n.Files++
		n.Bytes += f.obj.Size
	})
}

// eachCached does something to what is cached of the job's URIs, and counts what it was done to.
func (j *jobs) eachCached(ctx context.Context, job client.Job, p *progress, do func(object.ID) bool) error {
	for _, uri := range job.URIs {
		at, err := record.ParseLocation(uri, job.Endpoint)
		if err != nil {
			return err
		}
		host, err := hostOf(at)
		if err != nil {
			return err
		}
		ids, err := j.w.store.IDs(ctx, func(o object.Store) func([]byte) bool { return keysAt(at, host, string(o)) })
		if err != nil {
			return err
		}
		for _, id := range ids {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			had, tail := j.w.store.Peek(id), j.w.store.TailBytes(id)
			if !do(id) {
				continue
			}
			p.change(func(n *client.JobNode) {
				if n.Bytes += had.PresentBytes; job.Kind == record.Free {
					n.Bytes += tail
				}
				if had.Exists { // else there was but the tail
					n.Files++
				}
			})
		}
	}
	return nil
}
