package kube

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/larderfs/larder/driver"
)

// NodePods are the pods of one node: it implements driver.Pods.
type NodePods struct {
	Client   *Client
	Recorder *Recorder
	Node     string
}

// Pods implements driver.Pods.
func (n NodePods) Pods(ctx context.Context) (map[string]driver.Pod, error) {
	list, err := n.Client.Pods().List(ctx, metav1.ListOptions{
		FieldSelector:   fields.OneTermEqualSelector("spec.nodeName", n.Node).String(),
		ResourceVersion: "0", // the API server's memory will do: it is asked again
	})
	if err != nil {
		return nil, err
	}
	pods := make(map[string]driver.Pod, len(list.Items))
	for _, p := range list.Items {
		pods[string(p.UID)] = driver.Pod{
			UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, Started: started(p.Status),
			Ending: p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		}
	}
	return pods, nil
}

func started(s corev1.PodStatus) (at []time.Time) {
	for _, list := range [][]corev1.ContainerStatus{s.InitContainerStatuses, s.ContainerStatuses, s.EphemeralContainerStatuses} {
		for _, c := range list {
			if c.State.Running != nil {
				at = append(at, c.State.Running.StartedAt.Time)
			}
		}
	}
	return at
}

// Warn implements driver.Pods.
func (n NodePods) Warn(ctx context.Context, p driver.Pod, about, reason, message string) error {
	return n.Recorder.Warn(ctx, corev1.ObjectReference{
		APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID),
	}, about, reason, message)
}
