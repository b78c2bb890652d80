package registry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/larderfs/larder/master/record"
)

// worker is what is kept of a registration. Of its volumes only the ids: what else it told
// about them is in their own records.
type worker struct {
	record.Registration
	Registered time.Time        `json:"registered"`
	Alive      clientv3.LeaseID `json:"alive"` // of this record
	Known      clientv3.LeaseID `json:"known"` // of its copy
}

// Register makes the worker that of its node, and remembers the volumes it shows. When it
// fails, the worker is not registered (or as it was before) and tries again.
func (r *Registry) Register(ctx context.Context, reg record.Registration) (lease time.Duration, err error) {
	if err := reg.Validate(); err != nil {
		return 0, err
	}
	if err := r.rememberAll(ctx, reg.Volumes); err != nil {
		return 0, fmt.Errorf("register worker of %s: %w", reg.Node, err)
	}
	had, err := r.kv.Get(ctx, r.key(known, reg.Node))
	if err != nil {
		return 0, unavailable("register worker", err)
	}
	w := worker{Registration: reg, Registered: time.Now().UTC()}
	if w.Alive, w.Known, err = r.leases(ctx, first(had.Kvs), reg.UUID); err != nil {
		return 0, unavailable("register worker", err)
	}
	w.Volumes = make([]record.Published, len(reg.Volumes))
	for i, p := range reg.Volumes {
		w.Volumes[i] = record.Published{Volume: record.Volume{ID: p.Volume.ID}, Inline: p.Inline, Pods: p.Pods}
	}
	resp, err := r.kv.Txn(ctx).Then(
		clientv3.OpPut(r.key(workers, reg.Node), encode(w), clientv3.WithLease(w.Alive), clientv3.WithPrevKV()),
		clientv3.OpPut(r.key(known, reg.Node), encode(w), clientv3.WithLease(w.Known)),
	).Commit()
	if err != nil {
		return 0, unavailable("register worker", err)
	}
	r.logRegistered(reg, resp.Responses[0].GetResponsePut().PrevKv)
	r.keepSeen(reg.Node, reg.UUID)
	return r.lease, nil
}

// leases keeps those that the worker has: it registers often, and each lease lasts.
func (r *Registry) leases(ctx context.Context, had *mvccpb.KeyValue, uuid string) (alive, knownAs clientv3.LeaseID, err error) {
	var old worker
	if had != nil {
		if old, err = decode[worker](had); err != nil || old.UUID != uuid {
			old = worker{}
		}
	}
	if alive, err = r.keepLease(ctx, old.Alive, r.lease); err == nil {
		knownAs, err = r.keepLease(ctx, old.Known, r.forget)
	}
	return alive, knownAs, err
}

// keepLease renews the lease, or grants one of that length in its place.
func (r *Registry) keepLease(ctx context.Context, id clientv3.LeaseID, length time.Duration) (clientv3.LeaseID, error) {
	seconds := int64(length / time.Second)
	if id != clientv3.NoLease {
		kept, err := r.kv.KeepAliveOnce(ctx, id)
		if err == nil && kept.TTL == seconds {
			return id, nil
		}
		if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return id, err
		}
	}
	grant, err := r.kv.Grant(ctx, seconds)
	if err != nil {
		return id, err
	}
	return grant.ID, nil
}

func (r *Registry) logRegistered(reg record.Registration, prev *mvccpb.KeyValue) {
	if prev == nil {
		r.log.Info("worker registered", "node", reg.Node, "worker", reg.UUID, "capacityBytes", reg.CapacityBytes, "volumes", len(reg.Volumes))
		return
	}
	if old, err := decode[worker](prev); err == nil && old.UUID != reg.UUID {
		r.log.Warn("another worker took over the node", "node", reg.Node, "worker", reg.UUID, "before", old.UUID)
	}
}

// rememberAll makes those of the volumes that the store does not know.
func (r *Registry) rememberAll(ctx context.Context, ps []record.Published) error {
	for len(ps) > 0 {
		page := ps[:min(len(ps), 50)] // two operations each; etcd takes 128
		ps = ps[len(page):]
		var ops []clientv3.Op
		for _, p := range page {
			ops = append(ops,
				clientv3.OpGet(r.key(volumes, p.Volume.ID), clientv3.WithCountOnly()),
				clientv3.OpGet(r.key(deleted, p.Volume.ID), clientv3.WithCountOnly()))
		}
		resp, err := r.kv.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return unavailable("look volumes up", err)
		}
		for i, p := range page {
			known := resp.Responses[2*i].GetResponseRange().Count + resp.Responses[2*i+1].GetResponseRange().Count
			if p.Inline || known > 0 {
				continue
			}
			if err := r.rememberOne(ctx, p.Volume); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *Registry) rememberOne(ctx context.Context, v record.Volume) error {
	return retry(ctx, "remember volume", func() error {
		err := r.remember(ctx, v)
		if !errors.Is(err, errRaced) {
			return err
		}
		resp, err := r.kv.Txn(ctx).Then(
			clientv3.OpGet(r.key(volumes, v.ID), clientv3.WithCountOnly()),
			clientv3.OpGet(r.key(deleted, v.ID), clientv3.WithCountOnly()),
		).Commit()
		if err != nil {
			return unavailable("look volume up", err)
		}
		if resp.Responses[0].GetResponseRange().Count+resp.Responses[1].GetResponseRange().Count > 0 {
			return nil // somebody else made or deleted it meanwhile
		}
		return errRaced
	})
}

// Heartbeat keeps a worker's lease; known is false if it has to register. Of two processes of one
// worker, while one follows the other, the last to register is known.
func (r *Registry) Heartbeat(ctx context.Context, uuid, node, key string, b record.Beat) (known bool, lease time.Duration, err error) {
	w, known, err := r.worker(ctx, uuid, node, key)
	if err != nil || !known {
		return false, r.lease, err
	}
	for _, id := range []clientv3.LeaseID{w.Known, w.Alive} { // this order: who is alive is known
		_, err = r.kv.KeepAliveOnce(ctx, id)
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return false, r.lease, nil
		}
		if err != nil {
			return false, 0, unavailable("heartbeat", err)
		}
	}
	r.keepBeat(node, uuid, b)
	return true, r.lease, nil
}

// worker is the one of the node, if it is the one that asks.
func (r *Registry) worker(ctx context.Context, uuid, node, key string) (w worker, known bool, err error) {
	if err := record.CheckWorker(uuid, node); err != nil {
		return w, false, err
	}
	resp, err := r.kv.Get(ctx, r.key(workers, node))
	if err != nil {
		return w, false, unavailable("look worker up", err)
	}
	kv := first(resp.Kvs)
	if kv == nil {
		return w, false, nil
	}
	w, err = decode[worker](kv)
	return w, err == nil && w.UUID == uuid && w.Key == key, err
}

func (r *Registry) keepBeat(node, uuid string, b record.Beat) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.beats[node] = beat{b, uuid, time.Now().UTC()}
}

// keepSeen keeps the beat of a worker that registers again.
func (r *Registry) keepSeen(node, uuid string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.beats[node]
	if b.uuid != uuid {
		b = beat{uuid: uuid}
	}
	b.at = time.Now().UTC()
	r.beats[node] = b
}

// Workers returns the workers whose lease holds, by node.
func (r *Registry) Workers(ctx context.Context) ([]record.Worker, error) {
	kept, err := r.kept(ctx, workers)
	if err != nil {
		return nil, err
	}
	rooms, err := r.rooms(ctx)
	if err != nil {
		return nil, err
	}
	drains, err := r.drains(ctx)
	if err != nil {
		return nil, err
	}
	ws := make([]record.Worker, len(kept))
	for i, w := range kept {
		ws[i] = record.Worker{Registration: w.Registration, Registered: w.Registered, ReservedBytes: rooms[w.Node].reserved, Drained: drains[w.Node].Since}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range ws {
		if b := r.beats[ws[i].Node]; b.uuid == ws[i].UUID {
			ws[i].Beat, ws[i].Seen = b.Beat, b.at
		}
	}
	return ws, nil
}

// Gone returns the workers whose lease has ended and that are not forgotten, by node.
func (r *Registry) Gone(ctx context.Context) ([]record.Worker, error) {
	all, err := r.kept(ctx, known)
	if err != nil {
		return nil, err
	}
	alive, err := r.kept(ctx, workers) // later: who is in neither has come meanwhile
	if err != nil {
		return nil, err
	}
	here := map[string]bool{}
	for _, w := range alive {
		here[w.Node] = true
	}
	drains, err := r.drains(ctx)
	if err != nil {
		return nil, err
	}
	var gone []record.Worker
	for _, w := range all {
		if here[w.Node] {
			continue
		}
		ttl, err := r.kv.TimeToLive(ctx, w.Known)
		if err != nil {
			return nil, unavailable("list workers", err)
		}
		if ttl.TTL <= 0 { // forgotten just now
			continue
		}
		seen := time.Now().Add(time.Duration(ttl.TTL)*time.Second - r.forget).UTC()
		gone = append(gone, record.Worker{Registration: w.Registration, Registered: w.Registered, Seen: seen, Gone: true, Drained: drains[w.Node].Since})
	}
	return gone, nil
}

// kept returns what is in the folder workers or known.
func (r *Registry) kept(ctx context.Context, folder string) ([]worker, error) {
	resp, err := r.kv.Get(ctx, r.key(folder, ""), clientv3.WithPrefix())
	if err != nil {
		return nil, unavailable("list workers", err)
	}
	ws := make([]worker, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		if ws[i], err = decode[worker](kv); err != nil {
			return nil, err
		}
	}
	return ws, nil
}

// published returns the nodes, in order, where each volume is published.
func (r *Registry) published(ctx context.Context) (map[string][]string, error) {
	ws, err := r.kept(ctx, workers)
	if err != nil {
		return nil, err
	}
	on := map[string][]string{}
	for _, w := range ws {
		for _, p := range w.Volumes {
			on[p.Volume.ID] = append(on[p.Volume.ID], w.Node)
		}
	}
	return on, nil
}

// Run logs the workers whose lease ends, and forgets their beats, until ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	t := time.NewTicker(max(r.lease/2, time.Second))
	defer t.Stop()
	var before []worker
	for {
		if ws, err := r.kept(ctx, workers); err == nil { // else etcd is away, which is no worker's fault
			r.logLost(before, ws)
			before = ws
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (r *Registry) logLost(before, now []worker) {
	alive := map[string]bool{}
	for _, w := range now {
		alive[w.Node] = true
	}
	for _, w := range before {
		if alive[w.Node] {
			continue
		}
		r.log.Warn("worker lost", "node", w.Node, "worker", w.UUID)
		r.mu.Lock()
		delete(r.beats, w.Node)
		r.mu.Unlock()
	}
}
