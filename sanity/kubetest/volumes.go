package kubetest

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// ControlVolumes does what Kubernetes does to PersistentVolumes by itself, for the length of a
// test: new ones become Available, deleted ones that no claim has go.
func (s *Server) ControlVolumes(t testing.TB) {
	stop, done := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(stop); <-done })
	go func() {
		defer close(done)
		for {
			s.mu.Lock()
			changed := s.changed
			s.mu.Unlock()
			for _, pv := range s.PersistentVolumes() {
				s.control(pv)
			}
			select {
			case <-changed:
			case <-stop:
				return
			}
		}
	}()
}

func (s *Server) control(seen *corev1.PersistentVolume) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[pathOf(seen)]
	if !ok {
		return
	}
	pv := o.(*corev1.PersistentVolume).DeepCopy()
	switch {
	case pv.DeletionTimestamp != nil && pv.Status.Phase != corev1.VolumeBound:
		pv.Finalizers = slices.DeleteFunc(pv.Finalizers, func(f string) bool { return f == protection })
	case pv.Status.Phase == "":
		pv.Status.Phase = corev1.VolumeAvailable
	default:
		return
	}
	s.store(pathOf(pv), pv)
}

const protection = "kubernetes.io/pv-protection"

// Bind gives a volume to a claim.
func (s *Server) Bind(t testing.TB, name, namespace, claim string) *corev1.PersistentVolume {
	return s.change(t, name, func(pv *corev1.PersistentVolume) {
		pv.Spec.ClaimRef = &corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: namespace, Name: claim}
		pv.Status.Phase = corev1.VolumeBound
	})
}

// Release is what happens to a volume whose claim was deleted.
func (s *Server) Release(t testing.TB, name string) {
	s.change(t, name, func(pv *corev1.PersistentVolume) { pv.Status.Phase = corev1.VolumeReleased })
}

func (s *Server) change(t testing.TB, name string, f func(*corev1.PersistentVolume)) *corev1.PersistentVolume {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	path := "persistentvolumes/" + name
	o, ok := s.objects[path]
	if !ok {
		t.Fatal(fmt.Errorf("there is no persistent volume %s", name))
	}
	pv := o.(*corev1.PersistentVolume).DeepCopy()
	f(pv)
	s.store(path, pv)
	return pv
}
