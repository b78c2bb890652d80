package sanity

import (
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/domainsocket/shortcircuit"
	"github.com/larderfs/larder/driver/localpv"
	"github.com/larderfs/larder/sanity/kubetest"
	"github.com/larderfs/larder/sanity/leak"
	"github.com/larderfs/larder/sanity/s3test"
)

// node is every process apart, in a cluster whose API server is in memory. The test is kubelet,
// scheduler and user.
type node struct {
	*apart
	api     *kubetest.Server
	store   *s3test.Server
	kubelet string
}

func startNode(t *testing.T, store *s3test.Server, datasets map[string]string, more ...string) *node {
	t.Helper()
	n := &node{api: kubetest.Start(t), store: store}
	n.api.ControlVolumes(t)
	n.api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelHostname: "host-1"}}})
	n.secret(store.AccessKey, store.SecretKey)
	n.datasets(datasets)
	n.apart = startApart(t, store.Endpoint, append([]string{"node", "--kubeconfig=" + n.api.Kubeconfig(t), "node", "--local-datasets=data/datasets",
		"node", "--kubelet-dir={dir}/kubelet"}, more...)...)
	n.kubelet = filepath.Join(n.dir, "kubelet")
	return n
}

func (n *node) secret(id, key string) {
	n.api.Set(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "data", Name: "s3"},
		Data: map[string][]byte{"AWS_ACCESS_KEY_ID": []byte(id), "AWS_SECRET_ACCESS_KEY": []byte(key), "OTHER": []byte("x")}})
}

func (n *node) datasets(d map[string]string) {
	n.api.Set(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "data", Name: "datasets"}, Data: d})
}

// entry describes a dataset below a prefix of the bucket.
func (n *node) entry(prefix string, more ...string) string {
	return entry(n.store, prefix, more...)
}

func entry(s *s3test.Server, prefix string, more ...string) string {
	return strings.Join(append([]string{
		"source: s3://" + s.Bucket + "/" + prefix, "endpoint: " + s.Endpoint, "region: " + s.Region, "pathStyle: true", "secret: s3",
	}, more...), "\n")
}

// offered are the volumes of a dataset that a claim could have.
func (n *node) offered(dataset string) (names []string) {
	for _, pv := range n.api.PersistentVolumes() {
		if pv.Labels[localpv.LabelDataset] == dataset && pv.Status.Phase == corev1.VolumeAvailable && pv.DeletionTimestamp == nil {
			names = append(names, pv.Name)
		}
	}
	return names
}

func (n *node) awaitOffered(dataset string, want int) []string {
	n.t.Helper()
	var got []string
	n.api.Await(n.t, func() error {
		if got = n.offered(dataset); len(got) != want {
			return fmt.Errorf("dataset %s: offered %v, want %d", dataset, got, want)
		}
		return nil
	})
	return got
}

// slots are the paths of what is mounted.
func (n *node) slots() (paths []string) {
	for _, m := range leak.Mounts(filepath.Join(n.dir, "run/local")) {
		paths = append(paths, m.Point)
	}
	slices.Sort(paths)
	return paths
}

// awaitMounts waits until just so many slots are mounted, each once.
func (n *node) awaitMounts(want int) {
	n.t.Helper()
	dir := filepath.Join(n.dir, "run/local")
	n.api.Await(n.t, func() error {
		if m := leak.Mounts(dir); len(m) != want {
			return fmt.Errorf("mounted: %v; want %d", m, want)
		}
		return nil
	})
	if want == 0 {
		n.api.Await(n.t, func() error {
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				return fmt.Errorf("left: %v, %v", left, err)
			}
			return nil
		})
	}
}

// pod is a running pod that has a volume, as the kubelet gives it. It returns where.
func (n *node) pod(uid, volume string) string {
	n.t.Helper()
	var path string
	for _, pv := range n.api.PersistentVolumes() {
		if pv.Name == volume {
			path = pv.Spec.Local.Path
		}
	}
	target := filepath.Join(n.kubelet, "pods", uid, "volumes/kubernetes.io~local-volume", volume)
	if err := os.MkdirAll(target, 0o750); err != nil {
		n.t.Fatal(err)
	}
	if err := unix.Mount(path, target, "", unix.MS_BIND, ""); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	n.run(uid)
	return target
}

// run starts, or starts again, the container of a pod.
func (n *node) run(uid string) {
	n.api.Set(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod-" + uid, UID: types.UID(uid)}, Spec: corev1.PodSpec{NodeName: "n1"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{
			{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(time.Now().Truncate(time.Second))}}},
		}}})
}

func (n *node) read(target, want string) {
	n.t.Helper()
	if got := mustShell(n.t, "sha256sum < "+target+"/data/f"); !strings.HasPrefix(got, want) {
		n.t.Errorf("read %s", got)
	}
}

func TestLocalVolumesOfTwoTenants(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7)})
	want := sum(pattern(2<<20, 7))
	n := startNode(t, store, map[string]string{"lineitem": entry(store, "ds")})
	first := n.awaitOffered("lineitem", 8)
	n.awaitMounts(8)
	for _, pv := range n.api.PersistentVolumes() {
		term := pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0]
		if pv.Spec.StorageClassName != "larder-local" || term.Values[0] != "host-1" || pv.OwnerReferences[0].Kind != "Node" || pv.OwnerReferences[0].UID == "" {
			t.Errorf("%+v", pv)
		}
	}

	n.api.Bind(t, first[0], "team-a", "claim")
	n.api.Bind(t, first[1], "team-b", "claim")
	a, b := n.pod("a", first[0]), n.pod("b", first[1])
	n.read(a, want)
	n.read(b, want)
	sockets := map[string]string{}
	for name, target := range map[string]string{"a": a, "b": b} {
		path, err := shortcircuit.Find(filepath.Join(target, "domain"))
		if err != nil {
			t.Fatal(err)
		}
		sockets[name] = path
	}
	old, err := brokerwire.DialStream(t.Context(), sockets["a"])
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()

	// The claim goes while the pod has the volume still: it stays until the kubelet has unmounted it.
	n.api.Release(t, first[0])
	n.awaitLog("still mounted at")
	n.read(a, want)
	if !slices.Contains(n.slots(), filepath.Join(n.dir, "run/local", first[0], "mnt")) {
		t.Error("a slot was unmounted under a pod")
	}
	if err := unix.Unmount(a, 0); err != nil {
		t.Fatal(err)
	}
	next := n.awaitOffered("lineitem", 7)
	n.awaitMounts(8)
	if slices.Contains(next, first[0]) {
		t.Error("a volume that had a tenant is offered again")
	}
	old.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.Copy(io.Discard, old); err != nil {
		t.Errorf("the old tenant's socket: %v; want its end", err)
	}
	n.read(b, want)
	n.api.Bind(t, next[0], "team-c", "claim")
	n.read(n.pod("c", next[0]), want)

	// The dataset goes: what has a tenant stays.
	n.datasets(map[string]string{})
	n.awaitOffered("lineitem", 0)
	n.awaitMounts(2)
	n.read(b, want)
	for uid, volume := range map[string]string{"b": first[1], "c": next[0]} {
		n.api.Release(t, volume)
		if err := unix.Unmount(filepath.Join(n.kubelet, "pods", uid, "volumes/kubernetes.io~local-volume", volume), 0); err != nil {
			t.Fatal(err)
		}
	}
	n.awaitMounts(0)
	n.api.Await(t, func() error {
		if left := n.api.PersistentVolumes(); len(left) > 0 {
			return fmt.Errorf("%d volumes are left", len(left))
		}
		return nil
	})
}

func (a *apart) awaitLog(text string) {
	a.t.Helper()
	a.await(func() bool {
		b, err := os.ReadFile(filepath.Join(a.dir, "log"))
		return err == nil && strings.Contains(string(b), text)
	})
}

func TestLocalVolumesFollowTheirDataset(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(1<<20, 7), "ds/cold": pattern(1<<20, 8), "other/f": pattern(1<<20, 9)})
	n := startNode(t, store, nil)
	n.datasets(map[string]string{"d": n.entry("ds", "slots: 3")})
	names := n.awaitOffered("d", 3)
	n.api.Bind(t, names[0], "ns", "claim")
	a := n.pod("a", names[0])

	n.datasets(map[string]string{"d": n.entry("ds", "slots: 1")})
	n.awaitOffered("d", 0) // the only one has a tenant
	n.awaitMounts(1)
	n.datasets(map[string]string{"d": n.entry("other", "slots: 2", `fileMode: "0440"`)})
	n.awaitOffered("d", 1)
	n.read(a, sum(pattern(1<<20, 7)))
	fresh := n.awaitOffered("d", 1)
	n.api.Bind(t, fresh[0], "ns", "claim-2")
	b := n.pod("b", fresh[0])
	n.read(b, sum(pattern(1<<20, 9)))
	if got := mustShell(t, "stat -c %a "+b+"/data/f"); strings.TrimSpace(got) != "440" {
		t.Errorf("mode %s", got)
	}

	// An entry with a mistake changes nothing of what there is.
	n.datasets(map[string]string{"d": "source: nonsense"})
	n.awaitEvent("source: its scheme is none of s3://bucket/prefix")
	n.awaitMounts(2)

	// The Secret is followed by what is mounted, and by what is not.
	n.secret("nobody", "wrong")
	n.await(func() bool { // the worker has the new credential: what is cold is refused
		_, err := os.ReadFile(filepath.Join(a, "data/cold"))
		return os.IsPermission(err)
	})
	n.secret(store.AccessKey, store.SecretKey)
	n.await(func() bool {
		got, err := os.ReadFile(filepath.Join(a, "data/cold"))
		return err == nil && sum(got) == sum(pattern(1<<20, 8))
	})
}

// awaitEvent waits for an Event with a text.
func (n *node) awaitEvent(text string) *corev1.Event {
	n.t.Helper()
	var found *corev1.Event
	n.api.Await(n.t, func() error {
		var all []string
		for _, e := range n.api.Events() {
			if strings.Contains(e.Message, text) {
				found = e
				return nil
			}
			all = append(all, e.Message)
		}
		return fmt.Errorf("no event with %q; there are %q", text, all)
	})
	return found
}

func TestBadDatasetsAreExplained(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(1<<20, 7)})
	canary := "canary-in-the-wrong-place"
	n := startNode(t, store, map[string]string{
		"good":      entry(store, "ds", "slots: 1"),
		"Bad_Name":  entry(store, "ds"),
		"no-secret": strings.Replace(entry(store, "ds"), "secret: s3", "secret: nowhere", 1),
		"no-bucket": strings.Replace(entry(store, "ds"), store.Bucket, "no-such-bucket", 1),
		"many":      entry(store, "ds", "slots: 1000"),
		"typo":      entry(store, "ds", "frehsness: 1m"),
		"layout":    entry(store, "ds", "layout: data"),
		"mode":      entry(store, "ds", "fileMode: 0440"),
		"text":      "just text: [",
		"inside":    entry(store, "ds", "AWS_SECRET_ACCESS_KEY: "+canary),
	})
	n.awaitOffered("good", 1)
	for dataset, text := range map[string]string{
		"Bad_Name":  "lower-case letters",
		"no-secret": `secret: there is no Secret "nowhere" in namespace data; create it`,
		"no-bucket": "correct source",
		"many":      `slots: "1000" is not a number from 1 to 64`,
		"typo":      "nearest known one is freshness",
		"layout":    "layout: cannot be given",
		"mode":      "in quotes",
		"text":      "source: s3://bucket/prefix",
		"inside":    "credentials belong in the Secret",
	} {
		e := n.awaitEvent(fmt.Sprintf("Dataset %q: ", dataset))
		if !strings.Contains(e.Message, text) || e.InvolvedObject.Kind != "ConfigMap" || e.InvolvedObject.Name != "datasets" || e.Namespace != "data" {
			t.Errorf("%s: %+v", dataset, e)
		}
	}
	for _, e := range n.api.Events() {
		if strings.Contains(e.Message, canary) || strings.Contains(e.Message, store.SecretKey) {
			t.Errorf("a secret in an event: %s", e.Message)
		}
	}
	n.awaitMounts(1)
	log, err := os.ReadFile(filepath.Join(n.dir, "log"))
	if err != nil || strings.Contains(string(log), canary) || strings.Contains(string(log), store.SecretKey) {
		t.Errorf("a secret in the log, %v", err)
	}
}

// One holder dies, and nothing of the volumes changes; both die, and the same volumes are mounted
// again, for tenants too, whose pods are told.
func TestLocalVolumesOutliveTheirProcesses(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7)})
	want := sum(pattern(2<<20, 7))
	n := startNode(t, store, map[string]string{"d": entry(store, "ds", "slots: 2")})
	names := n.awaitOffered("d", 2)
	n.api.Bind(t, names[0], "ns", "claim")
	target := n.pod("a", names[0])
	n.read(target, want)
	for _, name := range []string{"worker", "node"} {
		n.end(name, syscall.SIGKILL)
		n.start(name)
		if err := n.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.read(target, want)
	}
	n.end("node", syscall.SIGKILL)
	n.end("worker", syscall.SIGKILL)
	if _, err := os.Stat(filepath.Join(n.dir, "run/local", names[1], "volume")); err == nil {
		t.Error("a volume that is not mounted can be bound")
	}
	n.start("node")
	n.start("worker")
	if err := n.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.awaitMounts(2)
	if got := n.awaitOffered("d", 1); got[0] != names[1] {
		t.Errorf("offered %v; want %v as before", got, names[1])
	}
	e := n.awaitEvent("was lost on this node")
	if e.InvolvedObject.Kind != "Pod" || e.InvolvedObject.Name != "pod-a" || e.Reason != "MountLost" || !strings.Contains(e.Message, "kubectl delete pod -n ns pod-a") {
		t.Errorf("%+v", e)
	}
	empty := 0                    // once is the moment between unmounting what died and binding the new one
	n.api.Await(t, func() error { // for a container that is started again; before it finds an error, not an empty directory
		if entries, err := os.ReadDir(target); err == nil && len(entries) == 0 {
			if empty++; empty > 2 {
				t.Fatal("a container that is started now would find an empty dataset")
			}
		}
		_, err := os.ReadFile(filepath.Join(target, "data/f"))
		return err
	})
	n.read(target, want)
	if m := leak.Mounts(target); len(m) != 1 {
		t.Errorf("mounted at the pod: %v", m)
	}
}

// What a user is told of a volume that a claim gave: that its source fails, that it was lost with
// worker and node plugin, that it was given up.
func TestPodsAreToldWhatBefellTheirVolumes(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(2<<20, 7), "ds/g": pattern(2<<20, 8)})
	n := startNode(t, store, nil, "node", "--takeover-deadline=2s")
	v, target := publish(t, n.Kubelet, bucket(store, "v", "ds"))
	uid := strings.Split(strings.TrimPrefix(target, filepath.Join(n.kubelet, "pods")+"/"), "/")[0]
	data := fmt.Sprintf(`{"driverName":"csi.larder.dev","volumeHandle":%q,"specVolID":"pvc-v"}`, v.ID)
	if err := os.WriteFile(filepath.Join(filepath.Dir(target), "vol_data.json"), []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
	n.run(uid)
	mustShell(t, "cat "+target+"/data/f > /dev/null")

	store.SetHook(s3test.Times(1000, s3test.Get, s3test.Refuse(403, "AccessDenied")))
	if out, err := shell(t, "cat "+target+"/data/g"); err == nil {
		t.Fatalf("a read that the store denies: %s", out)
	}
	if e := n.awaitEvent("A read of volume"); e.Reason != "SourceFailing" || e.InvolvedObject.Name != "pod-"+uid {
		t.Errorf("%+v", e)
	}
	store.SetHook(nil)

	n.end("node", syscall.SIGKILL)
	n.end("worker", syscall.SIGKILL)
	n.start("node")
	n.start("worker")
	if err := n.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(target); err == nil {
		t.Errorf("a container that is started now would find %v", entries)
	}
	if e := n.awaitEvent("had both died"); e.Reason != "MountLost" || !strings.Contains(e.Message, `"pvc-v"`) {
		t.Errorf("%+v", e)
	}

	if _, err := n.PublishPod(t.Context(), v, "v"); err != nil { // the kubelet's republish
		t.Fatal(err)
	}
	n.run(uid) // its container is started again
	mustShell(t, "cat "+target+"/data/g > /dev/null")
	n.end("worker", syscall.SIGKILL)
	n.awaitEvent("within 2s, so the mount was given up")
	n.start("worker")
	if err := n.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The node plugin is killed again and again, at any moment, while datasets and claims come and go.
func TestLocalVolumesAreRightAfterKills(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/f": pattern(1<<20, 7)})
	n := startNode(t, store, nil)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	bound := map[string]bool{}
	for range 12 {
		n.datasets(map[string]string{"d": n.entry("ds", fmt.Sprintf("slots: %d", 1+random.IntN(5)))})
		if offered := n.offered("d"); len(offered) > 0 && random.IntN(2) == 0 {
			n.api.Bind(t, offered[0], "ns", "claim")
			bound[offered[0]] = true
		}
		for name := range bound {
			if random.IntN(2) == 0 {
				n.api.Release(t, name)
				delete(bound, name)
			}
		}
		fail := random.IntN(3)
		n.api.Fault(func(verb, path string) error {
			if verb == "POST" && strings.HasPrefix(path, "persistentvolumes") && fail == 0 {
				return fmt.Errorf("the API server says no")
			}
			return nil
		})
		select { // anywhere in what follows
		case <-time.After(time.Duration(random.IntN(300)) * time.Millisecond):
		case <-t.Context().Done():
		}
		n.end("node", syscall.SIGKILL)
		n.start("node")
	}
	n.api.Fault(nil)
	n.datasets(map[string]string{"d": n.entry("ds", "slots: 6")})
	n.awaitOffered("d", 6-len(bound))
	n.awaitMounts(6)
	var have []string
	for _, pv := range n.api.PersistentVolumes() {
		have = append(have, filepath.Join(n.dir, "run/local", pv.Name, "mnt"))
	}
	mounted := n.slots()
	if slices.Sort(have); !slices.Equal(have, mounted) {
		t.Errorf("volumes at %v, mounted %v (tenants %v)", have, mounted, slices.Collect(maps.Keys(bound)))
	}
	for _, m := range mounted {
		mustShell(t, "cat "+m+"/data/f > /dev/null")
	}
}
