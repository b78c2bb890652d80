package master

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/master/inventory"
	"github.com/larderfs/larder/master/masterpb"
	"github.com/larderfs/larder/master/namespace"
	"github.com/larderfs/larder/master/record"
	"github.com/larderfs/larder/master/registry"
)

// server translates messages to records and calls the registry; intercept translates errors.
type server struct {
	masterpb.UnimplementedMasterServer
	reg    *registry.Registry
	asker  *inventory.Asker
	master *Master
	life   context.Context // ends when the master is to end; for calls that last
}

// intercept bounds a call, and makes codes of errors.
func (m *Master) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := handle(ctx, req)
	if err == nil {
		return resp, nil
	}
	err = masterpb.ToStatus(err)
	switch status.Code(err) {
	case codes.Internal, codes.Unavailable:
		m.cfg.Log.Error("call failed", "method", info.FullMethod, "err", err)
	}
	return nil, err
}

func millis(d time.Duration) int64 { return d.Milliseconds() }

func (s *server) RegisterWorker(ctx context.Context, req *masterpb.RegisterWorkerRequest) (*masterpb.RegisterWorkerResponse, error) {
	reg := req.GetWorker().Registration()
	reg.Key = req.GetKey()
	lease, err := s.reg.Register(ctx, reg)
	return &masterpb.RegisterWorkerResponse{LeaseMillis: millis(lease)}, err
}

func (s *server) Heartbeat(ctx context.Context, req *masterpb.HeartbeatRequest) (*masterpb.HeartbeatResponse, error) {
	known, lease, err := s.reg.Heartbeat(ctx, req.GetUuid(), req.GetNode(), req.GetKey(), masterpb.ToBeat(req.GetStats(), req.GetHoldings()))
	return &masterpb.HeartbeatResponse{Unknown: !known, LeaseMillis: millis(lease)}, err
}

func (s *server) ListWorkers(ctx context.Context, req *masterpb.ListWorkersRequest) (*masterpb.ListWorkersResponse, error) {
	ws, err := s.workers(ctx, req.GetGone())
	if err != nil {
		return nil, err
	}
	if req.GetLive() {
		s.asker.Counters(ctx, ws)
	}
	resp := &masterpb.ListWorkersResponse{}
	for _, w := range ws {
		resp.Workers = append(resp.Workers, masterpb.FromWorker(w))
	}
	return resp, nil
}

func (s *server) DrainWorker(ctx context.Context, req *masterpb.DrainWorkerRequest) (*masterpb.DrainWorkerResponse, error) {
	if req.GetUndo() {
		return &masterpb.DrainWorkerResponse{}, s.reg.Undrain(ctx, req.GetNode())
	}
	return &masterpb.DrainWorkerResponse{}, s.reg.Drain(ctx, req.GetNode())
}

// workers are by node, with those that are gone if asked for.
func (s *server) workers(ctx context.Context, gone bool) ([]record.Worker, error) {
	ws, err := s.reg.Workers(ctx)
	if err != nil || !gone {
		return ws, err
	}
	more, err := s.reg.Gone(ctx)
	if err != nil {
		return nil, err
	}
	ws = append(ws, more...)
	slices.SortStableFunc(ws, func(a, b record.Worker) int { return cmp.Compare(a.Node, b.Node) })
	return ws, nil
}

func (s *server) Locate(ctx context.Context, req *masterpb.LocateRequest) (*masterpb.LocateResponse, error) {
	uris, err := inStores(ctx, s.reg, []string{req.GetUri()})
	if err != nil {
		return nil, err
	}
	ws, err := s.workers(ctx, true)
	if err != nil {
		return nil, err
	}
	var all []record.Located
	for _, uri := range uris {
		at, err := record.ParseLocation(uri, req.GetEndpoint())
		if err != nil {
			return nil, err
		}
		for i, l := range s.asker.Held(ctx, ws, at) {
			if len(all) <= i {
				all = append(all, l)
			} else {
				all[i].Add(l)
			}
		}
	}
	resp := &masterpb.LocateResponse{}
	for _, l := range all {
		resp.Workers = append(resp.Workers, masterpb.FromLocated(l))
	}
	return resp, nil
}

// inStores says where what paths of the namespace show lies; URIs stay as they are.
func inStores(ctx context.Context, reg *registry.Registry, written []string) (uris []string, err error) {
	var mounts []record.Mount
	for _, w := range written {
		if !strings.HasPrefix(w, "/") {
			uris = append(uris, w)
			continue
		}
		if mounts == nil {
			t, err := reg.Mounts(ctx)
			if err != nil {
				return nil, err
			}
			mounts = t.Mounts
		}
		of, err := namespace.URIs(mounts, w)
		if err != nil {
			return nil, err
		}
		uris = append(uris, of...)
	}
	return uris, nil
}

func (s *server) DescribeVolume(ctx context.Context, req *masterpb.DescribeVolumeRequest) (*masterpb.VolumeDescription, error) {
	ws, err := s.workers(ctx, true)
	if err != nil {
		return nil, err
	}
	resp := &masterpb.VolumeDescription{}
	for _, v := range s.asker.Volume(ctx, ws, req.GetId()) {
		resp.Nodes = append(resp.Nodes, masterpb.FromVolumeOnNode(v))
	}
	return resp, nil
}

func (s *server) CreateVolume(ctx context.Context, req *masterpb.CreateVolumeRequest) (*masterpb.Volume, error) {
	v, err := s.reg.CreateVolume(ctx, req.Spec())
	return masterpb.FromVolume(v), err
}

func (s *server) DeleteVolume(ctx context.Context, req *masterpb.DeleteVolumeRequest) (*masterpb.DeleteVolumeResponse, error) {
	return &masterpb.DeleteVolumeResponse{}, s.reg.DeleteVolume(ctx, req.GetId())
}

func (s *server) GetVolume(ctx context.Context, req *masterpb.GetVolumeRequest) (*masterpb.Volume, error) {
	v, err := s.reg.Volume(ctx, req.GetId())
	return masterpb.FromVolume(v), err
}

func (s *server) ListVolumes(ctx context.Context, req *masterpb.ListVolumesRequest) (*masterpb.ListVolumesResponse, error) {
	vs, next, err := s.reg.Volumes(ctx, int(req.GetMaxEntries()), req.GetPageToken())
	resp := &masterpb.ListVolumesResponse{NextPageToken: next}
	for _, v := range vs {
		resp.Volumes = append(resp.Volumes, masterpb.FromVolume(v))
	}
	return resp, err
}

func (s *server) GetCapacity(ctx context.Context, req *masterpb.GetCapacityRequest) (*masterpb.Capacity, error) {
	c, err := s.reg.Capacity(ctx, req.GetNode())
	return masterpb.FromCapacity(c), err
}

// errObjects is why mounts are not changed by calls where they are those of Kubernetes objects: whoever
// reaches this port could else give himself a mount, and who may change objects the cluster knows.
var errObjects = fmt.Errorf("mounts are those of the cluster's Mount objects here (--mount-objects): kubectl apply one, or run larder mount with --kubeconfig: %w", record.ErrRefused)

func (s *server) PutMount(ctx context.Context, req *masterpb.Mount) (*masterpb.PutMountResponse, error) {
	m := req.Record()
	m.Object = ""
	if s.master.cfg.MountObjects {
		return nil, errObjects
	}
	return &masterpb.PutMountResponse{}, s.reg.PutMount(ctx, m)
}

func (s *server) ListMounts(ctx context.Context, _ *masterpb.ListMountsRequest) (*masterpb.ListMountsResponse, error) {
	t, err := s.reg.Mounts(ctx)
	return &masterpb.ListMountsResponse{Mounts: masterpb.FromTable(t).GetMounts()}, err
}

func (s *server) DeleteMount(ctx context.Context, req *masterpb.DeleteMountRequest) (*masterpb.DeleteMountResponse, error) {
	if s.master.cfg.MountObjects {
		return nil, errObjects
	}
	return &masterpb.DeleteMountResponse{}, s.reg.DeleteMount(ctx, req.GetPath())
}

// FollowMounts ends with the master, or its stop would wait for those who follow.
func (s *server) FollowMounts(_ *masterpb.FollowMountsRequest, stream grpc.ServerStreamingServer[masterpb.MountTable]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	err := s.reg.FollowMounts(ctx, func(t record.Table) error { return stream.Send(masterpb.FromTable(t)) })
	return masterpb.ToStatus(err)
}

func (s *server) RestoreMounts(ctx context.Context, req *masterpb.MountTable) (*masterpb.RestoreMountsResponse, error) {
	return &masterpb.RestoreMountsResponse{}, s.reg.RestoreMounts(ctx, req.Record())
}

func (s *server) CreateJob(ctx context.Context, req *masterpb.CreateJobRequest) (*masterpb.Job, error) {
	j, err := s.master.CreateJob(ctx, req.Spec())
	return masterpb.FromJob(j), err
}

func (s *server) GetJob(ctx context.Context, req *masterpb.GetJobRequest) (*masterpb.Job, error) {
	j, err := s.reg.Job(ctx, req.GetId())
	return masterpb.FromJob(j), err
}

func (s *server) ListJobs(ctx context.Context, _ *masterpb.ListJobsRequest) (*masterpb.ListJobsResponse, error) {
	js, err := s.reg.Jobs(ctx)
	resp := &masterpb.ListJobsResponse{}
	for _, j := range js {
		resp.Jobs = append(resp.Jobs, masterpb.FromJob(j))
	}
	return resp, err
}

func (s *server) CancelJob(ctx context.Context, req *masterpb.CancelJobRequest) (*masterpb.CancelJobResponse, error) {
	return &masterpb.CancelJobResponse{}, s.reg.CancelJob(ctx, req.GetId())
}

func (s *server) Work(ctx context.Context, req *masterpb.WorkRequest) (*masterpb.WorkResponse, error) {
	todo, revision, err := s.reg.Work(ctx, req.GetUuid(), req.GetNode(), req.GetKey(), req.GetRevision())
	resp := &masterpb.WorkResponse{Revision: revision}
	for _, j := range todo {
		resp.Jobs = append(resp.Jobs, masterpb.FromJob(j))
	}
	return resp, err
}

func (s *server) ReportJob(ctx context.Context, req *masterpb.ReportJobRequest) (*masterpb.ReportJobResponse, error) {
	canceled, err := s.reg.ReportJob(ctx, req.GetUuid(), req.GetKey(), req.GetId(), req.GetNode().Record())
	return &masterpb.ReportJobResponse{Canceled: canceled}, err
}

func (s *server) Status(ctx context.Context, _ *masterpb.StatusRequest) (*masterpb.MasterStatus, error) {
	st, err := s.reg.Status(ctx)
	st.Version, st.PID, st.Started = s.master.cfg.Version, os.Getpid(), s.master.started
	st.Embedded = len(s.master.cfg.EtcdEndpoints) == 0
	return masterpb.FromMasterStatus(st), err
}
