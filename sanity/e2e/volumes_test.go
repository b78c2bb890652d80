package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	systemNamespace = "larder-system"
	driverName      = "csi.larder.dev"
)

// scenarios are the tests, in the order in which they run: first what everybody does, then what
// may go wrong, last what takes something from all.
func scenarios() []scenario {
	return slices.Concat(
		together(slices.Concat(volumeScenarios(), podScenarios(), refusalScenarios(), exampleScenarios())),
		crowdScenarios(), localScenarios(), localityScenarios(), deployScenarios(), failureScenarios(), sparkScenarios(), clusterScenarios())
}

func volumeScenarios() []scenario {
	return []scenario{
		{name: "a claim is bound for its first pod, which reads the right bytes and finds its worker", run: claimIsRead},
		{name: "an inline volume reads with the Secret of its pod's namespace", run: inlineIsRead},
		{name: "two pods on one node share one cache", run: podsShareCache},
		{name: "pods on two nodes find two workers, and a pod that moves finds the other", run: nodesHaveWorkers},
		{name: "ten pods, each with a ReadWriteOncePod claim of its own, as Spark makes them", run: tenClaims},
		{name: "a generic ephemeral volume goes with its pod", run: ephemeralIsRead},
		{name: "a 10 TiB claim of a shared dataset is bound, and a Deployment reads it on both nodes", run: deploymentOnAllNodes},
		{name: "every attempt to write gets EROFS", run: writesAreRefused},
		{name: "a Load object caches a dataset where a pod has it, before that reads it", run: loadObjectIsDone},
	}
}

func claimIsRead(t *test) {
	d := t.put(4, 3<<20+1)
	t.claim("data", t.classFor(d))
	c, err := t.client.CoreV1().PersistentVolumeClaims(t.ns).Get(t.ctx, "data", meta.GetOptions{})
	t.must(err)
	if c.Status.Phase == core.ClaimBound {
		t.Error("the claim is bound before a pod uses it")
	}
	t.run("reader", podSpec(claimed("data")))
	t.verify("reader", d, 0)
	t.worker("reader", d, 0)
	entries := t.mustExec("reader", "ls", mountPath(0))
	if entries != "data\ndomain" {
		t.Errorf("the volume holds %q", entries)
	}
}

func inlineIsRead(t *test) {
	d := t.put(2, 3<<20+1)
	t.run("reader", podSpec(inline(t.secret(), d.attributes())))
	t.verify("reader", d, 0)
	t.worker("reader", d, 0)
	t.run("data-only", podSpec(inline(t.secret(), d.attributes("layout", "data"))))
	t.mustExec("data-only", append([]string{"probe", "verify", mountPath(0)}, d.args()...)...)
}

func podsShareCache(t *test) {
	d := t.put(4, 4<<20)
	node := t.nodes[0]
	t.run("first", on(node, podSpec(inline(t.secret(), d.attributes("complete", "always")))))
	t.verify("first", d, 0)
	if t.gets(d) == 0 {
		t.Fatal("the store saw no request of the first pod: its log is not understood")
	}
	t.settle(d)
	before := t.gets(d)
	t.run("second", on(node, podSpec(inline(t.secret(), d.attributes()))))
	t.verify("second", d, 0)
	if after := t.gets(d); after != before {
		t.Errorf("the second pod's reads cost %d requests:\n%s", after-before, strings.Join(t.requests(d, "s3_GetObject ")[before:], "\n"))
	}
	if one, two := t.worker("first", d, 0), t.worker("second", d, 0); one != two {
		t.Errorf("on one node are the workers %s and %s", one, two)
	}
}

// settle waits until the store is asked nothing about a dataset for a second: files are completed
// after they were read.
func (t *test) settle(d data) {
	t.Helper()
	last, since := t.gets(d), time.Now()
	t.eventually(30*time.Second, text("the store is asked about %s all the time", d.name), func() bool {
		if n := t.gets(d); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > time.Second
	})
}

func nodesHaveWorkers(t *test) {
	d := t.put(2, 2<<20)
	t.claim("data", t.classFor(d))
	workers := map[string]string{}
	for _, node := range t.nodes {
		t.run(node, on(node, podSpec(claimed("data"))))
		t.verify(node, d, 0)
		w := t.worker(node, d, 0)
		for other, u := range workers {
			if u == w {
				t.Errorf("nodes %s and %s have the same worker %s", node, other, w)
			}
		}
		workers[node] = w
	}
	t.run("moving", on(t.nodes[0], podSpec(claimed("data"))))
	t.delete("moving")
	t.run("moving", on(t.nodes[1], podSpec(claimed("data"))))
	if got := t.worker("moving", d, 0); got != workers[t.nodes[1]] {
		t.Errorf("the pod that moved to %s finds %s, not %s", t.nodes[1], got, workers[t.nodes[1]])
	}
}

func tenClaims(t *test) {
	d := t.put(2, 1<<20)
	class := t.classFor(d)
	name := func(i int) string { return fmt.Sprintf("exec-%d", i) }
	for i := range 10 {
		t.claimOf(name(i), claimSpec(class, "100Gi", core.ReadWriteOncePod))
		t.start(name(i), podSpec(claimed(name(i))))
	}
	for i := range 10 {
		t.ready(name(i))
		t.verify(name(i), d, 0)
	}
}

func ephemeralIsRead(t *test) {
	d := t.put(2, 1<<20)
	t.run("reader", podSpec(ephemeral(t.classFor(d))))
	t.verify("reader", d, 0)
	claims, err := t.client.CoreV1().PersistentVolumeClaims(t.ns).List(t.ctx, meta.ListOptions{})
	t.must(err)
	if len(claims.Items) != 1 {
		t.Fatalf("there are %d claims", len(claims.Items))
	}
	pv := claims.Items[0].Spec.VolumeName
	t.delete("reader")
	t.eventually(30*time.Second, text("PersistentVolume %s of a deleted pod is still there", pv), func() bool {
		_, err := t.client.CoreV1().PersistentVolumes().Get(t.ctx, pv, meta.GetOptions{})
		return apierrors.IsNotFound(err)
	})
}

func deploymentOnAllNodes(t *test) {
	d := t.put(2, 1<<20)
	class := t.classFor(d)
	t.claimOf("data", claimSpec(class, "10Ti", core.ReadOnlyMany))
	var wg sync.WaitGroup
	for i := range 4 {
		name := fmt.Sprintf("replica-%d", i)
		t.start(name, on(t.nodes[i%len(t.nodes)], podSpec(claimed("data"))))
	}
	for i := range 4 {
		name := fmt.Sprintf("replica-%d", i)
		t.ready(name)
		wg.Go(func() { t.verify(name, d, 0) })
	}
	wg.Wait()
}

func writesAreRefused(t *test) {
	d := t.put(1, 1<<20)
	t.claim("data", t.classFor(d))
	t.run("writer", podSpec(claimed("data"), inline(t.secret(), d.attributes())))
	for i := range 2 {
		t.mustExec("writer", "probe", "write", mountPath(i)+"/data")
		t.mustExec("writer", "probe", "write", mountPath(i)+"/domain")
		t.verify("writer", d, i)
	}
}

func loadObjectIsDone(t *test) {
	d := t.put(4, 3<<20+1)
	t.run("reader", on(t.nodes[0], podSpec(inline(t.secret(), d.attributes()))))
	const loads = "/apis/larder.dev/v1alpha1/loads"
	api := t.client.CoreV1().RESTClient()
	object := fmt.Sprintf(`{"apiVersion": "larder.dev/v1alpha1", "kind": "Load", "metadata": {"name": %q}, "spec": {"paths": [%q]}}`, t.ns, d.source())
	t.must(api.Post().AbsPath(loads).SetHeader("Content-Type", "application/json").Body([]byte(object)).Do(t.ctx).Error())
	removed := false
	remove := func() {
		if !removed {
			removed = true
			t.must(api.Delete().AbsPath(loads, t.ns).Do(t.ctx).Error())
		}
	}
	defer remove()
	var shown []byte
	t.eventually(time.Minute, func() string { return string(shown) }, func() bool {
		var err error
		shown, err = api.Get().AbsPath(loads, t.ns).SetHeader("Accept", "application/json").Do(t.ctx).Raw()
		var l struct {
			Status struct {
				State, Nodes string
				Files        int
				Conditions   []meta.Condition
			}
		}
		return err == nil && json.Unmarshal(shown, &l) == nil && l.Status.State == "done" && l.Status.Files == d.files &&
			l.Status.Nodes == "2/2" && len(l.Status.Conditions) == 1 && l.Status.Conditions[0].Status == meta.ConditionTrue
	})
	t.settle(d)
	before := t.gets(d)
	t.verify("reader", d, 0)
	if after := t.gets(d); before == 0 || after != before {
		t.Errorf("%d requests for its bytes before the pod reads, %d after", before, after)
	}
	err := api.Patch(types.MergePatchType).AbsPath(loads, t.ns).Body([]byte(`{"spec": {"pin": true}}`)).Do(t.ctx).Error()
	if !apierrors.IsInvalid(err) {
		t.Errorf("a Load is changed: %v", err)
	}
	remove()
}
