package registry

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/larderfs/larder/master/record"
)

const (
	jobsKept = 7 * 24 * time.Hour // from their creation
	atOnce   = 100                // operations of a transaction; etcd takes 128
	workWait = 5 * time.Second    // that a question for work waits for news
)

// CreateJob makes a job for the nodes that are named, or for all whose worker is alive. It is there as a
// whole, or not at all.
func (r *Registry) CreateJob(ctx context.Context, spec record.JobSpec) (record.Job, error) {
	if err := spec.Validate(); err != nil {
		return record.Job{}, err
	}
	id := string(spec.Kind) + "-" + strings.ToLower(rand.Text()[:10])
	if spec.Object != "" {
		id = record.JobOf(spec.Kind, spec.Object)
	}
	nodes, err := r.jobNodes(ctx, spec)
	if err != nil {
		return record.Job{}, err
	}
	j := record.Job{
		ID: id, Kind: spec.Kind, URIs: spec.URIs, Endpoint: spec.Endpoint,
		Named: spec.All || len(spec.Nodes) > 0, Object: spec.Object, Created: time.Now().UTC(), Targets: nodes,
	}
	lease, err := r.kv.Grant(ctx, int64(jobsKept/time.Second))
	if err != nil {
		return record.Job{}, unavailable("create job", err)
	}
	with := clientv3.WithLease(lease.ID)
	var ops, more []clientv3.Op
	for _, n := range nodes {
		w := record.JobNode{Node: n, State: record.JobWaiting}
		j.Nodes = append(j.Nodes, w)
		ops, more = append(ops, clientv3.OpPut(r.workKey(n, j.ID), encode(w), with)), append(more, clientv3.OpPut(r.key(news, n), j.ID))
	}
	ops = append(ops, clientv3.OpPut(r.key(jobs, j.ID), encode(j), with)) // last: without it the others say nothing
	if spec.Object != "" {
		return j, r.putOnce(ctx, append(ops, more...))
	}
	for page := range slices.Chunk(append(ops, more...), atOnce) {
		if _, err := r.kv.Txn(ctx).Then(page...).Commit(); err != nil {
			return record.Job{}, unavailable("create job", err)
		}
	}
	r.log.Info("job created", "job", j.ID, "uris", len(j.URIs), "nodes", len(nodes))
	return j, nil
}

// putOnce puts what is not there yet: of the same job that another master makes workers may have begun to report.
func (r *Registry) putOnce(ctx context.Context, ops []clientv3.Op) error {
	for _, op := range ops {
		txn := r.kv.Txn(ctx)
		if key := string(op.KeyBytes()); !strings.HasPrefix(key, r.key(news, "")) {
			txn = txn.If(unchanged(key, nil))
		}
		if _, err := txn.Then(op).Commit(); err != nil {
			return unavailable("create job", err)
		}
	}
	return nil
}

// jobNodes checks the names, or returns all nodes if there are none. A drained node gets no job that brings it something.
func (r *Registry) jobNodes(ctx context.Context, spec record.JobSpec) ([]string, error) {
	ws, err := r.kept(ctx, workers)
	if err != nil {
		return nil, err
	}
	var alive []string
	for _, w := range ws {
		alive = append(alive, w.Node)
	}
	if len(alive) == 0 {
		return nil, fmt.Errorf("%w: no worker is alive: nobody could do the job", record.ErrUnavailable)
	}
	drains := map[string]drain{}
	if spec.Kind == record.Load || spec.Kind == record.Pin {
		if drains, err = r.drains(ctx); err != nil {
			return nil, err
		}
	}
	named := slices.Compact(slices.Sorted(slices.Values(spec.Nodes)))
	for _, n := range named {
		_, is := drains[n]
		switch {
		case !slices.Contains(alive, n):
			return nil, fmt.Errorf("%w: node %q has no worker that is alive; `larder worker ls` lists them", record.ErrNotFound, n)
		case is:
			return nil, fmt.Errorf("%w: node %q is drained: `larder worker undrain %s` first, or leave it out", record.ErrRefused, n, n)
		}
	}
	if len(named) > 0 {
		return named, nil
	}
	able := slices.DeleteFunc(alive, func(n string) bool { _, is := drains[n]; return is })
	if len(able) == 0 {
		return nil, fmt.Errorf("%w: all nodes with a worker are drained; `larder worker ls` lists them", record.ErrRefused)
	}
	return able, nil
}

func (r *Registry) workKey(node, id string) string { return r.key(work, node+"/"+id) }

// Jobs returns all jobs, the latest first.
func (r *Registry) Jobs(ctx context.Context) ([]record.Job, error) {
	resp, err := r.kv.Txn(ctx).Then(
		clientv3.OpGet(r.key(jobs, ""), clientv3.WithPrefix()),
		clientv3.OpGet(r.key(work, ""), clientv3.WithPrefix()),
	).Commit()
	if err != nil {
		return nil, unavailable("list jobs", err)
	}
	var js []record.Job
	at := map[string]int{}
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		j, err := decode[record.Job](kv)
		if err != nil {
			return nil, err
		}
		at[j.ID] = len(js)
		js = append(js, j)
	}
	for _, kv := range resp.Responses[1].GetResponseRange().Kvs { // by node
		n, err := decode[record.JobNode](kv)
		if err != nil {
			return nil, err
		}
		_, id, _ := strings.Cut(r.name(work, kv), "/")
		if i, ok := at[id]; ok {
			js[i].Nodes = append(js[i].Nodes, n)
		}
	}
	slices.SortFunc(js, func(a, b record.Job) int { return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID)) })
	return js, nil
}

// ObjectJobs are those of Kubernetes objects, without their nodes.
func (r *Registry) ObjectJobs(ctx context.Context) (js []record.Job, err error) {
	resp, err := r.kv.Get(ctx, r.key(jobs, ""), clientv3.WithPrefix())
	if err != nil {
		return nil, unavailable("list jobs", err)
	}
	for _, kv := range resp.Kvs {
		j, err := decode[record.Job](kv)
		if err != nil {
			return nil, err
		}
		if j.Object != "" {
			js = append(js, j)
		}
	}
	return js, nil
}

// Job returns one, ErrNotFound if there is none.
func (r *Registry) Job(ctx context.Context, id string) (record.Job, error) {
	j, _, err := r.job(ctx, id)
	if err != nil {
		return j, err
	}
	for page := range slices.Chunk(j.Targets, atOnce) {
		var ops []clientv3.Op
		for _, n := range page {
			ops = append(ops, clientv3.OpGet(r.workKey(n, id)))
		}
		resp, err := r.kv.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return j, unavailable("show job", err)
		}
		for _, one := range resp.Responses {
			for _, kv := range one.GetResponseRange().Kvs {
				n, err := decode[record.JobNode](kv)
				if err != nil {
					return j, err
				}
				j.Nodes = append(j.Nodes, n)
			}
		}
	}
	return j, nil
}

// job is without its nodes.
func (r *Registry) job(ctx context.Context, id string) (j record.Job, rev int64, err error) {
	if !record.ValidJobID(id) {
		return j, 0, fmt.Errorf("%w: job id %.40q", record.ErrInvalid, id)
	}
	resp, err := r.kv.Get(ctx, r.key(jobs, id))
	if err != nil {
		return j, 0, unavailable("show job", err)
	}
	kv := first(resp.Kvs)
	if kv == nil {
		return j, 0, fmt.Errorf("%w: job %q; `larder job ls` lists those of the last %d days", record.ErrNotFound, id, jobsKept/(24*time.Hour))
	}
	j, err = decode[record.Job](kv)
	return j, kv.ModRevision, err
}

// CancelJob has the workers stop. What has ended stays as it is. It is idempotent.
func (r *Registry) CancelJob(ctx context.Context, id string) error {
	return retry(ctx, "cancel job", func() error {
		j, rev, err := r.job(ctx, id)
		if err != nil || j.Canceled {
			return err
		}
		j.Canceled = true
		resp, err := r.kv.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(r.key(jobs, id)), "=", rev)).
			Then(clientv3.OpPut(r.key(jobs, id), encode(j), clientv3.WithIgnoreLease())).Commit()
		if err != nil {
			return unavailable("cancel job", err)
		}
		if !resp.Succeeded {
			return errRaced
		}
		var ops []clientv3.Op
		for _, n := range j.Targets {
			ops = append(ops, clientv3.OpPut(r.key(news, n), id))
		}
		for page := range slices.Chunk(ops, atOnce) {
			if _, err := r.kv.Txn(ctx).Then(page...).Commit(); err != nil {
				return unavailable("cancel job", err)
			}
		}
		return nil
	})
}

// Work is what a worker has to do: its node's part of jobs that have not ended there, the oldest first. It waits a
// little for something newer than the revision that it answered before; 0 does not wait.
func (r *Registry) Work(ctx context.Context, uuid, node, key string, seen int64) (todo []record.Job, revision int64, err error) {
	if err := r.checkWorker(ctx, uuid, node, key); err != nil {
		return nil, 0, err
	}
	if seen > 0 {
		r.awaitNews(ctx, node, seen)
	}
	if ctx.Err() != nil { // the worker has gone
		return nil, 0, ctx.Err()
	}
	resp, err := r.kv.Get(ctx, r.key(work, node+"/"), clientv3.WithPrefix())
	if err != nil {
		return nil, 0, unavailable("list work", err)
	}
	for _, kv := range resp.Kvs {
		n, err := decode[record.JobNode](kv)
		if err != nil {
			return nil, 0, err
		}
		if n.State.Ended() {
			continue
		}
		_, id, _ := strings.Cut(r.name(work, kv), "/")
		j, _, err := r.job(ctx, id)
		if errors.Is(err, record.ErrNotFound) { // its creation was cut short
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		j.Targets, j.Nodes = nil, []record.JobNode{n}
		todo = append(todo, j)
	}
	slices.SortStableFunc(todo, func(a, b record.Job) int { return a.Created.Compare(b.Created) })
	return todo, resp.Header.Revision, nil
}

// awaitNews returns when the node's work has changed since the revision, or after a while.
func (r *Registry) awaitNews(ctx context.Context, node string, seen int64) {
	ctx, cancel := context.WithTimeout(ctx, workWait)
	defer cancel()
	for resp := range r.kv.Watch(ctx, r.key(news, node), clientv3.WithRev(seen+1)) {
		if len(resp.Events) > 0 || resp.Err() != nil { // the revision is forgotten, say: look
			return
		}
	}
}

// checkWorker is ErrNotFound for one that has to register first.
func (r *Registry) checkWorker(ctx context.Context, uuid, node, key string) error {
	_, known, err := r.worker(ctx, uuid, node, key)
	if err == nil && !known {
		err = fmt.Errorf("%w: the worker of %q is another one, or has not registered yet", record.ErrNotFound, node)
	}
	return err
}

// ReportJob notes how far a worker is. canceled tells it to stop.
func (r *Registry) ReportJob(ctx context.Context, uuid, key, id string, n record.JobNode) (canceled bool, err error) {
	if err := n.Validate(); err != nil {
		return false, err
	}
	if err := r.checkWorker(ctx, uuid, n.Node, key); err != nil {
		return false, err
	}
	j, _, err := r.job(ctx, id)
	if err != nil {
		return false, err
	}
	n.Updated = time.Now().UTC()
	at := r.workKey(n.Node, id)
	resp, err := r.kv.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(at), ">", 0)).
		Then(clientv3.OpPut(at, encode(n), clientv3.WithIgnoreLease())).Commit()
	if err != nil {
		return false, unavailable("report job", err)
	}
	if !resp.Succeeded {
		return true, nil
	}
	if n.State.Ended() {
		r.log.Info("job ended on node", "job", id, "node", n.Node, "state", n.State, "files", n.Files, "bytes", n.Bytes, "failed", n.FailedFiles, "err", n.Error)
	}
	return j.Canceled, nil
}
