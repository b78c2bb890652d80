package driver

import (
	"errors"
	"log/slog"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/object"
)

// told has a new process look, and returns what the worker was told.
func told(w *ward) map[string][]Pod {
	w.t.Helper()
	u := newUsers(w.podHealth, w.stats.TellUsers, slog.New(slog.DiscardHandler))
	must(w.t, u.look(w.t.Context()))
	return w.stats.users[len(w.stats.users)-1]
}

func pod(uid string) Pod { return Pod{UID: uid, Namespace: "ns", Name: "pod-" + uid} }

func TestUsersAreWhoHasTheVolumeMountedNow(t *testing.T) {
	w := newWard(t)
	w.mount("v")
	w.mount("other")
	a := w.publish("a", "pvc-1", Name, "v")
	w.publish("b", "pvc-1", Name, "v")
	w.publish("b", "again", Name, "v") // twice in one pod
	w.publish("b", "pvc-2", Name, "other")
	w.publish("c", "theirs", "csi.example.com", "v")
	gone := w.publish("gone", "pvc-1", Name, "v")
	must(t, unix.Unmount(gone, unix.MNT_DETACH))
	for uid, p := range w.pods.pods {
		p.Started = nil
		w.pods.pods[uid] = p
	}
	want := map[string][]Pod{"v": {pod("a"), pod("b")}, "other": {pod("b")}}
	if got := told(w); !reflect.DeepEqual(got, want) {
		t.Errorf("told %v; want %v", got, want)
	}
	must(t, w.broker.Unmount(t.Context(), a))
	want = map[string][]Pod{"v": {pod("b")}, "other": {pod("b")}}
	if got := told(w); !reflect.DeepEqual(got, want) {
		t.Errorf("unpublished: told %v; want %v", got, want)
	}
}

func TestUsersHaveTheNamesThatThePublishTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard(t)
		w.mount("v")
		w.publish("a", "pvc-1", Name, "v")
		w.publish("b", "pvc-1", Name, "v")
		u := newUsers(w.podHealth, w.stats.TellUsers, slog.New(slog.DiscardHandler))
		for _, uid := range []string{"a", "b"} {
			u.changed(map[string]string{keyPodUID: uid, keyPodNamespace: "ns", keyPodName: "pod-" + uid})
		}
		u.changed(map[string]string{keyPodUID: "../b", keyPodName: "x"}) // nobody's
		u.changed(map[string]string{keyPodUID: "soon", keyPodNamespace: "ns", keyPodName: "pod-soon"})
		u.changed(nil)
		must(t, u.look(t.Context()))
		w.publish("soon", "pvc-1", Name, "v") // the kubelet writes it down, say
		must(t, u.look(t.Context()))
		if got := w.stats.users[1]["v"]; !slices.ContainsFunc(got, func(p Pod) bool { return p.Name == "pod-soon" }) {
			t.Errorf("told %v", got)
		}
		must(t, w.broker.Unmount(t.Context(), filepath.Join(w.dir, "pods/soon/volumes/kubernetes.io~csi/pvc-1/mount")))
		want := map[string][]Pod{"v": {pod("a"), pod("b")}}
		if got := w.stats.users[0]; !reflect.DeepEqual(got, want) || w.pods.asked != 0 {
			t.Errorf("told %v after %d questions; want %v after none", got, w.pods.asked, want)
		}
		must(t, w.broker.Unmount(t.Context(), filepath.Join(w.dir, "pods/a/volumes/kubernetes.io~csi/pvc-1/mount")))
		must(t, u.look(t.Context()))
		time.Sleep(nameLife + time.Second)
		must(t, u.look(t.Context()))
		if len(u.names) != 1 {
			t.Errorf("names %v are remembered of pods that are gone", u.names)
		}
		w.stats.err = object.ErrUnavailable
		if err := u.look(t.Context()); !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("no worker: %v", err)
		}
	})
}

func TestUsersWithoutAClusterAreUIDs(t *testing.T) {
	w := newWard(t)
	w.podHealth.pods = nil
	w.mount("v")
	w.publish("a", "pvc-1", Name, "v")
	if got, want := told(w), (map[string][]Pod{"v": {{UID: "a"}}}); !reflect.DeepEqual(got, want) {
		t.Errorf("told %v; want %v", got, want)
	}
}
