package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/larderfs/larder/master/client"
)

// publisher does by hand, at the CSI services of `larder up`, what Kubernetes does for a pod.
type publisher struct {
	dir        string
	parameters []string
}

func (p *publisher) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.dir, "dir", "/var/lib/larder", "the --dir of larder up")
}

func publishCommand() *cobra.Command {
	var p publisher
	cmd := &cobra.Command{
		Use: "publish SOURCE TARGET", Short: "Mount a dataset at a directory of this machine, with larder up",
		Long: `Make a volume and publish it at a directory, as Kubernetes does for a pod. SOURCE is an under store, or a path of the
namespace:

  larder volume publish s3://bucket/sales /mnt/sales --parameter endpoint=http://127.0.0.1:9000
  larder volume publish /sales /mnt/sales

The dataset is at TARGET itself; --parameter layout=full has it at TARGET/data, and the worker's socket in TARGET/domain.
The variables AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN are the volume's Secret, if they are set.
larder volume unpublish TARGET undoes it. It is for trying things out: pods get their volumes from Kubernetes.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.at(cmd.Context(), args[1], func(ctx context.Context, v *manual) error { return v.publishSoon(ctx, args[0], p.parameters) })
		},
	}
	p.flags(cmd)
	cmd.Flags().StringArrayVar(&p.parameters, "parameter", nil, "`NAME=VALUE` of the volume, as in a StorageClass; may be repeated")
	return cmd
}

func unpublishCommand() *cobra.Command {
	var p publisher
	cmd := &cobra.Command{
		Use: "unpublish TARGET", Short: "Undo larder volume publish", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.at(cmd.Context(), args[0], func(ctx context.Context, v *manual) error { return v.unpublish(ctx) })
		},
	}
	p.flags(cmd)
	return cmd
}

// manual is a volume that is published by hand. All of it follows from its target, so nothing has to be remembered.
type manual struct {
	controller      csi.ControllerClient
	node            csi.NodeClient
	name            string
	target, staging string
}

// at hands the volume of a target to f.
func (p *publisher) at(ctx context.Context, target string, f func(context.Context, *manual) error) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	target, terr := filepath.Abs(target)
	dir, derr := filepath.Abs(p.dir)
	if err := errors.Join(terr, derr); err != nil {
		return err
	}
	conn, err := dialUnix(filepath.Join(dir, "csi.sock"))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.Connect()
	hash := fmt.Sprintf("%x", sha256.Sum256([]byte(target)))[:16]
	v := &manual{csi.NewControllerClient(conn), csi.NewNodeClient(conn), "by-hand-" + hash, target, filepath.Join(dir, "published", hash)}
	if err := f(ctx, v); err != nil {
		return fmt.Errorf("%s: %s", target, status.Convert(err).Message())
	}
	return nil
}

// publishSoon waits for a larder that is starting, as Kubernetes does.
func (v *manual) publishSoon(ctx context.Context, source string, parameters []string) error {
	for {
		err := v.publish(ctx, source, parameters)
		if status.Code(err) != codes.Unavailable {
			return err
		}
		select {
		case <-time.After(publishAgain):
		case <-ctx.Done():
			return err
		}
	}
}

const publishAgain = 200 * time.Millisecond

// publish undoes what it did if a step fails.
func (v *manual) publish(ctx context.Context, source string, more []string) (err error) {
	parameters := map[string]string{"layout": "data"}
	key := "source"
	if filepath.IsAbs(source) {
		key = "path"
	}
	parameters[key] = source
	for _, m := range more {
		k, value, ok := strings.Cut(m, "=")
		if !ok {
			return fmt.Errorf("--parameter %q: want NAME=VALUE", m)
		}
		parameters[k] = value
	}
	secrets := map[string]string{}
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} {
		if value := os.Getenv(name); value != "" {
			secrets[name] = value
		}
	}
	if err := os.MkdirAll(v.target, 0o755); err != nil {
		return err
	}
	capability := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY},
	}
	made, err := v.controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: v.name, Parameters: parameters, Secrets: secrets, VolumeCapabilities: []*csi.VolumeCapability{capability},
	})
	if err != nil {
		return err
	}
	id, attributes := made.GetVolume().GetVolumeId(), made.GetVolume().GetVolumeContext()
	defer func() {
		if err != nil {
			err = errors.Join(err, v.remove(context.WithoutCancel(ctx), id))
		}
	}()
	if err := os.MkdirAll(v.staging, 0o750); err != nil {
		return err
	}
	if _, err := v.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: id, StagingTargetPath: v.staging, VolumeCapability: capability, Secrets: secrets, VolumeContext: attributes,
	}); err != nil {
		return err
	}
	_, err = v.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: id, StagingTargetPath: v.staging, TargetPath: v.target, VolumeCapability: capability, Secrets: secrets, VolumeContext: attributes, Readonly: true,
	})
	return err
}

func (v *manual) unpublish(ctx context.Context) error {
	if _, err := os.Lstat(v.staging); errors.Is(err, fs.ErrNotExist) {
		return errors.New("nothing was published there by `larder volume publish` with this --dir")
	}
	return v.remove(ctx, client.VolumeID(v.name))
}

// remove takes away all that there is of the volume.
func (v *manual) remove(ctx context.Context, id string) error {
	_, uerr := v.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: v.target})
	_, serr := v.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: v.staging})
	if err := errors.Join(uerr, serr); err != nil {
		return err
	}
	_, err := v.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	if rerr := os.Remove(v.staging); !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return err
}
