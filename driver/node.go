package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver/mounttable"
)

// Broker makes and removes mounts. Paths are absolute and without symlinks. Errors wrap the
// sentinels of package object. An operation that returns an error may have been done in
// part or in full; Unmount undoes it.
type Broker interface {
	// Mount mounts the volume's FUSE file system at path, an existing directory. Idempotent
	// for the same volume and path.
	Mount(ctx context.Context, v brokerwire.Volume, path string) error
	// Refresh gives a mounted volume new credentials; object.ErrNotFound if it is not mounted.
	Refresh(ctx context.Context, v brokerwire.Volume) error
	// RefreshMounts is Refresh for the tenant and the secrets of mounts; the volume's own credentials stay.
	RefreshMounts(ctx context.Context, v brokerwire.Volume) error
	// Bind shows the volume's root ("") or its data ("data") at target, an existing
	// directory. Idempotent.
	Bind(ctx context.Context, volumeID, subdir, target string, readOnly bool) error
	// Unmount removes the topmost mount at path, and the volume if it was mounted there; nil
	// if there is none. It never touches the file system that is mounted.
	Unmount(ctx context.Context, path string) error
	// Mounts lists the FUSE mounts that are held, not their binds.
	Mounts(ctx context.Context) ([]brokerwire.Mount, error)
}

// node is the node service. What it knows of mounts it asks for in each call: see [view].
type node struct {
	csi.UnimplementedNodeServer
	id     string
	inline string // where inline volumes are mounted, without symlinks
	rules  rules
	broker Broker
	stats  Stats
	log    *slog.Logger
	ready  func(context.Context) error
	health *podHealth // nil without a kubelet
	users  *users     // nil without a kubelet
	busy   inFlight

	secrets mountSecrets
}

func newNode(cfg Config, rules rules, broker Broker, stats Stats) (*node, error) {
	inline := filepath.Join(cfg.RunDir, "inline")
	if err := os.MkdirAll(inline, 0o700); err != nil {
		return nil, fmt.Errorf("csi node: run directory: %w", err)
	}
	inline, err := filepath.EvalSymlinks(inline)
	if err != nil {
		return nil, fmt.Errorf("csi node: run directory: %w", err)
	}
	n := &node{id: cfg.NodeID, inline: inline, rules: rules, broker: broker, stats: stats, log: cfg.Log, ready: cfg.Ready,
		secrets: mountSecrets{read: cfg.Secrets}}
	if cfg.KubeletDir != "" {
		n.health = newPodHealth(broker, stats, cfg.Pods, cfg.KubeletDir, cfg.Log)
		n.users = newUsers(n.health, stats.TellUsers, cfg.Log)
	}
	return n, nil
}

func (n *node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId:             n.id,
		AccessibleTopology: &csi.Topology{Segments: map[string]string{TopologyKey: n.id}},
	}, nil
}

var nodeCapabilities = []csi.NodeServiceCapability_RPC_Type{
	csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
	csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
	csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP,
	csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER, // ReadWriteOncePod: see checkSingle
}

func (n *node) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	r := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range nodeCapabilities {
		r.Capabilities = append(r.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}},
		})
	}
	return r, nil
}

// NodeStageVolume mounts the volume at its staging path. Staged again, it gets the Secret's
// credentials; without a Secret it keeps those that it has.
func (n *node) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	want, path, err := n.stageRequest(req)
	if err != nil {
		return nil, err
	}
	unlock, err := n.busy.lock("volume "+want.ID, "path "+path)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if want, err = n.mounted(ctx, want, req.GetVolumeContext(), true); err != nil {
		return nil, err
	}
	v, err := n.look(ctx)
	if err != nil {
		return nil, err
	}
	if m, ok := v.volume(want.ID); ok && m.Path != path {
		return nil, fmt.Errorf("volume %s is staged at %s; unstage it there first: %w", quote(want.ID), m.Path, errPrecondition)
	}
	if _, err := n.ensure(ctx, v, want, path); err != nil {
		return nil, err
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

func (n *node) stageRequest(req *csi.NodeStageVolumeRequest) (v brokerwire.Volume, path string, err error) {
	if err := errors.Join(checkID(req.GetVolumeId()), checkPath("staging_target_path", req.GetStagingTargetPath())); err != nil {
		return v, "", oneLine(err)
	}
	v, err = n.volume(req.GetVolumeId(), req.GetVolumeCapability(), req.GetVolumeContext(), req.GetSecrets())
	if err != nil {
		return v, "", err
	}
	if v.Inline {
		return v, "", fmt.Errorf("%s: inline volumes are published without staging: %w", keyEphemeral, object.ErrInvalid)
	}
	path, err = resolve("staging_target_path", req.GetStagingTargetPath())
	return v, path, err
}

// volume is what a request wants: its context, its Secret and its group.
func (n *node) volume(id string, c *csi.VolumeCapability, attrs, secrets map[string]string) (brokerwire.Volume, error) {
	if err := checkCapability(c); err != nil {
		return brokerwire.Volume{}, err
	}
	q, err := n.rules.parse(id, attrs, secrets)
	if err != nil {
		return brokerwire.Volume{}, err
	}
	attributes, err := json.Marshal(q.context())
	if err != nil {
		return brokerwire.Volume{}, fmt.Errorf("encode the volume's attributes: %w", err)
	}
	q.Attributes = string(attributes)
	return withGroup(q.Volume, c.GetMount().GetVolumeMountGroup())
}

// ensure has the volume mounted at path, or leaves nothing there. fresh says that it was
// not before.
func (n *node) ensure(ctx context.Context, v view, want brokerwire.Volume, path string) (fresh bool, err error) {
	if m, ok := v.volume(want.ID); ok && v.live(m) {
		if diff := differences(m.Volume, want); len(diff) > 0 {
			return false, fmt.Errorf("volume %s is mounted with other values of %s: %w", quote(want.ID), strings.Join(diff, ", "), brokerwire.ErrExists)
		}
		return false, n.refresh(ctx, m, want)
	}
	if err := complete(want, !want.Inline); err != nil {
		return false, err
	}
	if err := n.replace(ctx, v, want.ID, path); err != nil {
		return false, err
	}
	made, err := makeDir(path)
	if err != nil {
		return false, err
	}
	if err := os.Chmod(path, stagedMode); err != nil {
		return false, fmt.Errorf("mount point: %w", err)
	}
	if err := n.broker.Mount(ctx, want, path); err != nil {
		undone := n.undo(ctx, path, made || want.Inline)
		if undone && !made && !want.Inline { // else to touch it might wait for a worker
			err = errors.Join(err, unstaged(path))
		}
		return false, fmt.Errorf("mount volume %s: %w", quote(want.ID), err)
	}
	return true, nil
}

// refresh hands over new credentials, and nothing else. No Secret in a request means no news.
func (n *node) refresh(ctx context.Context, m brokerwire.Mount, want brokerwire.Volume) error {
	if want.Path != "" {
		return n.refreshMounts(ctx, m, want)
	}
	if want.Credentials.IsZero() {
		return nil
	}
	v := m.Volume
	v.Credentials, v.ServiceAccount = want.Credentials, want.ServiceAccount
	if err := n.broker.Refresh(ctx, v); err != nil {
		return fmt.Errorf("refresh credentials of volume %s: %w", quote(m.VolumeID), err)
	}
	return nil
}

// replace is clear for calls that mount something then. A FUSE mount that the broker does
// not hold may be one that the worker has yet to give back to it, with pods on it: it is
// dead only if the worker has no such volume either.
func (n *node) replace(ctx context.Context, v view, id, path string) error {
	if !v.dead(path) {
		return n.clear(ctx, v, id, path)
	}
	v, err := n.look(ctx)
	if err != nil {
		return err
	}
	if m, ok := v.volume(id); ok && v.live(m) { // the worker serves that one
		return n.clear(ctx, v, id, path)
	}
	_, err = n.stats.VolumeStats(ctx, id)
	switch {
	case errors.Is(err, object.ErrNotFound):
		return n.clear(ctx, v, id, path)
	case err != nil:
		return fmt.Errorf("%s may be mounted still: %w", path, err)
	}
	return fmt.Errorf("the worker serves volume %s and has yet to give it back to the broker; try again: %w", quote(id), object.ErrUnavailable)
}

// clear takes away what earlier lives left at path: mounts of this volume, and FUSE mounts
// that nobody serves any more. It refuses to touch anything else.
func (n *node) clear(ctx context.Context, v view, id, path string) error {
	if m, ok := v.heldAt(path); ok && m.VolumeID != id {
		return fmt.Errorf("volume %s is mounted at %s: %w", quote(m.VolumeID), path, brokerwire.ErrExists)
	} else if ok && !v.live(m) { // somebody else has unmounted it
		if err := n.broker.Unmount(ctx, path); err != nil {
			return fmt.Errorf("forget the mount at %s: %w", path, err)
		}
	}
	const most = 64 // mounts on top of each other
	for range most {
		p, ok := v.table.At(path)
		if !ok {
			return nil
		}
		owner, owned := v.owner(p)
		switch {
		case owned && owner.VolumeID != id:
			return fmt.Errorf("volume %s is published at %s: %w", quote(owner.VolumeID), path, brokerwire.ErrExists)
		case !owned && !p.FUSE():
			return fmt.Errorf("%s is a mount point of a %s file system that is not Larder's; unmount it: %w", path, p.FSType, errPrecondition)
		}
		if err := n.broker.Unmount(ctx, path); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
		var err error
		if v.table, err = mounttable.Read(); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s stays mounted after %d unmounts", path, most)
}

// undoTimeout bounds what a failed call still does, whatever its own deadline was.
const undoTimeout = 10 * time.Second

func (n *node) undo(ctx context.Context, path string, made bool) (undone bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	err := n.broker.Unmount(ctx, path)
	if err == nil && made {
		err = removeDir(path)
	}
	if err != nil {
		n.log.Error("undo a failed call", "path", path, "err", err)
	}
	return err == nil
}

// unstaged gives a staging directory its permissions back.
func unstaged(path string) error {
	if err := os.Chmod(path, unstagedMode); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("staging path: %w", err)
	}
	return nil
}

func (n *node) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	id := req.GetVolumeId()
	if err := errors.Join(checkID(id), checkPath("staging_target_path", req.GetStagingTargetPath())); err != nil {
		return nil, oneLine(err)
	}
	path, err := resolve("staging_target_path", req.GetStagingTargetPath())
	if errors.Is(err, errNoParent) {
		return &csi.NodeUnstageVolumeResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	unlock, err := n.busy.lock("volume "+id, "path "+path)
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := n.look(ctx)
	if err != nil {
		return nil, err
	}
	if v.belongsToOther(id, path) {
		return &csi.NodeUnstageVolumeResponse{}, nil
	}
	if err := n.clear(ctx, v, id, path); err != nil {
		return nil, err
	}
	if err := unstaged(path); err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// NodePublishVolume shows the volume, read-only, at the target path. Published again, it
// gets the Secret's credentials and nothing is mounted anew.
func (n *node) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := errors.Join(checkID(req.GetVolumeId()), checkPath("target_path", req.GetTargetPath())); err != nil {
		return nil, oneLine(err)
	}
	want, err := n.volume(req.GetVolumeId(), req.GetVolumeCapability(), req.GetVolumeContext(), req.GetSecrets())
	if err != nil {
		return nil, err
	}
	target, err := resolve("target_path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := n.busy.lock("volume "+want.ID, "path "+target)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if want.CredentialsOf == brokerwire.CredentialsPod {
		if err := complete(want, false); err != nil {
			return nil, err
		}
	}
	if want, err = n.mounted(ctx, want, req.GetVolumeContext(), false); err != nil {
		return nil, err
	}
	publish := n.publishStaged
	if want.Inline {
		publish = n.publishInline
	}
	if err := publish(ctx, req, want, target); err != nil {
		return nil, err
	}
	n.users.changed(req.GetVolumeContext())
	return &csi.NodePublishVolumeResponse{}, nil
}

func (n *node) publishStaged(ctx context.Context, req *csi.NodePublishVolumeRequest, want brokerwire.Volume, target string) error {
	if req.GetStagingTargetPath() == "" {
		return fmt.Errorf("staging_target_path: missing; a volume is staged before it is published: %w", errPrecondition)
	}
	if err := checkPath("staging_target_path", req.GetStagingTargetPath()); err != nil {
		return err
	}
	staging, err := resolve("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return err
	}
	v, err := n.look(ctx)
	if err != nil {
		return err
	}
	if err := n.ensureStaged(ctx, v, req, want, staging, target); err != nil {
		return err
	}
	return n.bind(ctx, want, target, req.GetVolumeCapability())
}

// ensureStaged checks that the volume is staged as the request has it. One that was staged,
// but whose mount died with both holders of its descriptor, is staged again: the kubelet
// would not do that (DESIGN §5.11).
func (n *node) ensureStaged(ctx context.Context, v view, req *csi.NodePublishVolumeRequest, want brokerwire.Volume, staging, target string) error {
	m, ok := v.volume(want.ID)
	switch {
	case ok && m.Path != staging:
		return fmt.Errorf("volume %s is staged at %s, not at %s: %w", quote(want.ID), m.Path, staging, errPrecondition)
	case ok && v.live(m):
		if err := fits(m.Volume, want, req.GetVolumeCapability().GetMount().GetVolumeMountGroup()); err != nil {
			return err
		}
		if err := errors.Join(checkTenant(v, m, want, target), checkAccount(v, m, want, target)); err != nil {
			return err
		}
		if err := n.refresh(ctx, m, want); err != nil {
			return err
		}
		return n.decided(ctx, m, want)
	case ok || v.dead(staging) || v.wasStaged(staging):
		n.log.Warn("stage again what had died", "volume", want.ID, "path", staging)
		_, err := n.ensure(ctx, v, want, staging)
		return err
	}
	return fmt.Errorf("volume %s is not staged at %s; call NodeStageVolume first: %w", quote(want.ID), staging, errPrecondition)
}

// fits reports whether a publish can use a staged volume. There is one connection and hence
// one group: another one is served only where everybody may read. A request without a group
// asks for none.
func fits(staged, want brokerwire.Volume, group string) error {
	diff := differences(staged, want)
	owners := func(key string) bool { return key == keyGID || key == keyFileMode || key == keyDirMode }
	if slices.ContainsFunc(diff, func(key string) bool { return !owners(key) }) {
		return fmt.Errorf("volume %s is staged with other values of %s: %w", quote(want.ID), strings.Join(diff, ", "), errPrecondition)
	}
	open := staged.FileMode&0o004 != 0 && staged.DirMode&0o005 == 0o005
	if len(diff) > 0 && group != "" && !open {
		return fmt.Errorf("volume_mount_group: volume %s is staged for group %d and not readable for all; use the same fsGroup in all pods of a node, or fileMode 0444 and dirMode 0555: %w",
			quote(want.ID), staged.GID, errPrecondition)
	}
	return nil
}

// A directory that something is staged on has no permissions: nobody but root can write under
// a mount that died, and what remains of it tells that the volume was staged.
const (
	stagedMode   = 0
	unstagedMode = 0o750
)

// wasStaged reports whether a volume was staged at path and not unstaged since.
func (v view) wasStaged(path string) bool {
	if _, mounted := v.table.At(path); mounted { // and might not answer
		return false
	}
	st, err := os.Lstat(path)
	return err == nil && st.IsDir() && st.Mode().Perm() == stagedMode
}

// publishInline mounts a pod's own volume below the run directory and binds it: it has no
// staging path, and its target must not be the mount itself, which would show domain/ with
// layout: data.
func (n *node) publishInline(ctx context.Context, req *csi.NodePublishVolumeRequest, want brokerwire.Volume, target string) error {
	v, err := n.look(ctx)
	if err != nil {
		return err
	}
	path := n.inlinePath(want.ID)
	if m, ok := v.volume(want.ID); ok {
		if m.Path != path {
			return fmt.Errorf("volume %s is staged at %s, and so not inline: %w", quote(want.ID), m.Path, brokerwire.ErrExists)
		}
		if others := v.targets(m, target); len(others) > 0 {
			return fmt.Errorf("inline volume %s is published at %s; it has one pod: %w", quote(want.ID), others[0], errPrecondition)
		}
	}
	fresh, err := n.ensure(ctx, v, want, path)
	if err != nil {
		return err
	}
	if err = n.bind(ctx, want, target, req.GetVolumeCapability()); err != nil && fresh {
		n.undo(ctx, path, true)
	}
	return err
}

// bind shows the volume at target, or leaves nothing there.
func (n *node) bind(ctx context.Context, want brokerwire.Volume, target string, c *csi.VolumeCapability) error {
	v, err := n.look(ctx)
	if err != nil {
		return err
	}
	m, ok := v.volume(want.ID)
	if !ok || !v.live(m) {
		return fmt.Errorf("volume %s is no longer mounted: %w", quote(want.ID), object.ErrUnavailable)
	}
	subdir, root := "", "/"
	if want.Layout == brokerwire.LayoutData {
		subdir, root = "data", "/data"
	}
	if p, ok := v.table.At(target); ok && v.is(p, m) && p.Root == root && p.ReadOnly {
		return nil
	}
	if err := checkSingle(v, m, target, c); err != nil {
		return err
	}
	if err := n.replace(ctx, v, want.ID, target); err != nil {
		return err
	}
	made, err := makeDir(target)
	if err != nil {
		return err
	}
	if err := n.broker.Bind(ctx, want.ID, subdir, target, true); err != nil {
		n.undo(ctx, target, made)
		return fmt.Errorf("publish volume %s at %s: %w", quote(want.ID), target, err)
	}
	return nil
}

// checkSingle keeps the promise of ReadWriteOncePod: one pod at a time. The other modes for
// a single node allow many pods on it.
func checkSingle(v view, m brokerwire.Mount, target string, c *csi.VolumeCapability) error {
	if c.GetAccessMode().GetMode() != csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
		return nil
	}
	if others := v.targets(m, target); len(others) > 0 {
		return fmt.Errorf("volume %s is for a single pod and published at %s: %w", quote(m.VolumeID), others[0], errPrecondition)
	}
	return nil
}

// NodeUnpublishVolume takes the target path away, and an inline volume's mount.
func (n *node) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	id := req.GetVolumeId()
	if err := errors.Join(checkID(id), checkPath("target_path", req.GetTargetPath())); err != nil {
		return nil, oneLine(err)
	}
	target, err := resolve("target_path", req.GetTargetPath())
	if err != nil && !errors.Is(err, errNoParent) {
		return nil, err
	}
	unlock, err := n.busy.lock("volume "+id, "path "+target)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := n.unpublish(ctx, id, target); err != nil {
		return nil, err
	}
	n.users.changed(nil)
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// unpublish of target "" means that its parent does not exist.
func (n *node) unpublish(ctx context.Context, id, target string) error {
	v, err := n.look(ctx)
	if err != nil {
		return err
	}
	if target != "" && !v.belongsToOther(id, target) {
		if err := n.clear(ctx, v, id, target); err != nil {
			return err
		}
		if err := removeDir(target); err != nil {
			return err
		}
	}
	path := n.inlinePath(id)
	if m, ok := v.heldAt(path); ok && len(v.targets(m, target)) > 0 {
		return nil // published elsewhere, so this was not its target
	}
	if err := n.clear(ctx, v, id, path); err != nil {
		return err
	}
	return removeDir(path)
}

func makeDir(path string) (made bool, err error) {
	err = os.Mkdir(path, 0o750)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return false, fmt.Errorf("make the mount point: %w", err)
	}
	// Nothing is mounted here: clear has seen to it.
	if st, err := os.Lstat(path); err != nil || !st.IsDir() {
		return false, fmt.Errorf("%s is there and not a directory; remove it: %w", path, errPrecondition)
	}
	return false, nil
}

func removeDir(path string) error {
	switch err := unix.Rmdir(path); err {
	case nil, unix.ENOENT:
		return nil
	case unix.ENOTEMPTY, unix.EEXIST, unix.ENOTDIR:
		return fmt.Errorf("%s has something in it that Larder did not put there; move it away: %w", path, errPrecondition)
	default:
		return fmt.Errorf("remove %s: %w", path, err)
	}
}

// resolve takes the symlinks out of a path, except in its last element, which may be a
// mount point and is not looked at.
func resolve(field, path string) (string, error) {
	path = filepath.Clean(path)
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s: the directory %s does not exist: %w", field, quote(filepath.Dir(path)), errNoParent)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", field, err)
	}
	return filepath.Join(dir, filepath.Base(path)), nil
}

// oneLine joins what errors.Join put on lines.
func oneLine(err error) error {
	return fmt.Errorf("%s: %w", strings.ReplaceAll(strings.ReplaceAll(err.Error(), ": "+object.ErrInvalid.Error(), ""), "\n", "; "), object.ErrInvalid)
}

// differences names the parameters in which two volumes differ, credentials aside.
func differences(a, b brokerwire.Volume) []string {
	x, y := request{Volume: a}.context(), request{Volume: b}.context()
	var diff []string
	for _, key := range slices.Sorted(maps.Keys(x)) {
		if x[key] != y[key] {
			diff = append(diff, key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(y)) {
		if _, ok := x[key]; !ok {
			diff = append(diff, key)
		}
	}
	return diff
}
