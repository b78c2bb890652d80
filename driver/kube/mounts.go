package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// Names of our own kinds in the API.
const (
	Group       = "larder.dev"
	MountsAPI   = Group + "/v1alpha1"
	mountsPath  = "/apis/" + MountsAPI + "/mounts"
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
type MountObjects struct{ c *Client }

// Mounts of the namespace, as objects.
func (c *Client) Mounts() MountObjects { return MountObjects{c} }

// List returns all, and the version at which to begin to wait for changes.
func (o MountObjects) List(ctx context.Context) (mounts []Mount, version string, err error) {
	b, err := o.c.rest.Get().AbsPath(mountsPath).SetHeader("Accept", jsonContent).Do(ctx).Raw()
	if err != nil {
		return nil, "", err
	}
	var list struct {
		metav1.ListMeta `json:"metadata"`
		Items           []Mount `json:"items"`
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, "", fmt.Errorf("list mounts.%s: %w", Group, err)
	}
	return list.Items, list.ResourceVersion, nil
}

// Changed returns nil when something has changed since that version, or may have, a minute later at most.
func (o MountObjects) Changed(ctx context.Context, version string) error {
	stream, err := o.c.rest.Get().AbsPath(mountsPath).SetHeader("Accept", jsonContent).Param("watch", "true").
		Param("resourceVersion", version).Param("timeoutSeconds", "60").Stream(ctx)
	if err != nil {
		return err
	}
	defer stream.Close()
	_, err = stream.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) || ctx.Err() == nil { // a stream that breaks off says nothing
		return nil
	}
	return err
}

// Create makes an object of that name.
func (o MountObjects) Create(ctx context.Context, name string, spec MountSpec) error {
	m := Mount{TypeMeta: metav1.TypeMeta{APIVersion: MountsAPI, Kind: "Mount"}, ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
	return o.send(ctx, o.c.rest.Post().AbsPath(mountsPath), m)
}

// Replace gives an object another spec, if it is still as it was seen.
func (o MountObjects) Replace(ctx context.Context, seen Mount, spec MountSpec) error {
	seen.TypeMeta, seen.Spec = metav1.TypeMeta{APIVersion: MountsAPI, Kind: "Mount"}, spec
	return o.send(ctx, o.c.rest.Put().AbsPath(mountsPath, seen.Name), seen)
}

func (o MountObjects) send(ctx context.Context, r *rest.Request, m Mount) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return r.SetHeader("Accept", jsonContent).SetHeader("Content-Type", jsonContent).Body(b).Do(ctx).Error()
}

// SetStatus says what became of an object.
func (o MountObjects) SetStatus(ctx context.Context, name string, status MountStatus) error {
	b, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	return o.c.rest.Patch(types.MergePatchType).AbsPath(mountsPath, name, "status").SetHeader("Accept", jsonContent).Body(b).Do(ctx).Error()
}

// Delete deletes an object.
func (o MountObjects) Delete(ctx context.Context, name string) error {
	return o.c.rest.Delete().AbsPath(mountsPath, name).SetHeader("Accept", jsonContent).Do(ctx).Error()
}
