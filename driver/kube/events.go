package kube

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Repeat is how often the same thing is told again while it stays true: an Event lives for an hour.
const Repeat = 15 * time.Minute

// Recorder posts Events of type Warning. The same reason about the same object is one Event,
// however often, from however many processes and nodes it is told. Safe for concurrent use.
type Recorder struct {
	client    *Client
	component string // who speaks
	host      string // on which node
	now       func() time.Time

	mu   sync.Mutex // guards told; never held across a call
	told map[string]told
}

type told struct {
	message string
	when    time.Time
	count   int32
}

// NewRecorder makes one that speaks as component on a node.
func NewRecorder(c *Client, component, host string) *Recorder {
	return &Recorder{client: c, component: component, host: host, now: time.Now, told: map[string]told{}}
}

// maxMessage is the API's limit of an Event's note.
const maxMessage = 1024

// Warn tells the users of an object. about tells apart what has the same reason: the volume,
// say; it is not shown. What was told less than [Repeat] ago, in the same words, is not told again.
func (r *Recorder) Warn(ctx context.Context, object corev1.ObjectReference, about, reason, message string) error {
	if len(message) > maxMessage {
		message = message[:maxMessage-3] + "..."
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%s\x00%s", object.UID, object.Name, about, reason))
	name := fmt.Sprintf("%s.%x", strings.TrimRight(object.Name[:min(len(object.Name), 200)], "-."), sum[:8])
	now := r.now()
	before, seen := r.last(name)
	if seen && before.message == message && now.Sub(before.when) < Repeat {
		return nil
	}
	count := before.count + 1
	if err := r.post(ctx, name, object, reason, message, count, now); err != nil {
		return fmt.Errorf("event %s on %s %s: %w", reason, object.Kind, object.Name, err)
	}
	r.keep(name, told{message, now, count})
	return nil
}

func (r *Recorder) last(name string) (told, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t, ok := r.told[name]
	return t, ok
}

// keep remembers what was told, and forgets what is so old that it would be told again anyway.
func (r *Recorder) keep(name string, t told) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told[name] = t
	const many = 4096
	if len(r.told) < many {
		return
	}
	for n, old := range r.told {
		if t.when.Sub(old.when) >= Repeat {
			delete(r.told, n)
		}
	}
}

// post creates the Event, or says in the one that is there that it is still so.
func (r *Recorder) post(ctx context.Context, name string, object corev1.ObjectReference, reason, message string, count int32, now time.Time) error {
	at := metav1.NewTime(now)
	space := object.Namespace
	if space == "" { // of a cluster-wide object
		space = metav1.NamespaceDefault
	}
	events := r.client.Events(space)
	if count > 1 {
		err := r.again(ctx, name, space, map[string]any{"message": message, "lastTimestamp": at, "count": count})
		if !apierrors.IsNotFound(err) { // it has expired
			return err
		}
	}
	_, err := events.Create(ctx, &corev1.Event{
		ObjectMeta:          metav1.ObjectMeta{Name: name, Namespace: space},
		InvolvedObject:      object,
		Type:                corev1.EventTypeWarning,
		Reason:              reason,
		Message:             message,
		Source:              corev1.EventSource{Component: r.component, Host: r.host},
		ReportingController: r.component,
		ReportingInstance:   r.host,
		FirstTimestamp:      at,
		LastTimestamp:       at,
		Count:               1,
	})
	if apierrors.IsAlreadyExists(err) { // an earlier life of this process told it, or another node
		return r.again(ctx, name, space, map[string]any{"message": message, "lastTimestamp": at})
	}
	return err
}

func (r *Recorder) again(ctx context.Context, name, space string, change map[string]any) error {
	patch, err := json.Marshal(change)
	if err != nil {
		return err
	}
	return r.client.Events(space).Patch(ctx, name, patch)
}
