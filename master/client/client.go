// Package client talks to the master.
//
// Messages stop here: callers see the types and errors of package record. Each call either
// answers or fails within the timeout; a client never gives up reconnecting.
package client

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/record"
)

// What callers handle, so that they need import no other package of the master.
type (
	Volume       = record.Volume
	VolumeSpec   = record.VolumeSpec
	Registration = record.Registration
	Published    = record.Published
	Beat         = record.Beat
	Stats        = record.Stats
	Holding      = record.Holding
	Worker       = record.Worker
	Capacity     = record.Capacity
	Mount        = record.Mount
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
)

// ValidID reports whether the master can know a volume by that id.
func ValidID(id string) bool { return record.ValidID(id) }

// Config says where the master is.
type Config struct {
	Target  string        // "unix:///path" or "host:port"
	Timeout time.Duration // of a call whose context has no deadline; 0 means 10s
	Log     *slog.Logger  // nil means none
}

// Client is safe for concurrent use.
type Client struct {
	conn    *grpc.ClientConn
	rpc     masterpb.MasterClient
	timeout time.Duration
	log     *slog.Logger
}

// New makes a client without connecting.
func New(cfg Config) (*Client, error) {
	if cfg.Target == "" {
		return nil, fmt.Errorf("%w: the master's address is empty", ErrInvalid)
	}
	conn, err := grpc.NewClient("passthrough:///"+cfg.Target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dial),
		grpc.WithAuthority("master"),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("master at %s: %w", cfg.Target, err)
	}
	c := &Client{conn: conn, rpc: masterpb.NewMasterClient(conn), timeout: cfg.Timeout, log: cfg.Log}
	if c.timeout == 0 {
		c.timeout = 10 * time.Second
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Close ends the calls in flight.
func (c *Client) Close() error { return c.conn.Close() }

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

// do calls one method and translates what it answers.
func do[Req, Resp any](ctx context.Context, c *Client, call func(context.Context, Req, ...grpc.CallOption) (Resp, error), req Req) (Resp, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	resp, err := call(ctx, req)
	return resp, masterpb.FromStatus(err)
}

// CreateVolume makes the volume, or returns the one of that name if it matches, else ErrExists.
// ErrExhausted if no node has room, ErrUnavailable if none of the nodes has a worker.
func (c *Client) CreateVolume(ctx context.Context, spec VolumeSpec) (Volume, error) {
	v, err := do(ctx, c, c.rpc.CreateVolume, masterpb.FromSpec(spec))
	return v.Record(), err
}

// DeleteVolume is idempotent.
func (c *Client) DeleteVolume(ctx context.Context, id string) error {
	_, err := do(ctx, c, c.rpc.DeleteVolume, &masterpb.DeleteVolumeRequest{Id: id})
	return err
}

// Volume returns one volume, or ErrNotFound.
func (c *Client) Volume(ctx context.Context, id string) (Volume, error) {
	v, err := do(ctx, c, c.rpc.GetVolume, &masterpb.GetVolumeRequest{Id: id})
	return v.Record(), err
}

// Volumes returns one page by id: at most max volumes (0 for as many as fit), and the token
// of the next page, "" if this was the last. ErrBadToken if the token is none of ours.
func (c *Client) Volumes(ctx context.Context, max int, token string) (vs []Volume, next string, err error) {
	resp, err := do(ctx, c, c.rpc.ListVolumes, &masterpb.ListVolumesRequest{MaxEntries: int32(min(max, 1<<20)), PageToken: token})
	for _, v := range resp.GetVolumes() {
		vs = append(vs, v.Record())
	}
	return vs, resp.GetNextPageToken(), err
}

// Capacity returns that of a node, ErrNotFound if it has no worker; or for "" that of all.
func (c *Client) Capacity(ctx context.Context, node string) (Capacity, error) {
	resp, err := do(ctx, c, c.rpc.GetCapacity, &masterpb.GetCapacityRequest{Node: node})
	return resp.Record(), err
}

// Workers returns the workers whose lease holds, by node.
func (c *Client) Workers(ctx context.Context) (ws []Worker, err error) {
	resp, err := do(ctx, c, c.rpc.ListWorkers, &masterpb.ListWorkersRequest{})
	for _, w := range resp.GetWorkers() {
		ws = append(ws, w.Record())
	}
	return ws, err
}

// PutMount makes or replaces the mount at its path.
func (c *Client) PutMount(ctx context.Context, m Mount) error {
	_, err := do(ctx, c, c.rpc.PutMount, masterpb.FromMount(m))
	return err
}

// Mounts returns all mounts by path.
func (c *Client) Mounts(ctx context.Context) (ms []Mount, err error) {
	resp, err := do(ctx, c, c.rpc.ListMounts, &masterpb.ListMountsRequest{})
	for _, m := range resp.GetMounts() {
		ms = append(ms, m.Record())
	}
	return ms, err
}

// DeleteMount is idempotent.
func (c *Client) DeleteMount(ctx context.Context, path string) error {
	_, err := do(ctx, c, c.rpc.DeleteMount, &masterpb.DeleteMountRequest{Path: path})
	return err
}

// Status returns the master's own.
func (c *Client) Status(ctx context.Context) (Status, error) {
	resp, err := do(ctx, c, c.rpc.Status, &masterpb.StatusRequest{})
	return resp.Record(), err
}
