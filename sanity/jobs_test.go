package sanity

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/sanity/kubetest"
	"github.com/larderfs/larder/sanity/s3test"
)

var loadObjects = flag.Int("load-objects", 600, "objects of TestALoadOutlivesWhoDoesIt")

// twoNodes are two nodes with one master.
func twoNodes(t *testing.T, endpoint string) (a, b *apart) {
	a = startApart(t, endpoint, "worker", "--listen=127.0.0.1:0", "master", "--worker-lease=3s")
	b = startApart(t, endpoint, "worker", "--listen=127.0.0.1:0", "worker", "--node-name=n2", "node", "--node-name=n2",
		"worker", "--master=unix://"+filepath.Join(a.dir, "run/master.sock"))
	a.await(func() bool {
		var ws []struct{ Gone bool }
		return a.ask(&ws, "worker", "ls") == nil && len(ws) == 2 && !ws[0].Gone && !ws[1].Gone
	})
	return a, b
}

// jobShown is what `larder job show` tells.
type jobShown struct {
	Job, State                              string
	Files, Bytes, PresentFiles, FailedFiles int64
	Nodes                                   []struct {
		Node, State, Error string
		Files              int64
	}
}

// run runs a command of larder that follows a job, and returns what it shows in the end.
func (a *apart) run(t *testing.T, args ...string) (j jobShown, failed error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), larderBinary, append(args, "--master", "unix://"+filepath.Join(a.dir, "run/master.sock"), "-o", "json")...)
	var diag strings.Builder
	cmd.Stderr = &diag
	out, err := cmd.Output()
	if err != nil {
		failed = fmt.Errorf("larder %v: %w: %s", args, err, diag.String())
	}
	if jerr := json.Unmarshal(out, &j); jerr != nil && err == nil {
		t.Fatalf("larder %v: %v: %s", args, jerr, out)
	}
	return j, failed
}

// A load goes on when the command, the master and the workers are killed in the middle of it, and nothing is
// fetched twice but what was in flight.
func TestALoadOutlivesWhoDoesIt(t *testing.T) {
	store := s3test.Start(t)
	const folders, size = 7, 4096
	var g errgroup.Group
	g.SetLimit(8)
	for i := range *loadObjects {
		g.Go(func() error { // through the server, of which the counts are reset
			_, err := store.Put(fmt.Sprintf("ds/d%d/%06d", i%folders, i), pattern(size, uint64(i)))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	a, b := twoNodes(t, store.Endpoint)
	_, targetA := publish(t, a.Kubelet, bucket(store, "v", "ds"))
	publish(t, b.Kubelet, bucket(store, "w", "ds"))
	uri := "s3://" + store.Bucket + "/ds"

	load := exec.Command(larderBinary, "load", uri, "--master", "unix://"+filepath.Join(a.dir, "run/master.sock"))
	restart := func(n *apart, name string) func() {
		return func() { n.end(name, syscall.SIGKILL); n.start(name) }
	}
	kills := []func(){
		restart(a, "worker"), func() { load.Process.Kill(); load.Wait() }, restart(a, "master"), restart(b, "worker"), restart(a, "master"),
	}
	var gets atomic.Int64
	at, killed := make(chan func()), make(chan struct{})
	store.ResetCounts()
	store.SetHook(func(w http.ResponseWriter, r *http.Request, req s3test.Request, next http.Handler) {
		every := int64(2 * *loadObjects / (len(kills) + 1))
		if req.Kind == s3test.Get {
			if n := gets.Add(1); n%every == 0 && n/every <= int64(len(kills)) {
				at <- kills[n/every-1]
				<-killed
			}
		}
		next.ServeHTTP(w, r)
	})
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	for range kills {
		for before, waiting := int64(-1), true; waiting; {
			select {
			case kill := <-at:
				kill()
				killed <- struct{}{}
				waiting = false
			case <-time.After(time.Minute):
				now := gets.Load()
				if now == before {
					t.Fatalf("the load has stopped after %d GETs", now)
				}
				before = now
			}
		}
	}
	var js []jobShown
	a.await(func() bool { return a.ask(&js, "job", "ls") == nil && len(js) == 1 })
	j, err := a.run(t, "job", "show", js[0].Job, "--follow")
	if err != nil || j.State != "done" || j.FailedFiles != 0 || j.Files < int64(2**loadObjects) {
		t.Errorf("%+v, %v", j, err)
	}
	counts := store.Counts()
	total := int64(2 * *loadObjects * size)
	t.Logf("%d objects on each of two nodes: %d GETs, %.4f times the bytes", *loadObjects, counts.Get, float64(counts.GetBytes)/float64(total))
	if counts.GetBytes > total+max(total/20, 2*16*size) { // of a small test, what was in flight is more than a twentieth
		t.Errorf("%d bytes were fetched for %d", counts.GetBytes, total)
	}
	want := fmt.Sprintf("%d/%d", total/2, *loadObjects)
	var l located
	a.await(func() bool {
		return a.ask(&l, "locate", uri) == nil && slices.Equal(l.sums(), []string{"n1 " + want, "n2 " + want})
	})
	store.ResetCounts()
	mustShell(t, "find "+targetA+"/data -type f -print0 | xargs -0 cat >/dev/null")
	if c := store.Counts(); c.Get != 0 {
		t.Errorf("%d GETs for files that are loaded", c.Get)
	}
	again, err := a.run(t, "load", uri)
	if err != nil || again.PresentFiles != int64(2**loadObjects) || store.Counts().Get != 0 {
		t.Errorf("loaded again: %+v, %v, %d GETs", again, err, store.Counts().Get)
	}
}

// What a job may do to whom, and how it ends otherwise.
func TestJobs(t *testing.T) {
	store := s3test.Start(t)
	t.Setenv("TESTROOT_AWS_ACCESS_KEY_ID", store.AccessKey)
	t.Setenv("TESTROOT_AWS_SECRET_ACCESS_KEY", store.SecretKey)
	put(t, store, map[string][]byte{"ds/a": pattern(100, 1), "ds/b/c": pattern(3<<20, 2), "ds/b/d": pattern(10, 3), "ds/e": {}, "dsx": pattern(9, 1)})
	a, b := twoNodes(t, store.Endpoint)
	publish(t, a.Kubelet, bucket(store, "v", "ds"))
	uri := "s3://" + store.Bucket
	sums := func() []string {
		var l located
		if err := a.ask(&l, "locate", uri); err != nil {
			t.Error(err)
		}
		return l.sums()
	}

	j, err := a.run(t, "load", uri+"/ds")
	if err != nil || j.State != "done" || j.Files != 4 || j.Bytes != 3<<20+110 || len(j.Nodes) != 2 || j.Nodes[1].State != "skipped" {
		t.Errorf("load: %+v, %v", j, err)
	}
	if got := sums(); !slices.Equal(got, []string{"n1 3145838/3", "n2 0/0"}) && !slices.Equal(got, []string{"n1 3145838/4", "n2 0/0"}) {
		t.Errorf("cached: %v", got)
	}
	if j, err := a.run(t, "free", uri+"/ds/b"); err != nil || j.Files != 2 || j.Bytes != 3<<20+10 {
		t.Errorf("free: %+v, %v", j, err)
	}
	if j, err := a.run(t, "load", uri+"/ds/b/d", uri+"/ds/a"); err != nil || j.Files != 2 || j.PresentFiles != 1 || j.Bytes != 110 {
		t.Errorf("load of two files: %+v, %v", j, err)
	}
	if j, err := a.run(t, "load", uri); err != nil || j.Files != 4 { // the volume's part of it
		t.Errorf("load of the bucket: %+v, %v", j, err)
	}
	if j, err := a.run(t, "pin", uri+"/ds/a"); err != nil || j.State != "done" || j.Files != 1 {
		t.Errorf("pin: %+v, %v", j, err)
	}
	if j, err := a.run(t, "unpin", uri+"/ds"); err != nil || j.Files != 1 || j.Bytes != 100 {
		t.Errorf("unpin: %+v, %v", j, err)
	}
	for _, c := range []struct {
		name, want string
		args       []string
	}{
		{"a node without a volume of it", "no volume that is published on this node has it, and no mount with a credential", []string{"load", uri + "/ds", "--nodes", "n2"}},
		{"a node that is not there", `node "n9" has no worker that is alive`, []string{"load", uri + "/ds", "--nodes", "n9"}},
		{"nothing anywhere", "no node has a volume of it", []string{"load", "s3://other/x"}},
		{"no scheme", "scheme", []string{"load", "ds"}},
		{"nothing mounted", "larder mount add /ds", []string{"load", "/ds"}},
		{"no such job", "`larder job ls`", []string{"job", "show", "load-x"}},
	} {
		j, err := a.run(t, c.args...)
		if said := fmt.Sprint(err, j); err == nil || !strings.Contains(said, c.want) {
			t.Errorf("%s: %s; want %q", c.name, said, c.want)
		}
	}

	mount := []string{"mount", "add", "/sales", uri + "/ds", "--option", "endpoint=" + store.Endpoint + ",region=" + store.Region, "--credential", "env:TESTROOT_",
		"--master", "unix://" + filepath.Join(a.dir, "run/master.sock")}
	if out, err := exec.Command(larderBinary, mount...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if j, err := a.run(t, "load", "/sales/b"); err != nil || j.Files != 2 || j.Nodes[1].State != "skipped" {
		t.Errorf("load of a path where a volume of it is: %+v, %v", j, err)
	}
	a.await(func() bool { // n2 hears of the mount
		j, err := a.run(t, "load", "/sales/b/", "/sales/a", "--nodes", "all")
		return err == nil && j.State == "done" && j.Files == 6 && j.Nodes[1].Files == 3
	})
	var l located
	if err := a.ask(&l, "locate", "/sales/b"); err != nil || len(l.sums()) != 2 || l.sums()[1] != fmt.Sprintf("n2 %d/2", 3<<20+10) {
		t.Errorf("locate a path: %v, %v", l.sums(), err)
	}

	// A drained node gets no load; its volumes are served, and what is freed goes there too.
	vb, targetB := publish(t, b.Kubelet, bucket(store, "w", "ds"))
	worker := func(args ...string) (ws []struct {
		Node    string
		Drained time.Time
	}) {
		t.Helper()
		if err := a.ask(&ws, append([]string{"worker"}, args...)...); err != nil {
			t.Error(err)
		}
		return ws
	}
	if ws := worker("drain", "n2"); len(ws) != 1 || ws[0].Node != "n2" || ws[0].Drained.IsZero() {
		t.Errorf("drain: %+v", ws)
	}
	mustShell(t, "cat "+targetB+"/data/b/c > /dev/null")
	if j, err := a.run(t, "load", uri+"/ds"); err != nil || len(j.Nodes) != 1 || j.Nodes[0].Node != "n1" {
		t.Errorf("load beside a drained node: %+v, %v", j, err)
	}
	if j, err := a.run(t, "load", uri+"/ds", "--nodes", "n2"); err == nil || !strings.Contains(err.Error(), "larder worker undrain n2") {
		t.Errorf("load on a drained node: %+v, %v", j, err)
	}
	if j, err := a.run(t, "free", uri); err != nil || len(j.Nodes) != 2 || j.Nodes[1].State != "done" {
		t.Errorf("free on a drained node: %+v, %v", j, err)
	}
	if ws := worker("undrain", "n2"); len(ws) != 1 || !ws[0].Drained.IsZero() {
		t.Errorf("undrain: %+v", ws)
	}
	if err := b.Unpublish(t.Context(), vb); err != nil {
		t.Error(err)
	}

	asked := make(chan struct{}, 100)
	if _, err := a.run(t, "free", uri); err != nil {
		t.Error(err)
	}
	store.SetHook(func(w http.ResponseWriter, r *http.Request, req s3test.Request, next http.Handler) {
		if req.Kind != s3test.Get {
			next.ServeHTTP(w, r)
			return
		}
		asked <- struct{}{}
		<-r.Context().Done()
	})
	out, err := exec.Command(larderBinary, "load", uri+"/ds", "--detach", "--master", "unix://"+filepath.Join(a.dir, "run/master.sock")).Output()
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimSpace(string(out))
	<-asked
	if out, err := exec.Command(larderBinary, "job", "cancel", id, "--master", "unix://"+filepath.Join(a.dir, "run/master.sock")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if j, err := a.run(t, "job", "show", id, "--follow"); err == nil || j.State != "canceled" {
		t.Errorf("canceled: %+v, %v", j, err)
	}
}

// The doctor finds nothing wrong where nothing is, and names what is away.
func TestDoctor(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, dataset())
	a := startApart(t, store.Endpoint)
	publish(t, a.Kubelet, bucket(store, "v", "ds"))
	examine := func() (said string, healthy bool) {
		out, err := exec.Command(larderBinary, "doctor", "--dir", a.dir).CombinedOutput()
		return string(out), err == nil
	}
	var said string
	defer func() {
		if t.Failed() {
			t.Log(said)
		}
	}()
	a.await(func() bool { // the worker registers
		var healthy bool
		said, healthy = examine()
		return healthy && strings.Contains(said, "1 workers, 1 volumes")
	})
	for _, want := range []string{"1, all served", "and its clock is ours", "worker ", "broker "} {
		if !strings.Contains(said, want) {
			t.Errorf("no %q in:\n%s", want, said)
		}
	}
	a.end("worker", syscall.SIGKILL)
	if said, healthy := examine(); healthy || !strings.Contains(said, "has no worker: who reads it waits") || !strings.Contains(said, "→") {
		t.Errorf("without a worker:\n%s", said)
	}
	a.start("worker")
	a.end("master", syscall.SIGKILL)
	if said, healthy := examine(); healthy || !strings.Contains(said, "volumes are read and published without it") {
		t.Errorf("without a master:\n%s", said)
	}
	a.start("master") // to unpublish
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A Load object of a cluster is a job: its status says how far that is, and with the object it goes.
func TestALoadObjectIsAJob(t *testing.T) {
	store := s3test.Start(t)
	put(t, store, map[string][]byte{"ds/a": pattern(100, 1), "ds/b": pattern(2<<20, 2)})
	api := kubetest.StartCustom(t, "/apis/"+kube.MountsAPI+"/loads")
	config := api.Kubeconfig(t)
	a := startApart(t, store.Endpoint, "worker", "--listen=127.0.0.1:0", "master", "--mount-objects", "master", "--kubeconfig="+config)
	publish(t, a.Kubelet, bucket(store, "v", "ds"))
	larder := func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), larderBinary, append(args, "--kubeconfig", config)...).Output()
		return strings.TrimSpace(string(out)), err
	}
	uri := "s3://" + store.Bucket + "/ds"
	out, err := larder("load", uri, "-o", "json")
	var done struct {
		Object, State string
		Files, Bytes  int64
	}
	if err = errors.Join(err, json.Unmarshal([]byte(out), &done)); err != nil || done.State != "done" || done.Files != 2 || done.Bytes != 2<<20+100 {
		t.Fatalf("%v: %s", err, out)
	}
	if s := api.Field(done.Object, "status", "conditions", "0", "status") + " " + api.Field(done.Object, "status", "nodes"); s != "True 1/1" {
		t.Error(s)
	}
	if j, err := a.run(t, "job", "show", api.Field(done.Object, "status", "job")); err != nil || j.State != "done" || j.Files != 2 {
		t.Errorf("%+v, %v", j, err)
	}
	if _, err := a.run(t, "free", uri); err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{}, 100)
	store.SetHook(func(w http.ResponseWriter, r *http.Request, req s3test.Request, next http.Handler) {
		if req.Kind != s3test.Get {
			next.ServeHTTP(w, r)
			return
		}
		asked <- struct{}{}
		<-r.Context().Done()
	})
	name, err := larder("load", uri, "--detach")
	if err != nil {
		t.Fatal(name)
	}
	<-asked
	a.await(func() bool { return api.Field(name, "status", "state") == "running" })
	id := api.Field(name, "status", "job")
	c, err := kube.Connect(config, "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Loads().Delete(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	if j, err := a.run(t, "job", "show", id, "--follow"); err == nil || j.State != "canceled" {
		t.Errorf("its object is gone: %+v, %v", j, err)
	}
}
