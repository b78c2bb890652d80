package kube

import (
	"context"
	"encoding/json"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// DaemonSet reports whether there is a DaemonSet that is not being deleted. Who may not ask (any
// more) is told that there is none: rights go with the rest.
func (c *Client) DaemonSet(ctx context.Context, namespace, name string) (bool, error) {
	b, err := c.rest.Get().AbsPath("/apis/apps/v1").Namespace(namespace).Resource("daemonsets").Name(name).
		SetHeader("Accept", "application/json").Do(ctx).Raw()
	if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("daemonset %s/%s: %w", namespace, name, err)
	}
	var d metav1.PartialObjectMetadata
	if err := json.Unmarshal(b, &d); err != nil {
		return false, fmt.Errorf("daemonset %s/%s: %w", namespace, name, err)
	}
	return d.DeletionTimestamp == nil, nil
}
