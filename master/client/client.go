// Package client talks to the master.
//
// Messages stop here: callers see the types and errors of package record. Each call either
// answers or fails within the timeout; a client never gives up reconnecting. Of several masters
// it asks one, and the next when that one does not answer.
package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/larderfs/larder/cacheworker/telemetry"
	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/record"
)

// What callers handle, so that they need import no other package of the master.
type (
	Volume       = record.Volume
	VolumeSpec   = record.VolumeSpec
	Registration = record.Registration
	Published    = record.Published
	Pod          = record.Pod
	Beat         = record.Beat
	Stats        = record.Stats
	Holding      = record.Holding
	Worker       = record.Worker
	Located      = record.Located
	VolumeOnNode = record.VolumeOnNode
	Capacity     = record.Capacity
	Mount        = record.Mount
	Table        = record.Table
	Job          = record.Job
	JobSpec      = record.JobSpec
	JobNode      = record.JobNode
	Status       = record.Status
)

// The errors that calls wrap.
var (
	ErrInvalid     = record.ErrInvalid
	ErrNotFound    = record.ErrNotFound
	ErrExists      = record.ErrExists
	ErrExhausted   = record.ErrExhausted
	ErrBadToken    = record.ErrBadToken
	ErrUnavailable = record.ErrUnavailable
	ErrRefused     = record.ErrRefused
)

// In a mount's list of Kubernetes namespaces.
const (
	AllNamespaces = record.AllNamespaces
	NoNamespace   = record.NoNamespace
)

// ParseMount makes a mount of what people write. It names all that is wrong, as ErrInvalid.
func ParseMount(m Mount) (Mount, error) { return record.ParseMount(m) }

// ParsePath reads a path of the namespace as people write it.
func ParsePath(s string) (string, error) { return record.ParsePath(s) }

// VolumeID is the id of the volume with that name.
func VolumeID(name string) string { return record.VolumeID(name) }

// ValidID reports whether the master can know a volume by that id.
func ValidID(id string) bool { return record.ValidID(id) }

// Config says where the master is.
type Config struct {
	Target  string            // "unix:///path" or "host:port"; of several masters all, with commas between
	Timeout time.Duration     // of a call whose context has no deadline; 0 means 10s
	Tracer  *telemetry.Tracer // nil traces nothing
	Log     *slog.Logger      // nil means none

	Changed <-chan struct{} // has [Client.Run] report soon; nil never does
}

// Client is safe for concurrent use.
type Client struct {
	conns   []*grpc.ClientConn
	masters []masterpb.MasterClient // of conns
	current atomic.Int64            // the one that answered last
	changed <-chan struct{}
	timeout time.Duration
	log     *slog.Logger
}

// New makes a client without connecting.
func New(cfg Config) (*Client, error) {
	c := &Client{timeout: cfg.Timeout, log: cfg.Log, changed: cfg.Changed}
	if c.timeout == 0 {
		c.timeout = 10 * time.Second
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	targets := strings.Split(cfg.Target, ",")
	for _, target := range targets {
		if strings.TrimSpace(target) != target || target == "" {
			return nil, errors.Join(fmt.Errorf("%w: master %q: want unix:///path or host:port, or several with commas between", ErrInvalid, cfg.Target), c.Close())
		}
		conn, err := connect(target, cfg.Tracer.DialOptions()...)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("master at %s: %w", target, err), c.Close())
		}
		c.conns, c.masters = append(c.conns, conn), append(c.masters, masterpb.NewMasterClient(conn))
	}
	c.current.Store(rand.Int64N(int64(len(targets)))) // so that not all ask the same one
	return c, nil
}

func connect(target string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+target, append(more,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dial),
		grpc.WithAuthority("master"),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
	)...)
}

// maxAnswer has room for the pods of thousands of nodes.
const maxAnswer = 64 << 20

// Close ends the calls in flight.
func (c *Client) Close() error {
	var errs []error
	for _, conn := range c.conns {
		errs = append(errs, conn.Close())
	}
	return errors.Join(errs...)
}

// dial reaches sockets whose path is longer than sun_path through a descriptor of their folder.
func dial(ctx context.Context, target string) (net.Conn, error) {
	var d net.Dialer
	path, ok := strings.CutPrefix(target, "unix://")
	if !ok {
		return d.DialContext(ctx, "tcp", target)
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", path, err)
	}
	defer unix.Close(fd)
	return d.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(fd)+"/"+filepath.Base(path))
}

// method is one of the master's.
type method[Req, Resp any] func(m masterpb.MasterClient, ctx context.Context, req Req, opts ...grpc.CallOption) (Resp, error)

// do calls one method and translates what it answers. A master that does not answer, or has no
// store to ask, is followed by the next: all calls may be repeated.
func do[Req, Resp any](ctx context.Context, c *Client, call method[Req, Resp], req Req) (resp Resp, err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	for left := len(c.masters); ; left-- {
		i := c.current.Load()
		resp, err = try(ctx, left, call, c.masters[i], req)
		if left == 1 || ctx.Err() != nil || !errors.Is(err, ErrUnavailable) {
			return resp, err
		}
		c.current.CompareAndSwap(i, (i+1)%int64(len(c.masters)))
	}
}

// try leaves time for the others that are left.
func try[Req, Resp any](ctx context.Context, left int, call method[Req, Resp], m masterpb.MasterClient, req Req) (Resp, error) {
	if end, ok := ctx.Deadline(); ok && left > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/time.Duration(left))
		defer cancel()
	}
	resp, err := call(m, ctx, req)
	return resp, masterpb.FromStatus(err)
}

// CreateVolume makes the volume, or returns the one of that name if it matches, else ErrExists.
// ErrExhausted if no node has room, ErrUnavailable if none of the nodes has a worker.
func (c *Client) CreateVolume(ctx context.Context, spec VolumeSpec) (Volume, error) {
	v, err := do(ctx, c, masterpb.MasterClient.CreateVolume, masterpb.FromSpec(spec))
	return v.Record(), err
}

// DeleteVolume is idempotent.
func (c *Client) DeleteVolume(ctx context.Context, id string) error {
	_, err := do(ctx, c, masterpb.MasterClient.DeleteVolume, &masterpb.DeleteVolumeRequest{Id: id})
	return err
}

// Volume returns one volume, or ErrNotFound.
func (c *Client) Volume(ctx context.Context, id string) (Volume, error) {
	v, err := do(ctx, c, masterpb.MasterClient.GetVolume, &masterpb.GetVolumeRequest{Id: id})
	return v.Record(), err
}

// Volumes returns one page by id: at most max volumes (0 for as many as fit), and the token
// of the next page, "" if this was the last. ErrBadToken if the token is none of ours.
func (c *Client) Volumes(ctx context.Context, max int, token string) (vs []Volume, next string, err error) {
	resp, err := do(ctx, c, masterpb.MasterClient.ListVolumes, &masterpb.ListVolumesRequest{MaxEntries: int32(min(max, 1<<20)), PageToken: token})
	for _, v := range resp.GetVolumes() {
		vs = append(vs, v.Record())
	}
	return vs, resp.GetNextPageToken(), err
}

// Capacity returns that of a node, ErrNotFound if it has no worker; or for "" that of all.
func (c *Client) Capacity(ctx context.Context, node string) (Capacity, error) {
	resp, err := do(ctx, c, masterpb.MasterClient.GetCapacity, &masterpb.GetCapacityRequest{Node: node})
	return resp.Record(), err
}

// Workers returns the workers whose lease holds, by node.
func (c *Client) Workers(ctx context.Context) ([]Worker, error) {
	return c.workers(ctx, &masterpb.ListWorkersRequest{})
}

// AllWorkers are those whose lease holds and those that are gone and not forgotten, by node.
// Live ones are asked for their counters of now, if live is set, and not told as of their last
// heartbeat: see Worker.Unanswered.
func (c *Client) AllWorkers(ctx context.Context, live bool) ([]Worker, error) {
	return c.workers(ctx, &masterpb.ListWorkersRequest{Gone: true, Live: live})
}

func (c *Client) workers(ctx context.Context, req *masterpb.ListWorkersRequest) (ws []Worker, err error) {
	resp, err := do(ctx, c, masterpb.MasterClient.ListWorkers, req)
	for _, w := range resp.GetWorkers() {
		ws = append(ws, w.Record())
	}
	return ws, err
}

// DrainWorker has a node get nothing new, or, with undo, something again. It is idempotent; ErrNotFound for a node that has no
// worker, nor had one lately.
func (c *Client) DrainWorker(ctx context.Context, node string, undo bool) error {
	_, err := do(ctx, c, masterpb.MasterClient.DrainWorker, &masterpb.DrainWorkerRequest{Node: node, Undo: undo})
	return err
}

// Locate asks all workers what they have cached of an under-store URI (s3://bucket/key,
// file:///path), on the S3 store at endpoint, or on all if that is "".
func (c *Client) Locate(ctx context.Context, uri, endpoint string) (ls []Located, err error) {
	resp, err := do(ctx, c, masterpb.MasterClient.Locate, &masterpb.LocateRequest{Uri: uri, Endpoint: endpoint})
	for _, l := range resp.GetWorkers() {
		ls = append(ls, l.Record())
	}
	return ls, err
}

// DescribeVolume asks the workers of the nodes where a volume is mounted about it, by node; none for an id that nobody has.
func (c *Client) DescribeVolume(ctx context.Context, id string) (vs []VolumeOnNode, err error) {
	resp, err := do(ctx, c, masterpb.MasterClient.DescribeVolume, &masterpb.DescribeVolumeRequest{Id: id})
	for _, v := range resp.GetNodes() {
		vs = append(vs, v.Record())
	}
	return vs, err
}

// PutMount makes or replaces the mount at its path.
func (c *Client) PutMount(ctx context.Context, m Mount) error {
	_, err := do(ctx, c, masterpb.MasterClient.PutMount, masterpb.FromMount(m))
	return err
}

// Mounts returns all mounts by path.
func (c *Client) Mounts(ctx context.Context) (ms []Mount, err error) {
	resp, err := do(ctx, c, masterpb.MasterClient.ListMounts, &masterpb.ListMountsRequest{})
	for _, m := range resp.GetMounts() {
		ms = append(ms, m.Record())
	}
	return ms, err
}

// DeleteMount is idempotent.
func (c *Client) DeleteMount(ctx context.Context, path string) error {
	_, err := do(ctx, c, masterpb.MasterClient.DeleteMount, &masterpb.DeleteMountRequest{Path: path})
	return err
}

// Status returns the master's own.
func (c *Client) Status(ctx context.Context) (Status, error) {
	resp, err := do(ctx, c, masterpb.MasterClient.Status, &masterpb.StatusRequest{})
	return resp.Record(), err
}

// CreateJob has nodes load or free what lies below URIs.
func (c *Client) CreateJob(ctx context.Context, spec JobSpec) (Job, error) {
	j, err := do(ctx, c, masterpb.MasterClient.CreateJob, masterpb.FromJobSpec(spec))
	return j.Record(), err
}

// Job returns one, ErrNotFound if there is none.
func (c *Client) Job(ctx context.Context, id string) (Job, error) {
	j, err := do(ctx, c, masterpb.MasterClient.GetJob, &masterpb.GetJobRequest{Id: id})
	return j.Record(), err
}

// Jobs returns those of the last days, the latest first.
func (c *Client) Jobs(ctx context.Context) (js []Job, err error) {
	resp, err := do(ctx, c, masterpb.MasterClient.ListJobs, &masterpb.ListJobsRequest{})
	for _, j := range resp.GetJobs() {
		js = append(js, j.Record())
	}
	return js, err
}

// CancelJob is idempotent. The workers stop a moment later.
func (c *Client) CancelJob(ctx context.Context, id string) error {
	_, err := do(ctx, c, masterpb.MasterClient.CancelJob, &masterpb.CancelJobRequest{Id: id})
	return err
}

// Work is a worker's question for its node's part of jobs; of its registration only UUID, node and key matter. With the
// revision of the answer before, it waits some seconds for news.
func (c *Client) Work(ctx context.Context, reg Registration, seen int64) (todo []Job, revision int64, err error) {
	resp, err := do(ctx, c, masterpb.MasterClient.Work, &masterpb.WorkRequest{Uuid: reg.UUID, Node: reg.Node, Key: reg.Key, Revision: seen})
	for _, j := range resp.GetJobs() {
		todo = append(todo, j.Record())
	}
	return todo, resp.GetRevision(), err
}

// ReportJob tells how far the worker is; canceled has it stop.
func (c *Client) ReportJob(ctx context.Context, reg Registration, id string, n JobNode) (canceled bool, err error) {
	resp, err := do(ctx, c, masterpb.MasterClient.ReportJob, &masterpb.ReportJobRequest{Uuid: reg.UUID, Key: reg.Key, Id: id, Node: masterpb.FromJobNode(n)})
	return resp.GetCanceled(), err
}
