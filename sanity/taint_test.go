package sanity

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/sanity/kubetest"
	"github.com/larderfs/larder/sanity/s3test"
)

// A node that is registered with the startup taint loses it, and no other, when volumes can be published.
func TestStartupTaintIsRemovedWhenTheNodeIsReady(t *testing.T) {
	const key = "csi.larder.dev/not-ready"
	api := kubetest.Start(t)
	other := corev1.Taint{Key: "gpu", Effect: corev1.TaintEffectNoSchedule}
	api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: corev1.NodeSpec{
		Taints: []corev1.Taint{{Key: key, Effect: corev1.TaintEffectNoSchedule}, other, {Key: key, Effect: corev1.TaintEffectNoExecute}}}})
	config := api.Kubeconfig(t)
	startApart(t, s3test.Start(t).Endpoint, "node", "--kubeconfig="+config, "node", "--startup-taint="+key)
	c, err := kube.Connect(config, "test")
	if err != nil {
		t.Fatal(err)
	}
	api.Await(t, func() error {
		n, err := c.Nodes().Get(t.Context(), "n1")
		if err != nil {
			return err
		}
		if len(n.Spec.Taints) != 1 || n.Spec.Taints[0] != other {
			return fmt.Errorf("taints %v; want %v only", n.Spec.Taints, other)
		}
		return nil
	})
}
