package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/client"
)

// Volumes is the cluster's memory of volumes: the master, by its client. Errors wrap the
// sentinels of package client.
type Volumes interface {
	// CreateVolume is idempotent by name; ErrExists if the volume differs from the spec.
	CreateVolume(ctx context.Context, spec client.VolumeSpec) (client.Volume, error)
	// DeleteVolume of the unknown is no error.
	DeleteVolume(ctx context.Context, id string) error
	Volume(ctx context.Context, id string) (client.Volume, error)
	// Volumes returns one page of at most max (0: as many as fit) and the next page's token.
	Volumes(ctx context.Context, max int, token string) ([]client.Volume, string, error)
	// Capacity is that of a node (ErrNotFound without a worker) or, for "", of all.
	Capacity(ctx context.Context, node string) (client.Capacity, error)
	Workers(ctx context.Context) ([]client.Worker, error)
	// Mounts is the mount table of the namespace.
	Mounts(ctx context.Context) ([]client.Mount, error)
}

// unlimited is the capacity of a class whose volumes reserve nothing: more than anybody asks.
const unlimited = 1 << 60

type controller struct {
	csi.UnimplementedControllerServer
	rules   rules
	volumes Volumes
}

var controllerCapabilities = []csi.ControllerServiceCapability_RPC_Type{
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
	csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
	csi.ControllerServiceCapability_RPC_GET_VOLUME,
	csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER, // ReadWriteOncePod: see node.checkSingle
}

func (c *controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	r := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range controllerCapabilities {
		r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}},
		})
	}
	return r, nil
}

func (c *controller) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if req.GetName() == "" {
		return nil, fmt.Errorf("name: missing: %w", object.ErrInvalid)
	}
	if err := checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return nil, err
	}
	if req.GetVolumeContentSource() != nil {
		return nil, fmt.Errorf("volume_content_source: a volume is a view of its source; leave it out: %w", object.ErrInvalid)
	}
	if len(req.GetMutableParameters()) > 0 {
		return nil, fmt.Errorf("mutable_parameters: none are supported; use the parameters of the StorageClass: %w", object.ErrInvalid)
	}
	q, err := c.parse("", req.GetParameters(), req.GetSecrets())
	if err != nil {
		return nil, err
	}
	if err := c.checkMounted(ctx, q.Path, req.GetParameters()); err != nil {
		return nil, err
	}
	spec, err := c.spec(ctx, req, q)
	if err != nil {
		return nil, err
	}
	v, err := c.volumes.CreateVolume(ctx, spec)
	switch {
	case errors.Is(err, client.ErrExists):
		return nil, fmt.Errorf("volume %s exists with other parameters, another capacity or on another node; delete it or use another name: %w", quote(req.GetName()), err)
	case errors.Is(err, client.ErrExhausted):
		return nil, fmt.Errorf("capacity_range: none of the nodes %v can keep %d bytes of its cache free for volume %s: %w", spec.Nodes, spec.CapacityBytes, quote(req.GetName()), err)
	case err != nil:
		return nil, fmt.Errorf("create volume %s: %w", quote(req.GetName()), err)
	}
	out := toCSI(v)
	out.VolumeContext = withClaim(out.VolumeContext, req.GetParameters())
	return &csi.CreateVolumeResponse{Volume: out}, nil
}

// withClaim adds whose volume it is, which is no parameter of the volume: the master does not know it.
func withClaim(volumeContext, parameters map[string]string) map[string]string {
	out := map[string]string{}
	maps.Copy(out, volumeContext)
	for _, k := range []string{keyClaimNamespace, keyClaimName} {
		if v := parameters[k]; v != "" {
			out[k] = v
		}
	}
	return out
}

// parse is for the parameters of StorageClasses.
func (c *controller) parse(id string, parameters, secrets map[string]string) (request, error) {
	q, err := c.rules.parse(id, parameters, secrets)
	if err == nil && q.Inline {
		err = fmt.Errorf("%s: is for inline volumes, which nobody creates: %w", keyEphemeral, object.ErrInvalid)
	}
	return q, err
}

func (c *controller) spec(ctx context.Context, req *csi.CreateVolumeRequest, q request) (client.VolumeSpec, error) {
	required, limit := req.GetCapacityRange().GetRequiredBytes(), req.GetCapacityRange().GetLimitBytes()
	if required < 0 || limit < 0 || limit != 0 && limit < required {
		return client.VolumeSpec{}, fmt.Errorf("capacity_range: from %d to %d bytes is none: %w", required, limit, errRange)
	}
	spec := client.VolumeSpec{Name: req.GetName(), Parameters: q.context(), CapacityBytes: required, LimitBytes: limit}
	if q.Binding == BindingShared {
		return spec, nil
	}
	var err error
	spec.Nodes, err = c.nodes(ctx, req.GetAccessibilityRequirements())
	return spec, err
}

// nodes are those that a bound volume may be on, the best first: the preferred, the others
// that are allowed, or, where nothing is said, all by free capacity.
func (c *controller) nodes(ctx context.Context, r *csi.TopologyRequirement) ([]string, error) {
	var nodes []string
	for _, t := range slices.Concat(r.GetPreferred(), r.GetRequisite()) {
		if n := t.GetSegments()[TopologyKey]; n != "" && !slices.Contains(nodes, n) {
			nodes = append(nodes, n)
		}
	}
	if len(nodes) == 0 && len(r.GetPreferred())+len(r.GetRequisite()) > 0 {
		return nil, fmt.Errorf("accessibility_requirements: no topology has the segment %s: %w", TopologyKey, object.ErrInvalid)
	}
	if len(nodes) > 0 {
		return nodes, nil
	}
	workers, err := c.volumes.Workers(ctx)
	if err != nil {
		return nil, fmt.Errorf("list workers: %w", err)
	}
	slices.SortStableFunc(workers, func(a, b client.Worker) int {
		return cmp.Compare(b.CapacityBytes-b.ReservedBytes, a.CapacityBytes-a.ReservedBytes)
	})
	for _, w := range workers {
		nodes = append(nodes, w.Node)
	}
	if len(nodes) == 0 {
		return nil, fmt.Errorf("%s: node: no node has a worker: %w", keyBinding, object.ErrUnavailable)
	}
	return nodes, nil
}

func toCSI(v client.Volume) *csi.Volume {
	out := &csi.Volume{VolumeId: v.ID, CapacityBytes: v.CapacityBytes, VolumeContext: v.Parameters}
	if v.Node != "" {
		out.AccessibleTopology = []*csi.Topology{{Segments: map[string]string{TopologyKey: v.Node}}}
	}
	return out
}

// DeleteVolume forgets the volume; what is cached of its source stays, it may be shared.
func (c *controller) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := checkID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	err := c.volumes.DeleteVolume(ctx, req.GetVolumeId())
	if err != nil && !unknown(err) {
		return nil, fmt.Errorf("delete volume: %w", err)
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// unknown reports that there is no such volume, maybe because there can be none with that id.
func unknown(err error) bool {
	return errors.Is(err, client.ErrNotFound) || errors.Is(err, client.ErrInvalid)
}

func (c *controller) get(ctx context.Context, id string) (client.Volume, error) {
	if err := checkID(id); err != nil {
		return client.Volume{}, err
	}
	v, err := c.volumes.Volume(ctx, id)
	if err != nil && unknown(err) {
		err = fmt.Errorf("there is no volume %s: %w", quote(id), errUnknown)
	}
	return v, err
}

func (c *controller) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	v, err := c.get(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("volume_capabilities: missing: %w", object.ErrInvalid)
	}
	if text := c.mismatch(v, req); text != "" {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: text}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext:      req.GetVolumeContext(),
		VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters:         req.GetParameters(),
	}}, nil
}

// mismatch says why the volume is not what the request describes; "" if it is.
func (c *controller) mismatch(v client.Volume, req *csi.ValidateVolumeCapabilitiesRequest) string {
	if err := checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return text(err)
	}
	for _, attrs := range []map[string]string{req.GetVolumeContext(), req.GetParameters()} {
		if len(attrs) == 0 {
			continue
		}
		q, err := c.parse(v.ID, attrs, nil)
		if err != nil {
			return text(err)
		}
		if len(v.Parameters) > 0 && !maps.Equal(q.context(), v.Parameters) {
			return "the volume was created with other parameters"
		}
	}
	return ""
}

func (c *controller) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	vs, next, err := c.page(ctx, req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	r := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range vs {
		r.Entries = append(r.Entries, &csi.ListVolumesResponse_Entry{
			Volume: toCSI(v),
			Status: &csi.ListVolumesResponse_VolumeStatus{PublishedNodeIds: v.PublishedNodes},
		})
	}
	return r, nil
}

func (c *controller) page(ctx context.Context, most int32, token string) ([]client.Volume, string, error) {
	if most < 0 {
		return nil, "", fmt.Errorf("max_entries: %d is negative: %w", most, object.ErrInvalid)
	}
	vs, next, err := c.volumes.Volumes(ctx, int(most), token)
	if err != nil {
		return nil, "", fmt.Errorf("list volumes: %w", err)
	}
	return vs, next, nil
}

func (c *controller) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	v, err := c.get(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: toCSI(v),
		Status: &csi.ControllerGetVolumeResponse_VolumeStatus{PublishedNodeIds: v.PublishedNodes},
	}, nil
}

// GetCapacity is that of the caches where volumes reserve some of it (binding: node); else
// volumes take none.
func (c *controller) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if len(req.GetVolumeCapabilities()) > 0 && checkCapabilities(req.GetVolumeCapabilities()) != nil {
		return &csi.GetCapacityResponse{}, nil
	}
	if len(req.GetParameters()) > 0 {
		q, err := c.parse("", req.GetParameters(), nil)
		if err != nil {
			return nil, err
		}
		if q.Binding == BindingShared {
			return &csi.GetCapacityResponse{AvailableCapacity: unlimited}, nil
		}
	}
	node := ""
	if t := req.GetAccessibleTopology(); t != nil {
		if node = t.GetSegments()[TopologyKey]; node == "" {
			return &csi.GetCapacityResponse{}, nil // no node of ours
		}
	}
	capacity, err := c.volumes.Capacity(ctx, node)
	if node != "" && errors.Is(err, client.ErrNotFound) {
		return &csi.GetCapacityResponse{}, nil // it has no worker now
	}
	if err != nil {
		return nil, fmt.Errorf("capacity: %w", err)
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: max(capacity.AvailableBytes, 0),
		MaximumVolumeSize: wrapperspb.Int64(max(capacity.LargestBytes, 0)),
	}, nil
}

func (c *controller) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	v, err := c.get(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	served, err := c.served(ctx)
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: health(v, served)}, nil
}

// ControllerListVolumeHealth leaves healthy volumes out, so that a page may be short, or empty with another behind it.
func (c *controller) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	vs, next, err := c.page(ctx, req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	served, err := c.served(ctx)
	if err != nil {
		return nil, err
	}
	r := &csi.ControllerListVolumeHealthResponse{NextToken: next}
	for _, v := range vs {
		if h := health(v, served); len(h.GetHealthStatuses()) > 0 {
			r.Entries = append(r.Entries, h)
		}
	}
	return r, nil
}

// served are the nodes that have a worker.
func (c *controller) served(ctx context.Context) (map[string]bool, error) {
	workers, err := c.volumes.Workers(ctx)
	if err != nil {
		return nil, fmt.Errorf("list workers: %w", err)
	}
	nodes := map[string]bool{}
	for _, w := range workers {
		nodes[w.Node] = true
	}
	return nodes, nil
}

func health(v client.Volume, served map[string]bool) *csi.VolumeHealth {
	h := &csi.VolumeHealth{VolumeId: v.ID}
	if v.Node != "" && !served[v.Node] {
		h.HealthStatuses = append(h.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
			Status:  csi.VolumeHealthErrorType_INACCESSIBLE,
			Reason:  "WorkerAway",
			Message: fmt.Sprintf("the volume is bound to node %s, whose worker has not been heard of", v.Node),
		})
	}
	return h
}
