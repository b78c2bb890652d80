// Package kubemounts makes the mount table what the cluster's Mount objects say, and says in their
// status what became of each.
//
// It remembers nothing: each round compares all objects with the table, and does what differs. So any
// number of masters may do it at once; one that was late is right again a round later. An object that
// is no mount, or whose path another one has, changes nothing but its own status.
package kubemounts

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/master/client"
)

// Table is the mount table: the master.
type Table interface {
	// ApplyMounts has the mounts that are made from objects be these and no others.
	ApplyMounts(ctx context.Context, ms []client.Mount) error
}

// Objects are the cluster's Mounts.
type Objects interface {
	List(ctx context.Context) (mounts []kube.Mount, version string, err error)
	Changed(ctx context.Context, version string) error
	SetStatus(ctx context.Context, name string, status kube.MountStatus) error
}

// Controller compares objects and table.
type Controller struct {
	objects Objects
	table   Table
	log     *slog.Logger
}

// New does nothing yet.
func New(objects Objects, table Table, log *slog.Logger) *Controller {
	return &Controller{objects: objects, table: table, log: log}
}

const (
	pauseMin = time.Second      // after a round that failed; then twice as long each time
	pauseMax = 30 * time.Second // at most

	together = 100 * time.Millisecond // changes that come in a row are one round
)

// Run goes on until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	pause := pauseMin
	for {
		version, err := c.round(ctx)
		if err == nil {
			pause = pauseMin
			err = c.objects.Changed(ctx, version)
		}
		if ctx.Err() != nil {
			return nil
		}
		wait := together
		if err != nil {
			wait, pause = pause, min(2*pause, pauseMax)
			c.log.Warn("make the mounts that Mount objects ask for; it will be tried again", "in", wait, "err", explain(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func explain(err error) error {
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("the cluster does not know mounts.%s: apply the CustomResourceDefinition of Larder's manifests: %w", kube.Group, err)
	}
	return err
}

// round does what has to be done now, and returns the version of what it saw.
func (c *Controller) round(ctx context.Context) (version string, err error) {
	objects, version, err := c.objects.List(ctx)
	if err != nil {
		return "", err
	}
	mounts, verdicts := plan(objects)
	if err := c.table.ApplyMounts(ctx, mounts); err != nil {
		return "", err
	}
	for _, o := range objects {
		status := statusOf(o, verdicts[o.Name], time.Now())
		if reflect.DeepEqual(status, o.Status) {
			continue
		}
		if err := c.objects.SetStatus(ctx, o.Name, status); err != nil && !apierrors.IsNotFound(err) { // deleted meanwhile
			return "", fmt.Errorf("status of Mount %s: %w", o.Name, err)
		}
		v := verdicts[o.Name]
		c.log.Info("mount object", "name", o.Name, "path", o.Spec.Path, "reason", v.reason, "message", v.message)
	}
	return version, nil
}

// verdict is what became of an object.
type verdict struct {
	ok      bool
	reason  string
	message string
}

// plan says which mounts objects make, and what to say of each object. Of two with the same path the
// older one has it.
func plan(objects []kube.Mount) (mounts []client.Mount, verdicts map[string]verdict) {
	sorted := slices.SortedFunc(slices.Values(objects), func(a, b kube.Mount) int {
		if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	verdicts = map[string]verdict{}
	owner := map[string]string{} // by path
	for _, o := range sorted {
		if o.DeletionTimestamp != nil {
			verdicts[o.Name] = verdict{reason: "Removed", message: "the object is being deleted"}
			continue
		}
		m, err := MountOf(o)
		if err != nil {
			verdicts[o.Name] = verdict{reason: "Invalid", message: strings.TrimPrefix(err.Error(), client.ErrInvalid.Error()+": ")}
			continue
		}
		if first := owner[m.Path]; first != "" {
			verdicts[o.Name] = verdict{reason: "Conflict", message: fmt.Sprintf("path %s is that of the older Mount %s: change one of them", m.Path, first)}
			continue
		}
		owner[m.Path] = o.Name
		mounts = append(mounts, m)
		verdicts[o.Name] = verdict{ok: true, reason: "Mounted", message: fmt.Sprintf("%s leads to %s", m.Path, m.URI)}
	}
	slices.SortFunc(mounts, func(a, b client.Mount) int { return strings.Compare(a.Path, b.Path) })
	return mounts, verdicts
}

// MountOf is the mount that an object asks for.
func MountOf(o kube.Mount) (client.Mount, error) {
	s := o.Spec
	return client.ParseMount(client.Mount{Path: s.Path, URI: s.URI, ReadOnly: s.ReadOnly, Options: s.Options, Credential: s.Credential,
		AllowInline: s.AllowInline, AllowClass: s.AllowClass, Object: o.Name})
}

// SpecOf is the inverse of MountOf.
func SpecOf(m client.Mount) kube.MountSpec {
	return kube.MountSpec{Path: m.Path, URI: m.URI, ReadOnly: m.ReadOnly, Options: m.Options, Credential: m.Credential,
		AllowInline: m.AllowInline, AllowClass: m.AllowClass}
}

// statusOf is the status of an object; the time of its condition is when that last changed its mind.
func statusOf(o kube.Mount, v verdict, now time.Time) kube.MountStatus {
	c := metav1.Condition{Type: kube.Ready, Status: metav1.ConditionFalse, ObservedGeneration: o.Generation, Reason: v.reason, Message: v.message,
		LastTransitionTime: metav1.NewTime(now.Truncate(time.Second))}
	if v.ok {
		c.Status = metav1.ConditionTrue
	}
	for _, had := range o.Status.Conditions {
		if had.Type == c.Type && had.Status == c.Status {
			c.LastTransitionTime = had.LastTransitionTime
		}
	}
	return kube.MountStatus{ObservedGeneration: o.Generation, Conditions: []metav1.Condition{c}}
}

// Trouble is why an object is no mount, as its status has it; "" if it is one, or nobody has said yet.
func Trouble(o kube.Mount) string {
	for _, c := range o.Status.Conditions {
		if c.Type == kube.Ready && c.Status == metav1.ConditionFalse {
			return c.Reason + ": " + c.Message
		}
	}
	return ""
}
