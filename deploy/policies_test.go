package deploy

import (
	"maps"
	"strings"
	"testing"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/ext"
	admissionv1 "k8s.io/api/admissionregistration/v1"
)

// verdict evaluates a policy as the API server does: whether it says anything of the request, and
// what it objects to.
func verdict(t *testing.T, p *admissionv1.ValidatingAdmissionPolicy, request, object, old map[string]any) (matches bool, objections []string) {
	t.Helper()
	env, err := cel.NewEnv(cel.OptionalTypes(), ext.Strings(), cel.Variable("object", cel.DynType), cel.Variable("oldObject", cel.DynType),
		cel.Variable("request", cel.DynType), cel.Variable("variables", cel.DynType))
	if err != nil {
		t.Fatal(err)
	}
	variables := map[string]any{}
	in := map[string]any{"object": object, "oldObject": old, "request": request, "variables": variables}
	eval := func(expression string) any {
		ast, issues := env.Compile(expression)
		if issues.Err() != nil {
			t.Fatalf("%s: %v", expression, issues.Err())
		}
		program, err := env.Program(ast)
		if err != nil {
			t.Fatal(err)
		}
		out, _, err := program.Eval(in)
		if err != nil {
			return err // failurePolicy: Fail
		}
		return out.Value()
	}
	for _, c := range p.Spec.MatchConditions {
		if eval(c.Expression) != true {
			return false, nil
		}
	}
	for _, v := range p.Spec.Variables {
		variables[v.Name] = eval(v.Expression)
	}
	for _, v := range p.Spec.Validations {
		if eval(v.Expression) != true {
			objections = append(objections, v.Message)
		}
	}
	return true, objections
}

func policy(t *testing.T, name string) *admissionv1.ValidatingAdmissionPolicy {
	t.Helper()
	all := kustomize(t, "base")
	b, ok := all["ValidatingAdmissionPolicyBinding/"+name].(*admissionv1.ValidatingAdmissionPolicyBinding)
	if !ok || b.Spec.PolicyName != name || len(b.Spec.ValidationActions) != 1 || b.Spec.ValidationActions[0] != admissionv1.Deny {
		t.Fatalf("binding of %s: %v", name, b)
	}
	p := all["ValidatingAdmissionPolicy/"+name].(*admissionv1.ValidatingAdmissionPolicy)
	if *p.Spec.FailurePolicy != admissionv1.Fail {
		t.Errorf("%s: what cannot be judged passes", name)
	}
	return p
}

// by is a request of a service account's pod on node n1.
func by(account, operation, name string) map[string]any {
	return map[string]any{"operation": operation, "name": name, "userInfo": map[string]any{
		"username": "system:serviceaccount:larder-system:" + account,
		"extra":    map[string]any{"authentication.kubernetes.io/node-name": []any{"n1"}},
	}}
}

type object = map[string]any

func taint(key string) object { return object{"key": key, "effect": "NoSchedule"} }

func nodeWith(more object, taints ...any) object {
	spec := object{}
	if len(taints) > 0 {
		spec["taints"] = taints
	}
	o := object{"metadata": object{"name": "n1", "labels": object{"a": "b"}}, "spec": spec}
	maps.Copy(o["metadata"].(object), more)
	return o
}

func TestNodePluginRemovesItsOwnTaintOnly(t *testing.T) {
	p := policy(t, "larder-node-taints")
	ours, gpu := taint("csi.larder.dev/not-ready"), taint("gpu")
	tainted := nodeWith(nil, gpu, ours)
	cordoned := nodeWith(nil, gpu)
	cordoned["spec"].(object)["unschedulable"] = true
	for _, c := range []struct {
		name    string
		request object
		after   object
		want    string // "" is allowed
	}{
		{"its taint", by("larder-node", "UPDATE", "n1"), nodeWith(nil, gpu), ""},
		{"another node's", by("larder-node", "UPDATE", "n2"), nodeWith(nil, gpu), "own node"},
		{"another taint", by("larder-node", "UPDATE", "n1"), nodeWith(nil, ours), "no other"},
		{"all taints", by("larder-node", "UPDATE", "n1"), nodeWith(nil), "no other"},
		{"a new taint", by("larder-node", "UPDATE", "n1"), nodeWith(nil, gpu, ours, taint("evict")), "no other"},
		{"a label", by("larder-node", "UPDATE", "n1"), nodeWith(object{"labels": object{"a": "c"}}, gpu), "nothing but taints"},
		{"an annotation", by("larder-node", "UPDATE", "n1"), nodeWith(object{"annotations": object{"a": "c"}}, gpu), "nothing but taints"},
		{"cordoning", by("larder-node", "UPDATE", "n1"), cordoned, "nothing but taints"},
		{"a token without a node", object{"name": "n1", "userInfo": object{"username": "system:serviceaccount:x:larder-node"}}, nodeWith(nil, gpu), "own node"},
	} {
		matches, bad := verdict(t, p, c.request, c.after, tainted)
		if !matches || (c.want == "") != (len(bad) == 0) || !strings.Contains(strings.Join(bad, "; "), c.want) {
			t.Errorf("%s: matches %v, objections %q; want %q", c.name, matches, bad, c.want)
		}
	}
	if matches, _ := verdict(t, p, by("somebody", "UPDATE", "n2"), nodeWith(nil), tainted); matches {
		t.Error("the policy speaks of others than the node plugin")
	}
}

func TestNodePluginMakesItsOwnVolumesOnly(t *testing.T) {
	p := policy(t, "larder-node-volumes")
	const dir = "/var/lib/kubelet/plugins/csi.larder.dev/local/"
	volume := func(class, kind, path string) object {
		return object{"spec": object{"storageClassName": class, kind: object{"path": path}}}
	}
	good := volume("larder-local", "local", dir+"larder-local-x/mnt")
	for _, c := range []struct {
		name        string
		operation   string
		object, old object
		want        string
	}{
		{"a slot", "CREATE", good, nil, ""},
		{"the end of a slot", "DELETE", nil, good, ""},
		{"a hostPath", "CREATE", volume("larder-local", "hostPath", "/"), nil, "own folder"},
		{"another class", "CREATE", volume("fast", "local", dir+"x"), nil, "class larder-local"},
		{"another path", "CREATE", volume("larder-local", "local", "/etc"), nil, "own folder"},
		{"a path out of the folder", "CREATE", volume("larder-local", "local", dir+"../../../pki"), nil, "own folder"},
		{"the end of another's volume", "DELETE", nil, volume("fast", "local", dir+"x"), "class larder-local"},
	} {
		matches, bad := verdict(t, p, by("larder-node", c.operation, "x"), c.object, c.old)
		if !matches || (c.want == "") != (len(bad) == 0) || !strings.Contains(strings.Join(bad, "; "), c.want) {
			t.Errorf("%s: matches %v, objections %q; want %q", c.name, matches, bad, c.want)
		}
	}
}
