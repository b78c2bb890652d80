package sanity

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larderfs/larder/sanity/s3test"
	"github.com/larderfs/larder/sanity/stack"
)

// ask runs a command of larder against a's master.
func (a *apart) ask(into any, args ...string) error {
	args = append(args, "--master", "unix://"+filepath.Join(a.dir, "run/master.sock"), "-o", "json")
	out, err := exec.Command(larderBinary, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("larder %v: %w: %s", args, err, out)
	}
	return json.Unmarshal(out, into)
}

type located struct {
	CachedBytes int64
	Nodes       []struct {
		Node, Unanswered     string
		CachedBytes, Objects int64
	}
}

// sums are "node bytes/objects", or why not, in the order of the answer.
func (l located) sums() (all []string) {
	for _, n := range l.Nodes {
		if n.Unanswered != "" {
			all = append(all, n.Node+" "+n.Unanswered)
			continue
		}
		all = append(all, fmt.Sprintf("%s %d/%d", n.Node, n.CachedBytes, n.Objects))
	}
	return all
}

type workers struct {
	Workers []struct {
		Node, Worker, State string
		Mounts, Pods        int
	}
}

// shownVolume is what `larder volume show` tells.
type shownVolume struct {
	Volume, Name, Namespace, Claim string
	Inline                         bool
	Parameters                     map[string]string
	Nodes                          []struct {
		Node, Unanswered                     string
		Mounted, Counted                     time.Time
		Takeovers                            int
		Pods                                 []struct{ Namespace, Name string }
		ReadBytes, FetchedBytes, PassedBytes int64
	}
}

// asKubelet writes what a kubelet keeps beside a target.
func asKubelet(t *testing.T, v *stack.Volume) {
	t.Helper()
	data, err := json.Marshal(map[string]string{"driverName": "csi.larder.dev", "volumeHandle": v.ID, "specVolID": v.Name})
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range v.Targets {
		if err := os.WriteFile(filepath.Join(filepath.Dir(target), "vol_data.json"), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// Two nodes with one master: what their pods read, and who they are, is known where it happened,
// also after each process was killed.
func TestTheMasterKnowsWhatIsWhere(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, dataset())
	a := startApart(t, store.Endpoint, "worker", "--listen=127.0.0.1:0", "master", "--worker-lease=3s")
	b := startApart(t, store.Endpoint, "worker", "--listen=127.0.0.1:0", "worker", "--node-name=n2", "node", "--node-name=n2",
		"worker", "--master=unix://"+filepath.Join(a.dir, "run/master.sock"))
	for _, n := range []*apart{a, b} {
		n.more["node"] = append(n.more["node"], "--kubelet-dir="+filepath.Join(n.dir, "kubelet"))
		n.end("node", syscall.SIGTERM)
		n.start("node")
		if err := n.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	va, targetA := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	vb, targetB := publish(t, b.Kubelet, inlineOf(bucket(store, "v", "ds")))
	asKubelet(t, va)
	asKubelet(t, vb)
	mustShell(t, "cat '"+targetA+"'/data/year=2026/* '"+targetA+"'/data/a.csv '"+targetB+"/data/a.csv' >/dev/null")

	uri := "s3://" + store.Bucket
	var failed error // of the last question: a master that is starting does not answer
	shown := func(args ...string) []string {
		var l located
		failed = a.ask(&l, append([]string{"locate"}, args...)...)
		return l.sums()
	}
	a.await(func() bool { return slices.Equal(shown(uri), []string{"n1 4194313/3", "n2 8/1"}) }) // chunks are written behind the read
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{uri + "/ds"}, "n1 4194313/3 n2 8/1"},
		{[]string{uri + "/ds/year%3D2026/"}, "n1 4194305/2 n2 0/0"},
		{[]string{uri + "/ds/a.csv"}, "n1 8/1 n2 8/1"},
		{[]string{uri + "/elsewhere"}, "n1 0/0 n2 0/0"},
		{[]string{uri, "--endpoint", store.Endpoint}, "n1 4194313/3 n2 8/1"},
		{[]string{uri, "--endpoint", "http://other.example.com"}, "n1 0/0 n2 0/0"},
	} {
		if got := strings.Join(shown(c.args...), " "); got != c.want {
			t.Errorf("%v: %s, %v; want %s", c.args, got, failed, c.want)
		}
	}

	known := func() bool {
		var w workers
		failed = a.ask(&w, "top", "--interval", "100ms")
		for _, w := range w.Workers {
			if w.State != "ok" || w.Mounts != 1 || w.Pods != 1 {
				return false
			}
		}
		return len(w.Workers) == 2
	}
	a.await(known)
	var volumes []struct {
		Volume string
		Inline bool
		Nodes  []struct {
			Node string
			Pods []struct{ Namespace, Name string }
		}
	}
	if err := a.ask(&volumes, "volume", "ls"); err != nil || len(volumes) != 2 {
		t.Fatalf("volumes: %+v, %v", volumes, err)
	}
	for _, v := range volumes {
		want := map[bool]string{false: va.ID + " [{n1 [{default v}]}]", true: vb.ID + " [{n2 [{default v}]}]"}[v.Inline]
		if got := fmt.Sprint(v.Volume, " ", v.Nodes); got != want {
			t.Errorf("volume ls: %s; want %s", got, want)
		}
	}
	for _, id := range []string{va.ID, vb.ID} {
		var v shownVolume
		if err := a.ask(&v, "volume", "show", id); err != nil || v.Volume != id || v.Parameters["source"] != uri+"/ds" || v.Inline != (id == vb.ID) || len(v.Nodes) != 1 {
			t.Fatalf("volume show: %+v, %v", v, err)
		}
		n := v.Nodes[0]
		if n.Unanswered != "" || n.Mounted.IsZero() || n.Counted.IsZero() || fmt.Sprint(n.Pods) != "[{default v}]" || v.Inline && v.Namespace != "default" ||
			n.FetchedBytes < map[bool]int64{false: 4194313, true: 8}[v.Inline] || n.ReadBytes+n.PassedBytes < n.FetchedBytes {
			t.Errorf("volume show: %+v", v)
		}
	}
	if err := a.ask(new(shownVolume), "volume", "show", "nobody's"); err == nil || !strings.Contains(err.Error(), "larder volume ls") {
		t.Errorf("volume show of none: %v", err)
	}
	for _, name := range []string{"worker", "node", "master"} {
		a.end(name, syscall.SIGKILL)
		if name == "master" {
			if err := os.RemoveAll(filepath.Join(a.dir, "master")); err != nil {
				t.Fatal(err)
			}
		}
		a.start(name)
		if name == "worker" {
			b.end(name, syscall.SIGKILL)
			if got := shown(uri); len(got) != 2 || !strings.HasPrefix(got[1], "n2 no answer from 127.0.0.1:") {
				t.Errorf("without a worker on n2: %q, %v", got, failed)
			}
			b.start(name)
		}
		a.await(func() bool { return known() && slices.Equal(shown(uri), []string{"n1 4194313/3", "n2 8/1"}) })
	}
	a.await(func() bool { // the workers were killed, and count anew
		var v shownVolume
		return a.ask(&v, "volume", "show", va.ID) == nil && len(v.Nodes) == 1 && v.Nodes[0].Takeovers == 1 && v.Nodes[0].FetchedBytes == 0
	})
	if err := b.Unpublish(t.Context(), vb); err != nil {
		t.Error(err)
	}
	a.await(func() bool {
		var w workers
		return a.ask(&w, "top", "--interval", "100ms") == nil && len(w.Workers) == 2 && w.Workers[1].Pods == 0 && w.Workers[1].Mounts == 0
	})
}
