package kube

import (
	"context"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// Follow calls push with all that opts select, when that is known and after each change, until
// ctx ends. Objects that were handed over are not to be changed. Errors are retried, and logged
// by client-go.
func (o Objects[T, P, L]) Follow(ctx context.Context, opts metav1.ListOptions, push func([]P)) {
	selected := func(more metav1.ListOptions) metav1.ListOptions {
		more.LabelSelector, more.FieldSelector = opts.LabelSelector, opts.FieldSelector
		return more
	}
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, more metav1.ListOptions) (runtime.Object, error) {
			return o.List(ctx, selected(more))
		},
		WatchFuncWithContext: func(ctx context.Context, more metav1.ListOptions) (watch.Interface, error) {
			return o.Watch(ctx, selected(more))
		},
	}
	store := cache.NewUndeltaStore(func(list []any) {
		objects := make([]P, len(list))
		for i, v := range list {
			objects[i] = v.(P)
		}
		push(objects)
	}, cache.MetaNamespaceKeyFunc)
	cache.NewReflectorWithOptions(lw, P(new(T)), store, cache.ReflectorOptions{Name: "larder/" + o.resource}).RunWithContext(ctx)
}
