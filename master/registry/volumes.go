package registry

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/larderfs/larder/master/record"
)

const (
	tombstoneLife = 7 * 24 * time.Hour // a node that shows a deleted volume longer than that brings it back
	pageEntries   = 500                // of a page at most
	pageBytes     = 2 << 20            // of a page, about
)

// CreateVolume makes the volume of a valid spec, or returns the one of that name.
func (r *Registry) CreateVolume(ctx context.Context, spec record.VolumeSpec) (v record.Volume, err error) {
	if err := spec.Validate(); err != nil {
		return v, err
	}
	err = retry(ctx, "create volume", func() error {
		v, err = r.tryCreate(ctx, spec)
		return err
	})
	if err != nil {
		return record.Volume{}, fmt.Errorf("create volume %q: %w", spec.Name, err)
	}
	return v, nil
}

func (r *Registry) tryCreate(ctx context.Context, spec record.VolumeSpec) (v record.Volume, err error) {
	id := record.VolumeID(spec.Name)
	key := r.key(volumes, id)
	resp, err := r.kv.Get(ctx, key)
	if err != nil {
		return v, unavailable("get volume", err)
	}
	if had := first(resp.Kvs); had != nil {
		return r.agree(ctx, had, spec)
	}
	v = record.Volume{ID: id, Name: spec.Name, Parameters: spec.Parameters, CapacityBytes: spec.CapacityBytes, Created: time.Now().UTC()}
	cmps := []clientv3.Cmp{unchanged(key, nil)}
	ops := []clientv3.Op{clientv3.OpDelete(r.key(deleted, id))}
	if len(spec.Nodes) > 0 {
		node, same, take, err := r.reserve(ctx, spec.Nodes, spec.CapacityBytes)
		if err != nil {
			return v, err
		}
		v.Node, cmps, ops = node, append(cmps, same...), append(ops, take)
	}
	return v, r.commit(ctx, cmps, append(ops, clientv3.OpPut(key, encode(v))))
}

// agree returns the volume that is there, if it is what the spec asks for.
func (r *Registry) agree(ctx context.Context, had *mvccpb.KeyValue, spec record.VolumeSpec) (record.Volume, error) {
	v, err := decode[record.Volume](had)
	switch {
	case err != nil:
		return v, err
	case !spec.Matches(v):
		return v, record.ErrExists
	case v.Name == "":
		return r.adopt(ctx, had, v, spec)
	}
	return v, nil
}

// adopt completes a volume that was remembered from a worker with what its creator knows.
func (r *Registry) adopt(ctx context.Context, had *mvccpb.KeyValue, v record.Volume, spec record.VolumeSpec) (record.Volume, error) {
	more := int64(0)
	if v.CapacityBytes == 0 {
		more = spec.CapacityBytes
	}
	v.Name, v.CapacityBytes = spec.Name, v.CapacityBytes+more
	key := r.key(volumes, v.ID)
	cmps, ops := []clientv3.Cmp{unchanged(key, had)}, []clientv3.Op{clientv3.OpPut(key, encode(v))}
	same, room, err := r.shift(ctx, v.Node, more)
	if err != nil {
		return v, err
	}
	return v, r.commit(ctx, append(cmps, same...), append(ops, room...))
}

// DeleteVolume forgets a volume and frees what it reserves. It is idempotent.
func (r *Registry) DeleteVolume(ctx context.Context, id string) error {
	if !record.ValidID(id) {
		return nil // there never was one
	}
	grant, err := r.kv.Grant(ctx, int64(tombstoneLife/time.Second))
	if err != nil {
		return unavailable("delete volume", err)
	}
	err = retry(ctx, "delete volume", func() error { return r.tryDelete(ctx, id, grant.ID) })
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	return nil
}

func (r *Registry) tryDelete(ctx context.Context, id string, life clientv3.LeaseID) error {
	key := r.key(volumes, id)
	resp, err := r.kv.Get(ctx, key)
	if err != nil {
		return unavailable("get volume", err)
	}
	had := first(resp.Kvs)
	cmps := []clientv3.Cmp{unchanged(key, had)}
	ops := []clientv3.Op{clientv3.OpDelete(key), clientv3.OpPut(r.key(deleted, id), "", clientv3.WithLease(life))}
	if had != nil {
		v, err := decode[record.Volume](had)
		if err != nil {
			return err
		}
		same, room, err := r.shift(ctx, v.Node, -v.CapacityBytes)
		if err != nil {
			return err
		}
		cmps, ops = append(cmps, same...), append(ops, room...)
	}
	return r.commit(ctx, cmps, ops)
}

// remember makes a volume that a worker shows, unless it is known, or deleted.
func (r *Registry) remember(ctx context.Context, v record.Volume) error {
	if v.Created.IsZero() {
		v.Created = time.Now().UTC()
	}
	key := r.key(volumes, v.ID)
	same, room, err := r.shift(ctx, v.Node, v.CapacityBytes)
	if err != nil {
		return err
	}
	cmps := append(same, unchanged(key, nil), unchanged(r.key(deleted, v.ID), nil))
	if err := r.commit(ctx, cmps, append(room, clientv3.OpPut(key, encode(v)))); err != nil {
		return err
	}
	r.log.Info("volume remembered from a worker", "volume", v.ID, "name", v.Name)
	return nil
}

// Volume returns one volume, or ErrNotFound.
func (r *Registry) Volume(ctx context.Context, id string) (record.Volume, error) {
	var kv *mvccpb.KeyValue
	if record.ValidID(id) {
		resp, err := r.kv.Get(ctx, r.key(volumes, id))
		if err != nil {
			return record.Volume{}, unavailable("get volume", err)
		}
		kv = first(resp.Kvs)
	}
	if kv == nil {
		return record.Volume{}, fmt.Errorf("volume %.128q: %w", id, record.ErrNotFound)
	}
	v, err := decode[record.Volume](kv)
	if err != nil {
		return v, err
	}
	on, err := r.published(ctx)
	v.PublishedNodes = on[id]
	return v, err
}

// Volumes returns a page by id: at most max volumes, but no more than a message can hold.
func (r *Registry) Volumes(ctx context.Context, max int, token string) (vs []record.Volume, next string, err error) {
	from := r.key(volumes, "")
	if token != "" {
		id, err := record.ParseToken(token)
		if err != nil {
			return nil, "", err
		}
		from = r.key(volumes, id) + "\x00"
	}
	if max <= 0 || max > pageEntries {
		max = pageEntries
	}
	resp, err := r.kv.Get(ctx, from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(r.key(volumes, ""))), clientv3.WithLimit(int64(max)))
	if err != nil {
		return nil, "", unavailable("list volumes", err)
	}
	on, err := r.published(ctx)
	if err != nil {
		return nil, "", err
	}
	size := 0
	for _, kv := range resp.Kvs {
		if size += len(kv.Value); size > pageBytes && len(vs) > 0 {
			break
		}
		v, err := decode[record.Volume](kv)
		if err != nil {
			return nil, "", err
		}
		v.PublishedNodes = on[v.ID]
		vs = append(vs, v)
	}
	if len(vs) < len(resp.Kvs) || resp.More {
		next = record.Token(vs[len(vs)-1].ID)
	}
	return vs, next, nil
}

// commit is errRaced if one of cmps is false.
func (r *Registry) commit(ctx context.Context, cmps []clientv3.Cmp, ops []clientv3.Op) error {
	resp, err := r.kv.Txn(ctx).If(cmps...).Then(ops...).Commit()
	if err != nil {
		return unavailable("commit", err)
	}
	if !resp.Succeeded {
		return errRaced
	}
	return nil
}

// reserve picks the first of the nodes with room for n bytes more, and returns what has to
// hold and to be done for that in the transaction.
func (r *Registry) reserve(ctx context.Context, nodes []string, n int64) (node string, same []clientv3.Cmp, take clientv3.Op, err error) {
	rooms, err := r.rooms(ctx)
	if err != nil {
		return "", nil, take, err
	}
	known := false
	for _, node := range nodes {
		has, ok := rooms[node]
		known = known || ok
		if !ok || has.available() < n {
			continue
		}
		key := r.key(reserved, node)
		same = []clientv3.Cmp{unchanged(key, has.counter), unchanged(r.key(drained, node), nil), clientv3.Compare(clientv3.CreateRevision(r.key(workers, node)), ">", 0)}
		return node, same, clientv3.OpPut(key, strconv.FormatInt(has.reserved+n, 10)), nil
	}
	if !known {
		return "", nil, take, fmt.Errorf("none of %d nodes, %q the first, has a worker: %w", len(nodes), nodes[0], record.ErrUnavailable)
	}
	return "", nil, take, fmt.Errorf("none of %d nodes, %q the first, has %d bytes left (a drained one has none): %w", len(nodes), nodes[0], n, record.ErrExhausted)
}

// shift adds n bytes to what is reserved on a node, whether there is room or not.
func (r *Registry) shift(ctx context.Context, node string, n int64) ([]clientv3.Cmp, []clientv3.Op, error) {
	if node == "" || n == 0 {
		return nil, nil, nil
	}
	key := r.key(reserved, node)
	resp, err := r.kv.Get(ctx, key)
	if err != nil {
		return nil, nil, unavailable("get reservation", err)
	}
	had := first(resp.Kvs)
	sum, err := bytesOf(had)
	if err != nil {
		return nil, nil, err
	}
	op := clientv3.OpPut(key, strconv.FormatInt(sum+n, 10))
	if sum+n == 0 {
		op = clientv3.OpDelete(key)
	}
	return []clientv3.Cmp{unchanged(key, had)}, []clientv3.Op{op}, nil
}

// bytesOf reads a counter; one that is not there is 0.
func bytesOf(kv *mvccpb.KeyValue) (int64, error) {
	if kv == nil {
		return 0, nil
	}
	n, err := strconv.ParseInt(string(kv.Value), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("store: %s is damaged: %w", kv.Key, err)
	}
	return n, nil
}

// room is what one node with a worker has.
type room struct {
	capacity, reserved int64
	counter            *mvccpb.KeyValue // of reserved; nil for none
	drained            bool
}

func (r room) available() int64 {
	if r.drained {
		return 0
	}
	return max(r.capacity-r.reserved, 0)
}

// rooms returns all nodes that have a worker, as of one moment.
func (r *Registry) rooms(ctx context.Context) (map[string]room, error) {
	resp, err := r.kv.Txn(ctx).Then(
		clientv3.OpGet(r.key(workers, ""), clientv3.WithPrefix()),
		clientv3.OpGet(r.key(reserved, ""), clientv3.WithPrefix()),
		clientv3.OpGet(r.key(drained, ""), clientv3.WithPrefix(), clientv3.WithKeysOnly()),
	).Commit()
	if err != nil {
		return nil, unavailable("get capacity", err)
	}
	rooms := map[string]room{}
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		w, err := decode[worker](kv)
		if err != nil {
			return nil, err
		}
		rooms[w.Node] = room{capacity: w.CapacityBytes}
	}
	for _, kv := range resp.Responses[1].GetResponseRange().Kvs {
		node := r.name(reserved, kv)
		has, ok := rooms[node]
		if !ok {
			continue
		}
		if has.reserved, err = bytesOf(kv); err != nil {
			return nil, err
		}
		has.counter = kv
		rooms[node] = has
	}
	for _, kv := range resp.Responses[2].GetResponseRange().Kvs {
		node := r.name(drained, kv)
		if has, ok := rooms[node]; ok {
			has.drained = true
			rooms[node] = has
		}
	}
	return rooms, nil
}

// Capacity returns that of a node, ErrNotFound if it has no worker; or for "" that of all.
func (r *Registry) Capacity(ctx context.Context, node string) (c record.Capacity, err error) {
	rooms, err := r.rooms(ctx)
	if err != nil {
		return c, err
	}
	if _, ok := rooms[node]; node != "" && !ok {
		return c, fmt.Errorf("worker of node %.256q: %w", node, record.ErrNotFound)
	}
	for name, has := range rooms {
		if node != "" && name != node {
			continue
		}
		c.CapacityBytes += has.capacity
		c.ReservedBytes += has.reserved
		c.AvailableBytes += has.available()
		c.LargestBytes = max(c.LargestBytes, has.available())
	}
	return c, nil
}
