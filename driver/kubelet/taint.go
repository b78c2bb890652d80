package kubelet

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Nodes is the part of the Kubernetes API that taints need.
type Nodes interface {
	Get(ctx context.Context, name string) (*corev1.Node, error)
	Patch(ctx context.Context, name string, patch []byte) error // a JSON merge patch
}

// RemoveTaint removes every taint with the key from the node: pods that waited for the driver may
// come. It changes nothing else, also if somebody else changes the node's taints meanwhile.
func RemoveTaint(ctx context.Context, nodes Nodes, node, key string) (removed bool, err error) {
	for {
		n, err := nodes.Get(ctx, node)
		if err != nil {
			return false, fmt.Errorf("taints of node %s: %w", node, err)
		}
		rest := slices.DeleteFunc(slices.Clone(n.Spec.Taints), func(t corev1.Taint) bool { return t.Key == key })
		if len(rest) == len(n.Spec.Taints) {
			return false, nil
		}
		patch, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"resourceVersion": n.ResourceVersion}, // or it is a conflict
			"spec":     map[string]any{"taints": rest},
		})
		if err != nil {
			return false, err
		}
		err = nodes.Patch(ctx, node, patch)
		if err == nil {
			return true, nil
		}
		if !apierrors.IsConflict(err) {
			return false, fmt.Errorf("remove taint %s from node %s: %w", key, node, err)
		}
	}
}
