package e2e

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func failureScenarios() []scenario {
	return []scenario{
		{name: "a worker is killed under reading pods", run: func(t *test) { killUnderReaders(t, "worker") }, ownNode: true},
		{name: "a node plugin is killed under reading pods", run: func(t *test) { killUnderReaders(t, "node") }, ownNode: true},
		{name: "the master is killed under reading pods", run: func(t *test) { killUnderReaders(t, "master") }, ownNode: true},
		{name: "the controller is killed under reading pods", run: func(t *test) { killUnderReaders(t, "controller") }, ownNode: true},
		{name: "the master's data is erased: volumes and workers are back within 60 s", run: masterForgets},
		{name: "both DaemonSets are updated under reading pods", run: rollingUpdate},
		{name: "a kubelet is started again: no volume is mounted twice, and pods end", run: kubeletRestart, ownNode: true},
	}
}

const component = "app.kubernetes.io/component="

// systemPods are Larder's of one component, on one node or ("") on all. There is one.
func (t *test) systemPods(name, node string) []core.Pod {
	t.Helper()
	pods := t.someSystemPods(name, node)
	if len(pods) == 0 {
		t.Fatalf("there is no %s on %q", name, node)
	}
	return pods
}

// someSystemPods are those that are there.
func (t *test) someSystemPods(name, node string) []core.Pod {
	t.Helper()
	o := meta.ListOptions{LabelSelector: component + name}
	if node != "" {
		o.FieldSelector = "spec.nodeName=" + node
	}
	list, err := t.client.CoreV1().Pods(systemNamespace).List(t.ctx, o)
	t.must(err)
	return list.Items
}

// machine runs a command on a node's machine.
func (t *test) machine(node string, command ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.ctx, flags.cluster, append([]string{"exec", node}, command...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s on %s: %v: %s", strings.Join(command, " "), node, err, out)
	}
	return strings.TrimSpace(string(out))
}

// cluster gives the cluster program a command.
func (t *test) cluster(args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.ctx, flags.cluster, args...).CombinedOutput(); err != nil {
		t.Fatalf("cluster %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// reading starts a pod that reads and checks until it is deleted, or ends at the first mistake.
func (t *test) reading(name, node string, d data, v volume) {
	t.Helper()
	spec := on(node, podSpec(v))
	spec.RestartPolicy = core.RestartPolicyNever
	spec.Containers[0].Command = append([]string{"probe", "loop", mountPath(0) + "/data"}, d.args()...)
	t.start(name, spec)
}

var stepLine = regexp.MustCompile(`step (\d+) longest (\S+)`)

// steps are how many a reading pod has done, and the longest of them.
func (t *test) steps(name string) (n int, longest string) {
	t.Helper()
	log, err := t.logs(t.ns, name, "main")
	if err != nil {
		return 0, err.Error() // the container is not there yet
	}
	if strings.Contains(log, "MISTAKE") {
		t.Fatalf("%s: %s", name, log[max(0, len(log)-500):])
	}
	all := stepLine.FindAllStringSubmatch(log, -1)
	if len(all) == 0 {
		return 0, ""
	}
	last := all[len(all)-1]
	n, err = strconv.Atoi(last[1])
	t.must(err)
	return n, last[2]
}

// goesOn waits until each of the reading pods has gone on, without a mistake.
func (t *test) goesOn(names ...string) {
	t.Helper()
	for _, name := range names {
		before, _ := t.steps(name)
		var now int
		var longest string
		t.eventually(60*time.Second, func() string { return fmt.Sprintf("%s stands still at step %d: %s", name, before, t.why(name)) }, func() bool {
			now, longest = t.steps(name)
			return now > before
		})
		t.Logf("%s is at step %d; its longest took %s", name, now, longest)
	}
}

// readers start a pod by claim and one inline on a node, and wait until both read.
func (t *test) readers(node string) (data, []string) {
	t.Helper()
	d := t.put(6, 3<<20)
	t.claim("data", t.classFor(d))
	t.reading("by-claim", node, d, claimed("data"))
	t.reading("inline", node, d, inline(t.secret(), d.attributes()))
	names := []string{"by-claim", "inline"}
	t.goesOn(names...)
	return d, names
}

// killUnderReaders kills the first container of a component; of the two that hold mounts twice, so
// that what the second kill meets was taken over or given back itself.
func killUnderReaders(t *test, component string) {
	node, kills := t.nodes[0], 2
	if component == "master" || component == "controller" {
		node, kills = t.systemPods(component, "")[0].Spec.NodeName, 1
	}
	d, names := t.readers(node)
	for range kills {
		p := t.systemPods(component, node)[0]
		before := p.Status.ContainerStatuses[0]
		t.machine(node, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", strings.TrimPrefix(before.ContainerID, "containerd://"))
		t.goesOn(names...)
		t.eventually(2*time.Minute, text("%s is not started again", p.Name), func() bool {
			now := t.systemPods(component, node)[0]
			return isReady(&now) && now.Status.ContainerStatuses[0].RestartCount > before.RestartCount
		})
		t.goesOn(names...)
	}
	t.run("afterwards", on(node, podSpec(claimed("data"))))
	t.verify("afterwards", d, 0)
}

// In overlay dev the master's data are in its pod.
func masterForgets(t *test) {
	node := t.nodes[0]
	_, names := t.readers(node)
	p := t.systemPods("master", "")[0]
	t.must(t.client.CoreV1().Pods(systemNamespace).Delete(t.ctx, p.Name, meta.DeleteOptions{}))
	start := time.Now()
	t.eventually(60*time.Second, text("the next master is not ready"), func() bool {
		now, err := t.client.CoreV1().Pods(systemNamespace).Get(t.ctx, p.Name, meta.GetOptions{})
		return err == nil && now.UID != p.UID && isReady(now)
	})
	// A volume with "binding: node" is provisioned only where the master knows the worker.
	d := data{t.ns, 6, 3 << 20}
	t.claim("bound", t.classFor(d, "binding", "node"))
	t.run("late", on(node, podSpec(claimed("bound"))))
	if took := time.Since(start); took > 60*time.Second {
		t.Errorf("it took %v", took)
	}
	t.verify("late", d, 0)
	t.goesOn(names...)
	t.delete("by-claim")
	t.must(t.client.CoreV1().PersistentVolumeClaims(t.ns).Delete(t.ctx, "data", meta.DeleteOptions{}))
}

func rollingUpdate(t *test) {
	_, names := t.readers(t.nodes[0])
	_, err := kubectl(t.ctx, "-n", systemNamespace, "rollout", "restart", "daemonset/larder-worker", "daemonset/larder-node")
	t.must(err)
	for _, ds := range []string{"larder-worker", "larder-node"} {
		_, err := kubectl(t.ctx, "-n", systemNamespace, "rollout", "status", "daemonset/"+ds, "--timeout=180s")
		t.must(err)
		t.goesOn(names...)
	}
}

// mounts are the lines of a node's mount table that show a volume of a pod.
func (t *test) mounts(node string, pod *core.Pod) []string {
	t.Helper()
	table := t.machine(node, "grep", "-F", "/pods/"+string(pod.UID)+"/volumes/kubernetes.io~csi/", "/proc/self/mountinfo")
	return strings.Split(table, "\n")
}

func kubeletRestart(t *test) {
	node := t.nodes[0]
	d, names := t.readers(node)
	before := map[string]int{}
	pods := map[string]*core.Pod{}
	for _, name := range names {
		pods[name] = t.ready(name)
		before[name] = len(t.mounts(node, pods[name]))
	}
	t.cluster("restart-kubelet", node)
	t.run("afterwards", on(node, podSpec(claimed("data")))) // the kubelet works again
	t.verify("afterwards", d, 0)
	t.goesOn(names...)
	for _, name := range names {
		if after := t.mounts(node, pods[name]); len(after) != before[name] {
			t.Errorf("%s had %d mounts, and has %d:\n%s", name, before[name], len(after), strings.Join(after, "\n"))
		}
		t.delete(name)
	}
}
