package e2e

import (
	"encoding/json"
	"slices"
	"strings"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

func deployScenarios() []scenario {
	return []scenario{
		{name: "a pod waits behind a node's startup taint until Larder is ready there", run: startupTaint},
		{name: "the node plugin's token changes no other node and makes no volume but its own", run: nodeRights},
	}
}

const startupTaintKey = "csi.larder.dev/not-ready"

func startupTaint(t *test) {
	node := t.nodes[len(t.nodes)-1]
	nodes := t.client.CoreV1().Nodes()
	n, err := nodes.Get(t.ctx, node, meta.GetOptions{})
	t.must(err)
	other := core.Taint{Key: "larder.dev/e2e", Effect: core.TaintEffectPreferNoSchedule} // keeps nobody out
	n.Spec.Taints = append(n.Spec.Taints, core.Taint{Key: startupTaintKey, Effect: core.TaintEffectNoSchedule}, other)
	_, err = nodes.Update(t.ctx, n, meta.UpdateOptions{})
	t.must(err)
	t.Cleanup(func() {
		ctx, cancel := afterwards()
		defer cancel()
		n, err := nodes.Get(ctx, node, meta.GetOptions{})
		if err == nil {
			n.Spec.Taints = slices.DeleteFunc(n.Spec.Taints, func(x core.Taint) bool { return x.Key == other.Key || x.Key == startupTaintKey })
			_, err = nodes.Update(ctx, n, meta.UpdateOptions{})
		}
		if err != nil {
			t.Errorf("taints of %s: %v", node, err)
		}
	})
	d := t.put(1, 1<<20)
	t.start("reader", on(node, podSpec(inline(t.secret(), d.attributes()))))
	t.saidOf("reader", "taint")

	t.restartPods(node, "node") // as on a node that has just been made
	t.ready("reader")
	t.verify("reader", d, 0)
	n, err = nodes.Get(t.ctx, node, meta.GetOptions{})
	t.must(err)
	has := func(key string) bool {
		return slices.ContainsFunc(n.Spec.Taints, func(x core.Taint) bool { return x.Key == key })
	}
	if has(startupTaintKey) || !has(other.Key) {
		t.Errorf("taints of %s: %v; want the startup taint gone, and no other", node, n.Spec.Taints)
	}
}

// anotherNode is not the first one; an existing cluster with one node alone has none that could be asked for.
func (t *test) anotherNode() string {
	if len(t.nodes) < 2 {
		t.Fatal("two nodes are needed")
	}
	return t.nodes[1]
}

// nodeRights asks as the node plugin of the first node would, were it not ours; nothing is changed.
func nodeRights(t *test) {
	c := rest.CopyConfig(t.config)
	c.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + systemNamespace + ":larder-node",
		Extra: map[string][]string{"authentication.kubernetes.io/node-name": {t.nodes[0]}}}
	plugin, err := kubernetes.NewForConfig(c)
	t.must(err)
	dry := []string{meta.DryRunAll}
	change := func(node string, what map[string]any) error {
		patch, err := json.Marshal(what)
		t.must(err)
		_, err = plugin.CoreV1().Nodes().Patch(t.ctx, node, types.MergePatchType, patch, meta.PatchOptions{DryRun: dry})
		return err
	}
	label := map[string]any{"metadata": map[string]any{"labels": map[string]string{"larder.dev/e2e": "x"}}}
	volume := func(class string, source core.PersistentVolumeSource) error {
		_, err := plugin.CoreV1().PersistentVolumes().Create(t.ctx, &core.PersistentVolume{
			ObjectMeta: meta.ObjectMeta{Name: t.ns},
			Spec: core.PersistentVolumeSpec{StorageClassName: class, PersistentVolumeSource: source,
				AccessModes: []core.PersistentVolumeAccessMode{core.ReadOnlyMany},
				Capacity:    core.ResourceList{core.ResourceStorage: resource.MustParse("1Gi")},
				NodeAffinity: &core.VolumeNodeAffinity{Required: &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{
					MatchExpressions: []core.NodeSelectorRequirement{{Key: core.LabelHostname, Operator: core.NodeSelectorOpIn, Values: t.nodes[:1]}}}}}}},
		}, meta.CreateOptions{DryRun: dry})
		return err
	}
	local := func(path string) core.PersistentVolumeSource {
		return core.PersistentVolumeSource{Local: &core.LocalVolumeSource{Path: path}}
	}
	for what, err := range map[string]error{
		"own node only":      change(t.anotherNode(), label),
		"nothing but taints": change(t.nodes[0], label),
		"class larder-local": volume("standard", local("/var/lib/kubelet/plugins/csi.larder.dev/local/x/mnt")),
		"own folder only":    volume("larder-local", core.PersistentVolumeSource{HostPath: &core.HostPathVolumeSource{Path: "/"}}),
	} {
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("want a refusal with %q, got %v", what, err)
		}
	}
	t.must(volume("larder-local", local("/var/lib/kubelet/plugins/csi.larder.dev/local/x/mnt")))
	for _, verb := range []string{"get", "list", "create", "update", "delete"} {
		ctx, cancel := afterwards()
		defer cancel()
		if out, err := kubectl(ctx, "auth", "can-i", verb, "secrets", "-n", t.ns, "--as="+c.Impersonate.UserName); err == nil || !strings.HasPrefix(out, "no") {
			t.Errorf("%s Secrets of users: %s %v", verb, out, err)
		}
	}
}
