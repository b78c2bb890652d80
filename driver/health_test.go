package driver

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/sanity/leak"
)

// fakePods is a cluster whose pods are all on this node.
type fakePods struct {
	mu    sync.Mutex
	pods  map[string]Pod
	asked int
	told  []string // "pod reason message"
}

func (f *fakePods) Pods(context.Context) (map[string]Pod, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return f.pods, nil
}

func (f *fakePods) Warn(_ context.Context, p Pod, about, reason, message string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, fmt.Sprintf("%s/%s %s %s", p.Namespace, p.Name, reason, message))
	return nil
}

// ward is a kubelet's directory with pods and their volumes, and what looks after them.
type ward struct {
	*podHealth
	t      *testing.T
	dir    string
	broker *fakeBroker
	stats  *fakeStats
	pods   *fakePods
}

func newWard(t *testing.T) *ward {
	w := &ward{t: t, dir: t.TempDir(), broker: newFakeBroker(), stats: &fakeStats{}, pods: &fakePods{pods: map[string]Pod{}}}
	t.Cleanup(func() { leak.Unmount(w.dir) })
	w.podHealth = newPodHealth(w.broker, w.stats, w.pods, w.dir, slog.New(slog.DiscardHandler))
	return w
}

func (w *ward) mount(id string) {
	w.t.Helper()
	path := filepath.Join(w.dir, "plugins", id)
	must(w.t, os.MkdirAll(path, 0o755), w.broker.Mount(w.t.Context(), brokerwire.Volume{ID: id}, path))
}

// publish gives a pod a volume, as the kubelet does, and starts its containers. It returns the target.
func (w *ward) publish(pod, name, driver, id string) string {
	w.t.Helper()
	dir := filepath.Join(w.dir, "pods", pod, "volumes/kubernetes.io~csi", name)
	target := filepath.Join(dir, "mount")
	must(w.t, os.MkdirAll(target, 0o755),
		os.WriteFile(filepath.Join(dir, "vol_data.json"), fmt.Appendf(nil, `{"driverName":%q,"volumeHandle":%q,"specVolID":%q}`, driver, id, name), 0o644))
	if driver == Name {
		must(w.t, w.broker.Bind(w.t.Context(), id, "", target, true))
	}
	w.start(pod)
	return target
}

// start starts a pod's containers.
func (w *ward) start(pod string) {
	w.pods.pods[pod] = Pod{UID: pod, Namespace: "ns", Name: "pod-" + pod, Started: []time.Time{time.Now().Truncate(time.Second)}}
}

// look looks once and returns who was told what.
func (w *ward) look() []string {
	w.t.Helper()
	w.pods.told = nil
	must(w.t, w.podHealth.look(w.t.Context()))
	return w.pods.told
}

func wantTold(t *testing.T, got []string, want ...string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("told %q; want %d Events", got, len(want))
	}
	for i := range want {
		for word := range strings.SplitSeq(want[i], "|") {
			if !strings.Contains(got[i], word) {
				t.Errorf("told %q; want %q in it", got[i], word)
			}
		}
	}
}

func TestPodsOfAGivenUpMountAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard(t)
		w.mount("v")
		w.mount("other")
		a := w.publish("a", "pvc-1", Name, "v")
		w.publish("b", "pvc-2", Name, "other")
		w.publish("c", "theirs", "csi.example.com", "v")
		time.Sleep(time.Minute)
		wantTold(t, w.look())
		w.lost([]string{"/elsewhere", a}, "no worker returned")
		wantTold(t, w.look(), `ns/pod-a MountLost|"pvc-1"|no worker returned|kubectl delete pod -n ns pod-a`)
		time.Sleep(time.Minute)
		wantTold(t, w.look(), "ns/pod-a MountLost") // as long as it is so
		w.start("a")
		wantTold(t, w.look())
		wantTold(t, w.look())
	})
}

func TestPodsOlderThanTheirMountAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard(t)
		w.mount("v")
		target := w.publish("old", "pvc-1", Name, "v")
		time.Sleep(time.Minute)
		wantTold(t, w.look())
		asked := w.pods.asked
		wantTold(t, w.look())
		if w.pods.asked != asked {
			t.Error("pods that are well are asked for again and again")
		}
		// Both holders die, a new mount is published at the same place by an earlier life of this process.
		must(t, w.broker.Unmount(t.Context(), target), w.broker.Unmount(t.Context(), filepath.Join(w.dir, "plugins/v")))
		w.mount("v")
		must(t, w.broker.Bind(t.Context(), "v", "", target, true))
		time.Sleep(time.Minute)
		w.publish("new", "pvc-1", Name, "v")
		later := newPodHealth(w.broker, w.stats, w.pods, w.dir, w.log)
		w.podHealth = later
		wantTold(t, w.look(), "ns/pod-old MountLost|the node plugin had both died")
	})
}

func TestAVolumeThatIsNotThereIsLostAfterAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard(t)
		w.mount("v")
		target := w.publish("a", "pvc-1", Name, "v")
		time.Sleep(time.Minute)
		must(t, unix.Unmount(target, 0))
		wantTold(t, w.look())
		time.Sleep(time.Second)
		wantTold(t, w.look()) // the kubelet may be at it
		time.Sleep(settled)
		wantTold(t, w.look(), "ns/pod-a MountLost")
		p := w.pods.pods["a"]
		p.Ending = true
		w.pods.pods["a"] = p
		wantTold(t, w.look())
	})
}

// A FUSE mount that the broker does not hold is dead only if the worker does not have it either.
func TestAMountThatIsYetToBeGivenBackIsNotLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard(t)
		w.mount("v")
		target := w.publish("a", "pvc-1", Name, "v")
		deadFUSE(t, target)
		for range 3 {
			wantTold(t, w.look())
			time.Sleep(time.Minute)
		}
		w.stats.err = object.ErrNotFound
		wantTold(t, w.look())
		time.Sleep(settled)
		wantTold(t, w.look(), "ns/pod-a MountLost")
		must(t, unix.Unmount(target, 0)) // or the clean-up waits for nobody
	})
}

func TestPodsAreToldOfAWorkerThatStaysAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard(t)
		w.mount("v")
		w.publish("a", "pvc-1", Name, "v")
		w.broker.update("v", func(m *brokerwire.Mount) { m.Served = false })
		wantTold(t, w.look())
		time.Sleep(awayAfter)
		wantTold(t, w.look(), "ns/pod-a WorkerAway|Nothing needs to be restarted")
		w.broker.update("v", func(m *brokerwire.Mount) { m.Served = true })
		wantTold(t, w.look())
		w.broker.update("v", func(m *brokerwire.Mount) { m.Served = false })
		wantTold(t, w.look())
	})
}

func TestPodsAreToldOfASourceThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard(t)
		w.mount("v")
		w.mount("w")
		w.publish("a", "pvc-1", Name, "v")
		w.publish("b", "pvc-2", Name, "w")
		w.stats.troubles = map[string]string{"v": "bucket lake: access denied"}
		wantTold(t, w.look(), `ns/pod-a SourceFailing|"pvc-1"|bucket lake: access denied`)
		w.stats.troubles = map[string]string{"v": "another file: access denied"}
		wantTold(t, w.look(), "bucket lake")
		w.stats.troubles = nil
		wantTold(t, w.look())
		w.stats.troubles = map[string]string{"v": "another file: access denied"}
		wantTold(t, w.look(), "another file")
	})
}

func TestLocalVolumesAreLookedAfterToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard(t)
		id := LocalPrefix + "lineitem-0"
		w.mount(id)
		target := filepath.Join(w.dir, "pods/a/volumes/kubernetes.io~local-volume", id)
		must(t, os.MkdirAll(target, 0o755), os.MkdirAll(filepath.Join(filepath.Dir(target), "another"), 0o755))
		must(t, w.broker.Bind(t.Context(), id, "", target, true))
		w.start("a")
		time.Sleep(time.Minute)
		wantTold(t, w.look())
		w.lost([]string{target}, "gone")
		wantTold(t, w.look(), `ns/pod-a MountLost|"`+id+`"`)
	})
}

func TestVolumeHealthNamesThePods(t *testing.T) {
	w := newWard(t)
	w.mount("v")
	target := w.publish("a", "pvc-1", Name, "v")
	n := &node{broker: w.broker, stats: w.stats, health: w.podHealth}
	must(t, w.broker.Unmount(t.Context(), target), w.broker.Unmount(t.Context(), filepath.Join(w.dir, "plugins/v")))
	p := w.pods.pods["a"]
	p.Started[0] = time.Now().Add(-time.Minute)
	w.lost([]string{target}, "gone")
	r, err := n.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: "v"})
	if err != nil || len(r.VolumeHealth.HealthStatuses) != 1 || !strings.Contains(r.VolumeHealth.HealthStatuses[0].Message, "pod ns/pod-a") {
		t.Errorf("%v, %v", r, err)
	}
	n.health = newPodHealth(w.broker, w.stats, nil, w.dir, w.log) // no cluster
	n.health.lost([]string{target}, "gone")
	r, err = n.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: "v"})
	if err != nil || len(r.VolumeHealth.HealthStatuses) != 1 || !strings.Contains(r.VolumeHealth.HealthStatuses[0].Message, "pod a") {
		t.Errorf("%v, %v", r, err)
	}
}
