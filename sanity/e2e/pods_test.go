package e2e

import (
	"fmt"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func podScenarios() []scenario {
	return []scenario{
		{name: "a pod of uid 185 with an fsGroup reads", run: fsGroupReads},
		{name: "subPath data, read-only and not, shows the dataset and nothing else", run: subPathReads},
		{name: "a container that is started again reads", run: restartedContainerReads},
		{name: "a pod in a user namespace (hostUsers: false) reads", run: userNamespaceReads},
	}
}

func crowdScenarios() []scenario {
	return []scenario{{name: "fifty pods with volumes are started at once and end at once", run: fiftyPods}}
}

func fsGroupReads(t *test) {
	d := t.put(2, 1<<20)
	t.claim("data", t.classFor(d))
	uid, group := int64(185), int64(2000)
	for _, v := range []volume{claimed("data"), inline(t.secret(), d.attributes("fileMode", "0440", "dirMode", "0550"))} {
		spec := podSpec(v)
		spec.SecurityContext.RunAsUser, spec.SecurityContext.FSGroup = &uid, &group
		name := "claim"
		if v.source.CSI != nil {
			name = "inline"
		}
		t.run(name, spec)
		t.verify(name, d, 0)
		t.worker(name, d, 0)
	}
	if got := t.mustExec("inline", "stat", "-c", "%g %a", mountPath(0)+"/data/part-0000.bin"); got != "2000 440" {
		t.Errorf("group and mode of a file are %s, not 2000 440", got)
	}
}

func subPathReads(t *test) {
	d := t.put(2, 1<<20)
	t.claim("data", t.classFor(d))
	spec := podSpec(claimed("data"), claimed("data"))
	for i := range spec.Containers[0].VolumeMounts {
		m := &spec.Containers[0].VolumeMounts[i]
		m.Name, m.SubPath, m.ReadOnly = "v0", "data", i == 1
	}
	spec.Volumes = spec.Volumes[:1]
	t.run("reader", spec)
	for i := range 2 {
		t.mustExec("reader", append([]string{"probe", "verify", mountPath(i)}, d.args()...)...)
		t.mustExec("reader", "probe", "write", mountPath(i))
	}
}

func restartedContainerReads(t *test) {
	d := t.put(2, 1<<20)
	t.claim("data", t.classFor(d))
	spec := podSpec(claimed("data"), inline(t.secret(), d.attributes()))
	spec.Containers[0].Command = []string{"sh", "-c", "rm -f /tmp/end; trap exit TERM; while [ ! -e /tmp/end ]; do sleep 0.1; done"}
	spec.Volumes = append(spec.Volumes, core.Volume{Name: "tmp", VolumeSource: core.VolumeSource{EmptyDir: &core.EmptyDirVolumeSource{}}})
	spec.Containers[0].VolumeMounts = append(spec.Containers[0].VolumeMounts, core.VolumeMount{Name: "tmp", MountPath: "/tmp"})
	t.run("reader", spec)
	t.mustExec("reader", "touch", "/tmp/end")
	t.eventually(60*time.Second, func() string { return "the container is not started again: " + t.why("reader") }, func() bool {
		p, err := t.client.CoreV1().Pods(t.ns).Get(t.ctx, "reader", meta.GetOptions{})
		return err == nil && isReady(p) && p.Status.ContainerStatuses[0].RestartCount > 0
	})
	for i := range 2 {
		t.verify("reader", d, i)
		t.worker("reader", d, i)
	}
}

func userNamespaceReads(t *test) {
	d := t.put(2, 1<<20)
	t.claim("data", t.classFor(d))
	own, uid, group := false, int64(185), int64(2000)
	spec := podSpec(claimed("data"), inline(t.secret(), d.attributes()))
	for i := range spec.Containers[0].VolumeMounts {
		spec.Containers[0].VolumeMounts[i].ReadOnly = true // in a user namespace a runtime cannot mount it otherwise
	}
	spec.HostUsers, spec.SecurityContext.RunAsUser, spec.SecurityContext.FSGroup = &own, &uid, &group
	t.run("reader", spec)
	if m := t.mustExec("reader", "cat", "/proc/self/uid_map"); strings.Fields(m)[1] == "0" {
		t.Fatalf("the pod is in no user namespace: %s", m)
	}
	for i := range 2 {
		t.verify("reader", d, i)
		t.worker("reader", d, i)
	}
}

func fiftyPods(t *test) {
	d := t.put(2, 1<<20)
	class := t.classFor(d)
	t.claim("data", class)
	var names []string
	for i := range 50 {
		name := fmt.Sprintf("reader-%d", i)
		names = append(names, name)
		v := claimed("data")
		switch i % 5 {
		case 0:
			v = inline(t.secret(), d.attributes())
		case 1:
			v = ephemeral(class)
		}
		t.start(name, on(t.nodes[i%len(t.nodes)], podSpec(v)))
	}
	t.eventually(4*time.Minute, func() string { return fmt.Sprintf("pods are not ready: %v", t.notReady()) }, func() bool { return len(t.notReady()) == 0 })
	for i, name := range names {
		if i%7 == 0 {
			t.verify(name, d, 0)
		}
	}
	grace := int64(0)
	t.must(t.client.CoreV1().Pods(t.ns).DeleteCollection(t.ctx, meta.DeleteOptions{GracePeriodSeconds: &grace}, meta.ListOptions{}))
	t.eventually(2*time.Minute, text("pods do not end"), func() bool {
		list, err := t.client.CoreV1().Pods(t.ns).List(t.ctx, meta.ListOptions{})
		return err == nil && len(list.Items) == 0
	})
}

// notReady are the test's pods that are not.
func (t *test) notReady() []string {
	list, err := t.client.CoreV1().Pods(t.ns).List(t.ctx, meta.ListOptions{})
	if err != nil {
		return []string{err.Error()}
	}
	var names []string
	for _, p := range list.Items {
		if !isReady(&p) {
			names = append(names, p.Name)
		}
	}
	return names
}
