package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func localityScenarios() []scenario {
	return []scenario{
		{name: "larder locate, top, volume ls and worker ls tell what is on which node, also of a worker with a new IP", run: localityIsKnown},
	}
}

// larder asks Larder's command line, in the master's pod.
func (t *test) larder(into any, args ...string) error {
	master := t.systemPods("master", "")[0].Name
	out, err := t.execIn(systemNamespace, master, "master", append(append([]string{"/larder"}, args...), "--master=127.0.0.1:9820", "-o=json")...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}

// held are a dataset's bytes on each node, as the master tells; and what is wrong with the answer.
func (t *test) held(d data) (bytes map[string]int64, wrong string) {
	var l struct {
		Nodes []struct {
			Node, Unanswered string
			CachedBytes      int64
		}
	}
	if err := t.larder(&l, "locate", d.source()+"/", "--endpoint="+storeURL); err != nil {
		return nil, err.Error()
	}
	bytes = map[string]int64{}
	for _, n := range l.Nodes {
		bytes[n.Node] = n.CachedBytes
		if n.Unanswered != "" {
			wrong += n.Node + ": " + n.Unanswered + "; "
		}
	}
	return bytes, wrong
}

// heldAre waits until a dataset's bytes are so on some nodes.
func (t *test) heldAre(d data, want map[string]int64) {
	t.Helper()
	var got map[string]int64
	var wrong string
	t.eventually(60*time.Second, func() string { return fmt.Sprintf("%s is held as %v (%s), not %v", d.name, got, wrong, want) }, func() bool {
		got, wrong = t.held(d)
		for node, bytes := range want {
			if got[node] != bytes {
				return false
			}
		}
		return wrong == ""
	})
}

// users are the pods of this test's namespace that a volume is published to, by node.
func (t *test) users(volume string) (map[string][]string, error) {
	var vs []struct {
		Volume string
		Nodes  []struct {
			Node string
			Pods []struct{ Namespace, Name string }
		}
	}
	if err := t.larder(&vs, "volume", "ls"); err != nil {
		return nil, err
	}
	on := map[string][]string{}
	for _, v := range vs {
		if v.Volume != volume {
			continue
		}
		for _, n := range v.Nodes {
			for _, p := range n.Pods {
				on[n.Node] = append(on[n.Node], p.Namespace+"/"+p.Name)
			}
		}
	}
	return on, nil
}

// usersAre waits until the pods that use a volume are those of that name, each on its node.
func (t *test) usersAre(volume string, want map[string]string) {
	t.Helper()
	var got map[string][]string
	var err error
	t.eventually(60*time.Second, func() string { return fmt.Sprintf("volume %s is used by %v (%v), not %v", volume, got, err, want) }, func() bool {
		if got, err = t.users(volume); err != nil || len(got) != len(want) {
			return false
		}
		for node, pod := range want {
			if !slices.Equal(got[node], []string{t.ns + "/" + pod}) {
				return false
			}
		}
		return true
	})
}

// workerAt is a node's worker as the master knows it.
func (t *test) workerAt(node string) (uuid, address string) {
	t.Helper()
	var ws []struct {
		Node, Worker string
		Addresses    []string
		Gone         bool
	}
	t.must(t.larder(&ws, "worker", "ls"))
	for _, w := range ws {
		if w.Node == node && !w.Gone && len(w.Addresses) > 0 {
			return w.Worker, w.Addresses[0]
		}
	}
	return "", ""
}

func localityIsKnown(t *test) {
	const size = 3<<20 + 1
	d := t.put(2, size)
	t.claim("data", t.classFor(d))
	one, two := t.nodes[0], t.nodes[1]
	t.run("first", on(one, podSpec(claimed("data"))))
	t.run("second", on(two, podSpec(claimed("data"))))
	t.verify("first", d, 0)
	t.heldAre(d, map[string]int64{one: 2 * size, two: 0})
	t.verify("second", d, 0)
	t.heldAre(d, map[string]int64{one: 2 * size, two: 2 * size})

	c, err := t.client.CoreV1().PersistentVolumeClaims(t.ns).Get(t.ctx, "data", meta.GetOptions{})
	t.must(err)
	pv, err := t.client.CoreV1().PersistentVolumes().Get(t.ctx, c.Spec.VolumeName, meta.GetOptions{})
	t.must(err)
	volume := pv.Spec.CSI.VolumeHandle
	t.usersAre(volume, map[string]string{one: "first", two: "second"})

	var top struct {
		Workers []struct {
			Node, State string
			Mounts      int
		}
	}
	t.must(t.larder(&top, "top"))
	for _, w := range top.Workers {
		if slices.Contains([]string{one, two}, w.Node) && (w.State != "ok" || w.Mounts == 0) {
			t.Errorf("top shows %+v", w)
		}
	}

	uuid, address := t.workerAt(two)
	if ip := t.systemPods("worker", two)[0].Status.PodIP; !strings.HasPrefix(address, ip+":") {
		t.Errorf("the master has the worker of %s, pod IP %s, at %q", two, ip, address)
	}
	if got := t.worker("second", d, 0); got != uuid {
		t.Errorf("the pod on %s finds worker %s, the master has %s", two, got, uuid)
	}
	t.must(t.client.CoreV1().Pods(systemNamespace).Delete(t.ctx, t.systemPods("worker", two)[0].Name, meta.DeleteOptions{}))
	t.eventually(90*time.Second, text("the worker of %s is not followed to another IP than %s", two, address), func() bool {
		u, a := t.workerAt(two)
		return u == uuid && a != "" && a != address
	})
	t.heldAre(d, map[string]int64{one: 2 * size, two: 2 * size})
	t.usersAre(volume, map[string]string{one: "first", two: "second"})
	t.delete("second")
	t.usersAre(volume, map[string]string{one: "first"})
}
