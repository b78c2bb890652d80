package driver

import (
	"errors"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/cacheworker/object"
	"github.com/larderfs/larder/master/client"
)

// ofPath makes the volume one of a path of the namespace, of a pod in team-a.
func ofPath(path string) attrs {
	return attrs{"path": path, keyPodNamespace: "team-a", keyPodName: "p", keyPodUID: "u"}
}

func stagePath(path string) func(*csi.NodeStageVolumeRequest) {
	return func(r *csi.NodeStageVolumeRequest) { r.VolumeContext = attrs{"path": path} } // the kubelet does not say whose pod it is
}

func publishPath(path string, inline bool) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) {
		if r.VolumeContext = ofPath(path); inline {
			r.VolumeContext[keyEphemeral] = "true"
			r.StagingTargetPath = ""
		}
	}
}

func (b *bench) secretOf(where string) brokerwire.Credentials {
	b.broker.mu.Lock()
	defer b.broker.mu.Unlock()
	c, _ := b.broker.secrets["v"].Get(where)
	return c
}

func (b *bench) mounted(ms ...client.Mount) {
	b.stats.mu.Lock()
	defer b.stats.mu.Unlock()
	b.stats.table = ms
}

func TestAVolumeOfAPathIsGivenWhatItsMountsNeed(t *testing.T) {
	b := start(t)
	b.mounted(client.Mount{Path: "/sales", URI: "s3://bkt", Credential: "secret:larder-system/keys", AllowClass: []string{"team-a"}})
	b.secrets = map[string]map[string]string{"larder-system/keys": secret("one")}
	must(t, b.stage(t, stagePath("/sales/2026")))
	if m := b.broker.mounts["v"]; m.Volume.Path != "/sales/2026" || m.Volume.Source != "" || m.Volume.Tenant != "" || len(m.Secrets) != 0 {
		t.Errorf("staged as %+v", m)
	}
	must(t, b.publish(t, "target", publishPath("/sales/2026", false)))
	if got := b.secretOf("secret:larder-system/keys").AccessKeyID; got != "one" || b.broker.mounts["v"].Volume.Tenant != "team-a" {
		t.Errorf("published with %q, as %+v", got, b.broker.mounts["v"].Volume)
	}
	must(t, b.publish(t, "target", publishPath("/sales/2026", false))) // as the kubelet does each minute
	if b.broker.count("mount") != 1 || b.broker.count("bind") != 1 {
		t.Error("mounted anew")
	}
	must(t, b.unpublish(t, "target"), b.unstage(t))
}

func TestAMountsNamespacesAreKeptTo(t *testing.T) {
	b := start(t)
	b.mounted(client.Mount{Path: "/sales", URI: "s3://bkt", AllowClass: []string{"team-b"}, AllowInline: []string{"team-a"}})
	must(t, b.stage(t, stagePath("/sales")))
	wantCode(t, b.publish(t, "target", publishPath("/sales", false)), codes.PermissionDenied, `mount /sales does not allow volumes of StorageClasses of Kubernetes namespace "team-a"`)
	wantCode(t, b.publish(t, "target", publishPath("/sales", false)), codes.PermissionDenied, "larder mount set /sales --allow-class team-b,team-a")
	must(t, b.unpublish(t, "target"), b.unstage(t))

	must(t, b.publish(t, "inline", publishPath("/sales", true)))
	must(t, b.unpublish(t, "inline"))
	b.mounted(client.Mount{Path: "/sales", URI: "s3://bkt"})
	wantCode(t, b.publish(t, "inline", publishPath("/sales", true)), codes.PermissionDenied, "does not allow inline volumes")
	wantCode(t, b.publish(t, "inline", publishPath("/hr", true)), codes.NotFound, "larder mount add /hr")
	if b.mountsOf("") != 0 {
		t.Error("something is left mounted")
	}
}

// Without the Secret of the path itself nothing can be read; without that of a mount below it, the rest.
func TestSecretsThatAreNotThere(t *testing.T) {
	b := start(t)
	own := client.Mount{Path: "/sales", URI: "s3://bkt", Credential: "secret:larder-system/own", AllowInline: []string{"*"}}
	below := client.Mount{Path: "/sales/old", URI: "s3://old", Credential: "secret:larder-system/below", AllowInline: []string{"*"}}
	b.mounted(own, below)
	b.secrets = map[string]map[string]string{"larder-system/below": secret("below")}
	wantCode(t, b.publish(t, "target", publishPath("/sales", true)), codes.NotFound, "secret:larder-system/own: there is no such Secret")
	b.secrets = map[string]map[string]string{"larder-system/own": {secretID: "only the id"}}
	wantCode(t, b.publish(t, "target", publishPath("/sales", true)), codes.InvalidArgument, "secret:larder-system/own: ")
	b.secrets = map[string]map[string]string{"larder-system/own": secret("own")}
	must(t, b.publish(t, "target", publishPath("/sales", true)))
	if b.secretOf(own.Credential).AccessKeyID != "own" || !b.secretOf(below.Credential).IsZero() {
		t.Error("wrong secrets")
	}
	must(t, b.unpublish(t, "target"))
}

// A mount that comes while its volume is in use gets its Secret too.
func TestTheSecretOfANewMountIsBrought(t *testing.T) {
	b := start(t)
	all := []string{"*"}
	b.mounted(client.Mount{Path: "/sales", URI: "s3://bkt", AllowInline: all})
	must(t, b.publish(t, "target", publishPath("/sales", true)))
	b.secrets = map[string]map[string]string{"larder-system/keys": secret("new")}
	b.mounted(client.Mount{Path: "/sales", URI: "s3://bkt", AllowInline: all},
		client.Mount{Path: "/sales/x", URI: "s3://xxx", Credential: "secret:larder-system/keys", AllowInline: all},
		client.Mount{Path: "/sales/y", URI: "s3://yyy", Credential: "secret:larder-system/others"}) // not for this volume
	if err := b.server.node.bringMissing(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m := b.broker.mounts["v"]; b.secretOf("secret:larder-system/keys").AccessKeyID != "new" || len(m.Secrets) != 1 || m.Volume.Tenant != "team-a" {
		t.Errorf("%+v", m)
	}
	must(t, b.unpublish(t, "target"))
}

func TestAVolumeOfAPathIsForOneKubernetesNamespace(t *testing.T) {
	b := start(t)
	b.mounted(client.Mount{Path: "/sales", URI: "s3://bkt"})
	must(t, b.stage(t, stagePath("/sales")), b.publish(t, "one", publishPath("/sales", false)))
	other := func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[keyPodNamespace] = "team-b" }
	wantCode(t, b.publish(t, "two", publishPath("/sales", false), other), codes.FailedPrecondition, `Kubernetes namespace "team-a"`)
	must(t, b.unpublish(t, "one"))
	must(t, b.publish(t, "two", publishPath("/sales", false), other))
	must(t, b.unpublish(t, "two"), b.unstage(t))
}

func TestAVolumeIsMadeWhereSomethingIsMounted(t *testing.T) {
	b := start(t)
	b.volumes.mounts = []client.Mount{{Path: "/sales", URI: "s3://bkt", AllowClass: []string{"team-a"}}}
	path := func(p, claim string) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.Parameters = attrs{"path": p, keyClaimNamespace: claim} }
	}
	v, err := b.create(t, "one", path("/sales/2026/", "team-a"))
	if err != nil || v.GetVolumeContext()["path"] != "/sales/2026" || v.GetVolumeContext()["source"] != "" {
		t.Errorf("%v, %v", v, err)
	}
	_, err = b.create(t, "two", path("/hr", "team-a"))
	wantCode(t, err, codes.NotFound, "nothing is mounted at /hr")
	_, err = b.create(t, "three", path("/sales", "team-b"))
	wantCode(t, err, codes.PermissionDenied, "mount /sales does not allow")
}

func TestPathAndSourceExcludeEachOther(t *testing.T) {
	r, err := newRules("", nil)
	if err != nil {
		t.Fatal(err)
	}
	for want, a := range map[string]attrs{
		"give one of them":                 {"path": "/a", "source": "s3://bkt"},
		"the mount has it":                 {"path": "/a", "region": "eu"},
		`".." is no name`:                  {"path": "/a/../b"},
		"want an absolute one":             {"path": "a"},
		"what is mounted in the namespace": {},
	} {
		_, err := r.parse("v", a, nil)
		if !errors.Is(err, object.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v; want %q", a, err, want)
		}
	}
	q, err := r.parse("v", attrs{"path": "/a/b/", keyEphemeral: "true"}, nil)
	if err != nil || q.Path != "/a/b" || q.Source != "" {
		t.Errorf("%+v, %v", q, err)
	}
	again, err := r.parse("v", q.context(), nil)
	if err != nil || again.Path != q.Path {
		t.Errorf("%+v, %v", again, err)
	}
}
