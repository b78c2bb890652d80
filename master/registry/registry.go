// Package registry keeps the master's records in etcd.
//
// What a method acknowledged is in etcd; nothing is decided from memory. Every change is one
// transaction that compares what it was decided from, so several masters may share one etcd.
// A worker's record lives under an etcd lease that its heartbeats keep, and a copy of it under
// a longer one, so that a worker that is gone can be named as such; a deleted volume
// leaves a tombstone, or the next registration that still shows it would bring it back.
package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/larderfs/larder/master/record"
)

// Config is what a registry needs. All fields but Log are required.
type Config struct {
	Etcd   *clientv3.Client
	Prefix string        // of all keys, ending in "/"
	Lease  time.Duration // of a worker; whole seconds
	Forget time.Duration // a worker from its last heartbeat on; whole seconds, more than Lease
	Log    *slog.Logger
}

// Registry is safe for concurrent use.
type Registry struct {
	kv     *clientv3.Client
	prefix string
	lease  time.Duration
	forget time.Duration
	log    *slog.Logger

	mu    sync.Mutex      // guards beats; never held across a call of etcd
	beats map[string]beat // by node
}

type beat struct {
	record.Beat
	uuid string
	at   time.Time
}

// New does no I/O.
func New(cfg Config) *Registry {
	return &Registry{kv: cfg.Etcd, prefix: cfg.Prefix, lease: cfg.Lease, forget: cfg.Forget, log: cfg.Log, beats: map[string]beat{}}
}

// The folders of keys below the prefix.
const (
	volumes  = "volumes/"  // id → record.Volume
	deleted  = "deleted/"  // id → "", under a lease of its own
	reserved = "reserved/" // node → bytes, the sum over its volumes
	workers  = "workers/"  // node → worker, under the worker's lease
	drained  = "drained/"  // node → drain, until it is undone
	known    = "known/"    // node → worker, as above, under a longer lease: workers that are gone are shown for a while
	jobs     = "jobs/"     // id → record.Job without its nodes, under a lease, as its work is
	work     = "work/"     // node/id → record.JobNode
	news     = "news/"     // node → the id of the job that was made or canceled last: to be watched
	mounts   = "mounts"    // path, which begins with "/" → record.Mount

	namespace = "namespace" // no folder: the mount table's id, from its first change on
)

func (r *Registry) key(folder, name string) string { return r.prefix + folder + name }

// name is the inverse of key.
func (r *Registry) name(folder string, kv *mvccpb.KeyValue) string {
	return strings.TrimPrefix(string(kv.Key), r.prefix+folder)
}

// count returns how many keys are in a folder.
func (r *Registry) count(ctx context.Context, folder string) (n, revision int64, err error) {
	resp, err := r.kv.Get(ctx, r.key(folder, ""), clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return 0, 0, unavailable("count "+folder, err)
	}
	return resp.Count, resp.Header.Revision, nil
}

// Status fills in what the store knows. It asks the store, so it is a check of its health too.
func (r *Registry) Status(ctx context.Context) (s record.Status, err error) {
	for folder, n := range map[string]*int64{volumes: &s.Volumes, workers: &s.Workers, mounts: &s.Mounts} {
		if *n, s.StoreRevision, err = r.count(ctx, folder); err != nil {
			return s, err
		}
	}
	endpoint := ""
	if eps := r.kv.Endpoints(); len(eps) > 0 {
		endpoint = eps[0]
	}
	m, err := r.kv.Maintenance.Status(ctx, endpoint)
	if err != nil {
		return s, unavailable("status", err)
	}
	s.StoreBytes = m.DbSize
	return s, nil
}

// unavailable wraps all that etcd answers: none of its codes may leak out as ours.
func unavailable(doing string, err error) error {
	return fmt.Errorf("store: %s: %w: %w", doing, record.ErrUnavailable, err)
}

// decode reads a record that this package wrote.
func decode[T any](kv *mvccpb.KeyValue) (T, error) {
	var v T
	if err := json.Unmarshal(kv.Value, &v); err != nil {
		return v, fmt.Errorf("store: %s is damaged: %w", kv.Key, err)
	}
	return v, nil
}

// encode cannot fail: records are plain data.
func encode(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return string(b)
}

// unchanged is true in a transaction while the key is as kv says, which is nil for a key that is not there.
func unchanged(key string, kv *mvccpb.KeyValue) clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(key), "=", kv.GetModRevision())
}

// first is the only key of a response for one key, or nil.
func first(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	if len(kvs) == 0 {
		return nil
	}
	return kvs[0]
}

// errRaced ends one try of a change: somebody else changed what it was decided from.
var errRaced = errors.New("raced")

// retry calls try until it is not raced. Each race is somebody else's progress.
func retry(ctx context.Context, doing string, try func() error) error {
	for {
		err := try()
		if !errors.Is(err, errRaced) {
			return err
		}
		if ctx.Err() != nil {
			return unavailable(doing, context.Cause(ctx))
		}
	}
}
