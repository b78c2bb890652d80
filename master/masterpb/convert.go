// Package masterpb is the master's protocol: generated from master.proto, and here the one
// place where its messages and codes become the types and errors of package record.
package masterpb

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/larderfs/larder/master/record"
)

// codeOf is the whole mapping, in both directions; what it does not list is Internal.
var codeOf = []struct {
	err  error
	code codes.Code
}{
	{record.ErrInvalid, codes.InvalidArgument},
	{record.ErrNotFound, codes.NotFound},
	{record.ErrExists, codes.AlreadyExists},
	{record.ErrExhausted, codes.ResourceExhausted},
	{record.ErrBadToken, codes.OutOfRange},
	{record.ErrUnavailable, codes.Unavailable},
	{record.ErrRefused, codes.FailedPrecondition},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// ToStatus makes the error that goes over the wire.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	for _, row := range codeOf {
		if errors.Is(err, row.err) {
			return status.Error(row.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}

// FromStatus makes an error that has the server's text and wraps the sentinel. A master that
// did not answer in time is unavailable too.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	for _, row := range codeOf {
		if s.Code() != row.code {
			continue
		}
		if row.code == codes.DeadlineExceeded {
			return &remoteError{s.Message(), []error{row.err, record.ErrUnavailable}}
		}
		return &remoteError{s.Message(), []error{row.err}}
	}
	return &remoteError{s.Message(), nil}
}

type remoteError struct {
	text  string
	wraps []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.wraps }

// FromVolume and the functions below convert between messages and records.
func FromVolume(v record.Volume) *Volume {
	return &Volume{
		Id: v.ID, Name: v.Name, Parameters: v.Parameters, CapacityBytes: v.CapacityBytes, Node: v.Node,
		Created: fromTime(v.Created), PublishedNodes: v.PublishedNodes,
	}
}

// Record is the volume that the message tells about; a nil message is the zero volume.
func (x *Volume) Record() record.Volume {
	return record.Volume{
		ID: x.GetId(), Name: x.GetName(), Parameters: x.GetParameters(), CapacityBytes: x.GetCapacityBytes(), Node: x.GetNode(),
		Created: toTime(x.GetCreated()), PublishedNodes: x.GetPublishedNodes(),
	}
}

// FromSpec makes the request for a volume.
func FromSpec(s record.VolumeSpec) *CreateVolumeRequest {
	return &CreateVolumeRequest{
		Name: s.Name, Parameters: s.Parameters, CapacityBytes: s.CapacityBytes, LimitBytes: s.LimitBytes, Nodes: s.Nodes,
	}
}

// Spec is the inverse of FromSpec.
func (x *CreateVolumeRequest) Spec() record.VolumeSpec {
	return record.VolumeSpec{
		Name: x.GetName(), Parameters: x.GetParameters(), CapacityBytes: x.GetCapacityBytes(), LimitBytes: x.GetLimitBytes(), Nodes: x.GetNodes(),
	}
}

// FromRegistration leaves the fields of Worker empty that the master sets. The key is not in it.
func FromRegistration(r record.Registration) *Worker {
	w := &Worker{Uuid: r.UUID, Node: r.Node, Version: r.Version, CapacityBytes: r.CapacityBytes, Addresses: r.Addresses}
	for _, p := range r.Volumes {
		w.Volumes = append(w.Volumes, &PublishedVolume{Volume: FromVolume(p.Volume), Inline: p.Inline, Pods: fromPods(p.Pods)})
	}
	return w
}

// Registration is the inverse of FromRegistration.
func (x *Worker) Registration() record.Registration {
	r := record.Registration{
		UUID: x.GetUuid(), Node: x.GetNode(), Version: x.GetVersion(), CapacityBytes: x.GetCapacityBytes(), Addresses: x.GetAddresses(),
	}
	for _, p := range x.GetVolumes() {
		r.Volumes = append(r.Volumes, record.Published{Volume: p.GetVolume().Record(), Inline: p.GetInline(), Pods: toPods(p.GetPods())})
	}
	return r
}

// FromWorker makes the whole message.
func FromWorker(w record.Worker) *Worker {
	x := FromRegistration(w.Registration)
	x.Registered, x.Seen, x.ReservedBytes = fromTime(w.Registered), fromTime(w.Seen), w.ReservedBytes
	x.Stats, x.Holdings = FromBeat(w.Beat)
	x.Gone, x.Unanswered, x.Drained = w.Gone, w.Unanswered, fromTime(w.Drained)
	return x
}

// Record is the inverse of FromWorker.
func (x *Worker) Record() record.Worker {
	return record.Worker{
		Registration: x.Registration(), Beat: ToBeat(x.GetStats(), x.GetHoldings()),
		Registered: toTime(x.GetRegistered()), Seen: toTime(x.GetSeen()), ReservedBytes: x.GetReservedBytes(),
		Gone: x.GetGone(), Unanswered: x.GetUnanswered(), Drained: toTime(x.GetDrained()),
	}
}

// FromBeat makes the two messages that a beat is on the wire.
func FromBeat(b record.Beat) (*WorkerStats, []*Holding) {
	var hs []*Holding
	for _, h := range b.Holdings {
		hs = append(hs, &Holding{VolumeId: h.VolumeID, CachedBytes: h.CachedBytes, Objects: h.Objects})
	}
	return FromStats(b.Stats), hs
}

// FromStats makes the message.
func FromStats(s record.Stats) *WorkerStats {
	return &WorkerStats{
		CachedBytes: s.CachedBytes, Objects: s.Objects, CompleteObjects: s.CompleteObjects,
		ReadRequests: s.ReadRequests, ReadBytes: s.ReadBytes, FetchedBytes: s.FetchedBytes,
		HitChunks: s.HitChunks, MissChunks: s.MissChunks, EvictedBytes: s.EvictedBytes,
		Mounts: s.Mounts, Started: fromTime(s.Started),
	}
}

// Record is the inverse of FromStats; a nil message is the zero value.
func (x *WorkerStats) Record() record.Stats {
	return record.Stats{
		CachedBytes: x.GetCachedBytes(), Objects: x.GetObjects(), CompleteObjects: x.GetCompleteObjects(),
		ReadRequests: x.GetReadRequests(), ReadBytes: x.GetReadBytes(), FetchedBytes: x.GetFetchedBytes(),
		HitChunks: x.GetHitChunks(), MissChunks: x.GetMissChunks(), EvictedBytes: x.GetEvictedBytes(),
		Mounts: x.GetMounts(), Started: toTime(x.GetStarted()),
	}
}

// FromHeld makes the message of what the worker with that UUID holds.
func FromHeld(uuid string, h record.Held) *HeldResponse {
	return &HeldResponse{Uuid: uuid, CachedBytes: h.CachedBytes, Objects: h.Objects, CompleteObjects: h.CompleteObjects, Stores: h.Stores}
}

// Record is the inverse of FromHeld.
func (x *HeldResponse) Record() record.Held {
	return record.Held{CachedBytes: x.GetCachedBytes(), Objects: x.GetObjects(), CompleteObjects: x.GetCompleteObjects(), Stores: x.GetStores()}
}

// FromMountedVolume makes the message of what the worker with that UUID says.
func FromMountedVolume(uuid string, v record.MountedVolume) *MountedVolume {
	return &MountedVolume{
		Uuid: uuid, Parameters: v.Parameters, Inline: v.Inline, Namespace: v.Namespace, Claim: v.Claim,
		Mounted: fromTime(v.Mounted), Takeovers: v.Takeovers, LongestStallMillis: v.LongestStall.Milliseconds(), Trouble: v.Trouble,
		Without: v.Without, OpenFiles: v.OpenFiles, Counted: fromTime(v.Counted),
		DiskBytes: v.DiskBytes, MemoryBytes: v.MemoryBytes, StoreBytes: v.StoreBytes, PassedBytes: v.PassedBytes,
		FetchedBytes: v.FetchedBytes, HitChunks: v.HitChunks, MissChunks: v.MissChunks,
	}
}

// Record is the inverse of FromMountedVolume.
func (x *MountedVolume) Record() record.MountedVolume {
	return record.MountedVolume{
		Parameters: x.GetParameters(), Inline: x.GetInline(), Namespace: x.GetNamespace(), Claim: x.GetClaim(),
		Mounted: toTime(x.GetMounted()), Takeovers: x.GetTakeovers(), LongestStall: time.Duration(x.GetLongestStallMillis()) * time.Millisecond,
		Trouble: x.GetTrouble(), Without: x.GetWithout(), OpenFiles: x.GetOpenFiles(), Counted: toTime(x.GetCounted()),
		DiskBytes: x.GetDiskBytes(), MemoryBytes: x.GetMemoryBytes(), StoreBytes: x.GetStoreBytes(), PassedBytes: x.GetPassedBytes(),
		FetchedBytes: x.GetFetchedBytes(), HitChunks: x.GetHitChunks(), MissChunks: x.GetMissChunks(),
	}
}

// FromVolumeOnNode makes the message.
func FromVolumeOnNode(v record.VolumeOnNode) *VolumeOnNode {
	x := &VolumeOnNode{Node: v.Node, Uuid: v.UUID, Pods: fromPods(v.Pods), Unanswered: v.Unanswered}
	if v.Unanswered == "" {
		x.Volume = FromMountedVolume(v.UUID, v.Volume)
	}
	return x
}

// Record is the inverse of FromVolumeOnNode.
func (x *VolumeOnNode) Record() record.VolumeOnNode {
	return record.VolumeOnNode{Node: x.GetNode(), UUID: x.GetUuid(), Pods: toPods(x.GetPods()), Volume: x.GetVolume().Record(), Unanswered: x.GetUnanswered()}
}

func fromPods(pods []record.Pod) (xs []*Pod) {
	for _, p := range pods {
		xs = append(xs, &Pod{Namespace: p.Namespace, Name: p.Name, Uid: p.UID})
	}
	return xs
}

func toPods(xs []*Pod) (pods []record.Pod) {
	for _, x := range xs {
		pods = append(pods, record.Pod{Namespace: x.GetNamespace(), Name: x.GetName(), UID: x.GetUid()})
	}
	return pods
}

// FromLocated makes the message.
func FromLocated(l record.Located) *Located {
	return &Located{Node: l.Node, Uuid: l.UUID, Addresses: l.Addresses, Held: FromHeld(l.UUID, l.Held), Unanswered: l.Unanswered}
}

// Record is the inverse of FromLocated.
func (x *Located) Record() record.Located {
	return record.Located{Node: x.GetNode(), UUID: x.GetUuid(), Addresses: x.GetAddresses(), Held: x.GetHeld().Record(), Unanswered: x.GetUnanswered()}
}

// ToBeat is the inverse of FromBeat.
func ToBeat(s *WorkerStats, hs []*Holding) record.Beat {
	b := record.Beat{Stats: s.Record()}
	for _, h := range hs {
		b.Holdings = append(b.Holdings, record.Holding{VolumeID: h.GetVolumeId(), CachedBytes: h.GetCachedBytes(), Objects: h.GetObjects()})
	}
	return b
}

// FromCapacity makes the message.
func FromCapacity(c record.Capacity) *Capacity {
	return &Capacity{
		CapacityBytes: c.CapacityBytes, ReservedBytes: c.ReservedBytes, AvailableBytes: c.AvailableBytes, LargestBytes: c.LargestBytes,
	}
}

// Record is the inverse of FromCapacity.
func (x *Capacity) Record() record.Capacity {
	return record.Capacity{
		CapacityBytes: x.GetCapacityBytes(), ReservedBytes: x.GetReservedBytes(), AvailableBytes: x.GetAvailableBytes(), LargestBytes: x.GetLargestBytes(),
	}
}

// FromMount makes the message.
func FromMount(m record.Mount) *Mount {
	return &Mount{Path: m.Path, Uri: m.URI, Options: m.Options, ReadOnly: m.ReadOnly, Credential: m.Credential,
		AllowInline: m.AllowInline, AllowClass: m.AllowClass, Object: m.Object}
}

// Record is the inverse of FromMount.
func (x *Mount) Record() record.Mount {
	return record.Mount{Path: x.GetPath(), URI: x.GetUri(), Options: x.GetOptions(), ReadOnly: x.GetReadOnly(), Credential: x.GetCredential(),
		AllowInline: x.GetAllowInline(), AllowClass: x.GetAllowClass(), Object: x.GetObject()}
}

// FromTable makes the message.
func FromTable(t record.Table) *MountTable {
	x := &MountTable{Id: t.ID}
	for _, m := range t.Mounts {
		x.Mounts = append(x.Mounts, FromMount(m))
	}
	return x
}

// Record is the inverse of FromTable.
func (x *MountTable) Record() record.Table {
	t := record.Table{ID: x.GetId()}
	for _, m := range x.GetMounts() {
		t.Mounts = append(t.Mounts, m.Record())
	}
	return t
}

// FromJobSpec makes the request for a job.
func FromJobSpec(s record.JobSpec) *CreateJobRequest {
	return &CreateJobRequest{Kind: string(s.Kind), Uris: s.URIs, Endpoint: s.Endpoint, Nodes: s.Nodes, All: s.All}
}

// Spec is the inverse of FromJobSpec.
func (x *CreateJobRequest) Spec() record.JobSpec {
	return record.JobSpec{Kind: record.JobKind(x.GetKind()), URIs: x.GetUris(), Endpoint: x.GetEndpoint(), Nodes: x.GetNodes(), All: x.GetAll()}
}

// FromJob makes the message.
func FromJob(j record.Job) *Job {
	x := &Job{Id: j.ID, Kind: string(j.Kind), Uris: j.URIs, Endpoint: j.Endpoint, Named: j.Named, Canceled: j.Canceled, Created: fromTime(j.Created)}
	for _, n := range j.Nodes {
		x.Nodes = append(x.Nodes, FromJobNode(n))
	}
	return x
}

// Record is the inverse of FromJob.
func (x *Job) Record() record.Job {
	j := record.Job{ID: x.GetId(), Kind: record.JobKind(x.GetKind()), URIs: x.GetUris(), Endpoint: x.GetEndpoint(), Named: x.GetNamed(),
		Canceled: x.GetCanceled(), Created: toTime(x.GetCreated())}
	for _, n := range x.GetNodes() {
		j.Nodes = append(j.Nodes, n.Record())
	}
	return j
}

// FromJobNode makes the message.
func FromJobNode(n record.JobNode) *JobNode {
	return &JobNode{
		Node: n.Node, State: string(n.State), Uri: int64(n.URI), After: n.After, Files: n.Files, Bytes: n.Bytes,
		PresentFiles: n.PresentFiles, FailedFiles: n.FailedFiles, Error: n.Error, Started: fromTime(n.Started), Updated: fromTime(n.Updated),
	}
}

// Record is the inverse of FromJobNode.
func (x *JobNode) Record() record.JobNode {
	return record.JobNode{
		Node: x.GetNode(), State: record.JobState(x.GetState()), URI: int(x.GetUri()), After: x.GetAfter(), Files: x.GetFiles(), Bytes: x.GetBytes(),
		PresentFiles: x.GetPresentFiles(), FailedFiles: x.GetFailedFiles(), Error: x.GetError(), Started: toTime(x.GetStarted()), Updated: toTime(x.GetUpdated()),
	}
}

// FromMasterStatus makes the message.
func FromMasterStatus(s record.Status) *MasterStatus {
	return &MasterStatus{
		Version: s.Version, Pid: int64(s.PID), Started: fromTime(s.Started), Embedded: s.Embedded, StoreBytes: s.StoreBytes,
		StoreRevision: s.StoreRevision, Workers: s.Workers, Volumes: s.Volumes, Mounts: s.Mounts,
	}
}

// Record is the inverse of FromMasterStatus.
func (x *MasterStatus) Record() record.Status {
	return record.Status{
		Version: x.GetVersion(), PID: int(x.GetPid()), Started: toTime(x.GetStarted()), Embedded: x.GetEmbedded(), StoreBytes: x.GetStoreBytes(),
		StoreRevision: x.GetStoreRevision(), Workers: x.GetWorkers(), Volumes: x.GetVolumes(), Mounts: x.GetMounts(),
	}
}

// fromTime and toTime keep the zero time, which has no timestamp, apart from the epoch.
func fromTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func toTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}
