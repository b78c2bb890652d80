package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
)

// test is a test in a namespace of its own.
type test struct {
	*testing.T
	*env
	ctx context.Context // of this test, with its deadline
	ns  string
}

// What goes wrong is printed at once: a run takes minutes, and may be interrupted.

func (t *test) Errorf(format string, args ...any) {
	t.Helper()
	fmt.Printf("       "+format+"\n", args...)
	t.T.Errorf(format, args...)
}

func (t *test) Fatalf(format string, args ...any) {
	t.Helper()
	t.Errorf(format, args...)
	t.FailNow()
}

func (t *test) Error(args ...any) { t.Helper(); t.Errorf("%s", fmt.Sprint(args...)) }

func (t *test) Fatal(args ...any) { t.Helper(); t.Fatalf("%s", fmt.Sprint(args...)) }

// TempDir has no test's name in it: Spark takes the names of files for URIs, and # for their end.
func (t *test) TempDir() string {
	t.Helper()
	dir, err := os.MkdirTemp("", "larder-e2e-test-")
	t.must(err)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// must ends the test where err is not nil.
func (t *test) must(err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually asks until it is answered yes; what says the last state when it never is.
func (t *test) eventually(limit time.Duration, what func() string, yes func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !yes() {
		if time.Now().After(deadline) || t.ctx.Err() != nil {
			t.Fatalf("not within %v: %s", limit, what())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func text(format string, args ...any) func() string {
	return func() string { return fmt.Sprintf(format, args...) }
}

// afterwards is a context for a clean-up.
func afterwards() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 2*time.Minute)
}

// makeNamespace makes a namespace for a user who may nothing: Pod Security "restricted" and our
// admission policy. Its deletion must end.
func (t *test) makeNamespace() {
	t.Helper()
	ns, err := t.client.CoreV1().Namespaces().Create(t.ctx, &core.Namespace{ObjectMeta: meta.ObjectMeta{
		GenerateName: "e2e-", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted", userLabel: "true"}}}, meta.CreateOptions{})
	t.must(err)
	t.ns = ns.Name
	t.Cleanup(func() { t.deleteNamespace(ns.Name) })
	// Pods need the account, which a controller makes.
	t.eventually(30*time.Second, text("no default ServiceAccount"), func() bool {
		_, err := t.client.CoreV1().ServiceAccounts(t.ns).Get(t.ctx, "default", meta.GetOptions{})
		return err == nil
	})
}

// deleteNamespace returns when the pods have gone. The last test sees that the rest goes too.
func (t *test) deleteNamespace(name string) {
	ctx, cancel := afterwards()
	defer cancel()
	err := t.client.CoreV1().Namespaces().Delete(ctx, name, meta.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return
	}
	for err == nil || apierrors.IsConflict(err) { // it is being deleted
		list, listErr := t.client.CoreV1().Pods(name).List(ctx, meta.ListOptions{})
		if err = listErr; err != nil || len(list.Items) == 0 {
			break
		}
		eventuallyPause(ctx)
	}
	if err != nil {
		(&test{T: t.T, env: t.env, ctx: ctx, ns: name}).keepLogs(t.Name() + " deletion")
		t.Errorf("the pods of namespace %s do not end: %v", name, err)
	}
}

func eventuallyPause(ctx context.Context) {
	timer := time.NewTimer(100 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// podSpec is a pod of ours that waits to be told what to do, as a restricted user makes it.
func podSpec(volumes ...volume) *core.PodSpec {
	no, yes, grace, uid := false, true, int64(1), int64(1000)
	spec := &core.PodSpec{
		AutomountServiceAccountToken:  &no,
		TerminationGracePeriodSeconds: &grace,
		SecurityContext: &core.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &uid,
			SeccompProfile: &core.SeccompProfile{Type: core.SeccompProfileTypeRuntimeDefault}},
		Containers: []core.Container{{
			Name: "main", Image: flags.image, ImagePullPolicy: core.PullIfNotPresent,
			Command: []string{"sh", "-c", "trap exit TERM; while :; do sleep 3600 & wait; done"},
			SecurityContext: &core.SecurityContext{AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
				Capabilities: &core.Capabilities{Drop: []core.Capability{"ALL"}}},
		}},
	}
	for i, v := range volumes {
		name := fmt.Sprintf("v%d", i)
		spec.Volumes = append(spec.Volumes, core.Volume{Name: name, VolumeSource: v.source})
		spec.Containers[0].VolumeMounts = append(spec.Containers[0].VolumeMounts, core.VolumeMount{Name: name, MountPath: mountPath(i), ReadOnly: v.readOnly})
	}
	return spec
}

// mountPath is where a pod's i-th volume is: /larder, /larder1, …
func mountPath(i int) string {
	if i == 0 {
		return "/larder"
	}
	return fmt.Sprintf("/larder%d", i)
}

// volume is a source for a pod.
type volume struct {
	source   core.VolumeSource
	readOnly bool
}

func claimed(name string) volume {
	return volume{source: core.VolumeSource{PersistentVolumeClaim: &core.PersistentVolumeClaimVolumeSource{ClaimName: name}}}
}

func inline(secret string, attributes map[string]string) volume {
	v := &core.CSIVolumeSource{Driver: driverName, VolumeAttributes: attributes}
	if secret != "" {
		v.NodePublishSecretRef = &core.LocalObjectReference{Name: secret}
	}
	return volume{source: core.VolumeSource{CSI: v}}
}

func ephemeral(class string) volume {
	return volume{source: core.VolumeSource{Ephemeral: &core.EphemeralVolumeSource{
		VolumeClaimTemplate: &core.PersistentVolumeClaimTemplate{Spec: claimSpec(class, "1Gi", core.ReadOnlyMany)}}}}
}

func claimSpec(class, size string, modes ...core.PersistentVolumeAccessMode) core.PersistentVolumeClaimSpec {
	return core.PersistentVolumeClaimSpec{StorageClassName: &class, AccessModes: modes,
		Resources: core.VolumeResourceRequirements{Requests: core.ResourceList{core.ResourceStorage: resource.MustParse(size)}}}
}

func (t *test) claim(name, class string) {
	t.Helper()
	t.claimOf(name, claimSpec(class, "1Gi", core.ReadOnlyMany))
}

func (t *test) claimOf(name string, spec core.PersistentVolumeClaimSpec) {
	t.Helper()
	_, err := t.client.CoreV1().PersistentVolumeClaims(t.ns).Create(t.ctx, &core.PersistentVolumeClaim{
		ObjectMeta: meta.ObjectMeta{Name: name}, Spec: spec}, meta.CreateOptions{})
	t.must(err)
}

// class makes a StorageClass for the length of the test.
func (t *test) class(parameters map[string]string) string {
	t.Helper()
	wait := storage.VolumeBindingWaitForFirstConsumer
	c, err := t.client.StorageV1().StorageClasses().Create(t.ctx, &storage.StorageClass{
		ObjectMeta: meta.ObjectMeta{GenerateName: "e2e-"}, Provisioner: driverName, VolumeBindingMode: &wait, Parameters: parameters}, meta.CreateOptions{})
	t.must(err)
	t.Cleanup(func() {
		ctx, cancel := afterwards()
		defer cancel()
		if err := t.client.StorageV1().StorageClasses().Delete(ctx, c.Name, meta.DeleteOptions{}); err != nil {
			t.Errorf("delete class %s: %v", c.Name, err)
		}
	})
	return c.Name
}

// start makes a pod; it does not wait.
func (t *test) start(name string, spec *core.PodSpec) {
	t.Helper()
	_, err := t.client.CoreV1().Pods(t.ns).Create(t.ctx, &core.Pod{
		ObjectMeta: meta.ObjectMeta{Name: name, Labels: map[string]string{"app": name}}, Spec: *spec}, meta.CreateOptions{})
	t.must(err)
}

func (t *test) run(name string, spec *core.PodSpec) *core.Pod {
	t.Helper()
	t.start(name, spec)
	return t.ready(name)
}

func isReady(p *core.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c core.PodCondition) bool {
		return c.Type == core.PodReady && c.Status == core.ConditionTrue
	})
}

// ready waits for a pod and returns it.
func (t *test) ready(name string) *core.Pod {
	t.Helper()
	var p *core.Pod
	var err error
	t.eventually(90*time.Second, func() string { return "pod " + name + " is not ready: " + t.why(name) }, func() bool {
		p, err = t.client.CoreV1().Pods(t.ns).Get(t.ctx, name, meta.GetOptions{})
		return err == nil && isReady(p)
	})
	return p
}

// why is what the events say about a pod.
func (t *test) why(name string) string {
	var b strings.Builder
	for _, e := range t.events(name) {
		fmt.Fprintf(&b, "\n  %s %s: %s", e.Type, e.Reason, e.Message)
	}
	return b.String()
}

// events are those of the object of that name in the test's namespace.
func (t *test) events(name string) []core.Event {
	list, err := t.client.CoreV1().Events(t.ns).List(t.ctx, meta.ListOptions{FieldSelector: "involvedObject.name=" + name})
	if err != nil {
		return []core.Event{{Message: err.Error()}}
	}
	return list.Items
}

// saidOf waits for an event about the object with all of these words, and returns its message.
func (t *test) saidOf(name string, words ...string) string {
	t.Helper()
	found := ""
	t.eventually(60*time.Second, func() string { return fmt.Sprintf("no event of %s with %q in it: %s", name, words, t.why(name)) }, func() bool {
		for _, e := range t.events(name) {
			has := func(w string) bool { return strings.Contains(e.Message, w) }
			if !slices.ContainsFunc(words, func(w string) bool { return !has(w) }) {
				found = e.Message
				return true
			}
		}
		return false
	})
	return found
}

// output takes what two streams write at once.
type output struct {
	mu sync.Mutex
	b  strings.Builder
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

// exec runs a command in a pod's container and returns what it prints.
func (t *test) exec(pod string, command ...string) (string, error) {
	return t.execIn(t.ns, pod, "main", command...)
}

func (t *test) execIn(ns, pod, container string, command ...string) (string, error) {
	req := t.client.CoreV1().RESTClient().Post().Resource("pods").Name(pod).Namespace(ns).SubResource("exec").
		VersionedParams(&core.PodExecOptions{Container: container, Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	e, err := remotecommand.NewWebSocketExecutor(t.config, "GET", req.URL().String())
	if err != nil {
		return "", err
	}
	var out output
	ctx, cancel := context.WithTimeout(t.ctx, time.Minute)
	defer cancel()
	err = e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &out})
	if err != nil {
		err = fmt.Errorf("%s in %s: %w: %s", strings.Join(command, " "), pod, err, out.b.String())
	}
	return strings.TrimSpace(out.b.String()), err
}

func (t *test) mustExec(pod string, command ...string) string {
	t.Helper()
	out, err := t.exec(pod, command...)
	t.must(err)
	return out
}

func (t *test) delete(pod string) {
	t.Helper()
	t.must(t.client.CoreV1().Pods(t.ns).Delete(t.ctx, pod, meta.DeleteOptions{}))
	t.eventually(60*time.Second, func() string { return "pod " + pod + " does not end: " + t.why(pod) }, func() bool {
		_, err := t.client.CoreV1().Pods(t.ns).Get(t.ctx, pod, meta.GetOptions{})
		return apierrors.IsNotFound(err)
	})
}

// logs is what a container has printed.
func (t *test) logs(ns, pod, container string) (string, error) {
	r, err := t.client.CoreV1().Pods(ns).GetLogs(pod, &core.PodLogOptions{Container: container}).Stream(t.ctx)
	if err != nil {
		return "", err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return string(b), err
}

func (t *test) podLogs(ctx context.Context, dir, ns string) error {
	pods, err := t.client.CoreV1().Pods(ns).List(ctx, meta.ListOptions{})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods.Items {
		for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			for _, previous := range []bool{false, true} {
				b, err := t.client.CoreV1().Pods(ns).GetLogs(p.Name, &core.PodLogOptions{Container: c.Name, Previous: previous}).DoRaw(ctx)
				if err != nil {
					continue // there is none
				}
				name := fmt.Sprintf("%s.%s.%s.log", ns, p.Name, c.Name)
				if previous {
					name = "previous." + name
				}
				errs = append(errs, os.WriteFile(filepath.Join(dir, name), b, 0o644))
			}
		}
	}
	return errors.Join(errs...)
}

func (t *test) readyNodes() []string {
	t.Helper()
	list, err := t.client.CoreV1().Nodes().List(t.ctx, meta.ListOptions{})
	t.must(err)
	var names []string
	for _, n := range list.Items {
		ready := slices.ContainsFunc(n.Status.Conditions, func(c core.NodeCondition) bool {
			return c.Type == core.NodeReady && c.Status == core.ConditionTrue
		})
		if ready && !n.Spec.Unschedulable {
			names = append(names, n.Name)
		}
	}
	if len(names) < 2 {
		t.Fatalf("two nodes are needed, ready are %v", names)
	}
	return names
}

func on(node string, spec *core.PodSpec) *core.PodSpec {
	spec.NodeSelector = map[string]string{"kubernetes.io/hostname": node}
	return spec
}
