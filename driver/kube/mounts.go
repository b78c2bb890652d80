package kube

import (
	"context"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Names of our own kinds in the API.
const (
	Group       = "larder.dev"
	MountsAPI   = Group + "/v1alpha1"
	mountsPath  = "/apis/" + MountsAPI + "/mounts"
	loadsPath   = "/apis/" + MountsAPI + "/loads"
	jsonContent = "application/json"
)

// Mount is an object mounts.larder.dev: a mount of the namespace that is kept in the cluster.
type Mount struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   MountSpec   `json:"spec"`
	Status MountStatus `json:"status,omitzero"`
}

// MountSpec is what its author writes: as the flags of larder mount add.
type MountSpec struct {
	Path        string            `json:"path"`
	URI         string            `json:"uri"`
	ReadOnly    bool              `json:"readOnly,omitempty"`
	Options     map[string]string `json:"options,omitempty"`
	Credential  string            `json:"credential,omitempty"`
	AllowInline []string          `json:"allowInline,omitempty"`
	AllowClass  []string          `json:"allowClass,omitempty"`
}

// MountStatus is what the master writes.
type MountStatus struct {
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
}

// Ready is the only type of a Mount's conditions.
const Ready = "Ready"

// MountObjects are those of the cluster. Errors are those of package apimachinery/api/errors.
type MountObjects struct{ resource }

// Mounts of the namespace, as objects.
func (c *Client) Mounts() MountObjects { return MountObjects{resource{c, mountsPath}} }

// List returns all, and the version at which to begin to wait for changes.
func (o MountObjects) List(ctx context.Context) (mounts []Mount, version string, err error) {
	version, err = o.list(ctx, &mounts)
	return mounts, version, err
}

// Create makes an object of that name.
func (o MountObjects) Create(ctx context.Context, name string, spec MountSpec) error {
	m := Mount{TypeMeta: metav1.TypeMeta{APIVersion: MountsAPI, Kind: "Mount"}, ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
	return send(ctx, o.c.rest.Post().AbsPath(mountsPath), m)
}

// Replace gives an object another spec, if it is still as it was seen.
func (o MountObjects) Replace(ctx context.Context, seen Mount, spec MountSpec) error {
	seen.TypeMeta, seen.Spec = metav1.TypeMeta{APIVersion: MountsAPI, Kind: "Mount"}, spec
	return send(ctx, o.c.rest.Put().AbsPath(mountsPath, seen.Name), seen)
}

// SetStatus says what became of an object.
func (o MountObjects) SetStatus(ctx context.Context, name string, status MountStatus) error {
	return o.setStatus(ctx, name, status)
}
