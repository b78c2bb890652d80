package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	pluginregistration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// start runs a registration as the kubelet sees it, and stops it at the end of the test.
func start(t *testing.T, cfg Config) (*Registration, pluginregistration.RegistrationClient, func()) {
	t.Helper()
	r, err := NewRegistration(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	conn, err := grpc.NewClient("passthrough:///kubelet", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", r.Socket())
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return r, pluginregistration.NewRegistrationClient(conn), stop
}

func TestKubeletIsToldWhoTheDriverIs(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), Name: "csi.example.dev", Endpoint: "/plugins/csi.example.dev/csi.sock"}
	stale := filepath.Join(cfg.Dir, "csi.example.dev-reg.sock")
	if err := os.WriteFile(stale, nil, 0o600); err != nil { // of a plugin that was killed
		t.Fatal(err)
	}
	r, kubelet, stop := start(t, cfg)
	info, err := kubelet.GetInfo(t.Context(), &pluginregistration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if info.Type != pluginregistration.CSIPlugin || info.Name != cfg.Name || info.Endpoint != cfg.Endpoint || len(info.SupportedVersions) == 0 {
		t.Errorf("info %v", info)
	}
	if r.Err() == nil {
		t.Error("registered before the kubelet has said so")
	}
	for _, status := range []*pluginregistration.RegistrationStatus{
		{PluginRegistered: false, Error: "no such version"}, {PluginRegistered: true}, {PluginRegistered: false, Error: "gone"},
	} {
		if _, err := kubelet.NotifyRegistrationStatus(t.Context(), status); err != nil {
			t.Fatal(err)
		}
		if err := r.Err(); (err == nil) != status.PluginRegistered || err != nil && !strings.Contains(err.Error(), status.Error) {
			t.Errorf("after %v: %v", status, err)
		}
	}
	stop()
	if _, err := os.Lstat(r.Socket()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestRegistrationWantsPaths(t *testing.T) {
	for _, cfg := range []Config{{}, {Dir: "/x", Name: "n", Endpoint: "csi.sock"}, {Dir: "x", Name: "n", Endpoint: "/csi.sock"}, {Dir: "/x", Endpoint: "/csi.sock"}} {
		if _, err := NewRegistration(cfg); err == nil {
			t.Errorf("%+v: want an error", cfg)
		}
	}
}

// nodes is one node of an API server: it refuses a patch that names another resource version.
type nodes struct {
	corev1.Node
	meanwhile func() // runs once, between a Get and the Patch that follows
	err       error
}

func (n *nodes) Get(context.Context, string) (*corev1.Node, error) { return n.DeepCopy(), n.err }

func (n *nodes) Patch(_ context.Context, name string, patch []byte) error {
	if f := n.meanwhile; f != nil {
		n.meanwhile = nil
		f()
	}
	var p struct {
		Metadata metav1.ObjectMeta
		Spec     struct{ Taints []corev1.Taint }
	}
	if err := json.Unmarshal(patch, &p); err != nil {
		return err
	}
	if p.Metadata.ResourceVersion != n.ResourceVersion {
		return apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, name, nil)
	}
	n.Spec.Taints = p.Spec.Taints
	return n.err
}

func TestOnlyTheStartupTaintIsRemoved(t *testing.T) {
	const key = "csi.example.dev/not-ready"
	other := corev1.Taint{Key: "gpu", Effect: corev1.TaintEffectNoSchedule}
	later := corev1.Taint{Key: "maintenance", Effect: corev1.TaintEffectNoExecute, TimeAdded: &metav1.Time{Time: time.Unix(1, 0)}}
	api := &nodes{Node: corev1.Node{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "1"}, Spec: corev1.NodeSpec{Taints: []corev1.Taint{
		{Key: key, Effect: corev1.TaintEffectNoSchedule}, other, {Key: key, Effect: corev1.TaintEffectNoExecute}}}}}
	api.meanwhile = func() {
		api.Spec.Taints, api.ResourceVersion = append(api.Spec.Taints, later), "2"
	}
	if removed, err := RemoveTaint(t.Context(), api, "n1", key); err != nil || !removed {
		t.Fatalf("removed %v, %v", removed, err)
	}
	if got := api.Spec.Taints; len(got) != 2 || got[0].Key != other.Key || got[1].Key != later.Key {
		t.Errorf("taints %v; want %v and %v", got, other, later)
	}
	if removed, err := RemoveTaint(t.Context(), api, "n1", key); err != nil || removed {
		t.Errorf("again: removed %v, %v", removed, err)
	}
	api.err = errors.New("forbidden")
	if _, err := RemoveTaint(t.Context(), api, "n1", key); !errors.Is(err, api.err) {
		t.Errorf("want the API's error, got %v", err)
	}
}
