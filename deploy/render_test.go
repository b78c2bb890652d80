// Package deploy tests what is deployed: that it is what the API knows, that the chart gives what
// kustomize gives, and that nobody has more rights than the comments say.
package deploy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	chartutil "helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const namespace = "larder-system"

// kinds are those that we use, and whether they are in a namespace.
var kinds = map[string]struct {
	new        func() any
	namespaced bool
}{
	"apiextensions.k8s.io/v1/CustomResourceDefinition":                 {func() any { return &apiextensionsv1.CustomResourceDefinition{} }, false},
	"admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy":        {func() any { return &admissionv1.ValidatingAdmissionPolicy{} }, false},
	"admissionregistration.k8s.io/v1/ValidatingAdmissionPolicyBinding": {func() any { return &admissionv1.ValidatingAdmissionPolicyBinding{} }, false},
	"v1/Namespace":                                    {func() any { return &corev1.Namespace{} }, false},
	"v1/Secret":                                       {func() any { return &corev1.Secret{} }, true},
	"v1/Service":                                      {func() any { return &corev1.Service{} }, true},
	"v1/ServiceAccount":                               {func() any { return &corev1.ServiceAccount{} }, true},
	"v1/Pod":                                          {func() any { return &corev1.Pod{} }, true},
	"v1/PersistentVolumeClaim":                        {func() any { return &corev1.PersistentVolumeClaim{} }, true},
	"v1/ConfigMap":                                    {func() any { return &corev1.ConfigMap{} }, true},
	"apps/v1/DaemonSet":                               {func() any { return &appsv1.DaemonSet{} }, true},
	"apps/v1/Deployment":                              {func() any { return &appsv1.Deployment{} }, true},
	"apps/v1/StatefulSet":                             {func() any { return &appsv1.StatefulSet{} }, true},
	"networking.k8s.io/v1/NetworkPolicy":              {func() any { return &networkingv1.NetworkPolicy{} }, true},
	"policy/v1/PodDisruptionBudget":                   {func() any { return &policyv1.PodDisruptionBudget{} }, true},
	"rbac.authorization.k8s.io/v1/Role":               {func() any { return &rbacv1.Role{} }, true},
	"rbac.authorization.k8s.io/v1/RoleBinding":        {func() any { return &rbacv1.RoleBinding{} }, true},
	"rbac.authorization.k8s.io/v1/ClusterRole":        {func() any { return &rbacv1.ClusterRole{} }, false},
	"rbac.authorization.k8s.io/v1/ClusterRoleBinding": {func() any { return &rbacv1.ClusterRoleBinding{} }, false},
	"monitoring.coreos.com/v1/PodMonitor":             {func() any { return &podMonitor{} }, true},
	"monitoring.coreos.com/v1/PrometheusRule":         {func() any { return &prometheusRule{} }, true},
	"storage.k8s.io/v1/CSIDriver":                     {func() any { return &storagev1.CSIDriver{} }, false},
	"storage.k8s.io/v1/StorageClass":                  {func() any { return &storagev1.StorageClass{} }, false},
}

// objects are decoded by the API's types, without a field that they do not know, by kind and name.
type objects map[string]any

func decode(t *testing.T, what string, text []byte) objects {
	t.Helper()
	all := objects{}
	docs := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		var head struct {
			APIVersion, Kind string
			Metadata         struct{ Name, Namespace string }
		}
		if err := yaml.Unmarshal(doc, &head); err != nil {
			t.Fatalf("%s: %v\n%s", what, err, doc)
		}
		if head.Kind == "" { // comments only
			continue
		}
		kind, ok := kinds[head.APIVersion+"/"+head.Kind]
		if !ok {
			t.Fatalf("%s: kind %s/%s", what, head.APIVersion, head.Kind)
		}
		o := kind.new()
		if err := yaml.UnmarshalStrict(doc, o); err != nil {
			t.Errorf("%s: %s %s: %v", what, head.Kind, head.Metadata.Name, err)
		}
		if m, ok := o.(interface {
			GetNamespace() string
			SetNamespace(string)
		}); ok && kind.namespaced && m.GetNamespace() == "" {
			m.SetNamespace(namespace) // where Helm installs it
		}
		key := head.Kind + "/" + head.Metadata.Name
		if all[key] != nil {
			t.Errorf("%s: two of %s", what, key)
		}
		all[key] = o
	}
}

func kustomize(t *testing.T, dir string) objects {
	t.Helper()
	r, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	text, err := r.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, dir, text)
}

func helm(t *testing.T, values string) objects {
	t.Helper()
	chart, err := loader.Load("helm/larder")
	if err != nil {
		t.Fatal(err)
	}
	var given map[string]any
	if err := yaml.Unmarshal([]byte(values), &given); err != nil {
		t.Fatal(err)
	}
	rendered, err := chartutil.ToRenderValues(chart, given, common.ReleaseOptions{Name: "larder", Namespace: namespace, IsInstall: true, Revision: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := engine.Engine{Strict: true}.Render(chart, rendered)
	if err != nil {
		t.Fatal(err)
	}
	all := objects{}
	for _, name := range slices.Sorted(maps.Keys(out)) {
		if strings.HasSuffix(name, ".txt") {
			continue
		}
		maps.Copy(all, decode(t, name, []byte(out[name])))
	}
	return all
}

func TestChartGivesWhatKustomizeGives(t *testing.T) {
	for dir, values := range map[string]string{
		"base":         "",
		"overlays/dev": "{master: {persistence: {enabled: false}}, provisioner: {extraArgs: [--capacity-poll-interval=5s]}}",
		"overlays/ha":  "{master: {replicas: 3}, controller: {replicas: 2}}",
	} {
		t.Run(dir, func(t *testing.T) {
			want, have := kustomize(t, dir), helm(t, values)
			delete(want, "Namespace/"+namespace) // helm install --create-namespace
			for _, key := range slices.Sorted(maps.Keys(want)) {
				if !reflect.DeepEqual(want[key], have[key]) {
					t.Errorf("%s: kustomize\n%s\nhelm\n%s", key, text(t, want[key]), text(t, have[key]))
				}
			}
			for _, key := range slices.Sorted(maps.Keys(have)) {
				if want[key] == nil {
					t.Errorf("only the chart has %s", key)
				}
			}
		})
	}
}

func text(t *testing.T, o any) []byte {
	t.Helper()
	b, err := yaml.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestTemplatesAreMadeFromTheBase(t *testing.T) {
	cmd := exec.Command("go", "run", ".", "-check")
	cmd.Dir = "helm"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// tiersAndViews checks that each tier has a view of the same volume, by the order of their flags, and that the broker
// knows it.
func tiersAndViews(t *testing.T, worker, node corev1.Container) {
	t.Helper()
	of := func(c corev1.Container, flag string) (volumes []string) {
		for _, arg := range c.Args {
			if v, ok := strings.CutPrefix(arg, flag); ok {
				dir, _, _ := strings.Cut(v, ":")
				for _, m := range c.VolumeMounts {
					if m.MountPath == dir && m.ReadOnly == (flag == "--view=") {
						volumes = append(volumes, m.Name)
					}
				}
			}
		}
		return volumes
	}
	want := []string{"cache", "cache-1", "cache-2"}
	for name, got := range map[string][]string{"tiers": of(worker, "--tier="), "views": of(worker, "--view="), "tiers of the node plugin": of(node, "--tier-dir=")} {
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for _, arg := range []string{"--tier=/var/cache/larder-1:8GiB:MEM", "--tier=/var/cache/larder-2:9TiB:HDD"} {
		if !slices.Contains(worker.Args, arg) {
			t.Errorf("no %s in %q", arg, worker.Args)
		}
	}
}

func TestValuesReachWhatTheyName(t *testing.T) {
	all := helm(t, `
image: {repository: registry.example.com/larder, tag: v9, pullPolicy: Always, pullSecrets: [pull]}
inlineEndpoints: [https://s3.example.com]
storageClass: {parameters: {source: s3://bucket}}
kubeletDir: /data/kubelet
cache: {dir: /mnt/nvme, capacity: 1TiB, minFree: 5GiB, tiers: [{dir: /dev/shm/larder, capacity: 8GiB, kind: MEM}, {dir: /mnt/disk, capacity: 9TiB, kind: HDD}]}
nodeSelector: {pool: analytics}
tolerations: [{key: only, operator: Exists}]
worker: {extraArgs: [--no-splice]}
master: {persistence: {storageClassName: fast, size: 9Gi}}
`)
	worker, node := all["DaemonSet/larder-worker"].(*appsv1.DaemonSet).Spec.Template.Spec, all["DaemonSet/larder-node"].(*appsv1.DaemonSet).Spec.Template.Spec
	for _, pod := range []corev1.PodSpec{worker, node} {
		c := pod.Containers[0]
		if c.Image != "registry.example.com/larder:v9" || c.ImagePullPolicy != "Always" || pod.ImagePullSecrets[0].Name != "pull" {
			t.Errorf("image %s, %s, %v", c.Image, c.ImagePullPolicy, pod.ImagePullSecrets)
		}
		if pod.NodeSelector["pool"] != "analytics" || pod.Tolerations[0].Key != "only" {
			t.Errorf("placement %v %v", pod.NodeSelector, pod.Tolerations)
		}
		for _, dir := range []string{"/mnt/nvme", "/dev/shm/larder", "/mnt/disk"} {
			if !strings.Contains(fmt.Sprint(pod.Volumes), dir) {
				t.Errorf("no %s in the volumes %v", dir, pod.Volumes)
			}
		}
	}
	tiersAndViews(t, worker.Containers[0], node.Containers[0])
	for container, want := range map[*corev1.Container][]string{
		&worker.Containers[0]: {"--tier=/var/cache/larder:1TiB", "--min-free=5GiB", "--no-splice"},
		&node.Containers[0]:   {"--kubelet-dir=/data/kubelet", "--registration-dir=/data/kubelet/plugins_registry", "--inline-endpoint=https://s3.example.com"},
	} {
		for _, arg := range want {
			if !slices.Contains(container.Args, arg) {
				t.Errorf("%s: no %s in %q", container.Name, arg, container.Args)
			}
		}
	}
	if text := fmt.Sprint(node); strings.Contains(text, "/var/lib/kubelet") {
		t.Errorf("the kubelet's other directory is named: %s", text)
	}
	if got := all["StorageClass/larder"].(*storagev1.StorageClass).Parameters["source"]; got != "s3://bucket" {
		t.Errorf("source %q", got)
	}
	claim := all["StatefulSet/larder-master"].(*appsv1.StatefulSet).Spec.VolumeClaimTemplates[0].Spec
	if *claim.StorageClassName != "fast" || claim.Resources.Requests.Storage().String() != "9Gi" {
		t.Errorf("claim %+v", claim)
	}
}

// examples are what users and administrators apply.
func examples(t *testing.T) map[string]objects {
	t.Helper()
	all := map[string]objects{}
	names, err := filepath.Glob("examples/*.yaml")
	if err != nil || len(names) == 0 {
		t.Fatalf("examples: %v, %v", names, err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(filepath.Base(name), "spark-") { // a pod template has no name
			text = bytes.Replace(text, []byte("kind: Pod\n"), []byte("kind: Pod\nmetadata: {name: template}\n"), 1)
		}
		all[name] = decode(t, name, text)
	}
	return all
}

// podSpecs are the pods of objects, by the names of what makes them.
func podSpecs(all objects) map[string]corev1.PodSpec {
	specs := map[string]corev1.PodSpec{}
	for key, o := range all {
		switch o := o.(type) {
		case *corev1.Pod:
			specs[key] = o.Spec
		case *appsv1.DaemonSet:
			specs[key] = o.Spec.Template.Spec
		case *appsv1.Deployment:
			specs[key] = o.Spec.Template.Spec
		case *appsv1.StatefulSet:
			specs[key] = o.Spec.Template.Spec
		}
	}
	return specs
}

func containers(s corev1.PodSpec) []corev1.Container {
	return append(slices.Clone(s.InitContainers), s.Containers...)
}

// restricted says what of a pod Pod Security "restricted" forbids.
func restricted(s corev1.PodSpec) (bad []string) {
	pod := s.SecurityContext
	if pod == nil {
		pod = &corev1.PodSecurityContext{}
	}
	if s.HostNetwork || s.HostPID || s.HostIPC {
		bad = append(bad, "a namespace of the host")
	}
	for _, v := range s.Volumes {
		if v.HostPath != nil {
			bad = append(bad, "hostPath "+v.HostPath.Path)
		}
	}
	isTrue := func(b *bool) bool { return b != nil && *b }
	if pod.SeccompProfile == nil || pod.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		bad = append(bad, "no seccomp profile")
	}
	if !isTrue(pod.RunAsNonRoot) || pod.RunAsUser != nil && *pod.RunAsUser == 0 {
		bad = append(bad, "may be root")
	}
	for _, c := range containers(s) {
		sc := c.SecurityContext
		if sc == nil {
			bad = append(bad, c.Name+": no security context")
			continue
		}
		if isTrue(sc.Privileged) || sc.AllowPrivilegeEscalation == nil || *sc.AllowPrivilegeEscalation {
			bad = append(bad, c.Name+": privilege")
		}
		if sc.Capabilities == nil || !slices.Equal(sc.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(sc.Capabilities.Add) > 0 {
			bad = append(bad, c.Name+": capabilities")
		}
		for _, p := range c.Ports {
			if p.HostPort != 0 {
				bad = append(bad, c.Name+": hostPort")
			}
		}
	}
	return bad
}

func TestExamplesPassPodSecurityRestricted(t *testing.T) {
	pods := 0
	for file, all := range examples(t) {
		for name, spec := range podSpecs(all) {
			pods++
			if bad := restricted(spec); len(bad) > 0 {
				t.Errorf("%s: %s: %s", file, name, strings.Join(bad, "; "))
			}
		}
	}
	if pods < 6 {
		t.Errorf("only %d pods in the examples", pods)
	}
}

// Whatever of ours is not the node plugin is restricted but for the hostPaths of the worker.
func TestOnlyTheNodePluginIsPrivileged(t *testing.T) {
	hostPaths := map[string][]string{
		"DaemonSet/larder-worker": {"hostPath /var/cache/larder", "hostPath /run/larder"},
	}
	for _, dir := range []string{"base", "overlays/dev", "overlays/ha"} {
		for name, spec := range podSpecs(kustomize(t, dir)) {
			if spec.HostNetwork || spec.HostPID || spec.HostIPC {
				t.Errorf("%s: %s uses a namespace of the host", dir, name)
			}
			for _, c := range containers(spec) {
				if sc := c.SecurityContext; sc == nil || sc.ReadOnlyRootFilesystem == nil || !*sc.ReadOnlyRootFilesystem {
					t.Errorf("%s: %s: %s can write to its root", dir, name, c.Name)
				}
			}
			if name == "DaemonSet/larder-node" {
				continue
			}
			if bad := restricted(spec); !slices.Equal(bad, hostPaths[name]) {
				t.Errorf("%s: %s: %q; want %q", dir, name, bad, hostPaths[name])
			}
			token := name == "Deployment/larder-controller" || name == "StatefulSet/larder-master" // see base/rbac.yaml
			if !token && (spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken) {
				t.Errorf("%s: %s has a token", dir, name)
			}
		}
	}
}

func TestImagesArePinned(t *testing.T) {
	for _, dir := range []string{"base", "overlays/dev", "overlays/ha"} {
		for name, spec := range podSpecs(kustomize(t, dir)) {
			checkPinned(t, dir+": "+name, spec)
		}
	}
	for file, all := range examples(t) {
		for name, spec := range podSpecs(all) {
			if !strings.Contains(file, "spark-") { // Spark fills in its own
				checkPinned(t, file+": "+name, spec)
			}
		}
	}
}

func checkPinned(t *testing.T, what string, spec corev1.PodSpec) {
	t.Helper()
	for _, c := range containers(spec) {
		_, tag, ok := strings.Cut(c.Image[strings.LastIndexByte(c.Image, '/')+1:], ":")
		if !ok || tag == "latest" || tag == "dev" {
			t.Errorf("%s: image %q of %s has no version", what, c.Image, c.Name)
		}
	}
}

// What needs a reason has one: rules of RBAC and hostPaths, by a comment above or beside them.
func TestRightsAndHostPathsSayWhy(t *testing.T) {
	found := 0
	for _, name := range []string{"base/rbac.yaml", "base/node.yaml", "base/worker.yaml", "base/master.yaml", "base/controller.yaml"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(text), "\n")
		for i, line := range lines {
			trimmed := strings.TrimSpace(line)
			rule := strings.HasPrefix(trimmed, "- apiGroups:")
			if !rule && !strings.HasPrefix(trimmed, "hostPath:") && !strings.HasPrefix(trimmed, "privileged:") {
				continue
			}
			found++
			// A second rule may stand below another under one comment.
			above := i - 1
			for rule && above > 0 && !strings.HasPrefix(strings.TrimSpace(lines[above]), "#") && !strings.HasPrefix(strings.TrimSpace(lines[above]), "rules:") {
				above--
			}
			if !strings.HasPrefix(strings.TrimSpace(lines[above]), "#") {
				t.Errorf("%s:%d: %s: why?", name, i+1, trimmed)
			}
		}
	}
	if found < 15 {
		t.Errorf("found only %d rules and hostPaths", found)
	}
}

func TestEveryWorkloadIsProbedAndCanBeDrained(t *testing.T) {
	all := kustomize(t, "base")
	for name, spec := range podSpecs(all) {
		if spec.PriorityClassName == "" || spec.TerminationGracePeriodSeconds == nil {
			t.Errorf("%s: priority %q, grace period %v", name, spec.PriorityClassName, spec.TerminationGracePeriodSeconds)
		}
		for _, c := range spec.Containers {
			if c.LivenessProbe == nil || c.ReadinessProbe == nil && c.Name != "provisioner" {
				t.Errorf("%s: %s: probes %v %v", name, c.Name, c.LivenessProbe, c.ReadinessProbe)
			}
			if c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().IsZero() {
				t.Errorf("%s: %s: resources %v", name, c.Name, c.Resources)
			}
		}
		kind, workload, _ := strings.Cut(name, "/")
		if pdb := all["PodDisruptionBudget/"+workload]; kind != "DaemonSet" && pdb == nil { // a drain leaves DaemonSets alone
			t.Errorf("%s has no PodDisruptionBudget", name)
		}
	}
	worker := all["DaemonSet/larder-worker"].(*appsv1.DaemonSet).Spec.UpdateStrategy.RollingUpdate
	if worker.MaxSurge.IntValue() != 1 || worker.MaxUnavailable.IntValue() != 0 {
		t.Errorf("worker's update %v: the next one has to be there before the old one goes", worker)
	}
}
