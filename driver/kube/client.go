// Package kube is the client of the Kubernetes API: what the node plugin watches, and the
// Events by which it speaks to users.
//
// It knows the kinds of core/v1 and no others, and registers them when a client is made: a
// start of any process of ours is counted in milliseconds, and client-go's own set of clients
// registers everything before main.
package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// ErrNoCluster means that this process is in no cluster and was told of none.
var ErrNoCluster = errors.New("not in a Kubernetes cluster")

// Client talks to one cluster. Safe for concurrent use.
type Client struct {
	rest  rest.Interface
	codec runtime.ParameterCodec
	space string // this pod's namespace; "" outside of one
}

// Connect makes a client of the cluster that kubeconfig names; "" is the one whose pod this
// is, or ErrNoCluster. It does not connect yet.
func Connect(kubeconfig, userAgent string) (*Client, error) {
	cfg, err := config(kubeconfig)
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	cfg.APIPath, cfg.GroupVersion, cfg.UserAgent = "/api", &corev1.SchemeGroupVersion, userAgent
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	cfg.QPS, cfg.Burst = 50, 100 // fifty pods that are told at once; the API server has priorities of its own
	c, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	return &Client{rest: c, codec: runtime.NewParameterCodec(scheme), space: namespace(kubeconfig)}, nil
}

func config(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		cfg, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, ErrNoCluster
		}
		return cfg, err
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
	}
	return cfg, nil
}

// namespace is where this process's own pod is.
func namespace(kubeconfig string) string {
	if kubeconfig != "" {
		return ""
	}
	b, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Namespace is that of this process's own pod; "" outside of one.
func (c *Client) Namespace() string { return c.space }

// Kind is a pointer to one of core/v1's structs.
type Kind[T any] interface {
	*T
	runtime.Object
	metav1.Object
}

// Objects is the API of one kind: in one namespace, in all of them, or of the cluster.
type Objects[T any, P Kind[T], L runtime.Object] struct {
	c         *Client
	resource  string
	namespace string
	list      func() L
}

// Pods are those of all namespaces.
func (c *Client) Pods() Objects[corev1.Pod, *corev1.Pod, *corev1.PodList] {
	return objects[corev1.Pod](c, "pods", "", func() *corev1.PodList { return &corev1.PodList{} })
}

// Nodes of the cluster.
func (c *Client) Nodes() Objects[corev1.Node, *corev1.Node, *corev1.NodeList] {
	return objects[corev1.Node](c, "nodes", "", func() *corev1.NodeList { return &corev1.NodeList{} })
}

// PersistentVolumes of the cluster.
func (c *Client) PersistentVolumes() Objects[corev1.PersistentVolume, *corev1.PersistentVolume, *corev1.PersistentVolumeList] {
	return objects[corev1.PersistentVolume](c, "persistentvolumes", "", func() *corev1.PersistentVolumeList { return &corev1.PersistentVolumeList{} })
}

// ConfigMaps of a namespace.
func (c *Client) ConfigMaps(namespace string) Objects[corev1.ConfigMap, *corev1.ConfigMap, *corev1.ConfigMapList] {
	return objects[corev1.ConfigMap](c, "configmaps", namespace, func() *corev1.ConfigMapList { return &corev1.ConfigMapList{} })
}

// Secrets of a namespace.
func (c *Client) Secrets(namespace string) Objects[corev1.Secret, *corev1.Secret, *corev1.SecretList] {
	return objects[corev1.Secret](c, "secrets", namespace, func() *corev1.SecretList { return &corev1.SecretList{} })
}

// Events of a namespace.
func (c *Client) Events(namespace string) Objects[corev1.Event, *corev1.Event, *corev1.EventList] {
	return objects[corev1.Event](c, "events", namespace, func() *corev1.EventList { return &corev1.EventList{} })
}

func objects[T any, P Kind[T], L runtime.Object](c *Client, resource, namespace string, list func() L) Objects[T, P, L] {
	return Objects[T, P, L]{c: c, resource: resource, namespace: namespace, list: list}
}

// Get returns the object as the cluster has it now. Errors are those of package
// apimachinery/api/errors, here and below.
func (o Objects[T, P, L]) Get(ctx context.Context, name string) (P, error) {
	into := P(new(T))
	err := o.c.rest.Get().NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource).Name(name).Do(ctx).Into(into)
	return into, err
}

// List returns what the options select.
func (o Objects[T, P, L]) List(ctx context.Context, opts metav1.ListOptions) (L, error) {
	into := o.list()
	err := o.c.rest.Get().NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource).
		VersionedParams(&opts, o.c.codec).Do(ctx).Into(into)
	return into, err
}

// Watch follows what the options select.
func (o Objects[T, P, L]) Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	return o.c.rest.Get().NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource).
		VersionedParams(&opts, o.c.codec).Watch(ctx)
}

// Create returns the object as it was stored.
func (o Objects[T, P, L]) Create(ctx context.Context, object P) (P, error) {
	into := P(new(T))
	err := o.c.rest.Post().NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource).Body(object).Do(ctx).Into(into)
	return into, err
}

// Patch changes fields: patch is a JSON merge patch.
func (o Objects[T, P, L]) Patch(ctx context.Context, name string, patch []byte) error {
	return o.c.rest.Patch(types.MergePatchType).NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource).Name(name).
		Body(patch).Do(ctx).Error()
}

// Delete deletes the object if it is still the one that was seen: with its uid and
// resource version.
func (o Objects[T, P, L]) Delete(ctx context.Context, seen P) error {
	uid, version := seen.GetUID(), seen.GetResourceVersion()
	return o.c.rest.Delete().NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource).Name(seen.GetName()).
		Body(&metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &version}}).Do(ctx).Error()
}
