package main

import (
	"strings"
	"testing"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/sanity/kubetest"
)

// Where there is a cluster, a load is an object of it.
func TestLoadsAreObjectsOfACluster(t *testing.T) {
	api := kubetest.StartCustom(t, "/apis/"+kube.MountsAPI+"/loads")
	config := api.Kubeconfig(t)
	run := func(args ...string) (string, error) {
		var out strings.Builder
		err := larder(t.Context(), &out, append(args, "--kubeconfig", config)...)
		return strings.TrimSpace(out.String()), err
	}
	name, err := run("load", "/sales", "s3://bucket/x", "--nodes", "n1,n2", "--endpoint", "http://store:9000", "--detach")
	if err != nil || !strings.HasPrefix(name, "load-") {
		t.Fatalf("%q, %v", name, err)
	}
	for want, path := range map[string][]string{"/sales": {"paths", "0"}, "s3://bucket/x": {"paths", "1"}, "n2": {"nodes", "1"}, "http://store:9000": {"endpoint"}} {
		if got := api.Field(name, append([]string{"spec"}, path...)...); got != want {
			t.Errorf("%v is %q, want %q", path, got, want)
		}
	}
	if name, err = run("load", "/sales", "--nodes", "all", "--detach"); err != nil || api.Field(name, "spec", "nodes") != "[all]" {
		t.Errorf("%q on %s, %v", name, api.Field(name, "spec", "nodes"), err)
	}
	c, err := kube.Connect(config, "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, end := range []struct {
		args   []string
		status kube.LoadStatus
		err    string
		shown  string
	}{
		{[]string{"load", "/sales"}, kube.LoadStatus{Job: "load-1", State: "done", Files: 7, Bytes: 3 << 20, PresentFiles: 2, Nodes: "2/2"}, "", "3.0 MiB"},
		{[]string{"pin", "/sales"}, kube.LoadStatus{Job: "pin-1", State: "failed", Nodes: "1/2", Message: "n1: no room"}, "failed: n1: no room", "no room"},
		{[]string{"load", "/sales", "-o", "json"}, kube.LoadStatus{Job: "load-2", State: "done", Bytes: 5}, "", `"bytes": 5`},
	} {
		done := make(chan error, 1)
		before := map[string]bool{}
		all, _, err := c.Loads().List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range all {
			before[o.Name] = true
		}
		go func() { // the master
			for {
				all, version, err := c.Loads().List(t.Context())
				if err != nil {
					done <- err
					return
				}
				for _, o := range all {
					if !before[o.Name] {
						done <- c.Loads().SetStatus(t.Context(), o.Name, end.status)
						return
					}
				}
				if err := c.Loads().Changed(t.Context(), version); err != nil {
					done <- err
					return
				}
			}
		}()
		out, err := run(end.args...)
		if serr := <-done; serr != nil {
			t.Fatal(serr)
		}
		if (err == nil) != (end.err == "") || err != nil && !strings.Contains(err.Error(), end.err) || !strings.Contains(out, end.shown) {
			t.Errorf("%v: %v\n%s", end.args, err, out)
		}
	}
	if pins := api.Writes(); !strings.HasPrefix(pins[4], "POST pin-") {
		t.Errorf("%v", pins)
	}
}
