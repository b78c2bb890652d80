package e2e

import (
	"strings"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func refusalScenarios() []scenario {
	return []scenario{
		{name: "a misspelt inline attribute is refused by an event that names it", run: badAttribute},
		{name: "an inline volume may not name a local path or another endpoint", run: badInline},
		{name: "a claim on a bucket that is not there: the pod's event names bucket and reason", run: wrongBucket},
		{name: "a wrong key: the pod's event says so without the key", run: wrongKey},
		{name: "users' namespaces admit no hostPath, hostNetwork or privilege", run: policyHolds},
	}
}

// likeHelp checks that an event reads like help: short, without what only we understand.
func (t *test) likeHelp(message string) {
	t.Helper()
	t.Logf("event: %s", message)
	for _, bad := range []string{"goroutine ", ".go:", "panic", "%!", "<nil>"} {
		if strings.Contains(message, bad) {
			t.Errorf("the event has %q in it: %s", bad, message)
		}
	}
	if len(message) > 700 {
		t.Errorf("the event has %d characters: %s", len(message), message)
	}
}

func badAttribute(t *test) {
	d := t.put(1, 1<<10)
	t.start("reader", podSpec(inline(t.secret(), d.attributes("freshnes", "1m", "fileMode", "rwx"))))
	t.likeHelp(t.saidOf("reader", "freshnes", "fileMode"))
}

func badInline(t *test) {
	t.start("local", podSpec(inline("", map[string]string{"source": "file:///etc"})))
	t.likeHelp(t.saidOf("local", "file://"))
	d := data{name: "any"}
	attributes := d.attributes()
	attributes["endpoint"] = "http://169.254.169.254"
	t.start("elsewhere", podSpec(inline(t.secret(), attributes)))
	t.likeHelp(t.saidOf("elsewhere", "endpoint"))
}

func wrongBucket(t *test) {
	d := data{name: "any"}
	parameters := d.attributes()
	parameters["source"] = "s3://no-such-bucket/any"
	for _, call := range []string{"node-stage", "node-publish"} {
		parameters["csi.storage.k8s.io/"+call+"-secret-name"] = t.secret()
		parameters["csi.storage.k8s.io/"+call+"-secret-namespace"] = "${pvc.namespace}"
	}
	t.claim("data", t.class(parameters))
	t.start("reader", podSpec(claimed("data")))
	t.likeHelp(t.saidOf("reader", "no-such-bucket", "not"))
}

func wrongKey(t *test) {
	d := t.put(1, 1<<10)
	const wrong = "a-wrong-key-that-nobody-prints"
	_, err := t.client.CoreV1().Secrets(t.ns).Create(t.ctx, &core.Secret{ObjectMeta: meta.ObjectMeta{Name: "wrong"},
		StringData: map[string]string{"AWS_ACCESS_KEY_ID": accessKey, "AWS_SECRET_ACCESS_KEY": wrong}}, meta.CreateOptions{})
	t.must(err)
	t.start("reader", podSpec(inline("wrong", d.attributes())))
	said := t.saidOf("reader", bucket, "denied")
	t.likeHelp(said)
	if strings.Contains(said, wrong) {
		t.Error("the event has the key in it")
	}
}

func policyHolds(t *test) {
	host := podSpec(volume{source: core.VolumeSource{HostPath: &core.HostPathVolumeSource{Path: "/"}}})
	network := podSpec()
	network.HostNetwork = true
	privileged := podSpec()
	yes := true
	privileged.Containers[0].SecurityContext = &core.SecurityContext{Privileged: &yes}
	for name, spec := range map[string]*core.PodSpec{"host-path": host, "host-network": network, "privileged": privileged} {
		_, err := t.client.CoreV1().Pods(t.ns).Create(t.ctx, &core.Pod{ObjectMeta: meta.ObjectMeta{Name: name}, Spec: *spec}, meta.CreateOptions{})
		if err == nil {
			t.Errorf("a pod with %s was admitted", name)
		}
	}
}
