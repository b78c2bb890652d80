package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/larderfs/larder/driver"
	"github.com/larderfs/larder/sanity/kubetest"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

func connect(t *testing.T, s *kubetest.Server) *Client {
	t.Helper()
	c, err := Connect(s.Kubeconfig(t), "test")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func volume(name string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"a": "b"}}}
}

func TestOutsideOfAClusterThereIsNone(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := Connect("", "test"); !errors.Is(err, ErrNoCluster) {
		t.Errorf("got %v", err)
	}
	if _, err := Connect("/no/such/file", "test"); err == nil || errors.Is(err, ErrNoCluster) {
		t.Errorf("a kubeconfig that is not there: %v", err)
	}
}

func TestObjectsAreWrittenAndRead(t *testing.T) {
	s := kubetest.Start(t)
	pvs := connect(t, s).PersistentVolumes()
	made, err := pvs.Create(t.Context(), volume("x"))
	if err != nil || made.UID == "" || made.ResourceVersion == "" {
		t.Fatalf("%+v, %v", made, err)
	}
	if _, err := pvs.Create(t.Context(), volume("x")); !apierrors.IsAlreadyExists(err) {
		t.Errorf("created twice: %v", err)
	}
	if got, err := pvs.Get(t.Context(), "x"); err != nil || got.UID != made.UID || got.Labels["a"] != "b" {
		t.Errorf("%+v, %v", got, err)
	}
	if list, err := pvs.List(t.Context(), metav1.ListOptions{LabelSelector: "a=c"}); err != nil || len(list.Items) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	if err := pvs.Patch(t.Context(), "x", []byte(`{"metadata":{"annotations":{"k":"v"}}}`)); err != nil {
		t.Fatal(err)
	}
	if err := pvs.Delete(t.Context(), made); !apierrors.IsConflict(err) {
		t.Errorf("an object that has changed since it was seen was deleted: %v", err)
	}
	seen, err := pvs.Get(t.Context(), "x")
	if err != nil || seen.Annotations["k"] != "v" {
		t.Fatalf("%+v, %v", seen, err)
	}
	if err := pvs.Delete(t.Context(), seen); err != nil {
		t.Fatal(err)
	}
	if got, err := pvs.Get(t.Context(), "x"); err != nil || got.DeletionTimestamp == nil {
		t.Errorf("%+v, %v: a volume stays until nobody protects it", got, err)
	}
}

func TestFollowTellsOfEveryChange(t *testing.T) {
	s := kubetest.Start(t)
	s.Set(volume("x"))
	seen := make(chan []string, 100)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		connect(t, s).PersistentVolumes().Follow(ctx, metav1.ListOptions{LabelSelector: "a=b"}, func(list []*corev1.PersistentVolume) {
			var names []string
			for _, v := range list {
				names = append(names, v.Name)
			}
			slices.Sort(names)
			seen <- names
		})
	}()
	await := func(want ...string) {
		t.Helper()
		for got := range seen {
			if slices.Equal(got, want) {
				return
			}
		}
	}
	await("x")
	s.Set(volume("y"))
	await("x", "y")
	s.Remove(volume("x"))
	await("y")
	cancel()
	<-done
}

func TestTheSameIsToldOnce(t *testing.T) {
	s := kubetest.Start(t)
	c := connect(t, s)
	object := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: "ns", Name: strings.Repeat("p", 252), UID: "u"}
	now := time.Now()
	r := NewRecorder(c, "larder", "n1")
	r.now = func() time.Time { return now }
	warn := func(r *Recorder, about, message string) {
		t.Helper()
		if err := r.Warn(t.Context(), object, about, "MountLost", message); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		warn(r, "v", "gone")
	}
	if calls := s.Calls(); len(calls) != 1 {
		t.Errorf("calls: %q", calls)
	}
	other := NewRecorder(c, "larder", "n2") // another node, or another life
	warn(other, "v", "gone")
	warn(r, "w", "gone")
	events := s.Events()
	if len(events) != 2 {
		t.Fatalf("%d events; want one for each volume", len(events))
	}
	e := events[0]
	if e.Namespace != "ns" || e.Reason != "MountLost" || e.Message != "gone" || e.Type != "Warning" || e.InvolvedObject.UID != "u" || e.Count != 1 {
		t.Errorf("%+v", e)
	}
	now = now.Add(Repeat)
	warn(r, "v", "gone")
	warn(r, "w", "gone for good")
	for _, e := range s.Events() {
		if e.Count != 2 || !e.LastTimestamp.After(e.FirstTimestamp.Time) {
			t.Errorf("told again: %+v", e)
		}
		s.Remove(e) // it expires
	}
	now = now.Add(Repeat)
	warn(r, "v", "gone")
	if events := s.Events(); len(events) != 1 {
		t.Errorf("after it had expired: %d events", len(events))
	}
	s.Fault(func(string, string) error { return fmt.Errorf("down") })
	now = now.Add(Repeat)
	if err := r.Warn(t.Context(), object, "v", "MountLost", "x"); err == nil || !strings.Contains(err.Error(), "MountLost") {
		t.Errorf("API server down: %v", err)
	}
}

func TestPodsOfTheNode(t *testing.T) {
	s := kubetest.Start(t)
	start := metav1.NewTime(time.Now().Truncate(time.Second))
	pod := func(name, node string, phase corev1.PodPhase) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: "uid-" + "1"},
			Spec:       corev1.PodSpec{NodeName: node},
			Status: corev1.PodStatus{Phase: phase, ContainerStatuses: []corev1.ContainerStatus{
				{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: start}}},
				{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}}},
			}},
		}
	}
	s.Set(pod("a", "n1", corev1.PodRunning))
	s.Set(pod("b", "n2", corev1.PodRunning))
	c := connect(t, s)
	n := NodePods{Client: c, Recorder: NewRecorder(c, "larder", "n1"), Node: "n1"}
	pods, err := n.Pods(t.Context())
	if err != nil || len(pods) != 1 {
		t.Fatalf("%+v, %v", pods, err)
	}
	p := pods["uid-1"]
	if p.Name != "a" || p.Namespace != "ns" || p.Ending || len(p.Started) != 1 || !p.Started[0].Equal(start.Time) {
		t.Errorf("%+v", p)
	}
	s.Set(pod("a", "n1", corev1.PodSucceeded))
	if pods, err = n.Pods(t.Context()); err != nil || !pods["uid-1"].Ending {
		t.Errorf("%+v, %v", pods, err)
	}
	if err := n.Warn(t.Context(), driver.Pod{UID: "uid-1", Namespace: "ns", Name: "a"}, "v", "MountLost", "gone"); err != nil {
		t.Fatal(err)
	}
	if e := s.Events(); len(e) != 1 || e[0].InvolvedObject.Kind != "Pod" || e[0].InvolvedObject.UID != "uid-1" {
		t.Errorf("%+v", e)
	}
}
