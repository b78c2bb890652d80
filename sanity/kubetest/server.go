// Package kubetest is a Kubernetes API server in memory, for tests of what talks to one: core/v1
// objects with names, uids, versions, selectors, watches, preconditions and finalizers. No
// controllers run, except that what they would do can be done to it: see [Server.Set].
//
// It is as strict as tests here need. That a real one agrees is for the end-to-end tests.
package kubetest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
)

// Object is a pointer to one of core/v1's structs.
type Object interface {
	runtime.Object
	metav1.Object
}

// Server is an API server.
type Server struct {
	http  *httptest.Server
	codec runtime.Decoder

	mu      sync.Mutex // guards the fields below
	version int
	objects map[string]Object // by path below /api/v1/
	log     []change          // all that ever happened
	changed chan struct{}     // closed at each change, then replaced
	calls   []string          // "VERB path"
	fault   func(verb, path string) error
}

type change struct {
	version int
	kind    string // ADDED, MODIFIED, DELETED
	path    string
	object  Object
}

// Start starts one for the length of a test.
func Start(t testing.TB) *Server {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	s := &Server{codec: serializer.NewCodecFactory(scheme).UniversalDeserializer(), objects: map[string]Object{}, changed: make(chan struct{})}
	s.http = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(func() {
		s.http.CloseClientConnections() // watches
		s.http.Close()
	})
	return s
}

// Kubeconfig writes a file for clients and returns its path.
func (s *Server) Kubeconfig(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q}}]
users: [{name: u, user: {}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, s.http.URL)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Fault makes requests fail with the error that f returns; nil makes none fail.
func (s *Server) Fault(f func(verb, path string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Calls are the requests so far, "VERB path", watches as WATCH.
func (s *Server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Set stores an object as a controller or a user would have it, whatever was there.
func (s *Server) Set(o Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store(pathOf(o), o.DeepCopyObject().(Object))
}

// Remove removes an object at once, whatever its finalizers.
func (s *Server) Remove(o Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(pathOf(o))
}

// PersistentVolumes are all that exist, by name.
func (s *Server) PersistentVolumes() []*corev1.PersistentVolume {
	return all[*corev1.PersistentVolume](s)
}

// Events are all that exist, by name.
func (s *Server) Events() []*corev1.Event { return all[*corev1.Event](s) }

func all[T Object](s *Server) (out []T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.objects {
		if v, ok := o.(T); ok {
			out = append(out, v.DeepCopyObject().(T))
		}
	}
	slices.SortFunc(out, func(a, b T) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

// Await waits until check is nil, for as long as things change; at most a minute.
func (s *Server) Await(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		err := check()
		if err == nil {
			return
		}
		select {
		case <-changed:
		case <-time.After(50 * time.Millisecond): // what check looks at may be elsewhere
		case <-deadline.C:
			t.Fatalf("after a minute: %v", err)
		}
	}
}

var resources = map[string]string{
	"pods": "Pod", "nodes": "Node", "persistentvolumes": "PersistentVolume", "configmaps": "ConfigMap", "secrets": "Secret", "events": "Event",
}

func pathOf(o Object) string {
	resource := ""
	switch o.(type) {
	case *corev1.Pod:
		resource = "pods"
	case *corev1.Node:
		resource = "nodes"
	case *corev1.PersistentVolume:
		resource = "persistentvolumes"
	case *corev1.ConfigMap:
		resource = "configmaps"
	case *corev1.Secret:
		resource = "secrets"
	case *corev1.Event:
		resource = "events"
	default:
		panic(fmt.Sprintf("kubetest: %T", o))
	}
	if o.GetNamespace() != "" {
		return "namespaces/" + o.GetNamespace() + "/" + resource + "/" + o.GetName()
	}
	return resource + "/" + o.GetName()
}

// store requires s.mu.
func (s *Server) store(path string, o Object) {
	s.version++
	kind := "ADDED"
	if old, ok := s.objects[path]; ok {
		kind = "MODIFIED"
		o.SetUID(old.GetUID())
		o.SetCreationTimestamp(old.GetCreationTimestamp())
	} else {
		if o.GetUID() == "" {
			o.SetUID(types.UID(uuid.NewUUID()))
		}
		o.SetCreationTimestamp(metav1.Now())
	}
	o.SetResourceVersion(strconv.Itoa(s.version))
	o.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{Version: "v1", Kind: kindOf(path)})
	s.objects[path] = o
	s.note(kind, path, o)
	if o.GetDeletionTimestamp() != nil && len(o.GetFinalizers()) == 0 {
		s.remove(path)
	}
}

// remove requires s.mu.
func (s *Server) remove(path string) {
	o, ok := s.objects[path]
	if !ok {
		return
	}
	s.version++
	o = o.DeepCopyObject().(Object)
	o.SetResourceVersion(strconv.Itoa(s.version))
	delete(s.objects, path)
	s.note("DELETED", path, o)
}

// note requires s.mu.
func (s *Server) note(kind, path string, o Object) {
	s.log = append(s.log, change{s.version, kind, path, o.DeepCopyObject().(Object)})
	close(s.changed)
	s.changed = make(chan struct{})
}

// kindOf "namespaces/n/pods/p" or "pods/p" is Pod.
func kindOf(path string) string {
	parts := strings.Split(path, "/")
	if parts[0] == "namespaces" && len(parts) > 2 {
		return resources[parts[2]]
	}
	return resources[parts[0]]
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/api/v1/")
	verb := r.Method
	if r.URL.Query().Get("watch") != "" {
		verb = "WATCH"
	}
	s.mu.Lock()
	s.calls = append(s.calls, verb+" "+path)
	fault := s.fault
	s.mu.Unlock()
	var answer any
	err := error(nil)
	if fault != nil {
		err = fault(verb, path)
	}
	if err == nil {
		if verb == "WATCH" {
			s.watch(r.Context(), w, path, r)
			return
		}
		answer, err = s.do(verb, path, r)
	}
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		status := errors.NewInternalError(err).ErrStatus
		if e, ok := err.(errors.APIStatus); ok {
			status = e.Status()
		}
		status.Kind, status.APIVersion = "Status", "v1"
		w.WriteHeader(int(status.Code))
		answer = status
	}
	json.NewEncoder(w).Encode(answer)
}

func (s *Server) do(verb, path string, r *http.Request) (any, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if kindOf(path) == "" {
		return nil, errors.NewNotFound(schema.GroupResource{Resource: path}, "")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o, there := s.objects[path]
	name := path[strings.LastIndex(path, "/")+1:]
	isOne := resources[name] == "" // the last element is a name, not a resource
	resource := schema.GroupResource{Resource: strings.ToLower(kindOf(path)) + "s"}
	switch {
	case verb == http.MethodGet && !isOne:
		return s.list(path, r)
	case verb == http.MethodPost && !isOne:
		return s.create(path, body, resource)
	case !there:
		return nil, errors.NewNotFound(resource, name)
	case verb == http.MethodGet:
		return o, nil
	case verb == http.MethodPatch:
		return s.patch(path, o, body)
	case verb == http.MethodDelete:
		return s.delete(path, o, body, resource)
	}
	return nil, errors.NewMethodNotSupported(resource, verb)
}

// create requires s.mu.
func (s *Server) create(path string, body []byte, resource schema.GroupResource) (any, error) {
	decoded, _, err := s.codec.Decode(body, nil, nil)
	if err != nil {
		return nil, errors.NewBadRequest(err.Error())
	}
	o, ok := decoded.(Object)
	if !ok || o.GetName() == "" {
		return nil, errors.NewBadRequest(fmt.Sprintf("%T without a name", decoded))
	}
	path += "/" + o.GetName()
	if _, ok := s.objects[path]; ok {
		return nil, errors.NewAlreadyExists(resource, o.GetName())
	}
	if _, ok := o.(*corev1.PersistentVolume); ok { // the admission plugin StorageObjectInUseProtection
		o.SetFinalizers(append(o.GetFinalizers(), protection))
	}
	s.store(path, o)
	return o, nil
}

// patch is a JSON merge patch. Requires s.mu.
func (s *Server) patch(path string, o Object, patch []byte) (any, error) {
	var have, want map[string]any
	b, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &have); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(patch, &want); err != nil {
		return nil, errors.NewBadRequest(err.Error())
	}
	merge(have, want)
	if b, err = json.Marshal(have); err != nil {
		return nil, err
	}
	decoded, _, err := s.codec.Decode(b, nil, nil)
	if err != nil {
		return nil, errors.NewBadRequest(err.Error())
	}
	changed := decoded.(Object)
	s.store(path, changed)
	return changed, nil
}

func merge(have, want map[string]any) {
	for k, v := range want {
		old, isMap := have[k].(map[string]any)
		change, toMap := v.(map[string]any)
		switch {
		case v == nil:
			delete(have, k)
		case isMap && toMap:
			merge(old, change)
		default:
			have[k] = v
		}
	}
}

// delete requires s.mu.
func (s *Server) delete(path string, o Object, body []byte, resource schema.GroupResource) (any, error) {
	opts := &metav1.DeleteOptions{}
	if len(body) > 0 {
		decoded, _, err := s.codec.Decode(body, &schema.GroupVersionKind{Version: "v1", Kind: "DeleteOptions"}, nil)
		if err != nil {
			return nil, errors.NewBadRequest(err.Error())
		}
		opts = decoded.(*metav1.DeleteOptions)
	}
	if p := opts.Preconditions; p != nil && (p.UID != nil && *p.UID != o.GetUID() || p.ResourceVersion != nil && *p.ResourceVersion != o.GetResourceVersion()) {
		return nil, errors.NewConflict(resource, o.GetName(), fmt.Errorf("it has changed"))
	}
	if len(o.GetFinalizers()) == 0 {
		s.remove(path)
		return metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess}, nil
	}
	if o.GetDeletionTimestamp() == nil {
		o = o.DeepCopyObject().(Object)
		now := metav1.Now()
		o.SetDeletionTimestamp(&now)
		s.store(path, o)
	}
	return o, nil
}

// list requires s.mu.
func (s *Server) list(path string, r *http.Request) (any, error) {
	match, err := selector(path, r)
	if err != nil {
		return nil, err
	}
	items := []Object{}
	for at, o := range s.objects {
		if match(at, o) {
			items = append(items, o)
		}
	}
	return map[string]any{
		"kind": kindOf(path) + "List", "apiVersion": "v1", "items": items,
		"metadata": map[string]any{"resourceVersion": strconv.Itoa(s.version)},
	}, nil
}

// selector matches objects of a list: of a namespace, or of all.
func selector(path string, r *http.Request) (func(path string, o Object) bool, error) {
	byLabel, err := labels.Parse(r.URL.Query().Get("labelSelector"))
	if err != nil {
		return nil, errors.NewBadRequest(err.Error())
	}
	fields := map[string]string{}
	for term := range strings.SplitSeq(r.URL.Query().Get("fieldSelector"), ",") {
		if k, v, ok := strings.Cut(term, "="); ok {
			fields[k] = strings.TrimPrefix(v, "=")
		}
	}
	kind := kindOf(path)
	return func(at string, o Object) bool {
		if kindOf(at) != kind || strings.HasPrefix(path, "namespaces/") && !strings.HasPrefix(at, path+"/") {
			return false
		}
		for k, v := range fields {
			if field(o, k) != v {
				return false
			}
		}
		return byLabel.Matches(labels.Set(o.GetLabels()))
	}, nil
}

func field(o Object, name string) string {
	switch p, _ := o.(*corev1.Pod); {
	case name == "metadata.name":
		return o.GetName()
	case name == "metadata.namespace":
		return o.GetNamespace()
	case name == "spec.nodeName" && p != nil:
		return p.Spec.NodeName
	}
	return "\x00" // matches nothing
}

// watch streams what happened after a version, or all that is there and then what happens.
func (s *Server) watch(ctx context.Context, w http.ResponseWriter, path string, r *http.Request) {
	match, err := selector(path, r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	out := json.NewEncoder(w)
	send := func(kind string, o any) { out.Encode(map[string]any{"type": kind, "object": o}) }
	next := 0 // of s.log
	s.mu.Lock()
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		for at, o := range s.objects {
			if match(at, o) {
				send("ADDED", o)
			}
		}
		send("BOOKMARK", map[string]any{"kind": kindOf(path), "apiVersion": "v1", "metadata": map[string]any{
			"resourceVersion": strconv.Itoa(s.version), "annotations": map[string]string{metav1.InitialEventsAnnotationKey: "true"}}})
		next = len(s.log)
	} else {
		from, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
		for next < len(s.log) && s.log[next].version <= from {
			next++
		}
	}
	for {
		for ; next < len(s.log); next++ {
			if c := s.log[next]; match(c.path, c.object) {
				send(c.kind, c.object)
			}
		}
		changed := s.changed
		s.mu.Unlock()
		w.(http.Flusher).Flush()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		s.mu.Lock()
	}
}
