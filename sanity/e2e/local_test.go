package e2e

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func localScenarios() []scenario {
	return []scenario{
		{name: "two applications in two namespaces read one dataset on one node from local volumes, which are offered again afresh", run: localTenants},
		{name: "an event on the ConfigMap says what is wrong with a dataset", run: badDatasets},
		{name: "a pod whose volumes were lost with worker and node plugin is told to restart", run: lostMounts, ownNode: true},
	}
}

const datasetLabel = driverName + "/dataset"

// offer has the administrator offer a dataset. It is withdrawn after the test.
func (t *test) offer(name, entry string) {
	t.Helper()
	t.setDataset(name, entry)
	t.Cleanup(func() {
		ctx, cancel := afterwards()
		defer cancel()
		(&test{T: t.T, env: t.env, ctx: ctx, ns: t.ns}).setDataset(name, "")
	})
}

// setDataset changes an entry of the ConfigMap; "" removes it.
func (t *test) setDataset(name, entry string) {
	t.Helper()
	maps := t.client.CoreV1().ConfigMaps(systemNamespace)
	for {
		m, err := maps.Get(t.ctx, "larder-datasets", meta.GetOptions{})
		if apierrors.IsNotFound(err) {
			m, err = maps.Create(t.ctx, &core.ConfigMap{ObjectMeta: meta.ObjectMeta{Name: "larder-datasets"}}, meta.CreateOptions{})
		}
		t.must(err)
		if m.Data == nil {
			m.Data = map[string]string{}
		}
		if m.Data[name] = entry; entry == "" {
			delete(m.Data, name)
		}
		if _, err = maps.Update(t.ctx, m, meta.UpdateOptions{}); !apierrors.IsConflict(err) {
			t.must(err)
			return
		}
	}
}

// entry of a dataset, with its Secret in Larder's namespace.
func (t *test) entry(d data, more ...string) string {
	t.Helper()
	_, err := t.client.CoreV1().Secrets(systemNamespace).Create(t.ctx, &core.Secret{ObjectMeta: meta.ObjectMeta{Name: secretName},
		StringData: map[string]string{"AWS_ACCESS_KEY_ID": accessKey, "AWS_SECRET_ACCESS_KEY": secretKey}}, meta.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	return strings.Join(append([]string{"source: " + d.source(), "endpoint: " + storeURL, "secret: " + secretName}, more...), "\n")
}

// offers are the names of a dataset's local volumes on a node, or on all, in a phase, or in any.
func (t *test) offers(dataset, node string, phase ...core.PersistentVolumePhase) []string {
	t.Helper()
	selector := datasetLabel + "=" + dataset
	if node != "" {
		selector += "," + driverName + "/node=" + node
	}
	list, err := t.client.CoreV1().PersistentVolumes().List(t.ctx, meta.ListOptions{LabelSelector: selector})
	t.must(err)
	var names []string
	for _, pv := range list.Items {
		if len(phase) == 0 || slices.Contains(phase, pv.Status.Phase) {
			names = append(names, pv.Name)
		}
	}
	return names
}

func (t *test) awaitOffers(dataset, node string, want int) []string {
	t.Helper()
	var got []string
	t.eventually(time.Minute, func() string {
		return fmt.Sprintf("dataset %s on %s: offered are %v, not %d; %s", dataset, node, got, want, t.whyIn(systemNamespace, "larder-datasets"))
	}, func() bool {
		got = t.offers(dataset, node, core.VolumeAvailable)
		return len(got) == want
	})
	return got
}

func (t *test) whyIn(ns, name string) string {
	other := *t
	other.ns = ns
	return other.why(name)
}

func (t *test) localClaim(name, dataset string) {
	t.Helper()
	spec := claimSpec("larder-local", "1Gi", core.ReadOnlyMany)
	spec.Selector = &meta.LabelSelector{MatchLabels: map[string]string{datasetLabel: dataset}}
	t.claimOf(name, spec)
}

// tenant is a pod as in a company that forbids everything.
func tenant(node string) *core.PodSpec {
	v := claimed("data")
	v.source.PersistentVolumeClaim.ReadOnly, v.readOnly = true, true
	own, uid, group := false, int64(185), int64(2000)
	spec := on(node, podSpec(v))
	spec.HostUsers, spec.SecurityContext.RunAsUser, spec.SecurityContext.FSGroup = &own, &uid, &group
	return spec
}

func localTenants(t *test) {
	d, node := t.put(2, 1<<20), t.nodes[0]
	t.offer(t.ns, t.entry(d, "slots: 2"))
	for _, n := range t.nodes {
		t.awaitOffers(t.ns, n, 2)
	}
	other := *t
	other.makeNamespace()
	tenants := []*test{t, &other}
	for _, a := range tenants {
		a.localClaim("data", t.ns)
		a.start("app", tenant(node))
	}
	for _, a := range tenants {
		a.ready("app")
		a.verify("app", d, 0)
		a.worker("app", d, 0)
	}
	bound := t.offers(t.ns, node, core.VolumeBound)
	if len(bound) != 2 {
		t.Fatalf("bound are %v", bound)
	}

	// A third application has to wait: until the first has gone, when it gets a volume that nobody had.
	t.localClaim("next", t.ns)
	spec := tenant(node)
	spec.Volumes[0].PersistentVolumeClaim.ClaimName = "next"
	t.start("next", spec)
	t.saidOf("next", "didn't find available persistent volumes to bind")
	t.release("app", "data")
	t.ready("next")
	t.verify("next", d, 0)
	t.worker("next", d, 0)
	c, err := t.client.CoreV1().PersistentVolumeClaims(t.ns).Get(t.ctx, "next", meta.GetOptions{})
	t.must(err)
	if slices.Contains(bound, c.Spec.VolumeName) {
		t.Errorf("volume %s had a tenant and was offered again", c.Spec.VolumeName)
	}
	other.verify("app", d, 0)

	// The node plugin is replaced: nothing of it is seen.
	t.restartPods(node, "node")
	other.verify("app", d, 0)
	t.verify("next", d, 0)

	// The dataset goes: tenants keep their volumes, and nothing is offered.
	t.setDataset(t.ns, "")
	for _, n := range t.nodes {
		t.awaitOffers(t.ns, n, 0)
	}
	other.verify("app", d, 0)
	t.release("next", "next")
	other.release("app", "data")
	t.eventually(time.Minute, text("local volumes stay that nobody has"), func() bool { return len(t.offers(t.ns, "")) == 0 })
}

// release deletes a pod and its claim.
func (t *test) release(pod, claim string) {
	t.Helper()
	t.delete(pod)
	t.must(t.client.CoreV1().PersistentVolumeClaims(t.ns).Delete(t.ctx, claim, meta.DeleteOptions{}))
}

// restartPods deletes a component's pods on a node, and waits for the next ones.
func (t *test) restartPods(node, component string) {
	t.Helper()
	pods := t.client.CoreV1().Pods(systemNamespace)
	opts := meta.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component, FieldSelector: "spec.nodeName=" + node}
	list, err := pods.List(t.ctx, opts)
	t.must(err)
	old := map[string]bool{}
	for _, p := range list.Items {
		old[p.Name] = true
		t.must(pods.Delete(t.ctx, p.Name, meta.DeleteOptions{}))
	}
	t.eventually(2*time.Minute, text("no new %s pod on %s is ready", component, node), func() bool {
		list, err := pods.List(t.ctx, opts)
		return err == nil && slices.ContainsFunc(list.Items, func(p core.Pod) bool { return !old[p.Name] && isReady(&p) })
	})
}

func badDatasets(t *test) {
	d := t.put(1, 1<<10)
	t.offer(t.ns+"-secret", strings.Replace(t.entry(d), secretName, "no-such-secret", 1))
	t.offer(t.ns+"-source", "source: nonsense")
	t.offer(t.ns+"-bucket", strings.Replace(t.entry(d), bucket, "no-such-bucket", 1))
	system := *t
	system.ns = systemNamespace
	t.Log(system.saidOf("larder-datasets", t.ns+"-secret", "no-such-secret", "create it"))
	t.Log(system.saidOf("larder-datasets", t.ns+"-source", "source: ", "s3://bucket/prefix"))
	t.Log(system.saidOf("larder-datasets", t.ns+"-bucket", "no-such-bucket"))
}

func lostMounts(t *test) {
	d, node := t.put(1, 1<<20), t.nodes[len(t.nodes)-1]
	t.offer(t.ns, t.entry(d, "slots: 1"))
	t.awaitOffers(t.ns, node, 1)
	t.localClaim("data", t.ns)
	t.run("local", tenant(node))
	t.claim("dynamic", t.classFor(d))
	t.run("claim", on(node, podSpec(claimed("dynamic"))))
	t.run("inline", on(node, podSpec(inline(t.secret(), d.attributes()))))
	pods := []string{"local", "claim", "inline"}
	for _, p := range pods {
		t.verify(p, d, 0)
	}
	out, err := exec.CommandContext(t.ctx, flags.cluster, "exec", node, "pkill", "-9", "-f", "^/larder (worker|csi node) ").CombinedOutput()
	if err != nil {
		t.Fatalf("kill both: %v: %s", err, out)
	}
	for _, p := range pods {
		t.Log(t.saidOf(p, "was lost on this node", fmt.Sprintf("kubectl delete pod -n %s %s", t.ns, p)))
		t.delete(p)
	}
	t.run("local", tenant(node))
	t.run("claim", on(node, podSpec(claimed("dynamic"))))
	t.run("inline", on(node, podSpec(inline(t.secret(), d.attributes()))))
	for _, p := range pods {
		t.verify(p, d, 0)
	}
}
