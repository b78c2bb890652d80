// Package kubeloads makes a job of each of the cluster's Load objects, and says in its status how far that is.
//
// It remembers nothing: a job knows the uid of its object, of which it is the only one. So any number of masters may do
// it at once, and one that was away is right again a round later. A job whose object is gone is canceled; an object whose
// job has ended is left alone.
package kubeloads

import (
	"context"
	"errors"
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
	"github.com/larderfs/larder/master/record"
)

// Jobs are the master's.
type Jobs interface {
	CreateJob(ctx context.Context, spec client.JobSpec) (client.Job, error) // of an object that has one, that
	ObjectJobs(ctx context.Context) ([]client.Job, error)                   // without their nodes
	Job(ctx context.Context, id string) (client.Job, error)
	CancelJob(ctx context.Context, id string) error
}

// Objects are the cluster's Loads.
type Objects interface {
	List(ctx context.Context) (loads []kube.Load, version string, err error)
	Changed(ctx context.Context, version string) error
	SetStatus(ctx context.Context, name string, status kube.LoadStatus) error
}

// Controller compares objects and jobs.
type Controller struct {
	objects Objects
	jobs    Jobs
	log     *slog.Logger
	every   time.Duration // while a job is at work
}

// New does nothing yet.
func New(objects Objects, jobs Jobs, log *slog.Logger) *Controller {
	return &Controller{objects: objects, jobs: jobs, log: log, every: statusEvery}
}

const (
	statusEvery = 3 * time.Second

	pauseMin = time.Second      // after a round that failed; then twice as long each time
	pauseMax = 30 * time.Second // at most

	together = 100 * time.Millisecond // changes that come in a row are one round
)

// Run goes on until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	pause := pauseMin
	for {
		version, busy, err := c.round(ctx)
		if err == nil {
			pause = pauseMin
			err = c.await(ctx, version, busy)
		}
		if ctx.Err() != nil {
			return nil
		}
		wait := together
		if err != nil {
			wait, pause = pause, min(2*pause, pauseMax)
			c.log.Warn("do what Load objects ask for; it will be tried again", "in", wait, "err", explain(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// await returns when an object has changed, or while a job is at work after a moment.
func (c *Controller) await(ctx context.Context, version string, busy bool) error {
	if !busy {
		return c.objects.Changed(ctx, version)
	}
	ctx, cancel := context.WithTimeout(ctx, c.every)
	defer cancel()
	if err := c.objects.Changed(ctx, version); ctx.Err() == nil {
		return err
	}
	return nil
}

func explain(err error) error {
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("the cluster does not know loads.%s: apply the CustomResourceDefinition of Larder's manifests: %w", kube.Group, err)
	}
	return err
}

// round does what has to be done now, and returns the version of what it saw; busy says that some of it has not ended.
func (c *Controller) round(ctx context.Context) (version string, busy bool, err error) {
	all, err := c.jobs.ObjectJobs(ctx) // first: an object that is not listed later is gone
	if err != nil {
		return "", false, err
	}
	objects, version, err := c.objects.List(ctx)
	if err != nil {
		return "", false, err
	}
	orphans := map[string]client.Job{} // by the uid of what asked for it
	for _, j := range all {
		orphans[j.Object] = j
	}
	for _, o := range objects {
		if o.DeletionTimestamp != nil {
			continue
		}
		delete(orphans, string(o.UID))
		if record.JobState(o.Status.State).Ended() {
			continue
		}
		status, err := c.statusOf(ctx, o)
		if err != nil {
			return "", false, err
		}
		busy = busy || !record.JobState(status.State).Ended()
		if err := c.tell(ctx, o, status); err != nil {
			return "", false, err
		}
	}
	for _, j := range orphans {
		if err := c.cancel(ctx, j); err != nil {
			return "", false, fmt.Errorf("cancel the job of a Load that is gone: %w", err)
		}
	}
	return version, busy, nil
}

// cancel ends the job of an object that is gone, unless it has ended.
func (c *Controller) cancel(ctx context.Context, j client.Job) error {
	if j.Canceled {
		return nil
	}
	j, err := c.jobs.Job(ctx, j.ID)
	if errors.Is(err, client.ErrNotFound) || err == nil && j.State().Ended() {
		return nil
	}
	if err == nil {
		err = c.jobs.CancelJob(ctx, j.ID)
	}
	if err == nil {
		c.log.Info("the Load object of a job is gone: it is canceled", "job", j.ID)
	}
	return err
}

func (c *Controller) tell(ctx context.Context, o kube.Load, status kube.LoadStatus) error {
	if reflect.DeepEqual(status, o.Status) {
		return nil
	}
	if err := c.objects.SetStatus(ctx, o.Name, status); err != nil && !apierrors.IsNotFound(err) { // deleted meanwhile
		return fmt.Errorf("status of Load %s: %w", o.Name, err)
	}
	if status.State != o.Status.State {
		c.log.Info("load object", "name", o.Name, "job", status.Job, "state", status.State, "message", status.Message)
	}
	return nil
}

// statusOf is what to say of an object, whose job is made if there is none. What cannot be now is tried again.
func (c *Controller) statusOf(ctx context.Context, o kube.Load) (kube.LoadStatus, error) {
	s := kube.LoadStatus{}
	j, err := c.jobs.CreateJob(ctx, SpecOf(o))
	switch {
	case err == nil:
		s = statusOfJob(j)
	case errors.Is(err, client.ErrInvalid):
		s.State, s.Message = string(record.JobFailed), plain(err)
	case errors.Is(err, client.ErrNotFound), errors.Is(err, client.ErrRefused), errors.Is(err, client.ErrUnavailable):
		s.State, s.Message = string(record.JobWaiting), plain(err)
	default:
		return s, err
	}
	return withCondition(o, s, time.Now()), nil
}

// plain is an error's text without the sentinel before it.
func plain(err error) string {
	text := err.Error()
	for _, s := range []error{client.ErrInvalid, client.ErrNotFound, client.ErrRefused, client.ErrUnavailable} {
		text = strings.TrimPrefix(text, s.Error()+": ")
	}
	return text
}

// SpecOf is the job that an object asks for.
func SpecOf(o kube.Load) client.JobSpec {
	s := client.JobSpec{Kind: record.Load, URIs: o.Spec.Paths, Endpoint: o.Spec.Endpoint, Nodes: o.Spec.Nodes, Object: string(o.UID)}
	if s.All = slices.Equal(s.Nodes, []string{kube.AllNodes}); s.All {
		s.Nodes = nil
	}
	if o.Spec.Pin {
		s.Kind = record.Pin
	}
	return s
}

func statusOfJob(j client.Job) kube.LoadStatus {
	s := kube.LoadStatus{Job: j.ID, State: string(j.State())}
	ended := 0
	for _, n := range j.Nodes {
		s.Files, s.Bytes, s.PresentFiles, s.FailedFiles = s.Files+n.Files, s.Bytes+n.Bytes, s.PresentFiles+n.PresentFiles, s.FailedFiles+n.FailedFiles
		if n.State.Ended() {
			ended++
		}
		if s.Message == "" && n.Error != "" {
			s.Message = n.Node + ": " + n.Error
		}
	}
	if j.State() == record.JobSkipped {
		s.Message = "no node has a volume of it: make another Load when one is published, or, of what is mounted, with nodes: [all]"
	}
	s.Nodes = fmt.Sprintf("%d/%d", ended, len(j.Nodes))
	return s
}

// withCondition adds what kubectl wait asks for; its time is when it last changed its mind.
func withCondition(o kube.Load, s kube.LoadStatus, now time.Time) kube.LoadStatus {
	c := metav1.Condition{Type: kube.Complete, Status: metav1.ConditionFalse, ObservedGeneration: o.Generation, Message: s.Message,
		Reason: strings.ToUpper(s.State[:1]) + s.State[1:], LastTransitionTime: metav1.NewTime(now.Truncate(time.Second))}
	if s.State == string(record.JobDone) {
		c.Status = metav1.ConditionTrue
	}
	for _, had := range o.Status.Conditions {
		if had.Type == c.Type && had.Status == c.Status {
			c.LastTransitionTime = had.LastTransitionTime
		}
	}
	s.Conditions = []metav1.Condition{c}
	return s
}
