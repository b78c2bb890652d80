package registry

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/larderfs/larder/master/record"
)

const (
	maxMounts = 2000 // of a table: it is told to each worker as a whole
	maxOps    = 100  // of a transaction, as etcd bounds them
)

// PutMount makes or replaces the mount at its path. One that is made from a Kubernetes object is
// changed by nobody but [Registry.ApplyMounts].
func (r *Registry) PutMount(ctx context.Context, m record.Mount) error {
	if err := m.Validate(); err != nil {
		return err
	}
	err := retry(ctx, "put mount", func() error {
		t, err := r.readTable(ctx)
		if err != nil {
			return err
		}
		if err := t.foreign(m.Path, m.Object); err != nil {
			return err
		}
		if t.find(m.Path) < 0 && len(t.Mounts) >= maxMounts {
			return fmt.Errorf("there are %d mounts, and no more than that can be: %w", len(t.Mounts), record.ErrExhausted)
		}
		return r.commit(ctx, t.same, append(t.marker, clientv3.OpPut(r.key(mounts, m.Path), encode(m))))
	})
	if err != nil {
		return fmt.Errorf("put mount %s: %w", m.Path, err)
	}
	return nil
}

// DeleteMount is idempotent.
func (r *Registry) DeleteMount(ctx context.Context, path string) error {
	if err := record.CheckPath(path); err != nil {
		return err
	}
	err := retry(ctx, "delete mount", func() error {
		t, err := r.readTable(ctx)
		if err != nil {
			return err
		}
		if err := t.foreign(path, ""); err != nil {
			return err
		}
		return r.commit(ctx, t.same, append(t.marker, clientv3.OpDelete(r.key(mounts, path))))
	})
	if err != nil {
		return fmt.Errorf("delete mount %s: %w", path, err)
	}
	return nil
}

// Mounts is the mount table.
func (r *Registry) Mounts(ctx context.Context) (record.Table, error) {
	t, err := r.readTable(ctx)
	return t.Table, err
}

// ApplyMounts has the mounts that are made from Kubernetes objects be these, each with its Object, and no
// others. A mount at the same path that is made from none becomes the object's.
func (r *Registry) ApplyMounts(ctx context.Context, ms []record.Mount) error {
	if len(ms) > maxMounts {
		return fmt.Errorf("apply mounts: %d of them, and %d at most can be: %w", len(ms), maxMounts, record.ErrExhausted)
	}
	for _, m := range ms {
		if err := m.Validate(); err != nil {
			return err
		}
	}
	err := retry(ctx, "apply mounts", func() error {
		t, err := r.readTable(ctx)
		if err != nil {
			return err
		}
		ops := t.marker
		for _, m := range ms {
			if i := t.find(m.Path); i < 0 || !t.Mounts[i].Equal(m) {
				ops = append(ops, clientv3.OpPut(r.key(mounts, m.Path), encode(m)))
			}
		}
		for _, had := range t.Mounts {
			if had.Object != "" && !slices.ContainsFunc(ms, func(m record.Mount) bool { return m.Path == had.Path }) {
				ops = append(ops, clientv3.OpDelete(r.key(mounts, had.Path)))
			}
		}
		if len(ops) == 0 {
			return nil
		}
		if err := r.commit(ctx, t.same, ops[:min(len(ops), maxOps)]); err != nil || len(ops) <= maxOps {
			return err
		}
		return errRaced // the rest
	})
	if err != nil {
		return fmt.Errorf("apply mounts: %w", err)
	}
	return nil
}

// RestoreMounts makes the table what a worker was told before, if there never was one: this master
// has lost it.
func (r *Registry) RestoreMounts(ctx context.Context, lost record.Table) error {
	for _, m := range lost.Mounts {
		if err := m.Validate(); err != nil {
			return err
		}
	}
	if uuid.Validate(lost.ID) != nil {
		return fmt.Errorf("restore mounts: table %.40q: %w", lost.ID, record.ErrInvalid)
	}
	err := retry(ctx, "restore mounts", func() error {
		t, err := r.readTable(ctx)
		if err != nil {
			return err
		}
		if t.ID != "" {
			return fmt.Errorf("this master has a mount table: %w", record.ErrRefused)
		}
		ops := []clientv3.Op{clientv3.OpPut(r.key(namespace, ""), lost.ID)}
		for _, m := range lost.Mounts {
			ops = append(ops, clientv3.OpPut(r.key(mounts, m.Path), encode(m)))
		}
		return r.commit(ctx, t.same, ops)
	})
	if err != nil {
		return fmt.Errorf("restore mounts: %w", err)
	}
	r.log.Warn("the mount table was lost, and is restored from a worker", "mounts", len(lost.Mounts))
	return nil
}

// FollowMounts calls push with the table, and again after each change, until ctx ends, push fails, or
// the store does not tell of changes any more.
func (r *Registry) FollowMounts(ctx context.Context, push func(record.Table) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		t, err := r.readTable(ctx)
		if err != nil {
			return err
		}
		if err := push(t.Table); err != nil {
			return err
		}
		if err := r.awaitMounts(ctx, t.revision+1); err != nil {
			return err
		}
	}
}

// awaitMounts returns when the table has changed, in that revision or a later one.
func (r *Registry) awaitMounts(ctx context.Context, revision int64) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel() // ends the watches
	paths := r.kv.Watch(ctx, r.key(mounts, "/"), clientv3.WithPrefix(), clientv3.WithRev(revision))
	marker := r.kv.Watch(ctx, r.key(namespace, ""), clientv3.WithRev(revision))
	for {
		var resp clientv3.WatchResponse
		var ok bool
		select {
		case resp, ok = <-paths:
		case resp, ok = <-marker:
		}
		switch {
		case ctx.Err() != nil:
			return unavailable("follow mounts", context.Cause(ctx))
		case resp.CompactRevision != 0: // it has changed, and more besides
			return nil
		case !ok || resp.Err() != nil:
			return unavailable("follow mounts", resp.Err())
		case len(resp.Events) > 0:
			return nil
		}
	}
}

// table is the mount table as of one moment.
type table struct {
	record.Table
	revision int64
	same     []clientv3.Cmp // true in a transaction while the table is this one
	marker   []clientv3.Op  // makes the id of a table that has none
}

func (t table) find(path string) int {
	return slices.IndexFunc(t.Mounts, func(m record.Mount) bool { return m.Path == path })
}

// foreign refuses to change what is made from another Kubernetes object.
func (t table) foreign(path, object string) error {
	i := t.find(path)
	if i < 0 || t.Mounts[i].Object == "" || t.Mounts[i].Object == object {
		return nil
	}
	o := t.Mounts[i].Object
	return fmt.Errorf("it is made from the Kubernetes object mounts.larder.dev/%s: change or delete that (kubectl edit mounts.larder.dev %s): %w", o, o, record.ErrRefused)
}

func (r *Registry) readTable(ctx context.Context) (t table, err error) {
	prefix, marker := r.key(mounts, "/"), r.key(namespace, "")
	resp, err := r.kv.Txn(ctx).Then(clientv3.OpGet(prefix, clientv3.WithPrefix()), clientv3.OpGet(marker)).Commit()
	if err != nil {
		return t, unavailable("list mounts", err)
	}
	t.revision = resp.Header.Revision
	mark, kvs := first(resp.Responses[1].GetResponseRange().GetKvs()), resp.Responses[0].GetResponseRange().GetKvs()
	switch {
	case mark != nil:
		t.ID = string(mark.Value)
	case len(kvs) > 0: // an older master wrote it
		t.ID = oldTable(kvs)
		t.marker = []clientv3.Op{clientv3.OpPut(marker, t.ID)}
	default:
		t.marker = []clientv3.Op{clientv3.OpPut(marker, uuid.NewString())}
	}
	for _, kv := range kvs {
		m, err := decode[record.Mount](kv)
		if err != nil {
			return t, err
		}
		t.Mounts = append(t.Mounts, m)
	}
	t.same = []clientv3.Cmp{unchanged(marker, mark), clientv3.Compare(clientv3.ModRevision(prefix).WithPrefix(), "<", t.revision+1)}
	return t, nil
}

// oldTable names the table of a master that gave it no name, until it is changed.
func oldTable(kvs []*mvccpb.KeyValue) string {
	var text []byte
	for _, kv := range kvs {
		text = append(text, kv.Key...)
	}
	return uuid.NewSHA1(uuid.NameSpaceURL, text).String()
}
