package kubeloads

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
	"github.com/larderfs/larder/sanity/kubetest"
	"github.com/larderfs/larder/sanity/leak"
)

func TestMain(m *testing.M) { os.Exit(leak.Run(m)) }

// jobs are a master's, in memory.
type jobs struct {
	mu       sync.Mutex
	js       []client.Job
	err      error // of CreateJob
	canceled []string
}

func (f *jobs) CreateJob(_ context.Context, s client.JobSpec) (client.Job, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := s.Validate(); err != nil {
		return client.Job{}, err
	}
	if f.err != nil {
		return client.Job{}, f.err
	}
	id := record.JobOf(s.Kind, s.Object)
	for _, j := range f.js {
		if j.ID == id {
			j.Nodes = slices.Clone(j.Nodes)
			return j, nil
		}
	}
	j := client.Job{ID: id, Kind: s.Kind, URIs: s.URIs, Object: s.Object, Named: s.All, Nodes: []client.JobNode{{Node: "n1", State: record.JobWaiting}, {Node: "n2", State: record.JobWaiting}}}
	f.js = append(f.js, j)
	j.Nodes = slices.Clone(j.Nodes)
	return j, nil
}

func (f *jobs) ObjectJobs(context.Context) (all []client.Job, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, j := range f.js {
		if j.Nodes = nil; j.Object != "" {
			all = append(all, j)
		}
	}
	return all, nil
}

func (f *jobs) Job(_ context.Context, id string) (client.Job, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.js, func(j client.Job) bool { return j.ID == id })
	if i < 0 {
		return client.Job{}, client.ErrNotFound
	}
	j := f.js[i]
	j.Nodes = slices.Clone(j.Nodes)
	return j, nil
}

func (f *jobs) CancelJob(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.js {
		if f.js[i].ID == id {
			f.js[i].Canceled = true
			f.canceled = append(f.canceled, id)
		}
	}
	return nil
}

// report has a node of the i-th job be as it says.
func (f *jobs) report(i int, n client.JobNode) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k := range f.js[i].Nodes {
		if f.js[i].Nodes[k].Node == n.Node {
			f.js[i].Nodes[k] = n
		}
	}
}

func start(t *testing.T, f *jobs) (*kubetest.Custom, kube.LoadObjects) {
	t.Helper()
	api := kubetest.StartCustom(t, "/apis/"+kube.MountsAPI+"/loads")
	c, err := kube.Connect(api.Kubeconfig(t), "test")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // masters
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		ctl := New(c.Loads(), f, slog.New(slog.DiscardHandler))
		ctl.every = 10 * time.Millisecond
		go func() { done <- ctl.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	return api, c.Loads()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func TestLoadObjectsAreJobs(t *testing.T) {
	f := &jobs{}
	api, objects := start(t, f)
	ctx := t.Context()
	status := func(name, want string, path ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("%s %v is %q", name, path, want), func() bool { return api.Field(name, append([]string{"status"}, path...)...) == want })
	}
	if err := objects.Create(ctx, "sales", kube.LoadSpec{Paths: []string{"s3://bucket/sales"}, Nodes: []string{"n1", "n2"}}); err != nil {
		t.Fatal(err)
	}
	status("sales", "waiting", "state")
	status("sales", "0/2", "nodes")
	f.report(0, client.JobNode{Node: "n1", State: record.JobDone, Files: 3, Bytes: 300, PresentFiles: 1})
	f.report(0, client.JobNode{Node: "n2", State: record.JobRunning, Files: 1, Bytes: 100})
	status("sales", "running", "state")
	status("sales", "400", "bytes")
	status("sales", "False", "conditions", "0", "status")
	f.report(0, client.JobNode{Node: "n2", State: record.JobDone, Files: 3, Bytes: 300})
	status("sales", "done", "state")
	status("sales", "True", "conditions", "0", "status")
	status("sales", "2/2", "nodes")
	status("sales", "6", "files")
	if id := api.Field("sales", "status", "job"); !strings.HasPrefix(id, "load-") || len(f.js) != 1 {
		t.Errorf("job %q of %d", id, len(f.js))
	}
	f.mu.Lock()
	f.js = nil // forgotten, a week later
	f.mu.Unlock()

	if err := objects.Create(ctx, "pinned", kube.LoadSpec{Paths: []string{"s3://bucket/dim"}, Nodes: []string{"all"}, Pin: true}); err != nil {
		t.Fatal(err)
	}
	status("pinned", "waiting", "state")
	if all, err := f.ObjectJobs(ctx); err != nil || len(all) != 1 || !strings.HasPrefix(all[0].ID, "pin-") || !all[0].Named || all[0].ID != api.Field("pinned", "status", "job") {
		t.Errorf("%+v, %v", all, err)
	}
	f.report(0, client.JobNode{Node: "n1", State: record.JobFailed, FailedFiles: 2, Error: "no room"})
	f.report(0, client.JobNode{Node: "n2", State: record.JobDone})
	status("pinned", "failed", "state")
	status("pinned", "n1: no room", "message")
	status("pinned", "Failed", "conditions", "0", "reason")
	if err := objects.Create(ctx, "bad", kube.LoadSpec{Paths: []string{"hdfs://x"}}); err != nil {
		t.Fatal(err)
	}
	status("bad", "failed", "state")
	if m := api.Field("bad", "status", "message"); !strings.Contains(m, "hdfs") || strings.HasPrefix(m, "invalid argument") {
		t.Error(m)
	}
	if all, err := f.ObjectJobs(ctx); err != nil || len(all) != 1 {
		t.Errorf("a job was made again, or of what is wrong: %+v", all)
	}
}

// What is deleted is canceled, unless it has ended.
func TestADeletedLoadCancelsItsJob(t *testing.T) {
	f := &jobs{}
	f.js = []client.Job{{ID: "load-by-hand", Nodes: []client.JobNode{{Node: "n1", State: record.JobRunning}}}} // of nobody's object
	api, objects := start(t, f)
	for _, name := range []string{"running", "ended"} {
		if err := objects.Create(t.Context(), name, kube.LoadSpec{Paths: []string{"s3://bucket/" + name}}); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" has a job", func() bool { return api.Field(name, "status", "job") != "" })
	}
	for _, node := range []string{"n1", "n2"} {
		f.report(2, client.JobNode{Node: node, State: record.JobDone})
	}
	eventually(t, "it has ended", func() bool { return api.Field("ended", "status", "state") == "done" })
	id := api.Field("running", "status", "job")
	for _, name := range []string{"ended", "running"} {
		if err := objects.Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the job is canceled", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return len(f.canceled) > 0
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, got := range f.canceled {
		if got != id {
			t.Errorf("%s was canceled; want %s only", got, id)
		}
	}
}

// What cannot be now is said, and tried again.
func TestALoadWaitsForWhatItNeeds(t *testing.T) {
	f := &jobs{err: fmt.Errorf("%w: all nodes with a worker are drained", client.ErrRefused)}
	api, objects := start(t, f)
	if err := objects.Create(t.Context(), "sales", kube.LoadSpec{Paths: []string{"s3://bucket/sales"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it says so", func() bool { return strings.Contains(api.Field("sales", "status", "message"), "are drained") })
	if s := api.Field("sales", "status", "state"); s != "waiting" {
		t.Error(s)
	}
	f.mu.Lock()
	f.err = nil
	f.mu.Unlock()
	eventually(t, "it has a job", func() bool {
		return api.Field("sales", "status", "job") != "" && api.Field("sales", "status", "message") == ""
	})
}
