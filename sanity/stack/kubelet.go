package stack

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/sanity/leak"
)

// Kubelet makes the CSI calls that Kubernetes makes for a pod with a volume, in its order
// and with what it adds to them: the external-provisioner's part (CreateVolume,
// DeleteVolume) and the kubelet's (stage, publish and back). Paths below its directory look
// like the kubelet's below /var/lib/kubelet.
type Kubelet struct {
	dir        string
	controller string // sockets
	node       string

	mu       sync.Mutex // guards the fields below
	ctl, nod *grpc.ClientConn
	volumes  []*Volume // not deleted yet
}

// NewKubelet is a kubelet whose pods live below dir. The sockets are those of the controller
// and the node service; one alone is both. It dials when it is first asked something.
func NewKubelet(dir, controller string, node ...string) *Kubelet {
	return &Kubelet{dir: dir, controller: controller, node: append(node, controller)[0]}
}

// PublishInput describes a volume and the pod that wants it.
type PublishInput struct {
	Name       string            // of the PersistentVolumeClaim, or of the pod's volume; unique
	Parameters map[string]string // of the StorageClass, or the inline volume's attributes
	Secrets    map[string]string // given with every call that takes some
	Inline     bool              // ephemeral: nothing but NodePublishVolume is called
	ReadOnly   bool              // of the pod's volumeMount
	FSGroup    string            // of the pod's security context
	Namespace  string            // of the pod; "" means default
	Tokens     string            // of its service account, as the kubelet writes them where the CSIDriver has tokenRequests; "" for none
}

// Volume is one that exists in the driver and what has been done with it.
type Volume struct {
	PublishInput
	ID      string
	Context map[string]string // as the driver returned it, and as the provisioner adds to it
	Staging string            // where it is staged; "" if it is not
	Targets []string          // where it is published
}

// Publish provisions a volume, stages it and publishes it for one pod: the target is
// Targets[0] of the volume. What was done is undone if a step fails, as Kubernetes does
// when the pod is deleted.
func (k *Kubelet) Publish(ctx context.Context, in PublishInput) (_ *Volume, err error) {
	v, err := k.CreateVolume(ctx, in)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Unpublish(context.WithoutCancel(ctx), v))
		}
	}()
	if err := k.Stage(ctx, v); err != nil {
		return nil, err
	}
	if _, err := k.PublishPod(ctx, v, in.Name); err != nil {
		return nil, err
	}
	return v, nil
}

// Unpublish takes the volume back from all its pods, unstages it and deletes it. It goes on
// over errors, and returns all of them.
func (k *Kubelet) Unpublish(ctx context.Context, v *Volume) error {
	var errs []error
	for _, target := range slices.Clone(v.Targets) {
		errs = append(errs, k.UnpublishPod(ctx, v, target))
	}
	return errors.Join(append(errs, k.Unstage(ctx, v), k.DeleteVolume(ctx, v))...)
}

// UnpublishAll is Unpublish for every volume that still exists.
func (k *Kubelet) UnpublishAll(ctx context.Context) error {
	k.mu.Lock()
	all := slices.Clone(k.volumes)
	k.mu.Unlock()
	var errs []error
	for _, v := range all {
		errs = append(errs, k.Unpublish(ctx, v))
	}
	return errors.Join(errs...)
}

// CreateVolume provisions; for an inline volume it only thinks of an id.
func (k *Kubelet) CreateVolume(ctx context.Context, in PublishInput) (*Volume, error) {
	v := &Volume{PublishInput: in}
	if in.Inline {
		v.ID = fmt.Sprintf("csi-%x", sha256.Sum256([]byte(in.Name+uuid.NewString())))
		v.Context = maps.Clone(in.Parameters)
	} else if err := k.provision(ctx, v); err != nil {
		return nil, err
	}
	k.mu.Lock()
	k.volumes = append(k.volumes, v)
	k.mu.Unlock()
	return v, nil
}

func (k *Kubelet) provision(ctx context.Context, v *Volume) error {
	node, err := k.Node()
	if err != nil {
		return err
	}
	info, err := node.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil {
		return fmt.Errorf("NodeGetInfo: %w", err)
	}
	req := &csi.CreateVolumeRequest{
		Name:               "pvc-" + v.Name,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: 1 << 30},
		VolumeCapabilities: []*csi.VolumeCapability{v.capability()},
		Parameters:         maps.Clone(v.Parameters),
		Secrets:            v.Secrets,
	}
	if t := info.GetAccessibleTopology(); t != nil {
		req.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{t}, Preferred: []*csi.Topology{t}}
	}
	ctl, err := k.Controller()
	if err != nil {
		return err
	}
	resp, err := ctl.CreateVolume(ctx, req)
	if err != nil {
		return fmt.Errorf("CreateVolume: %w", err)
	}
	v.ID = resp.GetVolume().GetVolumeId()
	v.Context = maps.Clone(resp.GetVolume().GetVolumeContext())
	if v.Context == nil {
		v.Context = map[string]string{}
	}
	v.Context["storage.kubernetes.io/csiProvisionerIdentity"] = "1700000000000-8081-stack" // in every provisioned PV
	return nil
}

func (v *Volume) capability() *csi.VolumeCapability {
	mode := csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	if v.Inline {
		mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER // the kubelet never says anything else there
	}
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{VolumeMountGroup: v.FSGroup}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

// Stage stages a volume that is not inline. Doing it again is what a restarted kubelet does.
func (k *Kubelet) Stage(ctx context.Context, v *Volume) error {
	if v.Inline {
		return nil
	}
	node, err := k.Node()
	if err != nil {
		return err
	}
	staging := filepath.Join(k.dir, "plugins/kubernetes.io/csi/larder", fmt.Sprintf("%x", sha256.Sum256([]byte(v.ID))), "globalmount")
	if err := mkdirUnmounted(staging); err != nil {
		return err
	}
	v.Staging = staging
	_, err = node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId:          v.ID,
		StagingTargetPath: staging,
		VolumeCapability:  v.capability(),
		Secrets:           v.Secrets,
		VolumeContext:     v.Context,
	})
	if err != nil {
		return fmt.Errorf("NodeStageVolume: %w", err)
	}
	return nil
}

// PublishPod publishes a staged or inline volume for one more pod and returns the target.
// For a pod that has it already it repeats the call, with the Secrets that v now has.
func (k *Kubelet) PublishPod(ctx context.Context, v *Volume, pod string) (string, error) {
	node, err := k.Node()
	if err != nil {
		return "", err
	}
	uid := uuid.NewSHA1(uuid.NameSpaceOID, []byte(v.ID+"/"+pod)).String()
	target := filepath.Join(k.dir, "pods", uid, "volumes/kubernetes.io~csi", "pvc-"+v.Name, "mount")
	if err := mkdirUnmounted(filepath.Dir(target)); err != nil {
		return "", err
	}
	if !slices.Contains(v.Targets, target) {
		v.Targets = append(v.Targets, target)
	}
	attributes := map[string]string{}
	maps.Copy(attributes, v.Context)
	maps.Copy(attributes, map[string]string{ // they win
		"csi.storage.k8s.io/pod.name":            pod,
		"csi.storage.k8s.io/pod.namespace":       cmp.Or(v.Namespace, "default"),
		"csi.storage.k8s.io/pod.uid":             uid,
		"csi.storage.k8s.io/serviceAccount.name": "default",
		"csi.storage.k8s.io/ephemeral":           fmt.Sprint(v.Inline),
	})
	if v.Tokens != "" {
		attributes["csi.storage.k8s.io/serviceAccount.tokens"] = v.Tokens
	}
	_, err = node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId:          v.ID,
		StagingTargetPath: v.Staging,
		TargetPath:        target,
		VolumeCapability:  v.capability(),
		Readonly:          v.ReadOnly,
		Secrets:           v.Secrets,
		VolumeContext:     attributes,
	})
	if err != nil {
		return "", fmt.Errorf("NodePublishVolume: %w", err)
	}
	return target, nil
}

// mkdirUnmounted makes a folder unless something is mounted there: that is not to be touched.
func mkdirUnmounted(dir string) error {
	for _, m := range leak.Mounts(dir) {
		if m.Point == dir {
			return nil
		}
	}
	return os.MkdirAll(dir, 0o750)
}

// UnpublishPod takes the volume back from the pod at target.
func (k *Kubelet) UnpublishPod(ctx context.Context, v *Volume, target string) error {
	node, err := k.Node()
	if err != nil {
		return err
	}
	if _, err := node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.ID, TargetPath: target}); err != nil {
		return fmt.Errorf("NodeUnpublishVolume: %w", err)
	}
	v.Targets = slices.DeleteFunc(v.Targets, func(t string) bool { return t == target })
	return k.forgetDir(target)
}

// Unstage is nothing for a volume that is not staged.
func (k *Kubelet) Unstage(ctx context.Context, v *Volume) error {
	if v.Staging == "" {
		return nil
	}
	node, err := k.Node()
	if err != nil {
		return err
	}
	if _, err := node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.ID, StagingTargetPath: v.Staging}); err != nil {
		return fmt.Errorf("NodeUnstageVolume: %w", err)
	}
	staging := v.Staging
	v.Staging = ""
	return k.forgetDir(staging)
}

// forgetDir removes what the kubelet made for a mount point that is no longer one.
func (k *Kubelet) forgetDir(dir string) error {
	if len(leak.Mounts(dir)) > 0 {
		return fmt.Errorf("%s is still mounted", dir)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// DeleteVolume deletes; an inline volume is only forgotten.
func (k *Kubelet) DeleteVolume(ctx context.Context, v *Volume) error {
	if !v.Inline {
		ctl, err := k.Controller()
		if err != nil {
			return err
		}
		if _, err := ctl.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.ID, Secrets: v.Secrets}); err != nil {
			return fmt.Errorf("DeleteVolume: %w", err)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.volumes = slices.DeleteFunc(k.volumes, func(o *Volume) bool { return o == v })
	return nil
}

// WaitReady asks Probe until controller and node service say that a volume can be published.
func (k *Kubelet) WaitReady(ctx context.Context) error {
	for _, to := range []struct {
		slot   **grpc.ClientConn
		socket string
	}{{&k.nod, k.node}, {&k.ctl, k.controller}} {
		conn, err := k.dial(to.slot, to.socket)
		if err == nil {
			err = waitReady(ctx, conn)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func waitReady(ctx context.Context, conn *grpc.ClientConn) error {
	for {
		r, err := csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
		if err == nil && (r.GetReady() == nil || r.GetReady().GetValue()) {
			return nil
		}
		if err != nil && status.Code(err) != codes.Unavailable && status.Code(err) != codes.FailedPrecondition {
			return fmt.Errorf("probe: %w", err)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("not ready: %w", context.Cause(ctx)), err)
		}
	}
}

// Controller and Node are the driver's services, for calls that no method here makes.
func (k *Kubelet) Controller() (csi.ControllerClient, error) {
	conn, err := k.dial(&k.ctl, k.controller)
	return csi.NewControllerClient(conn), err
}

func (k *Kubelet) Node() (csi.NodeClient, error) {
	conn, err := k.dial(&k.nod, k.node)
	return csi.NewNodeClient(conn), err
}

// quick is how often a connection is tried again: the socket may be gone while larder restarts.
var quick = backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}

// dial returns *slot, having filled it where it was empty. The socket is reached through its
// folder's descriptor, because a path in a sun_path is at most 107 bytes long.
func (k *Kubelet) dial(slot **grpc.ClientConn, socket string) (*grpc.ClientConn, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if *slot != nil {
		return *slot, nil
	}
	conn, err := grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick, MinConnectTimeout: time.Second}),
		grpc.WithContextDialer(dialUnix))
	if err != nil {
		return nil, err
	}
	*slot = conn
	return conn, nil
}

func dialUnix(ctx context.Context, socket string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(socket))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var d net.Dialer
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(socket)))
}

// Close closes the connections; the volumes stay.
func (k *Kubelet) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for _, slot := range []**grpc.ClientConn{&k.ctl, &k.nod} {
		if *slot != nil {
			errs = append(errs, (*slot).Close())
			*slot = nil
		}
	}
	return errors.Join(errs...)
}
