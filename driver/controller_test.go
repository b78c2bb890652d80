package driver

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/larderfs/larder/master/client"
)

func (b *bench) create(t *testing.T, name string, change ...func(*csi.CreateVolumeRequest)) (*csi.Volume, error) {
	t.Helper()
	req := &csi.CreateVolumeRequest{
		Name: name, Parameters: attrs{"source": "s3://bkt/x/"}, VolumeCapabilities: []*csi.VolumeCapability{reader},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30},
	}
	for _, c := range change {
		c(req)
	}
	r, err := b.CreateVolume(t.Context(), req)
	return r.GetVolume(), err
}

func bound(r *csi.CreateVolumeRequest) { r.Parameters["binding"] = "node" }

func topology(nodes ...string) (ts []*csi.Topology) {
	for _, n := range nodes {
		ts = append(ts, &csi.Topology{Segments: map[string]string{TopologyKey: n}})
	}
	return ts
}

func TestTheContextIsAllThatANodeNeeds(t *testing.T) {
	b := start(t)
	v, err := b.create(t, "pvc-1", func(r *csi.CreateVolumeRequest) {
		r.Parameters = attrs{"source": "s3://bkt/x/", "endpoint": "http://minio:9000", "uid": "7",
			"csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pvc/namespace": "sales", "csi.storage.k8s.io/pv/name": "pvc-1"}
		r.Secrets = secret("create")
	})
	must(t, err)
	want := attrs{
		"source": "s3://bkt/x", "endpoint": "http://minio:9000", "pathStyle": "true", "layout": "full", "freshness": "1m0s", "complete": "auto",
		"binding": "shared", "uid": "7", "gid": "0", "fileMode": "0444", "dirMode": "0555",
		"csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pvc/namespace": "sales",
	}
	if !maps.Equal(v.VolumeContext, want) {
		t.Errorf("context %v", v.VolumeContext)
	}
	must(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) {
		r.VolumeId, r.VolumeContext = v.VolumeId, v.VolumeContext
		r.VolumeContext["storage.kubernetes.io/csiProvisionerIdentity"] = "1-2-x"
	}))
	held, err := b.broker.Mounts(t.Context())
	if err != nil || held[0].Volume.Endpoint != "http://minio:9000" || held[0].Volume.UID != 7 ||
		held[0].Volume.Namespace != "sales" || held[0].Volume.Claim != "claim" {
		t.Errorf("staged %+v, %v", held, err)
	}
	_, err = b.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.VolumeId, StagingTargetPath: b.path("stage")})
	must(t, err)
}

func TestCreateIsIdempotentByName(t *testing.T) {
	b := start(t)
	one, err := b.create(t, "n")
	must(t, err)
	two, err := b.create(t, "n", func(r *csi.CreateVolumeRequest) { r.Parameters["freshness"] = "60s" }) // the default, in other words
	must(t, err)
	if one.VolumeId != two.VolumeId || one.CapacityBytes != 1<<30 {
		t.Errorf("%v and %v", one, two)
	}
	_, err = b.create(t, "n", func(r *csi.CreateVolumeRequest) { r.Parameters["source"] = "s3://other" })
	wantCode(t, err, codes.AlreadyExists, "use another name")
	_, err = b.create(t, "n", func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 2 << 30 })
	wantCode(t, err, codes.AlreadyExists, "use another name")
	long, err := b.create(t, strings.Repeat("ü", 64))
	if err != nil || len(long.VolumeId) > 128 {
		t.Errorf("a name of 128 bytes: %v, %v", long, err)
	}
}

func TestBadCreateRequestsAreInvalid(t *testing.T) {
	b := start(t)
	for text, change := range map[string]func(*csi.CreateVolumeRequest){
		"name: missing":                 func(r *csi.CreateVolumeRequest) { r.Name = "" },
		"volume_capabilities: missing":  func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = nil },
		"use volumeMode: Filesystem":    func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = append(r.VolumeCapabilities, block) },
		"volume_content_source":         func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = &csi.VolumeContentSource{} },
		"mutable_parameters":            func(r *csi.CreateVolumeRequest) { r.MutableParameters = attrs{"a": "b"} },
		"nearest known one is endpoint": func(r *csi.CreateVolumeRequest) { r.Parameters["endpiont"] = "x" },
		"which nobody creates":          func(r *csi.CreateVolumeRequest) { r.Parameters[keyEphemeral] = "true" },
		"AWS_SECRET_ACCESS_KEY":         func(r *csi.CreateVolumeRequest) { r.Secrets = attrs{"AWS_ACCESS_KEY_ID": "canary"} },
		"no topology has the segment": func(r *csi.CreateVolumeRequest) {
			bound(r)
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: attrs{"zone": "z"}}}}
		},
	} {
		_, err := b.create(t, "n", change)
		wantCode(t, err, codes.InvalidArgument, text)
	}
	_, err := b.create(t, "n", func(r *csi.CreateVolumeRequest) { r.CapacityRange.LimitBytes = 1 })
	wantCode(t, err, codes.OutOfRange, "capacity_range")
}

var block = &csi.VolumeCapability{
	AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
}

func TestOnlyBoundVolumesAreOnANode(t *testing.T) {
	b := start(t)
	b.volumes.workers = newFakeVolumes("node-a", "node-b", "node-c").workers
	requirements := func(preferred, requisite []string) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Preferred: topology(preferred...), Requisite: topology(requisite...)}
		}
	}
	shared, err := b.create(t, "shared", requirements(nil, []string{"node-b"}))
	if err != nil || len(shared.AccessibleTopology) != 0 {
		t.Errorf("shared: %v, %v", shared, err)
	}
	v, err := b.create(t, "bound", bound, requirements([]string{"node-b"}, []string{"node-a", "node-b"}))
	must(t, err)
	if len(v.AccessibleTopology) != 1 || v.AccessibleTopology[0].Segments[TopologyKey] != "node-b" {
		t.Errorf("bound to %v; want the preferred node-b", v.AccessibleTopology)
	}
	_, err = b.create(t, "big", bound, requirements(nil, []string{"node-b"}), func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 100 << 30 })
	wantCode(t, err, codes.ResourceExhausted, "none of the nodes [node-b]")
	big, err := b.create(t, "big", bound, func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 100 << 30 })
	if err != nil || big.AccessibleTopology[0].Segments[TopologyKey] == "node-b" {
		t.Errorf("where nothing is said: %v, %v; want a node with room", big, err)
	}
	b.volumes.workers = nil
	_, err = b.create(t, "none", bound)
	wantCode(t, err, codes.Unavailable, "no node has a worker")
}

func TestCapacityIsThatOfTheCacheForBoundVolumesOnly(t *testing.T) {
	b := start(t)
	b.volumes.workers = newFakeVolumes("node-a", "node-b").workers
	capacity := func(binding, node string, caps ...*csi.VolumeCapability) string {
		req := &csi.GetCapacityRequest{VolumeCapabilities: caps}
		if binding != "" {
			req.Parameters = attrs{"source": "s3://bkt", "binding": binding}
		}
		if node != "" {
			req.AccessibleTopology = topology(node)[0]
		}
		r, err := b.GetCapacity(t.Context(), req)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprint(r.AvailableCapacity>>30, " ", r.MaximumVolumeSize.GetValue()>>30)
	}
	for _, c := range []struct {
		binding, node, want string
	}{
		{"", "", "200 100"}, {"node", "", "200 100"}, {"node", "node-a", "100 100"}, {"node", "gone", "0 0"},
		{"shared", "", fmt.Sprint(int64(unlimited)>>30, " 0")}, {"shared", "node-a", fmt.Sprint(int64(unlimited)>>30, " 0")},
	} {
		if got := capacity(c.binding, c.node); got != c.want {
			t.Errorf("binding %q on %q: %s; want %s GiB", c.binding, c.node, got, c.want)
		}
	}
	if got := capacity("node", "", block); got != "0 0" {
		t.Errorf("block: %s", got)
	}
	if got := capacity("zone", ""); !strings.Contains(got, "InvalidArgument") {
		t.Errorf("bad parameters: %s", got)
	}
}

func TestVolumesAreListedByPages(t *testing.T) {
	b := start(t)
	for i := range 7 {
		_, err := b.create(t, fmt.Sprint("v", i))
		must(t, err)
	}
	seen, token := map[string]bool{}, ""
	for pages := 0; pages < 4; pages++ {
		r, err := b.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: 2, StartingToken: token})
		must(t, err)
		for _, e := range r.Entries {
			seen[e.Volume.VolumeId] = true
		}
		token = r.NextToken
	}
	if len(seen) != 7 || token != "" {
		t.Errorf("saw %d volumes, token %q left", len(seen), token)
	}
	_, err := b.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: "invalid-token"})
	wantCode(t, err, codes.Aborted, "")
	_, err = b.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: -1})
	wantCode(t, err, codes.InvalidArgument, "max_entries")
}

func TestAVolumeIsGotAndDeleted(t *testing.T) {
	b := start(t)
	v, err := b.create(t, "n")
	must(t, err)
	got, err := b.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.VolumeId})
	if err != nil || got.Volume.VolumeId != v.VolumeId || got.Status == nil || !maps.Equal(got.Volume.VolumeContext, v.VolumeContext) {
		t.Errorf("got %v, %v", got, err)
	}
	for range 2 {
		_, err = b.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.VolumeId})
		must(t, err)
	}
	_, err = b.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "no id of ours/.."})
	must(t, err)
	_, err = b.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{})
	wantCode(t, err, codes.InvalidArgument, "volume_id")
	_, err = b.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.VolumeId})
	wantCode(t, err, codes.NotFound, v.VolumeId)
}

func TestCapabilitiesAreValidated(t *testing.T) {
	b := start(t)
	v, err := b.create(t, "n")
	must(t, err)
	validate := func(change ...func(*csi.ValidateVolumeCapabilitiesRequest)) (*csi.ValidateVolumeCapabilitiesResponse, error) {
		req := &csi.ValidateVolumeCapabilitiesRequest{VolumeId: v.VolumeId, VolumeContext: v.VolumeContext, Parameters: attrs{"source": "s3://bkt/x"}}
		for mode := range csi.VolumeCapability_AccessMode_Mode_name {
			if mode != 0 {
				req.VolumeCapabilities = append(req.VolumeCapabilities, capability(csi.VolumeCapability_AccessMode_Mode(mode)))
			}
		}
		for _, c := range change {
			c(req)
		}
		return b.ValidateVolumeCapabilities(t.Context(), req)
	}
	r, err := validate()
	if err != nil || r.Confirmed == nil || len(r.Confirmed.VolumeCapabilities) != 7 {
		t.Errorf("every access mode: %v, %v", r, err)
	}
	for text, change := range map[string]func(*csi.ValidateVolumeCapabilitiesRequest){
		"Filesystem":       func(r *csi.ValidateVolumeCapabilitiesRequest) { r.VolumeCapabilities = []*csi.VolumeCapability{block} },
		"other parameters": func(r *csi.ValidateVolumeCapabilitiesRequest) { r.Parameters["uid"] = "1" },
		"unknown":          func(r *csi.ValidateVolumeCapabilitiesRequest) { r.VolumeContext = attrs{"source": "s3://b-b", "x": ""} },
	} {
		if r, err := validate(change); err != nil || r.Confirmed != nil || !strings.Contains(r.Message, text) {
			t.Errorf("%s: %v, %v", text, r, err)
		}
	}
	_, err = validate(func(r *csi.ValidateVolumeCapabilitiesRequest) { r.VolumeCapabilities = nil })
	wantCode(t, err, codes.InvalidArgument, "volume_capabilities")
	_, err = validate(func(r *csi.ValidateVolumeCapabilitiesRequest) { r.VolumeId = "none" })
	wantCode(t, err, codes.NotFound, "none")
}

func TestABoundVolumeIsIllWithoutItsWorker(t *testing.T) {
	b := start(t)
	_, err := b.create(t, "shared")
	must(t, err)
	v, err := b.create(t, "bound", bound)
	must(t, err)
	ill := func() int {
		one, err := b.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: v.VolumeId})
		must(t, err)
		all, err := b.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{})
		must(t, err)
		if one.VolumeHealth.VolumeId != v.VolumeId || len(all.Entries) != len(one.VolumeHealth.HealthStatuses) {
			t.Errorf("one: %v, all: %v", one, all)
		}
		return len(all.Entries)
	}
	if ill() != 0 {
		t.Error("ill with its worker there")
	}
	b.volumes.workers = nil
	if ill() != 1 {
		t.Error("healthy without its worker")
	}
	_, err = b.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: "none"})
	wantCode(t, err, codes.NotFound, "none")
}

func TestTheMastersErrorsHaveCodes(t *testing.T) {
	b := start(t)
	for err, code := range map[error]codes.Code{
		client.ErrUnavailable: codes.Unavailable, client.ErrExhausted: codes.ResourceExhausted, client.ErrExists: codes.AlreadyExists,
		errors.New("bug"): codes.Internal,
	} {
		b.volumes.err = fmt.Errorf("master: %w", err)
		_, got := b.create(t, "n")
		wantCode(t, got, code, `volume "n"`)
	}
}
