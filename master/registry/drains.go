package registry

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/larderfs/larder/master/record"
)

// drain says that a node gets nothing new. It is the node's: whichever worker it has.
type drain struct {
	Since time.Time `json:"since"`
}

// Drain has a node get nothing new: no load or pin, and no volume is bound to it. What is there goes on. It is idempotent;
// ErrNotFound for a node that has no worker, nor had one lately.
func (r *Registry) Drain(ctx context.Context, node string) error {
	key, there := r.key(drained, node), r.key(known, node)
	resp, err := r.kv.Txn(ctx).
		If(unchanged(key, nil), clientv3.Compare(clientv3.CreateRevision(there), ">", 0)).
		Then(clientv3.OpPut(key, encode(drain{time.Now().UTC()}))).
		Else(clientv3.OpGet(key, clientv3.WithCountOnly())).Commit()
	if err != nil {
		return unavailable("drain", err)
	}
	switch {
	case resp.Succeeded:
		r.log.Info("node drained", "node", node)
	case resp.Responses[0].GetResponseRange().Count == 0:
		return fmt.Errorf("%w: node %.256q has no worker, nor had one lately; `larder worker ls` lists them", record.ErrNotFound, node)
	}
	return nil
}

// Undrain is the inverse of Drain, and idempotent, too.
func (r *Registry) Undrain(ctx context.Context, node string) error {
	resp, err := r.kv.Delete(ctx, r.key(drained, node))
	if err != nil {
		return unavailable("undrain", err)
	}
	if resp.Deleted > 0 {
		r.log.Info("node undrained", "node", node)
		return nil
	}
	n, err := r.kv.Get(ctx, r.key(known, node), clientv3.WithCountOnly())
	if err != nil {
		return unavailable("undrain", err)
	}
	if n.Count == 0 {
		return fmt.Errorf("%w: node %.256q has no worker, nor had one lately; `larder worker ls` lists them", record.ErrNotFound, node)
	}
	return nil
}

// drains are by node.
func (r *Registry) drains(ctx context.Context) (map[string]drain, error) {
	resp, err := r.kv.Get(ctx, r.key(drained, ""), clientv3.WithPrefix())
	if err != nil {
		return nil, unavailable("list drained nodes", err)
	}
	all := map[string]drain{}
	for _, kv := range resp.Kvs {
		if all[r.name(drained, kv)], err = decode[drain](kv); err != nil {
			return nil, err
		}
	}
	return all, nil
}
