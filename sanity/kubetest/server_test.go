package kubetest

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// call makes a request and returns its status and body.
func (s *Server) call(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, s.http.URL+"/api/v1/"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

func TestVolumesLiveAsInKubernetes(t *testing.T) {
	s := Start(t)
	s.ControlVolumes(t)
	const volume = `{"kind":"PersistentVolume","apiVersion":"v1","metadata":{"name":"v","labels":{"a":"b"}}}`
	if code, body := s.call(t, "POST", "persistentvolumes", volume); code != 200 || !strings.Contains(body, protection) {
		t.Fatalf("%d %s", code, body)
	}
	phase := func() corev1.PersistentVolumePhase {
		for _, pv := range s.PersistentVolumes() {
			return pv.Status.Phase
		}
		return ""
	}
	s.Await(t, func() error {
		if phase() != corev1.VolumeAvailable {
			return errors.New("it does not become available")
		}
		return nil
	})
	s.Bind(t, "v", "ns", "claim")
	if code, _ := s.call(t, "DELETE", "persistentvolumes/v", `{"kind":"DeleteOptions","apiVersion":"v1","preconditions":{"resourceVersion":"1"}}`); code != 409 {
		t.Errorf("deleted by one who has not seen it: %d", code)
	}
	if code, _ := s.call(t, "DELETE", "persistentvolumes/v", ""); code != 200 || len(s.PersistentVolumes()) != 1 {
		t.Errorf("a bound volume goes before its claim: %d", code)
	}
	s.Release(t, "v")
	s.Await(t, func() error {
		if len(s.PersistentVolumes()) > 0 {
			return errors.New("a released volume that was deleted stays")
		}
		return nil
	})
}

func TestListsSelect(t *testing.T) {
	s := Start(t)
	for _, p := range []struct{ ns, name, node string }{{"one", "a", "n1"}, {"one", "b", "n2"}, {"two", "c", "n1"}} {
		s.Set(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: p.ns, Name: p.name, Labels: map[string]string{"is": p.name}}, Spec: corev1.PodSpec{NodeName: p.node}})
	}
	for path, want := range map[string]string{
		"pods": "abc", "namespaces/one/pods": "ab", "pods?fieldSelector=spec.nodeName%3Dn1": "ac", "pods?labelSelector=is%3Db": "b",
		"namespaces/two/pods?fieldSelector=metadata.name%3Da": "", "namespaces/one/secrets": "",
	} {
		_, body := s.call(t, "GET", path, "")
		for _, name := range []string{"a", "b", "c"} {
			if got := strings.Contains(body, `"name":"`+name+`"`); got != strings.Contains(want, name) {
				t.Errorf("%s: %s is in it: %v", path, name, got)
			}
		}
	}
	if code, _ := s.call(t, "GET", "namespaces/one/pods/none", ""); code != 404 {
		t.Errorf("%d", code)
	}
	if code, _ := s.call(t, "POST", "namespaces/one/pods", "no object"); code != 400 {
		t.Errorf("%d", code)
	}
	s.Fault(func(string, string) error { return errors.New("down") })
	if code, body := s.call(t, "GET", "pods", ""); code != 500 || !strings.Contains(body, "down") {
		t.Errorf("%d %s", code, body)
	}
}
