package kube

import (
	"context"
	"encoding/json"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Load is an object loads.larder.dev: a job that caches something, for as long as the object is there.
type Load struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   LoadSpec   `json:"spec"`
	Status LoadStatus `json:"status,omitzero"`
}

// LoadSpec is what its author writes: as the arguments and flags of larder load. It never changes.
type LoadSpec struct {
	Paths    []string `json:"paths"` // under-store URIs, or paths of the namespace
	Endpoint string   `json:"endpoint,omitempty"`
	Nodes    []string `json:"nodes,omitempty"` // or AllNodes alone; none for those that have a volume of it
	Pin      bool     `json:"pin,omitempty"`
}

// AllNodes is no name of a node.
const AllNodes = "all"

// LoadStatus is what the master writes, all of it each time: what is left out of a merge patch stays.
type LoadStatus struct {
	Job          string             `json:"job"`
	State        string             `json:"state"` // as larder job show has it
	Files        int64              `json:"files"` // done, with those that were there already
	Bytes        int64              `json:"bytes"`
	PresentFiles int64              `json:"presentFiles"`
	FailedFiles  int64              `json:"failedFiles"`
	Nodes        string             `json:"nodes"` // ended, of all
	Message      string             `json:"message"`
	Conditions   []metav1.Condition `json:"conditions"`
}

// Complete is the only type of a Load's conditions.
const Complete = "Complete"

// LoadObjects are those of the cluster. Errors are those of package apimachinery/api/errors.
type LoadObjects struct{ resource }

// Loads are jobs as objects.
func (c *Client) Loads() LoadObjects { return LoadObjects{resource{c, loadsPath}} }

// List returns all, and the version at which to begin to wait for changes.
func (o LoadObjects) List(ctx context.Context) (loads []Load, version string, err error) {
	version, err = o.list(ctx, &loads)
	return loads, version, err
}

// Load returns one.
func (o LoadObjects) Load(ctx context.Context, name string) (l Load, err error) {
	b, err := o.c.rest.Get().AbsPath(loadsPath, name).SetHeader("Accept", jsonContent).Do(ctx).Raw()
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	return l, err
}

// Create makes an object of that name.
func (o LoadObjects) Create(ctx context.Context, name string, spec LoadSpec) error {
	l := Load{TypeMeta: metav1.TypeMeta{APIVersion: MountsAPI, Kind: "Load"}, ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
	return send(ctx, o.c.rest.Post().AbsPath(loadsPath), l)
}

// SetStatus says how far an object's job is.
func (o LoadObjects) SetStatus(ctx context.Context, name string, status LoadStatus) error {
	return o.setStatus(ctx, name, status)
}
