package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/driver/kubemounts"
	"github.com/larderfs/larder/master/client"
)

// objectTable is the mount table as the cluster's Mount objects have it.
type objectTable struct {
	objects kube.MountObjects
	cluster string            // for errors
	trouble map[string]string // by object, as of the last Mounts: why it is no mount
}

// connect reaches the cluster that a kubeconfig names, or whose pod this is; nil if there is none.
func (q *clusterQuestion) connect() (c *kube.Client, name string, err error) {
	if q.kubeconfig == "" && (q.master != "" || q.dirGiven()) { // a master was named
		return nil, "", nil
	}
	c, err = kube.Connect(q.kubeconfig, "larder/"+version)
	if errors.Is(err, kube.ErrNoCluster) {
		return nil, "", nil
	}
	return c, cmp.Or(q.kubeconfig, "this pod's cluster"), err
}

func (q *mountQuestion) cluster() (*objectTable, error) {
	c, name, err := q.connect()
	if c == nil || err != nil {
		return nil, err
	}
	return &objectTable{objects: c.Mounts(), cluster: name}, nil
}

func (o *objectTable) list(ctx context.Context) ([]kube.Mount, error) {
	all, _, err := o.objects.List(ctx)
	if err != nil {
		return nil, o.explain("list", err)
	}
	return all, nil
}

// Mounts are those of all objects, whatever the master says of them.
func (o *objectTable) Mounts(ctx context.Context) (ms []client.Mount, err error) {
	all, err := o.list(ctx)
	if err != nil {
		return nil, err
	}
	o.trouble = map[string]string{}
	for _, obj := range all {
		m, err := kubemounts.MountOf(obj)
		if err != nil { // shown as it was written
			s := obj.Spec
			m = client.Mount{Path: s.Path, URI: s.URI, ReadOnly: s.ReadOnly, Options: s.Options, Credential: s.Credential,
				AllowInline: s.AllowInline, AllowClass: s.AllowClass, Object: obj.Name}
		}
		o.trouble[obj.Name] = kubemounts.Trouble(obj)
		ms = append(ms, m)
	}
	return ms, nil
}

// PutMount changes the mount's object, or makes one.
func (o *objectTable) PutMount(ctx context.Context, m client.Mount) error {
	spec := kubemounts.SpecOf(m)
	if m.Object == "" {
		err := o.objects.Create(ctx, objectName(m.Path), spec)
		return o.explain("create Mount "+objectName(m.Path), err)
	}
	all, err := o.list(ctx)
	if err != nil {
		return err
	}
	for _, obj := range all {
		if obj.Name == m.Object {
			return o.explain("change Mount "+obj.Name, o.objects.Replace(ctx, obj, spec))
		}
	}
	return fmt.Errorf("change Mount %s: it has been deleted meanwhile: %w", m.Object, client.ErrNotFound)
}

// DeleteMount deletes the objects of that path.
func (o *objectTable) DeleteMount(ctx context.Context, path string) error {
	all, err := o.list(ctx)
	if err != nil {
		return err
	}
	for _, obj := range all {
		if p, err := client.ParsePath(obj.Spec.Path); err != nil || p != path {
			continue
		}
		if err := o.objects.Delete(ctx, obj.Name); err != nil && !apierrors.IsNotFound(err) {
			return o.explain("delete Mount "+obj.Name, err)
		}
	}
	return nil
}

func (o *objectTable) explain(doing string, err error) error {
	if apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) {
		return fmt.Errorf("%s in %s: somebody else has just changed it; look with larder mount ls and try again: %w", doing, o.cluster, err)
	}
	return explainObjects(doing, "mounts", o.cluster, err)
}

// explainObjects says what an administrator has to do.
func explainObjects(doing, kind, cluster string, err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%s in %s: it does not know %s.%s: apply the CustomResourceDefinitions of Larder's manifests, or name a master with --master: %w", doing, cluster, kind, kube.Group, client.ErrNotFound)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s in %s: you may not; ask for the rights to %s.%s: %w", doing, cluster, kind, kube.Group, err)
	}
	return fmt.Errorf("%s in %s: %w", doing, cluster, err)
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// objectName is that of the object that is made for a path. Two paths never have one name.
func objectName(path string) string {
	name := strings.Trim(notInNames.ReplaceAllString(strings.ToLower(path), "-"), "-")
	if name != "" && "/"+strings.ReplaceAll(name, "-", "/") == path && len(name) <= 63 {
		return name
	}
	sum := sha256.Sum256([]byte(path))
	return fmt.Sprintf("%s-%x", cmp.Or(strings.TrimRight(name[:min(len(name), 50)], "-"), "mount"), sum[:4])
}
