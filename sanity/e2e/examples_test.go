package e2e

import (
	"os"
	"path/filepath"
	"strings"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func exampleScenarios() []scenario {
	return []scenario{{name: "the examples of deploy do what they say", run: examples}}
}

// example is a file of deploy/examples with the tests' store, data and image in the place of the user's.
func (t *test) example(name string, d data) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("deploy", "examples", name))
	t.must(err)
	file := filepath.Join(t.TempDir(), name)
	t.must(os.WriteFile(file, []byte(strings.NewReplacer(
		"http://s3.example.com:9000", storeURL, "s3://tpch/lineitem", d.source(), "busybox:1.37", flags.image,
		"AWS_ACCESS_KEY_ID: example", "AWS_ACCESS_KEY_ID: "+accessKey, "example-secret", secretKey).Replace(string(b))), 0o600))
	return file
}

func examples(t *test) {
	d := t.put(2, 1<<20)
	apply := func(name string) {
		t.Helper()
		_, err := kubectl(t.ctx, "apply", "-n", t.ns, "-f", t.example(name, d))
		t.must(err)
	}
	_, err := kubectl(t.ctx, "apply", "-f", t.example("dataset.yaml", d)) // it says its namespace itself
	t.must(err)
	t.Cleanup(func() {
		ctx, cancel := afterwards()
		defer cancel()
		if err := t.client.StorageV1().StorageClasses().Delete(ctx, "lineitem", meta.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	t.offer("lineitem", strings.Replace(t.entry(d), secretName, "lineitem-s3", 1))
	for _, e := range []string{"claim.yaml", "ephemeral.yaml", "inline.yaml", "local.yaml", "sidecar.yaml"} {
		apply(e)
	}
	for _, pod := range []string{"reader", "ephemeral", "inline", "local"} {
		t.ready(pod)
		_, err := t.execIn(t.ns, pod, "reader", append([]string{"probe", "verify", "/larder/data"}, d.args()...)...)
		t.must(err)
	}
	pods := []string{"reader", "ephemeral", "inline", "local", "sidecar"}
	for _, pod := range pods {
		t.ready(pod)
		_, err := t.execIn(t.ns, pod, "reader", append([]string{"probe", "socket", "/larder/domain"}, d.args()...)...)
		t.must(err)
	}
}
