package main

import (
	"encoding/json"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/sanity/kubetest"
)

func TestMountsAreMadeChangedAndRemoved(t *testing.T) {
	target := startMaster(t)
	run := func(args ...string) (string, error) {
		var out strings.Builder
		err := larder(t.Context(), &out, append(args, "--master", target)...)
		return out.String(), err
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := run(args...)
		if err != nil {
			t.Fatalf("larder %s: %v", strings.Join(args, " "), err)
		}
		return out
	}
	fails := func(want string, args ...string) {
		t.Helper()
		if out, err := run(args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("larder %s: %q, %v; want %q", strings.Join(args, " "), out, err, want)
		}
	}
	must("mount", "add", "/sales/", "s3://bucket/p/", "--credential", "secret:larder-system/keys", "--allow-inline", "team-a,team-b", "--option", "region=eu-west-1")
	must("mount", "add", "/sales/archive", "s3://old", "--read-only", "--allow-class", "-")
	must("mount", "add", "/sales/archive", "s3://old", "--read-only", "--allow-class", "-") // again, the same
	fails("mounted already, differently (s3://old)", "mount", "add", "/sales/archive", "s3://new")
	fails("no bucket name", "mount", "add", "/x", "s3://u:hunter2@bucket")
	fails("larder mount ls shows them", "mount", "rm", "/nope")
	fails("larder mount add /hr", "mount", "show", "/hr")

	var all []mountEntry
	if err := json.Unmarshal([]byte(must("mount", "ls", "-o", "json")), &all); err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	if e := all[0]; e.Path != "/sales" || e.URI != "s3://bucket/p" || e.Credential != "secret:larder-system/keys" || len(e.AllowInline) != 2 ||
		e.AllowClass[0] != "*" || e.Options["region"] != "eu-west-1" || e.ReadOnly {
		t.Errorf("%+v", e)
	}
	if e := all[1]; !e.ReadOnly || len(e.AllowInline)+len(e.AllowClass) != 0 {
		t.Errorf("%+v", e)
	}
	if out := must("mount", "ls"); !strings.Contains(out, "/sales/archive") || !strings.Contains(out, "team-a,team-b") {
		t.Error(out)
	}
	if out := must("mount", "show", "/sales/2026"); !strings.Contains(out, "s3://bucket/p/2026") || !strings.Contains(out, "/sales (s3://bucket/p)") || strings.Contains(out, "archive") {
		t.Error(out)
	}
	if out := must("mount", "show", "/"); !strings.Contains(out, "the mounts below it") || !strings.Contains(out, "/sales/archive (s3://old)") {
		t.Error(out)
	}

	must("mount", "set", "/sales", "--allow-inline", "team-c", "--option", "region=", "--option", "pathStyle=true")
	var one pathEntry
	if err := json.Unmarshal([]byte(must("mount", "show", "/sales", "-o", "json")), &one); err != nil {
		t.Fatal(err)
	}
	if e := one.Mount; e.AllowInline[0] != "team-c" || len(e.Options) != 1 || e.Options["pathStyle"] != "true" || e.Credential == "" || len(one.Below) != 1 {
		t.Errorf("%+v", one)
	}
	must("mount", "mv", "/sales", "/turnover")
	must("mount", "rm", "/sales/archive")
	if out := must("mount", "ls"); strings.Contains(out, "/sales") || !strings.Contains(out, "/turnover") {
		t.Error(out)
	}
}

// Where there is a cluster, mounts are its objects.
func TestMountsAreObjectsOfACluster(t *testing.T) {
	api := kubetest.StartCustom(t, "/apis/"+kube.MountsAPI+"/mounts")
	config := api.Kubeconfig(t)
	run := func(args ...string) (string, error) {
		var out strings.Builder
		err := larder(t.Context(), &out, append(args, "--kubeconfig", config)...)
		return out.String(), err
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := run(args...)
		if err != nil {
			t.Fatalf("larder %s: %v", strings.Join(args, " "), err)
		}
		return out
	}
	must("mount", "add", "/sales/archive", "s3://bucket/p/", "--credential", "secret:larder-system/keys", "--allow-inline", "team-a")
	must("mount", "add", "/sales/archive", "s3://bucket/p", "--credential", "secret:larder-system/keys", "--allow-inline", "team-a")
	if got := api.Field("sales-archive", "spec", "path") + " " + api.Field("sales-archive", "spec", "credential"); got != "/sales/archive secret:larder-system/keys" {
		t.Errorf("the object: %s", got)
	}
	must("mount", "set", "/sales/archive", "--read-only")
	must("mount", "mv", "/sales/archive", "/old")
	if api.Field("sales-archive", "spec", "path") != "/old" || api.Field("sales-archive", "spec", "readOnly") != "true" || api.Field("sales-archive", "spec", "allowInline", "0") != "team-a" {
		t.Error("changed, it is something else")
	}
	if out := must("mount", "show", "/old/x"); !strings.Contains(out, "mounts.larder.dev/sales-archive") || !strings.Contains(out, "s3://bucket/p/x") {
		t.Error(out)
	}
	c, err := kube.Connect(config, "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Mounts().SetStatus(t.Context(), "sales-archive", kube.MountStatus{Conditions: notReady("Conflict", "path /old is another's")}); err != nil {
		t.Fatal(err)
	}
	if out := must("mount", "ls"); !strings.Contains(out, "broken") {
		t.Error(out)
	}
	must("mount", "rm", "/old")
	if out := must("mount", "ls", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Error(out)
	}
	if _, err := run("mount", "rm", "/old"); err == nil || !strings.Contains(err.Error(), "larder mount ls shows them") {
		t.Errorf("%v", err)
	}
}

func notReady(reason, message string) []metav1.Condition {
	return []metav1.Condition{{Type: kube.Ready, Status: metav1.ConditionFalse, Reason: reason, Message: message}}
}

func TestNamesOfMountObjects(t *testing.T) {
	seen := map[string]string{}
	for _, path := range []string{"/", "/a", "/a/b", "/a-b", "/A/b", "/a/B", "/a.b", "/ü", "/a/b/c", "/" + strings.Repeat("x", 200), "/" + strings.Repeat("x", 201)} {
		name := objectName(path)
		if seen[name] != "" || len(name) > 63 || name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			t.Errorf("%s: %q, as %s", path, name, seen[name])
		}
		seen[name] = path
	}
	if objectName("/sales/archive") != "sales-archive" {
		t.Error(objectName("/sales/archive"))
	}
}
