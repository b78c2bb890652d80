package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func clusterScenarios() []scenario {
	return []scenario{
		{name: "with binding: node, capacity is the workers' and a claim for more waits", run: capacity},
		{name: "a node is lost: its pods read on another one, and it comes back clean", run: nodeLost, ownNode: true},
		{name: "the previous commit's Larder is installed under reading pods, and this one again", run: upgrade, ownNode: true},
		{name: "the driver is uninstalled under running pods, which end; installed again, it serves", run: uninstall, ownNode: true},
		{name: "installed by Helm, it serves", run: helm, ownNode: true},
		{name: "no Secret is in any log, event or PersistentVolume", run: secretsAreKept},
		{name: "the tests' namespaces are all gone", run: namespacesAreGone},
	}
}

func capacity(t *test) {
	d := t.put(1, 1<<20)
	class := t.classFor(d, "binding", "node")
	found := map[string]resource.Quantity{}
	t.eventually(60*time.Second, func() string { return fmt.Sprintf("class %s has capacities %v", class, found) }, func() bool {
		list, err := t.client.StorageV1().CSIStorageCapacities(systemNamespace).List(t.ctx, meta.ListOptions{})
		t.must(err)
		clear(found)
		for _, c := range list.Items {
			if c.StorageClassName == class && c.Capacity != nil && !c.Capacity.IsZero() {
				found[c.NodeTopology.MatchLabels["topology.csi.larder.dev/node"]] = *c.Capacity
			}
		}
		return len(found) == len(t.nodes)
	})
	for _, node := range t.nodes {
		c := found[node]
		if c.Value() <= 0 || c.Value() > 10<<30 {
			t.Errorf("capacity of %s is %s; its cache has 10Gi", node, c.String())
		}
	}
	t.claimOf("fits", claimSpec(class, "1Gi", core.ReadOnlyMany))
	t.run("fits", podSpec(claimed("fits")))
	t.verify("fits", d, 0)
	t.claimOf("big", claimSpec(class, "1Ti", core.ReadOnlyMany))
	t.start("big", podSpec(claimed("big")))
	t.likeHelp(t.saidOf("big", "did not have enough free storage"))
}

func nodeLost(t *test) {
	d := t.put(2, 1<<20)
	t.claim("data", t.classFor(d))
	lost := t.nodes[len(t.nodes)-1]
	spec := podSpec(claimed("data"))
	seconds := int64(5)
	for _, taint := range []string{core.TaintNodeNotReady, core.TaintNodeUnreachable} {
		spec.Tolerations = append(spec.Tolerations, core.Toleration{Key: taint, Operator: core.TolerationOpExists, Effect: core.TaintEffectNoExecute, TolerationSeconds: &seconds})
	}
	spec.Affinity = &core.Affinity{NodeAffinity: &core.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []core.PreferredSchedulingTerm{{
		Weight: 100, Preference: core.NodeSelectorTerm{MatchExpressions: []core.NodeSelectorRequirement{{
			Key: "kubernetes.io/hostname", Operator: core.NodeSelectorOpIn, Values: []string{lost}}}}}}}}
	one := int32(1)
	labels := map[string]string{"app": "reader"}
	_, err := t.client.AppsV1().Deployments(t.ns).Create(t.ctx, &apps.Deployment{ObjectMeta: meta.ObjectMeta{Name: "reader"}, Spec: apps.DeploymentSpec{
		Replicas: &one, Selector: &meta.LabelSelector{MatchLabels: labels},
		Template: core.PodTemplateSpec{ObjectMeta: meta.ObjectMeta{Labels: labels}, Spec: *spec}}}, meta.CreateOptions{})
	t.must(err)
	first := t.replica("reader", "")
	if first.Spec.NodeName != lost {
		t.Fatalf("the pod is on %s, not on %s", first.Spec.NodeName, lost)
	}
	t.verify(first.Name, d, 0)
	w := t.worker(first.Name, d, 0)
	t.cluster("kill-node", lost)
	t.Cleanup(func() { t.nodeIsBack(lost) })
	second := t.replica("reader", first.Name)
	t.verify(second.Name, d, 0)
	if t.worker(second.Name, d, 0) == w {
		t.Error("the pod on another node finds the lost node's worker")
	}
	t.must(t.client.CoreV1().Nodes().Delete(t.ctx, lost, meta.DeleteOptions{})) // given up for good
	t.run("later", podSpec(claimed("data")))
	t.cluster("start-node", lost)
	t.eventually(2*time.Minute, text("the lost node's pod %s is still there", first.Name), func() bool {
		_, err := t.client.CoreV1().Pods(t.ns).Get(t.ctx, first.Name, meta.GetOptions{})
		return apierrors.IsNotFound(err)
	})
	t.nodeIsBack(lost)
	t.run("returned", on(lost, podSpec(claimed("data"))))
	t.verify("returned", d, 0)
	if got := t.worker("returned", d, 0); got != w {
		t.Errorf("the node that came back with its disk has worker %s; it was %s", got, w)
	}
}

// nodeIsBack waits until Larder is ready on a node, which it starts if it does not run.
func (t *test) nodeIsBack(node string) {
	ctx, cancel := afterwards()
	defer cancel()
	x := &test{T: t.T, env: t.env, ctx: ctx, ns: t.ns}
	x.cluster("start-node", node)
	for _, component := range []string{"node", "worker"} {
		x.eventually(2*time.Minute, text("%s of %s is not ready", component, node), func() bool {
			pods := x.someSystemPods(component, node)
			return len(pods) == 1 && isReady(&pods[0]) && pods[0].DeletionTimestamp == nil
		})
	}
}

// replica waits for a ready pod of that label which is not the other one.
func (t *test) replica(app, other string) core.Pod {
	t.Helper()
	var found core.Pod
	t.eventually(2*time.Minute, text("no new pod of %s is ready", app), func() bool {
		list, err := t.client.CoreV1().Pods(t.ns).List(t.ctx, meta.ListOptions{LabelSelector: "app=" + app})
		if err != nil {
			return false
		}
		for _, p := range list.Items {
			if p.Name != other && p.DeletionTimestamp == nil && isReady(&p) {
				found = p
				return true
			}
		}
		return false
	})
	return found
}

func uninstall(t *test) {
	node := t.nodes[0]
	d, names := t.readers(node)
	t.Cleanup(func() { t.installAgain() })
	_, err := kubectl(t.ctx, "delete", "-k", overlay, "--wait=false")
	t.must(err)
	t.eventually(60*time.Second, text("the controller does not end"), func() bool {
		list, err := t.client.CoreV1().Pods(systemNamespace).List(t.ctx, meta.ListOptions{LabelSelector: component + "controller"})
		return err == nil && len(list.Items) == 0
	})
	t.goesOn(names...) // worker and node plugin stay as long as somebody needs them
	for _, name := range names {
		t.delete(name)
	}
	t.systemIsGone()
	t.install(overlay)
	t.run("again", on(node, podSpec(claimed("data"))))
	t.verify("again", d, 0)
}

// overlay is what is installed, relative to the repository's folder, where tests run.
const overlay = "sanity/e2e/overlay"

// installAgain is what the next tests find, whatever has failed in this one.
func (t *test) installAgain() {
	ctx, cancel := afterwards()
	defer cancel()
	x := &test{T: t.T, env: t.env, ctx: ctx, ns: t.ns}
	x.deleteNamespace(t.ns) // or its pods keep what is being uninstalled
	if ns, err := t.client.CoreV1().Namespaces().Get(ctx, systemNamespace, meta.GetOptions{}); err == nil && ns.DeletionTimestamp != nil {
		x.systemIsGone()
	}
	x.install(overlay)
}

// systemIsGone waits for the end of Larder's namespace, and sees that nodes have nothing of it mounted.
func (t *test) systemIsGone() {
	t.Helper()
	t.eventually(3*time.Minute, text("namespace %s does not end", systemNamespace), func() bool {
		_, err := t.client.CoreV1().Namespaces().Get(t.ctx, systemNamespace, meta.GetOptions{})
		return apierrors.IsNotFound(err)
	})
	for _, node := range t.nodes {
		if left := t.machine(node, "sh", "-c", "grep fuse.larder /proc/self/mountinfo || true"); left != "" {
			t.Errorf("left on %s: %s", node, left)
		}
	}
}

func helm(t *test) {
	program := filepath.Join(filepath.Dir(flags.kubeconfig), "..", "bin", "helm")
	run := func(ctx context.Context, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(ctx, program, append([]string{"--kubeconfig", flags.kubeconfig, "-n", systemNamespace}, args...)...)
		cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("helm %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	_, err := kubectl(t.ctx, "delete", "-k", overlay, "--wait=false")
	t.must(err)
	t.Cleanup(func() { t.installAgain() })
	t.systemIsGone()
	run(t.ctx, "install", "larder", "deploy/helm/larder", "--create-namespace", "--wait", "--timeout=2m",
		"--set", "master.persistence.enabled=false", "--set", "inlineEndpoints={"+storeURL+"}")
	d := t.put(2, 1<<20)
	t.claim("data", t.classFor(d))
	t.run("reader", podSpec(claimed("data"), inline(t.secret(), d.attributes())))
	for i := range 2 {
		t.verify("reader", d, i)
		t.worker("reader", d, i)
	}
	t.delete("reader")
	t.must(t.client.CoreV1().PersistentVolumeClaims(t.ns).Delete(t.ctx, "data", meta.DeleteOptions{}))
	t.eventually(30*time.Second, text("the claim's volume stays"), func() bool { return len(t.volumes()) == 0 })
	run(t.ctx, "uninstall", "larder", "--wait", "--timeout=2m")
	_, err = kubectl(t.ctx, "delete", "namespace", systemNamespace)
	t.must(err)
	t.systemIsGone()
}

// volumes are the names of the PersistentVolumes that are bound to the test's claims.
func (t *test) volumes() []string {
	t.Helper()
	list, err := t.client.CoreV1().PersistentVolumes().List(t.ctx, meta.ListOptions{})
	t.must(err)
	var names []string
	for _, v := range list.Items {
		if v.Spec.ClaimRef != nil && v.Spec.ClaimRef.Namespace == t.ns {
			names = append(names, v.Name)
		}
	}
	return names
}

// upgrade goes back first: what the previous commit makes of a newer one's mounts is a test as well.
func upgrade(t *test) {
	const previous = "build/e2e/previous-overlay"
	if _, err := os.Stat(previous); err != nil {
		fmt.Printf("       there is no previous commit here: %v\n", err)
		return
	}
	_, names := t.readers(t.nodes[0])
	t.Cleanup(func() { t.install(overlay) })
	for _, o := range []string{previous, overlay} {
		t.install(o)
		t.goesOn(names...)
		d := data{t.ns, 6, 3 << 20}
		name := "after-" + filepath.Base(o)
		t.run(name, on(t.nodes[0], podSpec(claimed("data"))))
		t.verify(name, d, 0)
	}
}

// install applies an overlay and waits until it serves.
func (t *test) install(overlay string) {
	t.Helper()
	ctx, cancel := afterwards()
	defer cancel()
	_, err := kubectl(ctx, "apply", "-k", overlay)
	t.must(err)
	for _, what := range []string{"statefulset/larder-master", "daemonset/larder-worker", "daemonset/larder-node", "deployment/larder-controller"} {
		_, err := kubectl(ctx, "-n", systemNamespace, "rollout", "status", what, "--timeout=120s")
		t.must(err)
	}
}

func secretsAreKept(t *test) {
	d := t.put(1, 1<<20)
	t.claim("data", t.classFor(d))
	t.run("reader", podSpec(claimed("data"), inline(t.secret(), d.attributes())))
	t.verify("reader", d, 0)
	dir := t.TempDir()
	t.must(t.podLogs(t.ctx, dir, systemNamespace))
	files, err := os.ReadDir(dir)
	t.must(err)
	if len(files) < 5 {
		t.Fatalf("only %d logs were found", len(files))
	}
	texts := map[string]string{}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		t.must(err)
		texts[f.Name()] = string(b)
	}
	for _, what := range []string{"events", "pv", "pvc", "volumeattachments", "csistoragecapacities", "storageclasses", "configmaps"} {
		out, err := kubectl(t.ctx, "get", what, "-A", "-o", "yaml")
		t.must(err)
		texts[what] = out
	}
	for name, text := range texts {
		if i := strings.Index(text, secretKey); i >= 0 {
			t.Errorf("%s has the secret key in it: …%s…", name, text[max(0, i-200):min(len(text), i+100)])
		}
	}
}

// namespacesAreGone sees that what the other tests deleted has gone: no finalizer waits for us.
func namespacesAreGone(t *test) {
	var left []string
	t.eventually(2*time.Minute, func() string { return fmt.Sprintf("still there: %v", left) }, func() bool {
		list, err := t.client.CoreV1().Namespaces().List(t.ctx, meta.ListOptions{LabelSelector: userLabel})
		t.must(err)
		left = nil
		for _, n := range list.Items {
			if n.Name != t.ns {
				left = append(left, n.Name)
			}
		}
		pvs, err := t.client.CoreV1().PersistentVolumes().List(t.ctx, meta.ListOptions{})
		t.must(err)
		for _, v := range pvs.Items {
			if v.Spec.CSI != nil && v.Spec.CSI.Driver == driverName {
				left = append(left, v.Name)
			}
		}
		return len(left) == 0
	})
}
