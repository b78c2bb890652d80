package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/workerpb"
)

// Stats asks the worker about a volume it serves; object.ErrNotFound if it serves no such.
type Stats interface {
	VolumeStats(ctx context.Context, volumeID string) (VolumeStats, error)
	// Troubles are what last went wrong for readers of volumes, by id, where that was a moment
	// ago. No store is asked.
	Troubles(ctx context.Context) (map[string]string, error)
	// TellUsers tells the worker the pods that its volumes are published to, by volume; it
	// forgets what it was told before.
	TellUsers(ctx context.Context, of map[string][]Pod) error
	// Mounted says whether somebody may use what is mounted at a path of the namespace: else
	// object.ErrDenied or ErrNotFound, in words that say what to do.
	Mounted(ctx context.Context, path string, who Who) (Mounted, error)
}

// VolumeStats is what a worker knows of a volume.
type VolumeStats struct {
	CachedBytes int64
	TotalBytes  int64 // of the files seen so far
	Healthy     bool
	Condition   string // why not
}

// WorkerStats asks a worker over its control socket.
type WorkerStats struct{ Conn grpc.ClientConnInterface }

// VolumeStats implements [Stats].
func (w WorkerStats) VolumeStats(ctx context.Context, volumeID string) (VolumeStats, error) {
	r, err := workerpb.NewWorkerClient(w.Conn).Volume(ctx, &workerpb.VolumeRequest{VolumeId: volumeID})
	switch status.Code(err) {
	case codes.OK:
		return VolumeStats{CachedBytes: r.GetUsedBytes(), TotalBytes: r.GetTotalBytes(), Healthy: r.GetHealthy(), Condition: r.GetCondition()}, nil
	case codes.NotFound:
		return VolumeStats{}, fmt.Errorf("the worker serves no volume %s: %w", quote(volumeID), object.ErrNotFound)
	case codes.DeadlineExceeded, codes.Canceled:
		if ctx.Err() != nil {
			return VolumeStats{}, fmt.Errorf("ask the worker: %w", context.Cause(ctx))
		}
	}
	return VolumeStats{}, fmt.Errorf("ask the worker: %s: %w", status.Convert(err).Message(), object.ErrUnavailable)
}

// Troubles implements [Stats].
func (w WorkerStats) Troubles(ctx context.Context) (map[string]string, error) {
	r, err := workerpb.NewWorkerClient(w.Conn).Status(ctx, &workerpb.StatusRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask the worker: %s: %w", status.Convert(err).Message(), object.ErrUnavailable)
	}
	troubles := map[string]string{}
	for _, v := range r.GetVolumes() {
		if !v.GetHealthy() {
			troubles[v.GetVolumeId()] = v.GetCondition()
		}
	}
	return troubles, nil
}

// NodeGetVolumeStats reports bytes cached of bytes seen. What is available is reported as
// what is there: a dataset that is read-only cannot fill up, and nobody shall be woken for it.
func (n *node) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	id := req.GetVolumeId()
	if err := checkID(id); err != nil {
		return nil, err
	}
	if req.GetVolumePath() == "" {
		return nil, fmt.Errorf("volume_path: missing: %w", object.ErrInvalid)
	}
	v, err := n.look(ctx)
	if err != nil {
		return nil, err
	}
	if !v.shows(id, req.GetVolumePath()) || req.GetStagingTargetPath() != "" && !v.shows(id, req.GetStagingTargetPath()) {
		switch path, sure := n.deadAt(ctx, v, id, req.GetVolumePath(), req.GetStagingTargetPath()); {
		case sure:
			return nil, fmt.Errorf("volume %s: %s: %w", quote(id), deadMount(path), errUnknown)
		case path != "":
			return nil, fmt.Errorf("volume %s: no worker has given the mount at %s back to the broker: %w", quote(id), path, object.ErrUnavailable)
		}
		return nil, fmt.Errorf("volume_path: volume %s is not at %s: %w", quote(id), quote(req.GetVolumePath()), errUnknown)
	}
	s, err := n.stats.VolumeStats(ctx, id)
	if errors.Is(err, object.ErrNotFound) {
		return nil, fmt.Errorf("volume %s is mounted, but its worker has not taken it yet: %w", quote(id), object.ErrUnavailable)
	}
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: s.TotalBytes, Used: s.CachedBytes, Available: s.TotalBytes},
	}}, nil
}

// deadAt is the first of paths with a FUSE mount that the broker does not hold. It was lost, unless the worker
// has yet to give it back to the broker: sure says that it has not, and cannot.
func (n *node) deadAt(ctx context.Context, v view, id string, paths ...string) (path string, sure bool) {
	for _, p := range paths {
		if checkPath("", p) != nil {
			continue
		}
		if p, err := resolve("", p); err == nil && v.dead(p) {
			path = p
			break
		}
	}
	if path == "" {
		return "", false
	}
	if m, held := v.volume(id); held && v.live(m) { // it was mounted anew: a volume has one mount
		return path, true
	}
	_, err := n.stats.VolumeStats(ctx, id)
	return path, errors.Is(err, object.ErrNotFound)
}

func deadMount(path string) string {
	return "the mount at " + path + " is dead: its cache worker and the node plugin had both died, or it was given up; its pods must be started again"
}

// shows reports whether the volume is mounted or published at a path.
func (v view) shows(id, path string) bool {
	m, ok := v.volume(id)
	if !ok || checkPath("", path) != nil {
		return false
	}
	path, err := resolve("", path)
	p, mounted := v.table.At(path)
	return err == nil && mounted && v.is(p, m)
}

func (n *node) NodeGetVolumeHealth(ctx context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	id := req.GetVolumeId()
	if err := checkID(id); err != nil {
		return nil, err
	}
	v, err := n.look(ctx)
	if err != nil {
		return nil, err
	}
	broken, err := n.health.mustRestart(ctx, id)
	if err != nil {
		return nil, err
	}
	m, ok := v.volume(id)
	dead, sure := n.deadAt(ctx, v, id, req.GetVolumePublishPath(), req.GetStagingTargetPath())
	if !ok && len(broken) == 0 && dead == "" {
		return nil, fmt.Errorf("volume %s is not on this node: %w", quote(id), errUnknown)
	}
	h := &csi.VolumeHealth{VolumeId: id}
	ill := func(status csi.VolumeHealthErrorType, reason, message string) {
		h.HealthStatuses = append(h.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{Status: status, Reason: reason, Message: message})
	}
	switch {
	case len(broken) > 0:
		ill(csi.VolumeHealthErrorType_INACCESSIBLE, "MountLost", "the mount was lost; must be started again: "+list(broken))
	case sure:
		ill(csi.VolumeHealthErrorType_INACCESSIBLE, "MountLost", deadMount(dead))
	case dead != "":
		ill(csi.VolumeHealthErrorType_DEGRADED, "WorkerAway", "no worker has given the mount at "+dead+" back to the broker; reads wait, or fail if it was given up")
	}
	if !ok {
		return &csi.NodeGetVolumeHealthResponse{VolumeHealth: h}, nil
	}
	s, err := n.stats.VolumeStats(ctx, id)
	switch {
	case !v.live(m):
		ill(csi.VolumeHealthErrorType_INACCESSIBLE, "Unmounted", "the volume's mount at "+m.Path+" is gone; its pods must be started again")
	case !m.Served || err != nil:
		ill(csi.VolumeHealthErrorType_DEGRADED, "WorkerAway", "no worker serves the volume now; reads of what is not in the page cache wait")
	case !s.Healthy:
		ill(csi.VolumeHealthErrorType_DEGRADED, "SourceFailing", s.Condition)
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: h}, nil
}

func list(pods []Pod) string {
	var names []string
	for _, p := range pods {
		names = append(names, p.String())
	}
	return strings.Join(names, ", ")
}

// NodeGetStorageHealth tells of the cache of this node, on which every volume of it depends.
func (n *node) NodeGetStorageHealth(ctx context.Context, _ *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	r := &csi.NodeGetStorageHealthResponse{}
	if err := n.ready(ctx); err != nil {
		r.BackendHealth = append(r.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
			Status:  csi.StorageHealthErrorType_STORAGE_UNREACHABLE,
			Reason:  "NotReady",
			Message: "no volume can be published on this node now: " + err.Error(),
		})
	}
	return r, nil
}
