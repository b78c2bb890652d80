package registry

import (
	"context"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/larderfs/larder/master/record"
)

// PutMount makes or replaces the mount at its path.
func (r *Registry) PutMount(ctx context.Context, m record.Mount) error {
	if err := m.Validate(); err != nil {
		return err
	}
	if _, err := r.kv.Put(ctx, r.key(mounts, m.Path), encode(m)); err != nil {
		return unavailable("put mount", err)
	}
	return nil
}

// Mounts returns all mounts by path.
func (r *Registry) Mounts(ctx context.Context) ([]record.Mount, error) {
	resp, err := r.kv.Get(ctx, r.key(mounts, "/"), clientv3.WithPrefix())
	if err != nil {
		return nil, unavailable("list mounts", err)
	}
	ms := make([]record.Mount, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		if ms[i], err = decode[record.Mount](kv); err != nil {
			return nil, err
		}
	}
	return ms, nil
}

// DeleteMount is idempotent.
func (r *Registry) DeleteMount(ctx context.Context, path string) error {
	if err := record.CheckPath(path); err != nil {
		return err
	}
	if _, err := r.kv.Delete(ctx, r.key(mounts, path)); err != nil {
		return unavailable("delete mount", err)
	}
	return nil
}
