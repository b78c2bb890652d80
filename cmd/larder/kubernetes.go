package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/klog/v2"

	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/driver"
	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/driver/kubeloads"
	"github.com/larderfs/larder/driver/kubemounts"
	"github.com/larderfs/larder/driver/localpv"
	"github.com/larderfs/larder/master"
)

// kubernetes is what the node plugin is told of its cluster.
type kubernetes struct {
	config   string
	kubelet  string
	datasets string // namespace/name of a ConfigMap; "" offers no local volumes
}

func (k *kubernetes) flags(f *pflag.FlagSet) {
	f.StringVar(&k.config, "kubeconfig", "", "kubeconfig `file` (default the pod's service account; outside of a cluster nobody is told of lost mounts)")
	f.StringVar(&k.kubelet, "kubelet-dir", "/var/lib/kubelet", "the kubelet's root `directory`")
	f.StringVar(&k.datasets, "local-datasets", "", "`namespace/name` of the ConfigMap with datasets to offer as local PersistentVolumes; empty offers none")
}

// connect returns nil outside of a cluster, unless one is needed.
func (k *kubernetes) connect(log *slog.Logger, needed bool) (*kube.Client, error) {
	klog.SetSlogLogger(log)
	c, err := kube.Connect(k.config, "larder/"+version)
	if errors.Is(err, kube.ErrNoCluster) && !needed && k.datasets == "" {
		log.Info("not in a Kubernetes cluster: nobody is told of lost mounts")
		return nil, nil
	}
	return c, err
}

// speaker tells users on their objects what they should know.
func speaker(c *kube.Client, node string) *kube.Recorder { return kube.NewRecorder(c, "larder", node) }

// nodePods speaks to the pods of a node; nil without a cluster.
func nodePods(c *kube.Client, node string) driver.Pods {
	if c == nil {
		return nil
	}
	return kube.NodePods{Client: c, Recorder: speaker(c, node), Node: node}
}

// secretReader reads the Secrets that mounts of the namespace name; nil without a cluster. It lists, which is
// all that the node plugin may, of its own namespace, for local volumes.
func secretReader(c *kube.Client) func(ctx context.Context, namespace, name string) (map[string]string, error) {
	if c == nil {
		return nil
	}
	return func(ctx context.Context, namespace, name string) (map[string]string, error) {
		list, err := c.Secrets(namespace).List(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()})
		if err != nil {
			return nil, fmt.Errorf("list Secrets of namespace %s (a RoleBinding to larder-node there allows it): %v: %w", namespace, err, object.ErrUnavailable)
		}
		for _, s := range list.Items {
			if s.Name != name {
				continue
			}
			data := map[string]string{}
			for k, v := range s.Data {
				data[k] = string(v)
			}
			return data, nil
		}
		return nil, fmt.Errorf("there is no Secret %q in namespace %s; create it, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: %w", name, namespace, object.ErrNotFound)
	}
}

// followObjects has the mounts of a master be those of the cluster's objects, and its jobs do what they ask for, until ctx ends.
func followObjects(ctx context.Context, m *master.Master, kubeconfig string, log *slog.Logger) error {
	klog.SetSlogLogger(log)
	c, err := kube.Connect(kubeconfig, "larder/"+version)
	if err != nil {
		return fmt.Errorf("--mount-objects: %w", err)
	}
	select {
	case <-m.Ready():
	case <-ctx.Done():
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return kubemounts.New(c.Mounts(), m, log).Run(ctx) })
	g.Go(func() error { return kubeloads.New(c.Loads(), m, log).Run(ctx) })
	return g.Wait()
}

// localVolumes offers datasets; nil if it is told of none.
func (k *kubernetes) localVolumes(c *kube.Client, d driver.Config, broker driver.Broker) (*localpv.Controller, error) {
	if k.datasets == "" {
		return nil, nil
	}
	return localpv.New(localpv.Config{
		Node: d.NodeID, Datasets: k.datasets, Dir: filepath.Join(d.RunDir, "local"), KubeletDir: k.kubelet, FileRoot: d.FileRoot, Log: d.Log,
	}, c, broker, d.Pods, speaker(c, d.NodeID))
}
