package driver

import (
	"encoding/base64"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/larderfs/larder/cacheworker/brokerwire"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/sanity/leak"
)

const role = "arn:aws:iam::123456789012:role/team/reader"

// tokens are a kubelet's, for a pod of that service account.
func tokens(namespace, account, more string) string {
	part := base64.RawURLEncoding.EncodeToString
	return fmt.Sprintf(`{"sts.amazonaws.com":{"token":"%s.%s.%s","expirationTimestamp":"2026-11-23T04:00:00Z"}}`, part([]byte(`{"alg":"RS256"}`)),
		part(fmt.Appendf(nil, `{"sub":"system:serviceaccount:%s:%s"}`, namespace, account)), part([]byte(more)))
}

// asPod are the attributes of an inline volume, with what the kubelet adds for a pod of a namespace.
func asPod(namespace string, more attrs) attrs {
	a := attrs{keySource: "s3://bkt", keyEphemeral: "true", keyPodNamespace: namespace, keyPodName: "p", keyPodUID: "u", keyServiceAccount: "sa"}
	maps.Copy(a, more)
	return a
}

// DESIGN §5.10: what a user may write into an inline volume, to get at what is not his.
func TestInlineAttacksAreRefused(t *testing.T) {
	b := start(t)
	b.mounted(client.Mount{Path: "/hr", URI: "s3://hr"}, // of nobody's inline volumes
		client.Mount{Path: "/team", URI: "s3://team", AllowInline: []string{"other", "sales2"}},
		client.Mount{Path: "/open", URI: "s3://open", AllowInline: []string{"*"}},
		client.Mount{Path: "/open/closed", URI: "s3://closed", AllowInline: []string{"-"}})
	path := func(p string, more attrs) attrs {
		a := attrs{"source": "", "path": p}
		maps.Copy(a, more)
		return a
	}
	pod := func(more attrs) attrs {
		a := attrs{"credentials": "pod", "roleArn": role, keyTokens: tokens("sales", "sa", "canary")}
		maps.Copy(a, more)
		return a
	}
	invalid, denied := codes.InvalidArgument, codes.PermissionDenied
	for _, c := range []struct {
		name  string
		attrs attrs
		code  codes.Code
		text  string
	}{
		{"a folder of the node", attrs{"source": "file:///srv/x"}, invalid, "file:// is not for inline volumes"},
		{"the same in capitals", attrs{"source": "FILE:///srv/x"}, invalid, "its scheme is none of"},
		{"an endpoint that is not listed", attrs{"endpoint": "http://other:9000"}, invalid, "--inline-endpoint"},
		{"another port of a listed one", attrs{"endpoint": "http://listed:9001"}, invalid, "--inline-endpoint"},
		{"metadata service", attrs{"endpoint": "http://169.254.169.254"}, invalid, "--inline-endpoint"},
		{"metadata service, as a number", attrs{"endpoint": "http://2852039166"}, invalid, "--inline-endpoint"},
		{"metadata service, by IPv6", attrs{"endpoint": "http://[fd00:ec2::254]"}, invalid, "--inline-endpoint"},
		{"a zone", attrs{"endpoint": "http://[fe80::1%25eth0]"}, invalid, "endpoint: no host"},
		{"loopback", attrs{"endpoint": "http://127.0.0.1:9000"}, invalid, "--inline-endpoint"},
		{"loopback by name", attrs{"endpoint": "http://localhost:9000"}, invalid, "--inline-endpoint"},
		{"a listed host as user", attrs{"endpoint": "http://listed:9000@169.254.169.254"}, invalid, "credentials belong in the Secret"},
		{"a password in the endpoint", attrs{"endpoint": "http://user:canary@listed:9000"}, invalid, "credentials belong in the Secret"},
		{"a user in the source", attrs{"source": "s3://canary@bkt/x"}, invalid, "no bucket name"},
		{"a path in the endpoint", attrs{"endpoint": "http://listed:9000/../x"}, invalid, "only scheme, host and port"},
		{"a host in the region", attrs{"region": "evil.example/#"}, invalid, "region: "},
		{"dot-dot", attrs{"source": "s3://bkt/a/../b"}, invalid, `a segment ".."`},
		{"dot-dot, escaped", attrs{"source": "s3://bkt/a/%2e%2e/b"}, invalid, `escaped: a segment ".."`},
		{"dot-dot, half escaped", attrs{"source": "s3://bkt/a/.%2E/b"}, invalid, `escaped: a segment ".."`},
		{"a slash, escaped", attrs{"source": "s3://bkt/a%2F..%2Fb"}, invalid, "an escaped slash"},
		{"a NUL", attrs{"source": "s3://bkt/a\x00b"}, invalid, "contains NUL"},
		{"a NUL, escaped", attrs{"source": "s3://bkt/a%00b"}, invalid, "escaped: contains NUL"},
		{"not UTF-8, escaped", attrs{"source": "s3://bkt/a%ffb"}, invalid, "escaped: not UTF-8"},
		{"an end of the path", attrs{"source": "s3://bkt/a?b"}, invalid, "ends the path of a URL"},
		{"half an escape", attrs{"source": "s3://bkt/a%2"}, invalid, "begins no escape"},
		{"an empty segment", attrs{"source": "s3://bkt/a//b"}, invalid, "an empty segment"},
		{"a long segment", attrs{"source": "s3://bkt/" + strings.Repeat("a", 256)}, invalid, "a segment longer than"},
		{"a long key", attrs{"source": "s3://bkt/" + strings.Repeat("abcdefg/", 130)}, invalid, "longer than"},
		{"a bucket that is a path", attrs{"source": "s3://../etc"}, invalid, "no bucket name"},
		{"an attribute that is not known", attrs{"fileRoot": "/"}, invalid, "unknown parameter"},
		{"keys in attributes", attrs{"AWS_SECRET_ACCESS_KEY": "canary"}, invalid, "credentials belong in the Secret"},
		{"keys for a word", attrs{"credentials": "AKIA:canary"}, invalid, "credentials: none of [secret pod driver]"},
		{"a node of one's own", attrs{"binding": "node"}, invalid, "binding: node is for StorageClasses"},

		{"the worker's credential", attrs{"source": "s3://bkt/other", "credentials": "driver"}, denied, `not allowed for pods of Kubernetes namespace "sales" and s3://bkt/other; the administrator allows it with --driver-credentials sales=s3://bkt/other`},
		{"a prefix that begins the same", attrs{"source": "s3://bkt/prefix2", "credentials": "driver"}, denied, "s3://bkt/prefix2"},
		{"above the prefix", attrs{"source": "s3://bkt/pre", "credentials": "driver"}, denied, "s3://bkt/pre;"},
		{"the whole bucket", attrs{"credentials": "driver"}, denied, "s3://bkt;"},
		{"another bucket", attrs{"source": "s3://bkt2/prefix", "credentials": "driver"}, denied, "s3://bkt2/prefix"},
		{"another endpoint", attrs{"source": "s3://bkt/prefix", "endpoint": "http://listed:9000", "credentials": "driver"}, denied, "s3://bkt/prefix at http://listed:9000"},
		{"out of the prefix, escaped", attrs{"source": "s3://bkt/prefix/%2e%2e/other", "credentials": "driver"}, invalid, `escaped: a segment ".."`},
		{"another namespace", attrs{"source": "s3://bkt/prefix", "credentials": "driver", keyPodNamespace: "other"}, denied, `namespace "other"`},
		{"no namespace", attrs{"source": "s3://bkt/prefix", "credentials": "driver", keyPodNamespace: ""}, denied, `namespace ""`},

		{"a role without a role", pod(attrs{"roleArn": ""}), invalid, "roleArn: missing"},
		{"a role that is none", pod(attrs{"roleArn": "arn:aws:iam::1:user/root"}), invalid, "is not the ARN of a role"},
		{"a role with more in it", pod(attrs{"roleArn": role + "&Action=AssumeRole"}), invalid, "is not the ARN of a role"},
		{"a long role", pod(attrs{"roleArn": role + strings.Repeat("x", 2048)}), invalid, "is not the ARN of a role"},
		{"a role for a Secret", attrs{"roleArn": role}, invalid, "roleArn: only with credentials: pod"},
		{"a token service of one's own", pod(attrs{"stsEndpoint": "https://sts.evil"}), invalid, "--sts-endpoint"},
		{"the metadata service as token service", pod(attrs{"stsEndpoint": "http://169.254.169.254"}), invalid, "--sts-endpoint"},
		{"somebody else's token", pod(attrs{keyTokens: tokens("other", "sa", "canary")}), invalid, "the token is not of the pod's service account sales/sa"},
		{"a token without a pod", pod(attrs{keyServiceAccount: ""}), invalid, "podInfoOnMount"},
		{"a token that is none", pod(attrs{keyTokens: `{"sts.amazonaws.com":{"token":"canary"}}`}), invalid, "the token is not of the pod's"},
		{"tokens that are none", pod(attrs{keyTokens: "canary"}), invalid, "not the JSON that a kubelet writes"},
		{"a token for somebody else", pod(attrs{keyTokens: strings.Replace(tokens("sales", "sa", "canary"), "sts.amazonaws.com", "vault", 1)}), codes.FailedPrecondition, "tokenRequests"},
		{"no token", pod(attrs{keyTokens: ""}), codes.FailedPrecondition, "tokenRequests"},

		{"a mount that is for nobody's", path("/hr", nil), denied, "mount /hr does not allow inline volumes"},
		{"below such a mount", path("/hr/payroll/2026", nil), denied, "mount /hr does not allow inline volumes"},
		{"a mount of other namespaces", path("/team", nil), denied, `mount /team does not allow inline volumes of Kubernetes namespace "sales"`},
		{"a mount of others, as one of them", path("/team", attrs{keyPodNamespace: "sales2/../sales2"}), denied, "mount /team does not allow"},
		{"a mount of others, as nobody", path("/team", attrs{keyPodNamespace: ""}), denied, "is not known"},
		{"a closed mount in an open one", path("/open/closed", nil), denied, "mount /open/closed does not allow"},
		{"below a closed mount in an open one", path("/open/closed/x/", nil), denied, "mount /open/closed does not allow"},
		{"out of an open mount", path("/open/../hr", nil), invalid, `path: path "/open/../hr": ".." is no name`},
		{"out of an open mount, at the end", path("/open/..", nil), invalid, `".." is no name`},
		{"a dot", path("/open/./closed", nil), invalid, `"." is no name`},
		{"two slashes", path("/open//closed", nil), invalid, "an empty name"},
		{"a NUL in a path", path("/open\x00/hr", nil), invalid, "control character"},
		{"a line break in a path", path("/open\n/hr", nil), invalid, "control character"},
		{"a relative path", path("hr", nil), invalid, "want an absolute one"},
		{"a URI for a path", path("s3://hr", nil), invalid, "want an absolute one"},
		{"a long name", path("/open/"+strings.Repeat("a", 256), nil), invalid, "longer than"},
		{"a long path", path("/open/"+strings.Repeat("abcdefg/", 130), nil), invalid, "longer than"},
		{"a path where nothing is mounted", path("/none", nil), codes.NotFound, "nothing is mounted at /none"},
		{"a path and a source", path("/open", attrs{"source": "s3://hr"}), invalid, "give one of them"},
		{"a path at an endpoint of one's own", path("/open", attrs{"endpoint": "http://listed:9000"}), invalid, "endpoint: not with path"},
		{"a path in a region of one's own", path("/open", attrs{"region": "evil"}), invalid, "region: not with path"},
		{"a path with the worker's credential", path("/open", attrs{"credentials": "driver"}), invalid, "driver is not for a path"},
		{"a path with a role", path("/open", pod(attrs{"source": ""})), invalid, "pod is not for a path"},
		{"no Secret where one was asked for", attrs{"credentials": "secret"}, invalid, "credentials: secret, but the request has no"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantCode(t, b.publish(t, "target", inline, func(r *csi.NodePublishVolumeRequest) { r.VolumeContext = asPod("sales", c.attrs) }), c.code, c.text)
		})
	}
	if n := b.broker.count("mount"); n != 0 || len(leak.Mounts(b.dir)) > 0 {
		t.Errorf("%d mounts, left %v", n, leak.Mounts(b.dir))
	}
	if text := b.log.String(); strings.Contains(text, "canary") || strings.Contains(text, base64.RawURLEncoding.EncodeToString([]byte("canary"))) {
		t.Errorf("logged: %s", text)
	}
}

// A path is no URI: what would be an escape in one is a name.
func TestEscapesInAPathAreNames(t *testing.T) {
	b := start(t)
	b.mounted(client.Mount{Path: "/open", URI: "s3://open/prefix", AllowInline: []string{"*"}}, client.Mount{Path: "/hr", URI: "s3://hr"})
	for i, p := range []string{"/open/%2e%2e/hr", "/open/a%2F..%2Fb", "/open/%00", "/open/a?b#c"} {
		target := fmt.Sprintf("target%d", i)
		must(t, b.publish(t, target, inline, func(r *csi.NodePublishVolumeRequest) {
			r.VolumeId, r.VolumeContext = target, asPod("sales", attrs{"source": "", "path": p})
		}))
		if got := b.broker.mounts[target].Volume; got.Path != p || got.Source != "" {
			t.Errorf("%s: mounted %+v", p, got)
		}
		_, err := b.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: target, TargetPath: b.path(target)})
		must(t, err)
	}
}

func TestTheWorkersCredentialIsForWhomThePolicyNames(t *testing.T) {
	b := start(t)
	for i, a := range []attrs{
		{"source": "s3://bkt/prefix"}, {"source": "s3://bkt/prefix/"}, {"source": "s3://bkt/prefix/below"},
		{"source": "s3://bkt/elsewhere/x", "endpoint": "http://LISTED:9000/"},
	} {
		a["credentials"] = "driver"
		target := fmt.Sprintf("target%d", i)
		id := func(r *csi.NodePublishVolumeRequest) { r.VolumeId = target }
		must(t, b.publish(t, target, inline, id, func(r *csi.NodePublishVolumeRequest) { r.VolumeContext = asPod("sales", a) }))
		_, err := b.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: target, TargetPath: b.path(target)})
		must(t, err)
	}
	// A StorageClass is an administrator's, who needs no policy.
	q, err := testRules(t).parse("v", attrs{"source": "s3://any", "credentials": "driver"}, nil)
	if err != nil || !q.Ambient() {
		t.Errorf("a StorageClass: %v %v", q, err)
	}
	var r rules
	for _, bad := range []string{"", "sales", "=s3://bkt", "sales=file:///x", "sales=s3://bkt/a/../b", "Sales=s3://bkt", "sales=s3://bkt,endpoint=x"} {
		if err := r.allow([]string{bad}, nil); err == nil {
			t.Errorf("policy %q was taken", bad)
		}
	}
}

func TestATokenReachesNothingButTheBroker(t *testing.T) {
	b := start(t)
	volume := func(more string) func(r *csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) {
			r.VolumeContext = asPod("sales", attrs{"credentials": "pod", "roleArn": role, "stsEndpoint": "https://sts.listed", keyTokens: tokens("sales", "sa", more)})
		}
	}
	must(t, b.publish(t, "target", inline, volume("canary-one")))
	before := leak.Mounts(b.dir)
	one := b.broker.credentials("v")
	must(t, b.publish(t, "target", inline, volume("canary-two")))
	two := b.broker.credentials("v")
	if one.SessionToken == "" || two.SessionToken == one.SessionToken || one.AccessKeyID+one.SecretAccessKey != "" {
		t.Error("a repeated publish does not replace the token")
	}
	if after := leak.Mounts(b.dir); fmt.Sprint(after) != fmt.Sprint(before) || b.broker.count("mount") != 1 {
		t.Errorf("mounted anew: %v", after)
	}
	b.broker.mu.Lock()
	v := b.broker.mounts["v"].Volume
	b.broker.mu.Unlock()
	if v.RoleARN != role || v.CredentialsOf != brokerwire.CredentialsPod || v.ServiceAccount != "sales/sa" || v.Ambient() {
		t.Errorf("volume: %+v", v)
	}
	for what, text := range map[string]string{"log": b.log.String(), "attributes": v.Attributes, "volume": fmt.Sprintf("%+v", v)} {
		if strings.Contains(text, one.SessionToken) || strings.Contains(text, two.SessionToken) || strings.Contains(text, "expirationTimestamp") {
			t.Errorf("%s has the token: %s", what, text)
		}
	}
	if !strings.Contains(v.Attributes, role) {
		t.Errorf("attributes: %s", v.Attributes)
	}
	must(t, b.unpublish(t, "target"))
}

// One connection has one credential: a second service account may not be shown what the first one may read.
func TestAVolumeIsReadAsOneServiceAccount(t *testing.T) {
	b := start(t)
	class := attrs{"source": "s3://bkt", "credentials": "pod", "roleArn": role}
	publish := func(target, account string) error {
		return b.publish(t, target, func(r *csi.NodePublishVolumeRequest) {
			r.VolumeContext = maps.Clone(class)
			maps.Copy(r.VolumeContext, attrs{keyPodNamespace: "sales", keyServiceAccount: account, keyTokens: tokens("sales", account, "x")})
		})
	}
	must(t, b.stage(t, func(r *csi.NodeStageVolumeRequest) { r.VolumeContext = class }), publish("one", "a"), publish("two", "a"))
	wantCode(t, publish("three", "b"), codes.FailedPrecondition, `is published to service account "sales/a"`)
	must(t, b.unpublish(t, "one"), b.unpublish(t, "two"), publish("three", "b"), b.unpublish(t, "three"), b.unstage(t))
}
