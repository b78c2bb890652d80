package master_test

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/larderfs/larder/master"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
)

// A job names what is mounted at a path of the namespace; one of a Kubernetes object is one, whoever makes it how often.
func TestJobsOfPathsAndOfObjects(t *testing.T) {
	m := start(t, master.Config{})
	ctx := t.Context()
	regs := []client.Registration{worker("n1", 1000), worker("n2", 1000)}
	register(t, m.Client, regs...)
	for path, uri := range map[string]string{"/sales": "s3://bucket/sales", "/sales/old": "s3://old"} {
		if err := m.PutMount(ctx, client.Mount{Path: path, URI: uri}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		paths []string
		want  string
	}{
		{[]string{"/sales"}, "s3://bucket/sales/ s3://old/"}, {[]string{"/sales/2026/", "s3://x"}, "s3://bucket/sales/2026/ s3://x"}, {[]string{"/sales/old/a b"}, "s3://old/a%20b"},
	} {
		j, err := m.CreateJob(ctx, client.JobSpec{Kind: record.Load, URIs: c.paths})
		if got := strings.Join(j.URIs, " "); got != c.want || err != nil {
			t.Errorf("%v: %q, %v; want %q", c.paths, got, err, c.want)
		}
	}
	for path, want := range map[string]error{"/hr": client.ErrNotFound, "/sales/../hr": client.ErrInvalid} {
		if _, err := m.CreateJob(ctx, client.JobSpec{Kind: record.Load, URIs: []string{path}}); !errors.Is(err, want) {
			t.Errorf("%s: %v", path, err)
		}
	}

	spec := client.JobSpec{Kind: record.Load, URIs: []string{"/sales"}, Object: "0b1c2d3e-uid"}
	var g errgroup.Group
	for range 8 {
		g.Go(func() error {
			j, err := m.master.CreateJob(ctx, spec)
			if err == nil && j.ID != record.JobOf(record.Load, spec.Object) {
				err = errors.New("another id: " + j.ID)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	of, err := m.master.ObjectJobs(ctx)
	if err != nil || len(of) != 1 || of[0].Object != spec.Object {
		t.Fatalf("%+v, %v", of, err)
	}
	if j, err := m.master.Job(ctx, of[0].ID); err != nil || len(j.Nodes) != 2 {
		t.Fatalf("%+v, %v", j, err)
	}
	if _, err := m.ReportJob(ctx, regs[0], of[0].ID, client.JobNode{Node: "n1", State: record.JobRunning, Files: 5}); err != nil {
		t.Fatal(err)
	}
	if j, err := m.master.CreateJob(ctx, spec); err != nil || j.Nodes[0].Files != 5 {
		t.Errorf("made again: %+v, %v", j, err)
	}
	if err := m.master.CancelJob(ctx, of[0].ID); err != nil {
		t.Fatal(err)
	}
	if j, err := m.Job(ctx, of[0].ID); err != nil || !j.Canceled {
		t.Errorf("%+v, %v", j, err)
	}
}
