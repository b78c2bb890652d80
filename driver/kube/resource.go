package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// resource is one of our own kinds, cluster-wide.
type resource struct {
	c    *Client
	path string
}

// list reads all objects into items, a pointer to a slice, and returns the version at which to begin to wait for changes.
func (o resource) list(ctx context.Context, items any) (version string, err error) {
	b, err := o.c.rest.Get().AbsPath(o.path).SetHeader("Accept", jsonContent).Do(ctx).Raw()
	if err != nil {
		return "", err
	}
	var list struct {
		metav1.ListMeta `json:"metadata"`
		Items           json.RawMessage `json:"items"`
	}
	if err = json.Unmarshal(b, &list); err == nil {
		err = json.Unmarshal(list.Items, items)
	}
	if err != nil {
		return "", fmt.Errorf("list %s.%s: %w", path.Base(o.path), Group, err)
	}
	return list.ResourceVersion, nil
}

// Changed returns nil when something has changed since that version, or may have, a minute later at most.
func (o resource) Changed(ctx context.Context, version string) error {
	stream, err := o.c.rest.Get().AbsPath(o.path).SetHeader("Accept", jsonContent).Param("watch", "true").
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

// Delete deletes an object.
func (o resource) Delete(ctx context.Context, name string) error {
	return o.c.rest.Delete().AbsPath(o.path, name).SetHeader("Accept", jsonContent).Do(ctx).Error()
}

func (o resource) setStatus(ctx context.Context, name string, status any) error {
	b, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	return o.c.rest.Patch(types.MergePatchType).AbsPath(o.path, name, "status").SetHeader("Accept", jsonContent).Body(b).Do(ctx).Error()
}

func send(ctx context.Context, r *rest.Request, object any) error {
	b, err := json.Marshal(object)
	if err != nil {
		return err
	}
	return r.SetHeader("Accept", jsonContent).SetHeader("Content-Type", jsonContent).Body(b).Do(ctx).Error()
}
