package e2e

import (
	"fmt"
	"strconv"
	"strings"

	admission "k8s.io/api/admissionregistration/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// The one S3 server of all tests: a pod, and the URL that workers and inline volumes name.
const (
	storeNamespace = "larder-e2e-s3"
	storePort      = 7070
	storeURL       = "http://s3." + storeNamespace + ".svc:7070"
	bucket         = "lake"
	accessKey      = "AKIAE2ELARDER"
	// It must never be seen in a log or an event.
	secretKey = "e2e-very-secret-key-7c1f0b"
)

// store is the S3 server. It writes a line per request.
type store struct{ pod string }

// startStore starts the server unless an earlier run left it.
func (t *test) startStore() *store {
	t.Helper()
	_, err := t.client.CoreV1().Namespaces().Create(t.ctx, &core.Namespace{ObjectMeta: meta.ObjectMeta{Name: storeNamespace}}, meta.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	s := *t
	s.ns = storeNamespace
	grace := int64(0)
	spec := &core.PodSpec{
		TerminationGracePeriodSeconds: &grace,
		Containers: []core.Container{{
			Name: "main", Image: flags.image, ImagePullPolicy: core.PullIfNotPresent,
			Command: []string{"sh", "-c", "mkdir -p /data/objects && exec versitygw --port :" + strconv.Itoa(storePort) +
				" --keep-alive --access-log /data/access.log posix /data/objects"},
			Env:            []core.EnvVar{{Name: "ROOT_ACCESS_KEY", Value: accessKey}, {Name: "ROOT_SECRET_KEY", Value: secretKey}},
			ReadinessProbe: &core.Probe{PeriodSeconds: 1, ProbeHandler: core.ProbeHandler{TCPSocket: &core.TCPSocketAction{Port: intstr.FromInt32(storePort)}}},
			VolumeMounts:   []core.VolumeMount{{Name: "data", MountPath: "/data"}},
		}},
		Volumes: []core.Volume{{Name: "data", VolumeSource: core.VolumeSource{EmptyDir: &core.EmptyDirVolumeSource{}}}},
	}
	// On the first node: the tests that take a node away take the last one.
	_, err = t.client.CoreV1().Pods(storeNamespace).Create(t.ctx, &core.Pod{
		ObjectMeta: meta.ObjectMeta{Name: "s3", Labels: map[string]string{"app": "s3"}}, Spec: *on(t.nodes[0], spec)}, meta.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	_, err = t.client.CoreV1().Services(storeNamespace).Create(t.ctx, &core.Service{ObjectMeta: meta.ObjectMeta{Name: "s3"}, Spec: core.ServiceSpec{
		Selector: map[string]string{"app": "s3"}, Ports: []core.ServicePort{{Port: storePort}}}}, meta.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	s.ready("s3")
	return &store{pod: "s3"}
}

// data is a dataset in the store: prefix NAME of the bucket.
type data struct {
	name  string
	files int
	size  int
}

// put makes a dataset that no other test knows.
func (t *test) put(files, size int) data {
	t.Helper()
	d := data{t.ns, files, size}
	_, err := t.execIn(storeNamespace, t.s3.pod, "main", append([]string{"env", "AWS_ACCESS_KEY_ID=" + accessKey, "AWS_SECRET_ACCESS_KEY=" + secretKey,
		"probe", "put", "http://127.0.0.1:" + strconv.Itoa(storePort), bucket}, d.args()...)...)
	t.must(err)
	return d
}

func (d data) args() []string { return []string{d.name, strconv.Itoa(d.files), strconv.Itoa(d.size)} }

func (d data) source() string { return "s3://" + bucket + "/" + d.name }

// requests are the lines of the store's log about a dataset.
func (t *test) requests(d data, kind string) []string {
	t.Helper()
	out, err := t.execIn(storeNamespace, t.s3.pod, "main", "sh", "-c", fmt.Sprintf("grep -F '%s' /data/access.log | grep -F '%s' || true", d.name, kind))
	t.must(err)
	if out == "" {
		return nil
	}
	return strings.Split(out, "\n")
}

// gets are how many objects of a dataset, or ranges of them, were asked for.
func (t *test) gets(d data) int { t.Helper(); return len(t.requests(d, "s3_GetObject ")) }

// attributes are those of an inline volume, and the parameters of a class without its Secrets.
func (d data) attributes(more ...string) map[string]string {
	a := map[string]string{"source": d.source(), "endpoint": storeURL}
	for i := 0; i < len(more); i += 2 {
		a[more[i]] = more[i+1]
	}
	return a
}

const secretName = "s3-credentials"

// secret gives the test's namespace the credentials.
func (t *test) secret() string {
	t.Helper()
	_, err := t.client.CoreV1().Secrets(t.ns).Create(t.ctx, &core.Secret{ObjectMeta: meta.ObjectMeta{Name: secretName},
		StringData: map[string]string{"AWS_ACCESS_KEY_ID": accessKey, "AWS_SECRET_ACCESS_KEY": secretKey}}, meta.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	return secretName
}

// classFor makes a class for a dataset, with the Secret of the claim's namespace.
func (t *test) classFor(d data, more ...string) string {
	t.Helper()
	t.secret()
	p := d.attributes(more...)
	for _, call := range []string{"node-stage", "node-publish"} {
		p["csi.storage.k8s.io/"+call+"-secret-name"] = secretName
		p["csi.storage.k8s.io/"+call+"-secret-namespace"] = "${pvc.namespace}"
	}
	return t.class(p)
}

// verify reads every byte of a dataset in a pod, at its i-th volume.
func (t *test) verify(pod string, d data, i int) {
	t.Helper()
	t.mustExec(pod, append([]string{"probe", "verify", mountPath(i) + "/data"}, d.args()...)...)
}

// worker reads every byte through a pod's domain socket, and returns the UUID of its worker.
func (t *test) worker(pod string, d data, i int) string {
	t.Helper()
	return t.mustExec(pod, append([]string{"probe", "socket", mountPath(i) + "/domain"}, d.args()...)...)
}

const userLabel = "larder-e2e-user"

// forbid makes an admission policy, as a company has it, for the namespaces of users: Pod Security
// "restricted" says it for pods; this says it for whatever makes pods' volumes, too.
func (t *test) forbid() {
	t.Helper()
	fail, deny := admission.Fail, admission.Deny
	const name = "larder-e2e-users"
	policy := &admission.ValidatingAdmissionPolicy{ObjectMeta: meta.ObjectMeta{Name: name}, Spec: admission.ValidatingAdmissionPolicySpec{
		FailurePolicy: &fail,
		MatchConstraints: &admission.MatchResources{ResourceRules: []admission.NamedRuleWithOperations{{RuleWithOperations: admission.RuleWithOperations{
			Operations: []admission.OperationType{admission.Create, admission.Update},
			Rule:       admission.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
		}}}},
		Validations: []admission.Validation{
			{Expression: "!has(object.spec.volumes) || object.spec.volumes.all(v, !has(v.hostPath))", Message: "hostPath is forbidden here"},
			{Expression: "!has(object.spec.hostNetwork) || !object.spec.hostNetwork", Message: "hostNetwork is forbidden here"},
			{Expression: "!has(object.spec.hostPID) || !object.spec.hostPID", Message: "hostPID is forbidden here"},
			{Expression: "object.spec.containers.all(c, !has(c.securityContext) || !has(c.securityContext.privileged) || !c.securityContext.privileged)", Message: "privilege is forbidden here"},
		},
	}}
	_, err := t.client.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(t.ctx, policy, meta.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	_, err = t.client.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Create(t.ctx, &admission.ValidatingAdmissionPolicyBinding{
		ObjectMeta: meta.ObjectMeta{Name: name}, Spec: admission.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: name, ValidationActions: []admission.ValidationAction{deny},
			MatchResources: &admission.MatchResources{NamespaceSelector: &meta.LabelSelector{MatchLabels: map[string]string{userLabel: "true"}}}}}, meta.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
}
