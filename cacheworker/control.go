package cacheworker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/cacheworker/tiers"
	"github.com/larderfs/larder/cacheworker/workerpb"
)

func isGone(err error) bool {
	return errors.Is(err, object.ErrChanged) || errors.Is(err, object.ErrNotFound)
}

// control answers what is asked about the worker itself.
type control struct {
	workerpb.UnimplementedWorkerServer
	w *Worker
}

// serveControl leaves the socket's file when it ends: at a hand-over it is the next worker's by then.
func serveControl(ctx context.Context, l net.Listener, w *Worker) error {
	s := grpc.NewServer(w.cfg.Tracer.ServerOptions()...)
	workerpb.RegisterWorkerServer(s, control{w: w})
	defer context.AfterFunc(ctx, s.Stop)()
	if err := s.Serve(identified{l}); err != nil && ctx.Err() == nil {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// Status implements workerpb.WorkerServer.
func (c control) Status(context.Context, *workerpb.StatusRequest) (*workerpb.WorkerStatus, error) {
	w := c.w
	s, f, r := w.store.Stats(), w.fills.Stats(), &w.requests
	out := &workerpb.WorkerStatus{
		Uuid: w.store.UUID().String(), Version: w.cfg.Version, Pid: int64(os.Getpid()), Started: timestamppb.New(w.started),
		CachedBytes: s.CachedBytes, UnlinkedBytes: s.UnlinkedBytes, CapacityBytes: s.CapacityBytes,
		Objects: int64(s.Objects), CompleteObjects: int64(s.CompleteObjects),
		ReadRequests: w.counters.Reads.Load(), ReadBytes: w.counters.ReadBytes.Load(),
		HitChunks: uint64(f.HitChunks), MissChunks: uint64(f.MissChunks), FetchedBytes: uint64(r.Bytes.Load()),
		ListRequests: uint64(r.Lists.Load()), HeadRequests: uint64(r.Heads.Load()), GetRequests: uint64(r.Gets.Load()),
		Evictions: uint64(s.Evictions), EvictedBytes: uint64(s.EvictedBytes), ResentRequests: w.counters.Resent.Load(),
		ReadingIndex: s.Reading, UnverifiedBytes: s.UnverifiedBytes, BadChunks: uint64(s.BadChunks), CacheErrors: uint64(s.PutErrors),
		AheadBytes: f.AheadBytes, AheadReadBytes: f.ForeseenBytes, AheadWastedBytes: f.WastedBytes,
	}
	for _, t := range w.store.Tiers() {
		out.Tiers = append(out.Tiers, tierStatus(t))
	}
	w.mounts.mu.Lock()
	out.Takeovers = w.mounts.takeovers
	w.mounts.mu.Unlock()
	pass, resend := !w.cfg.Features.NoPassthrough && w.cfg.hasViews(), !w.cfg.Features.NoResend
	for id, h := range w.mounts.all() {
		out.Volumes = append(out.Volumes, volumeStatus(id, h))
		pass, resend = pass && h.Passthrough(), resend && h.Resend()
	}
	out.Features = []*workerpb.Feature{
		{Name: "passthrough", Available: pass, Reason: reason(pass, "the kernel (6.9 or later), --view, or a flag")},
		{Name: "resend", Available: resend, Reason: reason(resend, "the kernel (6.9 or later), or a flag")},
		{Name: "splice", Available: !w.cfg.Features.NoSplice, Reason: reason(!w.cfg.Features.NoSplice, "a flag")},
	}
	return out, nil
}

func tierStatus(t tiers.Status) *workerpb.TierStatus {
	out := &workerpb.TierStatus{
		Dir: t.Dir, Kind: t.Kind.String(), Healthy: t.Healthy, CachedBytes: t.CachedBytes, UnlinkedBytes: t.UnlinkedBytes, CapacityBytes: t.CapacityBytes,
		PinnedBytes: t.PinnedBytes, Objects: int64(t.Objects), EvictedBytes: uint64(t.EvictedBytes), ReceivedBytes: uint64(t.ReceivedBytes),
	}
	if t.Err != nil {
		out.Error = t.Err.Error()
	}
	return out
}

func reason(available bool, lacks string) string {
	if available {
		return ""
	}
	return "not offered by " + lacks
}

const troubleFresh = time.Minute // a failure that is older says nothing of now

func volumeStatus(id string, h *held) *workerpb.VolumeStatus {
	nodes, open := h.Stats()
	trouble := h.Trouble(troubleFresh)
	return &workerpb.VolumeStatus{VolumeId: id, Healthy: trouble == "", Condition: trouble, Nodes: uint64(nodes), OpenHandles: uint64(open), Without: h.without()}
}

// without names the features that the mount does without.
func (h *held) without() (names []string) {
	if !h.Resend() {
		names = append(names, "resend")
	}
	if !h.Passthrough() {
		names = append(names, "passthrough")
	}
	return names
}

// Volume implements workerpb.WorkerServer.
func (c control) Volume(ctx context.Context, req *workerpb.VolumeRequest) (*workerpb.VolumeStatus, error) {
	h := c.w.mounts.get(req.GetVolumeId())
	if h == nil {
		return nil, status.Errorf(codes.NotFound, "volume %q is not served here", req.GetVolumeId())
	}
	out := volumeStatus(req.GetVolumeId(), h)
	s := c.w.store.Stats()
	out.UsedBytes, out.TotalBytes = s.CachedBytes, s.CapacityBytes
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	out.Healthy, out.Condition = true, "" // it is asked, whatever readers were told
	if err := (socketVolume{c.w.mounts, h}).dataset().Check(ctx); err != nil {
		out.Healthy, out.Condition = false, err.Error()
	}
	return out, nil
}

const healthTimeout = 5 * time.Second
